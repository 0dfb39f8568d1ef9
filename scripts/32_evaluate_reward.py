"""Report card of a reward model or a classifier: what it knows beyond the surface of the texts.

A reward model (one label, stage 30) is judged on preference pairs: accuracy with 95 % interval, per kind of rejected
answer, against two baselines fitted on the training pairs (length; bag of characters + logistic regression, neither
sees the prompt), paired; correlation of score and length; calibration of sigmoid(margin), as Bradley and Terry's model
means it; ranking real > sampled > corrupted within a prompt. A classifier (several labels, stage 31) is judged on
labelled texts against the majority class and TF-IDF + logistic regression, the rest alike. The card says in words when
a baseline does as well, and when there are too few pairs to claim anything.

Reads   checkpoints/{task}/reward (stage 30), processed_data/{task}/pref_{train,val}.jsonl; a generation file of stage
        60
Writes  results/{task}/reward_card.md, .json (every figure, every pair's score), .png, .run.json
Run     python scripts/32_evaluate_reward.py
        python scripts/32_evaluate_reward.py --generations results/poems/samples/val.jsonl --overwrite
        python scripts/32_evaluate_reward.py --task styles --model checkpoints/styles/classifier --train-file TEXTS \\
            --val-file TEXTS
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.evaluation import reward_card
from common.evaluation.reward_card import Judged
from common.settings import UserError, changed, next_command, read_settings, resolve_model, show_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: fills {task} in the paths"""
    model: str = "checkpoints/{task}/reward"
    """scalar reward model or classifier with its head, folder or hub id"""
    train_file: Path = Path("processed_data/{task}/pref_train.jsonl")
    """what the baselines are fitted on"""
    val_file: Path = Path("processed_data/{task}/pref_val.jsonl")
    """what is judged: pairs, or labelled texts"""
    generations: Path | None = None
    """samples on the prompts of val_file (stage 60), for the ranking; None = without"""
    group_by: tuple[str, ...] = ("kind", "source")
    """keys of meta: each of their values gets a row"""

    # --- scoring
    max_length: int = 512
    """tokens; a longer text loses its beginning, and is counted"""
    token_budget: int = 8192
    """padded tokens a batch"""
    dtype: str = "auto"
    """of the weights: auto, float32, bfloat16"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""

    # --- card
    bootstrap: int = 2000
    """resamples behind each interval"""
    wide: float = 0.2
    """width of an interval above which the card claims nothing but a clear win"""
    examples: int = 5
    """worst mistakes shown"""

    # --- run
    output: Path = Path("results/{task}/reward_card")
    """path of the card without its ending"""
    seed: int = 42
    """of the resampling"""
    overwrite: bool = False
    """replace what an earlier run left at output"""


def read_inputs(settings: Settings, model: PreTrainedModel) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows for the baselines, rows to judge, samples for the ranking. What they must look like follows from the
    model."""
    from common.jsonl import read_jsonl

    if settings.train_file == settings.val_file:
        raise UserError("--train-file is --val-file, so baselines would be judged on what they saw; fix: two files")
    if model.config.num_labels == 1:
        samples = read_jsonl(settings.generations, "generation") if settings.generations else []
        return read_jsonl(settings.train_file, "preference"), read_jsonl(settings.val_file, "preference"), samples
    if settings.generations:
        raise UserError("--generations is for a reward model, this is a classifier; fix: leave it out")
    files = []
    for path in (settings.train_file, settings.val_file):
        files.append(read_jsonl(path, "style"))
        for number, row in enumerate(files[-1], start=1):
            names = class_names(model)
            row["class"] = row["label"] if row["label"] in names else row["label_english"]
            if row["class"] not in names:
                raise UserError(f"{path}: row {number}: no class {row['label']}; fix: one of {', '.join(names)}")
    return *files, []


def class_names(model: PreTrainedModel) -> list[str]:
    return [str(model.config.id2label[index]) for index in range(model.config.num_labels)]


def logits_by_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], settings: Settings, notes: list[str]
) -> dict[str, list[float]]:
    """text -> its logits. Equal texts are scored once, so that they tie."""
    from common.training.classifiers import logits_of

    unique = list(dict.fromkeys(texts))
    logits = logits_of(model, tokenizer, unique, settings.max_length, settings.token_budget).tolist()
    lengths = [len(ids) for ids in tokenizer(unique, add_special_tokens=False)["input_ids"]]
    if cut := sum(length > settings.max_length for length in lengths):
        notes.append(
            f"{cut} of {len(unique)} texts are longer than {settings.max_length} tokens (the longest {max(lengths)}) "
            "and were scored without their beginning: raise --max-length if the model can read more."
        )
    return dict(zip(unique, logits, strict=True))


def judge_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[dict],
    val: list[dict],
    samples: list[dict],
    settings: Settings,
) -> Judged:
    from common.conversations import turn_text
    from common.evaluation.baselines import bag_of_characters_baseline, correctness, length_baseline
    from common.training.classifiers import render_conversation

    def render(row: dict, answer: dict | str) -> str:
        return render_conversation(tokenizer, row["prompt"], answer, settings.enable_thinking, row.get("tools"))

    def answers(rows: list[dict]) -> list[tuple[str, str]]:
        return [tuple("\n".join(map(turn_text, row[side])) for side in ("chosen", "rejected")) for row in rows]

    notes = []
    usable = [row for row in samples if row["reference"] and row["reference"] != row["completion"]]
    if len(usable) < len(samples):
        notes.append(f"{len(samples) - len(usable)} samples have no golden text, or equal it: not in the ranking.")
    texts = {side: [render(row, row[side][0]) for row in val] for side in ("chosen", "rejected")}
    for side, key in (("real", "reference"), ("sampled", "completion")):
        texts[side] = [render(row, row[key]) for row in usable]
    logits = logits_by_text(model, tokenizer, [text for side in texts.values() for text in side], settings, notes)
    scores = {side: [logits[text][0] for text in side_texts] for side, side_texts in texts.items() if side_texts}
    margins = [chosen - rejected for chosen, rejected in zip(scores["chosen"], scores["rejected"], strict=True)]
    if ties := margins.count(0):
        notes.append(f"{ties} pairs have equal scores on both sides.")

    pairs, train_pairs = answers(val), answers(train)
    names = reward_card.name_groups([row.get("meta", {}) for row in val], settings.group_by, notes)
    prompts, asked = ([json.dumps(row["prompt"], ensure_ascii=False) for row in rows] for rows in (val, usable))
    lengths = [[float(len(text)) for text in side] for side in zip(*pairs, strict=True)]
    judged = Judged(
        noun="pairs",
        clusters=prompts,
        groups=reward_card.group_items(names),
        correct={
            "model": correctness(margins),
            "length": correctness(length_baseline(train_pairs, pairs)),
            "bag of characters": correctness(bag_of_characters_baseline(train_pairs, pairs)),
        },
        confidences=[1 / (1 + math.exp(-abs(margin))) for margin in margins],
        chance=0.5,
        lengths={
            "score of an answer": (lengths[0] + lengths[1], scores["chosen"] + scores["rejected"]),
            "margin, with the difference in length": ([a - b for a, b in zip(*lengths, strict=True)], margins),
        },
        scores=scores,
        items=[
            {"row": row, "group": ", ".join(own), "margin": margin, "texts": {"chosen": chosen, "rejected": rejected}}
            for row, (own, margin, (chosen, rejected)) in enumerate(zip(names, margins, pairs, strict=True), start=1)
        ],
        notes=notes,
    )
    if usable:
        sides = {"real": (asked, scores["real"]), "sampled": (asked, scores["sampled"])}
        sides["rejected"] = (prompts, scores["rejected"])
        judged.tables["Ranking"], unproven = reward_card.ranking(sides, settings.bootstrap, settings.seed)
        notes.append(f"Ranking, not shown to hold more often than by chance: {', '.join(unproven) or 'none'}.")
        if not set(asked) & set(prompts):
            notes.append("Samples and pairs share no prompt: the ranking lacks the rejected answers.")
    else:
        notes.append("No samples: real > sampled > rejected is not measured; --generations names a file of stage 60.")
    return judged


def judge_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: list[dict], val: list[dict], settings: Settings
) -> Judged:
    import torch

    notes: list[str] = []
    val_texts, train_texts = ([(row["input"], row["class"]) for row in rows] for rows in (val, train))
    logits = logits_by_text(model, tokenizer, [text for text, _ in val_texts], settings, notes)
    probabilities = torch.tensor([logits[text] for text, _ in val_texts]).softmax(-1).tolist()  # [texts, classes]
    judged = reward_card.judge_classes(probabilities, class_names(model), val_texts, train_texts)
    judged.notes += notes
    return judged


def main(settings: Settings) -> None:
    from common.jsonl import write_bytes, write_json
    from common.runs import begin_run
    from common.training.classifiers import load_classifier

    path = resolve_model(settings.model, settings.task)
    model, tokenizer = load_classifier(path, settings.dtype)
    is_reward = model.config.num_labels == 1
    train, val, samples = read_inputs(settings, model)

    stem = settings.output.name.removesuffix(".md")
    card, data, image = (settings.output.with_name(stem + ending) for ending in (".md", ".json", ".png"))
    inputs = {"model": path, "train_file": settings.train_file, "val_file": settings.val_file}
    inputs |= {"generations": settings.generations}
    files = dict(ignore=("output", "token_budget"), also=(data, image, image.with_suffix(".csv")))
    with begin_run(card, settings, inputs, "32_evaluate_reward", resumable=False, **files) as run:
        given = model, tokenizer, train, val
        judged = judge_pairs(*given, samples, settings) if is_reward else judge_texts(*given, settings)
        figures = reward_card.measure(judged, settings.bootstrap, settings.seed, settings.wide)
        reward_card.plot(judged, figures, image)
        title = f"Report card of {show_path(path)} on {show_path(settings.val_file)}"
        write_bytes(card, reward_card.markdown(title, judged, figures, image.name, settings.examples).encode())
        write_json(data, {**figures, "tables": judged.tables, "notes": judged.notes, "items": judged.items})
        for name, values in figures["groups"].items():
            print(f"{name}: {values['verdict']}")
        run.figure(judged.noun, len(judged.items))
        run.figure("groups", figures["groups"])
        run.figure("calibration_error", figures["calibration"]["error"])
        run.figure("length_correlation", figures["length_correlation"])
        run.figure("verdict", reward_card.headline(figures["groups"]))
        print(f"card: {card}")
        if is_reward:
            files = changed(settings, "train_file", "val_file", "max_length")
            run.finish(next_command("40_train_dpo", task=settings.task, **files))
        else:
            run.finish(next_command("61_classify_style", model=settings.model, text="回答：我不知道。"))


if __name__ == "__main__":
    main(read_settings(Settings))
