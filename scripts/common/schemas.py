"""The formats of rows (docs/DATA.md): what a row of each must hold, as a list of what is wrong with it."""

import re
from typing import Any

from common.conversations import turn_text
from common.preflight.finding import Finding, fault

ROLES = ("system", "user", "assistant", "tool")
TURN_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "weight")
KINDS = {dict: "object", list: "list", str: "string", int: "whole number", float: "number", bool: "true/false"}
# a call that stands in an answer as text: its reply may follow as a turn of its own
CALL_IN_TEXT = re.compile(r"<\|?/?(?:tool|function)_?calls?|^Action:|\A\s*[\[{].*[\]}]\s*\Z", re.S | re.M)
BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")  # nothing that can be seen
# what a conversation of a row ends with, by schema
ENDS = {"sft": ("completion",), "kto": ("completion",), "preference": ("chosen", "rejected")}
ENDS |= dict.fromkeys(("prompts", "generation"), ("prompt",))
CONVERT = "convert the file with scripts/17_prepare_chat.py"


def validate_row(row: dict, schema: str) -> list[Finding]:
    """What is wrong with a row; empty when nothing is. The schemas are those of SCHEMAS."""
    return SCHEMAS[schema](row) or _tool_faults(row, ENDS.get(schema, ()))


def kind_of(value: Any) -> str:
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


def _sft(row: dict) -> list[Finding]:
    return _prompt(row) + _answer(row, "completion") + _meta(row)


def _preference(row: dict) -> list[Finding]:
    found = _prompt(row) + _answer(row, "chosen") + _answer(row, "rejected") + _meta(row)
    for key in ("chosen", "rejected"):
        if not found and len(row[key]) > 1:  # the loss of a pair is on every token of its answers
            fix = "move the turns that both share into prompt, leave out pairs that part before the last answer"
            role = row[key][1]["role"]
            found.append(fault(f"{key}[1] is a {role} turn: it would be trained as if the model had said it", fix))
    if not found:
        chosen, rejected = ([turn_text(turn).strip() for turn in row[key]] for key in ("chosen", "rejected"))
        if chosen == rejected:
            found.append(fault("chosen and rejected are equal", "leave the pair out: it teaches nothing"))
    return found


def _kto(row: dict) -> list[Finding]:
    """One answer with a verdict: what trl calls unpaired preference."""
    found = _prompt(row) + _answer(row, "completion") + _typed(row, {"label": bool}) + _meta(row)
    if not found and len(row["completion"]) > 1:
        found.append(
            fault("completion has several turns: the label is of one answer", "move all but the last to prompt")
        )
    return found


def _prompts(row: dict) -> list[Finding]:
    return _prompt(row) + _typed(row, {"meta": dict})


def _style(row: dict) -> list[Finding]:
    texts = {"input": str, "label": str, "label_english": str}
    found = _typed(row, texts) + _meta(row, "metadata")
    empty = [key for key in texts if isinstance(row.get(key), str) and not row[key].strip()]
    return found + [fault(f"{key} is empty", "fill it in, or leave the row out") for key in empty]


def _text(row: dict) -> list[Finding]:
    """A document: what stage 20 continues pretraining on."""
    found = _typed(row, {"text": str})
    return found or ([] if not BLANK.fullmatch(row["text"]) else [fault("text is empty", "leave the row out")])


def _generation(row: dict) -> list[Finding]:
    # An empty completion is allowed here: it is what the model said.
    types = {"id": str, "prompt_id": str, "sample": int, "seed": int, "completion": str, "model": str}
    found = _prompt(row) + _typed(row, types | {"finish_reason": str, "tokens": int, "meta": dict})
    if "reference" not in row or not isinstance(row["reference"], str | None):
        found.append(fault("reference must be a string or null", "write the golden text, or null where there is none"))
    for key in ("sample", "tokens"):
        if type(row.get(key)) is int and row[key] < 0:
            found.append(fault(f"{key} is {row[key]}", "count from 0"))
    if not found and row["id"] != (wanted := f"{row['prompt_id']}#{row['sample']}"):
        found.append(fault(f"id {row['id']!r} is not prompt_id#sample", f"write {wanted}"))
    return found


SCHEMAS = {
    "sft": _sft,
    "preference": _preference,
    "kto": _kto,
    "prompts": _prompts,
    "style": _style,
    "text": _text,
    "generation": _generation,
}


def _prompt(row: dict) -> list[Finding]:
    found = _messages(row, "prompt") + _tools(row)
    if not found and (role := row["prompt"][-1]["role"]) not in ("user", "tool"):
        found.append(fault(f"the last turn of prompt is {role}, not user", "move the answer out of the prompt"))
    return found


def _answer(row: dict, key: str) -> list[Finding]:
    found = _messages(row, key)
    if not found and row[key][-1]["role"] != "assistant":
        found.append(fault(f"the last turn of {key} is not assistant", "end it with the answer"))
    elif not found and row[key][-1].get("weight", 1) == 0:
        what = f"the last answer of {key} has weight 0: nothing is trained by it"
        found.append(fault(what, "end the row with an answer that is to be trained"))
    return found


def _tool_faults(row: dict, ends: tuple[str, ...]) -> list[Finding]:
    """Each call of a tool against the row's tools, each reply of a tool against the calls before it."""
    turns = (turn for key in {"prompt", *ends} & row.keys() for turn in row[key])
    if not ends or all(len(turn) == 2 and turn["role"] != "tool" for turn in turns):
        return []
    names = {tool.get("function", tool)["name"] for tool in row.get("tools") or ()}
    found = []
    for key in ends:
        is_bad = key == "rejected" or row.get("label") is False  # a wrong call may be what makes it so
        waiting: list | None = []  # calls without a reply; None where an answer holds its calls as text
        for name in dict.fromkeys(("prompt", key)):
            for place, turn in ((f"{name}[{i}]", turn) for i, turn in enumerate(row[name])):
                if turn["role"] != "tool":
                    calls = turn.get("tool_calls") or []
                    waiting = list(calls) if calls or not CALL_IN_TEXT.search(turn["content"]) else None
                    unknown = [call["function"]["name"] for call in calls if call["function"]["name"] not in names]
                    if unknown and names and turn.get("weight", 1) != 0 and not (is_bad and name == key):
                        what = f"{place} calls {unknown[0]}, which is not among the tools of the row"
                        found.append(fault(what, f"add it to tools, or call one of {', '.join(sorted(names))}"))
                    continue
                told = {part: turn[part] for part in ("tool_call_id", "name") if turn.get(part) is not None}
                if waiting is None and not told:
                    continue
                fitting = [call for call in waiting or () if _fits(call, told)]
                if fitting:
                    waiting.remove(fitting[0])
                else:
                    of = "".join(f" with the {part} {value!r}" for part, value in told.items())
                    what = f"{place} is a tool's reply{of}, and no such call waits for one"
                    found.append(fault(what, "let it follow the answer whose tool_calls it replies to"))
    return list(dict.fromkeys(found))


def _fits(call: dict, told: dict) -> bool:
    name = call["function"]["name"]
    return told.get("name", name) == name and told.get("tool_call_id", call.get("id")) == call.get("id")


def _tools(row: dict) -> list[Finding]:
    """Functions that can be called, as templates read them."""
    tools = row.get("tools")
    if tools is None:
        return []
    fix = 'write [{"type": "function", "function": {"name": "...", "parameters": {...}}}]'
    if not isinstance(tools, list):
        return [fault(f"tools is a {kind_of(tools)}, not a list", fix)]
    functions = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in tools]
    bad = (i for i, function in enumerate(functions) if not isinstance(function, dict) or not _named(function))
    found = [fault(f"tools[{i}] has no name", fix) for i in bad]
    names = [] if found else [function["name"] for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    return [fault(f"tools holds {twice} twice", "keep one of them")] if twice else found


def _named(function: dict) -> bool:
    return isinstance(name := function.get("name"), str) and bool(name.strip())


def _messages(row: dict, key: str) -> list[Finding]:
    """A list of turns: known roles, text in each, and roles in an order that a chat template accepts."""
    if key not in row:
        other = "messages" in row or "instruction" in row
        return [
            fault(
                f"the key {key!r} is missing", CONVERT if other else f'add "{key}": [{{"role": ..., "content": ...}}]'
            )
        ]
    turns = row[key]
    if not isinstance(turns, list):
        return [fault(f"{key} is a {kind_of(turns)}, not a list of turns", f"write a list of turns, or {CONVERT}")]
    if not turns:
        return [fault(f"{key} has no turns", "fill it in, or leave the row out")]
    found = [finding for i, turn in enumerate(turns) for finding in _turn(turn, f"{key}[{i}]")]
    if found:
        return found

    expected, before = "user" if key == "prompt" else "assistant", ""
    for i, turn in enumerate(turns):
        if i == 0 and key == "prompt" and turn["role"] == "system":
            continue
        if turn["role"] == "tool" and before in ("assistant", "tool"):  # what came back from a call
            expected, before = "assistant", "tool"
            continue
        if turn["role"] != expected:
            fix = "let user and assistant take turns" + (", system only first" if key == "prompt" else "")
            return [fault(f"{key}[{i}] is {turn['role']} where {expected} is due", fix)]
        expected, before = "assistant" if expected == "user" else "user", turn["role"]
    return []


def _turn(turn: Any, place: str) -> list[Finding]:
    if not isinstance(turn, dict):
        return [fault(f"{place} is a {kind_of(turn)}, not an object", 'write {"role": ..., "content": ...}')]
    found, role, content = [], turn.get("role"), turn.get("content")
    if role not in ROLES:
        what = "has no role" if role is None else f"has the unknown role {role!r}"
        found.append(fault(f"{place} {what}", f"use one of {', '.join(ROLES)}"))
    if "content" not in turn:
        found.append(fault(f"{place} has no content", 'add "content": "..."'))
    elif not isinstance(content, str):
        found.append(fault(f"{place}.content is a {kind_of(content)}, not a string", "write plain text"))
    elif BLANK.fullmatch(content) and not (turn.get("tool_calls") or role == "tool"):
        what = "the answer is empty" if role == "assistant" else "the text is empty"
        found.append(fault(f"{place}: {what}", "fill it in, or leave the row out"))
    return found or (_more(turn, place) if len(turn) > 2 else [])


def _more(turn: dict, place: str) -> list[Finding]:
    """Keys beside role and content: those that a template reads, in the form in which it reads them."""
    if unknown := [key for key in turn if key not in TURN_KEYS and turn[key] is not None]:
        what = f"{place} holds {', '.join(map(str, unknown))}, which no stage reads"
        return [fault(what, f"take it out, or {CONVERT}")]
    found, reasoning, calls = [], turn.get("reasoning_content"), turn.get("tool_calls")
    weight = turn.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        found.append(fault(f"{place}.weight is {weight!r}", "write 0 (not trained) or 1: there are no other weights"))
    if reasoning is not None and not isinstance(reasoning, str):
        found.append(fault(f"{place}.reasoning_content is a {kind_of(reasoning)}, not a string", "write plain text"))
    for key, value in (("reasoning_content", reasoning), ("tool_calls", calls)):
        if value and turn["role"] != "assistant":
            found.append(fault(f"{place} is {turn['role']} and holds {key}", "only an answer has such a key"))
    if reasoning and "</think>" in turn["content"]:
        found.append(fault(f"{place} holds reasoning_content and </think> in its content", "keep one of them"))
    fix = 'write [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
    if calls is not None and not isinstance(calls, list):
        found.append(fault(f"{place}.tool_calls is a {kind_of(calls)}, not a list", fix))
    for number, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not _named(function) or not isinstance(function.get("arguments"), dict):
            found.append(fault(f"{place}.tool_calls[{number}] is no call with a name and an object of arguments", fix))
    return found


def _typed(row: dict, types: dict[str, type]) -> list[Finding]:
    found = []
    for key, kind in types.items():
        if key not in row:
            found.append(fault(f"the key {key!r} is missing", f"add it ({KINDS[kind]})"))
        elif type(row[key]) is not kind:  # not isinstance: true is no number
            found.append(fault(f"{key} is a {kind_of(row[key])}, not a {KINDS[kind]}", f"write a {KINDS[kind]}"))
    return found


def _meta(row: dict, key: str = "meta") -> list[Finding]:
    return _typed(row, {key: dict}) if key in row else []
