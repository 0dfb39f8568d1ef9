"""Peak memory and speed of every training stage on one GPU, with random weights in the shapes of real models.

Memory and speed do not depend on what the weights know, so no download is needed: a model is drawn in the shape of
Qwen3-4B or Qwen2.5-7B, with the embedded base's tokenizer and the whole vocabulary of the real one. Rows are prompts
and answers of about --length tokens together. Stages 50 and 51 write answers with transformers; a random model never
stops, so each answer has all --new-tokens. Seconds are counted from the end of the first step to that of the last.

Reads   data/tiny_qwen3 (tokenizer); data/weibo/sample_comments.json (text of the rows)
Writes  a Markdown table on standard output; the folder --work, logs included
Run     python benchmarks/gpu_memory.py
        python benchmarks/gpu_memory.py --cases qwen2.5-7b:4bit --stages 20_train_sft 50_train_grpo
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.jsonl import read_json, write_jsonl  # noqa: E402

# name -> what config.json says of FIELDS. All are built as Qwen3: for qwen2 transformers takes a tokenizer class of its
# own, which breaks the embedded base's; what Qwen2.5 has besides, the biases of q, k and v, weighs nothing.
SHAPES = {
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 128, True, 151936),
    "qwen3-4b": (36, 2560, 9728, 32, 8, 128, True, 151936),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 128, False, 152064),
    "test": (2, 64, 128, 4, 2, 16, True, 8704),  # tests/slow
}
FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
FIELDS += ("head_dim", "tie_word_embeddings", "vocab_size")
STAGES = ("20_train_sft", "30_train_reward", "40_train_dpo", "41_train_kto", "50_train_grpo", "51_train_ppo")


def draw_base(shape: str, folder: Path) -> None:
    """A model folder of this shape, its weights drawn at random in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.models import align_stop_tokens, load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / "data/tiny_qwen3"))
    words = dict(zip(FIELDS, SHAPES[shape], strict=True))
    config = AutoConfig.for_model("qwen3", **words, max_position_embeddings=32768)
    torch.manual_seed(42)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    align_stop_tokens(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path, count: int, length: int) -> None:
    """Rows of every kind, `length` tokens each, half of them answer."""
    text = "".join(row["content"] for row in read_json(ROOT / "data/weibo/sample_comments.json"))
    text, size = "".join(re.findall("[一-鿿]", text)), length // 2 - 8  # a character is a token, nearly always
    parts = [text[place : place + size] for place in range(0, len(text) - size, size)]
    rows = []
    for number in range(count):
        prompt, chosen = [{"role": "user", "content": parts[number]}], parts[number][:8] + "好" * (size - 8)
        rejected = {"role": "assistant", "content": parts[-number - 1]}
        rows.append((prompt, {"role": "assistant", "content": chosen}, rejected))
    kinds = {
        "sft": [{"prompt": prompt, "completion": [good], "meta": {}} for prompt, good, _ in rows],
        "pref": [{"prompt": prompt, "chosen": [good], "rejected": [bad], "meta": {}} for prompt, good, bad in rows],
        "kto": [
            {"prompt": prompt, "completion": [turn], "label": is_good, "meta": {}}
            for prompt, good, bad in rows
            for turn, is_good in ((good, True), (bad, False))
        ],
        "prompts": [{"prompt": prompt, "meta": {}} for prompt, _, _ in rows],
    }
    for kind, made in kinds.items():
        for split, part in (("train", made[4:]), ("val", made[:4])):
            write_jsonl(folder / f"{kind}_{split}.jsonl", part)


def command(stage: str, base: Path, quantize: str, work: Path, options: argparse.Namespace) -> list[str]:
    """The stage with the settings of docs/OPERATIONS.md for a card of 24 GB: micro-batches of 4 rows or pairs."""
    kind = {"20": "sft", "30": "pref", "40": "pref", "41": "kto", "50": "prompts", "51": "prompts"}[stage[:2]]
    words = {"model": base, "train_file": work / f"{kind}_train.jsonl", "output_dir": work / "out"}
    words |= {"val_file": work / f"{'sft' if kind == 'prompts' else kind}_val.jsonl", "lora_r": 32, "lora_alpha": 64}
    words |= {"max_length": 2 * options.length, "dtype": "bfloat16", "report_to": "none", "lr": 1e-3}
    if kind == "prompts":
        words |= {"max_steps": options.written, "eval_steps": options.written, "probe_count": 2, "batch_size": 16}
        words |= {"max_new_tokens": options.new_tokens, "task": "chat"}
    else:
        words |= {"batch_size": 4, "accumulation": 1, "eval_steps": options.steps}
        words |= {"epochs": 1, "max_train": 4 * options.steps} if stage[:2] == "30" else {"max_steps": options.steps}
    if stage[:2] in ("20", "40", "41"):
        words |= {"probe_count": 1, "probe_tokens": 4}
    if quantize:
        words |= {"quantize": quantize}
    flags = [str(part) for name, value in words.items() for part in (f"--{name.replace('_', '-')}", value)]
    if kind == "prompts":  # some of these tell any two random texts apart
        flags += ["--rewards", "chinese", "no_repeat", "closed"]
    return [sys.executable, str(ROOT / f"scripts/{stage}.py"), *flags, "--gradient-checkpointing", "--overwrite"]


def measured(words: list[str], steps: int, log: Path) -> tuple[float, str]:
    """(seconds a step, the last line of an error) of a stage."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment |= {"TQDM_MININTERVAL": "0"}  # every step is shown, quick ones too
    child = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text, ended = b"", {}  # step -> when its end was shown
    while part := os.read(child.stdout.fileno(), 1 << 16):
        text += part
        for done in re.findall(rb"\b(\d+)/%d \[\d|^step (\d+): " % steps, text[-len(part) - 40 :], re.MULTILINE):
            ended.setdefault(int(done[0] or done[1]), time.monotonic())
    log.write_bytes(text)
    ended.pop(0, None)
    faults = re.findall(r"^.*(?:error:|Error).*$", text.decode(errors="replace"), re.MULTILINE)
    failed = (faults or ["it ended without a word"])[-1][-200:] if child.wait() else ""
    seconds = (ended[steps] - ended[1]) / (steps - 1) if {1, steps} <= ended.keys() else float("nan")
    return seconds, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["qwen3-4b", "qwen2.5-7b:4bit"], help="SHAPE or SHAPE:4bit")
    parser.add_argument("--stages", nargs="+", default=STAGES, help="names of files in scripts/")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens of an answer in stages 50 and 51")
    parser.add_argument("--steps", type=int, default=6, help="of 4 rows or pairs")
    parser.add_argument("--written", type=int, default=3, help="steps of 16 answers in stages 50 and 51")
    parser.add_argument("--work", type=Path, default=ROOT / "checkpoints/gpu_memory", help="models and logs")
    options = parser.parse_args()
    for case in options.cases:
        if case.removesuffix(":4bit") not in SHAPES:
            raise SystemExit(f"error: no case {case}; fix: {', '.join(SHAPES)}, each with :4bit behind it or without")
        if (work := options.work / case.replace(":", "_")).exists():
            raise SystemExit(f"error: {work} is there; fix: delete it, or another --work")
    for stage in set(options.stages) - set(STAGES):
        raise SystemExit(f"error: no stage {stage}; fix: {', '.join(STAGES)}")

    print("| model | stage | peak GPU memory, GiB | seconds a step | tokens a step | tokens/s |")
    print("|---|---|---:|---:|---:|---:|")
    for case in options.cases:
        shape, _, quantize = case.partition(":")
        work = options.work / case.replace(":", "_")
        work.mkdir(parents=True)
        write_rows(work, 4 + max(4 * options.steps, 16), options.length)
        draw_base(shape, work / "base")
        for stage in options.stages:
            words = command(stage, work / "base", quantize, work, options)
            shutil.rmtree(work / "out", ignore_errors=True)
            steps = options.written if stage[0] == "5" else options.steps
            seconds, failed = measured(words, steps, work / f"{stage}.log")
            record = work / "out/run.json"
            peak = read_json(record).get("peak_gpu_memory_mib", 0) / 1024 if record.exists() else 0
            rows = 16 if stage[0] == "5" else 8 if stage[:2] in ("30", "40") else 4
            tokens = rows * (options.length // 2 + options.new_tokens if stage[0] == "5" else options.length)
            cells = [case, stage, f"{peak:.1f}", f"{seconds:.2f}", str(tokens), f"{tokens / seconds:,.0f}"]
            print("|", " | ".join(cells), "|", failed, flush=True)
        shutil.rmtree(work / "base")
        shutil.rmtree(work / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
