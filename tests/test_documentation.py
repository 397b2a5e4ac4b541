"""What documents and docstrings name exists: modules, functions, commands, flags, programs."""

import argparse
import ast
import configparser
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import bertgen_tf
from bertgen_tf.cli.main import make_parser
from tests.helpers.documents import DOCUMENTS, ROOT, Block, all_blocks, read_blocks
from tests.test_imports import FILES, FLOORS

LANGUAGES = {"", "bash", "json", "python", "sh", "yaml"}
# Programs of others in shell blocks.
PROGRAMS = {"curl", "docker", "pip"}
LINK = re.compile(r"\]\(([^()\s]+)\)")
NAME = re.compile(r"(?<![\w.>/-])(?:bertgen_tf|bg)(?:\.[A-Za-z_]\w*)+")
PATH = re.compile(r"(?<![\w/.-])(?:\./)?((?:tools|tests)/[\w/.*-]*[\w*])")
EXTRAS = re.compile(r"(?:bertgen_tf|path/to/this/repository)\[([\w,]+)\]")


def _names_of_source(path: Path) -> set[str]:
    """What a module defines, without importing it."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                names.add(part.name)
            elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                names.add(part.id)
    return names


def _attribute(value: object, name: str) -> object:
    """Raises an AttributeError if there is none; fields of dataclasses are attributes."""
    if not hasattr(value, name) and dataclasses.is_dataclass(value):
        if name in {field.name for field in dataclasses.fields(value)}:
            return None
    return getattr(value, name)


@functools.cache
def resolves(name: str) -> bool:
    """Whether `bertgen_tf.a.b`, or `bg.a.b`, is a module or an attribute of one."""
    value: object = bertgen_tf
    parts = name.split(".")[1:]
    for i, part in enumerate(parts):
        if isinstance(value, types.ModuleType) and hasattr(value, "__path__"):
            module = f"{value.__name__}.{part}"
            spec = importlib.util.find_spec(module)
            if spec is not None:
                try:
                    value = importlib.import_module(module)
                except ImportError:  # an extra that is not installed
                    return set(parts[i + 1 : i + 2]) <= _names_of_source(Path(spec.origin))
                finally:
                    sys.modules["bertgen_tf"] = bertgen_tf  # export.probe takes it away
                continue
        try:
            value = _attribute(value, part)
        except AttributeError:
            return False
    return True


def wrong_names(text: str) -> list[str]:
    """Names of bertgen_tf in any text that are none."""
    return sorted({name for name in NAME.findall(text) if not resolves(name)})


def wrong_names_of_code(code: str) -> list[str]:
    """The same in Python, where names may be imported first."""
    tree = ast.parse(code)
    known = {"bg": "bertgen_tf", "bertgen_tf": "bertgen_tf"}
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bertgen_tf"):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            wrong += [
                alias.name
                for alias in node.names
                if alias.name.startswith("bertgen_tf.") and not resolves(alias.name)
            ]
    wrong += [name for name in known.values() if not resolves(name)]
    for node in ast.walk(tree):
        chain = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id in known:
            name = ".".join([known[node.id], *chain])
            if not resolves(name):
                wrong.append(name)
    return sorted(set(wrong))


def commands(script: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The commands of a shell script without control structures: (variables, words)."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word.strip("|;&"):
                words.append(word)
                continue
            if words:
                count = next((i for i, w in enumerate(words) if not re.match(r"\w+=", w)), 0)
                yield dict(w.split("=", 1) for w in words[:count]), words[count:]
            words = []


def _extras() -> set[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return set(setup["options.extras_require"])


def wrong_extras(text: str) -> list[str]:
    """Extras that setup.cfg does not have."""
    named = {extra for extras in EXTRAS.findall(text) for extra in extras.split(",")}
    return sorted(named - _extras())


def wrong_paths(text: str) -> list[str]:
    """Files of tools/ and tests/ that the repository does not have; patterns must fit one."""
    return sorted({path for path in PATH.findall(text) if not any(ROOT.glob(path))})


def anchor(heading: str) -> str:
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def wrong_links(text: str, document: Path) -> list[str]:
    """Links of a document into the repository that lead nowhere; of headings, too."""
    wrong = []
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, heading = link.partition("#")
        path = document.parent / name if name else document
        if not path.exists():
            wrong.append(link)
        elif heading:
            content = text if path == document else path.read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", content), re.M)
            if heading not in map(anchor, headings):
                wrong.append(link)
    return wrong


def wrong_command(variables: dict[str, str], words: list[str]) -> str | None:
    """What is wrong with a command."""
    program, *arguments = words
    line = shlex.join(words)
    missing = set(variables.get("EXTRAS", "").split(",")) - _extras() - {""}
    if missing:
        return f"{line}: setup.cfg has no extra {sorted(missing)}"
    if program == "bertgen-tf":
        errors: list[str] = []
        try:
            _quiet_parser(errors).parse_args(arguments)
        except SystemExit as stop:
            if stop.code:
                return f"{line}: {errors}"
        return None
    if program.endswith("python"):
        program = next((word for word in arguments if not word.startswith("-")), "")
    elif program in PROGRAMS:
        return None
    elif not os.access(ROOT / program, os.X_OK):
        return f"{line}: {program} is no program of this repository, nor in PROGRAMS of this test"
    return None if (ROOT / program).is_file() else f"{line}: there is no {program}"


def _quiet_parser(errors: list[str]) -> argparse.ArgumentParser:
    """The parser of bertgen-tf; its messages go to a list."""

    def exit(status=0, message=None):
        errors.append(message or "")
        raise SystemExit(status)

    parsers = [make_parser()]
    for parser in parsers:
        parser.exit = exit
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return parsers[0]


# --------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    "path",
    [
        *DOCUMENTS,
        *sorted((ROOT / "bertgen_tf").rglob("*.py")),
        *sorted((ROOT / "tools").rglob("*.py")),
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_names_exist(path):
    text = path.read_text(encoding="utf-8")
    assert not wrong_names(text), "there is nothing of this name: correct it or what it stood for"
    assert not wrong_extras(text), "setup.cfg has no such extra"
    assert not wrong_paths(text), "there is no such file"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert not wrong_links(path.read_text(encoding="utf-8"), path)


def test_every_document_is_reached_from_the_readme():
    reached, found = set(), {ROOT / "README.md"}
    while found:
        document = found.pop()
        reached.add(document)
        links = LINK.findall(document.read_text(encoding="utf-8"))
        linked = {(document.parent / link.partition("#")[0]).resolve() for link in links}
        found |= (linked & set(DOCUMENTS)) - reached
    assert reached == set(DOCUMENTS)


def test_the_rooms_and_floors_are_those_that_the_tests_check():
    blocks = {b.heading: b.text for b in all_blocks("") if b.document == "bertgen_tf/README.md"}
    floors = [tuple(line.split()) for line in blocks["The floors"].splitlines()]
    assert floors == list(FLOORS)
    folders, rooms = [], set()
    for line in blocks["The rooms of bertgen_tf"].splitlines()[1:]:
        name = line.split()[0]
        folders[(len(line) - len(line.lstrip())) // 2 - 1 :] = [name.removesuffix("/")]
        path = ROOT / "bertgen_tf" / "/".join(folders)
        assert path.is_dir() if name.endswith("/") else path.is_file(), name
        rooms.add(FILES.get(path.stem, "/".join(folders)))
    assert rooms == {room for floor in floors for room in floor}


def test_blocks_are_in_languages_that_are_checked():
    assert {block.language for block in all_blocks()} <= LANGUAGES


@pytest.mark.parametrize("block", all_blocks("python"), ids=str)
def test_python_blocks_parse_and_their_names_exist(block):
    assert not wrong_names_of_code(block.text)


@pytest.mark.parametrize("block", all_blocks("sh", "bash"), ids=str)
def test_shell_blocks_parse_and_their_commands_exist(block):
    process = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert process.returncode == 0 and not process.stderr, process.stderr
    found = list(commands(block.text))
    assert found
    problems = [wrong_command(variables, words) for variables, words in found if words]
    assert not any(problems), "\n".join(filter(None, problems))


def test_json_blocks_parse():
    for block in all_blocks("json"):
        json.loads(block.text)


def test_examples_in_the_help_of_commands_parse():
    parser = make_parser()
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    examples = []
    for command, subparser in subparsers.choices.items():
        text = subparser.format_help().replace("\\\n", " ")
        lines = re.findall(r"^ +(bertgen-tf .*)$", text.partition("example")[2], re.MULTILINE)
        assert lines, f"the help of {command} has no example"
        examples += lines
    problems = [wrong_command(*found) for line in examples for found in commands(line)]
    assert not any(problems), "\n".join(filter(None, problems))


# ------------------------------------------------------------------------------- of these checks


def test_wrong_names_are_found():
    text = (
        "`bertgen_tf.config.GenerationConfig.num_beams` bg.hub.ORIGINALS bg.EncoderDecoderModel.fit"
        " bertgen_tf.serving.http.app bertgen_tf.serving.beam.SavedModelHandler, a/bertgen_tf.txt"
        " bertgen_tf.confg bertgen_tf.config.Generation bg.EncoderDecoderModel.ft bg.beam.Handler"
    )
    assert wrong_names(text) == [
        "bertgen_tf.confg",
        "bertgen_tf.config.Generation",
        "bg.EncoderDecoderModel.ft",
        "bg.beam.Handler",
    ]
    assert wrong_extras("bertgen_tf[plot,plots] path/to/this/repository[rays]") == ["plots", "rays"]


def test_wrong_paths_are_found():
    text = "./tools/test, tools/make_*.py. (tools/nothing.py) tests/golden/n*.zip"
    text += " a/tools/b, my_tests/c"
    assert wrong_paths(text) == ["tests/golden/n*.zip", "tools/nothing.py"]


def test_wrong_links_are_found(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/README.md").write_text("# One `two`, three's\n```\n# Code\n```\n")
    text = (
        "# Here\n[1](b) [2](b/README.md#one-two-threes) [3](#here) [4](https://a.b/c) "
        "[5](c) [6](b/README.md#code) [7](#there) [8](b/../c.md#one)"
    )
    wrong = ["c", "b/README.md#code", "#there", "b/../c.md#one"]
    (tmp_path / "a.md").write_text(text)
    assert wrong_links(text, tmp_path / "a.md") == wrong


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("from bertgen_tf import metrics\nmetrics.compute(x).y", []),
        ("from bertgen_tf import metrics as m\nm.computed()", ["bertgen_tf.metrics.computed"]),
        ("from bertgen_tf.metrics import compte", ["bertgen_tf.metrics.compte"]),
        ("import bertgen_tf.metric", ["bertgen_tf.metric"]),
        ("model.compte()\nbg.warm_strt('A')", ["bertgen_tf.warm_strt"]),
    ],
)
def test_wrong_names_of_code_are_found(code, wrong):
    assert wrong_names_of_code(code) == wrong


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        ("bertgen-tf generate --preset a --input b --num-beams 4  # four", None),
        ("bertgen-tf generate --preset a \\\n  --beams 4", "--beams"),
        ("bertgen-tf generate --preset a --num-beams four", "four"),
        ("bertgen-tf finetune --encoder a --train b --output c --schedule fast", "fast"),
        ("bertgen-tf train", "train"),
        ("./tools/test -k hub | less", "less"),
        ("EXTRAS=dev,fast ./tools/test", "fast"),
        ("./tools/tests", "tests"),
        ("./README.md", "README.md"),
        ("python tools/study/study.py run", None),
        ("python tools/no.py", "no.py"),
        ("docker run a && wget b", "wget"),
    ],
)
def test_wrong_commands_are_found(script, wrong):
    problems = [wrong_command(*found) for found in commands(script)]
    problems = [problem for problem in problems if problem]
    assert len(problems) == (wrong is not None)
    assert all(wrong in problem for problem in problems)


def test_blocks_are_found():
    text = (
        "# A\n```sh\n# no heading\n```\n## B\n```\nout\n```\n```python\na\n```\n```python\nb\n```"
    )
    assert read_blocks(text, "f") == [
        Block("f", "A", 1, "sh", "# no heading\n"),
        Block("f", "B", 1, "", "out\n"),
        Block("f", "B", 1, "python", "a\n"),
        Block("f", "B", 2, "python", "b\n"),
    ]
    with pytest.raises(ValueError, match="does not end"):
        read_blocks("```sh\n``` \n```\n", "f")
