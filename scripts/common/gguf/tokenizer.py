"""A tokenizer rebuilt from the metadata of a GGUF file.

A GGUF file holds the vocabulary with scores (sentencepiece's BPE: Gemma, Llama 2) or with merges (byte-level BPE: Qwen,
Llama 3, SmolLM). transformers' own conversion splits Gemma's text wrongly, so both kinds are built here, and stage 01
compares them with llama.cpp's on 2,000 texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.settings import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Types of a token in tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
# How a byte-level tokenizer cuts text before its merges: tokenizer.ggml.pre -> patterns, one after the other.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt-2": [GPT2],
    "default": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [LLAMA3.replace("{1,3}", "")],
    "deepseek-r1-qwen": [LLAMA3.replace("{1,3}", "")],
}
COMPOSED = ("qwen2", "deepseek-r1-qwen")  # Qwen's tokenizers read text in its composed form (Unicode NFC)


def build_tokenizer(metadata: dict) -> PreTrainedTokenizerFast:
    """A PreTrainedTokenizerFast from `metadata` (key -> value, as GGUFReader gives them).

    Raises UserError for a kind of vocabulary or a cutting rule that is not known here.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind not in ("llama", "gpt2") or not tokens:
        raise UserError(f"tokenizer.ggml.model is {kind!r}; fix: a file with llama (scores) or gpt2 (merges)")
    types = metadata["tokenizer.ggml.token_type"]
    core = _from_scores(metadata, tokens, types) if kind == "llama" else _from_merges(metadata, tokens)
    added = [
        AddedToken(token, special=type_ in (UNKNOWN, CONTROL), normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    core.add_tokens([token for token in added if not token.special])
    core.add_special_tokens([token for token in added if token.special])

    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    special = {f"{name}_token": tokens[id] for name, id in ids.items() if id is not None and id < len(tokens)}
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in special:
        core.post_processor = _begin_with(special["bos_token"], ids["bos"])
    length = metadata.get(f"{metadata['general.architecture']}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=length or 4096, clean_up_tokenization_spaces=False, **special
    )


def _begin_with(token: str, id: int):
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, int(id))]
    )


def _from_scores(metadata: dict, tokens: list[str], types: list[int]):
    """Sentencepiece's BPE joins, again and again, the two neighbours whose union has the highest score. Merges in the
    order of that score do the same: every way to split a piece into two known pieces is one."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata["tokenizer.ggml.scores"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [
        (-scores[id], id, piece[:cut], piece[cut:])
        for piece, id in vocabulary.items()
        if types[id] not in (UNKNOWN, CONTROL)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges.sort()
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    core = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, _, left, right in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = [normalizers.Replace(" ", "▁")]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        space.insert(0, normalizers.Prepend("▁"))
    core.normalizer = normalizers.Sequence(space)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


def _from_merges(metadata: dict, tokens: list[str]):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PATTERNS:
        raise UserError(f"tokenizer.ggml.pre is {pre!r}, known are {', '.join(PATTERNS)}; fix: another GGUF file")
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    if pre in COMPOSED:
        core.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    return core
