"""Files of HuggingFace checkpoints that are damaged, cut, hostile or missing; names on the hub."""

import http.server
import json
import os
import struct
import subprocess
import sys
import threading
import types
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bertgen_tf as bg
from bertgen_tf.checkpoints.huggingface import files
from tests.helpers import GOLDEN, make_deep_model


@pytest.fixture
def folder(tmp_path, model):
    model.save_to_huggingface(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def shards(tmp_path, model):
    model.save_to_huggingface(tmp_path / "shards", max_shard_size=9000)
    return tmp_path / "shards"


def read(folder):
    return bg.EncoderDecoderModel.from_huggingface(folder)


def refused(folder, message, error=ValueError):
    """One line that says it, and no model."""
    with pytest.raises(error, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def header_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def change_tensor(content, **changes):
    header, data = header_of(content)
    name = "decoder.lm_head.bias"
    header[name] = {**header[name], **changes}
    return with_header(header, data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:5],
        lambda content: b"",
        lambda content: content[:200],
        lambda content: content[:-7],
        lambda content: struct.pack("<Q", 2**60) + content[8:],
        lambda content: struct.pack("<Q", len(content)) + content[8:],
        lambda content: content[:8] + b"x" + content[9:],
        lambda content: content + b"more",
        lambda content: change_tensor(content, data_offsets=[0, 4]),
        lambda content: change_tensor(content, data_offsets=[-8, 4]),
        lambda content: change_tensor(content, shape=[81]),
        lambda content: change_tensor(content, dtype="F99"),
        lambda content: b"PK\x03\x04" + content,
    ],
)
def test_damaged_safetensors(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, "model.safetensors should be a safetensors file, but reading it failed: ")


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


BIAS = "encoder.encoder.layer.1.output.dense.bias"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t[BIAS].__setitem__(3, np.nan), f"{BIAS} holds NaN or infinity"),
        (lambda t: t[BIAS].__setitem__(3, -np.inf), f"{BIAS} holds NaN or infinity"),
        (
            lambda t: t.update({BIAS: t[BIAS].astype(np.float64) * 1e300}),
            f"{BIAS} holds NaN or infinity",
        ),
        (lambda t: t.update({BIAS: t[BIAS][:5]}), r"output.dense.bias has shape \(5,\), but enc"),
        (lambda t: t.pop(BIAS), "nothing found for 1 names .encoder/layer_1/feed_forward/output_d"),
        (lambda t: t.update(more=t[BIAS]), r"no rule for 1 names \(more\)"),
        (
            lambda t: t.update({"encoder.embeddings.LayerNorm.gamma": t[BIAS]}),
            "would become encoder/embeddings/layer_norm/gamma, which is assigned already",
        ),
        (
            lambda t: t.update({BIAS: t[BIAS].astype(np.int8)}),
            r"should hold weights in float16.* but has enc.*dense.bias \(int8\). Quantized",
        ),
        (
            lambda t: t.update({BIAS.replace(".1.", ".7."): t[BIAS]}),
            "would become encoder/layer_7/feed_forward/output_dense/bias, which the model does not",
        ),
    ],
)
def test_tensors_that_do_not_fit(folder, edit, message):
    change(folder, edit)
    refused(folder, message)


def test_all_problems_come_in_one_error_and_nothing_is_half_loaded(folder, model):
    """Models that exist stay as they are; reading again the whole folder works."""
    before = [np.array(variable) for variable in model.weights]

    def edit(tensors):
        tensors.pop("encoder.embeddings.LayerNorm.weight")
        tensors[BIAS][0] = np.nan
        tensors["more"] = tensors[BIAS]

    whole = (folder / "model.safetensors").read_bytes()
    change(folder, edit)
    refused(folder, "NaN or infinity; no rule for 1 names .more.; nothing found for 1 names .enc")
    for one, two in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(one, two)
    (folder / "model.safetensors").write_bytes(whole)
    for one, two in zip(read(folder).weights, before, strict=True):
        np.testing.assert_array_equal(one, two)


def edit_index(shards, edit):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_whole_shards_can_be_read(shards, model):
    for one, two in zip(read(shards).weights, model.weights, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "file",
    ["../whole/model.safetensors", "/tmp/model.safetensors", "a\\b", "..", "sub/x", "C:x", "x\0y"],
)
def test_an_index_cannot_leave_its_folder(shards, folder, file):
    edit_index(shards, lambda names: names.update({BIAS: file}))
    refused(shards, "should name files in its own folder, but names ")


def test_indexes_that_do_not_fit(shards):
    first = sorted(shards.glob("model-*"))[0].name
    second = sorted(shards.glob("model-*"))[1].name
    whole = (shards / "model.safetensors.index.json").read_text()
    moved = next(name for name, file in json.loads(whole)["weight_map"].items() if file == first)
    cases = [
        (lambda n: n.update(more=first), f"{first} should hold the tensors .* but lacks more"),
        (lambda n: n.pop(moved), f"{first} should hold .* but also holds {moved}"),
        (lambda n: n.update({moved: second}), f"also holds {moved}|lacks {moved}"),
        (lambda n: n.clear(), "should list the tensors and their files in weight_map"),
        (lambda n: n.update({moved: 3}), "should list the tensors and their files in weight_map"),
    ]
    for edit, message in cases:
        edit_index(shards, edit)
        refused(shards, message)
        (shards / "model.safetensors.index.json").write_text(whole)
    twice = load_file(shards / second) | {moved: load_file(shards / first)[moved]}
    save_file(twice, shards / second)
    refused(shards, f"{second} should hold the tensors .* but also holds {moved}")
    (shards / second).unlink()
    refused(shards, f"index.json lists {second}, which is missing", FileNotFoundError)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 100_000])
def test_broken_json(folder, file, content):
    (folder / file).write_bytes(content)
    refused(folder, f"{file} should (be a JSON file|hold a JSON object)")


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "encoder-decoder"},
        {"model_type": "encoder-decoder", "encoder": [], "decoder": 3},
        {"model_type": ["bert"]},
        {"model_type": "bert-generation", "vocab_size": "many"},
        {"model_type": "roberta", "pad_token_id": "x", "max_position_embeddings": "y"},
        {"model_type": "bert", "hidden_act": ["gelu"]},
        {"model_type": "bert", "pruned_heads": [[]], "position_embedding_type": {}},
    ],
)
def test_strange_values_are_errors_of_values(folder, content):
    (folder / "config.json").write_text(json.dumps(content))
    refused(folder, "config.json|should hold an encoder-decoder")
    if content["model_type"] != "encoder-decoder":
        with pytest.raises(ValueError, match="config.json"):
            bg.BertGenerationEncoder.from_huggingface(folder)


def test_missing_files(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    refused(
        folder,
        "should hold the weights in model.safetensors .* but holds tf_model.h5, vocab",
        FileNotFoundError,
    )
    (folder / "config.json").unlink()
    refused(
        folder, "should be a Hugging Face checkpoint with a file config.json", FileNotFoundError
    )
    refused(tmp_path / "none", "but there is no such folder", FileNotFoundError)


class Unpickled:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_pickles_are_never_unpickled_without_torch(folder, tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "_has_torch", lambda: False)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Unpickled()))
    read(folder)  # safetensors come first
    (folder / "model.safetensors").unlink()
    with pytest.raises(ImportError, match=r'pip install "bertgen_tf\[torch\]", or save the check'):
        read(folder)
    assert not (tmp_path / "unpickled").exists()


def test_torch_is_told_to_load_weights_only(folder, monkeypatch, model):
    """A stand-in for torch, whose own default was another one for years."""

    class Tensor:
        def __init__(self, array):
            self.array = array

        def is_floating_point(self):
            return True

        def float(self):
            return Tensor(self.array.astype(np.float32))

        def numpy(self):
            return self.array

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    calls = []

    def load(path, **kwargs):
        calls.append((path, kwargs))
        return {name: Tensor(tensor) for name, tensor in tensors.items()}

    module = types.ModuleType("torch")
    module.load = load
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setattr(files, "_has_torch", lambda: True)
    for one, two in zip(read(folder).weights, model.weights, strict=True):
        np.testing.assert_array_equal(one, two)
    kwargs = {"map_location": "cpu", "weights_only": True}
    assert calls == [(folder / "pytorch_model.bin", kwargs)]


def test_torch_files(folder, tmp_path, monkeypatch, model):
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    import pickle

    monkeypatch.chdir(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    torch.save(state, folder / "pytorch_model.bin")
    for one, two in zip(read(folder).weights, model.weights, strict=True):
        np.testing.assert_array_equal(one, two)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    torch.save(state, folder / "pytorch_model.bin")
    for one, two in zip(read(folder).weights, model.weights, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-2)
    for content in (pickle.dumps(Unpickled()), b"", b"PK\x03\x04"):
        (folder / "pytorch_model.bin").write_bytes(content)
        refused(folder, "should be a PyTorch file that holds tensors only, but reading it failed")
    torch.save({"x": Unpickled()}, folder / "pytorch_model.bin")
    refused(folder, "should be a PyTorch file that holds tensors only, but reading it failed")
    assert not (tmp_path / "unpickled").exists()
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    torch.save(state, folder / "pytorch_model-00001-of-00001.bin")
    weight_map = dict.fromkeys(state, "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    read(folder)


def test_layout_of_the_first_checkpoints(tmp_path):
    """google/roberta2roberta_*: both names, buffers and the head's copies in pytorch_model.bin."""
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    with zipfile.ZipFile(GOLDEN / "huggingface.zip") as file:
        file.extractall(tmp_path)
    folder = tmp_path / "v4_shared"
    (folder / "spiece.model").write_bytes((tmp_path / "v5_tokenizer/spiece.model").read_bytes())
    golden = np.load(folder / "golden.npz")
    state = {n: torch.tensor(t) for n, t in load_file(folder / "model.safetensors").items()}
    for name in list(state):
        if name.startswith("decoder.bert.") and ".crossattention." not in name:
            state[name.replace("decoder.bert.", "encoder.")] = state[name]
    for stack in ("encoder", "decoder.bert"):
        state[f"{stack}.embeddings.position_ids"] = torch.arange(20)[None]
    state["decoder.lm_head.decoder.weight"] = state[
        "decoder.bert.embeddings.word_embeddings.weight"
    ]
    state["decoder.lm_head.decoder.bias"] = state["decoder.lm_head.bias"]
    torch.save(state, folder / "pytorch_model.bin")
    for name in ("model.safetensors", "generation_config.json"):
        (folder / name).unlink()
    values = json.loads((folder / "config.json").read_text())
    assert values["tie_encoder_decoder"]
    values["decoder"].update(max_length=12, num_beams=3, length_penalty=0.7)
    (folder / "config.json").write_text(json.dumps(values))
    model = read(folder)
    assert model.decoder.sharing == "all"
    assert model.generation_config == bg.GenerationConfig(
        max_length=12, num_beams=3, length_penalty=0.7
    )
    inputs = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    logits = model({name: golden[name] for name in inputs})
    np.testing.assert_allclose(logits, golden["decoder_logits"], rtol=0, atol=1e-4)
    assert isinstance(model.generate("the old man", max_new_tokens=3, jit_compile=False), str)


def test_hub_names(folder, monkeypatch, model):
    """A stand-in for huggingface_hub: what is asked for, and what its errors become."""
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, tuple(allow_patterns)))
        if name != "org/model":
            raise OSError("no connection\nand a long explanation")
        return str(folder)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    for one, two in zip(read("org/model").weights, model.weights, strict=True):
        np.testing.assert_array_equal(one, two)
    assert calls == [("org/model", files.PATTERNS)]
    refused(
        "org/other",
        "^org/other is not a local folder and could not be fetched .* OSError: no connection$",
        FileNotFoundError,
    )
    for name in ("model", "a/b/c", "/org/model", "../model"):
        refused(name, "but there is no such folder", FileNotFoundError)
    refused("https://host/model", "is a TF Hub module: from_hub reads it")
    assert len(calls) == 2
    for name in ("bert-base-uncased", "roberta-large", "gpt2"):
        refused(name, f"/{name} is not a local folder", FileNotFoundError)
    names = ["google-bert/bert-base-uncased", "FacebookAI/roberta-large", "openai-community/gpt2"]
    assert [name for name, _ in calls[2:]] == names
    # A pickle is fetched only where there is nothing else, and torch to read it.
    (folder / "model.safetensors").unlink()
    calls.clear()
    monkeypatch.setattr(files, "_has_torch", lambda: True)
    refused("org/model", "should hold the weights", FileNotFoundError)
    assert calls[1] == ("org/model", (*files.PATTERNS, *files.TORCH_PATTERNS))
    calls.clear()
    monkeypatch.setattr(files, "_has_torch", lambda: False)
    with pytest.raises(ImportError, match=r'org/model has no model.safeten.*"bertgen_tf\[torch\]"'):
        read("org/model")
    assert calls == [("org/model", files.PATTERNS)]


def test_hub_names_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "bertgen_tf\[huggingface\]"'):
        read("org/model")


PROGRAM = """
import sys, bertgen_tf as bg
try:
    print(len(bg.EncoderDecoderModel.from_huggingface(sys.argv[1]).weights))
except FileNotFoundError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_hub_over_http(folder, tmp_path, model):
    """The real huggingface_hub against a server of ours."""
    pytest.importorskip("huggingface_hub", reason="needs the extra huggingface")
    (folder / "secret.bin").write_bytes(b"not asked for")
    commit, asked = "0" * 40, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            names = [path.name for path in folder.iterdir()]
            name = self.path.split("?")[0].split("/")[-1]
            if self.path.startswith("/api/models/org/model"):
                siblings = [{"rfilename": name} for name in names]
                body = json.dumps({"id": "org/model", "sha": commit, "siblings": siblings}).encode()
                if "/tree/" in self.path:
                    body = json.dumps(
                        [
                            {
                                "type": "file",
                                "oid": "1" * 40,
                                "path": name,
                                "size": (folder / name).stat().st_size,
                            }
                            for name in names
                        ]
                    ).encode()
                self.answer(200, body)
            elif self.path.startswith("/org/model/resolve/") and name in names:
                self.answer(200, (folder / name).read_bytes(), name)
            else:
                self.answer(404, b"{}")

        do_HEAD = do_GET

        def answer(self, status, body, etag="none"):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", commit)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
    }
    try:
        for name, answer in (
            ("org/model", str(len(model.weights))),
            ("org/none", "org/none is not a local folder and could not be fetched from the"),
        ):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, name],
                env=environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.stdout.startswith(answer) and done.stdout.count("\n") == 1, done
    finally:
        server.shutdown()
    assert any(path.endswith("/model.safetensors") for path in asked)
    assert not any("secret" in path for path in asked)


def test_what_exists_is_never_asked_for_elsewhere(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(folder.parent.parent)
    assert read(f"{folder.parent.name}/{folder.name}").decoder.sharing == "none"


def test_sizes():
    assert [files.parse_size(size) for size in (7, "7KB", "2 mb", "5GB")] == [
        7,
        7000,
        2_000_000,
        5_000_000_000,
    ]
    for size in (0, True, 1.5, "5", "GB", None):
        with pytest.raises(ValueError, match="max_shard_size must be bytes from 1"):
            files.parse_size(size)


def test_saving_fails_without_a_trace(tmp_path, monkeypatch):
    model = make_deep_model()
    model.save_to_huggingface(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_to_huggingface(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
