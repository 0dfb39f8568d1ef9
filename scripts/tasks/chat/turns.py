"""Turns as other projects write them, in the form of common/conversations.py: roles, texts, reasoning, tools, weights.

Reasoning: reasoning_content, reasoning or thinking; a <think> block in the content stays there. Tools: OpenAI's
tool_calls and function_call, ShareGPT's roles function_call and observation, ms-swift's tool_call and tool_response.
"""

import json

from common.conversations import CLOSES, OPENS
from common.preflight.finding import Refused
from tasks.chat.dialects import text_of_parts

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "ai", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "function-call"), "call"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
THOUGHTS = ("reasoning", "thinking")  # types of parts
MEDIA = ("images", "audio", "audios", "videos")
WEIGHTS = ("weight", "loss", "train", "trainable", "loss_weight")  # 0 or false: the turn is not to be trained
TURN_KEYS = ("role", "content", "from", "value", "text", *REASONING, *CALLS, "tool_call_id", "name", *WEIGHTS)
CALL = 'write {"name": "...", "arguments": {...}}'


def turns_of(value, key: str) -> list[dict]:
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
        content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
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
    if role == "tool":
        more |= {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)}
    return more | _weight(turn, place, role)


def _weight(turn: dict, place: str, role: str) -> dict:
    """{"weight": 0} where the turn is not to be trained, {} where it is. Raises Refused for any other weight."""
    found = {key: str(turn[key]).strip().lower() for key in WEIGHTS if turn.get(key) is not None}
    for key, word in found.items():
        if word not in ("0", "0.0", "false", "1", "1.0", "true"):
            raise Refused(f"{place}.{key} is {turn[key]!r}", "write 0 (not trained) or 1: there are no other weights")
        if role != "assistant" and key in ("train", "loss") and word in ("1", "1.0", "true"):
            raise Refused(
                f"{place}.{key} is {turn[key]!r} on a turn of {role}", "take it out: only answers are trained"
            )
    if len({word in ("0", "0.0", "false") for word in found.values()}) > 1:
        raise Refused(f"{place} holds {' and '.join(found)}, which contradict each other", "keep one of them")
    is_off = any(word in ("0", "0.0", "false") for word in found.values())
    return {"weight": 0} if is_off and role == "assistant" else {}


def _calls(value, place: str) -> list[dict]:
    """Calls of tools: an object or a list, or either as JSON; the arguments too may be JSON. Raises Refused."""
    value, calls = _json(value, place, CALL), []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{place} holds no call of a function by name", CALL)
        arguments = function.get("arguments", function.get("parameters"))
        arguments = _json(arguments, f"{place}: the arguments of {function['name']}", CALL) if arguments else {}
        if not isinstance(arguments, dict):
            raise Refused(f"{place}: the arguments of {function['name']} are no object", CALL)
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _json(value, place: str, fix: str):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Refused(f"{place} is not JSON: {value[:30]!r}", fix) from None
