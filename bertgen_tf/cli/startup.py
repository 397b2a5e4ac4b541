"""Loads TensorFlow for a command, and keeps what it tells of itself from stderr.

TensorFlow's libraries write to the process's stderr, some of it before any setting of logs holds,
and call harmless things errors. So a process of its own reads that, and passes on what is none of
these: real errors, and the last words of a process that crashes. Run as a program, this file is
that process. Python's `sys.stderr` is not read by it.
"""

import contextlib
import glob
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
# Lines such as I0000 00:00:1796051859.143668    5320 port.cc:153] oneDNN custom operations are on.
_PLACE = rb"\d{4} \d\d:\d\d:[\d.]+ +\d+ "
_NOTICES = (
    rb"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR$",
    rb"[IW]" + _PLACE,
    # Called errors, but nothing is wrong: other code is used instead, or compiling takes its time.
    rb"E" + _PLACE + rb"util\.cc:\d+\] oneDNN supports ",
    rb"E" + _PLACE + rb"slow_operation_alarm\.cc:",
    # Of a program in XLA's cache: its key is no text, and two of its features are preferences.
    rb"E" + _PLACE + rb"text_format\.cc:\d+\] Error parsing .*XlaSerializedCacheEntry: ",
    rb"E" + _PLACE + rb"cpu_aot_loader\.cc:\d+\] .*machine feature \+prefer-no-(gather|scatter) ",
    rb"\*{32}$|\[Compiling module ",
)
# The same where there is no GPU; where there is one, its driver should be there.
_NO_DRIVER = rb"E" + _PLACE + rb"\w+\.cc:\d+\] failed call to cuInit: "
_GPUS = ("/dev/nvidia[0-9]*", "/dev/dxg")


@contextlib.contextmanager
def quiet(complain: Callable[[str], None]) -> Iterator[None]:
    """Keeps what is for programmers from stderr, unless the log level of the user asks for it.

    Args:
        complain: called with what the package itself warns of.
    """

    def show(message: Any, category: type, filename: str, *others: Any) -> None:
        if Path(filename).is_relative_to(PACKAGE):
            complain(str(message))

    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        if not sys.warnoptions:
            warnings.showwarning = show
        for logger in ("tensorflow", "absl"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        # Too late for what is loaded, as in a program that calls the command.
        if "tensorflow" not in sys.modules:
            os.environ["KERAS_BACKEND"] = "tensorflow"
            if os.environ.setdefault(LOG_LEVEL, "2") not in ("0", "1"):
                stack.enter_context(_without_notices())
        yield


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    earlier = sys.stderr
    reader = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, stderr=stderr
    )
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    sys.stderr = open(stderr, "w", 1, earlier.encoding, earlier.errors)
    try:
        yield
    finally:
        os.dup2(stderr, 2)  # so the reader comes to the end
        sys.stderr.close()
        sys.stderr = earlier
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that we started lives on
            reader.wait(1)


def pass_on() -> None:
    """Copies stdin to stderr without notices."""
    # What the user ends is the process that writes: its last words are still to be read.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    notices = _NOTICES if any(map(glob.glob, _GPUS)) else (*_NOTICES, _NO_DRIVER)
    notice = re.compile(b"|".join(notices))
    for line in sys.stdin.buffer:
        if not notice.match(line):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()


if __name__ == "__main__":
    pass_on()
