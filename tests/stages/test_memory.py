"""A vocabulary of 262,144 words never has the logits of all places in memory at once: 1 MiB a place in float32, and
several copies of it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.generation import sample
from common.jsonl import write_jsonl
from common.likelihood import mean_nll
from common.models import load_model, load_tokenizer
from common.training.probes import kl_to_reference
from conftest import ROOT
from tasks.weibo import human_comments
from test_sft_ways import stage

BASE = ROOT / "data" / "tiny_qwen3"
WORDS = 262_144
ALLOWED = 0.4  # GiB that the process may grow: the logits of 400 places, in one copy
ANSWERS = [  # each of 120 characters and about as many tokens
    "".join(human_comments(held_out=False))[start : start + 120] for start in range(0, 20 * 120, 120)
]
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"第{number}问"}],
        "completion": [{"role": "assistant", "content": answer}],
        "meta": {},
    }
    for number, answer in enumerate(ANSWERS)
]
CLEAR = Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(not CLEAR.exists(), reason="the peak of a process is reset on Linux only")


def memory(name: str) -> float:
    """GiB of this process: VmRSS now, VmHWM at its highest since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def grown(work) -> float:
    """GiB that the process grows by at its highest while `work` runs."""
    CLEAR.write_text("5", encoding="utf-8")
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A narrow model with random weights, and the embedded base's tokenizer."""
    folder = tmp_path_factory.mktemp("large")
    tokenizer = load_tokenizer(str(BASE))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.from_pretrained(BASE)
    config.update(
        sizes | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": WORDS, "layer_types": ["full_attention"]}
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(large):
    tokenizer = load_tokenizer(str(large))
    return load_model(str(large), tokenizer, "float32"), tokenizer


def test_likelihood_of_a_base_as_it_loads(loaded):
    """Its weights have requires_grad, and no gradient is wanted."""
    model, tokenizer = loaded
    assert model.get_output_embeddings().weight.requires_grad
    assert grown(lambda: mean_nll(model, tokenizer, ROWS[:10])) < ALLOWED


def test_a_frozen_head_is_not_copied_for_each_sample(large):
    """As it is beside an adapter: 20 prompts, whose last places are a slice. In bfloat16 each copy has 32 MiB."""
    tokenizer = load_tokenizer(str(large))
    model = load_model(str(large), tokenizer, "bfloat16").requires_grad_(False)
    texts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in ROWS]
    words = {"max_new_tokens": 2, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    assert grown(lambda: list(sample(model, tokenizer, texts, **words))) < ALLOWED


def test_divergence_from_the_reference(loaded):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    try:
        answers = ["".join(ANSWERS[:4])] * 2
        assert grown(lambda: kl_to_reference(adapted, tokenizer, ROWS[:2], answers, False)) < ALLOWED
    finally:
        adapted.unload()


@pytest.mark.parametrize("name", ["20_train_sft", "21_train_sft_plain"])
def test_a_training_with_its_evaluations_and_probes(name, large, tmp_path):
    files = {}
    for key, rows in (("train_file", ROWS[:10]), ("val_file", ROWS[10:])):
        files[key] = tmp_path / f"{key}.jsonl"
        write_jsonl(files[key], rows)
    module = stage(name)
    words = {"task": "chat", "model": str(large), "output_dir": tmp_path / "out", "dtype": "float32", **files}
    words |= {"max_steps": 2, "batch_size": 10, "accumulation": 1, "eval_steps": 2, "lora_r": 2}
    words |= {"probe_count": 8, "probe_tokens": 4}
    if name == "20_train_sft":
        words["report_to"] = "none"
    assert grown(lambda: module.main(module.Settings(**words))) < ALLOWED
