"""Stage 62 as people and monitors meet it: a real server process on loopback, real requests, a real SIGTERM."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest

from conftest import ROOT, SCRIPTS
from test_chain import stage

LABELS = ["售前", "售后", "诚实", "有帮助", "无伤害"]
TEXTS = [f"用户问题：第{i}件能退吗？\n回答：{'能退，运费我们出。' * (1 + i % 9)}" for i in range(40)]
TOKEN = "a-token-of-the-tests-5f1c"
SECRET = "绝密内容7391"

sys.path.insert(0, str(ROOT / "benchmarks"))


class Server:
    """A running stage 62."""

    def __init__(self, log: Path, *words, token: str = "", **variables: str):
        self.log = log
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "SERVE_TOKEN": token, "OMP_NUM_THREADS": "1", **variables}
        words = words if "--dtype" in words else (*words, "--dtype", "float32")  # its figures are compared
        command = [sys.executable, str(SCRIPTS / "62_serve.py"), "--port", "0", *map(str, words)]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        self.url = ""
        while not self.url:
            found = re.search(r"listening on (http://\S+)", self.output)
            assert found or self.process.poll() is None, self.output
            self.url = found[1] if found else ""
            time.sleep(0.05)
        self.port = int(self.url.rpartition(":")[2])

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def ask(self, method: str, path: str, body=None, **headers) -> tuple[int, dict | str]:
        """(status, answer). A body that is not bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **{name.replace("_", "-"): v for name, v in headers.items()}}
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if text.startswith("{") else text

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return self.output


def save_model(folder: Path, count: int) -> Path:
    """The embedded base with a head of its own: what it says is nonsense, but it says it the same every time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(count)
    names = (
        {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}} if count == 5 else {}
    )
    base = ROOT / "data/tiny_qwen3"
    model = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, **(names or {"num_labels": 1})
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"styles": save_model(folder / "classifier", 5), "reward": save_model(folder / "reward", 1)}


@pytest.fixture(scope="session")
def server(models, tmp_path_factory):
    words = ["--model", models["styles"], "--reward-model", models["reward"]]
    running = Server(tmp_path_factory.mktemp("logs") / "open.log", *words)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def guarded(models, tmp_path_factory):
    """A token is needed, no reward model is loaded, and limits are low."""
    words = ["--model", models["styles"], "--max-body-bytes", 2000, "--max-text-chars", 100, "--max-batch-texts", 3]
    running = Server(tmp_path_factory.mktemp("logs") / "guarded.log", *words, token=TOKEN)
    yield running
    running.stop()


def bearer(token: str = TOKEN) -> dict:
    return {"authorization": f"Bearer {token}"}


# --- answers


def test_http_and_command_line_agree(server, models, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"input": text}) + "\n" for text in TEXTS), encoding="utf-8")
    output = tmp_path / "out.jsonl"
    words = ["--model", models["styles"], "--dtype", "float32"]
    stage("61_classify_style.py", *words, "--input-file", file, "--output-file", output)
    expected = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    status, batch = server.ask("POST", "/predict_batch", {"texts": TEXTS})
    assert status == 200 and len(batch["results"]) == len(TEXTS)
    for text, row, result in zip(TEXTS, expected, batch["results"], strict=True):
        one = server.ask("POST", "/predict", {"text": text})[1] if text in TEXTS[:5] else result
        for answer in (result, one):
            assert answer["predicted_label"] == row["predicted_label"]
            assert list(answer["probabilities"].values()) == pytest.approx(
                list(row["probabilities"].values()), abs=1e-4
            )


def test_the_text_may_stand_in_the_query(server):
    assert server.ask("POST", f"/predict?text={quote(TEXTS[0])}", b"") == server.ask(
        "POST", "/predict", {"text": TEXTS[0]}
    )


def test_rewards_are_those_of_the_model(server, models):
    from common.training.classifiers import load_classifier, logits_of, render_conversation

    model, tokenizer = load_classifier(str(models["reward"]), "float32", 1)
    prompt = [{"role": "user", "content": "能退吗？"}]
    expected = logits_of(model, tokenizer, [render_conversation(tokenizer, prompt, "能退。")]).item()
    for asked in ("能退吗？", prompt):
        status, answer = server.ask("POST", "/reward", {"prompt": asked, "completion": "能退。"})
        assert status == 200 and answer["reward"] == pytest.approx(expected, abs=1e-4)


def test_health_metrics_and_openapi(server):
    assert server.ask("GET", "/health") == (200, {"status": "ok", "labels": LABELS, "reward_model": True})
    server.ask("POST", "/predict", {"text": "你好"})
    status, metrics = server.ask("GET", "/metrics")
    assert status == 200 and 'requests_total{path="/predict",status="200"}' in metrics
    schema = server.ask("GET", "/openapi.json")[1]
    assert set(schema["paths"]) == {"/predict", "/predict_batch", "/reward", "/health", "/metrics"}
    assert schema["components"]["schemas"]["PredictRequest"]["properties"]["text"]["examples"]
    assert "swagger" in server.ask("GET", "/docs")[1]


def test_it_listens_on_loopback_only(server):
    assert server.url.startswith("http://127.0.0.1:")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks which address this machine would use
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    with pytest.raises(OSError):
        socket.create_connection((own, server.port), timeout=5)


# --- micro-batching


def test_requests_at_once_share_a_batch(server):
    def batches() -> tuple[float, float]:
        text = server.ask("GET", "/metrics")[1]
        return tuple(
            float(re.search(rf'batch_texts_{part}{{model="styles"}} (\S+)', text)[1]) for part in ("count", "sum")
        )

    from serve_load import run_load

    before = batches()
    bodies = [json.dumps({"text": text}).encode() for text in TEXTS]
    load = asyncio.run(run_load(server.port, bodies, clients=24, seconds=2))
    count, texts = (now - then for now, then in zip(batches(), before, strict=True))
    assert texts == load.sent == len(load.seconds) and not load.failed + load.broken
    assert texts / count > 4, "24 clients that wait fill the next batch together"


def test_a_failing_batch_fails_its_own_requests_only():
    from common.serving.micro_batching import MicroBatcher, TooBusy

    def score(texts: list[str]) -> list[str]:
        if "bad" in texts:
            raise RuntimeError("no")
        return [text.upper() for text in texts]

    async def run() -> None:
        sizes = []
        batcher = MicroBatcher(score, most=4, wait=0.001, limit=6, observe=sizes.append)
        assert await batcher.submit(["a", "b"]) == ["A", "B"]
        with pytest.raises(RuntimeError):
            await batcher.submit(["bad"])
        assert await batcher.submit(["c"]) == ["C"]
        results = await asyncio.gather(*(batcher.submit([letter]) for letter in "defghi"))
        assert results == [["D"], ["E"], ["F"], ["G"], ["H"], ["I"]] and max(sizes) == 4
        with pytest.raises(TooBusy):
            await batcher.submit(list("abcdefg"))
        await batcher.close()

    asyncio.run(run())


# --- bad input

GOOD = {"text": "你好"}
BAD_REQUESTS = {
    "no text": ("POST", "/predict", {}, 422),
    "nothing at all": ("POST", "/predict", None, 422),
    "empty text": ("POST", "/predict", {"text": ""}, 422),
    "only spaces": ("POST", "/predict", {"text": " \n\t"}, 422),
    "number": ("POST", "/predict", {"text": 3}, 422),
    "unknown field": ("POST", "/predict", {**GOOD, SECRET: SECRET}, 422),
    "half a surrogate pair": ("POST", "/predict", b'{"text": "\\ud800"}', 422),
    "half a surrogate pair as key": ("POST", "/predict", b'{"\\ud800": "x", "text": 1}', 422),
    "not JSON": ("POST", "/predict", f"{{{SECRET}".encode(), 400),
    "not UTF-8": ("POST", "/predict", b'{"text": "\xff\xfe"}', 400),
    "GBK": ("POST", "/predict", '{"text": "你好，能退吗"}'.encode("gbk"), 400),
    "UTF-16": ("POST", "/predict", '{"text": "你好"}'.encode("utf-16"), 400),
    "UTF-16 without its mark": ("POST", "/predict", '{"text": "a"}'.encode("utf-16-le"), 400),
    "half a surrogate pair in bytes": ("POST", "/predict", b'{"text": "\xed\xa0\x80"}', 400),
    "a query in GBK": ("POST", f"/predict?text={quote('能退吗', encoding='gbk')}", b"", 400),
    "GBK for the reward": ("POST", "/reward", '{"prompt": "能退吗", "completion": "能"}'.encode("gbk"), 400),
    "GBK in a list": ("POST", "/predict_batch", '{"texts": ["能退吗"]}'.encode("gbk"), 400),
    "brackets": ("POST", "/predict", b"[" * 100_000, 400),
    "a number of 10,000 digits": ("POST", "/predict", b'{"text": ' + b"9" * 10_000 + b"}", 400),
    "1 MB": ("POST", "/predict", {"text": "长" * 333_333}, 413),
    "long text": ("POST", "/predict", {"text": "a" * 8193}, 422),
    "long query": ("POST", f"/predict?text={'a' * 8193}", None, 422),
    "empty list": ("POST", "/predict_batch", {"texts": []}, 422),
    "65 texts": ("POST", "/predict_batch", {"texts": ["a"] * 65}, 422),
    "one empty of two": ("POST", "/predict_batch", {"texts": ["a", ""]}, 422),
    "string for a list": ("POST", "/predict_batch", {"texts": "a"}, 422),
    "unknown role": ("POST", "/reward", {"prompt": [{"role": SECRET, "content": "a"}], "completion": "b"}, 422),
    "assistant last": ("POST", "/reward", {"prompt": [{"role": "assistant", "content": "a"}], "completion": "b"}, 422),
    "no completion": ("POST", "/reward", {"prompt": "a"}, 422),
    "no such path": ("GET", f"/{quote(SECRET)}", None, 404),
    "wrong method": ("GET", "/predict", None, 405),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_get_a_clear_answer_that_repeats_nothing(name, server):
    method, path, body, expected = BAD_REQUESTS[name]
    status, answer = server.ask(method, path, body)
    assert status == expected and isinstance(answer["detail"], str) and answer["detail"]
    assert SECRET not in json.dumps(answer, ensure_ascii=False)
    assert server.ask("POST", "/predict", GOOD)[0] == 200, "the server goes on"


def test_limits_are_settings(guarded):
    for path, body, expected in (
        ("/predict", {"text": "a" * 101}, 422),
        ("/predict_batch", {"texts": ["a"] * 4}, 422),
        ("/predict_batch", {"texts": ["a" * 90] * 3}, 200),
        ("/predict", {"text": "a" * 2000}, 413),
    ):
        assert guarded.ask("POST", path, body, **bearer())[0] == expected


def test_a_body_without_its_length_is_cut_off_at_the_limit(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = (
            b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        connection.sendall(head)
        try:
            for _ in range(400):
                connection.sendall(b"1000\r\n" + b"a" * 4096 + b"\r\n")
        except OSError:
            pass  # closed while we were still sending: as it should
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_no_reward_model_is_said_plainly(guarded):
    status, answer = guarded.ask("POST", "/reward", {"prompt": "a", "completion": "b"}, **bearer())
    assert status == 404 and "--reward-model" in answer["detail"]


# --- tokens and logs


def test_only_the_right_token_opens(guarded):
    assert guarded.ask("POST", "/predict", GOOD, **bearer())[0] == 200
    assert guarded.ask("POST", "/predict", GOOD, authorization=f"bearer {TOKEN}")[0] == 200
    wrong = [{}, bearer("wrong"), bearer(TOKEN[:-1]), bearer(TOKEN + "x"), bearer(""), {"authorization": TOKEN}]
    wrong += [{"authorization": f"Basic {TOKEN}"}, {"authorization": "Bearer \xe4\xff"}]
    for headers in wrong:
        for method, path in (
            ("POST", "/predict"),
            ("POST", "/predict_batch"),
            ("POST", "/reward"),
            ("GET", "/metrics"),
        ):
            status, answer = guarded.ask(method, path, GOOD if method == "POST" else None, **headers)
            assert status == 401 and answer == {"detail": "missing or wrong token"}, (path, headers)
    assert guarded.ask("GET", "/health")[0] == 200, "monitors ask without one"


def test_tokens_are_compared_in_constant_time():
    source = (SCRIPTS / "common/serving/http_limits.py").read_text(encoding="utf-8")
    assert "hmac.compare_digest(given.strip(), self.token)" in source
    assert not re.search(r"token\s*[!=]=|[!=]=\s*(self\.)?token", source)


def test_no_text_and_no_token_reaches_the_log(guarded):
    guarded.ask("POST", "/predict", {"text": SECRET}, **bearer())
    guarded.ask("POST", f"/predict?text={quote(SECRET)}", None, **bearer())
    guarded.ask("POST", f"/{quote(SECRET)}?token={TOKEN}", {"text": SECRET}, **bearer())
    guarded.ask("POST", "/predict", {"text": SECRET, SECRET: 1}, **bearer(SECRET.encode().decode("latin-1")))
    guarded.ask("POST", "/predict", f"{{{SECRET}".encode(), **bearer())
    output = guarded.output
    assert output.count("POST /predict") >= 4 and "POST other 404" in output
    for private in (SECRET, quote(SECRET), TOKEN, "text="):
        assert private not in output, private


def test_refused_requests_are_logged_and_counted_under_their_path(guarded):
    guarded.ask("POST", "/predict", GOOD)
    guarded.ask("POST", "/reward", {"prompt": "a" * 2000, "completion": "b"}, **bearer())
    guarded.ask("POST", f"/{quote(SECRET)}", GOOD)
    output, metrics = guarded.output, guarded.ask("GET", "/metrics", **bearer())[1]
    for path, status in (("/predict", 401), ("/reward", 413), ("other", 401)):
        assert f"POST {path} {status} " in output
        assert f'requests_total{{path="{path}",status="{status}"}}' in metrics


# --- fuzzing


def fuzz(server: Server, folder: Path, *words) -> subprocess.CompletedProcess:
    """schemathesis on the server's own OpenAPI document."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", *words]
    command += ["--max-examples", "15", "--seed", "1", "--no-color"]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=600
    )


def test_schemathesis_finds_no_server_error(server, tmp_path):
    # every check but one: that /predict needs a text in either of two places is nothing that OpenAPI can say
    done = fuzz(server, tmp_path, "--exclude-checks", "positive_data_acceptance")
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"[1-9]\d* generated", done.stdout) and " 500 " not in server.output


# --- slow and many clients


def head(length: int) -> bytes:
    lines = ["POST /predict HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def is_closed(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(1000):  # the body of an answer may come after its head
            pass
        return True
    except TimeoutError:
        return False
    except OSError:
        return True


def test_half_open_and_slow_connections_shut_nobody_out(models, tmp_path):
    limits = ("--header-seconds", 3, "--body-seconds", 2, "--max-connections", 20)
    running = Server(tmp_path / "slow.log", "--model", models["styles"], *limits)
    address = ("127.0.0.1", running.port)
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(60)]
        assert running.ask("POST", "/predict", GOOD)[0] == 200, "at the cap the oldest idle one gives way"
        half = stack.enter_context(socket.create_connection(address, timeout=30))
        half.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\n")
        slow = stack.enter_context(socket.create_connection(address, timeout=30))
        slow.sendall(head(13) + b'{"text":')
        assert slow.recv(1000).startswith(b"HTTP/1.1 408") and is_closed(slow, 5)
        for _ in range(3):  # a byte now and then does not help
            time.sleep(0.5)
            try:
                half.sendall(b"x")
            except OSError:
                break
        assert is_closed(half, 5) and all(is_closed(connection, 5) for connection in idle)
        # one that answers in time stays open between requests, for longer than clients keep theirs
        kept = stack.enter_context(socket.create_connection(address, timeout=30))
        for _ in range(2):
            kept.sendall(head(13) + b'{"text": "a"}')
            assert kept.recv(1000).startswith(b"HTTP/1.1 200")
            assert not is_closed(kept, 6)
    assert "POST /predict 408" in running.stop()


@pytest.mark.parametrize("name", ["styles", "reward"])
def test_a_head_of_nan_is_refused_at_the_start(models, tmp_path, name):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(models[name])
    with torch.no_grad():
        model.score.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(models[name]).save_pretrained(tmp_path / "broken")
    words = (
        ["--model", tmp_path / "broken"]
        if name == "styles"
        else ["--model", models["styles"], "--reward-model", tmp_path / "broken"]
    )
    done = stage("62_serve.py", *words, "--port", 0, check=False)
    assert done.returncode == 2 and "NaN" in done.stderr and "fix:" in done.stderr and "Traceback" not in done.stderr


def test_an_answer_of_nan_is_500_and_the_others_are_answered(models, tmp_path):
    """A finite weight so large that the sum overflows for some texts and not for others."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from common.training.classifiers import logits_of

    tokenizer = AutoTokenizer.from_pretrained(models["styles"])
    model = AutoModelForSequenceClassification.from_pretrained(models["styles"])
    model.config.pad_token_id, texts = tokenizer.pad_token_id, ["你好", *TEXTS[:6]]
    for place in range(model.config.hidden_size):
        with torch.no_grad():
            model.score.weight[0] = 0
            model.score.weight[0, place] = 3e38
        finite = logits_of(model.eval(), tokenizer, texts, finite=False).softmax(-1).isfinite().all(-1).tolist()
        if finite[0] and not all(finite):
            break
    bad = texts[finite.index(False)]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    running = Server(tmp_path / "nan.log", "--model", tmp_path / "model", "--dtype", "float32")
    status, answer = running.ask("POST", "/predict", {"text": bad})
    assert status == 500 and "NaN" in answer["detail"]
    assert running.ask("POST", "/predict_batch", {"texts": ["你好", bad]})[0] == 500
    assert running.ask("POST", "/predict", {"text": "你好"})[0] == 200
    running.stop()


# --- the end


def test_sigterm_under_load_answers_what_was_accepted(models, tmp_path):
    from serve_load import run_load

    running = Server(tmp_path / "load.log", "--model", models["styles"])
    bodies = [json.dumps({"text": text}).encode() for text in TEXTS]
    load = asyncio.run(run_load(running.port, bodies, 50, 2, lambda: running.process.send_signal(signal.SIGTERM)))
    running.process.wait(60)
    accepted, answered = map(int, re.search(r"accepted (\d+) requests, answered (\d+)", running.output).groups())
    assert accepted == answered == len(load.seconds) >= 50 and not load.failed
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", running.port), timeout=5)


def test_only_whole_answers_to_clients_that_stayed_count_as_answered(models, tmp_path):
    words = ["--model", models["styles"], "--batch-wait-ms", 2000, "--grace-seconds", 0]
    running = Server(tmp_path / "gone.log", *words)
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n"
    for body in (b'{"text":', b'{"text": "a"}'):  # gone before its request was whole, and before the answer
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
            connection.sendall(head + body)
            time.sleep(0.2)
    assert running.ask("POST", "/predict", GOOD)[0] == 200
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:  # cut off by the grace time
        connection.sendall(head + body)
        time.sleep(0.5)
        output = running.stop()
    assert re.search(r"accepted [34] requests, answered 1$", output, re.MULTILINE), output
    assert output.count("POST /predict 499 ") == 2


def test_it_says_listening_once_it_takes_connections(models, tmp_path):
    slow = """
import asyncio
from uvicorn.lifespan.on import LifespanOn

startup = LifespanOn.startup

async def slow(self):
    await startup(self)
    await asyncio.sleep(2)

LifespanOn.startup = slow
"""
    (tmp_path / "sitecustomize.py").write_text(slow, encoding="utf-8")
    running = Server(tmp_path / "slow.log", "--model", models["styles"], PYTHONPATH=str(tmp_path))
    socket.create_connection(("127.0.0.1", running.port), timeout=5).close()
    running.stop()


def test_a_taken_port_is_named(server, models):
    done = stage("62_serve.py", "--model", models["styles"], "--port", server.port, check=False)
    assert done.returncode == 2 and f"127.0.0.1:{server.port}" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_model_is_named(tmp_path):
    done = stage("62_serve.py", "--model", tmp_path / "none", "--port", 0, check=False)
    assert done.returncode == 2 and "no such model folder" in done.stderr


def test_models_that_cannot_be_served_end_with_a_message(models, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    styles = models["styles"]
    for words, message in (
        (["--model", ROOT / "data/tiny_qwen3"], "has no trained head"),
        (["--model", adapter], "is an adapter without its base"),
        (["--model", styles, "--reward-model", styles], "has 5 labels where 1 is needed"),
    ):
        done = stage("62_serve.py", *words, "--port", 0, check=False)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
        assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
