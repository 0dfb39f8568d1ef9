"""Verse as the embedded base reads it: which poems it sees more often, and how a request for a poem may be worded."""

from __future__ import annotations

import random

from tasks import poems as task
from tasks.poems import prosody
from tasks.poems.corpus import Poem


def is_strict(text: str) -> bool:
    """Regulated verse with a level rhyme: form, rhyme and meter pass."""
    verdict = prosody.check(text)
    return not verdict.oblique and all(part.status == "pass" for part in (verdict.form, verdict.rhyme, verdict.meter))


def request_for(poem: Poem, title: str, rng: random.Random) -> str:
    """What a user might ask for to get this poem: the instruction of the SFT rows, in some with the title or the rhyme
    group."""
    if title and rng.random() < 0.2:
        return f"以《{title}》为题，写一首{poem.form}"
    asked = {"title": title if title and rng.random() < 0.4 else ""}
    verdict = prosody.check(poem.text)
    if verdict.rhyme.status == "pass" and rng.random() < 0.4:
        asked["rhyme_group"] = verdict.rhyme_group[0]
    return task.instruction(poem.form, task.themes_of(poem.title, poem.text), **asked)
