"""common/evaluation/tables.py: a table says how its texts were drawn."""

import json

from common.evaluation.tables import sampling_notes


def test_runs_are_grouped_by_how_they_were_drawn(tmp_path):
    drawn = {
        "base": (1.0, 0.95, 0, 0.0),
        "sft": (1.0, 0.95, 0, 0.0),
        "plain": (1.0, 1.0, 0, 0.0),
        "k": (0.7, 1.0, 50, 0.0),
        "min": (1.0, 1.0, 0, 0.05),
        "best": (0, 0.9, 0, 0.05),
    }
    for name, values in drawn.items():
        settings = dict(zip(("temperature", "top_p", "top_k", "min_p"), values, strict=True))
        (tmp_path / f"{name}.run.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    assert sampling_notes([tmp_path / f"{name}.jsonl" for name in (*drawn, "unknown")]) == [
        "Sampling: temperature 1, top-p 0.95: base, sft.",
        "Sampling: temperature 1: plain.",
        "Sampling: temperature 0.7, top-k 50: k.",
        "Sampling: temperature 1, min-p 0.05: min.",
        "Sampling: the likeliest token each time: best.",
    ]
