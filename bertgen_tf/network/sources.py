"""Readers and writers of model files, as `from_hub` and the like of the models call them.

The models know no file format: what reads one builds models, and stands above them. `bertgen_tf`
connects the readers when it is imported, which comes before every import of a part of it. So a call
goes up, once, and no import does.
"""

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bertgen_tf.checkpoints import hub as hub
    from bertgen_tf.checkpoints import huggingface as huggingface
    from bertgen_tf.checkpoints import presets as presets


def connect(**readers: ModuleType) -> None:
    """Makes `sources.<name>` the module that reads, and writes, files of this kind."""
    globals().update(readers)
