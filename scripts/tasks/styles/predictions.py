"""A classifier's answers as stages 61 and 62 give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.training.classifiers import logits_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def count_cut(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> int:
    """How many texts have more tokens than max_length, and so lose their beginning."""
    return sum(len(ids) > max_length for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def predict_styles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int = 512,
    token_budget: int = 8192,
    finite: bool = True,
) -> list[dict]:
    """{"predicted_label", "confidence", "probabilities": {label: probability}} of each text, labels in the order of
    their ids."""
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    results = []
    for row in logits_of(model, tokenizer, texts, max_length, token_budget, finite).softmax(-1).tolist():
        best = max(range(len(row)), key=row.__getitem__)
        probabilities = dict(zip(names, row, strict=True))
        results.append({"predicted_label": names[best], "confidence": row[best], "probabilities": probabilities})
    return results
