"""Stage x (kill -9 at named moments, Ctrl-C, SIGTERM, full disk, read-only folder, several at once): figures as
undisturbed.

The stages and their small inputs are those of benchmarks/kills.py, which kills at random moments.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest

from common.jsonl import read_json, sha256_file

DATA = ("10", "13", "17", "70", "73")  # quick, and write in several ways: a folder, one file, files beside each other
# Once each, in processes forked from one that has imported the libraries.
FORKED = ("11", "12", "14", "15", "16", "21", "30", "31", "33", "40", "41", "42", "50", "51", "61")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Made by the stages that write them, when a test needs them (kills.make_inputs)."""
    return tmp_path_factory.mktemp("stages") / "inputs"


@pytest.fixture(scope="session")
def whole(inputs):
    """whole(stage): what an undisturbed run leaves. Run once, in the place where the others run: outputs name their
    inputs."""
    outcomes = {}

    def run(number: str) -> dict:
        if number not in outcomes:
            outcomes[number] = kills.outcome(kills.run_whole(number, kills.fresh(inputs, inputs.parent / "place")))
        return outcomes[number]

    return run


@pytest.fixture
def place(inputs, request, whole) -> Path:
    """A folder with the inputs of the stage `number`, or of 20 and 60; what an undisturbed run leaves is known."""
    inputs.mkdir(exist_ok=True)
    number = getattr(request.node, "callspec", None) and request.node.callspec.params.get("number")
    for name in [number] if number else ["20", "60"]:
        kills.make_inputs(name, inputs)
        whole(name)
    return kills.fresh(inputs, inputs.parent / "place")


def something(folder: Path, pattern: str) -> bool:
    return any(folder.glob(pattern))


MOMENTS = {
    "the record is written": lambda out: something(out, "*run.json"),
    "a file is being written": lambda out: something(out, ".*.tmp"),
    "the first output is there": lambda out: any(not p.name.endswith("run.json") for p in out.glob("[!.]*")),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", DATA)
def test_a_data_stage_killed_at_any_moment_ends_as_if_nothing_had_happened(number, moment, place, whole):
    process = kills.Forked(kills.command(number), place)
    kills.kill_when(process, lambda: MOMENTS[moment](place / "out"))  # a quick one may have ended: then it is run again
    again = kills.Forked(kills.command(number), place)
    assert again.wait() == 0, again.text()
    assert kills.outcome(place / "out") == whole(number)
    assert not [path for path in (place / "out").rglob(".*")], "hidden files are left"


@pytest.mark.parametrize("number", FORKED)
def test_a_stage_killed_behind_its_first_output_ends_as_if_nothing_had_happened(number, place, whole):
    """The first output is a file or, in training, a whole checkpoint."""
    out = place / "out"
    is_training = "--max-steps" in kills.STAGES[number] or number == "31"
    pattern = "checkpoint-*/trainer_state.json" if is_training else "[!.]*"
    process = kills.Forked(kills.command(number), place)
    killed = kills.kill_when(process, lambda: something(out, pattern))
    assert killed or not is_training, process.text()  # a quick one may have ended: then it is run again
    again = kills.Forked(kills.command(number), place)
    assert again.wait() == 0, again.text()
    assert not is_training or "resuming" in again.text()
    assert kills.outcome(out) == whole(number)
    assert not [path for path in out.rglob(".*")], "hidden files are left"


def hashes(folder: Path) -> dict[Path, str]:
    return {path: sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def rows_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize("how, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_generation_stopped_in_the_middle_has_every_row_once(how, code, place, whole):
    process = kills.start("60", place)
    assert kills.kill_when(process, lambda: rows_of(place / "out" / "a.jsonl") >= 3, how), "it had ended by then"
    assert process.returncode == code
    assert read_json(place / "out" / "a.run.json")["status"] == ("running" if how == signal.SIGKILL else "failed")
    again = kills.Forked(kills.command("60"), place)
    assert again.wait() == 0, again.text()
    assert kills.outcome(place / "out") == whole("60")


TRAINING_MOMENTS = {
    "before the first step": lambda out: (out / "run.json").exists(),
    "while a checkpoint is being written": lambda out: something(out, "checkpoint-2"),
    "after the last checkpoint": lambda out: (out / "checkpoint-4" / "trainer_state.json").exists(),
    "in the closing minute": lambda out: (out / "log_history.json").exists(),
}


@pytest.mark.parametrize("moment", TRAINING_MOMENTS)
def test_training_killed_at_any_moment_ends_with_the_same_weights_and_figures(moment, place, whole):
    process = kills.Forked(kills.command("20"), place)
    assert kills.kill_when(process, lambda: TRAINING_MOMENTS[moment](place / "out")), "it had ended by then"
    again = kills.Forked(kills.command("20"), place)
    assert again.wait() == 0, again.text()
    assert kills.outcome(place / "out") == whole("20")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_training_that_was_to_replace_a_finished_one_and_is_stopped_early_leaves_it_whole(how, place, whole):
    expected = whole("20")
    kills.run_whole("20", place)
    before = hashes(place / "out")
    process = kills.Forked(kills.command("20", "--overwrite", "--lr", "0.001"), place)
    assert kills.kill_when(process, lambda: something(place / "out", ".run.json.earlier/run.json"), how)
    if how == signal.SIGKILL:  # the next start brings it back
        again = kills.Forked(kills.command("20"), place)
        assert again.wait() == 0 and "already done" in again.text()
    assert hashes(place / "out") == before
    assert kills.outcome(place / "out") == expected


@pytest.mark.parametrize("number", ["13", "60", "20"])
def test_of_four_started_at_once_one_runs_and_three_say_who_does(number, place, whole):
    # The first holds the output while the others begin: stopped by a signal, as in a debugger.
    first = kills.Forked(kills.command(number), place)
    while not something(place / "out", "*run.json"):
        assert first.poll() is None, first.text()
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    others = [kills.Forked(kills.command(number), place, said=f"said_{k}.txt") for k in range(3)]
    codes = [process.wait() for process in others]
    first.send_signal(signal.SIGCONT)
    assert [first.wait(), *codes] == [0, 2, 2, 2], first.text()
    for text in (process.text() for process in others):
        line = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(line) == 1 and f"process {first.pid} is writing" in line[0] and "Traceback" not in text
    assert kills.outcome(place / "out") == whole(number)


@pytest.fixture
def small_disk(place):
    """place/out on a disk of its own; small_disk(size, options) mounts it."""
    out = place / "out"
    out.mkdir()

    def mount(options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(out)]
        if sys.platform != "linux" or os.getuid() or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        return out

    yield mount
    subprocess.run(["umount", "-l", str(out)], capture_output=True)


@pytest.mark.parametrize("number, size", [("10", "24k"), ("13", "12k"), ("60", "8k"), ("70", "12k"), ("20", "400k")])
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_space(number, size, place, whole, small_disk):
    out = small_disk(f"size={size}")
    done = kills.Forked(kills.command(number), place)
    code, text = done.wait(), done.text()
    line = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(line) == 1 and "no space is left on the disk; fix: " in line[0], text
    assert "Traceback" not in text
    assert not [path for path in out.rglob(".*")], "half of a file is left"
    subprocess.run(["mount", "-o", "remount,size=200m", str(out)], check=True)
    assert kills.Forked(kills.command(number), place).wait() == 0
    assert kills.outcome(out) == whole(number)


@pytest.mark.parametrize("number", ["10", "13", "20", "60", "70", "72", "73"])
def test_a_read_only_folder_is_one_line(number, place, small_disk):
    small_disk("ro")
    done = kills.Forked(kills.command(number), place)
    code, text = done.wait(), done.text()
    line = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(line) == 1 and "the file system is read-only; fix: " in line[0], text
    assert "Traceback" not in text
