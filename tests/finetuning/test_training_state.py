"""The folder of a training: states that are whole or not taken, and whose run it is."""

import keras
import numpy as np
import pytest

from bertgen_tf.finetuning.state import (
    OtherModel,
    RunFolder,
    State,
    assign_variables,
    read_variables,
)

SETTINGS = {"--seed": 3, "--train": "digest"}


def state(step):
    tensors = {"model/00000": np.arange(6, dtype=np.float32).reshape(2, 3) + step}
    return State(step, step // 4, tensors, {"history": {"epoch": [], "history": {}}})


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "model")
    folder.begin(SETTINGS)
    return folder


def states(folder):
    return sorted(path.name for path in folder.path.glob("state-*"))


def test_the_last_state_comes_back_and_two_are_kept(folder):
    for step in (4, 8, 9):
        folder.save(state(step))
    assert states(folder) == ["state-00000008.safetensors", "state-00000009.safetensors"]
    read = folder.load(pytest.fail)
    assert (read.step, read.epoch, read.callbacks) == (9, 2, state(9).callbacks)
    np.testing.assert_array_equal(read.tensors["model/00000"], state(9).tensors["model/00000"])
    folder.save(state(5))  # of a run that went on from an earlier one
    assert folder.load(pytest.fail).step == 5


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data[:-1] + b"\x7f"])
def test_a_damaged_state_is_told_and_passed_over(folder, damage):
    for step in (4, 8):
        folder.save(state(step))
    newest = folder / "state-00000008.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    said = []
    assert folder.load(said.append).step == 4
    assert len(said) == 1 and str(newest) in said[0] and "damaged" in said[0]


def test_no_state_is_none_but_only_damaged_ones_are_an_error(folder):
    assert folder.load(pytest.fail) is None
    folder.save(state(4))
    (folder / "state-00000004.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="holds no undamaged state: overwrite=True starts anew"):
        folder.load(lambda message: None)
    # And nothing was removed.
    assert states(folder) == ["state-00000004.safetensors"]


def test_what_cannot_be_written_leaves_the_earlier_state(folder, monkeypatch):
    folder.save(state(4))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bertgen_tf.finetuning.state.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(state(8))
    assert states(folder) == ["state-00000004.safetensors"]
    assert folder.load(pytest.fail).step == 4


def test_only_the_same_run_goes_on(folder):
    folder.check_same(dict(SETTINGS))
    with pytest.raises(ValueError, match="another --seed; overwrite=True starts anew"):
        folder.check_same({**SETTINGS, "--seed": 4})
    with pytest.raises(ValueError, match="resume=True continues it"):
        folder.check(resume=False, overwrite=False)
    folder.check(resume=True, overwrite=False)
    folder.end()
    folder.check(resume=False, overwrite=False)
    assert folder.is_complete()


def test_one_training_at_a_time(folder):
    with folder.lock(), pytest.raises(OSError, match="another training"), folder.lock():
        pass
    with folder.lock():
        pass


def test_what_a_killed_training_was_writing_is_removed_by_the_next(folder):
    folder.save(state(4))
    kept = sorted(path.name for path in folder.path.iterdir())
    for name in ("state-00000007.safetensors.new", ".tmpaB3dEf", "run.json.new", "notes.new"):
        (folder / name).touch()
    with folder.lock():
        assert sorted(path.name for path in folder.path.iterdir()) == sorted(
            [*kept, "lock", "notes.new"]
        )
    assert folder.load(pytest.fail).step == 4


def test_other_variables_are_refused_as_a_whole():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    tensors = read_variables(model)
    before = [weight.numpy() for weight in model.weights]
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    name = next(name for name, tensor in tensors.items() if tensor.shape == (3,))
    with pytest.raises(OtherModel, match=f"1 variables differ, such as {name}"):
        assign_variables(model, {**changed, name: np.zeros(4, np.float32)})
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)
    assign_variables(model, changed)
    np.testing.assert_array_equal(model.weights[0].numpy(), before[0] + 1)
