"""The style classifier's data, training, merging and use, and the human sheet, through their real command lines."""

import csv
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import test_sft_ways as sft_ways
import warm
from common.settings import UserError
from conftest import ROOT, SCRIPTS
from test_chain import record_of, rows_of, stage

DATA = ROOT / "data" / "styles"
LABELS = ["售前", "售后", "诚实", "有帮助", "无伤害"]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shipped() -> list[dict]:
    return json.loads((DATA / "training_data.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("styles") / "data"
    stage("12_prepare_styles.py", "--output-dir", folder)
    return folder


@pytest.fixture(scope="session")
def few(tmp_path_factory, prepared) -> tuple[Path, Path]:
    """A training and a validation file of a few rows each, for runs that need not learn much."""
    folder = tmp_path_factory.mktemp("few")
    train, val = (rows_of(prepared / f"style_{split}.jsonl") for split in ("train", "val"))
    return write_rows(folder / "train.jsonl", train[:24]), write_rows(folder / "val.jsonl", val[:12])


def train_words(few, output: Path, *more) -> list:
    files = ["--train_file", few[0], "--validation_file", few[1], "--output_dir", output]
    return [*files, "--num_train_epochs", 1, "--learning_rate", 1e-3, "--per_device_train_batch_size", 8, *more]


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, few) -> Path:
    output = tmp_path_factory.mktemp("full") / "classifier"
    done = stage("31_train_style_classifier.py", *train_words(few, output, "--demo_inference", "--class_weights"))
    assert done.stdout.count("用户问题：") >= 5, "the demo shows five answers"
    return output


@pytest.fixture(scope="session")
def lora(tmp_path_factory, few, classifier) -> Path:
    """Trained as an adapter, and from a teacher."""
    output = tmp_path_factory.mktemp("lora") / "classifier"
    stage("31_train_style_classifier.py", *train_words(few, output, "--lora_r", 4, "--teacher", classifier))
    return output


# --- stage 12


def test_no_question_stands_in_two_splits_and_no_row_is_lost(prepared, shipped):
    from tasks.styles import question_key

    rows = {split: rows_of(prepared / f"style_{split}.jsonl") for split in ("train", "val", "test")}
    questions = {split: {question_key(row["input"]) for row in rows[split]} for split in rows}
    assert not questions["train"] & (questions["val"] | questions["test"]) and not questions["val"] & questions["test"]
    assert sorted(row["input"] for part in rows.values() for row in part) == sorted(row["input"] for row in shipped)


def test_every_label_has_its_share_in_every_split(prepared, shipped):
    whole = Counter(row["label"] for row in shipped)
    for split in ("train", "val", "test"):
        counts = Counter(row["label"] for row in rows_of(prepared / f"style_{split}.jsonl"))
        for label in LABELS:
            assert counts[label] / counts.total() == pytest.approx(whole[label] / len(shipped), abs=0.02)


def test_prepare_twice_gives_the_same_bytes(prepared, tmp_path):
    stage("12_prepare_styles.py", "--output-dir", tmp_path / "again")
    for file in prepared.glob("*.jsonl"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_new_rows_and_a_new_style_move_no_row_and_need_no_code(prepared, shipped, tmp_path):
    labels = json.loads((DATA / "labels.json").read_text(encoding="utf-8"))
    labels.append({"id": 5, "label": "幽默", "label_english": "humorous"})
    (tmp_path / "labels.json").write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
    joke = {"label": "幽默", "label_english": "humorous", "metadata": {}}
    questions = list(dict.fromkeys(row["input"].split("\n")[0] for row in shipped))
    new = [{"input": f"{question}\n回答：这个嘛，得问问我家的猫，它说了算。", **joke} for question in questions]
    grown = write_rows(tmp_path / "grown.jsonl", new + shipped[::-1])
    words = ["--data", grown, "--labels", tmp_path / "labels.json", "--output-dir", tmp_path / "out"]
    assert "幽默" in stage("12_prepare_styles.py", *words).stdout
    for split in ("train", "val", "test"):
        before = {row["input"] for row in rows_of(prepared / f"style_{split}.jsonl")}
        after = {row["input"] for row in rows_of(tmp_path / "out" / f"style_{split}.jsonl")}
        assert before <= after and any("我家的猫" in text for text in after)


def test_balancing_and_variants_touch_training_rows_only(prepared, tmp_path):
    words = ["--balance", "oversample", "--augment", 2, "--output-dir", tmp_path / "out"]
    stage("12_prepare_styles.py", *words)
    rows = rows_of(tmp_path / "out" / "style_train.jsonl")
    assert len(set(Counter(row["label"] for row in rows).values())) == 1
    assert {row["metadata"].get("augmented") for row in rows} == {None, "drop", "swap", "mix"}
    known = {row["input"].split("\n")[0] for row in rows_of(prepared / "style_train.jsonl")}
    assert {row["input"].split("\n")[0] for row in rows} == known, "no question of val or test"
    for name in ("style_val", "style_test", "pref_train", "sft_train"):
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == (prepared / f"{name}.jsonl").read_bytes()


def test_pairs_set_the_target_style_against_the_others_on_one_question(prepared, tmp_path, shipped):
    stage("12_prepare_styles.py", "--target-style", "honesty", "--name-style", "--output-dir", tmp_path / "out")
    label_of = {row["input"]: row["label"] for row in shipped}
    rows = rows_of(tmp_path / "out" / "pref_val.jsonl")
    for row in rows:
        question = row["prompt"][0]["content"].removeprefix("请用“诚实”的风格回答：")
        texts = [f"用户问题：{question}\n回答：{row[side][0]['content']}" for side in ("chosen", "rejected")]
        assert label_of[texts[0]] == "诚实" and label_of[texts[1]] == row["meta"]["kind"] != "诚实"
    assert len(rows) > 40


def spoil(row: dict, **changes) -> dict:
    return {key: value for key, value in {**row, **changes}.items() if value is not None}


BAD_ROWS = {
    "unknown label": ({"label": "夸张"}, "unknown label '夸张'"),
    "other English": ({"label_english": "rude"}, "is not 'rude'"),
    "missing label": ({"label": None}, "the key 'label' is missing"),
    "missing input": ({"input": None}, "the key 'input' is missing"),
    "empty text": ({"input": "  "}, "input is empty"),
    "empty answer": ({"input": "用户问题：能退吗？\n回答： "}, "not question and answer"),
    "no question": ({"input": "能退，七天内都可以。"}, "not question and answer"),
    "number": ({"input": 3}, "not a string"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_bad_row_is_named_with_its_line_and_writes_nothing(name, ending, shipped, tmp_path):
    changes, message = BAD_ROWS[name]
    rows = [*shipped[:2], spoil(shipped[2], **changes), *shipped[3:6]]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]" if ending == "json" else "\n".join(lines) + "\n"
    path = tmp_path / f"rows.{ending}"
    path.write_text(text, encoding="utf-8")
    done = stage("12_prepare_styles.py", "--data", path, "--output-dir", tmp_path / "out", check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert f"{path}:{4 if ending == 'json' else 3}:" in done.stderr
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_data_are_named(shipped, tmp_path):
    row = json.dumps(shipped[0], ensure_ascii=False)
    twice = json.dumps([shipped[0], {**shipped[0], "label": "诚实", "label_english": "honesty"}], ensure_ascii=False)
    files = {
        "gbk.json": (row.encode("gb18030"), "not UTF-8"),
        "broken.json": (f"[{row}".encode(), "broken JSON"),
        "object.json": (row.encode(), "not a JSON array"),
        "empty.json": (b"[]", "no rows"),
        "surrogate.json": (b'[{"input": "\\ud800", "label": "x", "label_english": "y"}]', "surrogate"),
        "twice.json": (twice.encode(), "labelled 售前 and 诚实"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        done = stage("12_prepare_styles.py", "--data", tmp_path / name, "--output-dir", tmp_path / "o", check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": "用户问题：能退吗？\n回答：" + "能" * 400_000}, "the row has 1.2 MB"),
        ({"input": "用户问题：能退吗？\n回答：能\0。"}, "control character U+0000"),
        ({"metadata": {"scene": ["\7"]}}, "control character U+0007"),
    ],
)
def test_an_array_holds_no_row_that_jsonl_would_not(change, message, shipped, tmp_path):
    from common.jsonl import DataError
    from tasks.styles import read_labels, read_rows

    path = tmp_path / "rows.json"
    path.write_text(json.dumps([shipped[0], {**shipped[1], **change}], indent=1), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(path, read_labels(DATA / "labels.json"))
    line = json.dumps([shipped[0]], indent=1).count("\n") + 1
    assert f"rows.json:{line}: {message}" in str(caught.value) and len(caught.value.findings) == 1


def test_uneven_labels_are_told_and_own_labels_go_on_to_the_next_stage(shipped, tmp_path, capsys):
    from tasks.styles import split_of

    own = [row for row in shipped if split_of(row["input"]) != "test" or row["label"] != "诚实"]
    labels = tmp_path / "labels.json"
    labels.write_bytes((DATA / "labels.json").read_bytes())
    module = sft_ways.stage("12_prepare_styles")
    module.main(module.Settings(data=DATA / "training_data.json", output_dir=tmp_path / "all"))
    assert "warning" not in (said := capsys.readouterr().out) and "--labels-file" not in said
    data = write_rows(tmp_path / "own.jsonl", own)
    module.main(module.Settings(data=data, labels=labels, output_dir=tmp_path / "own"))
    said = capsys.readouterr().out
    (warning,) = (line for line in said.splitlines() if "warning" in line)
    assert (
        "诚实" in warning and "over 5 points from the share in all rows, in test; fix: another --split-salt" in warning
    )
    assert said.splitlines()[-1].endswith(f" --labels-file {labels}")


def test_labels_out_of_order_are_refused(tmp_path):
    labels = json.loads((DATA / "labels.json").read_text(encoding="utf-8"))[::-1]
    (tmp_path / "labels.json").write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
    words = ["--labels", tmp_path / "labels.json", "--output-dir", tmp_path / "o"]
    done = stage("12_prepare_styles.py", *words, check=False)
    assert done.returncode == 2 and "label 0 has the id 4" in done.stderr


# --- metrics and rules


def test_f1_and_pairs_are_what_they_are_called():
    from sklearn.metrics import f1_score

    from tasks.styles.metrics import evaluate

    truth = ["a", "b", "a", "c", "b", "a"]
    chances = [[0.5, 0.4, 0.1], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1], [0.9, 0.1, 0.0]]
    figures = evaluate(["a", "b", "c"], truth, chances, ["q1", "q1", "q2", "q2", "q3", "q4"], samples=200)
    said = ["a", "a", "c", "c", "b", "a"]
    assert figures["f1_macro"]["mean"] == pytest.approx(f1_score(truth, said, average="macro"))
    assert figures["f1_weighted"] == pytest.approx(f1_score(truth, said, average="weighted"))
    assert figures["accuracy"]["mean"] == pytest.approx(4 / 6)
    # q1: (a, b) as they are .5 * .4, exchanged .4 * .6: not told apart; q2: (a, c) .2 * .8 against .5 * .1: told apart
    assert figures["pairs"]["mean"] == 0.5 and figures["pairs"]["count"] == 2
    assert figures["f1_macro"]["low"] <= figures["f1_macro"]["mean"] <= figures["f1_macro"]["high"]


def test_rules_see_length_ending_repetition_and_copies(shipped):
    from tasks import styles

    copied = next(styles.answer_of(row["input"]) for row in shipped if styles.split_of(row["input"]) == "train")
    texts = ["好。", copied, "您好您好您好您好您好您好您好您好您好您好", "字" * 500]
    meta = [{"style": "有帮助"}] * 4
    arguments = (["问"] * 4, texts, meta)
    assert (
        styles.length(*arguments)[0] < 0.2 and styles.length(*arguments)[1] == 1 and styles.length(*arguments)[3] == 0
    )
    assert styles.ends_whole(*arguments) == [1, 1, 0, 0]
    repeat = styles.no_repeat(*arguments)
    assert repeat[0] is None and repeat[1] > 0.9 and repeat[2] < 0.2
    assert styles.near_copy(*arguments) == [0, 1, 0, 0] and styles.overall(*arguments)[1] == 0
    assert styles.mark(texts[2], {}) and not styles.mark("好。", {})


def test_tfidf_knows_most_held_out_answers(shipped):
    from tasks import styles

    held = [row for row in shipped if styles.split_of(row["input"]) == "val"]
    answers = [styles.answer_of(row["input"]) for row in held]
    values = styles.tfidf_style([""] * len(held), answers, [{"style": row["label"]} for row in held])
    assert sum(value > 0.5 for value in values) > 0.5 * len(held) and all(0 <= value <= 1 for value in values)
    assert styles.tfidf_style([""], answers[:1], [{}]) == [None]


def test_the_teachers_part_of_the_loss_is_zero_where_both_agree():
    import torch

    from common.training.classifiers import make_loss

    class Outputs:
        logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.0]])

    labels = torch.tensor([[0.0], [2.0]])
    plain = torch.nn.functional.cross_entropy(Outputs.logits, torch.tensor([0, 2]))
    assert make_loss()(Outputs, labels).item() == pytest.approx(plain.item())
    same = torch.cat([labels, Outputs.logits], 1)
    assert make_loss(teacher_share=0.4)(Outputs, same).item() == pytest.approx(0.6 * plain.item())
    other = torch.cat([labels, -Outputs.logits], 1)
    assert make_loss(teacher_share=0.4)(Outputs, other) > make_loss(teacher_share=0.4)(Outputs, same)
    weighted = make_loss(torch.tensor([1.0, 1.0, 9.0]))(Outputs, labels).item()
    assert weighted > plain.item(), "the second row, the less likely one, weighs nine times as much"


# --- stage 31


def load_plainly(folder: Path):
    """What a user of transformers does; the keys that the folder did not bring."""
    from transformers import AutoModelForSequenceClassification

    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    return model, report["missing_keys"]


@pytest.mark.parametrize("name", ["classifier", "lora"])
def test_the_folder_loads_with_plain_transformers_head_and_all(name, request):
    folder = request.getfixturevalue(name)
    model, missing = load_plainly(folder)
    assert not missing and model.config.id2label == dict(enumerate(LABELS)) and model.config.pad_token_id == 0
    mapping = json.loads((folder / "label_mapping.json").read_text(encoding="utf-8"))
    assert mapping["id_to_label"] == {str(i): label for i, label in enumerate(LABELS)}
    assert mapping["label_to_id"] == {label: i for i, label in enumerate(LABELS)}


def test_the_report_has_the_figures_and_the_baselines(classifier):
    report = json.loads((classifier / "metrics.json").read_text(encoding="utf-8"))
    assert {"eval_accuracy", "eval_f1_macro", "eval_f1_weighted", "eval_per_class_f1"} <= set(report)
    assert set(report["systems"]) == {"classifier", "majority class", "TF-IDF, whole text", "TF-IDF, answer alone"}
    for figures in report["systems"].values():
        assert figures["accuracy"]["low"] <= figures["accuracy"]["mean"] <= figures["accuracy"]["high"]
        assert figures["pairs"]["count"] > 0
    for name in ("confusion", "reliability", "learning_curve"):
        assert (classifier / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert record_of(classifier)["status"] == "done"


def test_training_learns_its_own_rows(few, tmp_path):
    """The same rows as new questions in train and val: a classifier that works is right about nearly all of them."""
    from tasks.styles import answer_of

    rows = rows_of(few[0])
    again = [
        {**row, "input": f"用户问题：第{i}个问题？\n回答：{answer_of(row['input'])}"} for i, row in enumerate(rows)
    ]
    val = write_rows(tmp_path / "val.jsonl", again)
    words = train_words((few[0], val), tmp_path / "out", "--num_train_epochs", 8, "--allow", "group-leak")
    stage("31_train_style_classifier.py", *words)
    assert record_of(tmp_path / "out")["figures"]["eval_accuracy"] > 0.8


def test_a_question_in_both_files_is_refused(few, tmp_path):
    words = train_words((few[0], few[0]), tmp_path / "out")
    done = stage("31_train_style_classifier.py", *words, check=False)
    assert done.returncode == 2 and "answer a question of" in done.stderr and not (tmp_path / "out").exists()


def test_without_a_validation_file_questions_are_held_out(shipped):
    from tasks.styles import question_key, read_labels, read_split

    labels = read_labels(DATA / "labels.json")
    train, val = read_split(DATA / "training_data.json", None, labels)
    assert len(train) + len(val) == len(shipped) and 60 < len(val) < 150
    assert not {question_key(row["input"]) for row in train} & {question_key(row["input"]) for row in val}


# --- stage 22


def reward_adapter(folder: Path) -> Path:
    """A LoRA of a scalar reward model whose weights are not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = str(ROOT / "data/tiny_qwen3")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("labels", [1, 5])
def test_a_merged_classifier_scores_as_its_adapter_does(labels, lora, few, prepared, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from common.training.classifiers import load_classifier, logits_of

    adapter = lora / "adapter" if labels == 5 else reward_adapter(tmp_path / "adapter")
    probe = few[1] if labels == 5 else prepared / "pref_val.jsonl"
    words = ["--adapter", adapter, "--probe-file", probe, "--probe-rows", 12, "--output-dir", tmp_path / "merged"]
    words += ["--dtype", "float32"]
    stage("22_merge_adapter.py", *words)
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text(encoding="utf-8"))
    assert report["passed"] and report["texts"] == (12 if labels == 5 else 24)

    plain, missing = load_plainly(tmp_path / "merged")
    assert not missing and plain.config.num_labels == labels
    assert labels == 1 or plain.config.id2label == dict(enumerate(LABELS))
    merged, tokenizer = load_classifier(str(tmp_path / "merged"), "float32", labels)
    base = AutoModelForSequenceClassification.from_pretrained(
        ROOT / "data/tiny_qwen3", num_labels=labels, dtype=torch.float32, pad_token_id=0
    )
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    texts = [row["input"] for row in rows_of(few[1])]
    difference = logits_of(merged, tokenizer, texts) - logits_of(adapted, tokenizer, texts)
    assert difference.abs().max() < 1e-4


def test_a_classifiers_merge_beyond_tolerance_fails(lora, few, tmp_path):
    words = ["--adapter", lora / "adapter", "--probe-file", few[1], "--max-difference", 1e-12]
    done = stage("22_merge_adapter.py", *words, "--output-dir", tmp_path / "m", check=False)
    assert done.returncode == 1 and record_of(tmp_path / "m")["status"] == "failed"


def test_an_adapter_is_not_taken_for_a_classifier(lora):
    done = stage("61_classify_style.py", "--model", lora / "adapter", "--text", "你好", check=False)
    assert done.returncode == 2 and "adapter without its base" in done.stderr


def test_a_base_model_is_not_taken_for_a_classifier():
    done = stage("61_classify_style.py", "--model", ROOT / "data/tiny_qwen3", "--text", "你好", check=False)
    assert done.returncode == 2 and "no trained head" in done.stderr


# --- stage 61


def test_predictions_depend_on_neither_batch_nor_padding_side(classifier, prepared):
    import torch

    from common.training.classifiers import load_classifier, logits_of

    model, tokenizer = load_classifier(str(classifier), "float32")
    texts = [row["input"] for row in rows_of(prepared / "style_val.jsonl")][:64]
    alone = torch.cat([logits_of(model, tokenizer, [text]) for text in texts]).softmax(-1)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        for size in (1, 8, 64):
            parts = [logits_of(model, tokenizer, texts[i : i + size], token_budget=10**6) for i in range(0, 64, size)]
            assert (torch.cat(parts).softmax(-1) - alone).abs().max() < 1e-4, (side, size)


def test_text_file_and_standard_input_give_the_same_answer(classifier, few, tmp_path):
    import os
    import sys

    rows = rows_of(few[1])[:3]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--model", classifier, "--dtype", "float32"]
    stage("61_classify_style.py", *words, "--input-file", file, "--output-file", tmp_path / "out.jsonl")
    results = rows_of(tmp_path / "out.jsonl")
    assert [row["input"] for row in results] == [row["input"] for row in rows]
    for row in results:
        assert row["confidence"] == max(row["probabilities"].values()) == row["probabilities"][row["predicted_label"]]
        assert list(row["probabilities"]) == LABELS and sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)

    lines = "".join(row["input"].replace("\n", "\\n") + "\n" for row in rows)
    command = [sys.executable, str(SCRIPTS / "61_classify_style.py"), *map(str, words)]
    done = warm.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, typed=lines)
    typed = [json.loads(line) for line in done.stdout.splitlines()]
    one = json.loads(stage("61_classify_style.py", *words, "--text", rows[0]["input"]).stdout)
    for row, other in [*zip(results, typed, strict=True), (results[0], one)]:
        assert other["predicted_label"] == row["predicted_label"]
        assert list(other["probabilities"].values()) == pytest.approx(list(row["probabilities"].values()), abs=1e-4)


BAD_TEXTS = {
    "gbk.txt": ("你好\n".encode("gbk"), "gbk.txt:1: not UTF-8"),
    "empty.txt": (b"", "no text"),
    "gap.txt": ("你好\n\n再见\n".encode(), "gap.txt:2: an empty line"),
    "key.jsonl": (b'{"question": "x"}\n', "row 1 has no text"),
    "blank.jsonl": (b'{"input": "x"}\n{"input": " "}\n', "row 2 has no text"),
    "nothing.json": (b"[]", "no rows"),
    "broken.jsonl": (b'{"input": \n', "broken JSON"),
    "turns.jsonl": (b'{"prompt": [], "completion": "x"}\n', "row 1 has no text"),
    "answers.jsonl": (b'{"prompt": "x", "completion": []}\n', "row 1 has no text"),
    "null.jsonl": (b'{"prompt": "x", "completion": null}\n', "row 1 has no text"),
    "number.jsonl": (b'{"prompt": 3, "completion": "x"}\n', "row 1 has no text"),
    "strings.jsonl": (b'{"prompt": [{"content": "x"}], "completion": ["x"]}\n', "row 1 has no text"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_input_files_are_named_before_the_model_is_loaded(name, tmp_path):
    content, message = BAD_TEXTS[name]
    (tmp_path / name).write_bytes(content)
    words = [
        "--model",
        ROOT / "data/tiny_qwen3",
        "--input-file",
        tmp_path / name,
        "--output-file",
        tmp_path / "o.jsonl",
    ]
    done = stage("61_classify_style.py", *words, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_blank_text_is_refused(text):
    from common.settings import UserError

    module = sft_ways.stage("61_classify_style")
    with pytest.raises(UserError, match="--text is blank; fix: "):
        module.main(module.Settings(text=text))


def test_prompt_and_completion_may_be_texts_or_turns(tmp_path):
    module = sft_ways.stage("61_classify_style")
    turns = [{"role": "assistant", "content": "能。"}]
    # the classifier has seen no question that names the wanted style, and must not be told it
    from tasks.styles import messages

    named = messages({"question": "能退吗？", "ask_for": "诚实"})
    assert "诚实" in named[0]["content"]
    rows = [
        {"prompt": prompt, "completion": completion}
        for prompt in ("能退吗？", [{"content": "能退吗？"}], named)
        for completion in ("能。", turns, "")
    ]
    texts = [text for _, text in module.read_texts(write_rows(tmp_path / "rows.jsonl", rows))]
    assert texts == ["用户问题：能退吗？\n回答：" + answer for answer in ("能。", "能。", "")] * 3


def test_cut_texts_are_counted_and_the_next_command_reads_what_it_names(tmp_path, capsys, monkeypatch):
    import common.training.classifiers
    import tasks.styles.predictions
    from common.models import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / "data/tiny_qwen3"))
    answer = {"predicted_label": "诚实", "confidence": 1.0, "probabilities": {"诚实": 1.0}}
    monkeypatch.setattr(common.training.classifiers, "load_styles", lambda *_: (None, tokenizer))
    monkeypatch.setattr(tasks.styles.predictions, "predict_styles", lambda *words: [answer] * len(words[2]))
    module = sft_ways.stage("61_classify_style")
    for name, content in (("a.txt", "好" * 9 + "\n好\n"), ("b.jsonl", '{"input": "好"}\n')):
        (tmp_path / name).write_text(content, encoding="utf-8")
        words = {"input_file": tmp_path / name, "output_file": tmp_path / f"{name}.out.jsonl", "max_length": 8}
        module.main(module.Settings(model=str(ROOT / "data/tiny_qwen3"), **words))
        said = capsys.readouterr()
        assert ("notice: 1 texts have more than 8 tokens" in said.err) == (name == "a.txt")
        assert said.out.splitlines()[-1].endswith("a.txt.out.jsonl" if name == "a.txt" else "b.jsonl")


# --- stage 73


def generation(run: str, prompt: str, text: str, reference: str | None = None) -> dict:
    row = {"id": f"{prompt}#0", "prompt_id": prompt, "sample": 0, "seed": 1, "completion": text, "reference": reference}
    row |= {
        "prompt": [{"role": "user", "content": f"问题{prompt}"}],
        "model": run,
        "finish_reason": "stop",
        "tokens": 3,
    }
    return row | {"meta": {}}


@pytest.fixture
def two_runs(tmp_path) -> list[Path]:
    files = []
    for run in ("base", "sft"):
        rows = [generation(run, f"p{i}", f"={run[0]}答案{i}", f"+金{i}") for i in range(12)]
        files.append(write_rows(tmp_path / f"{run}.jsonl", rows))
    return files


def fill(sheet: Path, output: Path, answer, encoding="utf-8-sig") -> Path:
    """A rater: answer(row) for every row of the sheet, sorted as a spreadsheet may leave it."""
    with open(sheet, encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    for row in rows:
        row[-2] = answer(dict(zip(header, row, strict=True)))
    with open(output, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header, *sorted(rows, key=lambda row: row[2])])
    return output


def test_pairs_are_blind_shuffled_and_read_back(two_runs, tmp_path):
    sheet = tmp_path / "sheet" / "pair.csv"
    stage("73_human_sheet.py", "--kind", "pair", "--generations", *two_runs, "--output", sheet)
    text = sheet.read_text(encoding="utf-8-sig")
    assert "base" not in text and "sft" not in text and "\n=" not in text and ",=" not in text
    key = json.loads(sheet.with_suffix(".key.json").read_text(encoding="utf-8"))
    sides = [item["runs"] for item in key["items"]]
    assert len(sides) == 12 and {tuple(side) for side in sides} == {("base", "sft"), ("sft", "base")}

    likes_sft = fill(sheet, tmp_path / "anna.csv", lambda row: "A" if "s答案" in row["text_a"] else "B")
    unsure = fill(
        sheet,
        tmp_path / "bo.csv",
        lambda row: "Tie" if int(row["item"]) > 6 else "a" if "s答案" in row["text_a"] else "B",
        encoding="gb18030",
    )
    words = ["--kind", "pair", "--read", likes_sft, unsure, "--output", sheet, "--report", tmp_path / "report.json"]
    done = stage("73_human_sheet.py", *words)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["agreement"]["anna / bo"]["equal"] == 0.5 and "GB18030" in done.stdout
    assert report["runs"]["sft"]["mean"] == pytest.approx((12 + 6 + 3) / 24)


def test_style_sheet_compares_raters_with_the_classifier(prepared, classifier, tmp_path):
    rows = write_rows(tmp_path / "held.jsonl", rows_of(prepared / "style_test.jsonl")[:10])
    sheet, said = tmp_path / "style.csv", tmp_path / "said.jsonl"
    stage("73_human_sheet.py", "--kind", "style", "--generations", rows, "--output", sheet)
    stage("61_classify_style.py", "--model", classifier, "--input-file", rows, "--output-file", said)
    label_of = {row["input"]: row["label"] for row in rows_of(rows)}
    truth = fill(sheet, tmp_path / "cy.csv", lambda row: label_of[f"用户问题：{row['prompt']}\n回答：{row['text']}"])
    words = ["--kind", "style", "--read", truth, "--machine", said, "--output", sheet, "--report", tmp_path / "r.json"]
    stage("73_human_sheet.py", *words)
    figures = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["agreement"]["cy / machine"]
    right = sum(row["predicted_label"] == label_of[row["input"]] for row in rows_of(said))
    assert figures["items"] == 10 and figures["equal"] == pytest.approx(right / 10)


def test_ratings_per_run_with_the_reference(two_runs, tmp_path):
    sheet = tmp_path / "rating.csv"
    stage("73_human_sheet.py", "--generations", *two_runs, "--reference", "--items", 5, "--output", sheet)
    filled = fill(
        sheet, tmp_path / "di.csv", lambda row: "5" if "金" in row["text"] else "2" if "s" in row["text"] else "1"
    )
    words = ["--read", filled, "--output", sheet, "--report", tmp_path / "report.json"]
    stage("73_human_sheet.py", *words)
    runs = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["runs"]
    assert {run: figures["mean"] for run, figures in runs.items()} == {"base": 1, "reference": 5, "sft": 2}
    assert all(figures["answers"] == 5 for figures in runs.values())


def test_style_raters_are_not_told_which_style_was_asked_for(tmp_path):
    rows = [generation("named", f"p{i}", f"答案{i}") for i in range(3)]
    for row in rows:
        row["prompt"][0]["content"] = f"请用“诚实”的风格回答：{row['prompt'][0]['content']}"
    named = write_rows(tmp_path / "named.jsonl", rows)
    module = sft_ways.stage("73_human_sheet")
    for kind, told in (("style", False), ("rating", True)):
        sheet = tmp_path / f"{kind}.csv"
        module.main(module.Settings(kind=kind, generations=(named,), labels=DATA / "labels.json", output=sheet))
        text = sheet.read_text(encoding="utf-8-sig")
        assert "问题p2" in text and ("请用" in text) == told


def test_a_sheet_with_a_wrong_answer_or_another_text_is_refused(two_runs, tmp_path):
    sheet = tmp_path / "rating.csv"
    stage("73_human_sheet.py", "--generations", *two_runs, "--output", sheet)
    bad = fill(sheet, tmp_path / "bad.csv", lambda row: "6" if row["item"] == "7" else "3")
    blank = fill(sheet, tmp_path / "blank.csv", lambda row: "")
    changed = tmp_path / "changed.csv"
    changed.write_text(sheet.read_text(encoding="utf-8-sig").replace("答案3", "答案四"), encoding="utf-8-sig")
    torn = tmp_path / "torn.csv"
    torn.write_text("item\n1\n", encoding="utf-8")
    for path, message in (
        (bad, "item 7: '6' is no answer"),
        (blank, "nothing is filled in"),
        (changed, "not the sheet of this key"),
        (torn, "columns are missing"),
    ):
        done = stage("73_human_sheet.py", "--read", path, "--output", sheet, check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, path.name


def read_back(sheet: Path, raters: list[Path], **settings) -> dict:
    """The report of stage 73 on filled sheets."""
    module, report = sft_ways.stage("73_human_sheet"), sheet.with_name("report.json")
    module.main(module.Settings(output=sheet, read=tuple(raters), report=report, **settings))
    return json.loads(report.read_text(encoding="utf-8"))


def test_every_run_is_compared_with_its_own_machine_file(two_runs, tmp_path, capsys):
    """Ids are the same in both runs; a text without a score is left out."""
    files = []
    for run, score, label in (("base", 1.4, "诚实"), ("sft", 4.6, "售前")):
        rows = [{"id": f"p{i}#0", "score": score if i else None, "predicted_label": label} for i in range(12)]
        files.append(write_rows(tmp_path / "machine" / f"{run}.jsonl", rows))
    named = [f"sft={files[1].rename(tmp_path / 'machine' / 'other.jsonl')}", str(files[0])]
    likes = {
        "pair": lambda row: "A" if "s答案" in row["text_a"] else "B",
        "rating": lambda row: "5" if "s答案" in row["text"] else "1",
        "style": lambda row: "售前" if "s答案" in row["text"] else "诚实",
    }
    module = sft_ways.stage("73_human_sheet")
    for kind, items in (("pair", 11), ("rating", 22), ("style", 24)):
        sheet = tmp_path / f"{kind}.csv"
        words = {"kind": kind, "generations": tuple(two_runs), "labels": DATA / "labels.json", "output": sheet}
        module.main(module.Settings(**words))
        assert capsys.readouterr().out.endswith(f"--kind {kind} --read {sheet} --output {sheet}\n")
        anna = fill(sheet, tmp_path / "anna.csv", likes[kind])
        report = read_back(sheet, [anna], kind=kind, machine=tuple(named))
        assert report["agreement"]["anna / machine"] == {"items": items, "equal": 1, "kappa": 1}, kind
        for words, message in (
            ((named[1].replace("base", "none"),), "no such file"),
            ((named[0].removeprefix("sft="),), "no run other (base, sft); fix: RUN=FILE"),
            ((named[1], named[1]), "an earlier file has the same texts"),
        ):
            with pytest.raises(UserError) as caught:
                read_back(sheet, [anna], kind=kind, machine=words)
            assert message in str(caught.value)


def test_people_are_compared_with_the_judge_and_with_scores(tmp_path):
    """Files as stages 71 and 70 write them, of copy that the rules of the task judge."""
    from tasks import copywriting

    golden = rows_of(ROOT / "data/copywriting/golden.jsonl")[:6]
    for run in ("sft", "base"):
        rows = []
        for i, row in enumerate(golden):
            meta = {"product_id": row["product_id"], "copy_type": row["copy_type"]}
            text = row["copy"][: len(row["copy"]) // (2 if run == "sft" else 8)]
            asked = {"prompt": copywriting.messages(meta), "meta": meta}
            rows.append(generation(run, f"q{i}", text, row["copy"]) | asked)
        write_rows(tmp_path / "generations" / f"{run}.jsonl", rows)
    files = sorted((tmp_path / "generations").glob("*.jsonl"))
    judge, score = sft_ways.stage("71_judge"), sft_ways.stage("70_score")
    judged, scored = tmp_path / "rules.jsonl", tmp_path / "scores"
    candidates = ("golden", f"finetuned={files[1]}", f"first={files[0]}")
    shared = {"task": "copywriting", "bootstrap": 50}
    judge.main(judge.Settings(candidates=candidates, output_file=judged, generations=files[0].parent, **shared))
    score.main(score.Settings(generations=tuple(files), nll_model="", output_dir=scored, **shared))

    rows = rows_of(judged)
    said = {}  # run, prompt -> the judge's score
    for row in rows:
        for letter, run in zip("ABC", ("reference", "sft", "base"), strict=True):
            said[run, row["prompt_id"]] = row["candidates"][letter]["score"]
    module = sft_ways.stage("73_human_sheet")
    texts = {(run.stem, row["prompt_id"]): row["completion"] for run in files for row in rows_of(run)}
    texts |= {("reference", row["prompt_id"]): row["reference"] for row in rows_of(files[0])}
    run_of = {text: place for place, text in texts.items()}

    def best(row: dict) -> str:
        a, b = (said[run_of[row[side]]] for side in ("text_a", "text_b"))
        return "A" if a > b else "B" if b > a else "tie"

    for kind, answer, items in (("rating", lambda row: str(round(said[run_of[row["text"]]])), 18), ("pair", best, 18)):
        sheet = tmp_path / f"{kind}.csv"
        module.main(module.Settings("copywriting", kind, tuple(files), reference=True, output=sheet))
        anna = fill(sheet, tmp_path / "anna.csv", answer)
        figures = read_back(sheet, [anna], kind=kind, machine=(str(judged),))["agreement"]["anna / machine rules"]
        assert (figures["items"], figures["equal"]) == (items, 1), kind

        words = (str(scored / "base.jsonl"), str(scored / "sft.jsonl"), f"reference={scored / 'sft.reference.jsonl'}")
        figures = read_back(sheet, [anna], kind=kind, machine=words, metric="overall")["agreement"]["anna / machine"]
        assert figures["items"] == items
        with pytest.raises(UserError, match="fix: a --metric from 0 to 1"):
            read_back(sheet, [anna], kind=kind, machine=words, metric="characters")
    # a text that nothing could judge: no figure, no answer
    rows[0]["candidates"]["B"]["score"], rows[1]["candidates"]["B"]["score"] = None, {}
    rows[2]["wins"]["A>B"] = None
    write_rows(judged, rows)
    for kind, items in (("rating", 16), ("pair", 17)):
        sheet = tmp_path / f"{kind}.csv"
        anna = fill(sheet, tmp_path / "anna.csv", lambda row: "3" if "text" in row else "tie")
        report = read_back(sheet, [anna], kind=kind, machine=(str(judged),))
        assert report["agreement"]["anna / machine rules"]["items"] == items


def test_shipped_scenes_and_pairs_are_what_the_readme_says(shipped):
    styles = defaultdict(set)
    for row in shipped:
        styles[row["metadata"]["question_id"]].add(row["label"])
    counts = Counter(row["label"] for row in shipped)
    assert len(shipped) >= 500 and sum(len(labels) >= 2 for labels in styles.values()) >= 100
    assert max(counts.values()) <= 1.2 * min(counts.values())


# --- the audit of style as a reward


def audit(before: list[str], after: list[str], classifier: Path, folder: Path) -> dict:
    import subprocess
    import sys

    files = [
        write_rows(folder / f"{name}.jsonl", [generation(name, f"p{i}", text) for i, text in enumerate(texts)])
        for name, texts in (("before", before), ("after", after))
    ]
    words = ["--before", files[0], "--after", files[1], "--classifier", classifier, "--style", "诚实"]
    words += ["--output", folder / "audit.json", "--plot", folder / "audit.png"]
    script = ROOT / "benchmarks" / "audit_style_reward.py"
    subprocess.run([sys.executable, str(script), *map(str, words)], check=True, capture_output=True)
    assert (folder / "audit.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


def test_the_audit_measures_every_opinion(classifier, shipped, tmp_path):
    from tasks import styles

    held = [row for row in shipped if styles.split_of(row["input"]) == "val"]
    other = [styles.answer_of(row["input"]) for row in held if row["label"] == "售前"]
    honest = [styles.answer_of(row["input"]) for row in held if row["label"] == "诚实"][: len(other)]
    found = audit(other, honest, classifier, tmp_path)["differences"]
    assert found["TF-IDF's opinion"]["low"] > 0.3, "honest answers are more honest to a judge that was not the reward"
    assert {"reward: classifier", "characters", "no_repeat", "near_copy", "stopped"} <= set(found)


def test_a_hacked_classifier_is_told_apart_from_a_learnt_style():
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from audit_style_reward import OPINION, REWARD, verdict

    from common.evaluation.statistics import Estimate

    risen, flat = Estimate(0.5, 0.4, 0.6), Estimate(0.02, -0.05, 0.09)
    assert "may be hacked" in verdict({REWARD: risen, OPINION: flat})
    assert "no sign" in verdict({REWARD: risen, OPINION: risen})
    assert "did not clearly rise" in verdict({REWARD: flat, OPINION: risen})
