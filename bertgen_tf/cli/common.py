"""What the commands share: the model of --preset, and its settings."""

import argparse

# Both connect readers and writers of models.
from bertgen_tf import checkpoints as checkpoints
from bertgen_tf import export as export
from bertgen_tf.checkpoints import presets
from bertgen_tf.cli.flags import common as flags
from bertgen_tf.cli.flags.errors import user_errors
from bertgen_tf.config import GenerationConfig
from bertgen_tf.generation.settings import check_config
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel


def read_settings(arguments: argparse.Namespace) -> GenerationConfig:
    """The settings of the preset, replaced by those of the flags where given."""
    with user_errors():
        presets.read_config(arguments.preset)  # says what else a folder is
    return flags.read_settings(arguments)


def load_model(arguments: argparse.Namespace, config: GenerationConfig) -> EncoderDecoderModel:
    """The model of --preset, quantized if requested; the settings must fit it."""
    with user_errors():
        model = EncoderDecoderModel.from_preset(arguments.preset)
        check_config(config, model)
        if arguments.quantize:
            model.quantize(arguments.quantize)
    return model
