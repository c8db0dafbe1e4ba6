"""4-bit (nf4, fp4) and 8-bit (LLM.int8()) linear layers of the bitsandbytes package, in transformers' file layout.

Source: arXiv:2305.14314 (nf4, double quantization), arXiv:2208.07339 (LLM.int8()).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.checkpoint import Checkpoint
from gemmakit.errors import InputError, MissingDependency
from gemmakit.pytorch.quantize import bitsandbytes_files as files
from gemmakit.pytorch.quantize.quantizer import Parts
from gemmakit.quantization import BitsAndBytesConfig


class BitsAndBytesQuantizer:
    """A `Quantizer`. Holds settings only, so a model with one can be copied and pickled."""

    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)

    def __init__(
        self, config: BitsAndBytesConfig, heads: tuple[str, ...], kept: tuple[str, ...] = (), stored: bool = False
    ):
        """heads: prefixes of modules that stay; kept: names of more; stored: the file's weights are quantized."""
        self.config = config
        self.bits = 4 if config.load_in_4bit else 8
        self.heads = heads
        self.kept = kept
        self.stored = stored

    def require(self, device: torch.device) -> None:
        """Quantize and multiply once, in small: versions differ in what they can do on which device."""
        bnb = _package()
        try:
            weight = torch.eye(64, dtype=torch.float32, device="cpu")
            layer = self.from_float(nn.Linear(64, 64, bias=False, device="meta"), "", weight, device, None)
            with torch.no_grad():
                layer(torch.ones(1, 64, dtype=torch.float32, device=device))
        except Exception as e:  # an operator that is not there, a library that was not built, ...
            kind = f"{self.config.bnb_4bit_quant_type}" if self.bits == 4 else "int8"
            raise InputError(
                f"bitsandbytes {bnb.__version__} cannot run {kind} layers on {device}: {str(e).splitlines()[:1]}. "
                "Upgrade it (pip install -U bitsandbytes), or choose another device or quantization."
            ) from e

    def takes(self, name: str) -> bool:
        if self.stored and not self.config.llm_int8_has_fp16_weight:
            return False  # what the file holds plainly was kept on purpose
        if (name + ".").startswith(self.heads) or name.endswith("embed_tokens") or self.config.keeps(name):
            return False
        return not any((name + ".").startswith(place + ".") or not place for place in self.kept)

    def bits_of(self, name: str) -> float:
        return self.bits

    # -- in --------------------------------------------------------------------------------------------------------

    def parts(self, key: str, checkpoint: Checkpoint) -> Parts:
        return (files.parts_4bit if self.bits == 4 else files.parts_8bit)(key, checkpoint)

    def shape(self, name: str, expected: tuple[int, ...], parts: Parts, checkpoint: Checkpoint) -> tuple[int, ...]:
        return (files.shape_4bit if self.bits == 4 else files.shape_8bit)(parts, checkpoint)

    def from_float(
        self, module: nn.Module, name: str, weight: Tensor, device: torch.device, dtype: torch.dtype | None
    ) -> nn.Module:
        """weight: (O, I) on the CPU, cast to `dtype` and quantized on `device`."""
        bnb, layer = _package(), self._layer(module)
        weight = weight if dtype is None else weight.to(dtype)
        if self.bits == 8:
            fp16 = self.config.llm_int8_has_fp16_weight
            packed = bnb.nn.Int8Params(weight, requires_grad=fp16, has_fp16_weights=fp16)
        else:
            packed = bnb.nn.Params4bit(
                weight,
                requires_grad=False,
                compress_statistics=self.config.bnb_4bit_use_double_quant,
                quant_type=self.config.bnb_4bit_quant_type,
                quant_storage=getattr(torch, self.config.bnb_4bit_quant_storage),
                module=layer,
            )
        layer.weight = packed.to(device)
        return layer

    def from_parts(
        self, module: nn.Module, name: str, tensors: Mapping[str, Tensor], device: torch.device
    ) -> nn.Module:
        bnb, layer = _package(), self._layer(module)
        if self.bits == 8:
            weight, scale = tensors["weight"].to(device), tensors["SCB"].to(device)
            # The layer takes the codes from CB; weight.data is the same memory.
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scale)
        else:
            statistics = {name: tensor for name, tensor in tensors.items() if name != "weight"}
            layer.weight = bnb.nn.Params4bit.from_prequantized(
                tensors["weight"], statistics, requires_grad=False, device=device, module=layer
            )
        return layer

    def _layer(self, linear: nn.Module) -> Any:
        """The empty layer of bitsandbytes of the linear layer's size."""
        bnb, config = _package(), self.config
        assert isinstance(linear, nn.Linear)
        size: dict[str, Any] = dict(bias=False, device="meta")
        if self.bits == 8:
            return bnb.nn.Linear8bitLt(
                linear.in_features,
                linear.out_features,
                has_fp16_weights=config.llm_int8_has_fp16_weight,
                threshold=config.llm_int8_threshold,
                **size,
            )
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            compute_dtype=getattr(torch, config.bnb_4bit_compute_dtype),
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=getattr(torch, config.bnb_4bit_quant_storage),
            **size,
        )
        # On processors with AVX512-BF16 an evaluation would repack the weight in place: bfloat16 whatever the compute
        # dtype, no gradient through it ever after, other scales on saving, and an error at sizes not divisible by 32.
        layer.support_avx512bf16_for_cpu = False
        return layer

    # -- out -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """With the head among the skipped modules, if any are named: other readers keep it only by default."""
        out = self.config.to_dict()
        if out["llm_int8_skip_modules"] is not None:
            heads = [head.removesuffix(".") for head in self.heads]
            out["llm_int8_skip_modules"] = list(dict.fromkeys([*out["llm_int8_skip_modules"], *heads, *self.kept]))
        elif self.kept:
            out["llm_int8_skip_modules"] = [*(head.removesuffix(".") for head in self.heads), *self.kept]
        return out


def _package() -> Any:
    try:
        import bitsandbytes
    except ImportError as e:
        raise MissingDependency(
            "BitsAndBytesConfig needs the bitsandbytes package: pip install 'gemmakit[quantization]'."
        ) from e
    return bitsandbytes
