"""Rows in the shape of public data sets, written by hand: what comes out of each, or why it is refused."""

import json

import pytest

from tasks.chat.files import read_file
from test_chat import assistant, lines, user
from test_messages import CALL, WEATHER

SYSTEM = {"role": "system", "content": "简短。"}
TALK = [user("先问"), assistant("先答"), user("再问"), assistant("再答")]
SHARED = [{"from": "human", "value": "先问"}, {"from": "gpt", "value": "先答"}]
MOSS_TURN = {
    "Human": "<|Human|>: 先问<eoh>\n",
    "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
    "Commands": "<|Commands|>: None<eoc>\n",
    "Tool Responses": "<|Results|>:\nNone\n<eor>\n",
    "MOSS": "<|MOSS|>: 先答<eom>\n",
}
MOSS_NEXT = {key: text.replace("先", "再") for key, text in MOSS_TURN.items()}
CALLED = '[{"name": "get_weather", "arguments": {"city": "北京"}}]'
# name -> (a row, the turns of it as trl reads them: of a pair the chosen ones)
SFT = {
    "COIG exam": (
        {
            "subject": "语文",
            "textbox_q_instruction": "请回答。",
            "textbox_q_context": "白日依山尽",
            "textbox_question": "谁写的？",
            "textbox_answer": "王之涣",
            "textbox_answer_analysis": "",
        },
        [user("请回答。\n白日依山尽\n谁写的？"), assistant("王之涣")],
    ),
    "COIG human values": ({"instruction": "问", "input": "", "output": "答"}, [user("问"), assistant("答")]),
    "MOSS 003": (
        {"conversation_id": 1, "num_turns": 2, "chat": {"turn_1": MOSS_TURN, "turn_2": MOSS_NEXT}, "category": "x"},
        TALK,
    ),
    "MOSS 003, meta instruction": (
        {"meta_instruction": "简短。", "chat": {"turn_1": MOSS_TURN}},
        [SYSTEM, *TALK[:2]],
    ),
    "MOSS 002": (
        {
            "id": 0,
            "prefix": "简短。",
            "plain_text": "[Human]: 先问<eoh> [MOSS]: 先答<eoa> [Human]: 再问<eoh> [MOSS]: 再答<eoa>",
        },
        [SYSTEM, *TALK],
    ),
    "BELLE, multiturn": (
        {"instruction": "Human:先问\nAssistant:先答\nHuman:再问\nAssistant:", "input": "", "output": "再答"},
        TALK,
    ),
    "BELLE 3.5M": (
        {"id": "1", "conversations": [{"from": "human", "value": "先问"}, {"from": "assistant", "value": "先答"}]},
        TALK[:2],
    ),
    "Firefly": ({"kind": "NLI", "input": "问", "target": "答"}, [user("问"), assistant("答")]),
    "Firefly, multiturn": (
        {
            "conversation_id": 1,
            "category": "Brainstorming",
            "conversation": [{"human": "先问", "assistant": "先答"}, {"human": "再问", "assistant": "再答"}],
        },
        TALK,
    ),
    "COIG-CQIA": (
        {
            "instruction": "问",
            "input": "",
            "output": "答",
            "task_type": {"major": ["问答"], "minor": ["知乎"]},
            "domain": ["通用"],
            "answer_from": "human",
            "human_verified": True,
        },
        [user("问"), assistant("答")],
    ),
    "Infinity-Instruct": (
        {
            "id": 1,
            "conversations": SHARED,
            "label": {"ability_en": ["writing"], "cate_ability_zh": ["写作"]},
            "langdetect": "zh-cn",
            "reward": 2.5,
        },
        TALK[:2],
    ),
    "tulu 3": ({"id": "1", "messages": TALK, "source": "x"}, TALK),
    "UltraChat": ({"id": "0", "data": ["先问", "先答", "再问", "再答"]}, TALK),
    "UltraChat 200k": ({"prompt": "先问", "prompt_id": "x", "messages": TALK}, TALK),
    "LIMA": ({"conversations": ["先问", "先答", "再问", "再答"], "source": "x"}, TALK),
    "HuatuoGPT": ({"data": ["问：先问", "答：先答"]}, TALK[:2]),
    "Dolly": (
        {"instruction": "问", "context": "文", "response": "答", "category": "closed_qa"},
        [user("问\n文"), assistant("答")],
    ),
    "Zhihu-KOL": (
        {"INSTRUCTION": "问", "RESPONSE": "答", "SOURCE": "Zhihu", "METADATA": "{}"},
        [user("问"), assistant("答")],
    ),
    "medical-o1": (
        {"Question": "问", "Complex_CoT": "想", "Response": "答"},
        [user("问"), assistant("答") | {"reasoning_content": "想"}],
    ),
    "R1 distilled, 110k": (
        {"input": "问", "reasoning_content": "想", "content": "答", "repo_name": "x", "score": 10},
        [user("问"), assistant("答") | {"reasoning_content": "想"}],
    ),
    "R1 distilled, messages": (
        {"messages": [user("问"), assistant("<think>\n想\n</think>\n\n答") | {"info": {"source": "x"}}]},
        [user("问"), assistant("<think>\n想\n</think>\n\n答")],
    ),
    "R1 distilled, alpaca": (
        {"instruction": "问", "input": "", "output": "<think>\n想\n</think>\n\n答", "score": 9},
        [user("问"), assistant("<think>\n想\n</think>\n\n答")],
    ),
    "xlam": (
        {"id": 1, "query": "北京天气", "answers": CALLED, "tools": json.dumps([WEATHER["function"]])},
        [user("北京天气"), assistant("") | {"tool_calls": [CALL]}],
    ),
    "glaive, as LLaMA-Factory has it": (
        {
            "conversations": [
                {"from": "human", "value": "北京天气"},
                {"from": "function_call", "value": CALLED[1:-1]},
                {"from": "observation", "value": '{"sky": "晴"}'},
                {"from": "gpt", "value": "晴"},
            ],
            "tools": json.dumps([WEATHER["function"]]),
        },
        [
            user("北京天气"),
            assistant("") | {"tool_calls": [CALL]},
            {"role": "tool", "content": '{"sky": "晴"}'},
            assistant("晴"),
        ],
    ),
    "ToolACE": (
        {
            "system": "简短。",
            "conversations": [
                {"from": "user", "value": "北京天气"},
                {"from": "assistant", "value": '[Get Weather(city="北京")]'},
                {"from": "tool", "value": '[{"name": "Get Weather", "results": "晴"}]'},
                {"from": "assistant", "value": "晴"},
            ],
        },
        [
            SYSTEM,
            user("北京天气"),
            assistant('[Get Weather(city="北京")]'),
            {"role": "tool", "content": '[{"name": "Get Weather", "results": "晴"}]'},
            assistant("晴"),
        ],
    ),
    "alpaca with history": (
        {"instruction": "再问", "input": "", "output": "再答", "system": "简短。", "history": [["先问", "先答"]]},
        [SYSTEM, *TALK],
    ),
    "AdvertiseGen": ({"content": "类型#裤", "summary": "答"}, [user("类型#裤"), assistant("答")]),
    "a sheet of a shop": ({"问题": "问", "答案": "答", "类目": "x"}, [user("问"), assistant("答")]),
}
PAIRS = {
    "UltraFeedback, binarized": {
        "prompt": "先问",
        "prompt_id": "x",
        "chosen": TALK[:2],
        "rejected": [user("先问"), assistant("不知道")],
        "messages": TALK[:2],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "hh-rlhf": {"chosen": "\n\nHuman: 先问\n\nAssistant: 先答", "rejected": "\n\nHuman: 先问\n\nAssistant: 不知道"},
    "hh_rlhf_cn": {
        "context": [{"role": "human", "text": "先问"}],
        "chosen": {"role": "gpt", "text": "先答"},
        "rejected": {"role": "gpt", "text": "不知道"},
    },
    "DPO-En-Zh-20k": {
        "conversations": SHARED[:1],
        "chosen": {"from": "gpt", "value": "先答"},
        "rejected": {"from": "gpt", "value": "不知道"},
    },
    "CValues": {"prompt": "先问", "pos_resp": "先答", "neg_resp": "不知道", "pos_type": "拒绝", "neg_type": "风险"},
    "orca_dpo_pairs": {"system": "", "question": "先问", "chosen": "先答", "rejected": "不知道"},
    "distilabel": {"system": "", "input": "先问", "chosen": "先答", "rejected": "不知道", "generations": ["a", "b"]},
    "ms-swift": {"messages": TALK[:2], "rejected_messages": [user("先问"), assistant("不知道")]},
    "ms-swift, one answer": {"messages": TALK[:2], "rejected_response": "不知道"},
    "stack-exchange": {"question": "先问", "response_j": "先答", "response_k": "不知道"},
}
REFUSED = {
    "COIG translated": (
        {"instruction": "a", "input": "", "output": "b", "trans_instruction": "问", "trans_output": "答"},
        "instruction and trans_instruction, its translation",
    ),
    "Wizard-LM in Chinese": (
        {"instruction": "a", "instruction_zh": "问", "output": "b", "output_zh": "答"},
        "instruction and instruction_zh, its translation",
    ),
    "MOSS with plugins": (
        {"chat": {"turn_1": MOSS_TURN | {"Commands": '<|Commands|>: Search("x")<eoc>\n'}}},
        "Commands of MOSS's plugins is not read",
    ),
    "MOSS with text between": ({"plain_text": "[Human]: 问<eoh> x [MOSS]: 答<eoa>"}, "text outside of"),
    "MOSS without marks": ({"plain_text": "问答"}, "text outside of"),
    "OpenAssistant": (
        {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "答", "lang": "zh"},
        "messages of a tree",
    ),
    "Guanaco": ({"text": "### Human: 问### Assistant: 答"}, "with the marks of a chat template"),
    "a text in a template": (
        {"text": "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>"},
        "with the marks of a chat template",
    ),
    "glaive": (
        {"system": "SYSTEM: x", "chat": "USER: 问\n\n\nASSISTANT: 答 <|endoftext|>"},
        "with the marks of a chat template",
    ),
    "PKU-SafeRLHF": (
        {"prompt": "问", "response_0": "答", "response_1": "否", "better_response_id": 0, "safer_response_id": 1},
        "prompt beside response_0, response_1",
    ),
    "Nectar": ({"prompt": "问", "answers": [{"answer": "答", "rank": 1}]}, "prompt beside answers"),
    "UltraFeedback": (
        {"instruction": "问", "models": ["a"], "completions": [{"response": "答", "overall_score": 8}]},
        "output is missing",
    ),
    "HC3": ({"question": "问", "human_answers": ["答"], "chatgpt_answers": ["否"]}, "question without an answer"),
    "an old pair of LLaMA-Factory": (
        {"instruction": "问", "input": "", "output": ["答", "否"]},
        "output is a list of texts",
    ),
}


def read(row: dict, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(row))
    return read_file(tmp_path / "a.jsonl", {}, ())


@pytest.mark.parametrize("name", SFT)
def test_a_row_of_a_public_set_becomes_these_turns(name, tmp_path):
    row, turns = SFT[name]
    (found,), problems, _ = read(row, tmp_path)
    assert problems == [] and found.kind == "sft" and found.row["prompt"] + found.row["completion"] == turns


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_a_public_set_becomes_prompt_chosen_rejected(name, tmp_path):
    (found,), problems, _ = read(PAIRS[name], tmp_path)
    assert problems == [] and found.kind == "pref"
    expected = ([user("先问")], [assistant("先答")], [assistant("不知道")])
    assert tuple(found.row[key] for key in ("prompt", "chosen", "rejected")) == expected


@pytest.mark.parametrize("label", [True, False])
def test_kto_mix_becomes_labelled_rows(label, tmp_path):
    rows, problems, _ = read({"prompt": TALK[:1], "completion": TALK[1:2], "label": label}, tmp_path)
    assert problems == [] and [row.kind for row in rows] == (["kto", "sft"] if label else ["kto"])
    assert rows[0].row["label"] is label and rows[0].row["completion"] == TALK[1:2]


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_is_not_read_is_refused_by_name(name, tmp_path):
    row, message = REFUSED[name]
    rows, (problem,), _ = read(row, tmp_path)
    assert rows == [] and message in problem.reason and problem.line == 1 and problem.fix


def test_prompts_keep_what_a_reward_reads(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": "问", "answer": "答", "reference_output": "答案"}))
    rows, (problem,), _ = read_file(tmp_path / "a.jsonl", {}, ())
    assert rows == [] and "--keep reference_output" in problem.fix
    (found,), problems, _ = read_file(tmp_path / "a.jsonl", {}, ("answer", "reference_output"))
    assert problems == [] and found.kind == "prompts" and found.row["meta"]["reference_output"] == "答案"
