"""A user's own rows, whatever their format, as the repo's: reading with line numbers, naming the format, converting.

Formats, told apart row by row: alpaca (instruction, input, output, history, system), prompt/completion (strings or
messages), messages, ShareGPT (conversations of from/value), pairs (chosen/rejected with a prompt, or implicit: two
conversations that begin alike), and prompts alone. Files: JSON arrays, JSONL, CSV, TSV, parquet.
"""

import csv
import hashlib
import io
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.jsonl import (
    BOM,
    MAX_LINE_BYTES,
    UTF16,
    DataError,
    decode_text,
    read_array,
    refuse_characters,
    scan_jsonl,
    unreadable,
)
from common.preflight.finding import Finding, Refused
from common.schemas import validate_row
from tasks import chat
from tasks.chat.dialects import BARE, LIKE_ANSWERS, QUESTIONS, TEMPLATED, history_of, normalise, refuse_media
from tasks.chat.labels import WORDS, judge, scales
from tasks.chat.turns import REASONING, reasoning_of, refuse_weightless, tools_of, turns_of, unread_keys

LISTS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations", "history")
NESTED = ("history", "messages", "conversations", "conversation")  # in a CSV cell these are JSON
COLUMNS = (  # by format; a pair takes its prompt from any
    ("chosen", "rejected"),
    ("instruction", "input", "output"),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("question", "answer"),
    ("query", "response"),
    ("rejected_response",),
    ("conversation",),
)
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?")  # 007 is a name
# file name -> schema of common/schemas.py
SCHEMAS = {"sft": "sft", "pref": "preference", "prompts": "prompts", "kto": "kto"}
TABLES = (".csv", ".tsv")
OTHER_FILES = (".xlsx", ".xls", ".docx")
# name -> codec, the table whose order has the common characters first, the last first byte of those
LEGACY = {"GB18030": ("gb18030", "gb2312", b"\xd7"), "Big5": ("big5hkscs", "big5", b"\xc6")}
FEWEST_COMMON = 0.4  # of the characters; in the wrong encoding it is less


@dataclass(frozen=True)
class Converted:
    kind: str  # sft, pref, prompts or kto
    format: str  # alpaca, prompt/completion, messages, sharegpt, pairs, pairs (implicit prompt), prompt
    row: dict  # in the repo's format, meta included
    line: int
    unused: tuple[str, ...]  # columns, and keys of messages, that the format does not know
    label: str | None = None  # good, bad or neither, where the row is labelled


# (line, object) of what can be read, and what is wrong with the rest
Rows = tuple[list[tuple[int, dict]], list[Finding]]


# --------------------------------------------------------------------------------------------------------- reading


def read_rows(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Rows:
    """The rows of a file, whatever it is. Parquet counts rows instead of lines. max_line_bytes: of a line of JSONL."""
    suffix = path.suffix.lower()
    if suffix in (".txt", ".md") and path.is_file():
        return [], [Finding(path, 0, "a text file holds no rows", "scripts/18_prepare_text.py reads plain text")]
    if suffix in OTHER_FILES and path.is_file():
        return [], [Finding(path, 0, f"{suffix} files are not read", "save it as CSV (UTF-8) or JSONL")]
    is_table = suffix in TABLES
    if (problem := unreadable(path)) and not (is_table and "UTF-16" in problem.reason):
        return [], [problem]
    if suffix == ".parquet":
        return _parquet(path)
    if is_table:
        try:
            return _table(path, decode_any(path, path.read_bytes()))
        except DataError as error:
            return [], error.findings
    with open(path, "rb") as file:
        start = file.read(1 << 16).removeprefix(BOM).lstrip()[:1]
    if start == b"[" and not _is_list_of_turns(path):
        return read_array(path, wrap=BARE)
    if start == b"{" and (raw := _instances(path)):
        return read_array(path, raw)
    if start == b"{" and suffix == ".json" and (problem := _one_object(path)):
        return [], [problem]
    rows, problems = [], []
    for line, row, findings in scan_jsonl(path, max_line_bytes=max_line_bytes, wrap=BARE):
        problems += [finding for finding in findings if finding.level == "error"]
        if row is not None:
            rows.append((line, row))
    return rows, problems


def _is_list_of_turns(path: Path) -> bool:
    """Is the first line of the file a conversation, a list of turns or of texts?"""
    with open(path, "rb") as file:
        line = next((line for line in file if line.removeprefix(BOM).strip()), b"")
    try:
        first = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    turn = first[0] if isinstance(first, list) and first else None
    return isinstance(turn, str) or (isinstance(turn, dict) and bool({"role", "from"} & turn.keys()))


def _instances(path: Path) -> bytes | None:
    """The list of a file that is one object with its rows under "instances", on the lines on which it stands."""
    with open(path, "rb") as file:
        if not re.match(rb'\s*\{[^\[\]{}]*"instances"\s*:\s*\[', file.read(1 << 12).removeprefix(BOM)):
            return None
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "instruction" in (value := json.loads(text)) or not isinstance(value["instances"], list):
            return None
    except (ValueError, RecursionError):
        return None
    start = text.index("[", text.index('"instances"'))
    _, end = json.JSONDecoder().raw_decode(text, start)
    return ("\n" * text.count("\n", 0, start) + text[start:end]).encode("utf-8")


def decode_any(path: Path, raw: bytes) -> str:
    """UTF-8, UTF-16 with its mark, GB18030 or Big5, as spreadsheets write them. Raises DataError."""
    if raw.startswith(UTF16):
        try:
            text = raw.decode("utf-16")
        except UnicodeDecodeError:
            raise DataError([Finding(path, 0, "broken UTF-16", "save the file as UTF-8")]) from None
        print(f"notice: {path.name} is read as UTF-16")
        return text
    try:
        return decode_text(path, raw)
    except DataError as error:
        if not error.findings[0].reason.startswith("not UTF-8"):
            raise
    found = [(share, name, text) for name in LEGACY for share, text in _as_legacy(raw, name)]
    if not found or max(found)[0] < FEWEST_COMMON:
        raise DataError([Finding(path, 0, "neither UTF-8 nor GB18030 nor Big5", "save the file as UTF-8")])
    _, name, text = max(found)
    print(f"notice: {path.name} is read as {name}")
    return text


def _as_legacy(raw: bytes, name: str) -> list[tuple[float, str]]:
    """[(share of its characters that are common ones by that encoding's own order, the text)], [] where it is none."""
    codec, ordered, last = LEGACY[name]
    try:
        text = raw.decode(codec)
    except UnicodeDecodeError:
        return []
    chars = [char for char in text[:20_000] if char > "\x7f" and unicodedata.category(char)[0] not in "PZ"]
    codes = [char.encode(ordered, "ignore") for char in chars]
    return [(sum(code[:1] <= last for code in codes if code) / max(len(chars), 1) if chars else 1.0, text)]


def _one_object(path: Path) -> Finding | None:
    """A file that is one object over several lines is no list of rows."""
    raw = path.read_bytes()
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    lists = [
        key
        for key, item in value.items()
        if key not in LISTS and isinstance(item, list) and item and isinstance(item[0], dict)
    ]
    if not lists and b"\n" not in raw.strip():
        return None  # JSONL with a single row
    where = f"save the list under {lists[0]!r} as a file of its own" if lists else "write [{...}, ...]"
    return Finding(path, 1, f"one object (keys: {', '.join(value)}), not a list of rows", where)


def _table(path: Path, text: str) -> Rows:
    """Rows of a CSV or TSV file with a header, each with the line on which it begins. An empty cell is an empty
    text."""
    csv.field_size_limit(1 << 30)
    head = text.lstrip().partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" or ("\t" in head and "," not in head) else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, problems, header, line = [], [], None, 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header) or "" in header:
                    fix = "one name for every column"
                    return [], [Finding(path, start, "a column has no name, or two have the same", fix)]
                if len(header) == 1 and re.search("[;\t，]", header[0]):
                    fix = "save it with commas, or as .tsv with tabs"
                    return [], [
                        Finding(path, start, f"one column {header[0]!r}: other separators than {delimiter!r}", fix)
                    ]
                continue
            if len(cells) != len(header):
                fix = 'put texts that hold separators or line ends into "..."'
                problems.append(Finding(path, start, f"{len(cells)} cells under {len(header)} columns", fix))
                continue
            row = dict(zip(header, cells, strict=True))
            try:
                rows.append((start, row | {key: _cell(key, row[key]) for key in NESTED if key in row}))
            except (ValueError, RecursionError):
                fix = 'write [{"role": "user", "content": "..."}, ...]'
                problems.append(Finding(path, start, "a cell that should hold a list is not JSON", fix))
    except csv.Error as error:
        problems.append(Finding(path, line, f"broken table: {error}", 'a quote in a text is written ""'))
    return rows, problems


def _cell(key: str, cell: str):
    return json.loads(cell) if cell.strip() else None


def without_empty(row: dict) -> dict:
    """A row of a table without the empty cells of formats that it does not use: a table has every column in every
    row."""
    filled = {key for key, value in row.items() if (value.strip() if isinstance(value, str) else value is not None)}
    unused = {key for keys in COLUMNS if filled.isdisjoint(keys) for key in keys}
    if not filled.isdisjoint(("chosen", "rejected")):
        unused |= {"output", "completion"} - filled  # a pair may have its prompt under instruction or prompt
    if all(unused.issuperset(keys) for keys in COLUMNS):
        return row
    return {key: value for key, value in row.items() if key not in unused}


def read_cells(metas: list[dict], names: tuple[str, ...]) -> None:
    """Reads the cells of columns that hold nothing but numbers, or nothing but JSON arrays of strings; empty ones
    become null."""
    for name in names:
        cells = {cell.strip() for meta in metas if isinstance(cell := meta.get(name), str)} - {""}
        if all(NUMBER.fullmatch(cell) for cell in cells) or all(_is_string_array(cell) for cell in cells):
            for meta in metas:
                if isinstance(cell := meta.get(name), str):
                    meta[name] = json.loads(cell.strip()) if cell.strip() else None


def _is_string_array(cell: str) -> bool:
    try:
        value = json.loads(cell)
    except ValueError:
        return False
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        return [], [Finding(path, 0, f"not a readable parquet file ({str(error)[:80]})", "write it again")]
    return list(enumerate(rows, start=1)), []


# ------------------------------------------------------------------------------------------------------ converting


def convert(row: dict, line: int, keep: tuple[str, ...] = (), labels: dict[str, str] | None = None) -> Converted:
    """One row in the repo's format; columns named in `keep` and those of a `meta` object go into meta. Raises
    Refused(reason, fix).

    labels: the label columns of the file and their scales (labels.scales); None = judged by this row alone.
    """
    dialect, row = normalise(row)
    given = {key: value for key, value in row.items() if value is not None}
    if "chosen" in given or "rejected" in given:
        kind, name, used, parts = "pref", *_pair(given)
    elif "messages" in given or "conversations" in given:
        key = "messages" if "messages" in given else "conversations"
        if isinstance(given[key], str):
            raise Refused(f"{key} is a text, not a list of turns", "write the list itself, not a text that holds it")
        kind, name, used = "sft", {"messages": "messages", "conversations": "sharegpt"}[key], {key, "system"}
        turns = _system(given) + turns_of(given[key], key)
        parts = _answered(turns, key)
    elif "instruction" in given or "output" in given:
        kind, name, used = "sft", "alpaca", {"instruction", "input", "output", "history", "system"}
        prompt = _alpaca(given)
        parts = {"prompt": prompt, "completion": _answer(_needed(given, "output"), "output")}
    elif "completion" in given:
        kind, name, used = "sft", "prompt/completion", {"prompt", "completion", "history", "system"}
        prompt = _begin(given, turns_of(_needed(given, "prompt"), "prompt"))
        parts = {"prompt": prompt, "completion": _answer(given["completion"], "completion")}
    elif "prompt" in given:
        kind, name, used = "prompts", "prompt", {"prompt", "history", "system"}
        like = [k for k in given if k not in keep and isinstance(given[k], str | list) and LIKE_ANSWERS.search(k)]
        if like:
            fix = (
                f"--rename {like[0]}=completion, or write chosen and rejected; --keep {like[0]} where it is for rewards"
            )
            raise Refused(f"prompt beside {', '.join(like)}: answers under names that are not read", fix)
        parts = {"prompt": _begin(given, turns_of(given["prompt"], "prompt"))}
    else:
        columns = ", ".join(map(str, row)) or "none"
        texts = [given[key] for key in ("text", "content", "chat") if isinstance(given.get(key), str)]
        if any(map(TEMPLATED.search, texts)):
            what = "a conversation as one text, with the marks of a chat template"
            raise Refused(f"{what} (columns: {columns})", "write its turns as messages")
        if isinstance(given.get("text", given.get("content")), str) and given.keys().isdisjoint(("input", *QUESTIONS)):
            raise Refused(f"plain text (columns: {columns})", "scripts/18_prepare_text.py prepares documents")
        fix = "--rename OLD=NEW ..., with new names such as instruction and output, or prompt and completion"
        raise Refused(f"no format is known by the columns {columns}", fix)

    if given.get("history") and "history" not in used:
        fix = "put its turns in front of the others; --rename history=other leaves it unread"
        raise Refused(f"history beside {name}: are its turns part of the row?", fix)
    more = reasoning_of(given) if name in ("alpaca", "prompt/completion") else {}
    if more:
        parts["completion"][-1] = {**parts["completion"][-1], **more}
    if tools := tools_of(given):
        parts["tools"] = tools
    elif given.get("tools", given.get("functions")) in ([], "[]") and any(
        turn.get("tool_calls") for turns in parts.values() for turn in turns
    ):
        raise Refused("a call of a function, and no function among tools", "write it into tools, or take tools out")
    refuse_weightless(given)
    used = used | {"tools", "functions"} | {key for key in REASONING if more or not given.get(key)}
    label = None
    if kind == "sft":
        label, read = judge(row, scales([given]) if labels is None else labels)
        used = used | read
    if label:
        if name in ("messages", "sharegpt") and turns[-1].get("weight", 1) == 0:
            raise Refused("a label on an answer of weight 0", "take the label or the weight out")
        kind = "kto"
        parts["label"] = label == "good"
    meta = given.get("meta", {})
    if not isinstance(meta, dict):
        raise Refused("meta is not an object", "write an object, or rename the column")
    meta = {"id": _hash(parts)} | meta | {key: row.get(key) for key in keep if key in row}
    parts["meta"] = meta
    for found in validate_row(parts, SCHEMAS[kind]):
        raise Refused(found.reason, found.fix)
    _refuse_unreadable(parts)
    refuse_media(row, parts)
    unused = [key for key in given if key not in used and key not in keep and key != "meta"]
    for key in LISTS:  # keys of messages too
        turns = given.get(key) if isinstance(given.get(key), list) else []
        if key == "history":  # objects of question and answer are read whole
            turns = [turn for turn in turns if isinstance(turn, dict) and {"role", "from"} & turn.keys()]
        if judged := next(
            (f"{key}[{n}].{name}" for n, turn in enumerate(turns) for name in WORDS if _is_set(turn, name)), None
        ):
            raise Refused(f"{judged} is a label of one turn", "write a row for each labelled answer, label as a column")
        unused += dict.fromkeys(f"{key}[].{k}" for turn in turns if isinstance(turn, dict) for k in unread_keys(turn))
    return Converted(kind, dialect or name, parts, line, tuple(unused), label)


def _pair(given: dict) -> tuple[str, set[str], dict]:
    chosen, rejected = (_needed(given, key) for key in ("chosen", "rejected"))
    key = next((key for key in ("prompt", "instruction", "messages", "conversations") if key in given), None)
    if key is None:
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise Refused("a pair of texts without a prompt", "add the column prompt, or write whole conversations")
        sides = [turns_of(chosen, "chosen"), turns_of(rejected, "rejected")]
        shared = next((i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)))
        if not 0 < shared < min(map(len, sides)):
            what = "chosen and rejected are equal" if sides[0] == sides[1] else "chosen and rejected share no beginning"
            raise Refused(what, "begin both with the same question, or add the column prompt")
        prompt = _begin(given, sides[0][:shared])
        parts = {"prompt": prompt, "chosen": sides[0][shared:], "rejected": sides[1][shared:]}
        return "pairs (implicit prompt)", {"chosen", "rejected", "system", "history"}, parts
    prompt = _alpaca(given) if key == "instruction" else _begin(given, turns_of(given[key], key))
    used = {"chosen", "rejected", "system", "history", key} | ({"input"} if key == "instruction" else set())
    parts = {"prompt": prompt}
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        answer = _answer(value, name)
        parts[name] = answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer  # with the prompt repeated
    return "pairs", used, parts


def _alpaca(given: dict) -> list[dict]:
    for key in ("instruction", "input", "system"):
        if not isinstance(given.get(key, ""), str):
            raise Refused(f"{key} is {json.dumps(given[key], default=str)[:30]}, not a text", "write a text")
    _needed(given, "instruction")
    system = _system(given)
    return _begin(given, chat.messages(given | {"history": []})[len(system) :])


def _is_set(turn: Any, key: str) -> bool:
    return isinstance(turn, dict) and turn.get(key) is not None


def _answer(value: Any, key: str) -> list[dict]:
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        raise Refused(f"{key} is a list of texts", "write a pair as chosen and rejected, else a row for each answer")
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else turns_of(value, key)


def _answered(turns: list[dict], key: str) -> dict:
    if not turns or turns[-1]["role"] != "assistant":
        what = f"the last turn of {key} is {turns[-1]['role']}, not assistant" if turns else f"{key} has no turns"
        raise Refused(what, "end it with the answer; prompts for RL stand under the name prompt")
    if all(turn.get("weight", 1) == 0 for turn in turns if turn["role"] == "assistant"):
        raise Refused(f"no answer of {key} is to be trained: all have weight 0", "leave the row out")
    while turns[-1]["role"] != "assistant" or turns[-1].get("weight", 1) == 0:
        turns = turns[:-1]  # nothing behind the last answer that is trained says anything
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _system(given: dict) -> list[dict]:
    system = given.get("system", "")
    if not isinstance(system, str):
        raise Refused("system is not a text", "write a text")
    return [{"role": "system", "content": system}] if system else []


def _begin(given: dict, turns: list[dict]) -> list[dict]:
    """The turns of a prompt behind the system text and the earlier turns that stand in columns of their own."""
    history = turns_of(history_of(given), "history")
    system = _system(given)
    if history and not system and turns[:1] and turns[0]["role"] == "system":
        system, turns = turns[:1], turns[1:]
    return system + history + turns


def _needed(given: dict, key: str):
    if key not in given:
        raise Refused(f"{key} is missing", "add it, or leave the row out; prompts for RL stand under the name prompt")
    return given[key]


def _refuse_unreadable(parts: dict) -> None:
    """What JSONL cannot hold, or a reader of it refuses. Raises Refused."""
    for key, value in parts["meta"].items():
        try:
            json.dumps([key, value], ensure_ascii=False, allow_nan=False).encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:  # a date, NaN, half a surrogate pair
            fix = "write a text, a number or null, or leave it out of meta and --keep"
            raise Refused(f"{key} in meta is nothing that JSON can hold ({str(error)[:60]})", fix) from None
    for key, value in [*((f"{key} in meta", [key, value]) for key, value in parts["meta"].items()), *parts.items()]:
        try:
            refuse_characters(value if key != "meta" else None)
        except Refused as refused:
            raise Refused(f"{refused.args[0]} in {key}", refused.args[1]) from None
    size = len(json.dumps(parts, ensure_ascii=False).encode("utf-8"))
    if size >= MAX_LINE_BYTES:
        what = f"the row has {size / 1e6:.1f} MB, more than the limit of {MAX_LINE_BYTES / 1e6:.1f} MB"
        raise Refused(what, "leave out rows as long as this one")


def _hash(parts: dict) -> str:
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]
