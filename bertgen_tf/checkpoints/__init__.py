"""Reads and writes models: presets, TF Hub modules, HuggingFace checkpoints, recipes."""
