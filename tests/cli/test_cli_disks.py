"""Every command that writes, on disks that take nothing more: one line, and nothing half there."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import resource
import subprocess
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tensorflow as tf
from safetensors import SafetensorError

import bertgen_tf as bg
from bertgen_tf import finetuning
from bertgen_tf.checkpoints import presets
from bertgen_tf.checkpoints.huggingface import files as huggingface_files
from bertgen_tf.cli import finetune as cli_finetune
from bertgen_tf.cli import main as cli
from bertgen_tf.export import saved_model
from bertgen_tf.training import tensor_files
from tests.helpers import fails, make_small_model, write_checkpoint
from tests.helpers.command_line import SOURCES, write_pairs

PAGE = 4096
URL = "https://tfhub.dev/a/1"
FILLER = "filler"
KINDS = {
    "full": errno.ENOSPC,
    "read-only": errno.EROFS,
    "too large": errno.EFBIG,  # for the limit of a process
    "quota": errno.EDQUOT,
}
PRESET = ["--preset", "PRESET"]
SCORED = ["--predictions", "outputs.txt", "--references", "pairs.tsv"]
GENERATE = ["generate", *PRESET, "--input", "pairs.tsv", "--output", "DISK/a"]
EVALUATE = ["evaluate", "--metrics", "exact", "--resamples", "10"]
FINETUNE = ["finetune", *PRESET, "--train", "pairs.tsv", "--output", "DISK/a"]
HUB = "cache/bertgen_tf/hub/" + hashlib.sha1(URL.encode()).hexdigest()


class Command(NamedTuple):
    """What is run, and what is to come."""

    arguments: list[str]  # what is written lies in DISK
    pages: int  # of 4 KiB, which have room there
    path: str  # in the message
    quota: tuple[object, str, type]  # owner and name of what fails without a quota, and how
    left: tuple[str, ...] = ()  # stays, as documented, besides locks


COMMANDS = {
    "convert to Hugging Face": Command(
        ["convert", "PRESET", "DISK/a/b", "--no-verify"],
        1,
        "a/b",
        (huggingface_files, "save_file", SafetensorError),
    ),
    "convert to a preset": Command(
        ["convert", "CHECKPOINT", "DISK/a/b", "--no-verify"],
        2,
        "a/b/model.weights.h5",
        (os, "posix_fallocate", OSError),
    ),
    "export": Command(
        ["export", *PRESET, "--output", "DISK/a/1", "--no-check"],
        2,
        "a/1",
        (tf.saved_model, "save", tf.errors.ResourceExhaustedError),
    ),
    "generate": Command(
        GENERATE, 2, "a.partial", (os, "fsync", OSError), ("a.partial", "a.partial.json")
    ),
    "generate, its settings": Command(GENERATE, 0, "a.partial", (json, "dump", OSError)),
    "evaluate --output": Command(
        [*EVALUATE, *PRESET, "--references", "pairs.tsv", "--output", "DISK/a.txt"],
        1,
        "a.txt.partial",
        (os, "fsync", OSError),
        ("a.txt.partial",),
    ),
    "evaluate --json": Command(
        [*EVALUATE, *SCORED, "--json", "DISK/a.json"], 0, "a.json", (json, "dump", OSError)
    ),
    "evaluate --plot": Command(
        [*EVALUATE, *SCORED, "--plot", "DISK/a.png"],
        0,
        "a.png",
        ("matplotlib.figure.Figure", "savefig", OSError),
    ),
    "evaluate --data": Command(
        [*EVALUATE, "--predictions", "outputs.txt", "--data", "wikisplit"],
        1,
        "cache/bertgen_tf/data/wikisplit/test.tsv",
        (os, "fsync", OSError),
        ("test.tsv.partial", "test.tsv.partial.etag"),
    ),
    "convert a URL": Command(
        ["convert", URL, "preset"], 1, HUB, (tarfile.TarFile, "extract", OSError)
    ),
    "finetune": Command(FINETUNE, 0, "a.training/run.json", (Path, "write_text", OSError)),
    "finetune, its preset": Command(
        FINETUNE, 4, "a/model.weights.h5", (os, "posix_fallocate", OSError), ("run.json",)
    ),
    "finetune, its adapter": Command(
        [*FINETUNE, "--lora-rank", "2"],
        1,
        "a.training/adapter.safetensors",
        (tensor_files, "save_file", SafetensorError),
        ("run.json",),
    ),
}


@pytest.fixture(scope="module")
def model() -> bg.EncoderDecoderModel:
    return make_small_model(max_source_length=20)


class Cheap(tf.Module):
    """A signature that is traced in no time."""

    def __init__(self, model, config, *args):
        super().__init__()
        self.weights = [weight.value for weight in model.weights]

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
        def answer(text):
            return {"text": text}

        self.functions, self.settings = {"serving_default": answer}, {"serving_default": config}


class Response(io.BytesIO):
    """Of a server with a large file, or archive."""

    def __init__(self, request, **options):
        self.url = getattr(request, "full_url", request)
        self.status, self.headers = 200, {}
        content = os.urandom(1 << 20)
        if "tfhub" in self.url:
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w:gz") as archive:
                member = tarfile.TarInfo("saved_model.pb")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            content = file.getvalue()
        super().__init__(content)


class Data(list):
    """To train on, not encoded."""

    steps_per_epoch = 3

    def __init__(self, pairs, *args, **options):
        super().__init__(pairs)

    def notes(self, what):
        return ()


@pytest.fixture
def inputs(tmp_path, model, monkeypatch) -> Iterator[None]:
    """Files to read, and everything that takes time replaced by something that does not."""
    monkeypatch.chdir(tmp_path)
    pairs = [(source, source) for source in SOURCES]
    write_pairs(tmp_path / "pairs.tsv", pairs)
    Path("outputs.txt").write_text("".join(f"{source}\n" for source in SOURCES))
    Path("PRESET").mkdir()
    presets.write_settings(model, Path("PRESET"))
    Path("PRESET", presets.WEIGHTS_FILE).touch()
    write_checkpoint(tmp_path / "CHECKPOINT")

    for name in ("from_preset", "from_huggingface"):
        monkeypatch.setattr(
            bg.EncoderDecoderModel, name, classmethod(lambda cls, *args, **options: model)
        )
    long = "a bird sang " * 999
    monkeypatch.setattr(
        bg.EncoderDecoderModel, "iterate", lambda self, texts, *a, **k: (long for _ in texts)
    )
    monkeypatch.setattr(saved_model, "ServingModule", Cheap)
    monkeypatch.setattr(finetuning, "train", lambda *args, **kwargs: {})
    monkeypatch.setattr(urllib.request, "urlopen", Response)
    monkeypatch.delenv("TFHUB_CACHE_DIR", raising=False)
    monkeypatch.setattr(cli_finetune, "TrainingData", Data)
    yield
    if model.lora is not None:
        model.merge_lora()


@contextlib.contextmanager
def disk(kind: str, folder: Path, command: Command, monkeypatch) -> Iterator[None]:
    """Lets the block write little to `folder`."""
    folder.mkdir()
    if kind == "quota":  # which the kernels of many machines cannot set
        owner, name, error = command.quota
        text = f"somewhere; {os.strerror(KINDS[kind])} (os error {KINDS[kind]})"
        arguments = {OSError: (KINDS[kind], text), SafetensorError: (text,)}
        error = error(*arguments.get(error, (None, None, text)))

        def fail(*args, **options):
            raise error

        with monkeypatch.context() as context:
            if isinstance(owner, str):
                context.setattr(f"{owner}.{name}", fail)
            else:
                context.setattr(owner, name, fail)
            yield
    elif kind == "too large":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (command.pages * PAGE, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    else:
        # size=0 would be no limit.
        options = "ro" if kind == "read-only" else f"size={(command.pages + 1) * PAGE}"
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounts need root")
        try:
            if kind == "full":
                (folder / FILLER).write_bytes(bytes(PAGE))
            yield
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_takes_nothing_more(name, kind, inputs, tmp_path, monkeypatch, capsys):
    command, folder = COMMANDS[name], tmp_path / "disk"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    if "--plot" in command.arguments:
        pytest.importorskip("matplotlib")
    before = set(tmp_path.iterdir()) | {folder}
    with disk(kind, folder, command, monkeypatch):
        code = cli.main([argument.replace("DISK", str(folder)) for argument in command.arguments])
        left = {path.name for path in folder.rglob("*") if path.is_file()}
        hidden = [path for path in folder.rglob(".*") if path.is_dir()]
        empty = [p for p in folder.rglob("a*") if p.is_dir() and not any(p.iterdir())]
    *notes, error = capsys.readouterr().err.splitlines()
    reason = os.strerror(KINDS[kind])
    if kind == "read-only":  # known before anything is read
        assert str(folder) in error and (reason in error or "can be written, but" in error)
    else:
        assert error.startswith(f"bertgen-tf: error: {folder / command.path}: {reason}")
    assert error.startswith("bertgen-tf: error: ") and code == 2
    left = {name for name in left if name != FILLER and not name.endswith(".lock")}
    # Nothing is finished yet.
    begins = kind == "quota" and command.quota[1] == "fsync" and command.path.endswith("partial")
    kept = kind != "read-only" and not begins
    assert left == set(command.left if kept else ())
    partial = f"bertgen-tf: what was finished is in {folder / command.path}"
    assert notes == [partial] * any(
        name.endswith(".partial") and "tsv" not in name for name in left
    )
    assert not hidden and not empty and set(tmp_path.iterdir()) == before


def test_a_preset_that_was_being_replaced_is_told_and_put_back(inputs, monkeypatch, capsys):
    """The run for it was killed."""
    hidden = Path(".PRESET.bertgen_tf-0123abcd-old")
    Path("PRESET").rename(hidden)
    Path("DISK").mkdir()
    told = f"because a run was killed while it replaced it: rename {hidden.absolute()} to PRESET."
    assert fails(capsys, *GENERATE) == f"bertgen-tf: error: PRESET is missing, {told}\n"
    # What writes it again begins with that.
    monkeypatch.setattr(cli_finetune, "_finetune", lambda *args: None)
    command = ["finetune", "--encoder", "x", "--train", "pairs.tsv", "--output", "PRESET"]
    assert cli.main(command) == 0
    assert presets.read_config("PRESET") and not hidden.exists()
    expected = "bertgen-tf: .*/PRESET is the older one again: a run was killed .*\n"
    assert re.fullmatch(expected, capsys.readouterr().err)
