"""An export that does not answer as its model is not kept."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from conftest import make_model

import bertgen_tf as bg
from bertgen_tf import export, export_check, export_files, export_signatures

OPTIONS = {"num_beams": 2, "max_new_tokens": 5}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_faithful_export_passes(tmp_path, precision):
    model = make_model("all", max_source_length=12)
    if precision == "int8":
        model.quantize("int8")
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


def fake_answers(monkeypatch, change):
    """Lets the process of the check answer what the model says, changed."""

    def run(folder, cases):
        answers = [dict(case.outputs) for case in cases]
        for case, answer in zip(cases, answers, strict=True):
            change(case.signature, answer)
        return answers, 1

    monkeypatch.setattr(export_check, "_run", run)


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
        (shift_scores, r"beams_xla, output score: expected \[\["),
        (change_text, "serving_default, output text: expected"),
        (lose_output, "score, output num_tokens: only the model has it"),
        (transpose_attention, "attention, output attention: expected"),
    ],
)
def test_every_difference_is_found(tmp_path, monkeypatch, model, change, message):
    fake_answers(monkeypatch, change)
    with pytest.raises(bg.ExportError, match=message):
        bg.export_saved_model(model, tmp_path / "name/1", **OPTIONS)
    assert list((tmp_path / "name").iterdir()) == []


def test_what_is_drawn_anew_has_only_to_look_alike(tmp_path, monkeypatch, model):
    def draw(signature, answer):
        if signature in ("score", "ids"):
            return
        answer["text"] = answer["text"] + "!"
        answer["score"] = answer["score"] - 1

    fake_answers(monkeypatch, draw)
    options = {"do_sample": True, "max_new_tokens": 5}
    bg.export_saved_model(model, tmp_path / "name/1", **options)
    with pytest.raises(bg.ExportError, match="output text"):  # with a seed nothing is drawn anew
        bg.export_saved_model(model, tmp_path / "name/2", seed=3, **options)


def test_a_warmup_file_without_requests(tmp_path, monkeypatch, model):
    fake_answers(monkeypatch, lambda signature, answer: None)
    write = export_files.write_warmup

    def write_none(folder, *args, **kwargs):
        write(folder, *args, **kwargs)
        (folder / export_files.WARMUP_FILE).write_bytes(b"")

    monkeypatch.setattr(export_files, "write_warmup", write_none)
    run = export_check._run
    monkeypatch.setattr(export_check, "_run", lambda *args: (run(*args)[0], 0))
    with pytest.raises(bg.ExportError, match="the warm-up file holds no requests"):
        bg.export_saved_model(model, tmp_path / "name/1", **OPTIONS)


@pytest.mark.parametrize(
    "status, message",
    [
        (-signal.SIGKILL, "was ended by signal 9.*check=False"),
        (1, "failed, and was not kept: no op"),
    ],
)
def test_a_process_that_fails(tmp_path, monkeypatch, model, status, message):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, status, "", "no op")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(bg.ExportError, match=message):
        bg.export_saved_model(model, tmp_path / "name/1", **OPTIONS)
    assert list((tmp_path / "name").iterdir()) == []


@pytest.mark.slow
def test_an_export_that_says_something_else(tmp_path, monkeypatch, model):
    """The real process, over an export whose text is not the model's."""
    postprocess = export_signatures.hypotheses_to_text

    def shout(preprocessor, sequences):
        return tf.strings.upper(postprocess(preprocessor, sequences))

    monkeypatch.setattr(export_signatures, "hypotheses_to_text", shout)
    with pytest.raises(bg.ExportError, match="serving_default, output text"):
        export.export_saved_model(model, tmp_path / "name/1", max_new_tokens=5)
    assert list((tmp_path / "name").iterdir()) == []


def test_the_program_imports_nothing_of_ours(tmp_path):
    program = Path(export_check._PROGRAM)
    code = f"import runpy; runpy.run_path({str(program)!r}); import bertgen_tf"
    process = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert "import of bertgen_tf halted" in process.stderr
