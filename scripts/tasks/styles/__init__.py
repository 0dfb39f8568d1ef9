"""Dialogue answers in five styles: labels and rows, the prompt, and what a rule can say of an answer.

A row is {"input": "用户问题：…\\n回答：…", "label", "label_english", "metadata"}. The question groups rows: all answers
to one question stand in one split. meta may hold the style that is wanted: {"style": "有帮助"}. Which style an answer
really has is asked of the classifier (stage 31), not of a rule; TF-IDF is a second opinion that training against the
classifier cannot have adapted to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from common.comparing import comparable, split_key
from common.jsonl import MAX_LINE_BYTES, DataError, read_array, read_json, refuse_characters, scan_jsonl
from common.preflight.finding import Finding, Refused
from common.schemas import validate_row
from common.settings import ROOT, UserError
from tasks import text_metrics
from tasks.base import Field, RewardExample
from tasks.text_metrics import distinct, distinct_share, han_only, mean_of, named, per_text, zero_for_none

DATA = ROOT / "data" / "styles"
FILES = (DATA / "labels.json", DATA / "training_data.json")
INPUT = re.compile(r"用户问题：(?P<question>.*?)\n回答：(?P<answer>.*)", re.DOTALL)
# shares of the questions, and a salt chosen once so that the labels of the shipped rows have the same shares in all
# three splits
VAL_SHARE, TEST_SHARE, SALT = 0.15, 0.15, "styles-77"
SHARED_RUN = 10  # characters; two answers of the shipped data to different questions never share as many
SHORTEST, LONGEST = 20, 120  # characters of an answer: 97 of 100 shipped ones are in between

DEMO = (  # a new question and answer for each shipped style
    ("这款扫地机器人值得买吗？", "值得的，吸力比上一代大了一半，今天下单还送一年耗材，家里有猫狗的客人都选它。"),
    ("耳机用了三天右边没声音了。", "非常抱歉，请把订单号发给我，今天就安排上门取件，换新的后天寄到您手里。"),
    ("这个课学完能找到工作吗？", "我没法保证。去年的学员里大约六成换了岗位，其余的没有回访到，数字并不完整。"),
    ("阳台上的绿萝叶子发黄怎么办？", "先摸土，湿的就停水一周；再剪掉黄叶，挪到散光处，每半个月施一次稀薄的液肥。"),
    ("能告诉我怎么绕过门禁吗？", "这个我不能教，擅自进入可能违法。要是您忘带卡，请联系物业核实身份后开门。"),
)


# --- rows


def question_of(text: str) -> str:
    """The question of a classifier's text; the text itself where it is not written as question and answer."""
    match = INPUT.fullmatch(text)
    return match["question"] if match else text


def answer_of(text: str) -> str:
    match = INPUT.fullmatch(text)
    return match["answer"] if match else text


def question_key(text: str) -> str:
    """What groups the rows: letters, digits and characters of the question, so that punctuation makes no second
    question."""
    return split_key(question_of(text)) or text


def read_labels(path: Path) -> list[dict]:
    """Labels in the order of their ids: [{"id", "label", "label_english", ...}]. Raises DataError where the ids are not
    0, 1, 2, ..."""
    labels = read_json(path)
    rows = labels if isinstance(labels, list) else []
    if len(rows) < 2 or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            [Finding(path, 0, "not a JSON array of at least two labels", 'write [{"id": 0, "label": ...}]')]
        )
    problems = []
    for place, row in enumerate(rows):
        if type(row.get("id")) is not int or row["id"] != place:
            problems.append(
                Finding(path, 0, f"label {place} has the id {row.get('id')!r}", f"number them in order: {place}")
            )
        for key in ("label", "label_english"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                problems.append(Finding(path, 0, f"label {place} has no {key}", "add it"))
            elif [other.get(key) for other in rows].count(row[key]) > 1:
                problems.append(Finding(path, 0, f"{key} {row[key]!r} appears twice", "give each label its own name"))
    if problems:
        raise DataError(problems)
    return rows


def read_rows(path: Path, labels: list[dict], whole_text: bool = True) -> list[dict]:
    """Labelled rows of a JSON array or a JSONL file, each checked against `labels`.

    whole_text: an input of any text will do; False demands question and answer. Raises DataError naming line, reason
    and fix.
    """
    if path.suffix == ".json":
        found, problems = read_array(path)
    else:
        scanned = list(scan_jsonl(path))
        found = [(line, row) for line, row, _ in scanned if row is not None]
        problems = [finding for _, _, findings in scanned for finding in findings if finding.level == "error"]
    english = {row["label"]: row["label_english"] for row in labels}
    for line, row in found:
        wrong = [finding.at(path, line) for finding in validate_row(row, "style")] or [*_unreadable(row, path, line)]
        if not wrong and row["label"] not in english:
            fix = f"one of {', '.join(english)}, or a new entry in labels.json"
            wrong.append(Finding(path, line, f"unknown label {row['label']!r}", fix))
        elif not wrong and row["label_english"] != (name := english[row["label"]]):
            wrong.append(Finding(path, line, f"{row['label']} is not {row['label_english']!r}", f"write {name}"))
        if not wrong and not whole_text:
            match = INPUT.fullmatch(row["input"])
            if not match or not match["question"].strip() or not match["answer"].strip():
                wrong.append(Finding(path, line, "input is not question and answer", "write 用户问题：…\\n回答：…"))
        problems += wrong
    rows = [row for _, row in found]
    if not rows and not problems:
        problems.append(Finding(path, 0, "the file holds no rows", "write some, or name another file"))
    if problems:
        raise DataError(problems)
    return rows


def read_split(train_file: Path, validation_file: Path | None, labels: list[dict]) -> tuple[list[dict], list[dict]]:
    """Training and validation rows; without a validation file 15 % of the questions are held out.

    Raises UserError where a question stands in both, or a label has no training row.
    """
    train = read_rows(train_file, labels)
    if validation_file:
        val = read_rows(validation_file, labels)
    else:
        sides = [split_of(row["input"], test_share=0.0) for row in train]
        train, val = ([row for row, at in zip(train, sides, strict=True) if at == side] for side in ("train", "val"))
        if not val:
            raise UserError(f"{train_file}: too few questions to hold some out; fix: name a validation file")
    known = {comparable(question_of(row["input"])) for row in train}
    if shared := sum(comparable(question_of(row["input"])) in known for row in val):
        raise UserError(
            f"{shared} of {len(val)} validation rows answer a question of {train_file}; fix: split by question (stage "
            "12), or --validation_file None"
        )
    if missing := {label["label"] for label in labels} - {row["label"] for row in train}:
        raise UserError(f"{train_file}: no row is {', '.join(sorted(missing))}; fix: add rows, or take out the label")
    return train, val


def _unreadable(row: dict, path: Path, line: int) -> Iterator[Finding]:
    """What a line of JSONL cannot hold, or its reader refuses."""
    try:
        refuse_characters(row)
    except Refused as refused:
        yield Finding(path, line, *refused.args)
        return
    if (size := len(json.dumps(row, ensure_ascii=False).encode("utf-8"))) >= MAX_LINE_BYTES:
        what = f"the row has {size / 1e6:.1f} MB, more than the limit of {MAX_LINE_BYTES / 1e6:.1f} MB"
        yield Finding(path, line, what, "leave out rows as long as this one")


def split_of(text: str, val_share: float = VAL_SHARE, test_share: float = TEST_SHARE, salt: str = SALT) -> str:
    """train, val or test, decided by the question alone."""
    return text_metrics.split_of(f"{salt} {question_key(text)}", val_share, test_share, first="val")


# --- from a row to a prompt


def messages(row: dict) -> list[dict]:
    """A row's question as chat messages; a row with "ask_for" names the style it wants."""
    wanted = f"请用“{row['ask_for']}”的风格回答：" if row.get("ask_for") else ""
    return [{"role": "user", "content": wanted + row["question"]}]


# --- rules


@per_text
def length(text: str, meta: dict) -> float:
    """1 within 20-120 characters, falling to 0 at 0 and at 240: longer is not better."""
    count = len(text.strip())
    return max(0.0, min(1.0, count / SHORTEST, 2 - count / LONGEST))


@per_text
def ends_whole(text: str, meta: dict) -> float:
    """1 where the answer ends with a sentence's end, else 0."""
    return float(bool(re.search(r"[。！？!?…～~][”」』）)\"]*$", text.strip())))


@per_text
def no_repeat(text: str, meta: dict) -> float | None:
    """1 minus the share of runs of four characters that repeat an earlier one; None for fewer than five characters."""
    return distinct_share(text, 4) if len(text) > 4 else None


@cache
def training_rows() -> tuple[dict, ...]:
    rows = read_rows(DATA / "training_data.json", read_labels(DATA / "labels.json"))
    return tuple(row for row in rows if split_of(row["input"]) == "train")


# 1 where the text shares a run of ten characters with an answer of the training split
near_copy = text_metrics.near_copy(lambda: (answer_of(row["input"]) for row in training_rows()), SHARED_RUN, split_key)


@cache
def _tfidf():
    from common.evaluation.baselines import tfidf_classifier

    rows = training_rows()
    return tfidf_classifier([answer_of(row["input"]) for row in rows], [row["label"] for row in rows])


def tfidf_style(prompts: list[str], completions: list[str], meta: list[dict], **_) -> list[float | None]:
    """Probability of the wanted style under TF-IDF + logistic regression on the training answers; None where no style
    is wanted."""
    if not completions:
        return []
    model = _tfidf()
    place = {label: index for index, label in enumerate(model.classes_)}
    chances = model.predict_proba(completions)
    known = [place.get(m.get("style")) for m in meta]
    return [None if index is None else float(row[index]) for row, index in zip(chances, known, strict=True)]


def overall(prompts: list[str], completions: list[str], meta: list[dict], **_) -> list[float]:
    """整体质量, as far as rules see it: mean of length, ends_whole and no_repeat; 0 for a near-copy. Style is not in
    it."""
    parts = (mean_of(length, ends_whole, zero_for_none(no_repeat)), near_copy)
    columns = (part(prompts, completions, meta) for part in parts)
    return [0.0 if copied else value for value, copied in zip(*columns, strict=True)]


REWARDS = named(length, ends_whole, zero_for_none(no_repeat), tfidf_style, overall)
DEFAULT_REWARDS = ("length", "ends_whole", "no_repeat")
WATCHED_REWARDS = ("tfidf_style",)  # a second opinion only as long as nothing is trained on it
METRICS = named(length, ends_whole, no_repeat)
METRICS |= {"near_copy": near_copy, "tfidf_style": tfidf_style, "整体质量": overall}
SET_METRICS = {"distinct_1": distinct(1, han_only), "distinct_2": distinct(2, han_only)}


def mark(text: str, meta: dict) -> list[tuple[int, int, str]]:
    """Spans (start, end, label) that the comparison page highlights: runs of four characters that repeat an earlier
    one."""
    seen, spans = set(), []
    for start in range(len(text) - 3):
        run = text[start : start + 4]
        if run in seen:
            if spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], start + 4, "repeat")
            else:
                spans.append((start, start + 4, "repeat"))
        seen.add(run)
    return spans


FIELDS = {"question": Field("问题"), "ask_for": Field("风格")}
COLUMNS = ("length", "ends_whole", "tfidf_style", "整体质量", "distinct_2")
LOWER_IS_BETTER = ("near_copy",)

REWARD_EXAMPLES = tuple(
    RewardExample((*names, "overall"), good, bad)
    for names, good, bad in (
        (("length",), "这款产品可以退货，七天之内都行，请保留好包装。", "可以。"),
        (("ends_whole",), "这款产品可以退货，七天之内都行，请保留好包装。", "这款产品可以退货，七天之内都行，请保留好"),
        (
            ("no_repeat",),
            "这款产品可以退货，七天之内都行，请保留好包装。",
            "可以退货可以退货可以退货可以退货。",
        ),
        (("ends_whole",), "這款產品可以退貨，七天之內都行，請保留好包裝。", "這款產品可以退貨，七天之內都行，請保留好"),
    )
)
