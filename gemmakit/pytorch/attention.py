"""Attention: one signature, an eager reference, and the fast paths behind it.

Axis letters: B batch, S query positions, T key positions, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.errors import ConfigError
from gemmakit.pytorch.masks import Visibility


class Attend(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Visibility, *, scale: float, dropout: float
    ) -> tuple[Tensor, Tensor | None]: ...


def eager(
    q: Tensor, k: Tensor, v: Tensor, visible: Visibility, *, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention written out: query head n reads kv head n // (N // K).

    q: (B, N, S, H); k, v: (B, K, T, H). Returns the output (B, N, S, H) and the weights (B, N, S, T).
    A query that may look nowhere gets zeros, in both. Softmax in float32. Source: arXiv:1911.02150, arXiv:2305.13245.
    """
    B, N, S, H = q.shape
    K, T = k.shape[1], k.shape[2]
    # The heads that share a key stand below each other as rows: no key is copied.
    scores = (q.reshape(B, K, N // K * S, H) @ k.transpose(2, 3)).view(B, N, S, T) * scale
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


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, visible: Visibility, *, scale: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """The same through torch's fused kernels; no weights come back."""
    B, N, S, H = q.shape
    K = k.shape[1]
    mask = visible.mask if visible.mask is None or visible.mask.dtype == torch.bool else visible.mask.to(q.dtype)
    if S == 1 and K < N and (mask is None or mask.shape[1] == 1):
        # One query position: the heads of a group are rows of one attention, which reads each key once.
        out = F.scaled_dot_product_attention(q.view(B, K, N // K, H), k, v, mask, dropout, scale=scale)
        out = out.view(B, N, S, H)
    else:
        causal = visible.causal and mask is None and S > 1
        k, v = _shared(k, N), _shared(v, N)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale)
    if visible.blind is not None:
        out = out.masked_fill(visible.blind, 0.0)
    return out, None


def _shared(x: Tensor, heads: int) -> Tensor:
    """(B, K, T, H) -> (B, N, T, H), each kv head standing for its group; a single head is not copied."""
    K = x.shape[1]
    if heads == K:
        return x
    return x.expand(-1, heads, -1, -1) if K == 1 else x.repeat_interleave(heads // K, dim=1)


IMPLEMENTATIONS: dict[str, Attend] = {"eager": eager, "sdpa": sdpa}


def implementation(name: str | None) -> str:
    """The name of a usable attention implementation; None means the default, sdpa. Raises ConfigError."""
    name = name or "sdpa"
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"attn_implementation is {name!r}; gemmakit has {', '.join(IMPLEMENTATIONS)}.")
    return name
