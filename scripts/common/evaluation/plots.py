"""Plots of several runs side by side. Labels are Latin only: no machine is sure to have a Chinese font."""

from collections.abc import Sequence
from pathlib import Path

from common.jsonl import atomic_path

GOLDEN, PLAIN = "#c9a227", "#4878a8"


def pyplot():
    """matplotlib.pyplot, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path: Path) -> None:
    """As a PNG, whole or not at all."""
    with atomic_path(path) as tmp:
        figure.savefig(tmp, dpi=110, format="png")
    pyplot().close(figure)


def latin(name: str) -> str:
    return name.encode("ascii", "replace").decode().replace("_", " ")


def draw_reliability(axes, bins, lowest: float, label: str) -> None:
    """How often a model is right against how sure it says it is, the number of answers at each point. bins: see
    common/evaluation/calibration.py."""
    axes.plot([lowest, 1], [lowest, 1], color="0.7", linestyle="--", label="calibrated")
    axes.plot([bin.confidence for bin in bins], [bin.accuracy for bin in bins], marker="o", label=label)
    for bin in bins:
        axes.annotate(str(bin.count), (bin.confidence, bin.accuracy), textcoords="offset points", xytext=(4, -12))


def plot_bars(panels: dict[str, dict[str, Sequence[float | None]]], path: Path, golden: str = "") -> None:
    """A PNG with one panel per metric: panels[metric][run] = (mean, low, high), bounds may be None. A metric whose name
    is not Latin gets no panel. The run called `golden` has a colour of its own."""
    plt = pyplot()
    names = [name for name in panels if name.isascii()]
    if not names:
        return
    runs = list(dict.fromkeys(run for name in names for run in panels[name]))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    size = (3.2 * columns + 1, lines * (0.9 + 0.3 * len(runs)))
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        for place, run in enumerate(runs):
            mean, low, high = panels[name].get(run, (None, None, None))
            if mean is not None:
                bounds = None if low is None else [[mean - low], [high - mean]]
                color = GOLDEN if run == golden else PLAIN
                axes.barh(place, mean, xerr=bounds, color=color, height=0.7, error_kw={"capsize": 2, "lw": 1})
        axes.set_title(latin(name), fontsize=10)
        axes.tick_params(labelsize=8)
        axes.set_yticks(range(len(runs)), [latin(run) for run in runs])
    grid[0, 0].invert_yaxis()  # the axes are shared: once turns all of them
    save_figure(figure, path)


def plot_boxes(values: dict[str, list[float]], path: Path, label: str) -> None:
    """A PNG with one horizontal box per run: the middle half, with whiskers from 5 % to 95 % of the texts."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(values)), layout="constrained")
    axes.boxplot(list(values.values()), orientation="horizontal", whis=(5, 95), sym="", widths=0.6)
    axes.set_yticks(range(1, len(values) + 1), [latin(run) for run in values])
    axes.invert_yaxis()
    axes.set_xlabel(f"{label} (box: middle half; whiskers: 5 % to 95 % of the texts)")
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def plot_learning_curve(log_history: list[dict], path: Path, names: dict[str, str]) -> None:
    """A PNG of the logged values `names` (key in the log -> label) over steps; keys that were never logged are left
    out."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in names.items():
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None, markersize=3)
    axes.set_xlabel("step")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_overoptimisation(log: list[dict], path: Path) -> None:
    """A PNG of overoptimisation: the reward of the probe's samples against their KL to the reference and against the
    NLL of held-out answers (Gao et al. 2023, arXiv 2210.10760, figure 1). Where KL or NLL grows fast while the
    reward rises, the model is losing its language. Reads probe/kl, probe/nll and probe/reward of the log;
    numbers at the points are steps. A probe that no reward could judge is left out."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    labels = {"probe/kl": "KL to the reference, nats an answer", "probe/nll": "held-out NLL, nats per character"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        points = [
            (entry[key], entry["probe/reward"], entry["step"]) for entry in log if entry.get("probe/reward") is not None
        ]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", markersize=3)
        for x, y, step in points[:: max(1, len(points) // 6)]:
            axes.annotate(str(step), (x, y), fontsize=7, textcoords="offset points", xytext=(3, 3))
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean reward of the probe")
    save_figure(figure, path)
