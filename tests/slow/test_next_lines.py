"""The "next:" line of every stage of a chain, run as bash reads it, in a clone with a user's own small files.

One process runs all stages of this file, each as `python scripts/NN_....py` would: importing torch takes seconds.
"""

import json
import lzma
import os
import random
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

CHARACTERS = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少白日依山尽黄河入海流欲穷千里目更上一层楼"


def answer(number: int) -> str:
    """A text of thirty characters, another one for each number."""
    return "".join(random.Random(number).choices(CHARACTERS, k=30)) + "。"


ROWS = [{"instruction": f"第{n}题：续写", "output": answer(n)} for n in range(40)]
PAIRS = [{"prompt": f"第{n}题", "chosen": answer(n), "rejected": answer(n + 50)} for n in range(40)]
TEXTS = [{"text": f"第{n}回\n{answer(n)}{answer(n + 90)}"} for n in range(40)]
LABELS = [row | {"label": n % 2 == 0} for n, row in enumerate(ROWS)]
POEMS = json.loads(lzma.decompress((ROOT / "data/poems/tang.json.xz").read_bytes()))[:1200]
# what tests add, to make a line shorter: a training stage of its own accord runs for an epoch
TRAIN = "--batch-size 4 --max-steps 2 --report-to none --lora-r 4 --dtype float32"
PROBED = f"{TRAIN} --eval-steps 2 --eval-rows 4 --probe-count 2 --probe-tokens 8"
SHORT = {
    "20": PROBED,
    "22": "--probe-rows 2 --greedy-rows 1 --greedy-tokens 4 --dtype float32",
    "30": f"{TRAIN} --eval-steps 2",
    "31": "--num-train-epochs 0.02 --max-length 64 --allow too-long --dtype float32",
    "32": "--bootstrap 20 --dtype float32",
    "40": PROBED,
    "41": PROBED,
    "50": f"{TRAIN} --batch-size 8 --num-generations 4 --max-new-tokens 8 --eval-steps 2 --probe-count 2",
    "51": f"{TRAIN} --batch-size 8 --max-new-tokens 8 --eval-steps 2 --probe-count 2",
    "60": "--max-prompts 8 --num-samples 8 --max-new-tokens 72 --dtype float32",
    "61": "--dtype float32",
    "70": "--bootstrap 20 --dtype float32",
    "72": "--bootstrap 20",
}
WRITTEN = "results/poems/generations/sft_merged.jsonl"
AFTER_20 = ["20", "22", "60", "70", "72"]
# name -> (the user's file, the first command, the stages that follow); --task mine only names folders. Some go on from
# what a chain above them left.
CHAINS = {
    "chat": (ROWS, "17_prepare_chat.py --task mine --files {file}", ["19", *AFTER_20]),
    "pairs": (
        PAIRS,
        "17_prepare_chat.py --task mine --files {file} --output-dir my\\ rows/out",
        ["19", "40", "22", "60"],
    ),
    "text": (TEXTS, "18_prepare_text.py --task corpus --files {file}", ["19", "20", "22", "60"]),
    "labels": (LABELS, "17_prepare_chat.py --task labels --files {file}", ["19", "20", "22", "60"]),
    "kto": (
        None,
        "19_check_data.py --task labels --train-file processed_data/labels/kto_train.jsonl --val-file None",
        ["41", "22", "60"],
    ),
    "poems": (POEMS, "10_prepare_poems.py --corpus {file} --min-character-poems 1", ["19", *AFTER_20]),
    "judge": (None, f"71_judge.py --task poems --candidates golden tuned={WRITTEN}", ["72"]),
    "samples": (
        None,
        f"33_rank_samples.py --task poems --generations {WRITTEN} --val-share 0.5 --min-margin 0.001",
        ["40"],
    ),
    "grpo": (None, "50_train_grpo.py --task poems", ["60"]),
    "ppo": (None, "51_train_ppo.py --task poems", ["60"]),
    "weibo": (None, "11_prepare_weibo.py", ["19", *AFTER_20]),
    "reward": (None, "30_train_reward.py --task weibo --model data/tiny_qwen3", ["32", "40", "22", "60"]),
    "styles": (None, "12_prepare_styles.py", ["31", "61"]),
    "sheet": (None, "61_classify_style.py --input-file processed_data/styles/style_test.jsonl", ["73"]),
    "copywriting": (None, "13_write_copy.py", ["14", "15", "16", "19", *AFTER_20]),
}
WORKER = """
import contextlib, io, json, runpy, sys, traceback
answers = sys.stdout
for line in sys.stdin:
    sys.argv, said, code = json.loads(line), io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    print(json.dumps([code, said.getvalue()]), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def paste(tmp_path_factory):
    """A function: a command, read by bash -> what it printed. It runs in a clone, whose default folders it fills."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "scripts", clone / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "data").symlink_to(ROOT / "data")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(clone / "scripts")}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        cwd=clone,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )

    def run(line: str) -> str:
        read = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], cwd=clone, capture_output=True, check=True)
        program, *words = read.stdout.decode().split("\0")[:-1]
        assert program == "python"
        print(json.dumps(words), file=worker.stdin, flush=True)
        code, said = json.loads(worker.stdout.readline())
        assert code == 0, f"{line}\n{said[-3000:]}"
        return said

    run.folder = clone
    yield run
    worker.stdin.close()
    assert worker.wait(60) == 0


def next_of(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("next: ")]
    return lines[-1].removeprefix("next: ") if lines else ""


@pytest.mark.parametrize("name", CHAINS)
def test_every_next_line_runs_as_it_is_pasted(name, paste):
    rows, first, stages = CHAINS[name]
    file = paste.folder / "my rows" / f"{name}.json"
    if rows:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    start = first.format(file=f"my\\ rows/{name}.json")
    line = next_of(paste(f"python scripts/{start} {SHORT.get(first[:2], '')}"))
    for number in stages:
        assert line.startswith(f"python scripts/{number}_"), line
        short = SHORT.get(number, "")
        if " --prompt " in line:  # one text, no file of prompts
            short = short.replace("--max-prompts 8", "")
        line = next_of(paste(f"{line} {short}"))
    assert stages[-1] != "72" or line == ""
