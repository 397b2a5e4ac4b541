"""The config.json of a preset, which says what its model is: read without the model.

| field | what it holds |
| --- | --- |
| format | that it is a preset |
| model | the config of the model |
| checksums | the SHA-256 of each other file by name, and as that of config.json that of `model` |

Older presets have no checksums. Who changes a file by hand removes the field.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from bertgen_tf.checks import Damaged, read_json, sha256

FORMAT = "bertgen_tf preset"
CONFIG_FILE = "config.json"
_CHECKSUMS = "checksums"


def find_config(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The config of the model in `folder`, without its vocabulary; None if it is no preset."""
    content = _find(folder)
    return None if content is None else content["model"]


def write_config(folder: pathlib.Path, model: dict[str, Any], files: Iterable[str]) -> None:
    """Writes config.json with the checksums of the other files, which are there already.

    Args:
        model: the config of the model.
        files: names.
    """
    checksums = {name: sha256(folder / name) for name in files}
    content = {
        "format": FORMAT,
        "model": model,
        _CHECKSUMS: {CONFIG_FILE: _digest(model), **checksums},
    }
    with open(folder / CONFIG_FILE, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def check_files(folder: str | os.PathLike, files: Iterable[str]) -> None:
    """Raises unless files of a preset are as they were written, so far as config.json says.

    Args:
        files: names; the first that is damaged is named.

    Raises:
        OSError: one cannot be read.
        Damaged: one was changed.
    """
    content = _find(folder)
    checksums = None if content is None else content.get(_CHECKSUMS)
    if checksums is None:
        return
    for name in files:
        # A file without a checksum was added; no damage to one file does that.
        known = checksums.get(name) if isinstance(checksums, dict) else None
        path = os.path.join(folder, name)
        if known != (_digest(content["model"]) if name == CONFIG_FILE else sha256(path)):
            raise Damaged(
                f"{path} should be as it was written, but its checksum differs: copy it again or, "
                f'if the change is meant, remove "{_CHECKSUMS}" from {CONFIG_FILE}.'
            )


def _find(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The content of config.json; None if it is no preset's."""
    try:
        content = read_json(pathlib.Path(folder, CONFIG_FILE))
        if content["format"] == FORMAT and isinstance(content["model"], dict):
            return content
    except (OSError, ValueError, KeyError):
        pass
    return None


def _digest(model: dict[str, Any]) -> str:
    """SHA-256 of a config, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
