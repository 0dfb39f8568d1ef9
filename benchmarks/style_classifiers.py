"""What does a fine-tuned style classifier know that simpler ones do not?

On the validation and the test questions: the majority class, TF-IDF + logistic regression (whole text; answer alone),
logistic regression on the frozen base's hidden states, and the classifiers of stage 31. Accuracy, macro-F1 and pairs of
one question, with 95 % intervals over questions. What the frozen base's regression uses (layer, strength) is chosen by
5-fold cross-validation over training questions, so neither validation nor test rows decide anything about it.

Reads   --data (stage 12), --base, --classifiers (stage 31)
Writes  --output, a Markdown table, and the same on standard output
Run     python benchmarks/style_classifiers.py
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common.evaluation.baselines import tfidf_classifier  # noqa: E402
from common.evaluation.statistics import bootstrap_difference  # noqa: E402
from common.evaluation.tables import interval, markdown_table  # noqa: E402
from common.settings import resolve_model, show_path  # noqa: E402
from common.training.classifiers import load_classifier, logits_of  # noqa: E402
from tasks import styles  # noqa: E402
from tasks.styles import metrics as style_metrics  # noqa: E402

STRENGTHS = (0.001, 0.01, 0.1)  # scikit-learn's C


def hidden_states(base: str, texts: list[str]):
    """float32 [texts, layers + 1, 2 * hidden]: mean and maximum over the answer's tokens, of the embeddings and of each
    layer."""
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModel.from_pretrained(base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False).eval()
    features = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            answer = len(tokenizer(styles.answer_of(text), add_special_tokens=False)["input_ids"])
            layers = model(input_ids=ids, output_hidden_states=True).hidden_states
            features.append([torch.cat([h[0, -answer:].mean(0), h[0, -answer:].amax(0)]).numpy() for h in layers])
    return np.array(features)


def frozen_base(base: str, rows: dict[str, list[dict]]) -> tuple[str, dict]:
    """(what was chosen, a fitted classifier's probabilities on each split, columns in its classes_ order, and the
    classes)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = {split: hidden_states(base, [row["input"] for row in part]) for split, part in rows.items()}
    truth = [row["label"] for row in rows["train"]]
    groups = [styles.question_key(row["input"]) for row in rows["train"]]

    def regression(strength: float):
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))

    scores = {}
    for layer in range(features["train"].shape[1]):
        for strength in STRENGTHS:
            folds = cross_val_score(
                regression(strength), features["train"][:, layer], truth, groups=groups, cv=GroupKFold(5)
            )
            scores[layer, strength] = folds.mean()
    layer, strength = max(scores, key=scores.get)
    model = regression(strength).fit(features["train"][:, layer], truth)
    chosen = f"frozen base, layer {layer} + logistic regression"
    return chosen, {split: model.predict_proba(part[:, layer]) for split, part in features.items()} | {
        "classes": model.classes_
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "processed_data/styles", help="folder of stage 12")
    parser.add_argument("--base", default="data/tiny_qwen3", help="base model whose frozen features are tried")
    parser.add_argument(
        "--classifiers", nargs="*", default=["checkpoints/styles/classifier"], help="folders of stage 31"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results/styles/classifiers.md", help="Markdown file")
    options = parser.parse_args()

    labels = styles.read_labels(options.data / "labels.json")
    names = [label["label"] for label in labels]
    rows = {
        split: styles.read_rows(options.data / f"style_{split}.jsonl", labels) for split in ("train", "val", "test")
    }
    truth = [row["label"] for row in rows["train"]]
    systems: dict[str, dict] = {}  # name -> split -> [rows, labels]

    most = max(names, key=truth.count)
    systems["majority class"] = {s: [[float(name == most) for name in names]] * len(rows[s]) for s in ("val", "test")}
    parts = {
        "TF-IDF, whole text": str,
        "TF-IDF, answer alone": styles.answer_of,
    }
    for name, part in parts.items():
        model = tfidf_classifier([part(row["input"]) for row in rows["train"]], truth)
        order = [list(model.classes_).index(label) for label in names]
        systems[name] = {
            s: model.predict_proba([part(row["input"]) for row in rows[s]])[:, order] for s in ("val", "test")
        }
    name, chances = frozen_base(resolve_model(options.base), rows)
    order = [list(chances["classes"]).index(label) for label in names]
    systems[name] = {split: chances[split][:, order] for split in ("val", "test")}
    for folder in options.classifiers:
        model, tokenizer = load_classifier(resolve_model(folder), "auto", len(names))
        texts = {split: [row["input"] for row in rows[split]] for split in ("val", "test")}
        systems[f"fine-tuned: {Path(folder).name}"] = {
            split: logits_of(model, tokenizer, part).softmax(-1).tolist() for split, part in texts.items()
        }

    lines = []
    for split in ("val", "test"):
        questions = [styles.question_key(row["input"]) for row in rows[split]]
        figures = {
            name: style_metrics.evaluate(names, [row["label"] for row in rows[split]], chances[split], questions)
            for name, chances in systems.items()
        }
        tfidf = figures["TF-IDF, answer alone"]["correct"]
        table = []
        for name, found in figures.items():
            difference = bootstrap_difference(tfidf, questions, found["correct"], questions)
            cells = [
                interval([found[key][part] for part in ("mean", "low", "high")])
                for key in ("accuracy", "f1_macro", "pairs")
            ]
            table.append([name, *cells, interval(difference, sign=True)])
        header = [
            f"{split}: {len(questions)} rows, {len(set(questions))} questions",
            "accuracy",
            "macro-F1",
            f"pairs ({figures[name]['pairs']['count']})",
            "accuracy minus TF-IDF's (answer alone)",
        ]
        lines += [markdown_table(header, table), ""]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    print(f"written to {show_path(options.output)}")


if __name__ == "__main__":
    main()
