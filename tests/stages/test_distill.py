"""Stage 42: the student comes nearer to its teacher, on given texts and on its own; a teacher that cannot be is
refused."""

import json
import random
import shutil

import pytest
import torch

from common.settings import UserError
from conftest import ROOT, moved_base
from test_sft_ways import stage

BASE = ROOT / "data" / "tiny_qwen3"
POEMS = ("白日依山尽，黄河入海流。", "床前明月光，疑是地上霜。", "春眠不觉晓，处处闻啼鸟。", "红豆生南国，春来发几枝。")
FEW = {"batch_size": 8, "accumulation": 1, "max_steps": 12, "eval_steps": 6, "probe_count": 2, "probe_tokens": 8}
FEW |= {"dtype": "float32", "report_to": "none", "max_length": 96, "max_new_tokens": 16, "lora_r": 8, "lora_alpha": 16}


def rows(count: int, kind: str) -> list[dict]:
    asked = [[{"role": "user", "content": f"写一首{kind}，第{number}首"}] for number in range(count)]
    answers = [[{"role": "assistant", "content": POEMS[number % 4]}] for number in range(count)]
    return [{"prompt": one, "completion": other, "meta": {}} for one, other in zip(asked, answers, strict=True)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return moved_base(tmp_path_factory.mktemp("models") / "teacher")


def distill(folder, teacher, **more) -> dict:
    files = {}
    for name, part in (("train_file", rows(24, "诗")), ("val_file", rows(8, "绝句"))):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
    module = stage("42_distill")
    given = {"model": str(BASE), "teacher": str(teacher), "output_dir": folder / "out"} | files | FEW | more
    module.main(module.Settings(**given))
    return json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "more, left",  # of the divergence; in 12 steps the student's own few tokens teach less than given answers
    [
        ({"own_share": 0.0}, 0.75),
        ({"own_share": 1.0, "mix": 1.0, "max_new_tokens": 24, "lr": 3e-3, "max_steps": 24}, 0.97),
    ],
)
def test_the_student_comes_nearer_to_its_teacher(more, left, teacher, tmp_path, capsys):
    record = distill(tmp_path, teacher, **more)
    log = json.loads((tmp_path / "out" / "log_history.json").read_text(encoding="utf-8"))
    divergence = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert divergence[0] > 0.1 and record["figures"]["eval_loss"] < left * divergence[0]
    assert record["inputs"]["teacher"]["sha256"] != record["inputs"]["model"]["sha256"]
    said = capsys.readouterr().out
    assert "NLL per character of the answers: teacher " in said
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() and "22_merge_adapter.py" in said


def test_the_loss_is_that_of_the_formula_on_the_answers(teacher, tmp_path):
    """KL(teacher || student) a token, over the answers and their eos (arXiv 2306.13649, equation 1)."""
    from common.models import load_model, load_tokenizer

    distill(tmp_path, teacher, own_share=0.0, max_steps=1, eval_steps=1)
    log = json.loads((tmp_path / "out" / "log_history.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(str(BASE))
    models = [load_model(str(folder), tokenizer, "float32").eval() for folder in (teacher, BASE)]
    found = []
    for row in rows(8, "绝句"):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        texts = prompt, row["completion"][0]["content"] + tokenizer.eos_token
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        with torch.no_grad():
            logps = [model(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1) for model in models]
        wanted, own = (values[len(ids[0]) - 1 : -1] for values in logps)
        found.append((wanted.exp() * (wanted - own)).sum(-1).mean())
    assert log[0]["eval_loss"] == pytest.approx(torch.stack(found).mean().item(), rel=2e-3)


def test_the_share_says_how_many_steps_are_on_the_students_own_texts(teacher, tmp_path, monkeypatch):
    from common.training import trl_cpu

    lengths, plain = [], trl_cpu.LeanDistillationTrainer._generate_single_turn

    def watch(self, *args, **kwargs):
        answers = plain(self, *args, **kwargs)
        if self.model.training:
            lengths.append(answers == self.given)
        return answers

    monkeypatch.setattr(trl_cpu.LeanDistillationTrainer, "_generate_single_turn", watch)
    distill(tmp_path, teacher, own_share=0.5)
    drawn = [random.Random(42 * 1_000_003 + step).random() >= 0.5 for step in range(12)]
    assert lengths == drawn and 0 < sum(lengths) < 12


def copy_of_base(folder, name: str, change) -> str:
    shutil.copytree(BASE, folder / name)
    change(folder / name)
    return str(folder / name)


def other_words(folder) -> None:
    """A token under another name."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["□□"] = vocabulary.pop("月")
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def larger_head(folder) -> None:
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if len(value) == config["vocab_size"]:
            weights[name] = torch.cat([value, value[:64]])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config["vocab_size"] += 64
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def classifier(folder) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    "change, message",
    [
        (other_words, "another tokenizer than the student's"),
        (larger_head, "its head has .* words, the student's"),
        (classifier, "is a classifier or a reward model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors inside"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused_before_the_run(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        distill(tmp_path, copy_of_base(tmp_path, "other", change))
    assert not (tmp_path / "out").exists()


def test_room_for_an_answer_is_needed(teacher, tmp_path):
    with pytest.raises(UserError, match="--max-length and --max-new-tokens: .*the model reads 2048"):
        distill(tmp_path, teacher, max_new_tokens=2000)
    assert not (tmp_path / "out").exists()
