"""One picture of a chain: what share of the texts keeps each rule, stage by stage, with 95 % intervals, and the golden
texts as a dashed line. The data stand in a CSV file beside it.

Reads   --report: the run record of stage 72 (compare.run.json)
Writes  --output: a PNG, and its data as CSV
Run     python runs/picture.py --report results/reference/poems/compare.run.json \\
            --output results/reference/poems/chain.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from common.jsonl import read_json  # noqa: E402
from common.settings import UserError, read_settings  # noqa: E402


@dataclass
class Settings:
    report: Path = Path("results/poems/compare.run.json")
    """run record of stage 72"""
    output: Path = Path("results/poems/chain.png")
    """the picture; its data stand beside it as .csv"""
    metrics: tuple[str, ...] = ("form", "rhyme", "meter", "主题相关性=theme")
    """metrics of the report, each as it is called there or NAME=LABEL"""
    runs: tuple[str, ...] = ("base", "sft", "dpo", "dpo_round2", "grpo", "dpo_grpo", "ppo")
    """runs of the report, from left to right; those that are not there are left out"""


def main(settings: Settings) -> None:
    from common.evaluation.plots import GOLDEN, PLAIN, as_label, pyplot, save_figure, whiskers

    table = read_json(settings.report).get("figures", {}).get("table", {})
    runs = [run for run in settings.runs if run in table]
    labels = {name.split("=")[0]: name.split("=")[-1] for name in settings.metrics}
    missing = [name for name in labels if not runs or name not in table[runs[0]]]
    if missing:
        raise UserError(
            f"{settings.report} has no {missing[0]}; fix: --metrics and --runs as the table of stage 72 names them"
        )
    plt = pyplot()
    figure, panels = plt.subplots(1, len(labels), figsize=(2.7 * len(labels), 3), sharey=True, layout="constrained")
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for place, run in enumerate(runs):
            mean, low, high = table[run][name]
            bounds = [[length] for length in whiskers(mean, low, high)]
            axes.errorbar(place, mean, bounds, fmt="o", color=PLAIN, capsize=3, markersize=5)
        if "reference" in table:
            axes.axhline(table["reference"][name][0], color=GOLDEN, linestyle="--", label="golden texts")
        axes.set_title(as_label(label), fontsize=11)
        axes.set_xticks(range(len(runs)), [as_label(run) for run in runs], rotation=60, ha="right", fontsize=8)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(axis="y", alpha=0.3)
    if "reference" in table:
        panels[0].legend(fontsize=8, loc="lower right")
    panels[0].set_ylabel("share of texts")
    rows = [(run, name, *table[run][name]) for run in ("reference", *runs) if run in table for name in labels]
    save_figure(figure, settings.output, ("run", "metric", "mean", "low", "high"), rows)
    print(f"wrote {settings.output}")


if __name__ == "__main__":
    main(read_settings(Settings))
