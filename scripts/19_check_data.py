"""Check training files before a run: what would waste it, with line, reason and fix.

Schema, encoding, roles, empty and equal texts, damaged and personal texts, copies and near-copies within and between
the files, languages, what the surface of pairs gives away, token counts, answers that lose their end at --max-length,
and whether tokenizer and model folder can teach a model to stop. The training stages call the quick ones of these
checks themselves; docs/CHECKS.md lists them all. The preview shows rows with the tokens that are trained in colour:
those checked, and a few of the other kinds beside them. Exit code 0: no errors; 1: errors; 2: the check itself could
not run.

Reads   processed_data/{task}/sft_train.jsonl, sft_val.jsonl (stages 10-17), the tokenizer of --model
Writes  results/{task}/mask_preview.html, and with --report one JSON file with every finding and figure
Run     python scripts/19_check_data.py
        python scripts/19_check_data.py --train-file mine.jsonl --val-file None --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.settings import UserError, next_command, read_settings, resolve_model, show_path, unused
from common.training.loss_masks import RowStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.preflight.data import Report


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    train_file: Path = Path("processed_data/{task}/sft_train.jsonl")
    """rows to learn from"""
    val_file: Path | None = Path("processed_data/{task}/sft_val.jsonl")
    """held-out rows, None = there are none"""
    model: str = "data/tiny_qwen3"
    """whose tokenizer counts: a folder or a hub id"""
    schema: Literal["auto", "sft", "preference", "kto", "prompts", "style", "text"] = "auto"
    """auto: by file name, else by keys"""
    max_length: int = 512
    """tokens, prompt and answer, as in the training stage"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    row_style: RowStyle = "prompt"
    """of SFT rows in the preview, as in stage 20"""
    allow: tuple[str, ...] = ()
    """names of checks whose findings are as they should be, e.g. html-tag"""

    # --- run
    preview: Path | None = Path("results/{task}/mask_preview.html")
    """replaced by each check; None = no page"""
    preview_rows: int = 6
    """rows shown of each file"""
    report: Path | None = None
    """JSON file for all findings; a report from an earlier check is replaced"""

    def clashes(self):
        if self.preview is None:
            yield from unused(self, "with --preview None", "preview_rows")


def print_findings(report: Report) -> None:
    """One line a kind: level, count, name, first place, reason, fix."""
    rows = [("level", "count", "check", "first at", "reason", "fix")]
    rows += [(g[0].level, str(len(g)), g[0].check or "-", g[0].place, g[0].reason, g[0].fix) for g in report.groups()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    widths.append(min(70, max(len(row[4]) for row in rows)))  # a long reason pushes its own fix only
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)), row[5]]))
    print("--allow NAME ... switches checks off by the name in the third column")


def print_figures(report: Report, max_length: int) -> None:
    for name, figures in report.figures.items():
        print(f"\n{name}: {figures['rows']} rows")
        for part, counts in figures["tokens"].items():
            print(f"  tokens in {part:<7}" + "".join(f"{key:>5} {value:<5}" for key, value in counts.items()))
        if "all_tokens" in figures:  # documents: stage 20 splits what is longer than max_length
            print(f"  {figures['all_tokens']} tokens in all; documents are packed, and longer ones split")
            continue
        shares = f"{figures['share_truncated']:.2%} truncated, {figures['share_losing_eos']:.2%} losing eos"
        silent = f"{figures['rows_without_trained_token']} rows with no trained token"
        print(f"  at max_length {max_length}: {shares}, {silent}")


def print_measures(measures: dict) -> None:
    for name, figures in measures.items():
        print(f"\n{name.replace('_', ' ')}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))


def check_output_paths(report: Path | None, preview: Path | None) -> None:
    """Only a report and a preview of this stage may be replaced."""
    from common.jsonl import read_bytes, read_json

    old = read_json(report) if report and report.exists() else {"findings": []}
    if not isinstance(old, dict) or "findings" not in old:
        raise UserError(f"{report} is not a report of this stage; fix: name another --report")
    mark = b'<meta name="generator" content="19_check_data">'
    if preview and preview.exists() and mark not in read_bytes(preview)[:1000]:
        raise UserError(f"{preview} is not a preview of this stage; fix: name another --preview")


def open_tokenizer(model: str, schema: str):
    """The tokenizer as the training stages load it; as it stands in the folder where they would refuse it, so that the
    checks say why."""
    from transformers import AutoTokenizer

    from common.models import load_tokenizer

    try:
        return load_tokenizer(model, documents=schema == "text")
    except UserError as refused:
        try:
            return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except Exception:
            raise refused from None


def text_length(row: dict) -> int:
    """Characters of everything that is tokenized."""
    from common.conversations import turn_text

    if "text" in row:
        return len(row["text"])
    turns = [turn for key in ("prompt", "completion", "chosen", "rejected") for turn in row.get(key, [])]
    return len(row.get("input", "")) + sum(len(turn_text(turn)) for turn in turns)


def write_preview(settings: Settings, schema: str, tokenizer: PreTrainedTokenizerBase) -> None:
    from common.preflight.checks import FILE_NAMES, read_rows
    from common.preflight.data import File
    from common.preflight.mask_preview import make_sections, write_page

    files = {settings.train_file: schema}
    if settings.train_file.name.endswith("_train.jsonl"):  # the other kinds of rows beside it
        names = {settings.train_file.with_name(f"{word}_train.jsonl"): kind for word, kind in FILE_NAMES.items()}
        files |= {path: kind for path, kind in names.items() if path.is_file() and path not in files}
    samples = []
    for path, kind in files.items():
        file = File("train", path)
        read_rows(file, kind)
        count = min(settings.preview_rows, len(file.rows))
        chosen = [file.rows[i * len(file.rows) // count] for i in range(count)]  # evenly through the file
        if chosen and (longest := max(file.rows, key=lambda row: text_length(row[1]))) not in chosen:
            chosen[-1] = longest
        samples.append((show_path(path), kind, chosen))
    thinking = "on" if settings.enable_thinking else "off"
    notes = [
        (
            f"Tokenizer {settings.model}, max_length {settings.max_length}, row style {settings.row_style}, thinking "
            f"{thinking}."
        ),
        "Rows are taken evenly from each file; the last one is its longest. A line end is shown as ⏎, a special "
        "token in a frame; the pointer shows ids.",
    ]
    sections = make_sections(samples, tokenizer, settings.max_length, settings.enable_thinking, settings.row_style)
    write_page(settings.preview, f"What is trained: {settings.task}", notes, sections)
    print(f"\npreview: {show_path(settings.preview)}")


def following(settings: Settings, schema: str) -> str:
    """The command that trains on these files, with everything that was checked."""
    stages = {"sft": "20_train_sft", "text": "20_train_sft", "kto": "41_train_kto"}
    stages |= {"preference": "40_train_dpo", "prompts": "50_train_grpo"}
    stage = stages.get(schema, "31_train_style_classifier")
    flags = {"task": settings.task, "train_file": settings.train_file}
    if schema != "prompts":  # stage 50 reads SFT rows there
        flags["validation_file" if schema == "style" else "val_file"] = settings.val_file
    # stages 40 and 50 begin with the merged model of stage 22, unless a model was named here
    if schema in ("sft", "text") or settings.model != Settings.model:
        flags["model_name_or_path" if schema == "style" else "model"] = settings.model
    flags["max_length"] = settings.max_length
    if settings.enable_thinking and schema != "style":
        flags["enable_thinking"] = True
    if schema == "sft" and settings.row_style != Settings.row_style:
        flags["row_style"] = settings.row_style
    if settings.allow and schema != "style":
        flags["allow"] = settings.allow
    return next_command(stage, **flags)


def main(settings: Settings) -> None:
    from common.jsonl import write_json
    from common.preflight.checks import check_rows, detect_schema
    from common.preflight.data import PLAIN
    from common.preflight.files import CHECKS
    from common.preflight.tokenizers import check_model_files

    check_output_paths(settings.report, settings.preview)
    model = resolve_model(settings.model, settings.task)
    schema = detect_schema(settings.train_file) if settings.schema == "auto" else settings.schema
    tokenizer = open_tokenizer(model, schema)
    report = check_rows(
        settings.train_file,
        settings.val_file,
        schema,
        tokenizer,
        settings.max_length,
        settings.enable_thinking,
        more_checks=CHECKS,
        allow=settings.allow,
    )
    faults = check_model_files(model, settings.max_length) if schema != "text" else []
    faults = [found.at(show_path(model), 0) for found in faults]
    report.findings += [found for found in faults if found.check not in settings.allow]
    print(f"schema {report.schema}, tokenizer {settings.model}")
    if report.findings:
        print_findings(report)
    print_figures(report, settings.max_length)
    print_measures(report.measures)
    if settings.report:
        write_json(settings.report, {"stage": "19_check_data", "max_length": settings.max_length, **report.as_dict()})
    if settings.preview and (tokenizer.chat_template or report.schema in PLAIN):
        write_preview(settings, report.schema, tokenizer)

    counts = report.as_dict()["counts"]
    print("\n" + ", ".join(f"{count} {level}s" for level, count in counts.items()))
    if report.errors:
        sys.exit(1)
    print(f"next: {following(settings, report.schema)}")


if __name__ == "__main__":
    main(read_settings(Settings))
