"""What a judge is asked: prompt files, the conversation, and the texts in their orders."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.conversations import readable
from common.jsonl import read_jsonl, read_utf8
from common.settings import UserError, show_path

SPEAKERS = {"system": "系统", "user": "用户", "assistant": "助手", "tool": "工具"}


def conversation_text(turns: list[dict]) -> str:
    """A prompt as a reader sees it: one user turn as it is, several turns with their roles."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{SPEAKERS[turn['role']]}：{readable(turn).strip()}" for turn in turns)


class JudgePrompt(NamedTuple):
    """A file of data/<task>/judge_prompts/<version>: its dimensions, and a text with {instruction}, {count}, {texts},
    {format}."""

    dimensions: list[str]
    template: str

    def fill(self, instruction: str, texts: Sequence[str]) -> str:
        """The question to the judge about these texts, in this order. A text cannot close its own mark."""
        shown = [text.strip().replace("</文本", "＜/文本") or "（空白）" for text in texts]
        example = {
            "texts": [{"id": place, "scores": dict.fromkeys(self.dimensions, 3)} for place in range(1, len(texts) + 1)],
            "best": f"1 到 {len(texts)} 的编号，或“平局”",
        }
        parts = {
            "instruction": instruction.strip(),
            "count": str(len(texts)),
            "texts": "\n\n".join(f"<文本{place}>\n{text}\n</文本{place}>" for place, text in enumerate(shown, start=1)),
            "format": json.dumps(example, ensure_ascii=False),
        }
        return re.sub(r"\{(\w+)\}", lambda mark: parts[mark[1]], self.template)


def load_prompt(folder: Path, name: str | None) -> JudgePrompt:
    """The file `name`.md of a version, or its only one. Raises UserError where it is missing or cannot be filled in."""
    if not folder.is_dir():
        raise UserError(
            f"no judge prompts in {show_path(folder)}; fix: write a version, or name one with --prompt-versions"
        )
    files = [folder / f"{name}.md"] if name else sorted(folder.glob("*.md"))
    if len(files) != 1 or not files[0].is_file():
        raise UserError(f"{show_path(folder)}: {name or 'one Markdown file'} is expected and not there; fix: write it")
    head, _, template = read_utf8(files[0]).partition("\n")
    dimensions = [name for name in re.split(r"[、，,\s]+", head.partition("：")[2]) if name]
    if not head.startswith("维度：") or not dimensions:
        raise UserError(f"{show_path(files[0])}: line 1 names no dimensions; fix: 维度：…、…")
    marks = set(re.findall(r"\{(\w+)\}", template))
    if marks != {"instruction", "count", "texts", "format"}:
        raise UserError(
            f"{show_path(files[0])} has the marks {sorted(marks)}; fix: {{instruction}}, {{count}}, {{texts}}, "
            f"{{format}}"
        )
    return JudgePrompt(dimensions, template.strip())


def read_generations(path: Path) -> list[dict]:
    """Rows of stage 60, each id once: a file that two runs wrote would count its texts twice. Raises UserError."""
    rows = read_jsonl(path, "generation")
    if twice := [id for id, count in Counter(row["id"] for row in rows).items() if count > 1]:
        raise UserError(
            f"{show_path(path)}: {len(twice)} ids appear twice, the first {twice[0]}; fix: run stage 60 again"
        )
    return rows


def rotations(count: int) -> list[tuple[int, ...]]:
    """Orders in which each candidate stands once in each place: (0, 1, 2), (1, 2, 0), (2, 0, 1)."""
    return [tuple((start + step) % count for step in range(count)) for start in range(count)]
