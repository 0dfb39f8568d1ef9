"""Attention over groups of heads says what transformers' own says."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig

from common import cpu_attention
from common.models import load_model, load_tokenizer
from common.settings import ROOT

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1}


def new_model(kind: str):
    torch.manual_seed(0)
    if kind == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=5, layer_types=layers))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("largest", [cpu_attention.LARGEST, 0], ids=["grouped", "too long"])
def test_logits_and_gradients_are_those_of_sdpa(kind, largest, monkeypatch):
    monkeypatch.setattr(cpu_attention, "LARGEST", largest)
    model = new_model(kind)
    ids = torch.randint(2, 64, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padding on the left
    found = {}
    for name in ("sdpa", cpu_attention.NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        logits[mask.bool()].logsumexp(-1).sum().backward()
        found[name] = logits[mask.bool()].detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_model_on_a_cpu_takes_it_and_a_flag_is_obeyed():
    path = str(ROOT / "data" / "tiny_qwen3")
    tokenizer = load_tokenizer(path)
    expected = "sdpa" if torch.cuda.is_available() else cpu_attention.NAME
    assert load_model(path, tokenizer, "float32").config._attn_implementation == expected
    assert load_model(path, tokenizer, "float32", attn_implementation="eager").config._attn_implementation == "eager"


def test_a_model_that_sdpa_cannot_serve_is_left_alone():
    model = new_model("llama")
    model.set_attn_implementation("eager")
    cpu_attention.use_grouped_attention(model)
    assert model.config._attn_implementation == "eager"
