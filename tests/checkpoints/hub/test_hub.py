import hashlib
import http.server
import io
import os
import re
import shutil
import tarfile
import threading
import tracemalloc
import urllib.parse
import weakref
from pathlib import Path

import keras
import make_hub_module as maker
import make_tf1_module as tf1_maker
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_hub
from tensorflow_hub import resolver

import bertgen_tf as bg
from bertgen_tf.checkpoints.hub import fetch
from bertgen_tf.checkpoints.hub import modules as hub_modules
from bertgen_tf.network.weights import named_variables
from tests.helpers import PIECES, SHARED, write_checkpoint

MINILM = SHARED / "hub/tf2_bert_minilm_l6"
TINY = SHARED / "hub/tf2_bert_tiny"

# Special tokens where nobody would guess them, and another size.
CASED_PIECES = ["The", "A", *PIECES[9:], "[CLS]", "[UNK]", "[SEP]", "x.y", "[PAD]"]
MODULES = {
    "gelu": {"hidden_act": "gelu", "layer_norm_eps": 1e-5},
    "tanh": {
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-3,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 14,
        "max_position_embeddings": 19,
        "seed": 1,
    },
    "relu": {
        "hidden_act": "relu",
        "layer_norm_eps": 1e-12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": len(CASED_PIECES),
        "pieces": CASED_PIECES,
        "lowercase": False,
        "type_vocab_size": 3,
        "seed": 2,
    },
}


def shared(path: Path) -> Path:
    """The path, or a skip where this folder of reference modules is absent."""
    if not path.exists():
        pytest.skip(f"needs {path.name} in ../shared/hub beside the repository")
    return path


def make_module(folder: Path, lowercase: bool = True, **changes) -> str:
    source = write_checkpoint(folder / "checkpoint", **{"num_hidden_layers": 4, **changes})
    maker.make_hub_module(source, folder / "module", lowercase)
    return str(folder / "module")


@pytest.fixture(scope="session")
def module_of(tmp_path_factory):
    """name -> folder of a module, made when first asked for."""
    made: dict[str, str] = {}

    def get(name: str) -> str:
        if name in ("tiny", "minilm"):
            return str(shared({"tiny": TINY, "minilm": MINILM}[name]))
        if name not in made:
            made[name] = make_module(tmp_path_factory.mktemp(name), **MODULES[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def loaded_of(module_of):
    """name -> the module itself, loaded by tensorflow_hub."""
    loaded = {}

    def get(name: str):
        if name not in loaded:
            loaded[name] = tensorflow_hub.load(module_of(name))
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def encoder_of(module_of):
    encoders = {}

    def get(name: str) -> bg.BertGenerationEncoder:
        if name not in encoders:
            encoders[name] = bg.BertGenerationEncoder.from_hub(module_of(name))
        return encoders[name]

    return get


@pytest.fixture(scope="session")
def decoder(module_of) -> bg.BertGenerationDecoder:
    """Read-only."""
    return bg.BertGenerationDecoder.from_hub(module_of("gelu"))


def run_module(loaded, ids, mask) -> dict:
    ids, mask = tf.constant(ids, tf.int32), tf.constant(mask, tf.int32)
    return loaded(
        {"input_word_ids": ids, "input_mask": mask, "input_type_ids": tf.zeros_like(ids)},
        training=False,
    )


def probe(config: bg.BertGenerationConfig, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Random ids over all positions, with rows of different lengths."""
    length = min(config.max_position_embeddings, 64)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (3, length), np.int32)
    return ids, (np.arange(length) < [[length], [length // 3], [1]]).astype(np.int32)


def arrays(loaded) -> dict[str, np.ndarray]:
    return {v.name.removesuffix(":0"): v.numpy() for v in loaded.variables}


def check_block(block, source: dict[str, np.ndarray], layer: int) -> None:
    """Self-attention and feed-forward of a block are those of a layer of the module."""
    get = {
        name.removeprefix(f"transformer/layer_{layer}/"): array for name, array in source.items()
    }.__getitem__
    hidden, inner = get("intermediate/kernel").shape
    attention, feed_forward = block.self_attention, block.feed_forward
    ours = named_variables(attention)
    for name in ("query", "key", "value"):
        kernel, bias = (ours[f"{name}/{part}"].numpy() for part in ("kernel", "bias"))
        heads = get(f"self_attention/{name}/bias").shape
        # Head by head: row a * D + d of ours is head a, unit d of the module's.
        np.testing.assert_array_equal(
            kernel.T.reshape(hidden, *heads), get(f"self_attention/{name}/kernel")
        )
        np.testing.assert_array_equal(bias.reshape(heads), get(f"self_attention/{name}/bias"))
    for ours, theirs, shape in (
        (attention.output_dense.kernel, "self_attention/attention_output/kernel", (*heads, hidden)),
        (attention.output_dense.bias, "self_attention/attention_output/bias", (hidden,)),
        (attention.layer_norm.gamma, "self_attention_layer_norm/gamma", (hidden,)),
        (attention.layer_norm.beta, "self_attention_layer_norm/beta", (hidden,)),
        (feed_forward.intermediate.kernel, "intermediate/kernel", (hidden, inner)),
        (feed_forward.intermediate.bias, "intermediate/bias", (inner,)),
        (feed_forward.output_dense.kernel, "output/kernel", (inner, hidden)),
        (feed_forward.output_dense.bias, "output/bias", (hidden,)),
        (feed_forward.layer_norm.gamma, "output_layer_norm/gamma", (hidden,)),
        (feed_forward.layer_norm.beta, "output_layer_norm/beta", (hidden,)),
    ):
        np.testing.assert_array_equal(ours.numpy().T.reshape(shape), get(theirs))


def check_embeddings(embeddings, source: dict[str, np.ndarray]) -> None:
    word = embeddings.word_embeddings.embeddings
    np.testing.assert_array_equal(word, source["word_embeddings/embeddings"])
    types = source["type_embeddings/embeddings"]
    assert np.abs(types[0]).max() > 0.01  # or the next line shows nothing
    np.testing.assert_array_equal(
        embeddings.position_embeddings.embeddings,
        source["position_embedding/embeddings"] + types[0],
    )
    for name in ("gamma", "beta"):
        np.testing.assert_array_equal(
            getattr(embeddings.layer_norm, name), source[f"embeddings/layer_norm/{name}"]
        )


# The encoder


CONFIG_FIELDS = bg.BertGenerationConfig().to_dict()
EXPECTED_CONFIGS = {
    **{
        name: {
            "vocab_size": len(PIECES),
            "hidden_size": 12,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "intermediate_size": 20,
            "max_position_embeddings": 26,
            "pad_token_id": 0,
            "bos_token_id": 3,
            "eos_token_id": 4,
        }
        | {key: value for key, value in changes.items() if key in CONFIG_FIELDS}
        for name, changes in MODULES.items()
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 128,
    },
    "minilm": {
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 101,
        "eos_token_id": 102,
    },
}
EXPECTED_CONFIGS["relu"] |= {
    f"{name}_token_id": CASED_PIECES.index(piece)
    for name, piece in (("pad", "[PAD]"), ("bos", "[CLS]"), ("eos", "[SEP]"))
}


def check_against_module(encoder, loaded):
    ids, mask = probe(encoder.config)
    expected = run_module(loaded, ids, mask)["sequence_output"].numpy()
    difference = np.abs(encoder(ids, mask).numpy() - expected)
    assert difference[mask == 1].max() < 1e-5
    # Padding matters, so that a mask that is not read shows.
    unpadded = run_module(loaded, ids, np.ones_like(ids))["sequence_output"].numpy()
    assert np.abs(unpadded - expected)[mask == 1].max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gelu", "tanh", "relu", "tiny", "minilm"])
def test_encoder_gives_the_output_of_its_module(name, encoder_of, loaded_of):
    encoder = encoder_of(name)
    expected = EXPECTED_CONFIGS[name]
    assert {key: getattr(encoder.config, key) for key in expected} == expected
    check_against_module(encoder, loaded_of(name))


@pytest.mark.parametrize("name", ["gelu", "tiny", "minilm"])
def test_encoder_has_the_variables_of_its_module(name, encoder_of, loaded_of):
    source = arrays(loaded_of(name))
    encoder = encoder_of(name)
    check_embeddings(encoder.embeddings, source)
    for layer, block in enumerate(encoder.blocks):
        check_block(block, source, layer)
    left_out = ("type_embeddings", "pooler_transform", "Variable")
    sizes = [a.size for n, a in source.items() if not n.startswith(left_out)]
    assert encoder.count_params() == sum(sizes)


def test_token_type_zero_is_part_of_the_output(encoder_of, loaded_of):
    """The comparison with the module would notice if it were dropped, or were another type."""
    encoder = bg.BertGenerationEncoder(encoder_of("gelu").config)
    types = arrays(loaded_of("gelu"))["type_embeddings/embeddings"]
    ids, mask = probe(encoder.config)
    expected = run_module(loaded_of("gelu"), ids, mask)["sequence_output"].numpy()
    for change in (-types[0], types[1] - types[0]):
        encoder.set_weights(encoder_of("gelu").get_weights())
        encoder.embeddings.position_embeddings.embeddings.assign_add(
            np.broadcast_to(change, (26, 12))
        )
        assert np.abs(encoder(ids, mask).numpy() - expected)[mask == 1].max() > 0.01


def test_activation_matters_to_the_comparison(encoder_of, loaded_of):
    """erf and tanh gelu differ by more than the tolerance, so a wrong one cannot pass."""
    encoder = encoder_of("tanh")
    other = bg.BertGenerationEncoder(encoder.config.replace(hidden_act="gelu"))
    other.set_weights(encoder.get_weights())
    ids, mask = probe(encoder.config)
    expected = run_module(loaded_of("tanh"), ids, mask)["sequence_output"].numpy()
    assert np.abs(other(ids, mask).numpy() - expected)[mask == 1].max() > 1e-4


def test_tiny_encoder_gives_the_golden_output(encoder_of):
    """Computed by the Model Garden before it wrote the module."""
    golden = np.load(shared(TINY.with_suffix(".golden.npz")))
    output = encoder_of("tiny")(golden["input_word_ids"], golden["input_mask"]).numpy()
    real = golden["input_mask"] == 1
    assert np.abs(output - golden["sequence_output"])[real].max() < 1e-5


def test_minilm_encoder_gives_what_pytorch_computes(encoder_of):
    golden = np.load(shared(MINILM.with_suffix(".golden.npz")))
    ids, mask = (golden[name].astype(np.int32) for name in ("ids", "mask"))
    output = encoder_of("minilm")(ids, mask).numpy()
    assert np.abs(output - golden["gelu_pytorch_tanh_seq"])[mask == 1].max() < 1e-5


def test_layers_computed_so_far_are_those_of_the_module(module_of, loaded_of):
    ids, mask = probe(bg.BertGenerationConfig(**EXPECTED_CONFIGS["gelu"]))
    outputs = run_module(loaded_of("gelu"), ids, mask)["encoder_outputs"]
    for count in (1, 3):
        encoder = bg.BertGenerationEncoder.from_hub(module_of("gelu"), num_layers=count)
        assert encoder.config.num_hidden_layers == len(encoder.blocks) == count
        difference = np.abs(encoder(ids, mask).numpy() - outputs[count - 1].numpy())
        assert difference[mask == 1].max() < 1e-5


@pytest.mark.parametrize("layers", [[1, 3], (0, 2, 3)])
def test_listed_layers_are_kept(layers, module_of, loaded_of):
    source = arrays(loaded_of("gelu"))
    encoder = bg.BertGenerationEncoder.from_hub(module_of("gelu"), num_layers=layers)
    decoder = bg.BertGenerationDecoder.from_hub(module_of("gelu"), num_layers=layers)
    for stack in (encoder, decoder):
        check_embeddings(stack.embeddings, source)
        assert stack.config.num_hidden_layers == len(stack.blocks) == len(layers)
        for block, layer in zip(stack.blocks, layers, strict=True):
            check_block(block, source, layer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers", [0, -1, 5, True, 2.0, "2", [], [4], [-1], [0, 0], [2, 1], [True], [0.0], {1: 2}]
)
def test_layers_that_are_not_there_are_refused(layers, module_of):
    rule = "num_layers must be a number from 1 to 4, or a rising list of layers from 0 to 3"
    with pytest.raises(ValueError, match=re.escape(f"{rule}, received {layers!r}.")):
        bg.BertGenerationEncoder.from_hub(module_of("gelu"), num_layers=layers)


# The decoder


def test_decoder_has_the_variables_of_its_module(decoder, loaded_of):
    source = arrays(loaded_of("gelu"))
    assert decoder.config.add_cross_attention
    check_embeddings(decoder.embeddings, source)
    for layer, block in enumerate(decoder.blocks):
        check_block(block, source, layer)
    assert not decoder.output_bias.numpy().any()


def test_decoder_is_causal(decoder):
    ids, _ = probe(decoder.config)
    memory = np.random.default_rng(0).normal(size=(3, 5, 12)).astype(np.float32)
    before = decoder(ids, encoder_hidden_states=memory).numpy()
    for position in (1, 7, 25):
        changed = ids.copy()
        changed[:, position] = (changed[:, position] + 1) % decoder.config.vocab_size
        difference = np.abs(decoder(changed, encoder_hidden_states=memory).numpy() - before)
        assert difference[:, :position].max() < 1e-6
        # From there on every logit changes, so the decoder does read what is earlier.
        assert (difference[:, position:].max(axis=(0, 2)) > 1e-3).all()


def test_random_cross_attention_is_new(decoder):
    kernels = []
    for block in decoder.blocks:
        cross, own = map(named_variables, (block.cross_attention, block.self_attention))
        for name in ("query", "key", "value", "output_dense"):
            kernel = cross[f"{name}/kernel"].numpy()
            assert 0.01 < kernel.std() < 0.03 and np.abs(kernel).max() <= 0.041
            assert own[f"{name}/kernel"].numpy().std() > 0.2
            assert not cross[f"{name}/bias"].numpy().any()
            kernels.append(kernel)
        np.testing.assert_array_equal(cross["layer_norm/gamma"], np.ones(12))
        np.testing.assert_array_equal(cross["layer_norm/beta"], np.zeros(12))
    # Each drawn by itself.
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)


@pytest.mark.parametrize("share", [None, False, True])
def test_cross_attention_can_start_as_a_copy_of_self_attention(share, module_of):
    options = {"num_layers": [0, 2], "cross_attention": "self_attention", "verify": False}
    if share is None:
        decoder = bg.BertGenerationDecoder.from_hub(module_of("gelu"), **options)
    else:
        decoder = bg.EncoderDecoderModel.from_hub(
            encoder=module_of("gelu"), share=share, **options
        ).decoder
    for block in decoder.blocks:
        weights = {id(w) for a in (block.cross_attention, block.self_attention) for w in a.weights}
        assert len(weights) == 8 + 6
        cross, own = map(named_variables, (block.cross_attention, block.self_attention))
        assert len(cross) == len(own) == 10
        for name, copied in cross.items():
            np.testing.assert_array_equal(copied, own[name])
    first, second = (block.cross_attention.query.kernel.numpy() for block in decoder.blocks)
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize("cross_attention", ["copy", None, True])
def test_other_starts_of_cross_attention_are_refused(cross_attention):
    message = f"must be one of random, self_attention, received {cross_attention!r}"
    with pytest.raises(ValueError, match=message):
        bg.BertGenerationDecoder.from_hub("unread", cross_attention=cross_attention)
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_hub(encoder="unread", cross_attention=cross_attention)


# Both together


def stack_size(positions=26, layers=4, inner=20, hidden=12):
    """(word embeddings, one attention, all but word embeddings), in parameters."""
    attention = 4 * (hidden * hidden + hidden) + 2 * hidden
    feed_forward = 2 * hidden * inner + inner + hidden + 2 * hidden
    rest = positions * hidden + 2 * hidden + layers * (attention + feed_forward)
    return len(PIECES) * hidden, attention, rest


@pytest.fixture(scope="session")
def shared_model(module_of):
    return bg.EncoderDecoderModel.from_hub(encoder=module_of("gelu"), share=True)


@pytest.fixture(scope="session")
def two_stacks(module_of):
    return bg.EncoderDecoderModel.from_hub(encoder=module_of("gelu"))


def decoder_changes_with(model, variable) -> bool:
    """Whether the decoder's logits, from a fixed memory, depend on `variable`."""
    ids = np.array([[3, 40, 9, 61]], np.int32)
    memory = np.random.default_rng(0).normal(size=(1, 5, 12)).astype(np.float32)
    before, value = model.decoder(ids, encoder_hidden_states=memory).numpy(), variable.numpy()
    variable.assign(value + np.random.default_rng(1).normal(size=value.shape))
    after = model.decoder(ids, encoder_hidden_states=memory).numpy()
    variable.assign(value)
    return bool(np.abs(after - before).max() > 1e-3)


def test_share_holds_one_set_of_variables(shared_model, loaded_of):
    model, source = shared_model, arrays(loaded_of("gelu"))
    word, attention, rest = stack_size()
    assert model.count_params() == word + rest + 4 * attention + len(PIECES)
    assert model.decoder.embeddings.word_embeddings is model.encoder.embeddings.word_embeddings
    encoder_only = {id(v) for v in model.encoder.weights} - {id(v) for v in model.decoder.weights}
    assert not encoder_only
    check_embeddings(model.decoder.embeddings, source)
    for layer, block in enumerate(model.decoder.blocks):
        check_block(block, source, layer)
    for variable in (
        model.encoder.embeddings.word_embeddings.embeddings,
        model.encoder.embeddings.position_embeddings.embeddings,
        model.encoder.blocks[3].self_attention.query_key_value.kernel,
        model.encoder.blocks[0].feed_forward.layer_norm.gamma,
    ):
        assert decoder_changes_with(model, variable)


def test_two_stacks_of_one_module_share_word_embeddings_only(two_stacks, loaded_of):
    model, source = two_stacks, arrays(loaded_of("gelu"))
    word, attention, rest = stack_size()
    assert model.count_params() == word + 2 * rest + 4 * attention + len(PIECES)
    both = {id(v) for v in model.encoder.weights} & {id(v) for v in model.decoder.weights}
    word_embeddings = model.encoder.embeddings.word_embeddings.embeddings
    assert both == {id(word_embeddings)}
    check_embeddings(model.decoder.embeddings, source)
    for layer, block in enumerate(model.decoder.blocks):
        check_block(block, source, layer)
    assert decoder_changes_with(model, word_embeddings)
    assert not decoder_changes_with(
        model, model.encoder.blocks[0].self_attention.query_key_value.kernel
    )
    assert not decoder_changes_with(model, model.encoder.embeddings.position_embeddings.embeddings)


def test_softmax_reads_the_word_embeddings(two_stacks):
    """A row of the one matrix moves the logit of its token, though neither side reads it."""
    decoder, token = two_stacks.decoder, 30
    ids, memory = np.array([[3, 40]], np.int32), np.ones((1, 2, 12), np.float32)
    matrix = two_stacks.encoder.embeddings.word_embeddings.embeddings
    value = matrix.numpy()
    before = decoder(ids, encoder_hidden_states=memory).numpy()
    changed = value.copy()
    changed[token] = 0
    matrix.assign(changed)
    after = decoder(ids, encoder_hidden_states=memory).numpy()
    matrix.assign(value)
    assert not after[..., token].any() and np.abs(before[..., token]).min() > 1e-3
    others = np.arange(len(PIECES)) != token
    np.testing.assert_array_equal(after[..., others], before[..., others])


def test_two_modules_share_nothing(module_of, loaded_of):
    # Heads, depth, positions and activation may differ.
    model = bg.EncoderDecoderModel.from_hub(encoder=module_of("gelu"), decoder=module_of("tanh"))
    word, _, rest = stack_size()
    other_word, attention, other_rest = stack_size(positions=19, layers=2, inner=14)
    expected = word + rest + other_word + other_rest + 2 * attention + len(PIECES)
    assert model.count_params() == expected
    assert not {id(v) for v in model.encoder.weights} & {id(v) for v in model.decoder.weights}
    check_embeddings(model.encoder.embeddings, arrays(loaded_of("gelu")))
    check_embeddings(model.decoder.embeddings, arrays(loaded_of("tanh")))
    check_block(model.decoder.blocks[1], arrays(loaded_of("tanh")), 1)
    assert model.decoder.config.hidden_act == "gelu_new"
    assert not decoder_changes_with(model, model.encoder.embeddings.word_embeddings.embeddings)


def test_one_folder_under_two_names_is_one_module(module_of, monkeypatch):
    folder = Path(module_of("gelu"))
    monkeypatch.chdir(folder.parent)
    model = bg.EncoderDecoderModel.from_hub(
        encoder=folder, decoder=f"./{folder.name}/", share=True, num_layers=1, verify=False
    )
    assert model.decoder.embeddings is model.encoder.embeddings


def test_modules_that_do_not_fit_each_other_are_refused(module_of):
    gelu, tanh, relu = (module_of(name) for name in ("gelu", "tanh", "relu"))
    with pytest.raises(ValueError, match=f"share=True .* the same checkpoint.*{gelu}.*{tanh}"):
        bg.EncoderDecoderModel.from_hub(encoder=gelu, decoder=tanh, share=True)
    with pytest.raises(ValueError, match=f"the same vocabulary and casing.*{gelu} and {relu}"):
        bg.EncoderDecoderModel.from_hub(encoder=gelu, decoder=relu, verify=False)


def test_tokenizer_and_options_of_the_model(module_of):
    model = bg.EncoderDecoderModel.from_hub(
        encoder=module_of("relu"), max_source_length=9, add_eos=False
    )
    vocabulary = (Path(module_of("relu")) / "assets/vocab.txt").read_text().splitlines()
    assert model.tokenizer.get_config()["vocabulary"] == vocabulary == CASED_PIECES
    assert not model.tokenizer.lowercase
    assert model.tokenizer.tokenize("The the") == ["The", "the"]
    assert model.preprocessor.max_source_length == 9 and not model.preprocessor.add_eos
    model = bg.EncoderDecoderModel.from_hub(encoder=module_of("tanh"), verify=False)
    assert model.tokenizer.lowercase
    assert model.tokenizer.tokenize("The") == ["the"]
    # As when BERT was trained.
    ids = model.preprocessor.generate_preprocess(["The bird"])["input_ids"][0].numpy()
    assert [PIECES[i] for i in ids] == ["[CLS]", "the", "bird", "[SEP]"]


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True])
def test_every_variable_trains(share, module_of):
    model = bg.EncoderDecoderModel.from_hub(
        encoder=module_of("gelu"), share=share, num_layers=2, verify=False
    )
    model.compile(optimizer=keras.optimizers.SGD(1.0), jit_compile=False)
    assert {id(v) for v in model.trainable_variables} == {id(v) for v in model.weights}
    before = [variable.numpy() for variable in model.weights]
    model.fit(["a man saw birds.", "the house"], ["he sang; who left?", "it"], verbose=0)
    unchanged = {
        variable.path
        for variable, value in zip(model.weights, before, strict=True)
        if np.array_equal(variable.numpy(), value)
    }
    # A bias of all keys shifts all scores of a query alike: softmax does not see it.
    assert {path for path in unchanged if not path.endswith("key/bias")} == set()


# verify


def replace_attention(factor):
    class Encoder(maker.BertEncoder):
        """A module whose variables fit and whose graph is another one."""

        def _attention(self, *args):
            return factor * super()._attention(*args)

    return Encoder


def test_a_graph_that_is_not_berts_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "BertEncoder", replace_attention(1.01))
    module = make_module(tmp_path, num_hidden_layers=1)
    for load in (
        bg.BertGenerationEncoder.from_hub,
        bg.BertGenerationDecoder.from_hub,
        lambda handle: bg.EncoderDecoderModel.from_hub(encoder=handle),
    ):
        with pytest.raises(ValueError, match="differs by 0.0.*its graph is not that of a BERT"):
            load(module)
    encoder = bg.BertGenerationEncoder.from_hub(module, verify=False)
    check_block(encoder.blocks[0], arrays(tensorflow_hub.load(module)), 0)


def test_two_epsilons_are_noticed(tmp_path, monkeypatch):
    class Encoder(maker.BertEncoder):
        def _norm(self, x, name):
            epsilon = 0.01 if name == "embeddings/layer_norm" else 0.02
            self._config = {**self._config, "layer_norm_eps": epsilon}
            return super()._norm(x, name)

    monkeypatch.setattr(maker, "BertEncoder", Encoder)
    module = make_module(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"one epsilon .* has \['gelu'\] and \[0.00999.*, 0.0199"):
        bg.BertGenerationEncoder.from_hub(module)


class Wrapped:
    """A loaded module that answers differently."""

    def __init__(self, loaded, answer):
        self.variables = loaded.variables
        self.vocab_file, self.do_lower_case = loaded.vocab_file, loaded.do_lower_case
        self.loaded, self.answer = loaded, answer

    def __call__(self, inputs, training):
        return self.answer(self.loaded(inputs, training=training))


def old_interface(_):
    raise ValueError("Could not find matching concrete function to call.\nGot: a dict\n")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda output: {"sequence_output": output["sequence_output"] + np.nan}, "differs by nan"),
        (lambda output: {"sequence_output": output["sequence_output"][:, :1]}, "differs by inf"),
        (lambda output: {"sequence_output": output["sequence_output"] + 2e-4}, "differs by 0.0002"),
        (lambda output: {"hidden": output["sequence_output"]}, "failed: KeyError: 'sequence_ou"),
        (old_interface, "input_type_ids and give sequence_output, but .* Could not find matching"),
    ],
)
def test_verify_takes_no_other_answer(answer, message, module_of, loaded_of, monkeypatch):
    wrapped = Wrapped(loaded_of("gelu"), answer)
    monkeypatch.setattr(tensorflow_hub, "load", lambda path: wrapped)
    check_error(module_of("gelu"), ValueError, message)
    bg.BertGenerationEncoder.from_hub(module_of("gelu"), verify=False)


def test_verify_reads_padding_and_every_layer(module_of, loaded_of, monkeypatch):
    """A module without a mask differs from our encoder, whatever layers are kept."""
    loaded = loaded_of("gelu")
    wrapped = Wrapped(loaded, None)
    wrapped.__class__ = type(
        "Unmasked",
        (Wrapped,),
        {
            "__call__": lambda self, inputs, training: loaded(
                {**inputs, "input_mask": tf.ones_like(inputs["input_mask"])}, training=training
            )
        },
    )
    monkeypatch.setattr(tensorflow_hub, "load", lambda path: wrapped)
    check_error(module_of("gelu"), ValueError, "differs by", num_layers=1)


# What is no BERT module


def check_error(handle, kind, *parts, **options):
    """Every way in gives one error of one line that names the handle and says these things."""
    with pytest.raises(kind) as caught:
        bg.BertGenerationEncoder.from_hub(handle, **options)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert str(handle) in message and "\n" not in message and "Traceback" not in message
    assert " should " in message and len(message) < 900
    for part in parts:
        assert re.search(part, message), message
    return message


def save(folder: Path, variables: dict[str, tuple[int, ...]], called: bool = True) -> Path:
    """A SavedModel that has these variables and, if `called`, takes a text encoder's inputs."""

    class Root(tf.train.Checkpoint):
        pass

    root = Root()
    root.variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in variables.items()]
    if called:
        spec = {
            name: tf.TensorSpec([None, None], tf.int32, name)
            for name in ("input_word_ids", "input_mask", "input_type_ids")
        }
        root.__call__ = tf.function(
            lambda inputs, training: {"sequence_output": tf.cast(inputs["input_mask"], tf.float32)}
        )
        for training in (False, True):
            root.__call__.get_concrete_function(spec, training)
    tf.saved_model.save(root, str(folder))
    return folder


def test_a_missing_folder(tmp_path):
    check_error(tmp_path / "absent", FileNotFoundError, "folder of a TF Hub module or a URL")
    (tmp_path / "file").write_text("text")
    check_error(tmp_path / "file", FileNotFoundError, "there is no such folder")
    with pytest.raises(FileNotFoundError, match="absent should be"):
        bg.EncoderDecoderModel.from_hub(encoder=str(tmp_path / "absent"))


def test_a_folder_without_a_saved_model(tmp_path):
    check_error(tmp_path, ValueError, "a file saved_model.pb, but holds nothing")
    write_checkpoint(tmp_path / "hf")
    check_error(tmp_path / "hf", ValueError, "holds config.json, model.safetensors, tokenizer_con")


def test_some_other_saved_model(tmp_path):
    module = tf.Module()
    module.weight = tf.Variable(1.0)
    tf.saved_model.save(module, str(tmp_path / "plain"))
    check_error(
        tmp_path / "plain",
        ValueError,
        "should be a BERT encoder in TF2 SavedModel format",
        "has no word_embeddings/embeddings, position_embedding/embeddings",
        r"Found 0 variables\. ",
    )
    folder = save(tmp_path / "conv", {f"conv_{i}/kernel": (3, 3) for i in range(9)})
    check_error(folder, ValueError, "Found 9 variables: conv_0/kernel, .*conv_5/kernel, [.][.][.]")


ALBERT = {
    "word_embeddings/embeddings": (11, 4),
    "position_embedding/embeddings": (8, 4),
    "type_embeddings/embeddings": (2, 4),
    "embeddings/layer_norm/gamma": (4,),
    "embeddings/layer_norm/beta": (4,),
    "embedding_projection/kernel": (4, 6),
    "embedding_projection/bias": (6,),
    "transformer/self_attention/query/kernel": (6, 2, 3),
    "transformer/self_attention/query/bias": (2, 3),
    "transformer/intermediate/kernel": (6, 7),
    "transformer/output/kernel": (7, 6),
}
MOBILEBERT = {
    "mobile_bert_encoder/mobile_bert_embedding/word_embedding/embeddings": (11, 4),
    "mobile_bert_encoder/mobile_bert_embedding/type_embedding/embeddings": (2, 6),
    "mobile_bert_encoder/transformer_layer_0/bottleneck_input/dense/kernel": (6, 4),
    "mobile_bert_encoder/transformer_layer_0/bottleneck_input/norm/scale": (4,),
    "mobile_bert_encoder/transformer_layer_0/attention/query/kernel": (4, 2, 2),
    "mobile_bert_encoder/transformer_layer_0/ffn_layer_0/intermediate_dense/kernel": (4, 7),
}


def test_relatives_of_bert(tmp_path):
    check_error(
        save(tmp_path / "albert", ALBERT),
        ValueError,
        "has no transformer/layer_0/self_attention/query/kernel",
        "Found 11 variables: .*MobileBERT, ALBERT and preprocessing modules are not BERT",
    )
    check_error(
        save(tmp_path / "mobilebert", MOBILEBERT),
        ValueError,
        "Found 6 variables: mobile_bert_encoder/.*bottleneck_input",
    )


def test_modules_of_other_formats():
    check_error(
        shared(SHARED / "hub/tf2_bert_minilm_preprocess"), ValueError, r"Found 0 variables\."
    )


def test_more_or_fewer_variables_than_berts(module_of, loaded_of, monkeypatch):
    """All that is odd is told, and nothing is guessed or left out silently."""
    wrapped = Wrapped(loaded_of("gelu"), lambda output: output)
    kept = [v for v in wrapped.variables if "layer_2/output/" not in v.name]
    adapter = tf.Variable(tf.zeros([2]), name="transformer/layer_1/adapter/kernel")
    wrapped.variables = [*kept, adapter]
    monkeypatch.setattr(tensorflow_hub, "load", lambda path: wrapped)
    with pytest.raises(ValueError) as caught:
        bg.BertGenerationEncoder.from_hub(module_of("gelu"))
    message = str(caught.value)
    assert message.startswith(f"{module_of('gelu')} does not fit the model: ")
    assert "no rule for 1 names (transformer/layer_1/adapter/kernel)" in message
    assert "nothing found for 2 names (layer_2/feed_forward/output_dense/kernel" in message

    twice = tf.Variable(tf.zeros([12]), name="embeddings/layer_norm/beta")
    wrapped.variables = [*loaded_of("gelu").variables, twice]
    check_error(module_of("gelu"), ValueError, "has several of embeddings/layer_norm/beta")


def test_a_module_that_does_not_tell_its_vocabulary(module_of, loaded_of, monkeypatch):
    wrapped = Wrapped(loaded_of("gelu"), None)
    del wrapped.do_lower_case
    monkeypatch.setattr(tensorflow_hub, "load", lambda path: wrapped)
    check_error(module_of("gelu"), ValueError, "vocabulary .vocab_file. and casing .do_lower_case")


# Damaged files

DATA = "variables/variables.data-00000-of-00001"


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (DATA, lambda path: cut(path, 0.5)),
        (DATA, lambda path: cut(path, 0)),
        (DATA, flip),
        (DATA, Path.unlink),
        ("variables/variables.index", Path.unlink),
        ("variables/variables.index", lambda path: cut(path, 0.6)),
        ("saved_model.pb", lambda path: cut(path, 0)),
        ("saved_model.pb", lambda path: cut(path, 0.5)),
        ("saved_model.pb", lambda path: cut(path, 0.9999)),
        ("saved_model.pb", lambda path: path.write_text("<html>not found</html>")),
    ],
)
def test_damaged_files(name, damage, module_of, tmp_path):
    folder = shutil.copytree(module_of("gelu"), tmp_path / "module")
    damage(folder / name)
    check_error(
        folder, ValueError, "should be a TF Hub module with a SavedModel and its variables, but lo"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "not found"),
        (lambda path: path.write_text("\n".join(PIECES[:4])), "must contain every special token; "),
        (lambda path: path.write_bytes(b"[PAD]\n\xff"), "must be a UTF-8 text file"),
    ],
)
def test_a_damaged_vocabulary(damage, message, module_of, tmp_path):
    folder = shutil.copytree(module_of("gelu"), tmp_path / "module")
    damage(folder / "assets/vocab.txt")
    check_error(folder, ValueError, f"should hold BERT's vocabulary, but reading it .*{message}")


# Over HTTP


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server in the hub protocol; `archives` is path -> bytes, `requests` what was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            url = urllib.parse.urlsplit(self.path)
            self.server.requests.append(self.path)
            known = url.path in self.server.archives
            if known and urllib.parse.parse_qs(url.query).get("tf-hub-format") == ["compressed"]:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(self.server.archives[url.path])
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "TFHUB_MODEL_LOAD_FORMAT":
            monkeypatch.delenv(name)
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.archives, server.requests = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pack(folder: str, mode: str = "w:gz") -> bytes:
    """A module as the hub sends it: a .tar.gz without a folder around."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        # variables/ last, so that an archive that is cut lacks them.
        for name in sorted(os.listdir(folder)):
            archive.add(os.path.join(folder, name), arcname=f"./{name}")
    return buffer.getvalue()


def test_a_module_is_fetched_once_and_kept(server, module_of, loaded_of, tmp_path, monkeypatch):
    server.archives["/tiny/1"] = pack(module_of("tanh"))
    handle = f"{server.url}/tiny/1"
    check_against_module(bg.BertGenerationEncoder.from_hub(handle), loaded_of("tanh"))
    assert server.requests == ["/tiny/1?tf-hub-format=compressed"]
    kept = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(kept) == 1 and (kept[0] / "saved_model.pb").is_file()

    # The second time there is no server.
    server.archives.clear()
    model = bg.EncoderDecoderModel.from_hub(encoder=handle, decoder=handle, share=True)
    check_block(model.decoder.blocks[1], arrays(loaded_of("tanh")), 1)
    assert len(server.requests) == 1
    # It is in that cache and in no other.
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "other"))
    check_error(handle, ValueError, "404")


def test_archives_that_are_broken(server, module_of, tmp_path):
    whole = pack(module_of("gelu"))
    server.archives |= {
        "/text": b"<html>moved</html>",
        "/empty": b"",
        "/cut": whole[: len(whole) // 2],
        "/nearly": whole[: -len(whole) // 10],
        "/headless": whole[100:],
    }
    rule = "should answer with a .tar.gz of a TF Hub module, but fetching or unpacking it failed"
    for path in server.archives:
        check_error(server.url + path, ValueError, rule)
    message = check_error(f"{server.url}/absent", ValueError, rule)
    assert "404" in message
    # Nothing of it stays, so that the next try fetches again.
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    server.archives = dict.fromkeys(server.archives, whole)
    bg.BertGenerationEncoder.from_hub(f"{server.url}/cut", verify=False)


def test_what_is_kept_and_unusable_is_told(server, module_of, tmp_path):
    """tensorflow_hub never fetches again what it could unpack, such as an archive cut in time."""
    folder = shutil.copytree(module_of("gelu"), tmp_path / "part")
    kept = f"kept in {tmp_path}/cache/[0-9a-f]+: delete it to fetch it again"
    for absent, message in (
        ("variables", "loading it failed"),
        ("saved_model.pb", "but holds ass"),
    ):
        path = folder / absent
        path.rename(tmp_path / "away")
        server.archives[f"/{absent}"] = pack(folder)
        check_error(f"{server.url}/{absent}", ValueError, kept, message)
        (tmp_path / "away").rename(path)


def tar(*members: tuple[str, object]) -> bytes:
    """A .tar.gz of files (bytes), or of members with a type and where they link to."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in (("saved_model.pb", b"x"), *members):
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                archive.addfile(member)
    return buffer.getvalue()


def long_name(kind: str) -> bytes:
    """A small .tar.gz with a header of 16 MiB: a long name of GNU's format, or pax attributes."""
    long = "x" * 2**24
    form = tarfile.GNU_FORMAT if kind == "name" else tarfile.PAX_FORMAT
    buffer = io.BytesIO()
    pax = {"comment": long}
    options = {"format": form, "pax_headers": pax if kind == "global" else None}
    with tarfile.open(fileobj=buffer, mode="w:gz", **options) as archive:
        if kind != "global":
            archive.addfile(tarfile.TarInfo("first"))
        member = tarfile.TarInfo(long if kind == "name" else "saved_model.pb")
        member.linkname = long if kind == "link" else ""
        member.pax_headers = pax if kind == "member" else {}
        archive.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["name", "link", "member", "global"])
def test_headers_cannot_fill_the_memory(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    content = long_name(kind)
    assert len(content) < 10**5
    (tmp_path / "bomb.tar.gz").write_bytes(content)
    tracemalloc.start()
    check_error(
        tmp_path / "bomb.tar.gz", ValueError, "a header in the archive has more than 1048576 bytes"
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("kind", ["folder", "name"])
def test_a_folder_with_a_size_leaves_no_room_for_a_header(kind, tmp_path):
    """tarfile reads nothing of a folder, whatever size it declares."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT) as archive:
        folder = tarfile.TarInfo("assets")
        folder.type, folder.size = tarfile.DIRTYPE, 2**24 if kind == "folder" else 0
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("a/" * (2**22 if kind == "folder" else 2**12)))
    buffer.seek(0)
    messages = {"folder": "'assets' of the archive is no plain", "name": "a name of 819[12] char"}
    with pytest.raises(ValueError, match=messages[kind]):
        fetch.unpack(buffer, str(tmp_path / "folder"))


def test_long_names_and_many_files_are_read(tmp_path):
    """What the bound leaves: names beyond the 100 bytes of a plain header, and large files."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = "/".join(["assets", *["folder" * 8] * 6, "vocab.txt"])
        contents = {name: b"a" * 3 * 2**20, "saved_model.pb": b"", "other": b"b" * (2**20 + 1)}
        contents |= {f"{name}{i}": bytes([i]) for i in range(9)}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", format=form) as archive:
            for path, content in contents.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        folder = tmp_path / str(form)
        buffer.seek(0)
        fetch.unpack(buffer, str(folder))
        for path, content in contents.items():
            assert (folder / path).read_bytes() == content


OUTSIDE = "member .* of the archive would lie outside its folder"
NO_FILE = "member .* of the archive is no plain file or folder"
HOSTILE = {
    "parent": ([("../escaped", b"x")], OUTSIDE),
    "deeper": ([("assets/../../escaped", b"x")], OUTSIDE),
    "inside": ([("assets/../escaped", b"x")], OUTSIDE),
    "absolute": ([("ROOT/escaped", b"x")], OUTSIDE),
    "folder": ([("../escaped", (tarfile.DIRTYPE, ""))], OUTSIDE),
    "link": ([("link", (tarfile.SYMTYPE, "..")), ("link/escaped", b"x")], NO_FILE),
    "absolute link": ([("link", (tarfile.SYMTYPE, "ROOT")), ("link/escaped", b"x")], NO_FILE),
    "hard link": ([("link", (tarfile.LNKTYPE, "../secret")), ("link", b"x")], NO_FILE),
    "device": ([("null", (tarfile.CHRTYPE, ""))], NO_FILE),
    "fifo": ([("pipe", (tarfile.FIFOTYPE, ""))], NO_FILE),
    "large": ([(f"assets/{i}", bytes(3000)) for i in range(4)], "unpacks to more than 9999 bytes"),
    "sparse": ([("hole", (tarfile.GNUTYPE_SPARSE, ""))], NO_FILE),
    "many": ([(f"assets/{i}", b"") for i in range(30)], "or 20 files"),
}


@pytest.mark.parametrize("source", ["url", "file"])
@pytest.mark.parametrize("case", HOSTILE)
def test_archives_cannot_escape_nor_fill_the_disk(case, source, server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_UNPACKED_BYTES", 9999)
    monkeypatch.setattr(fetch, "MAX_MEMBERS", 20)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/secret").write_text("secret")
    (tmp_path / "secret").write_text("secret")
    members, message = HOSTILE[case]
    root = str(tmp_path)
    content = tar(
        *(
            (
                name.replace("ROOT", root),
                c if isinstance(c, bytes) else (c[0], c[1].replace("ROOT", root)),
            )
            for name, c in members
        )
    )
    if source == "url":
        server.archives["/hostile/1"] = content
        handle = f"{server.url}/hostile/1"
    else:
        (tmp_path / "hostile.tar.gz").write_bytes(content)
        handle = str(tmp_path / "hostile.tar.gz")
    before = {path: path.stat().st_nlink for path in tmp_path.rglob("*") if path.is_file()}
    check_error(handle, ValueError, "fetching or unpacking it failed", message)
    after = {path: path.stat().st_nlink for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before  # neither outside nor inside the cache
    assert (tmp_path / "secret").read_text() == "secret"
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("name", ["model.tar.gz", "model.tgz"])
def test_an_archive_file_is_unpacked_once_under_its_content(
    name, module_of, loaded_of, tmp_path, monkeypatch
):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    content = pack(module_of("tanh"))
    (tmp_path / name).write_bytes(content)
    check_against_module(bg.BertGenerationEncoder.from_hub(tmp_path / name), loaded_of("tanh"))
    kept = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert [path.name for path in kept] == [hashlib.sha256(content).hexdigest()]
    # Found again by what it holds, under whatever name; another content is another module.
    (kept[0] / "mark").touch()
    (tmp_path / name).rename(tmp_path / "renamed.tgz")
    bg.BertGenerationEncoder.from_hub(tmp_path / "renamed.tgz", verify=False)
    assert (kept[0] / "mark").exists()
    (tmp_path / name).write_bytes(pack(module_of("gelu")))
    assert (
        bg.BertGenerationEncoder.from_hub(tmp_path / name, verify=False).config.hidden_act == "gelu"
    )
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    check_error(
        tmp_path / name, ValueError, "should be a .tar.gz of a TF Hub module, but .* failed"
    )
    check_error(tmp_path / "absent.tar.gz", FileNotFoundError, "or a .tar.gz file of one")


@pytest.fixture
def unset(tmp_path, monkeypatch):
    """No TFHUB_CACHE_DIR, and a home of its own."""
    monkeypatch.delenv("TFHUB_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("xdg", [None, "relative", "XDG"])
def test_without_a_cache_modules_are_kept_for_the_user_alone(xdg, module_of, unset, monkeypatch):
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg.replace("XDG", str(unset / "xdg")))
    content = pack(module_of("tanh"))
    (unset / "model.tar.gz").write_bytes(content)
    umask = os.umask(0)
    try:
        path = fetch.resolve(str(unset / "model.tar.gz"))
    finally:
        os.umask(umask)
    root = unset / ("xdg" if xdg == "XDG" else "home/.cache") / "bertgen_tf/hub"
    assert Path(path) == root / hashlib.sha256(content).hexdigest()
    assert root.stat().st_mode & 0o777 == 0o700
    assert bg.BertGenerationEncoder.from_hub(path, verify=False).config.hidden_act == "gelu_new"

    # What tensorflow_hub fetches itself goes there too, and no setting stays behind.
    monkeypatch.setattr(tensorflow_hub, "resolve", lambda _: resolver.tfhub_cache_dir() + "/own")
    (root / "own").mkdir()
    (root / "own/saved_model.pb").touch()
    assert fetch.resolve("gs://bucket/module.tar.gz") == str(root / "own")
    assert "TFHUB_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(unset))
    (unset / "own").mkdir()
    (unset / "own/saved_model.pb").touch()
    assert fetch.resolve("gs://bucket/module.tar.gz") == str(unset / "own")
    assert os.environ["TFHUB_CACHE_DIR"] == str(unset)


def test_a_cache_that_others_can_write_is_refused(module_of, unset, monkeypatch):
    (unset / "model.tar.gz").write_bytes(pack(module_of("tanh")))
    root = unset / "home/.cache/bertgen_tf/hub"
    root.mkdir(parents=True)
    modes = {0o777: "drwxrwxrwx", 0o770: "drwxrwx---", 0o702: "drwx----w-"}
    for mode, shown in modes.items():
        root.chmod(mode)
        check_error(unset / "model.tar.gz", ValueError, f"writable for nobody .* mode {shown}")
    root.chmod(0o700)
    root.parent.chmod(0o775)  # hub could be renamed
    check_error(unset / "model.tar.gz", ValueError, "bertgen_tf should be a folder of the user's")
    root.parent.chmod(0o755)
    root.rename(unset / "elsewhere")
    root.symlink_to(unset / "elsewhere")
    check_error(unset / "model.tar.gz", ValueError, "hub should be a folder of the user's own")
    root.unlink()
    root.touch()
    check_error(unset / "model.tar.gz", ValueError, "hub should be a folder of the user's own")
    root.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: root.parent.stat().st_uid + 1)
        check_error(unset / "model.tar.gz", ValueError, "should be a folder of the user's own")
    fetch.resolve(str(unset / "model.tar.gz"))
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(unset / "model.tar.gz" / "below"))
    check_error(unset / "model.tar.gz", ValueError, "no folder for that: .*, or set TFHUB_")


# What is read, and when


@pytest.mark.slow
def test_variables_are_read_when_asked_for(tmp_path, monkeypatch):
    folder = tmp_path / "module"
    tf1_maker.make_encoder(folder, PIECES, num_layers=1, scope="outer/")
    expected = tf1_maker.read_weights(folder)
    load = tensorflow_hub.load
    monkeypatch.setattr(tensorflow_hub, "load", None)  # TensorFlow's copy is not needed for it
    module = hub_modules.open_module(str(folder))
    reads = []
    read = module.tensors._read
    module.tensors._read = lambda name: reads.append(name) or read(name)
    assert set(module.names) == set(module.tensors) == set(expected)
    assert module.tensors.shapes == {name: array.shape for name, array in expected.items()}
    short = module.tensors.without("outer/")
    name = "bert/pooler/dense/bias"
    assert name in short and name not in module.tensors and f"outer/{name}" not in short
    assert short.shapes[name] == (12,) and len(short) == len(expected)
    assert reads == []
    np.testing.assert_array_equal(short[name], expected[f"outer/{name}"])
    assert reads == [f"outer/{name}"]
    assert short[name] is not short[name]  # none is kept
    with pytest.raises(KeyError):
        module.tensors[name]
    for name, array in module.tensors.items():
        np.testing.assert_array_equal(array, expected[name])

    copies = []

    def remember(path):
        loaded = load(path)
        copies.append((weakref.ref(loaded), weakref.ref(loaded.variables[0])))
        return loaded

    monkeypatch.setattr(tensorflow_hub, "load", remember)
    assert module.loaded is module.loaded and len(copies) == 1
    ids = tf.constant([[3, 4]])
    module.loaded.signatures["tokens"](input_ids=ids, input_mask=ids, segment_ids=ids - ids)
    module.loaded.prune("input_ids:0", "input_ids:0")(ids)
    module.unload()
    assert all(copy() is None for copy in copies[0])
    assert "tokens" in module.loaded.signatures and len(copies) == 2


def test_two_variables_for_one_are_told():
    tensors = hub_modules.Tensors("a module", {"x/bert/a": (1,), "bert/a": (2,)}, None)
    with pytest.raises(ValueError, match="a module should name each .* has x/bert/a and bert/a"):
        tensors.without("x/")
    assert set(tensors.without("y/")) == set(tensors)


def test_what_the_table_does_not_know_is_told():
    for name, original in bg.hub.ORIGINALS.items():
        assert (original.gnmt_alpha == 0.6) == ("translation" in original.task)
        assert original.gnmt_alpha is None or original.tokenizer == "wordpiece"
        assert original.card_output
        if original.card_input is None:
            assert "whole article" in original.note, name
    assert "bos and eos" in bg.hub.ORIGINALS["google/bertseq2seq/roberta24_wikisplit/1"].note


def test_no_server_is_there(server):
    server.shutdown()
    server.server_close()
    check_error(f"{server.url}/tiny/1", ValueError, "failed: .*refused")


def test_other_protocols_are_refused():
    check_error("ftp://127.0.0.1/tiny/1", ValueError, "failed")


def test_a_dtype_policy_changes_the_model_not_the_check(hub_module):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = bg.EncoderDecoderModel.from_hub(encoder=hub_module, share=True)
    finally:
        keras.config.set_dtype_policy("float32")
    full = bg.BertGenerationEncoder.from_hub(hub_module)
    assert half.encoder.compute_dtype == half.decoder.compute_dtype == "bfloat16"
    for ours, expected in zip(half.encoder.weights, full.weights, strict=True):
        np.testing.assert_array_equal(ours, expected)
