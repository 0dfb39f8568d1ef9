"""How much real verse does the prosody checker pass, and how much of the same verse once its order is destroyed?

A checker that calls every third Tang poem wrong is no reward, and neither is one that passes anything. Every clean
poem of the corpus is judged as it is and after three shuffles: its lines in random order, the lines of all poems of a
form dealt anew, its characters in random order. What passes then passes by chance, or because some orders of a poem's
lines are regulated too. docs/tasks/poems.md holds the table this prints.

Reads   --corpus, verse in chinese-poetry's JSON schema (.json, .json.xz or a folder of poet.*.json);
        data/poems/genres.json.xz, 唐诗三百首 and 千家诗 by genre
Writes  Markdown tables on standard output: the rates, the meter in other readings, faults by name, genres
Run     python benchmarks/prosody_calibration.py
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


def meter_table(texts: dict[str, list[str]]) -> None:
    """Per cent of the poems whose meter passes, read strictly, with licences, and as before 2026-11-26."""
    parts = {"meter": "as read", "meter_any": "in any reading", "meter_licensed": "as read, with licences"}
    print(f"\n| | {' | '.join(parts.values())} | 中华新韵, as read |\n|---|" + "---:|" * (len(parts) + 1))
    for form, originals in texts.items():
        verdicts = [prosody.check(text, form) for text in originals]
        rates = [sum(getattr(verdict, part).status == "pass" for verdict in verdicts) for part in parts]
        some = originals[:: max(1, len(originals) // 500)]
        modern = sum(prosody.check(text, form, "xinyun").meter.status == "pass" for text in some)
        cells = [*(100 * rate / len(verdicts) for rate in rates), 100 * modern / len(some)]
        print(f"| {form} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


def fault_table(texts: dict[str, list[str]]) -> None:
    """Per cent of the poems that have a licence or a fault, by name."""
    found = {form: [prosody.check(text, form) for text in originals] for form, originals in texts.items()}
    names = Counter(mark.name for rows in found.values() for row in rows for mark in row.licences + row.faults)
    print(f"\n| | {' | '.join(names)} |\n|---|" + "---:|" * len(names))
    for form, rows in found.items():
        shares = [sum(any(mark.name == name for mark in row.licences + row.faults) for row in rows) for name in names]
        print(f"| {form} | " + " | ".join(f"{100 * share / len(rows):.1f}" for share in shares) + " |")


def genre_table(show: bool) -> None:
    """Per cent of each genre of the two anthologies in a regulated form whose rhyme and meter pass."""
    genres: dict[tuple[str, str], list[tuple[dict, str]]] = {}
    for record in verse_corpus.load_records(ROOT / "data/poems/genres.json.xz"):
        poem, _ = verse_corpus.clean_record(record, "basic", "")
        text = poem.text if poem else ""  # a few have an unclosed bracket
        genres.setdefault((record["book"], record["genre"]), []).append((record, text))
    print("\n| | n | strict | with licences |\n|---|---:|---:|---:|")
    for (book, genre), poems in genres.items():
        verdicts = [prosody.check(text) for _, text in poems]
        sound = [v.form.status == v.rhyme.status == "pass" for v in verdicts]
        strict = sum(ok and v.meter.status == "pass" for ok, v in zip(sound, verdicts, strict=True))
        licensed = [ok and v.meter_licensed.status == "pass" for ok, v in zip(sound, verdicts, strict=True)]
        rates = [f"{100 * count / len(poems):.0f}" for count in (strict, sum(licensed))]
        print(f"| {book}, {genre} | {len(poems)} | {' | '.join(rates)} |")
        for (record, _), verdict, passed in zip(poems, verdicts, licensed, strict=True):
            if show and not passed and verdict.form.status == "pass":
                failed = verdict.rhyme if verdict.rhyme.status != "pass" else verdict.meter_licensed
                print(f"    {record['author']} {record['title']}: {failed.reason}")


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
    parser.add_argument("--exceptions", action="store_true", help="name the poems of a genre that fail, with reasons")
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
    meter_table(texts)
    fault_table(texts)
    genre_table(arguments.exceptions)
    print(f"\n{len(poems):,} poems as they are: {len(poems) / seconds:,.0f} poems a second on one core")


if __name__ == "__main__":
    main()
