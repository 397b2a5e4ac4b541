"""Mistakes of the user as one line on stderr, in the words of the command line."""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator

PROGRAM = "bertgen-tf"


class UserError(Exception):
    """What the user can fix: the message says how."""


@contextlib.contextmanager
def user_errors(**names: str) -> Iterator[None]:
    """Turns a ValueError or ImportError of the library into a UserError.

    Wrap calls that validate user input; never training or generation, where a ValueError is a bug.

    Args:
        **names: argument of the library -> flag, where a message begins with the argument.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        first, space, rest = str(error).partition(" ")
        raise UserError(f"{names.get(first, first)}{space}{rest}") from error


def in_flags(message: str) -> str:
    """A message of the library in the words of the command line: `resume=True` is `--resume`."""
    message = re.sub(r"\b(overwrite|resume)=True\b", r"--\1", message)
    # Not where it is part of a path.
    return re.sub(r"(^|\b(?:with|and|be) )(source|target)_column\b", r"\1--\2-column", message)


def complain(message: str) -> None:
    """Prints a line on stderr."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)


def note(message: str) -> None:
    """Prints a message of the library on stderr."""
    complain(in_flags(message))


def flags(names: Iterable[str]) -> str:
    """Fields of the arguments as a user writes them: --batch-size, --no-xla."""
    return ", ".join("--" + name.replace("_", "-") for name in names)
