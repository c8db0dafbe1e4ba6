"""gemmakit's own scheme: int8 and int4 weights beside their scales, quantized while they are read or read as stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.checkpoint import Checkpoint
from gemmakit.checkpoint.layout import as_matrix
from gemmakit.dtypes import dtype_name
from gemmakit.errors import InputError
from gemmakit.pytorch.experts import GemmaExperts
from gemmakit.pytorch.kernels import PackedWeight
from gemmakit.pytorch.kernels.packed import packed_format
from gemmakit.pytorch.quantize import rounding
from gemmakit.pytorch.quantize.modules import TABLES, QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from gemmakit.pytorch.quantize.quantizer import PartNames, weight_error
from gemmakit.quantization import WeightOnlyConfig


class WeightOnlyQuantizer:
    """A `Quantizer`. Holds settings only, so a model with one can be copied and pickled."""

    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, GemmaExperts)

    def __init__(self, config: WeightOnlyConfig, tied: bool, stored: bool = False):
        """tied: the model's head is its embedding; stored: the file's weights are quantized."""
        self.config = config
        self.bits = config.bits
        self.tied = tied
        self.stored = stored

    def require(self, device: torch.device) -> None:
        if self.config.calibration is not None and not self.stored:
            raise InputError(
                f"calibration is {self.config.calibration!r}, which needs a text: make a checkpoint with "
                "quantize_checkpoint(..., calibration_ids=...) or gemmakit quantize --calibrate FILE (or "
                "--self-calibrate), and load that."
            )

    def takes(self, name: str) -> bool:
        # What a quantized file holds plainly was kept on purpose.
        return not self.stored and self.layout(name) is not None

    def layout(self, name: str) -> tuple[int, int | None] | None:
        """(bits, group size or None for a row) of the module's weight; None if it is kept as it is."""
        return self.config.layout_of(name, self.tied)

    def bits_of(self, name: str) -> float:
        layout = self.layout(name)
        assert layout is not None
        bits, group_size = layout
        return bits if group_size is None else bits + (24 if bits == 4 else 16) / group_size

    # -- in --------------------------------------------------------------------------------------------------------

    def parts(self, key: str, checkpoint: Checkpoint) -> PartNames:
        """Whatever is there: `shape` says what lacks."""
        found = {"weight" + table: key + table for table in TABLES if key + table in checkpoint}
        return {"weight": key, **found} if found or checkpoint.info(key).dtype in ("int8", "uint8") else {}

    def shape(self, name: str, expected: tuple[int, ...], parts: PartNames, checkpoint: Checkpoint) -> tuple[int, ...]:
        layout = self.layout(name)
        if layout is None:
            raise weight_error(parts, checkpoint, "is quantized, but config.json says that it was kept")
        codes = checkpoint.info(parts["weight"])
        expected = as_matrix(expected)
        if len(codes.shape) != 2 or len(expected) != 2:
            raise weight_error(parts, checkpoint, f"is {codes.dtype} of shape {codes.shape}, not a matrix")
        like = rounding.empty(codes.shape[0], expected[1], *layout, device="meta")
        if codes.dtype == dtype_name(like.codes.dtype) and codes.shape[1] != like.codes.shape[1]:
            return codes.shape[0], codes.shape[1] * 8 // layout[0]
        for part, promised in zip(("weight", *("weight" + table for table in TABLES)), like[:3], strict=True):
            _require(part, promised, parts, checkpoint)
        if like.zero is not None and int(checkpoint.tensor(parts["weight_zero"]).max()) > 15:
            raise weight_error(parts, checkpoint, "has a weight_zero above 15, which 4 bits do not reach")
        return tuple(expected) if codes.shape[0] == expected[0] else (codes.shape[0], expected[1])

    def from_float(
        self, module: nn.Module, name: str, weight: Tensor, device: torch.device, dtype: torch.dtype | None
    ) -> nn.Module:
        """Rounded from the stored numbers, whatever dtype the rest of the model gets."""
        layout = self.layout(name)
        assert layout is not None
        matrix = weight.detach().view(as_matrix(weight.shape))
        packed = rounding.quantize(matrix, *layout, device=device, name=f"{name}.weight")
        activations = self.config.activation_bits, self.config.decode_activation_bits
        packed = PackedWeight(*packed[:6], *activations)
        return _module(module, name, packed, dtype or weight.dtype)

    def from_parts(
        self, module: nn.Module, name: str, tensors: Mapping[str, Tensor], device: torch.device
    ) -> nn.Module:
        tables = (tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero"))
        codes, scale, zero = (None if t is None else t.to(device) for t in tables)
        assert codes is not None and scale is not None
        I = _inputs(module, name)
        layout = self.layout(name)
        assert layout is not None
        bits, group_size = layout
        format, group_size = packed_format(bits, group_size), I if group_size is None else group_size
        activations = self.config.activation_bits, self.config.decode_activation_bits
        packed = PackedWeight(codes, scale, zero, I, group_size, format, *activations)
        return _module(module, name, packed, torch.float32)

    # -- out -------------------------------------------------------------------------------------------------------

    def dequantized(self, module: nn.Module) -> Tensor | None:
        return module.dequantized() if isinstance(module, QuantizedLinear | QuantizedEmbedding) else None

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict()


def _inputs(module: nn.Module, name: str) -> int:
    """I of the weight of a module, of experts that of the matrix that is named."""
    if isinstance(module, GemmaExperts):
        return getattr(module, name.rpartition(".")[2]).shape[-1]
    assert isinstance(module, (nn.Linear, nn.Embedding))
    return module.in_features if isinstance(module, nn.Linear) else module.embedding_dim


def _module(module: nn.Module, name: str, packed: PackedWeight, dtype: torch.dtype) -> nn.Module:
    """What takes the place of a projection, an embedding or experts, of which `name` names the matrix.

    An embedding learns the model's dtype once all is loaded.
    """
    if isinstance(module, GemmaExperts):
        held = module if isinstance(module, QuantizedExperts) else QuantizedExperts(module)
        held.hold(name.rpartition(".")[2], packed)
        return held
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(packed, dtype, module.padding_idx, getattr(module, "scaled_by", None))
    return QuantizedLinear(packed)


def _require(part: str, promised: Tensor | None, parts: PartNames, checkpoint: Checkpoint) -> None:
    """`promised`: a tensor of the dtype and shape that `part` must have; None if it must not be there."""
    if promised is None or part not in parts:
        if (promised is None) != (part not in parts):
            verb = "lacks its" if promised is not None else "has no use for its"
            raise weight_error(parts, checkpoint, f"{verb} {part}")
        return
    info = checkpoint.info(parts[part])
    if (info.dtype, tuple(info.shape[1:])) != (dtype_name(promised.dtype), tuple(promised.shape[1:])):
        raise weight_error(
            parts,
            checkpoint,
            f"needs a {part} of {dtype_name(promised.dtype)} and {tuple(promised.shape)} by its config.json, and the "
            f"file holds {info.dtype} of {tuple(info.shape)}",
        )
    if info.shape[0] != promised.shape[0]:
        raise weight_error(parts, checkpoint, f"has {promised.shape[0]} rows, but its {part} has {info.shape[0]}")
