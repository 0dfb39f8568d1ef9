"""Kill stages at random moments (kill -9), run the same command again, and count how many end as an undisturbed run.

Small inputs are made first, each by its stage. A stage runs once undisturbed and is timed; then it is started, killed
after a random share of that time, and run again. Equal means: the same files byte for byte, and the same figures in
run.json, but for times and what a checkpoint holds beside its weights. The processes are forked from one that has
imported the libraries, so that a run takes a second or two and the kill falls into the stage's own work.

Reads   data/poems, data/weibo, data/styles, data/copywriting, data/chat, data/tiny_qwen3
Writes  a Markdown table on standard output; inputs, undisturbed outcomes and one line a kill in --work, from which the
        same command goes on
Run     python benchmarks/kills.py --kills 20 --work results/kills
"""

import argparse
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

from common.evaluation.tables import markdown_table  # noqa: E402
from common.jsonl import JsonlAppender, read_json, read_jsonl, sha256_file, write_json, write_jsonl  # noqa: E402

TINY = ROOT / "data" / "tiny_qwen3"
BASE = f"--model {TINY} --dtype float32"
SHORT = "--lora-r 4 --lora-alpha 8 --max-steps 4 --eval-steps 2 --accumulation 1 --eval-rows 4 --report-to none"
PLAIN = SHORT.replace(" --report-to none", "")
PROBE = "--probe-count 2 --probe-tokens 8"
SFT = "--train-file data/sft_train.jsonl --val-file data/sft_val.jsonl"
PAIRS = "--train-file data/pref_train.jsonl --val-file data/pref_val.jsonl"
PROMPTS = "--train-file data/prompts_train.jsonl --val-file data/sft_val.jsonl"
RL = (
    f"--lora-r 4 --max-steps 3 --eval-steps 1 --report-to none --probe-count 2 --max-new-tokens 8 {BASE} --batch-size 8"
)
GENERATE = f"{BASE} --prompts-file data/prompts_test.jsonl --max-new-tokens 12"
PRETRAIN = (
    "--hidden-size 32 --layers 1 --heads 2 --kv-heads 1 --intermediate-size 48 --min-count 5 --train-tokens 12000 "
    "--warmup-tokens 2000 --batch-tokens 1024 --eval-every 4 --checkpoint-every 4 --eval-poems 4 --eval-samples 2 "
    "--keep-checkpoints 1 --dtype float32"
)
SAMPLES = "--prompts-file data/prompts_train.jsonl --num-samples 4 --max-prompts 24 --max-new-tokens 40"
# stage -> flags; the output is always `out` or lies in it
STAGES = {
    "00": f"--corpus verse --modern verse {PRETRAIN} --output-dir out",
    "01": "--gguf-file gguf/model.gguf --texts 20 --places 4 --output-dir out",
    "10": "--corpus corpus.json --min-character-poems 1 --output-dir out",
    "11": "--workers 1 --output-dir out",
    "12": "--output-dir out --augment 1",
    "13": "--request-log log.jsonl --output-file out/raw.jsonl",
    "14": "--copies-file raw/raw.jsonl --request-log log.jsonl --output-file out/clean.jsonl",
    "15": "--golden-file clean/clean.jsonl --request-log log.jsonl --output-file out/rejected.jsonl",
    "16": "--golden-file clean/clean.jsonl --rejected-file rejected/rejected.jsonl --output-dir out",
    "17": "--output-dir out",
    "18": "--files verse/pos_sentences.txt --document line --held-out 0 --output-dir out",
    "19": f"{SFT} --model {TINY} --preview out/preview.html --report out/report.json",
    "20": f"{SFT} {BASE} {SHORT} {PROBE} --batch-size 4 --output-dir out",
    "21": f"{SFT} {BASE} {PLAIN} {PROBE} --batch-size 4 --output-dir out",
    "22": f"--adapter adapter {BASE} --probe-file data/sft_val.jsonl --probe-rows 4 --greedy-rows 1 --greedy-tokens 8 "
    "--output-dir out",
    "23": f"--adapter adapter {BASE} --merged merged --rows-file data/sft_val.jsonl --max-rows 2 --max-prompts 1 "
    "--max-new-tokens 8 --server none --output-file out/parity.json",
    "24": f"--model {TINY} --texts 20 --places 4 --answer-tokens 4 --output-dir out",
    "30": f"{PAIRS} {BASE} {SHORT} --batch-size 4 --output-dir out",
    "31": f"--train-file style/style_test.jsonl --val-file style/style_val.jsonl {BASE} --max-length 64 --epochs 2 "
    "--batch-size 32 --lr 0.001 --lora-r 4 --output-dir out",
    "32": f"--model reward {PAIRS} --dtype float32 --bootstrap 50 --output out/card",
    "33": "--generations samples/s.jsonl --rewards no_repeat form --min-margin 0.01 --val-share 0.5 --output-dir out",
    "40": f"{PAIRS} {BASE} {SHORT} {PROBE} --batch-size 4 --output-dir out",
    "41": f"--train-file kto/kto_train.jsonl --val-file kto/kto_val.jsonl {BASE} {SHORT} {PROBE} --batch-size 4 "
    "--output-dir out",
    "42": f"{SFT} {BASE} --teacher merged {SHORT} {PROBE} --max-new-tokens 8 --batch-size 4 --output-dir out",
    "50": f"{PROMPTS} {RL} --num-generations 4 --rewards form no_repeat --output-dir out",
    "51": f"{PROMPTS} {RL} --rewards form no_repeat --output-dir out",
    "60": f"{GENERATE} --max-prompts 12 --output-file out/a.jsonl --name a",
    "61": "--model classifier --input-file style/style_val.jsonl --dtype float32 --max-length 64 "
    "--output-file out/labels.jsonl",
    "70": "--generations generations --nll-model= --bootstrap 200 --output-dir out",
    "71": "--generations generations --candidates golden a=generations/a.jsonl b=generations/b.jsonl --judge rules "
    "--bootstrap 200 --output-file out/rules.jsonl",
    "72": "--generations generations --scores scores --checkpoints none --bootstrap 200 --output out/compare",
    "73": "--task poems --kind rating --generations generations/a.jsonl --output out/sheet.csv",
}
# input -> the stage whose output it is, and flags in place of the stage's own
MADE = {
    "data": ("10",),
    "style": ("12",),
    "raw": ("13",),
    "clean": ("14",),
    "rejected": ("15",),
    "adapter": ("20",),
    "merged": ("22",),
    "gguf": ("24",),
    "reward": ("30",),
    "classifier": ("31",),
    "generations": ("60",),
    "samples": ("60", *SAMPLES.split(), "--output-file", "out/s.jsonl"),
    "scores": ("70",),
}
TIMES = ("seconds", "runtime", "per_second", "wall", "time")


def command(number: str, *more: str) -> list[str]:
    script = next(SCRIPTS.glob(f"{number}_*.py"))
    return [sys.executable, str(script), *STAGES[number].split(), *more]


def environment() -> dict:
    """Of a stage: one thread, where no other number is set."""
    return {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(number: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    words = {"cwd": folder, "env": environment(), "capture_output": True, "text": True, "encoding": "utf-8"}
    return subprocess.run(command(number, *more), **words)


def start(number: str, folder: Path, *more: str) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    hears = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a job in the background of a shell would ignore Ctrl-C
    return subprocess.Popen(command(number, *more), cwd=folder, env=environment(), preexec_fn=hears, **quiet)


def make_inputs(number: str, folder: Path) -> None:
    """What the flags of a stage name, under these names; what lies there already is kept."""
    names = {word.split("/")[0] for word in STAGES[number].split()}
    for name in sorted(names & {*MADE, "corpus.json", "verse", "kto"}):
        if not (folder / name).exists():
            make_input(name, folder)


def make_input(name: str, folder: Path) -> None:
    from tasks.poems import corpus

    if name in MADE:
        number, *more = MADE[name]
        make_inputs(number, folder)
        place = fresh(folder, folder.parent / f"making_{name}")
        made = run_whole(number, place, *more)
        if name == "generations":
            shutil.copy(made / "a.jsonl", made / "b.jsonl")
        if name == "gguf":
            next(made.glob("*.gguf")).rename(made / "model.gguf")
        made.rename(folder / name)
        shutil.rmtree(place)
    elif name == "kto":
        make_inputs("40", folder)
        for split in ("train", "val"):
            rows = [
                {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "meta": row["meta"]}
                for row in read_jsonl(folder / "data" / f"pref_{split}.jsonl")
                for side in ("chosen", "rejected")
            ]
            write_jsonl(folder / "kto" / f"kto_{split}.jsonl", rows)
    else:
        records = corpus.load_records(ROOT / "data" / "poems" / "tang.json.xz")
        if name == "corpus.json":
            write_json(folder / name, records[::200])
            return
        for dynasty, start in (("tang", 0), ("song", 1)):
            write_json(folder / "verse" / f"poet.{dynasty}.0.json", records[start::60])
        (folder / "verse" / "pos_sentences.txt").write_text(
            "物流很快，包装也好。\n这本书值得一读。\n", encoding="utf-8"
        )


def run_whole(number: str, folder: Path, *more: str) -> Path:
    process = Forked(command(number, *more), folder)
    if process.wait():
        raise RuntimeError(f"stage {number} does not run undisturbed:\n{process.text()}")
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
        if not path.is_file() or "checkpoint-" in name or "checkpoints/step" in name:
            continue
        if path.name.endswith("run.json"):
            record = read_json(path)
            found[name] = without_times({key: record[key] for key in ("status", "figures", "outputs")})
        elif path.name == "log.jsonl":
            found[name] = [without_times(row) for row in read_jsonl(path)]
        elif path.suffix == ".json":
            found[name] = without_times(read_json(path))
        elif path.name != "training_args.bin":
            found[name] = sha256_file(path)
    return found


def without_times(value: Any):
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


class Forked:
    """A stage in a process forked from one that has imported the libraries; used as a Popen is.

    words: an interpreter, a script and its flags. It runs in `folder`, and what it prints goes to the file `said`.
    more: variables of its environment, beside those of the process that is forked."""

    def __init__(self, words: list[str], folder: Path, said: str = "said.txt", more: dict[str, str] | None = None):
        self.said = folder / said
        os.environ.update(environment())
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["preload"])
        with patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):  # Python 3.11 does not hand sys.path on
            forkserver.ensure_running()
        self.process = context.Process(target=run_in_this_process, args=(words[1:], folder, said, more or {}))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, how: int) -> None:
        os.kill(self.process.pid, how)

    def wait(self, seconds: float = 600) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    def text(self) -> str:
        return self.said.read_text(encoding="utf-8", errors="replace")


def run_in_this_process(words: list[str], folder: Path, said_file: str, more: dict[str, str]) -> None:
    """The command of a stage; what it prints goes to said_file."""
    os.environ.update(more)
    said = open(folder / said_file, "w", encoding="utf-8")  # noqa: SIM115 (the process ends with it)
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    sys.stdout = sys.stderr = sys.__stderr__ = said
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [name for name in sys.modules if name.split(".")[0] in ("common", "tasks")]:
        del sys.modules[name]
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None
    finally:
        said.flush()


def undisturbed(number: str, work: Path) -> dict:
    """{seconds, outcome} of one undisturbed run, made once."""
    path = work / "undisturbed" / f"{number}.json"
    if not path.exists():
        inputs = work / "inputs"
        make_inputs(number, inputs)
        folder = fresh(inputs, work / "place")  # outputs name their inputs
        Forked(command("10", "--help"), fresh(inputs, work / "first")).wait()  # the libraries are imported now
        started = time.monotonic()
        whole = run_whole(number, folder)
        write_json(path, {"seconds": time.monotonic() - started, "outcome": outcome(whole)})
    return read_json(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="random moments of each stage")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "kills", help="where the same command goes on")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    work = args.work.resolve()
    (work / "inputs").mkdir(parents=True, exist_ok=True)
    with JsonlAppender(work / "kills.jsonl") as log:
        for number in args.stages:
            expected = undisturbed(number, work)
            for kill in range(args.kills):
                id, rng = f"{number} {kill}", random.Random(f"{args.seed} {number} {kill}")
                if id in log.done:
                    continue
                folder = fresh(work / "inputs", work / "place")
                moment = time.monotonic() + rng.random() * expected["seconds"]
                killed = kill_when(Forked(command(number), folder), lambda moment=moment: time.monotonic() >= moment)
                again = Forked(command(number), folder)
                code = again.wait()
                # through JSON, as the undisturbed outcome went
                equal = not code and json.loads(json.dumps(outcome(folder / "out"))) == expected["outcome"]
                said = "" if equal else f"exit {code}: {again.text()[-300:]}"
                log.write({"id": id, "stage": number, "killed": killed, "equal": equal, "said": said})
                if not equal:
                    folder.rename(work / f"differs_{number}_{kill}")
            print(number, *summary(work, number), file=sys.stderr, flush=True)
    lines = [[number, *summary(work, number)] for number in args.stages]
    print(markdown_table(["stage", "seconds", "killed before the end", "equal after the second run"], lines))


def summary(work: Path, number: str) -> list[str]:
    rows = [row for row in read_jsonl(work / "kills.jsonl") if row["stage"] == number]
    killed, equal = (sum(row[key] for row in rows) for key in ("killed", "equal"))
    return [f"{undisturbed(number, work)['seconds']:.1f}", str(killed), f"{equal} of {len(rows)}"]


if __name__ == "__main__":
    main()
