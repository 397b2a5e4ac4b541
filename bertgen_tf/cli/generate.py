"""`bertgen-tf generate`: texts of a file in this process, or of many files on Ray."""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from bertgen_tf.checkpoints import presets
from bertgen_tf.cli import values
from bertgen_tf.cli.common import (
    UserError,
    add_columns,
    add_generation_config,
    add_preset,
    add_running,
    complain,
    flags,
    load_model,
    note,
    read_settings,
    user_errors,
)
from bertgen_tf.config import GenerationConfig
from bertgen_tf.data import resumable, text_files
from bertgen_tf.export.saved_model import export_saved_model
from bertgen_tf.generation.generator import WINDOW
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.serving import ray_files

RAY_FLAGS = ("export", "workers", "cpus_per_worker", "ray_address", "signature")
HYPOTHESES = "hypotheses"


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
        help="what export wrote, generation settings included; with --engine ray",
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


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    path = arguments.output
    with user_errors():
        _check_flags(arguments)
    if arguments.engine == "ray":
        _generate_on_ray(arguments)
        return
    if path == "-":
        if arguments.resume:
            raise UserError("--resume needs --output, a file to continue")
        if arguments.overwrite:
            raise UserError("--overwrite needs --output, a file to replace")
    with user_errors(output="--output"):
        text_files.check_output(path)
        resumable.check_path(path, arguments.overwrite, arguments.resume)
    stream = arguments.input == "-" or Path(arguments.input).is_fifo()
    if stream and arguments.resume:
        raise UserError("--resume needs --input, a file that can be read again")
    config = read_settings(arguments)
    total = run = None
    begun = resumable.Begun()
    if not stream:
        with user_errors():
            # Reading twice costs little beside generating, and finds every malformed line now.
            texts = text_files.read_texts(
                arguments.input, source_column=arguments.source_column, complain=note
            )
            total = sum(1 for _ in texts)
        if path != "-":
            run = {
                "input": resumable.digest(arguments.input),
                **text_files.settings(arguments.input, arguments.source_column),
                **_describe_model(arguments, config),
            }
    if arguments.resume:
        with user_errors():
            begun = resumable.find_begun(path, run, total)
        if resumable.is_complete(path):
            resumable.forget(path)
            complain(f"{path} is complete")
            return
    model = load_model(arguments, config)
    with resumable.open_output(path, run, begun, complain) as file:
        _generate_lines(arguments, model, config, begun.lines, total, file)


def _generate_on_ray(arguments: argparse.Namespace) -> None:
    config = run = model = None
    if arguments.preset:
        config = read_settings(arguments)
        run = _describe_model(arguments, config)
    with user_errors(pattern="--input", output="--output"):
        jobs = _find_jobs(arguments, run)
    if all(job.begun is None for job in jobs):
        complain(f"{arguments.output} is complete")
        return
    if arguments.preset:
        model = load_model(arguments, config)
    _run_jobs(arguments, jobs, model, config)


def _generate_lines(
    arguments: argparse.Namespace,
    model: EncoderDecoderModel,
    config: GenerationConfig,
    done: int,
    total: int | None,
    file: TextIO,
) -> None:
    """Writes the outputs of all texts but the first `done`."""
    at_keyboard = arguments.input == "-" and sys.stdin.isatty()
    if at_keyboard:
        complain("one text a line, Ctrl-D to end")
    window = 1 if at_keyboard else WINDOW
    # Windows begin where they would have: the same batches give the same bits.
    first = done if done == total else done // window * window
    sources: collections.deque[str] = collections.deque()
    outputs = model.iterate(
        _read_texts(arguments, first, sources),
        config,
        batch_size=arguments.batch_size,
        window=window,
        first_example=first,
        total=total,
        # Outputs on the terminal show the progress themselves.
        verbose=int(sys.stderr.isatty() and not (file is sys.stdout and sys.stdout.isatty())),
        jit_compile=not arguments.no_xla,
    )
    for number, output in enumerate(outputs, first):
        source = sources.popleft()
        if number >= done:
            file.write(text_files.output_line(arguments.output, source, output))
        if not sources:  # the end of a window
            resumable.sync(file)


def _read_texts(
    arguments: argparse.Namespace, first: int, sources: collections.deque[str]
) -> Iterator[str]:
    """The texts from `first` on; they also wait in `sources` for their outputs."""
    texts = text_files.read_texts(arguments.input, source_column=arguments.source_column)
    texts = itertools.islice(texts, first, None)
    while True:
        with user_errors():
            text = next(texts, None)
        if text is None:
            return
        sources.append(text)
        yield text


def _describe_model(arguments: argparse.Namespace, config: GenerationConfig) -> dict[str, Any]:
    """What determines the outputs besides the input, by names that the user knows."""
    preset = Path(arguments.preset)
    names = [presets.CONFIG_FILE, presets.WEIGHTS_FILE]
    names += sorted(name for name, _ in presets.VOCABULARIES.values())
    return {
        "preset": resumable.digest(*(preset / name for name in names if (preset / name).is_file())),
        "quantize": arguments.quantize,
        **config.to_dict(),
    }


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises a ValueError for flags that do not fit --engine, or each other."""
    if arguments.engine == "local":
        given = [name for name in RAY_FLAGS if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"{flags(given)} applies to --engine ray only")
        return
    if "-" in (arguments.input, arguments.output):
        raise ValueError("--engine ray needs --input, a pattern of files, and --output, a folder")
    if arguments.export is None:
        if arguments.signature is not None:
            raise ValueError("--signature applies to --export only, not to --preset")
        if ray_files.cluster_address(arguments.ray_address) is not None:
            raise ValueError(
                "--preset is on this machine only: export it where all machines of the Ray cluster "
                "can find it, then use --export"
            )
        return
    fields = [field.name for field in dataclasses.fields(GenerationConfig)]
    given = [name for name in fields if hasattr(arguments, name)]
    given += ["quantize"] if arguments.quantize else []
    if given:
        raise ValueError(f"{flags(given)} applies to --preset only: --export has its settings")
    if arguments.signature is not None and arguments.no_xla:
        raise ValueError("--no-xla chooses a signature itself: leave --signature out")


def _find_jobs(arguments: argparse.Namespace, run: dict[str, Any] | None) -> list[ray_files.Job]:
    """What is to be done.

    Args:
        arguments: the command's.
        run: what determines the outputs of --preset; None for --export.

    Raises:
        ImportError, OSError, ValueError: what the user can fix.
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
        source_column=arguments.source_column,
        complain=note,
    )


def _run_jobs(
    arguments: argparse.Namespace,
    jobs: list[ray_files.Job],
    model: EncoderDecoderModel | None,
    config: GenerationConfig | None,
) -> None:
    """Runs what `_find_jobs` found.

    Args:
        arguments: the command's.
        jobs: at least one that is not complete.
        model: of --preset, which is exported to a temporary folder; None for --export.
        config: its settings.
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
