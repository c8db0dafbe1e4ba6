"""A decoder layer as five seams, and one more where layers have embeddings of their own: each one function, what a
device's kernels may take over.

Axis letters: B batch, S positions, D hidden, F mlp, N heads, K kv heads, H head_dim, P width of a layer's embedding.
"""

from __future__ import annotations

from torch import Tensor

from gemmakit.pytorch import per_layer
from gemmakit.pytorch.cache import Cache
from gemmakit.pytorch.cache.core import CacheLayer
from gemmakit.pytorch.cache.window import WindowLayer
from gemmakit.pytorch.kernels import Decision
from gemmakit.pytorch.layers import LayerParts, RotaryTables, through
from gemmakit.pytorch.masks import Visibility
from gemmakit.pytorch.shapes import Float, Int, Places
from gemmakit.pytorch.shared_keys import SharedKeys

# A step of more rows (B * S) is matrix work, which the modules do best, but for forms that say otherwise.
MAX_ROWS = 8


def writable(held: CacheLayer, visible: Visibility, S: int) -> bool:
    """Whether a kernel may write S positions to what `claim` gives of this layer, and finds there all that is seen."""
    if type(held) is not WindowLayer:
        return type(held) is CacheLayer
    return held.held >= (int(held.length) if visible.last is None else visible.last - S)


class FusedLayer:
    """The seams by the layer's own modules, which is what they mean; a device's form overrides what it has kernels for.

    Each rounds where the modules round: after a norm, each projection, each residual. A form may keep pointers into the
    modules' tensors, never values: it is used for as long as modules, addresses, dtypes and sizes stay what they are.
    """

    decision = Decision("modules")

    def __init__(self, parts: LayerParts):
        self.parts = parts

    @property
    def any_rows(self) -> bool:
        """Whether it takes more than MAX_ROWS."""
        return True

    def __call__(
        self,
        x: Float[Tensor, "B S D"],
        tables: RotaryTables,
        visible: Visibility,
        cache: Cache | None,
        cache_position: Int[Tensor, " S"] | None,
        shared: SharedKeys | None = None,
        layer_input: Float[Tensor, "B S P"] | None = None,
        kept: Places | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """The whole layer, but for its scalar; behind its attention, of the positions `kept` alone."""
        q, k, v = self.norm_qkv(x)
        attended = self.attend(q, k, v, tables, visible, cache, cache_position, shared)
        if kept is not None:
            attended, x = attended[:, kept], x[:, kept]
            layer_input = None if layer_input is None else layer_input[:, kept]
        x = self.attention_add(attended, x)
        x = self.mlp_add(self.norm_gate_up(x), x)
        return x if layer_input is None else self.input_add(layer_input, x)

    def norm_qkv(
        self, x: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B S NH"], Float[Tensor, "B S KH"] | None, Float[Tensor, "B S KH"] | None]:
        """NH is N * H, KH is K * H; None for keys and values of another layer."""
        return self.parts.self_attn.project(self.parts.norms.before_attention(x))

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
        """Norm and rotate q and k, append k and v to the cache, attend."""
        attention = self.parts.self_attn
        return attention.attend(q, k, v, tables, visible, cache, cache_position, shared=shared)[0]

    def attention_add(
        self, attended: Float[Tensor, "B S NH"], residual: Float[Tensor, "B S D"]
    ) -> Float[Tensor, "B S D"]:
        """residual + after_attention(o_proj(attended))."""
        return residual + through(self.parts.norms.after_attention, self.parts.o_proj(attended))

    def norm_gate_up(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S F"]:
        """act(gate_proj(norm(x))) * up_proj(norm(x))."""
        p, normed = self.parts, self.parts.norms.before_mlp(x)
        return p.act_fn(p.gate_proj(normed)) * p.up_proj(normed)

    def mlp_add(self, gated: Float[Tensor, "B S F"], residual: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """residual + after_mlp(down_proj(gated))."""
        return residual + through(self.parts.norms.after_mlp, self.parts.down_proj(gated))

    def input_add(self, inputs: Float[Tensor, "B S P"], residual: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """residual + norm(projection(act(gate(residual)) * inputs)), of the layer's own embedding."""
        return residual + per_layer.added(self.parts, residual, inputs)
