"""What a text in a training file should not hold: damaged or invisible characters, markup, personal data, error messages.

Pure functions from a text to (level, reason, fix); common/preflight/checks.py runs them over a file and adds the line. They are
quick enough for every training stage: one search tells most texts apart from those that need a closer look.
"""

from __future__ import annotations

import datetime
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

Fault = tuple[str, str, str]  # (level, reason, fix)

LEAVE_OUT = "fix the text, or leave the row out"
MIN_LOOP = 40  # characters; shorter answers may well repeat themselves
MIN_SENTENCE = 30  # characters; shorter answers may end anywhere


@dataclass(frozen=True)
class Rule:
    """`pattern` anywhere in a text is a fault. {code} in the reason is the code point found, {found} the match itself."""

    pattern: re.Pattern
    level: str
    reason: str
    fix: str = LEAVE_OUT
    in_code: bool = True  # False: such a match is no fault in a text that shows code
    narrow: bool = False  # True: full-width digits and signs count as their ASCII ones


def _rule(pattern: str, *rest, **options) -> Rule:
    return Rule(re.compile(pattern), *rest, **options)


# An emoji may be joined by U+200D and a flag be spelled in tags: those are wanted.
INVISIBLE = (
    r"[\u00ad\u034f\u061c\u115f\u1160\u180e\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]"
    r"|(?<![\ufe0f\u2190-\u2bff\U0001f000-\U0001faff])\u200d"
    r"|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]"
)
ANY_TEXT = [
    _rule(INVISIBLE, "warning", "the invisible character {code}", "delete it"),
    _rule(r"[\r\x85\u2028\u2029]", "warning", "the line separator {code}", "write \\n"),
    _rule(r"[\x80-\x84\x86-\x9f]", "error", "the control character {code}", "read the source in its own encoding"),
    _rule("\ufffd", "warning", "the replacement character {code}: something was lost in decoding", LEAVE_OUT),
    _rule(r"[\ue000-\uf8ff]", "warning", "the private-use character {code}: no other font or model knows it"),
    _rule(
        r"[\u2e80-\u2fdf\uf900-\ufaff]",
        "warning",
        "the character {code} only looks like a Chinese one (from a PDF?)",
        "unicodedata.normalize('NFKC', text)",
    ),
    _rule("锟斤拷|(?:烫烫){3}|(?:屯屯){3}", "error", "mojibake: {found}", "read the source in its own encoding"),
    _rule(
        r"<\|\w+\|>|<｜[^｜<>]{1,30}｜>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|^### ?(?:Instruction|Response)",
        "warning",
        "markup of a chat template: {found}",
        "keep the words only: the template of the model is added in training",
    ),
    _rule(
        r"&(?:nbsp|amp|lt|gt|quot|apos|#\d{2,6}|#x[0-9a-fA-F]{2,5});",
        "warning",
        "the HTML entity {found}",
        "html.unescape(text)",
        in_code=False,
    ),
    _rule(
        r"</?(?:br|p|div|span|img|font|strong|ul|li|table|td|tr|a)(?:\s[^<>]{0,200})?/?>",
        "warning",
        "an HTML tag {found}",
        "keep the text without its markup",
        in_code=False,
    ),
    _rule(
        r"\\n(?![A-Za-z])|\\r\\n|\\u[0-9a-fA-F]{4}",
        "warning",
        "an escape written out: {found}",
        "it was escaped twice: read it with json.loads once more",
        in_code=False,
    ),
    _rule(
        r"\$?\{\{? ?[A-Za-z_][A-Za-z_ ]{2,40}\}|\[(?:插入|填写|请填|此处)[^\]\n]{0,30}\]|【(?:插入|填写|请填|此处)[^】\n]{0,30}】",
        "warning",
        "a placeholder that nobody filled in: {found}",
        in_code=False,
    ),
    _rule(
        # a full stop may end the sentence; a decimal or a file name goes on behind it
        r"(?<![A-Za-z0-9_.])(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?![A-Za-z0-9_]|\.[A-Za-z0-9])",
        "warning",
        "personal data: a mobile number",
        "mask it",
        narrow=True,
    ),
    _rule(
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

# Stored by a script that never looked at the status of its request.
API_ERROR = re.compile(
    r"Error code: ?\d{3}|[Rr]ate[ _]limit|insufficient_quota|[Ii]nvalid[ _]api[ _]key|Incorrect API key|"
    r"context_length_exceeded|maximum context length|Internal Server Error|Bad Gateway|Service Unavailable|"
    r"Gateway Time-?out|Too Many Requests|[Cc]onnection (?:error|refused|reset|aborted|timed out)|[Rr]ead timed out|"
    r"(?:Connection|Timeout|API|HTTP|Key|Value|Type)Error\b|Traceback \(most recent"
)
API_ERROR_STARTS = re.compile(
    r"\s*(?:\{\s*[\"']error[\"']|<!DOCTYPE html|<html"
    r"|请求(?:过于频繁|超时|失败)|服务器?(?:繁忙|异常|(?:内部)?错误)|系统繁忙|网络(?:错误|异常|超时)"
    r"|接口(?:调用)?(?:失败|错误|超时)|调用失败)"
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


def faults_of_text(text: str, special: re.Pattern | None) -> Iterator[Fault]:
    """Faults of any text, asked or answered. `special` matches the tokenizer's special tokens."""
    if text.strip().lower() in NO_VALUE:
        yield "error", f"the whole text is {text.strip()!r}: a missing value turned into a string", LEAVE_OUT
    if not WORTH_A_LOOK.search(text) and not READ_AS_GBK.search(text):
        return
    token = special and special.search(text)
    if token:
        fix = "take it out: the tokenizer reads it as the token itself, e.g. as the end of a turn"
        yield "error", f"the special token {token[0]} stands in the text", fix
    garbled = mojibake(text)
    if garbled:
        yield "error", f"mojibake: {garbled}", "read the source in its own encoding"
    is_code = CODE.search(text)
    narrow = text.translate(NARROW) if WIDE_DIGIT.search(text) else text
    for rule in ANY_TEXT:
        if (is_code and not rule.in_code) or (garbled and rule.level == "error"):
            continue
        found = rule.pattern.search(narrow if rule.narrow else text)
        # a special token has been named already
        if found and not (token and rule.reason.startswith("markup") and special.fullmatch(found[0])):
            yield rule.level, rule.reason.format(code=f"U+{ord(found[0][0]):04X}", found=found[0][:30]), rule.fix
    if any(is_identity_number(found[0]) for found in IDENTITY_CARD.finditer(narrow)):
        yield "warning", "personal data: an identity card number", "mask it"


def faults_of_answer(text: str, wanted: bool) -> Iterator[Fault]:
    """Faults of an answer beyond those of any text. wanted: it is to be learnt (not the rejected one of a pair)."""
    start = text[:100]
    if API_ERROR_STARTS.match(start) or (LATIN.search(start) and API_ERROR.search(start)):
        yield "error", "an error message stored as an answer", "ask again, or leave the row out"
    if label := ROLE_LABEL.search(text[:40]):
        yield "warning", f"the answer starts with a label: {label[0]}", "keep the words only: roles are the template's"
    if text != text.strip():
        yield "warning", "white space around the answer: the model learns to write it", "text.strip()"
    # "？？？" is a remark, "……" is none
    if not re.search(r"[\w?？!！]", text) and not PICTOGRAM.search(text) and text.strip():
        yield "warning", "the answer has no word in it", "write an answer, or leave the row out"
    if not wanted:
        return
    if REFUSAL.search(text):
        yield "warning", "the answer refuses as an assistant of another maker would", "fine if meant; else leave it out"
    body = text.strip()
    if len(body) >= MIN_SENTENCE and body[-1] in UNFINISHED:
        yield "warning", f"the answer breaks off at {body[-1]!r}", "it was cut where it was made: write it to its end"
    if len(body) >= MIN_LOOP:
        data = body.encode("utf-8")
        if len(zlib.compress(data, 1)) < 0.5 * len(data) and (loop := LOOP.search(body)) and len(set(loop[1])) > 2:
            yield "warning", "the answer repeats a passage four times or more", LEAVE_OUT


def faults_of_thinking(text: str, enable_thinking: bool, opened: bool) -> Iterator[Fault]:
    """Faults of the thinking block of an answer. opened: the template's generation prompt has opened the block."""
    if THINK_OPENS not in text and THINK_CLOSES not in text:
        return
    opens, closes = text.count(THINK_OPENS) + opened, text.count(THINK_CLOSES)
    thought, _, said = text.rpartition(THINK_CLOSES)
    if opens > closes:
        yield "error", "a thinking block is opened and never closed", f"close it with {THINK_CLOSES}"
    elif closes > opens:
        yield "error", "a thinking block is closed and never opened", f"open it with {THINK_OPENS}"
    elif not said.strip():
        yield "error", "no answer behind the thinking block", "write the answer behind it"
    elif not thought.replace(THINK_OPENS, "").strip():
        yield "warning", "an empty thinking block in the answer", "take it out: the template writes one where it is due"
    elif not enable_thinking:
        yield "warning", "a thinking block while thinking is off", "--enable-thinking, or take the block out"


def texts_of(value) -> Iterator[str]:
    """All texts of a JSON value, keys too."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value


def special_tokens(tokenizer) -> re.Pattern | None:
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
    if READ_AS_GBK.search(text):
        raw = "".join(char for char in text if ord(char) > 127).encode("gb18030", errors="ignore")
        wanted = raw.decode("utf-8", errors="ignore")
        # Right Chinese written as GBK is hardly ever UTF-8.
        if len(wanted) * 3 >= 0.6 * len(raw) and len(HAN.findall(wanted)) >= 2:
            return f"{text[:9]} is {wanted[:6]}"
    return None


def is_identity_number(number: str) -> bool:
    """Eighteen digits with a real date of birth and the right check digit (GB 11643-1999)."""
    try:
        datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * (2 ** (17 - i) % 11) for i, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()
