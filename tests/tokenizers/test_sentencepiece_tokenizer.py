import base64
import json
from pathlib import Path

import keras
import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
from sentencepiece import sentencepiece_model_pb2

from bertgen_tf.tokenizers import BertGenerationTokenizer
from tests.helpers import GOLDEN
from tests.helpers.tokenizer_samples import (
    BERT_PIECES,
    ODDITIES,
    SENTENCES,
    SHARED,
    check_answers,
    check_subset,
    decoded,
    needs_shared,
    train_sentencepiece,
    wikisplit,
)

EXPECTED = json.loads((GOLDEN / "tokenizers.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def unigram_proto():
    return train_sentencepiece()


@pytest.fixture(scope="module")
def unigram(unigram_proto):
    return BertGenerationTokenizer(unigram_proto)


def test_sentencepiece_ids_equal_the_package(unigram_proto):
    unigram = BertGenerationTokenizer(unigram_proto, split_special_tokens=True)
    package = sentencepiece.SentencePieceProcessor(model_proto=unigram_proto)
    texts = SENTENCES + ODDITIES + ["a <::::> b", "unknown Ω and ☃"]
    assert unigram(texts).to_list() == package.encode(texts)
    assert unigram.tokenize("the boats\nλ") == package.encode("the boats\nλ", out_type=str)
    rows = package.encode(SENTENCES)
    assert decoded(unigram.detokenize(tf.ragged.constant(rows))) == package.decode(rows)


@needs_shared
def test_sentencepiece_ids_equal_the_package_on_wikisplit():
    path = SHARED / "hub/spiece_1000.model"
    tokenizer = BertGenerationTokenizer(path)
    package = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = wikisplit(2000)
    rows = package.encode(texts)
    assert tokenizer(texts).to_list() == rows
    assert decoded(tokenizer.detokenize(tokenizer(texts))) == package.decode(rows)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert (tokenizer.unk_token_id, tokenizer.sep_token_id, tokenizer.vocab_size) == (3, 4, 1000)


def test_byte_pieces_give_valid_utf8():
    tokenizer = BertGenerationTokenizer(
        train_sentencepiece(byte_fallback=True, vocab_size=330, hard_vocab_limit=False)
    )
    ids = tokenizer("☃")
    assert tokenizer.detokenize(ids).numpy().decode() == "☃"
    assert "\ufffd" in tokenizer.detokenize(ids[:-1]).numpy().decode("utf-8")


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char", "word"])
def test_sentencepiece_subset(model_type):
    size = {"unigram": 85, "bpe": 120, "char": 40, "word": 40}[model_type]
    tokenizer = BertGenerationTokenizer(
        train_sentencepiece(model_type=model_type, vocab_size=size, hard_vocab_limit=False)
    )
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    for text in ["the", "clock tower", "strike boats", "birds"]:
        if tokenizer.unk_token_id not in tokenizer(text).numpy():
            check_subset(tokenizer, [text], words)


def test_sentencepiece_subset_file(unigram, tmp_path):
    small, kept = unigram.subset(unigram("the clock").numpy())
    path = Path(small.save_vocabulary(tmp_path))
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    spec = model.trainer_spec
    assert spec.vocab_size == len(model.pieces) == len(kept)
    assert model.pieces[spec.pad_id].piece == "<pad>"
    assert model.pieces[spec.eos_id].piece == "</s>"
    again, kept_again = small.subset(range(small.vocab_size))
    assert kept_again.tolist() == list(range(small.vocab_size))
    assert again.get_config() == small.get_config()


def test_unigram_subset_keeps_the_score_of_unknown_characters(unigram_proto):
    # Without "a", the least likely piece, an unknown "a" before "bcd" would be likelier than
    # "ab", "cd": unigram models derive the score of unknown characters from the lowest of all.
    model = sentencepiece_model_pb2.ModelProto.FromString(unigram_proto)
    del model.pieces[5:]
    for piece, score in [("▁", -1), ("a", -60), ("ab", -30), ("cd", -30), ("bcd", -1)]:
        model.pieces.add(piece=piece, score=score)
    tokenizer = BertGenerationTokenizer(model.SerializeToString())
    assert tokenizer.tokenize("abcd") == ["▁", "ab", "cd"]
    small, _ = tokenizer.subset(tokenizer.convert_tokens_to_ids(["▁", "ab", "cd", "bcd"]))
    assert small.tokenize("abcd") == ["▁", "ab", "cd"]


def test_bpe_subset_keeps_what_merges_pass_through():
    tokenizer = BertGenerationTokenizer(train_sentencepiece(model_type="bpe", vocab_size=120))
    pieces = [tokenizer._processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    longest = max(pieces[5:], key=len)
    assert len(longest) > 4
    small, kept = tokenizer.subset([pieces.index(longest)])
    assert small.tokenize(longest.replace("▁", " ")) == [longest]
    assert len(kept) < 30


def test_bad_sentencepiece_models(tmp_path, unigram_proto):
    with pytest.raises(FileNotFoundError, match="`proto` must be the path .*spiece.model"):
        BertGenerationTokenizer(tmp_path / "spiece.model")
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_PIECES), "utf-8")
    for bad in (tmp_path / "vocab.txt", b"", unigram_proto[:-9]):
        with pytest.raises(ValueError, match="`proto` must be a SentencePiece model"):
            BertGenerationTokenizer(bad)
    no_pad = train_sentencepiece(pad_id=-1, unk_id=1, user_defined_symbols=[], bos_id=2)
    with pytest.raises(
        ValueError, match=r"SentencePiece model must .* not found: pad_token='<pad>'"
    ):
        BertGenerationTokenizer(no_pad)


@pytest.mark.parametrize(
    "reset",
    [lambda: keras.utils.set_random_seed(3), lambda: tf.random.set_seed(3)],
    ids=["keras", "tensorflow"],
)
def test_tokenizers_survive_a_new_random_seed(unigram_proto, reset):
    """TensorFlow forgets the resources of its kernels then; those of a graph stay in use, too."""
    tokenizer, equal = (BertGenerationTokenizer(unigram_proto) for _ in range(2))
    graph = tf.function(lambda text: tokenizer(text).to_tensor())
    expected = graph(tf.constant(["the clock"])).numpy()
    reset()
    np.testing.assert_array_equal(graph(tf.constant(["the clock"])), expected)
    np.testing.assert_array_equal(tokenizer(["the clock"]).to_tensor(), expected)
    tokenizer = graph = None
    np.testing.assert_array_equal(equal(["the clock"]).to_tensor(), expected)


# HuggingFace's class


def golden_id(case) -> str:
    return f"{case['name']}-split={case['options']['split_special_tokens']}"


@pytest.mark.parametrize("case", EXPECTED["bert_generation"], ids=golden_id)
def test_answers_are_those_of_huggingface(case):
    tokenizer = BertGenerationTokenizer(base64.b64decode(case["model"]), **case["options"])
    check_answers(tokenizer, case["answers"])
    assert tokenizer.all_special_tokens == list(case["answers"]["special_tokens"])  # the order too
    again = BertGenerationTokenizer.from_config(json.loads(json.dumps(tokenizer.get_config())))
    check_answers(again, case["answers"])


def test_the_golden_cases_tell_the_two_ways_to_read_special_tokens():
    split, whole = (
        {row["text"]: row["tokens"] for row in case["answers"]["texts"]}
        for case in EXPECTED["bert_generation"][:2]
    )
    assert split["clock <::::>"][-2:] == ["▁", "<::::>"]
    assert whole["clock <::::>"][-2:] == ["lock", "<::::>"]


@needs_shared
@pytest.mark.parametrize("split", [True, False])
def test_answers_are_those_of_huggingface_itself(split):
    pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    from make_tokenizer_golden import TEXTS, bert_generation_answers

    options = {"split_special_tokens": split}
    proto = (SHARED / "hub/spiece_1000.model").read_bytes()
    texts = TEXTS + SENTENCES + ODDITIES + wikisplit(100)
    tokenizer = BertGenerationTokenizer(proto, **options)
    check_answers(tokenizer, bert_generation_answers(proto, texts, **options))


def test_special_tokens_in_texts_are_found_in_the_graph(unigram_proto):
    plain = BertGenerationTokenizer(unigram_proto, split_special_tokens=True)
    finding = BertGenerationTokenizer(unigram_proto)  # HuggingFace's default
    text = "the <s>clock</s> <::::><pad> <unk>strikes"
    ids = plain(["the ", "clock", " ", " ", "strikes"]).to_list()
    expected = [
        *[*ids[0], plain.bos_token_id],
        *[*ids[1], plain.eos_token_id],
        *[*ids[2], plain.sep_token_id, plain.pad_token_id],
        *[*ids[3], plain.unk_token_id, *ids[4]],
    ]
    assert finding(text).numpy().tolist() == expected
    assert plain(text).numpy().tolist() != expected
    graph = tf.function(finding, input_signature=[tf.TensorSpec([None], tf.string)])
    texts = [text, "", "the clock", "</s>", "a\0b", *ODDITIES]
    assert graph(tf.constant(texts)).to_list() == [finding.encode(text) for text in texts]
    assert graph(tf.constant([], tf.string)).to_list() == []
    ordinary = ["the clock", "a\0the \0", "\ufffd"]
    assert finding(ordinary).to_list() == plain(ordinary).to_list()


def test_added_tokens():
    proto = train_sentencepiece(user_defined_symbols=["<::::>", "<hl>", "<q>"])
    plain = BertGenerationTokenizer(proto)
    added = [
        {"content": "<hl>", "special": True, "lstrip": True},
        {"content": "<q>", "normalized": False, "rstrip": True},
    ]
    tokenizer = BertGenerationTokenizer(proto, added_tokens=added)
    text = "the clock \u3000<hl> <q> \n\u0085tower<hl>"
    expected = [
        *plain.tokenize("the clock"), "<hl>", *plain.tokenize(" "),
        "<q>", *plain.tokenize("tower"), "<hl>",
    ]  # fmt: skip
    assert tokenizer.tokenize(text) == expected
    assert tokenizer.encode(text) == tokenizer.convert_tokens_to_ids(expected)
    assert tokenizer.decode(tokenizer.encode("<q><hl>"), skip_special_tokens=True) == "<q>"
    config = json.loads(json.dumps(tokenizer.get_config()))
    again = BertGenerationTokenizer.from_config(config)
    assert again.encode(text) == tokenizer.encode(text) and again.get_config() == config
    split = BertGenerationTokenizer.from_config({**config, "split_special_tokens": True})
    assert split.encode("the <hl><q>") == plain.encode("the <hl><q>")
    assert tokenizer.subset([])[0].tokenize(" <hl><q> ") == ["<hl>", "<q>"]
    with pytest.raises(ValueError, match="`added_tokens` must be pieces .* received 'no'"):
        BertGenerationTokenizer(proto, added_tokens=["no"])


def test_the_longest_special_token_is_found(unigram_proto):
    model = sentencepiece_model_pb2.ModelProto.FromString(unigram_proto)
    model.pieces[3].piece, model.pieces[1].piece = "<", "<>"
    proto = model.SerializeToString()
    names = {"bos_token": "<", "sep_token": "<>", "split_special_tokens": False}
    assert BertGenerationTokenizer(proto, **names).encode("<><<>") == [1, 3, 1]


def test_what_differs_from_huggingface_on_purpose(unigram, tmp_path):
    # Nothing is added to the vocabulary.
    bare = BertGenerationTokenizer(train_sentencepiece(user_defined_symbols=[]))
    assert bare.sep_token is None and bare.sep_token_id is None
    assert bare.all_special_tokens == ["<s>", "</s>", "<unk>", "<pad>"]
    assert len(bare) == bare.vocab_size == len(bare.get_vocab())
    # Ids outside the vocabulary.
    for wrong in (85, -1, [3, 85], [[3], [-100]]):
        with pytest.raises(ValueError, match=r"`ids` must lie in \[0, 85\); received \[(85|-1)"):
            unigram.decode(wrong)
    # Bytes are read, not named.
    bytes_too = BertGenerationTokenizer(
        train_sentencepiece(byte_fallback=True, vocab_size=330, hard_vocab_limit=False)
    )
    assert bytes_too.tokenize("☃")[1:] == ["<0xE2>", "<0x98>", "<0x83>"]
    assert bytes_too.decode(bytes_too.encode("a ☃ b")) == "a ☃ b"
    # The folder is made, and the path is one.
    path = unigram.save_vocabulary(tmp_path / "new", filename_prefix="my")
    assert path == str(tmp_path / "new/my-spiece.model")
    assert BertGenerationTokenizer(path).get_config() == unigram.get_config()


def test_no_special_tokens_are_added_even_if_asked(unigram):
    assert unigram.encode("the clock", add_special_tokens=True) == unigram.encode("the clock")


def test_clean_up(unigram):
    ids = unigram.encode("we 're so , is n't it ? a ' b . i 've ! she 's 'm")
    text = "we're so, isn't it? a'b. i've! she's'm"
    assert unigram.decode(ids, clean_up_tokenization_spaces=True) == text
    assert unigram.batch_decode([ids], False, True) == [text]


# Sampling


@pytest.mark.parametrize(
    "model_type, options",
    [
        ("unigram", {}),
        ("unigram", {"nbest_size": 20, "alpha": 0.01}),
        ("unigram", {"nbest_size": -1, "alpha": 0.2}),
        ("bpe", {"alpha": 0.3}),
        ("bpe", {"nbest_size": 5, "alpha": 0.3}),
    ],
)
def test_sampling(model_type, options):
    proto = train_sentencepiece(model_type=model_type, vocab_size=120, hard_vocab_limit=False)
    kwargs = {"enable_sampling": True, **options}
    tokenizer = BertGenerationTokenizer(proto, sp_model_kwargs=kwargs)
    plain = BertGenerationTokenizer(proto, sp_model_kwargs={**kwargs, "enable_sampling": False})
    text = "the old clock in the tower struck twelve"
    assert len({tuple(plain.encode(text)) for _ in range(20)}) == 1
    dataset = tf.data.Dataset.from_tensors(text).repeat(20).map(tokenizer)
    for seen in (
        tokenizer([text] * 20).to_list(),
        [tokenizer.encode(text) for _ in range(20)],
        [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for _ in range(20)],
        [row.tolist() for row in dataset.as_numpy_iterator()],
    ):
        assert len(set(map(tuple, seen))) > 3
        assert {tokenizer.decode(row) for row in seen} == {text}
    config = json.loads(json.dumps(tokenizer.get_config()))
    assert config["sp_model_kwargs"] == kwargs
    assert BertGenerationTokenizer.from_config(config).sp_model_kwargs == kwargs
    small, _ = tokenizer.subset(range(tokenizer.vocab_size))
    assert small.sp_model_kwargs == kwargs


@pytest.mark.parametrize(
    "options, message",
    [
        ({"add_bos": True}, "received add_bos=True"),
        ({"nbest_size": 1.5}, "received nbest_size=1.5"),
        ({"enable_sampling": 1}, "received enable_sampling=1"),
        ({"alpha": "high"}, "received alpha='high'"),
        ({"enable_sampling": True, "nbest_size": 1}, "nbest_size below 0 or over 1; received 1"),
    ],
)
def test_wrong_sampling_options(unigram_proto, options, message):
    with pytest.raises(ValueError, match=message):
        BertGenerationTokenizer(unigram_proto, sp_model_kwargs=options)


def test_sampling_needs_a_model_that_can():
    proto = train_sentencepiece(model_type="char", vocab_size=40, hard_vocab_limit=False)
    with pytest.raises(ValueError, match="needs a unigram or BPE model; received a char model"):
        BertGenerationTokenizer(proto, sp_model_kwargs={"enable_sampling": True})
    with pytest.raises(TypeError, match="`split_special_tokens` must be True or False"):
        BertGenerationTokenizer(proto, split_special_tokens="no")
