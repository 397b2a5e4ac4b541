"""`bertgen-tf serve`: what it needs; the server is `bertgen_tf.serving.http.server`."""

import argparse
from collections.abc import Callable
from typing import Any

from bertgen_tf.cli.flags.errors import user_errors

_PACKAGES = ("h11", "prometheus_client", "starlette", "uvicorn")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    options = vars(arguments).copy()
    del options["command"]
    with user_errors():
        serve = _find_serve()
    serve(**options)


def _find_serve() -> Callable[..., Any]:
    """`bertgen_tf.serving.http.server.serve`.

    Raises:
        ImportError: a package is not installed.
    """
    try:
        from bertgen_tf.serving.http.server import serve
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise ImportError(
            f"serve needs the package {error.name}: pip install 'bertgen_tf[serving]'"
        ) from error
    return serve
