"""compile() and fit(): text in, masked loss, defaults, every callback, precision, compilation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.training.losses import default_loss
from tests.helpers import PIECES, make_small_model

PAIRS = [
    ("the man saw a bird", "a bird saw the man"),
    ("old house", "house old."),
    ("and the woman left", "left, the woman"),
    ("the bird sang, who found the young man", "the bird sang. the bird found the young man."),
    ("", "old"),
]
SOURCES, TARGETS = (list(side) for side in zip(*PAIRS, strict=True))


def dataset():
    return tf.data.Dataset.from_tensor_slices((SOURCES, TARGETS))


def preprocessed(model):
    """One batch of all pairs: where text is not what is tested, it need not be prepared in fit."""
    return tf.data.Dataset.from_tensors(model.preprocessor(SOURCES, TARGETS))


def make(sharing="all", dropout=True):
    model = make_small_model(sharing, max_source_length=14, max_target_length=12)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout) and not dropout:
            layer.rate = 0
    return model


def built(model, optimizer="auto", **options):
    """Compiled, with the optimizer's state: a `fit` that has to make it traces its step twice."""
    model.compile(optimizer=optimizer, **options)
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture
def model():
    """Dropout would hide differences of the loss."""
    return make(dropout=False)


def test_loss_and_accuracy_count_real_tokens_only(model):
    model.compile()
    loss, accuracy = model.evaluate(dataset().batch(5), verbose=0)
    x, labels, weight = model.preprocessor(SOURCES, TARGETS)
    log_probs = tf.nn.log_softmax(model(x)).numpy()
    losses, hits = [], []
    for row, row_labels in zip(log_probs, labels.numpy(), strict=True):
        for probs, label in zip(row, row_labels, strict=True):
            if label != 0:  # padding
                losses.append(-probs[label])
                hits.append(probs.argmax() == label)
    assert len(losses) == weight.numpy().sum()
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert accuracy == pytest.approx(np.mean(hits), abs=1e-6)


@pytest.mark.slow
def test_fit_takes_text_in_every_form(model):
    built(model, keras.optimizers.SGD(0.0))
    x, y, weight = model.preprocessor(SOURCES, TARGETS)
    expected = model.evaluate(x, y, sample_weight=weight, batch_size=5, verbose=0)

    def check(*args, **kwargs):
        history = model.fit(*args, verbose=0, **kwargs).history
        for name in ("loss", "val_loss") if "validation_data" in kwargs else ("loss",):
            assert history[name][0] == pytest.approx(expected[0], rel=1e-5)

    mapped = dataset().batch(5).map(model.preprocessor)
    check(dataset().batch(5), validation_data=(x, y, weight))
    check(dataset(), validation_data=mapped)
    check(SOURCES, TARGETS)
    check(np.array(SOURCES), np.array(TARGETS, dtype=object), batch_size=5)
    check(mapped, validation_data=dataset())
    check(x, y, sample_weight=weight, batch_size=5, validation_data=(SOURCES, TARGETS))


def test_weights_of_examples_are_those_of_their_tokens(model):
    weights = [1.0, 0.0, 2.5, 0.5, 1.0]
    x, y, tokens = model.preprocessor(SOURCES, TARGETS)
    tokens *= np.array(weights, np.float32)[:, np.newaxis]
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    expected = model.test_on_batch(x, y, tokens)
    assert abs(model.test_on_batch(SOURCES, TARGETS)[0] - expected[0]) > 1e-3
    for found in (
        model.test_on_batch(SOURCES, TARGETS, weights),
        model.train_on_batch(PAIRS, sample_weight=weights),
        model.evaluate((SOURCES, TARGETS, weights), verbose=0),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


class Texts(keras.utils.PyDataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return np.array(SOURCES), np.array(TARGETS)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: model.fit([], []), "x must hold at least one source"),
        (
            lambda model: model.fit([*SOURCES, None], [*TARGETS, ""]),
            r"x\[5\] must be text, .* None",
        ),
        (
            lambda model: model.fit(SOURCES, TARGETS, validation_data=(SOURCES, TARGETS[:3])),
            "validation_data's x and validation_data's y must hold as many",
        ),
        (lambda model: model.fit(SOURCES, TARGETS, class_weight={1: 2}), "pass sample_weight"),
        (
            lambda model: model.train_on_batch(SOURCES, TARGETS, class_weight={1: 2}),
            "pass sample_weight",
        ),
        (lambda model: model.fit(SOURCES, TARGETS, validation_split=0.99), "validation_split must"),
        (lambda model: model.fit(dataset().batch(2), batch_size=3), "batch_size is for text that"),
        (lambda model: model.fit(dataset(), TARGETS), "y must be left out with a dataset of text"),
        (lambda model: model.fit(Texts()), "x must give ids, not text, if it is a PyDataset"),
        (
            lambda model: model.fit(tf.data.Dataset.from_tensor_slices({"source": SOURCES})),
            "must give pairs",
        ),
        (lambda model: model.predict(SOURCES), r"call generate\(texts\)"),
        (lambda model: model.predict(dataset()), r"call generate\(texts\)"),
        (lambda model: model.predict_on_batch(tf.constant(SOURCES)), r"call generate\(texts\)"),
        (lambda model: model(np.ones([2, 3])), "inputs must be dict"),
    ],
    ids=range(14),
)
def test_what_keras_would_not_explain(model, call, message):
    model.compile(run_eagerly=True)
    with pytest.raises((TypeError, ValueError), match=message):
        call(model)


@pytest.mark.slow
def test_every_weight_trains_with_the_defaults():
    model = make("none")
    before = [np.array(w) for w in model.trainable_weights]
    model.compile(optimizer=bg.default_optimizer(1e-2, warmup_steps=2))
    data = preprocessed(model).unbatch().batch(4)
    history = model.fit(data, epochs=15, verbose=0).history
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert np.abs(weight - old).max() > 0, weight.path
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert 0 <= history["accuracy"][0] < history["accuracy"][-1] <= 1


@pytest.mark.slow
def test_compiled_and_plain_training_agree():
    losses = []
    for jit_compile in (True, False):
        model = make("word_embeddings", dropout=False)
        optimizer = bg.default_optimizer(
            1e-3, gradient_accumulation_steps=2, ema_momentum=0.9, new_weights_learning_rate=1e-2
        )
        loss = default_loss(label_smoothing=0.1)
        built(model, optimizer, loss=loss, jit_compile=jit_compile)
        losses.append(model.fit(preprocessed(model), epochs=4, verbose=0).history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.slow
def test_mixed_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make("word_embeddings")
    finally:
        keras.config.set_dtype_policy("float32")
    assert all(w.dtype == "float32" for w in model.weights)
    x, _, _ = model.preprocessor(SOURCES, TARGETS)
    assert model(x).dtype == "float32"
    hidden = model.encoder(x["input_ids"], x["attention_mask"])
    assert hidden.dtype == "bfloat16"
    full = make("word_embeddings")
    difference = np.abs(model(x) - full(x))
    assert 0 < difference.mean() < 0.2
    built(model, bg.default_optimizer(1e-2))
    losses = model.fit(preprocessed(model), epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    output = model.generate(SOURCES[:2], max_new_tokens=5, num_beams=2)
    assert all(isinstance(text, str) for text in output)
    ids = {"input_ids": x["input_ids"][:1]}
    scores = model.generate(ids, max_new_tokens=5, jit_compile=False).scores
    assert scores.dtype == np.float32
    loaded = bg.EncoderDecoderModel.from_config(model.get_config())
    assert loaded.encoder.compute_dtype == "bfloat16"


@pytest.mark.slow
def test_callbacks_work_unchanged(tmp_path):
    model = make()
    model.compile()
    model.optimizer.use_ema = True
    model.optimizer.build(model.trainable_variables)
    seen = []
    callbacks = [
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
        keras.callbacks.ModelCheckpoint(tmp_path / "last.weights.h5", save_weights_only=True),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
        keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau(patience=1),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
        keras.callbacks.TensorBoard(tmp_path / "logs", update_freq=1),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(sorted(logs))),
    ]
    data = preprocessed(model)
    model.fit(data, epochs=3, validation_data=data, verbose=0, callbacks=callbacks)
    assert {"accuracy", "loss", "val_accuracy", "val_loss"} <= set(seen[0])
    x, _, _ = model.preprocessor(SOURCES, TARGETS)
    best = keras.saving.load_model(tmp_path / "best.keras")
    assert best(x).shape == (5, 12, len(PIECES))
    # A loaded model goes on training with its optimizer's state.
    assert int(best.optimizer.iterations) > 0
    best.fit(dataset(), verbose=0)
    assert (tmp_path / "last.weights.h5").exists()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4
    assert list((tmp_path / "logs").rglob("events*"))


@pytest.mark.slow
def test_the_default_optimizer_survives_a_keras_file(tmp_path):
    model = built(make(), bg.default_optimizer(1e-3, warmup_steps=2, total_steps=9))
    model.fit(preprocessed(model), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations) == 1
    assert not loaded.optimizer._use_weight_decay(loaded.decoder.output_bias)
    schedule = loaded.optimizer._learning_rate
    assert schedule.get_config() == model.optimizer._learning_rate.get_config()


def test_default_optimizer_decays_kernels_and_embeddings_only():
    model = make("none")
    optimizer = bg.default_optimizer()
    optimizer.build(model.trainable_variables)
    for variable in model.trainable_variables:
        decays = optimizer._use_weight_decay(variable)
        assert decays == (variable.name in ("kernel", "embeddings")), variable.path


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3, 5, 7)).astype(np.float32)
    labels = rng.integers(0, 7, (3, 5))
    weight = (rng.random((3, 5)) < 0.6).astype(np.float32)
    loss = default_loss(smoothing)
    value = float(loss(labels, logits, sample_weight=weight))
    torch = pytest.importorskip("torch")
    each = torch.nn.functional.cross_entropy(
        torch.tensor(logits).reshape(-1, 7),
        torch.tensor(labels).reshape(-1),
        label_smoothing=smoothing,
        reduction="none",
    ).numpy()
    assert value == pytest.approx((each * weight.reshape(-1)).sum() / weight.sum(), rel=1e-6)
    reference = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=smoothing, reduction="mean_with_sample_weight"
    )
    expected = float(reference(np.eye(7)[labels], logits, sample_weight=weight))
    assert value == pytest.approx(expected, rel=1e-6)
    assert loss.get_config() == type(loss).from_config(loss.get_config()).get_config()


def test_label_smoothing_out_of_range():
    with pytest.raises(ValueError, match="label_smoothing must be at least 0 and below 1"):
        default_loss(1.0)


@pytest.mark.slow
def test_bucketed_dataset_loses_no_pair_and_has_few_shapes():
    long = [("bird " * n, "man " * m) for n, m in ((3, 2), (20, 3), (2, 16), (17, 17), (40, 40))]
    pairs = [*PAIRS, *long] * 4
    model = make_small_model(max_source_length=25, max_target_length=20)
    data = tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*pairs, strict=True))))
    batches = list(bg.bucketed_dataset(data, model.preprocessor, 6, shuffle=50, seed=3))
    assert sum(len(y) for _, y, _ in batches) == len(pairs)
    shapes = {(x["input_ids"].shape[1], y.shape[1]) for x, y, _ in batches}
    assert shapes == {(16, 16), (25, 20)}
    expected = model.preprocessor(*map(list, zip(*pairs, strict=True)))
    tokens = sorted(tuple(row[row > 0]) for row in expected[1].numpy())
    assert sorted(tuple(r[r > 0]) for _, y, _ in batches for r in y.numpy()) == tokens
    for x, y, weight in batches:
        assert all(v.shape[0] == len(y) == len(weight) for v in x.values())
        np.testing.assert_array_equal(weight > 0, y > 0)
    again = list(bg.bucketed_dataset(data, model.preprocessor, 6, shuffle=50, seed=3))
    np.testing.assert_array_equal(again[0][1], batches[0][1])
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        bg.bucketed_dataset(data, model.preprocessor, 0)


@pytest.mark.slow
def test_a_frozen_encoder_stays_frozen(tmp_path):
    for sharing, trained in (("word_embeddings", 24), ("all", 9)):
        model = make(sharing)
        model.encoder.trainable = False
        built(model)
        model.fit(preprocessed(model), verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        names = [w.path for w in model.trainable_weights]
        assert [w.path for w in loaded.trainable_weights] == names
        assert len(names) == trained
        assert int(loaded.optimizer.iterations) == 1


def test_scores_are_not_of_half_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make("word_embeddings")
    finally:
        keras.config.set_dtype_policy("float32")
    bias = np.linspace(10, 10.1, len(PIECES), dtype=np.float32)
    model.decoder.output_bias.assign(bias)
    x, _, _ = model.preprocessor(SOURCES, TARGETS)
    logits = model(x).numpy()
    assert (tf.cast(tf.cast(logits, "bfloat16"), "float32") != logits).numpy().mean() > 0.9
    graph = tf.function(lambda x: model(x)).get_concrete_function(x).graph
    softmaxes = [op for op in graph.get_operations() if "softmax" in op.type.lower()]
    assert len(softmaxes) == 3  # one encoder layer, one decoder layer with two attentions
    assert all(op.inputs[0].dtype == tf.float32 for op in softmaxes)


def test_summary(model, capsys):
    model.summary()
    shown = capsys.readouterr().out
    assert f"Total params: {model.count_params():,}" in shown
    assert "encoder (BertGenerationEncoder)" in shown and "decoder (Bert" in shown


def test_errors(model):
    silent = bg.EncoderDecoderModel(model.encoder, model.decoder)
    silent.compile()
    with pytest.raises(ValueError, match="Text needs a tokenizer"):
        silent.fit(dataset(), verbose=0)
    model.compile()
    with pytest.raises(ValueError, match="as many sources as targets, received 5 and 4"):
        model.fit(SOURCES, TARGETS[:4], verbose=0)
    with pytest.raises(ValueError, match="must give pairs"):
        model.fit(tf.data.Dataset.from_tensor_slices((SOURCES, TARGETS, TARGETS)), verbose=0)
    with pytest.raises(ValueError, match="pairs must be a dataset of .* not batched yet"):
        bg.bucketed_dataset(dataset().batch(2), model.preprocessor, 2)
