"""Progress of long runs, on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def show_progress(
    verbose: Any, total: int | None, batch_size: int, done: int = 0, unit: str = "texts"
) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of finished examples, which shows them on stderr.

    A terminal shows one line that changes; elsewhere a new line is written now and then.
    """
    if verbose not in ("auto", 0, 1):
        raise ValueError(f'verbose must be "auto", 0 or 1, received {verbose!r}.')
    terminal = sys.stderr.isatty()
    if verbose == "auto":
        verbose = terminal and (total is None or total > 4 * batch_size)
    if not verbose:
        yield lambda count: None
        return
    first, start = done, time.monotonic()
    shown = start
    of_all = "" if total is None else f" of {total:,}"

    def show() -> None:
        speed = (done - first) / max(time.monotonic() - start, 1e-9)
        text = f"{done:,}{of_all} {unit}, {speed:.1f} a second"
        sys.stderr.write(f"\r{text}" if terminal else f"{text}\n")
        sys.stderr.flush()

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        if terminal or time.monotonic() - shown >= 10:
            show()
            shown = time.monotonic()

    if terminal:
        show()
    try:
        yield advance
    finally:
        if terminal:
            sys.stderr.write("\n")
        else:
            show()


class EmptyOutputs:
    """Counts outputs that are empty, though what they were generated from is not."""

    def __init__(self) -> None:
        self.count = self.total = 0

    def add(self, source: str, output: str | list[str]) -> None:
        """One more output, or the outputs of one text, the best first."""
        best = output if isinstance(output, str) else output[0]
        self.count += bool(source.strip()) and not best.strip()
        self.total += 1

    def report(self, complain: Callable[[str], None]) -> None:
        """Says so, if there are any."""
        if self.count:
            complain(f"{self.count:,} of {self.total:,} outputs are empty")
