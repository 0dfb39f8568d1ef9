"""In front of the app of stage 62: limits that uvicorn does not have, the token, the log line."""

from __future__ import annotations

import asyncio
import hmac
import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client import Counter, Histogram
    from starlette.types import Message, Receive, Scope, Send


class LimitedProtocol(HttpToolsProtocol):
    """header_seconds: from the connection's opening, or from the first byte of a further request, until its head is
    whole.

    most: open connections. One more closes the one that has been without a request for longest; where all have one, it
    is not taken.
    """

    def __init__(self, *args, header_seconds: float, most: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.header_seconds, self.most = header_seconds, most
        self.header_timer = None
        self.since = 0.0  # when it was opened, or last had a request

    @property
    def waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        if len(self.connections) >= self.most:
            waiting = [connection for connection in self.connections if connection.waits]
            if not waiting:
                transport.abort()
                return
            oldest = min(waiting, key=lambda connection: connection.since)
            oldest.connections.discard(oldest)
            oldest.transport.abort()
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():  # not taken, or closed to make room
            return
        if self.waits and self.header_timer is None:
            self._await_head()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._head_is_whole()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, error: Exception | None) -> None:
        self._head_is_whole()
        if self.transport is not None:
            super().connection_lost(error)

    def _await_head(self) -> None:
        self.since = self.loop.time()
        self.header_timer = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _head_is_whole(self) -> None:
        if self.header_timer:
            self.header_timer.cancel()
        self.header_timer = None


def connections_allowed(most: int, reserve: int = 64) -> int:
    """`most`, or what the system lets this process open, less what the process itself needs. Raises the soft limit to
    the hard one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, most + reserve)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, most + reserve)), hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, min(most, soft - reserve))


def is_utf8(text: bytes) -> bool:
    """A zero byte is none of a text: it is what UTF-16 and UTF-32 look like."""
    try:
        return "\0" not in text.decode("utf-8")
    except UnicodeDecodeError:
        return False


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Guard:
    """ASGI layer around the app: body limit, token, counters and the log line. Pure ASGI, so that a stream is counted
    as it comes."""

    OPEN = ("/health", "/docs", "/openapi.json")  # answered without a token

    def __init__(self, app: FastAPI, settings: Any, token: bytes | None, requests: Counter, seconds: Histogram):
        self.app, self.settings, self.token, self.requests, self.seconds = app, settings, token, requests, seconds
        self.paths = {route.path for route in app.routes}
        self.failed: Exception | None = None  # why the models could not be loaded
        self.accepted = self.answered = 0  # answered: the whole answer was sent to a client that was still there

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from starlette.requests import Request

        self.accepted += 1
        started, status, size, chunks, more = time.perf_counter(), 500, 0, [], True

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            if whole and not more and await Request(scope, receive).is_disconnected():
                status, whole = 499, False
            await send(message)
            self.answered += whole

        try:
            headers = dict(scope["headers"])
            if self.token and scope["path"] not in self.OPEN and not self.allowed(headers):
                await self.refuse(counted_send, 401, "missing or wrong token", [(b"www-authenticate", b"Bearer")])
                return
            until = asyncio.get_running_loop().time() + self.settings.body_seconds
            while more:  # the whole body first: a refusal must not come in the middle of an answer
                try:
                    async with asyncio.timeout_at(until):
                        message = await receive()
                except TimeoutError:
                    text = f"the body took more than {self.settings.body_seconds:g} s"
                    await self.refuse(counted_send, 408, text, [(b"connection", b"close")])
                    return
                if message["type"] == "http.disconnect":
                    status = 499  # the client went away before its request was whole: nothing to answer
                    return
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                more = message.get("more_body", False)
                if size > (limit := self.settings.max_body_bytes):
                    text = f"the body is larger than {limit} bytes"
                    await self.refuse(counted_send, 413, text, [(b"connection", b"close")])
                    return
            body = b"".join(chunks)
            if not is_utf8(body) or not is_utf8(unquote_to_bytes(scope["query_string"])):
                await self.refuse(counted_send, 400, "the text is not UTF-8", [])
                return
            await self.app(scope, self.replay(body, receive), counted_send)
        except Exception as error:  # 500 has been sent; the traceback goes no further, a message may hold the text
            log(f"error: {type(error).__name__}")
        finally:
            elapsed = time.perf_counter() - started
            path = scope["path"] if scope["path"] in self.paths else "other"  # texts and tokens end up in other paths
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "OTHER"
            self.requests.labels(path, str(status)).inc()
            self.seconds.labels(path).observe(elapsed)
            log(f"{method} {path} {status} {elapsed * 1000:.1f} ms")

    def allowed(self, headers: dict[bytes, bytes]) -> bool:
        """Compared in constant time: how long it takes says nothing of how much of a guess was right."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(given.strip(), self.token) and scheme.lower() == b"bearer"

    @staticmethod
    def replay(body: bytes, receive: Receive):
        given = False

        async def again():
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    @staticmethod
    async def refuse(send: Send, status: int, detail: str, headers: list) -> None:
        body = b'{"detail": "%s"}' % detail.encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
