"""JSONL and JSON files: strict reading with line numbers, atomic writing, appending that survives a kill."""

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

from common.preflight.finding import Finding, Refused, fault, list_findings
from common.schemas import SCHEMAS, kind_of, validate_row
from common.settings import UserError

MAX_LINE_BYTES = 1_000_000  # longer than any sane row; a file without line ends shows up here
MAX_DOCUMENT_BYTES = 1 << 30  # of a row of schema text, which may hold a whole book
BOM = b"\xef\xbb\xbf"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")
UTF16 = (b"\xff\xfe", b"\xfe\xff")
WIDE = {  # encoding -> how a file in it begins, with its mark or with two ASCII characters
    "UTF-32": rb"\xff\xfe\0\0|\0\0\xfe\xff",
    "UTF-16": rb"\xff\xfe|\xfe\xff",
    "UTF-16LE": rb"[^\0]\0[^\0]\0",
    "UTF-16BE": rb"\0[^\0]\0[^\0]",
}
COMPRESSED = {
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ": "unxz -k",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
    b"7z\xbc\xaf": "7z x",
}  # first bytes -> what unpacks it


class DataError(UserError):
    """A file that cannot be used. `findings` holds everything found, the message the first ones."""

    def __init__(self, findings: list[Finding]):
        self.findings = findings
        super().__init__((f"{len(findings)} problems\n" if len(findings) > 1 else "") + list_findings(findings))


# --------------------------------------------------------------------------------------------------------- reading


def read_jsonl(path: Path | str, schema: str | None = None, max_line_bytes: int | None = None) -> list[dict]:
    """Read a JSONL file, all of it or none.

    With a `schema` (a name in SCHEMAS) every row is checked against it. Notes (CRLF, empty lines) are counted and
    printed. Raises DataError naming every faulty line, what is wrong and how to fix it.
    """
    rows, found = [], []
    for _, row, findings in scan_jsonl(path, schema, max_line_bytes):
        found += findings
        if row is not None:
            rows.append(row)
    if errors := [finding for finding in found if finding.level == "error"]:
        raise DataError(errors)
    for note in found:
        print(f"notice: {note.file}: {note.reason}")
    return rows


def scan_jsonl(
    path: Path | str, schema: str | None = None, max_line_bytes: int | None = None, wrap: str | None = None
) -> Iterator[tuple[int, dict | None, list[Finding]]]:
    """(line, row or None, what is wrong with it) for every line, then one last (0, None, findings) for the file as a
    whole. max_line_bytes: None = MAX_LINE_BYTES, or MAX_DOCUMENT_BYTES for the schema text. wrap: a line that is a list
    becomes {wrap: list}."""
    path = Path(path)
    if max_line_bytes is None:
        max_line_bytes = MAX_DOCUMENT_BYTES if schema == "text" else MAX_LINE_BYTES
    if schema is not None and schema not in SCHEMAS:
        raise ValueError(f"unknown schema {schema!r}: one of {', '.join(SCHEMAS)}")
    if problem := unreadable(path):
        yield problem.line, None, [problem]
        return

    crlf = empty = rows = faulty = 0
    lines: dict[str, int] = {}  # id of a generation -> its line
    with open(path, "rb") as file:
        for number, (raw, size) in enumerate(_lines(file, max_line_bytes), start=1):
            crlf += raw.endswith(b"\r\n")
            if size <= max_line_bytes and not raw.strip():
                empty += 1
                continue
            try:
                row = _parse(raw, size, max_line_bytes, str(path), schema in (None, "generation"), wrap)
            except Refused as refused:
                faulty += 1
                yield number, None, [Finding(path, number, *refused.args)]
                continue
            rows += 1
            found = validate_row(row, schema) if schema else []
            if schema == "generation" and not found and lines.setdefault(row["id"], number) != number:
                fix = "keep one of the two; a file that two runs wrote at once: delete it and run stage 60 again"
                found = [fault(f"the id {row['id']!r} stands in line {lines[row['id']]} already", fix)]
            yield number, row, [finding.at(path, number) for finding in found]

    whole = []
    if not rows and not faulty and schema:
        whole.append(fault("the file holds no rows", "run the stage that writes it again"))
    if crlf:
        whole.append(fault(f"{crlf} lines end in CRLF: read as LF", f"sed -i 's/\\r$//' {quote(str(path))}", "note"))
    if empty:
        whole.append(fault(f"{empty} empty lines: left out", f"sed -i '/^\\s*$/d' {quote(str(path))}", "note"))
    yield 0, None, [finding.at(path, 0) for finding in whole]


def unreadable(path: Path | str) -> Finding | None:
    """Why a file cannot be read as text at all: it is missing, a folder, a pipe, compressed, or UTF-16. Never waits for
    a pipe."""
    path = Path(path)
    if not path.is_file():
        if path.is_dir():
            return Finding(path, 0, "is a folder, not a file", "name a file in it")
        if path.exists():
            return Finding(
                path, 0, "is a pipe or a device, not a file", "write it to a file first: it is read more than once"
            )
        fix = "run the stage that writes it, or name another file"
        if path.stem.endswith("_val"):
            fix += "; --val-file None trains without"
        return Finding(path, 0, "no such file", fix)
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError as error:
        return Finding(path, 0, error.strerror or str(error), "make it readable, or name another file")
    if command := next((command for magic, command in COMPRESSED.items() if start.startswith(magic)), None):
        return Finding(path, 0, "the file is compressed", f"{command} {quote(str(path))}, then name the unpacked file")
    if wide := next((name for name, begin in WIDE.items() if re.match(begin, start)), None):
        fix = f"iconv -f {wide} -t UTF-8 {quote(str(path))} > new{path.suffix}"
        return Finding(path, 1, f"the file is {wide}, not UTF-8", fix)
    return None


def read_bytes(path: Path | str, packed: bool = False) -> bytes:
    """What is in a file that a user has named. Raises DataError where it is none (unreadable); packed: it may be
    compressed."""
    problem = unreadable(path)
    if problem and not (packed and "compressed" in problem.reason):
        raise DataError([problem])
    return Path(path).read_bytes()


def read_utf8(path: Path | str) -> str:
    """As read_bytes, in UTF-8 with or without a byte order mark. Raises DataError with the line that is not UTF-8."""
    return decode_text(Path(path), read_bytes(path))


def _lines(file: BinaryIO, max_line_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(line, its size in bytes); of an overlong line only the beginning is kept in memory."""
    while raw := file.readline(max_line_bytes + 1):
        size, tail = len(raw), raw
        while not tail.endswith(b"\n") and (tail := file.readline(1 << 20)):
            size += len(tail)
        yield raw, size


def _parse(raw: bytes, size: int, max_line_bytes: int, name: str, allow_control: bool, wrap: str | None = None) -> dict:
    """One line as an object. Raises Refused(reason, fix).

    allow_control: escaped control characters may stand in it, because what a model wrote is kept as it is.
    """
    if size > max_line_bytes:
        reason = f"the line has {size / 1e6:.1f} MB, more than the limit of {max_line_bytes / 1e6:.1f} MB"
        raise Refused(reason, "write one object a line, and leave out rows as long as this one")
    if raw.startswith(BOM):
        raise Refused("a byte order mark (BOM) before the row", f"sed -i '1s/^\\xEF\\xBB\\xBF//' {quote(name)}")
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise Refused(*encoding_fault(raw, error, name)) from None
    try:
        row = DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Invalid control character"):
            reason = f"control character U+{ord(text[error.pos]):04X} at column {error.colno}"
            raise Refused(reason, "delete it, or write it as \\n or \\t") from None
        fix = "one object a line, as json.dumps(row, ensure_ascii=False) writes it"
        raise Refused(f"broken JSON at column {error.colno}: {error.msg}", fix) from None
    except RecursionError:
        raise Refused("brackets nested too deeply", "write flat rows") from None
    if wrap and isinstance(row, list):
        row = {wrap: row}
    if not isinstance(row, dict):
        fix = "put the items of the array on lines of their own" if isinstance(row, list) else "write {...}"
        raise Refused(f"the line is a JSON {kind_of(row)}, not an object", fix)
    if b"\\u" in raw:  # only an escape can bring these characters past the JSON parser
        refuse_characters(row, allow_control)
    return row


def refuse_characters(value: Any, allow_control: bool = False) -> None:
    """Raises Refused where a text in a JSON value holds half a surrogate pair or a control character."""
    for text in texts_of(value):
        if SURROGATE.search(text):
            raise Refused("half of a surrogate pair", "write the whole character, in UTF-8")
        if not allow_control and (found := CONTROL.search(text)):
            raise Refused(f"control character U+{ord(found[0]):04X}", "delete it")


def texts_of(value: Any) -> Iterator[str]:
    """All texts of a JSON value, keys too."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value


def encoding_fault(raw: bytes, error: UnicodeDecodeError, name: str) -> tuple[str, str]:
    """(reason, fix) for bytes that are not UTF-8."""
    # GBK bytes read as UTF-8 give hardly any Chinese; damaged UTF-8 still gives mostly Chinese.
    text = raw.decode("utf-8", errors="replace")
    if sum(char >= "\u0800" and char != "\ufffd" for char in text) >= text.count("\ufffd"):
        return f"broken UTF-8 at byte {error.start + 1} of the line", "delete the line, or write the file again"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return f"not UTF-8 (byte {error.start + 1} of the line)", "save the file as UTF-8"
    return "not UTF-8, probably gbk", f"iconv -f GB18030 -t UTF-8 {quote(name)} > new{Path(name).suffix}"


def _object(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Refused(f"the key {twice!r} appears twice in one object", "keep one of them")
    return row


def _no_constant(text: str):
    raise Refused(f"{text} is not JSON", "write null, or leave the row out")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise Refused(f"the number {text[:20]} is too large", "write null, or leave the row out")
    return number


def _integer(text: str) -> int:
    if len(text) > 100:
        raise Refused(f"a number of {len(text)} digits", "write it as a string")
    return int(text)


# JSON as the standard has it: no NaN, no number beyond a float, no key twice.
STRICT = {"object_pairs_hook": _object, "parse_constant": _no_constant, "parse_float": _finite, "parse_int": _integer}
DECODER = json.JSONDecoder(**STRICT)


def read_json(path: Path | str) -> dict | list:
    """Read a JSON file, its keys and numbers as strictly as a JSONL line's. Raises DataError."""
    path = Path(path)
    try:
        return DECODER.decode(read_utf8(path))
    except json.JSONDecodeError as error:
        problem = Finding(path, error.lineno, f"broken JSON: {error.msg}", "write the file again")
    except RecursionError:
        problem = Finding(path, 0, "brackets nested too deeply", "write it flat")
    except Refused as refused:
        problem = Finding(path, 0, *refused.args)
    raise DataError([problem])


def read_array(
    path: Path | str, raw: bytes | None = None, wrap: str | None = None
) -> tuple[list[tuple[int, dict]], list[Finding]]:
    """(line, object) of every row of a JSON array that can be read, and what is wrong with the others. Where rows share
    a line, as json.dump writes them, they are counted instead, and a notice says so.

    raw: the bytes of the array, where they do not stand in the file as they are. wrap: a row that is a list becomes
    {wrap: list}.
    """
    path = Path(path)
    try:
        text = read_utf8(path) if raw is None else decode_text(path, raw)
    except DataError as error:
        return [], error.findings
    start = BLANK.match(text).end()
    if text[start : start + 1] != "[":
        return [], [Finding(path, text.count("\n", 0, start) + 1, "not a JSON array", "write [{...}, {...}, ...]")]
    items = list(_items(text, start + 1, wrap))
    lines = [line for line, is_row, _, _ in items if is_row]
    if len(set(lines)) < len(lines):
        print(f"notice: {path}: rows share a line: the numbers behind its name count rows")
        counted = iter(range(1, len(lines) + 1))
        items = [(next(counted) if is_row else line, is_row, row, fault) for line, is_row, row, fault in items]
    rows = [(line, row) for line, _, row, _ in items if row is not None]
    return rows, [Finding(path, line, *fault) for line, _, _, fault in items if fault]


def _items(text: str, place: int, wrap: str | None) -> Iterator[tuple[int, bool, dict | None, tuple[str, str] | None]]:
    """(line, is it a row?, the row, (reason, fix)) of what stands in an array behind its [, until nothing more can be
    read."""
    line, counted = 1, 0
    place = BLANK.match(text, place).end()
    more = text[place : place + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = DECODER.raw_decode(text, place)
            if wrap and isinstance(value, list):
                value = {wrap: value}
            if isinstance(value, dict):
                yield line, True, value, None
            else:
                yield line, True, None, (f"the row is {json.dumps(value)[:30]}, not an object", "write {...}")
        except Refused as refused:
            yield line, True, None, refused.args
            try:
                _, place = LENIENT.raw_decode(text, place)  # only to find where the row ends
            except (ValueError, RecursionError):
                return
        except json.JSONDecodeError as error:  # where the row ends is not known: the rest cannot be read
            fix = "one array of objects, as json.dump(rows, file, ensure_ascii=False) writes it"
            yield error.lineno, False, None, (f"broken JSON at column {error.colno}: {error.msg}", fix)
            return
        except RecursionError:
            yield line, True, None, ("brackets nested too deeply", "write flat rows")
            return
        place = BLANK.match(text, place).end()
        if more := text[place : place + 1] == ",":
            place = BLANK.match(text, place + 1).end()
    end = line + text.count("\n", counted, place)
    if text[place : place + 1] != "]":
        yield end, False, None, ("broken JSON: no comma or ] behind a row", "write the array again")
    elif text[place + 1 :].strip():
        yield end, False, None, ("text behind the end of the array", "one array a file")


BLANK = re.compile(r"\s*")
LENIENT = json.JSONDecoder(parse_int=str)  # an integer of 5,000 digits is more than int() takes


def decode_text(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        start = raw.rfind(b"\n", 0, error.start) + 1
        there = raw[start : raw.find(b"\n", error.start) if b"\n" in raw[error.start :] else None]
        error.start -= start
        raise DataError([Finding(path, line, *encoding_fault(there, error, str(path)))]) from None


# --------------------------------------------------------------------------------------------------------- writing


def write_jsonl(path: Path | str, rows: Iterable[dict]) -> int:
    """Write rows to `path`, whole or not at all, and return how many.

    Raises ValueError naming the row that JSON cannot hold (NaN, infinity, half a surrogate pair).
    """
    count = 0
    with _atomic(Path(path)) as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007 (used after the loop)
            file.write(_dump_line(row, f"{path}: row {count}"))
    return count


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. Raises ValueError on NaN and infinity."""
    data = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2).encode("utf-8")
    with _atomic(Path(path)) as file:
        file.write(data + b"\n")


class JsonlAppender:
    """Appends rows to a JSONL file so that a killed stage goes on where it stopped.

    On opening, the rows already there are read (`done` holds their keys) and a torn last line is cut off. Use it as
    a context manager. Raises DataError where the file holds anything but whole rows with distinct keys.
    """

    def __init__(self, path: Path | str, key: str = "id"):
        self.path, self.key = Path(path), key
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_torn_line()
        self.done: set = set()
        if self.path.exists():
            problems = []
            for number, row in enumerate(read_jsonl(self.path, max_line_bytes=1 << 30), start=1):
                if row.get(key) is None or row[key] in self.done:
                    what = f"{key} {row[key]!r} twice" if row.get(key) is not None else f"no {key}"
                    problems.append(Finding(self.path, number, what, "move the file away and run again"))
                else:
                    self.done.add(row[key])
            if problems:
                raise DataError(problems)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed in __exit__)

    def write(self, row: dict) -> bool:
        """Append one row and hand it to the system at once. A key that is already there is not written: False."""
        if row[self.key] in self.done:
            return False
        rest = _dump_line(row, f"{self.path}: {row[self.key]}")
        size = self._file.seek(0, os.SEEK_END)
        try:
            while rest:  # a full disk may take a part of a row
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(size)
            raise _with_path(error, self.path) from None
        self.done.add(row[self.key])
        return True

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> "JsonlAppender":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        """Only a line end says that a row is whole: whatever follows the last one goes."""
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            size = end = file.seek(0, os.SEEK_END)
            keep = 0
            while end > 0:  # from the back, so that a large file is not read for one line
                start = max(0, end - (1 << 16))
                file.seek(start)
                at = file.read(end - start).rfind(b"\n")
                if at >= 0:
                    keep = start + at + 1
                    break
                end = start
            if keep < size:
                file.truncate(keep)
                print(f"notice: {self.path}: cut a torn last line of {size - keep} bytes")


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _dump_line(row: dict, place: str) -> bytes:
    try:
        return _encode(row).encode("utf-8") + b"\n"
    except (ValueError, TypeError) as error:  # UnicodeEncodeError is a ValueError
        raise ValueError(f"{place}: {error}") from error


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with atomic_path(Path(path)) as tmp:
        tmp.write_bytes(data)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write to, for what writes by itself (a plot): it takes the place of `path` when the block ends well,
    and leaves no trace when it does not. What a killed process left goes here, or with the next run (common/runs.py).
    """
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        import psutil

        process = old.name.rsplit(".", 2)[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            old.unlink(missing_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: a rename across disks is not atomic
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:
        raise _with_path(error, path, str(tmp)) from None
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def _atomic(path: Path):
    """As atomic_path, for one who writes to an open binary file."""
    with atomic_path(path) as tmp, open(tmp, "wb") as file:
        yield file


def _with_path(error: OSError, path: Path, tmp: str | None = None) -> OSError:
    """A full disk names no file, and nobody knows a temporary one: say which file was to be written."""
    is_ours = error.errno is not None and error.filename in (None, tmp)
    return type(error)(error.errno, error.strerror, str(path)) if is_ours else error


# --------------------------------------------------------------------------------------------------------- counting


def sha256_file(path: Path | str) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_lines(path: Path | str) -> int:
    """How many lines hold something, a last one without a line end included."""
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())
