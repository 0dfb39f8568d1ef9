"""What a turn holds beside its content: reasoning, calls of tools, whether it is trained; and what a template makes of
it.

    {"role": "assistant", "reasoning_content": "...", "content": "...", "tool_calls": [...], "weight": 0}
    {"role": "tool", "content": "..."}          a row may hold "tools": [...], the functions that can be called

These are the keys that trl and the chat templates of models read. weight 0 is this project's: the turn is not trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENS, CLOSES = "<think>", "</think>"


def is_trained(turn: dict) -> bool:
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


def holds_more(row: dict, *keys: str) -> bool:
    """Does the row hold tools, or a turn under one of the keys reasoning, calls of tools, or a tool's reply?"""
    return bool(row.get("tools")) or any(_holds_more(turn) for key in keys for turn in row.get(key, ()))


def _holds_more(turn: dict) -> bool:
    return turn["role"] == "tool" or any(turn.get(key) for key in ("reasoning_content", "tool_calls")) or thinks(turn)


def thinks(turn: dict) -> bool:
    return turn["role"] == "assistant" and bool(turn.get("reasoning_content") or CLOSES in turn["content"])


def turn_text(turn: dict) -> str:
    """All that a turn says, as one text to compare."""
    if len(turn) == 2:
        return turn["content"]
    calls = turn.get("tool_calls")
    more = (json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else "", turn.get("reasoning_content") or "")
    return "\n".join(part for part in (turn["content"], *more) if part)


def without_thought(text: str) -> str:
    """An answer as it is judged: without its thinking block; empty where it never came out of it."""
    if CLOSES in text:
        return text.rpartition(CLOSES)[2].lstrip("\n")
    return text.partition(OPENS)[0] if text.lstrip().startswith(OPENS) else text


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict],
    enable_thinking: bool = False,
    tools: list | None = None,
    **options,
) -> str:
    options = {"tokenize": False, "enable_thinking": enable_thinking, "tools": tools or None} | options
    return tokenizer.apply_chat_template(turns, **options)


def written_answer(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict], enable_thinking: bool = False, tools: list | None = None
) -> str:
    """The last turn as a model writes it behind the rendered prompt, without its eos: reasoning and calls of tools as
    the template has them. A turn of plain content is its content, whatever the template adds to it."""
    answer = turns[-1]
    if not _holds_more(answer):
        return answer["content"]
    prompt = render(tokenizer, turns[:-1], enable_thinking, tools, add_generation_prompt=True)
    text = render(tokenizer, turns, enable_thinking, tools)
    if not text.startswith(prompt):  # the preflight refuses such a row
        return answer["content"]
    return text[len(prompt) :].rpartition(tokenizer.eos_token)[0] or answer["content"]


def lost_parts(text: str, turns: list[dict], tools: list | None = None) -> list[tuple[str, str]]:
    """(what, the part of it) that should stand in the rendered text and does not: reasoning, calls of tools, replies of
    tools, and the tools themselves. Reasoning of the last answer only: templates may take it out of earlier ones."""
    parts = [*_parts(turns, tools)]
    contents = (without_thought(turn["content"]) for turn in turns if turn["role"] != "tool")
    said = "\0".join([*(part for _, part in parts), *contents])
    return [(what, part) for what, part in parts if _count(text, part) < said.count(part)]


def _count(text: str, part: str) -> int:
    """How often it stands there, as it is or as JSON writes it."""
    return sum(map(text.count, {part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1]}))


def _parts(turns: list[dict], tools: list | None) -> Iterator[tuple[str, str]]:
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "tool":
            yield "a tool's reply", turn["content"].strip()
        for call in turn.get("tool_calls") or ():
            yield "tool_calls", call["function"]["name"]
            yield from (("tool_calls", text) for text in _texts(call["function"]["arguments"]))
        if number == len(turns) and thinks(turn):
            yield "reasoning_content", thought_of(turn)
    for tool in tools or ():
        yield "tools", tool.get("function", tool)["name"]


def thought_of(turn: dict) -> str:
    """The reasoning of an answer, wherever it stands."""
    if turn.get("reasoning_content"):
        return turn["reasoning_content"].strip()
    content = turn["content"]
    if CLOSES not in content:  # still in it, or never began
        return content.lstrip().removeprefix(OPENS).strip() if content.lstrip().startswith(OPENS) else ""
    return content.rpartition(CLOSES)[0].rpartition(OPENS)[2].strip()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str) and value.strip():
        yield value


def answer_rows(row: dict) -> Iterator[dict]:
    """The row once for each answer that is to be trained, which then stands last: as it is when the model writes it."""
    turns = row["prompt"] + row["completion"]
    for place, turn in enumerate(turns):
        if place and is_trained(turn):
            yield row | {"prompt": turns[:place], "completion": turns[place : place + 1]}


def readable(turn: dict) -> str:
    """A turn as a reader sees it: its content, and its calls of tools as text."""
    calls = [call["function"] for call in turn.get("tool_calls") or ()]
    said = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    content = without_thought(turn["content"]) if turn.get("role") == "assistant" else turn["content"]
    return "\n".join([content, *said] if content or not said else said)
