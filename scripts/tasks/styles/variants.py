"""More training rows from few: answers with a sentence dropped, moved or borrowed, and labels brought to one count."""

from __future__ import annotations

import hashlib
import random
import re

from common.training.classifiers import classifier_text
from tasks.styles import answer_of, question_of

SENTENCE = re.compile(r"[^。！？；!?;]+[。！？；!?;]*")


def variant(row: dict, others: list[str], rng: random.Random) -> tuple[str, str] | None:
    """(kind, answer): the row's answer with one sentence dropped, moved or added; None where it has too few
    sentences."""
    parts = SENTENCE.findall(answer_of(row["input"]))
    kinds = ["mix"] * bool(others) + ["drop", "swap"] * (len(parts) > 2)
    if not kinds:
        return None
    kind, place = rng.choice(kinds), rng.randrange(len(parts))
    if kind == "drop":
        parts.pop(place)
    elif kind == "swap":
        parts[place - 1], parts[place] = parts[place], parts[place - 1]
    else:
        borrowed = SENTENCE.findall(rng.choice(others))
        parts[place] = rng.choice(borrowed)
    return kind, "".join(parts)


def augmented(rows: list[dict], count: int, seed: int) -> list[dict]:
    """Up to `count` variants of every row, none equal to a row or to each other."""
    by_label: dict[str, list[str]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(answer_of(row["input"]))
    seen, new = {row["input"] for row in rows}, []
    for row in rows:
        rng = random.Random(f"{seed} {row['input']}")
        others = [answer for answer in by_label[row["label"]] if answer != answer_of(row["input"])]
        for _ in range(count):
            if not (made := variant(row, others, rng)):
                continue
            text = classifier_text(question_of(row["input"]), made[1])
            if text not in seen:
                seen.add(text)
                new.append({**row, "input": text, "metadata": {**row["metadata"], "augmented": made[0]}})
    return new


def balanced(rows: list[dict], how: str, seed: int) -> list[dict]:
    """As many rows of every label: the rarer ones repeated, or the others cut, in an order that comes from their
    text."""
    groups: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row['input']}".encode()).hexdigest()):
        groups.setdefault(row["label"], []).append(row)
    sizes = [len(group) for group in groups.values()]
    if how == "undersample":
        return [row for group in groups.values() for row in group[: min(sizes)]]
    return [group[i % len(group)] for group in groups.values() for i in range(max(sizes))]
