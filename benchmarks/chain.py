"""What did each stage of a chain cost? Read from the run records that the stages left.

Reads   run.json and *.run.json below processed_data/RUN, checkpoints/RUN, results/RUN
Writes  a Markdown table on standard output: wall time, peak memory, the commit; the largest sum of the peaks of two
        stages that ran side by side
Run     python benchmarks/chain.py --run poems
"""

import argparse
import sys
from datetime import datetime
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.jsonl import read_json  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", default="poems", help="folder of the recipe's run: poems, poems_quick, weibo_small ..."
    )
    options = parser.parse_args()
    records = []
    for place in ("processed_data", "checkpoints", "results"):
        for path in (ROOT / place / options.run).rglob("*run.json"):
            record = read_json(path)
            if record.get("status") == "done":
                what = path.parent.name if path.name == "run.json" else path.name.removesuffix(".run.json")
                records.append((record["started"], record["stage"], what, record))
    if not records:
        raise SystemExit(f"error: no finished run in checkpoints/{options.run}; fix: bash runs/{options.run}.sh")
    print("| stage | what | minutes | peak memory, MiB |\n|---|---|---:|---:|")
    for _, stage, what, record in sorted(records, key=lambda entry: entry[:3]):
        print(f"| {stage} | {what} | {record['wall_seconds'] / 60:.1f} | {record.get('peak_memory_mib') or 0:.0f} |")
    minutes = sum(record["wall_seconds"] for *_, record in records) / 60
    commits = sorted({str((record.get("git") or {}).get("commit", "unknown"))[:8] for *_, record in records})
    print(
        f"\n{len(records)} stages, {minutes:.1f} minutes added up (lanes run side by side), commit {', '.join(commits)}"
    )
    peaks = [record.get("peak_memory_mib") or 0 for *_, record in records]
    peaks += [
        sum(record.get("peak_memory_mib") or 0 for record in pair)
        for pair in combinations([record for *_, record in records], 2)
        if together(*pair)
    ]
    print(f"largest peak, of two stages that ran side by side their sum: {max(peaks) / 1024:.1f} GiB")


def together(one: dict, other: dict) -> bool:
    """Whether two stages ran at the same time for more than a second: start times are whole seconds."""
    starts = [datetime.fromisoformat(record["started"]).timestamp() for record in (one, other)]
    ends = [start + record["wall_seconds"] for start, record in zip(starts, (one, other), strict=True)]
    return min(ends) - max(starts) > 1


if __name__ == "__main__":
    main()
