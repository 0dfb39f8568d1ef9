"""How likely a frozen model finds a text: NLL per character, comparable between tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.batching import length_batches
from common.conversations import written_answer
from common.generation import render_prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def nll_per_character(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    token_budget: int = 8192,
    enable_thinking: bool = False,
) -> list[float | None]:
    """Nats per character of each row's completion given its prompt, in the order of `rows`.

    rows: {"prompt": messages, "completion": string, or messages that end in an assistant turn}. The prompt goes through
        the chat template with a generation prompt; the end of the turn is not counted.
    token_budget: padded tokens a batch, rows x longest row.

    None for an empty completion, and for a row longer than the model's context. The model stays in the mode it was in.
    """
    texts, prompts, answers = [], [], []  # characters; token ids before and of the completion
    for row in rows:
        turns, text = row["prompt"], row["completion"]
        view = enable_thinking, row.get("tools")
        if not isinstance(text, str):
            turns, text = turns + text[:-1], written_answer(tokenizer, turns + text, *view)
        prompt = render_prompt(tokenizer, turns, *view)
        texts.append(text)
        prompts.append(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        answers.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    losses = nll_of_ids(model, prompts, answers, token_budget)
    return [loss if loss is None else loss / len(text) for loss, text in zip(losses, texts, strict=True)]


def nll_of_ids(
    model: PreTrainedModel | PeftModel, prompts: list[list[int]], answers: list[list[int]], token_budget: int = 8192
) -> list[float | None]:
    """Nats of each answer's ids behind its prompt's; None for an empty answer, and beyond the model's context."""
    import torch

    from common.fused_head import output_head, token_figures

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    # FSDP puts weights together for a call of the whole model, not for one of its parts
    is_shared_out = any(hasattr(weight, "full_tensor") for weight in model.parameters())
    context = getattr(model.config, "max_position_embeddings", None) or float("inf")
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    kept = [i for i, length in enumerate(lengths) if answers[i] and length <= context]
    values: list[float | None] = [None] * len(answers)
    was_training = model.training
    model.eval()
    try:
        for batch in length_batches([lengths[i] for i in kept], token_budget, seed=0):
            indices = [kept[i] for i in batch]
            longest = max(lengths[i] for i in indices)
            # Padding stands on the right, where a causal model cannot see it.
            ids = torch.zeros((len(indices), longest), dtype=torch.long)  # [rows, longest]
            mask = torch.zeros_like(ids)
            labels = torch.full_like(ids, -100)  # [rows, longest], the token that position t predicts
            for row, i in enumerate(indices):
                ids[row, : lengths[i]] = torch.tensor(prompts[i] + answers[i])
                mask[row, : lengths[i]] = 1
                labels[row, len(prompts[i]) - 1 : lengths[i] - 1] = torch.tensor(answers[i])
            ids, mask, labels = (tensor.to(model.device) for tensor in (ids, mask, labels))
            with torch.no_grad():
                words = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
                wanted = labels != -100
                if is_shared_out:
                    logits = model(**words).logits[wanted].float()
                    losses = torch.nn.functional.cross_entropy(logits, labels[wanted], reduction="none")
                else:
                    states = whole.base_model(**words).last_hidden_state[wanted]
                    # parts keep the logits of a small vocabulary small: those of a large one are never there at once
                    parts = zip(states.split(1024), labels[wanted].split(1024), strict=True)
                    losses = torch.cat([-token_figures(output_head(whole), *part).logprobs for part in parts])
            for i, loss in zip(indices, losses.split(wanted.sum(1).tolist()), strict=True):
                values[i] = loss.sum().item()
    finally:
        model.train(was_training)
    return values


def mean_nll(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    enable_thinking: bool = False,
    max_length: int = 512,
) -> float | None:
    """Mean over rows of nll_per_character; rows without a value are left out, None where none has one. Of documents
    document_nll."""
    if rows and "text" in rows[0]:
        return document_nll(model, tokenizer, [row["text"] for row in rows], max_length)
    values = [v for v in nll_per_character(model, tokenizer, rows, enable_thinking=enable_thinking) if v is not None]
    return sum(values) / len(values) if values else None


def document_nll(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> float:
    """Nats per character over all characters of some documents."""
    return sum(document_nlls(model, tokenizer, texts, max_length)) / sum(map(len, texts))


def document_nlls(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> list[float]:
    """Nats of each document, read in pieces of max_length tokens. Every token is counted once, given those before it
    in its piece; the first of a document is given the token that begins or ends documents."""
    prompts, answers, owners = [], [], []
    before = [tokenizer.eos_token_id, *tokenizer("")["input_ids"]][-1]  # a bos, where the tokenizer writes one
    for owner, ids in enumerate(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]):
        for start in range(0, len(ids), max_length - 1):
            prompts.append([ids[start - 1] if start else before])
            answers.append(ids[start : start + max_length - 1])
            owners.append(owner)
    losses = [0.0] * len(texts)
    for owner, loss in zip(owners, nll_of_ids(model, prompts, answers), strict=True):
        losses[owner] += loss or 0.0
    return losses
