"""The preview colours exactly the tokens that trl's trainers train, and shows any text as text."""

import json
from pathlib import Path

import pytest
import trl

from common.models import chat_dataset, load_model, load_tokenizer, marks_answers
from common.preflight.mask_preview import dpo_sequences, reward_sequences, sft_sequence
from common.training.loss_masks import row_dataset
from conftest import ROOT
from test_check_data import ASK, POEMS, assistant, pair, sft, user, write

MODEL = ROOT / "data" / "tiny_qwen3"
TURNS = [{"role": "system", "content": "你是诗人𠀀"}, user("写一首五绝"), assistant(POEMS[3]), user("再写一首")]
SFT = [sft(), sft(POEMS[1], prompt=TURNS), sft(POEMS[2] * 4)]
PAIRS = [pair(), pair(POEMS[2], POEMS[1] + POEMS[4], ask="写诗")]
# the embedded template, and one without marks that treats thinking in a way of its own (trl has a marked copy of it)
QWEN3 = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"


@pytest.fixture(params=["embedded", "qwen3"])
def tokenizer(request):
    tokenizer = load_tokenizer(str(MODEL))
    if request.param == "qwen3":
        tokenizer.chat_template = QWEN3.read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture
def settings(tmp_path):
    return {"output_dir": str(tmp_path), "max_length": 120, "use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize("style", ["prompt", "text", "template", "messages"])
def test_sft_rows_are_shown_as_trl_trains_them(tokenizer, settings, style):
    marked = style in ("prompt", "messages") and marks_answers(tokenizer)
    config = trl.SFTConfig(completion_only_loss=True, assistant_only_loss=marked, **settings)
    if style in ("template", "messages"):
        config.completion_only_loss = None
    rows = row_dataset(SFT, style, tokenizer, enable_thinking=False)
    if style == "messages":  # trl's own way to the same labels
        talks = [{"messages": row["prompt"] + row["completion"]} for row in SFT]
        rows = chat_dataset(talks, ("messages",), enable_thinking=False)
    trainer = trl.SFTTrainer(load_model(str(MODEL), tokenizer), config, train_dataset=rows, processing_class=tokenizer)

    assert len(trainer.train_dataset) == len(SFT)
    for row, trained in zip(SFT, trainer.train_dataset, strict=True):
        shown = sft_sequence(row, tokenizer, 120, style)
        kept = [kind for kind in shown.kinds if kind != "cut"]
        assert trained["input_ids"] == shown.ids[: len(kept)]
        assert [label != -100 for label in trained["labels"]] == [kind == "trained" for kind in kept]
    assert "cut" in shown.kinds, "the last row is longer than max_length"


def test_pairs_are_shown_as_trl_trains_them(tokenizer, settings):
    rows = chat_dataset(PAIRS, ("prompt", "chosen", "rejected"), enable_thinking=False)
    config = trl.DPOConfig(**settings)
    model = load_model(str(MODEL), tokenizer)
    trainer = trl.DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)

    for row, trained in zip(PAIRS, trainer.train_dataset, strict=True):
        for shown, kind in zip(dpo_sequences(row, tokenizer, 1000), ("trained", "lowered"), strict=True):
            assert shown.ids == trained["prompt_ids"] + trained[f"{shown.name}_ids"]
            assert shown.kinds == ["context"] * len(trained["prompt_ids"]) + [kind] * len(trained[f"{shown.name}_ids"])


def test_reward_rows_are_shown_as_trl_reads_them(tokenizer, settings):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(MODEL), num_labels=1, dtype="float32")
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = chat_dataset(PAIRS, ("prompt", "chosen", "rejected"), enable_thinking=False)
    config = trl.RewardConfig(**settings | {"max_length": 85})
    trainer = trl.RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer)

    shown = [reward_sequences(row, tokenizer, 85) for row in PAIRS]
    whole = [both for both in shown if all("cut" not in sequence.kinds for sequence in both)]
    assert len(whole) == len(trainer.train_dataset) > 0
    for both, trained in zip(whole, trainer.train_dataset, strict=True):
        for sequence in both:
            assert sequence.ids == trained[f"{sequence.name}_ids"]
            assert sequence.kinds == ["context"] * (len(sequence.ids) - 1) + ["score"]


def test_the_page_shows_every_kind_of_row_beside_the_checked_one(run_stage, tmp_path):
    train = write(tmp_path / "sft_train.jsonl", [sft(text) for text in POEMS[:6]])
    write(tmp_path / "pref_train.jsonl", PAIRS)
    page = tmp_path / "page.html"
    options = (
        "--train-file",
        train,
        "--val-file",
        "None",
        "--preview",
        page,
        "--preview-rows",
        3,
        "--report",
        "r.json",
    )

    done = run_stage("19_check_data.py", *options)

    assert f"preview: {page}" in done.stdout
    html = page.read_text(encoding="utf-8")
    for title in (f"SFT: {train}", f"DPO: {tmp_path / 'pref_train.jsonl'}", "reward model: "):
        assert f"<h2>{title}" in html
    assert html.count("<h3>line") == 3 + 2 * 2 * 2  # three rows; two pairs, both sides, as DPO and as reward rows
    assert "25 trained, eos among them" in html
    assert 'class="trained special" title="token 2">&lt;|im_end|&gt;</span>' in html
    assert 'class="context special" title="token 1">&lt;|im_start|&gt;</span>' in html
    assert 'class="lowered" title' in html and 'class="score" title' in html
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["counts"]["error"] == 0


@pytest.mark.parametrize("schema, row", [("prompts", {"prompt": [user()], "meta": {}}), ("style", None)])
def test_rows_without_an_answer_are_shown_too(run_stage, tmp_path, schema, row):
    rows = [row or {"input": ASK, "label": "诚实", "label_english": "honesty"}]
    train = write(tmp_path / "mine.jsonl", rows)
    run_stage("19_check_data.py", "--train-file", train, "--val-file", "None", "--preview", "p.html", check=False)
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert html.count("<h3>line 1") == 1 and 'class="trained" title' not in html
    assert ('class="score" title' in html) == (schema == "style")


def test_a_row_that_fills_max_length_shows_what_is_lost(run_stage, tmp_path):
    train = write(tmp_path / "mine.jsonl", [sft("".join(POEMS))])
    options = ("--train-file", train, "--val-file", "None", "--preview", "p.html", "--max-length", 60)
    assert run_stage("19_check_data.py", *options, check=False).returncode == 1
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "eos NOT among them" in html and 'class="cut special" title="token 2"' in html


def test_only_a_preview_is_replaced(run_stage, tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>", encoding="utf-8")
    done = run_stage("19_check_data.py", "--preview", mine, check=False)
    assert done.returncode == 2 and "mine.html is not a preview of this stage" in done.stderr
    assert mine.read_text(encoding="utf-8") == "<p>mine</p>"
