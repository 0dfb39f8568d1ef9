"""Which tokens of a row are trained, as one HTML page that needs no network: for SFT, DPO and reward rows, RL prompts
and classifiers.

The tokens are made as trl 1.16 makes them (SFTTrainer, DPOTrainer and RewardTrainer, `_prepare_dataset`);
test_mask_preview.py holds them against the trainers themselves. What a row says never becomes markup.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.conversations import answer_rows, render, written_answer
from common.jsonl import write_bytes
from common.preflight.checks import common_prefix
from common.training.loss_masks import document_ids, label_answer, label_answers, marked_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEGEND = {
    "trained": "trained: made more likely",
    "lowered": "trained: made less likely",
    "score": "the score is read here",
    "context": "read, not trained",
    "cut": "beyond max_length: never seen",
}


@dataclass(frozen=True)
class Sequence:
    """One token sequence of a row. kinds: one of LEGEND for each token."""

    name: str
    ids: list[int]
    kinds: list[str]

    @property
    def trained(self) -> int:
        return sum(kind in ("trained", "lowered") for kind in self.kinds)


def sft_sequence(
    row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int, style: str = "prompt", enable_thinking: bool = False
) -> Sequence:
    """The row as stage 20 trains it; style is its --row-style (common/training/loss_masks.py)."""
    turns = row["prompt"] + row["completion"]
    view = enable_thinking, row.get("tools")
    options = {"tokenize": True, "return_dict": True, "enable_thinking": enable_thinking, "tools": row.get("tools")}
    if style in ("template", "answers", "messages") or (style == "prompt" and len(row["completion"]) > 1):
        if style in ("template", "answers"):
            labelled = label_answer(turns, tokenizer, *view)
        else:
            labelled = label_answers(row, style, tokenizer, enable_thinking)
        ids, trained = labelled["input_ids"], [label != -100 for label in labelled["labels"]]
    elif style == "text":
        prompt = render(tokenizer, turns[:-1], *view, add_generation_prompt=True)
        asked = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + written_answer(tokenizer, turns, *view) + tokenizer.eos_token)["input_ids"]
        trained = [i >= common_prefix(asked, ids) for i in range(len(ids))]
    else:
        template = marked_template(tokenizer)
        whole = tokenizer.apply_chat_template(
            turns, chat_template=template, return_assistant_tokens_mask=bool(template), **options
        )
        ids = whole["input_ids"]
        trained = [bool(bit) for bit in whole["assistant_masks"]] if template else [True] * len(ids)
        asked = tokenizer.apply_chat_template(turns[:-1], chat_template=template, add_generation_prompt=True, **options)
        start = common_prefix(asked["input_ids"], ids)
        trained = [i >= start and bit for i, bit in enumerate(trained)]
    return Sequence("", ids, _kinds(trained, "trained", max_length))


def sft_sequences(
    row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int, style: str, enable_thinking: bool
) -> list[Sequence]:
    """The row as the sequences that stage 20 trains: one, or one for each answer."""
    parts, style = (answer_rows(row), "template") if style == "answers" else ([row], style)
    return [sft_sequence(part, tokenizer, max_length, style, enable_thinking) for part in parts]


def dpo_sequences(
    row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int, enable_thinking: bool = False
) -> list[Sequence]:
    """chosen and rejected as stage 40 trains them: all that follows the part that both share with the prompt alone."""
    options = {"tokenize": True, "return_dict": True, "enable_thinking": enable_thinking, "tools": row.get("tools")}
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)["input_ids"]
    names = ("chosen", "rejected")
    both = [tokenizer.apply_chat_template(row["prompt"] + row[name], **options)["input_ids"] for name in names]
    start = min(common_prefix(asked, ids) for ids in both)
    kinds = ("trained", "lowered")
    return [
        Sequence(name, ids, _kinds([i >= start for i in range(len(ids))], kind, max_length))
        for name, ids, kind in zip(names, both, kinds, strict=True)
    ]


def kto_sequence(
    row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int, enable_thinking: bool = False
) -> Sequence:
    """A labelled answer: all that follows the prompt, raised where it is good, lowered where it is bad."""
    options = {"tokenize": True, "return_dict": True, "enable_thinking": enable_thinking, "tools": row.get("tools")}
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)["input_ids"]
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **options)["input_ids"]
    start = common_prefix(asked, ids)
    name, kind = ("good", "trained") if row["label"] else ("bad", "lowered")
    return Sequence(name, ids, _kinds([i >= start for i in range(len(ids))], kind, max_length))


def reward_sequences(
    row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int, enable_thinking: bool = False
) -> list[Sequence]:
    """chosen and rejected as a reward model reads them: one score, at the last token. Longer rows are left out by
    trl."""
    options = {"tokenize": True, "return_dict": True, "enable_thinking": enable_thinking, "tools": row.get("tools")}
    sequences = []
    for name in ("chosen", "rejected"):
        ids = tokenizer.apply_chat_template(row["prompt"] + row[name], **options)["input_ids"]
        kinds = ["cut"] * len(ids) if len(ids) > max_length else ["context"] * (len(ids) - 1) + ["score"]
        sequences.append(Sequence(name, ids, kinds))
    return sequences


def prompt_sequence(
    row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int, enable_thinking: bool = False
) -> Sequence:
    """An RL prompt: the model writes on behind its last token."""
    options = {"tokenize": True, "return_dict": True, "enable_thinking": enable_thinking, "tools": row.get("tools")}
    ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)["input_ids"]
    return Sequence("", ids, _kinds([False] * len(ids), "trained", max_length))


def style_sequence(row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence:
    """A classifier's text: read whole, scored at its last token."""
    ids = tokenizer(row["input"])["input_ids"]
    kept = min(len(ids), max_length)
    return Sequence(row["label"], ids, ["context"] * (kept - 1) + ["score"] + ["cut"] * (len(ids) - kept))


def text_sequence(row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence:
    """A document: all of it is trained, in pieces of max_length; the first one is shown."""
    ids = next(document_ids([row["text"]], tokenizer)).tolist()
    name = f"the first {max_length} of {len(ids)} tokens" if len(ids) > max_length else ""
    return Sequence(name, ids[:max_length], ["trained"] * min(len(ids), max_length))


def _kinds(trained: list[bool], kind: str, max_length: int) -> list[str]:
    return ["cut" if i >= max_length else kind if bit else "context" for i, bit in enumerate(trained)]


# ---------------------------------------------------------------------------------------------------------- the page


def make_sections(
    files: list[tuple[str, str, list]], tokenizer: PreTrainedTokenizerBase, max_length: int, thinking: bool, style: str
) -> list:
    """files: (name, schema, [(line, row)]). One section a file; preference rows are shown as DPO and as a reward model
    sees them."""
    sections = []
    for name, schema, rows in files:
        view = (tokenizer, max_length, thinking)
        views = {
            "sft": [("SFT", lambda row, view=view: sft_sequences(row, *view[:2], style, view[2]))],
            "kto": [("KTO", lambda row, view=view: [kto_sequence(row, *view)])],
            "preference": [
                ("DPO", lambda row, view=view: dpo_sequences(row, *view)),
                ("reward model", lambda row, view=view: reward_sequences(row, *view)),
            ],
            "prompts": [("RL prompts", lambda row, view=view: [prompt_sequence(row, *view)])],
            "text": [("documents", lambda row, view=view: [text_sequence(row, *view[:2])])],
            "style": [("classifier", lambda row, view=view: [style_sequence(row, *view[:2])])],
        }
        for title, sequences in views[schema]:
            cards = []
            for line, row in rows:
                try:
                    cards += [_card(line, sequence, tokenizer) for sequence in sequences(row)]
                except Exception as error:  # a template may raise anything; the checks name the line
                    cards.append({"title": f"line {line}: cannot be rendered ({error})", "parts": []})
            sections.append({"title": f"{title}: {name}", "cards": cards})
    return sections


def _card(line: int, sequence: Sequence, tokenizer: PreTrainedTokenizerBase) -> dict:
    title = f"line {line}{' ' + sequence.name if sequence.name else ''}: {len(sequence.ids)} tokens"
    trained = sequence.trained
    if trained:
        last = tokenizer.eos_token_id in [
            token
            for token, kind in zip(sequence.ids, sequence.kinds, strict=True)
            if kind != "context" and kind != "cut"
        ]
        title += f", {trained} trained, eos {'among them' if last else 'NOT among them'}"
    elif "score" not in sequence.kinds:
        title += ", none trained" + (" (longer than max_length)" if "cut" in sequence.kinds else "")
    return {"title": title, "parts": _parts(sequence, tokenizer)}


def _parts(sequence: Sequence, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Tokens as text: one part a token, several where only together they make a character."""
    known = tokenizer.added_tokens_decoder
    parts, held = [], []
    for i, (token, kind) in enumerate(zip(sequence.ids, sequence.kinds, strict=True)):
        held.append(token)
        text = tokenizer.decode(held, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        more = i + 1 < len(sequence.ids) and sequence.kinds[i + 1] == kind and len(held) < 8
        if text.endswith("\ufffd") and more:
            continue
        title = " ".join(map(str, held))
        special = len(held) == 1 and token in known and known[token].special
        parts.append({"text": text.replace("\n", "⏎\n"), "kind": kind, "title": f"token {title}", "special": special})
        held = []
    return parts


def write_page(path: Path, title: str, notes: list[str], sections: list[dict]) -> None:
    """One file: styles are inlined, there is no script, and a content policy forbids every load."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).resolve().parent
    pages = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = pages.get_template("mask_preview.html").render(title=title, notes=notes, sections=sections, legend=LEGEND)
    write_bytes(path, page.encode())
