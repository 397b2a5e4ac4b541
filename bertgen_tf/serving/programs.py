"""Compiled programs: a version's plain graphs answer until XLA has compiled their twins.

The twin of a signature, `generate_xla` for `serving_default` and NAME`_xla` for NAME, gives the
same results in a third to a half of the time, but is compiled for each batch size and length of
sources, which takes seconds. So what is asked for runs as a plain graph until a thread has compiled
the program for its shape; shapes that were asked for most come first.

XLA keeps what it compiled in the user's cache, see `keep_programs`: a server that starts again
reads a program in a third of the time that it takes to compile it.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from bertgen_tf.checks import sha256
from bertgen_tf.data.folders import users_cache
from bertgen_tf.export.signatures import COMPILED

Arrays = dict[str, np.ndarray]

# Of a version, each of some tens of megabytes.
_MAX_PROGRAMS = 64
# What the cache may keep, of all models together.
_MAX_CACHE_BYTES = 2 * 2**30
# Requests go first wherever the system can tell threads apart.
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
        run: runs the compiled signature.
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

    def add_task(self, task: Callable[[], None]) -> None:
        """Lets the thread do something before it compiles what nobody has asked for."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()

    def start(self, name: str) -> None:
        """Starts the thread, which gets this name."""
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def close(self) -> None:
        """Compiles no more; what is being compiled is completed."""
        with self._changed:
            self._closed = True
            self._programs.clear()
            self._tasks.clear()
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
                if self._closed or len(self._programs) >= _MAX_PROGRAMS:
                    return program
                self._programs[name, shape] = program
                self._changed.notify()
                if len(self._programs) == _MAX_PROGRAMS:
                    _log.warning("compiles no more: there are %d programs", _MAX_PROGRAMS)
            program.uses += uses
        return program

    def shape(self, texts: np.ndarray) -> Shape:
        """The shape of the program that reads these texts."""
        counts = self._count_tokens({"text": texts})["num_tokens"]
        longest = int(counts.max(initial=1))
        tokens = next((n for n in self._lengths if n >= longest), self._lengths[-1])
        return Shape(1 << max(texts.size - 1, 0).bit_length(), tokens)

    def _work(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # of Linux only, threads have their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (work := self._next()) is not None:
            with _COMPILING:
                try:
                    work()
                except Exception:
                    _log.exception("cannot prepare a signature")
            del work  # a version that waits for work must not be kept by what was done

    def _next(self) -> Callable[[], None] | None:
        """What to do next; None if nothing more is to be done."""

        def waiting() -> list[Program]:
            return [p for p in self._programs.values() if p.state == "waiting"]

        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._tasks or waiting())
            if self._closed:
                return None
            program = max(waiting(), key=lambda p: p.uses, default=None)
            if self._tasks and not (program and program.uses):
                return self._tasks.pop(0)
        return lambda: (program.compile(), self._on_compiled())


def has_programs(names: Sequence[str], metadata: dict[str, Any]) -> bool:
    """Whether signatures have twins whose programs can be told apart.

    Args:
        names: of all signatures.
        metadata: of the export.
    """
    lengths = metadata.get("source_lengths")
    return (
        "tokens" in names
        and any(name.endswith(COMPILED) for name in names)
        and isinstance(lengths, list)
        and bool(lengths)
        and all(type(n) is int and n > 0 for n in lengths)
    )


def keep_programs() -> Callable[[], None]:
    """Lets XLA keep the programs of this process in the user's cache, and read what is there.

    That is the folder `bertgen_tf/programs-...` in `XDG_CACHE_HOME`, or `~/.cache`, writable by the
    user alone; it is for this TensorFlow on this kind of processor. Programs whose checksum is
    missing or wrong are removed, as are the oldest beyond 2 GiB. Where there can be no such folder,
    the log says so, and programs are compiled anew. TensorFlow reads this when it first runs a
    graph: call it before.

    Returns:
        to be called when something was compiled: writes its checksum.
    """
    kind = hashlib.sha256(f"{tf.__version__} {_processor()}".encode()).hexdigest()[:16]
    try:
        folder = Path(users_cache(f"programs-{kind}"))
        if re.search(r"[\s'\"]", str(folder)):
            raise ValueError(f"{folder} has blanks or quotes, which XLA cannot read")
        _sweep(folder)
        if shutil.disk_usage(folder).free < _MIN_FREE_BYTES:
            raise ValueError(f"{folder} has less than {_MIN_FREE_BYTES >> 20} MiB left")
    except (OSError, ValueError) as error:
        _log.warning("compiled programs are not kept: %s", error)
        return lambda: None
    flags = os.environ.get("TF_XLA_FLAGS", "")
    if "tf_xla_persistent_cache_directory" in flags:  # the user's own
        return lambda: None
    os.environ["TF_XLA_FLAGS"] = f"{flags} --tf_xla_persistent_cache_directory={folder}".strip()
    return lambda: _write_checksums(folder)


def _processor() -> str:
    """What decides which instructions XLA uses."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
        return "\n".join(sorted(set(found)))
    return f"{platform.machine()} {platform.processor()}"


def _sweep(folder: Path) -> None:
    """Removes what is not whole, and the oldest of what is too much."""
    for path in folder.glob(_UNFINISHED):
        with contextlib.suppress(FileNotFoundError):  # another server sweeps, too
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
    whole = []
    for path in folder.glob(_CACHED):
        with contextlib.suppress(FileNotFoundError):
            checksum = _checksum_file(path)
            if checksum.exists() and checksum.read_text() == sha256(path):
                status = path.stat()
                whole.append((max(status.st_atime, status.st_mtime), status.st_size, path))
            else:
                _remove(path)
    total = 0
    for _, size, path in sorted(whole, reverse=True):
        total += size
        if total > _MAX_CACHE_BYTES:
            _remove(path)


def _write_checksums(folder: Path) -> None:
    with contextlib.suppress(OSError):  # without, they are compiled once more
        for path in folder.glob(_CACHED):
            if not _checksum_file(path).exists():
                _checksum_file(path).write_text(sha256(path))


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _remove(path: Path) -> None:
    for part in (_checksum_file(path), path):
        part.unlink(missing_ok=True)
