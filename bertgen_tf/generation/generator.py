"""`generate` for any number of inputs: batches of one bucket, results in input order.

Texts of similar length share a batch, and results return in input order. A result does not depend
on its batch, nor does sampling: random numbers are keyed by the example's index. Texts are read a
window at a time, sorted by length and cut into batches that need little padding.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from bertgen_tf.checks import GenerationError, check_integer
from bertgen_tf.config import BATCH_SIZE, GenerationConfig
from bertgen_tf.data.progress import show_progress
from bertgen_tf.data.texts import check_text, is_single
from bertgen_tf.generation.buckets import source_buckets
from bertgen_tf.generation.compiled import generation_function, hypotheses_to_text
from bertgen_tf.generation.inputs import (
    Rows,
    check_processors,
    id_rows,
    make_seeds,
    read_prompts,
    read_texts,
    start_prompt,
    strings,
    with_prompts,
)
from bertgen_tf.generation.search.token_scores import BANNED
from bertgen_tf.generation.settings import check_config, check_size, settings_of_call

if TYPE_CHECKING:
    from bertgen_tf.models.encoder_decoder import EncoderDecoderModel

# How many texts are read, sorted and generated before their first result is returned.
WINDOW = 1024


class GenerateOutput(NamedTuple):
    """What `generate` returns for ids, or if scores or attentions are requested.

    N examples, n = num_return_sequences hypotheses of each, best first. Shorter rows are padded at
    their ends: sequences with the padding token, the other fields with 0.

    Attributes:
        sequences: int32 [N, n, L]: start token, prompt, generated tokens, end token if it was
            reached, padding. L is the length of the longest prompt, start token included, plus
            max_new_tokens; or max_length.
        scores: float32 [N, n]: the log-probability of the sequence, divided by the length penalty
            of the settings.
        token_scores: float32 [N, n, L - 1] with `output_scores`, else None: the log-probability of
            `sequences[..., i + 1]` where it was generated, 0 on prompt and padding.
        cross_attentions: float32 [N, n, layers, heads, L - 1, S] with `output_attentions`, else
            None: the cross-attention weights of each generated token, `sequences[..., i + 1]`, over
            the source tokens; S is the length of the longest source.
        texts: for text, what `generate` returns without further outputs, else None.
    """

    sequences: np.ndarray
    scores: np.ndarray
    token_scores: np.ndarray | None = None
    cross_attentions: np.ndarray | None = None
    texts: Any = None


class _Run(NamedTuple):
    """What stays the same for all batches of a call."""

    model: "EncoderDecoderModel"
    config: GenerationConfig
    function: Callable
    batch_size: int


def generate(
    model: "EncoderDecoderModel",
    inputs: Any,
    generation_config: GenerationConfig | None = None,
    *,
    decoder_text: str | Sequence[str] | None = None,
    logits_processor: Sequence[Callable] = (),
    output_scores: bool = False,
    output_attentions: bool = False,
    batch_size: int = BATCH_SIZE,
    verbose: Any = "auto",
    jit_compile: bool = True,
    **options: Any,
) -> Any:
    """Generates text from text, or ids from ids.

    There may be any number of inputs: those of similar length are generated together, and the
    results are in input order. An example's result does not depend on the others, up to
    rounding; with `beam_scorer="gnmt"` that holds for the best hypothesis, as in tensor2tensor.

    TensorFlow keeps what XLA compiled for each combination of settings, and of
    `logits_processor`, until the process ends. A program that keeps receiving new ones, such as
    a temperature that its user sets, needs `jit_compile=False` for these.

    Args:
        inputs: a string; a list, an array, a column of a table or a tensor of strings; a
            `tf.data.Dataset` of strings, batched or not; or `dict(input_ids, attention_mask,
            decoder_input_ids, decoder_attention_mask)`, int32 [B, S] and [B, P]; all but
            `input_ids` may be left out. The decoder ids are prompts, with which the outputs begin;
            the start token is prepended unless every row has it. The masks are 0 on padding, which
            prompts have at their ends.
        generation_config: settings; by default the model's own.
        decoder_text: for text, a prompt for all outputs, or a list of one for each; part of the
            text that is returned.
        logits_processor: functions `(logits, ids, step) -> logits` that run after those of the
            settings, see `bertgen_tf.generation.search.logits`. Compiled functions are kept per
            list of them: pass the same objects again, or each call compiles anew.
        output_scores: also return the log-probability of each token.
        output_attentions: also return the cross-attention weights. They take 4 bytes for each
            layer, head, output token and source token: with 24 layers of 16 heads, 50 MB for an
            output of 64 tokens and a source of 512, and all stay in memory until the end.
            Request them for few inputs at a time.
        batch_size: how many inputs are generated together, at most.
        verbose: 1 shows the progress on stderr, 0 does not; "auto" shows it on a terminal, if
            there are more than 4 batches.
        jit_compile: compiles the loop with XLA (once for each bucket of batch and length);
            False runs the same loop as a plain graph.
        **options: fields of `GenerationConfig` that replace those of the settings.

    Returns:
        For a string, the best hypothesis as str; for several, a list of str; with
        `num_return_sequences` above 1, a list of hypotheses, best first, in place of each str. For
        ids, and with `output_scores` or `output_attentions`, a `GenerateOutput`.

    Raises:
        TypeError, ValueError: inputs, prompts or settings do not fit the model.
    """
    run = _prepare(
        model,
        generation_config,
        options,
        logits_processor,
        output_attentions,
        batch_size,
        jit_compile,
    )
    if isinstance(inputs, dict):
        if decoder_text is not None:
            raise ValueError(
                "decoder_text is for text, received it with a dict of ids. Pass "
                "decoder_input_ids in the dict."
            )
        rows = id_rows(inputs, model)
        with show_progress(verbose, len(rows.input_ids), batch_size) as advance:
            output = _generate_rows(run, rows, 0, advance)
        return output if output_scores else output._replace(token_scores=None)

    texts, total = read_texts(inputs)
    decoder_text = read_prompts(decoder_text, total)
    _check_prompts(run, decoder_text)
    with show_progress(verbose, total, batch_size) as advance:
        windows = _windows(run, texts, decoder_text, WINDOW, 0, advance)
        if not output_scores and not output_attentions:
            results = [text for output in windows for text in output.texts]
            return results[0] if is_single(inputs) else results
        outputs = list(windows) or [_generate_texts(run, [], None, 0, advance)]
    results = [text for output in outputs for text in output.texts]
    ends = np.cumsum([len(output.texts) for output in outputs])
    parts = [
        (np.arange(end - len(output.texts), end), output)
        for end, output in zip(ends, outputs, strict=True)
    ]
    output = _join(parts, len(results), model.decoder.config.pad_token_id)
    return output._replace(
        token_scores=output.token_scores if output_scores else None,
        texts=results[0] if is_single(inputs) else results,
    )


def iterate(
    model: "EncoderDecoderModel",
    texts: Iterable[str | bytes],
    generation_config: GenerationConfig | None = None,
    *,
    decoder_text: str | Iterable[str] | None = None,
    logits_processor: Sequence[Callable] = (),
    batch_size: int = BATCH_SIZE,
    window: int = WINDOW,
    first_example: int = 0,
    total: int | None = None,
    verbose: Any = 0,
    jit_compile: bool = True,
    **options: Any,
) -> Iterator[str | list[str]]:
    """Generates from any number of texts, with no more than a window of them in memory.

    The results are those of `generate`, in the order of the texts, and come from the same
    compiled functions. Nothing is read before the first result is asked for.

    Args:
        texts: strings from a list, a file, a generator; they may be endless. A
            `tf.data.Dataset` of single strings gives them as `dataset.as_numpy_iterator()`.
        generation_config, logits_processor, batch_size, jit_compile, **options: as for
            `generate`.
        decoder_text: a prompt for all outputs, or one for each text.
        window: how many texts are read, sorted by length and generated before their results
            are yielded.
        first_example: the index of the first text, which keys its random numbers: with it, the
            rest of a run is drawn as in the whole run.
        total: how many texts there are, those before `first_example` included, for `verbose`.
        verbose: 1 shows the progress on stderr, 0 does not; "auto" shows it on a terminal, if
            there are more than 4 batches.

    Yields:
        for each text the best hypothesis as str; with `num_return_sequences` above 1, a list of
        hypotheses, best first.

    Raises:
        TypeError, ValueError: texts, prompts or settings do not fit the model; raised when the
            first result, or that of the window, is requested.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(
            "texts must be an iterable of strings, received a single one: put it in a list."
        )
    run = _prepare(
        model, generation_config, options, logits_processor, False, batch_size, jit_compile
    )
    check_integer("window", window)
    texts = _checked("texts", texts, first_example)
    if decoder_text is not None and not isinstance(decoder_text, str | bytes):
        decoder_text = _checked("decoder_text", decoder_text, first_example)
    with show_progress(verbose, total, batch_size, first_example) as advance:
        for output in _windows(run, texts, decoder_text, window, first_example, advance):
            yield from output.texts


def _checked(name: str, texts: Iterable[Any], first: int) -> Iterator[str | bytes]:
    """The texts, each checked when it is read; `first` is the place of the first."""
    for place, text in enumerate(texts, first):
        check_text(f"{name}[{place}]", text)
        yield text


def _prepare(
    model: "EncoderDecoderModel",
    config: GenerationConfig | None,
    options: dict[str, Any],
    logits_processor: Sequence[Callable],
    output_attentions: bool,
    batch_size: int,
    jit_compile: bool,
) -> _Run:
    config = settings_of_call(model, config, options)
    check_config(config, model)
    check_integer("batch_size", batch_size)
    # One function for all seeds.
    settings = config.replace(seed=None)
    processors = check_processors(logits_processor)
    function = model.kept_functions.get(
        (settings, bool(jit_compile), processors, bool(output_attentions)),
        lambda: generation_function(
            model,
            settings,
            jit_compile,
            logits_processor=processors,
            output_attentions=output_attentions,
        ),
    )
    return _Run(model, config, function, batch_size)


def _check_prompts(run: _Run, decoder_text: str | Sequence[str] | None) -> None:
    """Raises if a prompt is too long, before the first text is generated."""
    if decoder_text is None or run.model.preprocessor is None:
        return
    prompts = [decoder_text] if isinstance(decoder_text, str | bytes) else decoder_text
    for start in range(0, len(prompts), WINDOW):
        target = run.model.preprocessor.prompt_preprocess(strings(prompts[start : start + WINDOW]))
        check_config(run.config, run.model, target["decoder_input_ids"].shape[1])


def _windows(
    run: _Run,
    texts: Iterable[str | bytes],
    decoder_text: str | Iterable[str] | None,
    window: int,
    first_example: int,
    advance: Callable[[int], None],
) -> Iterator[GenerateOutput]:
    """The outputs of one window of texts after another, each of at least one text."""
    if run.model.preprocessor is None:
        raise ValueError(
            "Generating from text needs a tokenizer, and this model has none. Pass tokenizer= "
            "to EncoderDecoderModel, or dict(input_ids, attention_mask) to generate."
        )
    pairs = with_prompts(texts, decoder_text)
    while pairs_of_window := list(itertools.islice(pairs, window)):
        sources, prompts = zip(*pairs_of_window, strict=True)
        prompts = None if decoder_text is None else prompts
        yield _generate_texts(run, sources, prompts, first_example, advance)
        first_example += len(sources)


def _generate_texts(
    run: _Run,
    texts: Sequence[str | bytes],
    prompts: Sequence[str] | None,
    first_example: int,
    advance: Callable[[int], None],
) -> GenerateOutput:
    """One window."""
    preprocessor = run.model.preprocessor
    source = preprocessor.generate_preprocess(strings(texts))
    if prompts is None:
        decoder_ids = np.asarray(start_prompt(run.model, len(texts)))
        lengths = np.ones([len(texts)], np.int32)
    else:
        target = preprocessor.prompt_preprocess(strings(prompts))
        decoder_ids = target["decoder_input_ids"].numpy()
        lengths = target["decoder_attention_mask"].numpy().sum(axis=1)
    rows = Rows(source["input_ids"].numpy(), source["attention_mask"].numpy(), decoder_ids, lengths)
    output = _generate_rows(run, rows, first_example, advance)
    decoded = hypotheses_to_text(preprocessor, tf.constant(output.sequences)).numpy()
    hypotheses = [[text.decode() for text in row] for row in decoded]
    if run.config.num_return_sequences == 1:
        return output._replace(texts=[row[0] for row in hypotheses])
    return output._replace(texts=hypotheses)


def _generate_rows(
    run: _Run, rows: Rows, first_example: int, advance: Callable[[int], None]
) -> GenerateOutput:
    """Generates the rows in batches of one bucket and one length of prompts."""
    count, source_length = rows.input_ids.shape
    if count:
        check_config(run.config, run.model, int(rows.prompt_lengths.max()))
    seeds = make_seeds(run.config, first_example, count)
    # Up to the last token, even if there are gaps before it.
    lengths = np.where(rows.attention_mask, np.arange(1, source_length + 1), 0).max(axis=1)
    buckets = np.searchsorted(source_buckets(run.model), lengths)
    parts, banned = [], 0
    for batch in _batches(lengths, buckets, rows.prompt_lengths, run.batch_size):
        check_size(run.config, run.model, len(batch))
        width = max(1, lengths[batch].max(initial=1))
        prompt = rows.prompt_lengths[batch].max(initial=1)
        tensors = run.function(
            tf.constant(rows.input_ids[batch, :width]),
            tf.constant(rows.attention_mask[batch, :width]),
            tf.constant(rows.decoder_input_ids[batch, :prompt]),
            tf.constant(seeds[batch]),
        )
        attentions = tensors.cross_attentions
        output = GenerateOutput(
            tensors.sequences.numpy(),
            tensors.scores.numpy(),
            tensors.token_scores.numpy(),
            None if attentions is None else attentions.numpy(),
        )
        if np.isnan(output.scores).any():
            raise GenerationError(
                "The model gives scores that are no numbers: check its weights for NaN and "
                "infinity, or the logits_processor."
            )
        # A beam search that finds nothing gives the whole hypothesis such a score.
        lowest = np.minimum(output.token_scores[:, 0].min(axis=1), output.scores[:, 0])
        banned += (lowest <= BANNED / 2).sum()
        parts.append((batch, output))
        advance(len(batch))
    if banned:
        warnings.warn(
            f"{banned} of {count} outputs hold a token that the settings ban, because at that "
            "place they ban all tokens.",
            stacklevel=2,
        )
    return _join(parts, count, run.model.decoder.config.pad_token_id, source_length)


def _batches(
    lengths: np.ndarray, buckets: np.ndarray, prompt_lengths: np.ndarray, batch_size: int
) -> list[np.ndarray]:
    """The row numbers of each batch: of one bucket and prompt length, the longest first.

    Args:
        lengths, buckets, prompt_lengths: of the rows, integers [N].
        batch_size: the most rows of a batch.
    """
    if not len(lengths):
        return [np.zeros([0], np.int64)]  # which gives the shapes of the results
    order = np.lexsort((-lengths, prompt_lengths))
    kinds = np.stack([prompt_lengths[order], buckets[order]])
    starts = np.flatnonzero(np.diff(kinds).any(axis=0)) + 1
    return [
        rows[start : start + batch_size]
        for rows in np.split(order, starts)
        for start in range(0, len(rows), batch_size)
    ]


def _join(
    parts: list[tuple[np.ndarray, GenerateOutput]], count: int, pad_token_id: int, source_length=0
) -> GenerateOutput:
    """Outputs of rows with their numbers -> one of all `count` rows in order, padded equally."""

    def join(name: str, fill: int = 0, least: int = 0) -> np.ndarray | None:
        arrays = [(rows, getattr(output, name)) for rows, output in parts]
        if arrays[0][1] is None:
            return None
        shape = np.max([array.shape[1:] for _, array in arrays], axis=0, initial=0).tolist()
        if least:
            shape[-1] = max(shape[-1], least)
        joined = np.full([count, *shape], fill, arrays[0][1].dtype)
        for rows, array in arrays:
            joined[(rows, *map(slice, array.shape[1:]))] = array
        return joined

    return GenerateOutput(
        join("sequences", pad_token_id),
        join("scores"),
        join("token_scores"),
        join("cross_attentions", least=source_length),
    )
