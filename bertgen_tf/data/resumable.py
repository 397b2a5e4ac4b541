"""A resumable output file: it gets its final name only when it is complete.

Until everything is written the file is called FILE.partial, so that no error costs an older one.
FILE.partial.json beside it says which run began it: lines of another run must not follow.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from bertgen_tf.data import folders

_AGAIN = "overwrite=True starts anew"


class Begun(NamedTuple):
    """What an earlier run left: `lines` complete ones, up to byte `size` of the file."""

    lines: int = 0
    size: int = 0


def check_file(name: str, path: str, kind: str = "a file") -> None:
    """Raises a ValueError if no file could be written there; `name` is the argument to blame."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{name} must be {kind}, but {path} is not one")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(
            f"{name} must lie in a folder that can be written, but {folder} is not one"
        )


def check_path(path: str, overwrite: bool, resume: bool) -> None:
    """Raises a ValueError if nothing could, or should, be written there; "-" is not a file."""
    if path == "-":
        return
    check_file("output", path, "a file, or - for standard output")
    if overwrite or resume:
        return
    if os.path.exists(_partial(path)):
        raise ValueError(f"{_partial(path)} exists; resume=True continues, {_AGAIN}")
    if os.path.exists(path):
        raise ValueError(f"{path} exists; overwrite=True replaces it")


def find_begun(path: str, run: dict[str, Any], total: int) -> Begun:
    """What a run with the same settings can resume.

    Args:
        path: the output file.
        run: what determines the outputs, as JSON.
        total: the lines of a complete file.

    Returns:
        how much is done; all of it if `path` itself is complete.

    Raises:
        ValueError: another run wrote what exists, or it is not known which.
    """
    partial = _partial(path)
    if not os.path.exists(partial):
        if not os.path.exists(path):
            return Begun()
        # Perhaps killed after the last line: a complete file has its final name.
        done = _complete_lines(path)
        if done.lines != total or done.size != os.path.getsize(path):
            raise ValueError(
                f"{path} exists, with {done.lines} lines for {total} texts, and no {partial} to "
                f"resume; {_AGAIN}"
            )
        return done
    begun = _complete_lines(partial)
    if begun.lines:
        _check_same_run(path, run)
    if begun.lines > total:
        raise ValueError(f"{partial} has {begun.lines} lines for {total} texts; {_AGAIN}")
    return begun


def is_complete(path: str) -> bool:
    """Whether a file that `find_begun` found already has its final name."""
    return os.path.exists(path) and not os.path.exists(_partial(path))


@contextlib.contextmanager
def open_output(
    path: str,
    run: dict[str, Any] | None,
    begun: Begun,
    complain: Callable[[str], None],
) -> Iterator[TextIO]:
    """The file to write to, which gets its final name if the block succeeds.

    Args:
        path: the output file, or "-" for standard output.
        run: what `find_begun` compares; None if the run could not be resumed.
        begun: what to keep of FILE.partial.
        complain: gets a message that says where the lines are, if the block raises.

    Raises:
        OSError: the file cannot be written, or another run writes to it.
    """
    if path == "-":
        sys.stdout.reconfigure(encoding="utf-8")
        yield sys.stdout
        return
    partial = _partial(path)
    with (
        folders.disk_errors(partial),
        open(partial, "a", encoding="utf-8", newline="\n") as file,
    ):
        _lock(file, partial)
        try:
            file.truncate(begun.size)
            if not begun.lines:
                # In this order no lines ever stand beside the settings of another run.
                sync(file)
                forget(path)
                if run is not None:
                    _write_settings(_settings(path), run)
            yield file
            sync(file)
        except BaseException:
            with contextlib.suppress(OSError):
                file.flush()
            if os.path.getsize(partial):
                complain(f"what was finished is in {partial}")
            else:
                os.remove(partial)
                forget(path)
            raise
    os.replace(partial, path)
    forget(path)


def _lock(file: TextIO, path: str) -> None:
    """Raises an OSError while another process writes to the file, or has renamed it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    held = f"another run is writing to {path}: let it end, then use resume=True"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(held) from error
    except OSError:  # a file system without locks
        return
    # A file that got its final name between opening and locking is complete.
    if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        raise OSError(held)


def forget(path: str) -> None:
    """Removes the settings of a run that is complete."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(_settings(path))


def sync(file: TextIO) -> None:
    """Stores what was written where neither a kill nor, for files, a power cut loses it."""
    file.flush()
    if file is not sys.stdout:
        os.fsync(file.fileno())


def digest(*paths: str | os.PathLike) -> str:
    """SHA-256 of the contents of files."""
    digests = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digests.update(hashlib.file_digest(file, "sha256").digest())
    return digests.hexdigest()


def _check_same_run(path: str, run: dict[str, Any]) -> None:
    partial, settings = _partial(path), _settings(path)
    try:
        earlier = json.loads(Path(settings).read_text(encoding="utf-8"))
        if not isinstance(earlier, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"resume=True needs {settings}, which says which run began {partial}, but it cannot "
            f"be read; {_AGAIN}"
        ) from error
    run = json.loads(json.dumps(run))  # tuples are lists there
    other = [name for name in {**earlier, **run} if earlier.get(name) != run.get(name)]
    if other:
        raise ValueError(
            f"resume=True needs the run that began {partial}, but that had another "
            f"{', '.join(other)}; {_AGAIN}"
        )


def _write_settings(path: str, run: dict[str, Any]) -> None:
    new = f"{path}.new"
    try:
        with open(new, "w", encoding="utf-8") as file:
            json.dump(run, file, indent=2)
            file.write("\n")
            sync(file)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(new)
        raise


def _complete_lines(path: str) -> Begun:
    """The complete lines, without one that was cut off."""
    lines = size = position = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            if b"\n" in block:
                lines += block.count(b"\n")
                size = position + block.rindex(b"\n") + 1
            position += len(block)
    return Begun(lines, size)


def _partial(path: str) -> str:
    return f"{path}.partial"


def _settings(path: str) -> str:
    return f"{path}.partial.json"
