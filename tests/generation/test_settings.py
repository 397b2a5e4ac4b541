"""What generation refuses, because it could not mean anything."""

import numpy as np
import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.generation import compiled, settings
from bertgen_tf.generation.search import logits
from tests.helpers import PIECES, make_small_model


@pytest.fixture(scope="module")
def model():
    return make_small_model(generation_config=bg.GenerationConfig(max_new_tokens=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppress_tokens": [*range(len(PIECES))]}, "suppress_tokens must leave a token"),
        (
            {"suppress_tokens": [*range(1, len(PIECES))], "bad_words_ids": [[0]]},
            "suppress_tokens must leave a token",
        ),
        (
            {"begin_suppress_tokens": [*range(len(PIECES))]},
            "begin_suppress_tokens must leave a token",
        ),
        (
            {"length_penalty": -70.0},
            r"length_penalty must be at most 63\.1 for outputs of 4",
        ),
        ({"length_penalty": 1e30, "num_beams": 2}, "length_penalty must be at most"),
        ({"beam_scorer": "gnmt", "gnmt_alpha": 300.0}, "gnmt_alpha must be at most"),
        ({"length_penalty": 1e300}, "length_penalty must be a number that float32 holds"),
        ({"repetition_penalty": 1e-60}, "repetition_penalty must be a number that float32 holds"),
        ({"sequence_bias": {(5,): 1e99}}, "sequence_bias must be a number that float32 holds"),
        ({"no_repeat_ngram_size": 2**31}, "no_repeat_ngram_size must be at most 2147483647"),
        (
            {"num_beams": 10**9},
            r"num_beams must fit into memory, received 1000000000, .*batch_size",
        ),
        (
            {"do_sample": True, "num_return_sequences": 10**9},
            "num_return_sequences must fit into memory",
        ),
    ],
    ids=range(12),
)
def test_what_no_search_could_do(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate("old", jit_compile=False, **options)


def test_the_largest_penalties_keep_an_order(model):
    """Just inside the range: scores are finite and differ."""
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
    for penalty in (-63.0, 63.0):
        scores = model.generate("old", jit_compile=False, length_penalty=penalty, **options).scores
        assert np.isfinite(scores).all() and (scores < 0).all() and len(set(scores[0])) == 3


def shorter(logits, ids, step):
    return logits[:, :1]


def nothing(logits, ids, step):
    return None


def half(logits, ids, step):
    return tf.cast(logits, tf.float16)


def one_row(logits, ids, step):
    return tf.zeros(tf.stack([tf.shape(logits)[0] + 1, tf.shape(logits)[1]]))


@pytest.mark.parametrize("process", [shorter, nothing, half])
def test_processors_keep_shape_and_dtype(model, process):
    message = f"{process.__name__}, of logits_processor, must return logits of the shape and dtype"
    with pytest.raises(ValueError, match=message):
        model.generate("old", jit_compile=False, logits_processor=[process])


def test_processors_keep_shapes_that_are_known_when_they_run():
    run = tf.function(
        logits.checked(one_row),
        input_signature=[
            tf.TensorSpec([None, None]),
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([], tf.int32),
        ],
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="one_row, of logits_processor, must"):
        run(tf.zeros([2, 5]), tf.zeros([2, 3], tf.int32), 0)


def nan(logits, ids, step):
    return logits * np.nan


def ban_all(logits, ids, step):
    return tf.where(step == 1, settings.logits.BANNED, logits)


def test_scores_that_are_no_numbers(model):
    with pytest.raises(ValueError, match="The model gives scores that are no numbers"):
        model.generate("old", jit_compile=False, logits_processor=[nan])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_outputs_without_any_token_left_are_counted(model, num_beams):
    with pytest.warns(UserWarning, match="2 of 2 outputs hold a token that the settings ban"):
        model.generate(
            ["old", "house"], jit_compile=False, logits_processor=[ban_all], num_beams=num_beams
        )


def test_many_settings_are_no_reason_for_a_warning(caplog):
    for number in range(9):
        compiled._graph()(lambda x, number=number: x + number)(tf.constant(1))
    assert "retracing" not in caplog.text
    # TensorFlow's own name, which the test above would not miss once it has warned enough.
    assert tf.function(len)._omit_frequent_tracing_warning is False
