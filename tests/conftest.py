"""Fixtures of all tests."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import io
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
import sentencepiece
from make_hub_module import make_hub_module

import bertgen_tf as bg
from tests.helpers import (
    CORPUS,
    EXPORT_OPTIONS,
    FURTHER,
    WORDS,
    make_deep_model,
    make_small_model,
    write_checkpoint,
)


@pytest.fixture(scope="session")
def hub_module(tmp_path_factory) -> str:
    """The folder of a tiny TF Hub BERT encoder."""
    folder = tmp_path_factory.mktemp("hub")
    make_hub_module(write_checkpoint(folder / "checkpoint"), folder / "module")
    return str(folder / "module")


@pytest.fixture(scope="session")
def spiece() -> bytes:
    """A tiny SentencePiece model, with special ids where nobody would guess them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, " ".join(WORDS), "an owl, a fox; quick!"] * 4),
        model_writer=model,
        vocab_size=47,
        pad_id=3,
        unk_id=1,
        bos_id=0,
        eos_id=2,
        pad_piece="<pad>",
        user_defined_symbols=["<::::>"],
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def write_once(tmp_path_factory):
    """`write_once(name, write)`: a new path that `write` got, once for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def write_once(name: str, write: Callable[[Path], object]) -> Path:
        path = folder / f"shared-{name}" / "1"
        path.parent.mkdir(exist_ok=True)
        with filelock.FileLock(folder / f"shared-{name}.lock"):
            if not path.exists():
                write(path)
        return path

    return write_once


@pytest.fixture(scope="session")
def shared_export(write_once) -> tuple[bg.EncoderDecoderModel, Path]:
    """A model and its export by `EXPORT_OPTIONS`, with the signatures `FURTHER`. Read-only."""
    model = make_small_model("all", max_source_length=20)
    further = {name: bg.GenerationConfig(**options) for name, options in FURTHER.items()}

    def write(path: Path) -> None:
        # The check would run what is run by the tests.
        bg.export_saved_model(model, path, signatures=further, check=False, **EXPORT_OPTIONS)

    return model, write_once("export", write)


@pytest.fixture(scope="session")
def model() -> bg.EncoderDecoderModel:
    """Read-only: tests that train or change a model make their own."""
    return make_deep_model()


SLOW = 20  # seconds


def pytest_terminal_summary(terminalreporter) -> None:
    """Names the tests that should be marked `slow`; the machine may be busy, so none fails."""
    missing = [
        f"{report.duration:.0f} s {report.nodeid}"
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" and report.duration > SLOW and "slow" not in report.keywords
    ]
    if missing:
        terminalreporter.section(f"more than {SLOW} s and not marked slow")
        for line in missing:
            terminalreporter.write_line(line)
