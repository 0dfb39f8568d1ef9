"""Four ways to SFT side by side: which tokens each trains, its loss curve, its text.

- tokens: what each way trains of one question and of one conversation, under the embedded template and Qwen's own, as
  trl carries them
- count: how many tokens each way trains of the same rows
- train: stage 20 with each --row-style and stage 21 on the same rows, with the same settings and seed

Reads   data/tiny_qwen3; for count and train: the first rows of processed_data/{data}/sft_train.jsonl, sft_val.jsonl
(stages 10, 17)
Writes  Markdown tables on standard output; adapters in a temporary folder
Run     python benchmarks/sft_ways.py tokens
        python benchmarks/sft_ways.py count --data chat
        python benchmarks/sft_ways.py train --data poems
        python benchmarks/sft_ways.py train --data chat
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.jsonl import read_json, read_jsonl, write_jsonl  # noqa: E402

STYLES = ("prompt", "text", "template", "messages")
WAYS = (*STYLES, "plain")  # plain is stage 21
VAL_ROWS = 32
MODEL = ROOT / "data/tiny_qwen3"
TEMPLATES = (("embedded", False), ("qwen2_5", False), ("qwen3_instruct_2507", False), ("qwen3", False), ("qwen3", True))
ONE = {
    "prompt": [{"role": "user", "content": "今天下雨吗"}],
    "completion": [{"role": "assistant", "content": "下雨。"}],
}
TALK = {
    "prompt": [*ONE["prompt"], *ONE["completion"], {"role": "user", "content": "明天呢"}],
    "completion": [{"role": "assistant", "content": "不下。"}],
}


def stage_21():
    spec = importlib.util.spec_from_file_location("stage_21", ROOT / "scripts/21_train_sft_plain.py")
    module = sys.modules["stage_21"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained_rows(
    way: str, rows: list[dict], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, thinking: bool
) -> list[list[int]]:
    """The trained tokens of every row, as the way's own trainer prepares them."""
    if way == "plain":
        encode = stage_21().encode
        labels = [encode(row, tokenizer, 512, thinking)["labels"] for row in rows]
    else:
        from trl import SFTConfig, SFTTrainer

        from common.models import marks_answers
        from common.training.loss_masks import row_dataset

        with tempfile.TemporaryDirectory() as folder:
            marked = way in ("prompt", "messages") and marks_answers(tokenizer)
            config = SFTConfig(
                output_dir=folder,
                max_length=512,
                completion_only_loss=True,
                assistant_only_loss=marked,
                use_cpu=True,
                bf16=False,
                report_to="none",
            )
            dataset = row_dataset(rows, way, tokenizer, thinking)
            trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
            labels = trainer.train_dataset["labels"]
    return [[label for label in row if label != -100] for row in labels]


def show_tokens() -> None:
    import trl

    from common.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(MODEL))
    model = load_model(str(MODEL), tokenizer, "float32")
    print("| template | thinking | way | trained of one question | trained of a conversation |\n|---|---|---|---|---|")
    for name, thinking in TEMPLATES:
        changed = copy.deepcopy(tokenizer)
        if name != "embedded":
            file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
            changed.chat_template = file.read_text(encoding="utf-8")
        for way in WAYS:
            ids = trained_rows(way, [ONE, TALK], changed, model, thinking)
            texts = [tokenizer.decode(row).replace("\n", "⏎").replace("|", "\\|") for row in ids]
            print(f"| {name} | {'on' if thinking else 'off'} | {way} | `{texts[0]}` | `{texts[1]}` |", flush=True)


def train(way: str, folder: Path, rows: int) -> dict:
    """One run of the way's stage: its log and its record."""
    output = folder / way
    words = [
        "--train-file",
        folder / "train.jsonl",
        "--val-file",
        folder / "val.jsonl",
        "--output-dir",
        output,
        "--dtype",
        "float32",
        "--batch-size",
        16,
        "--accumulation",
        1,
        "--eval-steps",
        max(1, rows // 64),
    ]
    more = ["--row-style", way, "--report-to", "none", "--probe-count", 8] if way in STYLES else ["--probe-count", 32]
    script = "20_train_sft.py" if way in STYLES else "21_train_sft_plain.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, [*words, *more])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return {"log": read_json(output / "log_history.json"), **read_json(output / "run.json")["figures"]}


def load(data: str, rows: int):
    from common.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(MODEL))
    train_rows, val_rows = (
        read_jsonl(ROOT / "processed_data" / data / f"sft_{split}.jsonl", "sft") for split in ("train", "val")
    )
    return tokenizer, load_model(str(MODEL), tokenizer, "float32"), train_rows[:rows], val_rows[:VAL_ROWS]


def show_counts(data: str, rows: int) -> None:
    tokenizer, model, train_rows, _ = load(data, rows)
    print(f"first {len(train_rows)} rows of {data}:\n\n| way | trained tokens |\n|---|---:|")
    for way in WAYS:
        print(f"| {way} | {sum(map(len, trained_rows(way, train_rows, tokenizer, model, False)))} |", flush=True)


def show_training(data: str, rows: int) -> None:
    tokenizer, model, train_rows, val_rows = load(data, rows)
    print(f"first {len(train_rows)} rows of {data}, {len(val_rows)} validation rows:\n")
    print("| way | trained tokens | validation loss as training goes on | NLL per character | stopped | first sample |")
    print("|---|---:|---|---:|---:|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "train.jsonl", train_rows)
        write_jsonl(folder / "val.jsonl", val_rows)
        for way in WAYS:
            tokens = sum(map(len, trained_rows(way, train_rows, tokenizer, model, False)))
            found = train(way, folder, len(train_rows))
            losses = " ".join(f"{entry['eval_loss']:.4f}" for entry in found["log"] if "eval_loss" in entry)
            sample = found["samples"][0].replace("\n", "⏎")[:40]
            print(
                f"| {way} | {tokens} | {losses} | {found['val_nll']:.4f} | {found['stopped']:.0%} | {sample} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokens", "count", "train"], help="which comparison")
    parser.add_argument("--data", default="poems", help="folder in processed_data")
    parser.add_argument("--rows", type=int, default=200, help="training rows")
    options = parser.parse_args()
    if options.what == "tokens":
        show_tokens()
    elif options.what == "count":
        show_counts(options.data, options.rows)
    else:
        show_training(options.data, options.rows)


if __name__ == "__main__":
    main()
