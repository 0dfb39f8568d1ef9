"""An adapter with weights that are not zero on the embedded base, its merged model, rows and prompts: for tests of
stages 22, 23 and 60."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from conftest import ROOT

BASE = str(ROOT / "data/tiny_qwen3")
FORMS = ("五言绝句", "七言绝句", "五言律诗", "七言律诗")
THEMES = ("山水", "离别", "边塞", "登临", "田园", "思乡", "秋天", "明月")
POEM = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"


def rows(count: int) -> list[dict]:
    """SFT rows with prompts of several lengths."""
    asked = [f"写一首[{FORMS[i % 4]}] 主题为: {'、'.join(THEMES[i % 8 : i % 8 + 1 + i % 3])}" for i in range(count)]
    return [
        {
            "prompt": [{"role": "user", "content": text}],
            "completion": [{"role": "assistant", "content": POEM[: 12 * (1 + i % 2)]}],
            "meta": {"id": str(i), "form": FORMS[i % 4]},
        }
        for i, text in enumerate(asked)
    ]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def save_adapter(folder: Path, base: str = BASE, labels: int = 0, **options) -> Path:
    """A LoRA of a causal model, or of a classifier with `labels` labels, far enough from the base to be heard."""
    torch.manual_seed(0)
    kind, words = (AutoModelForSequenceClassification, {"num_labels": labels}) if labels else (AutoModelForCausalLM, {})
    model = kind.from_pretrained(base, dtype=torch.float32, **words)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS" if labels else "CAUSAL_LM", **options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                weight.normal_(0, 0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def save_merged(folder: Path, adapter: Path) -> Path:
    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)
    return folder
