"""benchmarks/: gpu_memory.py on a small shape, every stage that it names with its settings; what others measure."""

import re
import subprocess
import sys

from conftest import ROOT


def test_the_memory_table_has_a_row_for_every_stage_and_no_error(tmp_path):
    """The training, stages 20 to 51, is that of the table in docs/OPERATIONS.md; only the shape is small."""
    words = ["--cases", "test", "--length", "96", "--new-tokens", "32", "--steps", "2", "--written", "3"]
    command = [sys.executable, str(ROOT / "benchmarks/gpu_memory.py"), *words, "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in done.stdout.splitlines() if line.startswith("| test")]
    assert [row[1] for row in rows] == [
        "20_train_sft",
        "30_train_reward",
        "40_train_dpo",
        "41_train_kto",
        "50_train_grpo",
        "51_train_ppo",
    ]
    for row in rows:
        assert float(row[3]) > 0 and not re.search("error", " ".join(row[6:]), re.IGNORECASE), row


def test_processor_seconds_of_a_child_are_counted(monkeypatch):
    """`trl sft` trains in a child of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from real_base_cpu import measured

    work = "import time\nfor step in (1, 2):\n    print(f'{step}/2 [', flush=True)\n"
    work += "    end = time.process_time() + 0.5\n    while time.process_time() < end: pass\n"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    assert measured([sys.executable, "-c", parent], 2)[0] > 0.3
