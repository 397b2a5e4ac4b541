"""Reading the search of an original from its graph: start, end, lengths, beams, penalty.

The graph is followed, not its names: the loop is the one that takes the best candidates (TopKV2).
Functions of its counter (how long it runs, the length penalty), of logits (their log-probabilities)
and of ids (which of them are shown) are computed and compared with ours. Every op between the last
layer and the first choice of candidates must be known; the condition is run on a few states.

Not read: what becomes of the candidates after that choice (which of them continue, which are kept
as answers, which answer is the best), and the first values of the loop variables, except ids. Only
the comparison of answers and scores (`verify`) checks these.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bertgen_tf.checkpoints.hub.graph import SAME_VALUES, Graph, Loop, Node, Tensor
from bertgen_tf.checkpoints.hub.layers import (
    MATMULS,
    SLICES,
    after_loop,
    gathers,
    normalized,
    shortest,
)
from bertgen_tf.checkpoints.hub.text import COMPARISONS, shown_ids

_TOP = ("TopKV2", "TopK")
_DIVISIONS = ("RealDiv", "Div")
# What may be done to scores after they were chosen; other ops could hide a penalty.
_HARMLESS = frozenset(
    (*COMPARISONS, *SLICES, *_DIVISIONS, *_TOP)
    + tuple("Add AddV2 Mul Sub ConcatV2 Shape Select SelectV2 Max Min IsFinite Merge".split())
    + ("ZerosLike", "OnesLike")
)
# No search is longer.
_MOST_STEPS = 4096


class Hidden(ValueError):
    """A setting is not in the graph, but given to it, or inside an op of its own."""


@dataclasses.dataclass
class Found:
    """What was read, by field of `originals.SETTINGS`, and why the rest was not.

    Attributes:
        values: field -> value, where the graph contains it.
        hidden: field -> why the graph does not contain it: it depends on what is given to the
            module, or is in an op of its own.
        unread: field -> what the graph does instead of what our search can do.
        scores: the loop variables that hold sums of log-probabilities, and scores of answers.
        ids: the ids that become text.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    hidden: dict[str, str] = dataclasses.field(default_factory=dict)
    unread: dict[str, str] = dataclasses.field(default_factory=dict)
    scores: tuple[str, str] | None = None
    ids: Tensor | None = None

    def read(self, field: str, function: Callable[[], Any]) -> None:
        """Keeps what `function` returns (None: not in the graph) or the message of its error."""
        try:
            value = function()
        except Hidden as error:
            self.hidden[field] = str(error)
        except ValueError as error:
            self.unread[field] = str(error)
        else:
            if value is not None:
                self.values[field] = value


def read_search(graph: Graph, embeddings: str, norm: str, vocab_size: int, output: Tensor) -> Found:
    """Reads the settings of the search.

    Args:
        graph: of the module.
        embeddings: node of the decoder's word embeddings.
        norm: node of the beta of the decoder's last normalisation.
        vocab_size: rows of the word embeddings.
        output: the strings that the module gives.

    Returns:
        `bos_token_id` (the start token), `eos_token_id`, `max_new_tokens`, `num_beams`,
        `gnmt_alpha`, `normalize_unfinished` and `shown`, a bool [vocab_size]: which ids become
        text. An unread `search` says what else is done to the scores, or to stop.
    """
    found = Found()
    loops = [loop for loop in graph.loops if _tops(graph, loop)]
    if len(loops) != 1:
        reason = (
            f"the graph has {len(loops)} loops that choose the best candidates with TopKV2, "
            "instead of one"
        )
        fields = ("bos_token_id", "eos_token_id", "max_new_tokens", "num_beams", "gnmt_alpha")
        (found.unread if loops else found.hidden).update(dict.fromkeys(fields, reason))
        return found
    search = _Search(graph, loops[0], embeddings, norm, vocab_size)
    found.read("search", search.check_scores)
    found.read("num_beams", search.num_beams)
    found.read("bos_token_id", search.start)
    found.read("eos_token_id", search.end)
    found.read("max_new_tokens", search.steps)
    found.read("gnmt_alpha", search.alpha)
    if "search" not in found.unread:
        found.read("search", lambda: search.check_stop(found.values.get("num_beams", 4)))
    found.scores = search.kept_scores()
    steps, alpha = found.values.get("max_new_tokens"), found.values.get("gnmt_alpha")
    if steps and alpha is not None:
        found.read("normalize_unfinished", lambda: search.normalizes(steps, alpha))
    end = found.values.get("eos_token_id")
    if end is not None:

        def shown() -> np.ndarray | None:
            found.ids, each = shown_ids(graph, output, vocab_size, end) or (None, None)
            return each

        found.read("shown", shown)
    return found


def _iteration(graph: Graph, loop: Loop) -> list[str]:
    """Names of the nodes of one iteration, the loop variables among them."""
    return graph.before([graph.nodes[name].inputs[1] for name in loop.variables])


def _tops(graph: Graph, loop: Loop) -> list[Node]:
    return [graph.nodes[n] for n in _iteration(graph, loop) if graph.nodes[n].op in _TOP]


class _Search:
    """The beam search of one loop."""

    def __init__(self, graph: Graph, loop: Loop, embeddings: str, norm: str, vocab_size: int):
        self.graph = graph
        self.loop = loop
        self.embeddings = embeddings
        self.norm = norm
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
        # What the candidates are chosen by: the log-probabilities, and the sums they are added to.
        self.log_probs: str | None = None
        self.sums: str | None = None
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
                self.counters[name] = int(value.item())

    def num_beams(self) -> int:
        """From how many candidates are kept: twice the beams, then the beams."""
        graph = self.graph
        if len(self.first) != 1:
            raise ValueError(f"{len(self.first)} TopKV2 choose among all tokens, instead of one")
        tops = (*self.first, *self.later)
        sizes = [graph.constant(_size(top)) for top in tops]
        if any(size is None for size in sizes):
            names = graph.before([_size(top) for top in tops])
            raise Hidden(f"it depends on {_listed(graph.leaves(names))}")
        candidates, *kept = (int(size) for size in sizes)
        if not kept or set(kept) != {candidates // 2} or candidates % 2:
            raise ValueError(
                f"the best {candidates} candidates are kept, and then {kept or 'nothing'}; our "
                "search keeps twice as many candidates as beams"
            )
        return kept[0]

    def check_scores(self) -> None:
        """Raises unless candidates are chosen by sums of the decoder's log-probabilities.

        They are followed back from the choice: a penalty, the sums, log-probabilities, logits, the
        word embeddings, the last normalisation.
        """
        graph = self.graph
        products = [
            node
            for node, _ in graph.uses(self.embeddings)
            if node.op in MATMULS and node.name in self.inside
        ]
        one_hot = [node for node, _ in gathers(graph, self.embeddings)]
        products = [node for node in products if node not in one_hot]
        if len(products) != 1 or len(self.first) != 1:
            raise ValueError(
                f"the decoder's word embeddings give logits at {len(products)} places of the "
                f"search, and {len(self.first)} TopKV2 choose among them"
            )
        (product,) = products
        through = {*SAME_VALUES, *SLICES}
        tensor = graph.source(self.first[0].inputs[0], through)
        while graph.op(tensor) in (*_DIVISIONS, "Mul"):  # from which `alpha` is read
            node = graph.nodes[tensor[0]]
            of = [t for t in node.inputs if product.name in graph.before([t])]
            tensor = graph.source(of[0], through) if len(of) == 1 else ("", 0)
        if graph.op(tensor) not in ("Add", "AddV2"):
            raise ValueError(
                f"{self._describe(tensor)} is what candidates are chosen by, instead of a sum "
                "of log-probabilities"
            )
        parts = [graph.source(t, through) for t in graph.nodes[tensor[0]].inputs]
        parts.sort(key=lambda part: part[0] in self.loop.variables)
        if parts[0][0] in self.loop.variables or parts[1][0] not in self.loop.variables:
            raise ValueError(
                f"log-probabilities are added to {self._describe(parts[1])} instead of their sum"
            )
        self.log_probs, self.sums = parts[0][0], parts[1][0]
        self._check_softmax(parts[0], (product.name, 0))
        states = [t for t in product.inputs if graph.variable(t) != self.embeddings]
        if graph.source(states[0], through)[0] not in normalized(graph, self.norm):
            state = graph.source(states[0], through)
            raise ValueError(
                f"{self._describe(state)} stands between the decoder's last normalisation and its "
                "logits"
            )

    def _check_softmax(self, log_probs: Tensor, logits: Tensor) -> None:
        graph = self.graph
        shape = (3, self.vocab_size)
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        expected = values - np.log(np.exp(values).sum(-1, keepdims=True))
        problem = ""
        for feed in (values, values[np.newaxis]):  # axes are numbers in the graph
            feeds = {logits: feed}
            try:
                given = graph.evaluate(log_probs, feeds, elementwise=True, without=SLICES)
            except ValueError as error:
                problem = str(error)
            else:
                if given.size == expected.size and np.allclose(
                    given.reshape(shape), expected, atol=1e-4
                ):
                    return
                problem = "they are another function"
                break
        names = graph.before([log_probs], stop=[logits[0]])
        between = [n for n in names if n != logits[0] and graph.nodes[n].op != "Const"]
        raise ValueError(
            f"{graph.ops_of(between)} stand between the logits and {log_probs[0]}, which should "
            f"be their log-probabilities: {problem}"
        )

    def _describe(self, tensor: Tensor) -> str:
        return f"{self.graph.op(tensor) or 'nothing known'} {tensor[0]}".strip()

    def start(self) -> int | None:
        """The first element of the ids that the loop first looks up in the embeddings."""
        graph = self.graph
        looked_up = [
            ids for node, ids in gathers(graph, self.embeddings) if node.name in self.inside
        ]
        names = {n for ids in looked_up for n in graph.before([ids], values=True)}
        names &= set(self.loop.variables)
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
            raise ValueError(
                f"the chosen tokens are compared with {sorted(found)}, not one end token"
            )
        return found.pop() if found else None

    def _conditions(self) -> list[tuple[Tensor, bool]]:
        """The parts of the loop's condition, and what each must be (False: negated)."""
        found, queue = [], [(self.loop.condition, True)]
        for tensor, wanted in queue:  # grows
            source = self.graph.source(tensor, SAME_VALUES)
            node = self.graph.nodes.get(source[0])
            op = node.op if node is not None else ""
            if op == "LogicalNot":
                queue.append((node.inputs[0], not wanted))
            elif op == ("LogicalAnd" if wanted else "LogicalOr"):
                queue += [(t, wanted) for t in node.inputs]
            else:
                found.append((source, wanted))
        return found

    def steps(self) -> int:
        """How often the loop runs at most, from the parts of its condition that count steps."""
        graph, found = self.graph, []
        for part, wanted in self._conditions():
            used = set(graph.before([part])) & set(self.loop.variables)
            if not used & set(self.counters):
                continue
            if used - set(self.counters):
                raise ValueError(f"{self._describe(part)} counts steps, and something else")
            if leaves := graph.leaves(graph.before([part])):
                raise Hidden(f"the number of steps depends on {_listed(leaves)}")
            goes_on = self._of_counter(part, _MOST_STEPS) == wanted
            found.append(_MOST_STEPS if goes_on.all() else int(np.argmin(goes_on)))
        if not found or min(found) == _MOST_STEPS:
            raise ValueError("the loop's condition bounds no counter of steps")
        return min(found)

    def check_stop(self, beams: int) -> None:
        """Raises if the search would stop where our search continues.

        It may stop by itself only when no hypothesis can still win. So its condition is run on
        states with a hypothesis that is better than all answers.
        """
        graph = self.graph
        for part, wanted in self._conditions():
            names = graph.before([part])
            used = {n for n in names if n in self.loop.variables} - set(self.counters)
            if not used:
                continue
            integers = {graph.nodes[name].attr["T"].type for name in self.counters}
            integer = np.int64 if 9 in integers else np.int32
            # Limit and exponent, if they are hidden: any number will do.
            hidden: dict[Tensor, Any] = {t: integer(9) for t in self._limits() if t[0] in names}
            for leaf in graph.leaves(names):
                node = graph.nodes[leaf]
                if node.op == "PlaceholderWithDefault" and node.attr["dtype"].type == 1:
                    hidden[leaf, 0] = np.float32(0.7)
            for answers, order in itertools.product((0, 1, beams), (1, -1)):
                # Beside a text whose search is over: all answers exist; no hypothesis is better.
                exist = np.stack([np.arange(beams) < answers, np.ones(beams, bool)])[::order]
                sums = np.stack([-0.1 - np.arange(beams), -1e6 - np.arange(beams)])[::order]
                scores = np.where(exist, np.array([[-5.0], [-0.01]])[::order], -1e9)
                feeds: dict[Tensor, Any] = dict(hidden)
                for name in used:
                    kind = graph.nodes[name].attr["T"].type
                    if kind == 10:  # DT_BOOL
                        feeds[name, 0] = exist
                    elif kind != 1:
                        raise ValueError(
                            f"{self._describe(part)}, which is not a score, may stop it"
                        )
                    else:
                        feeds[name, 0] = np.float32(sums if name == self.sums else scores)
                for name in set(names) & set(self.counters):
                    feeds[name, 0] = integer(self.counters[name])
                try:
                    goes_on = graph.evaluate(part, feeds) == wanted
                except ValueError as error:
                    raise ValueError(f"its stopping condition cannot be run: {error}") from error
                if not np.all(goes_on):
                    raise ValueError(
                        f"{self._describe(part)} stops it while a hypothesis could still win"
                    )

    def _limits(self) -> list[Tensor]:
        """What counters are compared with, if that is not a constant."""
        graph, found = self.graph, []
        for part, _ in self._conditions():
            node = graph.nodes.get(part[0])
            if node is not None and node.op in COMPARISONS:
                ends = [graph.source(t) for t in node.inputs]
                if any(t[0] in self.counters for t in ends):
                    found += [t for t in ends if graph.leaves(graph.before([t]))]
        return found

    def kept_scores(self) -> tuple[str, str] | None:
        """The loop variables with sums of log-probabilities, and with the scores of answers."""
        graph = self.graph
        found = set()
        for top in self.later:
            joined = graph.nodes.get(graph.source(top.inputs[0], SAME_VALUES)[0])
            if joined is not None and joined.op == "ConcatV2":
                parts = [graph.source(part, SAME_VALUES)[0] for part in joined.inputs[:-1]]
                found |= {part for part in parts if part in self.loop.variables}
        return (self.sums, found.pop()) if self.sums and len(found) == 1 else None

    def alpha(self) -> float:
        """The exponent of the length penalty, from the divisions of scores.

        Scores are followed from the log-probabilities to the end of the iteration. Without a
        division it is 0.
        """
        graph = self.graph
        if self.log_probs is None:
            raise ValueError("its scores are not followed")
        found: dict[str, float] = {}
        others = []
        queue = [self.log_probs]
        for name in queue:  # grows
            for consumer, index in graph.consumers[name]:
                node = graph.nodes[consumer]
                if consumer not in self.inside or (
                    node.inputs[index][1] and graph.nodes[name].op in _TOP
                ):
                    continue
                if node.op in (*_DIVISIONS, "Mul") and (index == 0 or node.op == "Mul"):
                    alpha = self._penalty(node, node.inputs[1 - index])
                    if alpha is not None:
                        found[consumer] = alpha
                elif node.op not in _HARMLESS and node.op not in SAME_VALUES:
                    others.append(consumer)
                hands_on = {*SAME_VALUES, *SLICES, *_DIVISIONS, "TopK", "TopKV2"}
                if consumer not in queue and consumer not in self.loop.variables:
                    if node.op not in (*COMPARISONS, "Shape") and (
                        index == 0 or node.op not in hands_on
                    ):
                        queue.append(consumer)
        if len(set(found.values())) > 1:
            raise ValueError(f"scores are divided by several penalties, {sorted(found.values())}")
        if others:
            raise ValueError(f"scores go into {graph.ops_of(others)}, which may be a penalty")
        return next(iter(found.values()), 0.0)

    def _penalty(self, node: Node, penalty: Tensor) -> float | None:
        graph = self.graph
        names = graph.before([penalty])
        if self._counts([penalty]):
            values = self._of_counter(penalty, 64)
            if node.op == "Mul" and values[-1] < 1:
                values = 1 / values  # else it turns a score back into a sum
            return self._exponent(node.name, values, penalty)
        used = {n for n in names if n in self.loop.variables}
        if node.op == "Mul" and not used & set(self.counters):
            constant = graph.constant(penalty)
            if constant is not None and np.all(constant == 1):
                return None
        leaves = graph.leaves(names)
        if used and used <= set(self.counters):
            raise Hidden(f"the length penalty of {node.name} depends on {_listed(leaves)}")
        what = "it counts no steps" if used or not leaves else f"depends on {_listed(leaves)}"
        raise ValueError(f"{node.name} divides scores by {self._describe(penalty)}: {what}")

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
        """Whether scores of unfinished hypotheses are divided by the penalty after the loop."""
        graph = self.graph
        during = self.inside | set(graph.before([self.loop.condition]))
        users = after_loop(graph, self.sums, during) if self.sums else []
        divisions = [n for n in users if n.op in _DIVISIONS]
        for node in divisions:
            value = graph.constant(node.inputs[1])
            if value is None or not np.allclose(value, ((5 + steps) / 6) ** alpha, rtol=1e-4):
                raise ValueError(f"{node.name} divides scores of unfinished hypotheses by {value}")
        if divisions:
            return True
        return False if any(node.op.startswith("Select") for node in users) else None

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


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) or "something that is not a constant"


def _size(top: Node) -> Tensor:
    if len(top.inputs) < 2:
        raise ValueError(f"{top.name} has its size as an attribute")
    return top.inputs[1]
