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
from common.training import options
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


ALL, HEADLESS = ("20", "21", "30", "31", "40", "41", "42", "50", "51"), ("20", "21", "30", "40", "41", "42", "50")
# stages, flags that cannot go together, and what is said; "exit 2" is tyro's: it names the choices
TOGETHER = [
    (HEADLESS, "--quantize 4bit --lora-r 0", "--lora-r 0 trains all weights, and --quantize 4bit is given"),
    (HEADLESS, "--lora-r 0 --lora-variant dora", "--lora-r 0 trains all weights, and --lora-variant dora is given"),
    (HEADLESS, "--lora-r 0 --lora-plus-ratio 16", "--lora-r 0 trains all weights, and --lora-plus-ratio 16.0 is given"),
    (HEADLESS, "--lora-r 0 --modules-to-save norm", "--lora-r 0 trains all weights, and --modules-to-save norm"),
    (HEADLESS, "--lora-r 0 --lora-dropout 0.1", "--lora-r 0 trains all weights, and --lora-dropout 0.1 is given"),
    (ALL, "--lora-r 4 --lora-variant pissa --quantize 4bit", "--lora-variant pissa with --quantize 4bit: "),
    (ALL, "--lora-r 4 --lora-variant dora --quantize 8bit", "--lora-variant dora with --quantize 8bit: "),
    (ALL, "--lora-r 4 --quantize 8bit --modules-to-save o_proj", "--modules-to-save o_proj with --quantize 8bit: "),
    (("40", "41", "50", "51"), "--lora-variant pissa", "--lora-variant pissa: the reference is the base"),
    ((*ALL, "60"), "--attn-implementation flash_attention_2", "--attn-implementation flash_attention_2 needs a GPU"),
    (HEADLESS, "--liger", "--liger: its kernels run on a GPU only"),
    (HEADLESS, "--optim paged_adamw_8bit", "--optim paged_adamw_8bit: pages between GPU"),
    (HEADLESS, "--optim sgd9", "exit 2"),
    (HEADLESS, "--lora-plus-ratio 0.5", "--lora-plus-ratio 0.5: B learns faster than A"),
    (("20",), "--neftune-alpha -1", "--neftune-alpha -1.0: has to be"),
    (("20",), "--loss nothing", "exit 2"),
    (("20", "60"), "--device-map cpu9", "--device-map cpu9: unknown"),
    (
        ("20", "21", "40", "41", "42", "50"),
        "--train-tokens <s> --modules-to-save embed_tokens",
        "--train-tokens <s> with --modules-to-save embed_tokens",
    ),
    (("40",), "--loss-types simpo --beta 0", "--beta 0.0: has to be above 0"),
    (("40",), "--loss-types simpo sigmoid --loss-weights 1 1", "--loss-types simpo sigmoid: sigmoid compares with"),
    (("40",), "--simpo-gamma 1", "--simpo-gamma has no effect without --loss-types simpo"),
    (("40",), "--loss-types simpo sft", "--loss-types simpo sft, --loss-weights 1.0; "),
    (("40",), "--label-smoothing 0.1", "--label-smoothing 0.1: not read by sigmoid"),
    (("41",), "--batch-size 1", "--batch-size 1: has to be 2 or more"),
    (("42",), "--own-share 0 --max-new-tokens 9", "--max-new-tokens has no effect with --own-share 0"),
    (("50",), "--rollout vllm", "--rollout vllm: "),
    (("50",), "--ratio sequence", "--ratio sequence with --loss-type dapo: "),
    (("50",), "--clip-high 0.1", "--clip-high 0.1: below --clip 0.2"),
    (("50",), "--num-generations 1", "--num-generations 1: has to be 2 or more"),
    (("50", "51"), "--temperature 0", "--temperature 0.0: has to be above 0"),
    (("60",), "--quantize 4bit --backend vllm", "--quantize 4bit: vLLM would load the whole base"),
]


@pytest.mark.parametrize("stages, words, message", TOGETHER, ids=[row[1] for row in TOGETHER])
def test_what_cannot_go_together_is_told_before_anything_is_loaded(stages, words, message, monkeypatch):
    """By the flags alone, as soon as they are read: no stage's main begins."""
    monkeypatch.setattr(options, "has_gpu", lambda: False)
    for number in stages:
        said = refusal(number, *words.split())
        assert said.startswith(message) and "\n" not in said, (number, said)
