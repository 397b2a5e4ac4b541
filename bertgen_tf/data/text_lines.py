"""The lines of a text file, whatever its bytes are: UTF-8, or UTF-16 with a mark, or gzip of it.

Lines end as on Unix or Windows, and at no other character, so that inputs and outputs stay aligned.
"""

import codecs
import contextlib
import gzip
import io
import pathlib
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Line = TypeVar("Line", str, list[str])

GZIP = ".gz"  # after the extension that tells what the lines are
_GZIP_BYTES = b"\x1f\x8b\x08"
# UTF-32 first, as its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_TEXTS = (
    (b"PK\x03\x04", "a zip archive or a workbook: unpack it, or save its table as .csv"),
    (b"\xd0\xcf\x11\xe0", "an old Office file: save its table as .csv"),
    (b"PAR1\x15", "Parquet: write it as .jsonl"),
    (b"BZh91AY&SY", "compressed by bzip2: unpack it, or compress it with gzip"),
    (b"\xfd7zXZ\x00", "compressed by xz: unpack it, or compress it with gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it, or compress it with gzip"),
)


def suffix(path: str) -> str:
    """The extension that tells what the lines are, in lower case: `.tsv` of `A.TSV.gz`."""
    return pathlib.Path(_without_gzip(path)).suffix.lower()


def stem(path: str) -> str:
    """The name without folder and extensions: `a` of `texts/a.tsv.gz`."""
    return pathlib.Path(_without_gzip(path)).stem


def _without_gzip(path: str) -> str:
    return path[: -len(GZIP)] if path.lower().endswith(GZIP) else path


def read_lines(path: str) -> Iterator[tuple[str, str]]:
    """The lines of a file without their ends, and where each stands, for messages.

    The first bytes, not the name, tell whether it is packed, and how characters are encoded.

    Args:
        path: of the file; `-` is standard input.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text in UTF-8, UTF-16 or gzip.
    """
    name = "standard input" if path == "-" else path
    opened = contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")
    with opened as file:
        yield from _decode(file, name)


def _decode(file: Any, name: str) -> Iterator[tuple[str, str]]:
    # At a keyboard this waits for a line, as reading it would.
    start = file.peek(16)
    for mark, kind in _NO_TEXTS:
        if start.startswith(mark):
            raise ValueError(f"{name} is {kind}")
    encodings = [encoding for mark, encoding in _MARKS if start.startswith(mark)]
    if start.startswith(_GZIP_BYTES):
        try:
            yield from _decode(gzip.GzipFile(fileobj=file), name)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{name} cannot be unpacked by gzip: {error}") from error
    elif encodings:
        text = io.TextIOWrapper(file, encodings[0], newline="\n")
        try:
            for number, line in enumerate(text, 1):
                yield f"{name}, line {number}", _without_end(line)
        except UnicodeError as error:
            raise ValueError(
                f"{name}: expected {encodings[0].upper()}, which its first bytes promise, but not "
                "all of it is: write it again, as UTF-8"
            ) from error
        finally:
            text.detach()  # or it would close standard input
    else:
        yield from decode_lines(file, name)


def decode_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, str]]:
    """The lines of a binary file in UTF-8, as `read_lines` gives them.

    Raises:
        ValueError: a line is not UTF-8.
    """
    # Not as text, where a lone \r would end lines too.
    for number, line in enumerate(lines, 1):
        place = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place}: expected UTF-8, but byte {error.start + 1} of the line "
                f"({line[error.start]:#04x}) is not: convert the file, for example with iconv -f "
                "WINDOWS-1252 -t UTF-8"
            ) from error
        if not text:  # an empty file that begins with a mark
            return
        if number == 1 and text.count("\0") * 3 >= len(text):
            raise ValueError(
                f"{place}: expected UTF-8, but every other byte is 0, as in UTF-16 without a byte "
                "order mark: convert the file, for example with iconv -f UTF-16LE -t UTF-8"
            )
        yield place, _without_end(text)


def without_blank_end(lines: Iterable[tuple[str, Line]]) -> Iterator[tuple[str, Line]]:
    """The lines, or rows of fields, up to the last that is not blank; with their places."""
    held = []
    for line in lines:
        held.append(line)
        if "".join(line[1]).strip():
            yield from held
            held.clear()


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")
