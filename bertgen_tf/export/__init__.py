"""SavedModels for serving: text in, text out."""

from bertgen_tf.export.saved_model import ExportError, export_saved_model

__all__ = ["ExportError", "export_saved_model"]
