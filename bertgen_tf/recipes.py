"""The recipes of Rothe, Narayan, Severyn 2020 by name: which side starts from which checkpoint.

Source: Table 1 of the paper (arXiv 1907.12461), and their RoBERTa twins, which it does not have.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from bertgen_tf import hub, huggingface, pretrained, weights
from bertgen_tf import huggingface_files as files
from bertgen_tf.encoder_decoder import EncoderDecoderModel
from bertgen_tf.models import BertGenerationDecoder, BertGenerationEncoder

RANDOM, BERT, ROBERTA = "random", "bert", "roberta"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        encoder, decoder: the kind of checkpoint that a side starts from, or "random".
        share: one stack for both sides, besides cross-attention.
    """

    encoder: str
    decoder: str
    share: bool = False

    @property
    def handles(self) -> tuple[str, ...]:
        """The arguments of `warm_start` that name a checkpoint: those needed, first."""
        if self.decoder == RANDOM or self.share:
            return ("encoder",)
        return ("decoder",) if self.encoder == RANDOM else ("encoder", "decoder")


RECIPES: Mapping[str, Recipe] = {
    "RND2RND": Recipe(RANDOM, RANDOM),
    "BERT2RND": Recipe(BERT, RANDOM),
    "RND2BERT": Recipe(RANDOM, BERT),
    "BERT2BERT": Recipe(BERT, BERT),
    "BERTSHARE": Recipe(BERT, BERT, share=True),
    "ROBERTA2RND": Recipe(ROBERTA, RANDOM),
    "RND2ROBERTA": Recipe(RANDOM, ROBERTA),
    "ROBERTA2ROBERTA": Recipe(ROBERTA, ROBERTA),
    "ROBERTASHARE": Recipe(ROBERTA, ROBERTA, share=True),
}
# The model types of HuggingFace that are of a kind; TF Hub modules are BERTs.
_KINDS = {BERT: ("bert", "bert-generation"), ROBERTA: ("roberta", "bert-generation")}


def warm_start(
    name: str,
    encoder: str | os.PathLike | None = None,
    decoder: str | os.PathLike | None = None,
    *,
    cross_attention: str = "random",
    num_layers: int | list[int] | None = None,
    tokenizer: pretrained.Tokenizer | None = None,
    verify: bool = True,
    **kwargs: Any,
) -> EncoderDecoderModel:
    """A model that starts as the paper's table says.

        bertgen_tf.warm_start("BERT2BERT", encoder="bert-base-cased")

    Encoder, decoder and softmax hold one word embedding, of the checkpoint if one of the sides is.
    A random side has the sizes and the vocabulary of the other side's checkpoint, and new weights.

    Args:
        name: a key of `RECIPES`.
        encoder, decoder: checkpoints, each a TF Hub BERT module or a HuggingFace checkpoint (a
            folder, a URL, or `org/name`). A random side takes none, but RND2RND: it has the sizes
            and the tokenizer of `encoder`. What shares takes `encoder`; a decoder that is none of
            these is the encoder's checkpoint unless given.
        cross_attention: how the weights that no checkpoint has begin: "random" (the paper's rule),
            or "self_attention" (a copy of each layer's self-attention), for a decoder that is not
            random.
        num_layers: keeps the first n layers of the checkpoints, or those of a list; a random side
            has as many.
        tokenizer: in place of the checkpoint's, of HuggingFace only, see
            `huggingface.load_encoder_decoder`.
        verify: of TF Hub modules, see `hub.load_encoder`.
        **kwargs: passed on to `EncoderDecoderModel`; its options for special tokens are as for
            `hub.load_encoder_decoder`.

    Raises:
        FileNotFoundError, ImportError: a checkpoint cannot be found, or read.
        ValueError: there is no such recipe, it has no use for an argument, lacks one, or a
            checkpoint is of another kind or cannot be read.
    """
    recipe = _find(name)
    handles = {"encoder": encoder, "decoder": decoder}
    _check_handles(name, recipe, handles)
    pretrained.check_cross_attention(cross_attention)
    if recipe.decoder == RANDOM and cross_attention != "random":
        raise ValueError(
            f"cross_attention={cross_attention!r} copies what a checkpoint has, and the decoder of "
            f"{name} is random. Leave it at 'random'."
        )
    for side, handle in handles.items():
        if handle is not None:
            _check_kind(name, side, handle, getattr(recipe, side), tokenizer)

    def read(handle: str) -> tuple[BertGenerationEncoder, pretrained.Tokenizer | None]:
        if files.is_huggingface(handle):
            return huggingface.load_encoder_with_tokenizer(handle, num_layers, tokenizer)
        return hub.load_encoder_with_tokenizer(handle, num_layers, verify)

    if RANDOM not in (recipe.encoder, recipe.decoder):
        return pretrained.load_encoder_decoder(
            read, encoder, decoder, share=recipe.share, cross_attention=cross_attention, **kwargs
        )
    whole, own = read(encoder if decoder is None else decoder)
    stack = BertGenerationEncoder(whole.config) if recipe.encoder == RANDOM else whole
    target = BertGenerationDecoder(
        whole.config.replace(add_cross_attention=True), stack, "word_embeddings"
    )
    if recipe.decoder != RANDOM:
        pretrained.fill_decoder(target, whole)
        if cross_attention == "self_attention":
            pretrained.copy_self_attention(target)
    source = {
        side: os.fspath(handle)
        for side, handle in handles.items()
        if getattr(recipe, side) != RANDOM
    }
    return pretrained.build_pair(stack, target, own, source, kwargs)


@dataclasses.dataclass(frozen=True)
class WarmStartReport:
    """How many parameters a model has, and where they came from before training.

    Attributes:
        total: all of them.
        embedding: those of the word and position embeddings.
        initialised: those that a checkpoint gave.
        random: the others: random stacks, cross-attention (also where it began as a copy of
            self-attention) and the output bias.
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

    What began as what is told by `model.source_checkpoint`, which presets keep: a side that it does
    not name was random. Of a model that was read whole, everything came from a checkpoint.
    """
    source = model.source_checkpoint
    sizes: dict[int, int] = {}
    embeddings, initialised = set(), set()
    for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        for name, part in weights.named_variables(stack).items():
            variable = getattr(part, "variable", part)
            sizes[id(variable)] = math.prod(variable.shape)
            if name.endswith("/embeddings"):
                embeddings.add(id(variable))
            new = side == "decoder" and re.fullmatch(pretrained.NEW_IN_DECODER, name)
            if "model" in source or (side in source and not new):
                initialised.add(id(variable))
    total, known = sum(sizes.values()), sum(sizes[key] for key in initialised)
    return WarmStartReport(total, sum(sizes[key] for key in embeddings), known, total - known)


def _find(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, received {name!r}.")
    return RECIPES[name]


def _check_handles(name: str, recipe: Recipe, handles: dict[str, Any]) -> None:
    taken = recipe.handles
    given = [side for side, handle in handles.items() if handle is not None]
    if taken[0] not in given:
        raise ValueError(f"{name} needs {taken[0]}= (a checkpoint), received none.")
    superfluous = [side for side in given if side not in taken]
    if superfluous:
        why = "shares the encoder's stack" if recipe.share else f"has a random {superfluous[0]}"
        raise ValueError(
            f"{name} {why} and takes no {superfluous[0]}=, received {handles[superfluous[0]]!r}. "
            "Leave it out, or choose another recipe."
        )


def _check_kind(name: str, side: str, handle: Any, kind: str, tokenizer: Any) -> None:
    """Refuses a checkpoint of another kind by its configuration, before weights are read."""
    if not files.is_huggingface(handle):
        if kind == ROBERTA:
            raise ValueError(
                f"{name} needs {side}= to be a HuggingFace checkpoint of a RoBERTa, received "
                f"{handle!r}, which is none."
            )
        if tokenizer is not None:
            raise ValueError(
                f"tokenizer= goes with HuggingFace checkpoints, received it with {side}={handle!r}."
            )
        return
    found = huggingface.model_type_of(handle)
    if found not in _KINDS.get(kind, _KINDS[BERT] + _KINDS[ROBERTA]):
        raise ValueError(
            f"{name} needs {side}= to be a {kind} checkpoint, received {handle!r}, which is of "
            f"type {found}."
        )
