"""Generation of one text that is returned while it is generated."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from bertgen_tf.checks import check_integer
from bertgen_tf.config import GenerationConfig
from bertgen_tf.data.texts import check_text
from bertgen_tf.generation.compiled import streaming_functions
from bertgen_tf.generation.inputs import check_processors, make_seeds, start_prompt
from bertgen_tf.generation.settings import check_config, settings_of_call
from bertgen_tf.tokenizers.text_stream import TextStream

if TYPE_CHECKING:
    from bertgen_tf.models.encoder_decoder import EncoderDecoderModel


def stream(
    model: "EncoderDecoderModel",
    text: str | bytes,
    generation_config: GenerationConfig | None = None,
    *,
    decoder_text: str | None = None,
    logits_processor: Sequence[Callable] = (),
    tokens_per_step: int = 1,
    jit_compile: bool = True,
    **options: Any,
) -> Iterator[str]:
    """Generates from one text and returns the result in parts, as soon as they are final.

    Joined, the parts are what `model.generate` returns with the same arguments (for samples: with
    the same seed). What could still change is held back, see `TextStream`: mostly a word.

    Args:
        model: an `EncoderDecoderModel` with a tokenizer.
        text: the source.
        generation_config: settings of greedy search or sampling; by default the model's own.
        decoder_text: a prompt, with which the result begins.
        logits_processor: see `EncoderDecoderModel.generate`.
        tokens_per_step: how many tokens are generated at a time; more are faster overall.
        jit_compile: compiles the steps with XLA; False runs them as plain graphs.
        **options: fields of `GenerationConfig` that replace those of the settings.

    Returns:
        An iterator of non-empty strings. A step runs when its part is requested, and the iterator
        may be abandoned at any time.

    Raises:
        TypeError, ValueError: at the call itself, for what `generate` does not accept either, for
            beam search and for more than one sequence.
    """
    if model.preprocessor is None:
        raise ValueError(
            "Streaming needs a tokenizer, and this model has none. Pass tokenizer= to "
            "EncoderDecoderModel, or call generate with dict(input_ids, attention_mask)."
        )
    for name, value, optional in (("text", text, False), ("decoder_text", decoder_text, True)):
        if optional and value is None:
            continue
        if not isinstance(value, str | bytes):
            raise TypeError(
                f"{name} must be one string, received {type(value).__name__}. Stream one text at a "
                "time, or call generate."
            )
        check_text(name, value)
    config = settings_of_call(model, generation_config, options)
    if config.num_return_sequences > 1:
        raise ValueError(
            "num_return_sequences must be 1 for streaming, which gives one text, received "
            f"{config.num_return_sequences}. Call generate for several."
        )
    check_integer("tokens_per_step", tokens_per_step)
    prompt = start_prompt(model, 1)
    if decoder_text is not None:
        prompt = model.preprocessor.prompt_preprocess([decoder_text])["decoder_input_ids"]
    check_config(config, model, int(prompt.shape[1]))
    functions = _functions(
        model, config, jit_compile, check_processors(logits_processor), int(tokens_per_step)
    )
    source = model.preprocessor.generate_preprocess([text])
    # Only the generator's own code waits for a request; all possible errors are raised by now.
    return _parts(TextStream(model.preprocessor), functions, source, prompt, config)


def _parts(
    text: TextStream,
    functions: tuple[Callable, Callable],
    source: dict[str, tf.Tensor],
    prompt: tf.Tensor,
    config: GenerationConfig,
) -> Iterator[str]:
    start, advance = functions

    def add(ids: np.ndarray) -> Iterator[str]:
        part = text.add(ids.tolist())
        if part:
            yield part

    yield from add(prompt[0, 1:].numpy())
    state = start(source["input_ids"], source["attention_mask"], prompt, make_seeds(config, 0, 1))
    length, done = prompt.shape[1], False
    while not done:
        step = advance(state)
        known, length = length, int(step.length)
        yield from add(step.sequences[0, 0, known:length].numpy())
        state, done = step.state, bool(step.done)
    rest = text.finish()
    if rest:
        yield rest


def _functions(
    model: "EncoderDecoderModel",
    config: GenerationConfig,
    jit_compile: bool,
    logits_processor: tuple[Callable, ...],
    tokens_per_step: int,
) -> tuple[Callable, Callable]:
    """`streaming_functions`, kept for all seeds."""
    config = config.replace(seed=None)
    return model.kept_functions.get(
        ("stream", config, bool(jit_compile), logits_processor, tokens_per_step),
        lambda: streaming_functions(
            model,
            config,
            jit_compile,
            logits_processor=logits_processor,
            tokens_per_step=tokens_per_step,
        ),
    )
