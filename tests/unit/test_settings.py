"""Settings come from one dataclass, and mistakes on the command line end in one clear line."""

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from common.settings import (
    ROOT,
    Limit,
    UserError,
    file_error,
    read_settings,
    resolve_model,
    settings_errors,
)

STAGE = '''\
"""Write verse.

Reads   a model
Writes  poems
"""

from dataclasses import dataclass
from pathlib import Path

from common.settings import UserError, read_settings


@dataclass
class Settings:
    # Data
    task: str = "poems"  # writing job
    max_length: int = 256  # tokens of prompt and answer together
    output_dir: Path = Path("checkpoints/{task}/sft")  # folder to write
    overwrite: bool = False  # replace what is there


def main(settings):
    if settings.task == "gone":
        raise UserError("no such task; fix: name another")
    if settings.task == "interrupted":
        raise KeyboardInterrupt
    if settings.task == "disk":
        Path("/dev/full").write_text("x")
    if settings.task == "tofile":
        raise OSError("2179072 requested and 1419792 written")
    if settings.task == "memory":
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 9 bytes")
    if settings.task == "numpy":
        raise MemoryError("Unable to allocate 7.28 TiB for an array")
    if settings.task == "reporter":
        raise type("UsageError", (Exception,), {"__module__": "wandb.errors"})("No API key configured")
    if settings.task == "torch":
        raise RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file data/0")
    print("诗", settings)


if __name__ == "__main__":
    main(read_settings(Settings))
'''


@dataclass
class Settings:
    task: str = "poems"  # writing job
    run: str = "base"  # name
    model: str = "checkpoints/{task}/sft_merged"  # model
    train_file: Path = Path("processed_data/{task}/sft_train.jsonl")  # rows
    val_file: Path | None = None  # rows
    output_file: Path = Path("results/{task}/generations/{run}.jsonl")  # rows
    extra: tuple[Path, ...] = (Path("data/{task}"),)  # folders
    stream: bool = True  # as it comes


@pytest.fixture
def stage(tmp_path, run_stage):
    script = tmp_path / "90_stage.py"
    script.write_text(STAGE, encoding="utf-8")
    return lambda *args, **kw: run_stage(script, *args, check=False, **kw)


def test_defaults_are_taken_from_the_repo_root_with_marks_filled_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = read_settings(Settings, ["--task", "weibo"])
    assert settings.train_file == ROOT / "processed_data/weibo/sft_train.jsonl"
    assert settings.output_file == ROOT / "results/weibo/generations/base.jsonl"
    assert settings.extra == (ROOT / "data/weibo",)
    assert settings.model == "checkpoints/weibo/sft_merged"
    assert settings.val_file is None


@pytest.mark.parametrize("flag", ["--train-file", "--train_file"])
def test_a_path_given_as_a_flag_is_taken_from_where_the_user_stands(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    assert read_settings(Settings, [flag, "my/{task}.jsonl"]).train_file == tmp_path / "my/poems.jsonl"
    assert read_settings(Settings, [f"{flag}=my.jsonl"]).train_file == tmp_path / "my.jsonl"


def test_a_flag_that_repeats_the_default_still_counts_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = read_settings(Settings, ["--train-file", "processed_data/{task}/sft_train.jsonl"])
    assert given.train_file == tmp_path / "processed_data/poems/sft_train.jsonl"


def test_a_name_that_is_not_utf8_is_one_line():
    with pytest.raises(UserError, match=r"--train-file .*\\udcff.jsonl': not UTF-8; fix: rename it"):
        read_settings(Settings, ["--train-file", "\udcff.jsonl"])


def test_unknown_marks_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_settings(Settings, ["--val-file", "a{b}.jsonl"]).val_file == tmp_path / "a{b}.jsonl"


def test_booleans_have_a_yes_and_a_no():
    assert read_settings(Settings, ["--no-stream"]).stream is False
    assert read_settings(Settings, ["--stream"]).stream is True


def test_help_shows_the_docstring_and_every_setting_with_default_and_meaning(stage):
    done = stage("--help")
    assert done.returncode == 0
    assert "Reads   a model\nWrites  poems" in done.stdout
    for words in ("--max-length INT", "tokens of prompt and answer together", "(default: 256)", "--no-overwrite"):
        assert words in done.stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (["--max-lenght", "3"], "error: unknown flag --max-lenght; did you mean --max-length?"),
        (["--outptu-dir=x"], "error: unknown flag --outptu-dir; did you mean --output-dir?"),
        (["--zzz"], "error: unknown flag --zzz; did you mean --"),
        (["stray"], "error: unexpected word stray"),
    ],
)
def test_an_unknown_flag_names_the_nearest_and_runs_nothing(stage, args, message):
    done = stage(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_a_value_of_the_wrong_type_names_the_flag(stage):
    done = stage("--max-length", "many")
    assert done.returncode == 2
    assert "--max-length" in done.stderr and "Traceback" not in done.stderr


def test_a_user_error_is_one_line_and_exit_code_2(stage):
    done = stage("--task", "gone")
    assert (done.returncode, done.stderr) == (2, "error: no such task; fix: name another\n")


@pytest.mark.parametrize("task", ["disk", "torch", "tofile"])
def test_a_full_disk_is_one_line_whoever_was_writing(stage, task):
    done = stage("--task", task)
    assert done.returncode == 2 and done.stderr.startswith("error: no space is left on the disk; fix: free some space")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "task, said",
    [
        ("memory", "error: not enough memory ([enforce"),
        ("numpy", "error: not enough memory (Unable to allocate 7.28 TiB for an array); fix: smaller batches"),
        ("reporter", "error: --report-to wandb: No API key configured; fix: log in to it, or --report-to none"),
    ],
)
def test_too_little_memory_and_a_reporter_without_a_key_are_one_line(stage, task, said):
    done = stage("--task", task)
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_an_interrupt_ends_without_a_traceback(stage):
    done = stage("--task", "interrupted")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_chinese_is_printed_whatever_the_locale(stage):
    done = stage(env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""})
    assert done.stdout.startswith("诗")


def test_a_model_folder_is_looked_for_where_the_user_stands_and_then_in_the_repo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model("scripts") == str(ROOT / "scripts")
    (tmp_path / "scripts").mkdir()
    assert resolve_model("scripts") == str(tmp_path / "scripts")
    (tmp_path / "checkpoints/poems").mkdir(parents=True)
    assert resolve_model("checkpoints/{task}", task="poems") == str(tmp_path / "checkpoints/poems")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_a_hub_id_passes_unchanged(name):
    assert resolve_model(name) == name


@pytest.mark.parametrize("name", ["./gone", "/gone", "~/gone", "checkpoints/gone/sft", "data/gone", "a/b/c", ""])
def test_what_can_only_be_a_folder_and_is_missing_is_an_error(name):
    with pytest.raises(UserError, match="no such model folder.*fix"):
        resolve_model(name)


def test_the_plumbing_imports_quickly():
    code = "import sys, common.settings, common.jsonl, common.runs; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7  # of the processor; 0.15 s
    assert not {"torch", "numpy", "transformers", "tyro"} & set(done.stdout.split())


def test_the_next_command_runs_as_it_is_pasted(tmp_path):
    import shlex

    from common.settings import ROOT, next_command

    folder = tmp_path / "it's $HOME here"
    line = next_command("20_train_sft", train_file=folder, val_file=None, rewards=["a:1", "b b"], fresh=True, old=False)
    words = ["python", "scripts/20_train_sft.py", "--train-file", str(folder), "--val-file", "None"]
    assert shlex.split(line) == [*words, "--rewards", "a:1", "b b", "--fresh", "--no-old"]
    assert next_command("60_generate", model=str(ROOT / "data")) == "python scripts/60_generate.py --model data"
    said = "it's\n\\n$HOME"  # one line, which bash reads as two
    line = next_command("61_classify_style", text=said)
    read = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert "\n" not in line and read.stdout.decode().split("\0")[-2] == said


@dataclass
class Numbers:
    lr: float = 1e-3
    eval_steps: int = 10
    max_steps: int = -1  # off
    warmup_share: float = 0.03
    lora_r: int = 8
    temperature: Annotated[float, Limit(above=0)] = 1.0
    beta: float = 0.1
    loss_weights: tuple[float, ...] = (1.0,)
    report_to: str = "none"


@pytest.mark.parametrize(
    "flags",
    [
        "--lr 0",
        "--lr nan",
        "--lr inf",
        "--lr -1",
        "--eval-steps 0",
        "--eval-steps -5",
        "--max-steps 0",
        "--max-steps -2",
        "--warmup-share 1",
        "--warmup-share 1.5",
        "--warmup-share -0.1",
        "--lora-r 0",
        "--temperature 0",
        "--temperature -1",
        "--beta -0.1",
        "--beta nan",
        "--loss-weights 1 nan",
    ],
)
def test_a_number_out_of_its_limits_names_the_flag_and_a_value_that_works(flags):
    with pytest.raises(UserError) as error:
        read_settings(Numbers, flags.split())
    flag = flags.split()[0]
    assert str(error.value).startswith(f"{flag} ") and f"fix: e.g. {flag} " in str(error.value)


@pytest.mark.parametrize("flags", ["--max-steps -1", "--max-steps 5", "--warmup-share 0", "--beta 0", "--lora-r 1"])
def test_the_default_and_the_edges_pass(flags):
    read_settings(Numbers, flags.split())


def test_a_reporter_has_to_be_known_and_installed():
    read_settings(Numbers, ["--report-to", "tensorboard"])
    with pytest.raises(UserError, match="--report-to wandbb: no such reporter; fix: one of "):
        read_settings(Numbers, ["--report-to", "wandbb"])
    with pytest.raises(UserError, match="the package neptune is not installed; fix: pip install neptune"):
        read_settings(Numbers, ["--report-to", "neptune"])


@pytest.mark.parametrize(
    "raised, flag",
    [
        (ValueError("`lora_r` should be a positive integer value but the value passed is 0"), "--lora-r"),
        (ValueError("Unknown reporter 'trackio', choose another"), "--report-to"),
        (ImportError("some package is missing"), "the setting it is about"),
    ],
)
def test_what_a_library_refuses_is_one_line_with_the_flag(raised, flag):
    with pytest.raises(UserError) as error, settings_errors(Numbers(report_to="trackio")):
        raise raised
    assert str(raised) in str(error.value) and flag in str(error.value).split("fix: ")[1]


def test_errors_of_the_system_name_file_and_fix(tmp_path):
    for act, words in (
        (lambda: (tmp_path / "a" / "b").write_text(""), "no such file or folder"),
        (lambda: tmp_path.write_text(""), "is a folder, not a file"),
        (lambda: (tmp_path / ("x" * 300)).write_text(""), "the name is too long"),
        (lambda: (Path(__file__) / "x").mkdir(), "a part of this path is a file"),
    ):
        with pytest.raises(OSError) as error:
            act()
        assert words in file_error(error.value) and "; fix: " in file_error(error.value)
    assert file_error(ValueError("x")) is None and file_error(OSError("no number")) is None
