"""SavedModels that TensorFlow Serving runs: text in, text out.

**Wire contract.** Both signatures take `text`, string [batch] (a scalar counts as a batch of one),
and give

- `text`: string [batch], valid UTF-8, the best hypothesis;
- `score`: float32 [batch], its log-probability divided by the length penalty.

`serving_default` is a plain graph without any `Xla*` op, which a stock server runs;
`generate_xla` is the same search compiled by XLA, for servers with XLA switched on
(`--xla_cpu_compilation_enabled` or `--xla_gpu_compilation_enabled`) and for Python.

Every string is answered: empty, too long (cut at the model's `max_source_length`), not UTF-8. The
settings of generation are baked in. With `do_sample` and no seed every call draws anew; with a seed
a text is answered by its place in the batch, as `generate` answers a list. Loading needs the ops of
tensorflow-text, which TensorFlow Serving has and `import tensorflow_text` brings to Python.
"""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from bertgen_tf.config import GenerationConfig
from bertgen_tf.encoder_decoder import EncoderDecoderModel
from bertgen_tf.generation import generation_function, hypotheses_to_text, start_prompt
from bertgen_tf.generation_settings import check_config
from bertgen_tf.logits import Processor


def export_saved_model(
    model: EncoderDecoderModel,
    path: str | os.PathLike,
    generation_config: GenerationConfig | None = None,
    *,
    logits_processor: Sequence[Processor] = (),
    **options: Any,
) -> str:
    """Writes `model` as a SavedModel, which appears at `path` only when it is complete.

    Args:
        model: a model with a tokenizer.
        path: `NAME/VERSION`, where VERSION is an integer and does not exist yet; TensorFlow Serving
            serves the highest version in the folder NAME.
        generation_config: settings of both signatures; by default the model's own.
        logits_processor: run after the processors of the settings, see `bertgen_tf.logits`; they
            become part of the graph.
        **options: fields of `GenerationConfig` that replace those of the settings.

    Returns:
        the path.

    Raises:
        FileExistsError: the version exists already.
        ValueError: the model has no tokenizer, the version is no integer, or the settings do not
            fit the model.
    """
    if model.tokenizer is None:
        raise ValueError(
            "model must have a tokenizer to be exported: the signatures take text. Pass tokenizer= "
            "to EncoderDecoderModel."
        )
    check_version_path(path)
    path = pathlib.Path(path)
    config = generation_config or model.generation_config
    config = config.replace(**options) if options else config
    check_config(config, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A server that polls the folder skips names that are no integers.
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        module = _ServingModule(model, config, logits_processor)
        tf.saved_model.save(module, str(temporary), signatures=module.signatures())
        os.chmod(temporary, 0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return str(path)


def check_version_path(path: str | os.PathLike) -> None:
    """Raises unless `path` is a new version, `NAME/VERSION`.

    Raises:
        FileExistsError: the version exists already.
        ValueError: the version is no integer.
    """
    path = pathlib.Path(path)
    if not path.name.isdecimal():
        raise ValueError(
            "path must end in an integer version, because TensorFlow Serving looks for nothing "
            f'else, received {str(path)!r}. Use "{path}/1".'
        )
    if path.exists():
        raise FileExistsError(f"path must be a new version, but {path} exists. Use another number.")


class _ServingModule(tf.Module):
    """Holds what the signatures read: weights, vocabulary, functions."""

    def __init__(
        self,
        model: EncoderDecoderModel,
        config: GenerationConfig,
        logits_processor: Sequence[Processor],
    ):
        super().__init__(name="bertgen_tf")
        self.weights = [weight.value for weight in model.weights]
        self.tokenizer = model.tokenizer
        self.serve = _serving_function(model, config, logits_processor, jit_compile=False)
        self.serve_xla = _serving_function(model, config, logits_processor, jit_compile=True)

    def signatures(self) -> dict[str, Any]:
        return {"serving_default": self.serve, "generate_xla": self.serve_xla}


def _serving_function(
    model: EncoderDecoderModel,
    config: GenerationConfig,
    logits_processor: Sequence[Processor],
    *,
    jit_compile: bool,
) -> Any:
    preprocessor = model.preprocessor
    generate = generation_function(model, config, jit_compile, logits_processor=logits_processor)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def serve(text: tf.Tensor) -> dict[str, tf.Tensor]:
        # The server does not check shapes: a scalar may come.
        inputs = preprocessor.generate_preprocess(tf.reshape(text, [-1]))
        batch = tf.shape(inputs["input_ids"])[0]
        output = generate(
            inputs["input_ids"],
            inputs["attention_mask"],
            start_prompt(model, batch),
            _seeds(config, batch),
        )
        return {
            "text": hypotheses_to_text(preprocessor, output.sequences)[:, 0],
            "score": output.scores[:, 0],
        }

    return serve


def _seeds(config: GenerationConfig, batch: tf.Tensor) -> tf.Tensor:
    """What `generation.make_seeds` makes, in the graph."""
    if not config.do_sample:
        return tf.zeros([batch, 2], tf.int32)
    seed = config.seed
    if seed is None:
        # Not tf.random.uniform, which writes the seed of `tf.random.set_seed` into the export.
        seed = tf.raw_ops.RandomUniformInt(
            shape=tf.constant([], tf.int32), minval=0, maxval=2**31 - 1, seed=0, seed2=0
        )
    return tf.stack([tf.fill([batch], seed), tf.range(batch)], axis=1)
