"""Rows that are longer than max_length: refused, dropped, or cut at whole turns; never inside an answer.

    rows, long = fit_rows(rows, "sft", tokenizer, max_length=512, policy="cut")
    print(long.sentence())

What cut does: a conversation of SFT ends at an earlier answer. Of a pair, a labelled answer or a prompt the oldest
exchanges are left out, the system text stays: there the last answer is what counts. A row that no such cut makes short
enough is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.conversations import is_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LongRowsPolicy = Literal["refuse", "drop", "cut"]


@dataclass
class LongRows:
    policy: str
    max_length: int
    rows: int
    tokens: dict[str, int]  # percentiles of what a row needs
    length_for_99: int  # the max_length that keeps 99 % of the rows whole
    long: list[int]  # places of the rows that do not fit
    cut: int = 0
    dropped: int = 0

    def as_dict(self) -> dict:
        return asdict(self) | {"long": len(self.long)}

    def sentence(self) -> str:
        tokens = ", ".join(f"{name} {count}" for name, count in self.tokens.items())
        what = f"{len(self.long)} of {self.rows} rows need more than {self.max_length} tokens ({tokens})"
        done = "" if self.policy == "refuse" else f": {self.cut} cut, {self.dropped} dropped"
        return what + done + (f"; --max-length {self.length_for_99} keeps 99 % whole" if self.long else "")


def fit_rows(
    rows: list[dict],
    schema: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    policy: LongRowsPolicy,
    enable_thinking: bool = False,
) -> tuple[list[dict], LongRows]:
    """The rows that fit, in their order, and what was done. With refuse all rows come back, and `long` says which do
    not fit."""
    from common.preflight.checks import percentiles

    needs = lengths(rows, schema, tokenizer, max_length, enable_thinking)
    known = [need for need in needs if need is not None]
    whole = percentiles(known)
    places = [place for place, need in enumerate(needs) if need is not None and need > max_length]
    long = LongRows(policy, max_length, len(rows), whole, whole.get("p99", 0), places)
    if policy == "refuse" or not places:
        return rows, long

    shorter: dict[int, dict] = {}
    if policy == "cut":
        tried = [(place, row) for place in places for row in cuts(rows[place], schema)]
        found = lengths([row for _, row in tried], schema, tokenizer, max_length, enable_thinking)
        for (place, row), need in zip(tried, found, strict=True):
            if need is not None and need <= max_length:
                shorter.setdefault(place, row)  # the longest one comes first
    long.cut, long.dropped = len(shorter), len(places) - len(shorter)
    left_out = set(places) - shorter.keys()
    return [shorter.get(place, row) for place, row in enumerate(rows) if place not in left_out], long


def lengths(
    rows: list[dict], schema: str, tokenizer: PreTrainedTokenizerBase, max_length: int, enable_thinking: bool
) -> list[int | None]:
    """Tokens that each row needs, its eos included, for its longest answer; None where the chat template refuses it."""
    from common.preflight.checks import measure
    from common.preflight.data import Data, File

    file = File("train", Path("rows"), list(enumerate(rows)))
    measure(file, Data([file], schema, tokenizer, max_length, enable_thinking))
    needs: list[int | None] = [None] * len(rows)
    for length in file.lengths:
        whole = length.total if length.eos_at is None else length.eos_at + 1
        needs[length.line] = max(needs[length.line] or 0, whole, length.prompt + 1)  # room for one token at least
    return needs


def cuts(row: dict, schema: str) -> Iterator[dict]:
    """The row with fewer and fewer whole turns, the longest first."""
    if schema == "sft":
        turns = row["prompt"] + row["completion"]
        answers = [i for i, turn in enumerate(turns[:-1]) if is_trained(turn)]
        for end in reversed(answers):
            start = min(end, len(row["prompt"]))
            yield row | {"prompt": turns[:start], "completion": turns[start : end + 1]}
        return
    prompt = row["prompt"]
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    for start in range(len(system) + 1, len(prompt)):
        if prompt[start]["role"] == "user":  # a call of a tool goes with its reply
            yield row | {"prompt": system + prompt[start:]}
