"""Int8 weights: how they are made, and the product that reads them.

A matrix `[units, inputs]` becomes integers in [-127, 127] and one float32 scale per unit, its
greatest value / 127. At run time, the product rounds its inputs in the same way, with one scale per
row, so a row's result does not depend on the rows beside it.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from bertgen_tf.config import QUANTIZATIONS

_INTEGER_PRODUCTS = contextvars.ContextVar("integer_products", default=False)


def check_quantization(mode: str, config: Any = None) -> None:
    """Raises a ValueError for an unsupported quantisation.

    Args:
        mode, config: what Keras gives to `quantize`.
    """
    if mode not in QUANTIZATIONS:
        raise ValueError(f"mode must be one of {', '.join(QUANTIZATIONS)}, received {mode!r}.")
    default = keras.quantizers.Int8QuantizationConfig()
    if config is not None and config.get_config() != default.get_config():
        raise ValueError(
            "config must not have quantizers of its own, as matrices and their inputs are rounded "
            f"by their greatest values, received {config.get_config()}. Pass the mode alone."
        )


def quantize_matrix(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """Float `[units, inputs]` -> int8 of the same shape and float32 scales `[units]`."""
    matrix = np.asarray(matrix, np.float32)
    integers, scale = keras.quantizers.abs_max_quantize(matrix, axis=1, to_numpy=True)
    return np.asarray(integers), 1 / np.asarray(scale)[:, 0]


def dequantize_matrix(integers: Any, scale: Any) -> np.ndarray:
    """What `quantize_matrix` gave, as a float32 matrix; rounded again, it gives the same."""
    return np.asarray(integers, np.float32) * np.asarray(scale, np.float32)[:, np.newaxis]


@contextlib.contextmanager
def integer_products(wanted: bool) -> Iterator[None]:
    """Whether a graph that is being traced computes its products in integers.

    XLA multiplies int8 faster than float32. TensorFlow's own kernels do not: without this, matrices
    become float32 on their way into the product.
    """
    token = _INTEGER_PRODUCTS.set(wanted)
    try:
        yield
    finally:
        _INTEGER_PRODUCTS.reset(token)


def quantized_linear(inputs: Any, kernel: Any, scale: Any, bias: Any) -> Any:
    """`inputs` [..., I] times the transposed `kernel`, plus `bias` [O]: float32 [..., O].

    The sums are of integers: exact in int32, and in float32 up to 2**24, which takes more than
    1,000 inputs.

    Args:
        kernel, scale: of `quantize_matrix`, int8 [O, I] and float32 [O].
    """
    shape = ops.shape(inputs)
    rows = tf.reshape(tf.cast(inputs, tf.float32), [-1, kernel.shape[1]])
    # Like Keras's AbsMaxQuantizer, which rejects an empty batch.
    largest = tf.reduce_max(tf.abs(rows), axis=1, keepdims=True) + keras.config.epsilon()
    integers = tf.cast(tf.round(rows * (127 / largest)), tf.int8)
    if _INTEGER_PRODUCTS.get():
        count = tf.shape(integers)[0]
        # XLA has a fast product for two rows, but not for one.
        missing = tf.cast(tf.equal(count, 1), tf.int32)
        integers = tf.pad(integers, [[0, missing], [0, 0]])
        sums = tf.matmul(integers, kernel, transpose_b=True, output_type=tf.int32)[:count]
    else:
        floats = (tf.cast(tensor, tf.float32) for tensor in (integers, kernel))
        sums = tf.matmul(*floats, transpose_b=True)
    outputs = tf.cast(sums, tf.float32) * (largest / 127) * scale + tf.cast(bias, tf.float32)
    return ops.reshape(outputs, (*shape[:-1], kernel.shape[0]))
