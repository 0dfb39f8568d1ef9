"""A job's measures over texts: the columns of a generation file, and the figures of a whole set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from common.conversations import without_thought
from common.settings import UserError

if TYPE_CHECKING:
    from tasks.base import Task


def measured(measure: Callable, prompts: list[list[dict]], completions: list[str], meta: list[dict]) -> list:
    """What a measure of tasks/base.py says of each completion, without its thinking; prompts are lists of messages."""
    said = [without_thought(text) for text in completions]
    return list(measure([turns[-1]["content"] for turns in prompts], said, meta, conversations=prompts))


def measure_texts(task: Task, rows: list[dict]) -> dict[str, list[float | None]]:
    """metric -> one value per row, None where it does not apply. rows hold prompt (messages), completion, meta, id.

    Raises UserError where a metric cannot judge a row, or returns anything but a finite number or None.
    """
    texts = [[row[key] for row in rows] for key in ("prompt", "completion", "meta")]
    columns = {}
    for name, metric in task.METRICS.items():
        try:
            values = measured(metric, *texts)
        except ValueError as error:  # e.g. a form that the task does not know
            row = next((row for row in rows if _fails(metric, row)), {"id": "unknown"})
            raise UserError(f"row {row['id']}: metric {name}: {error}; fix: correct its meta") from error
        if len(values) != len(rows):
            raise UserError(f"metric {name} returned {len(values)} values for {len(rows)} texts; fix: one a text")
        for row, value in zip(rows, values, strict=True):
            if value is not None and not math.isfinite(value):
                raise UserError(f"metric {name} of row {row['id']} is {value}; fix: return a number, or None")
        columns[name] = [None if value is None else float(value) for value in values]
    return columns


def _fails(metric: Callable, row: dict) -> bool:
    try:
        measured(metric, [row["prompt"]], [row["completion"]], [row["meta"]])
    except ValueError:
        return True
    return False


def measure_sets(task: Task, rows: list[dict]) -> dict[str, dict]:
    """metric -> {"mean", "low", "high", "sets", "set_size"} for the metrics of a whole set, such as distinct-2.

    A set holds one text of every prompt: sample 0 of each, sample 1 of each, and so on, so that sets of any two runs on
    the same prompts have one size. low and high are the least and greatest set, None with a single one: resampling
    with repetition would make every set look less diverse than it is.
    """
    prompts = {row["prompt_id"] for row in rows}
    sets: dict[int, list[dict]] = {}
    for row in rows:
        sets.setdefault(row["sample"], []).append(row)
    whole = [texts for texts in sets.values() if len({row["prompt_id"] for row in texts}) == len(prompts)]
    if not whole:  # no sample number runs through all prompts: the first text of each
        whole = [list({row["prompt_id"]: row for row in reversed(rows)}.values())]
    figures = {}
    for name, metric in task.SET_METRICS.items():
        values = [metric([without_thought(row["completion"]) for row in texts]) for texts in whole]
        low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
        mean = sum(values) / len(values)
        figures[name] = {"mean": mean, "low": low, "high": high, "sets": len(whole), "set_size": len(prompts)}
    return figures
