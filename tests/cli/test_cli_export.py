"""`bertgen-tf export`."""

from pathlib import Path

import pytest

from tests.helpers import fails

# --------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--output", "models/x"],
            "else, received 'models/x'. Use \"models/x/1\".",
        ),
        (["--output", "models/2"], "must be a new version, but models/2 exists"),
        (["--preset", "models"], "models should be a preset"),
        (["--num-return-sequences", "2"], "unrecognized arguments: --num-return-sequences 2"),
        (
            ["--num-beams", "1", "--early-stopping", "never"],
            "early_stopping applies to beam search",
        ),
    ],
)
def test_export_refuses_before_it_starts(
    flags, message, preset, tmp_path, capsys, monkeypatch, no_library
):
    monkeypatch.chdir(tmp_path)
    Path("models/2").mkdir(parents=True)
    assert message in fails(capsys, "export", "--preset", preset, "--output", "models/3", *flags)
    assert [path.name for path in Path("models").iterdir()] == ["2"]
