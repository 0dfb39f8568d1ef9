"""Policy, reference and value head of stage 51 on one body, and the answers that the policy writes.

The policy is a LoRA adapter, the reference the same model with the adapter switched off. Shapes: N answers of at most T
tokens, [N, T] with a mask of the real ones; inside a micro-batch only the real tokens, row after row: [tokens].
"""

from __future__ import annotations

import random
import shutil
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batching import length_batches
from common.fused_head import output_head, token_figures
from common.generation import decode, draw
from common.jsonl import read_json, write_json

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Rollout:
    """N answers, and what the policy and the value head computed while they were written."""

    prompts: list[list[int]]  # token ids
    tokens: Tensor  # [N, T] token ids, the stop token included
    mask: Tensor  # [N, T] bool, True on tokens that were written
    logprobs: Tensor  # [N, T] of the policy that wrote, nats
    values: Tensor  # [N, T] of the value head
    stopped: Tensor  # [N] bool: ended by itself

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.tokens, self.mask, self.logprobs, self.values, self.stopped

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The answers as text, without their stop tokens."""
        ends = (self.mask.sum(1) - self.stopped.long()).tolist()
        answers = [row[:end] for row, end in zip(self.tokens.tolist(), ends, strict=True)]
        return tokenizer.batch_decode(answers, skip_special_tokens=True)

    def at_tokens(self, tokenizer: PreTrainedTokenizerBase, earned: list[dict[int, float]]) -> Tensor:
        """[N, T]: each value of an answer's {offset: value} at the token that completes text[:offset]."""
        result = torch.zeros_like(self.values)
        for row, (length, parts) in enumerate(zip(self.lengths, earned, strict=True)):
            ids = self.tokens[row, :length].tolist()

            def written(count: int, ids: list[int] = ids) -> int:
                return len(tokenizer.decode(ids[:count], skip_special_tokens=True))

            for offset, value in parts.items():
                result[row, bisect_left(range(1, length), offset, key=written)] += value
        return result

    def keep(self, rows: list[int]) -> Rollout:
        return Rollout([self.prompts[row] for row in rows], *(tensor[rows] for tensor in self.tensors))

    def gather(self) -> Rollout:
        """The answers of all processes, in the order of their ranks."""
        parts = gather_object([(self.prompts, [tensor.cpu() for tensor in self.tensors])])
        width = max(tensors[0].size(1) for _, tensors in parts)
        columns = (
            torch.cat([F.pad(part, (0, width - part.size(1))) if part.dim() == 2 else part for part in column])
            for column in zip(*(tensors for _, tensors in parts), strict=True)
        )
        prompts = [prompt for part, _ in parts for prompt in part]
        return Rollout(prompts, *(column.to(self.tokens.device) for column in columns))

    def micro_batches(self, rows: list[int], token_budget: int) -> list[list[int]]:
        """This process's share of `rows` in parts of similar length, each within `token_budget` padded tokens."""
        rows, lengths = share(rows), self.lengths
        sizes = [len(self.prompts[row]) + lengths[row] for row in rows]
        return [[rows[i] for i in part] for part in length_batches(sizes, token_budget, seed=0)]


class ActorCritic:
    """A causal model with the LoRA adapter "default" (the policy) and a linear value head on the last hidden state.

    value_body "shared": the head reads the policy's body and trains it; "own": it reads the same weights under an
    adapter of its own, "value". `policy` and `value` are the trainable parameters by name. temperature: of the policy,
    here and everywhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoraConfig,
        value_body: str,
        temperature: float,
        gradient_checkpointing: bool = False,
    ):
        # eval: with dropout, old and new log-probabilities would differ
        self.model = get_peft_model(model, lora).eval()
        self.own = value_body == "own"
        if self.own:
            self.model.add_adapter("value", lora)
        self.recomputed = []  # layers whose inner results are computed again in the backward pass
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            self.recomputed = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
        self.body, self.head = model.base_model, output_head(model)  # get_peft_model put the adapters inside
        self.value_head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
        for parameter in self.value_head.parameters():
            torch.nn.init.zeros_(parameter)
        self.temperature, self.stop_ids = temperature, model.generation_config.eos_token_id
        named = dict(self.model.named_parameters())
        self.policy = {name: p for name, p in named.items() if ".default." in name}
        self.value = {name: p for name, p in named.items() if ".value." in name}
        self.value |= {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}

    def save(self, folder: Path) -> None:
        """The policy as an ordinary adapter folder, the value head and its adapter in value.safetensors beside it."""
        self.model.save_pretrained(folder, selected_adapters=["default"])
        save_file({name: p.detach().contiguous() for name, p in self.value.items()}, folder / "value.safetensors")

    def load(self, folder: Path) -> None:
        set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
        saved = load_file(folder / "value.safetensors")
        with torch.no_grad():
            for name, parameter in self.value.items():
                parameter.copy_(saved[name])

    def states(self, batch: Rollout, rows: list[int]) -> Tensor:
        """Hidden states [tokens, hidden] at the places that predict the answers' tokens, under the adapter that is
        active."""
        lengths = batch.lengths
        sequences = [batch.prompts[row] + batch.tokens[row, : lengths[row] - 1].tolist() for row in rows]
        shape = (len(rows), max(map(len, sequences)))
        ids, seen, wanted = (torch.zeros(shape, dtype=kind) for kind in (torch.long, torch.long, torch.bool))
        for place, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            ids[place, : len(sequence)] = torch.tensor(sequence)
            seen[place, : len(sequence)] = 1
            wanted[place, len(batch.prompts[row]) - 1 : len(sequence)] = True
        ids, seen, wanted = (tensor.to(batch.tokens.device) for tensor in (ids, seen, wanted))
        for layer in self.recomputed:  # transformers looks at this flag; no dropout comes on with it
            layer.training = torch.is_grad_enabled()
        states = self.body(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state[wanted]
        for layer in self.recomputed:
            layer.training = False
        return states

    def logits(self, states: Tensor) -> Tensor:
        logits = self.head(states).float()
        # dividing by 1 would be a pass over the whole vocabulary for nothing
        return logits if self.temperature == 1 else logits / self.temperature

    def logprobs(self, states: Tensor, targets: Tensor) -> Tensor:
        """Of the target tokens, [tokens]: the vocabulary is projected at these places only."""
        return token_figures(self.head, states, targets, self.temperature).logprobs

    def values(self, states: Tensor) -> Tensor:
        return self.value_head(states.float())[:, 0]

    @torch.no_grad()
    def expect(self, batch: Rollout, reward: float) -> None:
        """Start the value head from a constant, in a first batch too: from 0 it would take many steps, and its errors
        would be noise for the policy."""
        self.value_head.bias.fill_(reward)
        batch.values.fill_(reward)

    @torch.no_grad()
    def look_again(self, batch: Rollout, what: str, token_budget: int) -> Tensor:
        """[N, T]: the "reference"'s log-probabilities of the written tokens, or the "value"s of a value head with its
        own body."""
        result = torch.zeros_like(batch.values)
        for rows in batch.micro_batches(list(range(len(batch.prompts))), token_budget):
            real = batch.mask[rows]
            if what == "reference":
                with self.model.disable_adapter():
                    found = self.logprobs(self.states(batch, rows), batch.tokens[rows][real])
            else:
                self.model.set_adapter("value")
                found = self.values(self.states(batch, rows))
                self.model.set_adapter("default")
            result[rows] = torch.zeros_like(result[rows]).masked_scatter(real, found)
        return reduce(result, "sum")  # of the processes' shares: a row is 0 in all but one

    def sum_gradients(self) -> None:
        """Each gradient becomes its sum over the processes; one that had no row to learn from counts as 0."""
        if PartialState().num_processes > 1:
            for parameter in (*self.policy.values(), *self.value.values()):
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = reduce(own, "sum")

    @torch.no_grad()
    def rollout(self, prompts: list[list[int]], max_new_tokens: int) -> Rollout:
        """One answer to each prompt, drawn from the whole distribution. Rows that have ended leave the batch at once.

        The log-probabilities are those of the pass that drew the tokens: no second pass for them.
        """
        device, count, width = self.value_head.weight.device, len(prompts), max(map(len, prompts))
        ids, seen = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # left padding: answers begin in one column
            ids[row, width - len(prompt) :], seen[row, width - len(prompt) :] = torch.tensor(prompt), 1
        ids, seen = ids.to(device), seen.to(device)
        tokens = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
        logprobs, values = torch.zeros(2, count, max_new_tokens, device=device)
        mask, stops = torch.zeros_like(tokens, dtype=torch.bool), torch.tensor(self.stop_ids, device=device)

        def predict(inputs: dict):
            return self.body(**inputs).last_hidden_state[:, -1]

        def choose(rows: Tensor, texts: Tensor, states: Tensor):
            nonlocal hidden, probs
            hidden = states
            probs = self.logits(hidden).softmax(-1)  # [rows still writing, vocabulary]
            return draw(probs, rows, len(prompts))

        hidden = probs = None
        for t, (rows, drawn) in enumerate(decode(predict, choose, ids, seen, DynamicCache(), stops, max_new_tokens)):
            tokens[rows, t], mask[rows, t] = drawn[:, 0], True
            logprobs[rows, t] = probs.gather(1, drawn)[:, 0].log()
            if not self.own:
                values[rows, t] = self.values(hidden)
        stopped = torch.isin(tokens, stops).any(1)
        tokens, mask, logprobs, values = (tensor[:, : t + 1] for tensor in (tokens, mask, logprobs, values))
        return Rollout(prompts, tokens, mask, logprobs, values, stopped)


def share(rows: list) -> list:
    """What this process takes of `rows`: all of them, where it is the only one."""
    with PartialState().split_between_processes(rows) as part:
        return part


def draw_prompts(prompts: list, step: int, count: int, seed: int) -> list:
    """The prompts of one step, which decides them with the seed alone: pass after pass over all, each in an order of
    its own."""
    places = range(step * count, (step + 1) * count)
    passes = {place // len(prompts) for place in places}
    orders = {number: random.Random(f"{seed} {number}").sample(prompts, len(prompts)) for number in passes}
    return [orders[place // len(prompts)][place % len(prompts)] for place in places]


def save_checkpoint(
    output_dir: Path, agent: ActorCritic, optimizer: torch.optim.Optimizer, step: int, beta: float, log: list[dict]
) -> None:
    """checkpoint-{step}, whole or not at all: written under another name, then renamed. The newest two are kept. Of
    several processes the first writes."""
    if not PartialState().is_main_process:
        return
    partial, whole = output_dir / "partial", output_dir / f"checkpoint-{step}"
    for folder in (partial, whole):
        shutil.rmtree(folder, ignore_errors=True)
    agent.save(partial)
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    write_json(partial / "trainer_state.json", {"global_step": step, "beta": beta, "log_history": log})
    partial.replace(whole)
    for folder in sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[:-2]:
        shutil.rmtree(folder)


def load_checkpoint(
    folder: Path, agent: ActorCritic, optimizer: torch.optim.Optimizer
) -> tuple[int, float, list[dict]]:
    """(step, beta, log) of a checkpoint; weights and optimizer are put back in place."""
    agent.load(folder)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=agent.model.device, weights_only=True))
    state = read_json(folder / "trainer_state.json")
    return state["global_step"], state["beta"], state["log_history"]
