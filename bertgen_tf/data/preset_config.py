"""The config.json of a preset, which says what its model is: read without the model."""

import json
import os
import pathlib
from typing import Any

FORMAT = "bertgen_tf preset"
CONFIG_FILE = "config.json"


def find_config(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The config of the model in `folder`, without its vocabulary; None if it is no preset."""
    try:
        content = json.loads(pathlib.Path(folder, CONFIG_FILE).read_text(encoding="utf-8"))
        if content["format"] == FORMAT and isinstance(content["model"], dict):
            return content["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
