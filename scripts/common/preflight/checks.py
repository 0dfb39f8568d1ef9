"""Checks of training files and of the tokenizer, before a model is loaded: what would waste the run.

Stage 19 prints the whole report; the training stages call the same checks and stop on errors:

    require_clean_files(settings, tokenizer, "sft", settings.train_file, settings.val_file)

A new check is one function (Data) -> findings, added to CHECKS of common/preflight/rows.py, or of
common/preflight/files.py if it costs seconds: those only stage 19 makes. common/preflight/texts.py says what a single
text must not hold, common/preflight/tokenizers.py what a tokenizer must do.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.conversations import render
from common.jsonl import MAX_DOCUMENT_BYTES, read_array, scan_jsonl
from common.preflight.data import ANSWERS, PLAIN, Check, Data, File, Length, Report
from common.preflight.finding import Finding, list_findings
from common.preflight.rows import CHECKS
from common.preflight.tokenizers import check_tokenizer
from common.schemas import validate_row
from common.settings import UserError, show_path

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from common.training.options import AdapterSettings

CHUNK = 1000  # rows tokenized at once
FILE_NAMES = {name: name for name in ("sft", "kto", "prompts", "style")} | {"pref": "preference", "styles": "style"}
NAMES = re.findall(  # every name that a finding may have, for --allow
    r"[\w-]+",
    """broken-off chat-template classes contradiction control-character copy eos-token equal-pair error-message escape
    exchanged group-leak html-entity html-tag identity-card invisible-character labels language leak line-separator
    lookalike loop lost-character mail-address meta-keys missing-value mobile-number model-files mojibake near-copy
    no-word one-answer pad-token placeholder private-use refusal repeats-prompt role-label short-answer
    special-token surface template-loses template-markup thinking too-long unknown-token white-space""",
)


def check_rows(
    train_file: Path | str,
    val_file: Path | str | None,
    schema: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    enable_thinking: bool = False,
    allow: Sequence[str] = (),
    more_checks: Sequence[Check] = (),
) -> Report:
    """Check the files of one training stage, tokenized as that stage does it.

    `schema` is sft, preference, kto, prompts, style, or auto (see detect_schema). A file that is missing or broken is
    a finding like any other; rows with errors are left out of the later checks and of the figures. `more_checks` run
    after those of CHECKS. Findings whose name is in `allow` are left out and counted. Raises UserError for a name that
    there is not.
    """
    if unknown := [name for name in allow if name not in NAMES]:
        raise UserError(f"--allow {' '.join(unknown)}: no such check; fix: one of {', '.join(NAMES)}")
    paths = {"train": Path(train_file)} | ({"val": Path(val_file)} if val_file else {})
    if schema == "auto":
        schema = detect_schema(paths["train"])
    if schema not in ANSWERS:
        raise ValueError(f"unknown schema {schema!r}: auto or one of {', '.join(ANSWERS)}")

    findings, files = [], []
    for name, path in paths.items():
        file = File(name, path)
        findings += read_rows(file, schema)
        files.append(file)
    data = Data(files, schema, tokenizer, max_length, enable_thinking, _context(tokenizer))
    name = show_path(tokenizer.name_or_path or "tokenizer")
    faults = check_tokenizer(tokenizer, talks=schema not in PLAIN, enable_thinking=enable_thinking)
    findings += [found.at(name, 0) for found in faults]
    findings += _findings(data, more_checks)
    allowed = Counter(found.check for found in findings if found.check in allow)
    findings = [found for found in findings if found.check not in allow]
    return Report(schema, findings, {file.name: figures(file, data) for file in files}, data.measures, dict(allowed))


def _context(tokenizer: PreTrainedTokenizerBase) -> int | None:
    from common.models import context

    try:
        return context(tokenizer.name_or_path) if tokenizer.name_or_path else None
    except UserError:  # the folder holds a tokenizer and no model
        return None


def _findings(data: Data, more_checks: Sequence[Check]) -> list[Finding]:
    findings = []
    # Without a chat template nothing can be counted.
    if data.schema in PLAIN or data.tokenizer.chat_template:
        for file in data.files:
            findings += measure(file, data)
    for check in (*CHECKS, *more_checks):
        findings += check(data)
    return findings


def drop_refused(data: Data, more_checks: Sequence[Check] = ()) -> list[Finding]:
    """Take the rows with errors out of the files, until there are none left, and return the errors."""
    dropped = []
    while True:
        for file in data.files:
            file.lengths = []
        errors = [found for found in _findings(data, more_checks) if found.level == "error" and found.line]
        if not errors:
            return dropped
        dropped += {error.place: error for error in reversed(errors)}.values()  # the first of each row
        for file in data.files:
            lines = {error.line for error in errors if error.file == show_path(file.path)}
            file.rows = [(line, row) for line, row in file.rows if line not in lines]


def require_clean_files(
    settings: AdapterSettings,
    tokenizer: PreTrainedTokenizerBase,
    schema: str,
    train_file: Path,
    val_file: Path | None = None,
) -> None:
    """Check the files of a training stage with its own settings. Raises UserError listing the errors, if there are
    any."""
    limits = settings.max_length, settings.enable_thinking, settings.allow
    require_clean(check_rows(train_file, val_file, schema, tokenizer, *limits))


def require_clean(report: Report) -> None:
    """Print the warnings, one line a kind. Raises UserError listing the errors, if there are any."""
    for check, count in report.allowed.items():
        print(f"notice: --allow {check}: {count} findings")
    for group in report.groups():
        if group[0].level == "warning":
            first = group[0]
            print(f"warning: {first.place}: {first.reason} [{first.check}] ({len(group)} times); fix: {first.fix}")
    errors = report.errors
    if not errors:
        return
    head = (
        f"{len(errors)} errors in the data (scripts/19_check_data.py shows them by kind)\n" if len(errors) > 1 else ""
    )
    names = dict.fromkeys(error.check for error in errors if error.check)
    tail = f"\nwhere they are as they should be: --allow {' '.join(names)}" if names else ""
    raise UserError(head + list_findings(errors) + tail)


# --------------------------------------------------------------------------------------------------------- reading


def detect_schema(path: Path) -> str:
    """By the file name (sft_*, pref_*, kto_*, prompts_*, style_*), else by the keys of the first readable row, else
    sft."""
    first_word = re.split(r"[_.\-]", path.name)[0]
    if first_word in FILE_NAMES:
        return FILE_NAMES[first_word]
    rows = (row for _, row, _ in scan_jsonl(path, max_line_bytes=MAX_DOCUMENT_BYTES) if row)
    return next((found for row in rows if (found := schema_of(row))), "sft")


def schema_of(row: dict) -> str | None:
    if "chosen" in row or "rejected" in row:
        return "preference"
    if "completion" in row:
        return "kto" if "label" in row else "sft"
    if "label" in row:
        return "style"
    return "prompts" if "prompt" in row else "text" if "text" in row else None


def scan(path: Path, schema: str, *limit: int) -> Iterator[tuple[int, dict | None, list[Finding]]]:
    """As scan_jsonl, of a JSON array too (stage 31 takes one)."""
    if path.suffix != ".json":
        yield from scan_jsonl(path, schema, *limit)
        return
    rows, findings = read_array(path)
    yield from ((line, row, validate_row(row, schema)) for line, row in rows)
    if not rows and not findings:
        findings = [Finding(path, 0, "the file holds no rows", "name another file")]
    yield from ((finding.line, None, [finding]) for finding in findings)


def read_rows(file: File, schema: str) -> list[Finding]:
    """Fill `file.rows` with the rows that fit the schema; everything else becomes a finding with its line."""
    findings, first = [], None
    for line, row, found in scan(file.path, schema):
        findings += [finding.at(show_path(file.path), line) for finding in found]
        if row is not None:
            first = first or (line, row)
            if not found:
                file.rows.append((line, row))
    # One sentence above a thousand missing keys: it is another kind of file.
    if first and not file.rows:
        looks_like = schema_of(first[1])
        if looks_like not in (schema, None):
            reason, fix = (
                f"these are {looks_like} rows, not {schema} rows",
                f"name another file, or set --schema {looks_like}",
            )
            findings.insert(0, Finding(show_path(file.path), first[0], reason, fix))
    return findings


# ------------------------------------------------------------------------------------------------------- tokenizing


def measure(file: File, data: Data) -> list[Finding]:
    """Fill `file.lengths`: the chat template over prompt + answer, as trl tokenizes a row."""
    findings = []
    unknown = data.tokenizer.unk_token_id
    rendered: dict[str, str] = {}  # many rows share a prompt
    for start in range(0, len(file.rows), CHUNK):
        sequences: list[tuple[int, str, str | None]] = []  # (line, prompt, prompt + answer)
        for line, row in file.rows[start : start + CHUNK]:
            try:
                sequences += [(line, prompt, whole) for prompt, whole in _sequences(row, data, rendered)]
            except Exception as error:  # a template may raise anything, jinja's own errors or Python's
                fix = "change the row to what this model's template accepts (some know no system turn)"
                findings.append(Finding(show_path(file.path), line, f"the chat template refuses the row: {error}", fix))
        encoded = _encode(data.tokenizer, [whole for _, _, whole in sequences if whole is not None])
        starts = iter(_answer_starts(encoded, [part[1:] for part in sequences if part[2] is not None]))
        wholes = iter(encoded["input_ids"])
        parts = [(*part, None if part[2] is None else next(starts)) for part in sequences]
        texts = list(dict.fromkeys(prompt for _, prompt, _, start in parts if start is None))
        prompts = dict(zip(texts, _encode(data.tokenizer, texts)["input_ids"], strict=True))
        for line, prompt, whole, answer_at in parts:
            if whole is None:
                count = len(prompts[prompt])
                file.lengths.append(Length(line, count, count, None))
                continue
            ids = next(wholes)
            prompt_length = common_prefix(prompts[prompt], ids) if answer_at is None else answer_at
            if answer_at is None and prompt_length < len(prompts[prompt]):
                reason = "prompt + answer starts differently from the prompt alone"
                fix = "use a chat template that renders the prompt the same way in both"
                findings.append(file.finding("chat-template", "warning", line, reason, fix))
            if unknown is not None and unknown in ids:
                reason = f"{ids.count(unknown)} tokens are unknown to the tokenizer ({data.tokenizer.unk_token})"
                findings.append(
                    file.finding("unknown-token", "warning", line, reason, "another tokenizer, or other characters")
                )
            eos = data.tokenizer.eos_token_id
            eos_at = next((i for i in range(len(ids) - 1, prompt_length - 1, -1) if ids[i] == eos), None)
            file.lengths.append(Length(line, prompt_length, len(ids), eos_at))
    return findings


def _sequences(row: dict, data: Data, rendered: dict[str, str]) -> list[tuple[str, str | None]]:
    """(prompt, prompt + answer) as text, one for each answer; (text, None) where the row has none."""
    if key := PLAIN.get(data.schema):
        return [(row[key], None)]

    view, asked = (data.enable_thinking, row.get("tools")), json.dumps([row["prompt"], row.get("tools")])
    if asked not in rendered:
        rendered[asked] = render(data.tokenizer, row["prompt"], *view, add_generation_prompt=True)
    prompt, turns = rendered[asked], [row["prompt"] + row[key] for key in ANSWERS[data.schema]]
    return [(prompt, render(data.tokenizer, one, *view)) for one in turns] or [(prompt, None)]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict:
    # no special tokens: apply_chat_template(tokenize=True) adds none to what the template wrote
    return tokenizer(texts, add_special_tokens=False, verbose=False) if texts else {"input_ids": []}


def _answer_starts(encoded: BatchEncoding | dict, pairs: list[tuple[str, str]]) -> Iterator[int | None]:
    """Of each (prompt, prompt + answer) the token at which the answer begins, where a token begins there: the prompt
    alone need not be tokenized then. Else None."""
    for row, (prompt, whole) in enumerate(pairs):
        start = None
        if getattr(encoded, "is_fast", False) and len(prompt) < len(whole) and whole.startswith(prompt):
            start = encoded.char_to_token(row, len(prompt))
        yield start if start is not None and encoded.token_to_chars(row, start).start == len(prompt) else None


def common_prefix(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------------------------------------- figures


def figures(file: File, data: Data) -> dict:
    """Counts, token percentiles and shares of one file, over the rows that passed their schema."""
    lengths, limit = file.lengths, data.max_length
    if data.schema == "text":
        counts = [length.total for length in lengths]
        return {"rows": len(file.rows), "tokens": {"a text": percentiles(counts)}, "all_tokens": sum(counts)}
    tokens = {"prompt": percentiles([length.prompt for length in lengths])}
    if ANSWERS[data.schema]:
        tokens["answer"] = percentiles([length.total - length.prompt for length in lengths])
    tokens["total"] = percentiles([length.total for length in lengths])
    share = 1 / max(1, len(lengths))
    silent = {length.line for length in lengths if ANSWERS[data.schema] and length.prompt >= limit}
    return {
        "rows": len(file.rows),
        "tokens": tokens,
        "share_truncated": round(share * sum(length.truncated(limit) for length in lengths), 4),
        "share_losing_eos": round(share * sum(length.loses_eos(limit) for length in lengths), 4),
        "rows_without_trained_token": len(silent),
    }


def percentiles(counts: list[int]) -> dict[str, int]:
    """Nearest rank: every figure is the length of a real row."""
    if not counts:
        return {}
    ordered = sorted(counts)
    return {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in (50, 90, 99)} | {"max": ordered[-1]}
