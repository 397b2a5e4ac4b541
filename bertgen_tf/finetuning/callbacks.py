"""Keras callbacks for training: generated texts and their scores, the best weights, progress."""

import datetime
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import keras
import numpy as np
import tensorflow as tf

from bertgen_tf import metrics as scores
from bertgen_tf.checks import Damaged, check_integer
from bertgen_tf.config import BATCH_SIZE, GenerationConfig
from bertgen_tf.data import folders
from bertgen_tf.finetuning.state import RunFolder
from bertgen_tf.network.weights import check_finite
from bertgen_tf.training.tensor_files import load_tensors, save_tensors

_INTERVAL = 10.0  # seconds between lines, where there is no terminal
_SHOWN = 8  # texts for TensorBoard


class GenerateCallback(keras.callbacks.Callback):
    """Generates from held-out sources when epochs end; writes the outputs and their scores.

    The scores become logs, such as `val_bleu`, so that callbacks after this one can monitor them:

        keras.callbacks.ModelCheckpoint("best.keras", "val_bleu", mode="max", save_best_only=True)

    Args:
        sources: texts to generate from.
        references: the right output for each, one text or several.
        metrics: names of `bertgen_tf.metrics`, such as ("exact", "sari", "bleu", "rouge").
        every: epochs from one time to the next.
        folder: where an epoch's outputs are written, as `epoch-0001.jsonl`; None writes none.
        generation_config: settings; by default the model's own.
        batch_size: how many texts are generated together, at most.
        jit_compile: see `EncoderDecoderModel.generate`.
        **options: of `bertgen_tf.metrics.compute`, such as lowercase=True or
            normalize=model.preprocessor.normalize.

    Raises:
        ImportError: a metric needs a package that is not installed.
        ValueError: an unknown metric, or not one reference for each source.
    """

    def __init__(
        self,
        sources: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        metrics: Sequence[str] = ("exact",),
        *,
        every: int = 1,
        folder: str | os.PathLike | None = None,
        generation_config: GenerationConfig | None = None,
        batch_size: int = BATCH_SIZE,
        jit_compile: bool = True,
        **options: Any,
    ):
        super().__init__()
        check_integer("every", every)
        self.sources, self.references = list(sources), list(references)
        self.metrics = scores.expand(metrics)
        # Sources stand in for outputs: what would fail after an epoch fails now.
        self.options = options
        scores.compute(self.metrics, self.sources, self.sources, self.references, **options)
        self.every = every
        self.folder = None if folder is None else pathlib.Path(folder)
        self.generation_config = generation_config
        self.batch_size, self.jit_compile = batch_size, jit_compile
        self.outputs: list[str] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if (epoch + 1) % self.every:
            return
        self.outputs = self.model.generate(
            self.sources,
            self.generation_config,
            num_return_sequences=1,
            batch_size=self.batch_size,
            jit_compile=self.jit_compile,
            verbose=0,
        )
        results = scores.compute(
            self.metrics, self.sources, self.outputs, self.references, **self.options
        )
        if logs is not None:
            logs.update({f"val_{name}": result.value for name, result in results.items()})
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            folders.whole_file(self._file(epoch + 1)) as path,
            open(path, "w", encoding="utf-8") as file,
        ):
            for row in zip(self.sources, self.outputs, self.references, strict=True):
                values = dict(zip(("source", "output", "reference"), row, strict=True))
                file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def read(self, epoch: int) -> list[dict[str, Any]]:
        """What was written for an epoch, counted from 1: source, output and reference of each.

        Raises:
            OSError: there is no such file.
            Damaged: it holds something else.
        """
        rows = []
        try:
            with open(self._file(epoch), encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    rows.append({name: row[name] for name in ("source", "output", "reference")})
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise Damaged(f"{self._file(epoch)} is damaged ({error!r})") from error
        return rows

    def _file(self, epoch: int) -> pathlib.Path:
        return self.folder / f"epoch-{epoch:04d}.jsonl"


class KeepBest(keras.callbacks.Callback):
    """Keeps the best weights in a file, and ends the training when they stop improving.

    With a moving average of the weights, the average is kept.

    Args:
        path: the file, for `load`.
        monitor: the name of a log, such as "val_loss" or "val_bleu".
        patience: end after this many epochs without a better value; None for never.
        complain: called with a warning if a training is resumed without the file.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        monitor: str,
        patience: int | None = None,
        complain: Callable[[str], None] = lambda message: None,
    ):
        super().__init__()
        self.complain = complain
        self.path, self.monitor, self.patience = pathlib.Path(path), monitor, patience
        self.sign = -1 if monitor.endswith("loss") else 1
        self.best: float | None = None
        self.best_epoch = self.waited = 0

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        value = (logs or {}).get(self.monitor)
        if value is None:  # not measured after this epoch
            return
        is_first = self.best is None and not math.isnan(value)
        if is_first or (self.best is not None and self.sign * value > self.sign * self.best):
            weights = self.model.get_weights()
            save_tensors(self.path, {f"{i:05d}": w for i, w in enumerate(weights)}, {})
            self.best, self.best_epoch, self.waited = float(value), epoch + 1, 0
        else:
            self.waited += 1
        self._stop()

    def load(self, model: keras.Model) -> None:
        """Loads the best weights into a model, if there are any.

        Raises:
            Damaged: the file is.
        """
        if self.best is not None:
            tensors = self._read()
            model.set_weights([tensors[name] for name in sorted(tensors)])

    def get_state(self) -> dict[str, Any]:
        """For `bertgen_tf.finetuning.train`."""
        return {"best": self.best, "best_epoch": self.best_epoch, "waited": self.waited}

    def set_state(self, state: dict[str, Any]) -> None:
        """For `bertgen_tf.finetuning.train`.

        Raises:
            Damaged: the file is, of which is better told now than at the end.
        """
        self.best, self.waited = state["best"], state["waited"]
        self.best_epoch = state["best_epoch"]
        if self.best is not None and not os.path.lexists(self.path):
            self.complain(
                f"{self.path} is missing: the best weights are looked for from here on, or, if no "
                "epoch is left, the last are taken"
            )
            self.best, self.best_epoch, self.waited = None, 0, 0
        elif self.best is not None:
            self._read()
        self._stop()

    def _read(self) -> dict[str, np.ndarray]:
        try:
            tensors, _ = load_tensors(self.path)
            check_finite(str(self.path), tensors)
            if {name: t.shape for name, t in tensors.items()} != {
                f"{i:05d}": tuple(w.shape) for i, w in enumerate(self.model.weights)
            }:
                raise Damaged(f"{self.path} has the weights of another model")
            return tensors
        except ValueError as error:
            raise Damaged(
                f"{error}; delete it to resume without the best weights so far"
            ) from error

    def _stop(self) -> None:
        if self.patience is not None and self.waited >= self.patience:
            self.model.stop_training = True


class Log(keras.callbacks.Callback):
    """Shows the progress of training, and writes it to the log of a folder.

    A terminal shows Keras's bar; elsewhere a line appears now and then.

    Args:
        steps: of the whole training.
        folder: the folder of the log; None for none.
        step: how many steps are done when training begins.
        file: to write to; by default standard output.
    """

    def __init__(
        self, steps: int, folder: RunFolder | None = None, step: int = 0, file: TextIO | None = None
    ):
        super().__init__()
        self.steps, self.step, self.folder = steps, step, folder
        self.file = file or sys.stdout
        self._bar: keras.utils.Progbar | None = None
        self._shown = self._began = time.monotonic()
        self._first = step

    def set_state(self, state: dict[str, Any]) -> None:
        """For `bertgen_tf.finetuning.train`."""
        self.step = self._first = state["step"]

    def get_state(self) -> dict[str, Any]:
        """For `bertgen_tf.finetuning.train`."""
        return {"step": self.step}

    def on_train_begin(self, logs: Any = None) -> None:
        self._began = self._shown = time.monotonic()
        if self._first:
            self._write(f"continuing after step {self._first:,} of {self.steps:,}\n")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if not self.file.isatty():
            return
        per_epoch = self.params["steps"]
        self._epoch_start = epoch * per_epoch
        target = min(self._epoch_start + per_epoch, self.steps) - self._epoch_start
        time_left = f", {self._time_left()} left" if self.step > self._first else ""
        self._write(f"Epoch {epoch + 1}/{self.params['epochs']}{time_left}\n")
        self._bar = _Bar(target, self.step - self._epoch_start)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.step += 1
        logs = logs or {}
        if self._bar is not None:
            shown = {"loss": "loss", "accuracy": "accuracy", "tokens_per_second": "tokens/s"}
            values = [(new, logs[name]) for name, new in shown.items() if name in logs]
            # The final one comes with the results of the epoch.
            self._bar.update(self.step - self._epoch_start, values, finalize=False)
        if time.monotonic() - self._shown >= _INTERVAL:
            self._shown = time.monotonic()
            if self._bar is None:
                text = f"step {self.step:,} of {self.steps:,}: {_describe(logs)}"
                self._write(f"{text}, {self._time_left()} left\n")
            self._log(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.end_line()
        self._write(f"epoch {epoch + 1} of {self.params['epochs']}: {_describe(logs or {})}\n")
        self._log({"epoch": epoch + 1, **(logs or {})})
        self._shown = time.monotonic()

    def end_line(self) -> None:
        """Ends the line of a bar, so that what comes next has one of its own."""
        if self._bar is not None:
            self._write("\n")
            self._bar = None

    def _time_left(self) -> str:
        passed = time.monotonic() - self._began
        seconds = passed / max(self.step - self._first, 1) * (self.steps - self.step)
        return str(datetime.timedelta(seconds=round(seconds)))

    def _log(self, logs: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.log(step=self.step, **logs)

    def _write(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()


class _Bar(keras.utils.Progbar):
    """A bar that may begin after the first steps of an epoch, whose time it does not know.

    Args:
        target: steps of the epoch.
        first: how many of them are done.
    """

    def __init__(self, target: int, first: int):
        super().__init__(target, stateful_metrics=["loss", "accuracy", "tokens/s"])
        self._first = first

    def _estimate_step_duration(self, current: int, now: float) -> float:
        return super()._estimate_step_duration(current - self._first, now)


class TensorBoardCurves(keras.callbacks.Callback):
    """Curves of training and validation, and sample outputs, for TensorBoard.

    Args:
        folder: where its files are written.
        samples: the callback whose outputs to show.
        every: steps between two points.

    Raises:
        ImportError: tensorboard is not installed.
        OSError: while it trains, if the disk is full or cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike, samples: GenerateCallback | None = None, every: int = 10
    ):
        super().__init__()
        try:
            import tensorboard  # noqa: F401 `tf.summary` is a part of it
        except ImportError as error:
            raise ImportError(
                "TensorBoard needs tensorboard: pip install 'bertgen_tf[tensorboard]'"
            ) from error
        self.folder = str(folder)
        self.samples, self.every, self.step = samples, every, 0

    def set_state(self, state: dict[str, Any]) -> None:
        """For `bertgen_tf.finetuning.train`."""
        self.step = state["step"]

    def get_state(self) -> dict[str, Any]:
        """For `bertgen_tf.finetuning.train`."""
        return {"step": self.step}

    def on_train_begin(self, logs: Any = None) -> None:
        with folders.disk_errors(self.folder):
            self.writer = tf.summary.create_file_writer(self.folder)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.step += 1
        if self.step % self.every == 0:
            self._write(logs or {}, "train/")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        validation = {
            name.removeprefix("val_"): value
            for name, value in (logs or {}).items()
            if name.startswith("val_")
        }
        self._write(validation, "validation/")
        samples = self.samples
        if samples is not None and samples.outputs:
            columns = (samples.sources, samples.outputs, samples.references)
            rows = [
                " | ".join(str(text).replace("|", "\\|") for text in row)
                for row in list(zip(*columns, strict=True))[:_SHOWN]
            ]
            table = "\n".join(["source | output | reference", "---|---|---", *rows])
            with folders.disk_errors(self.folder), self.writer.as_default(self.step):
                tf.summary.text("samples", table)
        with folders.disk_errors(self.folder):
            self.writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        with folders.disk_errors(self.folder):
            self.writer.close()

    def _write(self, logs: dict[str, Any], prefix: str) -> None:
        with folders.disk_errors(self.folder), self.writer.as_default(self.step):
            for name, value in logs.items():
                tf.summary.scalar(prefix + name, value)


def _describe(logs: dict[str, Any]) -> str:
    """Numbers in words: the training's, then the validation's, then the speed."""
    parts = []
    for prefix, words in (("", ""), ("val_", "; validation: ")):
        names = [n for n in logs if n.startswith("val_") == bool(prefix)]
        names = [n for n in names if n not in ("tokens_per_second", "waited_for_data")]
        names.sort(key=lambda n: not n.endswith("loss"))
        if names:
            parts.append(words + ", ".join(_number(n.removeprefix(prefix), logs[n]) for n in names))
    if "tokens_per_second" in logs:
        parts.append(f"; {logs['tokens_per_second']:,.0f} tokens a second")
    if not math.isnan(waited := logs.get("waited_for_data", math.nan)):
        parts.append(f", {waited:.1%} of the time waiting for data")
    return "".join(parts)


def _number(name: str, value: float) -> str:
    if name == "learning_rate":
        return f"learning rate {value:.2e}"
    if name == "accuracy":
        return f"accuracy {value:.1%}"
    return f"{name} {value:.2f}" if name in scores.METRICS else f"{name} {value:.4f}"
