"""The preflight finds every planted fault, with its line and a fix, and is silent about a clean file."""

import copy
import json
import re
import shutil

import pytest

from common.preflight.checks import check_rows, detect_schema, require_clean, scan
from common.preflight.tokenizers import check_model_files
from common.pretraining.char_tokenizer import build_tokenizer
from common.settings import ROOT, UserError
from conftest import load_script

POEMS = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。",
    "红豆生南国，春来发几枝。愿君多采撷，此物最相思。",
    "空山不见人，但闻人语响。返景入深林，复照青苔上。",
    "松下问童子，言师采药去。只在此山中，云深不知处。",
    "向晚意不适，驱车登古原。夕阳无限好，只是近黄昏。",
]
ASK = "写一首[五言绝句] 要求4句 主题为: 山水"


def user(text=ASK):
    return {"role": "user", "content": text}


def assistant(text=POEMS[0]):
    return {"role": "assistant", "content": text}


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
OTHER = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}


def sft(answer=POEMS[0], ask=ASK, **changed):
    return {"prompt": [user(ask)], "completion": [assistant(answer)], "meta": {}} | changed


def pair(chosen=POEMS[0], rejected=POEMS[1], ask=ASK):
    return {"prompt": [user(ask)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], "meta": {}}


def prompt(ask=ASK):
    return {"prompt": [user(ask)], "meta": {}}


def style(text=ASK):
    return {"input": text, "label": "诚实", "label_english": "honesty", "metadata": {}}


def line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"


def write(path, rows):
    """Rows are objects, or bytes as they stand in the file."""
    path.write_bytes(b"".join(row if isinstance(row, bytes) else line(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(set("".join(POEMS) + ASK) | {chr(code) for code in range(32, 127)} | {"\n"})


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def check(tokenizer, tmp_path):
    """check(train rows, val rows, schema): the report on files that hold them."""

    def run(train, val=None, schema="sft", max_length=512, tokenizer=tokenizer):
        train_file = write(tmp_path / "train.jsonl", train)
        val_file = write(tmp_path / "val.jsonl", val) if val else None
        return check_rows(train_file, val_file, schema, tokenizer, max_length)

    return run


def places(report) -> list[tuple[str, str]]:
    """(level, file:line) of every finding, the folder left out."""
    return [(finding.level, finding.place.rsplit("/")[-1]) for finding in report.findings]


def test_no_fix_names_a_length_that_the_model_does_not_read(check, monkeypatch):
    from common.preflight import checks

    rows = [sft(POEMS[1]), sft("".join(POEMS) * 3)]
    (found,) = [found for found in check(rows, max_length=100).findings if found.check == "too-long"]
    assert re.match(r"--max-length \d{3} holds every row", found.fix)
    monkeypatch.setattr(checks, "_context", lambda tokenizer: 120)
    (found,) = [found for found in check(rows, max_length=100).findings if found.check == "too-long"]
    assert (
        found.fix.startswith("the model reads 120 tokens, the longest row needs ") and "--long-rows drop" in found.fix
    )
    assert "--max-length" not in found.fix


# ------------------------------------------------------------------------------------------- through the command line


def test_every_planted_fault_is_named_with_line_and_fix(run_stage, model, tmp_path):
    """Twelve faults in one file and two in the other: the stage names each and ends with 1."""
    faults = [
        (b"\xef\xbb\xbf" + line(sft()), "error", "byte order mark"),
        (sft(POEMS[1]), None, None),
        (line(sft(POEMS[2]))[:-9] + b"\n", "error", "broken JSON"),
        ({"prompt": [user()], "meta": {}}, "error", "'completion' is missing"),
        (sft(" \n"), "error", "the answer is empty"),
        (json.dumps(sft(POEMS[2]), ensure_ascii=False).encode("gbk") + b"\n", "error", "probably gbk"),
        (b'{"score": NaN, ' + line(sft(POEMS[2]))[1:], "error", "NaN is not JSON"),
        (sft("长" * 3_400_000), "error", "the line has 10.2 MB"),
        (sft(prompt=[{"role": "human", "content": ASK}]), "error", "unknown role 'human'"),
        (sft(prompt=[user(), assistant()]), "error", "last turn of prompt is assistant, not user"),
        (sft(POEMS[1]), "warning", "the same row as line 2"),
        (sft("".join(POEMS)), "error", "the answer is cut at 200 tokens and loses its eos"),
        (sft(POEMS[4], ask=ASK * 10), "error", "the prompt fills max_length (200 tokens): no token is trained"),
        (line(sft(POEMS[5])).replace(b"\n", b"\r\n"), None, None),
    ]
    train = write(tmp_path / "sft_train.jsonl", [row for row, _, _ in faults])
    val = write(tmp_path / "sft_val.jsonl", [sft(POEMS[6]), sft(POEMS[1]), sft(POEMS[5], ask="写一首五绝")])
    before = train.read_bytes()
    options = ("--train-file", train, "--val-file", val, "--model", model, "--max-length", 200, "--preview", "None")

    done = run_stage("19_check_data.py", *options, "--report", "report.json", check=False)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    found = [(f["level"], f["file"], f["line"], f["reason"]) for f in report["findings"]]
    assert all(f["fix"] for f in report["findings"])
    expected = [(level, train, i, reason) for i, (_, level, reason) in enumerate(faults, start=1) if level]
    expected += [
        ("note", train, 0, "1 lines end in CRLF"),
        ("error", val, 2, "the same row as train line 2"),
        ("error", val, 3, "the same answer as train line 14"),
    ]
    for level, file, number, reason in expected:
        matching = [f for f in found if f[:3] == (level, str(file), number) and reason in f[3]]
        assert len(matching) == 1, f"{level} {file.name}:{number} {reason!r} in {found}"
        place = f"{file}:{number}" if number else str(file)
        assert any(level in row and place in row and reason in row for row in done.stdout.splitlines()), reason
    assert len(found) == len(expected), "nothing but what was planted"
    assert report["counts"] == {"error": 13, "warning": 1, "note": 1}
    assert "13 errors, 1 warnings, 1 notes" in done.stdout
    assert "next:" not in done.stdout
    assert train.read_bytes() == before


def test_a_clean_file_passes_without_a_word(run_stage, model, tmp_path):
    train = write(tmp_path / "sft_train.jsonl", [sft(text) for text in POEMS[:6]])
    val = write(tmp_path / "sft_val.jsonl", [sft(text) for text in POEMS[6:]])

    files = ("--train-file", train, "--val-file", val, "--preview", "page.html")
    done = run_stage("19_check_data.py", *files, "--model", model)

    assert "0 errors, 0 warnings, 0 notes" in done.stdout
    assert "first at" not in done.stdout
    assert "train: 6 rows" in done.stdout and "val: 2 rows" in done.stdout
    assert "next: python scripts/20_train_sft.py --task poems" in done.stdout


def test_only_a_report_is_overwritten(run_stage, tmp_path):
    (tmp_path / "mine.json").write_text('{"mine": 1}', encoding="utf-8")
    done = run_stage("19_check_data.py", "--report", "mine.json", check=False)
    assert done.returncode == 2
    assert "mine.json is not a report of this stage" in done.stderr
    assert json.loads((tmp_path / "mine.json").read_text(encoding="utf-8")) == {"mine": 1}


# ---------------------------------------------------------------------------------------------- rows, one kind a test


@pytest.mark.parametrize(
    "schema, train, val, level, place, reason",
    [
        (
            "preference",
            [pair(), pair(POEMS[2], POEMS[2] + " ")],
            [],
            "error",
            "train.jsonl:2",
            "chosen and rejected are eq",
        ),
        ("preference", [pair(), pair()], [], "warning", "train.jsonl:2", "the same row as line 1"),
        ("preference", [pair()], [pair(POEMS[1], POEMS[2])], "error", "val.jsonl:1", "the same answer as train line 1"),
        ("preference", [sft(), sft(POEMS[1])], [], "error", "train.jsonl:1", "these are sft rows, not preference rows"),
        ("sft", [pair(), pair(POEMS[2])], [], "error", "train.jsonl:1", "these are preference rows, not sft rows"),
        ("sft", [sft(), sft(ASK)], [], "warning", "train.jsonl:2", "completion repeats the prompt"),
        (
            "sft",
            [sft()],
            [sft(POEMS[0].replace("，", " ，"), "写诗")],
            "error",
            "val.jsonl:1",
            "the same answer as train",
        ),
        ("sft", [sft("好的。")], [sft("好的！", "行吗")], "warning", "val.jsonl:1", "the same short answer"),
        ("sft", [sft()], [sft(POEMS[1]), sft("")], "error", "val.jsonl:2", "the answer is empty"),
        ("prompts", [prompt(), prompt()], [], "note", "train.jsonl:2", "the same prompt as line 1"),
        ("prompts", [prompt()], [prompt()], "note", "val.jsonl:1", "the same prompt as train line 1"),
        ("prompts", [prompt(ASK * 40)], [], "error", "train.jsonl:1", "no room for an answer"),
        ("style", [style(), style()], [], "warning", "train.jsonl:2", "the same row as line 1"),
        ("style", [style()], [style()], "error", "val.jsonl:1", "the same row as train line 1"),
        ("style", [style(ASK * 40)], [], "warning", "train.jsonl:1", "the text is cut at 512 tokens"),
        ("style", [style(), style() | {"label": ""}], [], "error", "train.jsonl:2", "label is empty"),
        (
            "sft",
            [sft(), sft(prompt=[user(), {**assistant("查"), "tool_calls": [CALL]}, {"role": "tool", "content": "晴"}])],
            [sft(POEMS[1], prompt=[user(), assistant("查"), {"role": "tool", "content": "晴"}])],
            "error",
            "val.jsonl:1",
            "prompt[2] is a tool's reply, and no such call waits for one",
        ),
        (
            "preference",
            [pair() | {"rejected": [{**assistant(""), "tool_calls": [CALL]}], "tools": [OTHER]}],
            [pair(POEMS[2], POEMS[3]) | {"chosen": [{**assistant(""), "tool_calls": [CALL]}], "tools": [OTHER]}],
            "error",
            "val.jsonl:1",
            "chosen[0] calls get_weather, which is not among the tools of the row",
        ),
        ("sft", [b""], [], "error", "train.jsonl", "the file holds no rows"),
        ("sft", [line(sft()).decode().encode("utf-16")], [], "error", "train.jsonl:1", "the file is UTF-16"),
    ],
)
def test_a_fault_is_found(check, schema, train, val, level, place, reason):
    report = check(train, val, schema)
    matching = [f for f in report.findings if reason in f.reason]
    assert [(f.level, f.place.rsplit("/")[-1]) for f in matching] == [(level, place)]
    assert matching[0].fix


@pytest.mark.parametrize(
    "schema, train, val",
    [
        # what is held out is the text: the same prompt in train and val is no fault
        ("sft", [sft(POEMS[0]), sft(POEMS[1])], [sft(POEMS[2])]),
        ("sft", [sft(prompt=[{"role": "system", "content": "你是诗人"}, user(), assistant(POEMS[1]), user()])], []),
        # one poem against several faults, and a rejected text borrowed from train
        ("preference", [pair(POEMS[0], POEMS[1]), pair(POEMS[0], POEMS[2])], [pair(POEMS[3], POEMS[0])]),
        ("prompts", [prompt("写一首五绝"), prompt("写一首七绝")], [prompt("写一首五律")]),
        ("style", [style("你好"), style("再见")], [style("谢谢")]),
    ],
)
def test_a_clean_file_raises_no_alarm(check, schema, train, val):
    report = check(train, val, schema)
    assert places(report) == []
    require_clean(report)


def test_an_empty_array_is_a_finding(tmp_path):
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    ((_, row, (found,)),) = scan(tmp_path / "a.json", "style")
    assert row is None and found.reason == "the file holds no rows"


def test_a_missing_file_is_a_finding(tokenizer, tmp_path):
    report = check_rows(tmp_path / "gone.jsonl", None, "sft", tokenizer, 512)
    assert [(f.level, f.reason) for f in report.findings] == [("error", "no such file")]


@pytest.mark.parametrize(
    "name, row, schema",
    [
        ("sft_train.jsonl", pair(), "sft"),  # the name says what the stage will read it as
        ("pref_onpolicy_val.jsonl", sft(), "preference"),
        ("mine.jsonl", sft(), "sft"),
        ("mine.jsonl", pair(), "preference"),
        ("mine.jsonl", prompt(), "prompts"),
        ("mine.jsonl", style(), "style"),
        ("mine.jsonl", {"instruction": "写诗"}, "sft"),
    ],
)
def test_the_schema_is_detected(tmp_path, name, row, schema):
    assert detect_schema(write(tmp_path / name, [b"not JSON\n", row])) == schema


@pytest.mark.parametrize(
    "text, found",
    [
        ("电话是13912345678。", True),
        ("Call 13912345678.", True),
        ("电话是１３９１２３４５６７８。", True),
        ("+86 139-1234-5678", True),
        ("圆周率是13912345678.5", False),
        ("见13912345678.html", False),
        ("编号113912345678", False),
        ("编号１１３９１２３４５６７８", False),
    ],
)
def test_a_mobile_number_is_found_in_any_width_and_before_a_full_stop(text, found):
    from common.preflight.texts import faults_of_text

    assert any(found.check == "mobile-number" for found in faults_of_text(text, None)) == found


def test_an_identity_card_number_is_found_in_full_width():
    from common.preflight.texts import faults_of_text

    for number in ("11010519491231002X", "１１０１０５１９４９１２３１００２Ｘ"):
        assert any(found.check == "identity-card" for found in faults_of_text(number, None))


# ------------------------------------------------------------------------------------------------ tokens and max_length


def test_tokens_are_counted_as_trl_counts_them(check, tokenizer):
    row = sft(POEMS[0], prompt=[{"role": "system", "content": "你是诗人 𠀀"}, user()])
    figures = check([row]).figures["train"]["tokens"]
    ask = tokenizer.apply_chat_template(row["prompt"], tokenize=True, return_dict=True, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)
    assert figures["prompt"]["max"] == len(ask["input_ids"])
    assert figures["total"]["max"] == len(whole["input_ids"])
    assert figures["answer"]["max"] == len(whole["input_ids"]) - len(ask["input_ids"])


@pytest.mark.parametrize(
    "spare, reason",
    [
        (1, None),  # the template's line end behind eos fits too
        (0, None),  # eos is the last token kept
        (-1, "the answer loses its eos"),
        (-2, "the answer is cut"),
        (-26, "no token is trained"),  # 24 characters, eos, and the last token of the assistant's header
    ],
)
def test_what_max_length_cuts_off(check, tokenizer, spare, reason):
    whole = tokenizer.apply_chat_template([user(), assistant()], tokenize=False).removesuffix("\n")
    need = len(tokenizer(whole)["input_ids"])
    report = check([sft()], max_length=need + spare)
    assert [reason] * bool(reason) == [reason for f in report.errors if reason in f.reason]
    assert len(report.findings) == bool(reason)
    assert all(f"--max-length {need} holds every row" in f.fix for f in report.findings)
    figures = report.figures["train"]
    assert figures["share_losing_eos"] == (spare < 0)
    assert figures["share_truncated"] == (spare < -1)
    assert figures["rows_without_trained_token"] == (spare == -26)


def test_a_rare_long_answer_is_a_warning(check):
    rows = [sft(f"{POEMS[i % 8]}{i}") for i in range(200)] + [sft("".join(POEMS))]
    report = check(rows, max_length=100)
    assert places(report) == [("warning", "train.jsonl:201")]
    require_clean(report)


def test_both_answers_of_a_pair_are_measured(check):
    assert places(check([pair(POEMS[0], POEMS[1] * 10)], schema="preference", max_length=100)) == [
        ("error", "train.jsonl:1")
    ]


# -------------------------------------------------------------------------------------------------------- the tokenizer


def broken(tokenizer, **changed):
    tokenizer = copy.deepcopy(tokenizer)
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"pad_token": "<|im_end|>"}, "pad and eos are the same token <|im_end|>"),
        ({"pad_token": None}, "no pad token"),
        ({"eos_token": None}, "no eos token"),
        ({"chat_template": None}, "no chat template"),
        ({"eos_token": "<|im_start|>"}, "does not end the assistant's turn with eos <|im_start|>"),
        ({"chat_template": "{{ raise_exception('no system') }}"}, "the chat template refuses a question"),
    ],
)
def test_a_tokenizer_that_cannot_teach_stopping_is_an_error(check, tokenizer, changed, reason):
    report = check([sft()], tokenizer=broken(tokenizer, **changed))
    assert reason in report.errors[0].reason and report.errors[0].fix
    assert report.errors[0].line == 0


def test_a_template_that_refuses_a_row_names_it(check, tokenizer):
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    system = sft(POEMS[1], prompt=[{"role": "system", "content": "你是诗人"}, user()])
    report = check([sft(), system], tokenizer=broken(tokenizer, chat_template=refuse + tokenizer.chat_template))
    assert places(report) == [("error", "train.jsonl:2")]
    assert "no system turn" in report.errors[0].reason


# --------------------------------------------------------------------------------------------- in front of the training


def test_training_stops_with_the_first_twenty_errors(check):
    with pytest.raises(UserError) as caught:
        require_clean(check([sft("")] * 30))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("30 errors in the data")
    assert "train.jsonl:1: completion[0]: the answer is empty; fix: fill it in" in lines[1]
    assert len(lines) == 22 and lines[-1] == "... and 10 more"


def test_warnings_are_printed_by_kind_and_do_not_stop(check, capsys):
    require_clean(check([sft()] * 4))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    assert "train.jsonl:2: the same row as line 1 [copy] (3 times); fix: keep one of them" in out[0]


# ------------------------------------------------------------------------------- answers that only look like errors,
# --allow

PAGE = "<!DOCTYPE html>\n<html>\n<body>\n<h1>错误与改正</h1><p>你好</p>\n</body>\n</html>"
LOOK_LIKE_ERRORS = [
    ("用HTML写一个网页", PAGE),
    ("从句子里抽取手机号，没有就回答 None。", "None"),
    ("Java 里空引用怎么写？只写关键字。", "null"),
    ("没有就写略。", "略"),
    ("502 是什么意思？", "502 Bad Gateway 表示网关从上游服务器收到了无效的响应，请检查后端是否在运行。"),
    ("KeyError 怎么办？", "KeyError 表示字典里没有这个键，先用 in 判断，或者改用 get 方法。"),
    ("What does it mean?", "502 Bad Gateway means that the gateway got an invalid answer from the server behind it."),
    ("请求太多时接口返回什么？", '{"error": {"code": 429, "message": "Too Many Requests"}}'),
    ("1/0 会输出什么？", "Traceback (most recent call last):\nZeroDivisionError: division by zero"),
    ("什么是限流？", "限流（rate limit）是服务端限制单位时间内请求次数的做法。"),
]
ERRORS = [
    (
        "Error code: 429 - "
        "{'error': {'message': 'Rate limit reached for gpt-4 on tokens per min. Please try again in 2s.'}}"
    ),
    '{"error": {"message": "Incorrect API key provided", "type": "invalid_request_error"}}',
    "请求过于频繁，请稍后再试。",
    "服务器繁忙，请稍后重试",
    "502 Bad Gateway",
    "Connection error.",
    'Traceback (most recent call last):\n  File "a.py", line 1\nTimeoutError: timed out',
    "<html><head><title>504 Gateway Time-out</title></head><body><h1>504 Gateway Time-out</h1></body></html>",
]


@pytest.mark.parametrize("ask, answer", LOOK_LIKE_ERRORS)
def test_an_answer_that_looks_like_an_error_is_a_warning_at_most(ask, answer):
    from common.preflight.texts import faults_of_answer, faults_of_text

    found = [*faults_of_text(answer, None), *faults_of_answer(answer, True, ask)]
    assert {finding.level for finding in found if finding.check != "no-word"} == {"warning"}


@pytest.mark.parametrize("answer", ERRORS)
def test_a_text_that_is_nothing_but_an_error_is_one(answer):
    from common.preflight.texts import faults_of_answer

    (found,) = [
        finding for finding in faults_of_answer(answer, True, "怎样保存茶叶？") if finding.check == "error-message"
    ]
    assert found.level == "error"


def test_any_check_is_switched_off_by_its_name(tokenizer, tmp_path, capsys):
    file = write(tmp_path / "sft_train.jsonl", [sft(), sft(ERRORS[0], "问"), sft(POEMS[1]), sft(POEMS[1])])
    with pytest.raises(UserError, match=r"stored as an answer \[error-message\]; fix: [^\n]*\n.*--allow error-message"):
        require_clean(check_rows(file, None, "sft", tokenizer, 512))
    report = check_rows(file, None, "sft", tokenizer, 512, allow=("error-message", "copy", "unknown-token"))
    require_clean(report)
    assert report.findings == [] and report.allowed["error-message"] == report.allowed["copy"] == 1
    assert "notice: --allow copy: 1 findings" in capsys.readouterr().out
    with pytest.raises(UserError, match="--allow html: no such check; fix: one of .*html-tag"):
        check_rows(file, None, "sft", tokenizer, 512, allow=("html",))


def test_every_name_of_a_check_is_known_and_explained():
    import re

    from common.preflight.checks import NAMES
    from conftest import ROOT

    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts/common/preflight").glob("*.py"))
    page = (ROOT / "docs" / "CHECKS.md").read_text(encoding="utf-8")
    used = {
        name
        for name in re.findall(r'"([a-z]+(?:-[a-z]+)*)"', code.split("def check_rows(", 1)[1] + code)
        if name in NAMES
    }
    assert used == set(NAMES) and not [name for name in NAMES if f"`{name}`" not in page]


def test_twenty_thousand_rows_of_one_template_do_not_become_all_pairs():
    import random
    import time

    from common.preflight.files import near_copies

    draw = random.Random(0)
    names, ends = ("".join(draw.choices(text, k=6)) for text in POEMS[:2] * 10000), POEMS[2:6]
    texts = [
        f"关于{name}：请登录官网，点击申请按钮，{draw.randint(1, 72)}小时内处理{draw.sample(end, 5)}，谢谢。"
        for name, end in zip(names, ends * 1000, strict=False)
    ]
    started = time.process_time()
    found = near_copies(texts, 0.8)
    assert time.process_time() - started < 30  # all pairs take minutes
    assert len(texts) == 4000 and all(likeness >= 0.8 and earlier < later for later, earlier, likeness in found)


def test_every_near_copy_of_a_small_file_is_found():
    from itertools import combinations

    from common.preflight.files import near_copies

    texts = [text[:n] + other[: 24 - n] for n in range(12, 25, 2) for text in POEMS for other in POEMS[:3]]
    sets = [{text[i : i + 2] for i in range(len(text) - 1)} for text in texts]
    alike = {n for m, n in combinations(range(len(texts)), 2) if len(sets[m] & sets[n]) / len(sets[m] | sets[n]) >= 0.8}
    found = {copied: earlier for copied, earlier, _ in near_copies(texts, 0.8)}
    assert found and found.keys() <= alike and not found.keys() & set(found.values())


def test_the_next_command_takes_over_what_was_checked(run_stage, model, tmp_path):
    folder = tmp_path / "my rows"
    folder.mkdir()
    train, val = (
        write(folder / "sft_train.jsonl", [sft(t) for t in POEMS[:6]]),
        write(folder / "v.jsonl", [sft(POEMS[7])]),
    )
    files = ("--train-file", train, "--val-file", val, "--preview", "None", "--max-length", 300, "--allow", "html-tag")
    done = run_stage("19_check_data.py", *files, "--model", model, "--task", "chat")
    expected = (
        f"next: python scripts/20_train_sft.py --task chat --train-file '{train}' --val-file '{val}' --model {model}"
    )
    assert f"{expected} --max-length 300 --allow html-tag" in done.stdout


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "{}", '{"num_hidden_layers": 3}'])
def test_a_config_that_describes_no_model_is_told(text, tmp_path):
    """By the check of the folder, or by the tokenizer that cannot be opened beside it."""
    folder = shutil.copytree(ROOT / "data" / "tiny_qwen3", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | json.loads(text)) if "layers" in text else text
    (folder / "config.json").write_text(text, encoding="utf-8")
    try:
        load_script("19").open_tokenizer(str(folder), "sft")
    except UserError as error:
        assert "config.json" in str(error) and "; fix: " in str(error)
    else:
        found = check_model_files(str(folder), 64)
        assert [f.level for f in found if "config.json describes no model" in f.reason] == ["error"]
