"""How fast is stage 40 beside `trl dpo`, on the same pairs, and do both learn as much?

Both train the same LoRA on the same pairs with the same optimizer batch, rate, beta and number of steps, in turn,
several rounds. Everything else of trl is as it comes; its bfloat16 is turned off, because it refuses to start with it
on a CPU. What was learned is measured by one function for both: the share of held-out pairs whose chosen answer gained
more on the base than the rejected one.

Reads   first rows of processed_data/poems/pref_train.jsonl, pref_val.jsonl (stage 10)
Writes  a Markdown table on standard output; adapters in a temporary folder
Run     python benchmarks/dpo_throughput.py
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from sft_throughput import TARGETS, seconds_of, words_of  # noqa: E402

from common.jsonl import read_jsonl, write_jsonl  # noqa: E402

BATCH, RATE, BETA = 32, 5e-4, 0.1  # pairs per optimizer step, of both


def ours(model: str, folder: Path, output: Path, steps: int) -> float:
    flags = {"train-file": folder / "train.jsonl", "val-file": "None", "model": model, "max-steps": steps}
    flags |= {
        "batch-size": 16,
        "accumulation": BATCH // 16,
        "lr": RATE,
        "beta": BETA,
        "warmup-share": 0,
        "lora-r": 32,
        "lora-alpha": 64,
    }
    flags |= {"eval-steps": 10**6, "probe-count": 8, "report-to": "none", "dtype": "float32", "output-dir": output}
    return seconds_of([sys.executable, str(ROOT / "scripts/40_train_dpo.py"), *words_of(flags)])


def trl(model: str, folder: Path, output: Path, steps: int) -> float:
    flags = {"model_name_or_path": model, "dataset_name": folder / "trl", "output_dir": output, "max_steps": steps}
    flags |= {"learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0, "beta": BETA, "bf16": "False"}
    flags |= {"gradient_accumulation_steps": BATCH // 8, "lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.0}
    flags |= {"lora_target_modules": TARGETS, "eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
    return seconds_of([str(Path(sys.executable).with_name("trl")), "dpo", "--use_peft", *words_of(flags)])


def log_likelihoods(model: str, adapter: str, pairs: list[dict]) -> list[float]:
    """Of the chosen answer less that of the rejected one, nats, for each pair."""
    from common.likelihood import nll_per_character
    from common.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    net = load_model(model, tokenizer, "float32", adapter)
    sides = []
    for side in ("chosen", "rejected"):
        rows = [{"prompt": pair["prompt"], "completion": pair[side]} for pair in pairs]
        nll = nll_per_character(net, tokenizer, rows)
        sides.append([-value * len(pair[side][-1]["content"]) for value, pair in zip(nll, pairs, strict=True)])
    return [chosen - rejected for chosen, rejected in zip(*sides, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "data/tiny_qwen3"), help="base model folder")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of 32 pairs")
    parser.add_argument("--rounds", type=int, default=3, help="how often both are run, in turn")
    options = parser.parse_args()

    data = ROOT / "processed_data/poems"
    train, val = (
        read_jsonl(data / "pref_train.jsonl", "preference"),
        read_jsonl(data / "pref_val.jsonl", "preference")[:128],
    )
    before = log_likelihoods(options.model, None, val)
    results: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trl").mkdir()
        rows = train[: BATCH * options.steps]
        write_jsonl(folder / "train.jsonl", rows)
        write_jsonl(folder / "trl/train.jsonl", [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows])
        for number in range(options.rounds):
            for label, run in (("stage 40", ours), ("trl dpo", trl)):
                output = folder / f"{label.replace(' ', '_')}_{number}"
                speed = len(rows) / run(options.model, folder, output, options.steps)
                after = log_likelihoods(options.model, str(output), val)
                right = statistics.fmean(b > a for a, b in zip(before, after, strict=True))
                results.setdefault(label, []).append((speed, right))
                print(f"round {number + 1}: {label}: {speed:.2f} pairs/s, {right:.1%} ranked right", flush=True)

    print(f"\n| | pairs/s, median of {options.rounds} | lowest to highest | stage 40 is faster by | ranked right |")
    print("|---|---:|---:|---:|---:|")
    fastest = statistics.median(speed for speed, _ in results["stage 40"])
    for label, rounds in results.items():
        speeds, right = zip(*rounds, strict=True)
        middle = statistics.median(speeds)
        spread = f"{min(speeds):.2f} to {max(speeds):.2f}"
        print(f"| {label} | {middle:.2f} | {spread} | {fastest / middle:.1f} x | {statistics.median(right):.1%} |")


if __name__ == "__main__":
    main()
