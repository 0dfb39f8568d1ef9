"""One line a prompt: what every model answered, the rule scores of each answer and what the reward model gives it.

Reads   --generations: folder of stage 60; --scores: folder of stage 70; --reward: reward model of stage 30
Writes  --output: {"prompt_id", "prompt", "reference", "answers": {run: [answer, ...]}}, an answer being
        {"text", "finish_reason", "scores", "reward_model"}
Run     python runs/weibo_results.py --generations results/weibo/generations --scores results/weibo/scores \\
            --reward checkpoints/weibo/reward --output results/weibo/inference_comparison_results.jsonl
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.evaluation.tables import markdown_table, number  # noqa: E402
from common.jsonl import read_jsonl, write_jsonl  # noqa: E402
from common.training.rewards import load_rewards, score  # noqa: E402
from tasks.base import load_task  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("generations", "scores", "reward", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--dtype", default="auto", help="of the reward model: auto, float32, bfloat16")
    arguments = parser.parse_args()

    rewards = load_rewards((f"model={arguments.reward}",), load_task("weibo"), arguments.dtype, 1024)
    prompts: dict[str, dict] = {}
    means = []
    for file in sorted(arguments.generations.glob("*.jsonl")):
        rows = read_jsonl(file, "generation")
        rules = {row["id"]: row["scores"] for row in read_jsonl(arguments.scores / file.name)}
        columns = score(rewards, *([row[key] for row in rows] for key in ("prompt", "completion", "meta")))
        values = columns[rewards[0].name]
        for row, value in zip(rows, values, strict=True):
            line = prompts.setdefault(
                row["prompt_id"], {k: row[k] for k in ("prompt_id", "prompt", "reference")} | {"answers": {}}
            )
            answer = {
                "text": row["completion"],
                "finish_reason": row["finish_reason"],
                "scores": rules[row["id"]],
                "reward_model": value,
            }
            line["answers"].setdefault(file.stem, []).append(answer)
        known = [value for value in values if value is not None]
        means.append([file.stem, str(len(rows)), number(sum(known) / len(known) if known else None)])
    count = write_jsonl(arguments.output, prompts.values())
    print(markdown_table(["run", "answers", "mean score of the reward model"], means))
    print(f"{count} prompts in {arguments.output}")


if __name__ == "__main__":
    main()
