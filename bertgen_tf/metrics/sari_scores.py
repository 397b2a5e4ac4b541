"""SARI of one sentence, as tensor2tensor's `sari_hook` defines it; see `metrics.sari`."""

import numpy as np

MAX_ORDER = 4  # the longest n-grams


def sari_scores(
    source: list[str], prediction: list[str], references: list[list[str]], deletion_beta: float
) -> tuple[float, float, float]:
    """The F scores of what is kept, added and deleted.

    Args:
        source: its words.
        prediction: its words.
        references: the words of each.
        deletion_beta: of the F score of deletions; 0 for their precision.

    Returns:
        three numbers from 0 to 1.
    """
    sums = np.zeros(3)
    for order in range(1, MAX_ORDER + 1):
        old, new = _ngrams(source, order), _ngrams(prediction, order)
        right = [grams for grams in (_ngrams(words, order) for words in references) if grams]
        # The share of references that have an n-gram.
        share: dict[tuple[str, ...], float] = {}
        for gram in set().union(*right):
            share[gram] = sum(gram in grams for grams in right) / len(right)
        kept, added, deleted = old & new, new - old, old - new
        shares = {gram: share.get(gram, 0.0) for gram in old}
        sums += (
            _f_score(sum(shares[g] for g in kept), len(kept), sum(shares.values())),
            _f_score(len(added & share.keys()), len(added), len(share.keys() - old)),
            _f_score(
                sum(1 - shares[g] for g in deleted),
                len(deleted),
                sum(1 - part for part in shares.values()),
                deletion_beta,
            ),
        )
    return tuple(sums / MAX_ORDER)


def _ngrams(words: list[str], order: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[start:] for start in range(order)), strict=False))


def _f_score(correct: float, selected: float, relevant: float, beta: float = 1.0) -> float:
    precision = correct / selected if selected else 1.0
    recall = correct / relevant if relevant else 1.0
    if beta == 0:
        return precision
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
