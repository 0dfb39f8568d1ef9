"""Checkpoints of a pretraining run: folders step-00000400 with a model that --init takes, the optimizer state and the
counts.

Safetensors and JSON, no pickle. A checkpoint carries the identity of its run (settings and input hashes): another run
refuses it.

    python scripts/common/pretraining/checkpoints.py CHECKPOINT TARGET

writes a checkpoint again in a third of its size, for carrying it elsewhere: weights and Muon's momentum in bfloat16,
without AdamW's moments, which are 20 steps old at most (betas .9 and .95). --init takes it like the other one.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.jsonl import read_json, write_json
from common.settings import UserError, show_path

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first. A folder is renamed once it is complete, and renamed again before it is
    deleted."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")


def identity_of(record: dict, ignore: tuple[str, ...]) -> dict:
    """What makes a run the run it is, from its record: the settings that are not in `ignore`, and the hashes of its
    inputs."""
    settings = {name: value for name, value in record["settings"].items() if name not in ignore}
    return {"settings": settings, "inputs": {name: about["sha256"] for name, about in record["inputs"].items()}}


def newest_of(folder: Path, identity: dict) -> Path | None:
    """The newest checkpoint in `folder`, None without one. Raises UserError where it is of another run."""
    saved = checkpoints_in(folder)
    if not saved:
        return None
    theirs = read_json(saved[-1] / STATE_FILE)["identity"]
    for part in ("settings", "inputs"):
        for name in sorted({*identity[part], *theirs[part]}):
            before, now = theirs[part].get(name), identity[part].get(name)
            if before != now:
                raise UserError(
                    f"{show_path(saved[-1])} is the checkpoint of another run ({name}: {before} -> {now}); "
                    "fix: name another --output-dir, or start from it with --init"
                )
    return saved[-1]


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizers: list[torch.optim.Optimizer],
    state: dict,
    keep: int,
) -> None:
    """Write step-N, then delete all but the newest `keep` and the last one before the decay. Raises UserError for
    weights that are not finite."""
    from safetensors.torch import save_file

    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise UserError(f"step {state['step']}: {name} is not finite; {_not_finite_fix(folder)}")
    target = folder / f"step-{state['step']:08d}"
    partial = target.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    tensors = {
        f"{key}/{name}": value.contiguous()
        for name, parameter in parameters.items()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, partial / OPTIMIZER_FILE)
    write_json(partial / STATE_FILE, state)
    partial.replace(target)

    saved = checkpoints_in(folder)
    before_decay = [path for path in saved if not read_json(path / STATE_FILE)["decaying"]]
    for path in saved[:-keep]:
        if path not in before_decay[-1:]:
            shutil.rmtree(path.replace(path.with_suffix(".tmp")))


def load_state(folder: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> dict | None:
    """The counts of the checkpoint `folder`, its optimizer state put into `optimizers`; None where it is a model and no
    more."""
    from safetensors.torch import load_file

    if not (folder / STATE_FILE).exists():
        return None
    parameters = dict(model.named_parameters())
    owners = {
        param: optimizer for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]
    }
    for label, value in load_file(folder / OPTIMIZER_FILE).items():
        key, name = label.split("/", 1)
        device = "cpu" if key == "step" else model.device
        owners[parameters[name]].state[parameters[name]][key] = value.float().to(device)
    return read_json(folder / STATE_FILE)


def cut_log(log: Path, step: int) -> None:
    """Drop what a killed run logged after its newest checkpoint, half a line included: those steps are made again."""
    if not log.exists():
        return
    text = log.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    partial = log.with_suffix(".tmp")
    partial.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8")
    partial.replace(log)


def require_finite(loss: float, step: int, folder: Path) -> None:
    if not math.isfinite(loss):
        raise UserError(f"step {step}: the loss is {loss}; {_not_finite_fix(folder)}")


def _not_finite_fix(folder: Path) -> str:
    saved = checkpoints_in(folder)
    kept = f"--init {show_path(saved[-1])}, another --output-dir and " if saved else ""
    return f"nothing of it is saved; fix: {kept}a lower --lr"


def compact(source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    if not (source / STATE_FILE).exists():
        raise UserError(f"{source}: no {STATE_FILE}, so no checkpoint; fix: name a folder step-N")
    shutil.copytree(source, target)
    for name in ("model.safetensors", OPTIMIZER_FILE):
        tensors = {
            key: value.to(torch.bfloat16)
            for key, value in load_file(source / name).items()
            if not key.startswith(("exp_avg", "step/"))
        }
        save_file(tensors, target / name, metadata={"format": "pt"})


if __name__ == "__main__":
    compact(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"written: {sys.argv[2]}")
