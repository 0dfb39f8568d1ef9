"""Classical verse as data: read chinese-poetry's JSON, clean it, name its form, split it by content.

Stages 00 (pretraining) and 10 (instructions) share these functions, so that a poem held out by one is held out by the
other.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from common.jsonl import SURROGATE, DataError, read_array, read_bytes
from common.preflight.finding import Finding
from common.settings import UserError
from tasks import text_metrics
from tasks.poems.prosody import FORM_OF_SHAPE, split_lines, to_simplified
from tasks.text_metrics import NOT_HAN, han_only, runs

SHARED_RUN = 10  # two poems that share this many consecutive characters are near-copies of each other


split_of = partial(text_metrics.split_of, val=2, test=2, percent=True)  # of a poem's characters


@dataclass(frozen=True)
class Poem:
    """One poem in simplified characters. `lines` is (4 or 8) lines of (5 or 7) characters after full cleaning."""

    title: str
    author: str
    text: str  # with punctuation, on one line
    form: str  # a key of prosody.FORMS; below full cleaning the nearest one by line count and length
    source: str  # "<file or folder>#<index>", for messages

    @cached_property
    def key(self) -> str:
        """The characters alone: identity for duplicates, splits and near-copies."""
        return han_only(self.text)

    @property
    def short_title(self) -> str:
        """The title as a request may name it; empty for a preface in its place, and for 句, which heads fragments."""
        return self.title if len(self.title) <= 20 and self.title != "句" else ""


def load_records(path: Path) -> list[dict]:
    """Records of author, title, paragraphs from a .json / .json.xz array, or from a folder of poet.*.json files.

    Raises UserError when the file is not such an array; a record of another shape is named by its line, index and
    first words.
    """
    if path.is_dir():
        files = [file for file in path.glob("poet.*.json") if file.name.split(".")[-2].isdigit()]
        if not files:
            raise UserError(f"{path}: no poet.*.<number>.json inside; fix: name the folder quantangshi itself")
        files.sort(key=lambda file: (file.name.split(".")[1], int(file.name.split(".")[-2])))
        return [record for file in files for record in load_records(file)]
    if not path.exists():
        raise UserError(f"{path}: no such file; fix: give --corpus a .json, a .json.xz or a folder of poet.*.json")
    raw = read_bytes(path, packed=path.suffix == ".xz")
    if path.suffix == ".xz":
        try:
            raw = lzma.decompress(raw)
        except lzma.LZMAError as error:
            raise UserError(f"{path}: damaged xz file ({error}); fix: copy or unpack it again") from None
    rows, findings = read_array(path, raw)
    for index, (line, record) in enumerate(rows):
        if fault := _record_fault(record):
            reason = f"record {index} ({json.dumps(record)[:60]}…): {fault}"
            findings.append(Finding(path, line, reason, "correct it, or leave it out"))
    if findings:
        raise DataError(findings)
    return [record for _, record in rows]


def _record_fault(record: dict) -> str:
    paragraphs = record.get("paragraphs")
    if not isinstance(paragraphs, list) or not all(isinstance(part, str) for part in paragraphs):
        return "no list of strings named paragraphs"
    texts = [*paragraphs, *(record.get(name) or "" for name in ("title", "author"))]
    if not all(isinstance(text, str) for text in texts):
        return "title or author is not a string"
    return "a lone surrogate, half of a character" if SURROGATE.search("".join(texts)) else ""


# what basic cleaning removes from inside a text, and what it cannot fix and so drops, each with the reason reported
EDITORS_NOTE = re.compile(r"[（(][^（）()]*[）)]|[\[［【〖][^\]］】〗]*[\]］】〗]")
DOUBLED_MARK = re.compile(r"([，。！？；、])[，。！？；、]+")  # what stands where a note was cut out
FAULTS = (
    ("unclosed bracket or 《", re.compile(r"[（）()\[\]［］【】〖〗《》]")),
    ("missing character (□)", re.compile(r"[□■○◇]|\ufffd")),
    ("glyph description {…}", re.compile(r"[{}]")),
    ("private-use character", re.compile("[\ue000-\uf8ff]")),
    ("ASCII letters or digits", re.compile(r"[0-9A-Za-z]")),
)


def clean_record(record: dict, level: str, source: str) -> tuple[Poem | None, str]:
    """One record to one poem, or None and the reason it was dropped.

    level "none" keeps every text as it is printed; "basic" cuts editors' notes and drops damaged texts; "full" keeps
    only regular verse: 4 or 8 equal lines of 5 or 7 Han characters.
    """
    text = to_simplified("".join(record["paragraphs"]).strip())
    if not text:
        return None, "empty"
    if level != "none":
        text = DOUBLED_MARK.sub(r"\1", EDITORS_NOTE.sub("", text))
        for reason, pattern in FAULTS:
            if pattern.search(text):
                return None, reason
    lines = split_lines(text)
    if not lines:
        return None, "empty"
    lengths = {len(line) for line in lines}
    if level == "full":
        if len(lengths) > 1:
            return None, "uneven line lengths"
        if len(lines) % 2:
            return None, "odd line count"
        if (len(lines), len(lines[0])) not in FORM_OF_SHAPE:
            return None, "other form (not 4 or 8 lines of 5 or 7)"
        if NOT_HAN.search("".join(lines)):
            return None, "character that is not Han"
    count = 4 if len(lines) <= 4 else 8
    width = 5 if sum(map(len, lines)) / len(lines) <= 6 else 7
    form = FORM_OF_SHAPE[count, width]
    title = to_simplified(str(record.get("title") or "")).strip()
    return Poem(title, to_simplified(str(record.get("author") or "")).strip(), text, form, source), ""


def clean(records: Iterable[dict], level: str, source: str) -> tuple[list[Poem], dict[str, int]]:
    """All records to poems plus a count per reason dropped; exact duplicates (by characters) are dropped unless level
    is none."""
    poems: list[Poem] = []
    dropped: dict[str, int] = {}
    seen: set[str] = set()
    for index, record in enumerate(records):
        poem, reason = clean_record(record, level, f"{source}#{index}")
        if poem is not None and level != "none":
            if poem.key in seen:
                poem, reason = None, "duplicate"
            else:
                seen.add(poem.key)
        if poem is None:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            poems.append(poem)
    return poems, dropped


def without_near_copies(poems: list[Poem], others: Iterable[Poem]) -> list[Poem]:
    """The poems that share no run of SHARED_RUN characters with one of `others`."""

    def pieces(key: str) -> list[str]:
        return runs(key, SHARED_RUN) or [key]  # a shorter poem is compared whole

    taken = {run for poem in others for run in pieces(poem.key)}
    return [poem for poem in poems if taken.isdisjoint(pieces(poem.key))]


def split_poems(poems: list[Poem]) -> tuple[dict[str, list[Poem]], int]:
    """Poems by split, and how many were dropped as near-copies.

    Near-copies never straddle a split: a val poem that is one of a test poem is dropped, and so is a train poem that is
    one of either. They are dropped, not moved, so that a row's split depends on nothing but its own text.
    """
    splits: dict[str, list[Poem]] = {"test": [], "val": [], "train": []}
    for poem in poems:
        splits[split_of(poem.key)].append(poem)
    splits["val"] = without_near_copies(splits["val"], splits["test"])
    splits["train"] = without_near_copies(splits["train"], splits["test"] + splits["val"])
    return splits, len(poems) - sum(map(len, splits.values()))
