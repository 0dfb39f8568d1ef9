"""Tang verse: how a poem becomes an instruction, and what makes an answer good. Metrics and rewards are the same
functions.

meta holds what the instruction asked for: {"form": "五言绝句", "themes": ["山水", ...]}, in some rows also
{"ask_title": "江上", "ask_rhyme": "尤"}; "book": "xinyun" judges by 中华新韵.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from common.settings import ROOT
from tasks import text_metrics
from tasks.base import Field, RewardExample
from tasks.poems import corpus as verse_corpus
from tasks.poems import prosody
from tasks.text_metrics import distinct, distinct_share, han_only, mean_of, named, per_text, runs, zero_for_none

DATA = ROOT / "data" / "poems"
# what the figures of this module depend on, besides this file: a change of one makes earlier scores stale
FILES = (
    *(DATA / name for name in ("rhymes.json", "readings.json", "themes.json", "tang.json.xz")),
    *(Path(__file__).with_name(name) for name in ("prosody.py", "readings.py", "licences.py", "corpus.py")),
)


# --- from a row to a prompt


def instruction(form: str, themes: list[str], title: str = "", rhyme_group: str = "") -> str:
    lines = prosody.FORMS[form][0]
    request = f"写一首[{form}] 要求{lines}句 主题为: {'、'.join(themes)}"
    return request + (f" 题目：{title}" if title else "") + (f" 韵部：{rhyme_group}" if rhyme_group else "")


def messages(row: dict) -> list[dict]:
    """The chat messages that ask for a poem of a row's form and themes; its ask_title and ask_rhyme, where they are
    there, name a title and a rhyme group."""
    asked = instruction(row["form"], row["themes"], row.get("ask_title", ""), row.get("ask_rhyme", ""))
    return [{"role": "user", "content": asked}]


# --- prosody: shares, which are dense rewards; pass rates are what is published


@cache
def _check(text: str, form: str | None, book: str | None = None) -> prosody.Prosody:
    return prosody.check(text, form, book or "pingshui")


@per_text
def form(text: str, meta: dict) -> float:
    """1 where lines and characters are as asked, all of them Han, else 0."""
    return float(_check(text, meta.get("form"), meta.get("book")).form.status == "pass")


def _passes(part: str):
    """1 where the part passes, 0 where it fails, None where the characters decide nothing."""
    scores = {"pass": 1.0, "fail": 0.0}
    return per_text(
        lambda text, meta: scores.get(getattr(_check(text, meta.get("form"), meta.get("book")), part).status)
    )


rhyme_pass, meter_pass = _passes("rhyme"), _passes("meter")
meter_licensed, meter_any = _passes("meter_licensed"), _passes("meter_any")


def _all_pass(text: str, meta: dict, meter_part: str) -> float:
    found = _check(text, meta.get("form"), meta.get("book"))
    return float(all(part.status == "pass" for part in (found.form, found.rhyme, getattr(found, meter_part))))


@per_text
def all_three(text: str, meta: dict) -> float:
    """1 where form, rhyme and meter all pass, else 0: unknown is not a pass."""
    return _all_pass(text, meta, "meter")


@per_text
def all_three_any(text: str, meta: dict) -> float:
    """The same with polyphonic characters in whichever tone fits, as in figures before 2026-11-26."""
    return _all_pass(text, meta, "meter_any")


@per_text
def rhyme(text: str, meta: dict) -> float | None:
    """Share of the even lines that end in the poem's best rhyme group, 0..1; 0 in a wrong form."""
    found = _check(text, meta.get("form"), meta.get("book"))
    return found.rhyme_share if found.form.status == "pass" else 0.0


@per_text
def meter(text: str, meta: dict) -> float | None:
    """Share of the positions 2/4/6 that stand as the better regulated pattern wants, 0..1; 0 in a wrong form."""
    found = _check(text, meta.get("form"), meta.get("book"))
    return found.meter_share if found.form.status == "pass" else 0.0


# --- the same by line: [(offset, value)], what of the share is earned at the end of a line


def _line_ends(text: str) -> list[int]:
    return [match.end() for match in prosody.LINE.finditer(text)]


@per_text
def form_by_line(text: str, meta: dict) -> list[tuple[int, float]]:
    """Each line of the asked form earns its part; the first one that breaks it loses all of them."""
    count, width = prosody.FORMS[meta["form"]] if meta.get("form") else (0, 0)
    earned = []
    for number, line in enumerate(prosody.LINE.finditer(text) if count else (), start=1):
        if number > count or len(line.group()) != width or not prosody.HAN.fullmatch(line.group()):
            return [*earned, (line.end(), -(number - 1) / count)]
        earned.append((line.end(), 1 / count))
    return earned


@per_text
def rhyme_by_line(text: str, meta: dict) -> list[tuple[int, float]]:
    """Each even line that rhymes earns its part; nothing in a wrong form."""
    rhymes = {end for _, end, label in mark(text, meta) if label == "rhyme"}
    even = _line_ends(text)[1::2] if form([None], [text], [meta]) == [1.0] else []
    return [(end, 1 / len(even)) for end in even if end in rhymes]


@per_text
def meter_by_line(text: str, meta: dict) -> list[tuple[int, float]]:
    """Each line earns the share of its positions 2/4/6 that stand as the poem's better pattern wants; nothing in a
    wrong form."""
    found = _check(text, meta.get("form"), meta.get("book"))
    if found.form.status != "pass":
        return []
    ends, fixed = _line_ends(text), len(prosody.split_lines(text)[0]) // 2
    wrong = [sum(line == number for line, _ in found.misfits) for number in range(1, len(ends) + 1)]
    return [(end, (1 - bad / fixed) / len(ends)) for end, bad in zip(ends, wrong, strict=True)]


@per_text
def rhyme_group(text: str, meta: dict) -> float | None:
    """1 where the poem rhymes, and in the group that was asked, else 0; None where no group was asked."""
    found = _check(text, meta.get("form"), meta.get("book"))
    asked = meta.get("ask_rhyme")
    return float(found.rhyme.status == "pass" and asked in found.rhyme_group) if asked else None


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
    """At most `count` themes that the text speaks of, as theme() counts it, best first; the best one of a text that
    speaks of none. A theme named by the title counts 2 standard deviations more, but is not named for its title alone:
    who asks for what half of the poems do not have teaches that the request does not matter."""
    scores = theme_scores(text)
    found = [name for name in scores if _speaks_of(text, name, scores)]
    for name, theme in theme_lexicon().items():
        if any(seed in title for seed in theme["seeds"].split()):
            scores[name] += 2.0
    return sorted(found, key=lambda name: -scores[name])[:count] or [max(scores, key=scores.get)]


def _speaks_of(text: str, name: str, scores: dict[str, float]) -> bool:
    """Among the top fifth of training poems, and with a character that speaks for the theme: without this a text of
    unknown characters would beat poems whose characters speak against it."""
    theme = theme_lexicon()[name]
    return scores[name] >= theme["threshold"] and any(theme["weights"].get(char, 0.0) > 0 for char in text)


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
    return sum(_speaks_of(text, name, scores) for name in asked) / len(asked)


# --- the four scores that a reader expects

prosodic = mean_of(rhyme, meter, all_known=True)  # 韵律一致性: rhyme and meter shares in the asked form
# 风格符合度: shape, words and little repetition as in Tang verse
style = mean_of(form, fluency, no_repeat, all_known=True)


def overall(prompts: list[str], completions: list[str], meta: list[dict], **_) -> list[float | None]:
    """整体质量: the mean of 韵律一致性, 风格符合度 and, where a theme is asked, 主题相关性; 0 for a near-copy."""
    columns = (measure(prompts, completions, meta) for measure in (mean_of(prosodic, style, theme), near_copy))
    return [0.0 if copied else value for value, copied in zip(*columns, strict=True)]


REWARDS = named(form, rhyme, meter) | {"rhyme_pass": rhyme_pass, "meter_pass": meter_pass}
# 0 for every answer to a prompt that asks for no group: no difference inside a prompt
REWARDS |= named(all_three, zero_for_none(rhyme_group), zero_for_none(fluency), zero_for_none(no_repeat))
REWARDS |= named(theme, overall)
STEP_REWARDS = {"form": form_by_line, "rhyme": rhyme_by_line, "meter": meter_by_line}
DEFAULT_REWARDS = ("form", "rhyme", "meter", "theme", "fluency:0.5")
WATCHED_REWARDS = ("all_three", "no_repeat")
METRICS = {
    "form": form,
    "rhyme": rhyme_pass,
    "meter": meter_pass,
    "all_three": all_three,
    "rhyme_group": rhyme_group,
    "meter_licensed": meter_licensed,
    "meter_any": meter_any,
    "all_three_any": all_three_any,
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
    return prosody.spans(text, meta.get("form"), meta.get("book") or "pingshui")


FIELDS = {
    "form": Field("体裁", tuple(prosody.FORMS)),
    "themes": Field("主题", tuple(theme_lexicon()), many=True),
    "ask_title": Field("题目"),
    "ask_rhyme": Field("韵部"),
}
COLUMNS = ("form", "rhyme", "meter", "all_three", "主题相关性", "nll_per_character", "stopped", "distinct_2")
LOWER_IS_BETTER = ("near_copy",)


def _examples():
    """Each in both scripts: simplified, traditional."""
    tower = ("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。", "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。")
    pass_ = (
        "秦时明月汉时关，万里长征人未还。但使龙城飞将在，不教胡马度阴山。",
        "秦時明月漢時關，萬里長征人未還。但使龍城飛將在，不教胡馬度陰山。",
    )
    beans = ("红豆生南国，春来发几枝。愿君多采撷，此物最相思。", "紅豆生南國，春來發幾枝。願君多採擷，此物最相思。")
    asked = {"form": "五言绝句", "themes": ["登临"], "ask_rhyme": "下平十一尤"}
    border = {"form": "七言绝句", "themes": ["边塞"]}
    for names, good, bad, meta in (
        (("rhyme", "rhyme_pass", "all_three", "rhyme_group"), tower, ("海流", "海东", "海東"), asked),
        (("meter", "meter_pass", "all_three"), tower, ("里", "山", "山"), asked),
        (("form", "rhyme", "meter"), tower, ("欲", "，欲，", "，欲，"), asked),
        (("no_repeat",), tower, ("千里", "山山", "山山"), asked),
        (("fluency",), tower, ("依山", "山依", "山依"), asked),
        (("theme",), pass_, beans, border),
    ):
        for script in (0, 1):
            text = bad[script] if bad is beans else good[script].replace(bad[0], bad[script + 1])
            yield RewardExample(names, good[script], text, meta)


REWARD_EXAMPLES = tuple(_examples())
