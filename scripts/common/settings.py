"""The settings of a stage: one dataclass, read from the command line."""

import errno
import logging
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar, get_type_hints

ROOT = Path(__file__).resolve().parents[2]

# A model name that starts with one of these is meant as a folder, never as a hub id.
LOCAL_FOLDERS = ("checkpoints", "data", "processed_data", "results")

# Seconds that the other processes of a launch leave to the first one to say what is wrong with the inputs that all of
# them read.
PATIENCE = 30

T = TypeVar("T")


class Limit(NamedTuple):
    """The values that a numeric setting may hold, besides its default: `r: Annotated[float, Limit(above=0)] = 1.0`."""

    low: float = 0  # smallest
    high: float = math.inf  # largest
    above: float = -math.inf  # smaller than all of them
    below: float = math.inf  # larger than all of them

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        low = f"above {self.above:g}" if self.above > -math.inf else f"{self.low:g} or more"
        high = f", below {self.below:g}" if self.below < math.inf else f", at most {self.high:g}"
        return low + ("" if math.isinf(self.below) and math.isinf(self.high) else high)


_COUNT, _POSITIVE, _SHARE = Limit(1), Limit(above=0), Limit(high=1)
# settings that are counts of something: 1 or more
_COUNTED = """
    accumulation batch_size batch_texts batch_tokens bootstrap checkpoint_every concurrency eval_every
    eval_poems eval_samples eval_steps heads hidden_size intermediate_size iterations kv_heads layers
    lora_alpha lora_r max_batch_texts max_body_bytes max_length max_new_tokens max_position max_steps
    max_text_chars max_tokens max_tries max_waiting micro_tokens minibatches num_samples
    per_device_eval_batch_size per_device_train_batch_size probe_tokens samples tensor_parallel token_budget
    train_tokens workers
"""
# Limits by a setting's name, the same in every stage. A number that is not here has to be 0 or more. No setting may
# be NaN or infinite, and each may hold its default: the sign for "off" (-1, 0) is one. A field's own Limit goes first.
LIMITS = {
    **dict.fromkeys(_COUNTED.split(), _COUNT),
    **dict.fromkeys(
        ("clip", "epochs", "learning_rate", "lr", "memory_gib", "num_train_epochs", "time_limit", "value_lr"), _POSITIVE
    ),
    **dict.fromkeys(("chatml_share", "decay_share", "gamma", "lam", "max_overlap", "teacher_share"), _SHARE),
    **dict.fromkeys(("label_smoothing", "lora_dropout", "test_share", "val_share", "warmup_share"), Limit(below=1)),
    "min_margin": Limit(low=-math.inf),
    "min_p": Limit(high=1),
    "num_generations": Limit(2),
    "num_samples": Limit(1, 100_000),
    "port": Limit(high=65535),
    "seed": Limit(high=2**32 - 1),  # numpy takes no other
    "top_p": Limit(above=0, high=1),
    # memory and time: more than this is a slip of the finger
    "bootstrap": Limit(1, 10**6),
    **dict.fromkeys(("layers", "workers"), Limit(1, 4096)),
    "threads": Limit(high=4096),
}

# Beyond these a number makes sense nowhere, and a library would fail on it in its own words (logits / 1e-40).
LEAST, MOST = 1e-12, {float: 1e30, int: 10**12, bool: 1}
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Where a run may report to, and the package that this needs.
_OWN_NAME = ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "neptune", "swanlab", "tensorboard")
REPORTERS = {"none": "", "all": "", "azure_ml": "azureml", "flyte": "flytekit"}
REPORTERS |= {name: name for name in (*_OWN_NAME, "trackio", "wandb")}

# What went wrong with a file, and how to fix it: errors of the system that a user can do something about.
OS_ERRORS = {
    errno.ENOSPC: ("no space is left on the disk", "free some space, then run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then run the same command again"),
    errno.EFBIG: ("the file is larger than the system allows", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "name an output elsewhere"),
    errno.EACCES: ("permission denied", "change its rights (chmod), or name another"),
    errno.EPERM: ("operation not permitted", "change its rights (chmod, chattr), or name another"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "name another"),
    errno.ELOOP: ("a link that leads to itself", "name the file itself"),
    errno.EISDIR: ("is a folder, not a file", "name a file"),
    errno.EEXIST: ("a file of this name is in the way", "name another"),
    errno.ENOENT: ("no such file or folder", "run the stage that writes it, or name another"),
    errno.ENAMETOOLONG: ("the name is too long", "name a shorter one"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.EIO: ("the disk reports an error", "check the disk, or name an output elsewhere"),
}
# Libraries say in their own words that a file could not be written.
DISK_FULL = re.compile(
    "No space left on device|os error 28|PytorchStreamWriter failed writing"
    r"|\d+ requested and \d+ written"  # numpy's tofile
)


class UserError(Exception):
    """Something the user can fix: shown as `error: ...` without a traceback, exit code 2."""


class Terminated(SystemExit):
    """SIGTERM, as an exception: what a run has to bring in order is brought in order. Exit code 143."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "ended by SIGTERM"


def read_settings(cls: type[T], argv: list[str] | None = None) -> T:
    """Read the flags of a stage into an instance of its dataclass `cls`.

    Every field needs a default and a docstring line behind it; `--help` shows both, under the docstring of the
    script that runs. `{field}` in a path and `{task}` in a string are filled in. Path fields come out absolute:
    defaults are taken from the repo's root, flags from where the user stands.

    Exits with code 2 on an unknown flag or a value of the wrong type, with 0 after `--help`. Raises UserError where
    a number is out of its limits (LIMITS, or Annotated[float, Limit(...)] at the field), or where the package that
    --report-to needs is not installed.
    """
    import tyro

    _set_up_process()
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:  # printed here because tyro would join its lines
        print((sys.modules["__main__"].__doc__ or "").strip() + "\n")
    # a stage's own settings first in --help, then those that it inherits
    own = [field for field in cls.__dict__["__annotations__"] if field in cls.__dataclass_fields__]
    cls.__dataclass_fields__ = dict.fromkeys(own) | cls.__dataclass_fields__
    settings, unknown = tyro.cli(cls, prog=Path(sys.argv[0]).name, args=argv, description="", return_unknown_args=True)
    if unknown:
        _exit_unknown(unknown, [field.name for field in fields(cls)])

    given = {_flag_to_name(word) for word in argv if word.startswith("--")}
    for name, hint in get_type_hints(cls, include_extras=True).items():  # a flag's older name
        for mark in getattr(hint, "__metadata__", ()):
            if given & {_flag_to_name(alias) for alias in getattr(mark, "aliases", None) or ()}:
                given.add(name)
    # Strings first: a path may refer to one of them.
    strings = {f.name: _fill(getattr(settings, f.name), {"task": getattr(settings, "task", None)}) for f in fields(cls)}
    settings = replace(settings, **strings)
    names = {name: value for name, value in vars(settings).items() if not isinstance(value, Path)}
    paths = {
        field.name: _resolve(getattr(settings, field.name), Path.cwd() if field.name in given else ROOT, names)
        for field in fields(cls)
    }
    settings = replace(settings, **paths)
    for word, after in zip(argv, [*argv, ""][1:], strict=True):  # pathlib takes "" for the folder where the user stands
        flag, equals, value = word.partition("=")
        named = paths.get(_flag_to_name(flag)) if flag.startswith("--") else None
        is_path = isinstance(named[0] if isinstance(named, tuple) and named else named, Path)
        if is_path and not (value if equals else after):
            raise UserError(f"{flag}: nothing is named; fix: name a file or folder")
    check_settings(settings)
    refuse_clashes(settings)
    return settings


def refuse_clashes(settings: Any) -> None:
    """Raise UserError for the first of the settings' clashes: (what cannot be, how to fix it), see `unused`."""
    for what, fix in getattr(settings, "clashes", tuple)():
        raise UserError(f"{what}; fix: {fix}")


def unused(settings: Any, when: str, *names: str) -> Iterator[tuple[str, str]]:
    """The clashes of a mode: those of the named settings that are given although nothing reads them then.

    def clashes(self):
        if not self.read:
            yield from unused(self, "without --read", "machine", "metric")
    """
    for name in changed(settings, *(name for name in names if hasattr(settings, name))):
        yield f"{_flag(name)} has no effect {when}", "leave it out"


def check_settings(settings: Any) -> None:
    """Raise UserError for the first number out of its limits, a name that is not UTF-8, or a reporter that is not
    there."""
    hints = get_type_hints(type(settings), include_extras=True)
    for name, default in default_settings(settings).items():
        own = [extra for extra in getattr(hints[name], "__metadata__", ()) if isinstance(extra, Limit)]
        limit = own[0] if own else LIMITS.get(name, Limit())
        value = getattr(settings, name)
        if value == default:
            continue
        if name == "task" and not value:
            raise UserError(f"--task: nothing is named; fix: e.g. --task {default}")
        if name in ("task", "name") and re.search(r"[/\\]", value):  # a part of the names of folders and files
            raise UserError(f"{_flag(name)} {value}: a path, not a name; fix: without a slash")
        if name == "dtype" and str(value) not in DTYPES:
            raise UserError(f"--dtype {value}: unknown; fix: {', '.join(DTYPES)}")
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, str | Path) and not_utf8(str(number)):
                raise UserError(f"{_flag(name)} {ascii(str(number))}: not UTF-8; fix: rename it, or name another")
            if isinstance(number, int | float) and not isinstance(number, bool) and not limit.holds(number):
                raise UserError(f"{_flag(name)} {number}: has to be {limit}; fix: e.g. {_flag(name)} {_words(default)}")
            if isinstance(number, int | float) and number and not LEAST <= abs(number) <= MOST[type(number)]:
                size = "large" if abs(number) > 1 else "small"
                raise UserError(f"{_flag(name)} {number}: too {size}; fix: e.g. {_flag(name)} {_words(default)}")
    reporter = getattr(settings, "report_to", "none")
    if reporter not in REPORTERS:
        raise UserError(f"--report-to {reporter}: no such reporter; fix: one of {', '.join(sorted(REPORTERS))}")
    if (package := REPORTERS[reporter]) and find_spec(package) is None:
        raise UserError(
            f"--report-to {reporter}: the package {package} is not installed; "
            f"fix: pip install {package}, or --report-to none"
        )


def not_utf8(name: str) -> bool:
    """Whether a name holds bytes that are not UTF-8: Python reads them as halves of characters, and no file takes
    these."""
    return any("\ud800" <= char <= "\udfff" for char in name)


def default_settings(settings: Any) -> dict:
    """What each setting would be if its flag were not given, `{field}` marks filled in from `settings`."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(settings)
    }
    names = {name: value for name, value in vars(settings).items() if not isinstance(value, Path)}
    task = {"task": getattr(settings, "task", None)}
    return {name: _resolve(_fill(value, task), ROOT, names) for name, value in defaults.items()}


def changed(settings: Any, *names: str) -> dict:
    """Those of the named settings that are not as they come: what the next command has to carry."""
    defaults = default_settings(settings)
    return {name: getattr(settings, name) for name in names if getattr(settings, name) != defaults[name]}


@contextmanager
def settings_errors(settings: Any) -> Iterator[None]:
    """Around the building of a library's Config objects, before begin_run: what it refuses is one line with the flag.

    with settings_errors(settings):
        config = SFTConfig(learning_rate=settings.lr, ...)
        lora = LoraConfig(r=settings.lora_r, ...)
    """
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError, AssertionError, KeyError, RuntimeError) as error:
        if _memory_error(type(error), error):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        text = text if len(text) < 400 else f"{text[:400]} ..."
        given = {name: value for name, value in vars(settings).items() if value != default_settings(settings)[name]}
        # Named in the message; else a value of the message that a flag has set; else whatever was set.
        named = [name for name in vars(settings) if re.search(rf"\b{name}\b", text)]
        named = named or [
            name
            for name, value in given.items()
            if not isinstance(value, bool | Path) and re.search(rf"(?<!\w){re.escape(_words(value))}(?!\w)", text)
        ]
        flags = ", ".join(_flag(name) for name in named)
        fix = f"change {flags}" if flags else "change the setting it is about (--help lists them all)"
        raise UserError(f"{text.rstrip('.')}; fix: {fix}") from error


def file_error(error: BaseException) -> str | None:
    """`what; fix: how` for an error of the file system that a user can do something about, else None."""
    if isinstance(error, OSError) and error.errno in OS_ERRORS:
        what, fix = OS_ERRORS[error.errno]
        place = f"{show_path(os.fsdecode(error.filename))}: " if error.filename is not None else ""
        return f"{place}{what}; fix: {fix}"
    return file_error(OSError(errno.ENOSPC, "")) if is_disk_full(error) else None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this error, or the one behind it, says that a file could not be written for lack of space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if DISK_FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def resolve_model(value: str, task: str | None = None) -> str:
    """A model setting as transformers wants it: the absolute path of a folder, or a hub id unchanged.

    A folder is looked for where the user stands, then in the repo. Raises UserError where the value can only be
    meant as a folder and there is none.
    """
    value = _fill(str(value), {"task": task})
    for base in (Path.cwd(), ROOT):
        folder = base / Path(value).expanduser()
        if value and folder.is_dir():
            return str(folder.resolve())
        if value and folder.is_file():
            fix = "stage 01 makes a folder of it" if folder.suffix == ".gguf" else "name the folder that it lies in"
            raise UserError(f"{value} is a file, not a model's folder; fix: {fix}")
    # A hub id has at most one slash: owner/name.
    is_local = value.startswith((".", "/", "~")) or value.split("/")[0] in LOCAL_FOLDERS or value.count("/") > 1
    if is_local or not value:
        raise UserError(
            f"no such model folder: {value or '(empty)'}; fix: run the stage that writes it, "
            "or name another folder or a hub id such as Qwen/Qwen3-0.6B"
        )
    return value


def show_path(path: Path | str) -> str:
    """From the repo's root where an absolute path lies in it: the same text on every machine."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def next_command(script: str, **flags) -> str:
    """The command of a further stage, quoted so that it runs as it is pasted in the repo's root.

    next_command("60_generate", task="chat", adapter=folder) -> python scripts/60_generate.py --task chat --adapter ...
    Paths are shown from the repo's root, a bool becomes --flag or --no-flag, a list several words, None the word None.
    """
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
            continue
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{flag}", *(show_path(v) if str(v).startswith(f"{ROOT}{os.sep}") else str(v) for v in values)]
    return " ".join(map(_quoted, ["python", f"scripts/{script}.py", *words]))


def _quoted(word: str) -> str:
    """A word as bash reads it, on one line: a line end in it becomes $'...\\n...'."""
    if "\n" not in word:
        return shlex.quote(word)
    return "$'" + word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _set_up_process() -> None:
    """UTF-8 whatever the locale says, line by line, and short messages for errors that the user can fix."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # pytest puts other objects in their place
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    if _rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  of several processes only the first prints
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says of every layer that it casts to float16
    sys.excepthook = _show_error
    # Of several processes the launcher takes care: one that waits for the others cannot run a handler.
    if threading.current_thread() is threading.main_thread() and "RANK" not in os.environ:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _main_process:  # a forked worker: it has nothing to bring in order
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        return
    print("terminated", file=sys.__stderr__, flush=True)
    raise Terminated


_main_process = os.getpid()


def _rank() -> int:
    """Of this process among those that accelerate launch has started on all machines."""
    return int(os.environ.get("RANK", "0"))


def _say(line: str) -> None:
    """Print a last line on standard error, below the progress bars that are still open."""
    if tqdm := sys.modules.get("tqdm"):  # no stage needs it for an error that comes before any bar
        for bar in list(tqdm.tqdm._instances):
            bar.close()
    print(line, file=sys.__stderr__, flush=True)


def _show_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    # sys.__stderr__: torch.distributed swaps sys.stderr while a hook runs, and loses what is printed before an exit.
    if issubclass(kind, UserError):
        if _rank():
            time.sleep(PATIENCE)  # the launcher ends this process once the first has said the same
        _say(f"error: {error}")
        sys.exit(2)
    if issubclass(kind, KeyboardInterrupt):
        _say("interrupted")
        sys.exit(130)
    message = file_error(error) or _memory_error(kind, error) or _reporter_error(kind, error)
    if isinstance(error, UnicodeEncodeError) and not_utf8(error.object):
        start = max(0, error.start - 40)
        message = f"{ascii(error.object[start : error.end])}: a name that is not UTF-8; fix: rename the file"
    if message:
        _say(f"error: {message}")
        sys.exit(2)
    sys.__excepthook__(kind, error, traceback)


def _memory_error(kind: type[BaseException], error: BaseException) -> str | None:
    """torch says it as a RuntimeError on a CPU, numpy and Python as a MemoryError."""
    text = " ".join(str(error).split())
    if issubclass(kind, MemoryError) or "can't allocate memory" in text or kind.__name__ == "OutOfMemoryError":
        return f"not enough memory ({text[:200]}); fix: smaller batches or lengths (--help lists the settings)"
    return None


def _reporter_error(kind: type[BaseException], error: BaseException) -> str | None:
    reporter = next((name for name, package in REPORTERS.items() if package == kind.__module__.split(".")[0]), None)
    text = " ".join(str(error).split())[:300]
    return f"--report-to {reporter}: {text}; fix: log in to it, or --report-to none" if reporter else None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _words(value: Any) -> str:
    """A value as it stands on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _flag_to_name(word: str) -> str:
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    return name.removeprefix("no_") if word.startswith(("--no-", "--no_")) else name


def _exit_unknown(unknown: list[str], names: list[str]) -> None:
    from difflib import get_close_matches

    # Behind an unknown flag stand its values; without any flag the first word is the stray one.
    word = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
    near = get_close_matches(_flag_to_name(word), names, n=1, cutoff=0.0)
    hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "this stage has no settings"
    what = "unknown flag" if word.startswith("-") else "unexpected word"
    print(f"error: {what} {word}; {hint} (--help lists every setting)", file=sys.stderr)
    sys.exit(2)


def _fill(value: Any, names: dict):
    """Put `names` into the `{name}` marks of a string, or of the strings in a tuple or list; leave other marks."""
    if isinstance(value, str):
        return re.sub(r"\{(\w+)\}", lambda m: str(names.get(m[1]) or m[0]), value)
    if isinstance(value, tuple | list):
        return type(value)(_fill(item, names) for item in value)
    return value


def _resolve(value: Any, base: Path, names: dict):
    if isinstance(value, Path):
        return Path(os.path.abspath(base / Path(_fill(str(value), names)).expanduser()))
    if isinstance(value, tuple | list):
        return type(value)(_resolve(item, base, names) for item in value)
    return value
