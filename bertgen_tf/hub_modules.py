"""Fetching and opening TF Hub modules: folders, URLs and archives in, variables and graphs out.

The only file that knows tensorflow_hub. Archives are not trusted: only plain files and folders are
unpacked, inside their own folder, up to a size.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import re
import tarfile
import urllib.parse
import urllib.request
from typing import Any, BinaryIO

import numpy as np
import tensorflow as tf
import tensorflow_hub
import tensorflow_text  # noqa: F401  registers the ops that modules may hold
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow_hub import resolver

from bertgen_tf.graph import Graph
from bertgen_tf.weights import first_line

# The largest original is 3.1 GB; an archive that unpacks to more is no module of these kinds.
MAX_UNPACKED_BYTES = 8 * 2**30
MAX_MEMBERS = 10_000
_ARCHIVES = (".tar.gz", ".tgz")
_TIMEOUT_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Module:
    """A module as it was loaded.

    Attributes:
        handle: as it was asked for.
        path: its folder.
        loaded: what tensorflow_hub gives.
        names: of all variables, some perhaps twice.
        tensors: name -> array.
        meta_graphs: the `MetaGraphDef`s of its SavedModel.
    """

    handle: str
    path: str
    loaded: Any
    names: list[str]
    tensors: dict[str, np.ndarray]
    meta_graphs: list[Any]

    def graph(self) -> Graph:
        """The graph for inference of a TF1 Hub module: the one without tags."""
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
        """The `SignatureDef` of the graph for inference, or None."""
        for meta_graph in self.meta_graphs:
            if not meta_graph.meta_info_def.tags and name in meta_graph.signature_def:
                return meta_graph.signature_def[name]
        return None

    def asset(self, tensor: str) -> str | None:
        """The path of the file whose name the tensor `node:0` of the graph holds, if there is."""
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
    """Fetches and loads a module.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it cannot be fetched, unpacked or loaded, or names variables twice.
    """
    handle = os.fspath(handle)
    path = resolve(handle)
    try:
        loaded = tensorflow_hub.load(path)
        variables = _read_checkpoint(path) or [
            (re.sub(r":\d+$", "", variable.name), variable.numpy())
            for variable in getattr(loaded, "variables", ())
        ]
    except Exception as error:  # TensorFlow raises a dozen kinds for files that are cut or mixed up
        raise ValueError(
            f"{_where(handle, path)} should be a TF Hub module with a SavedModel and its "
            f"variables, but loading it failed: {first_line(error)}"
        ) from error
    names = [name for name, _ in variables]
    return Module(handle, path, loaded, names, dict(variables), read_meta_graphs(handle, path))


def _read_checkpoint(path: str) -> list[tuple[str, np.ndarray]]:
    """The variables of a module in TF1 Hub format; none for the others.

    Its checkpoint has their names, and also those that are no resources, which
    `tensorflow_hub.load` does not tell.
    """
    if not os.path.exists(os.path.join(path, "tfhub_module.pb")):
        return []
    reader = tf.train.load_checkpoint(os.path.join(path, "variables", "variables"))
    return [(name, reader.get_tensor(name)) for name in reader.get_variable_to_shape_map()]


def read_meta_graphs(handle: str, path: str) -> list[Any]:
    """The `MetaGraphDef`s of the SavedModel in a folder."""
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString(pathlib.Path(path, "saved_model.pb").read_bytes())
    except DecodeError as error:
        raise ValueError(f"{handle} has a saved_model.pb that cannot be read: {error}") from error
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


def resolve(handle: str) -> str:
    """The local folder of a handle: downloaded, and unpacked under `TFHUB_CACHE_DIR`, if need be.

    Args:
        handle: a folder; a URL in the TF Hub protocol (`?tf-hub-format=compressed`), kept under
            the name that tensorflow_hub gives it; or a .tar.gz file, such as Kaggle serves, kept
            under its SHA-256.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it cannot be fetched or unpacked, or holds no SavedModel.
    """
    is_url = "://" in handle
    is_archive = os.path.isfile(handle) and handle.endswith(_ARCHIVES)
    if not is_url and not is_archive and not os.path.isdir(handle):
        raise FileNotFoundError(
            f"{handle} should be the folder of a TF Hub module or a URL, or a .tar.gz file of one, "
            "but there is no such folder."
        )
    try:
        if is_url:
            path = _fetch(handle)
        else:
            path = _unpack_file(handle) if is_archive else handle
    except Exception as error:  # of urllib, tarfile, zlib, tensorflow_hub and TensorFlow's files
        action = "answer with" if is_url else "be"
        raise ValueError(
            f"{handle} should {action} a .tar.gz of a TF Hub module, but fetching or unpacking "
            f"it failed: {first_line(error)}"
        ) from error
    if not os.path.exists(os.path.join(path, "saved_model.pb")):
        found = ", ".join(sorted(os.listdir(path))[:6]) or "nothing"
        raise ValueError(
            f"{_where(handle, path)} should hold a TF Hub module, with a file saved_model.pb, but "
            f"holds {found}."
        )
    return path


def _where(handle: str, path: str) -> str:
    # What was unpacked once is never fetched again, however broken.
    return handle if path == handle else f"{handle} (kept in {path}: delete it to fetch it again)"


def _fetch(handle: str) -> str:
    compressed = resolver.model_load_format() in (
        resolver.ModelLoadFormat.COMPRESSED.value,
        resolver.ModelLoadFormat.AUTO.value,
    )
    if not handle.startswith(("http://", "https://")) or not compressed:
        return tensorflow_hub.resolve(handle)

    # Not left to tensorflow_hub: it refuses links and `..`, but unpacks without a bound on size.
    def download(url: str, folder: str) -> None:
        parts = urllib.parse.urlsplit(url)
        query = [*urllib.parse.parse_qsl(parts.query), ("tf-hub-format", "compressed")]
        url = urllib.parse.urlunsplit(parts._replace(query=urllib.parse.urlencode(query)))
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            unpack(response, folder)

    name = hashlib.sha1(handle.encode()).hexdigest()
    return resolver.atomic_download(handle, download, _cache_folder(name))


def _unpack_file(path: str) -> str:
    def extract(path: str, folder: str) -> None:
        with open(path, "rb") as file:
            unpack(file, folder)

    with open(path, "rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()
    return resolver.atomic_download(path, extract, _cache_folder(name))


def _cache_folder(name: str) -> str:
    folder = resolver.tfhub_cache_dir(use_temp=True)
    tf.io.gfile.makedirs(folder)
    return os.path.join(folder, name)


def unpack(file: BinaryIO, folder: str) -> None:
    """Unpacks a tar stream of any compression into a folder.

    Raises:
        ValueError: a member is no plain file or folder, would lie outside, or all together are too
            large or too many.
    """
    size = 0
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for count, member in enumerate(archive, 1):
            name = member.name
            size += member.size
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise ValueError(f"member {name!r} of the archive is no plain file or folder")
            if os.path.isabs(name) or ".." in pathlib.PurePath(name).parts:
                raise ValueError(f"member {name!r} of the archive would lie outside its folder")
            if size > MAX_UNPACKED_BYTES or count > MAX_MEMBERS:
                raise ValueError(
                    f"the archive unpacks to more than {MAX_UNPACKED_BYTES} bytes or "
                    f"{MAX_MEMBERS} files"
                )
            archive.extract(member, folder, filter="data")
