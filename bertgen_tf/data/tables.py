"""Tables of texts: `.csv`, whose first line names the columns, and columns between tabs.

Fields between tabs are texts as they stand, without quotes or names. What was probably meant
otherwise is told, and read as it was meant where that is plain.
"""

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from bertgen_tf.data.text_lines import without_blank_end

Lines = Iterable[tuple[str, str]]
Rows = Iterator[tuple[str, list[str]]]
Complain = Callable[[str], None]

COMMA_SEPARATED = ".csv"
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LOOKED_AT = 100  # lines, to tell whether all fields are in quotes
_BEGUN = r'"[^"]*(?:""[^"]*)*'  # a field in quotes, but for its end
_QUOTED = re.compile(_BEGUN + '"')
_QUOTED_ROW = rf'{_BEGUN}"(?:\t{_BEGUN}")+'
_QUOTED_ROWS = re.compile(rf"(?:{_QUOTED_ROW}\n)*{_QUOTED_ROW}")
# Of a long file, whose last row goes on after the lines that are looked at.
_QUOTED_BEGINNING = re.compile(rf'(?:{_QUOTED_ROW}\n)+(?:{_BEGUN}"\t)*{_BEGUN}')
# What columns are usually called. A pair of such texts is hardly one to train on.
_USUAL_NAMES = frozenset(
    "source sources target targets src tgt trg input inputs output outputs text texts sentence "
    "sentences sentence1 sentence2 reference references prediction predictions translation "
    "summary document article highlights title headline question answer context prompt query "
    "completion instruction response original simplified complex simple label labels id".split()
)


class Column(NamedTuple):
    """A column that is wanted.

    Attributes:
        name: what it is called.
        argument: which argument chooses it, for messages; empty if there is none.
        given: whether the user did, so that there must be names, and case counts.
    """

    name: str
    argument: str
    given: bool

    def places(self, names: Sequence[str]) -> list[int]:
        """Where it is among the names of a table."""
        if self.given:
            return [i for i, name in enumerate(names) if name == self.name]
        return [i for i, name in enumerate(names) if name.lower() == self.name]


class Table(NamedTuple):
    """A table.

    Attributes:
        names: of the columns; None if it has none.
        rows: the fields of each row, as many as `names`, and where it stands.
    """

    names: list[str] | None
    rows: Rows


def read_csv(path: str, lines: Lines, columns: Sequence[Column]) -> Table:
    """A table with commas, semicolons or tabs between its columns, and names in the first line.

    Args:
        path: of the file, for messages.
        lines: of the file, with their places.
        columns: what it must have.

    Raises:
        ValueError: it lacks a column, or a row does not have as many fields as there are names.
    """
    lines = without_blank_end(lines)
    first = next(lines, None)
    if first is None:
        return Table(None, iter(()))
    found = []
    for delimiter in _DELIMITERS:
        try:
            names = next(csv.reader([first[1]], **_dialect(delimiter)))
        except (csv.Error, StopIteration):
            continue
        names = [name.strip() for name in names]
        fits = all(column.places(names) for column in columns)
        found.append((fits, len(names), delimiter, names))
    if not found:
        raise ValueError(f"{first[0]}: expected the names of the columns, found {cut(first[1])}")
    # The first of equals.
    _, _, delimiter, names = max(found, key=lambda entry: entry[:2])
    for column in columns:
        check_column(path, names, column)
    return Table(names, _check_rows(_csv_rows(lines, delimiter), names, delimiter))


def read_tabs(
    path: str, lines: Lines, columns: Sequence[Column], complain: Complain | None = None
) -> Table:
    """A table with tabs between its columns, and names in the first line if that looks like it.

    Args:
        path: see `read_csv`.
        lines: see `read_csv`.
        columns: what it has if it has names; without names they must not be given.
        complain: gets a sentence for each of: names in the first line; a first line that may be
            names, but is read as texts; quotes that are not read as part of texts; and those that
            are.

    Raises:
        ValueError: see `read_csv`.
    """
    lines = iter(lines)
    head = list(itertools.islice(lines, _LOOKED_AT))
    lines = itertools.chain(head, lines)
    tell = complain or (lambda message: None)
    if _all_quoted(head):
        tell(f"{path}: all texts are in double quotes, which are not read as part of them")
        rows = _csv_rows(without_blank_end(lines), "\t")
    else:
        rows = ((place, line.split("\t")) for place, line in lines)
        if complain is not None:
            rows = _count_quotes(path, rows, complain)
    first = next(rows, None)
    if first is None:
        return Table(None, rows)
    names = [name.strip() for name in first[1]]
    if any(column.given for column in columns):
        for column in columns:
            check_column(path, names, column)
    elif not all(column.places(names) for column in columns):
        if columns[0].argument and are_usual(names):
            arguments = " and ".join(column.argument for column in columns)
            tell(
                f"{path}: the first line, {cut(' '.join(names))}, is read as text; if it names the "
                f"columns, say which with {arguments}"
            )
        return Table(None, itertools.chain([first], rows))
    else:
        tell(f"{path}: the first line, {cut(' '.join(names))}, is read as the names of columns")
    return Table(names, _check_rows(without_blank_end(rows), names, "\t"))


def are_usual(names: Sequence[str]) -> bool:
    """Whether columns are often called so."""
    return all(name.strip().lower() in _USUAL_NAMES for name in names)


def check_column(path: str, names: Sequence[str], column: Column) -> None:
    """Raises a ValueError if a table does not have it."""
    if column.places(names):
        return
    shown = cut(", ".join(names))
    remedy = f": choose one with {column.argument}" if column.argument else ""
    raise ValueError(
        f"{path} has no column {column.name}; by its first line its columns are {shown}{remedy}"
    )


def cut(text: str) -> str:
    """The text in a message: its beginning, in quotes."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


# Documents are longer than Python's limit, which is there for broken files.
csv.field_size_limit(2**31 - 1)


def _dialect(delimiter: str) -> dict:
    return {"delimiter": delimiter, "skipinitialspace": True, "strict": True}


def _csv_rows(lines: Lines, delimiter: str) -> Rows:
    """The fields of lines in which quotes mean what they do in CSV; a field may have line ends."""
    places: list[str] = []

    def ended() -> Iterator[str]:
        for place, line in lines:
            places.append(place)
            yield line + "\n"

    reader = csv.reader(ended(), **_dialect(delimiter))
    while True:
        places.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{places[0]}: the row is not CSV: {error}; quotes begin and end a text, and are "
                "doubled inside"
            ) from error
        yield places[0], row


def _check_rows(rows: Rows, names: Sequence[str], delimiter: str) -> Rows:
    for place, row in rows:
        if len(row) != len(names):
            kind = _DELIMITERS[delimiter]
            remedy = f"; put texts with {kind} in double quotes" if len(row) > len(names) else ""
            raise ValueError(
                f"{place}: expected {len(names)} fields with {kind} between them, as in the first "
                f"line, found {len(row)}{remedy}"
            )
        yield place, row


def _count_quotes(path: str, rows: Rows, complain: Complain) -> Rows:
    """The rows; at their end it says how many fields look like CSV's."""
    count = 0
    for place, row in rows:
        count += sum('""' in field[1:-1] and bool(_QUOTED.fullmatch(field)) for field in row)
        yield place, row
    if count:
        complain(
            f"{path}: {count:,} {'texts are' if count > 1 else 'text is'} in double quotes, with "
            "doubled ones inside, which are read as part of the text; if they are CSV's, name the "
            "file .csv"
        )


def _all_quoted(head: list[tuple[str, str]]) -> bool:
    """Whether each row has several fields, all in quotes; one alone may be somebody's words."""
    text = "\n".join(line for _, line in without_blank_end(head))
    if _QUOTED_ROWS.fullmatch(text):
        return True
    return len(head) == _LOOKED_AT and bool(_QUOTED_BEGINNING.fullmatch(text))
