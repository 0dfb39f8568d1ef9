"""Every recipe in every profile: its commands have only flags that their stages know, and read what earlier ones
wrote."""

import os
import re
import shlex
import subprocess

import pytest

from common.settings import read_settings
from conftest import ROOT, load_script

PROFILES = {
    recipe.stem: (re.findall(r'^start \w+ "?([\w. -]+?)"? "\$@"', recipe.read_text(encoding="utf-8"), re.MULTILINE))
    for recipe in sorted((ROOT / "runs").glob("*.sh"))
}
CASES = [
    (recipe, profile, quick)
    for recipe, found in PROFILES.items()
    for profile in (found[0].split() if found else [])
    for quick in ((), ("--quick",))
]
WRITTEN = ("--output-dir", "--output-file", "--output", "--output_dir", "--preview", "--request-log")


def commands(recipe: str, *words: str) -> list[list[str]]:
    """The command lines that `--print` shows, each as words; the environment names no file or model of the user's."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        ["bash", str(ROOT / "runs" / f"{recipe}.sh"), *words, "--print"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("python ")]


def test_there_is_one_recipe_for_each_job():
    assert {"poems", "weibo", "copywriting", "styles", "chat"} <= {
        recipe for recipe, found in PROFILES.items() if found
    }
    assert len(CASES) > 20


@pytest.mark.parametrize("recipe, profile, quick", CASES)
def test_a_recipe_knows_its_stages(recipe, profile, quick, capsys, monkeypatch):
    # the large profiles are for machines with a GPU and vLLM, which the flags alone are refused without
    monkeypatch.setattr("common.training.options.has_gpu", lambda: True)
    monkeypatch.setattr("common.training.options.find_spec", lambda name: True)
    written, stages = [], 0
    for words in commands(recipe, profile, *quick):
        script, flags = words[0], words[1:]
        if script.startswith("scripts/"):
            stages += 1
            try:
                read_settings(load_script(script.removeprefix("scripts/")).Settings, flags)
            except SystemExit:
                pytest.fail(f"{' '.join(words)}\n{capsys.readouterr().err}")
        else:
            assert (ROOT / script).exists()
        for flag, value in zip(flags, [*flags[1:], ""], strict=True):
            made = value.startswith(("processed_data/", "checkpoints/", "results/"))
            if made and flag.startswith("--") and flag not in WRITTEN:
                near = any(value.startswith(path) or path.startswith(f"{value}/") for path in written)
                assert near, f"nothing before it writes {value}: {' '.join(words)}"
        written += [value for flag, value in zip(flags, [*flags[1:], ""], strict=True) if flag in WRITTEN]
        written += [value.replace("{name}", "") for value in written if "{name}" in value]
    assert stages > 3


def test_an_unknown_word_names_the_profiles():
    done = subprocess.run(["bash", str(ROOT / "runs" / "weibo.sh"), "huge"], capture_output=True, text=True)
    assert done.returncode == 2 and "unknown word huge; fix: one of tiny small 4b" in done.stderr


def test_a_ctrl_c_that_a_stage_did_not_see_ends_the_recipe():
    """bash goes on with the next stage where the one that runs ends as if nothing had happened."""
    stage = "import os, signal; signal.signal(2, signal.SIG_IGN); os.kill(os.getppid(), 2)"
    lines = f"source runs/setup.sh; python -c '{stage}'; echo next"
    done = subprocess.run(["bash", "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and "next" not in done.stdout


def test_what_stages_import_is_kept_compiled_where_the_machine_says_not_to():
    lines = "source runs/setup.sh; python -c 'import sys; print(sys.dont_write_bytecode)'"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["bash", "-c", lines], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_no_line_of_a_recipe_is_longer_than_120_characters():
    for path in sorted(path for path in (ROOT / "runs").iterdir() if path.is_file()):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{path.name}:{number}"
