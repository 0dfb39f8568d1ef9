"""common/training/turn_tokens.py: which rows of the embeddings are trained beside an adapter, and that a merge holds
them."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from common.merging import compare_weights
from common.models import load_model, load_tokenizer
from common.settings import UserError
from common.training.turn_tokens import (
    check_tokens,
    ends_answers,
    look_untrained,
    train_token_rows,
    turn_tokens,
    why_no_stop,
)

BASE = str(Path(__file__).resolve().parents[2] / "data" / "tiny_qwen3")
TURNS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def base():
    tokenizer = load_tokenizer(BASE)
    return load_model(BASE, tokenizer, "float32"), tokenizer


def forget(model, tokenizer, *tokens):
    """Rows as a base has them that never saw these tokens: all nearly alike."""
    ids = tokenizer.convert_tokens_to_ids([*tokens, "<|endoftext|>"])
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[ids] = weight[7] + 0.01 * torch.randn(len(ids), weight.size(1))


def test_auto_trains_the_turn_tokens_that_look_untrained(base, capsys):
    model, tokenizer = base
    assert turn_tokens(tokenizer) == TURNS and look_untrained(model, tokenizer, TURNS) == []
    lora = LoraConfig(task_type="CAUSAL_LM")
    train_token_rows(lora, model, tokenizer, ("auto",))
    assert lora.trainable_token_indices is None and why_no_stop(model, tokenizer) == ""
    forget(model, tokenizer, "<|im_end|>")
    assert "<|im_end|>" in why_no_stop(model, tokenizer) and "<|im_start|>" not in why_no_stop(model, tokenizer)
    train_token_rows(lora, model, tokenizer, ("none",))
    assert lora.trainable_token_indices is None
    train_token_rows(lora, model, tokenizer, ("auto",))
    assert lora.trainable_token_indices == [tokenizer.eos_token_id] and "<|im_end|>" in capsys.readouterr().out
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[2]))
    assert tokenizer.eos_token_id == 2 and why_no_stop(trained, tokenizer) == ""


def test_auto_trains_no_row_of_a_model_that_ends_its_answers(base):
    """Training moves a row less than it lies apart from others, so that it goes on looking untrained."""
    model, tokenizer = base
    forget(model, tokenizer, "<|im_start|>")
    assert look_untrained(model, tokenizer, TURNS) == ["<|im_start|>"] and ends_answers(model, tokenizer)
    lora = LoraConfig(task_type="CAUSAL_LM")
    train_token_rows(lora, model, tokenizer, ("auto",))
    assert lora.trainable_token_indices is None and why_no_stop(model, tokenizer) == ""


@pytest.mark.parametrize("words", [("<|im_ende|>",), ("auto", "<|im_end|>"), ("none", "auto")])
def test_words_that_name_no_token_are_one_line(words):
    with pytest.raises(UserError, match="--train-tokens .*; fix: "):
        check_tokens(words, load_tokenizer(BASE))
    check_tokens(("<|im_end|>", "。"), load_tokenizer(BASE))


def test_the_merge_certificate_sees_trained_rows(base):
    model, tokenizer = base
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                value += 0.1
    for rows in ([1, 2], [1], []):  # which of them reached the merged model
        merged = load_model(BASE, tokenizer, "float32")
        weight = merged.get_input_embeddings().weight
        with torch.no_grad():
            weight[rows] += 0.1
        lost = (2 - len(rows)) * weight.size(1)
        assert compare_weights(adapted, merged, "float32")["wrong"] == lost
