"""Type checkers see the public API: `py.typed`, and annotations that fit how it is used."""

from importlib.util import find_spec

import pytest

import bertgen_tf as bg
from tests.helpers import ROOT

USE = """\
from pathlib import Path

import bertgen_tf as bg
from bertgen_tf import finetuning, metrics
from bertgen_tf.serving.client import Client


class Mine(bg.EncoderDecoderModel):
    pass


config = bg.BertGenerationConfig(vocab_size=9, hidden_size=4, num_attention_heads=2)
encoder = bg.BertGenerationEncoder.from_hub("module", num_layers=[0, 2])
decoder = bg.BertGenerationDecoder.from_huggingface(Path("bert"), cross_attention="random")
model = bg.EncoderDecoderModel(encoder, decoder, bg.BertTokenizer("vocab.txt"))
model = bg.EncoderDecoderModel.from_hub(encoder=Path("module"), share=True)
mine: Mine = Mine.from_preset(Path("preset"))
mine = Mine.from_huggingface("org/name")
mine = Mine.from_hub("https://tfhub.dev/google/bertseq2seq/roberta24_bbc/1")
model = bg.warm_start("BERT2BERT", encoder="bert")
report: bg.WarmStartReport = bg.warm_start_report(model)
model.compile(bg.default_optimizer(1e-4, warmup_steps=10), bg.default_loss(0.1))
model.fit(["a"], ["b"], batch_size=2, epochs=3, callbacks=[bg.GradualUnfreezing(steps_per_layer=5)])
settings = bg.GenerationConfig(num_beams=4, max_new_tokens=20).replace(length_penalty=0.8)
outputs = model.generate(["a"], settings, output_scores=True, do_sample=False)
for part in model.stream("a", jit_compile=False):
    part.upper()
for text in model.iterate(open("texts"), settings, window=10):
    print(text)
model.quantize("int8")
model.save_to_preset(Path("preset"))
path: str = bg.export_saved_model(model, Path("model/1"), signatures={"brief": settings})
assert model.preprocessor is not None  # there is a tokenizer
data = finetuning.TrainingData([("a", "b")], model.preprocessor, 8)
logs: dict[str, list[float]] = finetuning.train(model, data, steps=10)
bleu: float = metrics.compute(["bleu"], ["a"], ["b"], ["c"])["bleu"].value
with Client("localhost:8500", "my_model") as client:
    client.generate(["a"])
"""
WRONG = [
    "bg.BertGenerationConfig(hidden=4)",
    "bg.EncoderDecoderModel.from_preset(4)",
    "bg.freeze(encoder_layers=4)",
    "bg.BertTokenizer('vocab.txt', lower=True)",
    "bg.warm_start_report('BERT2BERT')",
    "for part in bg.EncoderDecoderModel.from_preset('x').stream(['a']): part.upper()",
    "bg.EncoderDecoderModel.from_preset('x').generate('a', batch_size='b')",
]


@pytest.mark.slow
def test_the_public_api_is_typed(tmp_path):
    """Of the errors that mypy finds, those in programs; in the package it finds some."""
    api = pytest.importorskip("mypy.api", reason="needs the extra dev")
    wrong = "import bertgen_tf as bg\n" + "".join(f"{line}\n" for line in WRONG)
    for name, program in (("use.py", USE), ("wrong.py", wrong)):
        (tmp_path / name).write_text(program)
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {ROOT}\nignore_missing_imports = True\nfollow_imports = silent\n"
        # Without types of their own, and large.
        "[mypy-tensorflow.*,keras.*,tensorflow_text.*,google.*,transformers.*,torch.*,ray.*]\n"
        "follow_imports = skip\n"
    )
    files = [str(tmp_path / name) for name in ("use.py", "wrong.py")]
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    out, err, _ = api.run([*options, *files])
    assert not err, err
    errors = [line for line in out.splitlines() if ": error: " in line]
    assert [line for line in errors if "use.py" in line] == []
    found = [int(line.split(":")[1]) - 2 for line in errors if "wrong.py" in line]
    assert found == [*range(len(WRONG))], errors


def test_the_package_says_that_it_is_typed():
    folder = find_spec("bertgen_tf").submodule_search_locations[0]
    assert (ROOT / "bertgen_tf/py.typed").is_file() and folder == str(ROOT / "bertgen_tf")


def test_dir_has_the_public_names():
    assert set(dir(bg)) == {*bg.__all__, "finetuning", "metrics", "__doc__", "__version__"}
    assert all(hasattr(bg, name) for name in dir(bg))
