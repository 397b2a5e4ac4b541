"""TF Hub BERT modules as encoder and decoder.

A module's own graph has no causal mask, no cross-attention and no cache, so its weights move into
our layers; the module then checks them: it runs on a probe batch beside our encoder (`verify`).

Read so far: BERT encoders in TF2 SavedModel format with the variables that Model Garden's
`export_tfhub` writes (`tensorflow/bert_*`, `tensorflow/small_bert/*` and alike).
"""

import collections
import dataclasses
import os
import pathlib
import re
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_hub
import tensorflow_text  # noqa: F401  registers the ops that modules may hold
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from bertgen_tf import warm_start, weights
from bertgen_tf.config import BertGenerationConfig
from bertgen_tf.encoder_decoder import EncoderDecoderModel
from bertgen_tf.models import BertGenerationDecoder, BertGenerationEncoder
from bertgen_tf.tokenizers import BertTokenizer
from bertgen_tf.weights import Rule, first_line

VERIFY_TOLERANCE = 1e-4


def _merge_heads(kernel: np.ndarray) -> np.ndarray:
    """(H, A, D) -> (H, A * D)."""
    return kernel.reshape(kernel.shape[0], -1)


def _merge_heads_in(kernel: np.ndarray) -> np.ndarray:
    """(A, D, H) -> (A * D, H)."""
    return kernel.reshape(-1, kernel.shape[-1])


_LAYER = r"transformer/layer_(\d+)/"
TF2_RULES = (
    Rule("word_embeddings/embeddings", "embeddings/word_embeddings/embeddings"),
    Rule("position_embedding/embeddings", "embeddings/position_embeddings/embeddings"),
    Rule("embeddings/layer_norm/(gamma|beta)", r"embeddings/layer_norm/\1"),
    Rule(
        _LAYER + "self_attention/(query|key|value)/kernel",
        r"layer_\1/self_attention/\2/kernel",
        _merge_heads,
    ),
    Rule(
        _LAYER + "self_attention/(query|key|value)/bias",
        r"layer_\1/self_attention/\2/bias",
        np.ravel,
    ),
    Rule(
        _LAYER + "self_attention/attention_output/kernel",
        r"layer_\1/self_attention/output_dense/kernel",
        _merge_heads_in,
    ),
    Rule(
        _LAYER + "self_attention/attention_output/bias",
        r"layer_\1/self_attention/output_dense/bias",
    ),
    Rule(
        _LAYER + "self_attention_layer_norm/(gamma|beta)",
        r"layer_\1/self_attention/layer_norm/\2",
    ),
    Rule(
        _LAYER + "intermediate/(kernel|bias)",
        r"layer_\1/feed_forward/intermediate/\2",
    ),
    Rule(_LAYER + "output/(kernel|bias)", r"layer_\1/feed_forward/output_dense/\2"),
    Rule(_LAYER + "output_layer_norm/(gamma|beta)", r"layer_\1/feed_forward/layer_norm/\2"),
    # Folded into the positions below; heads that generation has no use for; do_lower_case.
    Rule("type_embeddings/embeddings", None),
    Rule("pooler_transform/(kernel|bias)", None),
    Rule("(bert/)?cls/predictions/.*", None),
    Rule(r"Variable(_\d+)?", None),
)
# What a BERT encoder must have for its sizes to be read.
_REQUIRED = (
    "word_embeddings/embeddings",
    "position_embedding/embeddings",
    "type_embeddings/embeddings",
    "transformer/layer_0/self_attention/query/kernel",
    "transformer/layer_0/intermediate/kernel",
)


@dataclasses.dataclass(frozen=True)
class _Module:
    """A loaded module, and what was read from it."""

    handle: str
    loaded: Any
    tensors: dict[str, Any]
    config: BertGenerationConfig
    tokenizer: BertTokenizer


def load_encoder(
    handle: str, *, num_layers: int | list[int] | None = None, verify: bool = True
) -> BertGenerationEncoder:
    """A `BertGenerationEncoder` with the weights of a TF Hub BERT module.

    Args:
        handle: a folder, or a URL in the TF Hub protocol (`?tf-hub-format=compressed`), which is
            unpacked under `TFHUB_CACHE_DIR`.
        num_layers: keeps the first n layers, or the layers of a list, counted from 0.
        verify: runs the module on a probe batch and raises if the encoder differs from it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: what is there is not a BERT encoder, or cannot be read; the message says what
            was expected and what was found.
    """
    return _load(handle, num_layers, verify)[0]


def load_decoder(
    handle: str,
    *,
    cross_attention: str = "random",
    num_layers: int | list[int] | None = None,
    verify: bool = True,
) -> BertGenerationDecoder:
    """A causal `BertGenerationDecoder` with the weights of a TF Hub BERT module.

    Args:
        handle, num_layers, verify: as for `load_encoder`.
        cross_attention: how the weights that BERT does not have begin: "random" (the paper's rule)
            or "self_attention" (a copy of each layer's self-attention, which learns to copy from
            the source much sooner).
    """
    warm_start.check_cross_attention(cross_attention)
    encoder, _ = _load(handle, num_layers, verify)
    return warm_start.build_decoder(encoder, "none", cross_attention)


def load_encoder_decoder(
    encoder: str,
    decoder: str | None = None,
    *,
    share: bool = False,
    cross_attention: str = "random",
    num_layers: int | list[int] | None = None,
    verify: bool = True,
    **kwargs: Any,
) -> EncoderDecoderModel:
    """A sequence-to-sequence model warm-started from TF Hub BERT modules.

    Args:
        encoder, decoder: handles as for `load_encoder`; without `decoder`, the same module for
            both sides.
        share: True is the paper's BERTSHARE: one set of variables for both sides, besides
            cross-attention. False is BERT2BERT: two stacks, with one word embedding for encoder,
            decoder and softmax where both are of the same module.
        cross_attention, num_layers, verify: as for `load_decoder`.
        **kwargs: passed on to `EncoderDecoderModel`. `add_bos`, `add_eos` and `mask_first` are True
            unless given (the last if there is a mask token): see `Seq2SeqPreprocessor` for why.
    """
    return warm_start.load_encoder_decoder(
        lambda handle: _load(handle, num_layers, verify),
        encoder,
        decoder,
        share=share,
        cross_attention=cross_attention,
        **kwargs,
    )


def _load(
    handle: str, num_layers: int | list[int] | None, verify: bool
) -> tuple[BertGenerationEncoder, BertTokenizer]:
    module = _read_module(handle)
    kept = warm_start.kept_layers(num_layers, module.config.num_hidden_layers)
    # In float32 whatever the dtype policy, to be compared with the module.
    whole = BertGenerationEncoder(module.config, dtype="float32")
    weights.assign(weights.named_variables(whole), module.tensors, TF2_RULES, source=module.handle)
    if verify:
        _verify(module, whole)
    return warm_start.finish_encoder(whole, kept), module.tokenizer


def _read_module(handle: str) -> _Module:
    handle = os.fspath(handle)
    path = _resolve(handle)
    try:
        loaded = tensorflow_hub.load(path)
        variables = [
            (re.sub(r":\d+$", "", variable.name), variable.numpy())
            for variable in getattr(loaded, "variables", ())
        ]
    except Exception as error:  # TensorFlow raises a dozen kinds for files that are cut or mixed up
        raise ValueError(
            f"{_where(handle, path)} should be a TF Hub module with a SavedModel and its "
            f"variables, but loading it failed: {first_line(error)}"
        ) from error
    tensors = dict(variables)
    missing = [name for name in _REQUIRED if name not in tensors]
    if missing or not callable(loaded):
        raise ValueError(
            f"{handle} should be a BERT encoder in TF2 SavedModel format, with the variables of "
            f"Model Garden's BERT, but it has no {', '.join(missing) or '__call__'}. "
            f"Found {len(variables)} variables{': ' if variables else ''}"
            f"{', '.join(name for name, _ in variables[:6])}{', ...' if variables[6:] else ''}. "
            "MobileBERT, ALBERT and preprocessing modules are not BERT encoders."
        )
    names = collections.Counter(name for name, _ in variables if not name.startswith("Variable"))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(
            f"{handle} should name each variable once, but has several of {', '.join(twice[:6])}."
        )
    tokenizer = _read_tokenizer(handle, loaded)
    word, positions, types, query, intermediate = (tensors[name] for name in _REQUIRED)
    hidden_act, layer_norm_eps = _read_graph(handle, path)
    config = BertGenerationConfig(
        vocab_size=word.shape[0],
        hidden_size=word.shape[1],
        num_hidden_layers=1 + max(int(m[1]) for name in tensors if (m := re.match(_LAYER, name))),
        num_attention_heads=query.shape[1],
        intermediate_size=intermediate.shape[1],
        hidden_act=hidden_act,
        max_position_embeddings=positions.shape[0],
        layer_norm_eps=layer_norm_eps,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # A single text has token type 0 everywhere, so its embedding is part of each position's.
    tensors["position_embedding/embeddings"] = positions + types[0]
    return _Module(handle, loaded, tensors, config, tokenizer)


def _resolve(handle: str) -> str:
    """The local folder of a handle, downloaded and unpacked by tensorflow_hub if need be."""
    is_url = "://" in handle
    if not is_url and not os.path.isdir(handle):
        raise FileNotFoundError(
            f"{handle} should be the folder of a TF Hub module or a URL, but there is no such "
            "folder."
        )
    try:
        path = tensorflow_hub.resolve(handle)
    except Exception as error:  # of urllib, tarfile, zlib, tensorflow_hub and TensorFlow's files
        raise ValueError(
            f"{handle} should answer with a .tar.gz of a TF Hub module, but fetching or unpacking "
            f"it failed: {first_line(error)}"
        ) from error
    if not os.path.exists(os.path.join(path, "saved_model.pb")):
        found = ", ".join(sorted(os.listdir(path))[:6]) or "nothing"
        raise ValueError(
            f"{_where(handle, path)} should hold a TF Hub module, with a file saved_model.pb, but "
            f"holds {found}."
        )
    return path


def _where(handle: str, path: str) -> str:
    # What was downloaded once is never fetched again, however broken.
    return handle if path == handle else f"{handle} (kept in {path}: delete it to fetch it again)"


def _read_tokenizer(handle: str, loaded: Any) -> BertTokenizer:
    if not hasattr(loaded, "vocab_file") or not hasattr(loaded, "do_lower_case"):
        raise ValueError(
            f"{handle} should tell its vocabulary (vocab_file) and casing (do_lower_case), "
            "but does not."
        )
    path = loaded.vocab_file.asset_path.numpy().decode()
    try:
        return BertTokenizer(path, lowercase=bool(loaded.do_lower_case.numpy()))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{handle} should hold BERT's vocabulary, but reading it failed: {first_line(error)}"
        ) from error


def _read_graph(handle: str, path: str) -> tuple[str, float]:
    """Activation and epsilon of the layer normalisation, which no variable tells."""
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString(pathlib.Path(path, "saved_model.pb").read_bytes())
    except DecodeError as error:
        raise ValueError(f"{handle} has a saved_model.pb that cannot be read: {error}") from error
    activations = set()
    epsilons = set()
    names = {"Erf": "gelu", "Erfc": "gelu", "Tanh": "gelu_new", "Relu": "relu"}
    for meta_graph in proto.meta_graphs:
        graph = meta_graph.graph_def
        nodes = [(n.name, n) for n in graph.node]
        for function in graph.library.function:
            nodes += [(f"{function.signature.name}/{n.name}", n) for n in function.node_def]
        for name, node in nodes:
            if node.op in names and "layer_" in name and "pooler" not in name:
                activations.add(names[node.op])
            if node.op == "Const" and name.endswith("layer_norm/batchnorm/add/y"):
                epsilons.add(float(tf.make_ndarray(node.attr["value"].tensor)))
    if len(activations) != 1 or len(epsilons) != 1:
        raise ValueError(
            f"{handle} should use one activation (erf or tanh gelu, or relu) and one epsilon of "
            f"layer normalisation in its layers' graph, but has {sorted(activations) or 'none'} "
            f"and {sorted(epsilons) or 'none'}."
        )
    # Shortest decimal that is the same float32: 1e-12, not 9.99999996e-13.
    return activations.pop(), float(str(np.float32(epsilons.pop())))


def _verify(module: _Module, encoder: BertGenerationEncoder) -> None:
    length = min(17, module.config.max_position_embeddings)
    ids = np.random.default_rng(0).integers(
        0, module.config.vocab_size, (2, length), dtype=np.int32
    )
    mask = np.ones_like(ids)
    mask[1, length // 2 :] = 0
    inputs = {
        "input_word_ids": tf.constant(ids),
        "input_mask": tf.constant(mask),
        "input_type_ids": tf.zeros_like(ids),
    }
    tensor_float_32 = tf.config.experimental.tensor_float_32_execution_enabled()
    # On GPUs it is less exact than what is compared here.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        ours = encoder(ids, mask).numpy()
        expected = module.loaded(inputs, training=False)["sequence_output"].numpy()
    except Exception as error:  # whatever the module's graph raises
        raise ValueError(
            f"{module.handle} should take {', '.join(inputs)} and give sequence_output, but the "
            f"call failed: {first_line(error)}. verify=False takes up the weights unchecked."
        ) from error
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(tensor_float_32)
    difference = np.inf
    if expected.shape == ours.shape:
        difference = np.abs(ours - expected)[mask == 1].max()
    if not difference <= VERIFY_TOLERANCE:  # NaN is not
        raise ValueError(
            f"{module.handle} should give the same output as our encoder with its weights, within "
            f"{VERIFY_TOLERANCE}, but differs by {difference:.3g}: its graph is not that of a BERT "
            "encoder. verify=False takes up the weights all the same."
        )
