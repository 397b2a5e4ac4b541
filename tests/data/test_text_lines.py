"""What the bytes of a text file may be."""

import gc
import gzip
import io
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bertgen_tf.data import text_lines

# U+2028 ends no line, nor does a lone \r; U+0A0A has the byte of a line's end twice, in UTF-16.
LINES = ["ü\u2028x\u0a0a", "", "\ufeffa\rb", "c \U0001f98a"]
# Python's names add the mark, in the byte order of this machine; the others are written out.
ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16": b"",
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-32": b"",
}


def read(path) -> list[str]:
    return [line for _, line in text_lines.read_lines(str(path))]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_every_encoding_packed_or_not(encoding, end, tmp_path):
    content = ENCODINGS[encoding] + "".join(line + end for line in LINES).encode(encoding)
    (tmp_path / "a.txt").write_bytes(content)
    # The name does not say it: what is in a file does.
    (tmp_path / "b.txt").write_bytes(gzip.compress(content, mtime=0))
    path = str(tmp_path / "a.txt")
    numbers = range(1, len(LINES) + 1)
    expected = [(f"{path}, line {number}", LINES[number - 1]) for number in numbers]
    assert list(text_lines.read_lines(path)) == expected
    assert read(tmp_path / "b.txt") == LINES


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))))
def test_any_text_survives(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    text = "".join(f"{line}\n" for line in lines)
    expected = [line.removesuffix("\r") for line in lines]
    # UTF-16 that begins with NUL begins as UTF-32 does; UTF-8 with many is taken for UTF-16.
    assume(not text.startswith("\0") and text.partition("\n")[0].count("\0") < 2)
    path.write_bytes(gzip.compress(text.encode("utf-16"), 0, mtime=0))
    assert read(path) == expected
    path.write_bytes(text.encode("utf-8-sig"))
    assert read(path) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"a\nb\xe4\n",
            r"a.txt, line 2: expected UTF-8, but byte 2 of the line \(0xe4\) is not: conv",
        ),
        (
            "a\nb\n".encode("utf-16-le"),
            "line 1: expected UTF-8, but every other byte is 0, as in UTF",
        ),
        ("\u4e00\nb\n".encode("utf-16-be"), "a.txt, line 1: expected UTF-8, but"),
        (
            "ab\n".encode("utf-16")[:-1],
            "a.txt: expected UTF-16, which its first bytes promise, but",
        ),
        (
            gzip.compress(b"a\n" * 99, mtime=0)[:-9],
            "a.txt cannot be unpacked by gzip: Compressed file ended",
        ),
        (
            gzip.compress(b"ab\n", mtime=0)[:-8] + bytes(8),
            "a.txt cannot be unpacked by gzip: CRC check failed",
        ),
        (gzip.compress(b"\xe4\n", mtime=0), "a.txt, line 1: expected UTF-8, but byte 1"),
        (
            b"PK\x03\x04rest",
            "a.txt is a zip archive or a workbook: unpack it, or save its table as",
        ),
        (b"BZh91AY&SYrest", "a.txt is compressed by bzip2: unpack it"),
        (b"\xfd7zXZ\x00rest", "a.txt is compressed by xz: unpack it"),
    ],
)
def test_what_is_no_text_is_refused_with_the_remedy(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read("a.txt")
    assert len(str(raised.value)) < 300


def test_a_file_is_read_as_it_is_used(tmp_path):
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"a\n" * 100_000 + b"\xff\n")
    lines = text_lines.read_lines(str(path))
    assert next(lines)[1] == "a"  # what is wrong at the end was not seen yet
    with pytest.raises(ValueError, match="line 100001: expected UTF-8"):
        list(lines)


@pytest.mark.parametrize(
    "content", ["a\nb".encode("utf-16"), gzip.compress(b"a\nb", mtime=0), b"a\nb"]
)
def test_standard_input_stays_open(content, monkeypatch):
    stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(content)))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert list(text_lines.read_lines("-")) == [
        ("standard input, line 1", "a"),
        ("standard input, line 2", "b"),
    ]
    gc.collect()
    assert not stdin.buffer.closed


@pytest.mark.parametrize(
    ("path", "suffix", "stem"),
    [
        ("a/B.TSV", ".tsv", "B"),
        ("a/b.c.JSONL.GZ", ".jsonl", "b.c"),
        ("a.b/c", "", "c"),
        ("x.gz", "", "x"),
        ("-", "", "-"),
    ],
)
def test_names(path, suffix, stem):
    assert (text_lines.suffix(path), text_lines.stem(path)) == (suffix, stem)
