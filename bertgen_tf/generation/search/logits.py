"""Logits processors: pure functions that change the scores of the next token.

A processor is a function `(logits, ids, step) -> logits` of

- `logits`: float32 `[rows, vocab]`, scores of the next token, logits or log-probabilities;
- `ids`: int32 `[rows, length]`, the sequences so far, start token and prompt included, then
  padding: only `ids[:, : step + 1]` counts;
- `step`: int32 scalar, the position of the last token: without a prompt, the number of tokens
  generated so far, 0 at the first call.

Rows are the examples or, adjacent, their beams or samples. The factories below follow the classes
of transformers 5.23 that have the same names; several compose by running in order, Hugging Face's
order being `sequence_bias`, `encoder_repetition_penalty`, `repetition_penalty`, `no_repeat_ngram`,
`encoder_no_repeat_ngram`, `bad_words`, `min_length`, `min_new_tokens`, `forced_bos`, `forced_eos`,
`exponential_decay_length_penalty`, `suppress_tokens`, `begin_suppress_tokens`, the user's own, and
last, for sampling, those of `bertgen_tf.generation.search.filters`.

Where Hugging Face uses minus infinity, a token is banned with the finite `BANNED`. Scores at or
below `BANNED / 2` (a model's own minus infinity, too) count as banned, and stay so whatever a later
penalty or bias does; only `forced_bos` and `forced_eos` replace all scores. The two ways to raise a
score without bound, `sequence_bias` and `exponential_decay_length_penalty`, add at most 1e6, since
more could revive banned tokens.

A processor of your own must keep shape and dtype, ban with `BANNED` and leave banned scores alone,
read nothing beyond `step`, treat rows independently, and consist of TensorFlow ops that run in a
graph and under XLA, where the vocabulary may be unknown when traced.
"""

import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from bertgen_tf.checks import check_integer, check_number, check_positive
from bertgen_tf.generation.search.token_scores import (
    BANNED,
    allow_only,
    ban,
    check_vocabulary,
    for_rows,
    indices,
    keep_banned,
    penalize,
    recent,
    shift,
    token_mask,
    token_values,
)

Processor = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]

# Decides between any two tokens, and leaves banned ones far below all others.
_MOST = 1e6
# Bans a token whatever its other biases.
_LEAST = 100 * BANNED


def compose(processors: Sequence[Processor]) -> Processor:
    """Returns one processor that runs `processors` in order; the identity if there are none."""

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        for process in processors:
            logits = process(logits, ids, step)
        return logits

    return processor


def checked(process: Processor) -> Processor:
    """A user's processor; a ValueError that names it if it changes shape or dtype."""

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        new = process(logits, ids, step)
        name = getattr(process, "__qualname__", type(process).__qualname__)
        rule = f"{name}, of logits_processor, must return logits of the shape and dtype it is given"
        found = "None"
        if new is not None:
            new = tf.convert_to_tensor(new)
            found = f"{new.dtype.name} {new.shape}"
        given = f"{logits.dtype.name} {logits.shape}"
        same = new is not None and new.dtype == logits.dtype
        if not same or not new.shape.is_compatible_with(logits.shape):
            raise ValueError(f"{rule}, {given}, received {found}.")
        if not new.shape.is_fully_defined():  # XLA knows all shapes
            check = tf.debugging.assert_equal(tf.shape(new), tf.shape(logits), f"{rule}.")
            with tf.control_dependencies([check] if check is not None else []):
                new = tf.identity(new)
        return tf.ensure_shape(new, logits.shape)

    return processor


# ------------------------------------------------------------------------------- single tokens


def suppress_tokens(token_ids: Sequence[int]) -> Processor:
    """Bans `token_ids` at every step.

    Raises:
        TypeError, ValueError: if `token_ids` is not a sequence of integers >= 0; when called, if an
            id is not in a statically known vocabulary.
    """
    token_ids = check_token_ids("token_ids", token_ids)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return tf.where(token_mask(token_ids, logits), BANNED, logits)

    return processor


def begin_suppress_tokens(token_ids: Sequence[int], begin_index: int | tf.Tensor) -> Processor:
    """Bans `token_ids` where a sequence has exactly `begin_index` tokens, prompt included.

    Hugging Face passes the length of the prompt, or 2 without one if `forced_bos` takes the first
    place.

    Args:
        token_ids: what is banned.
        begin_index: integer or int32 scalar.

    Raises:
        TypeError, ValueError: as `suppress_tokens`, or if `begin_index` is not an integer >= 1.
    """
    token_ids = check_token_ids("token_ids", token_ids)
    begin_index = _check_length("begin_index", begin_index)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        banned = token_mask(token_ids, logits) & (step + 1 == begin_index)
        return tf.where(banned, BANNED, logits)

    return processor


def min_length(n: int, eos_token_ids: Sequence[int]) -> Processor:
    """Bans `eos_token_ids` while a sequence, prompt included, has fewer than `n` tokens.

    Raises:
        TypeError, ValueError: as `min_new_tokens`.
    """
    return min_new_tokens(n, eos_token_ids, prompt_length=0)


def min_new_tokens(
    n: int, eos_token_ids: Sequence[int], prompt_length: int | tf.Tensor = 1
) -> Processor:
    """Bans `eos_token_ids` until `n` tokens have been generated.

    At least `n` tokens then come before the end token: EOS is not counted among them.

    Args:
        n: how many, >= 0.
        eos_token_ids: all that end a sequence.
        prompt_length: tokens of every sequence that were not generated, the start token included:
            integer or int32 scalar.

    Raises:
        TypeError, ValueError: if `eos_token_ids` is not a sequence of integers >= 0, `n` or
            `prompt_length` is not an integer >= 0; when called, if an id is not in a statically
            known vocabulary.
    """
    eos_token_ids = check_token_ids("eos_token_ids", eos_token_ids)
    n = check_integer("n", n, 0, "pass 0 for no minimum")
    prompt_length = _check_length("prompt_length", prompt_length, 0)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        banned = token_mask(eos_token_ids, logits) & (step + 1 - prompt_length < n)
        return tf.where(banned, BANNED, logits)

    return processor


def forced_bos(token_id: int) -> Processor:
    """Allows nothing but `token_id`, with score 0, after a lone start token.

    Raises:
        TypeError, ValueError: if `token_id` is not an integer >= 0; when called, if it is not in a
            statically known vocabulary.
    """
    token_ids = (check_integer("token_id", token_id, 0, "pass a token id"),)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return tf.where(step == 0, allow_only(token_ids, logits), logits)

    return processor


def forced_eos(token_ids: Sequence[int], max_length: int | tf.Tensor) -> Processor:
    """Allows nothing but `token_ids`, with score 0, as the last token of the longest sequence.

    Args:
        token_ids: at least one.
        max_length: tokens of that sequence, prompt included: integer or int32 scalar.

    Raises:
        TypeError, ValueError: if `token_ids` is not a sequence of integers >= 0 or is empty, or
            `max_length` is not an integer >= 1; when called, if an id is not in a statically known
            vocabulary.
    """
    token_ids = check_token_ids("token_ids", token_ids)
    if not token_ids:
        raise ValueError("token_ids must not be empty: pass the ids to force, or no forced_eos.")
    max_length = _check_length("max_length", max_length)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return tf.where(step + 2 == max_length, allow_only(token_ids, logits), logits)

    return processor


def exponential_decay_length_penalty(
    start: int, factor: float, eos_token_ids: Sequence[int], prompt_length: int | tf.Tensor = 1
) -> Processor:
    """Makes the end ever more likely once more than `start` tokens have been generated.

    With n tokens beyond `start`, the score s of an end token becomes s + |s| * (factor**n - 1), but
    never more than s + 1e6.

    Args:
        start: generated tokens without penalty, >= 0.
        factor: > 0; above 1 sequences become shorter, below 1 longer.
        eos_token_ids: all that end a sequence.
        prompt_length: as for `min_new_tokens`.

    Raises:
        TypeError, ValueError: for an argument outside these rules; when called, if an id is not in
            a statically known vocabulary.
    """
    start = check_integer("start", start, 0, "pass 0 to begin at once")
    factor = check_positive("factor", factor, "pass 1.0 for no change")
    eos_token_ids = check_token_ids("eos_token_ids", eos_token_ids)
    prompt_length = _check_length("prompt_length", prompt_length, 0)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        beyond = tf.cast(tf.maximum(step + 1 - prompt_length - start, 0), tf.float64)
        # A float32 may overflow, and infinity times a score of 0 would be NaN.
        growth = tf.minimum(tf.pow(tf.constant(factor, tf.float64), beyond) - 1.0, 1e30)
        growth = tf.where(token_mask(eos_token_ids, logits), tf.cast(growth, tf.float32), 0.0)
        penalty = tf.minimum(tf.abs(logits) * growth, _MOST)
        return keep_banned(logits, logits + penalty)

    return processor


# ------------------------------------------------------------------------------- repetition


def repetition_penalty(penalty: float) -> Processor:
    """Makes every token of the sequence so far less likely, if `penalty` is above 1.

    A score below 0 is multiplied by `penalty`, one above 0 divided: once, however often the token
    occurred. Start token and prompt count.

    Raises:
        TypeError, ValueError: if `penalty` is not a finite number > 0.
    """
    penalty = check_positive("penalty", penalty, "pass 1.0 for no penalty")

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return penalize(logits, ids, tf.range(tf.shape(ids)[1]) <= step, penalty)

    return processor


def encoder_repetition_penalty(
    penalty: float, input_ids: tf.Tensor, attention_mask: tf.Tensor
) -> Processor:
    """Makes every token of the source more likely, if `penalty` is above 1.

    The inverse of `repetition_penalty`. Unlike in Hugging Face, source padding does not count: an
    example is treated the same in every batch.

    Args:
        penalty: > 0.
        input_ids: integers `[batch, source]`.
        attention_mask: `[batch, source]`, 0 at padding.

    Raises:
        TypeError, ValueError: if `penalty` is not a finite number > 0, or the tensors have other
            shapes.
    """
    penalty = 1.0 / check_positive("penalty", penalty, "pass 1.0 for no penalty")
    source = _check_source(input_ids, attention_mask)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        tokens = for_rows(source, logits)
        return penalize(logits, tokens, True, penalty)

    return processor


def no_repeat_ngram(size: int) -> Processor:
    """Bans every token that would complete an n-gram which the sequence already holds.

    Start token and prompt count.

    Args:
        size: n, >= 1; 1 bans every token that occurred.

    Raises:
        TypeError, ValueError: if `size` is not an integer >= 1.
    """
    size = check_integer("size", size, 1, "leave the processor out to allow every n-gram")

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        # For every token so far: is it preceded by what the sequence now ends with?
        repeats = tf.range(tf.shape(ids)[1]) <= step  # [L]
        for back in range(1, size):
            repeats &= shift(ids, back) == recent(ids, step, back)[:, tf.newaxis]
        return ban(logits, ids, repeats)

    return processor


def encoder_no_repeat_ngram(
    size: int, input_ids: tf.Tensor, attention_mask: tf.Tensor
) -> Processor:
    """Bans every token that would complete an n-gram of the source.

    Unlike in Hugging Face, an n-gram with source padding does not count: an example is treated the
    same in every batch.

    Args:
        size: n, >= 1; 1 bans every token of the source.
        input_ids: integers `[batch, source]`.
        attention_mask: `[batch, source]`, 0 at padding.

    Raises:
        TypeError, ValueError: if `size` is not an integer >= 1, or the tensors have other shapes.
    """
    size = check_integer("size", size, 1, "leave the processor out to allow every n-gram")
    source = _check_source(input_ids, attention_mask)
    before = [shift(source, back) for back in range(1, size)]

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        repeats = tf.constant(True)
        for back, tokens in enumerate(before, start=1):
            repeats &= for_rows(tokens, logits) == recent(ids, step, back)[:, tf.newaxis]
        return ban(logits, for_rows(source, logits), repeats)

    return processor


# ------------------------------------------------------------------------------- token sequences


def bad_words(bad_words_ids: Sequence[Sequence[int]], eos_token_ids: Sequence[int]) -> Processor:
    """Bans the last token of each sequence wherever its other tokens have just been generated.

    Args:
        bad_words_ids: token sequences, each of at least one id. A single end token is ignored.
        eos_token_ids: all that end a sequence.

    Raises:
        TypeError, ValueError: if they are not sequences of integers >= 0, or one is empty; when
            called, if an id is not in a statically known vocabulary.
    """
    eos_token_ids = check_token_ids("eos_token_ids", eos_token_ids)
    words = [_check_sequence("bad_words_ids", word) for word in bad_words_ids]
    words = [word for word in words if len(word) > 1 or word[0] not in eos_token_ids]
    return sequence_bias([(word, -math.inf) for word in words])


def sequence_bias(biases: Sequence[tuple[Sequence[int], float]]) -> Processor:
    """Adds to the score of the last token of a sequence wherever its other tokens precede it.

    Prompt and start token count. A token that several sequences end with receives all their
    numbers; of equal sequences the last one counts.

    Args:
        biases: pairs of token ids, at least one, and a number: above 0 more likely, below 0 less.
            More than 1e6 counts as 1e6, minus infinity bans.

    Raises:
        TypeError, ValueError: for ids that are not sequences of integers >= 0 or are empty, and for
            anything but numbers; when called, if an id is not in a statically known vocabulary.
    """
    found = {}
    for sequence, bias in biases:
        sequence = _check_sequence("sequence_bias", sequence)
        bias = check_number("sequence_bias", bias)
        if bias == math.inf:
            raise ValueError(
                f"sequence_bias must be below infinity, received {bias} for {sequence}: pass 1e6 "
                "to prefer it to all others."
            )
        found[sequence] = min(max(bias, _LEAST), _MOST)
    # All sequences of a length are compared at once.
    by_length = {}
    for sequence, bias in sorted(found.items(), key=lambda item: len(item[0])):
        by_length.setdefault(len(sequence), []).append((sequence, bias))

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        biased = logits
        for length, group in by_length.items():
            tokens = np.array([sequence for sequence, _ in group], np.int32)  # [n, length]
            added = np.array([bias for _, bias in group], np.float32)  # [n]
            check_vocabulary(tuple(tokens.ravel().tolist()), logits)
            if length == 1:
                biased += token_values(tokens[:, 0], added, logits)
                continue
            follows = tf.constant(True)
            for back in range(1, length):
                follows &= recent(ids, step, back)[:, tf.newaxis] == tokens[:, -1 - back]
            added = tf.where(follows, added, 0.0)  # [rows, n]
            last = tf.broadcast_to(tokens[:, -1], tf.shape(added))
            biased = tf.tensor_scatter_nd_add(biased, indices(last), added)
        return keep_banned(logits, biased)

    return processor


# ------------------------------------------------------------------------------- arguments


def check_token_ids(name: str, token_ids: Sequence[int]) -> tuple[int, ...]:
    """Returns `token_ids` as a tuple of Python integers; `name` is the argument to blame.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if one of them is negative.
    """
    try:
        checked = tuple(operator.index(token_id) for token_id in token_ids)
    except TypeError:
        raise TypeError(
            f"{name} must be a sequence of integers, received {token_ids!r}: "
            "wrap a single id in a list."
        ) from None
    if min(checked, default=0) < 0:
        raise ValueError(f"{name} must be >= 0, received {token_ids!r}: remove negative ids.")
    return checked


def _check_length(name: str, value: int | tf.Tensor, least: int = 1) -> int | tf.Tensor:
    if not tf.is_tensor(value):
        return check_integer(name, value, least, "pass a number of tokens")
    if not value.dtype.is_integer or value.shape.rank != 0:
        raise ValueError(
            f"{name} must be an integer or an integer scalar, received {value.dtype.name} of shape "
            f"{value.shape}: all sequences share one length."
        )
    return tf.cast(value, tf.int32)


def _check_sequence(name: str, sequence: Sequence[int]) -> tuple[int, ...]:
    sequence = check_token_ids(name, sequence)
    if not sequence:
        raise ValueError(f"{name} must hold no empty sequence: pass at least one token id each.")
    return sequence


def _check_source(input_ids: tf.Tensor, attention_mask: tf.Tensor) -> tf.Tensor:
    """The source, int32 `[batch, source]`, -1 at padding: no token."""
    input_ids = tf.cast(tf.convert_to_tensor(input_ids), tf.int32)
    attention_mask = tf.convert_to_tensor(attention_mask)
    if input_ids.shape.rank != 2 or not input_ids.shape.is_compatible_with(attention_mask.shape):
        raise ValueError(
            "input_ids and attention_mask must both have shape [batch, source], received "
            f"{input_ids.shape} and {attention_mask.shape}: pass those of the encoder."
        )
    return tf.where(tf.cast(attention_mask, tf.bool), input_ids, -1)
