"""Rewards by name: one grammar for stages 33, 50, 51.

    NAME[:WEIGHT]              a function in REWARDS of scripts/tasks/<task>
    model=PATH[:WEIGHT]        a scalar reward model (stage 30)
    style=PATH#LABEL[:WEIGHT]  a classifier's probability of LABEL (stage 31)

A weight is a number, 1 where none is given; a negative one punishes. The total of a completion is the weighted mean of
its parts, and None if any part is None: a part that cannot judge never counts as 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from common.evaluation.scoring import measured
from common.settings import UserError, resolve_model, show_path

if TYPE_CHECKING:
    from tasks.base import Task

SPEC = re.compile(r"(?P<name>.+?)(?::(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)))?")


@dataclass(frozen=True)
class Reward:
    name: str  # as it stands in logs: rhyme, model=reward, style=classifier#诚实
    weight: float
    path: str  # folder or hub id of the model behind it; empty for a rule
    function: Callable  # (prompts, completions, meta) -> list[float | None]; prompts are lists of messages
    sees_tools: bool = False  # function takes `tools` too
    steps: Callable | None = None  # the same -> list[list[(offset, value)]]: what of it is earned before the end


def load_rewards(specs: tuple[str, ...], task: Task, dtype: str = "auto", max_length: int = 512) -> list[Reward]:
    """The rewards that `specs` name, models loaded. task: as tasks.base.load_task gives it.

    Raises UserError for an unknown name, a weight of 0, a name given twice, a model without its head.
    """
    if not specs:
        raise UserError("no reward named; fix: --rewards NAME[:WEIGHT] ...")
    rewards = [_load(spec, task, dtype, max_length) for spec in specs]
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"reward {name} is named twice; fix: once, with one weight")
    return rewards


def score(
    rewards: list[Reward],
    prompts: list[list[dict]],
    completions: list[str],
    meta: list[dict],
    tools: list[list | None] | None = None,
) -> dict[str, list[float | None]]:
    """name of each reward -> one value a completion, in the order of `completions`; None where it does not apply.

    tools: of each row, for reward models: they have read them in training. Rules and classifiers judge the text alone.
    Raises UserError, naming the reward and the completion, where a function raises or returns anything but a finite
    number or None.
    """
    columns = {}
    for reward in rewards:
        try:
            more = {"tools": tools} if tools and reward.sees_tools else {}
            values = reward.function(prompts, completions, meta, **more)
            values = list(values) if isinstance(values, Iterable) else values  # a generator raises here
        except Exception as error:  # a reward is the user's own code: whatever it raises is told with its name
            raise UserError(
                f"reward {reward.name}: {type(error).__name__}: {error}; fix: correct it, or the meta of the prompts"
            ) from error
        if not isinstance(values, list):
            raise UserError(f"reward {reward.name} returned {values!r}; fix: a list, one value for each completion")
        if len(values) != len(completions):
            raise UserError(
                f"reward {reward.name} returned {len(values)} values for {len(completions)} completions; fix: one each"
            )
        for value, text in zip(values, completions, strict=True):
            if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
                raise UserError(
                    f"reward {reward.name} is {value!r} for {text[:60]!r}; fix: return a finite number, or None"
                )
        columns[reward.name] = [None if value is None else float(value) for value in values]
    return columns


def check_meta(rewards: list[Reward], file: Path, rows: list[dict]) -> None:
    """Asks every rule about an empty answer to each row of `file`, so that a meta which it cannot read is told with its
    line before a model writes. Raises UserError."""
    rules = [reward for reward in rewards if not reward.path]

    def ask(part: list[dict]) -> None:
        score(rules, [row["prompt"] for row in part], [""] * len(part), [row.get("meta", {}) for row in part])

    try:
        ask(rows)
    except UserError:
        for line, row in enumerate(rows, start=1):
            try:
                ask([row])
            except UserError as error:
                raise UserError(f"{show_path(file)}:{line}: {error}") from None
        raise


def check_order(rewards: list[Reward], task: Task) -> None:
    """The self-test before a run: each rule gives every good text of the job's REWARD_EXAMPLES that names it more than
    the bad one. Raises UserError where one does not.

    A model may err on a single text: how many it orders right is printed where some are wrong. The weighted mix is not
    tested: a weight may well be negative.
    """
    texts = [text for example in task.REWARD_EXAMPLES for text in (example.good, example.bad)]
    twice = [example for example in task.REWARD_EXAMPLES for _ in range(2)]
    prompts, meta = [[{"role": "user", "content": example.prompt}] for example in twice], [e.meta for e in twice]
    columns = {}
    for reward in rewards:
        places = [place for place, example in enumerate(twice) if reward.path or reward.name in example.rewards]
        found = score([reward], *([column[place] for place in places] for column in (prompts, texts, meta)))
        columns[reward.name] = dict(zip(places, found[reward.name], strict=True))
        wrong = []
        for place in places[::2]:
            good, bad = columns[reward.name][place], columns[reward.name][place + 1]
            if None in (good, bad) or good <= bad:
                wrong.append((place, good, bad))
        if wrong and not reward.path:
            place, good, bad = wrong[0]
            raise UserError(
                f"reward {reward.name} is {bad} for {texts[place + 1][:40]!r} and {good} for the better text "
                f"{texts[place][:40]!r}; fix: correct it, or REWARD_EXAMPLES of {show_path(task.file)}"
            )
        if wrong:
            print(f"notice: {reward.name} orders {len(places) // 2 - len(wrong)} of {len(places) // 2} known pairs")


def total(rewards: list[Reward], columns: dict[str, list[float | None]]) -> list[float | None]:
    """Weighted mean of the parts, one a completion: sum of weight * part over the sum of absolute weights; None if any
    part is None."""
    scale = sum(abs(reward.weight) for reward in rewards)
    rows = zip(*(columns[reward.name] for reward in rewards), strict=True)
    return [
        None
        if None in parts
        else sum(reward.weight * part for reward, part in zip(rewards, parts, strict=True)) / scale
        for parts in rows
    ]


def step_shares(
    rewards: list[Reward], prompts: list[list[dict]], completions: list[str], meta: list[dict]
) -> list[dict[int, float]]:
    """offset -> what of the `total` is earned once text[:offset] is written, one dict a completion; empty where no
    reward says."""
    scale = sum(abs(reward.weight) for reward in rewards)
    earned: list[dict[int, float]] = [{} for _ in completions]
    for reward in (reward for reward in rewards if reward.steps):
        for parts, found in zip(earned, reward.steps(prompts, completions, meta), strict=True):
            for offset, value in found:
                parts[offset] = parts.get(offset, 0.0) + reward.weight * value / scale
    return earned


def _load(spec: str, task: Task, dtype: str, max_length: int) -> Reward:
    match = SPEC.fullmatch(spec)
    weight = float(match["weight"]) if match and match["weight"] else 1.0
    if not match or weight == 0:
        raise UserError(
            f"reward {spec!r}: fix: NAME[:WEIGHT], model=PATH[:WEIGHT] or style=PATH#LABEL[:WEIGHT], with a weight "
            "that is not 0"
        )
    kind, _, source = match["name"].partition("=")
    if kind == "model" and source:
        path = resolve_model(source, task.name)
        return Reward(f"model={_folder_name(path)}", weight, path, _model_reward(path, dtype, max_length), True)
    if kind == "style" and source:
        source, _, label = source.rpartition("#")
        if not source:
            raise UserError(f"reward {spec!r} names no class; fix: style=PATH#LABEL")
        path = resolve_model(source, task.name)
        return Reward(
            f"style={_folder_name(path)}#{label}", weight, path, _style_reward(path, label, dtype, max_length)
        )
    if match["name"] not in task.REWARDS:
        raise UserError(
            f"unknown reward {match['name']!r}; fix: one of {', '.join(task.REWARDS)}, model=PATH or style=PATH#LABEL"
        )
    steps = task.STEP_REWARDS.get(match["name"])
    function, steps = partial(measured, task.REWARDS[match["name"]]), steps and partial(measured, steps)
    return Reward(match["name"], weight, "", function, steps=steps)


def _folder_name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _model_reward(path: str, dtype: str, max_length: int) -> Callable:
    from common.training.classifiers import load_classifier, logits_of, render_conversation

    model, tokenizer = load_classifier(path, dtype, num_labels=1)

    def function(
        prompts: list[list[dict]], completions: list[str], meta: list[dict], tools: list[list | None] | None = None
    ) -> list[float]:
        asked = zip(prompts, completions, tools or [None] * len(prompts), strict=True)
        texts = [render_conversation(tokenizer, prompt, text, tools=known) for prompt, text, known in asked]
        return logits_of(model, tokenizer, texts, max_length)[:, 0].tolist()

    return function


def _style_reward(path: str, label: str, dtype: str, max_length: int) -> Callable:
    from common.training.classifiers import classifier_text, label_index, load_styles, logits_of

    model, tokenizer = load_styles(path, dtype)
    index = label_index(model, label)

    def function(prompts: list[list[dict]], completions: list[str], meta: list[dict]) -> list[float]:
        texts = [classifier_text(p, text) for p, text in zip(prompts, completions, strict=True)]
        return logits_of(model, tokenizer, texts, max_length).softmax(-1)[:, index].tolist()

    return function
