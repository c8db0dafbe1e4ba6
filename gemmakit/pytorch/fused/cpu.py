"""A decoder layer on the CPU: five native calls, and three for an embedding of its own, which read each weight once for
all rows.

More rows than eight go through the same calls, a norm and a gate apart, where `takes_any_rows` is true of all weights,
or results must not depend on the number of rows; attention goes through torch then, but in pages.

Everything that a call needs and that stays the same is put together once a layer: pointers into the modules' own
tensors, nothing else. Axis letters: B batch, S positions, D hidden, F mlp, N heads, K kv heads, H head_dim, T keys.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.pytorch.attention import attend_pages, attends_pages, native_obstacle
from gemmakit.pytorch.cache.core import Cache
from gemmakit.pytorch.cache.paged import PagedCache
from gemmakit.pytorch.fused.reference import MAX_ROWS, FusedLayer, writable
from gemmakit.pytorch.fused.weights import is_summed, misfit, weight_of
from gemmakit.pytorch.kernels import Decision, PackedWeight, cpu, is_batch_invariant
from gemmakit.pytorch.kernels.linear import takes_any_rows, takes_many
from gemmakit.pytorch.kernels.reference import ACTIVATION_OF
from gemmakit.pytorch.layers import STREAM_SCALES, LayerNorms, LayerParts, RotaryTables, activated
from gemmakit.pytorch.masks import Visibility
from gemmakit.pytorch.shapes import Float, Int
from gemmakit.pytorch.shared_keys import KeyBuffers, SharedKeys

# Below so many bytes a second thread costs more than it saves; an output row takes the time of so many more.
ALONE, ROW = 1 << 18, 128


def fuse(parts: LayerParts, x: Tensor) -> FusedLayer | str:
    """What `decide.fused_layers` asks for: the form of this layer for activations like x, or why there is none."""
    if cpu.library() is None:
        return cpu.decision().why
    if x.dtype not in cpu.FORMATS:
        return f"no native kernels for {x.dtype}"
    for name, module in parts.projections():
        found, weight = misfit(module, x.dtype), weight_of(module)
        if not found and isinstance(weight, PackedWeight) and not cpu.reads(weight):
            found = f"with scales in {weight.scale.dtype}"
        if found:
            return f"{name} is {found}"
    for name, norm in parts.norm_modules():
        if norm.weight is not None and norm.weight.dtype not in cpu.FORMATS:
            return f"{name} is in {norm.weight.dtype}"
    return NativeLayer(parts, x.dtype)


class Stack:
    """Projections that share their input, as one native call takes them."""

    def __init__(self, *parts: nn.Module | None):
        """None for a projection that the layer does without."""
        modules = [module for module in parts if module is not None]
        weights = [(weight_of(m), m.bias) for m in modules]
        self.fastest = _matrices([cpu.matrix(weight, bias) for weight, bias in weights])  # type: ignore[arg-type]
        self.invariant = _matrices([cpu.matrix(w, b, getattr(w, "activation_bits", 0)) for w, b in weights])  # type: ignore[arg-type]
        self.count = len(weights)
        self.outs = [m.out for m in self.fastest]
        self.pointers = ctypes.c_void_p * self.count
        read = sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))
        self.small = read + ROW * sum(self.outs) < ALONE

    @property
    def matrices(self) -> ctypes.Array[cpu.Matrix]:
        return self.invariant if is_batch_invariant() else self.fastest

    @property
    def threads(self) -> int:
        return 1 if self.small else torch.get_num_threads()


def _matrices(matrices: list[cpu.Matrix]) -> ctypes.Array[cpu.Matrix]:
    return (cpu.Matrix * len(matrices))(*matrices)


class NativeLayer(FusedLayer):
    """The seams of one layer by native kernels, for as long as its tensors stay where they are."""

    def __init__(self, parts: LayerParts, dtype: torch.dtype):
        super().__init__(parts)
        library = cpu.library()
        assert library is not None
        self.library = library
        self.format = cpu.FORMATS[dtype]
        attention = parts.self_attn
        norms = attention.q_norm, attention.k_norm, attention.v_norm
        self.head_norms = tuple(native_norm(norm, dtype, attention.head_dim) for norm in norms)
        # As arrays of one, which a call takes as they are.
        self.norms = LayerNorms(*[norm and (cpu.Norm * 1)(native_norm(norm, dtype)) for norm in parts.norms])
        self.qkv = Stack(parts.q_proj, parts.k_proj, parts.v_proj)
        self.o, self.down = Stack(parts.o_proj), Stack(parts.down_proj)
        self.gate_up = Stack(parts.gate_proj, parts.up_proj)
        self.input_gate, self.input_projection = Stack(parts.per_layer_input_gate), Stack(parts.per_layer_projection)
        self.input_norm = (cpu.Norm * 1)(native_norm(parts.post_per_layer_input_norm, dtype))
        act = ACTIVATION_OF.get(parts.act_fn)
        self.act = act if act in cpu.ACTIVATIONS else None
        weights = [weight for _, module in parts.projections() if (weight := weight_of(module)) is not None]
        self.many = all(takes_any_rows(weight, dtype) for weight in weights)
        in_bytes = any(isinstance(weight, PackedWeight) and takes_many(weight, dtype) for weight in weights)
        self.products = "tiles" if cpu.multiplies_tiles(dtype) else "bytes" if in_bytes else "float32"
        self.decision = self._decision()

    @property
    def any_rows(self) -> bool:
        return self.many or is_batch_invariant()

    def _decision(self) -> Decision:
        why = native_obstacle(self.parts.self_attn)
        attention = f", attention by torch ({why})" if why else ""
        if is_summed(self.parts.o_proj):
            attention += ", o_proj and down_proj by their modules, which sum over processes"
        if is_batch_invariant():
            return Decision(f"{cpu.decision()}{attention}, without gradients, any number of rows alike")
        beyond = f"; beyond that too, in products of {self.products}" if self.many else ""
        return Decision(f"{cpu.decision()}{attention}, without gradients, up to {MAX_ROWS} rows{beyond}")

    def norm_qkv(
        self, x: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B S NH"], Float[Tensor, "B S KH"] | None, Float[Tensor, "B S KH"] | None]:
        q, *kv = self._norm_project(x, self.norms.before_attention, self.qkv)
        return (q, kv[0], kv[-1]) if kv else (q, None, None)

    def attention_add(
        self, attended: Float[Tensor, "B S NH"], residual: Float[Tensor, "B S D"]
    ) -> Float[Tensor, "B S D"]:
        if is_summed(self.parts.o_proj):
            return super().attention_add(attended, residual)
        return self._project_add(attended, self.o, self.norms.after_attention, residual)

    def mlp_add(self, gated: Float[Tensor, "B S F"], residual: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        if is_summed(self.parts.down_proj):
            return super().mlp_add(gated, residual)
        return self._project_add(gated, self.down, self.norms.after_mlp, residual)

    def input_add(self, inputs: Float[Tensor, "B S P"], residual: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        if self.act is None or residual.dtype in STREAM_SCALES:
            return super().input_add(inputs, residual)
        (gate,) = self._project(residual, self.input_gate)
        gated = self._gated(self.act, gate, inputs.contiguous())
        return self._project_add(gated, self.input_projection, self.input_norm, residual)

    def norm_gate_up(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S F"]:
        stack, act, norm = self.gate_up, self.act, self.norms.before_mlp
        B, S, _ = x.shape
        if act is None or B * S > cpu.MAX_ROWS:
            gate, up = self._norm_project(x, norm, stack)
            if act is not None:
                return self._gated(act, gate, up)
            return activated(self.parts.act_fn, gate) * up
        x, y = x.contiguous(), x.new_empty(B, S, stack.outs[0])
        failed = self.library.gemmakit_norm_gate_up(
            stack.matrices, self.format, x.data_ptr(), B * S, norm, act, y.data_ptr(), stack.threads
        )
        assert not failed, f"norm_gate_up takes 1 to {cpu.MAX_ROWS} rows, got {B * S}"
        return y

    def _gated(self, act: int, gate: Float[Tensor, "B S F"], up: Float[Tensor, "B S F"]) -> Float[Tensor, "B S F"]:
        """In the memory of `gate`."""
        at, threads = gate.data_ptr(), torch.get_num_threads()
        failed = self.library.gemmakit_gated(self.format, act, at, up.data_ptr(), at, gate.numel(), threads)
        assert not failed
        return gate

    def _norm_project(self, x: Float[Tensor, "B S D"], norm: Any, stack: Stack) -> list[Float[Tensor, "B S _"]]:
        B, S, D = x.shape
        if B * S > cpu.MAX_ROWS:
            return self._project(self._rms_norm(x, norm), stack)
        x, ys = x.contiguous(), [x.new_empty(B, S, out) for out in stack.outs]
        to = stack.pointers(*[y.data_ptr() for y in ys])
        failed = self.library.gemmakit_norm_project(
            stack.matrices, stack.count, self.format, x.data_ptr(), B * S, norm, to, stack.threads
        )
        assert not failed, f"norm_project takes 1 to {cpu.MAX_ROWS} rows, got {B * S} of {D}"
        return ys

    def _rms_norm(self, x: Float[Tensor, "B S D"], norm: Any) -> Float[Tensor, "B S D"]:
        x, D = x.contiguous(), x.shape[-1]
        y, threads = torch.empty_like(x), torch.get_num_threads()
        failed = self.library.gemmakit_rms_norm(
            self.format, x.data_ptr(), x.numel() // D, D, norm, None, y.data_ptr(), threads
        )
        assert not failed
        return y

    def _project_add(
        self, x: Float[Tensor, "B S I"], stack: Stack, norm: Any, residual: Float[Tensor, "B S D"]
    ) -> Float[Tensor, "B S D"]:
        residual = residual.contiguous()
        if norm is None:
            return self._project(x, stack, residual)[0]
        x, y, rows = x.contiguous(), torch.empty_like(residual), x.shape[0] * x.shape[1]
        failed = self.library.gemmakit_project_norm_add(
            stack.matrices, self.format, x.data_ptr(), rows, norm, residual.data_ptr(), y.data_ptr(), stack.threads
        )
        assert not failed, f"project_norm_add takes 1 to {cpu.MAX_ROWS} rows of these weights, got {rows}"
        return y

    def _project(
        self, x: Float[Tensor, "B S I"], stack: Stack, residual: Float[Tensor, "B S D"] | None = None
    ) -> list[Float[Tensor, "B S _"]]:
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

    def attend(
        self,
        q: Float[Tensor, "B S NH"],
        k: Float[Tensor, "B S KH"] | None,
        v: Float[Tensor, "B S KH"] | None,
        tables: RotaryTables,
        visible: Visibility,
        cache: Cache | None,
        cache_position: Int[Tensor, " S"] | None,
        shared: SharedKeys | None = None,
    ) -> Float[Tensor, "B S NH"]:
        """What the native kernel does not take goes through torch, cache and all."""
        B, S, width = q.shape
        attention = self.parts.self_attn
        H = attention.head_dim
        own = () if k is None or v is None else (k, v)
        if own and isinstance(cache, PagedCache) and attends_pages(attention, q, cache):
            return attend_pages(attention, q, cache, new=(*own, *tables), norms=self.head_norms)
        found = self._buffers(q, k, tables, visible, cache, cache_position, shared) if B * S <= cpu.MAX_ROWS else None
        if found is None:
            return super().attend(q, k, v, tables, visible, cache, cache_position, shared)
        keys, values, start, end, forgotten = found
        if shared is not None and own:
            shared.hold_buffers(attention.layer_idx, found)
        last = start + forgotten + S if visible.last is None else visible.last
        cos, sin = tables
        y = torch.empty_like(q)
        mask, blind = visible.mask, visible.blind
        call = cpu.Attention(
            B,
            S,
            width // H,
            keys.shape[1],
            H,
            end - last,
            end,
            start,
            keys.shape[2],
            S * H if cos.shape[0] > 1 else 0,
            *((0, 0) if mask is None else _steps(mask)),
            *((0, 0) if blind is None else _steps(blind)),
            q.data_ptr(),
            None if k is None else k.data_ptr(),
            None if v is None else v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            y.data_ptr(),
            None if mask is None else mask.data_ptr(),
            None if blind is None else blind.data_ptr(),
            *self.head_norms,
            self.format,
            visible.causal and mask is None,
            torch.get_num_threads(),
            attention.scaling,
            attention.softcap or 0.0,
            forgotten=forgotten,
        )
        failed = self.library.gemmakit_attend(ctypes.byref(call))
        assert not failed, f"attend takes 1 to {cpu.MAX_ROWS} positions, got {B} rows of {S}"
        return y

    def _buffers(
        self,
        q: Float[Tensor, "B S NH"],
        k: Float[Tensor, "B S KH"] | None,
        tables: RotaryTables,
        visible: Visibility,
        cache: Cache | None,
        cache_position: Int[Tensor, " S"] | None,
        shared: SharedKeys | None,
    ) -> KeyBuffers | None:
        """Where the kernel finds keys and values, its own with room for the new ones; None where torch must attend."""
        (B, S, _), attention = q.shape, self.parts.self_attn
        if native_obstacle(attention) or not all(t.dtype == q.dtype and t.is_contiguous() for t in tables):
            return None
        if k is None:
            found = None if shared is None else shared.buffers.get(attention.kv_layer)
            last = 0 if found is None else found.end + found.forgotten
            if found is None or not _says(visible, last if visible.last is None else visible.last):
                return None
            return found._replace(start=found.end - S)  # the queries may be the last ones alone
        sizes = (B, k.shape[2] // attention.head_dim, attention.head_dim)
        held = _plain_layer(cache, cache_position, attention, sizes, visible, S)
        past = 0 if held is None or held is NEW else int(held.length)
        if held is None or not _says(visible, past + S if visible.last is None else visible.last):
            return None
        if held is NEW:
            new = k.new_empty(2, B, sizes[1], S, sizes[2])
            return KeyBuffers(new[0], new[1], 0, S, 0)
        if not held.fits(q):
            return None
        keys, values, start, end = held.claim(sizes, S, k)
        return KeyBuffers(keys, values, start, end, held.forgotten)


def native_norm(norm: Any, dtype: torch.dtype, width: int = 0) -> cpu.Norm:
    """A GemmaRMSNorm of activations of `dtype`, so many wide if it has no weight; None is none."""
    if norm is None:
        return cpu.Norm()
    weight, offset = (_zeros(width), 1.0) if norm.weight is None else (norm.weight, norm.offset)
    return cpu.Norm(weight.data_ptr(), cpu.FORMATS[weight.dtype], norm.eps_of(dtype), norm.gain_of(dtype), offset)


@cache  # for ever: the kernels hold its address alone
def _zeros(width: int) -> Tensor:
    """What a norm without a weight multiplies by, less 1."""
    return torch.zeros(width, dtype=torch.float32, device="cpu")


# Stands for a cache layer where there is no cache: the new keys are all there are.
NEW = object()


def _plain_layer(
    cache: Any, cache_position: Tensor | None, attention: Any, sizes: tuple[int, int, int], visible: Visibility, S: int
) -> Any:
    """The cache layer whose buffers the kernel may write to; NEW without a cache, None where torch must attend."""
    if cache is None:
        return NEW
    placed = cache_position is not None and cache.max_cache_len is not None
    if placed or type(cache).update is not Cache.update:
        return None
    held = cache.layer_for(attention.layer_idx, sizes)
    return held if writable(held, visible, S) else None


def _says(visible: Any, last: int) -> bool:
    """Whether the kernel reads this description of who sees whom of the last so many keys: nothing, or one bool for all
    heads.
    """
    mask = visible.mask
    if visible.rule is not None:
        return False
    return mask is None or (
        mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[3] == last and mask.stride(3) == 1
    )


def _steps(mask: Tensor) -> tuple[int, int]:
    """From row to row and from query to query of a mask (B or 1, 1, S or 1, ...), in bytes."""
    return mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2) if mask.shape[2] > 1 else 0
