"""The poems chain through its real command lines, on a few hundred real poems and the embedded base model."""

import json
import lzma
import os
import subprocess
from pathlib import Path

import pytest

import warm
from conftest import ROOT, page_texts, stage_command

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def stage(script: str, *words, check: bool = True) -> subprocess.CompletedProcess:
    command = stage_command(script, *words)
    done = warm.run(command, env=ENVIRONMENT)
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def records() -> list[dict]:
    return json.loads(lzma.decompress((ROOT / "data/poems/tang.json.xz").read_bytes()))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, records) -> Path:
    """Stage 10 on every 16th record of the shipped corpus."""
    folder = tmp_path_factory.mktemp("poems")
    (folder / "corpus.json").write_text(json.dumps(records[::16], ensure_ascii=False), encoding="utf-8")
    stage(
        "10_prepare_poems.py", "--corpus", folder / "corpus.json", "--max-train", 240, "--output-dir", folder / "data"
    )
    return folder / "data"


def sft_words(prepared: Path, output: Path) -> list:
    files = ["--train-file", prepared / "sft_train.jsonl", "--val-file", prepared / "sft_val.jsonl"]
    short = [
        "--epochs",
        2,
        "--batch-size",
        16,
        "--accumulation",
        2,
        "--eval-steps",
        8,
        "--eval-rows",
        16,
        "--probe-count",
        8,
        "--probe-tokens",
        72,
    ]
    # the base has read verse: 240 rows at the default rate would only be learned by heart
    short += ["--lr", 2e-4, "--lora-dropout", 0.05, "--report-to", "none", "--dtype", "float32"]
    return [*files, *short, "--output-dir", output]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, prepared) -> Path:
    output = tmp_path_factory.mktemp("checkpoints") / "sft"
    stage("20_train_sft.py", *sft_words(prepared, output))
    return output


@pytest.fixture(scope="session")
def merged(trained, prepared) -> Path:
    output = trained.parent / "sft_merged"
    words = ["--adapter", trained, "--probe-file", prepared / "sft_val.jsonl", "--probe-rows", 8, "--greedy-rows", 2]
    stage("22_merge_adapter.py", *words, "--output-dir", output)
    return output


def generate_words(prepared: Path, output: Path, *more) -> list:
    return ["--prompts-file", prepared / "prompts_test.jsonl", "--max-prompts", 12, "--output-file", output, *more]


@pytest.fixture(scope="session")
def generations(tmp_path_factory, prepared, trained, merged) -> Path:
    folder = tmp_path_factory.mktemp("results") / "generations"
    for name, model in (("base", []), ("sft", ["--adapter", trained]), ("sft_merged", ["--model", merged])):
        stage(
            "60_generate.py",
            *generate_words(prepared, folder / f"{name}.jsonl", "--name", name, "--num-samples", 2, *model),
        )
    return folder


# --- stage 10


def test_prepare_twice_gives_the_same_bytes(prepared, tmp_path):
    corpus = prepared.parent / "corpus.json"
    stage("10_prepare_poems.py", "--corpus", corpus, "--max-train", 240, "--output-dir", tmp_path / "again")
    for file in prepared.glob("*.jsonl"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_no_poem_stands_in_two_splits(prepared):
    texts = {
        split: {row["completion"][0]["content"] for row in rows_of(prepared / f"sft_{split}.jsonl")}
        for split in ("train", "val", "test")
    }
    assert not texts["train"] & texts["val"] and not texts["train"] & texts["test"] and not texts["val"] & texts["test"]


def test_a_grown_corpus_moves_no_poem(prepared, records, tmp_path):
    larger = json.dumps(records[::16] + records[1::64], ensure_ascii=False)
    (tmp_path / "larger.json").write_text(larger, encoding="utf-8")
    stage("10_prepare_poems.py", "--corpus", tmp_path / "larger.json", "--output-dir", tmp_path / "larger")

    def texts(folder: Path, split: str) -> set[str]:
        return {row["completion"][0]["content"] for row in rows_of(folder / f"sft_{split}.jsonl")}

    for split in ("train", "val", "test"):
        others = [other for other in ("train", "val", "test") if other != split]
        moved = texts(prepared, split) & set().union(*(texts(tmp_path / "larger", other) for other in others))
        assert not moved


def test_rejected_poems_have_the_fault_they_are_named_for(prepared):
    from tasks.poems import prosody

    rows = rows_of(prepared / "pref_train.jsonl")
    assert {row["meta"]["kind"] for row in rows} == {"rhyme", "meter", "disorder", "theme", "form"}
    for row in rows:
        form, kind = row["meta"]["form"], row["meta"]["kind"]
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        good, bad = prosody.check(chosen, form), prosody.check(rejected, form)
        assert [part.status for part in (good.form, good.rhyme, good.meter)] == ["pass"] * 3
        if kind in ("rhyme", "meter", "disorder"):
            assert sorted(chosen) == sorted(rejected), "same characters: a bag of them tells nothing"
        if kind in ("rhyme", "meter", "form"):
            assert getattr(bad, kind).status == "fail"


def test_cleaning_drops_more_at_each_level_on_the_same_held_out_poems(prepared, tmp_path):
    corpus = prepared.parent / "corpus.json"
    counts, held_out = {}, set()
    for level in ("none", "basic", "full"):
        stage("10_prepare_poems.py", "--corpus", corpus, "--clean", level, "--output-dir", tmp_path / level)
        report = json.loads((tmp_path / level / "report.json").read_text(encoding="utf-8"))
        counts[level] = report["splits"]["train"]["sft"]
        kept = sum(split["sft"] for split in report["splits"].values()) if level == "full" else counts[level]
        kept += report["splits"]["train"]["not among sft for a rare character"]  # still among pairs and prompts
        assert report["read"] == kept + sum(report["dropped"].values()), "every record is kept or has a reason"
        held_out.add((tmp_path / level / "sft_test.jsonl").read_bytes())
    assert counts["none"] > counts["basic"] > counts["full"] > 0
    assert len(held_out) == 1


def test_strict_rows_keep_every_rule_and_some_name_title_and_rhyme(prepared, tmp_path):
    from tasks.poems.reading import is_strict

    corpus, shares = prepared.parent / "corpus.json", ["--title-share", 0.5, "--rhyme-share", 0.5]
    stage("10_prepare_poems.py", "--corpus", corpus, "--clean", "strict", *shares, "--output-dir", tmp_path / "strict")
    full, strict = (rows_of(folder / "sft_train.jsonl") for folder in (prepared, tmp_path / "strict"))
    assert all(is_strict(row["completion"][0]["content"]) for row in strict)
    ids = {row["meta"]["id"] for row in strict}
    assert all(row["meta"]["id"] in ids for row in full if is_strict(row["completion"][0]["content"]))
    for part, name in (("题目", "ask_title"), ("韵部", "ask_rhyme")):
        asked = [row["meta"].get(name) for row in strict]
        assert 0.2 < sum(map(bool, asked)) / len(strict) < 0.7
        for row, value in zip(strict, asked, strict=True):
            assert (f" {part}：{value}" in row["prompt"][0]["content"]) == bool(value)


BROKEN_CORPORA = {
    "array.json": (b'[\n{"title": "x", "paragraphs": ["a"]},\n{"title": \n]', "array.json:4: broken JSON"),
    "gbk.json": ('[\n{"title": "春晓", "paragraphs": []}]'.encode("gbk"), "gbk.json:2: not UTF-8"),
    "nan.json": (b'[{"title": NaN, "paragraphs": ["a"]}]', "NaN is not JSON"),
    "key.json": (b'[{"title": "x"}]', "record 0"),
    "number.json": (b'[{"title": 3, "paragraphs": ["a"]}]', "title or author is not a string"),
    "surrogate.json": (b'[{"title": "\\ud800", "paragraphs": ["a"]}]', "lone surrogate"),
    "object.json": (b"{}", "not a JSON array"),
    "nothing.json": (b"[]", "no training poem is left"),
    "damaged.json.xz": (b"\xfd7zXZ\x00 not really", "damaged xz file"),
}


@pytest.mark.parametrize("name", BROKEN_CORPORA)
def test_a_broken_corpus_is_named_and_costs_nothing(name, tmp_path):
    content, message = BROKEN_CORPORA[name]
    (tmp_path / name).write_bytes(content)
    done = stage("10_prepare_poems.py", "--corpus", tmp_path / name, "--output-dir", tmp_path / "out", check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# --- stage 20


def test_sft_lowers_the_loss_and_stops(trained):
    log = json.loads((trained / "log_history.json").read_text(encoding="utf-8"))
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    record = record_of(trained)
    assert record["status"] == "done" and record["figures"]["stopped"] > 0.9
    probes = [entry for entry in log if "eval_stop_rate" in entry]
    assert len(probes) == len(losses) and all(len(entry["samples"]) == 2 for entry in probes)
    assert (trained / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_sft_again_is_already_done(trained, prepared):
    assert "already done" in stage("20_train_sft.py", *sft_words(prepared, trained)).stdout


def test_sft_refuses_other_settings_without_overwrite(trained, prepared):
    done = stage("20_train_sft.py", *sft_words(prepared, trained), "--lr", 0.1, check=False)
    assert done.returncode == 2 and "lr: 0.0002 -> 0.1" in done.stderr and "--overwrite" in done.stderr


def spoil(prepared: Path, name: str, change) -> bytes:
    line = (prepared / f"{name}_train.jsonl").read_bytes().splitlines()[0]
    return change(line) + b"\n"


BAD_ROWS = {
    "broken JSON": (lambda line: line[:-5], "bad.jsonl:1"),
    "missing key": (lambda line: line.replace(b'"prompt"', b'"question"'), "bad.jsonl:1"),
    "BOM": (lambda line: b"\xef\xbb\xbf" + line, "byte order mark"),
    "gbk": (lambda line: line.decode().encode("gb18030"), "bad.jsonl:1"),
    "NaN": (lambda line: line[:-1] + b', "likes": NaN}', "NaN"),
    "long line": (lambda line: line[:-1] + b', "pad": "' + b"x" * 10_000_000 + b'"}', "bad.jsonl:1"),
    "unknown role": (lambda line: line.replace(b'"user"', b'"human"'), "role"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_generation_stops_on_bad_prompts_and_writes_nothing(name, prepared, tmp_path):
    change, message = BAD_ROWS[name]
    (tmp_path / "bad.jsonl").write_bytes(spoil(prepared, "prompts", change))
    words = ["--prompts-file", tmp_path / "bad.jsonl", "--output-file", tmp_path / "out.jsonl"]
    done = stage("60_generate.py", *words, check=False)
    assert done.returncode == 2 and message in done.stderr and "fix" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_generation_stops_where_an_answer_would_leave_the_models_context(prepared, tmp_path):
    words = ["--prompts-file", prepared / "prompts_val.jsonl", "--max-prompts", 2, "--max-new-tokens", 2048]
    done = stage("60_generate.py", *words, "--output-file", tmp_path / "out.jsonl", check=False)
    assert done.returncode == 2 and "the model reads 2048 tokens" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["gbk", "empty answer"])
def test_training_stops_on_bad_rows_and_keeps_what_is_there(name, trained, prepared, tmp_path):
    def empty(line: bytes) -> bytes:
        row = json.loads(line)
        row["completion"][0]["content"] = ""
        return json.dumps(row, ensure_ascii=False).encode()

    (tmp_path / "bad.jsonl").write_bytes(spoil(prepared, "sft", BAD_ROWS[name][0] if name in BAD_ROWS else empty))
    before = sorted(path.name for path in trained.iterdir())
    words = ["--train-file", tmp_path / "bad.jsonl", "--val-file", prepared / "sft_val.jsonl", "--output-dir", trained]
    done = stage("20_train_sft.py", *words, "--overwrite", check=False)
    assert done.returncode == 2 and "bad.jsonl:1" in done.stderr and "fix" in done.stderr
    assert sorted(path.name for path in trained.iterdir()) == before, "an earlier run is not lost to a bad file"


def test_a_loss_that_is_no_number_ends_the_run_and_saves_nothing(prepared, tmp_path):
    words = [
        "--train-file",
        prepared / "sft_train.jsonl",
        "--val-file",
        prepared / "sft_val.jsonl",
        "--dtype",
        "float32",
    ]
    words += ["--max-steps", 2, "--batch-size", 2, "--accumulation", 1, "--eval-rows", 2, "--probe-count", 0]
    words += ["--lr", 1e25, "--report-to", "none", "--output-dir", tmp_path / "sft"]
    done = stage("20_train_sft.py", *words, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "fix: a lower --lr (now 1e+25)" in done.stderr
    assert record_of(tmp_path / "sft")["status"] == "failed" and not list(tmp_path.rglob("*.safetensors"))


def test_bfloat16_trains_on_a_cpu(prepared, tmp_path):
    """Slow without bf16 units, but it must not fail: auto picks it on CPUs that have them."""
    few = tmp_path / "few.jsonl"
    few.write_text(
        "".join((prepared / "sft_train.jsonl").read_text(encoding="utf-8").splitlines(True)[:4]), encoding="utf-8"
    )
    words = ["--train-file", few, "--val-file", prepared / "sft_val.jsonl", "--dtype", "bfloat16", "--max-steps", 1]
    words += ["--batch-size", 2, "--accumulation", 1, "--eval-rows", 2, "--probe-count", 0, "--probe-tokens", 4]
    stage("20_train_sft.py", *words, "--report-to", "none", "--output-dir", tmp_path / "sft")
    assert record_of(tmp_path / "sft")["status"] == "done"


# --- stage 22


def test_merged_model_is_the_adapters_model(merged):
    report = json.loads((merged / "merge_report.json").read_text(encoding="utf-8"))
    assert report["passed"] and report["logits"]["max"] < 2e-3 and report["weights"]["wrong"] == 0
    assert report["logits"]["top1"] > 0.999 and report["greedy_equal"] == report["greedy_compared"] == 2


def test_a_merge_beyond_tolerance_fails(trained, prepared, tmp_path):
    words = ["--adapter", trained, "--probe-file", prepared / "sft_val.jsonl", "--probe-rows", 2, "--greedy-rows", 1]
    done = stage("22_merge_adapter.py", *words, "--max-difference", 1e-12, "--output-dir", tmp_path / "m", check=False)
    assert done.returncode == 1 and "NOT the adapter's model" in done.stderr
    assert record_of(tmp_path / "m")["status"] == "failed"


# --- stage 60


def test_adapter_and_merged_model_write_the_same_greedy_texts(trained, merged, prepared, tmp_path):
    texts = []
    for name, model in (("sft", ["--adapter", trained]), ("sft_merged", ["--model", merged])):
        output = tmp_path / f"{name}.jsonl"
        stage("60_generate.py", *generate_words(prepared, output, "--name", name, "--temperature", 0, *model))
        texts.append({row["id"]: row["completion"] for row in rows_of(output)})
    assert texts[0] == texts[1]


def test_generation_rows_are_complete(generations):
    rows = rows_of(generations / "sft.jsonl")
    assert len(rows) == len({row["id"] for row in rows}) == 24
    assert {row["seed"] for row in rows} == {42, 43}
    for row in rows:
        assert row["id"] == f"{row['prompt_id']}#{row['sample']}" and row["finish_reason"] in ("stop", "length")
        assert row["reference"] and row["meta"]["form"] and row["tokens"] > 0 and "<|" not in row["completion"]


def test_one_prompt_and_typed_prompts(merged):
    done = stage(
        "60_generate.py",
        "--model",
        merged,
        "--prompt",
        "写一首[五言绝句] 要求4句 主题为: 山水、自然、宁静",
        "--num-samples",
        2,
    )
    assert done.stdout.count("[stop, ") + done.stdout.count("[length, ") == 2
    command = stage_command("60_generate.py", "--model", merged, "--interactive")
    typed = warm.run(command, env=ENVIRONMENT, typed="写一首七言绝句\n\n")
    assert typed.returncode == 0 and "tokens]" in typed.stdout


def test_an_adapter_of_another_base_is_refused(trained, merged, prepared, tmp_path):
    words = generate_words(prepared, tmp_path / "x.jsonl", "--model", merged, "--adapter", trained)
    done = stage("60_generate.py", *words, check=False)
    assert done.returncode == 2 and "is another model" in done.stderr and "--force-base" in done.stderr
    assert not (tmp_path / "x.jsonl").exists()
    done = stage("60_generate.py", *words, "--force-base", "--max-prompts", 1, "--max-new-tokens", 2)
    notice = json.loads((tmp_path / "x.run.json").read_text(encoding="utf-8"))["figures"]["base_notice"]
    assert f"notice: {notice}" in done.stdout and "--force-base goes on" in notice


# --- stages 70 and 72


def test_scores_and_report(generations, trained):
    scores, report = generations.parent / "scores", generations.parent / "compare"
    stage("70_score.py", "--generations", generations, "--output-dir", scores, "--bootstrap", 200)
    done = stage(
        "72_compare.py",
        "--generations",
        generations,
        "--scores",
        scores,
        "--checkpoints",
        trained.parent,
        "--output",
        report,
        "--examples",
        4,
    )
    for name in ("base", "sft", "sft_merged"):
        assert len(rows_of(scores / f"{name}.jsonl")) == 24
        assert f"| {name} " in done.stdout
    page = report.with_suffix(".html").read_text(encoding="utf-8")
    shown = {text for _, _, text in page_texts(page)}
    assert sum(row["reference"] in shown for row in rows_of(generations / "sft.jsonl")) >= 4
    assert "http://" not in page and "https://" not in page
