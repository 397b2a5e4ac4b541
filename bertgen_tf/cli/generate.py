"""`bertgen-tf generate`: texts of a file in this process, or of many files on Ray."""

import argparse
import collections
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from bertgen_tf.checkpoints import presets
from bertgen_tf.cli.common import load_model, read_settings
from bertgen_tf.cli.flags.errors import UserError, complain, note, user_errors
from bertgen_tf.cli.flags.generate import is_stream
from bertgen_tf.config import GenerationConfig
from bertgen_tf.data import folders, resumable, text_files
from bertgen_tf.data.progress import EmptyOutputs
from bertgen_tf.export.saved_model import export_saved_model
from bertgen_tf.generation.generator import WINDOW
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.serving import ray_files

HYPOTHESES = "hypotheses"


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    path = arguments.output
    if arguments.engine == "ray":
        _generate_on_ray(arguments)
        return
    stream = is_stream(arguments.input)
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
        if ray_files.cluster_address(arguments.ray_address) is not None:
            raise UserError(
                "--preset is on this machine only: export it where all machines of the Ray cluster "
                "can find it, then use --export"
            )
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
    empty = EmptyOutputs()
    for number, output in enumerate(outputs, first):
        source = sources.popleft()
        if number >= done:
            empty.add(source, output)
            file.write(text_files.output_line(arguments.output, source, output))
        if not sources:  # the end of a window
            resumable.sync(file)
    empty.report(complain)


def _read_texts(
    arguments: argparse.Namespace, first: int, sources: collections.deque[str]
) -> Iterator[str]:
    """The texts from `first` on; they also wait in `sources` for their outputs."""
    # What files are was told when their lines were counted.
    texts = text_files.read_texts(
        arguments.input,
        source_column=arguments.source_column,
        complain=note if is_stream(arguments.input) else None,
    )
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
            # What a killed run left there is removed by the next one.
            place = Path(tempfile.gettempdir(), "generate")
            folder = stack.enter_context(folders.temporary_folder(place))
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
