"""What lies beside the graph of an export is what TensorFlow Serving reads, and true."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import prediction_log_pb2
from tensorflow_serving.config import model_server_config_pb2

import bertgen_tf as bg
from bertgen_tf.export import files as export_files
from tests.helpers import ROOT, make_model

BRIEF = bg.GenerationConfig(max_new_tokens=4)


def _as_they_are(scores, step, sequences):
    return scores


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = make_model(
        "all",
        max_source_length=20,
        add_eos=True,
        source_checkpoint={"encoder": "https://tfhub.dev/a/1", "decoder": "other"},
    )
    path = bg.export_saved_model(
        model,
        tmp_path_factory.mktemp("export") / "splitter/7",
        signatures={"brief": BRIEF},
        max_batch_size=4,
        warmup_xla=True,
        description="Splits sentences.",
        examples=("one, two", "three"),
        logits_processor=[_as_they_are],
        check=False,
        num_beams=2,
        max_new_tokens=6,
    )
    return model, Path(path)


def read_warmup(path):
    file = path / "assets.extra/tf_serving_warmup_requests"
    records = tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
    logs = [prediction_log_pb2.PredictionLog.FromString(record) for record in records]
    assert all(log.WhichOneof("log_type") == "predict_log" for log in logs)
    return [log.predict_log.request for log in logs]


@pytest.mark.slow
def test_warmup_has_a_request_for_each_bucket(exported):
    model, path = exported
    signatures = tf.saved_model.load(str(path)).signatures
    seen, others = [], []
    for request in read_warmup(path):
        assert request.model_spec.name == "splitter"
        name = request.model_spec.signature_name
        inputs = {key: tf.make_ndarray(tensor) for key, tensor in request.inputs.items()}
        if name not in ("serving_default", "generate_xla"):
            others.append(name)
            outputs = signatures[name](**{k: tf.constant(v) for k, v in inputs.items()})
            assert {len(value) for value in outputs.values()} == {1}
            continue
        (texts,) = inputs.values()
        assert list(inputs) == ["text"]
        lengths = {len(ids) for ids in model.preprocessor.encode_source(texts)}
        seen.append((name, len(texts), *lengths))
    # The buckets are 16 and 26, and texts are cut at 20.
    plain = [("serving_default", 1, 16), ("serving_default", 1, 20)]
    assert seen == plain + [("generate_xla", n, s) for s in (16, 20) for n in (1, 2, 4)]
    assert others == ["beams", "ids", "score", "attention", "tokens", "brief"]
    read = list(export_files.read_warmup(path))
    assert [name for name, _ in read] == [r.model_spec.signature_name for r in read_warmup(path)]
    assert read[0][1]["text"].tolist() == [export_files.text_of_length(model, 16).encode()]


def test_warmup_compiles_only_on_request(shared_export):
    names = {request.model_spec.signature_name for request in read_warmup(shared_export[1])}
    others = {"beams", "ids", "score", "attention", "tokens", "brief", "drawn"}
    assert names == {"serving_default", *others}


def test_too_many_warmup_requests(tmp_path, monkeypatch, model):
    monkeypatch.setattr(export_files, "MAX_WARMUP_REQUESTS", 5)
    with pytest.raises(ValueError, match="warm-up must have at most 5 requests, received 6"):
        export_files.write_warmup(tmp_path, "name", model, {}, [1, 2], compiled=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["word_piece", "sentence_piece"])
def test_text_of_length(kind, spiece):
    make_tokenizer = (
        {}
        if kind == "word_piece"
        else {"make_tokenizer": lambda: bg.BertGenerationTokenizer(spiece)}
    )
    model = make_model("all", max_source_length=20, add_bos=True, **make_tokenizer)
    for length in (3, 16, 20, 26):
        text = export_files.text_of_length(model, length)
        assert len(model.preprocessor.encode_source(text)) == min(length, 20)
        assert len(model.tokenizer(text)) == min(length, 20) - 1  # nothing was cut


def test_batching_parameters_agree_with_the_buckets(exported):
    text = (exported[1] / "batching_params.pbtxt").read_text()
    assert re.findall(r"allowed_batch_sizes: (\d+)", text) == ["1", "2", "4"]
    # The largest that runs must be the last that is allowed.
    assert re.findall(r"max_execution_batch_size \{ value: (\d+) \}", text) == ["4"]
    assert re.findall(r"max_batch_size \{ value: (\d+) \}", text) == ["128"]
    assert "enable_large_batch_splitting { value: true }" in text
    # Protobuf's own text format, of a message that no package carries.
    for line in filter(None, re.sub("#.*", "", text).splitlines()):
        assert re.fullmatch(r"\w+( \{ value: (\d+|true) \}|: \d+)", line), line


@pytest.mark.slow
def test_metadata(exported):
    model, path = exported
    metadata = json.loads((path / "metadata.json").read_text())
    assert (metadata["name"], metadata["version"]) == ("splitter", 7)
    assert metadata["source_checkpoint"] == {"encoder": "https://tfhub.dev/a/1", "decoder": "other"}
    assert metadata["parameters"] == sum(int(np.prod(w.shape)) for w in model.weights)
    assert metadata["parameters"] * 4 < metadata["weights_bytes"]
    config = bg.BertGenerationConfig.from_dict(metadata["config"]["encoder"])
    assert config == model.encoder.config
    assert metadata["config"]["preprocessor"]["add_eos"] is True
    settings = bg.GenerationConfig.from_dict(metadata["generation_config"])
    assert settings == model.generation_config.replace(num_beams=2, max_new_tokens=6)
    assert metadata["description"] == "Splits sentences."
    assert metadata["examples"] == ["one, two", "three"]
    assert metadata["logits_processor"] == ["_as_they_are"]
    assert metadata["batch_sizes"] == [1, 2, 4]
    assert metadata["source_lengths"] == [16, 26]
    assert metadata["versions"]["tensorflow"] == tf.__version__
    loaded = tf.saved_model.load(str(path)).signatures
    assert set(metadata["signatures"]) == set(loaded)
    assert metadata["signatures"]["beams"]["outputs"]["text"] == {
        "dtype": "string",
        "shape": [None, 2],
    }
    for name in ("brief", "brief_xla"):
        settings = metadata["signatures"][name]["generation_config"]
        assert bg.GenerationConfig.from_dict(settings) == BRIEF
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(metadata["files"]) == files - {"metadata.json"}
    for name, facts in metadata["files"].items():
        content = (path / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_source_is_known_after_all_that_a_model_goes_through(hub_module, tmp_path):
    model = bg.EncoderDecoderModel.from_hub(encoder=hub_module, num_layers=1)
    source = {"encoder": hub_module, "decoder": hub_module}
    assert model.source_checkpoint == source
    model.save_to_preset(tmp_path / "preset")
    model = bg.EncoderDecoderModel.from_preset(tmp_path / "preset")
    assert bg.trim_vocabulary(model, ["old house"]).source_checkpoint == source


def test_configuration_of_the_server():
    """The files that are mounted, read by the messages of tensorflow-serving-api."""
    folder = ROOT / "saved_models"
    config = text_format.Parse(
        (folder / "models.config").read_text(), model_server_config_pb2.ModelServerConfig()
    )
    for model in config.model_config_list.config:
        assert model.base_path == f"/models/{model.name}"
        assert model.model_platform == "tensorflow"
    monitoring = re.sub(r"#.*|\s", "", (folder / "monitoring.config").read_text())
    path = "/monitoring/prometheus/metrics"
    assert monitoring == f'prometheus_config{{enable:truepath:"{path}"}}'
