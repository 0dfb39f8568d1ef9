"""Rewards by name: the grammar, the weighted mean, and that no reward fails in silence."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from common.pretraining.char_tokenizer import build_tokenizer
from common.settings import UserError
from common.training.probes import DriftProbe
from common.training.rewards import Reward, check_meta, check_order, load_rewards, score, step_shares, total
from conftest import SCRIPTS
from tasks import poems
from tasks.base import load_task

POEM = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
STYLES = ["售前", "诚实", "无伤害"]
PROMPT = poems.messages({"form": "五言绝句", "themes": ["山水"]})
POEMS = load_task("poems")
META = {"form": "五言绝句", "themes": ["山水"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a scalar reward model and of a classifier, random weights, as stages 30 and 31 save them."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer(POEM + PROMPT[0]["content"] + "用户问题：回答" + "".join(STYLES))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, labels in (("reward", ["LABEL_0"]), ("styles", STYLES)):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            head_dim=16,
            intermediate_size=48,
            id2label=dict(enumerate(labels)),
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.3,
            **sizes,
        )
        Qwen3ForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder, tokenizer


def judge(specs, completions: list[str], **kwargs) -> tuple[list[Reward], dict]:
    loaded = load_rewards(tuple(specs), POEMS, "float32", **kwargs)
    return loaded, score(loaded, [PROMPT] * len(completions), completions, [META] * len(completions))


def stage(name: str):
    """The module of a stage."""
    spec = importlib.util.spec_from_file_location(f"stage_{name[:2]}", SCRIPTS / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def constant(name: str, weight: float, values: list) -> Reward:
    return Reward(name, weight, "", lambda prompts, completions, meta: values)


# --- the grammar


@pytest.mark.parametrize(
    ("spec", "name", "weight"),
    [("rhyme", "rhyme", 1), ("meter:2", "meter", 2), ("form:.5", "form", 0.5), ("fluency:-0.25", "fluency", -0.25)],
)
def test_a_name_and_its_weight(spec, name, weight):
    (reward,) = load_rewards((spec,), POEMS)
    assert (reward.name, reward.weight) == (name, weight)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((), "no reward named"),
        (("rhymes",), "unknown reward 'rhymes'; fix: one of form, rhyme"),
        (("rhyme:0",), "a weight that is not 0"),
        (("rhyme:two",), "unknown reward 'rhyme:two'"),
        (("",), "fix: NAME"),
        (("rhyme", "rhyme:2"), "rhyme is named twice"),
        (("model=",), "unknown reward"),
        (("model=checkpoints/poems/nowhere",), "no such model folder"),
        (("style=checkpoints/styles/classifier",), "names no class; fix: style=PATH#LABEL"),
    ],
)
def test_a_spec_that_names_nothing_is_told(specs, message):
    with pytest.raises(UserError) as error:
        load_rewards(specs, POEMS)
    assert message in str(error.value)


def test_task_rewards_are_those_of_the_task():
    texts = [POEM, "白日依山尽"]
    _, columns = judge(["form", "rhyme_pass:2"], texts)
    asked = [PROMPT[0]["content"]] * 2
    assert columns["form"] == poems.REWARDS["form"](asked, texts, [META] * 2)
    assert columns["rhyme_pass"] == poems.REWARDS["rhyme_pass"](asked, texts, [META] * 2)
    assert columns["form"][0] == 1.0 and columns["form"][1] < 1


# --- the self-test before a run


@pytest.mark.parametrize("name", ["chat", "copywriting", "poems", "styles", "weibo"])
def test_the_shipped_rewards_order_the_known_texts(name):
    task = load_task(name)
    named = {reward for example in task.REWARD_EXAMPLES for reward in example.rewards}
    assert {spec.partition(":")[0] for spec in task.DEFAULT_REWARDS} <= named
    check_order(load_rewards(tuple(named), task), task)


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 1.0], [None, 0.0]])
def test_a_reward_that_orders_known_texts_wrongly_does_not_start(values):
    reward = Reward("rhyme", 1, "", lambda prompts, completions, meta: values * (len(completions) // 2))
    with pytest.raises(UserError, match="reward rhyme is .*better text '白日依山尽.*fix: correct it"):
        check_order([reward], POEMS)


def test_of_a_model_the_known_pairs_that_it_orders_are_counted(capsys):
    check_order([Reward("model=x", 1, "folder", lambda prompts, completions, meta: [0.0] * len(completions))], POEMS)
    assert f"orders 0 of {len(POEMS.REWARD_EXAMPLES)} known pairs" in capsys.readouterr().out


# --- the total


def test_the_total_is_the_weighted_mean_and_a_negative_weight_punishes():
    parts = [constant("a", 3, [1.0, 0.0]), constant("b", -1, [0.5, 1.0])]
    columns = score(parts, [PROMPT] * 2, ["x", "y"], [META] * 2)
    assert total(parts, columns) == pytest.approx([(3 - 0.5) / 4, -1 / 4])


def test_what_is_earned_before_the_end_has_the_weights_of_the_total():
    rewards = load_rewards(("rhyme:2", "meter", "no_repeat:-1"), POEMS)
    (earned,) = step_shares(rewards, [PROMPT], [POEM], [META])
    assert earned == pytest.approx({5: 0.25 / 4, 11: 1.25 / 4, 17: 0.25 / 4, 23: 1.25 / 4})
    assert step_shares(load_rewards(("fluency",), POEMS), [PROMPT], [POEM], [META]) == [{}]


def test_none_in_one_part_makes_the_total_none_and_never_0():
    parts = [constant("a", 1, [1.0, None, 0.0]), constant("b", 1, [None, 1.0, 1.0])]
    columns = score(parts, [PROMPT] * 3, ["x", "y", "z"], [META] * 3)
    assert columns == {"a": [1.0, None, 0.0], "b": [None, 1.0, 1.0]}
    assert total(parts, columns) == [None, None, 0.5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_names_reward_and_text(value):
    with pytest.raises(UserError, match=f"reward taste is {value} for '第二首'"):
        score([constant("taste", 1, [1.0, value])], [PROMPT] * 2, ["第一首", "第二首"], [META] * 2)


def test_a_function_that_raises_is_told_by_its_name():
    def broken(prompts, completions, meta):
        return [entry["tone"] for entry in meta]

    with pytest.raises(UserError, match="reward tone: KeyError: 'tone'; fix: "):
        score([Reward("tone", 1, "", broken)], [PROMPT], ["x"], [META])

    def broken_later(prompts, completions, meta):
        yield from (entry["tone"] for entry in meta)

    with pytest.raises(UserError, match="reward tone: KeyError: 'tone'; fix: "):
        score([Reward("tone", 1, "", broken_later)], [PROMPT], ["x"], [META])


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0, 1.0]])
def test_one_value_a_completion_no_fewer_no_more(values):
    with pytest.raises(UserError, match=f"taste returned {len(values)} values for 2 completions"):
        score([constant("taste", 1, values)], [PROMPT] * 2, ["x", "y"], [META] * 2)


def test_one_number_for_all_completions_is_told_as_what_it_is():
    def mean(prompts, completions, meta):
        return 0.5

    with pytest.raises(UserError, match="reward mean returned 0.5; fix: a list, one value for each completion"):
        score([Reward("mean", 1, "", mean)], [PROMPT], ["x"], [META])


@pytest.mark.parametrize("values", [["good"], [[1.0]]])
def test_a_value_that_is_not_a_number_is_told(values):
    with pytest.raises(UserError, match="reward taste"):
        score([constant("taste", 1, values)], [PROMPT], ["x"], [META])


# --- models as rewards


def test_a_model_reward_is_what_plain_transformers_gives(models):
    folder, tokenizer = models
    loaded, columns = judge([f"model={folder / 'reward'}:2"], [POEM, "白日"])
    assert (loaded[0].name, loaded[0].weight) == ("model=reward", 2)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32).eval()
    for text, value in zip([POEM, "白日"], columns["model=reward"], strict=True):
        turns = [*PROMPT, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            assert value == pytest.approx(model(ids).logits.item(), abs=1e-4)
    assert abs(columns["model=reward"][0] - columns["model=reward"][1]) > 1e-3


WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def reader_of_tools(models, tmp_path_factory):
    """A reward model with Qwen3's template, which has a place for tools, and what it gives to a text."""
    folder = shutil.copytree(models[0] / "reward", tmp_path_factory.mktemp("tools") / "reward")
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    (folder / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def value(answer: str, tools: list | None, prompt: list = PROMPT) -> float:
        turns = [*prompt, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
        assert ("get_weather" in text) == bool(tools)
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()

    return folder, value


def test_a_model_reward_reads_the_tools_of_each_row(reader_of_tools):
    folder, value = reader_of_tools
    loaded = load_rewards((f"model={folder}", "form"), POEMS, "float32", max_length=4096)
    tools = [[WEATHER], None]
    columns = score(loaded, [PROMPT] * 2, [POEM] * 2, [META] * 2, tools)
    assert columns["model=reward"] == pytest.approx([value(POEM, known) for known in tools], abs=1e-4)
    assert abs(columns["model=reward"][0] - columns["model=reward"][1]) > 1e-3
    # stages 50 and 51 (probe, rollouts of 51), and the function that trl calls in stage 50
    settings = SimpleNamespace(rewards=(f"model={folder}",), watch=(), dtype="float32", max_length=4096)
    rows = [{"prompt": PROMPT, "meta": META, "tools": [WEATHER]}, {"prompt": PROMPT, "meta": META}]
    totals, _ = DriftProbe(settings, POEMS, None, rows).judge(rows, [POEM] * 2)
    asked = {"meta": [json.dumps(META)] * 2, "tools": [json.dumps(known) for known in tools]}
    total_reward = stage("50_train_grpo").reward_function(loaded[:1])
    completions = [[{"role": "assistant", "content": POEM}]] * 2
    found = total_reward(prompts=[PROMPT] * 2, completions=completions, log_metric=lambda *_: None, **asked)
    assert totals == found == columns["model=reward"]


def test_stage_33_ranks_with_the_tools_of_each_row(reader_of_tools, tmp_path):
    folder, value = reader_of_tools
    texts = [POEM, "白日依山尽", "黄河", "更上一层楼"]
    rows = [
        {"id": f"{p}#{n}", "prompt_id": str(p), "sample": n, "seed": n, "completion": text, "reference": None}
        | {"prompt": [{"role": "user", "content": f"第{p}首"}], "meta": META, "tools": [WEATHER]}
        | {"model": "m", "finish_reason": "stop", "tokens": 3}
        for p in range(8)
        for n, text in enumerate(texts)
    ]
    file = tmp_path / "generations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rank = stage("33_rank_samples")
    more = {"rewards": (f"model={folder}",), "max_length": 4096, "dtype": "float32", "val_share": 0.4}
    rank.main(rank.Settings(task="poems", generations=file, output_dir=tmp_path, write="best", **more))
    written = [tmp_path / f"sft_best_{split}.jsonl" for split in ("train", "val")]
    best = [json.loads(line) for path in written for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(best) == 8 and all(row["tools"] == [WEATHER] for row in best)
    for row in best:
        expected = value(row["completion"][0]["content"], [WEATHER], row["prompt"])
        assert row["meta"]["score"] == pytest.approx(expected, abs=1e-4)


def test_a_style_reward_is_the_probability_of_its_class(models):
    folder, tokenizer = models
    _, columns = judge([f"style={folder / 'styles'}#{name}" for name in STYLES], ["白日", POEM])
    assert list(columns) == [f"style=styles#{name}" for name in STYLES]
    assert [sum(values) for values in zip(*columns.values(), strict=True)] == pytest.approx([1, 1], abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "styles", dtype=torch.float32).eval()
    ids = tokenizer(f"用户问题：{PROMPT[0]['content']}\n回答：白日", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits.softmax(-1)[0, 1].item()
    assert columns["style=styles#诚实"][0] == pytest.approx(expected, abs=1e-4)
    named = [{"role": "user", "content": f"请用“诚实”的风格回答：{PROMPT[0]['content']}"}]
    loaded = load_rewards((f"style={folder / 'styles'}#诚实",), POEMS, "float32")
    assert score(loaded, [named], ["白日"], [META])["style=styles#诚实"] == pytest.approx([expected], abs=1e-4)


def test_rules_and_models_mix_in_one_total(models):
    folder, _ = models
    loaded, columns = judge(["form:2", f"style={folder / 'styles'}#诚实:.5"], [POEM])
    expected = (2 * columns["form"][0] + 0.5 * columns["style=styles#诚实"][0]) / 2.5
    assert total(loaded, columns) == pytest.approx([expected])


def test_a_style_that_is_not_there_names_the_styles(models):
    with pytest.raises(UserError, match="no class '诚恳'; fix: one of .*诚实"):
        load_rewards((f"style={models[0] / 'styles'}#诚恳",), POEMS)


def test_a_classifier_is_no_scalar_reward(models):
    with pytest.raises(UserError, match="has 3 labels where 1 is needed"):
        load_rewards((f"model={models[0] / 'styles'}",), POEMS)


def test_a_folder_without_a_head_is_refused():
    with pytest.raises(UserError, match="has no trained head"):
        load_rewards(("model=data/tiny_qwen3",), POEMS)


def test_two_models_of_one_folder_name_are_told_apart_or_refused(models):
    folder = models[0] / "reward"
    with pytest.raises(UserError, match="named twice"):
        load_rewards((f"model={folder}", f"model={folder}/:2"), POEMS)


def test_no_completions_no_values(models):
    loaded, columns = judge(["form", f"model={models[0] / 'reward'}"], [])
    assert columns == {"form": [], "model=reward": []} and total(loaded, columns) == []


def test_a_meta_that_a_rule_cannot_read_is_told_with_its_line(tmp_path):
    rewards = load_rewards(("form",), load_task("poems"))
    ask = [{"role": "user", "content": "写一首五言绝句"}]
    rows = [{"prompt": ask, "meta": {"form": "五言绝句"}}, {"prompt": ask, "meta": {"form": "十四行诗"}}]
    with pytest.raises(UserError, match=r"prompts\.jsonl:2: reward form: .*十四行诗.*fix:"):
        check_meta(rewards, tmp_path / "prompts.jsonl", rows)
    check_meta(rewards, tmp_path / "prompts.jsonl", rows[:1])
