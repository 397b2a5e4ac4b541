"""TF Hub modules of tiny BERTs."""

import pytest
import tensorflow_hub

from tests.helpers.hub import MINILM, MODULES, TINY, make_module, shared


@pytest.fixture(scope="session")
def module_of(tmp_path_factory):
    """name -> folder of a module, made when first asked for."""
    made: dict[str, str] = {}

    def get(name: str) -> str:
        if name in ("tiny", "minilm"):
            return str(shared({"tiny": TINY, "minilm": MINILM}[name]))
        if name not in made:
            made[name] = make_module(tmp_path_factory.mktemp(name), **MODULES[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def loaded_of(module_of):
    """name -> the module itself, loaded by tensorflow_hub."""
    loaded = {}

    def get(name: str):
        if name not in loaded:
            loaded[name] = tensorflow_hub.load(module_of(name))
        return loaded[name]

    return get
