"""Compiled programs: a version's plain graphs answer until XLA has compiled their twins.

The twin of a signature, `generate_xla` for `serving_default` and NAME`_xla` for NAME, gives the
same results faster, but is compiled for each batch size and length of sources, which takes seconds.
So what is asked for runs as a plain graph until a thread has compiled the program for its shape;
shapes that were asked for most come first.

XLA keeps what it compiled in the user's cache, see `keep_programs`: a server that starts again
reads a program faster than it compiles one.
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

from bertgen_tf.checks import sha256
from bertgen_tf.data.folders import users_cache
from bertgen_tf.export.signatures import COMPILED
from bertgen_tf.serving.pricing import Arrays

# Of a version, each of some tens of megabytes.
_MAX_PROGRAMS = 64
# What the cache may keep, of all models, TensorFlows and processors together.
_MAX_CACHE_BYTES = 2 * 2**30
# Of the thread that compiles: requests go first, where the system can tell threads apart.
_NICENESS = 5
# One thread of the process compiles at a time.
_COMPILING = threading.Lock()
# Less would be full soon, and a program that cannot be written is none.
_MIN_FREE_BYTES = 256 * 2**20
_CACHED, _UNFINISHED = "xla_compile_cache*.pb", "xla_compile_cache*.tmp"
_ABANDONED_SECONDS = 3600

_log = logging.getLogger(__name__)


class Shape(NamedTuple):
    """What a program is compiled for: rows, and tokens of each."""

    rows: int
    tokens: int


class Program:
    """A program, or the wish for one.

    Attributes:
        run: runs the compiled signature, in the thread that calls it.
        name: of that signature.
        shape: what it is compiled for.
        inputs: of this shape, until it is compiled.
        uses: how often it was asked for.
        state: "waiting", "ready" or "failed".
    """

    def __init__(self, run: Callable[[Arrays], Arrays], name: str, shape: Shape, inputs: Arrays):
        self.run = run
        self.name = name
        self.shape = shape
        self.inputs = inputs
        self.uses = 0
        self.state = "waiting"

    def compile(self) -> None:
        """Compiles it, or reads it from the cache, by running it once."""
        facts = {"signature": self.name, "texts": self.shape.rows, "tokens": self.shape.tokens}
        start = time.monotonic()
        try:
            self.run(self.inputs)
        except Exception as error:
            self.state = "failed"
            lines = str(error).splitlines() or [type(error).__name__]
            _log.warning("cannot compile: %s", lines[0][:300], extra=facts)
        else:
            self.state = "ready"
            _log.info("compiled", extra={**facts, "ms": round(1000 * (time.monotonic() - start))})
        self.inputs = {}


class Programs:
    """The compiled programs of a version, and the thread that compiles them.

    Args:
        count_tokens: runs the signature `tokens`.
        lengths: the lengths that sources are padded to, `source_lengths` of metadata.json.
        on_compiled: called after each program.
    """

    def __init__(
        self,
        count_tokens: Callable[[Arrays], Arrays],
        lengths: Sequence[int],
        on_compiled: Callable[[], None] = lambda: None,
    ):
        self._count_tokens = count_tokens
        self._lengths = sorted(lengths)
        self._on_compiled = on_compiled
        self._programs: dict[tuple[str, Shape], Program] = {}
        self._tasks: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._told = False

    def add_task(self, task: Callable[[], None]) -> None:
        """Lets the thread do something before it compiles what nobody has asked for."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()

    def start(self, name: str, at_end: Callable[[], None] = lambda: None) -> None:
        """Starts the thread.

        Args:
            name: of the thread.
            at_end: called when it ends, and holds no signature any more.
        """
        threading.Thread(target=self._work, args=(at_end,), name=name, daemon=True).start()

    def close(self) -> None:
        """Compiles no more; what is being compiled is completed."""
        with self._changed:
            self._closed = True
            self._programs.clear()
            self._tasks.clear()
            # It holds a signature, and a batch may still ask.
            self._count_tokens = lambda inputs: {"num_tokens": np.zeros(0, np.int32)}
            self._changed.notify()

    def want(
        self, run: Callable[[Arrays], Arrays], name: str, inputs: Arrays, uses: int = 1
    ) -> Program:
        """The program for these inputs, ready or not; what is not will be compiled.

        Args:
            run, name: the compiled signature.
            inputs: its texts.
            uses: how much this counts.
        """
        shape = self.shape(inputs["text"])
        with self._changed:
            program = self._programs.get((name, shape))
            if program is None:
                program = Program(run, name, shape, inputs)
                if self._closed or not self._has_room():
                    return program
                self._programs[name, shape] = program
                self._changed.notify()
            program.uses += uses
        return program

    def _has_room(self) -> bool:
        """Whether there may be another program, in place of one that nobody asked for perhaps."""
        if len(self._programs) < _MAX_PROGRAMS:
            return True
        unasked = (key for key, p in self._programs.items() if p.state == "waiting" and not p.uses)
        if (key := next(unasked, None)) is not None:
            del self._programs[key]
            return True
        if not self._told:
            self._told = True
            _log.warning("compiles no more: there are %d programs", _MAX_PROGRAMS)
        return False

    def shape(self, texts: np.ndarray) -> Shape:
        """The shape of the program that reads these texts."""
        counts = self._count_tokens({"text": texts})["num_tokens"]
        longest = int(counts.max(initial=1))
        tokens = next((n for n in self._lengths if n >= longest), self._lengths[-1])
        return Shape(1 << max(texts.size - 1, 0).bit_length(), tokens)

    def _work(self, at_end: Callable[[], None]) -> None:
        with contextlib.suppress(AttributeError, OSError):  # of Linux only, threads have their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while self._wait():
            with _COMPILING:
                try:
                    self._do_next()
                except Exception:  # a bug must not stop all others
                    _log.exception("cannot prepare a signature")
        at_end()

    def _wait(self) -> bool:
        """Waits for something to do; False if nothing more will be done."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._tasks or self._waiting())
            return not self._closed

    def _waiting(self) -> list[Program]:
        return [p for p in self._programs.values() if p.state == "waiting"]

    def _do_next(self) -> None:
        """Does what is most wanted now; nothing if it was closed meanwhile."""
        task = None
        with self._changed:
            program = max(self._waiting(), key=lambda p: p.uses, default=None)
            if self._tasks and not (program and program.uses):
                program, task = None, self._tasks.pop(0)
        if task:
            task()
        elif program:
            program.compile()
            self._on_compiled()


def has_programs(
    definitions: Mapping[str, meta_graph_pb2.SignatureDef], metadata: dict[str, Any]
) -> bool:
    """Whether signatures have twins whose programs can be told apart.

    Args:
        definitions: of the signatures.
        metadata: of the export.
    """
    lengths = metadata.get("source_lengths")
    return (
        # In older exports, a variant may have this name.
        "tokens" in definitions
        and "num_tokens" in definitions["tokens"].outputs
        and any(name.endswith(COMPILED) for name in definitions)
        and isinstance(lengths, list)
        and bool(lengths)
        and all(type(n) is int and n > 0 for n in lengths)
    )


def keep_programs() -> Callable[[], None]:
    """Lets XLA keep the programs of this process in the user's cache, and read what is there.

    That is the folder `bertgen_tf/programs-...` in `XDG_CACHE_HOME`, or `~/.cache`, writable by the
    user alone; it is for this TensorFlow and these `XLA_FLAGS` on this kind of processor. Programs
    whose checksum is missing or wrong are removed, as are the oldest of all such folders beyond 2
    GiB. Where there can be no such folder, the log says so, and programs are compiled anew. A cache
    that `TF_XLA_FLAGS` names already stays in use. TensorFlow reads this when it first runs a
    graph: call it before.

    Returns:
        to be called when something was compiled: writes checksums and removes what is too much.
    """
    flags = os.environ.get("TF_XLA_FLAGS", "")
    if "tf_xla_persistent_cache_directory" in flags:
        return lambda: None
    kind = f"{tf.__version__} {os.environ.get('XLA_FLAGS', '')} {_processor()}"
    try:
        folder = Path(users_cache(f"programs-{hashlib.sha256(kind.encode()).hexdigest()[:16]}"))
        if re.search(r"[\s'\"]", str(folder)):
            raise ValueError(f"{folder} has blanks or quotes, which XLA cannot read")
        _remove_damaged(folder)
        _remove_oldest(folder.parent)
        if shutil.disk_usage(folder).free < _MIN_FREE_BYTES:
            raise ValueError(f"{folder} has less than {_MIN_FREE_BYTES >> 20} MiB left")
    except (OSError, ValueError) as error:
        _log.warning("compiled programs are not kept: %s", error)
        return lambda: None
    os.environ["TF_XLA_FLAGS"] = f"{flags} --tf_xla_persistent_cache_directory={folder}".strip()

    def on_compiled() -> None:
        _write_checksums(folder)
        _remove_oldest(folder.parent)

    return on_compiled


def _processor() -> str:
    """What decides which instructions XLA uses."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
        return "\n".join(sorted(set(found)))
    return f"{platform.machine()} {platform.processor()}"


# Other servers compile and remove at the same time: what is gone is none of ours.


def _remove_damaged(folder: Path) -> None:
    for path in folder.glob(_UNFINISHED):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
    for path in folder.glob(_CACHED):
        try:
            whole = _checksum_file(path).read_bytes() == sha256(path).encode()
        except (OSError, ValueError):
            whole = False
        if not whole:
            _remove(path)


def _remove_oldest(folder: Path) -> None:
    found = []
    for path in folder.glob(f"programs-*/{_CACHED}"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > _MAX_CACHE_BYTES:
            _remove(path)


def _write_checksums(folder: Path) -> None:
    for path in folder.glob(_CACHED):
        # Without one, it is compiled once more.
        with contextlib.suppress(OSError):
            checksum = _checksum_file(path)
            if not checksum.exists() or checksum.stat().st_mtime < path.stat().st_mtime:
                temporary = checksum.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_text(sha256(path))
                temporary.replace(checksum)


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        for part in (_checksum_file(path), path):
            part.unlink(missing_ok=True)
