"""The signatures of an export: functions that run batches, and what these cost."""

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from bertgen_tf.export.signatures import COMPILED
from bertgen_tf.serving.pricing import Cost, row_sizes
from bertgen_tf.serving.programs import Programs, has_programs

Arrays = dict[str, np.ndarray]
# The name of a signature, "" for the default, and inputs.
Request = tuple[str, Arrays]

DEFAULT_SIGNATURE = "serving_default"
# Where an export does not specify its batch sizes.
MAX_BATCH_SIZE = 32
# More than any export runs at once.
_MAX_SPECIFIED_BATCH_SIZE = 4096
# To measure what requests cost; what is not measured in this time is learned from requests.
_MEASURING_SECONDS = 2.0
_MEASURED_ROWS = 4
_INITIALIZE = "__saved_model_init_op"

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
        route: chooses the graph that answers, this signature's or another with the same results;
            None: always its own.
        runs: how often its own graph has answered.
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
        self.route: Callable[[Arrays], Signature] | None = None
        self.runs = 0
        self._outputs = list(outputs)
        # Holds the session, which lives as long as its signatures.
        self._function = session.make_callable(
            [definition.outputs[key].name for key in outputs],
            [definition.inputs[key].name for key in self.inputs],
        )

    def run(self, inputs: Arrays) -> Arrays:
        """Answers a request by the graph that `route` chooses, see `run_graph`."""
        graph = self.route(inputs) if self.route else self
        outputs = graph.run_graph(inputs)
        graph.runs += 1
        return outputs

    def run_graph(self, inputs: Arrays) -> Arrays:
        """Runs its own graph.

        Args:
            inputs: arrays of the types of `self.inputs`, strings as objects of bytes.

        Returns:
            the outputs by name, strings as objects of bytes.
        """
        arrays = [np.asarray(inputs[key], x.dtype.as_numpy_dtype) for key, x in self.inputs.items()]
        outputs = self._function(*arrays)
        return {key: np.asarray(x) for key, x in zip(self._outputs, outputs, strict=True)}


def load_signatures(
    path: Path, graph: saved_model_pb2.SavedModel, metadata: dict[str, Any], xla: bool = False
) -> dict[str, Signature]:
    """Loads an export as TensorFlow Serving does, into a session.

    `tf.saved_model.load` would keep every program that XLA compiled until the process ends; a
    session frees them.

    Args:
        path: of the export.
        graph: its saved_model.pb.
        metadata: its metadata.json.
        xla: whether signatures with compiled twins will be answered by those.
    """
    meta_graph = graph.meta_graphs[0]
    definitions = {
        name: definition
        for name, definition in meta_graph.signature_def.items()
        if definition.method_name == tf.saved_model.PREDICT_METHOD_NAME
    }
    plain = not (xla and has_programs(definitions, metadata))
    session = _start_session(path, meta_graph, optimize=plain)
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


def _start_session(
    path: Path, meta_graph: meta_graph_pb2.MetaGraphDef, optimize: bool
) -> tf.compat.v1.Session:
    """A session with the graph and the variables of an export.

    Args:
        optimize: whether TensorFlow rewrites graphs. It takes longer than all the rest of a load,
            and makes them a tenth faster.
    """
    config = tf.compat.v1.ConfigProto()
    if not optimize:
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        meta_graph = _with_config(meta_graph, config.SerializeToString())
    with tf.Graph().as_default() as nodes:
        session = tf.compat.v1.Session(graph=nodes, config=config)
        saver = tf.compat.v1.train.import_meta_graph(meta_graph)
        if saver:
            saver.restore(session, str(path / "variables/variables"))
        assets = {
            asset.tensor_info.name: str(path / "assets" / asset.filename)
            for asset in meta_graph.asset_file_def
        }
        initialize = meta_graph.signature_def.get(_INITIALIZE)
        if initialize:
            session.run(initialize.outputs[_INITIALIZE].name, assets)
        for operation in tf.compat.v1.get_collection("saved_model_main_op"):  # of TensorFlow 1
            session.run(operation, assets)
    return session


def _with_config(
    meta_graph: meta_graph_pb2.MetaGraphDef, config: bytes
) -> meta_graph_pb2.MetaGraphDef:
    """The same, with another configuration of the session in all calls of functions."""
    copy = meta_graph_pb2.MetaGraphDef()
    copy.CopyFrom(meta_graph)
    bodies = [copy.graph_def.node, *(f.node_def for f in copy.graph_def.library.function)]
    for body in bodies:
        for node in body:
            if "config_proto" in node.attr:
                node.attr["config_proto"].s = config
    return copy


def connect_programs(
    signatures: dict[str, Signature],
    metadata: dict[str, Any],
    on_compiled: Callable[[], None] = lambda: None,
) -> Programs | None:
    """Lets signatures and their compiled twins answer by whichever graph is ready.

    Args:
        signatures: of a version.
        metadata: of the export.
        on_compiled: called after each compilation.

    Returns:
        what compiles, not started yet; None if the export has no such twins.
    """
    if not has_programs(signatures, metadata):
        return None
    programs = Programs(signatures["tokens"].run_graph, metadata["source_lengths"], on_compiled)
    for name, plain in signatures.items():
        compiled = signatures.get(_twin(name))
        if compiled and plain.inputs.keys() == compiled.inputs.keys() == {"text"}:
            plain.route = compiled.route = functools.partial(_choose, programs, plain, compiled)
    return programs


def _choose(programs: Programs, plain: Signature, compiled: Signature, inputs: Arrays) -> Signature:
    program = programs.want(compiled.run_graph, compiled.name, inputs)
    return compiled if program.state == "ready" else plain


def _twin(name: str) -> str:
    return ("generate" if name == DEFAULT_SIGNATURE else name) + COMPILED


def prepare(
    signatures: dict[str, Signature], requests: Sequence[Request], programs: Programs | None
) -> None:
    """Makes a version ready to answer: all warm-up requests are run, or some of them later.

    With compiled programs, the first request to the default signature is run at once and all else
    in their thread: requests to the other plain signatures, and a program for each request to the
    default one or to a compiled one.

    Args:
        signatures: of the version.
        requests: in the order in which they are run.
        programs: see `connect_programs`; not started yet, which is up to the caller.

    Raises:
        ValueError: a request is to an unknown signature.
    """
    requests = [(name or DEFAULT_SIGNATURE, inputs) for name, inputs in requests]
    for name, _ in requests:
        if name not in signatures:
            raise ValueError(f"a warm-up request is to {name[:100]!r}, which is no signature")
    if programs is None:
        warm_up(signatures, requests)
        return
    first = [request for request in requests if request[0] == DEFAULT_SIGNATURE]
    warm_up(signatures, first[:1])
    for name, inputs in requests:
        twin = signatures.get(_twin(name) if name == DEFAULT_SIGNATURE else name)
        if twin and twin.name.endswith(COMPILED):
            programs.want(twin.run_graph, twin.name, inputs, uses=0)
        else:
            programs.add_task(functools.partial(warm_up, signatures, [(name, inputs)]))


def warm_up(signatures: dict[str, Signature], requests: Iterable[Request]) -> None:
    """Runs requests, then measures what they cost, now that nothing has to be prepared."""
    first: dict[str, Arrays] = {}
    for name, inputs in requests:
        signatures[name].run_graph(inputs)
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
    signature.run_graph(inputs)
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
