"""A rejected copy for every golden one: 50 % weak, 30 % exaggerated, 20 % with one or two false facts.

With --model the model exaggerates and falsifies, and --weak-model writes the weak ones from a bare prompt. The rules
have to find the fault in an answer (hype words, a contradicted fact); else, and everywhere without --model, a rule
writes the copy: tasks/copywriting/faults.py. The report sets the realised mix against the target and says how well
length alone and a bag of characters tell the pairs apart (the baselines of stage 32): pairs that those separate teach a
reward model little else.

Reads   --golden-file (stage 14), --products-file; with --model: --prompts-dir (weak.md, exaggerated.md, false.md)
Writes  --output-file: one row a golden copy (id, product_id, copy_type, kind, strategy, change, rejected, source)
Run     python scripts/15_write_rejected.py
        python scripts/15_write_rejected.py --model deepseek-chat --weak-model qwen2.5-0.5b-instruct --dry-run
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.llm_settings import ASKING, HOW_TO_ASK, AskSettings
from common.settings import UserError, next_command, read_settings, unused

if TYPE_CHECKING:
    from common.llm_api import Answer, ChatRequest, Failure
    from common.runs import Run


@dataclass
class Settings(AskSettings):
    # --- what
    task: str = "copywriting"
    """fixed: this stage knows brand copy only"""
    golden_file: Path = Path("processed_data/{task}/golden_clean.jsonl")
    """the chosen copies"""
    products_file: Path = Path("data/copywriting/products.jsonl")
    """product sheets"""
    weak: float = 0.5
    """share of weak copies"""
    exaggerated: float = 0.3
    """share of exaggerated ones"""
    false: float = 0.2
    """share of those with false facts; the three add up to 1"""

    # --- writer
    model: str = ""
    """its name at the endpoint; empty = no API, rules only"""
    weak_model: str = ""
    """writes the weak copies; empty = --model"""
    prompts_dir: Path = Path("data/copywriting/write_prompts")
    """weak.md, exaggerated.md, false.md"""
    guide_file: Path = Path("data/copywriting/brand_guide.md")
    """not shown to the writer of rejected copies; templates may name it"""
    temperature: float = 0.8
    """of the sampling"""
    top_p: float = 0.95
    """probability mass to draw from"""
    max_tokens: int = 1024
    """of an answer; where it is cut off, a rule writes the copy"""
    extra_body: str = ""
    """JSON object merged into every request; null takes a field away"""

    # --- how to ask (further settings: common/llm_settings.py)
    request_log: Path = Path("processed_data/requests/{task}_reject.jsonl")
    """answers, kept by --overwrite"""

    # --- run
    output_file: Path = Path("processed_data/{task}/rejected.jsonl")
    """one rejected copy for each golden one"""
    seed: int = 42
    """of the kinds and of the rules"""
    overwrite: bool = False
    """replace output_file"""

    def clashes(self):
        if not self.model:
            yield from unused(self, "without --model: nothing is asked", *ASKING)


def assign_kinds(rows: list[dict], shares: dict[str, float], seed: int) -> dict[str, str]:
    """id -> kind. The shares hold within each split, up to one row; which row gets which comes from its id."""
    kinds = {}
    for split in dict.fromkeys(row["product"]["split"] for row in rows):
        ids = [row["id"] for row in rows if row["product"]["split"] == split]
        ids.sort(key=lambda id: hashlib.sha256(f"{seed}/{id}".encode()).hexdigest())
        counts = {kind: int(share * len(ids)) for kind, share in shares.items()}
        by_remainder = sorted(shares, key=lambda kind: counts[kind] - shares[kind] * len(ids))
        for kind in by_remainder[: len(ids) - sum(counts.values())]:
            counts[kind] += 1
        names = [kind for kind, count in counts.items() for _ in range(count)]
        kinds |= dict(zip(ids, names, strict=True))
    return kinds


def measure_leakage(rows: list[dict], rejected: dict[str, dict]) -> dict[str, dict]:
    """Pair accuracy on val of what is fitted on train and sees no more than length, or characters; for all and for each
    kind."""
    from common.evaluation.baselines import bag_of_characters_baseline, correctness, length_baseline

    report = {}
    pairs = [
        (row["product"]["split"], rejected[row["id"]]["kind"], (row["copy"], rejected[row["id"]]["rejected"]))
        for row in rows
    ]
    for kind in ("all", *dict.fromkeys(kind for _, kind, _ in pairs)):
        train, val = ([p for s, k, p in pairs if s == split and kind in ("all", k)] for split in ("train", "val"))
        if not train or not val:
            continue
        right = {
            name: correctness(baseline(train, val))
            for name, baseline in (("length", length_baseline), ("characters", bag_of_characters_baseline))
        }
        ratio = sum(len(r) / len(c) for c, r in train + val) / len(train + val)
        report[kind] = {name: round(sum(values) / len(values), 3) for name, values in right.items()}
        report[kind] |= {"train_pairs": len(train), "val_pairs": len(val), "length_ratio": round(ratio, 3)}
    return report


def main(settings: Settings) -> None:
    from common.llm_api import LLM, ChatRequest, read_extra
    from common.runs import begin_run
    from tasks.copywriting import faults as copy_faults
    from tasks.copywriting.rows import Writer, meta_of, read_copies, read_products

    shares = {kind: getattr(settings, kind) for kind in copy_faults.KINDS}
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
        raise UserError(
            f"--weak, --exaggerated and --false add up to {sum(shares.values()):g}; fix: let them add up to 1"
        )
    if settings.weak_model and not settings.model:
        raise UserError("--weak-model without --model; fix: name both, or neither to do without an API")
    products = read_products(settings.products_file)
    rows = [
        {**row, "product": (product := products[row["product_id"]]), "meta": meta_of(product, row["copy_type"])}
        for row in read_copies(settings.golden_file, products)
    ]
    kinds = assign_kinds(rows, shares, settings.seed)
    inputs = {"golden_file": settings.golden_file, "products_file": settings.products_file}
    inputs |= {"rules": Path(copy_faults.__file__), "checks": Path(copy_faults.task.__file__)}
    inputs |= {f"checks: {file.name}": file for file in copy_faults.task.FILES}
    requests = []
    if settings.model:
        writer = Writer(settings.prompts_dir, settings.guide_file, list(copy_faults.KINDS))
        models = {"weak": settings.weak_model or settings.model}
        sampling = (settings.max_tokens, settings.temperature, settings.top_p)
        for row in rows:
            kind = kinds[row["id"]]
            messages = writer.messages(kind, row["product"], row["copy_type"], copy=row["copy"])
            model, sample = models.get(kind, settings.model), row.get("sample", 0)
            requests.append(ChatRequest(model, messages, *sampling, sample, read_extra(settings.extra_body)))
        inputs["prompts"] = settings.prompts_dir

    with LLM.of(settings) as llm:
        if settings.dry_run:
            llm.print_estimate(requests, f"{len(rows)} golden copies")
            return
        llm.check(requests)
        with begin_run(settings.output_file, settings, inputs, "15_write_rejected", ignore=HOW_TO_ASK) as run:
            answers = [None] * len(rows)
            if requests:
                try:
                    answers = llm.ask(requests, "rejected copies")
                finally:
                    run.figure("api", llm.figures())
            write_rejected(settings, run, rows, kinds, shares, requests, answers)


def write_rejected(
    settings: Settings,
    run: Run,
    rows: list[dict],
    kinds: dict[str, str],
    shares: dict[str, float],
    requests: list[ChatRequest],
    answers: list[Answer | Failure | None],
) -> None:
    """Answers that show their fault, rules for the rest; the mix and the leakage of what came out."""
    from common.evaluation.tables import markdown_table
    from common.jsonl import write_jsonl
    from common.llm_api import Answer
    from tasks.copywriting import faults as copy_faults
    from tasks.copywriting.rows import usable_text

    rejected, fallbacks = {}, Counter()
    for i, row in enumerate(rows):
        kind, answer = kinds[row["id"]], answers[i]
        made = None
        if isinstance(answer, Answer):
            text, reason = usable_text(answer.text, answer.finish_reason)
            if not reason and text != row["copy"] and copy_faults.shows(kind, text, row["meta"]):
                made = (kind, text, "model", None, requests[i].model)
            else:
                fallbacks[f"{kind}: {reason or 'the answer does not show the fault'}; made by rule"] += 1
        elif answer is not None:
            fallbacks[f"{kind}: {answer.reason}; made by rule"] += 1
        for other in () if made else (kind, *(k for k in copy_faults.KINDS if k != kind)):
            if spoilt := copy_faults.spoil(other, row, rows, settings.seed):
                text, strategy, change = spoilt
                made = (other, text, strategy, change, "rules")
                if other != kind:
                    fallbacks[f"{kind}: no rule fits; {other} instead"] += 1
                break
        if made is None:
            raise UserError(
                f"{settings.golden_file}: no rule spoils the copy {row['id']}; fix: name a --model, or remove it"
            )
        names = ("kind", "rejected", "strategy", "change", "source")
        ids = {name: row[name] for name in ("id", "product_id", "copy_type")}
        rejected[row["id"]] = ids | dict(zip(names, made, strict=True))

    realised = Counter(r["kind"] for r in rejected.values())
    leakage = measure_leakage(rows, rejected)
    header = ["kind", "target", "realised", "rows", "length ratio", "length alone", "characters alone"]
    table = [
        [
            kind,
            *(
                (f"{shares[kind]:.0%}", f"{realised[kind] / len(rows):.1%}", str(realised[kind]))
                if kind in shares
                else ("", "", str(len(rows)))
            ),
            *(f"{leakage[kind][n]:.3f}" if kind in leakage else "-" for n in ("length_ratio", "length", "characters")),
        ]
        for kind in (*copy_faults.KINDS, "all")
    ]
    print(markdown_table(header, table))
    print("length, characters: pair accuracy on val of a baseline that sees nothing else; 0.5 is a guess")
    for reason, count in fallbacks.most_common():
        print(f"  {count:6d}  {reason}")
    write_jsonl(settings.output_file, rejected.values())
    run.figure("mix", {kind: {"target": shares[kind], "realised": realised[kind] / len(rows)} for kind in shares})
    run.figure("strategies", Counter(f"{r['kind']}: {r['strategy']}" for r in rejected.values()))
    run.figure("fallbacks", fallbacks)
    run.figure("leakage", leakage)
    files = {"golden_file": settings.golden_file, "rejected_file": settings.output_file}
    run.finish(next_command("16_prepare_copy", **files))


if __name__ == "__main__":
    main(read_settings(Settings))
