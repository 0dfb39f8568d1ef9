"""Stage 00 on a handful of poems: it learns, survives a kill, and never sees a held-out poem."""

import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import test_sft_ways as sft_ways
from common.batching import length_batches
from common.pretraining.muon import Muon, orthogonalise
from conftest import ROOT, SCRIPTS
from tasks.poems import corpus as verse_corpus
from tasks.text_metrics import runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    records = json.loads(lzma.decompress((ROOT / "data/poems/tang.json.xz").read_bytes()))
    for dynasty, part in (("tang", records[::60]), ("song", records[1::60])):
        (folder / f"poet.{dynasty}.0.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    (folder / "pos_sentences.txt").write_text("物流很快，包装也好。\n这本书值得一读。\n", encoding="utf-8")
    return folder


def words(corpus, output) -> list[str]:
    small = [
        "--hidden-size",
        32,
        "--layers",
        1,
        "--heads",
        2,
        "--kv-heads",
        1,
        "--intermediate-size",
        48,
        "--min-count",
        5,
    ]
    steps = ["--train-tokens", 24000, "--batch-tokens", 1024, "--eval-every", 6, "--eval-poems", 8]
    places = ["--corpus", corpus, "--modern", corpus, "--output-dir", output / "model", "--work-dir", output / "work"]
    return [sys.executable, str(SCRIPTS / "00_pretrain_tiny.py"), *map(str, [*small, *steps, *places])]


def test_pretraining_killed_in_the_middle_goes_on(corpus, tmp_path):
    process = subprocess.Popen(words(corpus, tmp_path), stdout=subprocess.DEVNULL, env={**os.environ})
    while not (tmp_path / "work/checkpoint.pt").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(words(corpus, tmp_path), capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    log = [json.loads(line) for line in (tmp_path / "work/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in log] == sorted(entry["step"] for entry in log)
    assert log[-1]["nll_per_token"] < log[0]["nll_per_token"]
    figures = json.loads((tmp_path / "model/run.json").read_text(encoding="utf-8"))["figures"]
    assert figures["tokens"] >= 24000
    more = [*words(corpus, tmp_path / "more"), "--init", str(tmp_path / "model"), "--train-tokens", "3000"]
    done = subprocess.run(more, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    further = json.loads((tmp_path / "more/work/log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert further["nll_per_token"] < log[0]["nll_per_token"], "it went on from the weights it was given"
    assert (tmp_path / "model/model.safetensors").exists() and (tmp_path / "model/chat_template.jinja").exists()


def test_texts_with_a_character_spelled_in_bytes_are_left_out(capsys):
    from transformers import AutoTokenizer

    module, tokenizer = sft_ways.stage("00_pretrain_tiny"), AutoTokenizer.from_pretrained(ROOT / "data/tiny_qwen3")
    rare = "𪚥"  # four dragons
    assert len(tokenizer(rare)["input_ids"]) > 1
    verse = [verse_corpus.Poem("", "", text, "五言绝句", f"{dynasty}.0#{n}")
             for n, text in enumerate(("床前明月光", f"床前{rare}月光")) for dynasty in ("tang", "song")]  # fmt: skip
    settings = module.Settings(tang_passes=3, chatml_share=0)
    rows = module.encode_rows(settings, tokenizer, verse, ["物流很快", f"物流{rare}快"])
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert texts == ["床前明月光"] * 4 + ["物流很快"]  # Tang three times, Song once
    assert capsys.readouterr().out.startswith("3 of 6 texts left out")


def test_splits_are_decided_by_the_text_alone():
    records = json.loads(lzma.decompress((ROOT / "data/poems/tang.json.xz").read_bytes()))
    poems, _ = verse_corpus.clean(records[:6000], "full", "tang")
    splits, dropped = verse_corpus.split_poems(poems)
    assert sum(map(len, splits.values())) + dropped == len(poems)
    shuffled = poems[:]
    random.Random(0).shuffle(shuffled)
    again, _ = verse_corpus.split_poems(shuffled)
    assert {name: {p.key for p in part} for name, part in splits.items()} == {
        name: {p.key for p in part} for name, part in again.items()
    }
    held_out = {
        run for name in ("val", "test") for poem in splits[name] for run in runs(poem.key, verse_corpus.SHARED_RUN)
    }
    assert all(held_out.isdisjoint(runs(poem.key, verse_corpus.SHARED_RUN)) for poem in splits["train"])


def test_length_batches_hold_every_row_once_within_the_budget():
    lengths = [random.Random(i).randint(5, 120) for i in range(1000)]
    batches = length_batches(lengths, token_budget=512, seed=1)
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 512 for batch in batches)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own():
    assert sorted(map(sorted, length_batches([10, 900, 10], token_budget=100, seed=0))) == [[0, 2], [1]]


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    matrices = orthogonalise(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), steps=8)
    values = torch.linalg.svdvals(matrices)
    assert values.min() > 0.5 and values.max() < 1.4


def test_muon_finds_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(200, 8, generator=generator), torch.randn(8, 8, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], lr=0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 300)
        optimizer.zero_grad()
        (inputs @ (weight - target)).square().mean().backward()
        optimizer.step()
    assert (weight - target).abs().max() < 0.05
