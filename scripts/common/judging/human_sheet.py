"""Sheets that people fill in blind: what a cell may hold, reading them back, agreement between raters and with a
machine."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.evaluation.statistics import bootstrap_mean
from common.jsonl import read_bytes, read_json, read_jsonl
from common.settings import UserError

# the texts that a rater sees, then what is asked of them
COLUMNS = {"rating": ("text", "rating"), "style": ("text", "label"), "pair": ("text_a", "text_b", "better")}
ANSWERS = {"rating": list("12345"), "pair": ["A", "B", "tie"]}  # of `style`: the labels


def digest(lines: list[list[str]]) -> str:
    """Of what the raters saw, not of what they filled in; line ends may change in a spreadsheet."""
    return hashlib.sha256("\0".join("".join("".join(line).split()) for line in lines).encode()).hexdigest()


def read_sheet(path: Path, key: dict) -> dict[int, str]:
    """item -> answer, empty ones left out. Raises UserError with the line of an answer that is not allowed, or another
    sheet's text."""
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("gb18030", errors="replace")  # what a Chinese Excel saves
        print(f"notice: {path.name} is not UTF-8: read as GB18030")
    rows = list(csv.reader(io.StringIO(text)))[1:]
    width = 2 + len(COLUMNS[key["kind"]]) - 1
    if any(len(row) <= width for row in rows) or not all(row[0].strip().isdigit() for row in rows):
        raise UserError(f"{path}: columns are missing; fix: fill in the sheet as it was written")
    rows.sort(key=lambda row: int(row[0]))
    if digest([row[:width] for row in rows]) != key["sha256"]:
        raise UserError(
            f"{path}: not the sheet of this key, or its texts were changed; fix: the sheet with its own key"
        )
    folded = {name.lower(): name for name in key["allowed"]}
    answers = {}
    for row in rows:
        said = row[width].strip()
        if said and said.lower() not in folded:
            raise UserError(f"{path}: item {row[0]}: {said!r} is no answer; fix: one of {', '.join(key['allowed'])}")
        if said:
            answers[int(row[0])] = folded[said.lower()]
    if not answers:
        raise UserError(f"{path}: nothing is filled in; fix: name the filled sheet")
    return answers


def agreement(one: dict, other: dict, kind: str) -> dict:
    """Share of equal answers and Cohen's kappa (1960; quadratic weights for ratings) over the items that both
    answered."""
    from sklearn.metrics import cohen_kappa_score

    items = sorted(set(one) & set(other))
    a, b = [one[item] for item in items], [other[item] for item in items]
    if not items:
        return {"items": 0, "equal": None, "kappa": None}
    equal = sum(x == y for x, y in zip(a, b, strict=True)) / len(items)
    if len({*a, *b}) < 2:  # all one answer: chance agrees too, kappa says nothing
        return {"items": len(items), "equal": equal, "kappa": None}
    weights = {"weights": "quadratic", "labels": ANSWERS["rating"]} if kind == "rating" else {}
    return {"items": len(items), "equal": equal, "kappa": float(cohen_kappa_score(a, b, **weights))}


def by_run(key: dict, answers: dict[str, dict[int, str]], seed: int) -> dict:
    """What the raters said of each run: mean rating or share of wins (a tie is half) with 95 % intervals over prompts;
    counts of labels."""
    places = {item["item"]: item for item in key["items"]}
    given = [(places[number], said) for rater in answers.values() for number, said in rater.items()]
    runs = sorted({run for item in key["items"] for run in item["runs"]})
    if key["kind"] == "style":
        return {run: dict(Counter(said for item, said in given if item["runs"] == [run])) for run in runs}
    figures = {}
    for run in runs:
        mine = [(item, said) for item, said in given if run in item["runs"]]
        if key["kind"] == "rating":
            values = [float(said) for _, said in mine]
        else:
            values = [0.5 if said == "tie" else float(item["runs"]["AB".index(said)] == run) for item, said in mine]
        prompts = [item["ids"][0].rpartition("#")[0] for item, _ in mine]  # items of one prompt are alike
        figures[run] = {**bootstrap_mean(values, prompts, seed=seed)._asdict(), "answers": len(values)}
    return figures


def machine_answers(words: Sequence[str], key: dict, metric: str = "") -> dict[str, dict[int, str]]:
    """machine -> item -> what a classifier, a scorer or a judge says of it, in the raters' own terms.

    words: RUN=FILE, or a FILE that has its run's name; a file of stage 71 holds all its candidates, each prompt
    version as a machine of its own. metric: which score of stage 70's rows. Items that a machine does not know, or has
    no figure for, are left out.
    """
    said: dict[tuple, str | float] = {}  # (machine, text or two texts) -> label, score, or how far the first won
    for word in words:
        new = _read_machine(word, key, metric)
        if said.keys() & new.keys():
            raise UserError(f"--machine {word}: an earlier file has the same texts; fix: one file a run")
        said |= new
    answers: dict[str, dict[int, str]] = {}
    for item in key["items"]:
        texts = tuple(_text(run, id) for run, id in zip(item["runs"], item["ids"], strict=True))
        for machine in dict.fromkeys(machine for machine, _ in said):
            values = [said.get((machine, text)) for text in texts]
            value = values[0]
            if key["kind"] == "pair" and None not in values:
                value = "tie" if values[0] == values[1] else "A" if values[0] > values[1] else "B"
            elif key["kind"] == "pair":
                value = {1: "A", 0.5: "tie", 0: "B"}.get(said.get((machine, texts)))
            elif key["kind"] == "rating" and value is not None:
                value = str(min(5, max(1, round(value))))
            if value is not None:
                answers.setdefault(machine, {})[item["item"]] = value
    if not answers:
        raise UserError(f"--machine {' '.join(words)}: none of its texts is on the sheet; fix: the same texts and ids")
    return answers


def _read_machine(word: str, key: dict, metric: str) -> dict[tuple, str | float]:
    """One word of --machine: (machine, text or two texts) -> label, score, or how far the first won. What has no figure
    is left out."""
    runs = sorted({run for item in key["items"] for run in item["runs"]})
    name, _, file = word.rpartition("=")
    path = Path(file).expanduser()
    rows = read_jsonl(path)
    if any("candidates" in row for row in rows):
        found = _judged(rows, _runs_of_judge(path), key["kind"])
    else:
        run = name or (runs[0] if len(runs) == 1 else path.stem)
        if run not in runs:
            raise UserError(f"--machine {word}: the sheet has no run {run} ({', '.join(runs)}); fix: RUN=FILE")
        found = _scored(rows, run, key["kind"], metric)
    said: dict[tuple, str | float] = {}
    for machine, text, value in found:
        if isinstance(value, str if key["kind"] == "style" else (int, float)):
            said.setdefault((machine, text), value)  # the first of a golden text that was judged beside several samples
    if not said:
        raise UserError(
            f"{path}: no row says anything for a sheet of the kind {key['kind']}; "
            "fix: rows with id and predicted_label or score, of stage 70 with --metric, or of stage 71"
        )
    return said


def _text(run: str, id: str) -> tuple[str, str]:
    """What a text is known by: ids are the same in every run. A golden text is known by its prompt alone."""
    return run, id.rsplit("#", 1)[0] if run == "reference" else id


def _scored(rows: list[dict], run: str, kind: str, metric: str) -> Iterator[tuple]:
    """(machine, text, label or score) of rows of one run: of stage 61 or 70, or with a score of their own."""
    for row in rows:
        value = row.get("predicted_label" if kind == "style" else "score")
        if metric and kind != "style":
            value = row.get("scores", {}).get(metric)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{metric} of {row['id']} is {value}; fix: a --metric from 0 to 1")
            value = None if value is None else 1 + 4 * value  # as the judge by rule does
        if "id" in row:
            yield "machine", _text(run, str(row["id"])), value


def _judged(rows: list[dict], run_of: dict[str, str], kind: str) -> Iterator[tuple]:
    """(machine, text, score) of stage 71's rows, or (machine, two texts, share of the win) for pairs; null where it was
    undecided."""
    for row in rows:
        if row["kind"] != "item":
            continue
        machine, id = f"machine {row['version']}", row["id"].removeprefix(f"{row['version']}/")
        names = {letter: candidate["name"] for letter, candidate in row["candidates"].items()}
        texts = {letter: _text(run_of.get(name, name), id) for letter, name in names.items()}
        if kind == "rating":
            for letter, candidate in row["candidates"].items():
                yield machine, texts[letter], candidate["score"]
        elif kind == "pair":
            for letters, win in row["wins"].items():
                a, b = (texts[letter] for letter in letters.split(">"))
                yield machine, (a, b), win
                yield machine, (b, a), None if win is None else 1 - win


def _runs_of_judge(path: Path) -> dict[str, str]:
    """candidate -> run: stage 71 lets its user name the candidates, its record has their files. Golden texts are the
    run `reference`."""
    record = path.with_suffix(".run.json")
    words = read_json(record)["settings"]["candidates"] if record.is_file() else []
    return {name: Path(file).stem or "reference" for name, _, file in (word.partition("=") for word in words)}
