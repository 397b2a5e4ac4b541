"""Reads exports back as models: what `bertgen_tf.export` wrote, NAME/VERSION.

| file | what is read from it |
| --- | --- |
| assets.extra/config.json, and the vocabularies beside it | a preset without its weights |
| variables/ | the weights, by name |
| metadata.json | whose export it is, and the checksums of its files |

The graph is not read, so nothing of it runs.
"""

import contextlib
import fnmatch
import json
import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import trackable_object_graph_pb2

from bertgen_tf.checkpoints import presets
from bertgen_tf.checkpoints.hub.modules import Tensors
from bertgen_tf.checkpoints.presets import EXTRA_FOLDER, GRAPH_FILE
from bertgen_tf.checks import Damaged, first_line, read_json, sha256, shown
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.models.pretrained import Model
from bertgen_tf.network import sources
from bertgen_tf.network.weights import Rule, assign

METADATA_FILE = "metadata.json"
_VARIABLES = "variables/variables"
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_MAX_METADATA_DEPTH = 50
# Patterns of the names of files that TensorFlow reads when it loads an export.
LOADED = (GRAPH_FILE, "fingerprint.pb", "variables/*", "assets/*")
# Of those that `load` reads.
_READ = ("variables/*", *(f"{EXTRA_FOLDER}/{name}" for name in sorted(presets.FILES)))


def load(folder: str | os.PathLike, model_class: type[Model] = EncoderDecoderModel) -> Model:
    """Reads an export as a `model_class`, with the settings that it generates with.

    An int8 export gives an int8 model, which `dequantize` makes trainable. What else it generates
    with, `signatures=`, is in its metadata.json; a `logits_processor` is only in its graph, of
    which a warning reminds.

    Args:
        folder: NAME/VERSION.

    Raises:
        FileNotFoundError: there is no such folder, or one of its files is missing.
        ValueError: it is not an export, an older one without the files that this needs, or damaged.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} should be an export, but there is no such folder.")
    if versions := versions_in(folder):
        raise ValueError(
            f"{folder} should be one version of an export, but holds {', '.join(versions[:5])}. "
            f"Use {folder / versions[0]}."
        )
    sources.handles.check_family(folder, sources.handles.EXPORT)
    if not is_export(folder):
        raise ValueError(
            f"{folder} should be an export, NAME/VERSION, which export_saved_model wrote, but is "
            "not."
        )
    extra = folder / EXTRA_FOLDER
    if not (extra / presets.CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} should hold {EXTRA_FOLDER}/{presets.CONFIG_FILE}, but is of an older "
            "version, which wrote none. Export its preset again."
        )
    verify(folder, _READ)
    model = presets.build(extra, presets.read_config(extra), model_class, folder / "variables")
    tensors = _read_variables(folder)
    variables = {variable.path: variable for variable in model.weights}
    _check_fit(folder, {name: tuple(v.shape) for name, v in variables.items()}, tensors.shapes)
    with _reading(folder):
        assign(variables, tensors, [Rule("(.*)", r"\1")], source=str(folder / _VARIABLES))
    if processors := read_metadata(folder).get("logits_processor"):
        warnings.warn(
            f"{folder} generates with functions of its own, which only its graph has "
            f"({', '.join(map(str, processors))[:100]}): pass them to generate.",
            stacklevel=3,
        )
    return model


def is_export(folder: str | os.PathLike) -> bool:
    """Whether a folder is one version of an export of ours."""
    try:
        ours = _is_ours(read_metadata(folder))
    except (OSError, ValueError):
        return False
    return ours and os.path.isfile(os.path.join(folder, GRAPH_FILE))


def versions_in(folder: str | os.PathLike) -> list[str]:
    """The names of the exports in a folder that holds versions, the newest first."""
    try:
        names = [name for name in os.listdir(folder) if name.isascii() and name.isdecimal()]
    except OSError:
        return []
    names = [name for name in names if is_export(os.path.join(folder, name))]
    return sorted(names, key=int, reverse=True)


def read_metadata(folder: str | os.PathLike) -> dict[str, Any]:
    """The metadata.json of an export.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is no regular file, too large, or not a JSON object.
    """
    metadata = read_json(pathlib.Path(folder, METADATA_FILE))
    if _is_deep(metadata, _MAX_METADATA_DEPTH):
        raise ValueError("it is nested too deeply")
    # JSON has no NaN, which a browser refuses together with all that is sent with it.
    json.dumps(metadata, allow_nan=False)
    return metadata


def verify(folder: str | os.PathLike, patterns: Sequence[str] = LOADED) -> None:
    """Raises unless files of an export are as they were written, so far as metadata.json says.

    A SavedModel without metadata.json, or with an older one without checksums, passes.

    Args:
        folder: NAME/VERSION.
        patterns: of the names of the files, as for `fnmatch`, where `*` is any characters.

    Raises:
        OSError: a file cannot be read.
        Damaged: a file was changed or is missing, or metadata.json cannot be read.
    """
    folder = pathlib.Path(folder)
    remedy = "copy the export again"
    if not os.path.lexists(folder / METADATA_FILE):
        return
    try:
        metadata = read_json(folder / METADATA_FILE)
        if not _is_ours(metadata):  # its files may be anything
            return
        files = metadata.get("files", {})
        stored = {name: description["sha256"] for name, description in files.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(
            f"{folder / METADATA_FILE} should have the checksums of the export, but is damaged "
            f"({first_line(error)}): {remedy}."
        ) from error
    for name, checksum in stored.items():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        path = folder / name
        if os.path.isabs(name) or ".." in path.parts:
            raise Damaged(
                f"{folder / METADATA_FILE} should name files of its own folder, but names "
                f"{shown(name)}: {remedy}."
            )
        if not path.is_file() or sha256(path) != checksum:
            found = "its checksum differs" if path.is_file() else "there is no such file"
            raise Damaged(f"{path} should be as it was exported, but {found}: {remedy}.")


def _is_ours(metadata: dict[str, Any]) -> bool:
    versions = metadata.get("versions")
    return isinstance(versions, dict) and "bertgen_tf" in versions


def _is_deep(value: Any, depth: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and (
        not depth or any(_is_deep(item, depth - 1) for item in value)
    )


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (tf.errors.OpError, DecodeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'variables'} should hold the weights of the export, but reading them "
            f"failed: {first_line(error)}"
        ) from error


def _check_fit(folder: pathlib.Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises a ValueError unless the variables have the names and shapes of the model."""
    both = expected.keys() & found.keys()
    problems = {
        "lack": expected.keys() - both,
        "have besides": found.keys() - both,
        "have in another shape": {name for name in both if expected[name] != found[name]},
    }
    if any(problems.values()):
        listed = (
            f"{what} {min(names)}{f' and {len(names) - 1} more' if names[1:] else ''}"
            for what, names in ((what, sorted(names)) for what, names in problems.items())
            if names
        )
        raise ValueError(
            f"{folder / 'variables'} should be those of the model in {EXTRA_FOLDER}, but they "
            f"{', '.join(listed)}."
        )


def _read_variables(folder: pathlib.Path) -> Tensors:
    """The variables by the names that they had in the model, each read when asked for."""
    with _reading(folder):
        reader = tf.train.load_checkpoint(str(folder / _VARIABLES))
        shapes = reader.get_variable_to_shape_map()
        objects = trackable_object_graph_pb2.TrackableObjectGraph.FromString(
            reader.get_tensor(_OBJECT_GRAPH)
        )
    names = {
        attribute.checkpoint_key: attribute.full_name
        for node in objects.nodes
        for attribute in node.attributes
    }
    # What has no name keeps its key, and does not fit the model.
    keys = {names.get(key) or key: key for key in shapes if key != _OBJECT_GRAPH}

    def read(name: str) -> Any:
        with _reading(folder):
            return reader.get_tensor(keys[name])

    return Tensors(str(folder), {name: tuple(shapes[key]) for name, key in keys.items()}, read)
