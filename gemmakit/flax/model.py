"""The decoder: layers between an embedding and a norm. What stands on it is in `heads`.

Axis letters: B batch, S query positions, D hidden.
Source: arXiv:2403.08295. Parameter names are those of the released Flax checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from gemmakit.config import GemmaConfig
from gemmakit.family import members
from gemmakit.flax import per_layer
from gemmakit.flax.attention import FlaxGemmaAttention, KeysAndValues, Told, Wanted
from gemmakit.flax.cache import Cache, capacity
from gemmakit.flax.layers import FlaxGemmaMLP, FlaxGemmaRMSNorm, FlaxGemmaScaledEmbedding, rotary_tables, stream_scale
from gemmakit.flax.masks import visibility
from gemmakit.flax.pretrained import FlaxGemmaPreTrainedModel
from gemmakit.layer_spec import LayerSpec
from gemmakit.outputs import BaseModelOutputWithPast


@struct.dataclass
class Trace:
    """What a layer leaves behind: its buffers of the cache, its input and its weights, those that are asked for.

    attended: the keys and values that it attended to, for layers that have none of their own.
    """

    cache: Any = None
    hidden: Any = None
    weights: Any = None
    attended: KeysAndValues | None = None


class FlaxGemmaDecoderLayer(nn.Module):
    """x + after_attention(attention(before_attention(x))), then x + after_mlp(mlp(before_mlp(x))).

    The four norms are those of `family.Norms`, None for none. Where layers have embeddings of their own, then x + what
    `per_layer` adds; where they have one, times their `layer_scalar`.
    """

    config: GemmaConfig
    spec: LayerSpec
    dtype: Any = jnp.float32
    wanted: Wanted = Wanted()

    @nn.compact
    def __call__(self, hidden: jax.Array, cache: dict[str, jax.Array] | None, told: Told) -> tuple[jax.Array, Trace]:
        """hidden: (B, S, D), same out, or the last positions that are wanted."""
        c, x = self.config, hidden
        before, after, before_mlp, after_mlp = (self._norm(*slot) for slot in c.kind.norms._asdict().items())
        attention = FlaxGemmaAttention(c, self.spec, self.dtype, self.wanted, name="self_attn")
        attended, cache, kept, keys_and_values = attention(before(x), cache, told)
        if last := self.wanted.positions:
            attended, x = attended[:, -last:], x[:, -last:]
            told = told if told.layer_input is None else replace(told, layer_input=told.layer_input[:, -last:])
        x = x + after(attended)
        x = x + after_mlp(FlaxGemmaMLP(c, self.spec, self.dtype, name="mlp")(before_mlp(x)))
        if told.layer_input is not None:
            x = x + per_layer.added(c, self.dtype, x, told.layer_input)
        if c.kind.layer_scalar:
            # Released weights hold it as a number that training left behind: no gradient reaches it.
            scalar = jax.lax.stop_gradient(self.param("layer_scalar", nn.initializers.ones, (1,)))
            x = x * scalar.astype(x.dtype)
        return x, Trace(cache, hidden if self.wanted.hidden_states else None, kept, keys_and_values)

    def _norm(self, slot: str, name: str | None) -> Callable[[jax.Array], jax.Array]:
        """What reads the stream norms its scale away, what writes into it carries it."""
        if name is None:
            return lambda x: x
        c, scale = self.config, stream_scale(self.config, self.dtype)
        eps, gain = (c.rms_norm_eps, scale) if slot.startswith("after") else (c.rms_norm_eps * scale**2, 1.0)
        return FlaxGemmaRMSNorm(eps, c.kind.norm_offset, gain, name=name)


class FlaxGemmaLayerCollection(nn.Module):
    """The decoder layers one after another, each with parameters of its own under "0", "1", ..."""

    config: GemmaConfig
    specs: tuple[LayerSpec, ...]
    dtype: Any = jnp.float32
    wanted: Wanted = Wanted()
    remat: bool = False

    @nn.compact
    def __call__(self, hidden: jax.Array, cache: Any, told: list[Told]) -> tuple[jax.Array, Trace]:
        """hidden: (B, S, D), same out, or the last positions that are wanted; told: a layer each; in the trace a
        dictionary of caches and tuples of the rest, a layer each."""
        layer = nn.remat(FlaxGemmaDecoderLayer) if self.remat else FlaxGemmaDecoderLayer
        traces = []
        for i, spec in enumerate(self.specs):
            own = spec.kv_source is None
            held = cache[str(i)] if own and cache is not None else None
            here = told[i] if spec.kv_source is None else replace(told[i], shared=traces[spec.kv_source].attended)
            wanted = self.wanted if i == len(self.specs) - 1 else replace(self.wanted, positions=0)
            hidden, trace = layer(self.config, spec, self.dtype, wanted, name=str(i))(hidden, held, here)
            traces.append(trace)
        caches = None if cache is None else {i: traces[int(i)].cache for i in cache}
        return hidden, Trace(caches, tuple(t.hidden for t in traces), tuple(t.weights for t in traces))


class _AnyLayer(FlaxGemmaDecoderLayer):
    """A layer that is told of every kind of layer there is, and which one it is."""

    def __call__(self, hidden: jax.Array, cache: Any, told: Any) -> tuple[jax.Array, Trace]:
        """cache: the layer's own, () its place among `told`, a tuple of Told, and its embedding of the tokens."""
        own, kind, layer_input = cache
        one = told[0] if len(told) == 1 else jax.tree_util.tree_map(lambda *each: jnp.stack(each)[kind], *told)
        hidden, trace = super().__call__(hidden, own, replace(one, layer_input=layer_input))
        return hidden, replace(trace, attended=None)


def _scanned(
    config: GemmaConfig, specs: tuple[LayerSpec, ...], dtype: Any, wanted: Wanted, remat: bool
) -> Callable[[jax.Array, Any, list[Told]], tuple[jax.Array, Trace]]:
    """The same layers as one that is compiled once and run L times, over parameters with a leading layer axis."""
    layer = nn.remat(_AnyLayer, prevent_cse=False) if remat else _AnyLayer
    scan = nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0, "products": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),  # type: ignore[arg-type]
        length=config.num_hidden_layers,
    )
    module = scan(config, specs[0], dtype, replace(wanted, positions=0), name="layers")
    kinds = list(dict.fromkeys(map(_kind, specs)))

    def run(hidden: jax.Array, cache: Any, told: list[Told]) -> tuple[jax.Array, Trace]:
        each = {_kind(spec): replace(one, layer_input=None) for spec, one in zip(specs, told, strict=True)}
        which = jnp.asarray([kinds.index(_kind(spec)) for spec in specs])
        inputs = [one.layer_input for one in told]
        own = None if inputs[0] is None else jnp.stack(inputs)  # type: ignore[arg-type]
        return module(hidden, (cache, which, own), tuple(each[kind] for kind in kinds))

    return run


def _kind(spec: LayerSpec) -> tuple[str, int | None]:
    return spec.rope, spec.window


class FlaxGemmaModule(nn.Module):
    """The decoder without a head: token ids in, hidden states out.

    scan_layers: one compiled layer for all, over stacked parameters (see `stack_layers`). remat: recompute each layer
    in the backward pass instead of keeping what it computed.
    """

    config: GemmaConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = FlaxGemmaScaledEmbedding(c, c.vocab_size, c.hidden_size, self.dtype)

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        cache: Cache | None = None,
        wanted: Wanted = Wanted(),  # noqa: B008
        is_causal: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """The wrapper's `__call__` says what the arguments are; a field that is not wanted is None."""
        c, scale = self.config, stream_scale(self.config, self.dtype)
        specs = tuple(c.layer(i) for i in range(c.num_hidden_layers))
        told = self._told(specs, input_ids.shape, attention_mask, position_ids, cache, wanted, is_causal)
        if self.scan_layers:
            layers = _scanned(c, specs, self.dtype, wanted, self.remat)
        else:
            layers = FlaxGemmaLayerCollection(c, specs, self.dtype, wanted, self.remat, name="layers")
        embedded = self.embed_tokens(input_ids)
        if c.hidden_size_per_layer_input:
            inputs = per_layer.layer_inputs(c, self.dtype, input_ids, embedded)
            told = [replace(one, layer_input=inputs[:, :, i]) for i, one in enumerate(told)]
        embedded = embedded if scale == 1.0 else embedded * scale
        hidden, trace = layers(embedded, None if cache is None else cache["layers"], told)
        hidden = FlaxGemmaRMSNorm(c.rms_norm_eps * scale**2, c.kind.norm_offset, name="norm")(hidden)
        states = trace.hidden if scale == 1.0 else (each / scale for each in trace.hidden)
        past = None if cache is None else {"layers": trace.cache, "index": cache["index"] + input_ids.shape[1]}
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past,
            hidden_states=(*states, hidden) if wanted.hidden_states else None,
            attentions=tuple(trace.weights) if wanted.attentions else None,
        )

    def _told(
        self,
        specs: tuple[LayerSpec, ...],
        shape: tuple[int, ...],
        attention_mask: jax.Array | None,
        position_ids: jax.Array | None,
        cache: Cache | None,
        wanted: Wanted,
        is_causal: bool | None,
    ) -> list[Told]:
        """What each layer is told: one description of who sees whom a window, one rotary table a kind. shape: B, S."""
        c, (B, S) = self.config, shape
        mixed = self.scan_layers and len(set(map(_kind, specs))) > 1
        past = None if cache is None else cache["index"]
        visible = {
            window: visibility(
                attention_mask,
                batch=B,
                queries=S,
                keys=S if cache is None else capacity(cache),
                past=past,
                causal=c.is_causal if is_causal is None else is_causal,
                position_ids=position_ids if cache is None else None,
                window=window,
                whole=mixed or wanted.attentions,
            )
            for window in dict.fromkeys(spec.window for spec in specs)
        }
        follow = jnp.arange(S)[None] + (0 if past is None else past)
        positions = follow if position_ids is None else position_ids
        tables = {r: rotary_tables(c, positions, self.dtype, r) for r in dict.fromkeys(spec.rope for spec in specs)}
        return [Told(tables[spec.rope], visible[spec.window], past) for spec in specs]


class FlaxGemmaModel(FlaxGemmaPreTrainedModel[BaseModelOutputWithPast]):
    """The decoder without a head: token ids in, hidden states out."""

    module_class: ClassVar[type[nn.Module]] = FlaxGemmaModule


globals().update(members(FlaxGemmaModel))
