"""Folders that are not what they say: each is one error with a fix, never a model drawn at random nor an adapter
without effect."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from common.jsonl import write_json
from common.model_files import check_adapter, check_model
from common.models import empty_model, load_model, load_tokenizer
from common.pretraining.char_tokenizer import build_tokenizer
from common.runs import describe_input
from common.settings import UserError
from common.training.classifiers import load_classifier, load_styles, logits_of, new_classifier, open_classifier


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """base, other (another base), classifier, reward, adapter, reward_adapter: small ones, whole."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), build_tokenizer("春眠不觉晓，处闻啼鸟。问答")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer), intermediate_size=64, tie_word_embeddings=True, pad_token_id=0, **sizes
    )
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, labels in (("reward", 1), ("classifier", 3)):
        config.num_labels = labels
        Qwen3ForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, kind, task in (
        ("adapter", Qwen3ForCausalLM, "CAUSAL_LM"),
        ("reward_adapter", Qwen3ForSequenceClassification, "SEQ_CLS"),
    ):
        words = {"num_labels": 1} if task == "SEQ_CLS" else {}
        model = kind.from_pretrained(folder / "base", dtype=torch.float32, **words)
        lora = LoraConfig(task_type=task, r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        write_json(folder / name / "run.json", {"inputs": {"model": describe_input("model", folder / "base")}})
    return folder


@pytest.fixture
def broken(good, tmp_path):
    """broken(name): a copy of a good folder, to be broken."""
    return lambda name: Path(shutil.copytree(good / name, tmp_path / name))


def weights(folder: Path, change) -> None:
    """change(state dict) edits the weights of a model or an adapter, or returns a new dict."""
    file = next(folder.glob("*model.safetensors"))
    state = load_file(file)
    changed = change(state)
    save_file(changed if isinstance(changed, dict) else state, file, metadata={"format": "pt"})


def config(folder: Path, name: str = "config.json", **values) -> None:
    data = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(data | values), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_pickle(folder: Path) -> None:
    file = next(folder.glob("*model.safetensors"))
    torch.save(load_file(file), folder / ("adapter_model.bin" if "adapter" in file.name else "pytorch_model.bin"))
    file.unlink()


def with_nan(state: dict) -> None:
    next(iter(state.values())).view(-1)[0] = torch.nan


def with_infinity(state: dict) -> None:
    list(state.values())[-1].view(-1)[-1] = torch.inf


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


LAYER = "model.layers.1.mlp.up_proj.weight"
# what is done to a good base -> what the error says
BASES = {
    "a missing tensor": (lambda f: weights(f, lambda s: s.pop(LAYER)), f"1 weights are missing ({LAYER})"),
    "no embedding": (lambda f: weights(f, lambda s: s.pop("model.embed_tokens.weight")), "are missing"),
    "a further tensor": (
        lambda f: weights(f, lambda s: s.update(extra=torch.ones(2))),
        "1 weights are unexpected (extra)",
    ),
    "a tensor under another name": (lambda f: weights(f, lambda s: s.update(x=s.pop(LAYER))), "are missing"),
    "a tensor of another shape": (lambda f: weights(f, lambda s: s.update({LAYER: s[LAYER][:8]})), "of another shape"),
    "all names with a prefix": (lambda f: weights(f, lambda s: {f"net.{k}": v for k, v in s.items()}), "are missing"),
    "more layers in config": (
        lambda f: config(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "are missing",
    ),
    "fewer layers in config": (lambda f: config(f, num_hidden_layers=1, layer_types=["full_attention"]), "unexpected"),
    "another width in config": (lambda f: config(f, intermediate_size=48), "of another shape"),
    "a vocabulary that is too small": (lambda f: config(f, vocab_size=20), "of another shape"),
    "untied, without its head": (lambda f: config(f, tie_word_embeddings=False), "missing (lm_head.weight)"),
    "NaN": (lambda f: weights(f, with_nan), "holds NaN or infinity"),
    "infinity": (lambda f: weights(f, with_infinity), "holds NaN or infinity"),
    "weights that are cut off": (lambda f: cut(f / "model.safetensors"), "cut off or damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "cut off or damaged"),
    "no tensor": (lambda f: weights(f, lambda s: s.clear()), "no tensor inside"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors inside"),
    "a pickle": (as_pickle, "pytorch_model.bin is a pickle"),
    "a shard that is not there": (lost_shard, "2 of 2 parts are missing (model-00001"),
    "a config that is cut off": (lambda f: cut(f / "config.json"), "config.json:"),
    "an empty config": (lambda f: (f / "config.json").write_text("{}", encoding="utf-8"), "names no model_type"),
    "a list as config": (lambda f: (f / "config.json").write_text("[]", encoding="utf-8"), "no JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json inside"),
    "an unknown model": (lambda f: config(f, model_type="nonesuch"), "no model could be loaded"),
    "a text as a size": (lambda f: config(f, hidden_size="wide"), "Field 'hidden_size' expected int"),
    "another kind of model": (lambda f: config(f, architectures=["BertForMaskedLM"]), "not a model that writes text"),
    "a tokenizer that is cut off": (lambda f: cut(f / "tokenizer.json"), "tokenizer.json:"),
    "a tokenizer without a model": (
        lambda f: (f / "tokenizer.json").write_text("{}", encoding="utf-8"),
        "no tokenizer could",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer could be loaded"),
    "an empty folder": (emptied, "an empty folder"),
    "code of its own": (lambda f: config(f, model_type="own", auto_map={"AutoConfig": "own.Own"}), "could be loaded"),
}


def refuse(function, *words, **options) -> str:
    with pytest.raises(UserError) as error:
        function(*words, **options)
    told = str(error.value)
    assert "; fix: " in told and "\n" not in told, told
    return told


def open_base(folder: Path, **words):
    check_model(folder)
    return load_model(str(folder), load_tokenizer(str(folder)), "float32", **words)


@pytest.mark.parametrize("name", BASES)
def test_a_broken_base_is_refused(broken, name):
    change, reason = BASES[name]
    folder = broken("base")
    change(folder)
    assert reason in refuse(open_base, folder)


TEMPLATES = {
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}": "loses what the user said",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}": "loses what the assistant said",
    "{% for m in messages[-2:] %}{{ m.content }}<|im_end|>{% endfor %}": "loses what the user said",
    "{{ messages[7].content }}": "fails",
    "{% for m in messages %}": "fails",
    "{{ raise_exception('no') }}": "fails",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails_or_loses_a_turn_is_refused(broken, template):
    folder = broken("base")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert TEMPLATES[template] in refuse(load_tokenizer, str(folder))


def test_ids_beyond_the_embedding_are_refused_whatever_loads_the_model(good, broken):
    for name, opened in (("base", open_base), ("reward", lambda folder: load_classifier(str(folder)))):
        folder = broken(name)
        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_tokens(["新"])
        tokenizer.save_pretrained(folder)
        assert "more tokens than the model has embeddings" in refuse(opened, folder)


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
# what is done to a good adapter -> what the error says
ADAPTERS = {
    "keys that match nothing": (
        lambda f: weights(f, lambda s: {k.replace("layers", "blocks"): v for k, v in s.items()}),
        "has no place",
    ),
    "a missing tensor": (lambda f: weights(f, lambda s: s.pop(KEY)), f"is missing ({KEY.replace('A', 'A.default')})"),
    "a further layer": (
        lambda f: weights(f, lambda s: s.update({KEY.replace("1", "7"): s[KEY].clone()})),
        "has no place",
    ),
    "a trained head": (
        lambda f: weights(f, lambda s: s.update({"base_model.model.score.weight": torch.ones(1, 32)})),
        "of a classifier",
    ),
    "another rank in config": (lambda f: config(f, "adapter_config.json", r=8), "says rank 8"),
    "no rank": (lambda f: config(f, "adapter_config.json", r=0), "rank r is 0"),
    "another shape": (lambda f: weights(f, lambda s: s.update({KEY: torch.ones(4, 16)})), "does not fit its base"),
    "NaN": (lambda f: weights(f, with_nan), "holds NaN"),
    "infinity": (lambda f: weights(f, with_infinity), "holds NaN"),
    "no LoRA weight": (lambda f: weights(f, lambda s: {"x": torch.ones(1)}), "no LoRA weight"),
    "targets that the base lacks": (
        lambda f: config(f, "adapter_config.json", target_modules=["c_attn"]),
        "does not fit its base",
    ),
    "fewer targets": (lambda f: config(f, "adapter_config.json", target_modules=["q_proj"]), "has no place"),
    "more targets": (
        lambda f: config(f, "adapter_config.json", target_modules=["q_proj", "up_proj", "v_proj"]),
        "is missing",
    ),
    "another method": (lambda f: config(f, "adapter_config.json", peft_type="IA3"), "peft_type is IA3"),
    "another task": (lambda f: config(f, "adapter_config.json", task_type="SEQ_CLS"), "of a classifier"),
    "a task of other models": (
        lambda f: config(f, "adapter_config.json", task_type="SEQ_2_SEQ_LM"),
        "adapter of SEQ_2_SEQ_LM",
    ),
    "a pickle": (as_pickle, "adapter_model.bin is a pickle"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "weights that are cut off": (lambda f: cut(f / "adapter_model.safetensors"), "cut off or damaged"),
    "a config that is cut off": (lambda f: cut(f / "adapter_config.json"), "adapter_config.json:"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json inside"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_broken_adapter_is_refused(good, broken, name):
    change, reason = ADAPTERS[name]
    folder = broken("adapter")
    change(folder)
    assert reason in refuse(open_base, good / "base", adapter=str(folder))


@pytest.mark.parametrize(
    ("name", "wanted", "reason"),
    [
        ("classifier", "causal", "is a classifier or a reward model"),
        ("reward", "causal", "is a classifier or a reward model"),
        ("classifier", "reward base", "is a classifier or a reward model"),
        ("base", "classifier", "has no trained head"),
        ("adapter", "causal", "merge it first: python scripts/22_merge_adapter.py --adapter"),
        ("reward_adapter", "classifier", "is an adapter without its base"),
    ],
)
def test_a_folder_of_another_kind_is_refused(good, name, wanted, reason):
    assert reason in refuse(check_model, good / name, wanted)


def test_a_classifier_that_calls_itself_a_causal_model_is_refused(broken):
    folder = broken("classifier")
    config(folder, architectures=["Qwen3ForCausalLM"])
    assert "unexpected (score.weight)" in refuse(open_base, folder)
    assert "has no trained head" in refuse(load_classifier, str(folder))
    folder = broken("base")
    config(folder, architectures=["Qwen3ForSequenceClassification"])
    assert "has no trained head (score.weight would be random)" in refuse(load_classifier, str(folder))


def test_a_model_and_an_adapter_in_one_folder_are_refused(good, broken):
    folder = broken("base")
    shutil.copy(good / "adapter/adapter_config.json", folder)
    assert "holds a model and an adapter" in refuse(check_model, folder)


def test_an_adapter_belongs_to_the_base_whose_hash_its_record_holds(good, broken):
    adapter = str(good / "adapter")
    assert check_adapter(adapter, str(good / "base")) is None
    other = broken("base")
    assert check_adapter(adapter, str(other)) is None, "the same files in another place"
    weights(other, lambda state: state[LAYER].add_(1e-3))
    told = refuse(open_base, other, adapter=adapter)
    assert "is another model" in told and "--force-base" in told
    assert "--force-base goes on" in check_adapter(adapter, str(other), force_base=True)
    open_base(other, adapter=adapter, force_base=True)
    assert "is another model" in refuse(
        open_classifier, str(other), str(good / "reward_adapter"), load_tokenizer(adapter), "auto"
    )


def test_an_adapter_without_a_record_is_told_by_its_bases_name(good, broken):
    folder = broken("adapter")
    (folder / "run.json").unlink()
    assert "only the base's name was compared" in check_adapter(folder, str(good / "base"))
    assert "was trained on" in refuse(check_adapter, folder, str(good / "other"))
    config(folder, "adapter_config.json", base_model_name_or_path="Qwen/Qwen3-0.6B")
    assert "fix: --model Qwen/Qwen3-0.6B, or --force-base" in refuse(check_adapter, folder, str(good / "base"))


@pytest.mark.parametrize("place", ["adapter", "checkpoint-20"])
def test_the_record_above_an_adapter_in_its_own_folder_counts(good, tmp_path, place):
    folder = shutil.copytree(good / "adapter", tmp_path / place)
    shutil.move(folder / "run.json", tmp_path / "run.json")
    assert check_adapter(folder, str(good / "base")) is None
    assert "is another model" in refuse(check_adapter, folder, str(good / "other"))


def test_whole_models_load_without_a_word(good, broken, capsys):
    tokenizer = load_tokenizer(str(good / "base"))
    open_base(good / "base", adapter=str(good / "adapter"))
    load_classifier(str(good / "classifier"), "float32", 3)
    open_classifier(str(good / "base"), str(good / "reward_adapter"), tokenizer, "float32")
    untied = broken("base")
    config(untied, tie_word_embeddings=False)
    weights(untied, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    open_base(untied)
    sharded = broken("other")
    model = Qwen3ForCausalLM.from_pretrained(sharded)
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    open_base(sharded)
    assert capsys.readouterr().out == ""
    assert new_classifier(str(untied), tokenizer, torch.float32, num_labels=1).config.num_labels == 1
    assert capsys.readouterr().out == "notice: score.weight is a new head, drawn at random, to be trained\n"
    check_model(good / "reward", "reward base")
    new_classifier(str(good / "reward"), tokenizer, torch.float32, num_labels=1)
    assert capsys.readouterr().out == "", "a reward model that is trained further keeps its head"


def test_a_score_that_is_not_finite_is_no_label(broken):
    folder = broken("classifier")
    weights(folder, lambda s: s["score.weight"].fill_(3e38))
    model, tokenizer = load_classifier(str(folder), "float32")
    assert "for '春眠'; fix: train it again" in refuse(logits_of, model, tokenizer, ["春眠"])


def test_a_reward_model_tells_no_styles_apart(good):
    said = refuse(load_styles, str(good / "reward"))
    assert "is a reward model, it knows no styles; fix: a classifier of stage 31" in said
    load_styles(str(good / "classifier"), "float32")


def test_a_config_that_describes_no_model_is_one_line(broken):
    for values in ({"dtype": "int7", "torch_dtype": "int7"}, {"hidden_size": "many"}):
        folder = broken("base")
        config(folder, **values)
        assert "config" in refuse(empty_model, str(folder))
        shutil.rmtree(folder)
