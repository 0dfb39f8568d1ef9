"""Stage 32: figures that can be checked by hand, baselines that find what they should, and words that claim no more
than the figures."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

import warm
from common.evaluation.baselines import bag_of_characters_baseline, correctness, length_baseline, tfidf_classifier
from common.evaluation.calibration import calibration_error, chance_error, reliability
from common.evaluation.reward_card import group_items, headline, name_groups, rank_correlation, ranking, verdict
from common.evaluation.statistics import Estimate
from common.jsonl import read_json, write_jsonl
from common.pretraining.char_tokenizer import build_tokenizer
from common.settings import UserError, read_settings
from common.training.classifiers import render_conversation
from conftest import SCRIPTS

COLORS = "红蓝"
OBJECTS = "山水云月花鸟风雪"
STYLES = ["售前", "诚实", "无伤害"]


# --- baselines


def test_the_length_baseline_finds_longer_shorter_and_best_at_some_length():
    long, short, middle = (
        [("山" * n, "山" * (n - 3)) for n in range(5, 40)],
        [("山" * n, "山" * (n + 3)) for n in range(2, 40)],
        [],
    )
    for n in range(8):
        middle += [("山" * (20 + n % 3), "山" * (5 + n)), ("山" * (20 + n % 3), "山" * (40 + n))]
    for pairs in (long, short, middle):
        assert correctness(length_baseline(pairs, pairs)) == [1.0] * len(pairs)


def test_the_length_baseline_ties_where_lengths_are_equal():
    train = [("山水云", "山")] * 5
    assert correctness(length_baseline(train, [("山水", "云月"), ("山水", "云"), ("山", "云月")])) == [0.5, 1.0, 0.0]


def test_the_bag_finds_a_telltale_character_and_is_blind_to_order():
    train = [(f"{a}{b}好", f"{b}{a}坏") for a, b in product(OBJECTS, OBJECTS)]
    val = [("花好鸟", "花坏鸟"), ("花坏鸟", "花好鸟"), ("山水云月", "月云水山"), ("龙好", "龙坏")]
    margins = bag_of_characters_baseline(train, val)
    assert correctness(margins) == [1.0, 0.0, 0.5, 1.0] and margins[2] == 0.0


@pytest.mark.parametrize("baseline", [length_baseline, bag_of_characters_baseline])
def test_a_baseline_needs_training_pairs_but_no_validation_pairs(baseline):
    with pytest.raises(UserError, match="needs training pairs"):
        baseline([], [("a", "b")])
    assert baseline([("ab", "b")], []) == []
    assert len(baseline([("ab", "b")], [("b", "ab")])) == 1


def test_tfidf_tells_classes_apart_and_needs_two():
    texts, labels = ["价格便宜", "价格优惠", "实话实说", "说实话吧"], ["售前", "售前", "诚实", "诚实"]
    assert tfidf_classifier(texts, labels).predict(["价格", "实话"]).tolist() == ["售前", "诚实"]
    with pytest.raises(UserError, match="needs two classes"):
        tfidf_classifier(texts, ["售前"] * 4)


# --- calibration


def test_the_calibration_error_is_that_counted_by_hand():
    confidences, correct = [0.54, 0.57, 0.96, 0.98], [1.0, 0.0, 1.0, 1.0]
    bins = reliability(confidences, correct, lowest=0.5)
    assert [(round(bin.confidence, 6), bin.accuracy, bin.count) for bin in bins] == [
        (0.54, 1.0, 1),
        (0.57, 0.0, 1),
        (0.97, 1.0, 2),
    ]
    assert calibration_error(bins) == pytest.approx((0.46 + 0.57 + 2 * 0.03) / 4)
    assert [bin.count for bin in reliability([0.5, 1.0], [0.0, 1.0], lowest=0.5)] == [1, 1]
    assert calibration_error(reliability([], [])) is None


def test_few_answers_are_off_by_chance():
    few, many = (chance_error([0.6 + 0.3 * (i % 7) / 7 for i in range(count)], 0.5) for count in (30, 3000))
    assert few > 0.08 and many < 0.03


# --- words


def judge(model, bag, better, prompts=200, noun="pairs"):
    return verdict(
        noun,
        {"model": Estimate(*model), "length": Estimate(0.5, 0.45, 0.55), "bag": Estimate(*bag)},
        {"length": Estimate(0.9, 0.8, 1.0), "bag": Estimate(*better)},
        prompts,
        0.5,
        0.2,
    )


@pytest.mark.parametrize(
    ("model", "bag", "better", "words"),
    [
        ((0.9, 0.86, 0.94), (0.5, 0.45, 0.55), (0.4, 0.35, 0.45), "better than every baseline"),
        (
            (0.9, 0.86, 0.94),
            (0.89, 0.85, 0.93),
            (0.01, -0.02, 0.04),
            "the pairs are separable by their surface: bag does as well",
        ),
        (
            (0.8, 0.76, 0.84),
            (0.9, 0.85, 0.93),
            (-0.1, -0.12, -0.04),
            "the pairs are separable by their surface: bag does better",
        ),
        ((0.95, 0.9, 0.97), (0.8, 0.75, 0.85), (0.15, 0.1, 0.2), "separable by their surface: bag alone reaches 0.800"),
        (
            (0.7, 0.5, 0.85),
            (0.6, 0.4, 0.8),
            (0.1, -0.1, 0.3),
            "too few pairs to claim anything: the interval is 0.400 wide",
        ),
        ((0.9, 0.7, 0.97), (0.5, 0.4, 0.6), (0.4, 0.2, 0.5), "by how much, so few pairs cannot say"),
        ((0.52, 0.47, 0.57), (0.5, 0.45, 0.55), (0.02, -0.04, 0.08), "no better than a guess"),
        ((0.4, 0.35, 0.45), (0.5, 0.45, 0.55), (-0.1, -0.15, -0.05), "worse than a guess"),
        (
            (0.56, 0.51, 0.6),
            (0.54, 0.49, 0.58),
            (0.02, -0.04, 0.08),
            "better than a guess, not shown to be better than bag",
        ),
    ],
)
def test_the_words_say_what_the_intervals_allow(model, bag, better, words):
    assert words in judge(model, bag, better)


def test_a_handful_of_pairs_claims_nothing_however_clear_they_look():
    assert judge((1.0, 0.7, 1.0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), prompts=8) == "8 prompts: too few to claim anything"
    assert judge((1.0, None, None), (0.0, None, None), (1.0, None, None), prompts=1).startswith("1 prompt")


def test_a_correlation_that_does_not_exist_is_none():
    assert rank_correlation([24.0, 24.0, 24.0], [0.1, 0.2, 0.3]) is None
    assert rank_correlation([1.0, 2.0, 3.0], [5.0, 6.0, 90.0]) == pytest.approx(1)


def test_the_ranking_compares_texts_of_one_prompt_only():
    sides = {"real": (["a", "b"], [3.0, -9.0]), "sampled": (["a", "a", "b"], [2.0, 4.0, -10.0]), "bad": (["a"], [1.0])}
    rows, unproven = ranking(sides, bootstrap=50, seed=0)
    table = {row[0]: row[1:3] for row in rows[1:]}
    assert table["real > sampled"][0] == "2" and table["real > sampled"][1].startswith("0.750")  # (1/2 + 1) / 2
    assert table["sampled > bad"] == ["1", "1.000"] and table["real > sampled > bad"] == ["1", "0.500"]
    assert unproven == list(table)  # one or two prompts show nothing


def test_an_order_that_holds_over_many_prompts_is_shown():
    prompts = [str(number) for number in range(40)]
    sides = {"real": (prompts, [1.0] * 40), "sampled": (prompts, [0.0] * 40), "bad": (prompts, [0.0, 0.1] * 20)}
    assert ranking(sides, bootstrap=50, seed=0)[1] == ["sampled > bad", "real > sampled > bad"]


def test_a_win_on_the_whole_names_the_kinds_without_one():
    groups = {
        "all": "better than every baseline",
        "kind: rhyme": "no better than a guess",
        "kind: form": "better than every baseline",
    }
    assert headline({name: {"verdict": words} for name, words in groups.items()}) == (
        "Better than every baseline; but not shown for kind: rhyme."
    )
    assert headline({"all": {"verdict": "worse than a guess"}, **{"a": {"verdict": "b"}}}) == "Worse than a guess."


def test_a_key_of_meta_with_too_many_values_is_not_a_table():
    notes: list[str] = []
    names = name_groups([{"kind": "a", "source": number} for number in range(30)], ("kind", "source"), notes)
    assert names == [["kind: a"]] * 30 and "30 different values of source" in notes[0]


def test_an_item_may_stand_in_several_groups_or_none():
    assert group_items([["kind: a"], [], ["kind: b", "source: x"], ["kind: a"]]) == {
        "kind: a": [0, 3],
        "kind: b": [2],
        "source: x": [2],
    }


# --- the stage, on a reward model that has learnt a little


def pair(color: int, thing: str, other: str, kind: str, turn: int) -> dict:
    """fit: the prompt says which colour is right; surface: 好 against 坏, whatever the prompt says."""
    sides = (COLORS[color], COLORS[1 - color]) if kind == "fit" else ("好", "坏")
    prompt = [{"role": "user", "content": f"写{COLORS[color]}的{thing}{other}{turn}"}]
    chosen, rejected = ([{"role": "assistant", "content": f"{thing}{side}{other}"}] for side in sides)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "meta": {"kind": kind}}


def pairs_of(things: str, kinds=("fit", "surface")) -> list[dict]:
    every = product(range(2), things, OBJECTS, kinds)
    return [pair(color, thing, other, kind, turn) for turn, (color, thing, other, kind) in enumerate(every)]


def generation(row: dict, sample: int, text: str, reference: str | None) -> dict:
    id = json.dumps(row["prompt"], ensure_ascii=False)
    return {
        "id": f"{id}#{sample}",
        "prompt_id": id,
        "sample": sample,
        "seed": 1,
        "prompt": row["prompt"],
        "completion": text,
        "reference": reference,
        "model": "sft",
        "finish_reason": "stop",
        "tokens": 3,
        "meta": {},
    }


def new_model(tokenizer, labels: list[str]):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        id2label=dict(enumerate(labels)),
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForSequenceClassification(config)


def fit(model, texts_to_loss, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        texts_to_loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with pairs, samples, labelled texts, a reward model and a classifier, each trained for a few seconds."""
    folder, threads = tmp_path_factory.mktemp("bench"), torch.get_num_threads()
    torch.set_num_threads(1)
    train, val = pairs_of(OBJECTS[:6]), pairs_of(OBJECTS[6:])
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "val.jsonl", val)
    samples = [generation(r, 0, r["rejected"][0]["content"] + "坏", r["chosen"][0]["content"]) for r in val[:20]]
    write_jsonl(folder / "samples.jsonl", [*samples, generation(val[20], 0, "山", None)])

    tokenizer = build_tokenizer(COLORS + OBJECTS + "好坏写的用户问题：回答0123456789" + "".join(STYLES))
    model = new_model(tokenizer, ["LABEL_0"])
    rendered = [
        [render_conversation(tokenizer, r["prompt"], r[s][0]["content"]) for r in train] for s in ("chosen", "rejected")
    ]
    batch = tokenizer(rendered[0] + rendered[1], return_tensors="pt", padding=True, add_special_tokens=False)

    def pair_loss():
        chosen, rejected = model(**batch).logits[:, 0].chunk(2)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

    fit(model, pair_loss, 60)
    model.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")

    def labelled(things: str) -> list[dict]:
        pairs = product(things, OBJECTS, enumerate(STYLES))
        return [
            {"input": f"用户问题：{a}{b}\n回答：{a}{OBJECTS[i]}", "label": name, "label_english": f"style{i}"}
            for a, b, (i, name) in pairs
        ]

    write_jsonl(folder / "style_train.jsonl", labelled(OBJECTS[:6]))
    write_jsonl(folder / "style_val.jsonl", labelled(OBJECTS[6:]))
    classifier = new_model(tokenizer, STYLES)
    texts = tokenizer([r["input"] for r in labelled(OBJECTS[:3])], return_tensors="pt", padding=True)
    wanted = torch.tensor([STYLES.index(r["label"]) for r in labelled(OBJECTS[:3])])
    fit(classifier, lambda: torch.nn.functional.cross_entropy(classifier(**texts).logits, wanted), 25)
    classifier.save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    yield folder
    torch.set_num_threads(threads)


GIVEN = (
    "--train-file",
    "train.jsonl",
    "--val-file",
    "val.jsonl",
    "--model",
    "reward",
    "--bootstrap",
    "300",
    "--dtype",
    "float32",
)


def evaluate(folder, *words, check: bool = True) -> subprocess.CompletedProcess:
    """The real command line, from a folder outside the repo."""
    command = [sys.executable, str(SCRIPTS / "32_evaluate_reward.py"), *GIVEN, *map(str, words)]
    done = warm.run(command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300)
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def here(bench, monkeypatch):
    """here(flags): the stage with these flags in this process, where importing transformers again would take longer
    than the test."""
    spec = importlib.util.spec_from_file_location("evaluate_reward", SCRIPTS / "32_evaluate_reward.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evaluate_reward", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.chdir(bench)
    return lambda *words: module.main(read_settings(module.Settings, [*GIVEN, *map(str, words)]))


@pytest.fixture(scope="module")
def carded(bench):
    done = evaluate(bench, "--generations", "samples.jsonl", "--output", "card")
    return bench, done.stdout, read_json(bench / "card.json"), (bench / "card.md").read_text(encoding="utf-8")


def test_the_accuracy_is_that_of_plain_transformers(carded):
    folder, _, figures, _ = carded
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32).eval()
    rows = pairs_of(OBJECTS[6:])
    for row, item in list(zip(rows, figures["items"], strict=True))[::5]:
        scores = []
        for side in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_tensors="pt", return_dict=True)
            with torch.no_grad():
                scores.append(model(ids["input_ids"]).logits.item())
        assert item["margin"] == pytest.approx(scores[0] - scores[1], abs=1e-4)
    right = [item["margin"] > 0 for item in figures["items"]]
    assert figures["groups"]["all"]["accuracy"]["model"][0] == pytest.approx(sum(right) / len(rows))
    assert figures["groups"]["kind: fit"]["count"] == figures["groups"]["kind: surface"]["count"] == len(rows) / 2


def test_what_the_surface_gives_away_is_told_from_what_the_prompt_decides(carded):
    _, output, figures, card = carded
    surface, fit = figures["groups"]["kind: surface"], figures["groups"]["kind: fit"]
    assert surface["accuracy"]["bag of characters"][0] == 1.0 and surface["accuracy"]["length"][0] == 0.5
    assert surface["verdict"] == "the pairs are separable by their surface: bag of characters does as well"
    assert fit["accuracy"]["bag of characters"][0] == pytest.approx(0.5, abs=0.1)
    assert fit["verdict"].startswith("better than every baseline")
    assert "kind: surface: the pairs are separable by their surface" in output and surface["verdict"] in card


def test_the_card_has_every_part_and_names_the_next_stage(carded):
    folder, output, figures, card = carded
    for part in (
        "## Accuracy",
        "## Ranking",
        "## Calibration",
        "Expected calibration error",
        "## Length",
        "![plots](card.png)",
    ):
        assert part in card
    assert (folder / "card.png").stat().st_size > 10_000 and (folder / "card.csv").stat().st_size > 100
    record = read_json(folder / "card.run.json")
    assert record["status"] == "done" and record["figures"]["groups"]["all"]["count"] == len(figures["items"])
    assert set(record["outputs"]) == {"card.md", "card.json", "card.csv", "card.png"}
    assert output.splitlines()[-1].startswith("next: python scripts/40_train_dpo.py --task poems")


def test_samples_are_ranked_within_their_prompts(carded):
    _, _, figures, card = carded
    table = {row[0]: row[1:] for row in figures["tables"]["Ranking"][1:]}
    assert [table[name][0] for name in ("real > sampled", "sampled > rejected", "real > sampled > rejected")] == [
        "20"
    ] * 3
    assert "1 samples have no golden text, or equal it: not in the ranking." in card


def test_a_card_that_is_there_is_not_made_again(carded):
    folder = carded[0]
    before = (folder / "card.json").read_bytes()
    assert "already done" in evaluate(folder, "--generations", "samples.jsonl", "--output", "card").stdout
    assert (folder / "card.json").read_bytes() == before


def test_small_kinds_missing_meta_and_long_texts_are_told(bench, here):
    rows = pairs_of(OBJECTS[7:])
    rows[0]["meta"] = {"kind": "lonely"}
    del rows[1]["meta"]
    rows[2]["chosen"][0]["content"] = "山" * 300
    write_jsonl(bench / "odd.jsonl", rows)
    here("--val-file", "odd.jsonl", "--max-length", 128, "--output", "odd")
    figures, card = read_json(bench / "odd.json"), (bench / "odd.md").read_text(encoding="utf-8")
    lonely = figures["groups"]["kind: lonely"]
    assert lonely["verdict"].startswith("1 prompt") and lonely["accuracy"]["model"][1] is None
    assert figures["groups"]["all"]["count"] == len(rows)
    assert "1 of 64 texts are longer than 128 tokens" in card and "real > sampled > rejected is not measured" in card


def test_a_classifier_gets_the_same_card(bench, here, capsys):
    files = ("--train-file", "style_train.jsonl", "--val-file", "style_val.jsonl")
    here("--task", "styles", "--model", "classifier", *files, "--output", "style")
    figures, card = read_json(bench / "style.json"), (bench / "style.md").read_text(encoding="utf-8")
    assert figures["groups"]["all"]["accuracy"]["TF-IDF"][0] == 1.0  # the second character of the answer is the class
    assert set(figures["groups"]) == {"all", *STYLES}
    share = sum(item["margin"] > 0 for item in figures["items"]) / len(figures["items"])
    assert figures["groups"]["all"]["accuracy"]["model"][0] == pytest.approx(share)
    assert figures["tables"]["Classes"][-1][0] == "macro mean" and "| macro mean |" in card
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: python scripts/61_classify_style.py --model ")


# --- bad input


def bad_files(bench) -> None:
    rows = pairs_of(OBJECTS[7:])[:3]
    rows[1]["rejected"] = rows[1]["chosen"]
    write_jsonl(bench / "equal.jsonl", rows)
    (bench / "empty.jsonl").write_text("", encoding="utf-8")
    write_jsonl(bench / "styles.jsonl", [{"input": "山", "label": "热情", "label_english": "warm"}])
    if not (bench / "nan").exists():
        shutil.copytree(bench / "reward", bench / "nan")
        model = AutoModelForSequenceClassification.from_pretrained(bench / "reward")
        with torch.no_grad():
            model.score.weight.fill_(torch.nan)
        model.save_pretrained(bench / "nan")
        with torch.no_grad():
            model.score.weight.fill_(3e38)  # finite weights, scores that are not
        shutil.copytree(bench / "reward", bench / "huge")
        model.save_pretrained(bench / "huge")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "data/tiny_qwen3"), "has no trained head"),
        (("--model", "nowhere/at/all"), "no such model folder"),
        (("--val-file", "equal.jsonl"), "equal.jsonl:2: chosen and rejected are equal; fix: leave the pair out"),
        (("--val-file", "empty.jsonl"), "empty.jsonl: the file holds no rows"),
        (("--val-file", "train.jsonl"), "--train-file is --val-file"),
        (("--generations", "val.jsonl"), "val.jsonl:1: the key 'id' is missing"),
        (("--model", "nan"), "score.weight holds NaN"),
        (("--model", "huge"), "for '<|im_start|>"),
        (("--model", "classifier"), "train.jsonl:1: the key 'input' is missing"),
        (
            ("--model", "classifier", "--train-file", "style_train.jsonl", "--val-file", "styles.jsonl"),
            "row 1: no class 热情",
        ),
    ],
)
def test_bad_input_is_one_clear_error(bench, here, words, message):
    bad_files(bench)
    with pytest.raises(UserError) as error:
        here(*words, "--output", "bad", "--overwrite")
    assert message in str(error.value)
    assert not list(bench.glob("bad.[mjp]*"))


def test_an_error_costs_nothing_of_the_card_that_is_there(carded):
    folder = carded[0]
    bad_files(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("card.*")}
    done = evaluate(folder, "--val-file", "equal.jsonl", "--output", "card", "--overwrite", check=False)
    assert done.returncode == 2 and "equal.jsonl:2: chosen and rejected are equal" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in folder.glob("card.*")} == before and len(before) == 5
