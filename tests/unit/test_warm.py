"""tests/warm.py: a forked command is the command a user types."""

import os
import subprocess
import sys

import kills
import pytest

import warm

SCRIPT = """
import atexit, os, sys, threading, time
assert "torch" in sys.modules or not os.environ["SHOULD_BE_WARM"], "not loaded before"
print(sys.argv[1:], os.getcwd(), os.environ.get("COLOUR"), sys.path[0], __name__)
print("to stderr", file=sys.stderr)
if "type" in sys.argv:
    print(sys.stdin.readline(), input(), sys.stdin.read())
if "late" in sys.argv:  # what an interpreter still does at its end
    atexit.register(print, "registered")
    threading.Thread(target=lambda: (time.sleep(0.2), print("from a thread"))).start()
if "interrupt" in sys.argv:
    raise KeyboardInterrupt
if "words" in sys.argv:
    sys.exit("as said")
if "fail" in sys.argv:
    raise ValueError("as asked")
if "die" in sys.argv:
    os.kill(os.getpid(), 9)
if "wait" in sys.argv:
    time.sleep(60)
sys.exit(3 if "three" in sys.argv else 0)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner/script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


@pytest.mark.parametrize("words", [[], ["three"], ["fail"], ["die"], ["late"], ["interrupt"], ["words"], ["type"]])
def test_a_fork_says_and_returns_what_a_fresh_interpreter_does(script, tmp_path, words):
    command = [sys.executable, str(script), "押韵", *words]
    env = {**os.environ, "COLOUR": "red"}
    forked = warm.run(command, cwd=tmp_path, env=env | {"SHOULD_BE_WARM": "1"}, typed="山\n水\n月")
    words = {"input": "山\n水\n月", "capture_output": True, "text": True, "encoding": "utf-8"}
    fresh = subprocess.run(command, cwd=tmp_path, env=env | {"SHOULD_BE_WARM": ""}, **words)
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.stderr.splitlines()[:1] == fresh.stderr.splitlines()[:1]
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_a_fork_of_the_kills_is_warm_too(script, tmp_path):
    """multiprocessing says nothing where preload.py is not found."""
    process = kills.Forked([sys.executable, str(script), "three"], tmp_path, more={"SHOULD_BE_WARM": "1"})
    assert process.wait() == 3, process.text()


def test_a_variable_that_libraries_read_early_starts_a_fresh_interpreter(script):
    env = {**os.environ, "SHOULD_BE_WARM": "1", "OMP_NUM_THREADS": "7"}
    assert "not loaded before" in warm.run([sys.executable, str(script)], env=env).stderr


def test_what_libraries_add_to_the_environment_starts_no_fresh_interpreter(script, monkeypatch):
    """vLLM names a cache for torch as soon as it is loaded, and a test that loads trl loads it."""
    monkeypatch.setitem(warm._set_by_libraries, "TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    env = {**os.environ, "SHOULD_BE_WARM": "1", "TORCHINDUCTOR_CACHE_DIR": "/somewhere"}
    assert warm.run([sys.executable, str(script)], env=env).returncode == 0
    env["TORCHINDUCTOR_CACHE_DIR"] = "/elsewhere"
    assert "not loaded before" in warm.run([sys.executable, str(script)], env=env).stderr


def test_a_command_that_does_not_end_is_killed(script):
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run([sys.executable, str(script), "wait"], env={**os.environ, "SHOULD_BE_WARM": "1"}, timeout=1)
    assert warm.run([sys.executable, str(script)], env={**os.environ, "SHOULD_BE_WARM": "1"}).returncode == 0
