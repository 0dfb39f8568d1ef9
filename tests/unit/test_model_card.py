"""README.md of a model folder: the hub reads its head, a reader its figures, and nothing in it depends on the clock."""

import json
import shutil

from common.model_card import model_card
from conftest import ROOT

RECORD = {
    "stage": "20_train_sft",
    "settings": {"task": "poems", "model": "Qwen/Qwen3-0.6B", "lr": 1e-3, "adapter": ""},
    "inputs": {
        "model": {"hub_id": "Qwen/Qwen3-0.6B"},
        "train_file": {"path": "processed_data/poems/sft_train.jsonl", "sha256": "b24e755162902a6f22", "rows": 13000},
    },
    "figures": {"val_nll": 4.0256, "samples": ["<script>春眠</script>\n不觉晓|*a*"], "history": [1, 2]},
    "wall_seconds": 495.7,
}


def test_an_adapter_names_its_base_its_data_and_its_figures(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM"}), encoding="utf-8")
    card = model_card(RECORD, tmp_path)
    head = card.split("---")[1]
    assert 'base_model: "Qwen/Qwen3-0.6B"' in head and 'library_name: "peft"' in head and 'language: ["zh"]' in head
    assert "| val_nll | 4.026 |" in card and "| train_file | processed\\_data/poems/sft\\_train.jsonl | 13000 |" in card
    assert (
        'AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")' in card and "PeftModel.from_pretrained(model" in card
    )
    assert "&lt;script&gt;春眠" in card and "<script" not in card and "| adapter |" not in card
    assert card == model_card(RECORD | {"wall_seconds": 1.0, "device": "cuda"}, tmp_path)


def test_the_code_of_a_card_runs_in_the_repos_root():
    """An embedded base has no hub id: its path is what loads it, beside the path of the adapter."""
    record = RECORD | {"inputs": {"model": {"path": "data/tiny_qwen3"}}}
    folder = ROOT / "checkpoints" / "_card"
    folder.mkdir(parents=True)
    try:
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
        card = model_card(record, folder)
        assert 'from_pretrained("data/tiny_qwen3")' in card and '(model, "checkpoints/_card")' in card
        elsewhere = {"model": {"path": "/home/me/bases/mine"}}
        assert "/home" not in model_card(record | {"inputs": elsewhere}, folder).split("## Inputs")[0]
    finally:
        shutil.rmtree(folder)


def test_a_classifier_is_loaded_as_one_and_a_folder_without_a_model_has_no_card(tmp_path):
    assert model_card(RECORD, tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForSequenceClassification"]}))
    assert model_card(RECORD, tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"")
    card = model_card(RECORD, tmp_path)
    assert f'AutoModelForSequenceClassification.from_pretrained("{tmp_path.name}")' in card and "peft" not in card
