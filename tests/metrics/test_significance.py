"""Intervals and p-values against sacrebleu's and the central limit theorem."""

import numpy as np
import pytest

from bertgen_tf import metrics
from bertgen_tf.metrics import significance
from tests.metrics.test_metrics import corpus

sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra metrics")


def test_intervals_of_the_mean_and_of_bleu():
    sources, predictions, references = corpus(300, seed=5)
    results = metrics.compute(["sari", "bleu", "exact"], sources, predictions, references)
    intervals = significance.bootstrap(results)
    # What the central limit theorem says of a mean.
    sari = results["sari"]
    half = 1.96 * sari.examples.std() / np.sqrt(300)
    assert intervals["sari"].low == pytest.approx(sari.value - half, abs=half / 8)
    assert intervals["sari"].high == pytest.approx(sari.value + half, abs=half / 8)
    theirs = sacrebleu.BLEU().corpus_score(predictions, [references], n_bootstrap=1000)
    bleu = intervals["bleu"]
    assert (bleu.high - bleu.low) / 2 == pytest.approx(theirs._ci, rel=0.1)
    assert bleu.low < results["bleu"].value < bleu.high
    assert significance.bootstrap(results) == intervals
    assert significance.bootstrap(results, seed=1) != intervals
    narrow = significance.bootstrap(results, confidence=0.5)
    assert narrow["bleu"].high - narrow["bleu"].low < (bleu.high - bleu.low) / 2


def test_intervals_contain_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        right = draw.random(80) < 0.6
        predictions = ["a" if is_right else "b" for is_right in right]
        results = metrics.compute("exact", None, predictions, ["a"] * 80)
        interval = significance.bootstrap(results, resamples=200, confidence=0.8, seed=seed)[
            "exact"
        ]
        hits += interval.low <= 60 <= interval.high
    assert 68 <= hits <= 92  # 80, three standard deviations of 4


def test_paired_comparison():
    sources, predictions, references = corpus(200, seed=6)
    _, worse, _ = corpus(200, seed=6, noise=0.5)
    names = ["bleu", "sari"]
    ours, theirs = (
        metrics.compute(names, sources, texts, references) for texts in (predictions, worse)
    )
    for name, found in significance.paired_bootstrap(ours, theirs).items():
        assert found.difference == pytest.approx(ours[name].value - theirs[name].value)
        assert found.baseline == theirs[name].value
        assert 0 < found.interval.low < found.difference < found.interval.high
        assert found.p_value < 0.05
    for found in significance.paired_bootstrap(ours, ours).values():
        assert (found.difference, found.p_value) == (0, 1)
        assert found.interval == significance.Interval(0, 0)
    swapped = significance.paired_bootstrap(theirs, ours)
    assert swapped["bleu"].interval.high < 0


def test_a_p_value_is_that_of_sacrebleus_approximate_randomisation():
    from sacrebleu.significance import PairedTest

    _, predictions, references = corpus(300, seed=7)
    _, other, _ = corpus(300, seed=7, noise=0.43, system=1)
    ours, theirs = (
        metrics.compute(["bleu"], None, texts, references) for texts in (predictions, other)
    )
    test = PairedTest(
        [("base", other), ("system", predictions)],
        {"BLEU": sacrebleu.BLEU(references=[references])},
        references=None,
        test_type="ar",
        n_samples=1000,
    )
    p_value = test()[1]["BLEU"][1].p_value
    found = significance.paired_bootstrap(ours, theirs)["bleu"]
    assert 0.01 < p_value < 0.6  # neither clear nor a draw, or the next line says little
    assert found.p_value == pytest.approx(p_value, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resamples": 0}, "resamples must be an integer of at least 1, received 0"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1, received 1.0"),
    ],
)
def test_bootstrap_errors(change, message):
    results = metrics.compute("exact", None, ["a"], ["a"])
    with pytest.raises(ValueError, match=message):
        significance.bootstrap(results, **change)


def test_comparison_of_what_cannot_be_compared():
    one = metrics.compute("exact", None, ["a"], ["a"])
    two = metrics.compute("exact", None, ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="same number of examples, received 1, 2"):
        significance.paired_bootstrap(one, two)
    with pytest.raises(ValueError, match="baseline must have the metrics exact, received chrf"):
        significance.paired_bootstrap(one, metrics.compute("chrf", None, ["a"], ["a"]))
