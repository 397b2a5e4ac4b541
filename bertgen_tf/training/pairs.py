"""Pairs of texts in the forms that Keras's data arguments take."""

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from bertgen_tf.data.texts import check_text, is_table, is_text, text_list


class Pairs(NamedTuple):
    """N examples.

    Attributes:
        sources, targets: N texts each.
        weights: float32 [N], or None if all examples count alike.
    """

    sources: list[str | bytes]
    targets: list[str | bytes]
    weights: np.ndarray | None = None

    def split(self, place: int) -> "tuple[Pairs, Pairs]":
        """The examples before a place, and the others."""
        parts = (slice(place), slice(place, None))
        return tuple(
            Pairs(*(column if column is None else column[part] for column in self))
            for part in parts
        )


def read_pairs(x: Any, y: Any = None, sample_weight: Any = None, prefix: str = "") -> Pairs | None:
    """Text as Keras's data arguments hold it; None if it is something else.

    A tuple, like the arguments, holds columns, and a list holds rows.

    Args:
        x: sources; or without y a tuple (sources, targets) or (sources, targets, sample_weight), a
            list or array of pairs (source, target), or a DataFrame of these two columns.
        y: targets, as many.
        sample_weight: a number for each.
        prefix: for the names of the arguments to blame.

    Raises:
        TypeError, ValueError: some of it is text, but it does not make pairs.
    """
    if isinstance(x, tf.data.Dataset):
        return None
    names = [f"{prefix}{name}" for name in ("x", "y", "sample_weight")]
    if isinstance(x, tuple) and len(x) in (2, 3) and y is None and not is_text(x):
        if sample_weight is not None and len(x) == 3 and is_text(x[0]):
            raise ValueError(
                f"{names[2]} must be left out if {names[0]} has weights of its own, a tuple of "
                f"three, received {type(sample_weight).__name__}."
            )
        x, y, sample_weight = (*x, sample_weight)[:3]
    elif y is None and (rows := _rows(names[0], x)) is not None:
        x, y = rows
    if isinstance(x, dict) and any(map(is_text, x.values())):
        raise TypeError(
            f"{names[0]} must be the sources, and {names[1]} the targets, received a dict of texts "
            f"with {reprlib.repr(list(x))}: pass its values."
        )
    if not is_text(x) and (y is None or not is_text(y)):
        return None
    if y is None:
        if len(x) == 0:
            raise ValueError(f"{names[0]} must hold at least one pair, received none.")
        raise ValueError(
            f"{names[1]} must be the targets of the sources in {names[0]}, received None."
        )
    sources, targets = text_list(names[0], x), text_list(names[1], y)
    if len(sources) != len(targets):
        raise ValueError(
            f"{names[0]} and {names[1]} must hold as many sources as targets, received "
            f"{len(sources)} and {len(targets)}."
        )
    if not sources:
        raise ValueError(f"{names[0]} must hold at least one source, received none.")
    if sample_weight is None:
        return Pairs(sources, targets)
    return Pairs(sources, targets, _check_weights(names[2], sample_weight, len(sources)))


def _rows(name: str, x: Any) -> tuple[Any, Any] | None:
    """Sources and targets of rows, whose texts are not all checked; None if these are none."""
    if is_table(x):
        if not is_text(x):
            return None
        columns = list(x.columns)
        if sorted(map(str, columns)) == ["source", "target"]:
            return x["source"], x["target"]
        if len(columns) != 2:
            raise ValueError(
                f"{name} must have two columns, source and target, received "
                f"{reprlib.repr(columns)}: choose two by their names."
            )
        return x.iloc[:, 0], x.iloc[:, 1]
    if isinstance(x, np.ndarray) and x.ndim == 2 and x.shape[1] == 2 and is_text(x[:, 0]):
        return x[:, 0], x[:, 1]
    if not isinstance(x, list):
        return None
    first = next((row for row in x if row is not None), None)
    if isinstance(first, Mapping) and any(map(is_text, first.values())):
        for place, row in enumerate(x):
            if not isinstance(row, Mapping) or set(row) != {"source", "target"}:
                raise ValueError(
                    f"{name}[{place}] must be a dict of source and target, received "
                    f"{reprlib.repr(row)}."
                )
        return [row["source"] for row in x], [row["target"] for row in x]
    if not isinstance(first, list | tuple) or not first or not is_text(first):
        return None
    for place, row in enumerate(x):
        if not isinstance(row, list | tuple) or len(row) != 2:
            raise ValueError(
                f"{name}[{place}] must be a pair (source, target), received {reprlib.repr(row)}: "
                "a list holds rows, a tuple of two lists columns."
            )
        for side, text in zip(("source", "target"), row, strict=True):
            check_text(f"{name}[{place}], the {side},", text)
    return [row[0] for row in x], [row[1] for row in x]


def _check_weights(name: str, weights: Any, count: int) -> np.ndarray:
    try:
        values = np.asarray(weights, np.float32)
    except (TypeError, ValueError):
        values = np.full([1], np.nan)
    if values.shape != (count,) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(
            f"{name} must be a finite number of at least 0 for each of {count} pairs, received "
            f"{reprlib.repr(weights)}."
        )
    return values
