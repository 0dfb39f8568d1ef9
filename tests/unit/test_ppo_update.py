"""The formulas of PPO (common/ppo/update.py) against slow or hand-made ones."""

import math

import pytest
import torch

from common.ppo import update


def random_rows(seed: int = 0, rows: int = 6, width: int = 9):
    """Rewards and values [rows, width] and a mask of rows of every length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(rows) % width + 1
    mask = torch.arange(width)[None] < lengths[:, None]
    return torch.randn(rows, width, generator=generator), torch.randn(rows, width, generator=generator), mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_sum_that_defines_it(gamma, lam):
    rewards, values, mask = random_rows()
    advantages, returns = update.gae(rewards * mask, values, mask, gamma, lam)
    for row, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            expected = 0.0
            for k in range(t, length):  # eq. 16: sum of (gamma lambda)^l delta_(t+l)
                following = values[row, k + 1].item() if k + 1 < length else 0.0
                delta = rewards[row, k].item() + gamma * following - values[row, k].item()
                expected += (gamma * lam) ** (k - t) * delta
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + values[row, t].item(), abs=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_returns_at_lambda_one_are_the_rewards_to_come():
    rewards, values, mask = random_rows()
    _, returns = update.gae(rewards * mask, values, mask, 1.0, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(returns, to_come, atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "bound"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # more than 1 + epsilon of a good token earns nothing
        (0.5, 2.0, -1.0, False),
        (1.5, -2.0, 3.0, False),  # moving a bad token up is punished in full
        (0.5, -2.0, 1.6, True),
        (1.1, -1.0, 1.1, False),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, bound):
    old = torch.tensor([-1.3])
    values, binds = update.policy_loss(old + math.log(ratio), old, torch.tensor([advantage]), clip=0.2)
    assert values.item() == pytest.approx(loss, rel=1e-5) and binds.item() is bound


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss"),
    [
        (0.5, 0.4, 1.0, 0.2, 0.125),  # inside the clip: half the squared error
        (0.9, 0.4, 1.0, 0.2, 0.08),  # moved by .5 towards the target: counted from .6
        (0.9, 0.4, 1.0, 0.0, 0.005),  # no clipping
        (-0.2, 0.4, 1.0, 0.2, 0.72),  # moved away: the larger error counts
    ],
)
def test_clipped_value_loss_by_hand(value, old, target, clip, loss):
    tensors = (torch.tensor([number]) for number in (value, old, target))
    assert update.value_loss(*tensors, clip).item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_have_the_divergence_as_their_mean(estimator):
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    exact = (policy * (policy / reference).log()).sum()
    estimates = update.kl_estimate(policy.log(), reference.log(), estimator)
    assert (policy * estimates).sum().item() == pytest.approx(exact.item(), rel=1e-5)
    assert estimator == "k1" or (estimates >= 0).all()


def test_the_controller_moves_beta_towards_its_target_by_at_most_two_percent():
    assert update.next_beta(0.1, kl=0.05, target=0.05) == pytest.approx(0.1)
    assert update.next_beta(0.1, kl=0.055, target=0.05) == pytest.approx(0.101)
    assert update.next_beta(0.1, kl=5.0, target=0.05) == pytest.approx(0.102)
    assert update.next_beta(0.1, kl=0.0, target=0.05) == pytest.approx(0.098)


def test_whitening_ignores_padding():
    advantages, _, mask = random_rows()
    spoiled = torch.where(mask, advantages, torch.tensor(1e9))
    white = update.whiten(spoiled, mask)
    assert torch.allclose(white, update.whiten(advantages, mask), atol=1e-6)
    assert white[mask].mean().abs() < 1e-6 and white[mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert not white[~mask].any()


def test_the_score_stands_on_the_last_real_token():
    penalties, _, mask = random_rows()
    scores = torch.arange(6.0)
    rewards = update.token_rewards(scores, penalties, mask)
    assert torch.allclose(rewards.sum(1), scores + (penalties * mask).sum(1), atol=1e-5)
    for row, length in enumerate(mask.sum(1).tolist()):
        assert rewards[row, length - 1].item() == pytest.approx(scores[row].item() + penalties[row, length - 1].item())
        assert not rewards[row, length:].any()


def test_what_is_earned_before_the_end_is_not_paid_twice():
    penalties, _, mask = random_rows()
    scores, earned = torch.arange(6.0), torch.zeros(mask.shape)
    earned[:, 0] = 0.25
    rewards = update.token_rewards(scores, penalties, mask, earned)
    assert torch.allclose(rewards.sum(1), scores + (penalties * mask).sum(1), atol=1e-5)
    moved = rewards - update.token_rewards(scores, penalties, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        if length > 1:
            assert moved[row, 0].item() == pytest.approx(0.25)
            assert moved[row, length - 1].item() == pytest.approx(-0.25)


def test_explained_variance_of_a_knowing_and_an_ignorant_value_head():
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert update.explained_variance(returns, returns) == 1
    assert update.explained_variance(torch.full((4,), 9.0), returns) == pytest.approx(0)
    assert update.explained_variance(returns, torch.ones(4)) == 0
