"""`python -m bertgen_tf`: the command `bertgen-tf`."""

import sys

from bertgen_tf.cli.main import main

sys.exit(main())
