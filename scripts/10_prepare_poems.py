"""Tang verse to training files: clean, name the form, split by content, write SFT rows, preference pairs and RL
prompts.

Reads   --corpus: chinese-poetry JSON (data/poems/tang.json.xz, or a folder of poet.*.json)
Writes  --output-dir (processed_data/poems): sft_, pref_, prompts_ {train,val,test}.jsonl, report.json, run.json
Run     python scripts/10_prepare_poems.py
        python scripts/10_prepare_poems.py --clean none --output-dir processed_data/poems_raw
        python scripts/10_prepare_poems.py --clean strict --title-share 0.3 --rhyme-share 0.3

Rejected poems keep the chosen one's length and characters wherever the fault allows (tasks/poems/faults.py has the
kinds), so that neither length nor a bag of characters tells the two apart. Only poems that pass rhyme and meter are
chosen: a fault is then the only difference.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from common.settings import Limit, UserError, read_settings, unused

if TYPE_CHECKING:
    from tasks.poems.corpus import Poem


@dataclass
class Settings:
    # --- data
    task: str = "poems"
    """fixed: this stage knows verse only"""
    corpus: Path = Path("data/poems/tang.json.xz")
    """file or folder in chinese-poetry's schema"""
    clean: Literal["none", "basic", "full", "strict"] = "full"
    """of the training rows: as printed, no damage, regular verse only; strict: SFT rows also keep rhyme and meter"""
    max_train: int = 0
    """SFT training rows kept, 0 = all (a fixed choice by content, spread over forms as they come)"""
    min_character_poems: int = 5
    """--clean full, strict: SFT rows keep to characters that so many training poems have"""
    themes: int = 3
    """themes named in an instruction"""
    title_share: Annotated[float, Limit(high=1)] = 0.0
    """share of the rows whose instruction names the poem's own title, too; chosen by the hash of the text"""
    rhyme_share: Annotated[float, Limit(high=1)] = 0.0
    """the same of its rhyme group"""

    # --- preference pairs and RL prompts
    max_pairs: int = 6000
    """training pairs, 0 = all; val and test: four times their share of it"""
    max_prompts: int = 2000
    """RL training prompts, 0 = all"""

    # --- run
    output_dir: Path = Path("processed_data/{task}")
    """all files of this stage"""
    seed: int = 42
    """of the faults in rejected poems"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""

    def clashes(self):
        if self.clean in ("none", "basic"):
            yield from unused(self, f"with --clean {self.clean}", "min_character_poems")


NEAR_COPY = "near-copy of a held-out poem (shared run of 10 characters)"


def asked_too(poem: Poem, settings: Settings) -> dict:
    """What some rows ask for besides form and themes. A row's own hash decides: a larger share adds rows and moves
    none."""
    from tasks.base import text_id
    from tasks.poems import prosody

    def chosen(part: str, share: float) -> bool:
        return int(text_id(part, poem.key), 16) < share * 16**12

    asked = {}  # with a share of 0 no row has the key, with another every row
    if settings.title_share:
        asked["ask_title"] = poem.short_title if chosen("title", settings.title_share) else ""
    if settings.rhyme_share:
        verdict = prosody.check(poem.text)
        named = verdict.rhyme.status == "pass" and chosen("rhyme", settings.rhyme_share)
        asked["ask_rhyme"] = verdict.rhyme_group[0] if named else ""
    return asked


def main(settings: Settings) -> None:
    from common.jsonl import write_json
    from common.runs import begin_run
    from tasks import poems as task
    from tasks.base import answer, check_command, text_id, write_splits
    from tasks.poems import corpus as verse_corpus
    from tasks.poems.faults import preference_pairs
    from tasks.poems.reading import is_strict

    if settings.task != "poems":
        raise UserError(f"--task {settings.task}: this stage prepares poems; fix: use the prepare stage of that task")
    records = verse_corpus.load_records(settings.corpus)  # before an earlier run's files are touched
    source = settings.corpus.name.split(".")[0]
    regular, dropped = verse_corpus.clean(records, "full", source)
    splits, near_copies = verse_corpus.split_poems(regular)
    by_rules = settings.clean in ("full", "strict")
    if not by_rules:
        # val and test are regular verse at every level, so that the effect of cleaning is measured on one set
        poems, dropped = verse_corpus.clean(records, settings.clean, source)
        splits["train"] = verse_corpus.without_near_copies(poems, splits["val"] + splits["test"])
        near_copies = len(poems) - len(splits["train"])
    if not splits["train"]:
        raise UserError(
            f"{settings.corpus}: no training poem is left of {len(records)} records, dropped {dropped}; fix: more"
        )
    inputs = {"corpus": settings.corpus, **{file.name: file for file in task.FILES if file.suffix == ".json"}}
    with begin_run(settings.output_dir, settings, inputs, "10_prepare_poems", resumable=False) as run:
        print(f"read {len(records)}, train {len(splits['train'])} (--clean {settings.clean})")
        dropped[NEAR_COPY] = near_copies
        for reason, count in sorted(dropped.items(), key=lambda item: -item[1]):
            print(f"  dropped {count:6d}  {reason}")

        report = {"read": len(records), "dropped": dropped, "splits": {}}
        for split, poems in splits.items():
            poems.sort(key=lambda poem: text_id(poem.key))  # decided by the text: the first n are a fair sample
            themes = {poem.key: task.themes_of(poem.title, poem.text, settings.themes) for poem in poems}

            def prompt_of(poem: Poem, themes: dict[str, list[str]] = themes) -> dict:
                meta = {"id": text_id(poem.key), "form": poem.form, "themes": themes[poem.key]}
                meta |= {"title": poem.title, "author": poem.author} | asked_too(poem, settings)
                return {"prompt": task.messages(meta), "meta": meta}

            share = len(poems) / len(splits["train"])
            pairs, skipped = [], Counter()
            if by_rules:  # only regular verse can be told from a faulty one by rules
                pairs, skipped = preference_pairs(poems, themes, settings.seed)
            if settings.max_pairs:
                pairs = pairs[: max(1, round(settings.max_pairs * min(1.0, share * 4)))]
            sft, rare, loose = poems, 0, 0
            if split == "train" and by_rules:
                found_in = Counter(char for poem in poems for char in set(poem.text))
                common = {char for char, count in found_in.items() if count >= settings.min_character_poems}
                sft = [poem for poem in poems if common.issuperset(poem.text)]
                rare = len(poems) - len(sft)
            if split == "train" and settings.clean == "strict":
                sft = [poem for poem in sft if is_strict(poem.text)]
                loose = len(poems) - rare - len(sft)
                if not sft:
                    raise UserError(f"{settings.corpus}: no training poem keeps rhyme and meter; fix: --clean full")
            if split == "train":
                sft = sft[: settings.max_train or None]
            prompts = poems[: settings.max_prompts or None] if split == "train" else poems

            # the reference is what a poet wrote: for side-by-side pages, never a training target
            files = {
                "sft": [{**prompt_of(p), "completion": answer(p.text)} for p in sft],
                "prompts": [{**(row := prompt_of(p)), "meta": {**row["meta"], "reference": p.text}} for p in prompts],
                "pref": [
                    {
                        "prompt": (row := prompt_of(p))["prompt"],
                        "chosen": answer(p.text),
                        "rejected": answer(rejected),
                        "meta": {**row["meta"], "kind": kind},
                    }
                    for p, rejected, kind in pairs
                ],
            }
            counts = write_splits({split: files}, settings.output_dir)[split]
            report["splits"][split] = {
                **counts,
                "forms": Counter(p.form for p in sft),
                "not among sft for a rare character": rare,
                "not among sft for rhyme or meter": loose,
                "pair kinds": Counter(kind for _, _, kind in pairs),
                "pairs skipped": skipped,
            }
            reasons = [f"{n} for {why}" for n, why in ((rare, "a rare character"), (loose, "rhyme or meter")) if n]
            left_out = f" (not among sft: {', '.join(reasons)})" if reasons else ""
            print(f"{split}: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + left_out)
        write_json(settings.output_dir / "report.json", report)
        run.figure("report", report)
        run.finish(check_command(settings.output_dir))


if __name__ == "__main__":
    main(read_settings(Settings))
