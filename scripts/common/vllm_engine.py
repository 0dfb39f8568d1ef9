"""vLLM: the offline engine that stage 60 generates with, and a server for as long as a block lasts.

vLLM is no need of the other stages: requirements-vllm.txt for GPUs, requirements-vllm-cpu.txt for CPUs
(runs/setup_vllm.sh).
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from common.llm_endpoint import is_loopback
from common.settings import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM makes room for
# Seconds until a server answers: it imports vLLM in three processes, one after the other.
START_SECONDS = 900


def require_vllm() -> None:
    """Raises UserError where vLLM is not installed; sets what suits small models on a CPU, unless the user has set
    it."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vllm is not installed; fix: bash runs/setup_vllm.sh (GPU: pip install -r requirements-vllm.txt)"
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; else most of the memory is taken
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def open_engine(
    model: str,
    dtype: str = "auto",
    adapter: str | None = None,
    max_length: int = 2048,
    tensor_parallel: int = 1,
    seed: int = 0,
) -> LLM:
    """An offline vllm.LLM with room for `max_length` tokens a row, prompt and answer; `adapter` is served as LoRA
    requests.

    On a CPU the engine runs in this process: its own processes would import vLLM twice more, and leave a core unused.
    Raises UserError where vLLM refuses model, adapter or length.
    """
    require_vllm()
    from common.model_files import read_adapter_config
    from common.models import pick_device, resolve_dtype

    words = {"enable_lora": False}
    if adapter:
        config = read_adapter_config(adapter)
        if config.get("trainable_token_indices"):
            raise UserError(f"{adapter} trains embeddings too, which vllm cannot serve; fix: merge it (stage 22)")
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        if rank > LORA_RANKS[-1]:
            raise UserError(f"{adapter}: rank {rank}, and vllm serves up to {LORA_RANKS[-1]}; fix: merge it (stage 22)")
        words = {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(r for r in LORA_RANKS if r >= rank)}
    if pick_device() == "cpu":
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        words |= {"enforce_eager": True, "distributed_executor_backend": "uni" if tensor_parallel == 1 else "mp"}
    from vllm import LLM

    try:
        return LLM(
            model=model,
            dtype=str(resolve_dtype(dtype)).removeprefix("torch."),
            skip_tokenizer_init=True,  # prompts come as tokens, answers are decoded as those of the hf backend
            # a model's own sampling defaults, such as a repetition penalty, would change the samples
            generation_config="vllm",
            max_model_len=max_length,
            tensor_parallel_size=tensor_parallel,
            disable_log_stats=True,
            seed=seed,
            trust_remote_code=False,
            **words,
        )
    except (ValueError, RuntimeError, AssertionError) as error:  # lengths, GPUs, memory
        raise UserError(f"vllm refuses {model}: {first_reason(error)}; fix: --backend hf, or what it names") from None


def first_reason(error: Exception) -> str:
    """The line of vLLM's (pydantic's) message that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Value error" in line), lines[0] if lines else type(error).__name__)


def stop_tokens(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's eos and whatever else the model's generation_config stops at: as
    common.models.align_stop_tokens."""
    from transformers import GenerationConfig

    try:
        known = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a folder without one
        known = None
    known = known if isinstance(known, list) else [] if known is None else [known]
    return list(dict.fromkeys([tokenizer.eos_token_id, *known]))


def vllm_sample(
    engine: LLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    stops: list[int],
    adapter: str | None = None,
    *,
    max_new_tokens: int,
    seed: int,
    skip: Callable[[list[int]], bool] = lambda indices: False,
    **sampling,
) -> Iterator[tuple[int, str, str, int]]:
    """What common.generation.sample yields, as vLLM finishes rows: (index, completion, finish_reason, tokens).

    All prompts are in the engine at once, which batches them as they come and go, and draws with the seed it was opened
    with: a seed for each prompt costs a third of the speed. `seed` only names the requests. `skip([index])` says that a
    row need not be run. sampling: temperature, top_k, top_p, min_p.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for index, ids in enumerate(encoded):
        if skip([index]):
            continue
        room = engine.model_config.max_model_len - max_new_tokens
        if len(ids) > room:
            raise UserError(f"a prompt of {len(ids)} tokens, and room for {room}; fix: shorten it, or --backend hf")
        params = SamplingParams(
            max_tokens=max_new_tokens,
            stop_token_ids=stops,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **sampling,
        )
        engine.llm_engine.add_request(f"{seed}-{index}", {"prompt_token_ids": ids}, params, lora_request=lora)
    while engine.llm_engine.has_unfinished_requests():
        for request in engine.llm_engine.step():
            tokens = list(request.outputs[0].token_ids)
            stopped = bool(tokens) and tokens[-1] in stops
            answer = tokens[:-1] if stopped else tokens
            # the engine may add to the id it was given
            index = int(request.request_id.split("-")[1])
            text = tokenizer.decode(answer, skip_special_tokens=True)
            yield index, text, "stop" if stopped else "length", len(tokens)


@contextmanager
def serve(model: str, dtype: str = "auto", max_length: int = 2048, words: tuple[str, ...] = ()) -> Iterator[str]:
    """The URL of a vLLM server for `model`, on a free port of 127.0.0.1, stopped at the end of the block.

    `words` are further flags. Raises UserError with the end of the server's log where it does not start.
    """
    require_vllm()
    from common.models import pick_device, resolve_dtype

    ask_directly("127.0.0.1")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    eager = ["--enforce-eager"] if pick_device() == "cpu" else []
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *eager, *words]
    command += ["--dtype", str(resolve_dtype(dtype)).removeprefix("torch."), "--max-model-len", str(max_length)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    print(f"starting vLLM for {model}", flush=True)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    tail = log.read()[-3000:].decode("utf-8", errors="replace")
                    raise UserError(f"vllm did not start: {' '.join(command)}\n{tail}")
                time.sleep(0.5)
            yield url
        finally:
            _stop(process)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def get(url: str, path: str) -> dict:
    """The JSON that a vLLM server answers at `path`. Raises UserError with what it says against the request."""
    return _ask(url, path, None)


def require_server(url: str, flag: str) -> None:
    """Raises UserError where no vLLM server answers at `url`, which `flag` names: before an earlier run is touched."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts = host = None
    if not host or parts.scheme not in ("http", "https"):
        raise UserError(f"{flag} {url}: no http address; fix: e.g. http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise UserError(f"{flag}: a user or a password in the address; fix: without them, the key in VLLM_API_KEY")
    ask_directly(host)
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=20).close()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{flag} {url}: no vLLM server answers ({error}); fix: start it, or name another") from None


def served_model(url: str) -> str:
    """The name of the model that a vLLM server serves."""
    try:
        return str(get(url, "v1/models")["data"][0]["id"])
    except (LookupError, TypeError):
        raise UserError(f"{url}/v1/models names no model; fix: name a vLLM server") from None


def ask_directly(host: str) -> None:
    """A server on this machine is never asked through a proxy, neither by urllib nor by requests (trl's client)."""
    if is_loopback(host):
        known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = f"{known},{host}" if known else host


def post(url: str, path: str, body: dict) -> dict:
    """The JSON that a vLLM server answers to `body`. Raises UserError with what it says against the request."""
    return _ask(url, path, json.dumps(body, ensure_ascii=False).encode("utf-8"))


def _ask(url: str, path: str, data: bytes | None) -> dict:
    key = os.environ.get("VLLM_API_KEY")  # vLLM's own name for the key of a server
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{url.rstrip('/')}/{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        said = error.read()[:500].decode("utf-8", errors="replace")
        raise UserError(f"{url}/{path}: {error.code}: {said}; fix: name a vLLM server of this model") from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no JSON
        raise UserError(f"{url}/{path}: {error}; fix: start the server, or leave it to --server start") from None


def _stop(process: subprocess.Popen) -> None:
    """The server and the processes it started: it has a session of its own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
