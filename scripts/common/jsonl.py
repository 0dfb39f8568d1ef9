"""JSONL and JSON files: strict reading with line numbers, atomic writing, appending that survives a kill."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.settings import UserError

MAX_LINE_BYTES = 1_000_000  # longer than any sane row; a file without line ends shows up here
MAX_SHOWN = 20  # problems listed in one message
ROLES = ("system", "user", "assistant")
BOM = b"\xef\xbb\xbf"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Problem:
    """One finding in a file. `level` is error (the file cannot be used) or notice (read all the same)."""

    path: Path
    line: int  # from 1; 0 = the file as a whole
    reason: str
    fix: str
    level: str = "error"

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else str(self.path)
        return f"{place}: {self.reason}; fix: {self.fix}"


class DataError(UserError):
    """A file that cannot be used. `problems` holds every finding, the message the first ones."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        lines = [str(problem) for problem in problems[:MAX_SHOWN]]
        if len(problems) > MAX_SHOWN:
            lines.append(f"... and {len(problems) - MAX_SHOWN} more")
        many = f"{len(problems)} problems\n" if len(problems) > 1 else ""
        super().__init__(many + "\n".join(lines))


class _Bad(ValueError):
    """Raised inside the parser: (reason, fix)."""


# --------------------------------------------------------------------------------------------------------- reading


def read_jsonl(path: Path | str, schema: str | None = None, max_line_bytes: int = MAX_LINE_BYTES) -> list[dict]:
    """Read a JSONL file, all of it or none.

    With a `schema` (a name in SCHEMAS) every row is checked against it. Notices (CRLF, empty lines) are counted and
    printed. Raises DataError naming every faulty line, what is wrong and how to fix it.
    """
    rows, errors, notices = [], [], []
    for row, problems in _scan(Path(path), schema, max_line_bytes):
        errors += [p for p in problems if p.level == "error"]
        notices += [p for p in problems if p.level != "error"]
        if row is not None:
            rows.append(row)
    if errors:
        raise DataError(errors)
    for notice in notices:
        print(f"notice: {notice.path}: {notice.reason}")
    return rows


def iter_problems(
    path: Path | str, schema: str | None = None, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Problem]:
    """Every problem of a JSONL file in file order, notices included (those come last)."""
    for _, problems in _scan(Path(path), schema, max_line_bytes):
        yield from problems


def _scan(path: Path, schema: str | None, max_line_bytes: int) -> Iterator[tuple[dict | None, list[Problem]]]:
    """(row or None, problems) for every line, then one last pair for the file as a whole."""
    if schema is not None and schema not in SCHEMAS:
        raise ValueError(f"unknown schema {schema!r}: one of {', '.join(SCHEMAS)}")
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        fix = "run the stage that writes it, or name another file"
        yield None, [Problem(path, 0, what, fix)]
        return

    crlf = empty = rows = faulty = 0
    with open(path, "rb") as file:
        for number, (raw, size) in enumerate(_lines(file, max_line_bytes), start=1):
            crlf += raw.endswith(b"\r\n")
            if size <= max_line_bytes and not raw.strip():
                empty += 1
                continue
            try:
                if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    faulty += 1
                    fix = f"iconv -f UTF-16 -t UTF-8 {path.name} > new.jsonl"
                    yield None, [Problem(path, 1, "the file is UTF-16, not UTF-8", fix)]
                    return
                row = _parse(raw, size, max_line_bytes, path.name, allow_control=schema in (None, "generation"))
            except _Bad as bad:
                faulty += 1
                yield None, [Problem(path, number, *bad.args)]
                continue
            rows += 1
            found = validate_row(row, schema) if schema else []
            yield row, [Problem(path, number, reason, fix) for reason, fix in found]

    whole = []
    if not rows and not faulty and schema:
        whole.append(Problem(path, 0, "the file holds no rows", "run the stage that writes it again"))
    if crlf:
        whole.append(Problem(path, 0, f"{crlf} lines end in CRLF: read as LF", "sed -i 's/\\r$//' FILE", "notice"))
    if empty:
        whole.append(Problem(path, 0, f"{empty} empty lines: left out", "sed -i '/^\\s*$/d' FILE", "notice"))
    yield None, whole


def _lines(file, max_line_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(line, its size in bytes); of an overlong line only the beginning is kept in memory."""
    while raw := file.readline(max_line_bytes + 1):
        size, tail = len(raw), raw
        while not tail.endswith(b"\n") and (tail := file.readline(1 << 20)):
            size += len(tail)
        yield raw, size


def _parse(raw: bytes, size: int, max_line_bytes: int, name: str, allow_control: bool = False) -> dict:
    """One line as an object. Raises _Bad(reason, fix).

    allow_control: escaped control characters may stand in it, because what a model wrote is kept as it is.
    """
    if size > max_line_bytes:
        raise _Bad(
            f"the line has {size / 1e6:.1f} MB, more than the limit of {max_line_bytes / 1e6:.1f} MB",
            "write one object a line, and leave out rows as long as this one",
        )
    if raw.startswith(BOM):
        raise _Bad("a byte order mark (BOM) before the row", f"sed -i '1s/^\\xEF\\xBB\\xBF//' {name}")
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _Bad(*_encoding_problem(raw, error, name)) from None
    try:
        row = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
    except json.JSONDecodeError as error:
        if error.msg.startswith("Invalid control character"):
            code = ord(text[error.pos])
            raise _Bad(
                f"control character U+{code:04X} at column {error.colno}", "delete it, or write it as \\n or \\t"
            ) from None
        hint = "one object a line, as json.dumps(row, ensure_ascii=False) writes it"
        raise _Bad(f"broken JSON at column {error.colno}: {error.msg}", hint) from None
    except RecursionError:
        raise _Bad("brackets nested too deeply", "write flat rows") from None
    if not isinstance(row, dict):
        hint = "put the items of the array on lines of their own" if isinstance(row, list) else "write {...}"
        raise _Bad(f"the line is a JSON {_kind(row)}, not an object", hint)
    if b"\\u" in raw:  # only an escape can bring these characters past the JSON parser
        for text in _strings(row):
            if SURROGATE.search(text):
                raise _Bad("half of a surrogate pair (\\ud800-\\udfff)", "write the whole character, in UTF-8")
            if not allow_control and (found := CONTROL.search(text)):
                raise _Bad(f"control character U+{ord(found[0]):04X}", "delete it")
    return row


def _encoding_problem(raw: bytes, error: UnicodeDecodeError, name: str) -> tuple[str, str]:
    # GBK bytes read as UTF-8 give hardly any Chinese; damaged UTF-8 still gives mostly Chinese.
    text = raw.decode("utf-8", errors="replace")
    if sum(char >= "\u0800" and char != "\ufffd" for char in text) >= text.count("\ufffd"):
        return f"broken UTF-8 at byte {error.start + 1} of the line", "delete the line, or write the file again"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return f"not UTF-8 (byte {error.start + 1} of the line)", "save the file as UTF-8"
    return "not UTF-8, probably gbk", f"iconv -f GB18030 -t UTF-8 {name} > new.jsonl"


def _object(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Bad(f"the key {twice!r} stands twice in one object", "keep one of them")
    return row


def _no_constant(text: str):
    raise _Bad(f"{text} is not JSON", "write null, or leave the row out")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _Bad(f"the number {text[:20]} is too large", "write null, or leave the row out")
    return number


def _integer(text: str) -> int:
    if len(text) > 100:
        raise _Bad(f"a number of {len(text)} digits", "write it as a string")
    return int(text)


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


# --------------------------------------------------------------------------------------------------------- schemas

Found = list[tuple[str, str]]  # (reason, fix)


def validate_row(row: dict, schema: str) -> Found:
    """What is wrong with a row, as (reason, fix); empty when nothing is. The schemas are those of SCHEMAS."""
    return SCHEMAS[schema](row)


def _sft(row: dict) -> Found:
    return _prompt(row) + _answer(row, "completion") + _optional_object(row, "meta")


def _preference(row: dict) -> Found:
    found = _prompt(row) + _answer(row, "chosen") + _answer(row, "rejected") + _optional_object(row, "meta")
    if not found and _contents(row["chosen"]) == _contents(row["rejected"]):
        found.append(("chosen and rejected are equal", "leave the pair out: it teaches nothing"))
    return found


def _prompts(row: dict) -> Found:
    return _prompt(row) + _typed(row, {"meta": dict})


def _style(row: dict) -> Found:
    found = _typed(row, {"input": str, "label": str, "label_english": str}) + _optional_object(row, "metadata")
    for key in ("input", "label", "label_english"):
        if isinstance(row.get(key), str) and not row[key].strip():
            found.append((f"{key} is empty", "fill it in, or leave the row out"))
    return found


def _generation(row: dict) -> Found:
    # An empty completion is allowed here: it is what the model said.
    types = {"id": str, "prompt_id": str, "sample": int, "seed": int, "completion": str, "model": str}
    types |= {"finish_reason": str, "tokens": int, "meta": dict}
    found = _prompt(row) + _typed(row, types)
    if "reference" not in row or not isinstance(row["reference"], str | None):
        found.append(("reference must be a string or null", "write the golden text, or null where there is none"))
    for key in ("sample", "tokens"):
        if type(row.get(key)) is int and row[key] < 0:
            found.append((f"{key} is {row[key]}", "count from 0"))
    if not found and row["id"] != f"{row['prompt_id']}#{row['sample']}":
        found.append((f"id {row['id']!r} is not prompt_id#sample", f"write {row['prompt_id']}#{row['sample']}"))
    return found


SCHEMAS = {"sft": _sft, "preference": _preference, "prompts": _prompts, "style": _style, "generation": _generation}


def _prompt(row: dict) -> Found:
    found = _messages(row, "prompt")
    if not found and row["prompt"][-1]["role"] != "user":
        role = row["prompt"][-1]["role"]
        found.append((f"the last turn of prompt is {role}, not user", "move the answer out of the prompt"))
    return found


def _answer(row: dict, key: str) -> Found:
    found = _messages(row, key)
    if not found and row[key][-1]["role"] != "assistant":
        found.append((f"the last turn of {key} is not assistant", "end it with the answer"))
    return found


def _messages(row: dict, key: str) -> Found:
    """A list of turns: known roles, text in each, and roles in an order that a chat template accepts."""
    if key not in row:
        fix = f'add "{key}": [{{"role": ..., "content": ...}}]'
        if "messages" in row or "instruction" in row:
            fix = "convert the file with scripts/17_prepare_chat.py"
        return [(f"the key {key!r} is missing", fix)]
    turns = row[key]
    if not isinstance(turns, list):
        fix = "write a list of turns, or convert the file with scripts/17_prepare_chat.py"
        return [(f"{key} is a {_kind(turns)}, not a list of turns", fix)]
    if not turns:
        return [(f"{key} has no turns", "fill it in, or leave the row out")]

    found = []
    for i, turn in enumerate(turns):
        place = f"{key}[{i}]"
        if not isinstance(turn, dict):
            found.append((f"{place} is a {_kind(turn)}, not an object", 'write {"role": ..., "content": ...}'))
            continue
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            what = "has no role" if role is None else f"has the unknown role {role!r}"
            found.append((f"{place} {what}", f"use one of {', '.join(ROLES)}"))
        if "content" not in turn:
            found.append((f"{place} has no content", 'add "content": "..."'))
        elif not isinstance(content, str):
            found.append((f"{place}.content is a {_kind(content)}, not a string", "write plain text"))
        elif not content.strip():
            what = "the answer is empty" if role == "assistant" else "the text is empty"
            found.append((f"{place}: {what}", "fill it in, or leave the row out"))
    if found:
        return found

    expected = "user" if key == "prompt" else "assistant"
    for i, turn in enumerate(turns):
        if i == 0 and key == "prompt" and turn["role"] == "system":
            continue
        if turn["role"] != expected:
            fix = "let user and assistant take turns" + (", system only first" if key == "prompt" else "")
            return [(f"{key}[{i}] is {turn['role']} where {expected} is due", fix)]
        expected = "assistant" if expected == "user" else "user"
    return []


def _typed(row: dict, types: dict[str, type]) -> Found:
    found = []
    for key, kind in types.items():
        if key not in row:
            found.append((f"the key {key!r} is missing", f"add it ({_KINDS[kind]})"))
        elif type(row[key]) is not kind:  # not isinstance: true is no number
            found.append((f"{key} is a {_kind(row[key])}, not a {_KINDS[kind]}", f"write a {_KINDS[kind]}"))
    return found


def _optional_object(row: dict, key: str) -> Found:
    return _typed(row, {key: dict}) if key in row else []


def _contents(turns: list[dict]) -> list[str]:
    return [turn["content"].strip() for turn in turns]


_KINDS = {dict: "object", list: "list", str: "string", int: "whole number", float: "number", bool: "true/false"}


def _kind(value) -> str:
    return "null" if value is None else _KINDS[type(value)]


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


def read_json(path: Path | str) -> dict | list:
    """Read a JSON file, its keys and numbers as strictly as a JSONL line's. Raises DataError."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
    except OSError as error:
        problem = Problem(path, 0, error.strerror or str(error), "run the stage that writes it, or name another file")
    except UnicodeDecodeError:
        problem = Problem(path, 0, "not UTF-8", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        problem = Problem(path, error.lineno, f"broken JSON: {error.msg}", "write the file again")
    except RecursionError:
        problem = Problem(path, 0, "brackets nested too deeply", "write it flat")
    except _Bad as bad:
        problem = Problem(path, 0, *bad.args)
    raise DataError([problem])


def write_json(path: Path | str, value) -> None:
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
                    problems.append(Problem(self.path, number, what, "move the file away and run again"))
                else:
                    self.done.add(row[key])
            if problems:
                raise DataError(problems)
        self._file = open(self.path, "ab")  # noqa: SIM115 (closed in __exit__)

    def write(self, row: dict) -> bool:
        """Append one row and hand it to the system at once. A key that is already there is not written: False."""
        if row[self.key] in self.done:
            return False
        self._file.write(_dump_line(row, f"{self.path}: {row[self.key]}"))
        self._file.flush()  # what is flushed outlives kill -9
        self.done.add(row[self.key])
        return True

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
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


@contextmanager
def _atomic(path: Path):
    """A binary file that takes the place of `path` when the block ends well, and leaves no trace when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: a rename across disks is not atomic
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------- counting


def sha256_file(path: Path | str) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_lines(path: Path | str) -> int:
    """How many lines hold something, a last one without a line end included."""
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())
