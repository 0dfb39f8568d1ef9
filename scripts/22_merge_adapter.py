"""Merge a LoRA adapter into its base, and prove that the merged model on disk is the adapter's model.

The certificate reads the merged folder back and compares it with the adapter on its base (common/merging.py says how
and why): every weight must be W + s B A up to the rounding of --dtype, and over real rows the logits, compared in
float32 where memory allows, may differ by no more than the untouched base in --dtype differs from itself in float32. Of
a classifier or a reward model (task_type SEQ_CLS) the scores are compared. Greedy texts are shown beside, and decide
nothing. A certificate that is refused says why and what to do, and the folder is not marked as done. An adapter merges
into the base it was trained on, told by its hash in the adapter's run.json.

Reads   --adapter (stages 20, 30, 31, 40, 50, 51), its base, --probe-file: rows with a prompt, and a completion where
        there is one; of a classifier also preference pairs, and labelled rows with "input"
Writes  checkpoints/{task}/sft_merged: model, tokenizer, merge_report.json, run.json
Run     python scripts/22_merge_adapter.py
        python scripts/22_merge_adapter.py --adapter checkpoints/poems/dpo --output-dir checkpoints/poems/dpo_merged
        python scripts/22_merge_adapter.py --adapter checkpoints/styles/classifier_lora/adapter --probe-file \\
            processed_data/styles/style_val.jsonl --output-dir checkpoints/styles/classifier_merged
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.settings import UserError, next_command, read_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = ""
    """base model; empty = the one that the adapter names"""
    adapter: Path = Path("checkpoints/{task}/sft")
    """LoRA folder"""
    force_base: bool = False
    """merge into --model although the adapter was trained on another base"""
    dtype: str = "auto"
    """of the merged weights: auto, float32, bfloat16"""

    # --- proof
    probe_file: Path = Path("processed_data/{task}/sft_val.jsonl")
    """real rows to compare on"""
    probe_rows: int = 64
    """rows whose logits are compared"""
    greedy_rows: int = 16
    """of these, rows whose greedy text is compared"""
    greedy_tokens: int = 96
    """new tokens in a greedy text"""
    max_difference: float = 0.0
    """of any logit; 0 = what the certificate allows"""
    mean_difference: float = 0.0
    """over all logits; 0 = what the certificate allows"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/sft_merged")
    """merged model and report"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


def greedy_texts(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], max_new_tokens: int
) -> list[str]:
    from common.generation import opening, sample

    texts = [opening(tokenizer, row) for row in rows]
    results = sample(
        model, tokenizer, texts, max_new_tokens=max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0
    )
    return [text for _, text, _, _ in sorted(results)]


def score_texts(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[str]:
    """What a classifier or reward model scores: labelled inputs as they are, both sides of a pair, or prompt and
    answer."""
    if all("input" in row for row in rows):
        return [row["input"] for row in rows]
    from common.conversations import render

    parts = ("chosen", "rejected", "completion")
    sides = [(row["prompt"] + row[key], row) for row in rows for key in parts if key in row]
    sides = sides or [(row["prompt"], row) for row in rows]
    return [render(tokenizer, turns, tools=row.get("tools")) for turns, row in sides]


def merge_classifier(
    settings: Settings, base: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict], dtype: str, compare: str
) -> dict:
    """Merge, save, read back; the certificate of the scores."""
    from common.merging import certificate
    from common.models import resolve_dtype
    from common.training.classifiers import load_classifier, logits_of, open_classifier

    def opened(name: str):
        return open_classifier(base, str(settings.adapter), tokenizer, name, settings.force_base)

    opened(compare).merge_and_unload(safe_merge=True).to(resolve_dtype(dtype)).save_pretrained(settings.output_dir)
    tokenizer.save_pretrained(settings.output_dir)
    merged, tokenizer = load_classifier(str(settings.output_dir), compare)

    def logits(model: PreTrainedModel | PeftModel, text: str):
        return logits_of(model, tokenizer, [text])

    rough = opened(dtype) if compare != dtype else None
    return certificate(opened(compare), merged, rough, logits, score_texts(tokenizer, rows), dtype, is_classifier=True)


def merge_causal(
    settings: Settings, base: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict], dtype: str, compare: str
) -> dict:
    """Merge, save, read back; the certificate of the logits, and greedy texts of both."""
    from common.merging import certificate, probe_texts, text_logits
    from common.models import load_model, resolve_dtype

    def opened(name: str):
        return load_model(base, tokenizer, name, str(settings.adapter), force_base=settings.force_base)

    # merged in float32 where that fits, a weight is rounded once
    opened(compare).merge_and_unload(safe_merge=True).to(resolve_dtype(dtype)).save_pretrained(settings.output_dir)
    tokenizer.save_pretrained(settings.output_dir)
    adapted, merged = opened(compare), load_model(str(settings.output_dir), tokenizer, compare)
    rough = opened(dtype) if compare != dtype else None

    def logits(model: PreTrainedModel | PeftModel, text: str):
        return text_logits(model, tokenizer, text)

    report = certificate(adapted, merged, rough, logits, probe_texts(tokenizer, rows), dtype)
    del rough
    first = rows[: settings.greedy_rows]
    texts = [greedy_texts(model, tokenizer, first, settings.greedy_tokens) for model in (adapted, merged)]
    pairs = list(zip(*texts, strict=True))
    return report | {
        "greedy_equal": sum(one == other for one, other in pairs),
        "greedy_compared": len(pairs),
        "greedy_different": [[one, other] for one, other in pairs if one != other],
    }


def main(settings: Settings) -> None:
    from common.generation import generate_command
    from common.jsonl import MAX_DOCUMENT_BYTES, read_jsonl, write_json
    from common.merging import compared_in, faults, print_certificate
    from common.model_files import adapter_base, check_adapter, check_model, read_adapter_config
    from common.models import load_tokenizer, resolve_dtype
    from common.runs import begin_run

    # all inputs, before an earlier merge is touched
    classifies = read_adapter_config(settings.adapter).get("task_type") == "SEQ_CLS"
    base = adapter_base(settings.adapter, settings.model, settings.task)
    check_model(base, "reward base" if classifies else "causal")
    notice = check_adapter(settings.adapter, base, "classifier" if classifies else "causal", settings.force_base)
    if notice:
        print(f"notice: {notice}")
    rows = read_jsonl(settings.probe_file, max_line_bytes=MAX_DOCUMENT_BYTES)[: settings.probe_rows]
    if not rows or any(not ({"prompt", "input", "text"} & set(row)) for row in rows):
        raise UserError(f"{settings.probe_file}: no rows with a prompt; fix: --probe-file with rows of the stages")
    tokenizer = load_tokenizer(str(settings.adapter), documents="text" in rows[0])
    dtype = str(resolve_dtype(settings.dtype)).removeprefix("torch.")
    compare = compared_in(base, dtype)
    inputs = {"model": base, "adapter": settings.adapter, "probe_file": settings.probe_file}
    with begin_run(settings.output_dir, settings, inputs, "22_merge_adapter", resumable=False) as run:
        if notice:
            run.figure("base_notice", notice)
        report = {"base": run.record["inputs"]["model"], "adapter": run.record["inputs"]["adapter"], "rows": len(rows)}
        merge = merge_classifier if classifies else merge_causal
        report |= merge(settings, base, tokenizer, rows, dtype, compare)
        given = {"max": settings.max_difference, "mean": settings.mean_difference}
        report["allowed"] |= {name: value for name, value in given.items() if value}
        report["faults"] = faults(report)
        report["passed"] = not report["faults"]
        write_json(settings.output_dir / "merge_report.json", report)
        print_certificate(report)
        if not classifies:
            print(f"greedy texts equal {report['greedy_equal']} of {report['greedy_compared']}")
        shown = ("dtype", "compared_in", "logits", "noise", "effect", "allowed", "weights", "greedy_equal", "passed")
        for name in (name for name in shown if name in report):
            run.figure(name, report[name])
        if report["faults"]:
            run.fail("; ".join(report["faults"]))
            for fault in report["faults"]:
                print(f"the merged model is NOT the adapter's model: {fault}", file=sys.stderr)
            raise SystemExit(1)
        if classifies:
            run.finish(next_command("32_evaluate_reward", task=settings.task, model=settings.output_dir))
        else:
            run.finish(generate_command(settings.task, settings.probe_file, rows[0], model=settings.output_dir))


if __name__ == "__main__":
    main(read_settings(Settings))
