import json

import numpy as np
import pytest
import tensorflow as tf
from sentencepiece import sentencepiece_model_pb2

from bertgen_tf.tokenizers import BertGenerationTokenizer
from bertgen_tf.tokenizers.byte_pair import sentencepiece_from_byte_pair
from tests.helpers import GOLDEN

EXPECTED = json.loads((GOLDEN / "tokenizers.json").read_text("utf-8"))
GPT2 = {"eos_token": "<|endoftext|>", "control_tokens": (), "append_missing": True}


def build(name: str, **options) -> BertGenerationTokenizer:
    case = EXPECTED["byte_pair"][name]
    options = {**(GPT2 if name == "gpt2" else {}), **options}
    proto = sentencepiece_from_byte_pair(case["vocab"], case["merges"], **options)
    return BertGenerationTokenizer(proto, eos_token=options.get("eos_token", "</s>"))


def letters(*more: str) -> dict[str, int]:
    """A vocabulary of special tokens, letters, the space and `more`."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghs'", "Ġ", "Ċ", *more, "<mask>"]
    return {token: i for i, token in enumerate(tokens)}


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_ids_are_those_of_the_byte_level_tokenizer(name):
    case, tokenizer = EXPECTED["byte_pair"][name], build(name)
    ascii_texts = [text for text in case["texts"] if text.isascii()]
    assert len(ascii_texts) > 15
    ids = tokenizer(case["texts"]).to_list()
    for text, expected, row in zip(case["texts"], case["ids"], ids, strict=True):
        if text.isascii():
            assert row == expected, text
    # Halves of characters, which the real one merges, are single bytes here; no text is lost.
    assert any(row != expected for row, expected in zip(ids, case["ids"], strict=True))
    assert tokenizer.unk_token_id not in sum(ids, [])
    texts = [text.decode() for text in tokenizer.detokenize(tokenizer(case["texts"])).numpy()]
    assert texts == case["texts"]
    assert tokenizer.batch_decode(ids) == [text.strip() for text in case["texts"]]


def test_ids_are_those_of_the_tokenizers_package_itself():
    tokenizers = pytest.importorskip("tokenizers", reason="compares with the package tokenizers")
    case, ours = EXPECTED["byte_pair"]["roberta"], build("roberta")
    merges = [tuple(pair.split(" ")) for pair in case["merges"]]
    real = tokenizers.ByteLevelBPETokenizer(case["vocab"], merges)
    rng = np.random.default_rng(5)
    words = [w for text in case["texts"][:9] for w in text.split() if w.isascii()]
    gaps = [" ", "  ", "    ", "\n", " \n ", "\t", ", "]
    texts = [
        "".join(a + b for a, b in zip(rng.choice(words, 9), rng.choice(gaps, 9), strict=True))
        for _ in range(300)
    ]
    assert ours(texts).to_list() == [real.encode(text).ids for text in texts]


def test_special_tokens_and_pieces():
    tokenizer = build("roberta")
    vocab = EXPECTED["byte_pair"]["roberta"]["vocab"]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (2, 3)
    assert len(tokenizer) == len(vocab)
    assert tokenizer.convert_tokens_to_ids("<mask>") == vocab["<mask>"]
    assert vocab["<mask>"] not in tokenizer.encode("a <mask>")
    assert tokenizer.tokenize("in the tower") == ["in", "▁the", "▁tower"]
    gpt2 = build("gpt2")
    size = len(EXPECTED["byte_pair"]["gpt2"]["vocab"])
    assert (gpt2.pad_token_id, gpt2.bos_token_id, gpt2.unk_token_id) == (size, size + 1, size + 2)
    assert gpt2.eos_token_id == size - 1 and len(gpt2) == size + 3


def test_add_prefix_space():
    vocab = letters("Ġa", "ab")
    merges = ["#version: 0.2", "Ġ a", "a b"]
    tokens = [
        BertGenerationTokenizer(
            sentencepiece_from_byte_pair(vocab, merges, add_prefix_space=prefix)
        ).tokenize("ab  a")
        for prefix in (False, True)
    ]
    assert tokens == [["ab", "▁", "▁a"], ["▁a", "b", "▁", "▁a"]]


def test_merges_go_by_rank_and_not_by_length():
    vocab = letters("bc", "ab", "abc", "de", "def")
    merges = ["b c", "a b", "a bc", "d e", "de f"]
    tokenizer = BertGenerationTokenizer(sentencepiece_from_byte_pair(vocab, merges))
    assert tokenizer.tokenize("abcdefab") == ["abc", "def", "ab"]
    backwards = BertGenerationTokenizer(
        sentencepiece_from_byte_pair(letters("bc", "ab"), ["a b", "b c"])
    )
    assert backwards.tokenize("abc") == ["ab", "c"]


def test_tokens_that_no_merge_makes_never_occur():
    vocab = letters("ab", "abc", "Ã", "©", "dÃ")
    tokenizer = BertGenerationTokenizer(sentencepiece_from_byte_pair(vocab, []))
    assert tokenizer.tokenize("abc") == ["a", "b", "c"]
    # Without all 256 bytes a character that has no token is unknown.
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]
    assert tokenizer.detokenize([vocab["a"], vocab["dÃ"], vocab["b"]]).numpy() == b"ab"


def test_contractions_and_quotation_marks():
    vocab = letters("'s", "Ġ'", "Ġb", "sa", "ĠĠ")
    merges = ["' s", "Ġ Ġ", "Ġ '", "Ġ b", "s a"]
    tokenizer = BertGenerationTokenizer(sentencepiece_from_byte_pair(vocab, merges))
    assert tokenizer.tokenize("a's 'sa'   b's") == (["a", "'s", "▁'", "sa", "'", "▁▁", "▁b", "'s"])


def test_readable_characters_keep_their_spelling_where_there_is_room():
    case = EXPECTED["byte_pair"]["roberta"]
    halves = [chr(c) + chr(d) for c in range(0xC3, 0xD4) for d in range(0xC3, 0xCA)]
    vocab = {**case["vocab"], **{half: len(case["vocab"]) + i for i, half in enumerate(halves)}}
    proto = sentencepiece_from_byte_pair(vocab, case["merges"])
    tokenizer = BertGenerationTokenizer(proto)
    ids = [vocab["z"], vocab["Ċ"], vocab["~"], vocab["Ģ"]]
    assert tokenizer.convert_ids_to_tokens(ids) == ["z", "\n", "~", "<0x80>"]
    assert tokenizer.encode("z\n~") == ids[:3]
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    pieces = [piece.piece for piece in model.pieces]
    assert len(set(pieces)) == len(pieces) == len(vocab)
    assert sum(piece.type == piece.BYTE for piece in model.pieces) == 256


def test_in_an_export(tmp_path):
    module = tf.Module()
    module.tokenizer = build("roberta")

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def ids(text):
        return module.tokenizer(text).to_tensor(-1)

    module.ids = ids
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    texts = tf.constant(["It's old.", "süß"])
    np.testing.assert_array_equal(loaded.ids(texts), module.ids(texts))


def test_files(tmp_path):
    case = EXPECTED["byte_pair"]["roberta"]
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps(case["vocab"]), "utf-8")
    merges.write_text("#version: 0.2\n" + "\n".join(case["merges"]) + "\n", "utf-8")
    tokenizer = BertGenerationTokenizer(sentencepiece_from_byte_pair(str(vocab), merges))
    assert tokenizer(case["texts"]).to_list() == build("roberta")(case["texts"]).to_list()
    with pytest.raises(FileNotFoundError, match="`merges` must be the path .*no_such"):
        sentencepiece_from_byte_pair(vocab, tmp_path / "no_such")
    vocab.write_text('{"a": 0,', "utf-8")
    with pytest.raises(ValueError, match=r"`vocab` \(.*vocab.json\) must be a JSON file"):
        sentencepiece_from_byte_pair(vocab, merges)
    merges.write_bytes("é a\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"`merges` \(.*\) must be a UTF-8 text file"):
        sentencepiece_from_byte_pair(letters(), merges)


@pytest.mark.parametrize(
    "vocab, merges, options, message",
    [
        ([1, 2], [], {}, "must map tokens to ids; received list"),
        ({}, [], {}, "must map tokens to ids"),
        ({"a": "0"}, [], {}, "tokens to integers; received 'a': '0'"),
        ({"a": True}, [], {}, "tokens to integers; received 'a': True"),
        ({"a": 0, "b": 2, "c": 2}, [], {}, "ids 0 to 2, each once, .* no token has 1"),
        ({"a": 1}, [], {}, "no token has 0"),
        ({"a": 0}, [], {}, "not found: <pad>, <s>, </s>, <unk>, <mask>"),
        (letters(), [], {"control_tokens": ["<x>"], "append_missing": True}, "not found: <x>"),
        (letters(), [], {"bos_token": "</s>"}, "must be different"),
        (letters("中", "a b"), [], {}, "spell bytes as GPT-2 does; received '中', 'a b'"),
        (letters("ab"), ["a b", "a c"], {}, "line 2, 'a c', needs 'ac'"),
        (letters("ab"), ["", "x b"], {}, "line 2, 'x b', needs 'x', 'xb'"),
        (letters("ab"), ["ab"], {}, "two tokens a line; line 1 is 'ab'"),
    ],
)
def test_errors(vocab, merges, options, message):
    with pytest.raises(ValueError, match=message) as error:
        sentencepiece_from_byte_pair(vocab, merges, **options)
    assert "\n" not in str(error.value)
