import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgen_tf import tokenizers
from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer
from tests.helpers.tokenizer_samples import (
    BERT_PIECES,
    ODDITIES,
    SENTENCES,
    decoded,
    train_sentencepiece,
)


@pytest.fixture(scope="module")
def bert():
    return BertTokenizer(BERT_PIECES)


@pytest.fixture(scope="module")
def unigram_proto():
    return train_sentencepiece()


@pytest.fixture(scope="module")
def unigram(unigram_proto):
    return BertGenerationTokenizer(unigram_proto)


@pytest.fixture(params=["bert", "unigram"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_special_ids_are_read_from_the_vocabulary(bert, unigram):
    assert bert.pad_token_id == 0
    assert bert.unk_token_id == 3
    assert bert.eos_token_id == bert.sep_token_id == 4
    assert bert.bos_token_id == 5
    assert bert.vocab_size == len(BERT_PIECES)
    assert (unigram.eos_token_id, unigram.sep_token_id, unigram.unk_token_id) == (0, 1, 2)
    assert (unigram.bos_token_id, unigram.pad_token_id, unigram.vocab_size) == (3, 4, 85)
    assert (
        BertGenerationTokenizer(train_sentencepiece(user_defined_symbols=[])).sep_token_id is None
    )


def test_convert_tokens_to_ids(tokenizer):
    pieces = tokenizer.tokenize("the clock")
    assert tokenizer.convert_tokens_to_ids(pieces) == tokenizer("the clock").numpy().tolist()
    assert tokenizer.convert_tokens_to_ids(pieces[0]) == int(tokenizer("the clock")[0])
    assert tokenizer.convert_tokens_to_ids(["no such"]) == [tokenizer.unk_token_id]
    assert tokenizer.convert_tokens_to_ids([]) == []


def test_scalars_and_vectors(tokenizer):
    one = tokenizer("the old clock")
    assert isinstance(one, tf.Tensor) and one.dtype == tf.int32 and one.shape.rank == 1
    texts = ["the old clock", "", "clock"]
    for batch in (
        texts,
        tuple(texts),
        np.array(texts),
        np.array(texts, object),
        tf.constant(texts),
    ):
        rows = tokenizer(batch)
        assert isinstance(rows, tf.RaggedTensor)
        assert rows.dtype == tf.int32 and rows.shape.as_list() == [3, None]
        assert rows[0].numpy().tolist() == one.numpy().tolist()
        assert rows[1].shape == [0]
    assert tokenizer(np.str_("the old clock")).numpy().tolist() == one.numpy().tolist()
    assert tokenizer("").shape == [0]
    assert tokenizer([]).shape.as_list() == [0, None]


def test_python_values(tokenizer):
    ids = tokenizer.encode("the old clock")
    assert ids == tokenizer("the old clock").numpy().tolist()
    text = tokenizer.decode(ids)
    assert text == "the old clock"
    for kind in (tuple, np.array, tf.constant, lambda x: [np.int64(i) for i in x]):
        assert tokenizer.decode(kind(ids)) == text
    for batch in ([ids, ids], np.array([ids, ids]), tf.ragged.constant([ids, ids])):
        assert tokenizer.decode(batch) == tokenizer.batch_decode(batch) == [text, text]
    assert tokenizer.batch_decode(ids) == [text]
    assert tokenizer.decode([]) == "" and tokenizer.decode([[], ids]) == ["", text]
    assert tokenizer.batch_decode([]) == []
    framed = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(framed, skip_special_tokens=True) == text
    tokens = tokenizer.convert_ids_to_tokens(framed)
    assert tokens[0] == tokenizer.bos_token and tokens[-2] == tokenizer.eos_token
    assert tokens[-1] == tokenizer.pad_token and tokens[1:-2] == tokenizer.tokenize(text)
    assert tokenizer.convert_ids_to_tokens(np.int64(framed[0])) == tokenizer.bos_token
    vocab = tokenizer.get_vocab()
    assert len(vocab) == len(tokenizer) and vocab[tokenizer.unk_token] == tokenizer.unk_token_id
    for wrong in ([1.5], ["the"], [True], None):
        with pytest.raises(TypeError, match="`ids` must be integers; received"):
            tokenizer.decode(wrong)
    with pytest.raises(TypeError, match="one row of ids; received rows"):
        tokenizer.convert_ids_to_tokens([[1], [2]])
    with pytest.raises(ValueError, match=rf"in \[0, {len(tokenizer)}\); received \[-100\]"):
        tokenizer.decode([1, -100])
    with pytest.raises(TypeError, match="must be one str; received list"):
        tokenizer.encode(["a"])


@pytest.mark.slow
def test_in_graphs(tokenizer):
    expected = tokenizer(SENTENCES).to_list()
    dataset = tf.data.Dataset.from_tensor_slices(SENTENCES)
    single = [row.tolist() for row in dataset.map(tokenizer).as_numpy_iterator()]
    assert single == expected
    batched = [ids.to_list() for ids in dataset.batch(4).map(tokenizer)]
    assert batched == [expected[:4], expected[4:]]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def round_trip(text):
        ids = tokenizer(text)
        assert ids.shape.as_list() == [None, None]
        return ids, tokenizer.detokenize(ids), tokenizer.detokenize(ids.to_tensor())

    ids, text, again = round_trip(SENTENCES)
    assert ids.to_list() == expected
    assert text.dtype == tf.string and decoded(text) == decoded(tokenizer.detokenize(ids))
    assert text.shape == [len(SENTENCES)] and again.shape == text.shape
    assert round_trip(tf.constant([], tf.string))[1].shape == [0]


def test_wrong_inputs(tokenizer):
    with pytest.raises(TypeError, match="must hold strings; received dtype int32"):
        tokenizer([3, 4])
    with pytest.raises(ValueError, match=r"vector of strings .* received shape \(1, 2\)"):
        tokenizer([["a", "b"]])
    with pytest.raises(TypeError, match="`ids` must be integers; received dtype float32"):
        tokenizer.detokenize([1.5])
    with pytest.raises(ValueError, match=r"`ids` must have shape .* received shape \(1, 1, 1\)"):
        tokenizer.detokenize(np.ones([1, 1, 1], int))
    with pytest.raises(TypeError, match="must be one str; received list"):
        tokenizer.tokenize(["a"])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.text(max_size=40)), min_size=1, max_size=20))
def test_any_bytes(bert, unigram, texts):
    texts = [text.encode("utf-8") if isinstance(text, str) else text for text in texts]
    for tokenizer in (bert, unigram):
        ids = tokenizer(texts)
        assert ids.nrows() == len(texts)
        flat = ids.flat_values.numpy()
        assert ((flat >= 0) & (flat < tokenizer.vocab_size)).all()
        decoded(tokenizer.detokenize(ids))


def test_invalid_utf8_is_replaced(unigram):
    cased = BertTokenizer([*BERT_PIECES, "\ufffd", "##\ufffd"], lowercase=False)
    broken = [b"the \xff\xfe old \xc3", b"b\xed\xa0\x80", b"\xe4\xb8 the", b"\xf0\x9f\x98"]
    repaired = [text.decode("utf-8", errors="replace") for text in broken]
    assert cased.tokenize(repaired[0]) == ["the", "\ufffd", "##\ufffd", "old", "\ufffd"]
    for tokenizer in (cased, unigram):
        assert tokenizer(broken).to_list() == tokenizer(repaired).to_list()


@pytest.mark.parametrize(
    "unit", ["a", "a ", ".", "' \"", "é", "😀", "\u0301", "x-", "1 , ", "\x00"]
)
def test_long_strings(bert, unigram, unit):
    text = unit * (100_000 // len(unit.encode("utf-8")))
    for tokenizer in (bert, unigram):
        ids = tokenizer([text, "the"])
        assert ids[1].shape[0] >= 1
        decoded(tokenizer.detokenize(ids))


def test_detokenize_drops_special_tokens_and_what_follows_eos(tokenizer):
    words = tokenizer("the old clock").numpy().tolist()
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    text = "the old clock"
    assert tokenizer.detokenize(words).numpy().decode() == text
    rows = [
        words,
        [bos, *words],
        [bos, *words, eos],
        [*words, eos, *words, eos],
        [*words, pad, pad, pad],
        [pad, *words[:1], bos, *words[1:], eos, pad],
        [-1, *words, tokenizer.vocab_size, 2**31 - 1],
    ]
    assert decoded(tokenizer.detokenize(tf.ragged.constant(rows))) == [text] * len(rows)
    dense = tf.ragged.constant(rows).to_tensor(pad)
    assert decoded(tokenizer.detokenize(dense)) == [text] * len(rows)
    assert decoded(tokenizer.detokenize(dense.numpy().tolist())) == [text] * len(rows)
    # int64 ids that a cast to int32 would wrap around to a valid one.
    assert tokenizer.detokenize(np.array([*words, 2**32 + words[0]])).numpy().decode() == text
    assert decoded(tokenizer.detokenize([[eos, *words], [bos, eos, *words]])) == ["", ""]
    assert tokenizer.detokenize([]).numpy() == b""
    assert decoded(tokenizer.detokenize([[], []])) == ["", ""]
    assert decoded(tokenizer.detokenize([words[:1], [], words])) == [
        tokenizer.detokenize(words[:1]).numpy().decode(),
        "",
        text,
    ]
    assert tokenizer.detokenize(np.zeros([0, 3], np.int32)).shape == [0]
    assert decoded(tokenizer.detokenize(np.zeros([2, 0], np.int32))) == ["", ""]


def test_unknown_stays_visible_and_mask_does_not(bert, unigram):
    ids = bert.convert_tokens_to_ids(["the", "[UNK]", "[MASK]", "##s"])
    assert bert.detokenize(ids).numpy() == b"the [UNK]s"
    assert "⁇" in unigram.detokenize([unigram.unk_token_id]).numpy().decode()
    sep = unigram("a <::::> b")
    assert unigram.sep_token_id in sep.numpy()
    assert unigram.detokenize(sep).numpy() == b"a<::::> b"  # as HuggingFace's decode


def test_config_and_vocabulary_round_trip(tokenizer, tmp_path):
    config = json.loads(json.dumps(tokenizer.get_config()))
    path = tokenizer.save_vocabulary(tmp_path / "new" / "folder")
    name = {"BertTokenizer": "vocab.txt", "BertGenerationTokenizer": "spiece.model"}
    assert Path(path) == tmp_path / "new/folder" / name[type(tokenizer).__name__]
    texts = SENTENCES + ODDITIES
    field = next(iter(config))  # a preset keeps the vocabulary in a file of its own
    assert tokenizers.read_vocabulary(type(tokenizer).__name__, path) == config[field]
    others = [type(tokenizer).from_config(config), type(tokenizer)(path)]
    others += [copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))]
    for other in others:
        assert other(texts).to_list() == tokenizer(texts).to_list()
        assert other.get_config() == tokenizer.get_config()
    for name in (path, Path(path).name):
        with pytest.raises(ValueError, match=f"{field} must be the vocabulary itself .*from_pre"):
            type(tokenizer).from_config({**config, field: name})


def test_config_keeps_options(unigram_proto):
    cased = BertTokenizer(BERT_PIECES, lowercase=False, mask_token="[unused0]")
    other = BertTokenizer.from_config(cased.get_config())
    assert other.lowercase is False
    assert other.detokenize([1, 2]).numpy() == b"[MASK]"
    swapped = BertGenerationTokenizer(unigram_proto, bos_token="</s>", eos_token="<s>")
    assert BertGenerationTokenizer.from_config(swapped.get_config()).eos_token_id == 3


LOADER = """
import sys, tensorflow as tf, tensorflow_text
module = tf.saved_model.load(sys.argv[1])
texts = tf.constant(["the old clocks, don't strike!", "", b"\\xff caf\\xc3\\xa9"])
for name in ("bert", "huggingface", "unigram"):
    out = getattr(module, name)(texts)
    print(out["ids"].numpy().tolist(), out["text"].numpy().tolist())
assert "bertgen_tf" not in sys.modules
"""


def round_trip_function(tokenizer):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def round_trip(text):
        ids = tokenizer(text)
        return {"ids": ids.flat_values, "text": tokenizer.detokenize(ids)}

    return round_trip


@pytest.mark.slow
def test_export_needs_no_other_file(bert, unigram, tmp_path):
    vocabulary = bert.save_vocabulary(tmp_path / "gone")
    model = unigram.save_vocabulary(tmp_path / "gone")
    module = tf.Module()
    texts = tf.constant(["the old clocks, don't strike!", "", b"\xff caf\xc3\xa9"])
    expected = ""
    tokenizers = {
        "bert": BertTokenizer(vocabulary),
        "huggingface": BertTokenizer(
            vocabulary, normalization="huggingface", added_tokens=["clock"]
        ),
        "unigram": BertGenerationTokenizer(model),
    }
    for name, tokenizer in tokenizers.items():
        function = round_trip_function(tokenizer)
        setattr(module, name, function)
        setattr(module, f"{name}_tokenizer", tokenizer)
        out = function(texts)
        expected += f"{out['ids'].numpy().tolist()} {out['text'].numpy().tolist()}\n"
    tf.saved_model.save(module, str(tmp_path / "export"))
    shutil.rmtree(tmp_path / "gone")
    shutil.move(tmp_path / "export", tmp_path / "moved")
    result = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "moved")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected


def test_subset_checks_ids(tokenizer):
    assert tokenizer.subset([])[0].pad_token_id is not None
    with pytest.raises(ValueError, match=rf"in \[0, {tokenizer.vocab_size}\); received .* -1 to 3"):
        tokenizer.subset([3, -1])
    with pytest.raises(ValueError, match=f"to {tokenizer.vocab_size}"):
        tokenizer.subset({tokenizer.vocab_size})
    with pytest.raises(TypeError, match="must be integers"):
        tokenizer.subset(["the"])
