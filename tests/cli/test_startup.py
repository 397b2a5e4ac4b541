"""How the command starts: mistakes are known before TensorFlow is, and stderr is ours alone."""

import json
import os
import signal
import subprocess
import sys

import pytest

import bertgen_tf as bg
from bertgen_tf.cli import startup
from bertgen_tf.cli.flags import finetune
from tests.helpers import ROOT

NOTICES = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1796051859.143668    5320 port.cc:153] oneDNN custom operations are on. You may see
W0000 00:00:1796051881.734828    5416 op_kernel.cc:1858] OP_REQUIRES failed at whole_file_read_ops
E0000 00:00:1796052854.679821   12038 util.cc:131] oneDNN supports DT_INT64 only on platforms with
E0000 00:00:1796052854.679821   12038 slow_operation_alarm.cc:73] ********************************
E0000 00:00:1.0 89 text_format.cc:378] Error parsing tensorflow.XlaSerializedCacheEntry: 2
E0000 00:00:1.0 89 cpu_aot_loader.cc:220] Target machine feature +prefer-no-scatter is not
[Compiling module a_inference_step] Very slow compile? If you want to file a bug, run with envvar
********************************
"""
NO_DRIVER = (
    "E0000 00:00:1796051881.521862    5416 cuda_platform.cc:52] failed call to cuInit: INTERNAL: "
    "CUDA error: Failed call to cuInit: UNKNOWN ERROR (303)\n"
)
ERRORS = """\
E0000 00:00:1796051881.521862    5416 cuda_dnn.cc:456] Could not create cudnn handle
E0000 00:00:1796085727.283140    8914 cpu_aot_loader.cc:220] Target machine feature +avx512f is not
F0000 00:00:1796051881.521862    5416 cpu_feature_guard.cc:99] compiled to use AVX instructions
2026-01-01 00:00:00.000000: E tensorflow/core/framework/op.cc:1] op
Traceback (most recent call last):
\xff
"""


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, as `python -c PROGRAM`, or as `python -m bertgen_tf`."""
    start = ["-c", program] if program else ["-m", "bertgen_tf"]
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    given = {name: value for name, value in given.items() if value != "unset"}
    return subprocess.run(
        [sys.executable, *start, *arguments], env=given, capture_output=True, text=True
    )


def test_flags_are_read_without_tensorflow(tmp_path):
    """Also those of a preset that is there, and files that are not."""
    program = """\
import json, sys
sys.argv[0] = "bin/bertgen-tf"
from bertgen_tf.cli.main import main
codes = [main(words) for words in json.loads(sys.argv[1])]
heavy = {"h5py", "keras", "sacrebleu", "safetensors", "tensorflow", "tensorflow_hub"}
print(json.dumps([codes, sorted(heavy & {*sys.modules})]))
"""
    config = {"tokenizer": {"a": 1}, "generation_config": {"num_beams": 4}}
    content = {"format": "bertgen_tf preset", "model": config}
    (tmp_path / "config.json").write_text(json.dumps(content))
    preset = ["--preset", str(tmp_path)]
    right = [["--help"], ["--version"], *([name, "--help"] for name in ("finetune", "serve"))]
    training = ["finetune", "--train", "no.tsv", "--output", "new", *preset]
    wrong = [
        ["finetune", "--epochs", "2", "--trian=x"],
        training,
        [*training, "--monitor", "bleu"],
        ["generate", "--preset", "no"],
        ["generate", *preset, "--early-stopping", "never", "--num-beams", "1"],
        ["generate", *preset, "--input", "no.txt"],
        ["evaluate", *preset, "--references", "no.tsv", "--split", "test"],
        ["export", *preset, "--output", "new"],
        ["convert", "no", str(tmp_path / "config.json" / "new")],
        ["serve", "models", "--port", "x"],
        ["serve", "models"],
        ["generate", "--engine", "ray", "--export", "no/1", "--input", "*.txt", "--output", "new"],
    ]
    process = run(program, json.dumps([*right, *wrong]))
    codes, heavy = json.loads(process.stdout.splitlines()[-1])
    assert codes == [0] * len(right) + [2] * len(wrong) and heavy == []
    errors = process.stderr.splitlines()
    assert len(errors) == len(wrong) and all(e.startswith("bertgen-tf: error: ") for e in errors)
    assert errors[0] == (
        "bertgen-tf: error: the following arguments are required: --train or --data, --output, "
        "--encoder or --preset or --recipe; unrecognized arguments: --trian (see bertgen-tf "
        "finetune --help)"
    )
    assert errors[1] == "bertgen-tf: error: no.tsv: No such file or directory"
    assert "--monitor needs --validation" in errors[2]
    assert "early_stopping applies to beam search" in errors[4]


def test_the_module_is_the_command():
    """`python -m bertgen_tf`, without TensorFlow: with it, this would find Keras's own error."""
    process = run("", "--version", KERAS_BACKEND="nonsense")
    assert (process.returncode, process.stdout) == (0, f"bertgen-tf {bg.__version__}\n")
    assert process.stderr == ""


def test_the_names_of_recipes_are_those_of_the_library():
    assert finetune.RECIPES == tuple(bg.RECIPES)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_notices_are_no_errors(has_gpu, monkeypatch, capfdbinary, tmp_path):
    (tmp_path / "in").write_bytes((NOTICES + NO_DRIVER + ERRORS).encode("latin-1"))
    monkeypatch.setattr(startup, "_GPUS", [str(tmp_path / ("in" if has_gpu else "none"))])
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with open(tmp_path / "in") as file:
        monkeypatch.setattr(sys, "stdin", file)
        startup.pass_on()
    shown = (NO_DRIVER if has_gpu else "") + ERRORS
    assert capfdbinary.readouterr().err == shown.encode("latin-1")


def test_the_last_words_of_a_crash_are_shown():
    """Python's lines, too; a log level of the user shows everything."""
    program = f"""\
import os, sys
from bertgen_tf.cli import startup
with startup.quiet(print):
    os.write(2, {NOTICES.encode()!r})
    print("mine", file=sys.stderr)
    os.write(2, b"F0000 last words")
    os.abort()
"""
    program = f'import sys\nsys.argv[0] = "bertgen-tf"\n{program}'
    process = run(program, TF_CPP_MIN_LOG_LEVEL="unset")
    assert process.returncode == -signal.SIGABRT
    assert sorted(process.stderr.splitlines()) == ["F0000 last words", "mine"]
    process = run(program, TF_CPP_MIN_LOG_LEVEL="0")
    assert process.stderr == f"{NOTICES}mine\nF0000 last words"


def test_warnings_of_the_package_are_lines(monkeypatch):
    import warnings

    shown = []
    with startup.quiet(shown.append):
        warnings.showwarning("of others", UserWarning, "/usr/lib/other.py", 3)
        warnings.showwarning("ours", UserWarning, startup.__file__, 3)
    assert shown == ["ours"]


@pytest.mark.slow
def test_a_whole_run_writes_nothing_of_tensorflow(preset, tmp_path):
    """With XLA; the errors of TensorFlow that reach us are exceptions, and shown."""
    (tmp_path / "in.txt").write_text("the old man sang\n\n")
    flags = ["--preset", preset, "--input", str(tmp_path / "in.txt")]
    process = run("", "generate", *flags, TF_CPP_MIN_LOG_LEVEL="unset")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.count("\n") == 2


@pytest.mark.slow
def test_keras_finds_the_classes_of_a_library_that_was_only_imported():
    program = """\
import sys
import bertgen_tf
assert "tensorflow_hub" not in sys.modules and "tf_keras" not in sys.modules
import keras
found = keras.saving.get_registered_object("bertgen_tf>EncoderDecoderModel")
assert found is bertgen_tf.EncoderDecoderModel
assert {*dir(bertgen_tf)} - {"finetuning", "metrics"} <= {*vars(bertgen_tf)}
"""
    process = run(program)
    assert process.returncode == 0, process.stderr
