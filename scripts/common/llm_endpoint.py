"""The endpoint behind common/llm_api.py: its address and key, the HTTP client, what its errors and replies mean.

The key leaves this file in one header only. What a server sends back goes through `redact` before anything else sees
it.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import math
import os
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, quote_plus, urlsplit

from common.jsonl import CONTROL, SURROGATE
from common.settings import UserError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from openai.types.chat import ChatCompletion

OPENAI = "https://api.openai.com/v1"
LONGEST_RETRY_AFTER = 120.0  # seconds that a server may ask for; longer ones are not believed, as in the openai library
LONGEST_ANSWER = 200_000  # characters: a row with more is refused by the stage that reads it
MOST_TOKENS = 10**9  # a larger count is no count
RETRIED = {408, 409, 425, 429}  # and every 5xx
FATAL = {401, 402, 403, 404}  # key, balance, permission, address: the next question would fare no better
HOPELESS_QUOTA = "insufficient_quota"  # a 429 that no waiting fixes

OUT_OF_TOKENS = "no text: its reasoning used up the tokens"
OUT_OF_TOKENS_FIX = "raise --max-tokens or turn thinking off (--extra-body '{\"enable_thinking\": false}')"
FILTERED = "refused by the content filter"
STOP_REASONS = {"stop", "eos", "eos_token", "end_turn", "stop_sequence"}
LENGTH_REASONS = {"length", "max_tokens", "model_length", "max_output_tokens"}
FILTER_REASONS = re.compile(
    r"filter|sensitiv|moderat|safety|blocked|blocklist|prohibited|refus|inspect|censor|recitation|risk|policy|guardrail"
)
# In an error's text. Account blocked, data policy and case-sensitive names are other things.
FILTER_ERRORS = re.compile(
    r"data_?inspection|content[ _-]?(filter|policy|management|safety|moderation)|policy[ _-]?violation|"
    r"(?<!in)(?<!case[ _-])sensitive(?!.{0,9}case)|moderation|flagged|content exists risk|unsafe|safety|"
    r"敏感|不安全|内容违规|违规内容|内容安全|内容审核|不当内容",
    re.IGNORECASE,
)
FILTER_CODES = {"1301", "1026", "1027", "10013", "10014"}  # Zhipu; MiniMax: input, output; iFlytek: input, output


class Answer(NamedTuple):
    text: str
    finish_reason: str  # stop, or length: cut off at max_tokens
    prompt_tokens: int
    completion_tokens: int


class Fault(Exception):
    """Why a try brought no answer: `then` is again (wait and retry), skip (this question) or stop (all)."""

    def __init__(
        self, reason: str, then: str = "again", wait: float | None = None, billed: bool | tuple[int, ...] = False
    ):
        super().__init__(reason)
        self.reason, self.then, self.wait = redact(reason, is_error=True), then, wait
        self.billed = billed  # may the server have charged for it? (tokens in, out) where it said how many


# ----------------------------------------------------------------------------------------------------- secrets


def redact(text: str, is_error: bool = False) -> str:
    """The text without the key, in whichever encoding a server repeats it. Of an error also what looks like a part of a
    key."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if len(key) >= 4:
        text = _forms(key).sub("***", text)
    if is_error:
        parts = ("***", key[:8], key[-8:]) if len(key) >= 12 else ("***",)
        text = re.sub(r"\b(sk-|Bearer |Basic )\S+", r"\1***", text)
        text = re.sub(r"(?<=://)[^/\s@]+@", "***@", text[:2000])
        text = re.sub(r"\S+", lambda word: "***" if any(part in word[0] for part in parts) else word[0], text)
    return text


@lru_cache(maxsize=2)
def _forms(key: str) -> re.Pattern:
    raw, forms = key.encode(), {key}
    if len(key) >= 8:
        forms |= {quote(key, safe=""), quote_plus(key), raw.hex()}
        forms |= {hashlib.new(name, raw).hexdigest() for name in ("md5", "sha1", "sha256", "sha512")}
        for before in range(3):  # base64 of a text in which the key begins at any byte
            text = base64.b64encode(bytes(before) + raw).decode()
            part = text[-(-8 * before // 6) : 8 * (before + len(raw)) // 6]
            forms |= {part, part.replace("+", "-").replace("/", "_")}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))), re.IGNORECASE)


# ----------------------------------------------------------------------------------------------------- before asking


def endpoint() -> tuple[str, str]:
    """Address and key from the environment. Raises UserError where they cannot be right; neither is shown whole."""
    url, key = (os.environ.get(name, "").strip() for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"))
    url = url or OPENAI
    if wrong := re.search(r"[^!-~]|[\"'`<>\\]", url):
        raise UserError(f"OPENAI_BASE_URL holds the character {wrong[0]!r}; fix: paste the address alone, no quotes")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts = host = None
    if not parts or not host or parts.scheme not in ("http", "https"):
        raise UserError("OPENAI_BASE_URL is no http address; fix: e.g. https://api.deepseek.com/v1")
    if parts.username or parts.password:
        raise UserError(
            "OPENAI_BASE_URL holds a user or a password; fix: leave them out, put the key into OPENAI_API_KEY"
        )
    clean = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    if parts.query or parts.fragment:
        raise UserError("OPENAI_BASE_URL holds a ? or #; fix: leave out what follows, put the key into OPENAI_API_KEY")
    if pasted := re.search(r"(/chat/completions|/completions|/chat|/responses|/models|/embeddings)$", clean):
        shown = redact(clean.removesuffix(pasted[0]), is_error=True)
        raise UserError(f"OPENAI_BASE_URL ends in {pasted[0]}; fix: the address without it, {shown}")
    if not parts.path.strip("/"):
        raise UserError(f"OPENAI_BASE_URL has no path; fix: most likely {redact(clean, is_error=True)}/v1")
    if wrong := re.search(r"[^!-~]|[\"'`]", key):
        raise UserError(
            f"OPENAI_API_KEY: character {wrong.start() + 1} is a quote, a space or not ASCII; "
            "fix: paste the key alone, with plain quotes around it for the shell"
        )
    if not key and not is_loopback(host):
        raise UserError(
            "OPENAI_API_KEY is not set; fix: export it (and OPENAI_BASE_URL, where it is not OpenAI's), or leave "
            '--model "" to do without an API'
        )
    return clean, key or "none"  # a server on this machine asks for no key, the library wants one


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback or host == "0.0.0.0"
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def open_client(time_limit: float) -> AsyncOpenAI:
    """The openai client; its own retries are off. A server on this machine is never asked through a proxy. Raises
    UserError."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    url, key = endpoint()
    try:
        http = DefaultAsyncHttpxClient(trust_env=not is_loopback(urlsplit(url).hostname), timeout=time_limit)
        return AsyncOpenAI(base_url=url, api_key=key, http_client=http, max_retries=0, timeout=time_limit)
    except ImportError:
        raise UserError(
            "HTTPS_PROXY or ALL_PROXY names a SOCKS proxy; fix: pip install socksio, or name an http:// proxy"
        ) from None
    except Exception as error:  # a proxy address or a certificate file that cannot be used
        what = " ".join(redact(str(error), is_error=True).split())[:160]
        raise UserError(
            f"no connection can be set up ({what}); fix: check HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE"
        ) from None


# ----------------------------------------------------------------------------------------------------- what comes back


def status_fault(error: APIStatusError) -> Fault:
    status, body = error.status_code, str(error.body)
    text = " ".join(redact(error.message, is_error=True).split())[:200]
    text = text if text.startswith("Error code") else f"Error code: {status} - {text}"
    if status not in (401, 402) and is_filtered(error.body):
        return Fault(FILTERED, "skip")
    if status in FATAL or error.code == HOPELESS_QUOTA or HOPELESS_QUOTA in body:
        return Fault(text, "stop")
    if status not in RETRIED and status < 500:
        return Fault(text, "skip")
    wait = retry_after(error.response.headers)
    if wait is not None and wait > LONGEST_RETRY_AFTER:
        return Fault(f"HTTP {status}: the server asks to wait {wait:.0f} s")
    return Fault(f"HTTP {status}", wait=wait)


def is_filtered(body: Any) -> bool:
    """Does an error's body name a content filter? By its words, or by a code of a provider that has only numbers."""
    codes = {str(part.get(name)) for part in _objects(body) for name in ("code", "status_code", "type", "error_code")}
    return bool(codes & FILTER_CODES) or bool(FILTER_ERRORS.search(str(body)))


def _objects(body: Any, depth: int = 0) -> list[dict]:
    inner = (
        [part for value in body.values() for part in _objects(value, depth + 1)]
        if isinstance(body, dict) and depth < 4
        else []
    )
    return [body, *inner] if isinstance(body, dict) else []


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: a number, or a date (RFC 9110, section 10.2.3); None where it does not say.

    A date counts from the server's own Date, because its clock or ours may be wrong.
    """
    from email.utils import parsedate_to_datetime

    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            wait = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        return wait if math.isfinite(wait) and wait >= 0 else None
    try:
        until, now = (parsedate_to_datetime(headers.get(name, "")).timestamp() for name in ("retry-after", "date"))
    except (TypeError, ValueError, OverflowError):
        try:
            until, now = parsedate_to_datetime(headers.get("retry-after", "")).timestamp(), time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return until - now if until >= now else None


def read_reply(reply: ChatCompletion) -> Answer:
    """The answer in a reply. The library does not check what it parses: a field may hold anything, or be missing."""
    usage = getattr(reply, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    counts = [count if type(count) is int and 0 < count < MOST_TOKENS else 0 for count in counts]
    billed = tuple(counts) if any(counts) else True
    try:
        choice = reply.choices[0]
        text, reason = choice.message.content, str(choice.finish_reason).lower()
        refusal = getattr(choice.message, "refusal", None)
    except (AttributeError, TypeError, IndexError, KeyError):
        if is_filtered(getattr(reply, "model_extra", None) or {}):
            raise Fault(FILTERED, "skip") from None
        raise Fault("garbage: no choices in it", billed=billed) from None
    has_text = isinstance(text, str) and text.strip()
    if FILTER_REASONS.search(reason) or (not has_text and isinstance(refusal, str) and refusal.strip()):
        raise Fault(FILTERED, "skip", billed=billed)
    if not has_text and reason in LENGTH_REASONS:
        raise Fault(OUT_OF_TOKENS, "skip", billed=billed)
    if not has_text or SURROGATE.search(text):
        raise Fault("garbage: no text in it", billed=billed)
    if reason not in STOP_REASONS | LENGTH_REASONS:
        raise Fault(f"garbage: finish_reason {redact(reason)[:40]}", billed=billed)
    if len(text) > LONGEST_ANSWER:
        raise Fault(f"an answer of more than {LONGEST_ANSWER} characters", "skip", billed=billed)
    text = redact(CONTROL.sub("", text).strip())
    return Answer(text, "length" if reason in LENGTH_REASONS else "stop", *counts)
