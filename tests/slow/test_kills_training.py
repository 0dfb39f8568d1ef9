"""A training stage killed at a named moment and started again writes what an undisturbed one does, to the last
figure."""

import json
import shutil
import sys
from pathlib import Path

import kills
import pytest

from common.jsonl import sha256_file
from conftest import ROOT, SCRIPTS, moved_base, start_and_kill

BASE = ROOT / "data" / "tiny_qwen3"
SHORT = ["--model", BASE, "--lora-r", 4, "--lora-alpha", 8, "--lora-dropout", 0.1, "--report-to", "none", "--seed", 7]
SHORT += ["--probe-count", 2, "--probe-tokens", 8, "--batch-size", 4, "--accumulation", 2, "--eval-rows", 6]
RL = ["--model", BASE, "--rewards", "form", "no_repeat", "--lora-r", 4, "--report-to", "none", "--probe-count", 2]
RL += ["--batch-size", 8, "--max-new-tokens", 8, "--max-steps", 4, "--eval-steps", 1, "--seed", 7]
GRPO = [*RL, "--num-generations", 4]
TEACHER = ["--teacher", "{rows}/teacher", "--max-new-tokens", 8]
STAGES = {
    # 24 rows: three steps an epoch. The second run of each stops early: at this rate the loss soon grows.
    "sft": ("20_train_sft.py", "sft", [*SHORT, "--epochs", 3, "--eval-steps", 3]),
    "sft, early stop": (
        "20_train_sft.py",
        "sft",
        [*SHORT, "--epochs", 9, "--eval-steps", 2, "--lr", 0.3, "--patience", 1],
    ),
    "sft, max_steps": ("20_train_sft.py", "sft", [*SHORT, "--max-steps", 5, "--eval-steps", 4]),
    "dpo": ("40_train_dpo.py", "pref", [*SHORT, "--epochs", 3, "--eval-steps", 3, "--patience", 1]),
    # the student's own texts and given ones
    "distill": ("42_distill.py", "sft", [*SHORT, *TEACHER, "--epochs", 3, "--eval-steps", 3]),
    # The first step's rate is small, the second's is over the budget.
    "grpo": ("50_train_grpo.py", "sft", GRPO),
    "grpo, budget": ("50_train_grpo.py", "sft", [*GRPO, "--warmup-share", 0.5, "--lr", 0.02, "--kl-budget", 0.05]),
    "ppo": ("51_train_ppo.py", "sft", RL),
    "ppo, budget": ("51_train_ppo.py", "sft", [*RL, "--lr", 0.02, "--kl-budget", 0.05]),
}
MOMENTS = ("first checkpoint", "second checkpoint being written", "closing minute")
FIRST, SECOND, CLOSING = MOMENTS
# Every stage at one moment at least, each moment with one stage at least, both types of numbers with every algorithm.
CASES = [
    *(("sft", moment, "float32") for moment in MOMENTS),
    ("sft", FIRST, "bfloat16"),
    ("sft, early stop", CLOSING, "float32"),
    ("sft, early stop", CLOSING, "bfloat16"),
    ("sft, max_steps", CLOSING, "float32"),
    ("dpo", SECOND, "float32"),
    ("dpo", FIRST, "bfloat16"),
    ("distill", FIRST, "float32"),
    ("distill", SECOND, "bfloat16"),
    ("grpo", SECOND, "float32"),
    ("grpo", FIRST, "bfloat16"),
    ("grpo, budget", CLOSING, "float32"),
    ("ppo", FIRST, "bfloat16"),
    ("ppo, budget", CLOSING, "float32"),
]
TIMES = ("seconds", "runtime", "per_second", "time")


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for schema in ("sft", "pref"):
        for split, numbers in (("train", range(24)), ("val", range(24, 30))):
            lines = []
            for number in numbers:
                answer = [
                    {"role": "assistant", "content": f"第{number}句，" + "山水花月"[number % 4] * (1 + number % 5)}
                ]
                row = {"prompt": [{"role": "user", "content": f"写第{number}句"}], "meta": {"form": "五言绝句"}}
                worse = [{"role": "assistant", "content": f"{number}不好" * 3}]
                row |= {"completion": answer} if schema == "sft" else {"chosen": answer, "rejected": worse}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            (folder / f"{schema}_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    moved_base(folder / "teacher")
    return folder


def command(name: str, rows: Path, output: Path, dtype: str) -> list[str]:
    script, schema, words = STAGES[name]
    files = ["--train-file", rows / f"{schema}_train.jsonl", "--val-file", rows / f"{schema}_val.jsonl"]
    return [
        sys.executable,
        str(SCRIPTS / script),
        *(str(word).format(rows=rows) for word in [*files, *words, "--dtype", dtype, "--output-dir", output]),
    ]


def results(output: Path) -> tuple:
    """Everything a run leaves that is not a time: the log, the figures, the weights."""
    log = json.loads((output / "log_history.json").read_text(encoding="utf-8"))
    log = [{key: value for key, value in entry.items() if not any(word in key for word in TIMES)} for entry in log]
    figures = json.loads((output / "run.json").read_text(encoding="utf-8"))["figures"]
    return log, figures, sha256_file(output / "adapter_model.safetensors")


def run(words: list[str], folder: Path) -> str:
    process = kills.Forked(words, folder)
    assert process.wait() == 0, process.text()
    return process.text()


@pytest.fixture(scope="session")
def undisturbed(rows, tmp_path_factory):
    done: dict = {}

    def get(name: str, dtype: str) -> Path:
        if (name, dtype) not in done:
            folder = tmp_path_factory.mktemp("whole")
            done[name, dtype] = folder / "out"
            run(command(name, rows, done[name, dtype], dtype), folder)
        return done[name, dtype]

    return get


@pytest.mark.parametrize(("name", "moment", "dtype"), CASES)
def test_killed_and_started_again_equals_undisturbed(name, moment, dtype, rows, undisturbed, tmp_path):
    whole, output = undisturbed(name, dtype), tmp_path / "out"
    steps = sorted(int(path.name.split("-")[1]) for path in whole.glob("checkpoint-*"))
    every = int(STAGES[name][2][STAGES[name][2].index("--eval-steps") + 1])
    moments = {
        "first checkpoint": output / f"checkpoint-{every}" / "trainer_state.json",
        "second checkpoint being written": output / f"checkpoint-{min(2 * every, steps[-1])}" / "adapter_config.json",
        "closing minute": output / "adapter_model.safetensors",
    }
    words = command(name, rows, output, dtype)
    start_and_kill(words, tmp_path, moments[moment].exists)
    if moment == FIRST:  # the highest number is not always a whole one
        torn = shutil.copytree(output / f"checkpoint-{every}", output / f"checkpoint-{every + 9}")
        (torn / "trainer_state.json").write_text('{"global_step": 9, "log_hi', encoding="utf-8")
    said = run(words, tmp_path)
    assert "resuming" in said and (moment != FIRST or f"checkpoint-{every + 9} is not whole" in said)
    for ours, theirs in zip(results(output), results(whole), strict=True):
        assert ours == theirs
    evaluated = [entry["step"] for entry in results(output)[0] if "eval_loss" in entry]
    assert len(evaluated) == len(set(evaluated)), "no evaluation appears twice"
    assert not list(output.rglob("training_args.bin"))


def test_the_early_stop_is_one(undisturbed):
    log, figures, _ = results(undisturbed("sft, early stop", "float32"))
    assert figures["steps"] < 27 and figures["eval_loss"] == min(e["eval_loss"] for e in log[1:] if "eval_loss" in e)


@pytest.mark.parametrize("name", ["grpo, budget", "ppo, budget"])
def test_the_budget_ended_it(name, undisturbed):
    _, figures, _ = results(undisturbed(name, "float32"))
    assert "over its budget" in figures["stopped_by"] and figures["steps"] < 4
