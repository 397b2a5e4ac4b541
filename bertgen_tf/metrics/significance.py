"""Bootstrap intervals of metrics, and comparisons of systems.

Koehn 2004, "Statistical significance tests for machine translation evaluation".
"""

import dataclasses

import numpy as np

from bertgen_tf.checks import check_integer
from bertgen_tf.metrics.scores import MetricResult


@dataclasses.dataclass(frozen=True)
class Interval:
    """From `low` to `high`, percent."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A system against a baseline: the difference, its interval, and how likely it is by chance.

    Attributes:
        baseline: percent, of the baseline.
        difference: percent, positive where the system is better.
        interval: of the difference.
        p_value: two-sided, of a difference at least this large if both were equally good.
    """

    baseline: float
    difference: float
    interval: Interval
    p_value: float


def bootstrap(
    results: dict[str, MetricResult],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Confidence intervals: percentiles of the values over resampled examples.

    Args:
        results: of `compute`, all over the same examples.
        resamples: how many times as many examples are drawn, with replacement.
        confidence: the share of resamples whose values lie in the interval.
        seed: of the draws.

    Returns:
        the intervals by the names of `results`.
    """
    values = _resample([results], resamples, seed)[0]
    tail = _tail(confidence)
    return {name: _interval(values[:, i], tail) for i, name in enumerate(results)}


def paired_bootstrap(
    results: dict[str, MetricResult],
    baseline: dict[str, MetricResult],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Compares two systems on the same examples by paired bootstrap resampling (Koehn 2004).

    The p-value is the share of resamples whose difference is at least as far from the mean of all
    as the observed difference is from 0; sacrebleu counts one side, so its p-value is about half.

    Args:
        results: of `compute`, for the system.
        baseline: the same metrics over the same examples, for the other system.
        resamples: how many times as many examples are drawn, with replacement, the same for both.
        confidence: the share of resamples whose differences lie in the interval.
        seed: of the draws.

    Returns:
        the comparisons by the names of `results`.
    """
    if list(results) != list(baseline):
        raise ValueError(
            f"baseline must have the metrics {', '.join(results)}, received {', '.join(baseline)}"
        )
    ours, theirs = _resample([results, baseline], resamples, seed)
    tail = _tail(confidence)
    comparisons = {}
    for i, name in enumerate(results):
        differences = ours[:, i] - theirs[:, i]
        difference = results[name].value - baseline[name].value
        # Under the null hypothesis, differences scatter around 0.
        more = np.sum(np.abs(differences - differences.mean()) >= abs(difference))
        comparisons[name] = Comparison(
            baseline[name].value,
            difference,
            _interval(differences, tail),
            float((more + 1) / (resamples + 1)),
        )
    return comparisons


def _resample(
    systems: list[dict[str, MetricResult]], resamples: int, seed: int
) -> list[np.ndarray]:
    """The values [resamples, metrics] of each system over the same draws."""
    check_integer("resamples", resamples)
    counts = {len(result.statistics) for results in systems for result in results.values()}
    if len(counts) != 1:
        raise ValueError(
            "results must be of the same number of examples, received "
            f"{', '.join(map(str, sorted(counts))) or 'none'}"
        )
    count = counts.pop()
    rng = np.random.default_rng(seed)
    values = [np.empty((resamples, len(results))) for results in systems]
    # One matrix product gives the sums of all metrics of a system.
    statistics = [
        np.concatenate([result.statistics for result in results.values()], axis=1)
        for results in systems
    ]
    for sample in range(resamples):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count).astype(float)
        for results, rows, system in zip(systems, statistics, values, strict=True):
            sums, start = drawn @ rows, 0
            for column, result in enumerate(results.values()):
                end = start + result.statistics.shape[1]
                system[sample, column] = result.combine(sums[start:end], count)
                start = end
    return values


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, received {confidence}")
    return 50 * (1 - confidence)


def _interval(values: np.ndarray, tail: float) -> Interval:
    return Interval(*map(float, np.percentile(values, [tail, 100 - tail])))
