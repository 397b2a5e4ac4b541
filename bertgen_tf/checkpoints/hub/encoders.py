"""Reading TF Hub BERT encoders, in TF2 SavedModel format and in TF1 Hub format.

TF2: the variables that Model Garden's `export_tfhub` writes (`tensorflow/bert_*`,
`tensorflow/small_bert/*` and similar). TF1: those of `google-research/bert` (`google/bert_*` and
similar), under any scope, with the signatures `tokens` and `tokenization_info`.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from bertgen_tf.checkpoints.hub import modules
from bertgen_tf.checkpoints.hub.graph import Graph
from bertgen_tf.checkpoints.hub.layers import depth, layer_rules, read_layers, scope_of, shortest
from bertgen_tf.checkpoints.hub.modules import Module
from bertgen_tf.checks import first_line
from bertgen_tf.config import TOKEN_IDS, BertGenerationConfig
from bertgen_tf.network import weights
from bertgen_tf.network.precision import exact
from bertgen_tf.network.stacks import BertGenerationEncoder
from bertgen_tf.network.weights import Rule
from bertgen_tf.tokenizers import BertTokenizer

VERIFY_TOLERANCE = 1e-4


def _merge_heads(kernel: np.ndarray) -> np.ndarray:
    """(H, A, D) -> (A * D, H)."""
    return kernel.reshape(kernel.shape[0], -1).T


def _merge_heads_in(kernel: np.ndarray) -> np.ndarray:
    """(A, D, H) -> (H, A * D)."""
    return kernel.reshape(-1, kernel.shape[-1]).T


_TF2_LAYER = r"transformer/layer_(\d+)/"
TF2_RULES = (
    Rule("word_embeddings/embeddings", "embeddings/word_embeddings/embeddings"),
    Rule("position_embedding/embeddings", "embeddings/position_embeddings/embeddings"),
    Rule("embeddings/layer_norm/(gamma|beta)", r"embeddings/layer_norm/\1"),
    Rule(
        _TF2_LAYER + "self_attention/(query|key|value)/kernel",
        r"layer_\1/self_attention/\2/kernel",
        _merge_heads,
    ),
    Rule(
        _TF2_LAYER + "self_attention/(query|key|value)/bias",
        r"layer_\1/self_attention/\2/bias",
        np.ravel,
    ),
    Rule(
        _TF2_LAYER + "self_attention/attention_output/kernel",
        r"layer_\1/self_attention/output_dense/kernel",
        _merge_heads_in,
    ),
    Rule(
        _TF2_LAYER + "self_attention/attention_output/bias",
        r"layer_\1/self_attention/output_dense/bias",
    ),
    Rule(
        _TF2_LAYER + "self_attention_layer_norm/(gamma|beta)",
        r"layer_\1/self_attention/layer_norm/\2",
    ),
    Rule(
        _TF2_LAYER + "intermediate/(kernel|bias)",
        r"layer_\1/feed_forward/intermediate/\2",
        np.transpose,
    ),
    Rule(
        _TF2_LAYER + "output/(kernel|bias)",
        r"layer_\1/feed_forward/output_dense/\2",
        np.transpose,
    ),
    Rule(_TF2_LAYER + "output_layer_norm/(gamma|beta)", r"layer_\1/feed_forward/layer_norm/\2"),
    # Folded into the positions below; heads that generation has no use for; do_lower_case.
    Rule("type_embeddings/embeddings", None),
    Rule("pooler_transform/(kernel|bias)", None),
    Rule("(bert/)?cls/predictions/.*", None),
    Rule(r"Variable(_\d+)?", None),
)
# What a BERT encoder must have for its sizes to be read.
_TF2_REQUIRED = (
    "word_embeddings/embeddings",
    "position_embedding/embeddings",
    "type_embeddings/embeddings",
    "transformer/layer_0/self_attention/query/kernel",
    "transformer/layer_0/intermediate/kernel",
)


# After the scope is removed, everything begins with bert/ or cls/.
_TF1_LAYER = r"bert/encoder/layer_(\d+)/"
TF1_RULES = (
    Rule("bert/embeddings/word_embeddings", "embeddings/word_embeddings/embeddings"),
    Rule("bert/embeddings/position_embeddings", "embeddings/position_embeddings/embeddings"),
    Rule("bert/embeddings/LayerNorm/(gamma|beta)", r"embeddings/layer_norm/\1"),
    *layer_rules("bert/encoder"),
    # Folded into the positions below; heads that generation has no use for.
    Rule("bert/embeddings/token_type_embeddings", None),
    Rule("bert/pooler/dense/(kernel|bias)", None),
    Rule("cls/(predictions|seq_relationship)/.*", None),
    Rule("(.*/)?global_step", None),
)
_TF1_REQUIRED = (
    "bert/embeddings/word_embeddings",
    "bert/embeddings/position_embeddings",
    "bert/embeddings/token_type_embeddings",
    "bert/encoder/layer_0/attention/self/query/kernel",
    "bert/encoder/layer_0/intermediate/dense/kernel",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """What an encoder is built from.

    Attributes:
        module: where it was read.
        tensors, rules: as `weights.assign` takes them.
        config, tokenizer: of the encoder.
        run: returns the module's `sequence_output` for a dict of its inputs.
        inputs: names of the module's ids, mask and token types.
    """

    module: Module
    tensors: Mapping[str, Any]
    rules: tuple[Rule, ...]
    config: BertGenerationConfig
    tokenizer: BertTokenizer
    run: Callable[[dict[str, Any]], Any]
    inputs: tuple[str, str, str]


def read_encoder(handle: str, verify: bool) -> tuple[BertGenerationEncoder, BertTokenizer]:
    """The encoder of a module, with all of its layers and in float32, and its tokenizer."""
    module = modules.open_module(handle)
    scope = scope_of(module.tensors)
    source = _read_tf2(module) if scope is None else _read_tf1(module, scope)
    encoder = BertGenerationEncoder(source.config, dtype="float32")
    weights.assign(
        weights.named_variables(encoder), source.tensors, source.rules, source=module.handle
    )
    if verify:
        _verify(source, encoder)
    return encoder, source.tokenizer


def _read_tf2(module: Module) -> Source:
    handle, tensors = module.handle, dict(module.tensors)
    missing = [name for name in _TF2_REQUIRED if name not in tensors]
    if missing or not callable(module.loaded):
        lacking = ", ".join(missing) or "__call__"
        raise ValueError(
            f"{handle} should be a BERT encoder in TF2 SavedModel format, with the variables of "
            f"Model Garden's BERT, or in TF1 Hub format, but it has no {lacking}. "
            f"Found {modules.found_variables(module)}. "
            "MobileBERT, ALBERT and preprocessing modules are not BERT encoders."
        )
    modules.check_names(module)
    tokenizer = _read_tf2_tokenizer(handle, module.loaded)
    word, positions, types, query, intermediate = (tensors[name] for name in _TF2_REQUIRED)
    hidden_act, layer_norm_eps = _read_tf2_graph(module)
    config = BertGenerationConfig(
        vocab_size=word.shape[0],
        hidden_size=word.shape[1],
        num_hidden_layers=depth(_TF2_LAYER, tensors),
        num_attention_heads=query.shape[1],
        intermediate_size=intermediate.shape[1],
        hidden_act=hidden_act,
        max_position_embeddings=positions.shape[0],
        layer_norm_eps=layer_norm_eps,
        **_special_ids(tokenizer),
    )
    # A single text has token type 0 everywhere, so its embedding is part of each position's.
    tensors["position_embedding/embeddings"] = positions + types[0]
    return Source(
        module,
        tensors,
        TF2_RULES,
        config,
        tokenizer,
        lambda inputs: module.loaded(inputs, training=False)["sequence_output"],
        ("input_word_ids", "input_mask", "input_type_ids"),
    )


def _read_tf1(module: Module, scope: str) -> Source:
    handle = module.handle
    stored = module.tensors.without(scope)
    missing = [name for name in _TF1_REQUIRED if name not in stored]
    missing += [
        f"signature {name}"
        for name in ("tokens", "tokenization_info")
        if module.signature(name) is None
    ]
    if missing:
        original = any("/encdec/" in name for name in module.names)
        remedy = (
            "It is an encoder-decoder: EncoderDecoderModel.from_hub(handle) reads it."
            if original
            else "ALBERT modules and the like are not BERT encoders."
        )
        raise ValueError(
            f"{handle} should be a BERT encoder in TF1 Hub format, with the variables of "
            f"google-research/bert, but it has no {', '.join(missing)}. "
            f"Found {modules.found_variables(module)}. {remedy}"
        )
    modules.check_names(module)
    graph = module.graph()
    tokenizer = _read_tf1_tokenizer(module, graph)
    word, positions, _, _, intermediate = (stored.shapes[name] for name in _TF1_REQUIRED)
    bert = re.escape(scope) + "bert/"
    config = BertGenerationConfig(
        vocab_size=word[0],
        hidden_size=word[1],
        num_hidden_layers=depth(_TF1_LAYER, stored),
        intermediate_size=intermediate[1],
        max_position_embeddings=positions[0],
        **read_layers(
            graph,
            handle,
            bert + "(embeddings|encoder/.*)/LayerNorm/gamma",
            bert + r"encoder/layer_\d+/",
        ),
        **_special_ids(tokenizer),
    )
    name = "bert/embeddings/position_embeddings"
    folded = {name: stored[name] + stored["bert/embeddings/token_type_embeddings"][0]}
    return Source(
        module,
        collections.ChainMap(folded, stored),
        TF1_RULES,
        config,
        tokenizer,
        lambda inputs: module.loaded.signatures["tokens"](**inputs)["sequence_output"],
        ("input_ids", "input_mask", "segment_ids"),
    )


def _special_ids(tokenizer: BertTokenizer) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in TOKEN_IDS}


def _read_tf1_tokenizer(module: Module, graph: Graph) -> BertTokenizer:
    outputs = module.signature("tokenization_info").outputs
    lowercase = path = None
    if "do_lower_case" in outputs:
        lowercase = graph.constant(graph.resolve(outputs["do_lower_case"].name))
    if "vocab_file" in outputs:
        source = graph.source(graph.resolve(outputs["vocab_file"].name))
        path = module.asset(f"{source[0]}:{source[1]}")
    if lowercase is None or path is None:
        raise ValueError(
            f"{module.handle} should specify its vocabulary (vocab_file, an asset) and casing "
            "(do_lower_case, a constant) in its signature tokenization_info, but does not."
        )
    return _bert_tokenizer(module.handle, path, bool(lowercase))


def _read_tf2_tokenizer(handle: str, loaded: Any) -> BertTokenizer:
    if not hasattr(loaded, "vocab_file") or not hasattr(loaded, "do_lower_case"):
        raise ValueError(
            f"{handle} should specify its vocabulary (vocab_file) and casing (do_lower_case), "
            "but does not."
        )
    path = loaded.vocab_file.asset_path.numpy().decode()
    return _bert_tokenizer(handle, path, bool(loaded.do_lower_case.numpy()))


def _bert_tokenizer(handle: str, path: str, lowercase: bool) -> BertTokenizer:
    try:
        return BertTokenizer(path, lowercase=lowercase)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{handle} should hold BERT's vocabulary, but reading it failed: {first_line(error)}"
        ) from error


def _read_tf2_graph(module: Module) -> tuple[str, float]:
    """Activation and epsilon of the layer normalisation, which no variable holds."""
    activations = set()
    epsilons = set()
    names = {"Erf": "gelu", "Erfc": "gelu", "Tanh": "gelu_new", "Relu": "relu"}
    for meta_graph in module.meta_graphs:
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
            f"{module.handle} should use one activation (erf or tanh gelu, or relu) and one "
            f"epsilon of layer normalisation in its layers' graph, but has "
            f"{sorted(activations) or 'none'} and {sorted(epsilons) or 'none'}."
        )
    return activations.pop(), shortest(epsilons.pop())


def _verify(source: Source, encoder: BertGenerationEncoder) -> None:
    handle = source.module.handle
    length = min(17, source.config.max_position_embeddings)
    ids = np.random.default_rng(0).integers(
        0, source.config.vocab_size, (2, length), dtype=np.int32
    )
    mask = np.ones_like(ids)
    mask[1, length // 2 :] = 0
    values = (tf.constant(ids), tf.constant(mask), tf.zeros_like(ids))
    inputs = dict(zip(source.inputs, values, strict=True))
    try:
        with exact():
            ours = encoder(ids, mask).numpy()
            expected = source.run(inputs).numpy()
    except Exception as error:  # whatever the module's graph raises
        raise ValueError(
            f"{handle} should take {', '.join(inputs)} and give sequence_output, but the "
            f"call failed: {first_line(error)}. verify=False loads the weights unchecked."
        ) from error
    difference = np.inf
    if expected.shape == ours.shape:
        difference = np.abs(ours - expected)[mask == 1].max()
    if not difference <= VERIFY_TOLERANCE:  # NaN is not
        raise ValueError(
            f"{handle} should give the same output as our encoder with its weights, within "
            f"{VERIFY_TOLERANCE}, but differs by {difference:.3g}: its graph is not that of a BERT "
            "encoder. verify=False loads the weights anyway."
        )
