"""What we write: read back, by us and as transformers expects it."""

import json
import os

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

import bertgen_tf as bg
from bertgen_tf.checkpoints import huggingface
from tests.helpers import PIECES, make_deep_model, write_checkpoint
from tests.helpers.huggingface import assert_same_model, make_pair


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
    with pytest.raises(FileExistsError, match="or a Hugging Face checkpoint of ours to replace"):
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
