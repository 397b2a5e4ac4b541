"""The command line: `bertgen-tf finetune | generate | evaluate | export | convert | serve`.

Whatever its user can mend is one line on stderr and exit code 2; anything else is a bug and shows
its traceback.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import tensorflow as tf

from bertgen_tf.checkpoints import presets
from bertgen_tf.cli import evaluate, generate
from bertgen_tf.cli.arguments import make_parser
from bertgen_tf.cli.common import UserError, complain, read_preset_config, user_errors
from bertgen_tf.cli.convert import convert
from bertgen_tf.cli.finetune import finetune
from bertgen_tf.cli.serve import find_serve
from bertgen_tf.config import GenerationConfig
from bertgen_tf.data import resumable, text_files
from bertgen_tf.export.saved_model import ExportError, check_version_path, export_saved_model
from bertgen_tf.generation.generator import WINDOW
from bertgen_tf.generation.settings import check_config
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        the exit code: 0, 2 for an error of the user, 130 after Ctrl-C, 141 when the reader of the
        output went away.
    """
    tf.get_logger().setLevel("ERROR")  # its warnings are advice to programmers
    commands = {
        "finetune": finetune,
        "generate": _generate,
        "evaluate": _evaluate,
        "export": _export,
        "convert": _convert,
        "serve": _serve,
    }
    try:
        try:
            arguments = make_parser().parse_args(argv)
            commands[arguments.command](arguments)
        finally:
            sys.stdout.flush()
    except SystemExit as stop:  # of argparse
        return stop.code
    except KeyboardInterrupt as stop:
        complain(str(stop) or "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Or Python complains when it flushes what nobody reads.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (UserError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        complain(f"error: {' '.join(message.split())}")
        return USER_ERROR
    return 0


# ------------------------------------------------------------------------- generate and export


def _generate(arguments: argparse.Namespace) -> None:
    path = arguments.output
    with user_errors():
        generate.check_flags(arguments)
    if arguments.engine == "ray":
        _generate_on_ray(arguments)
        return
    with user_errors():
        resumable.check_path(path, arguments.overwrite, arguments.resume)
    stream = arguments.input == "-" or Path(arguments.input).is_fifo()
    if stream and arguments.resume:
        raise UserError("--resume needs --input, a file that can be read again")
    config = _read_settings(arguments)
    total = run = None
    begun = resumable.Begun()
    if not stream:
        with user_errors():
            # Twice is little beside generating, and finds every malformed line now.
            total = sum(1 for _ in text_files.read_texts(arguments.input))
        if path != "-":
            run = {
                "input": resumable.digest(arguments.input),
                **_describe_model(arguments, config),
            }
    if arguments.resume:
        with user_errors():
            begun = resumable.find_begun(path, run, total)
        if resumable.is_complete(path):
            resumable.forget(path)
            complain(f"{path} is complete")
            return
    model = _load(arguments, config)
    with resumable.open_output(path, run, begun, complain) as file:
        _generate_lines(arguments, model, config, begun.lines, total, file)


def _generate_on_ray(arguments: argparse.Namespace) -> None:
    config = run = model = None
    if arguments.preset:
        config = _read_settings(arguments)
        run = _describe_model(arguments, config)
    with user_errors():
        jobs = generate.find_jobs(arguments, run)
    if all(job.begun is None for job in jobs):
        complain(f"{arguments.output} is complete")
        return
    if arguments.preset:
        model = _load(arguments, config)
    generate.run_jobs(arguments, jobs, model, config, complain)


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
        _read_texts(arguments.input, first, sources),
        config,
        batch_size=arguments.batch_size,
        window=window,
        first_example=first,
        total=total,
        # Where the outputs are on the terminal, they show the progress.
        verbose=int(sys.stderr.isatty() and not (file is sys.stdout and sys.stdout.isatty())),
        jit_compile=not arguments.no_xla,
    )
    for number, output in enumerate(outputs, first):
        source = sources.popleft()
        if number >= done:
            file.write(text_files.output_line(arguments.output, source, output))
        if not sources:  # the end of a window
            resumable.sync(file)


def _read_texts(path: str, first: int, sources: collections.deque[str]) -> Iterator[str]:
    """The texts from `first` on; they wait in `sources` for their outputs, too."""
    texts = itertools.islice(text_files.read_texts(path), first, None)
    while True:
        with user_errors():
            text = next(texts, None)
        if text is None:
            return
        sources.append(text)
        yield text


def _describe_model(arguments: argparse.Namespace, config: GenerationConfig) -> dict[str, Any]:
    """What decides the outputs beside the input; names are those that the user knows."""
    preset = Path(arguments.preset)
    names = [presets.CONFIG_FILE, presets.WEIGHTS_FILE]
    names += sorted(name for name, _ in presets.VOCABULARIES.values())
    return {
        "preset": resumable.digest(*(preset / name for name in names if (preset / name).is_file())),
        "quantize": arguments.quantize,
        **config.to_dict(),
    }


def _evaluate(arguments: argparse.Namespace) -> None:
    config = model = None
    with user_errors():
        task = evaluate.prepare(arguments)
    if arguments.preset:
        config = _read_settings(arguments).replace(num_return_sequences=1)
        model = _load(arguments, config)
    evaluate.run(arguments, task, model, config)


def _export(arguments: argparse.Namespace) -> None:
    with user_errors():
        check_version_path(arguments.output)
    config = _read_settings(arguments)
    model = _load(arguments, config)
    try:
        export_saved_model(
            model,
            arguments.output,
            config,
            max_batch_size=arguments.max_batch_size,
            warmup_xla=arguments.warmup_xla,
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


def _convert(arguments: argparse.Namespace) -> None:
    with user_errors():
        convert(arguments)


def _serve(arguments: argparse.Namespace) -> None:
    options = vars(arguments).copy()
    del options["command"]
    with user_errors():
        serve = find_serve()
    serve(**options)


def _read_settings(arguments: argparse.Namespace) -> GenerationConfig:
    """The settings of the preset with those of the flags in their place."""
    saved = read_preset_config(arguments.preset).get("generation_config")
    try:
        config = GenerationConfig.from_dict(saved)
    except (TypeError, ValueError) as error:
        raise UserError(f"{arguments.preset} has a damaged generation_config: {error}") from error
    names = [field.name for field in dataclasses.fields(config)]
    with user_errors():
        # Flags that are not given have no attribute: None is a value.
        return config.replace(**{k: getattr(arguments, k) for k in names if hasattr(arguments, k)})


def _load(arguments: argparse.Namespace, config: GenerationConfig) -> EncoderDecoderModel:
    with user_errors():
        model = EncoderDecoderModel.from_preset(arguments.preset)
        check_config(config, model)
        if arguments.quantize:
            model.quantize(arguments.quantize)
    return model


if __name__ == "__main__":
    sys.exit(main())
