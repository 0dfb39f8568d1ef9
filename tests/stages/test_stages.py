"""What holds for every stage: its help, its docstring, its settings, its independence of the folder."""

import ast
import os
import re
import resource
import subprocess
import sys
import tempfile
from functools import cache

import pytest

from conftest import ROOT, SCRIPTS

STAGES = sorted(path.name for path in SCRIPTS.glob("[0-9][0-9]_*.py"))


def docstrings_of(name: str, kind: str = "Settings", inherited: bool = True) -> dict[str, str]:
    """Field of a stage's Settings -> the docstring line behind it, empty where there is none. What it inherits stands
    in scripts/common/."""
    tree = ast.parse((SCRIPTS / name).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    body, texts = found.body, {}
    for base in found.bases if inherited else ():
        shared = [path for path in (SCRIPTS / "common").rglob("*.py") if f"class {base.id}" in path.read_text("utf-8")]
        texts |= docstrings_of(shared[0].relative_to(SCRIPTS), base.id)
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            texts[node.target.id] = after.value.value if is_text else ""
    return texts


@cache
def help_of(name: str) -> tuple[subprocess.CompletedProcess, float]:
    """--help in long lines, asked once, from a folder outside the repo; and the CPU seconds that it took."""

    def cpu_seconds() -> float:  # what the command costs, whatever else the machine does meanwhile
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, command = cpu_seconds(), [sys.executable, str(SCRIPTS / name), "--help"]
    environment = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(command, cwd=tempfile.gettempdir(), env=environment, capture_output=True, text=True)
    return done, cpu_seconds() - before


@pytest.mark.parametrize("name", STAGES)
def test_help_answers_at_once_from_any_folder(name):
    done, seconds = help_of(name)
    assert done.returncode == 0, done.stderr
    assert seconds < 0.7
    writes_no_run = name in ("19_check_data.py", "62_serve.py", "63_chat.py")
    for part in ("Reads", "Writes", "Run", "--help" if writes_no_run else "--overwrite"):
        assert part in done.stdout


@pytest.mark.parametrize("name", STAGES)
def test_help_of_every_flag_is_the_line_behind_its_field(name):
    """No flag without help, and none with a neighbour's."""
    lines = docstrings_of(name)
    assert [field for field, text in lines.items() if not text] == [], "settings without a docstring line behind them"
    shown = re.sub(r"[\s│]+", " ", help_of(name)[0].stdout.split("usage:", 1)[1])
    for field, text in lines.items():
        flag = re.escape("--" + field.replace("_", "-"))
        # the flag, its kind of value, its text, and whether it has a default: nothing else in between
        kind = r"(?:, --no-[\w-]+)? (?:\S+ |\[[^\]]+\]+ |\{[^}]*\} )?"
        assert re.search(flag + kind + re.escape(" ".join(text.split())), shown), f"--help of {field} is not {text!r}"


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
        ("00_pretrain_tiny.py", "51_train_ppo.py", "62_serve.py", "71_judge.py", "72_compare.py"), 345
    )
    lengths = {}
    for name in STAGES:  # what explains is not counted: the docstring of the stage and the lines behind its settings
        text = (SCRIPTS / name).read_text(encoding="utf-8")
        explained = [ast.get_docstring(ast.parse(text), clean=False), *docstrings_of(name, inherited=False).values()]
        lengths[name] = len(text.splitlines()) - sum(len(lines.splitlines()) for lines in explained)
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


def calls_in(tree: ast.AST, within: bool = False):
    """(name, whether it stands inside `with settings_errors(...)`) of every call."""
    for node in ast.iter_child_nodes(tree):
        inside = within
        if isinstance(node, ast.With):
            names = [getattr(item.context_expr, "func", None) for item in node.items]
            inside = within or any(isinstance(name, ast.Name) and name.id == "settings_errors" for name in names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, inside
        yield from calls_in(node, inside)


@pytest.mark.parametrize("name", STAGES)
def test_what_a_trainer_says_about_a_setting_is_one_line(name):
    """Constructors of libraries stand inside settings_errors: what they raise becomes a line with the flag's name."""
    for called, within in calls_in(ast.parse((SCRIPTS / name).read_text(encoding="utf-8"))):
        if called.endswith("Trainer") or called in ("get_peft_model", "ActorCritic"):
            assert within, f"{called} is built outside settings_errors"
