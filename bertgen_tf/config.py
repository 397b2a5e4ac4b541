"""Model and generation settings: frozen dataclasses with HuggingFace's field names."""

import dataclasses
import json
import math
import os
from typing import Any, Self

HIDDEN_ACTS = ("gelu", "gelu_new", "relu")
BEAM_SCORERS = ("huggingface", "gnmt")


class _Config:
    """JSON in and out for the two dataclasses below."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the config; a field that does not exist is an error, never ignored."""
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
    """Architecture of one BertGeneration stack; fields and defaults of HuggingFace's class.

    The defaults are the size of `google/bertseq2seq/roberta24_*`.
    """

    vocab_size: int = 50358
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    # "gelu" is the exact one (erf), "gelu_new" the tanh approximation.
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 1
    # Only read by the decoder: a decoder without it is a plain language model.
    add_cross_attention: bool = False

    def __post_init__(self):
        _require_integers(
            self,
            1,
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
        _require_integers(self, 0, "pad_token_id", "bos_token_id", "eos_token_id")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
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
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a number in [0, 1), received {value!r}.")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not _is_number(value) or not value > 0:
                raise ValueError(f"{name} must be a number above 0, received {value!r}.")
        if not isinstance(self.add_cross_attention, bool):
            raise ValueError(
                f"add_cross_attention must be True or False, received {self.add_cross_attention!r}."
            )


@dataclasses.dataclass(frozen=True)
class GenerationConfig(_Config):
    """How `generate` searches; HuggingFace's field names and, where it has the field, its defaults.

    Every combination of values compiles its own function: keep to a few.
    """

    # Length, in generated tokens: the start token does not count, EOS does.
    max_new_tokens: int = 64
    min_new_tokens: int = 0

    # Search: num_beams=1 is greedy.
    num_beams: int = 1
    num_return_sequences: int = 1

    # Scores: sum of log-probabilities / length**length_penalty ("huggingface"), or
    # / ((5 + length) / 6)**gnmt_alpha with tensor2tensor's stopping rule ("gnmt"), which is
    # what the TF Hub originals use.
    beam_scorer: str = "huggingface"
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    gnmt_alpha: float = 0.6
    # Where no hypothesis ended, "gnmt" scores by the plain sum, as tensor2tensor does; True divides
    # it by the penalty of max_new_tokens.
    normalize_unfinished: bool = False

    # Token ids that are never generated.
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        if not isinstance(self.suppress_tokens, list | tuple) or not all(
            _is_integer(token) and token >= 0 for token in self.suppress_tokens
        ):
            raise ValueError(
                f"suppress_tokens must be token ids (integers from 0), "
                f"received {self.suppress_tokens!r}."
            )
        # JSON has lists only; a tuple keeps the config hashable.
        object.__setattr__(self, "suppress_tokens", tuple(self.suppress_tokens))
        _require_integers(self, 1, "max_new_tokens", "num_beams", "num_return_sequences")
        _require_integers(self, 0, "min_new_tokens")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must not exceed max_new_tokens ({self.max_new_tokens}), "
                f"received {self.min_new_tokens}."
            )
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences must not exceed num_beams ({self.num_beams}), "
                f"received {self.num_return_sequences}. Raise num_beams."
            )
        if self.beam_scorer not in BEAM_SCORERS:
            raise ValueError(
                f"beam_scorer must be one of {', '.join(BEAM_SCORERS)}, "
                f"received {self.beam_scorer!r}."
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                f'early_stopping must be True, False or "never", received {self.early_stopping!r}.'
            )
        for name, least in (("length_penalty", -math.inf), ("gnmt_alpha", 0)):
            value = getattr(self, name)
            if not _is_number(value) or value < least:
                raise ValueError(
                    f"{name} must be a number{' from 0' if least == 0 else ''}, received {value!r}."
                )
        # What a search does not read is an error, never ignored silently.
        if self.early_stopping is not False and (
            self.num_beams == 1 or self.beam_scorer != "huggingface"
        ):
            raise ValueError(
                f"early_stopping applies to beam search with HuggingFace's scorer only, received "
                f"{self.early_stopping!r} with num_beams={self.num_beams} and "
                f"beam_scorer={self.beam_scorer!r}. Set early_stopping=False."
            )
        if not isinstance(self.normalize_unfinished, bool):
            raise ValueError(
                "normalize_unfinished must be True or False, "
                f"received {self.normalize_unfinished!r}."
            )
        for name, scorer in (
            ("length_penalty", "huggingface"),
            ("gnmt_alpha", "gnmt"),
            ("normalize_unfinished", "gnmt"),
        ):
            default = type(self).__dataclass_fields__[name].default
            if self.beam_scorer != scorer and getattr(self, name) != default:
                raise ValueError(
                    f"{name} applies to beam_scorer={scorer!r} only, received "
                    f"{getattr(self, name)!r} with {self.beam_scorer!r}. Leave it at {default}."
                )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_integers(config: Any, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not _is_integer(value) or value < minimum:
            raise ValueError(
                f"{name} must be an integer of at least {minimum}, received {value!r}."
            )
