"""How long do stages 17 and 19 take on a user's rows, and how much memory, with a vocabulary as large as Qwen's?

Two files are made of clauses of the shipped data, so that few answers are alike by chance: alpaca rows (a question of
10-50 characters, every third with an input, an answer of 40-400), and rows whose answers come from a dozen templates
with other words in them, the worst case for near-copies. The tokenizer is a byte-level BPE in Qwen's manner, trained
here on shipped text, with the chat template of the embedded base; --model takes another one.

Each stage is a process of its own, measured from outside: wall time, CPU time, the largest resident memory. On a shared
machine CPU time is what to compare.

Reads   data/poems, data/weibo
Writes  a Markdown table on standard output; everything else in a folder of its own under --folder, deleted at the end
Run     python benchmarks/own_data.py
        python benchmarks/own_data.py --model Qwen/Qwen3-0.6B --rows 60000 --templated 20000
"""

import argparse
import json
import lzma
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = [
    "{0}的天气{1}，气温在{2}度到{3}度之间，出门请带好{4}，路上注意安全。{5}这一天适合{6}，不适合{7}。祝您一切顺利，如有问题请随时联系我们的客服，我们会在{8}小时之内回复您。",
    "您好，您购买的{4}已经从{0}发出，预计{2}天之内送到，快递单号为{8}{3}。收到之后请先{6}，如果{1}，请不要{7}，联系我们即可退换。感谢您的支持，祝您生活愉快，期待您再次光临本店。",
    "根据规定，{0}的居民办理{4}需要准备{2}份材料：身份证、户口本和{5}的证明。办理时间是每周{3}，地点在{1}的大厅。请提前{8}天预约，不要{7}。办理完成后可以{6}，有问题请拨打电话咨询。",
]


def clauses() -> list[str]:
    poems = json.loads(lzma.decompress((ROOT / "data/poems/tang.json.xz").read_bytes()))
    found = [line for poem in poems for text in poem["paragraphs"] for line in re.findall(r"[^，。]+[，。]", text)]
    for name in ("posts", "comments"):
        records = json.loads((ROOT / f"data/weibo/sample_{name}.json").read_text(encoding="utf-8"))
        texts = [value for record in records for value in record.values() if isinstance(value, str) and len(value) > 8]
        found += [clause for text in texts for clause in re.findall(r"[^，。！？\n<>#@/]{3,20}[，。！？]", text)]
    return found


def alpaca(count: int, parts: list[str], draw: random.Random):
    def text(low: int, high: int) -> str:
        wanted, words = draw.randint(low, high), ""
        while len(words) < wanted:
            words += draw.choice(parts)
        return words[:wanted].rstrip("，") + "。"

    for number in range(count):
        row = {"instruction": f"第{number}题：{text(10, 50)}", "input": text(10, 80) if number % 3 == 0 else ""}
        yield row | {"output": text(40, 400)}


def templated(count: int, parts: list[str], draw: random.Random):
    for number in range(count):
        words = [draw.choice(parts)[:-1] for _ in range(9)]
        yield {"instruction": f"第{number}问：{words[0]}？", "output": draw.choice(TEMPLATES).format(*words)}


def make_tokenizer(folder: Path, vocabulary: int, texts: list[str]) -> None:
    """A tokenizer in Qwen's manner: NFC, its pattern of words, bytes, merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    words += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(texts, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    whole.chat_template = (ROOT / "data/tiny_qwen3/chat_template.jinja").read_text(encoding="utf-8")
    whole.save_pretrained(folder)
    print(f"tokenizer of {len(whole)} tokens", file=sys.stderr)


MEASURE = """
import resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=2).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


def measured(stage: str, *words) -> list[float]:
    """[wall seconds, CPU seconds, MiB] of one stage, started by a small process: a child's peak begins with that of
    the process that it was forked from."""
    command = [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), *map(str, words)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, encoding="utf-8")
    code, *figures = map(float, done.stdout.split())
    if code not in (0, 1):  # 1: stage 19 has found errors
        sys.exit(done.stderr[-2000:])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000, help="alpaca rows, 0 = none")
    parser.add_argument("--templated", type=int, default=20_000, help="rows of templates, 0 = none")
    parser.add_argument("--model", help="a tokenizer; without one it is trained here")
    parser.add_argument("--vocabulary", type=int, default=150_000, help="of the tokenizer that is trained here")
    parser.add_argument("--keep", action="store_true", help="leave the folder, to look at it")
    parser.add_argument("--folder", help="where the folder of the run is made")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="own_data_", dir=options.folder))
    try:
        draw, parts = random.Random(1), clauses()
        if not options.model:
            options.model = folder / "tokenizer"
            make_tokenizer(options.model, options.vocabulary, parts)
        print("| rows | stage | wall, s | CPU, s | MiB |\n|---|---|---:|---:|---:|")
        for name, count, make in (("alpaca", options.rows, alpaca), ("templated", options.templated, templated)):
            if not count:
                continue
            source, data = folder / f"{name}.jsonl", folder / name
            with open(source, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in make(count, parts, draw))
            files = ["--train-file", data / "sft_train.jsonl", "--val-file", data / "sft_val.jsonl"]
            check = ["--model", options.model, "--max-length", 1024, "--preview", folder / "page.html"]
            for stage, words in (
                ("17_prepare_chat", ["--files", source, "--output-dir", data]),
                ("19_check_data", [*files, *check]),
            ):
                wall, cpu, memory = measured(stage, "--task", "bench", *words)
                print(f"| {count} {name} | {stage[:2]} | {wall:.1f} | {cpu:.1f} | {memory:.0f} |", flush=True)
    finally:
        if options.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
