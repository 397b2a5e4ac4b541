"""`bertgen-tf generate --engine ray`: its flags, and the run."""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from bertgen_tf.config import GenerationConfig
from bertgen_tf.export.saved_model import export_saved_model
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.serving import ray_files

RAY_FLAGS = ("export", "workers", "cpus_per_worker", "ray_address", "signature")
HYPOTHESES = "hypotheses"


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises a ValueError for flags that do not fit --engine, or each other."""
    if arguments.engine == "local":
        given = [name for name in RAY_FLAGS if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"{_flags(given)} applies to --engine ray only")
        return
    if "-" in (arguments.input, arguments.output):
        raise ValueError("--engine ray needs --input, a pattern of files, and --output, a folder")
    if arguments.export is None:
        if arguments.signature is not None:
            raise ValueError("--signature applies to --export only, not to --preset")
        if ray_files.cluster_address(arguments.ray_address) is not None:
            raise ValueError(
                "--preset is on this machine only: export it where all machines of the Ray cluster "
                "find it, then use --export"
            )
        return
    fields = [field.name for field in dataclasses.fields(GenerationConfig)]
    given = [name for name in fields if hasattr(arguments, name)]
    given += ["quantize"] if arguments.quantize else []
    if given:
        raise ValueError(f"{_flags(given)} applies to --preset only: --export has its settings")
    if arguments.signature is not None and arguments.no_xla:
        raise ValueError("--no-xla chooses a signature of its own, not --signature")


def find_jobs(arguments: argparse.Namespace, run: dict[str, Any] | None) -> list[ray_files.Job]:
    """What is to be done.

    Args:
        arguments: of the command.
        run: what decides the outputs of --preset; None for --export.

    Raises:
        ImportError, OSError, ValueError: what the user can mend.
    """
    ray_files.import_ray()
    if run is None:
        run = ray_files.describe_export(arguments.export, _signature(arguments))
    run = {**run, "no_xla": arguments.no_xla, "batch_size": arguments.batch_size}
    return ray_files.find_jobs(
        arguments.input,
        arguments.output,
        run,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
    )


def run_jobs(
    arguments: argparse.Namespace,
    jobs: list[ray_files.Job],
    model: EncoderDecoderModel | None,
    config: GenerationConfig | None,
    complain: Callable[[str], None],
) -> None:
    """Runs what `find_jobs` found.

    Args:
        arguments: of the command.
        jobs: at least one that is not complete.
        model: of --preset, which is exported to a temporary folder; None for --export.
        config: its settings.
        complain: gets messages.
    """
    with contextlib.ExitStack() as stack:
        export, signature = arguments.export, _signature(arguments)
        if model is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            several = config.num_return_sequences > 1
            signatures = {HYPOTHESES: config} if several else {}
            export = export_saved_model(
                model, f"{folder}/model/1", config, signatures=signatures, check=False
            )
            if several:
                signature = HYPOTHESES if arguments.no_xla else f"{HYPOTHESES}_xla"
        ray_files.run_jobs(
            jobs,
            export,
            signature=signature,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            cpus_per_worker=arguments.cpus_per_worker or 1,
            address=arguments.ray_address,
            verbose=int(sys.stderr.isatty()),
            complain=complain,
        )


def _signature(arguments: argparse.Namespace) -> str:
    return arguments.signature or ("serving_default" if arguments.no_xla else "generate_xla")


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
