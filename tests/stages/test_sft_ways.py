"""Four ways to SFT train the same tokens: seen on the batches that the real stages hand to the model."""

import importlib.util
import json
import shutil
import sys

import pytest

from conftest import ROOT, SCRIPTS

ANSWERS = [
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
    "好的👌。",
    "1. 先洗手\n2. 再吃饭\n",
    "春眠不觉晓。" * 12,
]


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def row(answer: str, question: str = "写一首[五言绝句]", history: tuple = ()) -> dict:
    return {"prompt": [*history, turn("user", question)], "completion": [turn("assistant", answer)], "meta": {}}


SINGLE = [row(answer, f"问题{number}") for number, answer in enumerate(ANSWERS)]
SINGLE.append(row("我是小原。", "你是谁？", (turn("system", "你是写作助手。"),)))
TALK = [row("那也好。", "明天呢？", (turn("user", "去公园吗？"), turn("assistant", "今天下雨。")))] * 2


def stage(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def batches(tmp_path, monkeypatch):
    """batches("20_train_sft", rows, row_style="text"): what the stage hands to its model, a list of dicts of tensors;
    no step is taken."""
    import torch
    import transformers

    from common.settings import UserError

    def run(name: str, rows: list[dict], **settings) -> list[dict]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        held_out = tmp_path / "val.jsonl"
        held_out.write_text(json.dumps(row("白日依山尽。", "写一句诗"), ensure_ascii=False) + "\n", encoding="utf-8")
        seen = []

        def record(self, model, inputs, num_items_in_batch=None):
            seen.append({key: value.clone() for key, value in inputs.items() if hasattr(value, "clone")})
            return torch.tensor(0.0)

        monkeypatch.setattr(transformers.Trainer, "training_step", record)
        module = stage(name)
        common = {
            "train_file": file,
            "val_file": held_out,
            "output_dir": tmp_path / name,
            "overwrite": True,
            "lora_r": 2,
            "model": str(ROOT / "data/tiny_qwen3"),
            "batch_size": 3,
            "accumulation": 1,
            "eval_rows": 1,
            "eval_steps": max(1, len(rows) // 3),
            "probe_tokens": 2,
            "dtype": "float32",
        }
        more = {"report_to": "none", "probe_count": 0, "patience": 0} if name.startswith("20") else {"probe_count": 1}
        with pytest.raises(UserError, match="nothing was learned"):
            module.main(module.Settings(**(common | more | settings)))
        return seen

    return run


def trained(batches: list[dict]) -> list[tuple]:
    """One (token ids up to the last trained one, labels of them) a row, sorted."""
    rows = []
    for batch in batches:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            end = max(place for place, label in enumerate(labels) if label != -100) + 1
            rows.append((tuple(ids[:end]), tuple(labels[:end])))
    return sorted(rows)


@pytest.fixture(scope="module")
def tokenizer():
    from common.models import load_tokenizer

    return load_tokenizer(str(ROOT / "data/tiny_qwen3"))


def trained_text(rows: list[tuple], tokenizer) -> list[str]:
    return [tokenizer.decode([label for label in labels if label != -100]) for _, labels in rows]


WAYS = {
    "as the file has it": ("20_train_sft", {}),
    "text": ("20_train_sft", {"row_style": "text"}),
    "template": ("20_train_sft", {"row_style": "template"}),
    "messages": ("20_train_sft", {"row_style": "messages"}),
    "plain": ("21_train_sft_plain", {}),
}


def test_all_ways_train_the_same_tokens_on_single_turns(batches, tokenizer):
    seen = {name: trained(batches(script, SINGLE, **settings)) for name, (script, settings) in WAYS.items()}
    first = seen["as the file has it"]
    assert sorted(trained_text(first, tokenizer)) == sorted(
        r["completion"][0]["content"] + "<|im_end|>" for r in SINGLE
    )
    for name, rows in seen.items():
        assert rows == first, name


@pytest.mark.parametrize("way", WAYS)
def test_of_a_conversation_messages_trains_every_answer_and_the_others_the_last(way, batches, tokenizer):
    script, settings = WAYS[way]
    answers = "今天下雨。<|im_end|>那也好。<|im_end|>" if way == "messages" else "那也好。<|im_end|>"
    assert trained_text(trained(batches(script, TALK, **settings)), tokenizer) == [answers] * 2


@pytest.mark.parametrize("way", WAYS)
def test_a_long_row_loses_its_end_in_every_way(way, batches):
    script, settings = WAYS[way]
    # one row of many is cut: the preflight stops a run only where more than 1 % lose their eos
    rows = trained(
        batches(script, [row("春眠不觉晓。" * 12)] + [row(f"好{n}") for n in range(110)], max_length=40, **settings)
    )
    assert max(len(ids) for ids, _ in rows) == 40 and len(rows) == 111


def test_packed_rows_train_the_same_tokens_and_do_not_see_each_other(batches, tokenizer):
    import torch

    from common.models import load_model

    single = trained(batches("20_train_sft", SINGLE))
    packed = batches("20_train_sft", SINGLE, packing=True, max_length=256, batch_size=1)
    assert len(packed) < len(SINGLE), "rows share a sequence"
    model = load_model(str(ROOT / "data/tiny_qwen3"), tokenizer, "float32").eval()
    rows = []
    for batch in packed:
        ids, labels, positions = (batch[key][0].tolist() for key in ("input_ids", "labels", "position_ids"))
        starts = [place for place, position in enumerate(positions) if position == 0]
        with torch.no_grad():
            together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[
                0
            ]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            last = max(place for place in range(start, end) if labels[place] != -100) + 1
            rows.append((tuple(ids[start:last]), tuple(labels[start:last])))
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([ids[start:end]]), use_cache=False).logits[0]
            assert torch.allclose(together[start:end], alone, atol=1e-3)
    assert sorted(rows) == single


def qwen(tokenizer, name: str):
    """The embedded tokenizer with one of Qwen's templates, as trl carries them."""
    import copy
    from pathlib import Path

    import trl

    changed = copy.deepcopy(tokenizer)
    folder = Path(trl.__file__).parent / "chat_templates"
    changed.chat_template = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    return changed


THINK = "<think>\n\n</think>\n\n"
# what each way trains of the question 今天下雨吗 and the answer 下雨。 under Qwen's own templates (docs/TRAINING.md)
QWEN = {
    ("qwen2_5", False): {
        "prompt": "下雨。<|im_end|>\n",
        "messages": "\n下雨。<|im_end|>\n",
        "text": "下雨。<|im_end|>",
    },
    ("qwen3_instruct_2507", False): {
        "prompt": "下雨。<|im_end|>\n",
        "messages": "下雨。<|im_end|>\n",
        "text": "下雨。<|im_end|>",
    },
    ("qwen3", False): {
        "prompt": "下雨。<|im_end|>\n",
        "messages": THINK + "下雨。<|im_end|>\n",
        "text": "下雨。<|im_end|>",
    },
    ("qwen3", True): {
        "prompt": THINK + "下雨。<|im_end|>\n",
        "messages": THINK + "下雨。<|im_end|>\n",
        "text": "下雨。<|im_end|>",
        "template": THINK + "下雨。<|im_end|>",
    },
}


@pytest.mark.parametrize(("template", "thinking"), QWEN)
def test_what_differs_under_qwens_own_templates(template, thinking, tokenizer, batches, tmp_path):
    model = shutil.copytree(ROOT / "data/tiny_qwen3", tmp_path / template)
    (model / "chat_template.jinja").write_text(qwen(tokenizer, template).chat_template, encoding="utf-8")
    expected = {"template": QWEN[template, thinking]["text"], "plain": QWEN[template, thinking]["text"]}
    expected |= QWEN[template, thinking]
    for way, text in expected.items():
        script = "21_train_sft_plain" if way == "plain" else "20_train_sft"
        settings = {} if way == "plain" else {"row_style": way}
        seen = batches(
            script, [row("下雨。", "今天下雨吗")] * 2, enable_thinking=thinking, model=str(model), **settings
        )
        assert trained_text(trained(seen), tokenizer) == [text] * 2, way


def test_messages_needs_no_template_that_marks_its_answers(tokenizer, batches, tmp_path):
    model = shutil.copytree(ROOT / "data/tiny_qwen3", tmp_path / "unmarked")
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    template = template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    seen = [batches("20_train_sft", TALK, row_style="messages", **more) for more in ({}, {"model": str(model)})]
    marked, unmarked = (trained_text(trained(found), tokenizer) for found in seen)
    assert marked == unmarked and "今天下雨。" in marked[0] and "那也好。" in marked[0]


def test_padding_is_known_by_its_place_so_even_pad_as_eos_hides_no_eos(tokenizer):
    """The usual collator hides every label that is the pad token (benchmarks/pad_eos_trap.py shows what comes of
    it)."""
    import copy

    from transformers import DataCollatorForLanguageModeling

    plain = stage("21_train_sft_plain")
    examples = [plain.encode(r, tokenizer, 512, False) for r in SINGLE]
    ours = plain.collate(examples, pad_token_id=tokenizer.eos_token_id)["labels"]
    assert (ours == tokenizer.eos_token_id).sum(1).tolist() == [1] * len(SINGLE)

    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    usual = DataCollatorForLanguageModeling(same, mlm=False)([{"input_ids": e["input_ids"]} for e in examples])[
        "labels"
    ]
    assert (usual == tokenizer.eos_token_id).sum() == 0
