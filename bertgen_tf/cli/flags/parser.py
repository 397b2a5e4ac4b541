"""The parser of the command and of each of its commands."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from bertgen_tf.cli.flags.errors import PROGRAM


class Parser(argparse.ArgumentParser):
    """One-line errors, no abbreviated options, descriptions as they are written.

    Attributes:
        alternatives: flags of which one is needed, or several, which groups of argparse cannot say.
    """

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.alternatives: list[tuple[str, ...]] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Names all missing flags at once, where argparse would name them group by group."""
        words = [word.partition("=")[0] for word in (sys.argv[1:] if args is None else args)]
        missing = [flags for flags in self._needed() if set(flags).isdisjoint(words)]
        if missing and set(words).isdisjoint(("-h", "--help")):
            names = ", ".join(" or ".join(flags) for flags in missing)
            message = f"the following arguments are required: {names}"
            # Perhaps one of them, misspelt.
            unknown = [w for w in words if w[:2] == "--" and w not in self._option_string_actions]
            if unknown:
                message += f"; unrecognized arguments: {' '.join(unknown)}"
            self.error(message)
        return super().parse_known_args(args, namespace)

    def _needed(self) -> Iterator[Sequence[str]]:
        """Flags, each with those that may be given instead."""
        for group in self._mutually_exclusive_groups:
            if group.required:
                yield [action.option_strings[0] for action in group._group_actions]
        for action in self._actions:
            if action.required and action.option_strings:
                yield action.option_strings
        yield from self.alternatives

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")
