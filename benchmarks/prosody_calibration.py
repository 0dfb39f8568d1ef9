"""How much real verse does the prosody checker pass, and how much of the same verse once its order is destroyed?

A checker that calls every third Tang poem wrong is no reward, and neither is one that passes anything. Every clean
poem of the corpus is judged as it is and after three shuffles: its lines in random order, the lines of all poems of a
form dealt anew, its characters in random order. What passes then passes by chance, or because some orders of a poem's
lines are regulated too. docs/PROSODY.md holds the table this prints.

Reads:  --corpus, verse in chinese-poetry's JSON schema (.json, .json.xz or a folder of poet.*.json)
Writes: two Markdown tables on standard output; the second shows what other readings of the meter rule would pass
Run:    python benchmarks/prosody_calibration.py
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from tasks.poems import corpus as verse_corpus  # noqa: E402
from tasks.poems import prosody  # noqa: E402

COLUMNS = {
    "n": "n",
    "rhyme": "rhyme",
    "level": "level rhyme",
    "oblique": "oblique rhyme",
    "repeated": "repeated word",
    "meter": "meter",
    "both": "both",
    "level_both": "both, level",
    "rhyme_unknown": "rhyme unknown",
    "meter_unknown": "meter unknown",
    "rhyme_share": "rhyme_share",
    "meter_share": "meter_share",
}


def tally(texts: list[str], form: str) -> Counter:
    """Sums over the texts of everything in COLUMNS."""
    counts: Counter = Counter(n=len(texts))
    for text in texts:
        result = prosody.check(text, form)
        rhyme, meter = result.rhyme.status == "pass", result.meter.status == "pass"
        counts["rhyme"] += rhyme
        counts["level"] += rhyme and not result.oblique
        counts["oblique"] += rhyme and result.oblique
        counts["repeated"] += "repeats" in result.rhyme.reason
        counts["meter"] += meter
        counts["both"] += rhyme and meter
        counts["level_both"] += rhyme and meter and not result.oblique
        counts["rhyme_unknown"] += result.rhyme.status == "unknown"
        counts["meter_unknown"] += result.meter.status == "unknown"
        counts["rhyme_share"] += result.rhyme_share or 0.0
        counts["meter_share"] += result.meter_share or 0.0
    return counts


def passes_pairwise(lines: list[str]) -> bool:
    """The meter rule read relation by relation: a polyphonic or unlisted character satisfies each on its own, in
    whichever tone suits. The checker is stricter: one reading has to suit them all."""
    tones = prosody.rhyme_table().tones
    marks = [[tones.get(character, 3) for character in line[1:-1:2]] for line in lines]
    opposite = [pair for line in marks for pair in zip(line, line[1:], strict=False)]
    opposite += [pair for index in range(0, len(marks), 2) for pair in zip(marks[index], marks[index + 1], strict=True)]
    joined = [(marks[index][0], marks[index + 1][0]) for index in range(1, len(marks) - 1, 2)]
    return all(first | second == 3 for first, second in opposite) and all(first & second for first, second in joined)


def passes_with_swap(lines: list[str]) -> bool:
    """The meter rule plus the commonest licence: a line may end 平平仄平仄 for 平平平仄仄, neighbours trading tones,
    so that the last marked position is level where the pattern wants oblique."""
    tones = prosody.rhyme_table().tones
    faults, _, _ = prosody._meter_faults(lines)
    return all(
        place == len(lines[line]) - 2
        and wanted == prosody.OBLIQUE
        and tones.get(lines[line][place - 2], 3) & prosody.LEVEL
        and tones.get(lines[line][place - 1], 3) & prosody.OBLIQUE
        and tones.get(lines[line][place + 1], 3) & prosody.OBLIQUE
        for line, place, wanted in faults
    )


def table_row(label: str, counts: Counter) -> str:
    cells = [f"{counts['n']:,}"]
    for name in list(COLUMNS)[1:]:
        mean = counts[name] / counts["n"]
        cells.append(f"{mean:.2f}" if name.endswith("share") else f"{100 * mean:.1f}")
    return f"| {label} | " + " | ".join(cells) + " |"


def shuffled_lines(poems: list[list[str]], generator: random.Random) -> list[list[str]]:
    return [generator.sample(lines, len(lines)) for lines in poems]


def dealt_lines(poems: list[list[str]], generator: random.Random) -> list[list[str]]:
    pool = [line for lines in poems for line in lines]
    generator.shuffle(pool)
    count = len(poems[0])
    return [pool[start : start + count] for start in range(0, len(pool), count)]


def shuffled_characters(poems: list[list[str]], generator: random.Random) -> list[list[str]]:
    shuffled = []
    for lines in poems:
        length = len(lines[0])
        characters = "".join(generator.sample("".join(lines), len(lines) * length))
        shuffled.append([characters[start : start + length] for start in range(0, len(characters), length)])
    return shuffled


CONTROLS = {
    "lines shuffled": shuffled_lines,
    "lines from anywhere": dealt_lines,
    "characters shuffled": shuffled_characters,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/poems/tang.json.xz", help="verse to judge")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffles")
    arguments = parser.parse_args()

    records = verse_corpus.load_records(arguments.corpus)
    poems, _ = verse_corpus.clean(records, "full", arguments.corpus.name)
    texts: dict[str, list[str]] = {form: [] for form in prosody.FORMS}
    for poem in poems:
        texts[poem.form].append(poem.text)

    print("| | " + " | ".join(COLUMNS.values()) + " |")
    print("|---|" + "---:|" * len(COLUMNS))
    started = time.perf_counter()
    for form, originals in texts.items():
        if originals:
            print(table_row(form, tally(originals, form)))
    seconds = time.perf_counter() - started
    for label, control in CONTROLS.items():
        for form, originals in texts.items():
            poems_as_lines = [prosody.split_lines(text) for text in originals]
            if poems_as_lines:
                destroyed = control(poems_as_lines, random.Random(arguments.seed))
                print(table_row(f"{form}, {label}", tally(["，".join(lines) for lines in destroyed], form)))
    print("\n| | meter | meter, relation by relation | meter, with 平平仄平仄 |\n|---|---:|---:|---:|")
    for form, originals in texts.items():
        poems_as_lines = [prosody.split_lines(text) for text in originals]
        if poems_as_lines:
            passing = [sum(prosody.check(text, form).meter.status == "pass" for text in originals)]
            passing += [sum(map(rule, poems_as_lines)) for rule in (passes_pairwise, passes_with_swap)]
            print(f"| {form} | " + " | ".join(f"{100 * count / len(originals):.1f}" for count in passing) + " |")
    print(f"\n{len(poems):,} poems as they are: {len(poems) / seconds:,.0f} poems a second on one core")


if __name__ == "__main__":
    main()
