"""Supervised fine-tuning with LoRA: the model learns to answer as the completions do, and to stop.

Loss on the answer and its eos only. Rows are grouped by length into micro-batches of equal cost, so that little is padding; there is
no gradient checkpointing unless asked; weights are bfloat16 where the hardware multiplies in it. After a kill the same command goes
on from the newest whole checkpoint.

Reads   processed_data/{task}/sft_train.jsonl, sft_val.jsonl (stages 10-17)
Writes  checkpoints/{task}/sft: adapter, tokenizer, learning_curve.png, log_history.json, TensorBoard logs, run.json
Run     python scripts/20_train_sft.py
        python scripts/20_train_sft.py --model Qwen/Qwen3-0.6B --lora-r 8 --lora-alpha 32 --lr 2e-4 --batch-size 4 --accumulation 8
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.settings import UserError, read_settings, resolve_model, show_path
from common.training.loss_masks import RowStyle, row_dataset


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "data/tiny_qwen3"
    """base model: a folder or a hub id"""
    train_file: Path = Path("processed_data/{task}/sft_train.jsonl")
    """rows to learn from"""
    val_file: Path = Path("processed_data/{task}/sft_val.jsonl")
    """rows that decide when to stop"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    max_length: int = 512
    """tokens, prompt and answer; a row that is longer loses its end, and stage 19 says so"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""
    row_style: RowStyle = "prompt"
    """who renders rows (docs/SFT.md); messages trains every answer of a conversation"""
    packing: bool = False
    """rows share sequences of max_length tokens, unseen by each other; batch_size counts those"""

    # --- LoRA
    lora_r: int = 64
    """rank"""
    lora_alpha: int = 128
    """the update is scaled by alpha / r"""
    lora_dropout: float = 0.0
    """on the input of the update"""
    lora_targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """layers adapted"""

    # --- optimisation
    epochs: float = 1.0
    """passes over the training rows"""
    max_steps: int = -1
    """optimizer steps, -1 = by epochs"""
    lr: float = 2e-3
    """peak; cosine to 0"""
    warmup_share: float = 0.03
    """of all steps"""
    weight_decay: float = 0.0
    """AdamW's, on the adapter"""
    batch_size: int = 32
    """rows in a micro-batch, on average: long rows come in smaller ones"""
    accumulation: int = 2
    """micro-batches per optimizer step"""
    dtype: str = "auto"
    """auto, float32, bfloat16"""
    device_map: str = ""
    """auto = spread one model over all GPUs, in a single process; empty = one device a process"""
    gradient_checkpointing: bool = False
    """saves memory, costs about a third of the speed"""

    # --- watching
    eval_steps: int = 100
    """steps between evaluations and checkpoints"""
    eval_rows: int = 512
    """validation rows used, 0 = all"""
    patience: int = 4
    """evaluations without a better loss before stopping, 0 = never"""
    probe_count: int = 64
    """samples drawn at each evaluation to see whether they stop; four times as many at the end"""
    probe_tokens: int = 96
    """new tokens given to each sample"""
    report_to: str = "tensorboard"
    """any reporter of transformers, or none"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/sft")
    """adapter and run record"""
    seed: int = 42
    """of data order, LoRA initialisation and samples"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


def main(settings: Settings) -> None:
    from common.jsonl import read_jsonl, write_json
    from common.models import load_model, load_tokenizer, marks_answers, newest_checkpoint, require_context
    from common.preflight.checks import require_clean_files
    from common.runs import begin_run, set_seed

    model_path = resolve_model(settings.model, settings.task)
    tokenizer = load_tokenizer(model_path)
    require_context(model_path, settings.max_length)
    # before an earlier run's files are touched
    require_clean_files(settings, tokenizer, "sft", settings.train_file, settings.val_file)
    if settings.row_style == "messages" and not marks_answers(tokenizer):
        raise UserError(
            f"--row-style messages: the chat template of {settings.model} does not mark its answers; "
            "fix: write {% generation %} marks into chat_template.jinja, or --row-style prompt"
        )
    inputs = {"model": model_path, "train_file": settings.train_file, "val_file": settings.val_file}
    with begin_run(
        settings.output_dir, settings, inputs, settings.overwrite, "20_train_sft", ignore=("report_to",)
    ) as run:
        from peft import LoraConfig
        from transformers import EarlyStoppingCallback
        from trl import SFTConfig

        from common.evaluation.plots import plot_learning_curve
        from common.likelihood import mean_nll
        from common.training.probes import StopProbe, stop_rate
        from common.training.trl_cpu import LeanSFTTrainer

        set_seed(settings.seed)
        train, val = read_jsonl(settings.train_file, "sft"), read_jsonl(settings.val_file, "sft")
        val = val[: settings.eval_rows or None]
        model = load_model(model_path, tokenizer, settings.dtype, device_map=settings.device_map)
        print(f"{len(train)} training rows, {len(val)} validation rows, {model.dtype} on {model.device}")

        config = SFTConfig(
            output_dir=str(settings.output_dir),
            max_length=settings.max_length,
            completion_only_loss=True,
            # the answer up to its eos, without what the template writes behind it; needs a template that trl knows or that has marks
            assistant_only_loss=settings.row_style in ("prompt", "messages") and marks_answers(tokenizer),
            packing=settings.packing,
            eval_packing=False,  # the same validation loss whether or not training rows are packed
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
            eval_steps=settings.eval_steps,
            save_steps=settings.eval_steps,
            save_total_limit=2,
            load_best_model_at_end=True,
            restore_callback_states_from_checkpoint=True,  # a resumed run remembers how long it has been patient
            metric_for_best_model="eval_loss",
            logging_steps=10,
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
        trainer = LeanSFTTrainer(
            model=model,
            args=config,
            train_dataset=row_dataset(train, settings.row_style, tokenizer, settings.enable_thinking),
            eval_dataset=row_dataset(val, settings.row_style, tokenizer, settings.enable_thinking),
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
        with trainer.model.disable_adapter():
            before = mean_nll(trainer.model, tokenizer, val, settings.enable_thinking)
        after = mean_nll(trainer.model, tokenizer, val, settings.enable_thinking)
        losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        stopped, samples = stop_rate(trainer.model, tokenizer, val, 4 * max(settings.probe_count, 1), *probe)
        print(
            f"validation loss {losses[0]:.4f} -> {min(losses):.4f}; {stopped:.1%} of {len(samples)} final samples stopped"
        )
        print(f"NLL per character of the validation answers: base {before:.3f}, now {after:.3f} nats")
        run.figure("val_nll_base", before)
        run.figure("val_nll", after)
        run.figure("steps", trainer.state.global_step)
        run.figure("train_loss", next((entry["loss"] for entry in reversed(log) if "loss" in entry), None))
        run.figure("eval_loss", min(losses))
        run.figure("stopped", stopped)
        run.figure("samples", samples[:2])
        folder = show_path(settings.output_dir)
        run.finish(
            f"python scripts/22_merge_adapter.py --task {settings.task} --adapter {folder} --output-dir {folder}_merged"
        )


if __name__ == "__main__":
    main(read_settings(Settings))
