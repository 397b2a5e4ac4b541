"""What lies beside an export's graph: warm-up requests, batching parameters, a description."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from bertgen_tf.checkpoints import presets
from bertgen_tf.checkpoints.exports import METADATA_FILE
from bertgen_tf.checkpoints.presets import EXTRA_FOLDER
from bertgen_tf.checks import sha256
from bertgen_tf.config import GenerationConfig
from bertgen_tf.export.signatures import COMPILED, ServingModule
from bertgen_tf.generation.buckets import source_buckets
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel

WARMUP_FILE = f"{EXTRA_FOLDER}/tf_serving_warmup_requests"
BATCHING_FILE = "batching_params.pbtxt"
# How many batches of the largest size one request may fill.
MAX_BATCHES_OF_A_REQUEST = 32
# A server warms up before it serves, one request after the other.
MAX_WARMUP_REQUESTS = 1000

_BATCHING = """\
# Read by a server with --enable_batching and --enable_per_model_batching_parameters.
# Larger requests are split, those above max_batch_size refused.
max_batch_size {{ value: {most} }}
max_execution_batch_size {{ value: {largest} }}
enable_large_batch_splitting {{ value: true }}
batch_timeout_micros {{ value: 5000 }}
max_enqueued_batches {{ value: 100 }}
# Not pad_variable_length_inputs: it pads with the first value of a tensor, which in a mask is 1.
# So requests to "ids" must be padded to one length.
{sizes}
"""


def batch_sizes(largest: int) -> list[int]:
    """The batches that XLA compiles for: powers of two up to `largest`, which must be one.

    Raises:
        ValueError: it is not one.
    """
    if isinstance(largest, bool) or not isinstance(largest, int) or largest.bit_count() != 1:
        raise ValueError(f"max_batch_size must be a power of two, received {largest!r}.")
    return [2**i for i in range(largest.bit_length())]


def source_lengths(model: EncoderDecoderModel) -> list[int]:
    """The source lengths that XLA compiles for, in tokens, up to the longest possible text."""
    buckets, longest = source_buckets(model), model.preprocessor.max_source_length
    return [b for b in buckets if b < longest] + [min(b for b in buckets if b >= longest)]


def write_batching_parameters(folder: pathlib.Path, sizes: list[int]) -> None:
    """Writes `batching_params.pbtxt`."""
    lines = "\n".join(f"allowed_batch_sizes: {size}" for size in sizes)
    most = MAX_BATCHES_OF_A_REQUEST * sizes[-1]
    text = _BATCHING.format(most=most, largest=sizes[-1], sizes=lines)
    (folder / BATCHING_FILE).write_text(text)


def write_warmup(
    folder: pathlib.Path,
    name: str,
    model: EncoderDecoderModel,
    functions: Mapping[str, Any],
    sizes: list[int],
    *,
    compiled: bool,
) -> None:
    """Writes the requests that a server runs before it serves.

    For each bucket of lengths there is a request with a single text to `serving_default`, and there
    is one request to each other plain signature, whose first run takes seconds. With `compiled`,
    there is also one to `generate_xla` for each pair of a batch size and a bucket of lengths: these
    compile what it will need, and keep a server without XLA from loading the export.

    Args:
        folder: the version's.
        name: the model's on the server.
        model: its tokenizer makes the texts.
        functions: those behind the signatures.
        sizes: batch sizes.
        compiled: see above.

    Raises:
        ValueError: there are more requests than a server accepts.
    """
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    texts = [text_of_length(model, length) for length in source_lengths(model)]
    requests = [("serving_default", {"text": [text]}) for text in texts]
    ids = model.preprocessor.generate_preprocess(texts[:1])
    for signature, function in functions.items():
        if signature != "serving_default" and not signature.endswith(COMPILED):
            inputs = {spec.name: ids.get(spec.name, texts[:1]) for spec in function.input_signature}
            requests.append((signature, inputs))
    if compiled:
        requests += [("generate_xla", {"text": [text] * n}) for text in texts for n in sizes]
    if len(requests) > MAX_WARMUP_REQUESTS:
        raise ValueError(
            f"warm-up must have at most {MAX_WARMUP_REQUESTS} requests, received {len(requests)}. "
            "Lower max_batch_size."
        )
    path = folder / WARMUP_FILE
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in requests:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = name
            request.model_spec.signature_name = signature
            for key, value in inputs.items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(np.array(value)))
            log = prediction_log_pb2.PredictionLog(
                predict_log=prediction_log_pb2.PredictLog(request=request)
            )
            writer.write(log.SerializeToString())


def read_warmup(folder: pathlib.Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The requests of `write_warmup`: signatures and their inputs, strings as objects of bytes."""
    from tensorflow_serving.apis import prediction_log_pb2

    path = folder / WARMUP_FILE
    if not path.is_file():
        return
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        inputs = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
        yield request.model_spec.signature_name, inputs


def text_of_length(model: EncoderDecoderModel, length: int) -> str:
    """A text of `length` tokens, special ones included, or as many as the preprocessor keeps."""
    preprocessor = model.preprocessor
    length = min(length, preprocessor.max_source_length)
    best, most = "", 0
    for word in _words(model.tokenizer):
        # As many words as fit beside the special tokens: each word of `_words` is one token, also
        # next to another.
        fitting = max(1, length + 1 - len(preprocessor.encode_source(word)))
        for count in range(fitting, length + 1):
            text = " ".join([word] * count)
            tokens = len(preprocessor.encode_source(text))
            if most < tokens <= length:
                best, most = text, tokens
            if tokens >= length:
                break
        if most == length:
            break
    return best


def _words(tokenizer: Any) -> Iterator[str]:
    """A few texts of one piece each, which the tokenizer does not merge when repeated."""
    found = 0
    for token in range(tokenizer.vocab_size):
        if token in tokenizer.all_special_ids:
            continue
        text = tokenizer.detokenize([token]).numpy().decode().strip()
        if text and len(tokenizer(f"{text} {text}")) == 2 * len(tokenizer(text)) == 2:
            yield text
            found += 1
        if found == 3:
            return


def write_settings(
    folder: pathlib.Path, model: EncoderDecoderModel, config: GenerationConfig
) -> None:
    """Writes what `from_export` needs beside the variables."""
    path = folder / EXTRA_FOLDER
    path.mkdir(exist_ok=True)
    presets.write_settings(model, path, generation_config=config.to_dict())


def write_metadata(
    folder: pathlib.Path,
    name: str,
    version: int,
    model: EncoderDecoderModel,
    module: ServingModule,
    variants: Mapping[str, GenerationConfig],
    sizes: list[int],
    further: Mapping[str, Any],
) -> None:
    """Writes `metadata.json`: what the export is, and the checksums of its other files.

    Args:
        further: fields by name; those that are empty are left out.
    """
    files = describe_files(folder)
    metadata = {
        "name": name,
        "version": version,
        **{name: value for name, value in further.items() if value},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source_checkpoint": model.source_checkpoint,
        "parameters": model.count_params(),
        "weights_bytes": sum(
            files[name]["bytes"] for name in files if name.startswith("variables/")
        ),
        "config": {
            "encoder": model.encoder.config.to_dict(),
            "decoder": model.decoder.config.to_dict(),
            "preprocessor": model.preprocessor.get_config(),
        },
        "generation_config": module.settings["serving_default"].to_dict(),
        "signatures": {
            # The settings of the others are above.
            signature: _describe(function, variants.get(signature.removesuffix(COMPILED)))
            for signature, function in module.functions.items()
        },
        "batch_sizes": sizes,
        "source_lengths": source_lengths(model),
        "versions": {
            **{
                package: importlib.metadata.version(package)
                for package in ("bertgen_tf", "tensorflow", "tensorflow_text", "keras")
            },
            "python": platform.python_version(),
        },
        "files": files,
    }
    with open(folder / METADATA_FILE, "w", encoding="utf-8") as file:
        json.dump(metadata, file, indent=2)
        file.write("\n")


def describe_files(folder: pathlib.Path) -> dict[str, Any]:
    """Size and SHA-256 of each file in a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _describe(function: Any, settings: Any) -> dict[str, Any]:
    def specs(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: {"dtype": spec.dtype.name, "shape": spec.shape.as_list()}
            for name, spec in tensors.items()
        }

    concrete = function.get_concrete_function()
    description = {
        "inputs": specs({spec.name: spec for spec in function.input_signature}),
        "outputs": specs(concrete.structured_outputs),
    }
    if settings is not None:
        description["generation_config"] = settings.to_dict()
    return description
