"""What a judge's replies say together: what the rotated orders agree on, figures of all items, and how far the judge
can be trusted.

Judges favour positions and long answers, so every item is shown in rotated orders and a disagreement counts as a tie
(Zheng et al. 2023, arXiv 2306.05685, section 3.4); win rates are also given at equal length (Dubois et al. 2024, arXiv
2404.04475).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from common.evaluation.scoring import measured
from common.evaluation.statistics import Estimate, bootstrap_difference, bootstrap_mean
from common.judging.prompts import conversation_text
from common.judging.replies import HIGH, LOW, TIE, Reply, mean_score
from common.settings import UserError

if TYPE_CHECKING:
    import numpy as np

    from tasks.base import Task


@dataclass
class Item:
    """One prompt with the texts of all candidates. texts[i] is of the i-th candidate."""

    id: str
    prompt_id: str
    content_type: str
    turns: list[dict]  # the conversation that the texts answer
    texts: list[str]
    meta: dict

    @property
    def prompt(self) -> str:
        return conversation_text(self.turns)


@dataclass
class Judged:
    """All items under one version of the judge prompts; verdicts[i] is of items[i]."""

    version: str
    items: list[Item]
    names: list[str]  # of the candidates
    verdicts: list[Verdict]
    controls: list[Reply | None] = field(default_factory=list)  # of A/A items: one text in both places
    calls: int = 0
    unparsed: int = 0

    @property
    def prompts(self) -> list[str]:
        return [item.prompt_id for item in self.items]

    def column(self, candidate: int, dimension: str | None = None) -> list[float | None]:
        """Score of a candidate, one an item: on one dimension, or the mean of all."""
        rows = [verdict.scores[candidate] for verdict in self.verdicts]
        return [None if row is None else row.get(dimension) if dimension else mean_score(row) for row in rows]

    def dimensions(self) -> list[str]:
        return list(dict.fromkeys(name for verdict in self.verdicts for row in verdict.scores for name in row or ()))


def rule_scores(task: Task, items: Sequence[Item], candidate: int) -> list[dict[str, float]]:
    """The task's own measures of one candidate's texts on the judge's scale: 0..1 becomes LOW..HIGH. Dimensions are
    those of task.JUDGE; for a task without it, its metrics with Chinese names, or `overall`. What does not apply is
    left out. Raises UserError where there are none."""
    measures = task.JUDGE or {name: m for name, m in task.METRICS.items() if not name.isascii()}
    measures = measures or {name: m for name, m in task.METRICS.items() if name == "overall"}
    if not measures:
        raise UserError(
            f"the task {task.name} has no JUDGE and no metric overall to judge by; fix: name a model with --judge"
        )
    shown = [item.turns for item in items], [item.texts[candidate] for item in items], [item.meta for item in items]
    columns = {name: measured(measure, *shown) for name, measure in measures.items()}
    rows = [{name: values[i] for name, values in columns.items() if values[i] is not None} for i in range(len(items))]
    return [{name: LOW + (HIGH - LOW) * min(1.0, max(0.0, value)) for name, value in row.items()} for row in rows]


class Verdict(NamedTuple):
    """An item over all its orders. Candidates are counted from 0 in the order of their letters."""

    scores: list[dict[str, float] | None]  # one a candidate: means over the parsed orders; None without any
    best: int | None  # candidate that every order picks; TIE where they differ; None where too few were parsed
    wins: dict[tuple[int, int], float | None]  # (i, j) -> 1 where i beats j in every order, 0 the reverse, 0.5 else
    picks: list[int | None]  # place (not candidate) that each order picks, TIE, or None where it was not parsed
    # position bias: every order picked the same place; None: cannot be said
    bound: bool | None


def combine(replies: Sequence[Reply | None], orders: Sequence[tuple[int, ...]], texts: Sequence[str]) -> Verdict:
    """Put the orders of one item together. replies[k] judges the texts shown as orders[k]; texts are the candidates'.

    Two orders have to be parsed for a verdict (one where only one was asked for): a single one may be its place's.
    Candidates with one and the same text always tie.
    """
    read = [(reply, order) for reply, order in zip(replies, orders, strict=True) if reply]
    enough = len(read) >= min(2, len(orders))
    scores: list[dict | None] = []
    for candidate in range(len(texts)):
        rows = [reply.scores[order.index(candidate)] for reply, order in read]
        scores.append({name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else None)
    picked = [TIE if reply.best == TIE else order[reply.best] for reply, order in read]
    chosen = {pick if pick == TIE or texts.count(texts[pick]) == 1 else TIE for pick in picked}
    wins = {
        (i, j): _agreed([_beats(reply, order, i, j, texts) for reply, order in read]) if enough else None
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
    }
    bound = None
    if len(read) >= 2 and len(set(texts)) > 1:
        places = {reply.best for reply, _ in read}
        bound = len(places) == 1 and TIE not in places and len({texts[pick] for pick in picked}) > 1
    return Verdict(
        scores,
        (chosen.pop() if len(chosen) == 1 else TIE) if enough else None,
        wins,
        [reply.best if reply else None for reply in replies],
        bound,
    )


def _beats(reply: Reply, order: tuple[int, ...], i: int, j: int, texts: Sequence[str]) -> float:
    """1 where i is the best text or has the higher mean score, 0 the reverse, 0.5 where neither."""
    if texts[i] == texts[j]:
        return 0.5
    best = TIE if reply.best == TIE else order[reply.best]
    if best in (i, j):
        return float(best == i)
    first, second = (mean_score(reply.scores[order.index(candidate)]) for candidate in (i, j))
    return 0.5 if abs(first - second) < 1e-9 else float(first > second)


def _agreed(outcomes: list[float]) -> float:
    return outcomes[0] if len(set(outcomes)) == 1 else 0.5


# ------------------------------------------------------------------------------------------- win rates at equal length


def length_controlled(
    wins: Sequence[float | None], lengths: Sequence[int], others: Sequence[int], samples: int = 0, seed: int = 0
) -> Estimate:
    """The win rate that a logistic regression gives at equal length (AlpacaEval 2, arXiv 2404.04475, equation 2), with
    a 95 % percentile interval over `samples` resamplings of the items.

    P(win) = sigmoid(a + b * tanh(d / sd(d))) with d the difference in characters; the rate is sigmoid(a). b is drawn to
    0 by a penalty of b^2 / 2, as in scikit-learn's LogisticRegression. The paper's term for the difficulty of an
    instruction needs many judged models and is left out. A tie counts as half a win and half a loss, None is left out.
    Without a win or without a loss there is nothing to fit and the plain rate stands.
    """
    import numpy as np

    rows = [row for row in zip(wins, lengths, others, strict=True) if row[0] is not None]
    if not rows:
        return Estimate(None, None, None)
    won, length, other = np.array(rows, dtype=np.float64).T
    rate = float(_equal_length_rates(won[None], (length - other)[None])[0])
    plain = bootstrap_mean(list(won), range(len(won)), max(1, samples), seed)
    if len(won) < 2 or not samples or plain.mean in (0.0, 1.0):
        return Estimate(rate, plain.low, plain.high) if samples else Estimate(rate, None, None)
    draws = np.random.default_rng(seed).integers(0, len(won), (samples, len(won)))
    parts = np.array_split(draws, max(1, draws.size // 1_000_000))  # what is in memory at once
    rates = np.concatenate([_equal_length_rates(won[part], (length - other)[part]) for part in parts])
    low, high = np.quantile(rates, [0.025, 0.975])
    return Estimate(rate, min(float(low), rate), max(float(high), rate))


def _equal_length_rates(won: np.ndarray, difference: np.ndarray):
    """won, difference: [fits, items]. Newton's method on all fits at once; [fits] rates."""
    import numpy as np

    deviation = difference.std(1, keepdims=True)
    x = np.tanh(difference / np.where(deviation > 0, deviation, 1.0))
    rate = won.mean(1)
    fitted = (rate > 0) & (rate < 1)
    a, b = np.log(np.where(fitted, rate, 0.5) / (1 - np.where(fitted, rate, 0.5))), np.zeros(len(won))
    for _ in range(30):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        weight = p * (1 - p)
        slope_a, slope_b = (won - p).sum(1), ((won - p) * x).sum(1) - b
        aa, ab, bb = weight.sum(1) + 1e-9, (weight * x).sum(1), (weight * x * x).sum(1) + 1
        determinant = aa * bb - ab * ab
        # steps of at most 2: far from the optimum a full Newton step may go too far
        a = a + np.clip((bb * slope_a - ab * slope_b) / determinant, -2, 2)
        b = b + np.clip((aa * slope_b - ab * slope_a) / determinant, -2, 2)
    return np.where(fitted & (deviation[:, 0] > 0), 1 / (1 + np.exp(-a)), rate)


# ------------------------------------------------------------------------------------------------------- figures


def figures(judged: Judged, samples: int, seed: int) -> dict:
    """Every figure of the report, as JSON holds it: estimates are [mean, low, high]."""
    names, items = judged.names, judged.items

    def estimate(values: list[float | None], prompts: list[str] = judged.prompts) -> list[float | None]:
        return list(bootstrap_mean(values, prompts, samples, seed))

    def score(values: list[float | None], prompts: list[str] = judged.prompts) -> list[float | None]:
        # bootstrap_mean takes a column of ones for a share of 1: shifted, a score of 1 is none
        shifted = estimate([None if value is None else value + 1 for value in values], prompts)
        return [None if value is None else value - 1 for value in shifted]

    types = list(dict.fromkeys(sorted(item.content_type for item in items)))
    by_type = {}
    for kind in types:
        rows = [i for i, item in enumerate(items) if item.content_type == kind]
        prompts = [judged.prompts[i] for i in rows]
        scores = {n: score([judged.column(c)[i] for i in rows], prompts) for c, n in enumerate(names)}
        by_type[kind] = {"n": len(rows), "scores": scores}
    bests = [verdict.best for verdict in judged.verdicts]
    known = [best for best in bests if best is not None]
    best = {
        name: {"count": known.count(c), "share": estimate([None if b is None else float(b == c) for b in bests])}
        for name, c in [*((name, c) for c, name in enumerate(names)), ("tie", TIE)]
    }
    wins = {}
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            values = [verdict.wins[i, j] for verdict in judged.verdicts]
            first, second = ([len(item.texts[c]) for item in items] for c in (i, j))
            wins[f"{names[i]} vs {names[j]}"] = {
                "n": sum(value is not None for value in values),
                "win_rate": estimate(values),
                "length_controlled": list(length_controlled(values, first, second, samples, seed)),
            }
    return {
        "n": len(items),
        "by_type": by_type,
        "best": best,
        "undecided": len(bests) - len(known),
        "overall": {name: score(judged.column(c)) for c, name in enumerate(names)},
        "dimensions": {
            dimension: {name: score(judged.column(c, dimension)) for c, name in enumerate(names)}
            for dimension in judged.dimensions()
        },
        "wins": wins,
        "trust": trust(judged, estimate),
    }


def trust(judged: Judged, estimate: Callable[[list[float | None]], list[float | None]]) -> dict:
    """How far the judge can be trusted: places, disagreement, one text against itself, unparsed replies."""
    verdicts = judged.verdicts
    several = [len([pick for pick in verdict.picks if pick is not None]) >= 2 for verdict in verdicts]
    bound = [None if verdict.bound is None else float(verdict.bound) for verdict in verdicts]
    # every order picked one and the same candidate, or every order a tie
    split = [
        float(v.best == TIE and set(v.picks) - {None} != {TIE}) if s else None
        for v, s in zip(verdicts, several, strict=True)
    ]
    picks = [pick for verdict in verdicts for pick in verdict.picks if pick is not None and pick != TIE]
    places = max((len(verdict.picks) for verdict in verdicts), default=0)
    controls = [reply for reply in judged.controls if reply]
    gaps = [abs(mean_score(reply.scores[0]) - mean_score(reply.scores[1])) for reply in controls]
    return {
        "position_bias_rate": estimate(bound),
        "disagreement_rate": estimate(split),
        "picks_by_place": [picks.count(place) / len(picks) for place in range(places)]
        if picks and places > 1
        else None,
        "control": {
            "n": len(judged.controls),
            "parsed": len(controls),
            "tie": sum(reply.best == TIE for reply in controls) / len(controls) if controls else None,
            "first": sum(reply.best == 0 for reply in controls) / len(controls) if controls else None,
            "mean_gap": sum(gaps) / len(gaps) if gaps else None,
        },
        "calls": judged.calls,
        "unparsed": judged.unparsed / judged.calls if judged.calls else None,
    }


def compare_versions(first: Judged, second: Judged, samples: int, seed: int) -> dict:
    """Two versions of the judge prompts on the same texts: paired differences of the scores, and where the verdicts
    agree."""
    pairs = [(a.best, b.best) for a, b in zip(first.verdicts, second.verdicts, strict=True)]
    both = [None if None in pair else float(pair[0] == pair[1]) for pair in pairs]
    difference = {
        name: list(
            bootstrap_difference(first.column(c), first.prompts, second.column(c), second.prompts, samples, seed)
        )
        for c, name in enumerate(first.names)
    }
    return {
        "versions": [first.version, second.version],
        "difference": difference,
        "same_best": list(bootstrap_mean(both, first.prompts, samples, seed)),
        "correlation": _correlation(first, second),
    }


def _correlation(first: Judged, second: Judged) -> float | None:
    """Pearson correlation of the two versions' scores over all texts; None where one of them does not vary."""
    import numpy as np

    columns = ([score for c in range(len(judged.names)) for score in judged.column(c)] for judged in (first, second))
    rows = [row for row in zip(*columns, strict=True) if None not in row]
    one, two = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    return float(np.corrcoef(one, two)[0, 1]) if len(rows) > 2 and one.std() > 0 and two.std() > 0 else None
