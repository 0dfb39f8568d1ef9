"""Sheets that people fill in blind: what a cell may hold, reading them back, agreement between raters and with a machine."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from pathlib import Path

from common.jsonl import read_jsonl
from common.settings import UserError
from common.statistics import bootstrap_mean

# the texts that a rater sees, then what is asked of them
COLUMNS = {"rating": ("text", "rating"), "style": ("text", "label"), "pair": ("text_a", "text_b", "better")}
ANSWERS = {"rating": list("12345"), "pair": ["A", "B", "tie"]}  # of `style`: the labels


def cell(text: str) -> str:
    """A spreadsheet runs cells that begin with = + - @ as formulas; an apostrophe in front makes them text."""
    return "'" + text if text.lstrip()[:1] in ("=", "+", "-", "@") else text


def digest(lines: list[list[str]]) -> str:
    """Of what the raters saw, not of what they filled in; line ends may change in a spreadsheet."""
    return hashlib.sha256("\0".join("".join("".join(line).split()) for line in lines).encode()).hexdigest()


def read_sheet(path: Path, key: dict) -> dict[int, str]:
    """item -> answer, empty ones left out. Raises UserError with the line of an answer that is not allowed, or another sheet's text."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; mend: name the filled sheet")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("gb18030", errors="replace")  # what a Chinese Excel saves
        print(f"notice: {path.name} is not UTF-8: read as GB18030")
    rows = list(csv.reader(io.StringIO(text)))[1:]
    width = 2 + len(COLUMNS[key["kind"]]) - 1
    if any(len(row) <= width for row in rows) or not all(row[0].strip().isdigit() for row in rows):
        raise UserError(f"{path}: columns are missing; mend: fill in the sheet as it was written")
    rows.sort(key=lambda row: int(row[0]))
    if digest([row[:width] for row in rows]) != key["sha256"]:
        raise UserError(
            f"{path}: not the sheet of this key, or its texts were changed; mend: the sheet with its own key"
        )
    folded = {name.lower(): name for name in key["allowed"]}
    answers = {}
    for row in rows:
        said = row[width].strip()
        if said and said.lower() not in folded:
            raise UserError(f"{path}: item {row[0]}: {said!r} is no answer; mend: one of {', '.join(key['allowed'])}")
        if said:
            answers[int(row[0])] = folded[said.lower()]
    if not answers:
        raise UserError(f"{path}: nothing is filled in; mend: name the filled sheet")
    return answers


def agreement(one: dict, other: dict, kind: str) -> dict:
    """Share of equal answers and Cohen's kappa (1960; quadratic weights for ratings) over the items that both answered."""
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
    """What the raters said of each run, with 95 % intervals over items: mean rating, share of wins (a tie is half), labels."""
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


def machine_answers(path: Path, key: dict) -> dict[int, str]:
    """What a classifier or a scorer says of the same items, in the raters' own terms; items it does not know are left out."""
    known = {str(row["id"]): row for row in read_jsonl(path) if "id" in row}
    answers = {}
    for item in key["items"]:
        rows = [known.get(id) for id in item["ids"]]
        if None in rows:
            continue
        if key["kind"] == "style" and "predicted_label" in rows[0]:
            answers[item["item"]] = rows[0]["predicted_label"]
        elif key["kind"] == "rating" and "score" in rows[0]:
            answers[item["item"]] = str(min(5, max(1, round(rows[0]["score"]))))
        elif key["kind"] == "pair" and all("score" in row for row in rows):
            a, b = rows[0]["score"], rows[1]["score"]
            answers[item["item"]] = "tie" if a == b else "A" if a > b else "B"
    if not answers:
        raise UserError(
            f"{path}: no row fits an item of the sheet; mend: the same texts, with id and predicted_label or score"
        )
    return answers
