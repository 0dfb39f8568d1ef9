"""Proximal policy optimisation (PPO) with LoRA: the model writes, rewards by name judge, a value head says what was to
be expected.

One step: write an answer to each of `batch_size` prompts; judge the texts; give every token its share of the reward
(GAE on the value head, less a KL penalty to the reference); then pass a few times over the answers with the clipped
surrogate. The policy is a LoRA adapter, its reference the same model with the adapter switched off. The formulas stand
in common/ppo/update.py, what was decided in docs/TRAINING.md.

Shapes: N answers of at most T tokens, [N, T] with a mask of the real ones; inside a micro-batch the real tokens only:
[tokens]. Several processes (accelerate launch) share the writing, the judging and the passes of the model; all hold the
whole batch.

Reads   --model (stage 22); processed_data/{task}/prompts_train.jsonl, sft_val.jsonl
Writes  checkpoints/{task}/ppo: adapter, tokenizer, checkpoint-N, learning_curve.png, overoptimisation.png,
        log_history.json, run.json
Run     python scripts/51_train_ppo.py
        python scripts/51_train_ppo.py --rewards form:1 rhyme:1 meter:1 fluency:0.5 --value-body own --kl-target 1.5

Deviations from Schulman et al. 2017: whitened advantages; no entropy bonus (the KL penalty keeps the policy broad); the
value head starts from the first batch's mean reward; an answer that is cut ends its episode like one that stops.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common.settings import Limit, UserError, changed, read_settings, settings_errors
from common.training.options import AdapterSettings


@dataclass
class Settings(AdapterSettings):
    has_reference = True  # the base, the adapter switched off

    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "checkpoints/{task}/sft_merged"
    """the policy to start from, and the reference"""
    train_file: Path = Path("processed_data/{task}/prompts_train.jsonl")
    """prompts to answer; meta goes to the rewards"""
    val_file: Path = Path("processed_data/{task}/sft_val.jsonl")
    """held-out prompts to sample, answers for the NLL"""
    rewards: tuple[str, ...] = ()
    """NAME[:WEIGHT], model=PATH[:WEIGHT], style=PATH#LABEL[:WEIGHT]; left out: DEFAULT_REWARDS of the task"""
    step_rewards: bool = True
    """a reward whose STEP_REWARDS (tasks/base.py) say where it is earned is paid there, at the end only what is left"""
    watch: tuple[str, ...] = ()
    """rewards that are logged and not learned from; left out: WATCHED_REWARDS of the task"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    max_length: int = 512
    """tokens, prompt and answer; a prompt without room for max_new_tokens is left out, counted"""
    allow: tuple[str, ...] = ()
    """checks of the data, by name, whose findings are as they should be (docs/CHECKS.md)"""

    # --- LoRA (further settings: common/training/options.py)
    lora_r: int = 32
    """rank"""
    lora_alpha: int = 64
    """the update is scaled by alpha / r"""
    value_body: Literal["shared", "own"] = "shared"
    """the value head reads the policy's body, or has a LoRA of its own"""

    # --- rollout
    max_steps: int = 60
    """batches written and learned from"""
    batch_size: int = 128
    """prompts a step, one answer each, over all processes"""
    max_new_tokens: int = 96
    """an answer that is longer is cut"""
    temperature: Annotated[float, Limit(above=0)] = 1.0
    """of the policy: of what is drawn and of every log-probability"""
    missing_eos: float = 0.5
    """taken off the reward of an answer that was cut"""

    # --- reward and advantage
    kl_coef: float = 0.05
    """beta: reward taken off per nat of KL to the reference"""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """of the penalty; k1 is unbiased, k3 never negative"""
    kl_target: float = 0.0
    """nats an answer that the adaptive controller steers beta to, 0 = beta stays"""
    gamma: float = 1.0
    """discount per token"""
    lam: float = 0.99
    """lambda of GAE: 1 = what came minus what was expected, less = trust the value head more"""

    # --- optimisation
    epochs: int = 1
    """passes over each batch"""
    minibatches: int = 2
    """optimizer steps per pass"""
    clip: float = 0.2
    """epsilon of the surrogate"""
    value_clip: float = 0.2
    """most that a value may move from the rollout's before it stops counting, 0 = no limit"""
    value_coef: float = 0.1
    """weight of the value loss"""
    stop_kl: float = 0.05
    """nats per token from the policy that wrote; past it the step's passes end, 0 = never"""
    lr: float = 1.5e-3
    """of the policy; falls to 0 linearly"""
    value_lr: float = 3e-4
    """of the value head and its adapter"""
    warmup_steps: int = 3
    """steps until the full rates"""
    max_grad_norm: float = 1.0
    """longer gradients are cut to this"""
    micro_tokens: int = 2048
    """padded tokens in one forward pass: memory, not result"""
    dtype: str = "auto"
    """auto, float32, bfloat16"""

    # --- watching
    eval_steps: int = 10
    """steps between probes and checkpoints"""
    probe_count: int = 64
    """held-out rows of the probe, 0 = all"""
    kl_budget: float = 0.0
    """nats an answer above which the run ends; 0 = none"""
    nll_budget: float = 0.0
    """nats per character above the first held-out NLL at which the run ends; 0 = none"""
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """event files in output_dir/runs"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/ppo")
    """adapter and run record"""
    seed: int = 42
    """of LoRA, prompts, answers and minibatches"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


def main(settings: Settings) -> None:
    from common.evaluation.tables import number
    from common.generation import generate_command
    from common.models import newest_checkpoint
    from common.ppo.actor_critic import ActorCritic, draw_prompts, load_checkpoint, save_checkpoint, share
    from common.ppo.update import explained_variance, gae, kl_estimate, next_beta, token_rewards, update, whiten
    from common.runs import begin_run, set_seed
    from common.training import arguments
    from common.training.probes import rl_inputs, warn_of_drift
    from common.training.rewards import step_shares
    from tasks.base import load_task

    # before an earlier run's files are touched
    settings = (task := load_task(settings.task)).fill_in(settings)
    if settings.batch_size < int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError(f"--batch-size {settings.batch_size}: fewer prompts than processes; fix: a larger one")
    model_path, tokenizer, prompts, probe, inputs = rl_inputs(settings, task)
    lora = arguments.lora_config(settings, model_path)
    with begin_run(settings.output_dir, settings, inputs, "51_train_ppo") as run:
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather_object

        from common.evaluation.plots import plot_overoptimisation

        set_seed(settings.seed)
        model = arguments.load_trained(settings, model_path, tokenizer)
        how = settings.value_body, settings.temperature, settings.gradient_checkpointing
        with settings_errors(settings):
            agent = ActorCritic(model, lora, *how)
        rates = ((agent.policy, settings.lr), (agent.value, settings.value_lr))
        groups = [{"params": list(part.values()), "peak": rate} for part, rate in rates]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        trained = sum(p.numel() for group in groups for p in group["params"])
        print(f"{len(prompts)} prompts, {len(probe.rows)} probe rows, {trained} trained parameters, {model.dtype}")
        first, beta, log, over_budget, board = 0, settings.kl_coef, [], "", None
        if run.resuming and (checkpoint := newest_checkpoint(settings.output_dir)):
            first, beta, log = load_checkpoint(Path(checkpoint), agent, optimizer)
            print(f"resumed at step {first}")
        else:
            log.append({"step": 0, **probe.measure(agent.model, 0)})
            save_checkpoint(settings.output_dir, agent, optimizer, 0, beta, log)
        if settings.report_to == "tensorboard" and run.is_main:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(settings.output_dir / "runs"), purge_step=first + 1)

        for step in range(first, settings.max_steps):
            # what a step draws is decided by seed, process and step alone: a resumed run goes on exactly
            torch.manual_seed((settings.seed + PartialState().process_index) * 1_000_003 + step)
            warmth, rest = min(1, (step + 1) / max(1, settings.warmup_steps)), 1 - step / settings.max_steps
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * warmth * rest

            started = time.perf_counter()
            asked = share(draw_prompts(prompts, step, settings.batch_size, settings.seed))
            batch = agent.rollout([ids for _, ids in asked], settings.max_new_tokens)
            written = time.perf_counter()
            rows, texts = [row for row, _ in asked], batch.texts(tokenizer)
            totals, means = probe.judge(rows, texts, shared=True)
            told = [row["prompt"] for row in rows], texts, [row.get("meta", {}) for row in rows]
            parts = gather_object(step_shares(probe.rewards if settings.step_rewards else [], *told))
            batch = batch.gather()  # from here on every process knows the answers of all
            judged = [place for place, value in enumerate(totals) if value is not None]
            if not judged:
                raise UserError(f"step {step + 1}: no answer could be judged; fix: --rewards, or meta of the prompts")
            batch, scores = batch.keep(judged), torch.tensor([totals[place] for place in judged], device=model.device)
            earned = batch.at_tokens(tokenizer, [parts[place] for place in judged])
            scored = time.perf_counter()

            if step == 0:
                agent.expect(batch, scores.mean().item())
            reference = agent.look_again(batch, "reference", settings.micro_tokens)
            if agent.own:
                batch.values = agent.look_again(batch, "value", settings.micro_tokens)
            real, paid = batch.mask, scores - settings.missing_eos * ~batch.stopped
            penalties = -beta * kl_estimate(batch.logprobs, reference, settings.kl_estimator)
            rewards = token_rewards(paid, penalties, real, earned)
            advantages, returns = gae(rewards, batch.values, real, settings.gamma, settings.lam)
            learned = update(agent, optimizer, batch, whiten(advantages, real), returns, settings)
            arguments.require_finite(learned, step + 1, settings)

            kl = (kl_estimate(batch.logprobs, reference, "k3") * real).sum(1).mean().item()  # nats an answer
            entry = {"step": step + 1, "reward": scores.mean().item(), **means, **learned}
            entry |= {"unjudged": len(totals) - len(judged), "stopped": batch.stopped.float().mean().item()}
            entry |= {"kl": kl, "beta": beta, "tokens": real.sum().item() / len(scores)}
            entry["entropy"] = -batch.logprobs[real].mean().item()  # from the policy's own draws
            entry["reference_nll"] = -reference[real].mean().item()  # how likely the starting model finds it
            entry["explained_variance"] = explained_variance(batch.values[real], returns[real])
            entry |= {"seconds_rollout": written - started, "seconds_rewards": scored - written}
            entry["seconds_update"] = time.perf_counter() - scored
            shown = {"reward": entry["reward"], **means, "kl": kl, "entropy": entry["entropy"]}
            print(f"step {step + 1}:", *(f"{name.split('/')[-1]} {value:.3f}" for name, value in shown.items()))
            beta = next_beta(beta, kl, settings.kl_target) if settings.kl_target else beta
            if (step + 1) % settings.eval_steps == 0 or step + 1 == settings.max_steps:
                entry |= probe.measure(agent.model, step + 1)
                print("  probe:", *(f"{name} {number(entry[f'probe/{name}'])}" for name in ("reward", "kl", "nll")))
                over_budget = probe.over_budget(entry, log[0])
            arguments.require_finite(entry, step + 1, settings)
            log.append(entry)
            for name, value in entry.items() if board else ():
                if name == "samples":
                    board.add_text(name, "\n\n".join(value), step + 1)
                elif value is not None:
                    board.add_scalar(name, value, step + 1)
            if over_budget:
                break
            if "probe/nll" in entry:
                arguments.return_freed_memory()
                trained = (parameter for group in groups for parameter in group["params"])
                arguments.require_finite_weights(trained, step + 1, settings)
                save_checkpoint(settings.output_dir, agent, optimizer, step + 1, beta, log)

        before, after, taken = log[0], log[-1], len(log) - 1
        arguments.require_learned(agent.policy, [], rewards=settings.rewards)
        if over_budget:
            checkpoint = Path(newest_checkpoint(settings.output_dir))
            _, _, (*_, after) = load_checkpoint(checkpoint, agent, optimizer)
            print(f"stopped at step {taken}: {over_budget}; the adapter is that of {checkpoint.name}")
            if not after["step"]:
                print("warning: that is the untrained one; fix: a lower --lr, or fewer --eval-steps")
        if run.is_main:
            agent.model.save_pretrained(settings.output_dir, selected_adapters=["default"])
            arguments.sort_targets(settings.output_dir)
            tokenizer.save_pretrained(settings.output_dir)
            plot_overoptimisation(log, settings.output_dir / "overoptimisation.png")
        curves = ("reward", *(name for name in log[-1] if name.startswith(("reward/", "watch/"))))
        arguments.save_log(log, settings, run, losses=False, **{name: name for name in curves})
        for name in (name for name in before if name.startswith("probe/") and name in after):
            print(f"{name.removeprefix('probe/')}: {number(before[name])} -> {number(after[name])}")
            run.figure(name.removeprefix("probe/"), [before[name], after[name]])
        warn_of_drift(before, after)
        run.figure("samples", after["samples"])
        run.figure("steps", taken)
        run.figure("stopped_by", over_budget or None)
        trained = {"model": settings.model, "adapter": settings.output_dir, **changed(settings, "enable_thinking")}
        run.finish(generate_command(settings.task, settings.train_file, {}, **trained))


if __name__ == "__main__":
    main(read_settings(Settings))
