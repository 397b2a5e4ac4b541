"""The training loop. It can be stopped and resumed at any step, on one device or many."""

from bertgen_tf.config import STRATEGIES
from bertgen_tf.finetuning.callbacks import GenerateCallback
from bertgen_tf.finetuning.data import TrainingData
from bertgen_tf.finetuning.loop import Diverged, Interrupted, Interval, train
from bertgen_tf.finetuning.replicas import (
    Replicas,
    WorkerLost,
    make_strategy,
    together,
)
from bertgen_tf.finetuning.state import RunFolder

__all__ = [
    "STRATEGIES",
    "Diverged",
    "GenerateCallback",
    "Interrupted",
    "Interval",
    "Replicas",
    "RunFolder",
    "TrainingData",
    "WorkerLost",
    "make_strategy",
    "together",
    "train",
]
