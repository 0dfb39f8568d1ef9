"""One file of a user's rows: read, recognised, converted, with what is wrong with it (stage 17)."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from common.preflight.finding import Finding, Refused
from common.settings import UserError
from tasks.chat.dialects import chinese_names, expand
from tasks.chat.labels import scales
from tasks.chat.rows import TABLES, convert, read_cells, read_rows, without_empty


def read_renames(words: tuple[str, ...]) -> dict[str, str]:
    """The words of --rename, OLD=NEW, as {old: new}. Raises UserError."""
    pairs = [word.partition("=") for word in words]
    for word, (old, _, new) in zip(words, pairs, strict=True):
        if not old or not new:
            raise UserError(f"--rename {word}: not OLD=NEW; fix: for example --rename 答案=output")
    names = [old for old, _, _ in pairs]
    if twice := next((old for old in names if names.count(old) > 1), None):
        raise UserError(f"--rename {twice}=...: given twice; fix: one new name for each column")
    return {old: new for old, _, new in pairs}


def read_file(path: Path, renames: dict[str, str], kept: tuple[str, ...]) -> tuple[list, list, dict]:
    """Converted rows of one file, its problems, and what the report says of it.

    renames: column -> the name it is read by. kept: columns that go into meta.
    """
    found, problems = read_rows(path)
    is_table = path.suffix.lower() in TABLES
    rows, named, unknown, aliases = [], [], defaultdict(list), {}
    for line, raw in found:
        names = chinese_names([renames.get(key, key) for key in raw if key not in kept])
        aliases |= names
        names = names | renames
        row = {names.get(key, key): value for key, value in raw.items()}
        if len(row) < len(raw):
            problems.append(Finding(path, line, "--rename gives two columns one name", "rename the other one too"))
            continue
        try:
            named += [(line, without_empty(part) if is_table else part) for part in expand(row)]
        except Refused as refused:
            problems.append(Finding(path, line, *refused.args))
    labels = scales(row for _, row in named)
    for line, raw in named:
        try:
            row = convert(raw, line, kept, labels)
        except Refused as refused:
            problems.append(Finding(path, line, *refused.args))
            continue
        rows.append(row)
        for column in row.unused:
            unknown[column].append(line)
    if is_table:
        read_cells([row.row["meta"] for row in rows], kept)
    formats = Counter(row.format for row in rows)
    if "prompt/completion" in formats and "prompt" in formats:
        fix = "add it, or put prompts for RL into a file of their own"
        problems += [
            Finding(path, row.line, "completion is missing, though other rows of the file have it", fix)
            for row in rows
            if row.format == "prompt"
        ]
        rows = [row for row in rows if row.format != "prompt"]
    if not found and not problems:
        problems.append(Finding(path, 0, "the file holds no rows", "name another file"))
    there = {key for _, raw in found for key in raw}
    for flag, names in (("--rename", set(renames)), ("--keep", set(kept) - {*renames.values(), "category"})):
        for name in sorted(names - there) if found else ():
            print(f"notice: {path.name} has no column {name!r} that {flag} names")
    if aliases:
        print(f"notice: {path.name}: " + ", ".join(f"{old} is read as {new}" for old, new in aliases.items()))
    read = {line for line, _ in found}
    facts = {
        "rows": len(found) + sum(problem.line > 0 for problem in problems if problem.line not in read),
        "formats": dict(Counter(row.format for row in rows)),
        "unknown columns": {name: {"rows": len(lines), "first line": lines[0]} for name, lines in unknown.items()},
    }
    if judged := Counter(row.label for row in rows if row.label):
        facts["labels"] = {"columns": labels} | {word: judged[word] for word in ("good", "bad", "neither")}
    return with_answers(rows), sorted(problems, key=lambda problem: problem.line), facts


def with_answers(rows: list) -> list:
    """Labelled rows, and the good ones among them as SFT rows too; those that are neither good nor bad are left out."""
    found = []
    for row in rows:
        if row.label != "neither":
            found.append(row)
        if row.label == "good":
            answer = {key: dict(value) if key == "meta" else value for key, value in row.row.items() if key != "label"}
            found.append(replace(row, kind="sft", row=answer))
    return found
