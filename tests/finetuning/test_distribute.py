"""`fit` under tf.distribute: two replicas train as one with the whole batch."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

# In a process of its own: the devices are made before TensorFlow begins.
SCRIPT = """
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
import numpy as np
from tests.helpers import make_small_model

import bertgen_tf as bg
from bertgen_tf.training.freezing import GradualUnfreezing

SOURCES = ["the man saw a bird", "old house", "and the woman left", "the bird sang"] * 2
# Of equal length: losses are averages of the replicas' averages.
TARGETS = ["a bird saw", "house the old", "left a woman", "the old bird"] * 2


def train(strategy, lora, path):
    with strategy.scope():
        model = make_small_model("all", max_source_length=10, max_target_length=7)
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0
        if lora:
            model.enable_lora(2)
        model.compile(
            optimizer=bg.default_optimizer(
                1e-3,
                warmup_steps=1,
                total_steps=4,
                new_weights_learning_rate=1e-2,
                global_clipnorm=0.5,
                gradient_accumulation_steps=2,
                ema_momentum=0.5,
            ),
            loss=bg.default_loss(0.1),
            run_eagerly=strategy is not mirrored,  # faster for a few steps
        )
    data = tf.data.Dataset.from_tensor_slices(model.preprocessor(SOURCES, TARGETS)).batch(4)
    callbacks = [] if lora else [GradualUnfreezing(steps_per_layer=1)]
    history = model.fit(data.repeat(2), callbacks=callbacks, verbose=0)
    assert int(model.optimizer.iterations) == 2
    weights = [v.numpy() for v in (*model.weights, *model.optimizer.variables)]
    if lora:
        model.merge_lora()
    model.save(path)
    keras.saving.load_model(path)
    return history.history["loss"], weights


# One for all: another begins anew to count its collective operations, and TensorFlow mixes them up.
mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
for lora in (False, True):
    losses, weights = train(tf.distribute.get_strategy(), lora, f"{lora}.keras")
    other_losses, others = train(mirrored, lora, f"{lora}_mirrored.keras")
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    for value, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(other, value, rtol=1e-3, atol=1e-5)
"""


@pytest.mark.slow
def test_two_replicas_train_as_one(tmp_path):
    """With clipping, accumulation, averages, layers that thaw, and with LoRA."""
    script = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tools')]}\n{SCRIPT}"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
