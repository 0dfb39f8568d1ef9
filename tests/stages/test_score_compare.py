"""Stages 70 and 72: figures that can be checked by hand, honest intervals, and a page that no model text can break."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import pytest

import warm
from common.evaluation.comparison import falls
from common.evaluation.statistics import bootstrap_difference, bootstrap_mean
from common.jsonl import read_json, read_jsonl, write_jsonl
from common.settings import ROOT
from conftest import SCRIPTS, load_script, page_data_of, page_texts

PAYLOAD = "<script>alert(1)</script><img src=https://example.org/x.png>"
UNLISTED = "嗯"  # a Han character that the rhyme table lacks: as a rhyme word it makes the verdict unknown
PROMPTS = 8


def stage(folder: Path, script: str, *args, check: bool = True) -> subprocess.CompletedProcess:
    """The real command line; conftest's run_stage has a new folder for every test, these tests share one."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPTS / script), *map(str, args)]
    done = warm.run(command, cwd=folder, env=env)
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def score(folder: Path, *args, **kwargs):
    return stage(folder, "70_score.py", "--output-dir", "scores", "--bootstrap", 500, *args, **kwargs)


def compare(folder: Path, *args, **kwargs):
    where = ("--generations", "generations", "--scores", "scores", "--checkpoints", "checkpoints")
    return stage(folder, "72_compare.py", *where, "--output", "compare", "--bootstrap", 500, *args, **kwargs)


@pytest.fixture(scope="module")
def verse():
    """Held-out Tang poems that pass form, rhyme and meter."""
    from tasks.poems import corpus as verse_corpus
    from tasks.poems import prosody

    records = verse_corpus.load_records(ROOT / "data" / "poems" / "tang.json.xz")
    poems = (verse_corpus.clean_record(record, "full", "tang")[0] for record in records)
    good = (
        poem
        for poem in poems
        if poem and verse_corpus.split_of(poem.key) == "test" and passes_all(prosody.check(poem.text, poem.form))
    )
    return list(islice(good, PROMPTS + 1))


def passes_all(verdict) -> bool:
    return all(part.status == "pass" for part in (verdict.form, verdict.rhyme, verdict.meter))


def row(poem, number: int, sample: int, model: str, completion: str, finish: str = "stop") -> dict:
    from tasks import poems

    meta = {"form": poem.form, "themes": ["山水"]}
    return {
        "id": f"p{number}#{sample}",
        "prompt_id": f"p{number}",
        "sample": sample,
        "seed": 42,
        "prompt": poems.messages(meta),
        "completion": completion,
        "reference": poem.text,
        "model": model,
        "finish_reason": finish,
        "tokens": len(completion) + 1,
        "meta": meta,
    }


def unknown_rhyme(text: str) -> str:
    """The poem with its second line ending in a character whose rhyme nobody knows."""
    end = re.search("[，。！？；].*?([，。！？；])", text).start(1)
    return text[: end - 1] + UNLISTED + text[end:]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, verse):
    """A Qwen3 with random weights, saved as a folder, and its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from common.pretraining.char_tokenizer import build_tokenizer

    folder, threads = tmp_path_factory.mktemp("tiny"), torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small only waits for the second
    tokenizer = build_tokenizer("".join(poem.text for poem in verse) + "写一首要求句主题为:0123456789[]")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        max_position_embeddings=160,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    yield folder, model, tokenizer
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, verse):
    """Three runs over 8 prompts, scored by stage 70.

    base: two samples; 0 is the real poem, 1 has lost its last character and was cut off.
    sft: two samples; real poems, but p0 and p1 with a rhyme word of unknown rhyme, p2 cut, p7#0 a <script>.
    other: the real poems of p4 to p8, one sample: another set of prompts.
    """
    folder = tmp_path_factory.mktemp("runs")
    base, sft = [], []
    for number, poem in enumerate(verse[:PROMPTS]):
        base.append(row(poem, number, 0, "base", poem.text))
        base.append(row(poem, number, 1, "base", poem.text[:-2], "length"))
        for sample in (0, 1):
            text = unknown_rhyme(poem.text) if number < 2 else poem.text[:-2] if number == 2 else poem.text
            sft.append(row(poem, number, sample, "sft", PAYLOAD if (number, sample) == (7, 0) else text))
    other = [row(poem, number, 0, "other", poem.text) for number, poem in enumerate(verse) if number >= 4]
    for name, rows in (("base", base), ("sft", sft), ("other", other)):
        write_jsonl(folder / "generations" / f"{name}.jsonl", rows)
    cost = {"stage": "20_train_sft", "status": "done", "wall_seconds": 90.0, "peak_memory_mib": 1234, "device": "cpu"}
    (folder / "checkpoints" / "sft").mkdir(parents=True)
    (folder / "checkpoints" / "sft" / "run.json").write_text(json.dumps(cost), encoding="utf-8")
    done = score(folder, "--generations", "generations", "--nll-model", "")
    return folder, done.stdout


@pytest.fixture(scope="module")
def compared(scored):
    folder, _ = scored
    done = compare(folder, "--runs", "base", "sft")
    page, report = ((folder / f"compare.{ending}").read_text(encoding="utf-8") for ending in ("html", "md"))
    return page, report, done.stdout


def table_of(folder: Path, run: str) -> dict:
    return read_json(folder / "scores" / f"{run}.run.json")["figures"]["table"]


# --- stage 70


def test_scores_are_those_counted_by_hand(scored):
    folder, output = scored
    base, sft = table_of(folder, "base"), table_of(folder, "sft")
    assert base["form"]["mean"] == base["all_three"]["mean"] == base["stopped"]["mean"] == 0.5
    assert sft["form"]["mean"] == 13 / 16  # p2 twice and the script are no poems
    assert sft["stopped"]["mean"] == 1.0
    assert "| form | 0.500 [" in output
    assert output.splitlines()[-1].startswith("next: python scripts/72_compare.py --task poems --generations ")
    run = folder.name  # the report and the trainings of that run, not those of the job
    assert f" --checkpoints checkpoints/{run} " in output.splitlines()[-1] and f"{run}/compare" in output


def test_none_is_left_out_of_the_mean_and_never_0(scored):
    folder, _ = scored
    rhyme = table_of(folder, "sft")["rhyme"]
    assert (rhyme["texts"], rhyme["mean"]) == (12, 9 / 12)  # as 0 the four unknown ones would make it 9/16
    unknown = [line for line in read_jsonl(folder / "scores" / "sft.jsonl") if line["scores"]["rhyme"] is None]
    assert [line["id"] for line in unknown] == ["p0#0", "p0#1", "p1#0", "p1#1"]


def test_a_score_row_names_its_text_and_holds_every_metric(scored):
    from tasks import poems

    folder, _ = scored
    rows = read_jsonl(folder / "scores" / "base.jsonl")
    assert list(rows[1]) == ["id", "prompt_id", "model", "finish_reason", "scores"]
    assert (rows[1]["id"], rows[1]["model"], rows[1]["finish_reason"]) == ("p0#1", "base", "length")
    assert set(rows[1]["scores"]) == {*poems.METRICS, "characters", "stopped"}


def test_golden_texts_are_scored_once_a_prompt_and_have_no_ending(scored):
    folder, _ = scored
    golden = read_jsonl(folder / "scores" / "base.reference.jsonl")
    assert [line["id"] for line in golden] == [f"p{number}" for number in range(PROMPTS)]
    assert all(line["scores"]["all_three"] == 1 and line["scores"]["near_copy"] == 0 for line in golden)
    assert all(line["finish_reason"] is None and "stopped" not in line["scores"] for line in golden)


def test_distinct_is_taken_over_sets_of_one_size(scored):
    from tasks import poems

    folder, _ = scored
    rows = read_jsonl(folder / "generations" / "base.jsonl")
    values = [poems.SET_METRICS["distinct_2"]([r["completion"] for r in rows if r["sample"] == s]) for s in (0, 1)]
    figure = table_of(folder, "base")["distinct_2"]
    assert (figure["sets"], figure["set_size"], figure["mean"]) == (2, PROMPTS, pytest.approx(sum(values) / 2))
    assert (figure["low"], figure["high"]) == (min(values), max(values))
    single = table_of(folder, "other")["distinct_2"]
    assert (single["sets"], single["low"]) == (1, None)


def test_scoring_again_is_already_done(scored):
    folder, _ = scored
    before = (folder / "scores" / "sft.jsonl").stat().st_mtime_ns
    done = score(folder, "--generations", "generations/sft.jsonl", "--nll-model", "")
    assert "already done" in done.stdout and "| form | 0.812" in done.stdout
    assert (folder / "scores" / "sft.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--task", "sonnets"), "unknown task 'sonnets'; fix: use one of "),
        (("--generations", "nowhere*.jsonl"), "no generation file at"),
        (("--generations", "broken.jsonl"), "broken.jsonl:2: broken JSON"),
        (("--generations", "unfinished.jsonl"), "no finished generation file"),
    ],
)
def test_bad_input_to_scoring_is_one_clear_error(tmp_path, verse, args, message):
    line = json.dumps(row(verse[0], 0, 0, "broken", verse[0].text), ensure_ascii=False)
    (tmp_path / "broken.jsonl").write_text(f"{line}\n{line[:50]}\n", encoding="utf-8")
    (tmp_path / "unfinished.jsonl").write_text(f"{line}\n", encoding="utf-8")
    (tmp_path / "unfinished.run.json").write_text('{"stage": "60_generate", "status": "running"}', encoding="utf-8")
    done = score(tmp_path, "--generations", "broken.jsonl", "--nll-model", "", *args, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "scores").exists()


# --- intervals


def test_an_interval_holds_the_mean_and_narrows_with_more_prompts():
    widths = []
    for prompts in (20, 80, 320):
        values = [float(number % 4 == 0) for number in range(prompts)]
        mean, low, high = bootstrap_mean(values, list(range(prompts)))
        assert mean == 0.25 and low < mean < high
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]
    assert widths[2] == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 320) ** 0.5, rel=0.1)  # the normal approximation


def test_samples_that_repeat_each_other_add_no_certainty():
    values = [float(number % 4 == 0) for number in range(50)]
    alone = bootstrap_mean(values, list(range(50)))
    repeated = bootstrap_mean(values * 4, list(range(50)) * 4)
    assert repeated == pytest.approx(alone)


def test_all_0_or_all_1_is_not_certainty_and_one_prompt_has_no_interval():
    assert bootstrap_mean([0.0] * 512, list(range(512))) == (0.0, 0.0, pytest.approx(0.00718, abs=1e-5))
    assert bootstrap_mean([1.0, None, 1.0], ["a", "b", "c"]) == (1.0, pytest.approx(0.025**0.5), 1.0)
    assert bootstrap_mean([1.0, 0.0], ["a", "a"]) == (0.5, None, None)
    assert bootstrap_mean([None, None], ["a", "b"]) == (None, None, None)


def test_a_paired_difference_is_narrower_and_keeps_to_common_prompts():
    hard = [number / 40 for number in range(40)]
    better = [value + 0.1 + 0.01 * (number % 3) for number, value in enumerate(hard)]
    ids = list(range(40))
    mean, low, high = bootstrap_difference(hard, ids, better, ids)
    assert mean == pytest.approx(0.1 + 0.01 * (13 + 2 * 13) / 40) and 0 < high - low < 0.01
    alone = bootstrap_mean(better, ids)
    assert high - low < 0.1 * (alone.high - alone.low)
    assert bootstrap_difference([5.0, *hard], ["x", *ids], [*better, 9.0], [*ids, "y"]).mean == pytest.approx(mean)


# --- NLL per character


def test_nll_equals_a_naive_computation_and_ignores_padding(verse, tiny_model):
    import torch

    from common.likelihood import nll_per_character

    _, model, tokenizer = tiny_model
    rows = [row(poem, number, 0, "base", poem.text) for number, poem in enumerate(verse)]
    rows.append(row(verse[0], 98, 0, "base", "好😀x"))  # the emoji is four byte tokens and one character
    rows.append({**rows[0], "completion": [{"role": "assistant", "content": verse[0].text}]})  # as SFT rows have it
    model.train()
    values = nll_per_character(model, tokenizer, rows, token_budget=512)
    assert model.training  # the mode it was in
    model.eval()
    for item, value in list(zip(rows, values, strict=True))[:-1:3]:
        prompt = tokenizer.apply_chat_template(item["prompt"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt + item["completion"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        logprob = sum(logprobs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
        assert value == pytest.approx(-logprob / len(item["completion"]), rel=1e-5)
    assert values[-1] == pytest.approx(values[0], rel=1e-5)
    assert nll_per_character(model, tokenizer, rows, token_budget=1) == pytest.approx(values, rel=1e-5)


def test_nll_of_an_empty_or_overlong_text_is_none(verse, tiny_model):
    from common.likelihood import nll_per_character

    _, model, tokenizer = tiny_model
    rows = [row(verse[0], 0, 0, "base", text) for text in ("", "山" * 200, "山水")]
    assert [value is None for value in nll_per_character(model, tokenizer, rows)] == [True, True, False]


def test_stages_70_and_72_report_that_nll_and_refuse_two_models(tmp_path, scored, tiny_model):
    from common.likelihood import nll_per_character

    rows = read_jsonl(scored[0] / "generations" / "base.jsonl")
    generations, scores = tmp_path / "generations", tmp_path / "scores"
    write_jsonl(generations / "base.jsonl", rows)
    module = load_script("70_score.py")  # in this process: importing transformers again would take longer than the test
    module.main(module.Settings(generations=(generations,), nll_model=str(tiny_model[0]), output_dir=scores))
    values = nll_per_character(tiny_model[1], tiny_model[2], rows)
    lines = read_jsonl(scores / "base.jsonl")
    assert [line["scores"]["nll_per_character"] for line in lines] == pytest.approx(values, rel=1e-4)
    golden = read_jsonl(scores / "base.reference.jsonl")
    assert golden[0]["scores"]["nll_per_character"] == pytest.approx(values[0], rel=1e-4)  # p0#0 is the real poem

    for source, target in ((generations, "base.jsonl"), (scores, "base.jsonl"), (scores, "base.run.json")):
        text = (source / target).read_text(encoding="utf-8")
        (source / target.replace("base", "twin")).write_text(text, encoding="utf-8")
    compare(tmp_path, "--examples", 1, "--metrics", "nll_per_character", "form")
    assert (tmp_path / "compare_nll.png").stat().st_size > 1000
    record = read_json(scores / "twin.run.json")
    record["inputs"]["nll_model"]["sha256"] = "another"
    (scores / "twin.run.json").write_text(json.dumps(record), encoding="utf-8")
    done = compare(tmp_path, "--overwrite", check=False)
    assert done.returncode == 2 and "NLL under different models" in done.stderr


def test_what_a_stage_forgets_is_measured_on_general_texts(tmp_path, verse, tiny_model, capsys):
    import torch
    from transformers import Qwen3ForCausalLM

    from common.runs import describe_input

    folder, model, tokenizer = tiny_model
    worn = Qwen3ForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in worn.parameters():
            value += 0.3 * torch.randn_like(value)
    worn.save_pretrained(tmp_path / "worn")
    tokenizer.save_pretrained(tmp_path / "worn")
    texts = [poem.text for poem in verse[:5]]
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    for name, path in (("base", folder), ("sft", tmp_path / "worn"), ("typed", None)):
        rows = [row(verse[0], 0, 0, name, verse[0].text)]
        write_jsonl(tmp_path / "generations" / f"{name}.jsonl", rows)
        if path:
            inputs = {"model": describe_input("model", path), "adapter": None}
            record = {"status": "done", "settings": {"dtype": "float32"}, "inputs": inputs}
            (tmp_path / "generations" / f"{name}.run.json").write_text(json.dumps(record), encoding="utf-8")
    module = load_script("70_score.py")
    given = {"generations": (tmp_path / "generations",), "nll_model": "", "output_dir": tmp_path / "scores"}
    module.main(module.Settings(**given, general_file=tmp_path / "texts.jsonl"))
    assert "typed: no record of the model that wrote it" in capsys.readouterr().out

    known = [line["general_nll"] for line in read_jsonl(tmp_path / "scores" / "base.general.jsonl")]
    for text, value in zip(texts, known, strict=True):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            naive = model(ids, labels=ids).loss * (ids.shape[1] - 1) / len(text)
        assert value == pytest.approx(naive.item(), rel=1e-4)

    compare(tmp_path, "--runs", "base", "sft", "typed")
    figures = read_json(tmp_path / "compare.run.json")["figures"]
    assert figures["table"]["base"]["general_nll"][0] == pytest.approx(sum(known) / 5)
    assert "general_nll" not in figures["table"]["typed"]
    assert figures["changes"]["sft"]["general_nll"][1] > 0, "the lower bound of the rise"
    assert ["sft", "base", "general_nll"] in [
        [fall[key] for key in ("run", "against", "metric")] for fall in figures["fell"]
    ]

    (tmp_path / "worn" / "config.json").write_text((folder / "config.json").read_text() + " ", encoding="utf-8")
    write_jsonl(tmp_path / "texts.jsonl", [{"text": texts[0]}])
    module.main(module.Settings(**given, general_file=tmp_path / "texts.jsonl", overwrite=True))
    assert "is not what it was: no NLL of general texts" in capsys.readouterr().out
    assert not (tmp_path / "scores" / "sft.general.jsonl").exists()


def test_the_general_texts_are_not_among_what_is_trained():
    shipped = read_jsonl(ROOT / "data" / "general" / "texts.jsonl", "text")
    texts = [line["text"] for line in shipped]
    assert len(set(texts)) == 40 and all(40 <= len(text) <= 80 for text in texts)
    trained = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("chat", "copywriting", "styles", "weibo")
        for path in (ROOT / "data" / folder).glob("*.json*")
    )
    assert not [text for text in texts if any(text[at : at + 12] in trained for at in range(0, len(text) - 12))]


# --- stage 72


def test_the_table_begins_with_the_poets_and_keeps_the_order_of_the_chain(compared):
    _, report, output = compared
    lines = [line for line in report.splitlines() if line.startswith(("| reference |", "| base |", "| sft |"))]
    assert lines[0].startswith("| reference | 1.000 [0.6") and lines[1].startswith("| base | 0.500")
    assert lines[2].startswith("| sft | 0.812")
    assert lines[0][:40] in output and output.splitlines()[-1].startswith("report: ")


def test_a_stage_shows_what_it_bought_and_cost(scored, compared):
    _, report, _ = compared
    line = next(line for line in report.splitlines() if line.startswith("| sft | base |"))
    assert "+0.312 [" in line and line.endswith("| 1.5 | 1234 MiB | cpu |")  # 13/16 - 1/2
    changes = read_json(scored[0] / "compare.run.json")["figures"]["changes"]
    assert changes["sft"]["form"][0] == pytest.approx(13 / 16 - 1 / 2)
    assert changes["sft"]["rhyme"][0] == pytest.approx(9 / 12 - 1 / 2)


@pytest.mark.parametrize(("adapter", "shown"), [("checkpoints/sft", True), ("elsewhere/sft", False)])
def test_the_cost_of_another_job_s_training_is_not_shown(adapter, shown, scored, tmp_path):
    folder = shutil.copytree(scored[0], tmp_path / "runs")
    record = {"settings": {"model": "base", "adapter": adapter}}
    (folder / "generations" / "sft.run.json").write_text(json.dumps(record), encoding="utf-8")
    assert ("| 1234 MiB | cpu |" in compare(folder, "--runs", "base", "sft", "--overwrite").stdout) == shown


class Page(HTMLParser):
    """Tags and attributes as a browser would see them, and what stands in script elements."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.lasttag == "script" and data.strip():
            self.scripts.append(data)


def test_what_a_stage_made_worse_is_named():
    from common.evaluation.statistics import Estimate

    changes = {
        "grpo": (
            "sft",
            {
                "theme": Estimate(-0.1, -0.12, -0.08),
                "form": Estimate(-0.1, -0.2, 0.01),
                "near_copy": Estimate(-0.1, -0.2, -0.1),
                "nll_per_character": Estimate(0.2, 0.1, 0.3),
                "distinct_2": Estimate(-0.1, None, None),
                "characters": Estimate(-33.0, -40.0, -30.0),  # shorter is neither better nor worse
                "general_nll": Estimate(2e-5, 1e-5, 3e-5),  # shown as 0.000
            },
        )
    }
    fell = falls(changes, ["near_copy", "nll_per_character", "general_nll"])
    assert [(run, metric) for run, _, metric, _ in fell] == [("grpo", "theme"), ("grpo", "nll_per_character")]


def test_no_model_text_becomes_markup_and_the_page_loads_nothing(compared):
    page, report, _ = compared
    seen = Page(page)
    assert PAYLOAD in {text for _, _, text in page_texts(page)}  # in the data as it is
    assert "alert" not in re.sub(r"(?s)<script type=.application/json.*?</script>", "", page)
    assert "<script" not in report and len(seen.scripts) == 2
    assert not {tag for tag, _ in seen.tags} & {"link", "iframe", "object", "form", "a", "base"}
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in seen.tags if tag == "img")
    assert sum(tag == "img" for tag, _ in seen.tags) == 1
    assert not re.search(r"(src|href|action)\s*=\s*[\"']?\s*(https?:)?//|url\(|@import", page)
    policy = next(attrs["content"] for _, attrs in seen.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    script = base64.b64encode(hashlib.sha256(seen.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{script}';" in policy


def test_rhymes_and_faults_are_highlighted_where_the_task_marks_them(compared, verse):
    data = page_data_of(compared[0])
    labels = {label: index for index, (label, _) in enumerate(data["labels"])}
    cards = [card for item in data["items"] for card in item["cards"]]
    marked = [part for card in cards for part in card[1] if not isinstance(part, str)]
    words = {text for text, label in marked if label == labels["rhyme"]}
    assert all(re.findall("(.)[，。！？]", poem.text)[1] in words for poem in verse[:PROMPTS])
    cut = verse[2].text[:-2]
    assert re.split("[，。！？]", cut)[-1] in [text for text, label in marked if label == labels["form fault"]]
    assert dict(data["labels"])["rhyme"] == "good" and dict(data["labels"])["form fault"] == "fault"
    texts = [text for _, _, text in page_texts(compared[0])]
    assert texts.count(verse[2].text) == 2 and cut in texts  # golden and base; sft
    assert data["lower"] == ["near_copy"] and data["runs"][data["golden"]] == "reference"


def test_tables_show_the_columns_of_the_job_first(compared):
    page, report, shown = compared
    assert "| near_copy ↓ |" in report and "near_copy" not in shown.split("| run |")[1]
    assert '<th class="more">near_copy ↓</th>' in page and "<th>all_three</th>" in page


def test_comparing_again_is_already_done(scored, compared):
    done = compare(scored[0], "--runs", "base", "sft")
    assert "already done" in done.stdout


def test_watching_renews_the_page_until_ctrl_c(scored, tmp_path):
    def bring(*names: str) -> None:
        for folder in ("generations", "scores"):  # what is written last starts the renewal: the scores
            (tmp_path / folder).mkdir(exist_ok=True)
            for name in names:
                for file in (scored[0] / folder).glob(f"{name}.*"):
                    shutil.copy(file, tmp_path / folder / file.name)

    def renewals(count: int) -> str:
        for _ in range(600):
            if (text := log.read_text(encoding="utf-8")).count("renewed, reload it") >= count or ended():
                return text
            time.sleep(0.2)
        raise AssertionError(text)

    def ended() -> bool:
        return process.poll() is not None

    training = tmp_path / "checkpoints" / "grpo"
    (training / "checkpoint-3").mkdir(parents=True)
    (training / "run.json").write_text(json.dumps({"stage": "50_train_grpo", "status": "running"}), encoding="utf-8")
    state = {"global_step": 3, "max_steps": 9, "log_history": [{"loss": 0.5, "reward": 0.25, "step": 3}]}
    (training / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    bring("base")
    where = ("--generations", "generations", "--scores", "scores", "--checkpoints", "checkpoints")
    command = [SCRIPTS / "72_compare.py", *where, "--output", "compare", "--watch", "--watch-seconds", 0.1]
    log = tmp_path / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command), "--bootstrap", "50"], cwd=tmp_path, stdout=output, stderr=output
        )
    try:
        renewals(1)
        page = (tmp_path / "compare.html").read_text(encoding="utf-8")
        assert {run for _, run, _ in page_texts(page)} == {"reference", "base"}
        assert "Trainings that have begun" in page and "3 of 9" in page and "0.25" in page
        shutil.copy(scored[0] / "generations" / "other.jsonl", tmp_path / "generations" / "other.jsonl")
        renewals(2)
        assert "Not shown yet: the run other has no scores" in (tmp_path / "compare.md").read_text(encoding="utf-8")
        (tmp_path / "generations" / "other.jsonl").unlink()
        bring("sft")
        for _ in range(300):
            page = (tmp_path / "compare.html").read_text(encoding="utf-8")  # there at every moment
            if "sft" in {run for _, run, _ in page_texts(page)} or ended():
                break
            time.sleep(0.2)
        assert "sft" in {run for _, run, _ in page_texts(page)}
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text(encoding="utf-8")
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".compare-*"))
    assert read_json(tmp_path / "compare.run.json")["status"] == "done"


def test_runs_over_different_prompts_are_compared_on_the_common_ones(scored):
    folder, _ = scored
    done = compare(folder, "--output", "common", "--runs", "base", "other", "--metrics", "form", "distinct_2")
    assert "different prompts (base 8, other 5): compared on the 4 that all of them have" in done.stdout
    assert "| other | base | **+0.500" in done.stdout and "| run | form | distinct_2 |" in done.stdout
    assert (folder / "common_metrics.png").exists() and (folder / "common.html").exists()
    table = (folder / "common_metrics.csv").read_text(encoding="utf-8-sig").splitlines()
    assert table[0] == "metric,run,mean,low,high" and any(line.startswith("form,other,1.0,") for line in table)


def test_a_run_without_scores_or_with_stale_ones_names_the_command(tmp_path, scored, verse):
    folder, _ = scored
    texts = [row(verse[0], 0, 0, "dpo", verse[0].text)]
    write_jsonl(tmp_path / "generations" / "dpo.jsonl", texts)
    done = compare(tmp_path, check=False)
    assert done.returncode == 2 and "the run dpo has no scores" in done.stderr
    assert "fix: python scripts/70_score.py --task poems --generations " in done.stderr
    write_jsonl(tmp_path / "generations" / "sft.jsonl", texts)
    (tmp_path / "scores").mkdir()
    for name in ("sft.jsonl", "sft.run.json"):
        (tmp_path / "scores" / name).write_bytes((folder / "scores" / name).read_bytes())
    done = compare(tmp_path, "--runs", "sft", check=False)
    assert done.returncode == 2 and "has changed since it was scored" in done.stderr and "--overwrite" in done.stderr
    assert not (tmp_path / "compare.run.json").exists()


def test_each_stage_is_measured_against_the_one_it_starts_from():
    module = load_script("72_compare.py")
    names = ["base", "sft", "sft_merged", "dpo", "grpo", "dpo_grpo", "ppo", "extra"]
    parents = [module.parent_of(name, names) for name in names]
    assert parents == [None, "base", "sft", "sft_merged", "sft_merged", "dpo", "sft_merged", "ppo"]
    assert module.parent_of("grpo", ["base", "sft", "dpo", "grpo"]) == "sft"  # nothing was merged
