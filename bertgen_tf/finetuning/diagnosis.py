"""What a training did not learn, in words: outputs that say nothing, scores as good as chance."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bertgen_tf import metrics as scores
from bertgen_tf.finetuning.data import TrainingData
from bertgen_tf.metrics import significance

# Fewer cannot tell a score from chance.
_LEAST = 5
_SURE = 0.05


def find_problem(
    training: TrainingData,
    held_out: TrainingData,
    results: Mapping[str, float],
    monitor: str,
    *,
    label_smoothing: float = 0.0,
    samples: Sequence[Mapping[str, str]] = (),
    **options: Any,
) -> str | None:
    """What is wrong with the model that a training saved.

    Args:
        training, held_out: the data.
        results: its "loss" and "accuracy" on `held_out`.
        monitor: the number to compare with chance: one of these, or a metric of the samples.
        label_smoothing: of the loss.
        samples: what it generated: "source", "output" and "reference" of each text.
        **options: of `bertgen_tf.metrics.compute`.

    Returns:
        a sentence without its end, or None.
    """
    texts = [[sample[name] for sample in samples] for name in ("source", "output", "reference")]
    problem = outputs_problem(*texts)
    if problem is not None:
        return problem
    if monitor not in results:
        if score_is_chance(monitor, *texts, **options):
            return f"by {monitor}, the outputs fit the texts of others as well as their own"
        return None
    loss, accuracy = chance_of_tokens(training, held_out, label_smoothing)
    value, chance = results[monitor], {"loss": loss, "accuracy": accuracy}[monitor]
    if (chance - value if monitor == "loss" else value - chance) > 0:
        return None
    return f"{monitor} {value:.4f} on the pairs to validate on is that of a guess ({chance:.4f})"


def outputs_problem(
    sources: Sequence[str], outputs: Sequence[str], references: Sequence[str]
) -> str | None:
    """What most outputs are, if they are empty, mere repetition, or all the same text.

    Args:
        sources, outputs, references: [N]. References that are as short, or the same, are no fault.

    Returns:
        such as "7 of 9 outputs are empty", or None.
    """
    total = len(outputs)
    if not total:
        return None
    empty = sum(not o.strip() and bool(r.strip()) for o, r in zip(outputs, references, strict=True))
    repeating = sum(repeats(o) and not repeats(r) for o, r in zip(outputs, references, strict=True))
    if 2 * (empty + repeating) > total:
        parts = [(empty, "empty"), (repeating, "mere repetition")]
        words = " or ".join(word for count, word in parts if count)
        return f"{empty + repeating:,} of {total:,} outputs are {words}"
    # The same source may well have the same output.
    different = dict(zip(sources, zip(outputs, references, strict=True), strict=True)).values()
    same, same_references = (
        max(collections.Counter(texts).values(), default=0)
        for texts in zip(*different, strict=True)
    )
    if len(different) >= _LEAST and 2 * same > len(different) >= 2 * same_references:
        return f"{same:,} of {len(different):,} outputs are the same text"
    return None


def repeats(text: str) -> bool:
    """Whether a text says the same words, or without spaces letters, over and over."""
    words = text.split()
    if len(words) > 3:
        return len(words) >= 6 and 3 * len(set(words)) <= len(words)
    # Perhaps of a language without spaces: pairs of letters differ as words do.
    letters = "".join(words)
    pairs = {*zip(letters, letters[1:], strict=False)}
    return len(letters) >= 9 and 3 * len(pairs) <= len(letters)


def score_is_chance(
    metric: str,
    sources: Sequence[str],
    outputs: Sequence[str],
    references: Sequence[str],
    **options: Any,
) -> bool:
    """Whether the outputs fit their own references no better than those of other sources do.

    Args:
        metric: of `bertgen_tf.metrics`.
        sources, outputs, references: [N].
        **options: of `bertgen_tf.metrics.compute`.
    """
    if len(set(references)) < _LEAST:
        return False
    others = [*outputs[1:], outputs[0]]
    own, chance = (
        scores.compute([metric], sources, texts, references, **options)
        for texts in (outputs, others)
    )
    found = significance.paired_bootstrap(own, chance)[metric]
    return found.difference <= 0 or found.p_value > _SURE


def chance_of_tokens(
    training: TrainingData, held_out: TrainingData, label_smoothing: float = 0.0
) -> tuple[float, float]:
    """Loss and accuracy of guessing by how often each token occurs in the targets to train on.

    Args:
        training, held_out: of the same preprocessor.
        label_smoothing: of the loss.

    Returns:
        the loss a token, and the share of tokens that are right, on `held_out`.
    """
    counts, labels = training.target_counts(), held_out.target_counts()
    log_p = np.log(counts + 1) - np.log(counts.sum() + len(counts))
    loss = -(labels * log_p).sum() / labels.sum()
    loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean()
    return float(loss), float(labels[counts.argmax()] / labels.sum())
