"""Your own rows to training files: the format is found row by row, every fault named with its line, the split made by
content.

Alpaca (instruction, input, output, history, system), prompt/completion, messages, ShareGPT (conversations), pairs
(chosen, rejected; the prompt may be implicit), prompts alone for RL, and dialects that are found by their columns
(docs/DATA.md lists all); as JSON, JSONL, CSV, TSV or parquet, mixed as you like. Rows with a label (thumbs, true/false,
stars) become kto_ rows, and only good ones SFT rows. Columns that no format knows are listed; --keep carries them into
meta. A faulty row stops the stage, or with --skip-bad is left out and counted.

Reads   --files (data/chat: sft.json, pairs.jsonl, prompts.jsonl)
Writes  --output-dir (processed_data/chat): sft_, pref_, prompts_, kto_ {train,val,test}.jsonl of the rows there are,
        report.json, run.json
Run     python scripts/17_prepare_chat.py
        python scripts/17_prepare_chat.py --files mine.json --output-dir processed_data/mine
        python scripts/17_prepare_chat.py --files faq.csv --rename 问题=instruction 答案=output \\
            --output-dir processed_data/faq
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.long_rows import LongRowsPolicy
from common.preflight.finding import Finding
from common.settings import UserError, next_command, read_settings, resolve_model, show_path, unused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = ("sft.json", "pairs.jsonl", "prompts.jsonl")


@dataclass
class Settings:
    # --- data
    task: str = "chat"
    """writing job: names the folder below"""
    files: tuple[Path, ...] = tuple(Path("data/chat") / name for name in SHIPPED)
    """sources, mixed as you like"""
    rename: tuple[str, ...] = ()
    """columns under other names, as OLD=NEW"""
    keep: tuple[str, ...] = ("category",)
    """further columns that go into meta"""
    skip_bad: bool = False
    """leave faulty rows out and count them, instead of stopping; also those that stages 19 and 20 refuse"""
    model: str = "data/tiny_qwen3"
    """with --skip-bad and --long-rows: whose tokenizer and chat template the rows have to fit"""
    max_length: int = 512
    """with --skip-bad and --long-rows: tokens, prompt and answer, as in the training stage"""
    long_rows: LongRowsPolicy | None = None
    """rows over max_length: refuse, drop, or cut at whole turns; None = not measured here, stage 19 does"""

    # --- splits: by a hash of the question, so that a grown file moves no row
    group_by: str = "answer"
    """what goes to one split together: answer (rows of one question or one answer), prompt (of one question), none, or
    a column"""
    val_share: float = 0.1
    """of the groups: for early stopping and choices"""
    test_share: float = 0.1
    """of the groups: for published figures"""
    held_out: float | None = None
    """both shares together, half for each; 0 = everything is for training, no val and test files"""

    # --- run
    output_dir: Path = Path("processed_data/{task}")
    """all files of this stage"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""

    def clashes(self):
        if not (self.skip_bad or self.long_rows):
            yield from unused(self, "without --skip-bad and --long-rows", "model", "max_length")
        yield from unused(self, "with --held-out", *(("val_share", "test_share") if self.held_out is not None else ()))


KINDS = ("sft", "pref", "prompts", "kto")
GROUPINGS = ("answer", "prompt", "none")


def kept_columns(settings: Settings) -> tuple[str, ...]:
    """The columns that go into meta: those of --keep, and the one that --group-by names."""
    more = () if settings.group_by in GROUPINGS or settings.group_by in settings.keep else (settings.group_by,)
    return settings.keep + more


def fit(
    of_kinds: dict[str, list[dict]], settings: Settings, tokenizer: PreTrainedTokenizerBase, origins: dict
) -> dict[str, dict]:
    """Make the rows fit max_length by the policy, in place; kind -> what was done. Raises DataError with refuse."""
    from common.jsonl import DataError
    from common.long_rows import fit_rows
    from tasks.chat.rows import SCHEMAS

    found, problems, lines = {}, [], []
    for kind, rows in of_kinds.items():
        fitting, long = fit_rows(rows, SCHEMAS[kind], tokenizer, settings.max_length, settings.long_rows)
        lines.append(f"{kind}: {long.sentence()}")
        if settings.long_rows == "refuse":
            fix = f"--long-rows drop, or cut, or --max-length {long.length_for_99} (keeps 99 %)"
            reason = f"{kind}: the row is longer than {settings.max_length} tokens"
            problems += [Finding(*origins[id(rows[place])], reason, fix) for place in long.long]
        places = {id(row["meta"]): origins[id(row)] for row in rows}  # a row that was cut keeps its meta
        origins |= {id(row): places[id(row["meta"])] for row in fitting}
        of_kinds[kind], found[kind] = fitting, long.as_dict()
    print("\n".join(lines))
    if problems:
        raise DataError(problems)
    if not any(of_kinds.values()):
        raise UserError(f"no row fits --max-length {settings.max_length}; fix: raise it, or shorten the rows")
    return found


def as_files(splits: dict[str, list[dict]]) -> None:
    """Rows of one kind as they are written: in an order that comes from the rows, with one schema of meta for all
    files."""
    columns = dict.fromkeys(key for part in splits.values() for row in part for key in row["meta"])
    for part in splits.values():
        part.sort(key=lambda row: str(row["meta"]["id"]))  # the first n are a fair sample
        for row in part:
            row["meta"] = {key: row["meta"].get(key) for key in columns}


def drop_refused(
    splits: dict[str, list[dict]], kind: str, settings: Settings, tokenizer: PreTrainedTokenizerBase, origins: dict
) -> list:
    """Leave out the rows that the training stages would refuse; one finding for each, at its place in the source."""
    from common.preflight.checks import drop_refused
    from common.preflight.data import Data, File
    from common.preflight.files import CHECKS
    from tasks.chat.rows import SCHEMAS

    parts = (("train", splits["train"]), ("val", splits["val"] + splits["test"]))
    files = [File(name, Path(name), list(enumerate(part, start=1))) for name, part in parts]
    known = {file.name: dict(file.rows) for file in files}
    findings = drop_refused(Data(files, SCHEMAS[kind], tokenizer, settings.max_length), CHECKS)
    left = {id(row) for file in files for _, row in file.rows}
    for part in splits.values():
        part[:] = [row for row in part if id(row) in left]

    def source(name: str, line: int) -> tuple[Path, int]:
        return origins[id(known[name][line])]

    def with_source(found: Finding):  # the checks number the rows that they were given
        name = str(found.file)
        reason = re.sub(
            r"(train )?line (\d+)", lambda m: "{}:{}".format(*source(m[1] and "train" or name, int(m[2]))), found.reason
        )
        return replace(found, reason=reason).at(*source(name, found.line))

    return list(map(with_source, findings))


def main(settings: Settings) -> None:
    from common.conversations import thinks
    from common.jsonl import DataError, write_json, write_jsonl
    from common.models import load_tokenizer
    from common.runs import begin_run
    from tasks.chat.dialects import MAPPINGS
    from tasks.chat.files import read_file, read_renames
    from tasks.chat.splits import split_groups

    val_share, test_share = settings.val_share, settings.test_share
    if settings.held_out is not None:
        val_share = test_share = settings.held_out / 2
    if min(val_share, test_share) < 0 or val_share + test_share >= 1:
        flags = "--val-share and --test-share" if settings.held_out is None else "--held-out"
        raise UserError(f"{flags} must be 0 or more, and less than 1 together; fix: for example .1 and .1, .2 together")
    if not settings.files:
        raise UserError("--files names no file; fix: --files mine.json")
    if twice := [path for path, count in Counter(map(os.path.realpath, settings.files)).items() if count > 1]:
        raise UserError(f"--files names {show_path(twice[0])} twice; fix: name it once")
    renames = read_renames(settings.rename)
    rows, problems, report, origins = [], [], {"files": {}, "dropped": {"faulty": {}}, "splits": {}}, {}
    for path in settings.files:  # before an earlier run's files are touched
        converted, faults, facts = read_file(path, renames, kept_columns(settings))
        rows += converted
        origins |= {id(row.row): (path, row.line) for row in converted}
        problems += faults
        report["files"][show_path(path)] = facts
    fatal = [problem for problem in problems if problem.line == 0 or not settings.skip_bad]
    if fatal or not rows:
        raise DataError(fatal or problems)
    if settings.group_by not in GROUPINGS and not any(row.row["meta"].get(settings.group_by) for row in rows):
        unknown = (name for facts in report["files"].values() for name in facts["unknown columns"])
        known = ", ".join(dict.fromkeys([*GROUPINGS, *unknown]))
        raise UserError(f"--group-by {settings.group_by}: no row has such a column; fix: {known}")
    measured = settings.skip_bad or settings.long_rows
    tokenizer = load_tokenizer(resolve_model(settings.model, settings.task)) if measured else None
    of_kinds = {kind: [row.row for row in rows if row.kind == kind] for kind in KINDS}
    of_kinds = {kind: of_kind for kind, of_kind in of_kinds.items() if of_kind}
    if settings.long_rows:
        report["long rows"] = fit(of_kinds, settings, tokenizer, origins)
        of_kinds = {kind: of_kind for kind, of_kind in of_kinds.items() if of_kind}

    inputs = {f"file {number}": path for number, path in enumerate(settings.files, start=1)}
    with begin_run(settings.output_dir, settings, inputs, "17_prepare_chat", resumable=False) as run:
        for name, facts in report["files"].items():
            print(f"{name}: {facts['rows']} rows, " + ", ".join(f"{n} {what}" for what, n in facts["formats"].items()))
            for name in facts["formats"]:
                print(f"  {name}: {MAPPINGS[name]}")
            for column, where in facts["unknown columns"].items():
                place = f"in {where['rows']} rows, first at line {where['first line']}"
                hint = "" if "[]" in column else f"; --keep {column} carries it into meta"
                print(f"  unknown column {column!r} {place}: left out{hint}")
            if "labels" in facts:
                counts = ", ".join(f"{facts['labels'][word]} {word}" for word in ("good", "bad", "neither"))
                print(
                    f"  labels in {', '.join(facts['labels']['columns'])}: {counts}; neither is left out, good is SFT "
                    "too"
                )
        split_rows, dropped = split_groups(of_kinds, settings.group_by, val_share, test_share)
        for kind, splits in split_rows.items():
            as_files(splits)
            report["dropped"][kind] = dropped[kind]
            if settings.skip_bad:
                problems += drop_refused(splits, kind, settings, tokenizer, origins)
            report["splits"][kind] = {split: len(part) for split, part in splits.items()}
            for split, part in splits.items():
                if part:
                    write_jsonl(settings.output_dir / f"{kind}_{split}.jsonl", part)
                elif {"train": 1, "val": val_share, "test": test_share}[split]:
                    few = f"{len(of_kinds[kind])} rows in few groups; raise its share, or --held-out 0"
                    print(f"warning: no {kind} row fell into {split}: {few}")
            print(f"{kind}: " + ", ".join(f"{count} {split}" for split, count in report["splits"][kind].items()))
        for problem in problems[:20]:
            print(f"  left out: {problem}")
        report["dropped"]["faulty"] = Counter(
            re.sub(r" \(likeness.*", "", re.sub(r"\S+:\d+", "another row", problem.reason)) for problem in problems
        )
        for kind, reasons in report["dropped"].items():
            for reason, count in reasons.items():
                print(f"  dropped {count:5d}  {kind}: {reason}")
        write_json(settings.output_dir / "report.json", report)
        run.figure("report", report)
        kind, counts = next(iter(report["splits"].items()))
        files = {s: settings.output_dir / f"{kind}_{s}.jsonl" if counts[s] else None for s in ("train", "val")}
        flags = {"task": settings.task, "train_file": files["train"], "val_file": files["val"]}
        flags |= {name: getattr(settings, name) for name in ("model", "max_length") if measured}
        if any(thinks(row[key][-1]) for row in of_kinds[kind] for key in ("completion", "chosen") if key in row):
            flags["enable_thinking"] = True
        run.finish(next_command("19_check_data", **flags))


if __name__ == "__main__":
    main(read_settings(Settings))
