"""SavedModels for serving: text in, text out."""

from bertgen_tf.export import saved_model
from bertgen_tf.export.saved_model import ExportError, export_saved_model
from bertgen_tf.network import sources

sources.connect(saved_model=saved_model)

__all__ = ["ExportError", "export_saved_model"]
