"""What the loader asks of a quantization scheme.

A scheme is one class with the methods of `Quantizer`. The loader stays one: it names what is missing, extra or of
another shape, whatever the scheme, and hands each weight to it one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gemmakit.checkpoint import Checkpoint
from gemmakit.errors import CheckpointError

# {part: tensor name in the file}; the part "weight" is the packed weight itself.
PartNames = dict[str, str]


class Quantizer(Protocol):
    """One scheme: which modules, how a weight becomes a module, how stored tensors do, what is written down."""

    config: Any
    bits: int
    stored: bool  # the checkpoint's weights are quantized already
    kinds: tuple[type[nn.Module], ...]  # of the modules whose weight can be quantized

    def require(self, device: torch.device) -> None:
        """Raise MissingDependency or InputError if this cannot run on `device`."""
        ...

    def takes(self, name: str) -> bool:
        """Whether the module of this name is to be quantized when its weight is stored plainly."""
        ...

    def bits_of(self, name: str) -> float:
        """Bits a weight of a module that it takes, scales included; for asking for memory."""
        ...

    def parts(self, key: str, checkpoint: Checkpoint) -> PartNames:
        """The tensors that together hold the weight stored as `key`; empty if it is stored plainly."""
        ...

    def shape(self, name: str, expected: tuple[int, ...], parts: PartNames, checkpoint: Checkpoint) -> tuple[int, ...]:
        """The shape of the module's weight once unpacked; CheckpointError if the parts do not fit each other.

        expected: the shape that the model asks for, which the stored tensors of some schemes leave open.
        """
        ...

    def from_float(
        self, module: nn.Module, name: str, weight: Tensor, device: torch.device, dtype: torch.dtype | None
    ) -> nn.Module:
        """What replaces the module `name`, with `weight` (O, I), as stored, quantized on `device`.

        dtype: what weights that stay plain are cast to, or None.
        """
        ...

    def from_parts(
        self, module: nn.Module, name: str, tensors: Mapping[str, Tensor], device: torch.device
    ) -> nn.Module:
        """What replaces the module `name`, from the stored tensors of `parts`."""
        ...

    def dequantized(self, module: nn.Module) -> Tensor | None:
        """The numbers that the codes of a module stand for, (O, I) in float32; None for a plain one."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """config.json's quantization_config."""
        ...


def weight_error(parts: PartNames, checkpoint: Checkpoint, why: str) -> CheckpointError:
    """The error for stored parts of a weight that do not fit each other, or its configuration."""
    return CheckpointError(f"{parts['weight']} in {checkpoint.files[0].parent} {why}. Download or quantize it again.")
