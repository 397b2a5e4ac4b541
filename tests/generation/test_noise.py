import itertools

import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf.generation.search import noise
from tests.helpers.tables import assert_drawn_from

FORMS = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function, autograph=False),
    "xla": lambda function: tf.function(function, jit_compile=True, autograph=False),
}


def seeds_of(rows, seed=5):
    """Every row is another example."""
    return tf.stack([tf.fill([rows], seed), tf.range(rows), tf.zeros([rows], tf.int32)], axis=1)


@pytest.mark.parametrize("form", FORMS)
def test_philox_known_answers(form):
    """Random123's own test vectors for philox4x32-10 (kat_vectors)."""
    counters = [
        [0, 0, 0, 0],
        [0xFFFFFFFF] * 4,
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
    ]
    keys = [[0, 0], [0xFFFFFFFF] * 2, [0xA4093822, 0x299F31D0]]
    answers = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    counters, keys = tf.constant(counters, tf.uint64), tf.constant(keys, tf.uint64)
    function = FORMS[form](
        lambda counters, keys: noise.philox(tf.unstack(counters, axis=1), tf.unstack(keys, axis=1))
    )
    np.testing.assert_array_equal(np.stack(function(counters, keys), axis=1), answers)


def test_gumbel_is_gumbel_and_the_same_in_all_forms():
    places = tf.range(5000)[tf.newaxis]
    seeds = tf.constant([[-7, 0, 1], [2**31 - 1, 3, 0], [-7, 0, 2]])

    def values(places, seeds, step):
        return noise.gumbel(places, seeds, step, 1)

    step = tf.constant(3)
    eager = values(places, seeds, step).numpy()
    assert eager.shape == (3, 20_000) and np.isfinite(eager).all()
    for make in FORMS.values():
        np.testing.assert_allclose(make(values)(places, seeds, step), eager, rtol=1e-5, atol=1e-6)
    uniform = np.exp(-np.exp(-eager.astype(np.float64)))
    for row in uniform:
        assert_drawn_from(np.histogram(row, 50, (0, 1))[0], np.full(50, 1 / 50))
    # Rows, steps, streams and places are independent of each other.
    others = [eager[0, ::-1], eager[1], eager[2], values(places, seeds, 4)[0].numpy()]
    others += [noise.gumbel(places, seeds, step, 0)[0].numpy(), np.roll(eager[0], 1)]
    for other in others:
        assert abs(np.corrcoef(eager[0], other)[0, 1]) < 4 / 20_000**0.5


def ordered_draws(probabilities, count):
    """{places: probability} of draws without replacement, by enumeration."""
    draws = {}
    for places in itertools.permutations(range(len(probabilities)), count):
        left, probability = 1.0, 1.0
        for place in places:
            probability *= probabilities[place] / left
            left -= probabilities[place]
        draws[places] = probability
    return draws


@pytest.mark.parametrize("count", [1, 2, 3])
def test_draws_without_replacement(count):
    """20,000 draws among places of three blocks, several of them in one block."""
    places = np.array([3, 4, 250, 256, 300, 599])
    probabilities = np.array([0.35, 0.05, 0.1, 0.3, 0.15, 0.05])
    log_weights = np.full([600], -1e7, np.float32)
    log_weights[places] = np.log(probabilities) - 400.0
    counts = dict.fromkeys(itertools.permutations(range(6), count), 0)
    draw = tf.function(noise.draw, autograph=False)
    for step in range(4):
        rows = 5000
        drawn = draw(tf.tile(log_weights[np.newaxis], [rows, 1]), count, seeds_of(rows), step)
        assert np.isin(drawn, places).all()
        for key in np.searchsorted(places, drawn).tolist():
            counts[tuple(key)] += 1
    expected = ordered_draws(probabilities, count)
    assert_drawn_from([counts[key] for key in expected], list(expected.values()))


def test_draws_of_a_row_depend_on_its_seeds_and_step_only():
    rng = np.random.default_rng(2)
    log_weights = rng.normal(size=[4, 700]).astype(np.float32)
    seeds = np.array([[1, 5, 0], [1, 6, 0], [1, 5, 1], [2, 5, 0]])
    together = noise.draw(log_weights, 3, seeds, 9).numpy()
    order = [2, 0, 3]
    np.testing.assert_array_equal(
        noise.draw(log_weights[order], 3, seeds[order], 9), together[order]
    )
    for row in range(4):
        alone = noise.draw(log_weights[row : row + 1], 3, seeds[row : row + 1], 9)
        np.testing.assert_array_equal(alone[0], together[row])
    # With the same weights, each seed, example, number and step draws something else.
    same = np.tile(log_weights[:1], [4, 1])
    drawn = [tuple(row) for step in (9, 10) for row in noise.draw(same, 3, seeds, step).numpy()]
    assert len(set(drawn)) == 8


@pytest.mark.parametrize("size", [None, 5000])
@pytest.mark.parametrize("form", FORMS)
def test_draws_are_the_same_in_all_forms(form, size):
    rng = np.random.default_rng(3)
    log_weights = rng.normal(scale=2.0, size=[40, 5000]).astype(np.float32)
    seeds, step = seeds_of(40), tf.constant(1)
    function = FORMS[form](lambda log_weights, seeds, step: noise.draw(log_weights, 8, seeds, step))
    if form != "eager":
        rows = None if size is None else 40
        function = function.get_concrete_function(
            tf.TensorSpec([rows, size]),
            tf.TensorSpec([rows, 3], tf.int32),
            tf.TensorSpec([], "int32"),
        )
    drawn = function(tf.constant(log_weights), seeds, step)
    np.testing.assert_array_equal(drawn, noise.draw(log_weights, 8, seeds, step))
    assert all(len(set(row)) == 8 for row in drawn.numpy().tolist())


def test_more_draws_than_places():
    log_weights = tf.constant([[0.0, -1e7, 1.0, -3e7, -0.5]])
    drawn = noise.draw(log_weights, 7, seeds_of(1), 0).numpy()[0]
    assert set(drawn[:3]) == {0, 2, 4}
    assert drawn[3:5].tolist() == [1, 3] and (drawn[5:] >= 5).all()
    assert len(set(noise.draw(log_weights, 300, seeds_of(1), 0).numpy()[0])) == 300
