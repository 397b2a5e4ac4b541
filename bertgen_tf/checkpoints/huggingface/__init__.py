"""Hugging Face checkpoints: encoder-decoders in and out; BERT, RoBERTa, GPT-2 as warm starts."""

from bertgen_tf.checkpoints.huggingface.loading import (
    kind_of,
    load_decoder,
    load_encoder,
    load_encoder_decoder,
    load_encoder_with_tokenizer,
    load_gpt2,
    read_config,
)
from bertgen_tf.checkpoints.huggingface.saving import is_ours, save

__all__ = [
    "is_ours",
    "kind_of",
    "load_decoder",
    "load_encoder",
    "load_encoder_decoder",
    "load_encoder_with_tokenizer",
    "load_gpt2",
    "read_config",
    "save",
]
