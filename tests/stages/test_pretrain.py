"""Stage 00 on a handful of poems: it learns, survives a kill, and never sees a held-out poem."""

import json
import lzma
import random
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import test_sft_ways as sft_ways
import warm
from common.batching import length_batches
from common.pretraining import checkpoints
from common.pretraining.loss import head_loss
from common.pretraining.muon import Muon, orthogonalise
from common.settings import UserError, read_settings
from conftest import ROOT, SCRIPTS, start_and_kill
from tasks import poems as task
from tasks.poems import corpus as verse_corpus
from tasks.poems.reading import is_strict, request_for
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
    steps = ["--train-tokens", 24000, "--warmup-tokens", 2000, "--batch-tokens", 1024, "--dtype", "float32"]
    often = [
        "--eval-every",
        6,
        "--checkpoint-every",
        6,
        "--keep-checkpoints",
        1,
        "--eval-poems",
        8,
        "--eval-samples",
        2,
    ]
    places = ["--corpus", corpus, "--modern", corpus, "--output-dir", output / "model"]
    return [str(SCRIPTS / "00_pretrain_tiny.py"), *map(str, [*small, *steps, *often, *places])]


def log_of(output) -> list[dict]:
    return [json.loads(line) for line in (output / "checkpoints/log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def stage00():
    return sft_ways.stage("00_pretrain_tiny")


@pytest.fixture(scope="module")
def finished(corpus, stage00, tmp_path_factory):
    """The folder of a run that was killed after its first checkpoint, and went on."""
    output = tmp_path_factory.mktemp("finished")
    command = [sys.executable, *words(corpus, output)]
    start_and_kill(command, output, lambda: checkpoints.checkpoints_in(output / "model/checkpoints"))
    saved = int(checkpoints.checkpoints_in(output / "model/checkpoints")[-1].name.removeprefix("step-"))
    with (output / "model/checkpoints/log.jsonl").open(
        "a", encoding="utf-8"
    ) as file:  # as a kill while saving leaves it
        file.write(json.dumps({"step": saved + 6}) + "\n" + '{"step": 1')
    done = warm.run(command)
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {saved}," in done.stdout
    return output / "model"


def run_in_process(stage00, corpus, output, *more) -> None:
    # here, not in a process of its own: importing torch costs more than the run
    stage00.main(read_settings(stage00.Settings, [*words(corpus, output)[1:], *map(str, more)]))


def test_a_killed_run_ends_as_an_uninterrupted_one(finished, corpus, stage00, tmp_path):
    log = log_of(finished)
    assert [entry["step"] for entry in log] == sorted({entry["step"] for entry in log}), "no step twice"
    assert log[-1]["nll_per_token"] < log[0]["nll_per_token"] and log[-1]["rate_share"] < 1
    figures = json.loads((finished / "run.json").read_text(encoding="utf-8"))["figures"]
    assert figures["tokens"] >= 24000
    assert (finished / "chat_template.jinja").exists()
    run_in_process(stage00, corpus, tmp_path)
    again = log_of(tmp_path / "model")
    assert all(entry.pop("tokens_per_second") > 0 for entry in (*log, *again))
    assert again == log
    assert load_file(tmp_path / "model/model.safetensors").keys() == load_file(finished / "model.safetensors").keys()
    for name, value in load_file(tmp_path / "model/model.safetensors").items():
        assert torch.equal(value, load_file(finished / "model.safetensors")[name]), name


def test_a_run_killed_after_its_last_step_still_has_a_training_loss(finished, corpus, stage00, tmp_path):
    shutil.copytree(finished, tmp_path / "model")
    record = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    record = {**record, "status": "running", "figures": {}}
    record["settings"]["output_dir"] = str(tmp_path / "model")
    (tmp_path / "model/run.json").write_text(json.dumps(record), encoding="utf-8")
    run_in_process(stage00, corpus, tmp_path)
    figures = json.loads((tmp_path / "model/run.json").read_text(encoding="utf-8"))["figures"]
    assert figures["train_loss"] == log_of(finished)[-1]["loss"]
    assert log_of(tmp_path / "model") == log_of(finished)


def test_a_branch_starts_from_a_checkpoint_of_either_size(finished, corpus, stage00, tmp_path, capsys):
    before_decay, last = checkpoints.checkpoints_in(finished / "checkpoints")  # --keep-checkpoints 1
    state = {folder: json.loads((folder / "state.json").read_text(encoding="utf-8")) for folder in (before_decay, last)}
    assert [state[folder]["decaying"] for folder in (before_decay, last)] == [False, True]
    checkpoints.compact(before_decay, tmp_path / "compact")
    size = {
        folder: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (before_decay, tmp_path / "compact")
    }
    assert size[tmp_path / "compact"] < 0.45 * size[before_decay]
    run_in_process(stage00, corpus, tmp_path, "--init", tmp_path / "compact", "--train-tokens", 22000)
    assert f"resumed at step {state[before_decay]['step']}, " in capsys.readouterr().out
    log = log_of(tmp_path / "model")
    assert 22000 <= log[-1]["tokens"] < 24000 and log[0]["nll_per_token"] < log_of(finished)[0]["nll_per_token"]
    with pytest.raises(UserError, match="would raise its rate again"):
        run_in_process(stage00, corpus, tmp_path / "more", "--init", last, "--train-tokens", 90000)


def test_the_weights_alone_start_a_run_of_its_own(finished, corpus, stage00, tmp_path):
    run_in_process(stage00, corpus, tmp_path, "--init", finished, "--train-tokens", 3000)
    log = log_of(tmp_path / "model")
    assert log[-1]["tokens"] < 5000 and log[0]["nll_per_token"] < log_of(finished)[0]["nll_per_token"]


def test_two_runs_never_share_a_checkpoint(finished, corpus, stage00, tmp_path):
    run_in_process(stage00, corpus, tmp_path, "--seed", 7, "--train-tokens", 3000)  # another output is another place
    saved = checkpoints.checkpoints_in(finished / "checkpoints")
    assert saved
    shutil.copytree(saved[-1], tmp_path / "foreign/model/checkpoints" / saved[-1].name)
    record = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    identity = checkpoints.identity_of(record, (*stage00.FREE, "output_dir", "overwrite"))
    assert checkpoints.newest_of(tmp_path / "foreign/model/checkpoints", identity) is not None
    identity["settings"]["seed"] = 7
    with pytest.raises(UserError, match=r"checkpoint of another run \(seed: 42 -> 7\); fix: ") as refused:
        checkpoints.newest_of(tmp_path / "foreign/model/checkpoints", identity)
    assert "\n" not in str(refused.value)
    identity["settings"]["seed"], identity["inputs"]["corpus"] = 42, "0" * 64
    with pytest.raises(UserError, match=r"another run \(corpus: "):
        checkpoints.newest_of(tmp_path / "foreign/model/checkpoints", identity)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(corpus, stage00, tmp_path):
    with pytest.raises(UserError, match=r"(the loss is|is not finite).*fix: .*a lower --lr"):
        run_in_process(stage00, corpus, tmp_path, "--lr", 1e30)
    left = [path.name for path in (tmp_path / "model").rglob("*") if path.suffix == ".safetensors"]
    assert left == []
    assert json.loads((tmp_path / "model/run.json").read_text(encoding="utf-8"))["status"] == "failed"


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path):
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(UserError, match="step 3: bias is not finite"):
        checkpoints.save(tmp_path, model, None, [], {"step": 3, "decaying": False}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_the_rate_is_constant_between_warm_up_and_decay(stage00):
    settings = stage00.Settings(train_tokens=1000, warmup_tokens=100, batch_tokens=10, decay_share=0.2)
    rates = [stage00.rate_share(settings, tokens) for tokens in (0, 40, 90, 500, 800, 900, 1000)]
    assert rates == [0.1, 0.5, 1, 1, 1, 0.5, 0]
    later = stage00.Settings(train_tokens=5000, warmup_tokens=100, batch_tokens=10, decay_share=0.2)
    assert stage00.rate_share(later, 800) == 1, "a run in its constant phase may be given more tokens"
    assert stage00.is_decaying(settings, 801) and not stage00.is_decaying(later, 801)
    without = stage00.Settings(train_tokens=1000, warmup_tokens=100, batch_tokens=10, decay_share=0)
    assert stage00.rate_share(without, 999) == 1 and not stage00.is_decaying(without, 1005), (
        "its end can be gone on from"
    )


def test_texts_with_a_character_spelled_in_bytes_are_left_out(stage00, capsys):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_qwen3")
    rare = "𪚥"  # four dragons
    assert len(tokenizer(rare)["input_ids"]) > 1
    verse = [
        verse_corpus.Poem("", "", text, "五言绝句", f"{dynasty}.0#{n}")
        for n, text in enumerate(("床前明月光", f"床前{rare}月光"))
        for dynasty in ("tang", "song")
    ]
    settings = stage00.Settings(tang_passes=3, chatml_share=0)
    rows = stage00.encode_rows(settings, tokenizer, verse, ["物流很快", f"物流{rare}快"])
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert texts == ["床前明月光"] * 4 + ["物流很快"]  # Tang three times, Song once
    assert capsys.readouterr().out.startswith("3 of 6 texts left out")


def test_strict_poems_are_shown_more_often_and_behind_titles_and_requests(stage00):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_qwen3")
    strict = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
    loose = "松下问童子，言师采药去。只在此山中，云深不知处。"
    verse = [
        verse_corpus.Poem("登鹳雀楼", "", strict, "五言绝句", "tang.0#0"),
        verse_corpus.Poem("寻隐者不遇", "", loose, "五言绝句", "song.0#0"),
        verse_corpus.Poem("𪚥", "", loose, "五言绝句", "song.0#1"),
    ]
    assert is_strict(strict) and not is_strict(loose)

    def texts(**shares):
        rows = stage00.encode_rows(stage00.Settings(**shares), tokenizer, verse, [])
        return [tokenizer.decode(row) for row in rows]

    start, end = "<|endoftext|>", "<|endoftext|>"
    assert texts(title_share=0, chatml_share=0) == [f"{start}{text}{end}" for text in [strict] * 3 + [loose] * 2]
    assert texts(title_share=1, chatml_share=0)[2:] == [
        f"{start}登鹳雀楼\n{strict}{end}",
        f"{start}寻隐者不遇\n{loose}{end}",
        f"{start}{loose}{end}",  # a title spelled in bytes is left out
    ]
    for text in texts(chatml_share=1):
        assert text.startswith(f"{start}<|im_start|>user\n") and text.endswith(f"<|im_end|>{end}")
    asked = [request_for(verse[0], "登鹳雀楼", random.Random(seed)) for seed in range(60)]
    plain = task.instruction("五言绝句", task.themes_of("登鹳雀楼", strict))
    assert {plain, f"{plain} 题目：登鹳雀楼", f"{plain} 韵部：下平十一尤"} < set(asked)
    assert "以《登鹳雀楼》为题，写一首五言绝句" in asked


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_head_loss_is_cross_entropy_with_its_gradients(dtype, error):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 16, generator=generator, requires_grad=True)
    head = torch.nn.Parameter(torch.randn(90, 16, generator=generator))
    targets = torch.randint(0, 90, (70,), generator=generator)
    targets[:40] = (hidden @ head.T)[:40].argmax(-1)  # sure ones, where softmax - 1 would be rounded away in bfloat16
    loss = torch.nn.functional.cross_entropy(hidden @ head.T, targets)
    loss.backward()
    again = torch.nn.Parameter(head.detach().clone())
    value, gradient = head_loss(hidden.detach(), again, targets, dtype, tokens=32)
    assert value == pytest.approx(loss.item(), rel=error)
    for ours, theirs in ((gradient, hidden.grad), (again.grad, head.grad)):
        assert (ours - theirs).norm() < error * theirs.norm()


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


def test_weight_decay_is_cautious():
    weight = torch.nn.Parameter(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    still = torch.nn.Parameter(weight.detach().clone())
    for parameter, weight_decay in ((weight, 0.5), (still, 0.0)):
        parameter.grad = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]) + torch.eye(2)
        Muon([parameter], lr=0.1, weight_decay=weight_decay).step()
    nearer = still.abs() < 1  # where the step itself goes towards 0
    assert nearer.any() and not nearer.all()
    assert torch.equal(weight[~nearer], still[~nearer])
    assert torch.allclose(weight[nearer], still[nearer] - 0.05 * torch.tensor([1.0, -1.0]).expand(2, 2)[nearer])
