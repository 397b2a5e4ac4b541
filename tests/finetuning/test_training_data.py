"""Batches of pairs: against the preprocessor's, each pair once, a function of seed and step."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgen_tf.finetuning.data import TrainingData
from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor
from tests.helpers import WORDS, make_model

RANDOM = np.random.default_rng(0)
PAIRS = [
    tuple(" ".join(RANDOM.choice(WORDS, RANDOM.integers(0, n))) for n in (26, 22))
    for _ in range(61)
]


@pytest.fixture(scope="module")
def preprocessor():
    return make_model(max_source_length=25, max_target_length=20).preprocessor


def rows(batch) -> list[tuple]:
    """The real rows of a batch, without padding."""
    x, y, weight = batch
    real = weight.sum(axis=1) > 0
    masked = zip(x["input_ids"][real], x["attention_mask"][real], y[real], strict=True)
    return [(tuple(ids[mask > 0]), tuple(labels[labels > 0])) for ids, mask, labels in masked]


def test_batches_are_those_of_the_preprocessor(preprocessor):
    data = TrainingData(PAIRS, preprocessor, 6, shuffle=False)
    batches = [data.batch(step) for step in range(data.steps_per_epoch)]
    x, y, weight = preprocessor(*map(list, zip(*PAIRS, strict=True)))
    x = {name: tensor.numpy() for name, tensor in x.items()}
    expected = sorted(rows((x, y.numpy(), weight.numpy())))
    assert sorted(row for batch in batches for row in rows(batch)) == expected
    assert {(b[0]["input_ids"].shape, b[1].shape) for b in batches} == {
        ((6, 16), (6, 16)),
        ((6, 25), (6, 20)),
    }
    for step, (batch_x, labels, batch_weight) in enumerate(batches):
        assert {a.dtype.name for a in (*batch_x.values(), labels)} == {"int32"}
        assert batch_weight.dtype == np.float32
        # The same columns and masks as the preprocessor makes of the same ids.
        lengths = batch_x["attention_mask"].sum(axis=1), (labels > 0).sum(axis=1) - 1
        sources = tf.RaggedTensor.from_tensor(batch_x["input_ids"], lengths[0])
        targets = tf.RaggedTensor.from_tensor(labels, lengths[1])
        packed, y, w = preprocessor.pack(sources, targets, *(a.shape[1] for a in (
            batch_x["input_ids"], labels)))  # fmt: skip
        for name, tensor in packed.items():
            np.testing.assert_array_equal(batch_x[name], tensor)
        np.testing.assert_array_equal(labels, y)
        real = batch_weight.sum(axis=1) > 0
        np.testing.assert_array_equal(batch_weight[real], w.numpy()[real])
        assert data.target_tokens(step) == batch_weight.sum()
        assert data.tokens(step) == lengths[0][real].sum() + batch_weight.sum()


@pytest.fixture(scope="module")
def all_rows(preprocessor):
    data = TrainingData(PAIRS, preprocessor, 61, shuffle=False)
    return sorted(row for i in range(data.steps_per_epoch) for row in rows(data.batch(i)))


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_every_epoch_has_every_pair_once(preprocessor, all_rows, batch_size, seed, epoch):
    data = TrainingData(PAIRS, preprocessor, batch_size, seed=seed)
    steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
    batches = [data.batch(step) for step in steps]
    assert sorted(row for batch in batches for row in rows(batch)) == all_rows
    assert all(len(batch[1]) == batch_size for batch in batches)


@pytest.mark.slow
def test_steps_can_be_sought(preprocessor):
    """Another object, asked for other steps before, has the same batch at a step."""
    first, second = (TrainingData(PAIRS, preprocessor, 8, seed=3) for _ in range(2))
    count = first.steps_per_epoch
    order = [first.batch(step) for step in range(3 * count)]
    for step in (2 * count + 1, 0, count, 3 * count - 1):
        for a, b in zip(
            tf.nest.flatten(order[step]), tf.nest.flatten(second.batch(step)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    # Epochs and seeds differ, also in which length comes when.
    other = TrainingData(PAIRS, preprocessor, 8, seed=4)
    labels = [[b[1].tolist() for b in order[i * count : (i + 1) * count]] for i in range(3)]
    labels.append([other.batch(step)[1].tolist() for step in range(count)])
    assert all(labels[i] != labels[j] for i in range(4) for j in range(i))
    sought = list(second.dataset(5, 9, slice(2, 5)).as_numpy_iterator())
    assert len(sought) == 4
    for batch, whole in zip(sought, order[5:9], strict=True):
        for a, b in zip(tf.nest.flatten(batch), tf.nest.flatten(whole), strict=True):
            np.testing.assert_array_equal(a, b[2:5])


@pytest.mark.slow
def test_long_and_empty_texts_are_told_by_line(preprocessor):
    pairs = [("a man", "bird")] * 9
    pairs[2] = ("bird " * 24, "")  # 24 and the end of a source would be 25 tokens, without bos
    pairs[4] = ("bird " * 26, "bird " * 19)  # just what fits: with its end 20
    pairs[6] = ("", "bird " * 20)
    data = TrainingData(pairs, preprocessor, 4)
    assert data.notes() == [
        "1 target is longer than 20 tokens and was cut, in line 7",
        "1 source is longer than 25 tokens and was cut, in line 5",
        "2 of the pairs have an empty side, in lines 3, 7",
    ]
    assert len(data) == 9
    skipped = TrainingData(pairs, preprocessor, 4, long_targets="skip")
    assert "1 target is longer than 20 tokens and was skipped, in line 7" in skipped.notes("lines")
    assert len(skipped) == 8
    assert sum(len(rows(skipped.batch(i))) for i in range(skipped.steps_per_epoch)) == 8
    many = [("a", "bird " * 30)] * 12
    message = "All 12 pairs are skipped: 12 targets are longer than 20 tokens, first in lines 1, 2"
    with pytest.raises(ValueError, match=message):
        TrainingData(many, preprocessor, 4, long_targets="skip")
    with pytest.raises(ValueError, match="1 target is longer than 20 tokens, in line 7"):
        TrainingData(pairs, preprocessor, 4, long_targets="error")
    with pytest.raises(ValueError, match="long_targets must be one of cut, skip, error"):
        TrainingData(pairs, preprocessor, 4, long_targets="x")
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        TrainingData(pairs, preprocessor, 0)
    with pytest.raises(ValueError, match="pairs must hold at least one pair"):
        TrainingData([], preprocessor, 4)


def test_special_tokens_count_towards_the_lengths():
    model = make_model(
        max_source_length=9, max_target_length=8, add_bos=True, add_eos=True, mask_first=True
    )
    fits, longer = ("bird " * 7, "bird " * 6), ("bird " * 8, "bird " * 7)
    data = TrainingData([fits, longer], model.preprocessor, 2, shuffle=False)
    assert [note.split(", ")[1] for note in data.notes()] == ["in line 2"] * 2
    x, y, _ = data.batch(0)
    expected, labels, _ = model.preprocessor(*map(list, zip(fits, longer, strict=True)))
    np.testing.assert_array_equal(x["input_ids"], expected["input_ids"])
    np.testing.assert_array_equal(y, labels)


def test_targets_have_the_special_tokens_of_their_own_tokenizer(spiece):
    """Of two vocabularies, whose ids of pad, start and end differ."""
    words = BertTokenizer(["the", "old", "man", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]"])
    other = BertGenerationTokenizer(spiece)
    two = Seq2SeqPreprocessor(words, 16, 16, decoder_tokenizer=other)
    pairs = [("the old man", "the man"), ("the", "the old man")]
    data = TrainingData(pairs, two, 2, shuffle=False)
    x, labels, weight = data.batch(0)
    texts = map(list, zip(*pairs, strict=True))
    expected = two.pack(two.encode_source(next(texts)), two.encode_target(next(texts)), 16, 16)
    order = np.argsort(-x["attention_mask"].sum(axis=1))  # the longer source is the first
    for name, tensor in expected[0].items():
        np.testing.assert_array_equal(x[name][order], tensor)
    np.testing.assert_array_equal(labels[order], expected[1])
    np.testing.assert_array_equal(weight[order], expected[2])
    assert words.pad_token_id != other.pad_token_id and words.bos_token_id != other.bos_token_id
