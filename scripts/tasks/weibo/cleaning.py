"""What a Weibo text is made of: own words, forward chain, mentions, links; and which texts no model should learn to
write.

`clean` keeps what people write (emoji, tone, hashtags, laughter) and removes what they do not. It is its own fixed
point: clean(clean(text)) == clean(text).
"""

from __future__ import annotations

import html
import re

from tasks import text_metrics

BOT_ID = "79f6c7ffc7270a3a7d3136245ab0f8ac"  # 评论罗伯特 in the CommentR Interaction Dataset
BOT_NAMES = ("评论罗伯特", "罗伯特")
BOT_LOCATION = "来自罗伯特"  # how the place of its replies begins: 来自罗伯特, 来自罗伯特贱萌版
HELD_OUT = 5  # percent of the posts in test, and as many in val; with more percent those stay held out
ELLIPSIS = "…"

ZERO_WIDTH = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
# control characters and private-use icons (the link sign of the web page) show nothing either
INVISIBLE = re.compile(f"{ZERO_WIDTH.pattern[:-1]}\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]")
HALF_CHARACTER = re.compile("[\ud800-\udfff\ufffd]")
CHAIN = re.compile(r"/\s*/\s*@")
QUOTE = re.compile(r"/\s*/\s*@([^:：\s]{1,30})\s*[:：]")
REPLY_TO = re.compile(r"^\s*回复\s*@([^:：\s]{1,30})\s*[:：]\s*")
URL = re.compile(r"https?:[!-~]*|(?<![A-Za-z0-9])(?:www\.|t\.cn/|(?:m\.)?weibo\.(?:com|cn)/)[!-~]*", re.IGNORECASE)
MARKER = re.compile(r"图片评论|评论配图|查看图片|查看动图|网页链接")
BOT_CALL = re.compile(r"@(?:评论)?罗伯特[:：]?")
MENTION = re.compile(r"@[\w·-]{1,30}")
EDGE_MENTIONS = re.compile(r"^(?:\s*@[\w·-]{1,30}[:：]?)+\s*|(?:\s*@[\w·-]{1,30})+\s*$")
SOMEONE = "@用户"  # stands for a person named inside a sentence
ICON_TAG = re.compile(r"<img[^>]*?\balt=[\"']?(\[[^\]<>\"']{1,12}\])[^>]*>", re.IGNORECASE)
TAG = re.compile(r"<br\s*/?>|</?[A-Za-z][^<>]*>")
BLANK = re.compile(r"[^\S\n]+")
LINES = re.compile(r" ?\n(?:[ .。·]*\n)*(?:[ .。·]*\Z)? ?")  # line ends, and lines of nothing but dots behind them
LINE_END = re.compile("\r\n?|\u2028|\u2029")
RESIDUE = re.compile(r"https?:|/\s*/\s*@", re.IGNORECASE)
TRACE = re.compile(f"@|http|www\\.|t\\.cn/|weibo\\.c|{MARKER.pattern}", re.IGNORECASE)

BRACKET_EMOJI = re.compile(r"\[[\w\u4e00-\u9fff]{1,8}\]")  # [doge], [允悲]
PICTURE_EMOJI = re.compile("[\u2600-\u27bf\u2b50\u2b55\U0001f000-\U0001faff][\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]*")
NOT_WORD = re.compile(r"[\W_]+")


# --- cleaning


def _tag_text(tag: re.Match) -> str:
    return "\n" if tag[0].lower().startswith("<br") else ""


def clean(text: str) -> str:
    """The words of the writer alone: no forward chain, reply mark, URL, zero-width character, mention of the bot or of
    a person at either end; a person named in the middle becomes @用户. Weibo's HTML becomes text. May return an empty
    string."""
    text = INVISIBLE.sub("", text)
    while "&" in text or "<" in text:  # HTML; what one step brings together may be HTML again
        before = text
        text = TAG.sub(_tag_text, ICON_TAG.sub(r"\1", html.unescape(text)))
        text = INVISIBLE.sub("", text)
        if text == before:
            break
    text = LINE_END.sub("\n", text)
    if "/" in text:
        text = CHAIN.split(text, maxsplit=1)[0].rstrip()
    while True:
        before = text
        if TRACE.search(text):
            text = MARKER.sub("", URL.sub("", REPLY_TO.sub("", text)))
            text = MENTION.sub(SOMEONE, EDGE_MENTIONS.sub("", BOT_CALL.sub("", text)))
            text = RESIDUE.sub("", text)
        text = LINES.sub("\n", BLANK.sub(" ", text)).strip()
        if text == before or not TRACE.search(text):  # what one removal brings together may be another trace
            return text


def quotes(text: str) -> list[tuple[str, str]]:
    """The forward chain behind a text, newest first: (name, cleaned words)."""
    if "@" not in text:
        return []
    text = INVISIBLE.sub("", text)
    starts = list(QUOTE.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return [(match[1], clean(text[match.end() : end])) for match, end in zip(starts, ends, strict=False)]


def cut(text: str, limit: int) -> str:
    """The first `limit` characters, with an ellipsis where something is lost. No emoji, drawn or in brackets, is cut in
    two."""
    if len(text) <= limit:
        return text
    end = limit - 1
    while end > 0 and text[end] in "\ufe0e\ufe0f\u20e3\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff":
        end -= 1
    opened = text.rfind("[", max(0, end - 9), end)
    if opened >= 0 and "]" not in text[opened:end] and "]" in text[end : end + 9]:
        end = opened
    return text[:end].rstrip() + ELLIPSIS


def key(text: str) -> str:
    """What makes two texts the same one: letters, digits and Han characters; of a text without any, the text itself."""
    return "".join(filter(str.isalnum, text)).lower() or text


def split_of(text_key: str, percent: int = HELD_OUT) -> str:
    """train, val or test, decided by the post's characters alone."""
    return text_metrics.split_of(text_key, percent, percent, percent=True)


# --- measures that cleaning, rewards and metrics share


def characters(text: str) -> int:
    """Length as a reader sees it: an emoji in brackets is one character."""
    return len(BRACKET_EMOJI.sub("☺", text))


def has_emoji(text: str) -> bool:
    return bool(BRACKET_EMOJI.search(text) or PICTURE_EMOJI.search(text))


def shingles(text_key: str, size: int = 3) -> list[str]:
    return text_metrics.runs(text_key, size) or [text_key]


def copied_characters(text: str, source: str, run: int) -> int:
    """How many characters of `text` stand in runs of at least `run` characters that `source` has too."""
    covered, start = 0, 0
    while start + run <= len(text):
        if text[start : start + run] not in source:
            start += 1
            continue
        end = start + run
        while end < len(text) and text[start : end + 1] in source:
            end += 1
        covered, start = covered + end - start, end
    return covered


HAN_PAIR = re.compile(f"[{text_metrics.HAN}]{{2}}")
# words that say nothing about a topic; a pair of characters shared by post and comment counts only without them
EMPTY_BIGRAMS = frozenset(
    re.findall(
        r"\w\w",
        "什么 怎么 一个 这个 那个 我们 你们 他们 自己 没有 不是 就是 可以 知道 真的 还是 这样 那样 现在 今天 时候 "
        "觉得 因为 所以 "
        "但是 如果 已经 一下 大家 这么 那么 不要 不能 不会 哈哈 谢谢 喜欢 你的 我的 他的 的人 是我 是你 我是 你是 "
        "了我 我也 都是 "
        "也是 的时 为什 啊啊 来了",
    )
)


def shares_topic(post: str, text: str) -> bool:
    """Whether a comment takes up a pair of Han characters of its post that says something about the topic."""
    words = BRACKET_EMOJI.sub(" ", text)
    pairs = {words[i : i + 2] for i in range(len(words) - 1)} - EMPTY_BIGRAMS
    return any(pair in post and HAN_PAIR.match(pair) for pair in pairs)


# --- what no model should learn to write


PERSONAL = re.compile(
    r"(?<!\d)1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?!\d)"  # mobile number
    r"|(?<!\d)\d{17}[\dXx](?!\d)"  # identity card
    r"|(?<!\d)0\d{2,3}-\d{7,8}(?!\d)"  # landline
    r"|[\w.+-]+@[\w-]+\.[A-Za-z]{2,}"  # e-mail
    r"|(?:微信|薇信|威信|[vV]信|VX|vx|[wW]e[cC]hat|QQ群?|[qQ]群|扣扣|电话|手机号?)[号群]?\s*(?:是|为)?\s*[:：]?\s*[A-Za-z]?[A-Za-z0-9_-]{5,19}"
    r"|(?:加|＋|\+)\s*(?:我|v|V|微)(?:微信|信|[xX])?\s*[:：]?\s*[A-Za-z0-9_-]{5,19}"
)
MAY_BE_PERSONAL = re.compile(r"[A-Za-z0-9_.+-]{5}|@|\d[ -]\d{4}")


def has_personal(text: str) -> bool:
    """Whether a text holds a telephone number, an account name, an e-mail address or an identity number."""
    return bool(MAY_BE_PERSONAL.search(text) and PERSONAL.search(text))


ASSISTANT = re.compile(
    r"作为(?:一[个名位款])?(?:AI|ai|人工智能|大?语言模型|智能助手|机器人|聊天助手)|我(?:只?是|仅是)(?:一[个名位款]|纯)?(?:AI|ai|人工智能|大?语言模型|智能)"
    r"|(?:很)?(?:抱歉|对不起)，?我(?:无法|不能)(?:提供|回答|协助)|(?:希望|愿)(?:这|以上)[^。！\n]{0,12}(?:帮助|帮到)"
    r"|如(?:果|有)(?:您|你)?(?:还)?有?(?:任何|其他|更多)[^。！\n]{0,8}(?:问题|疑问|信息)|很高兴(?:能)?(?:为您|帮助)|我(?:将|会)尽(?:快|力)(?:回复|帮助|给你)|竭诚为您"
    r"|萝卜头(?:已上线|们?(?:也|都|来))|关注我，以后发微博"
)
BOILERPLATE = re.compile(
    r"^(?:转发微博|转发|轉發微博|[Rr]epost|快转微博)[。.!！]?$|已开通了?超话社区|该(?:微博|评论)已被删除|抱歉，此微博已被"
)
ADVERT = re.compile(
    r"加(?:我)?(?:微信|薇|v信|VX|vx)|代(?:购|写|刷|抢)[，,、。 ]|日结|兼职(?:招|赚)|优惠券|领券|淘口令"
    r"|[￥¥₤€][A-Za-z0-9]{8,}[￥¥₤€]|包邮|免费领取?|点击(?:领取|链接)|"
    r"互(?:粉|赞|关)(?:吗|秒|必)|刷(?:单|粉)|贷款|私信我(?:领|送|发)|扫码|返利|低价出|全网最低"
)
HASHTAG = re.compile(r"#[^#\n]{1,40}#")


def fault(text: str, max_characters: int = 140) -> str:
    """Why a cleaned comment is no example to learn from, or "" . The order is that of the report: the first reason
    counts."""
    if not text:
        return "nothing left after cleaning"
    if HALF_CHARACTER.search(text):
        return "half a character (an emoji cut in two)"
    if characters(text) > max_characters:
        return f"longer than {max_characters} characters"
    if has_personal(text):
        return "contact details or personal data"
    if "@" in text:
        return "names another user"
    if BOILERPLATE.search(text):
        return "platform boilerplate"
    if ADVERT.search(text) or (text.count("#") > 5 and len(HASHTAG.findall(text)) > 2):
        return "advertisement"
    if ASSISTANT.search(text):
        return "assistant-speak"
    if not NOT_WORD.sub("", text) and not has_emoji(text) and len(text) > 6:
        return "a row of punctuation"
    return ""


# how people answer the bot when its reply was no good, and when it was welcome
DISAPPROVES = re.compile(
    r"反了|说反|重(?:新)?说|胡说|瞎说|乱说|放屁|有病|闭嘴|滚|[傻沙]\s*[逼比Xx]|sb\b|SB\b|垃圾|智障|人机|答非所问|不对|错了|敷衍|假的|骗人|骗子|离谱|难吃|"
    r"听不懂|什么意思|说(?:的)?(?:啥|什么)|不是我问|没让你|别来|讨厌|烦死|没用|不准|回错|[oO][uU][tT]\b|\[(?:微笑|疑问|费解|怒|哼|吐|白眼|鄙视|拜拜|抓狂|怒骂|弱|挖鼻|汗)\]"
)
APPROVES = re.compile(
    r"谢谢|感谢|爱你|你真好|真棒|好棒|说得?(?:真|很)?好|说的(?:真|很)?(?:好|对|不错)|有道理|可爱|喜欢你|温暖|加油|哈哈|不错|好宠|厉害|抱抱|\[(?:心|亲亲|抱抱|可爱|比心|赞|鲜花|太开心|嘻嘻|送花花|good)\]"
)


def verdict(reaction: str) -> int:
    """What a reply to the bot says about its words: -1 disapproval, 1 approval, 0 neither or both. A lexicon's
    guess."""
    return bool(APPROVES.search(reaction)) - bool(DISAPPROVES.search(reaction))


def quotes_bot(text: str) -> bool:
    """Whether a text begins by citing the bot (@评论罗伯特：…): the words behind are the bot's, not the writer's."""
    return text.lstrip().startswith("@评论罗伯特：")
