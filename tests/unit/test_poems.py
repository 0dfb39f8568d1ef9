"""Metrics and rewards of verse on right and wrong examples, gold rows included."""

import pytest

from tasks import poems
from tasks.poems import corpus as verse_corpus
from tasks.poems import prosody

GUAN_QUE = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
JUE_JU = {"form": "五言绝句", "themes": ["登临", "山水"]}


def one(measure, text: str, meta: dict = JUE_JU) -> float | None:
    return measure([None], [text], [meta])[0]


@pytest.mark.parametrize(
    ("text", "form", "rhyme", "meter", "all_three"),
    [
        (GUAN_QUE, 1, 1, 1, 1),
        ("白日依山盡，黃河入海流。欲窮千里目，更上一層樓。", 1, 1, 1, 1),  # traditional script is judged alike
        ("白日依山尽，黄河入海流。", 0, 0, 0, 0),  # two lines
        (GUAN_QUE + GUAN_QUE, 0, 0, 1, 0),  # eight: a regulated shape, not the one asked; and its rhyme words repeat
        ("白日依山尽，黄河入海东。欲穷千里目，更上一层楼。", 1, 0, 1, 0),  # 东 does not rhyme with 楼
        ("日白依山尽，黄河入海流。欲穷里千目，更上一层楼。", 1, 1, 0, 0),  # 仄 and 平 out of place
        ("白日依山aa，黄河入海流。欲穷千里目，更上一层楼。", 0, 0, 0, 0),
        ("", 0, 0, 0, 0),
    ],
)
def test_rules(text, form, rhyme, meter, all_three):
    measures = (poems.form, poems.rhyme_pass, poems.meter_pass, poems.all_three)
    assert [one(measure, text) for measure in measures] == [form, rhyme, meter, all_three]


def test_shares_rise_towards_a_pass():
    lost = "白日依山尽，黄河入海东。欲穷千里目，更上一层楼。"
    assert one(poems.rhyme, lost) < one(poems.rhyme, GUAN_QUE) == 1.0
    assert one(poems.meter, "日白依山尽，黄河入海流。欲穷里千目，更上一层楼。") < one(poems.meter, GUAN_QUE) == 1.0


def test_a_wrong_form_earns_no_share():
    seven = {"form": "七言绝句", "themes": []}
    assert one(poems.rhyme, GUAN_QUE, seven) == one(poems.meter, GUAN_QUE, seven) == 0.0


def test_a_copied_poem_is_a_near_copy_and_a_fresh_one_is_not():
    copied = poems.training_poems()[7].text
    assert one(poems.near_copy, copied) == 1.0 and one(poems.overall, copied) == 0.0
    assert one(poems.near_copy, "猫狗电脑手机牌，车站咖啡店外排。") == 0.0


def test_held_out_poems_are_no_near_copies_of_training_poems():
    kept, _ = verse_corpus.clean(verse_corpus.load_records(poems.DATA / "tang.json.xz"), "full", "tang")
    test = verse_corpus.split_poems(kept)[0]["test"]
    assert len(test) >= 512
    assert sum(poems.near_copy(None, [poem.text for poem in test], [{}] * len(test))) == 0


def test_repetition_and_fluency():
    assert one(poems.no_repeat, "春春春春") == 0.25 and one(poems.no_repeat, "春眠不觉") == 1.0
    assert one(poems.fluency, GUAN_QUE) > one(poems.fluency, "尽白山依日，流黄海入河。目欲里穷千，楼更层上一。")
    assert one(poems.fluency, "春") is None and one(poems.no_repeat, "abc") is None, "does not apply is never 0"


def test_theme_names_what_a_poem_speaks_of():
    parting = "故人西辞黄鹤楼，烟花三月下扬州。孤帆远影碧空尽，唯见长江天际流。"
    assert "送别" in poems.themes_of("送孟浩然之广陵", parting)
    border = "秦时明月汉时关，万里长征人未还。但使龙城飞将在，不教胡马度阴山。"
    assert one(poems.theme, border, {"form": "七言绝句", "themes": ["边塞"]}) == 1.0
    assert one(poems.theme, border, {"form": "七言绝句", "themes": ["闺情"]}) == 0.0
    assert one(poems.theme, border, {"form": "七言绝句", "themes": ["量子"]}) is None
    for garbage in ("", "abc", "猫狗电脑"):
        assert one(poems.theme, garbage, {"form": "七言绝句", "themes": list(poems.theme_lexicon())}) == 0.0


def test_instruction_counts_lines_not_couplets():
    assert poems.messages({"form": "七言律诗", "themes": ["山水", "宁静"]}) == [
        {"role": "user", "content": "写一首[七言律诗] 要求8句 主题为: 山水、宁静"}
    ]


def test_every_metric_and_reward_gives_one_value_a_text():
    texts = [GUAN_QUE, "", "not verse", "床前明月光，疑是地上霜。举头望明月，低头思故乡。"]
    for name, measure in {**poems.METRICS, **poems.REWARDS}.items():
        values = measure([None] * 4, texts, [JUE_JU] * 4)
        assert len(values) == 4, name
        assert all(value is None or 0.0 <= value <= 1.0 for value in values), name


def test_distinct_counts_over_the_whole_set():
    distinct_2 = poems.SET_METRICS["distinct_2"]
    assert distinct_2(["春眠不觉"]) == 1.0 and distinct_2(["春眠不觉", "春眠不觉"]) == 0.5


def test_marks_point_at_rhymes_and_faults():
    spans = poems.mark("白日依山尽，黄河入海东。欲穷千里目，更上一层楼。", JUE_JU)
    assert spans and {label for *_, label in spans} <= {"rhyme", "rhyme_fault", "meter_fault", "form_fault"}
    assert all(prosody.HAN.fullmatch(GUAN_QUE[start:end]) for start, end, label in spans if label == "rhyme")


def test_damaged_records_are_dropped_with_their_reason():
    records = [
        {"paragraphs": ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"]},
        {"paragraphs": ["白日依山尽，黄河入海流。", "欲穷千里目，更上一层楼。"]},
        {"paragraphs": ["白日依山盡（一作隱），黃河入海流。", "欲窮千里目，更上一層臺。（缺）。"]},
        {"paragraphs": ["白日□山盡，黃河入海流。", "欲窮千里目，更上一層樓。"]},
        {"paragraphs": ["白日{左日右亥}山盡，黃河入海流。"]},
        {"paragraphs": ["白日依山盡（一作，黃河入海流。"]},
        {"paragraphs": ["白日依山盡，黃河入海。"]},
        {"paragraphs": ["白日依山盡。"]},
        {"paragraphs": []},
    ]
    kept, dropped = verse_corpus.clean(records, "full", "x")
    assert [poem.text for poem in kept] == [GUAN_QUE, "白日依山尽，黄河入海流。欲穷千里目，更上一层台。"]
    assert dropped == {
        "duplicate": 1,
        "missing character (□)": 1,
        "glyph description {…}": 1,
        "unclosed bracket or 《": 1,
        "uneven line lengths": 1,
        "odd line count": 1,
        "empty": 1,
    }


def test_a_title_and_a_rhyme_group_are_asked_behind_the_themes():
    row = {"form": "五言绝句", "themes": ["登临"], "ask_title": "登鹳雀楼", "ask_rhyme": "下平十一尤"}
    assert poems.messages(row)[0]["content"] == "写一首[五言绝句] 要求4句 主题为: 登临 题目：登鹳雀楼 韵部：下平十一尤"
    assert one(poems.rhyme_group, GUAN_QUE, row) == 1.0
    assert one(poems.rhyme_group, GUAN_QUE, row | {"ask_rhyme": "上平一东"}) == 0.0
    assert one(poems.rhyme_group, GUAN_QUE, JUE_JU) is None
    # as a reward it must not leave out the prompts that ask for none
    assert one(poems.REWARDS["rhyme_group"], GUAN_QUE, JUE_JU) == 0.0
    assert one(poems.REWARDS["rhyme_group"], GUAN_QUE, row) == 1.0


@pytest.mark.parametrize(
    ("text", "form", "rhyme", "meter"),
    [
        (GUAN_QUE, [(5, 0.25), (11, 0.25), (17, 0.25), (23, 0.25)], [(11, 0.5), (23, 0.5)], [0.25] * 4),
        (GUAN_QUE.replace("千里", "千山"), None, [(11, 0.5), (23, 0.5)], [0.25, 0.25, 0.125, 0.25]),
        (GUAN_QUE.replace("海流", "海"), [(5, 0.25), (10, -0.25)], [], []),
        (GUAN_QUE + "天", [(5, 0.25), (11, 0.25), (17, 0.25), (23, 0.25), (25, -1.0)], [], []),
        ("", [], [], []),
    ],
)
def test_each_line_earns_its_part_of_the_share(text, form, rhyme, meter):
    assert form is None or one(poems.form_by_line, text) == form
    assert one(poems.rhyme_by_line, text) == rhyme
    assert [value for _, value in one(poems.meter_by_line, text)] == meter


def test_the_parts_of_real_poems_add_up_to_the_share():
    for poem in poems.training_poems()[:200]:
        for name, by_line in poems.STEP_REWARDS.items():
            share = one(poems.REWARDS[name], poem.text, {"form": poem.form})
            parts = [value for _, value in one(by_line, poem.text, {"form": poem.form})]
            assert share is None or sum(parts) == pytest.approx(share, abs=0.2), (name, poem.text)  # unlisted ones
