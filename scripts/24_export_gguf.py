"""Export a merged model as a GGUF file for llama.cpp and Ollama, and prove it in llama.cpp.

Token ids of varied texts have to be llama.cpp's, next-token distributions close, greedy answers equal where the file is
F32, answers have to end at the model's own stop token, and a chat completion has to answer. Needs
requirements-gguf.txt. Other quantisations (Q4_K_M, ...) are llama.cpp's own: llama-quantize FILE-f16.gguf
FILE-q4_k_m.gguf q4_k_m.

Reads   --model: a merged model (stage 22) or a base
Writes  --output-dir: <name>-<type>.gguf, Modelfile (Ollama: template, stop tokens, sampling), run.json
Run     python scripts/24_export_gguf.py --model checkpoints/poems/sft_merged --type Q8_0
        ollama create poems -f checkpoints/poems/gguf/Modelfile
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.settings import UserError, read_settings, resolve_model, show_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIE = 1e-3  # nats by which two next tokens may differ and count as equally likely: float32 sums in another order


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = "checkpoints/{task}/sft_merged"
    """a merged model: a folder or a hub id"""
    type: Literal["F32", "F16", "BF16", "Q8_0"] = "F16"
    """of the matrices; vectors stay F32"""

    # --- comparison with llama.cpp
    texts: int = 500
    """texts whose token ids have to be equal"""
    places: int = 100
    """beginnings of texts whose next-token distributions are compared"""
    max_kl: float = 0.05
    """nats: allowed mean KL(llama.cpp || transformers)"""
    questions: tuple[str, ...] = ("写一首五言绝句", "你好")
    """asked greedily on both sides; equal answers are demanded of F32"""
    answer_tokens: int = 48
    """tokens of such an answer"""

    # --- sampling that the Modelfile recommends
    temperature: float = 0.8
    """of Ollama's answers"""
    top_p: float = 0.95
    """probability mass to draw from"""
    min_p: float = 0.0
    """tokens with less than this share of the likeliest one's probability are not drawn"""

    # --- run
    output_dir: Path = Path("checkpoints/{task}/gguf")
    """GGUF file, Modelfile and run record"""
    seed: int = 42
    """of the texts"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""

    def clashes(self):
        if not self.questions:
            yield "--questions: none is named, and llama.cpp answers one at least", "name one"


def main(settings: Settings) -> None:
    from common.generation import render_prompt
    from common.gguf.certificate import compare_distributions, compare_ids, varied_texts
    from common.gguf.export import modelfile, require_exportable, write_gguf
    from common.gguf.llama_cpp import llama_cpp, require_llama_cpp
    from common.jsonl import write_bytes
    from common.model_files import check_model
    from common.models import load_model, load_tokenizer, model_config
    from common.runs import begin_run

    model_path = check_model(resolve_model(settings.model, settings.task))
    require_exportable(model_path, model_config(model_path))
    require_llama_cpp()
    tokenizer = load_tokenizer(model_path)
    model = load_model(model_path, tokenizer, "float32")
    with begin_run(settings.output_dir, settings, {"model": model_path}, "24_export_gguf") as run:
        name = Path(model_path).name
        path = settings.output_dir / f"{name}-{settings.type.lower()}.gguf"
        write_gguf(model, tokenizer, path, name, settings.type)
        text = modelfile(tokenizer, path.name, settings.temperature, settings.top_p, settings.min_p)
        write_bytes(settings.output_dir / "Modelfile", text.encode())
        print(f"{show_path(path)}: {path.stat().st_size / 1e6:.1f} MB")

        texts = varied_texts(settings.texts, settings.seed)
        prompts = [
            render_prompt(tokenizer, [{"role": "user", "content": question}], False) for question in settings.questions
        ]
        with llama_cpp(path, context=2048) as other:
            different = compare_ids(tokenizer, other, texts)
            figures = compare_distributions(model, tokenizer, other, texts, settings.places)
            equal, ended = 0, 0
            for prompt in prompts:
                ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                theirs = other.greedy(ids, settings.answer_tokens)
                equal += _is_greedy(model, ids, theirs)
                ended += theirs[-1] in model.generation_config.eos_token_id
            reply = other.chat([{"role": "user", "content": settings.questions[0]}], max_tokens=settings.answer_tokens)
        figures |= {"texts_with_other_ids": len(different), "equal_greedy_answers": equal, "ended_answers": ended}
        for key, value in figures.items():
            run.figure(key, value)
        print(
            f"llama.cpp: {len(different)} of {len(texts)} texts with other token ids; KL {figures['kl_mean']:.6f} "
            f"nats, the same first choice at {figures['top1_agreement']:.1%}; {equal} of {len(prompts)} greedy answers "
            f"equal, {ended} ended by themselves"
        )
        print(f"chat completion: {reply['message']['content'][:80]!r} ({reply['finish_reason']})")
        wrong = (
            f"{len(different)} texts have other token ids, first {different[0][0]!r}"
            if different
            else f"mean KL {figures['kl_mean']:.3f} is over {settings.max_kl}"
            if figures["kl_mean"] > settings.max_kl
            else f"{len(prompts) - equal} greedy answers differ"
            if settings.type == "F32" and equal < len(prompts)
            else ""
        )
        if wrong:
            raise UserError(f"{show_path(path)} is not the model: {wrong}; fix: do not use it, and report this model")
        run.finish(shlex.join(["ollama", "create", name, "-f", f"{show_path(settings.output_dir)}/Modelfile"]))


def _is_greedy(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> bool:
    """Is every token of `answer` the model's likeliest one after what stands before it, or as likely within TIE?"""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([prompt + answer], device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    chosen = logits.gather(-1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
    return bool((logits.amax(-1) - chosen <= TIE).all())


if __name__ == "__main__":
    main(read_settings(Settings))
