"""`bertgen-tf generate` for a test that kills it: a run for each line of standard input.

A line is the JSON list of the arguments. Each run is a child of this process, which has imported
everything and done nothing else. Standard output has two lines for a run: the id of its process,
and what `os.waitpid` tells when that has ended, an exit code or the negative number of a signal.
"""

import json
import os
import sys
import time
import traceback

from bertgen_tf.cli import generate
from bertgen_tf.cli import main as cli
from bertgen_tf.data import resumable

WINDOW = 256  # lines that are written together: more than what is buffered
PAUSE = 0.05  # seconds before and after they are put on disk, when a kill is to meet them
sync = resumable.sync


def slow_sync(file) -> None:
    time.sleep(PAUSE)
    sync(file)
    time.sleep(PAUSE)


def main() -> None:
    for line in sys.stdin:
        process = os.fork()
        if not process:
            generate.WINDOW, resumable.sync = WINDOW, slow_sync
            code = 1
            try:
                code = cli.main(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
