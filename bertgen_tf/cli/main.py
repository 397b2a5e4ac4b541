"""The command `bertgen-tf`: finetune, generate, evaluate, export, convert, serve.

What the user can fix is one line on stderr and exit code 2; anything else is a bug and shows its
traceback.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from bertgen_tf import __version__
from bertgen_tf.checks import GenerationError
from bertgen_tf.cli import startup
from bertgen_tf.cli.flags import convert, evaluate, export, finetune, generate, serve
from bertgen_tf.cli.flags.errors import PROGRAM, UserError, complain, in_flags
from bertgen_tf.cli.flags.parser import Parser
from bertgen_tf.data import folders

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
# In the order of the help. Each has `add_command` and `check`, and a module in `bertgen_tf.cli` of
# the same name has `run`.
_FLAGS = {
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
        went away, 143 after SIGTERM.
    """
    try:
        try:
            arguments = make_parser().parse_args(argv)
            _FLAGS[arguments.command].check(arguments)
            with startup.quiet(complain), _ended_by_signals():
                importlib.import_module(f"bertgen_tf.cli.{arguments.command}").run(arguments)
        finally:
            sys.stdout.flush()
    except SystemExit as stop:  # from argparse
        return stop.code
    except KeyboardInterrupt as stop:
        if sys.stderr.isatty():
            print(end="\r", file=sys.stderr)  # over ^C
        complain(str(stop) or "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _give_up_output()
        return BROKEN_PIPE
    except (UserError, GenerationError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        elif folders.is_disk_error(error):  # all files that are written have a name
            message = f"standard output: {error.strerror}"
            _give_up_output()
        complain(f"error: {in_flags(' '.join(message.split()))}")
        return USER_ERROR
    return 0


def _give_up_output() -> None:
    """Otherwise Python warns when it flushes what cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and a terminal that is closed end the process as Ctrl-C does: tidily."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # nohup, say, has a signal ignored.
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def make_parser() -> argparse.ArgumentParser:
    """The parser; `command` in what it returns is the name of a command, such as finetune."""
    parser = Parser(
        prog=PROGRAM,
        description="Sequence-to-sequence models warm-started from BERT: fine-tune one on pairs of "
        "texts,\ngenerate text with it, score it, export it for TensorFlow Serving, convert it.",
        epilog=f"`{PROGRAM} COMMAND --help` explains a command and shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _FLAGS.values():
        module.add_command(commands)
    return parser
