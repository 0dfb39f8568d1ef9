"""Score what the models wrote: one row a text, and a table with 95 % bootstrap intervals.

The metrics are those of scripts/tasks/<task>, the same functions that stages 33, 50 and 51 use as rewards, and with
them: whether the text stopped by itself, its characters, and its NLL per character under a frozen base model. A value
that does not apply is null and never counts as 0. Metrics of a whole set (distinct-2) are taken over one text a prompt;
their bounds are the least and greatest such set. The golden texts of the same prompts are scored too.
general_nll is of general texts under the run's own model, in nats per character: a stage where it rises has forgotten.

Reads   results/{task}/generations/*.jsonl (stage 60)
Writes  results/{task}/scores/<run>.jsonl, <run>.reference.jsonl (golden texts), <run>.general.jsonl (general texts),
        <run>.run.json with the table
Run     python scripts/70_score.py
        python scripts/70_score.py --generations results/poems/generations/sft.jsonl --nll-model ""
"""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.settings import ROOT, UserError, default_settings, next_command, read_settings, resolve_model, unused
from tasks.base import Task, load_task


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: a module in scripts/tasks"""
    generations: tuple[Path, ...] = (Path("results/{task}/generations"),)
    """files, folders or globs of JSONL"""

    # --- NLL per character
    nll_model: str = "data/tiny_qwen3"
    """frozen base model, folder or hub id; "" = off"""
    dtype: str = "float32"
    """of its weights: float32 makes figures comparable between machines; auto, bfloat16"""
    token_budget: int = 8192
    """padded tokens a batch"""
    enable_thinking: bool = False
    """passed to the chat template of models that think"""

    # --- what the run's own model knows beside its job
    general_file: Path | None = Path("data/general/texts.jsonl")
    """rows {"text"} that no stage trains on; None = off"""

    # --- table
    bootstrap: int = 2000
    """resamples behind each interval"""

    # --- run
    output_dir: Path = Path("results/{task}/scores")
    """one file of scores a run"""
    seed: int = 42
    """of the resampling"""
    overwrite: bool = False
    """score again what has been scored"""

    def clashes(self):
        if not self.nll_model:
            yield from unused(self, "without --nll-model", "dtype", "token_budget", "enable_thinking")


def find_generations(patterns: tuple[Path, ...]) -> list[Path]:
    """The generation files that `patterns` name. One whose run has not finished is left out, with a notice."""
    from common.jsonl import read_json

    files: dict[str, Path] = {}
    for pattern in patterns:
        matches = [pattern] if pattern.exists() else [Path(name) for name in glob.glob(str(pattern))]
        found = [file for path in matches for file in (path.glob("*.jsonl") if path.is_dir() else [path])]
        if not found:
            raise UserError(f"no generation file at {pattern}; fix: run scripts/60_generate.py, or name another")
        for file in sorted(found):
            if files.setdefault(file.stem, file) != file:
                raise UserError(f"two files for the run {file.stem}: {files[file.stem]}, {file}; fix: rename one")
    for name, file in list(files.items()):
        record = file.with_name(f"{name}.run.json")
        if record.exists() and read_json(record).get("status") != "done":
            print(f"notice: {file} is left out: its run has not finished; run stage 60 again to go on with it")
            del files[name]
    if not files:
        raise UserError("no finished generation file; fix: run scripts/60_generate.py to its end")
    return list(files.values())


def golden_rows(rows: list[dict]) -> list[dict]:
    """One row for each prompt that has a golden text, with that text as the completion."""
    golden = {row["prompt_id"]: row for row in rows if row["reference"] is not None}
    return [{**row, "id": id, "sample": 0, "completion": row["reference"]} for id, row in golden.items()]


def score_rows(task: Task, rows: list[dict], nll: Callable | None) -> dict[str, list[float | None]]:
    """metric -> one value a row, None where it does not apply."""
    from common.conversations import without_thought
    from common.evaluation.scoring import measure_texts

    nats = {} if nll is None else {"nll_per_character": nll(rows)}  # first: a model that is none is told at once
    columns = measure_texts(task, rows)
    columns["characters"] = [float(len(without_thought(row["completion"]))) for row in rows]
    return columns | nats


def score_row(row: dict, index: int, columns: dict, model: str | None = None) -> dict:
    """One line of a score file. A golden text was not generated, so nothing is said about how it ended."""
    return {
        "id": row["id"],
        "prompt_id": row["prompt_id"],
        "model": model or row["model"],
        "finish_reason": None if model else row["finish_reason"],
        "scores": {name: values[index] for name, values in columns.items()},
    }


def score_table(task: Task, rows: list[dict], columns: dict, bootstrap: int, seed: int) -> dict[str, dict]:
    """metric -> mean, low, high and how many texts it applies to, or how many sets it was taken over."""
    from common.evaluation.scoring import measure_sets
    from common.evaluation.statistics import bootstrap_mean

    prompts = [row["prompt_id"] for row in rows]
    table = {}
    for name, values in columns.items():
        texts = sum(value is not None for value in values)
        table[name] = {**bootstrap_mean(values, prompts, bootstrap, seed)._asdict(), "texts": texts}
    return {**table, **measure_sets(task, rows)}


def general_nll(path: Path, texts: list[str]) -> list[float] | None:
    """Nats per character of each text under the model that wrote a generation file, as it wrote: its dtype, quantised
    or not. None, with a notice, where the run's record names no model that is still there."""
    from common.jsonl import read_json
    from common.likelihood import document_nlls
    from common.models import load_model, load_tokenizer
    from common.runs import describe_input

    record_path = path.with_suffix(".run.json")
    record = read_json(record_path) if record_path.is_file() else {}
    found = {"model": None, "adapter": None}
    for name in found:
        if known := record.get("inputs", {}).get(name):
            found[name] = known.get("hub_id") or str(ROOT / known["path"])
            is_there = "hub_id" in known or Path(found[name]).exists()
            if not is_there or describe_input(name, found[name]).get("sha256") != known.get("sha256"):
                print(f"notice: {path.stem}: {known['path']} is not what it was: no NLL of general texts")
                return None
    if not found["model"]:
        print(f"notice: {path.stem}: no record of the model that wrote it: no NLL of general texts")
        return None
    used = record["settings"]
    tokenizer = load_tokenizer(found["model"])
    how = {name: used[name] for name in ("device_map", "force_base", "quantize", "attn_implementation") if name in used}
    model = load_model(found["model"], tokenizer, used.get("dtype", "auto"), found["adapter"], **how)
    losses = document_nlls(model, tokenizer, texts, min(getattr(model.config, "max_position_embeddings", 512), 512))
    return [loss / len(text) for loss, text in zip(losses, texts, strict=True)]


def print_table(tables: dict[str, dict]) -> None:
    """Rows are metrics, columns runs: it fits a terminal."""
    from common.evaluation.tables import NONE, interval, markdown_table

    def cell(table: dict, name: str) -> str:
        return interval([table[name][key] for key in ("mean", "low", "high")]) if name in table else NONE

    metrics = list(dict.fromkeys(name for table in tables.values() for name in table))
    print(markdown_table(["metric", *tables], [[n, *(cell(table, n) for table in tables.values())] for n in metrics]))


def main(settings: Settings) -> None:
    from common.evaluation.statistics import bootstrap_mean
    from common.evaluation.tables import sampling_notes
    from common.jsonl import read_json, read_jsonl, write_jsonl
    from common.model_files import check_model
    from common.runs import begin_run

    task = load_task(settings.task)
    model_path = resolve_model(settings.nll_model, settings.task) if settings.nll_model else None
    if model_path:
        check_model(model_path)
    general = read_jsonl(settings.general_file, "text") if settings.general_file else []
    general = [row["text"] for row in general]
    runs = {path: read_jsonl(path, "generation") for path in find_generations(settings.generations)}
    loaded = []  # model and tokenizer, once a file needs them

    def frozen_nll(rows: list[dict]) -> list[float | None]:
        from common.likelihood import nll_per_character
        from common.models import load_model, load_tokenizer

        if not loaded:
            tokenizer = load_tokenizer(model_path)
            loaded.extend((load_model(model_path, tokenizer, settings.dtype), tokenizer))
        values = nll_per_character(*loaded, rows, settings.token_budget, settings.enable_thinking)
        if too_long := sum(value is None and row["completion"] != "" for row, value in zip(rows, values, strict=True)):
            print(f"notice: {too_long} texts are longer than the context of {settings.nll_model}: no NLL")
        return values

    nll = frozen_nll if model_path else None

    tables, golden_scores = {}, {}  # the runs share their prompts: a golden text is scored once
    for path, rows in runs.items():
        output = settings.output_dir / path.name
        golden_output, general_output = (output.with_suffix(f".{kind}.jsonl") for kind in ("reference", "general"))
        inputs = {"generations": path, "nll_model": model_path, "general_file": settings.general_file, **task.sources}
        try:
            files = dict(ignore=("generations", "output_dir", "token_budget"), also=(golden_output, general_output))
            run = begin_run(output, settings, inputs, "70_score", resumable=False, **files)
        except SystemExit:  # already done: the next file
            tables[path.stem] = read_json(output.with_suffix(".run.json"))["figures"]["table"]
            continue
        with run:
            columns = score_rows(task, rows, nll)
            columns["stopped"] = [float(row["finish_reason"] == "stop") for row in rows]
            golden = golden_rows(rows)
            new = [row for row in golden if (row["id"], row["completion"]) not in golden_scores]
            if new:
                values = score_rows(task, new, nll)
                for i, row in enumerate(new):
                    golden_scores[row["id"], row["completion"]] = score_row(row, i, values, "reference")
            if golden:
                write_jsonl(golden_output, [golden_scores[row["id"], row["completion"]] for row in golden])
            write_jsonl(output, [score_row(row, i, columns) for i, row in enumerate(rows)])
            tables[path.stem] = score_table(task, rows, columns, settings.bootstrap, settings.seed)
            if general and (known := general_nll(path, general)):
                estimate = bootstrap_mean(known, range(len(known)), settings.bootstrap, settings.seed)
                tables[path.stem]["general_nll"] = {**estimate._asdict(), "texts": len(known)}
                pairs = zip(general, known, strict=True)
                write_jsonl(general_output, [{"text": text, "general_nll": value} for text, value in pairs])
            run.figure("table", tables[path.stem])
            run.figure("texts", len(rows))
            run.figure("prompts", len({row["prompt_id"] for row in rows}))
            run.finish()
    print_table(tables)
    print("\n".join(sampling_notes(list(runs))))
    folder, flags = list(runs)[0].parent, {}
    if folder != ROOT / f"results/{settings.task}/generations":
        flags["generations"] = folder
        if folder.name == "generations":  # another run's: its report and trainings are its own
            flags |= {"checkpoints": ROOT / "checkpoints" / folder.parent.name, "output": folder.parent / "compare"}
    if settings.output_dir != default_settings(settings)["output_dir"]:
        flags["scores"] = settings.output_dir
    print(f"next: {next_command('72_compare', task=settings.task, **flags)}")


if __name__ == "__main__":
    main(read_settings(Settings))
