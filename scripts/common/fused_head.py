"""Log-probabilities of wanted tokens without the logits of a whole vocabulary.

A head with 150,000 to 260,000 words makes logits of a gigabyte for a few hundred tokens, and several copies of them.
Here the vocabulary is taken in slices: each slice of the head is read once, its logits are used and forgotten. In the
same pass goes the gradient: that of a token's log-probability is scale * (W[token] - sum over v of p(v) W[v]), whatever
the loss makes of it afterwards, so it is written down at once, [tokens, width], and backward only scales it. The
running maximum and sums are those of the online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867); a loss fused
with the head is Liger's idea (arXiv 2410.10989).
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LARGE_VOCABULARY = 32_000  # words, from which on the slices are worth it
LOGITS_HELD = 1 << 24  # of each model, where distributions are compared: 64 tokens of a vocabulary of 262,144
SLICE_NUMBERS = 1 << 18  # logits held at once: 1 MiB in float32, so that they stay in the cache


@dataclass
class TokenFigures:
    """Of each token, [tokens], float32: log-probability, and without a gradient whether it is the most likely one, the
    mean of all logits, and the entropy where it was asked for."""

    logprobs: Tensor
    is_top1: Tensor
    mean_logits: Tensor
    entropy: Tensor | None


class ScaledHead:
    """The head of a model that scales its logits or bends them (Granite, Cohere, Gemma 2), as a function."""

    def __init__(self, head: torch.nn.Module, scale: float, cap: float | None):
        self.head, self.scale, self.cap = head, scale, cap

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def output_head(model: PreTrainedModel | PeftModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """The output layer of a causal model, what its config makes of the logits included."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return head if scale == 1 and cap is None else ScaledHead(head, scale, cap)


def token_figures(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_learns: bool = False,
) -> TokenFigures:
    """TokenFigures of `targets` [tokens] after the hidden states [tokens, width], logits divided by `temperature`.

    head: as output_head gives it. A small one, one with a bias, and one that a gradient is wanted of are projected as
    a whole, and autograd does the rest; so is a layer of another kind, such as a quantised one. entropy_learns: the
    entropy has a gradient too, and all is projected.
    """
    weight, rows, indices = _frozen_weight(head)
    if weight is None or len(weight) < LARGE_VOCABULARY or not len(targets) or entropy_learns:
        return _from_logits(head(hidden).float(), targets, temperature, entropy, entropy_learns)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or (rows is not None and rows.requires_grad))
    parts = (hidden, weight, rows, indices, targets, 1 / temperature, entropy, learns)
    logprobs, is_top1, mean, spread = FusedHead.apply(*parts)
    return TokenFigures(logprobs, is_top1, mean, spread if entropy else None)


def _from_logits(logits: Tensor, targets: Tensor, temperature: float, entropy: bool, learns: bool) -> TokenFigures:
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    spread = None
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        if entropy:
            # from their largest: probabilities add up to 1 only nearly, which counts where all logits are far from 0
            lower = logits - logits.amax(-1, keepdim=True)
            spread = lower.logsumexp(-1) - torch.einsum("tv,tv->t", lower.softmax(-1), lower)
    with torch.no_grad():
        return TokenFigures(logprobs, logits.argmax(-1) == targets, logits.mean(-1), spread)


def divergence(student: Tensor, teacher: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """(generalised Jensen-Shannon divergence of teacher and student, entropy of the student), [tokens], of their logits
    [tokens, vocabulary]: Agarwal et al. 2024, arXiv 2306.13649, equation 1.

    mix: 0 = KL(teacher || student), 1 = KL(student || teacher), between them both to their mixture, in which the
    teacher weighs mix.
    """
    own, wanted = student.float().log_softmax(-1), teacher.float().log_softmax(-1)

    def kl(one: Tensor, other: Tensor):
        return (one.exp() * (one - other)).sum(-1)

    with torch.no_grad():
        entropy = -(own.exp() * own).sum(-1)
    if mix in (0, 1):
        return (kl(own, wanted) if mix else kl(wanted, own)), entropy
    both = torch.logaddexp(own + math.log(1 - mix), wanted + math.log(mix))
    return mix * kl(wanted, both) + (1 - mix) * kl(own, both), entropy


def divergence_of_heads(
    student: Callable[[Tensor], Tensor],
    own: Tensor,
    teacher: Callable[[Tensor], Tensor],
    wanted: Tensor,
    mix: float,
    words: int,
) -> tuple[Tensor, Tensor]:
    """`divergence` of two heads of `words` words (as output_head gives them) after the hidden states own and wanted,
    [tokens, width]. Where that would be more than LOGITS_HELD, some tokens at a time, computed again for the
    gradient."""

    def of(own: Tensor, wanted: Tensor):
        with torch.no_grad():
            logits = teacher(wanted)
        return divergence(student(own), logits, mix)

    size = max(1, LOGITS_HELD // words)
    if len(own) <= size:
        return of(own, wanted)
    parts = zip(own.split(size), wanted.split(size), strict=True)
    values = [checkpoint(of, *part, use_reentrant=False) for part in parts]
    return tuple(torch.cat(column) for column in zip(*values, strict=True))


def _frozen_weight(head: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(weight [vocabulary, width], trained rows [k, width], their indices [k]) of a plain linear layer; no weight for
    any other head."""
    rows = indices = None
    layer = getattr(head, "token_adapter", head)
    if isinstance(layer, TrainableTokensLayer):
        rows, indices = trained_rows(layer)
        layer = layer.get_base_layer()
    # a base that is only read has weights with requires_grad as well: no gradient is wanted of them then
    is_plain = type(layer) is torch.nn.Linear and layer.bias is None
    if not is_plain or (layer.weight.requires_grad and torch.is_grad_enabled()):
        return None, rows, indices
    return layer.weight, rows, indices


def trained_rows(layer: TrainableTokensLayer) -> tuple[Tensor | None, Tensor | None]:
    """The rows that the active adapter puts in place of the base's, and which they are; (None, None) where it is
    switched off, or is in the weights already."""
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return None, None
    (name,) = layer.active_adapters
    rows = layer.trainable_tokens_delta[name]
    return rows, torch.tensor(layer.token_indices[name], device=rows.device)


class FusedHead(torch.autograd.Function):
    """(log-probabilities, most likely or not, mean logits, entropies) of `targets`, each [tokens] and float32.

    weight is frozen. rows stand in for weight[indices] and may have a gradient. learns: whether any gradient is wanted.
    The logits are computed in the dtype of the weight, everything after them in float32.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        indices: Tensor | None,
        targets: Tensor,
        scale: float,
        entropy: bool,
        learns: bool,
    ):
        states, dtype = hidden.detach().to(weight.dtype), weight.dtype
        count, words = len(targets), len(weight)
        best = torch.full((count,), -torch.inf, device=hidden.device)
        wanted = torch.zeros_like(best)  # the target's logit
        others = torch.zeros_like(best)  # sum of exp(logit - best) over all words but the target
        pulled = torch.zeros(count, weight.size(1), device=hidden.device)  # the same, times the words' weights
        total = torch.zeros_like(best)  # of all logits

        def take(part: Tensor, targets_here: Tensor, is_here: Tensor, closed: Tensor | None = None):
            """One slice of the head: part [words of it, width]; closed: words that count elsewhere."""
            nonlocal best, wanted, others, pulled, total
            logits = (states @ part.T).float()
            if scale != 1.0:
                logits *= scale
            if closed is not None:
                logits[:, closed] = 0.0
            total += logits.sum(-1)
            if closed is not None:
                logits[:, closed] = -torch.inf
            places = targets_here[:, None]
            wanted = torch.where(is_here, logits.gather(1, places)[:, 0], wanted)
            higher = torch.maximum(best, logits.amax(-1))
            shrink = (best - higher).exp()
            best, others = higher, others * shrink
            weights = logits.sub_(best[:, None]).exp_()
            weights.scatter_(1, places, weights.gather(1, places).masked_fill(is_here[:, None], 0.0))
            others += weights.sum(-1)
            if learns or entropy:
                pulled = pulled.mul_(shrink[:, None]).add_(weights.to(dtype) @ part)
            return weights

        size = min(words, max(512, SLICE_NUMBERS // count))
        replaced = torch.full_like(targets, -1)  # place of the target among the trained rows
        if rows is not None:
            hits = targets[:, None] == indices
            replaced = torch.where(hits.any(1), hits.long().argmax(1), replaced)
        for start in range(0, words, size):
            part = weight[start : start + size]
            here = targets - start
            closed = None
            if rows is not None:
                closed = indices[(indices >= start) & (indices < start + len(part))] - start
            is_here = (here >= 0) & (here < len(part)) & (replaced < 0)
            take(part, here.clamp(0, len(part) - 1), is_here, closed)
        small = None
        if rows is not None:
            small = take(rows.detach().to(dtype), replaced.clamp(min=0), replaced >= 0)
        own = (wanted - best).exp()
        everything = own + others
        logprobs = wanted - best - everything.log()
        ctx.scale = scale
        chosen = None
        if learns or entropy:
            chosen = weight[targets].float()
            if rows is not None:
                chosen = torch.where(replaced[:, None] >= 0, rows.detach().float()[replaced.clamp(min=0)], chosen)
        gradient = small_gradient = None
        if learns:
            # 1 - p(target) is the sum of the others: as a difference it would be rounded away where p is near 1
            gradient = scale * (others[:, None] * chosen - pulled) / everything[:, None]
            gradient = gradient.to(hidden.dtype)
            if rows is not None:
                small_gradient = -small / everything[:, None]  # the target's own place holds 0
                small_gradient.scatter_add_(
                    1, replaced.clamp(min=0)[:, None], ((replaced >= 0) * others / everything)[:, None]
                )
        ctx.save_for_backward(gradient, small_gradient, states if small_gradient is not None else None)
        ctx.rows_dtype = None if rows is None else rows.dtype
        spread = torch.zeros_like(best)
        if entropy:
            mean_weight = (own[:, None] * chosen + pulled) / everything[:, None]
            spread = best + everything.log() - scale * (states.float() * mean_weight).sum(-1)
        is_top1, mean = wanted >= best, total / words
        ctx.mark_non_differentiable(is_top1, mean, spread)
        return logprobs, is_top1, mean, spread

    @staticmethod
    def backward(ctx: FunctionCtx, grad_logprobs: Tensor, *_):
        gradient, small_gradient, states = ctx.saved_tensors
        of_hidden = of_rows = None
        if ctx.needs_input_grad[0]:
            of_hidden = grad_logprobs[:, None].to(gradient.dtype) * gradient
        if ctx.needs_input_grad[2]:
            of_rows = (ctx.scale * grad_logprobs[:, None] * small_gradient).T @ states.float()
            of_rows = of_rows.to(ctx.rows_dtype)
        return of_hidden, None, of_rows, None, None, None, None, None


def row_layers(model: torch.nn.Module) -> list[TrainableTokensLayer]:
    """Where trained rows stand in for rows of the embeddings; of tied ones there are two, with the same rows."""
    return [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]


def use_trained_rows(model: torch.nn.Module) -> None:
    """Let the layers of `row_layers` look the trained rows up; peft copies all embeddings at every call, and gathers a
    gradient as large as they are."""
    for layer in row_layers(model):
        layer.forward_adapters = types.MethodType(_forward_rows, layer)
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper) and isinstance(module.original_module, torch.nn.Linear):
            module.bias = module.original_module.bias  # trl's own head asks for it


def _forward_rows(self: TrainableTokensLayer, x: Tensor, active_adapters: list[str], *args, **kwargs):
    rows, indices = trained_rows(self)
    if rows is None:
        return type(self).forward_adapters(self, x, active_adapters, *args, **kwargs)
    base, rows = self.get_base_layer(), rows.to(self.get_base_layer().weight.dtype)
    if isinstance(base, torch.nn.Linear):  # the head
        return base(x).index_copy(-1, indices, x @ rows.T)
    hits = x[..., None] == indices
    found = rows[hits.long().argmax(-1)]
    scale = self._get_embed_scale()  # Gemma's
    if scale is not None:
        found = found * scale.to(found.dtype)
    return torch.where(hits.any(-1, keepdim=True), found, base(x))
