"""Tang verse: how a poem becomes an instruction, and what makes an answer good. Metrics and rewards are the same functions.

Every metric or reward is f(prompts, completions, meta) -> one float or None a completion. completions are plain strings, meta holds
what the instruction asked for: {"form": "五言绝句", "themes": ["山水", ...]}. None means that the measure does not apply.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

from common.settings import ROOT
from tasks.poems import corpus as verse_corpus
from tasks.poems import prosody
from tasks.text_metrics import zero_for_none

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


# --- prosody: shares where a part may be right, so that a policy can climb; pass rates are what is published


@cache
def _check(text: str, form: str | None) -> prosody.Prosody:
    return prosody.check(text, form)


def _form_of(meta: dict) -> str | None:
    return meta.get("form")


def form(prompts, completions, meta, **_) -> list[float]:
    """1 where lines and characters are as asked, all of them Han, else 0."""
    return [float(_check(text, _form_of(m)).form.status == "pass") for text, m in zip(completions, meta, strict=True)]


def _passes(part: str):
    def measure(prompts, completions, meta, **_) -> list[float | None]:
        verdicts = [getattr(_check(text, _form_of(m)), part) for text, m in zip(completions, meta, strict=True)]
        return [{"pass": 1.0, "fail": 0.0}.get(verdict.status) for verdict in verdicts]

    measure.__doc__ = f"1 where {part} passes, 0 where it fails, None where the characters decide nothing."
    return measure


rhyme_pass, meter_pass = _passes("rhyme"), _passes("meter")


def all_three(prompts, completions, meta, **_) -> list[float]:
    """1 where form, rhyme and meter all pass, else 0: unknown is not a pass."""
    checks = [_check(text, _form_of(m)) for text, m in zip(completions, meta, strict=True)]
    return [float(all(part.status == "pass" for part in (c.form, c.rhyme, c.meter))) for c in checks]


def rhyme(prompts, completions, meta, **_) -> list[float | None]:
    """Share of the even lines that end in the poem's best rhyme group, 0..1; 0 in a wrong form."""
    checks = [_check(text, _form_of(m)) for text, m in zip(completions, meta, strict=True)]
    return [c.rhyme_share if c.form.status == "pass" else 0.0 for c in checks]


def meter(prompts, completions, meta, **_) -> list[float | None]:
    """Share of the positions 2/4/6 that stand as the better regulated pattern wants, 0..1; 0 in a wrong form."""
    checks = [_check(text, _form_of(m)) for text, m in zip(completions, meta, strict=True)]
    return [c.meter_share if c.form.status == "pass" else 0.0 for c in checks]


# --- what the training split knows: near-copies, attested bigrams


@cache
def training_poems() -> tuple[verse_corpus.Poem, ...]:
    poems, _ = verse_corpus.clean(verse_corpus.load_records(DATA / "tang.json.xz"), "full", "tang")
    return tuple(verse_corpus.split_poems(poems)[0]["train"])


@cache
def _training_runs() -> frozenset[str]:
    return frozenset(run for poem in training_poems() for run in verse_corpus.runs_of(poem.key))


@cache
def _training_bigrams() -> frozenset[str]:
    lines = (line for poem in training_poems() for line in prosody.split_lines(poem.text))
    return frozenset(line[i : i + 2] for line in lines for i in range(len(line) - 1))


def near_copy(prompts, completions, meta, **_) -> list[float]:
    """1 where the text shares a run of 10 characters (verse_corpus.SHARED_RUN) with a poem of the training split."""
    runs = _training_runs()
    keys = [verse_corpus.han_only(prosody.to_simplified(text)) for text in completions]
    return [float(not runs.isdisjoint(verse_corpus.runs_of(key))) for key in keys]


def longest_shared_run(text: str) -> tuple[int, str]:
    """Length of the longest run of characters that the text shares with a training poem, and that run."""
    key = verse_corpus.han_only(prosody.to_simplified(text))
    library = "\n".join(poem.key for poem in training_poems())
    best = ""
    for start in range(len(key)):
        while start + len(best) < len(key) and key[start : start + len(best) + 1] in library:
            best = key[start : start + len(best) + 1]
    return len(best), best


def fluency(prompts, completions, meta, **_) -> list[float | None]:
    """Share of the character pairs inside lines that some training poem has too: a rule's idea of fluent; None without a pair."""
    known = _training_bigrams()
    values = []
    for text in completions:
        pairs = [
            line[i : i + 2] for line in prosody.split_lines(prosody.to_simplified(text)) for i in range(len(line) - 1)
        ]
        values.append(sum(pair in known for pair in pairs) / len(pairs) if pairs else None)
    return values


def no_repeat(prompts, completions, meta, **_) -> list[float | None]:
    """1 minus the share of characters that repeat an earlier one of the same poem; None for a text without Han characters."""
    keys = [verse_corpus.han_only(text) for text in completions]
    return [len(set(key)) / len(key) if key else None for key in keys]


# --- theme


@cache
def theme_lexicon() -> dict[str, dict]:
    """theme -> weights, mean, deviation, threshold; learned by data/poems/build_themes.py from the training split."""
    return json.loads((DATA / "themes.json").read_text(encoding="utf-8"))


def theme_scores(text: str) -> dict[str, float]:
    """Standardised score of a text for every theme: 0 is the average training poem, 1 one standard deviation more."""
    chars = set(verse_corpus.han_only(text))
    scores = {}
    for name, theme in theme_lexicon().items():
        mean = sum(theme["weights"].get(char, 0.0) for char in chars) / max(1, len(chars))
        scores[name] = (mean - theme["mean"]) / theme["deviation"]
    return scores


def themes_of(title: str, text: str, count: int = 3) -> list[str]:
    """The themes that title and text speak of most, best first; a theme named by the title counts 2 standard deviations."""
    scores = theme_scores(text)
    for name, theme in theme_lexicon().items():
        if any(seed in title for seed in theme["seeds"].split()):
            scores[name] += 2.0
    return sorted(scores, key=lambda name: -scores[name])[:count]


def _speaks_of(text: str, theme: dict) -> bool:
    """Without this a text of unknown characters would beat poems whose characters speak against the theme."""
    return any(theme["weights"].get(char, 0.0) > 0 for char in text)


def theme(prompts, completions, meta, **_) -> list[float | None]:
    """Share of the asked themes on which the text stands among the top fifth of training poems and has a character that speaks for
    the theme; themes that the lexicon does not know are left out, None where none is known."""
    lexicon = theme_lexicon()
    values = []
    for text, m in zip(completions, meta, strict=True):
        asked = [name for name in m.get("themes", ()) if name in lexicon]
        text = prosody.to_simplified(text)
        scores = theme_scores(text) if asked else {}
        hits = [scores[name] >= lexicon[name]["threshold"] and _speaks_of(text, lexicon[name]) for name in asked]
        values.append(sum(hits) / len(asked) if asked else None)
    return values


# --- the four scores that a reader expects


def _mean_of(*parts):
    def measure(prompts, completions, meta, **_) -> list[float | None]:
        columns = [part(prompts, completions, meta) for part in parts]
        return [None if None in values else sum(values) / len(values) for values in zip(*columns, strict=True)]

    return measure


prosodic = _mean_of(rhyme, meter)  # 韵律一致性: rhyme and meter shares in the asked form
style = _mean_of(form, fluency, no_repeat)  # 风格符合度: shaped, worded and as free of repetition as Tang verse


def overall(prompts, completions, meta, **_) -> list[float | None]:
    """整体质量: the mean of 韵律一致性, 风格符合度 and, where a theme is asked, 主题相关性; 0 for a near-copy."""
    columns = [measure(prompts, completions, meta) for measure in (prosodic, style, theme)]
    values = []
    for parts, copied in zip(zip(*columns, strict=True), near_copy(prompts, completions, meta), strict=True):
        known = [part for part in parts if part is not None]
        values.append(0.0 if copied else None if not known else sum(known) / len(known))
    return values


REWARDS = {
    "form": form, "rhyme": rhyme, "meter": meter, "rhyme_pass": rhyme_pass, "meter_pass": meter_pass, "all_three": all_three,
    "fluency": zero_for_none(fluency), "no_repeat": zero_for_none(no_repeat), "theme": theme, "overall": overall,
}  # fmt: skip
DEFAULT_REWARDS = ("form", "rhyme", "meter", "fluency:0.5")
WATCHED_REWARDS = ("all_three", "no_repeat")
METRICS = {
    "form": form, "rhyme": rhyme_pass, "meter": meter_pass, "all_three": all_three, "near_copy": near_copy, "no_repeat": no_repeat,
    "fluency": fluency, "韵律一致性": prosodic, "风格符合度": style, "主题相关性": theme, "整体质量": overall,
}  # fmt: skip
JUDGE = {
    "韵律": prosodic,
    "风格": style,
    "主题": theme,
    "整体": overall,
}  # what stage 71 --judge rules takes for each dimension


def _distinct(n: int):
    def measure(completions: list[str]) -> float:
        """Distinct n-grams of Han characters over all n-grams of all texts (Li et al. 2016, arXiv 1510.03055, section 5.3). It falls
        as texts are added: compare sets of one size only."""
        keys = [verse_corpus.han_only(text) for text in completions]
        grams = Counter(key[i : i + n] for key in keys for i in range(len(key) - n + 1))
        return len(grams) / max(1, grams.total())

    return measure


SET_METRICS = {"distinct_1": _distinct(1), "distinct_2": _distinct(2)}  # of a whole set of texts, not of one


def mark(text: str, meta: dict) -> list[tuple[int, int, str]]:
    """Spans (start, end, label) that the comparison page highlights: rhymes and the places at fault."""
    return prosody.spans(text, meta.get("form"))
