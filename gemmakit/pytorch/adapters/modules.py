"""A projection and an embedding with a low-rank update beside them; no merged weight is made to run them.

Axis letters: O outputs, I inputs, r rank, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemmakit.pytorch.kernels.training import is_dense, transformed
from gemmakit.pytorch.quantize import QuantizedWeight
from gemmakit.pytorch.shapes import Float, Int


class Adapter(nn.Module):
    """What the two kinds share: the module beneath, and an update `scaling * B @ A` of its weight (O, I) or (V, D).T.

    The update's numbers are float32 whatever the module's dtype is: they are trained.
    """

    names: tuple[str, str]  # of A and B, in this module and in PEFT's files

    def __init__(self, base_layer: nn.Module, r: int, scaling: float, dropout: float):
        super().__init__()
        self.base_layer, self.r, self.scaling = base_layer, r, scaling
        self.dropout = nn.Dropout(dropout)
        self.merged = False
        self.lora_magnitude_vector: nn.Parameter | None = None

    @property
    def weight(self) -> Any:
        """The weight beneath, which others may share."""
        return self.base_layer.weight

    def own(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by the names that PEFT's files have."""
        return dict(self.named_parameters(recurse=False))

    def update(self) -> Tensor:
        """What the adapter adds to the weight, as large as it, in float32."""
        raise NotImplementedError

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight with the update, rounded once to the weight's dtype."""
        weight = self.weight
        return (weight.float() + self.update()).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


class AdaptedLinear(Adapter):
    """base(x) + scaling * B A x; with a magnitude m, m / |W + scaling B A| times (W + scaling B A) x, row by row."""

    names = ("lora_A", "lora_B")
    squares: Tensor  # |W|^2 of each row, with DoRA

    def __init__(self, base_layer: nn.Linear, r: int, scaling: float, dropout: float = 0.0, dora: bool = False):
        super().__init__(base_layer, r, scaling, dropout)
        O, I, device = base_layer.out_features, base_layer.in_features, _device(base_layer)
        self.in_features, self.out_features = I, O
        self.lora_A = nn.Parameter(torch.empty(r, I, device=device))
        self.lora_B = nn.Parameter(torch.zeros(O, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if dora:
            self.register_buffer("squares", _row_squares(base_layer), persistent=False)
            self.lora_magnitude_vector = nn.Parameter(self.squares.sqrt())

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, input: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        base, factor = self.base_layer(input), self.factor()
        if factor is None and self._is_plain(input):
            return _Added.apply(base, self.dropout(input), self.lora_A, self.lora_B, self.scaling)
        x = self.dropout(input).to(self.lora_A.dtype)
        low = F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling
        if factor is None:
            return (base + low).to(base.dtype)
        plain = base if self.dropout.p == 0 or not self.training else self.base_layer(x.to(input.dtype))
        if self.bias is not None:
            plain = plain - self.bias
        return (base + (factor - 1) * plain.to(low.dtype) + factor * low).to(base.dtype)

    def _is_plain(self, input: Tensor) -> bool:
        """Whether nobody but autograd looks at the operations: no compiler, no transform, no cast by itself."""
        return (
            not torch.compiler.is_compiling()
            and is_dense((input, self.lora_A, self.lora_B), input.device)
            and not torch.is_autocast_enabled(input.device.type)
            and not transformed()
        )

    def factor(self) -> Float[Tensor, " O"] | None:
        """With DoRA, what rows of W + scaling B A are multiplied by."""
        return None if self.lora_magnitude_vector is None else self.lora_magnitude_vector / self._row_lengths()

    @torch.no_grad()
    def _row_lengths(self) -> Float[Tensor, " O"]:
        """|W + s B A| of each row, from |W|^2 + 2 s B (W A^T) + s^2 B (A A^T) B^T: no (O, I) is made.

        A constant to the gradients, as arXiv:2402.09353 section 4.3 has it.
        """
        A, B, s = self.lora_A, self.lora_B, self.scaling
        bias = 0 if self.bias is None else self.bias
        mixed = (self.base_layer(A.to(_compute_dtype(self.base_layer))) - bias).float().mT  # W A^T: (O, r)
        squares = self.squares + 2 * s * (mixed * B).sum(1) + s * s * ((B @ (A @ A.mT)) * B).sum(1)
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def update(self) -> Float[Tensor, "O I"]:
        low = self.lora_B.float() @ self.lora_A.float() * self.scaling
        if self.lora_magnitude_vector is None:
            return low
        weight = self.weight.float()
        whole = weight + low
        return whole * (self.lora_magnitude_vector / whole.norm(dim=1))[:, None] - weight


class _Added(torch.autograd.Function):
    """base + scaling * B A x, rounded once. What is kept for the way back is x as it came, and A x, which is narrow.

    Autograd's own lines would keep a float32 copy of x for each projection that reads it.
    """

    @staticmethod
    def forward(
        ctx: Any, base: Float[Tensor, "*rows O"], x: Float[Tensor, "*rows I"], A: Tensor, B: Tensor, scaling: float
    ) -> Float[Tensor, "*rows O"]:
        low = F.linear(x.flatten(0, -2).to(A.dtype), A).mul_(scaling)
        ctx.save_for_backward(x, A, B, low)
        ctx.scaling = scaling
        out, rows = base.new_empty(base.shape), base.reshape(-1, base.shape[-1])
        at_once = _ROWS if base.is_cpu else max(1, len(rows))
        parts = (tensor.split(at_once) for tensor in (out.view(rows.shape), rows, low))
        for into, given, part in zip(*parts, strict=True):
            torch.add(given, F.linear(part, B), out=into)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, A, B, low = ctx.saved_tensors
        (gradient,), (wants_base, wants_x, wants_A, wants_B, _) = gradients, ctx.needs_input_grad
        g = gradient.flatten(0, -2).to(B.dtype)
        if torch.is_grad_enabled():  # to be differentiated again, which what was kept of A x cannot be
            low = F.linear(x.flatten(0, -2).to(A.dtype), A) * ctx.scaling
        for_low = (g @ B) * ctx.scaling if wants_x or wants_A else None
        for_x = (for_low @ A).to(x.dtype).view(x.shape) if wants_x and for_low is not None else None
        for_A = for_low.mT @ x.flatten(0, -2).to(A.dtype) if wants_A and for_low is not None else None
        return gradient if wants_base else None, for_x, for_A, g.mT @ low if wants_B else None, None


# Of an update, this many are made at a time: their float32 numbers stay in a processor's caches.
_ROWS = 64


class AdaptedEmbedding(Adapter):
    """base(ids) + the embedding's own scale * scaling * (A[:, ids].T B.T). A: (r, V), B: (D, r)."""

    names = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Embedding, r: int, scaling: float, dropout: float = 0.0):
        super().__init__(base_layer, r, scaling, dropout)
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        device = _device(base_layer)
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, self.num_embeddings, device=device))
        self.lora_embedding_B = nn.Parameter(torch.randn(self.embedding_dim, r, device=device))

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx  # type: ignore[return-value]

    def forward(self, input: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
        base = self.base_layer(input)
        low = F.embedding(input, self.lora_embedding_A.mT, self.padding_idx) @ self.lora_embedding_B.mT
        scale = getattr(self.base_layer, "embed_scale", 1.0)
        return base + (low * (self.scaling * scale)).to(base.dtype)

    def update(self) -> Float[Tensor, "V D"]:
        return (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).mT * self.scaling


def _device(module: nn.Module) -> torch.device:
    return module.weight.device  # type: ignore[union-attr,return-value]


def _compute_dtype(module: nn.Module) -> torch.dtype:
    """What a module takes and gives; codes have no dtype to compute in, and take float32."""
    dtype = module.weight.dtype
    return dtype if dtype.is_floating_point else torch.float32  # type: ignore[union-attr,return-value]


@torch.no_grad()
def _row_squares(linear: nn.Linear) -> Float[Tensor, " O"]:
    """The squared length of each row of the weight, in float32."""
    if isinstance(linear, QuantizedWeight):
        return linear.dequantized().square().sum(1)
    if linear.weight.is_floating_point():
        return linear.weight.float().square().sum(1)
    bias = 0 if linear.bias is None else linear.bias
    columns = (linear(row[None]) - bias for row in torch.eye(linear.in_features, device=linear.weight.device))
    return sum(column[0].float().square() for column in columns)  # type: ignore[return-value]
