"""LoRA: products against numpy and peft, what trains, files, merging, refusals."""

import json

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bertgen_tf as bg
from bertgen_tf.network.weights import named_variables
from bertgen_tf.training import freezing
from tests.helpers import make_deep_model, make_small_model

SOURCES = ["the man saw a bird", "old house", "and the woman left"]
TARGETS = ["a bird saw", "house old.", "left, the woman"]
TARGETS_OF_LORA = ("query", "value", "feed_forward/output_dense")


def adapted(sharing="word_embeddings", seed=1, make=make_deep_model, **options):
    """A model with adapters that do something."""
    model = make(sharing, seed, max_source_length=9, max_target_length=7)
    model.enable_lora(3, alpha=5, targets=TARGETS_OF_LORA, **options)
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.name == "lora_b":
            variable.assign(rng.normal(0, 0.3, variable.shape))
    return model


def inputs(model):
    return model.preprocessor(SOURCES, TARGETS)


def merged_by_hand(model):
    """A model without adapters: W + alpha / r B A, in float64."""
    named = {name: variable.numpy() for name, variable in named_variables(model).items()}
    other = make_deep_model(model.decoder.sharing, 7, max_source_length=9, max_target_length=7)
    for name, variable in named_variables(other).items():
        value = named[name].astype(np.float64)
        base = name.rsplit("/", 1)[0]
        if name.endswith("/kernel") and f"{base}/lora_a" in named:
            product = named[f"{base}/lora_b"].astype(np.float64) @ named[f"{base}/lora_a"]
            value = value + 5 / 3 * product
        variable.assign(value)
    return other


@pytest.mark.parametrize("sharing", ["word_embeddings", "all"])
def test_adapters_are_a_low_rank_product(sharing):
    model = adapted(sharing, train_new_weights=False)
    x, _, _ = inputs(model)
    logits = model(x).numpy()
    expected = merged_by_hand(model)(x).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    names = {name for name in named_variables(model) if name.endswith("lora_a")}
    # In all self- and cross-attentions, and in feed-forward layers: all under all of their names.
    assert len(names) == 2 * 3 + (2 if sharing == "all" else 3) * (2 + 2 + 1)
    plain = make_deep_model(sharing, 1, max_source_length=9, max_target_length=7)
    assert np.abs(plain(x).numpy() - logits).max() > 0.1
    fresh = make_deep_model(sharing, 1, max_source_length=9, max_target_length=7)
    fresh.enable_lora(2)
    np.testing.assert_array_equal(fresh(x).numpy(), plain(x).numpy())  # B is 0 at first


@pytest.mark.slow
def test_merged_and_unmerged_models_agree_and_the_merged_one_is_plain(tmp_path):
    model = adapted("all")
    x, _, _ = inputs(model)
    logits, everything = model(x).numpy(), len(make_deep_model("all").trainable_variables)
    options = {"max_new_tokens": 5, "num_beams": 2, "jit_compile": False}
    generated = model.generate({"input_ids": x["input_ids"]}, **options)
    model.merge_lora()
    np.testing.assert_allclose(model(x).numpy(), logits, rtol=1e-4, atol=1e-4)
    again = model.generate({"input_ids": x["input_ids"]}, **options)
    np.testing.assert_array_equal(again.sequences, generated.sequences)
    np.testing.assert_allclose(again.scores, generated.scores, rtol=1e-4)
    assert len(model.weights) == len(model.trainable_variables) == everything
    model.save_to_huggingface(tmp_path / "checkpoint")
    assert "lora" not in model.get_config()
    model.enable_lora(1)  # and so on


def test_peft_gives_the_same():
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = adapted()
    layer = model.encoder.blocks[0].self_attention.query_key_value
    rows = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    ours = np.split(layer(rows).numpy(), 3, axis=-1)
    for part in (0, 2):
        linear = torch.nn.Linear(12, 12)
        pieces = slice(12 * part, 12 * part + 12)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"])
        theirs = peft.get_peft_model(torch.nn.Sequential(linear), config)
        first, second = layer.adapters[part]
        names = ("base_layer.weight", "base_layer.bias", "lora_A.default.weight")
        values = (layer.kernel.numpy()[pieces], layer.bias.numpy()[pieces], first.numpy())
        state = {f"base_model.model.0.{n}": v for n, v in zip(names, values, strict=True)}
        state["base_model.model.0.lora_B.default.weight"] = second.numpy()
        theirs.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
        expected = theirs(torch.tensor(rows)).detach().numpy()
        np.testing.assert_allclose(ours[part], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_adapters_and_new_weights_train_and_nothing_else(tmp_path):
    """In `.keras` files too, which go on bit for bit."""
    model = adapted(make=make_small_model)
    start = {v.path: v.numpy().copy() for v in model.weights}
    model.compile(optimizer=bg.default_optimizer(1e-3, new_weights_learning_rate=1e-2))
    model.optimizer.build(model.trainable_variables)  # or the step is traced twice
    x, y, weight = inputs(model)

    def train(model):
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0
        for _ in range(2):
            model.train_on_batch(x, y, weight)

    train(model)
    model.save(tmp_path / "model.keras")
    new = {v.path for v in freezing.new_variables(model)}
    for variable in model.weights:
        trains = variable.path in new or variable.name.startswith("lora_")
        assert (variable.numpy() != start[variable.path]).any() == trains, variable.path
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert dict(loaded.lora) == dict(model.lora)
    train(model)
    train(loaded)
    for ours, theirs in (
        (model.weights, loaded.weights),
        (model.optimizer.variables, loaded.optimizer.variables),
    ):
        assert [v.path for v in ours][1:] == [v.path for v in theirs][1:]
        for variable, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(variable.numpy(), other.numpy(), variable.path)


def test_adapter_files(tmp_path):
    model = adapted()
    x, _, _ = inputs(model)
    logits = model(x).numpy()
    model.save_adapter(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["encoder/layer_0/self_attention/query/lora_a"].shape == (3, 12)
    assert tensors["decoder/layer_2/feed_forward/output_dense/lora_b"].shape == (12, 3)
    assert tensors["decoder/layer_0/cross_attention/key/kernel"].shape == (12, 12)
    assert not [name for name in tensors if "lora_" in name and "cross_attention" in name]

    other = make_deep_model("word_embeddings", 1, max_source_length=9, max_target_length=7)
    other.decoder.output_bias.assign(other.decoder.output_bias + 1)  # what the file replaces
    other.compile()
    other.load_adapter(tmp_path / "a.safetensors")
    assert not other.compiled
    np.testing.assert_allclose(other(x).numpy(), logits, rtol=1e-5, atol=1e-5)
    trained = [variable.path for variable in other.trainable_variables]
    assert trained == [variable.path for variable in model.trainable_variables]
    other.load_adapter(tmp_path / "a.safetensors")  # over the same
    model.save_to_preset(tmp_path / "preset")
    preset = bg.EncoderDecoderModel.from_preset(tmp_path / "preset")
    np.testing.assert_allclose(preset(x).numpy(), logits, rtol=1e-5, atol=1e-5)

    bare = adapted(train_new_weights=False)
    bare.save_adapter(tmp_path / "b.safetensors")
    assert all("/lora_" in name for name in load_file(tmp_path / "b.safetensors"))
    with pytest.raises(ValueError, match="was saved with the settings .* without adapters"):
        bare.load_adapter(tmp_path / "a.safetensors")


def test_a_frozen_part_is_as_before_when_lora_ends():
    model = make_deep_model("all")
    freezing.freeze(model, encoder_layers=1)
    before = [variable.path for variable in model.trainable_variables]
    model.enable_lora(2)
    copy = bg.EncoderDecoderModel.from_config(model.get_config())
    for each in (model, copy):
        assert {v.name for v in each.trainable_variables if "encoder/" in v.path} == {
            "lora_a",
            "lora_b",
        }
        each.merge_lora()
        assert [variable.path for variable in each.trainable_variables] == before


def _damaged(path, change, settings=None):
    tensors = load_file(path)
    change(tensors)
    settings = settings or {
        "rank": 3,
        "alpha": 5,
        "targets": list(TARGETS_OF_LORA),
        "train_new_weights": False,
    }
    metadata = {"format": "bertgen_tf adapter", "settings": json.dumps(settings)}
    save_file(tensors, path, metadata)


QUERY = "encoder/layer_0/self_attention/query/lora_a"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of the adapters of a small model; with another model, which no test may change."""
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    adapted(make=make_small_model, train_new_weights=False).save_adapter(path)
    return path, make_small_model("word_embeddings")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: _damaged(path, lambda t: t.pop(QUERY)),
            f"nothing found for 1 names .{QUERY}",
        ),
        (lambda path: _damaged(path, lambda t: t.update({QUERY: t[QUERY].T})), "has shape .12, 3."),
        (
            lambda path: _damaged(path, lambda t: t.update(more=np.zeros(2))),
            "more would become more, which the model does not have",
        ),
        (lambda path: _damaged(path, lambda t: t.update({QUERY: t[QUERY] * np.nan})), "NaN"),
        (
            lambda path: _damaged(
                path,
                lambda t: None,
                {"rank": 10**9, "alpha": 1, "targets": ["query"], "train_new_weights": False},
            ),
            "rank must be a whole number from 1 to 12",
        ),
        (lambda path: _damaged(path, lambda t: None, {"rank": 3}), "its metadata is not that"),
        (lambda path: save_file(load_file(path), path), "its metadata is not that"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:99]),
            "is damaged or no safetensors file",
        ),
        (lambda path: path.unlink(), "there is no such file"),
    ],
)
def test_damaged_adapter_files_change_nothing(saved, tmp_path, damage, message):
    path = tmp_path / "a.safetensors"
    file, model = saved
    path.write_bytes(file.read_bytes())
    damage(path)
    before = {v.path: v.numpy().copy() for v in model.weights}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model.load_adapter(path)
    assert model.lora is None
    assert [v.path for v in model.trainable_variables] == list(before)
    for variable in model.weights:
        np.testing.assert_array_equal(variable.numpy(), before[variable.path])


def test_refusals(tmp_path):
    model = make_deep_model("all")
    for arguments, message in (
        ({"rank": 0}, "rank must be a whole number from 1 to 12"),
        ({"rank": 13}, "from 1 to 12"),
        ({"rank": 2.0}, "from 1 to 12"),
        ({"rank": 2, "alpha": 0}, "alpha must be above 0"),
        ({"rank": 2, "targets": ("query", "c_attn")}, "targets must be names of projections"),
        ({"rank": 2, "targets": ()}, "targets must be names"),
        ({"rank": 2, "targets": ["cross_attention/query"]}, "are new weights in this model"),
    ):
        with pytest.raises(ValueError, match=message):
            model.enable_lora(**arguments)
        assert model.lora is None and len(model.trainable_variables) == len(model.weights)
    for method in (model.merge_lora, lambda: model.save_adapter(tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match="has no LoRA adapters"):
            method()
    model.enable_lora(2)
    for method in (
        lambda: model.quantize("int8"),
        lambda: model.save_to_huggingface(tmp_path / "checkpoint"),
        lambda: model.decoder.save_to_huggingface(tmp_path / "checkpoint"),
        lambda: bg.export_saved_model(model, tmp_path / "export" / "1"),
        lambda: model.enable_lora(2),
        lambda: freezing.freeze(model, encoder_layers=1),
    ):
        with pytest.raises(ValueError, match=r"Call merge_lora\(\) *first"):
            method()
    assert not list(tmp_path.iterdir())
    model.merge_lora()
    model.quantize("int8")
    with pytest.raises(ValueError, match="those of this one are int8"):
        model.enable_lora(2)
