"""What a training did not learn: outputs that say nothing, scores as good as chance."""

import math

import keras
import numpy as np
import pytest

from bertgen_tf.finetuning import diagnosis
from bertgen_tf.finetuning.data import TrainingData
from bertgen_tf.tokenizers import BertTokenizer
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor
from tests.helpers import PIECES, WORDS

SOURCES = [f"{a} {b}" for a, b in zip(WORDS[:12], WORDS[1:13], strict=True)]
REFERENCES = [f"{b} and {a} {i}" for i, (a, b) in enumerate(s.split() for s in SOURCES)]
LOOP = "the bird the bird the bird the bird the bird"


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        (REFERENCES, None),
        (["", " ", *[""] * 5, *REFERENCES[7:]], "7 of 12 outputs are empty"),
        ([*[""] * 6, *REFERENCES[6:]], None),
        ([*[LOOP] * 4, "天" * 9, "(" * 20, "ha ha ha" * 3, *REFERENCES[7:]],
         "7 of 12 outputs are mere repetition"),
        (["", "", "", *[LOOP] * 5, *REFERENCES[8:]],
         "8 of 12 outputs are empty or mere repetition"),
        ([*["a bird"] * 7, *REFERENCES[7:]], "7 of 12 outputs are the same text"),
    ],
)  # fmt: skip
def test_outputs_that_say_nothing(outputs, problem):
    assert diagnosis.outputs_problem(SOURCES, outputs, REFERENCES) == problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a man, a man",
        "Mississippi",
        "characteristically overcompensated",
        "天地玄黄宇宙洪荒日月",
        "the man and the woman and the bird",
        "10, 20, 30, 40, 50, 60",
    ],
)
def test_texts_that_do_not_repeat(text):
    assert not diagnosis.repeats(text)


def test_references_may_be_so():
    """Empty, repetitive or the same for all: as the data, so the outputs."""
    for outputs in ([""] * 12, [LOOP] * 12, ["yes"] * 12):
        assert diagnosis.outputs_problem(SOURCES, outputs, outputs) is None
    # One source: one output.
    assert diagnosis.outputs_problem(["a"] * 12, ["b"] * 12, REFERENCES) is None
    assert diagnosis.outputs_problem([], [], []) is None


@pytest.mark.parametrize("metric", ["exact", "sari", "bleu", "chrf", "rougeL"])
def test_scores_of_chance(metric):
    random = np.random.default_rng(1)
    references = [" ".join(random.choice(WORDS, 6)) for _ in range(40)]
    sources = [" ".join(reference.split()[::-1]) for reference in references]
    shuffled = [references[i] for i in random.permutation(40)]

    def is_chance(outputs):
        return diagnosis.score_is_chance(metric, sources, outputs, references)

    assert not is_chance(references)
    assert not is_chance([*references[:12], *shuffled[12:]])
    assert is_chance(shuffled)
    assert is_chance(["a bird and a man"] * 40)
    # Nothing to tell sources apart by.
    assert not diagnosis.score_is_chance(metric, sources, ["no"] * 40, ["yes"] * 40)
    problem = diagnosis.find_problem(
        *(None, None, {"loss": 1.0, "accuracy": 1.0}, metric),
        samples=[
            {"source": s, "output": o, "reference": r}
            for s, o, r in zip(sources, shuffled, references, strict=True)
        ],
    )
    assert problem == f"by {metric}, the outputs fit the texts of others as well as their own"


@pytest.mark.parametrize(("long_targets", "label_smoothing"), [("cut", 0.0), ("skip", 0.1)])
def test_chance_is_the_loss_of_frequencies(long_targets, label_smoothing):
    """As Keras has it: the same logits for every token."""
    preprocessor = Seq2SeqPreprocessor(BertTokenizer(PIECES), 20, 19)
    pairs = [*zip(SOURCES, REFERENCES, strict=True), ("a bird", "the man " * 20)]
    training = TrainingData(pairs, preprocessor, 4, long_targets=long_targets)
    held_out = TrainingData(pairs[:5], preprocessor, 3, shuffle=False)

    def labels(data):
        batches = [data.batch(step) for step in range(data.steps_per_epoch)]
        return np.concatenate([y[weight > 0] for _, y, weight in batches])

    size = preprocessor.target_tokenizer.vocab_size
    counts = np.bincount(labels(training), minlength=size)
    np.testing.assert_array_equal(training.target_counts(), counts)
    ids = labels(held_out)
    probabilities = np.tile((counts + 1) / (counts + 1).sum(), (len(ids), 1))
    expected = keras.losses.CategoricalCrossentropy(label_smoothing=label_smoothing)(
        np.eye(size)[ids], probabilities
    )
    loss, accuracy = diagnosis.chance_of_tokens(training, held_out, label_smoothing)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert accuracy == np.mean(ids == counts.argmax())

    def problem(monitor, **results):
        return diagnosis.find_problem(
            training, held_out, results, monitor, label_smoothing=label_smoothing
        )

    assert problem("loss", loss=loss - 1e-3, accuracy=0) is None
    assert f"loss {loss:.4f} on the pairs" in problem("loss", loss=loss, accuracy=1)
    assert f"is that of a guess ({loss:.4f})" in problem("loss", loss=math.nan, accuracy=1)
    assert problem("accuracy", loss=9, accuracy=accuracy + 1e-3) is None
    assert f"accuracy {accuracy:.4f} on" in problem("accuracy", loss=0, accuracy=accuracy)
