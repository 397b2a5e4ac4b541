"""The model that comes with the repository: whole, small, and as the README shows it."""

import hashlib
import json
import re

import pytest
import tensorflow as tf
import tensorflow_text  # noqa: F401 its ops are in the graph

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


@pytest.mark.slow
def test_it_answers_as_the_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## The sentence splitter")[2].partition("\n## ")[0]
    examples = re.findall(r"^in : (.+)\nout: (.+)$", section, re.MULTILINE)
    assert len(examples) >= 6
    sources, outputs = zip(*examples, strict=True)
    loaded = tf.saved_model.load(str(FOLDER))
    answers = loaded.signatures["serving_default"](text=tf.constant(sources))["text"].numpy()
    assert [answer.decode() for answer in answers] == list(outputs)
