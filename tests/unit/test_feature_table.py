"""The table of features in docs/TRAINING.md: each stage that a row names takes its flag, each test that it names is
there and runs that stage with it."""

import re
import sys
from dataclasses import fields

import pytest

from common.settings import UserError, read_settings
from common.training import options
from conftest import ROOT, load_script

TEXT = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS[[row[0] for row in ROWS].index("feature") + 1 :] if len(row) == 7]
FLAGS = {row[0]: re.findall(r"`(--[^`]+)`", row[1])[:1] for row in ROWS}
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


TRAINING = ("20", "21", "30", "31", "40", "41", "42", "50", "51")


def stages_of(cell: str) -> list[str]:
    """ "20 21", "all", "all, 60" or "all but 31 51"."""
    named = re.findall(r"\b\d\d\b", cell)
    if "all but" in cell:
        return [number for number in TRAINING if number not in named]
    return [*TRAINING, *named] if "all" in cell else named


def test_the_table_is_read():
    assert len(ROWS) > 25 and sum(bool(flags) for flags in FLAGS.values()) > 20


@pytest.mark.parametrize("row", [row for row in ROWS if FLAGS[row[0]]], ids=lambda row: row[0])
def test_every_stage_takes_the_flag(row, monkeypatch):
    monkeypatch.setattr(options, "has_gpu", lambda: True)
    monkeypatch.setattr(options, "find_spec", lambda name: True)
    words = FLAGS[row[0]][0].split()
    names = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
    for number in stages_of(row[2]):
        cls = load_script(number).Settings
        assert set(names) <= {field.name for field in fields(cls)}, number
        if words[-1] not in ("--vllm-memory-share", "--general-file"):  # their values would need other flags, a file
            read_settings(cls, [*words, *(["--lora-r", "4"] if number == "31" and names != ["lora_r"] else [])])
    for number in set(TRAINING) - set(stages_of(row[2])):
        cls = load_script(number).Settings
        if set(names) <= {field.name for field in fields(cls)} and len(names) == 1:
            with pytest.raises((UserError, SystemExit)):  # the table leaves out no stage that would take it
                read_settings(cls, words)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_test_that_is_named_is_there(row):
    cell = row[3]
    for name in re.findall(r"`(test_\w+)`", cell):
        assert f"def {name}(" in TESTS, name
    flag = FLAGS[row[0]][0] if FLAGS[row[0]] else ""
    if "two steps" in cell:
        sys.modules.pop("test_variants", None)
        from test_variants import KINDS

        name, _, value = flag.removeprefix("--").partition(" ")
        runs = {stage[:2] for stage, kind in KINDS if name in kind and str(kind[name]) == value}
        numbers = stages_of(re.search(r"two steps \(([^)]+)\)", cell)[1])
        assert set(numbers) <= runs, (flag, runs)
    if "certificate" in cell and flag:
        from test_adapters import VARIANTS

        name, _, value = flag.removeprefix("--").partition(" ")
        told = [
            str(kind[key][0] if isinstance(kind[key], tuple) else kind[key])
            for kind in VARIANTS.values()
            for key in kind
            if key == name.replace("-", "_")
        ]
        assert value in told
    if "hand" in cell:
        losses = (ROOT / "tests" / "stages" / "test_losses.py").read_text(encoding="utf-8")
        name = flag.split()[0][2:].replace("-", "_")
        assert name in losses, name
