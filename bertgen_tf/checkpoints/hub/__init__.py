"""TF Hub modules: BERT as encoder and decoder, and the originals as whole models."""

from bertgen_tf.checkpoints.hub.known import ORIGINALS, Original, known_original
from bertgen_tf.checkpoints.hub.loading import (
    is_original,
    load,
    load_decoder,
    load_encoder,
    load_encoder_decoder,
    load_encoder_with_tokenizer,
    load_original,
)

__all__ = [
    "ORIGINALS",
    "Original",
    "is_original",
    "known_original",
    "load",
    "load_decoder",
    "load_encoder",
    "load_encoder_decoder",
    "load_encoder_with_tokenizer",
    "load_original",
]
