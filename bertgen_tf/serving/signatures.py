"""The signatures of an export: functions that run batches, and what these cost."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from bertgen_tf.export.signatures import COMPILED
from bertgen_tf.serving.pricing import Cost, row_sizes

DEFAULT_SIGNATURE = "serving_default"
# Where an export does not specify its batch sizes.
MAX_BATCH_SIZE = 32
# More than any export runs at once.
_MAX_SPECIFIED_BATCH_SIZE = 4096
# To measure what requests cost; what is not measured in this time is learned from requests.
_MEASURING_SECONDS = 2.0
_MEASURED_ROWS = 4

_log = logging.getLogger(__name__)


class Signature:
    """A function of an export.

    Attributes:
        name: the signature's.
        inputs: the specifications of the inputs, by name.
        max_batch_size: the most rows of one run.
        max_length: how many tokens of a text it reads; None if that is not known.
        has_rows: whether the first dimension of all inputs and outputs is the batch.
        cost: what its batches cost.
    """

    def __init__(
        self,
        name: str,
        definition: meta_graph_pb2.SignatureDef,
        session: tf.compat.v1.Session,
        max_batch_size: int = MAX_BATCH_SIZE,
        max_length: int | None = None,
        prior: Cost | None = None,
    ):
        self.name = name
        self.inputs = {key: _spec(key, x) for key, x in sorted(definition.inputs.items())}
        self.max_batch_size = max_batch_size
        self.max_length = max_length
        self.cost = Cost(prior)
        outputs = {key: _spec(key, x) for key, x in sorted(definition.outputs.items())}
        self.has_rows = bool(self.inputs) and all(
            spec.shape.rank and spec.shape[0] is None
            for spec in (*self.inputs.values(), *outputs.values())
        )
        self._outputs = list(outputs)
        # Holds the session, which lives as long as its signatures.
        self._function = session.make_callable(
            [definition.outputs[key].name for key in outputs],
            [definition.inputs[key].name for key in self.inputs],
        )

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs it.

        Args:
            inputs: arrays of the types of `self.inputs`, strings as objects of bytes.

        Returns:
            the outputs by name, strings as objects of bytes.
        """
        arrays = [np.asarray(inputs[key], x.dtype.as_numpy_dtype) for key, x in self.inputs.items()]
        outputs = self._function(*arrays)
        return {key: np.asarray(x) for key, x in zip(self._outputs, outputs, strict=True)}


def load_signatures(
    path: Path, graph: saved_model_pb2.SavedModel, metadata: dict[str, Any]
) -> dict[str, Signature]:
    """Loads an export as TensorFlow Serving does, into a session.

    `tf.saved_model.load` would keep every program that XLA compiled until the process ends; a
    session frees them.

    Args:
        path: of the export.
        graph: its saved_model.pb.
        metadata: its metadata.json.
    """
    tags = graph.meta_graphs[0].meta_info_def.tags
    with tf.Graph().as_default() as nodes:
        session = tf.compat.v1.Session(graph=nodes)
        loaded = tf.compat.v1.saved_model.load(session, tags, str(path))
    definitions = {
        name: definition
        for name, definition in loaded.signature_def.items()
        if definition.method_name == tf.saved_model.PREDICT_METHOD_NAME
    }
    size, length = _largest_batch(metadata), _longest_text(metadata)
    signatures: dict[str, Signature] = {}
    # What each is compared with before it has run is made first.
    for name in sorted(definitions, key=lambda n: (n != DEFAULT_SIGNATURE, n.endswith(COMPILED))):
        plain = signatures.get(name.removesuffix(COMPILED)) or signatures.get(DEFAULT_SIGNATURE)
        prior = plain.cost if plain else None
        signatures[name] = Signature(name, definitions[name], session, size, length, prior)
    return signatures


def _spec(name: str, tensor: meta_graph_pb2.TensorInfo) -> tf.TensorSpec:
    return tf.TensorSpec(tf.TensorShape(tensor.tensor_shape), tf.as_dtype(tensor.dtype), name)


def warm_up(
    signatures: dict[str, Signature], requests: Iterable[tuple[str, dict[str, np.ndarray]]]
) -> None:
    """Runs requests, then measures what they cost, now that nothing has to be prepared."""
    first: dict[str, dict[str, np.ndarray]] = {}
    for name, inputs in requests:
        name = name or DEFAULT_SIGNATURE
        if name not in signatures:
            raise ValueError(f"a warm-up request is to {name[:100]!r}, which is no signature")
        signatures[name].run(inputs)
        first.setdefault(name, inputs)
    # First a text of each, then a few: the time of a batch does not grow as its rows do.
    end = time.monotonic() + _MEASURING_SECONDS
    for rows in (1, _MEASURED_ROWS):
        for name, inputs in first.items():
            signature = signatures[name]
            if signature.has_rows and time.monotonic() < end:
                batch = {key: np.repeat(x[:1], rows, axis=0) for key, x in inputs.items()}
                sizes = row_sizes(batch, rows, signature.max_length)
                # Of two: something else may run beside one.
                signature.cost.learn(sizes.padded, min(_time(signature, batch) for _ in range(2)))


def _time(signature: Signature, inputs: dict[str, np.ndarray]) -> float:
    start = time.monotonic()
    signature.run(inputs)
    return time.monotonic() - start


def _largest_batch(metadata: dict[str, Any]) -> int:
    sizes = metadata.get("batch_sizes", [MAX_BATCH_SIZE])
    most = _MAX_SPECIFIED_BATCH_SIZE
    if (
        isinstance(sizes, list)
        and sizes
        and all(type(size) is int and 0 < size <= most for size in sizes)
    ):
        return max(sizes)
    _log.warning("ignored batch_sizes: expected a list of integers from 1 to %d", most)
    return MAX_BATCH_SIZE


def _longest_text(metadata: dict[str, Any]) -> int | None:
    try:
        length = metadata["config"]["preprocessor"]["max_source_length"]
    except (KeyError, TypeError):
        return None
    return length if type(length) is int and 0 < length < 2**31 else None
