"""Comparisons with what transformers computed."""

import numpy as np

import bertgen_tf as bg
from bertgen_tf.network.weights import named_variables
from tests.helpers import make_deep_model


def assert_close(ours, expected, mask=None):
    """Within 1e-5 of the size of the values."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    if mask is not None:
        ours, expected = ours[mask == 1], expected[mask == 1]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def assert_same_model(one, two):
    """The same settings, vocabulary, sharing and weights, bit for bit."""
    configs = [{**model.get_config(), "source_checkpoint": None} for model in (one, two)]
    assert configs[0] == configs[1]  # but for the folder that they were read from
    ours, theirs = named_variables(one), named_variables(two)
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert len(two.weights) == len(one.weights)


def make_pair(sharing, spiece=None, **kwargs):
    make = {"make_tokenizer": lambda: bg.BertGenerationTokenizer(spiece)} if spiece else {}
    settings = bg.GenerationConfig(max_new_tokens=9, num_beams=3, early_stopping="never")
    return make_deep_model(sharing, **make, **{"generation_config": settings, **kwargs})
