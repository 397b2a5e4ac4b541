"""What `fit` and `evaluate` give Keras for text."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf.training.batches import batch_arguments, evaluate_arguments, fit_arguments
from tests.helpers import make_small_model

SOURCES = [f"{a} {b}" for a in ("man", "bird", "old") for b in ("the", "saw", "sang", "house")]
TARGETS = [source.split()[1] for source in SOURCES]
WEIGHTS = np.arange(12, dtype=np.float32)
PAIRS = list(zip(SOURCES, TARGETS, strict=True))


def dataset(*columns):
    return tf.data.Dataset.from_tensor_slices(columns)


@pytest.fixture(scope="module")
def preprocessor():
    return make_small_model(max_source_length=7, max_target_length=5).preprocessor


def rows(batches):
    """A dataset's rows, flat, in order."""
    parts = [tf.nest.flatten(batch) for batch in batches]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return np.concatenate([column.astype(np.float32) for column in columns], axis=1)


def expected(preprocessor, texts=slice(None), weights=None):
    x, y, tokens = preprocessor(SOURCES[texts], TARGETS[texts])
    return rows([(x, y, tokens if weights is None else tokens * weights[texts, np.newaxis])])


@pytest.mark.parametrize(
    "given",
    [
        {"x": SOURCES, "y": TARGETS},
        {"x": PAIRS},
        {"x": dataset(SOURCES, TARGETS)},
        {"x": dataset(SOURCES, TARGETS).batch(7)},
    ],
    ids=["columns", "rows", "examples", "batches"],
)
def test_text_in_order(preprocessor, given):
    for changed in (
        fit_arguments(preprocessor, {**given, "shuffle": False}),
        evaluate_arguments(preprocessor, given),
    ):
        np.testing.assert_array_equal(rows(changed["x"]), expected(preprocessor))
        assert changed["y"] is changed["batch_size"] is None


@pytest.mark.parametrize(
    "given",
    [
        {"x": SOURCES, "y": TARGETS, "sample_weight": WEIGHTS.tolist()},
        {"x": (SOURCES, TARGETS, WEIGHTS)},
        {"x": dataset(SOURCES, TARGETS, WEIGHTS)},
        {"x": dataset(SOURCES, TARGETS, WEIGHTS.astype(int)).batch(7)},
    ],
    ids=["columns", "tuple", "examples", "batches"],
)
def test_weights(preprocessor, given):
    changed = fit_arguments(preprocessor, {**given, "shuffle": False})
    np.testing.assert_array_equal(rows(changed["x"]), expected(preprocessor, weights=WEIGHTS))


def test_batches_and_generators(preprocessor):
    batch = batch_arguments(preprocessor, SOURCES, TARGETS, WEIGHTS)
    np.testing.assert_array_equal(rows([batch]), expected(preprocessor, weights=WEIGHTS))
    generator = iter([(np.array(SOURCES), TARGETS)])
    changed = fit_arguments(preprocessor, {"x": generator})
    np.testing.assert_array_equal(rows(changed["x"]), expected(preprocessor))
    generator = iter([(np.array(SOURCES), TARGETS, WEIGHTS)])
    changed = evaluate_arguments(preprocessor, {"x": generator})
    np.testing.assert_array_equal(rows(changed["x"]), expected(preprocessor, weights=WEIGHTS))
    changed = fit_arguments(preprocessor, {"x": PAIRS, "validation_data": iter([batch])})
    assert next(changed["validation_data"])[1] is batch[1]
    with pytest.raises(TypeError, match=r"x must give batches .* pass list\(...\) of it"):
        next(fit_arguments(preprocessor, {"x": zip(SOURCES, TARGETS, strict=True)})["x"])


def test_shuffling_is_the_default_and_of_each_epoch(preprocessor):
    tf.random.set_seed(1)
    batches = fit_arguments(preprocessor, {"x": PAIRS, "batch_size": 5})["x"]
    epochs = [rows(batches), rows(batches)]
    ordered = expected(preprocessor)
    assert not np.array_equal(*epochs) and not np.array_equal(epochs[0], ordered)
    for epoch in epochs:
        np.testing.assert_array_equal(np.unique(epoch, axis=0), np.unique(ordered, axis=0))


def test_validation_split_is_that_of_keras(preprocessor):
    def of_keras(share):
        kept, held_out = keras.src.trainers.data_adapters.array_slicing.train_validation_split(
            (WEIGHTS,), share
        )
        return kept[0].astype(int).tolist(), held_out[0].astype(int).tolist()

    for share in (0.3, 0.01):
        changed = fit_arguments(
            preprocessor, {"x": PAIRS, "validation_split": share, "shuffle": False}
        )
        for name, places in zip(("x", "validation_data"), of_keras(share), strict=True):
            found = rows(changed[name])
            np.testing.assert_array_equal(found, expected(preprocessor)[places])


@pytest.mark.parametrize(
    "validation",
    [
        (SOURCES, TARGETS, WEIGHTS),
        dataset(SOURCES, TARGETS, WEIGHTS),
        dataset(SOURCES, TARGETS, WEIGHTS).batch(4),
    ],
    ids=["columns", "examples", "batches"],
)
def test_validation_data(preprocessor, validation):
    changed = fit_arguments(preprocessor, {"x": PAIRS, "validation_data": validation})
    held_out = changed["validation_data"]
    np.testing.assert_array_equal(rows(held_out), expected(preprocessor, weights=WEIGHTS))


def test_sizes_of_validation_batches(preprocessor):
    given = {"x": PAIRS, "batch_size": 5, "validation_data": PAIRS}
    for options, size in (({}, 5), ({"validation_batch_size": 3}, 3)):
        held_out = fit_arguments(preprocessor, {**given, **options})["validation_data"]
        assert len(next(iter(held_out))[1]) == size


def test_other_data_is_left_to_keras(preprocessor):
    x, y, weight = preprocessor(SOURCES, TARGETS)
    given = {"x": x, "y": y, "sample_weight": weight, "validation_data": (x, y)}
    assert fit_arguments(preprocessor, given) == {}
    assert evaluate_arguments(preprocessor, given) == {}
