"""Exports in Apache Beam pipelines: a model handler for Beam's RunInference.

    import apache_beam as beam
    from apache_beam.io import ReadFromText, WriteToText
    from apache_beam.ml.inference.base import RunInference
    from bertgen_tf.serving.beam import SavedModelHandler

    with beam.Pipeline() as pipeline:
        (
            pipeline
            | ReadFromText("sources.txt")
            | RunInference(SavedModelHandler("saved_models/my_model/1"))
            | beam.Map(lambda result: result.inference["text"])
            | WriteToText("outputs", file_name_suffix=".txt")
        )

A SavedModel is a program, which can read and write files on the workers: run those that you trust.

Beam and this project must be installed where the workers of a pipeline run, in an environment with
protobuf below 7, which Beam needs.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the ops of the tokenizers

from bertgen_tf.checkpoints.exports import verify

try:
    from apache_beam.ml.inference.base import ModelHandler, PredictionResult
except ImportError as error:
    raise ImportError(
        'bertgen_tf.serving.beam needs Apache Beam: pip install "bertgen_tf[beam]", in an '
        "environment of its own, as Beam needs an older protobuf than the rest."
    ) from error


class SavedModel:
    """An export that answers lists of texts.

    Args:
        export: SavedModel folder NAME/VERSION.
        signature: one of the export's, from `text`.

    Raises:
        ValueError: the export is damaged, or has no such signature.
    """

    def __init__(self, export: str, signature: str):
        verify(export)
        signatures = tf.saved_model.load(export).signatures
        fitting = sorted(
            name
            for name in signatures
            if set(signatures[name].structured_input_signature[1]) == {"text"}
        )
        if signature not in fitting:
            raise ValueError(
                f"signature must be one of text, which in {export} are {', '.join(fitting)}; "
                f"received {signature!r}."
            )
        self._answer = signatures[signature]

    def __call__(self, texts: list[str | bytes]) -> list[dict[str, Any]]:
        """The outputs of the signature for each text, by their names."""
        outputs = self._answer(text=tf.constant(texts, tf.string))
        columns = {name: _plain(value.numpy().tolist()) for name, value in outputs.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> Any:
    """Text in place of bytes; an export outputs nothing but UTF-8."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.decode() if isinstance(value, bytes) else value


class SavedModelHandler(ModelHandler[str, PredictionResult, SavedModel]):
    """Runs an export on the texts of a PCollection.

    A result's `inference` is a dict of what the signature gives for the text: `text` (str) and
    `score` (float) for `serving_default`, lists of them for `beams`. Beam chooses the batches;
    results do not depend on them, up to rounding.

    Args:
        export: SavedModel folder NAME/VERSION, which all workers must find.
        signature: one of the export's, from `text`. Those that end in `_xla` are faster once each
            process has compiled them.
        max_batch_size: the most texts in a batch.
        **options: those of Beam's `ModelHandler`, such as `min_batch_size`; `large_model=True`, one
            copy of the export for all processes of a machine; `model_copies`, that many.
    """

    def __init__(
        self,
        export: str | os.PathLike,
        signature: str = "serving_default",
        *,
        max_batch_size: int = 32,
        **options: Any,
    ):
        super().__init__(max_batch_size=max_batch_size, **options)
        self._export = os.fspath(export)
        self._signature = signature

    def load_model(self) -> SavedModel:
        return SavedModel(self._export, self._signature)

    def run_inference(
        self,
        batch: Sequence[str],
        model: SavedModel,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[PredictionResult]:
        """Answers a batch.

        Args:
            batch: the texts.
            model: what `load_model` gives, or its proxy from another process.
            inference_args: must be empty, see `validate_inference_args`.

        Returns:
            a result for each text.
        """
        answers = model(list(batch))
        return [
            PredictionResult(text, answer, self._export)
            for text, answer in zip(batch, answers, strict=True)
        ]

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Refuses any.

        Raises:
            ValueError: there are some.
        """
        if inference_args:
            raise ValueError(
                "inference_args must be empty, because the settings of an export are baked in, "
                f"received {inference_args!r}. Export with other settings."
            )

    def update_model_path(self, model_path: str | None = None) -> None:
        """Switches to another export, as RunInference asks with `model_metadata_pcoll`."""
        self._export = model_path or self._export

    def get_num_bytes(self, batch: Sequence[str]) -> int:
        return sum(len(tf.compat.as_bytes(text)) for text in batch)

    def get_metrics_namespace(self) -> str:
        return "bertgen_tf"
