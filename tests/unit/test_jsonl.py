"""A JSONL file is read whole or not at all, and every fault is named with its line and its fix."""

import gzip
import json
import math
import os
import subprocess

import pytest

from common.jsonl import (
    DataError,
    JsonlAppender,
    count_lines,
    read_array,
    read_json,
    read_jsonl,
    scan_jsonl,
    sha256_file,
    write_json,
    write_jsonl,
)
from common.schemas import validate_row


def user(text="写一首[五言绝句]"):
    return {"role": "user", "content": text}


def assistant(text="床前明月光，疑是地上霜。"):
    return {"role": "assistant", "content": text}


SFT = {"prompt": [user()], "completion": [assistant()], "meta": {"form": "五绝"}}
PAIR = {"prompt": [user()], "chosen": [assistant("好")], "rejected": [assistant("坏")], "meta": {}}
PROMPT = {"prompt": [user()], "meta": {"form": "五绝"}}
STYLE = {"input": "用户问题：你好\n回答：你好", "label": "诚实", "label_english": "honesty", "metadata": {}}
GENERATION = {
    "id": "ab12#0",
    "prompt_id": "ab12",
    "sample": 0,
    "seed": 1,
    "prompt": [user()],
    "completion": "",
    "reference": None,
    "model": "sft",
    "finish_reason": "stop",
    "tokens": 0,
    "meta": {},
}
GOOD = {"sft": SFT, "preference": PAIR, "prompts": PROMPT, "style": STYLE, "generation": GENERATION}
LINE = json.dumps(SFT, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize("schema", GOOD)
def test_a_good_row_of_every_schema_passes(schema):
    assert validate_row(GOOD[schema], schema) == []


def test_system_turn_and_several_turns_pass():
    row = {
        "prompt": [{"role": "system", "content": "你是诗人"}, user(), assistant(), user()],
        "completion": [assistant(), user("再来"), assistant()],
    }
    assert validate_row(row, "sft") == []


@pytest.mark.parametrize(
    "schema, change, reason",
    [
        ("sft", {"prompt": ...}, "'prompt' is missing"),
        ("sft", {"completion": ...}, "'completion' is missing"),
        ("sft", {"prompt": "写诗"}, "prompt is a string"),
        ("sft", {"prompt": []}, "no turns"),
        ("sft", {"prompt": ["写诗"]}, "prompt[0] is a string"),
        ("sft", {"prompt": [{"content": "写诗"}]}, "has no role"),
        ("sft", {"prompt": [{"role": "human", "content": "写诗"}]}, "unknown role 'human'"),
        ("sft", {"prompt": [{"role": "user"}]}, "has no content"),
        ("sft", {"prompt": [user(None)]}, "content is a null"),
        ("sft", {"prompt": [user(" \n")]}, "the text is empty"),
        ("sft", {"prompt": [user(), assistant()]}, "last turn of prompt is assistant"),
        ("sft", {"prompt": [user(), user()]}, "prompt[1] is user where assistant is due"),
        ("sft", {"prompt": [user(), {"role": "system", "content": "x"}, user()]}, "prompt[1] is system"),
        ("sft", {"completion": [assistant("　")]}, "the answer is empty"),
        ("sft", {"completion": [user()]}, "completion[0] is user where assistant is due"),
        ("sft", {"completion": [assistant(), user()]}, "last turn of completion is not assistant"),
        ("sft", {"completion": [assistant(), assistant()]}, "completion[1] is assistant where user is due"),
        ("sft", {"meta": []}, "meta is a list"),
        ("preference", {"rejected": ...}, "'rejected' is missing"),
        ("preference", {"rejected": [assistant(" 好")]}, "chosen and rejected are equal"),
        ("prompts", {"meta": ...}, "'meta' is missing"),
        ("style", {"label": ""}, "label is empty"),
        ("style", {"label_english": 3}, "label_english is a whole number"),
        ("generation", {"reference": ...}, "reference must be"),
        ("generation", {"sample": True}, "sample is a true/false"),
        ("generation", {"tokens": -1}, "tokens is -1"),
        ("generation", {"id": "ab12#7"}, "is not prompt_id#sample"),
    ],
)
def test_a_faulty_row_is_named_with_a_fix(schema, change, reason):
    row = {key: value for key, value in {**GOOD[schema], **change}.items() if value is not ...}
    found = validate_row(row, schema)
    assert len(found) == 1
    assert reason in found[0].reason and found[0].fix


@pytest.mark.parametrize(
    "raw, reason, fix",
    [
        (b"\xef\xbb\xbf" + LINE, ":1: a byte order mark", "sed"),
        (LINE.decode().encode("utf-16"), ":1: the file is UTF-16", "iconv"),
        (LINE + LINE.decode().encode("gbk"), ":2: not UTF-8, probably gbk", "iconv -f GB18030"),
        (LINE + LINE.replace("光".encode(), b"\xe5\x85"), ":2: broken UTF-8", "delete the line"),
        (LINE + LINE[:30] + b"\n" + LINE, ":2: broken JSON at column", "one object a line"),
        (LINE + b"{'a': 1}\n", ":2: broken JSON", "json.dumps"),
        (LINE + LINE.strip() + LINE, ":2: broken JSON at column", "one object a line"),
        (b'{"a": NaN}\n', ":1: NaN is not JSON", "null"),
        (b'{"a": -Infinity}\n', ":1: -Infinity is not JSON", "null"),
        (b'{"a": 1e999}\n', "too large", "null"),
        (b'{"a": ' + b"1" * 5000 + b"}\n", "5000 digits", "string"),
        (b'[{"a": 1}]\n', "JSON list, not an object", "lines of their own"),
        (b"3\n", "JSON whole number", "{...}"),
        (b"[" * 100_000 + b"\n", "nested too deeply", "flat"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}\n', "'c' appears twice", "keep one"),
        (b'{"a": "\\ud800"}\n', "surrogate", "whole character"),
        (b'{"a": "x\\u0000"}\n', "control character U+0000", "delete"),
        (b'{"a": "x\x00"}\n', "control character U+0000 at column", "delete"),
        (b'{"a": "x\ty"}\n', "control character U+0009 at column", "\\t"),
        (LINE + b'{"a": "' + b"x" * 10_000_000 + b'"}\n', ":2: the line has 10.0 MB", "limit of 1.0 MB"),
        (LINE + b'{"prompt": []}\n', ":2: prompt has no turns", "fill it in"),
        (b"", "the file holds no rows", "run the stage"),
        (b"\n \n", "the file holds no rows", "run the stage"),
    ],
)
def test_a_broken_file_is_refused_with_line_reason_and_fix(tmp_path, raw, reason, fix):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read_jsonl(path, "sft")
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "fix: " in str(caught.value) and fix in str(caught.value)


@pytest.mark.parametrize("name, reason", [("gone.jsonl", "no such file"), (".", "is a folder")])
def test_a_file_that_is_none_is_refused(tmp_path, name, reason):
    with pytest.raises(DataError, match=reason):
        read_jsonl(tmp_path / name)


def test_all_problems_are_counted_and_the_first_twenty_shown(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{\n" * 50)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "50 problems" and lines[-1] == "... and 30 more" and len(lines) == 22
    assert len(caught.value.findings) == 50


def test_crlf_and_empty_lines_are_read_and_reported(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE.replace(b"\n", b"\r\n") * 2 + b"\n" + LINE)
    assert read_jsonl(path, "sft") == [SFT] * 3
    out = capsys.readouterr().out
    assert "2 lines end in CRLF: read as LF" in out and "1 empty lines" in out
    assert [finding.level for *_, found in scan_jsonl(path, "sft") for finding in found] == ["note", "note"]


def test_a_last_line_without_a_line_end_is_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + LINE.strip())
    assert len(read_jsonl(path)) == count_lines(path) == 2


def test_what_is_written_is_read_back_and_readable(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows = [{"text": "明月\u2028光\n𠮷😀"}, {"n": 0.1}]
    assert write_jsonl(path, iter(rows)) == 2
    assert read_jsonl(path) == rows
    assert "明月" in path.read_text(encoding="utf-8") and b"\r" not in path.read_bytes()


@pytest.mark.parametrize("bad", [math.nan, math.inf, "\ud800"])
def test_a_row_that_json_cannot_hold_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(ValueError, match="row 2"):
        write_jsonl(path, [{"a": 1}, {"a": bad}])
    assert read_jsonl(path) == [{"a": 1}]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_json_round_trip_and_refusal(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"诗": [1, None]})
    assert read_json(path) == {"诗": [1, None]}
    with pytest.raises(ValueError):
        write_json(path, {"a": math.nan})
    path.write_text('{"a": NaN}', encoding="utf-8")
    with pytest.raises(DataError, match="NaN is not JSON"):
        read_json(path)
    with pytest.raises(DataError, match="gone"):
        read_json(tmp_path / "gone.json")


@pytest.mark.parametrize(
    "raw, reason", [("[" * 100_000, "nested too deeply"), ("1" * 5000, "5000 digits"), ("[1e999]", "too large")]
)
def test_json_is_as_strict_as_a_line(tmp_path, raw, reason):
    path = tmp_path / "a.json"
    path.write_text(raw, encoding="utf-8")
    with pytest.raises(DataError, match=f"a.json: .*{reason}.*; fix: "):
        read_json(path)


def test_no_reader_waits_for_a_pipe_or_reads_a_compressed_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "packed").write_bytes(gzip.compress(LINE))
    for reader in (read_json, read_jsonl):
        with pytest.raises(DataError, match="pipe: is a pipe or a device, not a file; fix: write it to a file first"):
            reader(tmp_path / "pipe")
        with pytest.raises(DataError, match="packed: the file is compressed; fix: gunzip -k .*/packed"):
            reader(tmp_path / "packed")
    assert "is a pipe" in read_array(tmp_path / "pipe")[1][0].reason


def test_an_array_is_read_row_by_row_and_every_fault_has_its_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '\ufeff[{"a": 1},\n{"a": NaN},\n7,\n{"a": 1, "a": 2},\n{"a": ' + "1" * 5000 + '},\n{"a": "乙"}]', "utf-8"
    )
    rows, findings = read_array(path)
    assert rows == [(1, {"a": 1}), (6, {"a": "乙"})]
    assert [(found.line, found.reason[:14]) for found in findings] == [
        (2, "NaN is not JSO"),
        (3, "the row is 7, "),
        (4, "the key 'a' ap"),
        (5, "a number of 50"),
    ]
    path.write_bytes('[{"a": "甲"},\n{"a": "乙"}]'.encode("gbk"))
    assert (
        str(read_array(path)[1][0])
        == f"{path}:1: not UTF-8, probably gbk; fix: iconv -f GB18030 -t UTF-8 {path} > new.json"
    )


def test_rows_of_an_array_on_one_line_are_counted(tmp_path, capsys):
    """json.dump writes them so: a line number would be 1 for all of them."""
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, null, {"a": 2}, {"a": NaN}, {"a": 3}]', "utf-8")
    rows, findings = read_array(path)
    assert rows == [(1, {"a": 1}), (3, {"a": 2}), (5, {"a": 3})]
    assert [found.place for found in findings] == [f"{path}:2", f"{path}:4"]
    assert "the numbers behind its name count rows" in capsys.readouterr().out
    path.write_text('[{"a": 1}, {"a": 2},\n{"a": 3},]', "utf-8")
    rows, (finding,) = read_array(path)
    assert [number for number, _ in rows] == [1, 2, 3] and finding.line == 2 and "broken JSON" in finding.reason


def test_the_command_that_mends_a_file_names_it_as_the_user_did(tmp_path):
    """Also from another folder, and where its name has a space."""
    path = tmp_path / "my rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    (finding,) = caught.value.findings
    subprocess.run(finding.fix, shell=True, check=True)
    assert read_jsonl(path)


def test_sha256_is_the_usual_one(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_appending_goes_on_after_whole_rows_and_cuts_a_torn_one(tmp_path, capsys):
    path = tmp_path / "new" / "rows.jsonl"
    with JsonlAppender(path) as file:
        assert file.done == set()
        assert file.write({"id": "a", "text": "月"}) and file.write({"id": "b"})
    with open(path, "ab") as file:
        file.write('{"id": "c", "text": "月'.encode()[:-1])
    with JsonlAppender(path) as file:
        assert "cut a torn last line of 23 bytes" in capsys.readouterr().out
        assert file.done == {"a", "b"}
        assert not file.write({"id": "a", "text": "again"})
        assert file.write({"id": "c"})
    assert [row["id"] for row in read_jsonl(path)] == ["a", "b", "c"]


def test_a_file_with_nothing_but_a_torn_long_line_starts_empty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 200_000)
    with JsonlAppender(path) as file:
        file.write({"id": 1})
    assert read_jsonl(path) == [{"id": 1}]


@pytest.mark.parametrize("lines", [b'{"id": "a"}\n{"id": "a"}\n', b'{"x": 1}\n', b"{\n"])
def test_appending_to_a_damaged_file_is_refused(tmp_path, lines):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines)
    with pytest.raises(DataError):
        JsonlAppender(path)
    assert path.read_bytes() == lines


def test_rows_written_are_on_disk_before_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    with JsonlAppender(path, key="prompt_id") as file:
        file.write({"prompt_id": "a"})
        assert count_lines(path) == 1


def test_a_repeated_id_among_generations_is_named_with_both_lines(tmp_path):
    path = tmp_path / "g.jsonl"
    write_jsonl(path, [GENERATION, GENERATION | {"id": "ab12#1", "sample": 1}, GENERATION])
    with pytest.raises(DataError, match=r"g.jsonl:3: the id 'ab12#0' stands in line 1 already; fix: "):
        read_jsonl(path, "generation")


def test_what_a_killed_write_left_goes_with_the_next_write_of_that_file(tmp_path):
    living, dead = (tmp_path / f".a.json.{pid}.tmp" for pid in (os.getppid(), 2**22 + 1))
    for path in (living, dead):
        path.write_text("half", encoding="utf-8")
    write_json(tmp_path / "a.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "a.json"]
