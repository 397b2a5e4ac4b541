"""`python -m bertgen_tf`: the command `bertgen-tf`."""

import sys

from bertgen_tf.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
