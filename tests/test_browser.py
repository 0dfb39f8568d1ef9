"""The comparison page in a real browser: it shows, and runs nothing that a model wrote."""

import json
import shutil
import subprocess

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
