"""Data sets from folders, archives and the HuggingFace hub, in their own formats."""

import dataclasses
import itertools
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from bertgen_tf import metrics
from bertgen_tf.data import data_presets
from bertgen_tf.data.data_presets import PRESETS, read
from tests.data.test_downloads import Handler, server  # noqa: F401  a fixture
from tests.helpers import SHARED

DISCOFUSE = (
    "coherent_second_sentence\tdiscourse_type\tcoherent_first_sentence\t"
    "incoherent_second_sentence\tincoherent_first_sentence\n"
)
PAIRS = [("a b .", "a . b ."), ("c", "d")]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bertgen_tf" / "data"


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def pack(path: Path, **members: str) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), text)
    return path.read_bytes()


# ------------------------------------------------------------------------------------ presets


def test_the_six_of_the_issue_and_their_lengths():
    lengths = {p.name: (p.max_source_length, p.max_target_length) for p in PRESETS.values()}
    assert lengths == {
        "wikisplit": (128, 128),
        "discofuse": (128, 128),
        "gigaword": (128, 32),
        "cnn_dailymail": (512, 128),
        "xsum": (512, 64),
        "wmt14": (128, 128),
    }
    for preset in PRESETS.values():
        assert set(metrics.expand(preset.metrics)) == set(preset.metrics)
        assert preset.tokenize in metrics.TOKENIZERS
        assert bool(preset.files) != bool(preset.hub)
        assert (preset.steps is None) != (preset.epochs is None)
        for file in preset.files.values():
            assert all(url.startswith("https://") for url in file.urls)
            assert Path(file.name).name == file.name
    with pytest.raises(ValueError, match="data must be one of wikisplit, .*, received 'c4'"):
        data_presets.find("c4")


# ------------------------------------------------------------------------------------ folders


def test_wikisplit(tmp_path):
    folder = write(
        tmp_path,
        tune__tsv="a b .\ta . <::::> b .\r\nc\td\r\n",
        dev__jsonl='{"complex_sentence": "e", "simple_sentence_1": "f .", '
        '"simple_sentence_2": " g ."}\n\n{"source": "h", "target": "i <::::> j"}\n',
    )
    assert list(read("wikisplit", "tune", folder)) == PAIRS
    assert list(read("wikisplit", "tune", folder, reverse=True)) == [(t, s) for s, t in PAIRS]
    assert list(read("wikisplit", "validation", folder)) == [("e", "f . g ."), ("h", "i j")]


def test_discofuse_by_its_columns(tmp_path):
    folder = write(
        tmp_path,
        train__tsv="of the whole\tnot this\n",
        train_balanced__tsv=f'{DISCOFUSE}He "sang .\tPAIR\tIt is .\tHim\tIt is .\n'
        "\tSINGLE\tAll in one .\tone .\tAll .\n",
    )
    assert list(read("discofuse", "train", folder)) == [
        ("It is . Him", 'It is . He "sang .'),
        ("All . one .", "All in one ."),
    ]


def test_gigaword_in_lower_case(tmp_path):
    folder = write(
        tmp_path,
        train__src__txt="Shares <unk> #.#\n\nthird\n",
        train__tgt__txt="Shares fall\nnothing\nThird\n",
    )
    assert list(read("gigaword", "train", folder)) == [
        ("shares unk #.#", "shares fall"),
        ("third", "third"),  # the one between has a blank
    ]


def test_summaries_keep_their_lines(tmp_path):
    line = json.dumps({"article": "(CNN) A.\nB.", "highlights": "A .\nB .", "id": "1"})
    folder = write(tmp_path, test__jsonl=line)
    assert list(read("cnn_dailymail", "test", folder)) == [("(CNN) A.\nB.", "A .\nB .")]
    line = json.dumps({"document": "Cased", "summary": "Text"})
    assert list(read("xsum", "test", write(tmp_path / "x", test__json=line))) == [("Cased", "Text")]


def test_wmt14_both_ways(tmp_path):
    folder = write(tmp_path, val__en="“One”\n", val__de="„Eins‟\n")
    write(tmp_path, test__jsonl='{"translation": {"de": "Zwei", "en": "Two"}}')
    assert list(read("wmt14", "validation", folder)) == [('"One"', '"Eins"')]
    assert list(read("wmt14", "test", folder)) == [("Two", "Zwei")]
    assert list(read("wmt14", "test", folder, reverse=True)) == [("Zwei", "Two")]


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data")
def test_real_data():
    pairs = list(read("wikisplit", "validation", SHARED / "data/wikisplit"))
    assert len(pairs) == 5000
    assert not any("<::::>" in text for pair in pairs for text in pair)
    # As the data set's README counts them.
    assert sum(len(source.split(" ")) for source, _ in pairs) == 166_628
    pairs = list(read("wmt14", "train", SHARED / "data/multi30k"))
    assert len(pairs) == 29_000
    assert pairs[0][0].startswith("Two young, White males")
    assert pairs[0][1].startswith("Zwei junge weiße Männer")


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("wikisplit", {"train__tsv": "a\tb\nc\n"}, "train.tsv, line 2: expected source<TAB>target"),
        ("wikisplit", {"train__tsv": "a\tb\tc\n"}, "line 1: expected .*, found 3 columns in 'a"),
        ("discofuse", {"train__tsv": f"{DISCOFUSE}a\n"}, "line 2: expected 5 columns, found 1"),
        ("xsum", {"train__jsonl": '{"document": "a"}'}, "line 1: expected an object with texts as"),
        ("xsum", {"train__jsonl": '{"document": "a", "summary": 3}'}, "line 1: expected an object"),
        ("xsum", {"train__jsonl": "\n[1]"}, "line 2: expected an object with texts as source, t"),
        ("xsum", {"train__jsonl": '{"source": "\\ud800", "target": "a"}'}, "line 1: expected an o"),
        ("wmt14", {"train__en": "a\nb\n", "train__de": "c\n"}, "train.de has fewer lines than"),
        ("wmt14", {"train__en": "a\n", "train__de": "c\nd\n"}, "train.en has fewer lines than"),
    ],
)  # fmt: skip
def test_malformed_files(name, files, message, tmp_path):
    pairs = read(name, "train", write(tmp_path, **files))
    with pytest.raises(ValueError, match=message):
        list(pairs)


def test_bytes_that_are_no_text(tmp_path, monkeypatch):
    (tmp_path / "train.tsv").write_bytes(b"a\tb\n\xff\tc\n")
    with pytest.raises(ValueError, match="train.tsv, line 2: expected UTF-8, but byte 1"):
        list(read("wikisplit", "train", tmp_path))
    monkeypatch.setattr(data_presets, "MAX_LINE_BYTES", 20)
    (tmp_path / "train.tsv").write_bytes(b"a\tb\n" + b"x" * 30)
    with pytest.raises(ValueError, match="train.tsv, line 2 has 20 bytes or more"):
        list(read("wikisplit", "train", tmp_path))


def test_files_that_are_not_there_are_told_at_once(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="data folder must be a folder, but .*/no is not one"
    ):
        read("wikisplit", "train", tmp_path / "no")
    write(tmp_path, train__en="a\n", train__tsv="")
    with pytest.raises(
        FileNotFoundError,
        match="should hold the split validation of wmt14, as one of validation_balanced.tsv, .*"
        "val.en and val.de",
    ):
        read("wmt14", "validation", tmp_path)
    for split in ("../train", "", "a/b", ".."):
        with pytest.raises(ValueError, match="split must be a name such as train"):
            read("wmt14", split, tmp_path)


def test_pairs_are_read_one_after_the_other(tmp_path):
    (tmp_path / "train.tsv").write_text("a\tb\n" * 1000 + "malformed\n")
    assert len(list(itertools.islice(read("wikisplit", "train", tmp_path), 1000))) == 1000


# ----------------------------------------------------------------------------------- archives


def test_archives_in_a_folder(tmp_path):
    pack(tmp_path / "train.tsv.zip", train_dot_tsv="a\tb\n")
    assert list(read("wikisplit", "train", tmp_path)) == [("a", "b")]
    pack(
        tmp_path / "ggw_data.zip",
        org_data__dev_dot_src_dot_txt="A <unk>\n",
        org_data__dev_dot_tgt_dot_txt="B\n",
        other__test_dot_src_dot_txt="x\n",
    )
    assert list(read("gigaword", "validation", tmp_path)) == [("a unk", "b")]
    with pytest.raises(FileNotFoundError, match="should hold the split test of gigaword"):
        read("gigaword", "test", tmp_path)


def test_archives_that_are_broken(tmp_path):
    path = tmp_path / "train.tsv.zip"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="train.tsv.zip should be a .zip archive: File is not"):
        read("wikisplit", "train", tmp_path)
    content = bytearray(pack(path, train_dot_tsv="a\tb\n" * 1000))
    content[40:44] = b"\0\0\0\0"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train.tsv.zip/train.tsv cannot be unpacked"):
        list(read("wikisplit", "train", tmp_path))


@pytest.fixture
def published(server, monkeypatch):  # noqa: F811
    """Publishes the files of a data set on the server."""

    def publish(name: str) -> None:
        preset = PRESETS[name]
        files = {
            split: dataclasses.replace(file, urls=(f"{server.url}/{file.name}",))
            for split, file in preset.files.items()
        }
        monkeypatch.setattr(
            data_presets, "PRESETS", {name: dataclasses.replace(preset, files=files)}
        )

    return publish


def test_a_split_is_fetched_once(server, published, cache, tmp_path):  # noqa: F811
    published("wikisplit")
    server.content = pack(tmp_path / "new.zip", train_dot_tsv="a\tb <::::> c\n")
    for _ in range(2):
        assert list(read("wikisplit", "train")) == [("a", "b c")]
    server.content = b"d\te\n"
    server.tag = '"two"'
    assert list(read("wikisplit", "test")) == [("d", "e")]
    assert [path for path, _ in server.requests] == ["/train.tsv.zip", "/test.tsv"]
    assert (cache / "wikisplit" / "train.tsv.zip.json").is_file()
    assert os.stat(cache).st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="split of wikisplit must be one of train, tune, valid"):
        read("wikisplit", "dev")


def test_an_archive_has_all_splits(server, published, cache, tmp_path):  # noqa: F811
    published("discofuse")
    members = {
        f"discofuse_v1__wikipedia__{split}_balanced_dot_tsv": f"{DISCOFUSE}\tx\t{split}\tb\ta\n"
        for split in ("train", "dev", "test")
    }
    server.content = pack(tmp_path / "new.zip", **members)
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        assert list(read("discofuse", split)) == [("a b", name)]
    assert len(server.requests) == 1


def test_what_cannot_be_fetched(server, published, cache):  # noqa: F811
    published("wikisplit")
    server.cut = 10
    with pytest.raises(
        ConnectionError, match="train.tsv.zip could not be fetched: http://127.*a folder"
    ):
        read("wikisplit", "train")


# ---------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Data sets in a folder in place of the hub, read by the library itself."""
    datasets = pytest.importorskip("datasets", reason="needs the extra data")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub_cache"))

    def publish(name: str, records: list[dict]) -> None:
        folder = tmp_path / name
        folder.mkdir()
        datasets.Dataset.from_list(records).to_parquet(folder / "test-00000-of-00001.parquet")
        preset = dataclasses.replace(PRESETS[name], hub=(str(folder), None, "main"))
        monkeypatch.setattr(data_presets, "PRESETS", {name: preset})

    return publish


@pytest.mark.parametrize(
    ("name", "records", "pairs"),
    [
        ("cnn_dailymail", [{"article": "a\nb", "highlights": "c\nd", "id": "1"}], ("a\nb", "c\nd")),
        ("xsum", [{"document": "A", "summary": "B", "id": "1"}], ("A", "B")),
        ("wmt14", [{"translation": {"de": "„a“", "en": "b"}}], ("b", '"a"')),
    ],
)
def test_records_of_the_hub(name, records, pairs, hub):
    hub(name, records)
    assert list(read(name, "test")) == [pairs]
    with pytest.raises(ValueError, match=f"{name} should come from .* the split train failed"):
        read(name, "train")


def test_the_library_is_called_as_the_hub_has_it(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra data")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"document": "a", "summary": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read("xsum", "validation")) == [("a", "b")]
    assert calls == [
        (
            ("EdinburghNLP/xsum", None),
            {"split": "validation", "revision": "refs/convert/parquet"},
        )
    ]


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"xsum needs .* pip install 'bertgen_tf\[data\]'; or gi"):
        read("xsum")
