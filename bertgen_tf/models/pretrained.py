"""Encoder-decoders from pre-trained encoders, whatever these were read from.

An encoder has everything that a decoder needs except cross-attention and the output bias.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import keras

from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.network import weights
from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder
from bertgen_tf.network.weights import NEW_IN_DECODER, Rule
from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer

# Of a tokenizer's config: the pieces of the ids, and their case.
_MEANINGS = ("vocabulary", "proto", "lowercase")
CROSS_ATTENTION = ("random", "self_attention")

Tokenizer = BertTokenizer | BertGenerationTokenizer
# Readers build the class that they are asked for: a subclass's `from_hub` returns the subclass.
Encoder = TypeVar("Encoder", bound=BertGenerationEncoder)
Decoder = TypeVar("Decoder", bound=BertGenerationDecoder)
Model = TypeVar("Model", bound=EncoderDecoderModel)


def check_cross_attention(cross_attention: str) -> None:
    """Raises a ValueError for what `build_decoder` does not accept, before anything is read."""
    if cross_attention not in CROSS_ATTENTION:
        raise ValueError(
            f"cross_attention must be one of {', '.join(CROSS_ATTENTION)}, "
            f"received {cross_attention!r}."
        )


def kept_layers(num_layers: int | list[int] | None, depth: int) -> list[int]:
    """The layers that `num_layers` keeps of `depth`: the first n, or those of a rising list."""
    if num_layers is None:
        return list(range(depth))
    layers = list(range(num_layers)) if isinstance(num_layers, int) else num_layers
    valid = (
        isinstance(layers, list | tuple)
        and layers
        and not any(isinstance(i, bool) for i in (num_layers, *layers))
        and all(isinstance(i, int) and 0 <= i < depth for i in layers)
    )
    if not valid or sorted(set(layers)) != list(layers):
        raise ValueError(
            f"num_layers must be a number from 1 to {depth}, or a rising list of layers from 0 to "
            f"{depth - 1}, received {num_layers!r}."
        )
    return list(layers)


def finish_encoder(
    whole: BertGenerationEncoder, kept: list[int], model_class: type[Encoder]
) -> Encoder:
    """The encoder under the current dtype policy, with its layers `kept`."""
    policy = keras.config.dtype_policy()
    same = policy == whole.dtype_policy and type(whole) is model_class
    if len(kept) == len(whole.blocks) and same:
        return whole
    encoder = model_class(whole.config.replace(num_hidden_layers=len(kept)))
    copy_layers(whole, encoder, kept)
    return encoder


def copy_layers(whole: Any, stack: Any, kept: list[int], new: str = r"(?!)") -> None:
    """Assigns to a stack the weights of a deeper one, for the layers `kept` of the latter.

    Args:
        whole, stack: both encoders, or both decoders.
        new: a regular expression for the names of variables that `whole` does not have.
    """
    weights.assign(
        weights.named_variables(stack),
        weights.keep_layers(weights.named_variables(whole), kept),
        [Rule("(.*)", r"\1")],
        source="The whole stack",
        new=new,
    )


def build_decoder(
    encoder: BertGenerationEncoder,
    sharing: str = "none",
    cross_attention: str = "random",
    model_class: type[Decoder] = BertGenerationDecoder,
) -> Decoder:
    """A causal decoder with the weights of an encoder.

    Args:
        sharing: what it shares with the encoder, as for `BertGenerationDecoder`.
        cross_attention: how the weights that an encoder lacks are initialised: "random" (the
            paper's rule) or "self_attention" (a copy of each layer's self-attention, which learns
            to copy from the source much sooner).
        model_class: what to build.
    """
    decoder = model_class(
        encoder.config.replace(add_cross_attention=True),
        encoder=None if sharing == "none" else encoder,
        sharing=sharing,
    )
    if sharing != "all":
        fill_decoder(decoder, encoder)
    if cross_attention == "self_attention":
        copy_self_attention(decoder)
    return decoder


def fill_decoder(decoder: BertGenerationDecoder, encoder: BertGenerationEncoder) -> None:
    """Assigns to a decoder all weights of an encoder of the same sizes."""
    weights.assign(
        weights.named_variables(decoder),
        weights.named_variables(encoder),
        [Rule("(.*)", r"\1")],
        source="The encoder",
        new=NEW_IN_DECODER,
    )


def copy_self_attention(decoder: BertGenerationDecoder) -> None:
    """Initialises the cross-attention of each layer from its self-attention."""
    for block in decoder.blocks:
        start = weights.named_variables(block.self_attention)
        for name, variable in weights.named_variables(block.cross_attention).items():
            variable.assign(start[name].numpy())


def load_encoder_decoder(
    read: Callable[[str], tuple[BertGenerationEncoder, Tokenizer | None]],
    encoder: str,
    decoder: str | None = None,
    *,
    share: bool = False,
    cross_attention: str = "random",
    model_class: type[Model] = EncoderDecoderModel,
    **kwargs: Any,
) -> Model:
    """A sequence-to-sequence model that starts from one pre-trained encoder, or from two.

    Args:
        read: reads an encoder and its tokenizer.
        encoder, decoder: what `read` takes; without `decoder`, the same for both sides. The
            tokenizer is the encoder's.
        share: True is the paper's BERTSHARE: one set of variables for both sides, except
            cross-attention. False is BERT2BERT: two stacks, with one word embedding for encoder,
            decoder and softmax if both come from the same checkpoint.
        cross_attention: as for `build_decoder`.
        model_class: what to build, with the arguments of `EncoderDecoderModel`; a subclass with
            weights of its own is not supported.
        **kwargs: passed on to `EncoderDecoderModel`. `add_bos`, `add_eos` and `mask_first` are True
            unless given (the last if there is a mask token): see `Seq2SeqPreprocessor` for why.
    """
    check_cross_attention(cross_attention)
    same = decoder is None or _is_same(encoder, decoder)
    if share and not same:
        raise ValueError(
            "share=True holds one set of variables, so encoder and decoder must be the same "
            f"checkpoint, received {encoder!r} and {decoder!r}. Leave decoder out."
        )
    encoder_stack, tokenizer = read(encoder)
    if same:
        sharing = "all" if share else "word_embeddings"
        decoder_stack = build_decoder(encoder_stack, sharing, cross_attention)
    else:
        other, other_tokenizer = read(decoder)
        if _vocabulary_of(other_tokenizer) != _vocabulary_of(tokenizer):
            raise ValueError(
                "encoder and decoder must have the same vocabulary and casing, but those of "
                f"{encoder} and {decoder} differ. Choose checkpoints of one family."
            )
        decoder_stack = build_decoder(other, "none", cross_attention)
    source = {"encoder": os.fspath(encoder), "decoder": os.fspath(decoder or encoder)}
    return build_pair(encoder_stack, decoder_stack, tokenizer, source, kwargs, model_class)


def build_pair(
    encoder: BertGenerationEncoder,
    decoder: BertGenerationDecoder,
    tokenizer: Tokenizer | None,
    source: dict[str, str],
    options: dict[str, Any],
    model_class: type[Model] = EncoderDecoderModel,
) -> Model:
    """A model of two stacks, with the special tokens that BERTs need; `options` override."""
    special_tokens: dict[str, bool] = {}
    if tokenizer is not None:
        target = options.get("decoder_tokenizer") or tokenizer
        mask_first = target.mask_token_id is not None
        special_tokens = {"add_bos": True, "add_eos": True, "mask_first": mask_first}
    settings = {**special_tokens, "source_checkpoint": source, **options}
    return model_class(encoder, decoder, tokenizer, **settings)


def _is_same(first: str, second: str) -> bool:
    """Whether two handles name one checkpoint."""
    if os.path.isdir(first) and os.path.isdir(second):
        return os.path.samefile(first, second)
    return os.fspath(first) == os.fspath(second)


def _vocabulary_of(tokenizer: Tokenizer | None) -> Any:
    """What gives ids their meanings; how texts are read may differ."""
    if tokenizer is None:
        return None
    config = tokenizer.get_config()
    kept = [name for name in config if name in _MEANINGS or name.endswith("_token")]
    return type(tokenizer), {name: config[name] for name in kept}
