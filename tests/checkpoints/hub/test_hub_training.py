"""Originals as starting points: they train as a whole, and what was learned is said and served."""

import keras
import make_tf1_module as maker
import numpy as np
import pytest
import tensorflow as tf

import bertgen_tf as bg
from tests.helpers import CORPUS, PIECES

SOURCES = [*CORPUS, "the owl sang.", "a man left the house", "who saw birds?"]
TARGETS = ["the bird sang", "a woman left", "who?", "the man", "an old house", "birds and men"]
SETTINGS = {"num_layers": 1, "decode_length": 8, "max_source_length": 14, "beam_size": 2}


@pytest.fixture(scope="module", params=["shared", "unshared"])
def trained(request, tmp_path_factory, spiece):
    """A model, its weights before it was trained, and the losses of all epochs."""
    folder = tmp_path_factory.mktemp(request.param) / "module"
    if request.param == "shared":
        maker.make_shared_original(folder, spiece, **SETTINGS)
    else:
        maker.make_unshared_original(folder, PIECES, **SETTINGS)
    model = bg.EncoderDecoderModel.from_hub(str(folder), verify=False)
    assert model.decoder.sharing == ("all" if request.param == "shared" else "word_embeddings")
    before = [variable.numpy() for variable in model.weights]
    keras.utils.set_random_seed(7)
    model.compile(optimizer=keras.optimizers.Adam(0.02), jit_compile=False)
    model.optimizer.build(model.trainable_variables)  # or the step is traced twice
    # Prepared once, and not in every epoch.
    data = tf.data.Dataset.from_tensors(model.preprocessor(SOURCES, TARGETS))
    history = model.fit(data, epochs=15, verbose=0)
    return model, before, history.history["loss"]


def test_the_loss_falls(trained):
    _, _, losses = trained
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.6 * losses[0]


def test_every_variable_of_both_stacks_learns(trained):
    model, before, _ = trained
    changes = {
        variable.path: np.abs(variable.numpy() - value).max()
        for variable, value in zip(model.weights, before, strict=True)
    }
    assert len(changes) == len(before) == len(model.trainable_weights)
    # A bias of the keys adds the same to all scores of a query, which softmax takes out again.
    learning = {path for path in changes if not path.endswith("key/bias")}
    assert {path for path in learning if changes[path] < 1e-3} == set()
    stacks = ["cross_attention"] + ["self_attention"] * 2
    for stack, part in zip((model.decoder, model.encoder, model.decoder), stacks, strict=True):
        assert {v.path for v in stack.weights if part in v.path} & learning


def test_sharing_outlives_training(trained):
    model, _, _ = trained
    encoder, decoder = model.encoder, model.decoder
    assert decoder.embeddings.word_embeddings is encoder.embeddings.word_embeddings
    assert (decoder.blocks[0].feed_forward is encoder.blocks[0].feed_forward) == (
        decoder.sharing == "all"
    )


@pytest.mark.slow
def test_generate_and_export_say_what_was_learned(trained, tmp_path):
    model, before, _ = trained
    said = model.generate(SOURCES, jit_compile=False)
    path = bg.export_saved_model(model, tmp_path / "1", check=False)  # what follows is one
    signature = tf.saved_model.load(path).signatures["serving_default"]
    answer = signature(text=tf.constant(SOURCES))
    assert [text.decode() for text in answer["text"].numpy()] == said
    # The module's own weights say something else.
    untrained = bg.EncoderDecoderModel.from_config(model.get_config())
    untrained.set_weights(before)
    assert untrained.generate(SOURCES, jit_compile=False) != said
