"""Is a folder of transformers the model of a GGUF file? Both answer the same questions, here and in llama.cpp."""

from __future__ import annotations

import math
import random
import unicodedata
from typing import TYPE_CHECKING

from common.gguf.llama_cpp import LlamaCpp
from common.settings import ROOT, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIKELIEST = 64  # tokens of a distribution compared one by one; the others count as one
# What people type and corpora hold, and where tokenizers go wrong.
ODD = (
    *("", " ", "  ", "   x", "\t", "\t\tx", "\n", "\n\n\n", "\r\n\r\nx", "a  b   c", "\u3000全角空格", "\u00a0x"),
    *("it's I'LL don’t We’VE", "1234567890", "3.14159", "１２３４", "2026年11月25日", "100%"),
    *("C++ C# .NET", "a_b-c/d\\e", "𠀀𠮷龘", "㐀䶵", "鄕鄉", "😀👨‍👩‍👧🇨🇳👍🏽", "مرحبا", "안녕하세요 세계"),
    *("日本語のテキスト", "Привет", "é e\u0301 ñ ü", "def f(x):\n\treturn  x ** 2\n"),
    *('{"a": [1, 2.5, null], "b": "\\n"}', "<div class='x'>&nbsp;</div>", "#话题# @某人 [允悲]"),
    *("……——「」『』《》“”‘’、。！？", "~!@#$%^&*()_+`-={}|[]\\:\";'<>?,./", "a" * 60, "哈" * 40),
    *("\u200b\u200d\ufeffx", "ﬁ ② ㎡"),
)
SOURCES = (
    *("data/poems/themes.json", "data/weibo/sample_comments.json", "data/weibo/sample_posts.json"),
    *("data/chat/sft.json", "data/copywriting/golden.jsonl", "data/styles/training_data.json"),
    *("README.md", "README_zh.md", "docs/LOG.md"),
    *("scripts/51_train_ppo.py", "scripts/common/evaluation/compare_page.html", "runs/poems.sh"),
)


def varied_texts(count: int, seed: int) -> list[str]:
    """`count` texts: the odd ones above, then pieces of up to 160 characters of what the repo ships: verse, comments
    with emoji, brand copy, dialogue, English and Chinese prose, Python, HTML, shell."""
    rng = random.Random(seed)
    sources = [(ROOT / name).read_text(encoding="utf-8") for name in SOURCES]
    texts = list(ODD[:count])
    while len(texts) < count:
        source = rng.choice(sources)
        start = rng.randrange(len(source))
        texts.append(source[start : start + rng.randint(1, 160)])
    return texts


def compare_ids(
    tokenizer: PreTrainedTokenizerBase, other: LlamaCpp, texts: list[str]
) -> list[tuple[str, list[int], list[int]]]:
    """(text, ids here, ids in llama.cpp) of the texts whose token ids differ, special tokens in front included.

    Qwen's tokenizers compose accents first (Unicode NFC), llama.cpp never does: it is given the composed text."""
    different = []
    composes = '"NFC"' in tokenizer.backend_tokenizer.to_str()
    for text in texts:
        text = unicodedata.normalize("NFC", text) if composes else text
        ours, theirs = tokenizer(text)["input_ids"], other.tokenize(text)
        if ours != theirs:
            different.append((text, ours, theirs))
    return different


def compare_distributions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, other: LlamaCpp, texts: list[str], places: int
) -> dict[str, float]:
    """KL(llama.cpp || model) in nats of the next token after the beginnings of `places` texts: mean, largest, and the
    share of places at which both name the same token first. The LIKELIEST tokens of llama.cpp are compared one by one,
    the others as one."""
    import torch

    beginnings = [ids for ids in (tokenizer(text)["input_ids"][:96] for text in texts) if len(ids) > 1]
    divergences, agreed = [], 0
    for ids in beginnings:
        if len(divergences) == places:
            break
        theirs = other.next_token(ids, LIKELIEST)
        if theirs is None:
            continue
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1).logits
        ours = logits[0, -1].float().log_softmax(-1)
        rest = [
            max(1e-9, 1 - sum(map(math.exp, logprobs))) for logprobs in (theirs.values(), ours[list(theirs)].tolist())
        ]
        divergence = rest[0] * math.log(rest[0] / rest[1])
        divergence += sum(math.exp(logprob) * (logprob - ours[id].item()) for id, logprob in theirs.items())
        divergences.append(divergence)
        agreed += max(theirs, key=theirs.get) == ours.argmax().item()
    if not (count := len(divergences)):
        raise UserError(f"none of {len(texts)} texts has a place to compare; fix: more --texts, more --places")
    return {"kl_mean": sum(divergences) / count, "kl_max": max(divergences), "top1_agreement": agreed / count}
