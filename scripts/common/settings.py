"""The settings of a stage: one dataclass, read from the command line."""

import os
import re
import shlex
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]

# A model name that starts with one of these is meant as a folder, never as a hub id.
LOCAL_FOLDERS = ("checkpoints", "data", "processed_data", "results")

# Seconds that the other processes of a launch leave to the first one to say what is wrong with the inputs that all of them read.
PATIENCE = 30

T = TypeVar("T")


class UserError(Exception):
    """Something the user can fix: shown as `error: ...` without a traceback, exit code 2."""


def read_settings(cls: type[T], argv: list[str] | None = None) -> T:
    """Read the flags of a stage into an instance of its dataclass `cls`.

    Every field needs a default and a docstring line behind it; `--help` shows both, under the docstring of the
    script that runs. `{field}` in a path and `{task}` in a string are filled in. Path fields come out absolute:
    defaults are taken from the repo's root, flags from where the user stands.

    Exits with code 2 on an unknown flag or a value of the wrong type, with 0 after `--help`.
    """
    import tyro

    _set_up_process()
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:  # printed here because tyro would join its lines
        print((sys.modules["__main__"].__doc__ or "").strip() + "\n")
    settings, unknown = tyro.cli(cls, prog=Path(sys.argv[0]).name, args=argv, description="", return_unknown_args=True)
    if unknown:
        _exit_unknown(unknown, [field.name for field in fields(cls)])

    given = {_flag_to_name(word) for word in argv if word.startswith("--")}
    # Strings first: a path may refer to one of them.
    strings = {f.name: _fill(getattr(settings, f.name), {"task": getattr(settings, "task", None)}) for f in fields(cls)}
    settings = replace(settings, **strings)
    names = {name: value for name, value in vars(settings).items() if not isinstance(value, Path)}
    paths = {
        field.name: _resolve(getattr(settings, field.name), Path.cwd() if field.name in given else ROOT, names)
        for field in fields(cls)
    }
    return replace(settings, **paths)


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
    return shlex.join(["python", f"scripts/{script}.py", *words])


def _set_up_process() -> None:
    """UTF-8 whatever the locale says, line by line, and short messages for errors that the user can fix."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # pytest puts other objects in their place
            stream.reconfigure(encoding="utf-8", line_buffering=True)
    if _rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  of several processes only the first prints
    sys.excepthook = _show_error


def _rank() -> int:
    """Of this process among those that accelerate launch has started on all machines."""
    return int(os.environ.get("RANK", "0"))


def _show_error(kind, error, traceback) -> None:
    # sys.__stderr__: torch.distributed swaps sys.stderr while a hook runs, and loses what is printed before an exit.
    if issubclass(kind, UserError):
        if _rank():
            time.sleep(PATIENCE)  # the launcher ends this process once the first has said the same
        print(f"error: {error}", file=sys.__stderr__, flush=True)
        sys.exit(2)
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.__stderr__, flush=True)
        sys.exit(130)
    sys.__excepthook__(kind, error, traceback)


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


def _fill(value, names: dict):
    """Put `names` into the `{name}` marks of a string, or of the strings in a tuple or list; leave other marks."""
    if isinstance(value, str):
        return re.sub(r"\{(\w+)\}", lambda m: str(names.get(m[1]) or m[0]), value)
    if isinstance(value, tuple | list):
        return type(value)(_fill(item, names) for item in value)
    return value


def _resolve(value, base: Path, names: dict):
    if isinstance(value, Path):
        return Path(os.path.abspath(base / Path(_fill(str(value), names)).expanduser()))
    if isinstance(value, tuple | list):
        return type(value)(_resolve(item, base, names) for item in value)
    return value
