"""SavedModels that TensorFlow Serving runs: text in, text out.

**Wire contract.** B batch, n hypotheses (best first), S source tokens, T generated tokens:

| signature | inputs | outputs |
| --- | --- | --- |
| `serving_default` | `text` string [B] | `text` string [B], `score` float32 [B] |
| `beams` | `text` string [B] | `text` string [B, n], `score` float32 [B, n] |
| `ids` | `input_ids`, `attention_mask` int32 [B, S] | `sequences` int32 [B, n, 1 + T], `score` |
| `score` | `source`, `target` string [B] | `log_probability` float32, `num_tokens` int32 [B] |
| `attention` | `text` string [B] | `text`, `score`, `source_tokens` string [B, S], |
| | | `target_tokens` string [B, T], `attention` float32 [B, T, S] |
| `tokens` | `text` string [B] | `num_tokens` int32 [B] |
| `generate_xla` | as `serving_default` | the same, compiled by XLA |
| `beams_xla` | as `beams` | the same, compiled by XLA |
| NAME, NAME`_xla` | `text` string [B] | from `signatures=`: as `serving_default`, or as `beams` |
| | | where its `num_return_sequences` is above 1 |

- `text` is valid UTF-8; a `score` is the log-probability of a hypothesis divided by the length
  penalty. n is `num_beams` in beam search and `num_return_sequences` otherwise.
- `ids` is for clients that tokenize: `attention_mask` is 1 on tokens and 0 on padding, `sequences`
  are those of `generate`, start token first.
- `log_probability` is that of all tokens of `target` given `source`, the end token included;
  `num_tokens` is their number. Both texts are cut to the model's lengths.
- `attention` is the cross-attention, averaged over layers and heads; 0 on padding, where the tokens
  are empty strings.
- `tokens` counts what a text has before it is cut to `max_source_length`, special tokens included.

All but those whose names end in `_xla` are plain graphs without any `Xla*` op, which a stock server
runs. The others need a server with XLA switched on (`--xla_cpu_compilation_enabled` or
`--xla_gpu_compilation_enabled`), or Python; elsewhere they answer "XLA compilation disabled".

Every string is answered: empty, too long (cut to the model's `max_source_length`), not UTF-8. A
scalar counts as a batch of one, and an empty batch has an empty answer; a server that batches
requests itself takes neither. The generation settings are baked in. With `do_sample` and no seed
every call samples anew; with a seed the answer to a text depends on its place in the batch, as in
`generate`, and a server's own batching changes that place. Loading needs the ops of
tensorflow-text, which TensorFlow Serving has and `import tensorflow_text` brings to Python.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from bertgen_tf.config import GenerationConfig
from bertgen_tf.data.folders import check_version_path, temporary_folder
from bertgen_tf.export import files
from bertgen_tf.export.check import ExportError, check_export
from bertgen_tf.export.signatures import COMPILED, OWN_NAMES, ServingModule, every_hypothesis
from bertgen_tf.generation.search.logits import Processor
from bertgen_tf.generation.settings import check_config, settings_of_call
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.training import lora

__all__ = ["ExportError", "export_saved_model"]


def export_saved_model(
    model: EncoderDecoderModel,
    path: str | os.PathLike,
    generation_config: GenerationConfig | None = None,
    *,
    signatures: Mapping[str, GenerationConfig] | None = None,
    logits_processor: Sequence[Processor] = (),
    max_batch_size: int = 32,
    warmup_xla: bool = False,
    description: str = "",
    examples: Sequence[str] = (),
    check: bool = True,
    verbose: int = 0,
    **options: Any,
) -> str:
    """Writes `model` as a SavedModel, which appears at `path` only when it is complete.

    Beside the graph lie `assets.extra/tf_serving_warmup_requests`, a request for each bucket of
    lengths that the server runs before it serves; `batching_params.pbtxt`, for servers that batch;
    `metadata.json`, which describes the export, with checksums; and the settings and vocabularies
    of the model, with which `EncoderDecoderModel.from_export` reads the export back.

    Args:
        model: a model with a tokenizer.
        path: `NAME/VERSION`, where VERSION is an integer and does not exist yet; TensorFlow Serving
            serves the highest version in the folder NAME.
        generation_config: settings of all signatures except `signatures`; by default the model's.
        signatures: further signatures by name, each with its own settings.
        logits_processor: run after the processors of the settings, see
            `bertgen_tf.generation.search.logits`; they become part of the graph.
        max_batch_size: the most texts that a server puts into one batch, a power of two.
        warmup_xla: also write warm-up requests that compile `generate_xla` for every batch size and
            length. Only for servers with XLA switched on: no other would load the export.
        description: what the model does, in a sentence, for metadata.json: the page of `bertgen-tf
            serve` shows it.
        examples: texts that show what it does, for the same page, which offers them.
        check: run the export in a separate process, and compare it with `model.generate`.
        verbose: 1 prints each step when it begins.
        **options: fields of `GenerationConfig` that replace those of the settings.

    Returns:
        the path.

    Raises:
        ExportError: the export did not answer as the model does; it was not kept.
        FileExistsError: the version exists already.
        OSError: the disk is full, or cannot be written.
        ValueError: the model has no tokenizer, the version is not an integer, the settings do not
            fit the model, a signature has a name that is not allowed, or description or examples
            are not text.
    """
    if model.tokenizer is None:
        raise ValueError(
            "model must have a tokenizer to be exported: the signatures take text. Pass tokenizer= "
            "to EncoderDecoderModel."
        )
    check_version_path(path)
    lora.check_merged(model, "an export")
    path = pathlib.Path(path)
    config = settings_of_call(model, generation_config, options)
    signatures = dict(signatures or {})
    _check_names(signatures)
    _check_description(description, examples)
    for settings in (config, every_hypothesis(config), *signatures.values()):
        check_config(settings, model)
    sizes = files.batch_sizes(max_batch_size)
    name = path.resolve().parent.name

    def show(step: str) -> None:
        if verbose:
            print(step, flush=True)

    # A server that polls the folder skips names that are not integers.
    with temporary_folder(path, names="[0-9]+") as temporary:
        show("tracing the signatures")
        module = ServingModule(model, config, signatures, logits_processor)
        # Traced here: what `save` traces itself would be traced again for the description.
        traced = {
            signature: function.get_concrete_function()
            for signature, function in module.functions.items()
        }
        show("writing graphs and weights")
        tf.saved_model.save(module, str(temporary), signatures=traced)
        files.write_batching_parameters(temporary, sizes)
        files.write_warmup(temporary, name, model, module.functions, sizes, compiled=warmup_xla)
        files.write_settings(temporary, model, config)
        further = {
            "description": description,
            "examples": list(examples),
            "logits_processor": [_name(processor) for processor in logits_processor],
        }
        files.write_metadata(
            temporary, name, int(path.name), model, module, signatures, sizes, further
        )
        if check:
            show("checking in a separate process that it answers as the model does")
            check_export(temporary, model, module, logits_processor)
        os.chmod(temporary, 0o755)
        temporary.rename(path)
    return str(path)


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _check_description(description: str, examples: Sequence[str]) -> None:
    if not isinstance(description, str):
        raise ValueError(f"description must be a str, received {type(description).__name__}.")
    if isinstance(examples, str) or not all(isinstance(text, str) for text in examples):
        kind = "a str" if isinstance(examples, str) else "other values"
        raise ValueError(f"examples must be a list of str, received {kind}.")


def _check_names(signatures: Mapping[str, GenerationConfig]) -> None:
    for name, settings in signatures.items():
        if (
            not isinstance(name, str)
            or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name)
            or name in OWN_NAMES
            or name.endswith(COMPILED)
        ):
            raise ValueError(
                "signatures must have names of letters, digits and _, other than those of every "
                f"export ({', '.join(OWN_NAMES)}) and not ending in {COMPILED}, received {name!r}."
            )
        if not isinstance(settings, GenerationConfig):
            raise TypeError(
                f"signatures must map names to GenerationConfig, received {settings!r} for {name}."
            )
