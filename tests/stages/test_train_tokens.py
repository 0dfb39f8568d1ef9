"""Rows of the embeddings beside an adapter are trained, read back by a resumed run, merged and used."""

import json

import torch
from safetensors.torch import load_file

from conftest import ROOT
from test_sft_ways import stage
from test_without_validation import train

TURNS = ("<|im_start|>", "<|im_end|>")


def test_trained_rows_reach_the_adapter_a_resumed_run_and_the_merged_model(tmp_path):
    record = train("20_train_sft", tmp_path, 10, train_tokens=TURNS, lr=5e-3)
    out, rows = tmp_path / "out", "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = load_file(out / "adapter_model.safetensors")
    base = load_file(ROOT / "data" / "tiny_qwen3" / "model.safetensors")["model.embed_tokens.weight"].float()
    assert adapter[rows].shape == (2, base.size(1))
    assert ((adapter[rows] - base[[1, 2]]).abs().amax(1) > 1e-3).all(), "both rows have moved"

    (out / "run.json").write_text(json.dumps(record | {"status": "running"}), encoding="utf-8")
    (out / "adapter_model.safetensors").unlink()
    train("20_train_sft", tmp_path, 10, train_tokens=TURNS, lr=5e-3)
    resumed = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in adapter.items())

    merge = stage("22_merge_adapter")
    files = {"adapter": out, "probe_file": tmp_path / "train.jsonl", "output_dir": tmp_path / "merged"}
    merge.main(merge.Settings(task="chat", probe_rows=4, greedy_rows=2, greedy_tokens=8, dtype="float32", **files))
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text(encoding="utf-8"))
    assert report["passed"] and report["weights"]["wrong"] == 0 and report["greedy_equal"] == 2
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["model.embed_tokens.weight"][[1, 2]], adapter[rows])
    assert torch.equal(merged["model.embed_tokens.weight"][3:], base[3:]) and "lm_head.weight" not in merged
