"""A checkpoint as onnxruntime-genai reads it, by its own model builder.

Fields of the spec: model (a folder of the released layout, with a tokenizer), out, kind (see `KINDS`).
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import side

# -> precision and options of the builder. accuracy_level 4 multiplies bytes, which is its fast way. With int4 the head
# gets 8 bits, as ours, which it shares with the embedding by rtn alone; with int8 the embedding stays in float32.
HEAD = ("algo_config=rtn", "matmul_mixed_precision=last_matmul:int8")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp32": ("fp32", ()),
    "int8": ("int8", ("block_size=32", "accuracy_level=4")),
    "int4": ("int4", ("block_size=32", "accuracy_level=4", *HEAD)),
    "int4-g128": ("int4", ("block_size=128", "accuracy_level=4", *HEAD)),
}


def head_dtype(model: Path) -> str:
    """The type that the weights of the output layer are stored in, by our names."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    made = {output: node for node in graph.node for output in node.output}
    node = made["logits"]
    while "MatMul" not in node.op_type:
        node = made[node.input[0]]
    bits = {a.name: a.i for a in node.attribute}.get("bits")
    if bits is not None:
        return f"int{bits}"
    names = {t.name: onnx.TensorProto.DataType.Name(t.data_type).lower() for t in graph.initializer}
    return {"float": "float32"}.get(names.get(node.input[1], ""), names.get(node.input[1], "unknown"))


def write(spec: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version

    precision, options = KINDS[spec["kind"]]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", precision, "-e", "cpu"]
    with tempfile.TemporaryDirectory() as cache:
        command = [*builder, "-i", spec["model"], "-o", spec["out"], "-c", cache]
        # All that it says goes where errors go: what is printed here ends with the result.
        subprocess.run(
            [*command, "--extra_options", "hf_token=false", *options], stdout=sys.stderr, check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    made = head_dtype(Path(spec["out"], "model.onnx"))
    return {"by": f"onnxruntime-genai {version('onnxruntime-genai')}", "kind": spec["kind"], "head_dtype": made}


if __name__ == "__main__":
    side.main({"generate": write})
