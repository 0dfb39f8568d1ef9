"""The worked example in docs/ARCHITECTURE.md, "A new writing job": the job, its data and its commands as they stand on
the page."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import warm
from common.jsonl import read_json, read_jsonl, write_jsonl
from conftest import ROOT

PAGE = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8").split("## A new writing job")[1].split("\n## ")[0]
BLOCKS = dict(re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = {line.split()[1].split("/")[1][:2]: line for line in BLOCKS["bash"].splitlines()}
UPPER = "春回大地"  # 平, either, 仄仄: 回 is read in both tones
GOOD, WORSE, BAD = "福满人间", "福满人", "春春春春春春春春"  # 仄仄平平


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    return with_the_job(tmp_path_factory.mktemp("repo"))


def with_the_job(root: Path) -> Path:
    """A copy of the scripts with the job of the page in it, its data prepared."""
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "data").symlink_to(ROOT / "data")
    job = root / "scripts/tasks/couplets/__init__.py"
    job.parent.mkdir()
    job.write_text(BLOCKS["python"], encoding="utf-8")
    (root / "couplets.jsonl").write_text(BLOCKS["json"], encoding="utf-8")
    run(root, "17")
    return root


def run(root: Path, stage: str) -> str:
    words = [sys.executable, *shlex.split(COMMANDS[stage])[1:]]
    done = warm.run(words, cwd=root, timeout=300)
    assert done.returncode == 0, f"{COMMANDS[stage]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_whole_job_takes_under_80_lines():
    assert sum(len(BLOCKS[kind].splitlines()) for kind in ("python", "json", "bash")) < 80


def test_the_commands_of_the_page_run_one_after_the_other(tmp_path):
    root = with_the_job(tmp_path)
    for stage in ("50", "60", "70", "33"):
        run(root, stage)
    assert read_jsonl(root / "processed_data/couplets/pref_onpolicy_train.jsonl")


def test_its_rows_become_training_files_and_grpo_rewards_them_without_a_flag(repo):
    written = {path.name for path in (repo / "processed_data/couplets").iterdir()}
    assert {"sft_train.jsonl", "sft_val.jsonl", "prompts_train.jsonl", "prompts_test.jsonl"} <= written
    run(repo, "50")
    record = read_json(repo / "checkpoints/couplets/grpo/run.json")
    assert record["status"] == "done" and record["settings"]["rewards"] == ["length", "tones", "no_shared"]
    logged = {name for entry in read_json(repo / "checkpoints/couplets/grpo/log_history.json") for name in entry}
    assert {"reward/length", "reward/tones", "reward/no_shared"} <= logged


def test_its_metrics_are_scored_and_its_rewards_rank_samples(repo):
    def row(prompt: int, sample: int, text: str) -> dict:
        turns = [{"role": "user", "content": "对下联：" + UPPER}]
        if prompt:  # only the last turn is the upper line
            earlier = [
                {"role": "user", "content": "对下联：" + "三五" * prompt},
                {"role": "assistant", "content": "七八"},
            ]
            turns = [*earlier, *turns]
        about = {"id": f"p{prompt}#{sample}", "prompt_id": f"p{prompt}", "sample": sample, "seed": 1, "tokens": 5}
        about |= {"model": "base", "finish_reason": "stop", "reference": GOOD, "meta": {"id": f"p{prompt}"}}
        return {**about, "prompt": turns, "completion": text}

    rows = [row(prompt, sample, text) for prompt in range(6) for sample, text in enumerate((BAD, GOOD, WORSE))]
    write_jsonl(repo / "results/couplets/generations/base.jsonl", rows)
    assert "no_shared" in run(repo, "70")
    scores = [line["scores"] for line in read_jsonl(repo / "results/couplets/scores/base.jsonl")]
    assert [score["length"] for score in scores[:3]] == [0.5, 1.0, 0.75]
    assert [score["no_shared"] for score in scores[:3]] == [0.0, 1.0, 1.0]
    assert [score["tones"] for score in scores[:3]] == [pytest.approx(2 / 3), 1.0, 1.0] and scores[1]["overall"] == 1.0
    assert scores == scores[:3] * 6

    run(repo, "33")
    pairs = read_jsonl(repo / "processed_data/couplets/pref_onpolicy_train.jsonl")
    assert {(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs} == {(GOOD, BAD)}
