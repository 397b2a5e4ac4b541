"""Names and layouts of the weights in Hugging Face checkpoints, in and out."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from bertgen_tf.config import BertGenerationConfig
from bertgen_tf.network.weights import Rule, named_variables

_LAYER = "encoder.layer.N."


def _dense(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{theirs}.weight", f"{ours}/kernel"), (f"{theirs}.bias", f"{ours}/bias")]


def _norm(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{theirs}.weight", f"{ours}/gamma"), (f"{theirs}.bias", f"{ours}/beta")]


def _stack_names() -> list[tuple[str, str]]:
    names = [
        (f"embeddings.{kind}_embeddings.weight", f"embeddings/{kind}_embeddings/embeddings")
        for kind in ("word", "position")
    ]
    names += _norm("embeddings.LayerNorm", "embeddings/layer_norm")
    for block, part in (("attention", "self_attention"), ("crossattention", "cross_attention")):
        theirs, ours = f"{_LAYER}{block}", f"layer_N/{part}"
        for projection in ("query", "key", "value"):
            names += _dense(f"{theirs}.self.{projection}", f"{ours}/{projection}")
        names += _dense(f"{theirs}.output.dense", f"{ours}/output_dense")
        names += _norm(f"{theirs}.output.LayerNorm", f"{ours}/layer_norm")
    ours = "layer_N/feed_forward"
    names += _dense(f"{_LAYER}intermediate.dense", f"{ours}/intermediate")
    names += _dense(f"{_LAYER}output.dense", f"{ours}/output_dense")
    return names + _norm(f"{_LAYER}output.LayerNorm", f"{ours}/layer_norm")


# Hugging Face's names of a stack -> ours; N is the number of a layer.
STACK_NAMES = tuple(_stack_names())
HEAD_NAME = ("lm_head.bias", "output_bias")
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
POSITION_EMBEDDINGS = "embeddings.position_embeddings.weight"
# What checkpoints of encoders also hold: heads, poolers, and cross-attention where they were
# converted from a stack that is encoder and decoder in one.
NOT_IN_ENCODER = Rule(
    r"(pooler|cls|lm_head|classifier|qa_outputs)\..*|encoder\.layer\.\d+\.crossattention\..*", None
)


def rules(theirs: str = "", ours: str = "") -> list[Rule]:
    """The rules of one stack, whose names begin with these prefixes."""
    table = []
    for source, target in STACK_NAMES:
        pattern = re.escape(theirs + source).replace(r"\.N\.", r"\.(\d+)\.")
        # TensorFlow's names, which old checkpoints have.
        pattern = pattern.replace(r"LayerNorm\.weight", r"LayerNorm\.(?:weight|gamma)")
        pattern = pattern.replace(r"LayerNorm\.bias", r"LayerNorm\.(?:bias|beta)")
        table.append(Rule(pattern, ours + target.replace("_N/", r"_\1/")))
    return table


def pair_rules() -> list[Rule]:
    """The rules of an encoder-decoder."""
    return [
        *rules("encoder.", "encoder/"),
        *rules("decoder.bert.", "decoder/"),
        Rule(re.escape("decoder." + HEAD_NAME[0]), "decoder/" + HEAD_NAME[1]),
        Rule(r"encoder\.pooler\..*", None),
    ]


def decoder_rules() -> list[Rule]:
    """The rules of a lone decoder, without the prefix `bert.`."""
    return [*rules(), Rule(re.escape(HEAD_NAME[0]), HEAD_NAME[1])]


def without_prefix(tensors: dict[str, np.ndarray], prefix: str, source: str) -> dict:
    """The tensors, with a prefix removed from the names that have it.

    Raises:
        ValueError: a tensor exists both with and without it.
    """
    twice = sorted(name for name in tensors if prefix + name in tensors)
    if twice:
        raise ValueError(
            f"{source} should hold each tensor once, but has {', '.join(twice[:6])} both with and "
            f"without the prefix {prefix!r}."
        )
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def untie_head(tensors: dict[str, np.ndarray], source: str, decoder: str = "") -> None:
    """Replaces the names of the tied head with those of what it is tied to.

    Raises:
        ValueError: both are stored, and differ.
    """
    stack = f"{decoder}bert." if decoder else ""
    ties = {
        f"{decoder}lm_head.decoder.weight": stack + WORD_EMBEDDINGS,
        f"{decoder}lm_head.decoder.bias": f"{decoder}lm_head.bias",
    }
    for alias, name in ties.items():
        if alias not in tensors:
            continue
        if name in tensors and not np.array_equal(tensors[alias], tensors[name]):
            raise ValueError(
                f"{source} should hold a softmax that is tied to the word embeddings, but {alias} "
                f"and {name} differ."
            )
        tensors[name] = tensors.pop(alias)


def complete_stacks(tensors: dict[str, np.ndarray]) -> None:
    """Gives both names to what two equal stacks store under one: transformers 4 drops the other."""
    for name, other in _counterparts(tensors):
        tensors.setdefault(other, tensors[name])


def unify_shared(tensors: dict[str, np.ndarray], sharing: str) -> list[str]:
    """The encoder's names of tensors that should be shared but differ between the stacks.

    Those that are equal become one array.
    """
    differing = []
    for name, other in _counterparts(tensors):
        if not name.startswith("encoder.") or other not in tensors:
            continue
        if sharing == "all" or sharing == "word_embeddings" and name.endswith(WORD_EMBEDDINGS):
            if np.array_equal(tensors[name], tensors[other]):
                tensors[name] = tensors[other]
            else:
                differing.append(name)
    return differing


def check_sizes(
    tensors: dict[str, np.ndarray], config: BertGenerationConfig, source: str, prefix: str = ""
) -> None:
    """Compares a configuration with the tensors before a model of its sizes is built.

    Args:
        tensors: after `fold_embeddings`.
        config: of the stack whose tensors begin with `prefix`.
        source: the folder, for errors.

    Raises:
        ValueError: the model would be larger than the tensors, or would not match the main ones.
    """
    expected = {
        WORD_EMBEDDINGS: (config.vocab_size, config.hidden_size),
        POSITION_EMBEDDINGS: (config.max_position_embeddings, config.hidden_size),
        f"{_LAYER}intermediate.dense.weight".replace(".N.", ".0."): (
            config.intermediate_size,
            config.hidden_size,
        ),
    }
    problems = []
    for name, shape in expected.items():
        tensor = tensors.get(prefix + name)
        if tensor is None:
            problems.append(f"there is no {prefix}{name}")
        elif tensor.shape != shape:
            problems.append(f"{prefix}{name} has shape {tensor.shape}, not {shape}")
    pattern = re.escape(prefix + _LAYER).replace(r"\.N\.", r"\.(\d+)\.")
    layers = {match[1] for name in tensors if (match := re.match(pattern, name))}
    if len(layers) < config.num_hidden_layers:
        problems.append(
            f"there are {len(layers)} layers {prefix}{_LAYER}*, not {config.num_hidden_layers}"
        )
    if problems:
        raise ValueError(
            f"{source} should hold weights of the sizes in its config.json, but "
            f"{'; '.join(problems)}."
        )


def _counterparts(tensors: dict[str, np.ndarray]) -> Iterable[tuple[str, str]]:
    encoder, decoder = "encoder.", "decoder.bert."
    for name in list(tensors):
        if name.startswith(encoder):
            yield name, decoder + name.removeprefix(encoder)
        elif name.startswith(decoder) and ".crossattention." not in name:
            yield name, encoder + name.removeprefix(decoder)


def fold_embeddings(
    tensors: dict[str, np.ndarray], first_position: int, source: str, prefix: str = ""
) -> None:
    """BERT's and RoBERTa's position embeddings as ours: token type 0 added, unused rows dropped.

    Raises:
        ValueError: a tensor is missing, or the two do not fit.
    """
    name = prefix + POSITION_EMBEDDINGS
    types = f"{prefix}embeddings.token_type_embeddings.weight"
    positions, type_rows = tensors.get(name), tensors.pop(types, None)
    if (
        positions is None
        or type_rows is None
        or positions.ndim != 2
        or type_rows.ndim != 2
        or not len(type_rows)
        or type_rows.shape[1:] != positions.shape[1:]
    ):
        shapes = [None if t is None else t.shape for t in (positions, type_rows)]
        raise ValueError(
            f"{source} should hold {name} and {types} of one width, but their shapes are "
            f"{shapes[0]} and {shapes[1]} (None: missing)."
        )
    tensors[name] = positions[first_position:] + type_rows[0]


def tensors_of(
    layer: keras.Layer, prefix: str = ""
) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, int]]:
    """Hugging Face's tensors of an encoder or decoder: functions that return them, and their bytes.

    Args:
        layer: a `BertGenerationEncoder` or `BertGenerationDecoder`.
        prefix: "encoder." or "decoder." where it is part of a pair.
    """
    variables = named_variables(layer)
    head = HEAD_NAME[1] in variables
    stack = f"{prefix}bert." if head else prefix
    names = {ours: stack + theirs for theirs, ours in STACK_NAMES}
    names[HEAD_NAME[1]] = prefix + HEAD_NAME[0]
    tensors, sizes = {}, {}
    for name, variable in variables.items():
        match = re.fullmatch(r"layer_(\d+)(/.*)", name)
        if match:
            theirs = names[f"layer_N{match[2]}"].replace(".N.", f".{match[1]}.")
        else:
            theirs = names[name]
        tensors[theirs] = _reader(variable)
        sizes[theirs] = 4 * int(np.prod(variable.shape))
    return tensors, sizes


def _reader(variable: Any) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(variable.numpy(), np.float32)
