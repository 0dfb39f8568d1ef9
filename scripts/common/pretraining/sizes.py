"""The model of stage 00 before training: Qwen3's architecture in the sizes of the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.settings import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_sizes(settings: Any) -> None:
    """Raises UserError for heads that attention cannot divide."""
    width, odd = divmod(settings.hidden_size, settings.heads)
    if odd or width % 2 or settings.heads % settings.kv_heads:
        raise UserError(
            f"--hidden-size {settings.hidden_size} --heads {settings.heads} --kv-heads {settings.kv_heads}; "
            "fix: heads of an even size that divide hidden-size, and kv-heads that divide heads"
        )


def new_model(settings: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """With weights drawn at random, and a vocabulary rounded up to a multiple of 64."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden_size // settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.max_position,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)
