"""GGUF blocks as quantized weights: they have the layout of gemmakit's own int4 and int8 in groups of 32, exactly.

So there is no scheme of its own for them: the file's settings are said as a WeightOnlyConfig, and the loader then finds
codes and scales as in any quantized checkpoint. A model loaded so is saved and opened again like one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemmakit.checkpoint import Checkpoint
from gemmakit.checkpoint.gguf import open_gguf
from gemmakit.config import GemmaConfig
from gemmakit.dtypes import dtype_name
from gemmakit.gguf import read_gguf_header
from gemmakit.gguf.settings import matrices_dtype, stored_quantization


def open_gguf_for(
    path: Path, config: GemmaConfig, dtype: torch.dtype | None, quantization_config: Any
) -> tuple[Checkpoint, torch.dtype]:
    """The tensors of a GGUF file, and the dtype of those that are plain numbers.

    dtype: None keeps Q8_0 and Q4_0 as they are, unless they are to be quantized otherwise; the configuration then says
    so. Other blocks, and all of them if a dtype is asked for, become numbers of it.
    """
    header = read_gguf_header(path)
    chosen = dtype or getattr(torch, matrices_dtype(header))
    if dtype is not None or quantization_config is not None:
        # What is rounded again is rounded from the exact numbers.
        exact = torch.float32 if quantization_config is not None else chosen
        return open_gguf(path, dtype=dtype_name(exact)), chosen
    stored, kept = stored_quantization(header)
    if stored is not None:
        config.extra["quantization_config"] = _in_released_names(stored)
    return open_gguf(path, dtype=dtype_name(chosen), keep=kept), chosen


def _in_released_names(stored: dict[str, Any]) -> dict[str, Any]:
    from gemmakit.checkpoint.gguf.names import released_name

    kept = [str(released_name(name)).removesuffix(".weight") for name in stored["modules_to_not_convert"] or ()]
    return {**stored, "modules_to_not_convert": kept or None}
