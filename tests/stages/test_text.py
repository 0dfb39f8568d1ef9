"""A corpus of plain text: stage 18 reads, drops copies and splits; stages 19, 20, 22 and 60 know documents."""

import json
import random
from pathlib import Path

import pytest

from common.jsonl import DataError, read_jsonl
from common.settings import UserError
from conftest import ROOT
from test_sft_ways import stage

MODEL = str(ROOT / "data/tiny_qwen3")


def poem(number: int) -> str:
    """A text of forty characters, another one for each number."""
    draw = random.Random(number)
    return "\n".join(
        "".join(draw.choices("春花秋月何时了往事知多少小楼昨夜又东风故国不堪回首", k=9)) + "。" for _ in "甲乙丙丁"
    )


POEMS = [poem(number) for number in range(40)]


def prepare(folder, *files: Path, **words) -> dict[str, list[str]]:
    module = stage("18_prepare_text")
    module.main(module.Settings(files=files, output_dir=folder / "out", **words))
    written = {path.stem: read_jsonl(path, "text") for path in (folder / "out").glob("text_*.jsonl")}
    assert all(row.keys() == {"text"} for rows in written.values() for row in rows)
    return {name.removeprefix("text_"): [row["text"] for row in rows] for name, rows in written.items()}


def record(folder) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def as_lines(key: str) -> str:
    return "".join(json.dumps({key: text, "id": 1}, ensure_ascii=False) + "\n" for text in POEMS)


def as_csv(separator: str) -> str:
    return "".join(f'{number}{separator}"{text}"\r\n' for number, text in [("id", "正文"), *enumerate(POEMS)])


def as_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": POEMS, "id": range(40)}), path)


FORMS = {
    "u8.txt": ("\n\n".join(POEMS).encode(), "paragraphs"),
    "bom.TXT": (b"\xef\xbb\xbf" + "\r\n\r\n \r\n".join(POEMS).encode(), "paragraphs"),
    "gb.txt": ("\n\n".join(POEMS).encode("gb18030"), "paragraphs"),
    "u16.txt": ("\n\n".join(POEMS).encode("utf-16"), "paragraphs"),
    "rows.jsonl": (as_lines("text").encode(), "file"),
    "array.json": (json.dumps([{"content": text} for text in POEMS]).encode(), "file"),
    "table.csv": (as_csv(",").encode("gb18030"), "file"),
    "table.tsv": (as_csv("\t").encode("utf-8"), "file"),
    "rows.parquet": (as_parquet, "file"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_corpus_gives_the_same_documents(name, tmp_path):
    content, unit = FORMS[name]
    if callable(content):
        content(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    splits = prepare(tmp_path, tmp_path / name, document=unit)
    assert sorted(text for part in splits.values() for text in part) == sorted(POEMS)
    assert len(splits["train"]) > 30 and splits["val"] and splits["test"]


def test_a_folder_is_read_with_its_folders_and_a_grown_corpus_moves_no_document(tmp_path, capsys):
    (tmp_path / "books" / "more").mkdir(parents=True)
    for number, text in enumerate(POEMS[:30]):
        (tmp_path / "books" / ("more" if number % 2 else "") / f"{number}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "books" / "cover.png").write_bytes(b"\x89PNG")
    (tmp_path / "books" / ".notes.txt").write_text("hidden", encoding="utf-8")
    before = prepare(tmp_path, tmp_path / "books", tmp_path / "books" / "0.txt")
    assert sorted(text for part in before.values() for text in part) == sorted(POEMS[:30])
    assert "notice: 1 files .png: left out" in capsys.readouterr().out
    (tmp_path / "books" / "new.txt").write_text("\n\n".join(POEMS[30:]), encoding="utf-8")
    after = prepare(tmp_path, tmp_path / "books", overwrite=True)
    for name, texts in before.items():
        assert set(texts) <= set(after[name])


def test_copies_and_near_copies_are_dropped_and_counted(tmp_path):
    near = POEMS[3][:12] + "云" + POEMS[3][13:]
    texts = [*POEMS, POEMS[0].replace("。", "， "), near]
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    splits = prepare(tmp_path, tmp_path / "a.txt", document="paragraphs")
    assert sorted(text for part in splits.values() for text in part) == sorted(POEMS)
    dropped = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["dropped"]
    assert (dropped["copies"], dropped["near-copies"]) == (1, 1)


FAULTS = {
    "a control character": ("a.txt", "好\n\n坏\x00\n\n好".encode(), r":3: control character U\+0000"),
    "bytes of no encoding": ("a.txt", "好的呀".encode() + b"\xff\xff\xfe\xff", ": neither UTF-8 nor GB18030 nor Big5"),
    "a compressed file": ("a.txt", b"\x1f\x8b\x08\x00", ": the file is compressed"),
    "no file": ("missing.txt", None, "missing.txt: no such file"),
    "a number": ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', r":2: text is 5, not a text"),
    "several columns": ("a.jsonl", b'{"eins": "x", "zwei": "y"}\n', ":1: no column of text is known among eins, zwei"),
    "a conversation": ("a.jsonl", b'{"instruction": "x", "output": "y"}\n', ":1: a row of a conversation"),
    "a conversation with one text": (
        "a.jsonl",
        b'{"system": "x", "messages": [{"role": "user", "content": "y"}]}\n',
        ":1: a row of a conversation, not a document; fix: .* --column NAME",
    ),
    "rows under the name of a text": ("a.txt", b'[\n{"text": "x"}]', ":1: .*begins as rows of JSON do; fix: name it"),
    "nothing": ("a.txt", b" \n\n", "no document holds any text"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_corpus_is_named_with_its_place_and_nothing_is_written(name, tmp_path):
    file, content, message = FAULTS[name]
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, tmp_path / file, document="paragraphs")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["甲", "乙", "丙", "丁", "戊", "己"])
def test_a_single_document_is_for_training(text, tmp_path):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert prepare(tmp_path, tmp_path / "a.txt", held_out=0.9) == {"train": [text]}


def test_faulty_documents_can_be_left_out(tmp_path, capsys):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in POEMS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": 5}', "{broken"]), encoding="utf-8")
    splits = prepare(tmp_path, tmp_path / "a.jsonl", skip_bad=True)
    assert sum(map(len, splits.values())) == 40
    assert "a.jsonl:41: text is 5" in capsys.readouterr().out


def test_a_document_as_long_as_a_book_goes_through_stages_18_and_19(tmp_path, capsys):
    book = "\n".join(poem(number) for number in range(100, 9000))  # 1.1 MB
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    splits = prepare(tmp_path, tmp_path / "book.txt", held_out=0)
    assert splits == {"train": [book]}
    module = stage("19_check_data")
    module.main(
        module.Settings(
            task="c", train_file=tmp_path / "out/text_train.jsonl", val_file=None, preview=tmp_path / "p.html"
        )
    )
    shown = capsys.readouterr().out
    assert "schema text" in shown and "0 errors" in shown and "tokens in all" in shown
    assert "next: python scripts/20_train_sft.py --task c --train-file " in shown
    assert "the first 512 of" in (tmp_path / "p.html").read_text(encoding="utf-8")


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join([*POEMS, "很久以前" * 100]), encoding="utf-8")
    prepare(tmp_path, tmp_path / "a.txt", document="paragraphs")
    return {"train_file": tmp_path / "out/text_train.jsonl", "val_file": tmp_path / "out/text_val.jsonl"}


def train(corpus: dict, folder: Path, **words) -> dict:
    module = stage("20_train_sft")
    common = {"task": "c", "model": MODEL, "max_length": 64, "max_steps": 6, "batch_size": 4, "accumulation": 1}
    common |= {
        "lora_r": 4,
        "eval_steps": 3,
        "probe_count": 1,
        "probe_tokens": 4,
        "dtype": "float32",
        "report_to": "none",
    }
    module.main(module.Settings(**(common | corpus | words), output_dir=folder))
    return record(folder)["figures"]


def test_every_token_of_every_document_is_trained_once_and_eos_ends_it(corpus, tmp_path, monkeypatch):
    import torch
    import transformers

    from common.models import load_tokenizer

    seen = []

    def note(self, model, inputs, num_items_in_batch=None):
        seen.append({key: inputs[key][0].tolist() for key in ("input_ids", "labels", "position_ids")})
        return torch.tensor(0.0)

    monkeypatch.setattr(transformers.Trainer, "training_step", note)
    with pytest.raises(UserError, match="nothing was learned"):
        train(corpus | {"val_file": None}, tmp_path / "m", max_steps=-1, epochs=1)
    tokenizer = load_tokenizer(MODEL, documents=True)
    assert tokenizer.eos_token == "<|endoftext|>"
    texts = [row["text"] for row in read_jsonl(corpus["train_file"], "text")]
    wanted = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    ids = [token for batch in seen for token in batch["input_ids"]]
    assert sorted(ids) == sorted(token for document in wanted for token in document)
    for batch in seen:  # one piece of a document after the other, which do not see each other
        assert len(batch["input_ids"]) <= 64
        for token, label, place in zip(*batch.values(), strict=True):
            assert label == (token if place else -100)
    starts = sum(place == 0 for batch in seen for place in batch["position_ids"])
    assert starts == sum(-(-len(document) // 64) for document in wanted)


@pytest.mark.parametrize("rank", [4, 0])
def test_continued_pretraining_lowers_the_loss_of_held_out_documents(rank, corpus, tmp_path, capsys):
    lr = {} if rank else {"lr": 3e-4}
    figures = train(corpus, tmp_path / "m", lora_r=rank, max_steps=12, **lr)
    assert figures["val_nll"] < figures["val_nll_base"] - 0.2 and "stopped" not in figures
    shown = capsys.readouterr().out
    assert "39 documents, " in shown
    command = "22_merge_adapter.py --task c --adapter" if rank else "60_generate.py --task c --model"
    assert f"next: python scripts/{command}" in shown
    if rank:  # the next line, then the one after it
        module = stage("22_merge_adapter")
        module.main(
            module.Settings(
                adapter=tmp_path / "m", probe_file=corpus["val_file"], output_dir=tmp_path / "merged", dtype="float32"
            )
        )
        assert "--raw --prompt" in capsys.readouterr().out
    model = tmp_path / ("merged" if rank else "m")
    module = stage("60_generate")
    words = {"task": "c", "model": str(model), "max_new_tokens": 3, "dtype": "float32"}
    module.main(module.Settings(**words, raw=True, prompt="春花"))
    assert "tokens]" in capsys.readouterr().out
    with pytest.raises(UserError, match="documents have no prompts"):
        module.main(module.Settings(**words, prompts_file=corpus["val_file"]))


def test_what_has_no_meaning_for_documents_is_refused(corpus, tmp_path):
    sft = tmp_path / "sft.jsonl"
    turns = {"prompt": [{"role": "user", "content": "问"}], "completion": [{"role": "assistant", "content": "答"}]}
    sft.write_text(json.dumps(turns), encoding="utf-8")
    for words, message in (
        ({"long_rows": "drop"}, "documents are split"),
        ({"row_style": "messages"}, "--row-style has no effect on documents"),
        ({"enable_thinking": True}, "--enable-thinking has no effect on documents"),
        ({"val_file": sft}, "these are sft rows, not text rows"),
    ):
        with pytest.raises(UserError, match=message):
            train(corpus | words, tmp_path / "m")
    module = stage("17_prepare_chat")
    (tmp_path / "b.jsonl").write_text('{"text": "好"}\n', encoding="utf-8")
    for file in (tmp_path / "a.txt", tmp_path / "b.jsonl"):
        with pytest.raises(DataError, match=r"18_prepare_text\.py"):
            module.main(module.Settings(files=(file,), output_dir=tmp_path / "chat"))
