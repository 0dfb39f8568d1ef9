"""Rows of the brand-copy chain: products, copies, and what stages 13-15 ask a writer. tasks/copywriting judges the
texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from common.jsonl import DataError, read_utf8, scan_jsonl
from common.preflight.finding import Finding
from common.preflight.texts import API_ERROR, API_ERROR_STARTS, REFUSAL
from common.settings import UserError
from tasks import copywriting as task
from tasks.base import SPLITS
from tasks.text_metrics import han_only

PRODUCT = {
    "id": str,
    "name": str,
    "category": str,
    "ingredients": list,
    "effects": list,
    "audience": str,
    "may_claim": list,
    "must_not_claim": list,
    "volume": str,
    "price_yuan": int,
    "split": str,
}
THINKING = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
SORRY = re.compile(
    r"(?:(?:很|非常|十分)?(?:抱歉|对不起)|不好意思)[，,。！!]?(?:但)?我?(?:暂时|目前)?(?:无法|不能|没法|没有办法)"
)


def rows_by_id(path: Path, fault: Callable[[dict], tuple[str, str] | None]) -> dict[str, dict]:
    """id -> row of a JSONL file; fault(row) says what is wrong with a row and how to fix it. Raises DataError naming
    every faulty line."""
    rows, problems = {}, []
    for line, row, findings in scan_jsonl(path):
        problems += [finding for finding in findings if finding.level == "error"]
        if row is None:
            continue
        if not isinstance(row.get("id", ""), str):
            found = f"id {str(row['id'])[:30]} is no text", "write a text"
        elif not (found := fault(row)) and row["id"] in rows:
            found = f"the id {row['id']} appears twice", "keep one of them, or give each an id of its own"
        if found:
            problems.append(Finding(path, line, *found))
        else:
            rows[row["id"]] = row
    if not rows and not problems:
        problems.append(Finding(path, 0, "no row in it", "run the stage that writes it again, or name another file"))
    if problems:
        raise DataError(problems)
    return rows


def read_products(path: Path) -> dict[str, dict]:
    """id -> product sheet, in file order. Raises DataError naming every faulty line."""

    def fault(row: dict) -> tuple[str, str] | None:
        wrong = [name for name, kind in PRODUCT.items() if not isinstance(row.get(name), kind) or row[name] == ""]
        if wrong:
            reason = f"missing or of the wrong type: {', '.join(wrong)}"
        elif row["split"] not in SPLITS:
            reason = f"split {row['split']!r}"
        elif all(isinstance(i, dict) and i.get("name") and i.get("concentration") for i in row["ingredients"]):
            return None
        else:
            reason = "an ingredient without name or concentration"
        return reason, "see data/copywriting/README.md for the fields"

    return rows_by_id(path, fault)


def read_copies(path: Path, products: dict[str, dict]) -> list[dict]:
    """Rows with product_id, copy_type and copy, each with an `id` (product/type#sample). Raises DataError."""

    def fault(row: dict) -> tuple[str, str] | None:
        row.setdefault("id", f"{row.get('product_id')}/{row.get('copy_type')}#0")
        if not isinstance(row.get("product_id"), str) or row["product_id"] not in products:
            return f"product_id {row.get('product_id')!r} is not among the products", "name its --products-file"
        if not isinstance(row.get("copy_type"), str) or row["copy_type"] not in task.COPY_TYPES:
            return f"copy_type {row.get('copy_type')!r}", f"one of {', '.join(task.COPY_TYPES)}"
        if not isinstance(row.get("copy"), str) or not row["copy"].strip():
            return "copy is empty or no text", "remove the line"
        return None

    return [{"id": id, **row} for id, row in rows_by_id(path, fault).items()]


def meta_of(product: dict, copy_type: str) -> dict:
    """What prompts and rewards need of a row; the whole sheet only where the product is not a shipped one."""
    meta = {"product_id": product["id"], "copy_type": copy_type}
    return meta if task.products().get(product["id"]) == product else {**meta, "product": product}


class Writer:
    """Turns the templates of a folder (data/copywriting/write_prompts) into chat messages. Raises UserError."""

    def __init__(self, folder: Path, guide: Path, names: list[str]):
        self.templates = {}
        for name, path in [("guide", guide), *((n, folder / f"{n}.md") for n in names)]:
            if not path.is_file():
                raise UserError(f"{path}: no such file; fix: restore it, or name another folder with --prompts-dir")
            self.templates[name] = read_utf8(path).strip()

    def messages(self, name: str, product: dict, copy_type: str, **marks: str) -> list[dict]:
        """The template `name`, its {marks} filled in; behind the system prompt, where the folder's was asked for."""
        kind = task.COPY_TYPES[copy_type]
        marks |= {"sheet": task.sheet(product), "name": product["name"], "label": kind.label}
        marks |= {"structure": kind.structure, "low": str(kind.low), "high": str(kind.high)}
        messages = [{"role": "user", "content": _fill(self.templates[name], marks)}]
        if "system" in self.templates:
            system = _fill(self.templates["system"], {"guide": self.templates["guide"]})
            messages.insert(0, {"role": "system", "content": system})
        return messages


def usable_text(text: str, finish_reason: str) -> tuple[str, str | None]:
    """(the copy in a writer's answer, why it cannot be one or None): a model's thoughts in front are left out."""
    text = THINKING.sub("", text).strip()
    if finish_reason == "length":
        return text, "cut off at max_tokens"
    letters = [char for char in text if char.isalpha()]
    if not letters or len(han_only("".join(letters))) < 0.5 * len(letters):  # an error page, an apology in English
        return text, "not Chinese"
    if API_ERROR_STARTS.match(text) or API_ERROR.search(text[:200]):
        return text, "an error message"
    if SORRY.match(text) or REFUSAL.search(text[:80]):
        return text, "a refusal"
    return text, None


def _fill(template: str, marks: dict[str, str]) -> str:
    """Fill {name} marks; what the values hold is not looked at again."""
    return re.sub(r"\{(\w+)\}", lambda match: marks.get(match[1], match[0]), template)
