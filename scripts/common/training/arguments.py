"""What the training stages share, built from a stage's own settings: checked inputs, LoRA, the Trainer's arguments, the
run, its end.

`settings` is the dataclass at the top of a stage. A stage passes what belongs to its algorithm beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import time
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from common.settings import (
    ROOT,
    UserError,
    changed,
    default_settings,
    next_command,
    resolve_model,
    settings_errors,
    unused,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

    from common.runs import Run
    from common.training.options import AdapterSettings

MIN_STEPS = 20  # optimizer steps below which the default batch is made smaller, and a run says that they are few

# setting -> argument of transformers' Trainer, for the settings that a stage has
ARGUMENTS = {
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "gradient_checkpointing": "gradient_checkpointing",
    "liger": "use_liger_kernel",
    "report_to": "report_to",
    "seed": "seed",
}


def check_inputs(
    settings: AdapterSettings, schema: str, wanted: str = "causal"
) -> tuple[str, PreTrainedTokenizerBase, dict]:
    """(model path, tokenizer, inputs of the run record), after the checks that come before an earlier run's files are
    touched.

    wanted: the kind of model, as common.model_files.check_model names it. Raises UserError for a model that is not
    whole or of another kind, for rows that stage 19 calls errors, and where max_length is more than the model reads.
    """
    from common.model_files import check_model
    from common.models import load_tokenizer, require_context, require_launcher
    from common.preflight.checks import require_clean_files
    from common.training.turn_tokens import check_tokens

    if schema == "text" and settings.long_rows != "refuse":
        raise UserError(f"--long-rows {settings.long_rows}: documents are split, none is too long; fix: leave it out")
    require_launcher()
    model_path = check_model(resolve_model(settings.model, settings.task), wanted)
    tokenizer = load_tokenizer(model_path, documents=schema == "text")
    require_context(model_path, settings.max_length)
    check_tokens(getattr(settings, "train_tokens", ()), tokenizer)
    rows = (settings.train_file, settings.val_file)
    # rows that are dropped or cut below are no fault of the file
    told = settings if settings.long_rows == "refuse" else replace(settings, allow=(*settings.allow, "too-long"))
    require_clean_files(told, tokenizer, schema, *rows)
    return model_path, tokenizer, {"model": model_path, "train_file": rows[0], "val_file": rows[1]}


def read_rows(
    settings: AdapterSettings, schema: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict], list[dict], dict]:
    """(training rows, validation rows, what --long-rows did to each file), as many rows as max_train and eval_rows use;
    0 is all.

    Without a validation file there are no validation rows. Raises UserError where no training row is left.
    """
    from common.jsonl import read_jsonl
    from common.long_rows import fit_rows

    kept, done = {"train": [], "val": []}, {}
    for name, file in (("train", settings.train_file), ("val", settings.val_file)):
        rows = read_jsonl(file, schema) if file else []
        if settings.long_rows != "refuse" and rows:
            limits = settings.max_length, settings.long_rows, settings.enable_thinking
            rows, long = fit_rows(rows, schema, tokenizer, *limits)
            print(f"{name}: {long.sentence()}")
            done[name] = long.as_dict()
        kept[name] = rows
    if not kept["train"]:
        raise UserError(f"{settings.train_file}: no row fits; fix: --max-length, or other rows")
    if not settings.val_file:
        print("notice: no validation rows: no validation loss, no early stopping, the last weights are kept")
    return kept["train"][: getattr(settings, "max_train", 0) or None], evaluated(kept["val"], settings), done


def evaluated(rows: list[dict], settings: AdapterSettings) -> list[dict]:
    """The first eval_rows of the rows. Of documents the beginnings, all equally long, where they have more characters
    than eval_rows sequences would hold: an evaluation must not take as long as a training."""
    rows = rows[: settings.eval_rows or None]
    limit = settings.eval_rows * settings.max_length
    if not rows or "text" not in rows[0] or not limit or sum(len(row["text"]) for row in rows) <= limit:
        return rows
    limit //= len(rows)
    print(f"notice: of each of {len(rows)} documents that are evaluated the first {limit} characters count")
    return [{"text": row["text"][:limit]} for row in rows]


def rows_of_sft(settings: AdapterSettings) -> str:
    """The schema of the training file of stage 20: text for documents, else sft."""
    from common.preflight.checks import detect_schema

    if detect_schema(settings.train_file) != "text":
        return "sft"
    for what, fix in unused(settings, "on documents: no template", "row_style", "enable_thinking", "train_tokens"):
        raise UserError(f"{what}; fix: {fix}")
    return "text"


def document_arguments(settings: AdapterSettings, dataset: Dataset) -> dict:
    """Trainer arguments for documents: packed by trl into sequences of max_length, long ones split, loss on all tokens.

    On a CPU a micro-batch is one sequence, because trl makes one long sequence of a batch and the mask of that costs
    the square of its length; the rows of an optimizer step stay as they are.
    """
    import torch

    tokens = sum(map(len, dataset["input_ids"]))
    print(f"{len(dataset)} documents, {tokens} tokens, in sequences of {settings.max_length}")
    batch_size, accumulation = fit_batch(settings, -(-tokens // settings.max_length))
    found = {"packing": True, "packing_strategy": "bfd_split", "eval_packing": True, "completion_only_loss": False}
    found |= {"assistant_only_loss": False, "train_sampling_strategy": "random"}
    if not torch.cuda.is_available():
        found |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch_size * accumulation}
        found |= {"per_device_eval_batch_size": 1}
    return found


def lora_config(
    settings: AdapterSettings, model_path: str, task_type: str = "CAUSAL_LM", heads: tuple[str, ...] = ()
) -> LoraConfig | None:
    """peft's LoraConfig, None where all weights are trained (lora_r 0).

    heads: modules that a classifier trains whole. Raises UserError for a word of lora_targets or modules_to_save that
    names no part of the model.
    """
    from peft import LoraConfig

    if settings.lora_r == 0:
        return None
    variant, whole = getattr(settings, "lora_variant", "lora"), getattr(settings, "modules_to_save", ())
    check_modules(whole, model_path)
    targets = check_targets(settings.lora_targets, model_path)
    with settings_errors(settings):
        return LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha or 2 * settings.lora_r,
            lora_dropout=getattr(settings, "lora_dropout", 0.0),
            target_modules=targets,
            modules_to_save=[*heads, *whole] or None,
            ensure_weight_tying=bool(whole),  # a head that shares the embeddings' weights shares the trained ones
            use_dora=variant == "dora",
            use_rslora=variant == "rslora",
            init_lora_weights="pissa" if variant == "pissa" else True,
            task_type=task_type,
        )


def trained_dtype(settings: AdapterSettings) -> str:
    """Of the base's weights. float32 where they are changed themselves: a small step is lost in bfloat16's eight bits.

    --dtype is that of the multiplications then.
    """
    changed = settings.lora_r == 0 or settings.lora_variant == "pissa"
    return "float32" if changed else settings.dtype


def load_trained(
    settings: AdapterSettings, model_path: str, tokenizer: PreTrainedTokenizerBase, device_map: str = ""
) -> PreTrainedModel:
    """The causal model that a stage trains, or puts its adapter on."""
    from common.models import load_model

    default = default_settings(settings)["lr"]
    if settings.lora_r == 0 and settings.lr == default:
        print(f"notice: --lr {default:g} is meant for an adapter; all weights are usually trained with a tenth of it")
    how = {"quantize": settings.quantize, "attn_implementation": settings.attn_implementation}
    return load_model(model_path, tokenizer, trained_dtype(settings), device_map=device_map, **how)


def with_adapter(
    model: PreTrainedModel, lora: LoraConfig | None, settings: AdapterSettings
) -> PreTrainedModel | PeftModel:
    """For a Trainer that does not put the adapter on by itself, as trl's do."""
    from peft import get_peft_model

    from common.fused_head import use_trained_rows

    if lora is None:
        return model
    model = get_peft_model(model, lora)
    use_trained_rows(model)
    if settings.gradient_checkpointing:  # else no gradient reaches the first layer that is computed again
        model.enable_input_require_grads()
    return model


def check_modules(words: tuple[str, ...], model_path: str) -> None:
    """Raises UserError for a word of --modules-to-save that is the last part of no module's name."""
    from common.models import empty_model

    names = [name for name, _ in empty_model(model_path).named_modules() if name] if words else []
    last = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()))
    for word in words:
        if word not in last:
            near = get_close_matches(word, last, n=3, cutoff=0.5) or last
            raise UserError(f"--modules-to-save: {model_path} has no module {word}; fix: {', '.join(near)}")


def check_targets(targets: tuple[str, ...], model_path: str) -> str | list[str]:
    """`targets` as peft takes them. Each word must be the last part of a layer's name; the word all-linear stands
    alone."""
    from common.models import empty_model

    if tuple(targets) == ("all-linear",):
        return "all-linear"
    model = empty_model(model_path)
    names = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    names = [name for name in names if model.get_submodule(name).weight.dim() == 2]  # norms cannot be adapted
    last = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    for word in targets:
        if word.rsplit(".", 1)[-1] == "lm_head":
            raise UserError("--lora-targets lm_head: trl cannot train an adapter on the head; fix: leave it out")
        if not any(f".{name}".endswith(f".{word}") for name in names):
            near = get_close_matches(word, last, n=3, cutoff=0.5) or last
            raise UserError(
                f"--lora-targets: {model_path} has no layer {word}; fix: {', '.join(near)}, or all-linear alone"
            )
    if not targets:
        raise UserError(f"--lora-targets names no layer; fix: some of {', '.join(last)}, or all-linear")
    return list(targets)


def trainer_arguments(
    cls: type[TrainingArguments], settings: AdapterSettings, rows: int = 0, least: int = 1, **more
) -> TrainingArguments:
    """A Config of trl or TrainingArguments: every setting that Trainer knows, and `more` from the stage.

    rows: training rows, for the size of a batch (fit_batch); 0 keeps it as it is set. least: rows that a batch needs.
    """
    import torch

    from common.models import resolve_dtype

    if not torch.cuda.is_available() and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")  # not cpu:1, which no checkpoint can be loaded to
    batch_size, accumulation = fit_batch(settings, rows, least)
    values = {argument: getattr(settings, name) for name, argument in ARGUMENTS.items() if hasattr(settings, name)}
    values |= {
        "output_dir": str(settings.output_dir),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "cosine",
        "bf16": resolve_dtype(settings.dtype) == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,  # it would show an average where the loss is not a number
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,  # a resumed run remembers how long it has been patient
    }
    if getattr(settings, "optim", "auto") != "auto":
        values |= {"optim": settings.optim}
    eval_steps = fit_eval_steps(settings, rows, batch_size * accumulation)
    if eval_steps:
        values |= {"save_steps": eval_steps}
    if getattr(settings, "val_file", None) and hasattr(settings, "eval_rows"):
        values |= {
            "per_device_eval_batch_size": settings.batch_size,
            "eval_strategy": "steps",
            "eval_steps": eval_steps,
            "eval_on_start": True,  # what the untrained adapter does, to compare with
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        }
    with settings_errors(settings):
        return cls(**values | more)


def fit_batch(settings: AdapterSettings, rows: int, least: int = 1) -> tuple[int, int]:
    """(batch_size, accumulation): as set, or smaller where both are the defaults and `rows` would make fewer than
    MIN_STEPS steps."""
    chosen = (settings.batch_size, getattr(settings, "accumulation", 1))
    defaults = default_settings(settings)
    is_default = chosen == (defaults["batch_size"], defaults.get("accumulation", 1))
    if not is_default or not rows or getattr(settings, "max_steps", -1) > 0:
        return chosen
    step = int(rows * settings.epochs / MIN_STEPS / int(os.environ.get("WORLD_SIZE", "1")))
    if step >= chosen[0] * chosen[1]:
        return chosen
    batch_size = max(least, min(chosen[0], step))
    accumulation = max(1, step // batch_size)
    print(
        f"{rows} rows are few: --batch-size {batch_size} --accumulation {accumulation}, so that there are steps enough"
    )
    return batch_size, accumulation


def fit_eval_steps(settings: AdapterSettings, rows: int, batch: int) -> int:
    """--eval-steps as set, or a third of the run where it is the default and the run is no longer: checkpoints come
    with evaluations, and a short run that is killed would begin anew. 0 where the stage has no such setting."""
    eval_steps = getattr(settings, "eval_steps", 0)
    steps = getattr(settings, "max_steps", -1)
    if steps <= 0:
        steps = math.ceil(rows / (batch * int(os.environ.get("WORLD_SIZE", "1")))) * settings.epochs
    if not 0 < steps <= eval_steps or eval_steps != default_settings(settings)["eval_steps"]:
        return eval_steps
    return math.ceil(steps / 3)


class Ended(Exception):
    """The checkpoint is that of a run's last step: nothing is left to train."""


class Guard(TrainerCallback):
    """Ends a run whose numbers are no numbers, keeps what a resumed run needs to equal an undisturbed one, deletes
    pickles."""

    def __init__(self, settings: AdapterSettings):
        self.settings = settings

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            raise Ended

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs
    ) -> None:
        names = ("loss", "grad_norm", "eval_loss", "reward", "kl")
        require_finite({name: logs[name] for name in names if name in logs}, state.global_step, self.settings)
        return_freed_memory()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **kwargs
    ) -> None:
        if control.should_save:
            control.should_log = True  # a resumed run counts its losses from here
            trained = [value for value in model.parameters() if value.requires_grad]
            require_finite_weights(trained, state.global_step, self.settings)

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        delete_pickle(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def return_freed_memory() -> None:
    """Give memory that this process has freed back to the system. glibc keeps freed pieces; with rows of many lengths
    none of them fits the next tensor, and the process grows. Now and then: at every step it makes a step a tenth
    slower (docs/LOG.md)."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def require_finite(figures: dict, step: int, settings: AdapterSettings) -> None:
    """Raises UserError for a figure that is NaN or infinite. Call it before a checkpoint is written: those on disk stay
    good."""
    for name, value in figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            _stop(step, f"{name} is {value}", settings)


def require_finite_weights(weights: Iterable[torch.Tensor], step: int, settings: AdapterSettings) -> None:
    """Raises UserError where one of the tensors has an element that is NaN or infinite."""
    if not all(value.isfinite().all() for value in weights):
        _stop(step, "a weight is not a finite number", settings)


def _stop(step: int, reason: str, settings: AdapterSettings):
    raise UserError(
        f"step {step}: {reason}; the checkpoints from before it are kept; fix: a lower --lr (now {settings.lr:g}), "
        "--dtype float32, or the rows of this step, if it comes at the same step again"
    )


def delete_pickle(folder: Path) -> None:
    """Trainer writes its arguments as a pickle. They stand in run.json, and a pickle can run code when it is read."""
    (folder / "training_args.bin").unlink(missing_ok=True)


class Progress(ProgressCallback):
    """The bar, and one line a logging step: loss, what else shows how it goes, rate, tokens/s, time left, memory."""

    SHOWN = {"loss": "loss", "reward": "reward", "kl": "KL", "rewards/accuracies": "right", "rewards/margins": "margin"}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        counts = [tokens_of(entry) for entry in state.log_history if tokens_of(entry)]
        self.start = self.mark = time.monotonic()
        self.first_step, self.tokens = state.global_step, counts[-1] if counts else 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}")
        if "train_runtime" in logs:
            done = state.global_step - self.first_step
            self.training_bar.write(f"{done} steps in {logs['train_runtime']:.1f} s")
        if "loss" not in logs:
            return
        parts = [f"{text} {logs[name]:.4g}" for name, text in self.SHOWN.items() if name in logs]
        parts.append(f"lr {logs.get('learning_rate', 0.0):.2e}")
        now, done = time.monotonic(), state.global_step - self.first_step
        if (tokens := tokens_of(logs)) > self.tokens:
            parts.append(f"{(tokens - self.tokens) / max(now - self.mark, 1e-9):,.0f} tokens/s")
            self.mark, self.tokens = now, tokens
        left = (now - self.start) / max(done, 1) * (state.max_steps - state.global_step)
        parts += [f"{clock(left)} left", f"{memory_used()} GiB"]
        self.training_bar.write(f"step {state.global_step}/{state.max_steps}: " + ", ".join(parts))


def tokens_of(logs: dict) -> float:
    """Tokens read since the run began, as trl or transformers count them; 0 where neither does."""
    return logs.get("num_tokens") or logs.get("num_input_tokens_seen") or 0


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def memory_used() -> str:
    """Of this process in GiB: the GPU's at its highest where there is one, else main memory now."""
    import psutil
    import torch

    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return f"{used / 2**30:.1f}"


def show_progress(trainer: Trainer) -> None:
    """Readable lines in the place of the dictionaries that transformers prints."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())


def watch_stops(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, val: list[dict], settings: AdapterSettings
) -> None:
    """Every evaluation samples and shows how many answers stop (common/training/probes.py)."""
    from common.training.probes import StopProbe

    if settings.probe_count:
        probe = (settings.probe_count, settings.probe_tokens, settings.seed, settings.enable_thinking)
        trainer.add_callback(StopProbe(trainer, tokenizer, val, *probe))


def fit(trainer: Trainer, settings: AdapterSettings, run: Run, chance: float = math.inf, **figures) -> list[dict]:
    """Train, or go on from the newest checkpoint; returns the log. The best weights are loaded where the arguments say
    so.

    chance: the loss of a model that guesses, named where training does not end below it. figures: for the run record.

    Raises UserError for a run that learned nothing, before anything is saved.
    """
    from transformers import EarlyStoppingCallback

    from common.models import newest_checkpoint

    if getattr(settings, "patience", 0) and trainer.args.load_best_model_at_end:
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    trainer.add_callback(Guard(settings))
    show_progress(trainer)
    name_in_trackers(trainer, settings, run)
    prepare_weights(trainer, settings)
    args = trainer.args
    steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    args.warmup_steps = min(int(settings.warmup_share * steps), steps - 1)  # transformers rounds up: one step at rate 0
    if steps < MIN_STEPS and args.max_steps < 0:
        epochs = math.ceil(settings.epochs * MIN_STEPS / steps)
        print(
            f"notice: {steps} optimizer steps are few; fix: --epochs {epochs}, or a smaller --batch-size and "
            "--accumulation"
        )
    for name, value in figures.items():
        run.figure(name, value)
    run.figure("batch_size", args.per_device_train_batch_size)
    run.figure("accumulation", args.gradient_accumulation_steps)
    checkpoint = newest_checkpoint(settings.output_dir) if run.resuming else None
    args.eval_on_start = args.eval_on_start and checkpoint is None
    if checkpoint and hasattr(trainer, "_total_train_tokens"):  # trl 1.16 counts from 0 again
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        counts = [entry["num_tokens"] for entry in state["log_history"] if "num_tokens" in entry]
        trainer._total_train_tokens = counts[-1] if counts else 0
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Ended:
        trainer.is_in_train = False
        if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()  # transformers 5.17; as train() does at its end
    run.figure("steps", trainer.state.global_step)
    # without transformers' summary at the end, which is of one process, not of the run
    log = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    require_learned(dict(trainer.model.named_parameters()), losses, chance, getattr(settings, "rewards", ()))
    if args.load_best_model_at_end:
        first, kept = (entry["eval_loss"] for entry in first_and_kept(trainer))
        print(f"validation loss {first:.4f} -> {kept:.4f}")
        run.figure("eval_loss", kept)
    run.figure("train_loss", [entry["loss"] for entry in log if "loss" in entry][-1])
    return log


def prepare_weights(trainer: Trainer, settings: AdapterSettings) -> None:
    """What the settings of adapters ask for, before the first step: LoRA+, PiSSA's start, float32 beside 4 bits."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if getattr(settings, "quantize", "none") != "none":
        for value in model.parameters():  # trl makes them bfloat16, in which AdamW's small steps are lost
            if value.requires_grad:
                value.data = value.data.float()
    if getattr(settings, "lora_variant", "lora") == "pissa" and trainer.args.process_index == 0:
        config = model.peft_config["default"]
        config.init_lora_weights = True  # of what is saved here: loading it shall change no base
        model.save_pretrained(settings.output_dir / "pissa_start")
        config.init_lora_weights = "pissa"
    if getattr(settings, "lora_plus_ratio", 0.0):
        from peft.optimizers import create_loraplus_optimizer

        kind, words = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        words["loraplus_weight_decay"] = trainer.args.weight_decay
        words["loraplus_lr_ratio"] = settings.lora_plus_ratio
        trainer.optimizer = create_loraplus_optimizer(model, kind, **words)


def first_and_kept(trainer: Trainer) -> list[dict]:
    """The evaluations of the untrained model and of the weights that were kept."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return [entry for step in (0, trainer.state.best_global_step) for entry in evaluations if entry["step"] == step]


def require_learned(
    weights: dict, losses: list[float], chance: float = math.inf, rewards: tuple[str, ...] = ()
) -> None:
    """Raises UserError where the adapter is what it was before training, or no evaluation differs from the first.

    weights: by name. rewards: what stages 50 and 51 learn from.
    """
    fix = "fix: more steps (--epochs, a smaller --batch-size), or a larger --lr"
    if rewards:
        fix = f"fix: rewards that tell answers apart (now {' '.join(rewards)}), more --max-steps, or a larger --lr"
    matrices = [value for name, value in weights.items() if "lora_B" in name]
    if matrices and not any(value.any() for value in matrices):
        raise UserError(f"nothing was learned: every B matrix of the adapter is 0; {fix}")
    if len(losses) > 1 and len(set(losses)) == 1:
        raise UserError(f"nothing was learned: the validation loss stayed at {losses[0]:.4f}; {fix}")
    if losses and min(losses[1:] or losses) > chance - 0.05:
        print(
            f"warning: the validation loss is that of a model that guesses ({chance:.2f}); fix: a lower --lr, other "
            "rows"
        )


def save_log(log: list[dict], settings: AdapterSettings, run: Run, losses: bool = True, **curves: str) -> None:
    """log_history.json and learning_curve.png; curves: name in the log = name in the picture, beside the losses.

    A figure without a value is left out, such as the spread of rewards of which one is known: JSON knows no NaN.
    """
    from common.evaluation.plots import plot_learning_curve
    from common.jsonl import write_json

    if run.is_main:
        log = [{name: value for name, value in entry.items() if value == value} for entry in log]
        write_json(settings.output_dir / "log_history.json", log)
        curves = ({"loss": "training loss", "eval_loss": "validation loss"} if losses else {}) | curves
        plot_learning_curve(log, settings.output_dir / "learning_curve.png", curves)


def name_in_trackers(trainer: Trainer, settings: AdapterSettings, run: Run) -> None:
    """One name for a run, before and after a kill: trackio takes a name that it does not know for another run."""
    started = run.record["started"][:19].replace(":", "-")
    trainer.args.run_name = f"{settings.output_dir.name}-{started}"
    kinds = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    if "SwanLabCallback" in kinds and run.is_main:
        import swanlab

        # transformers 5.17 asks for the current run, and swanlab from .8 on raises where there is none
        if hasattr(swanlab, "has_run") and not swanlab.has_run():
            try:
                swanlab.init(project=os.environ.get("SWANLAB_PROJECT"), name=trainer.args.run_name)
            except Exception as error:  # no key, no network: a RuntimeError or one of its own
                raise UserError(
                    f"--report-to swanlab: {error}; fix: swanlab login, SWANLAB_MODE=offline, or --report-to none"
                ) from None


def tell_trackers(trainer: Trainer, run: Run) -> None:
    """The record's figures and samples to every tracker of --report-to, behind the log of the training: as eval/final_*
    numbers and one text."""
    figures = {name: value for name, value in run.record["figures"].items() if value == value}
    logs = {f"eval_final_{name}": value for name, value in figures.items() if type(value) in (int, float)}
    texts = "\n\n".join(text for text in figures.get("samples", []) if isinstance(text, str))
    for callback in trainer.callback_handler.callbacks if run.is_main else ():
        if type(callback).__module__.startswith("transformers.integrations"):
            text = texts
            if type(callback).__name__ == "SwanLabCallback":  # takes no plain string
                import swanlab

                text = swanlab.Text(texts)
            said = logs | ({"eval_final_samples": text} if texts else {})
            words = {"model": trainer.model, "processing_class": trainer.processing_class}
            callback.on_log(trainer.args, trainer.state, trainer.control, logs=said, **words)
            callback.on_train_end(trainer.args, trainer.state, trainer.control, **words)


def save_trained(trainer: Trainer, settings: AdapterSettings) -> None:
    """The adapter, or the whole model where all of it was trained, and the tokenizer. The figures that follow are of
    the model in memory: its weights are those of the file."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    trainer.save_model(str(settings.output_dir))
    delete_pickle(settings.output_dir)
    if settings.lora_r == 0:
        return
    if settings.lora_variant == "pissa":
        if trainer.args.process_index == 0:
            save_as_lora(trainer.accelerator.unwrap_model(trainer.model), settings, settings.output_dir)
        return
    if trainer.args.process_index == 0:
        sort_targets(settings.output_dir)
    if trainer.args.world_size == 1:
        saved = load_file(settings.output_dir / "adapter_model.safetensors")
        held = get_peft_model_state_dict(trainer.model)
        if saved.keys() != held.keys() or not all(torch.equal(saved[name], held[name].cpu()) for name in saved):
            raise RuntimeError("the saved adapter is not the trained one")


def sort_targets(adapter: Path) -> None:
    """peft keeps the targets as a set, which every process would write in an order of its own."""
    from common.jsonl import read_json, write_json

    path = adapter / "adapter_config.json"
    config = read_json(path)
    if isinstance(config["target_modules"], list):
        write_json(path, config | {"target_modules": sorted(config["target_modules"])})


def save_as_lora(model: PeftModel, settings: AdapterSettings, folder: Path) -> None:
    """PiSSA's adapter as an ordinary one of twice the rank, on the base as it ships: what it is now less what it began
    with (Meng et al. 2024, arXiv 2404.02948, appendix C)."""
    import shutil

    start = settings.output_dir / "pissa_start"
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start))
    shutil.rmtree(start)
    sort_targets(folder)


def save_merged(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    settings: AdapterSettings,
    model_path: str,
    mapping: dict | None = None,
) -> None:
    """A classifier with its head at the folder's root, the adapter beside it in adapter/ where there is one.

    mapping: content of label_mapping.json, for a classifier with named labels.
    """
    from common.jsonl import write_json

    model, folders = trainer.accelerator.unwrap_model(trainer.model).eval(), [settings.output_dir]
    if settings.lora_r:
        folders.append(settings.output_dir / "adapter")
        if getattr(settings, "lora_variant", "lora") == "pissa":
            save_as_lora(model, settings, folders[1])
        else:
            model.save_pretrained(folders[1])
            sort_targets(folders[1])
        if getattr(settings, "quantize", "none") != "none":  # into the base in full precision
            from common.training.classifiers import open_classifier

            model = open_classifier(model_path, str(folders[1]), tokenizer, settings.dtype)
        model = model.merge_and_unload(safe_merge=True)
    model.save_pretrained(settings.output_dir)
    for folder in folders:
        tokenizer.save_pretrained(folder)
        if mapping:
            write_json(folder / "label_mapping.json", mapping)


def finish_trained(
    run: Run,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    val: list[dict],
    settings: AdapterSettings,
    **figures,
) -> None:
    """Sample from the trained model, record `figures` and what the samples show, name the next stage."""
    from common.generation import generate_command
    from common.training.probes import stop_rate
    from common.training.turn_tokens import why_no_stop

    count = 4 * max(settings.probe_count, 1)
    probe = (settings.probe_tokens, settings.seed, settings.enable_thinking)
    stopped, samples = stop_rate(trainer.model, tokenizer, val, count, *probe)
    if "text" in val[0]:
        print(
            "going on from the beginnings of documents: "
            + " | ".join(text.replace("\n", " ")[:60] for text in samples[:2])
        )
    else:
        print(f"{stopped:.1%} of {len(samples)} final samples stopped")
        if stopped < 0.9 and (notice := why_no_stop(trainer.model, tokenizer)):
            print(notice)
        run.figure("stopped", stopped)
    for name, value in {**figures, "samples": samples[:2]}.items():
        run.figure(name, value)
    tell_trackers(trainer, run)
    folder, probe = settings.output_dir, settings.val_file or settings.train_file
    if not settings.lora_r:
        run.finish(generate_command(settings.task, probe, val[0], model=folder, **changed(settings, "enable_thinking")))
        return
    flags = {} if probe == ROOT / f"processed_data/{settings.task}/sft_val.jsonl" else {"probe_file": probe}
    merged = folder.with_name(f"{folder.name}_merged")
    run.finish(next_command("22_merge_adapter", task=settings.task, adapter=folder, **flags, output_dir=merged))
