"""Training files with one planted fault each: which, where and how grave. tests/stages/test_broken_corpus.py runs the
preflight over them.

A new case is one call of `case` in `write_cases`.
"""

import json

# Clean questions and answers, each long enough to be held out; every broken file is made of some of them and its fault.
GOOD = [
    ("天空为什么是蓝的？", "阳光穿过大气时，波长短的蓝光被空气分子散射得最厉害，从四面八方进入眼睛，天就显得蓝。"),
    ("茶叶怎样保存？", "装进密封的罐子，放在阴凉干燥、没有异味的柜子里，绿茶最好收进冰箱的冷藏室。"),
    ("早起有什么好处？", "早晨安静，少有人打扰，可以先把一天里最要紧的事情做完，心里也踏实许多。"),
    ("怎样记住别人的名字？", "听到以后马上重复一遍，再把名字和对方的长相或者职业连起来，过几天主动叫一次。"),
    ("雨后为什么有彩虹？", "空中的小水珠像三棱镜一样，把阳光折射和反射，不同颜色的光偏转的角度不同，便排成圆弧。"),
    ("怎样挑选西瓜？", "看瓜脐，小的多半皮薄；拍一拍，声音闷而不空的熟得正好；同样大小，掂着重的水分足。"),
    ("跑步前要热身吗？", "要的。先慢走五分钟，再活动脚踝、膝盖和髋部，身体微微出汗以后提速，不容易拉伤。"),
    ("怎样写好一封信？", "想清楚写给谁、为什么写，开头直接说事，一段只讲一件，写完念一遍，把绕口的地方改掉。"),
    ("月亮为什么有圆缺？", "月亮自己不发光，我们看到的是它被太阳照亮的一面，随着它绕地球走，这一面露出多少天天在变。"),
    ("家里的绿萝叶子发黄怎么办？", "多半是浇水太勤，烂了根。先停几天水，挪到有散射光的窗边，剪去黄叶，等土干透再浇。"),
    ("怎样安排复习？", "先把要考的内容列成清单，按掌握的程度排个先后，每天留半小时回头看昨天学过的部分。"),
    ("冬天怎样防止手裂？", "洗完手马上擦干，趁皮肤还润涂上护手霜，做家务戴手套，少用很烫的水。"),
]
LABELS = {"售前": "sales_oriented", "诚实": "honesty"}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def sft(ask: str = GOOD[0][0], answer: str = GOOD[0][1], **changed) -> dict:
    return {"prompt": [user(ask)], "completion": [said(answer)], "meta": {"source": "a"}} | changed


def pair(ask: str, chosen: str, rejected: str, **changed) -> dict:
    return {"prompt": [user(ask)], "chosen": [said(chosen)], "rejected": [said(rejected)], "meta": {}} | changed


def style(text: str, label: str = "诚实", english: str | None = None, question: str | None = None) -> dict:
    row = {"input": text, "label": label, "label_english": LABELS.get(label, "other") if english is None else english}
    return row | {"metadata": {"question_id": question or text[:6]}}


def good_sft(count: int = 5, first: int = 0) -> list[dict]:
    return [sft(*GOOD[(first + i) % len(GOOD)]) for i in range(count)]


def good_pairs(count: int = 5) -> list[dict]:
    return [pair(GOOD[i][0], GOOD[i][1], GOOD[(i + 5) % len(GOOD)][1]) for i in range(count)]


def good_styles(first: int = 0) -> list[dict]:
    return [style(f"用户问题：{GOOD[i][0]}\n回答：{GOOD[i][1]}", list(LABELS)[i % 2]) for i in range(first, first + 12)]


def line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"


class Corpus:
    def __init__(self):
        self.index = []  # one entry a case; its "files" hold the bytes

    def case(self, name: str, rows: list, *faults: tuple, val: list | None = None, schema: str = "sft", **settings):
        """faults: (line, level, part of the reason), in val with a "val" in front. settings: flags of stage 19."""
        sides = {f"{name}.jsonl": rows} | ({f"{name}.val.jsonl": val} if val is not None else {})
        # rows are objects, or bytes as they stand in the file
        files = {side: b"".join(r if isinstance(r, bytes) else line(r) for r in part) for side, part in sides.items()}
        planted = []
        for fault in faults:
            where = f"{name}.val.jsonl" if fault[0] == "val" else f"{name}.jsonl"
            number, level, reason = fault[1:] if fault[0] == "val" else fault
            planted.append({"file": where, "line": number, "level": level, "reason": reason})
        entry = {"case": name, "train": f"{name}.jsonl", "val": f"{name}.val.jsonl" if val is not None else None}
        self.index.append(entry | {"schema": schema, "settings": settings, "faults": planted, "files": files})

    def in_third(self, name: str, row, level: str, reason: str, **settings) -> None:
        """The fault is line 3 of five SFT rows."""
        rows = good_sft()
        rows[2] = row
        self.case(name, rows, (3, level, reason), **settings)

    def answer(self, name: str, answer: str, level: str, reason: str, **settings) -> None:
        self.in_third(name, sft(GOOD[2][0], answer), level, reason, **settings)

    def also(self, name: str, level: str, reason: str) -> None:
        """The fault of a case is seen in another way too."""
        faults = next(entry["faults"] for entry in self.index if entry["case"] == name)
        faults.append(faults[0] | {"level": level, "reason": reason})

    def model(self, name: str, changed: dict, level: str, reason: str, **settings) -> None:
        """The fault is in the model's folder: `changed` says what is put into files of data/tiny_qwen3."""
        self.case(name, good_sft(), **settings)
        self.index[-1]["model"] = changed
        self.index[-1]["faults"] = [{"file": "model", "line": 0, "level": level, "reason": reason}]


def write_cases(corpus: Corpus) -> None:
    whole = line(sft(*GOOD[2]))

    # --- a line that is no row
    corpus.case("byte_order_mark", [b"\xef\xbb\xbf" + line(good_sft()[0]), *good_sft()[1:]], (1, "error", "BOM"))
    corpus.case("utf16", ["".join(line(r).decode() for r in good_sft()).encode("utf-16")], (1, "error", "UTF-16"))
    corpus.in_third("gbk_line", whole.decode().encode("gbk"), "error", "probably gbk")
    corpus.in_third("damaged_utf8", whole.replace("心".encode(), b"\xe5\xbf"), "error", "broken UTF-8")
    corpus.case(
        "torn_last_line", [*good_sft(4), line(sft(*GOOD[4])).decode()[:-40].encode()], (5, "error", "broken JSON")
    )
    corpus.in_third("trailing_comma", whole.replace(b"}\n", b",}\n"), "error", "broken JSON")
    corpus.in_third("single_quotes", str(sft(*GOOD[2])).encode() + b"\n", "error", "broken JSON")
    corpus.in_third("not_a_number", b'{"score": NaN, ' + whole[1:], "error", "NaN is not JSON")
    corpus.in_third("infinity", b'{"score": 1e999, ' + whole[1:], "error", "too large")
    corpus.in_third("key_twice", b'{"meta": {}, ' + whole[1:], "error", "appears twice")
    corpus.in_third("array_line", b"[" + whole.strip() + b"]\n", "error", "not an object")
    corpus.in_third("two_rows_in_a_line", whole.strip() + b" " + line(sft(*GOOD[7])), "error", "broken JSON")
    corpus.in_third("raw_control_character", whole.replace("心".encode(), b"\x07"), "error", "control character U+0007")
    corpus.in_third("escaped_null", whole.replace("心".encode(), b"\\u0000"), "error", "control character U+0000")
    corpus.in_third("half_surrogate", whole.replace("心".encode(), b"\\ud83d"), "error", "surrogate")
    corpus.case("no_rows", [], (0, "error", "holds no rows"))

    # --- a row of another shape
    corpus.in_third(
        "no_completion", {"prompt": [user("早")], "meta": {"source": "a"}}, "error", "'completion' is missing"
    )
    corpus.in_third("alpaca_row", {"instruction": "早", "input": "", "output": "好"}, "error", "'prompt' is missing")
    corpus.also("alpaca_row", "error", "'completion' is missing")
    corpus.in_third("prompt_is_a_string", sft(prompt="早上好"), "error", "prompt is a string")
    corpus.in_third("sharegpt_role", sft(prompt=[{"role": "human", "content": "早"}]), "error", "unknown role 'human'")
    corpus.in_third("no_role", sft(prompt=[{"content": "早上好"}]), "error", "has no role")
    corpus.in_third("null_content", sft(completion=[said(None)]), "error", "content is a null")
    corpus.in_third("parts_as_content", sft(completion=[said([{"type": "text"}])]), "error", "content is a list")
    corpus.in_third("no_turns", sft(completion=[]), "error", "completion has no turns")
    corpus.answer("empty_answer", "", "error", "the answer is empty")
    corpus.answer("blank_answer", " \n\t", "error", "the answer is empty")
    corpus.in_third("empty_question", sft(ask=""), "error", "the text is empty")
    corpus.in_third(
        "answer_in_prompt", sft(prompt=[user("早"), said("早")]), "error", "last turn of prompt is assistant"
    )
    corpus.in_third("user_twice", sft(prompt=[user("早"), user("在吗")]), "error", "is user where assistant is due")
    system = {"role": "system", "content": "你是助手"}
    corpus.in_third(
        "system_in_between", sft(prompt=[user("早"), system, user("在")]), "error", "is system where assistant"
    )
    corpus.in_third(
        "ends_with_user", sft(completion=[said("早"), user("在吗")]), "error", "last turn of completion is not"
    )
    corpus.in_third("meta_is_a_list", sft(*GOOD[2], meta=[]), "error", "meta is a list")
    corpus.in_third("other_meta", sft(*GOOD[2], meta={"source": "a", "theme": "b"}), "warning", "other keys than most")
    rows = good_pairs(3)
    faults = [(n, "error", "'completion' is missing") for n in (1, 2, 3)]
    corpus.case("pairs_for_sft", rows, (1, "error", "these are preference rows, not sft rows"), *faults)

    # --- pairs
    rows = good_pairs()
    del rows[2]["rejected"]
    corpus.case("no_rejected", rows, (3, "error", "'rejected' is missing"), schema="preference")
    for name, chosen, rejected, level, reason in (
        ("equal_pair", GOOD[2][1], GOOD[2][1] + " ", "error", "are equal"),
        ("equal_but_for_punctuation", GOOD[2][1], GOOD[2][1].replace("，", ","), "warning", "differ in punctuation"),
        (
            "nearly_equal",
            GOOD[2][1] * 3 + GOOD[3][1],
            GOOD[2][1] * 3 + GOOD[3][1].replace("马", "立"),
            "note",
            "1 of 1",
        ),
    ):
        rows = good_pairs()
        rows[2] = pair(GOOD[2][0], chosen, rejected)
        corpus.case(name, rows, (3, level, reason), schema="preference")
    rows = good_pairs()
    rows[3] = pair(GOOD[1][0], rows[1]["rejected"][0]["content"], rows[1]["chosen"][0]["content"])
    corpus.case("contradiction", rows, (4, "error", "the pair of line 2 the other way"), schema="preference")
    numbers = "零一二三四五六七八九"
    tail = "，余下的部分照着说明做就可以，时间大约半个小时，做完以后收拾干净。"
    words = [numbers[i // 10] + numbers[i % 10] for i in range(60)]
    rows = [pair(f"第{w}件事怎么做？", f"{w}号先准备材料。", f"{w}号先准备材料{tail}") for w in words]
    corpus.case(
        "length_tells", rows, (0, "warning", "length alone"), (0, "note", "a bag of characters"), schema="preference"
    )
    rows = [pair(f"第{w}件事怎么做？", f"{w}号要先准备好。", f"呃{w}号先准备好。") for w in words]
    corpus.case("surface_tells", rows, (0, "note", "a bag of characters"), schema="preference")

    # --- copies
    corpus.case("row_twice", [*good_sft(4), sft(*GOOD[1])], (5, "warning", "the same row as line 2"))
    near = GOOD[1][1].replace("冷藏室", "冷冻室")
    corpus.case("near_copy", [*good_sft(4), sft("茶怎么放？", near)], (5, "warning", "nearly the answer of line 2"))
    fault = ("val", 2, "error", "the same row as train line 3")
    corpus.case("row_in_val", good_sft(), fault, val=[sft(*GOOD[6]), sft(*GOOD[2])])
    fault = ("val", 2, "error", "the same answer as train line 3")
    corpus.case(
        "answer_in_val", good_sft(), fault, val=[sft(*GOOD[6]), sft("为何早起？", GOOD[2][1].replace("，", " "))]
    )
    fault = ("val", 1, "error", "nearly the answer of train line 2")
    corpus.case("near_copy_in_val", good_sft(), fault, val=[sft("茶怎么放？", near), sft(*GOOD[6])])
    fault = ("val", 1, "warning", "the same short answer as train line 1")
    corpus.case("short_answer_in_val", [sft("在吗？", "我在。"), *good_sft(4)], fault, val=[sft("有人吗？", "我在！")])
    product = [sft(*row, meta={"product_id": f"p{i}"}) for i, row in enumerate(GOOD[:6])]
    fault = ("val", 1, "error", "the product_id p4 stands at train line 5")
    corpus.case("product_in_val", product[:5], fault, val=[sft(*GOOD[6], meta={"product_id": "p4"}), product[5]])
    rows = [sft(f"{ask}请回答。", "这个问题我不太清楚。") for ask, _ in GOOD]
    corpus.case("one_answer_for_all", [*good_sft(), *rows], (6, "warning", "the same answer to 12 prompts"))
    few = [sft(f"请说出数字{a}{b}。", f"{a}{b}。") for a in numbers for b in numbers[:3]]
    corpus.case("files_exchanged", good_sft(6), ("val", 0, "warning", "val has 30 rows and train 6"), val=few)

    # --- what max_length cuts off
    answer = "".join(text for _, text in GOOD[5:8])
    corpus.answer("cut_answer", answer, "error", "the answer is cut at 100 tokens", max_length=100)
    exact = sft(GOOD[2][0], GOOD[2][1])
    need = len(GOOD[2][0]) + len(GOOD[2][1]) + 9  # two headers of three tokens, two turn ends, a line end
    corpus.case("lost_eos", [exact], (1, "error", "the answer loses its eos"), max_length=need - 1)
    corpus.in_third("prompt_fills_it", sft(answer, "好的。"), "error", "no token is trained", max_length=100)

    # --- damaged and invisible characters
    for name, found, level, reason in (
        ("zero_width_space", "早\u200b晨", "warning", "invisible character U+200B"),
        ("direction_mark", "早\u202e晨", "warning", "invisible character U+202E"),
        ("hidden_tags", "早\U000e0041\U000e0042晨", "warning", "invisible character U+E0041"),
        ("line_separator", "早\u2028晨", "warning", "line separator U+2028"),
        ("c1_control", "早\x9d晨", "error", "control character U+009D"),
        ("replacement_character", "早\ufffd晨", "warning", "replacement character"),
        ("private_use", "早\ue00b晨", "warning", "private-use character U+E00B"),
        ("kangxi_radical", "早⼈晨", "warning", "U+2F08 only looks like"),
        ("kun_jin_kao", "锟斤拷", "error", "mojibake: 锟斤拷"),
        ("utf8_read_as_latin", "早晨很好".encode().decode("latin-1"), "error", "mojibake"),
        ("utf8_read_as_gbk", "早晨安静，少有人打扰".encode().decode("gbk", "ignore"), "error", "mojibake"),
        ("gbk_read_as_latin", "早晨安静".encode("gbk").decode("latin-1"), "error", "mojibake"),
    ):
        corpus.answer(name, GOOD[2][1][:19] + found + GOOD[2][1][19:], level, reason)

    # --- what is not the writer's words
    for name, text, level, reason in (
        ("special_token", f"{GOOD[2][1]}<|im_end|>", "error", "the special token <|im_end|>"),
        ("other_template", f"[INST] {GOOD[2][1]} [/INST]", "warning", "markup of a chat template: [INST]"),
        ("html_entity", f"早晨&nbsp;{GOOD[2][1]}", "warning", "the HTML entity &nbsp;"),
        ("html_tag", f"早晨<br/>{GOOD[2][1]}", "warning", "an HTML tag <br/>"),
        ("escaped_twice", f"早晨。\\n{GOOD[2][1]}", "warning", "an escape written out: \\n"),
        ("placeholder", f"{{{{ name }}}}你好，{GOOD[2][1]}", "warning", "nobody filled in: {{ name }"),
        ("missing_value", "nan", "warning", "the whole text is 'nan'"),
        ("api_error", "Error code: 429 - rate limit reached", "error", "an error message stored"),
        ("api_error_json", '{"error": {"message": "insufficient_quota"}}', "error", "an error message stored"),
        ("api_error_chinese", "请求过于频繁，请稍后再试。", "error", "an error message stored"),
        ("role_label", f"助手：{GOOD[2][1]}", "warning", "starts with a label: 助手："),
        ("white_space", f"\n{GOOD[2][1]}", "warning", "white space around the answer"),
        ("no_word", "……", "warning", "has no word in it"),
        ("refusal", "作为一个人工智能语言模型，我无法回答这个问题，请见谅。", "warning", "refuses"),
        ("broken_off", GOOD[2][1][:-1] + "，而且身体也会，", "warning", "breaks off at '，'"),
        ("loop", "早起的好处很多。" * 8, "warning", "repeats a passage"),
        ("question_repeated", GOOD[2][0], "warning", "completion repeats the prompt"),
        ("other_language", "The morning is quiet and nobody disturbs you at work.", "warning", "is Latin in a Chinese"),
        (
            "traditional",
            "早晨安靜，少有人打擾，可以先把最要緊的事情做完，這樣心裡也會踏實許多。",
            "warning",
            "traditional",
        ),
        ("mobile_number", f"电话是13912345678。{GOOD[2][1]}", "warning", "a mobile number"),
        ("identity_card", f"证件号11010519491231002X。{GOOD[2][1]}", "warning", "an identity card number"),
        ("mail_address", f"写信到zhang.san@mail.cn。{GOOD[2][1]}", "warning", "an e-mail address"),
    ):
        corpus.answer(name, text, level, reason)
    corpus.also("api_error", "warning", "is Latin in a Chinese")
    corpus.in_third(
        "number_in_prompt",
        sft("我叫李四，电话139 1234 5678，怎么退货？", "在订单页申请。"),
        "warning",
        "prompt: personal",
    )

    # --- thinking
    for name, text, level, reason, on in (
        ("thinking_never_closed", f"<think>想一想。{GOOD[2][1]}", "error", "opened and never closed", True),
        ("thinking_never_opened", f"想一想。</think>{GOOD[2][1]}", "error", "closed and never opened", True),
        ("nothing_but_thinking", "<think>想一想。</think>\n", "error", "no answer behind", True),
        ("empty_thinking", f"<think>\n\n</think>\n\n{GOOD[2][1]}", "warning", "an empty thinking block", False),
        ("thinking_while_off", f"<think>想一想。</think>{GOOD[2][1]}", "warning", "while thinking is off", False),
        (
            "some_think",
            f"<think>想一想。</think>{GOOD[2][1]}",
            "warning",
            "an answer with a thinking block, where",
            True,
        ),
    ):
        corpus.answer(name, text, level, reason, enable_thinking=on)
    mixed = "an answer with a thinking block, where"
    corpus.also("thinking_never_opened", "warning", mixed)
    corpus.also("nothing_but_thinking", "warning", mixed)
    corpus.also("nothing_but_thinking", "warning", "white space around")
    earlier = [user("早"), said("<think>想。</think>早"), user(GOOD[2][0])]
    corpus.in_third("earlier_thinking", sft(prompt=earlier), "warning", "a thinking block in an earlier turn")

    # --- classifiers
    for name, changed, level, reason in (
        ("no_label", {"label": ""}, "error", "label is empty"),
        ("label_with_space", {"label": "诚实 "}, "error", "white space around the label"),
        (
            "two_names_for_a_label",
            {"label_english": "honest"},
            "error",
            "the label 诚实 is called honest here and honesty",
        ),
    ):
        rows = good_styles()
        rows[3] |= {"label": "诚实", "label_english": "honesty"} | changed
        corpus.case(name, rows, (4, level, reason), schema="style")
    rows = good_styles() + [good_styles()[3] | {"label": "售前", "label_english": "sales_oriented"}]
    corpus.case("text_with_two_labels", rows, (13, "error", "the same text is labelled"), schema="style")
    rows = [*good_styles(), style("用户问题：去哪儿？\n回答：去超市。", "无伤害", "harmless")]
    corpus.case("rare_class", rows, (13, "warning", "the label 无伤害 has 1 rows"), schema="style")
    val = [style("用户问题：去哪儿？\n回答：去超市。", label) for label in ("诚实", "售前")]
    val[1] = style("用户问题：吃什么？\n回答：吃米饭。", "有帮助", "helpful")
    faults = [
        ("val", 2, "error", "the label 有帮助 is not in train"),
        ("val", 0, "warning", "the label 售前 of train line"),
    ]
    corpus.case("unseen_label", good_styles(), *faults, val=val, schema="style")
    val = [style("用户问题：去哪儿？\n回答：去超市。", "诚实"), style("用户问题：吃什么？\n回答：吃米饭。", "售前")]
    val[0]["metadata"]["question_id"] = good_styles()[0]["metadata"]["question_id"]
    rows = [row | {"metadata": {"question_id": f"q{i}"}} for i, row in enumerate(good_styles())]
    val[0]["metadata"]["question_id"] = "q4"
    fault = ("val", 1, "error", "the question_id q4 stands at train line 5")
    corpus.case("question_in_val", rows, fault, val=val, schema="style")
    rows = [row | {"label": "诚实", "label_english": "honesty"} for row in good_styles()]
    corpus.case("one_class", rows, (0, "error", "every row has the label 诚实"), schema="style")

    # --- RL prompts
    corpus.case(
        "no_room",
        [{"prompt": [user(GOOD[0][0])], "meta": {}}, {"prompt": [user(answer)], "meta": {}}],
        (2, "error", "no room for an answer"),
        schema="prompts",
        max_length=100,
    )

    # --- the model's folder
    write_models(corpus)


def write_models(corpus: Corpus) -> None:
    turn = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    ask = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    template = "{% for m in messages %}" + turn + "{% endfor %}"
    tokens, texts = "tokenizer_config.json", "chat_template.jinja"
    corpus.model(
        "pad_is_eos", {tokens: {"pad_token": "<|im_end|>"}}, "warning", "pad and eos are the same token <|im_end|>"
    )
    base = {tokens: {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}}
    corpus.model("base_model", base, "warning", "pad and eos are the same token <|endoftext|>")
    corpus.also("base_model", "warning", "the template ends a turn with <|im_end|>")
    corpus.model("no_chat_template", {texts: ""}, "error", "the tokenizer has no chat template")
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    corpus.model("turns_without_end", {texts: plain}, "error", "does not end the assistant's turn with eos <|im_end|>")
    corpus.model("no_generation_prompt", {texts: template}, "error", "ignores add_generation_prompt")
    marks = "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    marks += "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}{% else %}" + turn
    marks += "{% endif %}{% endfor %}" + ask
    corpus.model("eos_outside_the_marks", {texts: marks}, "error", "leave out eos <|im_end|>: it is never trained")
    last = "{% for m in messages[-2:] %}" + turn + "{% endfor %}" + ask
    corpus.model("forgets_the_first_turn", {texts: last}, "error", "leaves out '你好'")
    other = "{% if add_generation_prompt %}{{ '<|im_start|>system\\nA<|im_end|>\\n' }}{% endif %}" + template + ask
    corpus.model("other_prompt_in_training", {texts: other}, "warning", "starts differently from the prompt alone")
    corpus.index[-1]["faults"] = [
        {"file": "other_prompt_in_training.jsonl", "line": n, "level": "warning", "reason": "starts differently"}
        for n in range(1, 6)
    ]
    no_system = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + template + ask
    )
    rows = good_sft()
    rows[2]["prompt"].insert(0, {"role": "system", "content": "你是助手"})
    corpus.case("template_without_system", rows, (3, "error", "refuses the row: no system turn"))
    corpus.index[-1]["model"] = {texts: no_system}
    generation = "generation_config.json"
    corpus.model("generation_stops_elsewhere", {generation: {"eos_token_id": 0}}, "warning", "not at <|im_end|> (2)")
    corpus.model("generation_pads_with_eos", {generation: {"pad_token_id": 2}}, "warning", "pads with <|im_end|>")
    corpus.model("too_few_positions", {}, "error", "more than the 2048 positions", max_length=4096)
    corpus.model("too_few_embeddings", {"config.json": {"vocab_size": 8000}}, "error", "8000 embeddings")


CORPUS = Corpus()
write_cases(CORPUS)
