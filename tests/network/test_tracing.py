"""Forms for plain graphs, against TensorFlow's own ops."""

import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf.network import tracing
from bertgen_tf.network.projections import linear
from tests.helpers import make_model


def op_types(function):
    return [op.type for op in function.get_concrete_function().graph.get_operations()]


def traced(compiled, make):
    """`make()` as a graph of a search."""

    def function():
        with tracing.search_graph(compiled):
            return make()

    return tf.function(function, autograph=False)


def test_outside_of_searches_nothing_is_different():
    assert not tracing.for_xla() and not tracing.is_plain()
    with tracing.search_graph(True):
        assert tracing.for_xla() and not tracing.is_plain()
        with tracing.search_graph(False):
            assert tracing.is_plain() and not tracing.for_xla()
    assert not tracing.for_xla() and not tracing.is_plain()


def test_plain_transposes_are_of_integers():
    x = tf.random.stateless_normal([2, 3, 5, 7], [1, 2])
    plain = traced(False, lambda: tracing.transpose(x, (0, 2, 1, 3)))
    np.testing.assert_array_equal(plain(), np.transpose(x, (0, 2, 1, 3)))
    assert "Bitcast" in op_types(plain)
    assert "Bitcast" not in op_types(traced(True, lambda: tracing.transpose(x, (0, 2, 1, 3))))
    halves = tf.cast(x, tf.bfloat16)
    half = traced(False, lambda: tracing.transpose(halves, (0, 2, 1, 3)))()
    np.testing.assert_array_equal(half, tf.transpose(halves, (0, 2, 1, 3)))


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_plain_products(rows, turned):
    kernel = tf.Variable(tf.random.stateless_normal([7, 3], [1, 2]))
    bias, inputs = tf.range(7.0), tf.random.stateless_normal([rows, 1, 3], [3, 4])

    def product():
        with tracing.kernels_for_loop([kernel] if turned else []):
            return linear(inputs, kernel, bias)

    expected = tf.matmul(inputs, tf.convert_to_tensor(kernel), transpose_b=True) + bias
    for compiled in (False, True):
        np.testing.assert_allclose(traced(compiled, product)(), expected, rtol=1e-5, atol=1e-5)


def test_kernels_are_turned_round_once_before_the_loop():
    """Not in each of its steps, and not at all for XLA."""
    model = make_model()
    model.quantize("int8")
    count = len(model.decoder.kernels_for_loop())
    assert count == 1 + 7 * model.decoder.config.num_hidden_layers

    def steps():
        with tracing.kernels_for_loop(model.decoder.kernels_for_loop()):
            kernels = [tracing.kernel_for_loop(k) for k in model.decoder.kernels_for_loop()]
        return [x for x in kernels if x is not None]

    plain = op_types(traced(False, steps))
    assert plain.count("Cast") == plain.count("Transpose") == count
    assert traced(True, steps)() == []
