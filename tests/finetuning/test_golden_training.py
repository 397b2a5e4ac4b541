"""Files of trainings that earlier versions saved: read, with equal outputs and equal next steps.

They fail if a registered name, an attribute, the order of variables, or what a training records was
changed; see tools/fixtures/make_golden_training.py.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from make_golden_training import (
    COMMAND,
    INPUTS,
    STEPS,
    STOPPED,
    encode,
    outputs,
    train_step,
    trained,
)

import bertgen_tf as bg
from bertgen_tf.cli import main as cli
from bertgen_tf.finetuning.callbacks import KeepBest, Log
from bertgen_tf.finetuning.data import TrainingData
from tests.helpers import GOLDEN

ARCHIVE = GOLDEN / "golden_training.zip"
# Of weights after steps of about 0.01. CPUs differ by about 1e-6.
ATOL = 2e-5
KERAS_FILES = ("linear", "paper", "encoder", "decoder")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Read-only."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.unpack_archive(ARCHIVE, folder)
    return folder


@pytest.fixture(scope="module")
def golden(archive) -> dict[str, np.ndarray]:
    return dict(np.load(archive / "golden.npz"))


def check(found: dict[str, np.ndarray], golden: dict[str, np.ndarray], prefix: str) -> None:
    """Of each variable the same name and values."""
    names = {name.removeprefix(prefix) for name in golden if name.startswith(prefix)}
    assert names == {*found} and names
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[prefix + name], rtol=0, atol=ATOL, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "paper"])
def test_a_compiled_model_goes_on_as_it_would_have(name, archive, golden, tmp_path, monkeypatch):
    monkeypatch.chdir(archive)
    model = keras.saving.load_model(f"{name}.keras")
    for key, value in outputs(model).items():
        np.testing.assert_allclose(value, golden[f"{name}/{key}"], rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "again.keras")
    train_step(model)
    check(trained(model), golden, f"{name}/next/")
    if model.optimizer.use_ema:
        with bg.averaged_weights(model):
            check(trained(model), golden, f"{name}/average/")
    # And written under the same names, so that an older version can read what is new.
    assert saved_names(tmp_path / "again.keras") == saved_names(archive / f"{name}.keras")


def test_stacks_alone_are_read(archive, golden):
    loaded = {name: keras.saving.load_model(archive / f"{name}.keras") for name in KERAS_FILES[2:]}
    states = encode(loaded["encoder"])
    np.testing.assert_allclose(states, golden["encoder/states"], atol=1e-5)
    ids, mask = (np.array(INPUTS[f"decoder_{n}"]) for n in ("input_ids", "attention_mask"))
    mask_of_source = np.array(INPUTS["attention_mask"])
    logits = loaded["decoder"](
        ids, mask, encoder_hidden_states=states, encoder_attention_mask=mask_of_source
    )
    np.testing.assert_allclose(logits, golden["linear/logits"], atol=1e-5)


def test_every_registered_name_is_in_these_files(archive):
    configs = [
        zipfile.ZipFile(archive / f"{name}.keras").read("config.json") for name in KERAS_FILES
    ]
    names = set(re.findall(r'"registered_name": "(bertgen_tf>\w+)"', str(configs)))
    registered = {name for name in keras.saving.get_custom_objects() if "bertgen_tf>" in name}
    # Which presets have, too, and no class of which is ever looked up by that name.
    registered -= {"bertgen_tf>BertTokenizer", "bertgen_tf>BertGenerationTokenizer"}
    assert names == registered and len(names) == 8


@pytest.mark.slow
def test_a_stopped_finetune_is_resumed(archive, golden, tmp_path, monkeypatch):
    for name in ("start", "model.training"):
        shutil.copytree(archive / name, tmp_path / name)
    for name in ("train.tsv", "validation.tsv"):
        shutil.copy(archive / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    steps = []
    tokens = TrainingData.tokens
    monkeypatch.setattr(TrainingData, "tokens", lambda self, n: steps.append(n) or tokens(self, n))
    callbacks = (bg.GradualUnfreezing, KeepBest, Log)
    states = []
    for callback in callbacks:
        monkeypatch.setattr(callback, "set_state", taken(callback.set_state, states))
    assert cli.main([*COMMAND, "--resume"]) == 0
    assert steps == [*range(STOPPED, STEPS)]
    # Each by its class's name: what had another name would be left out without a word.
    assert [callback for callback, _ in states] == [*callbacks]
    assert states[0][1]["thawed"] == 1 and states[1][1]["best_epoch"] == 1
    check(trained(bg.EncoderDecoderModel.from_preset("model")), golden, "finetune/")
    log = Path("model.training/log.jsonl").read_text()
    assert log.startswith((archive / "model.training/log.jsonl").read_text())
    found, expected = epochs(log), epochs((archive / "log.jsonl").read_text())
    assert [line["step"] for line in found] == [3, 6, 8]
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)


def taken(set_state: Callable, states: list) -> Callable:
    """`set_state` that also notes what each callback is given."""

    def set_and_note(self: keras.callbacks.Callback, state: dict) -> None:
        states.append((type(self), state))
        set_state(self, state)

    return set_and_note


def epochs(log: str) -> list[dict[str, float]]:
    """What a log has of each epoch, without speeds."""
    lines = [json.loads(line) for line in log.splitlines()]
    speed = ("tokens_per_second", "waited_for_data")
    return [{k: v for k, v in line.items() if k not in speed} for line in lines if "epoch" in line]


def saved_names(path: Path) -> list[str]:
    """Of all arrays in a `.keras` file."""
    names: list[str] = []
    with zipfile.ZipFile(path).open("model.weights.h5") as file, h5py.File(file) as weights:
        weights.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
    return names
