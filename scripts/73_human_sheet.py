"""A sheet for people to judge texts blind, and what they said: write a shuffled CSV, read it back, report agreement.

Three kinds: `rating` (each text alone, 1-5), `style` (which of the labels has the answer), `pair` (two runs' answers to
one prompt, A or B or tie). Who wrote what stands only in the key beside the sheet, with a hash of the sheet's texts, so
that a sheet is read with its own key. Sides and order are drawn at random. Give every rater a copy of the same sheet;
cells that look like formulas are made harmless.

Reads   --generations (stage 60; with `rating` and `pair` the prompts that all files share) or labelled rows for
        `style`; --read: filled sheets, one a rater; --machine: what to compare them with, a file a run of the sheet:
        stage 61's output, stage 70's (with --metric), or rows with "id" and "score" (1-5); stage 71's one file speaks
        of all its candidates
Writes  results/{task}/human/<kind>.csv (UTF-8 with a byte order mark, for spreadsheets), <kind>.key.json,
        <kind>.run.json; with --read nothing, or --report FILE.json
Run     python scripts/73_human_sheet.py --task poems --kind pair \\
            --generations results/poems/generations/{base,sft}.jsonl
        python scripts/73_human_sheet.py --kind style --generations processed_data/styles/style_test.jsonl
        python scripts/73_human_sheet.py --kind style --read anna.csv bo.csv \\
            --machine results/styles/classified/style_test.jsonl
        python scripts/73_human_sheet.py --task poems --kind pair --read anna.csv bo.csv \\
            --machine results/poems/judgements/rules.jsonl
"""

from __future__ import annotations

import csv
import io
import random
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from common.conversations import without_thought
from common.settings import ROOT, UserError, next_command, read_settings, show_path, unused


@dataclass
class Settings:
    # --- what
    task: str = "styles"
    """names the folders below"""
    kind: Literal["rating", "style", "pair"] = "rating"
    """what a rater is asked"""
    generations: tuple[Path, ...] = ()
    """files to judge; the reference texts join them as the run "reference" with --reference"""
    reference: bool = False
    """the golden texts are judged too (rating, pair)"""
    labels: Path = Path("data/styles/labels.json")
    """the answers of `style`"""
    items: int = 50
    """prompts on the sheet, 0 = all that the files share"""

    # --- reading back
    read: tuple[Path, ...] = ()
    """filled sheets, one a rater; empty = write a sheet"""
    machine: tuple[str, ...] = ()
    """RUN=FILE, or a FILE that has its run's name; a file of stage 71 has all runs"""
    metric: str = ""
    """of stage 70's rows: the score that is meant, 0 to 1 (put on 1-5)"""
    report: Path | None = None
    """JSON file for all figures; an earlier one is replaced"""

    # --- run
    output: Path = Path("results/{task}/human/{kind}.csv")
    """the sheet; its key lies beside it"""
    seed: int = 42
    """of the choice, the order and the sides"""
    overwrite: bool = False
    """replace an earlier sheet: what was filled into it is lost"""

    def clashes(self):
        if self.read:
            names = "generations", "reference", "labels", "items", "overwrite"
            yield from unused(self, "with --read: the sheet is there", *names)
            if not self.machine:
                yield from unused(self, "without --machine", "metric")
            return
        yield from unused(self, "without --read", "machine", "metric", "report")
        yield from unused(self, f"with --kind {self.kind}", "reference" if self.kind == "style" else "labels")


def load_runs(settings: Settings) -> dict[str, dict[str, dict]]:
    """run -> id -> {"prompt", "text"}; the id is the prompt's, of its first sample (rows of `style` may come
    without)."""
    from common.jsonl import read_jsonl
    from common.judging.prompts import conversation_text, read_generations
    from common.training.classifiers import plain_question
    from tasks.styles import answer_of, question_of

    if not settings.generations:
        raise UserError("nothing to judge; fix: --generations FILE ...")
    runs: dict[str, dict[str, dict]] = {}
    for path in settings.generations:
        if path.stem in runs:
            raise UserError(f"two files are called {path.stem}; fix: rename one")
        rows = read_jsonl(path)
        if settings.kind == "style" and all("input" in row for row in rows):
            texts = [
                {"id": str(row.get("id", n)), "prompt": question_of(row["input"]), "text": answer_of(row["input"])}
                for n, row in enumerate(rows, start=1)
            ]
            runs[path.stem] = {row["id"]: row for row in texts}
            if len(runs[path.stem]) < len(texts):
                line, twice = next((n, t["id"]) for n, t in enumerate(texts, 1) if runs[path.stem][t["id"]] is not t)
                raise UserError(f"{path}:{line}: the id {twice!r} stands in another line too; fix: keep one of them")
            continue
        for row in read_generations(path):
            prompt = conversation_text(row["prompt"])
            prompt = plain_question(prompt) if settings.kind == "style" else prompt
            item = {"id": row["id"], "prompt": prompt, "text": without_thought(row["completion"])}
            runs.setdefault(path.stem, {}).setdefault(row["prompt_id"], item)
            if settings.reference and row["reference"] is not None and settings.kind != "style":
                golden = {**item, "id": f"{row['prompt_id']}#reference", "text": row["reference"]}
                runs.setdefault("reference", {}).setdefault(row["prompt_id"], golden)
    if settings.kind == "pair" and len(runs) < 2:
        raise UserError("a pair needs two runs; fix: name two files, or --reference")
    return runs


def make_items(settings: Settings, runs: dict[str, dict[str, dict]]) -> list[dict]:
    """The lines of the sheet in random order: {"sides": [(run, row), ...]}, one side, or two of different runs in
    random order."""
    rng = random.Random(settings.seed)
    shared = sorted(set.intersection(*(set(rows) for rows in runs.values())))
    if not shared:
        raise UserError("the files share no prompt; fix: generate on the same --prompts-file")
    chosen = rng.sample(shared, min(settings.items or len(shared), len(shared)))
    items = []
    for prompt in chosen:
        for sides in combinations(runs, 2) if settings.kind == "pair" else [(run,) for run in runs]:
            order = rng.sample(sides, len(sides))
            items.append({"sides": [(run, runs[run][prompt]) for run in order]})
    rng.shuffle(items)
    return items


def write_sheet(settings: Settings) -> None:
    from common.evaluation.tables import spreadsheet_cell
    from common.jsonl import write_bytes, write_json
    from common.judging.human_sheet import ANSWERS, COLUMNS, digest
    from common.runs import begin_run
    from tasks.styles import read_labels

    runs = load_runs(settings)
    items = make_items(settings, runs)
    allowed = ANSWERS.get(settings.kind) or [row["label"] for row in read_labels(settings.labels)]
    *texts, asked = COLUMNS[settings.kind]
    lines = [
        [str(n), *map(spreadsheet_cell, (item["sides"][0][1]["prompt"], *(row["text"] for _, row in item["sides"])))]
        for n, item in enumerate(items, start=1)
    ]
    key = [
        {"item": n, "runs": [run for run, _ in item["sides"]], "ids": [row["id"] for _, row in item["sides"]]}
        for n, item in enumerate(items, start=1)
    ]
    output = Path(str(settings.output).replace("{kind}", settings.kind))
    usual = ROOT / "results" / settings.task / "human" / f"{settings.kind}.csv"
    if output.suffix != ".csv":
        raise UserError(f"--output {output}: not a .csv file; fix: name one")
    key_path = output.with_suffix(".key.json")
    inputs = {path.stem: path for path in settings.generations}
    with begin_run(output, settings, inputs, "73_human_sheet", resumable=False, also=(key_path,)) as run:
        file = io.StringIO()
        table = csv.writer(file)
        table.writerow(["item", "prompt", *texts, f"{asked} ({' / '.join(allowed)})", "comment"])
        table.writerows([*line, "", ""] for line in lines)
        write_bytes(output, file.getvalue().encode("utf-8-sig"))
        write_json(key_path, {"kind": settings.kind, "allowed": allowed, "sha256": digest(lines), "items": key})
        print(
            f"{len(items)} items of {', '.join(runs)} in {show_path(output)}; the raters must not see {key_path.name}; "
            "several raters fill in copies, and --read names all of them"
        )
        where = {} if output == usual else {"output": output}
        run.finish(next_command("73_human_sheet", task=settings.task, kind=settings.kind, read=output, **where))


def read_back(settings: Settings) -> None:
    from common.evaluation.tables import interval, markdown_table, number
    from common.jsonl import read_json, write_json
    from common.judging.human_sheet import agreement, by_run, machine_answers, read_sheet

    sheet = Path(str(settings.output).replace("{kind}", settings.kind))
    key = read_json(sheet.with_suffix(".key.json"))
    if len({path.stem for path in settings.read}) < len(settings.read):
        raise UserError("two raters' files have one name; fix: rename one")
    answers = {path.stem: read_sheet(path, key) for path in settings.read}
    judges = dict(answers) | (machine_answers(settings.machine, key, settings.metric) if settings.machine else {})
    pairs = {f"{a} / {b}": agreement(judges[a], judges[b], key["kind"]) for a, b in combinations(judges, 2)}
    runs = by_run(key, answers, settings.seed)
    report = {"kind": key["kind"], "items": len(key["items"]), "answered": {n: len(a) for n, a in answers.items()}}
    report |= {"agreement": pairs, "runs": runs}
    print(", ".join(f"{name}: {count} of {len(key['items'])} items" for name, count in report["answered"].items()))
    rows = [[name, str(a["items"]), number(a["equal"]), number(a["kappa"])] for name, a in pairs.items()]
    if rows:
        print(markdown_table(["who", "items", "equal", "Cohen's kappa"], rows))
    if key["kind"] == "style":
        rows = [[run, *(str(counts.get(label, 0)) for label in key["allowed"])] for run, counts in runs.items()]
        print(markdown_table(["run", *key["allowed"]], rows))
    else:
        what = "mean rating" if key["kind"] == "rating" else "share of wins"
        rows = [[run, interval([f["mean"], f["low"], f["high"]]), str(f["answers"])] for run, f in runs.items()]
        print(markdown_table(["run", what, "answers"], rows))
    if settings.report:
        write_json(settings.report, report)
    if key["kind"] != "style":  # its texts may be labelled rows, which stage 72 does not read
        print(f"next: {next_command('72_compare', task=settings.task)}")


def main(settings: Settings) -> None:
    read_back(settings) if settings.read else write_sheet(settings)


if __name__ == "__main__":
    main(read_settings(Settings))
