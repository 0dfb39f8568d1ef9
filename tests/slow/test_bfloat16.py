"""A small chain in bfloat16, which `--dtype auto` picks on recent GPUs and CPUs: on any CPU it is slow, but it must be
right."""

import json
import math
import random
from pathlib import Path

import pytest

from common.jsonl import read_json, write_jsonl
from conftest import ROOT
from vllm_models import rows


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """sft.jsonl, pref.jsonl and prompts.jsonl of few rows."""
    sft = rows(12)
    for number, row in enumerate(sft):  # no answer of validation is among those of training
        line = "".join(random.Random(number).sample("春夏秋冬山水云月花鸟风雪日江天地人心酒诗", 14))
        row["completion"][0]["content"] = f"{line[:7]}，{line[7:]}。"
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "meta": row["meta"]}
        | {"rejected": [{"role": "assistant", "content": row["completion"][0]["content"][::-1]}]}
        for row in sft
    ]
    prompts = [{"prompt": row["prompt"], "meta": row["meta"]} for row in sft]
    named = {"sft": sft, "pref": pairs, "prompts": prompts}
    for name, lines in named.items():
        for side, part in (("train", lines[:8]), ("val", lines[8:])):
            write_jsonl(tmp_path / f"{name}_{side}.jsonl", part)
    return {f"{name}_{side}": tmp_path / f"{name}_{side}.jsonl" for name in named for side in ("train", "val")}


def numbers(value) -> list[float]:
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def test_a_chain_in_bfloat16_ends_with_the_models_it_trained(run_stage, files, tmp_path):
    base = ROOT / "data/tiny_qwen3"

    def stage(script: str, output: Path, *words) -> dict:
        kept = ["--dtype", "bfloat16", "--output-file" if output.suffix else "--output-dir", output]
        run_stage(script, *kept, *words)
        record = read_json(output.with_suffix(".run.json") if output.suffix else output / "run.json")
        assert record["status"] == "done" and all(map(math.isfinite, numbers(record["figures"])))
        return record["figures"]

    def pair(name: str) -> list:
        return ["--train-file", files[f"{name}_train"], "--val-file", files[f"{name}_val"]]

    short = ["--max-steps", 2, "--batch-size", 4, "--probe-count", 2]
    sft, merged = tmp_path / "sft", tmp_path / "merged"
    words = [
        "--accumulation",
        1,
        "--eval-rows",
        2,
        "--eval-steps",
        1,
        "--report-to",
        "none",
        "--lr",
        1e-3,
        "--probe-tokens",
        8,
    ]
    stage("20_train_sft.py", sft, "--model", base, *pair("sft"), *short, *words)
    certificate = stage("22_merge_adapter.py", merged, "--adapter", sft, "--probe-file", files["sft_val"])
    assert certificate["passed"] and certificate["dtype"] == "bfloat16" and certificate["weights"]["wrong"] == 0
    few = ["--prompts-file", files["prompts_val"], "--max-new-tokens", 8, "--temperature", 0]
    for name, model in (("a", ["--model", base, "--adapter", sft]), ("m", ["--model", merged])):
        assert stage("60_generate.py", tmp_path / f"{name}.jsonl", *model, *few)["rows"] == 4
    words = ["--max-steps", 2, "--batch-size", 4, "--eval-steps", 1, "--report-to", "none"]
    assert (
        0 <= stage("30_train_reward.py", tmp_path / "reward", "--model", merged, *pair("pref"), *words)["accuracy"] <= 1
    )
    stage("40_train_dpo.py", tmp_path / "dpo", "--model", merged, *pair("pref"), *words)
    rl = ["--train-file", files["prompts_train"], "--val-file", files["sft_val"]]
    rl += ["--rewards", "no_repeat", "--watch", "form"]
    rl += ["--num-generations", 2, *short]
    stage("50_train_grpo.py", tmp_path / "grpo", "--model", merged, *rl)
    text = (tmp_path / "grpo/adapter_config.json").read_text(encoding="utf-8")
    assert json.loads(text)["base_model_name_or_path"].endswith("merged")
