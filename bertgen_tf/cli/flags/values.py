"""What the words of the command line mean: text -> values, or an argparse error."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any


def at_least(minimum: int) -> Callable[[str], int]:
    """Integers of at least `minimum`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {minimum}, received {text!r}"
            )
        return int(text)

    return integer


def power_of_two(text: str) -> int:
    """1, 2, 4 and so on."""
    if not text.isdecimal() or int(text).bit_count() != 1:
        raise argparse.ArgumentTypeError(f"expected a power of two, received {text!r}")
    return int(text)


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, received {text!r}")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, received {text!r}")
    return value


def interval(text: str) -> tuple[int | None, float | None]:
    """Steps, such as 500, or a time, such as 90s, 10m or 1h: (steps, None) or (None, seconds)."""
    match = re.fullmatch("([0-9]{1,9})([smh]?)", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(
            f"expected steps, such as 500, or a time, such as 10m, received {text!r}"
        )
    number = int(match[1])
    return (None, number * {"s": 1, "m": 60, "h": 3600}[match[2]]) if match[2] else (number, None)


def share(text: str) -> float:
    """A number of at least 0 and below 1."""
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"expected a number of at least 0 and below 1, received {text!r}"
        )
    return value


def frozen(text: str) -> dict[str, Any]:
    """Parts of a model, such as embeddings,encoder:6: arguments of `freezing.freeze`."""
    parts: dict[str, Any] = {}
    for part in names(text):
        match = re.fullmatch("(encoder|decoder)(?::([0-9]{1,4}))?|embeddings", part)
        if not match:
            raise argparse.ArgumentTypeError(
                f"expected parts such as embeddings, encoder or encoder:6, received {part!r}"
            )
        if match[1] is None:
            parts["embeddings"] = True
        else:
            parts[f"{match[1]}_layers"] = "all" if match[2] is None else int(match[2])
    return parts


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them, such as bleu,sari."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def ids(text: str) -> tuple[int, ...]:
    """Integers with commas between them, such as 5,17."""
    if not re.fullmatch("([0-9]{1,9}(,|$))*", text):
        raise argparse.ArgumentTypeError(
            f"expected integers with commas between them, received {text!r}"
        )
    return tuple(int(part) for part in text.split(",") if part)


def layers(text: str) -> int | list[int]:
    """A number, or a list such as 0,2,4."""
    numbers = ids(text)
    return list(numbers) if "," in text or not numbers else numbers[0]


def boolean(text: str) -> bool:
    """True or false."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, received {text!r}")
    return text == "true"


def early_stopping(text: str) -> bool | str:
    """True, false or never."""
    values = {"true": True, "false": False, "never": "never"}
    if text not in values:
        raise argparse.ArgumentTypeError(f"expected true, false or never, received {text!r}")
    return values[text]


def none_or(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """What `kind` reads, or none."""
    return lambda text: None if text == "none" else kind(text)


def integer(text: str) -> int:
    """Any integer."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected an integer, received {text!r}") from error


def one_or_more_ids(text: str) -> int | tuple[int, ...]:
    """An integer, or several with commas between them."""
    numbers = ids(text)
    return numbers if len(numbers) != 1 else numbers[0]


def id_sequences(text: str) -> tuple[tuple[int, ...], ...]:
    """Sequences such as 5,6;7."""
    return tuple(ids(part) for part in text.split(";")) if text else ()


def biases(text: str) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Sequences with numbers, such as 5,6:-2.5;7:1."""
    pairs = [pair.split(":") for pair in text.split(";")] if text else []
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"expected ID,ID:X;ID:X, received {text!r}")
    return tuple((ids(sequence), number(bias)) for sequence, bias in pairs)


def start_and_factor(text: str) -> tuple[int, float]:
    """An integer and a number, such as 20,1.1."""
    start, comma, factor = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"expected START,FACTOR, received {text!r}")
    return integer(start), number(factor)
