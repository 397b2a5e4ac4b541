"""The signatures of an export: functions that run batches, and what these cost."""

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from bertgen_tf.export.signatures import COMPILED
from bertgen_tf.serving.pricing import Arrays, Cost, row_sizes
from bertgen_tf.serving.programs import Programs

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
# The nodes of a graph run one after the other in the thread that asked, not in those for requests.
_IN_THIS_THREAD = tf.compat.v1.RunOptions(inter_op_thread_pool=-1)

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
        tensors = (
            [definition.outputs[key].name for key in outputs],
            [definition.inputs[key].name for key in self.inputs],
        )
        # They hold the session, which lives as long as its signatures.
        self._function = session.make_callable(*tensors)
        self._function_aside = session.make_callable(*tensors, accept_options=True)

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
        return self._named(self._function(*self._arrays(inputs)))

    def run_aside(self, inputs: Arrays) -> Arrays:
        """The same, in the thread that calls it, so that requests need not wait for it.

        In one of TensorFlow's threads a compilation would keep it from all others, and have their
        priority.
        """
        return self._named(self._function_aside(*self._arrays(inputs), options=_IN_THIS_THREAD))

    def _arrays(self, inputs: Arrays) -> list[np.ndarray]:
        return [np.asarray(inputs[key], x.dtype.as_numpy_dtype) for key, x in self.inputs.items()]

    def _named(self, outputs: Sequence[Any]) -> Arrays:
        return {key: np.asarray(x) for key, x in zip(self._outputs, outputs, strict=True)}


def load_signatures(
    path: Path, graph: saved_model_pb2.SavedModel, metadata: dict[str, Any], optimize: bool = True
) -> dict[str, Signature]:
    """Loads an export as TensorFlow Serving does, into a session.

    `tf.saved_model.load` would keep every program that XLA compiled until the process ends; a
    session frees them.

    Args:
        path: of the export.
        graph: its saved_model.pb.
        metadata: its metadata.json.
        optimize: whether TensorFlow rewrites graphs. That takes longer than all the rest of a load,
            and makes them little faster; False is for exports of this version of the package.
    """
    meta_graph = graph.meta_graphs[0]
    definitions = {
        name: definition
        for name, definition in meta_graph.signature_def.items()
        if definition.method_name == tf.saved_model.PREDICT_METHOD_NAME
    }
    if optimize:
        with tf.Graph().as_default() as nodes:
            session = tf.compat.v1.Session(graph=nodes)
            tf.compat.v1.saved_model.load(session, meta_graph.meta_info_def.tags, str(path))
    else:
        session = _start_unoptimized(path, meta_graph)
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


def _start_unoptimized(path: Path, meta_graph: meta_graph_pb2.MetaGraphDef) -> tf.compat.v1.Session:
    """A session with graph and variables, as TensorFlow's loader makes it, but for its settings.

    Args:
        meta_graph: is changed: calls of functions have settings of their own.
    """
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    graph = meta_graph.graph_def
    for node in itertools.chain(graph.node, *(f.node_def for f in graph.library.function)):
        if "config_proto" in node.attr:
            node.attr["config_proto"].s = config.SerializeToString()
    with tf.Graph().as_default() as nodes:
        session = tf.compat.v1.Session(graph=nodes, config=config)
        saver = tf.compat.v1.train.import_meta_graph(meta_graph)
        saver.restore(session, str(path / "variables/variables"))
        assets = {
            asset.tensor_info.name: str(path / "assets" / asset.filename)
            for asset in meta_graph.asset_file_def
        }
        session.run(meta_graph.signature_def[_INITIALIZE].outputs[_INITIALIZE].name, assets)
    return session


def connect_programs(
    signatures: dict[str, Signature],
    metadata: dict[str, Any],
    on_compiled: Callable[[], None] = lambda: None,
) -> Programs:
    """Lets signatures and their compiled twins answer by whichever graph is ready.

    Args:
        signatures: of a version for which `has_programs` is true.
        metadata: of the export.
        on_compiled: called after each compilation.

    Returns:
        what compiles, not started yet.
    """
    programs = Programs(signatures["tokens"].run_graph, metadata["source_lengths"], on_compiled)
    for name, plain in signatures.items():
        compiled = signatures.get(_twin(name))
        if compiled and plain.inputs.keys() == compiled.inputs.keys() == {"text"}:
            plain.route = compiled.route = functools.partial(_choose, programs, plain, compiled)
    return programs


def _choose(programs: Programs, plain: Signature, compiled: Signature, inputs: Arrays) -> Signature:
    program = programs.want(compiled.run_aside, compiled.name, inputs)
    return compiled if program.state == "ready" else plain


def _twin(name: str) -> str:
    return ("generate" if name == DEFAULT_SIGNATURE else name) + COMPILED


def prepare(
    signatures: dict[str, Signature],
    requests: Sequence[Request],
    programs: Programs | None = None,
    hurry: bool = False,
) -> None:
    """Makes a version ready to answer, by its warm-up requests.

    Args:
        signatures: of the version.
        requests: in the order in which they are run.
        programs: see `connect_programs`; not started yet, which is up to the caller. What compiled
            signatures are asked for, and the default one, is compiled in their thread.
        hurry: whether of the plain signatures only the default one is run at once, and the others
            in that thread: one that fails is then only told of.

    Raises:
        Exception: a request failed.
        ValueError: a request is to an unknown signature.
    """
    requests = [(name or DEFAULT_SIGNATURE, inputs) for name, inputs in requests]
    for name, _ in requests:
        if name not in signatures:
            raise ValueError(f"a warm-up request is to {name[:100]!r}, which is no signature")
    if programs is None:
        warm_up(signatures, requests)
        return
    at_once: dict[str, Arrays] = {}
    for name, inputs in requests:
        signature = signatures[name]
        compiled = signatures.get(_twin(name), signature)
        if compiled.route and (name == DEFAULT_SIGNATURE or compiled is signature):
            programs.want(compiled.run_aside, compiled.name, inputs, uses=0)
        if compiled.route and compiled is signature:
            continue
        if name == DEFAULT_SIGNATURE or not hurry:
            # The graph of a signature is prepared by its first run, whatever the lengths are.
            at_once.setdefault(name, inputs)
        else:
            programs.add_task(functools.partial(_warm_up_aside, signature, inputs))
    warm_up(signatures, at_once.items())


def _warm_up_aside(signature: Signature, inputs: Arrays) -> None:
    try:
        signature.run_aside(inputs)
    except Exception:
        _log.exception("a warm-up request failed", extra={"signature": signature.name})


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
