"""Names and layouts of the weights in Hugging Face checkpoints, in and out."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from bertgen_tf.config import BertGenerationConfig
from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder
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
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
POSITION_EMBEDDINGS = "embeddings.position_embeddings.weight"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
# What checkpoints of encoders also hold: heads, poolers, and cross-attention where they were
# converted from a stack that is encoder and decoder in one.
NOT_IN_ENCODER = Rule(
    r"(pooler|cls|lm_head|classifier|qa_outputs)\..*|encoder\.layer\.\d+\.crossattention\..*", None
)


class DecoderNames(NamedTuple):
    """Where a decoder of one model_type has its stack and its head.

    Attributes:
        stack, head: prefixes. The head has a `bias`, and a `decoder` with weight and bias, which
            may be those of the word embeddings and that `bias`.
        dense, norm: the head's transform, after `head`; None if there is none.
    """

    stack: str
    head: str
    dense: str | None = None
    norm: str | None = None

    @property
    def tensors(self) -> list[tuple[str, str]]:
        """The names of the head -> ours; its matrix is there if it is not tied."""
        names = [(f"{self.head}bias", "output_bias"), (self.matrix, "output_kernel")]
        if self.dense is not None:
            names += _dense(self.head + self.dense, "head_transform/dense")
            names += _norm(self.head + self.norm, "head_transform/layer_norm")
        return names

    @property
    def matrix(self) -> str:
        """The name of the head's matrix."""
        return f"{self.head}decoder.weight"


DECODERS = {
    "bert-generation": DecoderNames("bert.", "lm_head."),
    "bert": DecoderNames("bert.", "cls.predictions.", "transform.dense", "transform.LayerNorm"),
    "roberta": DecoderNames("roberta.", "lm_head.", "dense", "layer_norm"),
}


def rules(theirs: str = "", ours: str = "") -> list[Rule]:
    """The rules of one stack, whose names begin with these prefixes."""
    return [_rule(theirs + source, ours + target) for source, target in STACK_NAMES]


def pair_rules(decoder: DecoderNames) -> list[Rule]:
    """The rules of an encoder-decoder."""
    return [
        *rules("encoder.", "encoder/"),
        *decoder_rules(decoder, "decoder.", "decoder/"),
        Rule(r"encoder\.pooler\..*", None),
    ]


def decoder_rules(decoder: DecoderNames, theirs: str = "", ours: str = "") -> list[Rule]:
    """The rules of a decoder, whose names begin with these prefixes."""
    return [
        *rules(theirs + decoder.stack, ours),
        *(_rule(theirs + source, ours + target) for source, target in decoder.tensors),
        # transformers 3 gave decoders one, too.
        Rule(re.escape(f"{theirs}{decoder.stack}pooler.") + ".*", None),
    ]


def _rule(source: str, target: str) -> Rule:
    pattern = re.escape(source).replace(r"\.N\.", r"\.(\d+)\.")
    # TensorFlow's names, which old checkpoints have.
    pattern = pattern.replace(r"LayerNorm\.weight", r"LayerNorm\.(?:weight|gamma)")
    pattern = pattern.replace(r"LayerNorm\.bias", r"LayerNorm\.(?:bias|beta)")
    return Rule(pattern, target.replace("_N/", r"_\1/"))


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


def tie_head(
    tensors: dict[str, np.ndarray],
    decoder: DecoderNames,
    tied: bool,
    source: str,
    prefix: str = "",
) -> None:
    """Leaves each tensor of a decoder's head under one name.

    Args:
        tensors: of the checkpoint.
        decoder: its names, after `prefix`.
        tied: whether the head's matrix is that of the word embeddings.
        source: the folder, for errors.
        prefix: "decoder." in a pair.

    Raises:
        ValueError: both names of what is tied are stored, and differ.
    """
    bias, alias = f"{prefix}{decoder.head}bias", f"{prefix}{decoder.head}decoder.bias"
    if not tied:
        if alias in tensors:  # the one that transformers adds
            tensors[bias] = tensors.pop(alias)
        return
    ties = {prefix + decoder.matrix: f"{prefix}{decoder.stack}{WORD_EMBEDDINGS}", alias: bias}
    for alias, name in ties.items():
        if alias not in tensors:
            continue
        if name in tensors and not np.array_equal(tensors[alias], tensors[name]):
            raise ValueError(
                f"{source} should hold a softmax that is tied to the word embeddings, but {alias} "
                f"and {name} differ. If that is meant, set tie_word_embeddings to false in the "
                "decoder's part of its config.json."
            )
        tensors[name] = tensors.pop(alias)


def complete_stacks(tensors: dict[str, np.ndarray], stack: str) -> None:
    """Gives both names to what two equal stacks store under one: transformers 4 drops the other.

    Args:
        tensors: of the checkpoint.
        stack: prefix of the decoder's stack.
    """
    for name, other in _counterparts(tensors, stack):
        tensors.setdefault(other, tensors[name])


def unify_shared(tensors: dict[str, np.ndarray], sharing: str, stack: str) -> list[str]:
    """The encoder's names of tensors that should be shared but differ between the stacks.

    Those that are equal become one array.
    """
    differing = []
    for name, other in _counterparts(tensors, stack):
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


def _counterparts(tensors: dict[str, np.ndarray], stack: str) -> Iterable[tuple[str, str]]:
    for name in list(tensors):
        if name.startswith("encoder.") and not name.startswith("encoder.pooler."):
            yield name, stack + name.removeprefix("encoder.")
        elif name.startswith(stack) and ".crossattention." not in name:
            yield name, "encoder." + name.removeprefix(stack)


def fold_embeddings(
    tensors: dict[str, np.ndarray], first_position: int, source: str, prefix: str = ""
) -> None:
    """BERT's and RoBERTa's position embeddings as ours: token type 0 added, unused rows dropped.

    Raises:
        ValueError: a tensor is missing, or the two do not fit.
    """
    name = prefix + POSITION_EMBEDDINGS
    types = prefix + TOKEN_TYPES
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


def decoder_kind(config: BertGenerationConfig) -> str:
    """The model_type under which a decoder is written."""
    return "bert-generation" if config.head_transform is None else "bert"


def tensors_of(
    layer: BertGenerationEncoder | BertGenerationDecoder, prefix: str = ""
) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, int]]:
    """Hugging Face's tensors of an encoder or decoder: functions that return them, and their bytes.

    Args:
        layer: what to write.
        prefix: "encoder." or "decoder." where it is part of a pair.
    """
    variables = named_variables(layer)
    names = {ours: prefix + theirs for theirs, ours in STACK_NAMES}
    if isinstance(layer, BertGenerationDecoder):
        kind = decoder_kind(layer.config)
        decoder = DECODERS[kind]
        names = {ours: f"{prefix}{decoder.stack}{theirs}" for theirs, ours in STACK_NAMES}
        names |= {ours: prefix + theirs for theirs, ours in decoder.tensors}
    tensors, sizes = {}, {}

    def add(theirs: str, read: Callable[[], np.ndarray], shape: tuple[int, ...]) -> None:
        tensors[theirs] = read
        sizes[theirs] = 4 * int(np.prod(shape))

    for name, variable in variables.items():
        match = re.fullmatch(r"layer_(\d+)(/.*)", name)
        if match:
            theirs = names[f"layer_N{match[2]}"].replace(".N.", f".{match[1]}.")
        else:
            theirs = names[name]
        add(theirs, _reader(variable), variable.shape)
        if name == "output_bias" and "output_kernel" in variables:  # untied, it has two there
            add(f"{prefix}{decoder.head}decoder.bias", _reader(variable), variable.shape)
    if isinstance(layer, BertGenerationDecoder) and kind == "bert":
        # They are part of the positions here.
        shape = (1, layer.config.hidden_size)
        types = f"{prefix}{decoder.stack}{TOKEN_TYPES}"
        add(types, lambda: np.zeros(shape, np.float32), shape)
    return tensors, sizes


def _reader(variable: Any) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(variable.numpy(), np.float32)
