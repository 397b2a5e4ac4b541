import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf.checkpoints.hub.graph import Graph, parse

v1 = tf.compat.v1


def build(functional: bool) -> Graph:
    """4 + 1 + 1 ... < 10, in TF1's loop or a functional one, and a few things around it."""
    before = v1.control_flow_v2_enabled()
    (v1.enable_control_flow_v2 if functional else v1.disable_control_flow_v2)()
    try:
        with tf.Graph().as_default() as graph:
            limit = tf.cast(tf.constant(10.0, name="ten"), tf.int32)
            given = v1.placeholder(tf.float32, [None], "given")
            maybe = v1.placeholder_with_default(7, [], "maybe")
            table = v1.get_variable("table", [5, 3], use_resource=not functional)
            _, total = v1.while_loop(
                lambda i, total: i < limit,
                lambda i, total: (i + 1, total + tf.reduce_sum(table) * tf.cast(i, tf.float32)),
                [4, given],
                shape_invariants=[tf.TensorShape([]), tf.TensorShape([None])],
            )
            tf.identity(total, "result")
            tf.add(maybe, 1, name="sum")
            rows = tf.concat([tf.fill([tf.shape(given)[0], 1], 3), tf.zeros([2, 1], tf.int32)], 1)
            tf.tile(rows, [1, 2], name="rows")
            tf.multiply(tf.reshape(given, [-1, 2]) + 1.0, 2.0, name="doubled")
            return Graph(v1.MetaGraphDef(graph_def=graph.as_graph_def()))
    finally:
        (v1.enable_control_flow_v2 if before else v1.disable_control_flow_v2)()


@pytest.fixture(scope="module", params=[False, True], ids=["old", "functional"])
def graph(request) -> Graph:
    return build(request.param)


def test_loops_look_the_same(graph):
    (loop,) = graph.loops
    firsts = [graph.source(graph.nodes[name].inputs[0]) for name in loop.variables]
    counter = next(
        name
        for name, first in zip(loop.variables, firsts, strict=True)
        if graph.constant(first) == 4
    )
    assert ("given", 0) in firsts
    steps = {(counter, 0): np.arange(8, 12, dtype=np.int32)}
    assert graph.evaluate(loop.condition, steps).tolist() == [True, True, False, False]
    following = graph.nodes[counter].inputs[1]
    assert graph.evaluate(following, steps).tolist() == [9, 10, 11, 12]
    # The result is a loop variable; what is before the loop is not seen from it.
    names = graph.before([("result", 0)])
    assert "given" not in names and set(loop.variables) & set(names)


def test_uses_of_a_variable_reach_into_the_loop(graph):
    variable = graph.variables()["table"]
    assert "Sum" in [node.op for node, _ in graph.uses(variable)]
    (sum_,) = (node for node, _ in graph.uses(variable) if node.op == "Sum")
    assert graph.variable(sum_.inputs[0]) == variable
    assert graph.variable(("given", 0)) is None


def test_constants(graph):
    assert graph.constant(("ten", 0)) == 10
    assert graph.constant(("given", 0)) is None
    assert graph.constant(("sum", 0)) is None  # whoever runs it may say otherwise
    assert graph.constant(("result", 0)) is None
    assert graph.first_element(("rows", 0)) == 3
    assert graph.first_element(("doubled", 0)) is None


def test_parts_are_computed(graph):
    given = {("given", 0): np.array([1, 2, 3, 4], np.float32)}
    assert graph.evaluate(("doubled", 0), given).tolist() == [[4, 6], [8, 10]]
    flat = graph.evaluate(("doubled", 0), given, elementwise=True)
    assert flat.tolist() == [4, 6, 8, 10]
    for name, message in (("doubled", "Placeholder given"), ("sum", "maybe"), ("result", "Merge")):
        with pytest.raises(ValueError, match=message):
            graph.evaluate((name, 0), {})


def test_functions_are_inlined():
    @tf.function
    def double(x):
        return 2.0 * x, x

    with tf.Graph().as_default() as plain:
        x = v1.placeholder(tf.float32, [], "x")
        first, second = double(tf.constant(3.0))
        tf.identity(first, "first")
        tf.identity(second, "second")
        tf.identity(double(double(x)[0])[0], "nested")
    graph = Graph(v1.MetaGraphDef(graph_def=plain.as_graph_def()))
    assert graph.constant(("first", 0)) == 6
    assert graph.constant(("second", 0)) == 3
    assert graph.evaluate(("nested", 0), {("x", 0): np.float32(5)}) == 20
    definition = plain.as_graph_def()
    del definition.library.function[:]
    with pytest.raises(ValueError, match="calls a function .* that is missing"):
        Graph(v1.MetaGraphDef(graph_def=definition))


def read(build) -> Graph:
    before = v1.control_flow_v2_enabled()
    v1.disable_control_flow_v2()
    try:
        with tf.Graph().as_default() as plain:
            build()
            return Graph(v1.MetaGraphDef(graph_def=plain.as_graph_def()))
    finally:
        (v1.enable_control_flow_v2 if before else v1.disable_control_flow_v2)()


def test_outputs_of_ops_in_functions():
    @tf.function
    def places(x):
        return tf.split(tf.unique(x).idx, 2)[1] + 1

    graph = read(lambda: tf.identity(places(tf.constant([5, 7, 5, 9])), "result"))
    assert graph.constant(("result", 0)).tolist() == [1, 3]


def test_no_branch_of_a_conditional_is_taken_for_its_value():
    def build():
        given = v1.placeholder_with_default(True, [], "given")
        for name, predicate in (("asked", given), ("known", tf.constant(True))):
            value = v1.cond(predicate, lambda: tf.constant(3), lambda: tf.constant(6))
            tf.add(value, 1, name=name)

    graph = read(build)
    for name in ("asked", "known"):
        assert graph.constant((name, 0)) is None
        assert graph.leaves(graph.before([(name, 0)]))
        with pytest.raises(ValueError, match="computed from Merge"):
            graph.evaluate((name, 0), {})


def test_first_elements_are_not_guessed():
    def build():
        rows = v1.placeholder(tf.int32, [], "rows")
        full, empty = tf.fill([rows, 1], 3), tf.fill([rows, 0], 8)
        begin = v1.placeholder_with_default([0, 0], [2], "begin")
        tf.concat([empty, full], 1, name="after_nothing")
        mixed = tf.concat([full, tf.fill([rows, 1], 4)], 1)
        tf.slice(mixed, [0, 1], [-1, 1], name="second")
        tf.slice(mixed, begin, [1, 1], name="any")
        tf.slice(mixed, [0, 0], [-1, 1], name="first")
        tf.gather(mixed, [1], axis=1, name="gathered")
        tf.debugging.check_numerics(tf.constant(0.0) / 0.0, "no number", name="broken")

    graph = read(build)
    names = ("after_nothing", "second", "any", "first", "gathered")
    assert [graph.first_element((n, 0)) for n in names] == [3, None, None, 3, None]
    assert graph.constant(("broken", 0)) is None or np.isnan(graph.constant(("broken", 0)))


def test_names_of_tensors():
    assert parse("a/b:1") == ("a/b", 1) and parse("a/b") == ("a/b", 0)
