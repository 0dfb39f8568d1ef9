"""Checks of training files and of the tokenizer, before a model is loaded: what would waste the run.

Stage 19 prints the whole report; the training stages call the same checks and stop on errors:

    require_clean(check_rows(settings.train_file, settings.val_file, "sft", tokenizer, settings.max_length))

A new check is one function (Data) -> findings, added to CHECKS.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.jsonl import MAX_LINE_BYTES, iter_problems
from common.settings import UserError, show_path

LEVELS = ("error", "warning", "note")
MAX_SHOWN = 20  # errors listed in one message
MAX_CUT_SHARE = 0.01  # up to this share of cut answers is a warning, more is an error
CHANCE_LENGTH = 20  # characters; a shorter answer may stand in train and val by chance
CHUNK = 1000  # rows tokenized at once

# What a row's answers are called. A style row is one text for a classifier: no chat template, no answer.
ANSWERS = {"sft": ("completion",), "preference": ("chosen", "rejected"), "prompts": (), "style": ()}
FILE_NAMES = {"sft": "sft", "pref": "preference", "prompts": "prompts", "style": "style", "styles": "style"}


@dataclass(frozen=True)
class Finding:
    level: str  # error: the run would be wasted; warning: look at it; note: good to know
    file: str  # from the repo's root where it lies there
    line: int  # from 1; 0 = the file as a whole
    reason: str
    mend: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass
class Report:
    schema: str
    findings: list[Finding]
    figures: dict  # "train" and "val" -> rows, tokens, share_truncated, share_losing_eos, rows_without_trained_token

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def groups(self) -> list[list[Finding]]:
        """Findings of one kind together, errors first; numbers in the reason do not tell two kinds apart."""
        groups: dict[tuple, list[Finding]] = {}
        for finding in self.findings:
            key = (LEVELS.index(finding.level), finding.file, re.sub(r"\d+", "#", finding.reason))
            groups.setdefault(key, []).append(finding)
        return [groups[key] for key in sorted(groups, key=lambda key: key[0])]

    def as_dict(self) -> dict:
        counts = {level: sum(finding.level == level for finding in self.findings) for level in LEVELS}
        findings = [asdict(finding) for finding in self.findings]
        return {"schema": self.schema, "counts": counts, "figures": self.figures, "findings": findings}


@dataclass(frozen=True)
class Length:
    """Token counts of one sequence that training would see: a prompt with one answer."""

    line: int
    prompt: int  # tokens with no loss, the header of the assistant's turn included
    total: int
    eos_at: int | None  # index of the last eos; None without an answer, or where the template writes none


@dataclass
class File:
    """A file as the checks see it: the rows that passed their schema, and how long they are."""

    name: str  # train or val
    path: Path
    rows: list[tuple[int, dict]]  # (line, row)
    lengths: list[Length] = field(default_factory=list)

    def finding(self, level: str, line: int, reason: str, mend: str) -> Finding:
        return Finding(level, show_path(self.path), line, reason, mend)


@dataclass
class Data:
    files: list[File]  # train, then val if there is one
    schema: str
    tokenizer: object
    max_length: int  # tokens
    enable_thinking: bool = False


def check_rows(
    train_file: Path | str,
    val_file: Path | str | None,
    schema: str,
    tokenizer,
    max_length: int,
    enable_thinking: bool = False,
) -> Report:
    """Check the files of one training stage, tokenized as that stage does it.

    `schema` is sft, preference, prompts, style, or auto (see detect_schema). A file that is missing or broken is
    a finding like any other; rows with errors are left out of the later checks and of the figures.
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
    findings += check_tokenizer(data)
    # Without a chat template nothing can be counted.
    if schema == "style" or tokenizer.chat_template:
        for file in files:
            findings += measure(file, data)
    for check in CHECKS:
        findings += check(data)
    return Report(schema, findings, {file.name: figures(file, data) for file in files})


def require_clean(report: Report) -> None:
    """Print the warnings, one line a kind. Raises UserError listing the errors, if there are any."""
    for group in report.groups():
        if group[0].level == "warning":
            print(f"warning: {group[0].place}: {group[0].reason} ({len(group)} times); mend: {group[0].mend}")
    errors = report.errors
    if not errors:
        return
    lines = [f"{error.place}: {error.reason}; mend: {error.mend}" for error in errors[:MAX_SHOWN]]
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
        file.finding(problem.level.replace("notice", "note"), problem.line, problem.reason, problem.mend)
        for problem in problems
    ]
    # One sentence above a thousand missing keys: it is another kind of file.
    if objects and not file.rows:
        line, row = objects[0]
        looks_like = _schema_of(row)
        if looks_like not in (schema, None):
            mend = f"name another file, or set --schema {looks_like}"
            findings.insert(0, file.finding("error", line, f"these are {looks_like} rows, not {schema} rows", mend))
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
    for start in range(0, len(file.rows), CHUNK):
        sequences: list[tuple[int, str, str | None]] = []  # (line, prompt, prompt + answer)
        for line, row in file.rows[start : start + CHUNK]:
            try:
                sequences += [(line, prompt, whole) for prompt, whole in _sequences(row, data)]
            except Exception as error:  # a template may raise anything, jinja's own errors or Python's
                mend = "change the row to what this model's template accepts (some know no system turn)"
                findings.append(file.finding("error", line, f"the chat template refuses the row: {error}", mend))
        prompts = _token_ids(data.tokenizer, [prompt for _, prompt, _ in sequences])
        wholes = iter(_token_ids(data.tokenizer, [whole for _, _, whole in sequences if whole is not None]))
        for (line, _, whole), prompt_ids in zip(sequences, prompts, strict=True):
            if whole is None:
                file.lengths.append(Length(line, len(prompt_ids), len(prompt_ids), None))
                continue
            ids = next(wholes)
            prompt_length = _common_prefix(prompt_ids, ids)
            if prompt_length < len(prompt_ids):
                reason = "prompt + answer starts differently from the prompt alone"
                mend = "use a chat template that renders the prompt the same way in both"
                findings.append(file.finding("warning", line, reason, mend))
            eos = data.tokenizer.eos_token_id
            eos_at = next((i for i in range(len(ids) - 1, prompt_length - 1, -1) if ids[i] == eos), None)
            file.lengths.append(Length(line, prompt_length, len(ids), eos_at))
    return findings


def _sequences(row: dict, data: Data) -> list[tuple[str, str | None]]:
    """(prompt, prompt + answer) as text, one for each answer; (text, None) where the row has none."""
    if data.schema == "style":
        return [(row["input"], None)]

    def render(turns: list[dict], **options) -> str:
        options |= {"tokenize": False, "enable_thinking": data.enable_thinking}
        return data.tokenizer.apply_chat_template(turns, **options)

    prompt = render(row["prompt"], add_generation_prompt=True)
    return [(prompt, render(row["prompt"] + row[key])) for key in ANSWERS[data.schema]] or [(prompt, None)]


def _token_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    # no special tokens: apply_chat_template(tokenize=True) adds none to what the template wrote
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _common_prefix(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ----------------------------------------------------------------------------------------------------------- checks


def check_tokenizer(data: Data) -> list[Finding]:
    """pad and eos exist and differ, and the chat template ends the assistant's turn with eos."""
    tokenizer = data.tokenizer
    found = []
    if tokenizer.pad_token_id is None:
        mend = "tokenizer.pad_token = '<|endoftext|>' (Qwen), then tokenizer.save_pretrained(...)"
        found.append(("the tokenizer has no pad token", mend))
    if data.schema != "style":  # a classifier neither stops nor talks
        if tokenizer.eos_token_id is None:
            mend = "tokenizer.eos_token = '<|im_end|>' (Qwen), then tokenizer.save_pretrained(...)"
            found.append(("the tokenizer has no eos token: the model cannot learn to stop", mend))
        elif tokenizer.pad_token_id == tokenizer.eos_token_id:
            reason = f"pad and eos are the same token {tokenizer.eos_token}: masking pad hides every eos from the loss"
            found.append((reason, "give pad a token of its own (Qwen: pad '<|endoftext|>', eos '<|im_end|>')"))
        if not tokenizer.chat_template:
            mend = "take the tokenizer of an instruct model, or set tokenizer.chat_template"
            found.append(("the tokenizer has no chat template", mend))
        elif tokenizer.eos_token is not None:
            found += _check_turn_end(tokenizer)
    name = show_path(tokenizer.name_or_path or "tokenizer")
    return [Finding("error", name, 0, reason, mend) for reason, mend in found]


def _check_turn_end(tokenizer) -> list[tuple[str, str]]:
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你也好"}]
    try:
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    except Exception as error:  # as in measure: a template may raise anything
        return [(f"the chat template refuses a question and its answer: {error}", "take the model's own template")]
    while ids and ids[-1] != tokenizer.eos_token_id and not tokenizer.decode(ids[-1:]).strip():
        ids.pop()  # a line end behind eos is layout
    if ids and ids[-1] == tokenizer.eos_token_id:
        return []
    reason = f"the chat template does not end the assistant's turn with eos {tokenizer.eos_token}"
    return [(reason, "make eos the token that ends a turn (Qwen: '<|im_end|>')")]


def check_equal_texts(data: Data) -> Iterator[Finding]:
    """An answer that only repeats the question. (Equal pairs are found by the schema.)"""
    mend = "write an answer, or leave the row out"
    for file in data.files:
        for line, row in file.rows:
            for key in ANSWERS[data.schema]:
                if row[key][-1]["content"].strip() == row["prompt"][-1]["content"].strip():
                    yield file.finding("warning", line, f"{key} repeats the prompt", mend)


def check_duplicates(data: Data) -> Iterator[Finding]:
    """The same row twice in a file. Prompts for RL may well be drawn twice: a note."""
    level, what = ("note", "prompt") if data.schema == "prompts" else ("warning", "row")
    for file in data.files:
        first: dict[str, int] = {}
        for line, row in file.rows:
            earlier = first.setdefault(_identity(row, data.schema), line)
            if earlier != line:
                yield file.finding(level, line, f"the same {what} as line {earlier}", "keep one of them")


def check_overlap(data: Data) -> Iterator[Finding]:
    """Rows and answers of val that train holds too. What is held out is the text: prompts may repeat."""
    if len(data.files) < 2:
        return
    train, val = data.files
    whole: dict[str, int] = {}
    answers: dict[str, int] = {}
    for line, row in train.rows:
        whole.setdefault(_identity(row, data.schema), line)
        for key in ANSWERS[data.schema]:
            answers.setdefault(_bare(row[key]), line)

    for line, row in val.rows:
        # Of a val pair only the chosen text must be new: a rejected one may be borrowed from train.
        text = _bare(row[ANSWERS[data.schema][0]]) if ANSWERS[data.schema] else ""
        if earlier := whole.get(_identity(row, data.schema)):
            if data.schema == "prompts":
                mend = "fine where the texts are held out"
                yield val.finding("note", line, f"the same prompt as train line {earlier}", mend)
            else:
                mend = "leave it out of one of the two files; split by content"
                yield val.finding("error", line, f"the same row as train line {earlier}", mend)
        elif (earlier := answers.get(text)) and len(text) >= CHANCE_LENGTH:
            mend = "leave it out of one of the two files; split by the answer's text"
            yield val.finding("error", line, f"the same answer as train line {earlier}", mend)
        elif earlier:
            mend = "may be chance; if not, split by the answer's text"
            yield val.finding("warning", line, f"the same short answer as train line {earlier}", mend)


def check_lengths(data: Data) -> Iterator[Finding]:
    """What max_length cuts off: whole answers, ends of answers, their eos."""
    limit = data.max_length
    for file in data.files:
        cut = [length for length in file.lengths if _loses_eos(length, limit)]
        level = "error" if len(cut) > MAX_CUT_SHARE * len(file.lengths) else "warning"
        # up to and with eos: what a template writes behind it may be lost
        need = max((length.total if length.eos_at is None else length.eos_at + 1 for length in file.lengths), default=0)
        mend = f"--max-length {need} holds every row; or shorten the row, or leave it out"
        for length in file.lengths:
            if data.schema == "style":
                if length.total > limit:
                    yield file.finding("warning", length.line, f"the text is cut at {limit} tokens", mend)
            elif length.prompt >= limit:
                what = "no token is trained" if ANSWERS[data.schema] else "no room for an answer"
                yield file.finding("error", length.line, f"the prompt fills max_length ({limit} tokens): {what}", mend)
            elif _truncated(length, limit):
                yield file.finding(level, length.line, f"the answer is cut at {limit} tokens and loses its eos", mend)
            elif _loses_eos(length, limit):
                yield file.finding(level, length.line, f"the answer loses its eos at {limit} tokens", mend)


CHECKS = [check_equal_texts, check_duplicates, check_overlap, check_lengths]


def _identity(row: dict, schema: str) -> str:
    """The texts of a row as one string: everything that is trained on, nothing else."""
    if schema == "style":
        return row["input"].strip()
    keys = ("prompt", *ANSWERS[schema])
    turns = [[(turn["role"], turn["content"].strip()) for turn in row[key]] for key in keys]
    return json.dumps(turns, ensure_ascii=False)


def _bare(turns: list[dict]) -> str:
    """An answer without punctuation and spaces, so that those do not hide a copy."""
    text = "".join(turn["content"] for turn in turns)
    return re.sub(r"[\W_]+", "", text) or text.strip()


def _loses_eos(length: Length, limit: int) -> bool:
    return length.eos_at is not None and length.eos_at >= limit


def _truncated(length: Length, limit: int) -> bool:
    """Tokens of the text itself are lost, not just eos or the line end behind it."""
    if length.eos_at is None:
        return length.total > limit
    return length.eos_at > limit


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
        "share_truncated": round(share * sum(_truncated(length, limit) for length in lengths), 4),
        "share_losing_eos": round(share * sum(_loses_eos(length, limit) for length in lengths), 4),
        "rows_without_trained_token": len(silent),
    }


def percentiles(counts: list[int]) -> dict[str, int]:
    """Nearest rank: every figure is the length of a real row."""
    if not counts:
        return {}
    ordered = sorted(counts)
    return {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in (50, 90, 99)} | {"max": ordered[-1]}
