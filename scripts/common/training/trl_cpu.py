"""Everything of this project that reaches into trl's private methods, written for trl 1.16.0.

On a CPU the trainers of stages 20, 21, 40, 41, 42 and 50 project only the positions with a label; on a GPU they are
trl's own, that of stage 21 transformers'. GRPO also gets batches without padding columns, and like distillation a
rollout that leaves the base's weights as they are and an order of prompts that a resumed run repeats.
tests/unit/test_trl_cpu.py fails where another trl is installed or one of the methods below has changed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import logsigmoid
from transformers import Trainer
from trl import DistillationTrainer, DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler

from common.fused_head import divergence_of_heads, output_head, token_figures, use_trained_rows
from common.generation import write_on_cpu
from common.models import chat_dataset
from common.settings import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from torch.utils.data import Sampler
    from transformers import PreTrainedModel

ACTIVATIONS = 1 << 29  # bytes that a pass on a CPU may keep for its backward pass


def use_lean_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_learns: bool = False,
    always: bool = False,
) -> None:
    """Replace the tiled head that trl 1.16 puts on a model (trl.trainer.utils.add_fused_lm_head) by the project's own.

    On a CPU trl's tiles score every position, prompts and padding included, and compute the logits twice. Here only
    positions with a label are projected, once: a small vocabulary as a whole, a large one in slices
    (common/fused_head.py). The loss is the same. Entropy, where only the log would show it, is left at 0;
    entropy_learns: the loss holds it. always: every call with labels is meant, not only trl's.
    """

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(
        self: PreTrainedModel,
        *args,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ):
        if not (fused_lm_head or (always and labels is not None)):
            return type(self).forward(self, *args, **({} if labels is None else {"labels": labels}), **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]  # [rows, longest - 1, hidden]
        targets = labels[:, 1:]
        mask = targets != -100
        figures = token_figures(output_head(self), hidden[mask], targets[mask], temperature, entropy, entropy_learns)

        def spread(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values)

        log_probs = spread(figures.logprobs)
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=torch.zeros(mask.shape) if figures.entropy is None else spread(figures.entropy),
            is_top1=spread(figures.is_top1),
            mean_logits=spread(figures.mean_logits),
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)


class LeanHead:
    """What the lean trainers share; stands before trl's trainer among the bases."""

    needs_entropy = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        use_trained_rows(self.model)
        if self.args.device.type == "cpu":
            model = self.accelerator.unwrap_model(self.model)
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            learns = bool(getattr(self.args, "entropy_coef", 0.0))
            use_lean_head(model, getattr(self, "temperature", 1.0), self.needs_entropy, learns)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.device.type == "cpu" and not self.needs_entropy:
            for metrics in self._metrics.values():
                metrics.pop("entropy", None)  # not computed, see use_lean_head
        super().log(logs, start_time)


def activation_bytes(model: PreTrainedModel | PeftModel) -> int:
    """About what one token leaves behind for the backward pass, with LoRA on every layer in bfloat16
    (docs/OPERATIONS.md); of Gemma 3 270M .7 MiB, measured."""
    config = model.config.get_text_config()
    width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return config.num_hidden_layers * (30 * width + 10 * inner)


def in_parts(inputs: dict, tokens: int) -> list[dict]:
    """The rows of a batch in parts of at most `tokens` tokens, padding included, without columns that only pad."""
    mask, parts = inputs["attention_mask"], []
    for rows in torch.arange(len(mask)).split(max(1, tokens // mask.size(1))):
        width = int(mask[rows].any(0).nonzero().max()) + 1
        parts.append({name: value[rows, :width] for name, value in inputs.items()})
    return parts


class InParts:
    """Stands before a Trainer whose loss is divided by the labelled tokens of the whole optimizer step. On a CPU the
    rows of a micro-batch go through the model in parts, so that few activations are kept: the gradients add up to the
    same, and larger products are no faster there."""

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        step = super().training_step
        mask = inputs.get("attention_mask")
        is_one = self.args.device.type == "cpu" and self.accelerator.num_processes == 1
        is_sum = num_items_in_batch is not None and not getattr(self, "aux_loss_enabled", False)
        if not (is_one and is_sum and mask is not None and all(v.shape == mask.shape for v in inputs.values())):
            return step(model, inputs, num_items_in_batch)
        parts = in_parts(inputs, ACTIVATIONS // activation_bytes(self.accelerator.unwrap_model(model)))
        return sum(step(model, part, num_items_in_batch) for part in parts)


class LeanTrainer(InParts, Trainer):
    """transformers' own, for stage 21; on a CPU with the loss of use_lean_head."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.device.type == "cpu":
            model = self.accelerator.unwrap_model(self.model)
            use_lean_head(model.get_base_model() if hasattr(model, "get_base_model") else model, always=True)


class LeanSFTTrainer(InParts, LeanHead, SFTTrainer):
    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        return _seeded(super()._get_train_sampler(train_dataset), self.args.seed)


class LeanDPOTrainer(LeanHead, DPOTrainer):
    """Its training rows carry `length`, so that pairs of similar length share a micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.accelerator.num_processes > 1:
            self.accelerator.gather = functools.partial(gather_uneven, self.accelerator)

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs):
        dataset = super()._prepare_dataset(dataset, *args, **kwargs)
        lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]
        return dataset.add_column("length", lengths)

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        # the data loader hands over a copy without the length column
        return _seeded(super()._get_train_sampler(self.train_dataset), self.args.seed)


class ReferenceFreeTrainer(LeanDPOTrainer):
    """SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6) and ORPO (Hong et al. 2024, arXiv 2403.07691, equations 6
    and 7) on the pairs of DPO, without a pass of the reference.

    trl's own trainers for them are experimental and build the logits of every position (docs/TRAINING.md).
    """

    def __init__(self, *args, gamma: float, **kwargs):
        """gamma: SimPO's target margin."""
        super().__init__(*args, **kwargs)
        self.gamma = gamma
        self.accelerator._models = [model for model in self.accelerator._models if model is not self.ref_model]
        self.ref_model = None  # trl loads one where all weights are trained

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False):
        mask = inputs["completion_mask"]
        words = {name: value for name, value in inputs.items() if name != "completion_mask"}
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        outputs = model(**words, labels=labels, use_cache=False, fused_lm_head=True)
        logps, lengths = outputs.log_probs.sum(1), mask[:, 1:].sum(1)  # [chosen answers, rejected ones]
        (chosen, rejected), (tokens, _) = (logps / lengths).chunk(2), lengths.chunk(2)  # a token
        nll = -(chosen * tokens).sum() / tokens.sum()
        log_odds = chosen - rejected - log1mexp(chosen) + log1mexp(rejected)
        losses = {
            "simpo": -logsigmoid(self.beta * (chosen - rejected) - self.gamma).mean(),
            "orpo": nll - self.beta * logsigmoid(log_odds).mean(),
            "sft": nll,
        }
        loss = sum(weight * losses[name] for name, weight in zip(self.loss_types, self.loss_weights, strict=True))

        figures = self._metrics["train" if self.model.training else "eval"]
        if self.model.training:
            self._total_train_tokens += self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
        figures["num_tokens"] = [self._total_train_tokens]
        rewards = {"chosen": self.beta * chosen.detach(), "rejected": self.beta * rejected.detach()}
        rewards |= {"margins": rewards["chosen"] - rewards["rejected"]}
        rewards |= {"accuracies": (rewards["margins"] > 0).float()}
        named = {f"rewards/{name}": values for name, values in rewards.items()}
        named |= dict(zip(("logps/chosen", "logps/rejected"), logps.detach().chunk(2), strict=True))
        for name, values in named.items():
            figures[name].append(self.accelerator.gather(values).mean().item())
        return (loss, outputs) if return_outputs else loss


def log1mexp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(values)) for values below 0."""
    return torch.log(-torch.expm1(values.clamp(max=-1e-6)))


class LeanKTOTrainer(LeanHead, KTOTrainer):
    """Rows keep trl's order: the KL is estimated from the answers of a batch set against each other's prompts."""


def gather_uneven(accelerator: Accelerator, values: Any) -> Any:
    """accelerator.gather for a tensor of which every process has another number of rows: batch_rebalance gives each its
    own, and trl gathers a value per row for its log, where unlike shapes end the run or, worse, hang it. Anything but
    such a tensor goes as it is."""
    gather = functools.partial(type(accelerator).gather, accelerator)
    if not torch.is_tensor(values) or values.dim() == 0:
        return gather(values)
    counts = gather(torch.tensor([len(values)], device=values.device)).tolist()
    parts = gather(accelerator.pad_across_processes(values)).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _seeded(sampler: Sampler, seed: int):
    sampler.seed = seed  # transformers leaves batch_rebalance at seed 42 whatever the settings say
    return sampler


@contextlib.contextmanager
def folded(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """A PeftModel with its adapter added to copies of the base's weights: a third fewer matrix products for each token
    written.

    The base's own tensors come back as they were. peft's unmerge subtracts instead, which in bfloat16 leaves other
    weights behind.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if getattr(model, "is_quantized", False):
        layers = []  # a sum would be rounded to 4 or 8 bits
    kept = [(layer, layer.get_base_layer().weight.data) for layer in layers]
    try:
        if layers:
            model.merge_adapter(safe_merge=True)  # safe: into a copy
        yield
    finally:
        for layer, weight in kept:
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()


class EpochSampler(RepeatSampler):
    """trl's sampler, its order of an epoch decided by seed and epoch: trl's own begins a resumed run with the first
    epoch's order."""

    def __init__(self, sampler: RepeatSampler, trainer: Trainer):
        vars(self).update(vars(sampler))
        self.trainer = trainer

    def __iter__(self):
        batches = self.num_samples // self.batch_size  # the prompts that fill no batch are left out
        steps = batches * self.repeat_count // self.trainer.args.gradient_accumulation_steps
        self.generator.manual_seed(self.seed + self.trainer.state.global_step // max(1, steps))
        return super().__iter__()


def prompt_rows(rows: list[dict], enable_thinking: bool) -> Dataset:
    """The prompts as LeanGRPOTrainer and its rewards read them. meta and tools as texts: datasets would give every row
    the keys of all."""
    dataset = chat_dataset(rows, ("prompt",), enable_thinking).select_columns(["prompt"])
    for name in ("meta", "tools"):
        dataset = dataset.add_column(name, [json.dumps(row.get(name), ensure_ascii=False) for row in rows])
    return dataset


class Rollout:
    """Stands before a trainer of trl that samples: on a CPU answers are written by the project's own loop, with the
    adapter folded in; prompts may have tools; a resumed run repeats order and answers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.device.type == "cpu":
            model = self.accelerator.unwrap_model(self.model)
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            model.generate = functools.partial(model.generate, custom_generate=write_on_cpu)

    def _generate_and_score_completions(self, inputs: list[dict]):
        self.asked_tools = [json.loads(row.get("tools") or "null") for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list):
        """With the tools of each row; trl knows only tools that it calls itself."""
        if not any(self.asked_tools):
            return super()._tokenize_prompts(prompts)
        ids = []
        for prompt, tools in zip(prompts, self.asked_tools, strict=True):
            options = {"add_generation_prompt": True, "return_dict": True, **self.chat_template_kwargs}
            rendered = self.processing_class.apply_chat_template(prompt, tools=tools, **options)
            ids.append(rendered["input_ids"])
        return ids, None, {}

    def _generate_single_turn(self, *args, **kwargs):
        """Draws by seed, process and step alone, so that a resumed run writes what the undisturbed one wrote."""
        torch.manual_seed((self.args.seed + self.accelerator.process_index) * 1_000_003 + self.state.global_step)
        model = self.accelerator.unwrap_model(self.model)
        with folded(model) if self.args.device.type == "cpu" else contextlib.nullcontext():
            return super()._generate_single_turn(*args, **kwargs)

    def _get_train_sampler(self, dataset: Dataset | None = None):
        return EpochSampler(super()._get_train_sampler(dataset), self)


class LeanGRPOTrainer(LeanHead, Rollout, GRPOTrainer):
    """GRPO whose rollout and update cost what their tokens cost, and that never takes "cannot judge" for a reward of
    0."""

    needs_entropy = True

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs,
    ):
        """Chunks of rows of one length, each without the columns in which all its rows are padding; in trl every row is
        as wide as the longest prompt and the longest completion of the whole generation batch."""
        forward = super()._get_per_token_logps_and_entropies
        if self.args.device.type != "cpu" or set(kwargs) - {"compute_entropy", "compute_aux_loss"} - {
            name for name, value in kwargs.items() if value is None
        }:
            return forward(model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)
        width = input_ids.size(1)
        prompt = width - logits_to_keep
        starts = attention_mask.argmax(1)  # [rows], prompts are padded on the left
        ends = width - attention_mask.flip(1).argmax(1)  # [rows], completions on the right
        order = (ends - starts).argsort()
        logps = input_ids.new_zeros((len(input_ids), logits_to_keep), dtype=torch.float32)
        entropies = torch.zeros_like(logps)
        for rows in order.split(32):
            first, last = int(starts[rows].min()), int(ends[rows].max())
            kept = slice(first, max(last, prompt + 1))
            part = forward(model, input_ids[rows, kept], attention_mask[rows, kept], kept.stop - prompt, **kwargs)
            columns = slice(0, kept.stop - prompt)
            logps = logps.index_put((rows[:, None], torch.arange(columns.stop)[None]), part[0])
            if part[1] is not None:
                entropies[rows, columns] = part[1]
        return logps, entropies, None

    def _calculate_rewards(self, *args):
        """Counts the completions that no reward could judge. trl leaves them out of baselines and gives them the
        advantage 0."""
        rewards = super()._calculate_rewards(*args)  # [completions of all processes, 1]
        unknown = rewards.isnan()
        if unknown.all():
            raise UserError("no answer of this step could be judged; fix: --rewards, or meta of the prompts")
        self._metrics["train" if self.model.training else "eval"]["unjudged"].append(unknown.float().mean().item())
        return rewards


class LeanDistillationTrainer(Rollout, DistillationTrainer):
    """The student (the model) learns the teacher's next-token distributions on texts that it wrote itself, or on given
    ones. Datasets hold `prompt` and `answer_ids`."""

    def __init__(self, *args, own_share: float, **kwargs):
        """own_share: of the steps in which the student writes; in the others, and in evaluations, the texts are the
        given ones (lambda of arXiv 2306.13649, algorithm 1)."""
        super().__init__(*args, **kwargs)
        use_trained_rows(self.model)
        self.own_share, self.given = own_share, []

    def _generate_and_score_completions(self, inputs: list[dict]):
        self.given = [row["answer_ids"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, *args, **kwargs):
        seed = self.args.seed * 1_000_003 + self.state.global_step  # all processes decide alike
        is_own = self.model.training and random.Random(seed).random() < self.own_share
        torch.manual_seed(seed)  # trl shuffles the answers of a step
        return super()._generate_single_turn(*args, **kwargs) if is_own else self.given

    def _compute_loss(
        self,
        student: PreTrainedModel | PeftModel,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None,
    ):
        """trl's loss on the positions of the answers alone, with heads of any kind; its own fused one on a GPU."""
        head = student.get_output_embeddings()
        if self.args.device.type != "cpu" and type(head) is torch.nn.Linear:
            return super()._compute_loss(student, inputs, num_items_in_batch)
        mask = inputs["completion_mask"].bool()
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
        own = self._get_last_hidden_state(student, ids, seen, mask.size(1))[mask]
        with torch.no_grad():
            wanted = self._get_last_hidden_state(teacher, ids, seen, mask.size(1))[mask]
        words = student.config.get_text_config().vocab_size
        heads = output_head(student), own, output_head(teacher), wanted
        values, entropies = divergence_of_heads(*heads, self.beta, words)
        count = mask.sum()
        over = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return values.sum() / over, entropies.sum(), count
