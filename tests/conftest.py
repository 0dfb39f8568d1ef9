"""Shared by all tests: `scripts/` on the import path, and a way to run a stage as a user does."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: sums do not depend on how a stage is started
sys.path[:0] = [
    str(SCRIPTS),
    *(str(ROOT / "tests" / tier) for tier in ("", "unit", "stages", "slow")),
    str(ROOT / "benchmarks"),
]  # the stages' modules, and what several tests share

import warm  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run what needs a browser or vLLM")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        for item in items:
            if "all" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --all"))


def stage_command(script: str | Path, *words) -> list[str]:
    """The stage's command line. Where it loads a model and no dtype is named, float32: some CPUs pick bfloat16 by
    themselves."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, words)]
    has_dtype = '    dtype: str = "auto"' in (SCRIPTS / script).read_text(encoding="utf-8")
    named = any(word.split("=")[0] in ("--dtype", "--help", "-h") for word in command)
    return [*command, "--dtype", "float32"] if has_dtype and not named else command


def start_and_kill(command: list, folder: Path, moment: Callable[[], bool]) -> None:
    """Start a stage in `folder`, and kill -9 it as soon as `moment()` is true."""
    import kills

    assert kills.kill_when(kills.Forked(list(map(str, command)), folder), moment), "ended before it could be killed"


def in_two_processes(folder: Path, script: str | Path, *words) -> str:
    """What the two processes of a stage print, one after the other. They talk over gloo, with the variables that
    `accelerate launch` sets for configs/accelerate/cpu_2.yaml, and are forked: a launch loads the libraries thrice."""
    import kills

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    group |= {"CUDA_VISIBLE_DEVICES": "-1", "ACCELERATE_MIXED_PRECISION": "no", "TRL_EXPERIMENTAL_SILENCE": "1"}
    command, processes = stage_command(script, *words), []
    for rank in ("0", "1"):
        more = {**group, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(kills.Forked(command, folder, said=f"said_{rank}.txt", more=more))
    codes, said = [process.wait(300) for process in processes], [process.text() for process in processes]
    assert codes == [0, 0], "\n".join(said)
    return "\n".join(said)


def load_script(number: str):
    """The module of a stage, "20" or "20_train_sft.py", in this process."""
    path = next(SCRIPTS.glob(f"{number[:2]}_*.py"))
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


@pytest.fixture
def run_stage(tmp_path):
    """run_stage("20_train_sft.py", "--max-length", 64): the real command, from a folder outside the repo.

    `check=True` fails the test where the exit code is not 0, and shows what the stage printed.
    """

    def run(
        script: str | Path, *args, env: dict | None = None, check: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess:
        done = warm.run(
            stage_command(script, *args),
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SCRIPTS), **(env or {})},
            timeout=timeout,
        )
        assert not check or done.returncode == 0, (
            f"{script} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    return run


def moved_base(folder: Path) -> Path:
    """A copy of the embedded base in `folder`, whose upper layers are moved: a model that writes otherwise."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(ROOT / "data" / "tiny_qwen3", folder)
    weights, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    last = max(int(name.split(".")[2]) for name in weights if ".layers." in name)
    for name, value in weights.items():
        if f".layers.{last}.mlp" in name or f".layers.{last - 1}.mlp" in name:
            rows, columns = (torch.randn(size, generator=draw) for size in value.shape)
            weights[name] = value + 0.05 * torch.outer(rows, columns).to(value.dtype)  # of rank 1, as an adapter is
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "run.json").unlink()
    return folder


def page_data_of(page: str) -> dict:
    """What the script of stage 72's page reads."""
    return json.loads(re.search(r'(?s)<script type="application/json" id="data">(.*?)</script>', page)[1])


def page_texts(page: str) -> list[tuple[str, str, str]]:
    """(prompt id, run, text) of every text on stage 72's page."""
    data = page_data_of(page)
    return [
        (item["id"], data["runs"][run], "".join(part if isinstance(part, str) else part[0] for part in parts))
        for item in data["items"]
        for run, parts, *_ in item["cards"]
    ]
