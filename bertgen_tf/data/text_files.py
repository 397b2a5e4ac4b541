"""The files of the command line, in UTF-8: JSON lines, tab-separated columns, plain lines.

Lines end as on Unix or Windows, and at no other character, so that inputs and outputs stay aligned.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

JSON_LINES = (".jsonl", ".json")
TAB_SEPARATED = (".tsv", ".txt")


def read_pairs(path: str) -> list[tuple[str, str]]:
    """The (source, target) pairs of a file to train on; its extension decides the format.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another extension, no pairs or a malformed line.
    """
    suffix = _pairs_suffix(path)
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
    """The texts of a file to generate from, one per line; `-` is standard input.

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


def read_references(path: str) -> tuple[list[str], list[list[str]]]:
    """The sources and the references, at least one of each, of a file to score against.

    It is a file of pairs that may have more columns, or a list as "target": further references.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another extension, no pairs or a malformed line.
    """
    suffix = _pairs_suffix(path)
    sources, references = [], []
    for place, line in _without_blank_end(_lines(path)):
        if suffix in JSON_LINES:
            source, targets = _json_source_and_targets(place, line)
        else:
            source, *targets = line.split("\t")
            if not targets:
                raise ValueError(
                    f"{place}: expected source<TAB>reference, found no tab in {_cut(line)}"
                )
        sources.append(source)
        references.append(targets)
    if not sources:
        raise ValueError(f"{path} should hold pairs of texts, but is empty")
    return sources, references


def read_outputs(path: str) -> tuple[list[str], list[str | None]]:
    """What `generate` wrote: the best output of each text, and its source if the file has it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, or a line is malformed.
    """
    outputs, sources = [], []
    if pathlib.Path(path).suffix.lower() in JSON_LINES:
        for place, line in _without_blank_end(_lines(path)):
            output, source = _json_output(place, line)
            outputs.append(output)
            sources.append(source)
    else:
        outputs = [line.split("\t")[0] for _, line in _lines(path)]
        sources = [None] * len(outputs)
    if not outputs:
        raise ValueError(f"{path} should hold outputs, but is empty")
    return outputs, sources


def output_line(path: str, source: str, output: str | list[str]) -> str:
    """What was generated from one source, as a line for the file `path`."""
    if pathlib.Path(path).suffix.lower() in JSON_LINES:
        return json.dumps({"source": source, "output": output}, ensure_ascii=False) + "\n"
    hypotheses = [output] if isinstance(output, str) else output
    # Without anything that some reader would take for the end of a line or column.
    return "\t".join(" ".join(h.replace("\t", " ").splitlines()) for h in hypotheses) + "\n"


def _pairs_suffix(path: str) -> str:
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in TAB_SEPARATED + JSON_LINES:
        raise ValueError(
            f"{path} should have one of the extensions {', '.join(TAB_SEPARATED)} (source<TAB>"
            f"target) and {', '.join(JSON_LINES)} (JSON lines): they decide its format"
        )
    return suffix


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """The lines without their ends, and where each stands, for messages."""
    name = "standard input" if path == "-" else path
    opened = contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")
    with opened as file:
        yield from decode_lines(file, name)


def decode_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, str]]:
    """The lines of a binary file without their ends, and where each stands, for messages.

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
                f"({line[error.start]:#04x}) is not"
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
    expected = ", ".join(f'"{key}": "..."' for key in keys)
    with _expected(place, line, f"{{{expected}}}"):
        values = json.loads(line)
        return [_text(values[key]) for key in keys]


def _json_source_and_targets(place: str, line: str) -> tuple[str, list[str]]:
    with _expected(place, line, '{"source": "...", "target": "..." or ["...", ...]}'):
        values = json.loads(line)
        targets = values["target"]
        targets = targets if isinstance(targets, list) else [targets]
        return _text(values["source"]), [_text(targets[0]), *map(_text, targets[1:])]


def _json_output(place: str, line: str) -> tuple[str, str | None]:
    with _expected(place, line, '{"output": "..." or ["...", ...]}'):
        values = json.loads(line)
        output = values["output"]
        source = values.get("source")
        return _text(output[0] if isinstance(output, list) else output), source and _text(source)


def _text(value: Any) -> str:
    value.encode()  # JSON can encode half a character
    return value


@contextlib.contextmanager
def _expected(place: str, line: str, form: str) -> Iterator[None]:
    """Around the reading of a JSON line: its error says what the line should be."""
    try:
        yield
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(f"{place}: expected {form}, found {_cut(line)}") from error


def _cut(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:60] + "...")
