"""None"""

import re
import weakref
from pathlib import Path

import keras
import make_tf1_module as tf1_maker
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_hub

import bertgen_tf as bg
from bertgen_tf.checkpoints.hub import modules as hub_modules
from bertgen_tf.network.weights import named_variables
from tests.helpers import PIECES
from tests.helpers.hub import (
    CASED_PIECES,
    MINILM,
    MODULES,
    TINY,
    arrays,
    check_against_module,
    check_block,
    probe,
    run_module,
    shared,
)


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
