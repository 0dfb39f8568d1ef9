"""Rows as other projects write them, under the names that rows.py knows: renamed and rearranged, no text changed.

A dialect is found by the columns of a row. MAPPINGS says for every format what becomes what; the stage prints it.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from common.preflight.finding import Refused

MAPPINGS = {
    "alpaca": "system, history, instruction + input -> prompt; output -> completion",
    "prompt/completion": "system, history, prompt -> prompt; completion -> completion",
    "messages": "messages: all but the last turn -> prompt, the last -> completion",
    "sharegpt": "conversations (from, value): all but the last turn -> prompt, the last -> completion",
    "pairs": "the question -> prompt; chosen -> chosen; rejected -> rejected",
    "pairs (implicit prompt)": "turns that chosen and rejected share -> prompt; the rest of each -> chosen, rejected",
    "prompt": "system, history, prompt -> prompt",
    "firefly": "conversation[].human -> user turns; conversation[].assistant -> assistant turns",
    "xtuner": "conversation[].system, .input, .output -> system, user and assistant turns",
    "conversation": "conversation: all but the last turn -> prompt, the last -> completion",
    "ms-swift": "system, history, query -> prompt; response -> completion",
    "ms-swift pairs": "system, history, query or messages -> prompt; response -> chosen; rejected_response -> rejected",
    "ms-swift pairs of conversations": "what both share -> prompt; messages -> chosen; rejected_messages -> rejected",
    "OpenAI preference": "input.messages -> prompt; preferred_output -> chosen; non_preferred_output -> rejected",
    "message list": "the list of turns: all but the last -> prompt, the last -> completion",
    "ultrachat": "data or a list of texts: user, assistant, ...; all but the last -> prompt, the last -> completion",
    "transcript": "Human: and Assistant: in the prompt -> turns of prompt; the answer -> completion",
    "transcript pairs": "Human: and Assistant: -> turns; what both share -> prompt; the last -> chosen, rejected",
    "MOSS": "meta_instruction or prefix -> system; [Human] and [MOSS] -> turns; the last -> completion",
    "COIG": "textbox_q_instruction + _q_context + _question -> prompt; textbox_answer + _answer_analysis -> completion",
    **{f"{key}/summary": f"{key} -> prompt; summary -> completion" for key in ("content", "text", "article")},
    "calls": "query, tools -> prompt, tools; answers -> the tool_calls of the completion",
} | {
    f"{asked}{more}/{answered}": f"{asked}{more} -> prompt; {answered} -> completion"
    for asked in ("question", "query", "instruction", "prompt", "input")
    for more in ("", " + context")
    for answered in ("answer", "response", "output", "target", "content")
}
CHINESE = {
    **dict.fromkeys(("问题", "問題", "提问", "提問", "问", "問"), "question"),
    **dict.fromkeys(("回答", "答案", "答"), "answer"),
    **{"指令": "instruction", "输入": "input", "輸入": "input", "输出": "output", "輸出": "output"},
    **{"系统": "system", "系統": "system", "历史": "history", "歷史": "history"},
    "Complex_CoT": "reasoning_content",
}
TEXTS = ("instruction", "input", "output", "prompt", "completion", "question", "query", "answer", "response")
ENGLISH = (*TEXTS, "system", "history", "messages", "conversations", "chosen", "rejected", "text", "tools", "label")
TRANSLATED = {  # a row and its translation: the column -> the one that it translates
    pattern.format(name): name for name in TEXTS for pattern in ("trans_{}", "{}_zh", "{}_cn", "{}_en", "zh_{}")
}
SIDES = {"pos_resp": "neg_resp", "accepted": "rejected", "preferred": "dispreferred", "response_j": "response_k"}
TEXTBOX = ("q_instruction", "q_context", "question", "answer", "answer_analysis")  # behind "textbox_"
MOSS_PART = re.compile(r"\s*(?:<\|([\w ]+)\|>|\[(\w+)\]): ?(.*?)\s*<eo[hatcrm]>", re.S)
MOSS_ROLES = {"Human": "user", "MOSS": "assistant"}
TEMPLATED = re.compile(
    r"<\|(?:im_start|start_header_id)\|>|\[INST\]|<start_of_turn>|^(?:### ?)?(?:Human|User|USER|Instruction|用户)[:：]",
    re.M,
)
LIKE_ANSWERS = re.compile("resp|repl(?:y|ies)|answers|output|completion|chosen|reject|回答|答案")
BARE = "message list"  # the column under which the reader puts a line that is a list of turns
QUESTIONS, ANSWERS = ("question", "query", "instruction", "prompt"), ("answer", "response")
KNOWN = ("messages", "conversations", "completion")  # with one of these a row is no dialect
TURN_COLUMNS = {"firefly": ("human", "assistant"), "xtuner": ("input", "output")}
TURN_MORE = {"firefly": (), "xtuner": ("system", "output_with_loss")}
HISTORY = (
    ("user", "assistant"),
    ("human", "assistant"),
    ("query", "response"),
    ("question", "answer"),
    ("input", "output"),
)

MEDIA = ("images", "image", "videos", "video", "audios", "audio")
PLACEHOLDER = re.compile(
    r"<image>|<\|(?:image|audio|video|vision)\w*\|>|^\s*<(?:audio|video)>\s*$|<(audio|video)>(?!.*</\1>)", re.M
)
PARTS = ("image_url", "image", "video", "video_url", "audio", "input_audio", "audio_url")
TEXT_PARTS = (None, "text", "input_text", "output_text")


def expand(row: dict) -> list[dict]:
    """A row of nested instances as several rows, any other as it is. Raises Refused."""
    if row.get("instances") is None:
        return [row]
    instances = row["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(part, dict) for part in instances):
        raise Refused("instances is not a list of objects", 'write [{"input": "...", "output": "..."}]')
    shared = {key: value for key, value in row.items() if key != "instances"}
    return [shared | part | {"instances": None} for part in instances]


def _moss(row: dict) -> dict:
    """MOSS's own marks: plain_text of a whole conversation, or chat with the parts of each turn."""
    text = row.get("plain_text")
    if text is None:
        parts = [turn for turn in row["chat"].values() if turn is not None]
        if not all(isinstance(part, dict) for part in parts):
            raise Refused("chat is not an object of turns", 'write {"turn_1": {"Human": "...", "MOSS": "..."}}')
        text = "".join(str(said) for part in parts for said in part.values())
    found = list(MOSS_PART.finditer(_text(text, "plain_text")))
    if MOSS_PART.sub("", text).strip() or not found:
        raise Refused("a conversation with text outside of [Human]: ...<eoh> and [MOSS]: ...<eom>", "write messages")
    turns = []
    for match in found:
        name, said = match[1] or match[2], match[3].strip()
        if name in MOSS_ROLES:
            turns.append({"role": MOSS_ROLES[name], "content": said})
        elif said != "None":
            fix = "write messages with tool_calls, or leave the row out (--skip-bad does)"
            raise Refused(f"{name} of MOSS's plugins is not read", fix)
    system = next((row[key] for key in ("meta_instruction", "prefix") if row.get(key)), None)
    row = {key: value for key, value in row.items() if key not in ("plain_text", "chat", "meta_instruction", "prefix")}
    return row | {"messages": turns} | ({"system": system} if system and not row.get("system") else {})


def normalise(row: dict) -> tuple[str | None, dict]:
    """(name of the dialect, the row under the names of rows.py), or (None, the row as it is). Raises Refused."""
    row = _aliased(row)
    given = {key for key, value in row.items() if value is not None}
    if BARE in given:
        row, name = _renamed(row, {BARE: "messages"}), "ultrachat" if _is_spoken(row[BARE]) else BARE
        return name, row | {"messages": _by_turns(row["messages"], "the list")} if name == "ultrachat" else row
    if {"parent_id", "role"} <= row.keys() or (isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]):
        fix = "write each path from the first question to an answer as a row of its own, with messages"
        raise Refused("messages of a tree, not a conversation", fix)
    if found := _transcripts(row, given):
        return found
    if "plain_text" in given or isinstance(row.get("chat"), dict):
        return "MOSS", _moss(row)
    if {"textbox_question", "textbox_answer"} <= given:
        keys = [f"textbox_{name}" for name in TEXTBOX]
        texts = [_text(row.get(key) or "", key) for key in keys]
        asked, answered = ("\n".join(filter(None, part)) for part in (texts[:3], texts[3:]))
        rest = {key: value for key, value in row.items() if key not in keys}
        return "COIG", rest | {"prompt": asked, "completion": answered}
    if {"query", "answers", "tools"} <= given and given.isdisjoint(KNOWN):
        call = {"role": "assistant", "content": "", "tool_calls": row["answers"]}
        asked = {"role": "user", "content": row["query"]}
        return "calls", _renamed(row, {"query": "messages"}) | {"messages": [asked, call], "answers": None}
    if other := next((key for key in row if TRANSLATED.get(key) in given), None):
        name = TRANSLATED[other]
        fix = f"--rename {name}=original {other}={name} for each of them, or --rename {other}=translation"
        raise Refused(f"{name} and {other}, its translation: which of them is meant?", fix)
    for good, bad in SIDES.items():
        if {good, bad} <= given and "chosen" not in given:
            row, given = _renamed(row, {good: "chosen", bad: "rejected"}), given | {"chosen", "rejected"}
    spoken = next((key for key in (*KNOWN[:2], "conversation") if key in given and _is_spoken(row[key])), None)
    if "data" in given and given.isdisjoint((*KNOWN, *QUESTIONS, "output", "chosen", "rejected", "conversation")):
        spoken = "data"
    if spoken:
        return "ultrachat", _renamed(row, {spoken: "messages"}) | {"messages": _by_turns(row[spoken], spoken)}
    if "conversation" in given and given.isdisjoint(KNOWN):
        return _conversation(row)
    if "preferred_output" in given:
        return "OpenAI preference", _openai_pair(row)
    if "rejected_messages" in given and given.isdisjoint(("chosen", "rejected")):
        names = {"messages": "chosen", "rejected_messages": "rejected"}
        return "ms-swift pairs of conversations", _renamed(row, names)
    if "rejected_response" in given and given.isdisjoint(("chosen", "rejected")):
        return "ms-swift pairs", _rejected_response(row)
    if "response" in given and "query" in given and given.isdisjoint(KNOWN):
        return "ms-swift", _renamed(row, {"query": "prompt", "response": "completion"})
    if given.isdisjoint((*KNOWN, "output", "chosen", "rejected")):
        asked = next((key for key in QUESTIONS if key in given), None)
        answered = next((key for key in ANSWERS if key in given), None)
        if asked == "prompt" and answered == "answer":
            return None, row  # a prompt for RL with the answer that a reward reads
        if answered and asked:
            if {"A", "B", "C", "D"} <= given:
                fix = "write the options into the question; --rename A=other leaves them out"
                raise Refused("a question whose options A, B, C, D stand in columns of their own", fix)
            if isinstance(row.get("context"), str) and row["context"] and not row.get("input"):
                names = {asked: "instruction", "context": "input", answered: "output"}
                return f"{asked} + context/{answered}", _renamed(row, names)
            to = "output" if asked == "instruction" else "completion"
            names = {asked: "instruction" if asked == "instruction" else "prompt", answered: to}
            return f"{asked}/{answered}", _renamed(row, names)
        if answered:
            raise Refused(f"{answered} without a question", "add the column question, or --rename OLD=question")
        if asked in ("question", "query") and "prompt" not in given:
            raise Refused(
                f"{asked} without an answer", "add the column answer; prompts for RL stand under the name prompt"
            )
    target = next((key for key in ("target", "content") if key in given), None)
    if target and "input" in given and given.isdisjoint((*KNOWN, *QUESTIONS, "output", "chosen", "rejected")):
        return f"input/{target}", _renamed(row, {"input": "prompt", target: "completion"})
    article = next((key for key in ("content", "text", "article") if key in given), None)
    if article and "summary" in given and given.isdisjoint((*KNOWN, *TEXTS, "chosen", "rejected")):
        return f"{article}/summary", _renamed(row, {article: "prompt", "summary": "completion"})
    if "output" in given and "instruction" not in row and given.isdisjoint((*KNOWN, "chosen", "rejected")):
        asked = next((key for key in ("question", "query", "prompt", "input") if key in given), None)
        if asked:
            return f"{asked}/output", _renamed(row, {asked: "prompt", "output": "completion"})
    if "chosen" in given and given.isdisjoint(("prompt", "instruction", "messages", "conversations")):
        asked = next((key for key in ("question", "query", "input", "context") if key in given), None)
        if asked:
            return "pairs", _renamed(row, {asked: "prompt"})
    return None, row


def _aliased(row: dict) -> dict:
    """Columns under the usual name where that is not there: system_prompt as system, Dolly's context as input."""
    names = {"system_prompt": "system"} if row.get("system") is None else {}
    if row.get("context") and not row.get("input") and "instruction" in row and "output" in row:
        names["context"] = "input"
    names = {old: new for old, new in names.items() if isinstance(row.get(old), str)}
    return _renamed(row, names) if names else row


def chinese_names(columns: Iterable[str]) -> dict[str, str]:
    """Chinese names of columns -> the usual ones, where those are not there."""
    names: dict[str, str] = {}
    for column in columns:
        lower = column.lower() if column.lower() in ENGLISH and column.lower() != column else None
        if (usual := CHINESE.get(column, lower)) and usual not in columns and usual not in names.values():
            names[column] = usual
    return names


def _transcripts(row: dict, given: set[str]) -> tuple[str, dict] | None:
    """A row whose prompt, or both sides of a pair, are conversations written as one text; None for any other."""
    if {"chosen", "rejected"} <= given and given.isdisjoint(("prompt", "instruction", "messages", "conversations")):
        sides = {key: _transcript(row[key]) for key in ("chosen", "rejected")}
        return ("transcript pairs", row | sides) if all(sides.values()) else None
    asked = next((key for key in ("prompt", "instruction") if key in given), None)
    turns = _transcript(row.get(asked)) if asked and not {"input", "history"} & {k for k in given if row[k]} else None
    if not turns or turns[-1] != {"role": "assistant", "content": ""}:
        return None
    answered = next((key for key in ("completion", "output", "response") if key in given), None)
    if asked == "instruction" and not answered and "chosen" not in given:
        return None
    names = {asked: "prompt"} | ({answered: "completion"} if answered and "chosen" not in given else {})
    row = {key: value for key, value in row.items() if key not in ("input", "history")}  # both are empty
    return "transcript", _renamed(row, names) | {"prompt": turns[:-1]}


def _transcript(text: Any) -> list[dict] | None:
    """The turns of "Human: ... Assistant: ...", each on lines of its own (HH-RLHF, BELLE); None for any other text."""
    if not isinstance(text, str) or not (start := re.match(r"(\n*)Human:", text)):
        return None
    gap = "\n\n" if start[1] == "\n\n" else "\n"
    _, *parts = re.split(rf"{gap}(Human|Assistant):", gap + text.lstrip("\n"))
    roles = [{"Human": "user", "Assistant": "assistant"}[name] for name in parts[::2]]
    turns = [{"role": role, "content": said.strip()} for role, said in zip(roles, parts[1::2], strict=True)]
    return turns if "assistant" in roles else None


def _is_spoken(texts: Any) -> bool:
    return isinstance(texts, list) and bool(texts) and all(isinstance(text, str) for text in texts)


def _by_turns(texts: Any, key: str) -> list[dict]:
    if not _is_spoken(texts):
        raise Refused(f"{key} is not a list of texts", 'write ["question", "answer", ...], or messages')
    if all(text.startswith(("问：", "答：")[number % 2]) for number, text in enumerate(texts)):
        texts = [text[2:] for text in texts]  # HuatuoGPT's
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def _openai_pair(row: dict) -> dict:
    asked = row.get("input")
    if not isinstance(asked, dict) or not isinstance(asked.get("messages"), list):
        raise Refused("input holds no messages", 'write {"messages": [...]} beside preferred_output')
    names = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
    shared = {"prompt": asked["messages"], "tools": asked.get("tools"), "input": None}
    return _renamed({**row, **shared}, names)


def _renamed(row: dict, names: dict[str, str]) -> dict:
    kept = {key: value for key, value in row.items() if key in names or key not in names.values()}
    return {names.get(key, key): value for key, value in kept.items()}


def _conversation(row: dict) -> tuple[str, dict]:
    turns = row["conversation"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Refused("conversation is not a list of objects", 'write [{"human": "...", "assistant": "..."}]')
    name = next((n for n, keys in TURN_COLUMNS.items() if any(key in turn for turn in turns for key in keys)), None)
    if name is None:
        return "conversation", _renamed(row, {"conversation": "messages"})
    messages, columns = [], TURN_COLUMNS[name]
    for number, turn in enumerate(turns):
        place = f"conversation[{number}]"
        if name == "xtuner" and turn.get("system"):
            if number:
                raise Refused(f"{place}.system: a system text in the middle", "move it to the first turn")
            messages.append({"role": "system", "content": _text(turn["system"], f"{place}.system")})
        if more := [key for key in turn if key not in (*columns, *TURN_MORE[name])]:
            raise Refused(f"{place} holds {', '.join(map(str, more))}, which is not read here", "take the key out")
        for role, key in zip(("user", "assistant"), columns, strict=True):
            if key not in turn:
                raise Refused(f"{place}.{key} is missing", "write both the question and the answer of every turn")
            messages.append({"role": role, "content": _text(turn[key], f"{place}.{key}")})
        if "output_with_loss" in turn:
            messages[-1]["weight"] = turn["output_with_loss"]
    return name, _renamed(row, {"conversation": "messages"}) | {"messages": messages}


def _rejected_response(row: dict) -> dict:
    if isinstance(turns := row.get("messages"), list):
        if not turns:
            raise Refused("messages has no turns", "write the question and the good answer")
        parts = {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": row["rejected_response"]}
    else:
        for key in ("query", "response"):
            if row.get(key) is None:
                raise Refused(f"{key} is missing", "a pair has query, response and rejected_response")
        parts = {"prompt": row["query"], "chosen": row["response"], "rejected": row["rejected_response"]}
    return {k: v for k, v in row.items() if k not in ("query", "response", "messages", "rejected_response")} | parts


def history_of(row: dict) -> list[dict]:
    """Earlier turns: [[question, answer], ...], [{"user": ..., "assistant": ...}, ...], or messages. Raises Refused."""
    history = row.get("history") or []
    fix = 'write [["...", "..."], ...], oldest first'
    turns = []
    for number, turn in enumerate(history if isinstance(history, list) else [history]):
        if isinstance(turn, dict) and ("role" in turn or "from" in turn):
            turns.append(turn)
            continue
        if isinstance(turn, dict):
            turn = next(([turn[a], turn[b]] for a, b in HISTORY if set(turn) == {a, b}), None)
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise Refused(f"history is not a list of [question, answer] (item {number + 1})", fix)
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return turns


def refuse_media(row: dict, parts: dict) -> None:
    """Images, sounds and films: named columns and placeholders. Raises Refused."""
    fix = "leave the row out (--skip-bad does): only text is trained here"
    for key in MEDIA:
        if row.get(key) not in (None, "", [], {}):
            raise Refused(f"the column {key} holds images, audio or video", fix)
    for key in ("prompt", "completion", "chosen", "rejected"):
        for turn in parts.get(key, ()):
            if turn["role"] == "user" and (found := PLACEHOLDER.search(turn["content"])):
                raise Refused(f"{key} holds the placeholder {found[0].strip()} of an image, audio or video", fix)


def text_of_parts(parts: list, place: str) -> str | None:
    """Content given in parts as one text; None where it is no such list. Raises Refused for parts that are no text."""
    texts = []
    for part in parts:
        if isinstance(part, dict) and (
            media := next((key for key in PARTS if part.get("type") == key or key in part), None)
        ):
            fix = "leave the row out (--skip-bad does): only text is trained here"
            raise Refused(f"{place} holds a part of the type {media}, which is no text", fix)
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if isinstance(part, dict) and part.get("type") not in TEXT_PARTS:
            raise Refused(f"{place} holds a part of the type {part['type']}", "write text and reasoning only")
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise Refused(f"{place} is {json.dumps(value, default=str)[:30]}, not a text", "write a text")
    return value
