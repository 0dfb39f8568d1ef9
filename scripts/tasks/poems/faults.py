"""Poems with one fault, made from real ones: the rejected side of preference pairs, and what a reward model must rank
last.

A fault keeps the poem's length and characters wherever it can, so that neither length nor a bag of characters gives it
away.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from tasks.poems import prosody
from tasks.poems.corpus import Poem
from tasks.text_metrics import NOT_HAN


def swap(text: str, first: int, second: int) -> str:
    chars = list(text)
    chars[first], chars[second] = chars[second], chars[first]
    return "".join(chars)


def by_swapping(part: str, touches: Callable[[int, int], bool]) -> Callable[..., str | None]:
    """A fault made by exchanging two characters of the poem until `part` fails and the other part still passes."""

    def make(poem: Poem, rng: random.Random, library: dict) -> str | None:
        spots = [i for i, char in enumerate(poem.text) if not NOT_HAN.match(char)]
        width = prosody.FORMS[poem.form][1]
        for _ in range(40):
            a, b = rng.sample(range(len(spots)), 2)
            if poem.text[spots[a]] == poem.text[spots[b]] or not (touches(a, width) or touches(b, width)):
                continue
            text = swap(poem.text, spots[a], spots[b])
            verdict = prosody.check(text, poem.form)
            other = verdict.meter if part == "rhyme" else verdict.rhyme
            if getattr(verdict, part).status == "fail" and other.status == "pass":
                return text
        return None

    return make


def disorder(poem: Poem, rng: random.Random, library: dict) -> str | None:
    """The characters of each line in another order, rhymes left in place: neither sense nor meter, the same rhyme."""
    lines = prosody.split_lines(poem.text)
    text = poem.text
    for line in lines:
        inner = list(line[:-1])
        rng.shuffle(inner)
        text = text.replace(line, "".join(inner) + line[-1], 1)
    return text if text != poem.text else None


def other_poem(same_form: bool) -> Callable[..., str | None]:
    """A real poem that is not what was asked: other themes in the same form, or another form on the same first theme.

    Every poem is drawn about as often as it is chosen, so neither length nor vocabulary marks the rejected side.
    """

    def make(poem: Poem, rng: random.Random, library: dict) -> str | None:
        candidates = library["by_form"][poem.form] if same_form else library["by_theme"][library["themes"][poem.key][0]]
        for _ in range(40):
            other = rng.choice(candidates)
            if same_form and not set(library["themes"][other.key]) & set(library["themes"][poem.key]):
                return other.text
            if not same_form and other.form != poem.form:
                return other.text
        return None

    return make


FAULTS = {
    "rhyme": by_swapping(
        "rhyme", lambda spot, width: spot % (2 * width) == 2 * width - 1
    ),  # a rhyme word leaves its place
    "meter": by_swapping("meter", lambda spot, width: (spot % width) % 2 == 1),  # positions 2, 4, 6
    "disorder": disorder,
    "theme": other_poem(same_form=True),
    "form": other_poem(same_form=False),
}


def preference_pairs(poems: list[Poem], themes: dict[str, list[str]], seed: int) -> tuple[list[tuple], Counter]:
    """(poem, rejected text, kind) for poems that pass rhyme and meter, kinds in turn; and how many poems were
    skipped."""
    sound, skipped = [], Counter()
    for poem in poems:
        verdict = prosody.check(poem.text, poem.form)
        if all(part.status == "pass" for part in (verdict.form, verdict.rhyme, verdict.meter)):
            sound.append(poem)
        else:
            skipped["chosen poem breaks a rule itself"] += 1
    library = {"themes": themes, "by_form": {}, "by_theme": {}}
    for poem in sound:
        library["by_form"].setdefault(poem.form, []).append(poem)
        library["by_theme"].setdefault(themes[poem.key][0], []).append(poem)
    pairs = []
    for index, poem in enumerate(sound):
        kind = list(FAULTS)[index % len(FAULTS)]
        rejected = FAULTS[kind](poem, random.Random(f"{seed} {poem.key}"), library)
        if rejected is None:
            skipped[f"no {kind} fault found"] += 1
        else:
            pairs.append((poem, rejected, kind))
    return pairs, skipped
