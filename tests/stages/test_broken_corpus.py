"""Every fault planted in tests/make_broken_corpus.py is found where it stands, and nothing else is; shipped data raise
no alarm."""

import importlib
import json
import re
import shutil

import pytest

import make_broken_corpus
from conftest import ROOT

INDEX = make_broken_corpus.CORPUS.index
MODEL = ROOT / "data" / "tiny_qwen3"
stage = importlib.import_module("19_check_data")


def changed_model(changed: dict, folder):
    """A copy of the embedded model's folder, without weights, with `changed` put into its JSON files and its
    template."""
    folder.mkdir()
    for source in MODEL.iterdir():
        if source.suffix in (".json", ".jinja"):
            shutil.copy(source, folder)
    for name, content in changed.items():
        path = folder / name
        if isinstance(content, dict):
            values = json.loads(path.read_text(encoding="utf-8")) | content
            path.write_text(json.dumps(values), encoding="utf-8")
        elif content:
            path.write_text(content, encoding="utf-8")
        else:
            path.unlink()
    return folder


def run_stage_here(folder, **settings) -> tuple[int, list[dict]]:
    """The stage's own main, in this process because there are a hundred cases: (exit code, findings of its report)."""
    report = folder / "report.json"
    settings = {"preview": None, "report": report} | settings
    try:
        stage.main(stage.Settings(**settings))
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(report.read_text(encoding="utf-8"))["findings"]


def test_the_corpus_is_large():
    assert len(INDEX) >= 40 and len({entry["train"] for entry in INDEX}) == len(INDEX)
    assert all(entry["faults"] for entry in INDEX)


@pytest.mark.parametrize("entry", INDEX, ids=[entry["case"] for entry in INDEX])
def test_a_planted_fault_is_found_where_it_stands(entry, tmp_path):
    model = changed_model(entry["model"], tmp_path / "model") if "model" in entry else MODEL
    for name, content in entry["files"].items():
        (tmp_path / name).write_bytes(content)

    code, findings = run_stage_here(
        tmp_path,
        train_file=tmp_path / entry["train"],
        val_file=entry["val"] and tmp_path / entry["val"],
        schema=entry["schema"],
        model=str(model),
        **entry["settings"],
    )

    assert all(finding["fix"] for finding in findings)
    for planted in entry["faults"]:
        matching = [
            f
            for f in findings
            if (f["level"], f["file"].rsplit("/")[-1], f["line"])
            == (planted["level"], planted["file"], planted["line"])
            and planted["reason"] in f["reason"]
        ]
        assert len(matching) == 1, f"{planted} in {findings}"
        findings.remove(matching[0])
    assert not [f for f in findings if f["level"] != "note"], "nothing but what was planted"
    assert code == any(planted["level"] == "error" for planted in entry["faults"])


@pytest.mark.parametrize("name, schema", [("pairs.jsonl", "preference"), ("prompts.jsonl", "prompts")])
def test_the_chat_set_raises_no_alarm(name, schema, tmp_path):
    code, findings = run_stage_here(tmp_path, train_file=ROOT / "data" / "chat" / name, val_file=None, schema=schema)
    assert (code, findings) == (0, [])


def test_what_looks_like_a_fault_and_is_none(tmp_path):
    """Emoji joined by U+200D, flags, Weibo's bracketed emoticons, code, dates, prices, masked numbers, other languages
    when asked."""
    answers = {
        "全家出门了吗？": "出门了👨\u200d👩\u200d👧，带着🏴󠁧󠁢󠁥󠁮󠁧󠁿的旗子[允悲]",
        "几点开门？": "2024年10月1日上午9:00，电话139****5678，订单20241001123456789012。",
        "怎样用Python打印一行？": '写 `print("a\\nb")`，\\n 表示换行，f"{name}" 会填进变量。',
        "把“你好，很高兴见到你”翻译成英文。": "Hello, nice to meet you. It is a pleasure to be here today.",
        "繁体的“龙马精神”怎么写？": "寫作「龍馬精神」，這個詞說的是健壯的精神。",
        "写信到哪里？": "发到 name@example.com 就行，或者在微博上@评论罗伯特。",
        "x<y 是什么意思？": "x 小于 y，比如 3 < 5；反过来写成 y > x，a&b 是并且。",
        "法国的咖啡怎么说？": "café；naïve 和 über 也带着附加的符号。",
        "哈": "哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈",
    }
    train = tmp_path / "sft_train.jsonl"
    rows = [make_broken_corpus.sft(ask, answer) for ask, answer in answers.items()] + make_broken_corpus.good_sft(12)
    train.write_bytes(b"".join(make_broken_corpus.line(row) for row in rows))
    assert run_stage_here(tmp_path, train_file=train, val_file=None) == (0, [])


def test_prepared_verse_raises_no_alarm(run_stage, tmp_path):
    """Every tenth poem or so through stage 10 and the whole preflight: no error, no warning."""
    folder = tmp_path / "poems"
    run_stage("10_prepare_poems.py", "--output-dir", folder, "--max-train", 2000, "--max-pairs", 800)
    for name in ("sft", "pref", "prompts"):
        files = {"train_file": folder / f"{name}_train.jsonl", "val_file": folder / f"{name}_val.jsonl"}
        code, findings = run_stage_here(tmp_path, schema="auto", **files)
        assert code == 0 and [f for f in findings if f["level"] != "note"] == []


def test_every_test_that_the_page_of_checks_names_is_there():
    page = (ROOT / "docs" / "CHECKS.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not any(f"def {name}(" in path.read_text(encoding="utf-8") for path in ROOT.glob(f"tests/*/{file}"))
    ]
    cases = re.findall(r"`\[(\w+)\]`", page)
    assert len(named) > 30 and not missing
    assert len(cases) > 15 and set(cases) <= {entry["case"] for entry in INDEX} | {"name"}
