import numpy as np
import pandas
import pytest
import tensorflow as tf

from bertgen_tf.data.texts import is_single, is_text, text_list

TEXTS = ["one", "zwei", "три"]


@pytest.mark.parametrize(
    "values",
    [
        TEXTS,
        tuple(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, object),
        np.array(TEXTS)[:, np.newaxis],
        np.array([text.encode() for text in TEXTS]),
        pandas.Series(TEXTS, index=[5, 7, 5]),
        pandas.Series(TEXTS, dtype="string"),
        pandas.Series(TEXTS, dtype=object),
        pandas.Series(TEXTS, dtype="category"),
        pandas.DataFrame({"text": TEXTS}),
        tf.constant(TEXTS),
        [text.encode() for text in TEXTS],
    ],
    ids=lambda values: type(values).__name__,
)
def test_texts_in_every_form(values):
    assert is_text(values) and not is_single(values)
    texts = text_list("x", values)
    assert [text.decode() if isinstance(text, bytes) else text for text in texts] == TEXTS


@pytest.mark.parametrize(
    "values",
    [[1, 2], [[1, 2], [3]], np.ones(3), tf.ones([3]), {"a": 1}, None, 5, pandas.Series([1.0])],
    ids=str,
)
def test_other_data_is_no_text(values):
    assert not is_text(values)


def test_a_missing_text_first_is_still_text():
    assert is_text([None, "a"]) and is_text(pandas.Series([None, "a"])) and is_text([])


@pytest.mark.parametrize(
    "single, expected",
    [("a", True), (b"a", True), (np.str_("a"), True), (tf.constant("a"), True), (["a"], False)],
)
def test_one_text(single, expected):
    assert is_single(single) == expected


@pytest.mark.parametrize(
    "values, message",
    [
        (["a"] * 20000 + [None], r"^x\[20000\] must be text, received None: leave the row out\.$"),
        (pandas.Series(["a", None]), r"^x\[1\] must be text, received nan: leave the row out\.$"),
        (pandas.Series(["a", None], dtype="string"), r"x\[1\] .* received <NA>: leave"),
        (["a", 3], r"^x\[1\] must be text, received 3\.$"),
        (["a", ["b"] * 99999], r"^x\[1\] must be text, received \['b', "),
        (["a", "b \ud800"], r"x\[1\] must be valid Unicode, .* at 2"),
        ("a", "received a single one: put it in a list"),
        (np.array([["a", "b"]]), r"received ndarray of shape \(1, 2\)"),
        (pandas.DataFrame({"a": ["b"], "c": ["d"]}), "must have one column, received 2"),
    ],
    ids=range(9),
)
def test_what_is_refused(values, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        text_list("x", values)
    assert len(str(error.value)) < 300
