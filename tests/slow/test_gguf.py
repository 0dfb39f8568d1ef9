"""Stages 01 and 24 against llama.cpp itself: what goes out comes back, and what is not the model is caught."""

import importlib.util
import json
import shutil

import pytest
import torch

from common.models import load_model, load_tokenizer
from common.settings import UserError
from conftest import ROOT, SCRIPTS

BASE = ROOT / "data" / "tiny_qwen3"
pytestmark = [
    pytest.mark.all,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs requirements-gguf.txt"),
]


def stage(name: str, **settings):
    """main() of a stage of the repo in this process."""
    spec = importlib.util.spec_from_file_location(name, next(SCRIPTS.glob(f"{name}_*.py")))
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.main(module.Settings(**settings))


def record(folder) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def small_model(kind: str, folder):
    """A random model of `kind` with a vocabulary that has merges, big enough for llama.cpp's blocks of 32."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

    from common.gguf.tokenizer import PATTERNS

    if kind == "gemma3_text":  # pieces with byte fallback, a bos in front
        shutil.copytree(BASE, folder, dirs_exist_ok=True)
        tokenizer = load_tokenizer(str(BASE))
        from common.gguf.tokenizer import _begin_with

        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        tokenizer.backend_tokenizer.post_processor = _begin_with("<bos>", tokenizer.bos_token_id)
        tokenizer.chat_template = "{{- bos_token -}}" + tokenizer.chat_template
    else:
        pre = "llama-bpe" if kind == "llama" else "qwen2"
        core = Tokenizer(models.BPE())
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
        core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
        core.decoder = decoders.ByteLevel()
        if pre == "qwen2":
            from tokenizers import normalizers

            core.normalizer = normalizers.NFC()
        trainer = trainers.BpeTrainer(
            vocab_size=1200,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        )
        core.train([str(ROOT / "README.md"), str(ROOT / "README_zh.md")], trainer)
        template = load_tokenizer(str(BASE)).chat_template
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
        )
    size = -(-len(tokenizer) // 64) * 64
    more = {"query_pre_attn_scalar": 32} if kind == "gemma3_text" else {}
    words = (
        {"head_dim": 32, "num_key_value_heads": 2, "sliding_window": 64}
        if kind != "llama"
        else {"num_key_value_heads": 2}
    )
    config = CONFIG_MAPPING[kind](
        vocab_size=size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=kind != "qwen2",
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **words,
        **more,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with (
        torch.no_grad()
    ):  # weights large enough that next tokens differ from place to place, norms that are not all one
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(torch.rand_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_embedded_base_goes_out_and_comes_back(tmp_path):
    stage("24", model=str(BASE), type="F32", output_dir=tmp_path / "out", texts=400, places=20)
    figures = record(tmp_path / "out")["figures"]
    assert figures["texts_with_other_ids"] == 0 and figures["equal_greedy_answers"] == 2 and figures["kl_mean"] < 1e-5
    modelfile = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile and "{{ .Prompt }}<|im_end|>" in modelfile

    gguf_file = tmp_path / "out" / "tiny_qwen3-f32.gguf"
    stage("01", gguf_file=gguf_file, dtype="float32", output_dir=tmp_path / "back", texts=400, places=20)
    assert record(tmp_path / "back")["figures"]["kl_mean"] < 1e-5
    tokenizer = load_tokenizer(str(tmp_path / "back"))
    before, after = (
        load_model(str(BASE), tokenizer, "float32"),
        load_model(str(tmp_path / "back"), tokenizer, "float32"),
    )
    for key, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[key]), key
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert "generation" in tokenizer.chat_template


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma3_text"])
def test_every_architecture_goes_out_and_comes_back(kind, tmp_path):
    folder = small_model(kind, tmp_path / kind)
    stage("24", model=str(folder), type="F32", output_dir=tmp_path / "out", texts=300, places=20)
    figures = record(tmp_path / "out")["figures"]
    assert figures["texts_with_other_ids"] == 0 and figures["kl_mean"] < 1e-4 and figures["top1_agreement"] > 0.9
    gguf_file = tmp_path / "out" / f"{kind}-f32.gguf"
    stage("01", gguf_file=gguf_file, dtype="float32", output_dir=tmp_path / "back", texts=300, places=20)
    assert record(tmp_path / "back")["figures"]["kl_mean"] < 1e-4


@pytest.mark.parametrize("type_", ["F16", "BF16", "Q8_0"])
def test_other_types_are_close(type_, tmp_path):
    stage("24", model=str(BASE), type=type_, output_dir=tmp_path / "out", texts=50, places=20)
    assert record(tmp_path / "out")["figures"]["kl_mean"] < 0.01


def _wrong_merges(metadata):
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][::-1]


def _no_bos(metadata):
    metadata["tokenizer.ggml.add_bos_token"] = False


def _shifted(metadata):
    for key in ("tokens", "token_type"):
        values = metadata[f"tokenizer.ggml.{key}"]
        metadata[f"tokenizer.ggml.{key}"] = [*values[:300], *values[301:], values[300]]


@pytest.mark.parametrize(
    "kind, change", [("qwen2", _wrong_merges), ("gemma3_text", _no_bos), ("gemma3_text", _shifted), ("qwen3", _shifted)]
)
def test_a_wrong_tokenizer_is_caught(kind, change, tmp_path, monkeypatch):
    from common.gguf import files

    folder = small_model(kind, tmp_path / kind)
    stage("24", model=str(folder), type="F32", output_dir=tmp_path / "out", texts=20, places=5)
    honest = files.read_metadata

    def changed(path):  # as if this file's conversion had the fault; llama.cpp still reads the file itself
        metadata = honest(path)
        change(metadata)
        return metadata

    monkeypatch.setattr(files, "read_metadata", changed)
    with pytest.raises(UserError, match="other token ids than in llama.cpp"):
        stage("01", gguf_file=tmp_path / "out" / f"{kind}-f32.gguf", output_dir=tmp_path / "back", texts=200, places=5)
    assert record(tmp_path / "back")["status"] == "failed"


def test_wrong_weights_are_caught(tmp_path):
    """One matrix of one layer is not the file's."""
    from common.gguf.certificate import compare_distributions, varied_texts
    from common.gguf.llama_cpp import llama_cpp

    stage("24", model=str(BASE), type="F32", output_dir=tmp_path / "out", texts=20, places=5)
    tokenizer = load_tokenizer(str(BASE))
    model = load_model(str(BASE), tokenizer, "float32")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    with llama_cpp(tmp_path / "out" / "tiny_qwen3-f32.gguf") as other:
        assert compare_distributions(model, tokenizer, other, varied_texts(60, 1), 20)["kl_mean"] > 0.05


def test_what_cannot_go_out_is_refused(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="merge it first"):
        stage("24", model=str(adapter), output_dir=tmp_path / "out")
    for change, message in (
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "not a model that writes text"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "has no export here"),
    ):
        folder = tmp_path / change["architectures"][0]
        shutil.copytree(BASE, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | change
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            stage("24", model=str(folder), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [(b"", "not a whole GGUF file"), (b"GGUF" + bytes(range(40)), "GGUF"), (b"{}", "not a whole GGUF file")],
)
def test_what_is_no_gguf_file_is_refused(content, message, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        stage("01", gguf_file=file, output_dir=tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        stage("01", gguf_file=tmp_path / "missing.gguf", output_dir=tmp_path / "out")
    with pytest.raises(UserError, match="no file or two"):
        stage("01", output_dir=tmp_path / "out")
