"""A checkpoint as OpenVINO reads it: in 16 bits by optimum's exporter, and from that in 8 or 4 by nncf.

Fields of the spec: model (a folder of the released layout, or for kinds of fewer bits what kind "16" made of it), out,
kind (see `KINDS`). The projections are rounded symmetrically in groups, embedding and head to 8 bits a row, as ours.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import side
from openvino_side import head_dtype

KINDS = {"16": None, "int8": None, "int4": 32, "int4-g128": 128}  # -> group size; int8 has a scale a row


def export(model: Path, out: Path) -> None:
    import torch
    from optimum.exporters.openvino import export_from_model
    from optimum.intel import OVConfig
    from transformers import AutoModelForCausalLM

    told = json.loads((model / "config.json").read_text())
    dtype = told.get("dtype") or told.get("torch_dtype") or "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    export_from_model(
        loaded, out, task="text-generation-with-past", stateful=True, ov_config=OVConfig(dtype="fp16"),
        preprocessors=[], patch_16bit_model=dtype != "float32",
    )  # fmt: skip


def compress(source: Path, out: Path, kind: str) -> None:
    import nncf
    import openvino as ov

    model = ov.Core().read_model(source / "openvino_model.xml")
    modes = nncf.CompressWeightsMode
    if KINDS[kind] is None:
        model = nncf.compress_weights(model, mode=modes.INT8_SYM)
    else:
        # A size that the groups do not divide is rounded in smaller ones.
        smaller = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        model = nncf.compress_weights(
            model, mode=modes.INT4_SYM, ratio=1.0, group_size=KINDS[kind], backup_mode=nncf.BackupMode.INT8_SYM,
            advanced_parameters=smaller,
        )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
    for file in source.glob("*config.json"):
        shutil.copy(file, out)


def write(spec: dict[str, Any]) -> dict[str, Any]:
    import openvino as ov

    model, out = Path(spec["model"]), Path(spec["out"])
    if spec["kind"] == "16":
        export(model, out)
    else:
        compress(model, out, spec["kind"])
    made = ov.Core().read_model(out / "openvino_model.xml")
    return {"by": f"openvino {ov.__version__}", "kind": spec["kind"], "head_dtype": head_dtype(made)}


if __name__ == "__main__":
    side.main({"generate": write})
