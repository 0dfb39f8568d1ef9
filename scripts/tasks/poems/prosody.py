"""Is this text regulated verse (近体诗)? Form, rhyme and meter of 绝句 and 律诗, each pass, fail or unknown.

Pure Python over a table of 平水韵, the rhyme book that regulated verse was written by: data/poems/rhymes.json, built by
data/poems/build_rhymes.py. One file for everybody: rewards, metrics, data cleaning and the highlighted report judge
by the same function. The rules in prose, with the rates that real Tang verse reaches, are in docs/PROSODY.md.

    check("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。", "五言绝句")

Lines and characters are counted from 1 in every position and reason, as a reader counts them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

RHYMES_FILE = Path(__file__).resolve().parents[3] / "data" / "poems" / "rhymes.json"

# form -> (lines, characters a line)
FORMS = {"五言绝句": (4, 5), "七言绝句": (4, 7), "五言律诗": (8, 5), "七言律诗": (8, 7)}
FORM_OF_SHAPE = {shape: form for form, shape in FORMS.items()}

# What ends a line. Every other mark stays inside its line, where it makes the form fail.
SEPARATORS = "，。！？；：、,.!?;:．､｡"
LINE = re.compile(rf"[^{re.escape(SEPARATORS)}\s]+")
# Unified ideographs with extensions A to G, and 〇: what verse_corpus.py takes for Han.
HAN = re.compile("[〇\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f]*")

# Tone classes as bits, so that a character read in both (polyphonic) has both and matches either.
LEVEL, OBLIQUE = 1, 2
TONE_NAMES = {LEVEL: "level (平)", OBLIQUE: "oblique (仄)"}


class Verdict(NamedTuple):
    """status is "pass", "fail" or "unknown"; reason is empty for a pass; position is (line, character), both counted
    from 1, or None where no single character is at fault."""

    status: str
    reason: str = ""
    position: tuple[int, int] | None = None


@dataclass(slots=True)
class Prosody:
    """What `check` says about one text."""

    form: Verdict
    rhyme: Verdict
    meter: Verdict
    # Share in 0..1 of the even lines whose end, each rhyme word counted once, is in the best rhyme group: at least one
    # line of two or four. 0 where the text has no regulated shape, None where no even line ends in a listed character.
    rhyme_share: float | None
    # Share in 0..1 of the characters at 2/4/6 that are listed and stand as the better of the two regulated patterns
    # wants: about 0.7 for random characters. 0 where the text has no regulated shape, None where none is listed.
    meter_share: float | None
    # Names of the groups that all rhyming lines share (several, if all of them are polyphonic), level ones only where
    # there are any; on a failure the best group; empty without a regulated shape.
    rhyme_group: tuple[str, ...] = ()
    oblique: bool = False  # 仄韵: the rhyme group above is oblique
    first_line_rhymes: bool = False  # 首句入韵: line 1 joins the rhyme, which is optional


class RhymeTable(NamedTuple):
    groups: list[str]  # names, in the order of the bits below
    level: int  # bits of the level groups
    masks: dict[str, int]  # character, simplified or traditional -> bits of its groups
    tones: dict[str, int]  # character, simplified or traditional -> LEVEL, OBLIQUE or both
    simplified: dict[str, str]  # traditional character -> simplified


@cache
def rhyme_table() -> RhymeTable:
    """The 平水韵 table, read once. A traditional character gets the groups of its simplified key, so that a poem is
    judged alike in both scripts; where characters were merged (后 is 后 and 後) that is the union of their groups.

    Raises FileNotFoundError if data/poems/rhymes.json is missing."""
    data = json.loads(RHYMES_FILE.read_text(encoding="utf-8"))
    level = sum(1 << index for index, (_, tone) in enumerate(data["groups"]) if tone == "平")
    masks = {character: sum(1 << index for index in indices) for character, indices in data["characters"].items()}
    masks.update({character: masks[simplified] for character, simplified in data["traditional"].items()})
    tones = {
        character: (LEVEL if mask & level else 0) | (OBLIQUE if mask & ~level else 0)
        for character, mask in masks.items()
    }
    return RhymeTable([name for name, _ in data["groups"]], level, masks, tones, data["traditional"])


def tone_of(character: str) -> str | None:
    """平 or 仄, by 平水韵; None for a character that is read in both, or that the table lacks."""
    return {LEVEL: "平", OBLIQUE: "仄"}.get(rhyme_table().tones.get(character))


@cache
def _opencc() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


def to_simplified(text: str) -> str:
    """Traditional to simplified characters by OpenCC's t2s, with its phrase rules (乾坤 keeps its 乾)."""
    return _opencc().convert(text)


def split_lines(text: str) -> list[str]:
    """Verse lines (句) of a text: what stands between punctuation (full-width or ASCII) and white space. Nothing inside
    a line is dropped: quotes, brackets, Latin letters and digits stay and make the form fail."""
    return LINE.findall(text)


def check(text: str, form: str | None = None) -> Prosody:
    """Judge a text as `form` (a key of FORMS), or as whichever of the four forms its shape is if form is None.

    form: the number of lines and of characters a line is as asked, and all of them are Han. Punctuation only separates.
    rhyme: the ends of the even lines share one 平水韵 group, level or oblique, and no two of them are the same word.
    meter: every character at position 2, 4 (and 6 of seven) is level or oblique as one of the two regulated patterns
        wants, which alternate inside a line, oppose the lines of a couplet (对) and join couplets at position 2 (粘).
    Rhyme and meter are judged on the text's own shape, also where another form was asked. A text in none of the four
    shapes fails both. Characters with readings in several groups or in both tones match any of them. A character that
    the table lacks makes a verdict unknown where it decides: where it ends an even line (rhyme) or stands at 2/4/6
    (meter) and the listed characters alone do not fail already. No character is ever guessed.

    Raises ValueError if form is not in FORMS. Nothing about the text raises."""
    if form is not None and form not in FORMS:
        raise ValueError(f"unknown form {form!r}: expected one of {', '.join(FORMS)}")
    lines = split_lines(text)
    form_verdict = _check_form(lines, form)
    if _shape(lines) not in FORM_OF_SHAPE:
        no_shape = Verdict("fail", "the text has the shape of none of the four forms")
        return Prosody(form_verdict, no_shape, no_shape, rhyme_share=0.0, meter_share=0.0)

    rhyme, rhyme_share, group_mask = _check_rhyme(lines)
    meter, meter_share = _check_meter(lines)
    table = rhyme_table()
    return Prosody(
        form_verdict,
        rhyme,
        meter,
        rhyme_share,
        meter_share,
        rhyme_group=tuple(table.groups[bit] for bit in _bits(group_mask)),
        oblique=bool(group_mask & ~table.level),
        first_line_rhymes=bool(group_mask & table.masks.get(lines[0][-1], 0)),
    )


def spans(text: str, form: str | None = None) -> list[tuple[int, int, str]]:
    """What to highlight: (start, end, label) in offsets of `text`, in order, not overlapping. Labels: "rhyme" (the end
    of a line that rhymes), "rhyme_fault" (an even line's end that does not, or repeats a rhyme word), "meter_fault" (a
    character against the regulated pattern), "form_fault" (a whole line that breaks the form; where there is one, or
    lines are missing, nothing else is marked). Unlisted characters get no label.

    Raises ValueError if form is not in FORMS."""
    if form is not None and form not in FORMS:
        raise ValueError(f"unknown form {form!r}: expected one of {', '.join(FORMS)}")
    matches = list(LINE.finditer(text))
    lines = [match.group() for match in matches]
    found = [
        (match.start(), match.end(), "form_fault")
        for number, match in enumerate(matches, start=1)
        if not _line_fits(number, match.group(), _target_shape(lines, form))
    ]
    if found or _shape(lines) not in FORM_OF_SHAPE:
        return found

    table = rhyme_table()
    _, _, group_mask = _check_rhyme(lines)
    words: set[str] = set()
    for number, match in enumerate(matches, start=1):
        word = match.group()[-1]
        mask = table.masks.get(word, 0)
        word = table.simplified.get(word, word)
        agrees = bool(mask & group_mask)
        if number % 2 == 0:
            agrees = agrees and word not in words
            words.add(word)
        if agrees or (number % 2 == 0 and mask):
            found.append((match.end() - 1, match.end(), "rhyme" if agrees else "rhyme_fault"))
    for line, place, _ in _meter_faults(lines)[0]:
        start = matches[line].start() + place
        found.append((start, start + 1, "meter_fault"))
    return sorted(found)


# --- form ---


def _shape(lines: Sequence[str]) -> tuple[int, int] | None:
    """(lines, characters a line) of a text of equal lines and Han characters only, else None."""
    if not lines:
        return None
    length = len(lines[0])
    if any(len(line) != length for line in lines) or not HAN.fullmatch("".join(lines)):
        return None
    return len(lines), length


def _target_shape(lines: Sequence[str], form: str | None) -> tuple[int, int]:
    """The shape of the asked form; without one, that of the form nearest in lines, then in characters a line."""
    if form is not None:
        return FORMS[form]
    length = sorted(len(line) for line in lines)[len(lines) // 2] if lines else 5
    return min(FORM_OF_SHAPE, key=lambda shape: (abs(shape[0] - len(lines)), abs(shape[1] - length)))


def _line_fits(number: int, line: str, shape: tuple[int, int]) -> bool:
    return number <= shape[0] and len(line) == shape[1] and HAN.fullmatch(line) is not None


def _check_form(lines: Sequence[str], form: str | None) -> Verdict:
    if not lines:
        return Verdict("fail", "no verse lines")
    shape = _shape(lines)
    if shape == FORMS[form] if form is not None else shape in FORM_OF_SHAPE:
        return Verdict("pass")
    for number, line in enumerate(lines, start=1):
        han = HAN.match(line).end()
        if han < len(line):
            return Verdict("fail", f"line {number}: {line[han]!r} is not a Han character", (number, han + 1))
    count, length = _target_shape(lines, form)
    if len(lines) != count:
        wanted = str(count) if form is not None else "4 or 8"
        return Verdict("fail", f"{len(lines)} lines, expected {wanted}")
    for number, line in enumerate(lines, start=1):
        if len(line) != length:
            # The first surplus character, or the last one before the gap.
            place = min(len(line), length + 1)
            return Verdict("fail", f"line {number} has {len(line)} characters, expected {length}", (number, place))
    raise AssertionError("a text whose lines all fit has the asked shape")


# --- rhyme ---


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _check_rhyme(lines: Sequence[str]) -> tuple[Verdict, float | None, int]:
    """Verdict, rhyme_share, and the bits of the rhyme groups (of the best group if the verdict is a failure)."""
    table = rhyme_table()
    words = [table.simplified.get(line[-1], line[-1]) for line in lines[1::2]]
    masks = [table.masks.get(word, 0) for word in words]
    shared = -1
    for mask in masks:
        shared &= mask or -1  # an unlisted character has no say
    shared = 0 if shared == -1 else shared & table.level or shared
    if shared and len(set(words)) == len(words) and all(masks):
        return Verdict("pass"), 1.0, shared

    # Each word counts once: repeating one is no rhyme. The earliest line decides between equally good groups.
    unique = dict(zip(words, masks, strict=True))
    counts: dict[int, int] = {}
    for mask in unique.values():
        for bit in _bits(mask):
            counts[bit] = counts.get(bit, 0) + 1
    hits = max(counts.values(), default=0)
    best = shared
    if hits and not shared:
        best = 1 << next(bit for bit, count in counts.items() if count == hits)
    share = hits / len(words) if hits else None

    for index, word in enumerate(words):
        if word in words[:index]:
            number = 2 * index + 2
            earlier = 2 * words.index(word) + 2
            reason = f"line {number} repeats the rhyme word {word} of line {earlier}"
            return Verdict("fail", reason, (number, len(lines[0]))), share, best
    for index, (word, mask) in enumerate(zip(words, masks, strict=True)):
        if mask and not mask & best:
            number = 2 * index + 2
            own = "/".join(table.groups[bit] for bit in _bits(mask))
            reason = f"line {number}: {word} rhymes in {own}, not in {table.groups[best.bit_length() - 1]}"
            return Verdict("fail", reason, (number, len(lines[0]))), share, best
    index = masks.index(0)
    reason = f"line {2 * index + 2}: {words[index]} is not in the rhyme table"
    return Verdict("unknown", reason, (2 * index + 2, len(lines[0]))), share, best


# --- meter ---


@cache
def _patterns(count: int, length: int) -> list[list[tuple[int, int, int]]]:
    """The two regulated patterns, each a list of (line, place, tone wanted), line and place from 0. They are given by
    the tone at position 2 of line 1: it flips inside a couplet and holds from one couplet to the next."""
    patterns = []
    for first in (LEVEL, OBLIQUE):
        patterns.append([])
        for line in range(count):
            second = first if (line + 1) // 2 % 2 == 0 else LEVEL + OBLIQUE - first
            for place in range(1, length - 1, 2):
                patterns[-1].append((line, place, second if place % 4 == 1 else LEVEL + OBLIQUE - second))
    return patterns


def _meter_faults(lines: Sequence[str]) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]], int]:
    """Faults under the better pattern and unlisted characters, both as (line, place, tone wanted) from 0, and the
    number of constrained positions. Between equally good patterns it is the one whose first fault comes later."""
    tones = rhyme_table().tones
    patterns = _patterns(len(lines), len(lines[0]))
    best: list[tuple[int, int, int]] | None = None
    for pattern in patterns:
        faults = [item for item in pattern if not tones.get(lines[item[0]][item[1]], item[2]) & item[2]]
        if not faults:
            best = faults
            break
        if best is None or (len(faults), best[0]) < (len(best), faults[0]):
            best = faults
    unlisted = [item for item in pattern if lines[item[0]][item[1]] not in tones]
    return best, unlisted, len(pattern)


def _check_meter(lines: Sequence[str]) -> tuple[Verdict, float | None]:
    faults, unlisted, total = _meter_faults(lines)
    share = (total - len(faults) - len(unlisted)) / total if len(unlisted) < total else None
    if faults:
        line, place, wanted = faults[0]
        if place > 1:
            rule = "tones alternate inside a line"
        elif line == 0:
            rule = "by the rest of the poem"
        else:
            rule = "对, opposite to the line before" if line % 2 else "粘, like the line before"
        position = (line + 1, place + 1)
        where = f"line {position[0]}, character {position[1]}"
        reason = f"{where}: {lines[line][place]} should be {TONE_NAMES[wanted]}, {rule}"
        return Verdict("fail", reason, position), share
    if unlisted:
        line, place, _ = unlisted[0]
        reason = f"line {line + 1}, character {place + 1}: {lines[line][place]} is not in the rhyme table"
        return Verdict("unknown", reason, (line + 1, place + 1)), share
    return Verdict("pass"), share
