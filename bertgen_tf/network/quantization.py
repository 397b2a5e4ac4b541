"""Int8 weights: how they are made, and the product that reads them.

A matrix `[units, inputs]` becomes integers in [-127, 127] and one float32 scale per unit, its
greatest value / 127. At run time, the product rounds its inputs in the same way, with one scale per
row, so a row's result does not depend on the rows beside it.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bertgen_tf.config import QUANTIZATIONS
from bertgen_tf.network.tracing import for_xla, kernel_for_loop, unfold_rows


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


def quantized_linear(inputs: Any, kernel: Any, scale: Any, bias: Any) -> Any:
    """`inputs` [B, T, I] times the transposed `kernel`, plus `bias` [O]: float32 [B, T, O].

    The sums are of integers: exact in int32, and in float32 up to 2**24, which takes more than
    1,000 inputs.

    Args:
        kernel, scale: variables with what `quantize_matrix` gave, int8 [O, I] and float32 [O].
    """
    rows = tf.reshape(tf.cast(inputs, tf.float32), [-1, kernel.shape[1]])
    # Like Keras's AbsMaxQuantizer, which rejects an empty batch.
    largest = tf.reduce_max(tf.abs(rows), axis=1, keepdims=True) + keras.config.epsilon()
    integers = tf.round(rows * (127 / largest))
    if for_xla():
        integers = tf.cast(integers, tf.int8)
        count = tf.shape(integers)[0]
        # XLA has a fast product for two rows, but not for one.
        missing = tf.cast(tf.equal(count, 1), tf.int32)
        integers = tf.pad(integers, [[0, missing], [0, 0]])
        sums = tf.matmul(
            integers, tf.convert_to_tensor(kernel), transpose_b=True, output_type=tf.int32
        )[:count]
    elif (floats := kernel_for_loop(kernel)) is not None:
        sums = tf.matmul(integers, floats)
    else:
        floats = tf.cast(tf.convert_to_tensor(kernel), tf.float32)
        sums = tf.matmul(integers, floats, transpose_b=True)
    outputs = tf.cast(sums, tf.float32) * (largest / 127) * scale + tf.cast(bias, tf.float32)
    return unfold_rows(outputs, inputs)
