"""The flags of `bertgen-tf serve`."""

import argparse
import os
import re
from typing import Any

from bertgen_tf.cli.flags import values
from bertgen_tf.cli.flags.errors import UserError

_DESCRIPTION = """\
Serves exports on this machine, without Docker: TensorFlow Serving's REST API, with requests batched
together, and a page in the browser to try the models. Ctrl-C, SIGTERM or SIGHUP ends it, once all
that it accepted is answered."""
_EPILOG = """\
FOLDER holds the exports, NAME/VERSION, such as saved_models. It can also be one model, NAME, or one
export, NAME/VERSION. The highest version of each model is served. Versions and models added later
are loaded while the others answer; the log says what is not served, and why. Programs that XLA
compiles answer as soon as they are ready, the plain graph until then; they are kept in the user's
cache (XDG_CACHE_HOME, or ~/.cache).

paths:
  /                                 the page
  /v1/models                        all models
  /v1/models/NAME[/versions/V]      state; with /metadata: signatures; with :predict: answers
  /healthz, /readyz                 200 if it is alive; if every model is loaded; neither while a
                                    batch takes more than four times --request-timeout
  /monitoring/prometheus/metrics    for Prometheus

example:
  bertgen-tf serve saved_models
  curl http://localhost:8501/v1/models/my_model:predict -d '{"inputs": {"text": ["a text"]}}'"""


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "serve",
        help="serve exports on this machine",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="see below. SavedModels are programs, which can read and write files: only those that "
        "you trust",
    )
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="load exports without comparing their files with the checksums in metadata.json, "
        "which takes about a second for each gigabyte; by default those that differ are not served",
    )
    parser.add_argument(
        "--no-xla",
        dest="xla",
        action="store_false",
        help="answer by plain graphs, which are slower and need less memory; what is asked for by "
        "the name of a compiled signature is compiled then, and all others wait",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, for this machine only; 0.0.0.0 for "
        "everybody who can reach it: there is no password)",
    )
    where.add_argument(
        "--port", type=_port, default=8501, metavar="N", help="0 for a free one (default: 8501)"
    )
    where.add_argument(
        "--allowed-hosts",
        type=_names,
        metavar="NAME,...",
        help="names by which clients may call the server, * for all (default: on this machine "
        "localhost, 127.0.0.1 and ::1, else all)",
    )
    where.add_argument(
        "--cors-origin",
        dest="cors_origins",
        action="append",
        type=_site,
        metavar="SITE",
        help="a site whose pages may use the server, such as https://example.org, * for all; may "
        "be given several times (default: none but its own)",
    )
    times = parser.add_argument_group("times, in seconds")
    for flag, default, text in (
        ("--poll-seconds", 2.0, "between checks for new versions"),
        ("--load-timeout", 600.0, "until a load, with its warm-up requests, is given up"),
        (
            "--request-timeout",
            30.0,
            "until a request is given up, with status 504; what would "
            "probably take longer gets 503 at once, what would take a third of it alone 413",
        ),
        (
            "--batch-seconds",
            1.0,
            "that a batch should take: long requests run in several, and "
            "let others go first after each",
        ),
        ("--shutdown-timeout", 30.0, "to answer what was accepted before it ends"),
    ):
        times.add_argument(
            flag,
            type=values.positive_number,
            default=default,
            metavar="X",
            help=f"{text} (default: {default:g})",
        )
    limits = parser.add_argument_group("limits")
    for flag, default, text in (
        (
            "--max-body-bytes",
            4 * 2**20,
            "of a request; more gets status 413, and 16 times as much "
            "of all that are being received 503",
        ),
        ("--max-texts", 1024, "of a request; more gets 413"),
        ("--max-text-bytes", 2**16, "of a text; more gets 413"),
        ("--max-queued-texts", 4096, "waiting for their turn; more gets 503"),
        ("--max-connections", 512, "open at a time; more gets 503"),
    ):
        limits.add_argument(
            flag,
            type=values.at_least(1),
            default=default,
            metavar="N",
            help=f"{text} (default: {default:,})",
        )


def check(arguments: argparse.Namespace) -> None:
    """Finds what is wrong with the folder, at once.

    Raises:
        UserError: what the user can fix.
    """
    if not os.path.isdir(arguments.folder):
        raise UserError(f"{arguments.folder} is not a folder: expected NAME/VERSION of exports")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names with commas between, received {text!r}")
    return names


def _site(text: str) -> str:
    if not re.fullmatch(r"\*|https?://[^/\s]+", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(
            f"expected a site without a path, such as https://example.org, received {text!r}"
        )
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected an integer of at most 65535, received {text!r}")
    return int(text)
