"""Learn from Tang verse which tone a character that the rhyme book has in both is read in, word by word.

In a poem that keeps the meter the other characters say which pattern it follows, and the pattern says which tone a
character at position 2, 4 or 6 has. So the same word in many poems shows its tone: 相 is oblique in 丞相 and level in
相思. A word is a pair of neighbours inside a line. Places where a licence (拗救) would explain the other tone are left
out. Where the traditional script tells apart what the simplified one merged (干, 乾, 幹), every place counts.

What people know about meanings stands in readings.txt and stands above what is learned here; a character that it calls
free (中: one meaning, two tones) is not learned.

Reads:  tang.json.xz, rhymes.json and readings.txt beside this script
Writes: readings.json beside this script: simplified character -> [tone outside its words, words read 平, words read 仄,
        words that poets read both ways]; tones are 平, 仄 and 中 (either)
Run:    python data/poems/build_readings.py
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))

from tasks.poems import corpus, prosody, readings  # noqa: E402

LEVEL, OBLIQUE, FREE = readings.LEVEL, readings.OBLIQUE, readings.FREE
SURE = 0.9  # a word has a tone when this share of its places show it,
PRIOR = 2  # its character's own share counted as so many places
MIXED = 4  # a word with so many places and no tone is read both ways
SURE_CHARACTER, PLACES = 0.95, 8  # the same for a character outside its words: share, least number of places


def shown(lines: list[str], tones: list[list[str]]) -> dict[tuple[int, int], str]:
    """(line, place) -> the tone that the meter shows there; empty unless the poem fits one of the two patterns only."""
    width, last = len(lines[0]), len(lines[0]) - 1
    if any(line[last] == OBLIQUE for line in tones[1::2]):
        return {}
    fitting = []
    for pattern in prosody.patterns(len(lines), width):
        places = {}
        for line, place, wanted in pattern:
            tone = tones[line][place]
            loose = place == width - 2 and line % 2 == 0 and licensed(tones, line, wanted)
            if tone not in (wanted, FREE, readings.UNLISTED) and not loose:
                break
            if not (loose and tone == FREE):
                places[line, place] = wanted
        else:
            places.update({(line, last): LEVEL if line % 2 else OBLIQUE for line in range(1, len(lines))})
            fitting.append(places)
    return fitting[0] if len(fitting) == 1 else {}


def licensed(tones: list[list[str]], line: int, wanted: str) -> bool:
    """Could a licence explain the tone that is not wanted at the last fixed place of this unrhymed line?"""
    if tones[line][-1] == LEVEL:
        return False
    if wanted == OBLIQUE:
        return tones[line][-3] != LEVEL
    return tones[line + 1][-3] != OBLIQUE


def poems(path: Path) -> Iterable[tuple[str, list[str]]]:
    """Author and lines of every regulated poem in the script of the corpus, which is traditional."""
    seen = set()
    for record in corpus.load_records(path):
        text = corpus.DOUBLED_MARK.sub(r"\1", corpus.EDITORS_NOTE.sub("", "".join(record["paragraphs"])))
        lines = prosody.split_lines(text)
        if len({len(line) for line in lines}) == 1 and (len(lines), len(lines[0])) in prosody.FORM_OF_SHAPE:
            if text not in seen:
                yield record["author"], lines
            seen.add(text)


@cache
def merged_forms() -> dict[str, str]:
    """The tone of traditional characters whose simplified form stands for others too."""
    book = readings.pingshui()
    own = json.loads((HERE / "rhymes.json").read_text(encoding="utf-8"))["own"]
    return {form: book.tone_in(frozenset(book.names[index] for index in indices)) for form, indices in own.items()}


def own_tones(lines: list[str]) -> list[list[str]]:
    """The tones of lines in traditional script, each character for itself."""
    tone, own = readings.pingshui().tone, merged_forms()
    return [[own.get(character) or tone(character) for character in line] for line in lines]


def learn(all_lines: Iterable[list[str]]) -> tuple[dict[str, Counter], dict[tuple[str, int], Counter]]:
    """Places by tone: of every character, and of every (word, index of the character in it)."""
    book = readings.pingshui()
    characters: dict[str, Counter] = defaultdict(Counter)
    words: dict[tuple[str, int], Counter] = defaultdict(Counter)
    for lines in all_lines:
        tones = own_tones(lines)
        evidence = shown(lines, tones)
        for number, (line, traditional) in enumerate(zip(lines, tones, strict=True)):
            simple = book.simplify(line)
            for place, tone in enumerate(traditional):
                if book.tone(simple[place]) != FREE:
                    continue
                if tone == FREE:
                    tone = evidence.get((number, place))
                    if tone is None:
                        continue
                    count = place < len(line) - 1  # at a line's end the tone is the rhyme's choice
                else:
                    count = tone in (LEVEL, OBLIQUE)
                character = simple[place]
                characters[character][tone] += count
                if place and simple[place - 1] != character:
                    words[simple[place - 1 : place + 1], 1][tone] += 1
                if place + 1 < len(line) and simple[place + 1] != character:
                    words[simple[place : place + 2], 0][tone] += 1
    return characters, words


def share_of_level(places: Counter, prior: float, weight: float) -> float:
    total = places[LEVEL] + places[OBLIQUE]
    return (places[LEVEL] + weight * prior) / (total + weight)


def by_hand(path: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """character -> (default, word -> tone)."""
    rules = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        character, default, *rest = line.split()
        tone, words = "", {}
        for item in rest:
            if item in (LEVEL, OBLIQUE, FREE):
                tone = item
            elif len(item) != 2 or character not in item or not tone:
                raise SystemExit(f"{path}:{number}: {item} is no pair with {character} behind 平, 仄 or 中")
            else:
                words[item] = tone
        if default not in (LEVEL, OBLIQUE, FREE, "-") or character in rules:
            raise SystemExit(f"{path}:{number}: {character} twice, or its default is not 平, 仄, 中 or -")
        rules[character] = default, words
    return rules


def build(all_lines: list[list[str]]) -> dict[str, list[str]]:
    """What readings.json holds."""
    book = readings.pingshui()
    characters, words = learn(all_lines)
    rules = by_hand(HERE / "readings.txt")
    table: dict[str, tuple[str, float, dict[str, str]]] = {}  # character -> default, share of level, words
    free = {character for character, (default, _) in rules.items() if default == FREE}
    for character in sorted(book.both()):
        default, _ = rules.get(character, ("-", {}))
        level = share_of_level(characters[character], 0.5, 1)
        if default == "-":
            default = LEVEL if level >= SURE_CHARACTER else OBLIQUE if level <= 1 - SURE_CHARACTER else FREE
            default = default if sum(characters[character].values()) >= PLACES else FREE
        table[character] = default, level, {}
    if wrong := set(rules) - set(table):
        raise SystemExit(f"readings.txt: the rhyme book has only one tone for {' '.join(sorted(wrong))}")
    for (word, index), places in words.items():
        default, level, tones = table[word[index]]
        share = share_of_level(places, level, PRIOR)
        tone = LEVEL if share >= SURE else OBLIQUE if share <= 1 - SURE else FREE
        # A word that poets read both ways is kept too: it stands above the neighbour on the other side.
        if word[index] not in free and (tone != default or (tone == FREE and sum(places.values()) >= MIXED)):
            tones[word] = tone
    for character, (_, fixed) in rules.items():
        table[character][2].update(fixed)
    return {
        character: [
            default,
            *(" ".join(sorted(w for w in tones if tones[w] == tone)) for tone in (LEVEL, OBLIQUE, FREE)),
        ]
        for character, (default, _, tones) in table.items()
    }


def test(all_lines: list[list[str]], table: dict[str, list[str]]) -> None:
    """How often the tone in the word is what the meter of these poems shows at positions 2, 4 and 6."""
    book, words, results = readings.pingshui(), readings.parse_words(table), Counter()
    for lines in all_lines:
        tones = own_tones(lines)
        for (number, place), shown_tone in shown(lines, tones).items():
            if tones[number][place] == FREE and place < len(lines[0]) - 1:
                read = readings.tone_in_word(words, book.simplify(lines[number]), place)
                results["free" if read == FREE else "right" if read == shown_tone else "wrong"] += 1
    decided = results["right"] + results["wrong"]
    total = decided + results["free"]
    print(f"{total} places, {decided} decided by word or character, {100 * results['right'] / decided:.1f} % right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=HERE / "tang.json.xz", help="verse in traditional script")
    parser.add_argument("--test-on", default="", help="a poet to leave out and test on; nothing is written then")
    parser.add_argument("--output", type=Path, default=HERE / "readings.json", help="file to write")
    arguments = parser.parse_args()

    everything = list(poems(arguments.corpus))
    table = build([lines for author, lines in everything if author != arguments.test_on])
    if arguments.test_on:
        test([lines for author, lines in everything if author == arguments.test_on], table)
        return
    lines = [json.dumps({c: row}, ensure_ascii=False, separators=(",", ":"))[1:-1] for c, row in table.items()]
    arguments.output.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8", newline="\n")
    count = sum(len(words.split()) for row in table.values() for words in row[1:])
    print(
        f"{arguments.output}: {len(table)} characters, {count} words, {arguments.output.stat().st_size / 1024:.0f} KiB"
    )


if __name__ == "__main__":
    main()
