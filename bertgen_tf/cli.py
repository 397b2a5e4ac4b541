"""The command line: `bertgen-tf finetune | generate | export`, over the library's functions.

Whatever its user can mend is one line on stderr and exit code 2; anything else is a bug and shows
its traceback. TensorFlow takes seconds to load, so that it is imported inside the commands, after
the arguments and files are checked as far as that goes without it.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from bertgen_tf.config import BEAM_SCORERS, GenerationConfig

PROGRAM = "bertgen-tf"
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
JSON_LINES = (".jsonl", ".json")
TAB_SEPARATED = (".tsv", ".txt")
CHUNK_SIZE = 32  # texts that are generated, and written, at a time
STACKS = ("encoder", "decoder")
HUB_FLAGS = ("decoder", "share", "cross_attention", "num_layers")
# What some reader of lines would take for the end of one, or of a column.
SEPARATORS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")


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
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        try:
            arguments = _parser().parse_args(argv)
            arguments.run(arguments)
        finally:
            sys.stdout.flush()
    except SystemExit as stop:  # of --help
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

    Not around training and generation, where a ValueError is a bug.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def _complain(message: str) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------ arguments


class _Parser(argparse.ArgumentParser):
    """One-line errors, no abbreviated options, descriptions as they are written."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Sequence-to-sequence models warm-started from BERT: fine-tune one on pairs of "
        "texts,\ngenerate text with it, export it for TensorFlow Serving.",
        epilog=f"`{PROGRAM} COMMAND --help` explains a command and shows an example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_finetune(commands)
    _add_generate(commands)
    _add_export(commands)
    return parser


def _add_finetune(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="train a model on pairs of texts",
        description="Trains an encoder-decoder on pairs of texts, and saves it as a preset folder.",
        epilog="""\
files of pairs, in UTF-8, one pair a line:
  .tsv, .txt     source<TAB>target
  .jsonl, .json  {"source": "...", "target": "..."}

example:
  bertgen-tf finetune --encoder path/to/bert_module --share --cross-attention self_attention \\
      --train train.tsv --validation validation.tsv --epochs 3 --output my_model""",
    )
    parser.set_defaults(run=_finetune)
    data = parser.add_argument_group("data")
    data.add_argument("--train", required=True, metavar="FILE", help="pairs to train on")
    data.add_argument("--validation", metavar="FILE", help="pairs that only measure")
    data.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="where the preset goes: a new or empty folder, or an older preset, to replace it",
    )
    start = parser.add_argument_group("the model to start from")
    source = start.add_mutually_exclusive_group(required=True)
    source.add_argument("--encoder", metavar="HANDLE", help="TF Hub BERT module: a folder or a URL")
    source.add_argument("--preset", metavar="FOLDER", help="continue with a fine-tuned model")
    start.add_argument(
        "--decoder", metavar="HANDLE", help="another module for the decoder (default: --encoder's)"
    )
    start.add_argument(
        "--share",
        action="store_true",
        default=None,
        help="one set of weights for encoder and decoder (the paper's BERTSHARE), which makes a "
        "smaller model (default: only the word embeddings are shared)",
    )
    start.add_argument(
        "--cross-attention",
        choices=("random", "self_attention"),
        help="how the weights that BERT does not have begin: random, or a copy of each layer's "
        "self-attention, which learns to copy from the source much sooner (default: random)",
    )
    start.add_argument(
        "--num-layers",
        type=_layers,
        metavar="N",
        help="keep the first N layers, or those of a list counted from 0, such as 0,2,4 "
        "(default: all)",
    )
    start.add_argument(
        "--trim-vocabulary",
        action="store_true",
        help="keep only the word pieces that the texts of --train and --validation need: a smaller "
        "and faster model, which knows no other words",
    )
    texts = parser.add_argument_group("texts")
    for side in ("source", "target"):
        texts.add_argument(
            f"--max-{side}-length",
            type=_count,
            metavar="TOKENS",
            help=f"longer {side}s are cut (default: the preset's; with --encoder 128, or what the "
            "model allows if that is less)"
            + ("; also the default length of what is generated" if side == "target" else ""),
        )
    for token, role in (
        ("bos", "begin each source and target with the start"),
        ("eos", "end each source with the end"),
    ):
        texts.add_argument(
            f"--add-{token}",
            action=argparse.BooleanOptionalAction,
            help=f"{role} token, as BERT was trained (default: the preset's; with --encoder yes)",
        )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=_count,
        default=3,
        metavar="N",
        help="passes over the training pairs (default: %(default)s)",
    )
    training.add_argument(
        "--steps",
        type=_count,
        metavar="N",
        help="batches to train on, instead of --epochs; then validates once, at the end",
    )
    training.add_argument(
        "--batch-size",
        type=_count,
        default=32,
        metavar="PAIRS",
        help="pairs of a batch (default: %(default)s); fewer need less memory",
    )
    training.add_argument(
        "--learning-rate",
        type=_positive_number,
        default=1e-4,
        metavar="RATE",
        help="its highest value, from which it falls to 0 (default: %(default)s)",
    )
    training.add_argument(
        "--warmup-steps",
        type=_count_or_zero,
        metavar="N",
        help="steps in which the learning rate rises (default: a tenth of all)",
    )
    training.add_argument(
        "--seed",
        type=_count_or_zero,
        default=0,
        metavar="N",
        help="of new weights, shuffling and dropout (default: %(default)s)",
    )
    training.add_argument(
        "--mixed-precision",
        action="store_true",
        help="compute in bfloat16 while training: faster on GPUs, slower on most CPUs",
    )


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate a text for each line of a file",
        description="Generates a text for each line of the input, in its order.",
        epilog="""\
files, in UTF-8:
  .jsonl, .json  in: {"source": "..."} a line, out: {"source": "...", "output": "..."}, where
                 "output" is a list if --num-return-sequences is above 1
  .tsv           in: the first column of each line
  others         in: one text a line; out: one text a line, tabs between several

example:
  bertgen-tf generate --preset my_model --input sources.txt --output outputs.txt --num-beams 4""",
    )
    parser.set_defaults(run=_generate)
    _add_preset_flag(parser)
    parser.add_argument(
        "--input", default="-", metavar="FILE", help="texts (default: -, standard input)"
    )
    parser.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="a new file, called FILE.partial until it is complete (default: -, standard output)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument(
        "--no-xla",
        action="store_true",
        help="do not compile with XLA: starts sooner, then is slower",
    )
    _add_generation_flags(parser)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="export a model for TensorFlow Serving",
        description="Writes a preset as a SavedModel, text in and text out, that TensorFlow Serving"
        " runs.\nThe settings of generation are baked in.",
        epilog="""\
example:
  bertgen-tf export --preset my_model --output saved_models/my_model/1 --num-beams 4""",
    )
    parser.set_defaults(run=_export)
    _add_preset_flag(parser)
    parser.add_argument(
        "--output",
        required=True,
        metavar="NAME/VERSION",
        help="a new folder, called by an integer, such as saved_models/my_model/1",
    )
    # The signatures give the best hypothesis only.
    _add_generation_flags(parser, leave_out=("num_return_sequences",))


def _add_preset_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", required=True, metavar="FOLDER", help="a model that finetune saved"
    )


def _add_generation_flags(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """A flag for each field of `GenerationConfig`; those not given keep the preset's value."""
    helps = {
        "max_new_tokens": "the most tokens to generate, the end token included",
        "min_new_tokens": "no end before so many tokens",
        "num_beams": "width of the beam search; 1 is greedy search",
        "num_return_sequences": "outputs of each text, best first; at most --num-beams",
        "beam_scorer": "how beam search compares lengths and stops: as HuggingFace does, or as "
        "Google's NMT, which the TF Hub originals use",
        "length_penalty": "exponent of the length by which huggingface divides scores: higher "
        "makes longer texts",
        "early_stopping": "when huggingface's beam search ends: with the first --num-beams "
        "complete texts (true), when better ones are unlikely (false) or impossible (never)",
        "gnmt_alpha": "the same exponent for gnmt",
        "suppress_tokens": "ids of tokens that are never generated, such as 5,17",
    }
    kinds: dict[Any, dict[str, Any]] = {
        int: {"type": int, "metavar": "N"},
        float: {"type": _number, "metavar": "X"},
        "beam_scorer": {"choices": BEAM_SCORERS},
        "early_stopping": {"type": _early_stopping, "metavar": "true|false|never"},
        "suppress_tokens": {"type": _ids, "metavar": "ID,ID"},
    }
    group = parser.add_argument_group(
        "generation", "A setting that is left out is that of the preset, as finetune saved it."
    )
    for field in dataclasses.fields(GenerationConfig):
        if field.name in leave_out:
            continue
        default = str(field.default).lower() if field.default != () else "none"
        if field.name == "max_new_tokens":
            default = "finetune's --max-target-length"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            help=f"{helps[field.name]} (default: {default})",
            **(kinds.get(field.name) or kinds[field.type]),
        )


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, received {text!r}")
    return int(text)


def _count_or_zero(text: str) -> int:
    # Seeds have 32 bits.
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"expected an integer from 0 to {2**32 - 1}, received {text!r}"
        )
    return int(text)


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number, received {text!r}")


def _positive_number(text: str) -> float:
    if _number(text) <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, received {text!r}")
    return _number(text)


def _ids(text: str) -> tuple[int, ...]:
    if not re.fullmatch("([0-9]{1,9}(,|$))*", text):
        raise argparse.ArgumentTypeError(
            f"expected integers with commas between them, received {text!r}"
        )
    return tuple(int(number) for number in text.split(",") if number)


def _layers(text: str) -> int | list[int]:
    layers = _ids(text)
    return layers[0] if re.fullmatch("[0-9]+", text) else list(layers)


def _early_stopping(text: str) -> bool | str:
    values = {"true": True, "false": False, "never": "never"}
    if text not in values:
        raise argparse.ArgumentTypeError(f"expected true, false or never, received {text!r}")
    return values[text]


# --------------------------------------------------------------------------------------- inputs


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, `-` being standard input, without their ends."""
    opened = contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")
    with opened as file:
        # Not as text, where U+2028 and its like would end lines too.
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{_place(path, number)}: expected UTF-8, but byte {error.start + 1} of the "
                    f"line ({line[error.start]:#04x}) is none"
                ) from error
            yield number, text.removesuffix("\n").removesuffix("\r")


def _place(path: str, number: int) -> str:
    return f"{'standard input' if path == '-' else path}, line {number}"


def _without_blank_end(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    blank = []
    for line in lines:
        if not line[1].strip():
            blank.append(line)
            continue
        yield from blank
        blank.clear()
        yield line


def _json_texts(path: str, number: int, line: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    """The texts under `keys` of a line of JSON."""
    expected = "{" + ", ".join(f'"{key}": "..."' for key in keys) + "}"
    try:
        values = json.loads(line)
        texts = tuple(values[key] for key in keys)
        for text in texts:
            text.encode()  # JSON can spell half a character
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{_place(path, number)}: expected {expected}, found {_cut(line)}"
        ) from error
    return texts


def _cut(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:60] + "...")


def _read_pairs(path: str) -> list[tuple[str, str]]:
    """The (source, target) pairs of a file to train on."""
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in TAB_SEPARATED + JSON_LINES:
        raise UserError(
            f"{path} should have one of the extensions {', '.join(TAB_SEPARATED)} (source<TAB>"
            f"target) and {', '.join(JSON_LINES)} (JSON lines): they tell its format"
        )
    pairs = []
    for number, line in _without_blank_end(_lines(path)):
        if suffix in JSON_LINES:
            source, target = _json_texts(path, number, line, ("source", "target"))
        elif line.count("\t") == 1:
            source, target = line.split("\t")
        else:
            raise UserError(
                f"{_place(path, number)}: expected source<TAB>target, found {line.count(chr(9))} "
                f"tabs in {_cut(line)}"
            )
        pairs.append((source, target))
    if not pairs:
        raise UserError(f"{path} should hold pairs of texts, but is empty")
    return pairs


def _read_texts(path: str) -> Iterator[str]:
    """The texts of a file to generate from, one for each line."""
    suffix = pathlib.Path(path).suffix.lower()
    if suffix in JSON_LINES:
        for number, line in _without_blank_end(_lines(path)):
            yield _json_texts(path, number, line, ("source",))[0]
    else:
        for _, line in _lines(path):
            yield line.split("\t")[0] if suffix == ".tsv" else line


def _preset_config(folder: str) -> dict[str, Any]:
    """The config of a preset; see `bertgen_tf.presets` for the folder's format."""
    try:
        content = json.loads(pathlib.Path(folder, "config.json").read_text(encoding="utf-8"))
        if content["format"] == "bertgen_tf preset" and isinstance(content["model"], dict):
            return content["model"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{folder} should be a preset, a folder that `{PROGRAM} finetune` saved")


def _generation_config(arguments: argparse.Namespace) -> GenerationConfig:
    """The settings of the preset, with those of the flags in their place."""
    saved = _preset_config(arguments.preset)
    if not saved.get("tokenizer"):
        raise UserError(f"{arguments.preset} has no tokenizer, without which there is no text")
    given = {
        field.name: value
        for field in dataclasses.fields(GenerationConfig)
        if (value := getattr(arguments, field.name, None)) is not None
    }
    try:
        config = GenerationConfig.from_dict(saved.get("generation_config", {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"{arguments.preset} has a damaged generation_config: {error}") from error
    with _user_errors():
        return config.replace(**given)


def _library() -> Any:
    """`bertgen_tf`, with TensorFlow's advice to programmers switched off."""
    import tensorflow as tf

    import bertgen_tf as bg

    tf.get_logger().setLevel("ERROR")
    return bg


def _load_preset(folder: str, config: GenerationConfig) -> Any:
    """The model, after its settings were held against it."""
    bg = _library()
    from bertgen_tf.generation import check_config

    with _user_errors():
        model = bg.EncoderDecoderModel.from_preset(folder)
        check_config(config, model)
    return model


# ------------------------------------------------------------------------------------- finetune


def _finetune(arguments: argparse.Namespace) -> None:
    _check_finetune(arguments)
    training = _read_pairs(arguments.train)
    validation = _read_pairs(arguments.validation) if arguments.validation else []

    bg = _library()
    import keras

    keras.utils.set_random_seed(arguments.seed)
    with _user_errors():
        model = _start_model(arguments)
        if arguments.trim_vocabulary:
            texts = [text for pair in training + validation for text in pair]
            model = bg.trim_vocabulary(model, texts)
    saved_config = model.get_config()
    if arguments.mixed_precision:
        parts = {part: {**saved_config[part], "dtype": "mixed_bfloat16"} for part in STACKS}
        model = _rebuild(model, {**saved_config, **parts, "dtype": "mixed_bfloat16"})

    batches, steps, epochs = _batches(arguments, model.preprocessor, training)
    total = steps * epochs
    warmup = total // 10 if arguments.warmup_steps is None else arguments.warmup_steps
    if warmup >= total:
        raise UserError(f"--warmup-steps must be below all {total} steps, received {warmup}")
    model.compile(
        optimizer=bg.default_optimizer(
            arguments.learning_rate, warmup_steps=warmup, total_steps=total
        )
    )
    print(
        f"{len(training):,} pairs to train on, {len(validation):,} to validate on; "
        f"{model.count_params():,} weights, {model.encoder.config.vocab_size:,} word pieces; "
        f"{total:,} steps of up to {arguments.batch_size:,} pairs",
        flush=True,
    )
    held_out = None
    if validation:
        held_out = _counted(
            bg.bucketed_dataset(_dataset(validation), model.preprocessor, arguments.batch_size)
        )
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
    with _user_errors():
        model.save_to_preset(arguments.output)
    print(
        f"saved to {arguments.output}; try it:\n"
        f"  {PROGRAM} generate --preset {shlex.quote(arguments.output)}"
    )


def _check_finetune(arguments: argparse.Namespace) -> None:
    """What would otherwise fail after seconds, or after hours of training."""
    if arguments.preset:
        given = [name for name in HUB_FLAGS if getattr(arguments, name) is not None]
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UserError(f"{flags} applies to --encoder only, not to --preset")
        _preset_config(arguments.preset)
    for handle in (arguments.encoder, arguments.decoder):
        if handle and "://" not in handle and not os.path.isdir(handle):
            raise UserError(
                f"{handle} should be the folder of a TF Hub module or a URL, but there is no such "
                "folder"
            )
    folder = pathlib.Path(arguments.output)
    if folder.is_dir() and any(folder.iterdir()):
        try:
            _preset_config(arguments.output)
        except UserError:
            raise UserError(
                f"--output must be a new or empty folder, or a preset to replace, but {folder} "
                "holds other files"
            ) from None
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output must be a folder that can be written, but {existing} is none")


def _start_model(arguments: argparse.Namespace) -> Any:
    """The model to train: of a preset, or warm-started; with the lengths of the flags."""
    import bertgen_tf as bg

    names = ("max_source_length", "max_target_length", "add_bos", "add_eos")
    values = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    if arguments.preset:
        model = bg.EncoderDecoderModel.from_preset(arguments.preset)
        if model.tokenizer is None:
            raise UserError(f"{arguments.preset} has no tokenizer, without which there is no text")
        if given:
            model = _rebuild(model, {**model.get_config(), **given})
    else:
        model = bg.EncoderDecoderModel.from_hub(
            encoder=arguments.encoder,
            decoder=arguments.decoder,
            share=bool(arguments.share),
            cross_attention=arguments.cross_attention or "random",
            num_layers=arguments.num_layers,
            **given,
        )
    if arguments.encoder or arguments.max_target_length:
        model.generation_config = model.generation_config.replace(
            max_new_tokens=model.preprocessor.max_target_length
        )
    return model


def _rebuild(model: Any, config: dict[str, Any]) -> Any:
    """A model of another config with the same weights."""
    other = type(model).from_config(config)
    other.set_weights(model.get_weights())
    return other


def _dataset(pairs: list[tuple[str, str]]) -> Any:
    import tensorflow as tf

    sources, targets = zip(*pairs, strict=True)
    return tf.data.Dataset.from_tensor_slices((list(sources), list(targets)))


def _batches(
    arguments: argparse.Namespace, preprocessor: Any, pairs: list[tuple[str, str]]
) -> tuple[Any, int, int]:
    """The batches, how many are an epoch, and how many epochs to train."""
    import bertgen_tf as bg

    dataset = _dataset(pairs)
    # Counted in steps, passes need no end, and no smaller batches that would compile anew.
    batches = bg.bucketed_dataset(
        dataset.repeat() if arguments.steps else dataset,
        preprocessor,
        arguments.batch_size,
        shuffle=len(pairs),
        seed=arguments.seed,
    )
    if arguments.steps:
        return batches, arguments.steps, 1
    batches = _counted(batches)
    return batches, int(batches.cardinality()), arguments.epochs


def _counted(batches: Any) -> Any:
    """The same batches, in a dataset that knows its length: Keras complains of others."""
    import tensorflow as tf

    count = int(batches.reduce(0, lambda count, _: count + 1))
    return batches.apply(tf.data.experimental.assert_cardinality(count))


# ------------------------------------------------------------------------------------- generate


def _generate(arguments: argparse.Namespace) -> None:
    _check_output_file(arguments.output, arguments.overwrite)
    config = _generation_config(arguments)
    total = None
    if arguments.input != "-":
        if not os.path.exists(arguments.input):
            raise UserError(f"--input: there is no file {arguments.input}")
        if not _is_special(arguments.input):
            # Twice is little beside generating, and finds every malformed line now.
            total = sum(1 for _ in _read_texts(arguments.input))
    model = _load_preset(arguments.preset, config)

    at_keyboard = arguments.input == "-" and sys.stdin.isatty()
    if at_keyboard:
        _complain("one text a line, Ctrl-D to end")
    as_json = pathlib.Path(arguments.output).suffix.lower() in JSON_LINES
    texts = _read_texts(arguments.input)
    show = _progress(total, arguments.output)
    done = 0
    with _open_output(arguments.output) as file:
        while chunk := list(itertools.islice(texts, 1 if at_keyboard else CHUNK_SIZE)):
            show(done)
            outputs = model.generate(chunk, config, jit_compile=not arguments.no_xla)
            for source, output in zip(chunk, outputs, strict=True):
                file.write(_output_line(source, output, as_json))
            file.flush()
            done += len(chunk)
        show(done)


def _output_line(source: str, output: str | list[str], as_json: bool) -> str:
    if as_json:
        return json.dumps({"source": source, "output": output}, ensure_ascii=False) + "\n"
    hypotheses = [output] if isinstance(output, str) else output
    return "\t".join(SEPARATORS.sub(" ", text) for text in hypotheses) + "\n"


def _is_special(path: str) -> bool:
    """A pipe or a device: it can be read or written once, and never replaced."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _check_output_file(path: str, overwrite: bool) -> None:
    if path == "-" or _is_special(path):
        return
    if os.path.isdir(path):
        raise UserError(f"--output must be a file, but {path} is a folder")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--output must lie in a folder that can be written, but {folder} is none")
    for existing in (path, path + ".partial"):
        if os.path.exists(existing) and not overwrite:
            raise UserError(f"{existing} exists; --overwrite replaces it")


@contextlib.contextmanager
def _open_output(path: str) -> Iterator[TextIO]:
    """A file that gets its name when it is complete, so that no error costs an older one."""
    if path == "-":
        sys.stdout.reconfigure(encoding="utf-8")
        yield sys.stdout
        return
    partial = path if _is_special(path) else path + ".partial"
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        try:
            yield file
        except BaseException:
            if file.tell():
                _complain(f"what was finished is in {partial}")
            raise
    if partial != path:
        os.replace(partial, path)


def _progress(total: int | None, output: str) -> Callable[[int], None]:
    """A function that shows, on a terminal, how many texts are done."""
    if not sys.stderr.isatty() or (output == "-" and sys.stdout.isatty()):
        return lambda done: None
    start = time.monotonic()

    def show(done: int) -> None:
        speed = done / max(time.monotonic() - start, 1e-9)
        if total is None:
            text = f"{done} texts, {speed:.1f} a second"
        else:
            filled = 30 * done // max(total, 1)
            text = f"[{'=' * filled:.<30}] {done}/{total} texts, {speed:.1f} a second"
        print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


# --------------------------------------------------------------------------------------- export


def _export(arguments: argparse.Namespace) -> None:
    path = pathlib.Path(arguments.output)
    if not path.name.isdecimal():
        raise UserError(
            f"--output must end in an integer version, received {path}; use {path / '1'}"
        )
    if path.exists():
        raise UserError(f"--output must be a new version, but {path} exists; use another number")
    config = _generation_config(arguments)
    model = _load_preset(arguments.preset, config)

    import bertgen_tf as bg

    with _user_errors():
        bg.export_saved_model(model, path, config)
    folder = path.absolute().parent
    mount = shlex.quote(f"{folder}:/models/{folder.name}")
    name = shlex.quote(folder.name)
    print(f"""\
written: {path}, with the signatures serving_default (any server) and generate_xla (XLA)
serve it:
  docker run --rm -p 8501:8501 -v {mount} -e MODEL_NAME={name} tensorflow/serving
ask it:
  curl http://localhost:8501/v1/models/{name}:predict -d '{{"inputs": {{"text": ["..."]}}}}'""")


if __name__ == "__main__":
    sys.exit(main())
