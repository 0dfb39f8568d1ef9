"""Attention on a CPU, for rows of the length that these jobs have.

torch's scaled_dot_product_attention is slow backward on a CPU, and before it transformers repeats keys and values for
every head that shares them (grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245), at each token that is
written the whole cache. Plain matrix products over the groups need neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "grouped"
LARGEST = 384 * 384  # new tokens x tokens seen; the scores of longer rows would take much memory
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models add to the scores


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple:
    """Softmax attention as transformers calls it: ([rows, new, heads, width], None).

    query: [rows, heads, new, width]. key, value: [rows, groups, seen, width]. attention_mask: [rows, 1, new, seen],
    added to the scores.
    """
    rows, heads, new, width = query.shape
    groups, seen = key.shape[1:3]
    if new * seen > LARGEST or any(kwargs.get(name) is not None for name in UNKNOWN):
        words = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **words)
    scores = query.reshape(rows, groups, -1, width) @ key.transpose(2, 3)  # [rows, groups, heads a group x new, seen]
    scores = scores.view(rows, heads, new, seen) * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., :seen]
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    mixed = (weights.view(rows, groups, -1, seen) @ value).view(rows, heads, new, -1)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Where transformers has chosen scaled_dot_product_attention; a model that cannot take that stays as it is."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
