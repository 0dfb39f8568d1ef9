"""Training on several processes: two over gloo on this machine, forked, or by `accelerate launch` with the repo's own
launch files where it matters who starts and ends them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import warm
from conftest import ROOT, SCRIPTS, in_two_processes

CONFIGS = ROOT / "configs" / "accelerate"
BASE = ROOT / "data" / "tiny_qwen3"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
VERSE = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。床前明月光，疑是地上霜。举头望明月，低头思故乡。"

LORA = ["--lora-r", 4, "--lora-alpha", 8]
SHORT = ["--max-steps", 10, "--eval-steps", 5, "--batch-size", 4]
WATCH = ["--patience", 0, "--report-to", "tensorboard"]
PROBE = ["--probe-count", 2, "--probe-tokens", 8]
# stage -> its flags, prefix of its data files, and the lines that it prints once
STAGES = {
    "20_train_sft.py": ([*LORA, *SHORT, *WATCH, *PROBE], "sft", ("64 training rows", "NLL per char")),
    "30_train_reward.py": (["--model", BASE, *LORA, *SHORT, *WATCH], "pref", ("64 training pairs", "the saved model")),
    "40_train_dpo.py": (["--model", BASE, *LORA, *SHORT, *WATCH, *PROBE], "pref", ("64 training pairs",)),
}


def launcher(script: str, *words, config: Path | str = "cpu_2.yaml") -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    return [*launch, str(SCRIPTS / script), *map(str, words)]


def run(command: list[str], check: bool = True, env: dict | None = None) -> subprocess.CompletedProcess:
    """A launch that hangs is killed with all its processes and fails the test."""
    process = subprocess.Popen(
        command,
        env={**ENVIRONMENT, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert not check or process.returncode == 0, f"{process.returncode}\n{stdout}\n{stderr}"
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def alone(script: str, *words, check: bool = True) -> subprocess.CompletedProcess:
    done = warm.run([sys.executable, str(SCRIPTS / script), *map(str, words)], env=ENVIRONMENT)
    assert not check or done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Answers of 6 to 40 characters, so that micro-batches differ in size; pairs of an answer and its characters in
    another order."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    sft, pairs = [], []
    for number in range(80):
        answer = "".join(rng.choices(VERSE, k=rng.randint(6, 40)))
        row = {"prompt": [{"role": "user", "content": f"写第{number}句"}], "meta": {}}
        good, bad = (
            [{"role": "assistant", "content": text}] for text in (answer, "".join(rng.sample(answer, len(answer))))
        )
        sft.append({**row, "completion": good})
        pairs.append({**row, "chosen": good, "rejected": bad})
    for name, rows in (("sft", sft), ("pref", pairs)):
        for split, part in (("train", rows[:64]), ("val", rows[64:])):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / f"{name}_{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def words_of(script: str, data: Path, output: Path, accumulation: int) -> list:
    flags, files, _ = STAGES[script]
    files = ["--train-file", data / f"{files}_train.jsonl", "--val-file", data / f"{files}_val.jsonl"]
    return [*files, *flags, "--dtype", "float32", "--accumulation", accumulation, "--output-dir", output]


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """one(stage): the output of one process with two micro-batches a step."""
    folder = tmp_path_factory.mktemp("one")

    def output(script: str) -> Path:
        if not (folder / script).exists():
            alone(script, *words_of(script, data, folder / script, accumulation=2))
        return folder / script

    return output


@pytest.fixture(scope="module", params=STAGES)
def both(request, data, one, tmp_path_factory):
    """(stage, output of one process with two micro-batches a step, output of two processes with one each, what those
    printed)."""
    folder = tmp_path_factory.mktemp(request.param[:2])
    two = folder / "two"
    printed = in_two_processes(folder, request.param, *words_of(request.param, data, two, accumulation=1))
    return request.param, one(request.param), two, printed


def test_two_processes_learn_what_one_learns_with_twice_the_accumulation(both):
    _, single, two, _ = both
    keys, curves = ("loss", "grad_norm", "eval_loss"), []
    for folder in (single, two):
        log, figures = read_json(folder / "log_history.json"), read_json(folder / "run.json")["figures"]
        curves.append({(entry["step"], key): entry[key] for entry in log for key in keys if key in entry})
        curves[-1] |= {name: figures[name] for name in ("val_nll", "accuracy") if name in figures}  # of the saved model
    assert len(curves[0]) >= 5 and curves[0].keys() == curves[1].keys()
    for point, value in curves[0].items():
        assert curves[1][point] == pytest.approx(value, abs=1e-3), point
    assert curves[0][5, "eval_loss"] != curves[0][10, "eval_loss"], "a curve, not a line"


def test_only_the_first_process_writes_and_prints(both):
    script, single, two, printed = both
    for line in (*STAGES[script][2], "step 5: validation loss", "step 10: validation loss", "next: "):
        assert printed.count(line) == 1, line
    assert read_json(two / "run.json")["status"] == "done"

    def names(folder: Path) -> list[str]:
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        # random states are kept for each process; names of TensorBoard's files hold time and process
        files = [re.sub(r"rng_state(_\d)?\.pth", "rng_state.pth", file) for file in files]
        return sorted({re.sub(r"^runs/.*", "runs", file) for file in files})

    assert names(two) == names(single)
    events = [len(list(folder.rglob("events.out.*"))) for folder in (single, two)]
    assert events[0] == events[1]


def test_plain_sft_trains_on_two_processes(data, tmp_path):
    files = ["--train-file", data / "sft_train.jsonl", "--val-file", data / "sft_val.jsonl"]
    words = [*files, *LORA, *SHORT, *PROBE, "--accumulation", 1, "--output-dir", tmp_path / "out"]
    printed = in_two_processes(tmp_path, "21_train_sft_plain.py", *words)
    assert printed.count("64 training rows") == printed.count("next: ") == 1
    losses = [entry["eval_loss"] for entry in read_json(tmp_path / "out" / "log_history.json") if "eval_loss" in entry]
    assert read_json(tmp_path / "out" / "run.json")["status"] == "done" and losses[1] < losses[0] < 10


def test_the_style_classifier_trains_on_two_processes(tmp_path):
    """Its sampler draws other rows for two processes, so the curve is not that of one; a loss counted twice would still
    show."""
    few = read_json(ROOT / "data" / "styles" / "training_data.json")[:80]
    (tmp_path / "few.json").write_text(json.dumps(few, ensure_ascii=False), encoding="utf-8")
    words = ["--train-file", tmp_path / "few.json", "--validation-file", "None", "--num-train-epochs", 1, "--lora-r", 4]
    printed = in_two_processes(tmp_path, "31_train_style_classifier.py", *words, "--output-dir", tmp_path / "out")
    assert printed.count("training rows") == printed.count("next: ") == 1
    record = read_json(tmp_path / "out" / "run.json")
    assert record["status"] == "done" and record["figures"]["eval_accuracy"] > 0
    first = next(entry for entry in read_json(tmp_path / "out" / "log_history.json") if "eval_loss" in entry)
    assert 1.0 < first["eval_loss"] < 2.6, "about ln 5 = 1.61 for five classes that are not known yet"


# accelerate 1.15 shares no weights out on CPUs, though torch can: let it believe in GPUs that are called cpu and talk
# over gloo
FSDP_ON_CPU = """\
import os

if "LOCAL_RANK" in os.environ:
    import accelerate.state as state

    begin = state.PartialState.__init__
    state.PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", state.DistributedType.MULTI_GPU)
    state.PartialState.__init__ = lambda self, cpu=False, backend=None, **more: begin(self, cpu=False, **more)
"""


def test_weights_in_shares_give_the_same_adapter(data, one, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "sitecustomize.py").write_text(FSDP_ON_CPU, encoding="utf-8")
    script, output = "20_train_sft.py", tmp_path / "two"
    shared = launcher(script, *words_of(script, data, output, accumulation=1), config="fsdp.yaml")
    shared[5:5] = ["--num_processes", "2"]
    refused = run(shared, check=False)
    assert refused.returncode != 0 and "accelerate leaves the weights whole" in refused.stderr
    run(shared, env={"PYTHONPATH": str(tmp_path), "ACCELERATE_TORCH_DEVICE": "cpu"})
    assert list(output.glob("checkpoint-10/pytorch_model_fsdp*")), "this was not FSDP"
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (one(script), output)]
    assert weights[0].keys() == weights[1].keys()
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) < 1e-4


# --- ends


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:  # gone meanwhile
        return None


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_process_ends_the_job_and_the_same_command_goes_on(data, one, tmp_path):
    script, output = "20_train_sft.py", tmp_path / "sft"
    command = launcher(script, *words_of(script, data, output, accumulation=1))
    job = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not (output / "checkpoint-5" / "trainer_state.json").exists():
            assert job.poll() is None, "ended before it could be killed"
            time.sleep(0.02)
        ranks = {rank_of(child): child for child in psutil.Process(job.pid).children(recursive=True)}
        ranks["1"].kill()  # SIGKILL
        assert job.wait(timeout=60) != 0
        assert not alive(ranks["0"]), "the other process is ended, too"
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert read_json(output / "run.json")["status"] != "done"

    again = run(command)
    assert again.stdout.count("resuming: ") == 1
    record = read_json(output / "run.json")
    assert record["status"] == "done" and record["figures"]["steps"] == 10
    whole = read_json(one(script) / "run.json")["figures"]
    assert record["figures"]["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-3)
    # and done is done, for both
    printed = in_two_processes(tmp_path, script, *words_of(script, data, output, accumulation=1))
    assert printed.count("already done") == 1
    # one process would take smaller steps with the same settings
    refused = alone(script, *words_of(script, data, output, accumulation=1), check=False)
    assert refused.returncode == 2 and "processes: 2 -> 1" in refused.stderr


def test_bad_rows_are_told_once_and_end_all_processes(data, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n', encoding="utf-8")
    words = ["--train-file", tmp_path / "bad.jsonl", "--val-file", data / "sft_val.jsonl"]
    begun = time.monotonic()
    done = run(launcher("20_train_sft.py", *words, "--output-dir", tmp_path / "out"), check=False)
    assert done.returncode != 0 and time.monotonic() - begun < 60
    assert done.stderr.count("error: ") == 1 and "bad.jsonl:1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_error_of_another_process_alone_is_told_after_a_while(monkeypatch, capsys):
    from common import settings

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(settings, "PATIENCE", 0.2)
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        settings._show_error(settings.UserError, settings.UserError("no such file"), None)
    assert stop.value.code == 2 and time.monotonic() - begun >= 0.2
    assert capsys.readouterr().err == "error: no such file\n"


@pytest.mark.parametrize("file", ["fsdp.yaml", "deepspeed_zero3.yaml"])
def test_stages_that_merge_refuse_weights_in_shares(file, monkeypatch):
    from common.models import require_whole_weights
    from common.settings import UserError

    require_whole_weights()
    for name, value in environment_of(CONFIGS / file).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="multi_gpu.yaml"):
        require_whole_weights()


# --- launch files and their page


def parse(config: Path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    parser = launch_command_parser()
    known = vars(parser.parse_args(["script.py"]))
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(config), "script.py"]))
    return args, known


def environment_of(config: Path) -> dict[str, str]:
    """What accelerate adds to the environment of every process."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    args, _ = parse(config)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


KINDS = {
    "cpu_2": (2, "multi_gpu"),
    "multi_gpu": (8, "multi_gpu"),
    "fsdp": (8, "use_fsdp"),
    "deepspeed_zero3": (8, "use_deepspeed"),
    "multi_node": (16, "multi_gpu"),
}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_understands_a_launch_file(name):
    import yaml

    processes, kind = KINDS[name]
    args, known = parse(CONFIGS / f"{name}.yaml")
    assert args.num_processes == processes
    assert [flag for flag in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, flag)] == [kind]
    # keys inside fsdp_config and deepspeed_config are not checked by accelerate: a misspelt one would be lost in
    # silence
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    for part in ("fsdp_config", "deepspeed_config"):
        assert set(content.get(part, {})) <= set(known), name


def test_every_launch_file_is_tested():
    assert {path.stem for path in CONFIGS.iterdir()} == set(KINDS)


PAGE = (ROOT / "docs" / "OPERATIONS.md").read_text(encoding="utf-8")


def test_commands_of_the_page_have_flags_that_their_stages_have():
    import importlib.util

    text = PAGE.replace("\\\n", " ")
    commands = re.findall(r"(scripts/\d\d_\w+\.py)((?: +[^\n`]*)?)", text)
    seen = 0
    for script, words in commands:
        spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for flag in re.findall(r"--([\w-]+)", words):
            assert hasattr(module.Settings, flag.replace("-", "_")), f"{script} --{flag}"
            seen += 1
    assert seen > 20


QWEN3 = {
    "Qwen3-0.6B": (28, 1024, 3072, 16, True),
    "Qwen3-4B": (36, 2560, 9728, 32, True),
    "Qwen3-8B": (36, 4096, 12288, 32, False),
    "Qwen3-32B": (64, 5120, 25600, 64, False),
}


def layer_bytes(h: int, f: int, q: int, k: int, r: int) -> int:
    """Kept for the backward pass, a token and layer, LoRA in bfloat16; without LoRA where r is 0."""
    return 18 * h + 8 * f + 10 * q + 8 * k + 14 * r if r else 16 * h + 8 * f + 10 * q + 10 * k


@pytest.mark.parametrize("name", QWEN3)
def test_the_memory_of_the_page_follows_from_its_formulas(name):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    layers, h, f, heads, tied = QWEN3[name]
    q, k, vocabulary, r, tokens = heads * 128, 8 * 128, 151_936, 32, 4096
    count = layers * (2 * h * q + 2 * h * k + 3 * h * f + 2 * h + 256) + vocabulary * h * (1 if tied else 2) + h
    adapter = layers * r * (2 * (h + q) + 2 * (h + k) + 3 * (h + f))
    row = f"| {name} | {layers} | {h} | {f} | {heads} / 8 | {'yes' if tied else 'no'} | {count:,} | {adapter:,} |"
    assert row in PAGE, row
    kept = layer_bytes(h, f, q, k, r) * tokens
    backward = (layers * kept, layers * 2 * h * tokens + kept)
    sizes = (2 * count, 2 * count + 16 * adapter, 16 * count, *backward)
    row = " | ".join([f"| {name}", *(f"{size / 1e9:.1f}" for size in sizes), f"{4 * layers * k // 1024} |"])
    assert row in PAGE, row

    config = Qwen3Config(
        hidden_size=h,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    import torch

    with torch.device("meta"):
        assert Qwen3ForCausalLM(config).num_parameters() == count


def kept_bytes(layers: int, tokens: int, r: int, **sizes) -> int:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, vocab_size=100, **sizes)).to(torch.bfloat16)
    if r:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=r, target_modules=targets)).get_base_model()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}  # address -> tensor, held so that no address is used twice

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros((1, tokens), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("r", [0, 16])
def test_a_layer_keeps_what_the_page_says(r):
    h, f, heads, head = 128, 384, 4, 32
    sizes = {"hidden_size": h, "intermediate_size": f, "num_attention_heads": heads, "num_key_value_heads": 2}
    # by the token, because autocast also keeps a copy of the adapter's weights, whatever the number of tokens
    layer = [
        kept_bytes(3, tokens, r, head_dim=head, **sizes) - kept_bytes(1, tokens, r, head_dim=head, **sizes)
        for tokens in (32, 96)
    ]
    bytes_a_token = (layer[1] - layer[0]) / 2 / 64
    assert bytes_a_token == pytest.approx(layer_bytes(h, f, heads * head, 2 * head, r), rel=0.02)
