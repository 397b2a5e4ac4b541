import itertools
import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgen_tf.decoding import beam_search, sample
from bertgen_tf.logits import min_new_tokens, suppress_tokens

HERE = pathlib.Path(__file__).parent
T2T_GOLDEN = HERE.parent.parent / "shared/golden/t2t_beam_search.npz"
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


def search(table, start_ids, num_beams, **options):
    """Beam search over a table, or `sample` where `num_beams` is None."""
    rows = num_beams or 1
    state = {"before_last": tf.zeros([tf.size(start_ids) * rows], tf.int32)}
    options = {"eos_token_ids": [EOS], "pad_token_id": PAD} | options
    if num_beams is None:
        return sample(table_step(table, 1), state, start_ids, **options)
    step = table_step(table, num_beams)
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
    with np.load(HERE / "data/hf_beam_search.npz") as golden:
        cases = {}
        for key, value in golden.items():
            case, _, name = key.partition("/")
            cases.setdefault(case, {})[name] = value
    cases.pop("transformers")
    return cases.values()


def test_huggingface_equals_transformers():
    """Golden file: tools/make_beam_golden.py. Greedy and beam, 1 to 3 EOS, all stopping modes."""
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
        for sequence, score in zip(output.sequences[example].numpy(), scores, strict=True):
            if score == -1e7:
                assert scorer == "gnmt" and not sequence.any()
                continue
            assert sequence[0] == start
            tokens = generated(sequence, eos_token_ids)
            log_prob = sum_of_log_probs(table[example], start, tokens)
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
    output = search(table, starts, num_beams, max_new_tokens=6, **options)
    return output.sequences, output.scores


MODES = [
    (None, {}),
    (
        3,
        {"num_return_sequences": 3, "processors": [min_new_tokens(2, [EOS]), suppress_tokens([4])]},
    ),
    (3, {"scorer": "gnmt", "num_return_sequences": 2, "eos_token_ids": [1, 5]}),
    (6, {"num_return_sequences": 5, "early_stopping": True}),  # more candidates than vocabulary
]


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("num_beams", "options"), MODES)
def test_graph_and_xla_equal_eager(num_beams, options, static, jit_compile):
    table, starts = tf.constant(random_table(2, batch=3, vocabulary=8)), tf.constant([2, 3, 6])
    table_shape = table.shape if static else [None, 2, None, None]
    function = tf.function(
        lambda table, starts: _run(table, starts, num_beams, options),
        jit_compile=jit_compile,
        input_signature=[
            tf.TensorSpec(table_shape),
            tf.TensorSpec([3] if static else [None], tf.int32),
        ],
    )
    sequences, scores = _run(table, starts, num_beams, options)
    graph_sequences, graph_scores = function(table, starts)
    np.testing.assert_array_equal(graph_sequences, sequences)
    np.testing.assert_allclose(graph_scores, scores, rtol=1e-5)
    count = options.get("num_return_sequences", 1)
    shapes = [tensor.shape.as_list() for tensor in function.get_concrete_function().outputs]
    batch = 3 if static else None
    assert shapes == [[batch, count, 7], [batch, count]]
    assert sequences.dtype == tf.int32 and scores.dtype == tf.float32


@pytest.mark.parametrize(("num_beams", "options"), MODES)
def test_plain_graph_has_no_xla_op(num_beams, options):
    graph = (
        tf.function(lambda table, starts: _run(table, starts, num_beams, options))
        .get_concrete_function(
            tf.TensorSpec([None, 2, None, None]), tf.TensorSpec([None], tf.int32)
        )
        .graph.as_graph_def()
    )
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


def test_select_chooses_the_tokens():
    """The second best token, a stand-in for random sampling, with the score of what was chosen."""
    table = random_table(6, batch=2)
    indices = []

    def second(logits, index):
        if not indices:  # logits as the model gave them, not log-probabilities
            np.testing.assert_array_equal(logits, table[[0, 1], 0, [2, 3]])
        indices.append(int(index))
        return tf.math.top_k(logits, 2).indices[:, 1]

    output = search(table, [2, 3], None, max_new_tokens=4, select=second)
    assert indices == list(range(len(indices)))
    for example, start in enumerate([2, 3]):
        tokens = generated(output.sequences[example, 0].numpy())
        assert tokens[0] == np.argsort(table[example, 0, start])[-2]
        expected = sum_of_log_probs(table[example], start, tokens) / len(tokens)
        assert output.scores.numpy()[example, 0] == pytest.approx(expected, abs=1e-5)


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be an integer >= 1, received 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer >= 1"),
        ({"num_return_sequences": 3}, ValueError, "num_return_sequences must be at most num_beams"),
        ({"scorer": "t2t"}, ValueError, 'scorer must be "huggingface" or "gnmt", received \'t2t\''),
        ({"early_stopping": "always"}, ValueError, "early_stopping must be"),
        ({"early_stopping": 1}, ValueError, "early_stopping must be"),
        ({"gnmt_alpha": -1.0}, ValueError, "gnmt_alpha must be >= 0"),
        ({"eos_token_ids": 1}, TypeError, "eos_token_ids must be a sequence of integers"),
        ({"start_ids": [[2], [3]]}, ValueError, r"start_ids must be integers of shape \[batch\]"),
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
