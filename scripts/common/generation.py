"""Sampling with transformers: batches of prompts of similar length, one fixed plan, so that a resumed run repeats no
row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.conversations import render
from common.jsonl import read_jsonl
from common.settings import ROOT, UserError, next_command

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import (
        DynamicCache,
        GenerationConfig,
        LogitsProcessor,
        LogitsProcessorList,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteriaList,
    )


def prompt_id(row: dict) -> str:
    """Hash of the source id and the prompt: the same row has the same id in every run."""
    source = row.get("meta", {}).get("id", "")
    text = json.dumps([source, row["prompt"]], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], enable_thinking: bool = False, tools: list | None = None
) -> str:
    return render(tokenizer, messages, enable_thinking, tools, add_generation_prompt=True)


def opening(tokenizer: PreTrainedTokenizerBase, row: dict, enable_thinking: bool = False, characters: int = 32) -> str:
    """What a model goes on from: the rendered prompt of a row, or the beginning of a document."""
    if "text" not in row:
        return render_prompt(tokenizer, row["prompt"], enable_thinking, row.get("tools"))
    bos = tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    return bos + row["text"][:characters]


def generate_command(task: str, rows_file: Path, row: dict, **flags) -> str:
    """The command of stage 60 for a model of rows such as this one: the test prompts beside `rows_file`, else the rows
    of that file; a document's beginning to go on from."""
    if "text" in row:
        words = row["text"].strip().split("\n")[0][:16]
        return next_command("60_generate", task=task, **flags, raw=True, prompt=words)
    names = ("prompts_test.jsonl", "sft_test.jsonl", rows_file.name)
    file = next((path for name in names if (path := rows_file.with_name(name)).is_file()), rows_file)
    if file != ROOT / "processed_data" / task / "prompts_test.jsonl":
        flags["prompts_file"] = file
    return next_command("60_generate", task=task, **flags)


def prompts_with_room(
    tokenizer: PreTrainedTokenizerBase, file: Path, room: int, enable_thinking: bool
) -> list[tuple[dict, list[int]]]:
    """The rows of a prompts file with the token ids of each rendered prompt; those of more than `room` tokens are left
    out and counted."""
    rows = read_jsonl(file, "prompts")
    texts = [render_prompt(tokenizer, row["prompt"], enable_thinking, row.get("tools")) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = [(row, ids) for row, ids in zip(rows, encoded, strict=True) if len(ids) <= room]
    if left_out := len(rows) - len(kept):
        print(f"notice: {left_out} prompts of more than {room} tokens leave no room for an answer: left out")
    if not kept:
        raise UserError(
            f"{file}: no prompt leaves room for an answer; fix: a larger --max-length, or fewer --max-new-tokens"
        )
    return kept


def decode(
    predict: Callable[[dict], torch.Tensor],
    choose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    seen: torch.Tensor,
    cache: DynamicCache,
    stops: torch.Tensor,
    max_new_tokens: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(rows, tokens [rows, 1]) for each token written, until every row has written one of `stops`. Rows that have ended
    leave the batch at once, and equal prompts are read once: transformers' own loop computes both until the longest has
    ended.

    ids, seen: prompts and their mask, padded on the left. predict(inputs) is what the model makes of the last place,
    [rows, ...]. choose(rows, texts, predicted) picks the tokens; texts [rows, so far] is what they follow.
    """
    import torch

    make_room(cache)
    rows, texts = torch.arange(len(ids), device=ids.device), ids
    both, copies = torch.unique(torch.cat([ids, seen], 1), dim=0, return_inverse=True)
    ids, kept = both.chunk(2, 1)
    places = (kept.cumsum(1) - 1).clamp(min=0)
    for step in range(max_new_tokens):
        inputs = {"input_ids": ids, "attention_mask": kept, "position_ids": places}
        predicted = predict({**inputs, "past_key_values": cache, "use_cache": True})
        if step == 0:  # the different prompts are sorted: each row back to its place
            cache.batch_select_indices(copies)
            predicted, kept, places = predicted[copies], kept[copies], places[copies]
        tokens = choose(rows, texts, predicted)
        yield rows, tokens
        going = (~torch.isin(tokens[:, 0], stops)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
        rows, ids, places = rows[going], tokens[going], places[going, -1:] + 1
        texts, kept = torch.cat([texts[going], ids], 1), torch.cat([kept[going], kept.new_ones(len(going), 1)], 1)


def make_room(cache: DynamicCache) -> None:
    """Let a DynamicCache keep room for the tokens that come: its own layers copy all they hold for each token."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        ROOM = 64  # tokens

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.rooms = {}
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            for name, new in (("keys", key_states), ("values", value_states)):
                if end > getattr(self.rooms.get(name), "shape", (0, 0))[-2]:
                    room = new.new_empty(*new.shape[:2], end + self.ROOM, new.shape[-1])
                    if start:
                        room[..., :start, :] = getattr(self, name)
                    self.rooms[name] = room
                self.rooms[name][..., start:end, :] = new
                setattr(self, name, self.rooms[name][..., :end, :])
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor):
            length = self.get_seq_length()
            for name, room in self.rooms.items():
                self.rooms[name] = room[indices]
                setattr(self, name, self.rooms[name][..., :length, :])

    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer


def draw(probs: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """One index of each row, [rows, 1]: through the inverse of the distribution function, on a CPU four times as fast
    as torch.multinomial. `rows` says which of the `count` rows of the whole batch these are: each has its random number
    whether the others have ended or not."""
    import torch

    below = probs.cumsum(-1)
    chances = torch.rand(count, 1, device=probs.device, dtype=probs.dtype)[rows]
    drawn = torch.searchsorted(below, chances * below[:, -1:], right=True)
    return drawn.clamp(max=probs.shape[1] - 1)


NUCLEUS = 1024  # tokens among which top-p is looked for before a row's whole vocabulary is sorted


def cut_tail(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """What transformers' TopPLogitsWarper makes of scores [rows, vocabulary]: -inf for what is not among the likeliest
    tokens that together reach top_p (Holtzman et al. 2020, arXiv 1904.09751, section 3.1). It sorts the vocabulary:
    with 262,144 words on a CPU that takes longer than the model. Here the vocabulary is sorted only for rows whose
    likeliest NUCLEUS tokens do not reach top_p."""
    from transformers import TopPLogitsWarper

    best = scores.topk(min(NUCLEUS, scores.shape[-1])).values
    mass = (best - scores.logsumexp(-1, keepdim=True)).exp().cumsum(-1)
    reached = mass >= top_p
    last = best.gather(1, reached.int().argmax(-1, keepdim=True))
    cut = scores.masked_fill(scores < last, -float("inf"))
    if len(wide := (~reached[:, -1]).nonzero()[:, 0]):
        cut[wide] = TopPLogitsWarper(top_p)(None, scores[wide])
    return cut


def warped(processors: Iterable[LogitsProcessor], texts: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`scores` after each of transformers' processors in turn, top-p by cut_tail."""
    from transformers import TopPLogitsWarper

    for process in processors:
        is_top_p = type(process) is TopPLogitsWarper
        scores = cut_tail(scores, process.top_p) if is_top_p else process(texts, scores)
    return scores


def write_on_cpu(
    model: PreTrainedModel | PeftModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> torch.Tensor:
    """A decoding loop for generate(custom_generate=write_on_cpu): [rows, prompt + answer], padded on the right."""
    import torch

    width = input_ids.shape[1]
    answers = input_ids.new_full((len(input_ids), generation_config.max_length - width), generation_config.pad_token_id)

    def predict(inputs: dict):
        return model(**inputs, logits_to_keep=1).logits[:, -1].float()

    def choose(rows: torch.Tensor, texts: torch.Tensor, logits: torch.Tensor):
        scores = warped(logits_processor, texts, logits)
        if not generation_config.do_sample:
            return scores.argmax(-1, keepdim=True)
        return draw(scores.softmax(-1), rows, len(input_ids))

    stops = torch.tensor(generation_config.eos_token_id)
    prompts = input_ids, model_kwargs["attention_mask"], model_kwargs["past_key_values"]
    steps = decode(predict, choose, *prompts, stops, answers.shape[1])
    for place, (rows, tokens) in enumerate(steps):
        answers[rows, place] = tokens[:, 0]
    return torch.cat([input_ids, answers[:, : place + 1]], 1)


def sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    min_p: float = 0.0,
    batch_tokens: int = 32768,
    skip: Callable[[list[int]], bool] = lambda indices: False,
) -> Iterator[tuple[int, str, str, int]]:
    """(index, completion, finish_reason, tokens) for every rendered prompt in `texts`, in the order of the plan.

    Batches hold prompts of similar length within `batch_tokens` (prompt + max_new_tokens); each is seeded by `seed` and
    its place in the plan. `skip(indices)` says that a batch need not be run. temperature 0 is greedy. finish_reason is
    "stop" (an eos was written) or "length"; tokens counts the completion without what follows the eos, the eos
    included.
    """
    import torch

    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    stops = set(model.generation_config.eos_token_id)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p or None}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    )
    # a model's own defaults, such as Qwen2.5's repetition penalty, would change every figure taken from samples
    sampling |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    own_loop = write_on_cpu if model.device.type == "cpu" else None
    was_training = model.training
    model.eval()
    start = number = 0
    while start < len(order):
        longest, end = 0, start
        while end < len(order):
            longest = max(longest, len(encoded[order[end]]) + max_new_tokens)
            if end > start and (end - start + 1) * longest > batch_tokens:
                break
            end += 1
        indices, start, number = order[start:end], end, number + 1
        if skip(indices):
            continue
        width = max(len(encoded[index]) for index in indices)
        ids = torch.full((len(indices), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):  # left padding: answers begin in one column
            ids[row, width - len(encoded[index]) :] = torch.tensor(encoded[index])
            mask[row, width - len(encoded[index]) :] = 1
        torch.manual_seed(seed * 1_000_003 + number)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                use_cache=True,
                custom_generate=own_loop,
                **sampling,
            )
        for index, tokens in zip(indices, output[:, width:].tolist(), strict=True):
            length = next((place for place, token in enumerate(tokens) if token in stops), None)
            answer = tokens if length is None else tokens[:length]
            text = tokenizer.decode(answer, skip_special_tokens=True)
            yield index, text, "length" if length is None else "stop", len(answer) + (length is not None)
    model.train(was_training)
