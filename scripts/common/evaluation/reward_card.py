"""The report card of a scorer: accuracy against baselines on the same items, calibration, length, and what all that
allows to say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from common.evaluation.calibration import Bin, calibration_error, chance_error, reliability
from common.evaluation.statistics import Estimate, bootstrap_difference, bootstrap_mean
from common.evaluation.tables import NONE, escape, interval, markdown_table, number

ALL = "all"
BETTER = "better than every baseline"
MOST_GROUPS = 20  # values of a key of meta
LEAST = 20  # with fewer prompts a bootstrap interval is too narrow (Efron and Tibshirani 1993, section 13.3): no claim


@dataclass
class Judged:
    """What a card is about. An item is a pair or a labelled text; lists are in the order of the file."""

    noun: str  # pairs, texts
    clusters: list[str]  # of each item, its prompt or question: items that share one are alike
    groups: dict[str, list[int]]  # kind of rejected answer, or class -> its items
    correct: dict[str, list[float]]  # "model" and every baseline -> 1 right, 0 wrong, 0.5 a tie
    confidences: list[float]  # what the model says of its own answer
    chance: float  # 1 / classes: accuracy of a guess, and the least confidence there is
    lengths: dict[str, tuple[list[float], list[float]]]  # what is correlated -> characters, scores
    scores: dict[str, list[float]]  # name -> scores, for the histogram
    items: list[dict]  # row, group, margin (below 0: wrong), texts (column -> text); the JSON has them all
    tables: dict[str, list[list]] = field(default_factory=dict)  # further tables: title -> header and rows
    notes: list[str] = field(default_factory=list)


def name_groups(meta: list[dict], keys: tuple[str, ...], notes: list[str]) -> list[list[str]]:
    """The groups of each item, "key: value"; a key with too many values for a table is left out, in `notes`."""
    values = {key: {str(own[key]) for own in meta if own.get(key) is not None} for key in keys}
    for key in [key for key in keys if len(values[key]) > MOST_GROUPS]:
        notes.append(f"meta has {len(values.pop(key))} different values of {key}: not shown one by one.")
    return [[f"{key}: {own[key]}" for key in values if own.get(key) is not None] for own in meta]


def group_items(names: list[list[str]]) -> dict[str, list[int]]:
    """names[i]: the groups of item i -> name -> its items, by name."""
    groups: dict[str, list[int]] = {}
    for index, own in enumerate(names):
        for name in own:
            groups.setdefault(name, []).append(index)
    return {name: groups[name] for name in sorted(groups)}


def judge_classes(
    probabilities: list[list[float]], classes: list[str], val: list[tuple[str, str]], train: list[tuple[str, str]]
) -> Judged:
    """The judgement of a classifier: probabilities [texts, classes] of the texts in `val`; val, train: (text, its
    class).

    The baseline, TF-IDF + logistic regression, is fitted on `train`. Texts of one question (all before 回答) are alike.
    """
    from sklearn.metrics import precision_recall_fscore_support

    from common.evaluation.baselines import tfidf_classifier

    texts, truth = map(list, zip(*val, strict=True))
    train_texts, train_truth = map(list, zip(*train, strict=True))
    said = {
        "model": [classes[max(range(len(classes)), key=row.__getitem__)] for row in probabilities],
        "TF-IDF": tfidf_classifier(train_texts, train_truth).predict(texts).tolist(),
    }
    confidences = [max(row) for row in probabilities]
    right = [answer == wanted for answer, wanted in zip(said["model"], truth, strict=True)]
    items = []
    for index, (text, wanted, row) in enumerate(zip(texts, truth, probabilities, strict=True)):
        place = classes.index(wanted)
        margin = row[place] - max(row[:place] + row[place + 1 :])
        shown = {"text": text, "predicted": said["model"][index]}
        items.append({"row": index + 1, "group": wanted, "margin": margin, "texts": shown})

    present = [name for name in classes if name in truth or name in said["model"]]
    model, baseline = (
        precision_recall_fscore_support(truth, said[system], labels=present, zero_division=0) for system in said
    )  # precision, recall, F1, count, each [classes]
    columns = [*model[:3], baseline[2]]
    table = [["class", "texts", "precision", "recall", "F1", "F1 of TF-IDF"]]
    for index, name in enumerate(present):
        table.append([escape(name), str(model[3][index]), *(number(float(column[index])) for column in columns)])
    table.append(["macro mean", str(len(truth)), *(number(float(column.mean())) for column in columns)])
    majority = max(classes, key=train_truth.count)
    share = number(truth.count(majority) / len(truth))
    return Judged(
        noun="texts",
        clusters=[text.rpartition("\n回答")[0] or text for text in texts],
        groups=group_items([[name] for name in truth]),
        correct={system: [float(a == b) for a, b in zip(said[system], truth, strict=True)] for system in said},
        confidences=confidences,
        chance=1 / len(classes),
        lengths={"confidence": ([float(len(text)) for text in texts], confidences)},
        scores={
            "right": [value for value, good in zip(confidences, right, strict=True) if good],
            "wrong": [value for value, good in zip(confidences, right, strict=True) if not good],
        },
        items=items,
        tables={"Classes": table},
        notes=[f"The most frequent class of the training file, {majority}, is right in {share} of the texts."],
    )


def ranking(
    sides: dict[str, tuple[list[str], list[float]]], bootstrap: int, seed: int
) -> tuple[list[list[str]], list[str]]:
    """How often an order holds among the texts of one prompt, as a table; and the pairs of sides whose order is not
    shown.

    sides: best first, name -> prompts and scores of its texts.

    Scores of different prompts are not compared: what a reward model learns is fixed up to a constant per prompt.
    """
    from itertools import combinations, pairwise, product

    scores: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for name, (prompts, values) in sides.items():
        for prompt, value in zip(prompts, values, strict=True):
            scores[name].setdefault(prompt, []).append(value)
    table, unproven = [["order", "prompts", "share of the prompt's texts", "by chance"]], []
    for order in [*combinations(sides, 2), tuple(sides)]:
        shared = sorted(set.intersection(*(set(scores[name]) for name in order)))
        shares = []
        for prompt in shared:
            rows = list(product(*(scores[name][prompt] for name in order)))
            shares.append(sum(all(a > b for a, b in pairwise(row)) for row in rows) / len(rows))
        share, chance = bootstrap_mean(shares, shared, bootstrap, seed), 1 / math.factorial(len(order))
        table.append([" > ".join(order), str(len(shared)), interval(share), number(chance)])
        if len(shared) < LEAST or share.low <= chance:
            unproven.append(" > ".join(order))
    return table, unproven


def measure(judged: Judged, bootstrap: int, seed: int, wide: float) -> dict:
    """Every figure of the card, as JSON holds it; an Estimate is [mean, low, high]."""
    groups = {ALL: list(range(len(judged.items))), **judged.groups}
    error = reliability(judged.confidences, judged.correct["model"], judged.chance)
    return {
        "groups": {name: _measure_group(judged, inside, bootstrap, seed, wide) for name, inside in groups.items()},
        "calibration": {
            "error": calibration_error(error),
            "error_of_a_calibrated_model": chance_error(judged.confidences, judged.chance, seed=seed),
            "bins": [bin._asdict() for bin in error],
        },
        "length_correlation": {name: rank_correlation(*values) for name, values in judged.lengths.items()},
        "mean_score": {name: sum(values) / len(values) for name, values in judged.scores.items() if values},
    }


def _measure_group(judged: Judged, inside: list[int], bootstrap: int, seed: int, wide: float) -> dict:
    clusters = [judged.clusters[i] for i in inside]
    columns = {name: [values[i] for i in inside] for name, values in judged.correct.items()}
    accuracy = {name: bootstrap_mean(values, clusters, bootstrap, seed) for name, values in columns.items()}
    better = {
        name: bootstrap_difference(values, clusters, columns["model"], clusters, bootstrap, seed)
        for name, values in columns.items()
        if name != "model"
    }
    words = verdict(judged.noun, accuracy, better, len(set(clusters)), judged.chance, wide)
    counts = {"count": len(inside), "prompts": len(set(clusters))}
    return counts | {"accuracy": accuracy, "better": better, "verdict": words}


def verdict(
    noun: str, accuracy: dict[str, Estimate], better: dict[str, Estimate], prompts: int, chance: float, wide: float
) -> str:
    """What the figures allow to say. accuracy: "model" and baselines; better: baseline -> model minus it; wide: an
    interval above this width allows no claim but that of a clear win."""
    if prompts < LEAST:
        return f"{prompts} prompt{'s' * (prompts > 1)}: too few to claim anything"
    model = accuracy["model"]
    best = max(better, key=lambda name: accuracy[name].mean)
    width = max(model.high - model.low, better[best].high - better[best].low)
    surface = accuracy[best].low > chance
    if all(difference.low > 0 for difference in better.values()) and model.low > chance:
        words = BETTER
        if width > wide:
            words += f"; by how much, so few {noun} cannot say"
        if surface:
            reached = number(accuracy[best].mean)
            words += f"; in part the {noun} are separable by their surface: {best} alone reaches {reached}"
        return words
    if width > wide:
        return f"too few {noun} to claim anything: the interval is {number(width)} wide"
    if surface:
        how = "does better" if better[best].high < 0 else "does as well"
        return f"the {noun} are separable by their surface: {best} {how}"
    if model.high < chance:
        return "worse than a guess"
    if model.low <= chance:
        return "no better than a guess"
    return f"better than a guess, not shown to be better than {best}"


def rank_correlation(lengths: list[float], scores: list[float]) -> float | None:
    """Spearman's rank correlation; None where one side never varies."""
    from scipy.stats import spearmanr

    if len(set(lengths)) < 2 or len(set(scores)) < 2:
        return None
    return float(spearmanr(lengths, scores).statistic)


def markdown(title: str, judged: Judged, figures: dict, image: str, examples: int) -> str:
    baselines = [name for name in judged.correct if name != "model"]
    header = ["group", judged.noun, "prompts", "model", *baselines]
    header += [*(f"model − {name}" for name in baselines), "verdict"]
    rows = [
        [escape(name), str(group["count"]), str(group["prompts"])]
        + [interval(group["accuracy"][system]) for system in ("model", *baselines)]
        + [interval(group["better"][system], sign=True) for system in baselines]
        + [group["verdict"]]
        for name, group in figures["groups"].items()
    ]
    calibration = figures["calibration"]
    shares = [[number(bin["confidence"]), number(bin["accuracy"]), str(bin["count"])] for bin in calibration["bins"]]
    correlations = [[name, number(value, sign=True)] for name, value in figures["length_correlation"].items()]
    parts = [
        f"# {title}",
        f"**{headline(figures['groups'])}**",
        f"Mean [95 % interval]; prompts are resampled, not {judged.noun}; differences are paired. A tie counts as "
        "half right. The baselines are fitted on the training file and never see a prompt.",
        *judged.notes,
        f"## Accuracy\n\n{markdown_table(header, rows)}",
        *(f"## {name}\n\n{markdown_table(table[0], table[1:])}" for name, table in judged.tables.items()),
        f"## Calibration\n\nExpected calibration error {number(calibration['error'])}; a perfectly calibrated model "
        f"would show {number(calibration['error_of_a_calibrated_model'])} on so many {judged.noun}.\n\n"
        + markdown_table(["the model says", "it is right", judged.noun], shares, left=0),
        f"## Length\n\n{markdown_table(['rank correlation with the length in characters', 'Spearman'], correlations)}",
        f"## Plots\n\n![plots]({image})",
    ]
    wrong = sorted((item for item in judged.items if item["margin"] < 0), key=lambda item: item["margin"])[:examples]
    if wrong:
        header = ["row", "group", "margin", *wrong[0]["texts"]]
        table = [
            [str(item["row"]), escape(item["group"]) or NONE, number(item["margin"])]
            + [escape(text) for text in item["texts"].values()]
            for item in wrong
        ]
        parts.append(f"## Worst mistakes\n\n{markdown_table(header, table, left=len(header))}")
    return "\n\n".join(parts) + "\n"


def plot(judged: Judged, figures: dict, path: Path) -> None:
    """A PNG: reliability, histogram of the scores, accuracy of every group, score against length."""
    from common.evaluation.plots import as_label, draw_reliability, pyplot, save_figure, whiskers

    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")

    panel, low = axes[0, 0], judged.chance
    draw_reliability(panel, [Bin(**bin) for bin in figures["calibration"]["bins"]], low, "model")
    panel.set(xlabel="confidence", ylabel="share that is right", title=f"reliability (numbers: {judged.noun})")
    panel.legend()

    panel = axes[0, 1]
    scores = {as_label(name): values for name, values in judged.scores.items() if values}
    every = [value for values in scores.values() for value in values]
    span = (min(every), max(every) + 1e-6)
    panel.hist(list(scores.values()), bins=30, range=span, density=True, histtype="step", label=list(scores))
    panel.set(xlabel="score", ylabel="density", title="scores")
    panel.legend()

    panel, names = axes[1, 0], list(figures["groups"])
    for place, system in enumerate(judged.correct):
        estimates = [figures["groups"][name]["accuracy"][system] for name in names]
        bounds = [
            whiskers(e.mean, e.mean if e.low is None else e.low, e.mean if e.high is None else e.high)
            for e in estimates
        ]
        ys = [y + 0.2 * (place - 1) for y in range(len(names))]
        bars = list(zip(*bounds, strict=True))
        panel.errorbar([e.mean for e in estimates], ys, xerr=bars, fmt="o", capsize=2, label=as_label(system))
    panel.axvline(judged.chance, color="0.7", linestyle="--")
    panel.set_yticks(range(len(names)), [as_label(name) for name in names])
    panel.invert_yaxis()
    panel.set(xlabel="accuracy, 95 % interval", title="accuracy")
    panel.legend()

    panel = axes[1, 1]
    name, (lengths, scores) = next(iter(judged.lengths.items()))
    panel.scatter(lengths, scores, s=6, alpha=0.4)
    panel.set(xlabel="characters", ylabel=as_label(name), title="score and length")
    groups = [(group, figures["groups"][group]["accuracy"]) for group in names]
    rows = [(group, system, *accuracy[system]) for group, accuracy in groups for system in judged.correct]
    save_figure(figure, path, ("group", "judge", "accuracy", "low", "high"), rows)


def headline(groups: dict[str, dict]) -> str:
    """The verdict on all items as a sentence, and for which groups a clear win is no win."""
    words = groups[ALL]["verdict"]
    lost = [name for name, group in groups.items() if not group["verdict"].startswith(BETTER)]
    if words.startswith(BETTER) and lost:
        words += f"; but not shown for {', '.join(escape(name) for name in lost)}"
    return f"{words[0].upper()}{words[1:]}."
