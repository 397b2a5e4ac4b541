"""The files of the command line, in UTF-8: JSON lines, columns between tabs, plain lines.

Lines end as on Unix or Windows, and at no other character, so that lines in and out stay aligned.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator

JSON_LINES = (".jsonl", ".json")
TAB_SEPARATED = (".tsv", ".txt")


def read_pairs(path: str) -> list[tuple[str, str]]:
    """The (source, target) pairs of a file to train on; its extension tells the format.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another extension, no pairs or a malformed line.
    """
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in TAB_SEPARATED + JSON_LINES:
        raise ValueError(
            f"{path} should have one of the extensions {', '.join(TAB_SEPARATED)} (source<TAB>"
            f"target) and {', '.join(JSON_LINES)} (JSON lines): they tell its format"
        )
    pairs = []
    for place, line in _without_blank_end(_lines(path)):
        if suffix in JSON_LINES:
            source, target = _json_texts(place, line, "source", "target")
        elif line.count("\t") == 1:
            source, target = line.split("\t")
        else:
            raise ValueError(
                f"{place}: expected source<TAB>target, found {line.count(chr(9))} tabs in "
                f"{_cut(line)}"
            )
        pairs.append((source, target))
    if not pairs:
        raise ValueError(f"{path} should hold pairs of texts, but is empty")
    return pairs


def read_texts(path: str) -> Iterator[str]:
    """The texts of a file to generate from, one for each line; `-` is standard input.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is malformed.
    """
    suffix = pathlib.Path(path).suffix.lower()
    if suffix in JSON_LINES:
        for place, line in _without_blank_end(_lines(path)):
            yield _json_texts(place, line, "source")[0]
    else:
        for _, line in _lines(path):
            yield line.split("\t")[0] if suffix == ".tsv" else line


def output_line(path: str, source: str, output: str | list[str]) -> str:
    """What was generated from one source, as a line for the file `path`."""
    if pathlib.Path(path).suffix.lower() in JSON_LINES:
        return json.dumps({"source": source, "output": output}, ensure_ascii=False) + "\n"
    hypotheses = [output] if isinstance(output, str) else output
    # Without what some reader would take for the end of a line or column.
    return "\t".join(" ".join(h.replace("\t", " ").splitlines()) for h in hypotheses) + "\n"


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """The lines without their ends, and where each stands, for messages."""
    name = "standard input" if path == "-" else path
    opened = contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")
    with opened as file:
        # Not as text, where a lone \r would end lines too.
        for number, line in enumerate(file, 1):
            place = f"{name}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{place}: expected UTF-8, but byte {error.start + 1} of the line "
                    f"({line[error.start]:#04x}) is none"
                ) from error
            yield place, text.removesuffix("\n").removesuffix("\r")


def _without_blank_end(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    held = []
    for line in lines:
        held.append(line)
        if line[1].strip():
            yield from held
            held.clear()


def _json_texts(place: str, line: str, *keys: str) -> list[str]:
    """The texts under `keys` of a line of JSON."""
    try:
        values = json.loads(line)
        texts = [values[key] for key in keys]
        for text in texts:
            text.encode()  # JSON can spell half a character
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = ", ".join(f'"{key}": "..."' for key in keys)
        raise ValueError(f"{place}: expected {{{expected}}}, found {_cut(line)}") from error
    return texts


def _cut(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:60] + "...")
