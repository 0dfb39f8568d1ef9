"""The formats of rows (docs/DATA.md): what a row of each must hold, as a list of what is wrong with it."""

from common.preflight.finding import Finding, fault

ROLES = ("system", "user", "assistant")
KINDS = {dict: "object", list: "list", str: "string", int: "whole number", float: "number", bool: "true/false"}
CONVERT = "convert the file with scripts/17_prepare_chat.py"


def validate_row(row: dict, schema: str) -> list[Finding]:
    """What is wrong with a row; empty when nothing is. The schemas are those of SCHEMAS."""
    return SCHEMAS[schema](row)


def kind_of(value) -> str:
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


def _sft(row: dict) -> list[Finding]:
    return _prompt(row) + _answer(row, "completion") + _meta(row)


def _preference(row: dict) -> list[Finding]:
    found = _prompt(row) + _answer(row, "chosen") + _answer(row, "rejected") + _meta(row)
    for key in ("chosen", "rejected"):
        if not found and len(row[key]) > 1:  # the loss of a pair is on every token of its answers
            fix = "move the turns that both share into prompt, leave out pairs that part before the last answer"
            found.append(fault(f"{key}[1] is a user turn: it would be trained as if the model had said it", fix))
    if not found:
        chosen, rejected = ([turn["content"].strip() for turn in row[key]] for key in ("chosen", "rejected"))
        if chosen == rejected:
            found.append(fault("chosen and rejected are equal", "leave the pair out: it teaches nothing"))
    return found


def _kto(row: dict) -> list[Finding]:
    """One answer with a verdict: what trl calls unpaired preference."""
    found = _prompt(row) + _answer(row, "completion") + _typed(row, {"label": bool}) + _meta(row)
    if not found and len(row["completion"]) > 1:
        found.append(
            fault("completion has several turns: the label is of one answer", "move all but the last to prompt")
        )
    return found


def _prompts(row: dict) -> list[Finding]:
    return _prompt(row) + _typed(row, {"meta": dict})


def _style(row: dict) -> list[Finding]:
    texts = {"input": str, "label": str, "label_english": str}
    found = _typed(row, texts) + _meta(row, "metadata")
    empty = [key for key in texts if isinstance(row.get(key), str) and not row[key].strip()]
    return found + [fault(f"{key} is empty", "fill it in, or leave the row out") for key in empty]


def _text(row: dict) -> list[Finding]:
    """A document: what stage 20 continues pretraining on."""
    found = _typed(row, {"text": str})
    return found or ([] if row["text"].strip() else [fault("text is empty", "leave the row out")])


def _generation(row: dict) -> list[Finding]:
    # An empty completion is allowed here: it is what the model said.
    types = {"id": str, "prompt_id": str, "sample": int, "seed": int, "completion": str, "model": str}
    found = _prompt(row) + _typed(row, types | {"finish_reason": str, "tokens": int, "meta": dict})
    if "reference" not in row or not isinstance(row["reference"], str | None):
        found.append(fault("reference must be a string or null", "write the golden text, or null where there is none"))
    for key in ("sample", "tokens"):
        if type(row.get(key)) is int and row[key] < 0:
            found.append(fault(f"{key} is {row[key]}", "count from 0"))
    if not found and row["id"] != (wanted := f"{row['prompt_id']}#{row['sample']}"):
        found.append(fault(f"id {row['id']!r} is not prompt_id#sample", f"write {wanted}"))
    return found


SCHEMAS = {
    "sft": _sft,
    "preference": _preference,
    "kto": _kto,
    "prompts": _prompts,
    "style": _style,
    "text": _text,
    "generation": _generation,
}


def _prompt(row: dict) -> list[Finding]:
    found = _messages(row, "prompt")
    if not found and (role := row["prompt"][-1]["role"]) != "user":
        found.append(fault(f"the last turn of prompt is {role}, not user", "move the answer out of the prompt"))
    return found


def _answer(row: dict, key: str) -> list[Finding]:
    found = _messages(row, key)
    if not found and row[key][-1]["role"] != "assistant":
        found.append(fault(f"the last turn of {key} is not assistant", "end it with the answer"))
    return found


def _messages(row: dict, key: str) -> list[Finding]:
    """A list of turns: known roles, text in each, and roles in an order that a chat template accepts."""
    if key not in row:
        other = "messages" in row or "instruction" in row
        return [
            fault(
                f"the key {key!r} is missing", CONVERT if other else f'add "{key}": [{{"role": ..., "content": ...}}]'
            )
        ]
    turns = row[key]
    if not isinstance(turns, list):
        return [fault(f"{key} is a {kind_of(turns)}, not a list of turns", f"write a list of turns, or {CONVERT}")]
    if not turns:
        return [fault(f"{key} has no turns", "fill it in, or leave the row out")]
    found = [finding for i, turn in enumerate(turns) for finding in _turn(turn, f"{key}[{i}]")]
    if found:
        return found

    expected = "user" if key == "prompt" else "assistant"
    for i, turn in enumerate(turns):
        if i == 0 and key == "prompt" and turn["role"] == "system":
            continue
        if turn["role"] != expected:
            fix = "let user and assistant take turns" + (", system only first" if key == "prompt" else "")
            return [fault(f"{key}[{i}] is {turn['role']} where {expected} is due", fix)]
        expected = "assistant" if expected == "user" else "user"
    return []


def _turn(turn, place: str) -> list[Finding]:
    if not isinstance(turn, dict):
        return [fault(f"{place} is a {kind_of(turn)}, not an object", 'write {"role": ..., "content": ...}')]
    found, role, content = [], turn.get("role"), turn.get("content")
    if role not in ROLES:
        what = "has no role" if role is None else f"has the unknown role {role!r}"
        found.append(fault(f"{place} {what}", f"use one of {', '.join(ROLES)}"))
    if "content" not in turn:
        found.append(fault(f"{place} has no content", 'add "content": "..."'))
    elif not isinstance(content, str):
        found.append(fault(f"{place}.content is a {kind_of(content)}, not a string", "write plain text"))
    elif not content.strip():
        what = "the answer is empty" if role == "assistant" else "the text is empty"
        found.append(fault(f"{place}: {what}", "fill it in, or leave the row out"))
    return found


def _typed(row: dict, types: dict[str, type]) -> list[Finding]:
    found = []
    for key, kind in types.items():
        if key not in row:
            found.append(fault(f"the key {key!r} is missing", f"add it ({KINDS[kind]})"))
        elif type(row[key]) is not kind:  # not isinstance: true is no number
            found.append(fault(f"{key} is a {kind_of(row[key])}, not a {KINDS[kind]}", f"write a {KINDS[kind]}"))
    return found


def _meta(row: dict, key: str = "meta") -> list[Finding]:
    return _typed(row, {key: dict}) if key in row else []
