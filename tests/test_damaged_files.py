"""Random damage to every kind of file: told in a sentence, or what is read is what was written."""

import os
import random
import shutil

import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf.checkpoints import exports
from bertgen_tf.finetuning.callbacks import KeepBest
from bertgen_tf.finetuning.state import RunFolder, State
from tests.helpers import make_small_model, write_bare_export

ROUNDS = 200


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def replace(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start : start + 40] = rng.randbytes(40)


def move(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[:] = data[start:] + data[:start]


def same(found, expected) -> None:
    for array, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, other)


@pytest.fixture(scope="module")
def model():
    return make_small_model()


@pytest.fixture(scope="module")
def pieces(spiece):
    tokenizer = bg.BertGenerationTokenizer(spiece)
    return make_small_model(make_tokenizer=lambda: tokenizer)


@pytest.fixture(scope="module")
def adapted():
    model = make_small_model()
    model.enable_lora(2)
    return model


@pytest.fixture(scope="module")
def whole(model, pieces, adapted, tmp_path_factory):
    """A folder with one of each."""
    folder = tmp_path_factory.mktemp("whole")
    model.save_to_preset(folder / "preset")
    pieces.save_to_preset(folder / "pieces")
    adapted.save_adapter(folder / "adapter.safetensors")
    write_bare_export(model, folder / "export/1")
    run = RunFolder(folder / "model")
    run.begin({"seed": 3})
    for step in (4, 8):
        state = {"model/00000": np.arange(6, dtype=np.float32) + step}
        run.save(State(step, 1, state, {"history": {"loss": [step / 7]}}))
    keep(run, model).on_epoch_end(0, {"val_loss": 2.5})
    return folder


def keep(run, model):
    best = KeepBest(run / "best.safetensors", "val_loss")
    best.set_model(model)
    return best


def read(name, folder, model, pieces, adapted) -> None:
    """Reads what `name` is a part of, and compares."""
    if name.startswith(("preset", "pieces")):
        kind = name.split("/")[0]
        expected = {"preset": model, "pieces": pieces}[kind]
        read = bg.EncoderDecoderModel.from_preset(folder / kind)
        assert read.get_config() == expected.get_config()
        same(read.get_weights(), expected.get_weights())
    elif name.startswith("adapter"):
        before = adapted.get_weights()
        adapted.load_adapter(folder / name)
        same(adapted.get_weights(), before)
    elif name.startswith("export"):
        exports.verify(folder / "export/1", ["*"])
        read = bg.EncoderDecoderModel.from_export(folder / "export/1")
        same(read.get_weights(), model.get_weights())
    elif name.endswith("best.safetensors"):
        best = keep(RunFolder(folder / "model"), model)
        best.set_state({"best": 2.5, "best_epoch": 1, "waited": 0})
        before = model.get_weights()
        best.load(model)
        same(model.get_weights(), before)
    else:
        run = RunFolder(folder / "model")
        run.check(resume=True, overwrite=False)
        run.check_same({"seed": 3})
        said = []
        state = run.load(said.append)
        assert (state.step == 8) == (not said)
        assert state.callbacks == {"history": {"loss": [state.step / 7]}}
        np.testing.assert_array_equal(state.tensors["model/00000"], np.arange(6) + state.step)
        run.cut_log(state.step, state.epoch, said.append)


@pytest.mark.slow
def test_random_damage(whole, model, pieces, adapted, tmp_path):
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    assert len(names) > 12
    rng = random.Random(4)
    told = 0
    for number in range(ROUNDS):
        name, damage = names[number % len(names)], rng.choice((flip, flip, cut, replace, move))
        folder = tmp_path / str(number)
        top = name.split("/")[0]
        copy = shutil.copytree if (whole / top).is_dir() else shutil.copy
        folder.mkdir()
        copy(whole / top, folder / top)
        data = bytearray((folder / name).read_bytes())
        damage(data, rng)
        (folder / name).write_bytes(data)
        try:
            read(name, folder, model, pieces, adapted)
        except (OSError, ValueError) as error:
            message = str(error).replace(str(folder), "")
            assert "\n" not in message and len(message) < 400, (name, damage, message)
            told += 1
        except Exception as error:
            raise AssertionError(f"{name}: {damage.__name__}: {error!r}") from error
        shutil.rmtree(folder)
    assert told > ROUNDS // 2
    assert not os.listdir(tmp_path)
