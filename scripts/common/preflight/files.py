"""Checks of whole files that cost seconds, for stage 19 alone: near-copies, languages, what the surface tells, classes.

Each is a function (Data) -> findings, named in CHECKS; figures go into `data.measures`.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from common.comparing import comparable
from common.preflight.data import ANSWERS, PLAIN, Check, Data, File, is_wanted
from common.preflight.finding import Finding
from common.preflight.rows import bare

NEAR = 0.8  # Jaccard similarity of the pairs of characters: 1 of 20 characters changed is .81
MIN_CHARACTERS = 20  # shorter texts may be alike by chance
BANDS, BAND = 32, 8  # hashes of MinHash in all, and in one band
ALL_PAIRS, MAX_SHARED, MAX_COMPARED = 500, 64, 20  # texts: see near_copies
CHUNK, CHUNK_CHARACTERS = 2000, 2_000_000  # texts hashed at once
MAX_NEAR_SHARE = 0.02  # up to this share of near-copies in a file is a note, more a warning
MIN_PAIRS = 50  # fewer say nothing about a baseline
LENGTH_TELLS, SURFACE_TELLS = 0.8, 0.9  # accuracy from which a baseline of pairs is a finding
MIN_CLASS = 5  # rows of a class, at least
MAX_IMBALANCE = 10  # largest class : smallest class

SCRIPTS = {
    "Chinese": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"),
    "Latin": re.compile(r"[A-Za-zÀ-ɏ]{2,}"),  # words: a word says about as much as a Chinese character
    "Japanese": re.compile(r"[\u3041-\u3096\u30a1-\u30fa]"),
    "Korean": re.compile(r"[\uac00-\ud7a3]"),
    "Cyrillic": re.compile(r"[\u0400-\u04ff]{2,}"),
}
# A prompt with one of these may well ask for another language, or for code.
ASKS_FOR_ANOTHER = re.compile(
    r"英[文语译]|[翻直]?译|日[文语]|韩[文语]|俄[文语]|法[文语]|德[文语]|外[文语]|双语|单词|代码|编程|函数|脚本|命令|拼音|字母|繁体"
    r"|English|[Tt]ranslat|Python|Java|SQL|HTML|code"
)


# ------------------------------------------------------------------------------------------------------- near-copies


def check_near_copies(data: Data) -> Iterator[Finding]:
    """Answers (of a pair the chosen one) that are nearly another's: within a file, and of val in train.

    What is held out is the text, so answers are compared, not prompts; equal ones are the business of
    common/preflight/rows.py.
    """
    if data.schema == "prompts":
        return
    texts: dict[str, tuple[File, int]] = {}  # each distinct text once, at its first place: train before val
    for file in data.files:
        for line, row in file.rows:
            plain = PLAIN.get(data.schema)
            if not plain and not is_wanted(row, ANSWERS[data.schema][0]):
                continue
            text = comparable(row[plain]) if plain else bare(row[ANSWERS[data.schema][0]])
            if len(text) >= MIN_CHARACTERS:
                texts.setdefault(text.lower(), (file, line))
    places = list(texts.values())
    pairs = near_copies(list(texts), NEAR)
    within = Counter(places[copy][0].name for copy, earlier, _ in pairs if places[copy][0] is places[earlier][0])
    for copy, earlier, likeness in pairs:
        (file, line), (other, other_line) = places[copy], places[earlier]
        if file is other:
            level = "note" if within[file.name] <= MAX_NEAR_SHARE * len(file.rows) else "warning"
            reason = f"nearly the answer of line {other_line} (likeness {likeness:.2f})"
            yield file.finding("near-copy", level, line, reason, "keep one of them, where they are many")
        else:
            reason = f"nearly the answer of train line {other_line} (likeness {likeness:.2f})"
            fix = "leave it out of one of the two files; group near-copies before splitting"
            yield file.finding("near-copy", "error", line, reason, fix)


def near_copies(texts: list[str], threshold: float) -> list[tuple[int, int, float]]:
    """(index, earlier index, likeness) of every text that is like an earlier one which is itself no copy of another.

    Likeness is the Jaccard similarity of the pairs of neighbouring characters. MinHash (Broder 1997) only chooses what
    is compared exactly. Up to ALL_PAIRS texts are estimated against all others; beyond, against those that share a band
    of BAND hashes: of two texts of likeness .8, 997 of 1000 do. A band's list ends at MAX_SHARED texts, so that rows of
    one template do not become all pairs.
    """
    import numpy as np
    from rensa import RMinHash

    def pairs_of(text: str) -> set[str]:
        return {text[i : i + 2] for i in range(len(text) - 1)}

    digests = np.empty((len(texts), BANDS * BAND), dtype=np.uint32)
    start = 0
    while start < len(texts):  # the sets of all texts at once are gigabytes
        sets, characters = [], 0
        while start + len(sets) < len(texts) and len(sets) < CHUNK and characters < CHUNK_CHARACTERS:
            characters += len(texts[start + len(sets)])
            sets.append(pairs_of(texts[start + len(sets)]))
        rows = RMinHash.digests_from_token_sets(sets, BANDS * BAND, 1)
        digests[start : start + len(sets)] = np.array(rows, dtype=np.uint32).reshape(len(sets), -1)
        start += len(sets)
    bands = np.zeros((len(texts), BANDS), dtype=np.uint64)
    for column in range(BAND):  # wraps around at 2**64, as a hash does
        bands = bands * np.uint64(0x9E3779B97F4A7C15) + digests[:, column::BAND]
    for n in range(BANDS):  # a number for each band that several texts share, 0 for the others
        _, number, count = np.unique(bands[:, n], return_inverse=True, return_counts=True)
        bands[:, n] = np.where(count[number] > 1, number * BANDS + n + 1, 0)

    lists: dict[int, list[int]] = defaultdict(list)
    kept: list[int] = []
    found = []
    for i, text in enumerate(texts):
        shared = [lists[band] for band in bands[i].tolist() if band]
        others = kept if len(kept) <= ALL_PAIRS else list(set().union(*shared))
        best = (0.0, 0)
        if others:
            estimate = (digests[others] == digests[i]).mean(axis=1)
            likely = np.flatnonzero(estimate >= threshold - 0.1)
            for j in (others[n] for n in likely[np.argsort(-estimate[likely])][:MAX_COMPARED]):
                one, other = pairs_of(text), pairs_of(texts[j])
                best = max(best, (len(one & other) / len(one | other), -j))
        if best[0] >= threshold:
            found.append((i, -best[1], best[0]))
            continue  # not kept: a thousand copies of one text stay a thousand comparisons
        kept.append(i)
        for others in shared:
            if len(others) < MAX_SHARED:
                others.append(i)
    return found


# --------------------------------------------------------------------------------------------------------- languages


def check_languages(data: Data) -> Iterator[Finding]:
    """Answers in another language or another Chinese script than most, where the prompt does not ask for it."""
    from opencc import OpenCC

    simplify = OpenCC("t2s").convert
    for file in data.files:
        texts = []  # (line, key, prompt, text)
        for line, row in file.rows:
            if key := PLAIN.get(data.schema):
                texts.append((line, key, "", row[key]))
            elif data.schema == "prompts":
                texts.append((line, "prompt", "", row["prompt"][-1]["content"]))
            else:
                asked = "\n".join(turn["content"] for turn in row["prompt"])
                texts += [(line, key, asked, row[key][-1]["content"]) for key in ANSWERS[data.schema]]
        if not texts:
            continue
        counts = [{name: len(script.findall(text)) for name, script in SCRIPTS.items()} for _, _, _, text in texts]
        for count in counts:  # Japanese writes Chinese characters too: kana decide
            if count["Japanese"] >= 5 and count["Japanese"] >= 0.2 * count["Chinese"]:
                count["Japanese"], count["Chinese"] = count["Japanese"] + count["Chinese"], 0
        mains = [max(count, key=count.get) if sum(count.values()) >= 5 else None for count in counts]
        usual, rows = Counter(main for main in mains if main).most_common(1)[0] if any(mains) else (None, 0)
        data.measures[f"{file.name}_languages"] = dict(Counter(main or "too short to say" for main in mains))
        if data.schema == "prompts":
            continue  # a prompt may be in any language
        traditional = []
        for i, (line, key, asked, text) in enumerate(texts):
            main, count = mains[i], counts[i]
            wanted = ASKS_FOR_ANOTHER.search(asked)
            if rows >= 0.8 * len(texts) and main not in (usual, None) and not wanted:
                if count[main] >= 0.7 * sum(count.values()):
                    reason = f"{key} is {main} in a {usual} file"
                    yield file.finding("language", "warning", line, reason, "fine if meant; else leave the row out")
            elif main == "Chinese" and not wanted:
                changed = sum(a != b for a, b in zip(text, simplify(text), strict=False))
                if changed >= 5 and changed >= 0.15 * count["Chinese"]:
                    traditional.append((line, key))
        if len(traditional) < 0.5 * len(texts):
            for line, key in traditional:
                reason = f"{key} is in traditional characters, most of the file is not"
                yield file.finding("language", "warning", line, reason, "opencc.OpenCC('t2s').convert(text)")


# ------------------------------------------------------------------------------------------- what the surface gives
# away


def check_surface(data: Data) -> Iterator[Finding]:
    """Pairs that length alone, or a bag of characters, tells apart: a reward model learns that and nothing else.

    Fitted on train and measured on val; without val, fitted on one half of train and measured on the other, split by
    prompt.
    """
    if data.schema != "preference":
        return
    train, val = data.files[0], data.files[-1]
    sides: tuple[list, list] = ([], [])
    for file in {id(file): file for file in (train, val)}.values():
        for _, row in file.rows:
            prompt = "\n".join(turn["content"] for turn in row["prompt"])
            half = hashlib.sha256(prompt.encode("utf-8")).digest()[0] % 2
            side = half if train is val else int(file is val)
            sides[side].append(tuple(row[key][-1]["content"] for key in ("chosen", "rejected")))
    if min(map(len, sides)) < MIN_PAIRS // 2 or sum(map(len, sides)) < MIN_PAIRS:
        return
    from common.evaluation.baselines import bag_of_characters_baseline, correctness, length_baseline

    pairs = [pair for side in sides for pair in side]
    longer = [(len(chosen) > len(rejected)) + 0.5 * (len(chosen) == len(rejected)) for chosen, rejected in pairs]
    data.measures["pairs"] = {"chosen_longer": round(sum(longer) / len(longer), 4)}
    for name, baseline, limit, level in (
        ("length", length_baseline, LENGTH_TELLS, "warning"),
        # words may well be what is asked for
        ("a bag of characters", bag_of_characters_baseline, SURFACE_TELLS, "note"),
    ):
        right = correctness(baseline(*sides))
        share = sum(right) / len(right)
        data.measures["pairs"][f"told by {name}"] = round(share, 4)
        if share >= limit:
            reason = f"{name} alone tells chosen from rejected in {share:.0%} of {len(right)} pairs"
            fix = "make rejected answers that differ in what they say, not in how they look (docs/CHECKS.md)"
            yield train.finding("surface", level, 0, reason, fix)


def check_classes(data: Data) -> Iterator[Finding]:
    """Classes that are too rare, too unequal, or missing on one side."""
    if data.schema != "style" or not data.files[0].rows:
        return
    train = Counter(row["label"].strip() for _, row in data.files[0].rows)
    data.measures["classes"] = dict(train)
    first = {row["label"].strip(): line for line, row in reversed(data.files[0].rows)}
    if len(train) == 1:
        yield data.files[0].finding(
            "classes", "error", 0, f"every row has the label {next(iter(train))}", "name another file"
        )
    most = max(train.values())
    for label, count in train.items():
        if count < MIN_CLASS or count * MAX_IMBALANCE < most:
            reason = f"the label {label} has {count} rows, the most frequent one {most}"
            yield data.files[0].finding(
                "classes", "warning", first[label], reason, "write more of them, or merge two classes"
            )
    for file in data.files[1:]:
        val = Counter(row["label"].strip() for _, row in file.rows)
        for line, row in file.rows:
            if row["label"].strip() not in train:
                reason = f"the label {row['label']} is not in train: it cannot be learnt"
                yield file.finding(
                    "classes", "error", line, reason, "split by label, so that both sides have every one"
                )
        for label in sorted(set(train) - set(val)) if val else ():
            reason = f"the label {label} of train line {first[label]} is not in val: nothing measures it"
            yield file.finding("classes", "warning", 0, reason, "split by label, so that both sides have every one")


def check_sizes(data: Data) -> Iterator[Finding]:
    """Files that seem to have changed places."""
    if len(data.files) == 2 and len(data.files[1].rows) > max(20, 2 * len(data.files[0].rows)) and data.files[0].rows:
        reason = f"val has {len(data.files[1].rows)} rows and train {len(data.files[0].rows)}"
        yield data.files[1].finding("exchanged", "warning", 0, reason, "were they exchanged?")


CHECKS: list[Check] = [check_near_copies, check_languages, check_surface, check_classes, check_sizes]
