"""Modules that are not BERTs, or differ from our encoder: one clear error each."""

import shutil
from pathlib import Path

import make_hub_module as maker
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_hub

import bertgen_tf as bg
from tests.helpers import PIECES, SHARED, write_checkpoint
from tests.helpers.hub import arrays, check_block, check_error, make_module, shared

# verify


def replace_attention(factor):
    class Encoder(maker.BertEncoder):
        """A module whose variables fit and whose graph is another one."""

        def _attention(self, *args):
            return factor * super()._attention(*args)

    return Encoder


def test_a_graph_that_is_not_berts_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "BertEncoder", replace_attention(1.01))
    module = make_module(tmp_path, num_hidden_layers=1)
    for load in (
        bg.BertGenerationEncoder.from_hub,
        bg.BertGenerationDecoder.from_hub,
        lambda handle: bg.EncoderDecoderModel.from_hub(encoder=handle),
    ):
        with pytest.raises(ValueError, match="differs by 0.0.*its graph is not that of a BERT"):
            load(module)
    encoder = bg.BertGenerationEncoder.from_hub(module, verify=False)
    check_block(encoder.blocks[0], arrays(tensorflow_hub.load(module)), 0)


def test_two_epsilons_are_noticed(tmp_path, monkeypatch):
    class Encoder(maker.BertEncoder):
        def _norm(self, x, name):
            epsilon = 0.01 if name == "embeddings/layer_norm" else 0.02
            self._config = {**self._config, "layer_norm_eps": epsilon}
            return super()._norm(x, name)

    monkeypatch.setattr(maker, "BertEncoder", Encoder)
    module = make_module(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"one epsilon .* has \['gelu'\] and \[0.00999.*, 0.0199"):
        bg.BertGenerationEncoder.from_hub(module)


class Wrapped:
    """A loaded module that answers differently."""

    def __init__(self, loaded, answer):
        self.variables = loaded.variables
        self.vocab_file, self.do_lower_case = loaded.vocab_file, loaded.do_lower_case
        self.loaded, self.answer = loaded, answer

    def __call__(self, inputs, training):
        return self.answer(self.loaded(inputs, training=training))


def old_interface(_):
    raise ValueError("Could not find matching concrete function to call.\nGot: a dict\n")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda output: {"sequence_output": output["sequence_output"] + np.nan}, "differs by nan"),
        (lambda output: {"sequence_output": output["sequence_output"][:, :1]}, "differs by inf"),
        (lambda output: {"sequence_output": output["sequence_output"] + 2e-4}, "differs by 0.0002"),
        (lambda output: {"hidden": output["sequence_output"]}, "failed: KeyError: 'sequence_ou"),
        (old_interface, "input_type_ids and give sequence_output, but .* Could not find matching"),
    ],
)
def test_verify_takes_no_other_answer(answer, message, module_of, loaded_of, monkeypatch):
    wrapped = Wrapped(loaded_of("gelu"), answer)
    monkeypatch.setattr(tensorflow_hub, "load", lambda path: wrapped)
    check_error(module_of("gelu"), ValueError, message)
    bg.BertGenerationEncoder.from_hub(module_of("gelu"), verify=False)


def test_verify_reads_padding_and_every_layer(module_of, loaded_of, monkeypatch):
    """A module without a mask differs from our encoder, whatever layers are kept."""
    loaded = loaded_of("gelu")
    wrapped = Wrapped(loaded, None)
    wrapped.__class__ = type(
        "Unmasked",
        (Wrapped,),
        {
            "__call__": lambda self, inputs, training: loaded(
                {**inputs, "input_mask": tf.ones_like(inputs["input_mask"])}, training=training
            )
        },
    )
    monkeypatch.setattr(tensorflow_hub, "load", lambda path: wrapped)
    check_error(module_of("gelu"), ValueError, "differs by", num_layers=1)


def save(folder: Path, variables: dict[str, tuple[int, ...]], called: bool = True) -> Path:
    """A SavedModel that has these variables and, if `called`, takes a text encoder's inputs."""

    class Root(tf.train.Checkpoint):
        pass

    root = Root()
    root.variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in variables.items()]
    if called:
        spec = {
            name: tf.TensorSpec([None, None], tf.int32, name)
            for name in ("input_word_ids", "input_mask", "input_type_ids")
        }
        root.__call__ = tf.function(
            lambda inputs, training: {"sequence_output": tf.cast(inputs["input_mask"], tf.float32)}
        )
        for training in (False, True):
            root.__call__.get_concrete_function(spec, training)
    tf.saved_model.save(root, str(folder))
    return folder


def test_a_missing_folder(tmp_path):
    check_error(tmp_path / "absent", FileNotFoundError, "folder of a TF Hub module or a URL")
    (tmp_path / "file").write_text("text")
    check_error(tmp_path / "file", FileNotFoundError, "there is no such folder")
    with pytest.raises(FileNotFoundError, match="absent should be"):
        bg.EncoderDecoderModel.from_hub(encoder=str(tmp_path / "absent"))


def test_a_folder_without_a_saved_model(tmp_path):
    check_error(tmp_path, ValueError, "a file saved_model.pb, but holds nothing")
    write_checkpoint(tmp_path / "hf")
    check_error(
        tmp_path / "hf", ValueError, "is a Hugging Face checkpoint: from_huggingface reads it"
    )


def test_some_other_saved_model(tmp_path):
    module = tf.Module()
    module.weight = tf.Variable(1.0)
    tf.saved_model.save(module, str(tmp_path / "plain"))
    check_error(
        tmp_path / "plain",
        ValueError,
        "should be a BERT encoder in TF2 SavedModel format",
        "has no word_embeddings/embeddings, position_embedding/embeddings",
        r"Found 0 variables\. ",
    )
    folder = save(tmp_path / "conv", {f"conv_{i}/kernel": (3, 3) for i in range(9)})
    check_error(folder, ValueError, "Found 9 variables: conv_0/kernel, .*conv_5/kernel, [.][.][.]")


ALBERT = {
    "word_embeddings/embeddings": (11, 4),
    "position_embedding/embeddings": (8, 4),
    "type_embeddings/embeddings": (2, 4),
    "embeddings/layer_norm/gamma": (4,),
    "embeddings/layer_norm/beta": (4,),
    "embedding_projection/kernel": (4, 6),
    "embedding_projection/bias": (6,),
    "transformer/self_attention/query/kernel": (6, 2, 3),
    "transformer/self_attention/query/bias": (2, 3),
    "transformer/intermediate/kernel": (6, 7),
    "transformer/output/kernel": (7, 6),
}


MOBILEBERT = {
    "mobile_bert_encoder/mobile_bert_embedding/word_embedding/embeddings": (11, 4),
    "mobile_bert_encoder/mobile_bert_embedding/type_embedding/embeddings": (2, 6),
    "mobile_bert_encoder/transformer_layer_0/bottleneck_input/dense/kernel": (6, 4),
    "mobile_bert_encoder/transformer_layer_0/bottleneck_input/norm/scale": (4,),
    "mobile_bert_encoder/transformer_layer_0/attention/query/kernel": (4, 2, 2),
    "mobile_bert_encoder/transformer_layer_0/ffn_layer_0/intermediate_dense/kernel": (4, 7),
}


def test_relatives_of_bert(tmp_path):
    check_error(
        save(tmp_path / "albert", ALBERT),
        ValueError,
        "has no transformer/layer_0/self_attention/query/kernel",
        "Found 11 variables: .*MobileBERT, ALBERT and preprocessing modules are not BERT",
    )
    check_error(
        save(tmp_path / "mobilebert", MOBILEBERT),
        ValueError,
        "Found 6 variables: mobile_bert_encoder/.*bottleneck_input",
    )


def test_modules_of_other_formats():
    check_error(
        shared(SHARED / "hub/tf2_bert_minilm_preprocess"), ValueError, r"Found 0 variables\."
    )


def test_more_or_fewer_variables_than_berts(module_of, loaded_of, monkeypatch):
    """All that is odd is told, and nothing is guessed or left out silently."""
    wrapped = Wrapped(loaded_of("gelu"), lambda output: output)
    kept = [v for v in wrapped.variables if "layer_2/output/" not in v.name]
    adapter = tf.Variable(tf.zeros([2]), name="transformer/layer_1/adapter/kernel")
    wrapped.variables = [*kept, adapter]
    monkeypatch.setattr(tensorflow_hub, "load", lambda path: wrapped)
    with pytest.raises(ValueError) as caught:
        bg.BertGenerationEncoder.from_hub(module_of("gelu"))
    message = str(caught.value)
    assert message.startswith(f"{module_of('gelu')} does not fit the model: ")
    assert "no rule for 1 names (transformer/layer_1/adapter/kernel)" in message
    assert "nothing found for 2 names (layer_2/feed_forward/output_dense/kernel" in message

    twice = tf.Variable(tf.zeros([12]), name="embeddings/layer_norm/beta")
    wrapped.variables = [*loaded_of("gelu").variables, twice]
    check_error(module_of("gelu"), ValueError, "has several of embeddings/layer_norm/beta")


def test_a_module_that_does_not_tell_its_vocabulary(module_of, loaded_of, monkeypatch):
    wrapped = Wrapped(loaded_of("gelu"), None)
    del wrapped.do_lower_case
    monkeypatch.setattr(tensorflow_hub, "load", lambda path: wrapped)
    check_error(module_of("gelu"), ValueError, "vocabulary .vocab_file. and casing .do_lower_case")


# Damaged files

DATA = "variables/variables.data-00000-of-00001"


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (DATA, lambda path: cut(path, 0.5)),
        (DATA, lambda path: cut(path, 0)),
        (DATA, flip),
        (DATA, Path.unlink),
        ("variables/variables.index", Path.unlink),
        ("variables/variables.index", lambda path: cut(path, 0.6)),
        ("saved_model.pb", lambda path: cut(path, 0)),
        ("saved_model.pb", lambda path: cut(path, 0.5)),
        ("saved_model.pb", lambda path: cut(path, 0.9999)),
        ("saved_model.pb", lambda path: path.write_text("<html>not found</html>")),
    ],
)
def test_damaged_files(name, damage, module_of, tmp_path):
    folder = shutil.copytree(module_of("gelu"), tmp_path / "module")
    damage(folder / name)
    check_error(
        folder, ValueError, "should be a TF Hub module with a SavedModel and its variables, but lo"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "not found"),
        (lambda path: path.write_text("\n".join(PIECES[:4])), "must contain every special token; "),
        (lambda path: path.write_bytes(b"[PAD]\n\xff"), "must be a UTF-8 text file"),
    ],
)
def test_a_damaged_vocabulary(damage, message, module_of, tmp_path):
    folder = shutil.copytree(module_of("gelu"), tmp_path / "module")
    damage(folder / "assets/vocab.txt")
    check_error(folder, ValueError, f"should hold BERT's vocabulary, but reading it .*{message}")
