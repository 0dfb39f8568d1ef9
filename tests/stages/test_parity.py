"""Stage 23 finds training, transformers and vLLM in agreement, and says where they are not; stage 22's proof on every
kind of model."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import trl
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.merging import certificate, faults, probe_texts, text_logits
from common.models import load_model, load_tokenizer
from common.settings import read_settings
from conftest import SCRIPTS
from vllm_models import BASE, rows, save_adapter, save_merged, write

QWEN3 = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """adapter, merged and rows.jsonl on the embedded base."""
    folder = tmp_path_factory.mktemp("parity")
    save_adapter(folder / "adapter")
    save_merged(folder / "merged", folder / "adapter")
    write(folder / "rows.jsonl", rows(6))
    return folder


@pytest.fixture
def check(run_stage, tmp_path, made):
    def run(*words, adapter: Path = made / "adapter", merged: Path = made / "merged", server: str = "none"):
        files = ["--adapter", adapter, "--merged", merged, "--rows-file", made / "rows.jsonl"]
        short = ["--max-prompts", 3, "--max-new-tokens", 24, "--server", server]
        done = run_stage(
            "23_check_parity.py", *files, *short, "--output-file", tmp_path / "p.json", *words, check=False
        )
        assert done.returncode in (0, 1), done.stderr
        return done, json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))

    return run


def with_template(folder: Path, source: Path, template: str) -> Path:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def kinds(report: dict) -> set[str]:
    return {fault["what"] for fault in report["differences"]}


def test_adapter_and_merged_model_agree_and_a_check_without_vllm_says_so(check):
    done, report = check()
    assert done.returncode == 0 and report["passed"] and not report["vllm"]
    for line in (
        "tokens, chained, thinking on: training = hf in 6 of 6 rows",
        "adapter = merged in 3 of 3",
        "vLLM was not compared",
    ):
        assert line in done.stdout


# what is altered in the template of the merged model -> what stage 23 says
ALTERED = {
    "a space in each turn": ("message.role + '\\n'", "message.role + '\\n '", "training and hf: prompt"),
    "no line end behind the question": ("'<|im_start|>assistant\\n'", "'<|im_start|>assistant'", "training and answer"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_template_altered_on_purpose_is_caught(check, made, tmp_path, name):
    old, new, what = ALTERED[name]
    template = (made / "merged/chat_template.jinja").read_text(encoding="utf-8")
    assert old in template
    done, report = check(merged=with_template(tmp_path / "altered", made / "merged", template.replace(old, new)))
    assert done.returncode == 1 and not report["passed"] and what in kinds(report)
    assert f"DIFFERENT, {what}, row 0, token" in done.stdout and "not the same" in done.stderr


def test_a_training_template_that_writes_into_the_answer_is_caught(check, made, tmp_path):
    template = (made / "adapter/chat_template.jinja").read_text(encoding="utf-8")
    altered = template.replace("{%- generation -%}{{- message", "{%- generation -%}{{- '答：' + message")
    assert altered != template
    done, report = check("--no-chained", adapter=with_template(tmp_path / "altered", made / "adapter", altered))
    assert done.returncode == 1 and kinds(report) == {"training and answer"}


def test_thinking_blocks_that_trl_trains_into_earlier_turns_are_caught(check, made, tmp_path):
    """trl trains conversations on its own copy of Qwen3's template, which keeps an empty thinking block in every
    turn."""
    template = QWEN3.read_text(encoding="utf-8")
    folders = {name: with_template(tmp_path / name, made / name, template) for name in ("adapter", "merged")}
    done, report = check(**folders)
    assert done.returncode == 1 and kinds(report) == {"training and hf: prompt"}
    assert {fault["turns"] for fault in report["differences"]} == {"chained"}
    done, report = check("--row-style", "template", "--overwrite", **folders)
    assert done.returncode == 0 and report["passed"], done.stdout


def test_another_model_is_caught_and_near_ties_are_listed(check, made, tmp_path):
    other = shutil.copytree(made / "merged", tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.neg_()
    model.save_pretrained(other)
    done, report = check(merged=other)
    assert done.returncode == 1 and kinds(report) == {"adapter and merged: text"}
    assert (
        report["model"]["weights"]["tensors"] == ["model.layers.5.mlp.down_proj.weight"]
        or len(report["model_faults"]) == 1
    )
    assert "not those of base + adapter" in done.stderr and "fix:" in done.stderr
    assert min(fault["gap"] for fault in report["differences"]) >= 1e-3
    done, tied = check("--near-tie", 1e9, "--overwrite", merged=other)
    assert len(tied["near_ties"]) == len(report["differences"]) and "near-tie, adapter" in done.stdout
    assert done.returncode == 1 and not tied["differences"] and len(tied["model_faults"]) == 1, (
        "weights are no near-tie"
    )


def test_an_adapter_that_is_missing_is_a_short_error(run_stage, made, tmp_path):
    words = ["--adapter", made / "nothing", "--merged", made / "merged", "--output-file", tmp_path / "p.json"]
    done = run_stage("23_check_parity.py", *words, check=False)
    assert done.returncode == 2 and "no such model folder" in done.stderr and "Traceback" not in done.stderr


# --- with vLLM


@pytest.mark.all
@needs_vllm
def test_training_hf_merged_and_a_vllm_server_agree(check):
    done, report = check(server="start")
    assert done.returncode == 0 and report["passed"] and report["vllm"], done.stdout
    for line in (
        "tokens, chained, thinking on: training = hf = vllm in 6 of 6 rows",
        "adapter = merged = vllm in 3 of 3",
    ):
        assert line in done.stdout


@pytest.mark.all
@needs_vllm
def test_a_thinking_template_agrees_and_one_altered_behind_the_servers_back_is_caught(check, made, tmp_path):
    from common.vllm_engine import serve

    template = QWEN3.read_text(encoding="utf-8")
    folders = {name: with_template(tmp_path / name, made / name, template) for name in ("adapter", "merged")}
    with serve(str(folders["merged"]), "float32", 512) as url:
        done, report = check("--row-style", "template", server=url, **folders)
        assert done.returncode == 0 and report["passed"] and report["vllm"], done.stdout
        altered = template.replace("enable_thinking is false", "enable_thinking is true")
        assert altered != template
        for name in folders:
            folders[name] = with_template(tmp_path / f"{name}_altered", made / name, altered)
        done, report = check("--row-style", "template", "--overwrite", server=url, **folders)
    assert done.returncode == 1 and "hf and vllm: prompt" in kinds(report)
    assert {fault["thinking"] for fault in report["differences"] if fault["what"] == "hf and vllm: prompt"} == {
        False,
        True,
    }


# --- the merge certificate


def untied_base(folder: Path) -> str:
    """The embedded base with a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.1)
    model.save_pretrained(folder)
    for file in Path(BASE).glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(Path(BASE) / "chat_template.jinja", folder)
    return str(folder)


@pytest.fixture(scope="module")
def merge():
    """merge(flags): stage 22 in this process; its exit code."""
    module = load_stage("22_merge_adapter")

    def run(*words) -> int:
        short = ["--probe-rows", 8, "--greedy-rows", 2, "--greedy-tokens", 8]
        try:
            module.main(read_settings(module.Settings, [str(word) for word in [*words, *short]]))
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def load_stage(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["tied", "untied", 1, 5])
def test_merge_certificate(merge, made, tmp_path, kind, dtype):
    base = untied_base(tmp_path / "base") if kind == "untied" else BASE
    labels = kind if isinstance(kind, int) else 0
    adapter = save_adapter(tmp_path / "adapter", base, labels)
    merged = tmp_path / "merged"
    words = ["--adapter", adapter, "--probe-file", made / "rows.jsonl", "--dtype", dtype]
    assert merge(*words, "--output-dir", merged) == 0
    report = json.loads((merged / "merge_report.json").read_text(encoding="utf-8"))
    assert report["passed"] and report["dtype"] == dtype and report["compared_in"] == "float32"
    assert report["weights"]["wrong"] == 0 < report["weights"]["compared"]
    assert 0 < report["logits"]["mean"] <= report["allowed"]["mean"]
    assert (report["noise"] is not None) == (dtype == "bfloat16")
    figures = json.loads((merged / "run.json").read_text(encoding="utf-8"))["figures"]
    assert all(figures[name] == report[name] for name in ("logits", "noise", "allowed", "weights", "passed"))
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] == (kind != "untied") and config["dtype"] == dtype
    with safe_open(merged / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert ("lm_head.weight" in names) == (kind == "untied") and ("score.weight" in names) == bool(labels)
        assert not labels or file.get_slice("score.weight").get_shape()[0] == labels


def planted(fault: str, adapter: Path, dtype: torch.dtype, folder: Path) -> Path:
    """A merged folder with a fault that a user's merge may have."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if fault == "another base":  # a sibling: every matrix moved by a hundredth of its spread
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * weight.std() * 0.01)
    model = PeftModel.from_pretrained(model, adapter)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and fault == "scale x 2":
            module.scaling["default"] *= 2
        if isinstance(module, LoraLayer) and fault == "a layer left out" and "layers.2." in name:
            module.scaling["default"] = 0.0
    model.merge_and_unload().to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["none", "another base", "scale x 2", "a layer left out"])
def test_the_certificate_catches_a_wrong_merge_in_both_dtypes(made, tmp_path, fault, dtype):
    merged = planted(fault, made / "adapter", getattr(torch, dtype), tmp_path / "merged")
    tokenizer = load_tokenizer(BASE)
    adapted = load_model(BASE, tokenizer, "float32", str(made / "adapter"))
    rough = load_model(BASE, tokenizer, dtype, str(made / "adapter")) if dtype == "bfloat16" else None
    report = certificate(
        adapted,
        load_model(str(merged), tokenizer, "float32"),
        rough,
        lambda model, text: text_logits(model, tokenizer, text),
        probe_texts(tokenizer, rows(4)),
        dtype,
    )
    found = faults(report)
    assert bool(found) == (fault != "none"), report
    if found:
        assert "not those of base + adapter" in found[0] and "fix: merge again" in found[0]
    if fault != "none" and dtype == "float32":
        assert report["logits"]["mean"] > report["allowed"]["mean"], "the logits alone tell it too"


def test_merging_into_tied_embeddings_moves_the_head_too_and_is_refused(merge, made, tmp_path, capsys):
    """A LoRA on the embedding leaves a tied head alone; merged, it moves the head as well: another model."""
    adapter = save_adapter(tmp_path / "adapter", target_modules=["embed_tokens"])
    words = ["--adapter", adapter, "--probe-file", made / "rows.jsonl", "--dtype", "float32"]
    assert merge(*words, "--output-dir", tmp_path / "merged") == 1
    told = capsys.readouterr().err
    assert "NOT the adapter's model" in told and "use it as it is (stage 60, --adapter)" in told
