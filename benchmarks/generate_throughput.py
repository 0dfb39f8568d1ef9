"""How fast does stage 60 generate, with each backend, beside a transformers pipeline and beside vLLM's engine alone?

Four ways draw samples (temperature 1) for the same prompts with the same model and room, in turn, several rounds, in
one run:
  pipeline     transformers' text-generation pipeline, batch_size 8, as its documentation shows it
  hf           stage 60's backend hf: batches by length within --batch-tokens
  vllm bare    LLM.generate of vLLM's offline engine, no seeds a prompt, no text made of the tokens
  vllm         stage 60's backend vllm: rows as they finish, and the text
Each way runs in a process of its own that loads its model once; a warm-up of 8 prompts goes before, and only generation
is timed. Tokens are those of the answers, up to and with their end.

Reads   --model, first --prompts rows of processed_data/poems/prompts_test.jsonl (stage 10)
Writes  a Markdown table and a line of JSON on standard output
Run     python benchmarks/generate_throughput.py --model checkpoints/poems/sft_merged
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

WAYS = ("pipeline", "hf", "vllm bare", "vllm")
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def run_pipeline(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase):
    """Calls of the pipeline return text with the prompt cut off: tokens are counted in it, and an end where it is short
    of the limit."""
    from transformers import pipeline

    from common.models import load_model

    model = load_model(options.model, tokenizer, options.dtype)
    tokenizer.padding_side = "left"
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=8)

    def generate(texts: list[str], seed: int) -> int:
        import torch

        torch.manual_seed(seed)
        room = {"max_new_tokens": options.max_new_tokens, "do_sample": True, "return_full_text": False}
        found = pipe(texts, add_special_tokens=False, **room, **SAMPLING)
        counts = [len(tokenizer(one[0]["generated_text"], add_special_tokens=False)["input_ids"]) for one in found]
        return sum(count + (count < options.max_new_tokens) for count in counts)

    return generate


def run_hf(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase):
    from common.generation import sample
    from common.models import load_model

    model = load_model(options.model, tokenizer, options.dtype)
    room = {"max_new_tokens": options.max_new_tokens, **SAMPLING}
    return lambda texts, seed: sum(row[3] for row in sample(model, tokenizer, texts, seed=seed, **room))


def run_vllm(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, bare: bool, longest: int):
    from common.vllm_engine import open_engine, stop_tokens, vllm_sample

    engine = open_engine(options.model, options.dtype, None, longest + options.max_new_tokens)
    stops = stop_tokens(options.model, tokenizer)
    from vllm import SamplingParams

    def generate_bare(texts: list[str], seed: int) -> int:
        prompts = [{"prompt_token_ids": ids} for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        params = SamplingParams(max_tokens=options.max_new_tokens, stop_token_ids=stops, detokenize=False, **SAMPLING)
        return sum(len(row.outputs[0].token_ids) for row in engine.generate(prompts, params, use_tqdm=False))

    room = {"max_new_tokens": options.max_new_tokens, **SAMPLING}
    if bare:
        return generate_bare
    return lambda texts, seed: sum(row[3] for row in vllm_sample(engine, tokenizer, texts, stops, seed=seed, **room))


def serve_way(options: argparse.Namespace) -> None:
    """One way in this process: answers each line of standard input, a seed, with {"tokens", "seconds"}."""
    from common.generation import render_prompt
    from common.jsonl import read_jsonl
    from common.models import load_tokenizer

    rows = read_jsonl(options.prompts_file, "prompts")[: options.prompts]
    tokenizer = load_tokenizer(options.model)
    texts = [render_prompt(tokenizer, row["prompt"]) for row in rows]
    longest = max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    generate = {
        "pipeline": lambda: run_pipeline(options, tokenizer),
        "hf": lambda: run_hf(options, tokenizer),
        "vllm bare": lambda: run_vllm(options, tokenizer, True, longest),
        "vllm": lambda: run_vllm(options, tokenizer, False, longest),
    }[options.way]()
    generate(texts[:8], 0)
    print("RESULT ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        tokens = generate(texts, int(line))
        result = {"tokens": tokens, "seconds": time.perf_counter() - started}
        print(f"RESULT {json.dumps(result)}", flush=True)


def answer_of(process: subprocess.Popen) -> str:
    for line in process.stdout:
        if line.startswith("RESULT "):
            return line.removeprefix("RESULT ").strip()
    raise SystemExit(f"{process.args[-1]}: ended early")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "data/tiny_qwen3"), help="model folder")
    parser.add_argument("--prompts-file", default=str(ROOT / "processed_data/poems/prompts_test.jsonl"))
    parser.add_argument("--prompts", type=int, default=256, help="prompts of a round")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3, help="how often all ways are run, in turn")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        return serve_way(options)

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    processes, speeds, counts = {}, {way: [] for way in options.ways}, {}
    try:
        for way in options.ways:  # all are loaded, one works at a time
            words = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--way", way]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            processes[way] = subprocess.Popen(words, env=environment, text=True, encoding="utf-8", **pipes)
            answer_of(processes[way])
        for number in range(options.rounds):
            for way, process in processes.items():
                process.stdin.write(f"{42 + number}\n")
                process.stdin.flush()
                result = json.loads(answer_of(process))
                counts[way] = result["tokens"]
                speeds[way].append(result["tokens"] / result["seconds"])
                print(f"round {number + 1}: {way}: {speeds[way][-1]:.0f} tokens/s", flush=True)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()

    medians = {way: statistics.median(found) for way, found in speeds.items()}
    first = medians[options.ways[0]]
    print(
        f"\n| | tokens/s, median of {options.rounds} | lowest to highest | against {options.ways[0]} "
        "|\n|---|---:|---:|---:|"
    )
    for way, median in medians.items():
        print(f"| {way} | {median:.0f} | {min(speeds[way]):.0f} to {max(speeds[way]):.0f} | {median / first:.2f} x |")
    if {"vllm", "vllm bare"} <= set(medians):
        print(f"\nbackend vllm runs at {medians['vllm'] / medians['vllm bare']:.1%} of the bare engine")
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(json.dumps({"prompts": options.prompts, "tokens_last_round": counts, "cores": os.cpu_count(), "load": load}))


if __name__ == "__main__":
    main()
