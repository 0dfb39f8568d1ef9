"""Clean copy in rounds until every one passes the rules or the rounds are used up: stray tags and markdown, forbidden
words, exclamation, a missing call to action in ads, no voice in social notes, wrong facts, wrong length.

Round 0 checks what came in (`problems` of tasks/copywriting); what passes is never touched. Round 1 takes out marks by
rule: tags, markdown, exclamation marks. Every further round lets a model rewrite what still fails and tells it why.
Without --model there are rounds 0 and 1 only. What never passes is left out. Each round's rejects are kept with their
reasons.

Reads   --copies-file (stage 13: id, product_id, copy_type, copy), --products-file; with --model: --prompts-dir,
        --guide-file
Writes  --output-file: what passes, with the round and what fixed it; beside it <name>_rejects.jsonl: every rejected
        text of every round
Run     python scripts/14_clean_copy.py
        python scripts/14_clean_copy.py --model deepseek-chat --max-rounds 4
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.llm_settings import ASKING, HOW_TO_ASK, AskSettings
from common.settings import UserError, next_command, read_settings, show_path, unused

if TYPE_CHECKING:
    from common.llm_api import LLM
    from common.runs import Run
    from tasks.copywriting.rows import Writer

MARKS = ("tag", "markdown", "exclamation", "punctuation")  # kinds that can be fixed without writing
HEADING = re.compile(r"^#{1,6}\s.*\n?", re.MULTILINE)
LINK = re.compile(r"\[([^\]\n]*)\]\([^)\n]*\)")


@dataclass
class Settings(AskSettings):
    # --- what
    task: str = "copywriting"
    """fixed: this stage knows brand copy only"""
    copies_file: Path = Path("processed_data/{task}/golden_raw.jsonl")
    """copies as written"""
    products_file: Path = Path("data/copywriting/products.jsonl")
    """product sheets: the facts"""
    max_rounds: int = 3
    """round 1 fixes by rule, the others are a model's; 0 = check only"""

    # --- rewriting
    model: str = ""
    """its name at the endpoint; empty = no API, rules only"""
    guide_file: Path = Path("data/copywriting/brand_guide.md")
    """stands in the system prompt"""
    prompts_dir: Path = Path("data/copywriting/write_prompts")
    """system.md and rewrite.md"""
    temperature: float = 0.5
    """of the sampling"""
    top_p: float = 0.95
    """probability mass to draw from"""
    max_tokens: int = 1024
    """of an answer; one that is cut off fails its round"""
    extra_body: str = ""
    """JSON object merged into every request; null takes a field away"""

    # --- how to ask (further settings: common/llm_settings.py)
    request_log: Path = Path("processed_data/requests/{task}_clean.jsonl")
    """answers, kept by --overwrite"""

    # --- run
    output_file: Path = Path("processed_data/{task}/golden_clean.jsonl")
    """copies that pass"""
    overwrite: bool = False
    """replace output_file and its rejects"""

    def clashes(self):
        if not self.model:
            yield from unused(self, "without --model: nothing is asked", *ASKING)


def fix_marks(text: str, meta: dict, problems: Callable[[str, dict], list]) -> str:
    """The text without the marks that `problems` finds in it: tags and markdown go, exclamation marks and dots become
    stops."""
    text = LINK.sub(r"\1", HEADING.sub("", text))
    for _ in range(3):  # a label may stand behind another
        spans = {p.span for p in problems(text, meta) if p.kind in MARKS and p.span}
        for start, end in sorted(spans, reverse=True):
            text = text[:start] + instead_of(text[start:end], text[:start], text[end:]) + text[end:]
        text = re.sub(r"[，。]+(?=[，。；])", "", re.sub(r"[ \t]{2,}", " ", text))
        text = re.sub(r"\s*\n\s*", "\n", text).strip()
    return text


def instead_of(mark: str, before: str, behind: str) -> str:
    if mark[0] in "！!":
        return "。" if before and before[-1] not in "。！？!?，、；：" else ""
    if mark[0] in "？?":
        return "？"
    if mark[0] in "….":
        return "，" if behind.strip() else "。"
    return ""


def main(settings: Settings) -> None:
    from common.llm_api import LLM, read_extra
    from common.runs import begin_run
    from tasks import copywriting as task
    from tasks.copywriting.rows import Writer, meta_of, read_copies, read_products

    products = read_products(settings.products_file)
    rows = read_copies(settings.copies_file, products)
    metas = {row["id"]: meta_of(products[row["product_id"]], row["copy_type"]) for row in rows}
    rejects_file = settings.output_file.with_name(f"{settings.output_file.stem}_rejects.jsonl")
    inputs = {
        "copies_file": settings.copies_file,
        "products_file": settings.products_file,
        "rules": Path(task.__file__),
    }
    inputs |= {f"rules: {file.name}": file for file in task.FILES}
    writer = None
    if settings.model:
        writer = Writer(settings.prompts_dir, settings.guide_file, ["system", "rewrite"])
        inputs |= {"prompts": settings.prompts_dir, "guide": settings.guide_file}
        read_extra(settings.extra_body)

    texts = {row["id"]: row["copy"] for row in rows}
    failing = {id: found for id, text in texts.items() if (found := task.problems(text, metas[id]))}
    fixed = {id: fix_marks(texts[id], metas[id], task.problems) for id in failing} if settings.max_rounds else {}
    left = {id: text for id, text in fixed.items() if task.problems(text, metas[id])}
    with LLM.of(settings) as llm:
        first = (
            rewrite_requests(settings, writer, left, metas, products, 2) if writer and settings.max_rounds > 1 else []
        )
        if settings.dry_run:
            llm.print_estimate(first, f"{len(failing)} of {len(rows)} copies fail, {len(left)} after fixing by rule")
            return
        llm.check(first)
        with begin_run(
            settings.output_file, settings, inputs, "14_clean_copy", ignore=HOW_TO_ASK, also=(rejects_file,)
        ) as run:
            try:
                clean_rounds(settings, run, llm, writer, rows, metas, products, rejects_file)
            finally:
                if writer:
                    run.figure("api", llm.figures())


def rewrite_requests(
    settings: Settings, writer: Writer, failing: dict[str, str], metas: dict, products: dict, number: int
) -> list:
    """One request a failing copy (id -> text), with its problems in the prompt; the round is its sample number."""
    from common.llm_api import ChatRequest, read_extra
    from tasks import copywriting as task

    requests = []
    for id, text in failing.items():
        product, kind = products[metas[id]["product_id"]], metas[id]["copy_type"]
        listed = "\n".join(f"- {problem.reason}" for problem in task.problems(text, metas[id]))
        messages = writer.messages("rewrite", product, kind, copy=text, problems=listed)
        sampling = (settings.max_tokens, settings.temperature, settings.top_p)
        requests.append(ChatRequest(settings.model, messages, *sampling, number, read_extra(settings.extra_body)))
    return requests


def clean_rounds(
    settings: Settings,
    run: Run,
    llm: LLM,
    writer: Writer | None,
    rows: list[dict],
    metas: dict[str, dict],
    products: dict[str, dict],
    rejects_file: Path,
) -> None:
    """Check, fix, check again; writes what passes and what was rejected on the way."""
    from common.jsonl import write_jsonl
    from common.llm_api import Failure
    from tasks import copywriting as task
    from tasks.copywriting.rows import usable_text

    passed, rejects, rounds = {}, [], []  # passed: id -> (text, round)
    texts, broken = {row["id"]: row["copy"] for row in rows}, {}  # broken: id -> why the last answer is no copy
    for number in range(settings.max_rounds + 1):
        if number == 1:
            texts = {id: fix_marks(text, metas[id], task.problems) for id, text in texts.items()}
        elif number > 1:
            requests = rewrite_requests(settings, writer, texts, metas, products, number)
            broken = {}
            for id, answer in zip(list(texts), llm.ask(requests, f"rewrites of round {number}"), strict=True):
                failed = isinstance(answer, Failure)
                text, reason = ("", answer.reason) if failed else usable_text(answer.text, answer.finish_reason)
                if reason:
                    broken[id] = reason  # the text of the round before is rewritten again
                else:
                    texts[id] = text
        counts, failing = Counter(), {}
        for id, text in texts.items():
            found = task.problems(text, metas[id])
            if not found:
                passed[id] = (text, number)
                continue
            failing[id] = text
            counts.update({problem.kind for problem in found})
            listed = [{"kind": p.kind, "span": p.span and list(p.span), "reason": p.reason} for p in found]
            reject = {"id": id, "round": number, **{k: metas[id][k] for k in ("product_id", "copy_type")}, "copy": text}
            rejects.append(reject | {"problems": listed} | ({"answer": broken[id]} if id in broken else {}))
        by = ("as written", "fixed by rule")[number] if number < 2 else f"rewritten by {settings.model}"
        print(
            f"round {number} ({by}): {len(texts) - len(failing)} of {len(texts)} pass"
            + "".join(f", {kind} {count}" for kind, count in counts.most_common())
        )
        rounds.append({"by": by, "checked": len(texts), "passed": len(texts) - len(failing), "problems": counts})
        run.figure("rounds", rounds)
        texts = failing
        if not texts or (number == 1 and not writer):
            break

    write_jsonl(rejects_file, rejects)
    if not passed:
        raise UserError(
            f"no copy of {settings.copies_file} passes, reasons in {show_path(rejects_file)}; fix: give stage 14 a "
            "--model"
        )
    names = ("", "rules")
    write_jsonl(
        settings.output_file,
        (
            {
                **row,
                "copy": passed[row["id"]][0],
                "round": (n := passed[row["id"]][1]),
                "fixed_by": (names[n] if n < 2 else settings.model) or None,
            }
            for row in rows
            if row["id"] in passed
        ),
    )
    print(f"{len(passed)} of {len(rows)} copies pass, {len(texts)} are left out ({show_path(rejects_file)})")
    run.figure("passed", len(passed))
    run.figure("left_out", len(texts))
    run.finish(next_command("15_write_rejected", golden_file=settings.output_file))


if __name__ == "__main__":
    main(read_settings(Settings))
