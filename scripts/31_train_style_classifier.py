"""Train a dialogue style classifier: which of the styles in --labels-file does an answer have?

Full fine-tuning of a causal model with a fresh head on its last token; --lora-r trains an adapter instead and merges
it, so that the folder loads with plain transformers either way. The head and the labels are checked by reading the
folder back. Beside it in the report, on the same rows: the majority class, and TF-IDF + logistic regression on the
whole text and on the answer alone. Weights are trained in float32; bfloat16 is used in the multiplications where the
hardware has it.

Reads   --train-file, --val-file (stage 12; a JSON array or JSONL of labelled rows), --labels-file
Writes  checkpoints/{task}/classifier: model.safetensors, config.json with id2label, tokenizer, label_mapping.json,
        metrics.json, confusion.png, reliability.png, learning_curve.png, log_history.json, adapter/ with --lora-r,
        run.json
Run     python scripts/31_train_style_classifier.py --lr 5e-4 --epochs 4 --batch-size 16
        python scripts/31_train_style_classifier.py --model Qwen/Qwen2.5-0.5B \\
            --train-file data/styles/training_data.json \\
            --val-file None --demo-inference

The flags of the classifier's earlier recipe work as well: --model_name_or_path, --validation_file, --num_train_epochs,
--learning_rate, --per_device_train_batch_size, --per_device_eval_batch_size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from common.settings import UserError, next_command, read_settings, resolve_model, settings_errors, unused
from common.training.options import AdapterSettings

if TYPE_CHECKING:
    from transformers import EvalPrediction


@dataclass
class Settings(AdapterSettings):
    # --- what
    task: str = "styles"
    """names the folders below"""
    model: Annotated[str, arg(aliases=("--model-name-or-path",))] = "data/tiny_qwen3"
    """base model, folder or hub id"""
    train_file: Path = Path("processed_data/{task}/style_train.jsonl")
    """labelled rows"""
    val_file: Annotated[Path | None, arg(aliases=("--validation-file",))] = Path(
        "processed_data/{task}/style_val.jsonl"
    )
    """None = 15 % of the questions of train_file"""
    labels_file: Path = Path("data/styles/labels.json")
    """labels in the order of their ids"""
    max_length: int = 512
    """tokens; a longer text loses its beginning, and is counted"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""

    # --- optimisation
    epochs: Annotated[float, arg(aliases=("--num-train-epochs",))] = 3.0
    """passes over the training rows; the best by macro-F1 on validation is kept"""
    lr: Annotated[float, arg(aliases=("--learning-rate",))] = 2e-5
    """AdamW's peak; linear to 0. The embedded base, small as it is, wants about 5e-4"""
    batch_size: Annotated[int, arg(aliases=("--per-device-train-batch-size",))] = 4
    """rows per step and device"""
    eval_batch_size: Annotated[int, arg(aliases=("--per-device-eval-batch-size",))] = 8
    """rows per evaluation batch and device"""
    weight_decay: float = 0.01
    """AdamW's"""
    warmup_share: float = 0.1
    """of all steps"""
    lora_r: int = 0
    """rank, 0 = full fine-tuning"""
    lora_alpha: int = 0
    """the update is scaled by alpha / r; 0 = twice the rank"""
    lora_dropout: float = 0.0
    """on the input of the update"""
    dtype: str = "auto"
    """of the multiplications: auto, float32, bfloat16"""

    # --- loss
    class_weights: bool = False
    """rows weigh by the inverse of their label's frequency"""
    label_smoothing: float = 0.0
    """share of the target spread over all labels"""
    teacher: str = ""
    """larger classifier with the same labels to distil from; empty = none"""
    teacher_share: float = 0.5
    """of the loss: KL to the teacher (Hinton et al. 2015); the rest is cross-entropy"""
    temperature: float = 2.0
    """softens teacher and student in the KL"""

    # --- run
    demo_inference: bool = False
    """print the styles of five new answers at the end"""
    output_dir: Path = Path("checkpoints/{task}/classifier")
    """model and report"""
    seed: int = 42
    """of the head, the data order and the resampling"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""

    def clashes(self):
        yield from super().clashes()
        if not self.teacher:
            yield from unused(self, "without --teacher", "teacher_share", "temperature")


def main(settings: Settings) -> None:
    from transformers import TrainingArguments

    from common.jsonl import write_json
    from common.models import check_model, load_tokenizer, require_context, require_launcher, require_whole_weights
    from common.preflight.checks import check_rows, require_clean
    from common.runs import begin_run, set_seed
    from common.training import arguments
    from common.training.classifiers import classifier_text, load_classifier, logits_of, make_loss, new_classifier
    from tasks import styles
    from tasks.styles import metrics as style_metrics

    require_whole_weights()
    require_launcher()
    labels = styles.read_labels(settings.labels_file)  # all of this before an earlier run's files are touched
    train, val = styles.read_split(settings.train_file, settings.val_file, labels)
    names = [label["label"] for label in labels]
    model_path = check_model(resolve_model(settings.model, settings.task))
    teacher = resolve_model(settings.teacher, settings.task) if settings.teacher else None
    tokenizer = load_tokenizer(model_path)
    require_context(model_path, settings.max_length)
    files = settings.train_file, settings.val_file
    require_clean(check_rows(*files, "style", tokenizer, settings.max_length, allow=settings.allow))
    if teacher:
        larger, its_tokenizer = load_classifier(teacher, settings.dtype, len(names))
        if (theirs := [larger.config.id2label[index] for index in range(len(names))]) != names:
            raise UserError(f"{teacher} has other labels: {', '.join(theirs)}; fix: train it with this --labels-file")
    inputs = {"model": model_path, "train_file": settings.train_file, "val_file": settings.val_file}
    inputs |= {"labels_file": settings.labels_file, "teacher": teacher}
    config = arguments.trainer_arguments(
        TrainingArguments,
        settings,
        rows=len(train),
        per_device_eval_batch_size=settings.eval_batch_size,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        # the loss is a mean over rows; transformers would multiply it by the number of processes
        average_tokens_across_devices=False,
        eval_strategy="epoch",
        eval_on_start=True,
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_f1_macro",
        logging_steps=10,
        report_to="none",
    )
    lora = arguments.lora_config(settings, model_path, "SEQ_CLS") if settings.lora_r else None
    with begin_run(settings.output_dir, settings, inputs, "31_train_style_classifier") as run:
        import torch
        from datasets import Dataset
        from sklearn.metrics import f1_score
        from transformers import DataCollatorWithPadding, Trainer

        set_seed(settings.seed)
        sides = {"train": train, "val": val}
        targets = {side: [[names.index(row["label"])] for row in rows] for side, rows in sides.items()}
        if teacher:
            for side, rows in sides.items():
                logits = logits_of(larger, its_tokenizer, [row["input"] for row in rows], settings.max_length).tolist()
                targets[side] = [[*label, *soft] for label, soft in zip(targets[side], logits, strict=True)]
            del larger

        def dataset(side: str) -> Dataset:
            ids = tokenizer([row["input"] for row in sides[side]], add_special_tokens=False)["input_ids"]
            if cut := sum(len(row) > settings.max_length for row in ids):
                print(
                    f"notice: {cut} {side} texts have more than {settings.max_length} tokens and lose their beginning"
                )
            rows = zip((row[-settings.max_length :] for row in ids), targets[side], strict=True)
            return Dataset.from_list([{"input_ids": row, "labels": target} for row, target in rows])

        labels_of = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        how = torch.float32, settings.quantize, settings.attn_implementation
        model = new_classifier(model_path, tokenizer, *how, **labels_of)
        if lora:
            from peft import get_peft_model

            with settings_errors(settings):
                model = get_peft_model(model, lora)
        counts = Counter(row["label"] for row in train)
        print(f"{len(train)} training rows {dict(counts)}, {len(val)} validation rows")
        weights = None
        if settings.class_weights:
            weights = torch.tensor([len(train) / len(names) / counts[name] for name in names])
        loss = make_loss(weights, settings.label_smoothing, settings.teacher_share, settings.temperature)

        def compute_metrics(prediction: EvalPrediction) -> dict:
            true, said = prediction.label_ids[:, 0].astype(int), prediction.predictions.argmax(-1)
            averages = {f"f1_{average}": f1_score(true, said, average=average) for average in ("macro", "weighted")}
            return {"accuracy": float((true == said).mean()), **averages}

        with settings_errors(settings):
            trainer = Trainer(
                model=model,
                args=config,
                train_dataset=dataset("train"),
                eval_dataset=dataset("val"),
                processing_class=tokenizer,
                data_collator=DataCollatorWithPadding(tokenizer),
                compute_loss_func=loss,
                compute_metrics=compute_metrics,
            )
        log = arguments.fit(trainer, settings, run)

        if not run.is_main:
            return  # one process saves and reports
        ids = {name: index for index, name in enumerate(names)}
        mapping = {"id_to_label": {str(index): name for name, index in ids.items()}, "label_to_id": ids}
        arguments.save_merged(trainer, tokenizer, settings, model_path, mapping)
        arguments.save_log(log, settings, run, eval_f1_macro="validation macro-F1")
        del model, trainer

        # --- the report, of the folder as it was saved
        classifier, tokenizer = load_classifier(str(settings.output_dir), settings.dtype, len(names))
        chances = logits_of(classifier, tokenizer, [row["input"] for row in val], settings.max_length).softmax(-1)
        report = style_metrics.compare_with_baselines(labels, train, val, chances.tolist(), settings.seed)
        write_json(settings.output_dir / "metrics.json", report)
        style_metrics.plot_report(report, chances.tolist(), labels, settings.output_dir)
        print(style_metrics.report_table(report))
        if settings.demo_inference:
            demo = [classifier_text(*pair) for pair in styles.DEMO]
            shown = logits_of(classifier, tokenizer, demo, settings.max_length).softmax(-1)
            for text, row in zip(demo, shown, strict=True):
                print(f"{names[row.argmax()]} {row.max():.3f}  {text!r}")
        for name in ("eval_accuracy", "eval_f1_macro", "eval_f1_weighted", "eval_per_class_f1"):
            run.figure(name, report[name])
        example = classifier_text(*styles.DEMO[0])
        run.finish(next_command("61_classify_style", model=settings.output_dir, text=example))


if __name__ == "__main__":
    main(read_settings(Settings))
