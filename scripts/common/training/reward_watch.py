"""Rewards of a policy while it trains: of the answers it learns from, and of samples for held-out prompts."""

from __future__ import annotations

from accelerate.utils import broadcast_object_list, gather_object

from common.likelihood import mean_nll
from common.training.probes import kl_to_reference, stop_rate
from common.training.rewards import load_rewards, score, total


class RewardWatch:
    """rewards: what is learned from; watched: what is only logged, as the SET_METRICS of `task` are; val: held-out SFT rows."""

    def __init__(self, rewards: tuple, watched: tuple, task, val: list[dict], dtype: str, max_length: int):
        self.rewards = load_rewards(rewards, task, dtype, max_length)
        self.watched = load_rewards(watched, task, dtype, max_length) if watched else []
        self.set_metrics, self.val = task.SET_METRICS, val

    @property
    def model_paths(self) -> dict[str, str]:
        """The models behind rewards, for the record of a run."""
        return {f"reward {reward.name}": reward.path for reward in (*self.rewards, *self.watched) if reward.path}

    def judge(
        self, rows: list[dict], texts: list[str], shared: bool = False
    ) -> tuple[list[float | None], dict[str, float]]:
        """The total of each text, and the means of every part over the texts that it could judge; a part that judged none is left out.

        shared: these are this process's texts of a batch that all have written; totals and means are those of the whole batch.
        """
        told = [row["prompt"] for row in rows], texts, [row["meta"] for row in rows]
        columns, others = score(self.rewards, *told), score(self.watched, *told)
        if shared:
            texts = gather_object(texts)
            columns, others = ({name: gather_object(part[name]) for name in part} for part in (columns, others))
        named = [(f"reward/{name}", values) for name, values in columns.items()]
        named += [(f"watch/{name}", values) for name, values in others.items()]
        known = {name: [value for value in values if value is not None] for name, values in named}
        means = {name: sum(values) / len(values) for name, values in known.items() if values}
        return total(self.rewards, columns), means | {name: metric(texts) for name, metric in self.set_metrics.items()}

    def probe(self, model, tokenizer, max_new_tokens: int, seed: int, enable_thinking: bool) -> dict:
        """probe/*: rewards, KL to the reference (nats an answer) and stopped share of samples for the held-out prompts at temperature 1,
        NLL of the held-out answers (nats per character); and two of the samples. Every process measures, and has the first one's figures:
        what is decided on them is decided by all."""
        stopped, texts = stop_rate(model, tokenizer, self.val, len(self.val), max_new_tokens, seed, enable_thinking)
        totals, means = self.judge(self.val, texts)
        known = [value for value in totals if value is not None]
        means["reward"] = sum(known) / len(known) if known else None
        means["kl"] = kl_to_reference(model, tokenizer, self.val, texts, enable_thinking)
        means |= {"stopped": stopped, "nll": mean_nll(model, tokenizer, self.val, enable_thinking)}
        figures = {f"probe/{name}": value for name, value in means.items()} | {"samples": texts[:2]}
        return broadcast_object_list([figures])[0]
