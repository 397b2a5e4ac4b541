"""Model and generation settings: frozen dataclasses with Hugging Face's field names."""

import dataclasses
import json
import math
import numbers
import os
import types
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from bertgen_tf.checks import (
    BOOLEAN,
    NUMBER,
    NUMBER_FROM_0,
    POSITIVE,
    SHARE,
    Rule,
    check_integer,
    check_rule,
    integer_from,
    is_integer,
    is_number,
    one_of,
    optional,
)

HIDDEN_ACTS = ("gelu", "gelu_new", "relu")
QUANTIZATIONS = ("int8",)
# Fields of the model config that Hugging Face's class does not have.
OWN_FIELDS = ("norm_first", "source_positions", "quantization", "head_transform")
# Those that a decoder reads and an encoder does not.
HEAD_FIELDS = ("head_transform", "tie_word_embeddings")
# Fields of the model config, and attributes of tokenizers.
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
BEAM_SCORERS = ("huggingface", "gnmt")
DEFAULT_MAX_NEW_TOKENS = 64
# Texts that are generated together.
BATCH_SIZE = 32
# What a training does with targets that are too long, and which devices it takes.
LONG_TARGETS = ("cut", "skip", "error")
STRATEGIES = ("auto", "none", "mirrored", "tpu")


class _Config:
    """Reads and writes the two dataclasses below as JSON."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the config; an unknown field is an error, never ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(unknown)}; "
                f"it has {', '.join(sorted(known))}."
            )
        return cls(**values)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike) -> Self:
        """Reads what `to_json_file` wrote."""
        with open(path, encoding="utf-8") as file:
            try:
                values = json.load(file)
            except ValueError as error:
                raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"{path} should hold a JSON object of {cls.__name__} fields, "
                f"but holds a {type(values).__name__}."
            )
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON can hold."""
        return dataclasses.asdict(self)

    def to_json_file(self, path: str | os.PathLike) -> None:
        """Writes all fields as indented JSON."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=2)
            file.write("\n")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; unknown names are an error."""
        return type(self).from_dict({**self.__dict__, **changes})


@dataclasses.dataclass(frozen=True)
class BertGenerationConfig(_Config):
    """Architecture of one BertGeneration stack; fields and defaults of Hugging Face's class.

    The defaults are the size of `google/bertseq2seq/roberta24_*`.
    """

    vocab_size: int = 50358
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    # "gelu" is exact (erf), "gelu_new" is the tanh approximation.
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 1
    # Read by the decoder only: without it, a decoder is a plain language model.
    add_cross_attention: bool = False
    # Read by the decoder only: False for an output matrix of its own.
    tie_word_embeddings: bool = True
    # Ours, read by the decoder only: the activation of a transform before the softmax (dense layer,
    # activation, layer normalisation), as in the heads of BERT and RoBERTa. None: no transform.
    head_transform: str | None = None
    # Normalisation before attention and feed-forward instead of after them, and once more at the
    # end, as in GPT-2's blocks. The name is PyTorch's.
    norm_first: bool = False
    # Ours, for decoder-only models: how many positions a source may take. The stack reads the
    # source as the beginning of its text; the other positions are the target's. None: there is an
    # encoder.
    source_positions: int | None = None
    # Ours: "int8" for a stack whose matrices are int8, see `EncoderDecoderModel.quantize`.
    quantization: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            check_integer(name, getattr(self, name))
        for name in TOKEN_IDS:
            check_integer(name, getattr(self, name), 0)
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"{name} must be smaller than vocab_size ({self.vocab_size}), "
                    f"received {getattr(self, name)}."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, received "
                f"hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}."
            )
        if self.hidden_act not in HIDDEN_ACTS:
            raise ValueError(
                f"hidden_act must be one of {', '.join(HIDDEN_ACTS)}, received {self.hidden_act!r}."
            )
        if self.head_transform not in (None, *HIDDEN_ACTS):
            raise ValueError(
                f"head_transform must be None or one of {', '.join(HIDDEN_ACTS)}, received "
                f"{self.head_transform!r}."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a number in [0, 1), received {value!r}.")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not is_number(value) or not value > 0:
                raise ValueError(f"{name} must be a number above 0, received {value!r}.")
        for name in ("add_cross_attention", "norm_first", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, received {getattr(self, name)!r}.")
        if self.source_positions is not None:
            check_integer("source_positions", self.source_positions)
            if self.source_positions >= self.max_position_embeddings or self.add_cross_attention:
                raise ValueError(
                    "source_positions must be below max_position_embeddings "
                    f"({self.max_position_embeddings}), to leave positions for the target, and "
                    f"excludes cross-attention, received {self.source_positions} with "
                    f"add_cross_attention={self.add_cross_attention}."
                )
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ValueError(
                f"quantization must be None or one of {', '.join(QUANTIZATIONS)}, received "
                f"{self.quantization!r}."
            )

    @property
    def decoder_only(self) -> bool:
        """Whether one stack reads the source and continues with the target."""
        return self.source_positions is not None

    @property
    def max_source_positions(self) -> int:
        """The maximum number of source tokens."""
        return self.source_positions or self.max_position_embeddings

    @property
    def max_target_positions(self) -> int:
        """The maximum number of target tokens that a decoder reads, start token included."""
        return self.max_position_embeddings - (self.source_positions or 0)


_TOKEN = Rule(
    lambda value: is_integer(value) and value >= 0, "a token id (an integer of at least 0)"
)
_TOKENS = Rule(
    lambda value: isinstance(value, tuple) and all(map(_TOKEN.allows, value)),
    "token ids (integers of at least 0)",
)
_SEQUENCE = Rule(lambda value: _TOKENS.allows(value) and len(value) > 0, "token ids, at least one")
_TOKEN_OR_SEQUENCE = Rule(
    lambda value: _TOKEN.allows(value) or _SEQUENCE.allows(value),
    "a token id (an integer of at least 0) or several",
)

_GENERATION_RULES = {
    "max_new_tokens": optional(integer_from(1)),
    "max_length": optional(integer_from(2)),
    **dict.fromkeys(("min_new_tokens", "min_length"), integer_from(0)),
    **dict.fromkeys(("num_beams", "num_return_sequences"), integer_from(1)),
    **dict.fromkeys(("do_sample", "normalize_unfinished"), BOOLEAN),
    "beam_scorer": one_of(*BEAM_SCORERS),
    "length_penalty": NUMBER,
    "early_stopping": Rule(one_of(True, False, "never").allows, 'True, False or "never"'),
    "gnmt_alpha": NUMBER_FROM_0,
    # The smallest divisor of scores, see `bertgen_tf.generation.search.filters`.
    "temperature": Rule(
        lambda value: is_number(value) and value >= 1e-4, "a number of at least 0.0001"
    ),
    "top_k": integer_from(0),
    **dict.fromkeys(("top_p", "typical_p"), SHARE),
    "min_p": Rule(lambda value: is_number(value) and 0 <= value <= 1, "a number between 0 and 1"),
    "seed": optional(
        Rule(
            lambda value: is_integer(value) and 0 <= value < 2**31, "an integer from 0 to 2**31 - 1"
        )
    ),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), POSITIVE),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), integer_from(0)),
    "bad_words_ids": Rule(
        lambda value: isinstance(value, tuple) and all(map(_SEQUENCE.allows, value)),
        "sequences of token ids, such as [[5], [7, 8]]",
    ),
    "sequence_bias": Rule(
        lambda value: (
            isinstance(value, tuple)
            and all(
                isinstance(pair, tuple)
                and len(pair) == 2
                and _SEQUENCE.allows(pair[0])
                and is_number(pair[1])
                for pair in value
            )
            and len({ids for ids, _ in value}) == len(value)
        ),
        "different sequences of token ids, each with a number, such as {(5,): 2.0, (7, 8): -1.5} "
        "or [[[5], 2.0], [[7, 8], -1.5]]",
    ),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _TOKENS),
    "forced_bos_token_id": optional(_TOKEN),
    **dict.fromkeys(("forced_eos_token_id", "eos_token_id"), optional(_TOKEN_OR_SEQUENCE)),
    "exponential_decay_length_penalty": optional(
        Rule(
            lambda value: (
                isinstance(value, tuple)
                and len(value) == 2
                and is_integer(value[0])
                and value[0] >= 0
                and POSITIVE.allows(value[1])
            ),
            "an integer of at least 0 (the start) and a number above 0 (the factor)",
        )
    ),
}


class _Use(NamedTuple):
    """Where fields are read: elsewhere only their defaults are allowed."""

    names: tuple[str, ...]
    words: str
    reads: Callable[["GenerationConfig"], bool]
    because_of: tuple[str, ...]


_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
_USES = (
    _Use(
        ("early_stopping",),
        "beam search with Hugging Face's scorer",
        lambda config: config.num_beams > 1 and config.beam_scorer == "huggingface",
        ("num_beams", "beam_scorer"),
    ),
    _Use(
        ("length_penalty",),
        "beam_scorer='huggingface'",
        lambda config: config.beam_scorer == "huggingface",
        ("beam_scorer",),
    ),
    _Use(
        ("gnmt_alpha", "normalize_unfinished"),
        "beam_scorer='gnmt'",
        lambda config: config.beam_scorer == "gnmt",
        ("beam_scorer",),
    ),
    _Use(
        _SAMPLING_FIELDS,
        "sampling (do_sample=True)",
        lambda config: config.do_sample,
        ("do_sample",),
    ),
)


@dataclasses.dataclass(frozen=True)
class GenerationConfig(_Config):
    """How `generate` searches, with Hugging Face's field names and, for shared fields, defaults.

    A value that has no effect under the other settings is an error. Every combination of values,
    apart from the seed, compiles its own function: use few. Lists are stored as tuples.
    """

    # The longest output: set one of the two; with neither, max_new_tokens=64. New tokens are those
    # after start token and prompt, end token included; max_length counts all.
    max_new_tokens: int | None = None
    max_length: int | None = None
    # No end token before this many tokens; both apply.
    min_new_tokens: int = 0
    min_length: int = 0

    # Search: num_beams=1 is greedy or, with do_sample, draws each token, and each returned sequence
    # independently. With several beams, do_sample draws their continuations.
    num_beams: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False

    # Filters of the draw, in this order; with do_sample only. 0 switches off top_k and min_p;
    # 1 switches off top_p and typical_p.
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    # None: different draws at every call. An integer: the same draws at every call, whatever the
    # batch, compiled by XLA or not.
    seed: int | None = None

    # Scores: sum of log-probabilities / length**length_penalty ("huggingface"), or
    # / ((5 + length) / 6)**gnmt_alpha with tensor2tensor's stopping rule ("gnmt"), which is
    # what the TF Hub originals use.
    beam_scorer: str = "huggingface"
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    gnmt_alpha: float = 0.6
    # If no hypothesis ended, "gnmt" scores by the plain sum, as tensor2tensor does; True divides it
    # by the penalty of max_new_tokens.
    normalize_unfinished: bool = False

    # Above 1, tokens that already occurred in the output become less likely, and tokens of the
    # source more likely.
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    # No n-gram of this size twice, or none from the source; 0 allows all.
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    # Token sequences that are never generated, and numbers added to the scores of sequences.
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    # Token ids that are never generated, or never generated first.
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    # The token after the start token, and the last token of an output of maximum length.
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    # (start, factor): after `start` new tokens the end becomes increasingly likely.
    exponential_decay_length_penalty: tuple[int, float] | None = None
    # Each of them ends a sequence; None: the decoder's.
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("forced_eos_token_id", "eos_token_id"):
            ids = getattr(self, name)
            if isinstance(ids, tuple) and len(ids) == 1:  # one form for one meaning
                object.__setattr__(self, name, ids[0])
        for name, rule in _GENERATION_RULES.items():
            check_rule(name, getattr(self, name), rule)
        self._check_lengths()
        if self.num_return_sequences > self.num_beams and not (
            self.do_sample and self.num_beams == 1
        ):
            raise ValueError(
                f"num_return_sequences must not exceed num_beams ({self.num_beams}), "
                f"received {self.num_return_sequences}. Raise num_beams, or set do_sample=True "
                "with num_beams=1 for independent samples."
            )
        for use in _USES:
            for name in use.names:
                value = getattr(self, name)
                default = type(self).__dataclass_fields__[name].default
                if value != default and not use.reads(self):
                    others = " and ".join(f"{of}={getattr(self, of)!r}" for of in use.because_of)
                    raise ValueError(
                        f"{name} applies to {use.words} only, received {value!r} with {others}. "
                        f"Leave it at {default!r}."
                    )

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; unknown names are an error.

        `max_new_tokens` replaces `max_length`, and vice versa.
        """
        return super().replace(**_with_other_length(changes))

    def override(self, **changes: Any) -> Self:
        """A copy with some fields changed, to which the others give way.

        For settings that a model stores: fields that mean nothing beside the new values, such as
        `early_stopping` beside `num_beams=1`, go back to their defaults, and minimal lengths and
        the number of returned sequences are lowered to the new limits. Limits are never raised.

        Raises:
            ValueError: the changes contradict each other, exceed a limit that they do not change,
                or have unknown names.
        """
        values = {**self.__dict__, **_with_other_length(changes)}
        for name in changes.keys() & _GENERATION_RULES.keys():
            check_rule(name, _plain(changes[name]), _GENERATION_RULES[name])
        new = types.SimpleNamespace(**values)
        for use in _USES:
            if not use.reads(new):
                fields = type(self).__dataclass_fields__
                values |= {name: fields[name].default for name in use.names if name not in changes}
        limits = {
            "min_new_tokens": values["max_new_tokens"] or (values["max_length"] or math.inf) - 1,
            "min_length": values["max_length"] or math.inf,
            "num_return_sequences": (
                math.inf if new.do_sample and new.num_beams == 1 else new.num_beams
            ),
        }
        for name, limit in limits.items():
            if name not in changes:
                values[name] = min(values[name], limit)
        return type(self).from_dict(values)

    def _check_lengths(self) -> None:
        if self.max_new_tokens is not None and self.max_length is not None:
            raise ValueError(
                "max_new_tokens and max_length (which also counts start token and prompt) exclude "
                f"each other, received {self.max_new_tokens} and {self.max_length}. Set one."
            )
        if self.max_new_tokens is None and self.max_length is None:
            object.__setattr__(self, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
        for name, limit, longest in (
            ("min_new_tokens", "max_new_tokens", self.max_new_tokens),
            ("min_length", "max_length", self.max_length),
            # The start token is not new.
            ("min_new_tokens", "max_length - 1", self.max_length and self.max_length - 1),
        ):
            if longest is not None and getattr(self, name) > longest:
                raise ValueError(
                    f"{name} must not exceed {limit} ({longest}), received {getattr(self, name)}."
                )


def _with_other_length(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes, and what of max_new_tokens and max_length they replace."""
    for name, other in (("max_new_tokens", "max_length"), ("max_length", "max_new_tokens")):
        if changes.get(name) is not None:
            changes = {other: None, **changes}
    return changes


def _plain(value: Any) -> Any:
    """Turns NumPy's numbers into Python's, and lists and dicts into tuples, which are hashable."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, dict):
        value = tuple(value.items())
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
