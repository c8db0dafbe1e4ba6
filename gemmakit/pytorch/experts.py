"""The mixture of experts that stands beside the MLP of Gemma 4 26B-A4B: a router, and small MLPs of which a token takes
a few.

The residual stream chooses, the experts read it through a norm of their own, and what they give is added to the MLP's,
each normed. Parameter names and layouts are those of the released checkpoints: one tensor for all experts.
Axis letters: n tokens, D hidden, E experts, k experts a token, M width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.config import GemmaConfig
from gemmakit.pytorch.kernels import linear
from gemmakit.pytorch.layers import GemmaRMSNorm, Linear, activated, activation
from gemmakit.pytorch.shapes import Float, Int

# The norms of what the MLP gives, of what the experts read, and of what these give.
AFTER_MLP, BEFORE, AFTER = "post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"


def layer_parts(config: GemmaConfig) -> dict[str, nn.Module]:
    """By name, what a layer has for it; nothing where there are no experts."""
    if not config.enable_moe_block:
        return {}
    told: dict[str, Any] = {"offset": config.kind.norm_offset}
    norms = {
        name: GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, **told, reads_stream=name == BEFORE)
        for name in (AFTER_MLP, BEFORE, AFTER)
    }
    return {"router": GemmaRouter(config), "experts": GemmaExperts(config), **norms}


def beside(layer: Any, x: Float[Tensor, "B S D"], mlp: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
    """What MLP and experts give together. x: the stream before both; mlp: what the MLP made of it."""
    own = layer._modules
    tokens = x.flatten(0, 1)
    mixed = own["experts"](own[BEFORE](tokens), *own["router"](tokens))
    return own[AFTER_MLP](mlp) + own[AFTER](mixed.view_as(x))


class GemmaRouter(nn.Module):
    """Which experts each token takes, and how much of each.

    The k likeliest by a softmax over all, whose shares are made to add up to 1; then each expert's own factor.
    """

    def __init__(self, config: GemmaConfig):
        super().__init__()
        assert config.num_experts and config.top_k_experts
        D, E = config.hidden_size, config.num_experts
        self.top_k = config.top_k_experts
        self.norm = GemmaRMSNorm(D, config.rms_norm_eps, weighted=False, reads_stream=True)
        self.proj = Linear(D, E, bias=False)
        self.scale = nn.Parameter(torch.ones(D))
        self.per_expert_scale = nn.Parameter(torch.ones(E))

    def forward(self, x: Float[Tensor, "n D"]) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """Experts and shares, these in float32."""
        scores = self.proj(self.norm(x) * self.scale * x.shape[-1] ** -0.5)
        shares, experts = scores.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return experts, shares / shares.sum(-1, keepdim=True) * self.per_expert_scale[experts]


class GemmaExperts(nn.Module):
    """down(act(gate(x)) * up(x)) of the experts that were chosen; no other expert's weights are read."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        assert config.num_experts and config.moe_intermediate_size
        self.num_experts = config.num_experts
        E, D, M = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * M, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, M))
        self.act_fn: Callable[[Tensor], Tensor] = activation(config.hidden_act)

    def forward(
        self, x: Float[Tensor, "n D"], experts: Int[Tensor, "n k"], shares: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n D"]:
        """The sum of what a token's experts give, each times its share."""
        if torch.compiler.is_compiling():
            return self._at_once(x, experts, shares)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            # By place among a token's experts first: the order in which transformers' rows stand.
            place, token = (expert == experts.T).nonzero(as_tuple=True)
            gate, up = self.product("gate_up_proj", expert, x[token]).chunk(2, dim=-1)
            given = self.product("down_proj", expert, activated(self.act_fn, gate) * up)
            out.index_add_(0, token, (given * shares[token, place, None]).to(x.dtype))
        return out

    def product(self, name: str, expert: int, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        """x by one expert's part of the matrix of that name."""
        return linear(x, getattr(self, name)[expert])

    def parts(self, name: str, experts: Int[Tensor, "n k"], dtype: torch.dtype) -> Float[Tensor, "n k O I"]:
        """Copies of several experts' parts of it."""
        return getattr(self, name)[experts]

    def _at_once(
        self, x: Float[Tensor, "n D"], experts: Int[Tensor, "n k"], shares: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n D"]:
        """The same without asking which experts were chosen, for graphs: their weights are copied together."""
        inner = (self.parts("gate_up_proj", experts, x.dtype) @ x[:, None, :, None]).squeeze(-1)  # (n, k, 2M)
        gate, up = inner.chunk(2, dim=-1)
        given = (self.parts("down_proj", experts, x.dtype) @ (self.act_fn(gate) * up)[..., None]).squeeze(-1)
        return (given * shares[..., None]).sum(1).to(x.dtype)
