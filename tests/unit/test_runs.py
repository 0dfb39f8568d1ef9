"""A stage run again is done, goes on, or refuses: never a mix of two runs in one output."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import runs
from common.jsonl import JsonlAppender, read_json, read_jsonl, write_json, write_jsonl
from common.runs import describe_input, set_seed
from common.settings import ROOT, Terminated, UserError, file_error

# Writes ten rows slowly, as a generating stage does; --hang-at and --fail-at stop it on the way.
STAGE = '''\
"""Write ten rows."""

import time
from dataclasses import dataclass
from pathlib import Path

from common.jsonl import JsonlAppender, read_jsonl
from common.runs import begin_run
from common.settings import read_settings


@dataclass
class Settings:
    rows_file: Path = Path("gone.jsonl")  # input
    output: Path = Path("gone")  # folder or file
    seed: int = 1  # any
    api_key: str = ""  # secret
    hang_at: int = -1  # row
    fail_at: int = -1  # row
    overwrite: bool = False  # replace


def main(settings):
    file = settings.output if settings.output.suffix else settings.output / "rows.jsonl"
    inputs = {"rows_file": settings.rows_file, "model": "Qwen/Qwen3-0.6B", "adapter": None}
    ignore = ("hang_at", "fail_at")
    with begin_run(settings.output, settings, inputs, "90_rows", ignore=ignore) as run:
        read_jsonl(settings.rows_file)
        with JsonlAppender(file) as out:
            print("found", len(out.done), "resuming", run.resuming)
            for i in range(10):
                if i == settings.fail_at:
                    raise RuntimeError("no memory left")
                if i == settings.hang_at:
                    time.sleep(60)
                out.write({"id": i, "seed": settings.seed})
        run.figure("rows", 10)
        run.finish("python scripts/91_next.py")


if __name__ == "__main__":
    main(read_settings(Settings))
'''


def begin_run(output, settings, inputs, overwrite: bool, stage: str, **words):
    """The module's own, with --overwrite given apart."""
    settings.overwrite = overwrite
    return runs.begin_run(output, settings, inputs, stage, **words)


@pytest.fixture
def stage(tmp_path, run_stage):
    """stage(*flags) runs the toy stage into the folder out/ of the test."""
    script = tmp_path / "90_rows.py"
    script.write_text(STAGE, encoding="utf-8")
    (tmp_path / "in.jsonl").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")

    def run(*args, check=True):
        return run_stage(script, "--rows-file", "in.jsonl", "--output", "out", *args, check=check)

    run.script = script
    return run


def kill_at(stage, tmp_path: Path, row: int, output: str = "out") -> None:
    """Start the toy stage, wait until it has written `row` rows, kill -9."""
    file = tmp_path / output if "." in output else tmp_path / output / "rows.jsonl"
    command = [sys.executable, str(stage.script), "--rows-file", "in.jsonl", "--output", output, "--hang-at", str(row)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not file.exists() or file.read_bytes().count(b"\n") < row:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def ids(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_finished_run_leaves_a_full_record_and_names_the_next_command(stage, tmp_path):
    done = stage("--api-key", "sk-secret")
    assert done.stdout.splitlines()[-1] == "next: python scripts/91_next.py"
    text = (tmp_path / "out/run.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["status"] == "done" and record["stage"] == "90_rows" and record["seed"] == 1
    assert record["figures"] == {"rows": 10} and record["outputs"] == ["rows.jsonl"]
    assert record["inputs"]["rows_file"]["rows"] == 2 and len(record["inputs"]["rows_file"]["sha256"]) == 64
    assert record["inputs"]["model"] == {"hub_id": "Qwen/Qwen3-0.6B"} and "adapter" not in record["inputs"]
    assert record["packages"]["torch"] and record["device"].startswith("cpu") and record["peak_memory_mib"] > 0
    assert record["wall_seconds"] >= 0 and "commit" in record["git"]
    assert "sk-secret" not in text and "process" not in record


def test_the_same_command_again_is_already_done(stage, tmp_path):
    stage()
    before = (tmp_path / "out/rows.jsonl").stat().st_mtime_ns
    done = stage()
    assert done.stdout.startswith("already done: ") and "--overwrite" in done.stdout
    assert (tmp_path / "out/rows.jsonl").stat().st_mtime_ns == before


def test_a_run_killed_in_the_middle_goes_on_with_every_row_once(stage, tmp_path):
    kill_at(stage, tmp_path, row=4)
    assert read_json(tmp_path / "out/run.json")["status"] == "running"
    with open(tmp_path / "out/rows.jsonl", "ab") as file:
        file.write(b'{"id": 4, "se')
    done = stage()
    assert "found 4 resuming True" in done.stdout
    assert ids(tmp_path / "out/rows.jsonl") == list(range(10))
    assert read_json(tmp_path / "out/run.json")["status"] == "done"


def test_a_run_that_failed_says_why_and_goes_on(stage, tmp_path):
    failed = stage("--fail-at", 3, check=False)
    assert failed.returncode == 1 and "no memory left" in failed.stderr
    record = read_json(tmp_path / "out/run.json")
    assert record["status"] == "failed" and record["error"] == "RuntimeError: no memory left"
    record["wall_seconds"] = 100.0
    (tmp_path / "out/run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "found 3 resuming True" in stage().stdout
    record = read_json(tmp_path / "out/run.json")
    assert record["status"] == "done" and "error" not in record and record["wall_seconds"] >= 100


def test_a_changed_setting_is_refused_by_name_and_changes_nothing(stage, tmp_path):
    stage()
    before = (tmp_path / "out/run.json").read_bytes()
    done = stage("--seed", 2, check=False)
    assert done.returncode == 2
    assert "seed: 1 -> 2" in done.stderr and "--overwrite" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out/run.json").read_bytes() == before


def test_a_changed_input_is_refused_by_name(stage, tmp_path):
    stage()
    (tmp_path / "in.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    done = stage(check=False)
    assert done.returncode == 2
    assert "rows_file (content): " in done.stderr and "2 rows -> " in done.stderr and "1 rows" in done.stderr


def test_an_unfinished_run_with_other_settings_is_refused(stage, tmp_path):
    stage("--fail-at", 3, check=False)
    done = stage("--seed", 2, check=False)
    assert done.returncode == 2 and "an unfinished run that differs:\n  seed: 1 -> 2" in done.stderr
    assert ids(tmp_path / "out/rows.jsonl") == [0, 1, 2]


def test_a_run_that_failed_before_it_wrote_anything_is_in_nobodys_way(stage, tmp_path):
    (tmp_path / "in.jsonl").write_text("{\n", encoding="utf-8")
    assert stage(check=False).returncode == 2
    (tmp_path / "in.jsonl").write_text("{}\n", encoding="utf-8")
    assert "resuming False" in stage("--seed", 2).stdout


def test_a_deleted_output_is_noticed(stage, tmp_path):
    stage()
    (tmp_path / "out/rows.jsonl").unlink()
    assert "output rows.jsonl: deleted since" in stage(check=False).stderr


def test_overwrite_replaces_what_the_run_wrote(stage, tmp_path):
    stage()
    (tmp_path / "out/checkpoint-5").mkdir()
    (tmp_path / "out/checkpoint-5/weights").touch()
    done = stage("--seed", 2, "--overwrite")
    assert "found 0 resuming False" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rows.jsonl", "run.json"]
    assert '"seed": 2' in (tmp_path / "out/rows.jsonl").read_text(encoding="utf-8")


def test_overwrite_keeps_what_other_runs_wrote_in_the_same_folder(stage, tmp_path):
    stage()
    stage("--output", "out/pairs.jsonl")
    stage("--output", "out/deeper")
    stage("--overwrite")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["deeper", "pairs.jsonl", "pairs.run.json", "rows.jsonl", "run.json"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_folder_without_a_record_is_never_touched(stage, tmp_path, flags):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine", encoding="utf-8")
    done = stage(*flags, check=False)
    assert done.returncode == 2 and "without a record" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_the_folder_of_another_stage_is_refused(stage, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text('{"stage": "20_train_sft", "status": "done"}', encoding="utf-8")
    done = stage("--overwrite", check=False)
    assert done.returncode == 2 and "belongs to stage 20_train_sft" in done.stderr


@dataclass
class Small:
    overwrite: bool = False


WHOLE = '{"stage": "90_rows", "status": "done", "settings": {}, "inputs": {}, "figures": {}, "started": "", %s}'


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    "text",
    ["[1]", "5", "null", '{"stage": 5, "status": "done"}', '{"stage": "90_rows", "status": "done"}']
    + [WHOLE % '"wall_seconds": 1, "files": ["../in.jsonl"]', WHOLE % '"wall_seconds": null'],
)
def test_a_file_that_is_no_record_is_refused_and_touches_nothing(text, overwrite, tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(text, encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is not the record of a run; fix: "):
        begin_run(tmp_path / "out", Small(), {"rows": tmp_path / "in.jsonl"}, overwrite, "90_rows")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_somebody_elses_file_with_the_name_of_a_record_is_no_record(tmp_path):
    (tmp_path / "their.run.json").write_text("[1]", encoding="utf-8")
    with begin_run(tmp_path / "rows.jsonl", Small(), {}, False, "90_rows"):
        write_jsonl(tmp_path / "rows.jsonl", [{"id": 1}])
    assert (tmp_path / "their.run.json").read_text(encoding="utf-8") == "[1]"


def test_an_input_folder_may_hold_names_that_are_not_utf8(tmp_path):
    (tmp_path / "\udcff").write_text("x", encoding="utf-8")
    assert len(describe_input("folder", tmp_path)["sha256"]) == 64


@pytest.mark.parametrize("output", [".", "in.jsonl"])
def test_an_output_that_holds_the_input_is_refused(stage, tmp_path, output):
    for flags in ([], ["--overwrite"]):
        done = stage("--output", output, *flags, check=False)
        assert done.returncode == 2 and "lies in the output" in done.stderr
    assert (tmp_path / "in.jsonl").read_text(encoding="utf-8") == '{"a": 1}\n{"a": 2}\n'


def test_a_missing_input_is_an_error_before_anything_is_written(stage, tmp_path):
    (tmp_path / "in.jsonl").unlink()
    done = stage(check=False)
    assert done.returncode == 2 and "rows_file: no such file" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_single_file_has_its_record_beside_it_and_resumes(stage, tmp_path):
    kill_at(stage, tmp_path, row=6, output="sft.jsonl")
    assert "found 6 resuming True" in stage("--output", "sft.jsonl").stdout
    assert ids(tmp_path / "sft.jsonl") == list(range(10))
    assert read_json(tmp_path / "sft.run.json")["status"] == "done"
    assert stage("--output", "sft.jsonl").stdout.startswith("already done")
    assert "found 0" in stage("--output", "sft.jsonl", "--overwrite").stdout


def test_a_second_process_in_the_same_output_is_refused(stage, tmp_path):
    command = [sys.executable, str(stage.script), "--rows-file", "in.jsonl", "--output", "out", "--hang-at", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert "found 0" in first.stdout.readline()
            second = [stage(*flags, check=False) for flags in ([], ["--overwrite"])]
        finally:
            first.kill()
    for done in second:
        assert done.returncode == 2 and f"process {first.pid} is writing" in done.stderr
        assert done.stderr.count("\n") == 1
    assert "found 2 resuming True" in stage().stdout  # the lock went with its holder


# ------------------------------------------------------------------------------------ an earlier run and --overwrite


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["out", "out.jsonl"])
def finished(request, tmp_path):
    """begin(**changes) of a run that is finished, in a folder or a file, with what it wrote."""
    output, more = tmp_path / "here" / request.param, tmp_path / "here" / "out.txt"
    is_folder = not output.suffix

    @dataclass
    class Settings:
        seed: int = 1

    def begin(resumable=True, seed=2):
        also = () if is_folder else (more,)
        return begin_run(output, Settings(seed), {}, True, "x", resumable=resumable, also=also)

    def write(name: str) -> None:
        path = output / name if is_folder else {"rows.jsonl": output, "report.txt": more}[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"a": 1}\n', encoding="utf-8")

    with begin(seed=1):
        write("rows.jsonl")
        write("report.txt")
        if is_folder:
            (output / "checkpoint-3").mkdir()
            (output / "checkpoint-3" / "weights").write_bytes(b"w")
    begin.write, begin.folder = write, tmp_path / "here"
    begin.before = contents(tmp_path / "here")
    return begin


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit(1), Terminated()])
def test_a_run_that_fails_before_its_first_write_brings_the_earlier_one_back(finished, error):
    with pytest.raises(BaseException), finished() as run:  # noqa: B017
        assert not run.resuming and len(contents(finished.folder)) > 1
        finished.write("report.txt")  # nothing to go on from
        raise error
    assert contents(finished.folder) == finished.before


def test_a_run_that_fails_after_its_first_write_stays(finished):
    with pytest.raises(RuntimeError), finished():
        finished.write("rows.jsonl")
        raise RuntimeError
    after = contents(finished.folder)
    assert len(after) == 2 and not [name for name in after if name.startswith(".") or "checkpoint" in name]
    with finished() as run:
        pass
    assert run.record["status"] == "done"


def test_a_run_that_starts_from_scratch_replaces_the_earlier_one_only_when_done(finished):
    with pytest.raises(RuntimeError), finished(resumable=False) as run:
        finished.write("rows.jsonl")
        run.figure("rows", 1)
        raise RuntimeError
    assert contents(finished.folder) == finished.before
    with finished(resumable=False):
        finished.write("rows.jsonl")
    assert len(contents(finished.folder)) == 2


def kill_within(act) -> None:
    """Run `act` in a child that ends as by kill -9: nothing is brought in order."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(9)
    os.waitpid(child, 0)


def test_what_a_killed_run_had_moved_aside_comes_back_at_the_next_start(finished):
    kill_within(finished)
    assert contents(finished.folder) != finished.before
    with pytest.raises(RuntimeError), finished():
        raise RuntimeError
    assert contents(finished.folder) == finished.before


def test_a_killed_run_that_had_written_goes_on_without_the_earlier_one(finished):
    def act():
        finished()
        finished.write("rows.jsonl")

    kill_within(act)
    with pytest.raises(RuntimeError), finished():  # --overwrite again: now the killed one is the earlier
        raise RuntimeError
    after = contents(finished.folder)
    assert len(after) == 2 and not [name for name in after if "checkpoint" in name or "txt" in name]


def test_a_kill_at_any_step_of_moving_and_bringing_back_loses_nothing(finished, monkeypatch):
    """Every rename, deletion and write of the record is a moment at which the process may end."""
    from common import runs

    def dying(real, left):
        def act(*args, **kwargs):
            if not left:
                os._exit(9)
            left.pop()
            return real(*args, **kwargs)

        return act

    for step in range(12):

        def act(step=step):
            left = [None] * step
            for place, name in (
                (Path, "rename"),
                (Path, "replace"),
                (Path, "rmdir"),
                (Path, "unlink"),
                (runs, "write_json"),
            ):
                monkeypatch.setattr(place, name, dying(getattr(place, name), left))
            with finished():
                raise RuntimeError

        kill_within(act)
        with pytest.raises(RuntimeError), finished():
            raise RuntimeError
        assert contents(finished.folder) == finished.before, step


def test_temporary_files_of_a_killed_write_go_with_the_next_run(finished):
    with finished() as run:
        record, folder = run.record_path, run.record_path.parent
    names = [record.name, *(["out.jsonl"] if record.name != "run.json" else ["rows.jsonl"])]
    for name in [*names, "neighbour.run.json"]:
        (folder / f".{name}.123.tmp").write_bytes(b"half")
    with finished():
        left = {path.name for path in folder.glob("*.tmp")}
    assert left == {".neighbour.run.json.123.tmp"}


def test_a_stage_that_cannot_resume_starts_from_scratch(tmp_path, settings):
    with pytest.raises(RuntimeError), begin_run(tmp_path / "out", settings, {}, False, "x") as run:
        run.figure("half", 1)
        raise RuntimeError
    with begin_run(tmp_path / "out", settings, {}, False, "x", resumable=False) as run:
        assert not run.resuming and run.record["figures"] == {}


def test_further_files_of_a_run_are_deleted_and_missed_with_it(tmp_path, settings):
    page = tmp_path / "compare.html"
    arguments = (tmp_path / "compare.md", settings, {})
    with begin_run(*arguments, False, "x", also=(page,)) as run:
        (tmp_path / "compare.md").touch()
        page.touch()
    assert run.record["outputs"] == ["compare.md", "compare.html"]
    page.unlink()
    with pytest.raises(UserError, match="compare.html: deleted since"):
        begin_run(*arguments, False, "x", also=(page,))
    with begin_run(*arguments, True, "x", also=(page,)):
        assert not (tmp_path / "compare.md").exists()


def test_the_hash_of_a_model_follows_its_weights_and_not_its_reports(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = describe_input("model", tmp_path)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "merge_report.json").write_text("{}", encoding="utf-8")
    assert describe_input("model", tmp_path) == first and first["files"] == 2
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert describe_input("model", tmp_path)["sha256"] != first["sha256"]


def test_paths_in_the_repo_are_recorded_from_its_root(tmp_path, settings):
    settings.folder = ROOT / "data" / "poems"
    settings.model = str(ROOT / "data" / "tiny_qwen3")
    with begin_run(tmp_path / "out", settings, {"readme": ROOT / "tests" / "conftest.py"}, False, "x") as run:
        pass
    assert run.record["settings"] == {"folder": "data/poems", "model": "data/tiny_qwen3"}
    assert run.record["inputs"]["readme"]["path"] == "tests/conftest.py"


@pytest.fixture
def settings():
    from dataclasses import make_dataclass

    return make_dataclass("Settings", [("folder", Path, Path(".")), ("model", str, "gpt2")])()


def test_a_seed_repeats_the_draw():
    import random

    import numpy

    set_seed(3)
    first = random.random(), numpy.random.rand()
    set_seed(3)
    assert (random.random(), numpy.random.rand()) == first


def test_a_run_of_before_a_setting_was_added_is_done_and_one_of_before_it_was_removed_says_so(tmp_path, settings):
    with begin_run(tmp_path / "out", settings, {}, False, "x"):
        pass
    path = tmp_path / "out/run.json"
    record = read_json(path)
    record["settings"].pop("model")
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SystemExit):  # already done: --model has its default
        begin_run(tmp_path / "out", settings, {}, False, "x")
    settings.model = "gpt3"
    with pytest.raises(UserError, match="model: that version had no such setting -> gpt3"):
        begin_run(tmp_path / "out", settings, {}, False, "x")
    record["settings"] |= {"model": "gpt3", "old_name": 3}
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match="old_name: 3 -> this version has no such setting"):
        begin_run(tmp_path / "out", settings, {}, False, "x")


def test_a_path_through_a_file_is_one_line(tmp_path, settings):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="a part of this path is a file, not a folder; fix: name another"):
        begin_run(tmp_path / "file" / "out", settings, {}, False, "x")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB; small_disk.read_only() makes it so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_costs_nothing_that_was_there_and_leaves_nothing_half_written(small_disk, settings):
    output = small_disk / "rows.jsonl"
    arguments = (output, settings, {})
    with begin_run(*arguments, False, "x"):
        write_jsonl(output, [{"id": 1, "text": "春" * 1000}])
    before = contents(small_disk)
    rows = ({"id": n, "text": "春" * 1000} for n in range(1000))
    with pytest.raises(OSError) as error, begin_run(*arguments, True, "x"):
        write_jsonl(output, rows)
    assert file_error(error.value).startswith(f"{output}: no space is left on the disk; fix: ")
    assert contents(small_disk) == before

    with pytest.raises(OSError), begin_run(*arguments, True, "x"), JsonlAppender(output) as appender:
        for row in rows:
            appender.write(row)
    read_jsonl(output)  # whole rows, and the run goes on once there is space
    assert sorted(contents(small_disk)) == ["rows.jsonl", "rows.run.json"]
    with pytest.raises(OSError), open(small_disk / "fill", "wb", buffering=0) as file:
        while file.write(b"x"):
            pass
    with pytest.raises(UserError, match="no space is left"):
        begin_run(small_disk / "more" / "x.jsonl", settings, {}, False, "x")
    assert not (small_disk / "more").exists()


def test_a_read_only_folder_is_one_line(small_disk, settings):
    with begin_run(small_disk / "done.json", settings, {}, False, "x"):
        write_json(small_disk / "done.json", {})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for output, overwrite in (("new.json", False), ("folder", False), ("done.json", True)):
        with pytest.raises(UserError, match="the file system is read-only; fix: name an output elsewhere"):
            begin_run(small_disk / output, settings, {}, overwrite, "x")
    with pytest.raises(SystemExit):  # already done: nothing has to be written
        begin_run(small_disk / "done.json", settings, {}, False, "x")
