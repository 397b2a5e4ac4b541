"""The loop that trains: beside Keras's `fit`, on two devices, with Keras's callbacks."""

import json
import os
import re
import resource
import subprocess
import sys
import types

import keras
import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf import finetuning, metrics
from bertgen_tf.finetuning.callbacks import KeepBest, Log, TensorBoardCurves
from bertgen_tf.finetuning.data import TrainingData
from bertgen_tf.finetuning.state import RunFolder
from tests.helpers import ROOT, TESTS, WORDS, make_small_model

RANDOM = np.random.default_rng(0)
# All are padded to 16, so that a step is traced once.
PAIRS = [
    tuple(" ".join(RANDOM.choice(WORDS, RANDOM.integers(1, n))) for n in (15, 14))
    for _ in range(26)
]
LONG = [("bird " * 17, "the " * 18)] * 4  # to 20


def make(**options):
    model = make_small_model("all", max_source_length=20, max_target_length=19)
    model.compile(optimizer=bg.default_optimizer(0.01, **options))
    return model


@pytest.fixture(scope="module")
def data():
    return TrainingData(PAIRS, make().preprocessor, 6)


@pytest.fixture(scope="module")
def two_lengths(data):
    return TrainingData(PAIRS + LONG, data.preprocessor, 6)


@pytest.mark.slow
def test_it_does_what_fit_does(data, tmp_path):
    """The same losses and weights, dropout included, and the same calls of callbacks."""
    calls = {}

    def record(name):
        kinds = ("epoch_begin", "train_batch_begin", "train_batch_end", "test_begin", "test_end")
        callback = keras.callbacks.Callback()
        for kind in kinds:
            seen = calls.setdefault(name, [])
            setattr(callback, f"on_{kind}", lambda *a, k=kind, s=seen, **kw: s.append((k, a[:1])))
        callback.on_epoch_end = lambda epoch, logs: seen.append((epoch, {*logs} - ours))
        return callback

    ours = {"learning_rate", "tokens_per_second", "waited_for_data"}
    model, fitted = make(ema_momentum=0.5), make(ema_momentum=0.5)
    files = [tmp_path / name for name in ("ours.keras", "fit.keras")]
    saves = [keras.callbacks.ModelCheckpoint(path, save_best_only=True) for path in files]
    fitted.optimizer.build(fitted.trainable_variables)  # or `fit` traces its step twice
    steps = data.steps_per_epoch
    history = finetuning.train(
        model,
        data,
        steps=2 * steps,
        validation=data,
        callbacks=[record("ours"), saves[0], keras.callbacks.EarlyStopping(patience=5)],
    )
    expected = fitted.fit(
        data.dataset(0, 2 * steps),
        steps_per_epoch=steps,
        epochs=2,
        verbose=0,
        validation_data=data.dataset(0, steps),
        callbacks=[record("fit"), saves[1]],
    ).history
    for name in ("loss", "accuracy"):
        assert history[name] == pytest.approx(expected[name], rel=1e-5)
    assert {*history} == {*expected, *ours}
    for a, b in zip(model.get_weights(), fitted.get_weights(), strict=True):
        # Rounding alone moves the biases of keys, of which a softmax does not depend.
        np.testing.assert_allclose(a, b, atol=1e-3)
    kept = [call for call in calls["fit"] if call[0] not in ("test_begin", "test_end")]
    assert [c for c in calls["ours"] if c[0] not in ("test_begin", "test_end")] == kept
    assert [call[0] for call in calls["ours"]].count("test_end") == 2
    assert files[0].exists()
    # And `fit` goes on with the same model.
    model.fit(data.dataset(0, 1), verbose=0)


@pytest.mark.slow
def test_validation_is_of_all_tokens_alike(data):
    """As one batch of everything gives it, whatever the shares of the batches."""
    model = make()
    held_out = TrainingData(PAIRS, model.preprocessor, 4, shuffle=False)
    history = finetuning.train(model, data, steps=1, validation=held_out)
    x, y, weight = model.preprocessor(*map(list, zip(*PAIRS, strict=True)))
    loss, accuracy = model.evaluate(x, y, sample_weight=weight, batch_size=26, verbose=0)
    assert history["val_loss"] == pytest.approx([loss], rel=1e-5)
    assert history["val_accuracy"] == pytest.approx([accuracy], rel=1e-5)


@pytest.mark.slow
def test_the_best_weights_are_kept_and_a_plateau_ends_it(data, tmp_path):
    """Scripted values: the best are those of epoch 2, two worse ones follow."""
    model = make(ema_momentum=0.5)
    values = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    seen = []

    class Script(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            logs["val_loss"] = next(values)
            seen.append(self.model.get_weights())

    best = KeepBest(tmp_path / "best.safetensors", "val_loss", patience=2)
    finetuning.train(model, data, steps=10, steps_per_epoch=2, callbacks=[Script(), best])
    assert (len(seen), best.best_epoch, best.best) == (4, 2, 2.0)
    best.load(model)
    for a, b in zip(model.get_weights(), seen[1], strict=True):
        np.testing.assert_array_equal(a, b)
    higher = KeepBest(tmp_path / "other.safetensors", "val_bleu")
    higher.set_model(model)
    for epoch, value in enumerate([float("nan"), 1.0, 3.0, 2.0]):
        higher.on_epoch_end(epoch, {"val_bleu": value})
    assert higher.get_state() == {"best": 3.0, "best_epoch": 3, "waited": 1}


def test_curves_log_and_outputs_on_a_full_disk_are_an_oserror(tmp_path):
    """Not TensorFlow's error, which would mean the memory."""
    pytest.importorskip("tensorboard")
    folder = RunFolder(tmp_path / "model")
    folder.begin({})
    curves = TensorBoardCurves(tmp_path / "tb")
    samples = bg.GenerateCallback(["a"], ["b"], folder=tmp_path / "samples")
    samples.set_model(types.SimpleNamespace(generate=lambda sources, *args, **options: sources))
    curves.on_train_begin()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        for write, file in (
            (lambda: curves.on_epoch_end(0, {"val_loss": 1.0}), tmp_path / "tb"),
            (lambda: folder.log(step=3, loss=1.0), folder / "log.jsonl"),
            (lambda: samples.on_epoch_end(0), tmp_path / "samples/epoch-0001.jsonl"),
        ):
            with pytest.raises(OSError, match="File too large") as caught:
                write()
            assert caught.value.filename == str(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "samples").iterdir())


@pytest.mark.slow
def test_outputs_scores_and_curves(data, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = make()
    sources, references = map(list, zip(*PAIRS[:3], strict=True))
    options = {"folder": tmp_path / "samples", "jit_compile": False, "every": 2}
    samples = bg.GenerateCallback(sources, references, ["exact", "rouge"], **options)
    curves = TensorBoardCurves(tmp_path / "tb", samples, every=2)
    folder = RunFolder(tmp_path / "model")
    folder.begin({})
    log = Log(4, folder)
    callbacks = [samples, log, curves]
    history = finetuning.train(model, data, steps=4, steps_per_epoch=1, callbacks=callbacks)
    expected = model.generate(sources, jit_compile=False)
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        "epoch-0002.jsonl",
        "epoch-0004.jsonl",
    ]
    lines = (tmp_path / "samples" / "epoch-0004.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": s, "output": o, "reference": r}
        for s, o, r in zip(sources, expected, references, strict=True)
    ]
    scores = metrics.compute(["exact", "rouge"], sources, expected, references)
    for name, score in scores.items():
        assert history[f"val_{name}"][-1] == pytest.approx(score.value)
        assert len(history[f"val_{name}"]) == 2
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "epoch" in line] == history["loss"]
    out = capsys.readouterr().out
    assert "epoch 4 of 4: loss " in out
    assert "; validation: exact 0.00, rouge1 " in out
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    tensors = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    assert [event.step for event in tensors["train/loss"]] == [2, 4]
    assert {"train/learning_rate", "train/accuracy", "validation/rouge1"} <= {*tensors}
    text = tensors["samples"][-1].tensor_proto.string_val[0].decode()
    assert all(part in text for part in (sources[0], references[2]))
    for arguments, message in (
        ({"metrics": ["x"]}, "metrics must be among exact"),
        ({"references": ["b", "c"]}, "references"),
        ({"every": 0}, "every must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bg.GenerateCallback(**{"sources": ["a"], "references": ["b"], **arguments})


@pytest.mark.slow
def test_a_step_is_traced_once_a_shape(two_lengths, monkeypatch):
    """Also in later epochs, whose batches come in another order."""
    traced = []
    train_step = bg.EncoderDecoderModel.train_step

    def count(self, batch):
        traced.append(tuple(batch[1].shape))
        return train_step(self, batch)

    monkeypatch.setattr(bg.EncoderDecoderModel, "train_step", count)
    data = two_lengths
    shapes = {tuple(data.batch(step)[1].shape) for step in range(data.steps_per_epoch)}
    finetuning.train(make(), data, steps=3 * data.steps_per_epoch)
    assert len(shapes) == 2
    assert sorted(traced) == sorted(shapes)


def test_fit_works_after_a_training_that_broke_off(data):
    class Break(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise ZeroDivisionError

    model = make()
    with pytest.raises(ZeroDivisionError):
        finetuning.train(model, data, steps=1, callbacks=[Break()])
    assert model.train_function is None  # or `fit` would take ours


def test_the_log_has_no_epoch_twice(tmp_path):
    """What follows the last step of an epoch comes again, if the state is from before it."""
    folder = RunFolder(tmp_path / "model")
    folder.begin({})
    lines = [{"step": 7}, {"step": 7, "epoch": 1}, {"step": 8}]
    for line in lines:
        folder.log(**line)
    folder.cut_log(7, 1, pytest.fail)
    folder.cut_log(7, 1, pytest.fail)
    left = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in left] == lines[:2]
    folder.cut_log(7, 0, pytest.fail)
    assert json.loads((folder / "log.jsonl").read_text()) == lines[0]
    (folder / "run.json").write_text('{"format": "bertgen_tf training", "settings": {}}')
    with pytest.raises(
        ValueError,
        match="should say which training .* is missing or damaged",
    ):
        folder.check(False, False)


@pytest.mark.slow
def test_a_terminal_has_a_bar(data, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = Log(4)
    finetuning.train(make(), data, steps=4, steps_per_epoch=2, callbacks=[log])
    out = capsys.readouterr().out
    assert "Epoch 1/2\n" in out and "Epoch 2/2, 0:00:" in out
    assert "2/2" in out and "loss: " in out and "━" in out


def test_a_resumed_bar_counts_from_where_it_goes_on(monkeypatch, capsys):
    """Its times are those of the steps that it saw; Keras knows no steps from before."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(keras.src.utils.progbar.time, "time", lambda: next(now))
    log = Log(90)
    log.set_params({"epochs": 3, "steps": 40})
    log.set_state({"step": 46})
    log.on_train_begin()
    log.on_epoch_begin(1)
    for _ in range(3):
        log.on_train_batch_end(0, {"loss": 0.5})
    log.end_line()
    log.end_line()
    log.on_epoch_begin(2)
    log.step = 89
    log.on_train_batch_end(9, {"loss": 0.25})
    text = re.sub("\x1b[^m]*m|[\b\r━]", "", capsys.readouterr().out)
    first, header, bar, other, last = text.split("\n")
    assert (first, header) == ("continuing after step 46 of 90", "Epoch 2/3")
    # 10 s a step, 31 of 40 steps to go.
    assert [part.split("  - ")[0] for part in re.findall(r" ?\d+/40 .*?0.5000", bar)] == [
        " 7/40  5:30 10s/step - loss: 0.5000",
        " 8/40  5:20 10s/step - loss: 0.5000",
        " 9/40  5:10 10s/step - loss: 0.5000",
    ]
    assert other.startswith("Epoch 3/3, 0:0") and last.startswith("10/10 ")


def test_batch_sizes_that_do_not_divide(data):
    replicas = finetuning.Replicas(finetuning.make_strategy("none"))
    assert (replicas.count, replicas.is_chief, replicas.many_workers) == (1, True, False)
    replicas.count = 4
    with pytest.raises(ValueError, match="multiple of the 4 replicas that share .* received 6"):
        replicas.dataset(data, 0, 1)
    with pytest.raises(ValueError, match="distribute must be one of auto, none, mirrored, tpu"):
        finetuning.make_strategy("x")


@pytest.mark.slow
def test_two_devices_have_the_losses_of_one():
    """`train` and `fit`: rows of weight 0, clipping, accumulation and averages included."""
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tools"))
    output = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "helpers/mirrored_training.py")],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
        timeout=500,
    ).stdout
    one, two = json.loads(output)
    for kind in ("history", "fit"):
        for name, values in one[kind].items():
            assert values == pytest.approx(two[kind][name], rel=1e-4), (kind, name)
    for kind in ("weights", "fit_weights"):
        for a, b in zip(one[kind], two[kind], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)
