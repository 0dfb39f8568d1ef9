"""Every setting of every stage: a number out of its limits, a name that is none, a flag that its mode does not read.

Only the flags are read, by the stage's own Settings; what its main refuses is in tests/stages/test_nothing_lost.py.
"""

import math
import re
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from common.settings import UserError, check_settings, read_settings
from conftest import SCRIPTS, load_script
from test_stages import docstrings_of

STAGES = {path.name[:2]: path.name for path in sorted(SCRIPTS.glob("[0-9]*.py"))}


@cache
def settings_of(kind: type) -> list[tuple[str, str]]:
    """(stage, setting) of every setting that holds such a value."""
    found = []
    for number in STAGES:
        cls = load_script(number).Settings
        hints = get_type_hints(cls)
        found += [(number, f.name) for f in fields(cls) if kind in (hints[f.name], *get_args(hints[f.name]))]
    return found


def refusal(number: str, *words: str) -> str:
    try:
        read_settings(load_script(number).Settings, list(words))
    except UserError as error:
        return str(error)
    except SystemExit as error:  # tyro's: the value is of another type
        return f"exit {error.code}"
    return ""


@pytest.mark.parametrize("number", STAGES)
def test_a_number_that_makes_no_sense_is_refused_by_its_flag(number):
    cls = load_script(number).Settings
    for kind in (int, float):
        for name in (name for stage, name in settings_of(kind) if stage == number):
            wrong = [-2, 10**30] if kind is int else [9e99, 1e-40, math.nan, math.inf]
            wrong += [] if name in ("min_margin", "max_steps") else [-1]  # any margin; -1 steps = by epochs
            for value in wrong:
                with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} "):
                    check_settings(cls(**{name: value}))


@pytest.mark.parametrize("number", STAGES)
def test_a_value_that_the_help_gives_a_meaning_is_allowed(number):
    """ "0 = all" in the line behind a setting."""
    cls, lines = load_script(number).Settings, docstrings_of(STAGES[number])
    for field in fields(cls):
        for value in re.findall(r"(?:^|[;,(] ?)(-?\d+) = ", lines[field.name]):
            check_settings(replace(cls(), **{field.name: int(value)}))


@pytest.mark.parametrize("number, name", settings_of(Path))
def test_an_empty_path_is_no_folder(number, name):
    flag = "--" + name.replace("_", "-")
    for words in ([flag, ""], [f"{flag}="]):
        assert refusal(number, *words) == f"{flag}: nothing is named; fix: name a file or folder"


@pytest.mark.parametrize("number, name", [pair for pair in settings_of(str) if pair[1] in ("task", "dtype")])
def test_an_empty_task_and_an_unknown_dtype_are_refused(number, name):
    assert refusal(number, f"--{name}=").startswith(f"--{name}")
    assert name != "task" or "a path, not a name" in refusal(number, "--task", "../x")
    assert name != "dtype" or "fix: auto, float32" in refusal(number, "--dtype", "fp16")


def test_an_export_is_asked_something():
    assert refusal("24", "--questions").startswith("--questions: none is named")


def test_texts_too_short_to_compare_are_told():
    """--texts 1 of stages 01 and 24: the first text is empty."""
    from common.gguf.certificate import compare_distributions

    with pytest.raises(UserError, match="none of 1 texts has a place to compare; fix: more --texts"):
        compare_distributions(None, lambda text: {"input_ids": [1]}, None, [""], 5)


# stage: flags of a mode, and flags that nothing reads in it, each with a value that is not its default
UNREAD = [
    ("01", "--gguf-file a.gguf", "--cache-dir elsewhere"),
    ("10", "--clean basic", "--min-character-poems 2"),
    ("13", "", "--temperature .1 --top-p .5 --max-tokens 9 --extra-body {} --guide-file a --prompts-dir a"),
    ("13", "", "--concurrency 2 --max-tries 2 --time-limit 9 --price-in 1 --price-out 1 --max-cost 1 --max-failed 1"),
    ("13", "--model m", "--golden-file a.jsonl"),
    ("14", "", "--temperature .1 --max-total-tokens 5 --guide-file a --prompts-dir a"),
    ("15", "", "--temperature .1 --max-cost 1 --prompts-dir a"),
    ("17", "", "--model a --max-length 9"),
    ("17", "--held-out 0", "--val-share .2 --test-share .2"),
    ("19", "--preview None", "--preview-rows 2"),
    *((number, "--val-file None", "--patience 2") for number in ("20", "30", "40", "41")),
    *(
        (number, "--lora-r 0", "--lora-alpha 3 --lora-targets q_proj")
        for number in ("20", "21", "30", "31", "40", "50")
    ),
    ("31", "", "--teacher-share .2 --temperature 3"),
    ("33", "--write pairs", "--best-per-prompt 2"),
    ("33", "--write best", "--pairs-per-prompt 3 --against near_miss --min-margin .5 --max-overlap .5"),
    ("50", "--rollout hf", "--vllm-mode server --vllm-memory-share .5 --vllm-server-url http://127.0.0.1:9"),
    ("50", "--rollout vllm", "--vllm-server-url http://127.0.0.1:9"),
    ("50", "--rollout vllm --vllm-mode server", "--vllm-memory-share .5"),
    ("60", "--backend hf", "--tensor-parallel 2"),
    ("60", "--backend vllm", "--device-map auto --batch-tokens 9 --attn-implementation eager"),
    ("60", "", "--force-base"),
    ("60", "--prompt hi", "--prompts-file a --max-prompts 2 --name a --output-file a.jsonl --overwrite"),
    ("60", "--interactive", "--prompts-file a --overwrite"),
    ("60", "--prompt hi --raw", "--enable-thinking"),
    ("61", "--text hi", "--output-file a.jsonl --overwrite"),
    ("61", "", "--output-file a.jsonl --overwrite"),
    ("62", "", "--enable-thinking"),
    ("70", "--nll-model=", "--dtype bfloat16 --token-budget 9 --enable-thinking"),
    ("71", "--judge rules", "--prompt-versions v2 --prompts-dir a --control 1 --temperature .5 --max-tokens 9"),
    ("71", "--judge rules", "--extra-body {} --report-only --max-cost 1 --concurrency 2 --time-limit 9"),
    ("73", "", "--machine a.jsonl --metric form --report a.json"),
    ("73", "--kind pair", "--labels a.json"),
    ("73", "--kind style", "--reference"),
    ("73", "--read a.csv", "--generations a.jsonl --reference --labels a.json --items 3 --overwrite --metric form"),
]


@pytest.mark.parametrize("number, mode, flags", UNREAD, ids=lambda value: value[:40])
def test_a_flag_that_its_mode_does_not_read_is_refused_by_name(number, mode, flags):
    mode = mode.split()
    assert "no effect" not in refusal(number, *mode), "the mode alone is fine"
    for words in re.findall(r"--\S+(?: (?!--)\S+)?", flags):
        flag = words.split()[0]
        said = refusal(number, *mode, *words.split())
        assert said.startswith(f"{flag} has no effect with") and said.endswith("; fix: leave it out"), (words, said)
