"""The decoding loop that writes on a CPU, against transformers' own."""

import pytest
import torch
from transformers import TopPLogitsWarper

from common.generation import NUCLEUS, cut_tail, draw, render_prompt, sample, write_on_cpu
from common.models import load_model, load_tokenizer
from conftest import ROOT


@pytest.fixture(scope="module")
def base():
    tokenizer = load_tokenizer(ROOT / "data/tiny_qwen3")
    return load_model(ROOT / "data/tiny_qwen3", tokenizer, "float32").eval(), tokenizer


@pytest.mark.parametrize("penalty, repeated", [(1.0, [2, 0]), (1.3, [2, 0]), (1.0, [])])
def test_greedy_texts_are_those_of_transformers_own_loop(base, penalty, repeated):
    model, tokenizer = base
    asked = ["写一首[五言绝句] 要求4句 主题为: 山水", "你好", "写一首[七言律诗] 要求8句 主题为: 边塞、月夜、思乡", "春"]
    asked += [asked[index] for index in repeated]  # equal prompts are read once
    texts = [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    ends = tokenizer.convert_tokens_to_ids(["？", "。", tokenizer.eos_token])  # so that answers end at different times
    plain = {"do_sample": False, "max_new_tokens": 80, "repetition_penalty": penalty, "eos_token_id": ends}
    theirs = model.generate(**inputs, **plain)
    ours = model.generate(**inputs, **plain, custom_generate=write_on_cpu)
    assert torch.equal(ours, theirs)
    padding = (ours == tokenizer.pad_token_id)[:, inputs["input_ids"].shape[1] :].sum(1)
    assert len(set(padding.tolist())) > 1, "answers that end at one time would not show that rows leave the batch"


def test_draws_follow_the_probabilities():
    torch.manual_seed(0)
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    shares = torch.bincount(draw(probs.expand(40_000, -1), torch.arange(40_000), 40_000)[:, 0], minlength=5) / 40_000
    assert (shares - probs).abs().max() < 0.01  # four standard deviations
    assert shares[1] == shares[4] == 0, "what has no probability is never drawn"


def test_a_row_draws_the_same_whether_others_have_ended_or_not():
    probs, rows = torch.rand(64, 200), torch.arange(0, 64, 3)
    torch.manual_seed(1)
    every = draw(probs, torch.arange(64), 64)
    torch.manual_seed(1)
    assert torch.equal(draw(probs[rows], rows, 64), every[rows])


@pytest.mark.parametrize("words", [100, 20 * NUCLEUS])
def test_top_p_keeps_the_tokens_that_transformers_keeps(words):
    torch.manual_seed(1)
    sharp_to_flat = torch.randn(6, words) * torch.tensor([[8.0], [4.0], [2.0], [1.0], [0.5], [0.0]])
    for top_p in (0.01, 0.5, 0.95, 0.999):
        kept = cut_tail(sharp_to_flat, top_p).isfinite()
        theirs = TopPLogitsWarper(top_p)(None, sharp_to_flat).isfinite()
        # where all tokens are alike, which ones are kept is chance, and how many differs by rounding
        assert torch.equal(kept[:5], theirs[:5])


def test_min_p_cuts_off_the_tail(base):
    """At 1 only the likeliest token is left, at .3 only tokens with .3 of its probability."""
    model, tokenizer = base
    texts = [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in ("你好", "写一首[五言绝句]")]
    words = {"max_new_tokens": 12, "top_k": 0, "top_p": 1.0, "seed": 3}
    greedy, narrow, wide = (
        sorted(sample(model, tokenizer, texts, temperature=temperature, min_p=min_p, **words))
        for temperature, min_p in ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0))
    )
    assert narrow == greedy != wide
