"""Facts in brand copy: what a text says that a product sheet can confirm or contradict.

A pattern sees figures, ingredients and listed phrases; a false statement in other words passes.
"""

from __future__ import annotations

import re
from typing import NamedTuple


def words(text: str) -> list[str]:
    """A list of words, written in one string."""
    return text.split()


def find(words: list[str], text: str) -> list[tuple[int, int, str]]:
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return [(*match.span(), match.group()) for match in re.finditer(pattern, text, re.IGNORECASE)] if words else []


class Statement(NamedTuple):
    """Something in a text that the product sheet can confirm or contradict."""

    start: int
    end: int
    true: bool
    what: str


UNIT = r"%|ml|g|元|种|片|分钟|小时|秒|℃|天|次|倍|人|款|周|个月|年"
# the 10 of "10 到 15 分钟" has the unit of the 15
RANGE = rf"(?=\s*[到至\-~～]\s*\d+(?:\.\d+)?\s*({UNIT})(?![A-Za-z]))"
NUMBER = re.compile(
    rf"(?<![A-Za-z\d.\-])(?:(SPF)\s*)?(\d+(?:\.\d+)?)(?:{RANGE}|\s*({UNIT})(?![A-Za-z]))?|(?<!\+)(PA)\s*(\++)",
    re.IGNORECASE,
)
WEEKLY = re.compile(r"每周(?:使用)?([一二两三四五六七])(?:到([一二两三四五六七]))?次")
CHINESE = str.maketrans("一二两三四五六七八九", "1223456789")
# ingredients that ads often claim are absent
OFTEN_ABSENT = words("香精 色素 乙醇 酒精 皂基 硅油 矿物油 防腐剂 激素")
WITHOUT = re.compile(r"不含([^，。；！？\n]{1,20})")


def _numbers(text: str) -> set[tuple]:
    return {_number(match) for match in NUMBER.finditer(text)}


def _number(match: re.Match) -> tuple:
    if match[5]:
        return "PA", match[6]
    return "SPF" if match[1] else (match[3] or match[4] or "").lower(), float(match[2])


def _listed(match: re.Match) -> list[tuple[int, int, str]]:
    """The items of "不含A、B和C", with their places in the text."""
    return [
        (match.start(1) + m.start(), match.start(1) + m.end(), m.group()) for m in re.finditer("[^、和与或]+", match[1])
    ]


class _Sheet(NamedTuple):
    concentrations: dict[str, str]  # ingredient -> "5%"
    numbers: set[tuple]
    weekly: set[tuple]
    absent: set[str]


def _read_sheet(product: dict) -> _Sheet:
    concentrations = {item["name"]: item["concentration"].replace(" ", "") for item in product["ingredients"]}
    claims = "。".join([*product["may_claim"], *product["effects"], product["audience"]])
    text = f"{claims}。{product['volume']}，{product['price_yuan']}元，{'，'.join(concentrations.values())}"
    absent = {item for match in WITHOUT.finditer(claims) for _, _, item in _listed(match)}
    numbers = _numbers(text) | _numbers(text.translate(CHINESE))  # 每周 3 次 where the sheet says 每周三次
    return _Sheet(concentrations, numbers, {m.groups() for m in WEEKLY.finditer(text)}, absent)


def _mask(text: str, names: list[str]) -> str:
    """Digits of ingredient names such as 乙酰基六肽-8 are no figures: put letters in their place."""
    for start, end, _ in find([name for name in names if re.search(r"\d", name)], text):
        text = text[:start] + re.sub(r"\d", "肽", text[start:end]) + text[end:]
    return text


def _owner(percentage: re.Match, names: list[tuple[int, int, str]], text: str) -> str | None:
    """The ingredient that a percentage belongs to: the one right before it, or right behind it, or the last one before
    it in its sentence."""
    before = [(end, name) for _, end, name in names if end <= percentage.start()]
    if before and not text[before[-1][0] : percentage.start()].strip():
        return before[-1][1]
    behind = [(start, name) for start, _, name in names if start >= percentage.end()]
    if behind and re.fullmatch(r"\s*的?\s*", text[percentage.end() : behind[0][0]]):
        return behind[0][1]
    if before and not re.search(r"[。！？\n]", text[before[-1][0] : percentage.start()]):
        return before[-1][1]
    return None


def statements(text: str, product: dict, ingredients: frozenset[str]) -> list[Statement]:
    """What a text says that the sheet can confirm or contradict: concentrations, other figures, frequency, what is
    contained and what is not, and phrases that may not be claimed. In order of their places.

    ingredients: names that could be mentioned wrongly, e.g. those of all products."""
    known = _read_sheet(product)
    plain = _mask(text, list(known.concentrations)).replace("％", "%")
    names = find([*known.concentrations, *ingredients], text)
    found = []
    for match in NUMBER.finditer(plain):
        unit, value = _number(match)
        if unit == "%":
            name = _owner(match, names, plain)
            true = value in {float(c.rstrip("%")) for n, c in known.concentrations.items() if name in (None, n)}
            found.append(Statement(*match.span(), true, f"{name or '成分'}的浓度不是 {match.group().strip()}"))
        else:
            true = (unit, value) in known.numbers or unit == "" and value in {v for u, v in known.numbers if u != "PA"}
            found.append(Statement(*match.span(), true, f"{match.group().strip()} 不在产品信息里"))
    if known.weekly:
        for match in WEEKLY.finditer(text):
            found.append(Statement(*match.span(), match.groups() in known.weekly, f"用法不是{match.group()}"))
    for match in WITHOUT.finditer(text):
        for start, end, item in _listed(match):
            if item in known.concentrations or item in OFTEN_ABSENT:
                true = item.replace("酒精", "乙醇") in known.absent
                found.append(Statement(start, end, true, f"产品信息没有说不含{item}"))
    contained = r"(?<![不未没无])(?:含有?|添加了?|加入了?|富含)(?:少量|适量|天然)?"
    for item in sorted(known.absent | (ingredients - set(known.concentrations))):
        for match in re.finditer(contained + re.escape(item), text):
            if not any(name in match.group() for name in known.concentrations):
                found.append(Statement(*match.span(), False, f"产品不含{item}，或产品信息没有写"))
    for start, end, phrase in find(product["must_not_claim"], text):
        found.append(Statement(start, end, False, f"不得宣称：{phrase}"))
    for start, end, _ in find([*product["effects"], *product["may_claim"]], text):
        found.append(Statement(start, end, True, "产品信息里的事实"))
    return sorted(set(found))
