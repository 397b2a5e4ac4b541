"""The data sets of the BertGeneration paper: their texts, and how the paper trained on them.

Figures are those of Rothe, Narayan, Severyn 2020 (arXiv 1907.12461), section 4; what it does not
state is None. `read` gives the pairs of a data set, from a folder of yours or from where it is
published: files that are kept under `bertgen_tf/data` in the user's cache, or the Hugging Face hub
through the library `datasets` (`pip install 'bertgen_tf[data]'`), which has its own cache.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from bertgen_tf.checks import first_line
from bertgen_tf.data import downloads, folders, text_lines

Pairs = Iterator[tuple[str, str]]

# Other names of splits.
SPLIT_NAMES = {"validation": ("validation", "valid", "val", "dev")}
# More than any article has; no single line may fill the memory.
MAX_LINE_BYTES = 2**24
_HUB = "https://huggingface.co/datasets"


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a data set, as it is published.

    Attributes:
        name: what it is called in the cache and in folders.
        urls: where it is, in the order to try.
        max_bytes: no file of this name is larger.
        members: of a .zip: the prefix of its members' names.
    """

    name: str
    urls: tuple[str, ...]
    max_bytes: int
    members: str = ""


@dataclasses.dataclass(frozen=True)
class DataPreset:
    """A data set and its recipe.

    Attributes:
        name: what it is called here.
        task: what to learn.
        max_source_length, max_target_length: in tokens.
        batch_size: pairs per batch.
        steps: of the base models' training, or None where the paper counts epochs.
        epochs: where it counts them, or None.
        metrics: the paper's, by their names in `bertgen_tf.metrics`; both kinds of SARI, as it does
            not state which.
        tokenize: how BLEU and SARI split words, as in `metrics.compute`.
        lowercase_metrics: whether they ignore case.
        num_beams, gnmt_alpha: of the search, where the paper states them.
        source_fields, target_fields: of the data set's own records; the texts of several fields are
            joined by spaces.
        files: by split, where they are published as files.
        endings: of two files with the sources and the targets line by line.
        hub: the data set, configuration and revision on the Hugging Face hub, where it is not
            published as files.
        prepare: what is done with each text.
        note: what else to know.
    """

    name: str
    task: str
    max_source_length: int
    max_target_length: int
    batch_size: int
    steps: int | None
    metrics: tuple[str, ...]
    source_fields: tuple[str, ...]
    target_fields: tuple[str, ...]
    epochs: int | None = None
    tokenize: str = "13a"
    lowercase_metrics: bool = False
    num_beams: int | None = None
    gnmt_alpha: float | None = None
    files: Mapping[str, File] = dataclasses.field(default_factory=dict)
    endings: tuple[str, str] | None = None
    hub: tuple[str, str | None, str] | None = None
    prepare: Callable[[str], str] = str.strip
    note: str = ""


def _split_sentences(text: str) -> str:
    """WikiSplit's two sentences with a space between them."""
    return text.replace(" <::::> ", " ").strip()


def _headline(text: str) -> str:
    """Gigaword as in its test set: UNK for unknown words, and in lower case."""
    return text.replace("<unk>", "UNK").lower().strip()


_QUOTES = str.maketrans(dict.fromkeys("“”„‟", '"') | dict.fromkeys("‘’‚‛", "'"))


def _ascii_quotes(text: str) -> str:
    """ASCII quotation marks, as in the paper's scores."""
    return text.translate(_QUOTES).strip()


def _wikisplit_files() -> dict[str, File]:
    base = "https://github.com/google-research-datasets/wiki-split/raw/master"
    files = {
        split: File(f"{split}.tsv", (f"{base}/{split}.tsv",), 2**24)
        for split in ("tune", "validation", "test")
    }
    return {"train": File("train.tsv.zip", (f"{base}/train.tsv.zip",), 2**30), **files}


def _one_file(file: File) -> dict[str, File]:
    return dict.fromkeys(("train", "validation", "test"), file)


PRESETS: Mapping[str, DataPreset] = {
    preset.name: preset
    for preset in (
        DataPreset(
            "wikisplit",
            "sentence splitting (Botha et al. 2018); reversed, sentence fusion",
            128,
            128,
            batch_size=256,
            steps=300_000,
            metrics=("exact", "sari", "sari_f1", "bleu"),
            tokenize="none",
            source_fields=("complex_sentence",),
            target_fields=("simple_sentence_1", "simple_sentence_2"),
            files=_wikisplit_files(),
            prepare=_split_sentences,
            note="The largest models overfit: the paper stopped them after 100,000 steps.",
        ),
        DataPreset(
            "discofuse",
            "sentence fusion, balanced part of Wikipedia (Geva et al. 2019)",
            128,
            128,
            batch_size=256,
            steps=300_000,
            metrics=("exact", "sari", "sari_f1"),
            tokenize="none",
            source_fields=("incoherent_first_sentence", "incoherent_second_sentence"),
            target_fields=("coherent_first_sentence", "coherent_second_sentence"),
            files=_one_file(
                File(
                    "discofuse_v1_wikipedia.zip",
                    (
                        "https://storage.googleapis.com/gresearch/discofuse/discofuse_v1_wikipedia.zip",
                        "https://storage.googleapis.com/discofuse.appspot.com/discofuse_v1_wikipedia.zip",
                    ),
                    4 * 2**30,
                    "discofuse_v1/wikipedia/",
                )
            ),
            note='By its model card, the original was trained with a back tick and knows no ".',
        ),
        DataPreset(
            "gigaword",
            "headlines of first sentences (Rush et al. 2015), in lower case",
            128,
            32,
            batch_size=256,
            steps=500_000,
            metrics=("rouge1", "rouge2", "rougeL"),
            source_fields=("document",),
            target_fields=("summary",),
            files=_one_file(
                File(
                    "ggw_data.zip",
                    (
                        f"{_HUB}/Harvard/gigaword/resolve/e45e01b2da13842bb3df1b12dc046910147b3d82"
                        "/data/ggw_data.zip",
                    ),
                    2 * 2**30,
                    "org_data/",
                )
            ),
            endings=(".src.txt", ".tgt.txt"),
            prepare=_headline,
        ),
        DataPreset(
            "cnn_dailymail",
            "summaries of news, not anonymised (Hermann et al. 2015, See et al. 2017)",
            512,
            128,
            batch_size=128,
            steps=300_000,
            metrics=("rouge1", "rouge2", "rougeLsum"),
            source_fields=("article",),
            target_fields=("highlights",),
            hub=("abisee/cnn_dailymail", "3.0.0", "main"),
            note="Summaries have one sentence per line, which ROUGE-Lsum compares.",
        ),
        DataPreset(
            "xsum",
            "summaries in one sentence (Narayan et al. 2018)",
            512,
            64,
            batch_size=128,
            steps=200_000,
            metrics=("rouge1", "rouge2", "rougeL"),
            source_fields=("document",),
            target_fields=("summary",),
            # Its main branch is a script, which `datasets` does not run.
            hub=("EdinburghNLP/xsum", None, "refs/convert/parquet"),
        ),
        DataPreset(
            "wmt14",
            "translation, English to German; reversed, German to English (Bojar et al. 2014)",
            128,
            128,
            batch_size=256,
            steps=None,
            epochs=30,
            metrics=("bleu",),
            # The tokens of tensorflow/models' script, which follow mteval-v14.
            tokenize="intl",
            lowercase_metrics=True,
            num_beams=4,
            gnmt_alpha=0.6,
            source_fields=("en",),
            target_fields=("de",),
            endings=(".en", ".de"),
            hub=("wmt/wmt14", "de-en", "main"),
            prepare=_ascii_quotes,
        ),
    )
}


def find(name: str) -> DataPreset:
    """The preset of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"data must be one of {', '.join(PRESETS)}, received {name!r}")
    return PRESETS[name]


def read(
    name: str,
    split: str = "train",
    folder: str | os.PathLike | None = None,
    *,
    reverse: bool = False,
    verbose: Any = 0,
) -> Pairs:
    """The (source, target) pairs of a data set, one after another.

    A folder holds, for each split, one of

    | files | what they hold |
    | --- | --- |
    | SPLIT.tsv | source, tab, target; or the data set's columns, named in the first line |
    | SPLIT.jsonl or .json | {"source": ..., "target": ...} or the data set's own fields |
    | SPLIT.en and SPLIT.de, of wmt14 | one text per line |
    | SPLIT.src.txt and SPLIT.tgt.txt, of gigaword | one text per line |

    or the archives as published (`File.name`). SPLIT is train, validation (or valid, val, dev) or
    test, or another for which there are files; SPLIT_balanced.tsv, DiscoFuse's name, is tried
    before SPLIT.tsv. Pairs with a blank text are left out.

    Args:
        name: of `PRESETS`.
        split: "train", "validation" or "test"; for wikisplit also "tune".
        folder: where the files are; by default they are fetched, once.
        reverse: swaps source and target.
        verbose: shows the progress of downloads on stderr: "auto", 0 or 1.

    Returns:
        an iterator. Files are found and fetched before this returns, and read during iteration.

    Raises:
        ImportError: the package `datasets` is not installed.
        OSError: the folder or the network cannot be read.
        ValueError: an unknown name or split, or, here or during iteration, a malformed line.
    """
    preset = find(name)
    if not re.fullmatch(r"\w[\w-]*", split):
        raise ValueError(f"split must be a name such as train, received {split!r}")
    if folder is not None:
        records = _read_folder(preset, split, pathlib.Path(folder))
    elif preset.files:
        records = _read_files(preset, split, verbose)
    else:
        records = _read_hub(preset, split)
    return _prepare(records, preset, reverse)


def _prepare(pairs: Pairs, preset: DataPreset, reverse: bool) -> Pairs:
    for pair in pairs:
        source, target = map(preset.prepare, pair)
        if source and target:
            yield (target, source) if reverse else (source, target)


# --------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class _Found:
    """A file, or a member of a .zip."""

    path: pathlib.Path
    member: str | None = None

    @property
    def name(self) -> str:
        return str(self.path / self.member) if self.member else str(self.path)

    def lines(self) -> Iterator[tuple[str, str]]:
        if self.member is None:
            with open(self.path, "rb") as file:
                yield from text_lines.decode_lines(_bounded(file, self.name), self.name)
            return
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                yield from text_lines.decode_lines(_bounded(file, self.name), self.name)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"{self.name} cannot be unpacked: {error}") from error


def _bounded(file: BinaryIO, name: str) -> Iterator[bytes]:
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_BYTES)
        if not line:
            return
        if len(line) == MAX_LINE_BYTES:
            raise ValueError(f"{name}, line {number} has {MAX_LINE_BYTES:,} bytes or more")
        yield line


def _read_files(preset: DataPreset, split: str, verbose: Any) -> Pairs:
    """The pairs of a split from the published files, which are fetched first."""
    if split not in preset.files:
        raise ValueError(
            f"split of {preset.name} must be one of {', '.join(preset.files)}, received {split!r}"
        )
    file = preset.files[split]
    folder = pathlib.Path(folders.users_cache("data")) / preset.name
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        downloads.fetch(file.urls, folder / file.name, max_bytes=file.max_bytes, verbose=verbose)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}. Give a folder with the files of {preset.name} instead."
        ) from error
    return _read_folder(preset, split, folder)


def _read_folder(preset: DataPreset, split: str, folder: pathlib.Path) -> Pairs:
    """The pairs of a split from files in a folder, found now and read later."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder must be a folder, but {folder} is not one")
    archives = _archives(preset, folder)
    wanted = []
    for name in SPLIT_NAMES.get(split, (split,)):
        for ending in ("_balanced.tsv", ".tsv", ".jsonl", ".json"):
            wanted.append(f"{name}{ending}")
            if found := _locate(folder, archives, wanted[-1]):
                return _read_table(preset, found)
        if preset.endings:
            wanted.append(" and ".join(name + ending for ending in preset.endings))
            sides = [_locate(folder, archives, name + ending) for ending in preset.endings]
            if all(sides):
                return _read_parallel(*sides)
    raise FileNotFoundError(
        f"{folder} should hold the split {split} of {preset.name}, as one of {', '.join(wanted)}, "
        "but does not"
    )


def _archives(preset: DataPreset, folder: pathlib.Path) -> dict[pathlib.Path, dict[str, str]]:
    """The members of each existing archive, by the names of the files that they stand for."""
    archives = {}
    for file in set(preset.files.values()):
        path = folder / file.name
        if file.name.endswith(".zip") and path.is_file():
            try:
                with zipfile.ZipFile(path) as archive:
                    members = [name for name in archive.namelist() if name.startswith(file.members)]
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path} should be a .zip archive: {error}") from error
            archives[path] = {name.removeprefix(file.members): name for name in members}
    return archives


def _locate(
    folder: pathlib.Path, archives: dict[pathlib.Path, dict[str, str]], name: str
) -> _Found | None:
    if (folder / name).is_file():
        return _Found(folder / name)
    for path, members in archives.items():
        if name in members:
            return _Found(path, members[name])
    return None


def _read_parallel(sources: _Found, targets: _Found) -> Pairs:
    for source, target in itertools.zip_longest(sources.lines(), targets.lines()):
        if source is None or target is None:
            longer, shorter = (targets, sources) if source is None else (sources, targets)
            raise ValueError(f"{shorter.name} has fewer lines than {longer.name}")
        yield source[1], target[1]


def _read_table(preset: DataPreset, file: _Found) -> Pairs:
    if not file.name.endswith(".tsv"):
        for place, line in file.lines():
            if line.strip():
                yield _json_pair(preset, place, line)
        return
    columns = None
    for number, (place, line) in enumerate(file.lines()):
        if not line.strip():
            continue
        cells = line.split("\t")
        if number == 0 and {*preset.source_fields, *preset.target_fields} <= set(cells):
            columns = cells
            continue
        if len(cells) != (2 if columns is None else len(columns)):
            expected = "source<TAB>target" if columns is None else f"{len(columns)} columns"
            raise ValueError(
                f"{place}: expected {expected}, found {len(cells)} columns in {line[:60]!r}"
            )
        if columns is None:
            yield cells[0], cells[1]
        else:
            yield _join(preset, dict(zip(columns, cells, strict=True)))


def _json_pair(preset: DataPreset, place: str, line: str) -> tuple[str, str]:
    try:
        return _record_pair(preset, json.loads(line))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        fields = ", ".join((*preset.source_fields, *preset.target_fields))
        raise ValueError(
            f"{place}: expected an object with texts as source, target or as {fields}, found "
            f"{line[:60]!r}"
        ) from error


def _record_pair(preset: DataPreset, record: Any) -> tuple[str, str]:
    """The pair of a record, by our field names or the data set's; WMT's are one level down."""
    if "source" in record:
        pair = record["source"], record["target"]
    else:
        pair = _join(preset, record.get("translation", record))
    for text in pair:
        text.encode()  # JSON can encode half a character
    return pair


def _join(preset: DataPreset, record: Mapping[str, str]) -> tuple[str, str]:
    def join(fields: Sequence[str]) -> str:
        return " ".join(text for field in fields if (text := record[field].strip()))

    return join(preset.source_fields), join(preset.target_fields)


# ----------------------------------------------------------------------------------------- hub


def _read_hub(preset: DataPreset, split: str) -> Pairs:
    """The pairs of a split from the Hugging Face hub, which keeps them on disk, not in memory."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{preset.name} needs the package datasets: pip install 'bertgen_tf[data]'; or give a "
            "folder with its files"
        ) from error
    repository, config, revision = preset.hub
    try:
        table = datasets.load_dataset(repository, config, split=split, revision=revision)
    except Exception as error:  # from the hub, its files, pyarrow or the network
        raise ValueError(
            f"{preset.name} should come from the Hugging Face data set {repository}, but loading "
            f"the split {split} failed: {first_line(error)}. Give a folder with its files instead."
        ) from error
    return (_record_pair(preset, record) for record in table)
