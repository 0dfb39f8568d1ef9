"""On-policy pairs: several samples of a model for each prompt, ranked by named rewards, the best against the worst.

Rewards are those of stages 50 and 51: rules of the task, a reward model, a classifier, or a weighted mix. Ties,
near-duplicates, samples that did not stop, that a reward cannot judge or that break a rule of --require are dropped and
counted.

Reads   --generations: one file of stage 60 with --num-samples 8 or more, on training prompts
Writes  processed_data/{task}/pref_onpolicy_train.jsonl, pref_onpolicy_val.jsonl, with both scores in meta; run record
        beside them
Run     python scripts/60_generate.py --model checkpoints/poems/sft_merged \\
            --prompts-file processed_data/poems/prompts_train.jsonl \\
            --max-prompts 480 --num-samples 16 --output-file results/poems/onpolicy/sft_merged.jsonl
        python scripts/33_rank_samples.py --generations results/poems/onpolicy/sft_merged.jsonl \\
            --rewards rhyme:1 meter:1 --require form
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.settings import UserError, next_command, read_settings
from tasks.base import answer, load_task


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    generations: Path = Path("results/{task}/onpolicy/sft_merged.jsonl")
    """samples of the model to be trained"""
    rewards: tuple[str, ...] = ()
    """NAME[:WEIGHT], model=PATH[:WEIGHT], style=PATH#LABEL[:WEIGHT]; left out: DEFAULT_REWARDS of the task"""
    require: tuple[str, ...] = ()
    """rules that both sides keep: a sample that scores below 1 is left out"""
    dtype: str = "auto"
    """of reward models: auto, float32, bfloat16"""
    max_length: int = 512
    """tokens that a reward model reads of prompt and answer; of a longer text the end"""

    # --- pairs
    pairs_per_prompt: int = 2
    """best with worst, second best with second worst, ..."""
    min_margin: float = 0.05
    """least difference of the total reward, which is a weighted mean; a smaller one is a tie"""
    max_overlap: float = 0.8
    """share of character bigrams that the two sides of a pair may have in common"""
    val_share: float = 0.1
    """of the prompts, chosen by the hash of their text"""

    # --- run
    output_dir: Path = Path("processed_data/{task}")
    """the two files go here"""
    overwrite: bool = False
    """replace the pairs of an earlier run"""


def bigrams(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text) - 1)} or {text}


def overlap(first: str, second: str) -> float:
    """Jaccard index of the character bigrams, 0..1."""
    one, other = bigrams(first), bigrams(second)
    return len(one & other) / len(one | other)


def rank_prompt(rows: list[dict], settings: Settings, dropped: Counter) -> list[dict]:
    """Pairs of one prompt: rank k from the top against rank k from the bottom."""
    usable, seen = [], set()
    for row in sorted(rows, key=lambda row: (-(row["total"] if row["total"] is not None else 0.0), row["id"])):
        if row["total"] is None:
            dropped["sample that a reward cannot judge"] += 1
        elif not row["kept"]:
            dropped["sample that breaks a required rule"] += 1
        elif row["finish_reason"] != "stop":  # its eos would be made up
            dropped["sample that did not stop"] += 1
        elif not row["completion"].strip():
            dropped["empty sample"] += 1
        elif not row["completion"].replace("\n", "").isprintable():
            dropped["sample with control characters"] += 1
        elif row["completion"] in seen:
            dropped["sample that repeats another"] += 1
        else:
            seen.add(row["completion"])
            usable.append(row)
    pairs = []
    for rank in range(min(settings.pairs_per_prompt, len(usable) // 2)):
        best, worst = usable[rank], usable[-1 - rank]
        if best["total"] - worst["total"] < settings.min_margin:
            dropped["tie"] += 1
        elif overlap(best["completion"], worst["completion"]) > settings.max_overlap:
            dropped["near-duplicates"] += 1
        else:
            meta = {key: value for key, value in best["meta"].items() if key not in ("kind", "source")}
            scores = {"chosen_score": round(best["total"], 6), "rejected_score": round(worst["total"], 6)}
            meta |= {"kind": "onpolicy", **scores}
            sides = {"chosen": answer(best["completion"]), "rejected": answer(worst["completion"])}
            pairs.append({"prompt": best["prompt"], **sides, "meta": meta})
    return pairs


def main(settings: Settings) -> None:
    from common.jsonl import read_jsonl, write_jsonl
    from common.runs import begin_run
    from common.training.rewards import load_rewards, score, total

    task = load_task(settings.task)
    settings = task.fill_in(settings)
    rows = read_jsonl(settings.generations, "generation")
    prompts: dict[str, list[dict]] = {}
    for row in rows:
        prompts.setdefault(row["prompt_id"], []).append(row)
    if max(map(len, prompts.values())) < 2:
        raise UserError(
            f"{settings.generations}: one sample a prompt gives no pair; fix: stage 60 with --num-samples 16"
        )
    rewards, required = (
        load_rewards(names, task, settings.dtype, settings.max_length) if names else []
        for names in (settings.rewards, settings.require)
    )
    files = [settings.output_dir / f"pref_onpolicy_{split}.jsonl" for split in ("train", "val")]
    inputs = {"generations": settings.generations}
    with begin_run(files[0], settings, inputs, "33_rank_samples", resumable=False, also=(files[1],)) as run:
        texts = [[row[name] for row in rows] for name in ("prompt", "completion", "meta")]
        totals = total(rewards, score(rewards, *texts))
        rules = score(required, *texts).values() if required else ()
        for index, (row, value) in enumerate(zip(rows, totals, strict=True)):
            row["total"], row["kept"] = value, all(values[index] == 1 for values in rules)
        splits: dict[str, list[dict]] = {"train": [], "val": []}
        dropped: Counter = Counter()
        for samples in prompts.values():
            asked = json.dumps(samples[0]["prompt"], ensure_ascii=False)  # two rows may ask the same
            held_out = int(hashlib.sha256(asked.encode()).hexdigest(), 16) % 1000 < 1000 * settings.val_share
            splits["val" if held_out else "train"] += rank_prompt(samples, settings, dropped)
        for file, (split, pairs) in zip(files, splits.items(), strict=True):
            if not pairs:
                raise UserError(
                    f"no {split} pair is left of {len(rows)} samples: {dict(dropped)}; fix: more samples, or a smaller "
                    "--min-margin"
                )
            write_jsonl(file, pairs)
        pairs = splits["train"] + splits["val"]
        sides, lengths = {}, {}
        for side in ("chosen", "rejected"):
            sides[side] = sum(pair["meta"][f"{side}_score"] for pair in pairs) / len(pairs)
            lengths[side] = sum(len(pair[side][0]["content"]) for pair in pairs) / len(pairs)
        print(
            f"{len(rows)} samples of {len(prompts)} prompts -> {len(splits['train'])} training and "
            f"{len(splits['val'])} validation pairs"
        )
        print(f"dropped: {dict(dropped)}")
        print(
            f"mean reward: chosen {sides['chosen']:.3f}, rejected {sides['rejected']:.3f}; "
            f"mean length: chosen {lengths['chosen']:.1f}, rejected {lengths['rejected']:.1f} characters"
        )
        run.figure("pairs", {split: len(rows) for split, rows in splits.items()})
        run.figure("dropped", dict(dropped))
        run.figure("mean_reward", sides)
        run.figure("mean_length", lengths)
        run.finish(next_command("40_train_dpo", task=settings.task, train_file=files[0], val_file=files[1]))


if __name__ == "__main__":
    main(read_settings(Settings))
