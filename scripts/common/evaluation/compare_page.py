"""The comparison as Markdown and as one HTML page that needs no network. Model text never becomes markup in either."""

import base64
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.conversations import readable
from common.evaluation.tables import NONE, escape, interval, markdown_table, number
from common.jsonl import write_bytes

SHOWN = 2  # examples in the Markdown report; the page has all of them


@dataclass
class Table:
    """Cells are strings, or estimates (mean, low, high). In a table of changes numbers have a sign, and those whose
    interval excludes 0 are bold. `golden` is the row with a background of its own. Columns in `more` stand behind a
    switch of the page; `lower` are those where less is better."""

    title: str
    header: list[str]
    rows: list[list]
    changes: bool = False
    golden: str = ""
    more: Sequence[str] = ()
    lower: Sequence[str] = ()

    def markdown(self, narrow: bool = False) -> str:
        kept = [i for i, name in enumerate(self.header) if not (narrow and name in self.more)]
        rows = [[self._markdown_cell(row[i]) for i in kept] for row in self.rows]
        return markdown_table([self.label(self.header[i]) for i in kept], rows)

    def label(self, name: str) -> str:
        """A column's heading: ↓ where less is better."""
        return f"{name} ↓" if name in self.lower else name

    def _markdown_cell(self, cell: str | Sequence[float | None]) -> str:
        text = cell if isinstance(cell, str) else interval(cell, self.changes)
        return f"**{text}**" if self.is_certain(cell) else text

    def is_certain(self, cell: str | Sequence[float | None]) -> bool:
        if not self.changes or isinstance(cell, str) or cell[1] is None or not float(number(cell[0])):
            return False  # a change that is shown as 0 is none
        return cell[1] > 0 or cell[2] < 0

    def html_cell(self, cell: str | Sequence[float | None]) -> dict:
        """mean and bounds apart: the page puts one above the other."""
        if isinstance(cell, str):
            return {"mean": cell, "bounds": "", "certain": False}
        mean, low, high = cell
        bounds = "" if low is None else f"[{number(low, self.changes)}, {number(high, self.changes)}]"
        return {"mean": number(mean, self.changes), "bounds": bounds, "certain": self.is_certain(cell)}


def card(
    name: str,
    text: str,
    spans: list[tuple[int, int, str]],
    scores: dict,
    golden: bool,
    stopped: bool,
    thought: str = "",
) -> dict:
    """One text of one run for the page, cut into parts where `spans` (start, end, label) highlight it; thought: what
    was reasoned before it."""
    parts, end = [], 0
    for start, stop, label in sorted(spans):
        if end <= start < stop <= len(text):  # never twice the same character, never beyond the text
            parts.append({"text": text[end:start], "label": ""})
            kind = "fault" if "fault" in label else "good"
            parts.append({"text": text[start:stop], "label": label.replace("_", " "), "kind": kind})
            end = stop
    parts.append({"text": text[end:], "label": ""})
    parts = [part for part in parts if part["text"]]
    known = {"name": name, "text": text, "parts": parts, "scores": scores, "golden": golden, "stopped": stopped}
    return known | {"thought": thought}


def prompt_text(turns: list[dict]) -> str:
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {readable(turn)}" for turn in turns)


def write_markdown(
    path: Path, title: str, notes: list[str], tables: list[Table], images: dict[str, Path], examples: list[dict]
) -> None:
    """examples: as in write_page. Images are linked by name: they lie beside the report."""
    parts = [f"# {title}", *notes, *(f"## {table.title}\n\n{table.markdown()}" for table in tables)]
    parts += [f"## {name}\n\n![{name}]({image.name})" for name, image in images.items()]
    for example in examples[:SHOWN]:
        rows = [[item["name"], escape(item["text"]) or NONE] for item in example["cards"]]
        parts.append(f"## {escape(prompt_text(example['turns']))}\n\n{markdown_table(['run', 'text'], rows, left=2)}")
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())


def write_page(
    path: Path,
    title: str,
    notes: list[str],
    tables: list[Table],
    images: dict[str, Path],
    examples: list[dict],
    lower: Sequence[str] = (),
) -> None:
    """One file: images, styles and the script are inlined, and a content policy forbids every load and every other
    script.

    examples: {"id", "turns": messages, "cards": [card(...)]}. lower: metrics of which less is better.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def encode(image: Path) -> str:
        return base64.b64encode(image.read_bytes()).decode()

    folder = Path(__file__).resolve().parent
    script = (folder / "compare_page.js").read_text(encoding="utf-8")
    data = page_data(examples, lower, {name for table in tables for name in table.more})
    # inside a script element "<" alone could end it; as an escape of JSON it cannot
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    pages = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = pages.get_template("compare_page.html").render(
        title=title,
        notes=notes,
        tables=tables,
        has_more=any(table.more for table in tables),
        images=[{"title": name, "data": f"data:image/png;base64,{encode(image)}"} for name, image in images.items()],
        legend=sorted(data["labels"], key=lambda item: (item[1] == "fault", item)),
        data=Markup(text),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_bytes(path, page.encode())


def page_data(examples: list[dict], lower: Sequence[str], more: Collection[str]) -> dict:
    """What compare_page.js reads: names once, texts and numbers in lists, so that thousands of prompts stay small.

    more: metrics that stand behind the switch."""
    cards = [card for example in examples for card in example["cards"]]
    runs = list(dict.fromkeys(card["name"] for card in cards))
    metrics = list(dict.fromkeys(name for card in cards for name in card["scores"]))
    golden = next((card["name"] for card in cards if card["golden"]), None)
    labels: dict[tuple[str, str], int] = {}

    def compact(part: dict):
        if not part["label"]:
            return part["text"]
        return [part["text"], labels.setdefault((part["label"], part["kind"]), len(labels))]

    items = [
        {
            "id": example["id"],
            "turns": [[turn["role"], turn["content"]] for turn in example["turns"]],
            "cards": [
                [
                    runs.index(card["name"]),
                    [compact(part) for part in card["parts"]],
                    [card["scores"].get(name) for name in metrics],
                    card["stopped"],
                    *([card["thought"]] if card["thought"] else []),
                ]
                for card in example["cards"]
            ],
        }
        for example in examples
    ]
    known = {"runs": runs, "golden": runs.index(golden) if golden else -1, "metrics": metrics}
    known |= {"lower": [name for name in lower if name in metrics], "more": [name for name in metrics if name in more]}
    return {**known, "labels": list(labels), "items": items}
