"""A judge's replies: what they say, what the rotated orders agree on, and how far the judge can be trusted.

Judges favour positions and long answers, so every item is shown in rotated orders and a disagreement counts as a tie (Zheng et al. 2023,
arXiv 2306.05685, section 3.4); win rates are also given at equal length (Dubois et al. 2024, arXiv 2404.04475).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.evaluation.statistics import Estimate, bootstrap_mean
from common.settings import UserError, show_path

LOW, HIGH = 1.0, 5.0  # the scale that the judge prompts name
LETTERS = "ABCDEFGH"  # of the candidates, in their order
TIE = -1  # in the place of a candidate: no single best one


class Reply(NamedTuple):
    """What one reply says about the texts, in the order in which they were shown."""

    scores: list[dict[str, float]]  # one a text: dimension -> LOW..HIGH
    best: int  # place of the best text, counted from 0, or TIE


# ------------------------------------------------------------------------------------------------------- parsing

KINDS = "text|answer|candidate|option|文本|文案|候选|作品|回答|答案|评论|诗|方案|选项|模型|应答"
LABEL = rf"(?:{KINDS})?[\s_\-#:：]*第?[\s]*([0-9]+|[A-Ha-h]|[一二三四五六七八])[\s]*(?:篇|号|个|首|条|则)?(?:{KINDS})?"
DIGITS = dict(zip("一二三四五六七八", range(1, 9), strict=True)) | dict(zip("ABCDEFGH", range(1, 9), strict=True))
BEST_KEYS = (
    "best",
    "winner",
    "最佳",
    "最好",
    "胜者",
    "优胜",
    "choice",
    "pick",
    "best_text",
    "best_id",
    "最佳文本",
    "最佳文案",
    "最优",
)
TIES = (
    "tie",
    "draw",
    "none",
    "null",
    "平",
    "平局",
    "并列",
    "无",
    "0",
    "equal",
    "both",
    "all",
    "不分高下",
    "一样好",
    "",
)
WIDE = str.maketrans("“”‘’：，｛｝［］（）０１２３４５６７８９．", "\"\"'':,{}[]()0123456789.")


def parse_reply(reply: str, count: int, dimensions: Sequence[str]) -> Reply | None:
    """The scores of all `count` texts on all dimensions and the best text; None where the reply does not say them.

    JSON may stand in a fence or in prose, behind thinking, with single quotes, trailing commas, comments or full-width punctuation;
    texts may be a list, or named 1, A, 文本1; lines of prose and Markdown tables are read too. Where several readings are whole the
    last one counts. A score outside 1..5, a text or a dimension that is missing make the reply unparsed: nothing is guessed. Where
    the best text is not named, it is the one with the highest mean score.
    """
    said = re.sub(
        r"<think(?:ing)?>.*", "", re.split(r"</think(?:ing)?>", reply)[-1], flags=re.DOTALL
    )  # a cut-off thought is no answer
    for text in (said, said.translate(WIDE)):
        for value in reversed(_values(text)):
            if found := _read(value, count, dimensions):
                return found
    return _read_table(said, count, dimensions) or _read_lines(said, count, dimensions)


def _values(text: str) -> list:
    """Everything in the text that reads as a JSON object or list, in order, inner ones only where the outer does not read."""
    values, at = [], 0
    while match := re.compile(r"[{\[]").search(text, at):
        block = _balanced(text, match.start())
        value = _load(block) if block else None
        values += [] if value is None else [value]
        at = match.start() + (len(block) if value is not None else 1)
    return values


def _balanced(text: str, start: int) -> str | None:
    """From the bracket at `start` to the one that closes it; brackets in double quotes do not count."""
    depth, quoted, escaped = 0, False, False
    for at in range(start, len(text)):
        char = text[at]
        if quoted:
            quoted, escaped = escaped or char != '"', char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
            if depth == 0:
                return text[start : at + 1]
    return None


def _load(block: str):
    def no_constant(name: str):
        raise ValueError(name)

    tidy = re.sub(r"(?m)(?<![:\"])//[^\n\"]*$", "", block)
    tidy = re.sub(r",(\s*[}\]])", r"\1", tidy)
    bare = re.sub(r"([{,]\s*)([A-Za-z_\u4e00-\u9fff][\w\u4e00-\u9fff]*)(\s*:)", r'\1"\2"\3', tidy)
    for text in dict.fromkeys((block, tidy, bare)):
        try:
            return json.loads(text, parse_constant=no_constant)
        except (ValueError, RecursionError):
            continue
    try:
        return ast.literal_eval(tidy)  # constants only: nothing is executed
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _read(value, count: int, dimensions: Sequence[str]) -> Reply | None:
    """Look for the texts' scores anywhere in the value, outermost first."""
    for container in _walk(value):
        scores = _texts(container, count, dimensions)
        if scores:
            best, named = _best_of(value, count)
            return None if named and best is None else Reply(scores, best if named else highest(scores))
    return None


def _walk(value, depth: int = 0):
    yield value
    if depth < 4:
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from _walk(inner, depth + 1)


def _texts(value, count: int, dimensions: Sequence[str]) -> list[dict[str, float]] | None:
    items: dict[int, dict] = {}
    if isinstance(value, list) and len(value) == count:
        keys = [_place_key(item) for item in value]
        if any(keys) and sorted(key or 0 for key in keys) != list(range(1, count + 1)):
            return None  # texts that are named twice or wrongly
        items = {key or place: item for place, (key, item) in enumerate(zip(keys, value, strict=True), start=1)}
    elif isinstance(value, dict):
        if all(isinstance(value.get(name), list | dict) for name in dimensions):  # dimension -> scores of the texts
            columns = [_column(value[name], count) for name in dimensions]
            if all(columns):
                return [dict(zip(dimensions, row, strict=True)) for row in zip(*columns, strict=True)]
        named = [(_place(key, count), item) for key, item in value.items() if isinstance(item, dict | list)]
        items = {place: item for place, item in named if place}
        if len(items) != sum(place is not None for place, _ in named):
            return None
    if sorted(items) != list(range(1, count + 1)):
        return None
    scores = [_dimensions(items[place], dimensions) for place in range(1, count + 1)]
    return scores if all(scores) else None


def _place_key(item) -> int | None:
    if not isinstance(item, dict):
        return None
    for key in ("id", "text", "文本", "文案", "编号", "index", "name", "label", "candidate", "序号"):
        if key in item and (place := _place(item[key], 99)):
            return place
    return None


def _place(name, count: int) -> int | None:
    """1, "1", "A", "文本1", "第二篇" -> a place counted from 1; None for what names none of `count` texts."""
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    if isinstance(name, bool) or not isinstance(name, int | str):
        return None
    match = re.fullmatch(LABEL, str(name).strip(" \t\"'“”【】[]()（）*。.，,"), re.IGNORECASE)
    if not match:
        return None
    place = int(match[1]) if match[1].isascii() and match[1].isdigit() else DIGITS[match[1].upper()]
    return place if 1 <= place <= count else None


def _column(value, count: int) -> list[float] | None:
    if isinstance(value, dict):
        places = {_place(key, count): item for key, item in value.items()}
        value = [places.get(place) for place in range(1, count + 1)]
    scores = [_score(item) for item in value]
    return scores if len(scores) == count and None not in scores else None


def _dimensions(item, dimensions: Sequence[str]) -> dict[str, float] | None:
    """The scores of one text: its dimensions may be keys, lie one level deeper, or stand in a list in their order."""
    if isinstance(item, list):
        values = [_score(value) for value in item]
        known = len(values) == len(dimensions) and None not in values
        return dict(zip(dimensions, values, strict=True)) if known else None
    for inner in (item, *(value for value in item.values() if isinstance(value, dict))):
        keys = {re.sub(r"[\s*_]|（.*?）|\(.*?\)", "", str(key)): value for key, value in inner.items()}
        if all(name in keys for name in dimensions):
            scores = {name: _score(keys[name]) for name in dimensions}
            return None if None in scores.values() else scores
    return None


def _score(value) -> float | None:
    """4, 4.0, "4", "4分", "4/5", "四分", {"score": 4, ...} -> 4.0; None for anything else and for what is outside LOW..HIGH."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("score", "分数", "得分", "评分", "value", "rating") if key in value), None)
    if isinstance(value, str):
        match = re.fullmatch(
            r"\s*\**([0-9]+(?:\.[0-9]+)?|[一二三四五])\**\s*(?:/\s*5(?:\.0)?)?\s*(?:分|星|points?)?\s*",
            value.translate(WIDE),
        )
        value = match and float(DIGITS.get(match[1], match[1]))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if LOW <= value <= HIGH else None


def _best_of(value, count: int) -> tuple[int | None, bool]:
    """(place from 0, or TIE, or None where it is none of the texts; is one named at all?)"""
    for inner in _walk(value):
        if not isinstance(inner, dict):
            continue
        for key, named in inner.items():
            if str(key).strip().lower() in BEST_KEYS:
                if isinstance(named, dict):
                    named = next((named[k] for k in ("id", "text", "文本", "index", "编号") if k in named), named)
                return _best(named, count), True
    return None, False


def _best(named, count: int) -> int | None:
    if named is None or isinstance(named, list) and len(named) != 1:
        return TIE
    named = named[0] if isinstance(named, list) else named
    if str(named).strip().lower() in TIES:
        return TIE
    place = _place(named, count)
    return place - 1 if place else None


def _read_table(text: str, count: int, dimensions: Sequence[str]) -> Reply | None:
    """A Markdown table with a column a dimension and a row a text."""
    rows = [
        [cell.strip(" *") for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    header = next((row for row in rows if all(name in row for name in dimensions)), None)
    if not header:
        return None
    items: dict[int, dict | None] = {}
    for row in rows:
        place = _place(row[0], count)
        if place and len(row) == len(header):
            items[place] = _dimensions(dict(zip(header, row, strict=True)), dimensions)
    return _finish(text, items, count)


def _read_lines(text: str, count: int, dimensions: Sequence[str]) -> Reply | None:
    """Prose such as "文本1：指令遵循 4，事实准确 5" for each text."""
    marks = list(
        re.finditer(
            rf"(?m)(?:^|(?<=[\n。；]))[\s*#\-]*(?={KINDS}|第)(?:{LABEL})[\s*]*[:：\n]",
            text,
            re.IGNORECASE,
        )
    )
    items: dict[int, dict | None] = {}
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=False):
        part = text[mark.end() : end]
        place = _place(mark[1], count)
        if not place or place in items:
            return None
        found = {
            name: re.search(rf"{re.escape(name)}[\s*:：=为是得分]*([0-9]+(?:\.[0-9]+)?|[一二三四五])(?![0-9])", part)
            for name in dimensions
        }
        scores = {name: match and _score(match[1]) for name, match in found.items()}
        items[place] = None if None in scores.values() else scores
    return _finish(text, items, count)


def _finish(text: str, items: dict[int, dict | None], count: int) -> Reply | None:
    if sorted(items) != list(range(1, count + 1)) or not all(items.values()):
        return None
    scores = [items[place] for place in range(1, count + 1)]
    named = re.search(
        r"(?:最佳|最好|胜者|best|winner)(?:的)?(?:文本|文案|作品|一篇|是|为|[\s*:：=])*([^\s*。，,；;\n]+)",
        text,
        re.IGNORECASE,
    )
    best = _best(named[1], count) if named else highest(scores)
    return None if best is None else Reply(scores, best)


def mean_score(scores: dict[str, float | None]) -> float | None:
    """Mean over the dimensions that apply; None where none does."""
    known = [value for value in scores.values() if value is not None]
    return sum(known) / len(known) if known else None


def highest(scores: Sequence[dict[str, float | None]]) -> int:
    """Place of the highest mean score, TIE where two share it."""
    means = [mean_score(one) for one in scores]
    top = max((mean for mean in means if mean is not None), default=None)
    places = [place for place, mean in enumerate(means) if mean is not None and abs(mean - top) < 1e-9]
    return places[0] if len(places) == 1 else TIE


# ---------------------------------------------------------------------------------------- what the orders agree on


class JudgePrompt(NamedTuple):
    """A file of data/<task>/judge_prompts/<version>: its dimensions, and a text with {instruction}, {count}, {texts}, {format}."""

    dimensions: list[str]
    template: str

    def fill(self, instruction: str, texts: Sequence[str]) -> str:
        """The question to the judge about these texts, in this order. A text cannot close its own mark."""
        shown = [text.strip().replace("</文本", "＜/文本") or "（空白）" for text in texts]
        example = {
            "texts": [{"id": place, "scores": dict.fromkeys(self.dimensions, 3)} for place in range(1, len(texts) + 1)],
            "best": f"1 到 {len(texts)} 的编号，或“平局”",
        }
        parts = {
            "instruction": instruction.strip(),
            "count": str(len(texts)),
            "texts": "\n\n".join(f"<文本{place}>\n{text}\n</文本{place}>" for place, text in enumerate(shown, start=1)),
            "format": json.dumps(example, ensure_ascii=False),
        }
        return re.sub(r"\{(\w+)\}", lambda mark: parts[mark[1]], self.template)


def load_prompt(folder: Path, name: str | None) -> JudgePrompt:
    """The file `name`.md of a version, or its only one. Raises UserError where it is missing or cannot be filled in."""
    if not folder.is_dir():
        raise UserError(
            f"no judge prompts in {show_path(folder)}; fix: write a version, or name one with --prompt-versions"
        )
    files = [folder / f"{name}.md"] if name else sorted(folder.glob("*.md"))
    if len(files) != 1 or not files[0].is_file():
        raise UserError(f"{show_path(folder)}: {name or 'one Markdown file'} is expected and not there; fix: write it")
    head, _, template = files[0].read_text(encoding="utf-8").partition("\n")
    dimensions = [name for name in re.split(r"[、，,\s]+", head.partition("：")[2]) if name]
    if not head.startswith("维度：") or not dimensions:
        raise UserError(f"{show_path(files[0])}: line 1 names no dimensions; fix: 维度：…、…")
    marks = set(re.findall(r"\{(\w+)\}", template))
    if marks != {"instruction", "count", "texts", "format"}:
        raise UserError(
            f"{show_path(files[0])} has the marks {sorted(marks)}; fix: {{instruction}}, {{count}}, {{texts}}, {{format}}"
        )
    return JudgePrompt(dimensions, template.strip())


def rule_scores(task, prompts: list[str], texts: list[str], meta: list[dict]) -> list[dict[str, float]]:
    """The task's own measures on the judge's scale: 0..1 becomes LOW..HIGH. Dimensions are those of task.JUDGE; for a task
    without it, its metrics with Chinese names, or `overall`. What does not apply is left out. Raises UserError where there are
    none."""
    measures = task.JUDGE or {name: m for name, m in task.METRICS.items() if not name.isascii()}
    measures = measures or {name: m for name, m in task.METRICS.items() if name == "overall"}
    if not measures:
        raise UserError(
            f"the task {task.name} has no JUDGE and no metric overall to judge by; fix: name a model with --judge"
        )
    columns = {name: measure(prompts, texts, meta) for name, measure in measures.items()}
    rows = [{name: values[i] for name, values in columns.items() if values[i] is not None} for i in range(len(texts))]
    return [{name: LOW + (HIGH - LOW) * min(1.0, max(0.0, value)) for name, value in row.items()} for row in rows]


def rotations(count: int) -> list[tuple[int, ...]]:
    """Orders in which each candidate stands once in each place: (0, 1, 2), (1, 2, 0), (2, 0, 1)."""
    return [tuple((start + step) % count for step in range(count)) for start in range(count)]


class Verdict(NamedTuple):
    """An item over all its orders. Candidates are counted from 0 in the order of their letters."""

    scores: list[dict[str, float] | None]  # one a candidate: means over the parsed orders; None without any
    best: int | None  # candidate that every order picks; TIE where they differ; None where too few were parsed
    wins: dict[tuple[int, int], float | None]  # (i, j) -> 1 where i beats j in every order, 0 the reverse, 0.5 else
    picks: list[int | None]  # place (not candidate) that each order picks, TIE, or None where it was not parsed
    bound: (
        bool | None
    )  # did the place decide: the same place in every order, whatever stood there? None: cannot be said


def combine(replies: Sequence[Reply | None], orders: Sequence[tuple[int, ...]], texts: Sequence[str]) -> Verdict:
    """Put the orders of one item together. replies[k] speaks of texts shown as orders[k]; texts are the candidates'.

    Two orders have to be parsed for a verdict (one where only one was asked for): a single one may be its place's. Candidates
    with one and the same text always tie.
    """
    read = [(reply, order) for reply, order in zip(replies, orders, strict=True) if reply]
    enough = len(read) >= min(2, len(orders))
    scores: list[dict | None] = []
    for candidate in range(len(texts)):
        rows = [reply.scores[order.index(candidate)] for reply, order in read]
        scores.append({name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else None)
    picked = [TIE if reply.best == TIE else order[reply.best] for reply, order in read]
    chosen = {pick if pick == TIE or texts.count(texts[pick]) == 1 else TIE for pick in picked}
    wins = {
        (i, j): _agreed([_beats(reply, order, i, j, texts) for reply, order in read]) if enough else None
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
    }
    bound = None
    if len(read) >= 2 and len(set(texts)) > 1:
        places = {reply.best for reply, _ in read}
        bound = len(places) == 1 and TIE not in places and len({texts[pick] for pick in picked}) > 1
    return Verdict(
        scores,
        (chosen.pop() if len(chosen) == 1 else TIE) if enough else None,
        wins,
        [reply.best if reply else None for reply in replies],
        bound,
    )


def _beats(reply: Reply, order: tuple[int, ...], i: int, j: int, texts: Sequence[str]) -> float:
    """1 where i is the best text or has the higher mean score, 0 the reverse, 0.5 where neither."""
    if texts[i] == texts[j]:
        return 0.5
    best = TIE if reply.best == TIE else order[reply.best]
    if best in (i, j):
        return float(best == i)
    first, second = (mean_score(reply.scores[order.index(candidate)]) for candidate in (i, j))
    return 0.5 if abs(first - second) < 1e-9 else float(first > second)


def _agreed(outcomes: list[float]) -> float:
    return outcomes[0] if len(set(outcomes)) == 1 else 0.5


# ------------------------------------------------------------------------------------------- win rates at equal length


def length_controlled(
    wins: Sequence[float | None], lengths: Sequence[int], others: Sequence[int], samples: int = 0, seed: int = 0
) -> Estimate:
    """The win rate that a logistic regression gives at equal length (AlpacaEval 2, arXiv 2404.04475, equation 2), with a 95 %
    percentile interval over `samples` resamplings of the items.

    P(win) = sigmoid(a + b * tanh(d / sd(d))) with d the difference in characters; the rate is sigmoid(a). b is drawn to 0 by a
    penalty of b^2 / 2, as in scikit-learn's LogisticRegression. The paper's term for the difficulty of an instruction needs many
    judged models and is left out. A tie counts as half a win and half a loss, None is left out. Without a win or without a loss
    there is nothing to fit and the plain rate stands.
    """
    import numpy as np

    rows = [row for row in zip(wins, lengths, others, strict=True) if row[0] is not None]
    if not rows:
        return Estimate(None, None, None)
    won, length, other = np.array(rows, dtype=np.float64).T
    rate = float(_equal_length_rates(won[None], (length - other)[None])[0])
    plain = bootstrap_mean(list(won), range(len(won)), max(1, samples), seed)
    if len(won) < 2 or not samples or plain.mean in (0.0, 1.0):
        return Estimate(rate, plain.low, plain.high) if samples else Estimate(rate, None, None)
    draws = np.random.default_rng(seed).integers(0, len(won), (samples, len(won)))
    parts = np.array_split(draws, max(1, draws.size // 1_000_000))  # what is in memory at once
    rates = np.concatenate([_equal_length_rates(won[part], (length - other)[part]) for part in parts])
    low, high = np.quantile(rates, [0.025, 0.975])
    return Estimate(rate, min(float(low), rate), max(float(high), rate))


def _equal_length_rates(won, difference):
    """won, difference: [fits, items]. Newton's method on all fits at once; [fits] rates."""
    import numpy as np

    deviation = difference.std(1, keepdims=True)
    x = np.tanh(difference / np.where(deviation > 0, deviation, 1.0))
    rate = won.mean(1)
    fitted = (rate > 0) & (rate < 1)
    a, b = np.log(np.where(fitted, rate, 0.5) / (1 - np.where(fitted, rate, 0.5))), np.zeros(len(won))
    for _ in range(30):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        weight = p * (1 - p)
        slope_a, slope_b = (won - p).sum(1), ((won - p) * x).sum(1) - b
        aa, ab, bb = weight.sum(1) + 1e-9, (weight * x).sum(1), (weight * x * x).sum(1) + 1
        determinant = aa * bb - ab * ab
        # steps of at most 2: far from the optimum a full Newton step may go too far
        a = a + np.clip((bb * slope_a - ab * slope_b) / determinant, -2, 2)
        b = b + np.clip((aa * slope_b - ab * slope_a) / determinant, -2, 2)
    return np.where(fitted & (deviation[:, 0] > 0), 1 / (1 + np.exp(-a)), rate)
