"""README.md of a model folder, in the hub's format, from the run's own record."""

import json
from pathlib import Path

from common.evaluation.tables import escape, markdown_table
from common.settings import show_path

# Figures that are lists or tables have pages of their own; these two are shown.
SAMPLES = "samples"


def model_card(record: dict, folder: Path) -> str | None:
    """The card of the model or adapter that a finished run left in `folder`, or None where it left none.

    Nothing in it depends on when or how fast the run was: a run that was killed and taken up again has the same card.
    """
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
        return None
    settings, figures = record["settings"], record["figures"]
    base = record["inputs"].get("model") or {}
    base_name = base.get("hub_id") or _shown(base.get("path") or settings.get("model") or "")
    library = "peft" if is_adapter else "transformers"
    head = {"language": ["zh"], "library_name": library, "tags": [record["stage"], settings.get("task", "")]}
    if base.get("hub_id"):
        head["base_model"] = base["hub_id"]
    names = [(name, value) for name, value in settings.items() if value not in ("", None, [], {})]
    inputs = [
        [
            name,
            escape(str(item.get("hub_id") or item.get("path"))),
            str(item.get("rows", "")),
            item.get("sha256", "")[:16],
        ]
        for name, item in record["inputs"].items()
    ]
    numbers = [[name, f"{value:.4g}"] for name, value in figures.items() if type(value) in (int, float)]
    samples = [text for text in figures.get(SAMPLES, []) if isinstance(text, str)]
    parts = [
        "---\n" + "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()) + "\n---",
        f"# {folder.name}",
        f"{'A LoRA adapter' if is_adapter else 'A model'}, made by `scripts/{record['stage']}.py`"
        + (f" from {escape(base_name)}." if base_name else "."),
        "## Use\n\n```python\n" + _loading(is_adapter, base_name, folder) + "\n```",
        "## Figures of the run\n\n" + markdown_table(["figure", "value"], numbers) if numbers else "",
        "## Texts as they came\n\n" + "\n\n".join(f"> {escape(text) or '(empty)'}" for text in samples)
        if samples
        else "",
        "## Inputs\n\n" + markdown_table(["input", "what", "rows", "sha256"], inputs, left=2),
        "## Settings\n\n" + markdown_table(["setting", "value"], [[n, escape(str(v))] for n, v in names], left=2),
        "## Limits and licence\n\nThe figures are of this run and its data; compare models by stage 72's report, which "
        "has intervals. The licences of the base and of the data apply to this model too: check them before sharing.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown(path: Path | str) -> str:
    """From the repo's root, where the code of the card runs; elsewhere the name: a card that is shared names no folder
    of its writer."""
    shown = Path(show_path(path))
    return shown.name if shown.is_absolute() else shown.as_posix()


def _loading(is_adapter: bool, base: str, folder: Path) -> str:
    """The lines of Python that load what lies in `folder`."""
    config = json.loads((folder / ("adapter_config.json" if is_adapter else "config.json")).read_text(encoding="utf-8"))
    classifies = config.get("task_type") == "SEQ_CLS" or "Classification" in str(config.get("architectures"))
    kind = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    lines = [f"from transformers import {kind}, AutoTokenizer", ""]
    name = _shown(folder)
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")')
    lines.append(f'model = {kind}.from_pretrained("{base if is_adapter else name}")')
    if is_adapter:
        lines[0] = "from peft import PeftModel\n" + lines[0]
        lines.append(f'model = PeftModel.from_pretrained(model, "{name}")')
    return "\n".join(lines)
