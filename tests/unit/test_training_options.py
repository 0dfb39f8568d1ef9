"""Settings that cannot go together are one line, before anything is loaded."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from common.settings import UserError, refuse_clashes
from common.training import options


@dataclass
class Sft(options.ChatSettings):
    lora_r: int = 8


@dataclass
class Dpo(Sft):
    has_reference: ClassVar[bool] = True


@dataclass
class Grpo(Dpo):
    rollout: str = "hf"


@dataclass
class Generate(options.ModelSettings):
    backend: str = "hf"
    device_map: str = ""


CANNOT_BE = [
    (Sft, {"lora_r": 0, "quantize": "4bit"}, "--lora-r 0 .*--quantize 4bit is given: quantised weights cannot"),
    (Sft, {"lora_r": 0, "quantize": "8bit"}, "--quantize 8bit is given"),
    (Sft, {"lora_r": 0, "lora_variant": "dora"}, "--lora-variant dora is given: there is no adapter"),
    (Sft, {"lora_r": 0, "lora_plus_ratio": 16.0}, "--lora-plus-ratio 16.0 is given: there is no adapter"),
    (Sft, {"lora_r": 0, "lora_dropout": 0.1}, "--lora-dropout 0.1 is given: there is no adapter"),
    (Sft, {"lora_r": 0, "modules_to_save": ("norm",)}, "--modules-to-save norm is given: there is no adapter"),
    (Sft, {"lora_variant": "pissa", "quantize": "4bit"}, "--lora-variant pissa with --quantize 4bit"),
    (Sft, {"lora_variant": "dora", "quantize": "8bit"}, "--lora-variant dora with --quantize 8bit: peft 0.21 loses"),
    (Dpo, {"lora_variant": "pissa"}, "--lora-variant pissa: the reference is the base with the adapter off"),
    (Sft, {"lora_r": 0, "train_tokens": ("<s>",)}, "--lora-r 0 .*--train-tokens <s> is given"),
    (Sft, {"train_tokens": ("<s>",), "modules_to_save": ("embed_tokens",)}, "--train-tokens <s> with"),
    (Sft, {"liger": True}, "--liger: its kernels run on a GPU only"),
    (Sft, {"optim": "paged_adamw_8bit"}, "--optim paged_adamw_8bit.*there is no GPU"),
    (Sft, {"lora_plus_ratio": 0.5}, "--lora-plus-ratio 0.5: B learns faster"),
    (Sft, {"attn_implementation": "flash_attention_2"}, "flash_attention_2 needs a GPU"),
    (Generate, {"quantize": "4bit", "backend": "vllm"}, "--quantize 4bit: vLLM.*fix: --backend hf"),
    (Generate, {"device_map": "cpu9"}, "--device-map cpu9: unknown; fix: one of auto"),
    (Grpo, {"quantize": "8bit", "rollout": "vllm"}, "--quantize 8bit: vLLM.*fix: --rollout hf"),
]


@pytest.mark.parametrize("stage, settings, message", CANNOT_BE)
def test_what_cannot_be_is_one_line_that_names_the_flags(stage, settings, message, monkeypatch):
    monkeypatch.setattr(options, "has_gpu", lambda: False)
    with pytest.raises(UserError, match=message) as error:
        refuse_clashes(stage(**settings))
    assert "; fix: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["bitsandbytes", "liger_kernel", "flash_attn"])
def test_a_package_that_is_not_there_is_named(name, monkeypatch):
    monkeypatch.setattr(options, "has_gpu", lambda: True)
    monkeypatch.setattr(options, "find_spec", lambda wanted: None)
    given = {
        "bitsandbytes": {"quantize": "4bit"},
        "liger_kernel": {"liger": True},
        "flash_attn": {"attn_implementation": "flash_attention_2"},
    }
    with pytest.raises(UserError, match=name.replace("_kernel", "-kernel")):
        refuse_clashes(Sft(**given[name]))


@pytest.mark.parametrize("kind", ["--quantize", "--lora-plus-ratio"])
def test_under_fsdp_what_it_cannot_share_out_is_refused(kind, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    given = {"--quantize": {"quantize": "4bit"}, "--lora-plus-ratio": {"lora_plus_ratio": 16.0}}
    with pytest.raises(UserError, match=f"{kind}.*FSDP"):
        refuse_clashes(Sft(**given[kind]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_r": 0, "optim": "adamw_8bit"},
        {"lora_r": 0, "gradient_checkpointing": True},
        {"quantize": "4bit", "lora_variant": "dora"},
        {"quantize": "8bit", "lora_plus_ratio": 16.0},
        {"lora_variant": "pissa", "lora_plus_ratio": 4.0},
    ],
)
def test_what_can_be_passes(settings):
    refuse_clashes(Sft(**settings))
