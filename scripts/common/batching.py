"""Batches of rows of similar length under a token budget."""

from __future__ import annotations

import random


def length_batches(lengths: list[int], token_budget: int, seed: int, window: int = 64) -> list[list[int]]:
    """Row indices in batches whose padded size, rows x longest row, stays within `token_budget` tokens.

    Rows are shuffled, sorted by length inside windows of about `window` batches (so that neighbours in length still
    vary from epoch to epoch) and cut; then the batches are shuffled. A row longer than the budget is a batch of its
    own. Every row stands in exactly one batch.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    mean = max(1, sum(lengths) // max(1, len(lengths)))
    size = max(1, window * token_budget // mean)
    batches: list[list[int]] = []
    for start in range(0, len(order), size):
        batch: list[int] = []
        for index in sorted(order[start : start + size], key=lambda i: lengths[i]):
            # ascending, so this row is the longest of the batch it would join
            if batch and (len(batch) + 1) * lengths[index] > token_budget:
                batches.append(batch)
                batch = []
            batch.append(index)
        if batch:
            batches.append(batch)
    rng.shuffle(batches)
    return batches
