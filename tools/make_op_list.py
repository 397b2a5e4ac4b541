"""Writes tests/tensorflow_text_2_20_ops.json: ops as an older TensorFlow Serving knows them.

For maintainers: tools/test_older_tensorflow runs it in an environment that holds the versions of
the server; tests/serving/test_c_api.py holds exports to the list. It has every op of
tensorflow-text, and those of TensorFlow that are in the list already or named on the command line:

    python tools/make_op_list.py NewOp OtherNewOp

An op is `{"inputs": {NAME: TYPE}, "outputs": {NAME: TYPE}, "attrs": {NAME: TYPE}}`.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import op_def_pb2
from tensorflow.python.client import pywrap_tf_session

FILE = pathlib.Path(__file__).parent.parent / "tests/tensorflow_text_2_20_ops.json"


def registered_ops() -> dict[str, op_def_pb2.OpDef]:
    """Every op that TensorFlow knows now, by name."""
    buffer = pywrap_tf_session.TF_GetAllOpList()
    ops = op_def_pb2.OpList.FromString(pywrap_tf_session.TF_GetBuffer(buffer))
    return {op.name: op for op in ops.op}


def describe(op: op_def_pb2.OpDef) -> dict[str, dict[str, str]]:
    """What a node of this op may have, as in the list."""

    def tensors(arguments: Any) -> dict[str, str]:
        return {argument.name: _type(argument) for argument in arguments}

    return {
        "inputs": tensors(op.input_arg),
        "outputs": tensors(op.output_arg),
        "attrs": {attr.name: attr.type for attr in op.attr},
    }


def _type(argument: op_def_pb2.OpDef.ArgDef) -> str:
    one = argument.type_list_attr or argument.type_attr or tf.as_dtype(argument.type).name
    return f"{argument.number_attr} * {one}" if argument.number_attr else one


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="an op of TensorFlow to add")
    wanted = set(parser.parse_args().ops)
    if FILE.exists():
        wanted |= set(json.loads(FILE.read_text())["ops"])

    core = registered_ops()
    import tensorflow_text  # registers its ops

    every = registered_ops()
    text_ops = set(every) - set(core)
    if unknown := sorted(wanted - set(every)):
        sys.exit(f"error: TensorFlow {tf.__version__} does not know {', '.join(unknown)}")
    lines = [
        f'  "{name}": {json.dumps(describe(every[name]))}' for name in sorted(wanted | text_ops)
    ]
    FILE.write_text(
        f'{{"tensorflow": "{tf.__version__}", "tensorflow_text": "{tensorflow_text.__version__}", '
        '"ops": {\n' + ",\n".join(lines) + "\n}}\n"
    )


if __name__ == "__main__":
    main()
