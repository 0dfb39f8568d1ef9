"""Rows of Weibo files from the tables of corpus.py: SFT rows, pairs, labelled comments, RL prompts, as streams.

settings: those of stage 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tasks.base import answer, text_id
from tasks.weibo import messages
from tasks.weibo.cleaning import cut

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def prompt_row(settings: Any, row: dict) -> tuple[list[dict], str]:
    """The chat messages of a post and its thread, and the post's own id."""
    meta = {
        "post": cut(row["post_text"], settings.max_post),
        "root": cut(row["root"], settings.max_thread),
        "root_is_bot": row["root_is_bot"],
        "parent": cut(row["parent"], settings.max_thread),
        "parent_is_bot": row["parent_is_bot"],
    }
    return messages(meta), text_id(row["post_text"])


def select(con: DuckDBPyConnection, query: str) -> Iterator[dict]:
    """The rows of a query, as a stream."""
    for batch in con.cursor().sql(query).to_arrow_reader(10_000):
        yield from batch.to_pylist()


def sft_rows(con: DuckDBPyConnection, settings: Any, split: str) -> Iterator[dict]:
    columns = "id, text, is_reply, likes, post_text, root, root_is_bot, parent, parent_is_bot"
    for row in select(con, f"SELECT {columns} FROM kept WHERE split = '{split}' ORDER BY id, n"):
        prompt, post = prompt_row(settings, row)
        meta = {"id": row["id"], "post": post, "reply": row["is_reply"], "to_bot": row["parent_is_bot"]}
        meta["likes"] = row["likes"]
        yield {"prompt": prompt, "completion": answer(row["text"]), "meta": meta}


def pref_rows(con: DuckDBPyConnection, settings: Any, split: str) -> Iterator[dict]:
    order = "sha256(chosen || chr(10) || rejected), source, post_text"
    for row in select(con, f"SELECT * FROM pair WHERE split = '{split}' ORDER BY {order}"):
        prompt, post = prompt_row(settings, row)
        meta = {
            "id": text_id(row["chosen"], row["rejected"], post),
            "post": post,
            "source": row["source"],
            "why": row["why"],
        }
        meta |= {"likes_chosen": row["likes_chosen"], "likes_rejected": row["likes_rejected"]}
        yield {"prompt": prompt, "chosen": answer(row["chosen"]), "rejected": answer(row["rejected"]), "meta": meta}


def kto_rows(con: DuckDBPyConnection, settings: Any, split: str) -> Iterator[dict]:
    """Comments far above the median of their thread's likes are good, those far below bad."""
    text, labels = "", {}
    query = f"SELECT * FROM verdict WHERE split = '{split}' ORDER BY sha256(text), post_text, parent, id"
    for row in select(con, query):
        prompt, post = prompt_row(settings, row)
        if row["text"] != text:
            text, labels = row["text"], {}
        if labels.setdefault(str(prompt), row["label"]) != row["label"]:
            continue  # posts that are cut to one text: the first comment decides
        meta = {"id": text_id(row["text"], post, row["parent"]), "post": post, "likes": row["likes"]}
        meta["why"] = f"one thread, likes {row['likes']}, median {row['usual']:g}"
        yield {"prompt": prompt, "completion": answer(row["text"]), "label": row["label"], "meta": meta}


def prompt_rows(con: DuckDBPyConnection, settings: Any, split: str) -> Iterator[dict]:
    """One prompt a post; the reference is its best liked human comment, where it has one: never a target here."""
    limit = f"LIMIT {settings.max_prompts}" if settings.max_prompts else ""
    query = f"""SELECT min(p.text) AS post_text, '' AS root, false AS root_is_bot, '' AS parent, false AS parent_is_bot,
        min_by(k.text, (-coalesce(k.likes, 0), k.id)) AS reference FROM post p LEFT JOIN kept k ON k.post = p.n
            AND NOT k.is_reply
        WHERE p.split = '{split}' AND p.reason IS NULL GROUP BY p.key ORDER BY sha256(p.key) {limit}"""
    for row in select(con, query):
        prompt, post = prompt_row(settings, row)
        meta = {"id": post, "post": post, "reply": False, "to_bot": False, "reference": row["reference"]}
        yield {"prompt": prompt, "meta": meta}


KINDS = {"sft": sft_rows, "pref": pref_rows, "kto": kto_rows, "prompts": prompt_rows}
