"""Sequence classifiers and scalar reward models: loading one with its trained head, and the logits of texts."""

from __future__ import annotations

import json
import re
from pathlib import Path

from common.batching import length_batches
from common.models import load_tokenizer, pick_device, resolve_dtype
from common.settings import UserError


def load_classifier(path: str, dtype: str = "auto", num_labels: int | None = None):
    """(model, tokenizer) of a folder that stage 30 or 31 wrote; the model in eval mode on the device at hand.

    path: folder or hub id of a sequence-classification model with its head. num_labels: what the caller can use, 1 for a scalar
        reward model; None takes any.

    Raises UserError for an adapter folder (its head would be a fresh one), for a model without a head, and for another number of labels.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    folder = Path(path)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError(
            f"{path} is an adapter without its base; fix: name the merged model (the folder above adapter/, or stage 22's)"
        )
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a missing head is told below, as an error
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=resolve_dtype(dtype), use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no classifier could be loaded ({str(error).splitlines()[0]})") from None
    finally:
        logging.set_verbosity(level)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(
            f"{path} has no trained head ({missing} would be random); fix: name a folder that stage 30 or 31 wrote"
        )
    if num_labels is not None and model.config.num_labels != num_labels:
        raise UserError(
            f"{path} has {model.config.num_labels} labels where {num_labels} is needed; fix: name another model"
        )
    tokenizer = load_tokenizer(path)
    model.config.pad_token_id = tokenizer.pad_token_id  # the head reads the last token that is no padding
    return model.to(pick_device()).eval(), tokenizer


ASKED_STYLE = re.compile(r"^请用“[^”\n]*”的风格回答：")
SPEAKERS = {"system": "系统", "user": "用户问题", "assistant": "回答"}


def plain_question(prompt: str) -> str:
    """The question without the words that ask for a style (stage 12's --name-style): who judges is not told which is wanted."""
    return ASKED_STYLE.sub("", prompt)


def classifier_text(prompt: str | list[dict], answer: str) -> str:
    """The text that a style classifier is trained on and asked about: a question, or all turns of a conversation, and the answer."""
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    lines = [
        f"{SPEAKERS.get(turn['role'], turn['role'])}：{plain_question(turn['content']) if turn['role'] == 'user' else turn['content']}"
        for turn in turns
    ]
    return "\n".join([*lines, f"回答：{answer}"])


def render_conversation(tokenizer, prompt: list[dict], completion: str, enable_thinking: bool = False) -> str:
    """The text that a scalar reward model is trained on and scores: prompt and answer through the chat template."""
    turns = [*prompt, {"role": "assistant", "content": completion}]
    return tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=enable_thinking)


def logits_of(model, tokenizer, texts: list[str], max_length: int = 512, token_budget: int = 8192):
    """float32 tensor [texts, labels] on the CPU, in the order of `texts`.

    max_length: tokens; a longer text loses its beginning, because the head reads the last token. token_budget: padded tokens a batch.
    The figures do not depend on the batches nor on tokenizer.padding_side, up to rounding.
    """
    import torch

    encoded = [ids[-max_length:] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    logits = torch.empty((len(texts), model.config.num_labels))
    with torch.inference_mode():
        for indices in length_batches([max(1, len(ids)) for ids in encoded], token_budget, seed=0):
            batch = tokenizer.pad({"input_ids": [encoded[i] for i in indices]}, return_tensors="pt").to(model.device)
            logits[indices] = model(**batch).logits.float().cpu()
    return logits


def label_index(model, label: str) -> int:
    """Index of a class by its name, as config.id2label has it. Raises UserError naming the classes."""
    names = {str(name): int(index) for index, name in model.config.id2label.items()}
    if label not in names:
        raise UserError(f"no class {label!r}; fix: one of {json.dumps(list(names), ensure_ascii=False)}")
    return names[label]
