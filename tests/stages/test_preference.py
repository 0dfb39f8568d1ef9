"""Reward model, on-policy pairs, DPO and GRPO through their command lines, on the embedded base and a few real
poems."""

import json
import random
import subprocess
from pathlib import Path

import pytest
import torch

import warm
from conftest import ROOT, stage_command

BASE = ROOT / "data" / "tiny_qwen3"
SHORT_LORA = ["--lora-r", 8, "--lora-alpha", 16, "--report-to", "none", "--dtype", "float32"]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def poems() -> list:
    from tasks import poems

    return [poem for poem in poems.training_poems() if len(poem.text) < 40][:160]


def turn(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


@pytest.fixture(scope="session")
def data(tmp_path_factory, poems) -> Path:
    """Pairs of a poem and its characters in another order, prompts, and SFT rows."""
    from tasks.poems import instruction

    folder = tmp_path_factory.mktemp("data")
    pairs, prompts, sft = [], [], []
    for number, poem in enumerate(poems):
        chars = list(poem.text)
        random.Random(number).shuffle(chars)
        meta = {"id": str(number), "form": poem.form, "themes": ["山水"]}
        prompt = turn("user", instruction(poem.form, ["山水"]))
        sides = {"chosen": turn("assistant", poem.text), "rejected": turn("assistant", "".join(chars))}
        pairs.append({"prompt": prompt, **sides, "meta": meta})
        prompts.append({"prompt": prompt, "meta": meta})
        sft.append({"prompt": prompt, "completion": turn("assistant", poem.text), "meta": meta})
    for name, rows in (("pref", pairs), ("prompts", prompts), ("sft", sft)):
        write_rows(folder / f"{name}_train.jsonl", rows[:128])
        write_rows(folder / f"{name}_val.jsonl", rows[128:])
    return folder


# --- the lean heads compute what trl computes


def tiny_causal():
    from common.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(BASE))
    return load_model(str(BASE), tokenizer, "float32"), tokenizer


def test_lean_head_gives_trls_log_probabilities_and_entropy():
    from trl.trainer.utils import add_fused_lm_head

    from common.training.trl_cpu import use_lean_head

    torch.manual_seed(0)
    model, _ = tiny_causal()
    ids = torch.randint(0, 8000, (3, 20))
    labels = ids.clone()
    labels[:, :7] = -100
    labels[1, 15:] = -100
    outputs = []
    for patch in (
        lambda: add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy", "mean_logits", "is_top1")),
        lambda: use_lean_head(model, temperature=0.7, entropy=True),
    ):
        patch()
        with torch.no_grad():
            outputs.append(model(input_ids=ids, labels=labels, fused_lm_head=True))
        del model.forward
    theirs, ours = outputs
    mask = labels[:, 1:] != -100
    for name in ("log_probs", "entropy", "mean_logits"):
        difference = (getattr(theirs, name)[mask] - getattr(ours, name)[mask]).abs().max()
        assert difference < 5e-4, name  # float32 sums over 8,512 tokens in another order
        assert (getattr(ours, name)[~mask] == 0).all(), name
    assert (theirs.is_top1[mask] == ours.is_top1[mask]).all()


def grpo_trainer(cls, folder: Path, rewards: list, beta: float = 0.0):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig

    model, tokenizer = tiny_causal()
    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        max_steps=2,
        beta=beta,
        bf16=False,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        learning_rate=1e-3,
        gradient_checkpointing=False,
    )
    rows = [{"prompt": turn("user", text)} for text in ("写一首[五言绝句] 要求4句 主题为: 山水", "写诗", "你好", "山")]
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    arguments = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer, "peft_config": lora}
    return cls(model=model, args=config, reward_funcs=rewards, **arguments)


def test_lean_grpo_has_trls_log_probabilities_whatever_the_padding(tmp_path):
    from trl import GRPOTrainer

    from common.training.trl_cpu import LeanGRPOTrainer

    torch.manual_seed(0)
    ids = torch.randint(0, 8000, (6, 30))
    mask = torch.ones_like(ids)
    for row, (left, right) in enumerate([(0, 0), (5, 3), (9, 12), (2, 1), (15, 10), (0, 14)]):
        mask[row, :left] = 0
        mask[row, 30 - right :] = 0
    results = []
    for cls in (GRPOTrainer, LeanGRPOTrainer):
        trainer = grpo_trainer(cls, tmp_path / cls.__name__, [lambda completions, **_: [1.0] * len(completions)])
        results.append(trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 15, compute_entropy=True))
    kept = mask[:, 15:].bool()
    assert (results[0][0][kept] - results[1][0][kept]).abs().max() < 1e-4
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, 14:-1].double()
    exact = torch.distributions.Categorical(logits=logits / trainer.temperature).entropy()
    assert (exact[kept] - results[1][1][kept]).abs().max() < 1e-4
    assert results[1][0].requires_grad


def test_an_unjudged_completion_gets_advantage_0_and_is_counted(tmp_path):
    from common.settings import UserError
    from common.training.trl_cpu import LeanGRPOTrainer

    values = [1.0, None, 3.0, 2.0, None, None, None, None]
    trainer = grpo_trainer(LeanGRPOTrainer, tmp_path, [lambda completions, **_: values])
    trainer.model.train()
    inputs = [{"prompt": turn("user", "写诗")} for _ in values]
    batch = trainer._generate_and_score_completions(inputs)
    advantages = batch["advantages"].tolist()
    assert [advantage != 0 for advantage in advantages] == [True, False, True, False, False, False, False, False]
    logged = trainer._metrics["train"]
    assert logged["unjudged"] == [5 / 8] and logged["reward"] == [2.0], "what is not judged is in no mean"
    values[:] = [None] * 8
    with pytest.raises(UserError, match="no answer of this step could be judged"):
        trainer._generate_and_score_completions(inputs)


@pytest.mark.parametrize(
    "task, name", [("poems", "no_repeat"), ("poems", "fluency"), ("chat", "no_repeat"), ("styles", "no_repeat")]
)
def test_an_empty_answer_does_not_escape_the_other_rewards(task, name):
    from tasks.base import load_task

    module = load_task(task)
    assert module.REWARDS[name](["问"], [""], [{}]) == [0.0] and module.METRICS[name](["问"], [""], [{}]) == [None]


# --- stage 30


@pytest.fixture(scope="session")
def reward(tmp_path_factory, data) -> Path:
    output = tmp_path_factory.mktemp("checkpoints") / "reward"
    words = [
        "--model",
        BASE,
        "--train-file",
        data / "pref_train.jsonl",
        "--val-file",
        data / "pref_val.jsonl",
        *SHORT_LORA,
    ]
    stage("30_train_reward.py", *words, "--epochs", 3, "--batch-size", 16, "--eval-steps", 8, "--output-dir", output)
    return output


def stage(script: str, *words, check: bool = True) -> subprocess.CompletedProcess:
    command = stage_command(script, *words)
    done = warm.run(command)
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def test_reward_model_learns_to_tell_verse_from_shuffled_characters(reward):
    assert record_of(reward)["figures"]["accuracy"] > 0.8


def test_the_answers_of_all_models_stand_in_one_line_with_what_rules_and_reward_model_give_them(reward, tmp_path):
    prompt = [{"role": "user", "content": "写一条评论"}]
    for name, text in (("base", "哈"), ("sft", "真好看")):
        row = {"id": "1#0", "prompt_id": "1", "sample": 0, "seed": 0, "prompt": prompt, "completion": text}
        row |= {"reference": None, "model": name, "finish_reason": "stop", "tokens": 1, "meta": {}}
        for folder, line in (("texts", row), ("scores", {"id": "1#0", "scores": {"length": len(text)}})):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", "utf-8")
    words = ["--generations", tmp_path / "texts", "--scores", tmp_path / "scores", "--output", tmp_path / "all.jsonl"]
    stage(ROOT / "runs/weibo_results.py", *words, "--reward", reward, "--dtype", "float32")
    (line,) = map(json.loads, (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines())
    (base,), (sft,) = line["answers"]["base"], line["answers"]["sft"]
    assert (base["text"], sft["text"]) == ("哈", "真好看") and (base["scores"], sft["scores"]) == (
        {"length": 1},
        {"length": 3},
    )
    assert isinstance(base["reward_model"], float) and base["reward_model"] != sft["reward_model"]


def test_reward_folder_loads_with_plain_transformers_and_no_new_weight(reward):
    from transformers import AutoModelForSequenceClassification

    model, report = AutoModelForSequenceClassification.from_pretrained(reward, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.num_labels == 1 and model.config.pad_token_id is not None
    assert model.score.weight.abs().sum() > 0


def test_reward_does_not_depend_on_padding_side_nor_batch(reward, data):
    from common.training.classifiers import load_classifier, logits_of, render_conversation

    model, tokenizer = load_classifier(str(reward), "float32", num_labels=1)
    rows = read_rows(data / "pref_val.jsonl")
    texts = [
        render_conversation(tokenizer, row["prompt"], row["chosen"][0]["content"] * (1 + i % 3))
        for i, row in enumerate(rows)
    ]
    expected = torch.cat([logits_of(model, tokenizer, [text]) for text in texts])
    for side in ("left", "right"):
        tokenizer.padding_side = side
        for budget in (1, 600, 100_000):
            assert (logits_of(model, tokenizer, texts, token_budget=budget) - expected).abs().max() < 1e-4, (
                side,
                budget,
            )


def test_merged_reward_scores_as_its_adapter(reward, data):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from common.training.classifiers import load_classifier, logits_of, render_conversation

    merged, tokenizer = load_classifier(str(reward), "float32")
    base = AutoModelForSequenceClassification.from_pretrained(
        BASE, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
    )
    adapter = PeftModel.from_pretrained(base, reward / "adapter").eval()
    texts = [
        render_conversation(tokenizer, row["prompt"], row["chosen"][0]["content"])
        for row in read_rows(data / "pref_val.jsonl")
    ]
    assert (logits_of(merged, tokenizer, texts) - logits_of(adapter, tokenizer, texts)).abs().max() < 1e-4


@pytest.mark.parametrize("folder, reason", [("adapter", "adapter without its base"), ("base", "no trained head")])
def test_a_reward_without_a_head_is_refused(reward, data, tmp_path, folder, reason):
    path = reward / "adapter" if folder == "adapter" else BASE
    words = ["--model", BASE, "--train-file", data / "prompts_train.jsonl", "--val-file", data / "sft_val.jsonl"]
    done = stage(
        "50_train_grpo.py", *words, "--rewards", f"model={path}", "--output-dir", tmp_path / "grpo", check=False
    )
    assert done.returncode == 2 and reason in done.stderr and not (tmp_path / "grpo").exists()


# --- stage 33


def generation(prompt: int, sample: int, text: str, reason: str = "stop") -> dict:
    meta = {"id": str(prompt), "form": "五言绝句", "themes": ["山水"]}
    row = {"id": f"p{prompt}#{sample}", "prompt_id": f"p{prompt}", "sample": sample, "seed": sample}
    row |= {"prompt": turn("user", f"写诗{prompt}"), "completion": text, "reference": None, "model": "sft"}
    return row | {"finish_reason": reason, "tokens": len(text), "meta": meta}


GOOD = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
FLAT = "白日依山尽，黄河入海波。欲穷千里目，更上一层天。"
SHAPELESS = "你好，我是一个模型。"


def test_ranking_takes_best_and_worst_and_counts_what_it_drops(tmp_path):
    rows = []
    for prompt in range(30):
        texts = [(text, "stop") for text in (FLAT, GOOD, GOOD, SHAPELESS, "", "\x16" + GOOD)] + [(GOOD[:30], "length")]
        rows += [generation(prompt, i, text, reason) for i, (text, reason) in enumerate(texts)]
    rows += [generation(99, i, SHAPELESS + "啊" * i) for i in range(4)]
    words = [
        "--generations",
        write_rows(tmp_path / "samples.jsonl", rows),
        "--output-dir",
        tmp_path / "data",
        "--rewards",
        "rhyme:2",
        "meter",
    ]
    stage("33_rank_samples.py", *words, "--pairs-per-prompt", 1, "--val-share", 0.2)
    pairs = read_rows(tmp_path / "data/pref_onpolicy_train.jsonl") + read_rows(
        tmp_path / "data/pref_onpolicy_val.jsonl"
    )
    assert len(pairs) == 30
    for pair in pairs:
        assert pair["chosen"][0]["content"] == GOOD and pair["rejected"][0]["content"] == SHAPELESS
        assert pair["meta"]["chosen_score"] > pair["meta"]["rejected_score"]
    dropped = json.loads((tmp_path / "data/pref_onpolicy_train.run.json").read_text(encoding="utf-8"))["figures"][
        "dropped"
    ]
    assert dropped["sample that did not stop"] == 30 and dropped["sample that repeats another"] == 30
    assert dropped["empty sample"] == 30 and dropped["sample with control characters"] == 30 and dropped["tie"] == 1


def test_both_sides_of_a_pair_keep_the_required_rules(tmp_path):
    """FLAT has the form, SHAPELESS has not: the worst sample is not taken where it breaks the rule."""
    rows = [generation(p, i, text) for p in range(30) for i, text in enumerate((GOOD, SHAPELESS, FLAT))]
    words = ["--generations", write_rows(tmp_path / "samples.jsonl", rows), "--rewards", "rhyme", "--require", "form"]
    stage("33_rank_samples.py", *words, "--output-dir", tmp_path / "data", "--val-share", 0.2)
    pairs = read_rows(tmp_path / "data/pref_onpolicy_train.jsonl")
    assert pairs and all(pair["rejected"][0]["content"] == FLAT for pair in pairs)
    figures = json.loads((tmp_path / "data/pref_onpolicy_train.run.json").read_text(encoding="utf-8"))["figures"]
    assert figures["dropped"] == {"sample that breaks a required rule": 30}


def test_the_best_samples_as_sft_rows_and_near_misses_as_pairs(tmp_path):
    rows = [generation(p, i, text) for p in range(30) for i, text in enumerate((SHAPELESS, FLAT, GOOD))]
    words = ["--generations", write_rows(tmp_path / "samples.jsonl", rows), "--rewards", "rhyme", "--val-share", 0.2]
    words += ["--write", "both", "--against", "near_miss", "--output-dir", tmp_path / "data"]
    done = stage("33_rank_samples.py", *words)
    best = read_rows(tmp_path / "data/sft_best_train.jsonl") + read_rows(tmp_path / "data/sft_best_val.jsonl")
    assert [row["completion"][0]["content"] for row in best] == [GOOD] * 30 and best[0]["meta"]["score"] == 1
    pairs = read_rows(tmp_path / "data/pref_onpolicy_train.jsonl")
    assert pairs and all(pair["rejected"][0]["content"] == FLAT for pair in pairs), "SHAPELESS is the worst"
    assert "next: python scripts/40_train_dpo.py" in done.stdout
    words += ["--write", "best", "--against", "worst", "--output-dir", tmp_path / "best"]
    done = stage("33_rank_samples.py", *words)
    assert "next: python scripts/20_train_sft.py" in done.stdout and "sft_best_train.jsonl" in done.stdout
    assert not (tmp_path / "best/pref_onpolicy_train.jsonl").exists()


def test_few_prompts_may_go_without_validation_files_and_the_fix_fits_the_fault(tmp_path):
    rows = [generation(1, i, text) for i, text in enumerate((GOOD, FLAT))]
    words = ["--generations", write_rows(tmp_path / "samples.jsonl", rows), "--rewards", "rhyme"]
    done = stage("33_rank_samples.py", *words, "--output-dir", tmp_path / "data", "--val-share", 0)
    assert len(read_rows(tmp_path / "data/pref_onpolicy_train.jsonl")) == 1 and "--val-file None" in done.stdout
    assert not (tmp_path / "data/pref_onpolicy_val.jsonl").exists()
    done = stage("33_rank_samples.py", *words, "--output-dir", tmp_path / "all", "--val-share", 0.999, check=False)
    assert done.returncode == 2 and "no prompt fell into train; fix: more prompts, or --val-share 0" in done.stderr
    rows = [generation(1, i, text, "length") for i, text in enumerate((GOOD, FLAT))]
    write_rows(tmp_path / "samples.jsonl", rows)
    done = stage("33_rank_samples.py", *words, "--output-dir", tmp_path / "cut", "--val-share", 0, check=False)
    assert done.returncode == 2 and "fix: stage 60 with a larger --max-new-tokens" in done.stderr


def test_one_sample_a_prompt_gives_no_pair(tmp_path):
    file = write_rows(tmp_path / "samples.jsonl", [generation(i, 0, GOOD) for i in range(5)])
    done = stage("33_rank_samples.py", "--generations", file, "--output-dir", tmp_path / "data", check=False)
    assert done.returncode == 2 and "--num-samples" in done.stderr and not (tmp_path / "data").exists()


# --- stage 40


def dpo_words(data: Path, output: Path) -> list:
    files = ["--model", BASE, "--train-file", data / "pref_train.jsonl", "--val-file", data / "pref_val.jsonl"]
    short = [
        "--batch-size",
        8,
        "--accumulation",
        2,
        "--eval-steps",
        8,
        "--probe-count",
        4,
        "--probe-tokens",
        24,
        "--lr",
        2e-3,
    ]
    return [*files, *short, *SHORT_LORA, "--epochs", 2, "--output-dir", output]


@pytest.fixture(scope="session")
def dpo(tmp_path_factory, data) -> Path:
    output = tmp_path_factory.mktemp("checkpoints") / "dpo"
    stage("40_train_dpo.py", *dpo_words(data, output))
    return output


def test_dpo_widens_the_margin_from_the_reference_on(dpo):
    evaluations = [entry for entry in json.loads((dpo / "log_history.json").read_text()) if "eval_loss" in entry]
    assert evaluations[0]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)  # the adapter switched off is the reference
    assert evaluations[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert record_of(dpo)["figures"]["margin"] > 0.2 and record_of(dpo)["figures"]["accuracy"] > 0.7
    assert {"eval_logps/chosen", "eval_logps/rejected", "eval_rewards/chosen"} <= set(evaluations[-1])


def test_dpo_warns_where_both_sides_fall(data, tmp_path):
    """Two sides that differ in one character only: the margin grows fastest by making the text itself unlikely."""
    rows = read_rows(data / "pref_train.jsonl")
    for row in rows:
        text = row["chosen"][0]["content"]
        row["chosen"], row["rejected"] = turn("assistant", text[::-1]), turn("assistant", text[::-1][:-1] + "啊")
    train, val = write_rows(tmp_path / "train.jsonl", rows[:96]), write_rows(tmp_path / "val.jsonl", rows[96:])
    words = [
        "--model",
        BASE,
        "--train-file",
        train,
        "--val-file",
        val,
        *SHORT_LORA,
        "--lr",
        1e-2,
        "--batch-size",
        16,
        "--probe-count",
        4,
        "--probe-tokens",
        24,
    ]
    done = stage("40_train_dpo.py", *words, "--eval-steps", 12, "--epochs", 4, "--output-dir", tmp_path / "dpo")
    figures = record_of(tmp_path / "dpo")["figures"]
    assert figures["chosen_logps_change"] < 0 and figures["rejected_logps_change"] < 0
    assert "both became less likely" in done.stdout


def test_a_pair_with_equal_sides_is_named_with_its_line(data, tmp_path):
    rows = read_rows(data / "pref_train.jsonl")
    rows[6]["rejected"] = rows[6]["chosen"]
    train = write_rows(tmp_path / "train.jsonl", rows)
    words = ["--model", BASE, "--train-file", train, "--val-file", data / "pref_val.jsonl"]
    done = stage("40_train_dpo.py", *words, "--output-dir", tmp_path / "dpo", check=False)
    assert done.returncode == 2 and "train.jsonl:7" in done.stderr and "equal" in done.stderr
    done = stage("40_train_dpo.py", *words, "--output-dir", tmp_path / "dpo", "--max-length", 4096, check=False)
    assert done.returncode == 2 and "the model reads 2048 tokens" in done.stderr


# --- stage 50


def grpo_words(data: Path, output: Path, *more) -> list:
    files = ["--model", BASE, "--train-file", data / "prompts_train.jsonl", "--val-file", data / "sft_val.jsonl"]
    short = ["--batch-size", 16, "--num-generations", 4, "--max-new-tokens", 24, "--eval-steps", 2, "--probe-count", 4]
    return [*files, *short, *SHORT_LORA, "--max-steps", 4, "--output-dir", output, *more]


@pytest.fixture(scope="session")
def grpo(tmp_path_factory, data, reward) -> Path:
    output = tmp_path_factory.mktemp("checkpoints") / "grpo"
    stage(
        "50_train_grpo.py",
        *grpo_words(data, output, "--rewards", "no_repeat:1", "form", f"model={reward}:0.2", "--beta", 0),
    )
    return output


def test_grpo_logs_every_part_and_the_drift(grpo):
    log = json.loads((grpo / "log_history.json").read_text(encoding="utf-8"))
    steps = [entry for entry in log if "reward" in entry]
    probes = [entry for entry in log if "probe/kl" in entry]
    assert len(steps) == 4 and [entry["step"] for entry in probes] == [0, 2, 4]
    expected = {
        "reward/no_repeat",
        "reward/form",
        "reward/model=reward",
        "entropy",
        "frac_reward_zero_std",
        "completions/mean_length",
        "unjudged",
    }
    assert expected <= set(steps[0]), sorted(steps[0])
    assert steps[0]["entropy"] > 0
    assert (
        probes[0]["probe/kl"] == pytest.approx(0, abs=1e-5) and probes[-1]["probe/kl"] > 0
    )  # measured although beta is 0
    assert (grpo / "overoptimisation.png").stat().st_size > 5000


def test_grpo_raises_a_reward_that_is_easy_to_raise(data, tmp_path):
    """Answers that repeat a character: the base seldom gives one, and 20 steps of a hot policy learn to."""
    words = grpo_words(data, tmp_path / "grpo", "--rewards", "no_repeat:-1", "--beta", 0, "--lr", 5e-3)
    stage("50_train_grpo.py", *words, "--max-steps", 20, "--eval-steps", 20, "--probe-count", 16)
    log = json.loads((tmp_path / "grpo/log_history.json").read_text(encoding="utf-8"))
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    # means over 80 answers each; the gain is ten times the margin
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.02
    probes = [entry["probe/reward"] for entry in log if "probe/reward" in entry]
    assert probes[-1] > probes[0]


def test_a_budget_ends_the_run_and_keeps_the_adapter_within_it(data, tmp_path):
    words = grpo_words(
        data, tmp_path / "grpo", "--rewards", "no_repeat", "--lr", 2e-2, "--kl-budget", 0.01, "--max-steps", 8
    )
    done = stage("50_train_grpo.py", *words)
    assert "stop: KL" in done.stdout and record_of(tmp_path / "grpo")["figures"]["steps"] < 8
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "grpo/adapter_model.safetensors")
    assert all(value.abs().max() == 0 for name, value in weights.items() if "lora_B" in name)  # that of step 0
    assert record_of(tmp_path / "grpo")["figures"]["kl"] < 0.01, "the record is of the adapter that was kept"


def test_grpo_runs_where_no_reward_can_judge_the_probe(data, tmp_path):
    rows = read_rows(data / "sft_val.jsonl")
    for row in rows:
        row["meta"]["themes"] = []  # the theme reward has nothing to say of these
    val = write_rows(tmp_path / "val.jsonl", rows)
    words = grpo_words(data, tmp_path / "grpo", "--rewards", "theme", "--max-steps", 1, "--beta", 0)
    done = stage("50_train_grpo.py", *words, "--val-file", val)
    assert "reward: – -> –" in done.stdout and (tmp_path / "grpo/overoptimisation.png").exists()
    assert record_of(tmp_path / "grpo")["figures"]["reward"] is None


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(data, tmp_path):
    rows = read_rows(data / "prompts_train.jsonl")
    rows[3]["prompt"] = turn("user", "山" * 180)
    train = write_rows(tmp_path / "prompts.jsonl", rows)
    words = grpo_words(data, tmp_path / "grpo", "--rewards", "no_repeat", "--max-steps", 2, "--max-length", 200)
    done = stage("50_train_grpo.py", *words, "--train-file", train)
    assert "1 prompts of more than 176 tokens" in done.stdout


def test_a_reward_that_raises_is_named(data, tmp_path):
    rows = read_rows(data / "prompts_train.jsonl")
    for row in rows:
        row["meta"]["form"] = "九言绝句"
    train = write_rows(tmp_path / "prompts.jsonl", rows)
    done = stage(
        "50_train_grpo.py",
        *grpo_words(data, tmp_path / "grpo", "--rewards", "form", "--train-file", train),
        check=False,
    )
    assert done.returncode == 2 and "reward form" in done.stderr
