"""Exports in Beam pipelines; ./tools/test_beam runs this where Beam is installed."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers ops of the exports

import bertgen_tf as bg
from tests.helpers import CORPUS, WORDS, make_model

TEXTS = [*CORPUS, "", "über 😀 \x00", *(" ".join(WORDS[i : i + 7]) for i in range(8))]


@pytest.fixture(scope="module")
def beam():
    return pytest.importorskip("apache_beam", reason="needs Apache Beam: ./tools/test_beam")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("beam")


@pytest.fixture(scope="module")
def export(folder) -> str:
    # Without its favourites a random model looks at the source.
    config = bg.GenerationConfig(
        max_new_tokens=7,
        num_beams=2,
        suppress_tokens=tuple(range(13)),
        encoder_no_repeat_ngram_size=1,
        repetition_penalty=2.0,
    )
    return bg.export_saved_model(
        make_model(), folder / "saved_models" / "my_model" / "1", config, check=False
    )


@pytest.fixture(scope="module")
def expected(export) -> dict[str, tuple[str, float]]:
    """What the export itself answers, one text at a time."""
    answer = tf.saved_model.load(export).signatures["serving_default"]
    outputs = {text: answer(text=tf.constant([text])) for text in TEXTS}
    found = {
        text: (output["text"].numpy()[0].decode(), float(output["score"][0]))
        for text, output in outputs.items()
    }
    assert len({text for text, _ in found.values()}) > 3
    return found


def run(export: str, folder, options: list[str], **handler_options) -> list[dict]:
    """The results of a pipeline, which come by files: workers may be other processes."""
    import apache_beam as beam
    from apache_beam.ml.inference.base import RunInference
    from apache_beam.options.pipeline_options import PipelineOptions

    from bertgen_tf.serving.beam import SavedModelHandler

    handler = SavedModelHandler(export, max_batch_size=4, **handler_options)
    with beam.Pipeline(options=PipelineOptions(["--runner=DirectRunner", *options])) as pipeline:
        (
            pipeline
            | beam.Create(TEXTS)
            | beam.Reshuffle()
            | RunInference(handler)
            | beam.Map(lambda result: json.dumps([*result, os.getpid()]))
            | beam.io.WriteToText(str(folder / "results"))
        )
    files = sorted(folder.glob("results*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "handler_options", "processes"),
    [
        (["--direct_running_mode=in_memory"], {}, 1),
        (["--direct_running_mode=in_memory"], {"large_model": True}, 1),
        (["--direct_running_mode=multi_processing", "--direct_num_workers=2"], {}, 2),
    ],
    ids=["in_memory", "one copy in a process of its own", "multi_processing"],
)
def test_pipelines_answer_as_the_export(
    beam, export, expected, tmp_path, options, handler_options, processes
):
    results = run(export, tmp_path, options, **handler_options)
    assert len(results) == len(TEXTS)
    for text, inference, model_id, _ in results:
        assert inference == {
            "text": expected[text][0],
            "score": pytest.approx(expected[text][1], abs=1e-5),
        }
        assert model_id == export
    assert {text for text, *_ in results} == set(TEXTS)
    workers = {pid for *_, pid in results}
    if processes == 1:
        assert workers == {os.getpid()}
    else:
        assert os.getpid() not in workers


def test_all_hypotheses_and_details(beam, export):
    from bertgen_tf.serving.beam import SavedModelHandler

    handler = SavedModelHandler(export, "beams", min_batch_size=2, max_batch_size=8)
    assert handler.batch_elements_kwargs() == {"min_batch_size": 2, "max_batch_size": 8}
    assert not handler.share_model_across_processes()
    assert SavedModelHandler(export, model_copies=2).share_model_across_processes()
    assert handler.get_num_bytes(["über", "a"]) == 6
    assert handler.get_metrics_namespace() == "bertgen_tf"
    results = handler.run_inference(TEXTS[:3], handler.load_model())
    answers = tf.saved_model.load(export).signatures["beams"](text=tf.constant(TEXTS[:3]))
    for i, result in enumerate(results):
        assert result.example == TEXTS[i]
        assert [text.encode() for text in result.inference["text"]] == list(
            answers["text"][i].numpy()
        )
        assert result.inference["score"] == pytest.approx(answers["score"][i].numpy().tolist())

    handler.update_model_path("another/2")
    with pytest.raises(OSError, match="another/2"):
        handler.load_model()
    handler.update_model_path(None)
    with pytest.raises(OSError, match="another/2"):
        handler.load_model()
    with pytest.raises(ValueError, match="inference_args must be empty.*num_beams"):
        handler.validate_inference_args({"num_beams": 3})
    handler.validate_inference_args(None)
    with pytest.raises(ValueError, match="signature must be one of text.*serving_default.*'score'"):
        SavedModelHandler(export, "score").load_model()


def test_the_example_runs_as_printed(beam, export, expected, folder):
    module = importlib.import_module("bertgen_tf.serving.beam")
    lines = module.__doc__.splitlines()
    example = "\n".join(line[4:] for line in lines if line.startswith("    "))
    sources = [text for text in TEXTS if "\x00" not in text]
    (folder / "sources.txt").write_text("".join(f"{text}\n" for text in sources))
    subprocess.run([sys.executable, "-c", example], cwd=folder, check=True, timeout=300)
    lines = [line for file in folder.glob("outputs*.txt") for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(expected[text][0] for text in sources)


def test_without_beam(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam.ml.inference.base", None)
    monkeypatch.delitem(sys.modules, "bertgen_tf.serving.beam", raising=False)
    with pytest.raises(ImportError, match='pip install "bertgen_tf\\[beam\\]"'):
        importlib.import_module("bertgen_tf.serving.beam")
