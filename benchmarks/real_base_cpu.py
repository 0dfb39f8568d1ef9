"""A base with a large vocabulary on a CPU: tokens per second and peak memory of stage 20 beside `trl sft` and
LLaMA-Factory.

All train the same LoRA on the same rows, of about --length tokens, half of them answer, with the same batch, rate and
steps, in turn, several rounds. Everything else of the others is as it comes; their bfloat16 mixed precision is turned
off, because it refuses to start on a CPU. LLaMA-Factory lives in an environment of its own, which
`bash benchmarks/all.sh tools` makes. What counts is the processor time between the end of the first step and that of
the last one, as the progress bars show them: neither start nor end is in it, and other work on the machine moves it
little. The peak is that of the whole process, evaluation and probes of stage 20 included. The loss after training is
computed by one function.

Reads   data/weibo/sample_comments.json; --model, such as stage 01 writes
Writes  a Markdown table on standard output; adapters in a temporary folder
Run     python benchmarks/real_base_cpu.py --model checkpoints/bases/gemma3-270m
        python benchmarks/real_base_cpu.py --model checkpoints/bases/gemma3-270m --tools trl llama-factory
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from sft_throughput import write_rows  # noqa: E402

from common.jsonl import read_json  # noqa: E402

LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH, RATE = 8, 3e-4


def made_rows(tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> list[dict]:
    """Rows of about `length` tokens: as many comments as fit are the prompt, as many others the answer."""
    texts = iter([row["content"] for row in read_json(ROOT / "data/weibo/sample_comments.json")])
    rows = []
    for _ in range(count):
        parts = []
        for _ in range(2):
            ids = []
            while len(ids) < length // 2 - 6:  # the template takes a dozen
                ids += tokenizer(next(texts) + "\n", add_special_tokens=False)["input_ids"]
            parts.append(tokenizer.decode(ids[: length // 2 - 6]))
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), parts, strict=True)]
        rows.append({"prompt": turns[:1], "completion": turns[1:], "meta": {}})
    return rows


def measured(command: list[str], steps: int) -> tuple[float, float]:
    """(processor seconds from the end of the first step to that of the last, GiB at the peak) of a command."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log, ended = b"", {}  # step -> processor seconds of the processes when its end was shown
    while part := os.read(child.stdout.fileno(), 1 << 16):
        log += part
        for step in re.findall(rb"(\d+)/%d \[" % steps, log[-1000:]):
            if int(step) not in ended:
                top = psutil.Process(child.pid)  # `trl sft` trains in a child of its own
                times = [process.cpu_times() for process in (top, *top.children(recursive=True))]
                ended[int(step)] = sum(used.user + used.system for used in times)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode or not {1, steps} <= ended.keys():
        raise SystemExit(f"{' '.join(command)}\n{log.decode(errors='replace')[-4000:]}")
    return ended[steps] - ended[1], used.ru_maxrss / 2**20


def stage_20(options: argparse.Namespace, folder: Path, output: Path, steps: int) -> list[str]:
    words = {"model": options.model, "train_file": folder / "train.jsonl", "val_file": folder / "val.jsonl"}
    words |= {"output_dir": output, "max_steps": steps, "lr": RATE, "batch_size": BATCH, "accumulation": 1}
    words |= {"eval_steps": 10**6, "eval_rows": BATCH, "probe_count": 2, "probe_tokens": 16, "report_to": "none"}
    words |= {"dtype": options.dtype, "max_length": 2 * options.length} | LORA
    flags = [str(part) for name, value in words.items() for part in (f"--{name.replace('_', '-')}", value)]
    return [sys.executable, str(ROOT / "scripts/20_train_sft.py"), *flags]


def trl_sft(options: argparse.Namespace, folder: Path, output: Path, steps: int) -> list[str]:
    words = {"model_name_or_path": options.model, "dataset_name": folder / "trl", "output_dir": output}
    words |= {"max_steps": steps, "learning_rate": RATE, "per_device_train_batch_size": BATCH, "bf16": False}
    words |= {"lr_scheduler_type": "cosine", "assistant_only_loss": True, "report_to": "none", "save_strategy": "no"}
    flags = [str(part) for name, value in (words | LORA).items() for part in (f"--{name}", value)]
    command = [str(Path(sys.executable).with_name("trl")), "sft", *flags]
    return [*command, "--use_peft", "--lora_target_modules", *TARGETS]


def llama_factory(options: argparse.Namespace, folder: Path, output: Path, steps: int) -> list[str]:
    words = {"stage": "sft", "do_train": True, "model_name_or_path": options.model, "dataset": "rows"}
    words |= {"template": options.template, "dataset_dir": folder / "tools", "output_dir": output, "max_steps": steps}
    words |= {"finetuning_type": "lora", "lora_rank": LORA["lora_r"], "lora_alpha": LORA["lora_alpha"]}
    words |= {"lora_target": ",".join(TARGETS), "per_device_train_batch_size": BATCH, "learning_rate": RATE}
    words |= {"gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine", "cutoff_len": 2 * options.length}
    words |= {"logging_steps": 1, "save_strategy": "no", "bf16": False, "overwrite_cache": True, "report_to": "none"}
    flags = [str(part) for name, value in words.items() for part in (f"--{name}", value)]
    return [str(ROOT / ".venv-llama-factory/bin/llamafactory-cli"), "train", *flags]


TOOLS = {"trl": trl_sft, "llama-factory": llama_factory}


def answer_loss(options: argparse.Namespace, adapter: Path, rows: list[dict]) -> float:
    from common.likelihood import mean_nll
    from common.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(options.model)
    return mean_nll(load_model(options.model, tokenizer, options.dtype, str(adapter)), tokenizer, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints/bases/gemma3-270m"), help="base model folder")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of 8 rows, 2 or more")
    parser.add_argument("--rounds", type=int, default=3, help="how often all are run, in turn")
    parser.add_argument("--dtype", default="auto", help="of stage 20 and of the loss")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["trl"], help="what stands beside stage 20")
    parser.add_argument("--template", default="gemma", help="LLaMA-Factory's name of the model's chat template")
    options = parser.parse_args()

    from common.models import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    rows = made_rows(tokenizer, options.length, BATCH * (options.steps + 1))
    train, val = rows[BATCH:], rows[:BATCH]
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in train]
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) / len(train) * BATCH  # a step
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, train, val)
        for number in range(options.rounds):
            for label, command in (("stage 20", stage_20), *((tool, TOOLS[tool]) for tool in options.tools)):
                output = folder / re.sub(r"\W", "_", f"{label}_{number}")
                seconds, peak = measured(command(options, folder, output, options.steps), options.steps)
                speed = tokens * (options.steps - 1) / seconds
                results.setdefault(label, []).append((speed, peak, answer_loss(options, output, val)))
                print(
                    f"round {number + 1}: {label}: {speed:.0f} tokens a processor second, {peak:.1f} GiB, NLL per "
                    f"character of held-out answers {results[label][-1][2]:.3f}",
                    flush=True,
                )
    ours = statistics.median(speed for speed, _, _ in results["stage 20"])
    print(
        f"\n{len(train)} rows of {tokens / BATCH:.0f} tokens, {options.steps} steps, {options.rounds} rounds, medians"
    )
    print(
        "| | tokens a processor second | stage 20 is faster by | peak, GiB | held-out NLL |\n|---|---:|---:|---:|---:|"
    )
    for label, rounds in results.items():
        speed, peak, loss = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"| {label} | {speed:.0f} | {ours / speed:.1f} x | {peak:.1f} | {loss:.3f} |")


if __name__ == "__main__":
    main()
