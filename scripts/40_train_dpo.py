"""Direct preference optimisation with LoRA: the model learns to prefer the chosen answer of a pair to the rejected one.

The reference is the same model with the adapter switched off, so no second copy is in memory. Logs hold the log-probabilities of chosen and
rejected answers and their margin; where both have fallen below the reference, which widens the margin by unlearning, a warning
says so.

Reads   processed_data/{task}/pref_train.jsonl, pref_val.jsonl (stages 10-17), or pref_onpolicy_*.jsonl (stage 33)
Writes  checkpoints/{task}/dpo: adapter, tokenizer, learning_curve.png, log_history.json, TensorBoard logs, run.json
Run     python scripts/40_train_dpo.py --train-file processed_data/poems/pref_onpolicy_train.jsonl \\
            --val-file processed_data/poems/pref_onpolicy_val.jsonl

Loss: Rafailov et al. 2023, arXiv 2305.18290, equation 7, and the variants that trl names. As in trl, what the template writes
behind the eos (one newline in Qwen's) counts as part of both answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.settings import read_settings, resolve_model, show_path


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "checkpoints/{task}/sft_merged"
    """where the policy starts, and the reference: a folder or a hub id"""
    train_file: Path = Path("processed_data/{task}/pref_train.jsonl")
    """pairs to learn from"""
    val_file: Path = Path("processed_data/{task}/pref_val.jsonl")
    """pairs that decide when to stop"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    max_length: int = 512
    """tokens, prompt and answer; a longer answer loses its end, and stage 19 says so"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""

    # --- preference
    beta: float = 0.1
    """strength of the pull to the reference"""
    loss_types: tuple[str, ...] = ("sigmoid",)
    """trl's names: sigmoid, ipo, hinge, apo_zero, sft, ...; several are added up"""
    loss_weights: tuple[float, ...] = (1.0,)
    """one for each of loss_types"""
    label_smoothing: float = 0.0
    """share of pairs thought to be the wrong way round (robust, exo_pair)"""

    # --- LoRA
    lora_r: int = 32
    """rank"""
    lora_alpha: int = 64
    """the update is scaled by alpha / r"""
    lora_dropout: float = 0.0
    """on the input of the update"""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """layers"""

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
    gradient_checkpointing: bool = False
    """saves memory, costs about a third of the speed"""

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


def main(settings: Settings) -> None:
    from common.jsonl import read_jsonl, write_json
    from common.models import chat_dataset, load_model, load_tokenizer, newest_checkpoint, require_context
    from common.preflight.checks import require_clean_files
    from common.runs import begin_run, set_seed

    model_path = resolve_model(settings.model, settings.task)
    tokenizer = load_tokenizer(model_path)
    require_context(model_path, settings.max_length)
    # before an earlier run's files are touched
    require_clean_files(settings, tokenizer, "preference", settings.train_file, settings.val_file)
    inputs = {"model": model_path, "train_file": settings.train_file, "val_file": settings.val_file}
    with begin_run(
        settings.output_dir, settings, inputs, settings.overwrite, "40_train_dpo", ignore=("report_to",)
    ) as run:
        from peft import LoraConfig
        from transformers import EarlyStoppingCallback
        from trl import DPOConfig

        from common.evaluation.plots import plot_learning_curve
        from common.training.probes import StopProbe, stop_rate
        from common.training.trl_cpu import LeanDPOTrainer

        set_seed(settings.seed)
        train, val = read_jsonl(settings.train_file, "preference"), read_jsonl(settings.val_file, "preference")
        val = val[: settings.eval_rows or None]
        model = load_model(model_path, tokenizer, settings.dtype)
        print(f"{len(train)} training pairs, {len(val)} validation pairs, {model.dtype} on {model.device}")

        config = DPOConfig(
            output_dir=str(settings.output_dir),
            max_length=settings.max_length,
            beta=settings.beta,
            loss_type=list(settings.loss_types),
            loss_weights=list(settings.loss_weights),
            label_smoothing=settings.label_smoothing,
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps,
            learning_rate=settings.lr,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_share,
            weight_decay=settings.weight_decay,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            train_sampling_strategy="batch_rebalance",
            bf16=str(model.dtype) == "torch.bfloat16",
            use_cpu=model.device.type == "cpu",
            gradient_checkpointing=settings.gradient_checkpointing,
            eval_strategy="steps",
            eval_on_start=True,  # the log-probabilities of the reference, to compare with
            eval_steps=settings.eval_steps,
            save_steps=settings.eval_steps,
            save_total_limit=2,
            load_best_model_at_end=True,
            restore_callback_states_from_checkpoint=True,  # a resumed run remembers how long it has been patient
            metric_for_best_model="eval_loss",
            logging_steps=5,
            report_to=settings.report_to,
            dataloader_pin_memory=model.device.type == "cuda",
            seed=settings.seed,
        )
        lora = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=list(settings.lora_targets),
            task_type="CAUSAL_LM",
        )
        probe = (settings.probe_tokens, settings.seed, settings.enable_thinking)
        callbacks = []
        if settings.patience:
            callbacks.append(EarlyStoppingCallback(settings.patience))
        trainer = LeanDPOTrainer(
            model=model,
            args=config,
            train_dataset=chat_dataset(train, ("prompt", "chosen", "rejected"), settings.enable_thinking),
            eval_dataset=chat_dataset(val, ("prompt", "chosen", "rejected"), settings.enable_thinking),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=callbacks,
        )
        if settings.probe_count:
            trainer.add_callback(StopProbe(trainer, tokenizer, val, settings.probe_count, *probe))
        trainer.train(resume_from_checkpoint=newest_checkpoint(settings.output_dir) if run.resuming else None)

        trainer.save_model(str(settings.output_dir))
        log = trainer.state.log_history
        if run.is_main:
            write_json(settings.output_dir / "log_history.json", log)
            curves = {"loss": "training loss", "eval_loss": "validation loss"}
            plot_learning_curve(log, settings.output_dir / "learning_curve.png", curves)
        evaluations = [entry for entry in log if "eval_loss" in entry]
        # the adapter kept is the best of those after the first evaluation, which is that of the untrained model
        first, best = evaluations[0], min(evaluations[1:] or evaluations, key=lambda entry: entry["eval_loss"])
        change = {side: best[f"eval_logps/{side}"] - first[f"eval_logps/{side}"] for side in ("chosen", "rejected")}
        stopped, samples = stop_rate(trainer.model, tokenizer, val, 4 * max(settings.probe_count, 1), *probe)
        print(
            f"validation loss {first['eval_loss']:.4f} -> {best['eval_loss']:.4f}, pairs ranked right "
            f"{best['eval_rewards/accuracies']:.1%}; {stopped:.1%} of {len(samples)} final samples stopped"
        )
        print(f"log-probability of an answer: chosen {change['chosen']:+.2f} nats, rejected {change['rejected']:+.2f}")
        if max(change.values()) < 0:
            print(
                "warning: chosen and rejected answers both became less likely; fix: a larger --beta, a lower --lr, "
                "or --loss-types sigmoid sft --loss-weights 1 0.1"
            )
        run.figure("steps", trainer.state.global_step)
        run.figure("eval_loss", best["eval_loss"])
        run.figure("accuracy", best["eval_rewards/accuracies"])
        run.figure("margin", best["eval_rewards/margins"])
        run.figure("chosen_logps_change", change["chosen"])
        run.figure("rejected_logps_change", change["rejected"])
        run.figure("stopped", stopped)
        run.figure("samples", samples[:2])
        folder = show_path(settings.output_dir)
        run.finish(
            f"python scripts/22_merge_adapter.py --task {settings.task} --adapter {folder} --output-dir {folder}_merged"
        )


if __name__ == "__main__":
    main(read_settings(Settings))
