"""An OpenAI-compatible endpoint is transformers' own command: docs/OPERATIONS.md, "Serving"."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from openai import OpenAI, OpenAIError

from conftest import ROOT


def test_transformers_serve_answers_as_stage_60(run_stage, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(ROOT / "data" / "tiny_qwen3")
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        model,
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    log = open(tmp_path / "log", "wb")  # noqa: SIM115 (the server writes into it)
    server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    asked = {"messages": [{"role": "user", "content": "今天天气"}]}
    asked |= {"model": model, "max_tokens": 24, "temperature": 0}
    try:
        for _ in range(240):
            try:
                text = client.chat.completions.create(**asked).choices[0].message.content
                break
            except OpenAIError:
                assert server.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(30)
    words = ("--prompt", asked["messages"][0]["content"], "--temperature", 0, "--max-new-tokens", 24)
    assert text and run_stage("60_generate.py", *words).stdout.startswith(text + "\n[")
