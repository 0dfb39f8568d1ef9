"""The embedded base's tokenizer: one token a character, bytes for the rest, Qwen's special tokens and ChatML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")  # one token each: spelled out they would be a fifth of a verse row

# {% generation %} ends at <|im_end|>: the newline after a turn is layout, not answer
CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def choose_characters(verse: Iterable[str], more: Iterable[str], min_count: int) -> set[str]:
    """Characters seen `min_count` times in verse, or twice in one of `more`, and those of GB2312 and ASCII."""
    counts = Counter(char for text in verse for char in text)
    characters = {char for char, count in counts.items() if count >= min_count}
    characters |= {char for text in more for char, count in Counter(text).items() if count >= 2}
    for high in (0xA1, 0xA3, *range(0xB0, 0xF8)):  # GB2312: its punctuation, full-width forms and 6,763 characters
        for low in range(0xA1, 0xFF):
            characters.update(bytes((high, low)).decode("gb2312", errors="ignore"))
    characters |= {chr(code) for code in range(32, 127)} | set("\n\t—…“”‘’·～￥")
    return {char for char in characters if char in "\n\t" or char.isprintable()}


def build_tokenizer(characters: Iterable[str]) -> PreTrainedTokenizerFast:
    """A transformers tokenizer over `characters` (each one character) with byte fallback: any text survives a round
    trip."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, TURN_START, TURN_END])}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + sorted(set(characters)):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, TURN_START, TURN_END)]
    )
    tokenizer.add_tokens([AddedToken(role, special=False, normalized=False) for role in ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        padding_side="right",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )
