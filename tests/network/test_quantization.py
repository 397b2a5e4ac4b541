"""Int8 matrices: their numbers, against Keras's own int8, and models that have them."""

import collections
import functools
import gc
import re
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import bertgen_tf as bg
from bertgen_tf.generation import compiled as generation
from bertgen_tf.network.projections import Dense
from bertgen_tf.network.quantization import quantize_matrix, quantized_linear
from bertgen_tf.network.tracing import search_graph
from bertgen_tf.network.weights import Rule, WeightsError, assign, named_variables
from tests.helpers import PIECES, make_deep_model, make_model, make_small_model

RNG = np.random.default_rng(11)
IDS = RNG.integers(6, len(PIECES), (3, 7)).astype(np.int32)
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]], np.int32)
TARGET = RNG.integers(6, len(PIECES), (3, 5)).astype(np.int32)
BATCH = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": TARGET}
TEXTS = ["the man saw a bird", "", "a young woman sang, and the old man left the house."]


def quantized(sharing="none", **kwargs):
    model = make_model(sharing, **kwargs)
    model.quantize("int8")
    return model


@functools.cache
def shared() -> bg.EncoderDecoderModel:
    """Read-only, with its compiled functions; of one layer, as tracing and compiling take long."""
    model = make_small_model()
    model.quantize("int8")
    return model


def product(rows, kernel, bias):
    """What `quantized_linear` should give, in whole numbers of 64 bits."""
    integers, scale = quantize_matrix(kernel)
    step = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30) / 127
    rounded = np.rint(rows / step).astype(np.int64)
    return (rounded @ integers.T.astype(np.int64)) * step * scale + bias


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 40), st.floats(-6, 6))
@settings(max_examples=50, deadline=None)
def test_matrices_are_rounded_to_their_greatest_value(seed, units, inputs, exponent):
    matrix = np.random.default_rng(seed).normal(size=(units, inputs)).astype(np.float32)
    matrix *= np.float32(10**exponent)
    integers, scale = quantize_matrix(matrix)
    assert (integers.dtype, scale.dtype) == (np.int8, np.float32)
    assert (np.abs(integers).max(axis=1) == 127).all() or exponent < 0  # Keras adds 1e-7 to it
    restored = integers * scale[:, None]
    assert (np.abs(restored - matrix) <= scale[:, None] * 0.5001).all()


def test_a_row_of_zeros_stays_zero():
    integers, scale = quantize_matrix(np.zeros((2, 3), np.float32))
    assert not integers.any() and np.isfinite(scale).all()
    outputs = quantized_linear(np.zeros((1, 3), np.float32), integers, scale, np.ones(2, "f4"))
    np.testing.assert_array_equal(outputs, [[1, 1]])
    none = quantized_linear(np.zeros((0, 3), np.float32), integers, scale, np.ones(2, "f4"))
    assert none.shape == (0, 2)


@pytest.mark.parametrize("form", ["eager", "plain", "xla"])
@pytest.mark.parametrize("shape", [(1, 37), (2, 37), (3, 1, 37), (2, 5, 37)])
def test_products_are_those_of_whole_numbers(shape, form):
    """Of one row, for which XLA has no product of its own, and of more."""
    inputs = RNG.normal(size=shape).astype(np.float32)
    kernel = RNG.normal(size=(29, 37)).astype(np.float32)
    bias = RNG.normal(size=29).astype(np.float32)
    integers, scale = map(tf.constant, quantize_matrix(kernel))

    def linear(inputs):
        with search_graph(form == "xla"):
            return quantized_linear(inputs, integers, scale, bias)

    if form != "eager":
        unknown = [tf.TensorSpec([None] * (len(shape) - 1) + [37], tf.float32)]
        linear = tf.function(linear, jit_compile=form == "xla", input_signature=unknown)
    outputs = linear(tf.constant(inputs)).numpy()
    assert outputs.shape == (*shape[:-1], 29)
    expected = product(inputs.reshape(-1, 37), kernel, bias)
    np.testing.assert_allclose(outputs.reshape(-1, 29), expected, rtol=1e-4, atol=1e-4)
    exact = inputs @ kernel.T + bias
    assert 1e-3 < np.abs(outputs - exact).max() < 0.5


def test_dense_is_that_of_keras():
    inputs = RNG.normal(size=(3, 4, 37)).astype(np.float32)
    theirs, ours = keras.layers.Dense(29), Dense(29, keras.initializers.GlorotUniform())
    for layer in (theirs, ours):
        layer.build((None, None, 37))
    ours.kernel.assign(tf.transpose(theirs.kernel))
    for layer in (theirs, ours):
        layer.bias.assign(np.arange(29) / 7)
    theirs.quantize("int8")
    ours.to_int8()
    np.testing.assert_array_equal(ours.kernel, np.transpose(theirs.kernel))
    np.testing.assert_allclose(ours(inputs), theirs(inputs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["none", "word_embeddings", "all"])
def test_matrices_are_int8_and_the_rest_is_not(sharing):
    model = make_deep_model(sharing)
    before = {name: v.numpy() for name, v in named_variables(model).items()}
    logits = model(BATCH).numpy()
    references = [weakref.ref(w.value) for w in model.weights if w.name == "kernel"]
    weights = len(model.weights)
    model.generate(TEXTS[0], max_new_tokens=2, jit_compile=False)
    assert not model.is_quantized
    model.quantize("int8")
    assert model.is_quantized
    gc.collect()
    assert len(references) > 8 and not any(reference() for reference in references)
    assert len(model.weights) == weights + len(references) + 2
    for name, variable in named_variables(model).items():
        if name.endswith("kernel"):
            assert variable.dtype == "int8"
            scale = named_variables(model)[f"{name}_scale"].numpy()
            source = name.replace("output_kernel", "embeddings/word_embeddings/embeddings")
            error = np.abs(variable.numpy() * scale[:, None] - before[source])
            assert (error <= 0.5001 * scale[:, None]).all()
        else:
            assert variable.dtype == "float32"
            if not name.endswith("kernel_scale"):
                np.testing.assert_array_equal(variable, before[name])
    difference = np.abs(model(BATCH) - logits)
    assert 1e-3 < difference.max() and difference.mean() < 0.1 * logits.std()
    # Once more changes nothing.
    again, functions = model(BATCH).numpy(), model.kept_functions
    model.quantize("int8")
    np.testing.assert_array_equal(model(BATCH), again)
    assert model.kept_functions is functions


def test_memory():
    """A quarter for the matrices; embeddings stay, and the output matrix comes beside them."""
    config = bg.BertGenerationConfig(
        vocab_size=7,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=5,
    )
    encoder = bg.BertGenerationEncoder(config)
    decoder = bg.BertGenerationDecoder(config.replace(add_cross_attention=True))
    model = bg.EncoderDecoderModel(encoder, decoder)

    def size(weights):
        return sum(w.value.numpy().nbytes for w in weights)

    embeddings = size([*encoder.embeddings.weights, *decoder.embeddings.weights])
    before = size(model.weights) - embeddings
    model.quantize("int8")
    output = 7 * (64 + 4)
    assert 0.25 < (size(model.weights) - embeddings - output) / before < 0.28


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5}])
def test_generation_is_the_same_in_every_form(options):
    model = shared()
    options = {"max_new_tokens": 9, "output_scores": True, **options}
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    plain = model.generate(inputs, jit_compile=False, **options)
    compiled = model.generate(inputs, **options)
    np.testing.assert_array_equal(compiled.sequences, plain.sequences)
    np.testing.assert_allclose(compiled.token_scores, plain.token_scores, atol=1e-4)
    if "do_sample" not in options:  # there the number of the example counts
        for row in range(3):
            alone = model.generate({k: v[row : row + 1] for k, v in inputs.items()}, **options)
            np.testing.assert_array_equal(alone.sequences[0], compiled.sequences[row])
            np.testing.assert_allclose(alone.scores[0], compiled.scores[row], atol=1e-5)


def test_greedy_scores_are_those_of_the_forward_pass():
    model = shared()
    output = model.generate(
        {"input_ids": IDS, "attention_mask": MASK}, max_new_tokens=9, output_scores=True
    )
    sequences = output.sequences[:, 0]
    logits = model({**BATCH, "decoder_input_ids": sequences[:, :-1]})
    expected = np.take_along_axis(
        tf.nn.log_softmax(logits).numpy(), sequences[:, 1:, None], axis=2
    )[..., 0]
    filled = output.token_scores[:, 0] != 0
    assert filled.sum() > 9
    np.testing.assert_allclose(output.token_scores[:, 0][filled], expected[filled], atol=1e-4)


@pytest.mark.slow
def test_streamed_text_is_that_of_generate():
    model = shared()
    text = TEXTS[0]  # of the bucket of `IDS`
    streamed = "".join(model.stream(text, max_new_tokens=9, tokens_per_step=3))
    assert streamed == model.generate(text, max_new_tokens=9) != ""


def traced_by(make):
    """The `tf.function`s that `make` makes, the inner ones first; none is run, nor compiled."""
    functions, original = [], tf.function

    def keep(*args, **kwargs):
        return lambda f: functions.append(original(*args, **kwargs)(f)) or functions[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf, "function", keep)
        original(make, autograph=False).get_concrete_function()
    return functions


@pytest.mark.parametrize("jit_compile", [False, True])
def test_products_are_of_integers_under_xla_only(jit_compile):
    model = shared()
    config = bg.GenerationConfig(max_new_tokens=3)
    prompt, seeds = np.full([3, 1], 3, np.int32), np.zeros([3, 2], np.int32)
    inputs = [tf.constant(tensor) for tensor in (IDS, MASK, prompt, seeds)]

    def generate():
        generation.generation_function(model, config, jit_compile)(*inputs)

    def stream():
        start, advance = generation.streaming_functions(
            model, config, jit_compile, tokens_per_step=1
        )
        advance(start(*inputs))

    for make in (generate, stream):
        kinds = collections.Counter()
        for function in traced_by(make):
            for concrete in function._list_all_concrete_functions():
                graph = concrete.graph.as_graph_def()
                for node in (*graph.node, *(n for f in graph.library.function for n in f.node_def)):
                    if "MatMul" in node.op:
                        kinds[node.attr["Ta" if "Ta" in node.attr else "T"].type] += 1
        assert kinds[tf.float32.as_datatype_enum] > 3  # attention
        assert (kinds[tf.int8.as_datatype_enum] > 10) == jit_compile


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [False, True])
def test_compiled_code_has_no_second_copy_of_a_matrix(quantize):
    """Neither transposed, nor as float32: what XLA takes out of the loop would be one."""
    model = shared() if quantize else make_small_model()
    matrices = {tuple(w.shape) for w in model.weights if w.name.endswith("kernel")}
    matrices |= {tuple(model.decoder.embeddings.word_embeddings.embeddings.shape)}
    prompt, seeds = np.full([1, 1], 3, np.int32), np.zeros([1, 2], np.int32)
    inputs = [tf.constant(tensor) for tensor in (IDS[:1], MASK[:1], prompt, seeds)]
    config = bg.GenerationConfig(max_new_tokens=5)
    search, *_ = traced_by(lambda: generation.generation_function(model, config, True)(*inputs))
    hlo = search.experimental_get_compiler_ir(*inputs, tf.constant(1))(stage="optimized_hlo")
    # Instructions that run, not those within fusions, which stay in registers.
    running = re.sub(r"(?ms)^%fused_computation.*?^}$", "", hlo)
    found = re.findall(r"= (\w+)\[(\d+),(\d+)\]\S* ([\w-]+)\(", running)
    assert {"parameter", "dot"} <= {opcode for *_, opcode in found}
    made = {
        (dtype, int(rows), int(columns), opcode)
        for dtype, rows, columns, opcode in found
        if opcode not in ("parameter", "get-tuple-element", "bitcast")
    }
    for rows, columns in matrices:
        for shape in ((rows, columns), (columns, rows)):
            assert not [one for one in made if one[1:3] == shape]


def test_presets_and_keras_files_keep_them(tmp_path):
    model = quantized(max_source_length=20)
    model.save_to_preset(tmp_path / "preset")
    model.save(tmp_path / "model.keras")
    for loaded in (
        bg.EncoderDecoderModel.from_preset(tmp_path / "preset"),
        keras.models.load_model(tmp_path / "model.keras"),
    ):
        assert loaded.is_quantized and loaded.get_config() == model.get_config()
        ours, theirs = named_variables(model), named_variables(loaded)
        assert list(ours) == list(theirs)
        for name, variable in ours.items():
            assert theirs[name].dtype == variable.dtype
            np.testing.assert_array_equal(theirs[name], variable)
        np.testing.assert_array_equal(loaded(BATCH), model(BATCH))


@pytest.mark.slow
def test_after_training(tmp_path):
    """Nothing of the optimizer, which knew the float32 matrices, is left."""
    model = make_small_model(max_source_length=20)
    model.compile()
    model.fit(TEXTS, TEXTS, verbose=0)
    optimizer = weakref.ref(model.optimizer)
    model.quantize("int8")
    gc.collect()
    assert optimizer() is None
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(BATCH), model(BATCH))


def test_a_trimmed_vocabulary_keeps_the_logits():
    model = quantized(max_source_length=20)
    trimmed = bg.trim_vocabulary(model, TEXTS)
    pieces = trimmed.tokenizer.get_config()["vocabulary"]
    old = [model.tokenizer.get_config()["vocabulary"].index(piece) for piece in pieces]
    ids = RNG.integers(0, len(old), (2, 6)).astype(np.int32)
    logits = trimmed({"input_ids": ids, "decoder_input_ids": ids})
    whole = model({name: np.take(old, ids) for name in ("input_ids", "decoder_input_ids")})
    np.testing.assert_allclose(logits, np.take(whole, old, axis=2), atol=1e-5)


@pytest.mark.slow
def test_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make_small_model(seed=6)
    finally:
        keras.config.set_dtype_policy("float32")
    model.quantize("int8")
    assert model.encoder(IDS).dtype == tf.bfloat16 and model(BATCH).dtype == tf.float32
    exact = make_small_model(seed=6)
    exact.quantize("int8")
    logits = exact(BATCH).numpy()
    np.testing.assert_allclose(model(BATCH), logits, atol=0.1 * logits.std())
    assert model.generate(TEXTS[0], max_new_tokens=3)


def test_what_they_are_not_for(tmp_path):
    model = quantized()
    model.compile()
    for train in (lambda: model.fit(TEXTS, TEXTS), lambda: model.train_on_batch(BATCH, TARGET)):
        with pytest.raises(ValueError, match="cannot be trained.*Train the float32 model"):
            train()
    for stack in (model, model.encoder, model.decoder):
        with pytest.raises(ValueError, match="Save the float32 model"):
            stack.save_to_huggingface(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
    float32 = make_model()
    with pytest.raises(WeightsError, match="is float32, but layer_0/.*kernel is int8"):
        assign(
            named_variables(model.encoder),
            {name: v.numpy() for name, v in named_variables(float32.encoder).items()},
            [Rule("(.*)", r"\1")],
            source="a float32 model",
        )


def test_modes_that_there_are_not():
    model = make_model()
    for stack in (model.encoder, model.decoder):
        with pytest.raises(ValueError, match="Call quantize of the EncoderDecoderModel"):
            stack.quantize("int8")
    for mode in ("int4", "float8"):
        with pytest.raises(ValueError, match=f"must be one of int8, received '{mode}'"):
            model.quantize(mode)
    config = keras.quantizers.Int8QuantizationConfig(
        weight_quantizer=keras.quantizers.AbsMaxQuantizer(axis=0, value_range=(-7, 7))
    )
    with pytest.raises(ValueError, match="must not have quantizers of its own"):
        model.quantize("int8", config=config)
    assert not model.is_quantized
    assert all(w.dtype == "float32" for w in model.weights)
    with pytest.raises(ValueError, match="quantization must be None or one of int8, received 'x'"):
        bg.BertGenerationConfig(quantization="x")
    shared = make_model("all")
    config = shared.decoder.config.replace(quantization="int8")
    with pytest.raises(ValueError, match=r"they differ in quantization \(None and int8\)"):
        bg.BertGenerationDecoder(config, shared.encoder, "all")


def with_a_head_of_its_own() -> bg.EncoderDecoderModel:
    model = make_model()
    config = model.decoder.config.replace(tie_word_embeddings=False, head_transform="relu")
    keras.utils.set_random_seed(3)
    return bg.EncoderDecoderModel(model.encoder, bg.BertGenerationDecoder(config), model.tokenizer)


@pytest.mark.parametrize("sharing", ["none", "word_embeddings", "all", "untied"])
def test_and_back(sharing):
    if sharing == "untied":
        exact, model = with_a_head_of_its_own(), with_a_head_of_its_own()
    else:
        exact, model = make_deep_model(sharing), make_deep_model(sharing)
    before = {name: v.numpy() for name, v in named_variables(exact).items()}
    logits = exact(BATCH).numpy()
    model.dequantize()  # which changes nothing
    model.quantize("int8")
    int8 = {name: v.numpy() for name, v in named_variables(model).items()}
    paths = [
        weight.path for weight in bg.EncoderDecoderModel.from_config(model.get_config()).weights
    ]
    assert [weight.path for weight in model.weights] == paths

    model.dequantize()
    assert not model.is_quantized and model.get_config() == exact.get_config()
    # In the order of a new model: by it Keras copies weights.
    assert [weight.path for weight in model.weights] == [weight.path for weight in exact.weights]
    assert len(model.trainable_variables) == len(exact.trainable_variables) == len(model.weights)
    after = {name: v.numpy() for name, v in named_variables(model).items()}
    assert list(after) == list(before)
    for name, array in after.items():
        if name.endswith("kernel"):
            step = int8[f"{name}_scale"][:, np.newaxis]
            np.testing.assert_array_equal(array, int8[name] * step)
            assert (np.abs(array - before[name]) <= 0.5001 * step).all()
        else:
            np.testing.assert_array_equal(array, before[name])
    assert np.corrcoef(model(BATCH).numpy().ravel(), logits.ravel())[0, 1] > 0.99

    model.quantize("int8")
    again = {name: v.numpy() for name, v in named_variables(model).items()}
    assert list(again) == list(int8)
    for name, array in again.items():
        if array.dtype == np.int8:
            np.testing.assert_array_equal(array, int8[name])
        else:
            np.testing.assert_allclose(array, int8[name], rtol=1e-5)


def test_what_was_int8_is_trained():
    model = quantized(max_source_length=20)
    model.encoder.blocks[0].trainable = False
    model.compile(run_eagerly=True)
    with pytest.raises(ValueError, match=r"or call dequantize\(\) first"):
        model.fit(TEXTS, TEXTS)
    model.dequantize()
    before = {weight.path: weight.numpy() for weight in model.weights}
    model.compile(run_eagerly=True, optimizer=keras.optimizers.SGD(1.0))
    model.fit(TEXTS, TEXTS, verbose=0)
    frozen = {w.path for w in model.encoder.blocks[0].weights}
    same = {w.path for w in model.weights if np.array_equal(w, before[w.path])}
    assert frozen == {w.path for w in model.weights if not w.trainable} and frozen <= same
    assert any(path.endswith("/kernel") for path in before.keys() - same)
    model.encoder.blocks[0].trainable = True
    assert len(model.trainable_variables) == len(model.weights)
