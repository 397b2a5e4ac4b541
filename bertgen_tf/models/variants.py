"""The weights of a model in a model with other settings."""

from typing import Any, TypeVar

import keras

from bertgen_tf.models.encoder_decoder import EncoderDecoderModel

Model = TypeVar("Model", bound=EncoderDecoderModel)


def with_config(model: Model, **changes: Any) -> Model:
    """A new model with the same weights, and with `changes` to what `get_config` gives.

    Args:
        model: it is not modified.
        changes: such as `max_source_length=64`; none that gives variables another shape.
    """
    variant = type(model).from_config({**model.get_config(), **changes})
    variant.set_weights(model.get_weights())
    return variant


def with_dtype(model: Model, dtype: str | dict[str, Any] | keras.DTypePolicy) -> Model:
    """The model, or if it computes by another policy, a new one with the same weights.

    Args:
        model: it is not modified.
        dtype: a name, such as "mixed_bfloat16", a policy, or what `get_config` says of one.
    """
    if isinstance(dtype, dict):
        dtype = keras.dtype_policies.deserialize(dtype)
    policy = keras.dtype_policies.get(dtype)
    if model.dtype_policy == policy:
        return model
    changes = {"dtype": keras.dtype_policies.serialize(policy)}
    config = model.get_config()
    stacks = {name: {**config[name], **changes} for name in ("encoder", "decoder")}
    return with_config(model, **stacks, **changes)
