"""Stages 13-16: golden copy, cleaning rounds, rejected copy, training files; offline, and against a real server on
loopback."""

import csv
import json
import random
from collections import Counter

import pytest

from chat_server import ChatServer
from common.jsonl import read_json, read_jsonl
from conftest import ROOT
from tasks import copywriting as task
from tasks.copywriting import faults as copy_faults

PLANTED = ROOT / "tests" / "data" / "defective_copies.jsonl"
GOLDEN = ROOT / "data" / "copywriting" / "golden.jsonl"


@pytest.fixture
def golden():
    return {(row["product_id"], row["copy_type"]): row["copy"] for row in read_jsonl(GOLDEN)}


@pytest.fixture
def offline(run_stage, tmp_path):
    """offline(14) runs stages 13 to 14 with no API; returns the folder with raw, clean and rejected copies and the
    training files."""
    stages = {
        13: ("13_write_copy.py", "--output-file", "raw.jsonl"),
        14: ("14_clean_copy.py", "--copies-file", "raw.jsonl", "--output-file", "clean.jsonl"),
        15: ("15_write_rejected.py", "--golden-file", "clean.jsonl", "--output-file", "rejected.jsonl"),
        16: (
            "16_prepare_copy.py",
            "--golden-file",
            "clean.jsonl",
            "--rejected-file",
            "rejected.jsonl",
            "--output-dir",
            "out",
        ),
    }
    env = {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""}

    def run(last: int):
        for number in range(13, last + 1):
            run_stage(*stages[number], env=env)
        return tmp_path

    return run


@pytest.fixture
def with_api(run_stage, tmp_path):
    """with_api(server, script, *flags): a stage against that server, with a request log of its own."""

    def run(server: ChatServer, script: str, *args, **options):
        env = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "sk-test-0123456789"}
        return run_stage(script, "--model", "m", "--request-log", tmp_path / "log.jsonl", *args, env=env, **options)

    return run


# --- 13: golden copy


def test_the_shipped_copies_stand_in_for_an_api(offline, golden):
    rows = read_jsonl(offline(13) / "raw.jsonl")
    assert {(row["product_id"], row["copy_type"]): row["copy"] for row in rows} == golden
    assert all("language model" in row["source"] for row in rows)


def test_every_product_and_type_is_asked_with_guide_and_sheet(with_api, tmp_path):
    flags = ("--splits", "test", "--max-products", "2", "--output-file", "raw.jsonl")
    with ChatServer(reply=lambda body: "一篇文案。") as server:
        done = with_api(server, "13_write_copy.py", *flags)
        again = with_api(server, "13_write_copy.py", *flags, "--overwrite")  # the log is kept: nothing is paid twice
    assert "18 of 18 copies" in done.stdout and "0 requests sent, nothing billed" in again.stdout
    assert len(server.requests) == 18
    sheets = [task.sheet(product) for product in task.products().values() if product["split"] == "test"][:2]
    asked = Counter(
        next(sheet for sheet in sheets if sheet in request.body["messages"][1]["content"])
        for request in server.requests
    )
    assert sorted(asked.values()) == [9, 9]
    assert len({request.body["messages"][1]["content"] for request in server.requests}) == 18
    for request in server.requests:
        assert "精简有效，回归肌肤本源" in request.body["messages"][0]["content"]
        assert "{" not in request.body["messages"][1]["content"]  # every mark is filled in
    assert {row["source"] for row in read_jsonl(tmp_path / "raw.jsonl")} == {"m"}


def test_a_dry_run_costs_nothing_and_leaves_nothing(with_api, tmp_path):
    with ChatServer() as server:
        prices = ("--price-in", "2", "--price-out", "8")
        done = with_api(server, "13_write_copy.py", "--dry-run", *prices, "--output-file", "raw.jsonl")
    assert server.requests == [] and not any(tmp_path.iterdir())
    assert "189 requests, 0 of them answered" in done.stdout and "cost about" in done.stdout


def test_what_is_no_copy_is_left_out_and_counted(with_api, tmp_path):
    replies = [
        {"content": "写到一半", "finish_reason": "length"},
        "I'm sorry, but I can't help with that.",
        "<think>先想想。</think>\n想好的文案。",
        "Error 503: upstream timed out",
    ]
    with ChatServer(reply=lambda body: replies.pop()) as server:
        types = ("--copy-types", "paid_ad_fab", "paid_ad_pas", "paid_ad_bab", "paid_ad_cta")
        done = with_api(server, "13_write_copy.py", "--max-products", "1", *types, "--output-file", "raw.jsonl")
    assert [row["copy"] for row in read_jsonl(tmp_path / "raw.jsonl")] == ["想好的文案。"]
    assert "left out      2  not Chinese" in done.stdout and "left out      1  cut off at max_tokens" in done.stdout


def test_failed_requests_fail_the_stage_and_the_same_command_goes_on(with_api, tmp_path):
    flags = ("--max-products", "1", "--max-tries", "1", "--concurrency", "1", "--output-file", "raw.jsonl")
    with ChatServer(reply=lambda body: "文案。", script=["ok", "500", "drop"]) as server:
        done = with_api(server, "13_write_copy.py", *flags, check=False)
        assert (
            done.returncode == 2 and "2 of 9 copies without an answer" in done.stderr and "Traceback" not in done.stderr
        )
        assert not (tmp_path / "raw.jsonl").exists()
        assert read_json(tmp_path / "raw.run.json")["figures"]["api"]["faults"]["HTTP 500"] == 1
        with_api(server, "13_write_copy.py", *flags)
    assert len(server.requests) == 9 + 2 and len(read_jsonl(tmp_path / "raw.jsonl")) == 9


# --- 14: cleaning


def test_every_planted_defect_is_found():
    rows = read_jsonl(PLANTED)
    assert len(rows) == 60
    missed = [
        (row["id"], kind)
        for row in rows
        for kind in row["defects"]
        if kind not in {problem.kind for problem in task.problems(row["copy"], row)}
    ]
    assert missed == []
    assert {kind for row in rows for kind in row["defects"]} == {
        "tag",
        "markdown",
        "forbidden_word",
        "exclamation",
        "missing_cta",
        "flat_persona",
    }


def test_no_clean_copy_is_touched(offline, golden):
    folder = offline(14)
    assert {(row["product_id"], row["copy_type"]): row["copy"] for row in read_jsonl(folder / "clean.jsonl")} == golden
    assert read_jsonl(folder / "clean_rejects.jsonl") == []


def test_rules_fix_marks_and_leave_out_what_needs_a_writer(run_stage, tmp_path):
    run_stage("14_clean_copy.py", "--copies-file", PLANTED, "--output-file", "clean.jsonl")
    passed = {row["id"]: row for row in read_jsonl(tmp_path / "clean.jsonl")}
    rejects = read_jsonl(tmp_path / "clean_rejects.jsonl")
    planted = read_jsonl(PLANTED)
    assert {row["id"] for row in rejects if row["round"] == 0} == {row["id"] for row in planted}
    marks = {"tag", "markdown", "exclamation"}
    for row in planted:
        if row["id"] in passed:
            assert set(row["defects"]) <= marks and passed[row["id"]]["fixed_by"] == "rules"
            assert task.problems(passed[row["id"]]["copy"], row) == []
        else:
            last = [reject for reject in rejects if reject["id"] == row["id"]][-1]
            assert last["round"] == 1 and last["problems"]
    fixable = [row["id"] for row in planted if set(row["defects"]) <= marks]
    assert set(fixable) == set(passed)


def test_a_model_rewrites_only_what_fails_until_it_passes(with_api, tmp_path, golden):
    planted = read_jsonl(PLANTED)[-10:]
    rows = [{key: row[key] for key in ("id", "product_id", "copy_type", "copy")} for row in planted]
    clean = ("p20", "paid_ad_cta")
    rows.append({"id": "fine", "product_id": clean[0], "copy_type": clean[1], "copy": golden[clean]})
    (tmp_path / "raw.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    seen = Counter()

    def rewrite(body: dict) -> str:
        """First an exclamation mark too many, then the golden copy of that product and type."""
        text = body["messages"][1]["content"]
        product, kind = next(
            key
            for key in golden
            if task.products()[key[0]]["name"] in text.split("\n")[0]
            and f"这篇{task.COPY_TYPES[key[1]].label}没有" in text
        )
        seen[product, kind] += 1
        return golden[product, kind] + ("！" if seen[product, kind] == 1 else "")

    with ChatServer(reply=rewrite) as server:
        done = with_api(server, "14_clean_copy.py", "--copies-file", "raw.jsonl", "--output-file", "clean.jsonl")
    passed = {row["id"]: row for row in read_jsonl(tmp_path / "clean.jsonl")}
    assert len(passed) == 11, done.stdout
    assert (
        passed["fine"]["round"] == 0 and passed["fine"]["fixed_by"] is None and passed["fine"]["copy"] == golden[clean]
    )
    rewritten = [row for row in passed.values() if row["fixed_by"] == "m"]
    assert {row["round"] for row in rewritten} == {3} and clean not in seen
    assert len(server.requests) == 2 * len(rewritten)
    rejects = read_jsonl(tmp_path / "clean_rejects.jsonl")
    for row in rewritten:
        rounds = [reject for reject in rejects if reject["id"] == row["id"]]
        assert [reject["round"] for reject in rounds] == [0, 1, 2]
        assert any(problem["kind"] == "exclamation" for problem in rounds[2]["problems"])
    # the writer is told what is wrong
    assert any("最后一句不是行动号召" in request.body["messages"][1]["content"] for request in server.requests)


def test_what_never_passes_is_left_out_after_the_last_round(with_api, tmp_path):
    with ChatServer(reply=lambda body: "家人们，神器！") as server:
        flags = ("--copies-file", PLANTED, "--max-rounds", "4", "--output-file", "clean.jsonl")
        with_api(server, "14_clean_copy.py", *flags)
    figures = read_json(tmp_path / "clean.run.json")["figures"]
    assert figures["passed"] + figures["left_out"] == 60 and [r["passed"] for r in figures["rounds"][2:]] == [0, 0, 0]
    # the same copy of one product fails the same way in each round: asked anew each time, not answered by the log
    assert all(count == 1 for count in Counter(row["id"] for row in read_jsonl(tmp_path / "log.jsonl")).values())


# --- 15: rejected copy


def test_the_mix_is_the_target_within_a_row_and_every_fault_is_there(offline):
    folder = offline(15)
    copies = {row["id"]: row["copy"] for row in read_jsonl(folder / "clean.jsonl")}
    rows = read_jsonl(folder / "rejected.jsonl")
    kinds = Counter(row["kind"] for row in rows)
    for kind, share in (("weak", 0.5), ("exaggerated", 0.3), ("false", 0.2)):
        assert abs(kinds[kind] - share * len(rows)) <= 2  # one row in each split
    for row in rows:
        found = {problem.kind for problem in task.problems(row["rejected"], row)}
        assert row["rejected"] != copies[row["id"]]
        if row["kind"] == "exaggerated":
            assert found & {"forbidden_word", "exclamation"}
        if row["kind"] == "false":
            assert "fact" in found and not found & {"forbidden_word", "exclamation"}


def test_length_does_not_tell_and_the_report_says_what_does(offline):
    folder = offline(15)
    leakage = read_json(folder / "rejected.run.json")["figures"]["leakage"]
    assert set(leakage) == {"all", "weak", "exaggerated", "false"}
    assert leakage["all"]["length"] < 0.65 and 0.97 < leakage["all"]["length_ratio"] < 1.03
    assert leakage["false"]["characters"] < 0.65
    assert leakage["exaggerated"]["characters"] > 0.9  # hype lies in its words: reported, not hidden


def test_false_copies_differ_in_their_facts_only(offline):
    copies = {row["id"]: row["copy"] for row in read_jsonl(offline(15) / "clean.jsonl")}
    for row in read_jsonl(offline(15) / "rejected.jsonl"):
        if row["kind"] == "false":
            good, bad = copies[row["id"]], row["rejected"]
            assert task.products()[row["product_id"]]["name"] in bad
            assert task.sentences(good) and len(task.sentences(good)) == len(task.sentences(bad))
            assert row["change"] and 1 <= len(row["change"].split("; ")) <= 2


def test_a_shuffled_copy_keeps_its_characters(golden):
    for (product_id, kind), copy in golden.items():
        row = {
            "id": "x",
            "copy": copy,
            "product": task.products()[product_id],
            "meta": {"product_id": product_id, "copy_type": kind},
        }
        if made := copy_faults.shuffled(row, [], random.Random(1)):
            assert sorted(made[0]) == sorted(copy) and made[0] != copy


def test_an_answer_that_shows_no_fault_gives_way_to_the_rules(with_api, offline, tmp_path):
    offline(14)

    def reply(body: dict) -> str:
        text = body["messages"][-1]["content"]
        if "推销腔" in text:
            return text.split("原文：\n")[1].split("\n\n只输出")[0] + "绝绝子！"
        return text.split("原文：\n")[1].split("\n\n只输出")[0] if "原文" in text else "这款产品很好，值得一试。"

    with ChatServer(reply=reply) as server:
        flags = ("--weak-model", "small", "--golden-file", "clean.jsonl", "--output-file", "rejected.jsonl")
        done = with_api(server, "15_write_rejected.py", *flags)
    rows = read_jsonl(tmp_path / "rejected.jsonl")
    sources = Counter((row["kind"], row["source"]) for row in rows)
    assert set(sources) == {
        ("weak", "small"),
        ("exaggerated", "m"),
        ("false", "rules"),
    }  # the false ones came back unchanged
    assert f"{sources['false', 'rules']}  false: the answer does not show the fault; made by rule" in done.stdout
    weak = [request.body for request in server.requests if request.body["model"] == "small"]
    assert len(weak) == sources["weak", "small"] and all(len(body["messages"][0]["content"]) < 60 for body in weak)


# --- 16: training files


def test_the_training_files_are_split_by_product(offline):
    out = offline(16) / "out"
    products = task.products()
    for split, count in (("train", 135), ("val", 54)):
        sft, pref = read_jsonl(out / f"sft_{split}.jsonl", "sft"), read_jsonl(out / f"pref_{split}.jsonl", "preference")
        assert len(sft) == len(pref) == count
        assert {products[row["meta"]["product_id"]]["split"] for row in sft + pref} == {split}
        assert all(row["prompt"] == task.messages(row["meta"]) for row in sft + pref)
        assert all(task.problems(row["completion"][0]["content"], row["meta"]) == [] for row in sft)
    prompts = read_jsonl(out / "prompts_test.jsonl", "prompts")
    assert len(prompts) == 171 and not (out / "sft_test.jsonl").exists()
    assert all("reference" in row["meta"] for row in read_jsonl(out / "prompts_val.jsonl"))


def test_the_csv_opens_in_a_spreadsheet(offline):
    raw = (offline(16) / "out" / "pairs.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf")
    rows = list(csv.DictReader(raw.decode("utf-8-sig").splitlines(keepends=True)))
    assert len(rows) == 189 and all(row["chosen"] and row["rejected"] and row["kind"] for row in rows)
    assert any("\n" in row["chosen"] for row in rows)


def test_a_product_of_ones_own_brings_its_sheet_along(run_stage, tmp_path, golden):
    product = {**task.products()["p01"], "id": "mine", "name": "自制洁面乳"}
    (tmp_path / "products.jsonl").write_text(json.dumps(product, ensure_ascii=False) + "\n", encoding="utf-8")
    copy = golden["p01", "paid_ad_cta"].replace("氨基酸净润洁面乳", "自制洁面乳")
    row = {"product_id": "mine", "copy_type": "paid_ad_cta", "copy": copy}
    (tmp_path / "copies.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    shared = ("--products-file", "products.jsonl", "--golden-file", "copies.jsonl")
    run_stage("16_prepare_copy.py", *shared, "--rejected-file", "None", "--output-dir", "out")
    row = read_jsonl(tmp_path / "out" / "sft_train.jsonl", "sft")[0]
    assert row["meta"]["product"] == product and "自制洁面乳" in row["prompt"][0]["content"]
    assert task.problems(copy, row["meta"]) == []


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("13_write_copy.py", ("--copy-types", "haiku"), "--copy-types haiku: unknown"),
        ("13_write_copy.py", ("--products-file", "broken.jsonl"), "broken.jsonl:1: missing or of the wrong type: name"),
        ("13_write_copy.py", ("--model", "m", "--extra-body", "{a}"), "--extra-body {a}: not JSON"),
        ("13_write_copy.py", ("--model", "m"), "OPENAI_API_KEY is not set"),
        ("14_clean_copy.py", ("--copies-file", "broken.jsonl"), "product_id None is not among the products"),
        ("15_write_rejected.py", ("--golden-file", str(GOLDEN), "--weak", "0.9"), "add up to 1.4"),
        ("15_write_rejected.py", ("--golden-file", "none.jsonl"), "none.jsonl: no such file"),
        (
            "16_prepare_copy.py",
            ("--golden-file", str(GOLDEN), "--rejected-file", "broken.jsonl"),
            "none of the golden copies",
        ),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(run_stage, tmp_path, script, flags, says):
    (tmp_path / "broken.jsonl").write_text('{"id": "p01"}\n', encoding="utf-8")
    output = ("--output-dir", "out") if script.startswith("16") else ("--output-file", "out.jsonl")
    done = run_stage(script, *flags, *output, check=False, env={"OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""})
    assert done.returncode == 2 and says in done.stderr and "fix:" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jsonl"]
