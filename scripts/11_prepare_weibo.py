"""Weibo posts, comments and users to training files: SFT rows of human comments, preference pairs, comments labelled
by their likes, RL prompts, a report.

Three JSON arrays in any of three schemas (docs/tasks/weibo.md lists the names) go through DuckDB, which keeps to
its memory and puts the rest on disk. Every record is kept or counted under the first rule that drops it. The bot's own
replies are never a target: they serve as rejected answers only, where people took them badly.

Reads   --posts, --comments, --users: JSON arrays, or globs of them in quotes (data/weibo/sample_*.json)
Writes  --output-dir (processed_data/weibo): sft_, pref_, kto_, prompts_ {train,val,test}.jsonl, report.json, run.json
Run     python scripts/11_prepare_weibo.py
        python scripts/11_prepare_weibo.py --posts 'full/posts*.json' --comments 'full/comments*.json' \\
            --users full/users.json
        python scripts/11_prepare_weibo.py --recipe classic --output-dir processed_data/weibo_classic
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.settings import UserError, read_settings, show_path


@dataclass
class Settings:
    # --- data
    task: str = "weibo"
    """fixed: this stage knows Weibo only"""
    posts: tuple[Path, ...] = (Path("data/weibo/sample_posts.json"),)
    """JSON arrays or globs of them"""
    comments: tuple[Path, ...] = (Path("data/weibo/sample_comments.json"),)
    """JSON arrays or globs of them"""
    users: tuple[Path, ...] = (Path("data/weibo/sample_users.json"),)
    """JSON arrays or globs of them; "--users" alone = none"""
    allow_truncated: bool = False
    """keep the whole records of a file that breaks off"""
    held_out: int = 5
    """percent of the posts in val, and as many in test, by hash of the post; more for a small corpus"""

    # --- which comments
    min_characters: int = 2
    """of a comment; an emoji in brackets is one"""
    max_characters: int = 140
    """of a comment; Weibo's own limit for most users"""
    bot_calls: bool = False
    """keep top-level comments that call the bot instead of answering the post"""
    cap_text: int = 3
    """rows of one text (哈哈哈, 喜欢) over all posts"""
    cap_user: int = 20
    """rows of one user"""
    cap_prominent: int = 5
    """rows of one verified or high-volume user"""
    high_volume: int = 50_000
    """statuses from which a user counts as high-volume"""

    # --- prompts
    max_post: int = 160
    """characters of the post shown in a prompt"""
    max_thread: int = 80
    """characters of each earlier comment shown in a prompt"""

    # --- preference pairs, labelled comments and RL prompts
    recipe: Literal["likes", "classic"] = "likes"
    """likes: with reactions and relevance; classic: the older score"""
    min_margin: float = 1.0
    """of log(1 + likes) between the sides: 2 likes against 0 pass, 1 against 0 does not; half of it from the median of
    its thread makes a comment good or bad"""
    pairs_per_thread: int = 4
    """pairs by likes from one thread; good comments, and bad ones"""
    max_prompts: int = 20_000
    """RL prompts a split, 0 = all"""

    # --- run
    output_dir: Path = Path("processed_data/{task}")
    """all files of this stage"""
    scratch_dir: Path | None = None
    """for what exceeds memory_gib (up to the size of the input), None = the system's"""
    memory_gib: float = 1.0
    """for the database; the rest of the stage takes about 0.75"""
    workers: int = 2
    """processes and database threads"""
    seed: int = 42
    """unused: every choice comes from the texts"""
    overwrite: bool = False
    """replace what an earlier run left in output_dir"""


def print_counts(name: str, counts: dict, indent: str = "") -> None:
    heads = ", ".join(f"{key} {value}" for key, value in counts.items() if not isinstance(value, dict))
    print(f"{indent}{name}: {heads}")
    for key, table in counts.items():
        for reason, count in table.items() if isinstance(table, dict) else ():
            print(f"{indent}  {key:8} {count:8}  {reason}")


def main(settings: Settings) -> None:
    from concurrent.futures import ThreadPoolExecutor
    from tempfile import TemporaryDirectory

    from tqdm import tqdm

    from common.jsonl import write_json
    from common.runs import begin_run, check_output
    from tasks.base import SPLITS, check_command, write_splits
    from tasks.weibo import arrays as weibo_arrays
    from tasks.weibo import corpus as weibo_corpus
    from tasks.weibo.rows import KINDS

    started = time.perf_counter()
    check_output(settings.output_dir, "11_prepare_weibo")  # before the work, which takes long
    if settings.task != "weibo":
        raise UserError(f"--task {settings.task}: this stage prepares Weibo; fix: use the prepare stage of that task")
    if not 1 <= settings.held_out <= 40:
        raise UserError(f"--held-out {settings.held_out}: not from 1 to 40; fix: most posts are for training")
    files = {
        name: weibo_arrays.find_arrays(getattr(settings, name), f"--{name}") for name in ("posts", "comments", "users")
    }
    with TemporaryDirectory(prefix="weibo_", dir=settings.scratch_dir) as scratch:
        con = weibo_corpus.connect(Path(scratch), settings.memory_gib, settings.workers)
        # read before an earlier run's files are touched; side by side, for DuckDB reads an array on one core
        tables = {
            "posts": ("post", weibo_arrays.POST),
            "comments": ("comment", weibo_arrays.COMMENT),
            "users": ("account", weibo_arrays.ACCOUNT),
        }
        with ThreadPoolExecutor(settings.workers) as pool:
            loading = {
                name: pool.submit(
                    weibo_arrays.load_arrays,
                    con.cursor(),
                    f"raw_{table}",
                    files[name],
                    fields,
                    Path(scratch),
                    settings.allow_truncated,
                )
                for name, (table, fields) in tables.items()
            }
        fixed = {tables[name][0]: future.result() for name, future in loading.items()}
        for name, (table, _) in tables.items():
            count = con.execute(f"SELECT count(*) FROM raw_{table}").fetchone()[0]
            print(f"read {count} {name} from {len(files[name])} files", flush=True)
        rules = weibo_corpus.Rules(**{name: getattr(settings, name) for name in weibo_corpus.Rules.__annotations__})
        weibo_corpus.make_posts(con, rules, settings.workers)
        weibo_corpus.make_comments(con, rules, settings.workers)
        report = weibo_corpus.counts(con, fixed) | {"pairs": weibo_corpus.make_pairs(con, rules, settings.recipe)}
        report["labelled"] = weibo_corpus.make_verdicts(con, rules)
        if not con.execute("SELECT count(*) FROM kept WHERE split = 'train'").fetchone()[0]:
            raise UserError(
                f"{settings.comments[0]}: no training row is left; dropped: {report['posts']['dropped']}, "
                f"{report['comments']['dropped']}; fix: comments need the posts they belong to"
            )

        inputs = {f"{name} {show_path(path)}": path for name, paths in files.items() for path in paths}
        how = {"resumable": False, "ignore": ("scratch_dir", "memory_gib", "workers")}
        with begin_run(settings.output_dir, settings, inputs, "11_prepare_weibo", **how) as run:

            def progress(name: str, split: str, rows: Callable) -> Iterator[dict]:
                bar = tqdm(desc=f"{name}_{split}", unit=" rows", mininterval=1, leave=False)
                for row in rows(con, settings, split):
                    yield row
                    bar.update()

            files = {split: {name: progress(name, split, rows) for name, rows in KINDS.items()} for split in SPLITS}
            report["splits"] = write_splits(files, settings.output_dir)
            pairs = con.execute("""SELECT source, split, count(*), round(avg((length(chosen) > length(rejected))::INT),
                3)
                FROM pair GROUP BY ALL ORDER BY ALL""").fetchall()
            for source, split, count, longer in pairs:
                report["pairs"][source][split] = count
                report["pairs"][source][f"share of {split} in which the chosen one is longer"] = longer
            for name in ("posts", "comments", "users", "labelled", "splits"):
                print_counts(name, report[name])
            for source, counts in report["pairs"].items():
                print_counts(f"pairs by {source}", {"": counts})
            write_json(settings.output_dir / "report.json", report)
            run.figure("report", report)
            # the record's own time begins with the writing
            run.figure("seconds_in_all", round(time.perf_counter() - started, 1))
            run.finish(check_command(settings.output_dir, task="weibo"))
        con.close()


if __name__ == "__main__":
    main(read_settings(Settings))
