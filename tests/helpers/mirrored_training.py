"""Trains the same model on one and on two logical CPUs: prints the numbers of both as JSON."""

import json
import sys

import keras
import numpy as np
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf import finetuning
from bertgen_tf.finetuning.data import TrainingData
from tests.helpers import WORDS, make_small_model

RANDOM = np.random.default_rng(0)
PAIRS = [
    tuple(" ".join(RANDOM.choice(WORDS, RANDOM.integers(1, n))) for n in (15, 14))
    for _ in range(26)
]


def make(strategy: tf.distribute.Strategy) -> bg.EncoderDecoderModel:
    with strategy.scope():
        model = make_small_model("all", max_source_length=14, max_target_length=12)
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0
        model.compile(
            optimizer=bg.default_optimizer(
                0.01,
                global_clipnorm=0.5,  # below the norms here
                gradient_accumulation_steps=2,
                ema_momentum=0.6,
            )
        )
    return model


def train(strategy: tf.distribute.Strategy) -> dict:
    model = make(strategy)
    data = TrainingData(PAIRS, model.preprocessor, 6)
    # The last batch has 2 rows, so that a replica has none.
    assert data.steps_per_epoch == 5
    history = finetuning.train(
        model,
        data,
        steps=10,
        validation=data,
        callbacks=[bg.GenerateCallback([PAIRS[0][0]], [PAIRS[0][1]], jit_compile=False)],
    )
    fitted = make(strategy)
    fitted.fit(data.dataset(0, 10), steps_per_epoch=5, epochs=2, verbose=0)
    names = ("loss", "accuracy", "val_loss", "val_accuracy", "val_exact")
    return {
        "history": {name: history[name] for name in names},
        "fit": fitted.history.history,
        "weights": [w.numpy().tolist() for w in model.weights],
        "fit_weights": [w.numpy().tolist() for w in fitted.weights],
    }


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    mirrored = finetuning.make_strategy("mirrored")
    assert mirrored.num_replicas_in_sync == 2
    json.dump([train(finetuning.make_strategy("auto")), train(mirrored)], sys.stdout)
