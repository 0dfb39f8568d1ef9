"""Check training files before a run: what would waste it, with line, reason and mend.

Schema, encoding, roles, empty and equal texts, duplicates, rows shared by train and val, token counts, answers that
lose their end at --max-length, and whether the tokenizer can teach a model to stop. The training stages call the same
checks; docs/CHECKS.md lists them.
Exit code 0: no errors; 1: errors; 2: the check itself could not run.

Reads   processed_data/{task}/sft_train.jsonl, sft_val.jsonl (stages 10-17), the tokenizer of --model
Writes  nothing, or with --report one JSON file with every finding and figure
Run     python scripts/19_check_data.py
        python scripts/19_check_data.py --train-file mine.jsonl --val-file None --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.settings import UserError, read_settings, resolve_model


@dataclass
class Settings:
    # --- what
    task: str = "poems"  # writing job: names the folders below
    train_file: Path = Path("processed_data/{task}/sft_train.jsonl")  # rows to learn from
    val_file: Path | None = Path("processed_data/{task}/sft_val.jsonl")  # held-out rows, None = there are none
    model: str = "data/tiny_qwen3"  # whose tokenizer counts: a folder or a hub id
    schema: Literal["auto", "sft", "preference", "prompts", "style"] = "auto"  # auto: by file name, else by keys
    max_length: int = 512  # tokens, prompt and answer, as in the training stage
    enable_thinking: bool = False  # passed to the chat template of models that think

    # --- run
    report: Path | None = None  # JSON file for all findings; a report from an earlier check is replaced


def print_findings(report) -> None:
    """One line a kind: level, count, first place, reason, mend."""
    rows = [("level", "count", "first at", "reason", "mend")]
    rows += [(g[0].level, str(len(g)), g[0].place, g[0].reason, g[0].mend) for g in report.groups()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    widths.append(min(70, max(len(row[3]) for row in rows)))  # a long reason pushes its own mend only
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]]))


def print_figures(report, max_length: int) -> None:
    for name, figures in report.figures.items():
        print(f"\n{name}: {figures['rows']} rows")
        for part, counts in figures["tokens"].items():
            print(f"  tokens in {part:<7}" + "".join(f"{key:>5} {value:<5}" for key, value in counts.items()))
        shares = f"{figures['share_truncated']:.2%} truncated, {figures['share_losing_eos']:.2%} losing eos"
        silent = f"{figures['rows_without_trained_token']} rows with no trained token"
        print(f"  at max_length {max_length}: {shares}, {silent}")


def check_report_path(path: Path) -> None:
    """Only a report may be replaced."""
    from common.jsonl import read_json

    if path.exists() and (path.is_dir() or "findings" not in read_json(path)):
        raise UserError(f"{path} is not a report of this stage; mend: name another --report")


def main(settings: Settings) -> None:
    from common.checks import check_rows
    from common.jsonl import write_json
    from common.models import load_tokenizer

    if settings.report:
        check_report_path(settings.report)
    tokenizer = load_tokenizer(resolve_model(settings.model, settings.task))
    report = check_rows(
        settings.train_file,
        settings.val_file,
        settings.schema,
        tokenizer,
        settings.max_length,
        settings.enable_thinking,
    )
    print(f"schema {report.schema}, tokenizer {settings.model}")
    if report.findings:
        print_findings(report)
    print_figures(report, settings.max_length)
    if settings.report:
        write_json(settings.report, {"stage": "19_check_data", "max_length": settings.max_length, **report.as_dict()})

    counts = report.as_dict()["counts"]
    print("\n" + ", ".join(f"{count} {level}s" for level, count in counts.items()))
    if report.errors:
        sys.exit(1)
    next_stage = {"sft": "20_train_sft", "preference": "40_train_dpo", "prompts": "50_train_grpo"}
    next_stage["style"] = "31_train_style_classifier"
    print(f"next: python scripts/{next_stage[report.schema]}.py --task {settings.task}")


if __name__ == "__main__":
    main(read_settings(Settings))
