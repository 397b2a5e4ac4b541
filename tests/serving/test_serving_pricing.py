"""Prices of requests, against times that are known."""

import numpy as np
import pytest

from bertgen_tf.serving.pricing import Cost, RowSizes, Size, row_sizes


def column(*texts):
    return np.array(texts, object)


def test_sizes_of_texts():
    sizes = row_sizes({"text": column(b"12345678", b"", b"x" * 4000)}, 3, 80)
    assert sizes.tokens.tolist() == [2, 0, 80] and sizes.bytes.tolist() == [8, 0, 4000]
    assert row_sizes({"text": column(b"x" * 4000)}, 1, None).tokens.tolist() == [1000]
    # Each row is padded to the longest, and a row costs something however short it is.
    assert sizes.padded == Size(3 * (80 + 16), 4008)
    assert sizes.total == Size(82 + 3 * 16, 4008)
    assert sizes.rows(1, 2).total == Size(16, 0)


def test_sizes_of_other_inputs():
    pair = {"source": column(b"1234", b"12345678"), "target": column(b"12345678", b"")}
    assert row_sizes(pair, 2, 80).tokens.tolist() == [3, 2]
    ids = np.zeros([2, 7], np.int32)
    assert row_sizes({"input_ids": ids, "attention_mask": ids}, 2, 80).tokens.tolist() == [7, 7]
    assert row_sizes({"input_ids": ids}, 2, 5).tokens.tolist() == [5, 5]
    # What has no rows counts as one.
    assert row_sizes({"text": column(b"1234", b"1234")}, None, 80).tokens.tolist() == [2]
    for empty in (column(), np.zeros([0, 3], np.int32), np.zeros([0], np.int32)):
        assert row_sizes({"x": empty}, None, 80).padded == Size(16, 0)


def batch(count, tokens):
    return RowSizes(np.full(count, float(tokens)), np.zeros(count)).padded


def test_the_time_of_a_batch_is_learned():
    cost = Cost()
    assert not cost.is_known and cost.seconds(batch(3, 7)) == 0.0
    for count, tokens in ((1, 5), (4, 11), (2, 3), (8, 40)):
        size = batch(count, tokens)
        cost.learn(size, 0.2 + 0.001 * size.work)
    assert cost.seconds(batch(5, 9)) == pytest.approx(0.2 + 0.001 * 5 * (9 + 16))
    assert cost.is_known


def test_a_request_has_the_fixed_price_of_each_of_its_batches():
    cost = Cost()
    for count in (1, 4, 2):
        cost.learn(batch(count, 4), 0.5 + 0.1 * count)
    total = RowSizes(np.full(60, 4.0), np.zeros(60)).total
    # In 1.5 seconds there are 10 rows beside what is fixed.
    assert cost.target(total, 60, 1.5) == 1.5
    assert cost.price(total, 60, 1.5) == pytest.approx(6 * 1.5)
    # Two rows would take longer: then as long as these alone.
    assert cost.target(total, 60, 0.1) == pytest.approx(1.2)
    assert cost.price(total, 60, 0.1) == pytest.approx(6 * (1 + 0.5 / 0.7))
    assert cost.price(total, 60, np.inf) == pytest.approx(6)


def test_what_changes_is_learned_anew():
    cost = Cost()
    for slope in (0.001, 0.003):
        for step in range(60):
            size = batch(1 + step % 7, 10 + step % 3)
            cost.learn(size, 0.1 + slope * size.work)
    assert cost.seconds(batch(5, 9)) == pytest.approx(0.1 + 0.003 * 5 * 25, rel=0.02)


def test_before_more_is_known_it_is_like_the_prior():
    prior = Cost()
    for count in (1, 8):
        prior.learn(batch(count, 4), 0.5 + 0.01 * batch(count, 4).work)
    cost = Cost(prior)
    assert cost.seconds(batch(2, 9)) == prior.seconds(batch(2, 9))
    cost.learn(batch(1, 4), 3 * prior.seconds(batch(1, 4)))
    assert cost.seconds(batch(6, 9)) == pytest.approx(3 * prior.seconds(batch(6, 9)))


def test_times_that_make_no_sense_give_sense():
    """Longer batches that took less time, such as after a first one that compiled."""
    cost = Cost()
    cost.learn(batch(1, 4), 5.0)
    cost.learn(batch(8, 4), 1.0)
    assert 0 < cost.seconds(batch(1, 4)) < cost.seconds(batch(8, 4)) < 10
    cost = Cost()
    cost.learn(batch(1, 4), 0.0)
    assert cost.seconds(batch(8, 4)) == 0.0


def test_bytes_that_are_cut_off_cost_time():
    cost = Cost()
    cost.learn(batch(1, 4), 0.1)
    long = row_sizes({"text": column(b"!" * 1_000_000)}, 1, 4)
    assert long.tokens.tolist() == [4]
    assert 1 < cost.seconds(long.padded) < 10
    # That is not put down to work.
    cost.learn(long.padded, 0.1 + cost.seconds(long.padded))
    assert cost.seconds(batch(1, 4)) < 0.3
