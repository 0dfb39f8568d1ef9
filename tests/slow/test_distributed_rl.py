"""Stages 50 and 51 in two processes over gloo: the gradients of one process, one record, one voice, and an end when a
process dies."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from conftest import ROOT, SCRIPTS, in_two_processes
from test_ppo import figures_of, log_of, rows_of, words

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate/cpu_2.yaml"]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(SCRIPTS),
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def start(*command) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        cwd=ROOT,
    )


def end(process: subprocess.Popen) -> list[str]:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output.splitlines()


# --- the same gradients on recorded completions


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """What one process and each of two have made of the same recorded answers."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    script = ROOT / "tests/rl_process.py"
    for process in (start(script, one), start(*LAUNCH, script, two)):
        end(process)
    return [torch.load(path, weights_only=True) for path in (one / "0.pt", two / "0.pt", two / "1.pt")]


@pytest.mark.parametrize("learner", ["ppo_shared", "ppo_own", "grpo"])
def test_two_processes_have_the_gradients_of_one(learner, learned):
    whole, *shared = (found[learner] for found in learned)
    for name in ("gradients", "alone") if "ppo" in learner else ("gradients",):
        assert whole[name].norm() > 0.1
        for part in shared:
            assert (part[name] - whole[name]).norm() < 1e-5 * whole[name].norm(), name
        assert torch.equal(shared[0][name], shared[1][name]), "a difference would grow from step to step"


# of trl's log, what is told of all answers; the other figures are times, or one process's
OF_ALL = (
    "reward",
    "reward/form",
    "reward/no_repeat",
    "unjudged",
    "kl",
    "entropy",
    "num_tokens",
    "completions/mean_length",
)


@pytest.mark.parametrize("learner", ["ppo_shared", "ppo_own", "grpo"])
def test_what_is_logged_counts_the_answers_of_all_processes(learner, learned):
    whole, *shared = (found[learner]["figures"] for found in learned)
    probes = [name for name in whole if name.startswith("probe/")]
    for name in (*OF_ALL, *probes) if learner == "grpo" else whole:
        for figures in shared:
            assert figures[name] == pytest.approx(whole[name], rel=1e-4), name
    assert [shared[0][name] for name in probes] == [shared[1][name] for name in probes], "they decide when to stop"


# --- through the command lines


def ppo_words(folder, output) -> list:
    """One prompt for all answers: processes that drew alike would write each of them twice."""
    return words(folder, output, rows_of(1), batch_size=4, report_to="tensorboard")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    said = in_two_processes(folder, "51_train_ppo.py", *ppo_words(folder, folder / "out"))
    return folder / "out", said.splitlines()


def count(lines: list[str], *words: str) -> list[int]:
    return ["\n".join(lines).count(word) for word in words]


def test_of_two_ppo_processes_one_writes_and_prints(trained):
    folder, lines = trained
    assert count(lines, "1 prompts", "step 1:", "step 6:", "  probe:", "next:") == [1, 1, 1, 3, 1]
    assert len(list(folder.rglob("run.json"))) == 1 and len(list(folder.rglob("events.out.*"))) == 1
    assert [entry["step"] for entry in log_of(folder)] == list(range(7))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert figures_of(folder)["steps"] == 6


def test_each_ppo_process_draws_its_own_answers(trained):
    assert all(entry["distinct_2"] > 0.6 for entry in log_of(trained[0])[1:])


def test_a_killed_process_ends_the_job_which_then_goes_on_as_if_nothing_had_happened(trained, tmp_path):
    command = [*LAUNCH, SCRIPTS / "51_train_ppo.py", *ppo_words(tmp_path, tmp_path / "out")]
    job = start(*command)
    while not (tmp_path / "out/checkpoint-2").exists():
        assert job.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    (second,) = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGKILL)
    job.communicate(timeout=60)
    assert job.returncode != 0 and not (tmp_path / "out/log_history.json").exists()

    assert count(end(start(*command)), "resumed at step") == [1]
    for one, other in zip(log_of(trained[0]), log_of(tmp_path / "out"), strict=True):
        assert one.pop("samples", None) == other.pop("samples", None)
        assert one == pytest.approx(other, abs=1e-6)


def test_of_two_grpo_processes_one_writes_and_prints_and_both_stop_at_the_budget(tmp_path):
    flags = words(tmp_path, tmp_path / "out", batch_size=6, lr=0.02, report_to="tensorboard")
    more = ["--num-generations", 4, "--kl-budget", 1e-6]
    lines = in_two_processes(tmp_path, "50_train_grpo.py", *flags, *more).splitlines()
    assert count(lines, "20 prompts", "step 0:", "step 2:", "stop: KL", "next:") == [1, 1, 1, 1, 1]
    folder = tmp_path / "out"
    # events.out.tfevents.TIME.HOST.PID.COUNT: the record's figures come in a file of their own behind the training's
    writers = {path.name.split(".")[-2] for path in folder.rglob("events.out.*")}
    assert len(list(folder.rglob("run.json"))) == 1 and len(writers) == 1
    assert figures_of(folder)["steps"] == 2 and "budget of 1e-06" in figures_of(folder)["stopped_by"]
    assert [entry["step"] for entry in log_of(folder) if "reward" in entry] == [1, 2]


def test_fewer_prompts_than_processes_are_refused(run_stage, tmp_path):
    flags = words(tmp_path, tmp_path / "out", batch_size=1)
    done = run_stage("51_train_ppo.py", *flags, env={"WORLD_SIZE": "2"}, check=False)
    assert done.returncode == 2 and "--batch-size 1: fewer prompts than processes" in done.stderr
