"""How long does stage 11 take on the full CommentR data, how much memory, and how do both grow? Beside it: json.load
and dicts.

The full data is given by its authors on request only, so an input of its size is made: 557,645 posts, 1,028,364
comments and 304,400 users whose fields come from records of the shipped sample. Texts are put together from clauses of
the sample, so that few are near-copies; some of the short ones are repeated, as people repeat them. Ids, threads,
likes, NaN and the bot's share are as in the sample.

Measured from outside, once for each size: wall time, CPU time of all processes, the largest sum of their resident
memory. The plain version does the same reading, rules, near-copies and caps with Python dicts; it must keep the very
same number of comments.

Reads   data/weibo (sample)
Writes  a Markdown table on standard output; inputs and outputs in a folder under --folder, deleted at the end
Run     python benchmarks/prepare_weibo.py                      full size, and the plain version at a quarter of it
        python benchmarks/prepare_weibo.py --sizes 1 3          also three times the size (7 GB of disk for a while)
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from tasks.weibo import cleaning as weibo_text  # noqa: E402
from tasks.weibo import corpus as weibo_corpus  # noqa: E402

POSTS, COMMENTS, USERS = 557_645, 1_028_364, 304_400
NAMES = ("posts", "comments", "users")
SAMPLE = ROOT / "data" / "weibo"
SEPARATORS = (",\n            ", ": ")  # indented as published, by the fast encoder


# --- an input of the full size


def _load(name: str) -> list[dict]:
    return json.loads((SAMPLE / f"sample_{name}.json").read_text(encoding="utf-8"))


def _clauses(texts: list[str]) -> list[str]:
    return [
        clause
        for text in texts
        for clause in re.findall(r"[^，。！？\n]{2,30}[，。！？\n]?", text)
        if "@" not in clause
    ]


def _reword(text: str, clauses: list[str], generator: random.Random) -> str:
    """A text of about the same length from other clauses; mentions and chains stay at their ends. Of the short ones
    three of ten stay as they are, for people repeat them."""
    if len(text) < 12 and "@" not in text:
        other = clauses[generator.randrange(len(clauses))]
        return (
            text
            if len(text) < 4 or generator.random() < 0.3
            else text[: len(text) // 2] + other[: len(text) - len(text) // 2]
        )
    head = re.match(r"(?:回复)?@\S+[ :：]?", text)
    chain = text.find("//@")
    start = head[0] if head else ""
    tail = text[chain:] if chain > 0 else (" @评论罗伯特 " if text.rstrip().endswith("@评论罗伯特") else "")
    words, wanted = start, len(text) - len(tail)
    while len(words) < wanted:
        words += clauses[generator.randrange(len(clauses))]
    return words[: max(wanted, len(start))] + tail


def _write(path: Path, records: Iterable[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            file.write("[\n    " if number == 0 else ",\n    ")
            file.write(json.dumps(record, ensure_ascii=False, separators=SEPARATORS))
        file.write("\n]\n")


def make_input(folder: Path, size: float, seed: int = 0) -> None:
    """posts.json, comments.json and users.json in `folder`, `size` times the full data."""
    generator = random.Random(seed)
    posts, comments, users = _load("posts"), _load("comments"), _load("users")
    n_posts, n_comments, n_users = (int(size * count) for count in (POSTS, COMMENTS, USERS))
    bot_clauses = _clauses([c["content"] for c in comments if c["comment_user"]["_id"] == weibo_text.BOT_ID])
    clauses = _clauses([c["content"] for c in comments if c["comment_user"]["_id"] != weibo_text.BOT_ID])
    post_clauses = _clauses([p["content"] for p in posts])

    def name(kind: str, number: int) -> str:
        return f"{kind}{number:031x}"

    def make_posts():
        for number in range(n_posts):
            post = dict(posts[generator.randrange(len(posts))])
            post |= {
                "_id": name("0", number),
                "mblogid": name("1", number),
                "content": _reword(post["content"], post_clauses, generator),
            }
            post["user"] = post["user"] | {"_id": name("2", generator.randrange(n_users))}
            if "retweet_id" in post:
                post["retweet_id"] = name("1", generator.randrange(n_posts))
            yield post

    threads = defaultdict(list)  # the sample's threads are kept together: one post's comments, in their order
    for comment in comments:
        threads[comment["root_post_mblogid"]].append(comment)
    threads = list(threads.values())

    def make_comments():
        number = 0
        while number < n_comments:
            post, new, people = name("1", generator.randrange(n_posts)), {}, {}
            for old in threads[generator.randrange(len(threads))]:
                bot = old["comment_user"]["_id"] == weibo_text.BOT_ID
                comment = dict(old) | {"_id": name("3", number), "root_post_mblogid": post}
                comment["content"] = _reword(old["content"], bot_clauses if bot else clauses, generator)
                user = old["comment_user"]["_id"]
                people.setdefault(user, user if bot else name("2", generator.randrange(n_users)))
                comment["comment_user"] = old["comment_user"] | {"_id": people[user]}
                new[old["_id"]] = comment
                comment["root_comment_id"] = new.get(old["root_comment_id"], comment)["_id"]
                if "reply_comment" in old:
                    parent = new.get(old["reply_comment"]["_id"])
                    if parent:
                        author = old["reply_comment"]["user"] | {"_id": parent["comment_user"]["_id"]}
                        comment["reply_comment"] = {"_id": parent["_id"], "text": parent["content"], "user": author}
                yield comment
                number += 1
                if number == n_comments:
                    return

    def make_users():
        for number in range(n_users):
            yield dict(users[generator.randrange(len(users))]) | {"_id": name("2", number)}

    for file, records in (("posts", make_posts()), ("comments", make_comments()), ("users", make_users())):
        _write(folder / f"{file}.json", records)


# --- the plain version: json.load, dicts and sets, one process


def plain(folder: Path, output: Path, settings: Any) -> int:
    """The same rules in the same order; writes the SFT rows and returns how many comments are kept."""
    from tasks import weibo as task

    raw_posts, raw_comments, raw_users = (json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in NAMES)
    texts = weibo_corpus.digest_posts(
        {
            "n": range(len(raw_posts)),
            "text": [p["content"] for p in raw_posts],
            "held_out": [settings.held_out] * len(raw_posts),
        }
    )
    posts = {}
    for i, raw in enumerate(raw_posts):
        whole = raw["content"].strip() and len(raw["content"]) <= weibo_corpus.MAX_RAW
        kept = bool(whole and texts["text"][i] and not texts["quotes_bot"][i])
        post = {name: texts[name][i] for name in ("text", "key", "split", "bands")}
        posts[raw["mblogid"]] = post | {"i": i, "created": raw["created_at"], "raw": raw["content"], "kept": kept}
    order = sorted(
        (p for p in posts.values() if p["kept"]), key=lambda p: (p["created"], p["key"], _sha(p["raw"]), p["i"])
    )
    first: dict = {}
    for post in order:
        for band, value in enumerate(post["bands"] or ()):
            first.setdefault((band, value, post["split"]), post)
    for post in order:
        for split in {"train": ("test", "val"), "val": ("test",), "test": ()}[post["split"]]:
            leaders = [first.get((band, value, split)) for band, value in enumerate(post["bands"] or ())]
            if any(
                leader and weibo_corpus.similarity(post["key"], leader["key"]) >= weibo_corpus.NEAR
                for leader in leaders
            ):
                post["kept"] = False

    parents = [c.get("reply_comment", {}).get("text", "") for c in raw_comments]
    columns = {
        "n": range(len(raw_comments)),
        "text": [c["content"] for c in raw_comments],
        "parent_text": parents,
        "max_characters": [settings.max_characters] * len(raw_comments),
    }
    texts = weibo_corpus.digest_comments(columns)
    comments = []
    for i, raw in enumerate(raw_comments):
        user = raw["comment_user"]
        is_bot = user["_id"] == weibo_text.BOT_ID or str(raw["ip_location"]).startswith(weibo_text.BOT_LOCATION)
        comments.append(
            {"raw": raw, "user": user, "is_bot": is_bot, "post": posts[raw["root_post_mblogid"]]}
            | {name: texts[name][i] for name in texts if name != "n"}
        )
    by_id = {c["raw"]["_id"]: c for c in comments}
    classes = _accounts(comments, raw_users, settings)
    bot_keys = {c["key"] for c in comments if c["is_bot"] and len(c["key"]) > 5}

    def judge(c: dict) -> bool:
        raw, post = c["raw"], c["post"]
        c["reply"] = "reply_comment" in raw
        c["parent"] = (
            (c["parent_text"] or by_id.get(raw.get("reply_comment", {}).get("_id"), {"text": ""})["text"])
            if c["reply"]
            else ""
        )
        if not raw["content"].strip() or len(raw["content"]) > weibo_corpus.MAX_RAW or not post["kept"] or c["is_bot"]:
            return False
        if classes[c["user"]["_id"]] in ("organisation", "low credit", "advertiser") or c["quotes_bot"] or c["fault"]:
            return False
        if (
            c["characters"] < settings.min_characters
            or c["key"] in bot_keys
            or (len(c["key"]) > 7 and c["key"] in post["key"])
        ):
            return False
        return not (c["calls"] and not c["reply"]) and not (c["reply"] and not c["parent"])

    kept = [c for c in comments if judge(c)]
    for c in kept:
        c["id"] = _sha("\n".join((c["text"], c["post"]["key"], c["parent"])))[:12]
    kept.sort(key=lambda c: (c["raw"]["created_at"], c["id"], c["raw"]["_id"]))
    first.clear()
    unique, per_text, capped = [], Counter(), []
    for c in kept:
        leaders = [first.setdefault((band, value), c) for band, value in enumerate(c["bands"] or ())]
        keys = {leader["key"] for leader in leaders if leader is not c}
        if not any(key == c["key"] or weibo_corpus.similarity(key, c["key"]) >= weibo_corpus.NEAR for key in keys):
            unique.append(c)
    seen: set = set()
    for c in unique:
        if c["id"] in seen:
            continue
        seen.add(c["id"])
        per_text[c["key"]] += 1
        if per_text[c["key"]] <= settings.cap_text:
            capped.append(c)
    per_user = Counter()
    rows = []
    for c in sorted(capped, key=lambda c: _sha(c["key"])):
        user = c["user"]["_id"]
        per_user[user] += 1
        if per_user[user] <= (settings.cap_prominent if classes[user] == "prominent" else settings.cap_user):
            rows.append(c)
    with open(output, "w", encoding="utf-8") as file:
        for c in rows:
            post, parent = (
                weibo_text.cut(c["post"]["text"], settings.max_post),
                weibo_text.cut(c["parent"], settings.max_thread),
            )
            answer = [{"role": "assistant", "content": c["text"]}]
            row = {"prompt": task.messages({"post": post, "parent": parent}), "completion": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(rows)


def _sha(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _accounts(comments: list[dict], raw_users: list[dict], settings: Any) -> dict[str, str]:
    listed = {user["_id"]: user for user in raw_users}
    written, total, adverts, posts = {}, Counter(), Counter(), defaultdict(set)
    for c in comments:
        user = c["user"]["_id"]
        old = written.setdefault(user, {"verified": False, "verified_type": None, "statuses_count": 0})
        old["verified"] = old["verified"] or c["user"]["verified"]
        old["statuses_count"] = max(old["statuses_count"], c["user"].get("statuses_count") or 0)
        if c["user"].get("verified_type") is not None:
            old["verified_type"] = max(old["verified_type"] or 0, c["user"]["verified_type"])
        total[user] += 1
        adverts[user] += c["fault"] in ("advertisement", "contact details or personal data")
        if len(c["key"]) >= weibo_corpus.NEAR_CHARACTERS:
            posts[user, c["key"]].add(c["raw"]["root_post_mblogid"])
    repeats = defaultdict(int)
    for (user, _), places in posts.items():
        repeats[user] = max(repeats[user], len(places))
    classes = {}
    for user, own in written.items():
        known = listed.get(user, {})

        def of(name: str, known: dict = known, own: dict = own):
            return own[name] if known.get(name) is None else known[name]

        if of("verified") and 1 <= (of("verified_type") or 0) <= 7:
            classes[user] = "organisation"
        elif known.get("sunshine_credit") in ("信用较低", "信用极低"):
            classes[user] = "low credit"
        elif (total[user] > 2 and adverts[user] * 2 > total[user]) or repeats[user] > 2:
            classes[user] = "advertiser"
        elif of("verified") or of("statuses_count") >= settings.high_volume:
            classes[user] = "prominent"
        else:
            classes[user] = "ordinary"
    return classes


# --- measuring


def measure(command: list[str], log: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds of all processes, largest sum of their resident memory in MiB (shared pages counted in
    each)."""
    import psutil

    started, peak = time.perf_counter(), 0
    with open(log, "w", encoding="utf-8") as output:
        process = psutil.Popen(command, stdout=output, stderr=output)
        while True:
            try:
                family = [process, *process.children(recursive=True)]
                peak = max(peak, sum(member.memory_info().rss for member in family))
            except psutil.Error:
                pass
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)}\n{log.read_text(encoding='utf-8')[-3000:]}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="*", default=[1.0], help="times the full data, for stage 11")
    parser.add_argument(
        "--plain-sizes", type=float, nargs="*", default=[0.25], help="times the full data, for json.load and dicts"
    )
    parser.add_argument("--folder", type=Path, default=None, help="for inputs and outputs (default: the system's)")
    parser.add_argument("--plain-input", type=Path, help=argparse.SUPPRESS)  # the child process of the plain version
    arguments = parser.parse_args()
    if arguments.plain_input:
        import importlib

        settings = importlib.import_module("11_prepare_weibo").Settings()
        print(f"kept {plain(arguments.plain_input, arguments.plain_input / 'plain.jsonl', settings)}")
        return

    print("| | posts | comments | input, MB | wall, s | CPU, s | memory, MiB | kept |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for size in sorted({*arguments.sizes, *arguments.plain_sizes}):
        with tempfile.TemporaryDirectory(prefix="weibo_benchmark_", dir=arguments.folder) as name:
            folder = Path(name)
            make_input(folder, size)
            megabytes = sum((folder / f"{n}.json").stat().st_size for n in NAMES) / 1e6
            flags = [word for n in NAMES for word in (f"--{n}", str(folder / f"{n}.json"))]
            stage = [
                sys.executable,
                str(ROOT / "scripts/11_prepare_weibo.py"),
                *flags,
                "--output-dir",
                str(folder / "out"),
            ]
            runs = [("stage 11", [*stage, "--scratch-dir", name])]
            if size in arguments.plain_sizes:
                runs.append(("json.load and dicts", [sys.executable, __file__, "--plain-input", name]))
            for label, command in runs:
                wall, cpu, memory = measure(command, folder / "log.txt")
                printed = (folder / "log.txt").read_text(encoding="utf-8")
                kept = re.search(r"comments: read \d+, kept (\d+)|^kept (\d+)", printed, re.MULTILINE)
                cells = [
                    f"{label}, x {size:g}",
                    f"{int(size * POSTS):,}",
                    f"{int(size * COMMENTS):,}",
                    f"{megabytes:,.0f}",
                    f"{wall:.0f}",
                    f"{cpu:.0f}",
                    f"{memory:,.0f}",
                    f"{int(kept[1] or kept[2]):,}",
                ]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
