"""Tables as Markdown, and numbers as a table shows them."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from common.jsonl import read_json

NONE = "–"  # does not apply, or not known: never shown as 0


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns stand left, the others right. Cells go in as they are."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sampling_notes(generations: Sequence[Path]) -> list[str]:
    """How the texts of each file were drawn, by the run record beside it: one sentence for each way."""
    ways: dict[str, list[str]] = {}
    for file in generations:
        if not (record := file.with_name(f"{file.stem}.run.json")).is_file():
            continue
        drawn = read_json(record).get("settings", {})
        if (temperature := drawn.get("temperature")) is None:
            continue
        way = f"temperature {temperature:g}" if temperature else "the likeliest token each time"
        kept = {"top-p": drawn.get("top_p", 1.0) < 1 and drawn["top_p"], "min-p": drawn.get("min_p", 0)}
        kept |= {"top-k": drawn.get("top_k", 0)}
        parts = [way, *(f"{name} {value:g}" for name, value in kept.items() if value and temperature)]
        ways.setdefault(", ".join(parts), []).append(file.stem)
    return [f"Sampling: {way}: {', '.join(names)}." for way, names in ways.items()]


def escape(text: str) -> str:
    """Any text as one Markdown cell that shows it as it is: no markup, no HTML, no line end."""
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"\s*\n\s*", " / ", text.strip())


def spreadsheet_cell(text: str) -> str:
    """A spreadsheet runs cells that begin with = + - @ as formulas; an apostrophe in front makes them text."""
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") else text


def number(value: float | None, sign: bool = False) -> str:
    """Three digits behind the point, one from 10 on; None as a dash. With `sign` a plus is written too."""
    if value is None:
        return NONE
    return f"{value:{'+' if sign else ''}.{1 if abs(value) >= 10 else 3}f}"


def interval(estimate: Sequence[float | None], sign: bool = False) -> str:
    """mean [low, high], or the mean alone where there are no bounds."""
    mean, low, high = estimate
    if low is None or high is None:
        return number(mean, sign)
    return f"{number(mean, sign)} [{number(low, sign)}, {number(high, sign)}]"
