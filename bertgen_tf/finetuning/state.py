"""The folder of a running training: how it began, its state, its log.

| file | what it holds |
| --- | --- |
| run.json | what determines the result: settings, digests of the data and the starting model |
| state-STEP.safetensors | weights, random seeds, optimizer, metrics and callbacks after that step |
| best.safetensors | the best weights so far, if the best are kept |
| adapter.safetensors | what LoRA trained, when the model is saved |
| log.jsonl | metrics of each interval and each epoch, one JSON object a line |
| samples/ | what was generated after each epoch |
| tensorboard/ | the same for TensorBoard, if asked for |

A state gets its name only when all of it is on disk; two are kept, in case one is damaged. States,
best weights and adapter have checksums.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from bertgen_tf.checks import Damaged, check_integer, read_json
from bertgen_tf.data import folders
from bertgen_tf.network.weights import check_finite
from bertgen_tf.training.tensor_files import load_tensors, replace_file, save_tensors

ADAPTER_FILE = "adapter.safetensors"
RUN_FILE, LOG_FILE, BEST_FILE, LOCK_FILE = "run.json", "log.jsonl", "best.safetensors", "lock"
# What came of a log that could not be read.
DAMAGED_LOG_FILE = "log.damaged.jsonl"
SAMPLES_FOLDER, TENSORBOARD_FOLDER = "samples", "tensorboard"
FORMAT = "bertgen_tf training"
KEPT = 2
_AGAIN = "overwrite=True starts anew"
_STATE = r"state-(\d+)\.safetensors"
_OWN = rf"{_STATE}|run\.json|log\.jsonl|best\.safetensors|adapter\.safetensors"
# What is being written; safetensors renames its files, too.
_NEW = rf"({_OWN})\.new|\.tmp\w{{6}}|\.adapter\.safetensors\.bertgen_tf-.*"


class OtherModel(ValueError):
    """A state of another model, optimizer or version."""


class State(NamedTuple):
    """Where a training stands.

    Args:
        step: steps done.
        epoch: epochs completed, with all that follows their last step.
        tensors: arrays by name.
        callbacks: what the callbacks need to resume, as JSON.
    """

    step: int
    epoch: int
    tensors: dict[str, np.ndarray]
    callbacks: dict[str, Any]


class RunFolder:
    """The folder beside a model that is being trained, `OUTPUT.training`.

    Args:
        output: where the model will be.
    """

    def __init__(self, output: str | os.PathLike):
        self.output = pathlib.Path(output)
        self.path = pathlib.Path(f"{str(output).rstrip('/')}.training")

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.path / name

    # ------------------------------------------------------------------ which run it is

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raises a ValueError if a run would be lost."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} should be a folder for the training, but is a file")
        run = self._read_run()
        names = os.listdir(self.path) if run is None and self.path.exists() else []
        if others := sorted(name for name in names if not _is_own(name)):
            raise ValueError(
                f"{self.path} should be new or the folder of a training, but holds other files, "
                f"such as {others[0]}: choose another folder"
            )
        if {*names} - {LOCK_FILE} and not overwrite:
            raise ValueError(
                f"{self / RUN_FILE} should say which training {self.path} holds, but is missing or "
                f"damaged: {_AGAIN}"
            )
        if run is not None and not run["complete"] and not resume and not overwrite:
            raise ValueError(
                f"{self.path} holds a training that did not end; resume=True continues it, {_AGAIN}"
            )

    def is_complete(self) -> bool:
        """Whether a training finished here."""
        run = self._read_run()
        return run is not None and run["complete"]

    def is_begun(self) -> bool:
        """Whether there is a training to resume."""
        run = self._read_run()
        return run is not None and not run["complete"]

    def check_same(self, settings: dict[str, Any], but: str | None = None) -> None:
        """Raises a ValueError that names the differences if the run here has other settings.

        Args:
            settings: as passed to `begin`.
            but: a name that is not compared.
        """
        run = self._read_run()
        earlier = {} if run is None else run["settings"]
        settings = json.loads(json.dumps(settings))  # tuples are lists there
        names = [name for name in {**earlier, **settings} if name != but]
        other = [name for name in names if earlier.get(name) != settings.get(name)]
        if other:
            raise ValueError(
                f"resume=True needs the training that began {self.path}, but that had another "
                f"{', '.join(other)}; {_AGAIN}"
            )

    def begin(self, settings: dict[str, Any]) -> None:
        """Makes an empty folder for a run with `settings`."""
        self.path.mkdir(parents=True, exist_ok=True)
        # run.json last: until then what is left is recognised as a run of ours.
        names = filter(_is_own, os.listdir(self.path))
        for name in {*names} - {LOCK_FILE, RUN_FILE}:
            _remove(self / name)
        self._write_run(settings, complete=False)

    def end(self) -> None:
        """The model is saved: only what documents the training is kept."""
        self._write_run(self._read_run()["settings"], complete=True)
        for _, path in self._states():
            _remove(path)
        _remove(self / BEST_FILE)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Raises an OSError while another process holds it."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        path, held = self / LOCK_FILE, f"another training is writing to {self.path}: let it end"
        is_locked = False
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OSError(held) from error
            except OSError:  # a file system without locks
                pass
            else:
                is_locked = True
            # A training that ended between opening and locking has removed it.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise OSError(held)
            if is_locked:
                self._sweep()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty, as it is when no training began
                    self.path.rmdir()

    def _sweep(self) -> None:
        """Removes what a killed training was writing."""
        for path in self.path.iterdir():
            if re.fullmatch(_NEW, path.name) and path.is_file():
                path.unlink()

    def _read_run(self) -> dict[str, Any] | None:
        try:
            run = read_json(self / RUN_FILE)
            valid = isinstance(run["settings"], dict) and isinstance(run["complete"], bool)
            if run["format"] == FORMAT and valid:
                return run
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _write_run(self, settings: dict[str, Any], complete: bool) -> None:
        run = {"format": FORMAT, "complete": complete, "settings": settings}

        def write(path: pathlib.Path) -> None:
            path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")

        _clear(self / RUN_FILE)
        replace_file(self / RUN_FILE, write)

    # ------------------------------------------------------------------ states

    def save(self, state: State) -> None:
        """Writes a state, then removes those no longer needed.

        Raises:
            OSError: it could not be written; earlier ones are unchanged.
        """
        place = {"step": state.step, "epoch": state.epoch, "callbacks": state.callbacks}
        path = self / f"state-{state.step:08d}.safetensors"
        _clear(path)
        save_tensors(path, state.tensors, {"place": json.dumps(place)})
        for step, path in self._states():
            # Later ones were written before this run resumed from an earlier state.
            if step > state.step:
                _remove(path)
        for _, path in self._states()[:-KEPT]:
            _remove(path)

    def load(self, complain: Callable[[str], None], step: int | None = None) -> State | None:
        """The last undamaged state; None if there is none at all.

        Args:
            complain: called with a message for each damaged one.
            step: only the state of this step.

        Raises:
            Damaged: all are damaged.
        """
        states = [pair for pair in self._states() if step in (None, pair[0])]
        for _, path in reversed(states):
            try:
                return _read_state(path)
            except Damaged as error:
                complain(f"{error}; trying the previous one")
        if states:
            raise Damaged(f"{self.path} holds no undamaged state: {_AGAIN}")
        return None

    def _states(self) -> list[tuple[int, pathlib.Path]]:
        """Steps and files, the last step last."""
        found = []
        for path in self.path.glob("state-*.safetensors"):
            match = re.fullmatch(_STATE, path.name)
            if match:
                found.append((int(match[1]), path))
        return sorted(found)

    # ------------------------------------------------------------------ log

    def log(self, **numbers: Any) -> None:
        """Adds a line to the log."""
        path = self / LOG_FILE
        with folders.disk_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")

    def cut_log(self, step: int, epoch: int, complain: Callable[[str], None]) -> None:
        """Removes what came after a state, and will come again.

        A log with lines that cannot be read is kept under another name.

        Args:
            step, epoch: of the state.
            complain: called with a message in that case.
        """
        path = self / LOG_FILE
        if not os.path.lexists(path):
            return
        # Without the last line: what has no end was being written.
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else [b""]
        kept, damaged = [], False
        for line in lines:
            try:
                numbers = json.loads(line)
                if numbers["step"] <= step and numbers.get("epoch", 0) <= epoch:
                    kept.append(line + b"\n")
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
                damaged = True
        if damaged:
            other = self / DAMAGED_LOG_FILE
            _remove(other)
            os.replace(path, other)
            complain(
                f"{path} has damaged lines: it is now {other.name}, and a new one has the others"
            )
        replace_file(path, lambda new: new.write_bytes(b"".join(kept)))


def _read_state(path: pathlib.Path) -> State:
    """Raises Damaged if it is not one."""
    try:
        tensors, metadata = load_tensors(path)
        state = State(tensors=tensors, **json.loads(metadata["place"]))
        check_integer("step", state.step, 0)
        check_integer("epoch", state.epoch, 0)
        weights = {name: t for name, t in tensors.items() if name.startswith("model/")}
        check_finite(str(path), weights)
        return state
    except Damaged:
        raise
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise Damaged(f"{path} is damaged ({error})") from error


def _is_own(name: str) -> bool:
    """Whether a file of this name is a training's."""
    others = (LOCK_FILE, DAMAGED_LOG_FILE, SAMPLES_FOLDER, TENSORBOARD_FOLDER)
    return name in others or re.fullmatch(f"{_OWN}|{_NEW}", name) is not None


def _clear(path: pathlib.Path) -> None:
    """Makes room for a file: a folder is in the way of it, a file is replaced."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _remove(path: pathlib.Path) -> None:
    """Removes a file or a folder, if there is one."""
    _clear(path)
    path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- the model's part


def read_variables(model: keras.Model) -> dict[str, np.ndarray]:
    """All that training changes in a compiled model: weights, random seeds, optimizer, metrics."""
    return {name: np.array(v.numpy()) for name, v in _variables(model).items()}


def assign_variables(model: keras.Model, tensors: Mapping[str, np.ndarray]) -> None:
    """The reverse of `read_variables`, bit for bit.

    Raises:
        OtherModel: the tensors are those of another model or optimizer; nothing was assigned.
    """
    variables = _variables(model)
    described = {n: (tuple(v.shape), str(v.dtype)) for n, v in variables.items()}
    received = {n: (t.shape, str(t.dtype)) for n, t in tensors.items()}
    if described != received:
        names = {*described, *received}
        other = sorted(n for n in names if described.get(n) != received.get(n))
        raise OtherModel(
            f"The state must be of the same model and optimizer, but {len(other)} variables differ,"
            f" such as {other[0]}: {described.get(other[0])} and {received.get(other[0])}."
        )
    for name, variable in variables.items():
        variable.assign(tensors[name])


def digest_weights(model: keras.Model) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for variable in model.weights:
        digest.update(np.ascontiguousarray(variable.numpy()))
    return digest.hexdigest()


def _variables(model: keras.Model) -> dict[str, Any]:
    groups = {
        "model": model.variables,
        "optimizer": model.optimizer.variables,
        "metrics": model.metrics_variables,
    }
    # By number: Keras's names depend on what the process made before.
    return {f"{kind}/{i:05d}": v for kind, vs in groups.items() for i, v in enumerate(vs)}
