"""How long does each stage take to say what it can do (--help), and to refuse an input that is not there?

Wall and CPU seconds, the median of several runs after one that warms the disk, with the lowest and the highest.

Reads   scripts/
Writes  a Markdown table on standard output
Run     python benchmarks/cold_start.py
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def seconds_of(command: list[str]) -> tuple[float, float]:
    """(wall, CPU) of a process; what it says and its exit code do not matter."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"| stage | --help: wall, s, median of {options.rounds} | lowest to highest | CPU, s |\n|---|---:|---:|---:|")
    commands = {"python -c pass": [sys.executable, "-c", "pass"]}
    commands |= {
        path.name: [sys.executable, str(path), "--help"] for path in sorted(ROOT.glob("scripts/[0-9][0-9]_*.py"))
    }
    medians = []
    for name, command in commands.items():
        times = [seconds_of(command) for _ in range(options.rounds + 1)][1:]
        wall, used = zip(*times, strict=True)
        medians.append(statistics.median(wall))
        spread = f"{min(wall):.2f} to {max(wall):.2f}"
        print(f"| {name} | {medians[-1]:.2f} | {spread} | {statistics.median(used):.2f} |", flush=True)
    print(f"\nslowest {max(medians):.2f} s, median of all {statistics.median(medians):.2f} s")


if __name__ == "__main__":
    main()
