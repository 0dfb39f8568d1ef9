"""Is a model as often right as it says? Reliability bins and the expected calibration error (Guo et al. 2017, section
2)."""

from collections.abc import Sequence
from typing import NamedTuple


class Bin(NamedTuple):
    confidence: float  # mean of what the model said
    accuracy: float  # how often it was right
    count: int


def reliability(
    confidences: Sequence[float], correct: Sequence[float], lowest: float = 0.0, bins: int = 10
) -> list[Bin]:
    """Bins of equal width from `lowest` (1 / number of classes: no answer is less sure) to 1; empty ones are left
    out."""
    members: dict[int, list[int]] = {}
    for index, confidence in enumerate(confidences):
        place = int((confidence - lowest) / (1 - lowest) * bins)
        members.setdefault(min(max(place, 0), bins - 1), []).append(index)
    return [
        Bin(
            sum(confidences[i] for i in inside) / len(inside),
            sum(correct[i] for i in inside) / len(inside),
            len(inside),
        )
        for _, inside in sorted(members.items())
    ]


def calibration_error(bins: Sequence[Bin]) -> float | None:
    """Mean distance of confidence and accuracy, weighted by the bins' counts; None without a single answer."""
    total = sum(bin.count for bin in bins)
    return sum(bin.count * abs(bin.confidence - bin.accuracy) for bin in bins) / total if total else None


def chance_error(
    confidences: Sequence[float], lowest: float = 0.0, bins: int = 10, draws: int = 200, seed: int = 0
) -> float | None:
    """The calibration error that a perfectly calibrated model would show on average with these confidences.

    It is not 0: a bin with few answers is off by chance. An error near this one is no evidence of miscalibration.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    drawn = rng.random((draws, len(confidences))) < np.asarray(confidences)  # [draws, answers]
    errors = [calibration_error(reliability(confidences, row.astype(float).tolist(), lowest, bins)) for row in drawn]
    return sum(errors) / draws if confidences else None
