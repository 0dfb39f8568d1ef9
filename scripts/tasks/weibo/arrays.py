"""Weibo exports as DuckDB tables: JSON arrays of any of three schemas, gigabytes of them, damage named or fixed.

DuckDB reads the arrays itself, bare NaN included. A file that it refuses (half an emoji, bytes that are not UTF-8, a
raw line end in a string, an end cut off) is read again with Python's json, record by record, and rewritten without the
damage.
"""

from __future__ import annotations

import codecs
import glob
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.jsonl import DataError, unreadable
from common.settings import UserError
from tasks.weibo.cleaning import HALF_CHARACTER

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

BLOCK = 1 << 22  # bytes read at once
MAX_RECORD = 1 << 24  # bytes of the largest record read; DuckDB's own limit, too
SEPARATORS = re.compile(r"[\s,]*")

# What a field is called: CommentR as published, an older export of it, Weibo's own API. The first name that holds
# something counts.
USER = ("_id", "idstr", "id")
POST = {
    "keys": ("mblogid", "mid", "idstr", "id", "_id"),  # every name under which a comment may refer to the post
    "text": ("content", "text_raw", "text"),
    "created": ("created_at",),
    "likes": ("likes_count", "attitudes_count", "like_counts", "like_count"),
    "original": ("retweet_id", "retweeted_status.mblogid", "retweeted_status.mid", "retweeted_status.idstr"),
    "user": tuple(f"user.{name}" for name in USER),
}
COMMENT = {
    "key": ("_id", "mid", "idstr", "id"),
    "post": (
        *("root_post_mblogid", "root_tweet_id", "root_post_id"),
        *("status.mblogid", "status.mid", "status.idstr", "status.id"),
    ),
    "root": ("root_comment_id", "rootid", "rootidstr"),
    "text": ("content", "text_raw", "text"),
    "created": ("created_at",),
    "likes": ("likes_count", "like_counts", "like_count", "attitudes_count"),
    "place": ("ip_location", "source"),
    "user": tuple(f"{user}.{name}" for user in ("comment_user", "user") for name in USER),
    "name": tuple(f"{user}.{name}" for user in ("comment_user", "user") for name in ("screen_name", "nick_name")),
    "verified": ("comment_user.verified", "user.verified"),
    "verified_type": ("comment_user.verified_type", "user.verified_type"),
    "statuses": ("comment_user.statuses_count", "user.statuses_count"),
    "parent": tuple(f"reply_comment.{name}" for name in ("_id", "mid", "idstr", "id")),
    "parent_text": ("reply_comment.text_raw", "reply_comment.text", "reply_comment.content"),
    "parent_user": tuple(f"reply_comment.{user}.{name}" for user in ("user", "comment_user") for name in USER),
    "parent_name": tuple(f"reply_comment.user.{name}" for name in ("screen_name", "nick_name")),
}
ACCOUNT = {
    "key": USER,
    "verified": ("verified",),
    "verified_type": ("verified_type",),
    "statuses": ("statuses_count",),
    "credit": ("sunshine_credit",),
}
TEXTS = ("text", "parent_text")  # fields that have to be strings: a number or a bare NaN is no text
NUMBERS = ("likes", "verified_type", "statuses")
LISTS = ("keys",)


def find_arrays(patterns: tuple[Path, ...], flag: str) -> list[Path]:
    """The files that paths and globs name, in order of name. Raises UserError where one names nothing, or is no JSON
    array."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        found = [pattern] if pattern.is_file() else sorted(Path(name) for name in glob.glob(str(pattern)))
        if not found or pattern.is_dir():
            raise UserError(f"{flag} {pattern}: no such file; fix: name JSON files, or a glob of them in quotes")
        files.update(dict.fromkeys(found))
    for file in files:
        if problem := unreadable(file):
            raise DataError([problem])
        with open(file, "rb") as stream:
            start = stream.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
        if not start.startswith(b"["):
            what = f"starts with {start[:1]!r}" if start else "is empty"
            raise UserError(f"{file}:1: {what}, not a JSON array; fix: write [record, record, ...]")
    return list(files)


def load_arrays(
    con: DuckDBPyConnection, table: str, files: list[Path], fields: dict, scratch: Path, allow_truncated: bool
) -> Counter:
    """Write table `table`: n, kind (JSON type), nan (a bare NaN stands in the record) and one column a field.

    Returns what had to be fixed, by reason. Raises UserError with file and line where a file is broken or cut off.
    """
    fixed: Counter = Counter()
    columns = ", ".join(f"NULL::{_type(name)} AS {name}" for name in fields)
    con.execute(f"CREATE TABLE {table} AS SELECT 0::BIGINT AS n, '' AS kind, false AS nan, {columns} LIMIT 0")
    for file in files:
        before = con.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        if not _ends_as_array(file) or not _load(con, table, file, fields, "array", before):
            strict = scratch / f"{table}.jsonl"
            fixed += _rewrite(file, strict, allow_truncated)
            _load(con, table, strict, fields, "newline_delimited", before)
            strict.unlink()
    return fixed


def _ends_as_array(file: Path) -> bool:
    """DuckDB takes an array that ends between two records for a whole one."""
    with open(file, "rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        return stream.read().rstrip().endswith(b"]")


def _load(con: DuckDBPyConnection, table: str, file: Path, fields: dict, layout: str, before: int) -> bool:
    """Append the records of one file; False where DuckDB cannot read it (nothing of it is kept then)."""
    import duckdb

    paths = list(dict.fromkeys(path for names in fields.values() for path in names))
    place = {path: index for index, path in enumerate(paths, start=1)}
    texts = [path for name, names in fields.items() if name in TEXTS for path in names]
    listed, typed = (", ".join(f"'$.{path}'" for path in group) for group in (paths, texts))
    columns = []
    for name, names in fields.items():
        values = [f"nullif(v[{place[path]}], 'NaN')" for path in names]
        if name in TEXTS:  # the word NaN may well be a text
            values = [f"CASE WHEN t[{texts.index(path) + 1}] = 'VARCHAR' THEN v[{place[path]}] END" for path in names]
        columns.append(f"{_column(name, values)} AS {name}")
    # the strings are cut out of a record before NaN is looked for: people write NaN, too
    nan = r"""CASE WHEN contains(json, 'NaN')
        THEN contains(regexp_replace(json, '"(\\.|[^"\\])*"', '', 'g'), 'NaN') ELSE false END"""
    types = f"json_type(json, [{typed}])" if texts else "NULL"
    try:
        con.execute(
            f"""INSERT INTO {table} SELECT {before} + row_number() OVER () - 1, kind, nan, {", ".join(columns)} FROM (
            SELECT json_type(json) AS kind, {nan} AS nan, json_extract_string(json, [{listed}]) AS v, {types} AS t
            FROM read_json_objects(?, format='{layout}', maximum_object_size={MAX_RECORD}) AS r(json))""",
            [str(file)],
        )
    except duckdb.InvalidInputException:
        if layout != "array":
            raise
        return False
    return True


def _type(name: str) -> str:
    return "VARCHAR[]" if name in LISTS else "BIGINT" if name in NUMBERS else "VARCHAR"


def _column(name: str, values: list[str]) -> str:
    """The SQL that takes the first of `values` which holds something."""
    if name in LISTS:
        return f"list_filter([{', '.join(values)}], lambda x: x IS NOT NULL AND x <> '')"
    first = f"coalesce({', '.join(values)})"
    return f"TRY_CAST({first} AS BIGINT)" if name in NUMBERS else first


# --- the slow road, for files that DuckDB refuses


def _rewrite(file: Path, target: Path, allow_truncated: bool) -> Counter:
    """The records of a damaged array as JSON lines that any reader takes; a half character becomes U+FFFD, for the
    rules to find."""
    fixed: Counter = Counter()
    with open(target, "w", encoding="utf-8") as output:
        for record in _records(file, allow_truncated, fixed):
            line = json.dumps(record, ensure_ascii=False)
            if HALF_CHARACTER.search(line):
                line = HALF_CHARACTER.sub("\ufffd", line)
            if len(line) * 4 > MAX_RECORD and len(line.encode("utf-8")) > MAX_RECORD:
                fixed[f"record of more than {MAX_RECORD >> 20} MiB left out"] += 1
                continue
            output.write(line + "\n")
    return fixed


def _records(file: Path, allow_truncated: bool, fixed: Counter) -> Iterator[object]:
    """Every element of a top-level array, in memory that does not grow with the file."""
    decoder = json.JSONDecoder(strict=False)
    # bytes that are no UTF-8 become lone surrogates, like the halves of characters that an escape can write
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    size, count, lines = file.stat().st_size, 0, 1
    with open(file, "rb") as stream:
        text, position, wanted = decode(stream.read(BLOCK)).lstrip(), 1, BLOCK
        ended = False
        while True:
            position = SEPARATORS.match(text, position).end()
            if text.startswith("]", position):
                if rest := (text[position + 1 :] + decode(stream.read(BLOCK))).strip():
                    raise UserError(
                        f"{file}:{lines + text.count(chr(10), 0, position)}: {rest[:20]!r} behind the end of the "
                        "array; fix: one array a file"
                    )
                return
            try:
                if position >= len(text):
                    raise json.JSONDecodeError("the array has no end", text, position)
                record, end = decoder.raw_decode(text, position)
                # a number at the end of what has been read may go on
                if end >= len(text) and not ended:
                    raise json.JSONDecodeError("more to read", text, end)
            except (json.JSONDecodeError, RecursionError) as error:
                if not ended and len(text) - position <= MAX_RECORD:
                    lines += text.count("\n", 0, position)
                    block = stream.read(wanted)
                    ended = not block
                    text, position, wanted = text[position:] + decode(block, final=ended), 0, wanted * 2
                    continue
                left = len(text[position:].encode("utf-8", "surrogateescape")) + size - stream.tell()
                place = f"{file}:{lines + text.count(chr(10), 0, position)}"
                reason = getattr(error, "msg", "brackets nested too deeply")
                if not ended or not _is_cut(error, text):
                    raise UserError(
                        f"{place}: broken JSON in record {count} ({reason}, byte {size - left}); fix: correct or "
                        "remove that record"
                    ) from None
                if not allow_truncated:
                    raise UserError(
                        f"{place}: the file breaks off in record {count} (byte {size - left} of {size}); fix: copy it "
                        f"again, or --allow-truncated to keep the {count} whole records"
                    ) from None
                fixed["file cut off: bytes lost behind the last whole record"] += left
                fixed["file cut off"] += 1
                return
            count, position, wanted = count + 1, end, BLOCK
            yield record


def _is_cut(error: Exception, text: str) -> bool:
    """Whether the text simply ends too early. A string that never closes is one, too; then the error stands at its
    start."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    open_string = error.msg.startswith(("Unterminated string", "the array has no end"))
    return open_string or error.pos >= len(text.rstrip()) - 12
