"""`generate` for inputs of any size: batches of one bucket, results in the order of the inputs.

What is alike in length is generated together, whatever its place: texts are read a window at a
time, sorted by length, cut into batches that no bucket pads much, and put back in their order. An
example's result does not depend on its batch, nor what is drawn for it: noise follows its number.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from bertgen_tf.checks import check_integer
from bertgen_tf.config import GenerationConfig
from bertgen_tf.data.progress import show_progress
from bertgen_tf.generation.compiled import generation_function, hypotheses_to_text, source_buckets
from bertgen_tf.generation.inputs import (
    Rows,
    check_decoder_text,
    check_processors,
    id_rows,
    make_seeds,
    read_texts,
    start_prompt,
    strings,
    with_prompts,
)
from bertgen_tf.generation.settings import check_config

BATCH_SIZE = 32
# Texts that are read, sorted and generated before the first result of them comes.
WINDOW = 1024
# Settings whose compiled functions a model keeps.
MAX_FUNCTIONS = 16


class GenerateOutput(NamedTuple):
    """What `generate` gives for ids, or where scores or attentions are asked for.

    N examples, n = num_return_sequences hypotheses of each, best first. Rows of fewer tokens than
    others are padded at their ends: sequences with the padding token, the others with 0.

    Attributes:
        sequences: int32 [N, n, L]: start token, prompt, generated tokens, end token if it was
            reached, padding. L is the longest prompt, the start token included, and max_new_tokens;
            or max_length.
        scores: float32 [N, n]: the log-probability of the sequence, divided by the length penalty
            of the settings.
        token_scores: float32 [N, n, L - 1] with `output_scores`, else None: the log-probability of
            `sequences[..., i + 1]` where it was generated, 0 on prompt and padding.
        cross_attentions: float32 [N, n, layers, heads, L - 1, S] with `output_attentions`, else
            None: what the decoder looked at in the source, S the longest, when it chose
            `sequences[..., i + 1]`.
        texts: for text, what `generate` gives without further outputs, else None.
    """

    sequences: np.ndarray
    scores: np.ndarray
    token_scores: np.ndarray | None = None
    cross_attentions: np.ndarray | None = None
    texts: Any = None


class _Run(NamedTuple):
    """What stays the same for all batches of a call."""

    model: Any
    config: GenerationConfig
    function: Callable
    batch_size: int


class Generator:
    """The generation functions of one model, built when first needed and kept."""

    def __init__(self, model: Any):
        self.model = model
        self.functions: dict[tuple[Hashable, ...], Callable] = {}

    def generate(
        self,
        inputs: Any,
        config: GenerationConfig | None = None,
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
        """See `EncoderDecoderModel.generate`."""
        run = self._run(
            config, options, logits_processor, output_attentions, batch_size, jit_compile
        )
        if isinstance(inputs, dict):
            if decoder_text is not None:
                raise ValueError(
                    "decoder_text is for text, received it with a dict of ids. Pass "
                    "decoder_input_ids in the dict."
                )
            rows = id_rows(inputs, self.model)
            with show_progress(verbose, len(rows.input_ids), batch_size) as advance:
                output = _generate_rows(run, rows, 0, advance)
            return output if output_scores else output._replace(token_scores=None)

        texts, total = read_texts(inputs)
        check_decoder_text(decoder_text, total)
        _check_prompts(run, decoder_text)
        with show_progress(verbose, total, batch_size) as advance:
            windows = _windows(run, texts, decoder_text, WINDOW, 0, advance)
            if not output_scores and not output_attentions:
                results = [text for output in windows for text in output.texts]
                return results[0] if isinstance(inputs, str) else results
            outputs = list(windows) or [_generate_texts(run, [], None, 0, advance)]
        results = [text for output in outputs for text in output.texts]
        ends = np.cumsum([len(output.texts) for output in outputs])
        parts = [
            (np.arange(end - len(output.texts), end), output)
            for end, output in zip(ends, outputs, strict=True)
        ]
        output = _join(parts, len(results), self.model.decoder.config.pad_token_id)
        return output._replace(
            token_scores=output.token_scores if output_scores else None,
            texts=results[0] if isinstance(inputs, str) else results,
        )

    def iterate(
        self,
        texts: Iterable[str | bytes],
        config: GenerationConfig | None = None,
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
        """See `EncoderDecoderModel.iterate`."""
        if isinstance(texts, str | bytes):
            raise TypeError(
                "texts must be an iterable of strings, received a single one: put it in a list."
            )
        run = self._run(config, options, logits_processor, False, batch_size, jit_compile)
        check_integer("window", window)
        with show_progress(verbose, total, batch_size, first_example) as advance:
            for output in _windows(run, texts, decoder_text, window, first_example, advance):
                yield from output.texts

    def function(
        self,
        config: GenerationConfig,
        jit_compile: bool = True,
        *,
        logits_processor: Sequence[Callable] = (),
        output_attentions: bool = False,
    ) -> Callable:
        """What `generation.compiled.generation_function` gives, traced once for all seeds."""
        config = config.replace(seed=None)
        key = (config, bool(jit_compile), tuple(logits_processor), bool(output_attentions))
        # The one used last stands last; the first one goes.
        function = self.functions.pop(key, None)
        if function is None:
            if len(self.functions) >= MAX_FUNCTIONS:
                self.functions.pop(next(iter(self.functions)))
            function = generation_function(
                self.model,
                config,
                jit_compile,
                logits_processor=logits_processor,
                output_attentions=output_attentions,
            )
        self.functions[key] = function
        return function

    def _run(
        self,
        config: GenerationConfig | None,
        options: dict[str, Any],
        logits_processor: Sequence[Callable],
        output_attentions: bool,
        batch_size: int,
        jit_compile: bool,
    ) -> _Run:
        config = config or self.model.generation_config
        config = config.replace(**options) if options else config
        check_config(config, self.model)
        check_integer("batch_size", batch_size)
        logits_processor = check_processors(logits_processor)
        function = self.function(
            config,
            jit_compile,
            logits_processor=logits_processor,
            output_attentions=output_attentions,
        )
        return _Run(self.model, config, function, batch_size)


def _check_prompts(run: _Run, decoder_text: str | Sequence[str] | None) -> None:
    """Raises if a prompt is too long, before the first text is generated."""
    if decoder_text is None or run.model.preprocessor is None:
        return
    prompts = [decoder_text] if isinstance(decoder_text, str) else decoder_text
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
    """The outputs of a window of texts after the other, of at least one text each."""
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
    # Up to the last token, also where there are gaps before it.
    lengths = np.where(rows.attention_mask, np.arange(1, source_length + 1), 0).max(axis=1)
    buckets = np.searchsorted(source_buckets(run.model), lengths)
    parts = []
    for batch in _batches(lengths, buckets, rows.prompt_lengths, run.batch_size):
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
        parts.append((batch, output))
        advance(len(batch))
    return _join(parts, count, run.model.decoder.config.pad_token_id, source_length)


def _batches(
    lengths: np.ndarray, buckets: np.ndarray, prompt_lengths: np.ndarray, batch_size: int
) -> list[np.ndarray]:
    """The numbers of the rows of each batch: alike in bucket and prompt, the longest first.

    Args:
        lengths, buckets, prompt_lengths: of the rows, integers [N].
        batch_size: the most rows of a batch.
    """
    if not len(lengths):
        return [np.zeros([0], np.int64)]  # which tells the shapes of the results
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
    """Outputs of rows with their numbers -> one of all `count` rows in order, padded alike."""

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
