"""Golden and rejected copies to training files: SFT rows, preference pairs and RL prompts, split by product, and one
CSV for spreadsheets.

Every product of the sheets gives one prompt a copy type, golden copy or not: val and test prompts are for generation
and judging, and carry the golden copy as `reference` where there is one.

Reads   --golden-file (stage 14), --rejected-file (stage 15), --products-file with the split of each product
Writes  --output-dir (processed_data/copywriting): sft_, pref_, prompts_ {train,val,test}.jsonl, pairs.csv (UTF-8 with
        BOM), prepare.json
Run     python scripts/16_prepare_copy.py
        python scripts/16_prepare_copy.py --rejected-file None
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.settings import UserError, read_settings


@dataclass
class Settings:
    # --- data
    task: str = "copywriting"
    """fixed: this stage knows brand copy only"""
    golden_file: Path = Path("processed_data/{task}/golden_clean.jsonl")
    """copies to learn from"""
    rejected_file: Path | None = Path("processed_data/{task}/rejected.jsonl")
    """None = no pairs"""
    products_file: Path = Path("data/copywriting/products.jsonl")
    """product sheets, each with its split"""

    # --- run
    output_dir: Path = Path("processed_data/{task}")
    """shared with stages 13-15: only this stage's own files are touched"""
    overwrite: bool = False
    """replace what an earlier run of this stage left"""


FILES = tuple(f"{name}_{split}.jsonl" for name in ("sft", "pref", "prompts") for split in ("train", "val", "test"))
COLUMNS = ("split", "product_id", "product", "copy_type", "prompt", "chosen", "rejected", "kind", "change")


def read_rejected(path: Path, golden: dict[str, dict]) -> dict[str, dict]:
    """id of the golden copy -> its rejected one. Raises DataError or UserError."""
    from tasks.copywriting.rows import rows_by_id

    def fault(row: dict) -> tuple[str, str] | None:
        text = row.get("rejected")
        if row.get("id") not in golden:
            return f"id {row.get('id')!r} is none of the golden copies", "run stage 15 on the same --golden-file"
        if not isinstance(text, str) or not text.strip():
            return "rejected is empty or no text", "run stage 15 again"
        if text.strip() == golden[row["id"]]["copy"].strip():
            return "rejected is the golden copy itself", "run stage 15 again"
        return None

    rejected = rows_by_id(path, fault)
    if missing := len(golden) - len(rejected):
        print(f"notice: {path}: {missing} golden copies have no rejected one: they give SFT rows and no pair")
    return rejected


def write_csv(path: Path, rows: list[dict]) -> None:
    """With a byte order mark, or Excel takes UTF-8 for the local code page. Line ends inside a cell stay."""
    from common.evaluation.tables import spreadsheet_cell
    from common.jsonl import write_bytes

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({key: spreadsheet_cell(value) for key, value in row.items()} for row in rows)
    write_bytes(path, text.getvalue().encode("utf-8-sig"))


def main(settings: Settings) -> None:
    from common.jsonl import write_json
    from common.runs import begin_run
    from tasks import copywriting as task
    from tasks.base import SPLITS, answer, check_command, write_splits
    from tasks.copywriting.rows import meta_of, read_copies, read_products

    products = read_products(settings.products_file)
    golden = {row["id"]: row for row in read_copies(settings.golden_file, products)}
    rejected = read_rejected(settings.rejected_file, golden) if settings.rejected_file else {}
    if not any(products[row["product_id"]]["split"] == "train" for row in golden.values()):
        raise UserError(
            f"{settings.golden_file}: no copy of a training product; fix: let stage 13 write --splits train val"
        )
    inputs = {name: getattr(settings, name) for name in ("golden_file", "rejected_file", "products_file")}
    inputs["prompts"] = Path(task.__file__)
    report, csv_file = settings.output_dir / "prepare.json", settings.output_dir / "pairs.csv"
    also = tuple(settings.output_dir / name for name in FILES) + (csv_file,)
    with begin_run(report, settings, inputs, "16_prepare_copy", resumable=False, also=also) as run:
        counts, sheet = {}, []
        for split in SPLITS:
            files: dict[str, list[dict]] = {"sft": [], "pref": [], "prompts": []}
            kinds: Counter = Counter()
            for product in (p for p in products.values() if p["split"] == split):
                for kind in task.COPY_TYPES:
                    meta = meta_of(product, kind)
                    prompt = task.messages(meta)
                    copies = [
                        row for row in golden.values() if (row["product_id"], row["copy_type"]) == (product["id"], kind)
                    ]
                    id = f"{product['id']}/{kind}"
                    reference = {"reference": copies[0]["copy"]} if copies else {}
                    files["prompts"].append({"prompt": prompt, "meta": {"id": id, **meta, **reference}})
                    for row in copies:
                        about = {"id": row["id"], **meta}
                        files["sft"].append({"prompt": prompt, "completion": answer(row["copy"]), "meta": about})
                        bad = rejected.get(row["id"], {})
                        line = [split, product["id"], product["name"], kind, prompt[-1]["content"], row["copy"]]
                        line += [bad.get("rejected", ""), bad.get("kind", ""), bad.get("change") or ""]
                        sheet.append(dict(zip(COLUMNS, line, strict=True)))
                        if bad:
                            sides = {"chosen": answer(row["copy"]), "rejected": answer(bad["rejected"])}
                            about = {**about, "kind": bad.get("kind"), "strategy": bad.get("strategy")}
                            files["pref"].append({"prompt": prompt, **sides, "meta": about})
                            kinds[bad.get("kind")] += 1
            written = write_splits({split: files}, settings.output_dir)[split]
            counts[split] = {**written, "kinds of rejected": kinds}
            print(f"{split}: " + ", ".join(f"{count} {name}" for name, count in written.items()))
        write_csv(csv_file, sheet)
        write_json(report, counts)
        run.figure("splits", counts)
        run.finish(check_command(settings.output_dir, task="copywriting", max_length=1024))


if __name__ == "__main__":
    main(read_settings(Settings))
