"""Checkpoints that transformers wrote."""

import json
import zipfile

import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import GOLDEN


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders that transformers wrote; read-only."""
    folder = tmp_path_factory.mktemp("huggingface")
    with zipfile.ZipFile(GOLDEN / "huggingface.zip") as file:
        file.extractall(folder)
    return folder


@pytest.fixture
def copy(checkpoints, tmp_path):
    """Copies a checkpoint, with changes of its JSON files and tensors."""

    def make(name, config=None, generation=None, tensors=None):
        folder = tmp_path / name
        folder.mkdir()
        for path in (checkpoints / name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for file, change in (("config.json", config), ("generation_config.json", generation)):
            if change is not None:
                values = json.loads((folder / file).read_text())
                change(values)
                (folder / file).write_text(json.dumps(values))
        if tensors is not None:
            stored = load_file(folder / "model.safetensors")
            tensors(stored)
            save_file(stored, folder / "model.safetensors")
        return folder

    return make
