"""What tests of the command line share."""

from pathlib import Path

import pytest

import bertgen_tf as bg
from bertgen_tf.export import saved_model
from tests.helpers import make_model


@pytest.fixture
def no_library(monkeypatch):
    """Errors must come before anything slow: no model is loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("too late")

    for name in ("from_hub", "from_preset"):
        monkeypatch.setattr(bg.EncoderDecoderModel, name, refuse)


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> str:
    model = make_model(generation_config=bg.GenerationConfig(max_new_tokens=7, num_beams=2))
    folder = str(tmp_path_factory.mktemp("presets") / "random")
    model.save_to_preset(folder)
    return folder


@pytest.fixture
def checks(monkeypatch) -> list[Path]:
    """The exports that were to be checked; test_export_check.py has the check itself."""
    checked = []
    monkeypatch.setattr(saved_model, "check_export", lambda folder, *args: checked.append(folder))
    return checked
