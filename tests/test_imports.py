"""Which module of bertgen_tf may import which: read off the syntax trees, nothing is imported.

An exception that is no longer needed is a failure, too.
"""

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

# From the ground up. A room imports rooms of lower floors and itself.
FLOORS = (
    ("config", "checks", "tokenizers", "metrics"),
    ("data", "network"),
    ("generation", "generation/search", "training"),
    ("models",),
    ("checkpoints", "checkpoints/hub", "checkpoints/huggingface", "export", "finetuning"),
    ("bertgen_tf",),  # __init__.py, the public names
    ("serving", "serving/http"),
    ("cli/flags",),
    ("cli",),
)
# Arrows inside a floor.
BESIDE = {
    ("config", "checks"),
    ("tokenizers", "checks"),
    ("metrics", "checks"),
    ("generation", "generation/search"),
    ("checkpoints", "checkpoints/hub"),
    ("checkpoints", "checkpoints/huggingface"),
    ("export", "checkpoints"),
    ("serving/http", "serving"),
}
# The search knows no model and no text; flags are read before TensorFlow is imported: of the floors
# below they see nothing else.
ONLY = {
    "generation/search": {"checks"},
    "cli/flags": {"checks", "config", "data", "metrics"},
}

# A module is in the room of its folder; these files of bertgen_tf/ itself are rooms.
FILES = {"__init__": "bertgen_tf", "__main__": "cli", "checks": "checks", "config": "config"}

IN_FUNCTIONS = {
    ("cli.evaluate", "metrics.plot"),  # matplotlib is an extra
    ("cli.serve", "serving.http.server"),  # so are uvicorn and starlette
}

# Third-party packages that any module may import.
ANYWHERE = {"google", "keras", "numpy", "sentencepiece", "tensorflow", "tensorflow_text"}
# All others have one home, the first; the further ones are exceptions.
HOMES = {
    "apache_beam": ["serving.beam"],
    "datasets": ["data.data_presets"],
    "grpc": ["serving.transport"],
    "h11": ["serving.http.server"],
    "h5py": ["checkpoints.presets"],
    "huggingface_hub": ["checkpoints.huggingface.files"],
    "matplotlib": ["metrics.plot"],
    "prometheus_client": ["serving.http.app"],
    "pyarrow": ["serving.ray_files"],
    "ray": ["serving.ray_files"],
    "safetensors": ["checkpoints.huggingface.files", "training.tensor_files"],
    "starlette": ["serving.http.app", "serving.http.origins"],
    "tensorboard": ["finetuning.callbacks"],
    "tensorflow_hub": ["checkpoints.hub.fetch"],
    # The probe imports nothing of bertgen_tf.
    "tensorflow_serving": ["serving.transport", "export.files", "export.probe"],
    "torch": ["checkpoints.huggingface.comparison", "checkpoints.huggingface.files"],
    "transformers": ["checkpoints.huggingface.comparison"],
    "urllib3": ["serving.transport"],
    "uvicorn": ["serving.http.server"],
}


@dataclasses.dataclass(frozen=True)
class Arrow:
    """An import. Modules of bertgen_tf have their name inside it, with dots; it is __init__."""

    module: str
    target: str
    in_function: bool


class Package:
    """The modules of a package folder, and their imports."""

    def __init__(self, folder: Path):
        self.name = folder.name
        self.files: dict[str, Path] = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if len(parts) > 1 and parts[-1] == "__init__":
                parts = parts[:-1]
            self.files[".".join(parts)] = path.relative_to(folder)
        self.own: set[Arrow] = set()
        self.others: set[Arrow] = set()  # targets are top-level names
        for module, path in self.files.items():
            tree = ast.parse((folder / path).read_text(encoding="utf-8"))
            for name, in_function in self._imports(tree, path, False):
                if name.partition(".")[0] == self.name:
                    arrow = Arrow(module, self._module(name), in_function)
                    self.own.add(arrow)
                else:
                    self.others.add(Arrow(module, name.partition(".")[0], in_function))

    def room(self, module: str) -> str | None:
        """Of a module; None if it is in no room."""
        path = self.files[module]
        if len(path.parts) == 1:
            return FILES.get(path.stem)
        rooms = {room for floor in FLOORS for room in floor}
        folders = [parent.as_posix() for parent in path.parents]
        return next((folder for folder in folders if folder in rooms), None)

    def _module(self, name: str) -> str:
        """The module that `bertgen_tf.a.b` is, or is a name of."""
        parts = name.split(".")[1:]
        while parts and ".".join(parts) not in self.files:
            parts.pop()
        return ".".join(parts) or "__init__"

    def _imports(self, node: ast.AST, path: Path, in_function: bool) -> Iterator[tuple[str, bool]]:
        """Full names. What is imported for type checkers only is none."""
        if isinstance(node, ast.If) and "TYPE_CHECKING" in (
            getattr(node.test, "id", None),
            getattr(node.test, "attr", None),
        ):
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        in_function = in_function or isinstance(node, functions)
        if isinstance(node, ast.Import):
            yield from ((alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                folders = [self.name, *path.parent.parts]
                base = folders[: len(folders) + 1 - node.level] + base
            yield from ((".".join([*base, alias.name]), in_function) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "id", getattr(node.func, "attr", None))
            name = getattr(node.args[0], "value", None)
            if called in ("import_module", "__import__") and isinstance(name, str):
                yield name, in_function
        for child in children:
            yield from self._imports(child, path, in_function)


def broken_floors(package: Package) -> dict[tuple[str, str], str]:
    """What is wrong with each arrow that breaks a rule of the floors."""
    floors = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    problems = {}
    for arrow in package.own:
        room, target = package.room(arrow.module), package.room(arrow.target)
        if room is None or target is None or room == target:
            continue
        allowed = floors[target] < floors[room] or (room, target) in BESIDE
        why = f"{room} may import lower floors only, and {target} is not on one"
        if room in ONLY:
            allowed = target in ONLY[room]
            why = f"{room} may import {sorted(ONLY[room])} only"
        if not allowed:
            problems[arrow.module, arrow.target] = why
    return problems


def imports_in_functions(package: Package) -> set[tuple[str, str]]:
    """(module, imported module)."""
    return {(arrow.module, arrow.target) for arrow in package.own if arrow.in_function}


def _gone(exceptions: set, found: set, name: str) -> list[str]:
    return [
        f"{module} -> {target} is no longer there: remove it from {name}"
        for module, target in sorted(exceptions - found)
    ]


def _report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(ROOT / "bertgen_tf")


def test_every_module_is_in_one_room(package):
    _report(
        [
            f"{package.files[module]} is in no room: put it into the folder of one"
            for module in package.files
            if package.room(module) is None
        ]
    )


def test_rooms_import_lower_floors_only(package):
    found = sorted(broken_floors(package).items())
    _report([f"{module} -> {target}: {why}" for (module, target), why in found])


def test_functions_import_nothing_of_the_package(package):
    found = imports_in_functions(package)
    problems = [
        f"{module} -> {target}: bertgen_tf is imported at the top of a module, not in functions, "
        "which would hide circles"
        for module, target in sorted(found - IN_FUNCTIONS)
    ]
    _report(problems + _gone(IN_FUNCTIONS, found, "IN_FUNCTIONS"))


def test_third_party_packages_have_one_home(package):
    found = {
        (arrow.module, arrow.target)
        for arrow in package.others
        if arrow.target not in sys.stdlib_module_names | ANYWHERE
    }
    known = {(module, name) for name, modules in HOMES.items() for module in modules}
    problems = [
        f"{module} -> {name}: "
        + (
            f"{name} is imported by {HOMES[name][0]} only"
            if name in HOMES
            else f"{name} is neither in HOMES nor ANYWHERE"
        )
        for module, name in sorted(found - known)
    ]
    _report(problems + _gone(known, found, "HOMES"))


def test_neither_tools_nor_tests_are_imported(package):
    outside = {"tools", "tests"}
    for folder in ("tools", "tests"):
        outside |= {path.stem for path in (ROOT / folder).rglob("*.py")}
    _report(
        [
            f"{arrow.module} -> {arrow.target}: bertgen_tf imports neither tools nor tests"
            for arrow in sorted(package.others, key=str)
            if arrow.target in outside
        ]
    )


# ------------------------------------------------------------------------------- of these rules


def _package(tmp_path, files) -> Package:
    for name, text in files.items():
        path = tmp_path / "bertgen_tf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Package(tmp_path / "bertgen_tf")


def test_modules_in_folders_are_in_the_room_of_their_folder(tmp_path):
    package = _package(
        tmp_path,
        {
            "checks.py": "",
            "models/encoder_decoder.py": "",
            "models/__init__.py": "",
            "checkpoints/presets.py": "",
            "checkpoints/hub/__init__.py": "",
            "checkpoints/hub/search.py": "",
            "generation/search/logits.py": "",
            "utils/strings.py": "",
            "strings.py": "",
        },
    )
    rooms = {module: package.room(module) for module in package.files}
    assert rooms == {
        "checks": "checks",
        "models": "models",
        "models.encoder_decoder": "models",
        "checkpoints.presets": "checkpoints",
        "checkpoints.hub": "checkpoints/hub",
        "checkpoints.hub.search": "checkpoints/hub",
        "generation.search.logits": "generation/search",
        "utils.strings": None,
        "strings": None,
    }


@pytest.mark.parametrize(
    ("module", "statement", "target"),
    [
        ("network/layers.py", "from bertgen_tf.models import encoder_decoder", "models"),
        ("network/layers.py", "from bertgen_tf.models.encoder_decoder import A", "models"),
        ("network/layers.py", "import bertgen_tf.models.encoder_decoder", "models"),
        ("network/layers.py", "from ..models import encoder_decoder", "models"),
        ("network/layers.py", "from ..models.encoder_decoder import A", "models"),
        ("network/layers.py", "try:\n    from bertgen_tf.data import texts\nexcept E: ...", "data"),
        (
            "training/lora.py",
            "from bertgen_tf.generation.search import logits",
            "generation/search",
        ),
        ("generation/search/noise.py", "from bertgen_tf.network import layers", "network"),
        ("generation/search/noise.py", "from bertgen_tf import config", "config"),
        ("generation/search/noise.py", "from bertgen_tf.generation import inputs", "generation"),
        ("checkpoints/hub/text.py", "from bertgen_tf.checkpoints import presets", "checkpoints"),
        ("network/layers.py", "from bertgen_tf import EncoderDecoderModel", "bertgen_tf"),
        ("network/layers.py", "def f():\n    from bertgen_tf.models import encoder_decoder", None),
        ("network/layers.py", "importlib.import_module('bertgen_tf.models')", None),
    ],
)
def test_arrows_up_are_found(tmp_path, module, statement, target):
    files = {
        "__init__.py": "",
        "config.py": "",
        "models/__init__.py": "",
        "models/encoder_decoder.py": "",
        "network/layers.py": "",
        "generation/inputs.py": "",
        "generation/search/logits.py": "",
        "checkpoints/presets.py": "",
        "data/texts.py": "",
    }
    package = _package(tmp_path, {**files, module: statement})
    ((arrow, why),) = broken_floors(package).items()
    assert package.room(arrow[1]) == (target or "models")
    assert package.room(arrow[0]) in why


@pytest.mark.parametrize(
    "statement",
    [
        "if TYPE_CHECKING:\n    from bertgen_tf.models import encoder_decoder",
        "if typing.TYPE_CHECKING:\n    from bertgen_tf.models import encoder_decoder",
        "from bertgen_tf import config",
        "from .. import config",
        "from . import weights",
        "from bertgen_tf.network.weights import Rule",
        "import bertgen_tf.network.weights",
        '"""from bertgen_tf.models import encoder_decoder"""',
    ],
)
def test_arrows_down_and_types_are_none(tmp_path, statement):
    files = {"config.py": "", "models/encoder_decoder.py": "", "network/weights.py": ""}
    package = _package(tmp_path, {**files, "network/layers.py": statement})
    assert not broken_floors(package) and not imports_in_functions(package)


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    from bertgen_tf import config",
        "async def f():\n    import bertgen_tf.config",
        "class C:\n    def f(self):\n        if self:\n            from bertgen_tf.config import X",
        "def f():\n    return importlib.import_module('bertgen_tf.config')",
        "f = lambda: __import__('bertgen_tf.config')",
        "def f():\n    from ..config import X",
    ],
)
def test_imports_in_functions_are_found(tmp_path, text):
    package = _package(tmp_path, {"config.py": "", "network/layers.py": text})
    assert imports_in_functions(package) == {("network.layers", "config")}
