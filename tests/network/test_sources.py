"""What reads model files gives the class that it was called on."""

import keras
import make_tf1_module
import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf.network import sources
from tests.helpers import make_small_model, write_checkpoint


class Model(bg.EncoderDecoderModel):
    pass


class Encoder(bg.BertGenerationEncoder):
    pass


class Decoder(bg.BertGenerationDecoder):
    pass


def check(model, model_class, expected) -> None:
    """`model` is of `model_class`, with the weights of `expected`."""
    assert type(model) is model_class
    pairs = list(zip(model.weights, expected.weights, strict=True))
    assert pairs and all(np.array_equal(one, other) for one, other in pairs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("sources") / "bert", num_hidden_layers=2))


def test_the_readers_are_connected():
    assert sources.hub is bg.hub
    assert sources.huggingface.__name__ == "bertgen_tf.checkpoints.huggingface"
    assert sources.presets.__name__ == "bertgen_tf.checkpoints.presets"


@pytest.mark.parametrize("num_layers", [None, 1])
def test_stacks(hub_module, checkpoint, num_layers):
    for source in ("hub", "huggingface"):
        handle = hub_module if source == "hub" else checkpoint
        options = {"num_layers": num_layers} | ({"verify": False} if source == "hub" else {})
        for own, base in ((Encoder, bg.BertGenerationEncoder), (Decoder, bg.BertGenerationDecoder)):
            keras.utils.set_random_seed(3)
            expected = getattr(base, f"from_{source}")(handle, **options)
            keras.utils.set_random_seed(3)
            check(getattr(own, f"from_{source}")(handle, **options), own, expected)


@pytest.mark.parametrize("source", ["hub", "huggingface"])
def test_warm_starts(hub_module, checkpoint, source):
    options = {"encoder": hub_module if source == "hub" else checkpoint, "num_layers": 1}
    options |= {"verify": False} if source == "hub" else {}
    keras.utils.set_random_seed(4)
    expected = getattr(bg.EncoderDecoderModel, f"from_{source}")(**options)
    keras.utils.set_random_seed(4)
    check(getattr(Model, f"from_{source}")(**options), Model, expected)


def test_originals(tmp_path, spiece):
    path = tmp_path / "original"
    make_tf1_module.make_shared_original(path, spiece, num_layers=1, decode_length=6)
    expected = bg.EncoderDecoderModel.from_hub(str(path), verify=False)
    check(Model.from_hub(str(path), verify=False), Model, expected)


def test_files_of_a_model(tmp_path):
    model = make_small_model()
    model.save_to_preset(tmp_path / "preset")
    model.save_to_huggingface(tmp_path / "huggingface")
    check(Model.from_preset(tmp_path / "preset"), Model, model)
    read = Model.from_huggingface(tmp_path / "huggingface")
    check(read, Model, model)
    read.save_to_preset(tmp_path / "again")
    check(Model.from_preset(tmp_path / "again"), Model, model)


def test_a_trimmed_model_is_of_the_class_of_the_whole(tmp_path):
    model = make_small_model()
    own = Model.from_config(model.get_config())
    assert type(bg.trim_vocabulary(own, ["the old man"])) is Model
