"""Everything side by side: one table of all runs, what each stage changed and cost, plots, and one offline HTML page.

Every figure is taken over the prompts that all runs share. The first row is the golden texts of those prompts, scored
by the same metrics. A change is measured against the run that a stage starts from (PARENTS; for other names the run
before it), on the same prompts, paired. Minutes and memory are those of the stage's own run.json.

Reads   results/{task}/generations/<run>.jsonl (stage 60), results/{task}/scores/<run>.jsonl, <run>.general.jsonl
        (stage 70), checkpoints/{task}/<run>/run.json where there is one
Writes  results/{task}/compare.md, compare.html (one file, opens without a network), compare_*.png, compare.run.json
Run     python scripts/72_compare.py
        python scripts/72_compare.py --runs base sft sft_merged dpo --examples 30 --overwrite
        python scripts/72_compare.py --watch
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from common.evaluation.comparison import (
    GENERAL,
    GOLDEN,
    LOWER,
    Entry,
    change,
    cost_records,
    falls,
    general_file,
    golden_entry,
    keep_common,
    load_run,
    measure,
    training_now,
)
from common.settings import Limit, UserError, read_settings, unused
from tasks.base import Task, load_task

# The chain, and the run that each stage starts from (the nearest of its ancestors that is there).
PARENTS = {
    "base": None,
    "sft": "base",
    "sft_merged": "sft",
    "dpo": "sft_merged",
    "dpo_merged": "dpo",
    "dpo_round2": "dpo_merged",
    "dpo_round2_merged": "dpo_round2",
    "rft": "sft_merged",
    "kto": "sft_merged",
    "kto_merged": "kto",
    "grpo": "sft_merged",
    "dpo_grpo": "dpo_round2_merged",
    "ppo": "sft_merged",
}


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: a module in scripts/tasks"""
    generations: Path = Path("results/{task}/generations")
    """folder of <run>.jsonl"""
    scores: Path = Path("results/{task}/scores")
    """folder of <run>.jsonl"""
    checkpoints: Path = Path("checkpoints/{task}")
    """folder of <run>/run.json: what each stage cost"""
    runs: tuple[str, ...] = ()
    """names in the order of the rows, () = all: the chain first, others by name"""

    # --- figures
    metrics: tuple[str, ...] = ()
    """columns of the tables and plots, () = all"""
    bootstrap: int = 2000
    """resamples behind each interval"""
    examples: int = 0
    """prompts on the page, drawn by the seed; 0 = all"""

    # --- run
    output: Path = Path("results/{task}/compare")
    """path of the report without its ending"""
    seed: int = 42
    """of the resampling and of the choice of examples"""
    overwrite: bool = False
    """replace what an earlier run left at output"""
    watch: bool = False
    """replace the report whenever a run, its scores or a training has gone on, until Ctrl-C; needs no overwrite"""
    watch_seconds: Annotated[float, Limit(above=0)] = 5.0
    """between two looks at the files"""

    def clashes(self):
        if not self.watch:
            yield from unused(self, "without --watch", "watch_seconds")


def choose_runs(settings: Settings) -> list[str]:
    there = [path.stem for path in settings.generations.glob("*.jsonl")]
    if not there:
        raise UserError(f"no generation file in {settings.generations}; fix: run scripts/60_generate.py")
    if missing := [name for name in settings.runs if name not in there]:
        raise UserError(f"no generations of {', '.join(missing)}; fix: use names from {', '.join(sorted(there))}")
    if GOLDEN in (settings.runs or there):
        raise UserError(f"a run is called {GOLDEN}, the name of the golden texts; fix: rename its files")
    chain = list(PARENTS)
    return list(dict.fromkeys(settings.runs)) or sorted(
        there, key=lambda name: (chain.index(name) if name in chain else len(chain), name)
    )


def parent_of(name: str, names: list[str]) -> str | None:
    """The run that `name` is measured against: the nearest ancestor that is there, else the run before it; base against
    none."""
    ancestor = PARENTS.get(name)
    while ancestor is not None and ancestor not in names:
        ancestor = PARENTS[ancestor]
    before = names[names.index(name) - 1] if names.index(name) else None
    return None if name == "base" else ancestor or before


def cost_of(record: dict | None) -> list[str]:
    """Minutes, peak memory and device of the stage that made a run's model, from its run.json."""
    from common.evaluation.tables import NONE

    keys = ("wall_seconds", "peak_memory_mib", "peak_gpu_memory_mib", "device")
    seconds, memory, gpu, device = ((record or {}).get(key) for key in keys)
    peak = f"{memory} MiB" + (f" + {gpu} MiB GPU" if gpu else "") if memory else NONE
    return [NONE if seconds is None else f"{seconds / 60:.1f}", peak, device or NONE]


def examples_of(entries: list[Entry], task: Task, settings: Settings) -> list[dict]:
    """Prompts drawn by the seed, each with the golden text and the first sample of every run."""
    import random

    from common.conversations import readable, thought_of, without_thought
    from common.evaluation.compare_page import card

    first = [{row["prompt_id"]: i for i, row in reversed(list(enumerate(entry.rows)))} for entry in entries]
    prompts, examples = list(dict.fromkeys(entries[-1].prompts)), []  # the last entry is a run: it has them all
    if 0 < settings.examples < len(prompts):
        prompts = random.Random(settings.seed).sample(sorted(prompts), settings.examples)
    for id in prompts:
        cards = []
        for entry, index in zip(entries, first, strict=True):
            if id in index:
                row, scores = entry.rows[index[id]], entry.scores[index[id]]
                golden, text = entry.name == GOLDEN, without_thought(row["completion"])
                stopped = golden or row["finish_reason"] == "stop"
                marks, thought = task.mark(text, row["meta"]), thought_of({"content": row["completion"]})
                cards.append(card(entry.name, text, marks, scores, golden, stopped, thought))
        turns = [{"role": turn["role"], "content": readable(turn)} for turn in row["prompt"]]
        examples.append({"id": id, "turns": turns, "cards": cards})
    return examples


def make_tables(
    entries: list[Entry], names: list[str], columns: list[str], changes: dict, costs: dict, more: list, lower: list
) -> list:
    from common.evaluation.compare_page import Table
    from common.evaluation.statistics import Estimate
    from common.evaluation.tables import NONE

    unknown = Estimate(None, None, None)
    rows = [[entry.name, *(entry.figures.get(column, unknown) for column in columns)] for entry in entries]
    tables = [Table("Every run", ["run", *columns], rows, golden=GOLDEN, more=more, lower=lower)]
    rows = []
    for name in names:
        if name in changes or name in costs:
            parent, gains = changes.get(name, (NONE, {}))
            rows.append([name, parent, *(gains.get(column, unknown) for column in columns), *cost_of(costs.get(name))])
    if rows:
        header = ["run", "against", *columns, "minutes", "peak memory", "device"]
        tables.append(
            Table("What each stage changed, and what it cost", header, rows, changes=True, more=more, lower=lower)
        )
    return tables


def load_runs(settings: Settings, names: list[str]) -> tuple[list[tuple], list[str]]:
    """(what load_run gives of each run, what to tell of the others). While watching, a run that is not scored yet is
    left out; else it is an error."""
    loaded, notes = [], []
    for name in names:
        try:
            loaded.append(load_run(settings, name))
        except UserError as error:
            if not settings.watch:
                raise
            notes.append(f"Not shown yet: {error}")
    if not loaded:
        raise UserError(notes[0].removeprefix("Not shown yet: "))
    return loaded, notes


def paths_of(output: Path) -> list[Path]:
    """Report, page and plots."""
    stem = output.name.removesuffix(".md").removesuffix(".html")
    return [output.with_name(stem + ending) for ending in (".md", ".html", "_metrics.png", "_nll.png")]


def write_report(settings: Settings) -> str:
    """The report and all that goes with it; what the terminal shows of it."""
    from common.jsonl import read_json
    from common.runs import begin_run

    task = load_task(settings.task)
    loaded, left_out = load_runs(settings, choose_runs(settings))
    entries = [entry for entry, _, _ in loaded]
    names = [entry.name for entry in entries]
    if len({nll_model for _, _, nll_model in loaded if nll_model}) > 1:
        raise UserError(f"NLL under different models; fix: score all runs with one --nll-model ({settings.scores})")
    if len({tuple(entry.general) for entry in entries if entry.general}) > 1:
        raise UserError(f"NLL of different texts; fix: score all runs with one --general-file ({settings.scores})")
    notes = left_out + keep_common(entries)
    metrics = list(dict.fromkeys(name for entry in entries for scores in entry.scores for name in scores))
    set_metrics = list(task.SET_METRICS)
    known = metrics + set_metrics + ([GENERAL] if any(entry.general for entry in entries) else [])
    columns = [name for name in known if name in settings.metrics or not settings.metrics]
    if unknown := set(settings.metrics) - set(columns):
        raise UserError(f"no metric {', '.join(sorted(unknown))}; fix: use {', '.join(known)}")

    report, page, bars, boxes = paths_of(settings.output)
    data = [plot.with_suffix(".csv") for plot in (bars, boxes)]
    records = cost_records(settings, names)
    inputs = {f"generations {name}": settings.generations / f"{name}.jsonl" for name in names}
    inputs |= {f"scores {name}": settings.scores / f"{name}.jsonl" for name in names}
    inputs |= {f"general {name}": path for name in names if (path := general_file(settings, name))}
    inputs |= {f"cost {name}": path for name, path in records.items()}
    ignored = ("generations", "scores", "checkpoints", "output", "watch", "watch_seconds")
    files = dict(ignore=ignored, also=(page, bars, boxes, *data))
    with begin_run(report, settings, inputs, "72_compare", resumable=False, **files) as run:
        from common.evaluation.compare_page import Table, write_markdown, write_page
        from common.evaluation.plots import plot_bars, plot_boxes
        from common.evaluation.tables import interval, sampling_notes

        golden = golden_entry(entries, {id: scores for _, texts, _ in loaded for id, scores in texts.items()})
        everything = [golden, *entries] if golden else entries
        prompts = len(set(entries[0].prompts))
        for entry in everything:
            measure(entry, task, settings, metrics, prompts)
        changes = {}  # run -> (what it is measured against, metric -> Estimate)
        by_name = dict(zip(names, entries, strict=True))
        for name in names:
            if parent := parent_of(name, names):
                changes[name] = (parent, change(by_name[name], by_name[parent], metrics, set_metrics, settings))
        costs = {name: read_json(path) for name, path in records.items()}
        lower = [name for name in columns if name in (*LOWER, *task.LOWER_IS_BETTER)]
        fell = falls(changes, (*LOWER, *task.LOWER_IS_BETTER))
        first = [name for name in (*task.COLUMNS, GENERAL) if name in columns] if task.COLUMNS else []
        first = [] if settings.metrics else first
        more = [name for name in columns if name not in first] if first else []
        tables = make_tables(everything, names, columns, changes, costs, more, lower)
        if settings.watch and (rows := training_now(settings.checkpoints)):
            header = ["run", "stage", "step", "loss", "validation loss", "reward"]
            tables.append(Table("Trainings that have begun and not ended, as of their newest checkpoint", header, rows))

        texts = ", ".join(f"{entry.name} {len(entry.rows)}" for entry in entries)
        notes = [
            f"{prompts} prompts; texts: {texts}. Mean [95 % interval]: prompts are resampled, not texts; where all are "
            "0 or all 1, the exact binomial bound. – : does not apply, or not measured. Changes are paired by prompt; "
            "bold where the interval excludes 0.",
            *notes,
            *sampling_notes([settings.generations / f"{name}.jsonl" for name in names]),
        ]
        if golden and len(golden.rows) < prompts:
            notes.append(f"Only {len(golden.rows)} of the prompts have a golden text: that row is over those.")
        if set_metrics:
            notes.append(
                f"{', '.join(set_metrics)}: over one text a prompt; bounds are the least and the greatest such set. "
                "They fall as prompts are added: compare them within this table only."
            )
        if GENERAL in columns:
            notes.append(
                f"{GENERAL}: nats per character of general texts (data/general) under the run's model. Where it rises, "
                "that stage has forgotten something; the interval is over those texts."
            )
        if changes:
            shown = [
                f"{metric} {interval(estimate, sign=True)} ({name} against {against})"
                for name, against, metric, estimate in fell
            ]
            notes.append("What got worse, with 95 %: " + ("; ".join(shown) or "nothing") + ".")
        panels = {c: {e.name: e.figures[c] for e in everything if c in e.figures} for c in columns}
        images = {"Metrics": bars} if plot_bars(panels, bars, GOLDEN, lower) else {}
        nll = {entry.name: [v for v in entry.column("nll_per_character") if v is not None] for entry in everything}
        if nll := {name: values for name, values in nll.items() if values}:
            images["NLL per character under the frozen base"] = boxes
            plot_boxes(nll, boxes, "nats per character under the frozen base")
        title, examples = f"{settings.task}: {len(entries)} runs side by side", examples_of(everything, task, settings)
        write_markdown(report, title, notes, tables, images, examples)
        for name, record in records.items():  # what each stage drew of its own training
            for plot, words in (
                ("learning_curve", "learning curve"),
                ("overoptimisation", "reward against KL and NLL"),
            ):
                if (file := record.with_name(f"{plot}.png")).is_file():
                    images[f"{name}: {words}"] = file
        write_page(page, title, notes, tables, images, examples, lower)

        run.figure("table", {entry.name: entry.figures for entry in everything})
        run.figure("changes", {name: {"against": parent, **gains} for name, (parent, gains) in changes.items()})
        run.figure("fell", [dict(zip(("run", "against", "metric", "change"), row, strict=True)) for row in fell])
        run.figure("prompts", prompts)
        run.finish()
    return "\n\n".join([*notes, *(table.markdown(narrow=True) for table in tables)])


def stamps(settings: Settings) -> dict[Path, tuple[int, int]]:
    """When the files that a report is made of were written, and their sizes."""
    checkpoints, found = settings.checkpoints, {}
    files = [*settings.generations.glob("*.jsonl"), *settings.scores.glob("*.json*"), *checkpoints.glob("*/run.json")]
    for file in [*files, *checkpoints.glob("*/checkpoint-*/trainer_state.json")]:
        with suppress(FileNotFoundError):  # a checkpoint that was deleted just now
            found[file] = (file.stat().st_mtime_ns, file.stat().st_size)
    return found


def watch(settings: Settings) -> None:
    """Make the report anew whenever its files change, until Ctrl-C. It is made in a folder of its own and put into
    place file by file: the page is there, and whole, at all times."""
    from common.runs import check_output

    load_task(settings.task)
    report, page, *plots = paths_of(settings.output)
    check_output(report, "72_compare", (page, *plots, *(plot.with_suffix(".csv") for plot in plots)))
    page.parent.mkdir(parents=True, exist_ok=True)
    print(f"watching {settings.generations}, {settings.scores} and {settings.checkpoints}; Ctrl-C ends it", flush=True)
    seen = None
    with suppress(KeyboardInterrupt), TemporaryDirectory(prefix=".compare-", dir=page.parent) as folder:
        while True:
            if (now := stamps(settings)) != seen:
                seen = now
                try:
                    write_report(replace(settings, output=Path(folder) / settings.output.name))
                    for file in Path(folder).glob("[!.]*"):
                        os.replace(file, page.parent / file.name)
                    print(f"{time.strftime('%H:%M:%S')} renewed, reload it: {page}", flush=True)
                except UserError as error:
                    print(f"not yet: {error}", flush=True)
            time.sleep(settings.watch_seconds)


def main(settings: Settings) -> None:
    if settings.watch:
        watch(settings)
    else:
        print(write_report(settings))
        print(f"report: {paths_of(settings.output)[1]}")


if __name__ == "__main__":
    main(read_settings(Settings))
