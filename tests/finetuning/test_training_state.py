"""The folder of a training: states that are whole or not taken, and whose run it is."""

import os

import keras
import numpy as np
import pytest

from bertgen_tf.checks import Damaged
from bertgen_tf.finetuning.callbacks import GenerateCallback, KeepBest
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


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-3],
        lambda data: data[:-1] + b"\x7f",
        lambda data: data.replace(b"[2,3]", b"[3,2]"),
        lambda data: data.replace(b"history", b"histori"),
    ],
)
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
    with pytest.raises(Damaged, match="holds no undamaged state: overwrite=True starts anew"):
        folder.load(lambda message: None)
    # And nothing was removed.
    assert states(folder) == ["state-00000004.safetensors"]


def test_a_folder_or_a_pipe_in_place_of_a_state(folder):
    folder.save(state(4))
    newest = folder / "state-00000008.safetensors"
    for make in (lambda: (newest / "more").mkdir(parents=True), lambda: os.mkfifo(newest)):
        make()
        said = []
        assert folder.load(said.append).step == 4
        assert len(said) == 1 and f"{newest} must be a file, but is a" in said[0]
        folder.save(state(8))
        assert folder.load(pytest.fail).step == 8
        newest.unlink()
    (folder / "state-00000005.safetensors").mkdir()
    (folder / "best.safetensors").mkdir()
    folder.save(state(8))
    folder.save(state(9))
    assert states(folder) == ["state-00000008.safetensors", "state-00000009.safetensors"]
    folder.end()
    assert not states(folder)


def test_weights_that_are_not_finite(folder):
    folder.save(state(4))
    bad = state(8)
    bad.tensors["model/00000"][1, 1] = np.inf
    bad.tensors["optimizer/00000"] = np.array([np.inf], np.float32)
    folder.save(bad)
    said = []
    assert folder.load(said.append).step == 4
    assert "should have finite weights, but model/00000 has NaN or infinity" in said[0]
    good = state(8)
    good.tensors["optimizer/00000"] = np.array([np.inf], np.float32)  # a gradient can be
    folder.save(good)
    assert folder.load(pytest.fail).step == 8


@pytest.mark.parametrize("rubbish", [b"\xff\xfe\x00", b"3", b"[1]", b'{"step": "x"}', b"[" * 10**5])
def test_a_log_with_rubbish_is_kept_beside_a_new_one(folder, rubbish):
    lines = [b'{"step": 3}', rubbish, b'{"step": 4, "epoch": 1}', b'{"step": 5}']
    before = b"\n".join(lines) + b'\n{"step": '  # killed
    (folder / "log.jsonl").write_bytes(before)
    said = []
    folder.cut_log(4, 1, said.append)
    assert (folder / "log.jsonl").read_bytes() == lines[0] + b"\n" + lines[2] + b"\n"
    assert (folder / "log.damaged.jsonl").read_bytes() == before
    assert len(said) == 1 and "log.jsonl has damaged lines: it is now log.damaged.jsonl" in said[0]
    folder.cut_log(4, 1, pytest.fail)


def test_a_folder_in_place_of_the_log(folder):
    (folder / "log.jsonl").mkdir()
    said = []
    folder.cut_log(4, 1, said.append)
    folder.log(step=5)
    assert (folder / "log.jsonl").is_file() and len(said) == 1


@pytest.mark.parametrize("damage", ["missing", "damaged", "folder"])
def test_a_folder_of_ours_without_its_run(folder, damage):
    folder.save(state(4))
    folder.log(step=4)
    for name in ("samples", "tensorboard"):
        (folder / name).mkdir()
    run = folder / "run.json"
    if damage == "damaged":
        run.write_bytes(run.read_bytes()[:-9])
    else:
        run.unlink()
    if damage == "folder":
        run.mkdir()
    for resume in (False, True):
        with pytest.raises(ValueError, match="is missing or damaged: overwrite=True starts anew$"):
            folder.check(resume=resume, overwrite=False)
    folder.check(resume=False, overwrite=True)
    (folder / "thesis.txt").touch()
    with pytest.raises(ValueError, match="such as thesis.txt: choose another folder"):
        folder.check(resume=False, overwrite=True)
    (folder / "thesis.txt").unlink()
    folder.begin(SETTINGS)
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]
    folder.check(resume=True, overwrite=False)


def linear():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])


@pytest.fixture
def best(folder):
    """Best weights of epoch 1, and what their callback saved."""
    callback = KeepBest(folder / "best.safetensors", "val_loss")
    callback.set_model(linear())
    callback.on_epoch_end(0, {"val_loss": 2.0})
    return callback


def test_damaged_best_weights_are_told_when_the_training_resumes(folder, best):
    path = folder / "best.safetensors"
    whole = path.read_bytes()
    again = KeepBest(path, "val_loss", complain=pytest.fail)
    again.set_model(linear())
    again.set_state(best.get_state())
    again.load(again.model)
    np.testing.assert_array_equal(again.model.get_weights()[0], best.model.get_weights()[0])
    for damaged in (whole[:-1], whole[:-1] + b"\x7f", b"", whole.replace(b"[2,3]", b"[3,2]")):
        path.write_bytes(damaged)
        for call in (lambda: again.set_state(best.get_state()), lambda: again.load(again.model)):
            with pytest.raises(Damaged, match="delete it to resume without the best weights so f"):
                call()
    path.unlink()
    said = []
    again.complain = said.append
    again.set_state(best.get_state())
    assert again.best is None and len(said) == 1
    assert "is missing: the best weights are looked for from here on" in said[0]
    again.on_epoch_end(1, {"val_loss": 5.0})
    assert (again.best, again.best_epoch) == (5.0, 2)


def test_best_weights_of_another_model_or_not_finite(folder, best):
    other = KeepBest(best.path, "val_loss")
    other.set_model(keras.Sequential([keras.Input((2,)), keras.layers.Dense(4)]))
    with pytest.raises(Damaged, match="has the weights of another model; delete it to resume"):
        other.set_state(best.get_state())
    best.model.set_weights([np.full((2, 3), np.nan), np.zeros(3)])
    best.on_epoch_end(1, {"val_loss": 1.0})
    with pytest.raises(Damaged, match="should have finite weights, but 00000 has NaN"):
        best.load(linear())


def test_samples_that_are_damaged(tmp_path):
    samples = GenerateCallback(["a"], ["b"], folder=tmp_path)
    path = tmp_path / "epoch-0001.jsonl"
    for content in (b"\xff", b"{", b"3\n", b'{"source": "a"}\n', b"[" * 10**5):
        path.write_bytes(content)
        with pytest.raises(Damaged, match="epoch-0001.jsonl is damaged"):
            samples.read(1)


def test_what_cannot_be_written_leaves_the_earlier_state(folder, monkeypatch):
    folder.save(state(4))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bertgen_tf.training.tensor_files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(state(8))
    assert states(folder) == ["state-00000004.safetensors"]
    assert folder.load(pytest.fail).step == 4


def test_a_new_run_removes_only_what_a_training_wrote(folder):
    folder.save(state(8))
    folder.end()
    (folder / "notes.txt").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "log.jsonl").write_text("{}\n")
    folder.begin(SETTINGS)
    assert sorted(os.listdir(folder.path)) == ["notes.txt", "plots", "run.json"]


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
