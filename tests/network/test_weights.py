import collections.abc
import weakref

import keras
import numpy as np
import pytest

from bertgen_tf.network.weights import (
    Rule,
    VariablePart,
    WeightsError,
    assign,
    named_variables,
)
from tests.helpers import make_deep_model


def _variables(**shapes):
    return {name: keras.Variable(np.full(shape, -1.0), name=name) for name, shape in shapes.items()}


def _unchanged(variables):
    return all((variable.numpy() == -1).all() for variable in variables.values())


def test_rules_rename_transform_and_leave_out():
    variables = _variables(first=(2, 3), second=(4,), fresh=(5,))
    kernel = np.arange(6.0).reshape(3, 2)
    assign(
        variables,
        {"a/one": kernel, "a/two": np.arange(4.0), "a/step": np.zeros(9)},
        [Rule("a/step", None), Rule("a/one", "first", np.transpose), Rule("(a)/two", "second")],
        source="The file",
        new="fr.*",
    )
    np.testing.assert_array_equal(variables["first"], kernel.T)
    np.testing.assert_array_equal(variables["second"], np.arange(4.0))
    assert (variables["fresh"].numpy() == -1).all()


def test_groups_reach_the_target_and_the_first_rule_that_matches_decides():
    variables = _variables(layer_7=(2,), layer_x=(3,))
    assign(
        variables,
        {"block7/w": np.ones(2), "blockx/w": np.ones(3)},
        [Rule(r"block(\d)/w", r"layer_\1"), Rule("block./w", "layer_x")],
        source="The file",
    )
    assert not any((variable.numpy() == -1).any() for variable in variables.values())


def test_patterns_match_whole_names_only():
    for name in ("xword", "wordx", "word\n"):
        with pytest.raises(WeightsError, match="no rule for 1 names"):
            assign(_variables(w=(1,)), {name: [1.0]}, [Rule("word", "w")], source="The file")
    with pytest.raises(WeightsError, match="nothing found for 1 names .wx."):
        assign(_variables(wx=(1,)), {}, [], source="The file", new="w")


RULES = [Rule(r"old_(\w+)", r"\1"), Rule(r"also_(\w+)", r"\1"), Rule("unused", None)]


@pytest.mark.parametrize(("value", "dtype"), [(1e39, "float32"), (7e4, "float16")])
def test_numbers_too_large_for_their_variable(value, dtype):
    variables = {"a": keras.Variable(np.zeros(2), dtype=dtype)}
    with pytest.raises(WeightsError, match=f"old_a holds numbers too large for {dtype}"):
        assign(variables, {"old_a": np.array([1, value])}, RULES, source="module 7")
    assert not variables["a"].numpy().any()


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"old_b": np.ones(3)}, "nothing found for 1 names (a)"),
        ({"old_a": np.ones(2), "old_b": np.ones(3), "other": 1.0}, "no rule for 1 names (other)"),
        (
            {"old_a": np.ones(2), "old_b": np.ones(3), "old_c": 1.0},
            "old_c would become c, which the model does not have",
        ),
        (
            {"old_a": np.ones(2), "old_b": np.ones(3), "also_b": np.ones(3)},
            "also_b would become b, which is assigned already",
        ),
        (
            {"old_a": np.ones(2), "old_b": np.ones((3, 1))},
            "old_b has shape (3, 1), but b has (3,)",
        ),
        ({"old_a": np.array([1, np.nan]), "old_b": np.ones(3)}, "old_a holds NaN or infinity"),
        (
            {"old_a": np.ones(2, np.float16), "old_b": np.array([1, 2, -np.inf], np.float16)},
            "old_b holds NaN or infinity",
        ),
        # The sizes agree: an assignment by flat order would pass.
        (
            {"old_a": np.ones((2, 1)), "old_b": np.ones(3)},
            "old_a has shape (2, 1), but a has (2,)",
        ),
    ],
)
def test_a_problem_is_told_and_nothing_is_assigned(tensors, problem):
    variables = _variables(a=(2,), b=(3,))
    with pytest.raises(WeightsError) as error:
        assign(variables, tensors, RULES, source="module 7")
    assert str(error.value) == f"module 7 does not fit the model: {problem}."
    assert _unchanged(variables)


def test_all_problems_come_in_one_error():
    variables = _variables(a=(2,), b=(3,), c=(4,), d=(5,))
    tensors = {
        "old_a": np.ones(2),
        "also_a": np.ones(2),
        "old_b": np.ones(4),
        "old_z": np.ones(1),
        "surprise": np.ones(1),
        "wonder": np.ones(1),
    }
    with pytest.raises(WeightsError) as error:
        assign(variables, tensors, RULES, source="The file", new="d")
    for part in (
        "also_a would become a, which is assigned already",
        "old_b has shape (4,), but b has (3,)",
        "old_z would become z",
        "no rule for 2 names (surprise, wonder)",
        "nothing found for 1 names (c)",
    ):
        assert part in str(error.value)
    assert _unchanged(variables)


def test_long_lists_are_cut_and_counted():
    variables = _variables(**{f"v{i}": (1,) for i in range(40)})
    tensors = {f"old_v{i}": np.ones(2) for i in range(25)}
    with pytest.raises(WeightsError) as error:
        assign(variables, tensors, RULES, source="The file")
    message = str(error.value)
    assert message.count("has shape") == 20 and "and 6 more problems" in message
    with pytest.raises(WeightsError, match=r"nothing found for 40 names \(v0, .*v9 and 30 more\)"):
        assign(variables, {}, RULES, source="The file")


def test_a_transform_that_fails_leaves_the_variables_alone():
    variables = _variables(a=(2,), b=(3,))
    rules = [Rule("a", "a"), Rule("b", "b", lambda tensor: tensor.reshape(2, 2))]
    with pytest.raises(ValueError, match="reshape"):
        assign(variables, {"a": np.ones(2), "b": np.ones(3)}, rules, source="The file")
    assert _unchanged(variables)


ATTENTION = [
    f"{part}/{name}"
    for part in ("query", "key", "value", "output_dense")
    for name in ("kernel", "bias")
] + ["layer_norm/gamma", "layer_norm/beta"]
FEED_FORWARD = [
    "intermediate/kernel",
    "intermediate/bias",
    "output_dense/kernel",
    "output_dense/bias",
    "layer_norm/gamma",
    "layer_norm/beta",
]
EMBEDDINGS = [
    "word_embeddings/embeddings",
    "position_embeddings/embeddings",
    "layer_norm/gamma",
    "layer_norm/beta",
]


def _stack(layers, *attentions):
    names = {f"embeddings/{name}" for name in EMBEDDINGS}
    for i in range(layers):
        names |= {f"layer_{i}/feed_forward/{name}" for name in FEED_FORWARD}
        names |= {f"layer_{i}/{part}/{name}" for part in attentions for name in ATTENTION}
    return names


def test_names_of_a_model(model):
    """The names that rule tables are written for."""
    assert set(named_variables(model.encoder)) == _stack(2, "self_attention")
    decoder = _stack(3, "self_attention", "cross_attention") | {"output_bias"}
    assert set(named_variables(model.decoder)) == decoder
    assert set(named_variables(model)) == {
        f"encoder/{name}" for name in _stack(2, "self_attention")
    } | {f"decoder/{name}" for name in decoder}


@pytest.mark.parametrize("sharing", ["none", "word_embeddings", "all"])
def test_names_cover_every_weight_and_shared_ones_appear_under_each_name(sharing):
    model = make_deep_model(sharing)
    named = {
        name: v.variable if isinstance(v, VariablePart) else v
        for name, v in named_variables(model).items()
    }
    assert {id(v) for v in named.values()} == {id(v) for v in model.weights}
    shared = {
        name
        for name in named_variables(model.decoder)
        if any(named[f"decoder/{name}"] is v for v in model.encoder.weights)
    }
    expected = {
        "none": set(),
        "word_embeddings": {"embeddings/word_embeddings/embeddings"},
        "all": _stack(2, "self_attention"),
    }
    assert shared == expected[sharing]
    for name in shared:
        assert named[f"decoder/{name}"] is named[f"encoder/{name}"]


@pytest.mark.slow
def test_random_states_and_training_are_no_weights():
    model = make_deep_model()
    before = list(named_variables(model))
    model.compile(jit_compile=False, run_eagerly=True)
    model.fit(["a man"], ["the bird"], verbose=0)
    assert list(named_variables(model)) == before


def test_tensors_of_a_file_are_never_in_memory_all_at_once():
    class File(collections.abc.Mapping):
        def __init__(self, shapes):
            self.shapes, self.read, self.most = shapes, [], 0

        def __getitem__(self, name):
            array = np.full(self.shapes[name], 0.5, np.float32)
            self.read = [ref for ref in self.read if ref() is not None] + [weakref.ref(array)]
            self.most = max(self.most, len(self.read))
            return array

        def __iter__(self):
            yield from self.shapes

        def __len__(self):
            return len(self.shapes)

    encoder = make_deep_model().encoder
    variables = named_variables(encoder)
    file = File({name: variable.shape for name, variable in variables.items()})
    assign(variables, file, [Rule("(.*)", r"\1")], source="a file")
    assert all(np.all(variable.numpy() == 0.5) for variable in variables.values())
    assert 1 <= file.most <= 3 < len(variables)
    file.shapes["unused"] = None  # cannot be read
    assign(variables, file, [Rule("unused", None), Rule("(.*)", r"\1")], source="a file")
