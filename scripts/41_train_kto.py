"""KTO with LoRA: the model learns from single answers with a label, good or bad, where no pairs are at hand.

The reference is the same model with the adapter switched off. Good and bad answers weigh alike in sum: the weights are
set from their counts unless named, and printed. Logs hold the log-probabilities of good and of bad answers; where both
have fallen below the reference, a warning says so.

Reads   processed_data/{task}/kto_train.jsonl, kto_val.jsonl (stage 17, from rows with a label)
Writes  checkpoints/{task}/kto: adapter, tokenizer, learning_curve.png, log_history.json, TensorBoard logs, run.json
Run     python scripts/41_train_kto.py --task chat --model checkpoints/chat/sft_merged

Loss: Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8; the weights keep to its section 4.2 (their products
with the counts in a ratio of 1 to 4/3).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from common.long_rows import LongRowsPolicy
from common.settings import Limit, UserError, read_settings, settings_errors
from common.training.options import ChatSettings

if TYPE_CHECKING:
    from trl import KTOTrainer

LABELLED = ("prompt", "completion", "label")


@dataclass
class Settings(ChatSettings):
    has_reference = True  # the base, the adapter switched off

    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "checkpoints/{task}/sft_merged"
    """where the policy starts, and the reference: a folder or a hub id"""
    train_file: Path = Path("processed_data/{task}/kto_train.jsonl")
    """labelled answers to learn from"""
    val_file: Path | None = Path("processed_data/{task}/kto_val.jsonl")
    """labelled answers that decide when to stop; None = train without"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    max_length: int = 512
    """tokens, prompt and answer; what becomes of longer rows: long_rows"""
    long_rows: LongRowsPolicy = "refuse"
    """rows over max_length: refuse, drop, or cut at whole turns"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""

    # --- preference
    beta: float = 0.1
    """strength of the KL penalty: larger stays closer to the reference"""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """trl's names"""
    desirable_weight: float = 0.0
    """of good answers in the loss; 0 = from the counts"""
    undesirable_weight: float = 0.0
    """of bad answers in the loss; 0 = from the counts"""

    # --- LoRA (further settings: common/training/options.py)
    lora_r: Annotated[int, Limit()] = 32
    """rank; 0 = train all weights"""
    lora_alpha: int = 64
    """the update is scaled by alpha / r"""

    # --- optimisation
    epochs: float = 1.0
    """passes over the training answers"""
    max_steps: int = -1
    """optimizer steps, -1 = by epochs"""
    lr: float = 5e-4
    """peak; cosine to 0"""
    warmup_share: float = 0.1
    """of all steps"""
    weight_decay: float = 0.0
    """AdamW's, on the adapter"""
    batch_size: Annotated[int, Limit(2)] = 16
    """answers in a micro-batch: the KL is estimated from mismatched answers of the same batch"""
    accumulation: int = 2
    """micro-batches per optimizer step"""
    dtype: str = "auto"
    """auto, float32, bfloat16"""

    # --- watching
    eval_steps: int = 20
    """steps between evaluations and checkpoints"""
    eval_rows: int = 256
    """validation answers used, 0 = all"""
    patience: int = 4
    """evaluations without a better loss before stopping, 0 = never"""
    probe_count: int = 64
    """samples drawn at each evaluation to see whether they stop; four times as many at the end"""
    probe_tokens: int = 96
    """new tokens given to each sample"""
    report_to: str = "tensorboard"
    """any reporter of transformers, or none"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/kto")
    """adapter and run record"""
    seed: int = 42
    """of data order, LoRA initialisation and samples"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


SIDES = {"chosen": "good", "rejected": "bad"}  # trl's names of the two kinds


def class_weights(settings: Settings, rows: list[dict]) -> tuple[float, float]:
    """(weight of good answers, weight of bad ones): as set, else 1 for the more frequent kind and more for the rarer
    one."""
    good = sum(row["label"] for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        raise UserError(f"{settings.train_file}: {good} good and {bad} bad answers; fix: rows of both kinds")
    desirable = settings.desirable_weight or max(1.0, bad / good)
    undesirable = settings.undesirable_weight or max(1.0, good / bad)
    print(f"{good} good answers of weight {desirable:.3g}, {bad} bad ones of weight {undesirable:.3g}")
    return desirable, undesirable


def what_was_learned(trainer: KTOTrainer, log: list[dict], held_out: bool) -> dict:
    """Figures of the kept weights on validation answers, against the reference; without them those of the last training
    batches."""
    from common.training import arguments

    if not held_out:
        return {"train_margin": [entry["rewards/margins"] for entry in log if "rewards/margins" in entry][-1]}
    first, best = arguments.first_and_kept(trainer)  # the first is that of the reference
    # trl logs only the kinds that the file has
    sides = {side: name for side, name in SIDES.items() if f"eval_logps/{side}" in best}
    change = {name: best[f"eval_logps/{side}"] - first[f"eval_logps/{side}"] for side, name in sides.items()}
    shown = ", ".join(f"{name} {value:+.2f}" for name, value in change.items())
    print(f"log-probability of an answer in nats: {shown}")
    if len(change) < len(SIDES):
        print(f"notice: all validation answers are {next(iter(change))} ones: their margin cannot be measured")
        return {f"{name}_logps_change": value for name, value in change.items()} | {"kl": best["eval_kl"]}
    if max(change.values()) < 0:
        print(
            "warning: good and bad answers both became less likely; fix: a larger --beta, a lower --lr, "
            "a larger --desirable-weight"
        )
    figures = {"margin": best["eval_rewards/margins"], "kl": best["eval_kl"]}
    return figures | {f"{name}_logps_change": value for name, value in change.items()}


def main(settings: Settings) -> None:
    from trl import KTOConfig

    from common.models import chat_dataset
    from common.runs import begin_run, set_seed
    from common.training import arguments

    # before an earlier run's files are touched
    model_path, tokenizer, inputs = arguments.check_inputs(settings, "kto")
    train, val, long = arguments.read_rows(settings, "kto", tokenizer)
    desirable, undesirable = class_weights(settings, train)
    config = arguments.trainer_arguments(
        KTOConfig,
        settings,
        rows=len(train),
        least=2,
        max_length=settings.max_length,
        beta=settings.beta,
        loss_type=settings.loss_type,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        logging_steps=5,
    )
    lora = arguments.lora_config(settings, model_path)
    with begin_run(settings.output_dir, settings, inputs, "41_train_kto") as run:
        from common.training.trl_cpu import LeanKTOTrainer
        from common.training.turn_tokens import train_token_rows

        set_seed(settings.seed)
        model = arguments.load_trained(settings, model_path, tokenizer)
        train_token_rows(lora, model, tokenizer, settings.train_tokens)
        print(f"{len(train)} training answers, {len(val)} validation answers, {model.dtype} on {model.device}")
        with settings_errors(settings):
            trainer = LeanKTOTrainer(
                model=model,
                args=config,
                train_dataset=chat_dataset(train, LABELLED, settings.enable_thinking),
                eval_dataset=chat_dataset(val, LABELLED, settings.enable_thinking) if val else None,
                processing_class=tokenizer,
                peft_config=lora,
            )
        arguments.watch_stops(trainer, tokenizer, val, settings)
        weights = {"desirable_weight": desirable, "undesirable_weight": undesirable}
        log = arguments.fit(trainer, settings, run, long_rows=long, **weights)

        arguments.save_trained(trainer, settings)
        arguments.save_log(log, settings, run)
        figures = what_was_learned(trainer, log, bool(val))
        arguments.finish_trained(run, trainer, tokenizer, val or train, settings, **figures)


if __name__ == "__main__":
    main(read_settings(Settings))
