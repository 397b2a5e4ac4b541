"""Fetches TF Hub modules: URLs and archives become folders, in a cache.

Archives are not trusted: only plain files and folders are unpacked, inside their own folder, up to
a size limit.
"""

import contextlib
import gzip
import hashlib
import os
import pathlib
import tarfile
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import BinaryIO

import tensorflow as tf

from bertgen_tf.checks import first_line
from bertgen_tf.data import downloads, folders
from bertgen_tf.network import sources

# The largest original is 3.1 GB; an archive that unpacks to more is not such a module.
MAX_UNPACKED_BYTES = 8 * 2**30
MAX_MEMBERS = 10_000
# Long names and extended attributes are read whole into memory; real ones have a few hundred bytes.
MAX_HEADER_BYTES = 2**20
# No path on Linux is longer.
MAX_NAME_LENGTH = 4096
CACHE_VARIABLE = "TFHUB_CACHE_DIR"
_ARCHIVES = (".tar.gz", ".tgz")
_TIMEOUT_SECONDS = 60


def tensorflow_hub() -> ModuleType:
    """The library, imported where a module is read: it brings Keras 2, and takes its time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")
        import tensorflow_hub
        import tensorflow_hub.resolver
    return tensorflow_hub


def resolve(handle: str) -> str:
    """The local folder of a handle: downloaded and unpacked, if need be.

    It is unpacked under `TFHUB_CACHE_DIR`, or, if that is unset, under `bertgen_tf/hub` in the
    user's cache folder: `XDG_CACHE_HOME`, or `~/.cache`. The latter is created for the user alone
    (mode 0700), and must not be writable by anyone else. What is there, up to 3 GB per module,
    stays until it is deleted.

    Args:
        handle: a folder; a URL in the TF Hub protocol (`?tf-hub-format=compressed`), kept under
            the name that tensorflow_hub gives it; or a .tar.gz file, as served by Kaggle, kept
            under its SHA-256.

    Raises:
        FileNotFoundError: there is no such folder or file.
        OSError: the disk is full, or cannot be written.
        ValueError: it is what another call reads, it cannot be fetched or unpacked, or holds no
            SavedModel, or the user's cache folder is writable by others, or not at all.
    """
    sources.handles.check_family(handle, sources.handles.HUB)
    is_url = "://" in handle
    is_archive = os.path.isfile(handle) and handle.endswith(_ARCHIVES)
    if not is_url and not is_archive and not os.path.isdir(handle):
        raise FileNotFoundError(
            f"{handle} should be the folder of a TF Hub module or a URL, or a .tar.gz file of one, "
            "but there is no such folder."
        )
    if is_url or is_archive:
        _check_cache(handle)
    try:
        if is_url:
            path = _fetch(handle)
        else:
            path = _unpack_file(handle) if is_archive else handle
    except Exception as error:  # of urllib, tarfile, zlib, tensorflow_hub and TensorFlow's files
        if folders.is_disk_error(error):
            raise
        action = "answer with" if is_url else "be"
        raise ValueError(
            f"{handle} should {action} a .tar.gz of a TF Hub module, but fetching or unpacking "
            f"it failed: {first_line(error)}"
        ) from error
    if not os.path.exists(os.path.join(path, "saved_model.pb")):
        found = ", ".join(sorted(os.listdir(path))[:6]) or "nothing"
        raise ValueError(
            f"{where(handle, path)} should hold a TF Hub module, with a file saved_model.pb, but "
            f"holds {found}."
        )
    return path


def where(handle: str, path: str) -> str:
    """The handle, and the folder that holds what was fetched: it is never fetched again."""
    return handle if path == handle else f"{handle} (kept in {path}: delete it to fetch it again)"


def _fetch(handle: str) -> str:
    resolver = tensorflow_hub().resolver
    compressed = resolver.model_load_format() in (
        resolver.ModelLoadFormat.COMPRESSED.value,
        resolver.ModelLoadFormat.AUTO.value,
    )
    if not handle.startswith(("http://", "https://")) or not compressed:
        with _same_cache():
            return tensorflow_hub().resolve(handle)

    # Not left to tensorflow_hub: it refuses links and `..`, but unpacks without a bound on size.
    def download(folder: str) -> None:
        parts = urllib.parse.urlsplit(handle)
        query = [*urllib.parse.parse_qsl(parts.query), ("tf-hub-format", "compressed")]
        url = urllib.parse.urlunsplit(parts._replace(query=urllib.parse.urlencode(query)))
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            unpack(response, folder)

    return _keep(hashlib.sha1(handle.encode()).hexdigest(), download)


def _unpack_file(path: str) -> str:
    def extract(folder: str) -> None:
        with open(path, "rb") as file:
            unpack(file, folder)

    with open(path, "rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()
    return _keep(name, extract)


def _keep(name: str, fill: Callable[[str], None]) -> str:
    """A folder of the cache, which `fill` gets to fill if there is none; complete or absent.

    tensorflow_hub's own way waits ten minutes for a process that was killed, and keeps its files.
    """
    folder = pathlib.Path(_cache_folder(name))
    if folder.is_dir() and os.listdir(folder):  # the cache may be read-only
        return str(folder)
    with downloads.locked(folder):
        if not folder.is_dir() or not os.listdir(folder):
            with folders.temporary_folder(folder) as temporary:
                fill(str(temporary))
                temporary.chmod(0o755)
                temporary.rename(folder)
    return str(folder)


def _check_cache(handle: str) -> None:
    try:
        _cache_folder("")
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise ValueError(
            f"{handle} should be unpacked, but there is no folder for that: {first_line(error)}. "
            f"Fix that, or set {CACHE_VARIABLE} to a folder."
        ) from error


def _cache_folder(name: str) -> str:
    folder = tensorflow_hub().resolver.tfhub_cache_dir()
    if folder is None:
        folder = folders.users_cache("hub")
    else:
        tf.io.gfile.makedirs(folder)
    return os.path.join(folder, name)


@contextlib.contextmanager
def _same_cache() -> Iterator[None]:
    """Lets tensorflow_hub unpack where we do; it takes the folder from the environment."""
    if tensorflow_hub().resolver.tfhub_cache_dir() is not None:
        yield
        return
    os.environ[CACHE_VARIABLE] = folders.users_cache("hub")
    try:
        yield
    finally:
        del os.environ[CACHE_VARIABLE]


class _Bounded:
    """A stream that fails after `left` more bytes have been read, unless `left` is reset."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.left = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"a header in the archive has more than {MAX_HEADER_BYTES} bytes")
        return data


def unpack(file: BinaryIO, folder: str) -> None:
    """Unpacks a .tar.gz stream into a folder.

    Raises:
        ValueError: a member is not a plain file or folder, or would lie outside, or all together
            are too large or too many, or a header is too large.
    """
    size = 0
    with gzip.open(file) as plain:
        stream = _Bounded(plain)
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for count, member in enumerate(archive, 1):
                name = member.name
                if len(name) > MAX_NAME_LENGTH:
                    raise ValueError(
                        f"a member of the archive has a name of {len(name)} characters, more than "
                        f"{MAX_NAME_LENGTH}"
                    )
                size += member.size
                # A folder's size would count as read, though nothing of it is.
                plain_folder = member.isdir() and member.size == 0
                if not (member.isreg() or plain_folder) or member.issparse():
                    raise ValueError(
                        f"member {name!r} of the archive is not a plain file or folder"
                    )
                if os.path.isabs(name) or ".." in pathlib.PurePath(name).parts:
                    raise ValueError(f"member {name!r} of the archive would lie outside its folder")
                if size > MAX_UNPACKED_BYTES or count > MAX_MEMBERS:
                    raise ValueError(
                        f"the archive unpacks to more than {MAX_UNPACKED_BYTES} bytes or "
                        f"{MAX_MEMBERS} files"
                    )
                stream.left = member.size + MAX_HEADER_BYTES
                archive.extract(member, folder, filter="data")
