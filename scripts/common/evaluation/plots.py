"""Plots of several runs side by side, each with its data in a CSV file beside it. Chinese labels need a font that has
them; where there is none, a panel with a Chinese name is left out and a notice says so."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from common.evaluation.calibration import Bin
from common.jsonl import atomic_path, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOLDEN, PLAIN = "#c9a227", "#4878a8"
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "SimHei")
CHINESE_FONTS += ("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Heiti TC", "Arial Unicode MS", "Noto Sans CJK JP")


def pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing to files only, with a Chinese font where the machine has one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["font.family"] = [*filter(None, [chinese_font()]), "DejaVu Sans"]
    plt.rcParams["axes.unicode_minus"] = False
    return plt


@cache
def chinese_font() -> str | None:
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    return next((name for name in CHINESE_FONTS if name in there), None)


def as_label(name: str) -> str:
    """A name as a label: as it is where a font can draw it, else in ASCII."""
    shown = name if chinese_font() else name.encode("ascii", "replace").decode()
    return shown.replace("_", " ").replace("$", r"\$")


def save_figure(figure: Figure, path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """As a PNG, whole or not at all, and its data as a CSV file of the same name (UTF-8 with a mark, for Excel)."""
    with atomic_path(path) as tmp:
        figure.savefig(tmp, dpi=110, format="png")
    pyplot().close(figure)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    write_bytes(path.with_suffix(".csv"), table.getvalue().encode("utf-8-sig"))


def draw_reliability(axes: Axes, bins: Sequence[Bin], lowest: float, label: str) -> None:
    """How often a model is right against how sure it says it is, the number of answers at each point. bins: see
    common/evaluation/calibration.py."""
    axes.plot([lowest, 1], [lowest, 1], color="0.7", linestyle="--", label="calibrated")
    axes.plot([bin.confidence for bin in bins], [bin.accuracy for bin in bins], marker="o", label=label)
    for bin in bins:
        axes.annotate(str(bin.count), (bin.confidence, bin.accuracy), textcoords="offset points", xytext=(4, -12))


def whiskers(mean: float, low: float, high: float) -> tuple[float, float]:
    """Lengths of an error bar below and above. The mean of equal values may lie a rounding outside its own bounds."""
    return max(0.0, mean - low), max(0.0, high - mean)


def plot_bars(
    panels: dict[str, dict[str, Sequence[float | None]]], path: Path, golden: str = "", lower: Sequence[str] = ()
) -> bool:
    """A PNG with one panel per metric: panels[metric][run] = (mean, low, high), bounds may be None. The run called
    `golden` has a colour of its own. Metrics that are 0, or unknown, for every run are left out; of those in `lower`
    less is better. False: nothing was left to draw."""
    shown = {name: runs for name, runs in panels.items() if any(figure[0] for figure in runs.values())}
    names = [name for name in shown if name.isascii() or chinese_font()]
    if len(names) < len(shown):
        left = ", ".join(name for name in shown if name not in names)
        print(f"notice: no Chinese font is installed: no panel for {left}; fix: install one, such as fonts-noto-cjk")
    if not names:
        return False
    plt = pyplot()
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
                bounds = None if low is None else [[length] for length in whiskers(mean, low, high)]
                color = GOLDEN if run == golden else PLAIN
                axes.barh(place, mean, xerr=bounds, color=color, height=0.7, error_kw={"capsize": 2, "lw": 1})
        axes.set_title(as_label(name) + (" (less is better)" if name in lower else ""), fontsize=10)
        axes.tick_params(labelsize=8)
        axes.set_yticks(range(len(runs)), [as_label(run) for run in runs])
    grid[0, 0].invert_yaxis()  # the axes are shared: once turns all of them
    rows = [(name, run, *panels[name][run]) for name in panels for run in panels[name]]
    save_figure(figure, path, ("metric", "run", "mean", "low", "high"), rows)
    return True


def plot_boxes(values: dict[str, list[float]], path: Path, label: str) -> None:
    """A PNG with one horizontal box per run: the middle half, with whiskers from 5 % to 95 % of the texts."""
    import numpy as np

    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(values)), layout="constrained")
    axes.boxplot(list(values.values()), orientation="horizontal", whis=(5, 95), sym="", widths=0.6)
    axes.set_yticks(range(1, len(values) + 1), [as_label(run) for run in values])
    axes.invert_yaxis()
    axes.set_xlabel(f"{label} (box: middle half; whiskers: 5 % to 95 % of the texts)")
    axes.grid(axis="x", alpha=0.3)
    shares = (5, 25, 50, 75, 95)
    rows = [(run, len(texts), *np.percentile(texts, shares)) for run, texts in values.items()]
    save_figure(figure, path, ("run", "texts", *(f"{share} %" for share in shares)), rows)


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
    rows = [(e["step"], *(e.get(key, "") for key in names)) for e in log_history if any(key in e for key in names)]
    save_figure(figure, path, ("step", *names), rows)


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
    keys = ("step", *labels, "probe/reward")
    save_figure(figure, path, keys, [[e.get(key, "") for key in keys] for e in log if "probe/reward" in e])
