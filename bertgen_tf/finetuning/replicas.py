"""Devices and workers that share the batches of a training."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from bertgen_tf.config import STRATEGIES
from bertgen_tf.finetuning.data import Batch, TrainingData

# What TensorFlow raises when a worker does not answer.
_LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
)


class WorkerLost(RuntimeError):
    """Another worker is gone, and training cannot continue without it."""


class Replicas:
    """Who takes which rows of a batch, under a strategy."""

    def __init__(self, strategy: tf.distribute.Strategy):
        self.strategy = strategy
        self.count = strategy.num_replicas_in_sync
        ids = self._values(lambda context: context.replica_id_in_sync_group)
        local = [int(value) for value in strategy.experimental_local_results(ids)]
        self.first, self.local = local[0], len(local)
        self.many_workers = self.local < self.count
        self.is_chief = self.first == 0

    def dataset(self, data: TrainingData, first: int, last: int) -> tf.data.Dataset:
        """For each step, the batches of the replicas of this process."""
        if data.batch_size % self.count:
            raise ValueError(
                f"batch_size must be a multiple of the {self.count} replicas that share a batch, "
                f"received {data.batch_size}."
            )
        size = data.batch_size // self.count
        part = slice(self.first * size, (self.first + self.local) * size)

        def split(*batch: Any) -> tuple[Batch, ...]:
            return tuple(
                tf.nest.map_structure(lambda t, i=i: t[i * size : (i + 1) * size], batch)
                for i in range(self.local)
            )

        return data.dataset(first, last, part).map(split).prefetch(2)

    def distribute(self, parts: Sequence[Any]) -> Any:
        """One part for each replica of this process -> an argument of `strategy.run`."""
        if self.local == 1:
            return parts[0]
        return self._values(lambda context: parts[context.replica_id_in_sync_group - self.first])

    def add(self, numbers: Sequence[int]) -> list[int]:
        """Sums of int32 numbers over all workers."""
        if not self.many_workers:
            return list(numbers)
        zeros = tf.zeros([len(numbers)], tf.int32)
        parts = [tf.constant(numbers, tf.int32)] + [zeros] * (self.local - 1)
        return self._add(self.distribute(parts)).numpy().tolist()

    @tf.function(autograph=False)
    def _add(self, numbers: Any) -> Any:
        return self.strategy.experimental_local_results(
            self.strategy.run(sum_of_replicas, (numbers,))
        )[0]

    def _values(self, function: Callable[[Any], Any]) -> Any:
        return self.strategy.experimental_distribute_values_from_function(function)


def sum_of_replicas(value: Any) -> Any:
    """The sum of the values of all replicas, in a replica's context."""
    # Moves it to the replica's device, where arguments are not.
    value = tf.identity(value)
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


@contextlib.contextmanager
def together(replicas: Replicas) -> Iterator[None]:
    """Wraps what all workers do together: raises `WorkerLost` if one is gone."""
    try:
        yield
    except _LOST as error:
        if not replicas.many_workers:
            raise
        raise WorkerLost(
            "another worker of TF_CONFIG is gone, or cannot be reached: start all of them again"
        ) from error


def make_strategy(distribute: str = "auto", workers: bool = False) -> tf.distribute.Strategy:
    """The `tf.distribute` strategy for the available devices, to make a model in.

    Args:
        distribute: one of `STRATEGIES`. "auto" takes all GPUs of this machine, "mirrored" all GPUs
            or else all logical CPUs, "tpu" a TPU (untested), "none" one device.
        workers: whether TF_CONFIG names several workers, which then share each batch unless
            `distribute` is "none". TensorFlow must not have been used before.
    """
    if distribute not in STRATEGIES:
        raise ValueError(
            f"distribute must be one of {', '.join(STRATEGIES)}, received {distribute!r}."
        )
    if workers and distribute != "none":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if distribute == "tpu":
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver()
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if distribute == "mirrored" or (
        distribute == "auto" and len(devices) > 1 and devices[0].device_type == "GPU"
    ):
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()
