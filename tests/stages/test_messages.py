"""What a turn holds beside its content: reasoning, tools, weights. From a user's file through the stages that train,
write, score and judge; refused by name where the chat template loses it."""

import json
import shutil
from pathlib import Path

import pytest
import trl

from common.models import chat_dataset, load_tokenizer
from common.settings import UserError
from conftest import ROOT
from test_chat import lines
from test_sft_ways import stage

BASE = ROOT / "data/tiny_qwen3"
QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
PLAIN = (  # ChatML as most bases have it: no marks, and no place for reasoning or tools
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def tokenizer_with(template: str):
    tokenizer = load_tokenizer(str(BASE))
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    """The embedded base with Qwen3's chat template; trl does not know it as such."""
    folder = shutil.copytree(BASE, tmp_path_factory.mktemp("base") / "qwen3_shape")
    (folder / "chat_template.jinja").write_text("{#- as Qwen3's -#}\n" + QWEN3, encoding="utf-8")
    return folder


ASK = user("北京天气")
TOOL_TALK = [
    ASK,
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "晴，28度"},
    assistant("晴，二十八度。"),
]
CALLING = assistant("", tool_calls=[{"id": "c1", **CALL}])
REPLY = {"role": "tool", "tool_call_id": "c1", "content": "晴"}
# a user's row -> (prompt, completion, tools) as trl and the templates read them
CONVERTED = {
    "reasoning_content": (
        {"messages": [user("问"), assistant("答", reasoning_content="想")]},
        ([user("问")], [assistant("答", reasoning_content="想")], None),
    ),
    "reasoning": (
        {"messages": [user("问"), assistant("答", reasoning="想")]},
        ([user("问")], [assistant("答", reasoning_content="想")], None),
    ),
    "a block in the content": (
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "<think>\n想\n</think>\n\n答"}]},
        ([user("问")], [assistant("<think>\n想\n</think>\n\n答")], None),
    ),
    "a column of reasoning": (
        {"instruction": "问", "output": "答", "reasoning_content": "想"},
        ([user("问")], [assistant("答", reasoning_content="想")], None),
    ),
    "OpenAI's calls": (
        {
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "北京"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "晴，28度"},
                assistant("晴，二十八度。"),
            ],
            "tools": [WEATHER],
        },
        (
            [
                ASK,
                assistant("", tool_calls=[{"id": "c1", **CALL}]),
                {"role": "tool", "content": "晴，28度", "tool_call_id": "c1"},
            ],
            [assistant("晴，二十八度。")],
            [WEATHER],
        ),
    ),
    "OpenAI's functions of old": (
        {
            "messages": [ASK, assistant("", function_call={"name": "get_weather", "arguments": '{"city": "北京"}'})],
            "functions": [WEATHER["function"]],
        },
        ([ASK], [assistant("", tool_calls=[CALL])], [WEATHER]),
    ),
    "ShareGPT's roles": (
        {
            "conversations": [
                {"from": "human", "value": "北京天气"},
                {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "北京"}}'},
                {"from": "observation", "value": "晴，28度"},
                {"from": "gpt", "value": "晴，二十八度。"},
            ],
            "tools": json.dumps([WEATHER["function"]]),
        },
        (TOOL_TALK[:3], TOOL_TALK[3:], [WEATHER]),
    ),
    "ms-swift's roles": (
        {
            "messages": [
                ASK,
                assistant("我查一下。"),
                {"role": "tool_call", "content": '{"name": "get_weather", "arguments": {"city": "北京"}}'},
                {"role": "tool_call", "content": '{"name": "get_weather", "arguments": {"city": "上海"}}'},
                {"role": "tool_response", "content": "晴"},
                {"role": "tool_response", "content": "雨"},
                assistant("北京晴，上海雨。"),
            ],
            "tools": json.dumps([WEATHER]),
        },
        (
            [
                ASK,
                assistant(
                    "我查一下。",
                    tool_calls=[
                        CALL,
                        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "上海"}}},
                    ],
                ),
                {"role": "tool", "content": "晴"},
                {"role": "tool", "content": "雨"},
            ],
            [assistant("北京晴，上海雨。")],
            [WEATHER],
        ),
    ),
    "calls as text": (  # ToolACE, Hermes
        {
            "conversations": [
                {"from": "user", "value": "北京天气"},
                {"from": "assistant", "value": '[get_weather(city="北京")]'},
                {"from": "tool", "value": "晴"},
                {"from": "assistant", "value": "晴。"},
            ]
        },
        (
            [ASK, assistant('[get_weather(city="北京")]'), {"role": "tool", "content": "晴"}],
            [assistant("晴。")],
            None,
        ),
    ),
    "a wrong call that is not trained": (
        {"messages": [ASK, {**CALLING, "weight": 0}, REPLY, assistant("晴。")], "tools": [OTHER]},
        ([ASK, {**CALLING, "weight": 0}, REPLY], [assistant("晴。")], [OTHER]),
    ),
    "other words for weight 0": (
        {
            "messages": [
                user("一"),
                assistant("甲", masked=True),
                {**user("二"), "loss_mask": 0},
                assistant("乙", loss_mask="0"),
                user("三"),
                assistant("丙", trainable=True, loss_scale=1.0),
            ]
        },
        (
            [user("一"), assistant("甲", weight=0), user("二"), assistant("乙", weight=0), user("三")],
            [assistant("丙")],
            None,
        ),
    ),
    "weights": (
        {
            "messages": [
                user("一"),
                assistant("甲", weight=0),
                user("二"),
                assistant("乙", train=True),
                user("三"),
                assistant("丙", loss=False),
            ]
        },
        ([user("一"), assistant("甲", weight=0), user("二")], [assistant("乙")], None),
    ),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_what_a_turn_holds_is_carried_field_by_field(name):
    from tasks.chat.rows import convert

    row, (prompt, completion, tools) = CONVERTED[name]
    found = convert(row, 1)
    assert found.kind == "sft" and found.unused == ()
    assert (found.row["prompt"], found.row["completion"], found.row.get("tools")) == (prompt, completion, tools)


WRONG = {
    "half a weight": (
        {"messages": [user("问"), assistant("答", weight=0.5)]},
        "messages[1].weight is 0.5",
    ),
    "nothing to train": (
        {"messages": [user("问"), assistant("答", weight=0)]},
        "no answer of messages is to be trained",
    ),
    "a trained question": ({"messages": [{**user("问"), "train": True}, assistant("答")]}, "on a turn of user"),
    "a pair of weight 0": (
        {"prompt": "问", "chosen": assistant("答", weight=0), "rejected": "否"},
        "the last answer of chosen has weight 0",
    ),
    "a label of weight 0": (
        {"messages": [user("问"), assistant("答"), user("再"), assistant("否", loss=0)], "label": True},
        "a label on an answer of weight 0",
    ),
    "reasoning twice": (
        {"messages": [user("问"), assistant("<think>想</think>答", reasoning="想")]},
        "holds reasoning twice",
    ),
    "reasoning that never ends": (
        {"messages": [user("问"), assistant("<think>想")]},
        "opens <think> and never closes it",
    ),
    "reasoning of a user": (
        {"messages": [{**user("问"), "reasoning": "想"}, assistant("答")]},
        "messages[0] is user and holds reasoning",
    ),
    "reasoning is a list": ({"messages": [user("问"), assistant("答", reasoning=["想"])]}, "reasoning is not a text"),
    "a call that is no JSON": (
        {"conversations": [{"from": "human", "value": "问"}, {"from": "function_call", "value": "查"}]},
        "conversations[1] is not JSON: '查'",
    ),
    "a call without a name": (
        {"messages": [user("问"), assistant("", tool_calls=[{"function": {"arguments": "{}"}}])]},
        "holds no call of a function by name",
    ),
    "arguments that are no object": (
        {"messages": [user("问"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])]},
        "the arguments of f are no object",
    ),
    "a reply to nobody": (
        {"messages": [user("问"), {"role": "tool", "content": "晴"}, assistant("晴")]},
        "prompt[1] is tool where assistant is due",
    ),
    "tools that are no list": (
        {"messages": [user("问"), assistant("答")], "tools": "[1]"},
        "tools is not a list of functions",
    ),
    "a call of no tool of the row": (
        {"messages": [ASK, assistant("", tool_calls=[CALL])], "tools": [OTHER]},
        "completion[0] calls get_weather, which is not among the tools of the row",
    ),
    "a call of no tool earlier": (
        {"messages": [*TOOL_TALK, ASK, assistant("晴")], "tools": [OTHER]},
        "prompt[1] calls get_weather, which is not among the tools of the row",
    ),
    "a reply to another call": (
        {"messages": [ASK, CALLING, {"role": "tool", "tool_call_id": "c2", "content": "晴"}, assistant("晴")]},
        "prompt[2] is a tool's reply with the tool_call_id 'c2', and no such call waits for one",
    ),
    "two replies to one call": (
        {"messages": [ASK, CALLING, REPLY, REPLY, assistant("晴")]},
        "prompt[3] is a tool's reply with the tool_call_id 'c1', and no such call waits for one",
    ),
    "two replies without a name": (
        {"messages": [*TOOL_TALK[:3], {"role": "tool", "content": "雨"}, assistant("晴")]},
        "prompt[3] is a tool's reply, and no such call waits for one",
    ),
    "a reply of another function": (
        {"messages": [*TOOL_TALK[:2], {"role": "tool", "name": "get_time", "content": "晴"}, assistant("晴")]},
        "prompt[2] is a tool's reply with the name 'get_time', and no such call waits for one",
    ),
    "a reply to an answer that calls nothing": (
        {"messages": [ASK, assistant("我查一下。"), {"role": "tool", "content": "晴"}, assistant("晴")]},
        "prompt[2] is a tool's reply, and no such call waits for one",
    ),
    "an id that is no text": (
        {"messages": [ASK, CALLING, {"role": "tool", "tool_call_id": 1, "content": "晴"}, assistant("晴")]},
        "messages[2].tool_call_id is 1, not a text",
    ),
    "arguments that are no JSON": (
        {"messages": [ASK, assistant("", tool_calls=[{"function": {"name": "f", "arguments": "city=北京"}}])]},
        "the arguments of f is not JSON: 'city=北京'",
    ),
    "arguments with NaN": (
        {"messages": [ASK, assistant("", tool_calls=[{"function": {"name": "f", "arguments": '{"a": NaN}'}}])]},
        "the arguments of f is not JSON",
    ),
    "arguments that are 0": (
        {"messages": [ASK, assistant("", tool_calls=[{"function": {"name": "f", "arguments": 0}}])]},
        "the arguments of f are no object",
    ),
    "arguments under another name": (
        {"messages": [ASK, assistant("", tool_calls=[{"name": "f", "args": {"city": "北京"}}])]},
        "the call of f holds args, which is not read",
    ),
    "a tool twice": (
        {"messages": [ASK, assistant("", tool_calls=[CALL])], "tools": [WEATHER, WEATHER]},
        "tools holds get_weather twice",
    ),
    "mask, which is on or off by project": (
        {"messages": [user("问"), assistant("答", mask=True)]},
        "messages[1].mask is True: is that turn trained or not?",
    ),
    "a word of weights that is not known": (
        {"messages": [user("问"), assistant("答", no_loss=1)]},
        "messages[1].no_loss is 1: is that turn trained or not?",
    ),
    "such a word in another spelling": (
        {"messages": [user("问"), assistant("答", lossMask=0)]},
        "messages[1].lossMask is 0: is that turn trained or not?",
    ),
    "a mask of the row": ({"instruction": "问", "output": "答", "mask": True}, "mask is True: is that row trained"),
    "a call, and tools are empty": (
        {"messages": [ASK, assistant("", tool_calls=[CALL])], "tools": []},
        "a call of a function, and no function among tools",
    ),
    "half a mask": ({"messages": [user("问"), assistant("答", loss_mask=0.5)]}, "messages[1].loss_mask is 0.5"),
    "masked and trained": (
        {"messages": [user("问"), assistant("答", masked=True, trainable=True)]},
        "messages[1] holds masked and trainable, which contradict each other",
    ),
    "a question that is not masked": (
        {"messages": [{**user("问"), "masked": False}, assistant("答")]},
        "messages[0].masked is False on a turn of user",
    ),
    "a row that is masked": ({"instruction": "问", "output": "答", "masked": True}, "masked is True: nothing of"),
    "a row of weight 0 as text": ({"instruction": "问", "output": "答", "weight": "0"}, "weight is '0': nothing of"),
    "a row that is not trained": (
        {"messages": [user("问"), assistant("答")], "train": False},
        "train is False: nothing",
    ),
    "history beside messages": (
        {"messages": [user("问"), assistant("答")], "history": [["先问", "先答"]]},
        "history beside messages",
    ),
    "messages as text": (
        {"messages": '[{"role": "user", "content": "问"}]'},
        "messages is a text, not a list of turns",
    ),
    "tools without a name": ({"messages": [user("问"), assistant("答")], "tools": [{"a": 1}]}, "tools[0] has no name"),
    "images": ({"messages": [{**user("问"), "images": ["a.png"]}, assistant("答")]}, "holds images, which is no text"),
}


def test_what_cannot_be_carried_is_named_with_its_line(tmp_path):
    from common.jsonl import DataError
    from tasks.chat.files import read_file

    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(*(row for row, _ in WRONG.values())))
    module = stage("17_prepare_chat")
    with pytest.raises(DataError, match="a.jsonl:1: .*; fix: "):
        module.main(module.Settings(files=(file,), output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    rows, problems, _ = read_file(file, {}, ())
    assert rows == [] and [problem.line for problem in problems] == list(range(1, len(WRONG) + 1))
    for problem, (name, (_, message)) in zip(problems, WRONG.items(), strict=True):
        assert message in problem.reason and problem.fix, name


# ------------------------------------------------------------------------------------------------- what is trained

TALK = [turn for n in range(1, 6) for turn in (user(f"第{n}问"), assistant(f"第{n}答。"))]
ROW = {"prompt": TALK[:-1], "completion": TALK[-1:]}


def trained_texts(row: dict, style: str, tokenizer, thinking: bool = False) -> list[str]:
    """What stage 20 trains, decoded: a text for every stretch of trained tokens."""
    from common.training.loss_masks import row_dataset

    found = []
    for trained in row_dataset([row], style, tokenizer, thinking):
        last = None
        for place, label in enumerate(trained["labels"]):
            if label == -100:
                continue
            assert label == trained["input_ids"][place]
            if last != place - 1:
                found.append([])
            found[-1].append(label)
            last = place
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize("template", ["own marks", PLAIN], ids=["marks", "no marks"])
def test_every_answer_is_trained_and_only_those_of_weight_1(template):
    tokenizer = load_tokenizer(str(BASE)) if template == "own marks" else tokenizer_with(template)
    every = [f"第{n}答。<|im_end|>" for n in range(1, 6)]
    assert trained_texts(ROW, "messages", tokenizer) == every
    masked = {"prompt": [{**turn, "weight": 0} if turn["content"] == "第2答。" else turn for turn in TALK[:-1]]}
    assert trained_texts(ROW | masked, "messages", tokenizer) == [every[0], *every[2:]]
    several = {"prompt": TALK[:5], "completion": [TALK[5], TALK[6], {**TALK[7], "weight": 0}, *TALK[8:]]}
    assert trained_texts(several, "prompt", tokenizer) == [every[2], every[4]]
    assert trained_texts(ROW, "answers", tokenizer) == every


def test_a_template_that_rewrites_history_is_refused_and_answers_trains_each(qwen3):
    tokenizer = load_tokenizer(str(qwen3))
    thought = {
        "prompt": [user("一"), assistant("甲", reasoning_content="想甲"), user("二")],
        "completion": [assistant("乙", reasoning_content="想乙")],
    }
    for known in (tokenizer, tokenizer_with(QWEN3)):  # the second has a marked copy in trl
        with pytest.raises(UserError, match="writes an earlier answer in another way.*fix: --row-style answers"):
            trained_texts(thought, "messages", known, thinking=True)
    assert trained_texts(thought, "answers", tokenizer, thinking=True) == [
        "<think>\n想甲\n</think>\n\n甲<|im_end|>",
        "<think>\n想乙\n</think>\n\n乙<|im_end|>",
    ]
    one = {"prompt": [user("一")], "completion": [assistant("甲", reasoning_content="想")]}
    for style in ("messages", "template"):
        assert trained_texts(one, style, tokenizer, thinking=True) == ["<think>\n想\n</think>\n\n甲<|im_end|>"]
    # calls of tools, each with reasoning, are kept by Qwen3's template: nothing is rewritten
    calls = [ASK, assistant("", tool_calls=[CALL], reasoning_content="查"), TOOL_TALK[2]]
    row = {"prompt": calls, "completion": [assistant("晴。", reasoning_content="答")], "tools": [WEATHER]}
    called, answered = trained_texts(row, "messages", tokenizer, thinking=True)
    assert called.startswith("<think>\n查\n</think>") and '"arguments": {"city": "北京"}' in called
    assert answered == "<think>\n答\n</think>\n\n晴。<|im_end|>"


def test_what_stage_21_trains_is_what_stage_20_trains(qwen3):
    from common.training.loss_masks import row_dataset

    plain = stage("21_train_sft_plain")
    tokenizer = load_tokenizer(str(qwen3))
    for completion in (assistant("甲", reasoning_content="想"), assistant("", tool_calls=[CALL]), assistant("乙")):
        row = {"prompt": [ASK], "completion": [completion], "tools": [WEATHER]}
        (ours,) = row_dataset([row], "template", tokenizer, True)
        theirs = plain.encode(row, tokenizer, 1000, True)
        if "reasoning_content" in completion:
            kept = [label for label in ours["labels"] if label != -100]
            assert kept == [label for label in theirs["labels"] if label != -100]
        decoded = tokenizer.decode([label for label in theirs["labels"] if label != -100])
        assert decoded.count(tokenizer.eos_token) == 1 and "<tool_call>" in decoded or completion["content"] in decoded


def test_trl_gets_tools_and_calls_without_keys_that_are_null(qwen3):
    tokenizer = load_tokenizer(str(qwen3))
    rows = [
        {"prompt": TOOL_TALK[:3], "completion": TOOL_TALK[3:], "tools": [WEATHER]},
        {"prompt": [user("问")], "completion": [assistant("答", reasoning_content="想")]},
    ]
    dataset = chat_dataset(rows, ("prompt", "completion"), True)
    assert [(row["prompt"], row["completion"]) for row in dataset] == [(r["prompt"], r["completion"]) for r in rows]
    assert [json.loads(row["tools"]) for row in dataset] == [[WEATHER], None]
    config = trl.SFTConfig(output_dir="x", use_cpu=True, bf16=False, report_to="none", completion_only_loss=True)
    from common.models import load_model

    trainer = trl.SFTTrainer(
        load_model(str(BASE), tokenizer), config, train_dataset=dataset, processing_class=tokenizer
    )
    from common.preflight.mask_preview import sft_sequence

    for row, trained in zip(rows, trainer.train_dataset, strict=True):
        shown = sft_sequence(row, tokenizer, 10_000, "prompt", True)
        assert trained["input_ids"] == shown.ids
        assert [label != -100 for label in trained["labels"]] == [kind == "trained" for kind in shown.kinds]
    text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert '"name": "get_weather"' in text and "<tool_response>\n晴，28度\n</tool_response>" in text


def test_stages_22_and_23_read_a_row_with_its_tools(qwen3):
    """What they render is what was trained: each text begins with the tools, and ends with the calls of the answer."""
    from common.evaluation.parity import chain, prompt_ids, question
    from common.merging import probe_texts

    tokenizer = load_tokenizer(str(qwen3))
    row = {"prompt": [ASK], "completion": [TOOL_TALK[1]], "tools": [WEATHER]}
    pair = {"prompt": [ASK], "chosen": [TOOL_TALK[1]], "rejected": [assistant("不知道。")], "tools": [WEATHER]}
    (trained,) = trained_texts(row, "template", tokenizer)
    score_texts = stage("22_merge_adapter").score_texts
    for text in (*probe_texts(tokenizer, [row]), score_texts(tokenizer, [pair])[0]):
        assert text.startswith("<|im_start|>system\n# Tools") and text.endswith(f"{trained}\n")
    asked = tokenizer.decode(prompt_ids(tokenizer, row, True))
    assert asked.startswith("<|im_start|>system\n# Tools") and question("m", row)["tools"] == [WEATHER]
    other = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
    plain = {"prompt": [user("问")], "completion": [assistant("答")]}
    assert chain(row, plain)["tools"] == [WEATHER] and "tools" not in chain(plain, plain)
    assert chain(row, row | {"tools": [WEATHER, other]})["tools"] == [WEATHER, other]
