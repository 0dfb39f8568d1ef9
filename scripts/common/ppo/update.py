"""The formulas of PPO (stage 51), each with its paper, and one step's learning with them. docs/TRAINING.md says why
each was chosen.

Shapes: N answers of at most T tokens, [N, T] with a mask of the real ones; inside a micro-batch the real tokens only:
[tokens].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list, gather_object

if TYPE_CHECKING:
    from common.ppo.actor_critic import ActorCritic, Rollout
    from common.training.options import AdapterSettings


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """KL(policy || reference) of each token from one draw of the policy, nats (Schulman 2020, "Approximating KL
    divergence")."""
    difference = logprobs - reference
    return difference if estimator == "k1" else (-difference).exp() - 1 + difference


def next_beta(beta: float, kl: float, target: float) -> float:
    """The adaptive controller (Ziegler et al. 2019, section 2.2): at most 2 % up or down a step."""
    return beta * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def token_rewards(
    scores: torch.Tensor, penalties: torch.Tensor, mask: torch.Tensor, earned: torch.Tensor | None = None
) -> torch.Tensor:
    """The KL penalty of each token (Ziegler et al. 2019, eq. 2, written per token), and the answer's score on its last:
    [N, T].

    earned [N, T]: what of the score is paid at an earlier token; the last one gets the rest, so that an answer's sum is
    its score.
    """
    rewards = penalties * mask
    if earned is not None:
        rewards, scores = rewards + earned, scores - earned.sum(1)
    rewards[range(len(scores)), mask.sum(1) - 1] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both [N, T] (Schulman et al. 2016, eq. 16); nothing follows the last real token of a row.

    delta_t = r_t + gamma V_(t+1) - V_t;  A_t = delta_t + gamma lambda A_(t+1);  return_t = A_t + V_t, the value head's
    target.
    """
    advantages, after, value_after = values.new_zeros(values.shape), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        advantages[:, t] = after = (delta + gamma * lam * after) * mask[:, t]
        value_after = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1 over the real tokens; 0 elsewhere."""
    real = values[mask]
    return (values - real.mean()) / (real.std(correction=0) + 1e-8) * mask


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate of each token, negative (Schulman et al. 2017, eq. 7), and where the clipping binds."""
    ratio = (logprobs - old_logprobs).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return plain.maximum(clipped), clipped > plain


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """Half the squared error of each token, clipped as the policy is (Engstrom et al. 2020, section 3); clip 0 =
    plain."""
    error = (values - returns) ** 2
    if clip:
        error = error.maximum((old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2)
    return error / 2


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var[returns - values] / Var[returns]: 1 = the value head knew, 0 = no better than a constant; 0 where nothing
    varies."""
    spread = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / spread if spread else 0.0


def update(
    agent: ActorCritic,
    optimizer: torch.optim.Optimizer,
    batch: Rollout,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    settings: AdapterSettings,
) -> dict:
    """Up to `epochs` passes over one batch (common.ppo.actor_critic.Rollout) by its ActorCritic; means of what was seen
    in them.

    settings: of stage 51 (epochs, minibatches, micro_tokens, clip, value_clip, value_coef, stop_kl, max_grad_norm).

    Each process takes its share of a minibatch and divides by the tokens of the whole: the gradients add up to the
    whole's.
    """
    parameters = [*agent.policy.values(), *agent.value.values()]
    seen, norms, count, sums = [], [0.0], 0, {"policy_loss": 0.0, "value_loss": 0.0, "clip_share": 0.0}
    passes = (broadcast_object_list([torch.randperm(len(batch.prompts))])[0] for _ in range(settings.epochs))
    for rows in (rows for order in passes for rows in order.chunk(settings.minibatches)):
        tokens, moved = int(batch.mask[rows].sum()), 0.0
        count += tokens
        optimizer.zero_grad()
        for part in batch.micro_batches(rows.tolist(), settings.micro_tokens):
            real = batch.mask[part]
            kept = (full[part][real] for full in (batch.tokens, batch.logprobs, batch.values, advantages, returns))
            targets, old_logprobs, old_values, advantage, target = kept  # [tokens]
            states = agent.states(batch, part)
            logprobs = agent.logprobs(states, targets)
            surrogate, bound = policy_loss(logprobs, old_logprobs, advantage, settings.clip)
            loss = surrogate.sum() / tokens
            if agent.own:  # a second pass, through the other adapter
                loss.backward()
                agent.model.set_adapter("value")
                states, loss = agent.states(batch, part), 0.0
            error = value_loss(agent.values(states), old_values, target, settings.value_clip)
            (loss + settings.value_coef * error.sum() / tokens).backward()
            if agent.own:
                agent.model.set_adapter("default")
            # KL(old || new), drawn from old: k3 with the new policy in the reference's place
            moved += kl_estimate(old_logprobs, logprobs.detach(), "k3").sum().item() / tokens
            for name, values in zip(sums, (surrogate, error, bound), strict=True):
                sums[name] += values.sum().item()
        seen.append(sum(gather_object([moved])))
        if settings.stop_kl and seen[-1] > settings.stop_kl:
            break
        agent.sum_gradients()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item())
        if not math.isfinite(norms[-1]):
            break  # the weights stay as they are; the stage ends the run
        optimizer.step()
    means = {name: sum(gather_object([value])) / count for name, value in sums.items()}
    return {**means, "grad_norm": norms[-1], "updates": len(seen), "update_kl": seen[-1]}
