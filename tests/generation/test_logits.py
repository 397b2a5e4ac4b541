import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf.generation.search import logits
from bertgen_tf.generation.search.logits import BANNED, compose, min_new_tokens, suppress_tokens
from tests.helpers.logits_cases import assert_equal, golden_cases, make, run

LOGITS = tf.constant(np.linspace(-2.0, 3.0, 14, dtype=np.float32).reshape(2, 7))
IDS = tf.zeros([2, 5], tf.int32)
CASES = golden_cases()
# One case of each processor and filter, and a few of many: those in which much happens.
TYPICAL = [
    max(
        (case for case in CASES if len(case[0]) == 1 and case[0][0][0] == name),
        key=lambda case: np.sum(case[3] != case[4]),
    )
    for name in dict.fromkeys(case[0][0][0] for case in CASES if len(case[0]) == 1)
]
TYPICAL += [case for case in CASES if len(case[0]) > 6][:3]


def names(case):
    return "-".join(name for name, _ in case[0])


def _allowed(scores: tf.Tensor) -> np.ndarray:
    """Which tokens are not banned; the others must be unchanged."""
    banned = scores.numpy() == BANNED
    np.testing.assert_array_equal(scores.numpy()[~banned], LOGITS.numpy()[~banned])
    assert (banned == banned[0]).all()
    return np.flatnonzero(~banned[0])


# ----------------------------------------------------------------------------- as transformers


def test_equals_transformers():
    """Golden file of make_logits_golden.py: each processor and filter, alone and with others.

    Behind the tokens that count there are others, and some scores are minus infinity.
    """
    assert len(TYPICAL) == 18 + 3
    for number, (processors, length, ids, scores, expected) in enumerate(CASES):
        banned = np.float32([BANNED, -np.inf][number % 2])
        found = run(make(processors), np.maximum(scores, banned), ids, length - 1)
        assert_equal(found, expected, str(processors))
        assert not np.isnan(found).any()


@pytest.mark.parametrize("case", TYPICAL, ids=names)
def test_graph_and_xla_equal_eager_and_hold_no_xla_op(case):
    """Nothing is known of batch, vocabulary and length when traced."""
    processors, length, ids, scores, expected = case
    process = make(processors)
    signature = [
        tf.TensorSpec([None, None]),
        tf.TensorSpec([None, None], tf.int32),
        tf.TensorSpec([], tf.int32),
    ]
    plain = tf.function(process, input_signature=signature, autograph=False)
    compiled = tf.function(process, input_signature=signature, jit_compile=True, autograph=False)
    for function in (plain, compiled):
        assert_equal(function(scores, ids, length - 1).numpy(), expected)
    graph = plain.get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    ops = {node.op for node in nodes}
    assert not [op for op in ops if "Xla" in op or op.startswith("TensorArray") or op == "OneHot"]


def test_shapes_stay_known():
    for case in TYPICAL:
        process = make(case[0])
        inputs = tf.TensorSpec([None, 13]), tf.TensorSpec([None, 11], tf.int32)
        function = tf.function(
            lambda x, i, step, process=process: process(x, i, step), autograph=False
        )
        graph = function.get_concrete_function(*inputs, tf.TensorSpec([], tf.int32))
        assert graph.outputs[0].shape.as_list() == [None, 13]
        assert graph.outputs[0].dtype == tf.float32


# ----------------------------------------------------------------------------- what is banned


def test_what_is_banned_stays_banned():
    """Whatever follows, and however the ban is written."""
    source = {"input_ids": [[2, 3, 4, 5]], "attention_mask": [[1, 1, 1, 1]]}
    raising = {
        "repetition": logits.repetition_penalty(0.01),
        "repetition, upwards": logits.repetition_penalty(50.0),
        "source": logits.encoder_repetition_penalty(90.0, **source),
        "source, downwards": logits.encoder_repetition_penalty(0.01, **source),
        "bias": logits.sequence_bias([((token,), 1e9) for token in range(7)]),
        "bias after others": logits.sequence_bias([((2, token), 1e30) for token in range(7)]),
        "decay": logits.exponential_decay_length_penalty(0, 9.0, list(range(7))),
        "decay, slower": logits.exponential_decay_length_penalty(0, 0.1, list(range(7))),
        "temperature": make([("temperature", {"t": 100.0})]),
        "low temperature": make([("temperature", {"t": 0.1})]),
        "top_k": make([("top_k", {"k": 5})]),
        "top_p": make([("top_p", {"p": 0.99})]),
        "min_p": make([("min_p", {"p": 1e-9})]),
        "typical_p": make([("typical_p", {"p": 0.99})]),
    }
    ids = np.array([[6, 3, 2, 4, 5, 2]] * 2, np.int32)
    for banned in (BANNED, -np.inf, 0.6 * BANNED, BANNED - 3.0, np.finfo(np.float32).min):
        scores = LOGITS.numpy().copy()
        scores[:, [2, 5]] = banned
        for name, process in raising.items():
            found = run(compose([process, process]), scores, ids, 5)
            assert (found[:, [2, 5]] <= BANNED / 2).all(), name
            assert not np.isnan(found).any() and (found < 1e7).all(), name
            assert (found > BANNED / 2).any(axis=1).all(), name


def test_a_ban_outweighs_all_biases():
    biases = [((2, 3), 1e30), ((6, 2, 3), 1e30), ((3,), -np.inf), ((4,), -1e20), ((5,), 1e30)]
    ids = np.array([[6, 2]] * 2, np.int32)
    found = run(logits.sequence_bias(biases), LOGITS.numpy(), ids, 1)
    np.testing.assert_array_equal(found[:, [3, 4]], BANNED)
    np.testing.assert_allclose(found[:, 5], 1e6 + LOGITS[:, 5])
    ids = np.array([[6, 2, 4, 5, 5, 3, 2, 0]] * 2, np.int32)
    biases = [(ids[0, start:], 1e30) for start in range(7)] + [((0,), -np.inf)]
    found = run(logits.sequence_bias(biases), LOGITS.numpy(), ids, 6)
    np.testing.assert_array_equal(found[:, 0], BANNED)


def test_only_forcing_replaces_a_ban():
    scores = np.full([1, 7], BANNED, np.float32)
    for process in (logits.forced_bos(4), logits.forced_eos([4], 2)):
        found = run(process, scores, IDS[:1], 0)
        np.testing.assert_array_equal(found, [[BANNED] * 4 + [0.0] + [BANNED] * 2])


# ----------------------------------------------------------------------------- single tokens


def test_suppress_tokens_at_every_step():
    for step in (0, 4):
        output = suppress_tokens([5, 0, 5])(LOGITS, IDS, tf.constant(step))
        np.testing.assert_array_equal(_allowed(output), [1, 2, 3, 4, 6])


def test_min_new_tokens_bans_every_eos_for_n_steps():
    for step, allowed in [(0, [0, 2, 3, 5, 6]), (2, [0, 2, 3, 5, 6]), (3, range(7))]:
        output = min_new_tokens(3, [1, 4])(LOGITS, IDS, tf.constant(step))
        np.testing.assert_array_equal(_allowed(output), allowed)


@pytest.mark.parametrize("as_length", [int, tf.constant, lambda n: tf.constant(n, tf.int64)])
def test_lengths_may_be_tensors(as_length):
    """With a prompt of 3 tokens; the steps at which something is banned."""
    steps = {
        "new": (logits.min_new_tokens(2, [1], prompt_length=as_length(3)), [0, 1, 2, 3]),
        "begin": (logits.begin_suppress_tokens([1], as_length(3)), [2]),
        "end": (logits.forced_eos([1], as_length(6)), [4]),
        "decay": (
            logits.exponential_decay_length_penalty(1, 2.0, [1], prompt_length=as_length(3)),
            [4],
        ),
    }
    for name, (process, expected) in steps.items():
        changed = [
            step for step in range(5) if np.any(run(process, LOGITS, IDS, step) != LOGITS.numpy())
        ]
        assert changed == expected, name


def test_no_token_ids_change_nothing():
    unchanged = [
        suppress_tokens([]),
        logits.begin_suppress_tokens([], 1),
        min_new_tokens(3, []),
        logits.bad_words([], []),
        logits.bad_words([[1], [4]], [4, 1]),  # only ends, which are no words
        logits.sequence_bias([]),
        logits.exponential_decay_length_penalty(0, 2.0, []),
    ]
    for process in unchanged:
        np.testing.assert_array_equal(run(process, LOGITS, IDS, 0), LOGITS)


def test_decay_without_end_stays_finite():
    process = logits.exponential_decay_length_penalty(0, 1e10, [0, 3])
    scores = np.array([[0.0, 1.0, 2.0, -2.0]], np.float32)
    found = run(process, scores, IDS[:1], 2000)
    np.testing.assert_allclose(found, [[0.0, 1.0, 2.0, 1e6]], rtol=1e-5)


# ----------------------------------------------------------------------------- sources


def source_processors(input_ids, attention_mask):
    source = {"input_ids": input_ids, "attention_mask": attention_mask}
    return {
        "penalty": logits.encoder_repetition_penalty(1.7, **source),
        "no unigram": logits.encoder_no_repeat_ngram(1, **source),
        "no trigram": logits.encoder_no_repeat_ngram(3, **source),
    }


def test_source_padding_does_not_count():
    """A batch of three gives what three batches of one give; 0 pads but is also a token."""
    sources = [[5, 4, 2, 0, 6], [4, 2, 3], []]
    input_ids = np.array([[5, 4, 2, 0, 6], [4, 2, 3, 0, 0], [0] * 5])
    mask = np.array([[1] * 5, [1] * 3 + [0] * 2, [0] * 5])
    scores = np.random.default_rng(1).normal(size=[6, 7]).astype(np.float32)
    ids = np.array([[6, 4, 2], [6, 2, 0], [6, 4, 2], [0, 2, 3], [6, 0, 0], [1, 1, 1]], np.int32)
    alone = [source_processors([source], np.ones([1, len(source)])) for source in sources]
    for name, process in source_processors(input_ids, mask).items():
        found = run(process, scores, ids, 2)
        expected = [
            run(processors[name], scores[2 * n : 2 * n + 2], ids[2 * n : 2 * n + 2], 2)
            for n, processors in enumerate(alone)
        ]
        np.testing.assert_array_equal(found, np.concatenate(expected))
        assert np.any(found[:4] != scores[:4]) and np.all(found[4:] == scores[4:])


def test_source_tokens_that_the_decoder_does_not_know():
    for name, process in source_processors([[4, 2, 9, 7, 5]], [[1] * 5]).items():
        found = run(process, LOGITS, np.array([[3, 4, 2], [3, 2, 9]], np.int32), 2)
        changed = np.any(found != LOGITS.numpy(), axis=0)
        expected = [] if name == "no trigram" else [2, 4, 5]
        np.testing.assert_array_equal(np.flatnonzero(changed), expected)


# ----------------------------------------------------------------------------- sequences


def test_ngrams_by_hand():
    ids = np.array([[6, 3, 4, 6, 3, 5, 6, 3, 3], [6, 3, 4, 4, 6, 4, 3, 3, 3]], np.int32)
    found = run(logits.no_repeat_ngram(3), LOGITS, ids, 7)  # the last id does not count
    np.testing.assert_array_equal(np.argwhere(found == BANNED), [[0, 4], [0, 5]])
    found = run(logits.no_repeat_ngram(2), LOGITS, ids, 7)
    banned = [[0, 4], [0, 5], [1, 3], [1, 4]]
    np.testing.assert_array_equal(np.argwhere(found == BANNED), banned)


def test_token_0_precedes_no_first_token():
    ids = np.array([[5, 3, 0], [5, 0, 0]], np.int32)
    source = {"input_ids": [[5, 0, 4]], "attention_mask": [[0, 1, 1]]}
    for process, expected in [
        (logits.no_repeat_ngram(2), [[1, 0]]),
        (logits.encoder_no_repeat_ngram(2, **source), [[0, 4], [1, 4]]),
    ]:
        found = run(process, LOGITS, ids, 2)
        np.testing.assert_array_equal(np.argwhere(found == BANNED), expected)


def test_bad_words_by_hand():
    process = logits.bad_words([[2, 3], [6, 2, 4], [5], [1], [2, 2, 2, 2, 0]], [1])
    ids = np.array([[6, 2, 3], [4, 2, 3]], np.int32)
    found = run(process, LOGITS, ids, 1)
    np.testing.assert_array_equal(
        np.argwhere(found == BANNED), [[0, 3], [0, 4], [0, 5], [1, 3], [1, 5]]
    )


def test_biases_add_up_and_the_last_of_equal_sequences_counts():
    biases = [((3,), 9.0), ((3,), 1.0), ((2, 3), 2.0), ((6, 2, 3), 4.0), ((4, 2, 3), 8.0)]
    ids = np.array([[6, 2], [4, 2]], np.int32)
    found = run(logits.sequence_bias(biases), LOGITS, ids, 1) - LOGITS.numpy()
    np.testing.assert_allclose(found[:, 3], [7.0, 11.0], rtol=1e-6)
    assert np.count_nonzero(found) == 2


# ----------------------------------------------------------------------------- the rest


def test_compose_runs_in_order_and_passes_ids_and_step():
    seen = []

    def add_step(logits, ids, step):
        seen.append((ids, int(step)))
        return logits + tf.cast(step, tf.float32)

    output = compose([add_step, lambda logits, ids, step: 2.0 * logits])(
        LOGITS, IDS, tf.constant(3)
    )
    np.testing.assert_allclose(output, 2.0 * (LOGITS + 3.0))
    assert seen[0][0] is IDS and seen[0][1] == 3
    assert compose([])(LOGITS, IDS, tf.constant(0)) is LOGITS


SOURCE = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("min_new_tokens", (2, 3), TypeError, "eos_token_ids must be a sequence of integers.*3"),
        ("suppress_tokens", ([1.5],), TypeError, "token_ids"),
        ("suppress_tokens", ([-1],), ValueError, r"token_ids must be >= 0, received \[-1\]"),
        (
            "min_new_tokens",
            (-1, [1]),
            ValueError,
            "n must be an integer of at least 0, received -1",
        ),
        (
            "min_new_tokens",
            (1.5, [1]),
            ValueError,
            "n must be an integer of at least 0, received 1.5",
        ),
        (
            "min_new_tokens",
            (1, [1], -1),
            ValueError,
            "prompt_length must be an integer of at least 0, received -1",
        ),
        ("min_new_tokens", (1, [1], tf.zeros([2], tf.int32)), ValueError, "prompt_length.*shape"),
        ("min_new_tokens", (1, [1], tf.constant(1.0)), ValueError, "prompt_length.*float32"),
        ("min_length", (-1, [1]), ValueError, "n must be an integer of at least 0"),
        (
            "begin_suppress_tokens",
            ([1], 0),
            ValueError,
            "begin_index must be an integer of at least 1, received 0",
        ),
        ("forced_bos", (-3,), ValueError, "token_id must be an integer of at least 0, received -3"),
        ("forced_bos", ([3],), ValueError, "token_id must be an integer"),
        ("forced_eos", ([], 5), ValueError, "token_ids must not be empty"),
        ("forced_eos", ([1], 0), ValueError, "max_length must be an integer of at least 1"),
        (
            "repetition_penalty",
            (0.0,),
            ValueError,
            "penalty must be a finite number above 0, .* 0.0",
        ),
        ("repetition_penalty", (np.inf,), ValueError, "penalty must be a finite number"),
        ("repetition_penalty", (np.nan,), ValueError, "penalty must be a finite number"),
        (
            "repetition_penalty",
            ("2",),
            ValueError,
            "penalty must be a finite number above 0, received '2'",
        ),
        ("repetition_penalty", (True,), ValueError, "penalty must be a finite number"),
        ("encoder_repetition_penalty", (-1.0, [[1]], [[1]]), ValueError, "penalty must be"),
        ("encoder_repetition_penalty", (2.0, [1], [1]), ValueError, r"\[batch, source\]"),
        ("encoder_no_repeat_ngram", (2, [[1]], [[1, 1]]), ValueError, r"\(1, 1\) and \(1, 2\)"),
        (
            "encoder_no_repeat_ngram",
            (0, [[1]], [[1]]),
            ValueError,
            "size must be an integer of at least 1",
        ),
        ("no_repeat_ngram", (0,), ValueError, "size must be an integer of at least 1, received 0"),
        ("bad_words", ([[]], [1]), ValueError, "bad_words_ids must hold no empty sequence"),
        ("bad_words", ([3], [1]), TypeError, "bad_words_ids must be a sequence of integers"),
        ("sequence_bias", ([((), 1.0)],), ValueError, "sequence_bias must hold no empty"),
        ("sequence_bias", ([((1,), np.inf)],), ValueError, "sequence_bias must be below infinity"),
        ("sequence_bias", ([((1,), np.nan)],), ValueError, "sequence_bias must be a number"),
        ("sequence_bias", ([((1,), "1")],), ValueError, "sequence_bias must be a number"),
        (
            "exponential_decay_length_penalty",
            (-1, 1.1, [1]),
            ValueError,
            "start must be an integer of at least 0",
        ),
        ("exponential_decay_length_penalty", (1, 0.0, [1]), ValueError, "factor must be a finite"),
    ],
)
def test_errors_name_the_argument(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(logits, name)(*arguments)


def test_unknown_tokens_are_an_error():
    for process in (
        suppress_tokens([7]),
        min_new_tokens(1, [7]),
        logits.begin_suppress_tokens([7], 1),
        logits.forced_bos(7),
        logits.forced_eos([7], 2),
        logits.exponential_decay_length_penalty(0, 2.0, [7]),
        logits.bad_words([[7, 2]], []),
        logits.sequence_bias([((7,), 1.0)]),
    ):
        with pytest.raises(ValueError, match="below the vocabulary size 7"):
            process(LOGITS, IDS, tf.constant(0))
