"""The rows of the embeddings that belong to a chat's turn tokens.

A base that never saw a chat has turn tokens that were never trained: their rows lie where those of all unused tokens
lie, and LoRA on the layers does not move them. Such a model is not able to stop (docs/LOG.md, 2026-11-26). peft's
trainable_token_indices trains these few rows and nothing else of the embeddings; of a head that shares them, the same.

Training moves such a row less than it lies apart from others: it goes on looking untrained. So a model that ends its
answers has been trained on turns, however its rows look.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from common.fused_head import row_layers
from common.generation import render_prompt
from common.likelihood import nll_of_ids
from common.models import render
from common.settings import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIKE = 0.95  # cosine to another row from which on a row looks untrained: words reach .85, unused tokens .96 to 1
ENDS = 0.01  # chance of the turn's end behind an answer, from which on a model has learned it (docs/LOG.md)
EXCHANGES = (("中国的首都是哪里？", "北京。"), ("说一句话。", "今天天气真好。"), ("What is 1 + 1?", "It is 2."))


def turn_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that the chat template writes around turns, without the one that begins every text."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "问题八"}, {"role": "assistant", "content": "答案九"}]
    ids = tokenizer(render(tokenizer, turns), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = dict.fromkeys(number for number in ids if number in special and number != tokenizer.bos_token_id)
    return tokenizer.convert_ids_to_tokens(list(kept))


@torch.no_grad()
def look_untrained(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]
) -> list[str]:
    """Those of `tokens` whose row of the base's embeddings is, but for its length, nearly that of another token."""
    if not tokens:
        return []
    weight = _embeddings(model).weight
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens), device=weight.device)
    rows = torch.nn.functional.normalize(weight[ids].float(), dim=1)
    nearest = torch.full((len(ids),), -1.0, device=weight.device)
    for start in range(0, len(weight), 1 << 14):
        part = torch.nn.functional.normalize(weight[start : start + (1 << 14)].float(), dim=1)
        alike = rows @ part.T
        own = (ids >= start) & (ids < start + len(part))
        alike[own.nonzero()[:, 0], ids[own] - start] = -1.0
        nearest = torch.maximum(nearest, alike.amax(1))
    return [token for token, value in zip(tokens, nearest.tolist(), strict=True) if value > ALIKE]


def ends_answers(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does the model end one of some short answers by itself, with a chance of ENDS or more?"""
    prompts, ends = [], []
    for question, answer in EXCHANGES:
        text = render_prompt(tokenizer, [{"role": "user", "content": question}]) + answer
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        ends.append([tokenizer.eos_token_id])
    return math.exp(-min(nll_of_ids(model, prompts, ends))) > ENDS


def untrained_turns(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]
) -> list[str]:
    """Those of `tokens` that look untrained, of a model that does not end its answers."""
    found = look_untrained(model, tokenizer, tokens)
    return [] if found and ends_answers(model, tokenizer) else found


def _embeddings(model: PreTrainedModel | PeftModel):
    layer = model.get_input_embeddings()
    layer = getattr(layer, "token_adapter", layer)
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def check_tokens(words: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a word of --train-tokens that is no token."""
    if len(words) > 1 and {"auto", "none"} & set(words):
        raise UserError(f"--train-tokens {' '.join(words)}: auto and none stand alone; fix: leave the others out")
    known = tokenizer.get_vocab()
    for word in () if words in (("auto",), ("none",)) else words:
        if word not in known:
            seen = " ".join(turn_tokens(tokenizer)) or "auto"
            raise UserError(f"--train-tokens {word}: no token of this model; fix: auto, none, or such as {seen}")


def train_token_rows(
    lora: LoraConfig | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]
) -> None:
    """Write into `lora` which rows it trains: none, those of `words`, or for auto those of turn tokens that look
    untrained, unless the model ends its answers."""
    if lora is None or words in (("none",), ()):
        return
    if "embed_tokens" in (lora.modules_to_save or []):
        return  # all rows are trained
    if lora.init_lora_weights == "pissa":
        return  # what is saved of it is a difference of two adapters, without rows
    tokens = untrained_turns(model, tokenizer, turn_tokens(tokenizer)) if words == ("auto",) else list(words)
    if tokens:
        print(f"trained beside the layers: the embeddings of {' '.join(tokens)}")
        lora.trainable_token_indices = sorted(tokenizer.convert_tokens_to_ids(tokens))


def why_no_stop(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A notice for a model whose answers do not end: which turn tokens look untrained and are not trained; empty where
    there are none."""
    trained = {number for layer in row_layers(model) for rows in layer.token_indices.values() for number in rows}
    tokens = [token for token in turn_tokens(tokenizer) if tokenizer.convert_tokens_to_ids(token) not in trained]
    if not (tokens := untrained_turns(model, tokenizer, tokens)):
        return ""
    return (
        f"notice: the base was never trained on {' '.join(tokens)}, so answers do not end; "
        "fix: stage 20 with --train-tokens auto"
    )
