"""The contract of a writing job: what is missing or wrong in a job's module is told in one line, with its file."""

import sys

import pytest

import tasks
from common.evaluation.scoring import measured
from common.jsonl import read_jsonl
from common.settings import UserError
from tasks.base import load_task, write_splits

JOBS = ("chat", "copywriting", "poems", "styles", "weibo")
GOOD = """
def messages(row): return [{"role": "user", "content": row["question"]}]
def short(prompts, completions, meta, **_): return [float(len(text) < 9) for text in completions]
METRICS = REWARDS = {"short": short}
"""


@pytest.fixture
def write_job(tmp_path, monkeypatch):
    """A job of these lines, in a folder `tasks` of its own as a user may keep it on PYTHONPATH."""
    folder = tmp_path / "tasks" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder.parent)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text: str, **others: str):
        for name in [name for name in sys.modules if name.startswith("tasks.mine")]:
            del sys.modules[name]
        for name, content in {"__init__": text, **others}.items():
            (folder / f"{name}.py").write_text(content, encoding="utf-8")
        return load_task("mine")

    yield write
    for name in [name for name in sys.modules if name.startswith("tasks.mine")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", JOBS)
def test_the_shipped_jobs_keep_the_contract(name):
    task = load_task(name)
    assert task.DEFAULT_REWARDS and set(task.WATCHED_REWARDS) <= set(task.REWARDS) and task.SET_METRICS
    assert task.sources["metrics"] == task.file and all(path.is_file() for path in task.sources.values())


def test_what_a_job_leaves_out_has_a_default(write_job):
    task = write_job(GOOD)
    assert task.DEFAULT_REWARDS == ("short",) and task.WATCHED_REWARDS == () and task.SET_METRICS == {}
    assert task.mark("text", {}) == [] and task.judge_prompt({}) is None and task.name == "mine"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("del messages", "no messages; fix: add def messages(row)"),
        ("del METRICS", "no METRICS; fix: add METRICS = "),
        ("del REWARDS", "no REWARDS; fix: add REWARDS = "),
        ("METRICS = [short]", "METRICS is a list, not a dict; fix: "),
        ("METRICS = {'short': 1.5}", "METRICS['short'] is a float, not a function"),
        ("METRICS = {'short': lambda text: 1.0}", "METRICS['short'] takes other arguments; fix: def short(prompts, "),
        ("REWARDS = {'short': lambda prompts, completions, meta: []}", "REWARDS['short'] takes other arguments"),
        ("SET_METRICS = {'d': lambda a, b: 1}", "SET_METRICS['d'] takes other arguments; fix: def d(completions)"),
        ("messages = 'text'", "messages is a str, not a function"),
        ("DEFAULT_REWARDS = ('short:2', 'long')", "DEFAULT_REWARDS names 'long', which is not in REWARDS; fix: short"),
        ("WATCHED_REWARDS = ('long',)", "WATCHED_REWARDS names 'long'"),
        ("DEFAULT_REWARDS = ('short')", "DEFAULT_REWARDS is a str"),
        ("FILES = ('a.json',)", "FILES is a tuple, or holds something else than Path"),
        ("import pathlib; FILES = (pathlib.Path('/nowhere.json'),)", "FILES names /nowhere.json: no such file"),
    ],
)
def test_what_is_wrong_in_a_job_is_named_with_its_file(write_job, lines, message):
    with pytest.raises(UserError) as error:
        write_job(f"{GOOD}\n{lines}\n")
    assert "tasks/mine/__init__.py: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import json\n\nrate = 1 / 0\n", "__init__.py:3: ZeroDivisionError: division by zero; fix: correct the line"),
        ("x = 1\ndef f(:\n", "__init__.py:2: invalid syntax; fix: correct the line"),
        (
            "import no_such_library\n",
            "__init__.py:1: ModuleNotFoundError: No module named 'no_such_library'; fix: pip ",
        ),
        ("\nfrom tasks.mine import words\n", "words.py:2: NameError: name 'lists' is not defined"),
    ],
)
def test_an_error_in_the_users_own_module_is_told_with_file_and_line(write_job, text, message):
    with pytest.raises(UserError) as error:
        write_job(text, words="a = 1\nb = lists\n")
    assert f"tasks/mine/{message}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["verse", "base", "poems.prosody", "../poems", ""])
def test_an_unknown_job_names_those_that_are_there(name):
    with pytest.raises(UserError, match="unknown task .*; fix: use one of .*copywriting.*poems"):
        load_task(name)


def test_a_measure_sees_the_last_turn_and_the_whole_conversation():
    def earlier(prompts, completions, meta, conversations, **_):
        return [prompts, [len(turns) for turns in conversations]]

    turns = [{"role": "user", "content": text} for text in ("山", "水")]
    assert measured(earlier, [turns], ["火"], [{}]) == [["水"], [2]]


def test_splits_are_written_and_an_empty_list_gives_no_file(tmp_path):
    row = {"prompt": [], "meta": {}}
    counts = write_splits({"train": {"sft": [row, row], "pref": []}, "val": {"sft": iter(())}}, tmp_path)
    assert counts == {"train": {"sft": 2, "pref": 0}, "val": {"sft": 0}}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sft_train.jsonl", "sft_val.jsonl"]
    assert read_jsonl(tmp_path / "sft_train.jsonl") == [row, row]
