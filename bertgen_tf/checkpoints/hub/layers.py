"""BERT's layers in a TF1 Hub module: their variables' names, and what only the graph contains.

The graph is followed from the variables on, so that neither scope names nor the loop that a
decoder runs in matter: activation, epsilon and heads are read wherever a stack is used, and all
uses must agree.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bertgen_tf.checkpoints.hub.graph import SAME_VALUE, SAME_VALUES, Graph, Node, Tensor
from bertgen_tf.config import HIDDEN_ACTS
from bertgen_tf.network.layers import activation
from bertgen_tf.network.weights import Rule

MATMULS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum")
ADDS = ("BiasAdd", "Add", "AddV2")
SLICES = ("StridedSlice", "Slice", "GatherV2", "Gather", "GatherNd")
_GATHERS = ("ResourceGather", "GatherV2", "Gather")
_NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")


def scope_of(names: Any) -> str | None:
    """What precedes `bert/` in the names of a TF1 module; None if it has no such names."""
    endings = re.compile(r"((?:.*/)?)bert/embeddings/word_embeddings")
    return next((match[1] for name in names if (match := endings.fullmatch(name))), None)


def depth(pattern: str, names: Any) -> int:
    """How many layers there are, where the first group of `pattern` is their number."""
    return 1 + max(int(match[1]) for name in names if (match := re.match(pattern, name)))


def layer_rules(source: str) -> tuple[Rule, ...]:
    """Rules for the layers below a scope, named as in `google-research/bert` `modeling.py`.

    With the names of cross-attention in `google/bertseq2seq` modules: `encdec`, `encdec_output`.
    """
    layer = source + r"/layer_(\d+)/"
    names = (
        ("attention/self/(query|key|value)/(kernel|bias)", r"self_attention/\2/\3"),
        ("attention/output/dense/(kernel|bias)", r"self_attention/output_dense/\2"),
        ("attention/output/LayerNorm/(gamma|beta)", r"self_attention/layer_norm/\2"),
        ("attention/encdec/(query|key|value)/(kernel|bias)", r"cross_attention/\2/\3"),
        ("attention/encdec_output/dense/(kernel|bias)", r"cross_attention/output_dense/\2"),
        ("attention/encdec_output/LayerNorm/(gamma|beta)", r"cross_attention/layer_norm/\2"),
        ("intermediate/dense/(kernel|bias)", r"feed_forward/intermediate/\2"),
        ("output/dense/(kernel|bias)", r"feed_forward/output_dense/\2"),
        ("output/LayerNorm/(gamma|beta)", r"feed_forward/layer_norm/\2"),
    )
    # Our kernels have the layout [outputs, inputs]; vectors are unchanged.
    return tuple(Rule(layer + name, r"layer_\1/" + target, np.transpose) for name, target in names)


def read_layers(graph: Graph, source: str, norms: str, layers: str) -> dict[str, Any]:
    """`hidden_act`, `layer_norm_eps` and `num_attention_heads` of a stack.

    Args:
        graph: of the module.
        source: the module's name, for errors.
        norms: regular expression for the names of its normalisations' gammas.
        layers: regular expression for the names of its layers, such as `bert/encoder/layer_0/`.

    Raises:
        ValueError: one of the three cannot be read, is not one that our layers have, or is not the
            same everywhere; the message says what the graph does instead.
    """
    variables = graph.variables()
    kernels = {n: v for n, v in variables.items() if re.fullmatch(layers + ".*", n)}
    found: dict[str, dict[Any, str]] = {}
    problems = []

    def read(field: str, function: Any, nodes: Iterable[Any]) -> None:
        values = found.setdefault(field, {})
        for node in nodes:
            try:
                values.setdefault(function(graph, *node), node[0].name)
            except ValueError as error:
                problems.append(f"{field}: {error}")
        if not values and not any(p.startswith(field) for p in problems):
            problems.append(f"{field}: its layers are not used as BERT's are")
        if len(values) > 1:
            problems.append(
                f"{field}: {' and '.join(f'{v} at {name}' for v, name in values.items())}"
            )

    def uses(nodes: Iterable[str], ops: Sequence[str]) -> list[tuple[Node, int]]:
        return [(use, at) for node in nodes for use, at in graph.uses(node) if use.op in ops]

    def named(pattern: str) -> list[str]:
        return [node for name, node in kernels.items() if re.search(pattern, name)]

    gammas = [node for name, node in variables.items() if re.fullmatch(norms, name)]
    read("layer_norm_eps", _epsilon, uses(gammas, ("Mul", *_NORMS)))
    biases = {use.name for use, _ in uses(named("intermediate/dense/bias"), ADDS)}
    outputs = uses(named(r"layer_\d+/output/dense/kernel"), MATMULS)
    read("hidden_act", _activation, [(use, at, biases) for use, at in outputs])
    shapes = [graph.nodes[node].attr["shape"].shape for node in named("self/query/bias")]
    hidden = shapes[0].dim[0].size if shapes else 0
    queries = uses(named("attention/(self|encdec)/query/bias"), ADDS)
    read("num_attention_heads", _heads, [(use, at, hidden) for use, at in queries])
    if problems:
        problems = list(dict.fromkeys(problems))
        more = f"; and {len(problems) - 4} more" if problems[4:] else ""
        raise ValueError(
            f"{source} should compute BERT's layers in a way that can be read, but could not be "
            f"read for {'; '.join(problems[:4])}{more}."
        )
    return {field: next(iter(values)) for field, values in found.items()}


def shortest(value: Any) -> float:
    """The shortest decimal that is the same float32: 1e-12, not 9.99999996e-13."""
    return float(str(np.float32(value)))


def _epsilon(graph: Graph, node: Node, at: int) -> float:
    if node.op in _NORMS:
        return shortest(node.attr["epsilon"].f)
    names = graph.before([t for i, t in enumerate(node.inputs) if i != at])
    root = next((graph.nodes[n] for n in names if graph.nodes[n].op in ("Rsqrt", "Sqrt")), None)
    if root is not None:
        sum_ = graph.nodes[graph.source(root.inputs[0])[0]]
        values = [graph.constant(tensor) for tensor in sum_.inputs]
        values = [value for value in values if value is not None and value.size == 1]
        if sum_.op in ("Add", "AddV2") and len(values) == 1:
            return shortest(values[0].item())
    raise ValueError(
        f"{node.name} multiplies gamma by something other than Rsqrt(variance + epsilon)"
    )


def _activation(graph: Graph, node: Node, at: int, biases: set[str]) -> str:
    """The function between the two projections of a feed-forward layer: it is run and compared."""
    result = node.inputs[1 - at]
    names = graph.before([result], stop=biases, values=True)
    start: list[Tensor] = [(name, 0) for name in names if name in biases]
    between = [n for n in names if n not in biases and graph.nodes[n].op not in SAME_VALUES]
    between = [n for n in between if graph.nodes[n].op != "Const"]
    values = np.linspace(-4, 4, 65, dtype=np.float32)
    if len(start) == 1:
        try:
            output = graph.evaluate(result, {start[0]: values}, elementwise=True)
        except ValueError as error:
            raise ValueError(f"{node.name} reads what cannot be computed: {error}") from error
        for name in HIDDEN_ACTS:
            expected = keras.ops.convert_to_numpy(activation(name)(tf.constant(values)))
            if output.shape == values.shape and np.abs(output - expected).max() < 1e-5:
                return name
    raise ValueError(
        f"{node.name} reads a function of the intermediate layer other than "
        f"{', '.join(HIDDEN_ACTS)}, made of {graph.ops_of(between) or 'nothing'}"
    )


def _heads(graph: Graph, node: Node, at: int, hidden: int) -> int:
    """From the shape given to queries, [batch, length, heads, size of a head], or to their bias."""
    bias = graph.nodes[graph.source(node.inputs[at])[0]]
    shape = _shape(graph, bias.inputs[1]) if bias.op == "Reshape" else []
    if len(shape) == 2 and shape[0] and shape[0] * (shape[1] or 0) == hidden:
        return shape[0]
    queue = [node.name]
    for name in queue:  # grows
        for consumer, index in graph.consumers[name]:
            reader = graph.nodes[consumer]
            if reader.op == "Reshape" and index == 0:
                shape = _shape(graph, reader.inputs[1])
                if len(shape) == 4 and shape[-1] and shape[-2]:
                    heads, size = shape[-2:]
                    heads = hidden // size if heads == -1 else heads
                    if size in (-1, hidden // heads) and hidden % heads == 0:
                        return heads
            scaled = reader.op in ("Mul", "RealDiv") and any(
                graph.constant(tensor) is not None for tensor in reader.inputs
            )
            if (reader.op in SAME_VALUE or reader.op == "Reshape" or scaled) and index == 0:
                queue.append(consumer)
    raise ValueError(f"the queries of {node.name} are not reshaped to four known dimensions")


def _shape(graph: Graph, tensor: Tensor) -> list[int | None]:
    """The dimensions of a shape, None for those that are not constants."""
    value = graph.constant(tensor)
    if value is not None:
        return [int(v) for v in np.ravel(value)]
    node = graph.nodes[graph.source(tensor, SAME_VALUES)[0]]
    if node.op in ("Pack", "ConcatV2"):
        parts = node.inputs[:-1] if node.op == "ConcatV2" else node.inputs
        values = [graph.constant(part) for part in parts]
        return [d for v in values for d in ([None] if v is None else [int(x) for x in np.ravel(v)])]
    return []


def gathers(graph: Graph, variable: str) -> list[tuple[Node, Tensor]]:
    """The look-ups in a matrix of embeddings: (node, tensor of the ids).

    They include products with one-hot rows, as google-research/bert's `embedding_lookup` makes them
    with `use_one_hot_embeddings`.
    """
    found = []
    for node, index in graph.uses(variable):
        if node.op in _GATHERS and index == 0:
            found.append((node, node.inputs[1]))
        elif node.op in MATMULS and len(node.inputs) == 2:
            other = graph.nodes.get(graph.source(node.inputs[1 - index], SAME_VALUES)[0])
            if other is not None and other.op == "OneHot":
                found.append((node, other.inputs[0]))
    return found


def normalized(graph: Graph, beta: str) -> list[str]:
    """The nodes that give the output of a layer normalisation, everywhere it is used.

    Args:
        graph: of the module.
        beta: node of its beta.
    """
    found = []
    for node, _ in graph.uses(beta):
        if node.op in ADDS:
            found.append(node.name)
        elif node.op == "Sub":  # batch_normalization: beta - mean * scale, then the rest is added
            found += [n for n, _ in graph.consumers[node.name] if graph.op((n, 0)) in ADDS]
    return found


def after_loop(graph: Graph, name: str, during: set[str]) -> list[Node]:
    """Which nodes read the last value of a loop variable, past slices."""
    found, queue = [], [name]
    for current in queue:  # grows
        for consumer, index in graph.consumers[current]:
            node = graph.nodes[consumer]
            if consumer in during and node.op != "LoopSwitch":
                continue
            if node.op in SAME_VALUES or node.op in SLICES:
                if index == 0 and consumer not in queue:
                    queue.append(consumer)
            elif node not in found:
                found.append(node)
    return found
