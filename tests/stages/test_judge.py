"""Stage 71: reading replies, rotated orders, length control, the report; a real server on loopback, a real client."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from chat_server import ChatServer
from common.jsonl import read_jsonl
from common.judging.report import columns
from conftest import ROOT, SCRIPTS

# --- the stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two generation files on the val products' prompts: `sft` cuts golden copies short, `base` shuffles them."""
    from tasks import copywriting

    random.seed(0)
    path = tmp_path_factory.mktemp("judge")
    golden = [row for row in read_jsonl(ROOT / "data/copywriting/golden.jsonl") if row["product_id"] in ("p04", "p06")]
    for name in ("sft", "base"):
        rows = []
        for number, row in enumerate(golden):
            meta = {"product_id": row["product_id"], "copy_type": row["copy_type"]}
            text = row["copy"][: len(row["copy"]) // 2] if name == "sft" else "".join(random.sample(row["copy"], 60))
            rows.append(
                {
                    "id": f"{number:04d}#0",
                    "prompt_id": f"{number:04d}",
                    "sample": 0,
                    "seed": 42,
                    "prompt": copywriting.messages(meta),
                }
                | {"completion": text, "reference": row["copy"], "model": name, "meta": meta, "tokens": 60}
                | {"finish_reason": "stop" if name == "sft" or number % 2 else "length"}
            )
        (path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return path


def judge(run_stage, folder, out, *flags, server=None, **options):
    env = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "test-key"} if server else {"OPENAI_API_KEY": ""}
    return run_stage(
        "71_judge.py",
        "--task",
        "copywriting",
        "--candidates",
        "golden",
        f"finetuned={folder}/sft.jsonl",
        f"base={folder}/base.jsonl",
        "--generations",
        folder,
        "--output-file",
        out / "{name}.jsonl",
        "--request-log",
        out / "requests.jsonl",
        "--bootstrap",
        200,
        *flags,
        env=env,
        **options,
    )


def shown(body: dict) -> tuple[list[str], list[str]]:
    """The texts of a question to the judge, and its dimensions."""
    asked = body["messages"][-1]["content"]
    texts = re.findall(r"<文本\d>\n(.*?)\n</文本\d>", asked, re.DOTALL)
    return texts, list(json.loads(asked[asked.rindex('{"texts"') :])["texts"][0]["scores"])


def says(texts: list[str], dimensions: list[str], score, best) -> str:
    rows = [{"id": i + 1, "scores": dict.fromkeys(dimensions, score(i, text))} for i, text in enumerate(texts)]
    return json.dumps({"texts": rows, "best": best(texts)}, ensure_ascii=False)


def likes_long(body: dict, low: float = 2) -> str:
    """A judge that looks at the texts, not at their places."""
    texts, dimensions = shown(body)
    top = max(map(len, texts))
    return says(
        texts,
        dimensions,
        lambda i, text: 4.5 if len(text) == top else low,
        lambda t: "平局" if t[0] == t[1] else list(map(len, t)).index(top) + 1,
    )


def likes_first(body: dict) -> str:
    texts, dimensions = shown(body)
    return says(texts, dimensions, lambda i, text: 5 if i == 0 else 3, lambda t: 1)


def test_rules_judge_without_an_api_and_say_so(run_stage, folder, tmp_path):
    done = judge(run_stage, folder, tmp_path)
    report = (tmp_path / "rules.txt").read_text(encoding="utf-8")
    for part in (
        "=== 评测统计报告 ===",
        "总评测数据: 18 条",
        "没有调用任何语言模型",
        "按内容类型统计",
        "最佳模型统计",
        "整体平均分",
    ):
        assert part in report and part in done.stdout
    header = next(line for line in report.splitlines() if line.startswith("content_type"))
    assert header.split() == ["content_type", "n", "golden_avg_score", "finetuned_avg_score", "base_avg_score"]
    assert re.search(r"A \(golden\): 18 次 \(100.0%", report) and re.search(r"base \(base\) +18 +50.0%", report)
    table = json.loads((tmp_path / "rules.run.json").read_text(encoding="utf-8"))["figures"]["table"]["rules"][
        "overall"
    ]
    assert table["golden"][1] > table["finetuned"][2] > table["base"][2]


def test_the_table_opens_in_a_spreadsheet(run_stage, folder, tmp_path):
    judge(run_stage, folder, tmp_path)
    assert (tmp_path / "rules.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    with open(tmp_path / "rules.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    golden = [row for row in read_jsonl(ROOT / "data/copywriting/golden.jsonl") if row["product_id"] in ("p04", "p06")]
    assert [row["golden_answer"] for row in rows] == [row["copy"] for row in golden]
    assert {"prompt", "finetuned_model_output", "base_model_output", "golden_score", "base_score", "best"} <= set(
        rows[0]
    )


def test_a_fair_judge_is_trusted_and_its_report_comes_again_without_a_call(run_stage, folder, tmp_path):
    with ChatServer(reply=likes_long) as server:
        judge(run_stage, folder, tmp_path, "--judge", "some-model", "--control", 6, server=server)
        assert len(server.answered()) == len(server.requests) == 18 * 3 + 6
    report = (tmp_path / "some-model.txt").read_text(encoding="utf-8")
    assert "位置偏差率 (每种顺序都选同一个位置): 0.0%" in report and "判平 100.0%" in report
    assert "A (golden): 18 次 (100.0%" in report
    rows = read_jsonl(tmp_path / "some-model.jsonl")
    assert len(rows) == 18 + 6 and all(order["reply"] for row in rows for order in row["orders"])
    before = [(tmp_path / f"some-model.{ending}").read_bytes() for ending in ("txt", "csv", "jsonl")]
    judge(
        run_stage, folder, tmp_path, "--judge", "some-model", "--control", 6, "--report-only", "--overwrite"
    )  # no server, no key
    assert [(tmp_path / f"some-model.{ending}").read_bytes() for ending in ("txt", "csv", "jsonl")] == before


def test_a_judge_that_prefers_the_first_place_is_exposed(run_stage, folder, tmp_path):
    with ChatServer(reply=likes_first) as server:
        judge(run_stage, folder, tmp_path, "--judge", "biased", server=server)
    table = json.loads((tmp_path / "biased.run.json").read_text(encoding="utf-8"))["figures"]["table"]["v1"]
    assert table["trust"]["position_bias_rate"][0] > 0.9
    assert table["trust"]["picks_by_place"] == [1.0, 0.0, 0.0] and table["trust"]["control"]["first"] == 1.0
    assert {row["win_rate"][0] for row in table["wins"].values()} == {0.5}
    assert table["best"]["tie"]["count"] == 18


def test_unparsed_replies_are_counted_and_never_score_0(run_stage, folder, tmp_path):
    def sometimes(body: dict) -> str:
        texts, _ = shown(body)
        return "抱歉，无法评价。" if "氧化锌" in body["messages"][-1]["content"] else likes_long(body)

    with ChatServer(reply=sometimes) as server:
        done = judge(run_stage, folder, tmp_path, "--judge", "shy", "--control", 0, server=server)
    assert "warning: 50% of the replies could not be read" in done.stdout
    table = json.loads((tmp_path / "shy.run.json").read_text(encoding="utf-8"))["figures"]["table"]["v1"]
    assert table["trust"]["unparsed"] == 0.5 and table["undecided"] == 9
    assert table["overall"]["golden"][0] == 4.5 and table["overall"]["base"][0] == 2.0
    assert "未定 (可解析的顺序不足): 9 次" in (tmp_path / "shy.txt").read_text(encoding="utf-8")


def test_two_versions_are_compared_on_the_same_texts(run_stage, folder, tmp_path):
    def milder(body: dict) -> str:
        return likes_long(body, low=3 if "评分步骤" in body["messages"][-1]["content"] else 2)  # only v2 has steps

    with ChatServer(reply=milder) as server:
        judge(run_stage, folder, tmp_path, "--judge", "m", "--prompt-versions", "v1", "v2", server=server)
    report = (tmp_path / "m.txt").read_text(encoding="utf-8")
    assert "提示词版本对比（同一批文本，v1 与 v2）" in report and "停止率" in report
    assert re.search(r"base +2.00 \[2.00, 2.00\] +3.00 \[3.00, 3.00\] +\+1.00", report)
    assert "最佳结论一致: 100.0%" in report


def test_a_dry_run_counts_and_asks_nothing(run_stage, folder, tmp_path):
    done = judge(
        run_stage, folder, tmp_path, "--judge", "m", "--control", 6, "--dry-run", "--price-in", 1, "--price-out", 2
    )
    assert "60 requests" in done.stdout and "nothing asked" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_killed_judge_goes_on_and_asks_nothing_twice(folder, tmp_path):
    def start(server):
        flags = [
            "--task",
            "copywriting",
            "--candidates",
            f"finetuned={folder}/sft.jsonl",
            f"base={folder}/base.jsonl",
            "--judge",
            "m",
        ]
        flags += [
            "--generations",
            folder,
            "--output-file",
            tmp_path / "m.jsonl",
            "--request-log",
            tmp_path / "log.jsonl",
        ]
        env = {**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "test-key"}
        return subprocess.Popen(
            [sys.executable, SCRIPTS / "71_judge.py", *flags, "--concurrency", "2", "--bootstrap", "50"], env=env
        )

    with ChatServer(reply=likes_long, latency=0.1) as server:
        process = start(server)
        while len(server.answered()) < 10:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        logged = {row["id"] for row in read_jsonl(tmp_path / "log.jsonl")}
        assert 8 <= len(logged) < 36 and not (tmp_path / "m.txt").exists()
        assert start(server).wait() == 0
        # 18 items in two orders, 18 controls; two were under way at the kill: answered, but nobody was there to keep
        # the answer
        assert len(server.answered()) == 54 and sum(server.answered().values()) <= 54 + 2
    assert len(read_jsonl(tmp_path / "m.jsonl")) == 18 * 2


@pytest.mark.parametrize(("task", "dimension"), [("poems", "韵律"), ("weibo", "有趣")])
def test_other_tasks_have_a_judge_too(run_stage, tmp_path, task, dimension):
    for name in ("one", "two"):
        rows = [
            {
                "id": f"{i}#0",
                "prompt_id": str(i),
                "sample": 0,
                "seed": 1,
                "prompt": [{"role": "user", "content": f"写一篇，第{i}题"}],
            }
            | {"completion": "短" if name == "one" else "长一些的", "reference": None, "model": name, "tokens": 3}
            | {"meta": {}, "finish_reason": "stop"}
            for i in range(4)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with ChatServer(reply=likes_long) as server:
        run_stage(
            "71_judge.py",
            "--task",
            task,
            "--candidates",
            "one=one.jsonl",
            "two=two.jsonl",
            "--judge",
            "m",
            "--bootstrap",
            50,
            "--generations",
            tmp_path,
            "--output-file",
            "out/m.jsonl",
            "--request-log",
            "out/log.jsonl",
            env={"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "test-key"},
        )
    report = (tmp_path / "out/m.txt").read_text(encoding="utf-8")
    assert dimension in report and "B (two): 4 次 (100.0%" in report


def test_report_only_refuses_what_was_never_asked(run_stage, folder, tmp_path):
    done = judge(run_stage, folder, tmp_path, "--judge", "m", "--control", 0, "--report-only", check=False)
    assert done.returncode == 2 and "54 of 54 replies are not in" in done.stderr and "Traceback" not in done.stderr


def finished(run_stage, folder, out) -> dict:
    """A finished run of stage 71 with a model; its files."""
    with ChatServer(reply=likes_long) as server:
        judge(run_stage, folder, out, "--judge", "m", "--control", 0, "--max-items", 2, server=server)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_overwrite_touches_nothing_where_nothing_can_be_asked_or_reported(run_stage, folder, tmp_path):
    before = finished(run_stage, folder, tmp_path)
    more = ("--judge", "m", "--control", 0, "--max-items", 3, "--overwrite")
    far = {"OPENAI_BASE_URL": "https://api.example.com/v1", "OPENAI_API_KEY": ""}
    for flags, env, says in (
        ((), far, "OPENAI_API_KEY is not set"),
        ((), {**far, "OPENAI_API_KEY": "“sk-abc”"}, "OPENAI_API_KEY: character 1"),
        (("--report-only",), far, "replies are not in"),
        (("--extra-body", '{"x": NaN}'), far, "--extra-body"),
        (("--time-limit", "nan"), far, "--time-limit"),
        (("--prompt-versions", "v9"), far, "no judge prompts"),
    ):
        args = (
            "--task",
            "copywriting",
            "--candidates",
            "golden",
            f"finetuned={folder}/sft.jsonl",
            f"base={folder}/base.jsonl",
        )
        args += (
            "--generations",
            folder,
            "--output-file",
            tmp_path / "{name}.jsonl",
            "--request-log",
            tmp_path / "requests.jsonl",
        )
        done = run_stage("71_judge.py", *args, *more, *flags, env=env, check=False)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def dialogue(name: str, completion: str) -> dict:
    turns = [
        ("system", "你是一名法语老师，只用法语回答。"),
        ("user", "请译“我饿了”。"),
        ("assistant", "J'ai faim."),
        ("user", "换个说法。"),
    ]
    prompt = [{"role": role, "content": content} for role, content in turns]
    row = {"id": "a#0", "prompt_id": "a", "sample": 0, "seed": 1, "prompt": prompt, "completion": completion}
    return row | {"reference": None, "model": name, "finish_reason": "stop", "tokens": 5, "meta": {}}


def test_judge_and_sheet_show_the_whole_conversation(run_stage, tmp_path):
    for name, text in (("one", "Je meurs de faim."), ("two", "我快饿死了。")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(dialogue(name, text)) + "\n", encoding="utf-8")
    (tmp_path / "prompts/v1").mkdir(parents=True)
    (tmp_path / "prompts/v1/chat.md").write_text(
        "维度：相关\n\n{instruction}\n{count}\n{texts}\n{format}", encoding="utf-8"
    )
    with ChatServer(reply=likes_long) as server:
        run_stage(
            "71_judge.py",
            "--task",
            "chat",
            "--candidates",
            "one=one.jsonl",
            "two=two.jsonl",
            "--judge",
            "m",
            "--bootstrap",
            50,
            "--prompts-dir",
            "prompts",
            "--generations",
            "nowhere",
            "--output-file",
            "out/m.jsonl",
            "--request-log",
            "out/log.jsonl",
            env={"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "test-key"},
        )
    run_stage(
        "73_human_sheet.py",
        "--task",
        "chat",
        "--kind",
        "pair",
        "--generations",
        "one.jsonl",
        "two.jsonl",
        "--output",
        "p.csv",
    )
    shown = [request.body["messages"][-1]["content"] for request in server.requests]
    assert len(shown) == 3  # two orders, one control
    for text in (
        *shown,
        (tmp_path / "p.csv").read_text(encoding="utf-8-sig"),
        (tmp_path / "out/m.csv").read_text(encoding="utf-8-sig"),
    ):
        parts = (
            "系统：你是一名法语老师，只用法语回答。",
            "用户：请译“我饿了”。",
            "助手：J'ai faim.",
            "用户：换个说法。",
        )
        assert all(part in text for part in parts)
        assert sorted(parts, key=text.index) == list(parts)


def test_an_id_that_stands_twice_is_refused(run_stage, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(dialogue(name, "x")) + "\n") * 2, encoding="utf-8")
    for words in (
        ("71_judge.py", "--task", "chat", "--candidates", "one=one.jsonl", "two=two.jsonl"),
        ("73_human_sheet.py", "--kind", "rating", "--generations", "one.jsonl", "--output", "p.csv"),
    ):
        done = run_stage(*words, check=False)
        assert done.returncode == 2 and "one.jsonl:2: the id 'a#0' stands in line 1 already" in done.stderr


def test_a_missing_file_is_named(run_stage, tmp_path):
    done = run_stage("71_judge.py", "--candidates", "golden", "x=nowhere.jsonl", check=False)
    assert done.returncode == 2 and "candidate x: no such file" in done.stderr


def test_columns_stand_under_each_other_with_chinese_words():
    assert columns(["a", "b"], [["韵律", "1"], ["x", "2"]]) == "a     b\n韵律  1\nx     2"
