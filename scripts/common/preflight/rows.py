"""Checks of rows that every training stage makes, quick enough for that: texts, pairs, labels, copies, what max_length
cuts off.

Each is a function (Data) -> findings, named in CHECKS. Those that cost seconds are in common/preflight/files.py.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator

from common.comparing import comparable
from common.conversations import holds_more, lost_parts, render, thinks, turn_text
from common.preflight.data import ANSWERS, PLAIN, Check, Data, File, is_wanted
from common.preflight.finding import Finding
from common.preflight.texts import faults_of_answer, faults_of_text, faults_of_thinking, special_tokens
from common.settings import show_path

MAX_CUT_SHARE = 0.01  # up to this share of cut answers is a warning, more is an error
CHANCE_LENGTH = 20  # characters; a shorter answer may stand in train and val by chance
NEARLY_EQUAL = 0.01  # share of changed characters below which a pair says nothing ...
NEARLY_EQUAL_FROM = 100  # ... in answers of at least so many characters
MANY_PROMPTS, MANY_SHARE = 10, 0.05  # one answer under so many prompts and this share of the rows is a finding
GROUP_KEYS = ("question_id", "product_id")  # in meta: what a file is split by, so that no group stands on both sides


def check_texts(data: Data) -> Iterator[Finding]:
    """Every text of every row against common/preflight/texts.py."""
    special = special_tokens(data.tokenizer)
    opened = _opens_thinking(data)
    for file in data.files:
        seen: dict[str, list] = {}  # many rows share a prompt
        for line, row in file.rows:
            place = show_path(file.path), line
            if key := PLAIN.get(data.schema):
                yield from (found.at(*place, key) for found in faults_of_text(row[key], special))
                continue
            for key in ("prompt", *ANSWERS[data.schema]):
                for turn in row[key]:
                    text = turn["content"]
                    if key == "prompt":
                        if text not in seen:
                            seen[text] = list(faults_of_text(text, special))
                        faults = seen[text]
                    else:
                        faults = [*faults_of_text(text, special)]
                        faults += faults_of_answer(text, is_wanted(row, key), row["prompt"][-1]["content"])
                        faults += faults_of_thinking(text, data.enable_thinking, opened)
                    yield from (found.at(*place, key) for found in faults)


def check_thinking(data: Data) -> Iterator[Finding]:
    """Thinking in earlier turns, which templates drop, and files where only some answers think."""
    for file in data.files:
        thinking: list[int] = []
        silent: list[int] = []
        for line, row in file.rows if data.schema in ("sft", "preference", "kto") else ():
            if any(map(thinks, row["prompt"])):
                fix = "take it out: what is left of it differs between templates"
                yield file.finding("thinking", "warning", line, "prompt: a thinking block in an earlier turn", fix)
            (thinking if thinks(row[ANSWERS[data.schema][0]][-1]) else silent).append(line)
        if data.enable_thinking and thinking and silent:
            few, what = (thinking, "an answer with") if len(thinking) < len(silent) else (silent, "an answer without")
            reason = f"{what} a thinking block, where most are the other way ({len(few)} of {len(file.rows)})"
            yield file.finding("thinking", "warning", few[0], reason, "let all think, or none")


def check_template(data: Data) -> Iterator[Finding]:
    """Reasoning, tools and calls of tools that the chat template leaves out, or writes where no model would."""
    if data.schema in PLAIN or not data.tokenizer.chat_template:
        return
    keys = ANSWERS[data.schema]
    for file in data.files:
        for line, row in file.rows:
            if not holds_more(row, "prompt", *keys):
                continue
            view = data.enable_thinking, row.get("tools")
            try:
                asked = render(data.tokenizer, row["prompt"], *view, add_generation_prompt=True)
                talks = [row["prompt"] + row[key] for key in keys]
                texts = [(turns, render(data.tokenizer, turns, *view)) for turns in talks]
            except Exception:  # measure names the line
                continue
            for turns, text in texts or [(row["prompt"], asked)]:
                if lost := lost_parts(text, turns, row.get("tools")):
                    (what, part), name = lost[0], show_path(data.tokenizer.name_or_path)
                    reason = f"the chat template of {name} loses {what}: {part[:30]!r}"
                    fix = "--model names a base whose template has a place for it (Qwen3's has); or take it out"
                    yield file.finding("template-loses", "error", line, reason, fix)
                elif keys and thinks(turns[-1]) and not text.startswith(asked):
                    reason = "the reasoning of the answer does not stand where the model begins to write"
                    fix = "take it out of the row" if data.enable_thinking else "--enable-thinking"
                    yield file.finding("thinking", "error", line, reason, fix)


def check_meta(data: Data) -> Iterator[Finding]:
    """One flat schema of meta per file: rewards and metrics read it by name."""
    key = "metadata" if data.schema == "style" else "meta"
    for file in data.files:
        names = Counter(tuple(sorted(row.get(key, {}))) for _, row in file.rows)
        if len(names) < 2:
            continue
        usual = set(names.most_common(1)[0][0])
        for line, row in file.rows:
            if differing := sorted(usual ^ set(row.get(key, {}))):
                reason = f"{key} has other keys than most rows: {', '.join(differing)}"
                yield file.finding(
                    "meta-keys", "warning", line, reason, "write every key in every row, null where there is none"
                )


def check_labels(data: Data) -> Iterator[Finding]:
    """Labels of a classifier: one spelling, one English name each, and no text with two of them."""
    if data.schema != "style":
        return
    english: dict[str, tuple[str, int]] = {}
    chinese: dict[str, tuple[str, int]] = {}
    texts: dict[str, tuple[str, str, int]] = {}
    for file in data.files:
        for line, row in file.rows:
            label, name = row["label"], row["label_english"]
            if label != label.strip() or name != name.strip():
                yield file.finding("labels", "error", line, f"white space around the label {label!r}", "label.strip()")
                continue
            for table, one, other in ((english, label, name), (chinese, name, label)):
                known, where = table.setdefault(one, (other, line))
                if known != other:
                    reason = f"the label {one} is called {other} here and {known} at line {where}"
                    yield file.finding("labels", "error", line, reason, "one English name for each label")
            known, place, where = texts.setdefault(row["input"].strip(), (label, file.name, line))
            if known != label:
                reason = f"the same text is labelled {label} here and {known} at {place} line {where}"
                yield file.finding("labels", "error", line, reason, "keep one of the two")


def check_pairs(data: Data) -> Iterator[Finding]:
    """Pairs that say nothing, and pairs that contradict each other. (Equal ones are found by the schema.)"""
    if data.schema != "preference":
        return
    for file in data.files:
        seen: dict[tuple[str, str, str], int] = {}
        for line, row in file.rows:
            asked, chosen, rejected = (_joined(row[key]) for key in ("prompt", "chosen", "rejected"))
            if earlier := seen.get((asked, rejected, chosen)):
                reason = f"the pair of line {earlier} the other way round"
                yield file.finding("contradiction", "error", line, reason, "leave out the wrong one, or both")
            seen.setdefault((asked, chosen, rejected), line)
            good, bad = bare(row["chosen"]), bare(row["rejected"])
            if good == bad:
                reason = "chosen and rejected differ in punctuation, spaces or width only"
                yield file.finding(
                    "equal-pair", "warning", line, reason, "fine if that is to be learnt; else leave the pair out"
                )
            elif len(good) >= NEARLY_EQUAL_FROM and (changed := _changed(good, bad)):
                reason = f"chosen and rejected are nearly equal: {changed} of {len(good)} characters differ"
                yield file.finding(
                    "equal-pair", "note", line, reason, "fine if that is to be learnt; else leave the pair out"
                )


def _changed(good: str, bad: str) -> int:
    """Characters between the common beginning and the common end; 0 where they are many, or where a number is what
    differs."""
    start = len(_common(good, bad))
    end = len(_common(good[start:][::-1], bad[start:][::-1]))
    middles = (good[start : len(good) - end], bad[start : len(bad) - end])
    changed = max(map(len, middles))
    # another number is another fact, however few its digits
    return 0 if changed > NEARLY_EQUAL * len(good) or re.search(r"\d", "".join(middles)) else changed


def _common(a: str, b: str) -> str:
    return next((a[:i] for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(a, b, key=len))


def check_verdicts(data: Data) -> Iterator[Finding]:
    """One answer to one prompt that is labelled good and bad, and files with one kind of label only."""
    for file in data.files if data.schema == "kto" else ():
        seen: dict[str, tuple[bool, int]] = {}
        for line, row in file.rows:
            label, earlier = seen.setdefault(_identity(row, data.schema), (row["label"], line))
            if label != row["label"]:
                reason = f"the answer of line {earlier} with the other label"
                yield file.finding("contradiction", "error", line, reason, "leave out the wrong one, or both")
        if len({row["label"] for _, row in file.rows}) == 1 and file.name == "train":
            word = "good" if file.rows[0][1]["label"] else "bad"
            fix = "SFT learns from good answers alone; KTO needs both"
            yield file.finding("labels", "warning", 0, f"every answer is labelled {word}", fix)


def check_duplicates(data: Data) -> Iterator[Finding]:
    """The same row twice in a file. Prompts for RL may well be drawn twice: a note."""
    level, what = ("note", "prompt") if data.schema == "prompts" else ("warning", "row")
    for file in data.files:
        first: dict[str, int] = {}
        labels = {line: row.get("label") for line, row in file.rows}
        for line, row in file.rows:
            earlier = first.setdefault(_identity(row, data.schema), line)
            if earlier != line:
                if row.get("label") != labels[earlier]:
                    continue  # check_labels and check_verdicts name it
                yield file.finding("copy", level, line, f"the same {what} as line {earlier}", "keep one of them")


def check_overlap(data: Data) -> Iterator[Finding]:
    """Rows and answers of val that train holds too. What is held out is the text: prompts may repeat."""
    if len(data.files) < 2:
        return
    train, val = data.files
    if train.path.is_file() and val.path.is_file() and train.path.samefile(val.path):
        yield val.finding("leak", "error", 0, "train and val are one file", "name another --val-file, or None")
        return
    yield from _shared_groups(train, val, data.schema)
    whole: dict[str, int] = {}
    answers: dict[str, int] = {}
    for line, row in train.rows:
        whole.setdefault(_identity(row, data.schema), line)
        for key in ANSWERS[data.schema]:
            answers.setdefault(said(row[key]), line)

    for line, row in val.rows:
        # Of a val pair only the chosen text must be new: a rejected one may be borrowed from train. So may a bad
        # answer.
        key = next(iter(ANSWERS[data.schema]), "")
        text = said(row[key]) if key and is_wanted(row, key) else ""
        if earlier := whole.get(_identity(row, data.schema)):
            if data.schema == "prompts":
                fix = "fine where the texts are held out"
                yield val.finding("leak", "note", line, f"the same prompt as train line {earlier}", fix)
            else:
                fix = "leave it out of one of the two files; split by content"
                yield val.finding("leak", "error", line, f"the same row as train line {earlier}", fix)
        elif (earlier := answers.get(text)) and len(text) >= CHANCE_LENGTH:
            fix = "leave it out of one of the two files; split by the answer's text"
            yield val.finding("leak", "error", line, f"the same answer as train line {earlier}", fix)
        elif earlier and text:
            fix = "may be chance; if not, split by the answer's text"
            yield val.finding("short-answer", "warning", line, f"the same short answer as train line {earlier}", fix)


def _shared_groups(train: File, val: File, schema: str) -> Iterator[Finding]:
    name = "metadata" if schema == "style" else "meta"
    for key in GROUP_KEYS:
        groups: dict = {}
        for line, row in train.rows:
            if isinstance(group := row.get(name, {}).get(key), str | int):
                groups.setdefault(group, line)
        for line, row in val.rows:
            if isinstance(group := row.get(name, {}).get(key), str | int) and group in groups:
                reason = f"the {key} {group} stands at train line {groups[group]} too"
                yield val.finding("group-leak", "error", line, reason, f"split by {key}: a group lies on one side")


def check_lengths(data: Data) -> Iterator[Finding]:
    """What max_length cuts off: whole answers, ends of answers, their eos."""
    limit = data.max_length
    for file in data.files if data.schema != "text" else ():  # stage 20 splits long documents
        cut = [length for length in file.lengths if length.loses_eos(limit)]
        level = "error" if len(cut) > MAX_CUT_SHARE * len(file.lengths) else "warning"
        # up to and with eos: what a template writes behind it may be lost
        needs = sorted(length.total if length.eos_at is None else length.eos_at + 1 for length in file.lengths)
        most, usual = (needs[-1], needs[-(-99 * len(needs) // 100) - 1]) if needs else (0, 0)
        context = data.context or most
        fix = f"--max-length {most} holds every row{f', {usual} 99 % of them' * (usual < most)}; "
        if most > context:
            fix = f"the model reads {context} tokens, the longest row needs {most}; "
            fix += f"--max-length {usual} holds 99 % of them; " * (limit < usual <= context)
        fix += "--long-rows drop, or cut; or shorten the row" if ANSWERS[data.schema] else "or shorten the row"
        for length in file.lengths:
            if data.schema == "style":
                if length.total > limit:
                    yield file.finding("too-long", "warning", length.line, f"the text is cut at {limit} tokens", fix)
            elif length.prompt >= limit:
                what = "no token is trained" if ANSWERS[data.schema] else "no room for an answer"
                yield file.finding(
                    "too-long", "error", length.line, f"the prompt fills max_length ({limit} tokens): {what}", fix
                )
            elif length.truncated(limit):
                yield file.finding(
                    "too-long", level, length.line, f"the answer is cut at {limit} tokens and loses its eos", fix
                )
            elif length.loses_eos(limit):
                yield file.finding("too-long", level, length.line, f"the answer loses its eos at {limit} tokens", fix)


def check_answers(data: Data) -> Iterator[Finding]:
    """Answers that only repeat the question, and one answer given to everything."""
    for file in data.files:
        for line, row in file.rows:
            for key in ANSWERS[data.schema]:
                if turn_text(row[key][-1]).strip() == row["prompt"][-1]["content"].strip():
                    fix = "write an answer, or leave the row out"
                    yield file.finding("repeats-prompt", "warning", line, f"{key} repeats the prompt", fix)
        if data.schema != "sft":
            continue
        prompts: dict[str, set[str]] = {}  # answer -> what it answers
        first: dict[str, int] = {}
        for line, row in file.rows:
            answer = bare(row["completion"])
            first.setdefault(answer, line)
            prompts.setdefault(answer, set()).add(_joined(row["prompt"]))
        for answer, asked in prompts.items():
            if len(asked) >= max(MANY_PROMPTS, MANY_SHARE * len(file.rows)):
                reason = f"the same answer to {len(asked)} prompts: {answer[:20]}"
                yield file.finding(
                    "one-answer",
                    "warning",
                    first[answer],
                    reason,
                    "keep a few of them: a model learns to say little else",
                )


CHECKS: list[Check] = [check_texts, check_thinking, check_template, check_answers, check_pairs, check_labels]
CHECKS += [check_verdicts, check_meta, check_duplicates, check_overlap, check_lengths]


def _identity(row: dict, schema: str) -> str:
    """The texts of a row as one string: everything that is trained on, nothing else."""
    if key := PLAIN.get(schema):
        return row[key].strip()
    keys = ("prompt", *ANSWERS[schema])
    turns = [[(turn["role"], turn_text(turn).strip()) for turn in row[key]] for key in keys]
    return json.dumps(turns, ensure_ascii=False)


def bare(turns: list[dict]) -> str:
    """The texts of some turns as they are compared: without punctuation and spaces."""
    return comparable("\n".join(map(turn_text, turns)))


def said(turns: list[dict]) -> str:
    """As `bare`, without reasoning and calls of tools: many rows may call the same function."""
    return comparable("\n".join(turn["content"] for turn in turns))


def _joined(turns: list[dict]) -> str:
    return "\n".join(f"{turn['role']}: {turn_text(turn).strip()}" for turn in turns)


def _opens_thinking(data: Data) -> bool:
    """Does the template's generation prompt leave a thinking block open, for the answer to close?"""
    if data.schema in PLAIN or not data.tokenizer.chat_template:
        return False
    turns = [{"role": "user", "content": "问"}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": data.enable_thinking}
    try:
        asked = data.tokenizer.apply_chat_template(turns, **options)
    except Exception:  # as in measure: a template may raise anything, and check_tokenizer names it
        return False
    return asked.rstrip().endswith("<think>")
