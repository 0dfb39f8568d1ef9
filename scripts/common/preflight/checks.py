"""Checks of training files and of the tokenizer, before a model is loaded: what would waste the run.

Stage 19 prints the whole report; the training stages call the same checks and stop on errors:

    require_clean(check_rows(settings.train_file, settings.val_file, "sft", tokenizer, settings.max_length))

A new check is one function (Data) -> findings, added to CHECKS of common/preflight/rows.py, or of common/preflight/files.py if it costs
seconds: those only stage 19 makes. common/preflight/texts.py says what a single text must not hold, common/preflight/tokenizers.py what a
tokenizer must do.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.jsonl import MAX_LINE_BYTES, iter_problems
from common.preflight.finding import ANSWERS, Check, Data, File, Finding, Length, Report
from common.preflight.rows import CHECKS
from common.preflight.tokenizers import check_tokenizer
from common.settings import UserError, show_path

MAX_SHOWN = 20  # errors listed in one message
CHUNK = 1000  # rows tokenized at once
FILE_NAMES = {"sft": "sft", "pref": "preference", "prompts": "prompts", "style": "style", "styles": "style"}


def check_rows(
    train_file: Path | str,
    val_file: Path | str | None,
    schema: str,
    tokenizer,
    max_length: int,
    enable_thinking: bool = False,
    more_checks: Sequence[Check] = (),
) -> Report:
    """Check the files of one training stage, tokenized as that stage does it.

    `schema` is sft, preference, prompts, style, or auto (see detect_schema). A file that is missing or broken is
    a finding like any other; rows with errors are left out of the later checks and of the figures. `more_checks` run after
    those of CHECKS.
    """
    paths = {"train": Path(train_file)} | ({"val": Path(val_file)} if val_file else {})
    if schema == "auto":
        schema = detect_schema(paths["train"])
    if schema not in ANSWERS:
        raise ValueError(f"unknown schema {schema!r}: auto or one of {', '.join(ANSWERS)}")

    findings, files = [], []
    for name, path in paths.items():
        file = File(name, path, rows=[])
        findings += read_rows(file, schema)
        files.append(file)
    data = Data(files, schema, tokenizer, max_length, enable_thinking)
    name = show_path(tokenizer.name_or_path or "tokenizer")
    faults = check_tokenizer(tokenizer, talks=schema != "style", enable_thinking=enable_thinking)
    findings += [Finding(level, name, 0, reason, fix) for level, reason, fix in faults]
    # Without a chat template nothing can be counted.
    if schema == "style" or tokenizer.chat_template:
        for file in files:
            findings += measure(file, data)
    for check in (*CHECKS, *more_checks):
        findings += check(data)
    return Report(schema, findings, {file.name: figures(file, data) for file in files}, data.measures)


def require_clean(report: Report) -> None:
    """Print the warnings, one line a kind. Raises UserError listing the errors, if there are any."""
    for group in report.groups():
        if group[0].level == "warning":
            print(f"warning: {group[0].place}: {group[0].reason} ({len(group)} times); fix: {group[0].fix}")
    errors = report.errors
    if not errors:
        return
    lines = [f"{error.place}: {error.reason}; fix: {error.fix}" for error in errors[:MAX_SHOWN]]
    if len(errors) > MAX_SHOWN:
        lines.append(f"... and {len(errors) - MAX_SHOWN} more")
    if len(errors) > 1:
        lines.insert(0, f"{len(errors)} errors in the data (scripts/19_check_data.py shows them by kind)")
    raise UserError("\n".join(lines))


# --------------------------------------------------------------------------------------------------------- reading


def detect_schema(path: Path) -> str:
    """By the file name (sft_*, pref_*, prompts_*, style_*), else by the keys of the first readable row, else sft."""
    first_word = re.split(r"[_.\-]", path.name)[0]
    if first_word in FILE_NAMES:
        return FILE_NAMES[first_word]
    return next((found for _, row in _objects(path) if (found := _schema_of(row))), "sft")


def _schema_of(row: dict) -> str | None:
    if "chosen" in row or "rejected" in row:
        return "preference"
    if "completion" in row:
        return "sft"
    if "label" in row:
        return "style"
    return "prompts" if "prompt" in row else None


def read_rows(file: File, schema: str) -> list[Finding]:
    """Fill `file.rows` with the rows that fit the schema; everything else becomes a finding with its line."""
    problems = list(iter_problems(file.path, schema))
    faulty = {problem.line for problem in problems if problem.level == "error"}
    objects = list(_objects(file.path))
    file.rows = [(line, row) for line, row in objects if line not in faulty]
    findings = [
        file.finding(problem.level.replace("notice", "note"), problem.line, problem.reason, problem.fix)
        for problem in problems
    ]
    # One sentence above a thousand missing keys: it is another kind of file.
    if objects and not file.rows:
        line, row = objects[0]
        looks_like = _schema_of(row)
        if looks_like not in (schema, None):
            fix = f"name another file, or set --schema {looks_like}"
            findings.insert(0, file.finding("error", line, f"these are {looks_like} rows, not {schema} rows", fix))
    return findings


def _objects(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, object) of every line that can be read at all; iter_problems names the others."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            if len(raw) > MAX_LINE_BYTES:
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield line, row


# ------------------------------------------------------------------------------------------------------- tokenizing


def measure(file: File, data: Data) -> list[Finding]:
    """Fill `file.lengths`: the chat template over prompt + answer, as trl tokenizes a row."""
    findings = []
    unknown = data.tokenizer.unk_token_id
    rendered: dict[tuple, str] = {}  # many rows share a prompt
    for start in range(0, len(file.rows), CHUNK):
        sequences: list[tuple[int, str, str | None]] = []  # (line, prompt, prompt + answer)
        for line, row in file.rows[start : start + CHUNK]:
            try:
                sequences += [(line, prompt, whole) for prompt, whole in _sequences(row, data, rendered)]
            except Exception as error:  # a template may raise anything, jinja's own errors or Python's
                fix = "change the row to what this model's template accepts (some know no system turn)"
                findings.append(file.finding("error", line, f"the chat template refuses the row: {error}", fix))
        texts = list(dict.fromkeys(prompt for _, prompt, _ in sequences))
        prompts = dict(zip(texts, _token_ids(data.tokenizer, texts), strict=True))
        wholes = iter(_token_ids(data.tokenizer, [whole for _, _, whole in sequences if whole is not None]))
        for line, prompt, whole in sequences:
            prompt_ids = prompts[prompt]
            if whole is None:
                file.lengths.append(Length(line, len(prompt_ids), len(prompt_ids), None))
                continue
            ids = next(wholes)
            prompt_length = common_prefix(prompt_ids, ids)
            if prompt_length < len(prompt_ids):
                reason = "prompt + answer starts differently from the prompt alone"
                fix = "use a chat template that renders the prompt the same way in both"
                findings.append(file.finding("warning", line, reason, fix))
            if unknown is not None and unknown in ids:
                reason = f"{ids.count(unknown)} tokens are unknown to the tokenizer ({data.tokenizer.unk_token})"
                findings.append(file.finding("warning", line, reason, "another tokenizer, or other characters"))
            eos = data.tokenizer.eos_token_id
            eos_at = next((i for i in range(len(ids) - 1, prompt_length - 1, -1) if ids[i] == eos), None)
            file.lengths.append(Length(line, prompt_length, len(ids), eos_at))
    return findings


def _sequences(row: dict, data: Data, rendered: dict[tuple, str]) -> list[tuple[str, str | None]]:
    """(prompt, prompt + answer) as text, one for each answer; (text, None) where the row has none."""
    if data.schema == "style":
        return [(row["input"], None)]

    def render(turns: list[dict], **options) -> str:
        options |= {"tokenize": False, "enable_thinking": data.enable_thinking}
        return data.tokenizer.apply_chat_template(turns, **options)

    key = tuple((turn["role"], turn["content"]) for turn in row["prompt"])
    prompt = rendered[key] if key in rendered else render(row["prompt"], add_generation_prompt=True)
    rendered[key] = prompt
    return [(prompt, render(row["prompt"] + row[key])) for key in ANSWERS[data.schema]] or [(prompt, None)]


def _token_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    # no special tokens: apply_chat_template(tokenize=True) adds none to what the template wrote
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def common_prefix(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------------------------------------- figures


def figures(file: File, data: Data) -> dict:
    """Counts, token percentiles and shares of one file, over the rows that passed their schema."""
    lengths, limit = file.lengths, data.max_length
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
