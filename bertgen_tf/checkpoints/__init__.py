"""Reads and writes models: presets, TF Hub modules, Hugging Face checkpoints, recipes."""

from bertgen_tf.checkpoints import handles, hub, huggingface, presets
from bertgen_tf.network import sources

sources.connect(handles=handles, hub=hub, huggingface=huggingface, presets=presets)
