"""The machine that figures come from: processor, units, memory, GPU, load, versions, commit. One line each.

Run     python benchmarks/machine.py
"""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def main() -> None:
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    facts = dict([part.strip() for part in line.split(":", 1)] for line in lines if ":" in line)
    units = [unit for unit in UNITS if unit in facts.get("flags", facts.get("Features", "")).split()]
    name = facts.get("model name", platform.processor() or platform.machine())
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    print(f"- processor: {name}, {os.cpu_count()} cores, {' '.join(units) or 'units unknown'}")
    print(f"- memory: {psutil.virtual_memory().total / 2**30:.1f} GiB; GPU: {', '.join(gpus) or 'none'}")
    print(f"- load at the start: {psutil.getloadavg()[0]:.1f}; threads: {torch.get_num_threads()}")
    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    print(f"- {platform.system()}, Python {sys.version.split()[0]}, {packages}")
    print(f"- commit {commit.stdout.strip() or 'unknown'}")


if __name__ == "__main__":
    main()
