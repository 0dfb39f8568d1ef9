"""The tone of every character of a poem, in one of two rhyme books; prosody.py judges by it.

平水韵 (pingshui), the book that regulated verse was written by: data/poems/rhymes.json. Where it has a character in
both tones, the tone "as read" is that of its word: data/poems/readings.json, learned from Tang verse, with rules of
meaning from readings.txt. A character that means the same in both tones (看, 过, 听) stays free: 中.
中华新韵 (xinyun), which most people who write today use: modern pinyin, tones 1 and 2 level, 3 and 4 oblique, fourteen
groups by final; pypinyin's phrases read a polyphonic character in its word.
"""

import json
from collections.abc import Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).resolve().parents[3] / "data" / "poems"

# The tone of a character. FREE: read in both tones, matches either. UNLISTED: not in the book, never guessed.
LEVEL, OBLIQUE, FREE, UNLISTED = "平", "仄", "中", "?"
OTHER = {LEVEL: OBLIQUE, OBLIQUE: LEVEL}


class Sounds(NamedTuple):
    """Tones of every line as a string of 平仄中?, and the rhyme groups of every line's last character."""

    any: list[str]  # in any reading that the book has
    read: list[str]  # as read: in the word
    groups: list[frozenset[str]]  # of the last characters, in any reading; empty where the book lacks the character
    words: list[str]  # the last characters in simplified script: the same word in either script


Words = dict[str, tuple[str, dict[str, str]]]  # character -> tone outside its words, word -> tone


def parse_words(table: dict[str, list[str]]) -> Words:
    """readings.json: character -> [tone outside its words, words read 平, words read 仄, words read both ways]."""
    return {
        character: (
            default,
            {word: tone for tone, row in zip((LEVEL, OBLIQUE, FREE), rows, strict=True) for word in row.split()},
        )
        for character, (default, *rows) in table.items()
    }


def tone_in_word(words: Words, line: str, place: int) -> str:
    """The word inside the character's own foot (positions 1-2, 3-4, 5-6) stands above the one across its border."""
    default, known = words[line[place]]
    before = known.get(line[place - 1 : place + 1]) if place else None
    after = known.get(line[place : place + 2])
    return (before or after or default) if place % 2 else (after or before or default)


class Pingshui:
    """平水韵. A character has the groups of all traditional ones that are written like it in simplified script (后 is
    后 and 後), so that a poem gets the same verdict in both scripts; the word tells 干戈, 乾坤 and 才幹 apart."""

    def __init__(self) -> None:
        data = json.loads((DATA / "rhymes.json").read_text(encoding="utf-8"))
        self.names = tuple(name for name, _ in data["groups"])
        self.level = frozenset(name for name, tone in data["groups"] if tone == LEVEL)
        self.simple = data["traditional"] | data["variants"]  # another form -> the simplified one
        self.groups = {key: frozenset(self.names[i] for i in indices) for key, indices in data["characters"].items()}
        self.groups |= {form: self.groups[key] for form, key in self.simple.items()}
        self._tones = {key: self.tone_in(found) for key, found in self.groups.items()}
        self._simple = str.maketrans(self.simple)
        self.words: Words = {}  # read when the first character needs them

    def tone_in(self, groups: frozenset[str]) -> str:
        if groups <= self.level:
            return LEVEL
        return FREE if groups & self.level else OBLIQUE

    def tone(self, character: str) -> str:
        return self._tones.get(character, UNLISTED)

    def tones(self, line: str) -> str:
        get = self._tones.get
        return "".join([get(character, UNLISTED) for character in line])

    def simplify(self, line: str) -> str:
        """Every character's simplified form, one by one."""
        return line.translate(self._simple)

    def both(self) -> list[str]:
        """The characters in simplified script that are in level and oblique groups."""
        return [key for key, tone in self._tones.items() if tone == FREE and key not in self.simple]

    def in_word(self, line: str, place: int) -> str:
        """The tone of a character that the book has in both, by its neighbours; line in simplified script."""
        if not self.words:
            self.words = parse_words(json.loads((DATA / "readings.json").read_text(encoding="utf-8")))
        return tone_in_word(self.words, line, place)

    def sounds(self, lines: Sequence[str]) -> Sounds:
        tones = [self.tones(line) for line in lines]
        read = []
        for line, own in zip(lines, tones, strict=True):
            if FREE in own:
                simple = self.simplify(line)
                own = "".join([self.in_word(simple, i) if tone == FREE else tone for i, tone in enumerate(own)])
            read.append(own)
        ends = [self.groups.get(line[-1], frozenset()) for line in lines]
        return Sounds(tones, _settled(read), ends, [self.simple.get(line[-1], line[-1]) for line in lines])


def _settled(lines: list[str]) -> list[str]:
    """A free character that would make a line 平平仄仄仄 or, by the licence, 平平仄平仄 is read level: with
    characters of one tone Tang poets write the second fourteen times as often (docs/tasks/poems.md)."""
    return [
        f"{line[:-2]}{LEVEL}{line[-1]}" if line[-4:-1] == LEVEL + OBLIQUE + FREE and line[-1] in ends else line
        for line, ends in zip(lines, cycle((OBLIQUE + FREE, OBLIQUE)))
    ]


# 中华新韵 of 2005: fourteen groups by final; u with dots is v, 支 is the final of zhi and zi.
XINYUN = {
    "一麻": "a ia ua",
    "二波": "o e uo ê",
    "三皆": "ie ve",
    "四开": "ai uai",
    "五微": "ei uei",
    "六豪": "ao iao",
    "七尤": "ou iou",
    "八寒": "an ian uan van",
    "九文": "en in uen vn",
    "十唐": "ang iang uang",
    "十一庚": "eng ing ong iong ueng",
    "十二齐": "i v er",
    "十三支": "-i",
    "十四姑": "u",
}
XINYUN_GROUP = {final: name for name, finals in XINYUN.items() for final in finals.split()}


class Xinyun:
    """中华新韵."""

    names = tuple(f"{name}{tone}" for name in XINYUN for tone in (LEVEL, OBLIQUE))
    level = frozenset(f"{name}{LEVEL}" for name in XINYUN)

    def __init__(self) -> None:
        import pypinyin  # half a second: only who asks for this book pays it

        self._pinyin = pypinyin
        self.groups_of = cache(self._all_groups)

    def _group(self, syllable: str) -> str:
        """zhong4 -> 十一庚仄; empty for a neutral tone or no pinyin."""
        from pypinyin.contrib.tone_convert import to_finals

        plain, tone = syllable[:-1], syllable[-1:]
        if tone not in "1234" or not plain:
            return ""
        final = to_finals(plain, strict=True, v_to_u=False)
        if final == "i" and plain.removesuffix("i") in ("zh", "ch", "sh", "r", "z", "c", "s"):
            final = "-i"
        name = XINYUN_GROUP.get(final, "")
        return name and name + (LEVEL if tone in "12" else OBLIQUE)

    def _syllables(self, text: str, heteronym: bool) -> list[list[str]]:
        style = self._pinyin.Style.TONE3
        return self._pinyin.pinyin(text, style=style, heteronym=heteronym, errors=lambda part: list(part))

    def _all_groups(self, character: str) -> frozenset[str]:
        return frozenset(filter(None, map(self._group, self._syllables(character, True)[0])))

    def _tone(self, groups: frozenset[str]) -> str:
        tones = {name[-1] for name in groups}
        return FREE if len(tones) == 2 else tones.pop() if tones else UNLISTED

    def tone(self, character: str) -> str:
        return self._tone(self.groups_of(character))

    def sounds(self, lines: Sequence[str]) -> Sounds:
        tones = ["".join(map(self.tone, line)) for line in lines]
        read, ends = [], []
        for line, own in zip(lines, tones, strict=True):
            groups = [self._group(syllable[0]) for syllable in self._syllables(line, False)]
            read.append("".join(group[-1] if group else tone for group, tone in zip(groups, own, strict=True)))
            ends.append(frozenset([groups[-1]]) if groups[-1] else self.groups_of(line[-1]))
        return Sounds(tones, _settled(read), ends, [pingshui().simple.get(line[-1], line[-1]) for line in lines])


@cache
def pingshui() -> Pingshui:
    return Pingshui()


@cache
def xinyun() -> Xinyun:
    return Xinyun()


BOOKS = {"pingshui": pingshui, "xinyun": xinyun}
