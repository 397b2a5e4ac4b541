"""Filters for sampling: processors that narrow or reshape what the next token is drawn from.

They have the signature of `bertgen_tf.generation.search.logits` and run after all processors, in
Hugging Face's order: `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`. Each follows the class
of the same name in transformers 5.23 ("warper"), but bans with the finite `BANNED`, and among
tokens of equal score keeps all or none, where Hugging Face's top-p depends on the sort order.

`min_tokens_to_keep` tokens survive every filter. Hugging Face passes 1 or, for beams, one more than
there are end tokens, so that at least one token does not end the sequence.
"""

import math

import tensorflow as tf

from bertgen_tf.checks import check_integer, check_number
from bertgen_tf.generation.search.logits import Processor
from bertgen_tf.generation.search.token_scores import BANNED, keep_banned

# Sorting a vocabulary costs ten times as much as finding its best few hundred tokens, and these
# nearly always hold the requested mass.
_FEW = 512

# Scores divided by less may leave the range between real and banned ones.
_LEAST_TEMPERATURE = 1e-4


def temperature(t: float) -> Processor:
    """Divides the scores by `t`: below 1 likely tokens become likelier, above 1 less so.

    Raises:
        TypeError, ValueError: if `t` is not a finite number of at least 1e-4.
    """
    t = check_number("temperature", t)
    if not _LEAST_TEMPERATURE <= t < math.inf:
        raise ValueError(
            f"temperature must be a finite number of at least {_LEAST_TEMPERATURE}, received {t}: "
            "to always get the most likely token, do not sample."
        )

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return keep_banned(logits, logits / t)

    return processor


def top_k(k: int, min_tokens_to_keep: int = 1) -> Processor:
    """Bans all but the `k` best tokens and those that tie with the last of them.

    Args:
        k: 0 keeps all.
        min_tokens_to_keep: replaces a smaller `k`.

    Raises:
        TypeError, ValueError: if `k` is not an integer >= 0 or `min_tokens_to_keep` not one >= 1.
    """
    k = check_integer("top_k", k, 0, "pass 0 to keep all tokens")
    least = _check_least(min_tokens_to_keep)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return _keep_from(_last_of_top(logits, max(k, least)), logits)

    return processor if k > 0 else _keep_all


def top_p(p: float, min_tokens_to_keep: int = 1) -> Processor:
    """Keeps the most likely tokens, the fewest whose probabilities add up to `p`.

    Args:
        p: above 0, at most 1, which keeps all.
        min_tokens_to_keep: this many are kept in any case.

    Raises:
        TypeError, ValueError: if `p` is not a number above 0 and at most 1, or
            `min_tokens_to_keep` not an integer >= 1.
    """
    p = _check_share("top_p", p)
    least = _check_least(min_tokens_to_keep)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        threshold = _last_of_mass(logits, tf.nn.softmax(logits), p, least)
        return _keep_from(threshold, logits)

    return processor if p < 1 else _keep_all


def min_p(p: float, min_tokens_to_keep: int = 1) -> Processor:
    """Bans tokens less likely than `p` times the most likely one.

    Args:
        p: between 0, which keeps all, and 1.
        min_tokens_to_keep: this many are kept in any case.

    Raises:
        TypeError, ValueError: if `p` is not a number between 0 and 1, or `min_tokens_to_keep` not
            an integer >= 1.
    """
    p = check_number("min_p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"min_p must be between 0 and 1, received {p}: pass 0.0 to keep all.")
    least = _check_least(min_tokens_to_keep)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        # A ratio of probabilities is a difference of scores: nothing need be normalised.
        threshold = tf.reduce_max(logits, axis=-1, keepdims=True) + math.log(p)
        if least > 1:
            threshold = tf.minimum(threshold, _last_of_top(logits, least))
        return _keep_from(threshold, logits)

    return processor if p > 0 else _keep_all


def typical_p(p: float, min_tokens_to_keep: int = 1) -> Processor:
    """Keeps the most typical tokens, the fewest whose probabilities add up to `p`.

    The closer a token's surprise (its negative log-probability) is to the entropy of the
    distribution, the more typical it is: the most likely token may well be banned (Meister et al.
    2022).

    Args:
        p: above 0, at most 1, which keeps all.
        min_tokens_to_keep: this many are kept in any case.

    Raises:
        TypeError, ValueError: if `p` is not a number above 0 and at most 1, or
            `min_tokens_to_keep` not an integer >= 1.
    """
    p = _check_share("typical_p", p)
    least = _check_least(min_tokens_to_keep)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        logits = tf.maximum(logits, BANNED)
        log_probs = tf.nn.log_softmax(logits)
        probs = tf.exp(log_probs)
        negative_entropy = tf.reduce_sum(probs * log_probs, axis=-1, keepdims=True)
        typicality = -tf.abs(log_probs - negative_entropy)
        threshold = _last_of_mass(typicality, probs, p, least)
        return tf.where(typicality < threshold, BANNED, logits)

    return processor if p < 1 else _keep_all


def _keep_all(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    return logits


def _keep_from(threshold: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Bans scores below `threshold` `[rows, 1]`."""
    return tf.where(logits < threshold, BANNED, logits)


def _last_of_top(values: tf.Tensor, count: int) -> tf.Tensor:
    """The `count`-th largest value of every row, or the smallest if fewer: `[rows, 1]`."""
    best = tf.math.top_k(values, _at_most_vocabulary(values, count), sorted=False).values
    # A minimum, since XLA would sort the whole vocabulary for one element out of `best`.
    return tf.reduce_min(best, axis=-1, keepdims=True)


def _last_of_mass(values: tf.Tensor, probs: tf.Tensor, mass: float, least: int) -> tf.Tensor:
    """The last value needed, from the largest on, for a sum of `probs` of at least `mass`.

    Args:
        values: float32 `[rows, vocab]`, the order.
        probs: float32 `[rows, vocab]`.
        mass: > 0; if rounding keeps the sum of all probabilities below it, all values are needed.
        least: this many values are needed in any case.

    Returns:
        float32 `[rows, 1]`.
    """
    few = _at_most_vocabulary(values, max(_FEW, least))
    best, places = tf.math.top_k(values, few)  # [rows, few]
    sums = tf.cumsum(tf.gather(probs, places, axis=1, batch_dims=1), axis=1)
    last = tf.reduce_sum(tf.cast(sums < mass, tf.int32), axis=1, keepdims=True)  # [rows, 1]
    found = (last < few) | (few == tf.shape(values)[-1])  # [rows, 1]
    last = tf.clip_by_value(last, tf.minimum(least, few) - 1, few - 1)
    threshold = tf.gather(best, last, axis=1, batch_dims=1)

    def search() -> tf.Tensor:
        # Row by row, so that no row depends on the others, not even by rounding.
        return tf.where(found, threshold, tf.minimum(threshold, _bisect(values, probs, mass)))

    if isinstance(few, int) and few == values.shape[-1]:
        return threshold
    return tf.cond(tf.reduce_all(found), lambda: threshold, search)


def _bisect(values: tf.Tensor, probs: tf.Tensor, mass: float) -> tf.Tensor:
    """`_last_of_mass` without `least`, and without a sort: by halving an interval of floats."""
    ordered = _reorder(tf.bitcast(values, tf.int32))  # integers in the order of the values

    def halve(
        step: tf.Tensor, enough: tf.Tensor, too_little: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        # Their mean, without overflow.
        middle = (enough & too_little) + tf.bitwise.right_shift(enough ^ too_little, 1)
        above = tf.reduce_sum(tf.where(ordered >= middle, probs, 0.0), axis=1, keepdims=True)
        reached = above >= mass
        return step + 1, tf.where(reached, middle, enough), tf.where(reached, too_little, middle)

    first = tf.reduce_min(ordered, axis=1, keepdims=True)
    end = tf.reduce_max(ordered, axis=1, keepdims=True)  # too little, or no search would be needed
    _, last, _ = tf.while_loop(lambda step, *_: step < 32, halve, (tf.constant(0), first, end))
    return tf.bitcast(_reorder(last), tf.float32)


def _reorder(bits: tf.Tensor) -> tf.Tensor:
    """Bits of floats to integers of the same order, and back."""
    return tf.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _at_most_vocabulary(values: tf.Tensor, count: int) -> int | tf.Tensor:
    vocabulary = values.shape[-1]
    return tf.minimum(count, tf.shape(values)[-1]) if vocabulary is None else min(count, vocabulary)


def _check_share(name: str, p: float) -> float:
    p = check_number(name, p)
    if not 0 < p <= 1:
        raise ValueError(
            f"{name} must be above 0 and at most 1, received {p}: pass 1.0 to keep all tokens."
        )
    return p


def _check_least(min_tokens_to_keep: int) -> int:
    return check_integer("min_tokens_to_keep", min_tokens_to_keep, 1, "pass 1 for one token")
