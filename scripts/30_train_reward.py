"""Scalar reward model from pairs: the chosen answer of a pair shall score above the rejected one.

LoRA with the score head trained in full, or all weights (--lora-r 0). The merged model stands at the folder's root and the adapter beside
it, so that plain AutoModelForSequenceClassification loads the folder with the trained head; an adapter alone would get a fresh one.

Reads   processed_data/{task}/pref_train.jsonl, pref_val.jsonl (stages 10-17, 33)
Writes  checkpoints/{task}/reward: merged model, tokenizer, adapter/, learning_curve.png, log_history.json, run.json
Run     python scripts/30_train_reward.py
        python scripts/30_train_reward.py --model Qwen/Qwen3-0.6B --lora-r 16 --lora-alpha 32 --lr 1e-4 --batch-size 4 --accumulation 8

Loss: Bradley-Terry, as in Stiennon et al. 2020, arXiv 2009.01325, section 3.4; --center adds the penalty of Eisenstein et al. 2023, arXiv
2312.09244, on the sum of both scores, so that scores of different prompts have one zero.
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
    """body of the reward model: a folder or a hub id"""
    train_file: Path = Path("processed_data/{task}/pref_train.jsonl")
    """pairs to learn from"""
    val_file: Path = Path("processed_data/{task}/pref_val.jsonl")
    """pairs that decide when to stop"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    max_length: int = 512
    """tokens, prompt and answer; a longer pair is left out and counted"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""
    center: float = 0.01
    """weight of (score chosen + score rejected)^2; 0 = off"""

    # --- LoRA
    lora_r: int = 32
    """rank; 0 = train all weights"""
    lora_alpha: int = 64
    """the update is scaled by alpha / r"""
    lora_dropout: float = 0.0
    """on the input of the update"""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """layers"""

    # --- optimisation
    max_train: int = 0
    """training pairs used, the first ones; 0 = all"""
    epochs: float = 1.0
    """passes over the training pairs"""
    max_steps: int = -1
    """optimizer steps, -1 = by epochs"""
    lr: float = 1e-3
    """peak; cosine to 0"""
    warmup_share: float = 0.05
    """of all steps"""
    weight_decay: float = 0.0
    """AdamW's"""
    batch_size: int = 32
    """pairs in a micro-batch"""
    accumulation: int = 1
    """micro-batches per optimizer step"""
    dtype: str = "auto"
    """auto, float32, bfloat16"""
    gradient_checkpointing: bool = False
    """saves memory, costs about a third of the speed"""

    # --- watching
    eval_steps: int = 25
    """steps between evaluations and checkpoints"""
    eval_rows: int = 512
    """validation pairs used, 0 = all"""
    patience: int = 4
    """evaluations without a better loss before stopping, 0 = never"""
    report_to: str = "tensorboard"
    """any reporter of transformers, or none"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/reward")
    """merged model, adapter and run record"""
    seed: int = 42
    """of data order, the head and LoRA's initialisation"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


def token_rows(tokenizer, pairs: list[dict], settings: Settings):
    """Pairs as the trainer reads them: chosen_ids and rejected_ids, the same text that render_conversation gives to a finished model."""
    from datasets import Dataset

    from common.training.classifiers import render_conversation

    rows = []
    for pair in pairs:
        texts = {}
        for side in ("chosen", "rejected"):
            turns = [*pair["prompt"], *pair[side]]
            texts[side] = render_conversation(tokenizer, turns[:-1], turns[-1]["content"], settings.enable_thinking)
        ids = {f"{side}_ids": tokenizer(text, add_special_tokens=False)["input_ids"] for side, text in texts.items()}
        if max(map(len, ids.values())) <= settings.max_length:
            rows.append(ids)
    if len(rows) < len(pairs):
        print(f"notice: {len(pairs) - len(rows)} pairs are longer than {settings.max_length} tokens: left out")
    return Dataset.from_list(rows)


def main(settings: Settings) -> None:
    from common.jsonl import read_jsonl, write_json
    from common.models import (
        load_tokenizer,
        newest_checkpoint,
        pick_device,
        require_context,
        require_whole_weights,
        resolve_dtype,
    )
    from common.preflight.checks import require_clean_files
    from common.runs import begin_run, set_seed

    require_whole_weights()
    model_path = resolve_model(settings.model, settings.task)
    tokenizer = load_tokenizer(model_path)
    require_context(model_path, settings.max_length)
    # before an earlier run's files are touched
    require_clean_files(settings, tokenizer, "preference", settings.train_file, settings.val_file)
    inputs = {"model": model_path, "train_file": settings.train_file, "val_file": settings.val_file}
    with begin_run(
        settings.output_dir, settings, inputs, settings.overwrite, "30_train_reward", ignore=("report_to",)
    ) as run:
        from peft import LoraConfig
        from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback
        from trl import RewardConfig, RewardTrainer

        from common.evaluation.plots import plot_learning_curve
        from common.training.classifiers import load_classifier, logits_of

        set_seed(settings.seed)
        train = read_jsonl(settings.train_file, "preference")[: settings.max_train or None]
        val = read_jsonl(settings.val_file, "preference")[: settings.eval_rows or None]
        model = AutoModelForSequenceClassification.from_pretrained(
            model_path,
            num_labels=1,
            dtype=resolve_dtype(settings.dtype),
            pad_token_id=tokenizer.pad_token_id,  # the head reads the last token that is no padding
            use_safetensors=True,
            trust_remote_code=False,
        ).to(pick_device())
        print(f"{len(train)} training pairs, {len(val)} validation pairs, {model.dtype} on {model.device}")

        config = RewardConfig(
            output_dir=str(settings.output_dir),
            max_length=settings.max_length,
            center_rewards_coefficient=settings.center or None,
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps,
            learning_rate=settings.lr,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_share,
            weight_decay=settings.weight_decay,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
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
            modules_to_save=["score"],
            task_type="SEQ_CLS",
        )
        trainer = RewardTrainer(
            model=model,
            args=config,
            train_dataset=token_rows(tokenizer, train, settings),
            eval_dataset=token_rows(tokenizer, val, settings),
            processing_class=tokenizer,
            peft_config=lora if settings.lora_r else None,
            callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience else [],
        )
        trainer.train(resume_from_checkpoint=newest_checkpoint(settings.output_dir) if run.resuming else None)

        if not run.is_main:
            return  # one process saves and reports
        trained = trainer.accelerator.unwrap_model(trainer.model).eval()
        if settings.lora_r:
            trained.save_pretrained(settings.output_dir / "adapter")
            tokenizer.save_pretrained(settings.output_dir / "adapter")
            trained = trained.merge_and_unload(safe_merge=True)
        trained.save_pretrained(settings.output_dir)
        tokenizer.save_pretrained(settings.output_dir)
        log = trainer.state.log_history
        write_json(settings.output_dir / "log_history.json", log)
        plot_learning_curve(
            log, settings.output_dir / "learning_curve.png", {"loss": "training loss", "eval_loss": "validation loss"}
        )
        # the folder as anyone would load it scores the validation pairs
        saved, _ = load_classifier(str(settings.output_dir), settings.dtype, num_labels=1)
        texts = [
            tokenizer.decode(ids) for row in trainer.eval_dataset for ids in (row["chosen_ids"], row["rejected_ids"])
        ]
        scores = logits_of(saved, tokenizer, texts, settings.max_length)[:, 0].view(
            -1, 2
        )  # [pairs, (chosen, rejected)]
        accuracy = (scores[:, 0] > scores[:, 1]).float().mean().item()
        losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        print(
            f"validation loss {losses[0]:.4f} -> {min(losses):.4f}; the saved model ranks {accuracy:.1%} of {len(scores)} pairs right"
        )
        run.figure("steps", trainer.state.global_step)
        run.figure("eval_loss", min(losses))
        run.figure("accuracy", accuracy)
        run.figure("mean_margin", (scores[:, 0] - scores[:, 1]).mean().item())
        run.finish(
            f"python scripts/32_evaluate_reward.py --task {settings.task} --model {show_path(settings.output_dir)}"
        )


if __name__ == "__main__":
    main(read_settings(Settings))
