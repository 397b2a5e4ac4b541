"""Files over HTTPS, kept in the user's cache: complete or absent, and always the same.

What a URL gave the first time is pinned: its size and SHA-256 are written beside it, checked
whenever it is used, and required when it is fetched again. An interrupted download resumes where it
stopped, if the server can.
"""

import contextlib
import functools
import hashlib
import http
import http.client
import json
import os
import pathlib
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from bertgen_tf.data import folders
from bertgen_tf.data.progress import show_progress

_TIMEOUT_SECONDS = 60
_BLOCK = 2**20
# Those that say nothing about the next URL; HTTP errors are URLErrors.
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


def fetch(
    urls: Sequence[str],
    path: str | os.PathLike,
    *,
    max_bytes: int,
    sha256: str | None = None,
    verbose: Any = 0,
) -> None:
    """Makes sure that a file exists and is unchanged.

    Args:
        urls: of the file, tried in turn.
        path: where it is kept; PATH.json says what it is, PATH.partial is what has arrived so far.
        max_bytes: of the file.
        sha256: of the file, in hexadecimal, if known.
        verbose: shows progress on stderr: "auto", 0 or 1.

    Raises:
        OSError: no URL answers, the answer breaks off, or the disk is full; what arrived is kept.
        ValueError: the file is too large, or differs from what it was.
    """
    path = pathlib.Path(path)
    with folders.disk_errors(path), locked(path):
        pinned = _read_pin(path)
        if path.exists():
            _check(path, pinned, sha256)
            return
        partial = path.with_name(f"{path.name}.partial")
        errors = []
        for url in urls:
            try:
                _download(url, partial, max_bytes, verbose)
                break
            except _NETWORK_ERRORS as error:
                errors.append(f"{url}: {error}")
        else:
            raise ConnectionError(f"{path.name} could not be fetched: {'; '.join(errors)}")
        found = {"url": url, "size": partial.stat().st_size, "sha256": _digest(partial)}
        for expected in (sha256, pinned and pinned["sha256"]):
            if expected and found["sha256"] != expected:
                partial.unlink()
                raise ValueError(
                    f"{url} should have the SHA-256 {expected}, but what arrived has "
                    f"{found['sha256']} and was deleted"
                )
        if pinned is None:
            _write_pin(path, found)
        os.replace(partial, path)


def _download(url: str, partial: pathlib.Path, max_bytes: int, verbose: Any) -> None:
    """Fills `partial`, from its end if the server can."""
    tag_path = partial.with_name(f"{partial.name}.etag")
    done = partial.stat().st_size if partial.exists() else 0
    tag = tag_path.read_text(encoding="utf-8") if done and tag_path.exists() else None
    headers = {"User-Agent": "bertgen_tf"}
    if tag:  # without one, nobody knows whether the rest is of the same file
        headers |= {"Range": f"bytes={done}-", "If-Range": tag}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if not tag or error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # Killed between the last byte and the renaming; or the file is shorter now.
        partial.unlink()
        _download(url, partial, max_bytes, verbose)
        return
    with response:
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise ValueError(f"{url} leads to {response.url}, which is not HTTPS")
        goes_on = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            raise http.client.HTTPException(f"expected the bytes from {done} on")
        done = done if goes_on else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        if total is not None and total > max_bytes:
            raise ValueError(f"{url} has {total:,} bytes, more than {max_bytes:,}")
        if not goes_on:
            tag = response.headers.get("ETag", "")
            strong = tag.startswith('"')
            partial.unlink(missing_ok=True)
            tag_path.write_text(tag if strong else "", encoding="utf-8")
        with open(partial, "ab") as file:
            done = _copy(response, file, done, total, url, max_bytes, verbose)
    if total is not None and done < total:
        raise http.client.HTTPException(f"broke off after {done:,} of {total:,} bytes")
    tag_path.unlink(missing_ok=True)


def _copy(
    response: BinaryIO,
    file: BinaryIO,
    done: int,
    total: int | None,
    url: str,
    max_bytes: int,
    verbose: Any,
) -> int:
    whole = None if total is None else -(-total // _BLOCK)
    with show_progress(verbose, whole, 1, done // _BLOCK, unit="MiB") as advance:
        while block := response.read(_BLOCK):
            done += len(block)
            if done > max_bytes:
                raise ValueError(f"{url} has more than {max_bytes:,} bytes")
            file.write(block)
            advance(1)
        file.flush()
        os.fsync(file.fileno())
    return done


def _check(path: pathlib.Path, pinned: dict[str, Any] | None, sha256: str | None) -> None:
    """Raises a ValueError if a file is not what it was."""
    expected = sha256 or (pinned and pinned["sha256"])
    status = path.stat()
    if expected and _digest_once(str(path), status.st_size, status.st_mtime_ns) != expected:
        raise ValueError(
            f"{path} should have the SHA-256 {expected}, but was changed: delete it to fetch it "
            "again"
        )


@functools.lru_cache(maxsize=64)
def _digest_once(path: str, size: int, time: int) -> str:
    return _digest(path)


def _digest(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pin_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.json")


def _read_pin(path: pathlib.Path) -> dict[str, Any] | None:
    pin = _pin_path(path)
    try:
        content = json.loads(pin.read_text(encoding="utf-8"))
        if isinstance(content["sha256"], str):
            return content
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{pin} should contain the sha256 of {path.name}, but is damaged: delete both")


def _write_pin(path: pathlib.Path, content: dict[str, Any]) -> None:
    pin = _pin_path(path)
    new = pin.with_name(f"{pin.name}.new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(new, pin)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """One process at a time fetches a file; others wait, then find it."""
    lock: Callable[[Any], None] = lambda file: None  # noqa: E731
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        lock = lambda file: fcntl.flock(file, fcntl.LOCK_EX)  # noqa: E731
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            lock(file)
        yield
