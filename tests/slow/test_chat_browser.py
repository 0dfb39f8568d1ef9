"""The page of stage 63 in a real browser: it talks with two models, runs nothing that they write, and fits a phone."""

import json
import re
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from test_chat_page import Page

PAYLOAD = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>白日依山尽"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    running = Page(
        tmp_path_factory.mktemp("page") / "log", "--models", *["data/tiny_qwen3"] * 2, "--max-new-tokens", 24
    )
    yield running
    running.process.terminate()
    running.process.wait(30)


@pytest.fixture(scope="module")
def chromium():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(chromium, chat, **words):
    page = chromium.new_context(locale="zh-CN", **words).new_page()
    page.problems = []
    page.on("console", lambda message: message.type in ("error", "warning") and page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(chat.url)
    page.wait_for_selector("#field-form")
    return page


def wait_for_answers(page, count):
    expect(page.locator(".facts")).to_have_count(count, timeout=30_000)
    expect(page.locator("#send")).to_be_enabled(timeout=30_000)


@pytest.mark.all
@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_two_models_answer_a_filled_in_form(chromium, chat, width, scheme, tmp_path):
    page = open_page(chromium, chat, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.select_option("#field-form", "五言绝句")
    page.select_option("#field-themes", ["山水"])
    page.click("#send")
    wait_for_answers(page, 2)
    asked = page.locator(".user").all_inner_texts()
    assert asked == ["写一首[五言绝句] 要求4句 主题为: 山水"] * 2
    one, other = page.locator(".assistant").all_inner_texts()
    assert one == other and one, "one model, one seed"
    assert "form" in page.locator(".facts").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out to the side"
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 27)")

    page.fill("#message", "再写一首")
    page.press("#message", "Control+Enter")
    wait_for_answers(page, 4)
    with page.expect_download() as download:
        page.click("#download")
    rows = [json.loads(line) for line in download.value.path().read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["写一首[五言绝句] 要求4句 主题为: 山水", "再写一首"] * 2
    page.click("#clear")
    assert page.locator(".turn").count() == 0 and page.problems == []


@pytest.mark.all
def test_text_that_tries_to_be_a_script_stays_text(chromium, chat):
    page = open_page(chromium, chat)
    last = {"prompt": PAYLOAD, "text": PAYLOAD, "reason": "stop", "tokens": 9, "seconds": 1, "scores": [PAYLOAD]}
    last["parts"] = [{"text": PAYLOAD, "label": PAYLOAD, "kind": "good"}, {"text": PAYLOAD, "label": ""}]
    lines = "".join(json.dumps(line) + "\n" for line in ({"text": PAYLOAD}, last))
    page.route("**/answer", lambda route: route.fulfill(body=lines, content_type="application/x-ndjson"))
    page.fill("#message", PAYLOAD)
    page.click("#send")
    wait_for_answers(page, 2)
    assert page.title().startswith("poems: ") and page.locator("img").count() == 0
    assert page.locator("script").count() == 1 and page.problems == []
    assert page.locator(".assistant").first.inner_text() == PAYLOAD * 2


@pytest.mark.all
def test_what_the_server_refuses_is_said_and_stop_ends_an_answer(chromium, chat):
    page = open_page(chromium, chat)
    page.click("#drawn summary")
    page.fill("#sampling-max_new_tokens", "4000")
    page.fill("#message", "你好")
    page.click("#send")
    page.wait_for_selector(".error")
    assert "more than the 2048 it reads" in page.locator(".error").first.inner_text()
    expect(page.locator("#message")).to_have_value("你好")  # to be sent again
    page.fill("#sampling-max_new_tokens", "1500")
    page.fill("#sampling-temperature", "3")
    page.fill("#message", "你好")
    page.click("#send")
    expect(page.locator(".assistant").nth(1)).to_have_text(re.compile(r"\S{4}", re.DOTALL), timeout=30_000)
    assert page.locator(".writing").count() == 2
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled()
    assert "已停止" in page.locator(".stopped").last.inner_text() and page.locator(".writing").count() == 0


@pytest.mark.all
def test_a_server_that_is_gone_is_said_before_and_after_a_message(chromium, chat):
    page = open_page(chromium, chat)
    page.route("**/answer", lambda route: route.abort())
    page.fill("#message", "你好")
    page.click("#send")
    expect(page.locator(".error")).to_have_count(2)
    assert "还在运行吗" in page.locator(".error").first.inner_text()
    expect(page.locator("#message")).to_have_value("你好")
    page.route("**/about", lambda route: route.abort())
    page.goto(chat.url)
    page.wait_for_selector(".error")
    assert "还在运行吗" in page.locator(".error").inner_text()


@pytest.mark.all
@pytest.mark.parametrize("width", [380, 1400])
def test_four_models_with_long_answers_stay_side_by_side(chromium, chat, width):
    """Names and answers of four models are made up: what is tried is the room that they take."""
    page = chromium.new_context(locale="zh-CN", viewport={"width": width, "height": 700}).new_page()
    names = [f"checkpoints_of_a_long_name_without_a_break_{number}" for number in range(4)]
    about = json.loads(chat.ask("/about")[1]) | {"models": names}
    page.route("**/about", lambda route: route.fulfill(json=about))
    text = "白日依山尽" * 400 + "w" * 2000
    last = {"prompt": "你好", "text": text, "reason": "length", "tokens": 9, "seconds": 1, "scores": [], "parts": []}
    last["parts"] = [{"text": text, "label": ""}]
    page.route("**/answer", lambda route: route.fulfill(body=json.dumps(last) + "\n"))
    page.goto(chat.url)
    expect(page.locator(".empty")).to_have_count(4)
    expect(page.locator("#download")).to_be_in_viewport()  # with all fields open
    page.fill("#message", "你好")
    page.click("#send")
    wait_for_answers(page, 4)
    root = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert root[0] <= width and root[1] <= 700, "the page stands, the answers scroll"
    boxes = [page.locator(".column").nth(number).bounding_box() for number in range(4)]
    assert len({box["y"] for box in boxes}) == 1 and boxes[1]["x"] < width, "the next one is to be seen"
    assert min(box["width"] for box in boxes) > 250
    for name in ("send", "stop", "clear", "copy", "download"):
        assert page.locator(f"#{name}").bounding_box()["height"] >= 44, "room for a finger"


@pytest.mark.all
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(chromium, chat, scheme):
    """Contrast of 4.5 to 1 or more (WCAG 2.2, 1.4.3) for every colour of text on what lies behind it."""
    page = open_page(chromium, chat, color_scheme=scheme)
    script = "name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"

    def light(name):
        digits = page.evaluate(script, name)[1:]
        digits = digits if len(digits) == 6 else "".join(digit * 2 for digit in digits)
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    on = {"back": ("text", "soft", "wrong", "accent"), "own": ("text",), "good": ("text",), "fault": ("text",)}
    for back, texts in on.items():
        for text in texts:
            dark, bright = sorted([light(back), light(text)])
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (text, back)
