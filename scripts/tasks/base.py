"""The contract of a writing job: what scripts/tasks/<name>/__init__.py exports, checked when a stage loads it.

A measure (a metric or a reward) is f(prompts, completions, meta, **_) -> one float or None a completion. A prompt is
the text of the last user turn, a completion the text that answers it, meta the row's object. A measure that needs the
earlier turns takes the keyword `conversations`: the prompts as lists of messages. None means that the measure does not
apply; it never counts as 0. docs/ARCHITECTURE.md shows a whole job ("A new writing job").
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from common.settings import ROOT, UserError, next_command, show_path

Measure = Callable[..., list[float | None]]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Field:
    """What the page of stage 63 asks for: one value of the row that `messages` takes."""

    label: str
    """as the page shows it"""
    choices: tuple[str, ...] = ()
    """what may be chosen; empty = free text"""
    many: bool = False
    """several choices: the value is a list"""


@dataclass(frozen=True)
class RewardExample:
    """Two answers to one request. Before stages 33, 50 and 51 start, every reward named here must give the good one
    more."""

    rewards: tuple[str, ...]
    """names in REWARDS"""
    good: str
    bad: str
    meta: dict = field(default_factory=dict)
    prompt: str = ""
    """the text of the last user turn"""


@dataclass(frozen=True)
class Task:
    """A loaded job. `name` and `file` apart, every field is an export of its module; those with a default may be left
    out."""

    name: str
    file: Path
    messages: Callable
    """f(row of the job's own data) -> the chat messages that ask for the text"""
    METRICS: dict[str, Measure]
    """what stage 70 measures"""
    REWARDS: dict[str, Measure]
    """what stages 33, 50 and 51 may reward"""
    DEFAULT_REWARDS: tuple[str, ...] = ()
    """what they reward where no flag says otherwise, as NAME[:WEIGHT]; left out: all of REWARDS"""
    WATCHED_REWARDS: tuple[str, ...] = ()
    """what stage 51 logs and does not learn from"""
    STEP_REWARDS: dict[str, Callable] = field(default_factory=dict)
    """name in REWARDS -> f(prompts, completions, meta, **_): for each completion [(offset, value), ...], what of that
    reward is earned once text[:offset] is written; stage 51 pays it there, and what is left of the reward at the
    end"""
    REWARD_EXAMPLES: tuple[RewardExample, ...] = ()
    """known good and bad answers: the self-test of rewards"""
    SET_METRICS: dict[str, Callable] = field(default_factory=dict)
    """name -> f(completions) -> one float for a whole set of texts, such as distinct-2"""
    COLUMNS: tuple[str, ...] = ()
    """metrics that the tables of stage 72 show first; the rest stands behind a switch. Left out: all"""
    LOWER_IS_BETTER: tuple[str, ...] = ()
    """metrics of which less is better"""
    JUDGE: dict[str, Measure] = field(default_factory=dict)
    """dimension -> measure for stage 71 --judge rules; left out: the metrics with Chinese names, or `overall`"""
    judge_prompt: Callable = lambda meta: None
    """f(meta) -> which file of data/<task>/judge_prompts/<version> judges a row; None where there is only one"""
    mark: Callable = lambda text, meta: []
    """f(text, meta) -> spans (start, end, label) that the page of stage 72 highlights, in order, not overlapping"""
    FIELDS: dict[str, Field] = field(default_factory=dict)
    """name in the row of `messages` -> what the page of stage 63 asks for"""
    FILES: tuple[Path, ...] = ()
    """files besides the module that the metrics depend on: when one changes, earlier scores are stale"""

    def fill_in(self, settings: Any) -> Any:
        """Settings with the job's own rewards where no flag names any: what the run record then shows."""
        chosen = {"rewards": self.DEFAULT_REWARDS, "watch": self.WATCHED_REWARDS}
        return replace(settings, **{k: v for k, v in chosen.items() if getattr(settings, k, None) == ()})

    @property
    def sources(self) -> dict[str, Path]:
        """The files that a score depends on, for a run record."""
        files = (Path(__file__).with_name("text_metrics.py"), *self.FILES)
        return {"metrics": self.file, **{f"metrics: {file.name}": file for file in files}}


def load_task(name: str) -> Task:
    """The job in tasks/<name>/__init__.py, its exports checked. Raises UserError naming the file and what is wrong in
    it."""
    import tasks  # a namespace package: folders named tasks on PYTHONPATH count, too

    spec = importlib.util.find_spec(f"tasks.{name}") if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations or not spec.origin:
        known = ", ".join(module.name for module in pkgutil.iter_modules(tasks.__path__) if module.ispkg)
        raise UserError(f"unknown task {name!r}; fix: use one of {known}, or write scripts/tasks/{name}/__init__.py")
    file = Path(spec.origin)
    try:
        module = importlib.import_module(f"tasks.{name}")
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise UserError(_import_fault(file, error)) from error

    exports = {}
    for export, kind in get_type_hints(Task).items():
        if export in ("name", "file"):
            continue
        if hasattr(module, export):
            exports[export] = getattr(module, export)
            if fault := _fault(export, exports[export], kind):
                raise UserError(f"{show_path(file)}: {fault}")
        elif _is_required(export):
            raise UserError(f"{show_path(file)}: no {export}; fix: add {EXAMPLES[export]}")
    exports["DEFAULT_REWARDS"] = tuple(exports.get("DEFAULT_REWARDS", exports["REWARDS"]))
    task = Task(name, file, **exports)
    for export in ("DEFAULT_REWARDS", "WATCHED_REWARDS"):
        for spec in getattr(task, export):
            if "=" not in spec and spec.rpartition(":")[0] not in task.REWARDS and spec not in task.REWARDS:
                raise UserError(
                    f"{show_path(file)}: {export} names {spec!r}, which is not in REWARDS; fix: "
                    f"{', '.join(task.REWARDS)}"
                )
    named = [("STEP_REWARDS", name) for name in task.STEP_REWARDS]
    named += [("REWARD_EXAMPLES", name) for example in task.REWARD_EXAMPLES for name in example.rewards]
    for export, name in named:
        if name not in task.REWARDS:
            raise UserError(
                f"{show_path(file)}: {export} names {name!r}, which is not in REWARDS; fix: {', '.join(task.REWARDS)}"
            )
    return task


EXAMPLES = {
    "messages": 'def messages(row): return [{"role": "user", "content": row["question"]}]',
    "METRICS": 'METRICS = {"length": length}, with def length(prompts, completions, meta, **_)',
    "REWARDS": 'REWARDS = {"length": length}, with def length(prompts, completions, meta, **_)',
}


def _is_required(export: str) -> bool:
    part = next(part for part in fields(Task) if part.name == export)
    return part.default is MISSING and part.default_factory is MISSING


def _import_fault(file: Path, error: Exception) -> str:
    """The place in the job's own files where an import failed, and why."""
    if isinstance(error, SyntaxError):
        return f"{show_path(error.filename or file)}:{error.lineno}: {error.msg}; fix: correct the line"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(file.parent)]
    place = f"{show_path(frames[-1].filename)}:{frames[-1].lineno}" if frames else show_path(file)
    fix = f"pip install {error.name}" if isinstance(error, ModuleNotFoundError) else "correct the line"
    return f"{place}: {type(error).__name__}: {error}; fix: {fix}"


def _fault(export: str, value: Any, kind: Any) -> str | None:
    """What is wrong with the value of an export, or None. `kind` is the type of its field in Task."""
    is_a = f"{export} is a {type(value).__name__}"
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if not isinstance(value, tuple | list) or not all(isinstance(part, item) for part in value):
            return f"{is_a}, or holds something else than {item.__name__}; fix: write ({item.__name__}, ...)"
        missing = [part for part in value if isinstance(part, Path) and not part.is_file()]
        return f"{export} names {missing[0]}: no such file; fix: correct the path" if missing else None
    if get_origin(kind) is not dict:
        return None if callable(value) else f"{is_a}, not a function; fix: def {export}(...)"
    if not isinstance(value, dict):
        return f"{is_a}, not a dict; fix: write {{name: {'Field' if export == 'FIELDS' else 'function'}}}"
    if export == "FIELDS":
        wrong = [name for name, part in value.items() if not isinstance(name, str) or not isinstance(part, Field)]
        return f'FIELDS[{wrong[0]!r}] is not a Field; fix: Field("label", ("a choice", ...))' if wrong else None
    for name, function in value.items():
        if not isinstance(name, str) or not callable(function):
            return f"{export}[{name!r}] is a {type(function).__name__}, not a function; fix: name a function"
        arguments = ("completions",) if export == "SET_METRICS" else ("prompts", "completions", "meta", "**_")
        try:
            if export == "SET_METRICS":
                inspect.signature(function, follow_wrapped=False).bind([])
            else:
                inspect.signature(function, follow_wrapped=False).bind([], [], [], conversations=[])
        except TypeError:
            return f"{export}[{name!r}] takes other arguments; fix: def {name}({', '.join(arguments)})"
    return None


# --- what the stages share that prepare a job's files


def text_id(*texts: str) -> str:
    """The id of a row, decided by its texts alone."""
    return hashlib.sha256("\n".join(texts).encode("utf-8")).hexdigest()[:12]


def answer(text: str) -> list[dict]:
    """A text as completion, chosen or rejected."""
    return [{"role": "assistant", "content": text}]


def write_splits(splits: dict[str, dict[str, Iterable[dict]]], output_dir: Path) -> dict[str, dict[str, int]]:
    """Write {"train": {"sft": rows, "pref": rows, "prompts": rows}, "val": ...} as sft_train.jsonl and so on; the
    number of rows of each.

    An empty list gives no file; an iterator always gives one, because only reading it tells whether it holds a row.
    """
    from common.jsonl import write_jsonl

    return {
        split: {
            name: write_jsonl(output_dir / f"{name}_{split}.jsonl", rows) if rows else 0 for name, rows in files.items()
        }
        for split, files in splits.items()
    }


def check_command(output_dir: Path, **flags) -> str:
    """The command of stage 19 for the SFT files that were written."""
    files = {f"{split}_file": output_dir / f"sft_{split}.jsonl" for split in ("train", "val")}
    return next_command("19_check_data", **flags, **files)


def score_command(name: str, generations: Path) -> str:
    """The command of stage 70 for a file of generations. A name that only names folders is scored as chat."""
    if name.isidentifier() and importlib.util.find_spec(f"tasks.{name}"):
        return next_command("70_score", task=name, generations=generations)
    scores = ROOT / "results" / name / "scores"
    return next_command("70_score", task="chat", generations=generations, output_dir=scores)
