"""Opens TF Hub modules: folders, URLs and archives in, variables and graphs out.

Running a module runs its graph, which can read and write files, so load only those whose author you
trust.
"""

import collections
import contextlib
import dataclasses
import gc
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the ops that modules may hold
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from bertgen_tf.checkpoints.hub.fetch import resolve, tensorflow_hub, where
from bertgen_tf.checkpoints.hub.graph import Graph
from bertgen_tf.checks import first_line


class Tensors(Mapping[str, np.ndarray]):
    """The variables of a module by name; each is read when asked for, and none is kept.

    Args:
        handle: of the module, for messages.
        shapes: of all variables, which need no reading.
        read: returns the array of a name.
    """

    def __init__(
        self,
        handle: str,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
    ):
        self.handle = handle
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        """The array; raises a ValueError if its file is damaged."""
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def without(self, prefix: str) -> "Tensors":
        """The same variables, with a prefix removed from the names that have it.

        Raises:
            ValueError: two variables then have one name.
        """
        whole: dict[str, str] = {}
        for name in self.shapes:
            other = whole.setdefault(name.removeprefix(prefix), name)
            if other != name:
                raise ValueError(
                    f"{self.handle} should name each variable once, but has {other} and {name}."
                )
        shapes = {name: self.shapes[full] for name, full in whole.items()}
        return Tensors(self.handle, shapes, lambda name: self._read(whole[name]))


@dataclasses.dataclass
class Module:
    """A module as it was opened.

    Attributes:
        handle: as it was given.
        path: its folder.
        names: of all variables, some perhaps twice.
        tensors: name -> array, read on access.
        meta_graphs: the `MetaGraphDef`s of its SavedModel.
    """

    handle: str
    path: str
    names: list[str]
    tensors: Tensors
    meta_graphs: list[Any]
    _loaded: Any = None

    @property
    def loaded(self) -> Any:
        """What tensorflow_hub loads: runs the module, and holds all its variables once more.

        Raises:
            ValueError: it cannot be loaded.
        """
        if self._loaded is None:
            with _loading(self.handle, self.path):
                self._loaded = tensorflow_hub().load(self.path)
        return self._loaded

    def unload(self) -> None:
        """Frees the memory of `loaded`, for a module in TF1 Hub format.

        Functions that came from it must no longer be in use. The next access loads it again.
        """
        self._loaded = None
        gc.collect()  # it is full of reference cycles

    def graph(self) -> Graph:
        """The inference graph of a TF1 Hub module: the one without tags."""
        chosen = [m for m in self.meta_graphs if not m.meta_info_def.tags]
        if len(chosen) != 1:
            raise ValueError(
                f"{self.handle} should hold one graph without tags, as modules in TF1 Hub format "
                f"do, but holds {len(chosen)}."
            )
        try:
            return Graph(chosen[0])
        except ValueError as error:
            raise ValueError(
                f"{self.handle} should have a graph that can be followed, but {error}."
            ) from error

    def signature(self, name: str) -> Any:
        """The `SignatureDef` of the inference graph, or None."""
        for meta_graph in self.meta_graphs:
            if not meta_graph.meta_info_def.tags and name in meta_graph.signature_def:
                return meta_graph.signature_def[name]
        return None

    def asset(self, tensor: str) -> str | None:
        """The path of the file whose name the tensor `node:0` of the graph holds, if any."""
        for meta_graph in self.meta_graphs:
            assets = list(meta_graph.asset_file_def)
            # Where TF1 wrote them.
            for packed in meta_graph.collection_def["saved_model_assets"].any_list.value:
                assets.append(meta_graph_pb2.AssetFileDef.FromString(packed.value))
            for asset in assets:
                if not meta_graph.meta_info_def.tags and asset.tensor_info.name == tensor:
                    return os.path.join(self.path, "assets", os.path.basename(asset.filename))
        return None


def open_module(handle: str | os.PathLike) -> Module:
    """Fetches a module and opens it. In TF1 Hub format, no variable is read yet.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it cannot be fetched, unpacked or loaded, or lacks variables of its graph.
    """
    handle = os.fspath(handle)
    path = resolve(handle)
    if os.path.exists(os.path.join(path, "tfhub_module.pb")):
        tensors = _checkpoint(handle, path)
        with _loading(handle, path):
            meta_graphs = read_meta_graphs(handle, path)
        _check_variables(where(handle, path), meta_graphs, tensors)
        return Module(handle, path, list(tensors), tensors, meta_graphs)
    with _loading(handle, path):
        loaded = tensorflow_hub().load(path)
        variables = [
            (re.sub(r":\d+$", "", variable.name), variable)
            for variable in getattr(loaded, "variables", ())
        ]
        shapes = {name: tuple(variable.shape) for name, variable in variables}
    by_name = dict(variables)
    tensors = Tensors(handle, shapes, lambda name: by_name[name].numpy())
    names = [name for name, _ in variables]
    return Module(handle, path, names, tensors, read_meta_graphs(handle, path), loaded)


@contextlib.contextmanager
def _loading(handle: str, path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TensorFlow raises a dozen kinds for truncated or mixed-up files
        raise ValueError(
            f"{where(handle, path)} should be a TF Hub module with a SavedModel and its "
            f"variables, but loading it failed: {first_line(error)}"
        ) from error


def _checkpoint(handle: str, path: str) -> Tensors:
    """The variables of a module in TF1 Hub format, in one data file or several.

    Its checkpoint has their names, and also those that are not resources, which
    `tensorflow_hub.load` does not list.
    """
    with _loading(handle, path):
        reader = tf.train.load_checkpoint(os.path.join(path, "variables", "variables"))
        shapes = {name: tuple(s) for name, s in reader.get_variable_to_shape_map().items()}

    def read(name: str) -> np.ndarray:
        with _loading(handle, path):
            return reader.get_tensor(name)

    return Tensors(handle, shapes, read)


def _check_variables(where: str, meta_graphs: list[Any], tensors: Tensors) -> None:
    """Raises if BERT's variables in the inference graph are not those of the checkpoint."""
    problems = []
    for meta_graph in meta_graphs:
        for node in () if meta_graph.meta_info_def.tags else meta_graph.graph_def.node:
            if node.op not in ("VarHandleOp", "VariableV2") or "bert/" not in node.name:
                continue
            # A partitioned variable is a single one in the checkpoint.
            if re.sub(r"/part_\d+$", "", node.name) not in tensors:
                problems.append(f"no {node.name}")
            elif node.name in tensors:
                shape = tf.TensorShape(node.attr["shape"].shape)
                if not shape.is_compatible_with(tensors.shapes[node.name]):
                    found = tensors.shapes[node.name]
                    problems.append(f"{node.name} of shape {found} instead of {tuple(shape)}")
    if problems:
        more = f" and {len(problems) - 6} more" if problems[6:] else ""
        raise ValueError(
            f"{where} should have the variables of its graph in its checkpoint, but has "
            f"{', '.join(problems[:6])}{more}."
        )


def read_meta_graphs(handle: str, path: str) -> list[Any]:
    """The `MetaGraphDef`s of the SavedModel in a folder."""
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString(pathlib.Path(path, "saved_model.pb").read_bytes())
    except DecodeError as error:
        raise ValueError(f"{handle} has a saved_model.pb that cannot be read: {error}") from error
    if not proto.meta_graphs:
        raise ValueError(f"{handle} has a saved_model.pb that holds no graph")
    return list(proto.meta_graphs)


def check_names(module: Module) -> None:
    """Raises if two variables have one name, so that one of them would be lost."""
    names = collections.Counter(name for name in module.names if not name.startswith("Variable"))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(
            f"{module.handle} should name each variable once, but has several of "
            f"{', '.join(twice[:6])}."
        )


def found_variables(module: Module) -> str:
    """The module's variables in a few words, for messages."""
    names = module.names
    listed = f": {', '.join(names[:6])}{', ...' if names[6:] else ''}" if names else ""
    return f"{len(names)} variables{listed}"
