"""Two texts are the same one where nothing but punctuation and spaces differs; what works as a sign is no
punctuation."""

import pytest

from common.comparing import comparable, split_key

DIFFERENT = """2+2=? 2*2=?|C C++|C++ C#|é e|ñ n|$5 €5|¥5 5|-5 5|−5 5|气温-5度 气温5度|3.5 35
.5 5|1,000 1000|10:30 1030|1/2 12|10–20 1020
x^2 x2|x² x2|5% 5|50° 50|① ②|f(x) fx|f'(x) f(x)|a[0] a0|(1+2)*3 1+2*3|(2+3)*4 2+(3*4)
5!等于几 5等于几|n! n|a!=b a=b|a<b a>b|a&&b a||b
6-3 6/3|snake_case snakecase|~x x|A a|😀 😂|好👍 好👎|👨‍👩‍👧 👨‍👩‍👦|１＋１ １－１"""
SAME = """好的。 好的！|好的，OK。 好的OK|“引” 引|（一）先 一先|哈里·波特 哈里波特
等等…… 等等——|写《静夜思》 写静夜思|你好～ 你好
1.苹果 1苹果|ＡＢＣ ABC|１＋１ 1+1|e\u0301 é|❤️ ❤|a\u200bb ab|¿Qué? Qué|(好) 好|it's its
第1、2题 第1,2题|问题1！ 问题1"""


def pairs(table: str) -> list[list[str]]:
    return [
        pair.split(" ") for line in table.splitlines() for pair in line.replace("a&&b a||b", "a&&b a¦¦b").split("|")
    ]


@pytest.mark.parametrize("one, other", pairs(DIFFERENT))
def test_what_changes_the_meaning_is_compared(one, other):
    assert comparable(one) != comparable(other.replace("¦", "|"))


@pytest.mark.parametrize("one, other", pairs(SAME))
def test_punctuation_and_spaces_are_not(one, other):
    assert comparable(one) == comparable(other)
    assert comparable(f" {one}\n") == comparable(one)


def test_a_text_of_punctuation_alone_is_itself():
    assert comparable(" ？！\n") == "？！" != comparable("……")


def test_the_split_is_decided_by_letters_and_digits_alone():
    assert split_key("2+2=？ 好") == "22好" and split_key("C#") == split_key("c++") == "c" and split_key("？！") == ""
