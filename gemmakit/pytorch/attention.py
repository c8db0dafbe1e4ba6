"""Attention: one signature, an eager reference, the fast paths behind it, and the module around them.

Axis letters: B batch, S query positions, T key positions, N query heads, K kv heads, H head_dim, D hidden.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError, InputError, MissingDependency
from gemmakit.pytorch.cache.core import Cache
from gemmakit.pytorch.cache.paged import PagedCache
from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.kernels.reference import rotate
from gemmakit.pytorch.layers import GemmaRMSNorm, Linear, RotaryTables
from gemmakit.pytorch.masks import Rule, Visibility, visibility
from gemmakit.pytorch.shapes import Bool, Float, Int
from gemmakit.pytorch.shared_keys import SharedKeys


@runtime_checkable
class Attend(Protocol):
    def __call__(
        self,
        q: Float[Tensor, "B N S H"],
        k: Float[Tensor, "B K T H"],
        v: Float[Tensor, "B K T H"],
        visible: Visibility,
        *,
        scale: float,
        dropout: float,
        softcap: float | None,
    ) -> tuple[Float[Tensor, "B N S H"], Float[Tensor, "B N S T"] | None]: ...


def eager(
    q: Float[Tensor, "B N S H"],
    k: Float[Tensor, "B K T H"],
    v: Float[Tensor, "B K T H"],
    visible: Visibility,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "B N S H"], Float[Tensor, "B N S T"]]:
    """Grouped-query attention written out: query head n reads kv head n // (N // K).

    softcap: scores are capped before the mask, see `capped`; None for no cap.
    Returns the output and the weights. A query that may look nowhere gets zeros, in both.
    Softmax in float32. Source: arXiv:1911.02150, arXiv:2305.13245.
    """
    B, N, S, H = q.shape
    K, T = k.shape[1], k.shape[2]
    # The heads that share a key stand below each other as rows: no key is copied.
    scores = (q.reshape(B, K, N // K * S, H) @ k.transpose(2, 3)).view(B, N, S, T) * scale
    scores = capped(scores, softcap)
    mask = visible.mask
    if mask is None and visible.causal:
        mask = torch.ones(S, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    if visible.blind is not None:
        weights = weights.masked_fill(visible.blind, 0.0)
    weights = F.dropout(weights, dropout) if dropout else weights
    out = (weights.reshape(B, K, N // K * S, T) @ v).view(B, N, S, H)
    return out, weights


def capped(x: Float[Tensor, "*any"], cap: float | None) -> Float[Tensor, "*any"]:
    """cap * tanh(x / cap), each step rounded; x itself where there is no cap. Source: arXiv:2408.00118."""
    return x if cap is None else torch.tanh(x / cap) * cap


def sdpa(
    q: Float[Tensor, "B N S H"],
    k: Float[Tensor, "B K T H"],
    v: Float[Tensor, "B K T H"],
    visible: Visibility,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "B N S H"], None]:
    """The same through torch's fused kernels; no weights come back. They cannot cap scores: those run as `eager`."""
    told: Any = {"scale": scale, "dropout": dropout, "softcap": softcap}
    if visible.segments is not None:
        alone, lengths = visible._replace(segments=None), list(visible.segments)
        parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2), strict=True)
        return torch.cat([sdpa(a, b, c, alone, **told)[0] for a, b, c in parts], dim=2), None
    if softcap is not None:
        return eager(q, k, v, visible, **told)[0], None
    B, N, S, H = q.shape
    K = k.shape[1]
    mask = visible.mask if visible.mask is None or visible.mask.dtype == torch.bool else visible.mask.to(q.dtype)
    if S == 1 and K < N and (mask is None or mask.shape[1] == 1):
        # One query position: the heads of a group are rows of one attention, which reads each key once.
        out = F.scaled_dot_product_attention(q.view(B, K, N // K, H), k, v, mask, dropout, scale=scale)
        out = out.view(B, N, S, H)
    else:
        causal = visible.causal and mask is None
        k, v = _shared(k, N), _shared(v, N)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale)
    if visible.blind is not None:
        out = out.masked_fill(visible.blind, 0.0)
    return out, None


def _shared(x: Float[Tensor, "B K T H"], heads: int) -> Float[Tensor, "B N T H"]:
    """Each kv head standing for its group; a single head is not copied."""
    K = x.shape[1]
    if heads == K:
        return x
    return x.expand(-1, heads, -1, -1) if K == 1 else x.repeat_interleave(heads // K, dim=1)


class Sequences(NamedTuple):
    """The tokens that are not padding, laid end to end: which of B * S they are, where each sequence begins."""

    tokens: Int[Tensor, " n"]
    starts: Int[Tensor, " sequences+1"]  # int32
    longest: int


def flash(
    q: Float[Tensor, "B N S H"],
    k: Float[Tensor, "B K T H"],
    v: Float[Tensor, "B K T H"],
    visible: Visibility,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "B N S H"], None]:
    """Through the flash_attn package: padding is left out of the computation, and its queries give zeros.

    What that package cannot say (the caller's own 4-D mask, places given by a tensor) runs as `sdpa`.
    Raises InputError for float32. Source: arXiv:2205.14135, arXiv:2307.08691.
    """
    rule = None if visible.rule is None else visible.rule.to(q.device)
    if rule is None or not isinstance(rule.past, int):
        visible = visible if rule is None else rule.memo("masked", rule.masked)
        return sdpa(q, k, v, visible, scale=scale, dropout=dropout, softcap=softcap)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(
            f"flash_attention_2 computes in float16 or bfloat16 and this model in {q.dtype}: load it with "
            'dtype=torch.bfloat16, or use set_attn_implementation("sdpa").'
        )
    import flash_attn  # type: ignore[import-not-found]

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    told: dict[str, Any] = {"dropout_p": dropout, "softmax_scale": scale, "causal": rule.causal}
    if softcap is not None:
        told["softcap"] = softcap
    if rule.window is not None:  # counted without the query itself
        told["window_size"] = (rule.window - 1, 0 if rule.causal else rule.window - 1)
    if rule.padding is None and rule.documents is None:
        return flash_attn.flash_attn_func(q, k, v, **told).transpose(1, 2), None
    asked, held = rule.memo("sequences", lambda: _sequences(rule))
    packed = flash_attn.flash_attn_varlen_func(
        q.flatten(0, 1)[asked.tokens],
        k.flatten(0, 1)[held.tokens],
        v.flatten(0, 1)[held.tokens],
        asked.starts,
        held.starts,
        asked.longest,
        held.longest,
        **told,
    )
    out = torch.zeros_like(q).flatten(0, 1).index_copy(0, asked.tokens, packed)
    return out.view(q.shape).transpose(1, 2), None


def _sequences(rule: Rule) -> tuple[Sequences, Sequences]:
    """Queries and keys without padding, a row (or a packed document) a sequence."""
    if rule.documents is None:
        assert rule.padding is not None
        return _laid_out(rule.padding[:, rule.keys - rule.queries :]), _laid_out(rule.padding)
    rows = len(rule.documents if rule.padding is None else rule.padding)
    row = torch.arange(rows, device=rule.device)[:, None] * rule.queries  # a document's number is below that
    sequence = (rule.documents.to(rule.device) + row).flatten()
    tokens = torch.arange(len(sequence), device=rule.device)
    tokens = tokens if rule.padding is None else tokens[rule.padding.flatten()]
    first = F.pad(sequence[tokens].diff() != 0, (1, 0), value=True)
    starts = F.pad(first.nonzero().flatten(), (0, 1), value=first.numel()).int()
    both = Sequences(tokens, starts, int(starts.diff().max()))
    return both, both


def _laid_out(real: Bool[Tensor, "B T"]) -> Sequences:
    lengths = real.sum(-1)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    return Sequences(real.flatten().nonzero().flatten(), starts, int(lengths.max()))


def flex(
    q: Float[Tensor, "B N S H"],
    k: Float[Tensor, "B K T H"],
    v: Float[Tensor, "B K T H"],
    visible: Visibility,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "B N S H"], None]:
    """Through torch's flex_attention, compiled on an accelerator: blocks that nobody may see are skipped.

    What it cannot do (dropout, gradients on the CPU), and the caller's own 4-D mask, runs as `sdpa`.
    Source: arXiv:2412.05496.
    """
    rule = None if visible.rule is None else visible.rule.to(q.device)
    differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if rule is None or dropout or (differentiates and q.device.type == "cpu"):
        visible = visible if rule is None else rule.memo("masked", rule.masked)
        return sdpa(q, k, v, visible, scale=scale, dropout=dropout, softcap=softcap)
    blocks = rule.memo("blocks", lambda: _blocks(rule, q.shape[0]))
    told: dict[str, Any] = {"block_mask": blocks, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if softcap is not None:
        told["score_mod"] = lambda score, b, h, i, j: capped(score, softcap)
    return _flex_kernel(q.device)(q, k, v, **told), None


def _flex_kernel(device: torch.device) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device.type == "cpu" or torch.compiler.is_compiling() else _compiled_flex()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _blocks(rule: Rule, batch: int) -> Any:
    """The block mask of a rule, under which blind queries get zeros by themselves; None when all see all."""
    from torch.nn.attention.flex_attention import create_block_mask

    last = rule.queries == 1 and isinstance(rule.past, int)
    if rule.padding is None and rule.documents is None and rule.window is None and (not rule.causal or last):
        return None

    def place(i: Tensor) -> Tensor:
        return i + rule.past if isinstance(rule.past, int) else rule.past[i]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ok = j >= 0
        if rule.causal:
            ok = ok & (j <= place(i))
        if rule.window is not None:
            ok = ok & (j > place(i) - rule.window)
            ok = ok if rule.causal else ok & (j < place(i) + rule.window)
        if rule.padding is not None:
            ok = ok & rule.padding[b, j]
        if rule.documents is not None:
            ok = ok & (rule.documents[b, i] == rule.documents[b, j])
        return ok

    return create_block_mask(seen, batch, None, rule.queries, rule.keys, device=str(rule.device))


def by_spans(
    attend: Attend, q: Float[Tensor, "1 N S H"], cache: PagedCache, layer_idx: int, **told: Any
) -> Float[Tensor, "1 N S H"]:
    """The queries of a packed pass, those of each span over what its pages hold by now."""
    where, window = cache.placement, cache.windows[layer_idx]
    assert where is not None
    out, at = [], 0
    for row, span in enumerate(where.spans):
        start, end = span.start, span.end
        count = end - start
        visible = visibility(
            None,
            batch=1,
            queries=count,
            keys=end,
            past=start,
            causal=True,
            position_ids=None,
            device=q.device,
            window=window,
            dense=attend not in (flash, flex),
        )
        k, v = cache.read(layer_idx, row, end, visible.last or end)
        out.append(attend(q[:, :, at : at + count].clone(), k, v, visible, **told)[0])
        at += count
    return torch.cat(out, dim=2)


def attends_pages(attention: GemmaAttention, q: Tensor, cache: PagedCache) -> bool:
    """Whether a packed pass attends by the native kernel, which reads the pages where they lie: in place of torch's own
    alone, without gradients, whose order of sums depends on threads and rows.
    """
    return (
        cache.packed
        and not native_obstacle(attention)
        and not (attention.training and attention.attention_dropout)
        and cpu.library() is not None
        and q.dtype in cpu.FORMATS
        and q.dtype == cache.storage[attention.kv_layer].dtype
        and q.is_cpu
        and not torch.is_grad_enabled()
    )


def native_obstacle(attention: GemmaAttention) -> str:
    """Why attention of this layer goes through torch, as it now is; empty where it need not."""
    name = attention.config.attn_implementation
    if IMPLEMENTATIONS[name or "sdpa"] is not sdpa:
        return f"attn_implementation is {name!r}"
    return "head_dim is odd" if attention.head_dim % 2 else ""


def attend_pages(
    attention: GemmaAttention,
    q: Float[Tensor, "1 S NH"],
    cache: PagedCache,
    new: tuple[Tensor, ...] = (),
    norms: tuple[cpu.Norm, ...] = (),
) -> Float[Tensor, "1 S NH"]:
    """The queries of a packed pass over their rows' pages.

    new: keys and values (1, S, KH) that are not yet in the pages, cos and sin (1, 1, S, H); q and these keys are normed
    and turned then.
    """
    layer, (_, S, _), H = attention.kv_layer, q.shape, attention.head_dim
    where, window = cache.placed(1, S), cache.windows[layer]
    assert where.starts is not None
    rows = [t.to(q.dtype).contiguous().view(S, -1, H) for t in (q, *new)]
    told: dict[str, Any] = {"scale": attention.scaling, "softcap": attention.softcap, "window": window}
    store = cache.storage[layer]
    out = cpu.attend_pages(rows[0], store, where.table, where.starts, where.lengths, new=rows[1:], norms=norms, **told)
    return out.view(q.shape)


IMPLEMENTATIONS: dict[str, Attend] = {
    "eager": eager,
    "sdpa": sdpa,
    "flash_attention_2": flash,
    "flex_attention": flex,
}
# These read a Rule: for them no mask of S x T is made.
MASKLESS = ("flash_attention_2", "flex_attention")
# These attend to the documents of a packed row one by one.
SEGMENTED = (None, "sdpa")


def implementation(name: str | None) -> str:
    """The name of a usable attention implementation; None means the default, sdpa.

    Raises ConfigError for a name that there is not, MissingDependency for one whose package is not installed.
    """
    name = name or "sdpa"
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"attn_implementation is {name!r}; gemmakit has {', '.join(IMPLEMENTATIONS)}.")
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise MissingDependency(
            "attn_implementation 'flash_attention_2' needs the flash_attn package, which is not installed: "
            'pip install flash-attn --no-build-isolation (a CUDA GPU and compiler), or use "sdpa".'
        )
    return name


class GemmaAttention(nn.Module):
    """Multi-query, grouped-query or multi-head attention with rotary positions.

    A layer that reads another's keys and values has projections of queries alone.
    """

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        spec = config.layer(layer_idx)
        self.head_dim = spec.head_dim
        self.scaling, self.softcap = spec.scale, spec.softcap
        self.attention_dropout = config.attention_dropout
        D, H, bias = config.hidden_size, spec.head_dim, config.attention_bias
        N, K = spec.num_attention_heads, spec.num_key_value_heads
        self.num_key_value_groups = spec.num_attention_heads // spec.num_key_value_heads
        self.q_proj = Linear(D, N * H, bias=bias)
        own = spec.kv_source is None
        self.kv_layer = layer_idx if spec.kv_source is None else spec.kv_source  # whose keys and values are read
        self.k_proj = Linear(D, K * H, bias=bias) if own else None
        self.v_proj = Linear(D, K * H, bias=bias) if own and not spec.values_are_keys else None
        self.o_proj = Linear(N * H, D, bias=bias)
        kind, eps = config.kind, config.rms_norm_eps
        self.q_norm = GemmaRMSNorm(H, eps, offset=kind.norm_offset) if kind.q_norm else None
        self.k_norm = GemmaRMSNorm(H, eps, offset=kind.norm_offset) if kind.k_norm and own else None
        self.v_norm = GemmaRMSNorm(H, eps, weighted=False) if kind.v_norm and own else None

    def forward(
        self,
        hidden_states: Float[Tensor, "B S D"],
        position_embeddings: RotaryTables,
        visible: Visibility,
        past_key_values: Cache | None = None,
        cache_position: Int[Tensor, " S"] | None = None,
        output_attentions: bool = False,
        shared: SharedKeys | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B N S T"] | None]:
        """What the layer adds and, when asked, the weights. shared: where layers leave keys and values for others.

        attention_mask: what `visible` says, for attention that is not this; not looked at here.
        """
        q, k, v = self.project(hidden_states)
        arguments = (position_embeddings, visible, past_key_values, cache_position, output_attentions, shared)
        out, weights = self.attend(q, k, v, *arguments)
        return self.o_proj(out), weights

    def project(
        self, x: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B S NH"], Float[Tensor, "B S KH"] | None, Float[Tensor, "B S KH"] | None]:
        """Queries, keys and values before norms and rotation; None for keys and values of another layer."""
        k = None if self.k_proj is None else self.k_proj(x)
        return self.q_proj(x), k, k if self.v_proj is None else self.v_proj(x)

    def attend(
        self,
        q: Float[Tensor, "B S NH"],
        k: Float[Tensor, "B S KH"] | None,
        v: Float[Tensor, "B S KH"] | None,
        position_embeddings: RotaryTables,
        visible: Visibility,
        past_key_values: Cache | None = None,
        cache_position: Int[Tensor, " S"] | None = None,
        output_attentions: bool = False,
        shared: SharedKeys | None = None,
    ) -> tuple[Float[Tensor, "B S NH"], Float[Tensor, "B N S T"] | None]:
        """What happens between the projections; NH is N * H, KH is K * H. k, v: None where another layer's are read."""
        B, S, _ = q.shape
        q = self._heads(q, self.q_norm)
        cos, sin = (table if table.dim() == 4 else table[:, None] for table in position_embeddings)
        q = rotate(q, cos, sin)
        if k is not None and v is not None:
            k, v = rotate(self._heads(k, self.k_norm), cos, sin), self._heads(v, self.v_norm)
        # The fused kernels keep no weights, so whoever asks for them gets the written-out form for this call.
        attend = eager if output_attentions else IMPLEMENTATIONS[self.config.attn_implementation or "sdpa"]
        dropout = self.attention_dropout if self.training else 0.0
        told: dict[str, Any] = {"scale": self.scaling, "dropout": dropout, "softcap": self.softcap}
        if isinstance(past_key_values, PagedCache) and past_key_values.packed:
            if k is not None and v is not None:
                past_key_values.write(k, v, self.kv_layer)
            if not output_attentions and attends_pages(self, q, past_key_values):
                return attend_pages(self, q.transpose(1, 2).reshape(B, S, -1), past_key_values), None
            return by_spans(attend, q, past_key_values, self.kv_layer, **told).transpose(1, 2).reshape(B, S, -1), None
        if k is None or v is None:
            assert shared is not None
            k, v = shared.of(self.kv_layer, q.device)
        else:
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": cache_position})
            if shared is not None:
                shared.hold(self.layer_idx, k, v)
        if visible.last is not None:
            k, v = k[:, :, -visible.last :], v[:, :, -visible.last :]
        out, weights = attend(q, k, v, visible, **told)
        return out.transpose(1, 2).reshape(B, S, -1), weights

    @property
    def attn_logit_softcapping(self) -> float | None:
        """The cap by transformers' name, for what computes attention in this module's place."""
        return self.softcap

    def _heads(self, x: Float[Tensor, "B S NH"], norm: GemmaRMSNorm | None) -> Float[Tensor, "B N S H"]:
        x = x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        return x if norm is None else norm(x)
