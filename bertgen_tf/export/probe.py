"""A program that runs an export as a server would: `python -P probe.py FOLDER < requests`.

Standard input is a JSON list of `{"signature": ..., "inputs": {NAME: {"dtype": ..., "values":
...}}}`, strings in base64. Standard output ends with a line of JSON: for each request `{NAME:
{"dtype": ..., "shape": ..., "values": ...}}`, values in one flat list, and then the number of
warm-up requests that were run. Nothing here imports bertgen_tf, which must not be needed.
"""

import base64
import json
import os
import sys

sys.modules["bertgen_tf"] = None  # importing it fails

import tensorflow as tf  # noqa: E402
import tensorflow_text  # noqa: E402, F401 (registers the tokenizer's operations)


def _run(signatures, request):
    inputs = {
        name: tf.constant(
            [base64.b64decode(value) for value in tensor["values"]]
            if tensor["dtype"] == "string"
            else tensor["values"],
            tensor["dtype"],
        )
        for name, tensor in request["inputs"].items()
    }
    return {
        name: {
            "dtype": tensor.dtype.name,
            "shape": tensor.shape.as_list(),
            "values": [
                base64.b64encode(value).decode() if isinstance(value, bytes) else value
                for value in tensor.numpy().reshape([-1]).tolist()
            ],
        }
        for name, tensor in signatures[request["signature"]](**inputs).items()
    }


def _run_warmup(signatures, path):
    from tensorflow_serving.apis import prediction_log_pb2

    count = 0
    for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
        log = prediction_log_pb2.PredictionLog.FromString(record)
        request = log.predict_log.request
        inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        signatures[request.model_spec.signature_name](
            **{name: tf.constant(value) for name, value in inputs.items()}
        )
        count += 1
    return count


if __name__ == "__main__":
    folder = sys.argv[1]
    loaded = tf.saved_model.load(folder)  # the signatures read its variables
    results = [_run(loaded.signatures, request) for request in json.load(sys.stdin)]
    warmup = os.path.join(folder, "assets.extra", "tf_serving_warmup_requests")
    count = _run_warmup(loaded.signatures, warmup) if os.path.exists(warmup) else 0
    print(json.dumps([results, count]))
