"""Freezing: what trains, what stays bit for bit, what thaws when, in memory and in files."""

import keras
import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf.training.freezing import GradualUnfreezing, freeze, new_variables, unfreeze
from tests.helpers import make_deep_model, make_small_model

SOURCES = ["the man saw a bird", "old house", "and the woman left", "the bird sang", "who", "a"]
TARGETS = ["a bird saw", "house old.", "left, the woman", "old", "the man", "house"]


def trained(model):
    """The paths of layers that train."""
    return {variable.path.rsplit("/", 1)[0] for variable in model.trainable_variables}


def blocks(paths):
    """Without what lies below self-attention, cross-attention and feed-forward."""
    return {"/".join(path.split("/")[:3]) for path in paths}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({}, {"decoder/layer_0/cross_attention", "decoder"}),
        ({"encoder": "a", "decoder": "b"}, {"decoder/layer_0/cross_attention", "decoder"}),
        ({"model": "c"}, set()),
        (  # the word embeddings are the encoder's, too
            {"encoder": "a"},
            {
                "decoder/embeddings/position_embeddings",
                "decoder/embeddings/layer_norm",
                "decoder/layer_0/self_attention",
                "decoder/layer_0/cross_attention",
                "decoder/layer_0/feed_forward",
                "decoder",
            },
        ),
    ],
)
def test_new_variables(source, expected):
    model = make_deep_model("word_embeddings", source_checkpoint=source)
    paths = {v.path.rsplit("/", 1)[0] for v in new_variables(model)}
    assert {p for p in blocks(paths) if "layer_1" not in p and "layer_2" not in p} == expected
    assert len(blocks(paths)) == len(expected) + 2 * sum("/layer_0/" in p for p in expected)


def test_new_variables_of_a_random_encoder():
    model = make_deep_model("all", source_checkpoint={"decoder": "a"})
    paths = blocks(v.path.rsplit("/", 1)[0] for v in new_variables(model))
    # Everything else is the decoder's.
    assert paths == {f"decoder/layer_{i}/cross_attention" for i in (0, 1)} | {"decoder"}


def test_freeze_layers_and_files_that_keep_it(tmp_path):
    model = make_deep_model("word_embeddings")
    everything = blocks(trained(model))
    freeze(model, encoder_layers="all", decoder_layers=[0, 2], embeddings=True)
    expected = {f"decoder/layer_{i}/cross_attention" for i in range(3)} | {"decoder"}
    expected |= {"decoder/layer_1/self_attention", "decoder/layer_1/feed_forward"}
    assert blocks(trained(model)) == expected
    copy = bg.EncoderDecoderModel.from_config(model.get_config())
    assert trained(copy) == trained(model)
    model.save_to_preset(tmp_path / "preset")
    assert trained(bg.EncoderDecoderModel.from_preset(tmp_path / "preset")) == trained(model)
    unfreeze(model)
    assert blocks(trained(model)) == everything
    freeze(model, encoder_layers=1)
    assert everything - blocks(trained(model)) == {
        "encoder/layer_0/self_attention",
        "encoder/layer_0/feed_forward",
    }


@pytest.mark.parametrize("value", [4, -1, [3], [0.0], "some", True])
def test_freeze_refuses_layers_that_are_not_there(model, value):
    with pytest.raises(ValueError, match="decoder_layers must be a number from 0 to 3"):
        freeze(model, encoder_layers=1, decoder_layers=value)
    assert len(model.trainable_variables) == len(model.weights)


def test_the_order_of_the_thaw():
    model = make_deep_model("none", source_checkpoint={"encoder": "a", "decoder": "b"})
    freeze(model, encoder_layers=1)
    model.compile()
    callback = GradualUnfreezing(steps_per_layer=2)
    callback.set_model(model)
    callback.on_train_begin()
    always = {f"decoder/layer_{i}/cross_attention" for i in range(3)} | {"decoder"}
    assert blocks(trained(model)) == always

    def parts(*layers):
        return {
            f"{layer}/{part}" for layer in layers for part in ("self_attention", "feed_forward")
        }

    stages = [
        parts("encoder/layer_1", "decoder/layer_2"),
        parts("decoder/layer_1"),  # the encoder's stays frozen
        parts("decoder/layer_0"),
        {
            f"{stack}/embeddings/{part}"
            for stack in ("encoder", "decoder")
            for part in ("word_embeddings", "position_embeddings", "layer_norm")
        },
    ]
    for step in range(11):
        model.optimizer._iterations.assign(step)
        callback.on_train_batch_begin(step)
        expected = always.union(*stages[: step // 2])
        assert blocks(trained(model)) == expected, step
    assert callback.get_state()["thawed"] == 4
    names = {v.path for v in model.optimizer._trainable_variables}
    assert not any(name.startswith("encoder/layer_0") for name in names)


def test_random_stacks_and_left_out_embeddings_do_not_take_part():
    model = make_deep_model("word_embeddings", source_checkpoint={"encoder": "a"})
    model.compile()
    callback = GradualUnfreezing(epochs_per_layer=1, embeddings=False)
    callback.set_model(model)
    callback.on_train_begin()
    assert not [path for path in blocks(trained(model)) if path.startswith("encoder/layer_")]
    assert {"decoder/layer_0/self_attention"} <= blocks(trained(model))
    assert "encoder/embeddings/word_embeddings" not in trained(model)
    for epoch, count in enumerate((0, 1, 2, 2)):
        callback.on_epoch_begin(epoch)
        model.optimizer._iterations.assign(99)
        callback.on_train_batch_begin(0)  # steps do not count
        layers = {path.split("/")[1] for path in trained(model) if path.startswith("encoder/")}
        assert layers == {"layer_1", "layer_0"} if count == 2 else len(layers) == count
    assert "encoder/embeddings/word_embeddings" not in trained(model)


def without_dropout(model):
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0
    return model


@pytest.mark.slow
def test_layers_thaw_during_fit_and_a_resumed_fit_goes_on(tmp_path):
    """Frozen weights stay bit for bit; afterwards they train as the optimizer always knew them."""
    # In one layer: the test above has more of them.
    model = without_dropout(make_small_model("all", max_source_length=9, max_target_length=7))
    model.compile(optimizer=bg.default_optimizer(1e-2, total_steps=8, ema_momentum=0.5))
    x, y, weight = model.preprocessor(SOURCES, TARGETS)
    snapshots = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            snapshots.append({v.path: np.array(v.numpy()) for v in self.model.weights})
            if len(snapshots) == 2:
                self.model.save(tmp_path / "model.keras")

    def fit(model, first):
        options = {"batch_size": 2, "shuffle": False, "verbose": 0}
        inputs = {name: value[first:] for name, value in x.items()}
        callbacks = [GradualUnfreezing(steps_per_layer=1), Watch()]
        model.fit(inputs, y[first:], sample_weight=weight[first:], callbacks=callbacks, **options)

    start = {v.path: np.array(v.numpy()) for v in model.weights}
    fit(model, 0)
    assert len(snapshots) == 3

    def changed(old, new):
        return blocks(p.rsplit("/", 1)[0] for p in new if (old[p] != new[p]).any())

    parts = [
        {"decoder/layer_0/cross_attention", "decoder"},
        {"encoder/layer_0/self_attention", "encoder/layer_0/feed_forward"},
        {
            f"encoder/embeddings/{n}"
            for n in ("word_embeddings", "position_embeddings", "layer_norm")
        },
    ]
    for step, (old, new) in enumerate(zip([start, *snapshots], snapshots, strict=False)):
        assert changed(old, new) == set().union(*parts[: step + 1])
    assert not blocks(trained(make_small_model("all"))) - blocks(trained(model))

    loaded = without_dropout(keras.saving.load_model(tmp_path / "model.keras"))
    assert "encoder/embeddings/layer_norm" not in trained(loaded)
    fit(loaded, 4)
    for ours, theirs in (
        (model.weights, loaded.weights),
        (model.optimizer.variables, loaded.optimizer.variables),
    ):
        for variable, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(variable.numpy(), other.numpy(), variable.path)


def test_errors():
    for arguments in ({}, {"steps_per_layer": 1, "epochs_per_layer": 1}):
        with pytest.raises(ValueError, match="needs one of steps_per_layer and epochs_per_layer"):
            GradualUnfreezing(**arguments)
    with pytest.raises(
        ValueError, match="epochs_per_layer must be an integer of at least 1, received 0"
    ):
        GradualUnfreezing(epochs_per_layer=0)
    model = make_deep_model("all")
    freeze(model, encoder_layers="all")
    model.compile()
    model.optimizer.build(model.trainable_variables)
    unfreeze(model)
    callback = GradualUnfreezing(steps_per_layer=1)
    callback.set_model(model)
    with pytest.raises(ValueError, match="Compile the model again"):
        callback.on_train_begin()
