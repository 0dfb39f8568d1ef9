"""The "next:" line of every stage of a chain, pasted into bash as it is, in a clone with a user's own small files."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

CHARACTERS = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少白日依山尽黄河入海流欲穷千里目更上一层楼"


def answer(number: int) -> str:
    """A text of thirty characters, another one for each number."""
    return "".join(random.Random(number).choices(CHARACTERS, k=30)) + "。"


ROWS = [{"instruction": f"第{n}题：续写", "output": answer(n)} for n in range(40)]
PAIRS = [{"prompt": f"第{n}题", "chosen": answer(n), "rejected": answer(n + 50)} for n in range(40)]
LABELS = [row | {"label": n % 2 == 0} for n, row in enumerate(ROWS)]
TEXTS = [{"text": f"第{n}回\n{answer(n)}{answer(n + 90)}"} for n in range(40)]
SMALL = "--max-length 96 --batch-size 8 --max-steps 2 --probe-count 2 --probe-tokens 8 --report-to none --lora-r 4"
PREPARE = "python scripts/17_prepare_chat.py --task mine --files"
CHAINS = {  # name -> (rows, the first command, the stages that follow; --task names folders only)
    "chat": (ROWS, f"{PREPARE} my\\ rows/chat.jsonl", ["19", "20", "22", "60", "70", "72"]),
    "text": (TEXTS, "python scripts/18_prepare_text.py --files my\\ rows/text.jsonl", ["19", "20", "22", "60"]),
    "pairs": (PAIRS, f"{PREPARE} my\\ rows/pairs.jsonl --output-dir my\\ rows/out", ["19", "40", "22"]),
    "labels": (
        LABELS,
        "python scripts/19_check_data.py --task mine --train-file kto.jsonl --val-file None",
        ["41", "22"],
    ),
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The repo's files that these stages read; outputs go to its default folders."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data" / "tiny_qwen3", folder / "data" / "tiny_qwen3")
    return folder


def paste(line: str, clone: Path) -> tuple[str, str]:
    """(the next line, what was printed) of a command as bash runs it in the repo's root."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", line], cwd=clone, env=env, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    lines = [text for text in done.stdout.splitlines() if text.startswith("next: ")]
    return lines[-1].removeprefix("next: ") if lines else "", done.stdout


@pytest.mark.parametrize("name", CHAINS)
def test_every_next_line_runs_as_it_is_pasted(name, clone):
    rows, line, stages = CHAINS[name]
    merged = clone / "checkpoints" / "mine" / "sft_merged"
    if name in ("pairs", "labels") and not merged.exists():  # what these two begin with
        shutil.copytree(clone / "data" / "tiny_qwen3", merged)
    if name == "labels":
        turns = [([{"role": "user", "content": r["instruction"]}], r["output"], r["label"]) for r in rows]
        rows = [{"prompt": p, "completion": [{"role": "assistant", "content": a}], "label": b} for p, a, b in turns]
    file = clone / ("kto.jsonl" if name == "labels" else f"my rows/{name}.jsonl")
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    line, _ = paste(line, clone)
    for number in stages:
        assert line.startswith(f"python scripts/{number}_"), line
        # tests only make it shorter: a training stage of its own accord runs for an epoch
        short = f" {SMALL} --dtype float32 --eval-steps 2" if number in ("20", "40", "41") else ""
        line, _ = paste(line + short, clone)
    assert line == "" or name in ("pairs", "labels")
