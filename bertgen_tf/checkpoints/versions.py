"""The exports of a folder, NAME/VERSION, on disk: which there are, and whether their files changed.

Others write into the folder while it is looked at, and it may hold anything: so nothing is opened,
and what cannot be served is reported while the rest is found.
"""

import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from bertgen_tf.checkpoints.presets import GRAPH_FILE
from bertgen_tf.checks import check_regular_file

LARGEST_VERSION = 2**63 - 1  # as in TensorFlow Serving
# What a URL and a metric can hold as it is.
_NAME = re.compile(r"[A-Za-z0-9._-]+")
# Files and folders of a version; an export has about ten.
_MAX_FILES = 10_000
# Of protocol buffers.
_MAX_GRAPH_BYTES = 2**31 - 1
# Lines in the log after one scan.
_MAX_LINES = 20

_log = logging.getLogger(__name__)

# The folders of each model's versions, by their numbers.
Found = dict[str, dict[int, Path]]
# Why a path is not served.
Problems = dict[Path, str]


class VersionFolder:
    """A folder of models, one model's folder, which holds its versions, or one version.

    Which of them it is, is decided once: nothing that appears in it later hides the rest.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._told: Problems = {}
        self._holds = "models"
        if os.path.isfile(self.path / GRAPH_FILE):
            self._holds = "files"
            return
        versions = _numbered(self.path, {})
        graphs = any(os.path.isfile(path / GRAPH_FILE) for path in versions.values())
        # The name of a model may be a number.
        if graphs or (versions and not self.scan()[0]):
            self._holds = "versions"

    def scan(self) -> tuple[Found, Problems]:
        """What there is. `self.path` is among the problems if nothing can be known."""
        problems: Problems = {}
        if self._holds == "models":
            models = {}
            for path in _entries(self.path, problems):
                if os.path.isdir(path):
                    models[path] = _numbered(path, problems)
                elif os.path.islink(path) and not os.path.exists(path):
                    problems[path] = "is a link to nothing"
        else:
            path = Path(os.path.realpath(self.path))
            if self._holds == "versions":
                models = {path: _numbered(path, problems)}
                for other in _entries(path, {}):
                    if not _is_decimal(other.name) and _numbered(other, {}):
                        problems[other] = f"is not served beside the versions of {path.name}"
            elif not os.path.isfile(path / GRAPH_FILE):
                models = {}
            elif not _is_decimal(path.name):
                models = {path: {1: path}}
            else:
                models = {path.parent: _by_number([path], problems)}
        found: Found = {}
        for path, versions in models.items():
            if versions and not _NAME.fullmatch(path.name):
                problems[path] = "must have a name of letters, digits, '.', '_' and '-'"
            elif versions:
                found[path.name] = versions
        return found, problems

    def tell(self, problems: Problems) -> None:
        """Logs the problems of a scan that the one before did not have."""
        new = [path for path, problem in problems.items() if self._told.get(path) != problem]
        for path in new[:_MAX_LINES]:
            _log.warning("not served: %s %s", path, problems[path])
        if new[_MAX_LINES:]:
            _log.warning("not served: %d more", len(new) - _MAX_LINES)
        self._told = problems


def _entries(folder: Path, problems: Problems) -> list[Path]:
    try:
        # 1 before 01.
        names = sorted(os.listdir(folder), key=lambda name: (len(name), name))
    except OSError as error:
        problems[folder] = f"cannot be listed: {error.strerror}"
        return []
    return [folder / name for name in names]


def _is_decimal(name: str) -> bool:
    # Not isdigit, which is true for other scripts' numbers and superscripts.
    return name.isascii() and name.isdecimal()


def _numbered(folder: Path, problems: Problems) -> dict[int, Path]:
    paths = [path for path in _entries(folder, problems) if _is_decimal(path.name)]
    return _by_number(paths, problems)


def _by_number(paths: list[Path], problems: Problems) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in paths:
        number = int(path.name)
        if number > LARGEST_VERSION:
            problems[path] = f"must have a version of at most {LARGEST_VERSION}"
        elif not os.path.exists(path):
            problems[path] = "is a link to nothing"
        elif not os.path.isdir(path):
            problems[path] = "must be a folder"
        elif number in found:
            problems[path] = f"has the version of {found[number].name}"
        else:
            found[number] = path
    return found


def stamp(version: Path) -> str:
    """A text that differs when any file of the version does; empty if it is gone."""
    digest = hashlib.blake2b()
    try:
        for path, status in _contents(version):
            # A copy may keep all but the time of the last change, which nobody can set.
            times = (status.st_mtime_ns, status.st_ctime_ns)
            fields = (status.st_ino, status.st_size, *times, status.st_mode)
            digest.update(os.fsencode(path) + repr(fields).encode())
    except OSError:
        return ""
    return digest.hexdigest()


def check_files(version: Path) -> None:
    """Finds what must not be given to TensorFlow.

    A link to nothing, such as an editor's lock file, does no harm unless it is read.

    Raises:
        OSError: there is no graph, or it cannot be looked at.
        ValueError: reading a file might not end, or take all memory.
    """
    for count, (path, status) in enumerate(_contents(version), 1):
        if count == _MAX_FILES:
            raise ValueError(f"{version} must have fewer than {_MAX_FILES:,} files")
        if not (stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            check_regular_file(path)
    graph = version / GRAPH_FILE
    if not os.path.isfile(graph):
        raise FileNotFoundError(f"{version} has no {GRAPH_FILE}")
    if os.path.getsize(graph) > _MAX_GRAPH_BYTES:
        raise ValueError(f"{graph} must have at most {_MAX_GRAPH_BYTES:,} bytes")


def _contents(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The first of all that is in a folder, itself included, with what links lead to.

    Folders behind links are not entered: they may be any, and lead back.
    """
    yield str(folder), os.stat(folder)
    folders, count = [str(folder)], 1
    while folders:
        here = folders.pop()
        try:
            names = sorted(os.listdir(here))
        except OSError:  # its mode is known
            continue
        for name in names:
            path = os.path.join(here, name)
            try:
                status = link = os.lstat(path)
                if stat.S_ISLNK(link.st_mode) and os.path.exists(path):
                    status = os.stat(path)
            except OSError:  # it is just gone
                continue
            yield path, status
            count += 1
            if count == _MAX_FILES:
                return
            if stat.S_ISDIR(link.st_mode):
                folders.append(path)
