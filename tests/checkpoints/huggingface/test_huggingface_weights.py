"""Weights of Hugging Face checkpoints: the numbers of transformers, names, sharing, sizes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bertgen_tf as bg
from bertgen_tf.checkpoints.huggingface import weights as names
from bertgen_tf.network.weights import named_variables
from tests.helpers import PIECES, SHARED, make_deep_model
from tests.helpers.huggingface import assert_close

needs_shared = pytest.mark.skipif(
    not (SHARED / "golden/hf").is_dir(), reason="needs the folder `shared` beside the project"
)


def check_golden(model, golden):
    memory = model.encoder(golden["input_ids"], golden["attention_mask"])
    assert_close(memory, golden["encoder_last_hidden_state"], golden["attention_mask"])
    inputs = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    x = {name: golden[name] for name in inputs}
    assert_close(model(x), golden["decoder_logits"])
    # As transformers shifts labels; what is ignored becomes padding.
    labels = golden["labels"]
    shifted = np.concatenate([np.full((len(labels), 1), 2), np.maximum(labels[:, :-1], 0)], 1)
    x |= {"decoder_input_ids": shifted, "decoder_attention_mask": (shifted != 0).astype("int32")}
    model.compile(optimizer="sgd", run_eagerly=True, jit_compile=False)
    loss = model.evaluate(
        x, np.maximum(labels, 0), sample_weight=(labels >= 0).astype(np.float32), verbose=0
    )[0]
    assert_close(loss, golden["loss"])


def check_generated(model, golden, case, options):
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(inputs, jit_compile=False, **options)
    expected = golden[f"generate/{case}/sequences"]
    ours = output.sequences.reshape(len(expected), -1)
    until = [[*row[1:].tolist(), 1] for row in (*ours, *expected)]
    rows = [row[: row.index(1)] for row in until]
    assert rows[: len(ours)] == rows[len(ours) :]
    assert any(rows)
    if f"generate/{case}/scores" in golden:
        scores = golden[f"generate/{case}/scores"].reshape(output.scores.shape)
        np.testing.assert_allclose(output.scores, scores, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sharing", "settings"),
    [
        ("v4_shared", "all", {"max_new_tokens": 20}),
        ("v5_mixed", "none", {"max_length": 10}),
        (
            "v5_pair",
            "none",
            {
                "max_length": 12,
                "min_length": 3,
                "num_beams": 2,
                "length_penalty": 0.7,
            },
        ),
    ],
)
def test_encoder_decoder_gives_the_numbers_of_transformers(checkpoints, name, sharing, settings):
    """Also the settings that the folder tells: "own" has no options."""
    model = bg.EncoderDecoderModel.from_huggingface(checkpoints / name)
    assert model.decoder.sharing == sharing and model.tokenizer is None
    assert model.generation_config == bg.GenerationConfig(**settings)
    golden = np.load(checkpoints / name / "golden.npz")
    check_golden(model, golden)
    cases = json.loads((checkpoints / name / "golden.json").read_text())["generate"]
    for case, options in cases.items():
        check_generated(
            model,
            golden,
            case,
            options
            if case == "own"
            else {"num_beams": 1, "min_length": 3 * (name == "v5_pair"), **options},
        )


@needs_shared
@pytest.mark.parametrize("name", ["small", "shared", "wide_vocab"])
def test_golden_models(name):
    """Larger ones; tests/test_generation.py compares what they generate."""
    folder = SHARED / "golden/hf" / name
    check_golden(bg.EncoderDecoderModel.from_huggingface(folder), np.load(folder / "golden.npz"))


@pytest.mark.slow
@needs_shared
def test_converted_originals():
    """Encoder and decoder as transformers' converter makes them of a TF Hub original."""
    hub = SHARED / "hub"
    golden = np.load(hub / "tf1hub_bertseq2seq_shared_tiny.golden.npz")
    encoder = bg.BertGenerationEncoder.from_huggingface(hub / "hf440_converted_shared_encoder")
    decoder = bg.BertGenerationDecoder.from_huggingface(hub / "hf440_converted_shared_decoder")
    mask = golden["input_mask"]
    memory = encoder(golden["input_ids"], mask)
    assert_close(memory, golden["encoder_output"], mask)
    logits = decoder(
        golden["decoder_input_ids"], encoder_hidden_states=memory, encoder_attention_mask=mask
    )
    some = mask.any(1)  # an empty text attends to padding, which is different in the original
    assert 4 <= some.sum()
    assert_close(logits[some], golden["decoder_logits"][some])
    model = bg.EncoderDecoderModel(encoder, decoder)
    assert model.generate({"input_ids": golden["input_ids"][:1]}).sequences.shape[1] == 1


@pytest.mark.parametrize(
    ("name", "positions", "act"), [("v5_bert", 22, "gelu_new"), ("v5_roberta", 23, "gelu")]
)
def test_bert_and_roberta_are_encoders(checkpoints, name, positions, act):
    """bfloat16 and float16; heads, pooler, token types and RoBERTa's position offset."""
    encoder = bg.BertGenerationEncoder.from_huggingface(checkpoints / name)
    golden = np.load(checkpoints / name / "golden.npz")
    mask = golden["attention_mask"]
    assert_close(encoder(golden["input_ids"], mask), golden["output"], mask)
    assert encoder.config.max_position_embeddings == positions
    assert encoder.config.hidden_act == act
    assert {v.dtype for v in encoder.weights} == {"float32"}
    first = bg.BertGenerationEncoder.from_huggingface(checkpoints / name, num_layers=[1])
    for one, two in zip(first.blocks[0].weights, encoder.blocks[1].weights, strict=True):
        np.testing.assert_array_equal(one, two)


def test_lone_decoder_without_cross_attention(checkpoints):
    """As stored; with cross-attention only if asked for; with some layers."""
    folder = checkpoints / "v5_language_model"
    golden = np.load(folder / "golden.npz")
    decoder = bg.BertGenerationDecoder.from_huggingface(folder)
    mask = golden["attention_mask"]
    assert_close(decoder(golden["input_ids"], mask), golden["logits"], mask)
    assert not decoder.config.add_cross_attention
    crossed = bg.BertGenerationDecoder.from_huggingface(
        folder, cross_attention="self_attention", num_layers=[1]
    )
    block = crossed.blocks[0]
    stored = named_variables(decoder.blocks[1].self_attention)
    for attention in (block.cross_attention, block.self_attention):
        variables = named_variables(attention)
        assert variables.keys() == stored.keys()
        for name, variable in variables.items():
            np.testing.assert_array_equal(variable, stored[name])
    np.testing.assert_array_equal(crossed.output_bias, decoder.output_bias)
    with pytest.raises(ValueError, match="cross_attention must be one of .*, received 'copy'"):
        bg.BertGenerationDecoder.from_huggingface(folder, cross_attention="copy")


def test_shared_stacks(checkpoints, copy):
    """Stored once under either name, twice, tied or not."""
    once = bg.EncoderDecoderModel.from_huggingface(checkpoints / "v4_shared")
    x = {"input_ids": np.array([[5, 6, 7]]), "decoder_input_ids": np.array([[2, 9]])}
    expected = once(x)
    two = bg.EncoderDecoderModel.from_huggingface(checkpoints / "v4_shared", share=False)
    assert two.decoder.sharing == "none" and len(two.weights) > len(once.weights)
    np.testing.assert_array_equal(two(x), expected)
    names = {}

    def to_encoder(tensors):
        for name in [n for n in tensors if n.startswith("decoder.bert.")]:
            if ".crossattention." not in name and ".layer.0." not in name:
                names[name] = name.replace("decoder.bert.", "encoder.")
                tensors[names[name]] = tensors.pop(name)

    mixed = copy("v4_shared", tensors=to_encoder)
    assert names
    np.testing.assert_array_equal(bg.EncoderDecoderModel.from_huggingface(mixed)(x), expected)
    np.testing.assert_array_equal(
        bg.EncoderDecoderModel.from_huggingface(mixed, share=False)(x), expected
    )


def test_differing_stacks_are_not_shared(tmp_path, copy):
    model = make_deep_model("all", make_tokenizer=lambda: bg.BertTokenizer(list(PIECES)))
    model.save_to_huggingface(tmp_path / "twice")
    stored = load_file(tmp_path / "twice/model.safetensors")
    stored["encoder.encoder.layer.1.output.dense.bias"][3] += 1
    save_file(stored, tmp_path / "twice/model.safetensors", metadata={"format": "pt"})
    read = bg.EncoderDecoderModel.from_huggingface
    with pytest.raises(ValueError, match=r"1 tensors differ, such as encoder.encoder.layer.1.out"):
        read(tmp_path / "twice", share=True)
    # transformers 5 unties the stacks, trains them, and keeps the flag.
    with pytest.warns(UserWarning, match="says that encoder and decoder share .*, but 1 tensors"):
        default = read(tmp_path / "twice")
    for two in (default, read(tmp_path / "twice", share=False)):
        assert two.decoder.sharing == "none"
        bias = two.encoder.blocks[1].feed_forward.output_dense.bias
        np.testing.assert_array_equal(bias, stored["encoder.encoder.layer.1.output.dense.bias"])
    make_deep_model("word_embeddings").save_to_huggingface(tmp_path / "words")
    assert read(tmp_path / "words").decoder.sharing == "word_embeddings"
    stored = load_file(tmp_path / "words/model.safetensors")
    stored["encoder.embeddings.word_embeddings.weight"][5] += 1
    save_file(stored, tmp_path / "words/model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="such as encoder.embeddings.word_embeddings.weight"):
        assert read(tmp_path / "words").decoder.sharing == "none"

    def untie(values):
        del values["tie_encoder_decoder"]

    # Without the flag, transformers 5 misses what is stored once; share=True knows better.
    once = copy("v4_shared", config=untie)
    with pytest.raises(ValueError, match="there is no encoder.embeddings.word_embeddings.weight"):
        bg.EncoderDecoderModel.from_huggingface(once)
    assert bg.EncoderDecoderModel.from_huggingface(once, share=True).decoder.sharing == "all"


def test_what_is_shared_is_in_memory_once():
    """A large checkpoint stores it twice."""
    one = np.arange(6.0).reshape(2, 3)
    words = "embeddings.word_embeddings.weight"
    tensors = {f"encoder.{words}": one, f"decoder.bert.{words}": one.copy(), "encoder.x": one}
    tensors["decoder.bert.x"] = one + 1
    assert names.unify_shared(tensors, "word_embeddings", "decoder.bert.") == []
    assert tensors[f"encoder.{words}"] is tensors[f"decoder.bert.{words}"]
    assert names.unify_shared(tensors, "all", "decoder.bert.") == ["encoder.x"]


def test_the_head_must_be_tied(copy):
    """Its copies are accepted, as transformers 4 stores them in pytorch_model.bin."""

    def add(tensors, change=0.0):
        tensors["decoder.lm_head.decoder.bias"] = tensors["decoder.lm_head.bias"]
        words = tensors["decoder.bert.embeddings.word_embeddings.weight"]
        tensors["decoder.lm_head.decoder.weight"] = words + np.float32(change)

    folder = copy("v4_shared", tensors=add)
    bg.EncoderDecoderModel.from_huggingface(folder)
    stored = load_file(folder / "model.safetensors")
    add(stored, change=1)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match="softmax that is tied .*lm_head.decoder.weight and"):
        bg.EncoderDecoderModel.from_huggingface(folder)


def test_old_names_and_buffers(copy):
    """gamma and beta, names with and without prefix, position_ids, no pooler."""

    def rename(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if "pooler" in name:
                continue
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            name = name.replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[name.removeprefix("roberta.")] = tensor
        tensors["embeddings.position_ids"] = np.arange(25)[np.newaxis]

    folder = copy("v5_roberta", tensors=rename)
    encoder = bg.BertGenerationEncoder.from_huggingface(folder)
    golden = np.load(folder / "golden.npz")
    mask = golden["attention_mask"]
    assert_close(encoder(golden["input_ids"], mask), golden["output"], mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 10**30}, r"word_embeddings.weight has shape \(47, 12\), not \(1000"),
        ({"vocab_size": 46}, r"word_embeddings.weight has shape \(47, 12\), not \(46, 12\)"),
        ({"max_position_embeddings": 10**13}, r"position_embeddings.weight has shape \(20, 12\)"),
        ({"num_hidden_layers": 10**9}, r"there are 2 layers encoder.encoder.layer.N.*, not 10000"),
        ({"intermediate_size": 10**13}, r"layer.0.intermediate.dense.weight has shape \(10, 12\)"),
        (
            {"hidden_size": 12 * 10**12},
            r"word_embeddings.weight has shape \(47, 12\), not \(47, 1200",
        ),
    ],
)
def test_sizes_are_compared_before_anything_is_built(copy, change, message):
    """Of both stacks, and of lone ones; sizes that no memory holds."""

    def both(values):
        for side in ("encoder", "decoder"):
            values[side].update(change)

    folder = copy("v4_shared", config=both)
    with pytest.raises(ValueError, match="v4_shared should hold weights of the sizes.*" + message):
        bg.EncoderDecoderModel.from_huggingface(folder)
    alone = copy("v5_language_model", config=lambda values: values.update(change))
    with pytest.raises(ValueError, match="_model should hold weights of the sizes in its config"):
        bg.BertGenerationDecoder.from_huggingface(alone)
    bert = copy("v5_bert", config=lambda values: values.update(change))
    with pytest.raises(ValueError, match="v5_bert should hold weights of the sizes in its config"):
        bg.BertGenerationEncoder.from_huggingface(bert)


def test_token_types_of_a_strange_shape(copy):
    def change(tensors):
        tensors["roberta.embeddings.token_type_embeddings.weight"] = np.array(3, np.float32)

    folder = copy("v5_roberta", tensors=change)
    with pytest.raises(ValueError, match=r"v5_roberta should hold .* are \(25, 12\) and \(\)"):
        bg.BertGenerationEncoder.from_huggingface(folder)
