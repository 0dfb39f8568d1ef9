"""Rules for brand copy: every golden copy is clean, every planted defect is named, and measures rank as they should."""

import json

import pytest

from common.evaluation.scoring import measure_texts
from common.jsonl import DataError, read_jsonl
from conftest import ROOT
from tasks import copywriting
from tasks.base import load_task
from tasks.copywriting.rows import read_copies

GOLDEN = read_jsonl(ROOT / "data/copywriting/golden.jsonl")
META = [{"product_id": row["product_id"], "copy_type": row["copy_type"]} for row in GOLDEN]


def golden(product: str, copy_type: str) -> str:
    return next(row["copy"] for row in GOLDEN if (row["product_id"], row["copy_type"]) == (product, copy_type))


FAB, REVIEW, BAB = golden("p03", "paid_ad_fab"), golden("p03", "social_media_review"), golden("p01", "paid_ad_bab")
PAS, LONG, STORY = (
    golden("p05", "paid_ad_pas"),
    golden("p04", "ecommerce_long_form"),
    golden("p09", "social_media_storytelling"),
)
EYES = golden("p10", "paid_ad_cta")
SHEET_ONLY = (
    "烟酰胺平衡精华采用水感凝露质地，不含硅油。核心成分为烟酰胺 5%、PCA锌 0.5%、甘油 4%。该产品调节皮脂，改善暗沉，"
    "帮助维护屏障。"
    "成品 pH 5.8 到 6.5，不含香精和色素，配方共 14 种成分，适合偏油、混合肤质，初次使用先隔天一次，观察耐受。规格 "
    "30ml，售价 169 元。"
)


def kinds(text: str, product: str, copy_type: str) -> list[str]:
    return [problem.kind for problem in copywriting.problems(text, {"product_id": product, "copy_type": copy_type})]


@pytest.mark.parametrize("copy_type", copywriting.COPY_TYPES)
def test_every_golden_copy_is_clean(copy_type):
    found = {
        (m["product_id"], problem)
        for row, m in zip(GOLDEN, META, strict=True)
        if m["copy_type"] == copy_type
        for problem in copywriting.problems(row["copy"], m)
    }
    assert found == set()


# (what was done, text, product, copy type, the kinds that are expected and no others)
DEFECTS = [
    ("HTML tag", f"<p>{FAB}</p>", "p03", "paid_ad_fab", {"tag"}),
    ("turn mark", FAB + "<|im_end|>", "p03", "paid_ad_fab", {"tag"}),
    ("placeholder", FAB.replace("水感凝露", "[质地]"), "p03", "paid_ad_fab", {"tag"}),
    ("label", "正文：" + REVIEW, "p03", "social_media_review", {"tag"}),
    ("chat before it", "好的，" + REVIEW, "p03", "social_media_review", {"tag"}),
    ("hashtag", REVIEW + "#护肤#", "p03", "social_media_review", {"tag"}),
    ("emoji", REVIEW + "😊", "p03", "social_media_review", {"tag"}),
    ("bold", f"**{FAB}**", "p03", "paid_ad_fab", {"markdown"}),
    ("heading", "# " + LONG, "p04", "ecommerce_long_form", {"markdown"}),
    ("list", "\n".join(f"- {line}" for line in LONG.split("\n")), "p04", "ecommerce_long_form", {"markdown"}),
    ("numbered list", "1. " + FAB, "p03", "paid_ad_fab", {"markdown"}),
    ("exclamation", FAB.replace("。", "！", 1), "p03", "paid_ad_fab", {"exclamation"}),
    ("ASCII exclamation", REVIEW.replace("。", "!", 1), "p03", "social_media_review", {"exclamation"}),
    ("dots", REVIEW.replace("。", "……", 1), "p03", "social_media_review", {"punctuation"}),
    ("forbidden word", FAB.replace("水感凝露", "护肤神器"), "p03", "paid_ad_fab", {"forbidden_word"}),
    ("forbidden word in capitals", FAB.replace("水感凝露", "YYDS"), "p03", "paid_ad_fab", {"forbidden_word"}),
    ("medical word", FAB.replace("水感凝露", "消炎"), "p03", "paid_ad_fab", {"forbidden_word"}),
    ("superlative", FAB.replace("水感凝露", "最好的凝露"), "p03", "paid_ad_fab", {"forbidden_word"}),
    ("no call", FAB.rsplit("，", 1)[0] + "，质地清爽。", "p03", "paid_ad_fab", {"missing_cta"}),
    ("sheet read aloud", SHEET_ONLY, "p03", "social_media_review", {"flat_persona"}),
    ("too short", REVIEW[:110], "p03", "social_media_review", {"length"}),
    ("wrong concentration", FAB.replace("烟酰胺 5%", "烟酰胺 8%"), "p03", "paid_ad_fab", {"fact"}),
    ("full-width percentage", FAB.replace("烟酰胺 5%", "烟酰胺８％"), "p03", "paid_ad_fab", {"fact"}),
    (
        "concentrations swapped",
        FAB.replace("烟酰胺 5%，PCA锌 0.5%", "烟酰胺 0.5%，PCA锌 5%"),
        "p03",
        "paid_ad_fab",
        {"fact"},
    ),
    ("wrong figure", FAB.replace("水感凝露", "28 种成分"), "p03", "paid_ad_fab", {"fact"}),
    ("wrong pH", BAB.replace("不含皂基", "pH 8.5"), "p01", "paid_ad_bab", {"fact"}),
    ("wrong price", BAB.replace("79 元", "29 元"), "p01", "paid_ad_bab", {"fact"}),
    ("wrong frequency", PAS.replace("每周三次", "每周七次"), "p05", "paid_ad_pas", {"fact"}),
    ("what is absent", FAB.replace("配方精简", "添加香精，配方精简"), "p03", "paid_ad_fab", {"fact"}),
    ("absence that nobody claims", PAS.replace("红没药醇", "不含乙醇，红没药醇"), "p05", "paid_ad_pas", {"fact"}),
    ("an ingredient of another product", FAB.replace("水感凝露", "含视黄醇"), "p03", "paid_ad_fab", {"fact"}),
    ("what may not be claimed", REVIEW.replace("涂完不搓泥", "七天变白"), "p03", "social_media_review", {"fact"}),
    ("benefit first", "午后少补一次妆。" + FAB, "p03", "paid_ad_fab", {"structure"}),
    ("product before the problem", "先认识水杨酸细致精华。" + PAS, "p05", "paid_ad_pas", {"structure"}),
    (
        "after before before",
        BAB.replace("之前洗", "现在洗").replace("现在擦", "以前擦"),
        "p01",
        "paid_ad_bab",
        {"structure"},
    ),
    ("one paragraph", LONG.replace("\n", ""), "p04", "ecommerce_long_form", {"structure"}),
]


@pytest.mark.parametrize(
    ("text", "product", "copy_type", "expected"), [d[1:] for d in DEFECTS], ids=[d[0] for d in DEFECTS]
)
def test_a_planted_defect_is_named_and_nothing_else(text, product, copy_type, expected):
    assert set(kinds(text, product, copy_type)) == expected


# what must not be taken for a defect
FINE = [
    ("percentage before its ingredient", FAB.replace("烟酰胺 5%", "5% 的烟酰胺"), "p03", "paid_ad_fab"),
    ("figures in digits where the sheet has words", PAS.replace("每周三次", "每周 3 次"), "p05", "paid_ad_pas"),
    ("digits in a name", EYES.replace("咖啡因 3%", "咖啡因 3%，乙酰基六肽-8 0.005%", 1), "p10", "paid_ad_cta"),
    ("only spaces between", FAB.replace("烟酰胺 5%，PCA锌 0.5%", "烟酰胺 5% PCA锌 0.5% 甘油 4%"), "p03", "paid_ad_fab"),
    ("first of a range", STORY.replace("敷 10 分钟", "敷 10 到 15 分钟"), "p09", "social_media_storytelling"),
    (
        "the last step",
        golden("p04", "social_media_review").replace("。", "，护肤最后一步用。", 1),
        "p04",
        "social_media_review",
    ),
]


@pytest.mark.parametrize(("text", "product", "copy_type"), [f[1:] for f in FINE], ids=[f[0] for f in FINE])
def test_a_sound_copy_is_left_alone(text, product, copy_type):
    assert kinds(text, product, copy_type) == []


def test_spans_point_at_the_defect():
    text = FAB.replace("烟酰胺 5%", "烟酰胺 8%").replace("。", "！", 1)
    meta = {"product_id": "p03", "copy_type": "paid_ad_fab"}
    assert [text[slice(*problem.span)] for problem in copywriting.problems(text, meta)] == ["8%", "！"]
    marked = copywriting.mark(text, meta)
    assert {(text[start:end], label) for start, end, label in marked} >= {
        ("8%", "fact_fault"),
        ("！", "exclamation_fault"),
        ("0.5%", "fact"),
    }
    assert all(end <= after for (_, end, _), (after, _, _) in zip(marked, marked[1:], strict=False))


def rows_of(texts, metas) -> list[dict]:
    return [
        {"id": str(i), "prompt": copywriting.messages(m), "completion": text, "meta": m}
        for i, (text, m) in enumerate(zip(texts, metas, strict=True))
    ]


def test_every_measure_ranks_golden_above_a_copy_that_shouts():
    shouts = "家人们！！这个护肤神器绝绝子！闭眼入！七天变白！添加香精！烟酰胺 50%！"
    texts, metas = [FAB, shouts], [{"product_id": "p03", "copy_type": "paid_ad_fab"}] * 2
    for name, (good, bad) in measure_texts(load_task("copywriting"), rows_of(texts, metas)).items():
        if name not in ("persona", "near_copy", "no_repeat"):
            assert good > bad, name


def test_every_measure_takes_any_text():
    for text in ("", "。", "！", "\n\n", "a", "%", "{}[]<>", "5%" * 50, "字" * 3000):
        for copy_type in copywriting.COPY_TYPES:
            meta = {"product_id": "p03", "copy_type": copy_type}
            columns = measure_texts(load_task("copywriting"), rows_of([text], [meta]))
            assert all(value is None or 0 <= value <= 1 for (value,) in columns.values())
            assert columns["clean"] == [0.0] and columns["overall"][0] < 0.8
            copywriting.mark(text, meta)


def test_what_does_not_apply_is_none():
    meta = [{"product_id": "p03", "copy_type": kind} for kind in ("paid_ad_fab", "social_media_review")]
    assert [value is None for value in copywriting.call([], [FAB, REVIEW], meta)] == [False, True]
    assert [value is None for value in copywriting.persona([], [FAB, REVIEW], meta)] == [True, False]
    assert copywriting.facts_true([], ["没有事实。"], meta[:1]) == [None]


def test_no_reward_lets_an_empty_answer_pass():
    meta = [{"product_id": "p03", "copy_type": "paid_ad_fab"}]
    earned = {name: reward([], [""], meta)[0] for name, reward in copywriting.REWARDS.items()}
    assert earned.pop("allowed") == 1.0  # it holds no forbidden word: never to be used alone
    assert set(earned.values()) == {0.0}


def test_silence_and_stacking_earn_nothing():
    meta = [{"product_id": "p03", "copy_type": "paid_ad_fab"}] * 2
    assert copywriting.facts([], ["护肤要耐心。", FAB], meta)[0] == 0.0
    stacked = "屏障修护科学精简配方浓度源头温和" * 3
    assert copywriting.encouraged([], [stacked, FAB], meta) == [0.0, 1.0]


def test_near_copies_of_training_products_are_seen_and_others_not():
    train = [m for m in META if copywriting.products()[m["product_id"]]["split"] == "train"]
    val = [m for m in META if copywriting.products()[m["product_id"]]["split"] == "val"]
    assert len(train) == 135 and len(val) == 54
    assert set(copywriting.near_copy([], [golden(**_keys(m)) for m in train], train)) == {1.0}
    assert set(copywriting.near_copy([], [golden(**_keys(m)) for m in val], val)) == {0.0}


def _keys(meta: dict) -> dict:
    return {"product": meta["product_id"], "copy_type": meta["copy_type"]}


def test_a_product_of_the_users_own_comes_with_its_sheet():
    own = {**copywriting.products()["p03"], "id": "mine", "name": "我的精华"}
    meta = {"product_id": "mine", "copy_type": "paid_ad_fab", "product": own}
    assert "我的精华" in copywriting.messages(meta)[0]["content"]
    assert copywriting.problems(FAB.replace("烟酰胺平衡精华", "我的精华"), meta) == []


@pytest.mark.parametrize(
    "meta", [{"product_id": "p99", "copy_type": "paid_ad_fab"}, {"product_id": "p03", "copy_type": "poster"}]
)
def test_an_unknown_product_or_type_is_named(meta):
    with pytest.raises(ValueError, match="p99|poster"):
        copywriting.problems(FAB, meta)


def test_the_prompt_holds_the_whole_sheet():
    asked = copywriting.messages({"product_id": "p03", "copy_type": "paid_ad_fab"})[0]["content"]
    product = copywriting.products()["p03"]
    for part in (
        product["name"],
        "烟酰胺 5%",
        *product["may_claim"],
        *product["must_not_claim"],
        "60到140字",
        "169 元",
    ):
        assert part in asked


@pytest.mark.parametrize(
    "text, reason",
    [
        ("服务器错误，请稍后再试", "an error message"),
        ("请求过于频繁，请稍后再试。", "an error message"),
        ("抱歉，我无法完成这个请求。", "a refusal"),
        ("很抱歉，我不能为这款产品写文案。", "a refusal"),
        ("作为一个AI语言模型，我无法撰写广告。", "a refusal"),
        ("抱歉，这瓶精华没有香味。成分表里本来就没有香精。", None),
        ("皮肤屏障需要的不是更多步骤。", None),
    ],
)
def test_an_error_or_a_refusal_is_never_taken_for_copy(text, reason):
    from tasks.copywriting.rows import usable_text

    assert usable_text(text, "stop") == (text, reason)


def test_a_text_that_says_nothing_false_does_not_count_as_a_false_one():
    from tasks.copywriting import faults as copy_faults

    product = next(iter(copywriting.products().values()))
    meta = {"product_id": product["id"], "copy_type": "paid_ad_fab"}
    assert "fact" in {problem.kind for problem in copywriting.problems("这是一瓶精华。", meta)}, "the name is missing"
    assert not copy_faults.shows("false", "这是一瓶精华。", meta)


def test_a_faulty_copy_is_named_with_its_line(tmp_path):
    path, good = tmp_path / "copies.jsonl", {key: GOLDEN[0][key] for key in ("product_id", "copy_type", "copy")}
    rows = [
        good,
        good,
        {**good, "id": 7},
        {**good, "copy_type": ["x"]},
        {**good, "product_id": {}},
        {**good, "copy": " "},
    ]
    path.write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )  # empty lines count
    with pytest.raises(DataError) as error:
        read_copies(path, copywriting.products())
    told = [(finding.line, finding.reason) for finding in error.value.findings]
    assert [line for line, _ in told] == [3, 5, 7, 9, 11]
    for (_, reason), part in zip(
        told, ("appears twice", "is no text", "copy_type", "product_id", "copy is empty"), strict=True
    ):
        assert part in reason
