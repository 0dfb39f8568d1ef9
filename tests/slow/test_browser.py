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


@pytest.mark.all
def test_page_shows_texts_and_runs_none_of_them(run_stage, browser, tmp_path):
    folder = tmp_path / "generations"
    folder.mkdir()
    prompt = [{"role": "user", "content": "写一首[五言绝句] 要求4句 主题为: 登临"}]
    row = {
        "id": "a#0",
        "prompt_id": "a",
        "sample": 0,
        "seed": 42,
        "prompt": prompt,
        "reference": "欲穷千里目，更上一层楼。",
    }
    row |= {"finish_reason": "stop", "tokens": 9, "meta": {"form": "五言绝句", "themes": ["登临"]}}
    for name, text in (("base", PAYLOAD), ("sft", "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。")):
        line = json.dumps({**row, "completion": text, "model": name}, ensure_ascii=False)
        (folder / f"{name}.jsonl").write_text(line + "\n", encoding="utf-8")
    scores, report = tmp_path / "scores", tmp_path / "compare"
    run_stage("70_score.py", "--generations", folder, "--output-dir", scores, "--nll-model", "")
    run_stage(
        "72_compare.py", "--generations", folder, "--scores", scores, "--checkpoints", tmp_path, "--output", report
    )

    page = report.with_suffix(".html").as_uri()
    shown = browser("--dump-dom", page)
    assert "<title>taken</title>" not in shown and "<title>" in shown
    assert "&lt;script&gt;" in shown and "黄河入海" in shown.replace("</span>", "").replace("</mark>", "")
    picture = tmp_path / "page.png"
    browser(f"--screenshot={picture}", "--window-size=1400,1800", page)
    assert picture.stat().st_size > 20_000, "an empty page is smaller"


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
