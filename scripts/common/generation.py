"""Sampling with transformers: batches of prompts of similar length, one fixed plan, so that a resumed run repeats no row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator


def prompt_id(row: dict) -> str:
    """Hash of the source id and the prompt: the same row has the same id in every run."""
    source = row.get("meta", {}).get("id", "")
    text = json.dumps([source, row["prompt"]], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def render_prompt(tokenizer, messages: list[dict], enable_thinking: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
    )


def sample(model, tokenizer, texts: list[str], *, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int,
           batch_tokens: int = 32768, skip=lambda indices: False) -> Iterator[tuple[int, str, str, int]]:  # fmt: skip
    """(index, completion, finish_reason, tokens) for every rendered prompt in `texts`, in the order of the plan.

    Batches hold prompts of similar length within `batch_tokens` (prompt + max_new_tokens); each is seeded by `seed` and its place in
    the plan. `skip(indices)` says that a batch need not be run. temperature 0 is greedy. finish_reason is "stop" (an eos was
    written) or "length"; tokens counts the completion without what follows the eos, the eos included.
    """
    import torch

    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    stops = set(model.generation_config.eos_token_id)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature > 0 else {
        "do_sample": False, "temperature": None, "top_k": None, "top_p": None}  # fmt: skip
    # a model's own defaults, such as Qwen2.5's repetition penalty, would bend every figure drawn from samples
    sampling |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    was_training = model.training
    model.eval()
    start = number = 0
    while start < len(order):
        longest, end = 0, start
        while end < len(order):
            longest = max(longest, len(encoded[order[end]]) + max_new_tokens)
            if end > start and (end - start + 1) * longest > batch_tokens:
                break
            end += 1
        indices, start, number = order[start:end], end, number + 1
        if skip(indices):
            continue
        width = max(len(encoded[index]) for index in indices)
        ids = torch.full((len(indices), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):  # left padding: answers begin in one column
            ids[row, width - len(encoded[index]) :] = torch.tensor(encoded[index])
            mask[row, width - len(encoded[index]) :] = 1
        torch.manual_seed(seed * 1_000_003 + number)
        with torch.inference_mode():
            output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                                    max_new_tokens=max_new_tokens, use_cache=True, **sampling)  # fmt: skip
        for index, tokens in zip(indices, output[:, width:].tolist(), strict=True):
            length = next((place for place, token in enumerate(tokens) if token in stops), None)
            answer = tokens if length is None else tokens[:length]
            text = tokenizer.decode(answer, skip_special_tokens=True)
            yield index, text, "length" if length is None else "stop", len(answer) + (length is not None)
    model.train(was_training)
