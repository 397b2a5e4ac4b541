"""Small vocabularies: keep only the pieces that a corpus needs."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bertgen_tf.config import GenerationConfig
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.network.weights import Rule, assign, named_variables


def trim_vocabulary(
    model: EncoderDecoderModel, keep: Iterable[str] | Iterable[int]
) -> EncoderDecoderModel:
    """A new, smaller model that knows only the pieces that a corpus needs.

    Embeddings, softmax and tokenizer shrink together. The logits of the kept pieces stay the same,
    and every text of the corpus is still split into the same pieces, unless it has unknown words.

    Args:
        model: a model with a tokenizer; it is not modified.
        keep: texts, or the ids to keep; only texts if sources and targets have a vocabulary each:
            both keep what they need. Special tokens always stay.
    """
    if model.tokenizer is None:
        raise ValueError("model must have a tokenizer to be trimmed, and this one has none.")
    keep = [keep] if isinstance(keep, str) else list(keep)
    two = model.decoder_tokenizer is not None
    if two and not all(isinstance(item, str) for item in keep):
        raise ValueError(
            "keep must be texts for a model with two vocabularies, where an id is ambiguous, "
            f"received {keep[:5]!r}."
        )
    config = model.get_config()
    kept = {}
    for side, field in (
        ("encoder", "tokenizer"),
        ("decoder", "decoder_tokenizer" if two else "tokenizer"),
    ):
        old = getattr(model, field)
        needed = _needed_ids(model.generation_config) if side == "decoder" or not two else []
        tokenizer, kept[side] = old.subset([*_ids(old, keep), *needed])
        config[side]["config"].update(
            vocab_size=len(kept[side]),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        config[field]["config"] = tokenizer.get_config()
    new_ids = {old: new for new, old in enumerate(kept["decoder"].tolist())}
    config["generation_config"] = _renumber(model.generation_config, new_ids).to_dict()
    config["hidden_token_ids"] = [
        new_ids[old] for old in model.preprocessor.hidden_token_ids if old in new_ids
    ]
    trimmed = type(model).from_config(config)

    def rows(side: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda tensor: tensor[kept[side]]

    words = "embeddings/word_embeddings/embeddings"
    rules = [
        Rule(f"(encoder/{words})", r"\1", rows("encoder")),
        Rule(f"(decoder/({words}|output_(bias|kernel|kernel_scale)))", r"\1", rows("decoder")),
        Rule("(.*)", r"\1"),
    ]
    assign(named_variables(trimmed), named_variables(model), rules, source="The untrimmed model")
    return trimmed


def _needed_ids(config: GenerationConfig) -> list[int]:
    """The ids that an output has to begin or end with."""
    values = (config.forced_bos_token_id, config.forced_eos_token_id, config.eos_token_id)
    return [i for value in values if value is not None for i in np.atleast_1d(value).tolist()]


def _renumber(config: GenerationConfig, new_ids: dict[int, int]) -> GenerationConfig:
    """The same settings with the new ids; those for pieces that are gone are dropped."""

    def kept(ids: Iterable[int]) -> bool:
        return all(i in new_ids for i in ids)

    def renumbered(ids: Any) -> Any:
        return tuple(map(renumbered, ids)) if isinstance(ids, tuple) else new_ids.get(ids)

    changes = {
        name: renumbered(getattr(config, name))
        for name in ("forced_bos_token_id", "forced_eos_token_id", "eos_token_id")
    }
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        changes[name] = tuple(new_ids[i] for i in getattr(config, name) if i in new_ids)
    changes["bad_words_ids"] = tuple(renumbered(ids) for ids in config.bad_words_ids if kept(ids))
    changes["sequence_bias"] = tuple(
        (renumbered(ids), bias) for ids, bias in config.sequence_bias if kept(ids)
    )
    return config.replace(**changes)


def _ids(tokenizer, keep: list[str] | list[int]) -> list[int]:
    if keep and all(isinstance(item, str) for item in keep):
        batches = (keep[start : start + 1024] for start in range(0, len(keep), 1024))
        return sorted(
            {i for batch in batches for i in tokenizer(batch).flat_values.numpy().tolist()}
        )
    try:
        ids = sorted({operator.index(item) for item in keep})
    except TypeError:
        ids = []
    if not ids or ids[0] < 0 or ids[-1] >= tokenizer.vocab_size:
        raise ValueError(
            "keep must be texts (str), or ids (int) below the tokenizer's vocab_size "
            f"({tokenizer.vocab_size}), and not empty, received {keep[:5]!r}"
            f"{'...' if len(keep) > 5 else ''}."
        )
    return ids
