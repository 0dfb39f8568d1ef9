"""Merge a LoRA adapter into its base, and prove that the merged model on disk is the adapter's model.

The proof runs the adapter on its base and the saved merged model, read back, over the same real rows: logits at every position
of prompt and answer, and greedy texts. Of a classifier or a reward model (task_type SEQ_CLS) the scores are compared, and which label is
the highest. Above tolerance the stage fails and the folder is not marked as done.

Reads   --adapter (stages 20, 30, 31, 40, 50, 51), its base, --probe-file: rows with a prompt, and a completion where there is one; of a
        classifier also preference pairs, and labelled rows with "input"
Writes  checkpoints/{task}/sft_merged: model, tokenizer, merge_report.json, run.json
Run     python scripts/22_merge_adapter.py
        python scripts/22_merge_adapter.py --adapter checkpoints/poems/dpo --output-dir checkpoints/poems/dpo_merged
        python scripts/22_merge_adapter.py --adapter checkpoints/styles/classifier_lora/adapter --probe-file \
            processed_data/styles/style_val.jsonl --output-dir checkpoints/styles/classifier_merged
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from common.settings import UserError, read_settings, resolve_model, show_path

# largest and mean difference of a logit that rounding explains, by dtype: W + BA is rounded once more in the merged model
TOLERANCES = {"float32": (2e-3, 1e-4), "bfloat16": (2.0, 0.1), "float16": (0.25, 0.02)}
# least share of positions with the same best token
TOP1_AGREEMENT = {"float32": 0.999, "bfloat16": 0.95, "float16": 0.98}
POSITIONS = 32  # compared in a row, evenly spaced: all of them would be gigabytes with a vocabulary of 150,000


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = ""
    """base model; empty = the one that the adapter names"""
    adapter: Path = Path("checkpoints/{task}/sft")
    """LoRA folder"""
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
    """of any logit; 0 = by dtype (TOLERANCES)"""
    mean_difference: float = 0.0
    """over all logits; 0 = by dtype"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/sft_merged")
    """merged model and report"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


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


def score_texts(tokenizer, rows: list[dict]) -> list[str]:
    """What a classifier or reward model scores: labelled inputs as they are, both sides of a pair, or prompt and answer."""
    if all("input" in row for row in rows):
        return [row["input"] for row in rows]
    parts = ("chosen", "rejected", "completion")
    sides = [row["prompt"] + row[key] for row in rows for key in parts if key in row] or [row["prompt"] for row in rows]
    return [tokenizer.apply_chat_template(turns, tokenize=False) for turns in sides]


def open_classifier(base: str, adapter: str, tokenizer, dtype: str):
    """The adapter on its base, as many labels as its own head has, named as label_mapping.json in or above its folder says."""
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForSequenceClassification

    from common.jsonl import read_json
    from common.models import pick_device, resolve_dtype

    with safe_open(f"{adapter}/adapter_model.safetensors", "pt") as file:
        heads = [key for key in file.keys() if key.endswith("score.weight")]  # noqa: SIM118 (no mapping)
        if not heads:
            raise UserError(f"{adapter}: no trained head in the adapter; fix: train it with task_type SEQ_CLS")
        count = file.get_slice(heads[0]).get_shape()[0]
    names = {}
    for folder in (Path(adapter), Path(adapter).parent):
        if not names and (folder / "label_mapping.json").exists():
            mapping = read_json(folder / "label_mapping.json")
            names = {"id2label": {int(key): name for key, name in mapping["id_to_label"].items()}}
            names["label2id"] = mapping["label_to_id"]
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        dtype=resolve_dtype(dtype),
        use_safetensors=True,
        trust_remote_code=False,
        **(names or {"num_labels": count}),
    )
    if model.config.num_labels != count:
        raise UserError(
            f"{adapter}: {count} labels, but {model.config.num_labels} in label_mapping.json; fix: correct it"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return PeftModel.from_pretrained(model, adapter, use_safetensors=True).to(pick_device()).eval()


def merge_classifier(settings: Settings, base: str, tokenizer, rows: list[dict]) -> dict:
    """Merge, save, read back; the differences between the scores of both."""
    from common.training.classifiers import load_classifier, logits_of

    texts, output_dir = score_texts(tokenizer, rows), settings.output_dir
    model = open_classifier(base, str(settings.adapter), tokenizer, settings.dtype)
    before = logits_of(model, tokenizer, texts)
    model.merge_and_unload(safe_merge=True).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    merged, tokenizer = load_classifier(str(output_dir), settings.dtype, before.shape[1])
    after = logits_of(merged, tokenizer, texts)
    difference = (before - after).abs()
    same = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    return {
        "dtype": str(merged.dtype).removeprefix("torch."), "labels": before.shape[1], "texts": len(texts),
        "max_logit_difference": difference.max().item(), "mean_logit_difference": difference.mean().item(), "top1_agreement": same,
    }  # fmt: skip


def merge_causal(settings: Settings, base: str, tokenizer, rows: list[dict]) -> dict:
    """Merge, save, read back; the differences between the logits and greedy texts of both."""
    from common.models import load_model

    texts, first = row_texts(tokenizer, rows), rows[: settings.greedy_rows]
    model = load_model(base, tokenizer, settings.dtype, str(settings.adapter))
    before = list(all_logits(model, tokenizer, texts))
    greedy_before = greedy_texts(model, tokenizer, first, settings.greedy_tokens)

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
    pairs = list(zip(greedy_before, greedy_texts(merged, tokenizer, first, settings.greedy_tokens), strict=True))
    return {
        "dtype": str(merged.dtype).removeprefix("torch."),
        "positions": int(count),
        "max_logit_difference": largest,
        "mean_logit_difference": total / values,
        "top1_agreement": agreed / count,
        "greedy_equal": sum(one == other for one, other in pairs),
        "greedy_compared": len(pairs),
        "greedy_different": [[one, other] for one, other in pairs if one != other],
    }


def main(settings: Settings) -> None:
    from common.jsonl import read_jsonl, write_json
    from common.models import load_tokenizer, read_adapter_config
    from common.runs import begin_run

    config = read_adapter_config(str(settings.adapter))
    base = resolve_model(settings.model or config["base_model_name_or_path"], settings.task)
    inputs = {"model": base, "adapter": settings.adapter, "probe_file": settings.probe_file}
    with begin_run(
        settings.output_dir, settings, inputs, settings.overwrite, "22_merge_adapter", resumable=False
    ) as run:
        rows = read_jsonl(settings.probe_file)[: settings.probe_rows]
        tokenizer = load_tokenizer(str(settings.adapter))
        classifies = config.get("task_type") == "SEQ_CLS"
        report = {"base": run.record["inputs"]["model"], "adapter": run.record["inputs"]["adapter"], "rows": len(rows)}
        report |= (merge_classifier if classifies else merge_causal)(settings, base, tokenizer, rows)
        largest, mean, dtype = report["max_logit_difference"], report["mean_logit_difference"], report["dtype"]
        allowed = (settings.max_difference or TOLERANCES[dtype][0], settings.mean_difference or TOLERANCES[dtype][1])
        report["allowed"] = {"max": allowed[0], "mean": allowed[1], "top1": TOP1_AGREEMENT[dtype]}
        close = largest <= allowed[0] and mean <= allowed[1]
        report["passed"] = close and report["top1_agreement"] >= TOP1_AGREEMENT[dtype]
        write_json(settings.output_dir / "merge_report.json", report)
        print(f"largest logit difference {largest:.2e} (allowed {allowed[0]:.0e})")
        print(f"mean logit difference {mean:.2e} (allowed {allowed[1]:.0e})")
        if classifies:
            print(f"highest label the same for {report['top1_agreement']:.2%} of {report['texts']} texts")
        else:
            greedy = f"{report['greedy_equal']} of {report['greedy_compared']}"
            print(
                f"top-1 agreement {report['top1_agreement']:.4%} of {report['positions']} positions; greedy texts equal {greedy}"
            )
        for name in ("max_logit_difference", "mean_logit_difference", "top1_agreement", "greedy_equal", "passed"):
            if name in report:
                run.figure(name, report[name])
        if not report["passed"]:
            run.fail("merged model differs from the adapter's")
            print("the merged model is NOT the adapter's model: see merge_report.json", file=sys.stderr)
            raise SystemExit(1)
        merged = show_path(settings.output_dir)
        classify = f"python scripts/32_evaluate_reward.py --task {settings.task} --model {merged}"
        run.finish(classify if classifies else f"python scripts/60_generate.py --task {settings.task} --model {merged}")


if __name__ == "__main__":
    main(read_settings(Settings))
