"""The flags of `bertgen-tf generate`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from bertgen_tf.cli.flags import values
from bertgen_tf.cli.flags.common import (
    add_columns,
    add_generation_config,
    add_preset,
    add_running,
    check_export,
    check_preset,
    check_readable,
)
from bertgen_tf.cli.flags.errors import UserError, flags, user_errors
from bertgen_tf.config import GenerationConfig
from bertgen_tf.data import resumable, text_files

RAY_FLAGS = ("export", "workers", "cpus_per_worker", "ray_address", "signature")


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "generate",
        help="generate a text for each line of a file",
        description="Generates a text for each line of the input, in its order.",
        epilog="""\
files, in UTF-8; inputs may be UTF-16, and packed (.gz):
  .jsonl, .json  in: {"source": "..."} a line, or an array of these; out: {"source": "...",
                 "output": "..."} a line, where "output" is a list if --num-return-sequences is
                 above 1
  .csv           in: the column source, or --source-column, by the names in the first line
  .tsv           in: the same if the first line has a column source; else the first column
  others         in: one text a line; out: one text a line, tabs between several

Outputs are written a thousand at a time; --resume continues after the last full thousand.

With --engine ray, --input is a pattern of many files and --output a folder: NAME.* becomes
NAME.jsonl, where each line is the object of the input line, or its columns if they have names, or
{"source": "..."}, with "output".

examples:
  bertgen-tf generate --preset my_model --input sources.txt --output outputs.txt --num-beams 4
  bertgen-tf generate --engine ray --export saved_models/my_model/1 --input 'lines/*.jsonl' \\
      --output out/""",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    add_preset(parser, model)
    model.add_argument(
        "--export",
        metavar="NAME/VERSION",
        help="what export wrote, generation settings included; with --engine ray. It is a program: "
        "one that you trust",
    )
    parser.add_argument(
        "--input", default="-", metavar="FILE", help="texts (default: -, standard input)"
    )
    add_columns(parser, "source")
    parser.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="a new file, called FILE.partial until it is complete (default: -, standard output)",
    )
    _add_engine(parser)
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--overwrite", action="store_true", help="replace --output, or FILE.partial, if it exists"
    )
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue FILE.partial, if an earlier run with the same --input, --preset and "
        "settings left one; a complete --output is left as it is",
    )
    add_running(parser)
    add_generation_config(parser)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """What is read with --engine ray."""
    group = parser.add_argument_group("many files, on many cores or machines")
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: one file in this process; ray: files on Ray, here or on a cluster (default: "
        "%(default)s)",
    )
    count = {"type": values.at_least(1), "metavar": "N"}
    group.add_argument(
        "--workers",
        **count,
        help="processes, each with its own copy of the model (default: all cores are used)",
    )
    group.add_argument("--cpus-per-worker", **count, help="cores and threads of each (default: 1)")
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="a Ray cluster; --export is at the same path on all its machines (default: "
        "RAY_ADDRESS, or else this machine)",
    )
    group.add_argument(
        "--signature",
        metavar="NAME",
        help="of --export (default: generate_xla, with --no-xla serving_default)",
    )


def check(arguments: argparse.Namespace) -> None:
    """Finds what is wrong with the flags, at once.

    Raises:
        OSError, UserError: what the user can fix.
    """
    _check_flags(arguments)
    path = arguments.output
    if arguments.engine == "local":
        if path == "-":
            if arguments.resume:
                raise UserError("--resume needs --output, a file to continue")
            if arguments.overwrite:
                raise UserError("--overwrite needs --output, a file to replace")
        with user_errors(output="--output"):
            text_files.check_output(path)
            resumable.check_path(path, arguments.overwrite, arguments.resume)
        if is_stream(arguments.input):
            if arguments.resume:
                raise UserError("--resume needs --input, a file that can be read again")
        else:
            check_readable(arguments.input)
    check_export(arguments.export)
    if arguments.preset:
        check_preset(arguments)


def is_stream(path: str) -> bool:
    """Whether an input can be read once only."""
    return path == "-" or Path(path).is_fifo()


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises a UserError for flags that do not fit --engine, or each other."""
    if arguments.engine == "local":
        given = [name for name in RAY_FLAGS if getattr(arguments, name) is not None]
        if given:
            raise UserError(f"{flags(given)} applies to --engine ray only")
        return
    if "-" in (arguments.input, arguments.output):
        raise UserError("--engine ray needs --input, a pattern of files, and --output, a folder")
    if arguments.export is None:
        if arguments.signature is not None:
            raise UserError("--signature applies to --export only, not to --preset")
        return
    fields = [field.name for field in dataclasses.fields(GenerationConfig)]
    given = [name for name in fields if hasattr(arguments, name)]
    given += ["quantize"] if arguments.quantize else []
    if given:
        raise UserError(f"{flags(given)} applies to --preset only: --export has its settings")
    if arguments.signature is not None and arguments.no_xla:
        raise UserError("--no-xla chooses a signature itself: leave --signature out")
