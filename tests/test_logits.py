import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf.logits import BANNED, compose, min_new_tokens, suppress_tokens

LOGITS = tf.constant(np.linspace(-2.0, 3.0, 14, dtype=np.float32).reshape(2, 7))
IDS = tf.zeros([2, 5], tf.int32)


def _allowed(logits: tf.Tensor) -> np.ndarray:
    """Which tokens are not banned; the others must be unchanged."""
    banned = logits.numpy() == BANNED
    np.testing.assert_array_equal(logits.numpy()[~banned], LOGITS.numpy()[~banned])
    assert (banned == banned[0]).all()
    return np.flatnonzero(~banned[0])


def test_suppress_tokens_at_every_step():
    for step in (0, 4):
        output = suppress_tokens([5, 0, 5])(LOGITS, IDS, tf.constant(step))
        np.testing.assert_array_equal(_allowed(output), [1, 2, 3, 4, 6])


def test_min_new_tokens_bans_every_eos_for_n_steps():
    for step, allowed in [(0, [0, 2, 3, 5, 6]), (2, [0, 2, 3, 5, 6]), (3, range(7))]:
        output = min_new_tokens(3, [1, 4])(LOGITS, IDS, tf.constant(step))
        np.testing.assert_array_equal(_allowed(output), allowed)


def test_no_token_ids_change_nothing():
    np.testing.assert_array_equal(suppress_tokens([])(LOGITS, IDS, tf.constant(0)), LOGITS)


def test_compose_runs_in_order_and_passes_ids_and_step():
    seen = []

    def add_step(logits, ids, step):
        seen.append((ids, int(step)))
        return logits + tf.cast(step, tf.float32)

    output = compose([add_step, lambda logits, ids, step: 2.0 * logits])(
        LOGITS, IDS, tf.constant(3)
    )
    np.testing.assert_allclose(output, 2.0 * (LOGITS + 3.0))
    assert seen[0][0] is IDS and seen[0][1] == 3
    assert compose([])(LOGITS, IDS, tf.constant(0)) is LOGITS


@pytest.mark.parametrize("jit_compile", [False, True])
def test_unknown_vocabulary_in_a_graph(jit_compile):
    process = compose([suppress_tokens([5]), min_new_tokens(2, [1])])

    @tf.function(
        jit_compile=jit_compile,
        input_signature=[
            tf.TensorSpec([None, None]),
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([], tf.int32),
        ],
    )
    def run(logits, ids, step):
        return process(logits, ids, step)

    np.testing.assert_array_equal(_allowed(run(LOGITS, IDS, 1)), [0, 2, 3, 4, 6])
    np.testing.assert_array_equal(_allowed(run(LOGITS, IDS, 2)), [0, 1, 2, 3, 4, 6])


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="eos_token_ids must be a sequence of integers.*3"):
        min_new_tokens(2, 3)
    with pytest.raises(TypeError, match="token_ids"):
        suppress_tokens([1.5])
    with pytest.raises(ValueError, match=r"token_ids must be >= 0, received \[-1\]"):
        suppress_tokens([-1])
    with pytest.raises(ValueError, match="n must be >= 0, received -1"):
        min_new_tokens(-1, [1])
    with pytest.raises(ValueError, match="below the vocabulary size 7"):
        suppress_tokens([7])(LOGITS, IDS, tf.constant(0))
