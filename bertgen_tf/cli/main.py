"""The command `bertgen-tf`: finetune, generate, evaluate, export, convert, serve.

What the user can fix is one line on stderr and exit code 2; anything else is a bug and shows its
traceback.
"""

import argparse
import contextlib
import os
import sys
from typing import Any, NoReturn

import tensorflow as tf

from bertgen_tf import __version__
from bertgen_tf.cli import convert, evaluate, export, finetune, generate, serve
from bertgen_tf.cli.common import PROGRAM, UserError, complain, in_flags

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
# In the order of the help. Each has `add_command` and `run`.
_COMMANDS = {
    "finetune": finetune,
    "generate": generate,
    "evaluate": evaluate,
    "export": export,
    "convert": convert,
    "serve": serve,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        the exit code: 0, 2 for a user error, 130 after Ctrl-C, 141 when the reader of the output
        went away.
    """
    tf.get_logger().setLevel("ERROR")  # its warnings are advice to programmers
    try:
        try:
            arguments = make_parser().parse_args(argv)
            _COMMANDS[arguments.command].run(arguments)
        finally:
            sys.stdout.flush()
    except SystemExit as stop:  # from argparse
        return stop.code
    except KeyboardInterrupt as stop:
        complain(str(stop) or "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Otherwise Python warns when it flushes what nobody reads.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (UserError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        complain(f"error: {in_flags(' '.join(message.split()))}")
        return USER_ERROR
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser; `command` in what it returns is the name of a command, such as finetune."""
    parser = _Parser(
        prog=PROGRAM,
        description="Sequence-to-sequence models warm-started from BERT: fine-tune one on pairs of "
        "texts,\ngenerate text with it, score it, export it for TensorFlow Serving, convert it.",
        epilog=f"`{PROGRAM} COMMAND --help` explains a command and shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _COMMANDS.values():
        module.add_command(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """One-line errors, no abbreviated options, descriptions as they are written."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")
