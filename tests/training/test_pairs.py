import numpy as np
import pandas
import pytest
import tensorflow as tf

from bertgen_tf.training.pairs import Pairs, read_pairs

SOURCES, TARGETS = ["a b", "c", "d e"], ["b", "c c", "e"]
ROWS = list(zip(SOURCES, TARGETS, strict=True))
TABLE = pandas.DataFrame({"target": TARGETS, "source": SOURCES})


@pytest.mark.parametrize(
    "arguments",
    [
        (SOURCES, TARGETS),
        (tuple(SOURCES), np.array(TARGETS)),
        ((SOURCES, TARGETS),),
        ((tuple(SOURCES), tuple(TARGETS)),),
        (ROWS,),
        ([list(row) for row in ROWS],),
        (np.array(ROWS),),
        ([{"source": source, "target": target} for source, target in ROWS],),
        (TABLE,),
        (TABLE.rename(columns={"source": "en", "target": "de"})[["en", "de"]],),
        (TABLE["source"], TABLE["target"]),
        (TABLE[["source"]], TABLE[["target"]]),
    ],
    ids=range(12),
)
def test_pairs_in_every_form(arguments):
    assert read_pairs(*arguments) == Pairs(SOURCES, TARGETS)


def test_weights():
    expected = np.array([1, 0, 2.5], np.float32)
    for arguments in (
        (SOURCES, TARGETS, [1, 0, 2.5]),
        ((SOURCES, TARGETS, pandas.Series([1, 0, 2.5])),),
        (ROWS, None, expected),
    ):
        pairs = read_pairs(*arguments)
        assert pairs[:2] == (SOURCES, TARGETS)
        np.testing.assert_array_equal(pairs.weights, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        (np.ones([2, 3]), np.ones([2])),
        ({"input_ids": np.ones([2, 3])}, np.ones([2])),
        (tf.data.Dataset.from_tensor_slices((SOURCES, TARGETS)),),
        ([np.ones(2), np.ones(2)],),
        (pandas.DataFrame({"a": [1.0], "b": [2.0]}),),
        (None,),
    ],
    ids=range(6),
)
def test_other_data_is_for_keras(arguments):
    assert read_pairs(*arguments) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], []), "x must hold at least one source, received none"),
        (([],), "x must hold at least one pair, received none"),
        ((SOURCES,), "y must be the targets of the sources in x, received None"),
        ((SOURCES, TARGETS[:2]), "as many sources as targets, received 3 and 2"),
        ((SOURCES, np.ones(3)), r"y\[0\] must be text, received"),
        ((np.ones(3), TARGETS), r"x\[0\] must be text, received"),
        ((SOURCES, ["b", None, "e"]), r"y\[1\] must be text, received None: leave the row out"),
        (([*ROWS, ("f",)],), r"x\[3\] must be a pair \(source, target\), received \('f',\)"),
        (([None, *ROWS],), r"x\[0\] must be a pair \(source, target\), received None"),
        (
            ((SOURCES, TARGETS, [1, 2, 3]), None, [1, 2, 3]),
            "sample_weight must be left out if x has",
        ),
        (([*ROWS, ("f", None)],), r"x\[3\], the target, must be text, received None"),
        (([SOURCES, TARGETS],), "a list holds rows, a tuple of two lists columns"),
        ((TABLE.assign(id=TARGETS),), "must have two columns, .* choose two by their names"),
        (
            ([{"text": "a", "summary": "b"}] * 400,),
            r"x\[0\] must be a dict of source and target, rec",
        ),
        (({*SOURCES}, TARGETS), "x must be a list, an array, .* received set"),
        (
            (SOURCES, dict.fromkeys(TARGETS, "a").values()),
            "y must be a list, .* received dict_values",
        ),
        (({"source": SOURCES},), r"dict of texts with \['source'\]: pass its values"),
        ((SOURCES, TARGETS, [1, 2]), "sample_weight must be .* for each of 3 pairs"),
        ((SOURCES, TARGETS, [1, -1, 2]), "of at least 0"),
    ],
    ids=range(19),
)
def test_text_that_makes_no_pairs(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        read_pairs(*arguments)
    assert len(str(error.value)) < 300


def test_names_of_validation_data():
    with pytest.raises(TypeError, match=r"^validation_data's y\[0\] must be text"):
        read_pairs(SOURCES, [None, "a", "b"], prefix="validation_data's ")
