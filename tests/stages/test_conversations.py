"""Conversations through the stages: five turns from a user's file to the comparison page, and rows with reasoning and
tools through every stage that trains and writes."""

import json

import pytest

from common.settings import read_settings
from conftest import ROOT, page_data_of
from test_chat import lines, rows_of
from test_messages import CALL, WEATHER, assistant, qwen3, user  # noqa: F401 (qwen3 is a fixture)
from test_sft_ways import stage

WORDS = ("春眠不觉晓", "处处闻啼鸟", "夜来风雨声", "花落知多少", "白日依山尽", "黄河入海流", "欲穷千里目", "更上一层楼")
FEW = ["--max-steps", 2, "--batch-size", 4, "--dtype", "float32", "--report-to", "none", "--lora-r", 4]
LIMIT = {"meta": {"max_characters": 3}}  # what the reward of stage 50 reads
PROBED = ["--probe-count", 2, "--probe-tokens", 4]


def run(name: str, *words) -> None:
    """A stage with the words of its command line, in this process. A finished stage ends by itself."""
    module = stage(name)
    module.main(read_settings(module.Settings, list(map(str, words))))


def talk(number: int) -> list[dict]:
    """Five turns: a question and an answer twice, then a question; each text once in the whole file."""
    texts = [f"{WORDS[(number + n) % 8]}{'问答'[n % 2]}第{number}次{n}。" for n in range(6)]
    return [turn for n in range(0, 6, 2) for turn in (user(texts[n]), assistant(texts[n + 1]))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    roles = {"user": "human", "assistant": "gpt"}
    shared = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in talk(0)]
    rows = [{"conversations": shared, "system": "只写古诗。", **LIMIT}] + [
        {"messages": talk(n), **LIMIT} for n in range(1, 24)
    ]
    pairs = [
        {"chosen": talk(n), "rejected": [*talk(n)[:-1], assistant(f"不写{n}。")], "category": "诗"}
        for n in range(30, 46)
    ]
    (folder / "mine.jsonl").write_bytes(lines(*rows, *pairs))
    run("17_prepare_chat", "--files", folder / "mine.jsonl", "--output-dir", folder / "data", "--held-out", 0.4)
    return folder / "data"


def test_five_turns_from_a_file_to_the_page(prepared, tmp_path, capsys):
    kinds = {
        kind: [rows_of(prepared / f"{kind}_{split}.jsonl") for split in ("train", "val", "test")]
        for kind in ("sft", "pref")
    }
    assert sum(map(len, kinds["sft"])) == 24 and sum(map(len, kinds["pref"])) == 16
    for row in (row for part in kinds["sft"] for row in part):
        assert [turn["role"] for turn in row["prompt"] if turn["role"] != "system"] == ["user", "assistant"] * 2 + [
            "user"
        ]
    base = ("--model", ROOT / "data/tiny_qwen3")
    files = {
        k: ("--train-file", prepared / f"{k}_train.jsonl", "--val-file", prepared / f"{k}_val.jsonl") for k in kinds
    }
    capsys.readouterr()

    run(
        "20_train_sft",
        "--task",
        "chat",
        *base,
        *files["sft"],
        *FEW,
        *PROBED,
        "--row-style",
        "messages",
        "--output-dir",
        tmp_path / "sft",
    )
    count = len(kinds["sft"][0])
    assert f"trained: {3 * count} answers, " in capsys.readouterr().out
    figures = json.loads((tmp_path / "sft/run.json").read_text(encoding="utf-8"))["figures"]
    assert (figures["trained_answers"], figures["other_answers"]) == (3 * count, 0) and figures["other_tokens"] > 0
    run("30_train_reward", "--task", "chat", *base, *files["pref"], *FEW, "--output-dir", tmp_path / "reward")
    run("40_train_dpo", "--task", "chat", *base, *files["pref"], *FEW, *PROBED, "--output-dir", tmp_path / "dpo")
    rl = ("--train-file", prepared / "sft_train.jsonl", "--val-file", prepared / "sft_val.jsonl")
    small = ["--max-new-tokens", 16, "--num-generations", 8, "--probe-count", 2, "--batch-size", 8, "--max-length", 200]
    small += ["--rewards", "length", "closed"]
    run("50_train_grpo", "--task", "chat", *base, *rl, *FEW, *small, "--output-dir", tmp_path / "grpo", "--lr", 0.01)
    generations = tmp_path / "generations"
    for name, adapter in (("base", ()), ("sft", ("--adapter", tmp_path / "sft"))):
        words = (
            "--prompts-file",
            prepared / "sft_test.jsonl",
            "--max-new-tokens",
            8,
            "--output-file",
            generations / f"{name}.jsonl",
        )
        run("60_generate", "--task", "chat", *base, *adapter, *words, "--name", name, "--dtype", "float32")
    scores = ("--output-dir", tmp_path / "scores")
    run(
        "70_score",
        "--task",
        "chat",
        "--generations",
        generations,
        *scores,
        "--nll-model",
        ROOT / "data/tiny_qwen3",
        "--dtype",
        "float32",
    )
    pair = [f"{name}={generations}/{name}.jsonl" for name in ("base", "sft")]
    judged = (
        "--generations",
        generations,
        "--output-file",
        tmp_path / "judged/rules.jsonl",
        "--request-log",
        tmp_path / "log.jsonl",
    )
    run("71_judge", "--task", "chat", "--candidates", *pair, *judged)
    assert "系统：只写古诗。" in (tmp_path / "judged/rules.csv").read_text(encoding="utf-8-sig") or not any(
        row["prompt"][0]["role"] == "system" for row in kinds["sft"][2]
    )
    run(
        "72_compare",
        "--task",
        "chat",
        "--generations",
        generations,
        "--scores",
        tmp_path / "scores",
        "--output",
        tmp_path / "page",
    )
    data = page_data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    shown = [item["turns"] for item in data["items"]]
    asked = [[[turn["role"], turn["content"]] for turn in row["prompt"]] for row in kinds["sft"][2]]
    assert sorted(shown) == sorted(asked) and {len(turns) for turns in shown} <= {5, 6}


def tool_rows(count: int) -> dict[str, list[dict]]:
    """Rows of every kind with reasoning and tools, as stage 17 writes them."""
    found = {"sft": [], "pref": [], "kto": []}
    for number in range(count):
        ask = [
            user(f"{WORDS[number % 8]}，第{number}天天气如何"),
            assistant("", tool_calls=[CALL], reasoning_content="要查。"),
        ]
        row = {"prompt": [*ask, {"role": "tool", "content": "晴"}], "tools": [WEATHER], "meta": {"max_characters": 3}}
        good = assistant(f"晴，第{number}天。", reasoning_content=f"第{number}天是晴天。")
        bad = assistant(f"雨，第{number}天！", reasoning_content=f"第{number}天下雨。")
        found["sft"].append(row | {"completion": [good]})
        found["pref"].append(row | {"chosen": [good], "rejected": [bad]})
        found["kto"].append(row | {"completion": [good if number % 2 else bad], "label": bool(number % 2)})
    return found


def test_reasoning_and_tools_go_through_every_stage(qwen3, tmp_path, capsys):  # noqa: F811
    from common.jsonl import read_jsonl
    from common.models import load_tokenizer
    from common.settings import UserError

    files = {}
    for kind, rows in tool_rows(8).items():
        files[kind] = tmp_path / f"{kind}_train.jsonl"
        files[kind].write_bytes(lines(*rows))
    base = ("--task", "chat", "--model", qwen3, "--enable-thinking", "--max-length", 900)
    few = [*FEW, "--batch-size", 2, "--lr", 0.01]

    def words(kind: str, name: str, *more) -> list:
        return ["--train-file", files[kind], "--val-file", None, "--output-dir", tmp_path / name, *more]

    run("20_train_sft", *base, *few, *PROBED, *words("sft", "sft", "--row-style", "messages"))
    assert "trained: 16 answers" in capsys.readouterr().out
    plain = [word for word in few if word not in ("--report-to", "none")]
    run("21_train_sft_plain", *base, *plain, *PROBED, *words("sft", "plain"))
    assert "trained: 8 answers" in capsys.readouterr().out
    run("30_train_reward", *base, *few, *words("pref", "reward"))
    run("40_train_dpo", *base, *few, *PROBED, *words("pref", "dpo"))
    run("41_train_kto", *base, *few, *PROBED, *words("kto", "kto"))
    rl = [
        "--train-file",
        files["sft"],
        "--val-file",
        files["sft"],
        "--rewards",
        "length",
        "closed",
        f"model={tmp_path / 'reward'}:.1",
        "--num-generations",
        8,
    ]
    more = ["--max-new-tokens", 16, "--probe-count", 2, "--output-dir", tmp_path / "grpo", "--batch-size", 8]
    run("50_train_grpo", *base, *few, *rl, *more)
    written = tmp_path / "generations/sft.jsonl"
    short = ("--max-new-tokens", 8, "--output-file", written, "--dtype", "float32")
    ask = ("--task", "chat", "--model", qwen3, "--enable-thinking")
    run("60_generate", *ask, "--adapter", tmp_path / "sft", "--prompts-file", files["sft"], *short)
    rows = read_jsonl(written, "generation")
    assert len(rows) == 8 and all(row["tools"] == [WEATHER] for row in rows)

    capsys.readouterr()
    few_texts = ["--probe-rows", 4, "--greedy-rows", 1, "--greedy-tokens", 4, "--dtype", "float32"]
    merged = ["--adapter", tmp_path / "sft", "--probe-file", files["sft"], "--output-dir", tmp_path / "merged"]
    run("22_merge_adapter", "--task", "chat", *merged, *few_texts)
    parity = ["--adapter", tmp_path / "sft", "--merged", tmp_path / "merged", "--rows-file", files["sft"]]
    parity += ["--max-prompts", 1, "--max-new-tokens", 4, "--output-file", tmp_path / "parity.json"]
    run("23_check_parity", "--task", "chat", "--server", "none", *parity)
    said = capsys.readouterr().out
    assert "tokens, rows, thinking on: training = hf in 8 of 8 rows" in said and "thinking off: training" not in said
    other = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "上海"}}}
    calls = {key: [assistant("", tool_calls=[call])] for key, call in (("chosen", CALL), ("rejected", other))}
    (tmp_path / "pref_val.jsonl").write_bytes(
        lines(*({"prompt": row["prompt"][:1], "tools": [WEATHER], **calls} for row in tool_rows(4)["pref"]))
    )
    card = ["--model", tmp_path / "reward", "--bootstrap", 20, "--output", tmp_path / "card", "--dtype", "float32"]
    card += ["--train-file", files["pref"], "--val-file", tmp_path / "pref_val.jsonl", "--max-length", 900]
    run("32_evaluate_reward", "--task", "chat", "--enable-thinking", *card)
    assert "equal scores" not in (tmp_path / "card.md").read_text(encoding="utf-8")  # the calls are read

    for name, kind in (
        ("20_train_sft", "sft"),
        ("40_train_dpo", "pref"),
        ("41_train_kto", "kto"),
        ("30_train_reward", "pref"),
    ):
        refused = ["--task", "chat", "--model", ROOT / "data/tiny_qwen3", "--max-length", 900, *few]
        with pytest.raises(UserError, match="the chat template of .*tiny_qwen3 loses tool_calls: 'get_weather'"):
            run(name, *refused, *words(kind, "refused"))
    with pytest.raises(UserError, match="does not stand where the model begins.*fix: --enable-thinking"):
        run("20_train_sft", "--task", "chat", "--model", qwen3, "--max-length", 900, *few, *words("sft", "refused"))
    assert not (tmp_path / "refused").exists() and load_tokenizer(str(qwen3)).chat_template
