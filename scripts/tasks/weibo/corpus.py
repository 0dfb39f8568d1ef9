"""From raw Weibo tables to comments worth learning and preference pairs, in DuckDB: larger than memory, each rule
counted.

The order of the rules is fixed and is the order of the report; a record falls to the first one that applies:
aliases -> normalise -> structure -> post's own rules -> split -> accounts -> text -> thread -> near-copies -> caps.
Nothing depends on the order of the records, nor on their ids where anything else can decide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.weibo import cleaning as weibo_text

if TYPE_CHECKING:
    import duckdb
    import pyarrow

MAX_RAW = 10_000  # characters of a raw text; a longer one is no comment, whatever it is
NEAR = 0.8  # Jaccard similarity of character 3-grams from which two texts are near-copies
NEAR_CHARACTERS = 10  # shorter texts are compared whole
BANDS, BAND_ROWS = 8, 4  # of the MinHash: a pair of similarity .8 meets in some band with .985, one of .5 with .40
BATCH = 20_000  # rows handed to a worker process


@dataclass(frozen=True)
class Rules:
    """Numbers of stage 11's settings that the rules need."""

    held_out: int
    min_characters: int
    max_characters: int
    bot_calls: bool
    cap_text: int
    cap_user: int
    cap_prominent: int
    high_volume: int
    min_margin: float
    pairs_per_thread: int


# --- what Python works out for each text, in batches, on every core


def _bands(keys: list[str]):
    """[rows] lists of BANDS numbers; equal numbers at one place make two texts candidates. None for short texts."""
    import numpy as np
    from rensa import RMinHash

    long = [i for i, key in enumerate(keys) if len(key) >= NEAR_CHARACTERS]
    sets = [weibo_text.shingles(keys[i]) for i in long]
    digests = np.array(RMinHash.digests_from_token_sets(sets, BANDS * BAND_ROWS, 1), dtype=np.uint64)
    digests = digests.reshape(len(long), BANDS * BAND_ROWS)  # also where there is none
    mixed = np.zeros((len(long), BANDS), dtype=np.uint64)
    for column in range(BAND_ROWS):  # wraps around at 2**64, as a hash does
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + digests[:, column::BAND_ROWS]
    bands: list = [None] * len(keys)
    for i, row in zip(long, mixed.tolist(), strict=True):
        bands[i] = row
    return bands


def _as_columns(rows: list[dict], names: tuple[str, ...]) -> dict[str, list]:
    """Rows as columns, and the column `bands` of their keys."""
    columns = {name: [row[name] for row in rows] for name in names}
    return {**columns, "bands": _bands(columns["key"])}


POST_COLUMNS = ("text", "key", "split", "half", "bot_words", "quotes_bot", "verdict")
COMMENT_COLUMNS = ("text", "key", "fault", "calls", "quotes_bot", "characters", "emoji", "verdict", "parent_text")


def digest_posts(columns: dict) -> dict:
    """Columns n, text, held_out (percent) of a batch of raw posts -> columns of table post_text."""
    rows = []
    for raw, held_out in zip(columns["text"], columns["held_out"], strict=True):
        whole = weibo_text.HALF_CHARACTER.sub("", raw)
        text = weibo_text.clean(whole)
        chain = weibo_text.quotes(whole) if "//" in whole else []
        row = {"text": text, "key": weibo_text.key(text), "half": len(whole) < len(raw)}
        row["split"] = weibo_text.split_of(row["key"], held_out)
        row["bot_words"] = chain[0][1] if chain and chain[0][0] in weibo_text.BOT_NAMES else ""
        row["quotes_bot"] = weibo_text.quotes_bot(whole)
        row["verdict"] = weibo_text.verdict(text) if row["bot_words"] else 0
        rows.append(row)
    return {"n": columns["n"], **_as_columns(rows, POST_COLUMNS)}


def digest_comments(columns: dict) -> dict:
    """Columns n, text, parent_text, max_characters of a batch of raw comments -> columns of table comment_text."""
    rows = []
    for raw, raw_parent, limit in zip(columns["text"], columns["parent_text"], columns["max_characters"], strict=True):
        text = weibo_text.clean(raw)
        row = {"text": text, "key": weibo_text.key(text), "fault": weibo_text.fault(text, limit)}
        row |= {"calls": "罗伯特" in raw, "quotes_bot": weibo_text.quotes_bot(raw)}
        row |= {"characters": weibo_text.characters(text), "emoji": weibo_text.has_emoji(text)}
        parent = weibo_text.HALF_CHARACTER.sub("", weibo_text.clean(raw_parent)) if raw_parent else ""
        rows.append({**row, "verdict": weibo_text.verdict(text), "parent_text": parent})
    return {"n": columns["n"], **_as_columns(rows, COMMENT_COLUMNS)}


def _work(function: Callable[[dict], dict], schema: pyarrow.Schema, batch: pyarrow.RecordBatch):
    """One batch in a worker: Arrow in, Arrow out, which costs the main process next to nothing."""
    import pyarrow

    return pyarrow.record_batch(function(batch.to_pydict()), schema=schema)


def _digest(
    con: duckdb.DuckDBPyConnection,
    query: str,
    function: Callable[[dict], dict],
    table: str,
    columns: str,
    workers: int,
    label: str,
) -> None:
    """Run `function` over the rows of `query`, batch by batch, into a new table; more than one batch goes to worker
    processes."""
    import pyarrow
    from tqdm import tqdm

    con.execute(f"CREATE TABLE {table} ({columns})")
    total = con.execute(f"SELECT count(*) FROM ({query})").fetchone()[0]
    cursor, target = con.cursor(), con.cursor()
    batches = cursor.sql(query).to_arrow_reader(BATCH)  # a stream: never the whole table in memory
    types = {
        "BIGINT": pyarrow.int64(),
        "VARCHAR": pyarrow.string(),
        "BOOLEAN": pyarrow.bool_(),
        "TINYINT": pyarrow.int8(),
        "INTEGER": pyarrow.int32(),
        "UBIGINT[]": pyarrow.list_(pyarrow.uint64()),
    }
    schema = pyarrow.schema(
        [(name, types[kind]) for name, kind in (column.rsplit(" ", 1) for column in columns.split(", "))]
    )

    def results() -> Iterator:
        if total <= BATCH or workers < 2:
            yield from (_work(function, schema, batch) for batch in batches)
            return
        # a fresh interpreter each: forking would copy DuckDB's threads
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            waiting: deque = deque()
            for batch in batches:
                waiting.append(pool.submit(_work, function, schema, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    with tqdm(total=total, desc=label, unit=" rows", mininterval=1) as progress:
        for result in results():
            target.from_arrow(pyarrow.Table.from_batches([result])).insert_into(table)
            progress.update(result.num_rows)


# --- posts


def make_posts(con: duckdb.DuckDBPyConnection, rules: Rules, workers: int) -> None:
    """Table post: one row a record of raw_post, with cleaned text, key, split and the reason it is dropped for, if
    any."""
    con.execute("CREATE TABLE post_key AS SELECT n, k AS key FROM (SELECT DISTINCT n, unnest(keys) AS k FROM raw_post)")
    con.execute(f"""CREATE TABLE post_structure AS SELECT n, CASE
        WHEN kind <> 'OBJECT' THEN 'not an object'
        WHEN len(keys) = 0 THEN 'no id'
        WHEN text IS NULL OR trim(text) = '' THEN 'no content'
        WHEN length(text) > {MAX_RAW} THEN 'over {MAX_RAW:,} characters'
        WHEN row_number() OVER (PARTITION BY kind, keys[1] ORDER BY created, sha256(coalesce(text, '')),
            n) > 1 THEN 'duplicate id'
        END AS reason FROM raw_post""")
    _digest(
        con,
        f"""SELECT n, text, {rules.held_out} AS held_out FROM raw_post JOIN post_structure USING (n)
            WHERE reason IS NULL
            ORDER BY n""",
        digest_posts,
        "post_text",
        "n BIGINT, text VARCHAR, key VARCHAR, split VARCHAR, half BOOLEAN, bot_words VARCHAR, quotes_bot BOOLEAN, "
        "verdict TINYINT, bands UBIGINT[]",
        workers,
        "posts",
    )
    print("posts: copies of held-out ones", flush=True)
    con.execute(f"""CREATE TABLE post_place AS SELECT n, row_number() OVER (ORDER BY {_when("created")}, p.key,
        sha256(r.text), n) AS place,
        split, p.key, bands FROM post_text p JOIN raw_post r USING (n) WHERE p.text <> '' AND NOT quotes_bot""")
    # A copy of a held-out post is dropped, not moved: the split of a row then depends on nothing but its own post.
    con.execute("""CREATE TABLE post_bucket AS SELECT band, value, min(place) FILTER (split = 'test') AS test,
        min(place) FILTER (split = 'val') AS val FROM (SELECT place, split, unnest(bands) AS value,
            generate_subscripts(bands, 1) AS band
        FROM post_place WHERE bands IS NOT NULL) GROUP BY ALL HAVING count(DISTINCT split) > 1""")
    con.execute(f"""CREATE TABLE post_copy AS WITH met AS (SELECT b.key, b.split, test, val FROM (SELECT key, split,
            unnest(bands) AS value, generate_subscripts(bands, 1) AS band FROM post_place WHERE bands IS NOT NULL
                AND split <> 'test') b
            JOIN post_bucket USING (band, value)), candidate AS (
        SELECT key, test AS leader FROM met WHERE test IS NOT NULL
        UNION SELECT key, val FROM met WHERE val IS NOT NULL AND split = 'train')
        SELECT DISTINCT c.key FROM candidate c JOIN post_place l ON l.place = leader WHERE similarity(c.key,
            l.key) >= {NEAR}""")
    con.execute("""CREATE TABLE post AS SELECT n, r.original, t.text, t.key, t.split, t.half, t.bot_words, t.verdict,
        CASE WHEN s.reason IS NOT NULL THEN s.reason WHEN t.text = '' THEN 'nothing left after cleaning'
            WHEN t.quotes_bot THEN
        'quotes the bot' WHEN c.key IS NOT NULL THEN 'near-copy of a held-out post' END AS reason
        FROM raw_post r JOIN post_structure s USING (n) LEFT JOIN post_text t USING (n) LEFT JOIN post_copy c
            ON c.key = t.key""")
    # a comment finds its post under any of the post's ids; under several posts of one id it goes to the one that is
    # kept
    con.execute("""CREATE TABLE post_of AS SELECT k.key, coalesce(min(k.n) FILTER (reason IS NULL), min(k.n)) AS post
        FROM post_key k JOIN post p USING (n) GROUP BY k.key""")


def _when(column: str) -> str:
    """The SQL of a date as DuckDB's timestamp: ours, or that of Weibo's API; NULL where it is neither."""
    api = f"try_strptime(regexp_replace({column}, ' [+-][0-9]{{4}} ', ' '), '%a %b %d %H:%M:%S %Y')"
    return f"coalesce(try_strptime({column}, '%Y-%m-%d %H:%M:%S'), {api})"


# --- comments


def make_comments(con: duckdb.DuckDBPyConnection, rules: Rules, workers: int) -> None:
    """Table comment: one row a record of raw_comment, with its post, thread, account, and the reason it is dropped for,
    if any.

    A row of the bot has is_bot and, where it is whole, no reason: it is set aside for pairs and never a target.
    """
    names = ", ".join(f"'{name}'" for name in weibo_text.BOT_NAMES)
    bot = f"user = '{weibo_text.BOT_ID}' OR starts_with(place, '{weibo_text.BOT_LOCATION}') OR name IN ({names})"
    con.execute(f"""CREATE TABLE comment_structure AS SELECT n, r.post AS post_key, post_of.post, coalesce({bot},
        false) AS is_bot, CASE
        WHEN kind <> 'OBJECT' THEN 'not an object'
        WHEN r.key IS NULL THEN 'no id'
        WHEN text IS NULL OR trim(text) = '' THEN 'no content'
        WHEN length(text) > {MAX_RAW} THEN 'over {MAX_RAW:,} characters'
        WHEN row_number() OVER (PARTITION BY kind, r.key ORDER BY created, sha256(coalesce(text, '')),
            n) > 1 THEN 'duplicate id'
        WHEN post_of.post IS NULL THEN 'no such post'
        END AS reason FROM raw_comment r LEFT JOIN post_of ON post_of.key = r.post""")
    _digest(
        con,
        f"""SELECT n, text, CASE WHEN length(parent_text) <= {MAX_RAW} THEN parent_text END AS parent_text,
            {rules.max_characters} AS max_characters FROM raw_comment JOIN comment_structure USING (n)
                WHERE reason IS NULL ORDER BY n""",
        digest_comments,
        "comment_text",
        "n BIGINT, text VARCHAR, key VARCHAR, fault VARCHAR, calls BOOLEAN, quotes_bot BOOLEAN, "
        "characters INTEGER, emoji BOOLEAN, verdict TINYINT, parent_text VARCHAR, bands UBIGINT[]",
        workers,
        "comments",
    )
    print("comments: accounts, threads, near-copies, caps", flush=True)
    _make_accounts(con, rules)
    # the thread: the comment replied to, by the text that stands in the reply itself, else by its id; and the one that
    # opened the thread
    con.execute(f"""CREATE TABLE thread AS WITH reply AS (
            SELECT n, key, coalesce(parent, CASE WHEN root NOT IN (key, '0') THEN root END) AS parent_key,
                parent_text AS raw_parent,
                CASE WHEN root NOT IN (key, '0') AND root <> parent THEN root END AS root_key,
                coalesce(parent_user = '{weibo_text.BOT_ID}' OR parent_name IN ({names}), false) AS parent_is_bot
            FROM raw_comment), known AS (
            SELECT r.key, min(n) AS n FROM raw_comment r JOIN comment_structure s USING (n) WHERE s.reason IS NULL
                GROUP BY r.key)
        SELECT a.n, a.parent_key IS NOT NULL OR a.raw_parent IS NOT NULL AS is_reply, p.n AS parent_n,
            coalesce(nullif(t.parent_text, ''), pt.text, '') AS parent, a.parent_is_bot OR coalesce(ps.is_bot,
                false) AS parent_is_bot,
            coalesce(rt.text, '') AS root, coalesce(rs.is_bot, false) AS root_is_bot
        FROM reply a JOIN comment_text t USING (n) LEFT JOIN known p ON p.key = a.parent_key LEFT JOIN comment_text pt
            ON pt.n = p.n
            LEFT JOIN comment_structure ps ON ps.n = p.n LEFT JOIN known o ON o.key = a.root_key LEFT
                JOIN comment_text rt ON rt.n = o.n
            LEFT JOIN comment_structure rs ON rs.n = o.n""")
    con.execute("""CREATE TABLE bot_key AS SELECT DISTINCT key FROM comment_text JOIN comment_structure USING (n)
        WHERE is_bot AND length(key) > 5""")
    calls = "false" if rules.bot_calls else "t.calls AND NOT th.is_reply"
    con.execute(f"""CREATE TABLE comment AS SELECT n, s.post, s.is_bot, p.split, p.key AS post_key, th.is_reply,
        th.parent_n, th.parent,
        th.parent_is_bot, th.root, th.root_is_bot, t.text, t.key, t.characters, t.emoji, t.verdict, t.calls, r.user,
            a.class,
        r.key AS own_key, substr(sha256(t.text || chr(10) || p.key || chr(10) || coalesce(th.parent, '')), 1, 12) AS id,
        CASE WHEN r.likes >= 0 THEN r.likes END AS likes, {_when("r.created")} AS created,
        CASE WHEN s.reason IS NOT NULL THEN s.reason WHEN p.reason IS NOT NULL THEN 'its post is dropped'
        WHEN s.is_bot THEN CASE WHEN t.text = '' THEN 'nothing left after cleaning' END
        WHEN a.class IN ('organisation', 'low credit', 'advertiser') THEN 'account: ' || a.class
        WHEN t.quotes_bot THEN 'quotes the bot'
        WHEN t.fault <> '' THEN t.fault
        WHEN t.characters < {rules.min_characters} THEN 'fewer than {rules.min_characters} characters'
        WHEN b.key IS NOT NULL THEN 'the words of a bot reply'
        WHEN length(t.key) > 7 AND contains(p.key, t.key) THEN 'copied from the post'
        WHEN {calls} THEN 'calls the bot instead of answering the post'
        WHEN th.is_reply AND th.parent = '' THEN 'reply whose parent has no text'
        END AS reason
        FROM comment_structure s JOIN raw_comment r USING (n) LEFT JOIN post p ON p.n = s.post LEFT JOIN comment_text t
            USING (n)
            LEFT JOIN thread th USING (n) LEFT JOIN account a ON a.key = r.user LEFT JOIN bot_key b ON b.key = t.key""")
    # who comes first among equals: the older comment, then the text itself
    con.execute("""CREATE TABLE place AS SELECT n, id, c.key, user, class, bands, row_number() OVER (ORDER BY created,
        id, own_key) AS place
        FROM comment c JOIN comment_text USING (n) WHERE reason IS NULL AND NOT is_bot""")
    con.execute("""CREATE TABLE bucket AS SELECT band, value, min(place) AS leader FROM (SELECT place,
        unnest(bands) AS value,
        generate_subscripts(bands, 1) AS band FROM place WHERE bands IS NOT NULL) GROUP BY ALL HAVING count(*) > 1""")
    con.execute(f"""CREATE TABLE near_copy AS SELECT DISTINCT c.n FROM (SELECT DISTINCT n, key, leader FROM (SELECT n,
        key, place,
            unnest(bands) AS value, generate_subscripts(bands, 1) AS band FROM place WHERE bands IS NOT NULL)
            JOIN bucket USING (band, value) WHERE leader < place) c
        JOIN place l ON l.place = c.leader WHERE c.key = l.key OR similarity(c.key, l.key) >= {NEAR}""")
    con.execute("""CREATE TABLE same_row AS SELECT n FROM place ANTI JOIN near_copy USING (n)
        QUALIFY row_number() OVER (PARTITION BY id ORDER BY place) > 1""")
    con.execute(f"""CREATE TABLE text_cap AS SELECT n, row_number() OVER (PARTITION BY key
        ORDER BY place) > {rules.cap_text} AS over
        FROM place ANTI JOIN near_copy USING (n) ANTI JOIN same_row USING (n)""")
    con.execute(f"""CREATE TABLE user_cap AS SELECT n, class, user IS NOT NULL AND row_number() OVER (PARTITION BY user
        ORDER BY sha256(p.key), place) > CASE WHEN class = 'prominent' THEN {rules.cap_prominent}
            ELSE {rules.cap_user} END AS over
        FROM place p JOIN text_cap t USING (n) WHERE NOT t.over""")
    con.execute(f"""UPDATE comment SET reason = late.reason FROM (
        SELECT n, 'near-copy of an earlier comment' AS reason FROM near_copy
        UNION ALL SELECT n, 'the same comment on the same post text' FROM same_row
        UNION ALL SELECT n, 'text seen {rules.cap_text} times already' FROM text_cap WHERE over
        UNION ALL SELECT n, CASE WHEN class = 'prominent' THEN 'cap of verified and high-volume accounts'
            ELSE 'cap of a user' END
            FROM user_cap WHERE over) late WHERE comment.n = late.n""")


def _make_accounts(con: duckdb.DuckDBPyConnection, rules: Rules) -> None:
    """Table account: one class a user who comments. The users file wins over what a comment says about its writer."""
    con.execute("""CREATE TABLE listed AS SELECT key, max(lower(verified)) AS verified,
        max(verified_type) AS verified_type,
        max(statuses) AS statuses, max(credit) AS credit FROM raw_account WHERE key IS NOT NULL GROUP BY key""")
    con.execute(f"""CREATE TABLE account AS WITH written AS (
            SELECT user AS key, max(lower(verified)) AS verified, max(verified_type) AS verified_type,
                max(statuses) AS statuses
            FROM raw_comment WHERE user IS NOT NULL GROUP BY user), behaviour AS (
            SELECT user AS key, count(*) AS comments,
                count(*) FILTER (fault IN ('advertisement', 'contact details or personal data')) AS adverts
            FROM raw_comment JOIN comment_text USING (n) GROUP BY user), repeats AS (
            SELECT user AS key, max(posts) AS posts FROM (SELECT user, t.key, count(DISTINCT r.post) AS posts
                FROM raw_comment r
                JOIN comment_text t USING (n) WHERE length(t.key) >= {NEAR_CHARACTERS} GROUP BY ALL) GROUP BY user)
        SELECT key, l.key IS NOT NULL AS listed, CASE
            WHEN coalesce(l.verified, w.verified) = 'true' AND coalesce(l.verified_type, w.verified_type) BETWEEN 1
                AND 7
                THEN 'organisation'
            WHEN l.credit IN ('信用较低', '信用极低') THEN 'low credit'
            WHEN (b.comments > 2 AND b.adverts * 2 > b.comments) OR p.posts > 2 THEN 'advertiser'
            WHEN coalesce(l.verified, w.verified) = 'true' OR coalesce(l.statuses,
                w.statuses) >= {rules.high_volume} THEN 'prominent'
            ELSE 'ordinary' END AS class
        FROM written w LEFT JOIN listed l USING (key) LEFT JOIN behaviour b USING (key) LEFT JOIN repeats p USING (key)
        WHERE key <> '{weibo_text.BOT_ID}'""")


# --- pairs

KEPT = (
    "SELECT c.*, p.text AS post_text FROM comment c JOIN post p ON p.n = c.post WHERE c.reason IS NULL AND NOT c.is_bot"
)


def make_pairs(con: duckdb.DuckDBPyConnection, rules: Rules, recipe: str) -> dict[str, dict]:
    """Table pair, and for each source what it was made from, what was left out and why."""
    print("pairs", flush=True)
    con.execute(f"CREATE VIEW kept AS {KEPT}")
    con.execute("""CREATE TABLE pair (split VARCHAR, post BIGINT, post_text VARCHAR, is_reply BOOLEAN, root VARCHAR,
        root_is_bot BOOLEAN,
        parent VARCHAR, parent_is_bot BOOLEAN, chosen VARCHAR, rejected VARCHAR, source VARCHAR, why VARCHAR,
            likes_chosen BIGINT,
        likes_rejected BIGINT)""")
    # neighbours of about one length, in an order that comes from the texts: where pairs with another post's comment
    # come from
    con.execute("""CREATE TABLE neighbour AS SELECT n, unnest([1, 2, 3, 4]) AS turn,
        unnest([lead(n, 1) OVER w, lead(n, 2) OVER w, lead(n, 3) OVER w, lead(n, 4) OVER w]) AS other FROM kept
            WHERE NOT is_reply
        WINDOW w AS (PARTITION BY split, emoji, round(2 * log2(characters + 1)) ORDER BY id, n)""")
    if recipe == "classic":
        return _classic_pairs(con)
    return {
        "likes": _like_pairs(con, rules),
        "human_over_bot": _bot_pairs(con, rules),
        "relevance": _relevance_pairs(con),
    }


def make_verdicts(con: duckdb.DuckDBPyConnection, rules: Rules) -> dict[str, int]:
    """Table verdict: human comments whose log(1 + likes) lies half of min_margin or more above the median of their
    thread (good) or below it (bad), so that both sides of a pair are among them where the thread has no third comment;
    of each thread at most pairs_per_thread of a kind."""
    con.execute(f"""CREATE TABLE verdict AS SELECT *, far > 0 AS label FROM (
        SELECT *, ln(1 + likes) - median(ln(1 + likes)) OVER thread AS far, median(likes) OVER thread AS usual,
        count(*) OVER thread AS size FROM kept WHERE likes IS NOT NULL WINDOW thread AS (PARTITION BY post, parent))
        WHERE size > 1 AND abs(far) >= {rules.min_margin} / 2
        QUALIFY row_number() OVER (PARTITION BY post, parent, far > 0 ORDER BY abs(far) DESC, id)
            <= {rules.pairs_per_thread}""")
    return {word: _count(con, f"FROM verdict WHERE {test}") for word, test in (("good", "label"), ("bad", "NOT label"))}


def _count(con: duckdb.DuckDBPyConnection, query: str) -> int:
    return con.execute(f"SELECT count(*) FROM ({query})").fetchone()[0]


def _like_pairs(con: duckdb.DuckDBPyConnection, rules: Rules) -> dict:
    """Two human comments under one prompt, log(1 + likes) apart by min_margin or more; each comment stands in one pair
    at most."""
    con.execute("""CREATE TABLE ranked AS SELECT n, row_number() OVER (thread ORDER BY likes DESC, id) AS high,
        row_number() OVER (thread ORDER BY likes, id) AS low, count(*) OVER thread AS size,
        max(likes) OVER thread > min(likes) OVER thread AS varies
        FROM kept WHERE likes IS NOT NULL WINDOW thread AS (PARTITION BY post, parent)""")
    con.execute("CREATE TABLE liked AS SELECT * FROM kept JOIN ranked USING (n) WHERE size > 1")
    rank = """c.high = r.low AND c.high + r.low <= c.size AND c.post = r.post AND c.parent = r.parent AND c.key <> r.key
        AND c.likes > r.likes"""
    con.execute(f"""INSERT INTO pair SELECT c.split, c.post, c.post_text, c.is_reply, c.root, c.root_is_bot, c.parent,
        c.parent_is_bot,
        c.text, r.text, 'likes', 'one thread, likes ' || c.likes || ' : ' || r.likes, c.likes, r.likes FROM liked c
            JOIN liked r ON {rank}
        WHERE ln(1 + c.likes) - ln(1 + r.likes) >= {rules.min_margin} AND c.high <= {rules.pairs_per_thread}""")
    return {
        "threads with two comments or more": _count(con, "SELECT DISTINCT post, parent FROM liked WHERE size > 1"),
        "threads whose likes differ": _count(con, "SELECT DISTINCT post, parent FROM liked WHERE varies"),
        "left out: margin too small": _count(
            con,
            (
                f"SELECT 1 FROM liked c JOIN liked r ON {rank} WHERE ln(1 + c.likes) - ln(1 + r.likes) < "
                f"{rules.min_margin}"
            ),
        ),
    }


def _bot_pairs(con: duckdb.DuckDBPyConnection, rules: Rules) -> dict:
    """The best liked human comment against the bot's reply to the same post, where people took the bot's reply badly or
    liked it less."""
    # what the bot said under a post, from its comments and from the chains of posts that forward them, and how people
    # took it
    con.execute("""CREATE TABLE bot_words AS SELECT post, key, min(text) AS text, max(likes) AS likes, sum(up) AS up,
        sum(down) AS down
        FROM (
            SELECT b.post, b.key, b.text, b.likes, 0 AS up, 0 AS down FROM comment b WHERE b.is_bot
                AND b.reason IS NULL AND NOT b.is_reply
            UNION ALL SELECT b.post, b.key, b.text, NULL, (r.verdict > 0)::INT, (r.verdict < 0)::INT
                FROM comment r JOIN comment b ON b.n = r.parent_n WHERE b.is_bot AND b.reason IS NULL
                    AND NOT b.is_reply AND NOT r.is_bot
            UNION ALL SELECT o.n, word_key(f.bot_words), f.bot_words, NULL, (f.verdict > 0)::INT, (f.verdict < 0)::INT
                FROM post f JOIN post_of k ON k.key = f.original JOIN post o ON o.n = k.post WHERE f.bot_words <> ''
                    AND o.reason IS NULL)
        GROUP BY post, key""")
    con.execute("""CREATE TABLE answered AS SELECT w.*, w.key AS bot_key, c.split, c.post_text, c.text AS human,
        c.likes AS human_likes,
        c.key AS human_key FROM bot_words w JOIN (SELECT *, row_number() OVER (PARTITION BY post
            ORDER BY likes DESC NULLS LAST, id) AS best
        FROM kept WHERE NOT is_reply AND NOT calls AND characters > 3) c ON c.post = w.post AND c.best = 1""")
    margin = "ln(1 + human_likes) - ln(1 + likes)"
    liked, disliked = (
        f"coalesce({margin} {test}, false)" for test in (f">= {rules.min_margin}", f"<= -{rules.min_margin}")
    )
    con.execute(f"""INSERT INTO pair SELECT split, post, post_text, false, '', false, '', false, human, text,
        'human_over_bot',
        CASE WHEN down > up THEN 'people answer the bot with disapproval: ' || down || ' against ' || up
        ELSE 'likes ' || human_likes || ' : ' || likes || ' of the bot' END, human_likes, likes
        FROM answered WHERE human_key <> bot_key AND NOT {disliked} AND (down > up OR (down = 0 AND up = 0
            AND {liked}))""")
    return {
        "bot replies under a post": _count(con, "FROM bot_words"),
        "with a human comment beside": _count(con, "FROM answered"),
        "left out: the bot's reply is liked more": _count(con, f"FROM answered WHERE {disliked}"),
        "left out: approved, or as often as not": _count(
            con, f"FROM answered WHERE NOT {disliked} AND up >= down AND up > 0"
        ),
        "left out: no reaction that decides": _count(
            con, f"FROM answered WHERE NOT {disliked} AND up = 0 AND down = 0 AND NOT {liked}"
        ),
    }


def _relevance_pairs(con: duckdb.DuckDBPyConnection) -> dict:
    """A comment that takes up words of its post against one of another post, of about its length, that takes up none;
    one a post."""
    con.execute("""CREATE TABLE on_topic AS SELECT *, row_number() OVER (PARTITION BY post ORDER BY id) AS turn
        FROM kept
        WHERE NOT is_reply AND characters > 5 AND shares_topic(post_text, text)""")
    con.execute("""CREATE TABLE partner AS SELECT c.n, min_by(o.n, b.turn) AS other FROM on_topic c JOIN neighbour b
        USING (n)
        JOIN comment o ON o.n = b.other WHERE c.turn = 1 AND o.post_key <> c.post_key AND o.key <> c.key
        AND NOT shares_topic(c.post_text, o.text) GROUP BY c.n""")
    con.execute("""INSERT INTO pair SELECT c.split, c.post, c.post_text, false, '', false, '', false, c.text, o.text,
        'relevance',
        'takes up words of its post; the other belongs to another post', c.likes, NULL
        FROM on_topic c JOIN partner USING (n) JOIN comment o ON o.n = partner.other""")
    return {
        "top-level comments": _count(con, "FROM kept WHERE NOT is_reply"),
        "left out: too short or not on the post's words": _count(
            con, "FROM kept WHERE NOT is_reply AND n NOT IN (SELECT n FROM on_topic)"
        ),
        "left out: second and further of a post": _count(con, "FROM on_topic WHERE turn > 1"),
        "left out: no other comment fits": _count(
            con, "FROM on_topic WHERE turn = 1 AND n NOT IN (SELECT n FROM partner)"
        ),
    }


def _classic_pairs(con: duckdb.DuckDBPyConnection) -> dict[str, dict]:
    """The older published recipe: score = ln(likes + 1), -1 under 5 characters, +0.5 for 10 to 60, +0.2 for an emoji;
    chosen has 2 likes or more; rejected is the lowest of the same post by more than 0.5, else a comment of another
    post."""
    con.execute("""CREATE TABLE scored AS SELECT *,
        ln(likes + 1) - (characters < 5)::INT + 0.5 * (characters BETWEEN 10 AND 60)::INT
        + 0.2 * emoji::INT AS score FROM kept WHERE NOT is_reply AND likes IS NOT NULL""")
    con.execute("""CREATE TABLE worst AS SELECT c.n, min_by(r.n, (r.score, r.id)) AS other FROM scored c JOIN scored r
        ON r.post = c.post
        WHERE c.likes > 1 AND c.score - r.score > 0.5 AND c.key <> r.key GROUP BY c.n""")
    con.execute("""CREATE TABLE elsewhere AS SELECT c.n, min_by(o.n, b.turn) AS other FROM scored c JOIN neighbour b
        USING (n)
        JOIN comment o ON o.n = b.other WHERE c.likes > 1 AND o.post_key <> c.post_key AND o.key <> c.key
        AND c.n NOT IN (SELECT n FROM worst) GROUP BY c.n""")
    for source, table, why in (
        ("classic_same_post", "worst", "score above another comment of the post by more than 0.5"),
        ("classic_other_post", "elsewhere", "liked twice or more; the other belongs to another post"),
    ):
        con.execute(f"""INSERT INTO pair SELECT c.split, c.post, c.post_text, false, '', false, '', false, c.text,
            o.text,
            '{source}', '{why}', c.likes, o.likes FROM scored c JOIN {table} t USING (n) JOIN comment o
                ON o.n = t.other""")
    liked = {"comments with 2 likes or more": _count(con, "FROM scored WHERE likes > 1")}
    left = "FROM scored WHERE likes > 1 AND n NOT IN (SELECT n FROM worst) AND n NOT IN (SELECT n FROM elsewhere)"
    return {
        "classic_same_post": liked,
        "classic_other_post": liked | {"left out: no other comment fits": _count(con, left)},
    }


# --- the connection, and the counts


def connect(path: Path, memory_gib: float, workers: int) -> duckdb.DuckDBPyConnection:
    """A DuckDB database that keeps to its memory; what does not fit goes to files under `path`."""
    import duckdb

    con = duckdb.connect()
    con.execute(f"SET memory_limit = '{int(memory_gib * 1024)}MiB'")
    con.execute(f"SET threads = {workers}")
    con.execute(f"SET temp_directory = '{path / 'spill'}'")
    con.execute("SET preserve_insertion_order = false")
    con.execute("SET enable_progress_bar = false")
    con.create_function("similarity", similarity, ["VARCHAR", "VARCHAR"], "DOUBLE")
    con.create_function("shares_topic", weibo_text.shares_topic, ["VARCHAR", "VARCHAR"], "BOOLEAN")
    con.create_function("word_key", weibo_text.key, ["VARCHAR"], "VARCHAR")
    return con


def similarity(first: str, second: str) -> float:
    """Jaccard similarity of the two texts' character 3-grams, exactly: MinHash only names the candidates."""
    a, b = set(weibo_text.shingles(first)), set(weibo_text.shingles(second))
    return len(a & b) / len(a | b)


def counts(con: duckdb.DuckDBPyConnection, fixed: dict[str, dict]) -> dict:
    """What was read, kept and dropped, by reason, for posts, comments and accounts; read = kept + set aside +
    dropped."""

    def tally(query: str) -> dict[str, int]:
        return dict(
            con.execute(
                f"SELECT name, count(*) AS size FROM ({query}) GROUP BY name ORDER BY size DESC, name"
            ).fetchall()
        )

    def noted(table: str, extra: dict[str, str]) -> dict[str, int]:
        notes = {
            "bare NaN read as missing": f"FROM raw_{table} WHERE nan",
            "negative like count: unknown": f"FROM raw_{table} WHERE likes < 0",
            "no like count, or not a number": f"FROM raw_{table} WHERE kind = 'OBJECT' AND likes IS NULL",
            "date not read": f"FROM raw_{table} WHERE kind = 'OBJECT' AND {_when('created')} IS NULL",
        } | extra
        return {name: count for name, query in notes.items() if (count := _count(con, query))} | fixed[table]

    posts = {
        "read": _count(con, "FROM post"),
        "kept": _count(con, "FROM post WHERE reason IS NULL"),
        "dropped": tally("SELECT reason AS name FROM post WHERE reason IS NOT NULL"),
        "noted": noted(
            "post",
            {
                "half a character removed": "FROM post WHERE half",
                "reaction to the bot (its words cut off)": "FROM post WHERE bot_words <> '' AND reason IS NULL",
                "without any kept comment": """FROM post WHERE reason IS NULL
                AND n NOT IN (SELECT post FROM comment WHERE reason IS NULL AND NOT is_bot)""",
            },
        ),
    }
    comments = {
        "read": _count(con, "FROM comment"),
        "kept": _count(con, "FROM comment WHERE reason IS NULL AND NOT is_bot"),
        "set aside: the bot's own": _count(con, "FROM comment WHERE reason IS NULL AND is_bot"),
        "dropped": tally("SELECT reason AS name FROM comment WHERE reason IS NOT NULL"),
        "noted": noted(
            "comment",
            {
                "kept replies": "FROM comment WHERE reason IS NULL AND NOT is_bot AND is_reply",
                "kept replies to the bot": "FROM comment WHERE reason IS NULL AND NOT is_bot AND is_reply "
                "AND parent_is_bot",
            },
        ),
    }
    users = {
        "read": _count(con, "FROM raw_account"),
        "accounts that comment": _count(con, "FROM account"),
        "found in the users file": _count(con, "FROM account WHERE listed"),
        "classes": tally("SELECT class AS name FROM account"),
        "noted": fixed["account"],
    }
    return {"posts": posts, "comments": comments, "users": users}
