"""Rows of the brand-copy chain: products, copies, and what stages 13-15 ask a writer. tasks/copywriting judges the texts."""

from __future__ import annotations

import re
from pathlib import Path

from common.jsonl import DataError, read_jsonl
from common.preflight.finding import Finding
from common.preflight.texts import API_ERROR, API_ERROR_STARTS, REFUSAL
from common.settings import UserError
from tasks import copywriting as task
from tasks.text_metrics import han_only

SPLITS = ("train", "val", "test")
PRODUCT = {
    "id": str, "name": str, "category": str, "ingredients": list, "effects": list, "audience": str, "may_claim": list,
    "must_not_claim": list, "volume": str, "price_yuan": int, "split": str,
}  # fmt: skip
THINKING = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
SORRY = re.compile(
    r"(?:(?:很|非常|十分)?(?:抱歉|对不起)|不好意思)[，,。！!]?(?:但)?我?(?:暂时|目前)?(?:无法|不能|没法|没有办法)"
)


def read_products(path: Path) -> dict[str, dict]:
    """id -> product sheet, in file order. Raises DataError naming every faulty line."""
    products, problems = {}, []
    for number, row in enumerate(read_jsonl(path), start=1):
        wrong = [name for name, kind in PRODUCT.items() if not isinstance(row.get(name), kind) or row[name] == ""]
        if wrong:
            reason = f"missing or of the wrong type: {', '.join(wrong)}"
        elif row["split"] not in SPLITS:
            reason = f"split {row['split']!r}"
        elif row["id"] in products:
            reason = f"the id {row['id']} stands twice"
        elif any(not (isinstance(i, dict) and i.get("name") and i.get("concentration")) for i in row["ingredients"]):
            reason = "an ingredient without name or concentration"
        else:
            products[row["id"]] = row
            continue
        problems.append(Finding(path, number, reason, "see data/copywriting/README.md for the fields"))
    if not products and not problems:
        problems.append(Finding(path, 0, "no product in it", "see data/copywriting/README.md for the fields"))
    if problems:
        raise DataError(problems)
    return products


def read_copies(path: Path, products: dict[str, dict]) -> list[dict]:
    """Rows with product_id, copy_type and copy, each with an `id` (product/type#sample). Raises DataError."""
    rows, problems, seen = [], [], set()
    for number, row in enumerate(read_jsonl(path), start=1):
        row = {"id": f"{row.get('product_id')}/{row.get('copy_type')}#0", **row}
        if row.get("product_id") not in products:
            found = f"product_id {row.get('product_id')!r} is not among the products", "name its --products-file"
        elif row.get("copy_type") not in task.COPY_TYPES:
            found = f"copy_type {row.get('copy_type')!r}", f"one of {', '.join(task.COPY_TYPES)}"
        elif not isinstance(row.get("copy"), str) or not row["copy"].strip():
            found = "copy is empty or no text", "remove the line"
        elif row["id"] in seen:
            found = f"the id {row['id']} stands twice", "keep one of them, or give each an id of its own"
        else:
            seen.add(row["id"])
            rows.append(row)
            continue
        problems.append(Finding(path, number, *found))
    if not rows and not problems:
        problems.append(Finding(path, 0, "no copy in it", "run the stage that writes it again"))
    if problems:
        raise DataError(problems)
    return rows


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
            self.templates[name] = path.read_text(encoding="utf-8").strip()

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
