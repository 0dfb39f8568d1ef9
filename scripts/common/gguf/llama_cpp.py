"""llama.cpp (xllamacpp) on a GGUF file: the other implementation that stages 01 and 24 compare theirs with.

Its own HTTP server runs inside this process on 127.0.0.1, on a free port. A proxy of the environment is never asked.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.settings import UserError

HOW_TO_INSTALL = "fix: pip install -r requirements-gguf.txt"


class LlamaCpp:
    """A client of the server at `address`."""

    def __init__(self, address: str):
        self.address = address
        self._ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def post(self, path: str, body: dict) -> dict:
        """The reply to one request as JSON. Raises UserError with llama.cpp's own words where it refuses."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with self._ask(request, timeout=600) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            raise UserError(f"llama.cpp refused {path}: {error.read()[:300].decode(errors='replace')}") from None

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return self.post("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})["tokens"]

    def next_token(self, ids: list[int], count: int) -> dict[int, float] | None:
        """The `count` likeliest next tokens after `ids`: id -> log-probability (nats) at temperature 1. None where
        every draw ended the text: the server then says nothing of the distribution."""
        body = {"prompt": ids, "n_predict": 1, "n_probs": count, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        body |= {"min_p": 0.0, "post_sampling_probs": False, "cache_prompt": False}
        for seed in range(8):
            reply = self.post("/completion", body | {"seed": seed})
            if reply.get("completion_probabilities"):
                top = reply["completion_probabilities"][0]["top_logprobs"]
                return {entry["id"]: entry["logprob"] for entry in top if math.isfinite(entry["logprob"])}
        return None

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Up to `count` tokens after `ids`, the likeliest each time; the model's own stop token is the last."""
        body = {"prompt": ids, "n_predict": count, "temperature": 0.0, "return_tokens": True, "cache_prompt": False}
        return self.post("/completion", body)["tokens"]

    def chat(self, messages: list[dict], **body) -> dict:
        """One choice of /v1/chat/completions: message, finish_reason."""
        return self.post("/v1/chat/completions", {"messages": messages, **body})["choices"][0]


def require_llama_cpp() -> None:
    """Raises UserError where xllamacpp is not installed: before an earlier run's files are touched."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError(f"xllamacpp is not installed, and llama.cpp proves the file; {HOW_TO_INSTALL}")


@contextmanager
def llama_cpp(path: Path, context: int = 1024) -> Iterator[LlamaCpp]:
    """llama.cpp with the GGUF file at `path`, reading up to `context` tokens; ends with the block.

    Raises UserError where xllamacpp is not installed or llama.cpp cannot read the file.
    """
    require_llama_cpp()
    import xllamacpp

    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = context, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # its defaults round keys and values to 16 bits: tokens that are .0016 nats apart then change places
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 0
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: llama.cpp cannot read it ({error}); fix: take another GGUF file") from None
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server
