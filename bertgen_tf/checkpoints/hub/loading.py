"""TF Hub modules: BERT as encoder and decoder, and the originals as whole models.

A module's own graph has no causal mask, no cross-attention and no cache, so its weights are loaded
into our layers. The module then checks them: it is run on a probe batch beside our model
(`verify`).

Supported are BERT encoders in TF2 SavedModel format (`tensorflow/bert_*`, `tensorflow/small_bert/*`
and similar, as Model Garden's `export_tfhub` writes them) and in TF1 Hub format (`google/bert_*`),
and encoder-decoders in TF1 Hub format (`google/bertseq2seq/*`).

A handle is a folder; a URL in the TF Hub protocol, which is unpacked under `TFHUB_CACHE_DIR`, or
else under `bertgen_tf/hub` in the user's cache folder; or a .tar.gz file as Kaggle serves them,
unpacked there too. Loading a module runs its graph, which can read and write files.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from bertgen_tf.checkpoints.hub import encoders, fetch, modules, originals
from bertgen_tf.checkpoints.hub.known import known_original
from bertgen_tf.models import pretrained
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.models.pretrained import Decoder, Encoder, Model
from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder
from bertgen_tf.tokenizers import BertTokenizer

# Keywords of `load_original` that do not apply to a warm start.
ORIGINAL_OPTIONS = (
    "original",
    *(f for f in originals.SETTINGS if f not in ("max_source_length", "hidden_token_ids")),
)


def load(
    handle: str | os.PathLike | None = None,
    *,
    encoder: str | os.PathLike | None = None,
    decoder: str | os.PathLike | None = None,
    share: bool = False,
    cross_attention: str = "random",
    num_layers: int | list[int] | None = None,
    verify: bool = True,
    model_class: type[Model] = EncoderDecoderModel,
    **kwargs: Any,
) -> Model:
    """What `EncoderDecoderModel.from_hub` returns: an original, or a warm start.

    Args:
        handle, verify: as for `load_original`, which also takes `kwargs` then.
        encoder, decoder, share, cross_attention, num_layers: as for `load_encoder_decoder`, which
            also takes `kwargs` then.
        model_class: what to build, with the arguments of `EncoderDecoderModel`; a subclass with
            weights of its own is not supported.

    Raises:
        ValueError: not exactly one of `handle` and `encoder`, or an option of the other.
    """
    if (handle is None) == (encoder is None):
        raise ValueError(
            "from_hub needs one of handle (an original, such as google/bertseq2seq/*) and "
            f"encoder= (a BERT module to warm-start from), received {handle!r} and {encoder!r}."
        )
    if handle is None:
        _check_options("encoder=", kwargs, ORIGINAL_OPTIONS)
        return load_encoder_decoder(
            encoder,
            decoder,
            share=share,
            cross_attention=cross_attention,
            num_layers=num_layers,
            verify=verify,
            model_class=model_class,
            **kwargs,
        )
    options = {
        "decoder": decoder,
        "share": share or None,
        "cross_attention": None if cross_attention == "random" else cross_attention,
        "num_layers": num_layers,
    }
    _check_options("handle", {n: v for n, v in options.items() if v is not None}, options)
    return load_original(handle, verify=verify, model_class=model_class, **kwargs)


def load_encoder(
    handle: str | os.PathLike,
    *,
    num_layers: int | list[int] | None = None,
    verify: bool = True,
    model_class: type[Encoder] = BertGenerationEncoder,
) -> Encoder:
    """A `BertGenerationEncoder` with the weights of a TF Hub BERT module.

    Args:
        handle: a folder; a URL in the TF Hub protocol (`?tf-hub-format=compressed`); or a .tar.gz
            file; the last two are unpacked as described at the top of this module. In TF2
            SavedModel or TF1 Hub format.
        num_layers: keeps the first n layers, or the layers of a list, counted from 0.
        verify: runs the module on a probe batch and raises if the encoder differs from it.
        model_class: what to build.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: what is there is not a BERT encoder, or cannot be read; the message says what
            was expected and what was found.
    """
    return load_encoder_with_tokenizer(handle, num_layers, verify, model_class)[0]


def load_decoder(
    handle: str | os.PathLike,
    *,
    cross_attention: str = "random",
    num_layers: int | list[int] | None = None,
    verify: bool = True,
    model_class: type[Decoder] = BertGenerationDecoder,
) -> Decoder:
    """A causal `BertGenerationDecoder` with the weights of a TF Hub BERT module.

    Args:
        handle, num_layers, verify, model_class: as for `load_encoder`.
        cross_attention: how the weights that BERT lacks are initialised: "random" (the paper's
            rule) or "self_attention" (a copy of each layer's self-attention, which learns to copy
            from the source much sooner).
    """
    pretrained.check_cross_attention(cross_attention)
    encoder, _ = load_encoder_with_tokenizer(handle, num_layers, verify)
    return pretrained.build_decoder(encoder, "none", cross_attention, model_class)


def load_encoder_decoder(
    encoder: str | os.PathLike,
    decoder: str | os.PathLike | None = None,
    *,
    share: bool = False,
    cross_attention: str = "random",
    num_layers: int | list[int] | None = None,
    verify: bool = True,
    model_class: type[Model] = EncoderDecoderModel,
    **kwargs: Any,
) -> Model:
    """A sequence-to-sequence model warm-started from TF Hub BERT modules.

    Args:
        encoder, decoder: handles as for `load_encoder`; without `decoder`, the same module for
            both sides.
        share: True is the paper's BERTSHARE: one set of variables for both sides, except
            cross-attention. False is BERT2BERT: two stacks, with one word embedding for encoder,
            decoder and softmax if both come from the same module.
        cross_attention, num_layers, verify: as for `load_decoder`.
        model_class: what to build, with the arguments of `EncoderDecoderModel`; a subclass with
            weights of its own is not supported.
        **kwargs: passed on to `EncoderDecoderModel`. `add_bos`, `add_eos` and `mask_first` are True
            unless given (the last if there is a mask token): see `Seq2SeqPreprocessor` for why.
    """
    return pretrained.load_encoder_decoder(
        lambda handle: load_encoder_with_tokenizer(handle, num_layers, verify),
        encoder,
        decoder,
        share=share,
        cross_attention=cross_attention,
        model_class=model_class,
        **kwargs,
    )


def load_original(
    handle: str | os.PathLike,
    *,
    original: str | None = None,
    max_source_length: int | None = None,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    gnmt_alpha: float | None = None,
    normalize_unfinished: bool | None = None,
    hidden_token_ids: Sequence[int] | None = None,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    verify: bool = True,
    name: str = "encoder_decoder",
    model_class: type[Model] = EncoderDecoderModel,
) -> Model:
    """One of the originals, `google/bertseq2seq/*`, or a module like them, as a model of ours.

    The model gives the module's answers. Settings come from keywords first, then the module's
    graph, then the table `ORIGINALS`. A search that ours cannot reproduce raises an error that
    names the difference. Whether the score of an unfinished answer is normalised does not affect
    the answers; if the graph does not specify it, it is False, as in tensor2tensor.

    The model shares what the module shares: everything (roberta24_*), only the word embeddings of
    two stacks (bert24_*; position embeddings are then held twice), or nothing if there are two
    matrices. Its output bias is zero. No special tokens are added to the source unless the module
    adds them.

    An empty text: the module masks padding with a large negative number, so that an empty text
    beside longer ones attends to padding only, uniformly, and its answer depends on its neighbours.
    Alone, its answer is well defined; ours is that one in any batch.

    Text of WordPiece modules is joined with single spaces between words (`prose=False` of
    `Seq2SeqPreprocessor`), as in the modules.

    Args:
        handle: as for `load_encoder`.
        original: which of `ORIGINALS` the module is, such as "roberta24_bbc", if the handle is not
            a URL of tfhub.dev that says so.
        max_source_length, max_new_tokens, num_beams, gnmt_alpha, normalize_unfinished,
            hidden_token_ids, pad_token_id, bos_token_id (the start token), eos_token_id: in place
            of the module's.
        verify: runs the module on a few texts and raises if the encoder's output, or the scores of
            answers if the graph exposes them, differ by more than 1e-4, or if the answers differ at
            all. Only this checks what is not read: how the candidates of a step become answers or
            continue.
        name: of the model.
        model_class: what to build, with the arguments of `EncoderDecoderModel`; a subclass with
            weights of its own is not supported.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: what is there is not such a module, or not `original`, or a setting cannot be
            read, or the two differ.
    """
    given = {
        "pad_token_id": pad_token_id,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "max_source_length": max_source_length,
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "gnmt_alpha": gnmt_alpha,
        "hidden_token_ids": hidden_token_ids,
        "normalize_unfinished": normalize_unfinished,
    }
    known = known_original(handle, original)
    table: dict[str, Any] = {}
    if known is not None:
        checked = ("shared", "tokenizer")  # against the module
        table = {field: getattr(known, field, None) for field in (*given, *checked)}
        table |= {"max_new_tokens": known.max_target_length, "hidden_token_ids": ()}
        table = {field: value for field, value in table.items() if value is not None}
    return originals.read_original(os.fspath(handle), given, table, verify, name, model_class)


def is_original(handle: str | os.PathLike) -> bool:
    """Whether a module is an encoder-decoder, which `load_original` reads, by its variables.

    Raises:
        FileNotFoundError, ValueError: as `load_encoder`, if there is no module.
    """
    path = fetch.resolve(os.fspath(handle))
    return originals.is_original(modules.read_meta_graphs(os.fspath(handle), path))


def _check_options(form: str, options: Iterable[str], others: Iterable[str]) -> None:
    """Raises a ValueError for options of the other form of `EncoderDecoderModel.from_hub`."""
    wrong = sorted(set(options) & set(others))
    if wrong:
        raise ValueError(
            f"from_hub({form}) takes no {', '.join(wrong)}: "
            + (
                "these are settings of originals, from_hub(handle). Pass generation_config=."
                if form == "encoder="
                else "an original is loaded whole. from_hub(encoder=...) warm-starts."
            )
        )


def load_encoder_with_tokenizer(
    handle: str | os.PathLike,
    num_layers: int | list[int] | None = None,
    verify: bool = True,
    model_class: type[Encoder] = BertGenerationEncoder,
) -> tuple[Encoder, BertTokenizer]:
    """What `load_encoder` returns, and the tokenizer of the module."""
    encoder, tokenizer = encoders.read_encoder(os.fspath(handle), verify)
    kept = pretrained.kept_layers(num_layers, encoder.config.num_hidden_layers)
    return pretrained.finish_encoder(encoder, kept, model_class), tokenizer
