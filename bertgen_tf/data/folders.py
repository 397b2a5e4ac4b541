"""Folders and files that are written as a whole, and the user's cache.

They appear, or are replaced, only when complete: until then they are in a hidden folder beside. The
process that fills it holds a lock on it, which the kernel releases however the process ends. So
what a killed run left is told from what is still being written, and the next run for the same name
removes it.
"""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator

# What says that a disk takes no more, or nothing at all, whichever library was writing.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# Of folders that a running process may be replacing.
_OLD = "-old"


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
    sweep(folder)
    check_writable(folder, is_ours, kind)
    folder = pathlib.Path(folder).resolve()
    with temporary_folder(folder) as temporary, contextlib.ExitStack() as stack:
        mode = _usual_mode(temporary)
        write(temporary)
        for path in temporary.iterdir():
            path.chmod(mode)  # safetensors makes files that only their owner can read
        if check is not None:
            check(temporary)
        os.chmod(temporary, 0o755)
        old = temporary.with_name(temporary.name + _OLD)
        try:
            if folder.exists():
                # Another run that looks in this moment leaves it alone.
                with contextlib.suppress(OSError):
                    stack.callback(_unlock, _lock(folder))
                folder.rename(old)
            temporary.rename(folder)
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a path to write a file to, which gets the name `path` if the block succeeds.

    Raises:
        OSError: it cannot be written; a file that was there is unchanged.
    """
    path = pathlib.Path(path)
    with _temporary_folder(path) as folder:
        new = folder / path.name
        mode = _usual_mode(folder)
        yield new
        new.chmod(mode)
        os.replace(new, path)


@contextlib.contextmanager
def temporary_folder(folder: pathlib.Path, names: str | None = None) -> Iterator[pathlib.Path]:
    """A new folder beside `folder`, of the user alone, which the block fills and renames to it.

    Nothing else is left: neither that folder, nor, if the block raises, those above it that were
    made.

    Args:
        folder: what is to be written.
        names: see `sweep`.

    Raises:
        OSError: see `disk_errors`.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(folder, names) as temporary:
            yield temporary
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):  # another has put something there
                parent.rmdir()
        raise


@contextlib.contextmanager
def _temporary_folder(target: pathlib.Path, names: str | None = None) -> Iterator[pathlib.Path]:
    """The same in a folder that exists."""
    sweep(target, names)
    with disk_errors(target):
        temporary, lock = _make_temporary(target)
    try:
        with disk_errors(target, temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock)


def _make_temporary(target: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """A new folder, and its lock."""
    while True:
        try:
            made = tempfile.mkdtemp(prefix=f".{target.name}.bertgen_tf-", dir=target.parent)
        except OSError as error:  # the user knows no hidden folder
            raise OSError(error.errno, error.strerror, str(target)) from error
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # another run sweeps it
            return pathlib.Path(made), _lock(made)


def _usual_mode(folder: pathlib.Path) -> int:
    """The mode of files that the user makes."""
    probe = folder / "probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


def sweep(target: str | os.PathLike, names: str | None = None) -> None:
    """Removes what killed runs left beside `target`, and puts back what one was about to replace.

    That is what has a name of ours, belongs to this user, and is locked by no process. On file
    systems without locks nothing is removed.

    Args:
        target: a file or folder that is to be written. It need not exist.
        names: a pattern of the names to look for; by default that of `target`.
    """
    target = pathlib.Path(os.path.realpath(target))
    names = re.escape(target.name) if names is None else names
    for path in _left(target, names):
        try:
            lock = _lock(path)
        except OSError:  # it is being written, is gone, or no folder
            continue
        if lock is None:
            continue
        try:
            if os.fstat(lock).st_uid != os.geteuid():
                continue
            own = target.with_name(path.name[1:].rpartition(".bertgen_tf-")[0])
            if path.name.endswith(_OLD) and not own.exists():
                path.rename(own)
                warnings.warn(
                    f"{own} is the older one again: a run was killed while it replaced it",
                    stacklevel=2,
                )
            shutil.rmtree(path, ignore_errors=True)
        except OSError:  # the folder cannot be written
            continue
        finally:
            _unlock(lock)


def check_replaced(folder: str | os.PathLike) -> None:
    """Raises if a run was killed in the moment in which it replaced `folder`.

    Raises:
        FileNotFoundError: it says where the older one is.
    """
    target = pathlib.Path(folder).resolve()
    for path in _left(target, re.escape(target.name)):
        if path.name.endswith(_OLD) and not target.exists():
            raise FileNotFoundError(
                f"{folder} is missing, because a run was killed while it replaced it: rename "
                f"{path} to {target.name}."
            )


def _left(target: pathlib.Path, names: str) -> list[pathlib.Path]:
    """Hidden folders of `names` beside `target`, the last replaced one first."""
    pattern = re.compile(rf"\.(?:{names})\.bertgen_tf-[a-z0-9_]{{8}}({_OLD})?")
    with contextlib.suppress(OSError):
        found = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.lstat().st_ctime, reverse=True)
    return []


def _lock(folder: str | os.PathLike) -> int | None:
    """Locks a folder until `_unlock`, or the end of the process.

    Returns:
        a file descriptor; None on a file system without locks.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: it is gone, or no folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    # A run that sweeps may have removed it between opening and locking.
    if not os.path.lexists(folder) or not os.path.samestat(os.fstat(descriptor), os.lstat(folder)):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


@contextlib.contextmanager
def disk_errors(
    path: str | os.PathLike, temporary: str | os.PathLike | None = None
) -> Iterator[None]:
    """Raises an OSError with a path if a disk is full, a quota used up, or writing not allowed.

    TensorFlow, safetensors and HDF5 have errors of their own for it, and Python's own name no file
    when what it was open for fails.

    Args:
        path: what is being written, for errors that do not say.
        temporary: what has the place of `path` until it is complete.
    """
    try:
        yield
    except Exception as error:
        number = _disk_error(error)
        name = error.filename if isinstance(error, OSError) else None
        if temporary is not None and str(name).startswith(str(temporary)):
            name = f"{path}{str(name).removeprefix(str(temporary))}"
        elif number is None:
            raise
        if number is None:
            number = error.errno
        raise OSError(number, os.strerror(number), str(name or path)) from error


def _is_writers(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in ("safetensors", "tensorflow")


def is_disk_error(error: BaseException) -> bool:
    """Whether it is one of `disk_errors`."""
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


def _disk_error(error: Exception) -> int | None:
    """The number of a disk's error, if it is one, whatever its class."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _DISK_ERRORS else None
    if type(error) not in (OSError, RuntimeError) and not _is_writers(error):
        return None
    return next((number for number in _DISK_ERRORS if os.strerror(number) in str(error)), None)


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
