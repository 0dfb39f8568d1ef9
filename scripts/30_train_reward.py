"""Scalar reward model from pairs: the chosen answer of a pair shall score above the rejected one.

LoRA with the score head trained in full, or all weights (--lora-r 0). The merged model stands at the folder's root and
the adapter beside it, so that plain AutoModelForSequenceClassification loads the folder with the trained head; an
adapter alone would get a fresh one.

Reads   processed_data/{task}/pref_train.jsonl, pref_val.jsonl (stages 10-17, 33)
Writes  checkpoints/{task}/reward: merged model, tokenizer, adapter/, learning_curve.png, log_history.json, run.json
Run     python scripts/30_train_reward.py
        python scripts/30_train_reward.py --model Qwen/Qwen3-0.6B --lora-r 16 --lora-alpha 32 --lr 1e-4 \\
            --batch-size 4 --accumulation 8

Loss: Bradley-Terry, as in Stiennon et al. 2020, arXiv 2009.01325, section 3.4; --center adds the penalty of Eisenstein
et al. 2023, arXiv 2312.09244, on the sum of both scores, so that scores of different prompts have one zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from common.long_rows import LongRowsPolicy
from common.settings import Limit, changed, next_command, read_settings, settings_errors
from common.training.options import TrainerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Settings(TrainerSettings):
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "checkpoints/{task}/sft_merged"
    """body of the reward model: a folder or a hub id"""
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
    center: float = 0.01
    """weight of (score chosen + score rejected)^2; 0 = off"""

    # --- LoRA (further settings: common/training/options.py)
    lora_r: Annotated[int, Limit()] = 32
    """rank; 0 = train all weights"""
    lora_alpha: int = 64
    """the update is scaled by alpha / r"""

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


def token_rows(tokenizer: PreTrainedTokenizerBase, pairs: list[dict], settings: Settings):
    """Pairs as the trainer reads them: chosen_ids and rejected_ids, the same text that render_conversation gives to a
    finished model."""
    from datasets import Dataset

    from common.training.classifiers import render_conversation

    rows = []
    for pair in pairs:
        texts = {}
        for side in ("chosen", "rejected"):
            turns = [*pair["prompt"], *pair[side]]
            view = settings.enable_thinking, pair.get("tools")
            texts[side] = render_conversation(tokenizer, turns[:-1], turns[-1], *view)
        ids = {f"{side}_ids": tokenizer(text, add_special_tokens=False)["input_ids"] for side, text in texts.items()}
        if max(map(len, ids.values())) <= settings.max_length:
            rows.append(ids)
    if len(rows) < len(pairs):
        print(f"notice: {len(pairs) - len(rows)} pairs are longer than {settings.max_length} tokens: left out")
    return Dataset.from_list(rows)


def main(settings: Settings) -> None:
    from trl import RewardConfig

    from common.models import pick_device, require_whole_weights, resolve_dtype
    from common.runs import begin_run, set_seed
    from common.training import arguments

    require_whole_weights()
    # before an earlier run's files are touched
    model_path, tokenizer, inputs = arguments.check_inputs(settings, "preference", "reward base")
    train, val, long = arguments.read_rows(settings, "preference", tokenizer)
    config = arguments.trainer_arguments(
        RewardConfig,
        settings,
        rows=len(train),
        max_length=settings.max_length,
        center_rewards_coefficient=settings.center or None,
        logging_steps=5,
    )
    lora = arguments.lora_config(settings, model_path, "SEQ_CLS", ("score",))
    with begin_run(settings.output_dir, settings, inputs, "30_train_reward") as run:
        from trl import RewardTrainer

        from common.training.classifiers import load_classifier, logits_of, new_classifier

        set_seed(settings.seed)
        how = resolve_dtype(arguments.trained_dtype(settings)), settings.quantize, settings.attn_implementation
        model = new_classifier(model_path, tokenizer, *how, num_labels=1).to(pick_device())
        print(f"{len(train)} training pairs, {len(val)} validation pairs, {model.dtype} on {model.device}")
        with settings_errors(settings):
            trainer = RewardTrainer(
                model=model,
                args=config,
                train_dataset=token_rows(tokenizer, train, settings),
                eval_dataset=token_rows(tokenizer, val, settings) if val else None,
                processing_class=tokenizer,
                peft_config=lora,
            )
        log = arguments.fit(trainer, settings, run, long_rows=long)

        if not run.is_main:
            return  # one process saves and reports
        arguments.save_merged(trainer, tokenizer, settings, model_path)
        arguments.save_log(log, settings, run)
        # the folder as anyone would load it scores the validation pairs, or without them those that it has learned from
        saved, _ = load_classifier(str(settings.output_dir), settings.dtype, num_labels=1)
        sides = [
            row[f"{side}_ids"]
            for row in trainer.eval_dataset or trainer.train_dataset
            for side in ("chosen", "rejected")
        ]
        scores = logits_of(saved, tokenizer, [tokenizer.decode(ids) for ids in sides], settings.max_length)[:, 0]
        scores = scores.view(-1, 2)  # [pairs, (chosen, rejected)]
        accuracy = (scores[:, 0] > scores[:, 1]).float().mean().item()
        print(f"the saved model ranks {accuracy:.1%} of {len(scores)} pairs right")
        run.figure("accuracy", accuracy)
        run.figure("mean_margin", (scores[:, 0] - scores[:, 1]).mean().item())
        arguments.tell_trackers(trainer, run)
        files = changed(settings, "train_file", "val_file", "max_length", "enable_thinking")
        run.finish(next_command("32_evaluate_reward", task=settings.task, model=settings.output_dir, **files))


if __name__ == "__main__":
    main(read_settings(Settings))
