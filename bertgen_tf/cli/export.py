"""`bertgen-tf export`."""

import argparse
import shlex
from pathlib import Path

from bertgen_tf.cli.common import load_model, read_settings
from bertgen_tf.cli.flags.errors import UserError
from bertgen_tf.export.saved_model import ExportError, export_saved_model


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    config = read_settings(arguments)
    print(f"reading {arguments.preset}", flush=True)
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
            verbose=1,
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
