"""trl's trainers with the language-model head of a small model made cheap on a CPU. On a GPU they are trl's own."""

from __future__ import annotations

import functools
import types

import torch
import torch.nn.functional as F
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput


def use_dense_head(model) -> None:
    """Replace the tiled head that trl 1.16 puts on a model (trl.trainer.utils.add_fused_lm_head) by one plain projection.

    trl's tiles save GPU memory; on a CPU they score every position, prompts and padding included, and compute the logits twice. Here
    only positions with a label are projected, once. The loss is the same; entropy, which only the
    log would show, is left at 0, because it costs one more softmax.
    """

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            return type(self).forward(self, *args, **({} if labels is None else {"labels": labels}), **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]  # [rows, longest - 1, hidden]
        targets = labels[:, 1:]
        mask = targets != -100
        logits = self.get_output_embeddings()(hidden[mask]).float()  # [labelled tokens, vocabulary]

        def spread(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(mask.shape).masked_scatter(mask, values.float())

        log_probs = spread(-F.cross_entropy(logits, targets[mask], reduction="none"))
        is_top1 = spread((logits.argmax(-1) == targets[mask]).float())
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=torch.zeros(mask.shape),
            is_top1=is_top1,
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)


class LeanSFTTrainer(SFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.device.type == "cpu":
            model = self.accelerator.unwrap_model(self.model)
            use_dense_head(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        sampler.seed = self.args.seed  # transformers leaves batch_rebalance at seed 42 whatever the settings say
        return sampler

    def log(self, logs, start_time=None):
        if self.args.device.type == "cpu":
            for metrics in self._metrics.values():
                metrics.pop("entropy", None)  # not computed, see use_dense_head
        super().log(logs, start_time)
