"""Supervised fine-tuning with LoRA: the model learns to answer as the completions do, and to stop. Or continued
pretraining, where the rows are documents ({"text": ...}).

Loss on the answer and its eos only; of documents on every token, without a template, packed. Rows are grouped by length
into micro-batches of equal cost, so that little is padding; there is no gradient checkpointing unless asked; weights
are bfloat16 where the hardware multiplies in it.
After a kill the same command goes on from the newest whole checkpoint.

Reads   processed_data/{task}/sft_train.jsonl, sft_val.jsonl (stages 10-17), or text_train.jsonl (stage 18)
Writes  checkpoints/{task}/sft: adapter (with --lora-r 0 the whole model), tokenizer, learning_curve.png,
        log_history.json, TensorBoard logs, run.json
Run     python scripts/20_train_sft.py
        python scripts/20_train_sft.py --model Qwen/Qwen3-0.6B --lora-r 8 --lora-alpha 32 --lr 2e-4 --batch-size 4 \\
            --accumulation 8
        python scripts/20_train_sft.py --task corpus --train-file processed_data/corpus/text_train.jsonl \\
            --val-file processed_data/corpus/text_val.jsonl --output-dir checkpoints/corpus/text
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common.long_rows import LongRowsPolicy
from common.settings import Limit, read_settings, settings_errors
from common.training.loss_masks import RowStyle, count_trained, row_dataset, trained_sentence
from common.training.options import ChatSettings


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
    """rows that decide when to stop; None = train without"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    max_length: int = 512
    """tokens, prompt and answer; what becomes of longer rows: long_rows"""
    long_rows: LongRowsPolicy = "refuse"
    """rows over max_length: refuse, drop, or cut at whole turns"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""
    row_style: RowStyle = "prompt"
    """who renders rows (docs/TRAINING.md); messages trains every answer of a conversation"""
    packing: bool = False
    """rows share sequences of max_length tokens, unseen by each other; batch_size counts those"""
    loss: Literal["nll", "dft"] = "nll"
    """dft weighs each token's loss by its probability: unlikely tokens are learned less"""
    neftune_alpha: float = 0.0
    """noise on the embeddings while training (NEFTune; 5 is usual), 0 = none"""

    # --- LoRA (further settings: common/training/options.py)
    lora_r: Annotated[int, Limit()] = 64
    """rank; 0 = train all weights, which takes a smaller --lr"""
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
    device_map: str = ""
    """auto = spread one model over all GPUs, in a single process; empty = one device a process"""

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
    from trl import SFTConfig

    from common.models import marks_answers
    from common.runs import begin_run, set_seed
    from common.training import arguments

    # before an earlier run's files are touched
    schema = arguments.rows_of_sft(settings)
    model_path, tokenizer, inputs = arguments.check_inputs(settings, schema)
    train, val, long = arguments.read_rows(settings, schema, tokenizer)
    datasets = [row_dataset(rows, settings.row_style, tokenizer, settings.enable_thinking) for rows in (train, val)]
    is_rendered = settings.row_style == "prompt" and "completion" in datasets[0].column_names  # by trl
    documents = arguments.document_arguments(settings, datasets[0]) if schema == "text" else {}
    config = arguments.trainer_arguments(
        SFTConfig,
        settings,
        rows=0 if settings.packing or documents else len(train),
        max_length=settings.max_length,
        loss_type=settings.loss,
        neftune_noise_alpha=settings.neftune_alpha or None,
        logging_steps=10,
        **documents
        or {
            "completion_only_loss": True,
            # the answer up to its eos, without what the template writes behind it; needs a template with marks
            "assistant_only_loss": is_rendered and marks_answers(tokenizer),
            "packing": settings.packing,
            "eval_packing": False,  # the same validation loss whether or not training rows are packed
            "train_sampling_strategy": "batch_rebalance",
        },
    )
    lora = arguments.lora_config(settings, model_path)
    with begin_run(settings.output_dir, settings, inputs, "20_train_sft") as run:
        from common.likelihood import mean_nll
        from common.training.trl_cpu import LeanSFTTrainer
        from common.training.turn_tokens import train_token_rows

        set_seed(settings.seed)
        model = arguments.load_trained(settings, model_path, tokenizer, device_map=settings.device_map)
        train_token_rows(lora, model, tokenizer, ("none",) if documents else settings.train_tokens)
        print(f"{len(train)} training rows, {len(val)} validation rows, {model.dtype} on {model.device}")
        shown, name = (val, "val") if val else (arguments.evaluated(train, settings), "train")
        view = (tokenizer, shown, settings.enable_thinking, settings.max_length)
        with settings_errors(settings):
            trainer = LeanSFTTrainer(
                model=model,
                args=config,
                train_dataset=datasets[0],
                eval_dataset=datasets[1],
                processing_class=tokenizer,
                peft_config=lora,
            )
        counts = {}
        if not documents:
            counts = count_trained(train, settings.row_style, trainer.train_dataset)
            print(trained_sentence(counts))
            arguments.watch_stops(trainer, tokenizer, val, settings)
        before = mean_nll(trainer.model, *view)  # no adapter has changed anything so far
        chance = math.log(model.config.vocab_size)
        log = arguments.fit(trainer, settings, run, chance=chance, long_rows=long, **counts)

        arguments.save_trained(trainer, settings)
        arguments.save_log(log, settings, run)
        after = mean_nll(trainer.model, *view)
        what = "documents" if documents else "answers"
        print(f"NLL per character of the {name} {what}: base {before:.3f}, now {after:.3f} nats")
        figures = {f"{name}_nll_base": before, f"{name}_nll": after}
        arguments.finish_trained(run, trainer, tokenizer, shown, settings, **figures)


if __name__ == "__main__":
    main(read_settings(Settings))
