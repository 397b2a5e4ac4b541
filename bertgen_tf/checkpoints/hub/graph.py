"""The graph of a SavedModel as one flat set of nodes, to be read and evaluated in parts.

TF1 while loops (Enter, Merge, Switch, NextIteration, Exit), functional ones (While, with bodies in
the function library) and calls of functions all look the same here: a loop variable is a `Merge`
node with two inputs, its first value and its next one. The `Switch` of a loop is a `LoopSwitch`,
which passes its value on; those of TF1's conditionals stay, and no value is read past their end.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from bertgen_tf.checks import first_line

# Node and index of one of its outputs.
Tensor = tuple[str, int]

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_LOOPS = ("While", "StatelessWhile")
_VARIABLES = ("VarHandleOp", "VariableV2", "Variable")
# Ops that pass on their first input, value for value.
SAME_VALUE = frozenset(
    "Identity Enter RefEnter Exit RefExit NextIteration LoopSwitch StopGradient EnsureShape "
    "Snapshot PreventGradient CheckNumerics ReadVariableOp".split()
)
# Ops that pass on all values of their first input, in another shape, order or type.
_SHAPES = frozenset("Reshape Squeeze ExpandDims Transpose".split())
SAME_VALUES = SAME_VALUE | _SHAPES | {"Cast"}


@dataclasses.dataclass
class Node:
    """One operation; `inputs` are those with data, without control inputs."""

    name: str
    op: str
    inputs: list[Tensor]
    attr: Any


@dataclasses.dataclass
class Loop:
    """A while loop: the names of its `Merge` nodes, and the tensor that keeps it running."""

    variables: list[str]
    condition: Tensor


class Graph:
    """Nodes of a meta graph, functions and loops inlined.

    Args:
        meta_graph: a `MetaGraphDef`.

    Attributes:
        nodes: name -> `Node`.
        loops: the loops, outer before inner ones of functions.
        main: names of the nodes that are in no function.

    Raises:
        ValueError: functions that are missing or call themselves.
    """

    def __init__(self, meta_graph: Any):
        self.nodes: dict[str, Node] = {}
        self.loops: list[Loop] = []
        self._aliases: dict[Tensor, Tensor] = {}
        self._constants: dict[Tensor, np.ndarray | None] = {}
        self._library = {f.signature.name: f for f in meta_graph.graph_def.library.function}
        main = meta_graph.graph_def.node
        self.main = {node.name for node in main}
        for node in main:
            self._add(node, node.name, [parse(name) for name in _data(node.input)], 0)
        for node in self.nodes.values():
            node.inputs = [self._resolve(tensor) for tensor in node.inputs]
        for loop in self.loops:
            loop.condition = self._resolve(loop.condition)
            for name in loop.variables:
                first, following = self.nodes[name].inputs
                if self.source(following)[0] == name:  # captured by the loop, never changed
                    self.nodes[name] = Node(name, "Enter", [first], self.nodes[name].attr)
            loop.variables = [n for n in loop.variables if self.nodes[n].op == "Merge"]
        self._read_old_loops()
        for node in self.nodes.values():
            if node.op == "Switch" and self.op(node.inputs[1]) == "LoopCond":
                node.op = "LoopSwitch"  # a value is not computed from what lets it pass
                del node.inputs[1:]
        self.loop_variables = {name for loop in self.loops for name in loop.variables}
        self.consumers: dict[str, list[tuple[str, int]]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for index, (name, _) in enumerate(node.inputs):
                if name in self.consumers:
                    self.consumers[name].append((node.name, index))

    # Construction

    def _add(self, proto: Any, name: str, inputs: list[Tensor], depth: int) -> None:
        if depth > 50:
            raise ValueError(f"the function of node {name} calls itself")
        if proto.op in _LOOPS:
            self._add_loop(proto, name, inputs, depth)
        elif proto.op in _CALLS or proto.op in self._library:
            function = proto.attr["f"].func.name if proto.op in _CALLS else proto.op
            results = self._inline(function, f"{name}/", inputs, depth)
            self._aliases |= {(name, i): tensor for i, tensor in enumerate(results)}
        else:
            self.nodes[name] = Node(name, proto.op, inputs, proto.attr)

    def _add_loop(self, proto: Any, name: str, inputs: list[Tensor], depth: int) -> None:
        merges = [(f"{name}/merge_{i}", 0) for i in range(len(inputs))]
        loop = Loop([merge for merge, _ in merges], merges[0])
        self.loops.append(loop)
        body = proto.attr["body"].func.name
        following = self._inline(body, f"{name}/body/", merges, depth)
        loop.condition = self._inline(proto.attr["cond"].func.name, f"{name}/cond/", merges, depth)[
            0
        ]
        types = [arg.type for arg in self._library[body].signature.input_arg]
        for i, merge in enumerate(merges):
            attr = {"T": tf.compat.v1.AttrValue(type=types[i])}
            self.nodes[merge[0]] = Node(merge[0], "Merge", [inputs[i], following[i]], attr)
            self._aliases[name, i] = merge

    def _inline(
        self, function: str, prefix: str, arguments: list[Tensor], depth: int
    ) -> list[Tensor]:
        if function not in self._library:
            raise ValueError(f"node {prefix[:-1]} calls a function {function} that is missing")
        definition = self._library[function]
        own = {
            arg.name: tensor
            for arg, tensor in zip(definition.signature.input_arg, arguments, strict=False)
        }
        protos = {node.name: node for node in definition.node_def}

        def tensor(text: str) -> Tensor:
            node, *output = text.split(":")
            if node in own and not output:
                return own[node]
            if not output:
                return prefix + node, 0
            index = int(output[1]) if len(output) == 2 else 0
            return prefix + node, index + self._first_output(protos.get(node), output[0])

        for node in definition.node_def:
            inputs = [tensor(text) for text in _data(node.input)]
            self._add(node, prefix + node.name, inputs, depth + 1)
        return [tensor(definition.ret[arg.name]) for arg in definition.signature.output_arg]

    def _first_output(self, proto: Any, output: str) -> int:
        """The index of an output that a function's body names, as the op defines it."""
        op = proto.op if proto is not None else ""
        known = self._library[op].signature if op in self._library else op_def_registry.get(op)
        index = 0
        for arg in known.output_arg if known is not None else ():
            if arg.name == output:
                return index
            if arg.number_attr:
                index += proto.attr[arg.number_attr].i
            else:
                index += len(proto.attr[arg.type_list_attr].list.type) if arg.type_list_attr else 1
        raise ValueError(
            f"a function reads the output {output} of {op or 'nothing'}, which does not exist"
        )

    def _resolve(self, tensor: Tensor) -> Tensor:
        while tensor in self._aliases:
            tensor = self._aliases[tensor]
        return tensor

    def _read_old_loops(self) -> None:
        """TF1's loops: each `Merge` of an `Enter` and a `NextIteration`, by frame."""
        frames: dict[str, Loop] = {}
        for node in self.nodes.values():
            if node.op != "Switch" or self.op(node.inputs[0]) != "Merge":
                continue
            merge = self.nodes[node.inputs[0][0]]
            condition = self.nodes.get(node.inputs[1][0])
            enter = next((t for t in merge.inputs if self.op(t) in ("Enter", "RefEnter")), None)
            if enter is None or condition is None or condition.op != "LoopCond":
                continue  # a conditional
            merge.inputs = [enter, *(t for t in merge.inputs if t != enter)]
            frame = self.nodes[enter[0]].attr["frame_name"].s.decode()
            loop = frames.setdefault(frame, Loop([], condition.inputs[0]))
            loop.variables.append(merge.name)
        self.loops += frames.values()

    # Reading

    def op(self, tensor: Tensor) -> str:
        """The op that makes a tensor; empty if there is none."""
        return self.nodes[tensor[0]].op if tensor[0] in self.nodes else ""

    def resolve(self, name: str) -> Tensor:
        """The tensor of a name as signatures have it, `node:0`."""
        return self._resolve(parse(name))

    def source(self, tensor: Tensor, through: Iterable[str] = SAME_VALUE) -> Tensor:
        """Where a tensor's values come from: back through ops that only pass them on."""
        seen = {tensor}
        while self.op(tensor) in through and self.nodes[tensor[0]].inputs:
            tensor = self.nodes[tensor[0]].inputs[0]
            if tensor in seen:
                break
            seen.add(tensor)
        return tensor

    def before(
        self, tensors: Iterable[Tensor], stop: Iterable[str] = (), *, values: bool = False
    ) -> list[str]:
        """Names of the nodes that tensors are computed from, nearest first.

        Loop variables are included, but not what they are computed from: only one iteration is
        seen. What lies before the nodes of `stop` is excluded, and so is, with `values`, what only
        determines the shape of values.
        """
        stop = set(stop)
        found = dict.fromkeys(name for name, _ in tensors if name in self.nodes)
        queue = list(found)
        for name in queue:  # grows
            if name in stop or name in self.loop_variables:
                continue
            node = self.nodes[name]
            for source, _ in node.inputs[:1] if values and node.op in _SHAPES else node.inputs:
                if source in self.nodes and source not in found:
                    found[source] = None
                    queue.append(source)
        return queue

    def uses(self, name: str, through: Iterable[str] = SAME_VALUES) -> list[tuple[Node, int]]:
        """Which nodes read a node's values, and as which input, past ops that only pass them on."""
        through = {*through, "Switch"}  # in whichever branch
        found = []
        seen = {name}
        queue = [name]
        for current in queue:  # grows
            for consumer, index in self.consumers[current]:
                node = self.nodes[consumer]
                if node.op in through and index == 0:
                    if consumer not in seen:
                        seen.add(consumer)
                        queue.append(consumer)
                elif (node, index) not in found:
                    found.append((node, index))
        return found

    def variable(self, tensor: Tensor) -> str | None:
        """The node of the variable whose value a tensor is."""
        name = self.source(tensor, SAME_VALUES)[0]
        return name if name in self.nodes and self.nodes[name].op in _VARIABLES else None

    def variables(self) -> dict[str, str]:
        """Name in the checkpoint -> node, of all variables."""
        found = {}
        for node in self.nodes.values():
            if node.op in _VARIABLES:
                shared = node.attr["shared_name"].s.decode()
                found[shared or node.name] = node.name
        return found

    def constant(self, tensor: Tensor) -> np.ndarray | None:
        """The value of a tensor that is computed from constants alone; None for all others.

        None also if TensorFlow cannot compute it outside the module.
        """
        if tensor not in self._constants:
            self._constants[tensor] = None
            names = self.before([tensor])
            if names and not self.loop_variables & set(names) and not self.leaves(names):
                with contextlib.suppress(ValueError):
                    self._constants[tensor] = self.evaluate(tensor, {})
        return self._constants[tensor]

    def leaves(self, names: Iterable[str]) -> list[str]:
        """Those of some nodes that bring in values from outside, and are not constants.

        The end of a TF1 conditional is among them: what it depends on is not only in its inputs.
        """
        return [name for name in names if self._is_leaf(name)]

    def _is_leaf(self, name: str) -> bool:
        node = self.nodes[name]
        if node.op in ("Merge", "RefMerge"):
            return name not in self.loop_variables
        return node.op == "PlaceholderWithDefault" or (not node.inputs and node.op != "Const")

    def evaluate(
        self,
        tensor: Tensor,
        feeds: dict[Tensor, np.ndarray],
        *,
        elementwise: bool = False,
        without: Iterable[str] = (),
    ) -> np.ndarray:
        """The value of a tensor, given the values of others.

        Args:
            tensor: what to compute.
            feeds: tensor -> array of its dtype.
            elementwise: leaves out changes of shape, so that feeds may all have any one shape.
            without: further ops to leave out, in favour of their first input.

        Raises:
            ValueError: it also depends on something other than `feeds` and constants, which the
                message names.
        """
        through = {*SAME_VALUE, *(_SHAPES if elementwise else ()), *without}
        graph = tf.Graph()
        protos: dict[str, Any] = {}
        places = {feed: f"given_to_evaluate_{i}" for i, feed in enumerate(feeds)}

        def place(current: Tensor) -> str:
            while current not in places and self.op(current) in through:
                if not self.nodes[current[0]].inputs:
                    break
                current = self.nodes[current[0]].inputs[0]
            if current in places:
                return places[current]
            needed.append(current[0])
            return f"{current[0]}:{current[1]}"

        needed: list[str] = []
        result = place(tensor)
        for name in needed:  # grows
            if name in protos:
                continue
            node = self.nodes.get(name)
            if node is None or name in self.loop_variables or self._is_leaf(name):
                what = f"{node.op} {name}" if node else name
                raise ValueError(f"{tensor[0]} is computed from {what}")
            proto = tf.compat.v1.NodeDef(name=name, op=node.op)
            proto.input.extend(place(source) for source in node.inputs)
            for key in node.attr:
                if not key.startswith("_"):
                    proto.attr[key].CopyFrom(node.attr[key])
            protos[name] = proto
        with graph.as_default(), tf.device("CPU"):
            for feed, name in places.items():
                tf.compat.v1.placeholder(feeds[feed].dtype, name=name)
            try:
                tf.graph_util.import_graph_def(
                    tf.compat.v1.GraphDef(node=protos.values()),
                    input_map={f"{name}:0": graph.get_tensor_by_name(f"{name}:0")
                               for name in places.values()},
                    name="",
                )  # fmt: skip
                config = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
                with tf.compat.v1.Session(graph=graph, config=config) as session:
                    named = {f"{places[feed]}:0": value for feed, value in feeds.items()}
                    result = result if ":" in result else f"{result}:0"
                    return np.asarray(session.run(result, named))
            except (tf.errors.OpError, KeyError, TypeError) as error:
                raise ValueError(f"{tensor[0]} cannot be computed: {first_line(error)}") from error

    def first_element(self, tensor: Tensor) -> Any:
        """The first element of a tensor that is assembled from constants; None if it is not."""
        value = self.constant(tensor)
        if value is not None:
            return value.flat[0] if value.size else None
        node = self.nodes.get(tensor[0])
        if node is None or tensor[0] in self.loop_variables:
            return None
        if node.op == "Fill":
            value = self.constant(node.inputs[1])
            return None if value is None else value.flat[0]
        if node.op in ("ZerosLike", "OnesLike"):
            return int(node.op == "OnesLike")
        if node.op in ("Add", "AddV2", "Mul", "Sub"):
            first, second = (self.first_element(source) for source in node.inputs)
            combine: dict[str, Callable] = {"Mul": lambda a, b: a * b, "Sub": lambda a, b: a - b}
            known = first is not None and second is not None
            return combine.get(node.op, lambda a, b: a + b)(first, second) if known else None
        if node.op == "ConcatV2":
            parts = [part for part in node.inputs[:-1] if not self._is_empty(part)]
            return self.first_element(parts[0]) if parts else None
        begin = self.constant(node.inputs[1]) if node.op == "Slice" else np.zeros(1)
        first = SAME_VALUES | {"Tile", "BroadcastTo", "Pack", "Slice"}
        if node.op in first and begin is not None and not begin.any():
            return self.first_element(node.inputs[0])
        return None

    def _is_empty(self, tensor: Tensor) -> bool:
        """Whether a tensor is known to hold nothing."""
        value = self.constant(tensor)
        if value is not None:
            return value.size == 0
        node = self.nodes.get(self.source(tensor)[0])
        if node is None or node.op != "Fill":
            return False
        shape = self.nodes.get(self.source(node.inputs[0], SAME_VALUES)[0])
        if shape is None or shape.op not in ("Pack", "ConcatV2"):
            return False
        parts = shape.inputs[: -1 if shape.op == "ConcatV2" else None]
        sizes = [self.constant(part) for part in parts]
        return any(size is not None and (size == 0).any() for size in sizes)

    def after_loop(self, name: str) -> Tensor | None:
        """The tensor outside functions that is a loop variable's last value, if there is one."""
        for node in self.nodes.values():
            if node.op in ("Exit", "RefExit") and self.source((node.name, 0))[0] == name:
                return (node.name, 0) if node.name in self.main else None
        tensor = next((alias for alias, of in self._aliases.items() if of == (name, 0)), None)
        return tensor if tensor is not None and tensor[0] in self.main else None

    def ops_of(self, names: Iterable[str], most: int = 6) -> str:
        """The kinds of some nodes, for messages."""
        ops = list(dict.fromkeys(self.nodes[name].op for name in names))
        return ", ".join(ops[:most]) + (", ..." if ops[most:] else "")


def parse(name: str) -> Tensor:
    """`node:1` -> ("node", 1)."""
    node, _, index = name.partition(":")
    return node, int(index or 0)


def _data(inputs: Sequence[str]) -> list[str]:
    return list(itertools.takewhile(lambda name: not name.startswith("^"), inputs))
