"""How long is a GRPO step of stage 50, rollout and update apart, beside trl's trainer as it comes?

All take the same model, prompts, reward and 128 answers a step (16 prompts x 8), in turn, several rounds. Everything
else of trl is its default: 8 answers a micro-batch, gradient checkpointing, tiled log-probabilities; only bfloat16 is
off, because it refuses to start on a CPU. Stage 50 runs in float32, and in bfloat16 too where --dtype auto would take
it. The rollout ends when rewards and reference log-probabilities are known; the update is forward and backward.

A step's products, counted by torch in the first step, over its time say how far it is from the rate at which the
machine multiplies two large matrices.

Reads   --model (a merged SFT model), processed_data/poems/prompts_train.jsonl (stage 10)
Writes  a Markdown table on standard output; nothing else stays
Run     python benchmarks/grpo_step.py --model checkpoints/poems/sft_merged
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

ANSWERS, GROUP = 128, 8


def multiplication_rate(dtype: str, size: int = 2048) -> float:
    """GFLOP/s of the best of ten products of two square matrices."""
    import torch

    left, right = torch.randn(2, size, size, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e9


def measure(
    dtype: str, model_path: str, rows: list[dict], steps: int, beta: float
) -> tuple[list[tuple[float, float]], float]:
    """(rollout, update) in seconds for each step but the first, which warms up, and GFLOP of the first. dtype: of stage
    50; empty for trl."""
    from contextlib import nullcontext

    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.flop_counter import FlopCounterMode
    from trl import GRPOConfig, GRPOTrainer

    from common.models import load_model, load_tokenizer
    from common.training.trl_cpu import LeanGRPOTrainer

    tokenizer = load_tokenizer(model_path)
    model = load_model(model_path, tokenizer, dtype or "float32")
    ours = {"per_device_train_batch_size": ANSWERS, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    theirs = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": ANSWERS // 8}
    times: list[tuple[float, float]] = []

    class Timed(LeanGRPOTrainer if dtype else GRPOTrainer):
        rollout = flops = 0.0

        def _generate_and_score_completions(self, *args, **kwargs):
            started = time.perf_counter()
            result = super()._generate_and_score_completions(*args, **kwargs)
            self.rollout += time.perf_counter() - started
            return result

        def training_step(self, *args, **kwargs):
            if self._step % self.args.gradient_accumulation_steps == 0:
                self.started, self.rollout = time.perf_counter(), 0.0
            counting = FlopCounterMode(display=False) if not times else nullcontext()
            with counting:
                loss = super().training_step(*args, **kwargs)
            if not times:
                self.flops += counting.get_total_flops()
            if self._step % self.args.gradient_accumulation_steps == 0:
                times.append((self.rollout, time.perf_counter() - self.started - self.rollout))
            return loss

    from tasks import poems

    def reward(prompts: list[list[dict]], completions: list[list[dict]], form: list[str], **_):
        texts = [completion[-1]["content"] for completion in completions]
        meta = [{"form": name} for name in form]
        parts = [part(None, texts, meta) for part in (poems.form, poems.rhyme, poems.meter)]
        return [sum(value or 0.0 for value in values) / 3 for values in zip(*parts, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            num_generations=GROUP,
            max_completion_length=96,
            max_steps=steps,
            beta=beta,
            learning_rate=1e-3,
            bf16=dtype == "bfloat16",
            use_cpu=model.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            **(ours if dtype else theirs),
        )
        lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
        data = Dataset.from_list([{"prompt": row["prompt"], "form": row["meta"]["form"]} for row in rows])
        trainer = Timed(
            model=model,
            args=config,
            reward_funcs=reward,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.train()
    return times[1:], trainer.flops / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=str(ROOT / "checkpoints/poems/sft_merged"))
    parser.add_argument("--prompts", type=Path, default=ROOT / "processed_data/poems/prompts_train.jsonl")
    parser.add_argument("--steps", type=int, default=4, help="steps a round; the first warms up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beta", type=float, default=0.02, help="above 0 there is a reference pass in the rollout")
    args = parser.parse_args()

    from common.jsonl import read_jsonl
    from common.models import resolve_dtype

    rows = read_jsonl(args.prompts, "prompts")[:512]
    dtypes = {"trl": "", "stage 50, float32": "float32"}
    if str(resolve_dtype("auto")) == "torch.bfloat16":
        dtypes["stage 50, bfloat16"] = "bfloat16"
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in dtypes}
    work = {}
    for _ in range(args.rounds):
        for kind, seen in times.items():
            steps, work[kind] = measure(dtypes[kind], args.model, rows, args.steps, args.beta)
            seen += steps
    print(f"\n{ANSWERS} answers a step, beta {args.beta}, medians of {len(times['trl'])} steps, seconds\n")
    heads = ["", "rollout and rewards", "update", "whole step", "lowest to highest", "against trl", "GFLOP", "rate"]
    print(f"| {' | '.join(heads)} |\n|---|{'---:|' * 7}")
    theirs = statistics.median(map(sum, times["trl"]))
    for kind, seen in times.items():
        rollout, update = (statistics.median(column) for column in zip(*seen, strict=True))
        sums = [sum(pair) for pair in seen]
        whole = statistics.median(sums)
        rate = multiplication_rate(dtypes[kind] or "float32")
        print(
            f"| {kind} | {rollout:.2f} | {update:.2f} | {whole:.2f} | {min(sums):.2f} to {max(sums):.2f} | "
            f"{theirs / whole:.2f} x | {work[kind]:.0f} | {work[kind] / whole / rate:.1%} of {rate:.0f} GFLOP/s |"
        )


if __name__ == "__main__":
    main()
