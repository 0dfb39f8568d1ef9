"""How fast is stage 20 beside `trl sft`, on the same rows, at the same validation loss?

Both train the same LoRA on the same rows with the same optimizer batch, rate and number of steps, in turn, several
rounds; each round starts from the base model. Everything else of trl is as it comes: 8 rows a micro-batch, gradient
checkpointing, tiled log-probabilities; its bfloat16 default is turned off, because it refuses to start on a CPU.
Validation loss is computed by one function for all, over the answer's characters.

Reads:  --rows first rows of processed_data/poems/sft_train.jsonl, sft_val.jsonl (stage 10)
Writes: a Markdown table on standard output; adapters in a temporary folder
Run:    python benchmarks/sft_throughput.py
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.jsonl import read_jsonl, write_jsonl  # noqa: E402

LORA = {"lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 64  # rows per optimizer step


def seconds_of(command: list[str]) -> float:
    """Training time as the Trainer itself reports it: without start, tokenization and saving."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    found = re.search(r"'train_runtime': '?([0-9.]+)", done.stdout + done.stderr)
    if done.returncode or not found:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(found[1])


def ours(model: str, folder: Path, output: Path, steps: int) -> float:
    words = [
        "--train-file",
        folder / "train.jsonl",
        "--val-file",
        folder / "val.jsonl",
        "--model",
        model,
        "--output-dir",
        output,
        "--max-steps",
        steps,
        "--eval-steps",
        10**6,
        "--probe-count",
        8,
        "--eval-rows",
        32,
        "--report-to",
        "none",
        "--batch-size",
        32,
        "--accumulation",
        BATCH // 32,
    ]
    return seconds_of([sys.executable, str(ROOT / "scripts/20_train_sft.py"), *map(str, words)])


def trl(model: str, folder: Path, output: Path, steps: int) -> float:
    words = [
        "sft",
        "--model_name_or_path",
        model,
        "--dataset_name",
        folder / "trl",
        "--output_dir",
        output,
        "--use_peft",
        "--lora_target_modules",
        *TARGETS,
        "--max_steps",
        steps,
        "--learning_rate",
        2e-3,
        "--lr_scheduler_type",
        "cosine",
        "--warmup_steps",
        0.03,
        "--gradient_accumulation_steps",
        BATCH // 8,
        "--assistant_only_loss",
        "True",
        "--bf16",
        "False",
        "--eval_strategy",
        "no",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
    ]
    for name, value in LORA.items():
        words += [f"--{name}", value]
    return seconds_of([str(Path(sys.executable).with_name("trl")), *map(str, words)])


def validation_loss(model: str, adapter: Path, rows: list[dict]) -> float:
    from common.likelihood import nll_per_character
    from common.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    return statistics.fmean(nll_per_character(load_model(model, tokenizer, "float32", str(adapter)), tokenizer, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "data/tiny_qwen3"), help="base model folder")
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps of 64 rows")
    parser.add_argument("--rounds", type=int, default=3, help="how often both are run, in turn")
    options = parser.parse_args()

    data = ROOT / "processed_data/poems"
    train = read_jsonl(data / "sft_train.jsonl", "sft")[: BATCH * options.steps]
    val = read_jsonl(data / "sft_val.jsonl", "sft")[:256]
    held_out = [{"prompt": row["prompt"], "completion": row["completion"]} for row in val]
    results: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "train.jsonl", train)
        write_jsonl(folder / "val.jsonl", val)
        (folder / "trl").mkdir()
        write_jsonl(
            folder / "trl" / "train.jsonl", [{key: row[key] for key in ("prompt", "completion")} for row in train]
        )

        from common.models import load_tokenizer

        tokenizer = load_tokenizer(options.model)
        texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in train]
        tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) / options.steps  # a step

        for number in range(options.rounds):
            for label, run in (
                ("stage 20", lambda out: ours(options.model, folder, out, options.steps)),
                ("trl sft, float32", lambda out: trl(options.model, folder, out, options.steps)),
            ):
                output = folder / f"{label.replace(' ', '_')}_{number}"
                speed = tokens * options.steps / run(output)
                results.setdefault(label, []).append((speed, validation_loss(options.model, output, held_out)))
                print(
                    f"round {number + 1}: {label}: {speed:.0f} tokens/s, validation loss {results[label][-1][1]:.4f}",
                    flush=True,
                )

    fastest = statistics.median(speed for speed, _ in results["stage 20"])
    print(
        f"\n| | tokens/s, median of {options.rounds} | stage 20 is faster by | validation loss |\n|---|---:|---:|---:|"
    )
    for label, rounds in results.items():
        speed = statistics.median(speed for speed, _ in rounds)
        loss = f"{statistics.median(loss for _, loss in rounds):.4f}"
        print(f"| {label} | {speed:.0f} | {fastest / speed:.1f} x | {loss} |")
    print(
        json.dumps(
            {
                "steps": options.steps,
                "rows": len(train),
                "tokens": round(tokens * options.steps),
                "threads": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
