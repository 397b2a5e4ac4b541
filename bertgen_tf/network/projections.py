"""Projections laid out for generation: their kernels, several fused in one, int8 in their place."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from bertgen_tf.config import BertGenerationConfig
from bertgen_tf.network.quantization import dequantize_matrix, quantize_matrix, quantized_linear
from bertgen_tf.network.tracing import is_plain, kernel_for_loop, unfold_rows
from bertgen_tf.network.weights import VariablePart, loading_finite


def dense(
    units: int, config: BertGenerationConfig, name: str, dtype: Any, parts: int = 1
) -> "Dense":
    """A projection with BERT's initialiser."""
    return Dense(
        units,
        kernel_initializer=initializer(config),
        parts=parts,
        quantization=config.quantization,
        name=name,
        dtype=dtype,
    )


def initializer(config: BertGenerationConfig) -> keras.initializers.Initializer:
    """BERT's truncated normal; a new object each time, because each draws its own seed."""
    return keras.initializers.TruncatedNormal(stddev=config.initializer_range)


def linear(inputs: Any, kernel: Any, bias: Any) -> Any:
    """`inputs` [B, T, I] times the transposed `kernel` [O, I], plus `bias` [O]: [B, T, O].

    A generation step (T = 1) is bound by reading the kernels. For XLA on a CPU the kernel therefore
    comes first: Eigen packs the second matrix, here the few rows. The bias is added to the columns,
    or XLA would swap the product back; and it is negated and subtracted, because XLA fuses a sum
    into the product with a single row, which then runs on one core only.
    """
    rows = tf.reshape(inputs, [-1, kernel.shape[1]])
    if is_plain():
        turned = kernel_for_loop(kernel)
        if turned is None:
            products = tf.matmul(rows, tf.convert_to_tensor(kernel), transpose_b=True)
        else:
            products = tf.matmul(rows, turned)
        return unfold_rows(tf.nn.bias_add(products, bias), inputs)
    kernel = tf.convert_to_tensor(kernel)
    if inputs.shape[-2] == 1:
        columns = tf.matmul(kernel, rows, transpose_b=True) - (-bias)[:, None]
        outputs = tf.transpose(columns)
    else:
        outputs = tf.matmul(rows, kernel, transpose_b=True) + bias
    return unfold_rows(outputs, inputs)


def quantized_weights(layer: keras.layers.Layer, shape: tuple[int, int], name: str) -> list:
    """New untrainable variables of a layer, for what `quantize_matrix` gives."""
    options = {"initializer": "zeros", "trainable": False, "autocast": False}
    return [
        layer.add_weight(shape, dtype="int8", name=name, **options),
        layer.add_weight(shape[:1], dtype="float32", name=f"{name}_scale", **options),
    ]


@contextlib.contextmanager
def rebuilding(layer: keras.layers.Layer) -> Iterator[None]:
    """Lets a layer that is built take new variables, with the paths of those that it replaces.

    By its path an optimizer knows a variable, and `from_export` finds it again.
    """
    with contextlib.ExitStack() as scopes, _unlocked(layer):
        for name in layer.path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(name))
        yield


@contextlib.contextmanager
def _unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Lets a layer that is built take new variables."""
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if was_locked:
            layer._tracker.lock()


class Dense(keras.layers.Layer):
    """Keras's `Dense` with its kernel transposed, `[units, inputs]`; see `linear`.

    Files hold the kernel as Keras's `Dense` does.

    Args:
        units: outputs.
        kernel_initializer: gets the shape as Keras's `Dense` has it, `(inputs, units)`.
        parts: how many projections of equal size this one holds, one below the other. If there are
            several, files and rule tables know each as a `Projection`, but not this layer.
        quantization: "int8" for an int8 kernel with a `kernel_scale` [units]; see
            `bertgen_tf.network.quantization`.

    Attributes:
        adapters: LoRA's matrices (A [r, inputs], B [units / parts, r]) of each part, or None; see
            `bertgen_tf.training.lora`.
    """

    def __init__(
        self,
        units: int,
        kernel_initializer: keras.initializers.Initializer,
        parts: int = 1,
        quantization: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.units = units
        self.kernel_initializer = kernel_initializer
        self.parts = parts
        self.quantization = quantization
        self.adapters: tuple[tuple[Any, Any] | None, ...] = (None,) * parts
        self.adapter_scale = 1.0

    def build(self, input_shape: Any) -> None:
        shape = (self.units, input_shape[-1])
        if self.quantization is None:
            self.kernel = self._float_kernel(
                shape,
                lambda shape, dtype: ops.transpose(self.kernel_initializer(shape[::-1], dtype)),
            )
        else:
            self.kernel, self.kernel_scale = quantized_weights(self, shape, "kernel")
        self.bias = self.add_weight((self.units,), initializer="zeros", name="bias")
        self.built = True

    def _float_kernel(self, shape: tuple[int, int], initializer: Any) -> Any:
        return self.add_weight(shape, initializer=initializer, name="kernel")

    def to_int8(self) -> None:
        """Replaces the kernel by an int8 one, once.

        Not Keras's `quantize`, through which an enclosing model would quantise this layer alone.
        """
        if self.quantization is not None:
            return
        kernel, scale = quantize_matrix(self.kernel)
        self._untrack_variable(self.kernel)
        with rebuilding(self):
            self.kernel, self.kernel_scale = quantized_weights(self, kernel.shape, "kernel")
        self.kernel.assign(kernel)
        self.kernel_scale.assign(scale)
        self.quantization = "int8"

    def to_float(self) -> None:
        """Replaces an int8 kernel by a float one: the reverse of `to_int8`."""
        if self.quantization is None:
            return
        kernel = dequantize_matrix(self.kernel, self.kernel_scale)
        # The bias comes second, as in a new layer: by this order Keras copies weights.
        for variable in (self.kernel, self.kernel_scale, self.bias):
            self._untrack_variable(variable)
        with rebuilding(self):
            self.kernel = self._float_kernel(kernel.shape, "zeros")
            self.bias.trainable = True  # tracked with the others; a frozen layer freezes it again
            self._track_variable(self.bias)
        self.kernel.assign(kernel)
        self.kernel_scale = self.quantization = None

    def call(self, inputs: Any) -> Any:
        bias = tf.convert_to_tensor(self.bias)
        if self.quantization is None:
            outputs = linear(inputs, self.kernel, bias)
            return outputs + self._adapted(inputs) if any(self.adapters) else outputs
        outputs = quantized_linear(
            inputs, self.kernel, tf.convert_to_tensor(self.kernel_scale), bias
        )
        return ops.cast(outputs, self.compute_dtype)

    def _adapted(self, inputs: Any) -> Any:
        """What the adapters add to the outputs; 0 for parts without one."""
        outputs = []
        for adapter in self.adapters:
            if adapter is None:
                shape = (*ops.shape(inputs)[:-1], self.units // self.parts)
                outputs.append(ops.zeros(shape, inputs.dtype))
                continue
            first, second = map(tf.convert_to_tensor, adapter)
            rows = tf.matmul(tf.reshape(inputs, [-1, first.shape[1]]), first, transpose_b=True)
            rows = tf.matmul(rows * self.adapter_scale, second, transpose_b=True)
            outputs.append(ops.reshape(rows, (*ops.shape(inputs)[:-1], second.shape[0])))
        return ops.concatenate(outputs, axis=-1)

    def add_adapter(self, part: int, rank: int, scale: float) -> None:
        """Gives a part a product of two small matrices, initially 0, beside its kernel.

        Initialised as in Hu et al. 2021 and Hugging Face's `peft`.
        """
        inputs = self.kernel.shape[1]
        limit = inputs**-0.5  # Kaiming uniform with a = sqrt(5), as in peft
        with _unlocked(self):
            adapter = (
                self.add_weight(
                    (rank, inputs),
                    initializer=keras.initializers.RandomUniform(-limit, limit),
                    name="lora_a",
                ),
                self.add_weight(
                    (self.units // self.parts, rank), initializer="zeros", name="lora_b"
                ),
            )
            self.adapter_scale = scale
            self.adapters = (*self.adapters[:part], adapter, *self.adapters[part + 1 :])

    def remove_adapters(self) -> None:
        for variable in (variable for adapter in self.adapters if adapter for variable in adapter):
            self._untrack_variable(variable)
        with _unlocked(self):
            self.adapters = (None,) * self.parts

    def merge_adapters(self) -> None:
        """Adds the adapters to the kernel, and removes them."""
        size = self.units // self.parts
        for part, adapter in enumerate(self.adapters):
            if adapter is not None:
                first, second = (matrix.numpy().astype(np.float64) for matrix in adapter)
                rows = VariablePart(self.kernel, part * size, (part + 1) * size)
                rows.assign(rows.numpy() + self.adapter_scale * second @ first)
        self.remove_adapters()

    def stored_variables(self) -> list[Any]:
        """In the order of Keras's `Dense`, without adapters."""
        scale = [] if self.quantization is None else [self.kernel_scale]
        return [self.kernel, self.bias, *scale]

    def save_own_variables(self, store: Any) -> None:
        if self.parts == 1:
            _save(store, [*self.stored_variables(), *(self.adapters[0] or ())])

    def load_own_variables(self, store: Any) -> None:
        if self.parts == 1:
            _load(store, self, [*self.stored_variables(), *(self.adapters[0] or ())])


class Projection(keras.layers.Layer):
    """One of the projections that a `Dense` holds, as files and rule tables know it.

    The variables are those of the `Dense`: to freeze them, freeze that layer.

    Args:
        dense: a built one, or one that will be.
        number: which of its parts.
    """

    def __init__(self, dense: Dense, number: int, **kwargs: Any):
        super().__init__(**kwargs)
        # In a function: Keras would take an attribute for a layer of this one.
        self._dense = lambda: dense
        self.number = number
        self.built = True

    @property
    def variable_parts(self) -> list[Any]:
        """The rows of each variable that are this projection's, and its adapter."""
        dense, size = self.dense, self.dense.units // self.dense.parts
        rows = (self.number * size, (self.number + 1) * size)
        parts = [VariablePart(variable, *rows) for variable in dense.stored_variables()]
        return [*parts, *(dense.adapters[self.number] or ())]

    @property
    def dense(self) -> Dense:
        """The layer that holds this projection's rows."""
        return self._dense()

    def save_own_variables(self, store: Any) -> None:
        _save(store, self.variable_parts)

    def load_own_variables(self, store: Any) -> None:
        _load(store, self, self.variable_parts)


def _save(store: Any, variables: list[Any]) -> None:
    for number, variable in enumerate(variables):
        store[str(number)] = np.transpose(variable.numpy())


def _load(store: Any, layer: keras.layers.Layer, variables: list[Any]) -> None:
    with loading_finite(layer, variables):
        if len(store.keys()) != len(variables):
            raise ValueError(
                f"{layer.path} should be stored as {len(variables)} tensors (kernel and bias, for "
                f"int8 a scale, for LoRA two matrices), found {len(store.keys())}."
            )
        for number, variable in enumerate(variables):
            variable.assign(np.transpose(store[str(number)]))
