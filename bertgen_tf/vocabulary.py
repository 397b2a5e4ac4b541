"""Small vocabularies: keep only the pieces that a corpus needs."""

import operator
from collections.abc import Iterable

import numpy as np

from bertgen_tf.encoder_decoder import EncoderDecoderModel
from bertgen_tf.weights import Rule, assign, named_variables


def trim_vocabulary(
    model: EncoderDecoderModel, keep: Iterable[str] | Iterable[int]
) -> EncoderDecoderModel:
    """A new, smaller model that knows only the pieces that a corpus needs.

    Embeddings, softmax and tokenizer shrink together. The logits of the kept pieces stay the same,
    and every text of the corpus is still cut into the same pieces, unless it has unknown words.

    Args:
        model: a model with a tokenizer; it is left as it is.
        keep: texts, or the ids to keep. Special tokens always stay.
    """
    if model.tokenizer is None:
        raise ValueError("model must have a tokenizer to be trimmed, and this one has none.")
    tokenizer, kept = model.tokenizer.subset(_ids(model.tokenizer, keep))
    config = model.get_config()
    for side in ("encoder", "decoder"):
        config[side]["config"].update(
            vocab_size=len(kept),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    config["tokenizer"]["config"] = tokenizer.get_config()
    new_ids = {old: new for new, old in enumerate(kept.tolist())}
    config["generation_config"]["suppress_tokens"] = [
        new_ids[old] for old in model.generation_config.suppress_tokens if old in new_ids
    ]
    config["hidden_token_ids"] = [
        new_ids[old] for old in model.preprocessor.hidden_token_ids if old in new_ids
    ]
    trimmed = EncoderDecoderModel.from_config(config)

    def rows(tensor: np.ndarray) -> np.ndarray:
        return tensor[kept]

    rules = [
        Rule("(.*/word_embeddings/embeddings)", r"\1", rows),
        Rule("(decoder/output_(bias|kernel|kernel_scale))", r"\1", rows),
        Rule("(.*)", r"\1"),
    ]
    assign(named_variables(trimmed), named_variables(model), rules, source="The untrimmed model")
    return trimmed


def _ids(tokenizer, keep: Iterable[str] | Iterable[int]) -> list[int]:
    keep = [keep] if isinstance(keep, str) else list(keep)
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
