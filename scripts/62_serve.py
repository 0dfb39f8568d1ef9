"""Serve the style classifier and the scalar reward model over HTTP. Writing models are served by `vllm serve`
(docs/OPERATIONS.md); this service: docs/tasks/styles.md.

Requests that wait are scored together (micro-batching): while one batch is on the model the next one fills, so one
client waits for nothing and many share a batch. SIGTERM or Ctrl-C: no new connection is taken, what was accepted is
answered, then the process ends. Bound to 127.0.0.1 unless told otherwise. Put TLS and rate limits in front of it
(nginx, caddy) before anyone else can reach it.

    POST /predict        {"text": "..."} or ?text=...   -> predicted_label, confidence, probabilities
    POST /predict_batch  {"texts": ["...", ...]}        -> {"results": [the same, in order]}
    POST /reward         {"prompt": "..." or messages, "completion": "..."} -> {"reward": number}
    GET  /health, GET /metrics (Prometheus), GET /docs (OpenAPI, with examples)

Errors are {"detail": "..."}: 400 not JSON or not UTF-8, 401 wrong token, 404 model not loaded, 408 body too slow, 413
body too large, 422 bad field, empty or too long text, too many texts, 429 too many requests waiting, 500 the model's
answer is not a number. No text or token is ever logged or sent back in an error.

Reads   --model (stage 31), --reward-model (stage 30); the bearer token from the environment variable SERVE_TOKEN, if it
        is set
Writes  nothing; one log line a request on standard error: method, path (known ones, no query), status (499 = client
        gone), milliseconds
Run     python scripts/62_serve.py
        SERVE_TOKEN=$(openssl rand -hex 16) python scripts/62_serve.py --host 0.0.0.0 \\
            --reward-model checkpoints/styles/reward
"""

import asyncio
import math
import os
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from common.settings import UserError, read_settings, resolve_model, unused


@dataclass
class Settings:
    # --- what
    task: str = "styles"
    """fills {task} in the folders below"""
    model: str = "checkpoints/{task}/classifier"
    """style classifier, folder or hub id"""
    reward_model: str = ""
    """scalar reward model, folder or hub id; empty = /reward answers 404"""
    max_length: int = 512
    """tokens; a longer text loses its beginning"""
    dtype: str = "auto"
    """of the weights: auto, float32, bfloat16"""
    enable_thinking: bool = False
    """passed to the chat template of a reward model that thinks"""
    threads: int = 0
    """of the model's arithmetic, 0 = torch's choice"""

    # --- network
    host: str = "127.0.0.1"
    """0.0.0.0 = every interface: set SERVE_TOKEN first"""
    port: int = 8000
    """0 = any free one, printed"""
    grace_seconds: int = 30
    """time to answer what was accepted after SIGTERM"""
    keep_alive_seconds: int = 120
    """an idle connection stays open; longer than clients and proxies keep theirs, or they meet a closed one"""
    header_seconds: float = 10.0
    """for the head of a request, from opening the connection"""
    body_seconds: float = 20.0
    """for its body; a slower one is answered 408"""
    max_connections: int = 2048
    """open at once; one more closes the one that has been idle for longest"""

    # --- limits
    max_body_bytes: int = 262_144
    """of a request; more is answered 413"""
    max_text_chars: int = 8192
    """of one text; more is answered 422"""
    max_batch_texts: int = 64
    """in one /predict_batch; more is answered 422"""
    max_waiting: int = 2048
    """texts; more are answered 429"""

    # --- micro-batching
    batch_texts: int = 64
    """scored together, 1 = one by one"""
    token_budget: int = 0
    """padded tokens in one pass through the model; 0 = 1024 on a CPU (its cache), 16384 on a GPU"""
    batch_wait_ms: float = 2.0
    """that a single request waits for others to share its batch; under load the batch is full before that"""

    def clashes(self):
        if not self.reward_model:
            yield from unused(self, "without --reward-model", "enable_thinking")


def is_finite(answer: dict | float) -> bool:
    return math.isfinite(answer["confidence"] if isinstance(answer, dict) else answer)


def open_models(settings: Settings, model_path: str, reward_path: str | None) -> dict:
    """name -> (score, what the handlers need): the style classifier, and the reward model where there is one."""
    import torch

    from common.training.classifiers import load_classifier, load_styles, logits_of
    from tasks.styles.predictions import predict_styles

    if settings.threads:
        torch.set_num_threads(settings.threads)
    model, tokenizer = load_styles(model_path, settings.dtype)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    limits = (settings.max_length, settings.token_budget or (1024 if model.device.type == "cpu" else 16384))
    opened = {"styles": (lambda texts: predict_styles(model, tokenizer, texts, *limits, finite=False), names)}
    if reward_path:
        reward_model, reward_tokenizer = load_classifier(reward_path, settings.dtype, num_labels=1)

        def rewards(texts: list[str]) -> list[float]:
            return logits_of(reward_model, reward_tokenizer, texts, *limits, finite=False)[:, 0].tolist()

        opened["reward"] = (rewards, reward_tokenizer)
    for path, (score, _) in zip((model_path, reward_path), opened.values(), strict=False):
        if not is_finite(score(["你好"])[0]):  # and the first call is slow
            raise UserError(f"{path}: its answers are NaN; fix: train it again, or name another model")
    return opened


def build_app(settings: Settings, model_path: str, reward_path: str | None, token: str | None):
    """The ASGI app; models are loaded when the server starts up. What keeps them from it is left in the guard's
    `failed`."""
    from typing import Annotated, Literal

    from fastapi import Depends, FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from fastapi.security import HTTPBearer
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from pydantic import BaseModel, ConfigDict, Field, create_model

    from common.schemas import validate_row
    from common.serving.http_limits import Guard, log
    from common.serving.micro_batching import MicroBatcher, TooBusy
    from common.training.classifiers import render_conversation

    registry = CollectorRegistry()
    requests = Counter("requests", "Answered requests", ("path", "status"), registry=registry)
    seconds = Histogram("request_seconds", "From accepted to answered", ("path",), registry=registry)
    steps = [2**power for power in range(9)]
    sizes = Histogram("batch_texts", "Texts scored together", ("model",), registry=registry, buckets=steps)
    waiting = Gauge("waiting_texts", "Texts that wait for the model", ("model",), registry=registry)
    batchers: dict[str, MicroBatcher] = {}
    opened: dict = {}

    # --- what is asked and answered; a text holds at least one character that is no space
    Text = Annotated[str, Field(min_length=1, max_length=settings.max_text_chars, pattern=r"\S")]
    example = "用户问题：能退吗？\n回答：能，七天内都可以，运费我们出。"

    class PredictRequest(BaseModel):
        model_config = ConfigDict(extra="forbid")
        text: Text = Field(examples=[example])

    class BatchRequest(BaseModel):
        model_config = ConfigDict(extra="forbid")
        texts: list[Text] = Field(min_length=1, max_length=settings.max_batch_texts, examples=[[example, "你好"]])

    class Message(BaseModel):
        model_config = ConfigDict(extra="forbid")
        role: Literal["system", "user", "assistant"]
        content: Text

    class RewardRequest(BaseModel):
        model_config = ConfigDict(extra="forbid")
        prompt: Text | Annotated[list[Message], Field(min_length=1, max_length=64)] = Field(examples=["能退吗？"])
        completion: Text = Field(examples=["能，七天内都可以。"])

    class Prediction(BaseModel):
        predicted_label: str
        confidence: float
        probabilities: dict[str, float]

    Predictions = create_model("Predictions", results=(list[Prediction], ...))
    Reward, Problem = create_model("Reward", reward=(float, ...)), create_model("Problem", detail=(str, ...))

    class Health(BaseModel):
        status: Literal["ok"]
        labels: list[str]
        reward_model: bool

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        try:
            opened.update(await asyncio.to_thread(open_models, settings, model_path, reward_path))
        except Exception as error:
            guard.failed = error
            raise
        for name, (score, _) in opened.items():
            limits = (settings.batch_texts, settings.batch_wait_ms / 1000, settings.max_waiting)
            batchers[name] = MicroBatcher(score, *limits, sizes.labels(name).observe)
            waiting.labels(name).set_function(batchers[name].queue.qsize)
        yield
        for batcher in batchers.values():
            await batcher.close()
        log(f"stopped: accepted {guard.accepted} requests, answered {guard.answered}")

    faults = {400: "not JSON or not UTF-8", 408: "body too slow", 413: "body too large", 422: "bad field"}
    faults |= {429: "too many texts wait", 500: "the model's answer is not a number"}
    if token:
        faults[401] = "missing or wrong token"
    faults = {status: {"model": Problem, "description": text} for status, text in faults.items()}
    security = [Depends(HTTPBearer(auto_error=False))] if token else []  # for the OpenAPI page; the Guard decides
    app = FastAPI(title="Style classifier and reward model", lifespan=lifespan, redoc_url=None)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        """Where and what, never the value: it may be private, and half a surrogate pair cannot even be encoded."""
        known = {"body", "query", "text", "texts", "prompt", "completion", "role", "content"}
        details = []
        for item in error.errors()[:5]:
            if item["type"] == "json_invalid":
                return JSONResponse({"detail": "the body is not JSON"}, 400)
            place = ".".join(str(part) for part in item["loc"] if isinstance(part, int) or part in known)
            what = "the text is empty" if item["type"] == "string_pattern_mismatch" else item["msg"]
            details.append(f"{place}: {what}")
        return JSONResponse({"detail": "; ".join(details)}, 422)

    async def ask(name: str, texts: list[str]) -> list:
        try:
            answers = await batchers[name].submit(texts)
        except TooBusy:
            raise HTTPException(429, "too many texts wait; try again in a second", {"Retry-After": "1"}) from None
        if not all(map(is_finite, answers)):
            raise HTTPException(500, "the model's answer is not a number (NaN); nothing is wrong with the request")
        return answers

    Asked = Annotated[str | None, Query(min_length=1, max_length=settings.max_text_chars, pattern=r"\S")]

    @app.post("/predict", responses=faults, dependencies=security, summary="The style of one text: body before query")
    async def predict(body: PredictRequest | None = None, text: Asked = None) -> Prediction:
        if body is None and text is None:
            raise HTTPException(422, 'no text; fix: {"text": "..."} as JSON, or ?text=...')
        return (await ask("styles", [text if body is None else body.text]))[0]

    @app.post("/predict_batch", responses=faults, dependencies=security, summary="The styles of several texts")
    async def predict_batch(body: BatchRequest) -> Predictions:
        return {"results": await ask("styles", body.texts)}

    missing = {404: {"model": Problem, "description": "no reward model is loaded"}}

    @app.post("/reward", responses=faults | missing, dependencies=security, summary="Score of an answer")
    async def reward(body: RewardRequest) -> Reward:
        if "reward" not in opened:
            raise HTTPException(404, "no reward model is loaded; start the server with --reward-model")
        asked = body.prompt if isinstance(body.prompt, str) else [message.model_dump() for message in body.prompt]
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if found := validate_row({"prompt": turns, "meta": {}}, "prompts"):
            raise HTTPException(422, f"{found[0].reason}; fix: {found[0].fix}")
        try:
            text = render_conversation(opened["reward"][1], turns, body.completion, settings.enable_thinking)
        except Exception:  # a template may raise anything
            raise HTTPException(422, "the chat template refuses these turns") from None
        return {"reward": (await ask("reward", [text]))[0]}

    @app.get("/health", summary="Are the models loaded?")
    async def health() -> Health:
        return {"status": "ok", "labels": opened["styles"][1], "reward_model": "reward" in opened}

    refused = {401: faults[401]} if token else {}

    plain = {"response_class": PlainTextResponse, "responses": refused}

    @app.get("/metrics", **plain, dependencies=security, summary="For Prometheus")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    guard = Guard(app, settings, token and token.encode(), requests, seconds)
    return guard


def main(settings: Settings) -> None:
    import uvicorn

    from common.serving.http_limits import LimitedProtocol, connections_allowed
    from common.serving.listening import listen

    if (
        not min(settings.keep_alive_seconds, settings.header_seconds, settings.body_seconds, settings.max_connections)
        > 0
    ):
        raise UserError(
            "--keep-alive-seconds, --header-seconds, --body-seconds, --max-connections; fix: numbers above 0"
        )
    model_path = resolve_model(settings.model, settings.task)
    reward_path = resolve_model(settings.reward_model, settings.task) if settings.reward_model else None
    token = os.environ.get("SERVE_TOKEN") or None
    listener, url = listen(settings.host, settings.port)
    app = build_app(settings, model_path, reward_path, token)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            try:
                await super().startup(sockets)
            except SystemExit as stop:  # uvicorn's way to say that the lifespan failed
                raise app.failed or stop from None
            print(f"listening on {url} (token {'needed' if token else 'not set: open to everyone who reaches it'})")

    # uvicorn's access log would write the query, and its errors a traceback: both may hold people's texts
    config = uvicorn.Config(app, access_log=False, log_level="critical", lifespan="on", server_header=False)
    config.timeout_graceful_shutdown, config.timeout_keep_alive = settings.grace_seconds, settings.keep_alive_seconds
    most = connections_allowed(settings.max_connections)
    config.http = partial(LimitedProtocol, header_seconds=settings.header_seconds, most=most)
    Server(config).run([listener])


if __name__ == "__main__":
    main(read_settings(Settings))
