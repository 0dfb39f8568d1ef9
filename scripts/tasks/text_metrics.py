"""Measures that several jobs share. tasks/base.py says what a measure is."""

from __future__ import annotations


def zero_for_none(metric):
    """A metric as a reward: 0 where there is too little text to judge, else a policy escapes its other rewards by writing nothing."""

    def reward(prompts, completions, meta, **known) -> list[float]:
        return [0.0 if value is None else value for value in metric(prompts, completions, meta, **known)]

    return reward
