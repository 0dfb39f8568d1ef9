"""What a model must beat to have learnt more than the surface: length alone, a bag of characters, TF-IDF.

The baselines of pairs see the two answers and never the prompt. They are fitted as a reward model is (Bradley and Terry
1952): a linear score per text, trained so that sigmoid(score of chosen - score of rejected) is likely. Pairs that such
a score tells apart are separable by their surface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from common.settings import UserError

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

Pair = tuple[str, str]  # (chosen, rejected)


def length_baseline(train_pairs: Sequence[Pair], val_pairs: Sequence[Pair]) -> list[float]:
    """Margin of each validation pair, in logits, by the number of characters alone.

    The score is a * length + b * log(1 + length): longer is better, shorter is better, or best at some length,
    whichever fits the training pairs. Answers of one length have a margin of exactly 0. Raises UserError without
    training pairs.
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    def features(texts: list[str]):  # [texts, 2]
        lengths = np.array([len(text) for text in texts], dtype=np.float64)
        return csr_matrix(np.stack([lengths / 100, np.log1p(lengths)], axis=1))

    return _margins(features, train_pairs, val_pairs, C=1000)  # two features: nothing to hold back


def bag_of_characters_baseline(train_pairs: Sequence[Pair], val_pairs: Sequence[Pair]) -> list[float]:
    """Margin of each validation pair, in logits, by how often each character stands in the answers, punctuation
    included.

    Answers of the same characters in another order have a margin of exactly 0. Raises UserError without training pairs.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(analyzer=list, lowercase=False)
    vectorizer.fit([text for pair in train_pairs for text in pair] or ["-"])
    return _margins(vectorizer.transform, train_pairs, val_pairs, C=1)


def correctness(margins: Sequence[float]) -> list[float]:
    """1 where the chosen answer has the higher score, 0 where the rejected one has, 0.5 where they are equal: a
    guess."""
    return [0.5 if margin == 0 else float(margin > 0) for margin in margins]


def tfidf_classifier(texts: Sequence[str], labels: Sequence[str]) -> Pipeline:
    """A fitted scikit-learn pipeline, TF-IDF of one to three characters + logistic regression: predict, predict_proba,
    classes_.

    Classes weigh the same, however rare. Raises UserError where the texts have fewer than two labels.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if len(set(labels)) < 2:
        raise UserError(f"a classifier needs two classes, the {len(texts)} training texts have {len(set(labels))}")
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False, sublinear_tf=True)
    return make_pipeline(vectorizer, LogisticRegression(class_weight="balanced", C=10, max_iter=1000)).fit(
        texts, labels
    )


def _margins(features: Callable, train_pairs: Sequence[Pair], val_pairs: Sequence[Pair], C: float) -> list[float]:
    """features: texts -> sparse matrix [texts, features]; C: scikit-learn's inverse of the regularisation."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    def differences(pairs: Sequence[Pair]):  # [pairs, features], chosen - rejected
        chosen, rejected = zip(*pairs, strict=True)
        return features(list(chosen)) - features(list(rejected))

    if not train_pairs:
        raise UserError("a baseline needs training pairs; fix: name the file of them with --train-file")
    if not val_pairs:
        return []
    train = differences(train_pairs)
    # Each pair from both sides: the two classes are balanced, and no intercept is wanted.
    model = LogisticRegression(fit_intercept=False, C=C, max_iter=1000)
    model.fit(vstack([train, -train]), [1] * len(train_pairs) + [0] * len(train_pairs))
    return model.decision_function(differences(val_pairs)).tolist()
