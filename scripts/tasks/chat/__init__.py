"""Chat in the user's own data: how a row becomes messages, and what its answer was asked to be. Metrics and rewards are
one.

meta holds what the prompt asked for in numbers, null or [] where it asked nothing: {"max_characters": 30,
"must_include": ["雨伞"], "sentences": 2, "list_items": null}. What is right in content no rule can tell: that is for a
reward model (stage 30) or a judge (stage 71).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tasks.base import RewardExample
from tasks.text_metrics import distinct, distinct_share, han_only, mean_of, no_space, passes, per_text, zero_for_none

SENTENCE_ENDS = re.compile("[。！？!?]+[”’」』）)]*")
RUN = 4  # characters: a run of so many that appears twice is a repetition


# --- from a row to a prompt


def messages(row: dict) -> list[dict]:
    """The turns before the answer: of {"prompt": messages}, or of an alpaca row (instruction, input, system,
    history)."""
    if isinstance(row.get("prompt"), list):
        return row["prompt"]
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    content = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [*turns, {"role": "user", "content": content}]


# --- what was asked in numbers: shares, which are dense rewards; pass rates are what
# is published


def count_characters(text: str) -> int:
    return len(no_space(text))


def count_sentences(text: str) -> int:
    """Closed by 。！？, the last may go without; …… closes none."""
    rest = SENTENCE_ENDS.split(text)
    return len(rest) - 1 + bool(re.search(r"\w", rest[-1]))


def count_items(text: str) -> int:
    """Lines that hold something."""
    return sum(bool(line.strip()) for line in text.splitlines())


@per_text
def length(text: str, meta: dict) -> float | None:
    """1 within max_characters, limit / length beyond, 0 for an empty text; white space is not counted."""
    limit, count = meta.get("max_characters"), count_characters(text)
    return None if limit is None else min(1.0, limit / count) if count else 0.0


def wanted_strings(meta: dict) -> list[str]:
    """meta's must_include as a list: a table's cell is one string."""
    asked = meta.get("must_include") or []
    return [asked] if isinstance(asked, str) else asked


@per_text
def include(text: str, meta: dict) -> float | None:
    """Share of the strings in must_include that occur; None where none is asked."""
    wanted = wanted_strings(meta)
    return sum(part in text for part in wanted) / len(wanted) if wanted else None


def _near(key: str, count: Callable[[str], int]):
    """1 where the text has the number that meta[key] asks for, less by the share it is off, at least 0."""

    def nearness(text: str, meta: dict) -> float | None:
        asked = meta.get(key)
        return None if asked is None else max(0.0, 1 - abs(count(text) - asked) / max(1, asked))

    return per_text(nearness)


sentences, list_items = _near("sentences", count_sentences), _near("list_items", count_items)
follows = mean_of(length, include, sentences, list_items)  # None where nothing was asked


# --- of any answer


@per_text
def no_repeat(text: str, meta: dict) -> float | None:
    """1 minus the share of 4-character runs that stand in the text before; None for a text shorter than one run."""
    return distinct_share(text, RUN)


@per_text
def closed(text: str, meta: dict) -> float:
    """1 where the text ends as a sentence or a list does, 0 where it breaks off or is empty."""
    return float(bool(re.search(r"[。！？!?…”’」』）)]\s*$", text)) or count_items(text) > 1)


@per_text
def chinese(text: str, meta: dict) -> float | None:
    """Share of Han characters among letters of any script; digits and punctuation are left out; None where there is
    none."""
    letters = "".join(filter(str.isalpha, text))
    return len(han_only(letters)) / len(letters) if letters else None


REWARDS = {
    "length": length,
    "include": include,
    "sentences": sentences,
    "list_items": list_items,
    "follows": follows,
    "no_repeat": zero_for_none(no_repeat),
    "closed": closed,
    "chinese": chinese,
}
DEFAULT_REWARDS = ("no_repeat", "closed")  # the others need numbers in meta, which a user's rows seldom have
WATCHED_REWARDS = ("follows", "chinese")
METRICS = {
    "length": passes(length),
    "include": passes(include),
    "sentences": passes(sentences),
    "list_items": passes(list_items),
    "follows": follows,
    "all_followed": passes(follows),
    "no_repeat": no_repeat,
    "closed": closed,
    "chinese": chinese,
}
# what stage 71 can say without a model: nothing of what is right
JUDGE = {"要求": follows, "完整": closed, "不重复": no_repeat}
SET_METRICS = {"distinct_2": distinct(2, han_only)}


def mark(text: str, meta: dict) -> list[tuple[int, int, str]]:
    """Spans (start, end, label) that the comparison page highlights, in order, not overlapping: "included" strings that
    were asked for, and "length_fault", what stands beyond max_characters."""
    end, limit = len(text), meta.get("max_characters")
    if limit is not None and count_characters(text) > limit:
        places = [place for place, char in enumerate(text) if not char.isspace()]
        end = places[limit]
    found, last = [], 0
    wanted = [re.escape(part) for part in sorted(wanted_strings(meta), key=len, reverse=True) if part]
    for match in re.finditer("|".join(wanted), text[:end]) if wanted else ():
        if match.start() >= last:
            found.append((match.start(), match.end(), "included"))
            last = match.end()
    return found + ([(end, len(text), "length_fault")] if end < len(text) else [])


COLUMNS = ("length", "include", "all_followed", "no_repeat", "stopped", "distinct_2")
REWARD_EXAMPLES = tuple(
    RewardExample(names, good, bad, meta)
    for names, good, bad, meta in (
        (("no_repeat",), "多喝水，早点睡。", "多喝水多喝水多喝水多喝水。", {}),
        (("no_repeat",), "多喝熱水，早點睡覺。", "多喝熱水多喝熱水多喝熱水。", {}),
        (("closed",), "多喝水，早点睡。", "多喝水，早点", {}),
        (("closed",), "多喝水，早點睡。", "多喝水，早點", {}),
        (("chinese",), "多喝水，早点睡。", "Drink water, sleep early.", {}),
        (("length", "follows"), "带伞。", "出门的时候请一定记得带上雨伞。", {"max_characters": 5}),
        (("include", "follows"), "出门带雨伞。", "出门带水。", {"must_include": ["雨伞"]}),
        (("sentences", "follows"), "下雨了。带伞。", "下雨了", {"sentences": 2}),
        (("list_items", "follows"), "雨伞\n水", "雨伞和水", {"list_items": 2}),
    )
)
