"""Tokenizers of Hugging Face checkpoints."""

import json

import pytest

import bertgen_tf as bg
from tests.helpers import PIECES, write_checkpoint
from tests.helpers.huggingface import assert_same_model


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
    # As in transformers, what its configuration says comes first.
    assert bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer.lowercase
    (folder / "tokenizer_config.json").unlink()
    tokenizer = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer
    assert not tokenizer.lowercase


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", '{"never_split": ["a"]}', "not support never_split="),
        ("tokenizer_config.json", '{"unk_token": "<what>"}', "not found: unk_token='<what>'"),
        ("added_tokens.json", '{"<new>": 80}', "Tokens were added .* lacks: '<new>'"),
        ("tokenizer_config.json", "{", "tokenizer_config.json should be a JSON file"),
        ("spiece.model", "no model", "is not a SentencePiece model. To use another one"),
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
