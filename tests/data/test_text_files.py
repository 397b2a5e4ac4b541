"""The texts of files in every format: to train on, to generate from, to score."""

import gzip
import json
import os
import threading
from pathlib import Path

import pytest

from bertgen_tf.data import text_files

TEXTS = ["the cat sat", 'a "dog", ran; off', "ü"]
PAIRS = [(text, text[::-1]) for text in TEXTS]
REFERENCES = TEXTS, [[text[::-1]] for text in TEXTS]
# By name: the content, and the notes.
RECORDS = [{"id": i, "target": t, "source": s} for i, (s, t) in enumerate(PAIRS)]
HEADER = "the first line, 'id target source', is read as the names of columns"
FILES = {
    "plain.tsv": ("".join(f"{s}\t{t}\n" for s, t in PAIRS), []),
    "names.tsv": (
        "id\ttarget\tsource\n" + "".join(f"{i}\t{t}\t{s}\n" for i, (s, t) in enumerate(PAIRS)),
        [HEADER],
    ),
    "lines.jsonl": ("".join(json.dumps(record) + "\n" for record in RECORDS) + "\n\n", []),
    "array.json": (json.dumps(RECORDS, indent=1), []),
    "lines.json": ("".join(json.dumps(record) + "\n" for record in RECORDS), []),
    "array.jsonl": (json.dumps(RECORDS, ensure_ascii=False) + "\n", []),
}
for delimiter, name in ((",", "comma"), (";", "semicolon"), ("\t", "tab")):
    rows = [["id", "target", "source"], *([str(r[k]) for k in r] for r in RECORDS)]
    quoted = [[f'''"{field.replace('"', '""')}"''' for field in row] for row in rows]
    FILES[f"{name}.csv"] = ("".join(delimiter.join(row) + "\r\n" for row in quoted), [])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", FILES)
def test_every_file_has_the_same_texts(name, encoding, packed, tmp_path):
    text, notes = FILES[name]
    content = text.encode(encoding)
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else content)
    for read, expected in (
        (text_files.read_pairs, PAIRS),
        (text_files.read_references, REFERENCES),
        (lambda path, **options: list(text_files.read_texts(path, **options)), TEXTS),
    ):
        told = []
        assert read(str(path), complain=told.append) == expected
        assert told == [f"{path}: {note}" for note in notes]
        assert read(str(path)) == expected


@pytest.mark.parametrize("name", ["names.tsv", "comma.csv", "semicolon.csv", "array.json"])
def test_columns_of_other_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(FILES[name][0].replace("source", "The text").replace("target", "out"))
    told = []
    columns = {"source_column": "The text", "target_column": "out", "complain": told.append}
    assert text_files.read_pairs(name, **columns) == PAIRS
    assert text_files.read_references(name, **columns) == REFERENCES
    columns.pop("target_column")
    assert list(text_files.read_texts(name, **columns)) == TEXTS
    assert told == []
    for read in (text_files.read_pairs, text_files.read_references):
        with pytest.raises(ValueError, match="the text") as raised:  # of another case
            read(name, source_column="the text", target_column="out")
        assert len(str(raised.value)) < 300
    if name != "names.tsv":  # whose first column it would be
        with pytest.raises(ValueError, match="source"):
            list(text_files.read_texts(name))


def test_records_keep_what_is_beside_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (text, _) in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
        found = list(text_files.read_records(name))
        assert [text for text, _ in found] == TEXTS
        if name == "plain.tsv":
            expected = [{"source": text} for text in TEXTS]
        elif name.endswith(("json", "jsonl")):
            expected = RECORDS
        else:
            expected = [{key: str(value) for key, value in record.items()} for record in RECORDS]
        assert [record for _, record in found] == expected
    Path("a.txt").write_text("a\n\nb\tc\n")
    texts = ["a", "", "b\tc"]
    assert list(text_files.read_records("a.txt")) == [(text, {"source": text}) for text in texts]


@pytest.mark.parametrize(
    ("name", "content", "references"),
    [
        ("a.tsv", "a\tb\tc\nd\te\n", [["b", "c"], ["e"]]),
        ("a.csv", "source,target,target\na,b,c\nd,e,f\n", [["b", "c"], ["e", "f"]]),
        ("a.json", '[{"source": "a", "target": ["b", "c"]}, {"source": "d", "target": "e"}]',
         [["b", "c"], ["e"]]),
    ],
)  # fmt: skip
def test_several_references(name, content, references, tmp_path):
    (tmp_path / name).write_text(content)
    assert text_files.read_references(str(tmp_path / name)) == (["a", "d"], references)
    with pytest.raises(ValueError):
        text_files.read_pairs(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "x\ty\n\nsource\n", (["x", "", "source"], [None] * 3)),
        ("a.csv", 'id,output,Source\n1,"x, y",z\n', (["x, y"], ["z"])),
        ("a.csv", "output\nx\n", (["x"], [None])),
        ("a.json", '[{"output": ["x", "y"]}, {"output": "", "source": "s"}]',
         (["x", ""], [None, "s"])),
        ("a.tsv", '"x"\t"y"\n"z"\t"y"\n', (["x", "z"], [None, None])),
    ],
)  # fmt: skip
def test_outputs(name, content, expected, tmp_path):
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode("utf-16")))
    assert text_files.read_outputs(str(tmp_path / f"{name}.gz")) == expected


def test_outputs_of_a_pipe_are_read_once(tmp_path):
    pipe = tmp_path / "outputs.tsv"
    os.mkfifo(pipe)
    content = "output\tsource\na b\td\nc\te\n"
    writer = threading.Thread(target=pipe.write_text, args=(content,), daemon=True)
    writer.start()
    told = []
    outputs = []
    reader = threading.Thread(
        target=lambda: outputs.extend(text_files.read_outputs(str(pipe), told.append)), daemon=True
    )
    reader.start()
    reader.join(30)
    assert outputs == [["a b", "c"], ["d", "e"]] and len(told) == 1


def test_long_documents(tmp_path):
    path, text = tmp_path / "a.csv", "a" * 200_000  # csv's own limit is 131,072
    path.write_text(f"source,target\n{text},b\n")
    assert text_files.read_pairs(str(path)) == [(text, "b")]


def test_what_a_file_is_read_as_belongs_to_a_run(tmp_path):
    """Older versions read names in a .tsv, and all of a .csv, as texts."""
    for name, content, expected in (
        ("a.tsv", "source\ttarget\na\tb\n", {"source_column": "source"}),
        ("b.tsv", "a\tb\n", {}),
        ("a.csv", "source\na\n", {"source_column": "source"}),
        ("a.txt", "source\na\n", {}),
    ):
        (tmp_path / name).write_text(content)
        assert text_files.settings(str(tmp_path / name), None) == expected


@pytest.mark.parametrize(
    ("lines", "note"),
    [
        (
            ["a\tb", "c\td"],
            "all lines have tabs, and are read as one text each; name the file .tsv",
        ),
        (['"a"', '"b"'], "all lines are in double quotes, which are read as part of the texts; if"),
        (["text", "a"], "the first line, 'text', is read as text; a file whose columns have names"),
        (["a\tb", "c"], None),
        (['"a"', "b"], None),
        ([], None),
    ],
)
def test_plain_lines_that_may_be_something_else_are_told(lines, note, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("".join(f"{line}\n" for line in lines))
    told = []
    assert list(text_files.read_texts("a.txt", complain=told.append)) == lines
    assert [message.startswith(f"a.txt: {note}") for message in told] == [True] * bool(note)


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", "", {}, "a.csv should hold pairs of texts, but is empty"),
        ("a.csv", "source,target\n", {}, "a.csv should hold pairs of texts, but is empty"),
        ("a.csv", "source,source,target\na,b,c\n", {}, "a.csv has 2 columns source: rename"),
        ("a.csv", "source,target\na,b\n", {"target_column": "source"}, "target_column must not be"),
        ("a.json", '[{"source": "a"}]', {}, "a.json, element 1: expected {.*; choose other fields "
         "with source_column and target_column"),
        ("a.json", '{\n"source": "a"}\n', {}, "a.json, line 1: expected {.*, found '{'; each"),
        ("a.json", '[{"source": "a",\n]', {}, "a.json, line 2: expected an array of {"),
        ("a.json", '["a"]\n["b"]', {}, "a.json, line 2: expected an array of {"),
        ("a.xml", "<a>", {}, "a.xml should have one of the extensions .tsv, .txt .*, .csv, .jsonl"),
        ("a.gz", "", {}, "a.gz should have one of the extensions"),
    ],
)  # fmt: skip
def test_pairs_that_are_refused(name, content, columns, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        text_files.read_pairs(name, **columns)
    assert len(str(raised.value)) < 300


def test_lines_have_no_column(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\n")
    with pytest.raises(ValueError, match="source_column applies to .csv, .tsv and .jsonl, .json, "):
        list(text_files.read_texts(str(path), source_column="text"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.CSV", "a.gz"])
def test_names_of_outputs_do_not_lie(name):
    with pytest.raises(ValueError, match="output must not end in .(csv|gz), which is not written"):
        text_files.check_output(name)
    for other in ("a.tsv", "a.jsonl", "-", "a"):
        text_files.check_output(other)
