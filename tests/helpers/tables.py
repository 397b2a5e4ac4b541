"""A language model of a table of logits, and what tests of searches over it share."""

import numpy as np
import tensorflow as tf

from bertgen_tf.generation.search.beam_search import beam_search
from bertgen_tf.generation.search.sampling import sample

START, EOS, PAD = 2, 1, 0
SCORERS = ("huggingface", "gnmt")


def table_step(table, rows_per_example):
    """Step over logits `table[example, token before the last % n, last]`; its state is the former.

    `table` is [batch or 1, n, vocab, vocab].
    """
    table = tf.convert_to_tensor(table)

    def step(ids, index, state):
        example = tf.range(tf.shape(ids)[0]) // rows_per_example % tf.shape(table)[0]
        before_last = state["before_last"] % tf.shape(table)[1]
        return tf.gather_nd(table, tf.stack([example, before_last, ids], 1)), {"before_last": ids}

    return step


def state_of_prompt(start_ids, options):
    """int32 [batch]: the state where a prompt begins."""
    if start_ids.shape.rank == 1:
        return tf.zeros_like(start_ids)
    padded = tf.pad(start_ids, [[0, 0], [1, 0]])
    length = options.get("prompt_length")
    return tf.gather(padded, (tf.shape(start_ids)[1] if length is None else length) - 1, axis=1)


def search(table, start_ids, num_beams, **options):
    """Beam search over a table, or `sample` where `num_beams` is None."""
    start_ids = tf.cast(start_ids, tf.int32)
    rows = num_beams or options.get("num_return_sequences", 1)
    state = {"before_last": tf.repeat(state_of_prompt(start_ids, options), rows)}
    options = {"eos_token_ids": [EOS], "pad_token_id": PAD} | options
    step = table_step(table, rows)
    if num_beams is None:
        return sample(step, state, start_ids, **options)
    return beam_search(step, state, start_ids, num_beams=num_beams, **options)


def random_table(seed, batch=2, vocabulary=7, scale=1.5, order=2):
    shape = [batch, order, vocabulary, vocabulary]
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def generated(sequence, eos_token_ids=(EOS,)):
    """The generated tokens of a returned sequence; the rest must be padding."""
    ends = np.flatnonzero(np.isin(sequence[1:], eos_token_ids))
    length = ends[0] + 1 if len(ends) else len(sequence) - 1
    assert (sequence[1 + length :] == PAD).all()
    return [int(token) for token in sequence[1 : 1 + length]]


def sum_of_log_probs(table, start, tokens):
    """Log-probability of `tokens` under one example's table [n, vocab, vocab]."""
    table = log_softmax(table.astype(np.float64))
    total, before_last, last = 0.0, 0, start
    for token in tokens:
        total += table[before_last % len(table), last, token]
        before_last, last = last, token
    return total


def final_score(log_prob, length, scorer, exponent):
    divisor = length if scorer == "huggingface" else (5 + length) / 6
    return log_prob / divisor**exponent


def assert_drawn_from(counts, probabilities):
    """Pearson's test at about one in 30,000; cells that expect fewer than 10 are one cell."""
    counts, probabilities = np.asarray(counts, np.float64), np.asarray(probabilities, np.float64)
    assert counts.shape == probabilities.shape
    np.testing.assert_allclose(probabilities.sum(), 1.0, atol=1e-6)
    assert not np.any(counts[probabilities == 0])
    counts, probabilities = counts[probabilities > 0], probabilities[probabilities > 0]
    expected = counts.sum() * probabilities
    rare = expected < 10
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], max(expected[rare].sum(), 1.0))
    freedom = len(expected) - 1
    assert freedom > 0
    statistic = ((counts - expected) ** 2 / expected).sum()
    # The cube root of chi-square is almost normal (Wilson and Hilferty 1931).
    deviation = 2 / (9 * freedom)
    assert ((statistic / freedom) ** (1 / 3) - (1 - deviation)) / deviation**0.5 < 4, statistic
