"""How good is a style classifier: accuracy, F1 and pairs with intervals over questions; confusion and reliability
plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.evaluation.baselines import tfidf_classifier
from common.evaluation.calibration import calibration_error, reliability
from common.evaluation.plots import as_label, draw_reliability, pyplot, save_figure
from common.evaluation.statistics import Estimate, bootstrap_difference, bootstrap_mean
from common.evaluation.tables import interval, markdown_table
from tasks import styles

if TYPE_CHECKING:
    import numpy as np

CHUNK = 500  # resamples in memory at once


class Pair(NamedTuple):
    """Two answers to one question in different styles; indices of their rows."""

    first: int
    second: int


def evaluate(
    labels: Sequence[str],
    truth: Sequence[str],
    probabilities: np.ndarray | list[list[float]],
    questions: Sequence[str],
    samples: int = 2000,
    seed: int = 0,
) -> dict:
    """Figures of one classifier on labelled rows, as JSON holds them; means with 95 % intervals over questions.

    labels: in the order of the columns; truth: a label per row; probabilities: [rows, labels]; questions: what groups
    the rows. F1 of a class that neither stands in truth nor is predicted is left out of the macro mean.
    """
    import numpy as np

    place = {label: index for index, label in enumerate(labels)}
    true = np.array([place[label] for label in truth])
    said = np.asarray(probabilities).argmax(1)
    correct = (true == said).astype(float).tolist()
    matrix = np.zeros((len(labels), len(labels)), dtype=int)  # [true, predicted]
    np.add.at(matrix, (true, said), 1)
    pairs = question_pairs(truth, questions)
    told = pairs_told_apart(pairs, true, probabilities)
    confidence = np.asarray(probabilities).max(1).tolist()
    return {
        "accuracy": bootstrap_mean(correct, questions, samples, seed)._asdict(),
        "f1_macro": f1_interval(true, said, questions, len(labels), samples, seed)._asdict(),
        "f1_weighted": float((f1_of(matrix) * matrix.sum(1)).sum() / matrix.sum()),
        "per_class_f1": dict(zip(labels, f1_of(matrix).tolist(), strict=True)),
        "pairs": {
            **bootstrap_mean(told, [questions[pair.first] for pair in pairs], samples, seed)._asdict(),
            "count": len(pairs),
        },
        "confusion": matrix.tolist(),
        "calibration_error": calibration_error(reliability(confidence, correct, 1 / len(labels))),
        "correct": correct,
    }


def compare_with_baselines(
    labels: list[dict], train: list[dict], val: list[dict], probabilities: list[list[float]], seed: int = 0
) -> dict:
    """The classifier's figures on `val`, and those of the majority class and TF-IDF on the same rows, as JSON holds
    them.

    probabilities: the classifier's, [val rows, labels]. Differences are paired over questions.
    """
    names, truth = [label["label"] for label in labels], [row["label"] for row in val]
    questions = [styles.question_key(row["input"]) for row in val]
    most = Counter(row["label"] for row in train).most_common(1)[0][0]
    systems = {"classifier": probabilities, "majority class": [[float(name == most) for name in names]] * len(val)}
    for name, part in (("TF-IDF, whole text", str), ("TF-IDF, answer alone", styles.answer_of)):
        baseline = tfidf_classifier([part(row["input"]) for row in train], [row["label"] for row in train])
        order = [list(baseline.classes_).index(label) for label in names]
        systems[name] = baseline.predict_proba([part(row["input"]) for row in val])[:, order]
    report = {name: evaluate(names, truth, chances, questions, seed=seed) for name, chances in systems.items()}
    ours = report["classifier"]
    for name in list(report)[1:]:
        difference = bootstrap_difference(report[name]["correct"], questions, ours["correct"], questions, seed=seed)
        report[name]["classifier_minus_this"] = difference._asdict()
    return {
        "eval_accuracy": ours["accuracy"]["mean"],
        "eval_f1_macro": ours["f1_macro"]["mean"],
        "eval_f1_weighted": ours["f1_weighted"],
        "eval_per_class_f1": ours["per_class_f1"],
        "rows": len(val),
        "questions": len(set(questions)),
        "systems": report,
    }


def report_table(report: dict) -> str:
    """The comparison as a Markdown table, and F1 per class below it."""

    def cell(figures: dict, key: str) -> str:
        return interval([figures[key][part] for part in ("mean", "low", "high")]) if key in figures else ""

    keys = ("accuracy", "f1_macro", "pairs", "classifier_minus_this")
    header = ["", "accuracy", "macro-F1", "pairs of one question", "classifier minus this (accuracy)"]
    systems = report["systems"]
    pairs = systems["classifier"]["pairs"]["count"]
    return "\n".join(
        [
            f"{report['rows']} rows of {report['questions']} questions, {pairs} pairs; 95 % intervals over questions",
            markdown_table(
                header, [[name, *(cell(figures, key) for key in keys)] for name, figures in systems.items()]
            ),
            "F1 per class: " + ", ".join(f"{name} {value:.3f}" for name, value in report["eval_per_class_f1"].items()),
        ]
    )


def plot_report(report: dict, probabilities: list[list[float]], labels: list[dict], folder: Path) -> None:
    """confusion.png and reliability.png of the classifier; labels by their English names."""
    ours = report["systems"]["classifier"]
    plot_confusion(ours["confusion"], [label["label_english"] for label in labels], folder / "confusion.png")
    confidences = [max(row) for row in probabilities]
    plot_reliability(confidences, ours["correct"], 1 / len(labels), folder / "reliability.png")


def f1_of(matrix: np.ndarray) -> np.ndarray:
    """F1 per class of confusion matrices [..., true, predicted]; 0 for a class that is never right."""
    import numpy as np

    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    return 2 * hits / np.maximum(matrix.sum(-1) + matrix.sum(-2), 1)


def f1_interval(
    true: np.ndarray, said: np.ndarray, questions: Sequence[str], count: int, samples: int, seed: int
) -> Estimate:
    """Macro-F1 with its percentile interval: questions are drawn with replacement, and F1 is taken of each draw's
    matrix."""
    import numpy as np

    names = {question: index for index, question in enumerate(sorted(set(questions)))}
    matrices = np.zeros((len(names), count, count))  # one confusion matrix per question
    np.add.at(matrices, ([names[question] for question in questions], true, said), 1)

    def macro(matrix: np.ndarray):  # [..., count, count] -> [...]
        known = matrix.sum(-1) + matrix.sum(-2) > 0
        return f1_of(matrix).sum(-1) / known.sum(-1)

    mean = float(macro(matrices.sum(0)))
    if len(names) < 2:
        return Estimate(mean, None, None)
    rng, values = np.random.default_rng(seed), []
    for start in range(0, samples, CHUNK):
        draws = rng.integers(0, len(names), (min(CHUNK, samples - start), len(names)))
        values.append(macro(matrices[draws].sum(1)))
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return Estimate(mean, min(float(low), mean), max(float(high), mean))


def question_pairs(truth: Sequence[str], questions: Sequence[str]) -> list[Pair]:
    """Every two rows that answer one question in different styles: only the answer can tell them apart."""
    rows: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        rows.setdefault(question, []).append(index)
    return [Pair(a, b) for group in rows.values() for a, b in combinations(group, 2) if truth[a] != truth[b]]


def pairs_told_apart(pairs: list[Pair], true: np.ndarray, probabilities: np.ndarray | list[list[float]]) -> list[float]:
    """1 where the two labels fit the two answers better as they are than exchanged, 0.5 for a tie (chance: 0.5)."""
    import numpy as np

    logs = np.log(np.maximum(np.asarray(probabilities, dtype=float), 1e-12))
    # several labels' worth of evidence at once, so that a classifier's bias for one of them cancels out
    margins = [logs[a, true[a]] + logs[b, true[b]] - logs[a, true[b]] - logs[b, true[a]] for a, b in pairs]
    return [0.5 if margin == 0 else float(margin > 0) for margin in margins]


def plot_confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """A PNG of a confusion matrix [true, predicted], coloured by the share of the true class."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(1.6 + 0.9 * len(names), 1.2 + 0.8 * len(names)), layout="constrained")
    shares = [[count / max(1, sum(row)) for count in row] for row in matrix]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for true, row in enumerate(matrix):
        for said, count in enumerate(row):
            axes.text(
                said, true, count, ha="center", va="center", color="white" if shares[true][said] > 0.6 else "black"
            )
    ticks = [as_label(name) for name in names]
    axes.set_xticks(range(len(names)), ticks, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), ticks)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    rows = [(name, *row) for name, row in zip(names, matrix, strict=True)]
    save_figure(figure, path, ("true, predicted", *names), rows)


def plot_reliability(confidences: Sequence[float], correct: Sequence[float], lowest: float, path: Path) -> None:
    """A PNG of how often the classifier is right against how sure it says it is, with the number of rows at each
    point."""
    plt = pyplot()
    bins = reliability(confidences, correct, lowest)
    figure, axes = plt.subplots(figsize=(5, 4.5), layout="constrained")
    draw_reliability(axes, bins, lowest, "classifier")
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    rows = [(bin.confidence, bin.accuracy, bin.count) for bin in bins]
    save_figure(figure, path, ("confidence", "accuracy", "rows"), rows)
