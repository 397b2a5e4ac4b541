"""Dynamic batching: requests that wait at the same time are run together.

One batch runs at a time, because TensorFlow uses all cores within one. Whatever arrives meanwhile
waits, and forms the next. Rows keep their order.

A batch holds a row of as many requests as fit, and further rows of theirs, while it would probably
take no longer than a given time: so a long request runs in several batches, joined again, and gives
way after each. Every other batch is for whoever has used the least time so far, which is always a
short new request; the ones between are for whoever came first: none starves. A single text thus
waits for the batch that runs, and at most one more.

`Batcher` belongs to one event loop; only the runs have a thread of their own.
"""

import asyncio
import concurrent.futures
import dataclasses
import itertools
import logging
import math
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from bertgen_tf.serving.pricing import Arrays, RowSizes, Size, row_sizes
from bertgen_tf.serving.signatures import Signature

_log = logging.getLogger(__name__)

# Rows share a batch if their lengths in tokens are between the same powers of two, from this up.
_SHORTEST = 64
# The part of the time for a request that it may take alone: others get as much of it.
_SHARE = 1 / 3
# A batch that took longer than so many times what was expected compiled, or was disturbed.
_SURPRISE = 4.0


class QueueFull(Exception):
    """There is no room for another request."""


class RequestTooLarge(ValueError):
    """A request would take too long."""


class Result:
    """The result of a request.

    Attributes:
        outputs: the outputs of its rows.
        batch_size: how many rows ran together, at most.
        batch_seconds: how long such a batch took, at most.
    """

    def __init__(self, outputs: Arrays, batch_size: int, batch_seconds: float):
        self.outputs = outputs
        self.batch_size = batch_size
        self.batch_seconds = batch_seconds


@dataclasses.dataclass(eq=False)
class _Request:
    inputs: Arrays
    rows: int | None  # None: only as a whole, alone
    sizes: RowSizes
    rest: Size  # of the rows that wait
    number: int  # in the order of arrival
    future: asyncio.Future
    used: float = 0.0  # seconds of batches, as far as they were for it
    taken: int = 0  # rows that were handed to a batch
    parts: dict[int, Arrays] = dataclasses.field(default_factory=dict)
    batch_size: int = 0
    batch_seconds: float = 0.0

    @property
    def waiting(self) -> int:
        """How many rows it counts as in the queue."""
        return (1 if self.rows is None else self.rows) - self.taken

    def take(self, stop: int) -> None:
        """The rows before `stop` have been handed to a batch."""
        self.taken = stop
        self.rest = self.sizes.rows(stop).total


@dataclasses.dataclass
class _Part:
    request: _Request
    start: int
    stop: int

    @property
    def sizes(self) -> RowSizes:
        return self.request.sizes.rows(self.start, self.stop)

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
        request_timeout: seconds in which requests must be answered: what would probably take
            longer, with those that wait already, is refused, and so is what would take more than a
            third of it alone. A single row is always allowed that third.
        batch_seconds: how long batches should take, or as long as two rows.
        patience: seconds to wait for a batch as large as the one before; a lone client that always
            sends the same number never waits.
        on_batch: called with the signature and the number of rows of each batch.
    """

    def __init__(
        self,
        max_queued: int = 4096,
        request_timeout: float = math.inf,
        batch_seconds: float = math.inf,
        patience: float = 0.005,
        on_batch: Callable[[Signature, int], None] = lambda signature, rows: None,
    ):
        self._max_queued = max_queued
        self._request_timeout = request_timeout
        self._batch_seconds = batch_seconds
        self._patience = patience
        self._on_batch = on_batch
        self._groups: dict[Hashable, _Group] = {}
        # How much work the last batch has shown to take no longer than it should.
        self._tried: weakref.WeakKeyDictionary[Signature, float] = weakref.WeakKeyDictionary()
        self._last_rows: weakref.WeakKeyDictionary[Signature, int] = weakref.WeakKeyDictionary()
        self._running: list[_Part] = []
        self._running_since: float | None = None
        self._running_until = 0.0  # probably
        self._turn_of_oldest = False
        self._numbers = itertools.count()
        self._queued = 0
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "bertgen_tf-batches")
        self._worker: asyncio.Task | None = None

    @property
    def queued(self) -> int:
        """How many rows wait."""
        return self._queued

    @property
    def queued_seconds(self) -> float:
        """How long what waits will probably take."""
        return sum(self._price(*waiting) for waiting in self._waiting())

    @property
    def busy_seconds(self) -> float:
        """How long the batch has run that runs now; 0.0 if there is none."""
        return 0.0 if self._running_since is None else time.monotonic() - self._running_since

    async def run(self, signature: Signature, inputs: Arrays) -> Result:
        """Runs a request; if cancelled, it leaves the queue.

        Args:
            signature: what to run.
            inputs: its inputs, of the right types and ranks.

        Returns:
            what it gives for these inputs. Dimensions other than the first that depend on the batch
            may be larger than for the request alone, padded with zeros or empty strings.

        Raises:
            QueueFull: too many rows wait, or too much work.
            RequestTooLarge: it is too much for one request.
            Exception: from TensorFlow.
        """
        rows = _count_rows(signature, inputs)
        sizes = row_sizes(inputs, rows, signature.max_length)
        request = _Request(
            inputs,
            rows,
            sizes,
            rest=sizes.total,
            number=next(self._numbers),
            future=asyncio.get_running_loop().create_future(),
        )
        self._check_room(signature, request)
        key = (signature, _group_key(inputs, sizes)) if rows is not None else request
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

    def _check_room(self, signature: Signature, request: _Request) -> None:
        if self._queued + request.waiting > self._max_queued:
            raise QueueFull(
                f"{self._queued} texts wait, but at most {self._max_queued} may. Try again later"
            )
        price, most = self._price(signature, request), _SHARE * self._request_timeout
        if price > most and request.waiting > 1:
            if not self._running and not self._groups:
                signature.cost.fade()
            allowed = max(1, math.floor(request.waiting * most / price))
            raise RequestTooLarge(
                f"The request would take about {price:.0f} seconds, and may take {most:.3g}. Send "
                f"at most {allowed} such text{'s' if allowed > 1 else ''}"
            )
        # Those with more to do than this one give way to it.
        price = min(price, most)
        waiting = (min(price, self._price(*other)) for other in self._waiting())
        running = max(0.0, self._running_until - time.monotonic()) if self._running else 0.0
        if (seconds := running + sum(waiting) + price) > self._request_timeout:
            raise QueueFull(
                f"The answer would take about {seconds:.0f} seconds, and may take "
                f"{self._request_timeout:g}. Try again later"
            )

    def _waiting(self) -> Iterator[tuple[Signature, _Request]]:
        return ((group.signature, r) for group in self._groups.values() for r in group.requests)

    def _price(self, signature: Signature, request: _Request) -> float:
        return signature.cost.price(request.rest, request.waiting, self._batch_seconds)

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
            # A call of its own: while nothing waits, no variable keeps a signature loaded.
            await self._run_next()

    async def _run_next(self) -> None:
        oldest, self._turn_of_oldest = self._turn_of_oldest, not self._turn_of_oldest
        key = self._choose(oldest)
        group = self._groups[key]
        await self._gather(group)
        if self._groups.get(key) is not group:
            return  # all went away
        parts = self._take(group, oldest)
        if not group.requests:
            del self._groups[key]
        if parts:
            await self._run_batch(group.signature, parts)
        else:  # all are about to leave
            await asyncio.sleep(0)

    async def _run_batch(self, signature: Signature, parts: list[_Part]) -> None:
        rows = sum(part.stop - part.start for part in parts)
        size = _joined_size(parts)
        expected = signature.cost.seconds(size)
        self._running = parts
        self._running_since = start = time.monotonic()
        self._running_until = start + expected
        self._last_rows[signature] = rows
        self._on_batch(signature, rows)
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, _run, signature, parts)
        except Exception as error:  # a bug in this module must not stop all others
            _log.exception("a batch failed")
            results = [error] * len(parts)
        finally:
            self._running_since = None
        seconds = time.monotonic() - start
        if not any(isinstance(result, Exception) for result in results):
            self._learn(signature, size, rows, seconds, expected)
        for part, result in zip(parts, results, strict=True):
            request = part.request
            request.used += seconds * (part.stop - part.start) / max(1, rows)
            request.batch_size = max(request.batch_size, rows)
            request.batch_seconds = max(request.batch_seconds, seconds)
            try:
                _finish(part, result)
            except Exception as error:
                _log.exception("an answer failed")
                request.future.set_exception(error)
        self._running = []

    def _learn(
        self, signature: Signature, size: Size, rows: int, seconds: float, expected: float
    ) -> None:
        """Takes note of a batch that took `seconds`."""
        cost = signature.cost
        if cost.is_known:
            cost.learn(size, min(seconds, _SURPRISE * expected))
        elif signature in self._tried:  # the first of all prepares the graph, and says nothing
            cost.learn(size, seconds)
        target = cost.target(size, max(1, rows), self._batch_seconds)
        factor = 2.0 if seconds <= target / 2 else 1.0 if seconds <= target else 0.5
        self._tried[signature] = factor * size.work

    def _choose(self, oldest: bool) -> Hashable:
        """The group whose turn it is."""
        return min(
            self._groups,
            key=lambda key: min(
                self._rank(self._groups[key], request, oldest)
                for request in self._groups[key].requests
            ),
        )

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

    def _rank(self, group: _Group, request: _Request, oldest: bool) -> tuple[float, ...]:
        """Whose turn it is: the smallest is next."""
        if oldest:
            return (request.number,)
        # What fits into one batch keeps its order.
        price = max(self._price(group.signature, request), self._batch_seconds)
        return request.used, price, request.number

    def _take(self, group: _Group, oldest: bool) -> list[_Part]:
        """The parts of the next batch."""
        most, cost = group.signature.max_batch_size, group.signature.cost
        waiting = (request for request in group.requests if not request.future.done())
        order = sorted(waiting, key=lambda r: self._rank(group, r, oldest))[:most]
        parts: list[_Part] = []

        def is_too_much() -> bool:
            size = _joined_size(parts)
            rows = sum(part.stop - part.start for part in parts)
            target = cost.target(size, max(1, rows), self._batch_seconds)
            tried = self._tried.get(group.signature, 0.0)
            return rows > 1 and size.work > tried and cost.seconds(size) > target

        for request in order:
            parts.append(_Part(request, request.taken, request.taken + min(1, request.waiting)))
            if is_too_much():
                parts.pop()
                break
        room = most - sum(part.stop - part.start for part in parts)
        for part in parts:
            end = part.request.taken + part.request.waiting
            while room and part.stop < end:
                part.stop += 1
                if is_too_much():
                    part.stop -= 1
                    break
                room -= 1
        for part in parts:
            request = part.request
            request.take(part.stop)
            self._take_away(group, part.stop - part.start)
            if not request.waiting:
                del group.requests[request]
        return parts


def _joined_size(parts: list[_Part]) -> Size:
    columns = zip(*(part.sizes for part in parts), strict=True)
    return RowSizes(*map(np.concatenate, columns)).padded


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


def _group_key(inputs: Arrays, sizes: RowSizes) -> Hashable:
    if _is_padded(inputs):
        longest = max((x.shape[1] for x in inputs.values() if x.ndim == 2), default=0)
        return max(_SHORTEST, longest).bit_length(), *_other_shapes(inputs, 3)
    # A short text would wait for a long one beside it.
    longest = int(max(sizes.tokens, default=0))
    return max(_SHORTEST, longest).bit_length(), *_other_shapes(inputs, 2)


def _other_shapes(inputs: Arrays, rank: int) -> tuple[Any, ...]:
    return tuple(x.shape[1:] for x in inputs.values() if x.ndim >= rank)


def _run(signature: Signature, parts: list[_Part]) -> list[Arrays | Exception]:
    """Runs parts together, or in halves if they fail: a bad row must not fail its neighbours."""
    if len(parts) == 1 and parts[0].request.future.done():
        return [RuntimeError("nobody waits for it")]
    parts_inputs = [part.inputs() for part in parts]
    sizes = [part.stop - part.start for part in parts]
    try:
        if len(parts) == 1 and parts[0].request.rows in (None, sizes[0]):  # a whole request
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


def _finish(part: _Part, result: Arrays | Exception) -> None:
    request = part.request
    if request.future.done():
        return
    if isinstance(result, Exception):
        request.future.set_exception(result)
        return
    request.parts[part.start] = result
    if request.waiting:
        return
    if len(request.parts) == 1:
        outputs = result
    else:
        parts = [request.parts[start] for start in sorted(request.parts)]
        outputs = {name: _join([x[name] for x in parts]) for name in result}
    request.future.set_result(Result(outputs, request.batch_size, request.batch_seconds))


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
