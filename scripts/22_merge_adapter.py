"""Merge a LoRA adapter into its base, and prove that the merged model on disk is the adapter's model.

The proof runs the adapter on its base and the saved merged model, read back, over the same real rows: logits at every position
of prompt and answer, and greedy texts. Above tolerance the stage fails and the folder is not marked as done.

Reads   --adapter (stages 20, 40, 50, 51), its base, --probe-file: rows with a prompt, and a completion where there is one
Writes  checkpoints/{task}/sft_merged: model, tokenizer, merge_report.json, run.json
Run     python scripts/22_merge_adapter.py
        python scripts/22_merge_adapter.py --adapter checkpoints/poems/dpo --output-dir checkpoints/poems/dpo_merged
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from common.settings import read_settings, resolve_model, show_path

# largest and mean difference of a logit that rounding explains, by dtype: W + BA is rounded once more in the merged model
TOLERANCES = {"float32": (2e-3, 1e-4), "bfloat16": (2.0, 0.1), "float16": (0.25, 0.02)}
TOP1_AGREEMENT = {
    "float32": 0.999,
    "bfloat16": 0.95,
    "float16": 0.98,
}  # least share of positions with the same best token
POSITIONS = 32  # compared in a row, evenly spaced: all of them would be gigabytes with a vocabulary of 150,000


@dataclass
class Settings:
    # --- what
    task: str = "poems"  # writing job: names the folders below
    model: str = ""  # base model; empty = the one that the adapter names
    adapter: Path = Path("checkpoints/{task}/sft")  # LoRA folder
    dtype: str = "auto"  # of the merged weights: auto, float32, bfloat16

    # --- proof
    probe_file: Path = Path("processed_data/{task}/sft_val.jsonl")  # real rows to compare on
    probe_rows: int = 64  # rows whose logits are compared
    greedy_rows: int = 16  # of these, rows whose greedy text is compared
    greedy_tokens: int = 96  # new tokens in a greedy text
    max_difference: float = 0.0  # of any logit; 0 = by dtype (TOLERANCES)
    mean_difference: float = 0.0  # over all logits; 0 = by dtype

    # --- run
    output_dir: Path = Path("checkpoints/{task}/sft_merged")  # merged model and report
    overwrite: bool = False  # replace what an earlier run left in output_dir


def row_texts(tokenizer, rows: list[dict]) -> list[str]:
    return [tokenizer.apply_chat_template(row["prompt"] + row.get("completion", []), tokenize=False) for row in rows]


def all_logits(model, tokenizer, texts: list[str]):
    """One float32 tensor [POSITIONS or fewer, vocabulary] a text, on the CPU, without padding: nothing but the weights differs."""
    import torch

    model.eval()
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
            kept = torch.linspace(0, ids.shape[1] - 1, min(POSITIONS, ids.shape[1])).long().to(model.device)
            yield model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0].float().cpu()


def greedy_texts(model, tokenizer, rows: list[dict], max_new_tokens: int) -> list[str]:
    from common.generation import render_prompt, sample

    texts = [render_prompt(tokenizer, row["prompt"]) for row in rows]
    results = sample(
        model, tokenizer, texts, max_new_tokens=max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0
    )
    return [text for _, text, _, _ in sorted(results)]


def main(settings: Settings) -> None:
    from common.jsonl import read_jsonl, write_json
    from common.models import load_model, load_tokenizer, read_adapter_config
    from common.runs import begin_run

    adapter = str(settings.adapter)
    base = resolve_model(settings.model or read_adapter_config(adapter)["base_model_name_or_path"], settings.task)
    inputs = {"model": base, "adapter": settings.adapter, "probe_file": settings.probe_file}
    with begin_run(
        settings.output_dir, settings, inputs, settings.overwrite, "22_merge_adapter", resumable=False
    ) as run:
        rows = read_jsonl(settings.probe_file)[: settings.probe_rows]
        tokenizer = load_tokenizer(adapter)
        texts = row_texts(tokenizer, rows)
        model = load_model(base, tokenizer, settings.dtype, adapter)
        before = list(all_logits(model, tokenizer, texts))
        greedy_before = greedy_texts(model, tokenizer, rows[: settings.greedy_rows], settings.greedy_tokens)

        merged = model.merge_and_unload(safe_merge=True)
        merged.save_pretrained(settings.output_dir)
        tokenizer.save_pretrained(settings.output_dir)
        del model, merged

        merged = load_model(str(settings.output_dir), tokenizer, settings.dtype)
        largest = total = agreed = count = values = 0.0
        for old, new in zip(before, all_logits(merged, tokenizer, texts), strict=True):
            difference = (old - new).abs()
            largest = max(largest, difference.max().item())
            total, values = total + difference.sum().item(), values + difference.numel()
            agreed, count = agreed + (old.argmax(-1) == new.argmax(-1)).sum().item(), count + len(old)
        greedy_after = greedy_texts(merged, tokenizer, rows[: settings.greedy_rows], settings.greedy_tokens)
        same = [one == other for one, other in zip(greedy_before, greedy_after, strict=True)]

        dtype = str(merged.dtype).removeprefix("torch.")
        allowed = (settings.max_difference or TOLERANCES[dtype][0], settings.mean_difference or TOLERANCES[dtype][1])
        report = {
            "base": run.record["inputs"]["model"],
            "adapter": run.record["inputs"]["adapter"],
            "dtype": dtype,
            "rows": len(rows),
            "positions": int(count),
            "max_logit_difference": largest,
            "mean_logit_difference": total / values,
            "allowed": {"max": allowed[0], "mean": allowed[1], "top1": TOP1_AGREEMENT[dtype]},
            "top1_agreement": agreed / count,
            "greedy_equal": sum(same),
            "greedy_compared": len(same),
            "greedy_different": [
                [one, other] for one, other, equal in zip(greedy_before, greedy_after, same, strict=True) if not equal
            ],
        }
        close = largest <= allowed[0] and report["mean_logit_difference"] <= allowed[1]
        report["passed"] = close and report["top1_agreement"] >= TOP1_AGREEMENT[dtype]
        write_json(settings.output_dir / "merge_report.json", report)
        print(
            f"largest logit difference {largest:.2e} (allowed {allowed[0]:.0e}), mean {total / values:.2e} (allowed {allowed[1]:.0e})"
        )
        print(
            f"top-1 agreement {agreed / count:.4%} of {int(count)} positions; greedy texts equal {sum(same)} of {len(same)}"
        )
        for name in ("max_logit_difference", "mean_logit_difference", "top1_agreement", "greedy_equal", "passed"):
            run.figure(name, report[name])
        if not report["passed"]:
            run.fail("merged model differs from the adapter's")
            print("the merged model is NOT the adapter's model: see merge_report.json", file=sys.stderr)
            raise SystemExit(1)
        run.finish(f"python scripts/60_generate.py --task {settings.task} --model {show_path(settings.output_dir)}")


if __name__ == "__main__":
    main(read_settings(Settings))
