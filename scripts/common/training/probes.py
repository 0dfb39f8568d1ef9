"""What a training stage shows of itself while it runs: does it stop, and what does it write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainerCallback

from common.evaluation.tables import number
from common.fused_head import LOGITS_HELD
from common.generation import opening, prompts_with_room, render_prompt, sample
from common.jsonl import read_jsonl
from common.likelihood import mean_nll
from common.models import check_model, load_tokenizer, require_context, require_launcher
from common.preflight.checks import require_clean_files
from common.settings import resolve_model
from common.training.arguments import require_finite
from common.training.rewards import check_meta, check_order, load_rewards, score, total
from common.training.turn_tokens import check_tokens, why_no_stop

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

    from common.training.options import AdapterSettings
    from tasks.base import Task

LARGE_RISE = 1.0  # nats per character: held-out answers have become 2.7 times less likely at every character


def stop_rate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    count: int,
    max_new_tokens: int,
    seed: int,
    enable_thinking: bool,
) -> tuple[float, list[str]]:
    """Share of `count` answers sampled at temperature 1 that end by eos, and the answers. Of documents
    the beginning is what it goes on from."""
    texts = [opening(tokenizer, row, enable_thinking) for row in rows[:count]]
    results = sorted(
        sample(model, tokenizer, texts, max_new_tokens=max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
    )
    return sum(reason == "stop" for _, _, reason, _ in results) / len(results), [text for _, text, _, _ in results]


@contextmanager
def reference_of(model: PreTrainedModel | PeftModel, reference: PreTrainedModel | None = None) -> Iterator:
    """The model with its adapter switched off; where all weights are trained, the `reference` beside it."""
    if reference is not None:
        yield reference
        return
    with model.disable_adapter():
        yield model


def kl_to_reference(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    answers: list[str],
    enable_thinking: bool,
    reference: PreTrainedModel | None = None,
) -> float:
    """KL(policy || reference) in nats an answer: at every token of `answers` (samples of the policy, eos added) the
    exact divergence of the two next-token distributions, summed over the answer, averaged over answers (the chain rule
    of KL; arXiv 2009.01325, section 3.4).

    reference: of a model without an adapter, see reference_of. Texts are tokenized again, which may
    cut them elsewhere than they were sampled.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for row, answer in zip(rows, answers, strict=False):
            prompt = render_prompt(tokenizer, row["prompt"], enable_thinking, row.get("tools"))
            prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ids = prompt + tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids = torch.tensor([ids[: getattr(model.config, "max_position_embeddings", len(ids))]], device=model.device)
            places = torch.arange(len(prompt) - 1, ids.size(1) - 1, device=model.device)  # predict the answer's tokens
            for kept in places.split(max(1, LOGITS_HELD // model.config.get_text_config().vocab_size)):
                words = {"input_ids": ids[:, : kept[-1] + 1], "use_cache": False, "logits_to_keep": kept}
                policy = model(**words).logits[0].float().log_softmax(-1)
                with reference_of(model, reference) as start:
                    before = start(**words).logits[0].float().log_softmax(-1)
                total += (policy.exp() * policy.sub(before)).sum().item()
    model.train(was_training)
    return total / max(1, len(answers))


class StopProbe(TrainerCallback):
    """At every evaluation: the share of samples that stopped, through the trainer's log, and two of the samples beside
    it.

    Sampling must not move the training run: the random state is put back afterwards.
    """

    def __init__(self, trainer: Trainer, *arguments):
        self.trainer = trainer
        self.arguments = arguments  # of stop_rate, behind the model

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **kwargs
    ) -> None:
        with torch.random.fork_rng():
            rate, texts = stop_rate(model, *self.arguments)
        self.trainer.log({"eval_stop_rate": rate})
        state.log_history[-1]["samples"] = texts[:2]
        print(f"step {state.global_step}: {rate:.1%} of {len(texts)} samples stopped")
        if state.global_step and rate < 0.9 and (notice := why_no_stop(model, self.arguments[0])):
            print(notice)
        for text in texts[:2]:
            print(f"  {text[:120]!r}")


def rl_inputs(settings: AdapterSettings, task: Task) -> tuple[str, PreTrainedTokenizerBase, list, DriftProbe, dict]:
    """(model path, tokenizer, prompts with their token ids, probe, inputs of the run record) of stages 50 and 51, all
    of it checked: a wrong setting or file is told here, before an earlier run is touched."""
    require_launcher()
    model_path = check_model(resolve_model(settings.model, settings.task))
    tokenizer = load_tokenizer(model_path)
    require_context(model_path, settings.max_length)
    check_tokens(getattr(settings, "train_tokens", ()), tokenizer)
    require_clean_files(settings, tokenizer, "prompts", settings.train_file)
    require_clean_files(settings, tokenizer, "sft", settings.val_file)
    probe = DriftProbe(settings, task, tokenizer, read_jsonl(settings.val_file, "sft")[: settings.probe_count or None])
    check_order([*probe.rewards, *probe.watched], task)
    for file, schema in ((settings.train_file, "prompts"), (settings.val_file, "sft")):
        check_meta([*probe.rewards, *probe.watched], file, read_jsonl(file, schema))
    room = settings.max_length - settings.max_new_tokens
    prompts = prompts_with_room(tokenizer, settings.train_file, room, settings.enable_thinking)
    files = {"model": model_path, "train_file": settings.train_file, "val_file": settings.val_file}
    return model_path, tokenizer, prompts, probe, files | probe.model_paths


class DriftProbe:
    """What stages 50 and 51 measure of a policy on fixed held-out rows: rewards, KL to the reference, NLL, whether
    answers stop.

    settings: of the stage; rewards and watch name what is learned from and what is only logged, kl_budget and
    nll_budget end the run. task: as tasks.base.load_task gives it. rows: of the SFT schema; their completions are the
    held-out answers.
    """

    def __init__(self, settings: AdapterSettings, task: Task, tokenizer: PreTrainedTokenizerBase, rows: list[dict]):
        self.reference = None  # a stage sets it where all weights are trained
        self.settings, self.set_metrics, self.tokenizer, self.rows = settings, task.SET_METRICS, tokenizer, rows
        how = (task, settings.dtype, settings.max_length)
        self.rewards = load_rewards(settings.rewards, *how)
        self.watched = load_rewards(settings.watch, *how) if settings.watch else []

    @property
    def model_paths(self) -> dict[str, str]:
        """The models behind rewards, for the record of a run."""
        return {f"reward {reward.name}": reward.path for reward in (*self.rewards, *self.watched) if reward.path}

    def judge(
        self, rows: list[dict], texts: list[str], shared: bool = False
    ) -> tuple[list[float | None], dict[str, float]]:
        """The total of each text, and the means of every part over the texts that it could judge; a part that judged
        none is left out.

        shared: these are this process's texts of a batch that all have written; totals and means are those of the whole
        batch.
        """
        told = [row["prompt"] for row in rows], texts, [row.get("meta", {}) for row in rows]
        told = *told, [row.get("tools") for row in rows]
        columns, others = score(self.rewards, *told), score(self.watched, *told)
        if shared:
            texts = gather_object(texts)
            columns, others = ({name: gather_object(part[name]) for name in part} for part in (columns, others))
        named = [(f"reward/{name}", values) for name, values in columns.items()]
        named += [(f"watch/{name}", values) for name, values in others.items()]
        known = {name: [value for value in values if value is not None] for name, values in named}
        means = {name: sum(values) / len(values) for name, values in known.items() if values}
        return total(self.rewards, columns), means | {name: metric(texts) for name, metric in self.set_metrics.items()}

    def measure(self, model: PreTrainedModel | PeftModel, step: int) -> dict:
        """probe/*: every reward, KL to the reference (nats an answer) and stopped share of samples at temperature 1,
        NLL of the held-out answers (nats per character); and two of the samples. Every process measures and has the
        first one's figures, so that all decide alike. Raises UserError where one is not finite."""
        sampling = (self.settings.max_new_tokens, self.settings.seed, self.settings.enable_thinking)
        with torch.random.fork_rng(), as_loaded(model):
            stopped, texts = stop_rate(model, self.tokenizer, self.rows, len(self.rows), *sampling)
            totals, means = self.judge(self.rows, texts)
            known = [value for value in totals if value is not None]
            means["reward"] = sum(known) / len(known) if known else None
            thinking = self.settings.enable_thinking
            means["kl"] = kl_to_reference(model, self.tokenizer, self.rows, texts, thinking, self.reference)
            nll = mean_nll(model, self.tokenizer, self.rows, self.settings.enable_thinking)
            means |= {"stopped": stopped, "nll": nll}
        figures = {f"probe/{name}": value for name, value in means.items()} | {"samples": texts[:2]}
        figures = broadcast_object_list([figures])[0]
        require_finite(figures, step, self.settings)
        return figures

    def over_budget(self, figures: dict, first: dict) -> str:
        """Which budget the figures of a probe are over, empty if none; `first`: the figures of the untrained policy."""
        kl, nll, first_nll = figures["probe/kl"], figures["probe/nll"], first["probe/nll"]
        if self.settings.kl_budget and kl > self.settings.kl_budget:
            return f"KL {kl:.2f} over its budget of {self.settings.kl_budget}"
        if self.settings.nll_budget and nll > first_nll + self.settings.nll_budget:
            return f"held-out NLL {nll:.3f} over {first_nll:.3f} + {self.settings.nll_budget}"
        return ""


def warn_of_drift(first: dict, last: dict) -> None:
    """Says so where the policy of the `last` probe has unlearned what held-out answers look like: rewards alone rise
    on texts that are all alike, too."""
    rise = last["probe/nll"] - first["probe/nll"]
    if rise > LARGE_RISE:
        print(
            f"warning: the NLL of the held-out answers rose by {rise:.2f} nats per character: the policy writes what "
            "the rewards pay for and has unlearned the rest; fix: a lower --lr, fewer --max-steps, or --nll-budget"
        )


@contextmanager
def as_loaded(model: torch.nn.Module) -> Iterator[None]:
    """The model as it loads from disk: accelerate runs its forward pass under autocast, which rounds the adapter to
    bfloat16."""
    wrapped = vars(model).get("forward")
    if plain := vars(model).get("_original_forward"):
        model.forward = plain
    try:
        yield
    finally:
        if plain:
            model.forward = wrapped


class ProbeCallback(TrainerCallback):
    """Runs a DriftProbe before the first step of a trl trainer and every `every` steps, and ends the run once it is
    over a budget.

    A checkpoint is written after each probe within the budgets and at no other step. So the newest one on disk is
    always within them, a resumed run reads its probe from the log, and one that was killed on its way out comes to the
    same end again. `kept`: the adapter of the last probe within the budgets. `last`: its figures. `stopped_by`: the
    budget that ended the run.
    """

    def __init__(self, trainer: Trainer, probe: DriftProbe, every: int):
        self.trainer, self.probe, self.every = trainer, probe, every
        self.stopped_by = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **kwargs
    ) -> None:
        probes = [entry for entry in state.log_history if "probe/kl" in entry]
        if probes:
            self.first, self.last = probes[0], probes[-1]
            self.kept = trained_of(model)
        else:
            self.first = self.probe.measure(model, 0)
            self.measured(self.first, model, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **kwargs
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measured(self.probe.measure(model, state.global_step), model, state, control)

    def measured(
        self, figures: dict, model: PreTrainedModel | PeftModel, state: TrainerState, control: TrainerControl
    ) -> None:
        samples, due = figures["samples"], control.should_log
        Trainer.log(self.trainer, {name: value for name, value in figures.items() if name != "samples"})
        control.should_log = due  # else this would stand for the log of the step itself
        state.log_history[-1]["samples"] = samples
        shown = ", ".join(f"{name} {number(figures[f'probe/{name}'])}" for name in ("reward", "kl", "nll", "stopped"))
        print(f"step {state.global_step}: probe: {shown}")
        self.stopped_by = self.probe.over_budget(figures, self.first)
        if self.stopped_by:
            print(f"stop: {self.stopped_by}")
            control.should_training_stop, control.should_save = True, False
        else:
            self.kept, self.last, control.should_save = trained_of(model), figures, True


def trained_of(model: PreTrainedModel | PeftModel) -> dict:
    """A copy of the adapter, or of all weights where there is none."""
    weights = get_peft_model_state_dict(model) if hasattr(model, "peft_config") else model.state_dict()
    return {name: value.detach().cpu().clone() for name, value in weights.items()}


def put_back(model: PreTrainedModel | PeftModel, weights: dict) -> None:
    """What trained_of has copied."""
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, weights)
    else:
        model.load_state_dict(weights)
