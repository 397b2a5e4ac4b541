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


_TEXT = tf.TensorSpec([None], tf.string, "text")


class _Upper(tf.Module):
    """The interface of an export without its model: upper case, and how many bytes there are."""

    def __init__(self):
        super().__init__()
        self.sign = tf.Variable(-1.0)

    def count(self, text):
        return self.sign * tf.cast(tf.strings.length(text), tf.float32)

    @tf.function(input_signature=[_TEXT])
    def best(self, text):
        valid = tf.strings.unicode_transcode(text, "UTF-8", "UTF-8")
        return {"text": tf.strings.upper(valid, "utf-8"), "score": self.count(text)}

    @tf.function(input_signature=[_TEXT])
    def beams(self, text):
        best = self.best(text)
        texts = best["text"][:, tf.newaxis] + [[" 0", " 1", " 2"]]
        return {"text": texts, "score": best["score"][:, tf.newaxis] - [[0.0, 0.5, 1.0]]}

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.string, n) for n in ("source", "target")]
    )
    def score(self, source, target):
        scores = 10 * self.count(source) + self.count(target)
        return {"log_probability": scores, "num_tokens": tf.strings.length(target)}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32, n) for n in ("input_ids", "attention_mask")
        ]
    )
    def ids(self, input_ids, attention_mask):
        return {"sequences": (input_ids * attention_mask)[:, tf.newaxis]}


def write_upper_export(path: Path) -> Path:
    """Writes the version `path`, which answers in upper case, with the signatures of a model."""
    upper = _Upper()
    names = {"serving_default": "best", "beams": "beams", "generate_xla": "best"}
    names |= {"score": "score", "ids": "ids"}
    signatures = {name: getattr(upper, method) for name, method in names.items()}
    tf.saved_model.save(upper, str(path), signatures=signatures)
    return path
