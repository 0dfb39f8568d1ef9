"""A judge's replies: every shape that is read, numbers that are no score, rotated orders, equal length, prompts."""

import json
import math
import random

import pytest

from common.judging.aggregate import combine, length_controlled
from common.judging.prompts import conversation_text, load_prompt, rotations
from common.judging.replies import TIE, Reply, parse_reply
from common.settings import UserError
from conftest import ROOT

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
    "a draft, then the answer": BODY.replace('"韵律": 4', '"韵律": 3').replace('"best": 1', '"best": 2')
    + f"\n更正：\n{BODY}",
    "numbers in strings": BODY.replace("2.5", '"2.5"').replace(": 4", ': "4"'),
    "out of five": BODY.replace("2.5", '"2.5/5"').replace(": 4,", ': "4 / 5",'),
    "with 分": BODY.replace("2.5", '"2.5分"').replace(": 4,", ': "四分",'),
    "floats": BODY.replace(": 4,", ": 4.0,").replace(": 5}", ": 5.00}"),
    "full-width punctuation": BODY.replace('"', "”").replace(":", "：").replace(",", "，"),
    "single quotes": BODY.replace('"', "'"),
    "trailing commas": BODY.replace("}}]", "},},]").replace('"best": 1', '"best": 1,'),
    "a comment": BODY.replace('"best": 1', '\n"best": 1 // 文本1 更好\n'),
    "bare keys": BODY.replace('"texts"', "texts").replace('"best"', "best").replace('"id"', "id"),
    "texts named A and B": BODY.replace('"id": 1', '"id": "A"')
    .replace('"id": 2', '"id": "B"')
    .replace('"best": 1', '"best": "A"'),
    "texts named 文本1": BODY.replace('"id": 1', '"id": "文本1"').replace('"best": 1', '"best": "文本1"'),
    "best as 第1篇": BODY.replace('"best": 1', '"best": "第1篇"'),
    "best as 第一篇文案": BODY.replace('"best": 1', '"best": "第一篇文案"'),
    "texts in another order": '{"texts": [{"id": 2, "scores": {"韵律": 2.5, "主题": 3}}, '
    '{"id": 1, "scores": {"韵律": 4, "主题": 5}}], "best": 1}',
    "scores beside the id": '{"texts": [{"id": 1, "韵律": 4, "主题": 5}, '
    '{"id": 2, "韵律": 2.5, "主题": 3}], "best": 1}',
    "names in a list behind it": f'{BODY}\n排名：["文本1", "文本2"]',
    "numbers in a list behind it": f"{BODY}\n总分：[9, 5.5]",
    "a bare list": '[{"韵律": 4, "主题": 5}, {"韵律": 2.5, "主题": 3}]',
    "an object by number": '{"1": {"韵律": 4, "主题": 5}, "2": {"韵律": 2.5, "主题": 3}, "best": "1"}',
    "an object by label": '{"文本1": {"韵律": 4, "主题": 5, "理由": "工整"}, '
    '"文本2": {"韵律": 2.5, "主题": 3}, "最佳": "文本1"}',
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
}

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
    "names in a list": '{"best": ["文本1", "文本2"]}',
    "numbers in a list": '{"scores": [4, 2.5]}',
    "null in a list": '[null, {"韵律": 4, "主题": 5}]',
    "a number without end": BODY.replace('"id": 2', f'"id": "{"2" * 5000}"'),
    "an error page": '<html><body>{"error": {"message": "upstream error"}}</body></html>',
}


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


# --- numbers that are no score: each block is what a judge says of one text, on 相关 and 准确; right is (5, 4)

SAID = {
    "numbered points, then the score": "相关：\n1. 用了法语。\n2. 意思相同。\n得分：5\n准确：\n1. 无误。\n得分：4",
    "points with 、": "相关：\n1、用了法语。\n2、意思相同。\n得分：5\n准确：\n1、无误。\n2、略短。\n得分：4",
    "points with )": "相关：\n1) 用了法语。\n2) 意思相同。\n得分：5 分\n准确：\n(1) 无误。\n（2）略短。\n得分：4 分",
    "circled points": "相关：① 用了法语 ② 意思相同，5 分\n准确：① 无误，4 分",
    "Chinese points": "相关：\n一、用了法语。\n二、意思相同。\n得分：五分\n准确：\n一、无误。\n得分：四分",
    "points in a line": "相关：1. 用了法语。2. 意思相同。得分：5\n准确：1. 无误。2. 略短。得分：4",
    "numbered dimensions": "1. 相关：5\n2. 准确：4",
    "numbered bold dimensions": "1. **相关**：5\n2. **准确**：4",
    "weights": "相关（权重 1.0）：5\n准确（权重0.5）：4",
    "weights behind": "相关：1.0 权重，5 分\n准确：0.5权重，4 分",
    "weights before": "相关：权重 1.0，得分 5\n准确：权重：2，得分 4",
    "weights in percent": "相关（40%）：5\n准确：占 60%，4 分",
    "a factor": "相关：5 × 1.0\n准确：4 x 0.5",
    "years": "相关：2024年的用法，5 分\n准确：1998 年版如此，得分：4",
    "dates": "相关：2024-05-01 前后的说法，5分\n准确：5月3日一句有误，4分",
    "the scale": "相关（满分5分）：5\n准确（1-5分）：4",
    "the scale behind": "相关：5（满分 5 分）\n准确：4 分（1~5 分）",
    "fractions": "相关：5/5\n准确：4/5 分",
    "fractions spaced": "相关: 5 / 5\n准确: 4 ／ 5",
    "Chinese numerals": "相关：五分\n准确：四",
    "bold": "**相关**：**5**\n**准确**：**4 分**",
    "bold colon": "**相关：** 5\n**准确：** 4",
    "stars": "相关：5星\n准确：4 颗星",
    "counts": "相关：3 处切题，2 个例子，5 分\n准确：有 1 处小误，4 分",
    "deductions": "相关：5 分\n准确：译名不妥扣 1 分，给 4 分",
    "a total behind": "相关：5\n准确：4\n总分：9\n平均分：4.5",
    "a reason in front": "相关：切题且自然，得分 5\n准确：大体无误：4",
    "another dimension in the reason": "相关：与准确一样好，5 分\n准确：比相关差，4 分",
    "headings": "### 相关\n说得好。\n得分：5\n### 准确\n略短。\n评分：4",
    "十分": "相关：十分切题，5 分\n准确：十分之一的词有误，4 分",
    "English": "相关: score 5\n准确: rated 4 points",
    "lists with dashes": "- 相关 - 5 分\n- 准确 - 4 分",
    "a table": "| 维度 | 得分 | 理由 |\n|---|---|---|\n| 相关 | 5 | 1. 切题 |\n| 准确 | 4 | 2 处略短 |",
    "a table with weights": "| 维度 | 权重 | 得分 |\n|---|---|---|\n| 相关 | 1.0 | 5 |\n| 准确 | 2.0 | 4 分 |",
}
NO_SCORE = {
    "points alone": "相关：\n1. 用了法语。\n2. 意思相同。\n准确：4",
    "points in a line alone": "相关：1. 用了法语。2. 意思相同。\n准确：4",
    "a weight alone": "相关：权重 1.0\n准确：4",
    "a weight in front alone": "相关：1.0 权重\n准确：4",
    "a year alone": "相关：2024 年\n准确：4",
    "a count alone": "相关：3 处切题\n准确：4",
    "percent alone": "相关：5%\n准确：4",
    "a range": "相关：3-5 分\n准确：4",
    "another scale": "相关（满分10分）：5\n准确：4",
    "another scale's fraction": "相关：5/10\n准确：4",
    "above the scale": "相关：7 分\n准确：4",
    "two scores": "相关：用词 5 分，句法 3 分\n准确：4",
    "a word": "相关：一般\n准确：4",
}


def two(said: str) -> str:
    """The same said of two texts."""
    return f"文本1：\n{said}\n\n文本2：\n{said}\n\n最佳：平局"


@pytest.mark.parametrize("name", SAID)
def test_a_number_that_is_no_score_is_not_taken_for_one(name):
    scores = {"相关": 5.0, "准确": 4.0}
    assert parse_reply(two(SAID[name]), 2, ["相关", "准确"]) == Reply([scores, scores], TIE)
    one = {
        "texts": [
            {"id": i, "scores": dict(zip(("相关", "准确"), SAID[name].split("\n准确", 1), strict=False))}
            for i in (1, 2)
        ]
    }
    if "\n准确：" in SAID[name] and "总分" not in SAID[name]:
        relevant, _, right = SAID[name].partition("\n准确")
        texts = [{"id": i, "相关": relevant.lstrip("*# ").removeprefix("相关"), "准确": right} for i in (1, 2)]
        one = json.dumps({"texts": texts, "best": "平局"}, ensure_ascii=False)
        assert parse_reply(one, 2, ["相关", "准确"]) == Reply([scores, scores], TIE)


@pytest.mark.parametrize("name", NO_SCORE)
def test_without_a_score_a_reply_stays_unparsed(name):
    assert parse_reply(two(NO_SCORE[name]), 2, ["相关", "准确"]) is None


def test_half_points_in_words():
    assert parse_reply(two("相关：四分半\n准确：三点五分"), 2, ["相关", "准确"]).scores[0] == {"相关": 4.5, "准确": 3.5}


@pytest.mark.parametrize(
    "reply",
    [
        "相关：\n- 文本1：5 分\n- 文本2：4 分\n\n准确：\n- 文本1：4 分\n- 文本2：3 分\n\n最佳：文本1（更切题）",
        "1. 相关：文本1 5分，文本2 4分\n2. 准确：文本1 4分，文本2 3分\n最佳：1",
        (
            "| 维度 | 权重 | 文本1 | 文本2 |\n|---|---|---|---|\n| 相关 | 1.0 | **5** | 4 |\n| 准确 | 2.0 | 4/5 | 3分 |"
            "\n\n最佳：文本1"
        ),
        "| 排名 | 文本 | 相关 | 准确 |\n|---|---|---|---|\n| 1 | 2 | 4 | 3 |\n| 2 | 1 | 5 | 4 |\n\n最佳文本：1",
    ],
)
def test_scores_by_dimension_and_tables_the_other_way_round(reply):
    assert parse_reply(reply, 2, ["相关", "准确"]) == Reply([{"相关": 5.0, "准确": 4.0}, {"相关": 4.0, "准确": 3.0}], 0)


# --- broken JSON

REASON = '{"texts": [{"id": 1, "scores": {"韵律": 4, "主题": 5}, "理由": "%s"}, '
REASON += '{"id": 2, "scores": {"韵律": 2.5, "主题": 3}}], "best": 1}'


@pytest.mark.parametrize(
    "reason",
    [
        "第一行\n第二行",
        "列\t表\r\n",
        '用了"我饿了"的说法',
        '他说"好"',
        '"好"是他说的',
        '一个"引号',
        '他说"好", 但不合',
        "用了“我饿了”，甚好",
        '括号 ] } 在"里 [ {"面',
    ],
)
def test_raw_line_ends_and_quotes_inside_strings_are_read(reason):
    assert parse_reply(REASON % reason, 2, DIMENSIONS) == WHOLE
    assert parse_reply(f"评分如下：\n```json\n{REASON % reason}\n```", 2, DIMENSIONS) == WHOLE


def test_brackets_without_end_are_given_up_soon():
    for text in ("[" * 200_000, '{"a": ' * 50_000, '["' * 50_000, "[a " * 50_000):
        assert parse_reply(text, 2, DIMENSIONS) is None
    assert parse_reply("[" * 100 + BODY, 2, DIMENSIONS) == WHOLE


def test_a_conversation_is_shown_whole():
    assert conversation_text([{"role": "user", "content": "写诗"}]) == "写诗"
    turns = [("system", "只用法语。"), ("user", "我饿了"), ("assistant", "J'ai faim."), ("user", "换个说法。")]
    shown = conversation_text([{"role": role, "content": content} for role, content in turns])
    assert shown == "系统：只用法语。\n\n用户：我饿了\n\n助手：J'ai faim.\n\n用户：换个说法。"


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
