"""What the preflight passes around: the files as its checks see them, and the report they make."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.preflight.finding import LEVELS, Finding
from common.settings import show_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a row's answers are called. A style row and a document are one text each: no chat template, no answer.
ANSWERS = {"sft": ("completion",), "preference": ("chosen", "rejected"), "kto": ("completion",)}
ANSWERS |= {"prompts": (), "style": (), "text": ()}
PLAIN = {"style": "input", "text": "text"}  # schema -> the key of its one text, for schemas without messages


def is_wanted(row: dict, key: str) -> bool:
    """Is this answer one to be learnt? Not the rejected one of a pair, nor one labelled bad."""
    return key != "rejected" and row.get("label") is not False


@dataclass
class Report:
    schema: str
    findings: list[Finding]
    figures: dict  # "train" and "val" -> rows, tokens, share_truncated, share_losing_eos, rows_without_trained_token
    measures: dict  # name -> figure of all files together, e.g. what length tells of a pair
    allowed: dict[str, int]  # check -> findings that --allow left out

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def groups(self) -> list[list[Finding]]:
        """Findings of one kind together, errors first; numbers in the reason do not tell two kinds apart."""
        groups: dict[tuple, list[Finding]] = {}
        for finding in self.findings:
            key = (LEVELS.index(finding.level), finding.file, re.sub(r"\d+", "#", finding.reason))
            groups.setdefault(key, []).append(finding)
        return [groups[key] for key in sorted(groups, key=lambda key: key[0])]

    def as_dict(self) -> dict:
        counts = {level: sum(finding.level == level for finding in self.findings) for level in LEVELS}
        report = {"schema": self.schema, "counts": counts, "allowed": self.allowed, "figures": self.figures}
        return report | {"measures": self.measures, "findings": [asdict(finding) for finding in self.findings]}


@dataclass(frozen=True)
class Length:
    """Token counts of one sequence that training would see: a prompt with one answer."""

    line: int
    prompt: int  # tokens with no loss, the header of the assistant's turn included
    total: int
    eos_at: int | None  # index of the last eos; None without an answer, or where the template writes none

    def loses_eos(self, limit: int) -> bool:
        return self.eos_at is not None and self.eos_at >= limit

    def truncated(self, limit: int) -> bool:
        """Tokens of the text itself are lost, not just eos or the line end behind it."""
        return (self.total if self.eos_at is None else self.eos_at) > limit


@dataclass
class File:
    """A file as the checks see it: the rows that passed their schema, and how long they are."""

    name: str  # train or val
    path: Path
    rows: list[tuple[int, dict]] = field(default_factory=list)  # (line, row)
    lengths: list[Length] = field(default_factory=list)

    def finding(self, check: str, level: str, line: int, reason: str, fix: str) -> Finding:
        return Finding(show_path(self.path), line, reason, fix, level, check)


@dataclass
class Data:
    files: list[File]  # train, then val if there is one
    schema: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int  # tokens
    enable_thinking: bool = False
    context: int | None = None  # tokens that the model reads, where known
    measures: dict = field(default_factory=dict)  # further figures, filled by checks


Check = Callable[[Data], Iterable[Finding]]
