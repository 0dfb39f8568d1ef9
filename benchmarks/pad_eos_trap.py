"""Does a model that is trained with pad = eos still stop? The same rows, recipe and seed, only the pad token differs.

The recipe is the one that most tutorials show: rows rendered by the chat template, transformers' own
DataCollatorForLanguageModeling and Trainer, all weights. That collator writes -100 wherever a label is the pad token;
with pad = eos every eos goes with it. First stage 19 is asked what it thinks of the model folder.

Reads   the first quatrains of processed_data/poems/sft_train.jsonl, 64 of sft_val.jsonl (stage 10); data/tiny_qwen3
Writes  a Markdown table on standard output; models in a temporary folder
Run     python benchmarks/pad_eos_trap.py
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.jsonl import read_json, read_jsonl, write_json, write_jsonl  # noqa: E402

NEW_TOKENS = 128  # given to each sample; a quatrain needs at most 33
SAMPLES = 64


def folder_with_pad(model: Path, folder: Path, pad: str | None) -> Path:
    """A copy of the model folder whose tokenizer pads with `pad`; None keeps the model's own."""
    shutil.copytree(model, folder)
    if pad:
        config = read_json(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", config | {"pad_token": pad})
    return folder


def preflight(model: Path, train: Path, val: Path) -> tuple[int, list[str]]:
    """Exit code of stage 19 for this model, and its lines about pad."""
    words = ["--model", model, "--train-file", train, "--val-file", val, "--preview", "None"]
    command = [sys.executable, str(ROOT / "scripts/19_check_data.py"), *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, [" ".join(line.split()) for line in lines if "pad" in line.lower()]


def train_and_sample(model: Path, train: list[dict], val: list[dict], steps: int, lr: float, output: Path) -> dict:
    """What the tutorial's recipe makes of the model in `model`, with the pad token that its folder names."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from common.training.probes import stop_rate

    tokenizer = AutoTokenizer.from_pretrained(model)  # not through common.models, which would fix it
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in train]
    rows = [{"input_ids": ids} for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    seen = sum(row["input_ids"].count(tokenizer.eos_token_id) for row in rows)
    trained = sum(int((collator([row])["labels"] == tokenizer.eos_token_id).sum()) for row in rows)

    set_seed(42)
    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    config = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(base, config, data_collator=collator, train_dataset=rows)
    loss = trainer.train().training_loss
    # stopping is asked for fairly: at the eos of the template, and at the other stop token of the model as it ships
    stops = base.generation_config.eos_token_id
    base.generation_config.eos_token_id = stops if isinstance(stops, list) else [stops]
    stopped, samples = stop_rate(base, tokenizer, val, SAMPLES, NEW_TOKENS, 42, False)
    return {"loss": loss, "eos": seen, "trained": trained, "stopped": stopped, "sample": samples[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "data/tiny_qwen3"), help="base model folder")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of 16 rows")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate, all weights are trained")
    options = parser.parse_args()

    def quatrains(name: str, count: int) -> list[dict]:
        rows = read_jsonl(ROOT / "processed_data/poems" / f"sft_{name}.jsonl", "sft")
        return [row for row in rows if row["meta"]["form"] == "五言绝句"][:count]

    train, val = quatrains("train", 16 * options.steps), quatrains("val", SAMPLES)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, rows in (("train", train), ("val", val)):
            write_jsonl(folder / f"sft_{split}.jsonl", rows)
        eos = read_json(Path(options.model) / "tokenizer_config.json")["eos_token"]
        for label, pad in (("pad = eos", eos), ("pad of its own", None)):
            model = folder_with_pad(Path(options.model), folder / ("same" if pad else "own"), pad)
            code, lines = preflight(model, folder / "sft_train.jsonl", folder / "sft_val.jsonl")
            print(f"{label}: stage 19 ends with {code}")
            for line in lines:
                print(f"  {line}".replace(str(folder), "TMP"), flush=True)
            results[label] = train_and_sample(model, train, val, options.steps, options.lr, folder / "out")
    print(
        "\n| | eos in the rows | eos trained | training loss | stopped | first sample |\n|---|---:|---:|---:|---:|---|"
    )
    for label, found in results.items():
        sample = found["sample"].replace("\n", " / ")
        sample = sample if len(sample) <= 40 else f"{sample[:40]}… ({len(sample)} characters)"
        cells = [str(found["eos"]), str(found["trained"]), f"{found['loss']:.3f}", f"{found['stopped']:.1%}", sample]
        print(f"| {label} | " + " | ".join(cells) + " |")
    print(json.dumps({"steps": options.steps, "rows": len(train), "samples": SAMPLES, "new tokens": NEW_TOKENS}))


if __name__ == "__main__":
    main()
