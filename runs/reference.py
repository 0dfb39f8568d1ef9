"""Keep a finished run as results/reference/<job>: every generation (xz), run records, report, plots, and a README of
one screen.

Reads   results/RUN and checkpoints/RUN, as a recipe leaves them
Writes  results/reference/<job>: README.md, generations/*.jsonl.xz, records/*.json, compare.{md,html,run.json}, plots.
        What a person wrote about the run stands in about.md there: it is kept and becomes part of README.md.
Run     python runs/reference.py --job poems --command "bash runs/poems.sh"
"""

import lzma
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.jsonl import read_json, read_jsonl  # noqa: E402
from common.settings import UserError, read_settings  # noqa: E402


@dataclass
class Settings:
    job: str
    """writing job: names the folder under results/reference"""
    run: str = ""
    """folder of the run under results and checkpoints; empty = the job's name"""
    command: str = ""
    """what made it, for the README"""
    trainings: tuple[str, ...] = ()
    """folders under results of the same chain trained with other seeds: a table of the spread between trainings"""
    columns: int = 6
    """metrics shown in the README where the job names no COLUMNS: the first ones of the report"""
    rows: int = 5
    """prompts whose texts are shown: the first ones, unpicked"""


def as_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def opening(settings: Settings, record: dict, stages: list[dict], about: str, texts: str = "generations") -> list[str]:
    """The commits are those of all records: a chain that was taken up again may have run on more than one."""
    ordered = sorted([*stages, record], key=lambda one: one["started"])
    commits = dict.fromkeys(str((one.get("git") or {}).get("commit") or "unknown")[:8] for one in ordered)
    devices = dict.fromkeys(one["device"] for one in ordered if one.get("device"))
    command = settings.command or f"bash runs/{settings.job}.sh"
    return [
        f"# {settings.job}: a reference run",
        "",
        f"`{command}` at commit {', '.join(commits)}, {', '.join(devices)}, {record['started'][:10]}.",
        f"`{texts}/` has every text (`xz -dc FILE`), `records/` what each stage was run with, took and reached, the",
        "reports all figures.",
        "",
        *([about.rstrip(), ""] if about else []),
    ]


def spread(tables: list[dict], metrics: list[str]) -> list[str]:
    """Mean of each metric over trainings with its range: what the interval over prompts does not hold."""
    from common.evaluation.tables import markdown_table

    rows = []
    for run in tables[0]:
        means = [[table[run].get(name, [None])[0] for table in tables if run in table] for name in metrics]
        cells = [
            f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})" if None not in values else ""
            for values in means
        ]
        rows.append([run, *cells])
    return [f"{len(tables)} trainings, mean and range between them:", "", markdown_table(["", *metrics], rows), ""]


def readme(
    settings: Settings, report: dict, stages: list[dict], texts: dict[str, list[dict]], others: list[dict], about: str
) -> str:
    """The first columns of the report, and the first texts of each run as they came."""
    from common.evaluation.tables import markdown_table
    from tasks.base import load_task

    table = report["figures"]["table"]
    known = [name for name in next(iter(table.values())) if any(run.get(name, [0])[0] for run in table.values())]
    first = load_task(report["settings"]["task"]).COLUMNS
    metrics = [name for name in first if any(name in run for run in table.values())] or known[: settings.columns]

    def figure(run: str, name: str) -> str:
        mean, low, high = table[run].get(name, (None, None, None))
        return "" if mean is None else f"{mean:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    rows = [[run, *(figure(run, name) for name in metrics)] for run in table]
    lines = [
        *opening(settings, report, stages, about),
        f"{report['figures']['prompts']} prompts; mean and 95 % interval over prompts:",
    ]
    lines += ["", markdown_table(["", *metrics], rows), ""]
    if others:
        lines += spread([table, *(other["figures"]["table"] for other in others)], metrics)
    lines += [f"The first {settings.rows} prompts, the first sample of each run, as they came:", ""]
    first = next(iter(texts.values()))
    for prompt in list(dict.fromkeys(row["prompt_id"] for row in first))[: settings.rows]:
        shown = {run: next((row for row in rows if row["prompt_id"] == prompt), None) for run, rows in texts.items()}
        asked = next(row for row in shown.values() if row)["prompt"][-1]["content"]
        lines += [f"**{as_cell(asked)[:400]}**", ""]
        lines += [*(f"- {run}: {as_cell(row['completion'])[:400]}" for run, row in shown.items() if row), ""]
    return "\n".join(lines)


def labelled(rows: list[dict]) -> list[str]:
    """Texts with the label that a classifier gave them, as Markdown."""
    from common.evaluation.tables import markdown_table

    cells = [[as_cell(row["input"])[:400], row["predicted_label"], f"{row['confidence']:.3f}"] for row in rows]
    return [f"The first {len(rows)} test texts, as they came:", "", markdown_table(["", "label", "p"], cells), ""]


def keep(source: Path, target: Path) -> None:
    """A copy; of JSONL a compressed one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".jsonl":
        target.with_name(f"{target.name}.xz").write_bytes(lzma.compress(source.read_bytes(), preset=9))
    else:
        shutil.copy(source, target)


def main(settings: Settings) -> None:
    run = settings.run or settings.job
    results, models = ROOT / "results" / run, ROOT / "checkpoints" / run
    output = ROOT / "results/reference" / settings.job
    records = {path.parent.name: path for path in sorted(models.glob("*/run.json"))}
    stages = [read_json(path) for path in records.values()]
    kinds = (".md", ".html", ".png", ".csv", ".json")
    reports = [path for path in sorted(results.glob("*")) if path.suffix in kinds and path.stem != "mask_preview"]
    if not records or not reports:
        raise UserError(f"no finished run in {results}; fix: bash runs/{settings.job}.sh")
    others = [read_json(ROOT / "results" / name / "compare.run.json") for name in settings.trainings]
    about = (output / "about.md").read_text(encoding="utf-8") if (output / "about.md").is_file() else ""
    fresh = output.with_name(output.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    for path in reports:
        keep(path, fresh / path.name)
    for name in settings.trainings:
        keep(ROOT / "results" / name / "compare.md", fresh / "trainings" / f"{name}.md")
    for name, path in records.items():
        keep(path, fresh / "records" / f"{name}.run.json")
        for plot in path.parent.glob("*.png"):
            keep(plot, fresh / "records" / f"{name}_{plot.name}")
    for path in sorted([*results.glob("generations/*"), *results.glob("classified/*")]):
        keep(path, fresh / path.parent.name / path.name)
    if (results / "compare.run.json").is_file():
        files = sorted((results / "generations").glob("*.jsonl"))
        texts = {file.stem: read_jsonl(file, "generation") for file in files}
        page = readme(settings, read_json(results / "compare.run.json"), stages, texts, others, about)
    else:  # a classifier: its reports are short
        tables = [path.read_text(encoding="utf-8") for path in reports if path.suffix == ".md"]
        first = [read_jsonl(path)[: settings.rows] for path in sorted(results.glob("classified/*.jsonl"))]
        shown = [line for rows in first for line in labelled(rows)]
        page = "\n".join([*opening(settings, stages[-1], stages, about, "classified"), *tables, *shown])
    (fresh / "README.md").write_text(page, encoding="utf-8")
    if about:
        (fresh / "about.md").write_text(about, encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"wrote {output} ({size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main(read_settings(Settings))
