"""Turns as other projects write them, in the form of common/conversations.py: roles, texts, reasoning, tools, weights.

Reasoning: reasoning_content, reasoning or thinking; a <think> block in the content stays there. Tools: OpenAI's
tool_calls and function_call, ShareGPT's roles function_call and observation, ms-swift's tool_call and tool_response.
Which turns are trained: weight and its other names; a word of the kind that is not known is refused.
"""

import json
import re
from typing import Any

from common.conversations import CLOSES, OPENS
from common.jsonl import DECODER
from common.preflight.finding import Refused
from tasks.chat.dialects import text_of_parts

ROLES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户", "人类"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "ai", "chatgpt", "助手", "助理", "机器人"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "工具", "观察"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "function-call"), "call"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
THOUGHTS = ("reasoning", "thinking")  # types of parts
MEDIA = ("images", "audio", "audios", "videos")
NUMBERS = ("weight", "loss_weight", "loss_scale")  # 0: the turn is not to be trained; 1 may stand on any turn
WEIGHTS = (*NUMBERS, "loss", "train", "training", "trainable", "loss_mask")  # 0 or false: not to be trained
MASKED = ("masked", "is_masked")  # 1 or true: not to be trained
# other projects' words of this kind: "mask" means one thing here and another there
OF_WEIGHTS = {"mask", "masked", "masking", "unmask", "unmasked", "train", "trained", "training", "trainable", "loss"}
OF_WEIGHTS |= {"weight", "weights", "weighted", "learn", "learned", "ignore", "ignored", "skip", "skipped"}
OF_WEIGHTS |= {"exclude", "excluded"}
ON, OFF = ("1", "1.0", "true"), ("0", "0.0", "false")
OF_REPLIES = ("tool_call_id", "name")
TURN_KEYS = ("role", "content", "from", "value", "text", *REASONING, *CALLS, *OF_REPLIES, *WEIGHTS, *MASKED)
CALL = 'write {"name": "...", "arguments": {...}}'
CALL_KEYS = ("id", "index", "type", "function", "name", "arguments", "parameters")


def turns_of(value: Any, key: str) -> list[dict]:
    """A string as one user turn; a list of {"role", "content"} or {"from", "value"} as messages. Raises Refused."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        what = f"{key} is {json.dumps(value, default=str)[:30]}, not a text or a list of turns"
        raise Refused(what, "write a text, or a list of turns")
    turns = []
    for number, turn in enumerate(value):
        place = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise Refused(f"{place} is not an object", 'write {"role": ..., "content": ...}')
        role = turn.get("role", turn.get("from"))
        content = next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None)
        known = ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None:
            what = "has no role" if role is None else f"has the unknown role {role!r}"
            raise Refused(f"{place} {what}", "use one of system, user, assistant, tool")
        if known == "call":  # ShareGPT and ms-swift: a turn of its own
            calls = _calls(content, place)
            if turns and turns[-1]["role"] == "assistant":  # what was said before it, or another call
                turns[-1]["tool_calls"] = turns[-1].get("tool_calls", []) + calls
                turns[-1] |= _weight(turn, place, "assistant")
            else:
                more = _weight(turn, place, "assistant")
                turns.append({"role": "assistant", "content": "", "tool_calls": calls, **more})
            continue
        if isinstance(content, list):
            thoughts = [part for part in content if isinstance(part, dict) and part.get("type") in THOUGHTS]
            for part in (part for part in content if isinstance(part, dict)):
                if word := next((key for key in part if _is_of_weights(key)), None):
                    raise Refused(f"{place} holds a part with {word}", "a turn is trained whole, or with weight 0 not")
            content = text_of_parts([part for part in content if part not in thoughts], place)
            if thoughts:
                said = (part.get(part["type"], part.get("text")) for part in thoughts)
                turn = {"reasoning": "\n".join(text for text in said if isinstance(text, str))} | turn
        elif isinstance(content, dict) and known == "tool":  # what a function gave back
            content = json.dumps(content, ensure_ascii=False)
        more = _more(turn, place, known)
        if content is None and "tool_calls" in more:
            content = ""
        if not isinstance(content, str):
            raise Refused(f"{place} has no text", "write the text as a string")
        if known == "assistant" and content.lstrip().startswith(OPENS) and CLOSES not in content:
            raise Refused(f"{place} opens {OPENS} and never closes it", f"add {CLOSES} and the answer, or leave it out")
        if "reasoning_content" in more and CLOSES in content:
            raise Refused(f"{place} holds reasoning twice: in a key of its own and in <think>", "keep one of them")
        turns.append({"role": known, "content": content} | more)
    return turns


def unread_keys(turn: dict) -> list[str]:
    """What a turn holds that no stage reads; only of a tool's reply a name is read."""
    role = turn.get("role", turn.get("from"))
    left = () if ROLES.get(str(role).lower()) == "tool" else OF_REPLIES
    return [key for key in turn if turn[key] is not None and (key not in TURN_KEYS or key in left)]


def tools_of(row: dict) -> list[dict]:
    """The functions that can be called, in the column tools or functions: a list, or one as JSON. Raises Refused."""
    key = next((key for key in ("tools", "functions") if row.get(key) not in (None, "", [], "[]")), None)
    if key is None:
        return []
    fix = 'write [{"type": "function", "function": {"name": "...", "parameters": {...}}}]'
    tools = _json(row[key], key, fix)
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused(f"{key} is not a list of functions", fix)
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def reasoning_of(row: dict) -> dict:
    """The reasoning of a row's only answer, where it stands in a column of its own."""
    key = next((key for key in REASONING if isinstance(row.get(key), str) and row[key].strip()), None)
    return {"reasoning_content": row[key]} if key else {}


def _more(turn: dict, place: str, role: str) -> dict:
    """What a turn holds beside role and content, under the names of common/conversations.py. Raises Refused."""
    if lost := [name for name in MEDIA if turn.get(name)]:
        fix = "leave the row out (--skip-bad does): only text is trained here"
        raise Refused(f"{place} holds {', '.join(lost)}, which is no text", fix)
    more = {}
    for key in (key for key in REASONING if turn.get(key)):
        if not isinstance(turn[key], str):
            raise Refused(f"{place}.{key} is not a text", "write the reasoning as a string")
        if role != "assistant":
            raise Refused(f"{place} is {role} and holds {key}", "only an answer has reasoning")
        if "reasoning_content" in more and more["reasoning_content"] != turn[key]:
            raise Refused(f"{place} holds reasoning under two names", "keep one of them")
        more["reasoning_content"] = turn[key]
    if calls := [key for key in CALLS if turn.get(key)]:
        if role != "assistant":
            raise Refused(f"{place} is {role} and holds {calls[0]}", "only an answer calls tools")
        more["tool_calls"] = _calls(turn[calls[0]], f"{place}.{calls[0]}")
    for key in OF_REPLIES if role == "tool" else ():
        if turn.get(key) is not None:
            if not isinstance(turn[key], str):
                raise Refused(f"{place}.{key} is {turn[key]!r}, not a text", "write the call's own, as a text")
            more[key] = turn[key]
    return more | _weight(turn, place, role)


def _is_of_weights(key: str) -> bool:
    return any(word.lower() in OF_WEIGHTS for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", key))


def _weight(turn: dict, place: str, role: str) -> dict:
    """{"weight": 0} where the turn is not to be trained, {} where it is. Raises Refused for any other weight."""
    is_off = {}
    for key, value in turn.items():
        if value is None or key in TURN_KEYS and key not in WEIGHTS + MASKED or not _is_of_weights(key):
            continue
        if key not in WEIGHTS + MASKED:
            fix = '"weight": 0 where an answer is not to be trained, and leave the key out'
            raise Refused(f"{place}.{key} is {value!r}: is that turn trained or not?", fix)
        word = str(value).strip().lower()
        if word not in ON + OFF:
            raise Refused(f"{place}.{key} is {value!r}", "write 0 or 1, false or true: there are no other weights")
        is_off[key] = word in (ON if key in MASKED else OFF)
        if role != "assistant" and not is_off[key] and key not in NUMBERS:
            raise Refused(f"{place}.{key} is {value!r} on a turn of {role}", "take it out: only answers are trained")
    if len(set(is_off.values())) > 1:
        raise Refused(f"{place} holds {' and '.join(is_off)}, which contradict each other", "keep one of them")
    return {"weight": 0} if any(is_off.values()) and role == "assistant" else {}


def refuse_weightless(row: dict) -> None:
    """A row that its own columns call not to be trained, or more or less than others. Raises Refused."""
    for key in (key for key in (*WEIGHTS, *MASKED) if key in row):
        word = str(row[key]).strip().lower()
        if key in ("loss", "train", "training") and not isinstance(row[key], bool):
            continue  # a figure, or the name of a split
        if word in (ON if key in MASKED else OFF):
            fix = f"leave the row out (--skip-bad does); --rename {key}=other leaves the column unread"
            raise Refused(f"{key} is {row[key]!r}: nothing of the row is to be trained", fix)
        if key in NUMBERS and word not in ON and re.fullmatch(r"-?\d*\.?\d+", word):
            fix = f"repeat the row, or leave it out; --rename {key}=other leaves the column unread"
            raise Refused(f"{key} is {row[key]!r}: rows have no weights but 1", fix)
    if isinstance(row.get("mask"), bool):
        raise Refused(f"mask is {row['mask']}: is that row trained or not?", "--rename mask=other leaves it unread")


def _calls(value: Any, place: str) -> list[dict]:
    """Calls of tools: an object or a list, or either as JSON; the arguments too may be JSON. Raises Refused."""
    value, calls = _json(value, place, CALL), []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{place} holds no call of a function by name", CALL)
        if more := [key for key, said in {**call, **function}.items() if key not in CALL_KEYS and said is not None]:
            raise Refused(f"{place}: the call of {function['name']} holds {', '.join(more)}, which is not read", CALL)
        arguments = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), "")
        arguments = _json(arguments, f"{place}: the arguments of {function['name']}", CALL) if arguments != "" else {}
        if not isinstance(arguments, dict):
            raise Refused(f"{place}: the arguments of {function['name']} are no object", CALL)
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _json(value: Any, place: str, fix: str):
    if not isinstance(value, str):
        return value
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError):
        raise Refused(f"{place} is not JSON: {value[:30]!r}", fix) from None
