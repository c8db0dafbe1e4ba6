"""The seams of a decoder layer on CUDA: five kernels, and one more where attention is divided among many programs.

Axis letters: B batch, S positions, D hidden, F mlp, N heads, K kv heads, H head_dim, T keys.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemmakit.pytorch.kernels.packed import PackedWeight
from gemmakit.pytorch.kernels.reference import ACTIVATION_OF
from gemmakit.pytorch.kernels.seams import PROJECTIONS, Seams, weight_of
from gemmakit.pytorch.kernels.triton import DTYPES, MAX_ROWS, Refused, starting, why_not

if TYPE_CHECKING:
    from gemmakit.pytorch.kernels.triton.launch import Norm, Operand, Room


def fused(layer: nn.Module, x: Tensor) -> Seams | str:
    """What `kernels.seams.FORMS` asks for: the seams of this layer for activations like x, or why there are none."""
    why = why_not(x.device)
    if why:
        return f"Triton kernels: {why}"
    if x.dtype not in DTYPES:
        return f"no Triton kernels for {x.dtype}"
    for name, module in layer.named_modules():
        last = name.rpartition(".")[2]
        found = _unfit(module, x.dtype) if last in PROJECTIONS else ""
        if found:
            return f"{last} is {found}"
    return TritonSeams(layer)


def _unfit(module: nn.Module, dtype: torch.dtype) -> str:
    """Why no kernel multiplies by this weight."""
    weight = weight_of(module)
    if isinstance(weight, PackedWeight):
        parts = list(weight.tensors)
        if (weight.bits == 4) != (weight.zero is not None):
            return f"in {weight.bits} bits {'without' if weight.bits == 4 else 'with'} zeros"
    elif weight is None:
        return f"a {type(module).__qualname__}"
    else:
        parts = [weight]
        if weight.dtype != dtype:
            return f"in {weight.dtype} and the activations in {dtype}"
    bias = module.bias
    if isinstance(bias, Tensor) and bias.dtype != dtype:
        return f"with a bias in {bias.dtype} and the activations in {dtype}"
    return "" if all(t.is_contiguous() for t in parts) else "not contiguous"


class TritonSeams:
    """The fused forms of one layer, for as long as its tensors stay where they are.

    More rows than MAX_ROWS are matrix work, for which the projections' modules are called between fused norms and
    gates; keys and values are read where they lie by any number of rows of one position each. A kernel that does not
    start gives way to the modules too.
    """

    def __init__(self, layer: nn.Module):
        why = _no_attention(layer.get_submodule("self_attn"))
        self.name, self.any_rows = "Triton", True
        self.plan = f"Triton, attention by torch ({why})" if why else "Triton"
        self.beyond = "; beyond that modules between fused norms and gates"
        self.device = next(layer.parameters()).device
        self.operands: dict[nn.Module, Operand] = {}

    def _fits(self, x: Tensor) -> bool:
        """Whether the kernels that read weights take x (B, S, ...)."""
        return x.shape[0] * x.shape[1] <= MAX_ROWS and not why_not(self.device)

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        from gemmakit.pytorch.kernels.triton import training

        if not why_not(self.device):
            with suppress(Refused), starting(self.device):
                return training.rms_norm_saving(x, *_norm(norm))[0]
        return norm(x)

    def _gated(self, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        from gemmakit.pytorch.kernels.triton import training

        kind = ACTIVATION_OF.get(act)
        if kind is not None and not why_not(self.device):
            with suppress(Refused), starting(self.device):
                return training.gated(gate, up, kind)
        return act(gate) * up

    def _operands(self, *modules: nn.Module) -> list[Operand]:
        from gemmakit.pytorch.kernels.triton import launch

        for module in modules:
            if module not in self.operands:
                weight = weight_of(module)
                assert weight is not None
                if isinstance(weight, Tensor):
                    weight = weight.detach()
                self.operands[module] = launch.operand(weight)
        return [self.operands[m] for m in modules]

    def norm_qkv(
        self, x: Tensor, norm: nn.Module, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the protocol says, in one launch when the three weights have one format."""
        with suppress(Refused):
            if self._fits(x):
                q, k, v = self._norm_project(x, norm, q_proj, k_proj, v_proj)
                return q, k, v
        h = self._normed(x, norm)
        return q_proj(h), k_proj(h), v_proj(h)

    def _norm_project(self, x: Tensor, norm: nn.Module, *modules: nn.Module) -> list[Tensor]:
        from gemmakit.pytorch.kernels.triton import launch

        weights, rows, first = self._operands(*modules), x.flatten(0, 1), _norm(norm)
        biases = [_bias(m) for m in modules]
        if launch.alike(weights):
            ys = launch.project(rows, weights, biases, first)
        else:
            ys = [launch.project(rows, [w], [b], first)[0] for w, b in zip(weights, biases, strict=True)]
        return [y.view(*x.shape[:2], -1) for y in ys]

    def project_add(self, x: Tensor, projection: nn.Module, residual: Tensor) -> Tensor:
        """As the protocol says."""
        with suppress(Refused):
            if self._fits(x):
                from gemmakit.pytorch.kernels.triton import launch

                rows, added = x.flatten(0, 1), residual.flatten(0, 1)
                y = launch.project(rows, self._operands(projection), [_bias(projection)], residual=added)[0]
                return y.view_as(residual)
        return residual + projection(x)

    def norm_gate_up(
        self, x: Tensor, norm: nn.Module, gate: nn.Module, up: nn.Module, act: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As the protocol says; an activation that no kernel has follows the projections."""
        with suppress(Refused):
            if self._fits(x):
                return self._norm_gate_up(x, norm, gate, up, act)
        h = self._normed(x, norm)
        return self._gated(gate(h), up(h), act)

    def _norm_gate_up(self, x: Tensor, norm: nn.Module, gate: nn.Module, up: nn.Module, act: Any) -> Tensor:
        from gemmakit.pytorch.kernels.triton import launch

        kind, weights = ACTIVATION_OF.get(act), self._operands(gate, up)
        if kind is None or not launch.alike(weights):
            gated, passed = self._norm_project(x, norm, gate, up)
            return act(gated) * passed
        biases = (_bias(gate), _bias(up))
        y = launch.gate_up(x.flatten(0, 1), _norm(norm), weights[0], weights[1], biases, kind)
        return y.view(*x.shape[:2], -1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: tuple[Tensor, Tensor],
        visible: Any,
        cache: Any,
        cache_position: Tensor | None,
        attention: Any,
    ) -> Tensor:
        """As the protocol says; what the kernel does not take goes through torch, cache and all.

        cache_position: the S places follow each other.
        """
        from gemmakit.pytorch.kernels.triton import launch

        room = None
        if not why_not(self.device) and _takes(q, tables, visible, attention):
            room = _room(q, k, cache, cache_position, attention)
        if room is not None:
            with suppress(Refused):
                return launch.attend(
                    q, k, v, tables, room, attention.head_dim, attention.scaling, visible.mask, visible.blind,
                    visible.causal,
                )  # fmt: skip
            if cache is not None and room.places is None:
                cache.layers[attention.layer_idx].crop(room.start)  # torch claims the places once more
        return attention.attend(q, k, v, tables, visible, cache, cache_position)[0]


def _norm(norm: Any) -> Norm:
    from gemmakit.pytorch.kernels.triton import launch

    return launch.Norm(norm.weight.detach(), norm.eps)


def _bias(module: Any) -> Tensor | None:
    return None if module.bias is None else module.bias.detach()


def _no_attention(attention: Any) -> str:
    """Why attention of this layer goes through torch, whatever comes; empty where it need not."""
    from gemmakit.pytorch.kernels.triton import launch

    kind, H = attention.config.attn_implementation, attention.head_dim
    if kind is not None and kind != "sdpa":
        return f"attn_implementation is {kind!r}"
    if H > launch.MAX_HEAD_DIM:
        return f"head_dim is {H}; the kernel takes up to {launch.MAX_HEAD_DIM}"
    return "head_dim is odd" if H % 2 else ""


def _takes(q: Tensor, tables: tuple[Tensor, Tensor], visible: Any, attention: Any) -> bool:
    """Whether the kernel reads these shapes and this description of who sees whom."""
    mask = visible.mask
    if _no_attention(attention) or visible.rule is not None or any(t.dtype != q.dtype for t in tables):
        return False
    B, S, _ = q.shape
    if S > 1 and B * S > MAX_ROWS:  # matrix work
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1 and mask.stride(3) == 1)


def _room(q: Tensor, k: Tensor, cache: Any, cache_position: Tensor | None, attention: Any) -> Room | None:
    """Room for the new keys where the kernel may write; None where torch must append."""
    from gemmakit.pytorch.cache.core import Cache, CacheLayer  # they stand above this module
    from gemmakit.pytorch.cache.paged import PagedCache
    from gemmakit.pytorch.kernels.triton.launch import Room

    (B, S, width), H = k.shape, attention.head_dim
    sizes = (B, width // H, H)
    if cache is None:
        keys, values = k.new_empty(2, B, sizes[1], S, H)
        return Room(keys, values)
    if type(cache) is PagedCache:
        return _pages(q, cache, attention.layer_idx)
    if type(cache).update is not Cache.update:
        return None
    held = cache.layer_for(attention.layer_idx, sizes)
    if type(held) is not CacheLayer or not held.fits(q):
        return None
    if cache_position is not None and cache.max_cache_len is not None:
        keys, values = held.claim_at(sizes, cache_position, k)
        return Room(keys, values, places=cache_position, most=keys.shape[2])
    keys, values, start, _ = held.claim(sizes, S, k)
    return Room(keys, values, start, most=start)


def _pages(q: Tensor, cache: Any, layer: int) -> Room | None:
    """The pages of the placed rows, read and written where they lie."""
    from gemmakit.pytorch.kernels.triton.launch import Room

    where, store = cache.placement, cache.storage[layer]
    if where is None or len(where.table) != q.shape[0] or len(where.places) != q.shape[0] * q.shape[1]:
        return None  # which the cache refuses in its own words
    if store.dtype != q.dtype or any(t.device != store.device for t in (where.table, where.lengths)):
        return None
    return Room(store[0], store[1], places=where.lengths, table=where.table, most=where.keys)
