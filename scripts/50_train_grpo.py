"""GRPO with LoRA: groups of answers to one prompt, each pulled up or down by how its reward stands in the group.

Rewards go by name: rules of the task, a reward model, a classifier, or a weighted mix (common/training/rewards.py);
every part is logged on its own. A fixed probe watches reward, KL to the reference (the adapter switched off), held-out
NLL and whether answers stop; a budget on KL or NLL ends the run and keeps the last adapter within it.
overoptimisation.png shows reward against both.

Reads   processed_data/{task}/prompts_train.jsonl; sft_val.jsonl for the probe
Writes  checkpoints/{task}/grpo: adapter, tokenizer, learning_curve.png, overoptimisation.png, log_history.json,
        run.json
Run     python scripts/50_train_grpo.py
        python scripts/50_train_grpo.py --rewards rhyme:1 meter:1 form:1 fluency:0.5 model=checkpoints/poems/reward:0.2
        accelerate launch scripts/50_train_grpo.py --model Qwen/Qwen3-4B --lr 2e-5 --batch-size 32 --rollout vllm \\
            --vllm-mode colocate

Shao et al. 2024, arXiv 2402.03300, section 4.1, in trl's form: token-level loss by default (dapo, arXiv 2503.14476),
and a completion that a reward cannot judge is counted and gets advantage 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common.settings import Limit, UserError, changed, read_settings, settings_errors
from common.training.options import ChatSettings


@dataclass
class Settings(ChatSettings):
    has_reference = True  # the base, the adapter switched off

    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "checkpoints/{task}/sft_merged"
    """where the policy starts, and the reference: a folder or a hub id"""
    train_file: Path = Path("processed_data/{task}/prompts_train.jsonl")
    """prompts to answer"""
    val_file: Path = Path("processed_data/{task}/sft_val.jsonl")
    """prompts and answers of the probe"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    max_length: int = 512
    """tokens, prompt and answer; a longer prompt is left out and counted"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""

    # --- reward
    rewards: tuple[str, ...] = ()
    """NAME[:WEIGHT], model=PATH[:WEIGHT], style=PATH#LABEL[:WEIGHT]; left out: DEFAULT_REWARDS of the task"""
    watch: tuple[str, ...] = ()
    """rewards that the probe logs and nothing learns from; left out: WATCHED_REWARDS of the task"""
    beta: float = 0.02
    """weight of the KL to the reference in the loss; 0 = none (it is still measured)"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """whose standard deviation advantages are divided by"""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo"] = "dapo"
    """trl's names"""
    clip: float = 0.2
    """of the probability ratio; matters where iterations or minibatches > 1"""
    clip_high: float = 0.0
    """its upper bound, 1 + clip_high (DAPO: 0.28); 0 = clip. With cispo the largest weight, 0 = 5"""
    ratio: Literal["token", "sequence"] = "token"
    """probability ratio of each token, or GSPO's of the whole answer, its geometric mean; that goes with grpo"""
    mask_truncated: bool = False
    """answers that were cut teach nothing: not the policy, not the KL"""
    entropy_bonus: float = 0.0
    """times the mean entropy of a token, taken off the loss"""

    # --- rollout
    rollout: Literal["hf", "vllm"] = "hf"
    """hf: transformers; vllm: trl's vLLM modes, on a GPU"""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """colocate: in this process; server: at vllm_server_url"""
    vllm_memory_share: Annotated[float, Limit(above=0, below=1)] = 0.3
    """of the GPU's memory, for the weights and the cache of vLLM beside the training (colocate)"""
    vllm_server_url: str = "http://127.0.0.1:8000"
    """of the vLLM server"""
    num_generations: int = 8
    """answers to a prompt: one group"""
    temperature: Annotated[float, Limit(above=0)] = 1.0
    """of the rollout, and of the log-probabilities"""
    max_new_tokens: int = 96
    """an answer that is longer is cut, and counted"""

    # --- LoRA (further settings: common/training/options.py)
    lora_r: Annotated[int, Limit()] = 32
    """rank; 0 = train all weights"""
    lora_alpha: int = 64
    """the update is scaled by alpha / r"""

    # --- optimisation
    max_steps: int = 100
    """optimizer steps, each on batch_size * accumulation answers"""
    iterations: int = 1
    """passes over each batch of answers ..."""
    minibatches: int = 1
    """... each in so many optimizer steps of batch_size x accumulation answers"""
    lr: float = 1e-3
    """peak; cosine to 0"""
    warmup_share: float = 0.05
    """of all steps"""
    batch_size: int = 128
    """answers in a process's micro-batch; all those of a step are a multiple of num_generations"""
    accumulation: int = 1
    """micro-batches per optimizer step"""
    dtype: str = "auto"
    """auto, float32, bfloat16"""

    # --- watching
    eval_steps: int = 10
    """steps between probes and checkpoints"""
    probe_count: int = 64
    """validation rows of the probe, 0 = all"""
    kl_budget: float = 0.0
    """nats an answer above which the run ends; 0 = none"""
    nll_budget: float = 0.0
    """nats per character above the first held-out NLL at which the run ends; 0 = none"""
    report_to: str = "tensorboard"
    """any reporter of transformers, or none"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/grpo")
    """adapter and run record"""
    seed: int = 42
    """of prompt order, LoRA initialisation and samples"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""

    def clashes(self):
        yield from super().clashes()
        if self.ratio == "sequence" and self.loss_type not in ("grpo", "sapo"):
            what = f"--ratio sequence with --loss-type {self.loss_type}: a long answer would count once for each token"
            yield what, "--loss-type grpo, as in GSPO"
        if 0 < self.clip_high < self.clip:
            yield f"--clip-high {self.clip_high}: below --clip {self.clip}", f"{self.clip} or more"


def reward_function(rewards: list):
    """The weighted total as trl calls it; the mean of every part goes to the log under its name."""
    from common.training.rewards import score, total

    def total_reward(
        prompts: list, completions: list, meta: list[str], tools: list[str], log_metric: Callable, **_
    ) -> list[float | None]:
        texts = [completion[-1]["content"] for completion in completions]
        columns = score(rewards, prompts, texts, *(list(map(json.loads, column)) for column in (meta, tools)))
        for name, values in columns.items():
            for value in (value for value in values if value is not None):
                log_metric(f"reward/{name}", value)  # trl takes the mean over the values of all processes
        return total(rewards, columns)

    return total_reward


def loss_arguments(settings: Settings) -> dict:
    """What decides the loss, as trl names it."""
    return {
        "beta": settings.beta,
        "epsilon": settings.clip,
        "epsilon_high": settings.clip_high or (5.0 if settings.loss_type == "cispo" else settings.clip),
        "importance_sampling_level": settings.ratio,
        "mask_truncated_completions": settings.mask_truncated,
        "entropy_coef": settings.entropy_bonus,
        "scale_rewards": settings.scale_rewards,
        "loss_type": settings.loss_type,
    }


def check_batch(settings: Settings, prompts: int) -> None:
    """Raises UserError where a round's answers are no whole groups, or where there are fewer prompts than groups."""
    group, share = settings.num_generations, settings.accumulation * settings.minibatches
    share *= int(os.environ.get("WORLD_SIZE", "1"))
    answers = settings.batch_size * share
    counted = f"{answers} answers a round (--batch-size x --accumulation x --minibatches x processes)"
    if answers % group:
        unit = group // math.gcd(group, share)
        fit = unit * max(1, round(settings.batch_size / unit))
        raise UserError(f"{counted} are no whole groups of --num-generations {group}; fix: --batch-size {fit}")
    if prompts < answers // group:
        raise UserError(
            f"{prompts} prompts, and {counted} ask {answers // group}; fix: more prompts, or a smaller --batch-size"
        )


def main(settings: Settings) -> None:
    from trl import GRPOConfig

    from common.generation import generate_command
    from common.runs import begin_run, set_seed
    from common.training import arguments
    from common.training.probes import rl_inputs
    from common.vllm_engine import require_server
    from tasks.base import load_task

    # before an earlier run's files are touched
    settings = (task := load_task(settings.task)).fill_in(settings)
    if settings.rollout == "vllm" and settings.vllm_mode == "server":
        require_server(settings.vllm_server_url, "--vllm-server-url")
    model_path, tokenizer, prompts, probe, inputs = rl_inputs(settings, task)
    check_batch(settings, len(prompts))
    config = arguments.trainer_arguments(
        GRPOConfig,
        settings,
        **loss_arguments(settings),
        num_generations=settings.num_generations,
        num_iterations=settings.iterations,
        temperature=settings.temperature,
        max_completion_length=settings.max_new_tokens,
        chat_template_kwargs={"enable_thinking": settings.enable_thinking},
        use_vllm=settings.rollout == "vllm",
        vllm_mode=settings.vllm_mode,
        vllm_gpu_memory_utilization=settings.vllm_memory_share,
        vllm_server_base_url=settings.vllm_server_url if settings.vllm_mode == "server" else None,
        # trl's own choice but for vespo, which takes no correction of whole answers
        vllm_importance_sampling_mode="token_mask" if settings.loss_type == "vespo" else "sequence_mask",
        steps_per_generation=settings.accumulation * settings.minibatches,
        save_strategy="no",  # ProbeCallback says when
        logging_steps=1,
    )
    lora = arguments.lora_config(settings, model_path)
    with begin_run(settings.output_dir, settings, inputs, "50_train_grpo") as run:
        from common.evaluation.plots import plot_overoptimisation
        from common.evaluation.tables import number
        from common.training.probes import ProbeCallback, put_back, warn_of_drift
        from common.training.trl_cpu import LeanGRPOTrainer, prompt_rows
        from common.training.turn_tokens import train_token_rows

        set_seed(settings.seed)
        model = arguments.load_trained(settings, model_path, tokenizer)
        train_token_rows(lora, model, tokenizer, settings.train_tokens)
        print(f"{len(prompts)} prompts, {len(probe.rows)} probe rows, {model.dtype} on {model.device}")
        with settings_errors(settings):
            trainer = LeanGRPOTrainer(
                model=model,
                args=config,
                reward_funcs=[reward_function(probe.rewards)],
                train_dataset=prompt_rows([row for row, _ in prompts], settings.enable_thinking),
                processing_class=tokenizer,
                peft_config=lora,
            )
        if lora is None:
            probe.reference = trainer.ref_model or arguments.load_trained(settings, model_path, tokenizer).eval()
        round_steps = settings.iterations * settings.minibatches  # a checkpoint within a round would lose its answers
        watch = ProbeCallback(trainer, probe, math.ceil(settings.eval_steps / round_steps) * round_steps)
        trainer.add_callback(watch)
        log = arguments.fit(trainer, settings, run)

        if watch.stopped_by:
            put_back(trainer.model, watch.kept)
            print("kept: the adapter of the last probe within the budgets")
            if watch.last is watch.first:
                print("warning: that is the untrained one; fix: a lower --lr, or fewer --eval-steps")
        arguments.save_trained(trainer, settings)
        curves = {"reward": "total reward"} | {f"reward/{reward.name}": reward.name for reward in probe.rewards}
        arguments.save_log(log, settings, run, losses=False, **curves)
        if run.is_main:
            plot_overoptimisation(log, settings.output_dir / "overoptimisation.png")
        run.figure("stopped_by", watch.stopped_by)
        for name in ("reward", "kl", "nll", "stopped"):
            before, after = watch.first[f"probe/{name}"], watch.last[f"probe/{name}"]
            print(f"{name}: {number(before)} -> {number(after)}")
            run.figure(name, after)
        warn_of_drift(watch.first, watch.last)
        run.figure("samples", watch.last["samples"])
        arguments.tell_trackers(trainer, run)
        trained = {"model": settings.model, "adapter": settings.output_dir} if lora else {"model": settings.output_dir}
        trained |= changed(settings, "enable_thinking")
        run.finish(generate_command(settings.task, settings.train_file, {}, **trained))


if __name__ == "__main__":
    main(read_settings(Settings))
