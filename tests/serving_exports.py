"""Small exports for tests of the server: signatures like those of a model, quick to write."""

import json
from pathlib import Path

import tensorflow as tf

VOCABULARY = 100


class _Module(tf.Module):
    def __init__(self, marker: str):
        super().__init__()
        # Gone when the export is not kept alive.
        self.marker = tf.Variable(marker)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def serve(self, text):
        marked = self.marker + text
        return {"text": marked, "score": 0.1 * tf.cast(tf.strings.length(text), tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def batch(self, text):
        return {"batch": tf.fill(tf.shape(text), tf.size(text))}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def raw(self, text):
        return {"raw_bytes": text}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def count(self, text):
        return {"count": tf.size(text)}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32, name="input_ids"),
            tf.TensorSpec([None, None], tf.int32, name="attention_mask"),
        ]
    )
    def ids(self, input_ids, attention_mask):
        small = tf.debugging.Assert(
            tf.reduce_all(input_ids < VOCABULARY), [f"ids must lie in [0, {VOCABULARY})"]
        )
        same = tf.debugging.Assert(
            tf.reduce_all(tf.equal(tf.shape(input_ids), tf.shape(attention_mask))),
            ["ids and mask must have one shape"],
        )
        with tf.control_dependencies([small, same]):
            totals = tf.reduce_sum(input_ids * attention_mask, axis=1)
        return {"total": totals, "score": tf.cast(totals, tf.float32) / 3}


def write_export(path: Path, marker: str = "", metadata: dict | None = None) -> Path:
    """Writes the version `path`; `serving_default` puts `marker` in front of texts."""
    module = _Module(marker)
    temporary = path.parent / f".{path.name}"
    tf.saved_model.save(
        module,
        str(temporary),
        signatures={
            "serving_default": module.serve,
            "batch": module.batch,
            "raw": module.raw,
            "count": module.count,
            "ids": module.ids,
        },
    )
    if metadata is not None:
        (temporary / "metadata.json").write_text(json.dumps(metadata))
    temporary.rename(path)
    return path
