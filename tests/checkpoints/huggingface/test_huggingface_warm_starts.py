"""BERT and RoBERTa checkpoints as warm starts, with their tokenizers or others."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import bertgen_tf as bg
from bertgen_tf.network.weights import named_variables
from tests.helpers import PIECES, WORDS, write_checkpoint
from tests.helpers.huggingface import assert_same_model


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
    with pytest.raises(ValueError, match="tokenizer must be of the same kind as the checkpoint's"):
        bg.EncoderDecoderModel.from_huggingface(encoder=str(folder), tokenizer=word_pieces)


def test_ids_of_a_bert_without_vocabulary(checkpoints):
    with pytest.raises(ValueError, match="has no bos_token_id and eos_token_id, and no voc"):
        bg.EncoderDecoderModel.from_huggingface(encoder=str(checkpoints / "v5_bert"))
    tokenizer = bg.BertTokenizer(list(PIECES[:47]))
    model = bg.EncoderDecoderModel.from_huggingface(
        encoder=str(checkpoints / "v5_bert"), tokenizer=tokenizer
    )
    assert model.decoder.config.eos_token_id == tokenizer.eos_token_id == 4


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
