"""What a graph of a search is traced for: XLA, or TensorFlow's own kernels.

What is fast differs. XLA multiplies int8 faster than float32, and fuses what lies between products;
TensorFlow's kernels do neither, and oneDNN's, which it uses for floats, take longer to start than
the few rows of a generation step need.
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf
from keras import ops

# True for XLA, False for plain graphs, None outside searches: in training, say.
_COMPILED = contextvars.ContextVar[bool | None]("compiled", default=None)
# Kernels [inputs, units] as float32, by the identity of their variables.
_KERNELS = contextvars.ContextVar[dict[int, Any] | None]("kernels", default=None)


@contextlib.contextmanager
def search_graph(compiled: bool) -> Iterator[None]:
    """What is traced inside is a search, for XLA or as a plain graph."""
    token = _COMPILED.set(compiled)
    try:
        yield
    finally:
        _COMPILED.reset(token)


def for_xla() -> bool:
    """Whether it is a search for XLA that is being traced."""
    return _COMPILED.get() is True


def is_plain() -> bool:
    """Whether it is a search as a plain graph that is being traced."""
    return _COMPILED.get() is False


@contextlib.contextmanager
def kernels_for_loop(kernels: Iterable[Any]) -> Iterator[None]:
    """In a plain graph, turns kernels round here, once, for all products that are traced inside.

    Each step of the loop reads them. int8 ones become float32, which would take longer in every
    step than the products do; and with the inputs first, a product with a few rows is fastest.

    Args:
        kernels: variables [units, inputs], int8 or float.
    """
    floats = {}
    if is_plain():
        for kernel in kernels:
            floats[id(kernel)] = tf.cast(tf.transpose(tf.convert_to_tensor(kernel)), tf.float32)
    token = _KERNELS.set(floats)
    try:
        yield
    finally:
        _KERNELS.reset(token)


def kernel_for_loop(kernel: Any) -> Any:
    """What `kernels_for_loop` made of a variable, [inputs, units]; None if nothing."""
    return (_KERNELS.get() or {}).get(id(kernel))


def transpose(tensor: Any, axes: tuple[int, ...]) -> Any:
    """`tf.transpose`; in a plain graph not oneDNN's, which exists for floats only."""
    if not is_plain() or tensor.dtype != tf.float32:
        return tf.transpose(tensor, axes)
    return tf.bitcast(tf.transpose(tf.bitcast(tensor, tf.int32), axes), tf.float32)


def unfold_rows(rows: Any, like: Any) -> Any:
    """[B * T, O] -> [B, T, O], with the first dimensions of `like`."""
    if len(like.shape) == 3 and like.shape[1]:  # no ops are needed to know the shape
        return tf.reshape(rows, [-1, like.shape[1], rows.shape[-1]])
    return ops.reshape(rows, (*ops.shape(like)[:-1], rows.shape[-1]))
