"""The exports of a server: found in a folder, loaded, and replaced by newer versions.

The folder holds `NAME/VERSION/saved_model.pb`. The highest version of each model is served, as
TensorFlow Serving does by default. When a higher one appears it is loaded beside the old one and
takes over; the old one is unloaded when its last request is done. An export that cannot be loaded
is reported, and tried again only when its files change; the version before it stays in service, and
so does a model whose folder disappears.

`Models` belongs to one event loop; files are read and models loaded in threads.
"""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2

from bertgen_tf.checkpoints.exports import LOADED, METADATA_FILE, read_metadata, verify
from bertgen_tf.checkpoints.presets import EXTRA_FOLDER, GRAPH_FILE
from bertgen_tf.checks import Damaged
from bertgen_tf.export.files import read_warmup
from bertgen_tf.export.signatures import COMPILED
from bertgen_tf.serving.pricing import Cost, row_sizes
from bertgen_tf.serving.rest_json import DEFAULT_SIGNATURE

# Where an export does not specify its batch sizes.
MAX_BATCH_SIZE = 32
# To measure what requests cost; what is not measured in this time is learned from requests.
_MEASURING_SECONDS = 2.0
_MEASURED_ROWS = 4
_LAYOUT = "NAME/VERSION/saved_model.pb, as bertgen-tf export writes it, VERSION an integer"

_log = logging.getLogger(__name__)


class NotLoadedYet(LookupError):
    """The first version of a model is being loaded."""


class Signature:
    """A function of an export.

    Attributes:
        name: the signature's.
        inputs: the specifications of the inputs, by name.
        max_batch_size: the most rows of one run.
        max_length: how many tokens of a text it reads; None if that is not known.
        has_rows: whether the first dimension of all inputs and outputs is the batch.
        cost: what its batches cost.
    """

    def __init__(
        self,
        name: str,
        function: Any,
        max_batch_size: int = MAX_BATCH_SIZE,
        max_length: int | None = None,
        prior: Cost | None = None,
        owner: Any = None,
    ):
        self.name = name
        self.inputs: dict[str, tf.TensorSpec] = dict(
            sorted(function.structured_input_signature[1].items())
        )
        self.max_batch_size = max_batch_size
        self.max_length = max_length
        self.cost = Cost(prior)
        specs = [*self.inputs.values(), *function.structured_outputs.values()]
        self.has_rows = bool(self.inputs) and all(
            spec.shape.rank and spec.shape[0] is None for spec in specs
        )
        self._function = function
        # Variables live as long as the loaded object.
        self._owner = owner

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs it.

        Args:
            inputs: arrays of the types of `self.inputs`, strings as objects of bytes.

        Returns:
            the outputs by name, strings as objects of bytes.
        """
        tensors = {name: tf.constant(inputs[name], self.inputs[name].dtype) for name in self.inputs}
        outputs = self._function(**tensors)
        return {name: np.asarray(outputs[name].numpy()) for name in sorted(outputs)}


@dataclasses.dataclass(eq=False)
class Version:
    """A version of a model.

    Attributes:
        model: its name.
        number: its version.
        path: the folder of the export.
        stamp: changes when its files do.
        verify: whether `load` compares the files with the checksums in metadata.json.
        state: LOADING, AVAILABLE, UNLOADING or END, as in TensorFlow Serving.
        error: its code and message; "OK" and "" if there is none.
        signatures: by name, while it is loaded.
        signature_defs: the same as JSON, as TensorFlow Serving shows them.
        metadata: the export's, from metadata.json.
    """

    model: str
    number: int
    path: Path
    stamp: Any = None
    verify: bool = True
    state: str = "LOADING"
    error: tuple[str, str] = ("OK", "")
    signatures: dict[str, Signature] = dataclasses.field(default_factory=dict)
    signature_defs: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    _users: int = 0

    def load(self) -> None:
        """Loads it and runs its warm-up requests, so that the first real ones need not wait."""
        import tensorflow_text  # noqa: F401 (registers the operations of tokenizers)

        if not (self.path / GRAPH_FILE).is_file():
            raise FileNotFoundError(f"{self.path} has no {GRAPH_FILE}")
        if self.verify:
            verify(self.path, (*LOADED, f"{EXTRA_FOLDER}/*"))
        graph = saved_model_pb2.SavedModel.FromString((self.path / GRAPH_FILE).read_bytes())
        self.signature_defs = {
            name: json_format.MessageToDict(
                definition,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
            for name, definition in sorted(graph.meta_graphs[0].signature_def.items())
        }
        loaded = tf.saved_model.load(str(self.path))
        self.signatures = _signatures(loaded, self.metadata)
        _warm_up(self.signatures, read_warmup(self.path))

    def describe(self) -> dict[str, Any]:
        """Its status, as in TensorFlow Serving's JSON."""
        code, message = self.error
        return {
            "version": str(self.number),
            "state": self.state,
            "status": {"error_code": code, "error_message": message},
        }

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps it loaded."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._unload_if_unused()

    def retire(self) -> None:
        """Unloads it as soon as it is no longer in use."""
        self.state = "UNLOADING"
        self._unload_if_unused()

    def fail(self, error: BaseException) -> None:
        """Ends it with an error."""
        code = "UNKNOWN"
        if isinstance(error, tf.errors.OpError):
            code = _code_name(error.error_code)
        elif isinstance(error, Damaged):
            code = "DATA_LOSS"
        elif isinstance(error, OSError):
            code = "NOT_FOUND"
        # Clients are told no paths of this machine; the log has them.
        told = str(error)
        for path in {str(self.path), str(self.path.resolve())}:
            told = told.replace(path, f"{self.model}/{self.number}")
        self.error = code, " ".join(told.split())[:1000] or type(error).__name__
        self._end()

    def _unload_if_unused(self) -> None:
        if self.state == "UNLOADING" and not self._users:
            self._end()
            _log.info("unloaded", extra={"model": self.model, "version": self.number})

    def _end(self) -> None:
        self.state = "END"
        self.signatures = {}


class Models:
    """The models that are served.

    Args:
        folder: see the top of the module; or one model's folder, which holds its versions; or one
            version, which alone is served.
        verify: whether files are compared with the checksums in metadata.json before they are
            loaded; a version with a damaged file is not.

    Raises:
        FileNotFoundError: there is no model.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self._folder = Path(folder)
        self._verify = verify
        self._versions: dict[str, list[Version]] = {name: [] for name in self._scan()}
        self._was_ready = False
        self.stopping = False
        if not self._versions:
            what = "has no models" if self._folder.is_dir() else "is not a folder"
            raise FileNotFoundError(f"{folder} {what}: expected {_LAYOUT}")

    @property
    def names(self) -> list[str]:
        """Those of all models."""
        return sorted(self._versions)

    @property
    def ready(self) -> bool:
        """Whether every model was loaded and the server is not stopping.

        A model that is added later, and may be broken, does not matter.
        """
        self._was_ready = self._was_ready or all(self.current(name) for name in self._versions)
        return self._was_ready and not self.stopping

    def current(self, name: str) -> Version | None:
        """The version that answers, None before one is loaded."""
        return next((v for v in self._versions[name] if v.state == "AVAILABLE"), None)

    def find(self, name: str, number: int | None = None) -> Version:
        """The version that answers a request.

        Args:
            name: of the model.
            number: a version; by default the one that is served.

        Raises:
            NotLoadedYet: it will be served soon.
            LookupError: it is not served; the message says why.
        """
        version = self.current(name) if name in self._versions else None
        if version and number in (None, version.number):
            return version
        asked = f"Latest({name})" if number is None else f"Specific({name}, {number})"
        message = f"Servable not found for request: {asked}."
        if name not in self._versions:
            raise LookupError(f"{message} The models are: {', '.join(self.names)}")
        if version:
            message += f" Version {version.number} is served"
        last = next(reversed(self._versions[name]), None)
        if not version and (not last or last.state == "LOADING"):
            raise NotLoadedYet(f"{message} It is being loaded")
        if not version:
            message += f" Version {last.number} cannot be loaded: {last.error[1]}"
        raise LookupError(message)

    def versions(self, name: str, number: int | None = None) -> list[Version]:
        """Versions of a model that are, or were, loaded; the newest first.

        Raises:
            LookupError: there are none.
        """
        found = [v for v in self._versions.get(name, []) if number in (None, v.number)]
        if not found:
            of = f"version {number}" if number is not None else "any versions"
            raise LookupError(f"Could not find {of} of model {name}")
        return sorted(found, key=lambda v: (-v.number, v.state == "END"))

    async def watch(self, seconds: float) -> None:
        """Looks for new versions again and again.

        Args:
            seconds: from one time to the next.
        """
        while True:
            try:
                await self.look()
            except Exception:
                _log.exception("could not look for versions")
            await asyncio.sleep(seconds)

    async def look(self) -> None:
        """Loads what is new."""
        found = await asyncio.to_thread(self._scan)
        for name in sorted(found):
            self._versions.setdefault(name, [])
        waiting = []
        for name, paths in sorted(found.items()):
            wanted = await asyncio.to_thread(self._wanted, name, paths)
            self._forget(name, paths)
            current = self.current(name)
            if wanted and (not current or wanted.stamp != current.stamp):
                wanted.metadata = await asyncio.to_thread(_read_metadata, wanted.path)
                waiting.append(wanted)
        # All are listed while the first one loads.
        for version in waiting:
            self._versions[version.model].append(version)
        for version in waiting:
            await self._load(version)

    async def _load(self, version: Version) -> None:
        fields = {"model": version.model, "version": version.number, "path": str(version.path)}
        old = self.current(version.model)
        _log.info("loading", extra=fields)
        start = time.monotonic()
        try:
            await asyncio.to_thread(version.load)
        except Exception as error:
            version.fail(error)
            _log.error("cannot load: %s", version.error[1], extra=fields)
        else:
            version.state = "AVAILABLE"
            if old:
                old.retire()
            _log.info("loaded", extra={**fields, "ms": round(1000 * (time.monotonic() - start))})
        # Graphs are full of reference cycles.
        await asyncio.to_thread(gc.collect)

    def _forget(self, name: str, paths: dict[int, Path]) -> None:
        """Drops what ended, except the last of each number whose folder exists."""
        last = {v.number: v for v in self._versions[name]}
        self._versions[name] = [
            v
            for v in self._versions[name]
            if v.state != "END" or (v.number in paths and last[v.number] is v)
        ]

    def _wanted(self, name: str, paths: dict[int, Path]) -> Version | None:
        """The highest version that is not known to be broken."""
        broken = {v.stamp for v in self._versions[name] if v.state == "END" and v.error[1]}
        for number in sorted(paths, reverse=True):
            stamp = _stamp(paths[number])
            if stamp and stamp not in broken:
                return Version(name, number, paths[number], stamp, self._verify)
        return None

    def _scan(self) -> dict[str, dict[int, Path]]:
        """The versions of each model."""
        folder = self._folder
        if (folder / GRAPH_FILE).is_file():
            path = folder.resolve()
            if path.name.isdecimal():
                return {path.parent.name: {int(path.name): path}}
            return {path.name: {1: path}}
        versions = _numbered(folder)
        if versions:
            return {folder.resolve().name: versions}
        models = {path.name: _numbered(path) for path in _subfolders(folder)}
        return {name: versions for name, versions in models.items() if versions}


def _numbered(folder: Path) -> dict[int, Path]:
    # Not isdigit, which is true for other scripts' numbers and superscripts.
    return {int(p.name): p for p in _subfolders(folder) if p.name.isascii() and p.name.isdecimal()}


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:  # it is gone, or a file
        return []


def _stamp(path: Path) -> tuple[Any, ...]:
    """Differs when any file of the folder does; empty if the folder is gone."""
    try:
        stats = [(str(p), p.stat()) for p in (path, *sorted(path.rglob("*")))]
    except OSError:
        return ()
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _read_metadata(folder: Path) -> dict[str, Any]:
    try:
        return read_metadata(folder)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("ignored %s: %s", folder / METADATA_FILE, error)
        return {}


def _largest_batch(metadata: dict[str, Any]) -> int:
    sizes = metadata.get("batch_sizes")
    if isinstance(sizes, list) and sizes and all(type(size) is int and size > 0 for size in sizes):
        return max(sizes)
    return MAX_BATCH_SIZE


def _longest_text(metadata: dict[str, Any]) -> int | None:
    try:
        length = metadata["config"]["preprocessor"]["max_source_length"]
    except (KeyError, TypeError):
        return None
    return length if type(length) is int and length > 0 else None


def _signatures(loaded: Any, metadata: dict[str, Any]) -> dict[str, Signature]:
    """The signatures of a loaded export."""
    size, length = _largest_batch(metadata), _longest_text(metadata)
    signatures: dict[str, Signature] = {}
    # What each is compared with before it has run is made first.
    order = sorted(loaded.signatures, key=lambda n: (n != DEFAULT_SIGNATURE, n.endswith(COMPILED)))
    for name in order:
        plain = signatures.get(name.removesuffix(COMPILED)) or signatures.get(DEFAULT_SIGNATURE)
        prior = plain.cost if plain else None
        signatures[name] = Signature(name, loaded.signatures[name], size, length, prior, loaded)
    return signatures


def _warm_up(
    signatures: dict[str, Signature], requests: Iterable[tuple[str, dict[str, np.ndarray]]]
) -> None:
    """Runs requests, then measures what they cost, now that nothing has to be prepared."""
    first: dict[str, dict[str, np.ndarray]] = {}
    for name, inputs in requests:
        signatures[name or DEFAULT_SIGNATURE].run(inputs)
        first.setdefault(name or DEFAULT_SIGNATURE, inputs)
    # First a text of each, then a few: the time of a batch does not grow as its rows do.
    end = time.monotonic() + _MEASURING_SECONDS
    for rows in (1, _MEASURED_ROWS):
        for name, inputs in first.items():
            signature = signatures[name]
            if signature.has_rows and time.monotonic() < end:
                batch = {key: np.repeat(x[:1], rows, axis=0) for key, x in inputs.items()}
                start = time.monotonic()
                signature.run(batch)
                sizes = row_sizes(batch, rows, signature.max_length)
                signature.cost.learn(sizes.padded, time.monotonic() - start)


def _code_name(code: int) -> str:
    names = {value: key for key, value in vars(tf.errors).items() if type(value) is int}
    return names.get(code, "UNKNOWN")
