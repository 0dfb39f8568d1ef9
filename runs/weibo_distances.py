"""How far the texts of each run lie from what people write: lengths, punctuation, emoticons, with intervals.

A distance is the total variation distance of two shares (tasks/weibo: CLASSES): 0 the same, 1 nothing in common. Its
interval is from 1,000 draws of prompts and of people's comments, with replacement; small sets lie apart by chance, so
the line "people, training rows" shows how near two sets of people come. The ratio is paired: one draw of prompts for a
run and for --base.

Reads   --generations: folder of stage 60; --people, --train: SFT rows of stage 11, held out and trained on
Writes  --output: a Markdown table
Run     python runs/weibo_distances.py --generations results/weibo/generations --output results/weibo/distances.md \\
            --people processed_data/weibo/sft_val.jsonl processed_data/weibo/sft_test.jsonl \\
            --train processed_data/weibo/sft_train.jsonl
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.evaluation.statistics import sorted_unique  # noqa: E402
from common.evaluation.tables import interval, markdown_table, sampling_notes  # noqa: E402
from common.jsonl import read_jsonl, write_bytes  # noqa: E402
from tasks.weibo import CLASSES  # noqa: E402

DRAWS, SEED = 1000, 0


def counts(texts: list[str], clusters: list, classes: Callable[[str], list[str]], names: list) -> np.ndarray:
    """[clusters, classes]: how often each class comes in the texts of a cluster."""
    order = {cluster: row for row, cluster in enumerate(sorted_unique(clusters))}
    places = {name: column for column, name in enumerate(names)}
    table = np.zeros((len(order), len(names)))
    for text, cluster in zip(texts, clusters, strict=True):
        for name in classes(text):
            table[order[cluster], places[name]] += 1
    return table


def distances(table: np.ndarray, people: np.ndarray, draws: np.ndarray, of_people: np.ndarray) -> np.ndarray:
    """[1 + draws]: the distance as it is, then over each draw of clusters."""
    shares = []
    for part, drawn in ((table, draws), (people, of_people)):
        sums = np.stack([part.sum(0), *(part[rows].sum(0) for rows in drawn)])  # [1 + draws, classes]
        shares.append(sums / sums.sum(1, keepdims=True))
    return np.abs(shares[0] - shares[1]).sum(1) / 2


def estimate(values: np.ndarray) -> tuple[float, float, float]:
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("generations", "train", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--people", type=Path, nargs="+", required=True)
    parser.add_argument("--base", default="base", help="run that the others are divided by")
    arguments = parser.parse_args()

    files = sorted(arguments.generations.glob("*.jsonl"))
    sets = {}  # name -> (texts, clusters)
    for file in files:
        rows = read_jsonl(file, "generation")
        sets[file.stem] = [row["completion"] for row in rows], [row["prompt_id"] for row in rows]
    trained, people = (
        [row["completion"][-1]["content"] for path in paths for row in read_jsonl(path, "sft")]
        for paths in ([arguments.train], arguments.people)
    )
    sets["people, training rows"] = trained, list(range(len(trained)))
    rng = np.random.default_rng(SEED)
    of_people = rng.integers(0, len(people), (DRAWS, len(people)))
    draws = {}  # clusters -> the same draws for every run on the same prompts
    cells = {name: [f"{len(texts)}"] for name, (texts, _) in sets.items()}
    for classes in CLASSES.values():
        names = sorted(
            {c for texts in (people, *(t for t, _ in sets.values())) for text in texts for c in classes(text)}
        )
        human = counts(people, list(range(len(people))), classes, names)
        found = {}
        for name, (texts, clusters) in sets.items():
            key = tuple(sorted_unique(clusters))
            if key not in draws:
                draws[key] = np.random.default_rng(SEED).integers(0, len(key), (DRAWS, len(key)))
            found[name] = distances(counts(texts, clusters, classes, names), human, draws[key], of_people)
        for name, values in found.items():
            cells[name].append(interval(estimate(values)))
            if arguments.base in found and name != arguments.base and name in {file.stem for file in files}:
                cells[name].append(interval(estimate(values / found[arguments.base])))
            else:
                cells[name].append("–")
    header = ["run", "texts"]
    for name in CLASSES:
        header += [name.replace("_", " "), f"times {arguments.base}"]
    table = markdown_table(header, [[name, *row] for name, row in cells.items()])
    notes = [f"People: {len(people)} held-out comments.", *sampling_notes(files)]
    write_bytes(arguments.output, ("\n\n".join([table, *notes]) + "\n").encode())
    print("\n".join([table, *notes]))


if __name__ == "__main__":
    main()
