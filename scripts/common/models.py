"""One way to load a tokenizer and a model, and the stop-token contract that every stage relies on.

Safetensors only, never trust_remote_code. torch and transformers are imported inside the functions, so that --help stays quick.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from common.settings import UserError


def resolve_dtype(name: str):
    """ "auto" -> bfloat16 where the hardware multiplies in it (recent GPUs; CPUs with AMX or AVX512-BF16), else float32."""
    import torch

    if name != "auto":
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if name not in dtypes:
            raise UserError(f"--dtype {name}: unknown; fix: auto, {', '.join(dtypes)}")
        return dtypes[name]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    features = torch.cpu.get_capabilities()
    return torch.bfloat16 if features.get("amx_bf16") or features.get("avx512_bf16") else torch.float32


def pick_device() -> str:
    """Of several processes on a machine each has a GPU of its own."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def require_whole_weights() -> None:
    """Raises UserError where the launch file shares the weights out (FSDP, DeepSpeed's ZeRO-3): no process could merge and save them."""
    zero3 = (
        os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    )
    if zero3 or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError(
            "this stage saves a merged model, and under FSDP or ZeRO-3 no process holds all weights; "
            "fix: --config_file configs/accelerate/multi_gpu.yaml"
        )


def turn_end(tokenizer) -> str:
    """The token that the chat template writes behind an assistant's answer, e.g. <|im_end|>.

    Raises UserError where there is no template, or where it ends an answer with ordinary text: such a model cannot be told to stop.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; fix: take the chat model, or copy its chat_template.jinja")
    mark = "答"
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tail = tokenizer(text[text.rindex(mark) + len(mark) :], add_special_tokens=False)["input_ids"]
    # <|im_end|> is a special token of Qwen's base models too, though neither their eos nor their pad
    known = tokenizer.added_tokens_decoder.get(tail[0]) if tail else None
    if known is None or not known.special:
        raise UserError(
            "the chat template puts no special token behind an answer; fix: end it with the model's turn end"
        )
    return tokenizer.convert_ids_to_tokens(tail[0])


def load_tokenizer(model: str):
    """The tokenizer with the stop contract in force: eos ends a turn of the chat template, pad is another token.

    A base model such as Qwen3-0.6B-Base comes with eos = pad = <|endoftext|>: trained so, every eos is masked as padding and the
    model never stops. Both are set right here, aloud.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no tokenizer could be loaded ({str(error).splitlines()[0]})") from None
    stop = turn_end(tokenizer)
    if tokenizer.eos_token != stop:
        print(f"tokenizer: eos {tokenizer.eos_token} -> {stop}, the token that ends a turn")
        tokenizer.eos_token = stop
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        spare = [
            token for token in ("<|endoftext|>", "<|pad|>", "<pad>") if token in tokenizer.get_vocab() and token != stop
        ]
        if not spare:
            raise UserError(
                f"{model}: pad is eos ({stop}) and no spare token is there; fix: add a pad token to the tokenizer"
            )
        print(f"tokenizer: pad {tokenizer.pad_token} -> {spare[0]}, so that padding never hides an eos")
        tokenizer.pad_token = spare[0]
    return tokenizer


def require_context(model: str, tokens: int, what: str = "--max-length") -> None:
    """Raises UserError where `tokens`, which `what` names, are more than the model reads."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    if tokens > (context := getattr(config, "max_position_embeddings", tokens)):
        raise UserError(f"{what} {tokens}: the model reads {context} tokens; fix: a smaller one")


def marks_answers(tokenizer) -> bool:
    """Can trl tell the answer's tokens from the template's? True for templates with {% generation %} marks and for those that trl
    carries a marked copy of; otherwise what the template writes behind the eos is trained on too, and that is said aloud."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return True
    try:
        get_training_chat_template(tokenizer)
        return True
    except ValueError:
        print("notice: trl does not know this chat template: the loss covers all that follows the prompt")
        return False


def load_model(model: str, tokenizer, dtype: str = "auto", adapter: str | None = None, device_map: str = ""):
    """A causal model on the device at hand, its generation config in line with the tokenizer; with an adapter on top if named.

    device_map "auto" spreads it over the GPUs of this process, and what does not fit over main memory (accelerate's big-model inference).

    Raises UserError where the folder holds no causal model or the adapter does not fit it.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=resolve_dtype(dtype),
            use_safetensors=True,
            trust_remote_code=False,
            device_map=device_map or None,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no model could be loaded ({str(error).splitlines()[0]})") from None
    align_stop_tokens(loaded, tokenizer)
    if adapter:
        check_adapter(adapter, model)
        loaded = PeftModel.from_pretrained(loaded, adapter, use_safetensors=True)
    return loaded if device_map else loaded.to(pick_device())


def align_stop_tokens(model, tokenizer) -> None:
    """generation_config and config stop at the tokenizer's eos; further stop tokens of the model are kept."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError("the tokenizer has more tokens than the model has embeddings; fix: take both from one folder")
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    model.generation_config.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *known]))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


def read_adapter_config(adapter: str) -> dict:
    path = Path(adapter) / "adapter_config.json"
    if not path.exists():
        raise UserError(
            f"{adapter}: no adapter_config.json inside; fix: name the folder that stage 20, 40, 50 or 51 wrote"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def check_adapter(adapter: str, model: str) -> None:
    """Say so when an adapter was trained on another base: it loads all the same, and writes nonsense."""
    trained_on = read_adapter_config(adapter).get("base_model_name_or_path")
    if trained_on and Path(trained_on).name != Path(model).name:
        raise UserError(f"{adapter} was trained on {trained_on}, not on {model}; fix: --model {trained_on}")


def newest_checkpoint(output_dir: Path) -> str | None:
    """The newest whole checkpoint-N folder whose weights are finite numbers. The Trainer writes trainer_state.json last, so one that
    parses marks a whole one."""
    for folder in sorted(output_dir.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            print(f"{folder.name} is not whole, going back to the one before")
            continue
        if weights_are_finite(folder):
            return str(folder)
        print(f"{folder.name} holds weights that are no finite numbers, going back to the one before")
    return None


def weights_are_finite(folder: Path) -> bool:
    from safetensors import safe_open

    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if not all(file.get_tensor(name).isfinite().all() for name in file.keys()):  # noqa: SIM118  no dict
                return False
    return True


def chat_dataset(rows: list[dict], columns: tuple[str, ...], enable_thinking: bool):
    """Rows as a datasets.Dataset with `columns` and the thinking choice that the chat template sees."""
    from datasets import Dataset

    thinking = {"chat_template_kwargs": {"enable_thinking": enable_thinking}}
    return Dataset.from_list([{**{name: row[name] for name in columns}, **thinking} for row in rows])
