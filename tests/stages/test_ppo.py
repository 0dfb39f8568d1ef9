"""Stage 51: toys whose optimum is known, the real command line on a few prompts. tests/unit/test_ppo_update.py has the
formulas."""

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

import warm
from common.models import load_model, load_tokenizer
from common.ppo import update
from common.ppo.actor_critic import ActorCritic, draw_prompts
from common.settings import UserError, read_settings
from common.training.probes import DriftProbe
from conftest import ROOT, SCRIPTS, start_and_kill
from tasks import poems
from tasks.base import load_task

spec = importlib.util.spec_from_file_location("train_ppo", SCRIPTS / "51_train_ppo.py")
ppo = importlib.util.module_from_spec(spec)
sys.modules["train_ppo"] = ppo  # dataclasses look their module up
spec.loader.exec_module(ppo)

TARGETS = list(ppo.Settings().lora_targets)
VOCABULARY, STOP = 8, 1


def test_prompts_come_once_a_pass_and_depend_on_seed_and_step_alone():
    drawn = [prompt for step in range(6) for prompt in draw_prompts(list("abcdef"), step, 4, seed=1)]
    assert all(sorted(drawn[start : start + 6]) == list("abcdef") for start in range(0, 24, 6))
    assert draw_prompts(list("abcdef"), 2, 4, seed=1) == drawn[8:12]
    assert draw_prompts(list("abcdef"), 0, 4, seed=2) != drawn[:4]


# --- policy and value head on a toy model


def toy_agent(value_body: str = "shared", temperature: float = 1.0, spread: float = 0.3) -> ActorCritic:
    """A random Qwen3 of one layer; `spread`: of its weights, and so of its distributions."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=spread,
        tie_word_embeddings=True,
        eos_token_id=STOP,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = [STOP]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    return ActorCritic(model, lora, value_body, temperature)


def next_token_probs(agent: ActorCritic, sequence: list[int]) -> torch.Tensor:
    """[vocabulary], by the model's own forward pass."""
    with torch.no_grad():
        return (agent.model(input_ids=torch.tensor([sequence])).logits[0, -1] / agent.temperature).softmax(-1)


def stirred(agent: ActorCritic) -> ActorCritic:
    """Adapters and value head moved away from their zeros."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in (*agent.policy.values(), *agent.value.values()):
            parameter += 0.3 * torch.randn_like(parameter)
    return agent


PROMPTS = [[2, 3], [4], [5, 6, 7, 2], [3, 3, 3]] * 4


@pytest.mark.parametrize("value_body", ["shared", "own"])
def test_what_the_rollout_remembers_is_what_a_training_pass_computes(value_body):
    agent = stirred(toy_agent(value_body, temperature=0.7))
    torch.manual_seed(0)
    batch = agent.rollout(PROMPTS, max_new_tokens=6)
    assert len(set(batch.lengths)) > 2, "answers of several lengths"
    rows = list(range(len(PROMPTS)))
    with torch.no_grad():
        states = agent.states(batch, rows)
        logprobs = agent.logprobs(states, batch.tokens[batch.mask])
    assert torch.allclose(logprobs, batch.logprobs[batch.mask], atol=1e-5)
    if value_body == "shared":
        assert torch.allclose(agent.values(states), batch.values[batch.mask], atol=1e-5)
    else:
        again = agent.look_again(batch, "value", token_budget=24)
        assert again[batch.mask].std() > 0 and not torch.allclose(again[batch.mask], agent.values(states), atol=1e-3)
    for row in rows:
        length, answer = batch.lengths[row], batch.tokens[row].tolist()
        assert STOP not in answer[: length - 1] and (answer[length - 1] == STOP) == batch.stopped[row].item()
        assert batch.stopped[row] or length == 6
        alone = next_token_probs(agent, PROMPTS[row] + answer[: length - 1])[answer[length - 1]]
        assert batch.logprobs[row, length - 1].exp().item() == pytest.approx(alone.item(), abs=1e-5)


def test_the_reference_is_the_model_without_its_adapter():
    agent, untouched = stirred(toy_agent()), toy_agent()
    batch = agent.rollout(PROMPTS, max_new_tokens=6)
    with torch.no_grad():
        expected = untouched.logprobs(untouched.states(batch, list(range(16))), batch.tokens[batch.mask])
    reference = agent.look_again(batch, "reference", token_budget=20)
    assert torch.allclose(reference[batch.mask], expected, atol=1e-5)
    assert (reference - batch.logprobs)[batch.mask].abs().max() > 0.1, "and the policy is another"


def test_rollouts_follow_the_models_distribution():
    agent = stirred(toy_agent(temperature=1.3))
    torch.manual_seed(0)
    drawn = agent.rollout([[2, 3]] * 8000, max_new_tokens=1).tokens[:, 0]
    shares = torch.bincount(drawn, minlength=VOCABULARY) / 8000
    assert (shares - next_token_probs(agent, [2, 3])).abs().max() < 0.02


@pytest.mark.parametrize("value_body", ["shared", "own"])
def test_micro_batches_change_nothing(value_body):
    after = []
    for token_budget in (10, 10_000):
        agent = stirred(toy_agent(value_body))
        torch.manual_seed(0)
        batch = agent.rollout(PROMPTS, max_new_tokens=6)
        optimizer = torch.optim.SGD([*agent.policy.values(), *agent.value.values()], lr=0.1)
        settings = ppo.Settings(micro_tokens=token_budget, epochs=1, minibatches=2)
        torch.manual_seed(1)
        update.update(
            agent,
            optimizer,
            batch,
            update.whiten(torch.randn_like(batch.values), batch.mask),
            batch.values + 1,
            settings,
        )
        after.append({**agent.policy, **agent.value})
    for name, parameter in after[0].items():
        assert torch.allclose(parameter, after[1][name], atol=1e-5), name


def test_passes_end_where_the_policy_has_moved_too_far():
    agent = toy_agent()
    batch = agent.rollout(PROMPTS, max_new_tokens=4)
    optimizer = torch.optim.AdamW([*agent.policy.values(), *agent.value.values()], lr=0.1)
    advantages = update.whiten(torch.randn_like(batch.values), batch.mask)
    learned = update.update(agent, optimizer, batch, advantages, batch.values, ppo.Settings(epochs=50, stop_kl=0.02))
    assert learned["update_kl"] > 0.02 and learned["updates"] < 20


def learn(agent: ActorCritic, reward, length: int, beta: float, steps: int, lr: float = 0.02) -> list[dict]:
    """Stage 51's step on answers of at most `length` tokens to one prompt; `reward` takes the answer's token ids."""
    settings = ppo.Settings(stop_kl=0.0, epochs=2, minibatches=2, value_coef=0.5)
    optimizer = torch.optim.AdamW([*agent.policy.values(), *agent.value.values()], lr=lr, weight_decay=0.0)
    log = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = agent.rollout([[2, 3]] * 128, length)
        scores = torch.tensor(
            [reward(tuple(row[:end])) for row, end in zip(batch.tokens.tolist(), batch.lengths, strict=True)]
        )
        reference = agent.look_again(batch, "reference", 4096)
        if agent.own:
            batch.values = agent.look_again(batch, "value", 4096)
        rewards = update.token_rewards(scores, -beta * update.kl_estimate(batch.logprobs, reference), batch.mask)
        advantages, returns = update.gae(rewards, batch.values, batch.mask, 1.0, 0.95)
        learned = update.update(agent, optimizer, batch, update.whiten(advantages, batch.mask), returns, settings)
        explained = update.explained_variance(batch.values[batch.mask], returns[batch.mask])
        log.append({"reward": scores.mean().item(), "explained_variance": explained, **learned})
    return log


@pytest.mark.parametrize("value_body", ["shared", "own"])
def test_a_policy_learns_the_rewarded_token(value_body):
    agent = toy_agent(value_body, spread=0.5)  # with smaller embeddings no hidden state makes one token that likely
    rare = 6
    before = next_token_probs(agent, [2, 3])[rare].item()
    log = learn(agent, lambda answer: float(answer[0] == rare), length=1, beta=0.0, steps=30, lr=0.04)
    assert before < 0.1 and next_token_probs(agent, [2, 3])[rare].item() > 0.95
    assert log[-1]["reward"] > 0.9


def answers_of(agent: ActorCritic) -> dict[tuple, float]:
    """Exact probability of every answer of at most two tokens to the prompt [2, 3]."""
    first = next_token_probs(agent, [2, 3])
    answers = {(STOP,): first[STOP].item()}
    for one in set(range(VOCABULARY)) - {STOP}:
        second = next_token_probs(agent, [2, 3, one])
        answers |= {(one, two): (first[one] * second[two]).item() for two in range(VOCABULARY)}
    return answers


@pytest.mark.parametrize("value_body", ["shared", "own"])
def test_with_a_kl_penalty_the_optimum_is_the_closed_form(value_body):
    """Maximising E[r] - beta KL(policy || reference) gives reference * exp(r / beta), normalised (Ziegler et al. 2019,
    section 2)."""
    agent, beta = toy_agent(value_body), 0.5
    reference = answers_of(agent)
    generator = torch.Generator().manual_seed(3)
    rewards = dict(zip(reference, torch.rand(len(reference), generator=generator).tolist(), strict=True))
    weights = {answer: share * math.exp(rewards[answer] / beta) for answer, share in reference.items()}
    optimum = {answer: weight / sum(weights.values()) for answer, weight in weights.items()}
    learn(agent, rewards.get, length=2, beta=beta, steps=60, lr=0.015)
    policy = answers_of(agent)

    def distance(p: dict, q: dict) -> float:
        return sum(abs(p[answer] - q[answer]) for answer in p) / 2

    def objective(p: dict) -> float:
        return sum(share * (rewards[a] - beta * math.log(share / reference[a])) for a, share in p.items())

    assert distance(reference, optimum) > 0.15
    assert distance(policy, optimum) < 0.05
    best, start = objective(optimum), objective(reference)
    assert (objective(policy) - start) / (best - start) > 0.95
    print(distance(reference, optimum), distance(policy, optimum), (objective(policy) - start) / (best - start))


def test_the_value_head_learns_what_to_expect():
    agent = toy_agent()
    log = learn(agent, lambda answer: float(answer[0] in (4, 5)), length=2, beta=2.0, steps=25)
    assert log[-1]["explained_variance"] > 0.3 > log[0]["explained_variance"] + 0.2


def test_the_value_head_starts_from_the_mean_reward():
    agent = toy_agent()
    batch = agent.rollout(PROMPTS, max_new_tokens=4)
    agent.expect(batch, 0.8)
    with torch.no_grad():
        values = agent.values(agent.states(batch, list(range(16))))
    assert torch.allclose(values, torch.tensor(0.8)) and torch.allclose(batch.values[batch.mask], torch.tensor(0.8))


# --- the stage through its command line


def rows_of(count: int, **meta) -> list[dict]:
    asked = [{"form": form, "themes": ["山水"]} for form in ("五言绝句", "七言绝句")] * count
    return [
        {"prompt": poems.messages(row), "meta": {"id": str(number), **row, **meta}}
        for number, row in enumerate(asked[:count])
    ]


POEM = [{"role": "assistant", "content": "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"}]
SMALL = {
    "model": ROOT / "data/tiny_qwen3",
    "rewards": ["form:1", "no_repeat:1"],
    "watch": ["all_three"],
    "max-steps": 6,
    "eval-steps": 2,
    "probe-count": 4,
    "batch-size": 8,
    "max-new-tokens": 16,
    "lora-r": 4,
    "report-to": "none",
    "dtype": "float32",
}


def words(folder, output, prompts: list[dict] | None = None, **changed) -> list[str]:
    """The command's flags, and its two files written into `folder`."""
    prompts = rows_of(20) if prompts is None else prompts
    val = [{**row, "completion": POEM} for row in rows_of(4)]
    for name, rows in (("prompts_train", prompts), ("sft_val", val)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = SMALL | {"train-file": folder / "prompts_train.jsonl", "val-file": folder / "sft_val.jsonl"}
    settings |= {"output-dir": output} | {name.replace("_", "-"): value for name, value in changed.items()}
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def log_of(folder) -> list[dict]:
    log = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    return [{k: v for k, v in entry.items() if not k.startswith("seconds")} for entry in log]


def figures_of(folder) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["figures"]


def measured_from_disk(folder, dtype: str) -> dict:
    """What the probe of stages 50 and 51 says of the adapter in `folder`, loaded anew; the settings are those of
    SMALL."""
    model_path, tokenizer = str(SMALL["model"]), load_tokenizer(str(folder))
    named = {name.replace("-", "_"): value for name, value in SMALL.items()}
    settings = ppo.Settings(
        **named | {"dtype": dtype, "rewards": tuple(named["rewards"]), "watch": tuple(named["watch"])}
    )
    val = [{**row, "completion": POEM} for row in rows_of(4)]
    probe = DriftProbe(settings, load_task("poems"), tokenizer, val)
    return probe.measure(load_model(model_path, tokenizer, dtype, str(folder)), 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    command = [sys.executable, str(SCRIPTS / "51_train_ppo.py"), *words(folder, folder / "ppo")]
    done = warm.run(command)
    assert done.returncode == 0, done.stderr
    return folder / "ppo", done.stdout


def test_a_run_logs_what_ppo_has_to_show(trained):
    folder, output = trained
    log = log_of(folder)
    assert [entry["step"] for entry in log] == list(range(7))
    for name in ("reward/form", "watch/all_three", "distinct_2", "kl", "entropy", "clip_share", "explained_variance"):
        assert all(math.isfinite(entry[name]) for entry in log[1:]), name
    assert log[1]["kl"] == pytest.approx(0, abs=1e-6) and log[6]["kl"] > 1e-5, "the first batch is the reference's own"
    assert [entry["step"] for entry in log if "probe/nll" in entry] == [0, 2, 4, 6]
    for name in ("learning_curve.png", "overoptimisation.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "python scripts/60_generate.py" in output.splitlines()[-1]


def test_the_adapter_is_the_policy_that_was_evaluated_last(trained):
    folder, _ = trained
    model = str(ROOT / "data/tiny_qwen3")
    tokenizer = load_tokenizer(str(folder))
    with torch.no_grad():
        ids = tokenizer(["白日依山尽"], return_tensors="pt")["input_ids"]
        plain = load_model(model, tokenizer, "float32")(ids).logits
        adapted = load_model(model, tokenizer, "float32", str(folder))(ids).logits
    assert (plain - adapted).abs().max() > 1e-3
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    last = (folder / "checkpoint-6/adapter_model.safetensors").read_bytes()
    assert (folder / "adapter_model.safetensors").read_bytes() == last


@pytest.mark.parametrize(("value_body", "dtype"), [("shared", "float32"), ("own", "bfloat16")])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(value_body, dtype, trained, tmp_path):
    script = str(SCRIPTS / "51_train_ppo.py")
    whole, changed = trained[0], {"value_body": value_body, "dtype": dtype}
    if value_body == "own":
        whole = tmp_path / "whole"
        assert warm.run([sys.executable, script, *words(tmp_path, whole, **changed)]).returncode == 0
    output = tmp_path / "killed"
    command = [sys.executable, script, *words(tmp_path, output, **changed)]
    start_and_kill(command, tmp_path, (output / "checkpoint-2").exists)
    assert not (output / "log_history.json").exists()
    done = warm.run(command)
    assert done.returncode == 0 and "resumed at step" in done.stdout, done.stderr
    assert log_of(whole) == log_of(output), "to the last figure"
    for folder in (whole, output):
        loaded = measured_from_disk(folder, dtype)
        recorded = {name: values[1] for name, values in figures_of(folder).items() if f"probe/{name}" in loaded}
        assert recorded == {name: loaded[f"probe/{name}"] for name in recorded} and "kl" in recorded


def test_past_the_kl_budget_the_last_checkpoint_is_kept(run_stage, tmp_path):
    done = run_stage("51_train_ppo.py", *words(tmp_path, tmp_path / "ppo", kl_budget=1e-6, lr=0.01))
    assert "over its budget of 1e-06; the adapter is that of checkpoint-0" in done.stdout
    assert "warning: that is the untrained one; fix: a lower --lr" in done.stdout
    assert "budget of 1e-06" in figures_of(tmp_path / "ppo")["stopped_by"]
    assert figures_of(tmp_path / "ppo")["steps"] == 2


def test_it_says_that_the_policy_has_unlearned_the_answers(run_stage, tmp_path):
    done = run_stage("51_train_ppo.py", *words(tmp_path, tmp_path / "ppo", lr=0.3, max_steps=3))
    assert "has unlearned the rest; fix: a lower --lr" in done.stdout


def test_prompts_without_room_and_answers_without_a_judgement_are_counted(run_stage, tmp_path):
    prompts = rows_of(20)
    prompts[3]["prompt"][0]["content"] = "诗" * 84  # between the two limits
    for row in prompts[::2]:
        row["meta"]["themes"] = []  # the theme reward has nothing to say of these
    changed = {"max_length": 100, "rewards": ["theme:1", "form:1"], "max_steps": 1, "batch_size": 19}
    done = run_stage("51_train_ppo.py", *words(tmp_path, tmp_path / "ppo", prompts, **changed))
    assert "1 prompts of more than 84 tokens leave no room" in done.stdout
    assert log_of(tmp_path / "ppo")[1]["unjudged"] == 10


def test_a_probe_that_no_reward_can_judge_is_a_dash(run_stage, tmp_path):
    flags = words(tmp_path, tmp_path / "ppo", rewards=["theme:1"], max_steps=1, eval_steps=1)
    val = [{**row, "completion": POEM} for row in rows_of(4, themes=[])]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in val]
    (tmp_path / "sft_val.jsonl").write_text("".join(lines), encoding="utf-8")
    done = run_stage("51_train_ppo.py", *flags)
    assert "probe: reward – kl" in done.stdout
    assert figures_of(tmp_path / "ppo")["reward"] == [None, None]
    assert (tmp_path / "ppo/overoptimisation.png").stat().st_size > 5000


BAD = {
    "nothing to judge": ({"prompts": rows_of(4, themes=[]), "rewards": ["theme:1"]}, "no answer could be judged"),
    "no such reward": ({"rewards": ["rime:1"]}, "unknown reward 'rime'"),
    "context": ({"max_length": 4096}, "the model reads 2048 tokens"),
    "temperature": ({"temperature": 0}, "--temperature 0.0"),
    "no room": ({"max_length": 60, "max_new_tokens": 50}, "no prompt leaves room"),
    "another kind of file": ({"train_file": ROOT / "README.md"}, "README.md"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, tmp_path):
    changed, message = BAD[name]
    flags = words(tmp_path, tmp_path / "ppo", **changed)
    with pytest.raises(UserError, match=re.escape(message)):
        ppo.main(read_settings(ppo.Settings, flags))
    assert (tmp_path / "ppo").exists() == (name == "nothing to judge"), "all else is seen before the run begins"


def test_a_run_that_blows_up_stops_at_once_and_keeps_what_was_good(tmp_path):
    flags = words(tmp_path, tmp_path / "ppo", lr=1e25, eval_steps=1, dtype="bfloat16")
    with pytest.raises(UserError, match=r"step [12]: .* is (nan|inf|-inf); the checkpoints .*fix: a lower --lr"):
        ppo.main(read_settings(ppo.Settings, flags))
    assert [path.name for path in (tmp_path / "ppo").glob("checkpoint-*")] == ["checkpoint-0"]


def test_a_checkpoint_with_a_weight_that_is_no_number_is_passed_over(trained, capsys):
    """Poisoned on disk: the run goes back to the checkpoint before, and comes to the undisturbed end."""
    whole, _ = trained
    flags = words(whole.parent, whole.parent / "poisoned")
    output = Path(shutil.copytree(whole, whole.parent / "poisoned"))
    for name in ("adapter_model.safetensors", "log_history.json"):
        (output / name).unlink()
    record = json.loads((output / "run.json").read_text(encoding="utf-8")) | {"status": "running", "figures": {}}
    record["settings"]["output_dir"] = str(output)
    (output / "run.json").write_text(json.dumps(record), encoding="utf-8")
    weights = load_file(output / "checkpoint-6" / "value.safetensors")
    weights["value_head.weight"][0, 0] = math.nan
    save_file(weights, output / "checkpoint-6" / "value.safetensors")
    ppo.main(read_settings(ppo.Settings, flags))
    said = capsys.readouterr().out
    assert "checkpoint-6 holds weights that are no finite numbers" in said and "resumed at step 4" in said
    assert log_of(output) == log_of(whole)


def test_a_bad_input_ends_the_command_with_one_line(run_stage, tmp_path):
    flags = words(tmp_path, tmp_path / "ppo", rows_of(4, form="七言排律"))
    done = run_stage("51_train_ppo.py", *flags, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path / 'prompts_train.jsonl'}:1: reward form: ValueError"
    )
