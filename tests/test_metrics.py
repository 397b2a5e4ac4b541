"""Metrics against sacrebleu, rouge-score, tensor2tensor's published numbers and counts by hand."""

import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgen_tf import metrics

sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra metrics")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the extra metrics")

SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]
words = st.lists(st.sampled_from("a b c d A B .".split()), min_size=1, max_size=9).map(" ".join)
examples = st.lists(
    st.tuples(words, words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=7
)


def corpus(
    n: int, seed: int, noise: float = 0.4, system: int = 0
) -> tuple[list[str], list[str], list[str]]:
    """Sources, predictions and references that are alike but for the noise of a system."""
    draw, of_system = random.Random(seed), random.Random(1000 * seed + system)
    vocabulary = [f"w{i}" for i in range(50)]

    def change(text: list[str], share: float, draw: random.Random) -> str:
        return " ".join(draw.choice(vocabulary) if draw.random() < share else w for w in text)

    sources, predictions, references = [], [], []
    for _ in range(n):
        text = draw.choices(vocabulary, k=draw.randint(5, 20))
        sources.append(" ".join(text))
        references.append(change(text, 0.1, draw))
        predictions.append(change(text, noise * of_system.random(), of_system))
    return sources, predictions, references


# ------------------------------------------------------------------------------------------ SARI


@pytest.mark.parametrize(
    ("prediction", "published"),
    # In tensor2tensor's sari_hook_test.py.
    [
        ("About 95 you now get in .", 0.2695360),
        ("About 95 species are now agreed .", 0.6170966),
        ("About 95 species are currently agreed .", 0.5088682),
    ],
)
@pytest.mark.parametrize("tokenize", ["none", "13a"])
def test_sari_has_tensor2tensors_published_values(prediction, published, tokenize):
    result = metrics.sari([SOURCE], [prediction], [REFERENCES], tokenize=tokenize)
    assert round(result.value / 100, 7) == pytest.approx(published, abs=1e-7)


def test_sari_has_the_value_of_huggingfaces_documentation():
    def attached(text):
        return text.replace(" .", ".")

    result = metrics.sari(
        [attached(SOURCE)], ["About 95 you now get in."], [[*map(attached, REFERENCES)]]
    )
    assert result.value == pytest.approx(26.953601953601954)


def test_sari_of_one_word_by_hand():
    # Kept of "a b": "b", which half of the references have; "a", which all have, is gone.
    # keep: precision 0.5 / 1, recall 0.5 / 1.5; delete: precision (1 - 1) / 1; add: 0/0 = 1.
    # No n-grams of 2 words are kept or added; (a b) is deleted, right for one reference of two.
    # Above 2 words all is 0/0 = 1.
    result = metrics.sari(["a b"], ["b"], [["a b", "a"]], tokenize="none")
    # (a b): keep precision 0/0 = 1, recall 0 / 1: of the one reference with 2 words, it has it.
    keep = (2 * 0.5 * (1 / 3) / (0.5 + 1 / 3) + 0 + 1 + 1) / 4
    delete = (0 + 0 + 1 + 1) / 4
    assert result.details == pytest.approx({"keep": 100 * keep, "add": 100, "delete": 100 * delete})
    assert result.value == pytest.approx(100 * (keep + 1 + delete) / 3)


def test_beta_of_deletion():
    # Nothing is deleted of the "b" that should be: precision 0/0 = 1, recall 0.
    values = [
        metrics.sari(["a b"], ["a b"], ["a"], tokenize="none", deletion_beta=beta).details["delete"]
        for beta in (0, 1)
    ]
    assert values == [100, 50]  # of orders 1 and 2; of 3 and 4 there is nothing
    with pytest.raises(ValueError, match="deletion_beta must be at least 0, received -1"):
        metrics.sari(["a"], ["a"], ["a"], deletion_beta=-1)


@settings(max_examples=40, deadline=None)
@given(examples, st.integers(0, 2))
def test_a_reference_as_prediction_has_the_best_scores(rows, pick):
    sources, _, references = (list(side) for side in zip(*rows, strict=True))
    predictions = [texts[0] for texts in references]
    results = metrics.compute(
        ["exact", "sari", "chrf", "rouge"], sources, predictions, references, tokenize="none"
    )
    assert results["exact"].value == 100
    assert results["chrf"].value == pytest.approx(100)
    one = metrics.sari(sources, predictions, [[texts[0]] for texts in references], tokenize="none")
    assert one.value == pytest.approx(100)
    for result in results.values():
        assert 0 <= result.value <= 100 + 1e-9


@settings(max_examples=40, deadline=None)
@given(examples, st.randoms(use_true_random=False))
def test_order_of_examples_and_references_is_no_matter(rows, draw):
    shuffled = [(s, p, draw.sample(r, len(r))) for s, p, r in draw.sample(rows, len(rows))]
    values = []
    for some in (rows, shuffled):
        sides = [list(side) for side in zip(*some, strict=True)]
        # Of references that are equally good, sacrebleu's chrF counts the first, of any length.
        names = [name for name in metrics.METRICS if name != "chrf"]
        values.append([r.value for r in metrics.compute(names, *sides).values()])
    assert values[0] == pytest.approx(values[1])


# ---------------------------------------------------------------------- other people's metrics


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("tokenize", metrics.TOKENIZERS)
def test_bleu_is_sacrebleus(tokenize, lowercase):
    _, predictions, references = corpus(20, seed=3)
    predictions[0] = "W1, the (end)."
    references[0] = "w1 , the ( end ) ."
    theirs = sacrebleu.BLEU(tokenize=tokenize, lowercase=lowercase, force=True)
    result = metrics.bleu(predictions, references, tokenize=tokenize, lowercase=lowercase)
    score = theirs.corpus_score(predictions, [references])
    assert result.value == pytest.approx(score.score)
    assert result.signature == str(theirs.get_signature())
    assert result.details["precision2"] == pytest.approx(score.precisions[1])
    assert result.details["brevity_penalty"] == pytest.approx(score.bp)
    assert result.examples is None


@pytest.mark.parametrize("lowercase", [False, True])
def test_chrf_is_sacrebleus(lowercase):
    _, predictions, references = corpus(20, seed=4)
    predictions[0] = predictions[0].upper()
    theirs = sacrebleu.CHRF(lowercase=lowercase)
    result = metrics.chrf(predictions, references, lowercase=lowercase)
    assert result.value == pytest.approx(theirs.corpus_score(predictions, [references]).score)
    assert result.signature == str(theirs.get_signature())
    assert result.examples[0] == pytest.approx(
        theirs.sentence_score(predictions[0], [references[0]]).score
    )


def test_several_references_not_of_the_same_number():
    predictions = ["the cat sat", "a dog ran off"]
    references = [["a cat sat", "the cat sat down"], ["the dog ran off"]]
    streams = [["a cat sat", "the dog ran off"], ["the cat sat down", None]]
    results = metrics.compute(["exact", "bleu", "chrf", "rouge1"], None, predictions, references)
    assert results["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score)
    assert results["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(predictions, streams).score)
    # 3 of 3 and of 4 words with the better reference; then 3 of 4.
    assert results["rouge1"].examples == pytest.approx([100 * 6 / 7, 75])
    assert results["exact"].value == 0


def test_rouge_is_rouge_scores():
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    prediction = "The dogs ran home.\nA cat sat there."
    reference = "A cat sits there.\nThe dog ran to its home."
    for stemmer in (False, True):
        theirs = rouge_scorer.RougeScorer(kinds, use_stemmer=stemmer).score(reference, prediction)
        results = metrics.rouge([prediction], [reference], kinds, stemmer=stemmer)
        assert {k: r.value for k, r in results.items()} == pytest.approx(
            {k: 100 * theirs[k].fmeasure for k in kinds}
        )
    assert results["rougeL"].value != results["rougeLsum"].value


def test_exact_match_by_hand():
    predictions = ["a b", "A  b ", "c", "d"]
    references = [["x", "a b"], ["a b"], ["C"], ["d"]]
    assert metrics.exact_match(predictions, references).examples.tolist() == [100, 0, 0, 100]
    lower = metrics.exact_match(predictions, references, lowercase=True)
    assert lower.examples.tolist() == [100, 100, 100, 100]


# ------------------------------------------------------------------------------------- compute


def test_names_and_groups():
    assert metrics.expand("rouge") == ("rouge1", "rouge2", "rougeL")
    assert metrics.expand(["bleu", "rouge", "rouge2", "bleu"]) == (
        "bleu",
        "rouge1",
        "rouge2",
        "rougeL",
    )
    results = metrics.compute(["rougeL", "exact"], None, ["a"], ["a"])
    assert list(results) == ["rougeL", "exact"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["meteor"], None, ["a"], ["a"]), ValueError, "metrics must be of exact, .*'meteor'"),
        (([], None, ["a"], ["a"]), ValueError, "metrics must be some of .* received none"),
        (("exact", None, [], []), ValueError, "predictions must have at least one text"),
        (("exact", None, ["a"], ["a", "b"]), ValueError, "references must be as many .* 1, .* 2"),
        (("sari", ["a", "b"], ["a"], ["a"]), ValueError, "sources must be as many .* 1, .* 2"),
        (("sari", None, ["a"], ["a"]), ValueError, "sources must be given for sari"),
        (("exact", None, ["a", "b"], ["a", []]), ValueError, r"references must have .* \[1\]"),
        (("exact", None, "ab", ["a", "b"]), TypeError, "predictions must be a list of texts"),
        (("bleu", None, ["a", 2], ["a", "b"]), TypeError, r"predictions must be .*\[1\] is 2"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        metrics.compute(*arguments)


def test_unknown_tokenizer():
    for function in (metrics.bleu, lambda p, r, **k: metrics.sari(p, p, r, **k)):
        with pytest.raises(ValueError, match="tokenize must be one of 13a, .* received 'moses'"):
            function(["a"], ["a"], tokenize="moses")


@pytest.mark.parametrize(
    ("package", "metric", "named"),
    [("sacrebleu", "bleu", "sacrebleu"), ("rouge_score.rouge_scorer", "rouge1", "rouge-score")],
)
def test_a_missing_package_is_named(monkeypatch, package, metric, named):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"package {named}: pip install 'bertgen_tf\[metrics\]'"):
        metrics.compute(metric, None, ["a"], ["a"])
    assert metrics.compute("exact", None, ["a"], ["a"])["exact"].value == 100


# ----------------------------------------------------------------------------------- bootstrap


@settings(max_examples=25, deadline=None)
@given(examples, st.data())
def test_values_of_subsets_are_those_of_their_strings(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
    sides = [list(side) for side in zip(*rows, strict=True)]
    results = metrics.compute(metrics.METRICS, *sides)
    again = metrics.compute(metrics.METRICS, *([side[i] for i in chosen] for side in sides))
    for name, result in results.items():
        assert result.of(chosen) == pytest.approx(again[name].value), name
        if result.examples is not None and name != "chrf":
            assert result.value == pytest.approx(result.examples.mean())


def test_of_no_examples():
    result = metrics.exact_match(["a"], ["a"])
    with pytest.raises(ValueError, match="exact needs an example, received none"):
        result.of(np.array([False]))


def test_intervals_of_the_mean_and_of_bleu():
    sources, predictions, references = corpus(300, seed=5)
    results = metrics.compute(["sari", "bleu", "exact"], sources, predictions, references)
    intervals = metrics.bootstrap(results)
    # What the central limit theorem says of a mean.
    sari = results["sari"]
    half = 1.96 * sari.examples.std() / np.sqrt(300)
    assert intervals["sari"].low == pytest.approx(sari.value - half, abs=half / 8)
    assert intervals["sari"].high == pytest.approx(sari.value + half, abs=half / 8)
    theirs = sacrebleu.BLEU().corpus_score(predictions, [references], n_bootstrap=1000)
    bleu = intervals["bleu"]
    assert (bleu.high - bleu.low) / 2 == pytest.approx(theirs._ci, rel=0.1)
    assert bleu.low < results["bleu"].value < bleu.high
    assert metrics.bootstrap(results) == intervals
    assert metrics.bootstrap(results, seed=1) != intervals
    narrow = metrics.bootstrap(results, confidence=0.5)
    assert narrow["bleu"].high - narrow["bleu"].low < (bleu.high - bleu.low) / 2


def test_intervals_contain_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        right = draw.random(80) < 0.6
        predictions = ["a" if is_right else "b" for is_right in right]
        results = metrics.compute("exact", None, predictions, ["a"] * 80)
        interval = metrics.bootstrap(results, resamples=200, confidence=0.8, seed=seed)["exact"]
        hits += interval.low <= 60 <= interval.high
    assert 68 <= hits <= 92  # 80, three standard deviations of 4


def test_paired_comparison():
    sources, predictions, references = corpus(200, seed=6)
    _, worse, _ = corpus(200, seed=6, noise=0.5)
    names = ["bleu", "sari"]
    ours, theirs = (
        metrics.compute(names, sources, texts, references) for texts in (predictions, worse)
    )
    for name, found in metrics.paired_bootstrap(ours, theirs).items():
        assert found.difference == pytest.approx(ours[name].value - theirs[name].value)
        assert found.baseline == theirs[name].value
        assert 0 < found.interval.low < found.difference < found.interval.high
        assert found.p_value < 0.05
    for found in metrics.paired_bootstrap(ours, ours).values():
        assert (found.difference, found.p_value) == (0, 1)
        assert found.interval == metrics.Interval(0, 0)
    swapped = metrics.paired_bootstrap(theirs, ours)
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
    found = metrics.paired_bootstrap(ours, theirs)["bleu"]
    assert 0.01 < p_value < 0.6  # neither clear nor a draw, or the next line says little
    assert found.p_value == pytest.approx(p_value, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resamples": 0}, "resamples must be at least 1, received 0"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1, received 1.0"),
    ],
)
def test_bootstrap_errors(change, message):
    results = metrics.compute("exact", None, ["a"], ["a"])
    with pytest.raises(ValueError, match=message):
        metrics.bootstrap(results, **change)


def test_comparison_of_what_cannot_be_compared():
    one = metrics.compute("exact", None, ["a"], ["a"])
    two = metrics.compute("exact", None, ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="same number of examples, received 1, 2"):
        metrics.paired_bootstrap(one, two)
    with pytest.raises(ValueError, match="baseline must have the metrics exact, received chrf"):
        metrics.paired_bootstrap(one, metrics.compute("chrf", None, ["a"], ["a"]))
