"""common/training/trl_cpu.py: written for the trl that is installed, and a rollout that leaves the base's weights
alone."""

import hashlib
import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments
from trl.trainer import utils

from common.training import trl_cpu

# What trl_cpu replaces or calls, as it was read when trl_cpu was written. Where a hash differs, read trl's new code,
# correct trl_cpu.py, and write the new hash here.
READ = {
    "KTOTrainer.log": "e80e122cfe5f",
    "SFTTrainer._get_train_sampler": "1580d7493244",
    "SFTTrainer.training_step": "bba41f264647",
    "DPOTrainer._prepare_dataset": "35e349e8e826",
    "DPOTrainer._get_train_sampler": "1580d7493244",
    "DPOTrainer._compute_loss": "5e58a1699e0d",
    "GRPOTrainer._get_per_token_logps_and_entropies": "ea73c3909275",
    "GRPOTrainer._generate_single_turn": "e0f02e4fc094",
    "GRPOTrainer._generate_and_score_completions": "1fa48922792d",
    "GRPOTrainer._tokenize_prompts": "d2d27f7c9bfd",
    "GRPOTrainer._get_train_sampler": "36497afb4d31",
    "GRPOTrainer._calculate_rewards": "736ae29b0838",
    "DistillationTrainer._tokenize_prompts": "30568810007e",
    "DistillationTrainer._generate_single_turn": "b2cc5048ef74",
    "DistillationTrainer._get_train_sampler": "f3a856a8af02",
    "DistillationTrainer._generate_and_score_completions": "2416bfc479ad",
    "DistillationTrainer._compute_loss": "9fc0021cbcc0",
    "DistillationTrainer._get_last_hidden_state": "12dc17e4ad4b",
    "SFTTrainer.log": "0d4c8e5d64f8",
    "DPOTrainer.log": "e80e122cfe5f",
    "GRPOTrainer.log": "1e7772819cc8",
    "utils.FusedCausalLMOutput": "5ccdd6e41dcb",
    "utils.RepeatSampler": "ba139f4a43ee",
    "utils.add_fused_lm_head": "422d009f04b6",
}


def source_of(name: str):
    owner, _, attribute = name.partition(".")
    return getattr(utils if owner == "utils" else getattr(trl, owner), attribute)


def test_trl_is_the_one_that_this_was_written_for():
    assert f"trl {trl.__version__}." in trl_cpu.__doc__
    found = {name: hashlib.sha256(inspect.getsource(source_of(name)).encode()).hexdigest()[:12] for name in READ}
    assert found == READ


def test_every_method_of_trl_that_is_overridden_is_among_those_read():
    for cls in vars(trl_cpu).values():
        if inspect.isclass(cls) and cls.__module__ == trl_cpu.__name__ and hasattr(cls, "train"):
            base = next((base for base in cls.__mro__ if base.__module__.startswith("trl.")), None)
            if base is None:  # stage 21's is transformers' own
                continue
            own = {name for part in cls.__mro__[: cls.__mro__.index(base)] for name in vars(part)}
            overridden = {name for name in own if hasattr(base, name) and not name.startswith("__")}
            assert {f"{base.__name__}.{name}" for name in overridden} <= set(READ), cls.__name__


def tiny_peft(dtype: torch.dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=64, head_dim=16, intermediate_size=48, initializer_range=0.3, **sizes)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(Qwen3ForCausalLM(config).to(dtype), lora).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_rollouts_leave_the_base_bit_for_bit(dtype):
    model, ids = tiny_peft(dtype), torch.arange(12)[None]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        expected = model(ids).logits
        for number in range(10):
            with trl_cpu.folded(model):
                assert not torch.equal(
                    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight,
                    before["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"],
                )
                if number == 0:
                    tolerance = 1e-4 if dtype == torch.float32 else 0.05
                    difference = (model(ids).logits - expected).float()
                    assert difference.norm() < tolerance * expected.float().norm(), "it writes as the adapter does"
        assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("broken", ["inside the rollout", "while the adapter is folded in"])
def test_an_exception_leaves_the_base_bit_for_bit(broken):
    model = tiny_peft(torch.bfloat16)
    if broken != "inside the rollout":
        with torch.no_grad():  # peft refuses NaN, when the layers before this one are folded in already
            model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight[0] = torch.nan
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises((RuntimeError, ValueError)), trl_cpu.folded(model):
        raise RuntimeError
    for name, weight in model.named_parameters():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num()), name
    assert not any(getattr(module, "merged_adapters", None) for module in model.modules())


def test_the_order_of_prompts_depends_on_seed_and_epoch_alone():
    state = SimpleNamespace(global_step=0)
    trainer = SimpleNamespace(state=state, args=SimpleNamespace(gradient_accumulation_steps=1))
    orders = []
    for step in (0, 3, 6):  # an epoch is 7 // 2 batches, each for one step
        state.global_step = step
        sampler = trl_cpu.EpochSampler(utils.RepeatSampler(range(7), 4, 2, 1, True, 5), trainer)
        orders.append([list(sampler), list(sampler)])
    assert orders[0][0] == list(utils.RepeatSampler(range(7), 4, 2, 1, True, 5)), "the first is trl's own"
    assert all(first == again for first, again in orders) and len({tuple(first) for first, _ in orders}) == 3
    state.global_step = 4  # resumed within the second epoch
    assert list(sampler) == orders[1][0]


def seen_widths(widths: list, module, args, kwargs) -> None:
    widths.append(kwargs["input_ids"].shape)


def test_a_step_in_parts_has_the_loss_and_the_gradient_of_the_whole(monkeypatch, tmp_path):
    """Rows of other lengths, in one pass of transformers' own Trainer, in one of ours, and one row at a time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, head_dim=8, num_key_value_heads=1, **sizes))
    lengths = torch.tensor([5, 9, 12, 12])
    ids, seen = torch.randint(0, 64, (4, 12)), torch.arange(12)[None] < lengths[:, None]
    labels = torch.where(seen & (torch.arange(12) > 3), ids, -100)
    inputs = {"input_ids": ids, "attention_mask": seen.long(), "labels": labels}
    assert [part["input_ids"].shape for part in trl_cpu.in_parts(inputs, 24)] == [(2, 9), (2, 12)]
    results = []
    for kind, room in ((Trainer, 0), (trl_cpu.LeanTrainer, 1 << 40), (trl_cpu.LeanTrainer, 1)):
        monkeypatch.setattr(trl_cpu, "ACTIVATIONS", room)
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        trainer = kind(model=model, args=args, train_dataset=[{}])
        trainer.optimizer, model.forward = None, type(model).forward.__get__(model)
        widths = []
        if kind is trl_cpu.LeanTrainer:
            trl_cpu.use_lean_head(model, always=True)
        hook = model.register_forward_pre_hook(partial(seen_widths, widths), with_kwargs=True)
        model.zero_grad()
        loss = trainer.training_step(model, dict(inputs), (labels[:, 1:] != -100).sum())
        hook.remove()
        results.append((loss, [value.grad.clone() for value in model.parameters()], widths))
    (loss, gradient, _), *others = results
    assert [len(widths) for *_, widths in others] == [1, 4]
    for other, its_gradient, _ in others:
        assert torch.allclose(loss, other, atol=1e-6)
        assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(gradient, its_gradient, strict=True))
