"""One way to load a tokenizer and a model, and the stop-token contract that every stage relies on.

Loading is strict: a tensor that is missing, unexpected, of another shape or not finite is an error, never a weight
drawn at random. Safetensors only, never trust_remote_code. torch and transformers are imported inside the functions, so
that --help stays quick. What can be told from a folder's files alone is checked in common.model_files.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.model_files import check_adapter, check_json_files, check_model
from common.settings import UserError, show_path

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Names of a classifier's head in the models of transformers that also write text.
HEADS = ("score.weight", "score.bias")
# Tokens that end a document in pretraining, by the names that published models give them.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>")


def resolve_dtype(name: str) -> torch.dtype:
    """ "auto" -> bfloat16 where the hardware multiplies in it (recent GPUs; CPUs with AMX or AVX512-BF16), else
    float32."""
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


def require_launcher() -> None:
    """Raises UserError where one process sees several GPUs: transformers would spread each batch over them
    (DataParallel), which trl's trainers refuse."""
    import torch

    if (count := torch.cuda.device_count()) > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"{count} GPUs and one process; fix: accelerate launch --config_file configs/accelerate/multi_gpu.yaml "
            f"--num_processes {count} scripts/{Path(sys.argv[0]).name} ..., or CUDA_VISIBLE_DEVICES=0 for one GPU"
        )


def require_whole_weights() -> None:
    """Raises UserError where the launch file shares the weights out (FSDP, DeepSpeed's ZeRO-3): no process could merge
    and save them."""
    zero3 = (
        os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    )
    if zero3 or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError(
            "this stage saves a merged model, and under FSDP or ZeRO-3 no process holds all weights; "
            "fix: --config_file configs/accelerate/multi_gpu.yaml"
        )


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict]) -> str:
    """The chat template's text. Raises UserError where the template fails, or loses what was said."""
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template may raise anything
        raise UserError(
            f"the chat template fails ({_reason(error)}); fix: the template of the model, in chat_template.jinja"
        ) from None
    place = 0
    for turn in turns:
        if (place := text.find(turn["content"], place)) < 0:
            raise UserError(
                f"the chat template loses what the {turn['role']} said; fix: the template of the model, in "
                "chat_template.jinja"
            )
        place += len(turn["content"])
    return text


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the chat template writes behind an assistant's answer, e.g. <|im_end|>.

    Raises UserError where there is no template, where it loses a turn, or where it ends an answer with ordinary text:
    such a model cannot be told to stop.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; fix: take the chat model, or copy its chat_template.jinja")
    mark = "答案九"
    turns = [{"role": "user", "content": "问题八"}, {"role": "assistant", "content": mark}]
    text = render(tokenizer, turns)
    try:
        render(
            tokenizer,
            [turns[0], {"role": "assistant", "content": "答案七"}, {"role": "user", "content": "问题六"}, turns[1]],
        )
    except UserError as error:
        if "loses" in str(error):  # a template may refuse several turns: whoever needs them is told then
            raise
    tail = tokenizer(text[text.rindex(mark) + len(mark) :], add_special_tokens=False)["input_ids"]
    # <|im_end|> is a special token of Qwen's base models too, though neither their eos nor their pad
    known = tokenizer.added_tokens_decoder.get(tail[0]) if tail else None
    if known is None or not known.special:
        raise UserError(
            "the chat template puts no special token behind an answer; fix: end it with the model's turn end"
        )
    return tokenizer.convert_ids_to_tokens(tail[0])


def document_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends a document: the tokenizer's eos, or where a chat model has made that the end of a turn, the
    one of DOCUMENT_ENDS that it knows. Raises UserError where there is none."""
    known = [token for token in (tokenizer.eos_token, *DOCUMENT_ENDS) if token in tokenizer.get_vocab()]
    found = next((token for token in known if token in DOCUMENT_ENDS), next(iter(known), None))
    if found is None:
        raise UserError("the tokenizer has no token that ends a document; fix: set its eos_token")
    return found


def load_tokenizer(model: str, documents: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer with the stop contract in force: eos ends a turn of the chat template, pad is another token.

    documents: for plain text, where eos ends a document and no template is needed.

    A base model such as Qwen3-0.6B-Base comes with eos = pad = <|endoftext|>: trained so, every eos is masked as
    padding and the model never stops. Both are corrected here, and a notice is printed.
    """
    from transformers import AutoTokenizer

    if Path(model).is_dir():
        check_json_files(Path(model))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # the tokenizers' own errors are bare Exceptions
        raise UserError(
            f"{show_path(model)}: no tokenizer could be loaded ({_reason(error)}); "
            "fix: copy config.json and the tokenizer's files of the model"
        ) from None
    for name in ("is_local", "local_files_only"):  # of this loading; transformers 5.17 would save them
        tokenizer.init_kwargs.pop(name, None)
    try:
        stop = document_end(tokenizer) if documents else turn_end(tokenizer)
    except UserError as error:
        raise UserError(f"{show_path(model)}: {error}") from None
    if tokenizer.eos_token != stop:
        print(
            f"tokenizer: eos {tokenizer.eos_token} -> {stop}, the token that ends a {'document' * documents or 'turn'}"
        )
        tokenizer.eos_token = stop
    if documents:  # labels are made by place, so pad may be eos
        tokenizer.pad_token = tokenizer.pad_token or stop
        return tokenizer
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


def model_config(model: str) -> PretrainedConfig:
    """The config of a folder or a hub id. Raises UserError where none can be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # a config.json that is not ours, or a hub id that nobody has
        raise UserError(f"{show_path(model)}: no config could be read ({_reason(error)}); fix: copy it again") from None


def empty_model(model: str) -> PreTrainedModel:
    """The causal model's modules with names and shapes, without weights. Raises UserError where the config is none."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model_config(model)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # numbers that do not go together, a type of numbers that is none
        raise UserError(
            f"{show_path(model)}/config.json describes no model ({_reason(error)}); fix: copy it again"
        ) from None


def require_context(model: str, tokens: int, what: str = "--max-length") -> None:
    """Raises UserError where `tokens`, which `what` names, are more than the model reads."""
    if tokens > (most := context(model) or tokens):
        raise UserError(f"{what} {tokens}: the model reads {most} tokens; fix: a smaller one")


def context(model: str) -> int | None:
    """Tokens that the model reads, None where its config.json does not say. Raises UserError as model_config does."""
    return getattr(model_config(model).get_text_config(), "max_position_embeddings", None)


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Can trl separate the answer's tokens from the template's? True for templates with {% generation %} marks, and for
    those that trl has a marked copy of. Otherwise what the template writes behind the eos is trained too: a notice is
    printed."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return True
    try:
        get_training_chat_template(tokenizer)
        return True
    except ValueError:
        print("notice: trl does not know this chat template: the loss covers all that follows the prompt")
        return False


def load_strictly(kind: type, model: str, dtype: torch.dtype, heads: str = "", **words) -> PreTrainedModel:
    """kind.from_pretrained(model) with every weight of the file in its place.

    heads: "new" lets a classifier's head be drawn at random, and is printed; "adapter" too, for a head that an adapter
    brings along.
        A causal model's own head lies unused then. "trained" words the absence of a classifier's head.

    Raises UserError for a tensor that is missing, unexpected, of another shape or not finite, and for whatever the
    library raises.
    """
    from transformers.utils import logging

    level, name = logging.get_verbosity(), show_path(model)
    logging.set_verbosity_error()  # what it reports is told below, as an error
    try:
        loaded, report = kind.from_pretrained(
            model,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
            **words,
        )
    except MemoryError:
        raise
    except Exception as error:  # of transformers, safetensors or torch, about files that are not ours
        raise UserError(f"{name}: no model could be loaded ({_reason(error)}); fix: copy the model again") from None
    finally:
        logging.set_verbosity(level)
    fresh = sorted(key for key in report["missing_keys"] if key in HEADS)
    if heads == "trained" and fresh:
        raise UserError(
            f"{name} has no trained head ({fresh[0]} would be random); fix: name a folder that stage 30 or 31 wrote"
        )
    new = heads in ("new", "adapter")
    faults = {
        "missing": [key for key in report["missing_keys"] if not (new and key in HEADS)],
        "unexpected": [key for key in report["unexpected_keys"] if not (new and key.startswith("lm_head."))],
        "of another shape": [f"{key} {list(one)} for {list(other)}" for key, one, other in report["mismatched_keys"]],
    }
    for what, keys in faults.items():
        if keys:
            raise UserError(
                f"{name}: {len(keys)} weights are {what} ({sorted(keys)[0]}); "
                "fix: take weights and config.json from one model, whole"
            )
    check_finite(loaded, name)
    for module in loaded.modules():  # bitsandbytes 0.50: packed in eval mode and unpacked by a checkpoint, they differ
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if fresh and heads == "new":
        print(f"notice: {', '.join(fresh)} is a new head, drawn at random, to be trained")
    if "attn_implementation" not in words and pick_device() == "cpu":
        from common.cpu_attention import use_grouped_attention

        use_grouped_attention(loaded)
    return loaded


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Raises UserError naming the first parameter that holds NaN or infinity."""
    import torch

    for key, weight in model.named_parameters():
        if not weight.is_meta and weight.is_floating_point() and not torch.isfinite(weight).all():
            raise UserError(f"{name}: {key} holds NaN or infinity; fix: an earlier checkpoint, or --dtype float32")


def load_model(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str = "auto",
    adapter: str | None = None,
    device_map: str = "",
    force_base: bool = False,
    quantize: str = "none",
    attn_implementation: str = "auto",
) -> PreTrainedModel | PeftModel:
    """A causal model on the device at hand, its generation config in line with the tokenizer; with an adapter on top if
    named.

    device_map "auto" spreads it over the GPUs of this process, and what does not fit over main memory (accelerate's
    big-model inference). force_base: put the adapter on another base than its own, with a notice. quantize,
    attn_implementation: as in common/training/options.py.

    Raises UserError where the folder holds no whole causal model or the adapter does not fit it.
    """
    from transformers import AutoModelForCausalLM

    check_model(model)
    if adapter:
        check_adapter(adapter, model, force_base=force_base)
    dtype = resolve_dtype(dtype)
    words = how_to_load(dtype, quantize, attn_implementation) | ({"device_map": device_map} if device_map else {})
    loaded = load_strictly(AutoModelForCausalLM, model, dtype, **words)
    align_stop_tokens(loaded, tokenizer)
    loaded.get_output_embeddings().register_forward_pre_hook(contiguous_input)
    if adapter:
        loaded = attach_adapter(loaded, adapter)
    return loaded if device_map else loaded.to(pick_device())


def contiguous_input(module: torch.nn.Module, inputs: tuple) -> tuple:
    """A hook for the head: torch 2.13 on a CPU copies a frozen weight once for each row of an input [rows, places,
    width] that is a slice, such as the last places of prompts: 10 GiB for 32 rows of Gemma 3 270M."""
    return inputs[0].contiguous(), *inputs[1:]


def how_to_load(dtype: torch.dtype, quantize: str, attn_implementation: str) -> dict:
    """Words of from_pretrained. 4bit is nf4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314),
    8bit is LLM.int8(): of linear layers, not of embeddings, norms and the head."""
    words = {} if attn_implementation == "auto" else {"attn_implementation": attn_implementation}
    if quantize == "none":
        return words
    from transformers import BitsAndBytesConfig

    kind = {"load_in_8bit": True}
    if quantize == "4bit":
        kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        kind["bnb_4bit_compute_dtype"] = dtype
    return words | {"quantization_config": BitsAndBytesConfig(**kind), "device_map": {"": pick_device()}}


def attach_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    """The model with the LoRA on top. Raises UserError where a weight of the adapter finds no place, or a place no
    weight."""
    import warnings

    from peft import PeftModel

    from common.fused_head import use_trained_rows

    name = show_path(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is told below, as an error
            loaded = PeftModel.from_pretrained(model, adapter, use_safetensors=True)
            use_trained_rows(loaded)
            result = loaded.load_adapter(adapter, "default", use_safetensors=True)  # again: only this call reports
    except Exception as error:  # of peft, safetensors or torch, about files that are not ours
        raise UserError(
            f"{name}: the adapter does not fit its base ({_reason(error)}); fix: --model with its base"
        ) from None
    for what, keys in (("has no place in the base", result.unexpected_keys), ("is missing", result.missing_keys)):
        if keys:
            raise UserError(
                f"{name}: {len(keys)} weights of the adapter, the first {what} ({sorted(keys)[0]}); "
                "fix: --model with its base, and an adapter saved whole"
            )
    check_finite(loaded, name)
    return loaded


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the tokenizer has an id that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    if max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())) > rows:
        raise UserError(
            f"the tokenizer has more tokens than the model has embeddings ({rows}); fix: take both from one folder"
        )


def align_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """generation_config and config stop at the tokenizer's eos; further stop tokens of the model are kept."""
    check_vocabulary(model, tokenizer)
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    model.generation_config.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *known]))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if reason.endswith(":") and len(lines) > 1:  # "Error(s) in loading state_dict for Model:", and the error behind it
        reason = lines[1]
    return reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"


def newest_checkpoint(output_dir: Path) -> str | None:
    """The newest whole checkpoint-N folder whose weights are finite numbers. The Trainer writes trainer_state.json
    last, so one that parses marks a whole one."""
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


def chat_dataset(rows: list[dict], columns: tuple[str, ...], enable_thinking: bool) -> Dataset:
    """Rows as a datasets.Dataset with `columns`, the thinking choice that the chat template sees, and the tools of rows
    that have some."""
    from datasets import Dataset, Features, Json, List, Value

    from common.conversations import holds_more

    thinking = {"chat_template_kwargs": {"enable_thinking": enable_thinking}}
    found = [{**{name: row[name] for name in columns}, **thinking} for row in rows]
    conversations = [name for name in columns if rows and isinstance(rows[0][name], list)]  # a label is none
    if not any(holds_more(row, *conversations) for row in rows):
        return Dataset.from_list(found)
    # without Json every turn would get the keys of all turns, with null: templates ask whether a key is there
    for row, given in zip(found, rows, strict=True):
        row["tools"] = json.dumps(given.get("tools") or None, ensure_ascii=False)
    features = {name: List(Json()) if name in conversations else Value("bool") for name in columns}
    features |= {"chat_template_kwargs": {"enable_thinking": Value("bool")}, "tools": Value("string")}
    return Dataset.from_list(found, features=Features(features))
