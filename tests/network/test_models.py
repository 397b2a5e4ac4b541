"""Encoder, decoder and their model: sharing, causality, saving, cached against whole sequences."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.network.layers import write_cache
from bertgen_tf.network.projections import Dense
from bertgen_tf.network.weights import named_variables
from tests.helpers import PIECES, eagerly, make_deep_model, make_small_model

RNG = np.random.default_rng(5)
SOURCE = RNG.integers(6, len(PIECES), (3, 7)).astype(np.int32)
SOURCE_MASK = np.array([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]], np.int32)
TARGET = RNG.integers(6, len(PIECES), (3, 5)).astype(np.int32)
BATCH = {
    "input_ids": SOURCE,
    "attention_mask": SOURCE_MASK,
    "decoder_input_ids": TARGET,
    "decoder_attention_mask": np.array([[1] * 5, [1] * 5, [1, 1, 1, 0, 0]], np.int32),
}


def numpy_model(model, batch):
    """The whole model in NumPy, written from the paper's description."""
    w = {name: np.asarray(v) for name, v in named_variables(model).items()}

    def norm(x, name, config):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps)
        return x * w[f"{name}/gamma"] + w[f"{name}/beta"]

    def dense(x, name):
        return x @ w[f"{name}/kernel"].T + w[f"{name}/bias"]

    def attention(x, memory, mask, name, config):
        heads = config.num_attention_heads
        out = np.zeros_like(x)
        size = x.shape[-1] // heads
        q, k, v = dense(x, f"{name}/query"), dense(memory, f"{name}/key"), None
        v = dense(memory, f"{name}/value")
        for b in range(len(x)):
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                scores = q[b][:, part] @ k[b][:, part].T / np.sqrt(size)
                scores = np.where(mask[b], scores, -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[b][:, part] = weights / weights.sum(-1, keepdims=True) @ v[b][:, part]
        return norm(x + dense(out, f"{name}/output_dense"), f"{name}/layer_norm", config)

    def embed(ids, side, config):
        words = w[f"{side}/embeddings/word_embeddings/embeddings"][ids]
        positions = w[f"{side}/embeddings/position_embeddings/embeddings"][: ids.shape[1]]
        return norm(words + positions, f"{side}/embeddings/layer_norm", config)

    def feed_forward(x, name, config):
        inner = dense(x, f"{name}/intermediate")
        erf = np.vectorize(__import__("math").erf)
        inner = inner * 0.5 * (1 + erf(inner / np.sqrt(2)))
        return norm(x + dense(inner, f"{name}/output_dense"), f"{name}/layer_norm", config)

    config = model.encoder.config
    source_mask = np.broadcast_to(
        batch["attention_mask"][:, None, :] > 0, (3, SOURCE.shape[1], SOURCE.shape[1])
    )
    memory = embed(batch["input_ids"], "encoder", config)
    for i in range(config.num_hidden_layers):
        name = f"encoder/layer_{i}"
        memory = attention(memory, memory, source_mask, f"{name}/self_attention", config)
        memory = feed_forward(memory, f"{name}/feed_forward", config)
    config = model.decoder.config
    length = batch["decoder_input_ids"].shape[1]
    causal = np.tril(np.ones((length, length), bool))
    target_mask = causal[None] & (batch["decoder_attention_mask"][:, None, :] > 0)
    cross_mask = np.broadcast_to(
        batch["attention_mask"][:, None, :] > 0, (3, length, SOURCE.shape[1])
    )
    hidden = embed(batch["decoder_input_ids"], "decoder", config)
    for i in range(config.num_hidden_layers):
        name = f"decoder/layer_{i}"
        hidden = attention(hidden, hidden, target_mask, f"{name}/self_attention", config)
        hidden = attention(hidden, memory, cross_mask, f"{name}/cross_attention", config)
        hidden = feed_forward(hidden, f"{name}/feed_forward", config)
    words = w["decoder/embeddings/word_embeddings/embeddings"]
    return hidden @ words.T + w["decoder/output_bias"]


@pytest.mark.parametrize("sharing", ["none", "word_embeddings", "all"])
def test_forward_pass_equals_numpy(sharing):
    model = make_deep_model(sharing)
    np.testing.assert_allclose(model(BATCH), numpy_model(model, BATCH), atol=2e-5)


def test_sharing_holds_one_set_of_variables():
    none, words, everything = (make_deep_model(s) for s in ("none", "word_embeddings", "all"))
    assert len({id(v) for v in none.weights}) == len(none.weights)
    matrix = len(PIECES) * 12
    assert none.count_params() - words.count_params() == matrix
    cross = sum(
        int(np.prod(v.shape)) for b in everything.decoder.blocks for v in b.cross_attention.weights
    )
    assert everything.count_params() == everything.encoder.count_params() + cross + len(PIECES)
    before = everything(BATCH)
    kernel = everything.encoder.blocks[1].feed_forward.intermediate.kernel
    memory = everything.encoder(SOURCE, SOURCE_MASK)
    kernel.assign(kernel * 2)
    after = everything.decoder(
        TARGET, encoder_hidden_states=memory, encoder_attention_mask=SOURCE_MASK
    )
    assert np.abs(after - before).max() > 0.01


@pytest.mark.parametrize("sharing", ["none", "all"])
def test_later_token_never_changes_earlier_logit(sharing):
    model = make_deep_model(sharing)
    logits = model(BATCH).numpy()
    for t in range(1, TARGET.shape[1]):
        changed = {**BATCH, "decoder_input_ids": TARGET.copy()}
        changed["decoder_input_ids"][:, t:] = (TARGET[:, t:] + 1) % len(PIECES)
        other = model(changed).numpy()
        np.testing.assert_array_equal(other[:, :t], logits[:, :t])
        assert np.abs(other[:, t] - logits[:, t]).max() > 1e-3


def test_padding_changes_nothing(model):
    whole = {**BATCH, "attention_mask": np.ones_like(SOURCE)}
    del whole["decoder_attention_mask"]
    bare = {name: whole[name] for name in ("input_ids", "decoder_input_ids")}
    np.testing.assert_allclose(model(bare), model(whole), atol=1e-6)
    logits = model(BATCH).numpy()
    longer = {name: np.pad(value, ((0, 0), (0, 4))) for name, value in BATCH.items()}
    np.testing.assert_allclose(model(longer)[:, :5], logits, atol=1e-5)
    garbage = {**BATCH, "input_ids": np.where(SOURCE_MASK, SOURCE, 9)}
    np.testing.assert_allclose(model(garbage), logits, atol=1e-6)


def test_empty_source_does_not_depend_on_its_padding(model):
    def logits(length):
        return model(
            {
                "input_ids": np.zeros((3, length), np.int32),
                "attention_mask": np.zeros((3, length), np.int32),
                "decoder_input_ids": TARGET,
            }
        )

    assert np.isfinite(logits(2)).all()
    np.testing.assert_allclose(logits(2), logits(6), atol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [3, 2], [2, 1, 2]])
def test_cached_decoding_equals_the_whole_sequence(model, beams, chunks):
    """Token by token and in pieces, with padding and several rows that share their memory."""
    memory = model.encoder(SOURCE, SOURCE_MASK)
    targets = np.stack([(TARGET + k) % len(PIECES) for k in range(beams)], 1).reshape(-1, 5)
    expected = model.decoder(
        targets,
        encoder_hidden_states=np.repeat(memory, beams, 0),
        encoder_attention_mask=np.repeat(SOURCE_MASK, beams, 0),
    )
    cache = model.decoder.repeat_cache(model.decoder.init_cache(3, 8, memory), beams)
    index = 0
    for length in chunks:
        logits, cache = model.decoder(
            targets[:, index : index + length],
            encoder_attention_mask=SOURCE_MASK,
            cache=cache,
            cache_index=index,
        )
        np.testing.assert_allclose(logits, expected[:, index : index + length], atol=2e-5)
        index += length


def test_beams_that_change_places_take_their_past_along(model):
    """Only `cache["beams"]` moves; the logits are those of the whole sequence of each beam."""
    memory = model.encoder(SOURCE, SOURCE_MASK)
    beams = 2
    targets = np.stack([(TARGET + k) % len(PIECES) for k in range(beams)], 1)  # [3, 2, 5]
    cache = model.decoder.repeat_cache(model.decoder.init_cache(3, 8, memory), beams)
    parents = np.array([[[1, 0], [0, 0], [1, 1]], [[0, 1], [1, 0], [1, 0]], [[1, 1]] * 3] * 2)
    pasts = targets[:, :, :0]
    for t in range(5):
        pasts = np.concatenate([pasts, targets[:, :, t : t + 1]], axis=2)
        logits, cache = model.decoder(
            pasts[:, :, -1].reshape(6, 1),
            encoder_attention_mask=SOURCE_MASK,
            cache=cache,
            cache_index=t,
        )
        expected = model.decoder(
            pasts.reshape(6, t + 1),
            encoder_hidden_states=np.repeat(memory, beams, 0),
            encoder_attention_mask=np.repeat(SOURCE_MASK, beams, 0),
        )
        np.testing.assert_allclose(logits[:, 0], expected[:, -1], atol=2e-5)
        pasts = np.take_along_axis(pasts, parents[t][..., None], axis=1)
        moved = tf.gather(cache["beams"], parents[t], axis=1, batch_dims=1)
        cache = {**cache, "beams": moved}


def test_dense_is_that_of_keras(tmp_path):
    """Its initial values, its outputs for one position and several, what its file holds."""
    inputs = RNG.normal(size=(3, 4, 5)).astype(np.float32)
    theirs = keras.layers.Dense(7, kernel_initializer=keras.initializers.GlorotUniform(seed=2))
    ours = Dense(7, keras.initializers.GlorotUniform(seed=2))
    models = [keras.Sequential([keras.Input((4, 5)), layer]) for layer in (theirs, ours)]
    np.testing.assert_array_equal(ours.kernel, np.transpose(theirs.kernel))
    bias = RNG.normal(size=7).astype(np.float32)
    theirs.bias.assign(bias)
    ours.bias.assign(bias)
    np.testing.assert_allclose(ours(inputs), theirs(inputs), atol=1e-6)
    np.testing.assert_allclose(ours(inputs[:, :1]), theirs(inputs[:, :1]), atol=1e-6)
    for source, target in (models, models[::-1]):
        source.save_weights(tmp_path / "file.weights.h5")
        for variable in target.variables:
            variable.assign(np.zeros(variable.shape))
        target.load_weights(tmp_path / "file.weights.h5")
        np.testing.assert_allclose(target(inputs), source(inputs), atol=1e-6)


def test_parts_of_a_dense_are_projections():
    """Each has its own rows, which files and rules read and write."""
    block = make_deep_model().decoder.blocks[0]
    fused = block.self_attention.query_key_value
    kernel, bias = RNG.normal(size=(36, 12)).astype("f4"), RNG.normal(size=36).astype("f4")
    fused.kernel.assign(kernel)
    fused.bias.assign(bias)
    named = named_variables(block.self_attention)
    assert "query_key_value/kernel" not in named
    for number, name in enumerate(("query", "key", "value")):
        rows = slice(12 * number, 12 * number + 12)
        np.testing.assert_array_equal(named[f"{name}/kernel"], kernel[rows])
        np.testing.assert_array_equal(named[f"{name}/bias"], bias[rows])
        store = {}
        getattr(block.self_attention, name).save_own_variables(store)
        np.testing.assert_array_equal(store["0"], kernel[rows].T)
        np.testing.assert_array_equal(store["1"], bias[rows])
    named["key/kernel"].assign(np.zeros((12, 12)))
    kernel[12:24] = 0
    np.testing.assert_array_equal(fused.kernel, kernel)
    for wrong in (0.5, np.zeros(12), np.zeros((12, 1)), np.zeros((1, 12))):
        with pytest.raises(ValueError, match=r"kernel must be assigned .* \(12, 12\), received"):
            named["key/kernel"].assign(wrong)
    np.testing.assert_array_equal(fused.kernel, kernel)
    with pytest.raises(ValueError, match="should be stored as 2 tensors.*found 1"):
        block.self_attention.key.load_own_variables({"0": kernel[:12]})


def test_cache_update_writes_only_its_positions():
    old = np.zeros((2, 3, 6, 4), np.float32)
    new = RNG.normal(size=(2, 3, 2, 4)).astype(np.float32)
    keys, values = map(np.asarray, write_cache((old, old + 1), (new, -new), 3))
    np.testing.assert_array_equal(keys[:, :, 3:5], new)
    np.testing.assert_array_equal(values[:, :, 3:5], -new)
    rest = [0, 1, 2, 5]
    assert not np.any(keys[:, :, rest]) and np.all(values[:, :, rest] == 1)


def test_decoder_without_cross_attention_is_a_language_model():
    config = bg.BertGenerationConfig(
        vocab_size=11,
        hidden_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=9,
        max_position_embeddings=8,
    )
    decoder = bg.BertGenerationDecoder(config)
    ids = np.array([[2, 5, 7]], np.int32)
    logits = decoder(ids)
    assert logits.shape == (1, 3, 11)
    cache = decoder.init_cache(1, 4)
    for t in range(3):
        step, cache = decoder(ids[:, t : t + 1], cache=cache, cache_index=t)
        np.testing.assert_allclose(step[:, 0], logits[:, t], atol=1e-5)
    with pytest.raises(ValueError, match="takes no encoder_hidden_states"):
        decoder(ids, encoder_hidden_states=np.zeros((1, 2, 6)))
    with pytest.raises(ValueError, match="decoder must have cross-attention"):
        bg.EncoderDecoderModel(bg.BertGenerationEncoder(config), decoder)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["none", "word_embeddings", "all"])
def test_keras_files_give_identical_logits(tmp_path, sharing):
    model = make_deep_model(sharing, max_source_length=9, max_target_length=8, add_eos=True)
    logits = model(BATCH).numpy()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(BATCH), logits)
    assert loaded.get_config() == model.get_config()
    assert loaded.count_params() == model.count_params()
    text = ["the man saw a bird, who sang."]
    with eagerly():
        assert loaded.generate(text, max_new_tokens=5) == model.generate(text, max_new_tokens=5)

    model.save_weights(tmp_path / "model.weights.h5")
    other = make_deep_model(sharing, seed=2, max_source_length=9, max_target_length=8)
    assert np.abs(other(BATCH) - logits).max() > 0.1
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(BATCH), logits)


def test_encoder_and_decoder_save_alone(tmp_path):
    model = make_deep_model("all")
    memory = model.encoder(SOURCE, SOURCE_MASK)
    model.encoder.save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    np.testing.assert_array_equal(loaded(SOURCE, SOURCE_MASK), memory)
    model.decoder.save(tmp_path / "decoder.keras")
    loaded = keras.saving.load_model(tmp_path / "decoder.keras")
    np.testing.assert_array_equal(
        loaded(TARGET, encoder_hidden_states=memory),
        model.decoder(TARGET, encoder_hidden_states=memory),
    )


def make_head_model(sharing="none", seed=1):
    """With the head of BERT: a transform and, unless tied, a matrix of its own."""
    config = make_small_model(seed=seed).encoder.config
    keras.utils.set_random_seed(seed)
    encoder = bg.BertGenerationEncoder(config)
    config = config.replace(
        add_cross_attention=True, head_transform="relu", tie_word_embeddings=sharing == "all"
    )
    decoder = bg.BertGenerationDecoder(config, encoder if sharing == "all" else None, sharing)
    for variable in decoder.weights:
        if variable.name in ("bias", "beta", "output_bias"):
            variable.assign(np.random.default_rng(seed).normal(0, 0.3, variable.shape))
    return bg.EncoderDecoderModel(encoder, decoder, bg.BertTokenizer(list(PIECES)))


@pytest.mark.parametrize("sharing", ["none", "all"])
def test_head_with_a_transform(sharing, tmp_path):
    model = make_head_model(sharing)
    w = {name: v.numpy() for name, v in named_variables(model.decoder).items()}
    plain = model.decoder.config.replace(head_transform=None, tie_word_embeddings=True)
    decoder = bg.BertGenerationDecoder(plain, model.encoder if sharing == "all" else None, sharing)
    for name, variable in named_variables(decoder).items():
        variable.assign(w[name])
    words, bias = decoder.embeddings.word_embeddings.embeddings.numpy(), w["output_bias"]
    logits = bg.EncoderDecoderModel(model.encoder, decoder)(BATCH).numpy()
    hidden = np.linalg.lstsq(words, (logits - bias).reshape(-1, len(words)).T)[0].T
    inner = hidden @ w["head_transform/dense/kernel"].T + w["head_transform/dense/bias"]
    inner = np.maximum(inner, 0)
    inner = inner - inner.mean(-1, keepdims=True)
    inner /= np.sqrt((inner**2).mean(-1, keepdims=True) + plain.layer_norm_eps)
    inner = inner * w["head_transform/layer_norm/gamma"] + w["head_transform/layer_norm/beta"]
    expected = inner @ (words if sharing == "all" else w["output_kernel"]).T + bias
    logits = model(BATCH).numpy()
    np.testing.assert_allclose(logits, expected.reshape(logits.shape), atol=1e-3)

    model.save_weights(tmp_path / "model.weights.h5")
    other = make_head_model(sharing, seed=2)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(BATCH), logits)
    trimmed = bg.trim_vocabulary(model, SOURCE.ravel().tolist() + TARGET.ravel().tolist())
    kept = [model.tokenizer.get_vocab()[piece] for piece in trimmed.tokenizer.get_vocab()]
    new = {old: i for i, old in enumerate(kept)}
    batch = {name: np.vectorize(lambda i: new.get(i, i))(ids) for name, ids in BATCH.items()}
    batch |= {name: BATCH[name] for name in BATCH if name.endswith("mask")}
    np.testing.assert_allclose(trimmed(batch), logits[..., kept], atol=1e-4)

    bg.freeze(model, embeddings=True)
    assert model.decoder.head_transform.trainable_variables
    names = [variable.name for variable in model.decoder.trainable_variables]
    assert ("output_kernel" in names) == (sharing == "none")
    bg.unfreeze(model)
    model.enable_lora(2, targets="head_transform/dense", train_new_weights=False)
    assert [variable.shape for variable in model.trainable_variables] == [(2, 12), (12, 2)]


def test_an_encoder_has_no_head():
    """Its config says so, whatever it was made of, and a config without a head is as before."""
    config = make_head_model().decoder.config
    encoder = bg.BertGenerationEncoder(config)
    assert encoder.config.head_transform is None and encoder.config.tie_word_embeddings
    fields = encoder.get_config()["config"].keys()
    assert not fields & {"head_transform", "tie_word_embeddings", "norm_first"}


def test_errors_name_what_was_received(model):
    with pytest.raises(ValueError, match=r"input_ids must not be longer.*26.*received 27"):
        model.encoder(np.zeros((1, 27), np.int32))
    with pytest.raises(ValueError, match="needs encoder_hidden_states, received NoneType"):
        model.decoder(TARGET)
    with pytest.raises(ValueError, match="sharing must be one of none, word_embeddings, all"):
        bg.BertGenerationDecoder(model.decoder.config, model.encoder, sharing="some")
    with pytest.raises(ValueError, match="needs an encoder to share with"):
        bg.BertGenerationDecoder(model.decoder.config, sharing="all")
    with pytest.raises(ValueError, match=r"num_hidden_layers \(2 and 3\), num_attention_heads"):
        bg.BertGenerationDecoder(model.decoder.config, model.encoder, sharing="all")
    wide = bg.BertGenerationDecoder(
        model.decoder.config.replace(hidden_size=16, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match="same hidden_size, received 12 and 16"):
        bg.EncoderDecoderModel(model.encoder, wide)
    with pytest.raises(
        ValueError, match=r"max_target_length must not exceed .*\(22\), received 23"
    ):
        bg.EncoderDecoderModel(model.encoder, model.decoder, model.tokenizer, max_target_length=23)
    with pytest.raises(ValueError, match="must not have more pieces than the encoder's vocab_size"):
        bg.EncoderDecoderModel(model.encoder, model.decoder, bg.BertTokenizer([*PIECES, "extra"]))
