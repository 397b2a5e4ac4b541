import functools
import itertools
import json

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgen_tf.generation.search.beam_search import beam_search
from bertgen_tf.generation.search.filters import temperature, top_k
from bertgen_tf.generation.search.logits import min_new_tokens, suppress_tokens
from bertgen_tf.generation.search.sampling import sample
from tests.helpers import GOLDEN, SHARED
from tests.helpers.tables import (
    EOS,
    PAD,
    SCORERS,
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

T2T_GOLDEN = SHARED / "golden/t2t_beam_search.npz"
# ------------------------------------------------------------------ against other implementations


@pytest.mark.skipif(not T2T_GOLDEN.exists(), reason="../shared/golden is absent")
@pytest.mark.parametrize("case", range(8))
def test_gnmt_equals_tensor2tensor(case):
    with np.load(T2T_GOLDEN) as golden:
        golden = {k.split("/")[1]: v for k, v in golden.items() if k.startswith(f"case{case}/")}
    num_beams = int(golden["beam_size"])
    output = search(
        golden["table"],
        np.full(len(golden["table"]), START),
        num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=int(golden["decode_length"]),
        scorer="gnmt",
        gnmt_alpha=float(golden["alpha"]),
    )
    ids = golden["ids"]  # as long as the search took
    np.testing.assert_array_equal(output.sequences[:, :, : ids.shape[2]], ids)
    assert not np.any(output.sequences[:, :, ids.shape[2] :])
    np.testing.assert_allclose(output.scores, golden["scores"], rtol=0, atol=1e-4)


def _hf_golden():
    with np.load(GOLDEN / "hf_beam_search.npz") as golden:
        cases = {}
        for key, value in golden.items():
            case, _, name = key.partition("/")
            cases.setdefault(case, {})[name] = value
    cases.pop("transformers")
    return cases.values()


def test_huggingface_equals_transformers():
    """Golden file of make_beam_golden.py: greedy and beam, 1 to 3 EOS, all stopping modes."""
    for golden in _hf_golden():
        options = json.loads(str(golden["options"]))
        eos = options.pop("eos_token_id")
        options.pop("pad_token_id")
        num_beams = options.pop("num_beams")
        processors = []
        if "min_new_tokens" in options:
            processors.append(min_new_tokens(options.pop("min_new_tokens"), eos))
        if "suppress_tokens" in options:
            processors.append(suppress_tokens(options.pop("suppress_tokens")))
        output = search(
            golden["table"][np.newaxis],
            golden["start_ids"],
            None if num_beams == 1 else num_beams,
            eos_token_ids=eos,
            processors=processors,
            **options,
        )
        np.testing.assert_array_equal(output.sequences, golden["sequences"])
        if num_beams > 1:
            np.testing.assert_allclose(output.scores, golden["scores"], rtol=1e-5, atol=1e-5)


def gnmt_reference(table, start, num_beams, max_new_tokens, alpha):
    """tensor2tensor's rules for a batch of one in plain Python: [(score, tokens)], best first."""
    running, finished = [(0.0, [])], []
    for length in range(1, max_new_tokens + 1):
        candidates = [
            (sum_of_log_probs(table, start, [*tokens, token]), [*tokens, token])
            for _, tokens in running
            for token in range(table.shape[-1])
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * num_beams]
        running = [c for c in candidates if c[1][-1] != EOS][:num_beams]
        finished += [
            (final_score(log_prob, length, "gnmt", alpha), tokens)
            for log_prob, tokens in candidates
            if tokens[-1] == EOS
        ]
        finished = sorted(finished, reverse=True)[:num_beams]
        bound = final_score(running[0][0], max_new_tokens, "gnmt", alpha)
        if finished and finished[0][0] > bound:
            break
    return finished or running


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    num_beams=st.integers(1, 3),
    max_new_tokens=st.integers(1, 7),
    alpha=st.sampled_from([0.0, 0.6, 2.0]),
    eos_bias=st.sampled_from([-3.0, 0.0, 2.0]),
)
def test_gnmt_equals_reference(seed, num_beams, max_new_tokens, alpha, eos_bias):
    # Full second order: with less, cycles of the same pairs have exactly the same score.
    table = random_table(seed, batch=1, vocabulary=8, order=8)
    table[..., EOS] += eos_bias
    expected = gnmt_reference(table[0], START, num_beams, max_new_tokens, alpha)
    output = search(
        table,
        [START],
        num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=max_new_tokens,
        scorer="gnmt",
        gnmt_alpha=alpha,
    )
    for (score, tokens), sequence, found in zip(
        expected, output.sequences[0].numpy(), output.scores[0].numpy(), strict=False
    ):
        assert generated(sequence) == tokens
        assert found == pytest.approx(score, abs=1e-4)
    # Slots that nothing filled are empty.
    assert not np.any(output.sequences[0, len(expected) :])
    assert np.all(output.scores[0, len(expected) :] == -1e7)


# ----------------------------------------------------------------------------- what search means


#   start --0.6--> 3 --0.5--> EOS      greedy takes 3 first:     0.6 * 0.5 = 0.30
#     |            '---0.5--> 5 -> EOS                           0.6 * 0.5 = 0.30
#     '----0.4--> 4 --0.9--> EOS       the best path is over 4:  0.4 * 0.9 = 0.36
LATTICE = {
    (START, 3): 0.6,
    (START, 4): 0.4,
    (3, EOS): 0.499,
    (3, 5): 0.501,
    (4, EOS): 0.9,
    (4, 5): 0.1,
    (5, EOS): 1.0,
}


def test_lattice_that_greedy_gets_wrong():
    table = np.full([1, 1, 6, 6], -np.inf, np.float32)  # a model may itself say -inf
    table[..., 0, :] = 0.0  # padding, which finished rows look up
    table[..., EOS, :] = 0.0
    for (last, token), probability in LATTICE.items():
        table[0, 0, last, token] = np.log(probability)
    options = {"max_new_tokens": 4, "length_penalty": 0.0}
    output = search(table, [START], None, **options)
    np.testing.assert_array_equal(output.sequences, [[[START, 3, 5, EOS, PAD]]])
    np.testing.assert_allclose(output.scores, [[np.log(0.6 * 0.501)]], rtol=1e-5)
    for scorer in SCORERS:
        output = search(
            table, [START], 2, scorer=scorer, gnmt_alpha=0.0, early_stopping="never", **options
        )
        np.testing.assert_array_equal(output.sequences, [[[START, 4, EOS, PAD, PAD]]])
        np.testing.assert_allclose(output.scores, [[np.log(0.4 * 0.9)]], rtol=1e-5)


@pytest.mark.parametrize("eos_token_ids", [[1], [1, 3]])
@pytest.mark.parametrize("scorer", SCORERS)
def test_wide_beam_equals_exhaustive_search(scorer, eos_token_ids):
    """A vocabulary below the number of candidates; "huggingface" returns every sequence, in order.

    The step sees the whole history through its state, which therefore must follow the beams.
    """
    vocabulary, max_new_tokens, exponent, num_beams = 4, 3, 0.7, 64
    tables = np.random.default_rng(3).normal(scale=2.0, size=[4**4, vocabulary])
    tables = tables.astype(np.float32)

    def step(ids, index, state):
        history, nested = state  # [rows, 4] and, as a cache might be, [rows, 2, 4]
        history = tf.where(tf.range(4) == index, ids[:, tf.newaxis], history)
        logits = tf.gather(tables, tf.reduce_sum(history * [64, 16, 4, 1], axis=1))
        tf.debugging.assert_equal(nested["cache"][:, 1, :index], history[:, :index])
        return logits, (history, {"cache": tf.stack([-history, history], axis=1)})

    expected = []
    for length in range(1, max_new_tokens + 1):
        for tokens in itertools.product(range(vocabulary), repeat=length):
            ended = tokens[-1] in eos_token_ids
            if any(token in eos_token_ids for token in tokens[:-1]):
                continue
            if not ended and (length < max_new_tokens or scorer == "gnmt"):
                continue
            history, log_prob = [START, 0, 0, 0], 0.0
            for position, token in enumerate(tokens):
                log_prob += log_softmax(tables[np.dot(history, [64, 16, 4, 1])])[token]
                if position < max_new_tokens:
                    history[position + 1] = token
            expected.append((final_score(log_prob, length, scorer, exponent), list(tokens)))
    expected.sort(reverse=True)

    rows = num_beams
    state = (tf.zeros([rows, 4], tf.int32), {"cache": tf.zeros([rows, 2, 4], tf.int32)})
    output = beam_search(
        step,
        state,
        [START],
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        pad_token_id=PAD,
        scorer=scorer,
        length_penalty=exponent,
        early_stopping="never",
        gnmt_alpha=exponent,
    )
    # "gnmt" promises the best hypothesis only: it stops once that is certain.
    certain = len(expected) if scorer == "huggingface" else 1
    assert certain < num_beams
    for (score, tokens), sequence, found in zip(
        expected[:certain], output.sequences[0].numpy(), output.scores[0].numpy(), strict=False
    ):
        assert found == pytest.approx(score, abs=1e-5)
        assert generated(sequence, eos_token_ids) == tokens
    assert np.all(output.scores[0, len(expected) :] == -1e7)
    assert not np.any(output.sequences[0, len(expected) :])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    scorer=st.sampled_from(SCORERS),
    num_beams=st.integers(1, 4),
    max_new_tokens=st.integers(1, 6),
    exponent=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    early_stopping=st.sampled_from([False, True, "never"]),
    eos_token_ids=st.sampled_from([[1], [4, 1], [1, 3, 5]]),
    normalize=st.booleans(),
)
def test_hypotheses_are_what_they_say(
    seed, scorer, num_beams, max_new_tokens, exponent, early_stopping, eos_token_ids, normalize
):
    """Scores are those of the sequences, sorted; sequences differ, end with EOS, then padding."""
    table = random_table(seed, batch=2, vocabulary=19)
    starts = [START, 6]
    output = search(
        table,
        starts,
        num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        scorer=scorer,
        length_penalty=exponent,
        early_stopping=early_stopping,
        gnmt_alpha=exponent,
        normalize_unfinished=normalize and scorer == "gnmt",
    )
    for example, start in enumerate(starts):
        scores = output.scores[example].numpy()
        assert (np.diff(scores) <= 0).all()
        hypotheses = []
        for sequence, token_scores, score in zip(
            output.sequences[example].numpy(),
            output.token_scores[example].numpy(),
            scores,
            strict=True,
        ):
            if score == -1e7:
                assert scorer == "gnmt" and not sequence.any() and not token_scores.any()
                continue
            assert sequence[0] == start
            tokens = generated(sequence, eos_token_ids)
            log_prob = sum_of_log_probs(table[example], start, tokens)
            so_far = [
                sum_of_log_probs(table[example], start, tokens[:i]) for i in range(len(tokens))
            ]
            np.testing.assert_allclose(
                token_scores[: len(tokens)], np.diff([*so_far, log_prob]), atol=1e-4
            )
            assert not token_scores[len(tokens) :].any()
            expected = final_score(log_prob, len(tokens), scorer, exponent)
            if scorer == "gnmt" and tokens[-1] not in eos_token_ids and not normalize:
                expected = log_prob  # no hypothesis of this example finished
            assert score == pytest.approx(expected, abs=1e-4)
            hypotheses.append(tuple(tokens))
        assert len(set(hypotheses)) == len(hypotheses) > 0


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
def test_greedy_equals_beam_of_one(length_penalty):
    table = random_table(11, batch=5, vocabulary=13)
    table[..., [EOS, 4]] += 1.0
    options = {
        "max_new_tokens": 9,
        "eos_token_ids": [EOS, 4],
        "length_penalty": length_penalty,
        "processors": [
            min_new_tokens(2, [EOS, 4]),
            suppress_tokens([7]),
            lambda logits, ids, step: logits + tf.linspace(-1.0, 1.0, 13),  # counts in the score
        ],
    }
    starts = [2, 3, 5, 6, 8]
    one, many = search(table, starts, 1, **options), search(table, starts, None, **options)
    lengths = {len(generated(s[0], [EOS, 4])) for s in many.sequences.numpy()}
    assert len(lengths) > 1 and min(lengths) > 2
    np.testing.assert_array_equal(one.sequences, many.sequences)
    np.testing.assert_allclose(one.scores, many.scores, rtol=1e-6)


@pytest.mark.parametrize("scorer", [None, *SCORERS])
def test_rows_of_a_batch_are_independent(scorer):
    table = random_table(5, batch=4, vocabulary=9)
    starts = np.array([2, 3, 4, 5])
    num_beams = 3 if scorer else None
    options = {"max_new_tokens": 7}
    if scorer:
        options["scorer"] = scorer
        # By tensor2tensor's rules, later hypotheses depend on the batch.
        options["num_return_sequences"] = 3 if scorer == "huggingface" else 1
    together = search(table, starts, num_beams, **options)
    for row in range(4):
        alone = search(table[row : row + 1], starts[row : row + 1], num_beams, **options)
        np.testing.assert_array_equal(together.sequences[row], alone.sequences[0])
        np.testing.assert_allclose(together.scores[row], alone.scores[0], rtol=1e-5)


# ------------------------------------------------------------------------------- beam sampling


def beam_sampling_outcomes(table, start, divide_by, length_penalty):
    """{the two sequences returned: probability} of transformers' rules, by enumeration.

    Two beams, two tokens, one end token, over one example's table [n, vocab, vocab].
    """
    vocabulary, num_beams, num_candidates, outcomes = table.shape[-1], 2, 4, {}

    def in_order(sums, count):
        probabilities = np.exp(sums - np.max(sums))
        probabilities /= probabilities.sum()
        for places in itertools.permutations(range(len(sums)), count):
            left, probability = 1.0, 1.0
            for place in places:
                probability *= probabilities[place] / left
                left -= probabilities[place]
            yield places, probability

    def continuations(running):
        return [
            (sum_of_log_probs(table, start, [*tokens, token]) / divide_by, (*tokens, token))
            for tokens in running
            for token in range(vocabulary)
        ]

    first = continuations([()])
    for places, probability in in_order([total for total, _ in first], num_candidates):
        drawn = [first[place] for place in places]
        finished = [candidate for candidate in drawn[:num_beams] if candidate[1][-1] == EOS]
        running = sorted(candidate for candidate in drawn if candidate[1][-1] != EOS)[-num_beams:]
        second = continuations([tokens for _, tokens in running])
        for pair, then in in_order([total for total, _ in second], num_beams):
            ended = finished + [
                (second[place][0] / 2**length_penalty, second[place][1]) for place in pair
            ]
            best = tuple(tokens for _, tokens in sorted(ended, reverse=True)[:num_beams])
            outcomes[best] = outcomes.get(best, 0.0) + probability * then
    return outcomes


BEAM_SAMPLING = [(1.0, 1.0), (0.6, 0.0), (2.0, 2.0)]  # temperature, length penalty


def assert_outcomes(sequences, expected):
    """`sequences` [batch, 2, 3] are drawn from `beam_sampling_outcomes`."""
    counts = dict.fromkeys(expected, 0)
    for best, other in sequences.tolist():
        pair = (best, other)
        counts[tuple(tuple(tokens[1 : 2 if tokens[1] == EOS else 3]) for tokens in pair)] += 1
    assert_drawn_from(list(counts.values()), list(expected.values()))


@pytest.mark.parametrize(("divide_by", "length_penalty"), BEAM_SAMPLING)
def test_beam_sampling_draws_without_replacement(divide_by, length_penalty):
    table = random_table(21, batch=1, vocabulary=6, scale=1.0)
    batch = 40_000
    output = search(
        table,
        [START] * batch,
        2,
        num_return_sequences=2,
        max_new_tokens=2,
        do_sample=True,
        seeds=tf.stack([tf.fill([batch], 3), tf.range(batch)], axis=1),
        filters=[temperature(divide_by)],
        length_penalty=length_penalty,
    )
    expected = beam_sampling_outcomes(table[0], START, divide_by, length_penalty)
    assert_outcomes(output.sequences.numpy(), expected)
    # The temperature stays in the scores.
    for sequence, score in zip(
        output.sequences[:9, 0].numpy(), output.scores[:9, 0].numpy(), strict=True
    ):
        tokens = generated(sequence)
        total = sum_of_log_probs(table[0], START, tokens) / divide_by
        assert score == pytest.approx(total / len(tokens) ** length_penalty, abs=1e-5)


def test_transformers_samples_beams_from_the_same_distribution():
    """The enumeration, and so the test above, against HuggingFace's own `generate()`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24):
        pytest.skip("transformers 5.24 sorts what it draws: the rules here are those of 5.23")
    from make_beam_golden import TableModel

    table = random_table(21, batch=1, vocabulary=6, scale=1.0)
    for divide_by, length_penalty in BEAM_SAMPLING:
        torch.manual_seed(0)
        sequences = TableModel(table[0]).generate(
            torch.full([20_000, 1], START),
            do_sample=True,
            num_beams=2,
            num_return_sequences=2,
            max_new_tokens=2,
            temperature=divide_by,
            top_k=0,
            length_penalty=length_penalty,
            eos_token_id=EOS,
            pad_token_id=PAD,
            use_cache=False,
        )
        expected = beam_sampling_outcomes(table[0], START, divide_by, length_penalty)
        assert_outcomes(sequences.reshape(-1, 2, 3).numpy(), expected)


def test_beam_sampling_filters_and_bans():
    """Three tokens are left of each beam: others are never drawn, however often one must draw."""
    table, batch = random_table(8, batch=1, vocabulary=12), 300
    output = search(
        table,
        [START] * batch,
        3,
        num_return_sequences=3,
        max_new_tokens=3,
        do_sample=True,
        seeds=tf.stack([tf.range(batch) * 7, tf.zeros([batch], tf.int32)], axis=1),
        processors=[suppress_tokens([6, 7])],
        filters=[top_k(3, 2)],
    )
    allowed = table[0].copy()
    allowed[..., [6, 7]] = -np.inf
    best = np.argsort(-allowed, axis=-1)[..., :3]
    found = set()
    for sequence in output.sequences.numpy().reshape(-1, 4):
        if not sequence.any():
            continue  # nothing was left
        before_last, last = 0, START
        for token in generated(sequence):
            assert token in best[before_last % 2, last]
            before_last, last = last, token
        found.add(tuple(sequence))
    assert len(found) > 15
    assert np.isfinite(output.scores).all()


def test_beam_samples_depend_on_seed_and_example_only():
    table, starts = random_table(5, batch=4, vocabulary=40, scale=0.5), np.array([2, 3, 4, 5])
    seeds = np.array([[1, 5], [1, 6], [2, 5], [-4, 9]])
    options = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 2}
    together = search(table, starts, 3, seeds=seeds, **options)
    order = [2, 0]
    some = search(table[order], starts[order], 3, seeds=seeds[order], **options)
    np.testing.assert_array_equal(some.sequences, together.sequences.numpy()[order])
    same = search(table[:1], [2] * 4, 3, seeds=seeds, **options)
    assert len(set(map(tuple, same.sequences.numpy().reshape(8, 7).tolist()))) == 8


# ------------------------------------------------------------------------- prompts and lengths

PROMPTS = [[2, 3, 5], [2, 6, 4]]


@pytest.mark.parametrize("form", ["as it is", "padded", "limited", "limited tensor"])
@pytest.mark.parametrize("eos_bias", [0.0, -9.0])
@pytest.mark.parametrize("early_stopping", [False, "never"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_prompt_is_the_beginning(scorer, early_stopping, eos_bias, form):
    """After a prompt, the search is that from its last token and the state it left."""
    table, prompts = random_table(31, vocabulary=11), np.array(PROMPTS)
    table[..., EOS] += eos_bias
    options = {
        "scorer": scorer,
        "early_stopping": early_stopping,
        "num_return_sequences": 3,
        "length_penalty": 0.7,
        "normalize_unfinished": scorer == "gnmt",
        "eos_token_ids": [EOS],
        "pad_token_id": PAD,
    }
    expected = beam_search(
        table_step(table, 3),
        {"before_last": tf.repeat(tf.constant([3, 6]), 3)},
        prompts[:, -1],
        num_beams=3,
        max_new_tokens=4,
        **options,
    )
    options["max_new_tokens"] = 4
    width = 7
    if form != "as it is":
        width, prompts = 9, np.pad(prompts, [[0, 0], [0, 2]], constant_values=7)
        options["prompt_length"] = tf.constant(3) if "tensor" in form else 3
    if "limited" in form:
        width, options["max_new_tokens"] = 14, 9
        options["max_length"] = tf.constant(7) if "tensor" in form else 7
    output = search(table, prompts, 3, **options)
    assert output.sequences.shape == (2, 3, width) and output.token_scores.shape[2] == width - 1
    exists = (output.scores.numpy() > -1e7)[..., np.newaxis]
    assert exists[:, 0].all()
    for example, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(
            output.sequences[example, :, :3], np.where(exists[example], prompt, PAD)
        )
    np.testing.assert_array_equal(output.sequences[:, :, 3:7], expected.sequences[:, :, 1:])
    assert not np.any(output.sequences[:, :, 7:]) and not np.any(output.token_scores[:, :, 6:])
    np.testing.assert_allclose(output.scores, expected.scores, rtol=1e-6)
    assert not np.any(output.token_scores[:, :, :2])
    np.testing.assert_allclose(output.token_scores[:, :, 2:6], expected.token_scores, rtol=1e-6)


@pytest.mark.parametrize("num_beams", [None, 3])
def test_prompts_and_lengths_equal_transformers(num_beams):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_beam_golden import TableModel

    for seed, (bias, early_stopping) in enumerate(
        itertools.product([-9.0, 0.0, 2.0], [False, True, "never"])
    ):
        table = random_table(seed, batch=1, vocabulary=14, order=3)
        table[..., [EOS, 4]] += bias
        theirs = {"num_beams": 1, "max_length": 9, "eos_token_id": [EOS, 4], "pad_token_id": PAD}
        ours = {"max_new_tokens": 20, "max_length": 9, "eos_token_ids": [EOS, 4]}
        if num_beams:
            common = {"early_stopping": early_stopping, "length_penalty": 0.6}
            theirs |= common | {"num_beams": num_beams, "num_return_sequences": 2}
            ours |= common | {"num_return_sequences": 2}
        expected = TableModel(table[0]).generate(
            torch.tensor(PROMPTS),
            do_sample=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
            **theirs,
        )
        output = search(table, PROMPTS, num_beams, **ours)
        assert output.sequences.shape[2] == 23 and not np.any(output.sequences[:, :, 9:])
        sequences = expected.sequences.numpy().reshape(2, -1, expected.sequences.shape[1])
        for example, number in itertools.product(range(2), range(sequences.shape[1])):
            found = generated(output.sequences[example, number, 2:9].numpy(), [EOS, 4])
            full = sequences[example, number, 3:]
            ends = np.flatnonzero(np.isin(full, [EOS, 4]))
            assert found == full[: ends[0] + 1 if len(ends) else 6].tolist()
        if num_beams:
            np.testing.assert_allclose(
                output.scores, expected.sequences_scores.reshape(2, 2), rtol=1e-5
            )


# ----------------------------------------------------------------------------- how it runs


def count_steps(table, starts, num_beams, **options):
    calls = []
    plain = table_step(table, num_beams or 1)

    def step(ids, index, state):
        calls.append((int(index), ids.numpy().tolist()))
        return plain(ids, index, state)

    state = {"before_last": tf.zeros([len(starts) * (num_beams or 1)], tf.int32)}
    options = {"max_new_tokens": 20, "eos_token_ids": [EOS], "pad_token_id": PAD} | options
    if num_beams is None:
        sample(step, state, starts, **options)
    else:
        beam_search(step, state, starts, num_beams=num_beams, **options)
    assert [index for index, _ in calls] == list(range(len(calls)))
    return calls


def test_sample_ends_with_the_last_row():
    """Example 0 ends after one token, example 1 after three: three steps."""
    table = np.full([2, 1, 6, 6], -5.0, np.float32)
    table[0, :, START, EOS] = 5.0
    table[1, 0, START, 3] = table[1, 0, 3, 4] = table[1, 0, 4, EOS] = 5.0
    calls = count_steps(table, [START, START], None)
    assert calls == [(0, [START, START]), (1, [EOS, 3]), (2, [PAD, 4])]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"early_stopping": True}, 2),  # two hypotheses finished: EOS, and x EOS
        ({"scorer": "gnmt"}, 1),  # no beam can beat EOS at once any more
        ({"early_stopping": False}, 2),
        # As a mean over 20 tokens, the poor beams could still win: no early end.
        ({"early_stopping": "never", "length_penalty": 2.0}, 20),
    ],
)
def test_beam_search_stops_early(options, steps):
    table = np.zeros([2, 1, 9, 9], np.float32)
    table[..., EOS] = 6.0
    assert len(count_steps(table, [START, 4], 2, **options)) == steps


def test_beam_search_bounds():
    """The length in each bound tells after how many steps the search may end."""
    table = np.full([1, 1, 8, 8], -9.0, np.float32)
    table[..., EOS], table[..., 3] = np.log(0.35), np.log(0.65)
    # Finished: EOS and 3 EOS. The beam 3 3 could still beat the latter, but not as 20 tokens.
    options = {"early_stopping": "never", "length_penalty": -1.0}
    assert len(count_steps(table, [START], 2, **options)) == 3

    table = np.zeros([1, 1, 9, 9], np.float32)
    table[..., EOS] = 3.0
    # EOS at once scores -0.34, a beam that goes on scores -3.3 now but could reach -0.19.
    assert len(count_steps(table, [START], 2, scorer="gnmt", gnmt_alpha=0.6)) == 1
    assert len(count_steps(table, [START], 2, scorer="gnmt", gnmt_alpha=2.0)) == 2


def test_beams_go_on_where_several_eos_come_first():
    table = np.zeros([1, 1, 12, 12], np.float32)
    table[..., [1, 3, 4]] = 9.0, 8.0, 7.0
    table[..., [7, 5]] = 6.0, 5.0
    options = {"early_stopping": "never", "length_penalty": 2.0, "eos_token_ids": [1, 3, 4]}
    for scorer in SCORERS:
        calls = count_steps(table, [START], 2, scorer=scorer, gnmt_alpha=9.0, **options)
        assert calls[1] == (1, [7, 5])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_penalty_that_makes_scores_huge_is_no_end(num_beams):
    """Of 400 tokens of log-probability -1.1 to -1.4, times 400**2: far below a banned token's."""
    table = np.zeros([1, 1, 4, 4], np.float32)
    table[..., EOS] = -9
    options = {"max_new_tokens": 400, "length_penalty": -2.0, "eos_token_ids": []}
    found = search(table, [START], num_beams, **options)
    total = float(np.sum(found.token_scores[0, 0]))
    assert not np.any(found.sequences[0, 0] == EOS) and total < -400 * 1.09
    np.testing.assert_allclose(found.scores[0, 0], total * 400**2, rtol=1e-4)


@pytest.mark.parametrize("scorer", SCORERS)
def test_search_ends_when_nothing_is_left(scorer):
    """Only one sequence is possible: other beams are neither searched to the end nor returned."""
    table = np.full([1, 1, 7, 7], -np.inf, np.float32)
    table[..., START, 3] = table[..., 3, 5] = table[..., [0, 1, 4, 5, 6], EOS] = 0.0
    options = {"scorer": scorer, "early_stopping": True}
    assert len(count_steps(table, [START], 3, **options)) == 3
    for max_new_tokens, sequence in [(4, [START, 3, 5, EOS, PAD]), (2, [START, 3, 5])]:
        output = search(
            table,
            [START],
            3,
            num_return_sequences=3,
            max_new_tokens=max_new_tokens,
            **options,
        )
        empty = [PAD] * len(sequence)
        np.testing.assert_array_equal(output.sequences, [[sequence, empty, empty]])
        np.testing.assert_array_equal(output.scores, [[0.0, -1e7, -1e7]])


def test_scores_stay_finite_where_everything_is_banned():
    def nothing(logits, ids, step):
        return logits - np.inf

    options = {"max_new_tokens": 3, "processors": [nothing]}
    assert np.isfinite(search(random_table(1), [2, 3], None, **options).scores).all()
    for scorer in SCORERS:
        output = search(random_table(1), [2, 3], 2, scorer=scorer, **options)
        np.testing.assert_array_equal(output.scores, [[-1e7], [-1e7]])


def _run(table, starts, num_beams, options):
    if options.get("do_sample"):
        example = tf.range(tf.size(starts))
        options = options | {"seeds": tf.stack([tf.ones_like(example), example], axis=1)}
    return search(table, starts, num_beams, max_new_tokens=6, **options)


MODES = [
    (None, {}),
    (
        3,
        {"num_return_sequences": 3, "processors": [min_new_tokens(2, [EOS]), suppress_tokens([4])]},
    ),
    (3, {"scorer": "gnmt", "num_return_sequences": 2, "eos_token_ids": [1, 5]}),
    (6, {"num_return_sequences": 5, "early_stopping": True}),  # more candidates than vocabulary
    (None, {"do_sample": True, "num_return_sequences": 4, "processors": [suppress_tokens([4])]}),
    (3, {"do_sample": True, "num_return_sequences": 2, "filters": [temperature(0.7), top_k(5, 2)]}),
    (4, {"do_sample": True, "eos_token_ids": [1, 3, 4, 5, 6, 7, 2], "scorer": "gnmt"}),
]


@functools.cache
def _eager(mode):
    """Inputs, and what comes of them without a graph."""
    table, starts = tf.constant(random_table(2, batch=3, vocabulary=8)), tf.constant([2, 3, 6])
    return table, starts, _run(table, starts, *MODES[mode])


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("mode", range(len(MODES)))
def test_graph_and_xla_equal_eager(mode, static, jit_compile):
    table, starts, eager = _eager(mode)
    num_beams, options = MODES[mode]
    table_shape = table.shape if static else [None, 2, None, None]
    function = tf.function(
        lambda table, starts: _run(table, starts, num_beams, options),
        jit_compile=jit_compile,
        autograph=False,
        input_signature=[
            tf.TensorSpec(table_shape),
            tf.TensorSpec([3] if static else [None], tf.int32),
        ],
    )
    graph = function(table, starts)
    np.testing.assert_array_equal(graph.sequences, eager.sequences)
    np.testing.assert_allclose(graph.scores, eager.scores, rtol=1e-5)
    np.testing.assert_allclose(graph.token_scores, eager.token_scores, rtol=1e-5, atol=1e-6)
    count = options.get("num_return_sequences", 1)
    concrete = function.get_concrete_function()
    shapes = [tensor.shape.as_list() for tensor in concrete.outputs]
    batch = 3 if static else None
    assert shapes == [[batch, count, 7], [batch, count], [batch, count, 6]]
    assert [tensor.dtype for tensor in eager] == [tf.int32, tf.float32, tf.float32]
    if not jit_compile:
        check_no_xla_op(concrete.graph.as_graph_def())


def check_no_xla_op(graph):
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    ops = {node.op for node in nodes}
    assert "TopKV2" in ops or "ArgMax" in ops  # the bodies of the loops are among them
    assert not [op for op in ops if "Xla" in op]
    assert not [op for op in ops if op.startswith("TensorArray")]


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_logits_give_float32_scores(dtype):
    table = tf.cast(random_table(8, batch=2), dtype)
    exact = tf.cast(table, tf.float32)
    for num_beams in (None, 2):
        half = search(table, [2, 3], num_beams, max_new_tokens=5)
        full = search(exact, [2, 3], num_beams, max_new_tokens=5)
        np.testing.assert_array_equal(half.sequences, full.sequences)
        np.testing.assert_array_equal(half.scores, full.scores)


@pytest.mark.parametrize("num_beams", [None, 3])
def test_processors_see_the_sequence_so_far(num_beams):
    """A processor that bans what has been generated: no token may come twice."""

    def never_again(logits, ids, step):
        so_far = tf.where(tf.range(ids.shape[1]) <= step, ids, -1)  # [rows, L]
        seen = tf.one_hot(so_far, tf.shape(logits)[1], axis=-1)
        return tf.where(tf.reduce_any(seen > 0, axis=1), -np.inf, logits)

    table = random_table(4, batch=2, vocabulary=11)
    table[..., EOS] -= 4.0
    output = search(table, [2, 3], num_beams, max_new_tokens=8, processors=[never_again])
    for sequence in output.sequences.numpy()[:, 0]:
        tokens = [sequence[0], *generated(sequence)]
        assert len(set(tokens)) == len(tokens) > 5
    assert np.isfinite(output.scores).all()


def test_reorder_replaces_the_gathering_of_rows():
    """A state that keeps its rows and follows the beams by their numbers, `[batch, beams]`."""
    table, starts = random_table(17, batch=2, vocabulary=9), [2, 3]
    plain = table_step(table, 3)

    def step(ids, index, state):
        rows = tf.reshape(state["parents"] + 3 * tf.range(2)[:, tf.newaxis], [-1])
        logits, new = plain(ids, index, {"before_last": tf.gather(state["before_last"], rows)})
        return logits, {**new, "parents": state["parents"]}

    def reorder(state, parents):
        return {**state, "parents": parents}

    state = {"before_last": tf.zeros([6], tf.int32), "parents": tf.tile([[0, 1, 2]], [2, 1])}
    options = {"max_new_tokens": 6, "num_return_sequences": 3}
    output = beam_search(
        step,
        state,
        starts,
        num_beams=3,
        eos_token_ids=[EOS],
        pad_token_id=PAD,
        reorder=reorder,
        **options,
    )
    expected = search(table, starts, 3, **options)
    np.testing.assert_array_equal(output.sequences, expected.sequences)
    np.testing.assert_allclose(output.scores, expected.scores, rtol=1e-6)


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be an integer of at least 1, received 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer of at least 1"),
        ({"num_return_sequences": 3}, ValueError, "num_return_sequences must be at most num_beams"),
        ({"scorer": "t2t"}, ValueError, 'scorer must be "huggingface" or "gnmt", received \'t2t\''),
        ({"early_stopping": "always"}, ValueError, "early_stopping must be"),
        ({"early_stopping": 1}, ValueError, "early_stopping must be"),
        ({"gnmt_alpha": -1.0}, ValueError, "gnmt_alpha must be >= 0"),
        ({"eos_token_ids": 1}, TypeError, "eos_token_ids must be a sequence of integers"),
        ({"start_ids": [[[2]]]}, ValueError, r"start_ids must be integers of shape \[batch\] or"),
        ({"prompt_length": 2}, ValueError, "prompt_length must be from 1 to 1"),
        ({"max_length": 1}, ValueError, "max_length counts the prompt and must be above"),
        ({"filters": [lambda *a: a[0]]}, ValueError, "filters shape draws: pass do_sample=True"),
        ({"do_sample": True}, ValueError, "seeds must be given with do_sample"),
        ({"start_ids": [2.0, 3.0]}, ValueError, "start_ids must be integers"),
        ({"state": tf.zeros([2])}, ValueError, r"state must .* = 4, received shape \(2,\)"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    arguments = {
        "state": tf.zeros([4]),
        "start_ids": [2, 3],
        "num_beams": 2,
        "max_new_tokens": 3,
        "eos_token_ids": [1],
        "pad_token_id": 0,
    }
    with pytest.raises(error, match=message):
        beam_search(lambda ids, index, state: (tf.zeros([4, 5]), state), **arguments | changes)
