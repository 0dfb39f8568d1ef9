"""Stage 60 with --backend vllm: the texts of the hf backend, adapters as LoRA requests, and runs that outlive a
kill."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SCRIPTS
from vllm_models import BASE, rows, save_adapter, write

INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vllm is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """adapter (on the embedded base) and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("vllm")
    save_adapter(folder / "adapter")
    write(folder / "prompts.jsonl", [{"prompt": row["prompt"], "meta": row["meta"]} for row in rows(8)])
    return folder


def words(made: Path, output: Path, *more) -> list:
    return [
        "--adapter",
        made / "adapter",
        "--prompts-file",
        made / "prompts.jsonl",
        "--output-file",
        output,
        "--dtype",
        "float32",
        "--max-new-tokens",
        32,
        *more,
    ]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.all
@needs_vllm
def test_an_adapters_greedy_rows_are_those_of_the_hf_backend(run_stage, made, tmp_path):
    for backend in ("hf", "vllm"):
        output = tmp_path / f"{backend}.jsonl"
        run_stage("60_generate.py", *words(made, output, "--name", "x", "--temperature", 0, "--backend", backend))
    expected, got = ({row["id"]: row for row in read(tmp_path / f"{name}.jsonl")} for name in ("hf", "vllm"))
    assert len(got) == 8 and {row["finish_reason"] for row in got.values()} <= {"stop", "length"}
    assert got == expected, "the same keys, texts, reasons and token counts"


@pytest.mark.all
@needs_vllm
def test_a_killed_run_goes_on_where_it_stopped(run_stage, made, tmp_path):
    output = tmp_path / "sft.jsonl"
    flags = words(made, output, "--backend", "vllm", "--num-samples", 40)
    command = [sys.executable, str(SCRIPTS / "60_generate.py"), *map(str, flags)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, **quiet)
    while not output.exists() or output.read_bytes().count(b"\n") < 9:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with output.open("ab") as file:
        file.write(b'{"id": "torn')
    before = output.read_bytes().rpartition(b"\n")[0]
    assert before.count(b"\n") < 8 * 40 - 1
    done = run_stage("60_generate.py", *flags)
    assert "resuming" in done.stdout and output.read_bytes().startswith(before), "rows that were there are kept"
    found = read(output)
    assert len(found) == len({row["id"] for row in found}) == 8 * 40
    assert {row["seed"] for row in found} == set(range(42, 82))
    assert len({row["completion"] for row in found}) > 8 * 20, "samples differ"


@pytest.mark.all
@needs_vllm
def test_one_prompt_and_a_prompt_that_is_too_long(run_stage):
    done = run_stage(
        "60_generate.py", "--backend", "vllm", "--model", BASE, "--prompt", "写一首五言绝句", "--num-samples", 2
    )
    assert done.stdout.count("[stop, ") + done.stdout.count("[length, ") == 2
    done = run_stage("60_generate.py", "--backend", "vllm", "--model", BASE, "--prompt", "诗" * 2000, check=False)
    assert done.returncode == 2 and "and room for 1024" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.all
@needs_vllm
def test_a_length_that_the_model_has_no_positions_for_is_a_short_error(run_stage, made, tmp_path):
    flags = words(made, tmp_path / "x.jsonl", "--backend", "vllm", "--max-new-tokens", 5000)
    done = run_stage("60_generate.py", *flags, check=False)
    assert done.returncode == 2 and "the model reads 2048 tokens; fix" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(INSTALLED, reason="vllm is installed")
def test_without_vllm_both_stages_say_how_to_get_it(run_stage, made, tmp_path):
    done = run_stage("60_generate.py", *words(made, tmp_path / "x.jsonl", "--backend", "vllm"), check=False)
    assert done.returncode == 2 and "bash runs/setup_vllm.sh" in done.stderr and not (tmp_path / "x.run.json").exists()


@pytest.mark.all
@needs_vllm
def test_the_api_stages_against_vllms_own_server(run_stage, made, tmp_path):
    """A real server of the embedded model: copy is written and logged; as a judge it says nothing that parses, and that
    is no score."""
    from common.vllm_engine import serve

    guide = tmp_path / "guide.md"  # the shipped guide fills more than the model's 2,048 positions
    guide.write_text("精简有效，回归肌肤本源。冷静、专业、值得信赖。\n", encoding="utf-8")
    output, log = tmp_path / "golden.jsonl", tmp_path / "requests.jsonl"
    write = [
        "--model",
        "tiny",
        "--guide-file",
        guide,
        "--max-products",
        1,
        "--max-tokens",
        200,
        "--max-tries",
        2,
        "--output-file",
        output,
        "--request-log",
        log,
    ]
    texts = tmp_path / "texts"
    for name, temperature in (("a", 1.0), ("b", 0.5)):
        flags = ["--name", name, "--temperature", temperature]
        run_stage("60_generate.py", *words(made, texts / f"{name}.jsonl", *flags))
    judge = [
        "--task",
        "poems",
        "--judge",
        "tiny",
        "--candidates",
        f"a={texts / 'a.jsonl'}",
        f"b={texts / 'b.jsonl'}",
        "--generations",
        texts,
        "--max-items",
        2,
        "--control",
        1,
        "--max-tokens",
        60,
        "--output-file",
        tmp_path / "judged.jsonl",
        "--request-log",
        tmp_path / "judge.requests.jsonl",
        "--temperature",
        1,
        "--max-failed",
        4,
        "--extra-body",
        '{"min_tokens": 20}',
    ]
    with serve(BASE, "float32", 2048, ("--served-model-name", "tiny")) as url:
        env = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "sk-of-this-test"}
        written = run_stage("13_write_copy.py", *write, env=env)
        judged = run_stage("71_judge.py", *judge, env=env)
    asked = [line for line in log.read_text(encoding="utf-8").splitlines() if '"finish_reason"' in line]
    assert len(asked) == 9, "one request a copy type, each answered once"
    assert "of 9 copies (tiny)" in written.stdout and 1 <= len(read(output)) <= 9
    report = (tmp_path / "judged.txt").read_text(encoding="utf-8")
    assert "评测统计报告" in report and [row["kind"] for row in read(tmp_path / "judged.jsonl")].count("item") == 2
    for file in (log, tmp_path / "judge.requests.jsonl"):
        assert "sk-of-this-test" not in file.read_text(encoding="utf-8")
    assert "sk-of-this-test" not in written.stdout + written.stderr + judged.stdout + judged.stderr
