"""Did RL on a style classifier teach the style, or only what the classifier mistakes for it?

Two generation files on the same prompts (stage 60), before and after RL. Beside the reward itself stand opinions that
the training could not adapt to: the TF-IDF baseline's probability of the wanted style, the text's length, repetition,
copies of training answers; and how far the policy went from its reference: KL per character, estimated on the policy's
own samples as log p(policy) - log p(reference) (needs both models). The reward rising while TF-IDF's opinion does not
is what hacking the classifier looks like, and a warning says so.

Reads   --before, --after (stage 60), --classifier (stage 31), data/styles; --model and --adapter for the KL
Writes  a Markdown table on standard output; --output FILE.json for every figure; --plot FILE.png, reward against length
and TF-IDF
Run     python benchmarks/audit_style_reward.py --before results/styles/generations/sft_merged.jsonl \
            --after results/styles/generations/grpo.jsonl --model checkpoints/styles/sft_merged \
            --adapter checkpoints/styles/grpo
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.evaluation.plots import pyplot  # noqa: E402
from common.evaluation.statistics import bootstrap_difference, bootstrap_mean  # noqa: E402
from common.evaluation.tables import interval, markdown_table  # noqa: E402
from common.jsonl import read_jsonl, write_json  # noqa: E402
from common.settings import UserError, resolve_model  # noqa: E402
from common.training.classifiers import classifier_text, label_index, load_classifier, logits_of  # noqa: E402
from tasks import styles  # noqa: E402

REWARD, OPINION = "reward: classifier", "TF-IDF's opinion"


def measure(
    rows: list[dict], classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, style: str
) -> dict[str, list[float | None]]:
    """column -> one value a row."""
    prompts = [row["prompt"][-1]["content"] for row in rows]
    answers = [row["completion"] for row in rows]
    meta = [{**row["meta"], "style": style} for row in rows]
    texts = [classifier_text(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    chances = logits_of(classifier, tokenizer, texts).softmax(-1)[:, label_index(classifier, style)].tolist()
    return {
        REWARD: chances,
        OPINION: styles.tfidf_style(prompts, answers, meta),
        "characters": [float(len(answer)) for answer in answers],
        "no_repeat": styles.no_repeat(prompts, answers, meta),
        "ends_whole": styles.ends_whole(prompts, answers, meta),
        "near_copy": styles.near_copy(prompts, answers, meta),
        "stopped": [float(row["finish_reason"] == "stop") for row in rows],
    }


def kl_per_character(rows: list[dict], model_path: str, adapter: str) -> list[float | None]:
    """log p(policy) - log p(reference) of the policy's own samples, nats per character; its mean estimates the KL."""
    from common.likelihood import nll_per_character
    from common.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(model_path)
    policy = load_model(model_path, tokenizer, "float32", adapter)
    mine = nll_per_character(policy, tokenizer, rows)
    with policy.disable_adapter():
        reference = nll_per_character(policy, tokenizer, rows)
    return [None if a is None or b is None else b - a for a, b in zip(mine, reference, strict=True)]


def verdict(differences: dict) -> str:
    """In words, from the intervals of the differences (mean, low, high)."""
    reward, opinion = differences[REWARD], differences[OPINION]
    if reward.low is None or reward.low <= 0:
        return "the reward did not clearly rise: nothing to audit"
    if opinion.low is not None and opinion.low > 0:
        share = opinion.mean / reward.mean
        return f"the reward rose, and so did TF-IDF's opinion, by {share:.0%} of it: no sign of a hacked classifier"
    return "the reward rose and TF-IDF's opinion did not clearly follow: READ THE TEXTS, the classifier may be hacked"


def plot(columns: dict[str, dict], path: Path) -> None:
    """Reward against TF-IDF's opinion and against length, a point a text."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for name, found in columns.items():
        for axis, key in zip(axes, (OPINION, "characters"), strict=True):
            axis.scatter(found[key], found[REWARD], s=10, alpha=0.5, label=name)
            axis.set_xlabel(key)
    axes[0].set_ylabel(REWARD)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="generations of the policy's starting point")
    parser.add_argument("--after", type=Path, required=True, help="generations of the trained policy, same prompts")
    parser.add_argument("--classifier", default="checkpoints/styles/classifier", help="what rewarded it")
    parser.add_argument("--style", default="有帮助", help="label that was rewarded")
    parser.add_argument("--model", default="", help="starting point, for the KL; empty = without")
    parser.add_argument("--adapter", default="", help="trained adapter on it")
    parser.add_argument("--output", type=Path, help="JSON file for every figure")
    parser.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args()

    files = {"before": read_jsonl(options.before, "generation"), "after": read_jsonl(options.after, "generation")}
    classifier, tokenizer = load_classifier(resolve_model(options.classifier))
    columns = {name: measure(rows, classifier, tokenizer, options.style) for name, rows in files.items()}
    prompts = {name: [row["prompt_id"] for row in rows] for name, rows in files.items()}
    if not set(prompts["before"]) & set(prompts["after"]):
        raise UserError("the two files share no prompt; fix: generate on the same --prompts-file")
    differences, table = {}, []
    for key in columns["before"]:
        means = [bootstrap_mean(columns[name][key], prompts[name]) for name in files]
        differences[key] = bootstrap_difference(
            columns["before"][key], prompts["before"], columns["after"][key], prompts["after"]
        )
        table.append([key, *(interval(mean) for mean in means), interval(differences[key], sign=True)])
    figures = {key: value._asdict() for key, value in differences.items()}
    if options.model and options.adapter:
        kl = kl_per_character(files["after"], resolve_model(options.model), resolve_model(options.adapter))
        mean = bootstrap_mean(kl, prompts["after"])
        table.append(["KL to the reference, nats per character", "0", interval(mean), ""])
        figures["kl_per_character"] = mean._asdict()
    print(
        f"style {options.style}: {len(files['before'])} texts before, {len(files['after'])} after; 95 % intervals over "
        "prompts"
    )
    print(markdown_table(["", "before", "after", "difference, paired"], table))
    print(verdict(differences))
    if options.output:
        write_json(options.output, {"style": options.style, "differences": figures, "verdict": verdict(differences)})
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(columns, options.plot)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
