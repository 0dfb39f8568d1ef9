"""Means and differences with bootstrap intervals, where several samples share a prompt.

Several samples of one prompt are alike, so prompts (clusters) are drawn with replacement, never single texts: treating
1,536 samples of 512 prompts as 1,536 independent texts would make every interval too narrow (Efron and Tibshirani 1993,
chapter 8; Cameron, Gelbach and Miller 2008). Intervals are percentile intervals.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

CHUNK = 4_000_000  # numbers in memory at once while resampling


class Estimate(NamedTuple):
    """A mean with its interval. All None: no value at all. Only the bounds None: fewer than two clusters."""

    mean: float | None
    low: float | None
    high: float | None


def bootstrap_mean(
    values: Sequence[float | None],
    clusters: Sequence[Hashable],
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Mean of the values that are not None, with its interval over resampled clusters.

    values, clusters: one each per text; the cluster is the prompt. None does not apply and is left out of both.
    Where every value is 0, or every one 1, resampling shows no spread at all, which is not the same as certainty: the
    open side is then the exact binomial bound (Clopper and Pearson 1934) with clusters as trials, e.g. 0 of 512
    prompts -> [0, 0.0072].
    """
    import numpy as np

    sums, counts = _by_cluster(values, clusters, sorted_unique(clusters))
    sums, counts = sums[counts > 0], counts[counts > 0]  # [clusters]
    if not len(sums):
        return Estimate(None, None, None)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Estimate(mean, None, None)
    tail = (1 - level) / 2
    if not sums.any():
        return Estimate(0.0, 0.0, 1 - tail ** (1 / len(sums)))
    if all(value == 1 for value in values if value is not None):
        return Estimate(1.0, tail ** (1 / len(sums)), 1.0)
    means = np.concatenate([sums[draw].sum(1) / counts[draw].sum(1) for draw in _draws(len(sums), samples, seed)])
    return _interval(mean, means, tail)


def bootstrap_difference(
    values_a: Sequence[float | None],
    clusters_a: Sequence[Hashable],
    values_b: Sequence[float | None],
    clusters_b: Sequence[Hashable],
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """mean(b) - mean(a) over the clusters that both runs have, paired.

    Each draw of prompts is used for both runs, so what makes a prompt hard or easy cancels out. The difference is that
    of the two means that bootstrap_mean gives on the same prompts. Values that are None are left out of their own mean.
    """
    import numpy as np

    common = sorted_unique(set(clusters_a) & set(clusters_b))
    sums_a, counts_a = _by_cluster(values_a, clusters_a, common)
    sums_b, counts_b = _by_cluster(values_b, clusters_b, common)
    known = (counts_a > 0) | (counts_b > 0)
    sums_a, counts_a, sums_b, counts_b = (array[known] for array in (sums_a, counts_a, sums_b, counts_b))
    if not counts_a.sum() or not counts_b.sum():
        return Estimate(None, None, None)
    mean = float(sums_b.sum() / counts_b.sum() - sums_a.sum() / counts_a.sum())
    if len(sums_a) < 2:
        return Estimate(mean, None, None)
    differences = []
    with np.errstate(invalid="ignore"):  # a draw in which one run has no value at all: NaN, left out below
        for draw in _draws(len(sums_a), samples, seed):
            mean_a, mean_b = (s[draw].sum(1) / n[draw].sum(1) for s, n in ((sums_a, counts_a), (sums_b, counts_b)))
            differences.append(mean_b - mean_a)
    return _interval(mean, np.concatenate(differences), (1 - level) / 2)


def sorted_unique(clusters: Iterable[Hashable]) -> list:
    """Distinct clusters in an order that does not depend on that of the rows: the same draws for the same prompts."""
    return sorted(set(clusters), key=lambda cluster: (str(type(cluster)), cluster))


def _by_cluster(values: Sequence[float | None], clusters: Sequence[Hashable], order: list):
    """Sum and count of the values that are not None, per cluster of `order`; rows of other clusters are left out."""
    import numpy as np

    place = {cluster: index for index, cluster in enumerate(order)}
    pairs = zip(values, clusters, strict=True)
    known = [(place[cluster], value) for value, cluster in pairs if value is not None and cluster in place]
    index = np.array([i for i, _ in known], dtype=np.int64)
    weights = np.array([value for _, value in known], dtype=np.float64)
    return np.bincount(index, weights, len(order)), np.bincount(index, minlength=len(order))


def _draws(clusters: int, samples: int, seed: int):
    """Indices of clusters drawn with replacement, [draws, clusters] a piece, `samples` draws in all."""
    import numpy as np

    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // clusters)
    for start in range(0, samples, size):
        yield rng.integers(0, clusters, (min(size, samples - start), clusters))


def _interval(mean: float, resampled: np.ndarray, tail: float) -> Estimate:
    import numpy as np

    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return Estimate(mean, min(float(low), mean), max(float(high), mean))  # rounding must not put the mean outside
