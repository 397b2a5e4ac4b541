"""Texts as Python users hold them: lists, arrays, columns of a table, tensors."""

import reprlib
from collections.abc import Set, ValuesView
from typing import Any

import numpy as np
import tensorflow as tf

FORMS = "a list, an array, a column or a tensor of strings"


def is_text(values: Any) -> bool:
    """Whether these are meant as texts: `text_list` reads them, or says what is wrong.

    A list or an array of objects is text if its first value that is not missing is; so is an empty
    list.
    """
    if isinstance(values, str | bytes):
        return True
    if isinstance(values, Set | ValuesView):  # has no order, or no places: `text_list` refuses it
        return any(isinstance(value, str | bytes) for value in values)
    if is_table(values):
        return any(is_text(values.iloc[:, column]) for column in range(values.shape[1]))
    kind = _kind(values)
    if kind is not None and kind != "O":
        return kind in "UST"
    if not isinstance(values, list | tuple) and kind is None:
        return False
    if getattr(values, "ndim", 1) != 1:
        return False
    present = (value for value in values if not _is_missing(value))
    return isinstance(next(present, ""), str | bytes)


def is_single(values: Any) -> bool:
    """Whether it is one text instead of several."""
    return isinstance(values, str | bytes) or (
        getattr(values, "ndim", None) == 0 and _kind(values) in ("O", "S", "U")
    )


def text_list(name: str, values: Any) -> list[str | bytes]:
    """The texts as a list, each of them checked.

    Args:
        name: of the argument to blame.
        values: a list, a tuple, a NumPy array, a pandas Series or a DataFrame of one column, or a
            string tensor [N]; texts are str or bytes.

    Raises:
        TypeError: it is something else, or one of the values is.
        ValueError: a text has half of a surrogate pair, which no encoding can write.
    """
    if isinstance(values, str | bytes):
        raise TypeError(f"{name} must be {FORMS}, received a single one: put it in a list.")
    if is_table(values):
        if values.shape[1] != 1:
            raise TypeError(
                f"{name} must have one column, received {values.shape[1]}: choose it by its name."
            )
        values = values.iloc[:, 0]
    if tf.is_tensor(values):
        values = np.asarray(values)
    if isinstance(values, np.ndarray) and values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if getattr(values, "ndim", 1) != 1 or not (
        isinstance(values, list | tuple) or _kind(values) is not None
    ):
        shape = f" of shape {values.shape}" if hasattr(values, "shape") else ""
        raise TypeError(f"{name} must be {FORMS}, received {type(values).__name__}{shape}.")
    texts = list(values)
    for place, text in enumerate(texts):
        check_text(f"{name}[{place}]", text)
    return texts


def check_text(name: str, text: Any) -> None:
    """Raises what `text_list` raises for one of the texts."""
    if isinstance(text, bytes):
        return
    if not isinstance(text, str):
        remedy = ": leave the row out" if _is_missing(text) else ""
        raise TypeError(f"{name} must be text, received {reprlib.repr(text)}{remedy}.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} must be valid Unicode, but has half of a surrogate pair at "
                f"{error.start}: read its source with errors='replace'."
            ) from None


def is_table(values: Any) -> bool:
    """A DataFrame, without importing pandas."""
    return hasattr(values, "iloc") and getattr(values, "ndim", None) == 2


def _kind(values: Any) -> str | None:
    """NumPy's letter for the type of the values; None if they have no type."""
    dtype = getattr(values, "dtype", None)
    if isinstance(dtype, tf.DType):
        return "S" if dtype == tf.string else "V"
    kind = getattr(dtype, "kind", None)
    # pandas: a column of strings has the kind "O", whatever it is stored as.
    return kind if isinstance(kind, str) else None


def _is_missing(value: Any) -> bool:
    """None, NaN and pandas' NA, which does not equal anything."""
    if value is None:
        return True
    if isinstance(value, float):
        return value != value
    return type(value).__name__ in ("NAType", "NaTType")
