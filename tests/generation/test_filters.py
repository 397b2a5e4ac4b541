import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf.generation.search import filters
from bertgen_tf.generation.search.logits import BANNED
from tests.helpers.logits_cases import assert_equal, golden_cases, make, run

IDS = np.zeros([3, 2], np.int32)
RNG = np.random.default_rng(3)
# Rows of which 0.9 of the mass is in a few tokens, in hundreds, in nearly all.
WIDE = (RNG.normal(size=[3, 4001]) * [[4.0], [2.0], [0.1]]).astype(np.float32)


def kept(process, scores):
    """Which tokens are not banned, bool; the others must be unchanged."""
    scores = np.asarray(scores, np.float32)
    found = run(process, scores, IDS[: len(scores)], 1)
    banned = found == BANNED
    np.testing.assert_array_equal(found[~banned], scores[~banned])
    return ~banned


def by_mass(order, scores, p):
    """The tokens, first in `order` first, whose probabilities reach `p`."""
    probs = np.exp(np.float64(scores))
    probs /= probs.sum()
    places = np.argsort(order, kind="stable")
    before = np.cumsum(probs[places]) - probs[places]
    return np.isin(np.arange(len(scores)), places[before < p])


def typicality(scores):
    probs = np.exp(np.float64(scores))
    probs /= probs.sum()
    return np.abs(np.log(probs) - (probs * np.log(probs)).sum())


# The larger cases of transformers are in test_logits.py. Here the vocabulary counts as large.
@pytest.mark.parametrize("few", [1, 2, 6])
def test_large_vocabulary_equals_transformers(few, monkeypatch):
    """Golden file: tools/fixtures/make_logits_golden.py."""
    monkeypatch.setattr(filters, "_FEW", few)
    cases = [case for case in golden_cases() if case[0][-1][0] in ("top_p", "typical_p")]
    assert len(cases) >= 12
    for processors, length, ids, scores, expected in cases:
        found = run(make(processors), np.maximum(scores, BANNED), ids, length - 1)
        assert_equal(found, expected, str(processors))


@pytest.mark.parametrize("known", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize("factory", [filters.top_p, filters.typical_p])
def test_mass_of_a_large_vocabulary(factory, jit_compile, known):
    """A row must not depend on the others, of which some need a search through all tokens."""
    p = 0.9
    function = tf.function(
        lambda scores: factory(p)(scores, None, None),
        jit_compile=jit_compile,
        autograph=False,
        input_signature=[tf.TensorSpec([None, WIDE.shape[1] if known else None])],
    )
    expected = np.stack(
        [by_mass(-row if factory is filters.top_p else typicality(row), row, p) for row in WIDE]
    )
    counts = expected.sum(axis=1)
    assert counts[0] < filters._FEW < counts[1] < counts[2]
    for rows in ([0, 1, 2], [2], [0], [0, 0]):
        found = function(WIDE[rows]).numpy()
        # Rounding may decide otherwise about the last token.
        difference = (found != BANNED) != expected[rows]
        assert difference.sum(axis=1).max() <= 1, difference.sum(axis=1)
        assert not difference[np.array(rows) == 0].any()
        np.testing.assert_array_equal(found, function(WIDE).numpy()[rows])


def test_temperature_by_hand():
    scores = np.array([[-3.0, 0.0, BANNED, 8.0, -np.inf]], np.float32)
    for t in (0.5, 2, 100.0, 1e-4):
        found = run(filters.temperature(t), scores, IDS[:1], 1)
        np.testing.assert_allclose(found, [[-3.0 / t, 0.0, BANNED, 8.0 / t, BANNED]], rtol=1e-6)


def test_top_k_by_hand():
    scores = [[1.0, 5.0, 3.0, 3.0, 4.0], [5.0, 4.0, 3.0, 2.0, 1.0]]
    for k, least, expected in [
        (1, 1, [[1], [0]]),
        (2, 1, [[1, 4], [0, 1]]),
        (3, 1, [[1, 2, 3, 4], [0, 1, 2]]),  # a tie
        (1, 2, [[1, 4], [0, 1]]),
        (5, 1, [range(5)] * 2),
        (99, 1, [range(5)] * 2),
        (0, 1, [range(5)] * 2),
        (0, 2, [range(5)] * 2),
    ]:
        found = [np.flatnonzero(row) for row in kept(filters.top_k(k, least), scores)]
        assert list(map(list, found)) == list(map(list, expected)), k


LOG = np.log(np.array([[0.1, 0.4, 0.05, 0.25, 0.2]]))


@pytest.mark.parametrize(
    ("p", "least", "expected"),
    [
        (0.01, 1, [1]),
        (0.39, 1, [1]),
        (0.41, 1, [1, 3]),
        (0.66, 1, [1, 3, 4]),
        (0.96, 1, [0, 1, 2, 3, 4]),
        (1.0, 1, [0, 1, 2, 3, 4]),
        (0.01, 3, [1, 3, 4]),
        (0.01, 9, [0, 1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("few", [1, 512])
def test_top_p_by_hand(p, least, expected, few, monkeypatch):
    monkeypatch.setattr(filters, "_FEW", few)
    np.testing.assert_array_equal(np.flatnonzero(kept(filters.top_p(p, least), LOG)), expected)


@pytest.mark.parametrize(
    ("p", "least", "expected"),
    [
        (0.9, 1, [1]),
        (0.6, 1, [1, 3]),
        (0.49, 1, [1, 3, 4]),
        (0.0, 1, [0, 1, 2, 3, 4]),
        (1.0, 1, [1]),
        (0.9, 3, [1, 3, 4]),
        (0.9, 9, [0, 1, 2, 3, 4]),
    ],
)
def test_min_p_by_hand(p, least, expected):
    np.testing.assert_array_equal(np.flatnonzero(kept(filters.min_p(p, least), LOG)), expected)


def test_typical_p_by_hand():
    """Entropy 1.415: surprises 2.303, 0.916, 2.996, 1.386, 1.609; nearest first 3, 4, 1, 0, 2."""
    for p, least, expected in [
        (0.2, 1, [3]),
        (0.26, 1, [3, 4]),
        (0.5, 1, [1, 3, 4]),
        (0.9, 1, [0, 1, 3, 4]),
        (1.0, 1, [0, 1, 2, 3, 4]),
        (0.2, 2, [3, 4]),
        (0.2, 9, [0, 1, 2, 3, 4]),
    ]:
        found = kept(filters.typical_p(p, least), LOG)
        np.testing.assert_array_equal(np.flatnonzero(found), expected)


def test_minus_infinity_is_no_typical_token():
    scores = np.concatenate([LOG, [[-np.inf]]], axis=1).astype(np.float32)
    found = run(filters.typical_p(0.5), scores, IDS[:1], 1)
    np.testing.assert_array_equal(np.flatnonzero(found > BANNED), [1, 3, 4])


def test_neighbouring_floats_are_told_apart(monkeypatch):
    monkeypatch.setattr(filters, "_FEW", 1)
    for first in (1.0, 1e-30, -1.0, -1e4):
        scores = [np.float32(first)]
        while len(scores) < 9:
            scores.append(np.nextafter(scores[-1], np.float32(np.inf)))
        found = kept(filters.top_p(0.5), [[*scores, BANNED]])  # the widest search
        np.testing.assert_array_equal(np.flatnonzero(found), [4, 5, 6, 7, 8])


def test_equal_scores_stay_together():
    scores = [[2.0] * 3 + [1.0] * 4, [-0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0]]
    for process in (filters.top_k(1), filters.top_p(0.1), filters.min_p(1.0)):
        np.testing.assert_array_equal(kept(process, scores), [[True] * 3 + [False] * 4] * 2)
    assert kept(filters.typical_p(0.1), np.zeros([2, 5])).all()


@pytest.mark.parametrize("few", [1, 512])
def test_where_little_is_left(few, monkeypatch):
    """One token, or none at all: no NaN, and what is banned stays so."""
    monkeypatch.setattr(filters, "_FEW", few)
    for banned in (BANNED, -np.inf):
        scores = np.full([2, 6], banned, np.float32)
        scores[0, 4] = -1.0
        for name, value in [("top_k", 3), ("top_p", 0.9), ("min_p", 0.3), ("typical_p", 0.9)]:
            found = run(getattr(filters, name)(value, 2), scores, IDS[:2], 1)
            expected = np.where(scores == -1.0, scores, -np.inf)
            assert_equal(found, expected, name)
            assert not np.isnan(found).any()


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("temperature", (0.0,), ValueError, "temperature must be .* 0.0: .* do not sample"),
        ("temperature", (-1.0,), ValueError, "temperature must be a finite number of at least"),
        ("temperature", (1e-5,), ValueError, "temperature must be"),
        ("temperature", (np.inf,), ValueError, "temperature must be"),
        ("temperature", (np.nan,), ValueError, "temperature must be a number"),
        ("temperature", ("1",), ValueError, "temperature must be a number, received '1'"),
        (
            "top_k",
            (-1,),
            ValueError,
            "top_k must be an integer of at least 0, received -1: pass 0 to keep all",
        ),
        ("top_k", (2.5,), ValueError, "top_k must be an integer of at least 0, received 2.5"),
        ("top_p", (0.0,), ValueError, "top_p must be above 0 and at most 1, received 0.0"),
        ("top_p", (1.1,), ValueError, "top_p must be above 0"),
        ("typical_p", (0.0,), ValueError, "typical_p must be above 0"),
        ("typical_p", (np.nan,), ValueError, "typical_p must be a number"),
        ("min_p", (-0.1,), ValueError, "min_p must be between 0 and 1, received -0.1"),
        ("min_p", (1.1,), ValueError, "min_p must be between 0 and 1"),
        (
            "top_p",
            (0.5, 0),
            ValueError,
            "min_tokens_to_keep must be an integer of at least 1, received 0",
        ),
        ("top_k", (5, 0), ValueError, "min_tokens_to_keep must be an integer of at least 1"),
        ("min_p", (0.5, 1.5), ValueError, "min_tokens_to_keep must be an integer"),
        ("typical_p", (0.5, 0), ValueError, "min_tokens_to_keep must be an integer of at least 1"),
    ],
)
def test_errors_name_the_argument(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(filters, name)(*arguments)
