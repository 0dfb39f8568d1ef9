"""The dialects of other projects: each against a second reading written for it here, wrong rows of each, and the table
of docs/DATA.md."""

import json
import re
from pathlib import Path

import pytest

from conftest import ROOT
from tasks.chat.files import read_file
from test_chat import assistant, lines, prepare, rows_of, user  # noqa: F401 (prepare is a fixture)
from test_messages import CALL, CONVERTED

SYSTEM = {"role": "system", "content": "简短。"}
A_PAIR = {"query": "再问", "response": "再答", "history": [["先问", "先答"]], "system": "简短。"}
EARLIER = [SYSTEM, user("先问"), assistant("先答")]
# name of the format as the stage prints it -> (a row, what it is: prompt, completion or (chosen, rejected))
DIALECTS = {
    "alpaca": ({"instruction": "改写：", "input": "好", "output": "善"}, [user("改写：\n好")], assistant("善")),
    "prompt/completion": (
        {"prompt": "再问", "completion": "再答", "history": [["先问", "先答"]], "system": "简短。"},
        [*EARLIER, user("再问")],
        assistant("再答"),
    ),
    "messages": ({"messages": [user("问"), assistant("答")]}, [user("问")], assistant("答")),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "简短。"},
        [SYSTEM, user("问")],
        assistant("答"),
    ),
    "firefly": (
        {"conversation": [{"human": "先问", "assistant": "先答"}, {"human": "再问", "assistant": "再答"}]},
        [user("先问"), assistant("先答"), user("再问")],
        assistant("再答"),
    ),
    "xtuner": (
        {
            "conversation": [
                {"system": "简短。", "input": "先问", "output": "先答"},
                {"input": "再问", "output": "再答"},
            ]
        },
        [*EARLIER, user("再问")],
        assistant("再答"),
    ),
    "conversation": ({"conversation": [user("问"), assistant("答")]}, [user("问")], assistant("答")),
    "ms-swift": (A_PAIR, [*EARLIER, user("再问")], assistant("再答")),
    "ms-swift pairs": (
        {**A_PAIR, "rejected_response": "不知道"},
        [*EARLIER, user("再问")],
        (assistant("再答"), assistant("不知道")),
    ),
    "ms-swift pairs of conversations": (
        {"messages": [user("问"), assistant("答")], "rejected_messages": [user("问"), assistant("否")]},
        [user("问")],
        (assistant("答"), assistant("否")),
    ),
    "OpenAI preference": (
        {
            "input": {"messages": [user("问")]},
            "preferred_output": [assistant("答")],
            "non_preferred_output": [assistant("否")],
        },
        [user("问")],
        (assistant("答"), assistant("否")),
    ),
    "question/answer": ({"question": "问", "answer": "答"}, [user("问")], assistant("答")),
    "instruction/response": ({"instruction": "问", "response": "答"}, [user("问")], assistant("答")),
    "input/output": ({"input": "问", "output": "答"}, [user("问")], assistant("答")),
    "input/target": ({"kind": None, "input": "问", "target": "答"}, [user("问")], assistant("答")),
    "question/response": (
        {"system_prompt": "简短。", "question": "问", "response": "答"},
        [SYSTEM, user("问")],
        assistant("答"),
    ),
    "pairs": ({"question": "问", "chosen": "答", "rejected": "否"}, [user("问")], (assistant("答"), assistant("否"))),
    "pairs (implicit prompt)": (
        {"chosen": [user("问"), assistant("答")], "rejected": [user("问"), assistant("否")]},
        [user("问")],
        (assistant("答"), assistant("否")),
    ),
    "prompt": (
        {"prompt": "再问", "history": [{"user": "先问", "assistant": "先答"}]},
        [user("先问"), assistant("先答"), user("再问")],
        None,
    ),
    "question + context/answer": (
        {"question": "他是谁？", "context": "李白，诗人。", "answer": "诗人"},
        [user("他是谁？\n李白，诗人。")],
        assistant("诗人"),
    ),
    "ultrachat": (
        {"data": ["先问", "先答", "再问", "再答"]},
        [user("先问"), assistant("先答"), user("再问")],
        assistant("再答"),
    ),
    "transcript": (
        {"instruction": "Human:先问\nAssistant:先答\nHuman:再问\nAssistant:", "input": "", "output": "再答"},
        [user("先问"), assistant("先答"), user("再问")],
        assistant("再答"),
    ),
    "transcript pairs": (
        {"chosen": "\n\nHuman: 问\n\nAssistant: 答", "rejected": "\n\nHuman: 问\n\nAssistant: 否"},
        [user("问")],
        (assistant("答"), assistant("否")),
    ),
    "MOSS": (
        {
            "meta_instruction": "简短。",
            "chat": {"turn_1": {"Human": "<|Human|>: 问<eoh>\n", "MOSS": "<|MOSS|>: 答<eom>\n"}},
        },
        [SYSTEM, user("问")],
        assistant("答"),
    ),
    "COIG": (
        {
            "textbox_q_instruction": "选一项。",
            "textbox_q_context": "",
            "textbox_question": "问",
            "textbox_answer": "A",
            "textbox_answer_analysis": "因为。",
        },
        [user("选一项。\n问")],
        assistant("A\n因为。"),
    ),
    "calls": (
        {
            "query": "北京天气",
            "answers": '[{"name": "get_weather", "arguments": {"city": "北京"}}]',
            "tools": '[{"name": "get_weather", "parameters": {"city": {"type": "str"}}}]',
        },
        [user("北京天气")],
        {**assistant(""), "tool_calls": [CALL]},
    ),
}
# name -> (the key that is left out, or holds a number; what a row with an odd order of turns holds instead)
BROKEN = {
    "alpaca": ("output", {}),
    "prompt/completion": ("completion", {}),
    "messages": ("messages", {"messages": [user("问"), user("再"), assistant("答")]}),
    "sharegpt": (
        "conversations",
        {"conversations": [{"from": "gpt", "value": "答"}, {"from": "human", "value": "问"}]},
    ),
    "firefly": ("conversation", {"conversation": [{"human": "问"}, {"assistant": "答"}]}),
    "xtuner": ("conversation", {"conversation": [{"input": "问", "output": "答"}, {"system": "x", "input": "问"}]}),
    "conversation": ("conversation", {"conversation": [assistant("答"), user("问")]}),
    "ms-swift": ("response", {}),
    "ms-swift pairs": ("response", {}),
    "ms-swift pairs of conversations": ("messages", {"messages": [assistant("答"), user("问")]}),
    "OpenAI preference": ("non_preferred_output", {"input": {"messages": [user("问"), assistant("答")]}}),
    "question/answer": ("answer", {}),
    "instruction/response": ("response", {}),
    "input/output": ("output", {}),
    "input/target": ("target", {}),
    "question/response": ("response", {}),
    "pairs": ("rejected", {}),
    "pairs (implicit prompt)": ("chosen", {"chosen": [user("问"), assistant("答"), user("再")]}),
    "prompt": ("prompt", {}),
    "question + context/answer": ("answer", {}),
    "ultrachat": ("data", {"data": ["先问", "先答", "再问"]}),
    "transcript": ("output", {"instruction": "Human:先问\nHuman:再问\nAssistant:"}),
    "transcript pairs": ("rejected", {"rejected": "\n\nHuman: 另问\n\nAssistant: 否"}),
    "MOSS": ("chat", {"chat": {"turn_1": {"Human": "<|Human|>: 问<eoh>\n"}}}),
    "COIG": ("textbox_question", {}),
    "calls": ("answers", {"answers": '[{"name": "get_time", "arguments": {}}]'}),
}


def convert(row: dict):
    from tasks.chat.rows import convert

    return convert(row, 1)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_read_field_by_field(name):
    row, prompt, answer = DIALECTS[name]
    found = convert(row)
    assert found.format == name and found.unused == () and found.row["prompt"] == prompt
    if isinstance(answer, tuple):
        assert (found.kind, found.row["chosen"], found.row["rejected"]) == ("pref", [answer[0]], [answer[1]])
    elif answer:
        assert found.kind == "sft" and found.row["completion"] == [answer]
    else:
        assert found.kind == "prompts" and "completion" not in found.row


HISTORIES = {
    "pairs": [["先问", "先答"]],
    "messages": [user("先问"), assistant("先答")],
    "sharegpt": [{"from": "human", "value": "先问"}, {"from": "gpt", "value": "先答"}],
    "objects": [{"human": "先问", "assistant": "先答"}],
}


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "再问", "output": "再答"},
        {"prompt": "再问", "completion": "再答"},
        {"query": "再问", "response": "再答"},
        {"prompt": [user("再问")], "chosen": "再答", "rejected": "否"},
        {"instruction": "再问", "chosen": "再答", "rejected": "否"},
        {"prompt": "再问"},
        {"question": "再问", "answer": "再答"},
    ],
)
def test_history_is_read_with_every_prompt(name, row):
    assert convert({**row, "history": HISTORIES[name]}).row["prompt"] == [user("先问"), assistant("先答"), user("再问")]


def write_broken(folder) -> list[Path]:
    """A file for each dialect: a good row, one without a key, one with a number for it, one with an odd order."""
    found = []
    for number, (name, (key, odd)) in enumerate(BROKEN.items()):
        row = DIALECTS[name][0]
        wrong = [{k: v for k, v in row.items() if k != key}, row | {key: 3}, row | (odd or {"history": [assistant()]})]
        found.append(folder / f"{number}.jsonl")
        found[-1].write_bytes(lines(row, *wrong))
    return found


def test_a_missing_key_a_wrong_type_and_an_odd_order_of_every_dialect(tmp_path, run_stage):
    assert BROKEN.keys() == DIALECTS.keys()
    files = write_broken(tmp_path)
    for file, name in zip(files, BROKEN, strict=True):
        rows, problems, _ = read_file(file, {}, ())
        assert [(row.line, row.format) for row in rows] == [(1, name)], name
        assert [problem.line for problem in problems] == [2, 3, 4] and all(p.fix for p in problems), name
    words = ["--files", *files, "--output-dir", tmp_path / "out"]
    done = run_stage("17_prepare_chat.py", *words, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert f"{3 * len(files)} problems" in done.stderr and re.search(r"0.jsonl:2: .+; fix: .+", done.stderr)


def test_parquet_gives_what_jsonl_gives(tmp_path):
    """In parquet every row has every column and every turn every key, null where there is none."""
    import pyarrow
    import pyarrow.parquet

    for number, (name, (row, _, _)) in enumerate(DIALECTS.items()):
        if "history" in row:  # a list of lists and a list of objects: both are types that parquet has
            assert isinstance(row["history"], list)
        table = pyarrow.Table.from_pylist([row, row | {"category": "诗"}, row])
        pyarrow.parquet.write_table(table.append_column("x", [[None] * 3]), tmp_path / f"{number}.parquet")
        rows, problems, _ = read_file(tmp_path / f"{number}.parquet", {}, ("category",))
        assert problems == [] and [found.line for found in rows] == [1, 2, 3], name
        expected = convert(row).row
        for found in rows:
            assert found.format == name and found.row | {"meta": 0} == expected | {"meta": 0}


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "gb18030", "gbk", "big5", "big5hkscs")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_table_in_any_common_encoding(encoding, tmp_path, capsys):
    text = "問題,答案\n如何評價李白？,「詩仙」，名不虛傳，讀他的詩要慢一些。\n怎樣學習？,多讀多寫。\n"
    if encoding not in ("big5", "big5hkscs"):
        text = "问题,答案\n如何评价李白？,“诗仙”，名不虚传，读他的诗要慢一些。\n怎样学习？,多读多写。\n"
    (tmp_path / "a.csv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    rows, problems, _ = read_file(tmp_path / "a.csv", {}, ())
    assert problems == []
    cells = [line.split(",") for line in text.splitlines()[1:]]
    assert [[row.row["prompt"][0]["content"], row.row["completion"][0]["content"]] for row in rows] == cells
    said = capsys.readouterr().out
    assert ("is read as" in said.split("read as question")[0].split("a.csv:")[0]) == (not encoding.startswith("utf-8"))


@pytest.mark.parametrize("text", ["question,answer\nWas ist müde?,schläfrig – très\n", "question,answer\nqué,año\n"])
def test_a_table_in_an_encoding_that_is_not_read_is_refused(text, tmp_path):
    (tmp_path / "a.csv").write_bytes(text.encode("cp1252"))
    rows, (problem,), _ = read_file(tmp_path / "a.csv", {}, ())
    assert rows == [] and "UTF-8" in problem.reason and "save" in problem.fix


WRONG = {
    "firefly: a missing answer": ({"conversation": [{"human": "问"}]}, "conversation[0].assistant is missing"),
    "firefly: a number": (
        {"conversation": [{"human": 3, "assistant": "答"}]},
        "conversation[0].human is 3, not a text",
    ),
    "firefly: no list": ({"conversation": "问"}, "conversation is not a list of objects"),
    "firefly: a further key": (
        {"conversation": [{"human": "问", "assistant": "答", "bot": "x"}]},
        "conversation[0] holds bot",
    ),
    "xtuner: a missing question": ({"conversation": [{"output": "答"}]}, "conversation[0].input is missing"),
    "xtuner: system late": (
        {"conversation": [{"input": "问", "output": "答"}, {"system": "x", "input": "问", "output": "答"}]},
        "conversation[1].system: a system text in the middle",
    ),
    "conversation: odd turns": ({"conversation": [assistant("答"), user("问")]}, "the last turn of messages is user"),
    "ms-swift: no query": ({"response": "答"}, "response without a question"),
    "ms-swift: a number": ({"query": 3, "response": "答"}, "prompt is 3, not a text"),
    "ms-swift pairs: no response": ({"query": "问", "rejected_response": "否"}, "response is missing"),
    "ms-swift pairs: equal": (
        {"query": "问", "response": "答", "rejected_response": "答"},
        "chosen and rejected are equal",
    ),
    "a tree": (
        {"prompt": {"text": "问", "role": "prompter", "replies": []}},
        "messages of a tree",
    ),
    "a message of a tree": (
        {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "答"},
        "messages of a tree",
    ),
    "a part of another type": (
        {"messages": [user("问"), {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]},
        "a part of the type tool_use",
    ),
    "a label of a turn": (
        {"messages": [user("问"), {**assistant("答"), "label": False}]},
        "messages[1].label is a label of one turn",
    ),
    "a row of weight .5": ({"instruction": "问", "output": "答", "weight": 0.5}, "weight is 0.5: rows have no"),
    "a row of weight 2.5, of a table": ({"instruction": "问", "output": "答", "weight": "2.5"}, "no weights but 1"),
    "a row of weight 0": ({"instruction": "问", "output": "答", "weight": 0}, "weight is 0"),
    "question: no answer": ({"question": "问"}, "question without an answer"),
    "answer: no question": ({"answer": "答"}, "answer without a question"),
    "history: a text": (
        {"prompt": "问", "completion": "答", "history": "先问"},
        "history is not a list of [question, answer]",
    ),
    "history: odd turns": (
        {"prompt": "问", "completion": "答", "history": [assistant("先答")]},
        "prompt[0] is assistant where user",
    ),
    "instances: a text": ({"instruction": "问", "instances": "答"}, "instances is not a list of objects"),
    "a column of images": ({"query": "<image>问", "response": "答", "images": ["a.png"]}, "the column images holds"),
    "a placeholder": ({"query": "<image>\n这是什么", "response": "答"}, "prompt holds the placeholder <image>"),
    "a placeholder of sound": (
        {"query": "<audio>\n说了什么", "response": "答"},
        "prompt holds the placeholder <audio>",
    ),
    "a part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, assistant()]},
        "messages[0] holds a part of the type image_url",
    ),
}


def test_wrong_rows_of_every_dialect_are_named_with_their_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*(row for row, _ in WRONG.values())))
    rows, problems, _ = read_file(tmp_path / "a.jsonl", {}, ("id",))
    assert rows == [] and [problem.line for problem in problems] == list(range(1, len(WRONG) + 1))
    for problem, (_, message) in zip(problems, WRONG.values(), strict=True):
        assert message in problem.reason and problem.fix


def test_a_question_about_html_is_no_placeholder():
    text = "在网页里放一段影片：<video>放什么</video>，<img> 又怎么用？"
    assert convert({"question": text, "answer": "写 src。"}).row["prompt"] == [user(text)]
    parts = [{"type": "text", "text": "前半，"}, {"type": "text", "value": "后半"}]
    assert convert({"messages": [{"role": "user", "content": parts}, assistant()]}).row["prompt"] == [
        user("前半，后半")
    ]


def test_files_of_every_shape_give_the_same_rows(prepare):  # noqa: F811
    talks = [[user(f"第{n}问"), assistant(f"第{n}答")] for n in range(6)]
    array = json.dumps(talks[1:2], ensure_ascii=False, indent=1)
    nested = {"type": "text2text", "instances": [{"input": "第3问", "output": "第3答"}]}
    seed = {"instruction": "第4问", "instances": [{"input": "", "output": "第4答"}]}
    table = "question\tanswer\n第{0}问\t第{0}答\n"
    files = {
        "lists.jsonl": lines(talks[0]),
        "array.json": array.encode(),
        "gb.csv": table.replace("\t", ",").format(2).encode("gb18030"),
        "nested.json": json.dumps(nested, indent=1).encode(),
        "seed.jsonl": lines(seed),
        "excel.csv": table.format(5).encode("utf-16"),
    }
    done, output = prepare(files, "--held-out", 0)
    found = [row["prompt"] + row["completion"] for row in rows_of(output / "sft_train.jsonl")]
    assert sorted(found, key=str) == sorted(talks, key=str)
    assert "gb.csv is read as GB18030" in done.stdout and "excel.csv is read as UTF-16" in done.stdout
    assert (
        "  message list: the list of turns: " in done.stdout and "  question/answer: question -> prompt" in done.stdout
    )


def test_a_list_that_is_broken_is_named_with_its_line(tmp_path):
    from tasks.chat.rows import read_rows

    (tmp_path / "a.jsonl").write_bytes(
        lines([user("问"), assistant("答")], [user("问二"), assistant("答二")])[:-3] + b"\n"
    )
    rows, (problem,) = read_rows(tmp_path / "a.jsonl")
    assert [line for line, _ in rows] == [1] and problem.line >= 2 and "broken JSON" in problem.reason


def data_table() -> str:
    from tasks.chat.dialects import MAPPINGS

    rows = ["| format | a row | what becomes what |", "|---|---|---|"]
    for name, (row, _, _) in DIALECTS.items():
        rows.append(f"| {name} | `{json.dumps(row, ensure_ascii=False)}` | {MAPPINGS[name]} |")
    return "\n".join(rows)


# what a row may hold beside texts; what comes out is checked in test_messages.py and test_chat.py
HELD = [CONVERTED[name][0] for name in ("a column of reasoning", "a block in the content", "ShareGPT's roles")]
HELD += [CONVERTED["OpenAI's functions of old"][0], {"messages": CONVERTED["weights"][0]["messages"][:4]}]
HELD += [{"instruction": "问", "output": "答", "label": False}]


def held_table() -> str:
    rows = ["| a row | what comes out |", "|---|---|"]
    for row in HELD:
        out = {key: value for key, value in convert(row).row.items() if key != "meta"}
        rows.append(f"| `{json.dumps(row, ensure_ascii=False)}` | `{json.dumps(out, ensure_ascii=False)}` |")
    return "\n".join(rows)


@pytest.mark.parametrize("table", [data_table, held_table])
def test_the_tables_of_formats_are_those_of_the_code(table):
    assert table() in (ROOT / "docs/DATA.md").read_text(encoding="utf-8")


def talk(count: int, size: int = 1) -> list[dict]:
    return [turn for n in range(count) for turn in (user(f"问{n}"), assistant(f"答{n}" + "好" * size))]


# (schema, row, max_length 60) -> what is left of it: how many turns each key keeps, or None where it is dropped
LONG = {
    "short": ("sft", {"prompt": talk(1)[:1], "completion": talk(1)[1:]}, {"prompt": 1, "completion": 1}),
    "a long answer": ("sft", {"prompt": talk(1)[:1], "completion": talk(1, 99)[1:]}, None),
    "a long conversation": (
        "sft",
        {"prompt": talk(5, 9)[:-1], "completion": talk(5, 9)[-1:]},
        {"prompt": 3, "completion": 1},
    ),
    "several answers": (
        "sft",
        {"prompt": talk(5, 9)[:1], "completion": talk(5, 9)[1:]},
        {"prompt": 1, "completion": 3},
    ),
    "a pair": (
        "preference",
        {"prompt": [SYSTEM, *talk(5, 9)[:-1]], "chosen": talk(1)[1:], "rejected": talk(1, 5)[1:]},
        {"prompt": 4, "chosen": 1, "rejected": 1},
    ),
    "a labelled answer": (
        "kto",
        {"prompt": talk(5, 9)[:-1], "completion": talk(1)[1:], "label": False},
        {"prompt": 5, "completion": 1},
    ),
    "a prompt": ("prompts", {"prompt": talk(9, 9)[:-1]}, {"prompt": 5}),
}


@pytest.mark.parametrize("name", LONG)
def test_long_rows_are_cut_at_whole_turns_as_late_as_they_fit(name):
    from common.long_rows import fit_rows
    from common.models import load_tokenizer

    schema, row, left = LONG[name]
    tokenizer = load_tokenizer(str(ROOT / "data/tiny_qwen3"))

    def need(row: dict) -> int:  # a second reading: the template as it is, up to the last eos
        sizes = []
        for key in [key for key in ("completion", "chosen", "rejected") if key in row]:
            ids = tokenizer.apply_chat_template(row["prompt"] + row[key], enable_thinking=False)["input_ids"]
            sizes.append(len(ids) - ids[::-1].index(tokenizer.eos_token_id))
        options = {"add_generation_prompt": True, "enable_thinking": False}
        return max(sizes, default=len(tokenizer.apply_chat_template(row["prompt"], **options)["input_ids"]) + 1)

    rows, long = fit_rows([row], schema, tokenizer, 60, "cut")
    assert bool(long.long) == (need(row) > 60) == (name != "short")
    assert (long.cut, long.dropped) == ((0, 0) if name == "short" else (1, 0) if left else (0, 1))
    if left is None:
        assert rows == []
        return
    (kept,) = rows
    assert need(kept) <= 60 and {key: len(kept[key]) for key in left} == left
    texts = [turn["content"] for key in left for turn in row[key]]
    assert all(turn["content"] in texts for key in left for turn in kept[key])  # no turn is cut inside
    assert fit_rows([row], schema, tokenizer, 60, "drop")[0] == ([row] if name == "short" else [])
    assert fit_rows([row], schema, tokenizer, 60, "refuse")[0] == [row]


def test_stage_17_refuses_drops_or_cuts_long_rows(prepare):  # noqa: F811
    rows = [{"instruction": f"第{n}问", "output": f"第{n}答" + "好" * (900 if n == 7 else 1)} for n in range(20)]
    rows.append({"messages": talk(9, 90)})
    words = ("--held-out", 0, "--max-length", 256)
    done, output = prepare({"a.jsonl": lines(*rows)}, *words, "--long-rows", "refuse", check=False)
    assert done.returncode == 2 and "a.jsonl:8: sft: the row is longer than 256 tokens" in done.stderr
    assert "a.jsonl:21: " in done.stderr and "--long-rows drop" in done.stderr and not output.exists()
    for policy, kept, cut, dropped in (("drop", 19, 0, 2), ("cut", 20, 1, 1)):
        done, output = prepare({"a.jsonl": lines(*rows)}, *words, "--long-rows", policy, "--overwrite", "--skip-bad")
        assert len(rows_of(output / "sft_train.jsonl")) == kept
        assert (
            "2 of 21 rows need more than 256 tokens (p50 " in done.stdout
            and f": {cut} cut, {dropped} dropped" in done.stdout
        )
        found = json.loads((output / "run.json").read_text(encoding="utf-8"))
        assert f'"cut": {cut}, "dropped": {dropped}' in json.dumps(found)
        assert "--max-length 256" in done.stdout.splitlines()[-1]
