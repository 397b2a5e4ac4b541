"""LoRA: small matrices beside frozen projections, trained in their place.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". A projection `x W^T`
becomes `x W^T + (alpha / rank) x A^T B^T`, with A [rank, inputs] initially random and
B [units, rank] initially zero: shapes, scale and initialisation are those of Hugging Face's `peft`.
A warm-started model also has weights that no checkpoint provided, such as cross-attention, see
`bertgen_tf.training.freezing.new_variables`. Adapters make no sense for these: they are trained in
full by default.

An adapter file is a safetensors file with what was trained: `PROJECTION/lora_a` and
`PROJECTION/lora_b` for each adapted projection, named as in `decoder/layer_0/self_attention/query`,
and the new weights under names of the same kind, with matrices as [units, inputs]. Its metadata
holds the settings as JSON, and a checksum, which older files lack.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras

from bertgen_tf.checks import Damaged, shown
from bertgen_tf.data import folders
from bertgen_tf.network.projections import Dense, Projection
from bertgen_tf.network.weights import Rule, assign, named_variables
from bertgen_tf.training.freezing import new_variables
from bertgen_tf.training.tensor_files import load_tensors, write_tensors

if TYPE_CHECKING:
    from bertgen_tf.models.encoder_decoder import EncoderDecoderModel

FORMAT = "bertgen_tf adapter"
_SETTINGS = {"rank": int, "alpha": (int, float), "targets": list, "train_new_weights": bool}


def enable(
    model: "EncoderDecoderModel",
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ("query", "value"),
    train_new_weights: bool = True,
) -> None:
    """See `EncoderDecoderModel.enable_lora`."""
    if model.lora is not None:
        raise ValueError(
            f"model has LoRA adapters already, of rank {model.lora['rank']}. Call merge_lora() "
            "first."
        )
    if model.is_quantized:
        raise ValueError(
            "model must have float32 matrices for LoRA, and those of this one are int8. Enable it "
            "before quantizing, or call dequantize() first."
        )
    targets = [targets] if isinstance(targets, str) else list(targets)
    alpha = rank if alpha is None else alpha
    chosen = _choose(model, targets, train_new_weights)
    largest = min(min(dense.units // dense.parts, dense.kernel.shape[1]) for dense, _ in chosen)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(
            f"rank must be a whole number from 1 to {largest}, the smallest dimension, "
            f"received {rank!r}."
        )
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, received {alpha!r}.")
    new = {id(variable) for variable in new_variables(model)} if train_new_weights else set()
    for variable in model.weights:
        variable.trainable = variable.trainable and id(variable) in new
    with model.distribute_strategy.scope():
        for dense, part in chosen:
            dense.add_adapter(part, rank, alpha / rank)
    model.lora = {
        "rank": rank,
        "alpha": alpha,
        "targets": targets,
        "train_new_weights": train_new_weights,
    }
    model.forget_compiled()


def merge(model: "EncoderDecoderModel") -> None:
    """See `EncoderDecoderModel.merge_lora`."""
    _check_enabled(model)
    _leave(model, Dense.merge_adapters)


def save(model: "EncoderDecoderModel", path: str | os.PathLike) -> None:
    """See `EncoderDecoderModel.save_adapter`."""
    _check_enabled(model)
    tensors = {name: variable.numpy() for name, variable in _trained(model).items()}
    settings = json.dumps({name: model.lora[name] for name in _SETTINGS})
    with folders.whole_file(path) as new:
        write_tensors(new, tensors, {"format": FORMAT, "settings": settings})


def load(model: "EncoderDecoderModel", path: str | os.PathLike) -> None:
    """See `EncoderDecoderModel.load_adapter`."""
    settings, tensors = _read(pathlib.Path(path))
    was_enabled = model.lora is not None
    if was_enabled and {name: model.lora[name] for name in _SETTINGS} != settings:
        raise ValueError(
            f"{path} was saved with the settings {settings}, but the model has adapters with "
            f"{dict(model.lora)}. Load it into a model without adapters."
        )
    if not was_enabled:
        enable(model, **settings)
    try:
        assign(_trained(model), tensors, [Rule("(.*)", r"\1")], source=f"The adapter {path}")
    except ValueError:
        if not was_enabled:
            _leave(model, Dense.remove_adapters)
        raise


def check_merged(model: keras.Model, purpose: str) -> None:
    """Raises a ValueError for a model or stack with adapters.

    Args:
        purpose: what the model is to become, for the message.
    """
    if any(any(dense.adapters) for dense in _denses(model)):
        raise ValueError(
            f"model has LoRA adapters, and {purpose} has no place for them. Call merge_lora() "
            "first; save_adapter(path) keeps them in a file of their own."
        )


def _denses(model: keras.Model) -> list[Dense]:
    layers = (layer for layer in model._flatten_layers() if isinstance(layer, Dense))
    return list({id(layer): layer for layer in layers}.values())


def _projections(layer: keras.Layer, prefix: str = "") -> Iterator[tuple[str, Dense, int]]:
    """Name, layer and part of every projection; a shared one appears under each of its names."""
    for child in layer._flatten_layers(include_self=False, recursive=False):
        name = prefix + child.name
        if isinstance(child, Projection):
            yield name, child.dense, child.number
        elif isinstance(child, Dense):
            if child.parts == 1:
                yield name, child, 0
        else:
            yield from _projections(child, f"{name}/")


def _choose(
    model: "EncoderDecoderModel", targets: Sequence[str], train_new_weights: bool
) -> list[tuple[Dense, int]]:
    """The projections that get an adapter, each once."""
    projections = list(_projections(model))
    unknown = [t for t in targets if not any(_matches(name, t) for name, _, _ in projections)]
    if unknown or not targets:
        known = dict.fromkeys(name.split("/")[-1] for name, _, _ in projections)
        raise ValueError(
            f"targets must be names of projections, of {', '.join(known)}, or the last parts of "
            f"their paths, such as 'cross_attention/query', received {list(targets)!r}."
        )
    new = {id(variable) for variable in new_variables(model)} if train_new_weights else set()
    chosen = {}
    for name, dense, part in projections:
        if any(_matches(name, t) for t in targets) and id(dense.kernel) not in new:
            chosen[id(dense), part] = dense, part
    if not chosen:
        raise ValueError(
            f"targets={list(targets)!r} are new weights in this model, which are trained in full. "
            "Choose others, or pass train_new_weights=False."
        )
    return list(chosen.values())


def _matches(name: str, target: str) -> bool:
    return f"/{name}".endswith(f"/{target}")


def _trained(model: "EncoderDecoderModel") -> dict[str, Any]:
    """What goes into an adapter file: each variable or part of one, under its first name."""
    new = set()
    if model.lora["train_new_weights"]:
        new = {id(variable) for variable in new_variables(model)}
    trained, seen = {}, set()
    for name, variable in named_variables(model).items():
        whole = getattr(variable, "variable", variable)
        key = id(whole), getattr(variable, "rows", slice(0)).start
        if key not in seen and (id(whole) in new or "/lora_" in name):
            seen.add(key)
            trained[name] = variable
    return trained


def _leave(model: "EncoderDecoderModel", each: Any) -> None:
    """Ends LoRA: `each` removes a layer's adapters. Layers again decide what trains."""
    for dense in _denses(model):
        each(dense)
    for layer in model._flatten_layers():
        for variable in layer._trainable_variables:
            variable.trainable = layer.trainable
    model.lora = None
    model.forget_compiled()


def _check_enabled(model: "EncoderDecoderModel") -> None:
    if model.lora is None:
        raise ValueError("model has no LoRA adapters. Call enable_lora or load_adapter first.")


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} should be an adapter, but there is no such file.")
    try:
        tensors, metadata = load_tensors(path)
    except Damaged as error:
        raise Damaged(
            f"path must be a file that save_adapter wrote, but {error}: copy it again."
        ) from error
    try:
        settings = json.loads(metadata.get("settings", "null"))
    except (RecursionError, ValueError):
        settings = None
    valid = (
        set(metadata) == {"format", "settings"}
        and metadata["format"] == FORMAT
        and isinstance(settings, dict)
        and set(settings) == set(_SETTINGS)
        and all(isinstance(settings[name], type_) for name, type_ in _SETTINGS.items())
        and all(isinstance(target, str) for target in settings["targets"])
    )
    if not valid:
        raise ValueError(
            f"{path} should be an adapter that save_adapter wrote, but its metadata is not that of "
            f"one: {shown(metadata)}."
        )
    return settings, tensors
