"""Reads and writes models: presets, exports, TF Hub modules, Hugging Face checkpoints, recipes."""

from bertgen_tf.checkpoints import exports, handles, hub, huggingface, presets
from bertgen_tf.network import sources

sources.connect(exports=exports, handles=handles, hub=hub, huggingface=huggingface, presets=presets)
