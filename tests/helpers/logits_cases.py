"""What tests of processors and filters share: cases that transformers has answered."""

import json

import numpy as np
import tensorflow as tf

from bertgen_tf.generation.search import filters, logits
from tests.helpers import GOLDEN

FILE = GOLDEN / "logits.npz"


def golden_cases():
    """`(processors, length, ids, logits, expected)` of tools/fixtures/make_logits_golden.py."""
    with np.load(FILE) as golden:
        columns = [golden[name] for name in ("lengths", "ids", "logits", "expected")]
        processors = json.loads(str(golden["cases"]))
    return list(zip(processors, *columns, strict=True))


def make(processors):
    """The composition of `[(name, arguments)]`."""
    return logits.compose(
        [
            getattr(filters if hasattr(filters, name) else logits, name)(**arguments)
            for name, arguments in processors
        ]
    )


def run(process, scores, ids, step):
    """Eagerly, on arrays."""
    return process(tf.constant(scores), tf.constant(ids), tf.constant(step)).numpy()


def assert_equal(found, expected, context=""):
    """The same tokens are banned, here finitely, and the others have the same scores."""
    banned = found <= logits.BANNED / 2
    np.testing.assert_array_equal(banned, np.isneginf(expected), err_msg=context)
    np.testing.assert_allclose(
        found[~banned], expected[~banned], rtol=2e-6, atol=1e-6, err_msg=context
    )
