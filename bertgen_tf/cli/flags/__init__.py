"""The flags of the commands: what is wrong with them is known before TensorFlow is imported."""
