"""What stage 23 compares: tokens of training and generation, and greedy answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 12  # tokens shown on both sides of a difference


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: dict, thinking: bool) -> list[int]:
    from common.generation import render_prompt

    text = render_prompt(tokenizer, row["prompt"], thinking, row.get("tools"))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chain(one: dict, two: dict) -> dict:
    """A conversation of two turns, with the tools of both."""
    second = [message for message in two["prompt"] if message["role"] != "system"]
    tools = [*one.get("tools", ()), *(tool for tool in two.get("tools", ()) if tool not in one.get("tools", ()))]
    return {**two, "prompt": one["prompt"] + one["completion"] + second} | ({"tools": tools} if tools else {})


def difference(tokenizer: PreTrainedTokenizerBase, one: list[int], other: list[int]) -> dict:
    """Where two token lists first differ, and what stands there."""
    from common.preflight.checks import common_prefix

    place = common_prefix(one, other)
    cut = slice(max(0, place - SHOWN), place + SHOWN)
    return {"place": place, "first": tokenizer.decode(one[cut]), "second": tokenizer.decode(other[cut])}


def begins_with_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], answer: str) -> bool:
    """Nothing but a thinking block, then the answer as it is tokenized alone, then the token that ends a turn?"""
    wanted = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    places = (i for i in range(len(ids) - len(wanted) + 1) if ids[i : i + len(wanted)] == wanted)
    return any(re.fullmatch(r"(<think>.*</think>\s*)?", tokenizer.decode(ids[:i]), re.DOTALL) for i in places)


def greedy(model: PreTrainedModel | PeftModel, ids: list[int], max_new_tokens: int) -> list[int]:
    """The best continuation of one prompt, alone in its batch; ends with a stop token or at the limit."""
    import torch

    model.eval()
    given = torch.tensor([ids], device=model.device)
    plain = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "repetition_penalty": 1.0}
    plain |= {"attention_mask": torch.ones_like(given), "max_new_tokens": max_new_tokens}
    with torch.inference_mode():
        output = model.generate(input_ids=given, **plain)
    return output[0, len(ids) :].tolist()


def question(name: str, row: dict, thinking: bool = False) -> dict:
    """A row's prompt as a chat endpoint is asked."""
    tools = {"tools": row["tools"], "tool_choice": "none"} if row.get("tools") else {}
    return {"model": name, "messages": row["prompt"], "chat_template_kwargs": {"enable_thinking": thinking}} | tools


def served_answer(url: str, name: str, row: dict, max_new_tokens: int) -> list[int]:
    """The chat endpoint's greedy answer as tokens."""
    from common.vllm_engine import post

    body = question(name, row) | {"max_tokens": max_new_tokens, "return_token_ids": True}
    body |= {"temperature": 0, "repetition_penalty": 1.0}
    return post(url, "v1/chat/completions", body)["choices"][0]["token_ids"]


def best_gap(model: PreTrainedModel | PeftModel, ids: list[int]) -> float:
    """Difference of the two best logits behind ids."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1).logits[0, -1].float()
    return -logits.topk(2).values.diff().item()
