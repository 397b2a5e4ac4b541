"""Exact matrix products, for comparing results."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Switches off TensorFloat-32, which on GPUs is less exact than the comparisons."""
    enabled = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(enabled)
