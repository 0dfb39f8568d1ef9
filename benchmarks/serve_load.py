"""How many requests a second does stage 62 answer under load, with micro-batching and one by one?

Many clients ask at once, each the next question as soon as the last is answered, over connections that stay open. The
same server is started twice: as it comes, and with --batch-texts 1. Beside them: the same model in a plain loop without
HTTP, one text at a time. Then SIGTERM in the middle of the load: every request that the server accepted must be
answered, and the clients must have got as many answers as the server says it gave. Clients and server share the
machine's cores.

Reads   --model (stage 31, or any classifier with its head), texts of data/styles/training_data.json
Writes  a Markdown table on standard output; exit code 1 where a request failed or was lost
Run     python benchmarks/serve_load.py --seconds 60
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))


def start_server(model: str, words: list[str]) -> tuple[subprocess.Popen, int, Path]:
    """The real stage on a free port: (process, port, its log), once it answers."""
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    command = [sys.executable, str(ROOT / "scripts/62_serve.py"), "--model", model, "--port", "0", *words]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    for _ in range(1200):
        if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", log.read_text(encoding="utf-8")):
            return process, int(found[1]), log
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise SystemExit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> int:
    """One POST /predict on an open connection; the status. Raises ConnectionError or IncompleteReadError where no
    answer comes."""
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(
        body
    )
    writer.write(head + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", answer.lower())[1])
    result = json.loads(await reader.readexactly(length))
    status = int(answer.split(b" ", 2)[1])
    if status == 200 and abs(sum(result["probabilities"].values()) - 1) > 1e-3:
        raise SystemExit(f"not probabilities: {result}")
    return status


class Load:
    """What the clients saw."""

    def __init__(self):
        self.seconds: list[float] = []  # of each answer 200
        self.failed = 0  # other answers
        self.broken = 0  # connections that closed before an answer
        self.sent = 0


async def client(port: int, bodies: list[bytes], until: float, load: Load, number: int) -> None:
    """Asks until the clock says stop, or the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while time.perf_counter() < until:
            body = bodies[(number + load.sent) % len(bodies)]
            load.sent += 1
            started = time.perf_counter()
            status = await ask(reader, writer, body)
            load.seconds.append(time.perf_counter() - started)
            if status != 200:
                load.failed += 1
    except (ConnectionError, asyncio.IncompleteReadError):
        load.broken += 1
    finally:
        writer.close()


async def run_load(port: int, bodies: list[bytes], clients: int, seconds: float, stop: Callable | None = None) -> Load:
    """`clients` at once for `seconds`; with `stop` it is called after that time, and the clients go on until they are
    cut off."""
    load = Load()
    until = time.perf_counter() + (seconds if stop is None else 3600)
    tasks = [asyncio.create_task(client(port, bodies, until, load, number * 7)) for number in range(clients)]
    if stop is not None:
        await asyncio.sleep(seconds)
        stop()
    await asyncio.gather(*tasks)
    return load


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def one_by_one(model: str, texts: list[str], seconds: float) -> float:
    """Texts a second in a plain loop, in a process of its own so that nothing else is in its memory."""
    code = (
        "import sys, time, json\nfrom common.training.classifiers import load_classifier, logits_of\nmodel, tokenizer "
        f"= load_classifier({model!r}); texts = json.loads(sys.stdin.read()); count = 0\nlogits_of(model, tokenizer, "
        f"texts[:1]); started = time.perf_counter()\nwhile time.perf_counter() - started < {seconds}:\n    "
        "logits_of(model, tokenizer, [texts[count % len(texts)]]); count += 1\nprint('RATE', count / "
        "(time.perf_counter() - started))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(re.search(r"RATE ([\d.]+)", done.stdout)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints/styles/classifier"), help="classifier folder")
    parser.add_argument("--clients", type=int, default=200, help="concurrent connections")
    parser.add_argument("--seconds", type=float, default=60, help="of load in each part")
    parser.add_argument("--threads", type=int, default=0, help="of the model's arithmetic, 0 = torch's choice")
    options = parser.parse_args()
    if not (Path(options.model) / "config.json").exists():
        raise SystemExit(f"{options.model}: no model; fix: run scripts/31_train_style_classifier.py, or name another")

    rows = json.loads((ROOT / "data/styles/training_data.json").read_text(encoding="utf-8"))
    texts = [row["input"] for row in rows]
    bodies = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    table, rates, bad = [], {}, False
    for name, words in (("micro-batches", []), ("one by one", ["--batch-texts", "1"])):
        process, port, _ = start_server(options.model, [*words, "--threads", str(options.threads)])
        asyncio.run(run_load(port, bodies, options.clients, 2))  # warm
        started = time.perf_counter()
        load = asyncio.run(run_load(port, bodies, options.clients, options.seconds))
        elapsed = time.perf_counter() - started
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        rates[name] = len(load.seconds) / elapsed
        lost = load.sent - len(load.seconds)
        bad |= bool(load.failed or load.broken or lost)
        times = [f"{percentile(load.seconds, share) * 1000:.0f}" for share in (0.5, 0.99)]
        table.append(
            [f"HTTP, {name}", f"{rates[name]:.0f}", *times, str(len(load.seconds)), str(load.failed), str(lost)]
        )
    loop = one_by_one(options.model, texts, min(options.seconds, 20))
    table.append(["plain loop, no HTTP", f"{loop:.0f}", "", "", "", "", ""])
    mean = sum(map(len, texts)) // len(texts)
    print(f"{options.clients} clients, {options.seconds:.0f} s, {os.cpu_count()} cores, texts of {mean} characters")
    print("| | requests/s | p50 ms | p99 ms | answered | errors | lost |\n|---|---:|---:|---:|---:|---:|---:|")
    for row in table:
        print("| " + " | ".join(row) + " |")
    print(
        f"micro-batches answer {rates['micro-batches'] / rates['one by one']:.1f} times as many requests as one by one"
    )

    process, port, log = start_server(options.model, ["--threads", str(options.threads)])
    load = asyncio.run(run_load(port, bodies, options.clients, 3, lambda: process.send_signal(signal.SIGTERM)))
    process.wait(60)
    accepted, answered = map(
        int, re.search(r"accepted (\d+) requests, answered (\d+)", log.read_text(encoding="utf-8")).groups()
    )
    got = len(load.seconds)
    bad |= not accepted == answered == got or load.failed > 0
    print(
        f"SIGTERM under load: accepted {accepted}, answered {answered}, received by the clients {got}, errors "
        f"{load.failed}"
    )
    sys.exit(bad)


if __name__ == "__main__":
    main()
