"""What one reply of a judge says: the score of every text on every dimension, and the best text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

LOW, HIGH = 1.0, 5.0  # the scale that the judge prompts name
LETTERS = "ABCDEFGH"  # of the candidates, in their order
TIE = -1  # in the place of a candidate: no single best one
LONGEST = 20_000  # characters of a reply that are read, from its end
DEEPEST = 20  # brackets within brackets


class Reply(NamedTuple):
    """What one reply says about the texts, in the order in which they were shown."""

    scores: list[dict[str, float]]  # one a text: dimension -> LOW..HIGH
    best: int  # place of the best text, counted from 0, or TIE


KINDS = "text|answer|candidate|option|文本|文案|候选|作品|回答|答案|评论|诗|方案|选项|模型|应答"
LABEL = rf"(?:{KINDS})?[\s_\-#:：]*第?[\s]*([0-9]{{1,9}}|[A-Ha-h]|[一二三四五六七八])[\s]*[篇号个首条则]?(?:{KINDS})?"
DIGITS = (
    dict(zip("一二三四五六七八九十", range(1, 11), strict=True))
    | dict(zip("ABCDEFGH", range(1, 9), strict=True))
    | {"两": 2}
)
BEST_KEYS = ["best", "winner", "choice", "pick", "best_text", "best_id"]
BEST_KEYS += ["最佳", "最好", "胜者", "优胜", "最优", "最佳文本", "最佳文案"]
TIES = {
    *["tie", "draw", "none", "null", "equal", "both", "all", "0", "平", "平局", "并列", "无", "不分高下", "一样好"],
    "",
}
WIDE = str.maketrans("“”‘’：，；｛｝［］（）０１２３４５６７８９．／％～－", "\"\"'':,;{}[]()0123456789./%~-")


def parse_reply(reply: str, count: int, dimensions: Sequence[str]) -> Reply | None:
    """The scores of all `count` texts on all dimensions and the best text; None where the reply does not say them.

    JSON may stand in a fence or in prose, behind thinking, with single quotes, trailing commas, comments, full-width
    punctuation, raw line ends or quotes in its strings; texts may be a list, or named 1, A, 文本1; prose and Markdown
    tables are read too. Where several readings are whole the last one counts. A score outside 1..5, a text or a
    dimension that is missing make the reply unparsed: nothing is guessed. Where the best text is not named, it is the
    one with the highest mean score.
    """
    said = re.split(r"</think(?:ing)?>", reply)[-1][-LONGEST:]
    said = re.sub(r"<think(?:ing)?>.*", "", said, flags=re.DOTALL)  # a cut-off thought is no answer
    for text in (said, said.translate(WIDE)):
        for value in reversed(_values(text)):
            if found := _read(value, count, dimensions):
                return found
    said = said.translate(WIDE)
    return _read_tables(said, count, dimensions) or _read_prose(said, count, dimensions)


# ------------------------------------------------------------------------------------------------------- JSON

# What follows a quote that ends a string. Any other quote belongs to the string.
AFTER_STRING = re.compile(r"\s*(?:[}\]:]|$|//|/\*|,\s*(?:[\"{}\[\]\-\d/]|true|false|null|\w+\s*:))")


def _values(text: str) -> list:
    """Everything in the text that reads as a JSON object or list, in order, inner ones only where the outer does not
    read."""
    values, at, failed = [], 0, 0
    while failed < 200 and (match := re.compile(r"[{\[]").search(text, at)):
        end, block = _balanced(text, match.start())
        value = _load(block) if block else None
        values += [] if value is None else [value]
        failed += value is None
        at = match.start() + 1 if value is None else end
    return values


def _balanced(text: str, start: int) -> tuple[int, str | None]:
    """(end, block) from the bracket at `start` to the one that closes it; brackets in double quotes do not count.

    In the block every quote within a string is escaped.
    """
    depth, quoted, block, at = 0, False, [], start
    while at < len(text) and depth <= DEEPEST:
        char = text[at]
        if quoted and char == "\\":
            block.append(text[at : at + 2])
            at += 2
            continue
        if char == '"':
            if quoted and not AFTER_STRING.match(text, at + 1):
                char = '\\"'
            else:
                quoted = not quoted
        block.append(char)
        at += 1
        if not quoted and char in "{[}]":
            depth += 1 if char in "{[" else -1
            if depth == 0:
                return at, "".join(block)
    return at, None


def _load(block: str):
    def no_constant(name: str):
        raise ValueError(name)

    tidy = re.sub(r"(?m)(?<![:\"])//[^\n\"]*$", "", block)
    tidy = re.sub(r",(\s*[}\]])", r"\1", tidy)
    bare = re.sub(r"([{,]\s*)([A-Za-z_\u4e00-\u9fff][\w\u4e00-\u9fff]*)(\s*:)", r'\1"\2"\3', tidy)
    for text in dict.fromkeys((block, tidy, bare)):
        try:
            return json.loads(text, parse_constant=no_constant, strict=False)  # line ends may stand in strings
        except (ValueError, RecursionError):
            continue
    try:
        return ast.literal_eval(" ".join(tidy.split()))  # constants only: nothing is executed
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _read(value: Any, count: int, dimensions: Sequence[str]) -> Reply | None:
    """Look for the texts' scores anywhere in the value, outermost first."""
    for container in _walk(value):
        scores = _texts(container, count, dimensions)
        if scores:
            best, named = _best_of(value, count)
            return None if named and best is None else Reply(scores, best if named else highest(scores))
    return None


def _walk(value: Any, depth: int = 0):
    yield value
    if depth < 4:
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from _walk(inner, depth + 1)


def _texts(value: Any, count: int, dimensions: Sequence[str]) -> list[dict[str, float]] | None:
    items: dict[int, Any] = {}
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


def _place_key(item: Any) -> int | None:
    if not isinstance(item, dict):
        return None
    for key in ("id", "text", "文本", "文案", "编号", "index", "name", "label", "candidate", "序号"):
        if key in item and (place := _place(item[key], 99)):
            return place
    return None


def _place(name: Any, count: int) -> int | None:
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


def _column(value: list | dict, count: int) -> list[float] | None:
    if isinstance(value, dict):
        places = {_place(key, count): item for key, item in value.items()}
        value = [places.get(place) for place in range(1, count + 1)]
    scores = [_score(item) for item in value]
    return scores if len(scores) == count and None not in scores else None


def _dimensions(item: Any, dimensions: Sequence[str]) -> dict[str, float] | None:
    """The scores of one text: its dimensions may be keys, lie one level deeper, or stand in a list in their order."""
    if isinstance(item, list):
        values = [_score(value) for value in item]
        known = len(values) == len(dimensions) and None not in values
        return dict(zip(dimensions, values, strict=True)) if known else None
    if not isinstance(item, dict):  # a list of names or numbers holds no text's scores
        return None
    for inner in (item, *(value for value in item.values() if isinstance(value, dict))):
        keys = {_name(key): value for key, value in inner.items()}
        if all(name in keys for name in dimensions):
            scores = {name: _score(keys[name]) for name in dimensions}
            return None if None in scores.values() else scores
    return None


def _score(value: Any) -> float | None:
    """4, 4.0, "4", "4分", "4/5", "四分", {"score": 4, ...} -> 4.0; None for anything else and for what is outside
    LOW..HIGH."""
    if isinstance(value, dict):
        names = ("score", "分数", "得分", "评分", "打分", "value", "rating")
        value = next((value[key] for key in names if key in value), None)
    if isinstance(value, str):
        value = _stated(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if LOW <= value <= HIGH else None


def _best_of(value: Any, count: int) -> tuple[int | None, bool]:
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


def _best(named: Any, count: int) -> int | None:
    if named is None or isinstance(named, list) and len(named) != 1:
        return TIE
    named = named[0] if isinstance(named, list) else named
    if str(named).strip().lower() in TIES:
        return TIE
    place = _place(named, count)
    return place - 1 if place else None


# ------------------------------------------------------------------------------------------------------- free text

NUMBER = r"(?<![0-9.])(?:[0-9]+(?:\.[0-9]+)?|[一二两三四五六七八九十](?:点[一二三四五六七八九])?)(?![0-9])"
SCORE = rf"({NUMBER})\s*(?:/\s*5(?:\.0+)?(?![0-9.])|分|颗?星|points?|stars?)?(半)?"
UNIT = r"(?:/\s*5(?:\.0+)?(?![0-9.])|分|颗?星|points?\b|stars?\b)"
LIST_NUMBER = r"(?:\(?(?:[0-9]{1,2}|[一二三四五六七八九十]{1,3})(?:[.、)](?![0-9])|:(?=\s*[^\s0-9]))|[①-⑳⑴-⒇])"
COUNTED = "[个处句字行条次首篇段词项步遍种位人岁天秒元倍年月日号层多余言律绝韵]|小时|分钟|方面|words?|errors?"
# Numbers that are no score, taken out in this order.
NO_SCORES = [
    rf"(?:(?:19|20)[0-9]{{2}}|[一二三四五六七八九〇零]{{4}})\s*(?:年|[-/.](?=[0-9]))(?:\s*{NUMBER}\s*[-/.月]?(?:\s*{NUMBER}\s*[日号]?)?)?",
    r"(?<![0-9])(?:19|20)[0-9]{2}(?![0-9])|[0-9]{1,2}月[0-9]{1,2}[日号]|(?<![0-9])[0-9]{1,2}:[0-9]{2}(?![0-9])",
    rf"{NUMBER}\s*分之\s*{NUMBER}|十分(?=[\u4e00-\u9fff])",
    rf"{NUMBER}\s*分?\s*(?:[-~–—至到]|to)\s*{NUMBER}\s*分?",  # a range
    r"(?:满分|上限|最高|out of)\s*(?:为|是|:)?\s*5(?:\.0+)?\s*分?|5\s*分制|五分制",
    rf"(?:权重|占比?|系数|比重|weights?)\s*[:为是=]?\s*{NUMBER}(?:\s*%|(?!\s*分))",
    rf"{NUMBER}\s*%?\s*的?\s*(?:权重|weight)|{NUMBER}\s*%|[×xX]\s*{NUMBER}",
    rf"[扣减少加失丢]\s*[了掉去除]?\s*{NUMBER}\s*分?",
    rf"(?:总|平均|均|合计|总计|加权|total|overall|average|mean)\s*[得评]?(?:分数?|score)?\s*[:为是=]\s*{NUMBER}(?:\s*/\s*[0-9]+)?\s*分?",
    rf"(?m)^[\s>•·+\-]*{LIST_NUMBER}(?=\s*\S)",
    rf"(?:第|其|步骤|要点|step|point)\s*{NUMBER}(?!\s*分)",
    rf"{NUMBER}\s*(?:{COUNTED})",
]
OTHER_SCALE = re.compile(
    r"(?:满分|out of)\s*(?:为|是|:)?\s*(?!5(?:\.0+)?(?![0-9.]))[0-9]+|(?<![0-9])(?!5分)[0-9]+\s*分制|百分制|十分制"
)


def _stated(text: str) -> float | None:
    """The one score that a piece of text about one dimension states. List numbers, weights, years, counts, ranges are
    none."""
    text = ":" + re.sub(r"[*`#]+|__|<br\s*/?>", " ", text.translate(WIDE)).strip().lstrip(":").strip()
    if OTHER_SCALE.search(text):
        return None
    for pattern in NO_SCORES:
        text = re.sub(pattern, " ", text, flags=re.IGNORECASE)
    expected = 1
    for match in list(
        re.finditer(r"(?<![0-9.])([0-9]{1,2})[.、)](?![0-9])(?=\s*[^\s0-9])", text)
    ):  # 1. ... 2. ... within a line
        if int(match[1]) == expected:
            text = text[: match.start()] + " " * len(match[0]) + text[match.end() :]
            expected += 1
    named = rf"(?:得分|评分|分数|打分|给分|分值|score|rating|grade)\s*(?:为|是|of)?[\s:=|]*{SCORE}"
    for pattern in (
        named,
        rf"^[\s:=为是得|—]*(?:-\s+)?{SCORE}(?![\w%])",
        rf"[给打评记得][予为]?\s*{SCORE}(?=\s*[,;。.]|\s*$)",
    ):
        if found := list(re.finditer(pattern, text, re.IGNORECASE)):
            return _number(found[-1], text)
    united = {_number(match, text) for match in re.finditer(rf"({NUMBER})\s*{UNIT}(半)?", text, re.IGNORECASE)}
    if united:
        return united.pop() if len(united) == 1 else None
    last = re.search(rf"[:=]\s*{SCORE}[\s。.]*$", text)
    return _number(last, text) if last else None


def _number(match: re.Match, text: str) -> float | None:
    """The value of a match of SCORE; None where it is a fraction of something else than 5."""
    if re.match(r"\s*/\s*[0-9]", text[match.end() :]) or re.search(r"[0-9]\s*/\s*$", text[: match.start(1)]):
        return None
    whole, _, part = match[1].partition("点")
    value = float(match[1]) if match[1][0].isdigit() else DIGITS[whole] + DIGITS.get(part, 0) / 10
    return value + 0.5 * bool(match[2])


def _read_tables(text: str, count: int, dimensions: Sequence[str]) -> Reply | None:
    """Markdown tables with a row a text and a column a dimension, or the other way round."""
    for table in reversed(_tables(text)):
        header, *rows = table
        plain = [_name(cell) for cell in header]
        across = [(_place(cell, count), i) for i, cell in enumerate(header) if i and _place(cell, count)]
        items: dict[int, dict | None] = {}
        if all(name in plain for name in dimensions):
            at = next((i for i, name in enumerate(plain) if re.search(rf"{KINDS}|编号|id$", name, re.IGNORECASE)), 0)
            for row in rows:
                if len(row) == len(header) and (place := _place(row[at], count)):
                    items[place] = _dimensions(dict(zip(header, row, strict=True)), dimensions)
        elif len(across) == count:
            by_name = {_name(row[0]): row for row in rows if len(row) == len(header)}
            if all(name in by_name for name in dimensions):
                items = {place: _dimensions({n: by_name[n][i] for n in dimensions}, dimensions) for place, i in across}
        if found := _finish(text, items, count):
            return found
    return None


def _tables(text: str) -> list[list[list[str]]]:
    """Runs of lines with |, as rows of cells, without the line of dashes."""
    tables, open_ = [], False
    for line in text.splitlines():
        if "|" in line:
            if not open_:
                tables.append([])
            if not re.fullmatch(r"[\s|:\-]+", line):
                tables[-1].append(_cells(line))
        open_ = "|" in line
    return [table for table in tables if table]


def _cells(line: str) -> list[str]:
    return [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]


def _name(text: str) -> str:
    """A dimension's name without bold marks, spaces, and what stands in brackets behind it."""
    return re.sub(r"[\s*_`]|（.*?）|\(.*?\)", "", str(text))


HEAD = rf"(?:^|(?<=[\n。;,]))[\s*#>\-]*(?:{LIST_NUMBER}[\s*]*)?"  # where a heading may begin


def _read_prose(text: str, count: int, dimensions: Sequence[str]) -> Reply | None:
    """Prose such as "文本1：指令遵循 4，事实准确 5" for each text, or "指令遵循：文本1 4 分，文本2 3 分" for each
    dimension."""
    text = _score_lines(text)
    body = re.split(r"(?im)^[\s*#>\-]*(?:最佳|最好|胜者|优胜|best|winner|总评|总结|结论)", text)[0]
    labels = rf"{HEAD}(?=(?:{KINDS}|第))(?:{LABEL})[\s*]*(?:\([^()\n]*\))?[\s*]*[:\n]"
    items: dict[int, dict | None] = {}
    for place, part in _parts(body, labels, count):
        if place in items:
            break
        scores: dict[str, float] = {}
        for name, said in _named(part, dimensions):  # the first that states a score counts
            if (score := _score(said)) is not None:
                scores.setdefault(name, score)
        items[place] = scores if len(scores) == len(dimensions) else None
    else:
        if found := _finish(text, items, count):
            return found
    labels = rf"(?:^|(?<=[\s,;:。*\-]))(?=(?:{KINDS}|第))(?:{LABEL})[\s*:]*"
    columns: dict[str, dict] = {}
    for name, said in _named(body, dimensions):
        column = {place: _score(part) for place, part in _parts(said, labels, count)}
        if sorted(place or 0 for place in column) == list(range(1, count + 1)) and None not in column.values():
            columns.setdefault(name, column)
    if len(columns) < len(dimensions):
        return None
    by_text = {place: {name: columns[name][place] for name in dimensions} for place in range(1, count + 1)}
    return _finish(text, by_text, count)


def _score_lines(text: str) -> str:
    """A table with a column of scores, one table a text: each row becomes a line of prose."""
    lines, at = [], None  # at: the column of scores, None outside a table
    for line in text.splitlines():
        cells = _cells(line) if "|" in line else []
        if cells and at is None:
            names = r"得分|评分|分数|打分|score"
            at = next((i for i, cell in enumerate(cells) if re.search(names, cell, re.IGNORECASE)), 0)
        elif at and at < len(cells):
            line = f"{cells[0]}:得分 {cells[at]}"
        at = at if cells else None
        lines.append(line)
    return "\n".join(lines)


def _parts(text: str, labels: str, count: int) -> Iterator[tuple[int | None, str]]:
    """(place, what stands behind it up to the next label)."""
    marks = list(re.finditer(labels, text, re.IGNORECASE))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=False):
        yield _place(mark[1], count), text[mark.end() : end]


def _named(text: str, dimensions: Sequence[str]) -> list[tuple[str, str]]:
    """(dimension, what stands behind its name up to the next one), wherever a name begins something."""
    names = "|".join(map(re.escape, sorted(dimensions, key=len, reverse=True)))
    behind = r"[\s*_`\"]*(?:\([^()\n]*\))?[\s*_`\"]*(?=[:=|—\-]|[0-9一二三四五]|得分|评分|为|是|\n)"
    marks = list(re.finditer(rf"(?:^|(?<=[\s,;。、|/*\"]))(?:{LIST_NUMBER}\s*)?[*_`\"]*({names}){behind}", text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        (mark[1], mark[0][mark.end(1) - mark.start() :] + text[mark.end() : end])
        for mark, end in zip(marks, ends, strict=False)
    ]


def _finish(text: str, items: dict[int, dict | None], count: int) -> Reply | None:
    if sorted(place or 0 for place in items) != list(range(1, count + 1)) or not all(items.values()):
        return None
    scores = [items[place] for place in range(1, count + 1)]
    named = r"(?:最佳|最好|胜者|优胜|best|winner)(?:的)?(?:文本|文案|作品|一篇|是|为|[\s*:=])*([^\s*。,;:()\n]+)"
    headings = re.findall(rf"(?im)^[\s*#>\-]*{named}", text)
    best = [_best(word, count) for word in headings or re.findall(named, text, re.IGNORECASE)]
    best = best if headings else [place for place in best if place is not None]
    best = best[-1] if best else highest(scores)
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
