"""What holds for every stage: its help, its docstring, its settings, its independence of the folder."""

import ast
import resource
import subprocess
import sys

import pytest

from conftest import ROOT, SCRIPTS

STAGES = sorted(path.name for path in SCRIPTS.glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("name", STAGES)
def test_help_answers_at_once_from_any_folder(name, tmp_path):
    def cpu_seconds() -> float:  # what the command costs, whatever else the machine does meanwhile
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = cpu_seconds()
    done = subprocess.run([sys.executable, str(SCRIPTS / name), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cpu_seconds() - before < 0.7
    writes_no_run = name in ("19_check_data.py", "62_serve.py")
    for part in ("Reads", "Writes", "Run", "--help" if writes_no_run else "--overwrite"):
        assert part in done.stdout


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_says_what_it_means(name):
    source = (SCRIPTS / name).read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    settings = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    silent = [
        node.target.id
        for node in settings.body
        if isinstance(node, ast.AnnAssign) and "  # " not in lines[node.end_lineno - 1]
    ]
    assert not silent, f"settings without a comment behind them: {silent}"


@pytest.mark.parametrize("name", STAGES)
def test_an_unknown_flag_names_the_nearest(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), "--sede", "1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown flag --sede; did you mean --" in done.stderr and "Traceback" not in done.stderr


def test_no_stage_is_longer_than_agreed():
    # whole training loops, a service, a judge, a report
    limits = dict.fromkeys(
        ("00_pretrain_tiny.py", "51_train_ppo.py", "62_serve.py", "71_judge.py", "72_compare.py"), 350
    )
    lengths = {name: len((SCRIPTS / name).read_text(encoding="utf-8").splitlines()) for name in STAGES}
    assert {name: length for name, length in lengths.items() if length > limits.get(name, 220)} == {}


def test_files_are_opened_with_their_encoding():
    """`open()` without encoding reads by the locale: GBK on a Chinese Windows."""
    for path in [*SCRIPTS.rglob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("data/*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            mode = next(
                (
                    a.value
                    for a in node.args[name == "open" and isinstance(node.func, ast.Name) :]
                    if isinstance(a, ast.Constant) and isinstance(a.value, str)
                ),
                "r",
            )
            if name in ("read_text", "write_text") or (name == "open" and "b" not in mode):
                assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{path.name}:{node.lineno}"
