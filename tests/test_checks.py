import math
import os

import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf import checks


def test_integers_become_python_integers():
    for value in (3, np.int64(3), np.uint8(3)):
        assert checks.check_integer("n", value, 3) == 3
        assert type(checks.check_integer("n", value)) is int


@pytest.mark.parametrize("value", [2, -3, 3.0, True, "3", None, [3], np.float32(3), np.bool_(True)])
def test_no_integer_of_at_least_three(value):
    with pytest.raises(
        ValueError, match=r"^n must be an integer of at least 3, received .*: add some\.$"
    ):
        checks.check_integer("n", value, 3, "add some")


def test_arrays_and_tensors_of_one_integer_are_integers():
    for value in (np.array(3), tf.constant(3)):
        assert checks.check_integer("n", value) == 3
        assert checks.check_positive("x", value) == 3.0
    for value in (np.array([3, 4]), tf.constant(3.0), np.float32(3)):
        with pytest.raises(ValueError, match=r"^n must be an integer of at least 1, received "):
            checks.check_integer("n", value)


def test_numbers_become_python_floats():
    for value in (2, 2.0, np.float32(2), np.int8(2)):
        for check in (checks.check_number, checks.check_positive):
            assert check("x", value) == 2.0
            assert type(check("x", value)) is float
    assert checks.check_number("x", -math.inf) == -math.inf
    assert checks.check_number("x", 0.5, 0.5) == 0.5


@pytest.mark.parametrize("value", ["1", None, True, math.nan, 1j, [1.0]])
def test_no_numbers(value):
    with pytest.raises(ValueError, match=r"^x must be a number, received "):
        checks.check_number("x", value)
    with pytest.raises(ValueError, match=r"^x must be a finite number above 0, received .*: no\.$"):
        checks.check_positive("x", value, "no")


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"^x must be a number of at least 0\.5, received 0\.4\.$"):
        checks.check_number("x", 0.4, 0.5)
    for value in (0, -1.0, math.inf):
        with pytest.raises(ValueError, match="x must be a finite number above 0, received"):
            checks.check_positive("x", value)


def test_the_cause_of_an_error_in_a_graph_is_quoted():
    function = tf.function(lambda x: tf.gather([4, 5, 6], x))
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        function(tf.constant(9))
    line = checks.first_line(caught.value)
    assert "\n" not in line and line.startswith("InvalidArgumentError: ")
    assert "Graph execution error" not in line and "9 is not in [0, 3)" in line
    assert checks.first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert checks.first_line(KeyError()) == "KeyError"
    assert checks.first_line(ValueError("\n a\nb")) == "ValueError: a"


def test_only_regular_files_are_read(tmp_path):
    file, folder, pipe, link = (tmp_path / name for name in ("file", "folder", "pipe", "link"))
    file.touch()
    folder.mkdir()
    os.mkfifo(pipe)
    link.symlink_to(file)
    for path in (file, link):
        checks.check_regular_file(path)
    for path, kind in ((folder, "a folder"), (pipe, "a pipe, a socket or a device")):
        with pytest.raises(ValueError, match=f"{path.name} must be a file, but is {kind}"):
            checks.check_regular_file(path)
    with pytest.raises(FileNotFoundError):
        checks.check_regular_file(tmp_path / "none")
