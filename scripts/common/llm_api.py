"""Asking an OpenAI-compatible endpoint many questions, each of them once: DeepSeek, Qwen, OpenAI, a local `vllm serve`.

    with LLM(settings.request_log, concurrency=16) as llm:
        answers = llm.ask([ChatRequest("deepseek-chat", messages, max_tokens=600), ...])

OPENAI_BASE_URL and OPENAI_API_KEY name the endpoint (common/llm_endpoint.py).

Every answer is appended to the request log (JSONL) the moment it arrives, under a hash of what was asked. A question
that stands in the log is never asked again, by this run or another. Only answers get there: what failed is counted and
asked anew.

The openai library sends and parses; its own retries are off (max_retries=0), because they neither cover an answer that
is no answer, nor limit the time of a whole exchange, nor say what happened. docs/tasks/copywriting.md has the rules.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.jsonl import DataError, JsonlAppender, read_jsonl, unreadable
from common.llm_endpoint import (
    FILTERED,
    OUT_OF_TOKENS,
    OUT_OF_TOKENS_FIX,
    Answer,
    Fault,
    open_client,
    read_reply,
    redact,
    status_fault,
)
from common.llm_settings import HOW_TO_ASK, AskSettings
from common.locks import FileLock
from common.settings import UserError, show_path

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FIRST_WAIT = 0.5  # seconds before the second try; doubled with each further one
LONGEST_WAIT = 30.0
LOGGED = {"id": str, "request": dict, "text": str, "finish_reason": str, "prompt_tokens": int, "completion_tokens": int}
FIRST_OF_ROW = b'{"id": "", "request": {'  # how every row of a request log begins, but for the id
STAGES_OWN = ("model", "messages", "stream", "n")  # fields of a body that --extra-body may not set
SECRET_NAME = re.compile(r"api[-_]?key|authorization|password|secret", re.IGNORECASE)


@dataclass(frozen=True)
class ChatRequest:
    """One question. Equal questions have equal keys; `sample` tells those apart that are to be asked several times."""

    model: str  # its name at the endpoint
    messages: list[dict]
    max_tokens: int  # of the answer
    temperature: float = 0.7
    top_p: float = 1.0
    sample: int = 0  # not sent
    extra: dict = field(default_factory=dict)  # further fields of the body; null takes one away

    @property
    def body(self) -> dict:
        body = {"model": self.model, "messages": self.messages, "max_tokens": self.max_tokens}
        body |= {"temperature": self.temperature, "top_p": self.top_p} | self.extra
        return {name: value for name, value in body.items() if value is not None}

    @cached_property
    def key(self) -> str:
        asked = json.dumps([self.body, self.sample], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(asked.encode("utf-8")).hexdigest()[:24]

    @cached_property
    def most_tokens(self) -> int:
        """The longest answer that may be billed, by whichever name the limit is sent."""
        sent = [self.body.get(name) for name in ("max_tokens", "max_completion_tokens")]
        return max((value for value in sent if type(value) is int), default=self.max_tokens)


class Failure(NamedTuple):
    """A question without an answer. A type of its own, so that its text cannot be taken for one."""

    reason: str


class Estimate(NamedTuple):
    """What a list of questions will take, beyond what the log already answers. Costs in the unit of the prices."""

    requests: int
    answered: int  # of them, in the log
    tokens_in: int
    tokens_out: int  # expected: the mean of the log's answers by this model, else the limit
    most_tokens_out: int  # if every answer runs to its limit
    cost: float
    most_cost: float
    basis: str  # what the token counts rest on


def read_extra(text: str) -> dict:
    """The setting `extra_body`: a JSON object, or nothing. Raises UserError."""
    shown = f"--extra-body {redact(text, is_error=True)[:200]}"
    try:
        value = json.loads(text or "{}")
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")  # no NaN, infinity, half characters
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown}: not JSON ({error}); fix: quote it for the shell") from None
    if not isinstance(value, dict):
        raise UserError(f'{shown}: not an object; fix: write {{"name": value}}')
    if taken := [name for name in STAGES_OWN if name in value]:
        raise UserError(f"{shown}: {', '.join(taken)} is set by the stage; fix: leave it out")
    if redact(text) != text or SECRET_NAME.search(text):
        raise UserError("--extra-body holds a key or a password, and it is stored; fix: export OPENAI_API_KEY instead")
    return value


def _is_logged(line: bytes) -> bool:
    """Is this a row of a request log, or the beginning of one that a kill cut off?"""
    if not line.endswith(b"\n"):
        start = re.sub(rb'(?<=^\{"id": ")[0-9a-f]{1,24}', b"", line[:80])
        return start.startswith(FIRST_OF_ROW) or FIRST_OF_ROW.startswith(start)
    try:
        row = json.loads(line)
        return (
            all(type(row[name]) is kind for name, kind in LOGGED.items())
            and {"model", "messages"} <= row["request"].keys()
        )
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def estimate_tokens(text: str) -> float:
    """Tokens of a text, roughly: one for 1.5 Chinese characters or 4 others, as Qwen's and DeepSeek's tokenizers do."""
    wide = sum(char >= "\u2e80" for char in text)
    return wide / 1.5 + (len(text) - wide) / 4


def _estimate_prompt(messages: list[dict]) -> float:
    return sum(estimate_tokens(message["content"]) + 4 for message in messages)  # 4: role and turn marks


class LLM:
    """An endpoint with its request log. Use it as a context manager.

    request_log: JSONL file of answers; one process at a time writes it. Keep it outside the folders that --overwrite
    empties. concurrency: questions under way at once. max_tries: per question. time_limit: seconds for one try as a
    whole. price_in, price_out: per million tokens. max_cost, max_total_tokens: budget for the questions asked through
    this object,
        answers from the log included, 0 = none. A try starts only if the budget would hold the longest answer to it.
    max_failed: questions that may stay without an answer. dry_run: refuse to ask.
    """

    def __init__(
        self,
        request_log: Path,
        concurrency: int = 16,
        max_tries: int = 10,
        time_limit: float = 120.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
        max_cost: float = 0.0,
        max_total_tokens: int = 0,
        max_failed: int = 0,
        dry_run: bool = False,
    ):
        floors = {"concurrency": 1, "max_tries": 1, "time_limit": 1e-3, "price_in": 0, "price_out": 0}
        floors |= {"max_cost": 0, "max_total_tokens": 0, "max_failed": 0}
        given = locals()
        for name, floor in floors.items():
            if not (math.isfinite(given[name]) and given[name] >= floor):
                raise UserError(f"--{name.replace('_', '-')} {given[name]}; fix: a number from {floor} up")
        if max_cost and not (price_in or price_out):
            raise UserError("--max-cost needs prices; fix: set --price-in and --price-out (per million tokens)")
        self.log, self.concurrency, self.max_tries = Path(request_log), concurrency, max_tries
        self.time_limit, self.price_in, self.price_out = time_limit, price_in, price_out
        self.max_cost, self.max_total_tokens, self.max_failed = max_cost, max_total_tokens, max_failed
        self.dry_run = dry_run
        self.answers: dict[str, Answer] = {}
        self.failures: dict[str, str] = {}
        self.faults: Counter = Counter()  # reason -> tries
        self.sent = self.retried = self.tokens_in = self.tokens_out = self.seconds = 0
        self._counted: set[str] = set()  # keys whose tokens are in the sums
        self._paid = [0, 0, 0]  # this run's billed requests, their tokens in, out
        self._lost = [
            0.0,
            0.0,
        ]  # of them tokens in, out of tries without an answer (where the server did not say: at most)
        self._reserved = [0.0, 0.0]  # and of tries under way
        self._seen: dict[str, list[float]] = {}  # model -> prompt tokens, estimate of them, answer tokens, answers
        self._stop: str | None = None
        self._answered = False  # has this object got an answer from the endpoint?
        self._failed_in_a_row = 0
        self._appender = self._lock = None

    @classmethod
    def of(cls, settings: AskSettings) -> LLM:
        """As a stage's settings say (HOW_TO_ASK)."""
        return cls(**{name: getattr(settings, name) for name in HOW_TO_ASK})

    # ------------------------------------------------------------------------------------------------- the log

    def __enter__(self) -> LLM:
        if self.log.exists():  # a dry run makes no new one
            self._open_log()
        return self

    def __exit__(self, *_) -> None:
        if self._appender:
            self._appender.close()
        if self._lock:
            self._lock.release()
        if self.sent or self._counted:
            print(self.summary())

    def _open_log(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.log.with_name(f".{self.log.name}.lock"), self.log)
        try:
            self._read_log()
        except BaseException:
            self._lock.release()
            raise

    def _read_log(self) -> None:
        if self.log.exists():
            self._refuse_other_files()
        self._appender = JsonlAppender(self.log)
        for row in read_jsonl(self.log, max_line_bytes=1 << 30):
            answer = Answer(row["text"], row["finish_reason"], row["prompt_tokens"], row["completion_tokens"])
            self.answers[row["id"]] = answer
            self._learn(row["request"], answer)

    def _refuse_other_files(self) -> None:
        """Only a file of such rows is appended to, and only of such a file a torn last line is cut off."""
        if problem := unreadable(self.log):
            raise DataError([problem])
        with open(self.log, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not _is_logged(line):
                    where = f"{show_path(self.log)}:{number}"
                    raise UserError(
                        f"{where}: not a row of a request log, nothing was touched; fix: another --request-log"
                    )

    def _learn(self, body: dict, answer: Answer) -> None:
        seen = self._seen.setdefault(body["model"], [0.0, 0.0, 0.0, 0.0])
        new = (answer.prompt_tokens, _estimate_prompt(body["messages"]), answer.completion_tokens, 1)
        seen[:] = [a + b for a, b in zip(seen, new, strict=True)]

    def _count(self, key: str) -> None:
        """Take an answer's tokens into the sums, once."""
        if key not in self._counted:
            self._counted.add(key)
            self.tokens_in += self.answers[key].prompt_tokens
            self.tokens_out += self.answers[key].completion_tokens

    # ------------------------------------------------------------------------------------------------- before

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def estimate(self, requests: Sequence[ChatRequest]) -> Estimate:
        """What asking these would take. Needs neither key nor network, and gets closer as the log fills."""
        unique = {request.key: request for request in requests}
        new = [request for key, request in unique.items() if key not in self.answers]
        tokens_in = sum(self._tokens_in(request) for request in new)
        most = sum(request.most_tokens for request in new)
        means = {model: seen[2] / seen[3] for model, seen in self._seen.items()}
        expected = sum(min(means.get(r.model, r.most_tokens), r.most_tokens) for r in new)
        known = sum(int(self._seen[model][3]) for model in {request.model for request in new} if model in self._seen)
        basis = f"{known} answers in the log" if known else "characters of the prompts and the limit of the answers"
        tokens = (round(tokens_in), round(expected), most)
        costs = (self.cost(tokens_in, expected), self.cost(tokens_in, most))
        return Estimate(len(unique), len(unique) - len(new), *tokens, *costs, basis)

    def _tokens_in(self, request: ChatRequest) -> float:
        seen = self._seen.get(request.model)
        return _estimate_prompt(request.messages) * (seen[0] / seen[1] if seen and seen[1] else 1.0)

    def check(self, requests: Sequence[ChatRequest]) -> None:
        """Fail before a run is opened: raises UserError where something is to be asked and nobody to ask it."""
        if any(request.key not in self.answers for request in requests):
            open_client(self.time_limit)

    def print_estimate(self, requests: Sequence[ChatRequest], note: str = "") -> None:
        """The --dry-run of a stage."""
        e = self.estimate(requests)
        print(f"{e.requests} requests, {e.answered} of them answered in {show_path(self.log)}")
        print(f"tokens in about {e.tokens_in}, out about {e.tokens_out}, at most {e.most_tokens_out} ({e.basis})")
        if self.price_in or self.price_out:
            print(
                f"cost about {e.cost:.4f}, at most {e.most_cost:.4f} (in {self.price_in}, out {self.price_out} per "
                "million)"
            )
        else:
            print("cost unknown: set --price-in and --price-out (per million tokens)")
        print(f"{note + '; ' if note else ''}dry run: nothing asked, nothing written")

    # ------------------------------------------------------------------------------------------------- asking

    def ask(self, requests: Sequence[ChatRequest], label: str = "requests") -> list[Answer | Failure]:
        """The answers, in order; equal questions share one. Asks only what the log does not answer.

        Raises UserError where more than `max_failed` questions stay without an answer, where the budget ends, or where
        going on is pointless (key refused, wrong address, one failure after the other). The answers so far are kept.
        With max_failed, a Failure stands in the place of an answer.
        """
        unique = {request.key: request for request in requests}
        new = [request for key, request in unique.items() if key not in self.answers]
        for key in unique:
            if key in self.answers:
                self._count(key)
        if new:
            if self.dry_run:
                raise UserError(f"--dry-run: {len(new)} {label} would be asked here")
            if self._appender is None:
                self._open_log()
            client = open_client(self.time_limit)
            started = time.monotonic()
            try:
                asyncio.run(self._ask_all(new, client, label))
            finally:
                self.seconds += time.monotonic() - started
        failed = [key for key in unique if key not in self.answers]
        fix = "run the same command again: it asks only what is missing"
        if OUT_OF_TOKENS in self.failures.values():
            fix = f"{OUT_OF_TOKENS_FIX}, then {fix}"
        if self._stop:
            got = len(unique) - len(failed)
            raise UserError(f"{self._stop}; {got} of {len(unique)} {label} are answered and kept; fix: {fix}")
        if len(failed) > self.max_failed:
            reasons = Counter(self.failures[key] for key in failed)
            raise UserError(
                f"{len(failed)} of {len(unique)} {label} without an answer: "
                + ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
                + f"; fix: {fix}, or allow as many with --max-failed"
            )
        return [self.answers.get(request.key) or Failure(self.failures[request.key]) for request in requests]

    async def _ask_all(self, requests: list[ChatRequest], client: AsyncOpenAI, label: str) -> None:
        from tqdm import tqdm

        waiting = iter(requests)  # shared by the workers: each takes the next
        with tqdm(total=len(requests), desc=label, unit=" requests") as progress:

            async def worker() -> None:
                for request in waiting:
                    await self._ask_one(client, request)
                    if self._stop:
                        return
                    progress.update()

            async with client:
                await asyncio.gather(*(worker() for _ in range(min(self.concurrency, len(requests)))))

    async def _ask_one(self, client: AsyncOpenAI, request: ChatRequest) -> None:
        for number in range(1, self.max_tries + 1):
            most = (self._tokens_in(request), request.most_tokens)
            if not await self._within_budget(most):
                return
            self._reserve(most, 1)
            self.sent += 1
            self.retried += number > 1
            started = time.monotonic()
            try:
                answer = await self._try(client, request)
            except Fault as fault:
                wait = fault.wait
                self._note(fault, most)
                if fault.then != "again" or number == self.max_tries:
                    return self._give_up(request, fault.reason)
            else:
                self._keep(request, answer, number, time.monotonic() - started)
                return
            finally:
                self._reserve(most, -1)
            backoff = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (number - 1))
            # Jitter, so that those who failed together do not come back together.
            jitter = backoff * random.uniform(0.5, 1)
            await asyncio.sleep(jitter if wait is None else wait + 0.2 * jitter)
            if self._stop:
                return

    async def _try(self, client: AsyncOpenAI, request: ChatRequest) -> Answer:
        """One try. Raises Fault, whatever goes wrong on the way."""
        import openai

        body = request.body
        try:
            async with asyncio.timeout(self.time_limit):
                reply = await client.chat.completions.create(
                    model=body.pop("model"), messages=body.pop("messages"), extra_body=body
                )
        except (TimeoutError, openai.APITimeoutError):
            raise Fault(f"no answer in {self.time_limit:g} s", billed=True) from None
        except openai.APIStatusError as error:
            raise status_fault(error) from None
        except openai.APIConnectionError as error:
            kind = type(error.__cause__ or error).__name__
            raise Fault(f"connection: {kind}", billed=kind != "ConnectError") from None
        except (ValueError, RecursionError):  # JSON that is none, or 100,000 brackets
            raise Fault("garbage: broken JSON", billed=True) from None
        answer = read_reply(reply)
        # Not every server counts: what it leaves out is estimated.
        tokens_in = answer.prompt_tokens or round(self._tokens_in(request))
        return answer._replace(
            prompt_tokens=tokens_in, completion_tokens=answer.completion_tokens or round(estimate_tokens(answer.text))
        )

    def _keep(self, request: ChatRequest, answer: Answer, tries: int, seconds: float) -> None:
        row = {"id": request.key, "request": request.body, "sample": request.sample, **answer._asdict()}
        self._appender.write(row | {"tries": tries, "seconds": round(seconds, 3)})
        self.answers[request.key] = answer
        self._learn(request.body, answer)
        self._count(request.key)
        self._pay(answer.prompt_tokens, answer.completion_tokens)
        self._answered, self._failed_in_a_row = True, 0

    def _pay(self, *tokens: float) -> None:
        self._paid = [a + b for a, b in zip(self._paid, (1, *tokens), strict=True)]

    def _note(self, fault: Fault, most: tuple[float, float]) -> None:
        self.faults[fault.reason] += 1
        tries = self.faults.total()
        if fault.billed:
            tokens = most if fault.billed is True else fault.billed
            self._lost = [a + b for a, b in zip(self._lost, tokens, strict=True)]
            self._pay(*tokens)
        if fault.reason == FILTERED:  # an answer of sorts: the endpoint works
            self._answered, self._failed_in_a_row = True, 0
            return
        if fault.then == "stop":
            self._stop = self._stop or fault.reason
        elif not self._answered and tries >= max(20, 3 * self.concurrency):  # a wrong address, a server that is down
            self._stop = self._stop or f"not one of {tries} tries got an answer, the last: {fault.reason}"

    def _give_up(self, request: ChatRequest, reason: str) -> None:
        self.failures[request.key] = reason
        self._failed_in_a_row += reason != FILTERED
        if self._failed_in_a_row >= max(10, self.concurrency):
            self._stop = self._stop or f"{self._failed_in_a_row} questions in a row failed, the last with: {reason}"

    # ------------------------------------------------------------------------------------------------- budget

    def _reserve(self, tokens: tuple[float, float], sign: int) -> None:
        self._reserved = [a + sign * b for a, b in zip(self._reserved, tokens, strict=True)]

    async def _within_budget(self, most: tuple[float, float]) -> bool:
        """Wait until the budget holds this try with those under way. False: it never will."""
        while not self._stop:
            held = [sum(x) for x in zip(self._lost, self._reserved, most, strict=True)]
            tokens = (self.tokens_in + held[0], self.tokens_out + held[1])
            over_cost = self.max_cost and self.cost(*tokens) > self.max_cost
            if not over_cost and not (self.max_total_tokens and sum(tokens) > self.max_total_tokens):
                return True
            if self._reserved[1] < 1:  # nothing under way that could turn out cheaper than feared
                which = f"--max-cost {self.max_cost:g}" if over_cost else f"--max-total-tokens {self.max_total_tokens}"
                self._stop = f"the budget {which} does not hold another question (spent {self.spent()})"
            else:
                await asyncio.sleep(0.05)
        return False

    # ------------------------------------------------------------------------------------------------- after

    def spent(self) -> str:
        cost = f", cost {self.cost(self.tokens_in, self.tokens_out):.4f}" if self.price_in or self.price_out else ""
        return f"{self.tokens_in} tokens in, {self.tokens_out} out{cost}"

    def summary(self) -> str:
        faults = ", ".join(f"{count} x {reason}" for reason, count in self.faults.most_common()) or "none"
        answers = f"{len(self._counted)} answers: {self.spent()}"
        if not self.sent:
            return f"{answers}; 0 requests sent, nothing billed"
        billed, *tokens = self._paid
        cost = f", cost {self.cost(*tokens):.4f}" if self.price_in or self.price_out else ""
        return (
            f"{answers}; {self.sent} requests sent in {self.seconds:.1f} s, {self.retried} of them again; billed: "
            f"{billed} with at most {round(tokens[0])} tokens in, {round(tokens[1])} out{cost}; faults: {faults}"
        )

    def figures(self) -> dict:
        """For the run's record. The first sums are those of the answers used, also where an earlier run paid for
        them."""
        billed, *tokens = self._paid
        return {
            "requests": len(self._counted),
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "cost": round(self.cost(self.tokens_in, self.tokens_out), 6),
            "sent": self.sent,
            "retried": self.retried,
            "billed": {
                "requests": billed,
                "tokens_in": round(tokens[0]),
                "tokens_out": round(tokens[1]),
                "cost": round(self.cost(*tokens), 6),
                "tokens_without_answer": round(sum(self._lost)),
            },
            "faults": dict(self.faults.most_common()),
            "without_answer": len(self.failures),
            "seconds": round(self.seconds, 1),
        }
