"""Settings that the stages share about adapters, memory and the optimizer, and which of them cannot go together.

A stage inherits one of these classes; its own settings stay at its top and come first in `--help`. `clashes` is asked
as soon as the flags are read: what cannot be is told before anything is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal

from common.settings import unused

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
UNREAD = {
    "--rollout hf": ("vllm_mode", "vllm_memory_share", "vllm_server_url"),
    "--vllm-mode colocate": ("vllm_server_url",),
    "--vllm-mode server": ("vllm_memory_share",),
}


@dataclass
class ModelSettings:
    """How weights are loaded: stages that only read a model."""

    quantize: Literal["none", "4bit", "8bit"] = "none"
    """linear layers of the base in bitsandbytes' nf4 or int8; a quarter or half the memory, slower"""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """attention of transformers; auto = its own choice, on a CPU products over groups of heads"""

    def clashes(self) -> Iterator[tuple[str, str]]:
        """(what cannot be, how to fix it)"""
        vllm = next((name for name in ("backend", "rollout") if getattr(self, name, "hf") == "vllm"), "")
        if self.quantize != "none":
            flag = f"--quantize {self.quantize}"
            if find_spec("bitsandbytes") is None:
                yield f"{flag}: the package bitsandbytes is not installed", "pip install -r requirements.txt"
            if vllm:
                yield f"{flag}: vLLM would load the whole base beside the quantised one", f"--{vllm} hf"
            if os.environ.get("ACCELERATE_USE_FSDP") == "true":
                yield f"{flag}: FSDP cannot share out quantised weights", "a launch file with DDP or ZeRO-2"
        if (placed := getattr(self, "device_map", "")) not in ("", *DEVICE_MAPS):
            yield f"--device-map {placed}: unknown", f"one of {', '.join(DEVICE_MAPS)}, or leave it out"
        if hasattr(self, "rollout"):  # stage 50
            mode = "--rollout hf" if self.rollout == "hf" else f"--vllm-mode {self.vllm_mode}"
            yield from unused(self, f"with {mode}", *UNREAD[mode])
            if vllm and find_spec("vllm") is None:
                yield "--rollout vllm: vllm is not installed", "pip install -r requirements-vllm.txt, or --rollout hf"
            if vllm and not has_gpu():
                yield "--rollout vllm: trl takes a GPU for it, and there is none", "--rollout hf"
        if self.attn_implementation == "flash_attention_2":
            if not has_gpu():
                yield "--attn-implementation flash_attention_2 needs a GPU", "--attn-implementation sdpa"
            if find_spec("flash_attn") is None:
                yield "--attn-implementation flash_attention_2: flash_attn is not installed", "pip install flash-attn"


@dataclass
class AdapterSettings(ModelSettings):
    """Stages that train an adapter on a base."""

    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """layers adapted, by the last part of their names, or all-linear"""
    lora_variant: Literal["lora", "dora", "rslora", "pissa"] = "lora"
    """dora: direction and length apart; rslora: alpha / sqrt(r); pissa: starts from the base's singular vectors"""
    modules_to_save: tuple[str, ...] = ()
    """modules trained whole beside the adapter, by the last part of their names, such as embed_tokens"""
    gradient_checkpointing: bool = False
    """saves memory, costs about a third of the speed"""

    has_reference: ClassVar[bool] = False  # the algorithm compares with the base, the adapter switched off

    def clashes(self) -> Iterator[tuple[str, str]]:
        yield from super().clashes()
        if self.lora_r == 0:
            yield from unused(self, "with --lora-r 0, which trains all weights", "lora_alpha", "lora_targets")
            given = {
                f"--quantize {self.quantize}": self.quantize != "none",
                f"--lora-variant {self.lora_variant}": self.lora_variant != "lora",
                f"--lora-dropout {getattr(self, 'lora_dropout', 0)}": getattr(self, "lora_dropout", 0) > 0,
                f"--lora-plus-ratio {getattr(self, 'lora_plus_ratio', 0)}": getattr(self, "lora_plus_ratio", 0) > 0,
                f"--modules-to-save {' '.join(self.modules_to_save)}": bool(self.modules_to_save),
            }
            for flag in (flag for flag, is_given in given.items() if is_given):
                why = "quantised weights cannot be trained" if "quantize" in flag else "there is no adapter then"
                yield f"--lora-r 0 trains all weights, and {flag} is given: {why}", f"a rank, or without {flag}"
        if self.quantize != "none" and (whole := [word for word in self.modules_to_save if word in self.lora_targets]):
            what = f"--modules-to-save {' '.join(whole)} with --quantize {self.quantize}: quantised weights cannot be"
            yield f"{what} trained", "without them: their adapter is trained"
        if self.lora_variant == "dora" and self.quantize == "8bit":
            what = "peft 0.21 loses the scale of 8-bit weights after the first pass"
            yield f"--lora-variant dora with --quantize 8bit: {what}", "--quantize 4bit, or --lora-variant lora"
        if self.lora_variant == "pissa":
            if self.quantize != "none":
                yield (
                    f"--lora-variant pissa with --quantize {self.quantize}: it takes singular vectors out of the base, "
                    "and quantised weights cannot be changed",
                    "--quantize none, or another variant",
                )
            if self.has_reference:
                yield (
                    "--lora-variant pissa: the reference is the base with the adapter off, and pissa moves a part of "
                    "the base into the adapter",
                    "--lora-variant lora, dora or rslora",
                )


@dataclass
class TrainerSettings(AdapterSettings):
    """Stages that train with transformers' or trl's Trainer."""

    lora_dropout: float = 0.0
    """on the input of the update"""
    lora_plus_ratio: float = 0.0
    """LoRA+: the rate of B is so many times that of A (16 is usual); 0 = one rate"""
    optim: Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor"] = "auto"
    """optimizer; auto = transformers' AdamW, 8bit = bitsandbytes' with a quarter of the state"""
    liger: bool = False
    """Liger's kernels for norms, rotary positions and activations; a GPU only"""

    def clashes(self) -> Iterator[tuple[str, str]]:
        yield from super().clashes()
        if getattr(self, "val_file", "") is None and getattr(self, "patience", 0):
            yield from unused(self, "with --val-file None", "patience")
        if self.liger:
            if not has_gpu():
                yield "--liger: its kernels run on a GPU only, and there is none", "without --liger"
            if find_spec("liger_kernel") is None:
                yield "--liger: the package liger-kernel is not installed", "pip install liger-kernel"
        if self.optim.endswith("8bit"):
            if find_spec("bitsandbytes") is None:
                yield (
                    f"--optim {self.optim}: the package bitsandbytes is not installed",
                    "pip install -r requirements.txt",
                )
            if self.optim.startswith("paged") and not has_gpu():
                yield (
                    f"--optim {self.optim}: pages between GPU and main memory, and there is no GPU",
                    "--optim adamw_8bit",
                )
        if self.lora_plus_ratio:
            if self.lora_plus_ratio < 1:
                yield f"--lora-plus-ratio {self.lora_plus_ratio}: B learns faster than A", "1 or more, or 0 for none"
            if os.environ.get("ACCELERATE_USE_FSDP") == "true":
                yield "--lora-plus-ratio: FSDP builds the optimizer itself", "without --lora-plus-ratio"


@dataclass
class ChatSettings(TrainerSettings):
    """Stages that train a model which writes answers."""

    train_tokens: tuple[str, ...] = ("auto",)
    """tokens whose embeddings are trained too: auto = turn tokens that look untrained; none; or tokens by name"""

    def clashes(self) -> Iterator[tuple[str, str]]:
        yield from super().clashes()
        if self.train_tokens not in (("auto",), ("none",)):
            flag = f"--train-tokens {' '.join(self.train_tokens)}"
            if self.lora_r == 0:
                yield f"--lora-r 0 trains all weights, and {flag} is given", f"a rank, or without {flag}"
            if self.lora_variant == "pissa":
                yield f"{flag} with --lora-variant pissa, whose saved adapter holds no such rows", "another variant"
            if "embed_tokens" in self.modules_to_save:
                yield f"{flag} with --modules-to-save embed_tokens, which trains all of them", "one of the two"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
