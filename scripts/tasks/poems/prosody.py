"""Is this text regulated verse (近体诗)? Form, rhyme and meter of 绝句 and 律诗, each pass, fail or unknown.

One file for everybody: rewards, metrics, data cleaning and the highlighted report judge by the same function. The tones
come from readings.py (two rhyme books, polyphonic characters read in their word), the named licences and faults from
licences.py. The rules in prose, with the rates that real Tang verse reaches, are in docs/tasks/poems.md.

    check("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。", "五言绝句")

Lines and characters are counted from 1 in every position and reason, as a reader counts them.

Run:  python scripts/tasks/poems/prosody.py "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。" [--book xinyun]
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tasks.poems import licences
from tasks.poems.licences import Mark
from tasks.poems.readings import BOOKS, FREE, LEVEL, OBLIQUE, OTHER, UNLISTED, Sounds

# form -> (lines, characters a line)
FORMS = {"五言绝句": (4, 5), "七言绝句": (4, 7), "五言律诗": (8, 5), "七言律诗": (8, 7)}
FORM_OF_SHAPE = {shape: form for form, shape in FORMS.items()}

# What ends a line. Every other mark stays inside its line, where it makes the form fail.
SEPARATORS = "，。！？；：、,.!?;:．､｡"
LINE = re.compile(rf"[^{re.escape(SEPARATORS)}\s]+")
# Unified ideographs with extensions A to G, compatibility ideographs (Korean texts), and 〇.
HAN = re.compile("[〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]*")

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
    meter: Verdict  # strict, polyphonic characters as read
    # Share in 0..1 of the even lines whose end, each rhyme word counted once, is in the best rhyme group: at least one
    # line of two or four. 0 where the text has no regulated shape, None where no even line ends in a listed character.
    rhyme_share: float | None
    # Share in 0..1 of the characters at 2/4/6 that are listed and stand as the better of the two regulated patterns
    # wants: about 0.7 for random characters. 0 where the text has no regulated shape, None where none is listed.
    meter_share: float | None
    misfits: tuple[tuple[int, int], ...] = ()  # (line, character) of the positions that miss in meter_share
    meter_licensed: Verdict = Verdict("fail")  # with the licences (拗救)
    meter_any: Verdict = Verdict("fail")  # strict, every polyphonic character in whichever tone fits
    # Names of the groups that all rhyming lines share (several, if all of them are polyphonic), level ones only where
    # there are any; on a failure the best group; empty without a regulated shape.
    rhyme_group: tuple[str, ...] = ()
    oblique: bool = False  # 仄韵: the rhyme group above is oblique
    first_line_rhymes: bool = False  # 首句入韵: line 1 joins the rhyme, which is optional
    faults: tuple[Mark, ...] = ()  # by their handbook names, in the order of the text
    licences: tuple[Mark, ...] = ()


def tone_of(character: str, book: str = "pingshui") -> str | None:
    """平 or 仄; None for a character that is read in both, or that the book lacks."""
    tone = BOOKS[book]().tone(character)
    return tone if tone in (LEVEL, OBLIQUE) else None


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


def check(text: str, form: str | None = None, book: str = "pingshui") -> Prosody:
    """Judge a text as `form` (a key of FORMS), or as whichever of the four forms its shape is if form is None.

    form: the number of lines and of characters a line is as asked, and all of them are Han. Punctuation only separates.
    rhyme: the ends of the even lines share one group of the book, level or oblique, and no two of them are the same
        word.
    meter: every character at position 2, 4 (and 6 of seven) is level or oblique as one of the two regulated patterns
        wants, which alternate inside a line, oppose the lines of a couplet (对) and join couplets at position 2 (粘).
        A character with both tones is read in its word; one that means the same in both fits either.
    Rhyme and meter are judged on the text's own shape, also where another form was asked. A text in none of the four
    shapes fails both. A character that the book lacks makes a verdict unknown where it decides: where it ends an even
    line (rhyme) or stands at 2/4/6 (meter) and the listed characters alone do not fail already. No character is ever
    guessed.

    Raises ValueError if form is not in FORMS or book not in BOOKS. Nothing about the text raises."""
    _known(form, book)
    lines = split_lines(text)
    form_verdict = _check_form(lines, form)
    if _shape(lines) not in FORM_OF_SHAPE:
        no_shape = Verdict("fail", "the text has the shape of none of the four forms")
        return Prosody(form_verdict, no_shape, no_shape, 0.0, 0.0, (), no_shape, no_shape)

    source = BOOKS[book]()
    sounds = source.sounds(lines)
    rhyme, rhyme_share, shared = _check_rhyme(lines, sounds, source)
    level = not shared or bool(shared & source.level)
    first_rhymes = bool(shared & sounds.groups[0])
    misfits, meter_share = _misfits(sounds.read)
    unlisted = _unlisted(lines, sounds.read)
    meter = licensed = in_any = unlisted or Verdict("pass")
    faults, used = [], []
    if misfits:
        faults, used = licences.structure(sounds.read)
        meter = _broken(lines, sounds.read, sorted([*faults, *used], key=lambda mark: mark.position))
        licensed = _broken(lines, sounds.read, faults) if faults else licensed
        if _misfits(sounds.any)[0]:
            in_any = meter
    for marks, more in zip((faults, used), licences.endings(sounds.read, level, first_rhymes), strict=True):
        marks += more
    return Prosody(
        form_verdict,
        rhyme,
        meter,
        rhyme_share,
        meter_share,
        misfits,
        licensed,
        in_any,
        rhyme_group=tuple(name for name in source.names if name in shared),
        oblique=not level,
        first_line_rhymes=first_rhymes,
        faults=tuple(sorted(faults, key=lambda mark: mark.position)),
        licences=tuple(sorted(used, key=lambda mark: mark.position)),
    )


def spans(text: str, form: str | None = None, book: str = "pingshui") -> list[tuple[int, int, str]]:
    """What to highlight: (start, end, label) in offsets of `text`, in order, not overlapping. Labels: "rhyme" (the end
    of a line that rhymes), "rhyme_fault" (an even line's end that does not, or repeats a rhyme word), the handbook's
    name of a fault with "_fault" (失粘_fault) or of a licence (平平仄平仄), "form_fault" (a whole line that breaks the
    form; where there is one, or lines are missing, nothing else is marked). Unlisted characters get no label.

    Raises ValueError if form is not in FORMS or book not in BOOKS."""
    _known(form, book)
    matches = list(LINE.finditer(text))
    lines = [match.group() for match in matches]
    found = [
        (match.start(), match.end(), "form_fault")
        for number, match in enumerate(matches, start=1)
        if not _line_fits(number, match.group(), _target_shape(lines, form))
    ]
    if found or _shape(lines) not in FORM_OF_SHAPE:
        return found

    verdict = check(text, form, book)
    sounds = BOOKS[book]().sounds(lines)
    words: set[str] = set()
    for number, (match, groups, word) in enumerate(zip(matches, sounds.groups, sounds.words, strict=True), start=1):
        agrees = not groups.isdisjoint(verdict.rhyme_group)
        if number % 2 == 0:
            agrees = agrees and word not in words
            words.add(word)
        if agrees or (number % 2 == 0 and groups):
            found.append((match.end() - 1, match.end(), "rhyme" if agrees else "rhyme_fault"))
    labelled = [(mark, f"{mark.name}_fault") for mark in verdict.faults] + [
        (mark, mark.name) for mark in verdict.licences
    ]
    taken = {start for start, _, _ in found}
    for mark, label in sorted(labelled, key=lambda item: (item[0].name not in licences.BREAKS, item[0].position)):
        start = matches[mark.position[0] - 1].start() + mark.position[1] - 1
        places = [place for place in range(start, start + mark.count) if place not in taken]
        taken.update(places)
        found += [(place, place + 1, label) for place in places]
    return sorted(found)


def _known(form: str | None, book: str) -> None:
    if form is not None and form not in FORMS:
        raise ValueError(f"unknown form {form!r}: expected one of {', '.join(FORMS)}")
    if book not in BOOKS:
        raise ValueError(f"unknown rhyme book {book!r}: expected one of {', '.join(BOOKS)}")


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


def _check_rhyme(lines: Sequence[str], sounds: Sounds, book: Any) -> tuple[Verdict, float | None, frozenset[str]]:
    """Verdict, rhyme_share, and the rhyme groups (the best group if the verdict is a failure)."""
    words, groups = sounds.words[1::2], sounds.groups[1::2]
    listed = [found for found in groups if found]  # an unlisted character has no say
    shared = frozenset.intersection(*listed) if listed else frozenset()
    shared = shared & book.level or shared
    if shared and len(set(words)) == len(words) and len(listed) == len(words):
        return Verdict("pass"), 1.0, shared

    # Each word counts once: repeating one is no rhyme. The earliest line decides between equally good groups.
    order = book.names.index
    counts = Counter(
        name for found in dict(zip(words, groups, strict=True)).values() for name in sorted(found, key=order)
    )
    hits = max(counts.values(), default=0)
    best = shared or frozenset([next(name for name, count in counts.items() if count == hits)] if hits else [])
    share = hits / len(words) if hits else None

    for index, word in enumerate(words):
        if word in words[:index]:
            number = 2 * index + 2
            earlier = 2 * words.index(word) + 2
            reason = f"line {number} repeats the rhyme word {word} of line {earlier}"
            return Verdict("fail", reason, (number, len(lines[0]))), share, best
    for index, (word, found) in enumerate(zip(words, groups, strict=True)):
        if found and not found & best:
            number = 2 * index + 2
            own = "/".join(sorted(found, key=order))
            reason = f"line {number}: {word} rhymes in {own}, not in {min(best, key=order)}"
            return Verdict("fail", reason, (number, len(lines[0]))), share, best
    index = groups.index(frozenset())
    reason = f"line {2 * index + 2}: {words[index]} is not in the rhyme table"
    return Verdict("unknown", reason, (2 * index + 2, len(lines[0]))), share, best


# --- meter ---


@cache
def patterns(count: int, width: int) -> list[list[tuple[int, int, str]]]:
    """The two regulated patterns, each a list of (line, place, tone wanted), line and place from 0. They are given by
    the tone at position 2 of line 1: it flips inside a couplet and holds from one couplet to the next."""
    return [
        [
            (line, place, wanted)
            for line in range(count)
            for place, wanted in licences.fixed_places(width, first if (line + 1) // 2 % 2 == 0 else OTHER[first])
        ]
        for first in (LEVEL, OBLIQUE)
    ]


def _misfits(tones: Sequence[str]) -> tuple[tuple[tuple[int, int], ...], float | None]:
    """The fixed positions that do not fit the better pattern, and the share of those that do."""
    least = None
    for pattern in patterns(len(tones), len(tones[0])):
        missing = [
            (line + 1, place + 1)
            for line, place, wanted in pattern
            if tones[line][place] != wanted and tones[line][place] not in (FREE, UNLISTED)
        ]
        if least is None or len(missing) < len(least):
            least = missing
        if not missing:
            break
    total = len(pattern)
    unlisted = sum(tones[line][place] == UNLISTED for line, place, _ in pattern)
    return tuple(least), (total - len(least) - unlisted) / total if unlisted < total else None


def _unlisted(lines: Sequence[str], tones: Sequence[str]) -> Verdict | None:
    """Unknown at the first fixed position whose character the book lacks."""
    if UNLISTED not in "".join(tones):
        return None
    for line, place, _ in patterns(len(lines), len(lines[0]))[0]:
        if tones[line][place] == UNLISTED:
            reason = f"line {line + 1}, character {place + 1}: {lines[line][place]} is not in the rhyme table"
            return Verdict("unknown", reason, (line + 1, place + 1))
    return None


RULES = {
    "失替": "tones alternate inside a line",
    "失对": "opposite to the line before",
    "失粘": "like the line before",
    licences.SWAP: "a licence (拗救), not strict",
    licences.COUPLET: "a licence (拗救), not strict",
}


def _broken(lines: Sequence[str], tones: Sequence[str], marks: list[Mark]) -> Verdict:
    """The failure that the first mark is."""
    name, (line, place), _ = marks[0]
    if name == licences.SWAP:
        place += 1  # the level character that stands last but one
    wanted = OTHER.get(tones[line - 1][place - 1], "")
    should = f"should be {TONE_NAMES[wanted]}" if wanted else "opens a line of the other tones"
    reason = f"line {line}, character {place}: {lines[line - 1][place - 1]} {should}, {name}: {RULES[name]}"
    return Verdict("fail", reason, (line, place))


# --- on the command line ---

SIGNS = {LEVEL: "○", OBLIQUE: "●", FREE: "◎", UNLISTED: "?"}


def describe(text: str, form: str | None = None, book: str = "pingshui") -> str:
    """The verdict of a poem for a reader: every line with its tones, then rhyme, meter, licences and faults."""
    verdict = check(text, form, book)
    lines = split_lines(text)
    parts = []
    if _shape(lines) in FORM_OF_SHAPE:
        for line, tones in zip(lines, BOOKS[book]().sounds(lines).read, strict=True):
            parts += ["　".join(line), "　".join(SIGNS[tone].ljust(1) for tone in tones)]
        parts.append("○ level  ● oblique  ◎ either  ? not in the book\n")
    rows = {
        "form": verdict.form,
        "rhyme": verdict.rhyme,
        "meter, strict": verdict.meter,
        "meter, with licences": verdict.meter_licensed,
        "meter, in any reading": verdict.meter_any,
    }
    parts += [f"{name}: {part.status}{part.reason and f' ({part.reason})'}" for name, part in rows.items()]
    if verdict.rhyme_group:
        first = ", line 1 joins" if verdict.first_line_rhymes else ""
        parts[-4] += f" [{'/'.join(verdict.rhyme_group)}{first}]"
    for title, marks in (("licence", verdict.licences), ("fault", verdict.faults)):
        for name, (line, place), count in marks:
            parts.append(f"{title}: {name}, line {line}: {lines[line - 1][place - 1 : place - 1 + count]} at {place}")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="the poem, or - to read it from standard input")
    parser.add_argument("--form", choices=FORMS, help="the form that it should have; without it, its own shape")
    parser.add_argument("--book", choices=BOOKS, default="pingshui", help="rhyme book: 平水韵 or 中华新韵")
    arguments = parser.parse_args()
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    verdict = check(text, arguments.form, arguments.book)
    print(describe(text, arguments.form, arguments.book))
    return int(any(part.status != "pass" for part in (verdict.form, verdict.rhyme, verdict.meter_licensed)))


if __name__ == "__main__":
    sys.exit(main())
