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

import base64
import os
from typing import Any

import keras

from bertgen_tf.tokenizers.interface import Ids, read_file
from bertgen_tf.tokenizers.sentencepiece import BertGenerationTokenizer
from bertgen_tf.tokenizers.word_piece import BertTokenizer, load_pieces

__all__ = ["BertGenerationTokenizer", "BertTokenizer", "Ids"]

_CLASSES = {cls.__name__: cls for cls in (BertTokenizer, BertGenerationTokenizer)}


def serialize(tokenizer: BertTokenizer | BertGenerationTokenizer) -> dict[str, Any]:
    """What `deserialize` makes the same tokenizer from, in Keras's form."""
    return {
        "class_name": type(tokenizer).__name__,
        "config": tokenizer.get_config(),
        "module": "bertgen_tf",
        # With it Keras finds the class: `load_model` of a preset says what reads presets.
        "registered_name": keras.saving.get_registered_name(type(tokenizer)),
    }


def deserialize(config: dict[str, Any]) -> BertTokenizer | BertGenerationTokenizer:
    """The tokenizer that `serialize` described; older versions wrote class_name and config only."""
    return _CLASSES[config["class_name"]].from_config(config["config"])


def read_vocabulary(class_name: str, path: str | os.PathLike) -> list[str] | str:
    """What the config of a tokenizer holds as its vocabulary, from the file of `save_vocabulary`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no vocabulary.
    """
    if class_name == BertTokenizer.__name__:
        return load_pieces(path)[0]
    return base64.b64encode(read_file(path, "proto")).decode("ascii")
