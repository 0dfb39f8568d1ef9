"""What a training stage shows of itself while it runs: does it stop, what does it write, how does the loss fall."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback


def stop_rate(model, tokenizer, rows: list[dict], count: int, max_new_tokens: int, seed: int, enable_thinking: bool) -> tuple[float, list[str]]:
    """Share of `count` answers sampled at temperature 1 that end by eos, and the answers."""
    from common.generation import render_prompt, sample

    texts = [render_prompt(tokenizer, row["prompt"], enable_thinking) for row in rows[:count]]
    results = sorted(sample(model, tokenizer, texts, max_new_tokens=max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=seed))
    return sum(reason == "stop" for _, _, reason, _ in results) / len(results), [text for _, text, _, _ in results]


class StopProbe(TrainerCallback):
    """At every evaluation: the share of samples that stopped, and two of them, in the log and in the metrics.

    Sampling must not move the training run: the random state is put back afterwards.
    """

    def __init__(self, tokenizer, rows: list[dict], count: int, max_new_tokens: int, seed: int, enable_thinking: bool):
        self.arguments = (tokenizer, rows, count, max_new_tokens, seed, enable_thinking)
        self.history: list[dict] = []

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        import torch

        with torch.random.fork_rng():
            rate, texts = stop_rate(model, *self.arguments)
        self.history.append({"step": state.global_step, "stopped": rate, "samples": texts[:2]})
        state.log_history.append({"step": state.global_step, "stop_rate": rate})
        if metrics is not None:
            metrics["eval_stop_rate"] = rate
        print(f"step {state.global_step}: {rate:.1%} of {len(texts)} samples stopped")
        for text in texts[:2]:
            print(f"  {text[:120]!r}")


def plot_learning_curve(log_history: list[dict], path: Path, names: dict[str, str]) -> None:
    """A PNG of the logged values `names` (key in the log -> label) over steps; keys that were never logged are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for key, label in names.items():
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None, markersize=3)
    axes.set_xlabel("step")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
