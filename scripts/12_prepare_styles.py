"""Labelled dialogue answers to training files: check, split by question, write rows for classifier, SFT, preference and
RL.

The answers to one question all stand in one split, which the question's own text decides: a grown file moves no row,
and a validation question was never seen in training. The labels, their order and their ids come from --labels: a new
style is an entry there and rows.

Reads   --data: a JSON array or JSONL (data/styles/training_data.json), --labels (data/styles/labels.json)
Writes  --output-dir (processed_data/styles): style_, sft_, pref_, prompts_ {train,val,test}.jsonl, labels.json,
        report.json, run.json
Run     python scripts/12_prepare_styles.py
        python scripts/12_prepare_styles.py --balance oversample --augment 2 --target-style 诚实 \\
            --output-dir processed_data/styles_honest
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.settings import UserError, next_command, read_settings, show_path


@dataclass
class Settings:
    # --- data
    task: str = "styles"
    """names the folders below"""
    data: Path = Path("data/styles/training_data.json")
    """labelled rows, JSON array or JSONL"""
    labels: Path = Path("data/styles/labels.json")
    """the labels in the order of their ids"""
    val_share: float = 0.15
    """of the questions"""
    test_share: float = 0.15
    """of the questions"""
    split_salt: str = "styles-77"
    """another one is another split; this one gives the shipped rows' labels even shares"""

    # --- training rows only
    balance: Literal["none", "oversample", "undersample"] = "none"
    """repeat the rarer labels' rows, or drop the others'"""
    augment: int = 0
    """variants per row: a sentence dropped, swapped, or borrowed from the same style"""

    # --- pairs and prompts
    target_style: str = "有帮助"
    """label or its English name: the chosen side of pairs, what RL is to reach"""
    name_style: bool = False
    """prompts say which style is wanted (style control); otherwise the question alone"""

    # --- run
    output_dir: Path = Path("processed_data/{task}")
    """all files of this stage"""
    seed: int = 42
    """of balancing and augmentation"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


FAR = 0.05  # largest difference of a label's share in a split and in all rows without a warning


def distinct_rows(rows: list[dict], path: Path) -> tuple[list[dict], int]:
    """Rows with distinct inputs, and how many were dropped. Raises UserError where one input has two labels."""
    labels: dict[str, str] = {}
    kept = []
    for row in rows:
        if row["input"] not in labels:
            labels[row["input"]] = row["label"]
            kept.append(row)
        elif (earlier := labels[row["input"]]) != row["label"]:
            raise UserError(
                f"{path}: the same input is labelled {earlier} and {row['label']}: {row['input'][:60]!r}; fix: keep one"
            )
    return kept, len(rows) - len(kept)


def main(settings: Settings) -> None:
    from common.evaluation.tables import markdown_table
    from common.jsonl import write_json
    from common.runs import begin_run
    from tasks import styles as task
    from tasks.base import SPLITS, answer, text_id, write_splits
    from tasks.styles.variants import augmented, balanced

    if settings.val_share <= 0 or settings.test_share < 0 or settings.val_share + settings.test_share >= 1:
        raise UserError("--val-share and --test-share must leave a share for training; fix: 0.15 each")
    labels = task.read_labels(settings.labels)  # before an earlier run's files are touched
    names = [label["label"] for label in labels]
    target = next(
        (row["label"] for row in labels if settings.target_style in (row["label"], row["label_english"])), None
    )
    if target is None:
        raise UserError(f"--target-style {settings.target_style}: unknown; fix: one of {', '.join(names)}")
    rows, duplicates = distinct_rows(task.read_rows(settings.data, labels, whole_text=False), settings.data)

    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for row in sorted(rows, key=lambda row: text_id(row["input"])):
        row = {key: row[key] for key in ("input", "label", "label_english")} | {
            "metadata": dict(row.get("metadata", {}))
        }
        split = task.split_of(row["input"], settings.val_share, settings.test_share, settings.split_salt)
        splits[split].append(row)
    for split in ("train", "val"):
        if missing := set(names) - {row["label"] for row in splits[split]}:
            raise UserError(
                f"{settings.data}: no {split} row is {', '.join(sorted(missing))}; fix: add rows, or another "
                "--split-salt"
            )

    inputs = {"data": settings.data, "labels": settings.labels}
    with begin_run(settings.output_dir, settings, inputs, "12_prepare_styles", resumable=False) as run:
        report = {"read": len(rows) + duplicates, "dropped": {"the same row twice": duplicates}, "splits": {}}
        report["labels"] = names
        for split, held in splits.items():
            styled = held
            if split == "train":
                if settings.augment:
                    styled = held + augmented(held, settings.augment, settings.seed)
                if settings.balance != "none":
                    styled = balanced(styled, settings.balance, settings.seed)
            answers: dict[str, dict[str, dict]] = {}  # question -> label -> its first row
            for row in held:
                answers.setdefault(task.question_of(row["input"]), {}).setdefault(row["label"], row)

            def asked(question: str, row: dict, style: str) -> dict:
                ask_for = style if settings.name_style else ""
                scene = str(row["metadata"].get("scene", ""))
                meta = {"id": text_id(f"{question} {ask_for}"), "scene": scene, "style": style}
                return {"prompt": task.messages({"question": question, "ask_for": ask_for}), "meta": meta}

            def said(row: dict) -> list[dict]:
                return answer(task.answer_of(row["input"]))

            files: dict[str, list[dict]] = {"style": styled, "sft": [], "pref": [], "prompts": []}
            for row in held:
                prompt = asked(task.question_of(row["input"]), row, row["label"])
                files["sft"].append({**prompt, "completion": said(row)})
            for question, by_label in answers.items():
                prompt = asked(question, next(iter(by_label.values())), target)
                golden = by_label.get(target)
                reference = task.answer_of(golden["input"]) if golden else None
                files["prompts"].append({**prompt, "meta": {**prompt["meta"], "reference": reference}})
                for label, row in by_label.items():
                    if golden and label != target:
                        meta = {**prompt["meta"], "kind": label}
                        files["pref"].append(
                            {"prompt": prompt["prompt"], "chosen": said(golden), "rejected": said(row), "meta": meta}
                        )
            report["splits"][split] = {
                **write_splits({split: files}, settings.output_dir)[split],
                "questions": len(answers),
                "labels": {name: sum(row["label"] == name for row in held) for name in names},
                "labels written": {name: sum(row["label"] == name for row in styled) for name in names},
                "augmented": Counter(row["metadata"].get("augmented", "no") for row in styled),
            }
        write_json(settings.output_dir / "labels.json", labels)
        write_json(settings.output_dir / "report.json", report)
        run.figure("report", report)

        whole = Counter(row["label"] for row in rows)
        lines = []
        for split, counts in report["splits"].items():
            shares = [f"{n} ({n / max(1, sum(counts['labels'].values())):.1%})" for n in counts["labels"].values()]
            lines.append([split, str(counts["questions"]), *shares])
        lines.append(["all", "", *(f"{whole[name]} ({whole[name] / len(rows):.1%})" for name in names)])
        print(f"read {report['read']} rows, dropped {duplicates} that appear twice")
        print(markdown_table(["split", "questions", *names], lines))
        for split, counts in report["splits"].items():
            held, total = counts["labels"], sum(counts["labels"].values())
            far = [name for name in names if total and abs(held[name] / total - whole[name] / len(rows)) > FAR]
            if far:
                print(
                    f"warning: {', '.join(far)}: over {100 * FAR:.0f} points from the share in all rows, in {split}; "
                    "fix: another --split-salt"
                )
        for split, counts in report["splits"].items():
            print(f"{split}: " + ", ".join(f"{counts[name]} {name}" for name in ("style", "sft", "pref", "prompts")))
        files = {
            name: settings.output_dir / f"style_{split}.jsonl"
            for name, split in (("train_file", "train"), ("validation_file", "val"))
        }
        if show_path(settings.labels) != str(Settings.labels):
            files["labels_file"] = settings.labels
        run.finish(next_command("31_train_style_classifier", **files))


if __name__ == "__main__":
    main(read_settings(Settings))
