"""The processors and filters beside the classes of transformers; needs the extra `compare`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgen_tf.generation.search import filters
from tests.helpers.logits_cases import assert_equal, make, run

pytest.importorskip("torch", reason="needs the extra compare (transformers and torch)")
pytest.importorskip("transformers", reason="needs the extra compare (transformers and torch)")

from make_logits_golden import (  # noqa: E402
    FILTERS,
    PROCESSORS,
    random_case,
    random_names,
    run_transformers,
)


def check(case):
    # Where everything is banned, transformers' filters give NaN.
    expected = run_transformers(case)
    if not np.isnan(expected).any():
        found = run(make(case.processors), case.logits, case.ids, case.length - 1)
        assert_equal(found, expected, str(case))


@pytest.mark.parametrize("name", PROCESSORS + FILTERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_equals_transformers(name, seed):
    check(random_case(np.random.default_rng(seed), [name]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_several_equal_transformers(seed):
    rng = np.random.default_rng(seed)
    check(random_case(rng, random_names(rng)))


@pytest.mark.parametrize("name", ["top_p", "typical_p"])
def test_large_vocabulary_equals_transformers(name, monkeypatch):
    """Where the best few tokens do not have the mass."""
    monkeypatch.setattr(filters, "_FEW", 2)
    for seed in range(60):
        check(random_case(np.random.default_rng(seed), [name]))
