"""Several samples of a model for each prompt, ranked by named rewards: on-policy pairs for DPO, the best samples as SFT
rows, or both.

Rewards are those of stages 50 and 51: rules of the task, a reward model, a classifier, or a weighted mix. Ties,
near-duplicates, samples that did not stop, that a reward cannot judge or that break a rule of --require are dropped and
counted.

Reads   --generations: one file of stage 60 with --num-samples 8 or more, on training prompts
Writes  processed_data/{task}/pref_onpolicy_{train,val}.jsonl (--write pairs), sft_best_{train,val}.jsonl (--write
        best), with the scores in meta; run record beside them
Run     python scripts/60_generate.py --model checkpoints/poems/sft_merged \\
            --prompts-file processed_data/poems/prompts_train.jsonl \\
            --max-prompts 480 --num-samples 16 --output-file results/poems/onpolicy/sft_merged.jsonl
        python scripts/33_rank_samples.py --generations results/poems/onpolicy/sft_merged.jsonl \\
            --rewards rhyme:1 meter:1 --require form
        python scripts/33_rank_samples.py --rewards rhyme meter theme --require all_three --write best

The best samples and stage 20 on them are rejection-sampling fine-tuning (RFT; Yuan et al. 2023, arXiv 2308.01825,
section 3.3).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.settings import UserError, next_command, read_settings, unused
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
    write: Literal["pairs", "best", "both"] = "pairs"
    """preference pairs, the best samples as SFT rows, or both"""
    pairs_per_prompt: int = 2
    """best with worst, second best with second worst, ..."""
    against: Literal["worst", "near_miss"] = "worst"
    """what the best stand against: the worst, or the best of those that min_margin leaves below them"""
    min_margin: float = 0.05
    """least difference of the total reward, which is a weighted mean; a smaller one is a tie"""
    max_overlap: float = 0.8
    """share of character bigrams that the two sides of a pair may have in common"""
    best_per_prompt: int = 1
    """--write best: SFT rows of one prompt"""
    val_share: float = 0.1
    """of the prompts, chosen by the hash of their text; 0 = no validation files"""

    # --- run
    output_dir: Path = Path("processed_data/{task}")
    """the files go here"""
    overwrite: bool = False
    """replace what an earlier run wrote"""

    def clashes(self):
        if self.write == "pairs":
            yield from unused(self, "with --write pairs", "best_per_prompt")
        if self.write == "best":
            names = "pairs_per_prompt", "against", "min_margin", "max_overlap"
            yield from unused(self, "with --write best", *names)


def bigrams(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text) - 1)} or {text}


def overlap(first: str, second: str) -> float:
    """Jaccard index of the character bigrams, 0..1."""
    one, other = bigrams(first), bigrams(second)
    return len(one & other) / len(one | other)


def usable_samples(rows: list[dict], dropped: Counter) -> list[dict]:
    """The samples of one prompt that may stand in a row, the best first."""
    usable, seen = [], set()
    for row in sorted(rows, key=lambda row: (-(row["total"] if row["total"] is not None else 0.0), row["id"])):
        if row["total"] is None:
            dropped["sample that a reward cannot judge"] += 1
        elif not row["kept"]:
            dropped["sample that breaks a required rule"] += 1
        elif row["finish_reason"] != "stop":  # it has no eos, and training would add one
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
    return usable


def meta_of(row: dict, kind: str, **scores: float) -> dict:
    kept = {key: value for key, value in row["meta"].items() if key not in ("kind", "source")}
    return kept | {"kind": kind} | {name: round(value, 6) for name, value in scores.items()}


def tools_of(row: dict) -> dict:
    return {"tools": row["tools"]} if row.get("tools") else {}


def best_rows(usable: list[dict], settings: Settings) -> list[dict]:
    """The best samples of one prompt as SFT rows."""
    return [
        {
            "prompt": row["prompt"],
            "completion": answer(row["completion"]),
            **tools_of(row),
            "meta": meta_of(row, "best", score=row["total"]),
        }
        for row in usable[: settings.best_per_prompt]
    ]


def rank_prompt(usable: list[dict], settings: Settings, dropped: Counter) -> list[dict]:
    """Pairs of one prompt: rank k from the top against rank k from the bottom, or against the nearest that is
    min_margin worse and stands in no pair yet."""
    pairs, taken = [], set()
    for rank in range(min(settings.pairs_per_prompt, len(usable) // 2)):
        best, worst = usable[rank], usable[-1 - rank]
        if settings.against == "near_miss":
            below = (row for row in usable[rank + 1 :] if best["total"] - row["total"] >= settings.min_margin)
            worst = next((row for row in below if row["id"] not in taken), best)
            taken |= {best["id"], worst["id"]}
        if best["total"] - worst["total"] < settings.min_margin or best is worst:
            dropped["tie"] += 1
        elif overlap(best["completion"], worst["completion"]) > settings.max_overlap:
            dropped["near-duplicates"] += 1
        else:
            meta = meta_of(best, "onpolicy", chosen_score=best["total"], rejected_score=worst["total"])
            sides = {"chosen": answer(best["completion"]), "rejected": answer(worst["completion"])}
            pairs.append({"prompt": best["prompt"], **sides, **tools_of(best), "meta": meta})
    return pairs


def main(settings: Settings) -> None:
    from common.jsonl import read_jsonl, write_jsonl
    from common.runs import begin_run
    from common.training.rewards import check_order, load_rewards, score, total

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
    check_order([*rewards, *required], task)
    kinds = {"pairs": "pref_onpolicy", "best": "sft_best"}
    kinds = {kind: name for kind, name in kinds.items() if settings.write in (kind, "both")}
    files = {
        (kind, split): settings.output_dir / f"{name}_{split}.jsonl"
        for kind, name in kinds.items()
        for split in ("train", "val")[: 2 if settings.val_share else 1]
    }
    first, *others = files.values()
    inputs = {"generations": settings.generations}
    with begin_run(first, settings, inputs, "33_rank_samples", resumable=False, also=tuple(others)) as run:
        texts = [[row.get(name) for row in rows] for name in ("prompt", "completion", "meta", "tools")]
        totals = total(rewards, score(rewards, *texts))
        rules = score(required, *texts).values() if required else ()
        for index, (row, value) in enumerate(zip(rows, totals, strict=True)):
            row["total"], row["kept"] = value, all(values[index] == 1 for values in rules)
        found: dict[tuple, list[dict]] = {place: [] for place in files}
        dropped: Counter = Counter()
        asked_of: Counter = Counter()
        for samples in prompts.values():
            asked = json.dumps(samples[0]["prompt"], ensure_ascii=False)  # two rows may ask the same
            held_out = int(hashlib.sha256(asked.encode()).hexdigest(), 16) % 1000 < 1000 * settings.val_share
            split, usable = "val" if held_out else "train", usable_samples(samples, dropped)
            asked_of[split] += 1
            if "pairs" in kinds:
                found["pairs", split] += rank_prompt(usable, settings, dropped)
            if "best" in kinds:
                found["best", split] += best_rows(usable, settings)
        for (kind, split), file in files.items():
            if not found[kind, split]:
                lost = f"no {split} row ({kind}) is left of {len(rows)} samples"
                if not asked_of[split]:
                    raise UserError(f"{lost}: no prompt fell into {split}; fix: more prompts, or --val-share 0")
                fix = "more samples, or a smaller --min-margin"
                if dropped["sample that did not stop"] * 2 > len(rows):
                    fix = "stage 60 with a larger --max-new-tokens, or a model that has learned to stop"
                raise UserError(f"{lost}: {dict(dropped)}; fix: {fix}")
            write_jsonl(file, found[kind, split])
        counts = {kind: {split: len(found.get((kind, split), ())) for split in ("train", "val")} for kind in kinds}
        for kind, count in counts.items():
            print(
                f"{len(rows)} samples of {len(prompts)} prompts -> {count['train']} training and {count['val']} "
                f"validation {'pairs' if kind == 'pairs' else 'SFT rows'}"
            )
            run.figure(kind, count)
        print(f"dropped: {dict(dropped)}")
        run.figure("dropped", dict(dropped))
        rewarded, lengths = {}, {}
        for kind, score_of, side in (
            ("pairs", "chosen_score", "chosen"),
            ("pairs", "rejected_score", "rejected"),
            ("best", "score", "completion"),
        ):
            if kind in kinds:
                written = found[kind, "train"] + found.get((kind, "val"), [])
                rewarded[side] = sum(row["meta"][score_of] for row in written) / len(written)
                lengths[side] = sum(len(row[side][0]["content"]) for row in written) / len(written)
                print(f"{side}: mean reward {rewarded[side]:.3f}, mean length {lengths[side]:.1f} characters")
        run.figure("mean_reward", rewarded)
        run.figure("mean_length", lengths)
        stage, kind = ("40_train_dpo", "pairs") if "pairs" in kinds else ("20_train_sft", "best")
        trained_on = {f"{split}_file": files.get((kind, split)) for split in ("train", "val")}
        run.finish(next_command(stage, task=settings.task, **trained_on))


if __name__ == "__main__":
    main(read_settings(Settings))
