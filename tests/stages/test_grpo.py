"""Stage 50: a run that was cut off comes to the end of an undisturbed one, and its figures are those of the adapter on
disk.

A kill is made from a finished run: what lies on disk once a checkpoint is written is all that a kill right behind it
leaves.
"""

import importlib.util
import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from common.settings import UserError, read_settings
from conftest import SCRIPTS
from test_ppo import figures_of, measured_from_disk, rows_of, words

spec = importlib.util.spec_from_file_location("train_grpo", SCRIPTS / "50_train_grpo.py")
grpo = importlib.util.module_from_spec(spec)
sys.modules["train_grpo"] = grpo  # dataclasses look their module up
spec.loader.exec_module(grpo)


def flags(folder: Path, output: Path, **changed) -> list[str]:
    """6 prompts, 2 a step: an epoch has 3 steps."""
    return words(folder, output, rows_of(6), **{"num_generations": 4, "lr": 0.01} | changed)


def train(folder: Path, output: Path, **changed) -> Path:
    grpo.main(read_settings(grpo.Settings, flags(folder, output, **changed)))
    return output


def log_of(folder: Path) -> list[dict]:
    """The log without what is measured in seconds."""
    log = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    timed = ("time", "second")
    return [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in log]


def cut_off(folder: Path, checkpoint: str) -> Path:
    """A copy of a finished run as a kill behind `checkpoint` would have left it; it takes the place of the finished
    one."""
    whole = folder.rename(folder.with_name("whole"))
    folder.mkdir()
    shutil.copytree(whole / checkpoint, folder / checkpoint)
    record = json.loads((whole / "run.json").read_text(encoding="utf-8")) | {"status": "running", "figures": {}}
    record.pop("process", None)
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return whole


def same_weights(one: Path, other: Path) -> bool:
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


ROUNDS = {"iterations": 2, "minibatches": 2, "max_steps": 8, "eval_steps": 3}  # one round has 4 steps


@pytest.mark.parametrize(
    ("dtype", "changed", "checkpoint", "probed"),
    [
        ("float32", ROUNDS, "checkpoint-4", [0, 4, 8]),
        ("bfloat16", {}, "checkpoint-4", [0, 2, 4, 6]),
        ("float32", {}, "checkpoint-6", [0, 2, 4, 6]),  # in the closing minute
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one(dtype, changed, checkpoint, probed, tmp_path):
    output = train(tmp_path, tmp_path / "grpo", dtype=dtype, **changed)
    whole = cut_off(output, checkpoint)
    train(tmp_path, output, dtype=dtype, **changed)
    log = log_of(output)
    assert log == log_of(whole), "to the last figure, and nothing twice"
    assert [entry["step"] for entry in log if "probe/kl" in entry] == probed
    assert same_weights(output, whole) and figures_of(output) == figures_of(whole)
    loaded = measured_from_disk(output, dtype)
    for name in ("reward", "kl", "nll", "stopped"):
        assert figures_of(output)[name] == loaded[f"probe/{name}"], name


def test_killed_just_after_a_budget_ended_it_a_run_ends_so_again(tmp_path):
    """While the rate rises from 0, the first probes are within the budget and a later one is not."""
    changed = {"kl_budget": 0.05, "lr": 0.01, "warmup_share": 0.5, "eval_steps": 1, "max_steps": 12}
    output = train(tmp_path, tmp_path / "grpo", **changed)
    figures = figures_of(output)
    assert "over its budget" in figures["stopped_by"] and 1 < figures["steps"] < 12 and figures["kl"] < 0.05
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert last.name == f"checkpoint-{figures['steps'] - 1}", "none is over the budget"
    loaded = measured_from_disk(output, "float32")
    assert all(figures[name] == loaded[f"probe/{name}"] for name in ("reward", "kl", "nll", "stopped"))
    whole = cut_off(output, last.name)
    train(tmp_path, output, **changed)
    assert figures_of(output) == figures and same_weights(output, whole) and log_of(output) == log_of(whole)


def test_a_run_that_blows_up_stops_at_once_and_keeps_what_was_good(tmp_path):
    with pytest.raises(UserError, match=r"step [1-4]: .* is (nan|inf)\S*; .*fix: a lower --lr"):
        train(tmp_path, tmp_path / "grpo", lr=1e25, eval_steps=1)
    record = json.loads((tmp_path / "grpo/run.json").read_text(encoding="utf-8"))
    assert record["status"] == "failed" and not (tmp_path / "grpo/adapter_model.safetensors").exists()
    for file in (tmp_path / "grpo").glob("checkpoint-*/adapter_model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())


def test_a_run_whose_rewards_are_all_alike_is_told_that_nothing_was_learned(tmp_path):
    """Answers get advantage 0 where a group earns the same, and at the start the KL is 0."""
    with pytest.raises(UserError, match="nothing was learned: .*fix: rewards that tell answers apart"):
        train(tmp_path, tmp_path / "grpo", rewards=["all_three"], max_steps=1)
    assert not (tmp_path / "grpo/adapter_model.safetensors").exists()


@pytest.mark.parametrize(("lr", "warned"), [(0.3, True), (1e-5, False)])
def test_it_says_that_the_policy_has_unlearned_the_answers(lr, warned, tmp_path, capsys):
    train(tmp_path, tmp_path / "grpo", lr=lr, max_steps=3)
    assert ("has unlearned the rest; fix: a lower --lr" in capsys.readouterr().out) == warned


BAD = {
    "answers that are no whole groups": ({"num_generations": 3}, "fix: --batch-size 9"),
    "fewer prompts than groups": ({"batch_size": 64}, "6 prompts, and 64 answers a round"),
    "no room": ({"max_length": 60, "max_new_tokens": 50}, "no prompt leaves room"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_setting_is_one_line_and_touches_nothing(name, tmp_path):
    changed, message = BAD[name]
    with pytest.raises(UserError) as error:
        train(tmp_path, tmp_path / "grpo", **changed)
    assert message in str(error.value) and not (tmp_path / "grpo").exists()


def test_trl_knows_every_loss_that_may_be_named():
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._compute_loss)
    for name in get_args(get_type_hints(grpo.Settings)["loss_type"]):
        assert f'"{name}"' in source
