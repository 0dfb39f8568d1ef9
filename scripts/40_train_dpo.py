"""Direct preference optimisation with LoRA: the model learns to prefer the chosen answer of a pair to the rejected one.

The reference is the same model with the adapter switched off, so no second copy is in memory. Logs hold the
log-probabilities of chosen and rejected answers and their margin; where both have fallen below the reference, which
widens the margin by unlearning, a warning says so.

Reads   processed_data/{task}/pref_train.jsonl, pref_val.jsonl (stages 10-17), or pref_onpolicy_*.jsonl (stage 33)
Writes  checkpoints/{task}/dpo: adapter, tokenizer, learning_curve.png, log_history.json, TensorBoard logs, run.json
Run     python scripts/40_train_dpo.py --train-file processed_data/poems/pref_onpolicy_train.jsonl \\
            --val-file processed_data/poems/pref_onpolicy_val.jsonl

Loss: Rafailov et al. 2023, arXiv 2305.18290, equation 7, the variants that trl names, and SimPO and ORPO, which need
no reference (docs/TRAINING.md lists them). As in trl, what the template writes behind the eos (one newline in Qwen's)
counts as part of both answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from common.long_rows import LongRowsPolicy
from common.settings import Limit, default_settings, read_settings, settings_errors, unused
from common.training.options import ChatSettings

if TYPE_CHECKING:
    from trl import DPOTrainer

LOSSES = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft"
REFERENCE_FREE = ("simpo", "orpo")
LossType = Literal[*LOSSES.split(), "sigmoid_norm", *REFERENCE_FREE]
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # the losses that read label_smoothing


PAIR = ("prompt", "chosen", "rejected")


@dataclass
class Settings(ChatSettings):
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "checkpoints/{task}/sft_merged"
    """where the policy starts, and the reference: a folder or a hub id"""
    train_file: Path = Path("processed_data/{task}/pref_train.jsonl")
    """pairs to learn from"""
    val_file: Path | None = Path("processed_data/{task}/pref_val.jsonl")
    """pairs that decide when to stop; None = train without"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    max_length: int = 512
    """tokens, prompt and answer; what becomes of longer rows: long_rows"""
    long_rows: LongRowsPolicy = "refuse"
    """rows over max_length: refuse, drop, or cut at whole turns"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""

    # --- preference
    beta: Annotated[float, Limit(above=0)] = 0.1
    """strength of the KL penalty: larger stays closer to the reference; 2 or more for simpo"""
    loss_types: tuple[LossType, ...] = ("sigmoid",)
    """trl's names, simpo or orpo; several are added up"""
    loss_weights: tuple[float, ...] = (1.0,)
    """one for each of loss_types"""
    label_smoothing: float = 0.0
    """share of pairs thought to be the wrong way round (exo_pair, robust, aot, aot_unpaired)"""
    simpo_gamma: Annotated[float, Limit()] = 0.5
    """target margin of simpo"""

    # --- LoRA (further settings: common/training/options.py)
    lora_r: Annotated[int, Limit()] = 32
    """rank; 0 = train all weights"""
    lora_alpha: int = 64
    """the update is scaled by alpha / r"""

    # --- optimisation
    epochs: float = 1.0
    """passes over the training pairs"""
    max_steps: int = -1
    """optimizer steps, -1 = by epochs"""
    lr: float = 5e-4
    """peak; cosine to 0"""
    warmup_share: float = 0.1
    """of all steps"""
    weight_decay: float = 0.0
    """AdamW's, on the adapter"""
    batch_size: int = 16
    """pairs in a micro-batch, on average: long pairs come in smaller ones"""
    accumulation: int = 2
    """micro-batches per optimizer step"""
    dtype: str = "auto"
    """auto, float32, bfloat16"""

    # --- watching
    eval_steps: int = 20
    """steps between evaluations and checkpoints"""
    eval_rows: int = 256
    """validation pairs used, 0 = all"""
    patience: int = 4
    """evaluations without a better loss before stopping, 0 = never"""
    probe_count: int = 64
    """samples drawn at each evaluation to see whether they stop; four times as many at the end"""
    probe_tokens: int = 96
    """new tokens given to each sample"""
    report_to: str = "tensorboard"
    """any reporter of transformers, or none"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/dpo")
    """adapter and run record"""
    seed: int = 42
    """of data order, LoRA initialisation and samples"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""

    @property
    def has_reference(self) -> bool:
        """The base, the adapter switched off."""
        return not set(self.loss_types) & set(REFERENCE_FREE)

    def clashes(self):
        yield from super().clashes()
        if "simpo" not in self.loss_types:
            yield from unused(self, "without --loss-types simpo", "simpo_gamma")
        if (others := set(self.loss_types) - {*REFERENCE_FREE, "sft"}) and not self.has_reference:
            what = f"--loss-types {' '.join(self.loss_types)}: {', '.join(sorted(others))} compares with the reference"
            yield f"{what}, simpo and orpo have none", "simpo or orpo, alone or with sft"
        losses, weights, share = self.loss_types, self.loss_weights, self.label_smoothing
        if not losses or len(weights) != len(losses) or not any(weights):
            what = f"--loss-types {' '.join(losses)}, --loss-weights {' '.join(map(str, weights))}"
            yield what, "one loss at least, a weight for each, one of them above 0"
        if share and not set(losses) & set(SMOOTHED):
            what = f"--label-smoothing {share}: not read by {', '.join(losses)}"
            yield what, f"--loss-types {', '.join(SMOOTHED)}, or 0"
        if "exo_pair" in losses and not share:
            yield "--loss-types exo_pair takes a share above 0", "--label-smoothing 0.001"
        if "robust" in losses and share >= 0.5:
            yield f"--label-smoothing {share}: the robust loss divides by 1 - 2 x this", "below 0.5"


def what_was_learned(trainer: DPOTrainer, log: list[dict], held_out: bool) -> dict:
    """Figures of the kept weights on validation pairs, against the reference; without them those of the last training
    batches."""
    from common.training import arguments

    if not held_out:
        last = [entry for entry in log if "rewards/accuracies" in entry][-1]
        return {"train_accuracy": last["rewards/accuracies"], "train_margin": last["rewards/margins"]}
    first, best = arguments.first_and_kept(trainer)  # the first is that of the reference
    change = {side: best[f"eval_logps/{side}"] - first[f"eval_logps/{side}"] for side in ("chosen", "rejected")}
    print(
        f"pairs ranked right {best['eval_rewards/accuracies']:.1%}; log-probability of an answer: "
        f"chosen {change['chosen']:+.2f} nats, rejected {change['rejected']:+.2f}"
    )
    if max(change.values()) < 0:
        print(
            "warning: chosen and rejected answers both became less likely; fix: a larger --beta, a lower --lr, "
            f"or --loss-types {trainer.loss_types[0]} sft --loss-weights 1 0.1"
        )
    figures = {"accuracy": best["eval_rewards/accuracies"], "margin": best["eval_rewards/margins"]}
    return figures | {f"{side}_logps_change": nats for side, nats in change.items()}


def main(settings: Settings) -> None:
    from trl import DPOConfig

    from common.models import chat_dataset
    from common.runs import begin_run, set_seed
    from common.training import arguments

    if "simpo" in settings.loss_types and settings.beta == default_settings(settings)["beta"]:
        print(f"notice: --beta {settings.beta} is meant for dpo; simpo's is usually 2 to 10: it weighs means a token")
    # before an earlier run's files are touched
    model_path, tokenizer, inputs = arguments.check_inputs(settings, "preference")
    train, val, long = arguments.read_rows(settings, "preference", tokenizer)
    config = arguments.trainer_arguments(
        DPOConfig,
        settings,
        rows=len(train),
        max_length=settings.max_length,
        beta=settings.beta,
        loss_type=list(settings.loss_types),
        loss_weights=list(settings.loss_weights),
        label_smoothing=settings.label_smoothing,
        train_sampling_strategy="batch_rebalance",
        logging_steps=5,
    )
    lora = arguments.lora_config(settings, model_path)
    with begin_run(settings.output_dir, settings, inputs, "40_train_dpo") as run:
        from common.training.trl_cpu import LeanDPOTrainer, ReferenceFreeTrainer
        from common.training.turn_tokens import train_token_rows

        set_seed(settings.seed)
        model = arguments.load_trained(settings, model_path, tokenizer)
        train_token_rows(lora, model, tokenizer, settings.train_tokens)
        print(f"{len(train)} training pairs, {len(val)} validation pairs, {model.dtype} on {model.device}")
        kind = LeanDPOTrainer if settings.has_reference else ReferenceFreeTrainer
        with settings_errors(settings):
            trainer = kind(
                model=model,
                args=config,
                train_dataset=chat_dataset(train, PAIR, settings.enable_thinking),
                eval_dataset=chat_dataset(val, PAIR, settings.enable_thinking) if val else None,
                processing_class=tokenizer,
                peft_config=lora,
                **({} if settings.has_reference else {"gamma": settings.simpo_gamma}),
            )
        arguments.watch_stops(trainer, tokenizer, val, settings)
        log = arguments.fit(trainer, settings, run, long_rows=long)

        arguments.save_trained(trainer, settings)
        arguments.save_log(log, settings, run)
        arguments.finish_trained(
            run, trainer, tokenizer, val or train, settings, **what_was_learned(trainer, log, bool(val))
        )


if __name__ == "__main__":
    main(read_settings(Settings))
