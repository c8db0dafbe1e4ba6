"""Gemma, top to bottom: attention, decoder layer, the bare model, the causal language model.

Axis letters: B batch, S query positions, T key positions, N heads, K kv heads, H head_dim, D hidden, V vocabulary.
Source: arXiv:2403.08295. Parameter names are those of the released Flax checkpoints.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from gemmakit.config import GemmaConfig
from gemmakit.flax.attention import IMPLEMENTATIONS, mix, weights
from gemmakit.flax.cache import Cache, append, capacity
from gemmakit.flax.decode.generate import GenerationMixin
from gemmakit.flax.layers import (
    FlaxGemmaMLP,
    FlaxGemmaRMSNorm,
    FlaxGemmaScaledEmbedding,
    FlaxLinear,
    rotary_tables,
    rotate,
)
from gemmakit.flax.masks import Visibility, visibility
from gemmakit.flax.pretrained import FlaxGemmaPreTrainedModel
from gemmakit.flax.static import Wanted
from gemmakit.flax.training import causal_loss, check_token_labels, next_tokens
from gemmakit.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@struct.dataclass
class Step:
    """What is the same for every layer of one forward pass: rotary tables, visibility, the cache's first free place."""

    cos: jax.Array
    sin: jax.Array
    visible: Visibility
    index: jax.Array | None = None


@struct.dataclass
class Trace:
    """What a layer leaves behind: its buffers of the cache, its input and its weights, those that are asked for."""

    cache: Any = None
    hidden: Any = None
    weights: Any = None


class FlaxGemmaAttention(nn.Module):
    """Multi-query, grouped-query or multi-head attention with rotary positions."""

    config: GemmaConfig
    dtype: Any = jnp.float32
    wanted: Wanted = Wanted()

    @nn.compact
    def __call__(
        self, hidden: jax.Array, cache: dict[str, jax.Array] | None, step: Step
    ) -> tuple[jax.Array, dict[str, jax.Array] | None, jax.Array | None]:
        """hidden: (B, S, D). Returns (B, S, D), the layer's cache, and, when asked, the weights (B, N, S, T)."""
        c = self.config
        B, S, _ = hidden.shape
        N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim

        def project(name: str, heads: int) -> jax.Array:
            linear = FlaxLinear(heads * H, c.initializer_range, c.attention_bias, self.dtype, name=name)
            return linear(hidden).reshape(B, S, heads, H).swapaxes(1, 2)

        q, k, v = project("q_proj", N), project("k_proj", K), project("v_proj", K)
        q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        if cache is not None:
            assert step.index is not None
            k, v, cache = append(cache, k, v, step.index)
            k, v = k.astype(self.dtype), v.astype(self.dtype)
        dropout = c.attention_dropout if self.wanted.train else 0.0
        kept = None
        if self.wanted.attentions or dropout:  # the fused form keeps no weights
            kept = weights(q, k, step.visible, scale=H**-0.5)
            kept = nn.Dropout(dropout)(kept, deterministic=not dropout)
            out = mix(kept, v)
        else:
            out = IMPLEMENTATIONS[c.attn_implementation or "sdpa"](q, k, v, step.visible, scale=H**-0.5)
        o_proj = FlaxLinear(c.hidden_size, c.initializer_range, c.attention_bias, self.dtype, name="o_proj")
        return o_proj(out.swapaxes(1, 2).reshape(B, S, N * H)), cache, kept if self.wanted.attentions else None


class FlaxGemmaDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: GemmaConfig
    dtype: Any = jnp.float32
    wanted: Wanted = Wanted()

    @nn.compact
    def __call__(self, hidden: jax.Array, cache: dict[str, jax.Array] | None, step: Step) -> tuple[jax.Array, Trace]:
        """hidden: (B, S, D), same out."""
        c, given = self.config, hidden if self.wanted.hidden_states else None
        attention = FlaxGemmaAttention(c, self.dtype, self.wanted, name="self_attn")
        normed = FlaxGemmaRMSNorm(c.rms_norm_eps, name="input_layernorm")(hidden)
        attended, cache, kept = attention(normed, cache, step)
        hidden = hidden + attended
        normed = FlaxGemmaRMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(hidden)
        hidden = hidden + FlaxGemmaMLP(c, self.dtype, name="mlp")(normed)
        return hidden, Trace(cache, given, kept)


class FlaxGemmaLayerCollection(nn.Module):
    """The decoder layers one after another, each with parameters of its own under "0", "1", ..."""

    config: GemmaConfig
    dtype: Any = jnp.float32
    wanted: Wanted = Wanted()
    remat: bool = False

    @nn.compact
    def __call__(self, hidden: jax.Array, cache: Any, step: Step) -> tuple[jax.Array, Trace]:
        """hidden: (B, S, D), same out; in the trace a dictionary of caches and tuples of the rest, a layer each."""
        layer = nn.remat(FlaxGemmaDecoderLayer) if self.remat else FlaxGemmaDecoderLayer
        traces = []
        for i in range(self.config.num_hidden_layers):
            held = None if cache is None else cache[str(i)]
            hidden, trace = layer(self.config, self.dtype, self.wanted, name=str(i))(hidden, held, step)
            traces.append(trace)
        caches = None if cache is None else {str(i): t.cache for i, t in enumerate(traces)}
        return hidden, Trace(caches, tuple(t.hidden for t in traces), tuple(t.weights for t in traces))


def _scanned(config: GemmaConfig, dtype: Any, wanted: Wanted, remat: bool) -> nn.Module:
    """The same layers as one that is compiled once and run L times, over parameters with a leading layer axis."""
    layer = nn.remat(FlaxGemmaDecoderLayer, prevent_cse=False) if remat else FlaxGemmaDecoderLayer
    scan = nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),  # type: ignore[arg-type]
        length=config.num_hidden_layers,
    )
    return scan(config, dtype, wanted, name="layers")


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
        self.embed_tokens = FlaxGemmaScaledEmbedding(self.config, self.dtype)

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
        c = self.config
        B, S = input_ids.shape
        past = None if cache is None else cache["index"]
        visible = visibility(
            attention_mask,
            batch=B,
            queries=S,
            keys=S if cache is None else capacity(cache),
            past=past,
            causal=not c.use_bidirectional_attention if is_causal is None else is_causal,
            position_ids=position_ids if cache is None else None,
        )
        follow = jnp.arange(S)[None] + (0 if past is None else past)
        tables = rotary_tables(c, follow if position_ids is None else position_ids, self.dtype)
        step = Step(*tables, visible, past)
        build = _scanned if self.scan_layers else self._unrolled
        layers = build(c, self.dtype, wanted, self.remat)
        hidden, trace = layers(self.embed_tokens(input_ids), None if cache is None else cache["layers"], step)
        hidden = FlaxGemmaRMSNorm(c.rms_norm_eps, name="norm")(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=None if cache is None else {"layers": trace.cache, "index": cache["index"] + S},
            hidden_states=(*trace.hidden, hidden) if wanted.hidden_states else None,
            attentions=tuple(trace.weights) if wanted.attentions else None,
        )

    @staticmethod
    def _unrolled(config: GemmaConfig, dtype: Any, wanted: Wanted, remat: bool) -> nn.Module:
        return FlaxGemmaLayerCollection(config, dtype, wanted, remat, name="layers")


class FlaxGemmaForCausalLMModule(nn.Module):
    """Gemma with the language modelling head, whose weight is the embedding's unless the configuration unties them."""

    config: GemmaConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        self.model = FlaxGemmaModule(c, self.dtype, self.scan_layers, self.remat)
        if not c.tie_word_embeddings:
            self.lm_head = FlaxLinear(c.vocab_size, c.initializer_range, dtype=self.dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        cache: Cache | None = None,
        wanted: Wanted = Wanted(),  # noqa: B008
        is_causal: bool | None = None,
        labels: jax.Array | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """logits_to_keep: 0 for all positions, n for the last n. labels as in `FlaxGemmaForCausalLM.__call__`."""
        out = self.model(input_ids, attention_mask, position_ids, cache, wanted, is_causal)
        hidden = out.last_hidden_state[:, -logits_to_keep:]
        logits = self.model.embed_tokens.attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)
        loss = None if labels is None else causal_loss(logits, next_tokens(labels)[:, -logits_to_keep:])
        return CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


class FlaxGemmaModel(FlaxGemmaPreTrainedModel):
    """The decoder without a head: token ids in, hidden states out."""

    module_class: ClassVar[type[nn.Module]] = FlaxGemmaModule

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Cache | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        is_causal: bool | None = None,
        lora: Any = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the decoder, compiled once a shape. numpy and jax arrays do; inside jit, grad and vmap too.

        Args:
            input_ids: (B, S) token ids.
            attention_mask: (B, S) of 0 and 1; with a cache over its tokens and these, or as wide as the cache; or 4-D,
                bool or additive, used as it is.
            position_ids: (B, S); by default they continue after the cache. Given without mask and cache, a restart
                of the positions begins a new document, and tokens see their own document only.
            params: instead of the model's own; layers may be stacked or not.
            past_key_values: what `init_cache` made or a call before gave back; comes back with these tokens in it.
            dropout_rng: needed where `train` and the configuration drop.
            train: apply dropout.
            output_attentions, output_hidden_states, return_dict: as the configuration says unless given.
            is_causal: False lets every token see all others that are not padding; by default as the configuration
                says (`use_bidirectional_attention`).
            lora: adapters, as `init_lora` makes them.

        Raises:
            InputError (a ValueError): shapes that do not fit.
            TokenOutOfRange: an id that the vocabulary does not have.
            PromptTooLong: the cache is full.
        """
        return self._run(
            input_ids,
            attention_mask,
            position_ids,
            params,
            past_key_values,
            dropout_rng,
            train,
            output_attentions,
            output_hidden_states,
            return_dict,
            lora=lora,
            is_causal=is_causal,
        )


class FlaxGemmaForCausalLM(FlaxGemmaPreTrainedModel, GenerationMixin):
    """Gemma with the language modelling head, tied to the embedding unless the configuration unties them."""

    module_class: ClassVar[type[nn.Module]] = FlaxGemmaForCausalLMModule

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Cache | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        labels: Any = None,
        logits_to_keep: int = 0,
        is_causal: bool | None = None,
        lora: Any = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `FlaxGemmaModel.__call__`, and:

        Args:
            labels: (B, S) ids to predict, shifted inside (position s predicts label s + 1); -100 is ignored.
            logits_to_keep: 0 for all positions, n for the last n.

        Returns:
            CausalLMOutputWithPast with logits (B, S or fewer, V) in the model's dtype and loss () in float32.

        Raises:
            InputError: labels of another shape, or outside the vocabulary.
        """
        if labels is not None:
            labels = check_token_labels(labels, input_ids, self.config.vocab_size)
        return self._run(
            input_ids,
            attention_mask,
            position_ids,
            params,
            past_key_values,
            dropout_rng,
            train,
            output_attentions,
            output_hidden_states,
            return_dict,
            lora=lora,
            is_causal=is_causal,
            labels=labels,
            logits_to_keep=logits_to_keep,
        )
