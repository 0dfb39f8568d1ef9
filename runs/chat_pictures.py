"""Pictures of stage 63's page with real answers: 380 and 1,400 pixels wide, light and dark, in headless Chromium
(`bash runs/test.sh --all` installs it).

Reads   --models: as stage 63 takes them; those of `bash runs/poems.sh --quick`
Writes  --output-dir: chat_380_light.png, chat_380_dark.png, chat_1400_light.png, chat_1400_dark.png
Run     python runs/chat_pictures.py
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.settings import UserError, read_settings  # noqa: E402

SIZES = {380: (780, 2), 1400: (820, 1)}  # width: height, pixels of the screen to one of the page


@dataclass
class Settings:
    models: tuple[str, ...] = (
        "data/tiny_qwen3",
        "checkpoints/poems_quick/sft",
        "checkpoints/poems_quick/dpo",
        "checkpoints/poems_quick/grpo",
    )
    """one to four, as stage 63 takes them"""
    form: str = "七言绝句"
    """of the poem that is asked for"""
    themes: tuple[str, ...] = ("山水", "送别")
    """of that poem"""
    output_dir: Path = Path("docs/images")
    """where the pictures go"""


def start_page(models: tuple[str, ...]) -> tuple[subprocess.Popen, str]:
    """Stage 63 on a free port, and its address."""
    command = [sys.executable, str(ROOT / "scripts" / "63_chat.py"), "--port", "0", "--models", *models]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    for line in process.stdout:
        if found := re.search(r"open (http://\S+) in", line):
            return process, found[1]
    raise UserError(f"stage 63 ended with {process.wait()}; fix: what it said above")


def take(browser: Browser, url: str, width: int, scheme: str, settings: Settings) -> None:
    from PIL import Image
    from playwright.sync_api import expect

    height, scale = SIZES[width]
    view = {"viewport": {"width": width, "height": height}, "device_scale_factor": scale, "locale": "zh-CN"}
    page = browser.new_context(color_scheme=scheme, **view).new_page()
    page.goto(url)
    page.select_option("#field-form", settings.form)
    page.select_option("#field-themes", list(settings.themes))
    page.click("#send")
    expect(page.locator(".facts")).to_have_count(len(settings.models))
    expect(page.locator("#send")).to_be_enabled(timeout=120_000)
    file = settings.output_dir / f"chat_{width}_{scheme}.png"
    page.screenshot(path=file)
    Image.open(file).convert("RGB").quantize(48).save(file, optimize=True)
    print(f"wrote {file}: {file.stat().st_size / 1000:.0f} kB")


def main(settings: Settings) -> None:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        raise UserError("no Chromium on this machine; fix: bash runs/test.sh --all installs it")
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    process, url = start_page(settings.models)
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
            for width in SIZES:
                for scheme in ("light", "dark"):
                    take(browser, url, width, scheme, settings)
            browser.close()
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main(read_settings(Settings))
