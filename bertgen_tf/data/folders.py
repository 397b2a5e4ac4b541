"""Folders that are written as a whole, and the user's cache.

The folders appear, or are replaced, only when complete.
"""

import contextlib
import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator


def write_folder(
    folder: str | os.PathLike,
    write: Callable[[pathlib.Path], None],
    is_ours: Callable[[pathlib.Path], bool],
    kind: str,
    check: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Lets `write` fill a new folder, which then becomes `folder`.

    Args:
        folder: must be new, empty or `is_ours`.
        write: gets an empty temporary folder beside it.
        is_ours: whether a folder holds what we may replace, and nothing else.
        kind: what that is, for errors.
        check: gets the temporary folder once it is written; if it raises, `folder` is unchanged.

    Raises:
        OSError: see `check_writable`.
    """
    check_writable(folder, is_ours, kind)
    folder = pathlib.Path(folder).resolve()
    with temporary_folder(folder) as temporary:
        probe = temporary / "probe"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        write(temporary)
        for path in temporary.iterdir():
            path.chmod(mode)  # safetensors makes files that only their owner can read
        if check is not None:
            check(temporary)
        os.chmod(temporary, 0o755)
        old = temporary.with_name(f"{temporary.name}-old")
        try:
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside `folder`, of the user alone, which the block fills and renames to it.

    If the block raises, nothing is left: neither that folder nor those above it that were made.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # another has put something there
                parent.rmdir()
        raise


def check_writable(
    folder: str | os.PathLike, is_ours: Callable[[pathlib.Path], bool], kind: str
) -> None:
    """Raises if `write_folder` would not or could not write, to find out before training.

    Raises:
        FileExistsError: it is a file, a folder with other files than `is_ours`, or a mount point,
            which cannot be replaced.
        NotADirectoryError: it lies below a file.
        PermissionError: the folder that it lies in cannot be written.
    """
    folder = pathlib.Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder must be a folder, but {folder} is a file.")
    if os.path.ismount(folder):
        raise FileExistsError(
            f"folder is replaced as a whole and must not be a mount point, but {folder} is one. "
            f"Choose a folder in it, such as {folder / 'model'}."
        )
    if folder.exists() and any(folder.iterdir()) and not is_ours(folder):
        raise FileExistsError(
            f"folder must be new, empty or {kind} of ours to replace, but {folder} holds other "
            "files. Choose another folder."
        )
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"folder must lie in a folder, but {parent} is a file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"folder must lie in a folder that can be written, but {parent} cannot."
        )


def check_version_path(path: str | os.PathLike) -> None:
    """Raises unless `path` is a new version, `NAME/VERSION`.

    Raises:
        FileExistsError: the version exists already.
        ValueError: the version is not an integer.
    """
    path = pathlib.Path(path)
    if not re.fullmatch("[0-9]{1,18}", path.name):
        raise ValueError(
            "path must end in an integer version, because TensorFlow Serving looks for nothing "
            f'else, received {str(path)!r}. Use "{path}/1".'
        )
    if path.exists():
        raise FileExistsError(f"path must be a new version, but {path} exists. Use another number.")


def users_cache(name: str) -> str:
    """A folder that nobody else can put files in: `bertgen_tf/NAME` in the user's cache.

    That is `XDG_CACHE_HOME`, or `~/.cache`.

    Raises:
        OSError: it cannot be created.
        ValueError: others can write to it, or it belongs to another user.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as its specification requires
        base = os.path.expanduser("~/.cache")
    os.makedirs(base, exist_ok=True)
    folder = base
    for part in ("bertgen_tf", name):
        folder = os.path.join(folder, part)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
        open_to_others = status.st_uid != os.getuid() or status.st_mode & 0o022
        if open_to_others or not stat.S_ISDIR(status.st_mode):
            raise ValueError(
                f"{folder} should be a folder of the user's own and writable by nobody else, but "
                f"has owner {status.st_uid} and mode {stat.filemode(status.st_mode)}"
            )
    return folder
