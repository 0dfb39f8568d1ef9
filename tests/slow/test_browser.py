"""The pages in a real browser: they show, load nothing, and run nothing that a model or a data file wrote."""

import json
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

PAYLOAD = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>白日依山尽"


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no Chromium on this machine")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    base = [program, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]

    def run(*words: str) -> str:
        return subprocess.run([*base, *words], capture_output=True, text=True, encoding="utf-8", timeout=120).stdout

    return run


class Listener(ThreadingHTTPServer):
    """Counts what a page asks for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), SimpleHTTPRequestHandler)
        self.asked = []

    def finish_request(self, request, client_address):
        self.asked.append(client_address)


@pytest.mark.all
def test_mask_preview_shows_texts_runs_none_and_loads_nothing(run_stage, browser, tmp_path):
    server = Listener()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    load = f"<img src='{address}/a.png'><link rel=stylesheet href={address}/a.css><script src={address}/a.js></script>"
    turns = {
        "prompt": [{"role": "user", "content": f"\"'><h1>{load}"}],
        "completion": [{"role": "assistant", "content": f"{PAYLOAD}<style>@import '{address}/b.css'</style>"}],
    }
    rows = [turns | {"meta": {}}]
    pairs = [
        {"prompt": turns["prompt"], "chosen": turns["completion"], "rejected": [{"role": "assistant", "content": load}]}
    ]
    for name, lines in (("sft", rows), ("pref", pairs)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        (tmp_path / f"{name}_train.jsonl").write_text(text, encoding="utf-8")
    page = tmp_path / "page.html"
    files = ("--train-file", tmp_path / "sft_train.jsonl", "--val-file", "None", "--preview", page)
    run_stage("19_check_data.py", *files, "--max-length", 2000, check=False)

    shown = browser("--dump-dom", page.as_uri())
    assert "<title>What is trained: poems</title>" in shown, "no script has run"
    assert not any(tag in shown for tag in ("<img", "<script", "<link", '<h1>"')) and shown.count("<style>") == 1
    assert all(f">{char}</span>" in shown for char in "白日依山尽")
    assert (
        shown.count('class="trained special"') == 2
        and 'class="lowered special"' in shown
        and 'class="score" title' in shown
    )
    assert server.asked == [], "the page asked for something"
    control = tmp_path / "control.html"
    control.write_text(f"<img src='{address}/c.png'>", encoding="utf-8")
    browser("--dump-dom", control.as_uri())
    server.shutdown()
    assert server.asked, "the listener hears a page that loads"
