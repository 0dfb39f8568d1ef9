"""One of the processes of tests/slow/test_distributed_rl.py: learns from a recorded batch with the code of stages 50
and 51.

    PYTHONPATH=scripts python tests/rl_process.py FOLDER                                   one process, which has the
    whole batch PYTHONPATH=scripts accelerate launch --config_file configs/accelerate/cpu_2.yaml tests/rl_process.py
    FOLDER        two of them

Writes FOLDER/<rank>.pt: the gradients as one vector and the logged figures, for each learner.
"""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig

from common.models import load_model, load_tokenizer
from common.ppo import update
from common.ppo.actor_critic import share
from common.training.probes import DriftProbe, ProbeCallback
from common.training.trl_cpu import LeanGRPOTrainer
from conftest import ROOT, SCRIPTS
from tasks.base import load_task
from test_ppo import POEM, PROMPTS, ppo, rows_of, stirred, toy_agent

spec = importlib.util.spec_from_file_location("train_grpo", SCRIPTS / "50_train_grpo.py")
grpo = importlib.util.module_from_spec(spec)
sys.modules["train_grpo"] = grpo  # dataclasses look their module up
spec.loader.exec_module(grpo)

STATE = PartialState(cpu=True)
BASE = str(ROOT / "data/tiny_qwen3")
REWARDS = ("form:1", "no_repeat:1")  # no_repeat has nothing to say of a text without Han characters


def recorded_texts(count: int) -> list[str]:
    """Verse with characters said twice, of any length; the first four and each seventh have no Han character."""
    rng = random.Random(5)
    texts = ["".join(rng.choices(POEM[0]["content"], k=rng.randint(2, 24))) for _ in range(count)]
    return ["abc!" if place < 4 or place % 7 == 3 else text for place, text in enumerate(texts)]


def probe_of(rows: list[dict], **changed) -> DriftProbe:
    settings = {"rewards": REWARDS, "watch": (), "dtype": "float32", "max_length": 512, "max_new_tokens": 12, "seed": 7}
    settings |= {"enable_thinking": False, "kl_budget": 0.0, "nll_budget": 0.0} | changed
    return DriftProbe(SimpleNamespace(**settings), load_task("poems"), load_tokenizer(BASE), rows)


def ppo_step(value_body: str) -> dict:
    """One update on 15 recorded answers, of which this process brings its share. The step is plain SGD of rate 1: what
    the weights lose is the gradient."""
    agent = stirred(toy_agent(value_body))
    torch.manual_seed(0)
    whole = agent.rollout(PROMPTS[:15], max_new_tokens=9)
    with torch.no_grad():  # the policy has moved since
        for number, parameter in enumerate(agent.policy.values()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    rows, texts, places = rows_of(15), recorded_texts(15), list(range(15))
    assert whole.mask[:8].sum() / 8 != whole.mask[8:].sum() / 7, "else a mean of two means would do"

    torch.manual_seed(STATE.process_index)  # as in the stage, every process draws for itself
    totals, means = probe_of([], watch=("all_three",)).judge(share(rows), share(texts), shared=True)
    batch = whole.keep(share(places)).gather()
    judged = [place for place, value in enumerate(totals) if value is not None]
    batch, scores = batch.keep(judged), torch.tensor([totals[place] for place in judged])
    reference = agent.look_again(batch, "reference", 40)
    if agent.own:
        batch.values = agent.look_again(batch, "value", 40)
    rewards = update.token_rewards(scores, -0.1 * update.kl_estimate(batch.logprobs, reference), batch.mask)
    advantages, returns = update.gae(rewards, batch.values, batch.mask, 1.0, 0.95)

    white, weights = update.whiten(advantages, batch.mask), {**agent.policy, **agent.value}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    settings = ppo.Settings(minibatches=1, micro_tokens=40, max_grad_norm=1e9, stop_kl=0.0)
    found = {"figures": means}
    # of a minibatch of one answer, one process has no part
    for name, rows in (("alone", [int(batch.mask.sum(1).argmax())]), ("gradients", list(range(len(judged))))):
        optimizer = torch.optim.SGD(weights.values(), lr=1.0)
        learned = update.update(agent, optimizer, batch.keep(rows), white[rows], returns[rows], settings)
        found[name] = torch.cat([(before[key] - weight.detach()).flatten() for key, weight in weights.items()])
        for key, weight in weights.items():
            weight.data.copy_(before[key])
    found["figures"] |= learned
    return found


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.requires_grad])


def grpo_step(folder: Path) -> dict:
    """One step on 72 recorded answers in groups of 8; of two processes each has 36, so that a group stands on both
    sides."""
    tokenizer, rows, texts, count = load_tokenizer(BASE), rows_of(12), recorded_texts(72), 72
    answers = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]

    def recorded(prompts, trainer) -> dict:
        ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
        first = STATE.process_index * len(prompts)
        return {"prompt_ids": ids, "completion_ids": answers[first : first + len(prompts)], "logprobs": None}

    config = GRPOConfig(
        output_dir=str(folder / "grpo"),
        per_device_train_batch_size=count // STATE.num_processes,
        num_generations=8,
        beta=0.04,
        max_completion_length=32,
        max_steps=1,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    set_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    data = [{"prompt": row["prompt"], "meta": json.dumps(row["meta"]), "tools": "null"} for row in rows]
    # other rows in each process: it would have other figures, and another mind about the budget
    probe = probe_of([{**row, "completion": POEM} for row in rows][STATE.process_index :][:2], kl_budget=1e9)
    trainer = LeanGRPOTrainer(
        model=load_model(BASE, tokenizer, "float32"),
        args=config,
        train_dataset=Dataset.from_list(data),
        peft_config=lora,
        reward_funcs=[grpo.reward_function(probe.rewards)],
        processing_class=tokenizer,
        rollout_func=recorded,
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.add_callback(ProbeCallback(trainer, probe, 1))
    trainer.train()
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    return {"gradients": gradients.found, "figures": logged}


if __name__ == "__main__":
    output = Path(sys.argv[1])
    found = {f"ppo_{body}": ppo_step(body) for body in ("shared", "own")} | {"grpo": grpo_step(output)}
    torch.save(found, output / f"{STATE.process_index}.pt")
