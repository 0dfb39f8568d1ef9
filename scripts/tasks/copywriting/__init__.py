"""Brand copy for 原素方程: how a product becomes an instruction, and what makes a copy good. Metrics and rewards are
the same functions.

meta holds what was asked for: {"product_id": "p01", "copy_type": "paid_ad_fab"}, and "product" (a row like those of
products.jsonl) where the product is not one of the shipped ones.

The rules stand for what data/copywriting/brand_guide.md says and a pattern can see. They know words, numbers and order,
not whether a sentence is well made or a scene is alive: that is what scripts/71_judge.py asks a judge.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common.settings import ROOT
from tasks import text_metrics
from tasks.base import Field, RewardExample
from tasks.copywriting import facts as copy_facts
from tasks.copywriting.facts import Statement, find, words
from tasks.text_metrics import distinct, distinct_share, mean_of, named, no_space, per_text, ratio_to_range

DATA = ROOT / "data" / "copywriting"
# what the figures of this module depend on, besides this file: a change of one makes earlier scores stale
FILES = (DATA / "products.jsonl", DATA / "golden.jsonl", Path(__file__).with_name("facts.py"))

BRAND = "原素方程"
ENCOURAGED = ["屏障", "修护", "科学", "精简", "配方", "浓度", "源头", "温和"]
FORBIDDEN = ["神器", "逆天", "奇迹", "秒杀", "绝绝子", "yyds", "家人们"]  # the seven of the brand guide
# words of the same kind, and what a cosmetic may not say: brand guide, parts 4, 6 and 7
SAME_KIND = ["种草", "闭眼入", "无限回购", "吊打", "黑科技", "智商税", "烂脸", "救命", "天花板", "手慢无", "最后一天"]
MEDICAL = words(
    "治疗 治愈 消炎 抗炎 杀菌 抗菌 脱敏 抗敏 处方药 处方级 药用 医用 药妆 医学护肤 械字号 疗效 根治 湿疹 皮炎 痤疮 "
    "医生推荐 医院推荐"
)
ABSOLUTE = words("唯一 顶级 完美 百分之百 彻底 永久 无副作用 零刺激 全网第一 销量第一 行业第一 第一品牌")
CALLS = words("点击 查看 了解 领取 下单 购物车 收藏 进店 搜索 预约 试用 选购 咨询 订阅 关注 购买 入手")
SHARED_RUN = 20  # characters in a row that make a near-copy of a golden text; no two golden texts share as many


class CopyType(NamedTuple):
    family: str  # social, ad or long: the judge has one prompt for each
    label: str  # Chinese name
    structure: str  # what the parts are, in order
    low: int  # characters without white space
    high: int


SOCIAL, AD = ("social", 120, 260), ("ad", 60, 140)
COPY_TYPES = {
    name: CopyType(family, label, structure, low, high)
    for name, (family, low, high), label, structure in (
        ("social_media_review", SOCIAL, "社交测评", "为什么拿来看、成分与浓度、质地或用法的观察、适合谁与不适合谁"),
        ("social_media_educational", SOCIAL, "社交科普", "一个具体现象、皮肤里发生了什么、成分如何对应、怎么用"),
        ("social_media_myth_busting", SOCIAL, "社交辟谣", "一个常见说法、为什么不成立、事实与正确做法、产品的位置"),
        ("social_media_storytelling", SOCIAL, "社交故事", "时间地点人物、一个小困扰或转折、一次理解、产品自然出现"),
        ("paid_ad_fab", AD, "付费广告FAB", "特性（首句出现成分）、优势、利益、行动号召"),
        ("paid_ad_pas", AD, "付费广告PAS", "问题、放大、解决（此时才出现产品名）、行动号召"),
        ("paid_ad_bab", AD, "付费广告BAB", "之前、之后、桥梁（此时才出现产品名）、行动号召"),
        ("paid_ad_cta", AD, "付费广告CTA", "一个理由、一个证据、直接的行动号召"),
        (
            "ecommerce_long_form",
            ("long", 300, 500),
            "电商长文案",
            "定位、核心成分与原理、质地与取舍、适用人群与用法、规格与提醒；二到四段",
        ),
    )
}


class Problem(NamedTuple):
    # tag, markdown, punctuation, forbidden_word, exclamation, missing_cta, flat_persona, length, fact, structure
    kind: str
    span: tuple[int, int] | None  # where in the text; None = something is missing, or the whole text is at fault
    reason: str


# --- from a row to a prompt


@cache
def products() -> dict[str, dict]:
    """id -> row of data/copywriting/products.jsonl."""
    rows = (json.loads(line) for line in FILES[0].read_text(encoding="utf-8").splitlines() if line.strip())
    return {row["id"]: row for row in rows}


@cache
def known_ingredients() -> frozenset[str]:
    return frozenset(item["name"] for product in products().values() for item in product["ingredients"])


def product_of(meta: dict) -> dict:
    """The product sheet of a row. Raises ValueError where it names none that is known."""
    if isinstance(meta.get("product"), dict):
        return meta["product"]
    if meta.get("product_id") not in products():
        raise ValueError(f"unknown product_id {meta.get('product_id')!r}: not in data/copywriting/products.jsonl")
    return products()[meta["product_id"]]


def copy_type_of(meta: dict) -> CopyType:
    """What kind of copy a row asks for. Raises ValueError where it is none of the nine."""
    if meta.get("copy_type") not in COPY_TYPES:
        raise ValueError(f"unknown copy_type {meta.get('copy_type')!r}: expected one of {', '.join(COPY_TYPES)}")
    return COPY_TYPES[meta["copy_type"]]


def sheet(product: dict) -> str:
    """The product sheet as the prompt and the judge show it."""
    ingredients = "、".join(f"{item['name']} {item['concentration']}" for item in product["ingredients"])
    return (
        f"产品：{product['name']}（{product['category']}）\n核心成分：{ingredients}\n功效：{'、'.join(product['effects'])}\n"
        f"适用人群：{product['audience']}\n可写事实：{'；'.join(product['may_claim'])}\n"
        f"不得宣称：{'；'.join(product['must_not_claim'])}\n规格：{product['volume']}，{product['price_yuan']} 元"
    )


def instruction(product: dict, copy_type: str) -> str:
    kind = COPY_TYPES[copy_type]
    return (
        f"为品牌“{BRAND}”的产品写一篇{kind.label}。\n{sheet(product)}\n结构：{kind.structure}\n"
        f"要求：{kind.low}到{kind.high}字，冷静专业，只写上面的事实，不用感叹号，纯文本。"
    )


def messages(row: dict) -> list[dict]:
    """A row's product and copy type as the chat messages that ask for the copy."""
    copy_type_of(row)
    return [{"role": "user", "content": instruction(product_of(row), row["copy_type"])}]


# --- pieces of a text


def characters(text: str) -> int:
    """Length as the brand guide counts it: without white space."""
    return len(no_space(text))


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans of the sentences, without what ends them; the closing quote of direct speech goes to the sentence
    before."""
    return [
        match.span() for match in re.finditer(r"[^\s。！？!?][^。！？!?\n]*", text) if match.group().strip("”」』’ ")
    ]


def _has_call(text: str) -> bool:
    """Does the last sentence ask for an action? Markup behind it is another fault, not a missing call."""
    text = _blank(text, "tag", "markdown")
    spans = sentences(text)
    return bool(spans) and any(word in text[slice(*spans[-1])] for word in CALLS)


# a voice: somebody speaks, is spoken to, is quoted, or asks
VOICE = re.compile(
    r"[我你您咱她]|(?<![其吉])他|大家|有人|[妈爸爷奶姐哥弟妹]|同事|朋友|室友|同学|师傅|老师|师[说问教]"
    r"|[“「『]|[？?]|别[再急只忘贪勉跟]|不妨|先别|[人者]会觉得"
)


def _blank(text: str, *kinds: str) -> str:
    """The text with spaces in the place of what the MARKS of these kinds match: places stay as they are."""
    for kind, pattern, _ in MARKS:
        if kind in kinds:
            text = pattern.sub(lambda match: " " * len(match.group()), text)
    return text


def statements(text: str, product: dict) -> list[Statement]:
    """What the text says that the product sheet can confirm or contradict; the 1 of a list item "1. " is no figure."""
    return copy_facts.statements(_blank(text, "markdown"), product, known_ingredients())


# --- structure: a dense reward, one slot a part: a partly right text scores higher than a wrong one


def structure_slots(text: str, meta: dict) -> list[tuple[str, bool]]:
    """(part, is it present where it belongs?) for the parts that the copy type asks for."""
    product, spans = product_of(meta), sentences(text)
    first, last = (text[slice(*spans[place])] if spans else "" for place in (0, -1))
    head, at = text[:70], text.find(product["name"])
    named = at >= 0
    late = named and product["name"] not in first
    before, after = re.search("之前|以前|过去|曾|从前", text), re.search("现在|如今|眼下|今[年天]", text)
    paragraphs = [part for part in text.split("\n") if part.strip()] or [""]
    confirmed = [text[s.start : s.end] for s in statements(text, product) if s.true]

    def has(pattern: str, part: str = text) -> bool:
        return bool(re.search(pattern, part))

    def ingredient(part: str = text) -> bool:
        return any(item["name"] in part for item in product["ingredients"])

    slots = {
        "paid_ad_fab": [
            ("首句出现成分", ingredient(first)),
            ("特性之后有优势与利益", len(spans) >= 3),
            ("点出产品名", named),
        ],
        "paid_ad_pas": [
            ("先说问题，首句不出现产品", bool(first) and product["name"] not in first and BRAND not in first),
            ("问题之后才有产品", named and any(end <= at for _, end in spans)),
            ("用成分解决", named and ingredient(text[at:])),
        ],
        "paid_ad_bab": [
            ("说出之前", bool(before)),
            ("之后在之前的后面", bool(before and after and before.start() < after.start())),
            ("桥梁在最后，点出产品名", bool(named and after and after.start() < at)),
        ],
        "paid_ad_cta": [
            ("有理由", len(spans) >= 2),
            ("有证据", bool(confirmed) or ingredient()),
            ("点出产品名", named),
            ("行动号召够短", 0 < len(last) <= 40),
        ],
        "social_media_review": [
            ("成分或浓度", ingredient()),
            ("适合谁、不适合谁", has("适合|合适|的人|可以|值得|会喜欢|肤质|皮[会值合要]|不必|够用")),
            ("点出产品名", named),
        ],
        "social_media_educational": [
            ("现象与原因", has("[？?]|为什么|因为|所以|会|就")),
            ("成分如何对应", ingredient()),
            ("产品不在第一句", late),
        ],
        "social_media_myth_busting": [
            ("先摆出一个说法", has("[“「『]|说|信|以为|听|问", head)),
            ("产品在说法之后", late),
            ("有事实", bool(confirmed) or ingredient()),
        ],
        "social_media_storytelling": [
            ("有人物", has("[他她我]|妈|爸")),
            ("开头有时间或地点", has("[天年月日早晚夜点冬夏春秋周里上那]", head)),
            ("产品后出现", late),
        ],
        "ecommerce_long_form": [
            ("二到四段", 2 <= len(paragraphs) <= 4),
            ("品牌名与产品名", BRAND in text and named),
            ("成分与浓度", any("%" in part for part in confirmed)),
            ("适用人群", has("适合|写给|准备|适用|面向|而写|的人|肤质")),
            ("末段有规格", any(str(product[key]) in paragraphs[-1] for key in ("volume", "price_yuan"))),
        ],
    }
    return slots[meta["copy_type"]]


# --- problems: what a cleaning round has to fix

EMOJI = "[\U0001f000-\U0001faff☀-➿⭐⬛]\ufe0f?"
LABEL = (
    r"(?:^|(?<=\n))\s*(?:标题|正文|文案|开头|结尾|结语|产品名称?|品牌|卖点|行动号召|CTA|特性|优势|利益|问题|放大|解决(?:方案)?|之前|之后|桥梁|回答|好的)"
    r"(?:\d)?\s*[:：]|^好的，|^以下是[^。\n]*[:：]"
)
TAG = r"</?[A-Za-z|][^<>\n]{0,60}>|&[a-z]{2,6};|#[^\s#，。]+#?|【[^】\n]*】|\[[^\]\n]*\](?!\()|\{[^}\n]*\}"
BULLET = r"(?:^|(?<=\n))\s*(?:#{1,6}\s|[-*+•·]\s+|\d{1,2}[.、)]\s*(?!\d)|>\s|-{3,}|\|)"
PATTERNS = (
    ("tag", f"{TAG}|{LABEL}|{EMOJI}", "标签、占位或表情"),
    ("markdown", rf"\*\*|__|`+|{BULLET}|\[[^\]\n]*\]\([^)\n]*\)", "markdown 标记"),
    ("exclamation", r"[！!]+", "感叹号"),
    ("punctuation", r"[？?]{2,}|…+|\.{3,}|[～~]+", "连用问号、省略号或波浪号"),
)
MARKS = tuple((kind, re.compile(pattern), reason) for kind, pattern, reason in PATTERNS)


def problems(text: str, meta: dict) -> list[Problem]:
    """What keeps a copy from being published, as far as rules can see; empty for a clean one. Ordered by place, what
    has none last. Raises ValueError where meta names no known product or copy type."""
    kind, product = copy_type_of(meta), product_of(meta)
    found = [
        Problem(name, m.span(), f"{reason}：{m.group().strip()}")
        for name, pattern, reason in MARKS
        for m in pattern.finditer(text)
    ]
    if text.count("？") + text.count("?") > 2:
        found.append(Problem("punctuation", None, "问号多于两个"))
    lists = (("禁用词", FORBIDDEN), ("同类禁用词", SAME_KIND), ("医疗用语", MEDICAL), ("绝对化用语", ABSOLUTE))
    for label, listed in lists:
        found += [
            Problem("forbidden_word", (start, end), f"{label}：{word}") for start, end, word in find(listed, text)
        ]
    absolute = re.finditer(r"最(?:好|佳|强|高|优|先进|有效|安全|温和|快|大|便宜|专业|权威|低价|新鲜|完美)", text)
    found += [Problem("forbidden_word", match.span(), f"绝对化用语：{match.group()}") for match in absolute]
    found += [Problem("fact", (s.start, s.end), s.what) for s in statements(text, product) if not s.true]
    if product["name"] not in text:
        found.append(Problem("fact", None, f"没有写产品全名：{product['name']}"))
    if kind.family == "ad" and not _has_call(text):
        found.append(Problem("missing_cta", None, "最后一句不是行动号召"))
    if kind.family == "social" and not VOICE.search(text):
        found.append(Problem("flat_persona", None, "听不出说话的人"))
    if not kind.low <= characters(text) <= kind.high:
        found.append(Problem("length", None, f"{characters(text)} 字，应为 {kind.low} 到 {kind.high} 字"))
    found += [Problem("structure", None, f"缺少：{part}") for part, ok in structure_slots(text, meta) if not ok]
    return sorted(found, key=lambda p: (p.span is None, p.span or (0, 0), p.kind))


# --- metrics and rewards


@per_text
def clean(text: str, meta: dict) -> float:
    """1 where `problems` finds nothing, else 0: what stage 14 lets pass."""
    return float(not problems(text, meta))


@per_text
def allowed(text: str, meta: dict) -> float:
    """1 without any forbidden word, else 0."""
    return float(not any(problem.kind == "forbidden_word" for problem in problems(text, meta)))


@per_text
def encouraged(text: str, meta: dict) -> float:
    """1 with one to six encouraged words, 0 with none; more is stacking and falls by a quarter each."""
    count = len(find(ENCOURAGED, text))
    return 0.0 if not count else max(0.0, 1.0 - 0.25 * max(0, count - 6))


@per_text
def structure(text: str, meta: dict) -> float:
    """Share of the parts that the copy type asks for and that stand in their place; the call of an ad is one of
    them."""
    slots = [ok for _, ok in structure_slots(text, meta)]
    if copy_type_of(meta).family == "ad":
        slots.append(_has_call(text))
    return sum(slots) / len(slots)


@per_text
def call(text: str, meta: dict) -> float | None:
    """1 where an ad ends in a call to action, else 0; None for what is no ad."""
    return float(_has_call(text)) if copy_type_of(meta).family == "ad" else None


@per_text
def facts_true(text: str, meta: dict) -> float | None:
    """Share of the checkable statements that the product sheet confirms; None where the text makes none."""
    found = statements(text, product_of(meta))
    return sum(statement.true for statement in found) / len(found) if found else None


@per_text
def facts_stated(text: str, meta: dict) -> float:
    """How much of the sheet is there, 0..1: a third each for the full name, an ingredient, two confirmed statements."""
    product = product_of(meta)
    confirmed = len({text[s.start : s.end] for s in statements(text, product) if s.true})
    ingredient = any(item["name"] in text for item in product["ingredients"])
    return (float(product["name"] in text) + float(ingredient) + min(2, confirmed) / 2) / 3


@per_text
def facts(text: str, meta: dict) -> float:
    """Facts present times facts right, 0..1: 0 for a text without facts; each false statement lowers it."""
    found = statements(text, product_of(meta))
    right = sum(statement.true for statement in found) / len(found) if found else 1.0
    return facts_stated([], [text], [meta])[0] * right


@per_text
def calm(text: str, meta: dict) -> float:
    """1 minus the exclamation marks per sentence, at least 0; 0 for a text without a sentence, which is no copy: as a
    reward None would let an empty answer pass."""
    spans = sentences(text)
    return max(0.0, 1.0 - len(re.findall("[！!]", text)) / len(spans)) if spans else 0.0


@per_text
def length(text: str, meta: dict) -> float:
    """1 inside the type's range of characters; below it the share of the least, above it the share of the most."""
    kind = copy_type_of(meta)
    return ratio_to_range(characters(text), kind.low, kind.high)


@per_text
def persona(text: str, meta: dict) -> float | None:
    """1 where somebody speaks, is spoken to or is quoted, else 0; None for what is no social post."""
    return float(bool(VOICE.search(text))) if copy_type_of(meta).family == "social" else None


@per_text
def no_repeat(text: str, meta: dict) -> float:
    """Share of distinct runs of four characters; 0 for a text shorter than that."""
    return distinct_share(no_space(text), 4) or 0.0


def _golden_copies() -> list[str]:
    rows = (json.loads(line) for line in FILES[1].read_text(encoding="utf-8").splitlines() if line.strip())
    return [row["copy"] for row in rows if products()[row["product_id"]]["split"] == "train"]


# 1 where the text shares a run of 20 characters with a golden copy of a training product
near_copy = text_metrics.near_copy(_golden_copies, SHARED_RUN, no_space)
PARTS = (allowed, encouraged, structure, facts, calm, length, persona, no_repeat)


def overall(prompts: list[str], completions: list[str], meta: list[dict], **_) -> list[float | None]:
    """Mean of the parts that apply: words, structure, facts, calm, length, persona, no repetition; 0 without a
    sentence."""
    values = mean_of(*PARTS)(prompts, completions, meta)
    return [value if sentences(text) else 0.0 for text, value in zip(completions, values, strict=True)]


REWARDS = named(allowed, encouraged, structure, facts, calm, length, no_repeat, clean, overall)
DEFAULT_REWARDS = ("facts:2", "structure", "allowed", "length", "calm", "no_repeat:0.5")
WATCHED_REWARDS = ("clean", "encouraged")
METRICS = named(clean, allowed, encouraged, structure, call, facts_true, facts_stated, calm, length, persona, no_repeat)
METRICS |= {"near_copy": near_copy, "overall": overall}
# What stage 71 shows with --judge rules: the judge prompts' dimensions as far as rules can see them (可读性 they
# cannot).
JUDGE = {
    "指令遵循": mean_of(structure, length),
    "事实准确": facts,
    "品牌语气": mean_of(allowed, calm, encouraged),
    "人格叙事": persona,
    "结构": structure,
    "行动号召": call,
    "信息完整": facts_stated,
}


def judge_prompt(meta: dict) -> str:
    """Which file of data/copywriting/judge_prompts/<version> judges this row: social, ad or long."""
    return copy_type_of(meta).family


SET_METRICS = {"distinct_2": distinct(2, no_space), "distinct_4": distinct(4, no_space)}


def mark(text: str, meta: dict) -> list[tuple[int, int, str]]:
    """Spans (start, end, label) that the comparison page highlights, in order, not overlapping: faults as
    "<kind>_fault", confirmed statements as "fact", encouraged words as "encouraged"."""
    found = [
        (*p.span, p.kind if p.kind.endswith("_fault") else f"{p.kind}_fault") for p in problems(text, meta) if p.span
    ]
    found += [(s.start, s.end, "fact") for s in statements(text, product_of(meta)) if s.true]
    found += [(start, end, "encouraged") for start, end, _ in find(ENCOURAGED, text)]
    kept: list[tuple[int, int, str]] = []
    for start, end, label in sorted(found, key=lambda span: (not span[2].endswith("_fault"), span)):
        if end > start and all(end <= s or start >= e for s, e, _ in kept):
            kept.append((start, end, label))
    return sorted(kept)


FIELDS = {"product_id": Field("产品", tuple(products())), "copy_type": Field("文案类型", tuple(COPY_TYPES))}
COLUMNS = ("allowed", "structure", "call", "facts_true", "length", "overall", "distinct_2")
LOWER_IS_BETTER = ("near_copy",)

_COPY = (
    "评洁面，我先看洗完十分钟后的脸，再看泡沫。泡沫多半是表面活性剂的表演，紧不紧才是实情。"
    "这支氨基酸净润洁面乳用椰油酰甘氨酸钾 12% 清洁，甘油 8% 与泛醇 1% 温和兜底，配方里没有皂基。"
    "泡沫细密，冲两遍就净，指腹摸上去不涩。中性到偏干的肤质会喜欢；"
    "习惯洗到吱吱响的人，可能要适应几天这种安静的干净。"
)
REWARD_EXAMPLES = tuple(
    RewardExample((*names, "overall"), _COPY, bad, {"product_id": "p01", "copy_type": "social_media_review"})
    for names, bad in (
        (("allowed", "clean"), f"家人们，{_COPY}"),
        (("facts", "clean"), _COPY.replace("12%", "52%")),
        (("calm", "clean"), _COPY.replace("。", "！")),
        (("length", "structure", "clean"), "洗完脸很舒服。"),
        (("no_repeat",), _COPY + _COPY),
        (("encouraged",), _COPY.replace("温和", "").replace("配方", "")),
    )
)
