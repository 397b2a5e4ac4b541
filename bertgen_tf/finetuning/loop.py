"""The training loop. It can be stopped and resumed at any step, on one device or many.

Keras's `fit` cannot start in the middle of an epoch, and fails with several workers. A step is
still Keras's `train_step`, and callbacks are Keras's.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bertgen_tf.finetuning.data import Batch, TrainingData
from bertgen_tf.finetuning.replicas import Replicas, sum_of_replicas, together
from bertgen_tf.finetuning.state import RunFolder, State, assign_variables, read_variables
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.training.optimizers import averaged_weights

_SOON = 30.0  # seconds of training that must not be lost during validation
_SAVE, _STOP, _INTERRUPT = range(3)  # what one worker asks of all


class Diverged(ArithmeticError):
    """The loss or a weight is no longer finite: the message says where."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and did.

    Args:
        step: the last step that is saved.
    """

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


@dataclasses.dataclass(frozen=True)
class Interval:
    """How often the state is saved: every `steps` steps, or every `seconds` seconds."""

    steps: int | None = None
    seconds: float | None = None

    def is_over(self, steps: int, seconds: float) -> bool:
        """Whether it is time to save, this much after the last state."""
        over = self.steps is not None and steps >= self.steps
        return over or (self.seconds is not None and seconds >= self.seconds)


@dataclasses.dataclass
class Clock:
    """What steps took, in seconds, except the first of each shape, which compiles."""

    waited: float = 0.0
    computed: float = 0.0
    tokens: int = 0

    def add(self, waited: float, computed: float, tokens: int) -> None:
        """One more step."""
        self.waited += waited
        self.computed += computed
        self.tokens += tokens

    def logs(self) -> dict[str, float]:
        """Tokens per second, and the share of the time spent waiting for batches."""
        time_of_all = self.waited + self.computed
        if not time_of_all:
            return {}
        return {
            "tokens_per_second": self.tokens / time_of_all,
            "waited_for_data": self.waited / time_of_all,
        }


def train(
    model: EncoderDecoderModel,
    data: TrainingData,
    *,
    steps: int,
    steps_per_epoch: int | None = None,
    validation: TrainingData | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    folder: RunFolder | None = None,
    save_every: Interval = Interval(seconds=600),  # noqa: B008 it is frozen
    resume: bool = False,
    complain: Callable[[str], None] = lambda message: None,
) -> dict[str, list[float]]:
    """Trains a compiled model, under the `tf.distribute` strategy that it was made in.

    A run that is killed and resumed ends with the same weights, bit for bit, as an uninterrupted
    one on a machine of the same kind: data order, random seeds, optimizer and metrics are those of
    the step. On GPUs this needs `tf.config.experimental.enable_op_determinism()`.

    Args:
        model: compiled; with `optimizer.use_ema` it has averaged weights at the end of epochs, for
            validation and callbacks, and at the end of training.
        data: with a batch size that is a multiple of the number of the strategy's replicas; each
            takes its rows.
        steps: of the whole training.
        steps_per_epoch: steps before each validation and `on_epoch_end`; by default a pass over
            the data.
        validation: its loss is averaged over all tokens.
        callbacks: Keras's or others. Logs also contain `learning_rate`, `tokens_per_second` and
            `waited_for_data`. The result of a callback's `get_state()`, which must be JSON, is
            saved and passed to its `set_state(state)` on resuming.
        folder: where states are kept; its `begin` must have made it.
        save_every: at most this much is lost when the process is killed. The end of an epoch is
            saved as well, if the last state is older than half a minute, and so is the last step.
        resume: resume from the last state in `folder`, if there is one.
        complain: called with warnings about what went wrong but does no harm.

    Returns:
        the logs of the epochs, by name, like Keras's `History.history`.

    Raises:
        Damaged: no state in `folder` is whole, or what a callback needs is not.
        Diverged: the loss or a weight is not finite; earlier states are kept.
        Interrupted: Ctrl-C or SIGTERM; the state is saved if there is a `folder`.
        OSError: the state could not be written; earlier ones are kept.
        ValueError: the batch size does not fit, or the state is of another model.
        WorkerLost: see there.
    """
    loop = _Loop(model, data, steps, steps_per_epoch or data.steps_per_epoch, validation)
    loop.folder, loop.save_every, loop.complain = folder, save_every, complain
    with _signals(loop), together(loop.replicas):
        try:
            return loop.run(list(callbacks), resume)
        finally:
            model.train_function = None  # `fit` makes its own


class _Loop:
    """One training."""

    folder: RunFolder | None
    save_every: Interval
    complain: Callable[[str], None]

    def __init__(
        self,
        model: EncoderDecoderModel,
        data: TrainingData,
        steps: int,
        steps_per_epoch: int,
        validation: TrainingData | None,
    ):
        self.model, self.data, self.validation = model, data, validation
        self.steps, self.steps_per_epoch = steps, min(steps_per_epoch, steps)
        self.step = self.epoch = 0
        self.replicas = Replicas(model.distribute_strategy)
        self.interrupted = self.may_finish_step = False
        self.clock = Clock()
        self._logs: dict[str, float] = {}  # of the last step
        self._shapes: set[tuple] = set()
        self.saved = (-1, -1)

    # ------------------------------------------------------------------ the run

    def run(
        self, callbacks: list[keras.callbacks.Callback], resume: bool
    ) -> dict[str, list[float]]:
        model = self.model
        with self.replicas.strategy.scope():
            model.optimizer.build(model.trainable_variables)
        self._make_functions()
        epochs = -(-self.steps // self.steps_per_epoch)
        listed = keras.callbacks.CallbackList(
            callbacks, add_history=True, model=model, epochs=epochs, steps=self.steps_per_epoch
        )
        self._callbacks = listed.callbacks
        state = self._find_state() if resume and self.folder is not None else None
        if state is not None:
            self.step, self.epoch = state.step, state.epoch
        elif resume:
            self.complain("no step was saved to continue from: starting with the first")
        batches = iter(self.replicas.dataset(self.data, self.step, self.steps))
        model.stop_training = False
        if state is not None:
            self._restore(state)
            # A callback that ran out of patience may be the chief's alone.
            model.stop_training = self._any(model.stop_training)
        listed.on_train_begin()
        if state is not None:  # Keras has cleared it
            history = state.callbacks["history"]
            model.history.epoch, model.history.history = history["epoch"], history["history"]
        self.saved, self._saved_at = (self.step, self.epoch), time.monotonic()
        while self.step < self.steps or self.epoch < epochs:
            if model.stop_training:
                break
            self._run_epoch(batches, listed)
        model.optimizer.finalize_variable_values(model.trainable_variables)
        listed.on_train_end(self._logs)
        return model.history.history

    def _run_epoch(self, batches: Iterator, callbacks: keras.callbacks.CallbackList) -> None:
        """The rest of an epoch, and what follows its last step."""
        model = self.model
        start = self.epoch * self.steps_per_epoch
        end = min(start + self.steps_per_epoch, self.steps)
        if self.step == start:
            model.reset_metrics()
        callbacks.on_epoch_begin(self.epoch)
        clock = Clock()
        self.may_finish_step = True
        while self.step < end and not model.stop_training:
            callbacks.on_train_batch_begin(self.step - start)
            self._logs = self._make_step(next_batch=lambda: next(batches), clock=clock)
            callbacks.on_train_batch_end(self.step - start - 1, self._logs)
            self._attend()
        self.may_finish_step = False
        if self.interrupted and not self.replicas.many_workers:
            self._attend()  # it came after the last step
        stopped = model.stop_training
        self._save_if_due(_SOON)  # what follows can take a long time
        logs = {**self._logs, **clock.logs()}
        with averaged_weights(model):
            if self.validation is not None:
                results = self._evaluate(callbacks)
                logs.update({f"val_{name}": value for name, value in results.items()})
            callbacks.on_epoch_end(self.epoch, logs)
        # What one worker decides holds for all.
        model.stop_training = stopped or self._any(model.stop_training)
        self.epoch += 1
        ended = model.stop_training or self.step == self.steps
        self._save_if_due(0.0 if ended else _SOON)

    def _make_step(self, next_batch: Callable[[], Any], clock: Clock) -> dict[str, float]:
        began = time.perf_counter()
        parts = next_batch()
        arrived = time.perf_counter()
        rate = float(tf.convert_to_tensor(self.model.optimizer.learning_rate))
        shape = tuple(tuple(t.shape) for t in tf.nest.flatten(parts[0]))
        if self.model.train_function is not self._step_function:
            # A callback has changed what trains, and asked for a new function as it would of `fit`.
            self._make_functions()
        results = self._step_function(self.replicas.distribute(parts))
        logs = {name: float(value) for name, value in results.items()}
        ended = time.perf_counter()
        tokens = self.data.tokens(self.step)
        if shape in self._shapes:
            for one in (clock, self.clock):
                one.add(arrived - began, ended - arrived, tokens)
        self._shapes.add(shape)
        self.step += 1
        if not math.isfinite(logs["loss"]):
            raise Diverged(
                f"the loss is {logs['loss']} at step {self.step:,}, with the learning rate "
                f"{rate:.3g}"
            )
        return {**logs, "learning_rate": rate, **clock.logs()}

    def _attend(self) -> None:
        """After a step: saves or stops if any worker, callback, signal or clock asks for it."""
        asked = [0, 0, 0]
        asked[_SAVE] = int(self._is_due())
        asked[_STOP] = int(self.model.stop_training)
        asked[_INTERRUPT] = int(self.interrupted)
        asked = self.replicas.add(asked)
        self.model.stop_training = bool(asked[_STOP])
        if asked[_SAVE] or asked[_INTERRUPT]:
            self._save()
        if asked[_INTERRUPT]:
            raise Interrupted(self.step)

    def _is_due(self, most: float = math.inf) -> bool:
        """Whether the chief wants a state: always if the last one is `most` seconds old."""
        steps, seconds = self.step - self.saved[0], time.monotonic() - self._saved_at
        due = self.save_every.is_over(steps, seconds) or seconds >= most
        return due and self.replicas.is_chief

    def _save_if_due(self, most: float) -> None:
        if self._any(self._is_due(most)):
            self._save()

    def _any(self, value: bool) -> bool:
        """Whether it is true for any worker."""
        return bool(self.replicas.add([int(value)])[0])

    # ------------------------------------------------------------------ graphs

    def _make_functions(self) -> None:
        model, strategy = self.model, self.replicas.strategy

        def train_step(batch: Batch) -> None:
            model.train_step(batch)

        def test_step(batch: Batch) -> Any:
            x, y, weight = batch
            logits = model(x, training=False)
            loss = model.compute_loss(x, y, logits, weight, training=False)
            model.compute_metrics(x, y, logits, sample_weight=weight)
            # Summed over replicas: Keras has divided by their number, so this is the mean.
            return sum_of_replicas(loss) if self.replicas.count > 1 else loss

        if model.jit_compile and self.replicas.count == 1:
            train_step = tf.function(train_step, jit_compile=True, autograph=False)
            test_step = tf.function(test_step, jit_compile=True, autograph=False)

        @tf.function(autograph=False)
        def step(batch: Any) -> dict[str, Any]:
            strategy.run(train_step, (batch,))
            return model.get_metrics_result()

        @tf.function(autograph=False)
        def test(batch: Any) -> Any:
            return strategy.experimental_local_results(strategy.run(test_step, (batch,)))[0]

        self._step_function, self._test_function = step, test
        self._shapes.clear()
        model.train_function = step

    def _metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.model.get_metrics_result().items()}

    def _evaluate(self, callbacks: keras.callbacks.CallbackList) -> dict[str, float]:
        """The loss per token, and the metrics, on the validation data."""
        data, model = self.validation, self.model
        model.reset_metrics()
        callbacks.on_test_begin()
        losses, counts = [], []
        for i, parts in enumerate(self.replicas.dataset(data, 0, data.steps_per_epoch)):
            callbacks.on_test_batch_begin(i)
            losses.append(float(self._test_function(self.replicas.distribute(parts))))
            counts.append(data.target_tokens(i))
            callbacks.on_test_batch_end(i)
        logs = {**self._metrics(), "loss": float(np.average(losses, weights=counts))}
        callbacks.on_test_end(logs)
        return logs

    # ------------------------------------------------------------------ states

    def _save(self) -> None:
        if self.folder is None or self.saved == (self.step, self.epoch):
            return
        tensors = read_variables(self.model)
        for name, tensor in tensors.items():
            # A gradient can be infinite where the loss is not yet.
            if name.startswith("model/") and not np.isfinite(tensor).all():
                raise Diverged(f"a weight is not finite after step {self.step:,}")
        states = {name: callback.get_state() for name, callback in self._with_state().items()}
        history = self.model.history
        states["history"] = {"epoch": history.epoch, "history": history.history}
        states["logs"] = self._logs
        if self.replicas.is_chief:
            self.folder.save(State(self.step, self.epoch, tensors, states))
        self.saved, self._saved_at = (self.step, self.epoch), time.monotonic()

    def _with_state(self) -> dict[str, Any]:
        """The callbacks that have a state, by name; others may come and go."""
        found: dict[str, Any] = {}
        for callback in self._callbacks:
            if hasattr(callback, "get_state"):
                kind = type(callback).__name__
                found[f"{kind} {sum(name.startswith(kind) for name in found)}"] = callback
        return found

    def _find_state(self) -> State | None:
        """The chief's last state, for all workers."""
        if not self.replicas.many_workers:
            return self.folder.load(self.complain)
        state = self.folder.load(self.complain) if self.replicas.is_chief else None
        step = self.replicas.add([0 if state is None else state.step + 1])[0] - 1
        if step >= 0 and not self.replicas.is_chief:
            state = self.folder.load(self.complain, step)
            if state is None:
                raise OSError(
                    f"{self.folder.path} must be the same folder for all workers, but the state of "
                    f"step {step} is not in this worker's"
                )
        return state

    def _restore(self, state: State) -> None:
        # Metrics have no variables before a step is traced.
        parts = next(iter(self.replicas.dataset(self.data, 0, 1)))
        self._step_function.get_concrete_function(self.replicas.distribute(parts))
        assign_variables(self.model, state.tensors)
        if self.folder is not None and self.replicas.is_chief:
            self.folder.cut_log(state.step, state.epoch, self.complain)
        for name, callback in self._with_state().items():
            if name in state.callbacks:
                callback.set_state(state.callbacks[name])
        self._logs = state.callbacks["logs"]


@contextlib.contextmanager
def _signals(loop: _Loop) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end the training after the current step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        # A second signal stops at once. On the first, several workers have to agree.
        if loop.interrupted or not (loop.may_finish_step or loop.replicas.many_workers):
            raise Interrupted(loop.saved[0]) if loop.saved[0] > 0 else KeyboardInterrupt
        loop.interrupted = True

    earlier = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
