"""The merge certificate of stages 22 and 23: is the merged folder on disk the adapter on its base?

Three folders go in (base, adapter, merged model) and two questions are asked, because each sees what the other cannot.

Weights. Every weight of the merged model must be W + s B A of its layer, rounded to the dtype of the file: the distance
may not exceed the rounding of W, of the change and of their sum. No probe and no tolerance of logits is involved, so
that one layer left out, a scale off by two or another base is found however little it moves the logits. It says nothing
about how the weights are used.

Logits. On real rows the logits of both are compared in float32, where that fits into memory, whatever the dtype of the
file. A merge that is right moves them by rounding alone. How much rounding is normal depends on the model: 135M
parameters in bfloat16 differ from themselves in float32 by more than a larger model does. So the untouched base is run
in the file's dtype and in float32 over the same rows, and a few times this noise is allowed. A float32 file has no such
noise, and a fixed tolerance. This finds what weights cannot show: tied embeddings that moved the head too, another
config, another scaling of attention.

In the file's own dtype, where memory is short, both sides carry the noise and it cannot be measured; TOLERANCES are
then used.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.conversations import render

# allowed difference of a logit, largest and mean, and the least share of places with the same best token, where no
# noise is measured
TOLERANCES = {"float32": (2e-3, 1e-4, 0.999), "bfloat16": (2.0, 0.1, 0.95), "float16": (0.25, 0.02, 0.98)}
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative rounding error of a weight
# times the base's noise that is allowed: a trained model feels rounding more, 1.8 times was measured
NOISE = 2.0
NOISE_TOP1 = 0.02  # share of places by which the agreement may be below the base's
POSITIONS = 32  # compared in a row, evenly spaced: all of them would be gigabytes with a vocabulary of 150,000


class Difference:
    """Largest and mean difference of logits, and how often the best token is the same, over many texts."""

    def __init__(self):
        self.largest, self.total, self.values, self.agreed, self.places = 0.0, 0.0, 0, 0, 0

    def add(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """one, other: float32 [places, vocabulary]"""
        difference = (one - other).abs()
        self.largest = max(self.largest, difference.max().item())
        self.total += difference.double().sum().item()
        self.values += difference.numel()
        self.agreed += (one.argmax(-1) == other.argmax(-1)).sum().item()
        self.places += len(one)

    def figures(self) -> dict[str, float]:
        return {"max": self.largest, "mean": self.total / self.values, "top1": self.agreed / self.places}


def compared_in(model: str, dtype: str) -> str:
    """float32 where the adapter's model and the merged one in float32 and a third in `dtype` fit into free memory, else
    `dtype`."""
    import psutil
    import torch

    from common.models import empty_model

    count = empty_model(model).num_parameters()
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    needed = count * (8 if dtype == "float32" else 10) * 1.2 + (1 << 30)
    if dtype == "float32" or needed <= free:
        return "float32"
    print(
        f"notice: {needed / 1e9:.0f} GB of memory for a comparison in float32, {free / 1e9:.0f} are free: compared in "
        f"{dtype}"
    )
    return dtype


def probe_texts(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[str]:
    if "text" in rows[0]:  # a document need not be read to its end
        return [row["text"][:1000] for row in rows]
    return [render(tokenizer, row["prompt"] + row.get("completion", []), tools=row.get("tools")) for row in rows]


def text_logits(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """float32 tensor [POSITIONS or fewer, vocabulary] on the CPU, without padding: nothing but the weights differs."""
    import torch

    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    kept = torch.linspace(0, ids.shape[1] - 1, min(POSITIONS, ids.shape[1])).long().to(model.device)
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0].float().cpu()


def certificate(
    adapted: PeftModel,
    merged: PreTrainedModel,
    rough: PeftModel | None,
    logits: Callable[[PreTrainedModel | PeftModel, str], torch.Tensor],
    texts: list[str],
    dtype: str,
    is_classifier: bool = False,
) -> dict:
    """What differs between the adapter on its base and the merged model, what may differ, and whether it passed.

    adapted, merged: in the dtype that is compared in. rough: the adapter on its base in the merged file's `dtype`, for
    the noise; None where that is not measured. logits: function (model, text) -> [places, vocabulary]. is_classifier:
    the untouched base has no head, so the noise is that of the adapter's model.
    """
    for model in (adapted, merged, rough):
        if model is not None:
            model.eval()
    differs, noise, effect = Difference(), Difference(), Difference()
    for text in texts:
        reference = logits(adapted, text)
        differs.add(reference, logits(merged, text))
        with nullcontext() if is_classifier else adapted.disable_adapter():
            base = logits(adapted, text)
        effect.add(reference, base)
        if rough is not None:
            with nullcontext() if is_classifier else rough.disable_adapter():
                noise.add(base, logits(rough, text))
    compared = str(merged.dtype).removeprefix("torch.")
    largest, mean, top1 = TOLERANCES[compared]
    if rough is not None:
        measured = noise.figures()
        largest, mean = max(largest, NOISE * measured["max"]), max(mean, NOISE * measured["mean"])
        top1 = min(top1, measured["top1"] - NOISE_TOP1)
    return {
        "dtype": dtype,
        "compared_in": compared,
        "texts": len(texts),
        "positions": differs.places,
        "logits": differs.figures(),
        "noise": noise.figures() if rough is not None else None,
        "effect": None if is_classifier else effect.figures(),
        "allowed": {"max": largest, "mean": mean, "top1": top1},
        "weights": compare_weights(adapted, merged, dtype),
    }


def compare_weights(adapted: PeftModel, merged: PreTrainedModel, dtype: str) -> dict | None:
    """Weights of `merged` that are farther from W + s B A than rounding to `dtype` explains: how many, in which
    tensors.

    Rounding W, the change and their sum moves a weight by no more than half a unit in the last place of each. None
    where an adapter has biases, whose merge is not W + s B A.
    """
    if adapted.peft_config["default"].lora_bias:
        return None
    modules, wrong, count = dict(adapted.base_model.model.named_modules()), {}, 0
    for name, weight in merged.named_parameters():
        parent, _, leaf = name.rpartition(".")
        base, change = _base_and_change(modules.get(parent), leaf)
        count += weight.numel()
        if base is None or base.shape != weight.shape:
            wrong[name] = weight.numel()
            continue
        expected = base.float() if change is None else base.float() + change.float()
        allowed = HALF_ULP[dtype] * (base.float().abs() + expected.abs())
        if change is not None:  # float32 arithmetic of the change, in another order
            allowed += HALF_ULP[dtype] * change.float().abs() + 1e-6 * change.float().abs().max() + 1e-7 * base.abs()
        if dtype == "float16":  # the spacing of its smallest numbers
            allowed += 2.0**-25
        if off := int(((weight.float() - expected).abs() > allowed).sum()):
            wrong[name] = off
    return {"compared": count, "wrong": sum(wrong.values()), "tensors": sorted(wrong, key=wrong.get, reverse=True)}


def _base_and_change(module: torch.nn.Module | None, leaf: str):
    """(W, s B A or None) of a layer of the adapter's model; (None, None) where it has no such weight."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save["default"]
    if isinstance(module, TrainableTokensWrapper):  # a few rows of the embeddings are the adapter's own
        return module.weight.detach(), None
    if isinstance(module, LoraLayer):
        base = getattr(module.get_base_layer(), leaf).detach()
        change = module.get_delta_weight("default").detach() if leaf == "weight" else None
        if change is not None and "default" in module.lora_magnitude_vector:
            # DoRA: each output's row has the trained length m (Liu et al. 2024, arXiv 2402.09353, equation 5)
            length, moved = module.lora_magnitude_vector["default"].weight.detach(), base + change
            change = moved * (length / moved.norm(dim=1))[:, None] - base
        return base, change
    weight = getattr(module, leaf, None)
    return (None, None) if weight is None else (weight.detach(), None)


def faults(report: dict) -> list[str]:
    """Why the certificate is refused, a line each that says what to do; empty where it passed."""
    found, weights, logits, allowed = [], report["weights"], report["logits"], report["allowed"]
    if weights and weights["wrong"]:
        found.append(
            f"{weights['wrong']} of {weights['compared']} weights are not those of base + adapter, most in "
            f"{weights['tensors'][0]} ({len(weights['tensors'])} tensors); fix: merge again (stage 22, --overwrite) "
            "with the adapter and its own base"
        )
    close = logits["max"] <= allowed["max"] and logits["mean"] <= allowed["mean"] and logits["top1"] >= allowed["top1"]
    if not close and not found:
        how = f"mean {logits['mean']:.1e}, allowed {allowed['mean']:.1e}; "
        how += f"largest {logits['max']:.1e}, allowed {allowed['max']:.1e}; "
        how += f"same best token {logits['top1']:.3f}, allowed {allowed['top1']:.3f}"
        as_it_is = "an adapter on tied embeddings cannot be merged, use it as it is (stage 60, --adapter)"
        if report["compared_in"] != "float32":
            fix = "fix: more free memory, so that float32 can be compared, or --dtype float32"
        elif report["dtype"] != "float32":
            fix = f"fix: --dtype float32; {as_it_is}"
        else:
            fix = f"fix: {as_it_is}"
        found.append(f"the weights are right, the logits are not ({how}); {fix}")
    return found


def print_certificate(report: dict) -> None:
    logits, allowed, weights = report["logits"], report["allowed"], report["weights"]
    if weights:
        print(f"weights that are not base + adapter: {weights['wrong']} of {weights['compared']}")
    print(f"logits compared in {report['compared_in']} at {report['positions']} places of {report['texts']} texts:")
    print(f"  largest difference {logits['max']:.2e} (allowed {allowed['max']:.1e})")
    print(f"  mean difference {logits['mean']:.2e} (allowed {allowed['mean']:.1e})")
    print(f"  same best token {logits['top1']:.2%} (allowed {allowed['top1']:.1%})")
    if noise := report["noise"]:
        print(
            f"  {report['dtype']} against float32 without any merge: mean {noise['mean']:.2e}, largest "
            f"{noise['max']:.2e}"
        )
    if effect := report["effect"]:
        print(f"  the adapter itself moves the logits by {effect['mean']:.2e}")
        if logits["mean"] > effect["mean"] / 2:
            print(f"notice: {report['dtype']} loses most of what this adapter changes; --dtype float32 keeps it")
