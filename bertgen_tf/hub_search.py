"""Reading the search of an original off its graph: start, end, lengths, beams, penalty.

The graph is followed, not its names: the loop is the one that takes the best candidates (TopKV2),
and functions of its counter (how long it runs, the length penalty) and of ids (which of them are
shown) are computed and compared with ours.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bertgen_tf.graph import SAME_VALUES, Graph, Loop, Node, Tensor
from bertgen_tf.hub_layers import MATMULS, gathers, shortest

_TOP = ("TopKV2", "TopK")
_COMPARISONS = ("Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual")
_SLICES = ("StridedSlice", "Slice", "GatherV2", "Gather", "GatherNd")
# No search is longer.
_MOST_STEPS = 4096
_FLOATS = (1, 2, 14, 19)  # DT_FLOAT, DT_DOUBLE, DT_BFLOAT16, DT_HALF


@dataclasses.dataclass
class Found:
    """What was read, by field of `hub_originals.SETTINGS`, and why the rest was not.

    Attributes:
        values: field -> value, of what the graph tells.
        unread: field -> what the graph does instead of what our search can do.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    unread: dict[str, str] = dataclasses.field(default_factory=dict)

    def read(self, field: str, function: Callable[[], Any]) -> None:
        """Keeps what `function` gives (None: not in the graph) or the message of its error."""
        try:
            value = function()
        except ValueError as error:
            self.unread[field] = str(error)
        else:
            if value is not None:
                self.values[field] = value


def read_search(graph: Graph, embeddings: str, vocab_size: int, output: Tensor) -> Found:
    """Reads the settings of the search.

    Args:
        graph: of the module.
        embeddings: node of the decoder's word embeddings.
        vocab_size: rows of these.
        output: the strings that the module gives.

    Returns:
        `bos_token_id` (the start token), `eos_token_id`, `max_new_tokens`, `num_beams`,
        `gnmt_alpha`, `normalize_unfinished` and `shown`, a bool [vocab_size]: which ids become
        text. Under `logits`, if it is unread, stands what else is done to them.
    """
    found = Found()
    loops = [loop for loop in graph.loops if _tops(graph, loop)]
    if len(loops) != 1:
        for field in ("bos_token_id", "eos_token_id", "max_new_tokens", "num_beams", "gnmt_alpha"):
            found.unread[field] = (
                f"the graph has {len(loops)} loops that choose the best candidates with TopKV2, "
                "instead of one"
            )
        return found
    search = _Search(graph, loops[0], embeddings, vocab_size)
    found.read("logits", search.check_log_probs)
    found.read("num_beams", search.num_beams)
    found.read("bos_token_id", search.start)
    found.read("eos_token_id", search.end)
    found.read("max_new_tokens", search.steps)
    found.read("gnmt_alpha", search.alpha)
    steps, alpha = found.values.get("max_new_tokens"), found.values.get("gnmt_alpha")
    if steps and alpha is not None:
        found.read("normalize_unfinished", lambda: search.normalizes(steps, alpha))
    end = found.values.get("eos_token_id")
    if end is not None:
        found.read("shown", lambda: _shown_ids(graph, output, vocab_size, end))
    return found


def _iteration(graph: Graph, loop: Loop) -> list[str]:
    """Names of the nodes of one iteration, the loop variables among them."""
    return graph.before([graph.nodes[name].inputs[1] for name in loop.variables])


def _tops(graph: Graph, loop: Loop) -> list[Node]:
    return [graph.nodes[n] for n in _iteration(graph, loop) if graph.nodes[n].op in _TOP]


class _Search:
    """The beam search of one loop."""

    def __init__(self, graph: Graph, loop: Loop, embeddings: str, vocab_size: int):
        self.graph = graph
        self.loop = loop
        self.embeddings = embeddings
        self.vocab_size = vocab_size
        self.names = _iteration(graph, loop)
        self.inside = set(self.names)
        tops = _tops(graph, loop)
        self.first = [
            top
            for top in tops
            if not any(graph.nodes[n].op in _TOP for n in graph.before(top.inputs))
        ]
        self.later = [top for top in tops if top not in self.first]
        # Counters: name -> first value. They grow by one in each iteration.
        self.counters: dict[str, int] = {}
        for name in loop.variables:
            first, following = graph.nodes[name].inputs
            node = graph.nodes.get(graph.source(following)[0])
            value = graph.constant(first)
            if node is None or node.op not in ("Add", "AddV2") or value is None:
                continue
            others = [t for t in node.inputs if graph.source(t)[0] != name]
            if len(others) == 1 and value.size == 1 and graph.constant(others[0]) == 1:
                self.counters[name] = int(value)

    def num_beams(self) -> int | None:
        """From how many candidates are kept: twice the beams, then the beams."""
        graph = self.graph
        if len(self.first) != 1:
            raise ValueError(f"{len(self.first)} TopKV2 choose among all tokens, instead of one")
        sizes = [graph.constant(_size(top)) for top in (*self.first, *self.later)]
        if any(size is None for size in sizes):
            return None
        candidates, *kept = (int(size) for size in sizes)
        if not kept or set(kept) != {candidates // 2} or candidates % 2:
            raise ValueError(
                f"the best {candidates} candidates are kept, and then {kept or 'nothing'}; our "
                "search keeps twice as many candidates as beams"
            )
        return kept[0]

    def check_log_probs(self) -> None:
        """Raises unless logits are the decoder's output times its word embeddings."""
        graph = self.graph
        logits = [
            node
            for node, _ in graph.uses(self.embeddings)
            if node.op in MATMULS and node.name in self.inside
        ]
        if len(logits) != 1:
            raise ValueError(
                f"the decoder's word embeddings give logits at {len(logits)} places of the search"
            )
        queue = [logits[0].name]
        for name in queue:  # grows
            for consumer, _ in graph.consumers[name]:
                op = graph.nodes[consumer].op
                if op in SAME_VALUES or op in _SLICES or op == "ConcatV2":
                    queue.append(consumer)
                elif consumer in self.inside and op not in ("LogSoftmax", "Sub", "Max", "Shape"):
                    raise ValueError(f"{op} {consumer} changes the logits before their softmax")
        names = graph.before([top.inputs[0] for top in self.first])
        ops = {graph.nodes[name].op for name in names}
        if "LogSoftmax" not in ops and not {"Exp", "Log"} <= ops:
            raise ValueError("the scores are no log-probabilities: there is no LogSoftmax")

    def start(self) -> int | None:
        """The first element of what the loop looks up in the embeddings at first."""
        graph = self.graph
        looked_up = [
            ids for node, ids in gathers(graph, self.embeddings) if node.name in self.inside
        ]
        names = {n for ids in looked_up for n in graph.before([ids]) if n in self.loop.variables}
        values = {graph.first_element(graph.nodes[n].inputs[0]) for n in names - set(self.counters)}
        if len(values) > 1:
            raise ValueError(f"the search starts with any of {sorted(map(str, values))}")
        value = values.pop() if values else None
        return None if value is None else int(value)

    def end(self) -> int | None:
        """What the chosen tokens are compared with."""
        graph, found = self.graph, set()
        for name in self.names:
            node = graph.nodes[name]
            if node.op not in ("Equal", "NotEqual"):
                continue
            for i in (0, 1):
                value = graph.constant(node.inputs[i])
                if value is None or value.size != 1 or value.dtype.kind not in "iu":
                    continue
                chosen = graph.before([node.inputs[1 - i]])
                if self.first and self.first[0].name in chosen:
                    found.add(int(value.item()))
        if len(found) > 1:
            raise ValueError(f"the chosen tokens are compared with {sorted(found)}: one end token")
        return found.pop() if found else None

    def steps(self) -> int | None:
        """How often the loop runs at most, from the parts of its condition that count."""
        found = []
        queue = [self.loop.condition]
        for tensor in queue:  # grows
            source = self.graph.source(tensor)
            node = self.graph.nodes.get(source[0])
            if node is not None and node.op == "LogicalAnd":
                queue += node.inputs
                continue
            names = self.graph.before([source])
            used = {name for name in names if name in self.loop.variables}
            if used and used <= set(self.counters):
                if leaves := self.graph.leaves(names):
                    raise ValueError(f"the number of steps depends on {', '.join(leaves[:4])}")
                goes_on = self._of_counter(source, _MOST_STEPS)
                found.append(_MOST_STEPS if goes_on.all() else int(np.argmin(goes_on)))
        return min(found) if found and min(found) < _MOST_STEPS else None

    def alpha(self) -> float | None:
        """The exponent of the length penalty, from the divisions of scores by what counts."""
        graph, found = self.graph, {}
        scores = {node.name for node in self.first}
        scores |= {n for n in self.names if graph.nodes[n].op == "LogSoftmax"}
        for name in self.names:
            node = graph.nodes[name]
            if node.op not in ("RealDiv", "Div", "Mul"):
                continue
            for i in (1,) if node.op != "Mul" else (0, 1):
                penalty, score = node.inputs[i], node.inputs[1 - i]
                if self._counts([penalty]) and scores & set(graph.before([score])):
                    values = self._of_counter(penalty, 64)
                    if node.op == "Mul" and values[-1] < 1:
                        values = 1 / values  # else it makes the sum of a score again
                    found[name] = (values, penalty)
        alphas = {self._exponent(name, *values) for name, values in found.items()}
        if len(alphas) > 1:
            raise ValueError(f"scores are divided by several penalties, {sorted(alphas)}")
        return alphas.pop() if alphas else None

    def _exponent(self, name: str, values: np.ndarray, penalty: Tensor) -> float:
        graph = self.graph
        base = np.log((5 + np.arange(1, 1 + len(values))) / 6)
        fitted = np.log(values[-1]) / base[-1]
        powers = [graph.nodes[n] for n in graph.before([penalty]) if graph.nodes[n].op == "Pow"]
        exponents = [graph.constant(node.inputs[1]) for node in powers]
        exponents = [shortest(abs(e.item())) for e in exponents if e is not None and e.size == 1]
        near = [e for e in exponents if abs(e - fitted) < 1e-4]
        alpha = near[0] if near else round(float(fitted), 4)
        if not np.allclose(np.log(values), alpha * base, atol=1e-4):
            shown = ", ".join(f"{value:.4g}" for value in values[:4])
            raise ValueError(
                f"the length penalty of {name} is {shown} for 1, 2, 3, 4 tokens, which is not "
                "((5 + length) / 6)**alpha"
            )
        return alpha

    def normalizes(self, steps: int, alpha: float) -> bool | None:
        """Whether a score that did not finish is divided, after the loop, by the penalty."""
        graph = self.graph
        sums = self._sums()
        during = self.inside | set(graph.before([self.loop.condition]))
        users = [use for name in sums for use in _after_loop(graph, name, during)]
        divisions = [n for n in users if n.op in ("RealDiv", "Div")]
        for node in divisions:
            value = graph.constant(node.inputs[1])
            if value is None or not np.allclose(value, ((5 + steps) / 6) ** alpha, rtol=1e-4):
                raise ValueError(f"{node.name} divides scores that did not finish by {value}")
        if divisions:
            return True
        return False if any(node.op.startswith("Select") for node in users) else None

    def _sums(self) -> list[str]:
        """The loop variables that the log-probabilities of the next token are added to."""
        graph = self.graph
        stop = {n for n in self.names if graph.nodes[n].op in ("LogSoftmax", *MATMULS)}
        names = graph.before(self.first[0].inputs[:1], stop) if self.first else []
        return [n for n in names if n in self.loop.variables and n not in self.counters]

    def _counts(self, tensors: Iterable[Tensor]) -> bool:
        """Whether tensors are computed from counters and constants alone, and from a counter."""
        names = self.graph.before(tensors)
        used = {name for name in names if name in self.loop.variables}
        return bool(used) and used <= set(self.counters) and not self.graph.leaves(names)

    def _of_counter(self, tensor: Tensor, steps: int) -> np.ndarray:
        """The values of a function of the counters in the first iterations."""
        feeds = {}
        for name in self.graph.before([tensor]):
            if name in self.counters:
                dtype = np.int64 if self.graph.nodes[name].attr["T"].type == 9 else np.int32
                first = self.counters[name]
                feeds[name, 0] = np.arange(first, first + steps, dtype=dtype)
        values = self.graph.evaluate(tensor, feeds, elementwise=True)
        return np.broadcast_to(values, [steps])


def _size(top: Node) -> Tensor:
    if len(top.inputs) < 2:
        raise ValueError(f"{top.name} has its size as an attribute")
    return top.inputs[1]


def _after_loop(graph: Graph, name: str, during: set[str]) -> list[Node]:
    """Who reads the last value of a loop variable, past slices."""
    found, queue = [], [name]
    for current in queue:  # grows
        for consumer, index in graph.consumers[current]:
            node = graph.nodes[consumer]
            if consumer in during and node.op != "Switch":
                continue
            if node.op in SAME_VALUES or node.op in _SLICES:
                if index == 0 and consumer not in queue:
                    queue.append(consumer)
            elif node not in found:
                found.append(node)
    return found


def _shown_ids(graph: Graph, output: Tensor, vocab_size: int, end: int) -> np.ndarray | None:
    """Which ids become text, from the mask that is applied to them after the search."""
    found, problems = [], []
    for name in graph.before([output]):
        if graph.nodes[name].op == "Where":
            try:
                found.append(_masked_ids(graph, graph.nodes[name], vocab_size, end))
            except ValueError as error:  # of another mask, by which text is put together
                problems.append(str(error))
    if not found and problems:
        raise ValueError(problems[0])
    if any((other != found[0]).any() for other in found):
        raise ValueError(f"{len(found)} different masks are applied to the ids")
    return found[0] if found else None


def _masked_ids(graph: Graph, where: Node, vocab_size: int, end: int) -> np.ndarray:
    mask = graph.source(where.inputs[0], SAME_VALUES)
    operands: dict[str, Tensor] = {}
    for name in graph.before([mask]):
        node = graph.nodes[name]
        for i in (0, 1) if node.op in _COMPARISONS else ():
            value = graph.constant(node.inputs[i])
            other = graph.source(node.inputs[1 - i])
            if value is not None and value.dtype.kind in "iu":
                if graph.loop_variables & set(graph.before([other])):
                    operands[name] = other
    # The ids themselves, not what is counted from such comparisons of them.
    compared = {ids for ids in operands.values() if not set(operands) & set(graph.before([ids]))}
    if len(compared) != 1:
        raise ValueError(f"the ids are masked by {graph.ops_of(graph.before([mask])[:9])}")
    ids = compared.pop()
    integers = [np.int32, np.int64]
    for dtype in integers:
        try:
            each = graph.evaluate(mask, {ids: np.arange(vocab_size, dtype=dtype)[:, None]})
            other = int(np.argmax(each.ravel()))
            ended = graph.evaluate(mask, {ids: np.array([[other, end, other]], dtype)})
        except ValueError:
            if dtype == integers[-1]:
                raise
        else:
            break
    if ended.ravel().tolist() != [True, False, False]:
        raise ValueError(f"{where.name} also shows ids from the first end token on")
    return each.reshape(vocab_size)
