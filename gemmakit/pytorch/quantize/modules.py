"""A projection, an embedding, a tied head and experts whose weight is `PackedWeight`; modules like any others.

Their tensors are called `weight` (the codes), `weight_scale` and `weight_zero` (4 bits only), in files too; those of
experts by the names of their matrices in place of `weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.native.ids import WeightFormat
from gemmakit.pytorch.experts import GemmaExperts
from gemmakit.pytorch.kernels import PackedWeight, linear_packed
from gemmakit.pytorch.kernels.packed import dequantize
from gemmakit.pytorch.layers import GemmaScaledEmbedding
from gemmakit.pytorch.quantize import rounding
from gemmakit.pytorch.quantize.codes import Codes, guard

# What is stored beside the codes of `weight`, each under the weight's name with this at its end.
TABLES = ("_scale", "_zero")


class QuantizedWeight(nn.Module):
    """What the two kinds share: tensors that move together, and scales that no cast reaches."""

    weight: Any  # an nn.Parameter, not trained
    weight_scale: Tensor
    weight_zero: Tensor | None
    group_size: int
    weight_format: WeightFormat
    activation_bits: int
    decode_activation_bits: int
    _inputs: int

    def hold(self, packed: PackedWeight) -> None:
        """Take these tensors, without a copy, in place of the ones before."""
        self.weight = Codes(packed.codes)
        self.register_buffer("weight_scale", packed.scale)
        self.register_buffer("weight_zero", packed.zero)
        self._inputs, self.group_size, self.weight_format, self.activation_bits, self.decode_activation_bits = packed[
            3:
        ]

    def share(self, other: QuantizedWeight) -> None:
        """Hold the very tensors of another module."""
        self.hold(other.packed)
        self.weight = other.weight

    @property
    def packed(self) -> PackedWeight:
        """The weight as kernels take it."""
        return PackedWeight(
            self.weight,
            self.weight_scale,
            self.weight_zero,
            self._inputs,
            self.group_size,
            self.weight_format,
            self.activation_bits,
            self.decode_activation_bits,
        )

    @property
    def bits(self) -> int:
        return self.weight_format.bits

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (O, I) that the codes stand for."""
        return dequantize(self.packed, dtype)

    # By these two names peft finds the numbers of a weight that holds codes: DoRA measures them.

    @property
    def W_q(self) -> Tensor:
        return self.weight

    def dequantize(self) -> Tensor:
        return self.dequantized()

    def scheme(self) -> str:
        """In words: "int4, groups of 32"."""
        groups = "rows" if self.group_size == self._inputs else f"groups of {self.group_size}"
        return f"int{self.bits}, {groups}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme()}"

    def reset_parameters(self) -> None:
        """Nothing: codes are given."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(_without_casts(fn, [self.weight_scale]), recurse)
        guard(self)
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        guard(self)


def _without_casts(fn: Callable[[Tensor], Tensor], scales: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """fn, but for casts of scales: they are part of the stored weight, and a cast of the module is one of its inputs
    and outputs."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        is_scale = any(tensor is scale for scale in scales)
        return tensor.to(new.device) if is_scale and new.dtype != tensor.dtype else new

    return moved


class QuantizedLinear(QuantizedWeight, nn.Linear):
    """x @ w.T + bias in x's dtype, by `linear_packed`; gradients reach x, never w."""

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.hold(packed)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., I) -> (..., O)."""
        return linear_packed(input, self.packed, self.bias)


class QuantizedEmbedding(QuantizedWeight, GemmaScaledEmbedding):
    """Rows of codes, dequantized and rounded to `compute_dtype`, then scaled as GemmaScaledEmbedding does."""

    def __init__(
        self,
        packed: PackedWeight,
        compute_dtype: torch.dtype,
        padding_idx: int | None = None,
        scaled_by: int | None = None,
    ):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.scaled_by = scaled_by or self.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.compute_dtype = compute_dtype
        self.hold(packed)

    @property
    def embed_scale(self) -> Tensor:
        """As of the plain embedding, in the dtype that rows are rounded to."""
        return torch.full((), self.scaled_by**0.5, dtype=self.compute_dtype, device=self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, S) ids -> (B, S, D). IndexError for an id that there is not."""
        ids = input.reshape(-1)
        codes, scale, zero, *sizes = self.packed
        # index_select refuses negative ids, which indexing would count from the end.
        picked = (None if t is None else t.index_select(0, ids) for t in (codes, scale, zero))
        rows = dequantize(PackedWeight(*picked, *sizes), self.compute_dtype)  # type: ignore[arg-type]
        return rows.view(*input.shape, self.embedding_dim) * self.embed_scale


class QuantizedExperts(GemmaExperts):
    """Experts of whose matrices some are packed, the rows of all experts below each other; a product reads one's rows.

    Gradients reach x, never a packed matrix.
    """

    def __init__(self, plain: GemmaExperts):
        nn.Module.__init__(self)
        self.num_experts, self.act_fn = plain.num_experts, plain.act_fn
        for name, parameter in plain.named_parameters():
            self.register_parameter(name, parameter)
        self._layouts: dict[str, tuple[Any, ...]] = {}

    def hold(self, name: str, packed: PackedWeight) -> None:
        """Take these tensors for the matrix of that name, without a copy."""
        self.register_parameter(name, nn.Parameter(packed.codes, requires_grad=False))
        self.register_buffer(f"{name}_scale", packed.scale)
        self.register_buffer(f"{name}_zero", packed.zero)
        self._layouts[name] = packed[3:]

    @property
    def matrices(self) -> dict[str, PackedWeight]:
        """By name, those that are packed."""
        return {name: self._packed(name) for name in self._layouts}

    def product(self, name: str, expert: int, x: Tensor) -> Tensor:
        if name not in self._layouts:
            return super().product(name, expert, x)
        packed = self._packed(name)
        rows = len(packed.codes) // self.num_experts
        return linear_packed(x, packed.rows(slice(expert * rows, (expert + 1) * rows)))

    def parts(self, name: str, experts: Tensor, dtype: torch.dtype) -> Tensor:
        if name not in self._layouts:
            return super().parts(name, experts, dtype)
        packed = self._packed(name)
        count = len(packed.codes) // self.num_experts
        rows = experts[..., None] * count + torch.arange(count, device=experts.device)
        return dequantize(packed.rows(rows.flatten()), dtype).view(*rows.shape, packed.in_features)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> GemmaExperts:
        """Plain experts with the numbers that the codes stand for."""
        plain = GemmaExperts.__new__(GemmaExperts)
        nn.Module.__init__(plain)
        plain.num_experts, plain.act_fn = self.num_experts, self.act_fn
        for name, parameter in self.named_parameters():
            if name in self._layouts:
                packed = self._packed(name)
                weight = dequantize(packed, dtype).view(self.num_experts, -1, packed.in_features)
                parameter = nn.Parameter(weight, requires_grad=False)
            plain.register_parameter(name, parameter)
        return plain.train(self.training)

    def _packed(self, name: str) -> PackedWeight:
        tables = (getattr(self, name + end) for end in ("", *TABLES))
        return PackedWeight(*tables, *self._layouts[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(_without_casts(fn, [packed.scale for packed in self.matrices.values()]), recurse)


@torch.no_grad()
def resized(old: QuantizedWeight, size: int, std: float | None) -> PackedWeight:
    """The rows of `old` that stay, and new ones: the mean of the old ones, or drawn from Normal(0, std)."""
    packed = old.packed
    O, I = packed.shape
    if size <= O:
        return packed.rows(slice(0, size))._replace(codes=packed.codes[:size].clone())
    if std is None:
        pieces = (dequantize(packed.rows(slice(i, i + 4096))).sum(0) for i in range(0, O, 4096))
        new = (torch.stack(list(pieces)).sum(0) / O).expand(size - O, I)
    else:
        new = torch.empty(size - O, I, device=packed.codes.device).normal_(0.0, std)
    group_size = None if packed.format == WeightFormat.INT8_ROWS else packed.group_size
    more = rounding.quantize(new, packed.bits, group_size, name="the new rows")
    joined = (None if a is None or b is None else torch.cat((a, b)) for a, b in zip(packed[:3], more[:3], strict=True))
    return PackedWeight(*joined, *packed[3:])  # type: ignore[arg-type]
