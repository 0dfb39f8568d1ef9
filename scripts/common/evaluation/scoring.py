"""Task modules by name, and their metrics over the rows of a generation file."""

import importlib
import math
import re
from pathlib import Path
from types import ModuleType

from common.settings import ROOT, UserError

TASKS = ROOT / "scripts" / "tasks"


def known_tasks() -> list[str]:
    """Names of the packages in scripts/tasks that define METRICS."""
    files = sorted(TASKS.glob("*/__init__.py"))
    return [
        file.parent.name for file in files if re.search(r"^METRICS\b", file.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def load_task(name: str) -> ModuleType:
    """The package scripts/tasks/<name>. Raises UserError, naming the known tasks, where there is none."""
    if name not in known_tasks():
        path = Path("scripts/tasks") / name / "__init__.py"
        raise UserError(f"unknown task {name!r}; fix: use one of {', '.join(known_tasks())}, or write {path}")
    return importlib.import_module(f"tasks.{name}")


def zero_for_none(metric):
    """A metric as a reward: 0 where there is too little text to judge, else a policy escapes its other rewards by writing nothing."""

    def reward(prompts, completions, meta, **_) -> list[float]:
        return [0.0 if value is None else value for value in metric(prompts, completions, meta)]

    return reward


def measure_texts(task: ModuleType, rows: list[dict]) -> dict[str, list[float | None]]:
    """metric -> one value per row, None where it does not apply. rows hold prompt (messages), completion, meta, id.

    Raises UserError where a metric cannot judge a row, or returns anything but a finite number or None.
    """
    prompts = [row["prompt"][-1]["content"] for row in rows]
    completions = [row["completion"] for row in rows]
    meta = [row["meta"] for row in rows]
    columns = {}
    for name, metric in task.METRICS.items():
        try:
            values = list(metric(prompts, completions, meta))
        except ValueError as error:  # e.g. a form that the task does not know
            raise UserError(f"metric {name}: {error}; fix: correct meta in the generation file") from error
        if len(values) != len(rows):
            raise UserError(f"metric {name} returned {len(values)} values for {len(rows)} texts; fix: one a text")
        for row, value in zip(rows, values, strict=True):
            if value is not None and not math.isfinite(value):
                raise UserError(f"metric {name} of row {row['id']} is {value}; fix: return a number, or None")
        columns[name] = [None if value is None else float(value) for value in values]
    return columns


def measure_sets(task: ModuleType, rows: list[dict]) -> dict[str, dict]:
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
    for name, metric in getattr(task, "SET_METRICS", {}).items():
        values = [metric([row["completion"] for row in texts]) for texts in whole]
        low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
        mean = sum(values) / len(values)
        figures[name] = {"mean": mean, "low": low, "high": high, "sets": len(whole), "set_size": len(prompts)}
    return figures
