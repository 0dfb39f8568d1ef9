"""A vLLM server that a flag names is asked before anything of an earlier run is touched. No vLLM is needed."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from common.settings import UserError
from common.vllm_engine import ask_directly, require_server, served_model


class Answers(BaseHTTPRequestHandler):
    said = {"/health": {}, "/v1/models": {"data": [{"id": "m"}]}}

    def do_GET(self):
        self.send_response(200 if self.path in self.said else 404)
        self.end_headers()
        self.wfile.write(json.dumps(self.said.get(self.path)).encode())

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Answers, "said", dict(Answers.said))
    with HTTPServer(("127.0.0.1", 0), Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_server_of_this_machine_is_never_asked_through_a_proxy(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("no_proxy", "")
    require_server(server, "--server")
    assert served_model(server) == "m"
    ask_directly("example.net")
    assert os.environ["no_proxy"] == "example.org,127.0.0.1"


@pytest.mark.parametrize(
    "url, said",
    [
        ("http://127.0.0.1:9", "--server http://127.0.0.1:9: no vLLM server answers"),
        ("http://127.0.0.1:9/a b", "--server http://127.0.0.1:9/a b: no vLLM server answers"),
        ("http://127.0.0.1:x", "no http address; fix: e.g. http://127.0.0.1:8000"),
        ("127.0.0.1:8000", "no http address"),
        ("ftp://127.0.0.1", "no http address"),
        ("", "no http address"),
        ("http://me:secret@127.0.0.1:9", "--server: a user or a password in the address"),
    ],
)
def test_an_address_without_a_server_is_one_line(url, said):
    with pytest.raises(UserError) as error:
        require_server(url, "--server")
    assert said in str(error.value) and "; fix: " in str(error.value) and "secret" not in str(error.value)


def test_a_server_of_something_else_is_one_line(server):
    Answers.said.pop("/health")
    with pytest.raises(UserError, match="no vLLM server answers .*404"):
        require_server(server, "--server")
    for answer in ({}, [], {"data": []}, {"data": None}, None):
        Answers.said["/v1/models"] = answer
        with pytest.raises(UserError, match="names no model; fix: "):
            served_model(server)
