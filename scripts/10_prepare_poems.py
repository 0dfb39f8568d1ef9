"""Tang verse to training files: clean, name the form, split by content, write SFT rows, preference pairs and RL prompts.

Reads   --corpus: chinese-poetry JSON (data/poems/tang.json.xz, or a folder of poet.*.json)
Writes  --output-dir (processed_data/poems): sft_, pref_, prompts_ {train,val,test}.jsonl, report.json, run.json
Run     python scripts/10_prepare_poems.py
        python scripts/10_prepare_poems.py --clean none --output-dir processed_data/poems_raw

Rejected poems keep the chosen one's length and characters wherever the fault allows (kinds in FAULTS below), so that neither length
nor a bag of characters tells the two apart. Only poems that pass rhyme and meter are chosen: a fault is then the only difference.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.settings import UserError, read_settings


@dataclass
class Settings:
    # --- data
    task: str = "poems"  # fixed: this stage knows verse only
    corpus: Path = Path("data/poems/tang.json.xz")  # file or folder in chinese-poetry's schema
    clean: Literal["none", "basic", "full"] = "full"  # none: as printed; basic: damaged texts out; full: regular verse only
    max_train: int = 0  # SFT training rows kept, 0 = all (a fixed choice by content, spread over forms as they come)
    themes: int = 3  # themes named in an instruction

    # --- preference pairs and RL prompts
    max_pairs: int = 6000  # training pairs, 0 = all; val and test get theirs in proportion to the splits
    max_prompts: int = 2000  # RL training prompts, 0 = all

    # --- run
    output_dir: Path = Path("processed_data/{task}")  # all files of this stage
    seed: int = 42  # of the faults in rejected poems
    overwrite: bool = False  # replace what an earlier run left in output_dir


def row_id(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def swap(text: str, first: int, second: int) -> str:
    chars = list(text)
    chars[first], chars[second] = chars[second], chars[first]
    return "".join(chars)


def by_swapping(part: str, touches: Callable[[int, int], bool]):
    """A fault made by exchanging two characters of the poem until `part` fails and the other part still passes."""

    def make(poem, rng: random.Random, library: dict) -> str | None:
        from tasks import prosody, verse_corpus

        spots = [i for i, char in enumerate(poem.text) if not verse_corpus.NOT_HAN.match(char)]
        width = prosody.FORMS[poem.form][1]
        for _ in range(40):
            a, b = rng.sample(range(len(spots)), 2)
            if poem.text[spots[a]] == poem.text[spots[b]] or not (touches(a, width) or touches(b, width)):
                continue
            text = swap(poem.text, spots[a], spots[b])
            verdict = prosody.check(text, poem.form)
            other = verdict.meter if part == "rhyme" else verdict.rhyme
            if getattr(verdict, part).status == "fail" and other.status == "pass":
                return text
        return None

    return make


def disorder(poem, rng: random.Random, library: dict) -> str | None:
    """The characters of each line in another order, rhymes left in place: neither sense nor meter, the same rhyme."""
    from tasks import prosody

    lines = prosody.split_lines(poem.text)
    text = poem.text
    for line in lines:
        inner = list(line[:-1])
        rng.shuffle(inner)
        text = text.replace(line, "".join(inner) + line[-1], 1)
    return text if text != poem.text else None


def other_poem(same_form: bool):
    """A real poem that is not what was asked: other themes in the same form, or another form on the same first theme.

    Every poem is drawn about as often as it is chosen, so neither length nor vocabulary marks the rejected side.
    """

    def make(poem, rng: random.Random, library: dict) -> str | None:
        candidates = library["by_form"][poem.form] if same_form else library["by_theme"][library["themes"][poem.key][0]]
        for _ in range(40):
            other = rng.choice(candidates)
            if same_form and not set(library["themes"][other.key]) & set(library["themes"][poem.key]):
                return other.text
            if not same_form and other.form != poem.form:
                return other.text
        return None

    return make


FAULTS = {
    "rhyme": by_swapping("rhyme", lambda spot, width: spot % (2 * width) == 2 * width - 1),  # a rhyme word leaves its place
    "meter": by_swapping("meter", lambda spot, width: (spot % width) % 2 == 1),  # positions 2, 4, 6
    "disorder": disorder,
    "theme": other_poem(same_form=True),
    "form": other_poem(same_form=False),
}


def preference_pairs(poems: list, themes: dict[str, list[str]], seed: int) -> tuple[list[tuple], Counter]:
    """(poem, rejected text, kind) for poems that pass rhyme and meter, kinds in turn; and how many poems were skipped."""
    from tasks import prosody

    sound, skipped = [], Counter()
    for poem in poems:
        verdict = prosody.check(poem.text, poem.form)
        if all(part.status == "pass" for part in (verdict.form, verdict.rhyme, verdict.meter)):
            sound.append(poem)
        else:
            skipped["chosen poem breaks a rule itself"] += 1
    library = {"themes": themes, "by_form": {}, "by_theme": {}}
    for poem in sound:
        library["by_form"].setdefault(poem.form, []).append(poem)
        library["by_theme"].setdefault(themes[poem.key][0], []).append(poem)
    pairs = []
    for index, poem in enumerate(sound):
        kind = list(FAULTS)[index % len(FAULTS)]
        rejected = FAULTS[kind](poem, random.Random(f"{seed} {poem.key}"), library)
        if rejected is None:
            skipped[f"no {kind} fault found"] += 1
        else:
            pairs.append((poem, rejected, kind))
    return pairs, skipped


def main(settings: Settings) -> None:
    from common.jsonl import write_json, write_jsonl
    from common.runs import begin_run
    from tasks import poems as task
    from tasks import verse_corpus

    if settings.task != "poems":
        raise UserError(f"--task {settings.task}: this stage prepares poems; mend: use the prepare stage of that task")
    with begin_run(settings.output_dir, settings, {"corpus": settings.corpus}, settings.overwrite, "10_prepare_poems", resumable=False) as run:
        records = verse_corpus.load_records(settings.corpus)
        kept, dropped = verse_corpus.clean(records, settings.clean, settings.corpus.name.split(".")[0])
        splits, near_copies = verse_corpus.split_poems(kept)
        print(f"read {len(records)}, kept {len(kept)} (--clean {settings.clean})")
        for reason, count in sorted(dropped.items(), key=lambda item: -item[1]):
            print(f"  dropped {count:6d}  {reason}")
        print(f"  dropped {near_copies:6d}  near-copy of a held-out poem (shared run of {verse_corpus.SHARED_RUN} characters)")

        report = {"read": len(records), "dropped": {**dropped, "near-copy of a held-out poem": near_copies}, "splits": {}}
        for split, poems in splits.items():
            poems.sort(key=lambda poem: row_id(poem.key))  # an order that comes from the content: the first n are a fair sample
            themes = {poem.key: task.themes_of(poem.title, poem.text, settings.themes) for poem in poems}

            def prompt_of(poem, themes=themes) -> dict:
                meta = {"id": row_id(poem.key), "form": poem.form, "themes": themes[poem.key], "title": poem.title, "author": poem.author}
                return {"prompt": task.messages(meta), "meta": meta}

            share = len(poems) / len(splits["train"])
            pairs, skipped = preference_pairs(poems, themes, settings.seed) if settings.clean == "full" else ([], Counter())
            if settings.max_pairs:
                pairs = pairs[: max(1, round(settings.max_pairs * min(1.0, share * 4)))]
            sft = poems[: settings.max_train or None] if split == "train" else poems
            prompts = poems[: settings.max_prompts or None] if split == "train" else poems

            files = {
                "sft": [{**prompt_of(p), "completion": [{"role": "assistant", "content": p.text}]} for p in sft],
                "prompts": [
                    # the reference is what a poet wrote: for side-by-side pages, never a training target
                    {**(row := prompt_of(p)), "meta": {**row["meta"], "reference": p.text}} for p in prompts
                ],
                "pref": [
                    {"prompt": (row := prompt_of(p))["prompt"], "chosen": [{"role": "assistant", "content": p.text}],
                     "rejected": [{"role": "assistant", "content": rejected}], "meta": {**row["meta"], "kind": kind}}
                    for p, rejected, kind in pairs
                ],
            }  # fmt: skip
            for name, rows in files.items():
                if rows:
                    write_jsonl(settings.output_dir / f"{name}_{split}.jsonl", rows)
            report["splits"][split] = {
                **{name: len(rows) for name, rows in files.items()},
                "forms": Counter(p.form for p in sft),
                "pair kinds": Counter(kind for _, _, kind in pairs),
                "pairs skipped": skipped,
            }
            print(f"{split}: " + ", ".join(f"{len(rows)} {name}" for name, rows in files.items()) + f"; pairs {dict(Counter(k for *_, k in pairs))}")
        write_json(settings.output_dir / "report.json", report)
        run.figure("report", report)
        run.finish("python scripts/20_train_sft.py")


if __name__ == "__main__":
    main(read_settings(Settings))
