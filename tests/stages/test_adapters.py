"""Variants of LoRA, modules trained whole, quantised bases, all weights: what is saved was trained, and it merges."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.training import options
from conftest import ROOT

BASE = str(ROOT / "data" / "tiny_qwen3")
VARIANTS = {name: {"lora_variant": name} for name in ("lora", "dora", "rslora", "pissa")}
VARIANTS["embeddings"] = {"modules_to_save": ("embed_tokens",)}
VARIANTS["all-linear"] = {"lora_targets": ("all-linear",)}


@dataclass
class Settings(options.TrainerSettings):
    lora_r: int = 4
    lora_alpha: int = 8
    lr: float = 1e-3
    dtype: str = "float32"
    output_dir: Path = Path()


@pytest.fixture(scope="module")
def tokenizer():
    from common.models import load_tokenizer

    return load_tokenizer(BASE)


IDS = torch.randint(10, 8000, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(settings, tokenizer):
    """A trainer of whom only the model counts, its adapter moved away from where it began, saved in output_dir."""
    from common.training import arguments

    torch.manual_seed(0)
    model = arguments.load_trained(settings, BASE, tokenizer)
    model = arguments.with_adapter(model, arguments.lora_config(settings, BASE), settings)
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        args=SimpleNamespace(process_index=0, world_size=1),
        save_model=lambda folder: model.save_pretrained(folder),
    )
    arguments.prepare_weights(trainer, settings)
    start = logits(model)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.02 * torch.randn_like(value)
    arguments.save_trained(trainer, settings)
    return model, start


@pytest.mark.parametrize("name", VARIANTS)
def test_the_saved_adapter_is_the_trained_one_and_merges(name, tokenizer, tmp_path):
    from common.merging import certificate, faults, text_logits
    from common.models import load_model

    settings = Settings(output_dir=tmp_path / "adapter", **VARIANTS[name])
    model, start = trained(settings, tokenizer)
    assert (start - logits(load_model(BASE, tokenizer, "float32"))).abs().max() < 2e-3, "training starts from the base"
    adapted = load_model(BASE, tokenizer, "float32", str(settings.output_dir))
    assert (logits(model) - start).abs().max() > 0.1, "the adapter changes something"
    assert (logits(model) - logits(adapted)).abs().max() < 2e-3
    assert not (settings.output_dir / "pissa_start").exists()

    merged_folder = tmp_path / "merged"
    opened = load_model(BASE, tokenizer, "float32", str(settings.output_dir))
    opened.merge_and_unload(safe_merge=True).save_pretrained(merged_folder)
    tokenizer.save_pretrained(merged_folder)
    merged = load_model(str(merged_folder), tokenizer, "float32")
    assert (logits(merged) - logits(adapted)).abs().max() < 2e-3

    def compared(model, text: str):
        return text_logits(model, tokenizer, text)

    texts = ["床前明月光，疑是地上霜。"]
    report = certificate(adapted, merged, None, compared, texts, "float32")
    assert report["weights"]["wrong"] == 0 and not faults(report), report
    with torch.no_grad():  # a fault that logits would hardly show
        merged.model.layers[1].mlp.up_proj.weight[3, :8] += 1e-4
    report = certificate(adapted, merged, None, compared, texts, "float32")
    assert report["weights"]["wrong"] == 8 and "weights are not those of base + adapter" in faults(report)[0]


@pytest.mark.parametrize("quantize, share", [("4bit", 0.27), ("8bit", 0.51)])
def test_a_quantised_base_takes_the_memory_that_it_should(quantize, share, tokenizer):
    from common.models import load_model

    def linear_bytes(model) -> int:
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        weights = {layer.weight.data_ptr(): layer.weight for layer in layers if layer is not model.lm_head}
        return sum(weight.numel() * weight.element_size() for weight in weights.values())

    plain, small = (load_model(BASE, tokenizer, "bfloat16", quantize=kind) for kind in ("none", quantize))
    assert linear_bytes(small) <= share * linear_bytes(plain)
    verse = tokenizer("床前明月光，疑是地上霜。", return_tensors="pt").input_ids
    with torch.no_grad():
        lost, kept = (model.eval()(input_ids=verse).logits.float() for model in (small, plain))
    # .15 of the logits' spread for 4 bits, .03 for 8; a lost scale makes it 1
    assert (lost - kept).abs().mean() < 0.25 * kept.std()


def test_an_adapter_of_a_quantised_base_is_float32_and_fits_the_whole_base(tokenizer, tmp_path):
    from common.models import load_model

    settings = Settings(output_dir=tmp_path, quantize="4bit")
    model, _ = trained(settings, tokenizer)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    whole = load_model(BASE, tokenizer, "float32", str(tmp_path))
    small = load_model(BASE, tokenizer, "float32", str(tmp_path), quantize="4bit")
    assert (logits(small) - logits(model)).abs().max() < 1e-3
    assert (logits(whole) - logits(model)).abs().max() > 1e-3, "the base is another one where it is not quantised"


def test_a_module_that_is_none_is_named_with_the_nearest():
    from common.settings import UserError
    from common.training import arguments

    arguments.check_modules(("embed_tokens", "norm"), BASE)
    with pytest.raises(UserError, match="no module embed_token; fix: embed_tokens"):
        arguments.check_modules(("embed_token",), BASE)


@pytest.mark.parametrize("value_body", ["shared", "own"])
def test_ppo_with_gradient_checkpointing_has_the_same_gradient_and_computes_layers_twice(value_body, tokenizer):
    from common.models import load_model
    from common.ppo.actor_critic import ActorCritic, Rollout
    from common.training import arguments

    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = load_model(BASE, tokenizer, "float32")
        agent = ActorCritic(model, arguments.lora_config(Settings(), BASE), value_body, 1.0, checkpointing)
        seen = [0]
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.__setitem__(0, seen[0] + 1))
        ids = IDS[:, 8:]
        known = torch.zeros(2, 16)
        batch = Rollout(IDS[:, :8].tolist(), ids, torch.ones_like(ids, dtype=torch.bool), known, known, known[:, 0] > 0)
        agent.logprobs(agent.states(batch, [0, 1]), ids.flatten()).sum().backward()
        trained = [value.grad for name, value in agent.policy.items() if "lora_B" in name]
        gradients.append(torch.cat([value.flatten() for value in trained]))
        calls.append(seen[0])
        assert agent.rollout(batch.prompts, 2).tokens.shape[0] == 2, "writing keeps its cache"
    assert calls == [1, 2]
    assert torch.allclose(*gradients, atol=1e-5) and gradients[0].abs().sum() > 0


# --- all weights


def rows(folder: Path) -> Path:
    poems = (
        "床前明月光，疑是地上霜。",
        "白日依山尽，黄河入海流。",
        "千山鸟飞绝，万径人踪灭。",
        "空山新雨后，天气晚来秋。",
    )
    file = folder / "rows.jsonl"
    turns = [[{"role": "user", "content": f"写第{n}句"}] for n in range(len(poems))]
    text = [
        {"prompt": turn, "completion": [{"role": "assistant", "content": poem}], "meta": {}}
        for turn, poem in zip(turns, poems, strict=True)
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in text), encoding="utf-8")
    return file


def test_all_weights_trained_go_on_after_a_kill_and_need_no_merge(run_stage, tmp_path):
    from safetensors.torch import load_file

    from test_grpo import cut_off

    file = rows(tmp_path)
    words = ["--train-file", file, "--val-file", "None", "--lora-r", 0, "--lr", 1e-3, "--max-steps", 4]
    words += ["--eval-steps", 2]
    words += ["--batch-size", 2, "--accumulation", 1, "--probe-count", 1, "--probe-tokens", 4, "--report-to", "none"]
    folder = tmp_path / "sft"
    done = run_stage("20_train_sft.py", *words, "--output-dir", folder)
    line = r"step \d+/4: loss [\d.]+, lr [\d.e-]+, [\d,]+ tokens/s, \d+:\d\d:\d\d left, [\d.]+ GiB"
    assert len(re.findall(line, done.stdout)) == 2 and "{'loss'" not in done.stdout + done.stderr
    assert f"next: python scripts/60_generate.py --task poems --model {folder}" in done.stdout
    before = load_file(folder / "model.safetensors")
    start = load_file(f"{BASE}/model.safetensors")
    assert not any(torch.equal(value, start[name].float()) for name, value in before.items())
    cut_off(folder, "checkpoint-2")
    run_stage("20_train_sft.py", *words, "--output-dir", folder)
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    refused = run_stage("22_merge_adapter.py", "--adapter", folder, "--probe-file", file, check=False)
    assert refused.returncode == 2 and "was trained in full (--lora-r 0): nothing to merge" in refused.stderr
    written = run_stage("60_generate.py", "--model", folder, "--prompt", "写第1句", "--max-new-tokens", 4)
    assert "tokens]" in written.stdout
