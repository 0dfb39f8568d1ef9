"""The comparison as Markdown and as one HTML page that needs no network. Model text never becomes markup in either."""

import base64
from dataclasses import dataclass
from pathlib import Path

from common.evaluation.tables import NONE, escape, interval, markdown_table, number
from common.jsonl import write_bytes

SHOWN = 2  # examples in the Markdown report; the page has all of them


@dataclass
class Table:
    """Cells are strings, or estimates (mean, low, high). In a table of changes numbers have a sign, and those whose
    interval excludes 0 are bold. `golden` is the row with a background of its own."""

    title: str
    header: list[str]
    rows: list[list]
    changes: bool = False
    golden: str = ""

    def markdown(self) -> str:
        return markdown_table(self.header, [[self._markdown_cell(cell) for cell in row] for row in self.rows])

    def _markdown_cell(self, cell) -> str:
        text = cell if isinstance(cell, str) else interval(cell, self.changes)
        return f"**{text}**" if self.is_certain(cell) else text

    def is_certain(self, cell) -> bool:
        return self.changes and not isinstance(cell, str) and cell[1] is not None and (cell[1] > 0 or cell[2] < 0)

    def html_cell(self, cell) -> dict:
        """mean and bounds apart: the page puts one above the other."""
        if isinstance(cell, str):
            return {"mean": cell, "bounds": "", "certain": False}
        mean, low, high = cell
        bounds = "" if low is None else f"[{number(low, self.changes)}, {number(high, self.changes)}]"
        return {"mean": number(mean, self.changes), "bounds": bounds, "certain": self.is_certain(cell)}


def card(name: str, text: str, spans: list[tuple[int, int, str]], scores: dict, golden: bool, stopped: bool) -> dict:
    """One text of one run for the page, cut into parts where `spans` (start, end, label) highlight it."""
    parts, end = [], 0
    for start, stop, label in sorted(spans):
        if end <= start < stop <= len(text):  # never twice the same character, never beyond the text
            parts.append({"text": text[end:start], "label": ""})
            kind = "fault" if "fault" in label else "good"
            parts.append({"text": text[start:stop], "label": label.replace("_", " "), "kind": kind})
            end = stop
    parts.append({"text": text[end:], "label": ""})
    known = [f"{metric} {number(value)}" for metric, value in scores.items() if value is not None]
    parts = [part for part in parts if part["text"]]
    return {"name": name, "text": text, "parts": parts, "scores": known, "golden": golden, "stopped": stopped}


def prompt_text(turns: list[dict]) -> str:
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def write_markdown(
    path: Path, title: str, notes: list[str], tables: list[Table], images: dict[str, Path], examples: list[dict]
) -> None:
    """examples: {"prompt": string, "cards": [card(...)]}. Images are linked by name: they lie beside the report."""
    parts = [f"# {title}", *notes, *(f"## {table.title}\n\n{table.markdown()}" for table in tables)]
    parts += [f"## {name}\n\n![{name}]({image.name})" for name, image in images.items()]
    for example in examples[:SHOWN]:
        rows = [[item["name"], escape(item["text"]) or NONE] for item in example["cards"]]
        parts.append(f"## {escape(example['prompt'])}\n\n{markdown_table(['run', 'text'], rows, left=2)}")
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())


def write_page(
    path: Path, title: str, notes: list[str], tables: list[Table], images: dict[str, Path], examples: list[dict]
) -> None:
    """One file: images are inlined, styles too, there is no script, and a content policy forbids every load."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def encode(image: Path) -> str:
        return base64.b64encode(image.read_bytes()).decode()

    parts = [part for example in examples for item in example["cards"] for part in item["parts"] if part["label"]]
    folder = Path(__file__).resolve().parent
    pages = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = pages.get_template("compare_page.html").render(
        title=title,
        notes=notes,
        tables=tables,
        images=[{"title": name, "data": f"data:image/png;base64,{encode(image)}"} for name, image in images.items()],
        legend=sorted({(part["label"], part["kind"]) for part in parts}, key=lambda item: (item[1] == "fault", item)),
        examples=examples,
    )
    write_bytes(path, page.encode())
