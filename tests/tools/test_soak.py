"""The soak in short: three minutes of mixed requests and reloads, on a server of its own."""

import os
import random

import numpy as np
import pytest

pytest.importorskip("uvicorn")
import soak
from serving_process import make_model


@pytest.mark.slow
def test_three_minutes_leave_nothing_behind(tmp_path, monkeypatch, capsys):
    """It mostly waits; xdist gives other tests the cores."""
    # So few requests are mostly the first of their shapes, for which XLA compiles programs.
    monkeypatch.setattr(soak, "MAX_GROWTH_MB", 300)
    model = make_model(tmp_path / "small")
    options = ["--minutes", "3", "--rate", "1.5", "--reloads", "2"]
    code = soak.main(["--model", str(model), *options])
    shown = capsys.readouterr().out
    assert code == 0 and "BROKEN" not in shown, shown
    for promise in ("versions taken up", "2 of 2", "memory", "descriptors when nobody asks"):
        assert promise in shown


def row(**values) -> soak.Row:
    return {name: np.array(value) for name, value in values.items()}


def test_what_is_wrong_is_found():
    expected = row(text="one", score=-1.0, attention=[[0.25, 0.75]], tokens=["o", "ne"])
    padded = row(
        text="one",
        score=-1.0001,
        attention=[[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]],
        tokens=["o", "ne", ""],
    )
    assert soak.compare(expected, padded) == "equal"
    assert soak.compare(expected, {**padded, **row(text="two")}) == "rounded"
    assert soak.compare(expected, {**padded, **row(attention=[[0.75, 0.25]])}) == "rounded"
    assert soak.compare(expected, {**padded, **row(tokens=["o"])}) == "rounded"
    assert soak.compare(expected, {**padded, **row(score=-2.0)}) == "wrong"  # swapped
    assert soak.compare(expected, row(text="one", score=-1.0)) == "wrong"
    scored = row(log_probability=-8.0, num_tokens=3)
    assert soak.compare(scored, row(log_probability=-8.5, num_tokens=3)) == "wrong"


def test_memory_that_grows_is_told_from_memory_that_varies():
    draw = random.Random(0)
    varies = [(minute, 900 + draw.uniform(0, 50)) for minute in range(10, 120)]
    growth, slope = soak.trend(varies)
    assert abs(growth) < 15 and abs(slope) < 15
    # 1 MB a minute, and one that was measured while two versions were loaded.
    growth, slope = soak.trend([(x, y + x) for x, y in varies[:-1]] + [(119, 2000)])
    assert growth == pytest.approx(82, abs=15) and slope == pytest.approx(60, abs=5)


def test_the_server_is_measured(tmp_path):
    usage = soak.Usage.of(os.getpid(), 2.5)
    files = [open(tmp_path / name, "w") for name in "abc"]
    now = soak.Usage.of(os.getpid(), 3)
    for file in files:
        file.close()
    assert now.descriptors == usage.descriptors + 3 and usage.minute == 2.5
    assert 0 < usage.anonymous_mb < usage.resident_mb and usage.threads > 0
    assert usage.cpu_seconds > 0


def test_the_newest_version_is_copied(tmp_path):
    for name in ("2", "10", "9.partial"):
        (tmp_path / "name" / name).mkdir(parents=True)
    (tmp_path / "name/10/saved_model.pb").touch()
    assert soak.newest_version(tmp_path / "name") == tmp_path / "name/10"
    assert soak.newest_version(tmp_path / "name/10") == tmp_path / "name/10"
    assert soak.model_name(tmp_path / "name") == soak.model_name(tmp_path / "name/10") == "name"
