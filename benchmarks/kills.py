"""Kill stages at random moments (kill -9), run the same command again, and count how many end as an undisturbed run.

Small inputs are made first: poems of stage 10, an adapter of stage 20, texts of stage 60, scores of stage 70. Each
stage runs once undisturbed and is timed; then it is started, killed after a random share of that time, and run again.
Equal means: the same files byte for byte, and the same figures in run.json, but for times and what a checkpoint holds
beside its weights.

Reads:  data/poems, data/styles, data/copywriting, data/chat, data/tiny_qwen3
Writes: a Markdown table on standard output; works in a temporary folder
Run:    python benchmarks/kills.py --kills 20 --stages 10 12 20 60 70
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

from common.evaluation.tables import markdown_table  # noqa: E402
from common.jsonl import read_json, sha256_file, write_json  # noqa: E402

TINY = ROOT / "data" / "tiny_qwen3"
TRAIN = (
    "--max-steps 12 --eval-steps 4 --batch-size 4 --accumulation 1 --eval-rows 8 --probe-count 2 --probe-tokens 8 "
    "--dtype float32 --report-to none"
)
GENERATE = f"--model {TINY} --dtype float32 --prompts-file data/prompts_test.jsonl --max-prompts 12 --max-new-tokens 16"
# stage -> flags; the output is always `out` or begins with it
STAGES = {
    "10": "--corpus corpus.json --min-character-poems 1 --output-dir out",
    "12": "--output-dir out --augment 1",
    "13": "--request-log log.jsonl --output-file out/raw.jsonl",
    "14": "--copies-file raw.jsonl --request-log log.jsonl --output-file out/clean.jsonl",
    "17": "--output-dir out",
    "20": f"--train-file data/sft_train.jsonl --val-file data/sft_val.jsonl {TRAIN} --output-dir out",
    "60": f"{GENERATE} --output-file out/a.jsonl --name a",
    "70": "--generations generations --nll-model= --bootstrap 200 --output-dir out",
    "71": "--generations generations --judge rules --bootstrap 200 --output-file out/rules.jsonl",
    "72": "--generations generations --scores scores --checkpoints none --bootstrap 200 --output out/compare",
    "73": "--task poems --kind rating --generations generations/a.jsonl --output out/sheet.csv",
}
TIMES = ("seconds", "runtime", "per_second", "wall", "time")


def command(number: str, *more: str) -> list[str]:
    script = next(SCRIPTS.glob(f"{number}_*.py"))
    return [sys.executable, str(script), *STAGES[number].split(), *more]


def environment() -> dict:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(number: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    words = {"cwd": folder, "env": environment(), "capture_output": True, "text": True, "encoding": "utf-8"}
    return subprocess.run(command(number, *more), **words)


def start(number: str, folder: Path, *more: str) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    hears = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a job in the background of a shell would ignore Ctrl-C
    return subprocess.Popen(command(number, *more), cwd=folder, env=environment(), preexec_fn=hears, **quiet)


def make_inputs(folder: Path) -> None:
    """Whatever the stages of the table read, under the names that it uses."""
    from tasks.poems import corpus

    records = corpus.load_records(ROOT / "data" / "poems" / "tang.json.xz")
    write_json(folder / "corpus.json", records[::200])
    run_whole("10", folder).rename(folder / "data")
    run_whole("13", folder).rename(folder / "made")
    shutil.move(folder / "made" / "raw.jsonl", folder / "raw.jsonl")
    run_whole("60", folder).rename(folder / "generations")
    shutil.copy(folder / "generations" / "a.jsonl", folder / "generations" / "b.jsonl")
    run_whole("70", folder).rename(folder / "scores")


def run_whole(number: str, folder: Path) -> Path:
    done = run(number, folder)
    if done.returncode:
        raise SystemExit(f"stage {number} does not run undisturbed:\n{done.stdout}\n{done.stderr}")
    return folder / "out"


def fresh(inputs: Path, folder: Path) -> Path:
    """A folder with the inputs, in which a stage can run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def outcome(output: Path) -> dict:
    """What has to be equal: file -> hash, or what a JSON file says beside times."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if not path.is_file() or name.startswith("checkpoint-"):
            continue
        if path.name.endswith("run.json"):
            record = read_json(path)
            found[name] = without_times({key: record[key] for key in ("status", "figures", "outputs")})
        elif path.suffix == ".json":
            found[name] = without_times(read_json(path))
        elif path.name != "training_args.bin":
            found[name] = sha256_file(path)
    return found


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not any(word in key for word in TIMES)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def kill_when(process: subprocess.Popen, moment: Callable[[], bool], how: int = signal.SIGKILL) -> bool:
    """Send a signal as soon as `moment()` is true. False: the process had ended by then."""
    while process.poll() is None:
        if moment():
            process.send_signal(how)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="random moments of each stage")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    rng, lines = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as work:
        inputs = Path(work) / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        for number in args.stages:
            folder = fresh(inputs, Path(work) / "whole")
            started = time.monotonic()
            expected = outcome(run_whole(number, folder))
            seconds, equal, killed, found = time.monotonic() - started, 0, 0, []
            for _ in range(args.kills):
                folder = fresh(inputs, Path(work) / "killed")
                moment = time.monotonic() + rng.random() * seconds
                killed += kill_when(start(number, folder), lambda moment=moment: time.monotonic() >= moment)
                done = run(number, folder)
                same = done.returncode == 0 and outcome(folder / "out") == expected
                equal += same
                if not same:
                    found.append(f"exit {done.returncode}: {(done.stderr or done.stdout)[-200:]}")
            lines.append([number, f"{seconds:.1f}", str(killed), f"{equal} of {args.kills}"])
            print(json.dumps(lines[-1]), *found, sep="\n  ", file=sys.stderr, flush=True)
    print(markdown_table(["stage", "seconds", "killed before the end", "equal after the second run"], lines))


if __name__ == "__main__":
    main()
