"""What stage 71 writes: the report as text (Chinese), rows with every reply, and a table for spreadsheets."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable

from common.evaluation.statistics import Estimate
from common.evaluation.tables import spreadsheet_cell
from common.judging.aggregate import Judged
from common.judging.replies import LETTERS, TIE, mean_score

NONE = "–"  # does not apply, or not known: never shown as 0
# Columns of the table as spreadsheets know them; other candidates are called <name>_output.
TEXT_COLUMNS = {"golden": "golden_answer", "finetuned": "finetuned_model_output", "base": "base_model_output"}


# -------------------------------------------------------------------------------------------------------- report


def report_text(
    notes: list[str], tables: dict[str, dict], comparison: dict | None, stops: list[dict], usage: str
) -> str:
    """The report. tables: version -> figures(...); stops: [{"name", "texts", "stop"}], one a checkpoint."""
    total = next(iter(tables.values()))["n"]
    parts = ["=== 评测统计报告 ===", f"总评测数据: {total} 条", "\n".join(notes)]
    for version, table in tables.items():
        if len(tables) > 1:
            parts.append(f"--- 评审提示词 {version} ---")
        parts += _version_parts(table)
    if comparison:
        parts += _comparison_parts(comparison, tables)
    rows = [[stop["name"], str(stop["texts"]), _share(stop["stop"])] for stop in stops]
    parts.append("停止率（自行结束的文本所占比例）\n" + columns(["checkpoint", "n", "stop_rate"], rows))
    return "\n\n".join([*parts, usage]) + "\n"


def _version_parts(table: dict) -> list[str]:
    names = list(table["overall"])
    letters = dict(zip(names, LETTERS, strict=False))
    rows = [
        [kind, str(row["n"]), *(_score(row["scores"][name]) for name in names)]
        for kind, row in table["by_type"].items()
    ]
    best = [f"{letters[name]} ({name}): {_count(table['best'][name])}" for name in names]
    best.append(f"平局 (各顺序不一致或难分高下): {_count(table['best']['tie'])}")
    if table["undecided"]:
        best.append(f"未定 (可解析的顺序不足): {table['undecided']} 次")
    wins = [
        [name, str(row["n"]), _percent(row["win_rate"]), _percent(row["length_controlled"])]
        for name, row in table["wins"].items()
    ]
    dimensions = [[dimension, *(_score(row[name]) for name in names)] for dimension, row in table["dimensions"].items()]
    return [
        "按内容类型统计\n" + columns(["content_type", "n", *(f"{name}_avg_score" for name in names)], rows),
        "最佳模型统计\n" + "\n".join(best),
        "整体平均分\n" + "\n".join(f"{name}: {_score(table['overall'][name])}" for name in names),
        "胜率（前者对后者，平局计 0.5）\n" + columns(["pair", "n", "win_rate", "length_controlled"], wins),
        "各维度平均分\n" + columns(["dimension", *names], dimensions),
        "评审可靠性\n" + "\n".join(_trust_lines(table["trust"])),
    ]


def _trust_lines(trust: dict) -> list[str]:
    if not trust["calls"]:
        return ["规则评审没有位置、没有噪声，也没有模型调用"]
    control = trust["control"]
    lines = [
        f"位置偏差率 (每种顺序都选同一个位置): {_percent(trust['position_bias_rate'])}",
        f"顺序不一致率: {_percent(trust['disagreement_rate'])}",
    ]
    if trust["picks_by_place"]:
        lines.append(
            "各位置被选比例: " + ", ".join(f"{i}: {_share(s)}" for i, s in enumerate(trust["picks_by_place"], start=1))
        )
    if control["n"]:
        gap = NONE if control["mean_gap"] is None else f"{control['mean_gap']:.2f}"
        lines.append(
            f"A/A 对照 (同一文本评两次, n={control['n']}, 可解析 {control['parsed']}): 判平 {_share(control['tie'])}, "
            f"选首位 {_share(control['first'])}, 平均分差 {gap}"
        )
    return [*lines, f"无法解析的回复: {_share(trust['unparsed'])} (不计分，也不计 0), 共 {trust['calls']} 次调用"]


def _comparison_parts(comparison: dict, tables: dict[str, dict]) -> list[str]:
    first, second = comparison["versions"]
    rows = [
        [name, _score(tables[first]["overall"][name]), _score(tables[second]["overall"][name]), _score(difference, "+")]
        for name, difference in comparison["difference"].items()
    ]
    trust = [
        [label, *(value(tables[version]["trust"]) for version in (first, second))]
        for label, value in (
            ("position_bias_rate", lambda t: _percent(t["position_bias_rate"])),
            ("disagreement_rate", lambda t: _percent(t["disagreement_rate"])),
            ("control_tie", lambda t: _share(t["control"]["tie"])),
            ("unparsed", lambda t: _share(t["unparsed"])),
        )
    ]
    correlation = NONE if comparison["correlation"] is None else f"{comparison['correlation']:.3f}"
    return [
        f"提示词版本对比（同一批文本，{first} 与 {second}）\n"
        + columns(["candidate", first, second, f"{second} - {first}"], rows)
        + f"\n最佳结论一致: {_percent(comparison['same_best'])}\n逐篇得分的相关系数: {correlation}",
        columns(["trust", first, second], trust),
    ]


def columns(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns stand under each other, a Chinese character being two wide."""

    def width(text: str) -> int:
        return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)

    table = [header, *rows]
    widths = [max(width(row[i]) for row in table) for i in range(len(header))]
    lines = (
        "  ".join(cell + " " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True)) for row in table
    )
    return "\n".join(line.rstrip() for line in lines)


def _score(estimate: Estimate | list, sign: str = "") -> str:
    return _interval(estimate, lambda value: f"{value:{sign}.2f}")


def _percent(estimate: Estimate | list) -> str:
    return _interval(estimate, _share)


def _interval(estimate: Estimate | list, show: Callable[[float], str]) -> str:
    mean, low, high = estimate
    if mean is None:
        return NONE
    return show(mean) if low is None or high is None else f"{show(mean)} [{show(low)}, {show(high)}]"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}%"


def _count(row: dict) -> str:
    return f"{row['count']} 次 ({_percent(row['share'])})"


# -------------------------------------------------------------------------------------------------------- files


def output_rows(results: list[Judged], calls: list, replies: list[dict]) -> list[dict]:
    """One row an item and version, controls included, with the raw replies. replies[k] answers calls[k]."""

    def named(best: int | None) -> str | None:
        return None if best is None else "tie" if best == TIE else LETTERS[best]

    raw: dict[tuple, list[dict]] = {}
    for call, reply in zip(calls, replies, strict=True):
        raw.setdefault((call.version, call.item, call.control), []).append(reply)
    rows = []
    for judged in results:
        for i, (item, verdict) in enumerate(zip(judged.items, judged.verdicts, strict=True)):
            scores = {
                LETTERS[c]: {
                    "name": name,
                    "score": verdict.scores[c] and mean_score(verdict.scores[c]),
                    "scores": verdict.scores[c],
                }
                for c, name in enumerate(judged.names)
            }
            head = {"id": f"{judged.version}/{item.id}", "prompt_id": item.prompt_id, "version": judged.version}
            wins = {f"{LETTERS[a]}>{LETTERS[b]}": win for (a, b), win in verdict.wins.items()}
            rows.append(
                {
                    **head,
                    "kind": "item",
                    "content_type": item.content_type,
                    "candidates": scores,
                    "best": named(verdict.best),
                }
                | {"wins": wins, "position_bound": verdict.bound, "orders": raw.get((judged.version, i, False), [])}
            )
            if control := raw.get((judged.version, i, True)):
                rows.append({**head, "id": f"{head['id']}/control", "kind": "control", "orders": control})
    return rows


def csv_text(results: list[Judged]) -> str:
    """One row an item and version: prompt, texts, scores, best. Written with utf-8-sig it opens in a spreadsheet."""
    names = results[0].names
    dimensions = list(dict.fromkeys(name for judged in results for name in judged.dimensions()))
    texts = [TEXT_COLUMNS.get(name, f"{name}_output") for name in names]
    header = ["prompt", *texts, *(f"{name}_score" for name in names), "best", "content_type", "prompt_version", "id"]
    header += [f"{name}_{dimension}" for name in names for dimension in dimensions]
    output = io.StringIO()
    writer = csv.writer(output)
    writer.writerow(header)
    for judged in results:
        for item, verdict in zip(judged.items, judged.verdicts, strict=True):
            scores = [None if row is None else mean_score(row) for row in verdict.scores]
            best = "" if verdict.best is None else "tie" if verdict.best == TIE else names[verdict.best]
            texts = [spreadsheet_cell(text) for text in (item.prompt, *item.texts)]
            row = [*texts, *map(_figure, scores), best, spreadsheet_cell(item.content_type)]
            row += [judged.version, item.id]
            row += [_figure((row or {}).get(dimension)) for row in verdict.scores for dimension in dimensions]
            writer.writerow(row)
    return output.getvalue()


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
