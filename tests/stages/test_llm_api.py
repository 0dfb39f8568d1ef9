"""The API client against a real server on loopback that drops, hangs, refuses and talks nonsense."""

import base64
import hashlib
import importlib.util
import json
import math
import time
from email.utils import formatdate
from urllib.parse import quote

import pytest

from chat_server import GARBAGE, ChatServer
from common.jsonl import read_jsonl
from common.llm_api import LLM, Answer, ChatRequest, Failure, read_extra
from common.llm_endpoint import endpoint as read_endpoint
from common.llm_endpoint import open_client, redact, retry_after
from common.settings import UserError

KEY = "sk-test-0123456789abcdef"


@pytest.fixture
def endpoint(monkeypatch):
    """endpoint(script=[...], faults={...}) starts a server and points the environment at it."""
    running = []

    def start(**options) -> ChatServer:
        server = ChatServer(**options).__enter__()
        running.append(server)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return server

    yield start
    for server in running:
        server.__exit__()


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log" / "requests.jsonl"


def question(text: str = "你好", **options) -> ChatRequest:
    return ChatRequest("test-model", [{"role": "user", "content": text}], **{"max_tokens": 50, **options})


def questions(count: int, **options) -> list[ChatRequest]:
    return [question(f"第{i}问", **options) for i in range(count)]


# --- asking


def test_answers_come_in_the_order_of_the_questions_and_equal_ones_are_asked_once(endpoint, log):
    server = endpoint(latency=lambda body: 0.02 * (len(body["messages"][0]["content"]) % 3))
    asked = [question(text) for text in ("一", "一二", "一", "一二三", "一二")]
    with LLM(log) as llm:
        answers = llm.ask(asked)
    assert [answer.text for answer in answers] == ["答：一", "答：一二", "答：一", "答：一二三", "答：一二"]
    assert len(server.requests) == 3 == len(read_jsonl(log))


def test_a_sample_number_asks_again_and_is_not_sent(endpoint, log):
    server = endpoint()
    with LLM(log) as llm:
        llm.ask([question(sample=0), question(sample=1)])
    assert len(server.requests) == 2 and "sample" not in server.requests[0].body


def test_the_body_holds_the_sampling_and_the_extra_fields(endpoint, log):
    server = endpoint()
    extra = read_extra('{"chat_template_kwargs": {"enable_thinking": false}, "top_p": null}')
    with LLM(log) as llm:
        llm.ask([question(temperature=0.1, extra=extra)])
    body = server.requests[0].body
    assert body["temperature"] == 0.1 and body["max_tokens"] == 50 and body["model"] == "test-model"
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and "top_p" not in body
    with pytest.raises(UserError, match="extra-body"):
        read_extra("{enable_thinking: false}")


def test_what_the_log_answers_is_never_asked_again(endpoint, log):
    server = endpoint()
    with LLM(log) as llm:
        llm.ask(questions(5))
    with LLM(log) as llm:
        answers = llm.ask(questions(8))
        assert llm.figures()["requests"] == 8 and llm.figures()["sent"] == 3
    assert max(server.answered().values()) == 1 and len(answers) == 8


def test_no_more_than_the_allowed_number_is_under_way(endpoint, log):
    server = endpoint(latency=0.05)
    with LLM(log, concurrency=7) as llm:
        llm.ask(questions(40))
    assert server.max_active == 7


# --- faults


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop", "cut", "hang", "trickle"])
def test_a_fault_is_tried_again(endpoint, log, fault):
    server = endpoint(script=[fault, "ok"], hang_seconds=20)
    with LLM(log, time_limit=0.6) as llm:
        assert llm.ask([question()]) == [Answer("答：你好", "stop", 2, 4)]
    assert len(server.requests) == 2 and len(read_jsonl(log)) == 1
    assert sum(llm.faults.values()) == 1


def test_nothing_that_is_no_answer_gets_into_the_log(endpoint, log):
    server = endpoint(faults={"garbage": 1.0})
    with (
        LLM(log, max_tries=1, concurrency=1) as llm,
        pytest.raises(UserError, match="6 of 6 requests without an answer"),
    ):
        llm.ask(questions(len(GARBAGE)))
    assert server.outcomes() == {"garbage": len(GARBAGE)} and read_jsonl(log) == []
    assert llm.faults == {"garbage: broken JSON": 3, "garbage: no choices in it": 2, "garbage: no text in it": 1}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"content": "   "}, "no text"),
        ({"content": None}, "no text"),
        ({"content": ["a", "b"]}, "no text"),
        ({"content": "半句", "finish_reason": "insufficient_system_resource"}, "insufficient_system_resource"),
        ({"content": "半句", "finish_reason": None}, "finish_reason"),
        ({"content": "好\ud800"}, "no text"),
    ],
)
def test_an_answer_that_is_none_is_tried_again(endpoint, log, reply, reason):
    replies = [dict(reply), {"content": "好"}]
    endpoint(reply=lambda body: replies.pop(0))
    with LLM(log) as llm:
        assert llm.ask([question()])[0].text == "好"
    assert [reason in fault for fault in llm.faults] == [True]


def test_the_end_of_a_cut_answer_and_control_characters_are_seen(endpoint, log):
    endpoint(reply=lambda body: {"content": " 一\x00二\n", "finish_reason": "length"})
    with LLM(log) as llm:
        assert llm.ask([question()])[0] == Answer("一二", "length", 2, 5)
    with LLM(log) as llm:  # the log can be read again
        assert llm.ask([question()])[0].text == "一二"


def test_waits_double_and_differ(endpoint, log):
    server = endpoint(script=["500", "500", "500"] * 2)
    with LLM(log, concurrency=2) as llm:
        llm.ask(questions(2))
    gaps = []
    for key in {request.key for request in server.requests}:
        times = [request.time for request in server.requests if request.key == key]
        gaps.append([later - earlier for earlier, later in zip(times, times[1:], strict=False)])
    for waits in gaps:
        assert len(waits) == 3
        assert waits[0] >= 0.25 and waits[1] >= 0.5 and 1 <= waits[2] < 3.5
    assert gaps[0] != gaps[1]


def test_retry_after_in_seconds_is_honoured(endpoint, log):
    server = endpoint(script=["429"], retry_after="1.5")
    with LLM(log) as llm:
        llm.ask([question()])
    assert 1.5 <= server.requests[1].time - server.requests[0].time < 2.5


def test_retry_after_as_a_date_is_honoured(endpoint, log):
    server = endpoint(
        script=["503"], retry_after=formatdate(time.time() + 3, usegmt=True)
    )  # whole seconds: 2 to 3 from now
    with LLM(log) as llm:
        llm.ask([question()])
    assert 1.5 <= server.requests[1].time - server.requests[0].time < 4.5


@pytest.mark.parametrize("value", ["3600", "1e300", "-5", "nan", "inf", "soon", formatdate(4e9), "Mon, 99 Foo 9999"])
def test_a_retry_after_that_cannot_be_meant_gives_way_to_the_usual_wait(endpoint, log, value):
    server = endpoint(script=["429"], retry_after=value)
    with LLM(log) as llm:
        assert llm.ask([question()])[0].text == "答：你好"
    assert 0.2 <= server.requests[1].time - server.requests[0].time < 2.5


def test_a_date_counts_from_the_servers_own_clock():
    date = formatdate(time.time() - 90_000, usegmt=True)  # its clock is a day behind
    until = formatdate(time.time() - 90_000 + 7, usegmt=True)
    assert retry_after({"retry-after": until, "date": date}) == 7


def test_a_refused_key_stops_everything_and_is_not_shown(endpoint, log, monkeypatch, capfd):
    server = endpoint(key="another")
    with LLM(log, concurrency=2) as llm, pytest.raises(UserError) as stopped:
        llm.ask(questions(50))
    assert len(server.requests) <= 2
    shown = (
        str(stopped.value) + "".join(capfd.readouterr()) + json.dumps(llm.figures()) + log.read_text(encoding="utf-8")
    )
    assert "401" in shown and KEY not in shown and KEY[:12] not in shown


def test_a_bad_question_does_not_stop_the_others(endpoint, log):
    endpoint(script=["400"])
    with (
        LLM(log, concurrency=1) as llm,
        pytest.raises(UserError, match="1 of 3 requests without an answer: 1 x Error code: 400"),
    ):
        llm.ask(questions(3))
    assert len(read_jsonl(log)) == 2


def test_with_max_failed_a_failure_stands_in_the_place_of_the_answer(endpoint, log):
    endpoint(
        reply=lambda body: {"content": "", "finish_reason": "content_filter"} if "1" in str(body["messages"]) else "好"
    )
    with LLM(log, max_failed=1) as llm:
        answers = llm.ask(questions(3))
    assert answers[1] == Failure("refused by the content filter")
    assert [type(answer) for answer in answers] == [Answer, Failure, Answer]


def test_a_dead_server_is_given_up_after_some_questions(endpoint, log):
    server = endpoint(faults={"drop": 1.0})
    with LLM(log, max_tries=1, concurrency=4) as llm, pytest.raises(UserError, match="10 questions in a row failed"):
        llm.ask(questions(100))
    assert len(server.requests) < 20


def test_a_server_that_never_answers_is_given_up_before_the_tries_are_used_up(endpoint, log):
    server = endpoint(faults={"500": 1.0})
    with (
        LLM(log, concurrency=8) as llm,
        pytest.raises(UserError, match="not one of 24 tries got an answer, the last: HTTP 500"),
    ):
        llm.ask(questions(100))
    assert len(server.requests) < 40


def test_no_server_and_no_key_are_told_apart(log, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)  # a server on this machine needs none
    with LLM(log, max_tries=1) as llm, pytest.raises(UserError, match="connection: ConnectError"):
        llm.ask([question()])
    assert llm.figures()["billed"]["requests"] == 0
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.example.com/v1")
    with LLM(log) as llm, pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        llm.check([question()])


THINKING = {"reasoning_content": "想" * 50, "usage": {"prompt_tokens": 9, "completion_tokens": 50}}


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS"])
@pytest.mark.parametrize("reply", [{"content": None, **THINKING}, {"content": "", **THINKING}, {"content": ""}])
def test_reasoning_that_used_up_the_tokens_is_billed_once_and_says_what_helps(endpoint, log, reply, reason):
    server = endpoint(reply=lambda body: {**reply, "finish_reason": reason})
    with LLM(log) as llm, pytest.raises(UserError, match="fix: raise --max-tokens or turn thinking off"):
        llm.ask([question()])
    assert len(server.requests) == 1 and read_jsonl(log) == []
    figures = llm.figures()
    assert (figures["sent"], figures["retried"], figures["billed"]["requests"]) == (1, 0, 1)
    if "usage" in reply:
        assert figures["billed"]["tokens_without_answer"] == 59


def error(status: int, **body) -> dict:
    return {"status": status, "raw": json.dumps({"error": body}, ensure_ascii=False)}


FILTERED = {
    "content_filter": {"content": "", "finish_reason": "content_filter"},
    "half a text": {"content": "半句", "finish_reason": "content-filter"},
    "sensitive": {"content": "半句", "finish_reason": "sensitive"},
    "moderation": {"content": None, "finish_reason": "moderation"},
    "SAFETY": {"content": "", "finish_reason": "SAFETY"},
    "refusal field": {"content": None, "refusal": "I can't help with that."},
    "Qwen": error(400, code="data_inspection_failed", message="Output data may contain inappropriate content."),
    "DataInspectionFailed": error(500, code="DataInspectionFailed", message="x"),
    "Zhipu": error(400, code="1301", message="系统检测到输入或生成内容可能包含不安全或敏感内容"),
    "a number alone": error(400, code=1301, message="x"),
    "DeepSeek": error(400, message="Content Exists Risk", type="invalid_request_error"),
    "Azure": error(400, code="content_filter", message="The response was filtered", innererror={"code": "x"}),
    "Ark": error(400, code="InputTextSensitiveContentDetected", message="x"),
    "OpenRouter": error(403, message="Your chosen model requires moderation and your input was flagged", code=403),
    "MiniMax": {"raw": '{"id": "x", "choices": null, "base_resp": {"status_code": 1027, "status_msg": "output"}}'},
    "Azure, asked to wait": error(429, code="content_filter", message="x"),
}


@pytest.mark.parametrize("name", FILTERED)
def test_a_content_filter_is_a_skip_in_every_spelling(endpoint, log, name):
    server = endpoint(reply=lambda body: FILTERED[name] if "1" in str(body["messages"]) else "好")
    with LLM(log, max_failed=1) as llm:
        answers = llm.ask(questions(3))
    assert answers[1] == Failure("refused by the content filter") and len(server.requests) == 3
    assert llm.figures()["faults"] == {"refused by the content filter": 1}


def test_many_filtered_questions_do_not_end_a_run(endpoint, log):
    server = endpoint(reply=lambda body: FILTERED["sensitive"])
    with LLM(log, concurrency=2, max_failed=40) as llm:
        assert len(llm.ask(questions(40))) == 40 == len(server.requests)


@pytest.mark.parametrize(
    "reply",
    [
        error(403, message="Your account is blocked for security reasons"),
        error(404, message="No endpoints found matching your data policy"),
        error(404, message="model names are case-sensitive"),
        error(401, message="invalid key, account flagged"),
    ],
)
def test_what_is_no_content_filter_still_stops(endpoint, log, reply):
    endpoint(reply=lambda body: reply)
    with LLM(log) as llm, pytest.raises(UserError, match="Error code: 40"):
        llm.ask([question()])
    assert llm._stop


# --- keys and addresses


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:8000", "most likely http://127.0.0.1:8000/v1"),
        ("https://api.deepseek.com/", "most likely https://api.deepseek.com/v1"),
        ("https://api.deepseek.com/v1/chat/completions", "fix: the address without it, https://api.deepseek.com/v1"),
        ("https://api.deepseek.com/v1/models/", "ends in /models"),
        ("api.deepseek.com/v1", "is no http address"),
        ("localhost:8000/v1", "is no http address"),
        ("ftp://api.deepseek.com/v1", "is no http address"),
        ("https://:8000/v1", "is no http address"),
        ("https://[::1/v1", "is no http address"),
        ("https://host:port/v1", "is no http address"),
        ("https://api.deepseek.com/v1?api-key=SECRET123", "holds a ? or #"),
        ("https://user:SECRET123@api.deepseek.com/v1", "holds a user or a password"),
        ("https://SECRET123@api.deepseek.com/v1", "holds a user or a password"),
        ("“https://api.deepseek.com/v1”", "holds the character"),
        ('"https://api.deepseek.com/v1"', "holds the character"),
        ("https://api.deepseek.com /v1", "holds the character"),
        ("https：//api.deepseek.com/v1", "holds the character"),
    ],
)
def test_an_address_that_cannot_be_right_is_refused_before_asking(log, monkeypatch, url, says):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with LLM(log) as llm, pytest.raises(UserError) as refused:
        llm.check([question()])
    assert says in str(refused.value) and "fix:" in str(refused.value) and "SECRET123" not in str(refused.value)
    assert not log.exists()


@pytest.mark.parametrize(
    "key", ["“sk-abc”", "'sk-abc'", '"sk-abc"', "sk- abc", "sk-abc，", "sk-a\nbc", "Bearer sk-abc"]
)
def test_a_key_that_cannot_be_right_is_refused_and_not_shown(log, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.deepseek.com/v1")
    with LLM(log) as llm, pytest.raises(UserError, match="OPENAI_API_KEY: character") as refused:
        llm.check([question()])
    assert "abc" not in str(refused.value)


def test_addresses_of_all_sorts_pass(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    for url in ("https://open.bigmodel.cn/api/paas/v4/", "https://x.com/v1beta/openai", "http://[::1]:8000/v1"):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert read_endpoint() == (url.rstrip("/"), KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert read_endpoint()[0] == "https://api.openai.com/v1"


def encodings(key: str) -> list[str]:
    raw = f"Authorization: Bearer {key}".encode()
    shifted = [base64.b64encode(raw[start:]).decode() for start in range(4)]
    forms = [key, quote(key, safe=""), key.encode().hex().upper(), hashlib.sha256(key.encode()).hexdigest()]
    return forms + [base64.b64encode(key.encode()).decode(), base64.urlsafe_b64encode(raw).decode(), *shifted]


@pytest.mark.parametrize("key", [KEY, "a/b+c=d~e?f&g%h01234"])
def test_a_server_that_repeats_the_key_does_not_get_it_written(endpoint, log, monkeypatch, capfd, key):
    forms = encodings(key)
    cores = [form.strip("=")[4:-4] for form in forms]  # what a part of the key would leave behind
    replies = {
        "1": {"content": "好 " + " | ".join(forms)},
        "2": error(400, message=" | ".join(forms)),
        "3": {"content": "半句", "finish_reason": key},
        "4": error(400, message=f"Incorrect key: {key[:8]}********{key[-4:]}, proxy http://me:hidden@host/"),
    }
    endpoint(reply=lambda body: replies[body["messages"][-1]["content"]])
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with LLM(log, max_tries=1, max_failed=3) as llm:
        answers = llm.ask([question(name) for name in replies])
    seen = log.read_text(encoding="utf-8") + json.dumps(llm.figures()) + "".join(capfd.readouterr()) + str(answers)
    assert "好" in seen and "hidden" not in seen and key[-4:] not in seen
    tail = base64.b64encode(key.encode()).decode()[8:-8]
    assert not [core for core in (*cores, tail) if key.lower() in core.lower() and core in seen] and tail not in seen
    for form in (key, key.encode().hex(), hashlib.sha256(key.encode()).hexdigest()):
        assert form not in seen.lower()


def test_ordinary_words_are_left_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for text in ("SK-II 神仙水，sk-ii 也好。", "Bearer of good news", "***", "none", "a@b.c"):
        assert redact(text) == text


def test_a_key_in_the_extra_fields_is_refused(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for text in (json.dumps({"x": KEY}), '{"api_key": "secret-7"}', '{"headers": {"Authorization": "secret-7"}}'):
        with pytest.raises(UserError, match="holds a key") as refused:
            read_extra(text)
        assert KEY not in str(refused.value) and "secret-7" not in str(refused.value)


# --- proxies


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://x"])
def test_a_server_on_this_machine_is_never_asked_through_a_proxy(endpoint, log, monkeypatch, proxy):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    endpoint()
    with LLM(log, max_tries=1) as llm:
        assert llm.ask([question()])[0].text == "答：你好"


@pytest.mark.parametrize(
    ("proxy", "says"), [("socks5://127.0.0.1:9", "socksio"), ("nonsense://u:hidden@x", "HTTPS_PROXY")]
)
def test_a_proxy_that_cannot_be_used_is_one_line(log, monkeypatch, proxy, says):
    if says == "socksio" and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is installed")
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.example.com/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=says) as refused:
        open_client(1.0)
    assert "\n" not in str(refused.value) and "hidden" not in str(refused.value)


# --- numbers


@pytest.mark.parametrize(
    "setting",
    [
        {"max_cost": math.nan, "price_in": 1.0},
        {"max_cost": -1.0, "price_in": 1.0},
        {"price_in": -1.0},
        {"price_out": math.nan},
        {"time_limit": math.nan},
        {"time_limit": math.inf},
        {"time_limit": 0.0},
        {"max_total_tokens": -1},
        {"max_failed": -1},
        {"concurrency": 0},
        {"max_tries": 0},
        {"price_in": math.inf},
    ],
)
def test_a_setting_that_is_no_limit_is_refused(log, setting):
    with pytest.raises(UserError, match=f"--{next(iter(setting)).replace('_', '-')} "):
        LLM(log, **setting)


@pytest.mark.parametrize(
    "text",
    [
        '{"x": NaN}',
        '{"x": Infinity}',
        '{"x": 1e999}',
        '{"x": "\\ud800"}',
        "[" * 100_000,
        '{"stream": true}',
        '{"n": 3}',
    ],
)
def test_extra_fields_that_cannot_be_sent_are_refused(text):
    with pytest.raises(UserError, match="--extra-body"):
        read_extra(text)


def test_the_budget_knows_a_limit_that_the_extra_fields_set(endpoint, log):
    server = endpoint(reply=lambda body: "好" * 10)
    asked = questions(5, extra={"max_tokens": None, "max_completion_tokens": 5000})
    with LLM(log, max_total_tokens=1000) as llm, pytest.raises(UserError, match="does not hold another question"):
        llm.ask(asked)
    assert server.requests == []


# --- budget


def test_the_estimate_needs_no_network_and_learns_from_the_log(endpoint, log):
    endpoint(reply=lambda body: "好" * 20)
    with LLM(log, price_in=10, price_out=20) as llm:
        before = llm.estimate(questions(40))
        assert (before.requests, before.answered, before.most_tokens_out, before.tokens_out) == (40, 0, 2000, 2000)
        assert not log.exists()
        llm.ask(questions(30))
        after = llm.estimate(questions(40))
    assert (after.answered, after.tokens_out) == (30, 200)  # ten left, twenty tokens each as the others
    assert abs(after.tokens_in - 40) <= 4  # ten questions of four characters, which this server counts as tokens
    assert after.cost == pytest.approx((after.tokens_in * 10 + 200 * 20) / 1e6, rel=0.01)  # tokens are shown rounded


@pytest.mark.parametrize(
    ("budget", "spent"),
    [
        ({"max_total_tokens": 600}, lambda f: f["tokens_in"] + f["tokens_out"] <= 600),
        ({"price_in": 1e3, "price_out": 1e4, "max_cost": 2.0}, lambda f: f["cost"] <= 2.0),
    ],
)
def test_the_budget_is_never_passed_and_a_larger_one_goes_on(endpoint, log, budget, spent):
    server = endpoint(latency=0.01)
    with LLM(log, concurrency=8, **budget) as llm, pytest.raises(UserError, match="does not hold another question"):
        llm.ask(questions(100))
    figures = llm.figures()
    assert spent(figures) and 10 <= figures["requests"] < 100
    with LLM(log, concurrency=8) as llm:
        llm.ask(questions(100))
    assert max(server.answered().values()) == 1 and len(server.requests) == 100


def test_what_an_earlier_run_spent_counts(endpoint, log):
    server = endpoint()
    with LLM(log) as llm:
        llm.ask(questions(10))  # about 100 tokens
    with LLM(log, max_total_tokens=120) as llm, pytest.raises(UserError, match="10 of 20"):
        llm.ask(questions(20))
    assert len(server.requests) == 10


def test_tokens_are_estimated_where_the_server_does_not_count(endpoint, log):
    endpoint(usage=False)
    with LLM(log) as llm:
        answer = llm.ask([question("一二三四五六")])[0]
    assert answer.prompt_tokens == 8 and answer.completion_tokens == 5  # 6 / 1.5 + 4; 8 / 1.5


# --- the log


def test_a_torn_line_costs_one_answer(endpoint, log):
    server = endpoint()
    with LLM(log) as llm:
        llm.ask(questions(4))
    log.write_bytes(log.read_bytes()[:-20])
    with LLM(log) as llm:
        assert len(llm.ask(questions(4))) == 4
    assert len(server.requests) == 5 and len(read_jsonl(log)) == 4


OTHERS = {
    "a user's rows, the last without its end": '{"prompt": "a", "n": 1}\n{"prompt": "b"}',
    "one row without its end": '{"id": "a", "text": "b"}',
    "rows that look alike": '{"id": "0123", "text": "b"}\n',
    "generations": '{"id": "a#0", "prompt_id": "a", "completion": "x"}\n' * 3,
    "text": "第一章\n第二章",
    "a request without a model": '{"id": "a", "request": {}, "text": "b", "finish_reason": "stop", "prompt_tokens": 1, '
    '"completion_tokens": 1}\n',
    "brackets": "[" * 100_000,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_no_request_log_is_refused_untouched(log, name):
    log.parent.mkdir()
    log.write_text(OTHERS[name], encoding="utf-8")
    with pytest.raises(UserError, match="not a row of a request log"), LLM(log):
        pass
    assert log.read_text(encoding="utf-8") == OTHERS[name]


@pytest.mark.parametrize("kept", [0, 1, 5, 9, 20, 40, 70])
def test_a_first_row_that_was_cut_anywhere_is_ours(endpoint, log, kept):
    endpoint()
    with LLM(log) as llm:
        llm.ask([question()])
    log.write_bytes(log.read_bytes()[:kept])
    with LLM(log) as llm:
        assert llm.ask([question()])[0].text == "答：你好"


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"raw": "[" * 100_000}, "garbage: broken JSON"),
        ({"content": "好" * 300_000}, "an answer of more than 200000 characters"),
    ],
)
def test_what_is_too_large_to_be_read_again_is_not_stored(endpoint, log, reply, reason):
    endpoint(reply=lambda body: reply)
    with LLM(log, max_tries=1) as llm, pytest.raises(UserError, match=reason):
        llm.ask([question()])
    assert read_jsonl(log) == []


def test_a_count_that_is_none_is_estimated(endpoint, log):
    for count in (10**120, -3, True, 1.5, "7", None):
        usage = {"prompt_tokens": count, "completion_tokens": count}
        endpoint(reply=lambda body, usage=usage: {"content": "好好好", "usage": usage})
        with LLM(log) as llm:
            answer = llm.ask([question(str(count))])[0]
        assert 0 < answer.prompt_tokens < 50 and answer.completion_tokens == 2
    with LLM(log) as llm:  # the log can be read again
        assert len(llm.answers) == 6


def test_two_processes_cannot_write_one_log(endpoint, log):
    endpoint()
    with LLM(log) as first:
        first.ask([question()])
        with pytest.raises(UserError, match="another process writes"), LLM(log):
            pass
