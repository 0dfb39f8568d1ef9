"""What a training stage shows of itself while it runs: does it stop, and what does it write."""

from __future__ import annotations

from transformers import TrainerCallback


def stop_rate(
    model, tokenizer, rows: list[dict], count: int, max_new_tokens: int, seed: int, enable_thinking: bool
) -> tuple[float, list[str]]:
    """Share of `count` answers sampled at temperature 1 that end by eos, and the answers."""
    from common.generation import render_prompt, sample

    texts = [render_prompt(tokenizer, row["prompt"], enable_thinking) for row in rows[:count]]
    results = sorted(
        sample(model, tokenizer, texts, max_new_tokens=max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
    )
    return sum(reason == "stop" for _, _, reason, _ in results) / len(results), [text for _, text, _, _ in results]


class StopProbe(TrainerCallback):
    """At every evaluation: the share of samples that stopped, through the trainer's log, and two of the samples beside it.

    Sampling must not move the training run: the random state is put back afterwards.
    """

    def __init__(
        self, trainer, tokenizer, rows: list[dict], count: int, max_new_tokens: int, seed: int, enable_thinking: bool
    ):
        self.trainer = trainer
        self.arguments = (tokenizer, rows, count, max_new_tokens, seed, enable_thinking)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        import torch

        with torch.random.fork_rng():
            rate, texts = stop_rate(model, *self.arguments)
        self.trainer.log({"eval_stop_rate": rate})
        state.log_history[-1]["samples"] = texts[:2]
        print(f"step {state.global_step}: {rate:.1%} of {len(texts)} samples stopped")
        for text in texts[:2]:
            print(f"  {text[:120]!r}")
