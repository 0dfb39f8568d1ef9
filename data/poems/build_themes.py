"""Learn the theme lexicon from the training split of the shipped Tang verse. One-off; themes.json ships with the repo.

A theme starts from words in titles (SEEDS: a poem called 送李侍御归蜀 is about parting). For every theme and every
character of the verse itself the lexicon holds the smoothed log-odds of the character standing in a poem so titled
against one that is not (Monroe, Colaresi and Quinn 2008, "Fightin' Words", section 3.3.4; the prior is worth PRIOR
poems at the character's overall rate, so that rare characters say little). A text's score is the mean weight of its
distinct characters, standardised by mean and deviation over the training poems; `threshold` is the score that the top
fifth of the training poems reach. Titles of val and test poems, and their texts, are not looked at.

Reads   tang.json.xz
Writes  themes.json: {theme: {seeds, poems, mean, deviation, threshold, weights: {character: weight}}}
Run     python data/poems/build_themes.py
"""

import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))

from tasks.poems.corpus import clean, load_records, split_poems  # noqa: E402

# theme -> characters or words in a title; single characters are unambiguous enough in Tang titles
SEEDS = {
    "送别": "送 别 饯 留别 祖筵",
    "友情": "寄 赠 酬 答 友人 故人 访",
    "思乡": "归 乡 忆 故园 思归 望乡 家书",
    "羁旅": "宿 泊 途 旅 客 舟 驿 晚次 行次",
    "边塞": "塞 边 从军 凉州 陇 征 战 戍 将军",
    "山水": "山 江 湖 溪 峰 泉 潭 峡 瀑",
    "田园": "田 村 园 农 耕 樵 渔",
    "自然": "林 云 风 鸟 雨 竹 松 晴 泉",
    "宁静": "闲 静 幽 独坐 晚望 偶作",
    "隐逸": "隐 山居 幽居 闲居 草堂 山人 处士",
    "禅意": "寺 僧 禅 上人 兰若 精舍 法师 偈",
    "仙道": "仙 道士 炼师 尊师 真人 步虚 观主",
    "怀古": "古 咏史 陵 庙 台 故宫 遗 战国",
    "宫怨": "宫 长门 昭君 婕妤 怨 长信",
    "闺情": "闺 妾 思妇 情 捣衣 寄远 美人",
    "宴饮": "酒 饮 醉 宴 杯 樽",
    "春景": "春 寒食 清明 上巳",
    "秋思": "秋 九日 重阳 七夕",
    "冬雪": "雪 冬 寒 腊",
    "月夜": "月 夜 中秋",
    "咏花": "花 梅 牡丹 桃 菊 莲 荷 海棠 杏",
    "登临": "登 楼 阁 眺 望",
    "哀悼": "挽 哭 悼 伤 吊 墓",
    "朝廷": "应制 侍 奉和 早朝 入直 圣制",
}
PRIOR = 100
KEPT = 300  # characters per theme: those whose weight, either way, is surest (weight over its standard deviation)


def main() -> None:
    poems, _ = clean(load_records(HERE / "tang.json.xz"), "full", "tang")
    train = split_poems(poems)[0]["train"]
    sets = [sorted(set(poem.key)) for poem in train]
    everywhere = Counter(char for chars in sets for char in chars)

    lexicon = {}
    for theme, words in SEEDS.items():
        titled = [any(word in poem.title for word in words.split()) for poem in train]
        inside = Counter(char for chars, hit in zip(sets, titled, strict=True) if hit for char in chars)
        n_in, n_out = sum(titled), len(train) - sum(titled)
        weights, certainty = {}, {}
        for char, count in everywhere.items():
            if count < 20:  # too rare to say anything
                continue
            rate = PRIOR * count / len(train)
            odds_in = (inside[char] + rate) / (n_in - inside[char] + PRIOR - rate)
            odds_out = (count - inside[char] + rate) / (n_out - count + inside[char] + PRIOR - rate)
            weights[char] = round(math.log(odds_in) - math.log(odds_out), 3)
            deviation = math.sqrt(1 / (inside[char] + rate) + 1 / (count - inside[char] + rate))
            certainty[char] = abs(weights[char]) / deviation
        strongest = sorted(weights, key=lambda char: (-certainty[char], char))[:KEPT]
        weights = {char: weights[char] for char in sorted(strongest)}
        scores = [sum(weights.get(char, 0.0) for char in chars) / len(chars) for chars in sets]
        mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
        threshold = (sorted(scores)[int(0.8 * len(scores))] - mean) / deviation
        lexicon[theme] = {
            "seeds": words,
            "poems": n_in,
            "mean": round(mean, 5),
            "deviation": round(deviation, 5),
            "threshold": round(threshold, 4),
            "weights": weights,
        }
        print(theme, n_in, round(threshold, 2), "".join(sorted(weights, key=lambda char: -weights[char])[:15]))
    text = json.dumps(lexicon, ensure_ascii=False, separators=(",", ":")).replace('},"', '},\n"')
    (HERE / "themes.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
