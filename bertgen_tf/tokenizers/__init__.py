"""Tokenizers that run inside the TensorFlow graph, over tensorflow-text.

Two classes with one interface: `BertGenerationTokenizer` (SentencePiece, as in the BertGeneration
checkpoints) and `BertTokenizer` (WordPiece, as in the BERT modules of TF Hub, or as in Hugging
Face: `normalization`). Both turn strings into ids and ids into strings with graph ops only, are
tracked by `tf.saved_model.save`, and embed their vocabulary in the export, which needs no other
file.

Any bytes are accepted as text: invalid UTF-8 is replaced by U+FFFD. Special tokens are never added
by `__call__`. A special token that is spelled out in a text is ordinary text or special, as
`split_special_tokens` says; the readers of checkpoints set it: ordinary for TF Hub, special for
Hugging Face unless the checkpoint says otherwise.

For Python values both have the calls of Hugging Face's classes of the same names, except where a
docstring says otherwise; `bertgen_tf.tokenizers.interface` lists the calls.
"""

from typing import Any

from bertgen_tf.tokenizers.interface import Ids
from bertgen_tf.tokenizers.sentencepiece import BertGenerationTokenizer
from bertgen_tf.tokenizers.word_piece import BertTokenizer

__all__ = ["BertGenerationTokenizer", "BertTokenizer", "Ids"]

_CLASSES = {cls.__name__: cls for cls in (BertTokenizer, BertGenerationTokenizer)}


def serialize(tokenizer: BertTokenizer | BertGenerationTokenizer) -> dict[str, Any]:
    """`{"class_name", "config"}`, from which `deserialize` makes the same tokenizer."""
    return {"class_name": type(tokenizer).__name__, "config": tokenizer.get_config()}


def deserialize(config: dict[str, Any]) -> BertTokenizer | BertGenerationTokenizer:
    """The tokenizer that `serialize` described."""
    return _CLASSES[config["class_name"]].from_config(config["config"])
