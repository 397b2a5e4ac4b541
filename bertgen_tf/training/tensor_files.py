"""Arrays in safetensors files that are there whole or not at all, with a checksum."""

import contextlib
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bertgen_tf.checks import Damaged, check_regular_file, first_line
from bertgen_tf.data import folders

_CHECKSUM = "checksum"
# Of older files: the checksum of names and values alone.
_OLDER_CHECKSUM = "crc32"


def save_tensors(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes arrays as safetensors; the file appears when it is complete.

    Args:
        path: of the file.
        tensors: arrays by name.
        metadata: what else to keep.

    Raises:
        OSError: the file could not be written; an earlier one is unchanged.
    """
    replace_file(path, lambda new: write_tensors(new, tensors, metadata))


def write_tensors(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """The same in place."""
    metadata = {**metadata, _CHECKSUM: f"{_checksum(tensors, metadata):08x}"}
    path.touch()
    mode = path.stat().st_mode  # safetensors makes files that only their owner can read
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a safetensors file; one without a checksum is taken as it is.

    Raises:
        Damaged: the file is no safetensors file, or its checksum differs.
    """
    try:
        check_regular_file(path)
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise Damaged(f"{path} is damaged or no safetensors file ({first_line(error)})") from error
    if _CHECKSUM in metadata:
        stored = metadata.pop(_CHECKSUM)
        same = stored == f"{_checksum(tensors, metadata):08x}"
    else:
        stored = metadata.pop(_OLDER_CHECKSUM, None)
        same = stored in (None, str(_older_checksum(tensors)))
    if not same:
        raise Damaged(f"{path} is damaged (its checksum differs)")
    return tensors, metadata


def replace_file(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Lets `write` make a file, FILE.new, which then gets its name."""
    new = path.with_name(f"{path.name}.new")
    try:
        with folders.disk_errors(path, new):
            write(new)
            os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> int:
    """CRC-32 of all that the file holds."""
    described = [f"{key}={metadata[key]}" for key in sorted(metadata)]
    described += [f"{name} {t.dtype.name} {t.shape}" for name, t in sorted(tensors.items())]
    checksum = zlib.crc32("\0".join(described).encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(_bytes(tensors[name]), checksum)
    return checksum


def _older_checksum(tensors: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), checksum))
    return checksum


def _bytes(tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
