"""The contract of a writing job: what is missing or wrong in a job's module is told in one line, with its file."""

import hashlib
import sys

import pytest

import tasks
from common.evaluation.scoring import measured
from common.jsonl import read_jsonl
from common.settings import UserError
from common.training.classifiers import classifier_text
from tasks.base import load_task, write_splits
from tasks.poems.prosody import tone_of
from tasks.text_metrics import distinct_share, han_only, mean_of, near_copy, ratio_to_range

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


# --- what jobs share


def test_no_row_moves_between_splits():
    """Each job's rule, written here once more."""
    from tasks.poems.corpus import split_of as of_poem
    from tasks.styles import split_of as of_answer
    from tasks.weibo.cleaning import split_of as of_post

    texts = [f"第{number}首" for number in range(400)]
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    buckets = [int(digest[:8], 16) % 100 for digest in digests]
    assert [of_poem(text) for text in texts] == ["test" if b < 2 else "val" if b < 4 else "train" for b in buckets]
    assert [of_post(text, 7) for text in texts] == ["test" if b < 7 else "val" if b < 14 else "train" for b in buckets]
    places = [int(hashlib.sha256(f"styles-77 {text}".encode()).hexdigest()[:8], 16) / 2**32 for text in texts]
    assert [of_answer(text) for text in texts] == [
        "val" if p < 0.15 else "test" if p < 0.3 else "train" for p in places
    ]


def test_measures_made_of_parts():
    half, none = (lambda p, c, m, **_: [0.5] * len(c)), (lambda p, c, m, **_: [None] * len(c))
    assert mean_of(half, none)([], ["a"], [{}]) == [0.5] and mean_of(none)([], ["a"], [{}]) == [None]
    assert mean_of(half, none, all_known=True)([], ["a"], [{}]) == [None]
    copied = near_copy(lambda: ["床前明月光，疑是地上霜"], 5, han_only)
    assert copied([], ["明月光疑是", "明月，光疑是", "明月光", ""], [{}] * 4) == [1, 1, 0, 0]
    assert distinct_share("哈哈哈哈哈", 2) == 0.25 and distinct_share("哈", 2) is None
    assert [ratio_to_range(count, 10, 20) for count in (0, 5, 10, 20, 40)] == [0, 0.5, 1, 1, 0.5]
    assert han_only("〇㐀一𠀀a1，は") == "〇㐀一𠀀"


def test_the_tone_of_a_character():
    assert [tone_of(char) for char in "春月回a"] == ["平", "仄", None, None]


def test_style_classifiers_and_weibo_see_every_turn():
    turns = [{"role": "system", "content": "简短。"}, {"role": "user", "content": "请用“诚实”的风格回答：贵吗？"}]
    assert (
        classifier_text(turns[1]["content"], "贵。")
        == "用户问题：贵吗？\n回答：贵。"
        == classifier_text(turns[1:], "贵。")
    )
    later = [*turns, {"role": "assistant", "content": "贵。"}, {"role": "user", "content": "为什么？"}]
    assert (
        classifier_text(later, "料好。")
        == "系统：简短。\n用户问题：贵吗？\n回答：贵。\n用户问题：为什么？\n回答：料好。"
    )
    post = [{"role": "user", "content": "今天的晚霞真是美得不像话"}, {"role": "assistant", "content": "是"}]
    copy, reward = "今天的晚霞真是美得不像话", load_task("weibo").REWARDS["no_copy"]
    assert measured(reward, [[*post, {"role": "user", "content": "再说一句"}]], [copy], [{}]) == [0.0]
