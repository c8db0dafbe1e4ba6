"""The seams of a decoder layer on the CPU: five native calls, which read each weight once for all rows.

More rows than eight go through the same calls, a norm and a gate apart, where all weights are codes that are multiplied
in bytes; attention goes through torch then.

Everything that a call needs and that stays the same is put together once a layer: pointers into the modules' own
tensors, nothing else. Axis letters: B batch, S positions, D hidden, F mlp, N heads, K kv heads, H head_dim, T keys.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.kernels.packed import PackedWeight
from gemmakit.pytorch.kernels.quantized import takes_bytes
from gemmakit.pytorch.kernels.reference import ACTIVATION_OF
from gemmakit.pytorch.kernels.seams import PROJECTIONS, Seams, weight_of

# Below so many bytes a second thread costs more than it saves.
ALONE = 1 << 18
_LONGS = ("B", "S", "N", "K", "H", "T", "start", "capacity", "table_row", "mask_row", "mask_query", "blind_row",
          "blind_query")  # fmt: skip
_POINTERS = ("q", "k", "v", "cos", "sin", "keys", "values", "y", "mask", "blind")
_INTS = ("format", "causal", "threads")


class Attention(ctypes.Structure):
    """native.h's Attention."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _LONGS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int32) for name in _INTS),
        ("scale", ctypes.c_float),
    )


def fused(layer: nn.Module, x: Tensor) -> Seams | str:
    """What `kernels.seams.FORMS` asks for: the seams of this layer for activations like x, or why there are none."""
    if cpu.library() is None:
        return f"native kernels: {cpu.why_not()}"
    if x.dtype not in cpu.FORMATS:
        return f"no native kernels for {x.dtype}"
    for name, module in layer.named_modules():
        last = name.rpartition(".")[2]
        found = _unfit(module, x.dtype) if last in PROJECTIONS else ""
        if last.endswith("layernorm") and module.weight.dtype not in cpu.FORMATS:
            found = f"in {module.weight.dtype}"
        if found:
            return f"{last} is {found}"
    return NativeSeams(layer, x.dtype)


def _unfit(module: nn.Module, dtype: torch.dtype) -> str:
    """Why the native kernels do not multiply by this weight."""
    weight, bias = weight_of(module), module.bias
    if isinstance(weight, PackedWeight):
        parts = list(weight.tensors)
    else:
        assert weight is not None
        parts = [weight]
        if weight.dtype != dtype:
            return f"in {weight.dtype} and the activations in {dtype}"
    if isinstance(bias, Tensor):
        parts.append(bias)
        if bias.dtype != dtype:
            return f"with a bias in {bias.dtype} and the activations in {dtype}"
    return "" if all(t.is_contiguous() for t in parts) else "not contiguous"


class Stack:
    """Projections that share their input, as one native call takes them."""

    def __init__(self, modules: tuple[nn.Module, ...]):
        matrices = [cpu.matrix(weight_of(m), m.bias) for m in modules]  # type: ignore[arg-type]
        self.matrices = (cpu.Matrix * len(matrices))(*matrices)
        self.count = len(matrices)
        self.outs = [m.out for m in matrices]
        self.pointers = ctypes.c_void_p * self.count
        size = sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))
        self.small = size < ALONE

    @property
    def threads(self) -> int:
        return 1 if self.small else torch.get_num_threads()


class NativeSeams:
    """The fused forms of one layer, for as long as its tensors stay where they are."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        library = cpu.library()
        assert library is not None
        self.library = library
        self.name = f"native {cpu.instruction_set()}"
        self.format = cpu.FORMATS[dtype]
        self.stacks: dict[tuple[nn.Module, ...], Stack] = {}
        self.any_rows = all(
            isinstance(weight := weight_of(module), PackedWeight) and takes_bytes(weight)
            for name, module in layer.named_modules()
            if name.rpartition(".")[2] in PROJECTIONS
        )
        why = _no_native_attention(layer.get_submodule("self_attn"))
        self.plan = f"{self.name}, attention by torch ({why})" if why else self.name
        self.beyond = "; beyond that too, in products of bytes" if self.any_rows else ""

    def _stack(self, *modules: nn.Module) -> Stack:
        found = self.stacks.get(modules)
        if found is None:
            found = self.stacks[modules] = Stack(modules)
        return found

    def norm_qkv(
        self, x: Tensor, norm: Any, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._norm_project(x, norm, self._stack(q_proj, k_proj, v_proj))
        return q, k, v

    def _norm_project(self, x: Tensor, norm: Any, stack: Stack) -> list[Tensor]:
        B, S, D = x.shape
        if B * S > cpu.MAX_ROWS:
            return self._project(self._norm(x, norm), stack)
        x, weight = x.contiguous(), norm.weight
        ys = [x.new_empty(B, S, out) for out in stack.outs]
        failed = self.library.gemmakit_norm_project(
            stack.matrices,
            stack.count,
            self.format,
            x.data_ptr(),
            B * S,
            cpu.FORMATS[weight.dtype],
            weight.data_ptr(),
            norm.eps,
            stack.pointers(*[y.data_ptr() for y in ys]),
            stack.threads,
        )
        assert not failed, f"norm_project takes 1 to {cpu.MAX_ROWS} rows, got {B * S} of {D}"
        return ys

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        x, weight = x.contiguous(), norm.weight
        y, D = torch.empty_like(x), x.shape[-1]
        kind, threads = cpu.FORMATS[weight.dtype], torch.get_num_threads()
        failed = self.library.gemmakit_rms_norm(
            self.format, x.data_ptr(), x.numel() // D, D, kind, weight.data_ptr(), norm.eps, y.data_ptr(), threads
        )
        assert not failed
        return y

    def _project(self, x: Tensor, stack: Stack, residual: Tensor | None = None) -> list[Tensor]:
        B, S, _ = x.shape
        x = x.contiguous()
        ys = [x.new_empty(B, S, out) for out in stack.outs]
        failed = self.library.gemmakit_project(
            stack.matrices,
            stack.count,
            self.format,
            x.data_ptr(),
            B * S,
            stack.pointers(*[y.data_ptr() for y in ys]),
            None if residual is None else residual.data_ptr(),
            stack.threads,
        )
        assert not failed, f"project takes 1 to {cpu.MAX_ROWS} rows of these weights, got {B * S}"
        return ys

    def project_add(self, x: Tensor, projection: nn.Module, residual: Tensor) -> Tensor:
        return self._project(x, self._stack(projection), residual.contiguous())[0]

    def norm_gate_up(
        self, x: Tensor, norm: Any, gate: nn.Module, up: nn.Module, act: Callable[[Tensor], Tensor]
    ) -> Tensor:
        stack = self._stack(gate, up)
        kind = ACTIVATION_OF.get(act)
        kind = kind if kind in cpu.ACTIVATIONS else None
        B, S, _ = x.shape
        if kind is None or B * S > cpu.MAX_ROWS:
            gated, passed = self._norm_project(x, norm, stack)
            return act(gated) * passed if kind is None else self._gate(kind, gated, passed)
        x, weight = x.contiguous(), norm.weight
        y = x.new_empty(B, S, stack.outs[0])
        failed = self.library.gemmakit_norm_gate_up(
            stack.matrices,
            self.format,
            x.data_ptr(),
            B * S,
            cpu.FORMATS[weight.dtype],
            weight.data_ptr(),
            norm.eps,
            kind,
            y.data_ptr(),
            stack.threads,
        )
        assert not failed, f"norm_gate takes 1 to {cpu.MAX_ROWS} rows, got {B * S}"
        return y

    def _gate(self, kind: int, gated: Tensor, passed: Tensor) -> Tensor:
        """In the memory of `gated`."""
        at, threads = gated.data_ptr(), torch.get_num_threads()
        failed = self.library.gemmakit_gated(self.format, kind, at, passed.data_ptr(), at, gated.numel(), threads)
        assert not failed
        return gated

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
        """As the protocol says; what the native kernel does not take goes through torch, cache and all."""
        B, S, width = q.shape
        H = attention.head_dim
        if B * S > cpu.MAX_ROWS:
            return attention.attend(q, k, v, tables, visible, cache, cache_position)[0]
        sizes = (B, k.shape[2] // H, H)
        held = _plain_layer(cache, cache_position, attention, sizes)
        past = 0 if held is None or held is NEW else int(held.length)
        if held is None or not _says(visible, past + S) or not _fit(q, tables, held):
            return attention.attend(q, k, v, tables, visible, cache, cache_position)[0]
        if held is NEW:
            keys, values = k.new_empty(B, sizes[1], S, H), k.new_empty(B, sizes[1], S, H)
            start, end = 0, S
        else:
            keys, values, start, end = held.claim(sizes, S, k)
        cos, sin = tables
        y = torch.empty_like(q)
        mask, blind = visible.mask, visible.blind
        call = Attention(
            B,
            S,
            width // H,
            sizes[1],
            H,
            end,
            start,
            keys.shape[2],
            S * H if cos.shape[0] > 1 else 0,
            *((0, 0) if mask is None else _steps(mask)),
            *((0, 0) if blind is None else _steps(blind)),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            y.data_ptr(),
            None if mask is None else mask.data_ptr(),
            None if blind is None else blind.data_ptr(),
            self.format,
            visible.causal and mask is None,
            torch.get_num_threads(),
            attention.scaling,
        )
        failed = self.library.gemmakit_attend(ctypes.byref(call))
        assert not failed, f"attend takes 1 to {cpu.MAX_ROWS} positions, got {B} rows of {S}"
        return y


# Stands for a cache layer where there is no cache: the new keys are all there are.
NEW = object()


def _no_native_attention(attention: Any) -> str:
    """Why attention of this layer goes through torch, as it now is; empty where it need not."""
    kind = attention.config.attn_implementation
    if kind is not None and kind != "sdpa":
        return f"attn_implementation is {kind!r}"
    return "head_dim is odd" if attention.head_dim % 2 else ""


def _plain_layer(cache: Any, cache_position: Tensor | None, attention: Any, sizes: tuple[int, int, int]) -> Any:
    """The cache layer whose buffers the kernel may write to; NEW without a cache, None where torch must attend."""
    if _no_native_attention(attention):
        return None
    if cache is None:
        return NEW
    placed = cache_position is not None and cache.max_cache_len is not None
    plain_cache, plain_layer = _plain_caches()
    if placed or type(cache).update is not plain_cache.update:
        return None
    held = cache.layer_for(attention.layer_idx, sizes)
    return held if type(held) is plain_layer else None


@functools.cache
def _plain_caches() -> tuple[Any, Any]:
    from gemmakit.pytorch.cache import Cache  # it stands above this module
    from gemmakit.pytorch.cache.core import CacheLayer

    return Cache, CacheLayer


def _says(visible: Any, T: int) -> bool:
    """Whether the kernel reads this description of who sees whom: nothing, or one bool for all heads."""
    mask = visible.mask
    if visible.rule is not None:
        return False
    return mask is None or (
        mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[3] == T and mask.stride(3) == 1
    )


def _fit(q: Tensor, tables: tuple[Tensor, Tensor], held: Any) -> bool:
    """Whether tables and cache have the activations' format and lie as the kernel reads them."""
    if not all(t.dtype == q.dtype and t.is_contiguous() for t in tables):
        return False
    return held is NEW or held.fits(q)


def _steps(mask: Tensor) -> tuple[int, int]:
    """From row to row and from query to query of a mask (B or 1, 1, S or 1, ...), in bytes."""
    return mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2) if mask.shape[2] > 1 else 0
