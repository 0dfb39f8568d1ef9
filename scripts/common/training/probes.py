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


def kl_to_reference(model, tokenizer, rows: list[dict], answers: list[str], enable_thinking: bool) -> float:
    """KL(policy || reference) in nats an answer: at every token of `answers` (samples of the policy, eos added) the exact divergence of
    the two next-token distributions, summed over the answer, averaged over answers (the chain rule of KL; arXiv 2009.01325, section 3.4).

    model: a PeftModel, whose reference is itself with the adapter switched off. Texts are tokenized again, which may cut them
    elsewhere than they were sampled.
    """
    import torch

    from common.generation import render_prompt

    was_training = model.training
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for row, answer in zip(rows, answers, strict=False):
            prompt = tokenizer(render_prompt(tokenizer, row["prompt"], enable_thinking), add_special_tokens=False)[
                "input_ids"
            ]
            ids = prompt + tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids = torch.tensor([ids[: getattr(model.config, "max_position_embeddings", len(ids))]], device=model.device)
            kept = torch.arange(
                len(prompt) - 1, ids.size(1) - 1, device=model.device
            )  # what predicts the answer's tokens
            policy = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0].float().log_softmax(-1)
            with model.disable_adapter():
                reference = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0].float().log_softmax(-1)
            total += (policy.exp() * (policy - reference)).sum().item()
    model.train(was_training)
    return total / max(1, len(answers))


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


class DriftProbe(TrainerCallback):
    """Every `every` steps of RL, on one fixed set of prompts: mean reward, KL to the reference, held-out NLL, share of answers that stop.

    A budget (nats, 0 = none) ends the run once the probe is above it; the adapter of the last probe within the budgets is kept in `kept`.

    rows: of the SFT schema, their completions are the held-out answers.
    rewards: as common.training.rewards.load_rewards gives them; answers that they cannot judge are left out of the mean.
    """

    def __init__(self, trainer, tokenizer, rows: list[dict], rewards, every: int, max_new_tokens: int, seed: int, enable_thinking: bool,
                 kl_budget: float = 0.0, nll_budget: float = 0.0):  # fmt: skip
        self.trainer, self.tokenizer, self.rows, self.rewards, self.every = trainer, tokenizer, rows, rewards, every
        self.sampling = (max_new_tokens, seed, enable_thinking)
        self.kl_budget, self.nll_budget = kl_budget, nll_budget
        self.first_nll = None
        self.kept: dict | None = None
        self.stopped_by = ""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        earlier = [
            entry["probe/nll"] for entry in state.log_history if "probe/nll" in entry
        ]  # of a run that is resumed
        self.first_nll = earlier[0] if earlier else None
        self.measure(model, state, control)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(model, state, control)

    def measure(self, model, state, control) -> None:
        import torch
        from accelerate.utils import broadcast_object_list
        from peft import get_peft_model_state_dict

        from common.likelihood import mean_nll
        from common.training.rewards import score, total

        with torch.random.fork_rng():
            stopped, texts = stop_rate(model, self.tokenizer, self.rows, len(self.rows), *self.sampling)
        prompts, meta = [row["prompt"] for row in self.rows], [row.get("meta", {}) for row in self.rows]
        totals = total(self.rewards, score(self.rewards, prompts, texts, meta))
        known = [value for value in totals if value is not None]
        reward = sum(known) / len(known) if known else None
        kl = kl_to_reference(model, self.tokenizer, self.rows, texts, self.sampling[2])
        nll = mean_nll(model, self.tokenizer, self.rows, self.sampling[2])
        # every process measures, and takes the first one's figures: no two may differ about when to stop
        stopped, texts, reward, kl, nll = broadcast_object_list([stopped, texts, reward, kl, nll])
        self.first_nll = nll if self.first_nll is None else self.first_nll
        self.trainer.log({"probe/kl": kl, "probe/nll": nll, "probe/reward": reward, "probe/stopped": stopped})
        state.log_history[-1]["samples"] = texts[:2]
        print(f"step {state.global_step}: reward {reward if reward is None else round(reward, 3)}, KL {kl:.2f} nats an answer, "
              f"held-out NLL {nll:.3f}, {stopped:.1%} of {len(texts)} stopped")  # fmt: skip
        if self.kl_budget and kl > self.kl_budget:
            self.stopped_by = f"KL {kl:.2f} over its budget of {self.kl_budget}"
        elif self.nll_budget and nll > self.first_nll + self.nll_budget:
            self.stopped_by = f"held-out NLL {nll:.3f} over {self.first_nll:.3f} + {self.nll_budget}"
        else:
            self.kept = {name: value.detach().cpu().clone() for name, value in get_peft_model_state_dict(model).items()}
        if self.stopped_by:
            print(f"stop: {self.stopped_by}")
            control.should_training_stop = True
