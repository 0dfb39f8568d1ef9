"""How rows reach trl's SFT trainer: four ways to say which tokens are trained (docs/TRAINING.md compares them).

On single-turn rows and a template that ends a turn with eos and a line end, such as ChatML, all of them train the same
tokens: the last answer and its eos. They differ in who renders the row, and on conversations of several turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from common.conversations import answer_rows, is_trained, render, thinks, without_thought, written_answer
from common.generation import render_prompt
from common.models import chat_dataset
from common.settings import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# prompt: trl renders the file's messages, loss on the completion; text: two strings, trl appends eos; template: one
# rendered text, labels made here; messages: whole conversations, loss on every answer; answers: each answer of a
# conversation as a row of its own, rendered as it is when a model writes it
RowStyle = Literal["prompt", "text", "template", "messages", "answers"]
HISTORY = "the chat template writes an earlier answer in another way than the last one (Qwen3 takes its thinking out)"


def row_dataset(
    rows: list[dict], style: RowStyle, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool
) -> Dataset | None:
    """SFT rows ({"prompt", "completion"}, lists of messages) as the datasets.Dataset that SFTTrainer gets. Documents
    ({"text"}) become token ids, which are trained whole, whatever the style. None where there are no rows.

    A completion of several messages: `prompt`, `messages` and `answers` train each of its answers, `text` and
    `template` only the last. A turn of weight 0 is never trained.
    """
    from datasets import Dataset

    if not rows:
        return None
    if "text" in rows[0]:
        return Dataset.from_dict({"input_ids": list(document_ids([row["text"] for row in rows], tokenizer))})
    if style == "answers":
        rows, style = [part for row in rows for part in answer_rows(row)], "template"
    if style == "messages" or (style == "prompt" and any(len(row["completion"]) > 1 for row in rows)):
        labelled = []
        for number, row in enumerate(rows, start=1):
            try:
                labelled.append(label_answers(row, style, tokenizer, enable_thinking))
            except UserError as error:
                raise UserError(f"training row {number}: {error}") from None
        return Dataset.from_list(labelled)
    if style == "prompt":
        return chat_dataset(rows, ("prompt", "completion"), enable_thinking)
    conversations = [(row["prompt"] + row["completion"], enable_thinking, row.get("tools")) for row in rows]
    if style == "text":
        # trl tokenizes strings with special tokens: a bos that template and tokenizer both write would stand twice
        bos = tokenizer.bos_token if tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else ""
        prompts = [render_prompt(tokenizer, turns[:-1], *view).removeprefix(bos) for turns, *view in conversations]
        answers = [written_answer(tokenizer, *conversation) for conversation in conversations]
        return Dataset.from_dict({"prompt": prompts, "completion": answers})
    return Dataset.from_list([label_answer(turns, tokenizer, *view) for turns, *view in conversations])


def count_trained(rows: list[dict], style: RowStyle, dataset: Dataset) -> dict[str, int]:
    """Answers and tokens that are trained, and those that are not; `dataset` as the trainer holds it, with labels."""
    answers = sum(turn["role"] == "assistant" for row in rows for turn in row["prompt"] + row["completion"])
    parts = [
        row["completion"][-1:]
        if style in ("text", "template")
        else row["completion"]
        if style == "prompt"
        else row["prompt"] + row["completion"]
        for row in rows
    ]
    trained = sum(is_trained(turn) for part in parts for turn in part)
    tokens = [(sum(label != -100 for label in labels), len(labels)) for labels in dataset["labels"]]
    some, every = (sum(column) for column in zip(*tokens, strict=True))
    return {
        "trained_answers": trained,
        "other_answers": answers - trained,
        "trained_tokens": some,
        "other_tokens": every - some,
    }


def trained_sentence(counts: dict[str, int]) -> str:
    return (
        f"trained: {counts['trained_answers']} answers, {counts['trained_tokens']} tokens; "
        f"not trained: {counts['other_answers']} answers, {counts['other_tokens']} tokens"
    )


def label_answers(row: dict, style: str, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool) -> dict:
    """One conversation: {"input_ids", "labels"}, labels -100 but on the answers that are trained, each with its eos.

    style: messages trains all answers, prompt those of the completion. The answers are found by the marks of the
    template, or of trl's marked copy of it; without marks by rendering the conversation up to each answer, which has to
    be how the whole begins. Raises UserError where it is not.
    """
    turns, places = row["prompt"] + row["completion"], []
    for place, turn in enumerate(turns):
        if is_trained(turn) and (style == "messages" or place >= len(row["prompt"])):
            places.append(place)
    view = enable_thinking, row.get("tools")
    fix = "fix: --row-style answers (each answer as a row of its own), or --row-style prompt"
    text = render(tokenizer, turns, *view)
    for place in places[:-1]:
        if thinks(turns[place]):
            silent = {key: value for key, value in turns[place].items() if key != "reasoning_content"}
            silent["content"] = without_thought(silent["content"])
            if render(tokenizer, [*turns[:place], silent, *turns[place + 1 :]], *view) == text:
                raise UserError(f"{HISTORY}; {fix}")
    marked = marked_template(tokenizer)
    if marked:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        whole = render(tokenizer, turns, *view, chat_template=marked, **options)
        ids, spans = whole["input_ids"], _runs(whole["assistant_masks"])
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(spans) != len(answers):
            raise UserError(f"the template marks {len(spans)} answers of {len(answers)}; {fix}")
        spans = [spans[answers.index(place)] for place in places]
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], []
        for place in places:
            asked = render(tokenizer, turns[:place], *view, add_generation_prompt=True)
            answered = render(tokenizer, turns[: place + 1], *view)
            end = answered.rfind(tokenizer.eos_token) + len(tokenizer.eos_token)
            if not (text.startswith(asked) and text.startswith(answered[:end]) and end > len(asked)):
                raise UserError(f"{HISTORY}; {fix}")
            inside = [len(asked) <= first and last <= end for first, last in encoded["offset_mapping"]]
            spans += _runs(inside)
    labels = [-100] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


def _runs(mask: list) -> list[tuple[int, int]]:
    """(start, end) of the stretches that are true."""
    edges = [i for i, (a, b) in enumerate(zip([False, *mask], [*mask, False], strict=True)) if bool(a) != bool(b)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def marked_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template that marks the answers: the tokenizer's own, or trl's copy of it; None where there is none."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def document_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator:
    """The token ids of each document as it is trained, an array [tokens]: what the tokenizer puts in front of a text
    (a bos, where it has one), the text, eos."""
    import numpy as np

    eos = tokenizer.eos_token_id
    for start in range(0, len(texts), 1000):
        for ids in tokenizer(texts[start : start + 1000], verbose=False)["input_ids"]:
            yield np.array(ids if ids[-1:] == [eos] else [*ids, eos], dtype=np.int32)


def label_answer(
    turns: list[dict], tokenizer: PreTrainedTokenizerBase, enable_thinking: bool, tools: list | None = None
) -> dict:
    """One conversation rendered to text: {"input_ids", "labels"}, labels -100 but on the last answer and its eos.

    The answer begins where the text parts from that of the prompt with its generation prompt, so a template that writes
    something else into an answer than into a prompt, such as Qwen3's empty thinking block, has that trained too.
    """
    text = render(tokenizer, turns, enable_thinking, tools)
    prompt = render_prompt(tokenizer, turns[:-1], enable_thinking, tools)
    pairs = zip(prompt, text, strict=False)
    start = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(text)))
    end = text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if start <= first and last <= end else -100
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}
