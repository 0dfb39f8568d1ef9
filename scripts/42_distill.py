"""Distillation with LoRA: a student learns the next-token distributions of a teacher that has the same tokenizer.

Both read the same texts: those of the rows, or what the student writes itself to the prompts (--own-share), where it
is told what the teacher would have done at each of its own steps. The loss at a token is a divergence of the two
distributions (--mix); evaluations measure it on the answers of the validation rows.

Reads   processed_data/{task}/sft_train.jsonl, sft_val.jsonl (stages 10-17); two models
Writes  checkpoints/{task}/distilled: adapter, tokenizer, learning_curve.png, log_history.json, TensorBoard logs,
        run.json
Run     python scripts/42_distill.py --teacher checkpoints/poems/grpo_merged
        python scripts/42_distill.py --task mine --teacher Qwen/Qwen3-4B --model Qwen/Qwen3-0.6B --lr 1e-4

Loss: Agarwal et al. 2024, arXiv 2306.13649 (GKD), equation 1 and algorithm 1, with trl's trainer; there a step is on
the student's texts as a whole, or on the rows' as a whole, and so it is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from common.long_rows import LongRowsPolicy
from common.settings import Limit, UserError, read_settings, resolve_model, settings_errors, unused
from common.training.options import ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Settings(ChatSettings):
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "checkpoints/{task}/sft_merged"
    """the student: a folder or a hub id"""
    teacher: str = "checkpoints/{task}/grpo_merged"
    """a folder or a hub id, of the same tokenizer; read only"""
    train_file: Path = Path("processed_data/{task}/sft_train.jsonl")
    """prompts and answers to learn on"""
    val_file: Path | None = Path("processed_data/{task}/sft_val.jsonl")
    """rows that decide when to stop; None = train without"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    max_length: int = 512
    """tokens, prompt and answer"""
    long_rows: LongRowsPolicy = "refuse"
    """rows over max_length: refuse, drop, or cut at whole turns"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""

    # --- distillation
    mix: Annotated[float, Limit(high=1)] = 0.0
    """0 = KL(teacher || student), 1 = KL(student || teacher), between them a Jensen-Shannon divergence"""
    own_share: Annotated[float, Limit(high=1)] = 0.5
    """of the steps in which the student writes the answers itself; the others take those of the rows"""
    max_new_tokens: int = 96
    """of an answer that the student writes"""

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
    lr: float = 1e-3
    """peak; cosine to 0"""
    warmup_share: float = 0.03
    """of all steps"""
    weight_decay: float = 0.0
    """AdamW's, on the adapter"""
    batch_size: int = 32
    """rows in a micro-batch"""
    accumulation: int = 2
    """micro-batches per optimizer step"""
    dtype: str = "auto"
    """auto, float32, bfloat16; of both models"""

    # --- watching
    eval_steps: int = 20
    """steps between evaluations and checkpoints"""
    eval_rows: int = 256
    """validation rows used, 0 = all"""
    patience: int = 4
    """evaluations without a smaller divergence before stopping, 0 = never"""
    probe_count: int = 64
    """samples drawn at each evaluation to see whether they stop; four times as many at the end"""
    probe_tokens: int = 96
    """new tokens given to each sample"""
    report_to: str = "tensorboard"
    """any reporter of transformers, or none"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/distilled")
    """adapter and run record"""
    seed: int = 42
    """of data order, LoRA initialisation and samples"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""

    def clashes(self):
        yield from super().clashes()
        if not self.own_share:
            yield from unused(self, "with --own-share 0: the student writes nothing", "max_new_tokens")


def check_teacher(
    settings: Settings, teacher: str, student: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> None:
    """Raises UserError where the teacher cuts texts into other tokens than the student, or reads fewer of them."""
    from common.generation import render_prompt
    from common.models import load_tokenizer, model_config, require_context

    other = load_tokenizer(teacher)
    texts = [render_prompt(tokenizer, row["prompt"]) + row["completion"][-1]["content"] for row in rows[:256]]
    one_vocabulary = tokenizer.get_vocab() == other.get_vocab()
    ids, others = (cut(texts, add_special_tokens=False)["input_ids"] for cut in (tokenizer, other))
    if not one_vocabulary or ids != others:
        raise UserError(
            f"--teacher {settings.teacher}: another tokenizer than the student's, so their distributions are of "
            "different tokens; fix: a teacher and a student of one family"
        )
    sizes = [model_config(model).get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--teacher {settings.teacher}: its head has {sizes[1]} words, the student's {sizes[0]}; "
            "fix: models of one vocabulary size"
        )
    for path in (student, teacher):
        require_context(path, settings.max_length + settings.max_new_tokens, "--max-length and --max-new-tokens:")
    if other.chat_template != tokenizer.chat_template:
        print("notice: the teacher has another chat template; both models read the student's")


def answer_columns(rows: list[dict], tokenizer: PreTrainedTokenizerBase, enable_thinking: bool):
    """The rows as the trainer takes them: prompts, and the tokens of the answers with their eos."""
    from common.conversations import written_answer
    from common.training.trl_cpu import prompt_rows

    turns = [(row["prompt"] + row["completion"], enable_thinking, row.get("tools")) for row in rows]
    texts = [written_answer(tokenizer, *row) + tokenizer.eos_token for row in turns]
    answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return prompt_rows(rows, enable_thinking).add_column("answer_ids", answers)


def main(settings: Settings) -> None:
    from trl import DistillationConfig

    from common.conversations import answer_rows
    from common.model_files import check_model
    from common.models import load_model
    from common.runs import begin_run, set_seed
    from common.training import arguments

    # before an earlier run's files are touched
    teacher_path = check_model(resolve_model(settings.teacher, settings.task))
    model_path, tokenizer, inputs = arguments.check_inputs(settings, "sft")
    train, val, long = arguments.read_rows(settings, "sft", tokenizer)
    train, val = ([part for row in rows for part in answer_rows(row)] for rows in (train, val))
    check_teacher(settings, teacher_path, model_path, tokenizer, [*train, *val])
    config = arguments.trainer_arguments(
        DistillationConfig,
        settings,
        rows=len(train),
        beta=settings.mix,
        max_completion_length=settings.max_new_tokens,
        chat_template_kwargs={"enable_thinking": settings.enable_thinking},
        logging_steps=5,
    )
    lora = arguments.lora_config(settings, model_path)
    with begin_run(settings.output_dir, settings, inputs | {"teacher": teacher_path}, "42_distill") as run:
        from common.likelihood import mean_nll
        from common.training.trl_cpu import LeanDistillationTrainer
        from common.training.turn_tokens import train_token_rows

        set_seed(settings.seed)
        model = arguments.load_trained(settings, model_path, tokenizer)
        teacher = load_model(teacher_path, tokenizer, settings.dtype).eval()
        train_token_rows(lora, model, tokenizer, settings.train_tokens)
        print(f"{len(train)} training rows, {len(val)} validation rows, {model.dtype} on {model.device}")
        shown = (tokenizer, val or arguments.evaluated(train, settings), settings.enable_thinking, settings.max_length)
        with settings_errors(settings):
            trainer = LeanDistillationTrainer(
                model=model,
                teacher_model=teacher,
                args=config,
                own_share=settings.own_share,
                train_dataset=answer_columns(train, tokenizer, settings.enable_thinking),
                eval_dataset=answer_columns(val, tokenizer, settings.enable_thinking) if val else None,
                processing_class=tokenizer,
                peft_config=lora,
            )
        arguments.watch_stops(trainer, tokenizer, val, settings)
        nll = {"teacher_nll": mean_nll(teacher, *shown), "base_nll": mean_nll(trainer.model, *shown)}
        log = arguments.fit(trainer, settings, run, long_rows=long)

        arguments.save_trained(trainer, settings)
        arguments.save_log(log, settings, run)
        nll |= {"nll": mean_nll(trainer.model, *shown)}
        print("NLL per character of the answers: teacher {:.3f}, student {:.3f}, now {:.3f} nats".format(*nll.values()))
        arguments.finish_trained(run, trainer, tokenizer, shown[1], settings, **nll)


if __name__ == "__main__":
    main(read_settings(Settings))
