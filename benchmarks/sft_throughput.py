"""How fast is stage 20 beside `trl sft`, LLaMA-Factory and ms-swift, on the same rows, at the same validation loss?

All train the same LoRA on the same rows with the same optimizer batch, rate (no warm-up) and steps, in turn, several
rounds; each round starts from the base model. Everything else of the others is as it comes: 8 rows a micro-batch,
gradient checkpointing, their losses. Their bfloat16 is turned off, because trl refuses to start with it on a CPU.
Validation loss is computed by one function for all, over the answer's characters.

LLaMA-Factory and ms-swift pin other libraries than this project, so each has an environment of its own:
`bash benchmarks/all.sh tools` makes them.

Reads   --rows first rows of processed_data/poems/sft_train.jsonl, sft_val.jsonl (stage 10)
Writes  a Markdown table on standard output; adapters in a temporary folder
Run     python benchmarks/sft_throughput.py
        python benchmarks/sft_throughput.py --tools trl llama-factory ms-swift
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

from common.jsonl import read_jsonl, write_json, write_jsonl  # noqa: E402

LORA = {"lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 64  # rows per optimizer step
RATE = 2e-3


def words_of(flags: dict) -> list[str]:
    """Flags and values as a command line has them; a list is several words."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def seconds_of(command: list[str]) -> float:
    """Training time as the Trainer itself reports it: without start, tokenization and saving. Our stages print it in a
    line of their own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    found = re.search(r"""(?:['"]train_runtime['"]: ['"]?| steps in )([0-9.]+)""", done.stdout + done.stderr)
    if done.returncode or not found:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(found[1])


def ours(model: str, folder: Path, output: Path, steps: int) -> float:
    flags = {"train-file": folder / "train.jsonl", "val-file": folder / "val.jsonl", "model": model, "max-steps": steps}
    flags |= {"eval-steps": 10**6, "probe-count": 8, "eval-rows": 32, "report-to": "none", "dtype": "float32"}
    flags |= {"batch-size": 32, "accumulation": BATCH // 32, "lr": RATE, "warmup-share": 0}
    flags["output-dir"] = output
    return seconds_of([sys.executable, str(ROOT / "scripts/20_train_sft.py"), *words_of(flags)])


def trl(model: str, folder: Path, output: Path, steps: int) -> float:
    flags = {"model_name_or_path": model, "dataset_name": folder / "trl", "output_dir": output, "max_steps": steps}
    flags |= {"learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0, "report_to": "none"}
    flags |= {"gradient_accumulation_steps": BATCH // 8, "assistant_only_loss": "True", "bf16": "False"}
    flags |= {"eval_strategy": "no", "save_strategy": "no", "lora_target_modules": TARGETS, **LORA}
    return seconds_of([str(Path(sys.executable).with_name("trl")), "sft", "--use_peft", *words_of(flags)])


def llama_factory(model: str, folder: Path, output: Path, steps: int) -> float:
    flags = {"stage": "sft", "do_train": "true", "model_name_or_path": model, "dataset": "rows", "template": "chatml"}
    flags |= {"dataset_dir": folder / "tools", "output_dir": output, "max_steps": steps, "finetuning_type": "lora"}
    flags |= {"lora_rank": LORA["lora_r"], "lora_alpha": LORA["lora_alpha"], "lora_target": ",".join(TARGETS)}
    flags |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": BATCH // 8, "learning_rate": RATE}
    flags |= {"lr_scheduler_type": "cosine", "warmup_ratio": 0, "cutoff_len": 512, "report_to": "none"}
    flags |= {"logging_steps": 1, "save_strategy": "no", "bf16": "false", "overwrite_cache": "true"}
    return seconds_of([str(ROOT / ".venv-llama-factory/bin/llamafactory-cli"), "train", *words_of(flags)])


def ms_swift(model: str, folder: Path, output: Path, steps: int) -> float:
    flags = {"model": model, "model_type": "qwen3", "template": "chatml", "dataset": folder / "tools/messages.jsonl"}
    flags |= {"tuner_type": "lora", "lora_rank": LORA["lora_r"], "lora_alpha": LORA["lora_alpha"], "max_length": 512}
    flags |= {"lora_dropout": 0, "target_modules": TARGETS, "torch_dtype": "float32", "split_dataset_ratio": 0}
    flags |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": BATCH // 8, "learning_rate": RATE}
    flags |= {"lr_scheduler_type": "cosine", "warmup_ratio": 0, "report_to": "none", "logging_steps": 1}
    flags |= {"output_dir": output, "add_version": "false", "max_steps": steps, "save_steps": steps}
    seconds = seconds_of([str(ROOT / ".venv-ms-swift/bin/swift"), "sft", *words_of(flags)])
    (saved,) = output.glob("checkpoint-*")
    for path in saved.iterdir():
        path.rename(output / path.name)
    return seconds


TOOLS = {"trl": trl, "llama-factory": llama_factory, "ms-swift": ms_swift}


def write_rows(folder: Path, train: list[dict], val: list[dict]) -> None:
    """The same rows as each tool reads them."""
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "val.jsonl", val)
    for name in ("trl", "tools"):
        (folder / name).mkdir()
    plain = [{key: row[key] for key in ("prompt", "completion")} for row in train]
    write_jsonl(folder / "trl/train.jsonl", plain)
    write_jsonl(folder / "tools/messages.jsonl", [{"messages": row["prompt"] + row["completion"]} for row in plain])
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    about = {"file_name": "messages.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    write_json(folder / "tools/dataset_info.json", {"rows": about})


def validation_loss(model: str, adapter: Path, rows: list[dict]) -> float:
    from common.likelihood import nll_per_character
    from common.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    return statistics.fmean(nll_per_character(load_model(model, tokenizer, "float32", str(adapter)), tokenizer, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "data/tiny_qwen3"), help="base model folder")
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps of 64 rows")
    parser.add_argument("--rounds", type=int, default=3, help="how often all are run, in turn")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["trl"], help="what stands beside stage 20")
    options = parser.parse_args()

    data = ROOT / "processed_data/poems"
    train = read_jsonl(data / "sft_train.jsonl", "sft")[: BATCH * options.steps]
    val = read_jsonl(data / "sft_val.jsonl", "sft")[:256]
    held_out = [{"prompt": row["prompt"], "completion": row["completion"]} for row in val]
    results: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, train, val)

        from common.models import load_tokenizer

        tokenizer = load_tokenizer(options.model)
        texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in train]
        tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

        for number in range(options.rounds):
            for label, run in (("stage 20", ours), *((tool, TOOLS[tool]) for tool in options.tools)):
                output = folder / f"{label.replace(' ', '_')}_{number}"
                speed = tokens / run(options.model, folder, output, options.steps)
                results.setdefault(label, []).append((speed, validation_loss(options.model, output, held_out)))
                print(
                    f"round {number + 1}: {label}: {speed:.0f} tokens/s, validation loss {results[label][-1][1]:.4f}",
                    flush=True,
                )

    print(f"\n| | tokens/s, median of {options.rounds} | lowest to highest | stage 20 is faster by | validation loss |")
    print("|---|---:|---:|---:|---:|")
    fastest = statistics.median(speed for speed, _ in results["stage 20"])
    for label, rounds in results.items():
        speeds, losses = zip(*rounds, strict=True)
        speed, loss = statistics.median(speeds), statistics.median(losses)
        spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
        print(f"| {label} | {speed:.0f} | {spread} | {fastest / speed:.1f} x | {loss:.4f} |")
    print(json.dumps({"steps": options.steps, "rows": len(train), "tokens": tokens, "threads": os.cpu_count()}))


if __name__ == "__main__":
    main()
