"""A corpus of plain text to training files: documents without copies, split by content, for continued pretraining.

Text and Markdown files (UTF-8, UTF-16, GB18030), rows of JSON, JSONL, CSV, TSV or parquet with one column of text, and
folders of such files. A document may be as long as a book: stage 20 splits what is longer than its --max-length. Equal
documents and near-copies (common/preflight/files.py says when) are dropped and counted, the first one is kept. A faulty
document stops the stage with its place, or with --skip-bad is left out and counted.

Reads   --files: files and folders
Writes  --output-dir (processed_data/corpus): text_{train,val,test}.jsonl, rows {"text": ...}; report.json, run.json
Run     python scripts/18_prepare_text.py --files books/ notes.txt
        python scripts/18_prepare_text.py --task news --files news.csv --column 正文
        python scripts/18_prepare_text.py --files sentences.txt --document line --held-out 0
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common.settings import Limit, UserError, next_command, read_settings, show_path

PLAIN_TEXT = (".txt", ".text", ".md")
ROWS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
COLUMNS = ("text", "content", "document", "body", "article", "正文", "内容", "文本")  # the first one that a row has
FEWEST = 3  # with fewer documents a split may stay empty


@dataclass
class Settings:
    # --- data
    task: str = "corpus"
    """writing job: names the folder below"""
    files: tuple[Path, ...] = ()
    """text, rows, and folders, whose files are read with those of their folders"""
    column: str = ""
    """the column of the text; empty = text, content, ..., or the only one that holds a text"""
    document: Literal["file", "paragraphs", "line"] = "file"
    """what is a document of a text file: all of it, what stands between two empty lines, or a line"""
    skip_bad: bool = False
    """leave faulty documents out and count them, instead of stopping"""
    near_copies: bool = True
    """drop near-copies too, not only equal documents"""

    # --- splits: by a hash of the text, so that a grown corpus moves no document
    held_out: Annotated[float, Limit(below=1)] = 0.1
    """share of the documents in val and test together, half for each; 0 = everything is for training"""

    # --- run
    output_dir: Path = Path("processed_data/{task}")
    """all files of this stage"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


def find_files(given: tuple[Path, ...]) -> tuple[list[Path], Counter]:
    """The files to read, each once, and the files of folders that are left out, by their suffix. Raises UserError."""
    found, left_out = {}, Counter()
    for path in given:
        if not path.is_dir():
            found[os.path.realpath(path)] = path
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
        inside = [file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        read = [file for file in inside if file.suffix.lower() in PLAIN_TEXT + ROWS]
        if not read:
            raise UserError(f"{path}: no file that can be read; fix: {', '.join(PLAIN_TEXT + ROWS)}")
        left_out.update(file.suffix or "without a suffix" for file in inside if file not in read)
        found |= {os.path.realpath(file): file for file in read}
    return list(found.values()), left_out


def parts_of(path: Path, unit: str) -> Iterator[tuple[int, str]]:
    """(line, document) of a text file. Raises DataError."""
    from common.jsonl import DataError, unreadable
    from common.preflight.finding import Finding
    from tasks.chat.rows import decode_any

    if (problem := unreadable(path)) and "UTF-16" not in problem.reason:
        raise DataError([problem])
    text = re.sub("\r\n?|[\f\v]", "\n", decode_any(path, path.read_bytes()))
    if re.match(r'\s*(?:\[\s*)?\{\s*"', text):
        raise DataError([Finding(path, 1, "a text file that begins as rows of JSON do", f"name it {path.stem}.jsonl")])
    if unit == "file":
        yield 1, text
    elif unit == "line":
        yield from enumerate(text.split("\n"), start=1)
    else:
        line = 1
        for part in re.split(r"(\n[^\S\n]*\n\s*)", text):
            yield line, part
            line += part.count("\n")


def text_of(row: dict, column: str) -> tuple[str | None, str]:
    """(the text of a row, the name of its column). Raises Refused."""
    from common.preflight.finding import Refused
    from tasks.chat.dialects import KNOWN, TEXTS

    name = column or next((key for key in COLUMNS if key in row), "")
    if not name and {*KNOWN, *TEXTS, "conversation", "chosen"} & row.keys():
        raise Refused("a row of a conversation, not a document", "stage 17, or --column NAME for one column of it")
    if not name and len(texts := [key for key, value in row.items() if isinstance(value, str)]) == 1:
        name = texts[0]
    if not name or name not in row:
        raise Refused(f"no column {column or 'of text is known'} among {', '.join(row) or 'none'}", "--column NAME")
    if not isinstance(row[name], str | None):
        raise Refused(f"{name} is {str(row[name])[:30]}, not a text", "write a text")
    return row[name], name


def read_documents(path: Path, settings: Settings) -> tuple[list[tuple[int, str]], list, Counter]:
    """(line, text) of each document of a file, faults, and the columns that are not read with their counts."""
    from common.jsonl import MAX_DOCUMENT_BYTES, DataError, refuse_characters
    from common.preflight.finding import Finding, Refused
    from tasks.chat.rows import read_rows

    found, faults, unread = [], [], Counter()
    if path.suffix.lower() in ROWS:
        rows, faults = read_rows(path, MAX_DOCUMENT_BYTES)
        for line, row in rows:
            try:
                text, name = text_of(row, settings.column)
                found.append((line, re.sub("\r\n?|[\f\v]", "\n", text or "")))
                unread.update(key for key in row if key != name)
            except Refused as refused:
                faults.append(Finding(path, line, *refused.args))
    else:
        try:
            found = list(parts_of(path, settings.document))
        except DataError as error:
            return [], error.findings, unread
    documents = []
    for line, text in found:
        try:
            refuse_characters(text)
            documents.append((line, text.lstrip("\n").rstrip()))
        except Refused as refused:
            faults.append(Finding(path, line, *refused.args))
    return documents, sorted(faults, key=lambda fault: fault.line), unread


def without_copies(texts: list[str], near: bool) -> tuple[list[str], Counter]:
    """The first of each group of equal or nearly equal documents, in their order, and what was dropped."""
    from common.comparing import comparable
    from common.preflight.files import MIN_CHARACTERS, NEAR, near_copies

    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(comparable(text).lower(), text)
    dropped = Counter(copies=len(texts) - len(first))
    if near:
        keys = [key for key in first if len(key) >= MIN_CHARACTERS]
        found = near_copies(keys, NEAR)
        dropped["near-copies"] = len(found)
        for copy, *_ in found:
            del first[keys[copy]]
    return list(first.values()), dropped


def split(texts: list[str], held_out: float) -> dict[str, list[str]]:
    """Each split's documents in the order of their hashes, so that the first n are a fair sample."""
    from common.comparing import split_key

    def place(text: str) -> float:
        digest = hashlib.sha256((split_key(text) or text).encode("utf-8")).hexdigest()
        return int(digest[:12], 16) / 16**12

    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number, text in sorted((place(text), text) for text in texts):
        splits["test" if number < held_out / 2 else "val" if number < held_out else "train"].append(text)
    if not splits["train"]:  # of very few documents one is for training
        splits["train"].append(splits["val" if splits["val"] else "test"].pop())
    for name in ("val", "test"):  # of a few documents the one drawn nearest
        if held_out and not splits[name] and len(texts) >= FEWEST and len(splits["train"]) > 1:
            splits[name].append(splits["train"].pop(0))
    return splits


def main(settings: Settings) -> None:
    from common.jsonl import DataError, write_json, write_jsonl
    from common.runs import begin_run

    if not settings.files:
        raise UserError("--files names no file; fix: --files corpus.txt, or a folder of files")
    files, left_out = find_files(settings.files)
    texts, problems, facts, dropped = [], [], {}, Counter()
    for path in files:  # before an earlier run's files are touched
        documents, faults, unread = read_documents(path, settings)
        problems += faults
        filled = [text for _, text in documents if text.strip()]
        # paragraphs and lines have empty ones between them
        dropped["empty"] += (len(documents) - len(filled)) * (settings.document == "file" or path.suffix in ROWS)
        texts += filled
        facts[show_path(path)] = {"documents": len(filled), "characters": sum(map(len, filled))}
        if unread:
            facts[show_path(path)]["columns left out"] = dict(unread)
    fatal = [problem for problem in problems if problem.line == 0 or not settings.skip_bad]
    if fatal:
        raise DataError(fatal)
    if not texts:
        raise UserError(f"{show_path(files[0])}: no document holds any text; fix: name other files")

    inputs = {f"file {number}": path for number, path in enumerate(files, start=1)}
    with begin_run(settings.output_dir, settings, inputs, "18_prepare_text", resumable=False) as run:
        for name, counts in facts.items():
            print(f"{name}: " + ", ".join(f"{value} {key}" for key, value in counts.items() if isinstance(value, int)))
            for column, rows in counts.get("columns left out", {}).items():
                print(f"  column {column!r} in {rows} rows: left out")
        for suffix, count in left_out.items():
            print(f"notice: {count} files {suffix}: left out")
        for problem in problems[:20]:
            print(f"  left out: {problem}")
        dropped["faulty"] = len(problems)
        kept, copies = without_copies(texts, settings.near_copies)
        dropped.update(copies)
        splits = split(kept, settings.held_out)
        counts = {name: {"documents": len(part), "characters": sum(map(len, part))} for name, part in splits.items()}
        for name, part in splits.items():
            if part:
                write_jsonl(settings.output_dir / f"text_{name}.jsonl", ({"text": text} for text in part))
            elif settings.held_out:
                print(f"warning: no document fell into {name}: {len(kept)} are few; fix: --document line, more files")
            print(f"{name}: {counts[name]['documents']} documents, {counts[name]['characters']} characters")
        for reason, count in dropped.items():
            print(f"  dropped {count:5d}  {reason}")
        report = {"files": facts, "left out": dict(left_out), "dropped": dict(dropped), "splits": counts}
        write_json(settings.output_dir / "report.json", report)
        run.figure("report", {name: value for name, value in report.items() if name != "files"})
        written = {name: settings.output_dir / f"text_{name}.jsonl" if splits[name] else None for name in splits}
        flags = {"train_file": written["train"], "val_file": written["val"]}
        run.finish(next_command("19_check_data", task=settings.task, **flags))


if __name__ == "__main__":
    main(read_settings(Settings))
