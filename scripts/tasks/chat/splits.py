"""Which rows belong together, and which split each group goes to: by content, so that a grown file moves no row.

Rows of the same question are a group, and so are rows of the same answer (a FAQ asks for one answer in many ways). A
group is drawn as its first row would be alone. Two exceptions keep the splits usable: a group larger than what is held
out stays in train, and a split that would be empty gets the group that was drawn nearest to it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable

from common.comparing import comparable, split_key
from common.conversations import turn_text
from common.preflight.rows import CHANCE_LENGTH

SPLITS = ("train", "val", "test")
TURNS = ("prompt", "completion", "chosen", "rejected")
COPY = "the same row as another"
LEAK = "its answer stands in val or test under another question"
FEWEST_GROUPS = 3  # with fewer, a split may stay empty


def question_key(row: dict) -> str:
    """The first question, so that a conversation and its beginning never stand in two splits."""
    question = next((turn["content"] for turn in row["prompt"] if turn["role"] == "user"), "")
    return split_key(question) or question.strip()


def identity(row: dict) -> tuple[str, ...]:
    """All turns of a row, as they are compared, its tools and its label: two rows that agree in them are copies."""
    turns = tuple(f"{turn['role']} {comparable(turn_text(turn))}" for key in TURNS for turn in row.get(key, ()))
    if row.get("tools"):
        turns += (json.dumps(row["tools"], sort_keys=True),)
    return (*turns, str(row.get("label", "")))


def answers_of(row: dict) -> set[str]:
    """Every answer of a row, as it is compared, those of its history too; short ones, which rows may share by chance,
    are left out."""
    return _long(turn for key in TURNS for turn in row.get(key, ()) if turn["role"] == "assistant")


def wanted_answers(row: dict) -> set[str]:
    """The answers that are right: what is held out when the row is."""
    wanted = row.get("chosen") or (row.get("completion", ()) if row.get("label", True) else ())
    return _long(turn for turn in wanted if turn["role"] == "assistant")


def _long(turns: Iterable[dict]) -> set[str]:
    return {text for turn in turns if len(text := comparable(turn["content"])) >= CHANCE_LENGTH}


def groups_of(rows: list[dict], by: str) -> list[list[dict]]:
    """Rows that go to one split together, in the order of their first rows. by: answer, prompt, none, or a key of
    meta."""
    wanted = set().union(*map(wanted_answers, rows)) if by == "answer" else set()
    parent: dict = {}

    def root(key: tuple):
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = []
    for row in rows:
        question = ("question", question_key(row))
        if by == "none":
            linked = [("row", *identity(row)[: -1 if "label" in row else None])]
        elif by in ("answer", "prompt"):
            linked = [question, *(("answer", text) for text in answers_of(row) & wanted)]
        else:
            value = row["meta"].get(by)
            linked = [question if value is None else ("field", str(value))]
        keys.append(linked[0])
        for key in linked[1:]:
            parent[root(key)] = root(linked[0])
    groups: dict = {}
    for row, key in zip(rows, keys, strict=True):
        groups.setdefault(root(key), []).append(row)
    return list(groups.values())


def place_of(row: dict, by: str) -> float:
    """A number from 0 to 1 that decides the split of a row's group."""
    text = question_key(row)
    if by == "none":
        text = "\n".join(identity(row)[:-1])
    elif by not in ("answer", "prompt") and row["meta"].get(by) is not None:
        text = str(row["meta"][by])
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest()[:12], 16) / 16**12


def split_groups(
    rows: dict[str, list[dict]], by: str, val_share: float, test_share: float
) -> tuple[dict[str, dict[str, list[dict]]], dict[str, Counter]]:
    """kind -> split -> rows, and kind -> why rows were dropped: copies, and training rows whose answer is held out
    elsewhere.

    The kinds are split together: a question or an answer is on one side in all of them.
    """
    dropped: dict[str, Counter] = {kind: Counter() for kind in rows}
    kind_of, distinct = {}, []
    for kind, of_kind in rows.items():
        seen = set()
        for row in of_kind:
            if (key := identity(row)) in seen:
                dropped[kind][COPY] += 1
                continue
            seen.add(key)
            kind_of[id(row)] = kind
            distinct.append(row)

    groups = [(place_of(group[0], by), group) for group in groups_of(distinct, by)]
    limit = (val_share + test_share) * len(distinct)
    drawn = []
    for place, group in groups:
        held_out = "test" if place < test_share else "val" if place < test_share + val_share else "train"
        drawn.append(held_out if len(group) <= max(1, limit) else "train")
    for kind in rows:
        _fill(groups, drawn, {"val": val_share, "test": test_share}, limit, lambda row, k=kind: kind_of[id(row)] == k)

    splits = {kind: {split: [] for split in SPLITS} for kind in rows}
    for (_, group), split in zip(groups, drawn, strict=True):
        for row in group:
            splits[kind_of[id(row)]][split].append(row)
    for name, others in (("val", ("test",)), ("train", ("val", "test"))):
        held_out = set().union(*(wanted_answers(row) for parts in splits.values() for o in others for row in parts[o]))
        for kind, parts in splits.items():
            kept = [row for row in parts[name] if held_out.isdisjoint(answers_of(row))]
            dropped[kind][LEAK] += len(parts[name]) - len(kept)
            parts[name] = kept
    return splits, {kind: +counts for kind, counts in dropped.items()}


def _fill(
    groups: list, drawn: list[str], shares: dict[str, float], limit: float, is_of_kind: Callable[[dict], bool]
) -> None:
    """Give each split that holds no row of a kind the group drawn nearest to it: train first, then small ones, and
    never the last of train."""
    of_kind = [i for i, (_, group) in enumerate(groups) if any(map(is_of_kind, group))]
    if of_kind and all(drawn[i] != "train" for i in of_kind):
        drawn[max(of_kind, key=lambda i: groups[i][0])] = "train"
    for split, share in shares.items():
        if share and len(of_kind) >= FEWEST_GROUPS and all(drawn[i] != split for i in of_kind):
            train = [i for i in of_kind if drawn[i] == "train"]
            if len(train) > 1:
                drawn[min(train, key=lambda i: (len(groups[i][1]) > limit, groups[i][0]))] = split
