"""The same fine-tuning as stage 20 with nothing but transformers' Trainer: rows become tokens and labels in this file,
by hand.

Made for reading: `diff scripts/20_train_sft.py scripts/21_train_sft_plain.py` shows what trl does for you. On
single-turn rows both train the same tokens (tests/stages/test_sft_ways.py), docs/TRAINING.md compares them. Of a
conversation the last answer is trained.

Reads   processed_data/{task}/sft_train.jsonl, sft_val.jsonl (stages 10-17)
Writes  checkpoints/{task}/sft_plain: adapter, tokenizer, learning_curve.png, log_history.json, run.json
Run     python scripts/21_train_sft_plain.py
        python scripts/21_train_sft_plain.py --task chat --model Qwen/Qwen3-0.6B --lr 2e-4 --batch-size 4 \\
            --accumulation 8
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from common.conversations import written_answer
from common.generation import render_prompt
from common.long_rows import LongRowsPolicy
from common.settings import Limit, read_settings, settings_errors
from common.training.options import ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that the loss leaves out


@dataclass
class Settings(ChatSettings):
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "data/tiny_qwen3"
    """base model: a folder or a hub id"""
    train_file: Path = Path("processed_data/{task}/sft_train.jsonl")
    """rows to learn from"""
    val_file: Path | None = Path("processed_data/{task}/sft_val.jsonl")
    """rows that show what was learned; None = train without"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    max_length: int = 512
    """tokens, prompt and answer; a row that is longer loses its end, and stage 19 says so"""
    long_rows: LongRowsPolicy = "refuse"
    """rows over max_length: refuse, drop, or cut at whole turns"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""

    # --- LoRA (further settings: common/training/options.py)
    lora_r: Annotated[int, Limit()] = 64
    """rank; 0 = train all weights"""
    lora_alpha: int = 128
    """the update is scaled by alpha / r"""

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

    # --- watching
    eval_steps: int = 100
    """steps between evaluations and checkpoints"""
    eval_rows: int = 512
    """validation rows used, 0 = all"""
    probe_count: int = 64
    """a quarter of the samples that are drawn at the end to see whether they stop"""
    probe_tokens: int = 96
    """new tokens given to each sample"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/sft_plain")
    """adapter and run record"""
    seed: int = 42
    """of LoRA initialisation and samples; the order of rows is batch_rebalance's own, always the same"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


def encode(
    row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int, enable_thinking: bool
) -> dict[str, list[int]]:
    """One row as {"input_ids", "labels"}, both [tokens]: the prompt without loss, the answer and one eos with it.

    The prompt is exactly what the model will be given when it writes: the template's text up to the start of an answer.
    """
    turns = row["prompt"] + row["completion"]
    view = enable_thinking, row.get("tools")
    prompt = render_prompt(tokenizer, turns[:-1], *view)
    # no special tokens: the template has written its own
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = written_answer(tokenizer, turns, *view)
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    # labels are at the places of their tokens: the model itself compares the logits at t with the label at t + 1
    return {
        "input_ids": (prompt_ids + answer_ids)[:max_length],
        "labels": ([IGNORED] * len(prompt_ids) + answer_ids)[:max_length],
    }


def collate(examples: list[dict], pad_token_id: int) -> dict:
    """Examples of different lengths as tensors [rows, longest], padded on the right.

    Padding is known by its place, never by its token: labels[input_ids == pad] = -100, as many recipes have it, hides
    every eos from the loss where pad and eos are one token, and such a model never learns to stop
    (benchmarks/pad_eos_trap.py).
    """
    import torch

    longest = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([example[key] + [value] * (longest - len(example[key])) for example in examples])

    mask = [[1] * len(example["input_ids"]) + [0] * (longest - len(example["input_ids"])) for example in examples]
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": torch.tensor(mask),
        "labels": padded("labels", IGNORED),
    }


def main(settings: Settings) -> None:
    from transformers import TrainingArguments

    from common.runs import begin_run, set_seed
    from common.training import arguments

    # before an earlier run's files are touched
    model_path, tokenizer, inputs = arguments.check_inputs(settings, "sft")
    train, val, long = arguments.read_rows(settings, "sft", tokenizer)
    config = arguments.trainer_arguments(
        TrainingArguments,
        settings,
        rows=len(train),
        train_sampling_strategy="batch_rebalance",
        logging_steps=10,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
    )
    lora = arguments.lora_config(settings, model_path)
    with begin_run(settings.output_dir, settings, inputs, "21_train_sft_plain") as run:
        from functools import partial

        from common.likelihood import mean_nll
        from common.training.loss_masks import count_trained, trained_sentence
        from common.training.trl_cpu import LeanTrainer
        from common.training.turn_tokens import train_token_rows

        examples, held_out = (
            [encode(row, tokenizer, settings.max_length, settings.enable_thinking) for row in rows]
            for rows in (train, val)
        )
        counts = count_trained(train, "template", {"labels": [example["labels"] for example in examples]})
        model = arguments.load_trained(settings, model_path, tokenizer)
        train_token_rows(lora, model, tokenizer, settings.train_tokens)
        print(f"{len(train)} training rows, {model.dtype} on {model.device}")
        print(trained_sentence(counts))

        set_seed(settings.seed)  # here, because the adapter starts from random numbers
        with settings_errors(settings):
            trainer = LeanTrainer(
                model=arguments.with_adapter(model, lora, settings),
                args=config,
                data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
                train_dataset=examples,
                eval_dataset=held_out or None,
                processing_class=tokenizer,
            )
        log = arguments.fit(trainer, settings, run, chance=math.log(model.config.vocab_size), long_rows=long)

        arguments.save_trained(trainer, settings)
        arguments.save_log(log, settings, run)
        shown, name = (val, "val") if val else (train[: settings.eval_rows or None], "train")
        after = mean_nll(trainer.model, tokenizer, shown, settings.enable_thinking)
        print(f"NLL per character of the {name} answers: {after:.3f} nats")
        figures = {**counts, f"{name}_nll": after}
        arguments.finish_trained(run, trainer, tokenizer, shown, settings, **figures)


if __name__ == "__main__":
    main(read_settings(Settings))
