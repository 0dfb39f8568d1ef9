"""When two texts count as the same one: punctuation and spaces are ignored, nothing else.

Operators, signs, marks on letters, case and emoji stay, because they change what a text says: C, C++ and C#; 2+2 and
2*2; -5 and 5; e and é; $5 and €5. Punctuation stays too where it works as a sign: 3.5 is not 35, 10:30 not 1030, f(x)
not fx, 5! not 5, a!=b not a=b. Every check, stage and task that compares texts does it by this rule.
"""

import re
import unicodedata
from functools import cache

# Punctuation by its Unicode category (P*), but used as an operator, a unit, or a part of a name or a path.
SIGNS = "#%&*-/@\\_‰‱′″‴"
# Full-width letters, digits and signs are the same ones in another width. Not ！ and ～: they end a sentence, while !
# and ~ are signs too.
NARROW = {code: code - 0xFEE0 for code in range(0xFF02, 0xFF5E)} | {ord("￥"): "¥", ord("、"): ","}
WAVES = "～〜"


def comparable(text: str) -> str:
    """The text without punctuation and spaces; the text itself where it is nothing else."""
    text = unicodedata.normalize("NFC", text)
    return _ignored().sub("", text.translate(NARROW)) or text.strip()


def split_key(text: str) -> str:
    """What decides the split of a text: its letters, digits and Han characters, in lower case; perhaps nothing.

    Coarser than `comparable`, for it only has to put alike texts on one side. It must never change, or rows would move.
    """
    return re.sub(r"[\W_]+", "", text).lower()


@cache
def _ignored() -> re.Pattern:
    """Spaces, invisible characters and punctuation, but not the punctuation inside a number, a formula or code."""
    ignored = ""
    for char in map(chr, range(0x10000)):  # with characters beyond that, the pattern is ten times slower
        kind = unicodedata.category(char)
        # U+FE00 to U+FE0F say how an emoji is drawn
        spaces = kind[0] == "Z" or kind in ("Cc", "Cf") or "\ufe00" <= char <= "\ufe0f"
        if spaces or (kind[0] == "P" and char not in SIGNS) or char in WAVES:
            ignored += char
    number = r"[0-9=+*/<>|^%&$#\-−×÷±°]"
    kept = (
        rf"(?<={number}[^\s\u200b])(?={number})"  # 3.5  1,000  10:30  3–5  2*(3+4)
        r"|(?<=[\w=+*/<>|^%&$#\-()\[\]{}][()\[\]{}])(?<=[!-~]{2})(?=[!-~])"  # f(x)  a[0]  (1+2)*3
        r"|(?<=\.)(?=[0-9])|(?<=(?<![A-Za-z])[0-9A-Za-z]!)|(?<=[!:])(?==)|(?<=')(?=\()"  # .5  5!  n!  a != b  f'(x)
    )
    return re.compile(f"[{re.escape(ignored)}](?!{kept})")
