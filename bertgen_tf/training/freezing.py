"""Which parts of a model train: new weights, frozen layers, layers unfrozen one by one.

Freezing sets Keras's `trainable` on the layers of a stack; saved models keep it.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras

from bertgen_tf.checks import check_integer
from bertgen_tf.network import weights
from bertgen_tf.network.weights import NEW_IN_DECODER

if TYPE_CHECKING:
    from bertgen_tf.models.encoder_decoder import EncoderDecoderModel


def new_variables(model: "EncoderDecoderModel") -> list[keras.Variable]:
    """The variables of an `EncoderDecoderModel` that no checkpoint provided at first.

    `model.source_checkpoint`, which saved models keep, determines them. A model that was read whole
    has none. In a warm start they are the side that is not named there, and what no encoder has:
    cross-attention, the output bias and, where there are any, the head's transform and matrix;
    without a record, only the latter. What both sides share is new if it is new for both.
    """
    source = model.source_checkpoint
    if "model" in source:
        return []
    known: set[int] = set()
    for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        if source and side not in source:
            continue
        for name, part in weights.named_variables(stack).items():
            if side == "encoder" or not re.fullmatch(NEW_IN_DECODER, name):
                known.add(id(getattr(part, "variable", part)))
    return [v for v in model.weights if id(v) not in known and not v.name.startswith("lora_")]


def freeze(
    model: "EncoderDecoderModel",
    *,
    encoder_layers: int | str | Sequence[int] = 0,
    decoder_layers: int | str | Sequence[int] = 0,
    embeddings: bool = False,
) -> None:
    """Freezes pre-trained parts of an `EncoderDecoderModel`; the others are unchanged.

    In a frozen layer, self-attention and feed-forward are frozen. Cross-attention keeps training:
    it has to where it starts at random. What the stacks share is frozen for both. Compile
    afterwards: an optimizer keeps state only for what trains.

    Args:
        encoder_layers, decoder_layers: the lowest n layers, a list of layers, or "all".
        embeddings: also the word and position embeddings of both sides, and so the output matrix,
            unless the decoder has one of its own.

    Raises:
        ValueError: there is no such layer, or the model has LoRA adapters, with which every
            pre-trained weight is frozen.
    """
    _check_no_adapters(model)
    numbers = [
        _layer_numbers(name, value, len(stack.blocks))
        for name, value, stack in (
            ("encoder_layers", encoder_layers, model.encoder),
            ("decoder_layers", decoder_layers, model.decoder),
        )
    ]
    for stack, chosen in zip((model.encoder, model.decoder), numbers, strict=True):
        for number in chosen:
            _set_trainable(_pretrained_parts(stack.blocks[number]), False)
        if embeddings:
            stack.embeddings.trainable = False


def unfreeze(model: "EncoderDecoderModel") -> None:
    """Makes all of an `EncoderDecoderModel` trainable again. Compile afterwards.

    Keras's `model.trainable = True` does nothing if it is True already, not even for sublayers.

    Raises:
        ValueError: the model has LoRA adapters, with which every pre-trained weight is frozen.
    """
    _check_no_adapters(model)
    _set_trainable([model], True)


class GradualUnfreezing(keras.callbacks.Callback):
    """Starts with the pre-trained layers frozen and unfreezes them one by one, from the top.

    Each time, the highest frozen layer of each stack is unfrozen; the embeddings come last.
    Cross-attention, the output bias and whatever else is new, see `new_variables`, train from the
    first step. What is already frozen when training begins, by `freeze` or by hand, stays frozen.
    Source: Howard and Ruder 2018, section 3.3.

    The optimizer has state for all of them from the start. Progress follows from its count of
    updates, or from the number of the epoch: a run that is resumed with both continues where it
    was.

    Args:
        steps_per_layer: updates before each layer is unfrozen.
        epochs_per_layer: the same in epochs, instead of `steps_per_layer`.
        embeddings: False keeps the embeddings frozen to the end.

    Raises:
        ValueError: not exactly one of `steps_per_layer` and `epochs_per_layer`, or it is below 1.
            When training begins: the model has LoRA adapters, or an optimizer that was built
            without state for all that is to be unfrozen.
    """

    def __init__(
        self,
        *,
        steps_per_layer: int | None = None,
        epochs_per_layer: int | None = None,
        embeddings: bool = True,
    ):
        super().__init__()
        if (steps_per_layer is None) == (epochs_per_layer is None):
            raise ValueError(
                "GradualUnfreezing needs one of steps_per_layer and epochs_per_layer, received "
                f"{steps_per_layer!r} and {epochs_per_layer!r}."
            )
        every = steps_per_layer if epochs_per_layer is None else epochs_per_layer
        check_integer("steps_per_layer" if epochs_per_layer is None else "epochs_per_layer", every)
        self.every = every
        self.by_epoch = epochs_per_layer is not None
        self.embeddings = embeddings
        self.stages: list[list[str]] = []
        self.thawed = 0

    def get_state(self) -> dict[str, Any]:
        """What is unfrozen when: lists of layer names, in order. JSON can hold it."""
        return {"stages": [list(stage) for stage in self.stages], "thawed": self.thawed}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` returned, before training begins."""
        self.stages = [list(stage) for stage in state["stages"]]
        self.thawed = state["thawed"]

    def on_train_begin(self, logs: Any = None) -> None:
        _check_no_adapters(self.model)
        before = {variable.path for variable in self.model.trainable_variables}
        if not self.stages:
            self.stages = _stages(self.model, self.embeddings)
        if not self.embeddings:
            _set_trainable([stack.embeddings for stack in _stacks(self.model)], False)
        layers = dict(_named_layers(self.model))
        staged = [layers[name] for stage in self.stages for name in stage]
        _set_trainable(staged, True)
        # With everything that will train: later it would reject variables it does not know.
        trainable = self.model.trainable_variables
        if not self.model.optimizer.built:
            self.model.optimizer.build(trainable)
        known = {variable.path for variable in _slots(self.model.optimizer)}
        missing = [variable.path for variable in trainable if variable.path not in known]
        if missing:
            raise ValueError(
                "GradualUnfreezing needs an optimizer with state for all that is to be unfrozen, "
                f"received one without state for {len(missing)} variables, such as {missing[0]}. "
                "Compile the model again before fit."
            )
        _set_trainable(staged, False)
        for stage in self.stages[: self.thawed]:
            _set_trainable([layers[name] for name in stage], True)
        if {variable.path for variable in self.model.trainable_variables} != before:
            self.model.make_train_function(force=True)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.by_epoch:
            self._thaw(epoch // self.every)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Reading the count waits for the device: not if nothing is left to unfreeze.
        if not self.by_epoch and self.thawed < len(self.stages):
            self._thaw(int(self.model.optimizer.iterations) // self.every)

    def _thaw(self, count: int) -> None:
        count = min(count, len(self.stages))
        if count <= self.thawed:
            return
        layers = dict(_named_layers(self.model))
        for stage in self.stages[self.thawed : count]:
            _set_trainable([layers[name] for name in stage], True)
        self.thawed = count
        # What trains is part of the traced function.
        self.model.make_train_function(force=True)


def frozen_layers(model: keras.Model) -> list[str]:
    """The names of a model's topmost layers that do not train, to be stored in its config."""
    return list(_frozen(model, ""))


def set_frozen_layers(model: keras.Model, names: Sequence[str]) -> None:
    """Freezes the layers that `frozen_layers` named."""
    layers = dict(_named_layers(model))
    _set_trainable([layers[name] for name in names if name in layers], False)


def frozen_slots(model: keras.Model) -> list[str]:
    """Paths of variables that are frozen now and have state in the optimizer."""
    return [variable.path for variable in _slots(model.optimizer) if not variable.trainable]


def _slots(optimizer: Any) -> list[Any]:
    """The variables that an optimizer was built for."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return list(getattr(optimizer, "_trainable_variables", ()))


def _frozen(layer: keras.Layer, prefix: str) -> Iterator[str]:
    for child in layer._flatten_layers(include_self=False, recursive=False):
        if child.weights:
            if not child.trainable:
                yield prefix + child.name
            else:
                yield from _frozen(child, f"{prefix}{child.name}/")


def _named_layers(layer: keras.Layer, prefix: str = "") -> Iterator[tuple[str, keras.Layer]]:
    for child in layer._flatten_layers(include_self=False, recursive=False):
        yield prefix + child.name, child
        yield from _named_layers(child, f"{prefix}{child.name}/")


def _stages(model: "EncoderDecoderModel", embeddings: bool) -> list[list[str]]:
    """Names of the layers that are unfrozen together, in order."""
    new = {id(variable) for variable in new_variables(model)}
    # What is frozen and has state was yet to be unfrozen when the model was saved.
    waiting = set(frozen_slots(model))
    names = {id(layer): name for name, layer in reversed(list(_named_layers(model)))}
    seen: set[int] = set()

    def stage(parts: Sequence[keras.Layer]) -> list[str]:
        """The layers in them with pre-trained variables of their own, unless someone froze them."""
        chosen = []
        for layer in (layer for part in parts for layer in part._flatten_layers()):
            own = [v for v in layer._trainable_variables if id(v) not in new]
            thaws = any(v.trainable or v.path in waiting for v in own)
            if thaws and id(layer) not in seen:
                seen.add(id(layer))
                chosen.append(names[id(layer)])
        return chosen

    stages = []
    blocks = [stack.blocks[::-1] for stack in _stacks(model)]
    for level in itertools.zip_longest(*blocks):
        stages.append(stage([p for block in level if block for p in _pretrained_parts(block)]))
    if embeddings:
        stages.append(stage([stack.embeddings for stack in _stacks(model)]))
    return [names for names in stages if names]


def _stacks(model: "EncoderDecoderModel") -> tuple[Any, Any]:
    return model.encoder, model.decoder


def _pretrained_parts(block: Any) -> list[keras.Layer]:
    parts = block._flatten_layers(include_self=False, recursive=False)
    return [part for part in parts if part is not block.cross_attention]


def _set_trainable(layers: Sequence[keras.Layer], value: bool) -> None:
    # One by one: Keras does nothing, not even for sublayers, if a layer has the value already.
    for part in (part for layer in layers for part in layer._flatten_layers()):
        part.trainable = value


def _layer_numbers(name: str, value: Any, depth: int) -> list[int]:
    if value == "all":
        return list(range(depth))
    numbers = list(range(value)) if isinstance(value, int) and value >= 0 else value
    valid = isinstance(numbers, list | tuple) and all(
        isinstance(number, int) and 0 <= number < depth for number in numbers
    )
    if not valid or isinstance(value, bool):
        raise ValueError(
            f"{name} must be a number from 0 to {depth}, a list of layers from 0 to {depth - 1}, "
            f'or "all", received {value!r}.'
        )
    return list(numbers)


def _check_no_adapters(model: "EncoderDecoderModel") -> None:
    if getattr(model, "lora", None):
        raise ValueError(
            "A model with LoRA adapters has nothing to freeze or unfreeze: its pre-trained weights "
            "are all frozen. Call merge_lora() first, or do without freezing."
        )
