"""Stage 41: good and bad answers move apart, the weights come from the counts, and what cannot be is refused."""

import json
import random

import pytest

from common.settings import UserError
from conftest import ROOT
from test_sft_ways import stage

POEMS = ("白日依山尽，黄河入海流。", "床前明月光，疑是地上霜。", "春眠不觉晓，处处闻啼鸟。", "红豆生南国，春来发几枝。")


def labelled(count: int, bad_every: int = 3, kind: str = "诗") -> list[dict]:
    draw, rows = random.Random(0), []
    for number in range(count):
        text, good = POEMS[number % 4], bool(number % bad_every)
        text = text if good else "".join(draw.sample(text, len(text)))
        ask = [{"role": "user", "content": f"写一首{kind}，第{number}首"}]
        rows.append({"prompt": ask, "completion": [{"role": "assistant", "content": text}], "label": good, "meta": {}})
    return rows


def train(folder, rows: list[dict], val: list[dict], **more) -> dict:
    files = {}
    for name, part in (("train_file", rows), ("val_file", val)):
        files[name] = folder / f"kto_{name}.jsonl"
        files[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
    few = {"max_steps": 12, "batch_size": 8, "accumulation": 1, "eval_steps": 6, "probe_count": 2, "probe_tokens": 8}
    words = {"model": str(ROOT / "data" / "tiny_qwen3"), "dtype": "float32", "report_to": "none", "max_length": 96}
    module = stage("41_train_kto")
    module.main(module.Settings(output_dir=folder / "out", **files | few | words | more))
    return json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))


def test_good_answers_become_likelier_and_bad_ones_less(tmp_path, capsys):
    record = train(tmp_path, labelled(48), labelled(12, kind="绝句"))
    figures, said = record["figures"], capsys.readouterr().out
    assert figures["good_logps_change"] > 0 > figures["bad_logps_change"] and figures["margin"] > 0
    assert figures["desirable_weight"] == 1.0 and figures["undesirable_weight"] == 2.0
    assert "32 good answers of weight 1, 16 bad ones of weight 2" in said
    assert "22_merge_adapter.py" in said and (tmp_path / "out" / "adapter_model.safetensors").exists()
    log = json.loads((tmp_path / "out" / "log_history.json").read_text(encoding="utf-8"))
    assert any("eval_logps/chosen" in entry and "eval_logps/rejected" in entry for entry in log)


@pytest.mark.parametrize("good", [True, False])
def test_validation_answers_of_one_kind_end_no_run(good, tmp_path, capsys):
    val = [row for row in labelled(12, kind="绝句") if row["label"] == good]
    figures = train(tmp_path, labelled(24), val, max_steps=3, eval_steps=3)["figures"]
    assert ("good_logps_change" in figures) == good and ("bad_logps_change" in figures) != good
    assert (
        "margin" not in figures
        and f"all validation answers are {'good' if good else 'bad'} ones" in capsys.readouterr().out
    )


def test_the_weights_can_be_named():
    module = stage("41_train_kto")
    settings = module.Settings(desirable_weight=1.3, undesirable_weight=0.5)
    assert module.class_weights(settings, labelled(12)) == (1.3, 0.5)
    assert module.class_weights(module.Settings(), labelled(12, bad_every=2)) == (1.0, 1.0)


@pytest.mark.parametrize(
    "rows, more, message",
    [
        ([row for row in labelled(12) if row["label"]], {}, "0 bad|only"),
        (labelled(12), {"lora_targets": ("q_prj",)}, "has no layer q_prj; fix: q_proj"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(rows, more, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path, rows, labelled(12, kind="绝句"), **more)
    assert not (tmp_path / "out").exists()
