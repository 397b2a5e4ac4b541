"""The wheel, installed into an environment of its own: whole, and enough to run."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import bertgen_tf as bg
from tests.helpers import ROOT

SOURCES = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
# Each start of TensorFlow takes seconds: one program answers all questions.
PROGRAM = """
import asyncio, contextlib, importlib, io, json, pkgutil, runpy, sys

import bertgen_tf

failures = {}
for found in pkgutil.walk_packages(bertgen_tf.__path__, "bertgen_tf."):
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        cause = error.__cause__ or error
        failures[found.name] = [str(error), (cause.name or "").partition(".")[0]]
    sys.modules["bertgen_tf"] = bertgen_tf  # export.probe takes it away

try:
    from bertgen_tf.serving.http.app import ServingApp
    page = asyncio.run(ServingApp._page(None, None)).body.decode()
except ImportError:  # told in failures
    page = None

script, versions = sys.argv[1], []
for start in (
    lambda: runpy.run_path(script, run_name="__main__"),
    lambda: runpy.run_module("bertgen_tf", run_name="__main__"),  # python -m
):
    sys.argv = [script, "--version"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            start()
    except SystemExit as stop:
        versions.append([stop.code, output.getvalue()])

answers = {
    "places": sorted({module.__file__ for name, module in sys.modules.items()
                      if name.partition(".")[0] == "bertgen_tf" and module}),
    "failures": failures, "page": page, "versions": versions, "path": sys.path,
}
print(json.dumps(answers))
"""


def _files():
    """Modules and data of the package in the repository, relative to it, without its documents."""
    paths = [path for path in (ROOT / "bertgen_tf").rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT) for path in paths if path.suffix not in (".pyc", ".md")}
    return {name.as_posix() for name in names if not any(p.startswith(".") for p in name.parts)}


def _run(*command, cwd):
    """What a program that does not see the repository prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def _pip(*words):
    return sys.executable, "-m", "pip", "--disable-pip-version-check", *words, "--no-index"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as building leaves folders beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT / "bertgen_tf", source / "bertgen_tf", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    (source / "saved_models").mkdir()  # a second top-level folder, as in the repository
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    _run(*_pip(*build), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_has_every_module_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    left_out, extra = sorted(_files() - names), sorted(names - _files())
    assert not left_out, f"setup.cfg leaves {left_out} out of the wheel (packages, package_data)"
    assert not extra, f"setup.cfg puts {extra} into the wheel"


@pytest.mark.slow
def test_wheel_runs_from_an_environment_of_its_own(wheel, tmp_path):
    venv = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin/python"
    _run(*_pip("--python", python, "install", "--no-deps", wheel), cwd=tmp_path)
    installed = _run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    ).strip()
    # Dependencies are those of this environment. Its own .pth files are not read from there: they
    # would bring the repository back.
    paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    Path(installed, "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))

    # -I: neither the current folder nor PYTHONPATH.
    printed = _run(python, "-I", "-c", PROGRAM, venv / "bin/bertgen-tf", cwd=tmp_path)
    answers = json.loads(printed.splitlines()[-1])
    assert all(Path(place).is_relative_to(installed) for place in answers["places"])
    assert str(ROOT) not in answers["path"]
    for module, (message, missing) in answers["failures"].items():
        # What is not installed here is not there either.
        known = missing and missing not in ("bertgen_tf", "tests", "tools")
        assert known and importlib.util.find_spec(missing) is None, f"{module}: {message}"
    assert answers["versions"] == [[0, f"bertgen-tf {bg.__version__}\n"]] * 2
    assert wheel.name.startswith(f"bertgen_tf-{bg.__version__}-")
    if "bertgen_tf.serving.http.app" not in answers["failures"]:
        (page,) = (ROOT / "bertgen_tf").rglob("playground.html")
        assert answers["page"] == page.read_text(encoding="utf-8")
