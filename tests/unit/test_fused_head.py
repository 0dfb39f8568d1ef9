"""common/fused_head.py against the plain head: log-probabilities and gradients are those of all logits at once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from common import fused_head
from common.fused_head import token_figures

WORDS, WIDTH, TOKENS = 3000, 16, 40


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(fused_head, "LARGE_VOCABULARY", 1000)
    monkeypatch.setattr(fused_head, "SLICE_NUMBERS", 1)  # six slices


def plain_figures(hidden, weight, targets, temperature):
    logits = (hidden.double() @ weight.double().T) / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], logits.argmax(-1) == targets, logits.mean(-1), entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_figures_and_gradient_are_those_of_the_plain_head(temperature):
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, WORDS, bias=False).requires_grad_(False)
    head.weight *= 30  # some targets nearly certain, others hopeless
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets = torch.randint(0, WORDS, (TOKENS,))
    targets[::2] = (hidden[::2] @ head.weight.T).argmax(-1)
    scales = torch.randn(TOKENS)  # a loss weighs each token as it likes
    found = token_figures(head, hidden, targets, temperature, entropy=True)
    expected = plain_figures(hidden, head.weight, targets, temperature)
    for name, one, other in zip(
        ("logprobs", "is_top1", "mean", "entropy"), vars(found).values(), expected, strict=True
    ):
        assert torch.allclose(one.double(), other.double(), atol=1e-4), name
    gradients = [torch.autograd.grad((scales * part).sum(), hidden)[0] for part in (found.logprobs, expected[0])]
    assert torch.allclose(*gradients, atol=1e-4)
    assert found.logprobs.exp().max() > 0.99 and found.logprobs.min() < -10, "easy and hard tokens are among them"
    with torch.no_grad():
        assert torch.equal(token_figures(head, hidden, targets, temperature).logprobs, found.logprobs)


@pytest.mark.parametrize("large", [1000, 10**9], ids=["slices", "whole"])
def test_the_entropy_does_not_depend_on_where_the_logits_lie(large, monkeypatch):
    monkeypatch.setattr(fused_head, "LARGE_VOCABULARY", large)
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, WORDS, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(TOKENS, WIDTH), torch.randint(0, WORDS, (TOKENS,))
    hidden[:, 0], head.weight[:, 0] = 1.0, -200.0  # all logits near -200
    found = token_figures(head, hidden, targets, entropy=True).entropy
    expected = plain_figures(hidden, head.weight, targets, 1.0)[3]
    assert (found - expected).abs().max() < 1e-4


def tied_model(dtype=torch.float32, rows=(7, 2999, 512)):
    """A model with tied embeddings; the adapter holds `rows` of them, moved from where the base has them."""
    torch.manual_seed(1)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(
        vocab_size=WORDS, head_dim=8, intermediate_size=24, initializer_range=0.5, tie_word_embeddings=True, **sizes
    )
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", trainable_token_indices=list(rows), target_modules=["q_proj"])
    model = get_peft_model(Qwen3ForCausalLM(config).to(dtype), lora)
    fused_head.use_trained_rows(model)
    with torch.no_grad():
        for layer in fused_head.row_layers(model):
            layer.trainable_tokens_delta["default"] += 0.3
    return model


def rows_of(model):
    return fused_head.row_layers(model)[0].trainable_tokens_delta["default"]


def test_trained_rows_get_the_gradient_of_the_plain_head():
    model = tied_model()
    head, rows = model.get_base_model().get_output_embeddings(), rows_of(model)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets = torch.randint(0, WORDS, (TOKENS,))
    targets[:6] = torch.tensor([7, 2999, 512, 7, 511, 513])
    found = token_figures(head, hidden, targets, entropy=True)
    weight = head.weight  # peft's own: the rows copied into all of them
    expected = plain_figures(hidden, weight, targets, 1.0)
    for one, other in zip(vars(found).values(), expected, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=2e-5)
    scales = torch.randn(TOKENS)
    one, other = (torch.autograd.grad((scales * part).sum(), (hidden, rows)) for part in (found.logprobs, expected[0]))
    assert torch.allclose(one[0], other[0], atol=2e-5) and torch.allclose(one[1], other[1], atol=2e-5)
    assert one[1].abs().max() > 0.1
    with model.disable_adapter():
        base = token_figures(head, hidden, targets).logprobs
        assert torch.allclose(base.double(), plain_figures(hidden, rows_free(model), targets, 1.0)[0], atol=2e-5)
    assert not torch.allclose(base, found.logprobs, atol=1e-2)


def rows_free(model):
    return fused_head.row_layers(model)[0].get_base_layer().weight


def test_a_model_with_trained_rows_answers_as_with_pefts_own_forward():
    """use_trained_rows copies no whole weights; values and gradients are peft's."""
    quick, slow = tied_model(), tied_model()
    for layer in fused_head.row_layers(slow):
        del layer.forward_adapters  # peft's own again
    ids = torch.tensor([[5, 7, 2999, 10, 512, 511]])
    results = []
    for model in (quick, slow):
        logits = model(ids).logits
        rows = rows_of(model)
        results.append((logits, torch.autograd.grad(logits.log_softmax(-1)[..., 7].sum(), rows)[0]))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    with quick.disable_adapter(), slow.disable_adapter():
        assert torch.equal(quick(ids).logits, slow(ids).logits)


def test_in_bfloat16_the_error_is_that_of_rounded_logits():
    torch.manual_seed(2)
    head = torch.nn.Linear(WIDTH, WORDS, bias=False).to(torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, WORDS, (TOKENS,))
    found = token_figures(head, hidden, targets).logprobs
    plain = head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(found, plain, atol=1e-2)
    one, other = (torch.autograd.grad(-part.mean(), hidden)[0].float() for part in (found, plain))
    assert one.dtype == torch.float32 and (one - other).norm() < 0.02 * other.norm()


def test_a_head_that_is_trained_itself_keeps_its_gradient():
    head = torch.nn.Linear(WIDTH, WORDS, bias=False)
    token_figures(head, torch.randn(3, WIDTH), torch.tensor([1, 2, 3])).logprobs.sum().backward()
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("held", [1 << 24, 7 * WORDS])
def test_divergence_and_its_gradient_are_those_of_the_formula_and_of_trl(mix, held, monkeypatch):
    """Agarwal et al. 2024, arXiv 2306.13649, equation 1, written out over probabilities; trl's fused one agrees."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    monkeypatch.setattr(fused_head, "LOGITS_HELD", held)  # as a whole, and seven tokens at a time
    torch.manual_seed(0)
    student, teacher = (torch.nn.Linear(width, WORDS, bias=False) for width in (WIDTH, 2 * WIDTH))
    own, wanted = torch.randn(TOKENS, WIDTH, requires_grad=True), 3 * torch.randn(TOKENS, 2 * WIDTH)
    found, entropy = fused_head.divergence_of_heads(student, own, teacher, wanted, mix, WORDS)

    p, q = (head(states).double().softmax(-1) for head, states in ((teacher, wanted), (student, own)))
    both = mix * p + (1 - mix) * q
    pieces = {0.0: p * (p / q).log(), 1.0: q * (q / p).log()}
    piece = pieces.get(mix, mix * p * (p / both).log() + (1 - mix) * q * (q / both).log())
    expected = piece.sum(-1)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(entropy.double(), -(q * q.log()).sum(-1), atol=1e-4) and not entropy.requires_grad
    gradients = [
        torch.autograd.grad(part.sum(), [own, student.weight], retain_graph=True) for part in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    mask = torch.ones(1, TOKENS)
    parts = own[None], wanted[None], student.weight, teacher.weight, mask, mix
    assert _chunked_divergence_loss(*parts)[0].item() == pytest.approx(found.mean().item(), rel=1e-4)
