"""Greedy search and sampling: one token at a time, every sequence on its own.

The step function and the shapes are those of `bertgen_tf.generation.search.beam_search`. R = batch
* num_return_sequences is the number of rows, L the length of a sequence.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from bertgen_tf.checks import check_integer
from bertgen_tf.generation.search import noise
from bertgen_tf.generation.search.logits import BANNED, Processor, check_token_ids, compose
from bertgen_tf.generation.search.sequences import (
    SearchOutput,
    Step,
    check_scorer,
    check_seeds,
    gnmt_penalty,
    is_one_of,
    length_power,
    make_prompt,
    size,
    with_shapes_of,
    write,
)


class SamplingLoop(NamedTuple):
    """The state of a `Sampling` loop.

    All fields are tensors, so it can be passed through a `tf.function`.

    Attributes:
        index: int32 `[]`, the position of the last token.
        limit: int32 `[]`, no sequence becomes longer.
        sequences: int32 `[R, L]`.
        token_scores: float32 `[R, L - 1]`.
        lengths: int32 `[R]`, generated tokens, EOS included.
        done: bool `[R]`, EOS was met.
        seeds: int32 `[R, 3]`: seed, number of the example, number of its sequence.
        state: of the step function.
    """

    index: tf.Tensor
    limit: tf.Tensor
    sequences: tf.Tensor
    token_scores: tf.Tensor
    lengths: tf.Tensor
    done: tf.Tensor
    seeds: tf.Tensor
    state: Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampling:
    """`sample` in pieces: `output(advance(step, start(...)))` is the same.

    For streaming: a loop state consists of tensors, may be advanced by a few tokens at a time,
    and gives the output so far. The arguments are those of `sample`, and so are the errors;
    `processors` and `filters` are run by `advance` only.
    """

    eos_token_ids: Sequence[int]
    pad_token_id: int
    max_new_tokens: int
    max_length: int | tf.Tensor | None = None
    processors: Sequence[Processor] = ()
    filters: Sequence[Processor] = ()
    do_sample: bool = False
    num_return_sequences: int = 1
    scorer: Literal["huggingface", "gnmt"] = "huggingface"
    length_penalty: float = 1.0
    gnmt_alpha: float = 0.6
    normalize_unfinished: bool = False

    def __post_init__(self):
        eos_token_ids = check_token_ids("eos_token_ids", self.eos_token_ids)
        object.__setattr__(self, "eos_token_ids", eos_token_ids)
        check_integer("max_new_tokens", self.max_new_tokens)
        check_integer("num_return_sequences", self.num_return_sequences)
        check_scorer(self.scorer, self.gnmt_alpha)
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                "num_return_sequences must be 1 without do_sample and beams, received "
                f"{self.num_return_sequences}: all of them would be the same."
            )
        if self.filters and not self.do_sample:
            raise ValueError("filters shape draws: pass do_sample=True or no filters.")

    def start(
        self,
        state: Any,
        start_ids: tf.Tensor,
        *,
        seeds: tf.Tensor | None = None,
        prompt_length: int | tf.Tensor | None = None,
    ) -> SamplingLoop:
        """The loop state before the first token.

        Raises:
            ValueError: for an argument outside the rules.
        """
        prompt = make_prompt(
            start_ids, prompt_length, self.max_new_tokens, self.max_length, self.pad_token_id
        )
        seeds = check_seeds(seeds, self.do_sample)
        count = self.num_return_sequences
        state = tf.nest.map_structure(tf.convert_to_tensor, state)
        batch = size(prompt.sequences, 0)
        rows, width = batch * count, size(prompt.sequences, 1)
        if seeds is None:
            seeds = tf.zeros([batch, 2], tf.int32)
        numbers = tf.tile(tf.range(count), [batch])  # [R]
        return SamplingLoop(
            index=tf.convert_to_tensor(prompt.length - 1),
            limit=tf.convert_to_tensor(prompt.limit),
            sequences=tf.repeat(prompt.sequences, count, axis=0),
            token_scores=tf.zeros([rows, width - 1]),
            lengths=tf.zeros([rows], tf.int32),
            done=tf.zeros([rows], tf.bool),
            seeds=tf.concat([tf.repeat(seeds, count, axis=0), numbers[:, tf.newaxis]], axis=1),
            state=state,
        )

    def advance(self, step: Step, loop: SamplingLoop, tokens: int | None = None) -> SamplingLoop:
        """Generates until all rows are done or full, but at most `tokens` tokens; None: no bound.

        Raises:
            ValueError: if `tokens` is below 1.
        """
        stop = loop.limit
        if tokens is not None:
            check_integer("tokens", tokens)
            stop = tf.minimum(stop, loop.index + 1 + tokens)
        process = compose(self.processors)

        def unfinished(loop: SamplingLoop) -> tf.Tensor:
            return (loop.index + 1 < stop) & ~tf.reduce_all(loop.done)

        def generate(loop: SamplingLoop) -> tuple[SamplingLoop]:
            last = tf.gather(loop.sequences, loop.index, axis=1)  # [R]
            logits, state = step(last, loop.index, loop.state)
            logits = tf.cast(logits, tf.float32)  # [R, V]
            # A processor may treat logits and log-probabilities differently (a repetition penalty
            # does): Hugging Face chooses from the former here and counts the latter in beam search.
            ids = self._choose(process(logits, loop.sequences, loop.index), loop)
            if self.processors:
                log_probs = process(tf.nn.log_softmax(logits), loop.sequences, loop.index)
                chosen = tf.gather(log_probs, ids, axis=1, batch_dims=1)  # [R]
            else:
                chosen = tf.gather(logits, ids, axis=1, batch_dims=1)
                chosen -= tf.reduce_logsumexp(logits, axis=1)
            chosen = tf.where(loop.done, 0.0, tf.maximum(chosen, BANNED))
            ids = tf.where(loop.done, self.pad_token_id, ids)
            new = loop._replace(
                index=loop.index + 1,
                sequences=write(loop.sequences, loop.index + 1, ids),
                token_scores=write(loop.token_scores, loop.index, chosen),
                lengths=loop.lengths + tf.cast(~loop.done, tf.int32),
                done=loop.done | is_one_of(ids, self.eos_token_ids),
                state=state,
            )
            return (with_shapes_of(loop, new),)

        (loop,) = tf.while_loop(unfinished, generate, (loop,))
        return loop

    def is_done(self, loop: SamplingLoop) -> tf.Tensor:
        """Bool `[]`: nothing more will be generated."""
        return (loop.index + 1 >= loop.limit) | tf.reduce_all(loop.done)

    def output(self, loop: SamplingLoop) -> SearchOutput:
        """What has been generated so far."""
        scores = tf.reduce_sum(loop.token_scores, axis=1) / self._penalties(loop)
        count = self.num_return_sequences

        def per_example(tensor: tf.Tensor) -> tf.Tensor:
            rows = tensor.shape[0]
            batch = tf.shape(tensor)[0] // count if rows is None else rows // count
            rest = [size(tensor, axis) for axis in range(1, tensor.shape.rank)]
            return tf.reshape(tensor, [batch, count, *rest])

        return SearchOutput(
            per_example(loop.sequences), per_example(scores), per_example(loop.token_scores)
        )

    def _choose(self, logits: tf.Tensor, loop: SamplingLoop) -> tf.Tensor:
        """The next tokens, int32 `[R]`."""
        if not self.do_sample:
            return tf.argmax(logits, axis=-1, output_type=tf.int32)
        weights = compose(self.filters)(logits, loop.sequences, loop.index)
        return noise.draw(tf.maximum(weights, BANNED), 1, loop.seeds, loop.index)[:, 0]

    def _penalties(self, loop: SamplingLoop) -> tf.Tensor:
        """What divides the sums, float32 `[R]`."""
        lengths = tf.maximum(loop.lengths, 1)  # nothing is generated before the first piece
        if self.scorer == "huggingface":
            return length_power(lengths, self.length_penalty)
        penalties = gnmt_penalty(lengths, self.gnmt_alpha)
        return penalties if self.normalize_unfinished else tf.where(loop.done, penalties, 1.0)


def sample(
    step: Step,
    state: Any,
    start_ids: tf.Tensor,
    *,
    max_new_tokens: int,
    max_length: int | tf.Tensor | None = None,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    processors: Sequence[Processor] = (),
    filters: Sequence[Processor] = (),
    do_sample: bool = False,
    seeds: tf.Tensor | None = None,
    num_return_sequences: int = 1,
    prompt_length: int | tf.Tensor | None = None,
    scorer: Literal["huggingface", "gnmt"] = "huggingface",
    length_penalty: float = 1.0,
    gnmt_alpha: float = 0.6,
    normalize_unfinished: bool = False,
) -> SearchOutput:
    """Generates one token at a time: the best one (greedy search), or one drawn at random.

    With `do_sample`, a token is drawn with the probabilities that processors and filters leave;
    without, it is the best one after the processors. Either way its score is what Hugging Face's
    beam search would count: the log-probability after `processors`, which `filters` do not touch.
    So greedy search equals a beam of one, and a filter shapes the draw, not the score.

    Args:
        step: the step function, see `bertgen_tf.generation.search.beam_search`.
        state: its first state.
        start_ids: integers `[batch]`, the first token of every sequence, or `[batch, P]`, the first
            tokens. `step` is first asked about the last of them: its state holds the earlier ones.
        max_new_tokens: the most tokens to generate, EOS included, >= 1.
        max_length: int or int32 scalar, the most tokens of a sequence, prompt included; whichever
            limit is reached first ends the search. None: no such limit.
        eos_token_ids: each of them ends a sequence; none: all run to the limit.
        pad_token_id: fills sequences after their end; `step` still receives these rows.
        processors: run in order on the scores of the next token, see
            `bertgen_tf.generation.search.logits`.
        filters: the same, after the processors, on what is drawn from; with `do_sample` only.
        do_sample: whether tokens are drawn.
        seeds: integers `[batch, 2]`, with `do_sample` only: a seed and the number of the example.
            What is drawn depends on these, the number of the sequence among those of its example
            and the position, not on the rest of the batch.
        num_return_sequences: independent sequences per example, in no particular order; above 1
            with `do_sample` only.
        prompt_length: int or int32 scalar, how many columns of `start_ids` count; the others are
            padding and overwritten. None: all.
        scorer: how a sum of log-probabilities becomes a score, L = generated tokens, EOS included:
            "huggingface" divides it by L**length_penalty, "gnmt" by ((5 + L) / 6)**gnmt_alpha.
        length_penalty: for "huggingface" only.
        gnmt_alpha: for "gnmt" only, >= 0.
        normalize_unfinished: for "gnmt" only, also divides the sums of sequences without EOS.

    Returns:
        `SearchOutput` of `num_return_sequences` sequences per example.

    Raises:
        TypeError, ValueError: for an argument outside these rules.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        processors=processors,
        filters=filters,
        do_sample=do_sample,
        num_return_sequences=num_return_sequences,
        scorer=scorer,
        length_penalty=length_penalty,
        gnmt_alpha=gnmt_alpha,
        normalize_unfinished=normalize_unfinished,
    )
    loop = sampling.start(state, start_ids, seeds=seeds, prompt_length=prompt_length)
    return sampling.output(sampling.advance(step, loop))
