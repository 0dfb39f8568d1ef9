"""Every reader of a file that a user names says in one line why it cannot be read, and none waits for a pipe."""

import gzip
import importlib.util
import os
import re
import sys

import pytest

from common.jsonl import read_array, read_json, read_jsonl, read_utf8, unreadable
from common.judging.human_sheet import read_sheet
from common.judging.prompts import load_prompt
from common.llm_api import LLM
from common.model_files import check_json_files
from common.settings import UserError, file_error
from conftest import SCRIPTS
from tasks.chat.rows import read_rows as read_chat
from tasks.copywriting.rows import Writer, read_products
from tasks.poems.corpus import load_records
from tasks.styles import read_labels
from tasks.weibo.arrays import find_arrays

spec = importlib.util.spec_from_file_location("classify_style", next(SCRIPTS.glob("61_*.py")))
classify = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = classify
spec.loader.exec_module(classify)


def findings_of(read):
    def raising(path):
        if findings := read(path)[1]:
            raise UserError(str(findings[0]))

    return raising


def judge_prompt(path):
    path.rename(path.with_suffix(".md"))
    load_prompt(path.parent, path.stem)


def model_file(path):
    path.rename(path.with_name("config.json"))
    check_json_files(path.parent)


READERS = {
    "jsonl": read_jsonl,
    "json": read_json,
    "text": read_utf8,
    "array": findings_of(read_array),
    "poems": load_records,
    "weibo": lambda path: find_arrays((path,), "--posts"),
    "chat": findings_of(read_chat),
    "products": read_products,
    "labels": read_labels,
    "texts of stage 61": classify.read_texts,
    "filled sheet": lambda path: read_sheet(path, {"kind": "rating", "sha256": "", "allowed": ["1"]}),
    "judge prompt": judge_prompt,
    "writing prompt": lambda path: Writer(path.parent, path, []),
    "model": model_file,
    "request log": lambda path: LLM(path)._open_log(),
}
CONTENT = {
    "a pipe": os.mkfifo,
    "compressed": lambda path: path.write_bytes(gzip.compress(b'[{"a": 1}]\n')),
    "a loop of links": lambda path: path.symlink_to(path),
    "UTF-16": lambda path: path.write_bytes('[{"a": "诗"}]\n'.encode("utf-16")),
    "brackets": lambda path: path.write_bytes(b"[" * 200_000 + b"\n"),
}
# what may hold any brackets, or is not UTF-8 as spreadsheets write it
PLAIN = ("text", "texts of stage 61", "filled sheet", "judge prompt", "writing prompt", "weibo")


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_read_is_one_line(reader, content, tmp_path):
    if content == "brackets" and reader in PLAIN:
        pytest.skip("any text will do")
    path = tmp_path / ("rows.txt" if reader == "texts of stage 61" else "rows.json")
    CONTENT[content](path)
    try:
        READERS[reader](path)
        said = ""
    except UserError as error:
        said = str(error)
    except OSError as error:
        said = file_error(error)
    assert said and ("fix: " in said or "fix=" in said), said


def test_a_file_is_read_through_the_readers_of_common_jsonl():
    """Path.read_text and read_bytes hang on a pipe and raise what no user can read; these read files of the repo,
    files that a stage has written, or have asked `unreadable` before."""
    own = {
        "jsonl.py",
        "certificate.py",
        "compare_page.py",
        "checkpoints.py",
        "arguments.py",
        "prosody.py",
        "readings.py",
        "__init__.py",
    }
    own |= {"18_prepare_text.py", "19_check_data.py", "63_chat.py", "model_card.py", "rows.py", "models.py"}
    found = {
        path.name for path in SCRIPTS.rglob("*.py") if re.search(r"\.read_(text|bytes)\(", path.read_text("utf-8"))
    }
    assert found <= own, found - own


def test_a_file_of_this_kind_is_readable(tmp_path):
    (tmp_path / "rows.json").write_text('[{"a": 1}]', encoding="utf-8")
    assert unreadable(tmp_path / "rows.json") is None
