"""Readers and writers of model files, as `from_hub`, `export` and the like call them.

The models know no file format: readers build models, so they stand above them. One reader knows
nothing of the others, either: `handles` says what they read. The rooms of these modules connect
them when they are imported: by `bertgen_tf`, which comes before any import of its parts, or by a
command. So one call goes up, and no import does.
"""

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bertgen_tf.checkpoints import exports as exports
    from bertgen_tf.checkpoints import handles as handles
    from bertgen_tf.checkpoints import hub as hub
    from bertgen_tf.checkpoints import huggingface as huggingface
    from bertgen_tf.checkpoints import presets as presets
    from bertgen_tf.export import saved_model as saved_model


def connect(**modules: ModuleType) -> None:
    """Makes `sources.<name>` the module that reads or writes files of this kind."""
    globals().update(modules)
