"""The page of stage 72 in a real browser: it shows, filters and sorts, loads nothing, and runs nothing but its own
script."""

import json
import random
import time

import pytest
from playwright.sync_api import expect

import warm
from common.evaluation.compare_page import card, write_page
from common.jsonl import write_jsonl
from conftest import stage_command
from test_chat_browser import chromium  # noqa: F401 (a fixture)

PAYLOAD = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script>白日依山尽"
POEM = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"


def opened(chromium, path, width=1400, scheme="light"):  # noqa: F811
    page = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.problems, page.asked = [], []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(path)
    return page


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two runs over three prompts, as stages 70 and 72 write them."""
    folder = tmp_path_factory.mktemp("report")
    texts = {"base": (PAYLOAD, POEM[:-2], "山"), "sft": (POEM, POEM, PAYLOAD)}
    for name, answers in texts.items():
        rows = []
        for number, text in enumerate(answers):
            prompt = [{"role": "user", "content": f"写一首[五言绝句] 要求4句 主题为: 登临{number}"}]
            if number == 2:
                prompt = [{"role": "user", "content": PAYLOAD}, {"role": "assistant", "content": "好"}, *prompt]
            row = {"id": f"p{number}#0", "prompt_id": f"p{number}", "sample": 0, "seed": 42, "prompt": prompt}
            row |= {"completion": text, "reference": POEM, "model": name, "finish_reason": "stop", "tokens": 9}
            rows.append(row | {"meta": {"form": "五言绝句", "themes": ["登临"]}})
        write_jsonl(folder / "generations" / f"{name}.jsonl", rows)
    words = ("--generations", folder / "generations", "--output-dir", folder / "scores", "--nll-model", "")
    warm.run(stage_command("70_score.py", *words)).check_returncode()
    words = ("--generations", folder / "generations", "--scores", folder / "scores", "--checkpoints", folder)
    warm.run(stage_command("72_compare.py", *words, "--output", folder / "compare")).check_returncode()
    return (folder / "compare.html").as_uri()


@pytest.mark.all
@pytest.mark.parametrize("width, scheme", [(380, "light"), (1400, "dark")])
def test_it_shows_all_texts_and_runs_none_of_them(chromium, report, width, scheme):  # noqa: F811
    page = opened(chromium, report, width, scheme)
    assert page.locator(".item").count() == 3 and page.locator(".card").count() == 9
    shown = page.locator(".text").all_inner_texts()
    assert shown.count(PAYLOAD) == 2 and shown.count(POEM) == 5
    assert page.locator(".item").nth(2).locator(".turn").all_inner_texts()[0] == f"user: {PAYLOAD}"
    assert page.title() == "poems: 2 runs side by side" and page.locator("#items img").count() == 0
    assert page.locator("script").count() == 2 and page.problems == [] and page.asked == [report]
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert page.locator("mark.fault").count() and page.locator("mark.good").count()


@pytest.mark.all
def test_search_filters_order_keys_and_links(chromium, report):  # noqa: F811
    page = opened(chromium, report)
    count = page.locator("#count")
    page.keyboard.press("/")
    page.keyboard.type("登临1")
    expect(count).to_have_text("1 of 3 prompts")
    page.keyboard.press("Escape")
    expect(count).to_have_text("3 of 3 prompts")

    page.select_option("#run", label="sft")
    page.select_option("#rule", label="form = 0")
    expect(count).to_have_text("1 of 3 prompts")
    page.select_option("#rule", label="form fault")
    expect(count).to_have_text("1 of 3 prompts")
    page.select_option("#rule", label="all texts")
    page.select_option("#order", label="form ↑")
    assert page.locator(".item").first.get_attribute("id") == "p-p2"

    page.focus("#order")
    page.keyboard.press("j")  # a key in a field is not ours
    assert page.locator(".item.at").count() == 0
    page.evaluate("() => document.activeElement.blur()")
    for key, place in (("j", "p-p2"), ("j", "p-p0"), ("k", "p-p2")):
        page.keyboard.press(key)
        assert page.locator(".item.at").get_attribute("id") == place
    page.locator("#p-p1 .link").click()
    assert page.url.endswith("#p-p1") and page.locator(".item.at").get_attribute("id") == "p-p1"
    assert opened(chromium, page.url).locator(".item.at").get_attribute("id") == "p-p1"
    page.keyboard.press("Escape")
    expect(count).to_have_text("3 of 3 prompts")

    assert not page.locator("th", has_text="no_repeat").first.is_visible()
    assert not page.locator(".scores span", has_text="no_repeat").first.is_visible()
    assert page.locator(".scores span", has_text="form").first.is_visible()
    page.check("#wide")
    assert page.locator("th, .scores span", has_text="no_repeat").last.is_visible()
    assert page.locator("th", has_text="no_repeat").first.is_visible() and page.problems == []


@pytest.mark.all
def test_five_thousand_prompts_of_eight_models_stay_quick(chromium, tmp_path):  # noqa: F811
    draw = random.Random(0)
    examples = []
    for number in range(5000):
        cards = []
        for run in range(8):
            text = "".join(draw.choices("春江花月夜海上明生潮水连天共", k=24))
            scores = {"form": float(draw.random() < 0.9), "rhyme": draw.random(), "near_copy": 0.0}
            cards.append(card(f"run{run}", text, [(3, 4, "rhyme"), (9, 10, "form_fault")], scores, run == 0, True))
        turns = [{"role": "user", "content": f"写一首诗 {number}"}]
        examples.append({"id": f"{number:04d}", "turns": turns, "cards": cards})
    write_page(tmp_path / "page.html", "5,000 prompts", [], [], {}, examples, ["near_copy"])
    assert (tmp_path / "page.html").stat().st_size < 20_000_000

    started = time.monotonic()
    page = opened(chromium, (tmp_path / "page.html").as_uri(), 380)
    expect(page.locator("#count")).to_have_text("5000 of 5000 prompts")
    seconds = {"open": time.monotonic() - started}
    timed = """([id, value]) => { const field = document.getElementById(id); field.value = value;
        const start = performance.now(); field.dispatchEvent(new Event("input")); document.body.offsetHeight;
        return (performance.now() - start) / 1000; }"""
    seconds["search"] = page.evaluate(timed, ["search", "诗 4999"])
    expect(page.locator("#count")).to_have_text("1 of 5000 prompts")
    page.evaluate(timed, ["search", ""])
    seconds["filter"] = page.evaluate(timed, ["rule", "metric:0"])
    seconds["sort"] = page.evaluate(timed, ["order", "1:-1"])
    print(json.dumps(seconds))
    assert page.locator(".item").count() < 200 and page.problems == []
    assert seconds["open"] < 20 and max(value for name, value in seconds.items() if name != "open") < 2
    page = opened(chromium, (tmp_path / "page.html").as_uri() + "#p-4242")
    expect(page.locator(".item.at .turn")).to_have_text("写一首诗 4242")
