"""The files of the command line: JSON, `.csv`, columns between tabs, plain lines.

The extension decides which of them a file is. What its bytes may be is in
`bertgen_tf.data.text_lines`. The fields of JSON objects are columns, too.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from bertgen_tf.data import tables
from bertgen_tf.data.tables import COMMA_SEPARATED, Column, Complain, cut
from bertgen_tf.data.text_lines import GZIP, read_lines, suffix, without_blank_end

JSON_LINES = (".jsonl", ".json")
TAB_SEPARATED = (".tsv", ".txt")


def read_pairs(
    path: str,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    complain: Complain | None = None,
) -> list[tuple[str, str]]:
    """The (source, target) pairs of a file to train on.

    Args:
        path: of the file.
        source_column, target_column: the columns of the texts; by default "source" and "target",
            or, between tabs without names, the first and the second.
        complain: gets a sentence for each thing that was perhaps meant otherwise.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another extension, no pairs, not these columns, or a malformed line.
    """
    pairs = []
    for source, targets in _sources_and_targets(path, source_column, target_column, complain, 1):
        pairs.append((source, targets[0]))
    if not pairs:
        raise ValueError(f"{path} should hold pairs of texts, but is empty")
    return pairs


def read_references(
    path: str,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    complain: Complain | None = None,
) -> tuple[list[str], list[list[str]]]:
    """The sources and the references, at least one of each, of a file to score against.

    It is a file of pairs that may have further references: further columns between tabs, several
    columns of the target's name, or a list as "target".

    Args and errors are those of `read_pairs`.
    """
    sources, references = [], []
    for source, targets in _sources_and_targets(path, source_column, target_column, complain):
        sources.append(source)
        references.append(targets)
    if not sources:
        raise ValueError(f"{path} should hold pairs of texts, but is empty")
    return sources, references


def read_texts(
    path: str, *, source_column: str | None = None, complain: Complain | None = None
) -> Iterator[str]:
    """The texts of a file to generate from, see `read_records`."""
    return (text for text, _ in read_records(path, source_column, complain))


def read_records(
    path: str, source_column: str | None = None, complain: Complain | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The texts of a file to generate from, each with all that the file has beside it.

    Args:
        path: of the file; `-` is standard input, one text a line.
        source_column: the column of the texts; by default "source", or, between tabs without names,
            the first.
        complain: see `read_pairs`.

    Yields:
        the text, and the object of JSON, or the columns by name, or else `{"source": text}`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has not this column, or a malformed line.
    """
    column = _column("source", source_column)
    kind = suffix(path)
    if kind in JSON_LINES:
        form = f'{{"{column.name}": "..."}}'
        for place, value in _json_values(path, form):
            with _expected(place, value, form, column):
                text = _text(value[column.name])
            yield text, value
        return
    if kind not in (COMMA_SEPARATED, ".tsv"):
        if column.given:
            raise ValueError(
                f"source_column applies to {COMMA_SEPARATED}, .tsv and {', '.join(JSON_LINES)}, "
                f"whose columns have names, not to {'standard input' if path == '-' else path}"
            )
        for text in _plain_texts(path, complain):
            yield text, {"source": text}
        return
    names, rows = _read_table(path, kind, [column], complain)
    if names is None:
        for _, row in rows:
            yield row[0], {"source": row[0]}
        return
    place = _only_place(path, names, column)
    for _, row in rows:
        yield row[place], dict(zip(names, row, strict=True))


def settings(path: str, source_column: str | None) -> dict[str, str]:
    """What determines the texts of a file besides its bytes, to tell runs apart.

    Empty without columns, so that runs of versions that knew none can be continued; but those read
    `.csv`, and the names in a `.tsv`, as plain lines.
    """
    kind = suffix(path)
    named = source_column is not None or kind == COMMA_SEPARATED
    if not named and kind == ".tsv":
        named = _read_table(path, kind, [_column("source", None)], None)[0] is not None
    return {"source_column": source_column or "source"} if named else {}


def read_outputs(path: str, complain: Complain | None = None) -> tuple[list[str], list[str | None]]:
    """What `generate` wrote: the best output of each text, and its source if the file has it.

    Other systems' may be in the columns "output" and "source" of a `.csv`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, or a line is malformed.
    """
    outputs: list[str] = []
    sources: list[str | None] = []
    column, kind = Column("output", "", False), suffix(path)
    if kind in JSON_LINES:
        form = '{"output": "..." or ["...", ...]}'
        for place, value in _json_values(path, form):
            with _expected(place, value, form):
                output, source = value["output"], value.get("source")
                outputs.append(_text(output[0] if isinstance(output, list) else output))
                sources.append(source and _text(source))
    else:
        names, rows = _read_table(path, kind, [column], complain)
        place, source_place = 0, None
        if names is not None:
            place = _only_place(path, names, column)
            source_place = next(iter(Column("source", "", False).places(names)), None)
        for _, row in rows:
            outputs.append(row[place])
            sources.append(None if source_place is None else row[source_place])
    if not outputs:
        raise ValueError(f"{path} should hold outputs, but is empty")
    return outputs, sources


def check_output(path: str) -> None:
    """Raises a ValueError if the name of a file to write promises what `output_line` is not."""
    kind = GZIP if path.lower().endswith(GZIP) else suffix(path)
    if kind in (GZIP, COMMA_SEPARATED):
        raise ValueError(
            f"output must not end in {kind}, which is not written: choose .jsonl, or .tsv or .txt "
            f"for columns between tabs, received {path}"
        )


def output_line(path: str, source: str, output: str | list[str]) -> str:
    """What was generated from one source, as a line for the file `path`."""
    if suffix(path) in JSON_LINES:
        return json.dumps({"source": source, "output": output}, ensure_ascii=False) + "\n"
    hypotheses = [output] if isinstance(output, str) else output
    # Without anything that some reader would take for the end of a line or column.
    return "\t".join(" ".join(h.replace("\t", " ").splitlines()) for h in hypotheses) + "\n"


# -------------------------------------------------------------------------------------- columns


def _sources_and_targets(
    path: str,
    source_column: str | None,
    target_column: str | None,
    complain: Complain | None,
    most: int | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """The source and the targets, at least one and at most `most`, of each example."""
    kind = suffix(path)
    if kind not in (*TAB_SEPARATED, *JSON_LINES, COMMA_SEPARATED):
        raise ValueError(
            f"{path} should have one of the extensions {', '.join(TAB_SEPARATED)} (source<TAB>"
            f"target), {COMMA_SEPARATED}, {', '.join(JSON_LINES)} (JSON lines), also followed by "
            f"{GZIP}: they decide its format"
        )
    source, target = _column("source", source_column), _column("target", target_column)
    if kind in JSON_LINES:
        several = '"..."' if most == 1 else '"..." or ["...", ...]'
        form = f'{{"{source.name}": "...", "{target.name}": {several}}}'
        for place, value in _json_values(path, form):
            with _expected(place, value, form, source, target):
                targets = value[target.name]
                if most == 1 or not isinstance(targets, list):
                    targets = [targets]
                pair = _text(value[source.name]), [_text(targets[0]), *map(_text, targets[1:])]
            yield pair
        return
    names, rows = _read_table(path, kind, [source, target], complain)
    if names is not None:
        if source.places(names) == target.places(names):
            raise ValueError(f"target_column must not be source_column, received {target.name}")
        source_place = _only_place(path, names, source)
        target_places = target.places(names)
        if most == 1:
            target_places = [_only_place(path, names, target)]
        for _, row in rows:
            yield row[source_place], [row[i] for i in target_places]
        return
    for place, row in rows:
        if len(row) < 2 or (most == 1 and len(row) > 2):
            what = "target" if most == 1 else "reference"
            found = f"{len(row) - 1} tabs" if most == 1 else "no tab"
            raise ValueError(
                f"{place}: expected source<TAB>{what}, found {found} in {cut(chr(9).join(row))}"
            )
        yield row[0], row[1:]


def _column(name: str, given: str | None) -> Column:
    return Column(given or name, f"{name}_column", given is not None)


def _only_place(path: str, names: Sequence[str], column: Column) -> int:
    """Where a column is that must be there once."""
    tables.check_column(path, names, column)
    places = column.places(names)
    if len(places) > 1:
        raise ValueError(f"{path} has {len(places)} columns {column.name}: rename all but one")
    return places[0]


def _read_table(
    path: str, kind: str, columns: Sequence[Column], complain: Complain | None
) -> tables.Table:
    lines = read_lines(path)
    if kind == COMMA_SEPARATED:
        return tables.read_csv(path, lines, columns)
    if len(columns) > 1:  # pairs: a blank line is none
        lines = without_blank_end(lines)
    return tables.read_tabs(path, lines, columns, complain)


def _plain_texts(path: str, complain: Complain | None) -> Iterator[str]:
    """The lines; at their end it says what else they may have been."""
    count = tabs = quotes = 0
    for _, line in read_lines(path):
        if complain is not None and not count and tables.are_usual(line.split(",")):
            complain(
                f"{path}: the first line, {cut(line)}, is read as text; a file whose columns have "
                f"names is {COMMA_SEPARATED} or .tsv"
            )
        count += 1
        tabs += "\t" in line
        quotes += len(line) > 1 and line[0] == line[-1] == '"'
        yield line
    if complain is None or not count:
        return
    if tabs == count:
        complain(
            f"{path}: all lines have tabs, and are read as one text each; name the file .tsv to "
            "read the first column"
        )
    if quotes == count:
        complain(
            f"{path}: all lines are in double quotes, which are read as part of the texts; if they "
            "are CSV's, name the file .csv, with the names of its columns in the first line"
        )


# ------------------------------------------------------------------------------------------ JSON


def _json_values(path: str, form: str) -> Iterator[tuple[str, Any]]:
    """The values of JSON lines, or of one JSON array, and where each stands.

    Args:
        path: of the file.
        form: what the values should be, for messages.
    """
    lines = without_blank_end(read_lines(path))
    first = next(lines, None)
    if first is None:
        return
    if not first[1].lstrip().startswith("["):
        for place, line in itertools.chain([first], lines):
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{place}: expected {form}, found {cut(line)}; each object is on one line, or "
                    "all are in one array"
                ) from error
        return
    try:
        values = json.loads("\n".join([first[1], *(line for _, line in lines)]))
    except (ValueError, RecursionError) as error:
        number = getattr(error, "lineno", 1)
        raise ValueError(
            f"{path}, line {number}: expected an array of {form}, or one such object a line"
        ) from error
    for number, value in enumerate(values, 1):
        yield f"{path}, element {number}", value


def _text(value: Any) -> str:
    value.encode()  # JSON can encode half a character
    return value


@contextlib.contextmanager
def _expected(place: str, value: Any, form: str, *columns: Column) -> Iterator[None]:
    """Around the reading of a JSON value: its error says what the value should be.

    Args:
        place: where it stands.
        value: what was found.
        form: what it should be.
        columns: whose names the user could choose.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, UnicodeError) as error:
        remedy = ""
        if isinstance(error, KeyError) and columns:
            names = " and ".join(column.argument for column in columns)
            remedy = f"; choose other fields with {names}"
        raise ValueError(
            f"{place}: expected {form}, found {cut(json.dumps(value))}{remedy}"
        ) from error
