"""`bertgen-tf export`."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from bertgen_tf.cli import values
from bertgen_tf.cli.common import (
    UserError,
    add_generation_config,
    add_preset,
    load_model,
    read_settings,
    user_errors,
)
from bertgen_tf.export.saved_model import ExportError, check_version_path, export_saved_model


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


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    with user_errors():
        check_version_path(arguments.output)
    config = read_settings(arguments)
    model = load_model(arguments, config)
    try:
        export_saved_model(
            model,
            arguments.output,
            config,
            max_batch_size=arguments.max_batch_size,
            warmup_xla=arguments.warmup_xla,
            description=arguments.description,
            examples=arguments.example,
            check=not arguments.no_check,
        )
    except ExportError as error:
        raise UserError(str(error)) from error
    folder = Path(arguments.output).absolute().parent
    mount = shlex.quote(f"{folder}:/models/{folder.name}")
    name = shlex.quote(folder.name)
    print(f"""\
written: {arguments.output}, with the signatures serving_default, beams, ids, score and attention
for any server, and generate_xla and beams_xla for servers with XLA
serve it:
  docker run --rm -p 8501:8501 -v {mount} -e MODEL_NAME={name} tensorflow/serving
ask it:
  curl http://localhost:8501/v1/models/{name}:predict -d '{{"inputs": {{"text": ["..."]}}}}'""")
