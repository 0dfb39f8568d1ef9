"""How rows reach trl's SFT trainer: four ways to say which tokens are trained (docs/SFT.md compares them).

On single-turn rows and a template that ends a turn with eos and a line end, such as ChatML, all of them train the same
tokens: the last answer and its eos. They differ in who renders the row, and on conversations of several turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from common.generation import render_prompt
from common.models import chat_dataset

# prompt: trl renders the file's messages, loss on the completion; text: two strings, trl appends eos; template: one
# rendered text, labels made here; messages: whole conversations, loss on every answer
RowStyle = Literal["prompt", "text", "template", "messages"]


def row_dataset(rows: list[dict], style: RowStyle, tokenizer, enable_thinking: bool):
    """SFT rows ({"prompt", "completion"}, lists of messages) as the datasets.Dataset that SFTTrainer gets. Documents
    ({"text"}) become token ids, which are trained whole, whatever the style. None where there are no rows.

    A completion of several messages: `messages` trains each of its answers, `prompt` the same where the template has
    marks, `text` and `template` only the last.
    """
    from datasets import Dataset

    if not rows:
        return None
    if "text" in rows[0]:
        return Dataset.from_dict({"input_ids": list(document_ids([row["text"] for row in rows], tokenizer))})
    if style == "prompt":
        return chat_dataset(rows, ("prompt", "completion"), enable_thinking)
    if style == "messages":
        rows = [{"messages": row["prompt"] + row["completion"]} for row in rows]
        return chat_dataset(rows, ("messages",), enable_thinking)
    conversations = [row["prompt"] + row["completion"] for row in rows]
    if style == "text":
        # trl tokenizes strings with special tokens: a bos that template and tokenizer both write would stand twice
        bos = tokenizer.bos_token if tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else ""
        prompts = [render_prompt(tokenizer, turns[:-1], enable_thinking).removeprefix(bos) for turns in conversations]
        answers = [turns[-1]["content"] for turns in conversations]
        return Dataset.from_dict({"prompt": prompts, "completion": answers})
    return Dataset.from_list([label_answer(turns, tokenizer, enable_thinking) for turns in conversations])


def document_ids(texts: list[str], tokenizer) -> Iterator:
    """The token ids of each document as it is trained, an array [tokens]: what the tokenizer puts in front of a text
    (a bos, where it has one), the text, eos."""
    import numpy as np

    eos = tokenizer.eos_token_id
    for start in range(0, len(texts), 1000):
        for ids in tokenizer(texts[start : start + 1000], verbose=False)["input_ids"]:
            yield np.array(ids if ids[-1:] == [eos] else [*ids, eos], dtype=np.int32)


def label_answer(turns: list[dict], tokenizer, enable_thinking: bool) -> dict:
    """One conversation rendered to text: {"input_ids", "labels"}, labels -100 but on the last answer and its eos.

    The answer begins where the text parts from that of the prompt with its generation prompt, so a template that writes
    something else into an answer than into a prompt, such as Qwen3's empty thinking block, has that trained too.
    """
    text = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=enable_thinking)
    prompt = render_prompt(tokenizer, turns[:-1], enable_thinking)
    pairs = zip(prompt, text, strict=False)
    start = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(text)))
    end = text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if start <= first and last <= end else -100
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}
