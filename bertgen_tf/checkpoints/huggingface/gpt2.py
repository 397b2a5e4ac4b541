"""Hugging Face's GPT-2 checkpoints: fields and tensors, in BERT's terms and in ours."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bertgen_tf.checkpoints.huggingface import files, tokenizers
from bertgen_tf.config import TOKEN_IDS, BertGenerationConfig
from bertgen_tf.models import pretrained
from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder
from bertgen_tf.network.weights import (
    NEW_IN_DECODER,
    Rule,
    assign,
    keep_layers,
    named_variables,
)

GPT2 = "gpt2"
DEFAULTS = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 1024,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 50256,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
# GPT-2's names of fields -> BERT's.
_FIELDS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
    "resid_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_probs_dropout_prob",
    "layer_norm_epsilon": "layer_norm_eps",
}
# Fields of heads that are not read, or that change nothing; and those that must have one value.
_HARMLESS = r"n_ctx|predict_special_tokens|reorder_and_upcast_attn"
_NEUTRAL = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}

_DENSE = {"weight": "kernel", "bias": "bias"}
_NORM = {"weight": "gamma", "bias": "beta"}
_PARTS = {
    "ln_1": ("self_attention/layer_norm", _NORM),
    "attn.c_proj": ("self_attention/output_dense", _DENSE),
    "ln_cross_attn": ("cross_attention/layer_norm", _NORM),
    "crossattention.q_attn": ("cross_attention/query", _DENSE),
    "crossattention.c_proj": ("cross_attention/output_dense", _DENSE),
    "ln_2": ("feed_forward/layer_norm", _NORM),
    "mlp.c_fc": ("feed_forward/intermediate", _DENSE),
    "mlp.c_proj": ("feed_forward/output_dense", _DENSE),
}
# Several projections in one tensor.
_FUSED = {
    "attn.c_attn": [f"self_attention/{part}" for part in ("query", "key", "value")],
    "crossattention.c_attn": [f"cross_attention/{part}" for part in ("key", "value")],
}
# Our names, and theirs.
WORDS = "embeddings/word_embeddings/embeddings"
POSITIONS = "embeddings/position_embeddings/embeddings"
_WORDS, _POSITIONS = "wte.weight", "wpe.weight"
_WHOLE = {
    _WORDS: WORDS,
    _POSITIONS: POSITIONS,
    "ln_f.weight": "final_norm/gamma",
    "ln_f.bias": "final_norm/beta",
}
# Masks that old versions stored.
_BUFFERS = r"h\.\d+\.(attn|crossattention)\.(masked_)?bias"


def bert_fields(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """A `config.json` of GPT-2 with BERT's names; what is not supported becomes a problem."""
    fields: dict[str, Any] = {}
    for field, value in values.items():
        if field in _NEUTRAL:
            if value not in (None, _NEUTRAL[field]):
                problems.append(f"{field}={value!r} (only {_NEUTRAL[field]!r})")
        elif field == "embd_pdrop":
            if value != values.get("resid_pdrop", 0.1):
                problems.append(f"embd_pdrop={value!r} (only the value of resid_pdrop)")
        elif not re.fullmatch(_HARMLESS, field):
            fields[_FIELDS.get(field, field)] = value
    hidden = fields.get("hidden_size", DEFAULTS["hidden_size"])
    if fields.get("intermediate_size") is None and isinstance(hidden, int):
        fields["intermediate_size"] = 4 * hidden
    if fields.get("pad_token_id") is None:  # it has one special token
        fields["pad_token_id"] = fields.get("eos_token_id", DEFAULTS["eos_token_id"])
    return {**fields, "is_decoder": True}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A GPT-2 that was read.

    Attributes:
        source: where it came from.
        config: its stack; the special ids are those of the tokenizer, if there is one.
        tensors: its weights by the names of a decoder of this config.
        tokenizer: with distinct tokens for pad, bos, eos and unk.
    """

    source: str
    config: BertGenerationConfig
    tensors: dict[str, np.ndarray]
    tokenizer: tokenizers.Tokenizer | None

    def fill(
        self,
        stack: BertGenerationEncoder | BertGenerationDecoder,
        *,
        new_cross_attention: bool = False,
    ) -> None:
        """Assigns the weights to a stack of the same sizes; GPT-2 has no output bias."""
        new = NEW_IN_DECODER if new_cross_attention else "output_bias"
        rule = [Rule("(.*)", r"\1")]
        assign(named_variables(stack), self.tensors, rule, source=self.source, new=new)


def read_checkpoint(
    path: pathlib.Path,
    config: BertGenerationConfig,
    *,
    num_layers: int | list[int] | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    max_positions: int | None = None,
    need_ids: bool = False,
) -> Checkpoint:
    """Reads a GPT-2 checkpoint.

    Args:
        path: the folder.
        config: what its `config.json` says.
        num_layers: keeps the first n layers, or those of a list.
        tokenizer: replaces the checkpoint's, with `need_ids`, as for
            `huggingface.load_encoder_decoder`.
        max_positions: keeps at most this many positions.
        need_ids: read the tokenizer as well. GPT-2 has one special token, which ends a text; those
            that it lacks get rows after the vocabulary: the start token's is a copy of the end
            token's, which preceded each text, the others are the mean of all.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `huggingface.load_encoder_decoder`.
    """
    source = os.fspath(path)
    own = tokenizers.read_tokenizer(path, None, append_missing=True) if need_ids else None
    chosen = tokenizer or own
    if need_ids and chosen is None:
        raise ValueError(
            f"{source} has no vocabulary to take its special tokens from. Add its tokenizer "
            "files, or pass a tokenizer."
        )
    if tokenizer is not None and own is None:
        raise ValueError(
            f"{source} has no vocabulary in which the pieces of the tokenizer could be found. Add "
            "its tokenizer files."
        )
    kept = pretrained.kept_layers(num_layers, config.num_hidden_layers)
    tensors = read_tensors(files.read_tensors(path), config, source)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    if max_positions is not None and config.max_position_embeddings > max_positions:
        tensors[POSITIONS] = tensors[POSITIONS][:max_positions]
        changes["max_position_embeddings"] = max_positions
    if chosen is not None:
        matrix = tensors[WORDS]
        rows = np.arange(max(len(matrix), own.vocab_size))
        rows[len(matrix) :] = -1
        if own.bos_token_id >= len(matrix):
            rows[own.bos_token_id] = own.eos_token_id
        if own.get_vocab() != chosen.get_vocab():
            places = tokenizers.rows_by_piece(own, chosen)
            rows = np.where(places >= 0, rows[places], -1)
        tensors[WORDS] = tokenizers.permuted_rows(matrix, rows)
        changes["vocab_size"] = len(rows)
        changes |= {field: getattr(chosen, field) for field in TOKEN_IDS}
    return Checkpoint(source, config.replace(**changes), keep_layers(tensors, kept), chosen)


def read_tensors(
    tensors: dict[str, np.ndarray], config: BertGenerationConfig, source: str
) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint under our names, of the sizes of its configuration.

    Raises:
        ValueError: tensors of other sizes, a head that is not tied, or unknown names.
    """
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in tensors.items()
        if not re.fullmatch(_BUFFERS, name.removeprefix("transformer."))
    }
    head = tensors.pop("lm_head.weight", None)
    problems = list(_wrong_sizes(tensors, config))
    if head is not None and not np.array_equal(head, tensors.get(_WORDS)):
        problems.append("lm_head.weight is not tied to wte.weight")
    read: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if name in _WHOLE:
            read[_WHOLE[name]] = tensor
            continue
        match = re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", name)
        layer, part, kind = match.groups() if match else ("", "", "")
        if part in _PARTS:
            ours, kinds = _PARTS[part]
            # PyTorch's Conv1D has its weights [in, out].
            read[f"layer_{layer}/{ours}/{kinds[kind]}"] = tensor.T if kinds is _DENSE else tensor
        elif part in _FUSED and tensor.shape[-1] % len(_FUSED[part]) == 0:
            pieces = np.split(tensor.T, len(_FUSED[part]))
            for ours, piece in zip(_FUSED[part], pieces, strict=True):
                read[f"layer_{layer}/{ours}/{_DENSE[kind]}"] = piece
        else:
            problems.append(f"{name} {tensor.shape} has no place in a GPT-2")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"{source} should hold the weights of a GPT-2 of the sizes in its config.json, but "
            f"{'; '.join(problems[:10])}{more}."
        )
    return read


def _wrong_sizes(tensors: dict[str, np.ndarray], config: BertGenerationConfig) -> Iterable[str]:
    """What would make a model of this configuration larger than the tensors, or different."""
    hidden = config.hidden_size
    expected = {
        _WORDS: (config.vocab_size, hidden),
        _POSITIONS: (config.max_position_embeddings, hidden),
        "h.0.mlp.c_fc.weight": (hidden, config.intermediate_size),
    }
    for name, shape in expected.items():
        found = tensors[name].shape if name in tensors else None
        if found != shape:
            yield f"{name} has shape {found}, not {shape}"
    layers = {match[1] for name in tensors if (match := re.match(r"h\.(\d+)\.", name))}
    if len(layers) != config.num_hidden_layers:
        yield f"there are {len(layers)} layers h.*, not {config.num_hidden_layers}"
