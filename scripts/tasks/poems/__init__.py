"""Tang verse: how a poem becomes an instruction, and what makes an answer good. Metrics and rewards are the same
functions.

meta holds what the instruction asked for: {"form": "五言绝句", "themes": ["山水", ...]}.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from common.settings import ROOT
from tasks import text_metrics
from tasks.base import Field
from tasks.poems import corpus as verse_corpus
from tasks.poems import prosody
from tasks.text_metrics import distinct, distinct_share, han_only, mean_of, named, per_text, runs, zero_for_none

DATA = ROOT / "data" / "poems"
# what the figures of this module depend on, besides this file: a change of one makes earlier scores stale
FILES = (
    *(DATA / name for name in ("rhymes.json", "themes.json", "tang.json.xz")),
    *(Path(__file__).with_name(name) for name in ("prosody.py", "corpus.py")),
)


# --- from a row to a prompt


def instruction(form: str, themes: list[str]) -> str:
    lines = prosody.FORMS[form][0]
    return f"写一首[{form}] 要求{lines}句 主题为: {'、'.join(themes)}"


def messages(row: dict) -> list[dict]:
    """A row's form and themes as the chat messages that ask for the poem."""
    return [{"role": "user", "content": instruction(row["form"], row["themes"])}]


# --- prosody: shares, which are dense rewards; pass rates are what is published


@cache
def _check(text: str, form: str | None) -> prosody.Prosody:
    return prosody.check(text, form)


@per_text
def form(text: str, meta: dict) -> float:
    """1 where lines and characters are as asked, all of them Han, else 0."""
    return float(_check(text, meta.get("form")).form.status == "pass")


def _passes(part: str):
    """1 where the part passes, 0 where it fails, None where the characters decide nothing."""
    return per_text(lambda text, m: {"pass": 1.0, "fail": 0.0}.get(getattr(_check(text, m.get("form")), part).status))


rhyme_pass, meter_pass = _passes("rhyme"), _passes("meter")


@per_text
def all_three(text: str, meta: dict) -> float:
    """1 where form, rhyme and meter all pass, else 0: unknown is not a pass."""
    found = _check(text, meta.get("form"))
    return float(all(part.status == "pass" for part in (found.form, found.rhyme, found.meter)))


@per_text
def rhyme(text: str, meta: dict) -> float | None:
    """Share of the even lines that end in the poem's best rhyme group, 0..1; 0 in a wrong form."""
    found = _check(text, meta.get("form"))
    return found.rhyme_share if found.form.status == "pass" else 0.0


@per_text
def meter(text: str, meta: dict) -> float | None:
    """Share of the positions 2/4/6 that stand as the better regulated pattern wants, 0..1; 0 in a wrong form."""
    found = _check(text, meta.get("form"))
    return found.meter_share if found.form.status == "pass" else 0.0


# --- what the training split knows: near-copies, attested bigrams


@cache
def training_poems() -> tuple[verse_corpus.Poem, ...]:
    poems, _ = verse_corpus.clean(verse_corpus.load_records(DATA / "tang.json.xz"), "full", "tang")
    return tuple(verse_corpus.split_poems(poems)[0]["train"])


def simplified_han(text: str) -> str:
    return han_only(prosody.to_simplified(text))


near_copy = text_metrics.near_copy(
    lambda: (poem.text for poem in training_poems()), verse_corpus.SHARED_RUN, simplified_han
)


@cache
def _training_bigrams() -> frozenset[str]:
    return frozenset(pair for poem in training_poems() for pair in _pairs(poem.text))


def _pairs(text: str) -> list[str]:
    """The character pairs inside the lines of a text."""
    return [pair for line in prosody.split_lines(text) for pair in runs(line, 2)]


@per_text
def fluency(text: str, meta: dict) -> float | None:
    """Share of the character pairs inside lines that some training poem has too: a rule's idea of fluent; None without
    a pair."""
    pairs = _pairs(prosody.to_simplified(text))
    return sum(pair in _training_bigrams() for pair in pairs) / len(pairs) if pairs else None


@per_text
def no_repeat(text: str, meta: dict) -> float | None:
    """1 minus the share of characters that repeat an earlier one of the same poem; None for a text without Han
    characters."""
    return distinct_share(han_only(text), 1)


# --- theme


@cache
def theme_lexicon() -> dict[str, dict]:
    """theme -> weights, mean, deviation, threshold; learned by data/poems/build_themes.py from the training split."""
    return json.loads((DATA / "themes.json").read_text(encoding="utf-8"))


def theme_scores(text: str) -> dict[str, float]:
    """Standardised score of a text for every theme: 0 is the average training poem, 1 one standard deviation more."""
    chars = set(han_only(text))
    scores = {}
    for name, theme in theme_lexicon().items():
        mean = sum(theme["weights"].get(char, 0.0) for char in chars) / max(1, len(chars))
        scores[name] = (mean - theme["mean"]) / theme["deviation"]
    return scores


def themes_of(title: str, text: str, count: int = 3) -> list[str]:
    """The themes that title and text speak of most, best first; a theme named by the title counts 2 standard
    deviations."""
    scores = theme_scores(text)
    for name, theme in theme_lexicon().items():
        if any(seed in title for seed in theme["seeds"].split()):
            scores[name] += 2.0
    return sorted(scores, key=lambda name: -scores[name])[:count]


def _speaks_of(text: str, theme: dict) -> bool:
    """Without this a text of unknown characters would beat poems whose characters speak against the theme."""
    return any(theme["weights"].get(char, 0.0) > 0 for char in text)


@per_text
def theme(text: str, meta: dict) -> float | None:
    """Share of the asked themes on which the text stands among the top fifth of training poems and has a character that
    speaks for the theme; themes that the lexicon does not know are left out, None where none is known."""
    lexicon = theme_lexicon()
    asked = [name for name in meta.get("themes", ()) if name in lexicon]
    if not asked:
        return None
    text = prosody.to_simplified(text)
    scores = theme_scores(text)
    hits = [scores[name] >= lexicon[name]["threshold"] and _speaks_of(text, lexicon[name]) for name in asked]
    return sum(hits) / len(asked)


# --- the four scores that a reader expects

prosodic = mean_of(rhyme, meter, all_known=True)  # 韵律一致性: rhyme and meter shares in the asked form
# 风格符合度: shape, words and little repetition as in Tang verse
style = mean_of(form, fluency, no_repeat, all_known=True)


def overall(prompts, completions, meta, **_) -> list[float | None]:
    """整体质量: the mean of 韵律一致性, 风格符合度 and, where a theme is asked, 主题相关性; 0 for a near-copy."""
    columns = (measure(prompts, completions, meta) for measure in (mean_of(prosodic, style, theme), near_copy))
    return [0.0 if copied else value for value, copied in zip(*columns, strict=True)]


REWARDS = named(form, rhyme, meter) | {"rhyme_pass": rhyme_pass, "meter_pass": meter_pass}
REWARDS |= named(all_three, zero_for_none(fluency), zero_for_none(no_repeat), theme, overall)
DEFAULT_REWARDS = ("form", "rhyme", "meter", "fluency:0.5")
WATCHED_REWARDS = ("all_three", "no_repeat")
METRICS = {
    "form": form,
    "rhyme": rhyme_pass,
    "meter": meter_pass,
    "all_three": all_three,
    "near_copy": near_copy,
    "no_repeat": no_repeat,
    "fluency": fluency,
    "韵律一致性": prosodic,
    "风格符合度": style,
    "主题相关性": theme,
    "整体质量": overall,
}
JUDGE = {"韵律": prosodic, "风格": style, "主题": theme, "整体": overall}
SET_METRICS = {"distinct_1": distinct(1, han_only), "distinct_2": distinct(2, han_only)}


def mark(text: str, meta: dict) -> list[tuple[int, int, str]]:
    """Spans (start, end, label) that the comparison page highlights: rhymes and the places at fault."""
    return prosody.spans(text, meta.get("form"))


FIELDS = {"form": Field("体裁", tuple(prosody.FORMS)), "themes": Field("主题", tuple(theme_lexicon()), many=True)}
COLUMNS = ("form", "rhyme", "meter", "all_three", "主题相关性", "nll_per_character", "stopped", "distinct_2")
LOWER_IS_BETTER = ("near_copy",)
