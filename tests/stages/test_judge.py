"""Stage 71: reading replies, rotated orders, length control, the report; a real server on loopback, a real client."""

import csv
import json
import math
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
from common.judging.replies import TIE, Reply, combine, length_controlled, load_prompt, parse_reply, rotations
from common.judging.report import columns
from common.settings import UserError
from conftest import ROOT, SCRIPTS

DIMENSIONS = ["韵律", "主题"]
WHOLE = Reply([{"韵律": 4.0, "主题": 5.0}, {"韵律": 2.5, "主题": 3.0}], 0)
BODY = (
    '{"texts": [{"id": 1, "scores": {"韵律": 4, "主题": 5}}, {"id": 2, "scores": {"韵律": 2.5, "主题": 3}}], "best": 1}'
)

# name -> a reply that says WHOLE
GOOD = {
    "plain JSON": BODY,
    "fenced": f"```json\n{BODY}\n```",
    "fenced without a language": f"```\n{BODY}\n```",
    "chat around it": f"好的，以下是我的评分：\n{BODY}\n希望对你有帮助！",
    "thinking before it": f'<think>先看文本1，{{"韵律": 1}}？不对。</think>\n{BODY}',
    "a draft, then the answer": BODY.replace('"韵律": 4', '"韵律": 3').replace('"best": 1', '"best": 2') + f"\n更正：\n{BODY}",
    "numbers in strings": BODY.replace("2.5", '"2.5"').replace(": 4", ': "4"'),
    "out of five": BODY.replace("2.5", '"2.5/5"').replace(": 4,", ': "4 / 5",'),
    "with 分": BODY.replace("2.5", '"2.5分"').replace(": 4,", ': "四分",'),
    "floats": BODY.replace(": 4,", ": 4.0,").replace(": 5}", ": 5.00}"),
    "full-width punctuation": BODY.replace('"', "”").replace(":", "：").replace(",", "，"),
    "single quotes": BODY.replace('"', "'"),
    "trailing commas": BODY.replace("}}]", "},},]").replace('"best": 1', '"best": 1,'),
    "a comment": BODY.replace('"best": 1', '\n"best": 1 // 文本1 更好\n'),
    "bare keys": BODY.replace('"texts"', "texts").replace('"best"', "best").replace('"id"', "id"),
    "texts named A and B": BODY.replace('"id": 1', '"id": "A"').replace('"id": 2', '"id": "B"').replace('"best": 1', '"best": "A"'),
    "texts named 文本1": BODY.replace('"id": 1', '"id": "文本1"').replace('"best": 1', '"best": "文本1"'),
    "best as 第1篇": BODY.replace('"best": 1', '"best": "第1篇"'),
    "best as 第一篇文案": BODY.replace('"best": 1', '"best": "第一篇文案"'),
    "texts in another order": '{"texts": [{"id": 2, "scores": {"韵律": 2.5, "主题": 3}}, '
    '{"id": 1, "scores": {"韵律": 4, "主题": 5}}], "best": 1}',
    "scores beside the id": '{"texts": [{"id": 1, "韵律": 4, "主题": 5}, {"id": 2, "韵律": 2.5, "主题": 3}], "best": 1}',
    "a bare list": '[{"韵律": 4, "主题": 5}, {"韵律": 2.5, "主题": 3}]',
    "an object by number": '{"1": {"韵律": 4, "主题": 5}, "2": {"韵律": 2.5, "主题": 3}, "best": "1"}',
    "an object by label": '{"文本1": {"韵律": 4, "主题": 5, "理由": "工整"}, "文本2": {"韵律": 2.5, "主题": 3}, "最佳": "文本1"}',
    "by dimension": '{"韵律": {"1": 4, "2": 2.5}, "主题": {"1": 5, "2": 3}, "best": 1}',
    "lists by dimension": '{"韵律": [4, 2.5], "主题": [5, 3], "best": 1}',
    "a reason with each score": '{"texts": ['
    '{"id": 1, "scores": {"韵律": {"score": 4, "reason": "稳"}, "主题": {"score": 5, "reason": "切"}}}, '
    '{"id": 2, "scores": {"韵律": {"score": 2.5, "reason": "破"}, "主题": {"score": 3, "reason": "泛"}}}], "best": 1}',
    "wrapped": f'{{"result": {BODY}}}',
    "no best named": BODY.replace(', "best": 1', ""),
    "lines of prose": "文本1：韵律 4，主题 5\n文本2：韵律 2.5，主题 3\n最佳：文本1",
    "bold lines": "**文本1**：\n- 韵律：4 分\n- 主题：5 分\n\n**文本2**：\n- 韵律：2.5 分\n- 主题：3 分\n\n最佳：1",
    "a Markdown table": "| 文本 | 韵律 | 主题 |\n|---|---|---|\n| 1 | 4 | 5 |\n| 2 | 2.5 | 3 |\n\n最佳：1",
}  # fmt: skip

# name -> a reply that says nothing whole
BAD = {
    "nothing": "",
    "a refusal": "抱歉，我无法对这些内容进行评价。",
    "cut off": BODY[:70],
    "thinking cut off": f"<think>先打个草稿：{BODY}，不过",
    "one text missing": '{"texts": [{"id": 1, "scores": {"韵律": 4, "主题": 5}}], "best": 1}',
    "one dimension missing": BODY.replace(', "主题": 3', ""),
    "a score above the scale": BODY.replace("2.5", "7"),
    "a score of 0": BODY.replace("2.5", "0"),
    "NaN": BODY.replace("2.5", "NaN"),
    "null": BODY.replace("2.5", "null"),
    "a text twice": BODY.replace('"id": 2', '"id": 1'),
    "a best that is none of them": BODY.replace('"best": 1', '"best": 7'),
    "an error page": '<html><body>{"error": {"message": "upstream error"}}</body></html>',
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_reply_that_says_everything_is_read(name):
    assert parse_reply(GOOD[name], 2, DIMENSIONS) == WHOLE


@pytest.mark.parametrize("name", BAD)
def test_a_reply_that_does_not_say_everything_is_unparsed(name):
    assert parse_reply(BAD[name], 2, DIMENSIONS) is None


@pytest.mark.parametrize("word", ['"平局"', '"tie"', "null", "0", '"并列"', "[1, 2]"])
def test_a_tie_is_read(word):
    assert parse_reply(BODY.replace('"best": 1', f'"best": {word}'), 2, DIMENSIONS).best == TIE


def test_equal_scores_without_a_best_are_a_tie():
    assert parse_reply('[{"韵律": 4, "主题": 3}, {"韵律": 3, "主题": 4}]', 2, DIMENSIONS).best == TIE


# --- orders


def reply(best: int, count: int = 3, top: float = 5.0) -> Reply:
    return Reply([{"韵律": top if place == best else 3.0} for place in range(count)], best)


def test_each_candidate_stands_once_in_each_place():
    for count in (2, 3, 4):
        assert all(sorted(places) == list(range(count)) for places in zip(*rotations(count), strict=True))


def test_orders_that_agree_name_the_best():
    orders = rotations(3)
    verdict = combine([reply(order.index(1)) for order in orders], orders, ["a", "b", "c"])
    assert (verdict.best, verdict.bound, verdict.wins) == (1, False, {(0, 1): 0.0, (0, 2): 0.5, (1, 2): 1.0})
    assert verdict.scores == [{"韵律": 3.0}, {"韵律": 5.0}, {"韵律": 3.0}]


def test_orders_that_differ_are_a_tie():
    orders = rotations(2)
    verdict = combine([reply(0, 2), reply(0, 2)], orders, ["a", "b"])
    assert (verdict.best, verdict.bound, verdict.wins) == (TIE, True, {(0, 1): 0.5})


def test_an_unparsed_order_is_left_out_and_one_order_alone_decides_nothing():
    orders = rotations(3)
    two = combine([reply(orders[0].index(1)), None, reply(orders[2].index(1))], orders, ["a", "b", "c"])
    assert two.best == 1 and two.scores[0] == {"韵律": 3.0}
    one = combine([reply(0), None, None], orders, ["a", "b", "c"])
    assert (one.best, one.bound, one.wins[0, 1]) == (None, None, None) and one.scores[0] == {"韵律": 5.0}


def test_equal_texts_always_tie_and_are_no_sign_of_bias():
    orders = rotations(2)
    verdict = combine([reply(0, 2), reply(0, 2)], orders, ["same", "same"])
    assert (verdict.best, verdict.bound, verdict.wins) == (TIE, None, {(0, 1): 0.5})


# --- equal length


def test_a_judge_that_likes_length_is_corrected():
    """Here only the length decides, and one side writes longer texts most of the time."""
    random.seed(0)
    difference = [random.gauss(60, 80) for _ in range(400)]
    wins = [float(random.random() < 1 / (1 + math.exp(-d / 30))) for d in difference]
    assert sum(wins) / len(wins) > 0.7
    rate, low, high = length_controlled(wins, [d + 100 for d in difference], [100] * 400, samples=200)
    assert abs(rate - 0.5) < 0.08 and low < rate < high < 0.7


def test_a_judge_that_does_not_look_at_length_is_left_alone():
    random.seed(0)
    difference = [random.gauss(60, 80) for _ in range(400)]
    wins = [float(random.random() < 0.7) for _ in difference]
    rate = sum(wins) / len(wins)
    assert abs(length_controlled(wins, [d + 100 for d in difference], [100] * 400).mean - rate) < 0.04


def test_the_regression_is_that_of_scikit_learn():
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    difference, wins = rng.normal(40, 90, 80), rng.choice([0, 0.5, 1], 80, p=[0.3, 0.2, 0.5])
    x = np.tanh(difference / difference.std())[:, None]
    weight, y = np.concatenate([wins, 1 - wins]), np.repeat([1, 0], 80)
    model = LogisticRegression(tol=1e-8).fit(np.concatenate([x, x]), y, weight)
    expected = 1 / (1 + np.exp(-model.intercept_[0]))
    assert length_controlled(wins, difference, np.zeros(80)).mean == pytest.approx(expected, abs=1e-4)


# --- prompts

VERSIONS = sorted(path for path in ROOT.glob("data/*/judge_prompts/*/*.md"))


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: "/".join(path.parts[-4:]))
def test_every_shipped_prompt_shows_texts_and_format(path):
    prompt = load_prompt(path.parent, path.stem)
    asked = prompt.fill("写一篇", ["甲</文本1>乙", ""])
    assert "<文本1>\n甲＜/文本1>乙\n</文本1>" in asked and "<文本2>\n（空白）\n</文本2>" in asked and "写一篇" in asked
    example = asked[asked.rindex('{"texts"') :]
    answer = example.replace("1 到 2 的编号，或“平局”", "2")
    assert parse_reply(answer, 2, prompt.dimensions).best == 1


def test_the_promised_dimensions_are_there():
    assert load_prompt(ROOT / "data/poems/judge_prompts/v1", None).dimensions == ["韵律", "风格", "主题", "整体"]
    assert load_prompt(ROOT / "data/weibo/judge_prompts/v1", None).dimensions == ["相关", "有趣", "自然", "得体"]
    for version in ("v1", "v2"):
        for family in ("social", "ad", "long"):
            assert "指令遵循" in load_prompt(ROOT / "data/copywriting/judge_prompts" / version, family).dimensions


def test_a_prompt_without_its_marks_is_refused(tmp_path):
    (tmp_path / "ad.md").write_text("维度：韵律\n\n{texts}", encoding="utf-8")
    with pytest.raises(UserError, match="has the marks"):
        load_prompt(tmp_path, "ad")


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
        "71_judge.py", "--task", "copywriting", "--candidates", "golden", f"finetuned={folder}/sft.jsonl", f"base={folder}/base.jsonl",
        "--generations", folder, "--output-file", out / "{name}.jsonl", "--request-log", out / "requests.jsonl", "--bootstrap", 200,
        *flags, env=env, **options,
    )  # fmt: skip


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
        judge(run_stage, folder, tmp_path, "--judge", "shy", "--control", 0, server=server)
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
        # 18 items in two orders, 18 controls; two were under way at the kill: answered, but nobody was there to keep the answer
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
            "71_judge.py", "--task", task, "--candidates", "one=one.jsonl", "two=two.jsonl", "--judge", "m", "--bootstrap", 50,
            "--generations", tmp_path, "--output-file", "out/m.jsonl", "--request-log", "out/log.jsonl",
            env={"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "test-key"},
        )  # fmt: skip
    report = (tmp_path / "out/m.txt").read_text(encoding="utf-8")
    assert dimension in report and "B (two): 4 次 (100.0%" in report


def test_report_only_refuses_what_was_never_asked(run_stage, folder, tmp_path):
    done = judge(run_stage, folder, tmp_path, "--judge", "m", "--control", 0, "--report-only", check=False)
    assert done.returncode == 2 and "54 of 54 replies are not in" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_file_is_named(run_stage, tmp_path):
    done = run_stage("71_judge.py", "--candidates", "golden", "x=nowhere.jsonl", check=False)
    assert done.returncode == 2 and "candidate x: no such file" in done.stderr


def test_columns_stand_under_each_other_with_chinese_words():
    assert columns(["a", "b"], [["韵律", "1"], ["x", "2"]]) == "a     b\n韵律  1\nx     2"
