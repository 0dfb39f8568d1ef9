"""Golden brand copy: products x 9 copy types, written by a strong model behind an OpenAI-compatible API, or taken from
the shipped set.

With no --model nothing is asked: the copies that were written for this repository are taken. With one, OPENAI_BASE_URL
and OPENAI_API_KEY name the endpoint. Every answer is kept in the request log: a run that was killed asks only what is
missing. --dry-run says how many requests and tokens it takes and what they cost, before a cent is spent
(docs/tasks/copywriting.md).

Reads   --products-file, --guide-file, --prompts-dir (one template a copy type); without --model: --golden-file
Writes  --output-file: one row a copy (id, product_id, copy_type, sample, copy, source); --request-log: every answer
Run     python scripts/13_write_copy.py
        export OPENAI_BASE_URL=https://api.deepseek.com/v1 OPENAI_API_KEY=...
        python scripts/13_write_copy.py --model deepseek-chat --dry-run --price-in 2 --price-out 3
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.llm_settings import ASKING, HOW_TO_ASK, AskSettings
from common.settings import UserError, next_command, read_settings, show_path, unused

if TYPE_CHECKING:
    from common.runs import Run

MISSING = "not in the shipped set"


@dataclass
class Settings(AskSettings):
    # --- what
    task: str = "copywriting"
    """fixed: this stage knows brand copy only"""
    products_file: Path = Path("data/copywriting/products.jsonl")
    """product sheets"""
    golden_file: Path = Path("data/copywriting/golden.jsonl")
    """taken where there is no --model"""
    splits: tuple[str, ...] = ("train", "val")
    """of the products; test too, to have references for a judge"""
    copy_types: tuple[str, ...] = ()
    """names of copy types, none = all nine"""
    max_products: int = 0
    """first products of the file, 0 = all"""
    num_samples: int = 1
    """copies per product and type"""

    # --- writer
    model: str = ""
    """its name at the endpoint; empty = no API, the shipped copies"""
    guide_file: Path = Path("data/copywriting/brand_guide.md")
    """stands in the system prompt"""
    prompts_dir: Path = Path("data/copywriting/write_prompts")
    """system.md and one template a copy type"""
    temperature: float = 0.8
    """of the sampling"""
    top_p: float = 0.95
    """probability mass to draw from"""
    max_tokens: int = 1024
    """of an answer; a copy that is cut off is left out"""
    extra_body: str = ""
    """JSON object merged into every request; null takes a field away"""

    # --- how to ask (further settings: common/llm_settings.py)
    request_log: Path = Path("processed_data/requests/{task}_write.jsonl")
    """answers, kept by --overwrite"""

    # --- run
    output_file: Path = Path("processed_data/{task}/golden_raw.jsonl")
    """copies as written, not yet checked"""
    overwrite: bool = False
    """replace output_file"""

    def clashes(self):
        if not self.model:
            yield from unused(self, "without --model: nothing is asked", *ASKING)
        else:
            yield from unused(self, "with --model", "golden_file")


def main(settings: Settings) -> None:
    from common.llm_api import LLM, ChatRequest, Failure, read_extra
    from common.runs import begin_run
    from tasks import copywriting as task
    from tasks.copywriting.rows import SPLITS, Writer, read_copies, read_products, usable_text

    if unknown := [name for name in settings.copy_types if name not in task.COPY_TYPES]:
        raise UserError(f"--copy-types {' '.join(unknown)}: unknown; fix: use {', '.join(task.COPY_TYPES)}")
    if unknown := [name for name in settings.splits if name not in SPLITS]:
        raise UserError(f"--splits {' '.join(unknown)}: unknown; fix: use {', '.join(SPLITS)}")
    products = read_products(settings.products_file)
    chosen = [product for product in products.values() if product["split"] in settings.splits]
    chosen = chosen[: settings.max_products or None]
    if not chosen:
        splits = ", ".join(settings.splits)
        raise UserError(f"{settings.products_file}: no product of the splits {splits}; fix: --splits train val test")
    wanted = [
        (product, kind, sample)
        for product in chosen
        for kind in settings.copy_types or task.COPY_TYPES
        for sample in range(settings.num_samples)
    ]
    ids = [f"{product['id']}/{kind}#{sample}" for product, kind, sample in wanted]
    inputs = {"products_file": settings.products_file}

    if not settings.model:
        shipped = {row["id"]: row for row in read_copies(settings.golden_file, products)}
        found = sum(id in shipped for id in ids)
        if settings.dry_run:
            print(f"no --model: {found} of {len(ids)} copies are in {show_path(settings.golden_file)}, cost 0")
            return
        if not found:
            raise UserError(f"{settings.golden_file} holds none of the {len(ids)} copies; fix: name a --model")
        inputs |= {"golden_file": settings.golden_file}
        how = {"resumable": False, "ignore": HOW_TO_ASK}
        with begin_run(settings.output_file, settings, inputs, "13_write_copy", **how) as run:
            texts = [(shipped[id]["copy"] if id in shipped else "", None if id in shipped else MISSING) for id in ids]
            sources = [shipped.get(id, {}).get("source", show_path(settings.golden_file)) for id in ids]
            write_copies(settings, run, wanted, texts, sources)
        return

    names = ["system", *dict.fromkeys(kind for _, kind, _ in wanted)]
    writer = Writer(settings.prompts_dir, settings.guide_file, names)
    extra, sampling = read_extra(settings.extra_body), (settings.max_tokens, settings.temperature, settings.top_p)
    requests = [
        ChatRequest(settings.model, writer.messages(kind, product, kind), *sampling, sample, extra)
        for product, kind, sample in wanted
    ]
    with LLM.of(settings) as llm:
        if settings.dry_run:
            llm.print_estimate(requests)
            return
        llm.check(requests)
        inputs |= {"prompts": settings.prompts_dir, "guide": settings.guide_file}
        with begin_run(settings.output_file, settings, inputs, "13_write_copy", ignore=HOW_TO_ASK) as run:
            try:
                answers = llm.ask(requests, "copies")
            finally:
                run.figure("api", llm.figures())
            texts = [
                ("", a.reason) if isinstance(a, Failure) else usable_text(a.text, a.finish_reason) for a in answers
            ]
            write_copies(settings, run, wanted, texts, [settings.model] * len(wanted))


def write_copies(settings: Settings, run: Run, wanted: list[tuple], texts: list[tuple], sources: list[str]) -> None:
    """wanted: (product, copy type, sample); texts: (copy, why it is left out or None)."""
    from common.jsonl import write_jsonl

    rows, left_out = [], Counter(reason for _, reason in texts if reason)
    for (product, kind, sample), (text, reason), source in zip(wanted, texts, sources, strict=True):
        if not reason:
            row = {"id": f"{product['id']}/{kind}#{sample}", "product_id": product["id"], "copy_type": kind}
            rows.append(row | {"sample": sample, "copy": text, "source": source})
    print(f"{len(rows)} of {len(wanted)} copies ({settings.model or 'shipped with the repo'})")
    for reason, count in left_out.most_common():
        print(f"  left out {count:6d}  {reason}")
    if not rows:
        raise UserError(f"not one answer is a copy; fix: read them in {show_path(settings.request_log)}")
    write_jsonl(settings.output_file, rows)
    run.figure("copies", len(rows))
    run.figure("left_out", left_out)
    run.finish(next_command("14_clean_copy", copies_file=settings.output_file))


if __name__ == "__main__":
    main(read_settings(Settings))
