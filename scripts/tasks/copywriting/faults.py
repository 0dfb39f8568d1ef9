"""Copy that is worse than a golden one, made by rule: weak, exaggerated, or false. What stage 15 does without an API.

Where the fault allows, a rejected text keeps the length and the words of the golden one, so that neither separates the
two. Hype is the exception: it is made of words. Every function returns (text, what was done), or None where the
fault does not fit.
"""

from __future__ import annotations

import random
import re

from tasks import copywriting as task
from tasks.copywriting.facts import words

KINDS = ("weak", "exaggerated", "false")
# kinds of problems (tasks/copywriting) that show the fault; a shuffled text need not show any
SHOWN_BY = {"weak": (), "exaggerated": ("forbidden_word", "exclamation"), "false": ("fact",)}

HYPE = words(
    "绝绝子 真的逆天了 见证奇迹的时刻 护肤界的神器 家人们闭眼入 秒杀一众大牌 效果百分之百有效 用它一次就年轻十岁 "
    "全网第一的口碑摆在这里 彻底告别所有肌肤问题 完美到挑不出一点毛病 这就是护肤品的天花板 "
    "永久锁住你的年轻状态，越用越美 不买真的会后悔一辈子，赶紧冲 第二天醒来整张脸都在发光，太夸张了 "
    "姐妹们看我的脸就知道它有多逆天，回购一百次都不够"
)
VAGUE = ["多种成分", "有效成分", "优质成分", "精选成分"]
EMPTY = words(
    "效果很不错 大家都说好 用了都喜欢 质量值得信赖 性价比也很高 是护肤的好选择 使用感受非常舒服 日常护肤都可以使用 "
    "无论什么肤质都可以放心使用 品质有保证，口碑一直很好"
)
NAME = "\ufffc"  # stands for the product's name while other words are replaced: they may be part of it
TOTAL = {"30ml": "50ml", "50ml": "30ml", "100g": "150g", "50g": "30g", "150ml": "120ml"}


def clauses(text: str) -> list[tuple[int, int]]:
    """Spans of the clauses: the text between two punctuation marks."""
    return [match.span() for match in re.finditer(r"[^，。！？；：、\n“”]+", text)]


# --- weak


def other_type(row: dict, golden: list[dict], rng: random.Random) -> tuple[str, str] | None:
    """A good copy of the same product, but of another type in the same family: the instruction is not followed."""
    family = task.COPY_TYPES[row["copy_type"]].family
    others = [
        other
        for other in golden
        if other["product_id"] == row["product_id"]
        and other["copy_type"] != row["copy_type"]
        and task.COPY_TYPES[other["copy_type"]].family == family
        # only where the rules see that it is another type
        and task.problems(other["copy"], {**row["meta"], "copy_type": row["copy_type"]})
    ]
    if not others:
        return None
    other = rng.choice(others)
    return other["copy"], f"a {other['copy_type']}"


def shuffled(row: dict, golden: list[dict], rng: random.Random) -> tuple[str, str] | None:
    """The same sentences in another order: every character is kept, the structure is lost."""
    parts = re.findall(r"[^。！？\n]+[。！？”]*\n?", row["copy"])
    if len(parts) < 3 or "".join(parts) != row["copy"]:
        return None
    ends = ["\n" if part.endswith("\n") else "" for part in parts]
    mixed = [part.rstrip("\n") for part in parts]
    for _ in range(10):
        rng.shuffle(mixed)
        text = "".join(part + end for part, end in zip(mixed, ends, strict=True))
        if text != row["copy"]:
            return text, "sentences in another order"
    return None


def vague(row: dict, golden: list[dict], rng: random.Random) -> tuple[str, str] | None:
    """Names and concentrations of the ingredients are replaced by empty praise of the same length."""
    name = row["product"]["name"]
    text = row["copy"].replace(name, NAME)
    for item in sorted(row["product"]["ingredients"], key=lambda item: -len(item["name"])):
        number = re.escape(item["concentration"].rstrip("%"))
        text = re.sub(rf"{re.escape(item['name'])}\s*{number}\s*%", lambda _: rng.choice(VAGUE), text)
        text = text.replace(item["name"], rng.choice(VAGUE))
    text = re.sub(r"\s*\d+(?:\.\d+)?\s*%", "", text).replace(NAME, name)
    if text == row["copy"]:
        return None
    for _ in range(4):  # as long as before
        lost = len(row["copy"]) - len(text)
        starts = [start for start, _ in task.sentences(text)[:-1]]
        fit = [phrase for phrase in EMPTY if phrase not in text and len(phrase) <= lost + 1]
        if not fit or not starts:
            break
        start = rng.choice(starts)
        text = text[:start] + min(fit, key=lambda phrase: abs(lost - len(phrase) - 1)) + "，" + text[start:]
    return text, "no ingredient, no concentration"


# --- exaggerated


def exaggerated(row: dict, golden: list[dict], rng: random.Random) -> tuple[str, str] | None:
    """Hype replaces two to four clauses of about its length; half of the texts get exclamation marks too."""
    text = row["copy"]
    free = [(s, e) for s, e in clauses(text)[1:-1] if e - s >= 4 and row["product"]["name"] not in text[s:e]]
    ends = [(s, e) for s, e in free if text[e : e + 1] == "。"]  # where it reads like one more sentence of praise
    free = ends if len(ends) >= 2 else free
    if len(free) < 2:
        return None
    chosen = rng.sample(free, min(len(free), rng.randint(2, 3) + (len(text) > 250)))
    hype = rng.sample([*HYPE, *row["product"]["must_not_claim"]], 12)
    done = []
    for start, end in sorted(chosen, reverse=True):
        phrase = min(hype, key=lambda phrase: abs(len(phrase) - (end - start)))
        hype.remove(phrase)
        done.append(phrase)
        text = text[:start] + phrase + text[end:]
    if rng.random() < 0.5:
        stops = [match.start() for match in re.finditer("。", text)]
        for stop in rng.sample(stops, max(1, len(stops) // 3)) if stops else []:
            text = text[:stop] + "！" + text[stop + 1 :]
    return text, "、".join(reversed(done))


# --- false


def false(row: dict, golden: list[dict], rng: random.Random) -> tuple[str, str] | None:
    """One or two facts of the product sheet are changed; everything else stays."""
    changes = [_concentration, _ingredient, _claim, _contents, _size]
    rng.shuffle(changes)
    name = row["product"]["name"]
    text, done, wanted = row["copy"].replace(name, NAME), [], rng.choice((1, 1, 2))
    for change in changes:
        if len(done) == wanted:
            break
        if (changed := change(text, row["product"], rng)) and changed[0] != text:
            text = changed[0]
            done.append(changed[1])
    return (text.replace(NAME, name), "; ".join(done)) if done else None


def _concentration(text: str, product: dict, rng: random.Random) -> tuple[str, str] | None:
    found = [
        match
        for item in product["ingredients"]
        for match in re.finditer(rf"(?<![\d.]){re.escape(item['concentration'].rstrip('%'))}(?=\s*%)", text)
    ]
    if not found:
        return None
    match = rng.choice(found)
    known = {float(item["concentration"].rstrip("%")) for item in product["ingredients"]}
    old = float(match.group())
    values = [value for value in (old * 2, old * 3, old / 2, old * 1.5) if value < 100 and value not in known]
    if not values:
        return None
    new = f"{rng.choice(values):.4g}"
    return text[: match.start()] + new + text[match.end() :], f"{match.group()}% -> {new}%"


def _ingredient(text: str, product: dict, rng: random.Random) -> tuple[str, str] | None:
    own = {item["name"] for item in product["ingredients"]}
    # with its concentration, so that the sheet contradicts it
    there = [i for i in product["ingredients"] if re.search(rf"{re.escape(i['name'])}\s*[\d.]+\s*%", text)]
    others = sorted({i["name"] for p in task.products().values() for i in p["ingredients"]} - own)
    if not there or not others:
        return None
    old = rng.choice(there)["name"]
    near = sorted(others, key=lambda name: (abs(len(name) - len(old)), name))[:5]
    new = rng.choice(near)
    return text.replace(old, new), f"{old} -> {new}"


def _claim(text: str, product: dict, rng: random.Random) -> tuple[str, str] | None:
    there = [effect for effect in product["effects"] if effect in text]
    # a medical claim is recognised by its words alone: too easy to tell from the golden text
    claims = [claim for claim in product["must_not_claim"] if not any(w in claim for w in task.MEDICAL + task.ABSOLUTE)]
    if not there or not claims:
        return None
    old, new = rng.choice(there), rng.choice(claims)
    return text.replace(old, new, 1), f"{old} -> {new}"


def _contents(text: str, product: dict, rng: random.Random) -> tuple[str, str] | None:
    found = list(re.finditer("不含(?=[香色乙皂硅矿])", text))
    if not found:
        return None
    match = rng.choice(found)
    return text[: match.start()] + "富含" + text[match.end() :], "不含 -> 富含"


def _size(text: str, product: dict, rng: random.Random) -> tuple[str, str] | None:
    price = f"{product['price_yuan']} 元"
    if price in text:
        new = f"{product['price_yuan'] + rng.choice((-40, -20, 30, 60))} 元"
        return text.replace(price, new), f"{price} -> {new}"
    if product["volume"] in TOTAL and product["volume"] in text:
        return text.replace(product["volume"], TOTAL[product["volume"]]), f"{product['volume']} changed"
    return None


STRATEGIES = {
    "weak": (("other_type", other_type), ("shuffled", shuffled), ("vague", vague)),
    "exaggerated": (("hype", exaggerated),),
    "false": (("facts", false),),
}


def shows(kind: str, text: str, meta: dict) -> bool:
    """Do the rules find the fault of this kind? Only a fault with a place in the text counts, not something missing."""
    found = {problem.kind for problem in task.problems(text, meta) if problem.span}
    return not SHOWN_BY[kind] or bool(found & set(SHOWN_BY[kind]))


def spoil(kind: str, row: dict, golden: list[dict], seed: int) -> tuple[str, str, str] | None:
    """(rejected text, strategy, what was done) for a golden row with `copy`, `meta`, `product`; None where no strategy
    fits."""
    rng = random.Random(f"{seed}/{row['id']}/{kind}")
    strategies = list(STRATEGIES[kind])
    rng.shuffle(strategies)
    for name, strategy in strategies:
        for _ in range(4):
            made = strategy(row, golden, rng)
            if made and made[0] != row["copy"] and shows(kind, made[0], row["meta"]):
                return made[0], name, made[1]
    return None
