"""Greedy and beam search over a step function: they know no model and no text.

`step(ids, index, state) -> (logits, state)` is asked for the next token of every row:

- `ids`: int32 `[rows]`, the last token of every row;
- `index`: int32 scalar, the position of `ids` in the sequence, 0 at the first call;
- `state`: any nested structure of tensors (a decoder's cache) with leading dimension `rows`. Beam
  search gathers it when beams change places, so what is the same for all beams of an example (the
  cross-attention memory) belongs in the closure of `step`, never in `state`;
- `logits`: floating point `[rows, vocab]`.

Rows are `batch` in `sample` and `batch * num_beams` in `beam_search`, there with the beams of an
example adjacent. The initial `state` already has that many rows, so that a cache is allocated once.

Both searches run eagerly, in a plain graph (without any `Xla*` op) and under `jit_compile=True`,
with batch size and vocabulary known or unknown at trace time. Buffers have a fixed size, the loop
ends as soon as every example is done, scores are float32.

Letters in shape comments: B batch, K beams, C candidates per example, V vocabulary, L = 1 +
max_new_tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from bertgen_tf.logits import BANNED, Processor, check_token_ids, compose

Step = Callable[[tf.Tensor, tf.Tensor, Any], tuple[tf.Tensor, Any]]
Select = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

# Score of a hypothesis that does not exist, tensor2tensor's value. Whatever continues it, or went
# over a banned token, stays below _ALIVE and no real hypothesis comes near that.
_NO_SCORE = BANNED
_ALIVE = BANNED / 2


class SearchOutput(NamedTuple):
    """What a search found, best hypothesis of every example first.

    Attributes:
        sequences: int32 `[batch, num_return_sequences, 1 + max_new_tokens]`: start token, generated
            tokens, EOS if it was met, padding.
        scores: float32 `[batch, num_return_sequences]`.
    """

    sequences: tf.Tensor
    scores: tf.Tensor


def greedy(logits: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Selects the best token of every row, the default of `sample`: `[rows, vocab]` to `[rows]`."""
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


class _SampleState(NamedTuple):
    index: tf.Tensor  # int32 []: tokens generated so far
    sequences: tf.Tensor  # int32 [B, L]
    log_probs: tf.Tensor  # float32 [B]: sum over the chosen tokens
    lengths: tf.Tensor  # int32 [B]: generated tokens, EOS included
    done: tf.Tensor  # bool [B]: EOS was met
    state: Any  # of the step function, rows = B


def sample(
    step: Step,
    state: Any,
    start_ids: tf.Tensor,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    processors: Sequence[Processor] = (),
    length_penalty: float = 1.0,
    select: Select = greedy,
) -> SearchOutput:
    """Generates one token at a time, by default the best one (HuggingFace's greedy search).

    A token is selected from the processed logits. Its score is what HuggingFace's beam search would
    count: the processed log-probability, so that greedy search equals a beam of one.

    Args:
        step: the step function, see the module.
        state: its first state, rows = batch.
        start_ids: integers `[batch]`, the first token of every sequence.
        max_new_tokens: the most tokens to generate, EOS included, >= 1.
        eos_token_ids: each of them ends a sequence; none: all run to `max_new_tokens`.
        pad_token_id: fills sequences after their end; `step` still receives these rows.
        processors: run in order on the scores of the next token, see `bertgen_tf.logits`.
        length_penalty: a score is the sum of log-probabilities / L**length_penalty, L = generated
            tokens, EOS included.
        select: `(logits [rows, vocab], index) -> int32 [rows]`, chooses the next tokens.

    Returns:
        `SearchOutput` of one sequence per example.

    Raises:
        TypeError, ValueError: for an argument outside these rules.
    """
    start_ids = _check_start_ids(start_ids)
    eos_token_ids = check_token_ids("eos_token_ids", eos_token_ids)
    _check_at_least_one("max_new_tokens", max_new_tokens)
    state = _check_state(state, start_ids, 1)
    process = compose(processors)
    batch = _size(start_ids, 0)
    sequences = tf.fill([batch, 1 + max_new_tokens], pad_token_id)

    def unfinished(loop: _SampleState) -> tf.Tensor:
        return (loop.index < max_new_tokens) & ~tf.reduce_all(loop.done)

    def generate(loop: _SampleState) -> tuple[_SampleState]:
        last = tf.gather(loop.sequences, loop.index, axis=1)  # [B]
        logits, state = step(last, loop.index, loop.state)
        logits = tf.cast(logits, tf.float32)  # [B, V]
        # A processor may treat logits and log-probabilities differently (a repetition penalty
        # does): HuggingFace chooses from the former here and counts the latter in beam search.
        ids = select(process(logits, loop.sequences, loop.index), loop.index)  # [B]
        log_probs = process(tf.nn.log_softmax(logits), loop.sequences, loop.index)
        chosen = tf.gather(log_probs, ids, axis=1, batch_dims=1)  # [B]
        ids = tf.where(loop.done, pad_token_id, ids)
        new = _SampleState(
            index=loop.index + 1,
            sequences=_write(loop.sequences, loop.index + 1, ids),
            log_probs=loop.log_probs + tf.where(loop.done, 0.0, tf.maximum(chosen, BANNED)),
            lengths=loop.lengths + tf.cast(~loop.done, tf.int32),
            done=loop.done | _is_one_of(ids, eos_token_ids),
            state=state,
        )
        return (_with_shapes_of(loop, new),)

    first = _SampleState(
        index=tf.constant(0),
        sequences=_write(sequences, 0, start_ids),
        log_probs=tf.zeros([batch]),
        lengths=tf.zeros([batch], tf.int32),
        done=tf.zeros([batch], tf.bool),
        state=state,
    )
    (last,) = tf.while_loop(unfinished, generate, (first,))
    scores = last.log_probs / _power(last.lengths, length_penalty)
    return SearchOutput(last.sequences[:, tf.newaxis], scores[:, tf.newaxis])


class _Scorer(NamedTuple):
    """All that differs between beam searches. `length` counts generated tokens, EOS included.

    `offer(log_probs [B, C], is_eos [B, C], length [], done [B]) -> [B, C]` gives the final score of
    each candidate, best sum first, that is a finished hypothesis, and `_NO_SCORE` to the others.
    `is_done(best_running [B], finished [B, K], length [], done [B]) -> [B]` tells which examples
    need no further search, from the sum of the best running beam and the sorted finished scores.
    """

    offer: Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
    is_done: Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


def _huggingface_scorer(
    num_beams: int, max_new_tokens: int, length_penalty: float, early_stopping: bool | str
) -> _Scorer:
    """The rules of transformers 5.23, `GenerationMixin._beam_search`."""
    stop_when_full = early_stopping is True
    bound_by_longest = early_stopping == "never" and length_penalty > 0.0

    def offer(log_probs, is_eos, length, done):
        ends = is_eos | (length == max_new_tokens)
        # Candidates after the first K only replace beams that end; they may not end themselves.
        is_top = tf.range(tf.shape(log_probs)[1]) < num_beams  # [C]
        accepted = ends & is_top & ~done[:, tf.newaxis]
        return tf.where(accepted, log_probs / _power(length, length_penalty), _NO_SCORE)

    def is_done(best_running, finished, length, done):
        # An empty slot scores _NO_SCORE, so the worst is that until all slots are filled.
        worst = finished[:, -1]
        longest = tf.constant(max_new_tokens) if bound_by_longest else length
        done |= best_running / _power(longest, length_penalty) <= worst
        return done | (worst > _ALIVE) if stop_when_full else done

    return _Scorer(offer, is_done)


def _gnmt_scorer(max_new_tokens: int, alpha: float) -> _Scorer:
    """The rules of tensor2tensor 1.15, `utils/beam_search.py` (length penalty of Wu et al. 2016).

    Nothing is sticky: until all examples are done, each of them goes on filling its slots.
    """

    def offer(log_probs, is_eos, length, done):
        return tf.where(is_eos, log_probs / _gnmt_penalty(length, alpha), _NO_SCORE)

    def is_done(best_running, finished, length, done):
        return finished[:, 0] > best_running / _gnmt_penalty(max_new_tokens, alpha)

    return _Scorer(offer, is_done)


class _Hypotheses(NamedTuple):
    """Sequences and their scores, best first; one that does not exist scores below `_ALIVE`."""

    sequences: tf.Tensor  # int32 [B, K, L]
    scores: tf.Tensor  # float32 [B, K]


class _BeamState(NamedTuple):
    index: tf.Tensor  # int32 []: tokens generated so far
    running: _Hypotheses  # scores are sums of log-probabilities
    finished: _Hypotheses  # scores are final
    done: tf.Tensor  # bool [B]
    state: Any  # of the step function, rows = B*K


def beam_search(
    step: Step,
    state: Any,
    start_ids: tf.Tensor,
    *,
    num_beams: int,
    num_return_sequences: int = 1,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    processors: Sequence[Processor] = (),
    scorer: Literal["huggingface", "gnmt"] = "huggingface",
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    gnmt_alpha: float = 0.6,
    normalize_unfinished: bool = False,
) -> SearchOutput:
    """Beam search by the rules of transformers 5.23 ("huggingface") or tensor2tensor ("gnmt").

    Each step keeps the `max(2, 1 + len(eos_token_ids)) * num_beams` best continuations of an
    example; the best `num_beams` of them that do not end are the next beams. The scorers differ in
    what may finish, what it then scores, and when to stop; L is generated tokens, EOS included:

    - "huggingface": only the best `num_beams` continuations may finish, and at `max_new_tokens`
      they do, with or without EOS. Score: sum of log-probabilities / L**length_penalty.
      An example is done once it has `num_beams` finished hypotheses and, by `early_stopping`,
      True: at once; False: if the best beam would score no better than the worst of them at its
      present length; "never": the same, but at `max_new_tokens` if `length_penalty` > 0.
    - "gnmt": every kept continuation may finish. Score: sum / ((5 + L) / 6)**gnmt_alpha. Done if no
      beam can beat the best finished hypothesis any more. An example without a finished hypothesis
      at `max_new_tokens` returns its beams, scored by their plain sums. As in tensor2tensor,
      the search goes on for all examples until all are done: the best hypothesis of an example
      does not depend on the rest of the batch, but later ones may.

    Log-probabilities are those after `processors`, which therefore receive log-probabilities, and
    are not renormalised. A slot for which there is no hypothesis (few sequences are possible, or
    "gnmt" was done first) holds only padding, with a score of -1e7.

    Args:
        step: the step function, see the module.
        state: its first state, rows = batch * num_beams, beams of an example adjacent.
        start_ids: integers `[batch]`, the first token of every sequence.
        num_beams: beams per example, >= 1.
        num_return_sequences: the best n hypotheses are returned, at most `num_beams`.
        max_new_tokens: the most tokens to generate, EOS included, >= 1.
        eos_token_ids: each of them ends a sequence.
        pad_token_id: fills sequences after their end.
        processors: run in order on the scores of the next token, see `bertgen_tf.logits`.
        scorer: "huggingface" or "gnmt".
        length_penalty: for "huggingface" only.
        early_stopping: for "huggingface" only.
        gnmt_alpha: for "gnmt" only, >= 0.
        normalize_unfinished: for "gnmt" only, divides the plain sums of beams that are returned
            because no hypothesis finished: by ((5 + max_new_tokens) / 6)**gnmt_alpha.

    Returns:
        `SearchOutput` of `num_return_sequences` sequences per example.

    Raises:
        TypeError, ValueError: for an argument outside these rules.
    """
    start_ids = _check_start_ids(start_ids)
    eos_token_ids = check_token_ids("eos_token_ids", eos_token_ids)
    _check_at_least_one("max_new_tokens", max_new_tokens)
    _check_at_least_one("num_beams", num_beams)
    _check_at_least_one("num_return_sequences", num_return_sequences)
    if num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences must be at most num_beams ({num_beams}), received "
            f"{num_return_sequences}: raise num_beams."
        )
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(
            f'early_stopping must be True, False or "never", received {early_stopping!r}.'
        )
    if gnmt_alpha < 0:
        # The bound on what a running beam can still reach would not hold.
        raise ValueError(f"gnmt_alpha must be >= 0, received {gnmt_alpha}: pass 0 for plain sums.")
    if scorer == "huggingface":
        rules = _huggingface_scorer(num_beams, max_new_tokens, length_penalty, early_stopping)
    elif scorer == "gnmt":
        rules = _gnmt_scorer(max_new_tokens, gnmt_alpha)
    else:
        raise ValueError(f'scorer must be "huggingface" or "gnmt", received {scorer!r}.')
    state = _check_state(state, start_ids, num_beams)
    process = compose(processors)
    batch = _size(start_ids, 0)
    length = 1 + max_new_tokens
    num_candidates = max(2, 1 + len(eos_token_ids)) * num_beams

    def unfinished(loop: _BeamState) -> tf.Tensor:
        return (loop.index < max_new_tokens) & ~tf.reduce_all(loop.done)

    def generate(loop: _BeamState) -> tuple[_BeamState]:
        flat = tf.reshape(loop.running.sequences, [batch * num_beams, length])  # [B*K, L]
        last = tf.gather(flat, loop.index, axis=1)  # [B*K]
        logits, state = step(last, loop.index, loop.state)
        log_probs = tf.nn.log_softmax(tf.cast(logits, tf.float32))  # [B*K, V]
        log_probs = tf.maximum(process(log_probs, flat, loop.index), BANNED)
        log_probs, beams, ids = _best_continuations(
            log_probs, loop.running.scores, num_candidates
        )  # [B, C] each
        sequences = tf.gather(loop.running.sequences, beams, axis=1, batch_dims=1)  # [B, C, L]
        sequences = _write(sequences, loop.index + 1, ids)
        is_eos = _is_one_of(ids, eos_token_ids)  # [B, C]

        running, kept = _best(
            _Hypotheses(sequences, tf.where(is_eos, _NO_SCORE, log_probs)), num_beams
        )
        offered = rules.offer(log_probs, is_eos, loop.index + 1, loop.done)
        offered = tf.where(log_probs > _ALIVE, offered, _NO_SCORE)  # [B, C]
        # Finished hypotheses come first, and so win a tie: a slot stays empty until it is filled.
        finished, _ = _best(
            _Hypotheses(
                tf.concat([loop.finished.sequences, sequences], axis=1),  # [B, K + C, L]
                tf.concat([loop.finished.scores, offered], axis=1),  # [B, K + C]
            ),
            num_beams,
        )
        best_running = running.scores[:, 0]
        done = rules.is_done(best_running, finished.scores, loop.index + 1, loop.done)

        parents = tf.gather(beams, kept, axis=1, batch_dims=1)  # [B, K]
        parents += num_beams * tf.range(batch)[:, tf.newaxis]
        parents = tf.reshape(parents, [-1])  # [B*K]
        new = _BeamState(
            index=loop.index + 1,
            running=running,
            finished=finished,
            done=done | (best_running < _ALIVE),
            state=tf.nest.map_structure(lambda tensor: tf.gather(tensor, parents), state),
        )
        return (_with_shapes_of(loop, new),)

    empty = tf.fill([batch, num_beams, length], pad_token_id)
    # Only the first beam exists at first, or all of them would find the same continuations.
    only_first = tf.constant([[0.0] + [_NO_SCORE] * (num_beams - 1)])  # [1, K]
    first = _BeamState(
        index=tf.constant(0),
        running=_Hypotheses(
            _write(empty, 0, tf.repeat(start_ids[:, tf.newaxis], num_beams, axis=1)),
            tf.tile(only_first, [batch, 1]),
        ),
        finished=_Hypotheses(empty, tf.fill([batch, num_beams], _NO_SCORE)),
        done=tf.zeros([batch], tf.bool),
        state=state,
    )
    (last,) = tf.while_loop(unfinished, generate, (first,))
    # [B, K, L] and [B, K]; only "gnmt" leaves an example without any finished hypothesis.
    any_finished = last.finished.scores[:, :1] > _ALIVE  # [B, 1]
    sequences = tf.where(
        any_finished[..., tf.newaxis], last.finished.sequences, last.running.sequences
    )
    scores = tf.where(any_finished, last.finished.scores, last.running.scores)
    exists = scores > _ALIVE
    if normalize_unfinished:
        scores = tf.where(any_finished, scores, scores / _gnmt_penalty(max_new_tokens, gnmt_alpha))
    sequences = tf.where(exists[..., tf.newaxis], sequences, pad_token_id)
    scores = tf.where(exists, scores, _NO_SCORE)
    return SearchOutput(sequences[:, :num_return_sequences], scores[:, :num_return_sequences])


def _best_continuations(
    log_probs: tf.Tensor, scores: tf.Tensor, count: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The `count` best continuations of every example, from the `count` best of every row.

    Args:
        log_probs: float32 `[B*K, V]` of the next token.
        scores: float32 `[B, K]`, the sums so far.
        count: C.

    Returns:
        Sums float32, beam and token int32, `[B, C]` each, best first.
    """
    num_beams = scores.shape[1]
    vocabulary = _size(log_probs, 1)
    per_row = (
        min(count, vocabulary) if isinstance(vocabulary, int) else tf.minimum(count, vocabulary)
    )
    log_probs, ids = tf.math.top_k(log_probs, per_row)  # [B*K, min(C, V)]
    # A vocabulary below C leaves places that nothing fills.
    missing = [[0, 0], [0, count - per_row]]
    log_probs = tf.pad(log_probs, missing, constant_values=_NO_SCORE)  # [B*K, C]
    ids = tf.pad(ids, missing)
    sums = tf.reshape(log_probs, [-1, num_beams, count]) + scores[:, :, tf.newaxis]  # [B, K, C]
    sums, places = tf.math.top_k(tf.reshape(sums, [-1, num_beams * count]), count)  # [B, C]
    ids = tf.reshape(ids, [-1, num_beams * count])  # [B, K*C]
    return sums, places // count, tf.gather(ids, places, axis=1, batch_dims=1)


def _best(hypotheses: _Hypotheses, count: int) -> tuple[_Hypotheses, tf.Tensor]:
    """The `count` best hypotheses `[B, count]`, best first, and their places."""
    scores, places = tf.math.top_k(hypotheses.scores, count)
    sequences = tf.gather(hypotheses.sequences, places, axis=1, batch_dims=1)
    return _Hypotheses(sequences, scores), places


def _write(sequences: tf.Tensor, index: tf.Tensor | int, ids: tf.Tensor) -> tf.Tensor:
    """`sequences` `[..., L]` with `ids` `[...]` at `index` of the last axis."""
    here = tf.range(sequences.shape[-1]) == index  # [L]
    return tf.where(here, ids[..., tf.newaxis], sequences)


def _is_one_of(ids: tf.Tensor, token_ids: tuple[int, ...]) -> tf.Tensor:
    """Bool of the shape of `ids`."""
    return tf.reduce_any(ids[..., tf.newaxis] == tf.constant(token_ids, tf.int32), axis=-1)


def _power(base: tf.Tensor, exponent: float) -> tf.Tensor:
    return tf.pow(tf.cast(base, tf.float32), exponent)


def _gnmt_penalty(length: tf.Tensor | int, alpha: float) -> tf.Tensor:
    return _power((5.0 + tf.cast(length, tf.float32)) / 6.0, alpha)


def _size(tensor: tf.Tensor, axis: int) -> int | tf.Tensor:
    """The size of an axis, a Python integer where it is known."""
    static = tensor.shape[axis]
    return tf.shape(tensor)[axis] if static is None else static


def _with_shapes_of(old: Any, new: Any) -> Any:
    """`new` with the static shapes of `old`: gathering forgets the number of rows."""
    tf.nest.map_structure(lambda a, b: b.set_shape(a.shape), old, new)
    return new


def _check_start_ids(start_ids: tf.Tensor) -> tf.Tensor:
    start_ids = tf.convert_to_tensor(start_ids)
    if not start_ids.dtype.is_integer or start_ids.shape.rank != 1:
        raise ValueError(
            "start_ids must be integers of shape [batch], received "
            f"{start_ids.dtype.name} of shape {start_ids.shape}: pass one start token per example."
        )
    return tf.cast(start_ids, tf.int32)


def _check_at_least_one(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, received {value!r}.")


def _check_state(state: Any, start_ids: tf.Tensor, num_beams: int) -> Any:
    """Returns `state` as tensors."""
    state = tf.nest.map_structure(tf.convert_to_tensor, state)
    batch = start_ids.shape[0]
    rows = None if batch is None else batch * num_beams
    for tensor in tf.nest.flatten(state):
        if not tensor.shape[:1].is_compatible_with([rows]):
            raise ValueError(
                "every tensor in state must have leading dimension batch * num_beams"
                f"{'' if rows is None else f' = {rows}'}, received shape {tensor.shape}: allocate "
                "the state for that many rows."
            )
    return state
