"""A transformers model as a GGUF file: metadata, tokenizer and tensors as llama.cpp reads them, and an Ollama
Modelfile.

Names and layouts follow llama.cpp's own conversion: Llama's queries and keys have the two halves of each head
interleaved, Gemma's norms are stored as 1 + weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from common.gguf.files import without_marks
from common.gguf.llama_cpp import HOW_TO_INSTALL
from common.gguf.tokenizer import CONTROL, PATTERNS, USER_DEFINED
from common.settings import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "gemma3_text": "gemma3"}  # transformers -> GGUF
NORMAL, BYTE = 1, 6  # further types of a token


def require_exportable(path: str, config: PretrainedConfig) -> None:
    """Raises UserError for an architecture without a place in GGUF here."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(f"gguf is not installed; {HOW_TO_INSTALL}") from None
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"{path}: {config.model_type} has no export here; fix: one of {', '.join(ARCHITECTURES)}")
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale and scale != config.head_dim:
        raise UserError(f"{path}: queries are scaled by {scale}, and llama.cpp scales by head_dim; fix: another model")


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, name: str, type_: str) -> None:
    """Writes `model` (float32) with `tokenizer` to `path`; matrices as `type_` (F32, F16, BF16, Q8_0), vectors as
    F32."""
    import gguf
    import numpy as np

    config, kind = model.config, ARCHITECTURES[model.config.model_type]
    architecture = getattr(gguf.MODEL_ARCH, kind.upper())
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    matrices = gguf.GGMLQuantizationType[type_]
    partial = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(partial, kind)
    writer.add_name(name)
    writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}[type_])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope_theta(config))
    if kind == "llama":
        writer.add_rope_dimension_count(head)
        writer.add_vocab_size(config.vocab_size)
    if kind == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    _add_tokenizer(writer, tokenizer, config.vocab_size)

    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        place = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise UserError(f"{key} has no name in GGUF; fix: report this model")
        values = tensor.float().cpu().numpy()
        if kind == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            values = values.reshape(heads, 2, head // 2, -1).swapaxes(1, 2).reshape(values.shape)
        if kind == "gemma3" and key.endswith("norm.weight"):
            values = values + 1
        form = matrices if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        if form == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
            form = gguf.GGMLQuantizationType.F16
        data = gguf.quants.quantize(np.ascontiguousarray(values), form)
        writer.add_tensor(place, data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def _rope_theta(config: PretrainedConfig) -> float:
    parameters = config.rope_parameters
    parameters = parameters.get("full_attention", parameters)  # Gemma has one for local and one for global layers
    return parameters["rope_theta"]


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model = core["model"]
    if model["type"] != "BPE":
        raise UserError(f"a tokenizer of kind {model['type']} has no export here; fix: a model with BPE")
    is_bytes = not model["byte_fallback"]
    tokens = {id: token for token, id in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in core["added_tokens"]}
    texts, types = [], []
    for id in range(size):
        text = tokens.get(id, f"<unused{id}>")
        entry = added.get(id)
        kind = NORMAL if id in tokens else CONTROL
        if entry:
            kind = CONTROL if entry["special"] else USER_DEFINED
        elif not is_bytes and len(text) == 6 and text.startswith("<0x"):
            kind = BYTE
        texts.append(text if is_bytes or entry else text.replace(" ", "▁"))
        types.append(kind)
    writer.add_tokenizer_model("gpt2" if is_bytes else "llama")
    if is_bytes:
        writer.add_tokenizer_pre(_cutting_rule(core))
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model, texts))
        writer.add_add_space_prefix("Prepend" in json.dumps(core["normalizer"]))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(tokenizer("")["input_ids"] == [tokenizer.bos_token_id])
    writer.add_chat_template(without_marks(tokenizer.chat_template))


def _scores(model: dict, texts: list[str]) -> list[float]:
    """Sentencepiece joins the union with the highest score first: the place of a piece's first merge says how early."""
    first = {}
    for rank, pair in enumerate(model["merges"]):
        pair = pair.split(" ", 1) if isinstance(pair, str) else pair
        first.setdefault("".join(pair), rank)
    return [-float(first.get(text, len(first) + id)) for id, text in enumerate(texts)]


def _cutting_rule(core: dict) -> str:
    """The name under which llama.cpp knows the patterns of a byte-level tokenizer."""
    steps = core["pre_tokenizer"]
    steps = steps.get("pretokenizers", [steps])
    if any(step["type"] == "Digits" for step in steps):
        return "smollm"
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    if not patterns and any(step["type"] == "ByteLevel" and step.get("use_regex") for step in steps):
        return "gpt-2"
    for name, known in PATTERNS.items():
        if patterns == known:
            return name
    raise UserError(f"llama.cpp's name for the patterns {patterns} is not known here; fix: report this tokenizer")


def modelfile(tokenizer: PreTrainedTokenizerBase, file: str, temperature: float, top_p: float, min_p: float) -> str:
    """An Ollama Modelfile for `file`: the template as rendered turns, the stop token, sampling."""
    system, question, answer = "SYSTEM-TEXT", "USER-TEXT", "ANSWER-TEXT"

    def render(*turns: tuple[str, str], **words) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.apply_chat_template(messages, tokenize=False, **words)

    alone = render(("user", question), add_generation_prompt=True).removeprefix(tokenizer.bos_token or "")
    try:
        both = render(("system", system), ("user", question), add_generation_prompt=True)
        before = both.removeprefix(tokenizer.bos_token or "").removesuffix(alone)
    except Exception:  # a template may refuse a system turn, by an error of its own
        before = ""
    if system not in before:
        before = ""
    end = render(("user", question), ("assistant", answer)).rsplit(answer, 1)[1]
    turn = before.replace(system, "{{ .System }}")
    lines = ["{{ if .System }}" + turn + "{{ end }}" if turn else "", alone.replace(question, "{{ .Prompt }}")]
    template = "".join(lines) + "{{ .Response }}" + end
    return (
        f'FROM ./{file}\nTEMPLATE """{template}"""\nPARAMETER stop "{tokenizer.eos_token}"\n'
        f"PARAMETER temperature {temperature}\nPARAMETER top_p {top_p}\nPARAMETER min_p {min_p}\n"
    )
