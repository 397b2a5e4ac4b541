"""Joins model, settings and search: caches, buckets and compiled functions.

Strings cannot enter XLA, so text stays outside: the compiled function takes padded integers only.
Batch and source length are padded to buckets inside the graph, so that a model compiles a bounded
number of times, even when it is served. Nothing is written for AutoGraph, which would take longer
than tracing at the first call.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from bertgen_tf.checks import check_integer
from bertgen_tf.config import GenerationConfig
from bertgen_tf.generation.buckets import bucket_of, prompt_width, source_buckets
from bertgen_tf.generation.search.beam_search import beam_search
from bertgen_tf.generation.search.logits import Processor, checked
from bertgen_tf.generation.search.sampling import Sampling, SamplingLoop, sample
from bertgen_tf.generation.search.sequences import Step
from bertgen_tf.generation.settings import (
    eos_token_ids,
    filters_for,
    processors_for,
    total_length,
    uses_beams,
)
from bertgen_tf.network.tracing import kernels_for_loop, search_graph

if TYPE_CHECKING:
    from bertgen_tf.models.encoder_decoder import EncoderDecoderModel

# For how many settings a model keeps compiled functions.
MAX_FUNCTIONS = 16
# input_ids, attention_mask, decoder_input_ids, seeds
_SIGNATURE = [tf.TensorSpec([None, None], tf.int32)] * 3 + [tf.TensorSpec([None, 2], tf.int32)]


class KeptFunctions:
    """The compiled functions of a model, for the most recently used settings."""

    def __init__(self):
        self._functions: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._functions)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under a key; if nothing is, the result of `make`, which is then kept."""
        # The most recently used one comes last; the first one is dropped.
        function = self._functions.pop(key, None)
        if function is None:
            function = make()
            if len(self._functions) >= MAX_FUNCTIONS:
                self._functions.pop(next(iter(self._functions)))
        self._functions[key] = function
        return function


class GenerateTensors(NamedTuple):
    """What a generation function returns, hypotheses best first.

    T is P + max_new_tokens, or max_length: the longest output, start token and prompt included.

    Attributes:
        sequences: int32 [B, n, T]: prompt, generated tokens, end token if it was reached, padding.
        scores: float32 [B, n], see `bertgen_tf.generation.search.beam_search`.
        token_scores: float32 [B, n, T - 1]: the log-probability of sequences[..., i + 1] where that
            was generated, 0 elsewhere.
        cross_attentions: float32 [B, n, layers, heads, T - 1, S], or None: the cross-attention
            weights of each generated token, sequences[..., i + 1], over the source tokens; 0 after
            the end.
    """

    sequences: tf.Tensor
    scores: tf.Tensor
    token_scores: tf.Tensor
    cross_attentions: tf.Tensor | None


def _graph(**options: Any) -> Callable[[Callable], Callable]:
    """`tf.function`, without TensorFlow's warning about many functions of one name.

    There is one for each combination of settings, and `KeptFunctions` bounds their number.
    """

    def decorate(python_function: Callable) -> Callable:
        function = tf.function(autograph=False, **options)(python_function)
        function._omit_frequent_tracing_warning = True
        return function

    return decorate


def generation_function(
    model: "EncoderDecoderModel",
    config: GenerationConfig,
    jit_compile: bool,
    *,
    logits_processor: Sequence[Processor] = (),
    output_attentions: bool = False,
) -> Callable[..., GenerateTensors]:
    """The search of `model` with these settings, as a graph, traced once per bucket of prompts.

    With `jit_compile` the search is compiled by XLA, once for each bucket that occurs: batches are
    padded to powers of two, sources to powers of two from 16, prompts to 1 and powers of two from
    8. Without it, the search is a plain graph, where only prompts are padded.

    Args:
        model: with `encoder` and `decoder`.
        config: settings that passed `check_config`; the seed is not read.
        jit_compile: see above.
        logits_processor: run after the processors of the settings, see
            `bertgen_tf.generation.search.logits`.
        output_attentions: also return the cross-attention weights.

    Returns:
        `(input_ids [B, S], attention_mask [B, S], decoder_input_ids [B, P], seeds [B, 2])`, int32,
        with P known when traced and no padding in the prompts -> `GenerateTensors`.
    """
    functions: dict[int, Callable[..., GenerateTensors]] = {}

    def build(width: int) -> Callable[..., GenerateTensors]:
        @_graph(
            jit_compile=jit_compile,
            input_signature=_Inputs.signature(width),
        )
        def search(*inputs: tf.Tensor) -> GenerateTensors:
            with search_graph(jit_compile), kernels_for_loop(model.decoder.kernels_for_loop()):
                return _search(model, config, _Inputs(*inputs), logits_processor, output_attentions)

        @_graph(input_signature=_SIGNATURE)
        def padded(*tensors: tf.Tensor) -> GenerateTensors:
            inputs = _pad(model, width, jit_compile, *tensors)
            return _crop(config, tensors[0], inputs.prompt_length, search(*inputs))

        return padded

    def generate(
        input_ids: Any, attention_mask: Any, decoder_input_ids: Any, seeds: Any
    ) -> GenerateTensors:
        width = prompt_width(model, decoder_input_ids)
        if width not in functions:
            functions[width] = build(width)
        return functions[width](input_ids, attention_mask, decoder_input_ids, seeds)

    return generate


class StreamState(NamedTuple):
    """What a streamed search keeps between two steps: tensors, padded to their buckets."""

    loop: SamplingLoop
    cross: Any  # keys and values of the source
    inputs: "_Inputs"
    batch: tf.Tensor  # int32 []: requested rows


class StreamStep(NamedTuple):
    """What a step of a streamed search returns.

    Attributes:
        state: for the next step.
        sequences: int32 [B, n, P + max_new_tokens], as in `GenerateTensors`, so far.
        length: int32 scalar: the columns of `sequences` that are filled, prompt included.
        done: bool scalar: nothing more will come.
    """

    state: StreamState
    sequences: tf.Tensor
    length: tf.Tensor
    done: tf.Tensor


def streaming_functions(
    model: "EncoderDecoderModel",
    config: GenerationConfig,
    jit_compile: bool,
    *,
    logits_processor: Sequence[Processor] = (),
    tokens_per_step: int,
) -> tuple[Callable[..., StreamState], Callable[[StreamState], StreamStep]]:
    """The search of `generation_function` in steps of `tokens_per_step` tokens.

    Greedy search and sampling only: the best beam may change with every token. Inputs are padded to
    buckets with and without XLA, and each function is traced once per bucket.

    Returns:
        `start(input_ids, attention_mask, decoder_input_ids, seeds) -> StreamState`, with the inputs
        of `generation_function`, and `advance(StreamState) -> StreamStep`.

    Raises:
        ValueError: the settings ask for beam search, or `tokens_per_step` is not a positive
            integer.
    """
    if uses_beams(config):
        raise ValueError(
            "Streaming needs greedy search or sampling, because the best beam is known only at the "
            f"end, received num_beams={config.num_beams} with beam_scorer={config.beam_scorer!r}. "
            "Set num_beams=1 and, for greedy search, beam_scorer='huggingface'."
        )
    check_integer("tokens_per_step", tokens_per_step)

    @_graph(jit_compile=jit_compile)
    def begin(inputs: _Inputs) -> tuple[SamplingLoop, Any]:
        with search_graph(jit_compile):
            prepared = _prepare(model, config, inputs)
        # Only the later steps need processors.
        sampling = Sampling(**_options(model, config, ()))
        return sampling.start(prepared.state, **_start(config, inputs)), prepared.cross

    @_graph(jit_compile=jit_compile)
    def run(loop: SamplingLoop, cross: Any, inputs: _Inputs) -> tuple[Any, ...]:
        processors = _processors(model, config, inputs, logits_processor)
        sampling = Sampling(**_options(model, config, processors))
        step = _step_function(model, cross, inputs.attention_mask)
        with search_graph(jit_compile):
            loop = sampling.advance(step, loop, tokens_per_step)
        done = tf.reduce_all(loop.done) | (loop.index + 1 >= loop.limit)
        return loop, sampling.output(loop).sequences, done

    def start(
        input_ids: Any, attention_mask: Any, decoder_input_ids: Any, seeds: Any
    ) -> StreamState:
        tensors = [
            tf.convert_to_tensor(tensor, tf.int32)
            for tensor in (input_ids, attention_mask, decoder_input_ids, seeds)
        ]
        width = prompt_width(model, tensors[2])
        inputs = _pad(model, width, True, *tensors)
        loop, cross = begin(inputs)
        return StreamState(loop, cross, inputs, tf.shape(tensors[0])[0])

    def advance(state: StreamState) -> StreamStep:
        loop, sequences, done = run(state.loop, state.cross, state.inputs)
        state = state._replace(loop=loop)
        return StreamStep(state, sequences[: state.batch, :, : loop.limit], loop.index + 1, done)

    return start, advance


def hypotheses_to_text(preprocessor: Any, sequences: tf.Tensor) -> tf.Tensor:
    """int32 [B, n, L] with the start token first -> strings [B, n]."""
    batch, hypotheses, length = tf.unstack(tf.shape(sequences))
    ids = tf.reshape(sequences, [batch * hypotheses, length])[:, 1:]
    return tf.reshape(preprocessor.generate_postprocess(ids), [batch, hypotheses])


class _Inputs(NamedTuple):
    """What a compiled search reads, int32; the prompts padded to W columns."""

    input_ids: tf.Tensor  # [B, S]
    attention_mask: tf.Tensor  # [B, S]
    prompt: tf.Tensor  # [B, W]
    seeds: tf.Tensor  # [B, 2]
    prompt_length: tf.Tensor  # []

    @staticmethod
    def signature(width: int) -> list[tf.TensorSpec]:
        shapes = ([None, None], [None, None], [None, width], [None, 2], [])
        return [tf.TensorSpec(shape, tf.int32) for shape in shapes]


class _Prepared(NamedTuple):
    """The beginning of a search."""

    memory: tf.Tensor  # [B, S, H]
    cross: Any  # keys and values of the source, of every layer
    state: Any  # the rest of the decoder's cache, with the prompt


def _search(
    model: "EncoderDecoderModel",
    config: GenerationConfig,
    inputs: _Inputs,
    logits_processor: Sequence[Processor],
    output_attentions: bool,
) -> GenerateTensors:
    prepared = _prepare(model, config, inputs)
    step = _step_function(model, prepared.cross, inputs.attention_mask)
    processors = _processors(model, config, inputs, logits_processor)
    options = {**_options(model, config, processors), **_start(config, inputs)}
    if uses_beams(config):
        output = beam_search(
            step,
            prepared.state,
            num_beams=config.num_beams,
            early_stopping=config.early_stopping,
            reorder=_reorder,
            **options,
        )
    else:
        output = sample(step, prepared.state, **options)
    attentions = None
    if output_attentions:
        attentions = _cross_attentions(model, config, inputs, prepared.memory, output.sequences)
    return GenerateTensors(*output, attentions)


def _prepare(model: "EncoderDecoderModel", config: GenerationConfig, inputs: _Inputs) -> _Prepared:
    decoder = model.decoder
    batch = tf.shape(inputs.input_ids)[0]
    width = inputs.prompt.shape[1]
    memory = model.encoder(inputs.input_ids, inputs.attention_mask, training=False)
    # Of the longest sequences of this bucket; the last token generated is never read.
    longest = max(width, total_length(config, width) - 1)
    cache = decoder.init_cache(batch, longest, memory)
    if width > 1:
        # Beyond the prompt's end this writes what the loop overwrites before it is read.
        _, cache = decoder(
            inputs.prompt,
            encoder_attention_mask=inputs.attention_mask,
            cache=cache,
            training=False,
        )
    rows = config.num_beams if uses_beams(config) else config.num_return_sequences
    cache = decoder.repeat_cache(cache, rows)
    return _Prepared(memory, cache.pop("cross"), cache)


def _step_function(model: "EncoderDecoderModel", cross: Any, attention_mask: tf.Tensor) -> Step:
    def step(ids: tf.Tensor, index: tf.Tensor, state: Any) -> tuple[tf.Tensor, Any]:
        # [rows, 1, V]
        token_logits, cache = model.decoder(
            ids[:, None],
            encoder_attention_mask=attention_mask,
            cache={**state, "cross": cross},
            cache_index=index,
            training=False,
        )
        return token_logits[:, 0], {key: cache[key] for key in state}

    return step


def _reorder(state: dict[str, Any], parents: tf.Tensor) -> dict[str, Any]:
    """The cache after beams have changed places; keys and values stay where they are."""
    return {**state, "beams": tf.gather(state["beams"], parents, axis=1, batch_dims=1)}


def _processors(
    model: "EncoderDecoderModel",
    config: GenerationConfig,
    inputs: _Inputs,
    logits_processor: Sequence[Processor],
) -> list[Processor]:
    return processors_for(
        config,
        model,
        inputs.input_ids,
        inputs.attention_mask,
        _prompt_length(inputs),
        [*map(checked, logits_processor)],
    )


def _options(
    model: "EncoderDecoderModel", config: GenerationConfig, processors: Sequence[Processor]
) -> dict[str, Any]:
    """The settings that all searches share."""
    return {
        # The size of buffers: where max_length is the limit, that of the shortest prompt.
        "max_new_tokens": config.max_new_tokens or config.max_length - 1,
        "max_length": config.max_length,
        "eos_token_ids": eos_token_ids(config, model),
        "pad_token_id": model.decoder.config.pad_token_id,
        "processors": processors,
        "filters": filters_for(config, model),
        "do_sample": config.do_sample,
        "num_return_sequences": config.num_return_sequences,
        "scorer": config.beam_scorer,
        "length_penalty": config.length_penalty,
        "gnmt_alpha": config.gnmt_alpha,
        "normalize_unfinished": config.normalize_unfinished,
    }


def _start(config: GenerationConfig, inputs: _Inputs) -> dict[str, Any]:
    """What the searches begin with."""
    return {
        "start_ids": inputs.prompt,
        "seeds": inputs.seeds if config.do_sample else None,
        "prompt_length": _prompt_length(inputs),
    }


def _prompt_length(inputs: _Inputs) -> int | tf.Tensor:
    return 1 if inputs.prompt.shape[1] == 1 else inputs.prompt_length


def _cross_attentions(
    model: "EncoderDecoderModel",
    config: GenerationConfig,
    inputs: _Inputs,
    memory: tf.Tensor,
    sequences: tf.Tensor,
) -> tf.Tensor:
    """[B, n, layers, heads, L - 1, S] of sequences [B, n, L]; zeros after their ends."""
    batch = tf.shape(sequences)[0]
    hypotheses, length = sequences.shape[1:]
    # A bucket of prompts may be wider than the positions: nothing is generated there.
    read = min(length - 1, model.decoder.config.max_target_positions)
    mask = inputs.attention_mask
    one_stack = model.decoder.config.decoder_only
    if one_stack:  # a source is part of each row
        memory, mask = tf.repeat(memory, hypotheses, axis=0), tf.repeat(mask, hypotheses, axis=0)
    _, weights = model.decoder(
        tf.reshape(sequences[:, :, :read], [batch * hypotheses, read]),
        encoder_hidden_states=memory,
        encoder_attention_mask=mask,
        return_attention_weights=True,
        training=False,
    )
    layers, heads, source = weights.shape[1], weights.shape[2], tf.shape(weights)[-1]
    if one_stack:
        weights = tf.reshape(weights, [batch, hypotheses, layers, heads, read, source])
    else:
        # [B, layers, heads, n * read, S]: the rows of an example are folded into its queries.
        weights = tf.reshape(weights, [batch, layers, heads, hypotheses, read, source])
        weights = tf.transpose(weights, [0, 3, 1, 2, 4, 5])  # [B, n, layers, heads, read, S]
    eos = tf.constant(eos_token_ids(config, model))
    columns = tf.range(length)
    ends = tf.reduce_any(sequences[..., tf.newaxis] == eos, axis=-1)  # [B, n, L]
    ends &= columns >= inputs.prompt_length
    ended = tf.cumsum(tf.cast(ends, tf.int32), axis=-1)[:, :, :read] > 0  # [B, n, read]
    filled = columns[:read] < total_length(config, inputs.prompt_length) - 1
    # A missing hypothesis is nothing but padding.
    exists = sequences[:, :, :1] == inputs.prompt[:, tf.newaxis, :1]
    alive = exists & ~ended & filled  # [B, n, read]
    alive = tf.cast(alive, tf.float32)[:, :, tf.newaxis, tf.newaxis, :, tf.newaxis]
    padding = [[0, 0]] * 4 + [[0, length - 1 - read], [0, 0]]
    return tf.pad(weights * alive, padding)


def _pad(
    model: "EncoderDecoderModel",
    width: int,
    to_buckets: bool,
    input_ids: tf.Tensor,
    attention_mask: tf.Tensor,
    decoder_input_ids: tf.Tensor,
    seeds: tf.Tensor,
) -> _Inputs:
    """Pads prompts to `width` and, with `to_buckets`, batch and sources to theirs."""
    batch, length = tf.unstack(tf.shape(input_ids))
    prompt_length = tf.shape(decoder_input_ids)[1]
    missing_rows, to_length, rows = 0, length, None
    if to_buckets:
        to_length = bucket_of(length, source_buckets(model))
        to_batch = bucket_of(batch, [2**i for i in range(31)])
        # Rows that fill up the batch repeat its last one: they end when it ends. An empty batch
        # has none to repeat and gets a row of padding.
        rows = tf.minimum(tf.range(to_batch), tf.maximum(batch - 1, 0))
        missing_rows = tf.cast(tf.equal(batch, 0), tf.int32)

    def pad(tensor: tf.Tensor, columns: int | tf.Tensor, value: int = 0) -> tf.Tensor:
        tensor = tf.pad(tensor, [[0, missing_rows], [0, columns]], constant_values=value)
        return tensor if rows is None else tf.gather(tensor, rows)

    prompt = pad(decoder_input_ids, width - prompt_length, model.decoder.config.pad_token_id)
    return _Inputs(
        pad(input_ids, to_length - length, model.encoder.config.pad_token_id),
        pad(attention_mask, to_length - length),
        tf.ensure_shape(prompt, [None, width]),
        pad(seeds, 0),
        prompt_length,
    )


def _crop(
    config: GenerationConfig,
    input_ids: tf.Tensor,
    prompt_length: tf.Tensor,
    output: GenerateTensors,
) -> GenerateTensors:
    """Removes the padding of `_pad`."""
    batch, length = tf.unstack(tf.shape(input_ids))
    total = total_length(config, prompt_length)
    attentions = output.cross_attentions
    if attentions is not None:
        attentions = attentions[:batch, :, :, :, : total - 1, :length]
    return GenerateTensors(
        output.sequences[:batch, :, :total],
        output.scores[:batch],
        output.token_scores[:batch, :, : total - 1],
        attentions,
    )
