import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor
from tests.helpers import CORPUS

# Special ids in no usual order; pad is not 0.
PIECES = ["a", "[SEP]", "b", "[CLS]", "[UNK]", "[PAD]", "c", "d", ".", "e", "[MASK]"]
EOS, BOS, UNK, PAD = 1, 3, 4, 5
A, B, C, D, DOT, E, MASK = 0, 2, 6, 7, 8, 9, 10


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(PIECES)


@pytest.fixture(scope="module")
def preprocessor(tokenizer):
    return Seq2SeqPreprocessor(tokenizer, max_source_length=5, max_target_length=4)


def values(batch):
    return tf.nest.map_structure(lambda tensor: tensor.numpy().tolist(), batch)


def check_types(batch, shape_source, shape_target):
    x, y, weight = batch
    assert sorted(x) == [
        "attention_mask",
        "decoder_attention_mask",
        "decoder_input_ids",
        "input_ids",
    ]
    for name, tensor in {**x, "y": y, "weight": weight}.items():
        assert tensor.dtype == (tf.float32 if name == "weight" else tf.int32), name
        source = name in ("input_ids", "attention_mask")
        assert tensor.shape.as_list() == (shape_source if source else shape_target), name


def test_batch(preprocessor):
    batch = preprocessor(["a b", "", "a b c d e a b"], ["c d", "c d e a b", ""])
    check_types(batch, [3, 5], [3, 4])
    x, y, weight = values(batch)
    assert x["input_ids"] == [[A, B, PAD, PAD, PAD], [PAD] * 5, [A, B, C, D, E]]
    assert x["attention_mask"] == [[1, 1, 0, 0, 0], [0] * 5, [1] * 5]
    assert x["decoder_input_ids"] == [[BOS, C, D, PAD], [BOS, C, D, E], [BOS, PAD, PAD, PAD]]
    assert x["decoder_attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert y == [[C, D, EOS, PAD], [C, D, E, EOS], [EOS, PAD, PAD, PAD]]
    assert weight == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_one_pair_is_a_row_of_the_batch(preprocessor):
    single = preprocessor("a b", "c d")
    check_types(single, [5], [4])
    batch = preprocessor(["a b"], ["c d"])
    assert values(single) == values(tf.nest.map_structure(lambda tensor: tensor[0], batch))


def test_the_source_may_be_the_longer_or_the_shorter_one(tokenizer):
    # Source and target lengths are not mixed up.
    wide = Seq2SeqPreprocessor(tokenizer, max_source_length=2, max_target_length=7)
    x, y, _ = values(wide("a b c d", "a b c d"))
    assert x["input_ids"] == [A, B]
    assert y == [A, B, C, D, EOS, PAD, PAD]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", [EOS]), ("a b", [A, B, EOS]), ("a b c", [A, B, C, EOS]), ("a b c d", [A, B, C, EOS])],
)
def test_add_eos_survives_the_cut(tokenizer, text, expected):
    preprocessor = Seq2SeqPreprocessor(tokenizer, 4, 3, add_eos=True)
    assert preprocessor.encode_source(text).numpy().tolist() == expected
    assert preprocessor.encode_source([text, "e"]).to_list() == [expected, [E, EOS]]
    x, _, _ = values(preprocessor([text], ["a"]))
    assert x["input_ids"] == [expected + [PAD] * (4 - len(expected))]
    assert sum(x["attention_mask"][0]) == len(expected)
    assert preprocessor.encode_source(text).dtype == tf.int32


def test_what_models_warm_started_from_bert_read(tokenizer):
    options = {"add_eos": True, "add_bos": True, "mask_first": True}
    preprocessor = Seq2SeqPreprocessor(tokenizer, 6, 5, **options)
    x, y, weight = values(preprocessor("a b", "c d"))
    assert x["input_ids"] == [BOS, A, B, EOS, PAD, PAD]
    assert x["decoder_input_ids"] == [BOS, MASK, C, D, PAD]
    assert y == [MASK, C, D, EOS, PAD] and weight == [1, 1, 1, 1, 0]
    # Cut, both sides keep their special tokens.
    x, y, weight = values(preprocessor("a b c d e", "a b c d e"))
    assert x["input_ids"] == [BOS, A, B, C, D, EOS]
    assert x["decoder_input_ids"] == [BOS, MASK, A, B, C]
    assert y == [MASK, A, B, C, EOS]
    ids = preprocessor.generate_preprocess(["a b"])["input_ids"]
    assert values(ids) == [[BOS, A, B, EOS]]
    assert preprocessor.generate_postprocess(y).numpy() == b"a b c"


def test_hidden_tokens_are_left_out_of_the_text(tokenizer):
    ids = [[BOS, A, UNK, B, EOS, C], [C, PAD, UNK, D, MASK, A]]
    shown = Seq2SeqPreprocessor(tokenizer).generate_postprocess(ids)
    assert values(shown) == [b"a [UNK] b", b"c [UNK] d a"]
    # The eos ends the text, hidden or not.
    hiding = Seq2SeqPreprocessor(tokenizer, hidden_token_ids=[UNK, D, EOS, UNK])
    assert hiding.hidden_token_ids == (UNK, D)
    for tensor in (ids, tf.constant(ids, tf.int64), np.array(ids, np.int32)):
        assert values(hiding.generate_postprocess(tensor)) == [b"a b", b"c a"]
    assert hiding.generate_postprocess(ids[0]).numpy() == b"a b"


def test_word_pieces_without_prose(spiece):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "don", "'", "t", ",", "##s", "go"]
    tokenizer = BertTokenizer(pieces)
    ids = [[2, 5, 6, 7, 8, 10, 9, 4, 1, 3, 5], [0, 10, 0, 9, 9, 0, 3, 5, 5, 5, 5]]
    plain = Seq2SeqPreprocessor(tokenizer, prose=False)
    assert values(plain.generate_postprocess(ids)) == [b"don ' t , gos [MASK] [UNK]", b"goss"]
    assert plain.generate_postprocess(ids[0]).numpy() == b"don ' t , gos [MASK] [UNK]"
    assert values(Seq2SeqPreprocessor(tokenizer).generate_postprocess(ids))[0] != b"don ' t , gos"
    hiding = Seq2SeqPreprocessor(tokenizer, prose=False, hidden_token_ids=[4, 8])
    assert values(hiding.generate_postprocess(ids))[0] == b"don ' t gos [UNK]"
    with pytest.raises(ValueError, match="is for a BertTokenizer only; received a BertGeneration"):
        Seq2SeqPreprocessor(BertGenerationTokenizer(spiece), prose=False)


@pytest.mark.slow
def test_in_datasets_shapes_are_static(preprocessor):
    texts = (["a b", "c", "d e a"], ["c", "d e", ""])
    expected = values(preprocessor(*texts))
    pairs = tf.data.Dataset.from_tensor_slices(texts)
    for dataset in (pairs.map(preprocessor).batch(3), pairs.batch(3).map(preprocessor)):
        x_spec, y_spec, weight_spec = dataset.element_spec
        assert x_spec["input_ids"].shape.as_list() == [None, 5]
        assert x_spec["decoder_attention_mask"].shape.as_list() == [None, 4]
        assert y_spec.shape.as_list() == weight_spec.shape.as_list() == [None, 4]
        assert values(next(iter(dataset))) == expected


def test_pack_pads_to_the_longest_of_the_batch(preprocessor):
    pairs = tf.data.Dataset.from_tensor_slices((["a b", "c", "d"], ["c", "d e", ""]))
    encoded = pairs.map(lambda s, t: (preprocessor.encode_source(s), preprocessor.encode_target(t)))
    first, second = list(encoded.ragged_batch(2).map(preprocessor.pack))
    check_types(first, [2, 2], [2, 3])
    check_types(second, [1, 1], [1, 1])
    assert values(first)[0]["input_ids"] == [[A, B], [C, PAD]]
    assert values(first)[1:] == ([[C, EOS, PAD], [D, E, EOS]], [[1, 1, 0], [1, 1, 1]])
    assert values(second)[0]["decoder_input_ids"] == [[BOS]]
    assert values(second)[1] == [[EOS]]


def test_pack_cuts_to_given_lengths_and_keeps_eos(preprocessor):
    source = tf.ragged.constant([[A, B, C], [D]], dtype=tf.int32)
    target = tf.ragged.constant([[A, B, C], [D]], dtype=tf.int32)
    x, y, weight = values(preprocessor.pack(source, target, 2, 3))
    assert x["input_ids"] == [[A, B], [D, PAD]]
    assert x["attention_mask"] == [[1, 1], [1, 0]]
    assert x["decoder_input_ids"] == [[BOS, A, B], [BOS, D, PAD]]
    assert y == [[A, B, EOS], [D, EOS, PAD]]
    assert weight == [[1, 1, 1], [1, 1, 0]]
    check_types(preprocessor.pack(source[0], target[0], 6, 7), [6], [7])
    lengths = tf.constant([2, 3])
    assert values(preprocessor.pack(source, target, lengths[0], lengths[1])) == (x, y, weight)


def test_generate_preprocess_pads_to_the_longest(preprocessor):
    out = preprocessor.generate_preprocess(["a b", "", "c d e"])
    assert values(out) == {
        "input_ids": [[A, B, PAD], [PAD] * 3, [C, D, E]],
        "attention_mask": [[1, 1, 0], [0, 0, 0], [1, 1, 1]],
    }
    assert out["input_ids"].dtype == out["attention_mask"].dtype == tf.int32
    assert preprocessor.generate_preprocess(["a b c d e a"])["input_ids"].shape == [1, 5]
    assert preprocessor.generate_preprocess([""])["input_ids"].shape == [1, 1]
    assert preprocessor.generate_preprocess([])["attention_mask"].shape == [0, 1]
    with pytest.raises(ValueError, match="put a single string in a list"):
        preprocessor.generate_preprocess("a b")


def test_generate_postprocess(preprocessor):
    ids = [[BOS, A, B, DOT, EOS, C], [C, EOS, PAD, PAD, PAD, PAD]]
    assert preprocessor.generate_postprocess(ids).numpy().tolist() == [b"a b.", b"c"]
    assert preprocessor.generate_postprocess(ids[0]).numpy() == b"a b."


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text(st.sampled_from("abcde. é\x00"), max_size=25) | st.binary()] * 2),
        min_size=1,
        max_size=12,
    ),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_text(tokenizer, pairs, add_eos, add_bos, mask_first):
    preprocessor = Seq2SeqPreprocessor(tokenizer, 6, 5, add_eos, add_bos, mask_first)
    sources, targets = (
        [text.encode("utf-8") if isinstance(text, str) else text for text in side]
        for side in zip(*pairs, strict=True)
    )
    x, y, weight = tf.nest.map_structure(np.array, preprocessor(sources, targets))
    source_ids, target_ids = tokenizer(sources).to_list(), tokenizer(targets).to_list()
    for row in range(len(pairs)):
        labels = [MASK] * mask_first + target_ids[row][: 4 - mask_first] + [EOS]
        real = weight[row] == 1
        assert y[row][real].tolist() == labels
        assert (y[row][~real] == PAD).all() and (weight[row][~real] == 0).all()
        assert x["decoder_input_ids"][row].tolist() == (
            [BOS, *labels[:-1]] + [PAD] * (5 - len(labels))
        )
        assert (x["decoder_attention_mask"][row] == real).all()
        kept = x["attention_mask"][row] == 1
        expected = [BOS] * add_bos + source_ids[row][: 6 - add_bos - add_eos] + [EOS] * add_eos
        assert x["input_ids"][row][kept].tolist() == expected
        assert (np.diff(kept.astype(int)) <= 0).all()
        assert (x["input_ids"][row][~kept] == PAD).all()


def test_a_module_that_holds_a_preprocessor_can_be_saved(preprocessor, tmp_path):
    module = tf.Module()
    module.preprocessor = preprocessor
    module.encode = tf.function(
        lambda text: preprocessor.generate_preprocess(text),
        input_signature=[tf.TensorSpec([None], tf.string)],
    )
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path)).encode(tf.constant(["a b", "c"]))
    assert values(loaded) == values(preprocessor.generate_preprocess(["a b", "c"]))


def test_texts_as_the_tokenizer_of_targets_has_them(tokenizer, spiece):
    preprocessor = Seq2SeqPreprocessor(
        tokenizer, decoder_tokenizer=BertGenerationTokenizer(spiece), max_target_length=2
    )
    assert preprocessor.normalize([f" {text} " for text in CORPUS]) == CORPUS  # none is cut
    preprocessor = Seq2SeqPreprocessor(tokenizer, mask_first=True)
    assert preprocessor.normalize(("A  b.c", "", "x")) == ["a b. c", "", "[UNK]"]


def test_config(tokenizer):
    config = {"max_source_length": 9, "max_target_length": 8}
    config |= {"add_eos": True, "add_bos": True, "mask_first": True}
    config |= {"hidden_token_ids": [E, MASK], "prose": False}
    assert Seq2SeqPreprocessor(tokenizer, **config).get_config() == config
    assert Seq2SeqPreprocessor(tokenizer, np.int64(9)).get_config()["max_source_length"] == 9
    assert type(Seq2SeqPreprocessor(tokenizer, np.int64(9)).max_source_length) is int


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"max_source_length": 0},
            ValueError,
            "max_source_length must be an integer of at least 1, received 0",
        ),
        (
            {"max_target_length": 1},
            ValueError,
            "max_target_length must be an integer of at least 2, received 1",
        ),
        ({"max_source_length": 4.0}, ValueError, "max_source_length must be an integer"),
        ({"max_target_length": True}, ValueError, "max_target_length must be an integer"),
        ({"hidden_token_ids": 3}, TypeError, "`hidden_token_ids` must be a list of integers"),
        ({"hidden_token_ids": [0.5]}, TypeError, "`hidden_token_ids` must be a list of integers"),
        ({"hidden_token_ids": [11]}, ValueError, "must lie in .0, 11., the vocabulary"),
        ({"hidden_token_ids": (-1,)}, ValueError, "must lie in .0, 11., the vocabulary"),
        ({"prose": None}, TypeError, "`prose` must be True or False; received None"),
        ({"add_eos": 1}, TypeError, "`add_eos` must be True or False; received 1"),
        ({"add_bos": None}, TypeError, "`add_bos` must be True or False; received None"),
        ({"mask_first": 0}, TypeError, "`mask_first` must be True or False; received 0"),
        (
            {"max_source_length": 1, "add_eos": True, "add_bos": True},
            ValueError,
            "max_source_length must be an integer of at least 3, received 1",
        ),
    ],
)
def test_wrong_arguments(tokenizer, arguments, error, message):
    with pytest.raises(error, match=message):
        Seq2SeqPreprocessor(tokenizer, **arguments)


def test_wrong_ids(preprocessor):
    rows = tf.ragged.constant([[A, B]], dtype=tf.int32)
    with pytest.raises(ValueError, match="both be one row or both a batch"):
        preprocessor.pack(rows, rows[0])
    with pytest.raises(TypeError, match="must be a RaggedTensor"):
        preprocessor.pack(rows.to_tensor(), rows)
    with pytest.raises(
        ValueError, match="target_length must be an integer of at least 2, received 1"
    ):
        preprocessor.pack(rows, rows, 3, 1)
    with pytest.raises(
        ValueError, match="source_length must be an integer of at least 1, received 0"
    ):
        preprocessor.pack(rows, rows, 0, 3)


def test_mask_first_needs_a_mask_token():
    with pytest.raises(ValueError, match="needs a tokenizer with a mask token"):
        Seq2SeqPreprocessor(BertTokenizer(PIECES[:-1]), mask_first=True)


def test_prompts_begin_as_targets_do_and_do_not_end(tokenizer):
    preprocessor = Seq2SeqPreprocessor(tokenizer, max_source_length=5, max_target_length=4)
    prompts = values(preprocessor.prompt_preprocess(["c d", "", "c d e a b"]))
    assert prompts["decoder_input_ids"] == [
        [BOS, C, D, PAD, PAD, PAD],
        [BOS, PAD, PAD, PAD, PAD, PAD],
        [BOS, C, D, E, A, B],  # not cut
    ]
    assert prompts["decoder_attention_mask"] == [[1, 1, 1, 0, 0, 0], [1] + [0] * 5, [1] * 6]
    masked = Seq2SeqPreprocessor(tokenizer, 5, 4, add_bos=True, add_eos=True, mask_first=True)
    prompts = masked.prompt_preprocess(tf.constant(["c d"]))
    assert values(prompts) == {
        "decoder_input_ids": [[BOS, MASK, C, D]],
        "decoder_attention_mask": [[1, 1, 1, 1]],
    }
    # What a decoder is trained on with the same text begins so.
    trained = masked(["a"], ["c d"])[0]["decoder_input_ids"].numpy()
    np.testing.assert_array_equal(trained[0, :4], prompts["decoder_input_ids"][0])
    for name, tensor in masked.prompt_preprocess(tf.constant([], tf.string)).items():
        assert (tensor.shape, tensor.dtype) == ([0, 1], tf.int32), name
    with pytest.raises(ValueError, match="`texts` must be a vector of strings"):
        masked.prompt_preprocess("c d")
