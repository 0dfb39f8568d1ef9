"""Training without validation rows, and with rows that are longer than max_length: stages 20, 21, 30 and 40."""

import json

import pytest

from common.settings import UserError
from conftest import ROOT, moved_base
from test_sft_ways import stage

LONG = "春" * 300
FEW = {
    "max_steps": 2,
    "batch_size": 4,
    "accumulation": 1,
    "max_length": 128,
    "lora_r": 4,
    "eval_rows": 4,
    "eval_steps": 2,
    "dtype": "float32",
}
PROBED = {"probe_count": 2, "probe_tokens": 8}
STAGES = {
    "20_train_sft": {"report_to": "none", **PROBED},
    "21_train_sft_plain": PROBED,
    "30_train_reward": {"report_to": "none"},
    "42_distill": {"report_to": "none", **PROBED},
    "40_train_dpo": {"report_to": "none", **PROBED},
}


def reads_sft(name: str) -> bool:
    return "sft" in name or "distill" in name


def rows(name: str) -> list[dict]:
    """Ten short rows for the stage, then one whose answer is too long, and a conversation that is too long as a
    whole."""
    found = []
    for number, (ask, answer) in enumerate([*((f"第{i}问", f"答{i}。") for i in range(10)), ("长问", LONG)]):
        prompt = [{"role": "user", "content": ask}]
        right = [{"role": "assistant", "content": answer}]
        row = {"prompt": prompt, "completion": right} if reads_sft(name) else {"prompt": prompt, "chosen": right}
        if not reads_sft(name):
            row["rejected"] = [{"role": "assistant", "content": f"错{number}错"}]
        found.append(row | {"meta": {}})
    if reads_sft(name):
        turns = [("user", "甲"), ("assistant", "短。"), ("user", "乙"), ("assistant", LONG)]
        turns = [{"role": role, "content": content} for role, content in turns]
        found.append({"prompt": turns[:3], "completion": turns[3:], "meta": {}})
    return found


def train(name: str, folder, count: int, **more) -> dict:
    if name == "42_distill" and not (folder / "teacher").exists():
        moved_base(folder / "teacher")
    file = folder / "train.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(name)[:count])
    file.write_text("".join(lines), encoding="utf-8")
    module = stage(name)
    known = {key for key in module.Settings.__dataclass_fields__}
    given = FEW | STAGES[name] | {"teacher": str(folder / "teacher")}
    words = {key: value for key, value in given.items() if key in known} | more
    base = str(ROOT / "data" / "tiny_qwen3")
    module.main(module.Settings(model=base, train_file=file, val_file=None, output_dir=folder / "out", **words))
    return json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", STAGES)
def test_no_validation_rows_are_needed(name, tmp_path, capsys):
    record = train(name, tmp_path, 10)
    assert record["status"] == "done" and record["figures"]["steps"] == 2
    assert not any(key in record["figures"] for key in ("eval_loss", "val_nll"))
    assert "val_file" not in record["inputs"]
    assert capsys.readouterr().out.count("notice: no validation rows") == 1
    weights = "model.safetensors" if name == "30_train_reward" else "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).exists()


@pytest.mark.parametrize("name", STAGES)
def test_long_rows_are_refused_dropped_or_cut(name, tmp_path, capsys):
    count = len(rows(name))
    with pytest.raises(UserError, match=r"train\.jsonl:11: .*too-long|too-long"):
        train(name, tmp_path, count)
    assert not (tmp_path / "out" / "run.json").exists()
    capsys.readouterr()
    record = train(name, tmp_path, count, long_rows="cut")
    done = record["figures"]["long_rows"]["train"]
    is_chat = reads_sft(name)  # the conversation ends at its first answer; an answer is never cut
    assert (done["long"], done["cut"], done["dropped"]) == ((2, 1, 1) if is_chat else (1, 0, 1))
    assert "--max-length" in capsys.readouterr().out


def test_a_file_of_long_rows_only_leaves_nothing_to_train(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(rows("sft")[10], ensure_ascii=False) + "\n", encoding="utf-8")
    module = stage("20_train_sft")
    settings = module.Settings(
        model=str(ROOT / "data" / "tiny_qwen3"),
        train_file=file,
        val_file=None,
        long_rows="drop",
        output_dir=tmp_path / "out",
        max_length=128,
    )
    with pytest.raises(UserError, match="no row fits"):
        module.main(settings)
