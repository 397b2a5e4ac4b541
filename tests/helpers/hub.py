"""Tiny TF Hub modules, and what is found in them."""

import re
from pathlib import Path

import make_hub_module as maker
import numpy as np
import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.network.weights import named_variables
from tests.helpers import PIECES, SHARED, write_checkpoint

MINILM = SHARED / "hub/tf2_bert_minilm_l6"


TINY = SHARED / "hub/tf2_bert_tiny"


# Special tokens where nobody would guess them, and another size.
CASED_PIECES = ["The", "A", *PIECES[9:], "[CLS]", "[UNK]", "[SEP]", "x.y", "[PAD]"]


MODULES = {
    "gelu": {"hidden_act": "gelu", "layer_norm_eps": 1e-5},
    "tanh": {
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-3,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 14,
        "max_position_embeddings": 19,
        "seed": 1,
    },
    "relu": {
        "hidden_act": "relu",
        "layer_norm_eps": 1e-12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": len(CASED_PIECES),
        "pieces": CASED_PIECES,
        "lowercase": False,
        "type_vocab_size": 3,
        "seed": 2,
    },
}


def shared(path: Path) -> Path:
    """The path, or a skip where this folder of reference modules is absent."""
    if not path.exists():
        pytest.skip(f"needs {path.name} in ../shared/hub beside the repository")
    return path


def make_module(folder: Path, lowercase: bool = True, **changes) -> str:
    source = write_checkpoint(folder / "checkpoint", **{"num_hidden_layers": 4, **changes})
    maker.make_hub_module(source, folder / "module", lowercase)
    return str(folder / "module")


def run_module(loaded, ids, mask) -> dict:
    ids, mask = tf.constant(ids, tf.int32), tf.constant(mask, tf.int32)
    return loaded(
        {"input_word_ids": ids, "input_mask": mask, "input_type_ids": tf.zeros_like(ids)},
        training=False,
    )


def probe(config: bg.BertGenerationConfig, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Random ids over all positions, with rows of different lengths."""
    length = min(config.max_position_embeddings, 64)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (3, length), np.int32)
    return ids, (np.arange(length) < [[length], [length // 3], [1]]).astype(np.int32)


def arrays(loaded) -> dict[str, np.ndarray]:
    return {v.name.removesuffix(":0"): v.numpy() for v in loaded.variables}


def check_block(block, source: dict[str, np.ndarray], layer: int) -> None:
    """Self-attention and feed-forward of a block are those of a layer of the module."""
    get = {
        name.removeprefix(f"transformer/layer_{layer}/"): array for name, array in source.items()
    }.__getitem__
    hidden, inner = get("intermediate/kernel").shape
    attention, feed_forward = block.self_attention, block.feed_forward
    ours = named_variables(attention)
    for name in ("query", "key", "value"):
        kernel, bias = (ours[f"{name}/{part}"].numpy() for part in ("kernel", "bias"))
        heads = get(f"self_attention/{name}/bias").shape
        # Head by head: row a * D + d of ours is head a, unit d of the module's.
        np.testing.assert_array_equal(
            kernel.T.reshape(hidden, *heads), get(f"self_attention/{name}/kernel")
        )
        np.testing.assert_array_equal(bias.reshape(heads), get(f"self_attention/{name}/bias"))
    for ours, theirs, shape in (
        (attention.output_dense.kernel, "self_attention/attention_output/kernel", (*heads, hidden)),
        (attention.output_dense.bias, "self_attention/attention_output/bias", (hidden,)),
        (attention.layer_norm.gamma, "self_attention_layer_norm/gamma", (hidden,)),
        (attention.layer_norm.beta, "self_attention_layer_norm/beta", (hidden,)),
        (feed_forward.intermediate.kernel, "intermediate/kernel", (hidden, inner)),
        (feed_forward.intermediate.bias, "intermediate/bias", (inner,)),
        (feed_forward.output_dense.kernel, "output/kernel", (inner, hidden)),
        (feed_forward.output_dense.bias, "output/bias", (hidden,)),
        (feed_forward.layer_norm.gamma, "output_layer_norm/gamma", (hidden,)),
        (feed_forward.layer_norm.beta, "output_layer_norm/beta", (hidden,)),
    ):
        np.testing.assert_array_equal(ours.numpy().T.reshape(shape), get(theirs))


def check_against_module(encoder, loaded):
    ids, mask = probe(encoder.config)
    expected = run_module(loaded, ids, mask)["sequence_output"].numpy()
    difference = np.abs(encoder(ids, mask).numpy() - expected)
    assert difference[mask == 1].max() < 1e-5
    # Padding matters, so that a mask that is not read shows.
    unpadded = run_module(loaded, ids, np.ones_like(ids))["sequence_output"].numpy()
    assert np.abs(unpadded - expected)[mask == 1].max() > 1e-3


# What is no BERT module


def check_error(handle, kind, *parts, **options):
    """Every way in gives one error of one line that names the handle and says these things."""
    with pytest.raises(kind) as caught:
        bg.BertGenerationEncoder.from_hub(handle, **options)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert str(handle) in message and "\n" not in message and "Traceback" not in message
    assert " should " in message and len(message) < 900
    for part in parts:
        assert re.search(part, message), message
    return message
