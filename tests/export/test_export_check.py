"""An export that does not answer as its model is not kept."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.export import check as export_check
from bertgen_tf.export import files as export_files
from bertgen_tf.export import saved_model
from bertgen_tf.export import signatures as export_signatures
from tests.helpers import make_small_model

OPTIONS = {"num_beams": 2, "max_new_tokens": 5}


@pytest.mark.slow
def test_a_faithful_export_passes(tmp_path):
    """One of int8 passes in test_gpt2.py."""
    model = make_small_model("all", max_source_length=12)
    path = bg.export_saved_model(
        model,
        tmp_path / "name/1",
        signatures={
            "drawn": bg.GenerationConfig(
                do_sample=True, top_k=0, max_new_tokens=4, num_return_sequences=2
            )
        },
        warmup_xla=True,
        max_batch_size=1,
        **OPTIONS,
    )
    assert "drawn_xla" in json.loads((Path(path) / "metadata.json").read_text())["signatures"]


@pytest.fixture(scope="module")
def checked():
    """What to check a model's export with, and what the model says; made once, as it compiles."""
    model = make_small_model("all", max_source_length=12)
    config = bg.GenerationConfig(**OPTIONS)
    drawn = bg.GenerationConfig(do_sample=True, max_new_tokens=4)
    module = export_signatures.ServingModule(model, config, {"drawn": drawn}, ())
    return model, module, list(export_check._cases(model, module, ()))


@pytest.fixture
def check(checked, tmp_path, monkeypatch):
    """Checks an export that answers what the model says, changed."""
    model, module, cases = checked

    def check(change, warmed_up=1):
        answers = [dict(case.outputs) for case in cases]
        for case, answer in zip(cases, answers, strict=True):
            change(case.signature, answer)
        monkeypatch.setattr(export_check, "_cases", lambda *args: cases)
        monkeypatch.setattr(export_check, "_run", lambda *args: (answers, warmed_up))
        export_check.check_export(tmp_path, model, module)

    return check


def cut_scores(signature, answer):
    if signature == "ids":
        answer["score"] = answer["score"][:, :1]


def shift_scores(signature, answer):
    if signature == "beams_xla":
        answer["score"] = answer["score"] + 0.01


def change_text(signature, answer):
    if signature == "serving_default":
        answer["text"] = answer["text"] + "."


def lose_output(signature, answer):
    if signature == "score":
        del answer["num_tokens"]


def transpose_attention(signature, answer):
    if signature == "attention":
        answer["attention"] = answer["attention"][:, ::-1]


@pytest.mark.parametrize(
    "change, message",
    [
        (cut_scores, r"ids, output score: expected float32 \(3, 2\), found float32 \(3, 1\)"),
        (shift_scores, "beams_xla, output score: numbers differ by up to 0.01, allowed 0.001"),
        (change_text, "serving_default, output text: expected"),
        (lose_output, "score, output num_tokens: only the model has it"),
        (transpose_attention, "attention, output attention: numbers differ by up to 0.3"),
    ],
)
def test_every_difference_is_found(check, change, message):
    check(lambda signature, answer: None)
    with pytest.raises(bg.ExportError, match=message):
        check(change)


def test_what_is_drawn_anew_has_only_to_look_alike(check):
    def draw(signature, answer):
        if signature.startswith("drawn"):
            answer["text"] = answer["text"] + "!"
            answer["score"] = answer["score"] - 1

    def cut(signature, answer):
        if signature == "drawn_xla":
            answer["score"] = answer["score"][:0]

    check(draw)
    with pytest.raises(bg.ExportError, match=r"drawn_xla, output score: expected float32 \(1,\)"):
        check(cut)


def test_a_warmup_file_without_requests(check, tmp_path):
    (tmp_path / export_files.WARMUP_FILE).parent.mkdir()
    (tmp_path / export_files.WARMUP_FILE).touch()
    check(lambda signature, answer: None, warmed_up=2)
    with pytest.raises(bg.ExportError, match="the warm-up file holds no requests"):
        check(lambda signature, answer: None, warmed_up=0)


@pytest.mark.parametrize(
    "status, message",
    [
        (-signal.SIGKILL, "was ended by signal 9.*check=False"),
        (1, "failed, and was not kept: no op"),
    ],
)
def test_a_process_that_fails(tmp_path, monkeypatch, status, message):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, status, "", "no op")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(bg.ExportError, match=message):
        export_check._run(tmp_path, [])


@pytest.mark.slow
def test_an_export_that_says_something_else(tmp_path, monkeypatch):
    """The real process, over an export whose text is not the model's."""
    model = make_small_model("all")
    postprocess = export_signatures.hypotheses_to_text

    def shout(preprocessor, sequences):
        return tf.strings.upper(postprocess(preprocessor, sequences))

    monkeypatch.setattr(export_signatures, "hypotheses_to_text", shout)
    with pytest.raises(bg.ExportError, match="serving_default, output text"):
        saved_model.export_saved_model(model, tmp_path / "name/1", max_new_tokens=5)
    assert not (tmp_path / "name").exists()


@pytest.mark.slow
def test_the_program_imports_nothing_of_ours(tmp_path):
    program = Path(export_check._PROGRAM)
    code = f"import runpy; runpy.run_path({str(program)!r}); import bertgen_tf"
    process = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert "import of bertgen_tf halted" in process.stderr
