"""`bertgen-tf`, killed as by kill -9 in the step that KILL_AT names, or not at all."""

import os
import signal
import sys

from bertgen_tf.cli import main as cli
from bertgen_tf.finetuning.data import TrainingData

tokens = TrainingData.tokens


def kill(self: TrainingData, step: int) -> int:
    """Each step asks for its tokens once, when it is computed."""
    if step == int(os.environ.get("KILL_AT", -1)):
        os.kill(os.getpid(), int(os.environ.get("KILL_WITH", signal.SIGKILL)))
    return tokens(self, step)


if __name__ == "__main__":
    TrainingData.tokens = kill
    sys.exit(cli.main())
