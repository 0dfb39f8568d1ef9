"""Weibo: cleaning, rewards, and stage 11 through its real command line on the shipped sample and on small broken
corpora."""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import warm
from conftest import ROOT, SCRIPTS
from tasks import weibo
from tasks.poems import corpus as verse_corpus
from tasks.weibo import cleaning as weibo_text
from tasks.weibo.cleaning import BOT_ID, clean

DATA = ROOT / "data" / "weibo"
NAMES = ("posts", "comments", "users")
SPLITS = ("train", "val", "test")
# written here once more, so that a gap in the stage's own pattern shows
UNWANTED = re.compile(
    r"https?:|(?<![A-Za-z0-9])www\.|//\s*@|@评论罗伯特|[\u200b-\u200f\u2060-\u2064\ufeff\ufffd\ud800-\udfff]"
)


def stage(script: str, *words, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / script), *map(str, words)]
    done = warm.run(command)
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def prepare(folder: Path, output: Path, *words, users: bool = True, check: bool = True) -> subprocess.CompletedProcess:
    """Stage 11 on posts.json, comments.json and users.json in `folder`."""
    files = [word for name in NAMES[: 2 + users] for word in (f"--{name}", folder / f"{name}.json")]
    return stage(
        "11_prepare_weibo.py", *files, *([] if users else ["--users"]), "--output-dir", output, *words, check=check
    )


def rows_of(folder: Path, name: str) -> list[dict]:
    return [
        json.loads(line)
        for split in SPLITS
        for line in (folder / f"{name}_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.name != "run.json"}


def write_arrays(folder: Path, posts, comments, users=()) -> Path:
    folder.mkdir(exist_ok=True)
    for name, records in zip(NAMES, (posts, comments, users), strict=True):
        # half an emoji cannot be written in UTF-8: an escape has to name it
        text = json.dumps(list(records), ensure_ascii=False, indent=1)
        text = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def is_bot(comment: dict) -> bool:
    return comment["comment_user"]["_id"] == BOT_ID


@pytest.fixture(scope="module")
def sample() -> dict[str, list[dict]]:
    return {name: json.loads((DATA / f"sample_{name}.json").read_text(encoding="utf-8")) for name in NAMES}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("weibo") / "data"
    stage("11_prepare_weibo.py", "--output-dir", output)
    return output


# --- what must hold on the sample


def test_no_bot_reply_is_a_target(prepared, sample):
    people, bots = ({clean(c["content"]) for c in sample["comments"] if is_bot(c) == bot} for bot in (False, True))
    targets = [row["completion"][0]["content"] for row in rows_of(prepared, "sft")] + [
        row["chosen"][0]["content"] for row in rows_of(prepared, "pref")
    ]
    references = [row["meta"]["reference"] for row in rows_of(prepared, "prompts") if row["meta"]["reference"]]
    assert len(targets) > 600 and len(references) > 100
    for text in targets + references:
        assert text in people
        assert text not in bots or len(weibo_text.key(text)) <= 5, "two words may be anybody's"


def test_every_reply_row_has_its_parent(prepared, sample):
    parents = {}
    for comment in sample["comments"]:
        if "reply_comment" in comment:
            parents.setdefault(clean(comment["content"]), set()).add(clean(comment["reply_comment"]["text"]))
    replies = [row for row in rows_of(prepared, "sft") if row["meta"]["reply"]]
    assert len(replies) > 200
    for row in replies:
        speaker, _, parent = row["prompt"][0]["content"].rpartition(
            "\n罗伯特：" if row["meta"]["to_bot"] else "\n网友："
        )
        assert speaker and parent
        assert any(weibo_text.cut(text, 80) == parent for text in parents[row["completion"][0]["content"]])


def test_no_post_stands_in_two_splits(prepared):
    posts = {split: set() for split in SPLITS}
    for split in SPLITS:
        for name in ("sft", "pref", "kto", "prompts"):
            lines = (prepared / f"{name}_{split}.jsonl").read_text(encoding="utf-8").splitlines()
            posts[split] |= {json.loads(line)["meta"]["post"] for line in lines}
    assert all(posts.values())
    assert not posts["train"] & posts["val"] and not posts["train"] & posts["test"] and not posts["val"] & posts["test"]


def test_nothing_unwanted_is_left_in_any_text(prepared):
    for name, keys in (
        ("sft", ("prompt", "completion")),
        ("pref", ("prompt", "chosen", "rejected")),
        ("prompts", ("prompt",)),
    ):
        for row in rows_of(prepared, name):
            for key in keys:
                assert not UNWANTED.search(row[key][0]["content"]), row[key][0]["content"]


def test_two_runs_are_identical_whatever_the_order_of_the_records(prepared, sample, tmp_path):
    shuffled = {name: random.Random(1).sample(records, len(records)) for name, records in sample.items()}
    prepare(write_arrays(tmp_path / "in", *shuffled.values()), tmp_path / "out", "--workers", 1)
    assert files_of(tmp_path / "out") == files_of(prepared)


def test_every_record_is_kept_or_has_a_reason(prepared):
    report = report_of(prepared)
    posts, comments = report["posts"], report["comments"]
    assert posts["read"] == 795 == posts["kept"] + sum(posts["dropped"].values())
    aside = comments["set aside: the bot's own"]
    assert comments["read"] == 1209 == comments["kept"] + aside + sum(comments["dropped"].values())
    assert comments["kept"] == sum(split["sft"] for split in report["splits"].values())
    assert posts["noted"]["bare NaN read as missing"] == 73


def test_a_grown_corpus_moves_no_post(prepared, sample, tmp_path):
    kept = [post for post in sample["posts"] if int(hashlib.sha256(post["_id"].encode()).hexdigest(), 16) % 2]
    known = {post["mblogid"] for post in kept}
    comments = [comment for comment in sample["comments"] if comment["root_post_mblogid"] in known]
    prepare(write_arrays(tmp_path / "in", kept, comments, sample["users"]), tmp_path / "half")

    def splits(folder: Path) -> dict[str, str]:
        lines = [
            (line, split)
            for split in SPLITS
            for line in (folder / f"prompts_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return {json.loads(line)["meta"]["post"]: split for line, split in lines}

    small, large = splits(tmp_path / "half"), splits(prepared)
    assert len(small) > 200
    assert all(large[post] == split for post, split in small.items() if post in large)


def test_the_preflight_finds_no_error(tmp_path):
    stage("11_prepare_weibo.py", "--held-out", 15, "--output-dir", tmp_path / "data")
    for name in ("sft", "pref", "prompts"):
        files = [
            "--train-file",
            tmp_path / f"data/{name}_train.jsonl",
            "--val-file",
            tmp_path / f"data/{name}_val.jsonl",
        ]
        stage("19_check_data.py", "--task", "weibo", *files)


def test_the_plain_version_keeps_the_same_comments(prepared, sample, tmp_path):
    """benchmarks/prepare_weibo.py has the rules once more, over dicts instead of SQL."""
    folder = write_arrays(tmp_path / "in", *sample.values())
    command = [sys.executable, str(ROOT / "benchmarks/prepare_weibo.py"), "--plain-input", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout.split() == ["kept", str(report_of(prepared)["comments"]["kept"])], done.stderr
    plain = {
        json.loads(line)["completion"][0]["content"]
        for line in (folder / "plain.jsonl").read_text(encoding="utf-8").splitlines()
    }
    assert plain == {row["completion"][0]["content"] for row in rows_of(prepared, "sft")}


# --- pairs


def test_pairs_by_likes_keep_the_margin(prepared, tmp_path):
    from math import log

    pairs = [row["meta"] for row in rows_of(prepared, "pref") if row["meta"]["source"] == "likes"]
    assert len(pairs) > 10
    assert all(log(1 + pair["likes_chosen"]) - log(1 + pair["likes_rejected"]) >= 1.0 for pair in pairs)
    stage("11_prepare_weibo.py", "--min-margin", 1.5, "--output-dir", tmp_path / "wide")
    wide = [row["meta"] for row in rows_of(tmp_path / "wide", "pref") if row["meta"]["source"] == "likes"]
    assert 0 < len(wide) < len(pairs)
    assert all(log(1 + pair["likes_chosen"]) - log(1 + pair["likes_rejected"]) >= 1.5 for pair in wide)


def test_comments_far_from_the_median_of_their_thread_are_labelled(prepared, sample):
    from math import log
    from statistics import median

    rows = rows_of(prepared, "kto")
    assert {row["label"] for row in rows} == {True, False}
    kept = [(json.dumps(row["prompt"]), row["meta"]) for row in rows_of(prepared, "sft")]
    threads: dict[str, list[int]] = {}
    for prompt, meta in kept:
        if meta["likes"] is not None:
            threads.setdefault(prompt, []).append(meta["likes"])
    checked = 0
    for row in rows:
        likes = threads[json.dumps(row["prompt"])]
        if len(likes) % 2:  # of an even number the median of the logarithms is not that of the likes
            far = log(1 + row["meta"]["likes"]) - log(1 + median(likes))
            assert abs(far) >= 0.5 and (far > 0) == row["label"]
            checked += 1
    assert checked > 3


def test_every_pair_states_its_source_and_reason(prepared):
    pairs = rows_of(prepared, "pref")
    report = report_of(prepared)["pairs"]
    assert {row["meta"]["source"] for row in pairs} == {"likes", "human_over_bot", "relevance"} == set(report)
    assert all(row["meta"]["why"] for row in pairs)
    for source, counts in report.items():
        assert sum(counts.get(split, 0) for split in SPLITS) == sum(row["meta"]["source"] == source for row in pairs)


def test_only_the_bot_is_rejected_for_being_the_bot(prepared, sample):
    bots = {clean(comment["content"]) for comment in sample["comments"] if is_bot(comment)}
    bots |= {
        words for post in sample["posts"] for name, words in weibo_text.quotes(post["content"]) if name == "评论罗伯特"
    }
    pairs = [row for row in rows_of(prepared, "pref") if row["meta"]["source"] == "human_over_bot"]
    assert pairs and all(row["rejected"][0]["content"] in bots for row in pairs)


def test_relevance_pairs_name_the_topic_on_one_side_only(prepared):
    pairs = [row for row in rows_of(prepared, "pref") if row["meta"]["source"] == "relevance"]
    assert len(pairs) > 30
    for row in pairs:
        post = row["prompt"][0]["content"].split("微博：", 1)[1]
        assert not weibo_text.shares_topic(post, row["rejected"][0]["content"])
    longer = sum(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in pairs)
    assert 0.2 < longer / len(pairs) < 0.8, "length alone must not tell the two apart"


def test_the_classic_recipe_scores_as_published(tmp_path):
    from math import log

    stage("11_prepare_weibo.py", "--recipe", "classic", "--output-dir", tmp_path / "classic")
    pairs = rows_of(tmp_path / "classic", "pref")
    assert {row["meta"]["source"] for row in pairs} == {"classic_same_post", "classic_other_post"}

    def score(text: str, likes: int) -> float:
        size = weibo_text.characters(text)
        return log(likes + 1) - (size < 5) + 0.5 * (10 <= size <= 60) + 0.2 * weibo_text.has_emoji(text)

    for row in pairs:
        assert row["meta"]["likes_chosen"] >= 2
        if row["meta"]["source"] == "classic_same_post":
            chosen = score(row["chosen"][0]["content"], row["meta"]["likes_chosen"])
            assert chosen - score(row["rejected"][0]["content"], row["meta"]["likes_rejected"]) > 0.5


# --- other schemas: the same rows


def number_of(id: str) -> int:
    return int(hashlib.sha256(id.encode()).hexdigest()[:13], 16)


def older_export(sample: dict) -> tuple[list, list, list]:
    """Integer ids, root_tweet_id, rootid, like_counts, attitudes_count."""
    posts, comments = [], []
    for post in sample["posts"]:
        user = post["user"] | {"_id": number_of(post["user"]["_id"])}
        new = {"_id": number_of(post["mblogid"]), "attitudes_count": post["likes_count"], "user": user}
        if "retweet_id" in post:
            new["retweet_id"] = number_of(post["retweet_id"])
        posts.append({k: v for k, v in post.items() if k not in ("_id", "mblogid", "likes_count")} | new)
    for comment in sample["comments"]:
        new = {"_id": number_of(comment["_id"]), "root_tweet_id": number_of(comment["root_post_mblogid"])}
        new |= {"rootid": number_of(comment["root_comment_id"]), "like_counts": comment["likes_count"]}
        new["comment_user"] = comment["comment_user"] | {"_id": number_of(comment["comment_user"]["_id"])}
        if parent := comment.get("reply_comment"):
            author = {"_id": number_of(parent["user"]["_id"])}
            new["reply_comment"] = {"_id": number_of(parent["_id"]), "text": parent["text"], "user": author}
        comments.append({k: comment[k] for k in ("content", "created_at", "ip_location")} | new)
    return posts, comments, [user | {"_id": number_of(user["_id"])} for user in sample["users"]]


def weibo_api(sample: dict) -> tuple[list, list, list]:
    """mid, idstr, text_raw beside an HTML text, floor_number, dates in words, users as user, the place as source."""
    from datetime import datetime

    def date(text: str) -> str:
        return datetime.strptime(text, "%Y-%m-%d %H:%M:%S").strftime("%a %b %d %H:%M:%S +0800 %Y")

    def account(user: dict) -> dict:
        name = "评论罗伯特" if user["_id"] == BOT_ID else user.get("nick_name", "")
        new = {"id": number_of(user["_id"]), "idstr": str(number_of(user["_id"])), "screen_name": name}
        return {k: v for k, v in user.items() if k not in ("_id", "nick_name", "created_at")} | new

    posts, comments = [], []
    for post in sample["posts"]:
        number = number_of(post["mblogid"])
        new = {
            "id": number,
            "idstr": str(number),
            "mid": str(number),
            "text_raw": post["content"],
            "created_at": date(post["created_at"]),
        }
        new |= {
            "text": f"<a href='/n/x'>{post['content'][:2]}</a>…",
            "attitudes_count": post["likes_count"],
            "user": account(post["user"]),
        }
        if "retweet_id" in post:
            new["retweeted_status"] = {"mid": str(number_of(post["retweet_id"]))}
        posts.append(new)
    for floor, comment in enumerate(sample["comments"]):
        number, root = number_of(comment["_id"]), number_of(comment["root_comment_id"])
        new = {
            "id": number,
            "idstr": str(number),
            "mid": str(number),
            "rootid": root,
            "rootidstr": str(root),
            "floor_number": floor,
        }
        new |= {
            "text_raw": comment["content"],
            "created_at": date(comment["created_at"]),
            "source": comment["ip_location"],
        }
        new |= {"like_counts": comment["likes_count"], "user": account(comment["comment_user"])}
        new["status"] = {"mid": str(number_of(comment["root_post_mblogid"]))}
        if parent := comment.get("reply_comment"):
            new["reply_comment"] = {
                "id": number_of(parent["_id"]),
                "text": parent["text"],
                "user": account(parent["user"]),
            }
        comments.append(new)
    return posts, comments, list(map(account, sample["users"]))


@pytest.mark.parametrize("variant", [older_export, weibo_api])
def test_another_schema_gives_the_same_rows(variant, prepared, sample, tmp_path):
    prepare(write_arrays(tmp_path / "in", *variant(sample)), tmp_path / "out")
    for name in ("sft", "prompts", "pref"):
        for split in SPLITS:
            file = f"{name}_{split}.jsonl"
            assert (tmp_path / "out" / file).read_text(encoding="utf-8") == (prepared / file).read_text(
                encoding="utf-8"
            ), file


def test_html_of_the_api_becomes_text():
    html = '回复<a href="/n/x">@某人</a>:真好<span class="url-icon">'
    html += '<img alt="[doge]" src="//h5.sinaimg.cn/x.png"></span>&amp;谢谢<br/>再见'
    assert clean(html) == "真好[doge]&谢谢\n再见"


# --- small corpora with one thing wrong


def post_of(number: int, content: str, **more) -> dict:
    return {
        "_id": f"p{number}",
        "mblogid": f"m{number}",
        "created_at": "2024-01-01 00:00:00",
        "content": content,
        "likes_count": 0,
    } | more


def comment_of(number: int, post: int, content: str, user: str = "", **more) -> dict:
    user = {"_id": user or f"u{number}", "verified": False}
    new = {
        "_id": f"c{number}",
        "root_comment_id": f"c{number}",
        "root_post_mblogid": f"m{post}",
        "likes_count": 0,
        "comment_user": user,
    }
    return (
        new
        | {
            "created_at": f"2024-01-02 00:{number // 60:02}:{number % 60:02}",
            "content": content,
            "ip_location": "来自上海",
        }
        | more
    )


THINGS = [
    "橘子",
    "葡萄",
    "西瓜",
    "草莓",
    "樱桃",
    "菠萝",
    "柠檬",
    "桃子",
    "荔枝",
    "石榴",
    "香蕉",
    "芒果",
    "椰子",
    "榴莲",
    "山竹",
    "李子",
    "杏子",
    "枇杷",
    "柿子",
    "木瓜",
]
WORDS = [
    "周末去郊外摘了一大筐",
    "酸得我眼泪都出来了",
    "奶奶家门口那棵树今年结得特别多",
    "楼下水果店老板送了两个",
    "放冰箱里冻一冻更好吃",
]


def small_corpus() -> tuple[list[dict], list[dict]]:
    """Forty posts with one comment each, nothing wrong with any."""
    posts = [post_of(i, f"今天买了{THINGS[i % 20]}，{WORDS[i % 5]}，第{i}天") for i in range(40)]
    return posts, [comment_of(i, i, f"{WORDS[(i + 2) % 5][: 4 + i % 9]}{THINGS[(i * 7) % 20]}吧{i}") for i in range(40)]


def run_small(tmp_path: Path, posts, comments, *words, users=()) -> dict:
    prepare(write_arrays(tmp_path / "in", posts, comments, users), tmp_path / "out", *words)
    return report_of(tmp_path / "out")


FAULTY_COMMENTS = {
    "no such post": comment_of(90, 99, "这条微博不在文件里"),
    "no content": comment_of(90, 1, "") | {"content": None},
    "over 10,000 characters": comment_of(90, 1, "长" * 1_000_000),
    "longer than 140 characters": comment_of(90, 1, "不短的话" * 40),
    "half a character (an emoji cut in two)": comment_of(90, 1, "今天真好啊\ud83d"),
    "duplicate id": comment_of(1, 1, "同一个编号的另一条评论") | {"created_at": "2025-01-01 00:00:00"},
    "no id": comment_of(90, 1, "没有编号的评论") | {"_id": None},
    "nothing left after cleaning": comment_of(90, 1, "@评论罗伯特 "),
    "contact details or personal data": comment_of(90, 1, "喜欢的话加我微信：abc12345"),
    "names another user": comment_of(90, 1, "这话说的就是@小明 本人吧"),
    "platform boilerplate": comment_of(90, 1, "转发微博"),
    "advertisement": comment_of(90, 1, "新人优惠券进来领，全场包邮"),
    "assistant-speak": comment_of(90, 1, "作为一个AI语言模型，我没有味觉"),
    "quotes the bot": comment_of(90, 1, "@评论罗伯特：萝卜头也想吃一口"),
    "calls the bot instead of answering the post": comment_of(90, 1, "@评论罗伯特 出来说两句话呀"),
    "copied from the post": comment_of(90, 1, "今天买了葡萄，酸得我眼泪都出来了"),
    "reply whose parent has no text": comment_of(90, 1, "这个回复没有上文", root_comment_id="c77"),
    "fewer than 2 characters": comment_of(90, 1, "好"),
}


@pytest.fixture(scope="module")
def faulty_comments(tmp_path_factory) -> dict:
    """The report of a corpus with every faulty comment in it, each under an id of its own."""
    posts, comments = small_corpus()
    faulty = []
    for number, comment in enumerate(FAULTY_COMMENTS.values(), start=90):
        own = {"comment_user": {"_id": f"u{number}"}}
        if comment["_id"] == "c90":
            own |= {
                "_id": f"c{number}",
                "root_comment_id": f"c{number}" if comment["root_comment_id"] == "c90" else comment["root_comment_id"],
            }
        faulty.append(comment | own)
    return run_small(tmp_path_factory.mktemp("faulty"), posts, comments + faulty)


@pytest.mark.parametrize("reason", FAULTY_COMMENTS)
def test_a_faulty_comment_is_counted_under_its_reason(reason, faulty_comments):
    assert faulty_comments["comments"]["dropped"][reason] == 1


def test_nothing_else_is_dropped_beside_faulty_comments(faulty_comments):
    assert faulty_comments["comments"]["dropped"].keys() == FAULTY_COMMENTS.keys()
    assert faulty_comments["comments"]["kept"] == 40


FAULTY_POSTS = {
    "no content": post_of(90, " "),
    "no id": post_of(90, "没有编号的微博") | {"_id": None, "mblogid": None},
    "over 10,000 characters": post_of(90, "长" * 20_000),
    "duplicate id": post_of(1, "同一个编号的另一条微博") | {"created_at": "2025-01-01 00:00:00"},
    "nothing left after cleaning": post_of(90, "@评论罗伯特 //@某人:你好"),
    "quotes the bot": post_of(90, "@评论罗伯特：独孤是人生的常态"),
}


@pytest.fixture(scope="module")
def faulty_posts(tmp_path_factory) -> dict:
    """The report of a corpus with every faulty post in it, and one comment below each."""
    posts, comments = small_corpus()
    for number, post in enumerate(FAULTY_POSTS.values(), start=90):
        ids = {"_id": f"p{number}", "mblogid": f"m{number}"} if post["_id"] == "p90" else {}
        posts.append(post | ids)
        comments.append(comment_of(number, number, f"这条微博底下的{THINGS[number % 20]}评论"))
    return run_small(tmp_path_factory.mktemp("faulty"), posts, comments)


@pytest.mark.parametrize("reason", FAULTY_POSTS)
def test_a_faulty_post_is_counted_under_its_reason(reason, faulty_posts):
    assert faulty_posts["posts"]["dropped"][reason] == 1


def test_comments_of_faulty_posts_are_counted_too(faulty_posts):
    assert faulty_posts["posts"]["dropped"].keys() == FAULTY_POSTS.keys() and faulty_posts["posts"]["kept"] == 40
    assert faulty_posts["comments"]["dropped"] == {"its post is dropped": len(FAULTY_POSTS) - 2, "no such post": 2}
    assert faulty_posts["comments"]["kept"] == 40


def test_records_that_are_no_objects_are_counted(tmp_path):
    posts, comments = small_corpus()
    report = run_small(tmp_path, [*posts, None, 3], [*comments, "text", ["list"]])
    assert report["posts"]["dropped"] == {"not an object": 2} == report["comments"]["dropped"]


def test_bare_nan_and_bad_like_counts_are_noted_and_cost_no_row(tmp_path):
    posts, comments = small_corpus()
    posts[3]["geo"] = comments[4]["likes_count"] = float("nan")
    comments[5]["likes_count"], comments[6]["likes_count"], comments[7]["created_at"] = -3, "many", "gestern"
    comments[8]["content"] += " NaN"  # a word, not a number
    report = run_small(tmp_path, posts, comments)
    assert report["comments"]["kept"] == 40
    assert report["posts"]["noted"]["bare NaN read as missing"] == 1
    noted = report["comments"]["noted"]
    assert noted["bare NaN read as missing"] == 1 and noted["negative like count: unknown"] == 1
    assert noted["no like count, or not a number"] == 2 and noted["date not read"] == 1
    unknown = [row for row in rows_of(tmp_path / "out", "sft") if row["meta"]["likes"] is None]
    assert len(unknown) == 3


def test_half_an_emoji_in_a_post_is_removed_and_noted(tmp_path):
    posts, comments = small_corpus()
    posts[2]["content"] += "\ud83d"
    report = run_small(tmp_path, posts, comments)
    assert report["posts"]["kept"] == 40 and report["posts"]["noted"]["half a character removed"] == 1


def test_bytes_that_are_no_utf8_cost_one_comment(tmp_path):
    posts, comments = small_corpus()
    folder = write_arrays(tmp_path / "in", posts, [*comments, comment_of(90, 1, "这里少了半个字X")])
    file = folder / "comments.json"
    file.write_bytes(file.read_bytes().replace("字X".encode(), "😀".encode()[:2]))
    prepare(folder, tmp_path / "out")
    assert report_of(tmp_path / "out")["comments"]["dropped"] == {"half a character (an emoji cut in two)": 1}


# --- files cut off, or broken


def cut_comments(tmp_path: Path, at: int | bytes) -> tuple[Path, bytes]:
    folder = write_arrays(tmp_path / "in", *small_corpus())
    whole = (folder / "comments.json").read_bytes()
    kept = whole[: at if isinstance(at, int) else whole.rindex(at)]
    (folder / "comments.json").write_bytes(kept)
    return folder, kept


CUTS = {
    "in a string": "酸得".encode(),
    "between two records": b",\n {",
    "in a key": b'"ip_loc',
    "in a character": -1,
    "in a number": b"0,\n",
}


@pytest.mark.parametrize("place", CUTS)
def test_a_truncated_file_says_where_and_can_be_kept(place, tmp_path):
    folder, kept = cut_comments(tmp_path, CUTS[place] if place != "in a character" else 9000)
    if place == "in a character":
        kept = kept[: kept.rindex("来".encode()) + 1]
        (folder / "comments.json").write_bytes(kept)
    done = prepare(folder, tmp_path / "out", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    place = re.search(r"comments\.json:(\d+): .*byte (\d+) of (\d+)\).* the (\d+) whole", done.stderr)
    line, byte, size, whole = map(int, place.groups())
    assert size == len(kept) and line == kept[:byte].count(b"\n") + 1
    assert kept[byte:].lstrip(b",\n ")[:1] in (b"{", b""), "the byte where the broken record begins"

    prepare(folder, tmp_path / "out", "--allow-truncated")
    comments = report_of(tmp_path / "out")["comments"]
    assert comments["read"] == whole and comments["noted"]["file cut off"] == 1
    assert comments["noted"].get("file cut off: bytes lost behind the last whole record", 0) == size - byte


BROKEN = {
    b'[\n{"_id": "c1"},\n{"_id": : 3},\n{"_id": "c2"}]': "comments.json:3: broken JSON in record 1",
    b'[{"_id": "c1"}] tail': "behind the end of the array",
    b'{"_id": "c1"}': "not a JSON array",
    b"": "is empty, not a JSON array",
    b"[]": "no training row is left",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_named_and_costs_nothing(content, prepared, tmp_path):
    earlier = shutil.copytree(prepared, tmp_path / "out")
    folder = write_arrays(tmp_path / "in", *small_corpus())
    (folder / "comments.json").write_bytes(content)
    done = prepare(folder, earlier, "--overwrite", "--allow-truncated", check=False)
    assert done.returncode == 2 and BROKEN[content] in done.stderr and "Traceback" not in done.stderr
    assert files_of(earlier) == files_of(prepared), "the earlier run is untouched"


def test_a_missing_file_is_named(tmp_path):
    done = stage(
        "11_prepare_weibo.py", "--posts", tmp_path / "none*.json", "--output-dir", tmp_path / "out", check=False
    )
    assert done.returncode == 2 and "none*.json: no such file" in done.stderr


def test_globs_take_parts_of_a_corpus(tmp_path):
    posts, comments = small_corpus()
    whole = write_arrays(tmp_path / "in", posts, comments)
    for part in range(2):
        (tmp_path / f"in/part{part}.json").write_text(json.dumps(comments[part::2]), encoding="utf-8")
    prepare(whole, tmp_path / "whole", users=False)
    words = [
        "--posts",
        whole / "posts.json",
        "--comments",
        whole / "part*.json",
        "--users",
        "--output-dir",
        tmp_path / "parts",
    ]
    stage("11_prepare_weibo.py", *words)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")


# --- caps, copies, accounts


def test_near_copies_and_repeated_texts_are_capped(tmp_path):
    posts, comments = small_corpus()
    long = "昨天晚上和朋友一起去吃的那家火锅店味道真的非常不错"
    more = [comment_of(50 + i, i, long + end) for i, end in enumerate(("", "！", "呀", "[doge]"))]
    more += [comment_of(60 + i, i, "笑死我了") for i in range(7)]
    report = run_small(tmp_path, posts, comments + more)
    assert report["comments"]["dropped"] == {"near-copy of an earlier comment": 3, "text seen 3 times already": 4}
    assert long in [row["completion"][0]["content"] for row in rows_of(tmp_path / "out", "sft")], (
        "the first one written stays"
    )


def test_users_are_capped_and_advertisers_dropped(tmp_path):
    posts, comments = small_corpus()
    users = [
        {"_id": "busy", "verified": False, "statuses_count": 90_000},
        {"_id": "shop", "verified": True, "verified_type": 2, "statuses_count": 5},
        {"_id": "low", "verified": False, "sunshine_credit": "信用较低"},
    ]
    for i in range(30):
        comments[i]["comment_user"]["_id"] = "busy" if i < 10 else "often"
    comments[30]["comment_user"]["_id"], comments[31]["comment_user"]["_id"] = "shop", "low"
    more = [comment_of(60 + i, i, "每天坚持背单词就能学好英语哦", user="copier") for i in range(4)]
    report = run_small(tmp_path, posts, comments + more, "--cap-user", 12, users=users)
    assert report["comments"]["dropped"] == {
        "cap of verified and high-volume accounts": 5,
        "cap of a user": 8,
        "account: organisation": 1,
        "account: low credit": 1,
        "account: advertiser": 4,
    }
    assert report["users"]["found in the users file"] == 3
    assert report["users"]["classes"] == {
        "ordinary": 9,
        "advertiser": 1,
        "low credit": 1,
        "organisation": 1,
        "prominent": 1,
    }


def test_a_copy_of_a_held_out_post_is_dropped_not_moved(tmp_path):
    posts, comments = small_corpus()
    texts = (f"关于这座城市里所有的老房子和树木的第{number}篇很长很长的一段记录" for number in range(1000))
    held_out = next(text for text in texts if weibo_text.split_of(weibo_text.key(text)) == "test")
    endings = (held_out + f"再加{word}" for word in THINGS)
    copy = next(text for text in endings if weibo_text.split_of(weibo_text.key(text)) == "train")
    report = run_small(tmp_path, [*posts, post_of(90, held_out), post_of(91, copy)], comments)
    assert report["posts"]["dropped"] == {"near-copy of a held-out post": 1}
    prompts = [
        json.loads(line) for line in (tmp_path / "out/prompts_test.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert any(held_out in row["prompt"][0]["content"] for row in prompts)


def test_the_bots_words_never_stand_in_a_post(tmp_path):
    posts, comments = small_corpus()
    posts[0]["content"] = (
        "回复@评论罗伯特:被海浪打会开心 被生活毒打很难受[泪]//@评论罗伯特:道理懂得再多，还是会被海浪打个措手不及呀。"
    )
    run_small(tmp_path, posts, comments)
    texts = [row["prompt"][0]["content"] for row in rows_of(tmp_path / "out", "prompts")]
    assert any("微博：被海浪打会开心 被生活毒打很难受[泪]" in text for text in texts)
    assert not any("道理懂得再多" in text for text in texts)


# --- texts


CLEANED = {
    "@评论罗伯特 你怎么看[doge]": "你怎么看[doge]",
    "你怎么看@评论罗伯特 ": "你怎么看",
    "回复@小明:哈哈哈哈//@评论罗伯特:道理懂得再多": "哈哈哈哈",
    "好看 http://t.cn/A6abc 真的": "好看 真的",
    "图片评论 https://photo.weibo.com/x/1?a=b": "",
    "零\u200b宽\u200d\ufeff字符": "零宽字符",
    "❤️❤️👍🏻": "❤️❤️👍🏻",
    "请无偿归还@用户e770 的实时！": "请无偿归还@用户 的实时！",
    "@小明 @小红 快来看": "快来看",
    "第一行\r\n.\n.\n。\n第二行  空格": "第一行\n第二行 空格",
    "#话题#好耶！！！": "#话题#好耶！！！",
    "/\u200b/@评论罗伯特:藏起来的": "",
}


@pytest.mark.parametrize("raw", CLEANED)
def test_cleaning_keeps_what_people_write(raw):
    assert clean(raw) == CLEANED[raw]


def test_cleaning_is_its_own_fixed_point(sample):
    for record in sample["posts"] + sample["comments"]:
        text = clean(record["content"])
        assert clean(text) == text
    generator = random.Random(0)
    parts = [
        "//",
        "@",
        "评论罗伯特",
        "http",
        "://",
        "t.cn/abc",
        "图片",
        "评论",
        "回复@",
        "a",
        ":",
        "用户x",
        "\u200b",
        "&amp;",
        "&lt;",
        "b",
        ">",
    ]
    parts += ["哈", "[doge]", "。", "www.", "\r", " ", "\n"]
    for _ in range(20_000):
        text = clean("".join(generator.choices(parts, k=8)))
        assert clean(text) == text and not UNWANTED.search(text)


def test_a_forward_chain_is_parsed():
    text = "不是我//@用户1:那是谁//@评论罗伯特：恭喜你解锁新成就！"
    assert weibo_text.quotes(text) == [("用户1", "那是谁"), ("评论罗伯特", "恭喜你解锁新成就！")]
    assert weibo_text.quotes("没有链") == []


@pytest.mark.parametrize(
    ("text", "limit", "short"),
    [
        ("一二三四五", 5, "一二三四五"),
        ("一二三四五六", 5, "一二三四…"),
        ("一二[doge]三", 5, "一二…"),
        ("一二三❤️四五", 5, "一二三…"),
        ("一二👍🏻三四", 4, "一二…"),
    ],
)
def test_no_emoji_is_cut_in_two(text, limit, short):
    assert weibo_text.cut(text, limit) == short


def test_splits_are_those_of_verse_at_its_percentage():
    texts = [f"第{number}条微博" for number in range(500)]
    assert [weibo_text.split_of(text, 2) for text in texts] == [verse_corpus.split_of(text) for text in texts]
    held_out = {text for text in texts if weibo_text.split_of(text) != "train"}
    assert held_out <= {text for text in texts if weibo_text.split_of(text, 15) != "train"}, (
        "what the metrics compare with stays held out"
    )


# --- rewards


PROMPT = weibo.messages({"post": "今天的烤肉是我烤的，弟弟说她们吃的是生的还是熟的"})[0]["content"]
JUDGED = [
    ("length", "挺好吃的样子[馋嘴]", "很" * 500),
    ("no_copy", "弟弟这张嘴该缝上", "今天的烤肉是我烤的，弟弟说"),
    ("no_repeat", "哈哈哈哈哈哈哈哈笑死我了", "我想吃烤肉我想吃烤肉我想吃烤肉我想吃烤肉"),
    ("no_personal", "给我留一块", "想吃的加微信abc12345"),
    ("no_personal", "给我留一块", "电话13812345678"),
    ("no_personal", "给我留一块", "@小明 来吃"),
    ("no_assistant", "我是真的饿了", "作为一个AI语言模型，我无法品尝食物"),
    ("no_assistant", "对不起我先吃了", "很抱歉，我无法提供这方面的帮助"),
    ("clean", "看起来好香[doge]", "看起来好香 http://t.cn/A6abc"),
    ("clean", "看起来好香[doge]", "好香//@评论罗伯特:来一口"),
    ("overall", "弟弟这张嘴该缝上[doge]", "作为一个AI语言模型，我无法品尝食物"),
    ("overall", "弟弟这张嘴该缝上[doge]", ""),
]


@pytest.mark.parametrize(("name", "good", "bad"), JUDGED)
def test_rewards_tell_good_from_bad(name, good, bad):
    best, worst = weibo.REWARDS[name]([PROMPT] * 2, [good, bad], [{}] * 2)
    assert best == 1.0 and worst < 0.5


def test_people_score_high_on_every_reward():
    texts = list(weibo.human_comments(held_out=True))
    assert len(texts) > 50
    for name, reward in weibo.REWARDS.items():
        scores = reward([PROMPT] * len(texts), texts, [{}] * len(texts))
        assert sum(scores) / len(scores) > 0.9, name


def test_distances_are_small_for_people_and_large_for_the_bot(sample):
    people = list(weibo.human_comments(held_out=False))
    bots = [clean(comment["content"]) for comment in sample["comments"] if is_bot(comment)]
    for name in weibo.CLASSES:
        measure = weibo.SET_METRICS[name]
        assert measure(list(weibo.human_comments(held_out=True))) == 0
        assert measure(people) < 0.7 * measure(bots), name


def test_the_report_of_distances_divides_by_the_base_with_intervals(prepared, sample, tmp_path):
    """Texts of people come nearer to held-out people than those of the bot, and the interval says so."""
    people = list(weibo.human_comments(held_out=False))
    bots = [clean(comment["content"]) for comment in sample["comments"] if is_bot(comment)]
    (tmp_path / "texts").mkdir()
    for name, texts in (("base", bots), ("sft", people)):
        rows = [
            {"id": f"{i}#0", "prompt_id": f"{i}", "sample": 0, "seed": 0, "prompt": [{"role": "user", "content": "问"}]}
            | {"completion": text, "reference": None, "model": name, "finish_reason": "stop", "tokens": 1, "meta": {}}
            for i, text in enumerate(texts[:200])
        ]
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "texts" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    files = [
        "--people",
        prepared / "sft_val.jsonl",
        prepared / "sft_test.jsonl",
        "--train",
        prepared / "sft_train.jsonl",
    ]
    output = tmp_path / "distances.md"
    stage(ROOT / "runs" / "weibo_distances.py", "--generations", tmp_path / "texts", "--output", output, *files)
    table = output.read_text(encoding="utf-8")
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in table.splitlines()}
    assert len(rows["base"]) == 2 + 2 * len(weibo.CLASSES) and "people, training rows" in rows
    for place, name in enumerate(weibo.CLASSES):
        base, times = (
            re.findall(r"\d+\.\d+", rows[run][2 + 2 * place + shift]) for run, shift in (("base", 0), ("sft", 1))
        )
        assert float(base[1]) <= float(base[0]) <= float(base[2]), name
        assert float(times[2]) < 1, f"{name}: the interval lies below the base's distance"


def test_a_comment_of_the_training_split_is_a_near_copy():
    long = next(text for text in weibo.human_comments(held_out=False) if len(weibo.words(text)) > 30)
    texts = [long, f"嗯嗯{weibo.words(long)[5:20]}！", "哈" * 30, "[doge]" * 5, "这家的面我还没吃过呢，改天去"]
    values = weibo.METRICS["near_copy"]([PROMPT] * len(texts), texts, [{}] * len(texts))
    assert values == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_marks_do_not_overlap_and_lie_in_the_text():
    text = "作为一个AI，加微信abc12345[doge] @小明 http://t.cn/x"
    spans = sorted(weibo.mark(text, {}))
    assert {label for _, _, label in spans} >= {
        "assistant-speak: fault",
        "personal data: fault",
        "link: fault",
        "emoji",
    }
    assert all(0 <= start < end <= len(text) for start, end, _ in spans)
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))
