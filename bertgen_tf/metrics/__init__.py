"""Scores of generated texts, their significance, and plots of them."""

from bertgen_tf.metrics.scores import (
    GROUPS,
    METRICS,
    ROUGE_TOKENIZERS,
    TOKENIZERS,
    MetricResult,
    bleu,
    chrf,
    compute,
    exact_match,
    expand,
    rouge,
    sari,
    subset,
)

__all__ = [
    "GROUPS",
    "METRICS",
    "ROUGE_TOKENIZERS",
    "TOKENIZERS",
    "MetricResult",
    "bleu",
    "chrf",
    "compute",
    "exact_match",
    "expand",
    "rouge",
    "sari",
    "subset",
]
