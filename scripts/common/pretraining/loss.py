"""Batches of whole texts, and their cross-entropy: the vocabulary is far wider than the model, so it is taken in
slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def head_loss(
    hidden: torch.Tensor, head: torch.nn.Parameter, targets: torch.Tensor, dtype: torch.dtype, tokens: int = 512
) -> tuple[float, torch.Tensor]:
    """Mean loss in nats per token, and its gradient with respect to `hidden`; that of `head` is added to head.grad.

    hidden [n, width], head [vocabulary, width], targets [n]. The gradient of the logits is softmax - one-hot: written
    down, so that a slice of logits is read and written twice, and in `dtype`; the softmax itself is computed in
    float32.
    """
    weight, count = head.to(dtype), len(targets)
    gradient = torch.empty_like(hidden)
    if head.grad is None:
        head.grad = torch.zeros_like(head)
    total = torch.zeros((), device=hidden.device)
    for part, target, result in zip(
        hidden.to(dtype).split(tokens), targets.split(tokens), gradient.split(tokens), strict=True
    ):
        delta = (part @ weight.T).softmax(-1)
        target = target[:, None]
        total -= delta.gather(1, target).float().clamp_min(1e-38).log().sum()
        # a gradient of p - 1 would be rounded away where p is near 1: it is minus the sum of the others
        delta.scatter_(1, target, 0.0)
        delta.scatter_(1, target, -delta.sum(-1, keepdim=True, dtype=torch.float32).to(dtype))
        result.copy_(delta @ weight / count)
        head.grad += (delta.T @ part).float() / count
    return total.item() / count, gradient


def pad_batch(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [rows, longest], labels [rows, longest]: labels are the next token, -100 past the end."""
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    past = torch.arange(1, longest) >= torch.tensor([len(row) for row in rows])[:, None]
    return padded[:, :-1], padded[:, 1:].masked_fill(past, -100)


def loss_and_backward(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> float:
    """Mean cross-entropy in nats per token; gradients are added to the parameters."""
    keep = labels != -100
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[keep]  # [tokens, width]
    # a slice of logits should stay in a CPU's cache, and fill a GPU
    slices = 512 if ids.device.type == "cpu" else 8192
    loss, gradient = head_loss(hidden.detach(), model.lm_head.weight, labels[keep], dtype, slices)
    hidden.backward(gradient)
    return loss
