"""What is different about a model whose weights are quantized: its facts, and the casts it refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gemmakit.errors import InputError
from gemmakit.pytorch.quantize.quantizer import Quantizer


class QuantizedMethods(nn.Module):
    """Mixed into GemmaPreTrainedModel; harmless for a model of plain weights."""

    _quantizer: Quantizer | None = None

    @property
    def is_quantized(self) -> bool:
        return self._quantizer is not None

    @property
    def quantization_config(self) -> Any:
        """The BitsAndBytesConfig, or None."""
        return None if self._quantizer is None else self._quantizer.config

    # What peft asks before it wraps a layer.
    @property
    def is_loaded_in_4bit(self) -> bool:
        return self._quantizer is not None and self._quantizer.bits == 4

    @property
    def is_loaded_in_8bit(self) -> bool:
        return self._quantizer is not None and self._quantizer.bits == 8

    def _set_quantizer(self, quantizer: Quantizer | None) -> None:
        """For this model and the models in it, which share its configuration."""
        for module in self.modules():
            if isinstance(module, QuantizedMethods):
                module._quantizer = quantizer

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of torch; InputError for another dtype if the model is quantized."""
        if self.is_quantized:
            dtype = torch._C._nn._parse_to(*args, **kwargs)[1]  # type: ignore[attr-defined]
            if dtype is not None:
                self._refuse_cast(str(dtype).removeprefix("torch."))
        return super().to(*args, **kwargs)

    def half(self) -> Any:
        return self._cast("half", "float16")

    def float(self) -> Any:
        return self._cast("float", "float32")

    def double(self) -> Any:
        return self._cast("double", "float64")

    def bfloat16(self) -> Any:
        return self._cast("bfloat16", "bfloat16")

    def _cast(self, method: str, dtype: str) -> Any:
        if self.is_quantized:
            self._refuse_cast(dtype)
        return getattr(super(), method)()

    def _refuse_cast(self, dtype: str) -> None:
        raise InputError(
            f"a quantized model cannot be cast to {dtype}: choose dtype= and bnb_4bit_compute_dtype= in "
            "from_pretrained. .to(device) works."
        )
