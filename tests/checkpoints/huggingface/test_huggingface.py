"""HuggingFace checkpoints: against numbers of transformers, and there and back.

`data/huggingface.zip` holds what transformers 4.57 and 5.23 wrote; tools/make_huggingface_golden.py
makes it.
"""

import json
import os
import zipfile

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bertgen_tf as bg
from bertgen_tf.checkpoints import huggingface
from bertgen_tf.checkpoints.huggingface import config as configs
from bertgen_tf.checkpoints.huggingface import generation_settings as generations
from bertgen_tf.checkpoints.huggingface import weights as names
from bertgen_tf.network.weights import named_variables
from tests.helpers import GOLDEN, PIECES, SHARED, WORDS, make_deep_model, write_checkpoint

needs_shared = pytest.mark.skipif(
    not (SHARED / "golden/hf").is_dir(), reason="needs the folder `shared` beside the project"
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders that transformers wrote; read-only."""
    folder = tmp_path_factory.mktemp("huggingface")
    with zipfile.ZipFile(GOLDEN / "huggingface.zip") as file:
        file.extractall(folder)
    return folder


@pytest.fixture
def copy(checkpoints, tmp_path):
    """Copies a checkpoint, with changes of its JSON files and tensors."""

    def make(name, config=None, generation=None, tensors=None):
        folder = tmp_path / name
        folder.mkdir()
        for path in (checkpoints / name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for file, change in (("config.json", config), ("generation_config.json", generation)):
            if change is not None:
                values = json.loads((folder / file).read_text())
                change(values)
                (folder / file).write_text(json.dumps(values))
        if tensors is not None:
            stored = load_file(folder / "model.safetensors")
            tensors(stored)
            save_file(stored, folder / "model.safetensors")
        return folder

    return make


def assert_close(ours, expected, mask=None):
    """Within 1e-5 of the size of the values."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    if mask is not None:
        ours, expected = ours[mask == 1], expected[mask == 1]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def assert_same_model(one, two):
    """The same settings, vocabulary, sharing and weights, bit for bit."""
    configs = [{**model.get_config(), "source_checkpoint": None} for model in (one, two)]
    assert configs[0] == configs[1]  # but for the folder that they were read from
    ours, theirs = named_variables(one), named_variables(two)
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert len(two.weights) == len(one.weights)


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
    assert names.unify_shared(tensors, "word_embeddings") == []
    assert tensors[f"encoder.{words}"] is tensors[f"decoder.bert.{words}"]
    assert names.unify_shared(tensors, "all") == ["encoder.x"]


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


# What transformers 4.10 writes into the dictionary of a decoder, besides the sizes.
V4_DEFAULTS = {
    "_name_or_path": "",
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.10.0",
    "use_bfloat16": False,
}


def test_config_of_transformers_4(copy):
    """Defaults change nothing; settings of generation in config.json count where they are alone."""

    def change(values):
        for side in ("encoder", "decoder"):
            values[side].update(V4_DEFAULTS)
        values["decoder"]["num_beams"] = 3
        values["decoder"]["length_penalty"] = 2.0
        values.update(max_length=9, num_beams=4, early_stopping=True, vocab_size=47)

    folder = copy("v4_shared", config=change)
    read = bg.EncoderDecoderModel.from_huggingface
    assert read(folder).generation_config == bg.GenerationConfig(max_new_tokens=20)
    (folder / "generation_config.json").unlink()
    assert read(folder).generation_config == bg.GenerationConfig(
        max_length=9, num_beams=4, early_stopping=True, length_penalty=2.0
    )
    values = json.loads((folder / "config.json").read_text())
    del values["max_length"]
    (folder / "config.json").write_text(json.dumps(values))
    assert (
        read(folder).generation_config.max_new_tokens == 20
    )  # the positions, not transformers' 20


def test_all_that_config_asks_for_in_vain_is_one_error(copy):
    def change(values):
        values["decoder"].update(
            position_embedding_type="relative_key", hidden_act="silu", is_decoder=False
        )
        values["encoder"].update(pruned_heads={"0": [1]}, new_option=7, vocab_size=0)
        values["encoder"].update(hidden_dropout_prob=2, num_attention_heads="x")
        values["tie_word_embeddings"] = False

    folder = copy("v4_shared", config=change)
    with pytest.raises(ValueError, match="config.json asks for what is not supported") as error:
        bg.EncoderDecoderModel.from_huggingface(folder)
    for part in (
        "decoder.position_embedding_type='relative_key' (only 'absolute')",
        "decoder.hidden_act='silu' (only gelu, gelu_python, gelu_new",
        "decoder.is_decoder=False (only True)",
        "encoder.pruned_heads={'0': [1]} (only {})",
        "encoder.new_option=7 (unknown)",
        "encoder: vocab_size must be an integer of at least 1, received 0",
        "encoder: hidden_dropout_prob must be a number in [0, 1), received 2",
        "encoder: num_attention_heads must be an integer of at least 1, received 'x'",
        "tie_word_embeddings=False (only True)",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_of_generation_are_in_the_same_error(copy):
    """Also where version 4 wrote all into config.json, and beside a decoder that cannot be."""

    def change(values):
        values["decoder"].update(hidden_act="silu", num_beam_groups=3)
        values["encoder"]["new_option"] = 7

    folder = copy("v4_shared", config=change)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="decoder.hidden_act='silu'.*num_beam_groups=3") as e:
        bg.EncoderDecoderModel.from_huggingface(folder)
    assert "\n" not in str(e.value)
    values = json.loads((folder / "config.json").read_text())
    values["decoder"]["model_type"] = "roberta"
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text('{"guidance_scale": 2}')
    with pytest.raises(ValueError, match="new_option=7.*'roberta'.*n_config.json.*dance_scale=2"):
        bg.EncoderDecoderModel.from_huggingface(folder)


@pytest.mark.parametrize(
    ("file", "side", "field", "token"),
    [
        ("generation_config.json", None, "decoder_start_token_id", 99),
        ("generation_config.json", None, "pad_token_id", "x"),
        ("config.json", None, "eos_token_id", -1),
        ("generation_config.json", None, "eos_token_id", [1, 47]),
        ("generation_config.json", None, "pad_token_id", [0, 1]),
        ("config.json", "decoder", "bos_token_id", 47),
    ],
)
def test_ids_that_cannot_be(copy, file, side, field, token):
    """The error names the file and the field, and nothing else."""
    folder = copy("v4_shared")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        if name == "config.json":
            for ids in ("pad_token_id", "bos_token_id", "eos_token_id"):
                values["encoder"].pop(ids, None)
        for part in (values, values.get("decoder", {})):
            part.pop(field, None)
            if field == "bos_token_id":
                part.pop("decoder_start_token_id", None)
        if name == file:
            (values[side] if side else values)[field] = token
        (folder / name).write_text(json.dumps(values))
    name = f"{side}.{field}" if side else field
    with pytest.raises(ValueError) as error:
        bg.EncoderDecoderModel.from_huggingface(folder)
    message = f"here: {name}={token!r} (only an id below vocab_size=47)."
    assert str(error.value).endswith(f"{file} asks for what is not supported {message}")


def test_cross_attention_hidden_size(copy):
    """transformers 4 wants it where it is the encoder's own."""

    def change(size):
        return lambda values: values["decoder"].update(cross_attention_hidden_size=size)

    folder = copy("v4_shared", config=change(12))
    assert bg.EncoderDecoderModel.from_huggingface(folder).decoder.sharing == "all"
    folder = copy("v5_pair", config=change(15))
    with pytest.raises(ValueError, match=r"decoder.cross_attention_hidden_size=15 \(only 12\)"):
        bg.EncoderDecoderModel.from_huggingface(folder)


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


def test_positions_of_a_roberta_that_tells_no_padding(checkpoints, copy):
    """Its own default counts, not the padding of the decoder."""

    def change(values):
        assert values["decoder"]["pad_token_id"] == 0
        assert values["encoder"].pop("pad_token_id") == 1

    model = bg.EncoderDecoderModel.from_huggingface(copy("v5_mixed", config=change))
    golden = np.load(checkpoints / "v5_mixed/golden.npz")
    mask = golden["attention_mask"]
    memory = model.encoder(golden["input_ids"], mask)
    assert_close(memory, golden["encoder_last_hidden_state"], mask)


def test_a_roberta_becomes_a_decoder(checkpoints):
    """All that an encoder has, of which the numbers are held to transformers'; with its ids."""
    encoder = named_variables(bg.BertGenerationEncoder.from_huggingface(checkpoints / "v5_roberta"))
    decoder = bg.BertGenerationDecoder.from_huggingface(checkpoints / "v5_roberta")
    assert decoder.config.add_cross_attention
    config = decoder.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    ours = named_variables(decoder)
    for name, variable in encoder.items():
        np.testing.assert_array_equal(ours.pop(name), variable, err_msg=name)
    assert all(name == "output_bias" or "/cross_attention/" in name for name in ours)


def test_names_and_shapes_are_those_of_transformers(checkpoints, tmp_path):
    """What we write, against what transformers wrote of the same models."""

    def shapes(folder):
        return {
            name: tensor.shape
            for path in folder.glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }

    model = bg.EncoderDecoderModel.from_huggingface(checkpoints / "v5_pair")
    model.save_to_huggingface(tmp_path / "pair")
    pair = shapes(checkpoints / "v5_pair")
    assert len(pair) > 60 and shapes(tmp_path / "pair") == pair
    for side in ("encoder", "decoder"):
        getattr(model, side).save_to_huggingface(tmp_path / side)
        alone = {n.removeprefix(f"{side}."): s for n, s in pair.items() if n.startswith(f"{side}.")}
        assert shapes(tmp_path / side) == alone
    decoder = bg.BertGenerationDecoder.from_huggingface(checkpoints / "v5_language_model")
    decoder.save_to_huggingface(tmp_path / "model")
    assert shapes(tmp_path / "model") == shapes(checkpoints / "v5_language_model")


def test_tokenizer_that_transformers_wrote(checkpoints, copy, tmp_path):
    """Its separator has no row; special tokens in a text are special tokens there."""
    folder = copy("v4_shared")
    theirs = checkpoints / "v5_tokenizer"
    for name in ("spiece.model", "tokenizer_config.json", "added_tokens.json"):
        (folder / name).write_bytes((theirs / name).read_bytes())
    model = bg.EncoderDecoderModel.from_huggingface(folder)
    golden = json.loads((theirs / "golden.json").read_text())
    assert model.tokenizer(golden["texts"]).to_list() == golden["ids"]
    assert model.tokenizer.sep_token_id is None
    model.save_to_huggingface(tmp_path / "out")
    assert_same_model(model, bg.EncoderDecoderModel.from_huggingface(tmp_path / "out"))
    (folder / "added_tokens.json").write_text('{"<new>": 42, "<::::>": 43}')
    with pytest.raises(ValueError, match="added that the vocabulary lacks: '<new>'"):
        bg.EncoderDecoderModel.from_huggingface(folder)
    (folder / "added_tokens.json").unlink()
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values.update(split_special_tokens=True, sp_model_kwargs={"enable_sampling": True})
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    tokenizer = bg.EncoderDecoderModel.from_huggingface(folder).tokenizer
    assert tokenizer.split_special_tokens and tokenizer.sp_model_kwargs == {"enable_sampling": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("model_type"), "should tell a model_type, one of .* but tells None"),
        (lambda v: v.update(model_type="t5"), "but tells 't5'"),
        (
            lambda v: v["decoder"].update(model_type="bert"),
            r"decoder with model_type 'bert' \(only bert-generation: the head of that decoder",
        ),
        (
            lambda v: v.update(encoder=None),
            r"encoder with model_type None \(only bert-generation or",
        ),
        (
            lambda v: v["encoder"].update(hidden_size=15),
            "encoder.hidden_size=15 with decoder.hidden_size=12",
        ),
        (lambda v: v["encoder"].update(is_decoder=True), r"encoder.is_decoder=True \(only False"),
        (lambda v: v["decoder"].update(eos_token_id=[1, 5]), None),
        (lambda v: v.update(eos_token_id=[1, 5]), None),
    ],
)
def test_configs_that_cannot_be_followed(copy, change, message):
    folder = copy("v4_shared", config=change)
    if message is None:  # generation_config.json says which one
        assert bg.EncoderDecoderModel.from_huggingface(folder).decoder.config.eos_token_id == 1
        return
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_huggingface(folder)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"max_new_tokens": 7, "max_length": 5}, {"max_new_tokens": 7}),
        # One of a kind comes before the other in transformers, too.
        (
            {"max_length": 6, "min_new_tokens": 4, "min_length": 2},
            {"max_length": 6, "min_new_tokens": 4},
        ),
        ({"max_length": 6, "min_length": 2}, {"max_length": 6, "min_length": 2}),
        ({"max_length": 9, "early_stopping": True}, {"max_length": 9}),  # greedy
        (
            {"max_length": 9, "num_beams": 4, "early_stopping": "never", "suppress_tokens": [5]},
            {"max_length": 9, "num_beams": 4, "early_stopping": "never", "suppress_tokens": (5,)},
        ),
        # Without do_sample transformers does not look at them.
        (
            {
                "max_length": 9,
                "do_sample": False,
                "top_k": 7,
                "temperature": 0.3,
                "top_h": 0.4,
                "epsilon_cutoff": 0.1,
                "no_repeat_ngram_size": 0,
                "repetition_penalty": None,
            },
            {"max_length": 9},
        ),
        (
            {
                "max_length": 9,
                "do_sample": True,
                "num_return_sequences": 3,
                "top_k": 7,
                "temperature": 0.3,
                "top_p": 0.9,
                "min_p": 0.1,
                "typical_p": 0.8,
                "eta_cutoff": 0.0,
            },
            {
                "max_length": 9,
                "do_sample": True,
                "num_return_sequences": 3,
                "top_k": 7,
                "temperature": 0.3,
                "top_p": 0.9,
                "min_p": 0.1,
                "typical_p": 0.8,
            },
        ),
        (
            {
                "max_length": 9,
                "repetition_penalty": 1.5,
                "encoder_repetition_penalty": 2,
                "no_repeat_ngram_size": 2,
                "encoder_no_repeat_ngram_size": 3,
                "bad_words_ids": [[5], [6, 7]],
                "sequence_bias": [[[5], 1.5], [[6, 7], -2.0]],
                "begin_suppress_tokens": [5],
                "forced_bos_token_id": 6,
                "forced_eos_token_id": [1, 9],
                "exponential_decay_length_penalty": [3, 1.5],
                "eos_token_id": [1, 9],
            },
            {
                "max_length": 9,
                "repetition_penalty": 1.5,
                "encoder_repetition_penalty": 2,
                "no_repeat_ngram_size": 2,
                "encoder_no_repeat_ngram_size": 3,
                "bad_words_ids": ((5,), (6, 7)),
                "sequence_bias": {(5,): 1.5, (6, 7): -2.0},
                "begin_suppress_tokens": (5,),
                "forced_bos_token_id": 6,
                "forced_eos_token_id": (1, 9),
                "exponential_decay_length_penalty": (3, 1.5),
                "eos_token_id": (1, 9),
            },
        ),
        # One end token is the decoder's own.
        ({"eos_token_id": [1], "max_length": 9}, {"max_length": 9}),
    ],
)
def test_settings_of_generation(copy, changes, settings):
    folder = copy("v4_shared", generation=lambda values: values.update(changes))
    model = bg.EncoderDecoderModel.from_huggingface(folder)
    assert model.generation_config == bg.GenerationConfig(**settings)
    assert model.decoder.config.eos_token_id == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"do_sample": True, "num_beam_groups": 3, "what": 1, "top_h": 0.5, "eta_cutoff": 0.1},
            "not supported here: num_beam_groups=3, what=1, top_h=0.5, eta_cutoff=0.1. Other sett",
        ),
        ({"max_length": 30}, "lets 29 tokens be generated, but the decoder has 20 positions"),
        ({"max_new_tokens": 21}, "lets 21 tokens be generated, but the decoder has 20 positions"),
        ({"num_return_sequences": 2}, "json: num_return_sequences must not exceed num_beams .*1"),
        ({"do_sample": True, "top_p": 3}, "json: top_p must be a number above 0 and not above 1"),
        (
            {"num_beams": 0},
            "num_beams must be an integer of at least 1, received 0. Other settings",
        ),
        ({"max_length": "long"}, "max_length must be an integer .* 'long'. Other settings"),
    ],
)
def test_settings_that_cannot_be_followed(copy, changes, message):
    """All in one error; other settings replace them."""
    folder = copy("v4_shared", generation=lambda values: values.update(changes))
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_huggingface(folder)
    settings = bg.GenerationConfig(max_new_tokens=3)
    model = bg.EncoderDecoderModel.from_huggingface(folder, generation_config=settings)
    assert model.generation_config == settings


@pytest.mark.slow
def test_the_start_token_is_what_we_call_bos(copy):
    """decoder_start_token_id, not bos_token_id, is what transformers starts with."""

    def change(values):
        values.update(decoder_start_token_id=7)

    folder = copy("v4_shared", config=change, generation=change)
    model = bg.EncoderDecoderModel.from_huggingface(folder)
    assert model.decoder.config.bos_token_id == 7
    sequences = model.generate({"input_ids": np.array([[5, 6]])}, max_new_tokens=2).sequences
    assert sequences[0, 0, 0] == 7
    folder.joinpath("generation_config.json").write_text('{"decoder_start_token_id": 2}')
    with pytest.raises(ValueError, match=r"token_id=7 \(generation_config.json says 2\)"):
        bg.EncoderDecoderModel.from_huggingface(folder)


def make_pair(sharing, spiece=None, **kwargs):
    make = {"make_tokenizer": lambda: bg.BertGenerationTokenizer(spiece)} if spiece else {}
    settings = bg.GenerationConfig(max_new_tokens=9, num_beams=3, early_stopping="never")
    return make_deep_model(sharing, **make, **{"generation_config": settings, **kwargs})


@pytest.mark.parametrize("sharing", ["none", "word_embeddings", "all"])
def test_there_and_back(tmp_path, spiece, sharing):
    """Weights bit for bit, settings, vocabulary, lengths; in one file or many."""
    kwargs = {
        "max_source_length": 13,
        "max_target_length": 11,
        "add_eos": True,
        "hidden_token_ids": (7, 9),
    }
    model = make_pair(sharing, spiece, **kwargs)
    model.save_to_huggingface(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "spiece.model",
        "tokenizer_config.json",
    ]
    assert_same_model(model, bg.EncoderDecoderModel.from_huggingface(tmp_path / "one"))
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert config.get("tie_encoder_decoder", False) == (sharing == "all")
    model.save_to_huggingface(tmp_path / "many", max_shard_size=9000)
    again = bg.EncoderDecoderModel.from_huggingface(tmp_path / "many")
    assert_same_model(model, again)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3
    for path in shards:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 9000
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one/model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


def test_texts_are_read_up_to_the_positions(tmp_path):
    """Of checkpoints that we did not write; keywords come first."""
    model = make_deep_model()
    long = model.encoder.config.replace(max_position_embeddings=150)
    decoder = model.decoder.config.replace(max_position_embeddings=140)
    settings = bg.GenerationConfig(max_new_tokens=3)
    model = bg.EncoderDecoderModel(
        bg.BertGenerationEncoder(long),
        bg.BertGenerationDecoder(decoder),
        model.tokenizer,
        generation_config=settings,
    )
    model.save_to_huggingface(tmp_path / "out")
    read = bg.EncoderDecoderModel.from_huggingface

    def lengths(**kwargs):
        config = read(tmp_path / "out", **kwargs).preprocessor.get_config()
        return config["max_source_length"], config["max_target_length"]

    assert lengths() == (128, 128)  # what we stored
    values = json.loads((tmp_path / "out/config.json").read_text())
    del values["bertgen_tf"]
    (tmp_path / "out/config.json").write_text(json.dumps(values))
    assert lengths() == (150, 140)
    assert lengths(max_source_length=9) == (9, 140)
    ids, _ = read(tmp_path / "out").preprocessor.generate_preprocess(["the man " * 100]).values()
    assert ids.shape == (1, 150)


def test_settings_there_and_back(tmp_path):
    """Those of gnmt are ours alone, and nothing of them can be taken for HuggingFace's."""
    settings = bg.GenerationConfig(
        max_new_tokens=8,
        min_new_tokens=2,
        num_beams=4,
        num_return_sequences=2,
        beam_scorer="gnmt",
        gnmt_alpha=0.8,
        normalize_unfinished=True,
        suppress_tokens=(5, 6),
    )
    model = make_pair("none", generation_config=settings, mask_first=True, add_bos=True)
    model.save_to_huggingface(tmp_path / "out")
    assert_same_model(model, bg.EncoderDecoderModel.from_huggingface(tmp_path / "out"))
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == {
        "pad_token_id": 0,
        "bos_token_id": 3,
        "eos_token_id": 4,
        "decoder_start_token_id": 3,
        "max_new_tokens": 8,
        "min_new_tokens": 2,
        "num_beams": 4,
        "num_return_sequences": 2,
        "suppress_tokens": [5, 6],
    }
    plain = make_pair("none")
    plain.save_to_huggingface(tmp_path / "out")
    own = json.loads((tmp_path / "out/config.json").read_text())["bertgen_tf"]
    assert "generation" not in own
    assert_same_model(plain, bg.EncoderDecoderModel.from_huggingface(tmp_path / "out"))


SETTINGS = {
    "max_length": 12,
    "min_length": 4,
    "min_new_tokens": 2,  # transformers follows one of the two
    "num_return_sequences": 3,
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.8,
    "seed": 5,
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 0.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": ((5,), (7, 8)),
    "sequence_bias": (((4,), 2.0), ((6, 1), -1.5)),
    "suppress_tokens": (10, 11),
    "begin_suppress_tokens": (9,),
    "forced_bos_token_id": 3,
    "forced_eos_token_id": (4, 2),
    "exponential_decay_length_penalty": (4, 1.25),
    "eos_token_id": (4, 6),
}


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        {"max_new_tokens": 9, "num_beams": 3, "early_stopping": True, "eos_token_id": 6},
    ],
)
def test_every_setting_there_and_back(tmp_path, settings):
    """An end token that is not the decoder's own does not become it."""
    model = make_pair("none", generation_config=bg.GenerationConfig(**settings))
    model.save_to_huggingface(tmp_path / "out")
    assert_same_model(model, bg.EncoderDecoderModel.from_huggingface(tmp_path / "out"))
    theirs = json.loads((tmp_path / "out/generation_config.json").read_text())
    ids = {"pad_token_id": 0, "bos_token_id": 3, "decoder_start_token_id": 3}
    expected = {name: value for name, value in settings.items() if name != "seed"}
    assert theirs == json.loads(json.dumps({**ids, **expected}))
    own = json.loads((tmp_path / "out/config.json").read_text())
    assert own["eos_token_id"] == own["decoder"]["eos_token_id"] == 4


def test_word_piece_there_and_back(tmp_path):
    """Cased, with other special tokens, as the translation originals'; no mask token."""
    pieces = ["<pad>", "</s>", "<s>", "[UNK]", *PIECES[6:]]
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    model = make_deep_model(
        make_tokenizer=lambda: bg.BertTokenizer(pieces, lowercase=False, **names),
        generation_config=bg.GenerationConfig(max_new_tokens=5),
    )
    model.save_to_huggingface(tmp_path / "out")
    again = bg.EncoderDecoderModel.from_huggingface(tmp_path / "out")
    assert not again.tokenizer.lowercase
    np.testing.assert_array_equal(again.tokenizer("The old man"), model.tokenizer("The old man"))
    for side in ("encoder", "decoder"):
        assert again.get_config()[side] == model.get_config()[side]
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert (again.tokenizer.bos_token, again.tokenizer.eos_token) == ("<s>", "</s>")


def test_without_tokenizer_there_and_back(checkpoints, tmp_path):
    for name in ("v4_shared", "v5_pair"):
        model = bg.EncoderDecoderModel.from_huggingface(checkpoints / name)
        model.save_to_huggingface(tmp_path / name)
        again = bg.EncoderDecoderModel.from_huggingface(tmp_path / name)
        assert_same_model(model, again)


def test_lone_stacks_there_and_back(tmp_path, model):
    model.encoder.save_to_huggingface(tmp_path / "encoder")
    encoder = bg.BertGenerationEncoder.from_huggingface(tmp_path / "encoder")
    assert encoder.config == model.encoder.config
    assert huggingface.kind_of(tmp_path / "encoder") == "encoder"
    model.decoder.save_to_huggingface(tmp_path / "decoder", max_shard_size="5KB")
    decoder = bg.BertGenerationDecoder.from_huggingface(tmp_path / "decoder")
    assert decoder.config == model.decoder.config and decoder.config.add_cross_attention
    assert huggingface.kind_of(tmp_path / "decoder") == "decoder"
    for one, two in ((encoder, model.encoder), (decoder, model.decoder)):
        for ours, theirs in zip(one.weights, two.weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    kept = bg.BertGenerationDecoder.from_huggingface(tmp_path / "decoder", num_layers=[0, 2])
    for ours, theirs in zip(kept.blocks[1].weights, model.decoder.blocks[2].weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="holds a decoder with cross-attention"):
        bg.BertGenerationEncoder.from_huggingface(tmp_path / "decoder")
    with pytest.raises(ValueError, match="num_layers must be a number from 1 to 3"):
        bg.BertGenerationDecoder.from_huggingface(tmp_path / "decoder", num_layers=4)
    model.save_to_huggingface(tmp_path / "pair")
    assert huggingface.kind_of(tmp_path / "pair") == "encoder-decoder"
    with pytest.raises(ValueError, match="EncoderDecoderModel.from_huggingface reads it"):
        bg.BertGenerationEncoder.from_huggingface(tmp_path / "pair")
    with pytest.raises(ValueError, match="holds a model of type bert-generation. Pass it as enc"):
        bg.EncoderDecoderModel.from_huggingface(tmp_path / "encoder")


def test_half_precision_models_are_written_in_float32(tmp_path):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = make_deep_model()
    finally:
        keras.config.set_dtype_policy(policy)
    model.save_to_huggingface(tmp_path / "out")
    again = bg.EncoderDecoderModel.from_huggingface(tmp_path / "out")
    assert {v.dtype for v in again.weights} == {"float32"}
    for one, two in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(one, np.asarray(two.numpy(), np.float32))


def test_what_is_replaced(tmp_path, model):
    """Our own folder is; anything else is not, and stays when writing fails."""
    model.save_to_huggingface(tmp_path / "out", max_shard_size=9000)
    model.save_to_huggingface(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*index*"))
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="or a HuggingFace checkpoint of ours to replace"):
        model.save_to_huggingface(tmp_path / "out")
    folder = write_checkpoint(tmp_path / "theirs")
    with pytest.raises(FileExistsError, match="holds other files"):
        model.save_to_huggingface(folder)
    with pytest.raises(ValueError, match="max_shard_size must be bytes .* received '5 pounds'"):
        model.save_to_huggingface(tmp_path / "new", max_shard_size="5 pounds")
    trained = tmp_path / "trained"
    model.save_to_huggingface(trained)
    values = json.loads((trained / "config.json").read_text())
    values["transformers_version"] = "5.23.0"  # which keeps our key
    (trained / "config.json").write_text(json.dumps(values))
    with pytest.raises(FileExistsError, match="holds other files"):
        model.save_to_huggingface(trained)
    names = ["out", "theirs", "trained"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_what_is_written_can_be_checked_before_it_counts(tmp_path, model):
    seen = []

    def check(folder):
        seen.append(bg.EncoderDecoderModel.from_huggingface(folder))
        if len(seen) > 1:
            raise ValueError("not the same")

    huggingface.save(model, tmp_path / "out", check=check)
    assert_same_model(model, seen[0])
    before = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not the same"):
        huggingface.save(make_deep_model(seed=5), tmp_path / "out", check=check)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_warm_start_from_bert(tmp_path):
    """The same as from the TF Hub module of the same weights, whose sizes and names differ."""
    folder = write_checkpoint(tmp_path / "bert")
    model = bg.EncoderDecoderModel.from_huggingface(
        encoder=str(folder), cross_attention="self_attention", num_layers=2
    )
    assert model.decoder.sharing == "word_embeddings"
    assert len(model.encoder.blocks) == len(model.decoder.blocks) == 2
    assert model.tokenizer.lowercase and model.decoder.config.bos_token_id == 3
    assert model.preprocessor.mask_first and model.preprocessor.add_bos
    stored = load_file(folder / "model.safetensors")
    positions = stored["embeddings.position_embeddings.weight"]
    types = stored["embeddings.token_type_embeddings.weight"]
    np.testing.assert_array_equal(
        model.decoder.embeddings.position_embeddings.embeddings, positions + types[0]
    )
    query = stored["encoder.layer.1.attention.self.query.weight"]
    for attention in ("self_attention", "cross_attention"):
        block = getattr(model.decoder.blocks[1], attention)
        np.testing.assert_array_equal(named_variables(block)["query/kernel"], query)
    assert not model.decoder.output_bias.numpy().any()
    shared = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder), share=True)
    assert shared.decoder.sharing == "all"
    other = write_checkpoint(tmp_path / "other", seed=3)
    two = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder), decoder=str(other))
    assert two.decoder.sharing == "none"
    assert isinstance(shared.generate("the man", max_new_tokens=3), str)


def test_forms_exclude_each_other(checkpoints):
    read = bg.EncoderDecoderModel.from_huggingface
    folder = str(checkpoints / "v4_shared")
    for kwargs in ({}, {"folder": folder, "encoder": folder}):
        with pytest.raises(ValueError, match="either the folder of an encoder-decoder or encoder="):
            read(**kwargs)
    with pytest.raises(ValueError, match="decoder, num_layers goes with encoder=, not with"):
        read(folder, decoder=folder, num_layers=1)


ROBERTA = ["<s>", "<pad>", "</s>", "<unk>"]


def roberta_vocabulary(folder, size=47):
    """vocab.json and merges.txt with an alphabet of the words' letters, as many as fit."""
    letters = sorted({letter for word in WORDS for letter in word})
    merges = [("\u0120", "a"), ("t", "h"), ("th", "e"), ("\u0120", "the"), ("m", "a"), ("ma", "n")]
    tokens = [*ROBERTA, "\u0120", *letters, *("".join(pair) for pair in merges)]
    tokens += [f"token{i}" for i in range(size - 1 - len(tokens))] + ["<mask>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return vocab


def test_roberta_vocabulary(copy, tmp_path):
    folder = copy("v5_roberta")
    vocab = roberta_vocabulary(folder)
    model = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder))
    ids = [vocab[token] for token in ("the", "\u0120", "man", "\u0120a", "t")]
    assert model.tokenizer("the man at").numpy().tolist() == ids
    config = model.decoder.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    # The same out of tokenizer.json, which is all that transformers 5 writes.
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    values = {
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [line.split(" ") for line in merges]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    again = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder))
    assert again.tokenizer.get_config() == model.tokenizer.get_config()
    model.save_to_huggingface(tmp_path / "out")
    assert_same_model(model, bg.EncoderDecoderModel.from_huggingface(tmp_path / "out"))


def test_roberta_with_another_vocabulary(copy, spiece):
    """Rows follow their pieces, special tokens their roles; what is new gets the mean."""
    folder = copy("v5_roberta")
    vocab = roberta_vocabulary(folder)
    tokenizer = bg.BertGenerationTokenizer(spiece)
    model = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder), tokenizer=tokenizer)
    stored = load_file(folder / "model.safetensors")["roberta.embeddings.word_embeddings.weight"]
    stored = stored.astype(np.float32)
    ours = model.encoder.embeddings.word_embeddings.embeddings.numpy()
    assert len(ours) == model.decoder.config.vocab_size == tokenizer.vocab_size
    assert model.decoder.config.pad_token_id == tokenizer.pad_token_id == 3
    found = 0
    roles = {getattr(tokenizer, f"{role}_token_id"): role for role in ("pad", "bos", "eos", "unk")}
    theirs = {"pad": 1, "bos": 0, "eos": 2, "unk": 3}
    for piece, i in tokenizer.get_vocab().items():
        token = piece.replace("\u2581", "\u0120")
        if i in roles:
            expected = stored[theirs[roles[i]]]
        elif token in vocab:
            expected, found = stored[vocab[token]], found + 1
        else:
            expected = stored.mean(0)
        np.testing.assert_allclose(ours[i], expected, rtol=1e-6, err_msg=piece)
    assert 5 < found < tokenizer.vocab_size - 8
    word_pieces = bg.BertTokenizer(list(PIECES))
    with pytest.raises(ValueError, match="tokenizer must be of the kind of the checkpoint's"):
        bg.EncoderDecoderModel.from_huggingface(encoder=str(folder), tokenizer=word_pieces)


def test_ids_of_a_bert_without_vocabulary(checkpoints):
    with pytest.raises(ValueError, match="tells no bos_token_id and eos_token_id and has no voc"):
        bg.EncoderDecoderModel.from_huggingface(encoder=str(checkpoints / "v5_bert"))
    tokenizer = bg.BertTokenizer(list(PIECES[:47]))
    model = bg.EncoderDecoderModel.from_huggingface(
        encoder=str(checkpoints / "v5_bert"), tokenizer=tokenizer
    )
    assert model.decoder.config.eos_token_id == tokenizer.eos_token_id == 4


def test_word_pieces_of_transformers_5(tmp_path):
    """It writes tokenizer.json and no vocab.txt."""
    folder = write_checkpoint(tmp_path / "bert")
    expected = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer
    values = {
        "normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {"type": "WordPiece", "vocab": {piece: i for i, piece in enumerate(PIECES)}},
    }
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer
    assert tokenizer.get_config() == expected.get_config()
    values["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer
    assert not tokenizer.lowercase


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", '{"strip_accents": false}', "not support strip_accents=False"),
        ("tokenizer_config.json", '{"unk_token": "<what>"}', "not found: unk_token='<what>'"),
        ("added_tokens.json", '{"<new>": 80}', "Tokens were added .* lacks: '<new>'"),
        ("tokenizer_config.json", "{", "tokenizer_config.json should be a JSON file"),
        ("spiece.model", "no model", "is no SentencePiece model. To use another one"),
        ("vocab.txt", "one\ntwo\n", "must contain every special token"),
    ],
)
def test_tokenizers_that_cannot_be_followed(tmp_path, name, content, message):
    """Another tokenizer helps."""
    folder = write_checkpoint(tmp_path / "bert")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_huggingface(encoder=str(folder))
    tokenizer = bg.BertTokenizer(list(PIECES))
    model = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder), tokenizer=tokenizer)
    assert model.tokenizer is tokenizer
    other = tokenizer.subset(range(30))[0]
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_huggingface(encoder=str(folder), tokenizer=other)


def test_every_setting_has_its_place():
    """A field that is added to a config and forgotten here would be lost in silence."""
    fields = {*generations.GENERATION_FIELDS, *generations.OWN_GENERATION}
    assert fields == set(bg.GenerationConfig.__dataclass_fields__)
    fields = {*configs._SIZES, *configs._IDS, "hidden_act", "add_cross_attention"}
    ours = {"norm_first", "source_positions", "quantization"}  # such models are not written
    assert fields == set(bg.BertGenerationConfig.__dataclass_fields__) - ours


@pytest.mark.parametrize(
    "own",
    [
        3,
        {"preprocessor": {"name": "x"}},
        {"preprocessor": 5},
        {"generation": {"top_k": 1}},
        {"sharing": "some"},
        {"sharing": ["all"]},
    ],
)
def test_own_settings_that_are_not_ours(copy, own):
    folder = copy("v4_shared", config=lambda values: values.update(bertgen_tf=own))
    with pytest.raises(ValueError, match="bertgen_tf=.* .only what save_to_huggingface wrote"):
        bg.EncoderDecoderModel.from_huggingface(folder)


@pytest.mark.parametrize("own", [{"max_source_length": "x"}, {"max_target_length": 10**30}])
def test_own_settings_that_fit_no_model(tmp_path, model, own):
    """The error names the file, and is one of values."""
    model.save_to_huggingface(tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    values["bertgen_tf"]["preprocessor"].update(own)
    (tmp_path / "out/config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="out/config.json should hold settings under bertgen_tf"):
        bg.EncoderDecoderModel.from_huggingface(tmp_path / "out")


def test_special_tokens_by_name(tmp_path):
    """Of tokenizer_config.json and special_tokens_map.json, as words and as dictionaries."""
    pieces = ["<pad>", "[UNK]", "<s>", "</s>", *PIECES[4:]]
    folder = write_checkpoint(tmp_path / "bert", pieces=pieces)
    (folder / "tokenizer_config.json").write_text(
        '{"do_lower_case": false, "pad_token": {"__type": "AddedToken", "content": "<pad>"}}'
    )
    (folder / "special_tokens_map.json").write_text('{"cls_token": "<s>", "sep_token": "</s>"}')
    tokenizer = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer
    ids = [getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "sep", "mask")]
    assert ids == [0, 2, 3, 3, 5] and not tokenizer.lowercase


def test_ids_that_nobody_uses(tmp_path):
    """Some BERTs have RoBERTa's bos and eos in their config.json; [CLS] and [SEP] count."""
    folder = write_checkpoint(tmp_path / "bert", bos_token_id=0, eos_token_id=2)
    config = bg.BertGenerationDecoder.from_huggingface(folder).config
    assert (config.bos_token_id, config.eos_token_id) == (3, 4)


def test_special_tokens_go_by_their_roles(tmp_path):
    """Whatever their pieces are called."""
    folder = write_checkpoint(tmp_path / "bert")
    pieces = ["the", "<p>", "<s>", "</s>", "<m>", "<u>", *PIECES[6:20]]
    names = {"pad": "<p>", "bos": "<s>", "eos": "</s>", "sep": "</s>", "mask": "<m>", "unk": "<u>"}
    tokenizer = bg.BertTokenizer(pieces, **{f"{role}_token": name for role, name in names.items()})
    model = bg.EncoderDecoderModel.from_huggingface(encoder=folder, tokenizer=tokenizer)
    stored = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    ids = [PIECES.index(piece) for piece in ("the", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")]
    ours = model.encoder.embeddings.word_embeddings.embeddings.numpy()
    np.testing.assert_array_equal(ours, stored[[*ids, *range(6, 20)]])


def test_all_files_have_the_mode_that_the_umask_gives(model, tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        old = os.umask(umask)
        try:
            model.save_to_huggingface(tmp_path / f"{mode:o}")
            model.save_to_preset(tmp_path / f"{mode:o}-preset")
        finally:
            os.umask(old)
        for folder in (tmp_path / f"{mode:o}", tmp_path / f"{mode:o}-preset"):
            assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}
