"""Classical verse as data: read chinese-poetry's JSON, clean it, name its form, split it by content.

Stages 00 (pretraining) and 10 (instructions) share these functions, so that a poem held out by one is held out by the other.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.settings import UserError
from tasks.prosody import FORM_OF_SHAPE, split_lines, to_simplified

NOT_HAN = re.compile(
    "[^\u3007\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f]"
)  # 〇 and the CJK ideographs to extension G
CLEANING_LEVELS = ("none", "basic", "full")
SHARED_RUN = 10  # two poems that share this many consecutive characters are near-copies of each other


@dataclass(frozen=True)
class Poem:
    """One poem in simplified characters. `lines` is (4 or 8) lines of (5 or 7) characters after full cleaning."""

    title: str
    author: str
    text: str  # with punctuation, on one line
    form: str  # a key of prosody.FORMS; below full cleaning the nearest one by line count and length
    source: str  # "<file or folder>#<index>", for messages

    @property
    def key(self) -> str:
        """The characters alone: identity for duplicates, splits and near-copies."""
        return han_only(self.text)


def load_records(path: Path) -> list[dict]:
    """Records of author, title, paragraphs from a .json / .json.xz array, or from a folder of poet.*.json files.

    Raises UserError when the file is not such an array; a record of another shape is named by its index.
    """
    if path.is_dir():
        files = sorted(
            path.glob("poet.*.json"), key=lambda file: (file.name.split(".")[1], int(file.name.split(".")[2]))
        )
        if not files:
            raise UserError(f"{path}: no poet.*.json inside; mend: name the folder quan_tang_shi / quantangshi itself")
        return [record for file in files for record in load_records(file)]
    if not path.exists():
        raise UserError(f"{path}: no such file; mend: give --corpus a .json, a .json.xz or a folder of poet.*.json")
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    try:
        records = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; mend: convert the file to UTF-8 first") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: broken JSON ({error.msg}); mend: the file must be one JSON array"
        ) from None
    if not isinstance(records, list):
        raise UserError(
            f"{path}: not a JSON array; mend: chinese-poetry's schema is [{{author, title, paragraphs}}, …]"
        )
    for index, record in enumerate(records):
        paragraphs = record.get("paragraphs") if isinstance(record, dict) else None
        if not isinstance(paragraphs, list) or not all(isinstance(part, str) for part in paragraphs):
            raise UserError(f"{path}: record {index} has no list of strings named paragraphs; mend: fix or remove it")
    return records


def han_only(text: str) -> str:
    """The Han characters of a text, punctuation and everything else removed."""
    return NOT_HAN.sub("", text)


# what basic cleaning removes from inside a text, and what it cannot mend and so drops, each with the reason reported
EDITORS_NOTE = re.compile(r"[（(][^（）()]*[）)]|[\[［【〖][^\]］】〗]*[\]］】〗]")
DOUBLED_MARK = re.compile(r"([，。！？；、])[，。！？；、]+")  # what stands where a note was cut out
FAULTS = (
    ("unclosed bracket or 《", re.compile(r"[（）()\[\]［］【】〖〗《》]")),
    ("missing character (□ or ?)", re.compile(r"[□■○◇]|\ufffd")),
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
    """All records to poems plus a count per reason dropped; exact duplicates (by characters) are dropped unless level is none."""
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


def split_of(key: str) -> str:
    """train, val (2 %) or test (2 %), decided by the characters alone: a grown corpus never moves a poem."""
    bucket = int(hashlib.sha256(key.encode("utf-8")).hexdigest()[:8], 16) % 100
    return "test" if bucket < 2 else "val" if bucket < 4 else "train"


def runs_of(key: str, length: int = SHARED_RUN) -> Iterable[str]:
    """Every run of `length` consecutive characters; a shorter text is one run."""
    return (key[start : start + length] for start in range(max(1, len(key) - length + 1)))


def split_poems(poems: list[Poem], held_out: Iterable[Poem] = ()) -> tuple[dict[str, list[Poem]], int]:
    """Poems by split, and how many were dropped as near-copies.

    Near-copies never straddle a split: a val poem that shares a run of SHARED_RUN characters with a test poem is dropped, and so
    is a train poem that shares one with either, or with a poem of `held_out` (what another corpus holds out). They are dropped, not
    moved, so that a row's split depends on nothing but its own text.
    """
    splits: dict[str, list[Poem]] = {"test": [], "val": [], "train": []}
    for poem in poems:
        splits[split_of(poem.key)].append(poem)
    taken = {run for poem in held_out for run in runs_of(poem.key)}
    before = len(poems)
    for name in ("test", "val", "train"):
        if name != "test":
            splits[name] = [poem for poem in splits[name] if taken.isdisjoint(runs_of(poem.key))]
        taken.update(run for poem in splits[name] if name != "train" for run in runs_of(poem.key))
    return splits, before - sum(map(len, splits.values()))
