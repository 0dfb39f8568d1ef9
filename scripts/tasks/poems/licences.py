"""What handbooks of regulated verse (王力) call the places where a poem leaves the pattern.

Each line has a head, the tone of its position 2, and the other fixed positions follow from it. The heads are taken so
that as little as possible is wrong: the poem as a whole is read as the pattern it comes nearest to.

Licences (拗救), for lines that end in an oblique tone:
  平平仄平仄  for 平平平仄仄, the two characters before the last trade tones
  对句相救    in an unrhymed line: a line 平平平仄平 after it makes up for an oblique last but one in 仄仄平平仄
Named and allowed: 孤平自救, 仄平平仄平 for 平平仄仄平.
Faults: 失替 (tones do not alternate inside a line), 失对 (a couplet's lines have one head), 失粘 (couplets do not
  join), 孤平 (仄平仄仄平: one level character beside the rhyme), 三平尾, 三仄尾, 上尾 (an unrhymed line ends in the
  tone of the rhyme).
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from tasks.poems.readings import FREE, LEVEL, OBLIQUE, OTHER, UNLISTED

SWAP, COUPLET, SELF = "平平仄平仄", "对句相救", "孤平自救"
BREAKS = ("失替", "失对", "失粘")  # faults that no licence excuses; the others are named, and the meter passes


class Mark(NamedTuple):
    """One licence or fault; position is (line, character), both from 1, of the first of `count` characters."""

    name: str
    position: tuple[int, int]
    count: int = 1


def fits(tone: str, wanted: str) -> bool:
    return tone in (wanted, FREE, UNLISTED)


@cache
def fixed_places(width: int, head: str) -> list[tuple[int, str]]:
    """(place, tone) of the positions 2, 4 (and 6), places from 0, for a line whose position 2 has the tone `head`."""
    return [(place, head if place % 4 == 1 else OTHER[head]) for place in range(1, width - 1, 2)]


def inside(tones: Sequence[str], number: int, head: str) -> tuple[list[Mark], list[Mark]]:
    """(faults, licences) at the fixed positions of one line, if `head` is its head."""
    line = tones[number]
    faults, licences = [], []
    for place, wanted in fixed_places(len(line), head):
        if fits(line[place], wanted):
            continue
        mark = (number + 1, place + 1)
        if place == len(line) - 2 and not faults and fits(line[-1], OBLIQUE):
            if wanted == OBLIQUE and fits(line[-3], OBLIQUE):
                licences.append(Mark(SWAP, (number + 1, len(line) - 2), 2))
                continue
            if wanted == LEVEL and number % 2 == 0 and fits(tones[number + 1][-3], LEVEL):
                licences.append(Mark(COUPLET, mark))
                continue
        faults.append(Mark("失替", mark))
    return faults, licences


def structure(tones: Sequence[str]) -> tuple[list[Mark], list[Mark]]:
    """(失替, 失对 and 失粘; licences) under the heads that leave the fewest faults, then the fewest licences."""
    best: dict[str, tuple[float, list[Mark], list[Mark]]] = {}
    for number in range(len(tones)):
        step = {}
        for head in (LEVEL, OBLIQUE):
            faults, licences = inside(tones, number, head)
            if number == 0:
                before = (0.0, [], [])
            else:
                # A couplet's second line has the other head, a couplet's first line that of the line before.
                right, name = (OTHER[head], "失对") if number % 2 else (head, "失粘")
                wrong = best[OTHER[right]]
                slip = (wrong[0] + 0.9, [*wrong[1], Mark(name, (number + 1, 2))], wrong[2])
                before = min(best[right], slip, key=lambda way: way[0])
            cost = before[0] + len(faults) + 0.25 * len(licences)
            step[head] = cost, before[1] + faults, before[2] + licences
        best = step
    _, faults, licences = min(best.values(), key=lambda way: way[0])
    return faults, licences


def endings(tones: Sequence[str], level_rhyme: bool, first_line_rhymes: bool) -> tuple[list[Mark], list[Mark]]:
    """(孤平, 三平尾, 三仄尾 and 上尾; 孤平自救), of characters whose tone is certain."""
    faults, saved = [], []
    rhyme = LEVEL if level_rhyme else OBLIQUE
    for number, line in enumerate(tones):
        start = len(line) - 4  # of the last five characters, from 1
        tail = line[-5:]
        if tail[1] == LEVEL and tail[4] == LEVEL and tail[0] == OBLIQUE and fits(tail[3], OBLIQUE):
            if tail[2] == OBLIQUE:
                faults.append(Mark("孤平", (number + 1, start + 1)))
            elif tail[2] == LEVEL:
                saved.append(Mark(SELF, (number + 1, start), 3))
        if tail[2:] in (LEVEL * 3, OBLIQUE * 3):
            faults.append(Mark("三平尾" if tail[2] == LEVEL else "三仄尾", (number + 1, start + 2), 3))
        if number % 2 == 0 and line[-1] == rhyme and not (number == 0 and first_line_rhymes):
            faults.append(Mark("上尾", (number + 1, len(line))))
    return faults, saved
