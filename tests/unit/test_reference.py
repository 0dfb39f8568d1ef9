"""runs/reference.py keeps a finished run whole, and shows how far trainings of the same chain lie apart."""

import importlib.util
import json
import lzma
import sys

import pytest

from common.jsonl import write_json, write_jsonl
from common.settings import UserError
from conftest import ROOT


@pytest.fixture
def reference(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("reference", ROOT / "runs/reference.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "reference", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def finished_run(root, name: str, rhyme: float) -> None:
    report = {
        "figures": {"prompts": 1, "table": {"sft": {"form": [1.0, None, None], "rhyme": [rhyme, 0.1, 0.9]}}},
        "settings": {"task": "poems"},
        "started": "2026-11-26T10:00:00+00:00",
        "device": "cpu",
        "git": {"commit": "0123456789"},
    }
    text = {
        "id": "a#0",
        "model": "base",
        "tokens": 5,
        "reference": None,
        "prompt_id": "a",
        "sample": 0,
        "task": "poems",
        "run": "sft",
        "prompt": [{"role": "user", "content": "写一首诗"}],
        "completion": "白日|依山尽",
        "finish_reason": "stop",
        "seed": 42,
        "meta": {},
    }
    for path, content in (
        (f"results/{name}/compare.run.json", report),
        (f"results/{name}/generations/sft.jsonl", text),
        (f"checkpoints/{name}/sft/run.json", report),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    (root / f"results/{name}/compare.md").write_text("# report\n", encoding="utf-8")


def test_the_spread_between_trainings_stands_beside_the_intervals(reference, tmp_path):
    for name, rhyme in (("poems", 0.5), ("poems_seed43", 0.75), ("poems_seed44", 0.25)):
        finished_run(tmp_path, name, rhyme)
    kept = tmp_path / "results/reference/poems"
    kept.mkdir(parents=True)
    (kept / "about.md").write_text("What got better: rhyme.\n", encoding="utf-8")
    for _ in range(2):  # what a person wrote is still there after a second time
        reference.main(reference.Settings(job="poems", trainings=("poems_seed43", "poems_seed44")))
    page = (kept / "README.md").read_text(encoding="utf-8")
    assert page.count("What got better: rhyme.") == 1 == page.count("# poems: a reference run")
    assert "3 trainings, mean and range between them:" in page and "0.500 (0.250 to 0.750)" in page
    assert "0.500 [0.100, 0.900]" in page and "白日\\|依山尽" in page
    assert "依山尽" in lzma.decompress((kept / "generations/sft.jsonl.xz").read_bytes()).decode()
    assert (kept / "trainings/poems_seed44.md").is_file() and (kept / "records/sft.run.json").is_file()


def test_a_run_that_is_not_there_is_named(reference):
    with pytest.raises(UserError, match="no finished run in .*poems; fix: bash runs/poems.sh"):
        reference.main(reference.Settings(job="poems"))


def test_a_classifier_is_kept_with_its_tables_and_first_labels(tmp_path, reference):
    """A job without generations: no comparison, the reports as they are."""
    record = {"started": "2026-11-26T10:00:00+00:00", "device": "cpu", "git": {"commit": "0123456789"}}
    (tmp_path / "checkpoints/styles/classifier").mkdir(parents=True)
    write_json(tmp_path / "checkpoints/styles/classifier/run.json", record)
    (tmp_path / "results/styles/classified").mkdir(parents=True)
    (tmp_path / "results/styles/classifiers.md").write_text("| accuracy | .9 |\n", encoding="utf-8")
    row = {"input": "能退吗？\n能|行", "predicted_label": "售后", "confidence": 0.75}
    write_jsonl(tmp_path / "results/styles/classified/style_test.jsonl", [row] * 7)
    reference.main(reference.Settings(job="styles", rows=2))
    page = (tmp_path / "results/reference/styles/README.md").read_text(encoding="utf-8")
    assert "| accuracy | .9 |" in page and page.count("| 能退吗？ 能\\|行 | 售后 | 0.750 |") == 2
    assert "`classified/` has every text" in page


def test_every_commit_and_device_of_a_run_is_named(tmp_path, reference):
    """A chain that was taken up again, and a stage that ran outside a clone."""
    finished_run(tmp_path, "poems", 0.5)
    sources = {"early": ("2026-11-25", "an H200", {"commit": "fedcba9876"}), "late": ("2026-11-27", "cpu", None)}
    for name, (day, device, git) in sources.items():
        record = {"started": f"{day}T10:00:00+00:00", "device": device, "git": git}
        (tmp_path / "checkpoints/poems" / name).mkdir()
        write_json(tmp_path / "checkpoints/poems" / name / "run.json", record)
    reference.main(reference.Settings(job="poems"))
    page = (tmp_path / "results/reference/poems/README.md").read_text(encoding="utf-8")
    assert "`bash runs/poems.sh` at commit fedcba98, 01234567, unknown, an H200, cpu, 2026-11-26." in page
