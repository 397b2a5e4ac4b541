"""The command line: `bertgen-tf finetune | generate | export | convert | serve`, over the library.

Whatever its user can mend is one line on stderr and exit code 2; anything else is a bug and shows
its traceback.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import math
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import keras
import tensorflow as tf

from bertgen_tf import cli_batch, cli_output, presets, text_files
from bertgen_tf.cli_arguments import PROGRAM, make_parser
from bertgen_tf.cli_convert import convert, is_huggingface
from bertgen_tf.cli_serve import find_serve
from bertgen_tf.config import GenerationConfig
from bertgen_tf.encoder_decoder import EncoderDecoderModel
from bertgen_tf.export import ExportError, check_version_path, export_saved_model
from bertgen_tf.generation_settings import check_config
from bertgen_tf.generator import WINDOW, Generator
from bertgen_tf.optimizers import default_optimizer
from bertgen_tf.training import bucketed_dataset
from bertgen_tf.vocabulary import trim_vocabulary

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
HUB_FLAGS = ("decoder", "share", "cross_attention", "num_layers")


class UserError(Exception):
    """What the user can mend: the message tells how."""


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
        "finetune": _finetune,
        "generate": _generate,
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
    except KeyboardInterrupt:
        _complain("interrupted")
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
        _complain(f"error: {' '.join(message.split())}")
        return USER_ERROR
    return 0


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Around the calls by which the library checks what a user gave: its ValueErrors are theirs.

    So are its ImportErrors, which tell what to install.

    Not around training and generation, where a ValueError is a bug.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error


def _complain(message: str) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------- finetune


def _finetune(arguments: argparse.Namespace) -> None:
    # First what would otherwise fail after hours of training.
    presets.check_writable(arguments.output)
    if arguments.preset:
        given = [name for name in HUB_FLAGS if getattr(arguments, name) is not None]
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UserError(f"{flags} applies to --encoder only, not to --preset")
        _read_preset_config(arguments.preset)
    with _user_errors():
        training = text_files.read_pairs(arguments.train)
        validation = text_files.read_pairs(arguments.validation) if arguments.validation else []
        keras.utils.set_random_seed(arguments.seed)
        model = _start_model(arguments)
        if arguments.trim_vocabulary:
            texts = [text for pair in training + validation for text in pair]
            model = trim_vocabulary(model, texts)
    saved_config = model.get_config()
    if arguments.mixed_precision:
        policy = {"dtype": "mixed_bfloat16"}
        stacks = {name: {**saved_config[name], **policy} for name in ("encoder", "decoder")}
        model = _rebuild(model, {**saved_config, **stacks, **policy})

    batches, steps, epochs = _batches(arguments, model, training)
    total = steps * epochs
    warmup = total // 10 if arguments.warmup_steps is None else arguments.warmup_steps
    if warmup >= total:
        raise UserError(f"--warmup-steps must be below all {total} steps, received {warmup}")
    model.compile(
        optimizer=default_optimizer(arguments.learning_rate, warmup_steps=warmup, total_steps=total)
    )
    print(
        f"{len(training):,} pairs to train on, {len(validation):,} to validate on; "
        f"{model.count_params():,} weights, {model.encoder.config.vocab_size:,} word pieces; "
        f"{total:,} steps of up to {arguments.batch_size:,} pairs",
        flush=True,
    )
    held_out = None
    if validation:
        held_out = bucketed_dataset(_dataset(validation), model.preprocessor, arguments.batch_size)
        held_out = _counted(held_out)
    history = model.fit(
        batches,
        steps_per_epoch=steps,
        epochs=epochs,
        validation_data=held_out,
        callbacks=[keras.callbacks.TerminateOnNaN()],
        # A bar that is redrawn fills up a file.
        verbose=1 if sys.stdout.isatty() else 2,
    ).history
    if not math.isfinite(history["loss"][-1]):
        raise UserError("training diverged, nothing was saved: lower --learning-rate")
    if validation:
        loss, accuracy = history["val_loss"][-1], history["val_accuracy"][-1]
        print(f"validation: loss {loss:.4f} a token, {accuracy:.1%} of the tokens right")
    if arguments.mixed_precision:
        model = _rebuild(model, saved_config)
    model.save_to_preset(arguments.output)
    print(
        f"saved to {arguments.output}; try it:\n"
        f"  {PROGRAM} generate --preset {shlex.quote(arguments.output)}"
    )


def _start_model(arguments: argparse.Namespace) -> EncoderDecoderModel:
    """The model to train: of a preset, or warm-started; with the lengths of the flags."""
    names = ("max_source_length", "max_target_length")
    values = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    if arguments.preset:
        model = EncoderDecoderModel.from_preset(arguments.preset)
        if model.is_quantized:
            raise UserError(f"{arguments.preset} is int8: train the float32 preset it was made of")
        if given:
            model = _rebuild(model, {**model.get_config(), **given})
    else:
        read = EncoderDecoderModel.from_hub
        if is_huggingface(arguments.encoder):
            read = EncoderDecoderModel.from_huggingface
        model = read(
            encoder=arguments.encoder,
            decoder=arguments.decoder,
            share=bool(arguments.share),
            cross_attention=arguments.cross_attention or "random",
            num_layers=arguments.num_layers,
            **given,
        )
        if model.tokenizer is None:
            raise UserError(f"{arguments.encoder} has no tokenizer, without which there is no text")
    if arguments.encoder or arguments.max_target_length:
        model.generation_config = model.generation_config.replace(
            max_new_tokens=model.preprocessor.max_target_length
        )
    return model


def _rebuild(model: EncoderDecoderModel, config: dict[str, Any]) -> EncoderDecoderModel:
    """A model of another config with the same weights."""
    other = EncoderDecoderModel.from_config(config)
    other.set_weights(model.get_weights())
    return other


def _dataset(pairs: list[tuple[str, str]]) -> tf.data.Dataset:
    sources, targets = zip(*pairs, strict=True)
    return tf.data.Dataset.from_tensor_slices((list(sources), list(targets)))


def _batches(
    arguments: argparse.Namespace, model: EncoderDecoderModel, pairs: list[tuple[str, str]]
) -> tuple[tf.data.Dataset, int, int]:
    """The batches, how many are an epoch, and how many epochs to train."""
    dataset = _dataset(pairs)
    # Counted in steps, passes need no end, and no smaller batches that would compile anew.
    batches = bucketed_dataset(
        dataset.repeat() if arguments.steps else dataset,
        model.preprocessor,
        arguments.batch_size,
        shuffle=len(pairs),
        seed=arguments.seed,
    )
    if arguments.steps:
        return batches, arguments.steps, 1
    batches = _counted(batches)
    return batches, int(batches.cardinality()), arguments.epochs


def _counted(batches: tf.data.Dataset) -> tf.data.Dataset:
    """The same batches, in a dataset that knows its length: Keras complains of others."""
    count = int(batches.reduce(0, lambda count, _: count + 1))
    return batches.apply(tf.data.experimental.assert_cardinality(count))


# ------------------------------------------------------------------------- generate and export


def _generate(arguments: argparse.Namespace) -> None:
    path = arguments.output
    with _user_errors():
        cli_batch.check_flags(arguments)
    if arguments.engine == "ray":
        _generate_on_ray(arguments)
        return
    with _user_errors():
        cli_output.check_path(path, arguments.overwrite, arguments.resume)
    stream = arguments.input == "-" or Path(arguments.input).is_fifo()
    if stream and arguments.resume:
        raise UserError("--resume needs --input, a file that can be read again")
    config = _read_settings(arguments)
    total = run = None
    begun = cli_output.Begun()
    if not stream:
        with _user_errors():
            # Twice is little beside generating, and finds every malformed line now.
            total = sum(1 for _ in text_files.read_texts(arguments.input))
        if path != "-":
            run = {
                "input": cli_output.digest(arguments.input),
                **_describe_model(arguments, config),
            }
    if arguments.resume:
        with _user_errors():
            begun = cli_output.find_begun(path, run, total)
        if cli_output.is_complete(path):
            cli_output.forget(path)
            _complain(f"{path} is complete")
            return
    model = _load(arguments, config)
    with cli_output.open_output(path, run, begun, _complain) as file:
        _generate_lines(arguments, model, config, begun.lines, total, file)


def _generate_on_ray(arguments: argparse.Namespace) -> None:
    config = run = model = None
    if arguments.preset:
        config = _read_settings(arguments)
        run = _describe_model(arguments, config)
    with _user_errors():
        jobs = cli_batch.find_jobs(arguments, run)
    if all(job.begun is None for job in jobs):
        _complain(f"{arguments.output} is complete")
        return
    if arguments.preset:
        model = _load(arguments, config)
    cli_batch.run_jobs(arguments, jobs, model, config, _complain)


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
        _complain("one text a line, Ctrl-D to end")
    window = 1 if at_keyboard else WINDOW
    # Windows begin where they would have: the same batches give the same bits.
    first = done if done == total else done // window * window
    sources: collections.deque[str] = collections.deque()
    outputs = Generator(model).iterate(
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
            cli_output.sync(file)


def _read_texts(path: str, first: int, sources: collections.deque[str]) -> Iterator[str]:
    """The texts from `first` on; they wait in `sources` for their outputs, too."""
    texts = itertools.islice(text_files.read_texts(path), first, None)
    while True:
        with _user_errors():
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
        "preset": cli_output.digest(
            *(preset / name for name in names if (preset / name).is_file())
        ),
        "quantize": arguments.quantize,
        **config.to_dict(),
    }


def _export(arguments: argparse.Namespace) -> None:
    with _user_errors():
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
    with _user_errors():
        convert(arguments)


def _serve(arguments: argparse.Namespace) -> None:
    options = vars(arguments).copy()
    del options["command"]
    with _user_errors():
        serve = find_serve()
    serve(**options)


def _read_preset_config(folder: str) -> dict[str, Any]:
    with _user_errors():
        config = presets.read_config(folder)
    if not config.get("tokenizer"):
        raise UserError(f"{folder} has no tokenizer, without which there is no text")
    return config


def _read_settings(arguments: argparse.Namespace) -> GenerationConfig:
    """The settings of the preset with those of the flags in their place."""
    saved = _read_preset_config(arguments.preset).get("generation_config")
    try:
        config = GenerationConfig.from_dict(saved)
    except (TypeError, ValueError) as error:
        raise UserError(f"{arguments.preset} has a damaged generation_config: {error}") from error
    names = [field.name for field in dataclasses.fields(config)]
    with _user_errors():
        # Flags that are not given have no attribute: None is a value.
        return config.replace(**{k: getattr(arguments, k) for k in names if hasattr(arguments, k)})


def _load(arguments: argparse.Namespace, config: GenerationConfig) -> EncoderDecoderModel:
    with _user_errors():
        model = EncoderDecoderModel.from_preset(arguments.preset)
        check_config(config, model)
        if arguments.quantize:
            model.quantize(arguments.quantize)
    return model


if __name__ == "__main__":
    sys.exit(main())
