"""--overwrite with settings or inputs that cannot work: one line, and the finished run is byte for byte whole.

Every stage runs in this one process: its script is imported by path and its main is called. A "finished run" is a
folder or a file with the record that Run writes, not a training.
"""

import json
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from common.jsonl import read_json, write_json, write_jsonl
from common.settings import ROOT, UserError, file_error, read_settings
from conftest import SCRIPTS, load_script

TINY = ROOT / "data" / "tiny_qwen3"
ANSWERS = ["春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。", "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A few good rows of every kind, and broken ones."""
    folder = tmp_path_factory.mktemp("files")
    prompts = [[{"role": "user", "content": f"写一首关于{what}的五言绝句。"}] for what in "春夏秋冬山水风月"]
    answers = [[{"role": "assistant", "content": ANSWERS[i % 2]}] for i in range(len(prompts))]
    metas = [{"form": "五言绝句", "id": str(i)} for i in range(len(prompts))]
    rows = list(zip(prompts, answers, metas, strict=True))
    write_jsonl(folder / "sft.jsonl", [{"prompt": p, "completion": a, "meta": m} for p, a, m in rows])
    bad = [{"role": "assistant", "content": "不知道。"}]
    write_jsonl(folder / "pref.jsonl", [{"prompt": p, "chosen": a, "rejected": bad, "meta": m} for p, a, m in rows])
    labelled = [{"prompt": p, "completion": a, "label": i % 2 == 0, "meta": m} for i, (p, a, m) in enumerate(rows)]
    write_jsonl(folder / "kto.jsonl", labelled)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p, "meta": m} for p, _, m in rows])
    made = [
        {"id": f"{m['id']}#0", "prompt_id": m["id"], "sample": 0, "seed": 1, "prompt": p, "completion": a[0]["content"]}
        | {"reference": None, "model": "base", "finish_reason": "stop", "tokens": 9, "meta": m}
        for p, a, m in rows
    ]
    labels = read_json(ROOT / "data" / "styles" / "labels.json")
    for name, questions in (("train", "问什么？ 怎么办？ 好吗？"), ("val", "几点？ 去哪？")):
        asked = [(question, label) for question in questions.split() for label in labels]
        rows = [
            {"input": f"用户问题：{question}\n回答：第{i}个回答。", "metadata": {}}
            | {key: label[key] for key in ("label", "label_english")}
            for i, (question, label) in enumerate(asked)
        ]
        write_jsonl(folder / f"style_{name}.jsonl", rows)
    for name in ("a", "b"):
        write_jsonl(folder / "generations" / f"{name}.jsonl", made)
    write_jsonl(folder / "twice" / "a.jsonl", [*made, made[0]])
    write_jsonl(folder / "twice" / "b.jsonl", made)
    for name in ("broken.jsonl", "broken.json"):
        (folder / name).write_text('{"prompt": [\n', encoding="utf-8")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "adapter").mkdir()
    adapter = {"base_model_name_or_path": str(TINY), "peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM"}
    write_json(folder / "adapter" / "adapter_config.json", adapter | {"target_modules": ["q_proj"]})
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    shutil.copytree(TINY, folder / "cut")
    (folder / "cut" / "run.json").unlink()
    with open(folder / "cut" / "model.safetensors", "rb+") as file:
        file.truncate(100_000)
    return folder


# stage: (kind of output and its flag, the flags of a run that would work)
SFT = "--train-file sft.jsonl --val-file sft.jsonl"
PAIRS = "--train-file pref.jsonl --val-file pref.jsonl"
MODEL = f"--model {TINY} --dtype float32 --max-length 128"
FOLDER, FILE = "--output-dir out", "--output-file out.jsonl"
STAGES = {
    "10": (FOLDER, ""),
    "11": (FOLDER, ""),
    "12": (FOLDER, ""),
    "13": (FILE, "--request-log log.jsonl"),
    "14": (FILE, "--copies-file broken.jsonl --request-log log.jsonl"),
    "15": (FILE, "--golden-file broken.jsonl --request-log log.jsonl"),
    "16": (FOLDER, "--golden-file broken.jsonl"),
    "17": (FOLDER, "--files sft.jsonl"),
    "18": (FOLDER, "--files sft.jsonl"),
    "20": (FOLDER, f"{SFT} {MODEL}"),
    "21": (FOLDER, f"{SFT} {MODEL}"),
    "22": (FOLDER, f"--adapter adapter --model {TINY} --probe-file sft.jsonl --dtype float32"),
    "23": ("--output-file out.json", f"--adapter adapter --model {TINY} --merged {TINY} --rows-file sft.jsonl"),
    "24": (FOLDER, f"--model {TINY}"),
    "30": (FOLDER, f"{PAIRS} {MODEL}"),
    "31": (FOLDER, f"--train-file style_train.jsonl --validation-file style_val.jsonl {MODEL}"),
    "32": ("--output out.md", f"--model {TINY} {PAIRS}"),
    "33": ("--output-dir .", "--generations generations/a.jsonl"),
    "40": (FOLDER, f"{PAIRS} {MODEL}"),
    "41": (FOLDER, f"--train-file kto.jsonl --val-file None {MODEL}"),
    "42": (FOLDER, f"{SFT} {MODEL} --teacher {TINY}"),
    "50": (FOLDER, f"--train-file prompts.jsonl --val-file sft.jsonl {MODEL} --batch-size 8"),
    "51": (FOLDER, f"--train-file prompts.jsonl --val-file sft.jsonl {MODEL} --batch-size 8"),
    "60": (FILE, f"--prompts-file prompts.jsonl --model {TINY} --dtype float32"),
    "61": (FILE, f"--input-file sft.jsonl --model {TINY}"),
    "70": ("--output-dir .", "--generations generations/a.jsonl --nll-model="),
    "71": (FILE, "--generations generations --judge some-model --request-log log.jsonl"),
    "72": ("--output out.md", "--generations generations --scores scores --checkpoints checkpoints"),
    "73": ("--output out.csv", "--task poems --kind rating --generations generations/a.jsonl"),
}
# What the file of a stage's output is called where its flag does not say so.
NAMES = {"33": "pref_onpolicy_train.jsonl", "70": "a.jsonl", "16": "out/prepare.json"}
# Inputs that these flags leave unread.
UNREAD = {
    "13": "--guide_file --prompts_dir",
    "14": "--guide_file --prompts_dir",
    "15": "--guide_file --prompts_dir",
    "73": "--read --labels",
}
# Stages whose usual flags name a broken input too: that one may be told first.
OTHERS_BROKEN = ("14", "15", "16", "22", "23", "32", "61", "71")
MODELS = ("model", "adapter", "merged", "teacher")
TRAINING = ("20", "21", "30", "31", "40", "41", "42", "50", "51")
LOSSES = ("20", "21", "30", "40", "41", "42")  # stages that learn from rows
CASES = [
    *((number, wrong) for wrong in ("--lr nan", "--lr 0", "--epochs -1") for number in LOSSES),
    *((number, "--eval-steps 0") for number in (*LOSSES, "50", "51")),
    *((number, "--warmup-share 1.5") for number in (*LOSSES, "31", "50")),
    *((number, "--lora-r -1") for number in (*LOSSES, "50", "51")),
    *((number, "--report-to neptune") for number in ("20", "30", "40", "41", "42", "50")),
    *((number, "--model adapter") for number in (*LOSSES, "50", "51", "60", "61", "32")),
    *((number, "--model cut") for number in (*LOSSES, "50", "51", "60", "61", "32", "22")),
    *((number, "--train-file broken.jsonl") for number in TRAINING),
    *((number, "--val-file broken.jsonl") for number in (*LOSSES, "50", "51")),
    *((number, "--lora-targets no_such_layer") for number in (*LOSSES, "50", "51")),
    ("20", "--lora-targets q_proj,no_such_layer"),
    ("31", "--model-name-or-path adapter"),
    ("31", "--model-name-or-path cut"),
    ("31", "--teacher cut"),
    ("31", "--teacher adapter"),
    ("31", "--max-length 100000"),
    ("31", "--allow no_such_check"),
    ("24", "--model adapter"),
    ("24", "--model cut"),
    ("40", "--loss-types no_such_loss"),
    *(("40", f"--beta {value}") for value in (-1, 0)),
    ("40", "--label-smoothing 0.1"),
    ("40", "--loss-types exo_pair"),
    ("40", "--loss-types robust --label-smoothing 0.5"),
    ("40", "--loss-weights 0"),
    ("40", "--loss-types sigmoid sft"),
    ("41", "--loss-type no_such_loss"),
    ("41", "--beta -1"),
    ("41", "--batch-size 1"),
    *(("42", wrong) for wrong in ("--teacher cut", "--teacher adapter", "--mix 1.5", "--own-share -1")),
    ("42", "--max-new-tokens 2000"),
    ("50", "--num-generations 3"),
    ("50", "--rollout vllm --vllm-mode server --vllm-server-url http://127.0.0.1:9"),
    ("50", "--vllm-server-url http://127.0.0.1:9"),
    ("50", "--temperature 0"),
    ("50", "--temperature -1"),
    ("50", "--rewards no_such_reward"),
    ("51", "--rewards no_such_reward"),
    ("51", "--batch-size 0"),
    ("22", "--probe-file broken.jsonl"),
    ("22", "--adapter cut"),
    ("22", ""),
    ("23", "--rows-file broken.jsonl"),
    ("23", ""),
    ("60", "--prompts-file broken.jsonl"),
    ("60", "--temperature -1"),
    ("60", "--top-p 0"),
    ("60", "--adapter adapter"),
    ("61", "--input-file broken.jsonl"),
    ("10", "--corpus broken.json"),
    ("11", "--posts broken.json"),
    ("12", "--data broken.json"),
    ("12", "--val-share 1"),
    ("13", "--products-file broken.jsonl"),
    ("13", "--model some-model"),
    ("13", "--golden-file broken.jsonl"),
    *(("13", f"--num-samples {count}") for count in (0, 10**22)),
    ("13", "--splits none"),
    ("14", ""),
    ("15", ""),
    ("16", ""),
    ("17", "--files broken.jsonl"),
    ("17", "--val-share 1"),
    ("18", "--files adapter"),
    ("18", "--files loop.jsonl"),
    ("18", "--files broken.jsonl"),
    ("18", "--held-out 1"),
    ("18", ""),
    ("32", ""),
    ("32", "--train-file broken.jsonl"),
    ("33", "--generations twice/a.jsonl"),
    ("33", ""),
    ("70", "--generations twice/a.jsonl"),
    ("70", "--bootstrap 0"),
    ("70", "--nll-model cut"),
    ("71", ""),
    ("71", "--report-only"),
    ("71", "--generations twice"),
    ("71", "--samples 0"),
    ("71", "--max-cost nan"),
    ("72", ""),
    ("72", "--generations twice"),
    ("73", "--generations twice/a.jsonl"),
    ("73", "--kind pair"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished_run(folder: Path, number: str, stage: str) -> None:
    """As a run leaves it: a record, results, and in a folder a checkpoint."""
    flag, name = STAGES[number][0].split()
    output = folder / NAMES.get(number, name)
    record = {"stage": stage, "status": "done", "settings": {}, "inputs": {}, "figures": {}, "wall_seconds": 1.0}
    record |= {"started": "2026-01-01T00:00:00+00:00", "processes": 1}
    if output.suffix:
        output.parent.mkdir(exist_ok=True)
        output.write_text('{"id": "1"}\n', encoding="utf-8")
        record["files"], record_path = [output.name], output.with_name(f"{output.stem}.run.json")
    else:
        (output / "checkpoint-5").mkdir(parents=True)
        (output / "checkpoint-5" / "trainer_state.json").write_text("{}", encoding="utf-8")
        (output / "adapter_model.safetensors").write_bytes(b"weights")
        record["files"], record_path = [], output / "run.json"
    write_json(record_path, record)


@pytest.fixture
def place(files, tmp_path, monkeypatch) -> Path:
    """The folder where the user stands: the inputs lie in it."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def refusal(number: str, flags: list[str]) -> str:
    """What the stage says, as read_settings' hook would print it. Anything else is a traceback, and fails the test."""
    module = load_script(number)
    try:
        module.main(read_settings(module.Settings, flags))
    except UserError as error:
        return str(error)
    except SystemExit as error:  # tyro's, or a certificate that does not hold
        assert error.code not in (0, None), "it ran"
        return f"exit {error.code}"
    except OSError as error:
        assert file_error(error), error
        return file_error(error)
    raise AssertionError("it ran")


@pytest.mark.parametrize("number, wrong", CASES, ids=lambda value: value.replace(" ", "_") or "inputs")
def test_a_finished_run_outlives_an_overwrite_that_cannot_work(number, wrong, place):
    stage = next(SCRIPTS.glob(f"{number}_*.py")).stem
    finished_run(place, number, stage)
    before = contents(place)
    said = refusal(number, [*STAGES[number][0].split(), *STAGES[number][1].split(), "--overwrite", *wrong.split()])
    assert "fix: " in said or said == "exit 2", said
    assert contents(place) == before


# settings that name an output, or a folder that is made
OUTPUTS = ("output_dir", "output_file", "output", "request_log", "report", "scratch_dir", "checkpoints")
INPUTS = [
    (number, name)
    for number, (_, flags) in STAGES.items()
    for name, hint in get_type_hints(load_script(number).Settings).items()
    if name not in OUTPUTS and (Path in (hint, *get_args(hint)) or name in MODELS)
    if f"--{name}" not in UNREAD.get(number, "")
]


@pytest.mark.parametrize("number, name", INPUTS)
def test_an_input_that_is_not_there_or_of_another_kind_is_named(number, name, place):
    """Nothing under this name, a folder or a file in its place, a folder without anything."""
    stage = next(SCRIPTS.glob(f"{number}_*.py")).stem
    finished_run(place, number, stage)
    before = contents(place)
    (place / "nothing").mkdir()
    flag = f"--{name.replace('_', '-')}"
    usual = [*STAGES[number][0].split(), *STAGES[number][1].split(), "--overwrite"]
    for value in ("./gone.jsonl", "nothing", "sft.jsonl")[: 3 if name in MODELS else 2]:
        said = refusal(number, [*usual, flag, value])
        assert "fix: " in said, (value, said)
        assert number in OTHERS_BROKEN or value.strip("./") in said or flag in said, (value, said)
        assert contents(place) == before


@pytest.mark.parametrize("number", STAGES)
def test_an_output_that_is_not_its_own_is_refused_and_left(number, place):
    finished_run(place, number, "99_another_stage")
    before = contents(place)
    said = refusal(number, [*STAGES[number][0].split(), *STAGES[number][1].split(), "--overwrite"])
    assert "fix: " in said, said
    assert contents(place) == before


@pytest.mark.parametrize("number", TRAINING)
def test_several_gpus_and_no_launcher_are_one_line_with_the_command(number, place, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    finished_run(place, number, next(SCRIPTS.glob(f"{number}_*.py")).stem)
    before = contents(place)
    said = refusal(number, [*STAGES[number][0].split(), *STAGES[number][1].split(), "--overwrite"])
    assert "2 GPUs and one process; fix: accelerate launch" in said and "--num_processes 2" in said
    assert contents(place) == before


def test_every_stage_with_an_output_is_in_the_table():
    with_output = {path.name[:2] for path in SCRIPTS.glob("[0-9]*.py") if "begin_run(" in path.read_text("utf-8")}
    assert with_output - {"00", "01"} == set(STAGES)
    assert {number for number, _ in CASES} == set(STAGES)
    assert json.loads((TINY / "run.json").read_text("utf-8"))["status"] == "done"
