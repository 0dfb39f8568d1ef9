"""What training stages build from their settings, and what ends a run as an error."""

import math
import platform
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from common.schemas import validate_row
from common.settings import UserError
from common.training import arguments
from conftest import ROOT

BASE = str(ROOT / "data" / "tiny_qwen3")


@dataclass
class Settings:
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 32
    accumulation: int = 2
    lr: float = 1e-3


@dataclass
class Evaluated(Settings):
    eval_steps: int = 100


@pytest.mark.parametrize(
    "rows, expected", [(20, (1, 1)), (60, (3, 1)), (200, (10, 1)), (800, (32, 1)), (6000, (32, 2))]
)
def test_few_rows_make_the_default_batch_smaller(rows, expected):
    assert arguments.fit_batch(Settings(), rows) == expected
    steps = math.ceil(rows / (expected[0] * expected[1]))
    assert steps >= arguments.MIN_STEPS


@pytest.mark.parametrize("rows, set_steps, expected", [(145, 100, 13), (6000, 100, 100), (145, 30, 30), (0, 100, 100)])
def test_a_run_that_ends_before_its_first_evaluation_has_three(rows, set_steps, expected):
    """Checkpoints come with evaluations: without one a run of few rows that is killed begins anew."""
    assert arguments.fit_eval_steps(Evaluated(eval_steps=set_steps, epochs=2.0), rows, batch=8) == expected
    assert arguments.fit_eval_steps(Settings(), rows, batch=8) == 0


def test_a_batch_never_has_fewer_rows_than_the_loss_needs():
    """KTO estimates its KL from two answers: trl refuses a batch of one with a bare ValueError."""
    assert arguments.fit_batch(Settings(), 20, least=2) == (2, 1)


def test_a_batch_that_was_named_and_counted_steps_stay():
    assert arguments.fit_batch(Settings(batch_size=16), 20) == (16, 2)
    assert arguments.fit_batch(Settings(max_steps=3), 20) == (32, 2)


def test_a_wrong_word_among_the_targets_is_named_with_the_nearest():
    assert arguments.check_targets(("q_proj", "mlp.up_proj"), BASE) == ["q_proj", "mlp.up_proj"]
    assert arguments.check_targets(("all-linear",), BASE) == "all-linear"
    for words in (("q_proj", "k_porj"), ("q_proj", "all-linear"), ("norm",), ("mlp",), ()):
        with pytest.raises(UserError, match="lora-targets.*fix: "):
            arguments.check_targets(words, BASE)
    with pytest.raises(UserError, match="lm_head: trl cannot train"):
        arguments.check_targets(("q_proj", "lm_head"), BASE)
    with pytest.raises(UserError, match="no layer k_porj; fix: k_proj"):
        arguments.check_targets(("k_porj",), BASE)


def test_an_adapter_of_zeros_and_a_loss_that_stayed_are_errors(capsys):
    adapter = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2), "lora_B": torch.nn.Linear(2, 2, bias=False)})
    with torch.no_grad():
        adapter["lora_B"].weight.zero_()
    with pytest.raises(UserError, match="every B matrix of the adapter is 0"):
        arguments.require_learned(dict(adapter.named_parameters()), [2.0, 1.0])
    with pytest.raises(UserError, match="fix: rewards that tell answers apart .now form:1."):
        arguments.require_learned(dict(adapter.named_parameters()), [], rewards=("form:1",))
    with torch.no_grad():
        adapter["lora_B"].weight[0, 0] = 1e-9
    arguments.require_learned(dict(adapter.named_parameters()), [2.0, 1.0])
    with pytest.raises(UserError, match="the validation loss stayed at 2.0000"):
        arguments.require_learned(dict(adapter.named_parameters()), [2.0, 2.0, 2.0])
    assert "guesses" not in capsys.readouterr().out
    arguments.require_learned(dict(adapter.named_parameters()), [3.0, 9.06], chance=math.log(8512))
    assert "that of a model that guesses (9.05)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss", "reward", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_ends_the_run(name, value):
    from transformers import TrainerControl, TrainerState

    guard, state = arguments.Guard(Settings()), TrainerState(global_step=7)
    guard.on_log(None, state, TrainerControl(), logs={name: 1.0, "reward/std": math.nan})
    with pytest.raises(UserError, match=f"step 7: {name} is .*fix: a lower --lr .now 0.001."):
        guard.on_log(None, state, TrainerControl(), logs={name: value})


def test_a_pair_with_a_user_turn_inside_an_answer_is_refused_by_name():
    def turns(*texts):
        return [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(texts)]

    row = {
        "prompt": [{"role": "user", "content": "我失眠。"}],
        "chosen": turns("多久了？"),
        "rejected": turns("喝酒。"),
    }
    assert not validate_row(row, "preference")
    for key in ("chosen", "rejected"):
        found = validate_row({**row, key: turns("多久了？", "两周。", "去看门诊。")}, "preference")
        assert [f"{key}[1] is a user turn" in finding.reason for finding in found] == [True]


FREED = """
import psutil, torch
from common.training.arguments import return_freed_memory

kept, pieces = [], []
for _ in range(2000):
    pieces.append(torch.ones(25 << 10))  # 100 KiB: below 128 glibc takes a piece from its heap
    kept.append(torch.ones(1 << 10))  # behind it, so that the piece is no end of the heap
del pieces
before = psutil.Process().memory_info().rss
return_freed_memory()
print((before - psutil.Process().memory_info().rss) / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps nothing, or has no way to ask")
def test_memory_that_was_freed_goes_back_when_a_step_is_logged(monkeypatch):
    """In a process of its own: the heap of this one has holes of earlier tests, which the small pieces would fill."""
    done = subprocess.run([sys.executable, "-c", FREED], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert float(done.stdout) > 100, done.stderr
    called = []
    monkeypatch.setattr(arguments, "return_freed_memory", lambda: called.append(1))
    arguments.Guard(Settings()).on_log(None, SimpleNamespace(global_step=1), None, logs={"loss": 1.0})
    assert called
