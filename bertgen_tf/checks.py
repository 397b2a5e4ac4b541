"""Checks of single arguments, and another library's error as one line."""

import math
import numbers
import operator
from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    """Whether it is a Python or NumPy integer, but not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite real Python or NumPy number, but not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(name: str, value: Any, least: int = 1, remedy: str = "") -> int:
    """Returns an integer of at least `least` as a Python int.

    Args:
        name: of the argument to blame.
        remedy: what to do instead, for the end of the message.

    Raises:
        ValueError: it is anything else.
    """
    try:  # arrays and tensors of one integer are integers, too
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except (AttributeError, TypeError):  # the former of TensorFlow
        number = None
    if number is None or number < least:
        _refuse(name, f"an integer of at least {least}", value, remedy)
    return number


def check_number(name: str, value: Any, least: float = -math.inf, remedy: str = "") -> float:
    """Returns a number, which may be infinite, as a Python float; see `check_integer`."""
    number = _real(value)
    if not number >= least:
        rule = "a number" if least == -math.inf else f"a number of at least {least:g}"
        _refuse(name, rule, value, remedy)
    return number


def check_positive(name: str, value: Any, remedy: str = "") -> float:
    """Returns a finite number above 0 as a Python float; see `check_integer`."""
    number = _real(value)
    if not 0 < number < math.inf:
        _refuse(name, "a finite number above 0", value, remedy)
    return number


def first_line(error: Exception) -> str:
    """Another library's exception in one line, to be quoted in our messages."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Graph execution error"):
        # TensorFlow then says where first, and what last.
        lines = [line for line in lines if line.strip() and not line.startswith((" ", "[["))][-1:]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _refuse(name: str, rule: str, value: Any, remedy: str) -> None:
    remedy = f": {remedy}" if remedy else ""
    raise ValueError(f"{name} must be {rule}, received {value!r}{remedy}.")


def _real(value: Any) -> float:
    """NaN for what is not a number; arrays and tensors of one number are numbers."""
    if isinstance(value, str | bytes | bool | np.bool_) or getattr(value, "ndim", 0):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
