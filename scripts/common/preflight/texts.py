"""What a text in a training file should not hold: damaged or invisible characters, markup, personal data, error
messages.

Pure functions from a text to findings without a place; common/preflight/rows.py runs them over a file and adds the
line. They are quick enough for every training stage: one search tells most texts apart from those that need a closer
look.
"""

from __future__ import annotations

import datetime
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.preflight.finding import Finding, fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAVE_OUT = "fix the text, or leave the row out"
MIN_LOOP = 40  # characters; shorter answers may well repeat themselves
MIN_SENTENCE = 30  # characters; shorter answers may end anywhere


@dataclass(frozen=True)
class Rule:
    """`pattern` anywhere in a text is a fault. {code} in the reason is the code point found, {found} the match
    itself."""

    check: str
    pattern: re.Pattern
    level: str
    reason: str
    fix: str = LEAVE_OUT
    in_code: bool = True  # False: such a match is no fault in a text that shows code
    narrow: bool = False  # True: full-width digits and signs count as their ASCII ones


def _rule(check: str, pattern: str, *rest, **options) -> Rule:
    return Rule(check, re.compile(pattern), *rest, **options)


# An emoji may be joined by U+200D and a flag be spelled in tags: those are wanted.
INVISIBLE = (
    r"[\u00ad\u034f\u061c\u115f\u1160\u180e\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]"
    r"|(?<![\ufe0f\u2190-\u2bff\U0001f000-\U0001faff])\u200d"
    r"|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]"
)
ANY_TEXT = [
    _rule("invisible-character", INVISIBLE, "warning", "the invisible character {code}", "delete it"),
    _rule("line-separator", r"[\r\x85\u2028\u2029]", "warning", "the line separator {code}", "write \\n"),
    _rule(
        "control-character",
        r"[\x80-\x84\x86-\x9f]",
        "error",
        "the control character {code}",
        "read the source in its own encoding",
    ),
    _rule(
        "lost-character",
        "\ufffd",
        "warning",
        "the replacement character {code}: something was lost in decoding",
        LEAVE_OUT,
    ),
    _rule(
        "private-use",
        r"[\ue000-\uf8ff]",
        "warning",
        "the private-use character {code}: no other font or model knows it",
    ),
    _rule(
        "lookalike",
        r"[\u2e80-\u2fdf\uf900-\ufaff]",
        "warning",
        "the character {code} only looks like a Chinese one (from a PDF?)",
        "unicodedata.normalize('NFKC', text)",
    ),
    _rule(
        "mojibake",
        "锟斤拷|(?:烫烫){3}|(?:屯屯){3}",
        "error",
        "mojibake: {found}",
        "read the source in its own encoding",
    ),
    _rule(
        "template-markup",
        (
            r"<\|\w+\|>|<｜[^｜<>]{1,30}｜>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|^### ?(?:Instruction|"
            r"Response)"
        ),
        "warning",
        "markup of a chat template: {found}",
        "keep the words only: the template of the model is added in training",
    ),
    _rule(
        "html-entity",
        r"&(?:nbsp|amp|lt|gt|quot|apos|#\d{2,6}|#x[0-9a-fA-F]{2,5});",
        "warning",
        "the HTML entity {found}",
        "html.unescape(text)",
        in_code=False,
    ),
    _rule(
        "html-tag",
        r"</?(?:br|p|div|span|img|font|strong|ul|li|table|td|tr|a)(?:\s[^<>]{0,200})?/?>",
        "warning",
        "an HTML tag {found}",
        "keep the text without its markup",
        in_code=False,
    ),
    _rule(
        "escape",
        r"\\n(?![A-Za-z])|\\r\\n|\\u[0-9a-fA-F]{4}",
        "warning",
        "an escape written out: {found}",
        "it was escaped twice: read it with json.loads once more",
        in_code=False,
    ),
    _rule(
        "placeholder",
        r"\$?\{\{? ?[A-Za-z_][A-Za-z_ ]{2,40}\}|"
        r"\[(?:插入|填写|请填|此处)[^\]\n]{0,30}\]|【(?:插入|填写|请填|此处)[^】\n]{0,30}】",
        "warning",
        "a placeholder that nobody filled in: {found}",
        in_code=False,
    ),
    _rule(
        "mobile-number",  # a full stop may end the sentence; a decimal or a file name goes on behind it
        r"(?<![A-Za-z0-9_.])(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?![A-Za-z0-9_]|\.[A-Za-z0-9])",
        "warning",
        "personal data: a mobile number",
        "mask it",
        narrow=True,
    ),
    _rule(
        "mail-address",
        r"[A-Za-z0-9_.%+-]+@(?!example\.)[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}",
        "warning",
        "personal data: an e-mail address",
        "mask it (name@example.com is nobody's)",
    ),
]
IDENTITY_CARD = re.compile(r"(?<![A-Za-z0-9])[1-9]\d{16}[\dXx](?![A-Za-z0-9])")
WIDE_DIGIT = re.compile("[\uff10-\uff19]")
NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width -> ASCII, one for one: positions stay
# Most texts hold none of these and need no rule at all.
WORTH_A_LOOK = re.compile(
    r"[\x80-\xff\u0100-\u024f\u02c6\u02dc<&\\{@\r\u2028\u2029\ufffd\ue000-\uf8ff\u2e80-\u2fdf\uf900-\ufaff]"
    r"|\d{4}|\[/?INST|^### ?[IR]|锟斤|烫烫烫|屯屯屯|此处|插入|填写|请填|" + INVISIBLE
)
CODE = re.compile(r"`|HTML|html|Python|Java|正则|代码|转义|换行符|占位符")

# What a script stores that does not check the status of its request.
API_ERROR = re.compile(
    r"Error code: ?\d{3}|[Rr]ate[ _]limit|insufficient_quota|[Ii]nvalid[ _]api[ _]key|Incorrect API key|"
    r"context_length_exceeded|maximum context length|Internal Server Error|Bad Gateway|Service Unavailable|"
    r"Gateway Time-?out|Too Many Requests|[Cc]onnection (?:error|refused|reset|aborted|timed out)|[Rr]ead timed out|"
    r"(?:Connection|Timeout|API|HTTP|Key|Value|Type)Error\b|Traceback \(most recent"
)
CHINESE_ERROR = (
    r"(?:请求(?:过于频繁|超时|失败)|服务器?(?:繁忙|异常|(?:内部)?错误)|系统繁忙|网络(?:错误|异常|超时)"
    r"|接口(?:调用)?(?:失败|错误|超时)|调用失败)"
)
API_ERROR_STARTS = re.compile(rf"\s*(?:\{{\s*[\"']error[\"']|<!DOCTYPE html|<html|{CHINESE_ERROR})", re.IGNORECASE)
# The whole text is an error and nothing is said of it. Only then is it an error of the data, and only where nobody
# asked for it.
NOTHING_BUT_AN_ERROR = re.compile(
    r"\{\s*[\"']error[\"']\s*:.*\}|Error code: ?\d{3}(?:\s*-.*)?|Traceback \(most recent.*"
    r"|(?:<!DOCTYPE|<html)(?=.*<(?:title|h1)>[^<]*(?:[45]\d\d|[Ee]rror|错误)).{0,3000}"
    rf"|{CHINESE_ERROR}[，,。！!：:\s]*(?:请?(?:您)?(?:稍后|稍候|重试|再试).{{0,12}})?"
    rf"|(?:[\w.]+:? ?)?\W*(?:{API_ERROR.pattern})(?!.*\b(?:means?|indicates?|occurs?|usually|refers? to|happens?"
    r"|is (?:an?|the|raised|returned|caused|when))\b)[^\u4e00-\u9fff]{0,200}",
    re.DOTALL,
)
ASKS_FOR_AN_ERROR = re.compile(
    r"错误|报错|异常|失败|状态码|限流|日志|接口|网页|页面|输出|返回|代码|HTTP|HTML|html|JSON|API|[Ee]rror|[Ee]xception"
    r"|\b[45]\d\d\b|\b(?:code|output|page|log|print)"
)
LATIN = re.compile(r"[A-Za-z]{3}")
REFUSAL = re.compile(
    r"作为(?:一[个名位款])?(?:AI|人工智能)(?:语言)?(?:模型|助手|助理)?，?我?(?:无法|不能|没有|并不)"
    r"|As an AI (?:language )?model|^(?:I'm|I am) sorry, but I can(?:no|')t"
)
ROLE_LABEL = re.compile(r"^(?:Human|User|Assistant|AI|用户|助手|助理|答|回答)\s*[:：]", re.MULTILINE)
NO_VALUE = {"nan", "none", "null", "undefined", "n/a", "[object object]", "{}", "[]", "todo", "无内容", "略"}
LOOP = re.compile(r"(.{4,80}?)\1{3,}", re.DOTALL)
PICTOGRAM = re.compile(r"[\u2190-\u2bff\u3030\u303d\U0001f000-\U0001faff]")
UNFINISHED = "，、；,;（(“‘「《【"
THINK_OPENS, THINK_CLOSES = "<think>", "</think>"

# UTF-8 read as GBK: the first bytes of common characters come out as these.
READ_AS_GBK = re.compile(
    "[锛銆鐨鏄鏈浣涓鍦鎴鍙浜鈥绗璇瀹鎵閫鍥鍒].{0,8}?[锛銆鐨鏄鏈浣涓鍦鎴鍙浜鈥绗璇瀹鎵閫鍥鍒]", re.DOTALL
)
READ_AS_LATIN = re.compile(r"[\x80-\xff\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122 ]{4,}")
HAN = re.compile(r"[\u4e00-\u9fff]")


def faults_of_text(text: str, special: re.Pattern | None) -> Iterator[Finding]:
    """Faults of any text, asked or answered. `special` matches the tokenizer's special tokens."""
    if text.strip().lower() in NO_VALUE:
        reason = f"the whole text is {text.strip()!r}: perhaps a missing value turned into a string"
        yield fault(reason, "fine if it is the answer; else leave the row out", "warning", "missing-value")
    if not WORTH_A_LOOK.search(text) and not READ_AS_GBK.search(text):
        return
    token = special and special.search(text)
    if token:
        fix = "take it out: the tokenizer reads it as the token itself, e.g. as the end of a turn"
        yield fault(f"the special token {token[0]} stands in the text", fix, "error", "special-token")
    garbled = mojibake(text)
    if garbled:
        yield fault(f"mojibake: {garbled}", "read the source in its own encoding", "error", "mojibake")
    is_code = CODE.search(text)
    narrow = text.translate(NARROW) if WIDE_DIGIT.search(text) else text
    for rule in ANY_TEXT:
        if (is_code and not rule.in_code) or (garbled and rule.level == "error"):
            continue
        found = rule.pattern.search(narrow if rule.narrow else text)
        # a special token has been named already
        if found and not (token and rule.check == "template-markup" and special.fullmatch(found[0])):
            reason = rule.reason.format(code=f"U+{ord(found[0][0]):04X}", found=found[0][:30])
            yield fault(reason, rule.fix, rule.level, rule.check)
    if any(is_identity_number(found[0]) for found in IDENTITY_CARD.finditer(narrow)):
        yield fault("personal data: an identity card number", "mask it", "warning", "identity-card")


def faults_of_answer(text: str, wanted: bool, asked: str = "") -> Iterator[Finding]:
    """Faults of an answer beyond those of any text. wanted: it is to be learnt (not the rejected one of a pair)."""
    start, body = text[:100], text.strip()
    if API_ERROR_STARTS.match(start) or (LATIN.search(start) and API_ERROR.search(start)):
        if NOTHING_BUT_AN_ERROR.fullmatch(body) and not ASKS_FOR_AN_ERROR.search(asked):
            yield fault(
                "an error message stored as an answer", "ask again, or leave the row out", "error", "error-message"
            )
        else:
            reason = "the answer looks like an error message or an HTML page"
            yield fault(reason, "fine if it was asked for; else leave the row out", "warning", "error-message")
    for check, found, reason, fix in (
        (
            "role-label",
            (label := ROLE_LABEL.search(text[:40])),
            f"the answer starts with a label: {label and label[0]}",
            "keep the words only: roles are the template's",
        ),
        ("white-space", text != body, "white space around the answer: the model learns to write it", "text.strip()"),
        # "？？？" is a remark, "……" is none
        (
            "no-word",
            body and not re.search(r"[\w?？!！+*/<>=^$%#&|~`@-]", text) and not PICTOGRAM.search(text),
            "the answer has no word in it",
            "write an answer, or leave the row out",
        ),
        (
            "refusal",
            wanted and REFUSAL.search(text),
            "the answer refuses as an assistant of another maker would",
            "fine if meant; else leave it out",
        ),
        (
            "broken-off",
            wanted and len(body) >= MIN_SENTENCE and body[-1] in UNFINISHED,
            f"the answer breaks off at {body[-1:]!r}",
            "it was cut where it was made: write it to its end",
        ),
        ("loop", wanted and _loops(body), "the answer repeats a passage four times or more", LEAVE_OUT),
    ):
        if found:
            yield fault(reason, fix, "warning", check)


def _loops(body: str) -> bool:
    data = body.encode("utf-8") if len(body) >= MIN_LOOP else b""
    squeezed = data and len(zlib.compress(data, 1)) < 0.5 * len(data)  # quick, and true of every text that loops
    return bool(squeezed and (loop := LOOP.search(body)) and len(set(loop[1])) > 2)


def faults_of_thinking(text: str, enable_thinking: bool, opened: bool) -> Iterator[Finding]:
    """Faults of the thinking block of an answer. opened: the template's generation prompt has opened the block."""
    if THINK_OPENS not in text and THINK_CLOSES not in text:
        return
    opens, closes = text.count(THINK_OPENS) + opened, text.count(THINK_CLOSES)
    thought, _, said = text.rpartition(THINK_CLOSES)
    if opens > closes:
        found = "error", "a thinking block is opened and never closed", f"close it with {THINK_CLOSES}"
    elif closes > opens:
        found = "error", "a thinking block is closed and never opened", f"open it with {THINK_OPENS}"
    elif not said.strip():
        found = "error", "no answer behind the thinking block", "write the answer behind it"
    elif not thought.replace(THINK_OPENS, "").strip():
        found = (
            "warning",
            "an empty thinking block in the answer",
            "take it out: the template writes one where it is due",
        )
    elif not enable_thinking:
        found = "warning", "a thinking block while thinking is off", "--enable-thinking, or take the block out"
    else:
        return
    level, reason, fix = found
    yield fault(reason, fix, level, "thinking")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """A pattern of every special token of the tokenizer."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def mojibake(text: str) -> str | None:
    """'found is wanted' where a part of the text was written in one encoding and read in another; else None."""
    for found in READ_AS_LATIN.finditer(text):
        for encoding in ("cp1252", "latin-1"):
            try:
                raw = found[0].strip().encode(encoding)
                wanted = raw.decode("utf-8")
            except UnicodeError:
                continue
            if HAN.search(wanted) or re.search("[\u3000-\u303f\uff00-\uffef]", wanted):
                return f"{found[0][:12]} is {wanted[:6]}"
        try:  # GBK read as Latin-1; accented words do not stand in runs of six such letters
            raw = found[0].strip().encode("latin-1")
            wanted = raw.decode("gbk")
        except UnicodeError:
            continue
        if len(raw) >= 6 and len(HAN.findall(wanted)) * 2 >= 0.7 * len(raw):
            return f"{found[0][:12]} is {wanted[:6]}"
    for match in READ_AS_GBK.finditer(text):  # a short piece: right text around it, or a whole book, decides nothing
        piece = "".join(char for char in text[match.start() : match.start() + 16] if ord(char) > 127)
        raw = piece.encode("gb18030", errors="ignore")
        wanted = raw.decode("utf-8", errors="ignore")
        # Right Chinese written as GBK is hardly ever UTF-8, and then not that of Chinese characters.
        if len(wanted) * 3 >= 0.6 * len(raw) and len(HAN.findall(wanted)) >= max(2, 0.5 * len(wanted)):
            return f"{piece[:9]} is {wanted[:6]}"
    return None


def is_identity_number(number: str) -> bool:
    """Eighteen digits with a real date of birth and the right check digit (GB 11643-1999)."""
    try:
        datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * (2 ** (17 - i) % 11) for i, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()
