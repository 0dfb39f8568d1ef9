"""Columns that call the answer of a row good or bad: which ones a file has, how they are written, and what they say of
a row.

Words and 1/0 are read by one table. Whole or half stars of five: 4 and 5 are good, 1 and 2 bad, what lies between is
left out, and so is an empty label among others. A scale belongs to the file, not to the row: 1 is good where the others
are 0, and bad where the others are 5.
"""

import re
from collections.abc import Iterable
from typing import Any

from common.preflight.finding import Refused

WORDS = ("label", "kto_tag", "kto_label", "thumbs", "thumbs_up", "feedback", "is_good", "desirable")
RATINGS = ("rating", "stars", "score")  # these may count stars
COLUMNS = WORDS + RATINGS
BAD = {
    *("false", "0", "-1", "bad", "no", "n", "down", "thumbs_down", "thumbsdown", "dislike", "disliked", "downvote"),
    *("undesirable", "rejected", "negative", "👎", "差", "坏", "不好", "差评", "否", "错", "踩", "点踩", "不满意"),
}
GOOD = {
    *("true", "1", "good", "yes", "y", "up", "thumbs_up", "thumbsup", "like", "liked", "upvote"),
    *("desirable", "chosen", "positive", "👍", "好", "好评", "是", "对", "赞", "点赞", "满意"),
}
HOW_DRAWN = re.compile("[\ufe00-\ufe0f\U0001f3fb-\U0001f3ff]")  # of an emoji: its style, its skin
NEITHER = {"neutral", "none", "null", "nan", "unrated", "中立", "中评", "一般"}
MOST_STARS, GOOD_FROM, BAD_UP_TO = 5, 4, 2


def word_of(value: Any) -> str:
    """A value as it is looked up: True -> "true", 1.0 -> "1", "Thumbs Up" -> "thumbs_up", ★★★☆☆ and 3/5 -> "3"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = HOW_DRAWN.sub("", str(value)).strip().lower()
    if stars := re.fullmatch("([★⭐]{1,5})☆*", word):
        return str(len(stars[1]))
    word = re.sub(r"^([0-9.]+) ?(?:/ ?5|stars?|颗?星)$", r"\1", word)
    word = re.sub(r"(?<=\w)[ -](?=\w)", "_", word)
    return re.sub(r"(?<=[0-9])\.0+$", "", word)


def _number(word: str) -> float | None:
    return float(word) if re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]{1,9})?", word) else None


def scales(rows: Iterable[dict]) -> dict[str, str]:
    """The label columns of a file and how each is written: words, stars, or unclear. A column without any known word is
    no label."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.get("chosen") is None and row.get("rejected") is None:  # of a pair it says nothing about one answer
            for key in COLUMNS:
                if row.get(key) is not None and (word := word_of(row[key])):
                    found.setdefault(key, set()).add(word)
    return {key: scale for key, words in found.items() if (scale := _scale(key, words))}


def _scale(key: str, words: set[str]) -> str | None:
    if key in RATINGS:
        numbers = {_number(word) for word in words}
        if None not in numbers and max(numbers) > 1:
            stars = max(numbers) <= MOST_STARS and min(numbers) >= 0 and all(n * 2 == int(n * 2) for n in numbers)
            return "stars" if stars else None if key == "score" else "unclear"
        if words == {"1"}:
            return "unclear"
    return "words" if words & (GOOD | BAD) else None


def judge(row: dict, columns: dict[str, str]) -> tuple[str | None, set[str]]:
    """(good, bad, neither, or None where the row is not labelled; the columns read). Raises Refused where a label
    cannot be read."""
    verdicts = {}
    there = {key for key in columns if key in row}
    for key, scale in columns.items():
        word = word_of(row[key]) if row.get(key) is not None else ""
        if not word:
            continue
        other = f"write true or false; --rename {key}=other leaves the column unread"
        if scale == "unclear":
            what = f"{key} {row[key]!r}: the column holds no scale of five stars and no 1 beside 0"
            raise Refused(what, other)
        if scale == "stars":
            stars = _number(word)
            verdicts[key] = "good" if stars >= GOOD_FROM else "bad" if stars <= BAD_UP_TO else "neither"
        elif word in GOOD | BAD | NEITHER:
            verdicts[key] = "good" if word in GOOD else "bad" if word in BAD else "neither"
        else:
            raise Refused(f"{key} is {row[key]!r}, which says neither good nor bad", other)
    if len(set(verdicts.values())) > 1:
        said = " and ".join(f"{key} {row[key]!r}" for key in verdicts)
        raise Refused(f"the labels contradict each other: {said}", "correct one, or rename one to leave it unread")
    return next(iter(verdicts.values()), "neither" if there else None), there
