"""The rows of stage 72: runs with their texts and scores, their figures, and what one changed against another."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.settings import UserError, next_command

if TYPE_CHECKING:
    from tasks.base import Task

GOLDEN = "reference"
GENERAL = "general_nll"  # stage 70's figure of a run's model, not of its texts
LOWER = ("nll_per_character", GENERAL)  # of stage 70's own columns: less is better
NEITHER = ("characters",)  # neither less nor more is better


@dataclass
class Entry:
    """One row of the table: a run, or the golden texts. rows[i] and scores[i] are of one text."""

    name: str
    rows: list[dict]
    scores: list[dict]
    general: dict[str, float] = field(default_factory=dict)  # general text -> its NLL per character, where measured
    figures: dict = field(default_factory=dict)  # metric -> Estimate

    def column(self, metric: str) -> list[float | None]:
        return [scores.get(metric) for scores in self.scores]

    @property
    def prompts(self) -> list[str]:
        return [row["prompt_id"] for row in self.rows]


def load_run(settings: Any, name: str) -> tuple[Entry, dict[str, dict], str | None]:
    """The run, the golden texts' scores by prompt, and which model its NLL is under (None: not measured, or unknown).

    Raises UserError where the scores are missing or those of another text.
    """
    from common.jsonl import read_json, read_jsonl, sha256_file

    generations, scores = settings.generations / f"{name}.jsonl", settings.scores / f"{name}.jsonl"
    where = {"generations": generations, "output_dir": settings.scores}
    command = next_command("70_score", task=settings.task, **where)
    if not scores.is_file():
        raise UserError(f"the run {name} has no scores ({scores}); fix: {command}")
    rows = read_jsonl(generations, "generation")
    by_id = {row.get("id"): row["scores"] for row in read_jsonl(scores) if isinstance(row.get("scores"), dict)}
    record_path = scores.with_suffix(".run.json")
    inputs = read_json(record_path)["inputs"] if record_path.is_file() else {}
    scored = inputs.get("generations", {}).get("sha256")
    if set(by_id) != {row["id"] for row in rows} or (scored and scored != sha256_file(generations)):
        raise UserError(f"{generations} has changed since it was scored; fix: {command} --overwrite")
    reference = scores.with_name(f"{name}.reference.jsonl")
    golden = {row["prompt_id"]: row["scores"] for row in read_jsonl(reference)} if reference.is_file() else {}
    general = {row["text"]: row[GENERAL] for row in read_jsonl(path)} if (path := general_file(settings, name)) else {}
    nll_model = inputs.get("nll_model", {})
    return (
        Entry(name, rows, [by_id[row["id"]] for row in rows], general),
        golden,
        nll_model.get("sha256") or nll_model.get("hub_id"),
    )


def general_file(settings: Any, name: str) -> Path | None:
    path = settings.scores / f"{name}.general.jsonl"
    return path if path.is_file() else None


def cost_records(settings: Any, names: list[str]) -> dict[str, Path]:
    """run -> the record of the training behind its texts. A folder of the same name, but of another job than the
    record of the texts names, is another training."""
    from common.jsonl import read_json

    found = {}
    for name in names:
        path, texts = settings.checkpoints / name / "run.json", settings.generations / f"{name}.run.json"
        made_by = read_json(texts).get("settings", {}) if texts.is_file() else {}
        folder = made_by.get("adapter") or made_by.get("model")
        if path.is_file() and (not folder or Path(folder).parts[-2:] == path.parent.parts[-2:]):
            found[name] = path
    return found


def keep_common(entries: list[Entry]) -> list[str]:
    """Cut every run down to the prompts that all have; what to tell the reader about it."""
    sets = [set(entry.prompts) for entry in entries]
    common = set.intersection(*sets)
    if not common:
        raise UserError("the runs have no prompt in common; fix: name runs over one prompt file with --runs")
    notes = []
    if any(prompts != common for prompts in sets):
        sizes = ", ".join(f"{entry.name} {len(prompts)}" for entry, prompts in zip(entries, sets, strict=True))
        notes.append(f"The runs have different prompts ({sizes}): compared on the {len(common)} that all of them have.")
    for entry in entries:
        kept = [i for i, row in enumerate(entry.rows) if row["prompt_id"] in common]
        entry.rows, entry.scores = [entry.rows[i] for i in kept], [entry.scores[i] for i in kept]
    return notes


def golden_entry(entries: list[Entry], scores: dict[str, dict]) -> Entry | None:
    """The golden texts of the common prompts, or None where there are none."""
    texts = {row["prompt_id"]: row for entry in entries for row in entry.rows if row["reference"] is not None}
    rows = [{**texts[id], "completion": texts[id]["reference"], "sample": 0} for id in texts if id in scores]
    return Entry(GOLDEN, rows, [scores[row["prompt_id"]] for row in rows]) if rows else None


def measure(entry: Entry, task: Task, settings: Any, metrics: list[str], prompts: int) -> None:
    from common.evaluation.scoring import measure_sets
    from common.evaluation.statistics import Estimate, bootstrap_mean

    for name in metrics:
        entry.figures[name] = bootstrap_mean(entry.column(name), entry.prompts, settings.bootstrap, settings.seed)
    if entry.general:
        pair = list(entry.general.values()), list(entry.general)
        entry.figures[GENERAL] = bootstrap_mean(*pair, settings.bootstrap, settings.seed)
    if len(set(entry.prompts)) == prompts:  # sets of another size say something else
        for name, figure in measure_sets(task, entry.rows).items():
            entry.figures[name] = Estimate(figure["mean"], figure["low"], figure["high"])


def change(entry: Entry, parent: Entry, metrics: list[str], set_metrics: list[str], settings: Any) -> dict:
    """metric -> Estimate of entry minus parent. Metrics of a whole set have a difference but no interval."""
    from common.evaluation.statistics import Estimate, bootstrap_difference

    changes = {}
    for name in metrics:
        pair = (parent.column(name), parent.prompts, entry.column(name), entry.prompts)
        changes[name] = bootstrap_difference(*pair, settings.bootstrap, settings.seed)
    if parent.general and entry.general:
        pair = [list(part) for run in (parent, entry) for part in (run.general.values(), run.general)]
        changes[GENERAL] = bootstrap_difference(*pair, settings.bootstrap, settings.seed)
    for name in set_metrics:
        before, after = (run.figures.get(name, Estimate(None, None, None)).mean for run in (parent, entry))
        changes[name] = Estimate(None if None in (before, after) else after - before, None, None)
    return changes


def falls(changes: dict, lower: tuple[str, ...]) -> list[list]:
    """[run, against, metric, change] where a stage made a metric worse and the interval of the change excludes 0."""
    from common.evaluation.tables import number

    found = []
    for name, (parent, bought) in changes.items():
        for metric, estimate in bought.items():
            worse_is = 1 if metric in lower else -1
            if metric in NEITHER or estimate.low is None or not float(number(estimate.mean)):  # shown as 0
                continue
            if min(worse_is * estimate.low, worse_is * estimate.high) > 0:
                found.append([name, parent, metric, estimate])
    return found


def training_now(checkpoints: Path) -> list[list[str]]:
    """[run, stage, step, loss, validation loss, reward] of every training whose record says that it goes on, as of its
    newest checkpoint."""
    from common.evaluation.tables import NONE
    from common.jsonl import read_json

    rows = []
    for path in sorted(checkpoints.glob("*/run.json")):
        record = read_json(path)
        if record.get("status") == "running":
            states = sorted(path.parent.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
            state = read_json(states[-1]) if states else {"log_history": []}
            step = f"{state['global_step']} of {state['max_steps']}" if "max_steps" in state else NONE
            last = {name: value for entry in state["log_history"] for name, value in entry.items()}
            figures = [last.get(name) for name in ("loss", "eval_loss", "reward")]
            figures = [f"{value:.4g}" if isinstance(value, int | float) else NONE for value in figures]
            rows.append([path.parent.name, str(record.get("stage")), step, *figures])
    return rows
