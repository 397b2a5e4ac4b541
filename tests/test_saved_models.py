"""The model that comes with the repository: whole, small, and as the READMEs show it."""

import hashlib
import json
import re

import pytest
import tensorflow as tf
import tensorflow_text  # noqa: F401 its ops are in the graph

import bertgen_tf as bg
from bertgen_tf.export.check import check_scores
from tests.helpers import ROOT

FOLDER = ROOT / "saved_models/sentence_splitting/1"
MAX_BYTES = 30_000_000


def test_it_is_what_was_exported():
    metadata = json.loads((FOLDER / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["source_checkpoint"]["encoder"] == "sentence-transformers/all-MiniLM-L6-v2"
    paths = [path for path in FOLDER.rglob("*") if path.is_file()]
    names = {path.relative_to(FOLDER).as_posix() for path in paths}
    assert names == {"metadata.json", *metadata["files"]}
    for name, facts in metadata["files"].items():
        data = (FOLDER / name).read_bytes()
        assert len(data) == facts["bytes"]
        assert hashlib.sha256(data).hexdigest() == facts["sha256"]
    assert sum(path.stat().st_size for path in paths) < MAX_BYTES


def _examples(document: str, heading: str) -> dict[str, str]:
    """What goes in and what comes out, under a heading of a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    section = text.partition(f"{heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^in : (.+)\nout: (.+)$", section, re.MULTILINE))


@pytest.mark.slow
def test_it_answers_as_the_readmes_say():
    examples = _examples("saved_models/README.md", "## The sentence splitter")
    assert len(examples) >= 6
    first = _examples("README.md", "# bertgen_tf")
    assert len(first) >= 2 and first.items() <= examples.items()
    loaded = tf.saved_model.load(str(FOLDER))
    answers = loaded.signatures["serving_default"](text=tf.constant(list(examples)))["text"].numpy()
    assert [answer.decode() for answer in answers] == list(examples.values())
    # What the READMEs ask the server, and what the page offers, is split.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    request = re.search(r"sentence_splitting:predict .*\n.*\"text\": \[\"(.+?)\"\]", readme)[1]
    offered = json.loads((FOLDER / "metadata.json").read_text(encoding="utf-8"))["examples"]
    document = (ROOT / "saved_models/README.md").read_text(encoding="utf-8")
    section = document.partition("## Ask\n")[2].partition("\n## ")[0]
    asked = re.findall(r"(?:\[|proto\(\[)\"([^\"]{20,})\"\]", section)
    assert len(offered) == 4 and len(asked) == 4  # one of these is an answer
    texts = {request, *offered, *(text for text in asked if text not in examples.values())}
    assert texts <= examples.keys()
    for text in texts:
        assert len(re.findall(r"[.](?= |$)", examples[text])) == 2


@pytest.mark.slow
def test_it_reads_back():
    model = bg.EncoderDecoderModel.from_export(FOLDER)
    assert model.is_quantized and model.decoder.sharing == "all"
    check_scores(FOLDER, model)
