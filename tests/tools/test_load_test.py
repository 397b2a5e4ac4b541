"""The load test in short: a model served by a process of its own, under load and bad input."""

import random

import pytest

import bertgen_tf as bg

pytest.importorskip("uvicorn")
import load_test


@pytest.mark.slow
def test_all_promises_are_kept(shared_export, monkeypatch, capsys):
    # How fast it is has no part in it: the machine may be busy.
    monkeypatch.setattr(load_test, "MIN_RATIO", 0)
    monkeypatch.setattr(load_test, "MAX_OVERHEAD_MS", float("inf"))
    # So few requests are mostly the first of their shapes, for which TensorFlow keeps memory.
    monkeypatch.setattr(load_test, "MAX_GROWTH_MB", 100)
    counts = ["--requests", "240", "--xla-requests", "3", "--malformed", "200"]
    model = ["--model", str(shared_export[1])]
    assert load_test.main([*model, "--seconds", "3", *counts]) == 0
    shown = capsys.readouterr().out
    assert "BROKEN" not in shown
    for promise in (
        "answers to 32 clients",
        "memory of the server",
        "slow senders",
        "killed and started again",
        "programs that XLA compiled",
    ):
        assert promise in shown


def test_what_is_wrong_is_found():
    run = load_test.LoadTest(None, None, None)
    run.expected = {"a": ("one", -1.0), "b": ("two", -2.0)}
    assert run.compare("a", ("one", -1.0001)) == "equal"
    assert run.compare("a", ("two", -2.0)) == "wrong"  # swapped
    assert run.compare("a", ("other", -1.0)) == "rounded"
    assert load_test.are_right({"equal": 99, "rounded": 1, "wrong": 0})
    assert not load_test.are_right({"equal": 98, "rounded": 2, "wrong": 0})
    assert not load_test.are_right({"equal": 99, "rounded": 0, "wrong": 1})


def test_the_small_model_has_much_to_say(tmp_path, monkeypatch):
    """Of the model that is made where none is named; exporting it has tests of its own."""
    made = []
    monkeypatch.setattr(
        bg, "export_saved_model", lambda *args, **kwargs: made.append((args, kwargs))
    )
    assert load_test.make_model(tmp_path / "small") == tmp_path / "small"
    (((model, path), options),) = made
    assert path == tmp_path / "small" / "1"
    draw = random.Random(0)
    texts = [load_test.random_text(draw) for _ in range(20)]
    del options["check"]
    outputs = model.generate(texts, jit_compile=False, **options)
    assert all(outputs) and len(set(outputs)) > 10
