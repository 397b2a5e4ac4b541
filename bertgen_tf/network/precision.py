"""Exact products, where results are compared."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Switches TensorFloat-32 off, which on GPUs is less exact than what is compared."""
    enabled = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(enabled)
