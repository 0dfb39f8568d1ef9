"""Comments on Weibo posts: how a post becomes a prompt, and what makes an answer one that people there would write.

The prompt holds the post and its thread, so that meta is not needed. An empty answer scores 0 where a text could score
1. Whether a comment is any good is for people, likes and reward models to say: these rules only say whether it has the
outer form of one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

from common.settings import ROOT
from tasks.base import Field, RewardExample
from tasks.text_metrics import distinct, distinct_share, mean_of, named, near_copy, per_text, ratio_to_range
from tasks.weibo import cleaning as weibo_text

DATA = ROOT / "data" / "weibo"
# what the figures of this module depend on, besides this file: a change of one makes earlier scores stale
FILES = (DATA / "sample_posts.json", DATA / "sample_comments.json", Path(__file__).with_name("cleaning.py"))
COPIED_RUN = 8  # characters in a row that a comment shares with the prompt: from here on it is copying
SHARED_RUN = 10  # the same with a comment of the training split: one of 72 held-out comments of people does


# --- from a row to a prompt


def messages(row: dict) -> list[dict]:
    """The chat message that asks for a comment under row["post"], or for an answer to the comment row["parent"] in the
    thread that row["root"] opened. Words of the bot are marked as 罗伯特's."""
    lines = [f"微博：{row['post']}"]
    for place in ("root", "parent"):
        if row.get(place):
            lines.append(f"{'罗伯特' if row.get(f'{place}_is_bot') else '网友'}：{row[place]}")
    task = "以普通网友的口吻，回复最后一条评论。" if row.get("parent") else "以普通网友的口吻，给这条微博写一条评论。"
    return [{"role": "user", "content": task + "\n\n" + "\n".join(lines)}]


# --- what people write, measured on the shipped sample


@cache
def human_comments(held_out: bool) -> tuple[str, ...]:
    """Cleaned human comments of the sample: those under posts that stage 11 holds out (val and test, at --held-out 5 or
    more), or all others."""
    posts = {
        post["mblogid"]: weibo_text.clean(post["content"]) for post in json.loads(FILES[0].read_text(encoding="utf-8"))
    }
    texts = []
    for comment in json.loads(FILES[1].read_text(encoding="utf-8")):
        split = weibo_text.split_of(weibo_text.key(posts[comment["root_post_mblogid"]]))
        text = weibo_text.clean(comment["content"])
        is_bot = comment["comment_user"]["_id"] == weibo_text.BOT_ID
        if (split != "train") == held_out and not is_bot and not weibo_text.fault(text):
            texts.append(text)
    return tuple(texts)


@cache
def human_range() -> tuple[int, int]:
    """Characters from which and up to which nine of ten human comments of the training split reach."""
    lengths = sorted(map(weibo_text.characters, human_comments(held_out=False)))
    return lengths[len(lengths) // 20], lengths[len(lengths) * 19 // 20]


# --- rewards: 1 is as people write, 0 is not


@per_text
def length(text: str, meta: dict) -> float:
    """1 within the human range of lengths; outside, the ratio to its nearer end."""
    return ratio_to_range(weibo_text.characters(text.strip()), *human_range())


def no_copy(
    prompts: list[str], completions: list[str], meta: list[dict], conversations: list[list[dict]] | None = None, **_
) -> list[float]:
    """1 minus the share of characters in runs of 8 or more that the post, the thread or the instruction has too."""
    sources = ["\n".join(turn["content"] for turn in turns) for turns in conversations] if conversations else prompts
    return [
        1 - weibo_text.copied_characters(text, source, COPIED_RUN) / len(text) if text else 0.0
        for text, source in zip(completions, sources, strict=True)
    ]


STRETCH = re.compile(r"(\[[^\[\]]{1,8}\]|.)\1{2,}", re.DOTALL)


@per_text
def no_repeat(text: str, meta: dict) -> float:
    """Distinct groups of three characters over all such groups. Laughter and rows of one emoji count as three: people
    write those."""
    text = STRETCH.sub(r"\1\1\1", text.strip())
    return float(bool(text)) if len(text) < 6 else distinct_share(text, 3)


@per_text
def no_personal(text: str, meta: dict) -> float:
    """0 where a text holds a telephone number, an account, an address, an identity number, or names a user; else 1."""
    return float(not weibo_text.has_personal(text) and "@" not in text)


@per_text
def no_assistant(text: str, meta: dict) -> float:
    """0 where a text speaks as an assistant or as the platform's own bot does; else 1."""
    return float(not weibo_text.ASSISTANT.search(text))


@per_text
def clean(text: str, meta: dict) -> float:
    """1 where cleaning finds nothing to remove: no URL, forward chain, zero-width character, HTML, advertisement, half
    an emoji."""
    text = text.strip()
    whole = not weibo_text.HALF_CHARACTER.search(text) and not weibo_text.ADVERT.search(text)
    return float(bool(text) and whole and weibo_text.clean(text) == text)


@per_text
def emoji(text: str, meta: dict) -> float:
    """1 where a text has an emoji. To compare with people's rate: more is not better."""
    return float(weibo_text.has_emoji(text))


def words(text: str) -> str:
    """Letters, digits and Han characters without emoticons; of a stretch of one character three."""
    return STRETCH.sub(r"\1\1\1", weibo_text.key(weibo_text.BRACKET_EMOJI.sub("", text)))


def overall(prompts: list[str], completions: list[str], meta: list[dict], **known) -> list[float]:
    """The mean of length, no_copy and no_repeat; 0 where no_personal, no_assistant or clean fails."""
    parts = (mean_of(length, no_copy, no_repeat), *GATES)
    columns = (part(prompts, completions, meta, **known) for part in parts)
    return [value * min(gates) for value, *gates in zip(*columns, strict=True)]


GATES = (no_personal, no_assistant, clean)
REWARDS = named(length, no_copy, no_repeat, *GATES, overall)
DEFAULT_REWARDS = ("length", "no_copy", "no_repeat", "clean", "no_assistant", "no_personal")
METRICS = REWARDS | {
    "emoji": emoji,
    "near_copy": near_copy(lambda: human_comments(held_out=False), SHARED_RUN, words),
}


# --- of a whole set of texts


LENGTH_CLASSES = (2, 5, 10, 20, 40, 80, 140)  # upper ends, in characters
MARK = re.compile(r"[，。！？；：、～…,.!?;:~\n]|\s")


def length_classes(text: str) -> list[int]:
    return [sum(weibo_text.characters(text.strip()) > end for end in LENGTH_CLASSES)]


def marks(text: str) -> list[str]:
    """Every punctuation mark; a text without any counts as one mark of its own kind."""
    return MARK.findall(text.strip()) or ["none"]


def emoticons(text: str) -> list[int]:
    """How many emoticons and emoji, three for more."""
    return [min(3, len(weibo_text.BRACKET_EMOJI.findall(text)) + len(weibo_text.PICTURE_EMOJI.findall(text)))]


# name of a distance -> f(text) -> the classes that are counted of it
CLASSES = {"length_distance": length_classes, "punctuation_distance": marks, "emoticon_distance": emoticons}


def distance_to_people(classes: Callable[[str], list]) -> Callable[[list[str]], float]:
    """Total variation distance of the classes of texts from those of held-out human comments: 0 the same shares, 1
    nothing in common. runs/weibo_distances.py gives intervals."""

    def measure(completions: list[str]) -> float:
        a, b = (
            Counter(name for text in texts for name in classes(text))
            for texts in (completions, human_comments(held_out=True))
        )
        return sum(abs(a[name] / max(1, a.total()) - b[name] / max(1, b.total())) for name in a.keys() | b.keys()) / 2

    return measure


SET_METRICS = {"distinct_1": distinct(1, weibo_text.key), "distinct_2": distinct(2, weibo_text.key)}
SET_METRICS |= {name: distance_to_people(classes) for name, classes in CLASSES.items()}

FAULTS = (
    ("personal data: fault", weibo_text.PERSONAL),
    ("names a user: fault", weibo_text.MENTION),
    ("assistant-speak: fault", weibo_text.ASSISTANT),
    ("advertisement: fault", weibo_text.ADVERT),
    ("link: fault", weibo_text.URL),
    ("forward chain: fault", weibo_text.CHAIN),
    ("emoji", weibo_text.BRACKET_EMOJI),
)


def mark(text: str, meta: dict) -> list[tuple[int, int, str]]:
    """Spans (start, end, label) that the comparison page highlights: faults, and emoji in brackets."""
    spans = []
    for label, pattern in FAULTS:
        for found in pattern.finditer(text):
            if found.end() > found.start() and all(
                found.start() >= end or found.end() <= start for start, end, _ in spans
            ):
                spans.append((*found.span(), label))
    return spans


FIELDS = {"post": Field("微博"), "root": Field("评论"), "parent": Field("要回复的评论")}
LOWER_IS_BETTER = ("near_copy", *CLASSES)

_POST = "微博：今天去新开的面馆排了一个小时的队，牛肉面味道不错，就是人太多了。"
_GOOD = "我上周也去排了，面确实好吃，值得等"
REWARD_EXAMPLES = tuple(
    RewardExample((*names, "overall"), good, bad, prompt=_POST)
    for names, good, bad in (
        (("length",), _GOOD, "嗯"),
        (("no_copy",), _GOOD, "今天去新开的面馆排了一个小时的队，牛肉面味道不错"),
        (("no_repeat",), _GOOD, "好吃的面好吃的面好吃的面好吃的面"),
        (("no_assistant",), _GOOD, "作为一个人工智能助手，我很乐意帮您评论"),
        (("no_personal",), _GOOD, "面好吃，想拼单的打 13812345678 找我"),
        (("clean",), _GOOD, "面好吃，菜单在 http://example.com/a 自己看"),
        (("no_repeat", "clean"), "我上週也去排了，麵確實好吃，值得等", "好吃的麵好吃的麵 http://example.com/a"),
    )
)
