"""Greedy search, sampling and beam search over a step function: they know no model and no text.

`step(ids, index, state) -> (logits, state)` is asked for the next token of every row:

- `ids`: int32 `[rows]`, the last token of every row;
- `index`: int32 scalar, the position of `ids` in the sequence. The first call is for the last token
  of the prompt, 0 where that is only the start token;
- `state`: any nested structure of tensors (a decoder's cache). When beams change places, beam
  search gathers its rows, or leaves that to a function `reorder(state, parents) -> state`, where
  `parents`, int32 `[batch, num_beams]`, is the beam of the example that each beam now continues.
  What never changes (the cross-attention memory) belongs in the closure of `step`;
- `logits`: floating point `[rows, vocab]`.

Rows are `batch * num_return_sequences` in `sample` and `batch * num_beams` in `beam_search`, those
of an example adjacent.

All run eagerly, in a plain graph (without any `Xla*` op) and under `jit_compile=True`, with batch
size and vocabulary known or unknown at trace time. Buffers have a fixed size, the loop ends as soon
as every example is done, scores are float32. Draws are the same in all three forms, up to rounding
of the logits.

Letters in shape comments: B batch, K beams, C candidates per example, V vocabulary, L length of the
sequences, prompt included.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from bertgen_tf.checks import check_integer
from bertgen_tf.generation.search import noise
from bertgen_tf.generation.search.logits import BANNED, Processor, check_token_ids, compose
from bertgen_tf.generation.search.sequences import (
    Prompt,
    SearchOutput,
    Step,
    check_scorer,
    check_seeds,
    check_state,
    gnmt_penalty,
    is_one_of,
    length_power,
    make_prompt,
    size,
    with_shapes_of,
    write,
)

# Score of a hypothesis that does not exist, tensor2tensor's value. Anything that continues it, or
# contains a banned token, stays below _ALIVE, which no real hypothesis comes near.
_NO_SCORE = BANNED
_ALIVE = BANNED / 2
# The same for final scores, which a negative length penalty multiplies: they may be far below.
_NO_FINAL_SCORE = -1e30
_FINAL = _NO_FINAL_SCORE / 2


class _Scorer(NamedTuple):
    """All that differs between beam searches. `length` counts generated tokens, EOS included.

    `offer(log_probs [B, C], is_eos [B, C], length [], done [B]) -> [B, C]` gives each finished
    candidate, in the order they were chosen, its final score, and the others `_NO_FINAL_SCORE`.
    `is_done(best_running [B], finished [B, K], length [], done [B]) -> [B]` says which examples
    need no further search, from the sum of the best running beam and the sorted finished scores.
    """

    offer: Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
    is_done: Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


def _huggingface_scorer(
    num_beams: int, longest: int | tf.Tensor, length_penalty: float, early_stopping: bool | str
) -> _Scorer:
    """The rules of transformers 5.23, `GenerationMixin._beam_search`."""
    stop_when_full = early_stopping is True
    bound_by_longest = early_stopping == "never" and length_penalty > 0.0

    def offer(log_probs, is_eos, length, done):
        ends = is_eos | (length == longest)
        # Candidates after the first K only replace beams that end; they may not end themselves.
        is_top = tf.range(tf.shape(log_probs)[1]) < num_beams  # [C]
        accepted = ends & is_top & ~done[:, tf.newaxis]
        return tf.where(accepted, log_probs / length_power(length, length_penalty), _NO_FINAL_SCORE)

    def is_done(best_running, finished, length, done):
        # That is _NO_FINAL_SCORE until all slots are filled.
        worst = finished[:, -1]
        possible = longest if bound_by_longest else length
        done |= best_running / length_power(possible, length_penalty) <= worst
        return done | (worst > _FINAL) if stop_when_full else done

    return _Scorer(offer, is_done)


def _gnmt_scorer(longest: int | tf.Tensor, alpha: float) -> _Scorer:
    """The rules of tensor2tensor 1.15, `utils/beam_search.py` (length penalty of Wu et al. 2016).

    Nothing is sticky: until all examples are done, each of them keeps filling its slots.
    """

    def offer(log_probs, is_eos, length, done):
        return tf.where(is_eos, log_probs / gnmt_penalty(length, alpha), _NO_FINAL_SCORE)

    def is_done(best_running, finished, length, done):
        return finished[:, 0] > best_running / gnmt_penalty(longest, alpha)

    return _Scorer(offer, is_done)


class _Hypotheses(NamedTuple):
    """Sequences and their scores, best first.

    One that does not exist scores below `_ALIVE` if running, below `_FINAL` if finished.
    """

    sequences: tf.Tensor  # int32 [B, K, L]
    token_scores: tf.Tensor  # float32 [B, K, L - 1]
    scores: tf.Tensor  # float32 [B, K]


class _Continuations(NamedTuple):
    """The candidates of one step, `[B, C]` each, in the order they were chosen."""

    sums: tf.Tensor  # float32, log-probabilities of the sequence
    log_probs: tf.Tensor  # float32, of the token alone
    beams: tf.Tensor  # int32, which beam is continued
    ids: tf.Tensor  # int32, by which token


class _BeamState(NamedTuple):
    index: tf.Tensor  # int32 []: position of the last token
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
    max_length: int | tf.Tensor | None = None,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    processors: Sequence[Processor] = (),
    filters: Sequence[Processor] = (),
    do_sample: bool = False,
    seeds: tf.Tensor | None = None,
    prompt_length: int | tf.Tensor | None = None,
    scorer: Literal["huggingface", "gnmt"] = "huggingface",
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    gnmt_alpha: float = 0.6,
    normalize_unfinished: bool = False,
    reorder: Callable[[Any, tf.Tensor], Any] | None = None,
) -> SearchOutput:
    """Beam search by the rules of transformers 5.23 ("huggingface") or tensor2tensor ("gnmt").

    Each step keeps the `max(2, 1 + len(eos_token_ids)) * num_beams` best continuations of an
    example; the best `num_beams` of them that do not end are the next beams. The scorers differ in
    what may finish, what it then scores, and when to stop; L is generated tokens, EOS included:

    - "huggingface": only the best `num_beams` continuations may finish, and at the limit they do,
      with or without EOS. Score: sum of log-probabilities / L**length_penalty.
      An example is done once it has `num_beams` finished hypotheses and, by `early_stopping`,
      True: at once; False: if the best beam would score no better than the worst of them at its
      present length; "never": the same, but at the limit if `length_penalty` > 0.
    - "gnmt": every kept continuation may finish. Score: sum / ((5 + L) / 6)**gnmt_alpha. Done if no
      beam can beat the best finished hypothesis any more. An example without a finished hypothesis
      at the limit returns its beams, scored by their plain sums. As in tensor2tensor,
      the search continues for all examples until all are done: the best hypothesis of an example
      does not depend on the rest of the batch, but later ones may.

    Log-probabilities are those after `processors`, which therefore receive log-probabilities, and
    are not renormalised. A slot for which there is no hypothesis (few sequences are possible, or
    "gnmt" was done first) holds only padding, with a score of -1e7.

    With `do_sample` (Hugging Face's beam sampling), the continuations kept are not the best ones
    but drawn without replacement, with probabilities proportional to exp(sum) of the sequence they
    make, and their order is that of the draws: "the best `num_beams` continuations", which may
    finish, are the first drawn. Of those that do not end, the best still become the next beams.
    `filters` run after the processors and their effect stays in the sums: with a temperature,
    scores are sums of scaled log-probabilities. So each step has the distribution of transformers;
    the random numbers, and with them the draws for a given seed, differ.

    Args:
        step: the step function, see the module.
        state: its first state; without `reorder` with rows = batch * num_beams, beams of an example
            adjacent.
        start_ids: integers `[batch]`, the first token of every sequence, or `[batch, P]`, the first
            tokens. `step` is first asked about the last of them: its state holds the earlier ones.
        num_beams: beams per example, >= 1.
        num_return_sequences: the best n hypotheses are returned, at most `num_beams`.
        max_new_tokens: the most tokens to generate, EOS included, >= 1.
        max_length: int or int32 scalar, the most tokens of a sequence, prompt included; whichever
            limit is reached first ends the search. None: no such limit.
        eos_token_ids: each of them ends a sequence.
        pad_token_id: fills sequences after their end.
        processors: run in order on the scores of the next token, see
            `bertgen_tf.generation.search.logits`.
        filters: the same, after the processors; with `do_sample` only.
        do_sample: whether continuations are drawn.
        seeds: integers `[batch, 2]`, with `do_sample` only: a seed and the number of the example.
            What is drawn depends on these and the position, not on the rest of the batch.
        prompt_length: int or int32 scalar, how many columns of `start_ids` count; the others are
            padding and overwritten. None: all.
        scorer: "huggingface" or "gnmt".
        length_penalty: for "huggingface" only.
        early_stopping: for "huggingface" only.
        gnmt_alpha: for "gnmt" only, >= 0.
        normalize_unfinished: for "gnmt" only, divides the plain sums of beams that are returned
            because no hypothesis finished: by the penalty of the longest sequence.
        reorder: see the module; by default the rows of every tensor in `state` are gathered.

    Returns:
        `SearchOutput` of `num_return_sequences` sequences per example, best first.

    Raises:
        TypeError, ValueError: for an argument outside these rules.
    """
    eos_token_ids = check_token_ids("eos_token_ids", eos_token_ids)
    check_integer("num_beams", num_beams)
    check_integer("num_return_sequences", num_return_sequences)
    if num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences must be at most num_beams ({num_beams}), received "
            f"{num_return_sequences}: raise num_beams."
        )
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(
            f'early_stopping must be True, False or "never", received {early_stopping!r}.'
        )
    check_scorer(scorer, gnmt_alpha)
    if filters and not do_sample:
        raise ValueError("filters shape draws: pass do_sample=True or no filters.")
    prompt = make_prompt(start_ids, prompt_length, max_new_tokens, max_length, pad_token_id)
    seeds = check_seeds(seeds, do_sample)
    if reorder is None:
        reorder = _gather_rows
        state = check_state(state, prompt.sequences.shape[0], num_beams)
    longest = prompt.limit - prompt.length
    if scorer == "huggingface":
        rules = _huggingface_scorer(num_beams, longest, length_penalty, early_stopping)
    else:
        rules = _gnmt_scorer(longest, gnmt_alpha)
    search = _Search(
        step=step,
        reorder=reorder,
        prompt=prompt,
        rules=rules,
        num_beams=num_beams,
        eos_token_ids=eos_token_ids,
        processors=tuple(processors),
        filters=tuple(filters),
        do_sample=do_sample,
        seeds=seeds,
    )
    (last,) = tf.while_loop(search.goes_on, search.advance, (search.start(state),))
    penalty = gnmt_penalty(longest, gnmt_alpha) if normalize_unfinished else None
    output = _output(last, penalty, pad_token_id)
    return SearchOutput(*(tensor[:, :num_return_sequences] for tensor in output))


class _Search(NamedTuple):
    """A search whose arguments are checked; see `beam_search` for them."""

    step: Step
    reorder: Callable[[Any, tf.Tensor], Any]
    prompt: Prompt
    rules: _Scorer
    num_beams: int
    eos_token_ids: tuple[int, ...]
    processors: tuple[Processor, ...]
    filters: tuple[Processor, ...]
    do_sample: bool
    seeds: tf.Tensor | None

    def start(self, state: Any) -> _BeamState:
        """The state before the first step."""
        prompt, num_beams = self.prompt, self.num_beams
        batch, width = size(prompt.sequences, 0), size(prompt.sequences, 1)
        beams = tf.repeat(prompt.sequences[:, tf.newaxis], num_beams, axis=1)  # [B, K, L]
        no_scores = tf.zeros([batch, num_beams, width - 1])
        # Only the first beam exists at first, or all of them would find the same continuations.
        only_first = tf.constant([[0.0] + [_NO_SCORE] * (num_beams - 1)])  # [1, K]
        return _BeamState(
            index=tf.convert_to_tensor(prompt.length - 1),
            running=_Hypotheses(beams, no_scores, tf.tile(only_first, [batch, 1])),
            finished=_Hypotheses(beams, no_scores, tf.fill([batch, num_beams], _NO_FINAL_SCORE)),
            done=tf.zeros([batch], tf.bool),
            state=state,
        )

    def goes_on(self, loop: _BeamState) -> tf.Tensor:
        """Whether there is another step: bool []."""
        return (loop.index + 1 < self.prompt.limit) & ~tf.reduce_all(loop.done)

    def advance(self, loop: _BeamState) -> tuple[_BeamState]:
        """One step."""
        candidates, state = self._candidates(loop)
        sequences, token_scores = _extend(loop.running, candidates, loop.index)
        is_eos = is_one_of(candidates.ids, self.eos_token_ids)  # [B, C]
        length = loop.index + 2 - self.prompt.length

        running, kept = _best(
            _Hypotheses(sequences, token_scores, tf.where(is_eos, _NO_SCORE, candidates.sums)),
            self.num_beams,
        )
        offered = self.rules.offer(candidates.sums, is_eos, length, loop.done)
        offered = tf.where(candidates.sums > _ALIVE, offered, _NO_FINAL_SCORE)  # [B, C]
        # Finished hypotheses come first, and so win a tie: a slot stays empty until it is filled.
        finished, _ = _best(
            _Hypotheses(
                tf.concat([loop.finished.sequences, sequences], axis=1),  # [B, K + C, L]
                tf.concat([loop.finished.token_scores, token_scores], axis=1),
                tf.concat([loop.finished.scores, offered], axis=1),  # [B, K + C]
            ),
            self.num_beams,
        )
        best_running = running.scores[:, 0]
        done = self.rules.is_done(best_running, finished.scores, length, loop.done)
        new = _BeamState(
            index=loop.index + 1,
            running=running,
            finished=finished,
            done=done | (best_running < _ALIVE),
            state=self.reorder(state, tf.gather(candidates.beams, kept, axis=1, batch_dims=1)),
        )
        return (with_shapes_of(loop, new),)

    def _candidates(self, loop: _BeamState) -> tuple[_Continuations, Any]:
        """The continuations of all beams that are kept, and the new state of the step function."""
        sums = loop.running.scores
        rows = size(self.prompt.sequences, 0) * self.num_beams
        flat = tf.reshape(
            loop.running.sequences, [rows, size(self.prompt.sequences, 1)]
        )  # [B*K, L]
        last = tf.gather(flat, loop.index, axis=1)  # [B*K]
        logits, state = self.step(last, loop.index, loop.state)
        logits = tf.cast(logits, tf.float32)  # [B*K, V]
        count = max(2, 1 + len(self.eos_token_ids)) * self.num_beams
        if not self.do_sample and not self.processors:
            normalizer = tf.reduce_logsumexp(logits, axis=1)
            return _best_continuations(logits, sums, count, normalizer), state
        process = compose([*self.processors, *self.filters])
        log_probs = process(tf.nn.log_softmax(logits), flat, loop.index)
        if self.do_sample:
            return _drawn_continuations(log_probs, sums, count, self.seeds, loop.index), state
        return _best_continuations(log_probs, sums, count), state


def _output(last: _BeamState, penalty: float | tf.Tensor | None, pad_token_id: int) -> SearchOutput:
    """All hypotheses, best first.

    Args:
        last: the state after the last step.
        penalty: divides the scores of unfinished hypotheses.
        pad_token_id: fills missing hypotheses.
    """
    # Only "gnmt" leaves an example without any finished hypothesis.
    any_finished = last.finished.scores[:, 0] > _FINAL  # [B]

    def of_finished(finished: tf.Tensor, running: tf.Tensor) -> tf.Tensor:
        condition = tf.reshape(any_finished, [-1] + [1] * (finished.shape.rank - 1))
        return tf.where(condition, finished, running)

    scores = last.running.scores
    if penalty is not None:
        scores /= penalty
    # Without the penalty, which could lift missing hypotheses above _ALIVE.
    exists = of_finished(last.finished.scores > _FINAL, last.running.scores > _ALIVE)  # [B, K]
    found = tf.nest.map_structure(of_finished, last.finished, last.running._replace(scores=scores))
    return SearchOutput(
        sequences=tf.where(exists[..., tf.newaxis], found.sequences, pad_token_id),
        scores=tf.where(exists, found.scores, _NO_SCORE),
        token_scores=tf.where(exists[..., tf.newaxis], found.token_scores, 0.0),
    )


def _best_continuations(
    log_probs: tf.Tensor, scores: tf.Tensor, count: int, subtract: tf.Tensor | None = None
) -> _Continuations:
    """The `count` best continuations of every example, from the `count` best of every row.

    Args:
        log_probs: float32 `[B*K, V]` of the next token.
        scores: float32 `[B, K]`, the sums so far.
        count: C.
        subtract: float32 `[B*K]`, turns `log_probs` into log-probabilities if these are logits.

    Returns:
        The continuations, best first.
    """
    num_beams = scores.shape[1]
    vocabulary = size(log_probs, 1)
    per_row = (
        min(count, vocabulary) if isinstance(vocabulary, int) else tf.minimum(count, vocabulary)
    )
    log_probs, ids = tf.math.top_k(log_probs, per_row)  # [B*K, min(C, V)]
    if subtract is not None:
        log_probs -= subtract[:, tf.newaxis]
    # A vocabulary below C leaves places that nothing fills.
    missing = [[0, 0], [0, count - per_row]]
    log_probs = tf.pad(tf.maximum(log_probs, BANNED), missing, constant_values=_NO_SCORE)
    ids = tf.pad(ids, missing)  # [B*K, C]
    log_probs = tf.reshape(log_probs, [-1, num_beams * count])  # [B, K*C]
    sums = log_probs + tf.repeat(scores, count, axis=1)
    sums, places = tf.math.top_k(sums, count)  # [B, C]
    ids = tf.reshape(ids, [-1, num_beams * count])
    return _Continuations(
        sums=sums,
        log_probs=tf.gather(log_probs, places, axis=1, batch_dims=1),
        beams=places // count,
        ids=tf.gather(ids, places, axis=1, batch_dims=1),
    )


def _drawn_continuations(
    log_probs: tf.Tensor, scores: tf.Tensor, count: int, seeds: tf.Tensor, step: tf.Tensor
) -> _Continuations:
    """`count` continuations of every example, drawn without replacement.

    Args:
        log_probs: float32 `[B*K, V]` of the next token.
        scores: float32 `[B, K]`, the sums so far.
        count: C.
        seeds: int32 `[B, 2]`.
        step: int32 scalar.

    Returns:
        The continuations, in the order in which they were drawn.
    """
    num_beams = scores.shape[1]
    vocabulary = size(log_probs, 1)
    log_probs = tf.maximum(log_probs, BANNED)
    log_probs = tf.reshape(log_probs, [-1, num_beams * vocabulary])  # [B, K*V]
    sums = log_probs + tf.repeat(scores, vocabulary, axis=1)
    seeds = tf.pad(seeds, [[0, 0], [0, 1]])  # one row per example: its beams draw together
    places = noise.draw(sums, count, seeds, step)  # [B, C]
    exists = places < num_beams * vocabulary
    places = tf.where(exists, places, 0)
    return _Continuations(
        sums=tf.where(exists, tf.gather(sums, places, axis=1, batch_dims=1), _NO_SCORE),
        log_probs=tf.gather(log_probs, places, axis=1, batch_dims=1),
        beams=places // vocabulary,
        ids=places % vocabulary,
    )


def _extend(
    running: _Hypotheses, candidates: _Continuations, index: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sequences `[B, C, L]` and token scores `[B, C, L - 1]` of the candidates."""
    sequences = tf.gather(running.sequences, candidates.beams, axis=1, batch_dims=1)
    token_scores = tf.gather(running.token_scores, candidates.beams, axis=1, batch_dims=1)
    return (
        write(sequences, index + 1, candidates.ids),
        write(token_scores, index, candidates.log_probs),
    )


def _best(hypotheses: _Hypotheses, count: int) -> tuple[_Hypotheses, tf.Tensor]:
    """The `count` best hypotheses `[B, count]`, best first, and their places."""
    scores, places = tf.math.top_k(hypotheses.scores, count)
    sequences = tf.gather(hypotheses.sequences, places, axis=1, batch_dims=1)
    token_scores = tf.gather(hypotheses.token_scores, places, axis=1, batch_dims=1)
    return _Hypotheses(sequences, token_scores, scores), places


def _gather_rows(state: Any, parents: tf.Tensor) -> Any:
    """`state` of rows B*K, each row replaced by that of the beam that `parents` `[B, K]` names."""
    batch, num_beams = size(parents, 0), size(parents, 1)
    rows = tf.reshape(parents + num_beams * tf.range(batch)[:, tf.newaxis], [-1])  # [B*K]
    return tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), state)
