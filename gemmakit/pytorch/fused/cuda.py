"""A decoder layer on CUDA: five Triton kernels, one more where attention is divided among many programs, and one for
each norm of what attention or the MLP gives. Values are normed by their module, an embedding that the layer has of its
own is added by its modules, and a layer that reads the keys of another attends by torch.

Axis letters: B batch, S positions, D hidden, F mlp, N heads, K kv heads, H head_dim, T keys.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.pytorch.cache.core import Cache
from gemmakit.pytorch.cache.paged import PagedCache
from gemmakit.pytorch.fused.reference import FusedLayer, writable
from gemmakit.pytorch.fused.weights import is_summed, misfit, weight_of
from gemmakit.pytorch.kernels import Decision, PackedWeight
from gemmakit.pytorch.kernels.reference import ACTIVATION_OF
from gemmakit.pytorch.kernels.triton import BITS, DTYPES, MAX_ROWS, Refused, available, decision, launch
from gemmakit.pytorch.kernels.triton.launch import Norm, Operand, Room
from gemmakit.pytorch.layers import LayerParts
from gemmakit.pytorch.masks import Visibility
from gemmakit.pytorch.shared_keys import SharedKeys


def fuse(parts: LayerParts, x: Tensor) -> FusedLayer | str:
    """What `decide.fused_layers` asks for: the form of this layer for activations like x, or why there is none."""
    why = decision(x.device).why
    if why:
        return why
    if x.dtype not in DTYPES:
        return f"no Triton kernels for {x.dtype}"
    for name, module in parts.projections():
        found = misfit(module, x.dtype) or ("summed over processes" if is_summed(module) else "")
        weight = weight_of(module)
        if isinstance(weight, PackedWeight) and weight.bits not in BITS:
            found = found or f"in {weight.bits} bits, which no Triton kernel reads"
        if found:
            return f"{name} is {found}"
    return TritonLayer(parts, x)


class TritonLayer(FusedLayer):
    """The seams of one layer by Triton kernels, for as long as its tensors stay where they are.

    More rows than MAX_ROWS are matrix work, for which the projections' modules are called between fused norms and
    gates; keys and values are read where they lie by any number of rows of one position each. A kernel that does not
    start gives way to the modules too.
    """

    def __init__(self, parts: LayerParts, x: Tensor):
        super().__init__(parts)
        self.device = x.device
        operands = {name: _operand(module) for name, module in parts.projections()}
        self.qkv = [operands[name] for name in ("q_proj", "k_proj", "v_proj") if name in operands]
        self.gate_up = [operands["gate_proj"], operands["up_proj"]]
        self.o, self.down = operands["o_proj"], operands["down_proj"]
        why = _no_attention(parts.self_attn)
        attention = f", attention by torch ({why})" if why else ""
        beyond = "beyond that modules between fused norms and gates"
        self.decision = Decision(f"Triton{attention}, without gradients, up to {MAX_ROWS} rows; {beyond}")

    def _fits(self, x: Tensor) -> bool:
        """Whether the kernels that read weights take x (B, S, ...)."""
        return x.shape[0] * x.shape[1] <= MAX_ROWS and available(self.device)

    def norm_qkv(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """In one launch when the weights have one format."""
        p = self.parts
        with suppress(Refused):
            if self._fits(x):
                modules = tuple(module for module in (p.q_proj, p.k_proj, p.v_proj) if module is not None)
                q, *kv = self._norm_project(x, p.norms.before_attention, self.qkv, modules)
                return (q, kv[0], kv[-1]) if kv else (q, None, None)
        return p.self_attn.project(self._normed(x, p.norms.before_attention))

    def _norm_project(
        self, x: Tensor, norm: nn.Module, weights: list[Operand], modules: tuple[nn.Module, ...]
    ) -> list[Tensor]:
        rows, first, biases = x.flatten(0, 1), _norm(norm, x.dtype), [_bias(m) for m in modules]
        if launch.alike(weights):
            ys = launch.project(rows, weights, biases, first)
        else:
            ys = [launch.project(rows, [w], [b], first)[0] for w, b in zip(weights, biases, strict=True)]
        return [y.view(*x.shape[:2], -1) for y in ys]

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        if available(self.device):
            with suppress(Refused):
                weight, eps, _, offset = _norm(norm, x.dtype)
                return launch.rms_norm_saving(x, weight, eps, offset)[0]
        return norm(x)

    def attention_add(self, attended: Tensor, residual: Tensor) -> Tensor:
        return self._project_add(attended, self.o, self.parts.o_proj, self.parts.norms.after_attention, residual)

    def mlp_add(self, gated: Tensor, residual: Tensor) -> Tensor:
        return self._project_add(gated, self.down, self.parts.down_proj, self.parts.norms.after_mlp, residual)

    def _project_add(
        self, x: Tensor, weight: Operand, module: nn.Module, norm: nn.Module | None, residual: Tensor
    ) -> Tensor:
        """A norm follows in a launch of its own: it reads a whole row, of which many programs made parts."""
        y = None
        with suppress(Refused):
            if self._fits(x):
                rows, added = x.flatten(0, 1), residual.flatten(0, 1) if norm is None else None
                y = launch.project(rows, [weight], [_bias(module)], residual=added)[0].view_as(residual)
        if norm is None:
            return residual + module(x) if y is None else y
        y = module(x) if y is None else y
        if available(self.device):
            with suppress(Refused):
                return launch.norm_add(y, _norm(norm, y.dtype), residual)
        return residual + norm(y)

    def norm_gate_up(self, x: Tensor) -> Tensor:
        """An activation that no kernel has follows the projections."""
        p, act = self.parts, ACTIVATION_OF.get(self.parts.act_fn)
        modules = (p.gate_proj, p.up_proj)
        with suppress(Refused):
            if self._fits(x) and (act is None or not launch.alike(self.gate_up)):
                ys = self._norm_project(x, p.norms.before_mlp, self.gate_up, modules)
                return p.act_fn(ys[0]) * ys[1]
            if self._fits(x) and act is not None:
                biases = (_bias(p.gate_proj), _bias(p.up_proj))
                gate, up = self.gate_up
                y = launch.gate_up(x.flatten(0, 1), _norm(p.norms.before_mlp, x.dtype), gate, up, biases, act)
                return y.view(*x.shape[:2], -1)
        h = self._normed(x, p.norms.before_mlp)
        return self._gated(p.gate_proj(h), p.up_proj(h))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        act = ACTIVATION_OF.get(self.parts.act_fn)
        if act is not None and available(self.device):
            with suppress(Refused):
                return launch.gated(gate, up, act)
        return self.parts.act_fn(gate) * up

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        tables: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: Cache | None,
        cache_position: Tensor | None,
        shared: SharedKeys | None = None,
    ) -> Tensor:
        """What the kernel does not take goes through torch, cache and all.

        cache_position: the S places follow each other.
        """
        attention, room = self.parts.self_attn, None
        if k is None or v is None:
            return super().attend(q, k, v, tables, visible, cache, cache_position, shared)
        leaves = shared is not None and attention.layer_idx in shared.sources
        if available(self.device) and _takes(q, tables, visible, attention):
            in_pages = leaves and type(cache) is PagedCache  # where others could not read them as they lie
            room = None if in_pages else _room(q, k, cache, cache_position, attention, visible)
        if room is not None:
            with suppress(Refused):
                if shared is not None and leaves:
                    end = room.keys.shape[2] if room.places is not None else room.start + k.shape[1]
                    shared.hold(attention.layer_idx, room.keys[:, :, :end], room.values[:, :, :end])
                values = v if attention.v_norm is None else attention.v_norm(v.unflatten(-1, (-1, attention.head_dim)))
                return launch.attend(
                    q, k, values.view_as(v), tables, room, attention.head_dim, attention.scaling, visible.mask,
                    visible.blind, visible.causal, last=visible.last, reach=visible.reach, softcap=attention.softcap,
                    q_norm=attention.q_norm and _norm(attention.q_norm, q.dtype),
                    k_norm=attention.k_norm and _norm(attention.k_norm, k.dtype),
                )  # fmt: skip
            if cache is not None and room.places is None:
                layer = cache.layers[attention.layer_idx]
                layer.crop(int(layer.length) - k.shape[1])  # torch claims the places once more
        return super().attend(q, k, v, tables, visible, cache, cache_position, shared)


def _operand(module: nn.Module) -> Operand:
    weight = weight_of(module)
    assert weight is not None
    return launch.operand(weight.detach() if isinstance(weight, Tensor) else weight)


def _norm(norm: Any, dtype: torch.dtype) -> Norm:
    return Norm(norm.weight.detach(), norm.eps_of(dtype), norm.gain_of(dtype), norm.offset)


def _bias(module: Any) -> Tensor | None:
    return None if module.bias is None else module.bias.detach()


def _no_attention(attention: Any) -> str:
    """Why attention of this layer goes through torch, whatever comes; empty where it need not."""
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


def _room(
    q: Tensor, k: Tensor, cache: Any, cache_position: Tensor | None, attention: Any, visible: Visibility
) -> Room | None:
    """Room for the new keys where the kernel may write; None where torch must append."""
    (B, S, width), H = k.shape, attention.head_dim
    sizes = (B, width // H, H)
    if cache is None:
        keys, values = k.new_empty(2, B, sizes[1], S, H)
        return Room(keys, values)
    if type(cache) is PagedCache:
        return None if cache.packed else _pages(q, cache, attention.layer_idx)
    if type(cache).update is not Cache.update:
        return None
    held = cache.layer_for(attention.layer_idx, sizes)
    if not writable(held, visible, S) or not held.fits(q):
        return None
    if cache_position is not None and cache.max_cache_len is not None:
        keys, values = held.claim_at(sizes, cache_position, k)
        return Room(keys, values, places=cache_position, most=keys.shape[2])
    keys, values, start, _ = held.claim(sizes, S, k)
    return Room(keys, values, start, most=start)


def _pages(q: Tensor, cache: Any, layer: int) -> Room | None:
    """The pages of the placed rows, read and written where they lie."""
    where, store = cache.placement_of(layer), cache.storage[layer]
    if where is None or len(where.table) != q.shape[0] or len(where.places) != q.shape[0] * q.shape[1]:
        return None  # which the cache refuses in its own words
    if store.dtype != q.dtype or any(t.device != store.device for t in (where.table, where.lengths)):
        return None
    return Room(store[0], store[1], places=where.lengths, table=where.table, most=where.keys)
