"""Stage 17 and the chat task: every format becomes the same row, every fault is named with its line, nothing is lost in
silence."""

import csv
import io
import json

import pytest

from conftest import ROOT
from tasks.chat.files import read_file

Q, A = "为什么海水是咸的？", "河水把岩石里的盐类带进海里，水走盐留。"


def user(text: str = Q) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str = A) -> dict:
    return {"role": "assistant", "content": text}


FORMATS = {
    "alpaca": {"instruction": Q, "output": A},
    "alpaca in full": {"instruction": "为什么海水", "input": "是咸的？", "output": A, "history": [], "system": ""},
    "strings": {"prompt": Q, "completion": A},
    "messages in two columns": {"prompt": [user()], "completion": [assistant()]},
    "messages": {"messages": [user(), assistant()]},
    "content in parts": {"messages": [user(), {"role": "assistant", "content": [{"type": "text", "text": A}]}]},
    "sharegpt": {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
    "sharegpt with a system": {
        "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}],
        "system": "你是小原。",
    },
}
PAIRS = {
    "strings": {"prompt": Q, "chosen": A, "rejected": "不知道。"},
    "messages": {"prompt": [user()], "chosen": [assistant()], "rejected": [assistant("不知道。")]},
    "implicit": {"chosen": [user(), assistant()], "rejected": [user(), assistant("不知道。")]},
    "prompt repeated": {"prompt": Q, "chosen": [user(), assistant()], "rejected": [user(), assistant("不知道。")]},
    "alpaca": {"instruction": Q, "input": "", "chosen": A, "rejected": "不知道。"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": Q}],
        "chosen": {"from": "gpt", "value": A},
        "rejected": {"from": "gpt", "value": "不知道。"},
    },
}


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prepare(run_stage, tmp_path):
    """prepare({"a.jsonl": bytes}, *words) -> (finished process, output folder)"""

    def run(files: dict[str, bytes], *words, check: bool = True):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        output = tmp_path / "out"
        names = [tmp_path / name for name in files]
        return run_stage("17_prepare_chat.py", "--files", *names, "--output-dir", output, *words, check=check), output

    return run


@pytest.mark.parametrize("name", FORMATS)
def test_every_sft_format_becomes_the_same_turns(name):
    from tasks.chat.rows import convert

    found = convert(FORMATS[name], 1)
    assert found.kind == "sft" and found.unused == ()
    prompt = [{**turn, "content": turn["content"].replace("\n", "")} for turn in found.row["prompt"]]
    assert prompt[-1] == user() and found.row["completion"] == [assistant()]
    assert [turn["role"] for turn in prompt[:-1]] == (["system"] if "system" in name else [])


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_format_becomes_the_same_pair(name):
    from tasks.chat.rows import convert

    found = convert(PAIRS[name], 1)
    assert found.kind == "pref" and found.unused == ()
    assert {key: found.row[key] for key in ("prompt", "chosen", "rejected")} == {
        "prompt": [user()],
        "chosen": [assistant()],
        "rejected": [assistant("不知道。")],
    }


def test_history_becomes_earlier_turns():
    from tasks.chat.rows import convert

    found = convert({"instruction": "那湖呢？", "output": "湖水多是淡的。", "history": [[Q, A]]}, 1)
    assert found.row["prompt"] == [user(), assistant(), user("那湖呢？")]


def test_formats_mixed_in_one_file_and_over_files(prepare):
    mixed = [{**row, "n": number} for number, row in enumerate([*FORMATS.values(), *PAIRS.values()])]
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([["instruction", "output"], ["第一行\n第二行", '他说"好"，走了。'], ["甲", "乙"]])
    files = {
        "mixed.jsonl": lines(*mixed),
        "array.json": json.dumps([FORMATS["strings"]], indent=1).encode(),
        "table.csv": b"\xef\xbb\xbf" + table.getvalue().encode(),
        "rl.jsonl": lines({"prompt": "写一句诗。"}),
    }
    done, output = prepare(files, "--val-share", 0, "--test-share", 0)
    sft, pref = rows_of(output / "sft_train.jsonl"), rows_of(output / "pref_train.jsonl")
    assert {row["completion"][-1]["content"] for row in sft} == {A, '他说"好"，走了。', "乙"}
    assert len(pref) == 1 and rows_of(output / "prompts_train.jsonl")[0]["prompt"] == [user("写一句诗。")]
    assert "unknown column 'n' in 14 rows, first at line 1: left out; --keep n" in done.stdout
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    total = sum(sum(file["formats"].values()) for file in report["files"].values())
    kept = sum(sum(counts.values()) for counts in report["splits"].values())
    assert total == kept + sum(sum(counts.values()) for counts in report["dropped"].values()) == 18


def test_parquet_and_tsv(prepare):
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    rows = [
        {"conversations": FORMATS["sharegpt"]["conversations"], "source": "a"},
        {"conversations": None, "source": "b"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    done, output = prepare({"a.parquet": buffer.getvalue()}, check=False)
    assert done.returncode == 2 and "a.parquet:2" in done.stderr and not output.exists()
    words = ["--skip-bad", "--keep", "source", "--val-share", 0, "--test-share", 0]
    done, output = prepare({"a.parquet": buffer.getvalue(), "b.tsv": "prompt\tcompletion\n甲\t乙\n".encode()}, *words)
    sft = {row["completion"][0]["content"]: row["meta"] for row in rows_of(output / "sft_train.jsonl")}
    assert sft[A]["source"] == "a" and sft["乙"]["source"] is None and "left out: " in done.stdout


def test_kept_and_renamed_columns(prepare):
    table = "问题,答案,来源\n甲,乙,网页\n".encode()
    words = ["--rename", "问题=instruction", "答案=output", "--keep", "来源", "--val-share", 0, "--test-share", 0]
    done, output = prepare({"faq.csv": table}, *words)
    (row,) = rows_of(output / "sft_train.jsonl")
    assert row["prompt"] == [user("甲")] and row["completion"] == [assistant("乙")] and row["meta"]["来源"] == "网页"
    assert "unknown column" not in done.stdout


GOOD = {"instruction": "问", "output": "答"}
FAULTS = {
    "no output": ("a.jsonl", lines(GOOD, {"instruction": "问二"}), "a.jsonl:2: output is missing"),
    "no instruction": ("a.jsonl", lines(GOOD, {"output": "答"}), "a.jsonl:2: instruction is missing"),
    "no prompt": ("a.jsonl", lines({"completion": "答"}), "a.jsonl:1: prompt is missing"),
    "no completion": (
        "a.jsonl",
        lines({"prompt": "问", "completion": "答"}, {"prompt": "问"}),
        "a.jsonl:2: completion is missing",
    ),
    "null output": (
        "a.json",
        b'[{"instruction": "a", "output": "b"},\n{"instruction": "c", "output": null}]',
        "a.json:2: output is",
    ),
    "empty answer": (
        "a.jsonl",
        lines({"instruction": "问", "output": " "}),
        "a.jsonl:1: completion[0]: the answer is empty",
    ),
    "empty cell": ("a.csv", "instruction,output\n问,答\n问,\n".encode(), "a.csv:3: completion[0]: the answer is empty"),
    "empty question": ("a.jsonl", lines({"prompt": "", "completion": "答"}), "a.jsonl:1: prompt[0]: the text is empty"),
    "output is a list": (
        "a.jsonl",
        lines({"instruction": "问", "output": ["答"]}),
        "a.jsonl:1: output is a list of texts; fix: write a pair as chosen and rejected",
    ),
    "an answer that cannot be seen": (
        "a.jsonl",
        lines({"instruction": "问", "output": "\u200b \ufeff"}),
        "a.jsonl:1: completion[0]: the answer is empty",
    ),
    "instruction is a number": (
        "a.jsonl",
        lines({"instruction": 3, "output": "答"}),
        "a.jsonl:1: instruction is 3, not a text",
    ),
    "history": (
        "a.jsonl",
        lines({**GOOD, "history": ["问"]}),
        "a.jsonl:1: history is not a list of [question, answer]",
    ),
    "unknown role": ("a.jsonl", lines({"messages": [user(), {"role": "critic", "content": "x"}]}), "unknown role"),
    "no role": ("a.jsonl", lines({"messages": [{"content": "x"}]}), "messages[0] has no role"),
    "no text": (
        "a.jsonl",
        lines({"messages": [user(), {"role": "assistant", "content": None}]}),
        "messages[1] has no text",
    ),
    "last turn": ("a.jsonl", lines({"messages": [user(), assistant(), user()]}), "the last turn of messages is user"),
    "answer first": ("a.jsonl", lines({"messages": [assistant()]}), "prompt has no turns"),
    "two questions": (
        "a.jsonl",
        lines({"messages": [user(), user(), assistant()]}),
        "prompt[1] is user where assistant is due",
    ),
    "no turns": ("a.jsonl", lines({"conversations": []}), "conversations has no turns"),
    "one side": ("a.jsonl", lines({"prompt": "问", "chosen": "答"}), "a.jsonl:1: rejected is missing"),
    "equal sides": (
        "a.jsonl",
        lines({"prompt": "问", "chosen": "答", "rejected": "答"}),
        "chosen and rejected are equal",
    ),
    "pair without a prompt": ("a.jsonl", lines({"chosen": "答", "rejected": "否"}), "a pair of texts without a prompt"),
    "nothing shared": (
        "a.jsonl",
        lines({"chosen": [user("甲"), assistant()], "rejected": [user("乙"), assistant()]}),
        "no beginning",
    ),
    "no format": (
        "a.csv",
        "题面,说法\n甲,乙\n".encode(),
        "no format is known by the columns 题面, 说法; fix: --rename",
    ),
    "gbk JSONL": ("a.jsonl", lines(GOOD).decode().encode("gbk"), "a.jsonl:1: not UTF-8, probably gbk; fix: iconv"),
    "gbk array": (
        "a.json",
        '[\n{"instruction": "问题", "output": "回答"}]'.encode("gbk"),
        "a.json:2: not UTF-8, probably gbk",
    ),
    "UTF-16": ("a.jsonl", lines(GOOD).decode().encode("utf-16"), "the file is UTF-16, not UTF-8"),
    "UTF-16 without its mark": (
        "a.jsonl",
        lines(GOOD).decode().encode("utf-16-le"),
        "the file is UTF-16LE, not UTF-8; fix: iconv -f UTF-16LE",
    ),
    "UTF-16 the other way": ("a.json", "[{}]".encode("utf-16-be"), "the file is UTF-16BE, not UTF-8"),
    "UTF-32": ("a.json", "[{}]".encode("utf-32"), "the file is UTF-32, not UTF-8; fix: iconv -f UTF-32"),
    "7z": ("a.7z", b"7z\xbc\xaf\x27\x1c", "the file is compressed; fix: 7z x "),
    "broken line": ("a.jsonl", lines(GOOD) + b'{"instruction": ', "a.jsonl:2: broken JSON"),
    "broken array": ("a.json", b'[{"instruction": "a", "output": "b"},\n{"instruction": }]', "a.json:2: broken JSON"),
    "comma at the end": ("a.json", b'[{"instruction": "a", "output": "b"},\n]', "a.json:2: broken JSON"),
    "open array": ("a.json", b'[{"instruction": "a", "output": "b"}\n', "no comma or ] behind a row"),
    "two arrays": ("a.json", b'[{"instruction": "a", "output": "b"}]\n[]', "text behind the end of the array"),
    "array of texts": ("a.json", b'[\n"a"]', 'a.json:2: the row is "a", not an object'),
    "wrapped": (
        "a.json",
        b'{"version": 1,\n "data": [{"instruction": "a"}]}',
        "save the list under 'data' as a file of its own",
    ),
    "key twice": (
        "a.json",
        b'[{"instruction": "a",\n"output": "b", "output": "c"}]',
        "a.json:1: the key 'output' appears twice",
    ),
    "NaN": ("a.json", b'[{"instruction": "a", "output": "b", "n": NaN}]', "a.json:1: NaN is not JSON"),
    "control character": (
        "a.json",
        b'[{"instruction": "a", "output": "b\\u0007"}]',
        "control character U+0007 in completion",
    ),
    "half a character": (
        "a.json",
        b'[{"instruction": "a", "output": "b\\ud83d"}]',
        "half of a surrogate pair in completion",
    ),
    "cells": ("a.csv", b'instruction,output\na,b\n"c\nd",e,f\n', "a.csv:3: 3 cells under 2 columns"),
    "open quote": ("a.csv", b'instruction,output\na,b\nc,"d\n', "a.csv:3: broken table"),
    "semicolons": ("a.csv", b"instruction;output\na;b\n", "other separators than ','"),
    "columns twice": ("a.csv", b"output,output\na,b\n", "two have the same"),
    "history in a cell": (
        "a.csv",
        b"instruction,output,history\na,b,none\n",
        "a.csv:2: a cell that should hold a list is not JSON",
    ),
    "not parquet": ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
    "spreadsheet": ("a.xlsx", b"PK", ".xlsx files are not read; fix: save it as CSV"),
    "no rows": ("a.json", b"[]", "the file holds no rows"),
    "nothing": ("a.jsonl", b"", "the file holds no rows"),
    "meta": ("a.jsonl", lines({**GOOD, "meta": "x"}), "meta is not an object"),
    "role is a list": (
        "a.jsonl",
        lines({"messages": [{"role": ["u"], "content": "x"}]}),
        "a.jsonl:1: messages[0] has the unknown",
    ),
    "part without text": (
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": [{"text": None}]}]}),
        "messages[0] has no text",
    ),
    "long number": (
        "a.json",
        b'[{"instruction": "a", "output": "b",\n"n": ' + b"1" * 5000 + b"}]",
        "a.json:1: a number of 5000 digits",
    ),
    "infinite number": (
        "a.json",
        b'[{"instruction": "a", "output": "b", "category": 1e999}]',
        "a.json:1: the number 1e999 is too large",
    ),
    "deep cell": (
        "a.csv",
        b"instruction,output,history\na,b," + b"[" * 100_000 + b"\n",
        "a.csv:2: a cell that should hold a list",
    ),
    "control character in meta": (
        "a.csv",
        b"instruction,output,category\na,b,\7\n",
        "a.csv:2: control character U+0007 in category",
    ),
    "half a character in meta": (
        "a.json",
        b'[{"instruction": "a", "output": "b", "category": "\\ud83d"}]',
        "category in meta is nothing",
    ),
    "long row": ("a.csv", b"instruction,output\na," + b"b" * 1_200_000 + b"\n", "a.csv:2: the row has 1.2 MB"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named_with_its_line_and_a_fix(name, tmp_path, monkeypatch):
    from common.jsonl import DataError
    from test_sft_ways import stage

    file, content, message = FAULTS[name]
    (tmp_path / file).write_bytes(content)
    module = stage("17_prepare_chat")
    with pytest.raises(DataError) as caught:
        module.main(module.Settings(files=(tmp_path / file,), output_dir=tmp_path / "out"))
    assert message in str(caught.value) and "; fix: " in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "day", "completion": "答"}, 'prompt is "2024-05-01", not a text or a list of turns'),
        ({"prompt": "问", "completion": "day"}, 'completion is "2024-05-01", not a text or a list of turns'),
        ({"prompt": "问", "completion": "答", "category": "day"}, "category in meta is nothing that JSON can hold"),
        (
            {"prompt": "问", "completion": "答", "category": float("nan")},
            "category in meta is nothing that JSON can hold",
        ),
        (
            {"prompt": "问", "completion": "答", "meta": {"score": float("nan")}},
            "score in meta is nothing that JSON can hold",
        ),
    ],
)
def test_what_parquet_can_hold_and_json_cannot_is_named(row, message):
    import datetime

    from common.preflight.finding import Refused
    from tasks.chat.rows import convert

    row = {key: datetime.date(2024, 5, 1) if value == "day" else value for key, value in row.items()}
    with pytest.raises(Refused) as caught:
        convert(row, 1, ("category",))
    assert message in caught.value.args[0] and caught.value.args[1]


def test_a_table_of_several_formats_and_its_numbers(tmp_path):

    cells = [
        {
            "instruction": "问一",
            "output": "答一",
            "max_characters": "30",
            "n": "7",
            "no": "007",
            "must_include": '["雨伞", "门"]',
        },
        {"prompt": "问二", "completion": "答二", "max_characters": "", "n": "x"},
        {"prompt": "问三", "chosen": "好", "rejected": "坏", "max_characters": "2.5"},
        {"instruction": "问四", "chosen": "好", "rejected": "坏"},
        {"messages": json.dumps([user("问五"), assistant("答五")], ensure_ascii=False)},
        {"prompt": "问六", "chosen": "好"},
        {"instruction": "问七"},
        {"n": "x"},
    ]
    header = list(dict.fromkeys(key for row in cells for key in row))
    file = tmp_path / "mixed.csv"
    with open(file, "w", encoding="utf-8", newline="") as out:
        table = csv.DictWriter(out, header, restval="")
        table.writeheader()
        table.writerows(cells)
    rows, problems, facts = read_file(file, {}, ("max_characters", "n", "no", "must_include"))
    assert [row.format for row in rows] == ["alpaca", "prompt/completion", "pairs", "pairs", "messages"]
    assert facts["rows"] == 8 and facts["unknown columns"] == {}
    assert [row.row["meta"]["max_characters"] for row in rows] == [30, None, 2.5, None, None]
    assert [row.row["meta"]["n"] for row in rows[:2]] == ["7", "x"] and rows[0].row["meta"]["no"] == "007"
    assert [row.row["meta"]["must_include"] for row in rows[:2]] == [["雨伞", "门"], None]
    assert [(problem.line, problem.reason) for problem in problems] == [
        (7, "rejected[0]: the answer is empty"),
        (8, "completion[0]: the answer is empty"),
        (9, "prompt[0]: the text is empty"),
    ]


def test_a_fault_ends_the_command_and_costs_nothing_of_an_earlier_run(prepare):
    _, output = prepare({"a.jsonl": lines(GOOD)}, "--val-share", 0, "--test-share", 0)
    before = sorted(path.name for path in output.iterdir())
    done, _ = prepare({"a.jsonl": lines(GOOD, {"instruction": "问"})}, "--overwrite", check=False)
    assert done.returncode == 2 and "a.jsonl:2" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in output.iterdir()) == before


TURN = {"role": "assistant", "content": "我查一下。"}
LOST = {
    "a call without a name": (
        {"messages": [user(), {**TURN, "tool_calls": [{"id": "c"}]}]},
        "messages[1].tool_calls holds no call of a function by name",
    ),
    "no answer to train": (
        {"messages": [user(), {**TURN, "weight": 0}]},
        "no answer of messages is to be trained: all have weight 0",
    ),
    "none in another dialect": (
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答", "train": False}]},
        "no answer of conversations is to be trained",
    ),
    "half a weight": ({"messages": [user(), {**TURN, "weight": 0.5}]}, "0.5"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_row_says_and_no_stage_can_train_is_refused_by_name(name):
    from common.preflight.finding import Refused
    from tasks.chat.rows import convert

    row, message = LOST[name]
    with pytest.raises(Refused) as caught:
        convert(row, 1)
    assert message in caught.value.args[0] and caught.value.args[1]


def test_unknown_keys_of_messages_and_labels_that_judge_nothing_are_listed():
    from tasks.chat.rows import convert

    row = {"messages": [{**user(), "weight": 0}, {**assistant(), "weight": 1, "id": 7, "reasoning_content": None}]}
    found = convert({**row, "label": "诚实"}, 1)
    assert (found.kind, found.unused) == ("sft", ("label", "messages[].id"))
    pair = {"prompt": "问", "chosen": "答", "rejected": "否", "label": False}
    assert convert(pair, 1).unused == ("label",) and convert(pair, 1).kind == "pref"


# what a column holds, row by row -> what is read: g(ood), b(ad), n(either), - no label, ! refused
LABELS = {
    ("label", "true/false"): ([True, False, None, "", "True"], "gbnng"),
    ("label", "numbers"): ([1, 0, 1.0, "0", "-1"], "gbgbb"),
    ("label", "words"): (["good", "Bad", "好", "差", "👎", "neutral"], "gbgbbn"),
    ("label", "something else"): (["诚实", "诙谐"], "--"),
    ("label", "one that says nothing"): (["good", "bad", "perhaps"], "gb!"),
    ("label", "classes"): ([0, 1, 2], "bg!"),
    ("thumbs", "words"): (["up", "down", "Thumbs Up", "thumbs-down"], "gbgb"),
    ("kto_tag", "of LLaMA-Factory"): ([True, False, "true"], "gbg"),
    ("feedback", "words"): (["赞", "踩", "yes", "no"], "gbgb"),
    ("rating", "five stars"): ([5, 4, 3, 2, 1, "5", 3.5, 4.5], "ggnbbgng"),
    ("rating", "drawn stars"): (["★★★★☆", "⭐", "3/5", "2 stars", "5星"], "gbnbg"),
    ("thumbs", "drawn"): (["👍", "👎", "👍🏻", "👎🏿", "👍️"], "gbgbg"),
    ("rating", "two thumbs"): ([1, 0, 1], "gbg"),
    ("rating", "ones"): ([1, 1], "!!"),
    ("rating", "of ten"): ([1, 9, 10], "!!!"),
    ("score", "five stars"): ([1, 5], "bg"),
    ("score", "a share"): ([0.93, 87.5], "--"),
}


@pytest.mark.parametrize("column, name", LABELS)
def test_a_column_of_labels_is_read_by_the_scale_of_the_file(column, name):
    from common.preflight.finding import Refused
    from tasks.chat.labels import scales
    from tasks.chat.rows import convert

    values, read = LABELS[column, name]
    rows = [{"instruction": "问", "output": "答", column: value} for value in values]
    columns, found = scales(rows), ""
    for row in rows:
        try:
            done = convert(row, 1, (), columns)
        except Refused as refused:
            assert column in refused.args[0] and "--rename" in refused.args[1]
            found += "!"
            continue
        found += done.label[0] if done.label else "-"
        assert done.row.get("label") == {"good": True, "bad": False, "neither": False, None: None}[done.label]
        assert done.kind == ("kto" if done.label else "sft")
    assert found == read


def test_labels_that_contradict_each_other_are_refused():
    from common.preflight.finding import Refused
    from tasks.chat.rows import convert

    with pytest.raises(Refused, match="contradict each other: label True and thumbs 'down'"):
        convert({"instruction": "问", "output": "答", "label": True, "thumbs": "down"}, 1)


def test_labelled_rows_become_kto_rows_and_only_good_ones_are_learnt(prepare, run_stage):
    rows = [
        {"messages": [user(f"第{n}问怎么办？"), assistant(f"答{n}" if n % 2 else f"不知道{n}")], "label": bool(n % 2)}
        for n in range(60)
    ]
    stars = [{"instruction": f"第{n}题", "output": f"星{n}", "rating": n % 5 + 1} for n in range(50)]
    done, output = prepare({"a.jsonl": lines(*rows), "b.jsonl": lines(*stars)})
    kto, sft = (
        [row for split in ("train", "val", "test") for row in rows_of(output / f"{kind}_{split}.jsonl")]
        for kind in ("kto", "sft")
    )
    wanted = {(row["messages"][0]["content"], row["messages"][1]["content"]): row["label"] for row in rows}
    wanted |= {(row["instruction"], row["output"]): row["rating"] > 3 for row in stars if row["rating"] != 3}
    assert {(row["prompt"][-1]["content"], row["completion"][0]["content"]): row["label"] for row in kto} == wanted
    assert all(set(row) == {"prompt", "completion", "label", "meta"} for row in kto)
    learnt = {(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in sft}
    assert learnt == {texts for texts, good in wanted.items() if good} and all("label" not in row for row in sft)
    assert "labels in label: 30 good, 30 bad, 0 neither" in done.stdout
    assert "labels in rating: 20 good, 20 bad, 10 neither" in done.stdout
    checked = run_stage(
        "19_check_data.py",
        "--train-file",
        output / "kto_train.jsonl",
        "--val-file",
        output / "kto_val.jsonl",
        "--preview",
        output / "preview.html",
        "--task",
        "chat",
    )
    assert "schema kto," in checked.stdout and "\n0 errors" in checked.stdout and "41_train_kto.py" in checked.stdout
    assert "bad: " in (output / "preview.html").read_text(encoding="utf-8")


def kto(question: str, answer: str, label) -> dict:
    return {"prompt": [user(question)], "completion": [assistant(answer)], "label": label}


def test_kto_rows_are_checked(tmp_path):
    from common.models import load_tokenizer
    from common.preflight.checks import check_rows
    from common.schemas import validate_row

    assert validate_row(kto("问", "答", True), "kto") == []
    long = {**kto("问", "答", True), "completion": [assistant("答"), user("再问"), assistant("答")]}
    for row, reason in ((kto("问", "答", 1), "label is a whole number, not a true/false"), (long, "several turns")):
        (found,) = validate_row(row, "kto")
        assert reason in found.reason and found.fix
    (tmp_path / "rows.jsonl").write_bytes(
        lines(kto("问", "答", True), kto("问", "答", False), kto("问三", "答三", True))
    )
    report = check_rows(tmp_path / "rows.jsonl", None, "auto", load_tokenizer(str(ROOT / "data/tiny_qwen3")), 512)
    assert report.schema == "kto" and [(found.check, found.line) for found in report.errors] == [("contradiction", 2)]


def test_only_what_is_a_copy_is_dropped(prepare):
    questions = [
        "2+2=?",
        "2*2=?",
        "用一句话介绍 C。",
        "用一句话介绍 C++。",
        "用一句话介绍 C#。",
        "现在-5度",
        "现在5度",
        "é是什么",
        "e是什么",
    ]
    rows = [{"instruction": question, "output": f"答{n}"} for n, question in enumerate(questions)]
    prompts = [{"prompt": f"计算 6{sign}3，只写结果。"} for sign in "+-*/"]
    _, output = prepare({"a.jsonl": lines(*rows), "b.jsonl": lines(*prompts)}, "--val-share", 0, "--test-share", 0)
    assert len(rows_of(output / "sft_train.jsonl")) == 9 and len(rows_of(output / "prompts_train.jsonl")) == 4


def test_skip_bad_leaves_out_what_the_training_stages_refuse(prepare, run_stage, tmp_path):
    rows = [
        {"instruction": f"第{n}个问题怎么办？", "output": f"第{n}件事要先问清楚，再慢慢做{'好' * (n % 7)}。"}
        for n in range(60)
    ]
    bad = ["Error code: 429 - rate limit reached", "<think>没有想完", "锟斤拷锟斤拷", "甲" * 600, "早晨<|im_end|>好"]
    rows += [{"instruction": f"坏问题{n}", "output": text} for n, text in enumerate(bad)]
    done, output = prepare({"a.jsonl": lines(*rows)}, "--skip-bad")
    for place in range(61, 66):
        assert f"left out: {tmp_path / 'a.jsonl'}:{place}: completion: " in done.stdout or place == 64
    assert "a.jsonl:64: the answer is cut at 512 tokens" in done.stdout
    checked = run_stage(*done.stdout.rsplit("next: python scripts/", 1)[1].split(), "--preview", "None")
    assert "\n0 errors" in checked.stdout


def test_a_pipe_or_a_compressed_file_is_refused_at_once(tmp_path):
    import gzip
    import os

    from tasks.chat.rows import read_rows

    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(GOOD)))
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(lines(GOOD)))
    (tmp_path / "folder.jsonl").mkdir()
    for name, reason in {
        "pipe.jsonl": "is a pipe or a device, not a file; fix: write it to a file first",
        "rows.jsonl.gz": "the file is compressed; fix: gunzip -k ",
        "rows.jsonl": "the file is compressed; fix: gunzip",
        "folder.jsonl": "is a folder, not a file; fix: ",
    }.items():
        rows, (problem,) = read_rows(tmp_path / name)
        assert rows == [] and f"{name}: {reason}" in str(problem)


def test_faulty_rows_may_be_left_out_and_are_counted(prepare):
    bad = lines(GOOD, {"instruction": "问"}, {"messages": [user()]}) + b"{broken\n"
    done, output = prepare({"a.jsonl": bad}, "--skip-bad", "--val-share", 0, "--test-share", 0)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert sum(report["dropped"]["faulty"].values()) == 3 and len(rows_of(output / "sft_train.jsonl")) == 1
    assert done.stdout.count("left out: ") == 3


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    from test_sft_ways import stage

    output = tmp_path_factory.mktemp("chat") / "out"
    module = stage("17_prepare_chat")
    module.main(module.Settings(files=tuple(ROOT / path for path in module.Settings().files), output_dir=output))
    return output


def test_the_shipped_set_keeps_every_row_and_passes_the_preflight(shipped):
    from common.models import load_tokenizer
    from common.preflight.checks import check_rows

    tokenizer = load_tokenizer(str(ROOT / "data/tiny_qwen3"))
    counts = {
        kind: sum(len(rows_of(shipped / f"{kind}_{split}.jsonl")) for split in ("train", "val", "test"))
        for kind in ("sft", "pref", "prompts")
    }
    assert counts == {"sft": 200, "pref": 100, "prompts": 100}
    for kind, schema in (("sft", "sft"), ("pref", "preference"), ("prompts", "prompts")):
        files = (shipped / f"{kind}_train.jsonl", shipped / f"{kind}_val.jsonl")
        report = check_rows(*files, schema, tokenizer, max_length=512)
        assert [finding for finding in report.findings if finding.level != "note"] == []


def test_no_question_stands_in_two_splits_of_any_kind(shipped):
    from tasks.chat.splits import question_key

    keys = {
        split: {
            question_key(row)
            for kind in ("sft", "pref", "prompts")
            for row in rows_of(shipped / f"{kind}_{split}.jsonl")
        }
        for split in ("train", "val", "test")
    }
    assert not keys["train"] & keys["val"] and not keys["train"] & keys["test"] and not keys["val"] & keys["test"]


def test_copies_and_answers_that_are_held_out_are_dropped_from_training(prepare):
    rows = [{"instruction": f"问题{n}", "output": A + A if n < 40 else f"答{n}"} for n in range(80)]
    words = ("--group-by", "prompt")
    done, output = prepare({"a.jsonl": lines(*rows, rows[0], {**rows[1], "instruction": "问题1！"})}, *words)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["dropped"]["sft"]["the same row as another"] == 2
    held_out = {
        row["completion"][0]["content"] for split in ("val", "test") for row in rows_of(output / f"sft_{split}.jsonl")
    }
    trained = {row["completion"][0]["content"] for row in rows_of(output / "sft_train.jsonl")}
    assert A + A in held_out and A + A not in trained
    assert sum(report["splits"]["sft"].values()) + sum(report["dropped"]["sft"].values()) == 82


def faq(answers: int, phrasings: int) -> list[dict]:
    topics = [chr(0x4E00 + 97 * n) * 12 + "，" + chr(0x5E00 + 97 * n) * 12 for n in range(answers)]
    return [
        {"instruction": f"第{n}件事的第{k}种问法", "output": f"{topic}。", "topic": f"题{n}", "source": k}
        for n, topic in enumerate(topics)
        for k in range(phrasings)
    ]


@pytest.mark.parametrize("answers, phrasings", [(10, 8), (3, 5), (40, 3)])
@pytest.mark.parametrize("by", ["answer", "topic"])
def test_rows_of_one_answer_go_to_one_split(by, answers, phrasings):
    from tasks.chat.rows import convert
    from tasks.chat.splits import answers_of, split_groups

    rows = [convert(row, 1, ("topic",)).row for row in faq(answers, phrasings)]
    splits, dropped = split_groups({"sft": rows}, by, 0.1, 0.1)
    parts = splits["sft"]
    assert dropped == {"sft": {}} and sum(map(len, parts.values())) == len(rows)
    held = [set().union(*map(answers_of, parts[split])) for split in ("train", "val", "test")]
    assert all(held) and not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    grown = [convert(row, 1, ("topic",)).row for row in faq(answers, phrasings)] + [
        convert({"instruction": f"新{n}", "output": f"新{n}", "topic": f"新{n}"}, 1, ("topic",)).row for n in range(50)
    ]
    if answers == 40:  # where no split had to be filled, a grown file moves no row
        again = split_groups({"sft": grown}, by, 0.1, 0.1)[0]["sft"]
        for split, part in parts.items():
            assert {row["meta"]["id"] for row in part} <= {row["meta"]["id"] for row in again[split]}


def test_groups_span_the_kinds_and_a_large_one_stays_in_train():
    from tasks.chat.rows import convert
    from tasks.chat.splits import split_groups

    sft = [
        convert({"instruction": f"问{n}", "output": f"{n}号的回答说清楚了要做的那几件事情，一件一件来。"}, 1).row
        for n in range(40)
    ]
    pref = [
        convert({"prompt": f"再问{n}", "chosen": row["completion"][0]["content"], "rejected": A + A}, 1).row
        for n, row in enumerate(sft)
    ]
    splits, dropped = split_groups({"sft": sft, "pref": pref}, "answer", 0.1, 0.1)
    assert dropped == {"sft": {}, "pref": {}}  # A + A is wanted by no row: it ties none together
    for split in ("train", "val", "test"):
        asked = {row["completion"][0]["content"] for row in splits["sft"][split]}
        assert asked and asked == {row["chosen"][0]["content"] for row in splits["pref"][split]}
    same = [convert({"instruction": f"问{n}", "output": A + A if n < 40 else f"答{n}"}, 1).row for n in range(80)]
    parts = split_groups({"sft": same}, "answer", 0.1, 0.1)[0]["sft"]
    assert sum(row["completion"][0]["content"] == A + A for row in parts["train"]) == 40 and parts["val"]


def test_without_held_out_rows_and_with_wrong_shares(prepare):
    done, output = prepare({"a.jsonl": lines(*faq(10, 2))}, "--held-out", 0)
    assert sorted(path.name for path in output.glob("*.jsonl")) == ["sft_train.jsonl"] and "warning" not in done.stdout
    assert done.stdout.rstrip().endswith("--val-file None") and len(rows_of(output / "sft_train.jsonl")) == 20
    for words, message in (
        (("--held-out", 1), "--held-out must be 0 or more"),
        (("--group-by", "nothing"), "fix: answer, prompt"),
        (("--rename", "topic=a", "topic=b"), "--rename topic=...: given twice"),
        (("--files", output.parent / "a.jsonl", output.parent / "a.jsonl"), "a.jsonl twice; fix: name it once"),
    ):
        done, _ = prepare({"a.jsonl": lines(*faq(10, 2))}, *words, "--overwrite", check=False)
        assert done.returncode == 2 and message in done.stderr and (output / "sft_train.jsonl").is_file()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_kind_with_few_rows_has_one_for_training(count, tmp_path):
    from tasks.chat.rows import convert
    from tasks.chat.splits import split_groups

    for start in range(20):  # whatever the hash of their questions says
        rows = [convert({"instruction": f"第{start}、{n}问", "output": f"答{n}"}, 1).row for n in range(count)]
        parts = split_groups({"sft": rows}, "answer", 0.45, 0.45)[0]["sft"]
        assert parts["train"] and sum(map(len, parts.values())) == count


def test_rows_that_differ_in_their_tools_are_no_copies():
    from tasks.chat.rows import convert
    from tasks.chat.splits import split_groups

    tools = [[{"name": name}] for name in ("get_weather", "get_time", "get_time")]
    rows = [convert({"instruction": "问", "output": "答", "tools": names}, 1).row for names in tools]
    splits, dropped = split_groups({"sft": rows}, "answer", 0, 0)
    assert len(splits["sft"]["train"]) == 2 and sum(dropped["sft"].values()) == 1


def test_a_column_that_keep_names_and_no_row_has_is_told(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines({"instruction": "问", "output": "答", "topic": "x"}))
    rows, _, _ = read_file(tmp_path / "a.jsonl", {"topic": "kind"}, ("category", "kind", "tpoic"))
    assert rows[0].row["meta"]["kind"] == "x"
    assert capsys.readouterr().out == "notice: a.jsonl has no column 'tpoic' that --keep names\n"


# --- the task


META = {"max_characters": 10, "must_include": ["雨伞", "车站"], "sentences": 2, "list_items": None}
TEXTS = {  # text -> length, include, sentences, all_followed
    "雨伞在车站。去拿。": (1.0, 1.0, 1.0, 1.0),
    "雨伞丢了。": (1.0, 0.5, 0.5, 0.0),
    "雨伞在车站……我去拿": (1.0, 1.0, 0.5, 0.0),
    "雨伞 在 车站。\n“去拿。”": (10 / 11, 1.0, 1.0, 0.0),
    "": (0.0, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("text", TEXTS)
def test_what_was_asked_is_measured(text):
    from tasks import chat

    values = [chat.REWARDS[name]([Q], [text], [META])[0] for name in ("length", "include", "sentences")]
    assert (*values, chat.METRICS["all_followed"]([Q], [text], [META])[0]) == pytest.approx(TEXTS[text])
    assert chat.REWARDS["list_items"]([Q], [text], [META]) == [None]


def test_where_nothing_is_asked_nothing_is_measured():
    from tasks import chat

    # a table's cell is one string, not its characters
    assert chat.REWARDS["include"]([Q], ["带雨。"], [{"must_include": "雨伞"}]) == [0.0]
    for name in ("length", "include", "sentences", "list_items", "follows"):
        assert chat.REWARDS[name]([Q], ["好。"], [{}]) == [None]


def test_lists_repeats_and_endings():
    from tasks import chat

    meta = [{"list_items": 3}] * 2
    assert chat.REWARDS["list_items"]([Q] * 2, ["1. 甲\n\n2. 乙\n3. 丙", "甲，乙，丙。"], meta) == pytest.approx(
        [1.0, 1 / 3]
    )
    assert chat.METRICS["no_repeat"]([Q] * 3, ["甲乙丙丁戊", "哈" * 9, "短"], [{}] * 3) == pytest.approx(
        [1.0, 1 / 6, None]
    )
    assert chat.REWARDS["closed"]([Q] * 4, ["好。", "他说“好。”", "还没说", "1. 甲\n2. 乙"], [{}] * 4) == [1, 1, 0, 1]
    assert chat.REWARDS["chinese"]([Q] * 3, ["好 good", "12。", "好的"], [{}] * 3) == pytest.approx([1 / 5, None, 1.0])


def test_every_shipped_prompt_can_be_judged(shipped):
    from tasks import chat

    rows = rows_of(shipped / "prompts_train.jsonl")
    values = chat.REWARDS["follows"]([r["prompt"] for r in rows], ["好。"] * len(rows), [r["meta"] for r in rows])
    assert all(value is not None for value in values)


def test_marks_do_not_overlap_and_stand_inside_the_text():
    from tasks import chat

    text = "雨伞在车站，雨伞在车站里。"
    marks = chat.mark(text, META)
    assert [text[a:b] for a, b, _ in marks] == ["雨伞", "车站", "雨伞", "站里。"] or marks[-1][2] == "length_fault"
    assert all(a[1] <= b[0] for a, b in zip(marks, marks[1:], strict=False)) and marks[-1][1] == len(text)
