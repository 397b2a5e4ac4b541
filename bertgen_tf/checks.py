"""Checks of single values and files, and another library's error as one line."""

import hashlib
import json
import math
import numbers
import operator
import os
import pathlib
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

_LARGEST_INTEGER = 2**31 - 1
# No JSON of a model comes near.
_MOST_JSON_BYTES = 2**26


class Damaged(ValueError):
    """A file is not as it was written."""


class GenerationError(ValueError):
    """What a search cannot do on this machine, or with these weights, though the settings fit."""


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


class Rule(NamedTuple):
    """Which values a field accepts, and the same in words."""

    allows: Callable[[Any], bool]
    words: str


def integer_from(least: int) -> Rule:
    """Integers of at least `least`."""
    return Rule(
        lambda value: is_integer(value) and value >= least, f"an integer of at least {least}"
    )


def optional(rule: Rule) -> Rule:
    """None, or what the rule allows."""
    # None is a default and needs no mention.
    return Rule(lambda value: value is None or rule.allows(value), rule.words)


def one_of(*values: Any) -> Rule:
    """One of the values."""
    # Types count too: 1 is not True.
    return Rule(
        lambda value: any(type(value) is type(other) and value == other for other in values),
        f"one of {', '.join(map(str, values))}",
    )


NUMBER = Rule(lambda value: is_number(value), "a number")
NUMBER_FROM_0 = Rule(lambda value: is_number(value) and value >= 0, "a number of at least 0")
POSITIVE = Rule(lambda value: is_number(value) and value > 0, "a number above 0")
SHARE = Rule(lambda value: is_number(value) and 0 < value <= 1, "a number above 0 and at most 1")
BOOLEAN = Rule(lambda value: isinstance(value, bool), "True or False")


def check_rule(name: str, value: Any, rule: Rule) -> None:
    """Raises a ValueError unless a value follows the rule, in numbers of int32 and float32."""
    if not rule.allows(value):
        raise ValueError(f"{name} must be {rule.words}, received {shown(value)}.")
    for number in _numbers(value):
        if isinstance(number, int) and number > _LARGEST_INTEGER:
            raise ValueError(f"{name} must be at most {_LARGEST_INTEGER}, received {number}.")
        if isinstance(number, float) and number and not 1.2e-38 <= abs(number) <= 3.4e38:
            raise ValueError(f"{name} must be a number that float32 holds, received {number}.")


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers in a field's value."""
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def check_regular_file(path: str | os.PathLike) -> None:
    """Raises unless `path`, or what it links to, is a regular file: reading a pipe may never end.

    Raises:
        OSError: there is nothing, or it cannot be looked at.
        ValueError: it is a folder, a pipe, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise ValueError(f"{path} must be a file, but is {kind}.")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no regular file, too large, or not a JSON object; the message is a part of
            a sentence.
    """
    check_regular_file(path)
    if os.stat(path).st_size > _MOST_JSON_BYTES:
        raise ValueError(f"it has more than {_MOST_JSON_BYTES:,} bytes")
    try:
        content = json.loads(pathlib.Path(path).read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a regular file, in hexadecimal; some 1 GB a second."""
    check_regular_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(value: Any) -> str:
    """A value in a message: its `repr`, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def first_line(error: Exception) -> str:
    """Another library's exception in one line, to be quoted in our messages."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Graph execution error"):
        # TensorFlow then says where first, and what last.
        lines = [line for line in lines if line.strip() and not line.startswith((" ", "[["))][-1:]
    elif lines and re.match(r"A total of \d+ objects could not be loaded", lines[0]):
        # Keras: its first line names a layer, what is wrong with it comes next.
        lines = [line for line in lines[1:] if line.strip()] or lines
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _refuse(name: str, rule: str, value: Any, remedy: str) -> None:
    remedy = f": {remedy}" if remedy else ""
    raise ValueError(f"{name} must be {rule}, received {shown(value)}{remedy}.")


def _real(value: Any) -> float:
    """NaN for what is not a number; arrays and tensors of one number are numbers."""
    if isinstance(value, str | bytes | bool | np.bool_) or getattr(value, "ndim", 0):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
