"""A page to talk with one to four models side by side: base, SFT, DPO, GRPO.

Each column is a model with a conversation of its own. Answers stream; when one has ended, the job's rules mark what
they find in it (`mark` of the job) and its measures stand below it. Where the job names FIELDS (tasks/base.py), they
can be filled in instead of a message. The same seed, settings and turns give the same answer.

This is a page for one person on one machine. An OpenAI-compatible endpoint is `transformers serve` or vLLM's
(docs/OPERATIONS.md).

Reads   --models: a folder or hub id each, a model or an adapter (its base is the one that it names); MODEL+ADAPTER
        names both
Writes  nothing
Run     python scripts/63_chat.py
        python scripts/63_chat.py --models data/tiny_qwen3 checkpoints/poems/sft checkpoints/poems/dpo \\
            checkpoints/poems/grpo
"""

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common.model_files import adapter_base, check_adapter, check_model
from common.settings import UserError, read_settings, resolve_model
from tasks.base import Task, load_task

MOST = 4  # models on one page
MOST_CHARACTERS = 20_000  # of one turn


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: its fields, marks and measures; fills {task} in the folders below"""
    models: tuple[str, ...] = ("data/tiny_qwen3", "checkpoints/{task}/sft")
    """one to four: MODEL, ADAPTER or MODEL+ADAPTER"""
    force_base: bool = False
    """put an adapter on another base than its own"""
    dtype: str = "auto"
    """auto, float32, bfloat16"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""

    # --- sampling, as the page starts
    temperature: float = 1.0
    """0 = greedy"""
    top_p: float = 1.0
    """probability mass to draw from; .9 helps a real base that has seen few chats"""
    top_k: int = 0
    """most likely tokens to draw from, 0 = all"""
    min_p: float = 0.0
    """tokens with less than this share of the likeliest one's probability are not drawn, 0 = none"""
    max_new_tokens: int = 128
    """an answer that is longer is cut"""
    seed: int = 42
    """of the first answer; each further one adds 1"""

    # --- network
    host: str = "127.0.0.1"
    """whoever reaches another address can use the models"""
    port: int = 8063
    """0 = any free one, printed"""


def open_writers(settings: Settings) -> list:
    """Every name and file is checked before the first model is loaded."""
    if not 1 <= len(settings.models) <= MOST:
        raise UserError(f"--models: {len(settings.models)} named; fix: 1 to {MOST}")
    pairs = []
    for spec in settings.models:
        first, _, adapter = spec.partition("+")
        folder = resolve_model(first, settings.task)
        if not adapter and (Path(folder) / "adapter_config.json").exists():
            adapter, folder = folder, adapter_base(folder, "")
        adapter = resolve_model(adapter, settings.task) if adapter else None
        check_model(folder)
        if adapter and (notice := check_adapter(adapter, folder, force_base=settings.force_base)):
            print(f"notice: {notice}")
        pairs.append((folder, adapter))

    from common.models import load_model, load_tokenizer
    from common.serving.writer import Writer

    writers = []
    for folder, adapter in pairs:
        tokenizer = load_tokenizer(folder)
        model = load_model(folder, tokenizer, settings.dtype, adapter, force_base=settings.force_base).eval()
        name = Path(adapter or folder).name
        if name in (known := [writer.name for writer in writers]):
            name = f"{name} {len(known) + 1}"
        writers.append(Writer(name, model, tokenizer, settings.enable_thinking))
        print(f"loaded {name}: {folder}" + (f" + {adapter}" if adapter else ""))
    return writers


def judge(task: Task, turns: list[dict], text: str, meta: dict, ended: bool) -> dict:
    """The text cut into parts where the job's rules mark it, and its measures as words."""
    from common.evaluation.compare_page import card
    from common.evaluation.scoring import measure_texts
    from common.evaluation.tables import number

    try:
        scores = measure_texts(task, [{"id": "answer", "prompt": turns, "completion": text, "meta": meta}])
        found = card("", text, task.mark(text, meta), {k: v[0] for k, v in scores.items()}, False, ended)
    except Exception as error:  # a free message has no meta that the rules of a job may need
        return {"parts": [{"text": text, "label": ""}], "scores": [], "unjudged": f"{type(error).__name__}: {error}"}
    shown = {name: found["scores"].get(name) for name in task.COLUMNS or found["scores"]}
    words = [f"{name} {number(value)}" for name, value in shown.items() if value is not None]
    return {"parts": found["parts"], "scores": words}


def build_app(settings: Settings, task: Task, writers: list):
    from typing import Annotated, Literal

    from fastapi import FastAPI, HTTPException
    from fastapi.responses import HTMLResponse, StreamingResponse
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(title="Chat with several models", docs_url=None, redoc_url=None, openapi_url=None)
    if settings.host in ("127.0.0.1", "localhost"):  # a foreign page that points its own name here is refused
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    page = (Path(__file__).parent / "common" / "serving" / "chat_page.html").read_text(encoding="utf-8")
    Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]

    class Turn(BaseModel):
        model_config = ConfigDict(extra="forbid")
        role: Literal["system", "user", "assistant"]
        content: Text

    class Question(BaseModel):
        model_config = ConfigDict(extra="forbid")
        model: Annotated[int, Field(ge=0, lt=len(writers))]
        turns: Annotated[list[Turn], Field(max_length=128)]
        fields: dict[Annotated[str, Field(max_length=100)], Text | list[Text]] | None = None
        temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = settings.temperature
        top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = settings.top_p
        top_k: Annotated[int, Field(ge=0, le=1_000_000)] = settings.top_k
        min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = settings.min_p
        max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = settings.max_new_tokens
        seed: Annotated[int, Field(ge=0, lt=2**63)] = settings.seed

    @app.get("/", response_class=HTMLResponse)
    def index() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; connect-src 'self'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
        policy += "; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return HTMLResponse(page.replace("NONCE", nonce), headers={"Content-Security-Policy": policy})

    @app.get("/about")
    def about() -> dict:
        names = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "seed")
        fields = {name: asdict(field) for name, field in task.FIELDS.items()}
        start = {name: getattr(settings, name) for name in names}
        return {"task": task.name, "models": [writer.name for writer in writers], "fields": fields, "sampling": start}

    @app.post("/answer")
    def answer(question: Question) -> StreamingResponse:
        """Lines of JSON: {"text": all so far} while it is written, then {"prompt", "parts", "scores", "reason", ...}"""
        turns, meta = [turn.model_dump() for turn in question.turns], {}
        if question.fields is not None:
            if unknown := set(question.fields) - set(task.FIELDS):
                raise HTTPException(422, f"no field {sorted(unknown)[0]!r}; fix: one of {', '.join(task.FIELDS)}")
            meta = {name: value for name, value in question.fields.items() if value}
            try:
                turns += task.messages(meta)
            except (KeyError, ValueError, TypeError, UserError) as error:
                raise HTTPException(422, f"the fields make no message: {type(error).__name__}: {error}") from None
        if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            raise HTTPException(422, "the last turn has to be the user's, with text")
        writer = writers[question.model]
        try:
            ids = writer.encode(turns, question.max_new_tokens)
        except ValueError as error:
            raise HTTPException(422, f"{error}; fix: clear the conversation, or fewer new tokens") from None

        def lines() -> Iterator[str]:
            started, tokens, ended, text = time.monotonic(), [], False, ""
            for tokens, ended in writer.write(ids, question.model_dump()):
                text = writer.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # half a character: the rest comes with the next tokens
                    yield json.dumps({"text": text}, ensure_ascii=False) + "\n"
            last = {"prompt": turns[-1]["content"], "text": text, "reason": "stop" if ended else "length"}
            last |= {"tokens": len(tokens), "seconds": round(time.monotonic() - started, 2)}
            last |= judge(task, turns, text, meta, ended)
            yield json.dumps(last, ensure_ascii=False) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    return app


def main(settings: Settings) -> None:
    import uvicorn

    from common.serving.listening import listen

    task = load_task(settings.task)
    listener, url = listen(settings.host, settings.port)
    app = build_app(settings, task, open_writers(settings))
    judge(task, [{"role": "user", "content": "写"}], "春眠不觉晓，", {}, True)  # what the rules read, read it now
    listener.listen(64)  # who opens it before the server runs has to wait, not to come again
    print(f"open {url} in a browser; Ctrl-C ends it", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, limit_concurrency=64)).run([listener])


if __name__ == "__main__":
    main(read_settings(Settings))
