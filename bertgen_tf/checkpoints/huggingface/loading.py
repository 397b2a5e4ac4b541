"""Hugging Face checkpoints: encoder-decoders in and out; BERT, RoBERTa, GPT-2 as warm starts.

A checkpoint is a folder as transformers 4 and 5 write it, or `org/name` of one on the hub. What is
read: `config.json`, `generation_config.json`, weights in safetensors (whole or in shards) or, with
torch, in `pytorch_model.bin`, and the tokenizer's files.

Everything is checked before anything is used: an option, a setting or a tensor that we do not
support is an error, and one error lists all of a kind.
"""

import os
import pathlib
import warnings
from typing import Any

import numpy as np

from bertgen_tf.checkpoints.huggingface import config as configs
from bertgen_tf.checkpoints.huggingface import files, gpt2, tokenizers
from bertgen_tf.checkpoints.huggingface import weights as names
from bertgen_tf.checkpoints.huggingface.files import CONFIG_FILE, GENERATION_FILE
from bertgen_tf.checks import first_line
from bertgen_tf.config import TOKEN_IDS, BertGenerationConfig
from bertgen_tf.models import pretrained
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.models.pretrained import Decoder, Encoder, Model
from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder
from bertgen_tf.network.weights import CROSS_ATTENTION, assign, named_variables

# What Hugging Face's tokenizers put before and after each source.
_AROUND_SOURCES = {"bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>")}


def kind_of(folder: str | os.PathLike) -> str:
    """What a checkpoint holds: "encoder-decoder", "encoder" or "decoder".

    Raises:
        FileNotFoundError, ImportError, ValueError: see `load_encoder_decoder`.
    """
    path = files.resolve(folder)
    values = files.read_json(path / CONFIG_FILE)
    kind = configs.model_type(values, os.fspath(path / CONFIG_FILE))
    if kind == configs.ENCODER_DECODER:
        return "encoder-decoder"
    return "decoder" if values.get("is_decoder") or kind == gpt2.GPT2 else "encoder"


def load_encoder_decoder(
    folder: str | os.PathLike | None = None,
    *,
    encoder: str | os.PathLike | None = None,
    decoder: str | os.PathLike | None = None,
    share: bool | None = None,
    cross_attention: str | None = None,
    num_layers: int | list[int] | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    model_class: type[Model] = EncoderDecoderModel,
    **kwargs: Any,
) -> Model:
    """An encoder-decoder read whole from one checkpoint, or warm-started from encoders.

    Args:
        folder: an encoder-decoder, each side a bert-generation, bert or roberta. Its start token
            (`decoder_start_token_id`) is what we call bos; a BERT without one has its [CLS] and
            [SEP] as bos and eos. Its generation settings are kept; if they specify no length, it is
            that of a new model (at most 64 tokens), not transformers' 20. Texts are read up to the
            number of positions, unless `save` stored other lengths; special tokens spelled out in
            them are special tokens, as in transformers, unless `split_special_tokens` is stored.
            Before a bert or roberta decoder, sources get bos and eos, as from Hugging Face's
            tokenizers; targets get no second bos, which those add, too.
        encoder, decoder: instead of `folder`, checkpoints of encoders (bert-generation, bert,
            roberta); without `decoder`, the same one for both sides.
        share: one set of variables for both sides, except cross-attention. With `folder`, None
            follows its `tie_encoder_decoder`, or makes two stacks if both are stored and differ, as
            transformers 5 trains them; True needs equal stacks, False makes two. With `encoder`,
            None is False.
        cross_attention: with `encoder` only: "random" (the default) or "self_attention", as for
            `pretrained.build_decoder`.
        num_layers: with `encoder` only: keeps the first n layers, or those of a list.
        tokenizer: replaces the checkpoint's. With `encoder`, if its vocabulary is not the
            checkpoint's, the embeddings follow its pieces: this way a RoBERTa can start a model
            with the SentencePiece vocabulary of the BertGeneration originals. Special tokens are
            matched by role; a piece that the checkpoint lacks gets the mean of all rows.
        model_class: what to build, with the arguments of `EncoderDecoderModel`; a subclass with
            weights of its own is not supported.
        **kwargs: passed on to `EncoderDecoderModel`. `generation_config` replaces the settings of
            `folder`, including those that are not supported.

    Raises:
        FileNotFoundError: there is no such folder or file, or it cannot be fetched.
        ImportError: a hub name without huggingface_hub, or `pytorch_model.bin` without torch.
        ValueError: a file is damaged, or something in it is not supported.
    """
    if (folder is None) == (encoder is None):
        raise ValueError(
            "from_huggingface takes either the folder of an encoder-decoder or encoder=, received "
            f"folder={folder!r} and encoder={encoder!r}."
        )
    if folder is None:
        return pretrained.load_encoder_decoder(
            lambda name: load_encoder_with_tokenizer(name, num_layers, tokenizer),
            encoder,
            decoder,
            share=bool(share),
            cross_attention=cross_attention or "random",
            model_class=model_class,
            **kwargs,
        )
    options = {"decoder": decoder, "cross_attention": cross_attention, "num_layers": num_layers}
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} goes with encoder=, not with the folder of an encoder-decoder, "
            f"received {folder!r}."
        )
    kwargs.setdefault("source_checkpoint", {"model": os.fspath(folder)})
    return _load_pair(files.resolve(folder), share, tokenizer, model_class, kwargs)


def load_encoder(
    folder: str | os.PathLike,
    *,
    num_layers: int | list[int] | None = None,
    model_class: type[Encoder] = BertGenerationEncoder,
) -> Encoder:
    """An encoder from a bert-generation, bert or roberta checkpoint.

    Token type 0 and, for RoBERTa, the first position (its padding id + 1) are folded into the
    position embeddings. Poolers and heads are left out, and so is the cross-attention of
    checkpoints that were converted from a shared stack.

    Args:
        folder: the checkpoint.
        num_layers: keeps the first n layers, or those of a list, counted from 0.
        model_class: what to build.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `load_encoder_decoder`.
    """
    return load_encoder_with_tokenizer(
        folder, num_layers, None, need_ids=False, model_class=model_class
    )[0]


def load_decoder(
    folder: str | os.PathLike,
    *,
    cross_attention: str | None = None,
    num_layers: int | list[int] | None = None,
    model_class: type[Decoder] = BertGenerationDecoder,
) -> Decoder:
    """A decoder from a bert-generation, bert, roberta or gpt2 checkpoint.

    Args:
        folder: the checkpoint. A GPT-2, or one that says `is_decoder`, is loaded unchanged, with
            its head and with or without cross-attention; any other is a warm start: its heads are
            left out, and it becomes causal.
        cross_attention: how cross-attention is initialised if the checkpoint has none: "random" or
            "self_attention", as for `pretrained.build_decoder`. None is "random" for a warm start,
            and leaves a decoder without cross-attention unchanged.
        num_layers: keeps the first n layers, or those of a list, counted from 0.
        model_class: what to build.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `load_encoder_decoder`.
    """
    if cross_attention is not None:
        pretrained.check_cross_attention(cross_attention)
    path = files.resolve(folder)
    stack = _read_stack(path)
    if not stack.is_decoder:
        encoder, _ = load_encoder_with_tokenizer(path, num_layers)
        return pretrained.build_decoder(encoder, "none", cross_attention or "random", model_class)
    source = os.fspath(folder)
    if stack.kind == gpt2.GPT2:
        checkpoint = load_gpt2(path, num_layers=num_layers)
        new = not checkpoint.config.add_cross_attention and cross_attention is not None
        config = checkpoint.config
        decoder = model_class(config.replace(add_cross_attention=True) if new else config)
        checkpoint.fill(decoder, new_cross_attention=new)
        if new and cross_attention == "self_attention":
            pretrained.copy_self_attention(decoder)
        return decoder
    tensors, parts = _read_lone(path, stack, source)
    names.check_sizes(tensors, stack.config, source)
    kept = pretrained.kept_layers(num_layers, stack.config.num_hidden_layers)
    whole = model_class(stack.config)
    assign(named_variables(whole), tensors, names.decoder_rules(parts), source=source)
    crossed = stack.config.add_cross_attention
    if len(kept) == len(whole.blocks) and (crossed or cross_attention is None):
        return whole
    decoder = model_class(
        stack.config.replace(
            num_hidden_layers=len(kept),
            add_cross_attention=crossed or cross_attention is not None,
        )
    )
    missing = {} if crossed else {"new": CROSS_ATTENTION}
    pretrained.copy_layers(whole, decoder, kept, **missing)
    if cross_attention == "self_attention" and not crossed:
        pretrained.copy_self_attention(decoder)
    return decoder


def load_gpt2(name: str | os.PathLike, **options: Any) -> gpt2.Checkpoint:
    """Reads a GPT-2 checkpoint; see `gpt2.read_checkpoint` for the options.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `load_encoder_decoder`.
    """
    path = files.resolve(name)
    stack = _read_stack(path)
    if stack.kind != gpt2.GPT2:
        raise ValueError(f"{name} should hold a GPT-2, but holds a model of type {stack.kind}.")
    return gpt2.read_checkpoint(path, stack.config, **options)


def read_config(folder: str | os.PathLike) -> tuple[str, BertGenerationConfig]:
    """The `model_type` of a lone stack, and its sizes, before its weights are read.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `load_encoder_decoder`.
    """
    stack = _read_stack(files.resolve(folder))
    return stack.kind, stack.config


def _load_pair(
    path: pathlib.Path,
    share: bool | None,
    tokenizer: tokenizers.Tokenizer | None,
    model_class: type[Model],
    kwargs: dict[str, Any],
) -> Model:
    source = os.fspath(path)
    values = files.read_json(path / CONFIG_FILE)
    kind = configs.model_type(values, os.fspath(path / CONFIG_FILE))
    if kind != configs.ENCODER_DECODER:
        raise ValueError(
            f"{path} should hold an encoder-decoder, but holds a model of type {kind}. Pass it as "
            f"encoder= to start an encoder-decoder from it."
        )
    generation = None
    if (path / GENERATION_FILE).is_file():
        generation = files.read_json(path / GENERATION_FILE)
    pair = configs.read_pair(
        values, generation, source, read_generation=kwargs.get("generation_config") is None
    )
    sharing = pair.sharing if share is None else ("all" if share else "none")
    config, tokenizer, special_tokens = _text_of_pair(path, pair, tokenizer, kwargs)
    parts = names.DECODERS[pair.decoder.kind]
    prefix = f"decoder.{parts.stack}"
    tensors = files.read_tensors(path)
    names.tie_head(tensors, parts, config.tie_word_embeddings, source, "decoder.")
    if "all" in (sharing, pair.sharing):
        names.complete_stacks(tensors, prefix)
    for stack, own in ((pair.encoder, "encoder."), (pair.decoder, prefix)):
        if stack.kind == configs.BERT_GENERATION:
            if pair.encoder.kind != pair.decoder.kind:  # those of the other stack
                tensors.pop(own + names.TOKEN_TYPES, None)
        else:
            names.fold_embeddings(tensors, stack.first_position, source, own)
    differing = names.unify_shared(tensors, sharing, prefix)
    if differing:
        if share:
            raise ValueError(
                f"{source} should hold equal weights of encoder and decoder to share them, but "
                f"{len(differing)} tensors differ, such as {', '.join(differing[:3])}. Without "
                "share=True there are two stacks."
            )
        warnings.warn(
            f"{source} says that encoder and decoder share weights, but {len(differing)} tensors "
            f"differ, such as {', '.join(differing[:3])}: they are read as two stacks.",
            stacklevel=2,
        )
        sharing = "none"
    names.check_sizes(tensors, pair.encoder.config, source, "encoder.")
    names.check_sizes(tensors, config, source, prefix)
    settings = {
        "generation_config": pair.generation,
        "max_source_length": pair.encoder.config.max_position_embeddings,
        "max_target_length": config.max_position_embeddings,
        **special_tokens,
        **pair.preprocessor,
    }
    settings |= {name: value for name, value in kwargs.items() if value is not None}
    encoder = BertGenerationEncoder(pair.encoder.config)
    decoder = BertGenerationDecoder(
        config, encoder=None if sharing == "none" else encoder, sharing=sharing
    )
    try:
        model = model_class(encoder, decoder, tokenizer, **settings)
    except (TypeError, ValueError) as error:
        if not pair.preprocessor:
            raise
        raise ValueError(
            f"{source}/config.json should hold settings under {configs.OWN} that make a model with "
            f"the arguments given, but building it failed: {first_line(error)}"
        ) from error
    assign(named_variables(model), tensors, names.pair_rules(parts), source=source)
    return model


def load_encoder_with_tokenizer(
    name: str | os.PathLike,
    num_layers: int | list[int] | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    *,
    need_ids: bool = True,
    model_class: type[Encoder] = BertGenerationEncoder,
) -> tuple[Encoder, tokenizers.Tokenizer | None]:
    """An encoder with its tokenizer; `need_ids` if it will also be a decoder."""
    path = files.resolve(name)
    source = os.fspath(name)
    stack = _read_stack(path)
    if stack.kind == gpt2.GPT2:
        raise ValueError(
            f"{source} should hold an encoder, but holds a GPT-2, which is a decoder: "
            "BertGenerationDecoder.from_huggingface and warm_start read it."
        )
    if stack.config.add_cross_attention:
        raise ValueError(
            f"{source} should hold an encoder, but holds a decoder with cross-attention: "
            "BertGenerationDecoder.from_huggingface reads it."
        )
    if stack.is_decoder and stack.kind in ("bert", "roberta"):
        raise ValueError(
            f"{source} should hold an encoder, but its is_decoder makes it a language model, which "
            "reads from left to right: BertGenerationDecoder.from_huggingface reads it."
        )
    own, changes = None, {}
    if need_ids:
        # A BERT's configuration has no bos and eos, or ids that were never used.
        ids = _ids(stack.config) if not stack.missing_ids and stack.kind != "bert" else None
        try:
            own = tokenizers.read_tokenizer(path, ids, rows=stack.config.vocab_size)
        except ValueError:
            # Of another size, it cannot be another reading of the same vocabulary.
            if tokenizer is None or tokenizer.vocab_size != stack.config.vocab_size:
                raise
        chosen = tokenizer or own
        if chosen is not None:
            changes = {field: getattr(chosen, field) for field in TOKEN_IDS}
        elif stack.missing_ids:
            raise ValueError(
                f"{source} has no bos_token_id and eos_token_id, and no vocabulary to take them "
                "from. In Python: from_huggingface(..., tokenizer=...)."
            )
    tensors, _ = _read_lone(path, stack, source)
    names.check_sizes(tensors, stack.config, source)
    kept = pretrained.kept_layers(num_layers, stack.config.num_hidden_layers)
    if tokenizer is not None and own is not None and own.get_vocab() != tokenizer.get_vocab():
        rows = tokenizers.rows_by_piece(own, tokenizer)
        changes["vocab_size"] = tokenizer.vocab_size
        matrix = tensors[names.WORD_EMBEDDINGS]
        tensors[names.WORD_EMBEDDINGS] = tokenizers.permuted_rows(matrix, rows)
    try:
        config = stack.config.replace(**changes)
    except ValueError as error:
        raise ValueError(f"{source} does not fit the tokenizer: {error}") from error
    whole = model_class(config)
    assign(named_variables(whole), tensors, [names.NOT_IN_ENCODER, *names.rules()], source=source)
    return pretrained.finish_encoder(whole, kept, model_class), tokenizer or own


def _text_of_pair(
    path: pathlib.Path,
    pair: configs.Pair,
    tokenizer: tokenizers.Tokenizer | None,
    options: dict[str, Any],
) -> tuple[BertGenerationConfig, tokenizers.Tokenizer | None, dict[str, bool]]:
    """The decoder's config with all ids, the tokenizer, and which special tokens sources get."""
    config, missing = pair.decoder.config, pair.decoder.missing_ids
    if missing:  # BERT has no start and end tokens of a target, so its [CLS] and [SEP] serve
        source = tokenizer or tokenizers.read_tokenizer(path, None, rows=config.vocab_size)
        if source is None:
            raise ValueError(
                f"{path} has no {' and '.join(missing)} of its decoder, and no vocabulary to take "
                "them from. In Python: from_huggingface(..., tokenizer=...)."
            )
        config = config.replace(**{field: getattr(source, field) for field in missing})
    if tokenizer is None:
        tokenizer = tokenizers.read_tokenizer(path, _ids(config), rows=config.vocab_size)
    around = _AROUND_SOURCES.get(pair.decoder.kind)
    if tokenizer is None or around is None:
        return config, tokenizer, {}
    special_tokens = {"add_bos": True, "add_eos": True}
    vocabulary = tokenizer.get_vocab()
    theirs = [vocabulary.get(piece) for piece in around]
    ours = [config.bos_token_id, config.eos_token_id]
    chosen = special_tokens.keys() <= {*options, *pair.preprocessor}
    if None not in theirs and theirs != ours and not chosen:
        raise ValueError(
            f"{path} has sources between {' and '.join(around)}, of the ids {theirs}, but outputs "
            f"between the ids {ours}; both are the same here. To read sources without them, in "
            "Python: from_huggingface(..., add_bos=False, add_eos=False)."
        )
    return config, tokenizer, special_tokens


def _read_lone(
    path: pathlib.Path, stack: configs.Stack, source: str
) -> tuple[dict[str, np.ndarray], names.DecoderNames]:
    """The tensors of a lone stack, with what is tied or folded as in ours, and its names."""
    parts = names.DECODERS[stack.kind]
    tensors = names.without_prefix(files.read_tensors(path), parts.stack, source)
    parts = parts._replace(stack="")
    if stack.is_decoder or stack.kind == configs.BERT_GENERATION:
        names.tie_head(tensors, parts, stack.config.tie_word_embeddings, source)
    if stack.kind != configs.BERT_GENERATION:
        names.fold_embeddings(tensors, stack.first_position, source)
    return tensors, parts


def _ids(config: BertGenerationConfig) -> dict[str, int]:
    return {field: getattr(config, field) for field in TOKEN_IDS}


def _read_stack(path: pathlib.Path) -> configs.Stack:
    values = files.read_json(path / CONFIG_FILE)
    where = os.fspath(path / CONFIG_FILE)
    if configs.model_type(values, where) == configs.ENCODER_DECODER:
        raise ValueError(
            f"{path} should hold a lone encoder or decoder, but holds an encoder-decoder: "
            "EncoderDecoderModel.from_huggingface reads it."
        )
    return configs.read_stack(values, where)
