"""Let a judge score what the models wrote, 1 to 5 on each dimension, and pick the best text of every prompt.

Candidates A, B, C, ... are golden texts and generation files. The judge is a model behind any OpenAI-compatible
endpoint (OPENAI_BASE_URL, OPENAI_API_KEY), or `rules`: the measures of scripts/tasks/<task>, which need no API and
see less. A model judges every item in rotated orders, so that each text stands once in each place; where the orders
disagree it is a tie. The report says how far the judge can be trusted: position bias, one text against itself, unparsed
replies. docs/EVALUATION.md has the rules.

Every reply is kept in the request log the moment it arrives: a killed run goes on with nothing asked twice, and
--report-only makes the report again from the log with no call.

Reads   --candidates; data/{task}/judge_prompts/<version>/*.md; results/{task}/generations for the stop rates
Writes  results/{task}/judgements/<name>.jsonl (one row an item: scores, verdict, raw replies), <name>.txt (report),
        <name>.csv (utf-8-sig), <name>.run.json; <name>.requests.jsonl (request log, never deleted)
Run     python scripts/71_judge.py --task copywriting
        python scripts/71_judge.py --task copywriting --judge deepseek-chat --prompt-versions v1 v2 --dry-run
        python scripts/71_judge.py --task poems --candidates golden sft=results/poems/generations/sft.jsonl \\
            --judge qwen-max
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.judging.replies import LETTERS
from common.llm_settings import ASKING, HOW_TO_ASK, AskSettings
from common.settings import ROOT, UserError, changed, next_command, read_settings, show_path, unused

if TYPE_CHECKING:
    from common.llm_api import LLM
    from tasks.base import Task

CONTENT_TYPES = ("copy_type", "form", "content_type", "topic", "kind")


@dataclass
class Settings(AskSettings):
    # --- what
    task: str = "poems"
    """writing job: a module in scripts/tasks"""
    candidates: tuple[str, ...] = (
        "golden",
        "finetuned=results/{task}/generations/sft.jsonl",
        "base=results/{task}/generations/base.jsonl",
    )
    """NAME=FILE of stage 60, A B C ... in this order; a NAME alone is the golden texts of those files"""
    generations: Path = Path("results/{task}/generations")
    """folder of <run>.jsonl: the report has the stop rate of each"""
    samples: int = 1
    """texts of each prompt that are judged"""
    max_items: int = 0
    """first items, 0 = all"""
    content_type: str = ""
    """key of meta to group by; "" = the first there of copy_type, form, topic, ..."""

    # --- judge
    judge: str = "rules"
    """rules = the task's own measures, no API; else the name of a model at OPENAI_BASE_URL"""
    prompt_versions: tuple[str, ...] = ("v1",)
    """folders in prompts_dir; the first two are compared on the same texts"""
    prompts_dir: Path = Path("data/{task}/judge_prompts")
    """folder of versions, each a folder of Markdown files"""
    control: int = 20
    """items of the A/A control, in which one text stands in both places"""
    temperature: float = 0.0
    """of the judge"""
    max_tokens: int = 1500
    """of a reply"""
    extra_body: str = ""
    """JSON object with further fields of a request, e.g. '{"enable_thinking": false}'"""

    # --- how to ask (further settings: common/llm_settings.py)
    request_log: Path = Path("results/{task}/judgements/{name}.requests.jsonl")
    """raw replies; what is in it is not asked again"""
    report_only: bool = False
    """make the report from the request log, ask nothing"""

    # --- run
    name: str = ""
    """of the output files; "" = the judge"""
    output_file: Path = Path("results/{task}/judgements/{name}.jsonl")
    """{name} is filled in"""
    bootstrap: int = 2000
    """resamples behind each interval"""
    seed: int = 42
    """of the resampling"""
    overwrite: bool = False
    """replace what an earlier run left; the request log stays"""

    def clashes(self):
        if self.judge == "rules":
            yield from unused(self, "with --judge rules: nothing is asked", *ASKING, "report_only")


# --- reading


def is_finished(path: Path) -> bool:
    """Has the stage that writes this generation file come to its end? A file without a record is the user's own."""
    from common.jsonl import read_json

    record = path.with_name(f"{path.stem}.run.json")
    return not record.exists() or read_json(record).get("status") == "done"


def find_candidates(settings: Settings) -> dict[str, Path | None]:
    """name -> generation file, None for golden texts. Raises UserError where they do not make a comparison."""
    found: dict[str, Path | None] = {}
    for word in settings.candidates:
        name, _, file = word.partition("=")
        if name in found or not name or name == "tie":
            raise UserError(f"--candidates {word}: {name or 'no'} name twice or not allowed; fix: one name each")
        places = [base / Path(file).expanduser() for base in (Path.cwd(), ROOT)]
        found[name] = next((path for path in places if path.is_file()), places[-1]) if file else None
        if file and not found[name].is_file():
            raise UserError(f"candidate {name}: no such file: {file}; fix: run scripts/60_generate.py, or name another")
        if file and not is_finished(found[name]):
            raise UserError(
                f"candidate {name}: {show_path(found[name])} is unfinished; fix: run stage 60 again to go on with it"
            )
    if not 2 <= len(found) <= len(LETTERS) or not any(found.values()):
        raise UserError(
            f"--candidates: {len(found)} with {sum(map(bool, found.values()))} files; fix: name 2 to 8, one a file"
        )
    return found


def load_items(settings: Settings, candidates: dict[str, Path | None]) -> tuple[list, Counter]:
    """The prompts that every candidate answers, and why the others are left out."""
    from common.conversations import without_thought
    from common.judging.aggregate import Item
    from common.judging.prompts import read_generations

    files = {name: read_generations(path) for name, path in candidates.items() if path}
    texts = {name: {row["id"]: row for row in rows if row["sample"] < settings.samples} for name, rows in files.items()}
    every = {row_id: row for rows in texts.values() for row_id, row in rows.items()}
    items, dropped = [], Counter()
    for row_id, row in every.items():
        golden = next((rows[row_id]["reference"] for rows in texts.values() if row_id in rows), None)
        answers = {n: texts[n][row_id]["completion"] if row_id in texts[n] else None for n in texts}
        answers |= {name: golden for name, path in candidates.items() if path is None}
        if missing := [name for name in candidates if answers[name] is None]:
            dropped[f"缺少 {'、'.join(missing)}"] += 1
            continue
        key = settings.content_type or next((key for key in CONTENT_TYPES if key in row["meta"]), "")
        kind = str(row["meta"].get(key) or "全部")
        texts_of = [without_thought(answers[name]) for name in candidates]
        items.append(Item(row_id, row["prompt_id"], kind, row["prompt"], texts_of, row["meta"]))
    if settings.max_items and len(items) > settings.max_items:
        dropped["--max-items"] = len(items) - settings.max_items
        items = items[: settings.max_items]
    if not items:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items())
        raise UserError(
            f"no prompt has a text of every candidate ({reasons}); fix: generate on the same prompts, with golden texts"
        )
    return items, dropped


def stop_rates(folder: Path, candidates: dict[str, Path | None]) -> list[dict]:
    """Share of texts that ended by themselves, for every generation file of the folder and of the candidates."""
    from common.jsonl import read_jsonl

    files = {path.resolve(): path.stem for path in sorted(folder.glob("*.jsonl")) if is_finished(path)}
    files |= {path.resolve(): f"{path.stem} ({name})" for name, path in candidates.items() if path}
    rates = []
    for path, name in files.items():
        rows = read_jsonl(path, "generation")
        rates.append(
            {"name": name, "texts": len(rows), "stop": sum(r["finish_reason"] == "stop" for r in rows) / len(rows)}
        )
    return rates


# --- judging


def judge_by_rules(task: Task, items: list, names: list[str]):
    """Scores of the task's own measures, put on the judge's scale."""
    from common.judging.aggregate import Judged, combine, rule_scores
    from common.judging.replies import Reply, highest

    columns = [rule_scores(task, items, candidate) for candidate in range(len(names))]
    order = [tuple(range(len(names)))]
    by_item = zip(items, map(list, zip(*columns, strict=True)), strict=True)
    verdicts = [combine([Reply(scores, highest(scores))], order, item.texts) for item, scores in by_item]
    return [Judged("rules", items, names, verdicts)]


@dataclass
class Call:
    """One question to the judge: which item, which candidates in which places; a control shows one text twice."""

    version: str
    item: int
    order: tuple[int, ...]
    control: bool
    dimensions: list[str]
    content: str


def plan_calls(task: Task, settings: Settings, items: list, count: int) -> list[Call]:
    """Every item in every order under every version, and the controls, spread over items and candidates."""
    from common.judging.prompts import load_prompt, rotations

    family = task.judge_prompt
    every = max(1, len(items) // settings.control) if settings.control else len(items) + 1
    prompts, calls = {}, []
    for version in settings.prompt_versions:
        for i, item in enumerate(items):
            key = version, family(item.meta)
            if key not in prompts:
                prompts[key] = load_prompt(settings.prompts_dir / version, key[1])
            orders = [(order, False) for order in rotations(count)]
            if i % every == 0 and i // every < settings.control:
                orders.append((((i // every) % count,) * 2, True))
            for order, control in orders:
                content = prompts[key].fill(item.prompt, [item.texts[candidate] for candidate in order])
                calls.append(Call(version, i, order, control, prompts[key].dimensions, content))
    return calls


def judge_by_model(settings: Settings, calls: list[Call], answers: list, items: list, names: list[str]):
    """Parse every reply and put the orders of each item together. Returns the results and one row of raw replies a
    call."""
    from common.judging.aggregate import Judged, combine
    from common.judging.replies import parse_reply

    replies, rows = [], []
    for call, answer in zip(calls, answers, strict=True):
        text = getattr(answer, "text", None)  # None: a request that stayed without an answer
        replies.append(parse_reply(text, len(call.order), call.dimensions) if text is not None else None)
        order = "".join(LETTERS[candidate] for candidate in call.order)
        rows.append({"order": order, "reply": text, "parsed": replies[-1]._asdict() if replies[-1] else None})
    results = []
    for version in settings.prompt_versions:
        mine = [k for k, call in enumerate(calls) if call.version == version]
        by_item: dict[int, list[int]] = {i: [] for i in range(len(items))}
        for k in mine:
            if not calls[k].control:
                by_item[calls[k].item].append(k)
        verdicts = [
            combine([replies[k] for k in ks], [calls[k].order for k in ks], items[i].texts) for i, ks in by_item.items()
        ]
        controls = [replies[k] for k in mine if calls[k].control]
        unparsed = sum(replies[k] is None for k in mine)
        results.append(Judged(version, items, names, verdicts, controls, len(mine), unparsed))
    return results, rows


def check_replies(settings: Settings, llm: LLM, requests: list) -> None:
    """Before an earlier run is touched: is everything there that is needed to ask, or to report?"""
    missing = sum(request.key not in llm.answers for request in requests)
    if settings.report_only and missing:
        raise UserError(
            f"{missing} of {len(requests)} replies are not in {show_path(settings.request_log)}; "
            "fix: run without --report-only, with the judge, texts and prompts that were asked"
        )
    llm.check(requests)


def main(settings: Settings) -> None:
    from dataclasses import replace

    from tasks.base import load_task

    task, by_rules = load_task(settings.task), settings.judge == "rules"
    name = settings.name or settings.judge.replace("/", "_")
    files = {key: Path(str(getattr(settings, key)).replace("{name}", name)) for key in ("output_file", "request_log")}
    settings = replace(settings, **files)
    if settings.output_file.suffix != ".jsonl":
        raise UserError(f"--output-file {settings.output_file}: not a .jsonl file; fix: name one")
    if min(settings.samples, settings.bootstrap) < 1 or settings.control < 0 or not settings.prompt_versions:
        raise UserError(
            "--samples and --bootstrap have to be above 0, --control not below, and a version named; fix: raise them"
        )
    candidates = find_candidates(settings)
    items, dropped = load_items(settings, candidates)
    names = list(candidates)
    calls = [] if by_rules else plan_calls(task, settings, items, len(names))

    from common.jsonl import write_bytes, write_jsonl
    from common.judging import aggregate
    from common.judging import report as judge_report
    from common.llm_api import LLM, ChatRequest, read_extra
    from common.runs import begin_run

    extra, sampling = read_extra(settings.extra_body), (settings.max_tokens, settings.temperature)
    requests = [
        ChatRequest(settings.judge, [{"role": "user", "content": call.content}], *sampling, extra=extra)
        for call in calls
    ]
    stops = stop_rates(settings.generations, candidates)
    report_file, table_file = (settings.output_file.with_suffix(ending) for ending in (".txt", ".csv"))
    inputs = {f"candidate {name}": path for name, path in candidates.items()} | {"task": task.file}
    if by_rules:
        inputs |= {f"rules: {file.name}": file for file in task.FILES}
    else:
        inputs |= {f"prompts {version}": settings.prompts_dir / version for version in settings.prompt_versions}
    files = dict(ignore=(*HOW_TO_ASK, "report_only"), also=(report_file, table_file))
    versions = settings.prompt_versions
    with LLM.of(settings) as llm:
        if settings.dry_run:
            llm.print_estimate(requests, f"{len(items)} items, {len(names)} orders, {len(versions)} versions")
            return
        check_replies(settings, llm, requests)
        with begin_run(settings.output_file, settings, inputs, "71_judge", **files) as run:
            if by_rules:
                results, replies = judge_by_rules(task, items, names), []
                usage = "评审调用: 0 次 (规则)"
                judge = f"规则 (scripts/tasks/{settings.task})，没有调用任何语言模型，只看得到规则能看到的部分"
            else:
                try:
                    answers = llm.ask(requests, "judgements")
                finally:
                    run.figure("judge", llm.figures())
                results, replies = judge_by_model(settings, calls, answers, items, names)
                usage = f"评审调用: {len(requests)} 次 ({llm.spent()})"
                judge = f"{settings.judge}，提示词 {'、'.join(versions)}，每条 {len(names)} 种顺序，不一致计为平局"
            sampling = (settings.bootstrap, settings.seed)
            tables = {judged.version: aggregate.figures(judged, *sampling) for judged in results}
            comparison = aggregate.compare_versions(*results[:2], *sampling) if len(results) > 1 else None
            left_out = "".join(f"，未评 {count} 条 ({reason})" for reason, count in dropped.items())
            shown = " ".join(f"{LETTERS[c]}={name}" for c, name in enumerate(names))
            notes = [f"任务: {settings.task}{left_out}", f"候选: {shown}", f"评审: {judge}"]
            report = judge_report.report_text(notes, tables, comparison, stops, usage)
            write_jsonl(settings.output_file, judge_report.output_rows(results, calls, replies))
            write_bytes(report_file, report.encode())
            write_bytes(table_file, judge_report.csv_text(results).encode("utf-8-sig"))
            run.figure("table", tables)
            run.figure("comparison", comparison)
            run.figure("stop_rates", stops)
            print(report)
            if (share := max(table["trust"]["unparsed"] or 0 for table in tables.values())) >= 0.5:
                print(
                    f"warning: {share:.0%} of the replies could not be read: the table says little; fix: a larger "
                    f"--max-tokens where they are cut, or another judge ({show_path(settings.output_file)} holds them)"
                )
            run.finish(next_command("72_compare", task=settings.task, **changed(settings, "generations")))


if __name__ == "__main__":
    main(read_settings(Settings))
