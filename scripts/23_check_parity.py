"""Do training, transformers and vLLM see the same tokens, and do adapter, merged model and vLLM write the same text?

Tokens: for real rows, and for conversations chained of two of them, with thinking off and on, what stage 20 trains must
begin with what the model is asked with in generation, go on with the answer and its eos, and vLLM's chat endpoint must
be asked with the same ids.
Texts: greedy, one prompt at a time. Where two first differ at a place whose two best logits are closer than --near-tie,
rounding decides: that is listed, not failed. Exit code 1 on any other difference.
Model: stage 22's certificate is made again (common/merging.py), with the files as they are now: every weight of the
merged folder must be that of base + adapter, and the logits may differ by no more than rounding to the merged folder's
dtype explains. Where that is bfloat16, the noise it measures is the smallest --near-tie.

Reads   --adapter on its base, --merged (stage 22), --rows-file: rows with prompt and completion
Writes  results/{task}/parity.json: what was compared and every difference
Run     python scripts/23_check_parity.py
        python scripts/23_check_parity.py --server http://127.0.0.1:8000
        python scripts/23_check_parity.py --server none
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.evaluation import parity
from common.settings import UserError, next_command, read_settings, resolve_model
from common.training.loss_masks import RowStyle

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Settings:
    # --- what
    task: str = "poems"
    """writing job: names the folders below"""
    model: str = ""
    """base model; empty = the one that the adapter names"""
    adapter: str = "checkpoints/{task}/sft"
    """LoRA folder, as stage 20 left it; its tokenizer is training's"""
    force_base: bool = False
    """put the adapter on --model although it was trained on another base"""
    merged: str = "checkpoints/{task}/sft_merged"
    """merged model: what is generated with and served"""
    server: str = "start"
    """start = a vLLM server for this check; a URL = one that runs already; none = leave vLLM out"""
    dtype: str = "float32"
    """of the texts' comparison; in bfloat16 texts part by rounding alone"""

    # --- tokens
    rows_file: Path = Path("processed_data/{task}/sft_val.jsonl")
    """real rows"""
    max_rows: int = 32
    """rows whose tokens are compared, evenly taken"""
    row_style: RowStyle = "prompt"
    """as in stage 20"""
    chained: bool = True
    """also chain two rows into a conversation of two turns"""

    # --- texts
    max_prompts: int = 8
    """of these rows, prompts that are answered"""
    max_new_tokens: int = 64
    """in an answer"""
    near_tie: float = 1e-3
    """difference of the two best logits below which rounding decides; raised to the noise of the merged model's
    dtype"""

    # --- run
    output_file: Path = Path("results/{task}/parity.json")
    """the report"""
    overwrite: bool = False
    """replace what an earlier run left in output_file"""


def compare_tokens(
    settings: Settings,
    rows: list[dict],
    kind: str,
    trained_with: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    url: str | None,
    name: str | None,
) -> list[dict]:
    """Differences of training, transformers and vLLM over rows, thinking off and on. trained_with: the adapter's
    tokenizer. Rows with reasoning are trained with thinking on only."""
    from common.conversations import thinks, written_answer
    from common.preflight.mask_preview import sft_sequence
    from common.vllm_engine import post

    found = []
    for thinking in (False, True):
        faults = []
        compared = [(number, row) for number, row in enumerate(rows) if thinking or not thinks(row["completion"][-1])]
        for number, row in compared:
            asked = parity.prompt_ids(tokenizer, row, thinking)
            trained = sft_sequence(row, trained_with, 1 << 20, settings.row_style, thinking).ids
            turns = row["prompt"] + row["completion"]
            rest, answer = trained[len(asked) :], written_answer(tokenizer, turns, thinking, row.get("tools"))
            pairs = {}
            if trained[: len(asked)] != asked:
                pairs["training and hf: prompt"] = trained[: len(asked)], asked
            elif not parity.begins_with_answer(trained_with, rest, answer):
                pairs["training and answer"] = rest, trained_with(answer, add_special_tokens=False)["input_ids"]
            if url:
                body = parity.question(name, row, thinking) | {"add_generation_prompt": True}
                served = post(url, "tokenize", body)["tokens"]
                if served != asked:
                    pairs["hf and vllm: prompt"] = asked, served
            place = {"row": number, "turns": kind, "thinking": thinking}
            faults += [{"what": what, **place, **parity.difference(tokenizer, *pair)} for what, pair in pairs.items()]
        bad = len({fault["row"] for fault in faults})
        who = "training = hf = vllm" if url else "training = hf"
        if compared:
            same = f"{len(compared) - bad} of {len(compared)} rows"
            print(f"tokens, {kind}, thinking {'on' if thinking else 'off'}: {who} in {same}")
        found += faults
    return found


def compare_texts(
    settings: Settings,
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    adapted: PeftModel,
    merged: PreTrainedModel,
    url: str | None,
    name: str | None,
    near_tie: float,
) -> tuple[list[dict], list[dict]]:
    """(differences, near-ties) of the greedy answers of adapter, merged model and vLLM."""
    found, ties = [], []
    for number, row in enumerate(rows):
        ids = parity.prompt_ids(tokenizer, row, False)
        texts = {"adapter": parity.greedy(adapted, ids, settings.max_new_tokens)}
        texts["merged"] = parity.greedy(merged, ids, settings.max_new_tokens)
        if url:
            texts["vllm"] = parity.served_answer(url, name, row, settings.max_new_tokens)
        for other in list(texts)[1:]:
            if texts[other] != texts["adapter"]:
                shown = {"what": f"adapter and {other}: text", "row": number}
                shown |= parity.difference(tokenizer, texts["adapter"], texts[other])
                shown["gap"] = parity.best_gap(adapted, ids + texts["adapter"][: shown["place"]])
                (ties if shown["gap"] < near_tie else found).append(shown)
    bad = len({fault["row"] for fault in found})
    who = "adapter = merged = vllm" if url else "adapter = merged"
    print(f"greedy texts: {who} in {len(rows) - bad} of {len(rows)} prompts, {len(ties)} near-ties")
    return found, ties


def main(settings: Settings) -> None:
    from common.jsonl import read_jsonl, write_json
    from common.merging import certificate, faults, print_certificate, probe_texts, text_logits
    from common.model_files import adapter_base, check_adapter, check_model
    from common.models import load_model, load_tokenizer, model_config, require_context
    from common.runs import begin_run
    from common.vllm_engine import require_server, require_vllm, serve, served_model

    adapter, merged = (resolve_model(path, settings.task) for path in (settings.adapter, settings.merged))
    base = adapter_base(adapter, settings.model, settings.task)
    check_model(base)
    check_model(merged)
    notice = check_adapter(adapter, base, force_base=settings.force_base)
    if notice:
        print(f"notice: {notice}")
    rows = read_jsonl(settings.rows_file, "sft")
    if not rows:
        raise UserError(f"{settings.rows_file}: no rows; fix: run the prepare stage")
    if settings.server == "start":
        require_vllm()
    elif settings.server != "none":
        require_server(settings.server, "--server")
        served_model(settings.server)
    rows = rows[:: max(1, len(rows) // settings.max_rows)][: settings.max_rows]
    groups = {"rows": rows}
    if settings.chained:
        groups["chained"] = [parity.chain(one, two) for one, two in zip(rows, rows[1:] + rows[:1], strict=True)]
    trained_with, tokenizer = load_tokenizer(adapter), load_tokenizer(merged)
    longest = max(len(parity.prompt_ids(tokenizer, row, True)) for row in [*rows, *groups.get("chained", [])])
    room = longest + settings.max_new_tokens + 16  # further tokens of a thinking block
    require_context(merged, room, "the longest prompt + --max-new-tokens + 16:")
    inputs = {"model": base, "adapter": adapter, "merged": merged, "rows_file": settings.rows_file}
    # a server may have changed since the last check
    settings = replace(settings, overwrite=settings.overwrite or settings.server not in ("start", "none"))
    with begin_run(settings.output_file, settings, inputs, "23_check_parity", resumable=False) as run:
        if notice:
            run.figure("base_notice", notice)
        opened = partial(load_model, base, tokenizer, adapter=adapter, force_base=settings.force_base)
        adapted = opened(settings.dtype)
        whole = load_model(merged, tokenizer, settings.dtype)
        stored = str(model_config(merged).dtype).removeprefix("torch.")
        found = []
        servers = {"none": nullcontext(), "start": serve(merged, settings.dtype, room)}
        with servers.get(settings.server, nullcontext(settings.server)) as url:
            name = served_model(url) if url else None
            for kind, group in groups.items():
                found += compare_tokens(settings, group, kind, trained_with, tokenizer, url, name)
            chosen = rows[: settings.max_prompts]
            # stage 22's certificate, with the files as they are now
            model_report = certificate(
                adapted,
                whole,
                opened(stored) if settings.dtype == "float32" and stored != "float32" else None,
                lambda model, text: text_logits(model, tokenizer, text),
                probe_texts(tokenizer, chosen),
                stored,
            )
            print_certificate(model_report)
            near_tie = max(settings.near_tie, (model_report["noise"] or {"max": 0.0})["max"])
            differing, ties = compare_texts(settings, chosen, tokenizer, adapted, whole, url, name, near_tie)
        found += differing
        model_faults = faults(model_report)
        report = {
            "vllm": bool(url),
            "rows": len(rows),
            "prompts": len(chosen),
            "passed": not found and not model_faults,
        }
        report |= {"model": model_report, "model_faults": model_faults, "near_tie": near_tie}
        write_json(settings.output_file, report | {"differences": found, "near_ties": ties})
        for fault in [*{fault["what"]: fault for fault in reversed(found)}.values(), *ties]:  # the first of each kind
            label = "near-tie" if fault in ties else "DIFFERENT"
            print(f"{label}, {fault['what']}, row {fault['row']}, token {fault['place']}:")
            print(f"  {fault['first']!r}\n  {fault['second']!r}")
        run.figure("differences", len(found))
        run.figure("near_ties", len(ties))
        run.figure("model", model_report)
        run.figure("model_faults", model_faults)
        if not url:
            print("vLLM was not compared (--server none)")
        for fault in model_faults:
            print(f"the merged model is NOT the adapter's model: {fault}", file=sys.stderr)
        if found:
            print(f"not the same: {len(found)} differences; fix: docs/OPERATIONS.md names the causes", file=sys.stderr)
        if found or model_faults:
            run.fail("; ".join([f"{len(found)} differences", *model_faults]))
            raise SystemExit(1)
        run.finish(next_command("60_generate", task=settings.task, model=base, adapter=settings.adapter))


if __name__ == "__main__":
    main(read_settings(Settings))
