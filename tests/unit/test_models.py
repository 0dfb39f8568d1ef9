"""Loading: the stop-token contract, errors that name their fix, and the lean loss against trl's own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.models import align_stop_tokens, load_model, load_tokenizer, newest_checkpoint, turn_end
from common.pretraining.char_tokenizer import PAD, TURN_END, build_tokenizer
from common.settings import UserError
from conftest import ROOT

BASE = str(ROOT / "data/tiny_qwen3")


@pytest.fixture
def tokenizer():
    return build_tokenizer("春眠不觉晓，处闻啼鸟。问答")


def tiny_model(tokenizer) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(tokenizer), intermediate_size=64, tie_word_embeddings=True, **sizes)
    )


@pytest.mark.parametrize(
    "text", ["春眠不觉晓", "emoji 😀 and é", "處處聞啼鳥", "<|im_end|> <0x41>\n\ttab", "", "user assistant"]
)
def test_any_text_survives_a_round_trip(text):
    tokenizer = load_tokenizer(BASE)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_embedded_base_keeps_the_stop_contract(capsys):
    tokenizer = load_tokenizer(BASE)
    model = load_model(BASE, tokenizer, "float32")
    assert (tokenizer.eos_token, tokenizer.pad_token) == (TURN_END, PAD)
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert sum(parameter.numel() for parameter in model.parameters()) <= 8_000_000
    assert capsys.readouterr().out == "", "nothing to fix"


def test_pad_that_is_eos_is_replaced_with_a_notice(tokenizer, tmp_path, capsys):
    tokenizer.eos_token = tokenizer.pad_token = PAD  # as Qwen3's base models ship
    tokenizer.save_pretrained(tmp_path)
    fixed = load_tokenizer(str(tmp_path))
    assert (fixed.eos_token, fixed.pad_token) == (TURN_END, PAD)
    assert "eos <|endoftext|> -> <|im_end|>" in capsys.readouterr().out


def test_pad_that_is_the_turn_end_is_replaced(tokenizer, tmp_path):
    tokenizer.pad_token = TURN_END
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == PAD


def test_a_template_without_a_stop_token_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="no special token behind an answer"):
        turn_end(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        turn_end(tokenizer)


def test_the_assistant_mask_is_the_answer_and_its_eos(tokenizer):
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "春眠不觉晓"}]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    trained = [token for token, kept in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(trained) == "春眠不觉晓<|im_end|>"


def test_more_tokens_than_embeddings_is_an_error(tokenizer):
    model = tiny_model(tokenizer)
    tokenizer.add_tokens(["新"])
    with pytest.raises(UserError, match="more tokens than the model has embeddings"):
        align_stop_tokens(model, tokenizer)


def test_a_folder_without_a_model_is_a_short_error(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no config.json inside"):
        load_model(str(tmp_path), tokenizer)


def test_newest_checkpoint_is_the_newest_whole_one(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step, state in ((5, "{}"), (40, "{}"), (100, '{"global_step": 1')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    (tmp_path / "checkpoint-200").mkdir()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-40")
    for step, value in ((5, 1.0), (40, float("nan"))):
        save_file({"lora_B": torch.tensor([1.0, value])}, tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5"), "no run goes on from weights that are NaN"


def test_the_seed_decides_the_order_of_rows(tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig

    from common.training.trl_cpu import LeanSFTTrainer

    rows = [
        {"prompt": [{"role": "user", "content": "问"}], "completion": [{"role": "assistant", "content": "春" * n}]}
        for n in range(1, 41)
    ]
    orders = []
    for seed in (1, 1, 2):
        config = SFTConfig(
            output_dir=str(tmp_path),
            bf16=False,
            use_cpu=True,
            report_to="none",
            seed=seed,
            assistant_only_loss=True,
            train_sampling_strategy="batch_rebalance",
        )
        trainer = LeanSFTTrainer(
            model=tiny_model(tokenizer), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        orders.append([batch["labels"].ne(-100).sum(1).tolist() for batch in trainer.get_train_dataloader()])
    assert orders[0] == orders[1] != orders[2]


def test_a_models_own_repetition_penalty_does_not_bend_samples(tokenizer):
    from common.generation import sample

    model = tiny_model(tokenizer)
    align_stop_tokens(model, tokenizer)
    texts = []
    for penalty in (None, 3.0):
        model.generation_config.repetition_penalty = penalty
        texts.append(
            list(sample(model, tokenizer, ["问答"], max_new_tokens=24, temperature=0, top_k=0, top_p=1, seed=0))
        )
    assert texts[0] == texts[1]


def test_lean_loss_is_trls_loss(tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from common.training.trl_cpu import LeanSFTTrainer

    answers = ["春眠不觉晓", "处处闻啼鸟，处处闻啼鸟。", "晓"]
    rows = [
        {"prompt": [{"role": "user", "content": "问"}], "completion": [{"role": "assistant", "content": a}]}
        for a in answers
    ]
    values = []
    for kind in (SFTTrainer, LeanSFTTrainer):
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_model(tokenizer), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        )
        config = SFTConfig(
            output_dir=str(tmp_path),
            bf16=False,
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=False,
            assistant_only_loss=True,
            per_device_train_batch_size=3,
        )
        trainer = kind(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        batch = {name: batch[name][batch["input_ids"].sum(1).argsort()] for name in batch}  # one order in both
        kept = (batch["labels"] != -100).sum()
        assert kept == sum(len(answer) + 1 for answer in answers)
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=kept)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        values.append((loss.item(), gradient))
    assert values[0][0] == pytest.approx(values[1][0], abs=1e-5)
    assert torch.allclose(values[0][1], values[1][1], atol=1e-6)
