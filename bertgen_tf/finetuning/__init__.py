"""The training loop: it can be stopped and resumed at any step, on one device or many."""

from bertgen_tf.finetuning.loop import train

__all__ = ["train"]
