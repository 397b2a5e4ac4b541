"""Int8 weights: what they are made of, and the product that reads them.

A matrix `[units, inputs]` becomes integers in [-127, 127] and one float32 scale per unit, its
greatest value / 127. The product rounds its inputs the same way, a scale per row, when it runs; so
a row's result does not depend on the rows beside it.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from bertgen_tf.config import QUANTIZATIONS


def check_quantization(mode: str, config: Any = None) -> None:
    """Raises a ValueError for a way to quantise that we do not have.

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


def quantized_linear(inputs: Any, kernel: Any, scale: Any, bias: Any) -> Any:
    """`inputs` [..., I] times the transposed `kernel`, plus `bias` [O]: float32 [..., O].

    Args:
        kernel, scale: of `quantize_matrix`, int8 [O, I] and float32 [O].
    """
    shape = ops.shape(inputs)
    rows = tf.reshape(tf.cast(inputs, tf.float32), [-1, kernel.shape[1]])
    integers, inverse = keras.quantizers.abs_max_quantize(rows, axis=-1)

    # For a single row XLA has no fast product of integers, but fuses the conversion of the kernel
    # into one of floats. Sums of whole numbers are exact there up to 2**24.
    def of_floats() -> tf.Tensor:
        floats = (tf.cast(tensor, tf.float32) for tensor in (integers, kernel))
        return tf.matmul(*floats, transpose_b=True)

    def of_integers() -> tf.Tensor:
        product = tf.matmul(integers, kernel, transpose_b=True, output_type=tf.int32)
        return tf.cast(product, tf.float32)

    products = tf.cond(tf.equal(tf.shape(rows)[0], 1), of_floats, of_integers)
    outputs = products / inverse * scale + bias
    return ops.reshape(outputs, (*shape[:-1], kernel.shape[0]))
