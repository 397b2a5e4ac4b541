"""The recipes of Rothe, Narayan, Severyn 2020 by name: which side starts from which checkpoint.

Source: Table 1 of the paper (arXiv 1907.12461), and three RoBERTa counterparts that it lacks.
"""

import dataclasses
import math
import os
import types
from collections.abc import Mapping
from typing import Any

from bertgen_tf.checkpoints import hub, huggingface
from bertgen_tf.checkpoints.handles import HUGGINGFACE, family_of
from bertgen_tf.checkpoints.huggingface.gpt2 import Checkpoint
from bertgen_tf.config import TOKEN_IDS, BertGenerationConfig
from bertgen_tf.models import pretrained
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder
from bertgen_tf.training import freezing

RANDOM, BERT, ROBERTA, GPT2 = "random", "bert", "roberta", "gpt2"
# The paper uses the first 512 of GPT-2's positions.
GPT2_POSITIONS = 512


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        encoder, decoder: the kind of checkpoint that a side starts from, or "random"; without an
            encoder it is a decoder-only model, which reads the source as the beginning of its text.
        share: one stack for both sides, except cross-attention.
    """

    encoder: str | None
    decoder: str
    share: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        """The arguments of `warm_start` that name checkpoints."""
        if self.encoder in (None, RANDOM) and self.decoder != RANDOM:
            return ("decoder",)
        return ("encoder", "decoder") if self.decoder == GPT2 else ("encoder",)

    @property
    def allowed(self) -> tuple[str, ...]:
        """Those that may be given: without a decoder, two stacks start from one checkpoint."""
        two = self.encoder == self.decoder != RANDOM and not self.share
        return ("encoder", "decoder") if two else self.needed


RECIPES: Mapping[str, Recipe] = types.MappingProxyType(
    {
        "RND2RND": Recipe(RANDOM, RANDOM),
        "BERT2RND": Recipe(BERT, RANDOM),
        "RND2BERT": Recipe(RANDOM, BERT),
        "BERT2BERT": Recipe(BERT, BERT),
        "BERTSHARE": Recipe(BERT, BERT, share=True),
        "ROBERTASHARE": Recipe(ROBERTA, ROBERTA, share=True),
        "GPT": Recipe(None, GPT2),
        "RND2GPT": Recipe(RANDOM, GPT2),
        "BERT2GPT": Recipe(BERT, GPT2),
        "ROBERTA2GPT": Recipe(ROBERTA, GPT2),
        # Not in the paper.
        "ROBERTA2RND": Recipe(ROBERTA, RANDOM),
        "RND2ROBERTA": Recipe(RANDOM, ROBERTA),
        "ROBERTA2ROBERTA": Recipe(ROBERTA, ROBERTA),
    }
)
# Hugging Face's model types of each kind; TF Hub modules are BERTs.
_TYPES = {
    BERT: ("bert", "bert-generation"),
    ROBERTA: ("roberta", "bert-generation"),
    GPT2: ("gpt2",),
    RANDOM: ("bert", "bert-generation", "roberta"),
}


def warm_start(
    name: str,
    encoder: str | os.PathLike | None = None,
    decoder: str | os.PathLike | None = None,
    *,
    cross_attention: str = "random",
    num_layers: int | list[int] | None = None,
    tokenizer: pretrained.Tokenizer | None = None,
    decoder_tokenizer: pretrained.Tokenizer | None = None,
    verify: bool = True,
    **kwargs: Any,
) -> EncoderDecoderModel:
    """A model that starts as in the paper's table.

        bert, gpt2 = "google-bert/bert-base-cased", "openai-community/gpt2"
        bertgen_tf.warm_start("BERT2BERT", encoder=bert)
        bertgen_tf.warm_start("BERT2GPT", encoder=bert, decoder=gpt2)

    Encoder, decoder and softmax share one word embedding, from a checkpoint if either side has one;
    BERT2GPT, ROBERTA2GPT and models with a `decoder_tokenizer` have two, and two tokenizers. A
    random side has the sizes of the other side's checkpoint, BERT's blocks, and new weights.

    GPT is one stack, a language model, that reads the source, the start token and the target: the
    loss is on the target only. Both share its positions: `max_target_length` of them (128, or half
    if there are fewer than 256) are the target's.

    Args:
        name: a key of `RECIPES`.
        encoder, decoder: checkpoints: a TF Hub BERT module or a Hugging Face checkpoint (a folder,
            a URL, or `org/name`). A random side takes none, except in RND2RND, which has the sizes
            and the tokenizer of `encoder`. Shared stacks take `encoder`, GPT takes `decoder`.
            Without `decoder`, two sides of one kind start from the same checkpoint.
        cross_attention: how the weights that no checkpoint has are initialised: "random" (the
            paper's rule), or "self_attention" (a copy of each layer's self-attention), if the
            decoder starts from a checkpoint.
        num_layers: keeps the first n layers of the checkpoints, or those of a list; a random side
            has as many.
        tokenizer: replaces the checkpoint's, for Hugging Face only, see
            `huggingface.load_encoder_decoder`; for RND2RND, any.
        decoder_tokenizer: replaces the checkpoint's for the target, if the decoder is GPT-2 or
            random. A random decoder then has a vocabulary, and embeddings, of its own.
        verify: for TF Hub modules, see `hub.load_encoder`.
        **kwargs: passed on to `EncoderDecoderModel`; its options for special tokens are as for
            `hub.load_encoder_decoder`.

    Raises:
        FileNotFoundError, ImportError: a checkpoint cannot be found, or read.
        ValueError: there is no such recipe, it does not take an argument, lacks one, or a
            checkpoint has the wrong kind or size, or cannot be read.
    """
    recipe = _find(name)
    handles = {"encoder": encoder, "decoder": decoder}
    _check_handles(name, recipe, handles)
    _check_options(name, recipe, cross_attention, decoder_tokenizer)
    _check_kinds(name, recipe, handles, tokenizer)
    source = {
        side: os.fspath(handle)
        for side, handle in handles.items()
        if handle is not None and getattr(recipe, side) != RANDOM
    }
    source = source or {"config": os.fspath(encoder)}
    # RND2RND has no weights in which the pieces of another tokenizer would have to be found.
    replaced = None if recipe.decoder == recipe.encoder == RANDOM else tokenizer

    def read(handle: str) -> tuple[BertGenerationEncoder, pretrained.Tokenizer | None]:
        if family_of(handle) == HUGGINGFACE:
            return huggingface.load_encoder_with_tokenizer(handle, num_layers, replaced)
        return hub.load_encoder_with_tokenizer(handle, num_layers, verify)

    if recipe.decoder == GPT2:
        own = decoder_tokenizer or (tokenizer if recipe.encoder in (None, RANDOM) else None)
        checkpoint = huggingface.load_gpt2(
            decoder,
            num_layers=num_layers,
            tokenizer=own,
            max_positions=GPT2_POSITIONS,
            need_ids=True,
        )
        whole = None if encoder is None else read(encoder)
        return _start_gpt2(recipe, checkpoint, whole, cross_attention, source, kwargs)
    if RANDOM not in (recipe.encoder, recipe.decoder):
        return pretrained.load_encoder_decoder(
            read, encoder, decoder, share=recipe.share, cross_attention=cross_attention, **kwargs
        )
    whole, own = read(encoder if decoder is None else decoder)
    config = whole.config
    if replaced is not tokenizer:
        own, config = tokenizer, _with_vocabulary(config, tokenizer)
    # A random stack is a new one.
    stack = BertGenerationEncoder(config) if recipe.encoder == RANDOM else whole
    config = config.replace(add_cross_attention=True)
    if decoder_tokenizer is not None:
        target = BertGenerationDecoder(_with_vocabulary(config, decoder_tokenizer))
        kwargs["decoder_tokenizer"] = decoder_tokenizer
    else:
        target = BertGenerationDecoder(config, stack, "word_embeddings")
    if recipe.decoder != RANDOM:
        pretrained.fill_decoder(target, whole)
        if cross_attention == "self_attention":
            pretrained.copy_self_attention(target)
    return pretrained.build_pair(stack, target, own, source, kwargs)


def _start_gpt2(
    recipe: Recipe,
    checkpoint: Checkpoint,
    whole: tuple[BertGenerationEncoder, pretrained.Tokenizer | None] | None,
    cross_attention: str,
    source: dict[str, str],
    options: dict[str, Any],
) -> EncoderDecoderModel:
    """A model with a GPT-2 as its decoder; `whole` is the encoder, with its tokenizer."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    if recipe.encoder is None:
        positions = config.max_position_embeddings
        target_length = options.get("max_target_length") or min(128, positions // 2)
        if not isinstance(target_length, int) or not 1 < target_length < positions:
            raise ValueError(
                f"max_target_length must leave some of {positions} positions for the source, which "
                f"shares them with the target in GPT, received {target_length!r}."
            )
        config = config.replace(source_positions=positions - target_length)
        stack = BertGenerationEncoder(config)
        checkpoint.fill(stack)
        # A language model's texts do not have the start and end tokens of BERT's.
        special_tokens = {"add_bos": False, "add_eos": False, "mask_first": False}
        return pretrained.build_pair(
            stack,
            BertGenerationDecoder(config, stack, "all"),
            tokenizer,
            source,
            {**special_tokens, "max_target_length": target_length, **options},
        )
    crossed = config.replace(add_cross_attention=True)
    if whole is None:
        stack = BertGenerationEncoder(config.replace(norm_first=False))
        decoder = BertGenerationDecoder(crossed, stack, "word_embeddings")
    else:
        decoder = BertGenerationDecoder(crossed)
        stack, own = whole
        options = {"decoder_tokenizer": tokenizer, **options}
        tokenizer = own
    checkpoint.fill(decoder, new_cross_attention=True)
    if cross_attention == "self_attention":
        pretrained.copy_self_attention(decoder)
    return pretrained.build_pair(stack, decoder, tokenizer, source, options)


def _with_vocabulary(
    config: BertGenerationConfig, tokenizer: pretrained.Tokenizer
) -> BertGenerationConfig:
    """The config of a random stack for the pieces of a tokenizer."""
    changes = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    return config.replace(vocab_size=tokenizer.vocab_size, **changes)


@dataclasses.dataclass(frozen=True)
class WarmStartReport:
    """How many parameters a model has, and where they came from before training.

    Attributes:
        total: all of them.
        embedding: those of the word and position embeddings.
        initialised: those that a checkpoint provided.
        random: the others: random stacks, cross-attention (even if it began as a copy of
            self-attention), the output bias and adapters.
    """

    total: int
    embedding: int
    initialised: int
    random: int

    def __str__(self) -> str:
        rows = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return "\n".join(f"{name:12}{count:>14,}{count / 1e6:>8.0f}M" for name, count in rows)


def warm_start_report(model: EncoderDecoderModel) -> WarmStartReport:
    """Counts the parameters of a model as the paper's Table 1 does.

    Origins come from `model.source_checkpoint`, which presets store. A side that is not listed
    there, or a model without the record, counts as randomly initialised. In a model that was read
    whole, everything came from a checkpoint.
    """
    sizes = {id(variable): math.prod(variable.shape) for variable in model.weights}
    new = {id(variable) for variable in freezing.new_variables(model)}
    new |= {id(variable) for variable in model.weights if variable.name.startswith("lora_")}
    if not model.source_checkpoint:
        new = set(sizes)
    tables = {
        id(table.embeddings)
        for stack in (model.encoder, model.decoder)
        for table in (stack.embeddings.word_embeddings, stack.embeddings.position_embeddings)
    }
    total, random = sum(sizes.values()), sum(sizes[key] for key in new)
    return WarmStartReport(total, sum(sizes[key] for key in tables), total - random, random)


def _find(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, received {name!r}.")
    return RECIPES[name]


def _check_handles(name: str, recipe: Recipe, handles: dict[str, Any]) -> None:
    missing = [side for side in recipe.needed if handles[side] is None]
    if missing:
        raise ValueError(f"{name} needs {missing[0]}= (a checkpoint), received none.")
    for side, handle in handles.items():
        if handle is None or side in recipe.allowed:
            continue
        why = "shares the encoder's stack" if recipe.share else f"has a random {side}"
        why = why if getattr(recipe, side) is not None else "is decoder-only"
        raise ValueError(
            f"{name} {why} and takes no {side}=, received {handle!r}. Leave it out, or choose "
            "another recipe."
        )


def _check_options(name: str, recipe: Recipe, cross_attention: str, decoder_tokenizer: Any) -> None:
    pretrained.check_cross_attention(cross_attention)
    if cross_attention != "random" and (recipe.decoder == RANDOM or recipe.encoder is None):
        why = "the decoder is random" if recipe.encoder else "there is no cross-attention"
        raise ValueError(
            f"cross_attention={cross_attention!r} initialises cross-attention from a checkpoint, "
            f"but in {name} {why}. Leave it at 'random'."
        )
    two = recipe.decoder == RANDOM or (recipe.decoder == GPT2 and len(recipe.needed) == 2)
    if decoder_tokenizer is not None and not two:
        raise ValueError(
            f"{name} has one vocabulary and takes no decoder_tokenizer. Pass tokenizer=, or choose "
            "a recipe with a random decoder."
        )


def _check_kinds(name: str, recipe: Recipe, handles: dict[str, Any], tokenizer: Any) -> None:
    """Refuses checkpoints of the wrong kind or size by their configurations, before any is read."""
    sizes = {}
    for side, handle in handles.items():
        kind = getattr(recipe, side)
        if handle is None:
            continue
        if family_of(handle) != HUGGINGFACE:
            if kind in (ROBERTA, GPT2):
                raise ValueError(
                    f"{name} needs {side}= to be a Hugging Face checkpoint of type {kind}, "
                    f"received {handle!r}, which is not one."
                )
            if tokenizer is not None and kind != RANDOM:
                raise ValueError(
                    "tokenizer= is only for Hugging Face checkpoints, received it with "
                    f"{side}={handle!r}."
                )
            continue
        found, config = huggingface.read_config(handle)
        if found not in _TYPES[kind]:
            raise ValueError(
                f"{name} needs {side}= to be a checkpoint of type {' or '.join(_TYPES[kind])}, "
                f"received {handle!r}, which is of type {found}."
            )
        if config.add_cross_attention:
            raise ValueError(
                f"{name} needs {side}= to be a checkpoint without cross-attention, received "
                f"{handle!r}, which is the decoder of a trained encoder-decoder."
            )
        sizes[side] = config.hidden_size
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{name} needs encoder= and decoder= of one hidden_size, received "
            f"{handles['encoder']!r} with {sizes['encoder']} and {handles['decoder']!r} with "
            f"{sizes['decoder']}."
        )
