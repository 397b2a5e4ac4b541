"""Optimizers: schedules, and updates against PyTorch's; averages, accumulation, files."""

import keras
import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf.training import optimizers
from bertgen_tf.training.optimizers import (
    BertAdamW,
    InverseSquareRoot,
    LinearWarmup,
    averaged_weights,
)
from tests.helpers import make_small_model

SOURCES = ["the man saw a bird", "old house", "and the woman left", "the bird sang"]
TARGETS = ["a bird saw", "house old.", "left, the woman", "old"]


def variables(seed=0):
    """Of a new and an old layer, with and without decay."""
    rng = np.random.default_rng(seed)
    shapes = {"old/kernel": (3, 4), "old/bias": (3,), "new/kernel": (2, 5), "new/gamma": (5,)}
    made = []
    for path, shape in shapes.items():
        variable = keras.Variable(rng.normal(size=shape), dtype="float32", name=path.split("/")[1])
        variable._path = path
        made.append(variable)
    return made


def gradients(count, seed=1):
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=v.shape).astype("float32") for v in variables()] for _ in range(count)]


def run(optimizer, steps, trained=None):
    """The variables after gradients were applied, one list a step."""
    made = trained or variables()
    for grads in steps:
        optimizer.apply([keras.ops.convert_to_tensor(grad) for grad in grads], made)
    return [np.asarray(v.numpy()) for v in made]


def without_dropout(model):
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0


def assert_close(values, expected, rtol=2e-6):
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=rtol, atol=1e-6)


def test_linear_warmup():
    schedule = LinearWarmup(0.5, warmup_steps=4, total_steps=10)
    rates = [float(schedule(step)) for step in range(12)]
    np.testing.assert_allclose(rates[:5], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    np.testing.assert_allclose(np.diff(rates[4:11]), -0.5 / 6, rtol=1e-5)
    assert rates[10] == rates[11] == 0
    constant = LinearWarmup(0.5, warmup_steps=1)
    assert float(constant(1)) == float(constant(10**6)) == 0.5


def test_inverse_square_root():
    schedule = InverseSquareRoot(48, learning_rate=0.7, warmup_steps=9)
    steps = np.array([0, 1, 5, 9, 10, 1000])
    expected = 0.7 / np.sqrt(48) * np.minimum(steps / 9, 1) / np.sqrt(np.maximum(steps, 9))
    np.testing.assert_allclose([float(schedule(step)) for step in steps], expected, rtol=1e-6)
    # The highest value that the paper's figures give for the base models.
    assert float(InverseSquareRoot(768)(40_000)) == pytest.approx(9.0e-6, rel=5e-3)
    optimizer = bg.paper_optimizer(48, warmup_steps=9, new_weights_learning_rate=0.5)
    assert optimizer.weight_decay == 0 and optimizer.global_clipnorm is None
    copy = BertAdamW.from_config(optimizer.get_config())
    assert copy._learning_rate.get_config() == optimizer._learning_rate.get_config()
    assert copy.new_weights_factor == 10


@pytest.mark.parametrize("clip", [None, 0.9])
def test_updates_are_those_of_pytorch(clip):
    torch = pytest.importorskip("torch")
    steps = gradients(12)
    schedule = LinearWarmup(0.01, 3, 12)
    optimizer = BertAdamW(
        schedule,
        weight_decay=0.3,
        epsilon=1e-12,  # PyTorch adds it elsewhere
        global_clipnorm=clip,
        new_weights_factor=7.0,
        new_weights=["new/kernel", "new/gamma"],
    )
    tensors = [torch.nn.Parameter(torch.tensor(v.numpy())) for v in variables()]
    # (rate, decay) of each: kernels decay, new weights learn faster.
    settings = ((1, 0.3), (1, 0.0), (7, 0.3), (7, 0.0))
    groups = [
        {"params": [tensor], "lr": 0.01 * factor, "weight_decay": decay}
        for tensor, (factor, decay) in zip(tensors, settings, strict=True)
    ]
    reference = torch.optim.AdamW(groups, eps=1e-12)
    rates = torch.optim.lr_scheduler.LambdaLR(reference, lambda i: float(schedule(i)) / 0.01)
    for grads in steps:
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors, clip)
        reference.step()
        rates.step()
    assert_close(run(optimizer, steps), [tensor.detach().numpy() for tensor in tensors], 1e-5)


def test_amsgrad_is_that_of_keras():
    steps = gradients(6)
    steps += [[grad / 9 for grad in grads] for grads in gradients(6, seed=2)]
    options = {"weight_decay": 0.0, "amsgrad": True}
    expected = run(keras.optimizers.AdamW(0.01, **options), steps)
    assert_close(run(BertAdamW(0.01, **options), steps), expected)


def test_accumulated_batches_are_one_large_batch():
    """Also in what is clipped, in the schedule's steps and in the average."""
    parts = gradients(12)
    whole = [[sum(g) / 3 for g in zip(*parts[i : i + 3], strict=True)] for i in range(0, 12, 3)]
    settings = {"warmup_steps": 2, "total_steps": 5, "ema_momentum": 0.6, "global_clipnorm": 0.5}
    large = bg.default_optimizer(0.02, **settings)
    expected = run(large, whole)
    optimizer = bg.default_optimizer(0.02, gradient_accumulation_steps=3, **settings)
    trained = variables()
    assert_close(run(optimizer, parts, trained), expected)
    averages = [v.numpy() for v in optimizer._model_variables_moving_average]
    assert_close(averages, [v.numpy() for v in large._model_variables_moving_average])
    assert int(optimizer.iterations) == 4
    before = [np.asarray(v.numpy()) for v in trained]
    run(optimizer, gradients(2, seed=5), trained)  # they wait for a third
    for value, old in zip(trained, before, strict=True):
        np.testing.assert_array_equal(value.numpy(), old)


def test_a_variable_that_begins_late_begins_as_at_step_0():
    early, late = gradients(6), gradients(4, seed=3)
    optimizer = bg.default_optimizer(0.02, weight_decay=0.0, global_clipnorm=None)
    trained = variables()
    optimizer.build(trained)
    for grads in early:  # the first two are frozen
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in grads[2:]], trained[2:])
    for value, old in zip(trained[:2], variables()[:2], strict=True):
        np.testing.assert_array_equal(value.numpy(), old.numpy())
    values = run(optimizer, late, trained)
    alone = run(bg.default_optimizer(0.02, weight_decay=0.0, global_clipnorm=None), late)
    assert_close(values[:2], alone[:2])
    assert np.abs(values[3] - alone[3]).max() > 1e-3  # went on from its moments


def test_moving_average():
    steps = gradients(5)
    optimizer = bg.default_optimizer(0.1, ema_momentum=0.7)
    trained = variables()
    optimizer.build(trained)
    frozen = trained.pop(0)
    start = np.asarray(frozen.numpy())
    mean = None
    for grads in steps:
        values = run(optimizer, [grads[1:]], trained)
        old = values if mean is None else mean
        mean = [0.7 * m + 0.3 * v for m, v in zip(old, values, strict=True)]
    model = keras.Model()
    model.optimizer = optimizer
    with averaged_weights(model):
        assert_close([v.numpy() for v in trained], mean)
        np.testing.assert_array_equal(frozen.numpy(), start)
    for value, own in zip(trained, values, strict=True):
        np.testing.assert_array_equal(value.numpy(), own)
    optimizer.finalize_variable_values(trained)  # as fit does with what trains
    assert_close([v.numpy() for v in trained], mean)
    np.testing.assert_array_equal(frozen.numpy(), start)


@pytest.mark.slow
def test_rates_of_new_weights_in_a_model_and_its_file(tmp_path):
    """A loaded model trains on as the one that was saved, bit for bit, amid an accumulation."""
    model = make_small_model("all", max_source_length=9, max_target_length=7)
    without_dropout(model)
    x, y, weight = model.preprocessor(SOURCES, TARGETS)
    start = {v.path: np.array(v.numpy()) for v in model.weights}
    optimizer = bg.default_optimizer(
        1e-3,
        weight_decay=0.0,
        new_weights_learning_rate=1e-2,
        gradient_accumulation_steps=2,
        ema_momentum=0.5,
    )
    model.compile(optimizer=optimizer)
    optimizer.build(model.trainable_variables)  # or the step is traced twice

    def fit(model, batches):
        for _ in range(batches):
            model.train_on_batch(x, y, weight)

    fit(model, 3)
    for variable in model.trainable_variables:
        is_new = "cross_attention" in variable.path or "output_bias" in variable.path
        # Adam's first step is the rate, whatever the gradient.
        step = np.abs(variable.numpy() - start[variable.path]).max()
        assert step == pytest.approx(1e-2 if is_new else 1e-3, rel=0.02), variable.path
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    without_dropout(loaded)
    fit(model, 2)
    fit(loaded, 2)
    pairs = (
        (model.weights, loaded.weights),
        (model.optimizer.variables, loaded.optimizer.variables),
    )
    for ours, theirs in pairs:
        for variable, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(variable.numpy(), other.numpy(), variable.path)
    assert int(loaded.optimizer.iterations) == 2
    with averaged_weights(loaded):
        loaded.save_to_preset(tmp_path / "averaged")
    mean = bg.EncoderDecoderModel.from_preset(tmp_path / "averaged").decoder.output_bias.numpy()
    bias = loaded.decoder.output_bias.numpy()
    assert 1e-4 < np.abs(mean - bias).max() < 1e-2


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (LinearWarmup, {"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        (
            LinearWarmup,
            {"learning_rate": 1.0, "warmup_steps": -1},
            "warmup_steps must be a number of at least 0",
        ),
        (
            LinearWarmup,
            {"learning_rate": 1.0, "warmup_steps": 5, "total_steps": 5},
            "total_steps must be above",
        ),
        (InverseSquareRoot, {"hidden_size": 0}, "hidden_size must be a number of at least 1"),
        (
            InverseSquareRoot,
            {"hidden_size": 4, "warmup_steps": 0},
            "warmup_steps must be a number of at least 1",
        ),
        (optimizers.default_optimizer, {"warmup_steps": 0.1}, "is a share of total_steps"),
        (
            optimizers.default_optimizer,
            {"new_weights_learning_rate": -1.0},
            "must be a finite number above 0",
        ),
        (
            optimizers.default_optimizer,
            {"gradient_accumulation_steps": 0},
            "must be an integer of at least 1",
        ),
        (optimizers.paper_optimizer, {"hidden_size": 4, "ema_momentum": 1.0}, "between 0 and 1"),
    ],
)
def test_errors(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_warmup_as_a_share():
    optimizer = bg.default_optimizer(0.1, warmup_steps=0.25, total_steps=40)
    assert optimizer._learning_rate.get_config() == LinearWarmup(0.1, 10, 40).get_config()
