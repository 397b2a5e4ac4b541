"""The flags of `bertgen-tf export`."""

import argparse
from typing import Any

from bertgen_tf.cli.flags import values
from bertgen_tf.cli.flags.common import add_generation_config, add_preset, check_preset
from bertgen_tf.cli.flags.errors import user_errors
from bertgen_tf.data.folders import check_version_path


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "export",
        help="export a model for TensorFlow Serving",
        description="Writes a preset as a SavedModel, text in and text out, that TensorFlow Serving"
        " runs.\nThe generation settings are baked in.",
        epilog="""\
example:
  bertgen-tf export --preset my_model --output saved_models/my_model/1 --num-beams 4""",
    )
    add_preset(parser)
    parser.add_argument(
        "--output",
        required=True,
        metavar="NAME/VERSION",
        help="a new folder, named by an integer, such as saved_models/my_model/1",
    )
    parser.add_argument(
        "--max-batch-size",
        type=values.power_of_two,
        default=32,
        metavar="N",
        help="the most texts that a server with batching runs together, a power of two (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--warmup-xla",
        action="store_true",
        help="let the server compile generate_xla for every batch size and length before it "
        "serves; a server without XLA does not load such an export",
    )
    parser.add_argument(
        "--description",
        default="",
        metavar="TEXT",
        help="what the model does, in a sentence, which the page of serve shows",
    )
    parser.add_argument(
        "--example",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text that shows what it does, which that page offers; may be given several times",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not check in a separate process that the export answers as the model does",
    )
    # Each signature gives one hypothesis, or all.
    add_generation_config(parser, leave_out="num_return_sequences")


def check(arguments: argparse.Namespace) -> None:
    """Finds what is wrong with the flags, at once.

    Raises:
        OSError, UserError: what the user can fix.
    """
    with user_errors():
        check_version_path(arguments.output)
    check_preset(arguments)
