"""Sequence classifiers and scalar reward models: one to be trained, one with its trained head, the logits of texts, and
the loss."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.batching import length_batches
from common.conversations import readable, render, without_thought
from common.jsonl import read_json
from common.model_files import check_adapter, check_model, read_header
from common.models import (
    attach_adapter,
    check_vocabulary,
    how_to_load,
    load_strictly,
    load_tokenizer,
    pick_device,
    resolve_dtype,
)
from common.settings import UserError, show_path

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast


def load_classifier(
    path: str, dtype: str = "auto", num_labels: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a folder that stage 30 or 31 wrote; the model in eval mode on the device at hand.

    path: folder or hub id of a sequence-classification model with its head. num_labels: what the caller can use, 1 for
    a scalar
        reward model; None takes any.

    Raises UserError for an adapter folder (its head would be a fresh one), for a model without a head, and for another
    number of labels.
    """
    from transformers import AutoModelForSequenceClassification

    check_model(path, "classifier")
    model = load_strictly(AutoModelForSequenceClassification, path, resolve_dtype(dtype), heads="trained")
    if num_labels is not None and model.config.num_labels != num_labels:
        raise UserError(
            f"{show_path(path)} has {model.config.num_labels} labels where {num_labels} is needed; fix: name another "
            "model"
        )
    tokenizer = load_tokenizer(path)
    check_vocabulary(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id  # the head reads the last token that is no padding
    return model.to(pick_device()).eval(), tokenizer


def load_styles(path: str, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """load_classifier for a model that tells styles apart. Raises UserError for a reward model: its one score, as the
    share of one label, would always be 1."""
    model, tokenizer = load_classifier(path, dtype)
    if model.config.num_labels < 2:
        raise UserError(f"{show_path(path)} is a reward model, it knows no styles; fix: a classifier of stage 31")
    return model, tokenizer


ASKED_STYLE = re.compile(r"^请用“[^”\n]*”的风格回答：")
SPEAKERS = {"system": "系统", "user": "用户问题", "assistant": "回答"}


def plain_question(prompt: str) -> str:
    """The question without the words that ask for a style (stage 12's --name-style): who judges is not told which is
    wanted."""
    return ASKED_STYLE.sub("", prompt)


def classifier_text(prompt: str | list[dict], answer: str) -> str:
    """The text that a style classifier is trained on and asked about: a question, or all turns of a conversation, and
    the answer."""
    lines = []
    for turn in prompt if isinstance(prompt, list) else [{"content": prompt}]:
        role = turn.get("role", "user")
        content = plain_question(turn["content"]) if role == "user" else readable(turn)
        lines.append(f"{SPEAKERS.get(role, role)}：{content}")
    return "\n".join([*lines, f"回答：{without_thought(answer)}"])


def new_classifier(
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    quantize: str = "none",
    attn_implementation: str = "auto",
    **labels,
) -> PreTrainedModel:
    """`base` with a head of its own, drawn at random: what stages 30 and 31 train. labels: num_labels, or id2label and
    label2id.

    A reward model that stage 30 trains further keeps its head.
    """
    from transformers import AutoModelForSequenceClassification

    words = how_to_load(dtype, quantize, attn_implementation) | labels
    model = load_strictly(AutoModelForSequenceClassification, base, dtype, heads="new", **words)
    check_vocabulary(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def open_classifier(
    base: str, adapter: str, tokenizer: PreTrainedTokenizerBase, dtype: str, force_base: bool = False
) -> PeftModel:
    """A classifier's adapter on its base, as many labels as its own head has, named as label_mapping.json in or above
    its folder says."""
    from transformers import AutoModelForSequenceClassification

    check_model(base, "reward base")
    check_adapter(adapter, base, "classifier", force_base)
    header = read_header(Path(adapter) / "adapter_model.safetensors")
    heads = [shape for key, (_, shape) in header.items() if key.endswith("score.weight")]
    if not heads:
        raise UserError(f"{show_path(adapter)}: no trained head in the adapter; fix: train it with task_type SEQ_CLS")
    count, labels = heads[0][0], {"num_labels": heads[0][0]}
    for folder in (Path(adapter).parent, Path(adapter)):
        if (folder / "label_mapping.json").exists():
            mapping = read_json(folder / "label_mapping.json")
            labels = {"id2label": {int(key): name for key, name in mapping["id_to_label"].items()}}
            labels["label2id"] = mapping["label_to_id"]
    if len(labels.get("id2label", range(count))) != count:
        raise UserError(
            f"{show_path(adapter)}: {count} labels, but {len(labels['id2label'])} in label_mapping.json; fix: correct "
            "it"
        )
    model = load_strictly(AutoModelForSequenceClassification, base, resolve_dtype(dtype), heads="adapter", **labels)
    check_vocabulary(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    return attach_adapter(model, adapter).to(pick_device()).eval()


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict],
    completion: str | dict,
    enable_thinking: bool = False,
    tools: list | None = None,
) -> str:
    """The text that a scalar reward model is trained on and scores: prompt and answer through the chat template.

    completion: a text, or the turn as it stands in a row.
    """
    answer = {"role": "assistant", "content": completion} if isinstance(completion, str) else completion
    return render(tokenizer, [*prompt, answer], enable_thinking, tools)


def logits_of(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int = 512,
    token_budget: int = 8192,
    finite: bool = True,
) -> torch.Tensor:
    """float32 tensor [texts, labels] on the CPU, in the order of `texts`.

    max_length: tokens; a longer text loses its beginning, because the head reads the last token. token_budget: padded
    tokens a batch. The figures do not depend on the batches nor on tokenizer.padding_side, up to rounding.

    Raises UserError naming the text where a logit is not finite: no label and no score follows from it. With
    finite=False the caller looks for itself: of many requests scored together only some may be so.
    """
    import torch

    encoded = [ids[-max_length:] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    logits = torch.empty((len(texts), model.config.num_labels))
    with torch.inference_mode():
        for indices in length_batches([max(1, len(ids)) for ids in encoded], token_budget, seed=0):
            batch = tokenizer.pad({"input_ids": [encoded[i] for i in indices]}, return_tensors="pt").to(model.device)
            logits[indices] = model(**batch).logits.float().cpu()
    for number in (~logits.isfinite().all(-1)).nonzero().flatten().tolist() if finite else ():
        raise UserError(
            f"{show_path(model.name_or_path)} gives {logits[number].tolist()} for {texts[number][:60]!r}; "
            "fix: train it again, or --dtype float32"
        )
    return logits


def label_index(model: PreTrainedModel, label: str) -> int:
    """Index of a class by its name, as config.id2label has it. Raises UserError naming the classes."""
    names = {str(name): int(index) for index, name in model.config.id2label.items()}
    if label not in names:
        raise UserError(f"no class {label!r}; fix: one of {json.dumps(list(names), ensure_ascii=False)}")
    return names[label]


def make_loss(
    weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    teacher_share: float = 0.5,
    temperature: float = 2.0,
) -> Callable:
    """loss(outputs, labels) for transformers' Trainer(compute_loss_func=...).

    labels: float [rows, 1], the class; or [rows, 1 + classes], the class and the teacher's logits behind it. With a
    teacher the loss is (1 - teacher_share) * cross-entropy + teacher_share * temperature ** 2 * KL(teacher || student),
    both softened by the temperature (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2). weights: of the
    classes in the cross-entropy, a tensor or None.
    """
    import torch.nn.functional as F

    def loss(
        outputs: SequenceClassifierOutputWithPast,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):  # the last is for accumulated steps: a classifier's stage has none
        logits = outputs.logits.float()
        weight = None if weights is None else weights.to(logits.device)
        hard = F.cross_entropy(logits, labels[:, 0].long(), weight=weight, label_smoothing=label_smoothing)
        if labels.shape[1] == 1:
            return hard
        student = F.log_softmax(logits / temperature, -1)
        teacher = F.log_softmax(labels[:, 1:].float() / temperature, -1)
        kl = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        return (1 - teacher_share) * hard + teacher_share * temperature**2 * kl

    return loss
