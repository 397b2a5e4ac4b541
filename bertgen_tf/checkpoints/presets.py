"""Our own folder format for a whole model.

| file | what it holds |
| --- | --- |
| config.json | sizes, settings of generation and tokenizer; checksums of all files |
| model.weights.h5 | the weights, in Keras's format |
| vocab.txt or spiece.model | the tokenizer's vocabulary |
| decoder-vocab.txt or decoder-spiece.model | that of targets, if it is a different one |
"""

import inspect
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import h5py

from bertgen_tf import tokenizers
from bertgen_tf.checks import Damaged, first_line
from bertgen_tf.config import BertGenerationConfig
from bertgen_tf.data import folders
from bertgen_tf.data.preset_config import (
    CONFIG_FILE,
    FORMAT,
    check_files,
    find_config,
    write_config,
)
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
_NAMES = [name for name, _ in VOCABULARIES.values()]
# What a preset can hold.
FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, *_NAMES, *(f"decoder-{name}" for name in _NAMES)})


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
        # The same weights without the optimizer's, which Keras would write too.
        bare = EncoderDecoderModel(model.encoder, model.decoder)
        try:
            _check_room(path / WEIGHTS_FILE, bare.weights)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{folder}/{WEIGHTS_FILE}") from error
        bare.save_weights(path / WEIGHTS_FILE)
        write_settings(model, path)

    folders.write_folder(folder, write, is_preset, "a preset", check)


def write_settings(model: EncoderDecoderModel, folder: pathlib.Path, **changes: Any) -> None:
    """Writes all of a preset but the weights, as `build` reads it.

    Args:
        folder: an existing one, with the weights if it is to have them.
        changes: to what `get_config` gives.
    """
    config = {**model.get_config(), **changes}
    files = [WEIGHTS_FILE] if (folder / WEIGHTS_FILE).is_file() else []
    for side, prefix in PREFIXES.items():
        if config.get(side) is None:
            continue
        # The vocabulary has a file of its own, in the format that its field takes.
        field = VOCABULARIES[config[side]["class_name"]][1]
        file = getattr(model, side).save_vocabulary(folder, prefix)
        files.append(os.path.basename(file))
        config[side]["config"][field] = files[-1]
    write_config(folder, config, files)


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
    path = folder / WEIGHTS_FILE
    check_files(folder, [WEIGHTS_FILE])
    model = build(folder, config, model_class, path)
    try:
        stored = _count_tensors(path)
        model.load_weights(path)
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


def build(
    folder: pathlib.Path, config: dict[str, Any], model_class: type[Model], weights: pathlib.Path
) -> Model:
    """The model of what `write_settings` wrote, with initial weights.

    Args:
        config: what `read_config` gives.
        weights: their file, or the folder of their files: more than that is not allocated.

    Raises:
        FileNotFoundError: a vocabulary is missing.
        ValueError: the settings, or a vocabulary, are damaged, or the weights are of a smaller
            model.
    """
    files = [weights] if weights.is_file() else weights.glob("*")
    size = sum(path.stat().st_size for path in files)
    try:
        # A number has at least one byte.
        least = max(_least_weights(config[side]["config"]) for side in ("encoder", "decoder"))
        if least <= size:
            _read_vocabularies(folder, config)
            return model_class.from_config(config)
    except Damaged:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} should hold the settings and the vocabulary of a model, but building it "
            f"failed: {first_line(error)}"
        ) from error
    raise ValueError(
        f"{weights} should hold the weights of the model in {CONFIG_FILE}, which has more than "
        f"{least:,}, but has {size:,} bytes."
    )


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
    except Damaged:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
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
        check_files(folder, [name])
        vocabulary = tokenizers.read_vocabulary(config[side]["class_name"], folder / name)
        config[side]["config"][field] = vocabulary


def _check_file(folder: pathlib.Path, name: str) -> None:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} should hold {name}, but does not: copy it again.")


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config of the model in `folder`, without its vocabulary.

    Raises:
        FileNotFoundError, ValueError: it is not a preset, or its config is damaged.
    """
    folder = pathlib.Path(folder)
    config = find_config(folder)
    if config is not None:
        check_files(folder, [CONFIG_FILE])
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


def _least_weights(stack: dict[str, Any]) -> int:
    """A number of weights that no stack of these settings falls below."""
    sizes = BertGenerationConfig.from_dict(stack)
    layer = 4 * sizes.hidden_size + 2 * sizes.intermediate_size
    rows = sizes.vocab_size + sizes.max_position_embeddings + sizes.num_hidden_layers * layer
    return rows * sizes.hidden_size


def _count_tensors(path: pathlib.Path) -> int:
    """How many tensors a file has, random states aside.

    Raises:
        ValueError: it holds something else than groups and tensors, each in one place.
    """
    count, seen = 0, set()
    with h5py.File(path) as file:
        groups: list[h5py.Group] = [file]
        while groups:
            group = groups.pop()
            for name in group:
                item = group[name] if _is_hard(group, name) else None
                # A group can contain itself.
                place = None if item is None else h5py.h5o.get_info(item.id).addr
                if place in seen or not isinstance(item, h5py.Group | h5py.Dataset):
                    raise ValueError(
                        f"{group.name.rstrip('/')}/{name} should be a group or a tensor with a "
                        "single name"
                    )
                seen.add(place)
                if isinstance(item, h5py.Group):
                    groups.append(item)
                else:
                    count += "seed_generator" not in item.name
    return count


def _is_hard(group: h5py.Group, name: str) -> bool:
    return isinstance(group.get(name, getlink=True), h5py.HardLink)


def is_preset(folder: pathlib.Path) -> bool:
    """Whether the folder holds a preset, and nothing else that replacing it would delete."""
    return has_config(folder) and FILES.issuperset(os.listdir(folder))
