"""Flags that change a loss change it as their papers say: one step against the formula, worked out by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, SCRIPTS

BASE = ROOT / "data" / "tiny_qwen3"
POEMS = ["床前明月光，疑是地上霜。", "白日依山尽，黄河入海流。", "千山鸟飞绝，万径人踪灭。"]


def stage(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base():
    from common.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(BASE))
    return load_model(str(BASE), tokenizer, "float32").eval(), tokenizer


# --- SFT


def train_sft(folder: Path, **settings) -> list[dict]:
    """Two steps on three rows; the log."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"写一句诗，第{number}首"}],
            "completion": [{"role": "assistant", "content": poem}],
            "meta": {},
        }
        for number, poem in enumerate(POEMS)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    module = stage("20_train_sft")
    common = {"train_file": file, "val_file": None, "output_dir": folder / "out", "model": str(BASE), "max_steps": 2}
    common |= {"batch_size": 3, "accumulation": 1, "lora_r": 4, "dtype": "float32", "eval_steps": 1, "lr": 1e-3}
    common |= {"probe_count": 0, "probe_tokens": 1, "report_to": "none", "warmup_share": 0.0, "lora_alpha": 8}
    module.main(module.Settings(**common | settings))
    return json.loads((folder / "out" / "log_history.json").read_text(encoding="utf-8"))


def answer_logps(base) -> torch.Tensor:
    """Log-probabilities of the answers' tokens and their eos under the untrained model, all rows in a line."""
    model, tokenizer = base
    found = []
    for number, poem in enumerate(POEMS):
        turns = [{"role": "user", "content": f"写一句诗，第{number}首"}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, poem)]
        ids[1].append(tokenizer.eos_token_id)
        with torch.no_grad():
            logps = model(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1)
        places = torch.arange(len(ids[0]) - 1, len(ids[0]) + len(ids[1]) - 1)
        found.append(logps[places, torch.tensor(ids[1])])
    return torch.cat(found)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_the_loss_of_sft_is_that_of_the_formula(loss, base, tmp_path):
    """dft: -p log p with p held constant (Wu et al. 2025, arXiv 2508.05629, equation 9)."""
    logps = answer_logps(base)
    expected = -(logps * logps.exp()).mean() if loss == "dft" else -logps.mean()
    first = next(entry["loss"] for entry in train_sft(tmp_path, loss=loss) if "loss" in entry)
    assert first == pytest.approx(expected.item(), abs=2e-4)


def test_neftune_adds_noise_of_the_size_of_its_paper(base, tmp_path, monkeypatch):
    """Uniform in +-alpha / sqrt(L d) (Jain et al. 2023, arXiv 2310.05914, algorithm 1), while training only."""
    import transformers

    noises, plain = [], transformers.Trainer.training_step
    table = base[0].get_input_embeddings().weight.detach()

    def training_step(self, model, inputs, *more):
        def look(module, arguments):
            noises.append((arguments[0].detach() - table[inputs["input_ids"]], inputs["input_ids"].shape[1]))

        hook = self.accelerator.unwrap_model(model).get_base_model().model.layers[0].register_forward_pre_hook(look)
        try:
            return plain(self, model, inputs, *more)
        finally:
            hook.remove()

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    train_sft(tmp_path, neftune_alpha=5.0)
    for noise, length in noises:
        bound = 5.0 / (length * table.shape[1]) ** 0.5
        assert noise.abs().max() <= bound * 1.001 and noise.abs().max() > 0.9 * bound
        assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert noises


def test_the_figures_and_samples_of_the_record_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_sft(tmp_path, report_to="tensorboard", probe_count=1, probe_tokens=6)
    figures = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["figures"]
    numbers, texts = {}, {}
    for file in (tmp_path / "out" / "runs").rglob("events.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        numbers |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        texts |= {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    known = [name for name, value in figures.items() if type(value) in (int, float)]
    assert {"stopped", "steps", "train_loss"} <= set(known)
    assert all(numbers[f"eval/final_{name}"] == pytest.approx(figures[name], rel=1e-5) for name in known)
    assert "train/loss" in numbers
    assert texts["eval/final_samples/text_summary"] == "\n\n".join(figures["samples"])


@pytest.mark.parametrize("optim", ["auto", "adamw_8bit"])
def test_lora_plus_gives_b_its_own_rate(optim, tmp_path, monkeypatch):
    """The rate of B is ratio times that of A (Hayou et al. 2024, arXiv 2402.12354, section 4)."""
    from common.training import arguments

    seen, plain = [], arguments.save_trained
    monkeypatch.setattr(
        arguments, "save_trained", lambda trainer, settings: (seen.append(trainer), plain(trainer, settings))
    )
    train_sft(tmp_path, lora_plus_ratio=16.0, optim=optim)
    optimizer = getattr(seen[0].optimizer, "optimizer", seen[0].optimizer)
    bits = optimizer.args.optim_bits if type(optimizer).__module__.startswith("bitsandbytes") else 32
    assert bits == (8 if optim == "adamw_8bit" else 32)
    names = {parameter: name for name, parameter in seen[0].model.named_parameters()}
    rates = {
        kind: {group["initial_lr"] for group in optimizer.param_groups for p in group["params"] if kind in names[p]}
        for kind in ("lora_A", "lora_B")
    }
    assert rates == {"lora_A": {1e-3}, "lora_B": {16e-3}}


# --- DPO, SimPO, ORPO

PAIRS = [
    ("床前明月光，疑是地上霜。", "床前月。"),
    ("白日依山尽。", "白日依山尽，河入海流。"),
    ("千山鸟飞绝。", "千山鸟。"),
]
BETA, SMOOTHING, GAMMA = 2.0, 0.2, 0.4


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """A trainer for losses with a reference and one for those without, and a batch of three pairs; the adapters have
    moved away from the reference."""
    from peft import LoraConfig
    from trl import DPOConfig

    from common.models import chat_dataset, load_model, load_tokenizer
    from common.training.trl_cpu import LeanDPOTrainer, ReferenceFreeTrainer

    rows = [
        {
            "prompt": [{"role": "user", "content": f"写一句诗，第{number}首"}],
            **{
                side: [{"role": "assistant", "content": text}]
                for side, text in zip(("chosen", "rejected"), pair, strict=True)
            },
            "meta": {},
        }
        for number, pair in enumerate(PAIRS)
    ]
    tokenizer, trainers = load_tokenizer(str(BASE)), []
    words = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "beta": BETA}
    for kind, more in ((LeanDPOTrainer, {}), (ReferenceFreeTrainer, {"gamma": GAMMA})):
        trainer = kind(
            model=load_model(str(BASE), tokenizer, "float32"),
            args=DPOConfig(output_dir=str(tmp_path_factory.mktemp("dpo")), label_smoothing=SMOOTHING, **words),
            train_dataset=chat_dataset(rows, ("prompt", "chosen", "rejected"), False),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            **more,
        )
        torch.manual_seed(3)
        with torch.no_grad():
            for name, value in trainer.model.named_parameters():
                if "lora_B" in name:
                    value += 0.05 * torch.randn_like(value)
        trainers.append(trainer)
    return *trainers, next(iter(trainers[0].get_train_dataloader()))


def answer_figures(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, tokens) [answers]: the chosen ones, then the rejected ones."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    logps = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].float().log_softmax(-1)
    return (logps.gather(2, ids[:, 1:, None])[..., 0] * mask).sum(1), mask.sum(1)


def preference_loss(kind: str, logps, reference, tokens) -> torch.Tensor:
    """The formula of each paper on log-probabilities of whole answers."""
    log, sigmoid, b, e = torch.log, torch.sigmoid, BETA, SMOOTHING
    (w, r), (n_w, n_r) = (logps - reference).chunk(2), tokens.chunk(2)  # log-ratios of chosen and rejected answers
    (p_w, p_r), m = (logps / tokens).chunk(2), b * (w - r)
    nll = -(p_w * n_w).sum() / n_w.sum()
    odds_w, odds_r = (p.exp() / (1 - p.exp()) for p in (p_w, p_r))
    sorted_m = b * ((logps[:3] - logps[3:]).sort()[0] - (reference[:3] - reference[3:]).sort()[0])
    unpaired_m = b * (w.sort()[0] - r.sort()[0])
    smoothed = {"aot": sorted_m, "aot_unpaired": unpaired_m}.get(kind, m)
    right, wrong = -log(sigmoid(smoothed)), -log(sigmoid(-smoothed))
    mixed = sigmoid(m / 0.05)
    return {
        "sigmoid": -log(sigmoid(m)),  # arXiv 2305.18290, equation 7
        "sigmoid_norm": -log(sigmoid(b * (w / n_w - r / n_r))),  # the same of log-ratios a token
        "hinge": (1 - m).clamp(min=0),  # arXiv 2309.06657, section 3.1
        "ipo": (w / n_w - r / n_r - 1 / (2 * b)) ** 2,  # arXiv 2310.12036, equation 17, a token
        "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e),  # arXiv 2403.00409, equation 12
        "exo_pair": sigmoid(m) * log(sigmoid(m) / (1 - e)) + sigmoid(-m) * log(sigmoid(-m) / e),  # 2402.00856, 16
        "nca_pair": -log(sigmoid(b * w)) - 0.5 * (log(sigmoid(-b * w)) + log(sigmoid(-b * r))),  # arXiv 2402.05369
        "bco_pair": -log(sigmoid(b * w)) - log(sigmoid(-b * r)),  # arXiv 2404.04656, without the shift
        "sppo_hard": (w - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,  # arXiv 2405.00675, equation 4.7
        "aot": (1 - e) * right + e * wrong,  # arXiv 2406.05882
        "aot_unpaired": (1 - e) * right + e * wrong,
        "apo_zero": 1 - sigmoid(b * w) + sigmoid(b * r),  # arXiv 2408.06266, equation 7
        "apo_down": sigmoid(b * w) + 1 - sigmoid(m),  # the same, equation 8
        "discopop": (1 - mixed) * -log(sigmoid(m)) + mixed * (-m).exp(),  # arXiv 2406.08414, equation 5
        "sft": nll,
        "simpo": -log(sigmoid(b * p_w - b * p_r - GAMMA)),  # arXiv 2405.14734, equation 6
        "orpo": nll - b * log(sigmoid(log(odds_w / odds_r))),  # arXiv 2403.07691, equations 6 and 7; b is its lambda
    }[kind].mean()


DPO = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot"]
DPO += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "simpo", "orpo"]


@pytest.mark.parametrize("kind", DPO)
def test_the_loss_of_pairs_and_its_gradient_are_those_of_the_formula(kind, preferences):
    with_reference, without, batch = preferences
    trainer = without if kind in ("simpo", "orpo") else with_reference
    trainer.loss_types, trainer.loss_weights = [kind], [1.0]
    model = trainer.model
    trained = [value for name, value in model.named_parameters() if "lora_B" in name]
    passes, hook = [], model.register_forward_pre_hook(lambda *_: passes.append(1))
    losses, gradients = [], []
    for by_formula in (False, True):
        model.zero_grad()
        if by_formula:
            with torch.no_grad(), model.disable_adapter():
                reference = answer_figures(model, batch)[0]
            logps, tokens = answer_figures(model, batch)
            losses.append(preference_loss(kind, logps, reference, tokens))
        else:
            losses.append(trainer._compute_loss(model, dict(batch), False))
            assert len(passes) == (1 if trainer is without else 2), "the reference is a pass of its own"
        losses[-1].backward()
        gradients.append(torch.cat([value.grad.flatten().clone() for value in trained]))
    hook.remove()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4, abs=1e-4)
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[1].norm()


def test_every_loss_of_stage_40_is_tested_against_its_formula():
    from typing import get_args

    assert set(get_args(stage("40_train_dpo").LossType)) == set(DPO)


def test_a_loss_without_reference_is_told_of_its_beta_and_may_have_pissa(capsys):
    from common.settings import UserError, refuse_clashes

    module = stage("40_train_dpo")
    settings = module.Settings(loss_types=("simpo",), lora_variant="pissa", model="checkpoints/nowhere")
    refuse_clashes(settings)
    with pytest.raises(UserError, match="no such model folder"):
        module.main(settings)
    assert "--beta 0.1 is meant for dpo" in capsys.readouterr().out


# --- GRPO


@pytest.fixture(scope="module")
def rollout(base):
    """Four answers whose probabilities have moved since they were written, and what each is worth."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 8000, (4, 11), generator=generator)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 4:], mask[3, 5:] = 0, 0
    batch = {
        "prompt_ids": ids[:, :5],
        "prompt_mask": torch.ones(4, 5, dtype=torch.long),
        "completion_ids": ids[:, 5:],
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5, -2.0]),
        "num_items_in_batch": mask.sum(),
    }
    with torch.no_grad():
        logps = policy(base[0], batch)[0]
    return batch | {"old_per_token_logps": logps - 0.6 * torch.randn(4, 6, generator=generator)}


def policy(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies) [answers, tokens] of the answers' tokens."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logps = model(input_ids=ids, attention_mask=mask).logits[:, 4:-1].float().log_softmax(-1)
    return logps.gather(2, batch["completion_ids"][..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def by_hand(model, batch, kind: str) -> torch.Tensor:
    logps, entropies = policy(model, batch)
    mask, advantages = batch["completion_mask"].float(), batch["advantages"][:, None]
    log_ratio = logps - batch["old_per_token_logps"]
    ratio, tokens = log_ratio.exp(), mask.sum()
    if kind == "gspo":  # arXiv 2507.18071, equations 5 and 7
        ratio = ((log_ratio * mask).sum(1) / mask.sum(1)).exp()[:, None]
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    if kind == "cispo":  # arXiv 2506.13585, equations 4 and 5, with a bound above only
        return -(ratio.clamp(max=1.5).detach() * advantages * logps * mask).sum() / tokens
    high = 1.28 if kind == "clip_high" else 1.2  # arXiv 2503.14476, equation 10
    loss = -(torch.minimum(ratio * advantages, ratio.clamp(0.8, high) * advantages) * mask).sum() / tokens
    if kind == "entropy":
        loss = loss - 0.1 * (entropies * mask).sum() / tokens
    return loss


GRPO = {
    "dapo": {},
    "clip_high": {"clip_high": 0.28},
    "gspo": {"ratio": "sequence", "loss_type": "grpo"},
    "cispo": {"loss_type": "cispo", "clip_high": 1.5},
    "entropy": {"entropy_bonus": 0.1},
}


def grpo_trainer(folder: Path, **settings):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig

    from common.models import load_model, load_tokenizer
    from common.training.trl_cpu import LeanGRPOTrainer

    module = stage("50_train_grpo")
    tokenizer = load_tokenizer(str(BASE))
    config = GRPOConfig(
        **module.loss_arguments(module.Settings(beta=0.0, **settings)),
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
    )
    torch.manual_seed(1)
    return LeanGRPOTrainer(
        model=load_model(str(BASE), tokenizer, "float32"),
        args=config,
        reward_funcs=[lambda completions, **_: [float(number) for number in range(len(completions))]],
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "写诗"}]}] * 4),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


@pytest.mark.parametrize("kind", GRPO)
def test_the_loss_of_grpo_and_its_gradient_are_those_of_the_formula(kind, rollout, tmp_path):
    trainer = grpo_trainer(tmp_path, **GRPO[kind])
    trainer.current_gradient_accumulation_steps = 1
    trained = {name: value for name, value in trainer.model.named_parameters() if "lora_B" in name}
    losses, gradients = [], []
    for loss in (
        lambda: trainer._compute_loss(trainer.model, dict(rollout)),
        lambda: by_hand(trainer.model, rollout, kind),
    ):
        trainer.model.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        gradients.append(torch.cat([value.grad.flatten().clone() for value in trained.values()]))
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-4)
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


def test_the_kinds_of_loss_differ_on_the_same_answers(rollout, base):
    with torch.no_grad():
        values = [by_hand(base[0], rollout, kind).item() for kind in GRPO]
    assert len({round(value, 4) for value in values}) == len(GRPO)


@pytest.mark.parametrize("masked", [False, True])
def test_answers_that_were_cut_teach_nothing_where_they_are_masked(masked, tmp_path):
    trainer = grpo_trainer(tmp_path, mask_truncated=masked)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": "写诗"}]}] * 8)
    stopped = (batch["completion_ids"] == trainer._tokenizer.eos_token_id).any(1)
    counted = batch["completion_mask"].sum(1) > 0
    assert not stopped.all()
    assert counted.tolist() == (stopped.tolist() if masked else [True] * 8)


def test_the_bound_of_cispo_is_5_unless_named():
    module = stage("50_train_grpo")
    assert module.loss_arguments(module.Settings(loss_type="cispo"))["epsilon_high"] == 5.0


def test_a_run_has_one_name_in_trackers_before_and_after_a_kill(tmp_path):
    from types import SimpleNamespace

    from common.training import arguments

    callbacks = SimpleNamespace(callbacks=[])
    trainer = SimpleNamespace(args=SimpleNamespace(run_name=None), callback_handler=callbacks)
    run = SimpleNamespace(record={"started": "2026-11-26T09:30:32+00:00"}, is_main=True)
    arguments.name_in_trackers(trainer, SimpleNamespace(output_dir=tmp_path / "sft"), run)
    assert trainer.args.run_name == "sft-2026-11-26T09-30-32"
