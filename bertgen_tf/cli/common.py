"""What the commands share: errors of the user, messages."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from bertgen_tf.checkpoints import presets

PROGRAM = "bertgen-tf"


class UserError(Exception):
    """What the user can mend: the message tells how."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around the calls by which the library checks what a user gave: its ValueErrors are theirs.

    So are its ImportErrors, which tell what to install.

    Not around training and generation, where a ValueError is a bug.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error


def complain(message: str) -> None:
    """A line on stderr."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)


def read_preset_config(folder: str) -> dict[str, Any]:
    """The config of a preset that reads and writes text."""
    with user_errors():
        config = presets.read_config(folder)
    if not config.get("tokenizer"):
        raise UserError(f"{folder} has no tokenizer, without which there is no text")
    return config
