"""Tables of texts, against what pandas reads and writes."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertgen_tf.data import tables
from bertgen_tf.data.tables import Column

SOURCE = Column("source", "source_column", False)
TARGET = Column("target", "target_column", False)
# Leading spaces of a field are no text; \r and \0 are none of a text file's lines.
fields = st.text(st.sampled_from("ab,;\t\"\n é'")).map(str.lstrip)


def lines_of(text: str) -> list[tuple[str, str]]:
    lines = text.split("\n")
    return [(f"x, line {i}", line) for i, line in enumerate(lines[: -1 if text else 0], 1)]


def read(reader, text, *columns, **options):
    names, rows = reader("x", lines_of(text), columns, **options)
    return names, [row for _, row in rows]


@given(
    st.lists(st.tuples(st.just("1"), fields, fields), min_size=1, max_size=5),
    st.sampled_from(",;\t"),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_csv_of_pandas(rows, delimiter, quoting):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows, columns=["id", "source", "target"])
    file = io.StringIO()
    frame.to_csv(file, sep=delimiter, quoting=quoting, index=False, lineterminator="\n")
    # Blank rows at the end are none.
    names, found = read(tables.read_csv, file.getvalue() + "\n\n", SOURCE, TARGET)
    assert names == ["id", "source", "target"]
    assert [tuple(row) for row in found] == rows
    file.seek(0)
    theirs = pandas.read_csv(
        file, sep=delimiter, dtype=str, keep_default_na=False, skipinitialspace=True
    )
    assert theirs.to_numpy().tolist() == found


@given(st.lists(st.tuples(fields, fields), min_size=1, max_size=5))
def test_quoted_tabs_of_pandas(rows):
    pandas = pytest.importorskip("pandas")
    file = io.StringIO()
    frame = pandas.DataFrame(rows)
    frame.to_csv(file, sep="\t", quoting=csv.QUOTE_ALL, index=False, header=False)
    notes = []
    names, found = read(tables.read_tabs, file.getvalue(), SOURCE, TARGET, complain=notes.append)
    assert (names, found) == (None, frame.to_numpy().tolist())
    assert notes == ["x: all texts are in double quotes, which are not read as part of them"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,text\n1,a",
            "has no column source; by its first line its columns are 'id, text': choose",
        ),
        (
            'source,target\na,b\n"c\nd",e,f',
            "x, line 3: expected 2 fields with commas .* found 3; put",
        ),
        ("source;target\na", "x, line 2: expected 2 fields with semicolons .* found 1$"),
        ('source,target\na,b\n"c"d,e', "x, line 3: the row is not CSV: .* doubled inside"),
        ('source\n"a\nb', "x, line 2: the row is not CSV: unexpected end of data"),
        ('"source', "x, line 1: expected the names of the columns, found"),
    ],
)
def test_csv_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(tables.read_csv, text + "\n", SOURCE)
    assert len(str(raised.value)) < 300


HEADER = "x: the first line, 'source target', is read as the names of columns"


@pytest.mark.parametrize(
    ("text", "names", "rows", "notes"),
    [
        ("a\tb\n", None, [["a", "b"]], []),
        ("source\ttarget\na\tb\n\n", ["source", "target"], [["a", "b"]], [HEADER]),
        (
            "Target\tid\tSource\na\t1\tb\n",
            ["Target", "id", "Source"],
            [["a", "1", "b"]],
            ["x: the first line, 'Target id Source', is read as the names of columns"],
        ),
        (
            "Input\toutput\na\tb\n",
            None,
            [["Input", "output"], ["a", "b"]],
            [
                "x: the first line, 'Input output', is read as text; if it names the columns, say "
                "which with source_column and target_column"
            ],
        ),
        # Somebody speaks.
        ('"a"\tb\n"c"\t"d"\n', None, [['"a"', "b"], ['"c"', '"d"']], []),
        ('""\t"\n', None, [['""', '"']], []),
        ('"a"\t"b"\n"c\td\n', None, [['"a"', '"b"'], ['"c', "d"]], []),
        (
            'a\t"b ""c"""\nd\te\n',
            None,
            [["a", '"b ""c"""'], ["d", "e"]],
            [
                "x: 1 text is in double quotes, with doubled ones inside, which are read as part "
                "of the text; if they are CSV's, name the file .csv"
            ],
        ),
        (
            '"source"\t"target"\n"a\nb"\t"c"\n',
            ["source", "target"],
            [["a\nb", "c"]],
            ["x: all texts are in double quotes, which are not read as part of them", HEADER],
        ),
        ("", None, [], []),
    ],
)
def test_tabs_with_names_or_quotes_are_told(text, names, rows, notes):
    told = []
    found = read(tables.read_tabs, text, SOURCE, TARGET, complain=told.append)
    assert found == (names, rows)
    assert told == notes
    assert read(tables.read_tabs, text, SOURCE, TARGET) == (names, rows)


def test_quotes_of_a_long_file():
    """Rows of two lines: the lines that are looked at end in one."""
    rows = [[f'a\n{i} "b"', f"c\t{i}"] for i in range(200)]
    lines = ('"{}"\t"{}"\n'.format(*(field.replace('"', '""') for field in row)) for row in rows)
    text = "".join(['"a"\t"b"\n', *lines])
    assert read(tables.read_tabs, text, SOURCE, TARGET) == (None, [["a", "b"], *rows])
    # Not in the end: then it is a mistake.
    with pytest.raises(ValueError, match="x, line 402: the row is not CSV"):
        read(tables.read_tabs, text + '"a"b\tc\n', SOURCE, TARGET)
    with_names = [f'{i}\t"{i}"\n' for i in range(200)]
    assert len(read(tables.read_tabs, "".join(with_names), SOURCE, TARGET)[1]) == 200


def test_spaces_after_delimiters_are_no_text():
    text = 'source, target\n"a b", "c, d"\n'
    assert read(tables.read_csv, text, SOURCE, TARGET)[1] == [["a b", "c, d"]]


def test_names_that_are_given_must_be_there():
    given = Column("fr", "target_column", True)
    told = []
    found = read(tables.read_tabs, "source\tfr\na\tb\n", SOURCE, given, complain=told.append)
    assert found == (["source", "fr"], [["a", "b"]])
    assert told == []
    with pytest.raises(
        ValueError, match="x has no column fr; .* 'source, en': choose one with target_c"
    ):
        read(tables.read_tabs, "source\ten\n", SOURCE, given)
    with pytest.raises(ValueError, match="x, line 2: expected 2 fields with tabs"):
        read(tables.read_tabs, "source\tfr\na\n", SOURCE, given)
