"""Our own folder format for a whole model.

| file | what it holds |
| --- | --- |
| config.json | sizes, settings of generation and tokenizer |
| model.weights.h5 | the weights, in Keras's format |
| vocab.txt or spiece.model | the tokenizer's vocabulary |
| decoder-vocab.txt or decoder-spiece.model | that of targets, if it is a different one |
"""

import inspect
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import h5py

from bertgen_tf import tokenizers
from bertgen_tf.checks import first_line
from bertgen_tf.data import folders
from bertgen_tf.data.preset_config import CONFIG_FILE, FORMAT, find_config
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.models.pretrained import Model
from bertgen_tf.network import sources
from bertgen_tf.network.weights import VariablePart, named_variables
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor

WEIGHTS_FILE = "model.weights.h5"
# Of an export: its graph, and TensorFlow's folder for what no graph reads, where the files of its
# preset are.
GRAPH_FILE = "saved_model.pb"
EXTRA_FOLDER = "assets.extra"
# Tokenizer -> its vocabulary's file, and the field of its config that takes the file's path.
VOCABULARIES = {
    "BertTokenizer": ("vocab.txt", "vocabulary"),
    "BertGenerationTokenizer": ("spiece.model", "proto"),
}
# The tokenizers of a model, and the prefixes of their files' names.
PREFIXES = {"tokenizer": None, "decoder_tokenizer": "decoder"}


def save(
    model: EncoderDecoderModel,
    folder: str | os.PathLike,
    check: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes `model` to `folder`, which must not exist, be empty, or hold only an older preset.

    The folder appears, or is replaced, only when everything is written. Optimizer and metrics are
    not included: Keras's `model.save` keeps them.

    Args:
        model: what to write.
        folder: where to.
        check: gets the finished folder under another name; if it raises, `folder` is untouched.

    Raises:
        OSError: see `bertgen_tf.data.folders.check_writable`.
    """

    def write(path: pathlib.Path) -> None:
        write_settings(model, path)
        # The same weights without the optimizer's, which Keras would write too.
        bare = EncoderDecoderModel(model.encoder, model.decoder)
        try:
            _check_room(path / WEIGHTS_FILE, bare.weights)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{folder}/{WEIGHTS_FILE}") from error
        bare.save_weights(path / WEIGHTS_FILE)

    folders.write_folder(folder, write, is_preset, "a preset", check)


def write_settings(model: EncoderDecoderModel, folder: pathlib.Path, **changes: Any) -> None:
    """Writes all of a preset but the weights, as `build` reads it.

    Args:
        folder: an existing one.
        changes: to what `get_config` gives.
    """
    config = {**model.get_config(), **changes}
    for side, prefix in PREFIXES.items():
        if config.get(side) is None:
            continue
        # The vocabulary has a file of its own, in the format that its field takes.
        field = VOCABULARIES[config[side]["class_name"]][1]
        file = getattr(model, side).save_vocabulary(folder, prefix)
        config[side]["config"][field] = os.path.basename(file)
    with open(folder / CONFIG_FILE, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "model": config}, file, indent=2)
        file.write("\n")


def _check_room(path: pathlib.Path, weights: list[Any]) -> None:
    """Raises an OSError if the weights do not fit on the disk: HDF5 might crash instead."""
    if not hasattr(os, "posix_fallocate"):
        return
    size = sum(4096 + math.prod(weight.shape) * 4 for weight in weights) + 2**16
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        path.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike) -> None:
    """Raises an OSError if `save` would, so that it is known before training."""
    folders.check_writable(folder, is_preset, "a preset")


def load(folder: str | os.PathLike, model_class: type[Model] = EncoderDecoderModel) -> Model:
    """Reads a model that `save` wrote.

    Args:
        folder: the preset.
        model_class: what to build, with the arguments of `EncoderDecoderModel`; a subclass with
            weights of its own is not supported.

    Raises:
        FileNotFoundError: there is no such folder, or one of its files is missing.
        ValueError: it is not a preset, or one of its files is damaged.
    """
    folder = pathlib.Path(folder)
    sources.handles.check_family(folder, sources.handles.PRESET)
    folders.check_replaced(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} should be a preset folder, but there is no such folder.")
    config = read_config(folder)
    _check_file(folder, WEIGHTS_FILE)
    model = build(folder, config, model_class)
    path = folder / WEIGHTS_FILE
    try:
        model.load_weights(path)
        stored = _count_tensors(path)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} should hold the weights of the model in {CONFIG_FILE}, but reading it failed: "
            f"{first_line(error)}"
        ) from error
    # Keras ignores what is left over, such as extra layers.
    expected = _expected_tensors(model)
    if stored != expected:
        raise ValueError(
            f"{path} should hold the weights of the model in {CONFIG_FILE}, which are {expected} "
            f"tensors, but holds {stored}."
        )
    return model


def build(folder: pathlib.Path, config: dict[str, Any], model_class: type[Model]) -> Model:
    """The model of what `write_settings` wrote, with initial weights.

    Args:
        config: what `read_config` gives.

    Raises:
        FileNotFoundError: a vocabulary is missing.
        ValueError: the settings, or a vocabulary, are damaged.
    """
    try:
        _read_vocabularies(folder, config)
        return model_class.from_config(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} should hold the settings and the vocabulary of a model, but building it "
            f"failed: {first_line(error)}"
        ) from error


def load_preprocessor(folder: str | os.PathLike) -> Seq2SeqPreprocessor:
    """What a preset, or an export that keeps a preset's files, makes of text, without the model.

    Raises:
        FileNotFoundError: a vocabulary is missing.
        ValueError: it is neither, has no tokenizer, or is damaged.
    """
    files = preprocessor_files(folder)
    _check_file(files[0].parent, files[0].name)
    config = read_config(files[0].parent)
    try:
        _read_vocabularies(files[0].parent, config)
        names = {*inspect.signature(Seq2SeqPreprocessor).parameters} - {*PREFIXES}
        options = {name: config[name] for name in names if name in config}
        for side in PREFIXES:
            if config.get(side) is not None:
                options[side] = tokenizers.deserialize(config[side])
        return Seq2SeqPreprocessor(**options)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} should hold the settings and the vocabulary of a model, but reading them "
            f"failed: {first_line(error)}"
        ) from error


def preprocessor_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """What determines `load_preprocessor`: the config of a preset or an export, its vocabularies.

    Raises:
        ValueError: it is neither, or has no tokenizer.
    """
    folder = pathlib.Path(folder)
    if versions := sources.exports.versions_in(folder):
        raise ValueError(
            f"{folder} should be a preset or an export, NAME/VERSION, but holds versions: use "
            f"{folder / versions[0]}."
        )
    extra = folder / EXTRA_FOLDER
    if (folder / GRAPH_FILE).is_file():
        if not (extra / CONFIG_FILE).is_file():
            raise ValueError(
                f"{folder} is an export without {EXTRA_FOLDER}/{CONFIG_FILE}, which has its "
                "tokenizer: name its preset, or export that again."
            )
        folder = extra
    config = read_config(folder)
    if not config.get("tokenizer"):
        raise ValueError(f"{folder} has no tokenizer: name a preset that reads and writes text.")
    try:
        names = [name for _, name, _ in _vocabularies(config)]
        return [folder / name for name in (CONFIG_FILE, *names)]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} should hold the settings of tokenizers, but reading them failed: "
            f"{first_line(error)}"
        ) from error


def _vocabularies(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """For each tokenizer of a config its field there, its file and the field of the vocabulary."""
    found = []
    for side, prefix in PREFIXES.items():
        if config[side] if side == "tokenizer" else config.get(side):
            # Our own names: a preset from elsewhere must not make us read other files.
            name, field = VOCABULARIES[config[side]["class_name"]]
            found.append((side, name if prefix is None else f"{prefix}-{name}", field))
    return found


def _read_vocabularies(folder: pathlib.Path, config: dict[str, Any]) -> None:
    """Puts the vocabularies of a folder into a config, as `get_config` of a tokenizer does."""
    for side, name, field in _vocabularies(config):
        _check_file(folder, name)
        vocabulary = tokenizers.read_vocabulary(config[side]["class_name"], folder / name)
        config[side]["config"][field] = vocabulary


def _check_file(folder: pathlib.Path, name: str) -> None:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} should hold {name}, but does not: copy it again.")


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config of the model in `folder`, without its vocabulary.

    Raises:
        FileNotFoundError, ValueError: it is not a preset.
    """
    folder = pathlib.Path(folder)
    config = find_config(folder)
    if config is not None:
        return config
    sources.handles.check_family(folder, sources.handles.PRESET)
    folders.check_replaced(folder)
    raise ValueError(
        f"{folder} should be a preset that save_to_preset wrote, but its {CONFIG_FILE} is missing "
        f"or is not that of a {FORMAT}."
    )


def has_config(folder: pathlib.Path) -> bool:
    """Whether a folder has the `config.json` of a preset."""
    return find_config(folder) is not None


def _expected_tensors(model: EncoderDecoderModel) -> int:
    """How many tensors a file of the model has: one for each variable, or for each part of it."""
    return len(
        {
            (id(v.variable), v.rows.start) if isinstance(v, VariablePart) else id(v)
            for v in named_variables(model).values()
        }
    )


def _count_tensors(path: pathlib.Path) -> int:
    names: list[str] = []
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
    return sum("seed_generator" not in name for name in names)


def is_preset(folder: pathlib.Path) -> bool:
    """Whether the folder holds a preset, and nothing else that replacing it would delete."""
    names = [name for name, _ in VOCABULARIES.values()]
    ours = {CONFIG_FILE, WEIGHTS_FILE, *names, *(f"decoder-{name}" for name in names)}
    return has_config(folder) and ours.issuperset(os.listdir(folder))
