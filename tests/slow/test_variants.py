"""Every stage with the settings of adapters and memory that few of its runs use: two steps each on the embedded base,
and what is saved loads, merges and writes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from common.jsonl import read_json, read_jsonl, write_jsonl
from common.settings import UserError, read_settings
from conftest import ROOT, SCRIPTS, moved_base

BASE = ROOT / "data" / "tiny_qwen3"
POEMS = ["床前明月光，疑是地上霜。", "白日依山尽，黄河入海流。", "千山鸟飞绝，万径人踪灭。", "空山新雨后，天气晚来秋。"]
QUICK = {
    "model": BASE,
    "dtype": "float32",
    "max-steps": 2,
    "eval-steps": 2,
    "batch-size": 4,
    "report-to": "none",
    "lr": 0.001,
    "lora-r": 4,
    "lora-alpha": 8,
}
CHAT = {"accumulation": 1, "probe-count": 1, "probe-tokens": 4}
RL = {"rewards": "fluency", "max-new-tokens": 8, "probe-count": 2}
STAGES = {
    "20_train_sft": {"train-file": "sft", "val-file": "None", **CHAT},
    "21_train_sft_plain": {"train-file": "sft", "val-file": "None", **CHAT},
    "30_train_reward": {"train-file": "pref", "val-file": "None", "accumulation": 1},
    "31_train_style_classifier": {"train-file": "style", "val-file": "style_val", "epochs": 1},
    "40_train_dpo": {"train-file": "pref", "val-file": "None", **CHAT},
    "41_train_kto": {"train-file": "kto", "val-file": "None", **CHAT},
    "42_distill": {"train-file": "sft", "val-file": "None", "teacher": "{data}/teacher", "max-new-tokens": 8, **CHAT},
    "50_train_grpo": {"train-file": "prompts", "val-file": "sft", "num-generations": 4, **RL},
    "51_train_ppo": {"train-file": "prompts", "val-file": "sft", **RL},
}
FULL = {"lora-r": 0, "lora-alpha": None}
DORA, RSLORA, PISSA = ({"lora-variant": name} for name in ("dora", "rslora", "pissa"))
EMBEDDINGS, AGAIN = {"modules-to-save": "embed_tokens"}, {"gradient-checkpointing": ""}
KINDS = [
    ("20_train_sft", {"quantize": "8bit"}),
    ("20_train_sft", {"quantize": "4bit", **DORA}),
    ("20_train_sft", {"attn-implementation": "eager", "optim": "adamw_8bit", **AGAIN}),
    ("21_train_sft_plain", FULL),
    ("21_train_sft_plain", {"quantize": "4bit"}),
    ("21_train_sft_plain", {"quantize": "8bit"}),
    ("21_train_sft_plain", PISSA),
    ("21_train_sft_plain", {"lora-plus-ratio": 4, "optim": "adafactor", **AGAIN}),
    *(("30_train_reward", kind) for kind in (FULL, DORA, RSLORA, PISSA, {"quantize": "4bit"}, {"quantize": "8bit"})),
    *(("31_train_style_classifier", kind) for kind in (FULL, DORA, RSLORA, PISSA, {"quantize": "4bit"})),
    ("31_train_style_classifier", {"quantize": "8bit", "attn-implementation": "eager"}),
    ("40_train_dpo", {"quantize": "8bit"}),
    ("40_train_dpo", {"loss-types": "simpo", "beta": 2, **PISSA}),
    ("40_train_dpo", {"loss-types": "orpo", **FULL}),
    ("40_train_dpo", {"loss-types": "orpo", "quantize": "4bit", **AGAIN}),
    *(("41_train_kto", kind) for kind in (FULL, DORA, RSLORA, {"quantize": "4bit"}, {"quantize": "8bit"})),
    ("41_train_kto", EMBEDDINGS),
    *(("42_distill", kind) for kind in (FULL, DORA, PISSA, EMBEDDINGS, {"quantize": "4bit"})),
    ("42_distill", {"quantize": "8bit", **AGAIN}),
    ("50_train_grpo", FULL),
    ("50_train_grpo", {"quantize": "4bit"}),
    ("50_train_grpo", {"quantize": "8bit"}),
    ("50_train_grpo", {"attn-implementation": "eager", **DORA}),
    ("50_train_grpo", EMBEDDINGS),
    *(("51_train_ppo", kind) for kind in (DORA, RSLORA, {"quantize": "4bit"}, {"quantize": "8bit"})),
]


def stage(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, settings: dict) -> None:
    words = []
    for flag, value in settings.items():
        if value is not None:
            words += [f"--{flag}", *map(str, [] if value == "" else [value])]
    module = stage(name)
    module.main(read_settings(module.Settings, words))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, rows = tmp_path_factory.mktemp("data"), {"sft": [], "pref": [], "kto": [], "prompts": []}
    for number in range(8):
        poem = POEMS[number % 4]
        row = {"prompt": [{"role": "user", "content": f"写一句诗，第{number}首"}], "meta": {"id": str(number)}}
        right, wrong = ([{"role": "assistant", "content": text}] for text in (poem, poem[::-1]))
        rows["sft"].append({**row, "completion": right})
        rows["pref"].append({**row, "chosen": right, "rejected": wrong})
        rows["kto"].append({**row, "completion": right if number % 2 else wrong, "label": bool(number % 2)})
        rows["prompts"].append({**row, "meta": {"id": str(number), "form": "五言绝句", "themes": ["山水"]}})
    for name, lines in rows.items():
        write_jsonl(folder / f"{name}.jsonl", lines)
    labelled = json.loads((ROOT / "data" / "styles" / "training_data.json").read_text(encoding="utf-8"))
    questions = list(dict.fromkeys(row["metadata"]["question_id"] for row in labelled))
    for name, part in (("style", questions[:4]), ("style_val", questions[4:8])):
        write_jsonl(folder / f"{name}.jsonl", [row for row in labelled if row["metadata"]["question_id"] in part])
    moved_base(folder / "teacher")
    return folder


def settings_of(name: str, kind: dict, data: Path, output: Path) -> dict:
    given = QUICK | STAGES[name] | {"output-dir": output} | kind
    given = {
        flag: str(value).replace("{data}", str(data)) if flag == "teacher" else value for flag, value in given.items()
    }
    dropped = {"21": ["report-to"], "31": ["max-steps", "eval-steps", "report-to"]}.get(name[:2], [])
    given = {flag: value for flag, value in given.items() if flag not in dropped}
    is_file = {flag: flag.endswith("-file") and value != "None" for flag, value in given.items()}
    return {flag: data / f"{value}.jsonl" if is_file[flag] else value for flag, value in given.items()}


@pytest.mark.parametrize(
    ("name", "kind"), KINDS, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values()))
)
def test_two_steps_and_what_is_saved_can_be_used(name, kind, data, tmp_path):
    from common.training.classifiers import load_classifier

    output = tmp_path / "out"
    run(name, settings_of(name, kind, data, output))
    record = read_json(output / "run.json")
    assert record["status"] == "done"
    if name.startswith(("30", "31")):
        load_classifier(str(output), "float32", None)
        return
    words = {"prompts-file": data / "prompts.jsonl", "max-prompts": 2, "max-new-tokens": 4, "dtype": "float32"}
    which = {"model": output} if kind.get("lora-r") == 0 else {"model": BASE, "adapter": output}
    if bits := kind.get("quantize"):
        run("60_generate", {**words, **which, "quantize": bits, "output-file": tmp_path / "small.jsonl"})
        assert read_json(tmp_path / "small.run.json")["settings"]["quantize"] == bits
    run("60_generate", {**words, **which, "output-file": tmp_path / "whole.jsonl"})
    assert len(read_jsonl(tmp_path / "whole.jsonl", "generation")) == 2
    if "adapter" in which:
        merged = {"adapter": output, "probe-file": data / "sft.jsonl", "probe-rows": 4, "greedy-rows": 2}
        run("22_merge_adapter", {**merged, "greedy-tokens": 8, "dtype": "float32", "output-dir": tmp_path / "merged"})
        assert read_json(tmp_path / "merged" / "merge_report.json")["weights"]["wrong"] == 0
    if name == "21_train_sft_plain" and kind is FULL:
        files = {"rows-file": data / "sft.jsonl", "output-file": tmp_path / "parity.json", "max-prompts": 2}
        words = {"adapter": output, "merged": output, "server": "none", **files, "max-new-tokens": 4}
        with pytest.raises(UserError, match="nothing to merge"):
            run("23_check_parity", words)
