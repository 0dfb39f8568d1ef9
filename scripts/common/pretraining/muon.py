"""Muon for the matrices inside a transformer (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

torch.optim.Muon orthogonalises in bfloat16, which is a hundred times slower than float32 on a CPU without bf16 units,
and one matrix at a time; this one works in the precision that it is given and stacks matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# quintic Newton-Schulz coefficients: steepest slope at 0 among those that map [0, 1] near 1
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[n, rows, columns] -> the same shape with singular values near 1 (between about 0.7 and 1.2)."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # spectral norm at most 1
    for _ in range(steps):
        gram = x @ x.mT  # [n, short, short]
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step is orthogonalised and scaled to AdamW's typical size (0.2 x sqrt(longer side); Liu
    et al. 2025, arXiv 2502.16982, section 2.2), so that one learning rate and weight decay serve both optimizers. 2-D
    parameters only.

    Weight decay is cautious (Chen et al. 2025, arXiv 2510.12402): only weights that the step already brings nearer to 0
    are decayed. dtype: of the orthogonalisation; states have the parameters' own."""

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                updates = []
                for param in params:
                    state = self.state[param]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(param)
                    buffer = state["momentum_buffer"]
                    buffer.lerp_(param.grad, 1 - group["momentum"])
                    updates.append(param.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5
                stacked = orthogonalise(torch.stack(updates).to(self.dtype)).to(params[0].dtype)
                for param, update in zip(params, stacked, strict=True):
                    decayed = param * (update * param > 0)
                    param.add_(decayed, alpha=-group["lr"] * group["weight_decay"])
                    param.add_(update, alpha=-group["lr"] * scale)
