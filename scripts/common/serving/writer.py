"""A model that answers token by token, for the page of stage 63."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Writer:
    """A model and its tokenizer, and how it answers."""

    def __init__(
        self, name: str, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool
    ):
        self.name, self.model, self.tokenizer, self.enable_thinking = name, model, tokenizer, enable_thinking
        self.stops = set(model.generation_config.eos_token_id)
        self.busy = threading.Lock()  # two windows of one page must not share a cache

    def encode(self, turns: list[dict], max_new_tokens: int) -> list[int]:
        """Token ids of the rendered turns. Raises ValueError where they leave no room for an answer."""
        from common.generation import render_prompt

        try:
            text = render_prompt(self.tokenizer, turns, self.enable_thinking)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template refuses these turns: {error}") from None
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context and len(ids) + max_new_tokens > context:
            raise ValueError(f"{len(ids)} tokens and {max_new_tokens} new ones are more than the {context} it reads")
        return ids

    def write(self, ids: list[int], sampling: dict) -> Iterator[tuple[list[int], bool]]:
        """(tokens so far, has it ended) after each token; closing the iterator stops the model."""
        import torch
        from transformers import (
            DynamicCache,
            MinPLogitsWarper,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        from common.generation import decode, warped

        greedy = sampling["temperature"] == 0
        warpers = []
        if not greedy and sampling["temperature"] != 1:
            warpers.append(TemperatureLogitsWarper(sampling["temperature"]))
        if not greedy and sampling["top_k"]:
            warpers.append(TopKLogitsWarper(sampling["top_k"]))
        if not greedy and sampling["top_p"] < 1:
            warpers.append(TopPLogitsWarper(sampling["top_p"]))
        if not greedy and sampling["min_p"]:
            warpers.append(MinPLogitsWarper(sampling["min_p"]))
        device = self.model.device
        generator = torch.Generator(device).manual_seed(sampling["seed"])

        def predict(inputs: dict):
            with torch.inference_mode():
                return self.model(**inputs, logits_to_keep=1).logits[:, -1].float()

        def choose(rows: torch.Tensor, texts: torch.Tensor, logits: torch.Tensor):
            if greedy:
                return logits.argmax(-1, keepdim=True)
            return torch.multinomial(warped(warpers, texts, logits).softmax(-1), 1, generator=generator)

        prompt, stops = torch.tensor([ids], device=device), torch.tensor(sorted(self.stops), device=device)
        cache, tokens = DynamicCache(config=self.model.config), []
        with self.busy:
            prompts = prompt, torch.ones_like(prompt), cache
            steps = decode(predict, choose, *prompts, stops, sampling["max_new_tokens"])
            for _, token in steps:
                tokens.append(int(token))
                yield tokens, tokens[-1] in self.stops
