"""Generate texts with any model or adapter: for a prompt file, for one prompt, or for prompts typed in.

Backend hf (transformers) batches prompts by length on one fixed plan, and draws sample k of every prompt with seed + k;
backend vllm (docs/OPERATIONS.md) has its engine batch them and seeds the engine once. Either way a run that was killed
goes on where it stopped.

Reads   --model, --adapter; --prompts-file: rows with "prompt" (messages) and "meta"
Writes  --output-file: one row a sample (id, prompt_id, sample, seed, prompt, completion, reference, model,
        finish_reason, tokens, meta)
Run     python scripts/60_generate.py --adapter checkpoints/poems/sft
        python scripts/60_generate.py --adapter checkpoints/poems/sft \\
            --prompt "写一首[五言绝句] 要求4句 主题为: 山水、自然、宁静"
        python scripts/60_generate.py --model checkpoints/poems/sft_merged --interactive
        python scripts/60_generate.py --adapter checkpoints/poems/sft --backend vllm
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.model_files import check_adapter, check_model, trained_in_full
from common.settings import UserError, read_settings, resolve_model, show_path, unused
from common.training.options import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TYPED_TOKENS = 1024  # room that vLLM keeps for a prompt that is typed in


@dataclass
class Settings(ModelSettings):
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "data/tiny_qwen3"
    """folder or hub id"""
    adapter: str = ""
    """LoRA folder on top of the model; empty = none"""
    force_base: bool = False
    """put the adapter on --model although it was trained on another base"""
    name: str = ""
    """run name; empty = the folder's name, "base" for the model as it ships"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""
    dtype: str = "auto"
    """auto, float32, bfloat16"""
    device_map: str = ""
    """auto = spread the model over all GPUs, hf only; empty = one device"""
    backend: Literal["hf", "vllm"] = "hf"
    """transformers, or vLLM's engine with adapters as LoRA requests"""
    tensor_parallel: int = 1
    """GPUs that share the model, vllm only"""

    # --- prompts: a file, one prompt, or typed in
    prompts_file: Path = Path("processed_data/{task}/prompts_test.jsonl")
    """rows with a field prompt"""
    max_prompts: int = 0
    """first prompts of the file, 0 = all"""
    prompt: str = ""
    """one prompt: the answers are printed, nothing is written"""
    interactive: bool = False
    """read prompts from the keyboard until an empty line"""
    raw: bool = False
    """--prompt and typed prompts are gone on with as they are, without the chat template"""

    # --- sampling
    num_samples: int = 1
    """per prompt"""
    temperature: float = 1.0
    """0 = greedy"""
    top_k: int = 0
    """most likely tokens to draw from, 0 = all"""
    top_p: float = 1.0
    """probability mass to draw from"""
    min_p: float = 0.0
    """tokens with less than this share of the likeliest one's probability are not drawn, 0 = none"""
    max_new_tokens: int = 96
    """an answer that is longer ends with finish_reason length"""
    batch_tokens: int = 32768
    """tokens in a batch, prompts and answers; hf only"""

    # --- run
    output_file: Path = Path("results/{task}/generations/{name}.jsonl")
    """{name} is the run name"""
    seed: int = 42
    """of sample 0; sample k uses seed + k"""
    overwrite: bool = False
    """replace what an earlier run left in output_file"""

    def clashes(self):
        yield from super().clashes()
        if self.backend == "hf":
            yield from unused(self, "with --backend hf", "tensor_parallel")
        else:
            yield from unused(self, "with --backend vllm", "device_map", "batch_tokens", "attn_implementation")
        if not self.adapter:
            yield from unused(self, "without --adapter", "force_base")
        if self.prompt or self.interactive:
            names = "prompts_file", "max_prompts", "name", "output_file", "overwrite"
            yield from unused(self, "with --prompt and --interactive: nothing is written", *names)
            if self.raw:
                yield from unused(self, "with --raw: there is no template", "enable_thinking")


def run_name(settings: Settings) -> str:
    """The folder's name for what a stage has trained or merged (checkpoints/poems/sft -> sft), base for any other
    model."""
    folder = Path(settings.adapter or settings.model).resolve()
    trained = settings.adapter or (folder / "merge_report.json").exists() or trained_in_full(folder)
    return folder.name if trained else "base"


def open_backend(
    settings: Settings,
    model_path: str,
    adapter: str | None,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    done: int = 0,
):
    """A function (texts, seed=, skip=) that yields (index, completion, finish_reason, tokens); longest: tokens in a
    prompt; done: rows of an earlier run, whose draws a resumed engine must not repeat."""
    names = ["max_new_tokens", "temperature", "top_k", "top_p", "min_p"]
    if settings.backend == "hf":
        from common.generation import sample
        from common.models import load_model

        how = settings.device_map, settings.force_base, settings.quantize, settings.attn_implementation
        model = load_model(model_path, tokenizer, settings.dtype, adapter, *how)
        names = [*names, "batch_tokens"]
        return partial(sample, model, tokenizer, **{name: getattr(settings, name) for name in names})
    from common.vllm_engine import open_engine, stop_tokens, vllm_sample

    room = longest + settings.max_new_tokens
    engine = open_engine(
        model_path, settings.dtype, adapter, room, settings.tensor_parallel, settings.seed * 1_000_003 + done
    )
    sampling = {name: getattr(settings, name) for name in names}
    return partial(
        vllm_sample, engine, tokenizer, stops=stop_tokens(model_path, tokenizer), adapter=adapter, **sampling
    )


def show_answers(settings: Settings, sample: Callable, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    from common.generation import opening

    row = {"text": prompt} if settings.raw else {"prompt": [{"role": "user", "content": prompt}]}
    texts = [opening(tokenizer, row, settings.enable_thinking, len(prompt))] * settings.num_samples
    for _, text, reason, tokens in sample(texts, seed=settings.seed):
        print(f"{text}\n[{reason}, {tokens} tokens]")


def main(settings: Settings) -> None:
    model_path = resolve_model(settings.model, settings.task)
    adapter = resolve_model(settings.adapter, settings.task) if settings.adapter else None
    check_model(model_path)
    notice = check_adapter(adapter, model_path, force_base=settings.force_base) if adapter else None
    if notice:
        print(f"notice: {notice}")
    one_by_one = bool(settings.prompt or settings.interactive)
    if settings.raw and not one_by_one:
        raise UserError("--raw: rows of a file have prompts; fix: --raw with --prompt or --interactive")
    if not one_by_one and not settings.prompts_file.exists():
        raise UserError(
            f"{settings.prompts_file}: no such file; fix: run the prepare stage, or use --prompt or --interactive"
        )

    from tqdm import tqdm

    from common.generation import prompt_id, render_prompt
    from common.jsonl import JsonlAppender, read_jsonl
    from common.models import load_tokenizer, require_context
    from common.preflight.checks import detect_schema
    from common.runs import begin_run
    from tasks.base import score_command

    if settings.backend == "vllm":
        from common.vllm_engine import require_vllm

        require_vllm()
    if settings.output_file.suffix != ".jsonl":
        raise UserError(f"--output-file {settings.output_file}: not a .jsonl file; fix: name one")
    if one_by_one:
        tokenizer = load_tokenizer(model_path, documents=settings.raw)
        sample = open_backend(settings, model_path, adapter, tokenizer, TYPED_TOKENS)
        if settings.prompt:
            show_answers(settings, sample, tokenizer, settings.prompt)
        while settings.interactive:
            print("prompt> ", end="", flush=True)
            line = sys.stdin.readline().strip()
            if not line:
                return
            show_answers(settings, sample, tokenizer, line)
        return

    name = settings.name or run_name(settings)
    output_file = Path(str(settings.output_file).replace("{name}", name))
    inputs = {"model": model_path, "adapter": adapter, "prompts_file": settings.prompts_file}
    # before an earlier run's rows are touched
    if detect_schema(settings.prompts_file) == "text":
        raise UserError(
            f"{show_path(settings.prompts_file)}: documents have no prompts; "
            'fix: --raw --prompt "the beginning of a document", or a file of prompts'
        )
    rows = read_jsonl(settings.prompts_file, "prompts")[: settings.max_prompts or None]
    if not rows:
        raise UserError(f"{settings.prompts_file}: no rows; fix: run the prepare stage, or name another file")
    tokenizer = load_tokenizer(model_path)
    ids = [prompt_id(row) for row in rows]
    if len(set(ids)) < len(ids):
        raise UserError(
            f"{settings.prompts_file}: {len(ids) - len(set(ids))} rows repeat another's id and prompt; fix: remove them"
        )
    texts = [render_prompt(tokenizer, row["prompt"], settings.enable_thinking, row.get("tools")) for row in rows]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    longest = max(lengths)
    place = f"{show_path(settings.prompts_file)}:{lengths.index(longest) + 1}"
    require_context(model_path, longest + settings.max_new_tokens, f"{place}: the longest prompt + --max-new-tokens:")
    with begin_run(output_file, settings, inputs, "60_generate") as run:
        if notice:
            run.figure("base_notice", notice)
        with JsonlAppender(output_file, key="id") as output:
            sample = open_backend(settings, model_path, adapter, tokenizer, longest, len(output.done))
            started, written = time.time(), 0
            for number in range(settings.num_samples):

                def finished(indices: list[int], number: int = number) -> bool:
                    return all(f"{ids[index]}#{number}" in output.done for index in indices)

                seed = settings.seed + number
                answers = sample(texts, seed=seed, skip=finished)
                progress = tqdm(answers, f"sample {number + 1} of {settings.num_samples}", len(texts), unit=" rows")
                for index, text, reason, tokens in progress:
                    meta = dict(rows[index]["meta"])
                    row = {"id": f"{ids[index]}#{number}", "prompt_id": ids[index], "sample": number, "seed": seed}
                    row |= {"tools": rows[index]["tools"]} if rows[index].get("tools") else {}
                    row |= {
                        "prompt": rows[index]["prompt"],
                        "completion": text,
                        "reference": meta.pop("reference", None),
                    }
                    output.write(row | {"model": name, "finish_reason": reason, "tokens": tokens, "meta": meta})
                    written += tokens
            speed = written / (time.time() - started)
        print(f"{len(output.done)} rows in {output_file}, {speed:.0f} tokens/s")
        run.figure("rows", len(output.done))
        run.figure("tokens_per_second", speed)
        run.finish(score_command(settings.task, output_file))


if __name__ == "__main__":
    main(read_settings(Settings))
