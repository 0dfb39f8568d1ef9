"""A stage in a process of its own, without loading the libraries again: one process loads them and is forked for each
command.

Three hundred commands of the tests load torch and trl, five seconds of processor time each. `run` is subprocess.run
with the text of both streams; what cannot be the same in a fork is started as a user would: other programs, and
variables that libraries read while they are loaded.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NoReturn

PRELOAD = Path(__file__).resolve().parents[1] / "benchmarks" / "preload.py"
# beginnings of variables that are read while a library is loaded
READ_EARLY = ("ACCELERATE", "CUDA", "HF_", "LD_", "MKL", "MPL", "OMP", "OPENBLAS", "PYTHON", "TORCH", "TRANSFORMERS")

_at_start = {**os.environ, "HF_HUB_OFFLINE": "1"}  # before a library has added to it
_server: subprocess.Popen | None = None
_set_by_libraries: dict[str, str] = {}


def read_early(environment: dict[str, str]) -> dict[str, str]:
    """Without what libraries set themselves: a test that has loaded them hands that on."""
    offline = {**environment, "HF_HUB_OFFLINE": "1"}  # no test has a hub
    early = {name: value for name, value in offline.items() if name.startswith(READ_EARLY) and name != "PYTHONPATH"}
    return {name: value for name, value in early.items() if _set_by_libraries.get(name) != value}


def run(
    command: list[str],
    cwd: Path | str | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    typed: str = "",
) -> subprocess.CompletedProcess:
    """`command` is the interpreter, a script and its words; `typed` stands on its standard input. Raises
    subprocess.TimeoutExpired."""
    global _server
    command, env = list(map(str, command)), dict(os.environ if env is None else env)
    if _server is None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _server = subprocess.Popen([sys.executable, __file__], env=_at_start, **pipes)
        told = next(line for line in _server.stdout if line.startswith("{"))  # a library may print while it is loaded
        _set_by_libraries.update(json.loads(told))
    if command[0] != sys.executable or not command[1].endswith(".py") or read_early(env) != read_early(_at_start):
        words = {"input": typed, "capture_output": True, "text": True, "encoding": "utf-8"}
        return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, **words)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(typed, encoding="utf-8")
        request = {"words": command[1:], "cwd": str(cwd or os.getcwd()), "env": env, "streams": list(map(str, streams))}
        print(json.dumps([timeout, request]), file=_server.stdin, flush=True)
        code, was_late = json.loads(_server.stdout.readline())
        texts = [path.read_text(encoding="utf-8") for path in streams[1:]]
    if was_late:
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return subprocess.CompletedProcess(command, code, *texts)


def become(words: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> None:
    """Make of this process what a fresh interpreter with these words would be."""
    for number, path in enumerate(streams):
        target = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
        os.close(target)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # without what was read ahead of the requests
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))


def serve() -> list[str] | None:
    """Answers each request with [exit code, whether its time was up]; returns the words in the process that is to run
    them."""
    for line in sys.stdin:
        timeout, request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(**request)
            return request["words"]
        alarm = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
        alarm.start()
        started = time.monotonic()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        was_late = code == -signal.SIGKILL and time.monotonic() - started >= timeout
        alarm.cancel()
        alarm.join()  # no thread is left when the next one is forked
        print(json.dumps([code, was_late]), flush=True)
    return None


def finish(script: str) -> NoReturn:
    """Run the script, then what is registered for an interpreter's end, and no more: to take the libraries apart takes
    two seconds, and the system does it anyway."""
    code, is_interrupted = 0, False
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code, is_interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_interrupted:  # an interpreter ends by the signal itself, so that a shell knows of it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 255)


if __name__ == "__main__":
    before = dict(os.environ)
    runpy.run_path(str(PRELOAD))
    print(json.dumps(dict(os.environ.items() - before.items())), flush=True)
    if chosen := serve():
        finish(chosen[0])
