"""Stage 63: models side by side on a page of this machine."""

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from conftest import stage_command

FIELDS = {"form": "五言绝句", "themes": ["山水", "送别"]}


class Page:
    """A running stage 63."""

    def __init__(self, log, *words):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with open(log, "wb") as file:
            command = stage_command("63_chat.py", "--port", 0, *words)
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        self.url = None
        while not self.url:
            found = re.search(r"open (http://127\.0\.0\.1:\d+) in", log.read_text(encoding="utf-8"))
            assert found or self.process.poll() is None, log.read_text(encoding="utf-8")
            self.url = found and found[1]
            time.sleep(0.1)

    def ask(self, path, body=None, **headers):
        """(status, text)"""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", **headers}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def answer(self, **question) -> list[dict]:
        status, text = self.ask("/answer", {"model": 0, "turns": [], **question})
        assert status == 200, text
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    words = ("--models", "data/tiny_qwen3", "data/tiny_qwen3", "--max-new-tokens", 24)
    running = Page(tmp_path_factory.mktemp("page") / "log", *words)
    yield running
    running.process.terminate()
    running.process.wait(30)


def test_an_answer_streams_and_is_judged_by_the_rules_of_the_job(page):
    *parts, last = page.answer(fields=FIELDS)
    assert len(parts) > 3 and all(last["text"].startswith(part["text"][:1]) for part in parts)
    assert last["prompt"] == "写一首[五言绝句] 要求4句 主题为: 山水、送别" and last["reason"] in ("stop", "length")
    assert "".join(part["text"] for part in last["parts"]) == last["text"] and any("form" in s for s in last["scores"])
    assert page.answer(fields=FIELDS)[-1]["text"] == page.answer(fields=FIELDS, model=1)[-1]["text"] == last["text"]
    assert page.answer(fields=FIELDS, seed=7)[-1]["text"] != last["text"]


def test_greedy_text_is_that_of_stage_60(page, run_stage):
    last = page.answer(turns=[{"role": "user", "content": "今天天气"}], temperature=0, max_new_tokens=16)[-1]
    words = ("--prompt", "今天天气", "--temperature", 0, "--max-new-tokens", 16)
    assert run_stage("60_generate.py", *words).stdout.startswith(last["text"] + "\n[")


def test_a_conversation_goes_on_and_a_free_message_needs_no_fields(page):
    turns = [{"role": "user", "content": "写诗"}, {"role": "assistant", "content": "春眠不觉晓"}]
    last = page.answer(turns=[*turns, {"role": "user", "content": "再写"}])[-1]
    assert last["prompt"] == "再写" and "parts" in last


@pytest.mark.parametrize(
    "question, fault",
    [
        ({}, "last turn has to be the user's"),
        ({"turns": [{"role": "assistant", "content": "a"}]}, "last turn has to be the user's"),
        ({"turns": [{"role": "tool", "content": "a"}]}, "role"),
        ({"fields": {"from": "五言绝句"}}, "no field 'from'; fix: one of form, themes"),
        ({"fields": {"form": "十四行"}}, "the fields make no message"),
        ({"fields": FIELDS, "temperature": -1}, "temperature"),
        ({"fields": FIELDS, "model": 2}, "model"),
        ({"fields": FIELDS, "max_new_tokens": 4000}, "more than the 2048 it reads"),
        ({"turns": [{"role": "user", "content": "好" * 20_001}]}, "content"),
    ],
)
def test_what_cannot_be_answered_is_refused(page, question, fault):
    status, text = page.ask("/answer", {"model": 0, "turns": [], **question})
    assert status == 422 and fault in text


def test_only_this_machine_by_its_own_name_is_served(page):
    assert page.ask("/", host="evil.example")[0] == 400 and page.ask("/about", host="evil.example")[0] == 400
    status, text = page.ask("/")
    assert status == 200 and "NONCE" not in text and "innerHTML" not in text


@pytest.mark.parametrize(
    "words, fault",
    [
        (("--models", *["data/tiny_qwen3"] * 5), "--models: 5 named; fix: 1 to 4"),
        (("--models", "nowhere/at/all"), "no such model folder"),
        (("--models", "data/poems"), "data/poems"),
        (("--task", "nothing"), "unknown task"),
    ],
)
def test_wrong_settings_end_before_a_model_is_loaded(run_stage, words, fault):
    done = run_stage("63_chat.py", *words, "--port", 0, check=False)
    assert done.returncode == 2 and fault in done.stderr and "loaded" not in done.stdout
