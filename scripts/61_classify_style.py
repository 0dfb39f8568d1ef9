"""Which style does a text have? One text, a file, or standard input, a JSON object a text.

A text is what the classifier was trained on: 用户问题：…\\n回答：…. Rows of a generation file (prompt, completion) are
put into that shape. Texts are batched by length; neither batch size nor padding side changes the answer beyond
rounding.

Reads   --model: checkpoints/{task}/classifier (stage 31); --text, or --input-file: .txt (a text a line), .json or
        .jsonl (rows with "input" or "text", or prompt and completion); neither: standard input, a text a line (\\n
        inside a text as two characters)
Writes  standard output: {"predicted_label", "confidence", "probabilities": {label: probability}} a line; for a file
        --output-file, with the row's id and input in front, and <output>.run.json
Run     python scripts/61_classify_style.py --text $'用户问题：能退吗？\\n回答：能，七天内都可以，运费我们出。'
        python scripts/61_classify_style.py --input-file processed_data/styles/style_test.jsonl
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.settings import UserError, next_command, read_settings, resolve_model, unused


@dataclass
class Settings:
    # --- what
    task: str = "styles"
    """names the folders below"""
    model: str = "checkpoints/{task}/classifier"
    """classifier with its head, folder or hub id"""
    text: str | None = None
    """one text: the answer is printed, nothing is written"""
    input_file: Path | None = None
    """.txt, .json or .jsonl; None without --text = standard input"""

    # --- scoring
    max_length: int = 512
    """tokens; a longer text loses its beginning, and is counted"""
    token_budget: int = 8192
    """padded tokens a batch"""
    dtype: str = "auto"
    """of the weights: auto, float32, bfloat16"""

    # --- run
    output_file: Path = Path("results/{task}/classified/{name}.jsonl")
    """{name} is the input file's"""
    overwrite: bool = False
    """replace what an earlier run left in output_file"""

    def clashes(self):
        if not self.input_file:
            yield from unused(self, "without --input-file: answers are printed", "output_file", "overwrite")


def decode_lines(data: bytes, name: str) -> list[str]:
    r"""Texts, one a line, with \n written as two characters for a line end inside one. Raises UserError with the line
    at fault."""
    texts = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            text = line.decode("utf-8").replace("\\n", "\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: not UTF-8 (byte {error.start + 1}); fix: save it as UTF-8") from None
        if not text.strip():
            raise UserError(f"{name}:{number}: an empty line; fix: take it out")
        texts.append(text)
    if not texts:
        raise UserError(f"{name}: no text; fix: one a line")
    return texts


def last_text(turns: Any) -> str | None:
    """A text, or that of the last of several turns; None where there is none. A model may have written nothing: ""."""
    if isinstance(turns, list):
        turns = turns[-1].get("content") if turns and isinstance(turns[-1], dict) else None
    return turns if isinstance(turns, str) else None


def read_texts(path: Path) -> list[tuple[str, str]]:
    """(id, text) of every row. Raises UserError naming the row that holds no text."""
    from common.jsonl import read_bytes, read_json, read_jsonl
    from common.training.classifiers import classifier_text

    if path.suffix not in (".json", ".jsonl"):
        return [(str(number), text) for number, text in enumerate(decode_lines(read_bytes(path), str(path)), start=1)]
    rows = read_json(path) if path.suffix == ".json" else read_jsonl(path)
    texts = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        text = row if isinstance(row, str) else None
        if isinstance(row, dict):
            text = row.get("input", row.get("text"))
            if "completion" in row and "prompt" in row:
                prompt, answer = row["prompt"], last_text(row["completion"])
                whole = all(last_text([turn]) for turn in prompt) if isinstance(prompt, list) else last_text(prompt)
                text = classifier_text(prompt, answer) if prompt and whole and answer is not None else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{path}: row {number} has no text; fix: "input", "text", or prompt and completion')
        texts.append((str(row.get("id", number)) if isinstance(row, dict) else str(number), text))
    if not texts:
        raise UserError(f"{path}: no rows; fix: name another --input-file")
    return texts


def main(settings: Settings) -> None:
    if settings.text is not None and settings.input_file:
        raise UserError("--text and --input-file together; fix: one of them")
    if settings.text is not None and not settings.text.strip():
        raise UserError("--text is blank; fix: write the text, or leave --text out to read standard input")
    model_path = resolve_model(settings.model, settings.task)
    if settings.input_file:
        rows = read_texts(settings.input_file)
    elif settings.text is not None:
        rows = [("", settings.text)]
    else:
        rows = [("", text) for text in decode_lines(sys.stdin.buffer.read(), "standard input")]
    if any("\ud800" <= char <= "\udfff" for _, text in rows for char in text):
        raise UserError("half of a surrogate pair in a text; fix: write the whole character, in UTF-8")

    from common.jsonl import write_jsonl
    from common.runs import begin_run
    from common.training.classifiers import load_styles
    from tasks.styles.predictions import count_cut, predict_styles

    def classify(texts: list[str]) -> list[dict]:
        model, tokenizer = load_styles(model_path, settings.dtype)
        if cut := count_cut(tokenizer, texts, settings.max_length):  # not among the answers on standard output
            notice = f"notice: {cut} texts have more than {settings.max_length} tokens and lose their beginning"
            print(notice, file=sys.stderr)
        return predict_styles(model, tokenizer, texts, settings.max_length, settings.token_budget)

    if not settings.input_file:
        for result in classify([text for _, text in rows]):
            print(json.dumps(result, ensure_ascii=False))
        return
    output = Path(str(settings.output_file).replace("{name}", settings.input_file.stem))
    if output.suffix != ".jsonl":
        raise UserError(f"--output-file {settings.output_file}: not a .jsonl file; fix: name one")
    inputs = {"model": model_path, "input_file": settings.input_file}
    with begin_run(output, settings, inputs, "61_classify_style", resumable=False) as run:
        results = classify([text for _, text in rows])
        write_jsonl(
            output, [{"id": id, "input": text} | result for (id, text), result in zip(rows, results, strict=True)]
        )
        counts = Counter(result["predicted_label"] for result in results)
        print(", ".join(f"{label} {count} ({count / len(rows):.1%})" for label, count in counts.most_common()))
        run.figure("predicted", counts)
        sheet = settings.input_file if settings.input_file.suffix == ".jsonl" else output  # stage 73 reads JSONL
        run.finish(next_command("73_human_sheet", task=settings.task, kind="style", generations=sheet))


if __name__ == "__main__":
    main(read_settings(Settings))
