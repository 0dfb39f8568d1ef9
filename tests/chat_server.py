"""A chat-completions server on loopback that injects faults: what the tests drive the real openai client against.

    with ChatServer(reply=lambda body: "你好", faults={"429": 0.1, "drop": 0.1}) as server:
        env = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "test-key"}

By hand: python tests/chat_server.py --port 8000 --latency 0.5 --faults 429=0.1 drop=0.1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

FAULTS = ("429", "500", "503", "400", "401", "drop", "cut", "hang", "trickle", "garbage")
# What gateways really send with status 200 instead of an answer.
GARBAGE = (
    "<html><body>502 Bad Gateway</body></html>",
    '{"error": {"message": "upstream error", "type": "server_error"}}',
    '{"id": "x", "object": "chat.completion", "choices": []}',
    '{"id": "x", "object": "chat.completion", "choices": [{"index": 0, "mess',
    '{"id": "x", "choices": [{"index": 0, "finish_reason": "stop", '
    '"message": {"role": "assistant", "content": null}}]}',
    "",
)


@dataclass
class Request:
    """One request as the server saw it. `outcome` is "ok", the fault it met, or "gone" (the client left first)."""

    body: dict
    headers: dict[str, str]
    time: float  # time.monotonic() at its arrival
    outcome: str = "open"
    content: str | None = None  # the answer, where it was sent whole

    @property
    def key(self) -> str:
        """Equal for equal questions."""
        return json.dumps(self.body, ensure_ascii=False, sort_keys=True)


@dataclass
class ChatServer:
    """Use as a context manager; it serves in a thread of its own.

    reply: body of the request (dict with messages, model, temperature ...) -> text of the answer, or the whole
        `message` / choice fields as a dict: {"content": ..., "finish_reason": "length"}. In the dict may stand, too:
        "usage" (in place of the counts), or "raw" (the whole body), "status" (of it) and "headers" (further lines).
    latency: seconds before every answer, or a function of the body.
    faults: name (FAULTS) -> share of the requests that meet it, drawn with `seed` in order of arrival.
        drop: the connection is closed without a byte; cut: in the middle of the body; hang: no answer for
        `hang_seconds`; trickle: an answer that takes as long, byte by byte; garbage: status 200 with something that is
        not an answer.
    script: outcomes ("ok" or a fault) of the next requests in order of arrival, before `faults` counts.
    retry_after: value of that header with 429 and 503, None = no header.
    key: the only key accepted, None = any.
    """

    reply: Callable[[dict], str | dict] = lambda body: f"答：{body['messages'][-1]['content']}"
    latency: float | Callable[[dict], float] = 0.0
    faults: dict[str, float] = field(default_factory=dict)
    script: list[str] = field(default_factory=list)
    retry_after: str | None = None
    hang_seconds: float = 30.0
    key: str | None = None
    usage: bool = True  # report token counts (one character = one token)
    seed: int = 0
    port: int = 0  # 0 = any free one

    def __post_init__(self):
        unknown = {*self.faults, *self.script} - {*FAULTS, "ok"}
        assert not unknown, f"unknown faults: {unknown}"
        self.requests: list[Request] = []
        self.active = self.max_active = 0
        self._random = random.Random(self.seed)
        self._garbage = 0

    @property
    def url(self) -> str:
        """What OPENAI_BASE_URL wants."""
        return f"http://127.0.0.1:{self.port}/v1"

    def outcomes(self) -> Counter:
        return Counter(request.outcome for request in self.requests)

    def answered(self) -> Counter:
        """Question (Request.key) -> how often it was answered whole."""
        return Counter(request.key for request in self.requests if request.outcome == "ok")

    # ------------------------------------------------------------------------------------------------- life

    def __enter__(self) -> ChatServer:
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._listen())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _listen(self) -> None:
        self._connections: set[asyncio.Task] = set()
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------- HTTP

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader, writer) -> bool:
        """One request and its answer on a kept-alive connection. False: the connection is over."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        if method == "GET" and path == "/v1/models":
            return await self._send(writer, 200, json.dumps({"object": "list", "data": [{"id": "test-model"}]}))
        if (method, path) != ("POST", "/v1/chat/completions"):
            return await self._send(writer, 404, _error(f"no such path: {method} {path}"))

        request = Request(json.loads(raw), headers, time.monotonic())
        self.requests.append(request)
        self.active += 1
        self.max_active = max(self.max_active, self.active)
        try:
            return await self._answer(request, writer)
        except BaseException:
            request.outcome = "gone"
            raise
        finally:
            self.active -= 1

    async def _answer(self, request: Request, writer) -> bool:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            request.outcome = "401"
            # OpenAI's own text repeats part of the key, other gateways all of it
            wrong = request.headers.get("authorization", "").removeprefix("Bearer ")
            return await self._send(writer, 401, _error(f"Incorrect API key provided: {wrong}"))
        outcome = self._draw()
        if outcome == "drop":
            request.outcome = outcome
            return False
        if outcome == "hang":
            request.outcome = outcome
            await asyncio.sleep(self.hang_seconds)
            return False
        await asyncio.sleep(self.latency(request.body) if callable(self.latency) else self.latency)
        if outcome.isdigit():
            request.outcome = outcome
            retry = self.retry_after is not None and outcome in ("429", "503")
            extra = f"Retry-After: {self.retry_after}\r\n" if retry else ""
            return await self._send(writer, int(outcome), _error(f"injected fault {outcome}"), extra)
        if outcome == "garbage":
            request.outcome, self._garbage = outcome, self._garbage + 1
            return await self._send(writer, 200, GARBAGE[self._garbage % len(GARBAGE)])
        reply = self.reply(request.body)
        reply = dict(reply) if isinstance(reply, dict) else {"content": reply}
        if "raw" in reply:
            request.outcome = "raw"
            return await self._send(writer, reply.get("status", 200), reply["raw"], reply.get("headers", ""))
        content, text = self._completion(request.body, reply)
        if outcome == "cut":
            request.outcome = outcome
            await self._send(writer, 200, text, upto=len(text) // 2)
            return False
        if outcome == "trickle":
            request.outcome = outcome
            await self._send(writer, 200, text, upto=0)
            for byte in text.encode("utf-8"):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(self.hang_seconds / len(text.encode("utf-8")))
            return True
        alive = await self._send(writer, 200, text)
        request.outcome, request.content = "ok", content
        return alive

    def _draw(self) -> str:
        if self.script:
            return self.script.pop(0)
        drawn = self._random.random()
        for name, share in self.faults.items():
            if drawn < share:
                return name
            drawn -= share
        return "ok"

    def _completion(self, body: dict, reply: dict) -> tuple[str, str]:
        reason, usage = reply.pop("finish_reason", "stop"), reply.pop("usage", None)
        asked = sum(len(message["content"]) for message in body["messages"])
        told = len(reply.get("content") or "")
        value = {
            "id": f"chatcmpl-{len(self.requests)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.get("model", ""),
            "choices": [{"index": 0, "message": {"role": "assistant", **reply}, "finish_reason": reason}],
        }
        if self.usage:
            value["usage"] = usage or {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told}
        return reply.get("content"), json.dumps(value)

    async def _send(self, writer, status: int, text: str, extra: str = "", upto: int | None = None) -> bool:
        raw = text.encode("utf-8")
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n{extra}\r\n"
        writer.write(head.encode("latin-1") + (raw if upto is None else raw[:upto]))
        await writer.drain()
        return True


def _error(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "injected", "code": None}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--faults", nargs="*", default=[], metavar="NAME=SHARE", help=", ".join(FAULTS))
    args = parser.parse_args()
    faults = {name: float(share) for name, share in (word.split("=") for word in args.faults)}
    with ChatServer(latency=args.latency, faults=faults, port=args.port) as server:
        print(f"OPENAI_BASE_URL={server.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(dict(server.outcomes()))


if __name__ == "__main__":
    main()
