import itertools

import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf.generation.search import filters
from bertgen_tf.generation.search.logits import min_new_tokens, suppress_tokens
from bertgen_tf.generation.search.sampling import Sampling, sample
from tests.helpers.tables import (
    EOS,
    PAD,
    START,
    assert_drawn_from,
    final_score,
    generated,
    log_softmax,
    random_table,
    search,
    sum_of_log_probs,
    table_step,
)

DRAWS = 100_000


def seeds_of(batch, seed=1, first=0):
    return np.stack([np.full(batch, seed), np.arange(first, first + batch)], axis=1)


def draw_tokens(logits, **options):
    """`DRAWS` first tokens over the logits [vocab], as numbers of times; and their scores."""
    table = np.tile(logits.astype(np.float32), [1, 1, len(logits), 1])
    output = search(
        table,
        [START] * 10,
        None,
        max_new_tokens=1,
        do_sample=True,
        seeds=seeds_of(10),
        num_return_sequences=DRAWS // 10,
        eos_token_ids=[],
        **options,
    )
    tokens = output.sequences.numpy()[..., 1].ravel()
    return np.bincount(tokens, minlength=len(logits)), tokens, output.scores.numpy().ravel()


# ------------------------------------------------------------- the distribution, exactly, by numpy


def softmax(logits):
    return np.exp(log_softmax(logits.astype(np.float64)))


def keep(probabilities, kept):
    kept = np.asarray(kept)
    return np.where(kept, probabilities, 0.0) / probabilities[kept].sum()


def keep_until(probabilities, order, mass):
    """The first of `order` that have `mass` together."""
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros(len(probabilities), bool)
    kept[order[before < mass]] = True
    return keep(probabilities, kept)


def keep_best(logits, count):
    return keep(softmax(logits), logits >= np.sort(logits)[-count])


def keep_nucleus(logits, mass):
    probabilities = softmax(logits)
    return keep_until(probabilities, np.argsort(-probabilities), mass)


def keep_above(logits, share):
    probabilities = softmax(logits)
    return keep(probabilities, probabilities >= share * probabilities.max())


def keep_typical(logits, mass):
    probabilities = softmax(logits)
    surprise = -np.log(probabilities)
    order = np.argsort(np.abs(surprise - (probabilities * surprise).sum()))
    return keep_until(probabilities, order, mass)


LOGITS = np.random.default_rng(12).normal(scale=1.5, size=17)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], softmax(LOGITS)),
        ([("temperature", 0.6)], softmax(LOGITS / 0.6)),
        ([("temperature", 2.5)], softmax(LOGITS / 2.5)),
        ([("top_k", 5)], keep_best(LOGITS, 5)),
        ([("top_p", 0.8)], keep_nucleus(LOGITS, 0.8)),
        ([("min_p", 0.15)], keep_above(LOGITS, 0.15)),
        ([("typical_p", 0.6)], keep_typical(LOGITS, 0.6)),
        ([("temperature", 0.7), ("top_p", 0.9)], keep_nucleus(LOGITS / 0.7, 0.9)),
    ],
)
def test_tokens_are_drawn_from_the_filtered_distribution(settings, expected):
    assert all(name == "temperature" for name, _ in settings) or 3 < np.sum(expected > 0) < 14
    chosen = [getattr(filters, name)(value) for name, value in settings]
    counts, tokens, scores = draw_tokens(LOGITS, filters=chosen)
    assert_drawn_from(counts, expected)
    # A filter shapes the draw, not the score.
    np.testing.assert_allclose(scores, log_softmax(LOGITS)[tokens], atol=1e-5)


def test_processors_shape_both_draw_and_score():
    def halve(logits, ids, step):  # of logits in the draw, of log-probabilities in the score
        return logits / 2

    counts, tokens, scores = draw_tokens(LOGITS, processors=[halve, suppress_tokens([3, 5])])
    assert_drawn_from(counts, keep(softmax(LOGITS / 2), ~np.isin(np.arange(17), [3, 5])))
    np.testing.assert_allclose(scores, log_softmax(LOGITS)[tokens] / 2, atol=1e-5)


def test_sequences_are_drawn_from_their_joint_distribution():
    """Two examples, up to three tokens, several end tokens: every possible sequence is counted."""
    table, starts, eos = random_table(3, batch=2, vocabulary=5, scale=1.0), [2, 3], [EOS, 4]
    output = search(
        table,
        starts,
        None,
        max_new_tokens=3,
        eos_token_ids=eos,
        do_sample=True,
        seeds=seeds_of(2),
        num_return_sequences=20_000,
    )
    for example, start in enumerate(starts):
        expected = {}
        for length in (1, 2, 3):
            for tokens in itertools.product(range(5), repeat=length):
                if set(tokens[:-1]) & set(eos) or (length < 3 and tokens[-1] not in eos):
                    continue
                padded = (start, *tokens, *[PAD] * (3 - length))
                expected[padded] = np.exp(sum_of_log_probs(table[example], start, tokens))
        found, numbers = np.unique(output.sequences[example], axis=0, return_counts=True)
        counts = dict(zip(map(tuple, found.tolist()), numbers, strict=True))
        assert set(counts) <= set(expected)
        assert_drawn_from([counts.get(key, 0) for key in expected], list(expected.values()))


# ------------------------------------------------------------------------------- what it returns

SAMPLE = {"do_sample": True, "max_new_tokens": 7}


@pytest.mark.parametrize("exponent", [0.0, 0.7])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scorer", ["huggingface", "gnmt"])
def test_scores_are_those_of_the_sequences(scorer, normalize, exponent):
    table, starts = random_table(5, batch=3, vocabulary=9), [2, 3, 4]
    table[..., EOS] -= 0.5
    output = search(
        table,
        starts,
        None,
        **SAMPLE,
        seeds=seeds_of(3),
        num_return_sequences=5,
        scorer=scorer,
        length_penalty=exponent,
        gnmt_alpha=exponent,
        normalize_unfinished=normalize,
    )
    assert output.sequences.shape == (3, 5, 8) and output.token_scores.shape == (3, 5, 7)
    ended = set()
    for example, number in itertools.product(range(3), range(5)):
        tokens = generated(output.sequences[example, number].numpy())
        token_scores = output.token_scores[example, number].numpy()
        for i in range(7):
            expected = sum_of_log_probs(table[example], starts[example], tokens[: i + 1])
            assert token_scores[: i + 1].sum() == pytest.approx(expected, abs=1e-4)
        assert not token_scores[len(tokens) :].any()
        ended.add(tokens[-1] == EOS)
        score = final_score(expected, len(tokens), scorer, exponent)
        if scorer == "gnmt" and tokens[-1] != EOS and not normalize:
            score = expected
        assert output.scores[example, number].numpy() == pytest.approx(score, abs=1e-4)
    assert ended == {False, True}


def test_draws_depend_on_seed_example_and_number_only():
    table, starts = random_table(5, batch=4, vocabulary=40, scale=0.5), np.array([2, 3, 4, 5])
    options = SAMPLE | {"num_return_sequences": 3}
    together = search(table, starts, None, seeds=seeds_of(4, first=6), **options)
    again = search(table, starts, None, seeds=seeds_of(4, first=6), **options)
    np.testing.assert_array_equal(together.sequences, again.sequences)
    order = [2, 0]
    some = search(table[order], starts[order], None, seeds=seeds_of(4, first=6)[order], **options)
    np.testing.assert_array_equal(some.sequences, together.sequences.numpy()[order])
    fewer = search(
        table, starts, None, seeds=seeds_of(4, first=6), **options | {"num_return_sequences": 2}
    )
    np.testing.assert_array_equal(fewer.sequences, together.sequences[:, :2])
    # The same table for all: each example, number and seed draws another sequence.
    sequences = set()
    for seed in (1, 2, -1):
        output = search(table[:1], [2] * 4, None, seeds=seeds_of(4, seed), **options)
        sequences |= set(map(tuple, output.sequences.numpy().reshape(-1, 8).tolist()))
    assert len(sequences) == 3 * 4 * 3


# -------------------------------------------------------------------------- prompts and lengths


def with_padding(prompts, columns):
    """Columns that do not count, of tokens that must not matter."""
    return np.pad(prompts, [[0, 0], [0, columns]], constant_values=5)


@pytest.mark.parametrize("padding", [None, 0, 2])
@pytest.mark.parametrize("do_sample", [False, True])
def test_prompt_continues_a_sequence(do_sample, padding):
    """What was generated, given as a prompt, is continued as it was."""
    table, starts = random_table(14, batch=3, vocabulary=11), [2, 3, 4]
    table[..., EOS] += 0.5
    options = {"do_sample": do_sample, "seeds": seeds_of(3)}
    options["processors"] = [min_new_tokens(2, [EOS])]
    whole = search(table, starts, None, max_new_tokens=7, **options)
    prompts = whole.sequences.numpy()[:, 0, :3]
    assert not (prompts == EOS).any() and (whole.sequences.numpy() == EOS).any()
    if padding is not None:
        options["prompt_length"] = tf.constant(3) if padding else 3
        prompts = with_padding(prompts, padding)
    output = search(table, prompts, None, max_new_tokens=5, **options)
    width = 3 + (padding or 0) + 5
    assert output.sequences.shape == (3, 1, width) and output.token_scores.shape[2] == width - 1
    np.testing.assert_array_equal(output.sequences[:, :, :8], whole.sequences)
    assert not np.any(output.sequences[:, :, 8:]) and not np.any(output.token_scores[:, :, 7:])
    assert not np.any(output.token_scores[:, :, :2])
    np.testing.assert_allclose(output.token_scores[:, :, 2:7], whole.token_scores[:, :, 2:])
    # The score is that of the generated tokens, by their number.
    for row in range(3):
        tokens = generated(whole.sequences[row, 0].numpy()[2:])
        total = output.token_scores[row].numpy().sum()
        np.testing.assert_allclose(output.scores[row, 0], total / len(tokens), rtol=1e-5)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_max_length_counts_the_prompt(as_tensor):
    table, prompts = (
        random_table(7, batch=2, vocabulary=11),
        with_padding([[2, 3, 4], [2, 4, 6]], 1),
    )
    table[..., EOS] -= 9.0
    options = {"prompt_length": tf.constant(3) if as_tensor else 3}
    expected = search(table, prompts, None, max_new_tokens=2, **options)
    limit = tf.constant(5) if as_tensor else 5
    output = search(table, prompts, None, max_new_tokens=6, max_length=limit, **options)
    assert output.sequences.shape == (2, 1, 10)
    np.testing.assert_array_equal(output.sequences[:, :, :6], expected.sequences)
    assert not np.any(output.sequences[:, :, 5:]) and np.all(output.sequences[:, :, 4] > 1)
    np.testing.assert_array_equal(output.scores, expected.scores)
    # The smaller limit counts.
    output = search(table, prompts, None, max_new_tokens=2, max_length=limit + 4, **options)
    np.testing.assert_array_equal(output.sequences, expected.sequences)


# ------------------------------------------------------------------------------------- in pieces


@pytest.mark.parametrize("tokens", [1, 3, None])
@pytest.mark.parametrize("jit_compile", [None, False, True])
def test_pieces_equal_the_whole(jit_compile, tokens):
    table, prompts = (
        random_table(9, batch=3, vocabulary=11),
        np.array([[2, 3], [2, 4], [3, 5]], np.int32),
    )
    table[..., EOS] -= 9.0
    state = {"before_last": tf.repeat(prompts[:, 0], 2)}
    options = SAMPLE | {"eos_token_ids": [EOS], "pad_token_id": PAD, "num_return_sequences": 2}
    start = {"seeds": seeds_of(3), "prompt_length": 2}
    whole = sample(table_step(table, 2), state, prompts, **options, **start)
    sampling = Sampling(**options)
    steps = []

    def step(ids, index, state):
        steps.append(index)
        return table_step(table, 2)(ids, index, state)

    def advance(loop):
        return sampling.advance(step, loop, tokens)

    if jit_compile is not None:
        advance = tf.function(advance, jit_compile=jit_compile, autograph=False)
    loop = sampling.start(state, prompts, **start)
    filled, pieces = 2, 0
    while not sampling.is_done(loop):
        np.testing.assert_array_equal(
            sampling.output(loop).sequences[:, :, :filled], whole.sequences[:, :, :filled]
        )
        assert not np.any(sampling.output(loop).sequences[:, :, filled:])
        loop = advance(loop)
        filled, pieces = int(loop.index) + 1, pieces + 1
        assert pieces < 8
    assert pieces == {1: 7, 3: 3, None: 1}[tokens]
    for ours, theirs in zip(sampling.output(loop), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    # Once done, it stays as it is and asks no more.
    if jit_compile is None:
        assert [int(index) for index in steps] == list(range(1, 8))
        assert int(sampling.advance(step, loop).index) == int(loop.index) and len(steps) == 7


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"max_new_tokens": 0},
            ValueError,
            "max_new_tokens must be an integer of at least 1, received 0",
        ),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences must be 1 without do_samp"),
        ({"filters": [lambda *a: a[0]]}, ValueError, "filters shape draws: pass do_sample=True"),
        ({"scorer": "t2t"}, ValueError, 'scorer must be "huggingface" or "gnmt"'),
        ({"eos_token_ids": 1}, TypeError, "eos_token_ids must be a sequence of integers"),
        ({"start_ids": [[[2]]]}, ValueError, r"start_ids must be integers of shape \[batch\] or"),
        ({"prompt_length": 2}, ValueError, "prompt_length must be from 1 to 1"),
        ({"max_length": 1}, ValueError, "max_length counts the prompt and must be above"),
        ({"do_sample": True}, ValueError, "seeds must be given with do_sample"),
        ({"do_sample": True, "seeds": [1, 2]}, ValueError, r"seeds must be .* \[batch, 2\], rec"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    arguments = {
        "state": tf.zeros([2]),
        "start_ids": [2, 3],
        "max_new_tokens": 3,
        "eos_token_ids": [1],
        "pad_token_id": 0,
    }
    with pytest.raises(error, match=message):
        sample(lambda ids, index, state: (tf.zeros([2, 5]), state), **arguments | changes)
