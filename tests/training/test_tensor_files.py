"""Safetensors files with a checksum of all that they hold."""

import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bertgen_tf.checks import Damaged
from bertgen_tf.training.tensor_files import load_tensors, save_tensors

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([7, 8], np.int8),
    "c": np.array(3, np.float32),
}
METADATA = {"place": "step 123", "kind": "é"}


@pytest.fixture
def path(tmp_path):
    save_tensors(tmp_path / "a.safetensors", TENSORS, METADATA)
    return tmp_path / "a.safetensors"


def test_what_was_written_comes_back(path):
    tensors, metadata = load_tensors(path)
    assert metadata == METADATA and tensors.keys() == TENSORS.keys()
    for name, tensor in load_file(path).items():  # others can read it, too
        np.testing.assert_array_equal(tensors[name], tensor)
        np.testing.assert_array_equal(tensor, TENSORS[name])
        assert tensors[name].dtype == tensor.dtype == TENSORS[name].dtype
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"[2,3]", b"[3,2]"),  # the bytes of the values stay the same
        (b'"I8"', b'"U8"'),
        (b"step 123", b"step 124"),
        (b'"place"', b'"plate"'),
        (b'"b":{', b'"d":{'),
        (np.float32(5).tobytes(), np.float32(6).tobytes()),
    ],
)
def test_whatever_changes_is_noticed(path, old, new):
    whole = path.read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(Damaged, match=r"is damaged \(its checksum differs\)"):
        load_tensors(path)


def test_files_that_are_none(path):
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:40], whole + b"1", bytes(100)):
        path.write_bytes(content)
        with pytest.raises(Damaged, match="is damaged or no safetensors file"):
            load_tensors(path)
    path.unlink()
    with pytest.raises(Damaged, match="No such file"):
        load_tensors(path)
    path.mkdir()
    with pytest.raises(Damaged, match="but is a folder"):
        load_tensors(path)


def test_files_of_older_versions(path):
    """They had a checksum of names and values only, or none."""
    crc = zlib.crc32(b"a" + TENSORS["a"].tobytes() + b"b" + TENSORS["b"].tobytes())
    tensors = {name: TENSORS[name] for name in "ab"}
    save_file(tensors, path, {**METADATA, "crc32": str(crc)})
    assert load_tensors(path)[1] == METADATA
    save_file(tensors, path, {**METADATA, "crc32": str(crc + 1)})
    with pytest.raises(Damaged, match="its checksum differs"):
        load_tensors(path)
    save_file(tensors, path, METADATA)
    assert load_tensors(path)[1] == METADATA
