"""Moves weights between naming schemes: every variable assigned once, every tensor accounted for.

A rule table says what each source tensor becomes. Nothing is assigned before everything fits, so a
model is never half loaded, and all problems come in one error.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

# Variables that only a decoder has: no encoder's checkpoint can fill them.
CROSS_ATTENTION = r"layer_\d+/cross_attention/.*"
NEW_IN_DECODER = rf"{CROSS_ATTENTION}|output_(bias|kernel)|head_transform/.*"


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""What the source tensors whose whole name matches a pattern become.

    Args:
        source: regular expression for the whole name.
        target: name of the variable, with `\1` for groups; None for tensors that are not needed.
        transform: applied to the tensor.
    """

    source: str
    target: str | None
    transform: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor


class WeightsError(ValueError):
    """The source's tensors and the model's variables do not fit each other."""


class VariablePart:
    """Some rows of a variable, used as a variable itself."""

    def __init__(self, variable: Any, start: int, stop: int):
        self.variable, self.rows = variable, slice(start, stop)
        self.name, self.dtype = variable.name, variable.dtype
        self.shape = (stop - start, *variable.shape[1:])

    def assign(self, value: Any) -> None:
        value = np.asarray(value)
        if value.shape != self.shape:
            raise ValueError(
                f"{self.name} must be assigned a tensor of shape {self.shape}, received "
                f"{value.shape}."
            )
        # As a whole: variables of tf.distribute cannot be sliced.
        whole = np.array(self.variable.numpy())
        whole[self.rows] = value
        self.variable.assign(whole)

    def numpy(self) -> np.ndarray:
        return self.variable.numpy()[self.rows]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype)


def named_variables(layer: keras.Layer, prefix: str = "") -> dict[str, Any]:
    """The weights of a layer by structural name, such as `layer_0/self_attention/query/kernel`.

    A variable that is shared appears under each of its names; one that holds several projections
    as a `VariablePart` of each. Random states are left out.
    """
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    own = getattr(layer, "variable_parts", own)
    named = {prefix + variable.name: variable for variable in own}
    for child in layer._flatten_layers(include_self=False, recursive=False):
        if getattr(child, "parts", 1) == 1:  # otherwise its parts are layers beside it
            named.update(named_variables(child, f"{prefix}{child.name}/"))
    return named


def check_finite(source: str, tensors: Mapping[str, Any]) -> None:
    """Raises a ValueError if an array or a variable holds NaN or infinity.

    Args:
        source: where the tensors come from, for the error.
        tensors: by name.
    """
    for name, tensor in tensors.items():
        if not np.isfinite(np.asarray(tensor)).all():
            raise ValueError(
                f"{source} should have finite weights, but {name} has NaN or infinity."
            )


class FiniteWeights:
    """A layer that refuses to load weights that are not finite."""

    def load_own_variables(self, store: Any) -> None:
        own = [*self._trainable_variables, *self._non_trainable_variables]
        with loading_finite(self, own):
            super().load_own_variables(store)


@contextlib.contextmanager
def loading_finite(layer: keras.Layer, variables: Iterable[Any]) -> Iterator[None]:
    """For `load_own_variables` of a layer: refuses weights that are not finite.

    Keras tries a layer that failed under its other names, where nothing is stored. So this also
    looks where reading failed: the variables still hold what was read first.
    """
    try:
        with np.errstate(over="ignore"):
            yield
    finally:
        check_finite(layer.path, {variable.name: variable for variable in variables})


def assign(
    variables: Mapping[str, Any],
    tensors: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    source: str,
    new: str = r"(?!)",
) -> None:
    """Assigns every tensor to its variable, or raises one `WeightsError` that lists what is wrong.

    Each tensor is read twice, to be checked and to be assigned: those of a mapping that reads them
    from a file are never in memory all at once. If the second reading fails, earlier variables have
    already been assigned.

    Args:
        variables: what `named_variables` gives.
        tensors: arrays, or anything `np.asarray` reads, by name.
        rules: the first rule that matches a name decides.
        source: where the tensors come from, for the error.
        new: regular expression for names of variables that may stay as initialised.
    """
    problems: list[str] = []
    assignments: dict[str, tuple[str, Rule]] = {}
    unknown = []
    for name in tensors:
        rule = next((rule for rule in rules if re.fullmatch(rule.source, name)), None)
        if rule is None:
            unknown.append(name)
            continue
        if rule.target is None:
            continue
        target = re.fullmatch(rule.source, name).expand(rule.target)
        if target not in variables:
            problems.append(f"{name} would become {target}, which the model does not have")
        elif target in assignments:
            problems.append(f"{name} would become {target}, which is assigned already")
        else:
            value = rule.transform(np.asarray(tensors[name]))
            if tuple(value.shape) != tuple(variables[target].shape):
                problems.append(
                    f"{name} has shape {value.shape}, but {target} has "
                    f"{tuple(variables[target].shape)}"
                )
            elif variables[target].dtype == "int8" != value.dtype:
                problems.append(f"{name} is {value.dtype}, but {target} is int8")
            elif not np.isfinite(value).all():
                problems.append(f"{name} holds NaN or infinity")
            elif not _fits(value, variables[target].dtype):
                problems.append(f"{name} holds numbers too large for {variables[target].dtype}")
            assignments[target] = (name, rule)
    if unknown:
        problems.append(f"no rule for {_listed(unknown)}")
    missing = [n for n in variables if n not in assignments and not re.fullmatch(new, n)]
    if missing:
        problems.append(f"nothing found for {_listed(missing)}")
    if problems:
        shown = problems[:20] + (
            [f"and {len(problems) - 20} more problems"] if len(problems) > 20 else []
        )
        raise WeightsError(f"{source} does not fit the model: {'; '.join(shown)}.")
    for target, (name, rule) in assignments.items():
        variables[target].assign(rule.transform(np.asarray(tensors[name])))


def _fits(value: np.ndarray, dtype: str) -> bool:
    """Whether a finite array stays finite in the type of its variable."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(value.astype(dtype, copy=False)).all())


def keep_layers(tensors: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The tensors of a stack, by our names, without the layers that are not `kept`.

    Args:
        tensors: of a whole stack.
        kept: numbers of layers; the first becomes layer 0, and so on.
    """
    numbers = {str(old): new for new, old in enumerate(kept)}
    result: dict[str, Any] = {}
    for name, tensor in tensors.items():
        match = re.match(r"layer_(\d+)/", name)
        if match is None:
            result[name] = tensor
        elif match[1] in numbers:
            result[f"layer_{numbers[match[1]]}/{name[match.end() :]}"] = tensor
    return result


def _listed(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} names ({', '.join(names[:most])}{more})"
