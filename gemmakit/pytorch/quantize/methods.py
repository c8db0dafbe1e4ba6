"""What is different about a model whose weights are quantized: its facts, its ties, and the casts it refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gemmakit.dtypes import dtype_name
from gemmakit.errors import InputError
from gemmakit.pytorch.layers import GemmaScaledEmbedding, Linear
from gemmakit.pytorch.parallel.processes import require_whole
from gemmakit.pytorch.quantize.modules import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedWeight,
    resized,
)
from gemmakit.pytorch.quantize.quantizer import Quantizer


class QuantizedMethods(nn.Module):
    """Mixed into GemmaPreTrainedModel; harmless for a model of plain weights."""

    _quantizer: Quantizer | None = None

    @property
    def is_quantized(self) -> bool:
        return self._quantizer is not None

    @property
    def quantization_config(self) -> Any:
        """The WeightOnlyConfig or BitsAndBytesConfig, or None."""
        return None if self._quantizer is None else self._quantizer.config

    # What peft asks before it wraps a layer.
    @property
    def is_loaded_in_4bit(self) -> bool:
        return self._quantizer is not None and self._quantizer.bits == 4

    @property
    def is_loaded_in_8bit(self) -> bool:
        return self._quantizer is not None and self._quantizer.bits == 8

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Weights, a tied one counted once, each code as the weight it stands for."""
        stored: int = super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        packed = {id(m.weight): m for m in self.modules() if isinstance(m, QuantizedWeight) and not only_trainable}
        if exclude_embeddings:
            packed.pop(id(self.get_input_embeddings().weight), None)  # type: ignore[operator]
        held = [module.packed for module in packed.values()]
        experts = [] if only_trainable else [m for m in self.modules() if isinstance(m, QuantizedExperts)]
        held += [matrix for module in experts for matrix in module.matrices.values()]
        return stored + sum(matrix.shape[0] * matrix.shape[1] - matrix.codes.numel() for matrix in held)

    def _set_quantizer(self, quantizer: Quantizer | None) -> None:
        """For this model and the models in it, which share its configuration."""
        for module in self.modules():
            if isinstance(module, QuantizedMethods):
                module._quantizer = quantizer
            elif isinstance(module, QuantizedEmbedding):
                module.compute_dtype = self.dtype  # type: ignore[assignment]

    # -- the embedding and the head --------------------------------------------------------------------------------

    def tie_weights(self) -> None:
        """Make tied parameters one tensor again, with its scales, if the configuration ties them."""
        plain = [tie(self, *pair) for pair in self.tied_weights.items()] if self._ties else []  # type: ignore[operator]
        if not all(plain):
            super().tie_weights()  # type: ignore[misc]

    def untie_weights(self) -> None:
        """Give the head a copy of the embedding's weight, to be saved apart."""
        require_whole(self, "untie one that is loaded without tp_plan")
        for tied, source in self.tied_weights.items() if self._ties else ():  # type: ignore[operator]
            embedding = self.get_submodule(source.rpartition(".")[0])
            if isinstance(embedding, QuantizedWeight):
                copies = (None if t is None else t.detach().clone() for t in embedding.packed[:3])
                copy = embedding.packed._replace(**dict(zip(("codes", "scale", "zero"), copies, strict=True)))
                self.set_submodule(tied.rpartition(".")[0], QuantizedLinear(copy))
                self.config.tie_word_embeddings = False  # type: ignore[union-attr]
        super().untie_weights()  # type: ignore[misc]

    @property
    def _ties(self) -> bool:
        return self.config.tie_word_embeddings  # type: ignore[union-attr,return-value]

    def _resize_rows(self, module: Any, size: int, mean: bool) -> None:
        """As of a plain model; new rows are quantized like the others."""
        if isinstance(module, QuantizedWeight):
            std: float = self.config.initializer_range  # type: ignore[union-attr,assignment]
            module.hold(resized(module, size, None if mean else std))
        else:
            super()._resize_rows(module, size, mean)  # type: ignore[misc]

    def prune_heads(self, heads_to_prune: Any) -> None:
        """As of a plain model; InputError for a quantized one, whose matrices cannot be cut."""
        if self.is_quantized:
            raise InputError("a quantized model cannot be pruned: prune the plain one, save it, and quantize that.")
        super().prune_heads(heads_to_prune)  # type: ignore[misc]

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Plain weights of `dtype` (None: the model's) in the place of codes, in place; they are no better than these.

        Raises InputError for a model that is plain, or that a tensor plan has split.
        """
        require_whole(self, "load it plain with tp_plan, or dequantize one that is loaded without")
        quantizer, chosen = self._quantizer, dtype or self.dtype  # type: ignore[assignment]
        if quantizer is None:
            raise InputError("this model is not quantized: there is nothing to dequantize.")
        for name, module in list(self.named_modules()):
            if isinstance(module, QuantizedExperts):
                self.set_submodule(name, module.dequantized(chosen))  # type: ignore[arg-type]
                continue
            weight = quantizer.dequantized(module)
            if weight is not None:
                self.set_submodule(name, _plain(module, weight.to(chosen)))  # type: ignore[arg-type]
        self._set_quantizer(None)
        self.config.extra.pop("quantization_config", None)  # type: ignore[union-attr]
        self.tie_weights()
        return self

    # -- moves and casts -------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)
        first: dict[int, QuantizedWeight] = {}
        for module in self.modules():
            if isinstance(module, QuantizedWeight):  # moved tables are new tensors, a module each: share them again
                owner = first.setdefault(id(module.weight), module)
                module.weight_scale, module.weight_zero = owner.weight_scale, owner.weight_zero
        return out

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of torch; InputError for another dtype if the model is quantized."""
        if self.is_quantized:
            dtype = torch._C._nn._parse_to(*args, **kwargs)[1]  # type: ignore[attr-defined]
            if dtype is not None:
                self._refuse_cast(dtype_name(dtype))
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
        how = "dtype=" if self.quantization_config.quant_method == "gemmakit" else "dtype= and bnb_4bit_compute_dtype="
        raise InputError(
            f"a quantized model cannot be cast to {dtype}: choose {how} in from_pretrained. .to(device) works."
        )


def _plain(module: Any, weight: torch.Tensor) -> nn.Module:
    """A module of the same size with plain weights."""
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            scaled_by = getattr(module, "scaled_by", None)
            new: Any = GemmaScaledEmbedding(*weight.shape, module.padding_idx, scaled_by=scaled_by)  # type: ignore[arg-type]
        else:
            new = Linear(weight.shape[1], weight.shape[0], bias=False)
    new.weight, new.bias = nn.Parameter(weight, requires_grad=False), getattr(module, "bias", None)
    return new.train(module.training)


def tie(model: nn.Module, tied: str, source: str) -> bool:
    """Let the head share a quantized embedding's tensors, or be plain again beside a plain one; whether it is done."""
    place = tied.rpartition(".")[0]
    head, embedding = model.get_submodule(place), model.get_submodule(source.rpartition(".")[0])
    if not isinstance(embedding, QuantizedWeight):
        if isinstance(head, QuantizedLinear):
            plain = Linear(head.in_features, head.out_features, bias=False, device="meta")
            model.set_submodule(place, plain.train(head.training))
        return False
    if not isinstance(head, nn.Linear):
        return True  # an adapter around the head, which holds its tensors
    if not isinstance(head, QuantizedLinear):
        new = QuantizedLinear(embedding.packed)
        model.set_submodule(place, new.train(head.training))
        head = new
    head.share(embedding)
    return True
