"""Modules in TF1 Hub format that are damaged: one clear error each, and nothing half loaded."""

import shutil
from pathlib import Path

import keras
import make_tf1_module as maker
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import bertgen_tf as bg
from tests.helpers import PIECES

DATA = "variables/variables.data-00000-of-00001"
INDEX = "variables/variables.index"
SETTINGS = {"num_layers": 1}
LOADING = "should be a TF Hub module with a SavedModel and its variables, but loading it failed"
KINDS = ("encoder", "shared", "unshared")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, spiece):
    """kind -> folder of a module that is sound."""
    root = tmp_path_factory.mktemp("whole")
    maker.make_encoder(root / "encoder", PIECES, **SETTINGS)
    maker.make_shared_original(root / "shared", spiece, decode_length=4, **SETTINGS)
    maker.make_unshared_original(root / "unshared", PIECES, decode_length=4, **SETTINGS)
    return {kind: root / kind for kind in KINDS}


def load(kind: str, folder: Path, **options):
    form = bg.BertGenerationEncoder if kind == "encoder" else bg.EncoderDecoderModel
    return form.from_hub(str(folder), **options)


@pytest.fixture
def damaged(whole, tmp_path, monkeypatch):
    """Checks that a module is refused once it is damaged, before anything is assigned."""
    assigned = []
    monkeypatch.setattr(keras.Variable, "assign", lambda self, value: assigned.append(self.path))

    def check(kind, damage, message, **options):
        folder = shutil.copytree(whole[kind], tmp_path / kind)
        damage(folder)
        with pytest.raises(ValueError, match=message) as caught:
            load(kind, folder, **options)
        text = str(caught.value)
        assert text.startswith(str(folder)) and "\n" not in text and len(text) < 1500
        # Two stacks are filled one after the other, the decoder last; nobody gets the model.
        assert not [path for path in assigned if kind != "unshared" or "decoder" in path]

    return check


def write_checkpoint(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Replaces the variables of a module, in one data file or several."""
    shutil.rmtree(folder / "variables")
    parts = [str(folder / f"parts/{i}") for i in range(shards)]
    names = sorted(tensors)
    for i, part in enumerate(parts):
        own = names[i::shards]
        tf.raw_ops.SaveV2(
            prefix=part,
            tensor_names=own,
            shape_and_slices=[""] * len(own),
            tensors=[tf.constant(tensors[name]) for name in own],
        )
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=parts, destination_prefix=str(folder / "variables/variables")
    )


def change(ending: str, new):
    """A damage: gives one variable another value, or takes it away."""

    def damage(folder: Path) -> None:
        tensors = maker.read_weights(folder)
        (name,) = (name for name in tensors if name.endswith(ending))
        value = new(tensors.pop(name))
        write_checkpoint(folder, tensors if value is None else {**tensors, name: value})

    return damage


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[array.size // 2] = np.nan
    return array


def cut(name: str, keep: float):
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return damage


def flip(folder: Path) -> None:
    content = bytearray((folder / DATA).read_bytes())
    content[len(content) // 2] ^= 255
    (folder / DATA).write_bytes(content)


@pytest.mark.slow
def test_the_tools_of_these_tests_break_nothing(whole, tmp_path):
    folder = shutil.copytree(whole["shared"], tmp_path / "module")
    change("encoder/layer_0/output/dense/bias", lambda array: array)(folder)
    expected = load("shared", whole["shared"], verify=False)
    for ours, theirs in zip(load("shared", folder).weights, expected.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_several_data_files(kind, whole, tmp_path):
    folder = shutil.copytree(whole[kind], tmp_path / "module")
    write_checkpoint(folder, maker.read_weights(folder), shards=3)
    assert len(list(folder.glob("variables/variables.data-*-of-00003"))) == 3
    expected = load(kind, whole[kind], verify=False)
    for ours, theirs in zip(load(kind, folder).weights, expected.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (folder / "variables/variables.data-00001-of-00003").unlink()
    with pytest.raises(ValueError, match=LOADING):
        load(kind, folder)


@pytest.mark.slow
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        ("encoder", "encoder/layer_0/intermediate/dense/kernel"),
        ("shared", "encoder/layer_0/attention/encdec/value/kernel"),
        ("unshared", "decoder/layer_0/output/LayerNorm/gamma"),
        ("unshared", "bert/embeddings/word_embeddings"),
    ],
)
def test_weights_that_are_no_numbers(kind, ending, verify, damaged):
    damaged(
        kind,
        change(ending, with_nan),
        f"does not fit the model: [^;]*{ending} holds NaN or infinity[.]$",
        verify=verify,
    )


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        ("encoder", "bert/pooler/dense/bias"),
        ("encoder", "encoder/layer_0/output/dense/bias"),
        ("shared", "encoder/layer_0/attention/encdec/query/bias"),
        ("shared", "bert/embeddings/word_embeddings"),
        ("unshared", "decoder/layer_0/intermediate/dense/kernel"),
        ("unshared", "bert/embeddings/position_embeddings"),
    ],
)
def test_weights_of_another_shape_or_none(kind, ending, verify, damaged, tmp_path):
    rule = "should have the variables of its graph in its checkpoint, but has"
    message = rf"{rule} [^ ]*{ending} of shape \(\d+,[^)]*\) instead of \(\d+,[^)]*\)\.$"
    damaged(kind, change(ending, lambda array: array[:-1]), message, verify=verify)
    shutil.rmtree(tmp_path / kind)
    damaged(kind, change(ending, lambda array: None), f"{rule} no [^ ]*{ending}[.]$", verify=verify)


def test_all_that_is_odd_is_told_at_once(damaged):
    def damage(folder: Path) -> None:
        tensors = maker.read_weights(folder)
        write_checkpoint(folder, {n: a for n, a in tensors.items() if "/self/" not in n})

    damaged("shared", damage, "but has no module/bert/.*, no module/bert/.*/value/bias[.]$")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "shared"])
@pytest.mark.parametrize(
    "damage",
    [
        cut(DATA, 0.5),
        cut(DATA, 0),
        flip,
        lambda folder: (folder / DATA).unlink(),
        lambda folder: (folder / INDEX).unlink(),
        cut(INDEX, 0.6),
    ],
    ids=["half", "empty", "flipped", "no data", "no index", "half an index"],
)
def test_truncated_variables(kind, damage, verify, damaged):
    damaged(kind, damage, LOADING, verify=verify)


@pytest.mark.parametrize("kind", ["encoder", "shared"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.9999])
def test_a_truncated_graph(kind, keep, damaged):
    damaged(kind, cut("saved_model.pb", keep), LOADING)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "unshared"])
def test_a_vocabulary_that_is_not_there(kind, verify, damaged, tmp_path):
    def damage(folder: Path) -> None:
        (asset,) = (folder / "assets").iterdir()
        asset.unlink()

    damaged(kind, damage, f"({LOADING}|vocabulary, but reading it failed): ", verify=verify)


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_damaged_sentencepiece_model(keep, damaged):
    def damage(folder: Path) -> None:
        model = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
        found = 0
        for meta_graph in model.meta_graphs:
            graph = meta_graph.graph_def
            for node in (*graph.node, *(n for f in graph.library.function for n in f.node_def)):
                if node.op == "SentencepieceOp":
                    proto = node.attr["model"].s
                    node.attr["model"].s = proto[: int(keep * len(proto))]
                    found += 1
        assert found
        (folder / "saved_model.pb").write_bytes(model.SerializeToString())

    damaged("shared", damage, "[Ss]entence|vocabulary|loading it failed")
