"""Random draws that depend on nothing but their seeds: not on batch, order, padding or device.

The bits are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) in
integer operations, so that eager execution, a plain graph and XLA agree. TensorFlow's own
stateless operations take one seed for a whole tensor; here each row has its own.

Letters in shape comments: R rows, N places to draw from, M blocks of them, C draws.
"""

from collections.abc import Sequence

import tensorflow as tf

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

# A multiple of 4, since Philox gives 4 words at a time; about the square root of a vocabulary.
_BLOCK = 256
# What fills the last block: below any sum of banned scores, and finite.
_NOTHING = -1e30


def philox(counter: Sequence[tf.Tensor], key: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Philox4x32-10: 4 random words for a counter of 4 words and a key of 2.

    Words are uint64 tensors below 2**32, of shapes that broadcast.
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b = _xor(_high(second), b, k), _low(second)
        c, d = _xor(_high(first), d, m), _low(first)
        k, m = _low(k + _KEY_STEPS[0]), _low(m + _KEY_STEPS[1])
    return [a, b, c, d]


def gumbel(places: tf.Tensor, seeds: tf.Tensor, step: tf.Tensor, stream: int) -> tf.Tensor:
    """Standard Gumbel noise, four values for every place.

    Args:
        places: integers `[R, ..., n]` or `[1, ..., n]`, what distinguishes the values of a row.
        seeds: int32 `[R, 3]`, what distinguishes rows.
        step: int32 scalar.
        stream: a different one gives independent values.

    Returns:
        float32 `[R, ..., 4 * n]`, those of a place adjacent.
    """
    rank = places.shape.rank
    seed, example, hypothesis = (
        tf.reshape(_as_words(column), [-1] + [1] * (rank - 1))
        for column in tf.unstack(seeds, axis=1)
    )
    counter = [_as_words(places), _as_words(step), hypothesis, example]
    words = tf.stack(philox(counter, [seed, tf.constant(stream, tf.uint64)]), axis=-1)
    shape = tf.shape(words)
    words = tf.reshape(words, tf.concat([shape[:-2], [shape[-2] * 4]], 0))
    # An exponential variable is small where the noise is large: there it needs its resolution, so
    # it is made from 1 - u with u, of 32 bits, close to 0. u must not round to 1.
    uniform = (tf.cast(words, tf.float32) + 0.5) * 2.0**-32
    return -tf.math.log(-tf.math.log1p(-tf.minimum(uniform, 1 - 2.0**-24)))


def draw(log_weights: tf.Tensor, count: int, seeds: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    """Draws places of every row without replacement, with probabilities `softmax(log_weights)`.

    These are the places of the `count` largest sums of a log-weight and Gumbel noise, found without
    noise for each place. First the largest sums of whole blocks are drawn, where the log-weight of
    a block is that of all its places together. The `count` largest sums lie in that many blocks.
    Then the noise within these is drawn, given their largest sums (Kool et al., "Stochastic beams
    and where to find them", 2019, appendix B).

    Args:
        log_weights: float32 `[R, N]`, finite.
        count: C, the number of draws. Above N, the last ones are not places: they are >= N.
        seeds: int32 `[R, 3]`: what a row draws depends on these, its log-weights and `step` only.
        step: int32 scalar.

    Returns:
        int32 `[R, C]`, in the order in which they are drawn.
    """
    size = tf.shape(log_weights)[1]
    block = tf.minimum(_BLOCK, _parts(size, 4) * 4)
    blocks = tf.maximum(_parts(size, block), _parts(count, block))  # M
    missing = blocks * block - size
    weights = tf.pad(log_weights, [[0, 0], [0, missing]], constant_values=_NOTHING)
    weights = tf.reshape(weights, [-1, blocks, block])  # [R, M, block]
    masses = tf.reduce_logsumexp(weights, axis=-1)  # [R, M]
    # Large numbers would leave no room for the noise.
    shift = tf.reduce_max(masses, axis=-1, keepdims=True)  # [R, 1]
    noise = gumbel(tf.range(_parts(blocks, 4))[tf.newaxis], seeds, step, 0)[:, :blocks]
    drawn = tf.minimum(blocks, count)
    best, chosen = tf.math.top_k(masses - shift + noise, drawn)  # [R, min(C, M)] each

    within = tf.gather(weights, chosen, batch_dims=1) - shift[..., tf.newaxis]
    words = chosen[..., tf.newaxis] * (_BLOCK // 4) + tf.range(block // 4)
    sums = within + gumbel(words, seeds, step, 1)  # [R, min(C, M), block]
    sums = _with_maximum(sums, best[..., tf.newaxis])
    _, places = tf.math.top_k(tf.reshape(sums, [-1, drawn * block]), count)  # [R, C]
    return tf.gather(chosen, places // block, batch_dims=1) * block + places % block


def _parts(size: int | tf.Tensor, of: int | tf.Tensor) -> int | tf.Tensor:
    """How many parts of size `of` it takes to hold `size`."""
    return -(-size // of)


def _with_maximum(sums: tf.Tensor, maximum: tf.Tensor) -> tf.Tensor:
    """Log-weights with Gumbel noise, their order kept, given that `maximum` is the largest.

    Args:
        sums: float32 `[..., n]`, whose own largest does not count.
        maximum: float32 `[..., 1]`.
    """
    largest = tf.reduce_max(sums, axis=-1, keepdims=True)
    is_largest = sums == largest
    # -log(exp(-maximum) - exp(-largest) + exp(-sums)), without overflow
    below = tf.where(is_largest, -1.0, sums - largest)
    below = maximum - sums + tf.math.log(-tf.math.expm1(below))
    conditional = maximum - tf.nn.relu(below) - tf.math.log1p(tf.exp(-tf.abs(below)))
    return tf.where(is_largest, maximum, conditional)


def _as_words(values: tf.Tensor) -> tf.Tensor:
    return _low(tf.cast(values, tf.uint64))


def _low(values: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_and(values, tf.constant(_WORD, tf.uint64))


def _high(values: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.right_shift(values, tf.constant(32, tf.uint64))


def _xor(first: tf.Tensor, second: tf.Tensor, third: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(tf.bitwise.bitwise_xor(first, second), third)
