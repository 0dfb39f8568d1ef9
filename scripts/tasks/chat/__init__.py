"""Chat in the user's own data: how a row becomes messages, and what its answer was asked to be. Metrics and rewards are one.

Every metric or reward is f(prompts, completions, meta) -> one float or None a completion. completions are plain strings; meta holds
what the prompt asked for in numbers, null or [] where it asked nothing: {"max_characters": 30, "must_include": ["雨伞"], "sentences": 2,
"list_items": null}. None means that the measure does not apply. What is right in content no rule can tell: that is for a reward model
(stage 30) or a judge (stage 71).
"""

from __future__ import annotations

import re
from collections import Counter

from tasks.text_metrics import zero_for_none

FILES = ()  # the figures of this module depend on itself alone

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
SENTENCE_ENDS = re.compile("[。！？!?]+[”’」』）)]*")
RUN = 4  # characters: a run of so many that stands twice is a repetition


# --- from a row to a prompt


def messages(row: dict) -> list[dict]:
    """The turns before the answer: of {"prompt": messages}, or of an alpaca row (instruction, input, system, history)."""
    if isinstance(row.get("prompt"), list):
        return row["prompt"]
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    content = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [*turns, {"role": "user", "content": content}]


# --- what was asked in numbers: shares where a part may be right, so that a policy can climb; pass rates are what is published


def count_characters(text: str) -> int:
    return len(re.sub(r"\s", "", text))


def count_sentences(text: str) -> int:
    """Closed by 。！？, the last may go without; …… closes none."""
    rest = SENTENCE_ENDS.split(text)
    return len(rest) - 1 + bool(re.search(r"\w", rest[-1]))


def count_items(text: str) -> int:
    """Lines that hold something."""
    return sum(bool(line.strip()) for line in text.splitlines())


def length(prompts, completions, meta, **_) -> list[float | None]:
    """1 within max_characters, limit / length beyond, 0 for an empty text; white space is not counted."""
    values = []
    for text, m in zip(completions, meta, strict=True):
        limit, count = m.get("max_characters"), count_characters(text)
        values.append(None if limit is None else min(1.0, limit / count) if count else 0.0)
    return values


def wanted_strings(meta: dict) -> list[str]:
    """meta's must_include as a list: a table's cell is one string."""
    asked = meta.get("must_include") or []
    return [asked] if isinstance(asked, str) else asked


def include(prompts, completions, meta, **_) -> list[float | None]:
    """Share of the strings in must_include that occur; None where none is asked."""
    asked = [wanted_strings(m) for m in meta]
    return [
        sum(part in text for part in parts) / len(parts) if parts else None
        for text, parts in zip(completions, asked, strict=True)
    ]


def _near(key: str, count):
    def measure(prompts, completions, meta, **_) -> list[float | None]:
        values = []
        for text, m in zip(completions, meta, strict=True):
            asked = m.get(key)
            values.append(None if asked is None else max(0.0, 1 - abs(count(text) - asked) / max(1, asked)))
        return values

    measure.__doc__ = (
        f"1 where the text has the number of {key} that was asked, less by the share it is off, at least 0."
    )
    return measure


sentences, list_items = _near("sentences", count_sentences), _near("list_items", count_items)


def follows(prompts, completions, meta, **_) -> list[float | None]:
    """Mean of length, include, sentences and list_items over those that were asked; None where nothing was."""
    columns = [part(prompts, completions, meta) for part in (length, include, sentences, list_items)]
    rows = ([value for value in parts if value is not None] for parts in zip(*columns, strict=True))
    return [sum(known) / len(known) if known else None for known in rows]


def _passes(part):
    def measure(prompts, completions, meta, **_) -> list[float | None]:
        return [None if value is None else float(value == 1) for value in part(prompts, completions, meta)]

    measure.__doc__ = f"1 where {part.__name__} is met in full, else 0."
    return measure


# --- of any answer


def no_repeat(prompts, completions, meta, **_) -> list[float | None]:
    """1 minus the share of 4-character runs that stand in the text before; None for a text shorter than one run."""
    values = []
    for text in completions:
        runs = [text[i : i + RUN] for i in range(len(text) - RUN + 1)]
        values.append(len(set(runs)) / len(runs) if runs else None)
    return values


def closed(prompts, completions, meta, **_) -> list[float]:
    """1 where the text ends as a sentence or a list does, 0 where it breaks off or is empty."""
    return [float(bool(re.search(r"[。！？!?…”’」』）)]\s*$", text)) or count_items(text) > 1) for text in completions]


def chinese(prompts, completions, meta, **_) -> list[float | None]:
    """Share of Han characters among letters of any script; digits and punctuation are left out; None where there is none."""
    letters = ["".join(char for char in text if char.isalpha()) for text in completions]
    return [len(HAN.findall(text)) / len(text) if text else None for text in letters]


REWARDS = {
    "length": length, "include": include, "sentences": sentences, "list_items": list_items, "follows": follows,
    "no_repeat": zero_for_none(no_repeat), "closed": closed, "chinese": chinese,
}  # fmt: skip
DEFAULT_REWARDS = ("no_repeat", "closed")  # the others need numbers in meta, which a user's rows seldom have
WATCHED_REWARDS = ("follows", "chinese")
METRICS = {
    "length": _passes(length), "include": _passes(include), "sentences": _passes(sentences), "list_items": _passes(list_items),
    "follows": follows, "all_followed": _passes(follows), "no_repeat": no_repeat, "closed": closed, "chinese": chinese,
}  # fmt: skip


def distinct_2(completions: list[str]) -> float:
    """Distinct pairs of Han characters over all pairs of all texts (Li et al. 2016, arXiv 1510.03055, section 5.3)."""
    keys = ["".join(HAN.findall(text)) for text in completions]
    pairs = Counter(key[i : i + 2] for key in keys for i in range(len(key) - 1))
    return len(pairs) / max(1, pairs.total())


SET_METRICS = {"distinct_2": distinct_2}  # of a whole set of texts, not of one


def mark(text: str, meta: dict) -> list[tuple[int, int, str]]:
    """Spans (start, end, label) that the comparison page highlights, in order, not overlapping: "included" strings that were asked for, and
    "length_fault", what stands beyond max_characters."""
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
