"""Measures that several jobs share, and the pieces they are made of. tasks/base.py says what a measure is."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, wraps

HAN = "〇\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f"  # inside [...]: ideographs to extension G
NOT_HAN = re.compile(f"[^{HAN}]")


# --- pieces of a text


def han_only(text: str) -> str:
    """The Han characters of a text, punctuation and everything else removed."""
    return NOT_HAN.sub("", text)


def no_space(text: str) -> str:
    return re.sub(r"\s", "", text)


def runs(text: str, size: int) -> list[str]:
    """Every run of `size` characters, in order; none of a shorter text."""
    return [text[start : start + size] for start in range(len(text) - size + 1)]


def distinct_share(text: str, size: int) -> float | None:
    """1 minus the share of runs of `size` characters that repeat an earlier one; None for a text shorter than one
    run."""
    found = runs(text, size)
    return len(set(found)) / len(found) if found else None


def ratio_to_range(count: float, low: float, high: float) -> float:
    """1 from low to high; outside, the ratio to the nearer end."""
    return min(1.0, count / low, high / max(count, 1))


def split_of(text: str, val: float, test: float, first: str = "test", percent: bool = False) -> str:
    """train, val or test, decided by a hash of the text alone: more rows never move one.

    percent: shares are whole per cent, of a hundred buckets. first: which of val and test the lowest hashes belong to.
    Both are fixed for a job, because another rule would move its rows.
    """
    number = int(hashlib.sha256(text.encode("utf-8")).hexdigest()[:8], 16)
    place = number % 100 if percent else number / 2**32
    second = "val" if first == "test" else "test"
    return first if place < (test if first == "test" else val) else second if place < val + test else "train"


# --- from a function of one text to a measure


def per_text(function: Callable) -> Callable:
    """f(text, meta) of one text as a measure."""

    @wraps(function)
    def measure(prompts: list[str], completions: list[str], meta: list[dict], **_) -> list[float | None]:
        return [function(text, m) for text, m in zip(completions, meta, strict=True)]

    return measure


def named(*functions: Callable) -> dict[str, Callable]:
    """Functions under their own names, as METRICS and REWARDS hold them."""
    return {function.__name__: function for function in functions}


def mean_of(*parts: Callable, all_known: bool = False) -> Callable:
    """The mean of the parts that apply, None where none does. all_known: None where any does not."""

    def measure(prompts: list[str], completions: list[str], meta: list[dict], **known) -> list[float | None]:
        values = []
        for row in zip(*(part(prompts, completions, meta, **known) for part in parts), strict=True):
            there = [value for value in row if value is not None]
            values.append(sum(there) / len(there) if there and not (all_known and None in row) else None)
        return values

    return measure


def passes(part: Callable) -> Callable:
    """1 where the part is met in full, else 0."""

    def measure(prompts: list[str], completions: list[str], meta: list[dict], **known) -> list[float | None]:
        values = part(prompts, completions, meta, **known)
        return [None if value is None else float(value == 1) for value in values]

    return measure


def zero_for_none(metric: Callable) -> Callable:
    """A metric as a reward: 0 where there is too little text to judge. With None an empty answer would be left out."""

    @wraps(metric)
    def reward(prompts: list[str], completions: list[str], meta: list[dict], **known) -> list[float]:
        return [0.0 if value is None else value for value in metric(prompts, completions, meta, **known)]

    return reward


def near_copy(library: Callable[[], Iterable[str]], size: int, key: Callable[[str], str]) -> Callable:
    """1 where a text shares a run of `size` characters with a text of library(), which is read once; key: what of a
    text is compared."""

    @cache
    def known() -> frozenset[str]:
        return frozenset(run for text in library() for run in runs(key(text), size))

    def measure(prompts: list[str], completions: list[str], meta: list[dict], **_) -> list[float]:
        return [float(not known().isdisjoint(runs(key(text), size))) for text in completions]

    return measure


# --- of a whole set of texts


def distinct(size: int, key: Callable[[str], str]) -> Callable[[list[str]], float]:
    """Distinct n-grams of characters over all n-grams of all texts (Li et al. 2016, arXiv 1510.03055, section 5.3). It
    falls as texts are added: compare sets of one size only."""

    def measure(completions: list[str]) -> float:
        grams = Counter(run for text in completions for run in runs(key(text), size))
        return len(grams) / max(1, grams.total())

    return measure
