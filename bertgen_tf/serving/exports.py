"""The exports of a server: found in a folder, loaded, and replaced by newer versions.

The folder holds `NAME/VERSION/saved_model.pb`. The highest version of each model is served, as
TensorFlow Serving does by default. When a higher one appears it is loaded beside the old one and
takes over; the old one is unloaded when its last request is done. An export that cannot be loaded
is reported, and tried again only when its files change; the version before it stays in service, and
so does a model whose folder disappears.

The folder may hold anything: what is broken, or never ends, stops neither answers nor other models.
`Models` belongs to one event loop; files are read and models loaded in threads.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import itertools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2

from bertgen_tf.checkpoints import versions as on_disk
from bertgen_tf.checkpoints.exports import LOADED, METADATA_FILE, read_metadata, verify
from bertgen_tf.checkpoints.presets import EXTRA_FOLDER, GRAPH_FILE
from bertgen_tf.checks import Damaged
from bertgen_tf.export.files import read_warmup
from bertgen_tf.serving.programs import Programs, has_programs
from bertgen_tf.serving.signatures import Signature, connect_programs, load_signatures, prepare

_LAYOUT = "NAME/VERSION/saved_model.pb, as bertgen-tf export writes it, VERSION an integer"
# Of metadata.json, which is part of the list of all models.
_MAX_SHOWN_BYTES = 2**20
# Seconds that other models wait for a load.
_PATIENCE = 10.0
# What does not end with them keeps no process alive.
THREADS = "bertgen_tf-"
COMPILING = f"{THREADS}compile "

_log = logging.getLogger(__name__)


class NotLoadedYet(LookupError):
    """The first version of a model is being loaded."""


@dataclasses.dataclass(eq=False)
class Version:
    """A version of a model.

    Attributes:
        model: its name.
        number: its version.
        path: the folder of the export.
        stamp: changes when its files do; empty until they were looked at.
        verify: whether `load` compares the files with the checksums in metadata.json.
        xla: whether compiled programs answer, as soon as they are ready.
        on_compiled: called after each compilation.
        hurry: whether some warm-up requests may run later, see `prepare`.
        state: LOADING, AVAILABLE, UNLOADING or END, as in TensorFlow Serving.
        error: its code and message; "OK" and "" if there is none.
        signatures: by name, while it is loaded.
        signature_defs: the same as JSON, as TensorFlow Serving shows them.
        metadata: the export's, from metadata.json.
    """

    model: str
    number: int
    path: Path
    stamp: str = ""
    verify: bool = True
    xla: bool = False
    on_compiled: Callable[[], None] = lambda: None
    hurry: bool = False
    state: str = "LOADING"
    error: tuple[str, str] = ("OK", "")
    signatures: dict[str, Signature] = dataclasses.field(default_factory=dict)
    signature_defs: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    _programs: Programs | None = None
    _users: int = 0
    _real_path: str = ""

    def load(self) -> None:
        """Loads it and runs its warm-up requests, so that the first real ones need not wait."""
        import tensorflow_text  # noqa: F401 (registers the operations of tokenizers)

        self._real_path = os.path.realpath(self.path)
        on_disk.check_files(self.path)
        if self.verify:
            verify(self.path, (*LOADED, f"{EXTRA_FOLDER}/*"))
        graph = saved_model_pb2.SavedModel.FromString((self.path / GRAPH_FILE).read_bytes())
        if not graph.meta_graphs:
            raise ValueError(f"{self.path / GRAPH_FILE} holds no graph")
        self.signature_defs = {
            name: json_format.MessageToDict(
                definition,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
            for name, definition in sorted(graph.meta_graphs[0].signature_def.items())
        }
        twins = self.xla and has_programs(graph.meta_graphs[0].signature_def, self.metadata)
        self.signatures = load_signatures(self.path, graph, self.metadata, optimize=not twins)
        if twins:
            self._programs = connect_programs(self.signatures, self.metadata, self.on_compiled)
        prepare(self.signatures, [*read_warmup(self.path)], self._programs, self.hurry)
        if self.state != "LOADING":  # it took too long
            self.close()
        elif self._programs:
            self._programs.start(f"{COMPILING}{self.model}/{self.number}", _free_memory)

    @property
    def to_load(self) -> bool:
        """Whether it was chosen, and not tried yet."""
        return self.state == "LOADING" and bool(self.stamp)

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
        elif isinstance(error, TimeoutError):
            code = "DEADLINE_EXCEEDED"
        elif isinstance(error, PermissionError):
            code = "PERMISSION_DENIED"
        elif isinstance(error, Damaged):
            code = "DATA_LOSS"
        elif isinstance(error, OSError):
            code = "NOT_FOUND"
        # Clients are told no paths of this machine; the log has them.
        paths = [p for p in (str(self.path), self._real_path) if len(p) > 1]
        pattern = "|".join(map(re.escape, sorted(paths, key=len, reverse=True)))
        told = re.sub(pattern, f"{self.model}/{self.number}", str(error))
        self.error = code, " ".join(told.split())[:1000] or type(error).__name__
        self._end()

    def _unload_if_unused(self) -> None:
        if self.state == "UNLOADING" and not self._users:
            self._end()
            _log.info("unloaded", extra={"model": self.model, "version": self.number})
            # This thread answers requests.
            threading.Thread(target=_free_memory, name=f"{THREADS}memory", daemon=True).start()

    def _end(self) -> None:
        self.state = "END"
        self.close()

    def compile_no_more(self) -> None:
        """Ends the thread that compiles; what it compiles now is completed."""
        if self._programs:
            self._programs.close()

    def close(self) -> None:
        """Lets go of what it loaded."""
        self.compile_no_more()
        for signature in self.signatures.values():
            signature.route = None  # it knows the signature, which would not be freed at once
        self._programs, self.signatures = None, {}


class Models:
    """The models that are served.

    Args:
        folder: see the top of the module; or one model's folder, which holds its versions; or one
            version, which alone is served.
        load_timeout: seconds after which a load is given up.
        verify: whether files are compared with the checksums in metadata.json before they are
            loaded; a version with a damaged file is not.
        xla: whether compiled programs answer, see `bertgen_tf.serving.programs`.

    Attributes:
        on_compiled: called after each compilation.
        stopping: whether the server ends.

    Raises:
        FileNotFoundError: there is no model.
    """

    def __init__(
        self,
        folder: str | Path,
        load_timeout: float = 600.0,
        verify: bool = True,
        xla: bool = True,
    ):
        self._folder = on_disk.VersionFolder(folder)
        self._load_timeout = load_timeout
        self._options = {"verify": verify, "xla": xla}
        self.on_compiled: Callable[[], None] = lambda: None
        found, problems = self._folder.scan()
        self._versions = {name: [_newest(name, paths)] for name, paths in found.items()}
        # What is being done, by model.
        self._tasks: dict[str, asyncio.Task] = {}
        self._was_ready = False
        self.stopping = False
        if not self._versions:
            what = "has no models" if os.path.isdir(folder) else "is not a folder"
            why = next((f". {path} {problem}" for path, problem in problems.items()), "")
            raise FileNotFoundError(f"{folder} {what}: expected {_LAYOUT}{why}")

    @property
    def names(self) -> list[str]:
        """Those of all models."""
        return sorted(self._versions)

    @property
    def ready(self) -> bool:
        """Whether every model was loaded and the server is not stopping.

        A model that is added later, and may be broken, does not matter.
        """
        self._was_ready = self._was_ready or (
            bool(self._versions) and all(self.current(name) for name in self._versions)
        )
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
        try:
            while True:
                try:
                    await self.look(_PATIENCE)
                except Exception:
                    _log.exception("could not look for versions")
                await asyncio.sleep(seconds)
        finally:
            for task in self._tasks.values():
                task.cancel()
            for version in itertools.chain(*self._versions.values()):
                version.compile_no_more()

    async def look(self, patience: float | None = None) -> None:
        """Loads what is new, one model after the other.

        Args:
            patience: seconds after which the next model need not wait for one that takes longer;
                None: each is waited for.
        """
        scan = asyncio.ensure_future(_in_thread("scan", self._folder.scan))
        if not (await asyncio.wait({scan}, timeout=patience))[0]:
            _log.warning("the folder of the models cannot be read yet, still waiting")
        found, problems = await scan
        self._folder.tell(problems)
        if self._folder.path in problems:
            return
        self._forget_models(found)
        for name in sorted(found):
            # All are listed while the first one loads.
            self._versions.setdefault(name, [_newest(name, found[name])])
        for step in (self._choose, self._load_chosen):
            for name in sorted(found):
                if name in self._tasks:
                    continue
                task = asyncio.create_task(self._attend(name, step, found[name]))
                self._tasks[name] = task
                if not (await asyncio.wait({task}, timeout=patience))[0]:
                    _log.info("still loading, others go on", extra={"model": name})

    async def _attend(
        self, name: str, step: Callable[..., Awaitable[None]], paths: dict[int, Path]
    ) -> None:
        try:
            await step(name, paths)
        except Exception:
            _log.exception("could not look for versions", extra={"model": name})
        finally:
            del self._tasks[name]

    async def _choose(
        self, name: str, paths: dict[int, Path], below: int = on_disk.LARGEST_VERSION + 1
    ) -> None:
        """Lists the highest version that is not known to be broken, if it is not loaded."""
        self._forget(name, paths)
        versions = self._versions[name]
        broken = {v.stamp for v in versions if v.state == "END" and v.error[1]}
        current = self.current(name)

        def choose() -> Version | None:
            for number in sorted((n for n in paths if n < below), reverse=True):
                stamp = on_disk.stamp(paths[number])
                if stamp and stamp not in broken:
                    if current and current.stamp == stamp:
                        return None
                    options = {**self._options, "on_compiled": self.on_compiled}
                    version = Version(name, number, paths[number], stamp, **options)
                    version.metadata = _read_metadata(version.path)
                    return version
            return None

        chosen = await _in_thread(f"files of {name}", choose)
        looked_at = [v for v in versions if v.stamp]
        # Where all folders are just gone, what was listed stays until the next look.
        self._versions[name] = [*looked_at, chosen] if chosen else looked_at or versions

    async def _load_chosen(self, name: str, paths: dict[int, Path]) -> None:
        """Loads the listed version; where it is broken, the next lower one."""
        while version := next((v for v in self._versions[name] if v.to_load), None):
            await self._load(version)
            if version.state != "END":
                return
            await self._choose(name, paths, version.number)

    async def _load(self, version: Version) -> None:
        fields = {"model": version.model, "version": version.number, "path": str(version.path)}
        old = self.current(version.model)
        version.hurry = old is None  # what replaces another is tried as a whole
        _log.info("loading", extra=fields)
        start = time.monotonic()
        try:
            async with asyncio.timeout(self._load_timeout) as deadline:
                await _in_thread(f"load {version.model}/{version.number}", version.load)
        except Exception as error:
            late = f"It was not loaded within {self._load_timeout:g} seconds"
            version.fail(TimeoutError(late) if deadline.expired() else error)
            _log.error("cannot load: %s", version.error[1], extra=fields)
        else:
            version.state = "AVAILABLE"
            if old:
                old.retire()
            _log.info("loaded", extra={**fields, "ms": round(1000 * (time.monotonic() - start))})
        await _in_thread("memory", _free_memory)

    def _forget(self, name: str, paths: dict[int, Path]) -> None:
        """Drops what ended, except the last of each number whose folder exists."""
        last = {v.number: v for v in self._versions[name]}
        kept = [
            v
            for v in self._versions[name]
            if v.state != "END" or (v.number in paths and last[v.number] is v)
        ]
        self._versions[name] = kept or [_newest(name, paths)]

    def _forget_models(self, found: on_disk.Found) -> None:
        """Drops those whose folders are gone, unless they are loaded."""
        for name in self._versions.keys() - found.keys() - self._tasks.keys():
            loaded = [v for v in self._versions[name] if v.state in ("AVAILABLE", "UNLOADING")]
            self._versions[name] = loaded
            if not loaded:
                del self._versions[name]


def _newest(name: str, paths: dict[int, Path]) -> Version:
    number = max(paths)
    return Version(name, number, paths[number])


def _free_memory() -> None:
    """Returns to the system what loading and unloading left.

    Without it, each thread that ever loaded an export keeps as much as that took.
    """
    gc.collect()  # graphs are full of reference cycles
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


async def _in_thread(name: str, work: Callable[[], Any]) -> Any:
    """Runs it in a thread of its own, which need not end for the process to end."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            future.set_exception(error)
        elif error:  # asyncio would end the server
            future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
        else:
            future.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name=f"{THREADS}{name}", daemon=True).start()
    return await future


def _read_metadata(folder: Path) -> dict[str, Any]:
    """What can be shown of metadata.json; nothing if it cannot be read."""
    try:
        metadata = read_metadata(folder)
        shown = {key: value for key, value in metadata.items() if key != "files"}
        if len(json.dumps(shown)) > _MAX_SHOWN_BYTES:
            raise ValueError(f"it has more than {_MAX_SHOWN_BYTES:,} bytes beside `files`")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("ignored %s: %s", folder / METADATA_FILE, error)
        return {}
    return metadata


def _code_name(code: int) -> str:
    names = {value: key for key, value in vars(tf.errors).items() if type(value) is int}
    return names.get(code, "UNKNOWN")
