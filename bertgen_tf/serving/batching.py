"""Dynamic batching: requests that wait at the same time are run together.

One batch runs at a time, because TensorFlow uses all cores within one. Whatever arrives meanwhile
waits, and forms the next. Rows keep their order; a request of more rows than a batch holds is
split and joined again. Groups of requests that can share a batch take turns, and the parts of long
requests take turns with other requests: none starves.

`Batcher` belongs to one event loop; only the runs have a thread of their own.
"""

import asyncio
import concurrent.futures
import dataclasses
import logging
import time
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import tensorflow as tf

from bertgen_tf.serving.exports import Signature

_log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
# Rows of ids share a batch if their lengths are between the same powers of two, from this up.
_SHORTEST = 64


class QueueFull(Exception):
    """There is no room for another request."""


class Result:
    """The result of a request.

    Attributes:
        outputs: the outputs of its rows.
        batch_size: how many rows ran together, at most.
    """

    def __init__(self, outputs: Arrays, batch_size: int):
        self.outputs = outputs
        self.batch_size = batch_size


@dataclasses.dataclass(eq=False)
class _Request:
    inputs: Arrays
    rows: int | None  # None: only as a whole, alone
    future: asyncio.Future
    taken: int = 0  # rows that were handed to a batch
    parts: dict[int, Arrays] = dataclasses.field(default_factory=dict)
    batch_size: int = 0

    @property
    def waiting(self) -> int:
        """How many rows it counts as in the queue."""
        return (1 if self.rows is None else self.rows) - self.taken


@dataclasses.dataclass
class _Part:
    request: _Request
    start: int
    stop: int

    def inputs(self) -> Arrays:
        if self.request.rows is None:
            return self.request.inputs
        return {name: x[self.start : self.stop] for name, x in self.request.inputs.items()}


@dataclasses.dataclass
class _Group:
    signature: Signature
    # A dict is an ordered set.
    requests: dict[_Request, None] = dataclasses.field(default_factory=dict)
    rows: int = 0


class Batcher:
    """Runs requests.

    Args:
        max_queued: how many rows may wait.
        patience: seconds to wait for a batch as large as the one before; a lone client that always
            sends the same number never waits.
        on_batch: called with the signature and the number of rows of each batch.
    """

    def __init__(
        self,
        max_queued: int = 4096,
        patience: float = 0.005,
        on_batch: Callable[[Signature, int], None] = lambda signature, rows: None,
    ):
        self._max_queued = max_queued
        self._patience = patience
        self._on_batch = on_batch
        self._groups: dict[Hashable, _Group] = {}
        self._last_rows: weakref.WeakKeyDictionary[Signature, int] = weakref.WeakKeyDictionary()
        self._running: list[_Part] = []
        self._queued = 0
        self._started: float | None = None  # when the running batch was
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "bertgen_tf-batches")
        self._worker: asyncio.Task | None = None

    @property
    def queued(self) -> int:
        """How many rows wait."""
        return self._queued

    @property
    def busy_seconds(self) -> float:
        """For how long the running batch has run; 0 if there is none."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    async def run(self, signature: Signature, inputs: Arrays) -> Result:
        """Runs a request; if cancelled, it leaves the queue.

        Args:
            signature: what to run.
            inputs: its inputs, of the right types and ranks.

        Returns:
            what it gives for these inputs. Dimensions other than the first that depend on the batch
            may be larger than for the request alone, padded with zeros or empty strings.

        Raises:
            QueueFull: too many rows wait.
            Exception: from TensorFlow.
        """
        rows = _count_rows(signature, inputs)
        request = _Request(inputs, rows, asyncio.get_running_loop().create_future())
        if self._queued + request.waiting > self._max_queued:
            raise QueueFull(
                f"{self._queued} texts wait, but at most {self._max_queued} may. Try again later"
            )
        key = (signature, _group_key(inputs)) if rows is not None else request
        group = self._groups.setdefault(key, _Group(signature))
        group.requests[request] = None
        group.rows += request.waiting
        self._queued += request.waiting
        self._arrived.set()
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        try:
            return await request.future
        finally:
            if request in group.requests:
                del group.requests[request]
                self._take_away(group, request.waiting)
                if not group.requests:
                    self._groups.pop(key, None)

    async def close(self) -> None:
        """Stops; requests still waiting are cancelled, but a run is completed."""
        if self._worker:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        waiting = [request for group in self._groups.values() for request in group.requests]
        for request in [*waiting, *(part.request for part in self._running)]:
            request.future.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take_away(self, group: _Group, rows: int) -> None:
        group.rows -= rows
        self._queued -= rows

    async def _work(self) -> None:
        while True:
            while not self._groups:
                self._arrived.clear()
                await self._arrived.wait()
            key, group = next(iter(self._groups.items()))
            await self._gather(group)
            if self._groups.get(key) is not group:
                continue  # all went away
            del self._groups[key]
            parts = self._running = self._take(group)
            if group.requests:
                self._groups[key] = group  # at the end: others first
            rows = sum(part.stop - part.start for part in parts)
            self._last_rows[group.signature] = rows
            self._on_batch(group.signature, rows)
            loop = asyncio.get_running_loop()
            self._started = time.monotonic()
            try:
                results = await loop.run_in_executor(self._thread, _run, group.signature, parts)
            except Exception as error:  # a bug in this module must not stop all others
                _log.exception("a batch failed")
                results = [error] * len(parts)
            self._started = None
            for part, result in zip(parts, results, strict=True):
                try:
                    _finish(part, result, rows)
                except Exception as error:
                    _log.exception("an answer failed")
                    part.request.future.set_exception(error)
            self._running = []

    async def _gather(self, group: _Group) -> None:
        """Waits a little for as many rows as the last batch had."""
        wanted = min(self._last_rows.get(group.signature, 1), group.signature.max_batch_size)
        if group.rows >= wanted or len(self._groups) > 1:
            return
        try:
            async with asyncio.timeout(self._patience):
                while 0 < group.rows < wanted:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass

    def _take(self, group: _Group) -> list[_Part]:
        """The parts of the next batch; what is left of a long request goes to the end."""
        parts = []
        room = group.signature.max_batch_size
        while room and group.requests:
            request = next(iter(group.requests))
            del group.requests[request]
            count = min(room, request.waiting)
            parts.append(_Part(request, request.taken, request.taken + count))
            request.taken += count
            room -= count
            self._take_away(group, count)
            if request.waiting:
                group.requests[request] = None
        return parts


def _count_rows(signature: Signature, inputs: Arrays) -> int | None:
    """The number of rows; None if it cannot be run together with others."""
    if not signature.has_rows:
        return None
    shapes = [x.shape for x in inputs.values()]
    if any(not shape or shape[0] != shapes[0][0] for shape in shapes):
        return None  # for the graph to judge
    # Padding must not hide that lengths differ.
    if _is_padded(inputs) and len({shape for shape in shapes if len(shape) > 1}) > 1:
        return None
    return shapes[0][0] or None


def _is_padded(inputs: Arrays) -> bool:
    """Whether zeros at the ends of rows change nothing, thanks to a mask."""
    return "attention_mask" in inputs


def _group_key(inputs: Arrays) -> Hashable:
    if _is_padded(inputs):
        longest = max((x.shape[1] for x in inputs.values() if x.ndim == 2), default=0)
        return max(_SHORTEST, longest).bit_length(), *_other_shapes(inputs, 3)
    return _other_shapes(inputs, 2)


def _other_shapes(inputs: Arrays, rank: int) -> tuple[Any, ...]:
    return tuple(x.shape[1:] for x in inputs.values() if x.ndim >= rank)


def _run(signature: Signature, parts: list[_Part]) -> list[Arrays | Exception]:
    """Runs parts together, or in halves if they fail: a bad row must not fail its neighbours."""
    parts_inputs = [part.inputs() for part in parts]
    sizes = [part.stop - part.start for part in parts]
    try:
        if len(parts) == 1:
            return [signature.run(parts_inputs[0])]
        inputs = {name: _join([x[name] for x in parts_inputs]) for name in signature.inputs}
        outputs = signature.run(inputs)
        if any(x.shape[:1] != (sum(sizes),) for x in outputs.values()):
            raise ValueError(f"{signature.name} gives outputs without rows")
    except Exception as error:
        # Where memory is short, further runs would not help.
        if len(parts) == 1 or isinstance(error, MemoryError | tf.errors.ResourceExhaustedError):
            return [error] * len(parts)
        half = len(parts) // 2
        return _run(signature, parts[:half]) + _run(signature, parts[half:])
    ends = np.cumsum(sizes)
    return [
        {name: x[end - size : end] for name, x in outputs.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


def _finish(part: _Part, result: Arrays | Exception, batch_size: int) -> None:
    request = part.request
    if request.future.done():
        return
    if isinstance(result, Exception):
        request.future.set_exception(result)
        return
    request.parts[part.start] = result
    request.batch_size = max(request.batch_size, batch_size)
    if request.waiting:
        return
    if len(request.parts) == 1:
        outputs = result
    else:
        parts = [request.parts[start] for start in sorted(request.parts)]
        outputs = {name: _join([x[name] for x in parts]) for name in result}
    request.future.set_result(Result(outputs, request.batch_size))


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    """The rows of all; smaller arrays are padded with zeros or empty strings."""
    shape = np.max([x.shape[1:] for x in arrays], axis=0).astype(int)
    if all(x.shape[1:] == tuple(shape) for x in arrays):
        return np.concatenate(arrays)
    filling: Any = b"" if arrays[0].dtype == object else 0
    joined = np.full((sum(len(x) for x in arrays), *shape), filling, arrays[0].dtype)
    start = 0
    for x in arrays:
        joined[(slice(start, start + len(x)), *map(slice, x.shape[1:]))] = x
        start += len(x)
    return joined


def is_client_error(error: BaseException) -> bool:
    """Whether the inputs, not the server, are to blame for an error of a run."""
    return isinstance(error, tf.errors.InvalidArgumentError | tf.errors.OutOfRangeError)
