"""What a model's or an adapter's folder holds, told from its files alone: refused here before a weight is read. No
torch.

A hub id has no folder yet and passes: common.models checks what it loads. Safetensors only: a pickle (.bin, .pt) can
run code while it is opened, so it is never opened.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from common.jsonl import read_bytes, read_json
from common.runs import describe_input
from common.settings import UserError, next_command, resolve_model, show_path

# Endings of the names that transformers gives to models which write text; "Qwen3Model" is one without its head, which
# may be tied.
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_model(model: str, wanted: str = "causal") -> str:
    """Returns `model`. Raises UserError where the folder `model` cannot be a whole model of the kind that is wanted.

    wanted: "causal", a model that writes text; "classifier", a classifier or reward model with its head; "reward base",
    what stage 30
        starts from: a causal model, or a reward model that is trained further.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    name = show_path(folder)
    has_adapter = (folder / "adapter_config.json").exists()
    if not any(folder.iterdir()):
        raise UserError(f"{name}: an empty folder; fix: run the stage that writes it, or name another model")
    if not (folder / "config.json").exists():
        if has_adapter:
            merge = next_command("22_merge_adapter", adapter=folder)
            raise UserError(
                f"{name} is an adapter without its base; fix: --adapter where the stage has it (with --model its "
                f"base), or merge it first: {merge}"
            )
        raise UserError(f"{name}: no config.json inside; fix: name a folder that save_pretrained or a stage wrote")
    if has_adapter:
        raise UserError(
            f"{name} holds a model and an adapter, config.json and adapter_config.json; fix: give each its own folder"
        )
    check_json_files(folder)
    config = _parse(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{name}/config.json names no model_type; fix: take the config.json of the model again")
    _check_kind(name, [str(kind) for kind in config.get("architectures") or []], config, wanted)
    for file in weight_files(folder):
        read_header(file)
    return model


def _check_kind(name: str, kinds: list[str], config: dict, wanted: str) -> None:
    classifies = any("SequenceClassification" in kind for kind in kinds)
    if wanted == "classifier":
        if kinds and not classifies:
            raise UserError(
                f"{name} has no trained head (it is a {kinds[0]}); fix: name a folder that stage 30 or 31 wrote"
            )
        return
    if wanted == "reward base" and classifies and len(config.get("id2label") or "ab") == 1:
        return
    if classifies:
        raise UserError(
            f"{name} is a classifier or a reward model ({kinds[0]}), not a model that writes text; "
            "fix: name the model that it was trained from"
        )
    if kinds and not any(kind.endswith(WRITERS) for kind in kinds):
        raise UserError(f"{name} is a {kinds[0]}, not a model that writes text; fix: name a causal language model")


def check_json_files(folder: Path) -> None:
    """Raises UserError with file and line where a JSON file of a model or tokenizer cannot be read."""
    names = ("*config.json", "*token*.json", "vocab.json", "*.index.json")
    for path in sorted({path for pattern in names for path in folder.glob(pattern)}):
        _parse(path)


def _parse(path: Path) -> dict:
    """A JSON object, read as leniently as transformers does: such a file may hold Infinity, or a length of 10^30."""
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{show_path(path)}:{error.lineno}: broken JSON: {error.msg}; fix: copy the file again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{show_path(path)}: cannot be read ({str(error)[:80]}); fix: copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{show_path(path)}: no JSON object; fix: copy the file again")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights. Raises UserError where there is none or where a part is
    missing."""
    name, whole, index = show_path(folder), folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        places = _parse(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{show_path(index)}: no weight_map; fix: copy the file again")
        files = [folder / str(part) for part in sorted(set(map(str, places.values())))]
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(
                f"{name}: {len(missing)} of {len(files)} parts are missing ({missing[0]}); fix: copy them too"
            )
        return files
    raise UserError(_no_weights(folder, "model.safetensors"))


def _no_weights(folder: Path, wanted: str) -> str:
    name, pickles = show_path(folder), [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    pickles = [file for file in pickles if file != "training_args.bin"]
    if pickles:
        return (
            f"{name}: {pickles[0]} is a pickle, which can run code when it is opened; "
            f"fix: save it as {wanted} (save_pretrained of transformers or peft)"
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"{name}: {ggufs[0].name} is a GGUF file; fix: convert it to {wanted}"
    return f"{name}: no {wanted} inside; fix: run the stage that writes it, or name another folder"


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype, shape). Raises UserError for a file that is cut off, or that is no safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as tensors:
            header = {}
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                part = tensors.get_slice(key)
                header[key] = part.get_dtype(), list(part.get_shape())
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{show_path(file)}: cut off or damaged ({reason}); fix: copy or write it again") from None
    if not header:
        raise UserError(f"{show_path(file)}: no tensor inside; fix: copy or write it again")
    return header


# ------------------------------------------------------------------------------------------------------- adapters


def read_adapter_config(adapter: str | Path) -> dict:
    """Raises UserError where the folder holds no adapter that a stage could have written."""
    folder = Path(adapter)
    path = folder / "adapter_config.json"
    if not path.exists() and trained_in_full(folder):
        name = show_path(folder)
        raise UserError(f"{name} was trained in full (--lora-r 0): nothing to merge; fix: --model {name}")
    if not path.exists():
        what = "is a model, not an adapter" if (folder / "config.json").exists() else "no adapter_config.json inside"
        raise UserError(f"{show_path(folder)}: {what}; fix: name the folder that stage 20, 40, 50 or 51 wrote")
    config = _parse(path)
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{show_path(path)}: peft_type is {kind}; fix: a LoRA adapter, the kind that the stages write")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise UserError(f"{show_path(path)}: rank r is {config.get('r')}; fix: the adapter_config.json of this adapter")
    return config


def trained_in_full(folder: Path) -> bool:
    """Did a training stage write this model whole?"""
    if not (folder / "config.json").exists() or not (folder / "run.json").exists():
        return False
    record = read_json(folder / "run.json")
    return (record.get("settings") or {}).get("lora_r") == 0


def adapter_base(adapter: str | Path, model: str, task: str | None = None) -> str:
    """The base to put `adapter` on: `model` where one is named, else the one that the adapter names."""
    named = model or read_adapter_config(adapter).get("base_model_name_or_path")
    if not named:
        raise UserError(f"{show_path(adapter)}: the adapter names no base; fix: --model with its base")
    return resolve_model(named, task)


def check_adapter(adapter: str | Path, model: str, wanted: str = "causal", force_base: bool = False) -> str | None:
    """Raises UserError where the adapter is not whole, of another kind, or trained on another base than `model`.

    wanted: "causal" or "classifier". The base is told by its hash in the run.json of the run that trained the adapter;
    without one by its name. Returns a notice for the stage to print and record where `force_base` lets another base
    pass, or where only the name could be compared.
    """
    folder, config = Path(adapter), read_adapter_config(adapter)
    name = show_path(folder)
    check_json_files(folder)
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(_no_weights(folder, "adapter_model.safetensors"))
    header = read_header(file)
    classifies = config.get("task_type") == "SEQ_CLS" or any(
        re.search(r"\.(score|classifier)\.", key) for key in header
    )
    if wanted == "causal" and (classifies or config.get("task_type") not in ("CAUSAL_LM", None)):
        kind = "a classifier or a reward model" if classifies else config["task_type"]
        raise UserError(
            f"{name} is the adapter of {kind}, not of a model that writes text; fix: an adapter of stage 20"
        )
    if wanted == "classifier" and config.get("task_type") != "SEQ_CLS":
        raise UserError(
            f"{name} is no classifier's adapter (task_type {config.get('task_type')}); fix: one of stage 30 or 31"
        )
    ranks = {key: shape[0] for key, (_, shape) in header.items() if key.endswith("lora_A.weight")}
    if not ranks and not any("lora_" in key for key in header):
        raise UserError(f"{name}: no LoRA weight in {file.name}; fix: name another adapter")
    wrong = next((key for key, rank in ranks.items() if rank != config["r"]), None)
    if wrong and not config.get("rank_pattern"):
        raise UserError(
            f"{name}: adapter_config.json says rank {config['r']}, {wrong} has {ranks[wrong]}; "
            "fix: the adapter_config.json that was saved with these weights"
        )
    return _check_base(folder, config, model, force_base)


def _check_base(folder: Path, config: dict, model: str, force_base: bool) -> str | None:
    name, trained_on = show_path(folder), training_base(folder)
    now = describe_input("model", model)
    if trained_on and "sha256" in trained_on and "sha256" in now:
        if trained_on["sha256"] == now["sha256"]:
            return None
        told = f"{name} was trained on {trained_on['path']} ({trained_on['sha256'][:12]}), and "
        told += f"{now['path']} ({now['sha256'][:12]}) is another model, tokenizer or template"
        return _refuse_base(told, f"--model {trained_on['path']}", force_base)
    recorded = trained_on and (trained_on.get("hub_id") or trained_on.get("path"))
    recorded = recorded or config.get("base_model_name_or_path")
    if recorded and Path(recorded).name != Path(model).name:
        told = f"{name} was trained on {recorded}, not on {show_path(model)}"
        return _refuse_base(told, f"--model {recorded}", force_base)
    if trained_on and "hub_id" in trained_on and trained_on == now:
        return None
    return f"{name}: no hash of its base is recorded, so only the base's name was compared"


def _refuse_base(told: str, fix: str, force_base: bool) -> str:
    if not force_base:
        raise UserError(f"{told}; fix: {fix}, or --force-base to go on with this one")
    return f"{told}; --force-base goes on"


def training_base(folder: Path) -> dict | None:
    """The input "model" in the run.json of the run that trained the adapter: in its folder, or above adapter/ and
    checkpoint-N/."""
    places = [folder]
    if folder.name == "adapter" or folder.name.startswith("checkpoint-"):
        places.append(folder.parent)
    for place in places:
        if (place / "run.json").exists():
            return (read_json(place / "run.json").get("inputs") or {}).get("model")
    return None
