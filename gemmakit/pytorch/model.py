"""Gemma, top to bottom: attention, decoder layer, the bare model, the causal language model.

Axis letters: B batch, S query positions, T key positions, N heads, K kv heads, H head_dim, D hidden, V vocabulary.
Source: arXiv:2403.08295. Parameter names are those of the released checkpoints.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, TokenOutOfRange
from gemmakit.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from gemmakit.pytorch.attention import IMPLEMENTATIONS, MASKLESS, SEGMENTED, eager
from gemmakit.pytorch.cache import Cache, DynamicCache
from gemmakit.pytorch.decode.arguments import check_tensor
from gemmakit.pytorch.decode.generate import GenerationMixin
from gemmakit.pytorch.kernels import linear_plan
from gemmakit.pytorch.kernels.reference import rotate
from gemmakit.pytorch.kernels.seams import choose, seams_plan
from gemmakit.pytorch.layers import GemmaMLP, GemmaRMSNorm, GemmaRotaryEmbedding, GemmaScaledEmbedding, Linear
from gemmakit.pytorch.loss import causal_loss, check_labels, chunked_loss, next_labels
from gemmakit.pytorch.masks import Visibility, visibility
from gemmakit.pytorch.pretrained import GemmaPreTrainedModel
from gemmakit.pytorch.quantize import QuantizedLinear


class GemmaAttention(nn.Module):
    """Multi-query, grouped-query or multi-head attention with rotary positions."""

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        spec = config.layer(layer_idx)
        self.head_dim = spec.head_dim
        self.scaling = spec.scale
        self.attention_dropout = config.attention_dropout
        D, H, bias = config.hidden_size, spec.head_dim, config.attention_bias
        N, K = spec.num_attention_heads, spec.num_key_value_heads
        self.q_proj = Linear(D, N * H, bias=bias)
        self.k_proj = Linear(D, K * H, bias=bias)
        self.v_proj = Linear(D, K * H, bias=bias)
        self.o_proj = Linear(N * H, D, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        visible: Visibility,
        past_key_values: Cache | None = None,
        cache_position: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: (B, S, D). Returns (B, S, D) and, when asked, the weights (B, N, S, T)."""
        q, k, v = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        arguments = (position_embeddings, visible, past_key_values, cache_position, output_attentions)
        out, weights = self.attend(q, k, v, *arguments)
        return self.o_proj(out), weights

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        visible: Visibility,
        past_key_values: Cache | None = None,
        cache_position: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What happens between the projections. q: (B, S, N * H); k, v: (B, S, K * H). Returns (B, S, N * H)."""
        B, S, _ = q.shape
        q, k, v = (x.view(B, S, -1, self.head_dim).transpose(1, 2) for x in (q, k, v))
        cos, sin = position_embeddings
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": cache_position})
        # The fused kernels keep no weights, so whoever asks for them gets the written-out form for this call.
        attend = eager if output_attentions else IMPLEMENTATIONS[self.config.attn_implementation or "sdpa"]
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(q, k, v, visible, scale=self.scaling, dropout=dropout)
        return out.transpose(1, 2).reshape(B, S, -1), weights


class GemmaDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = GemmaAttention(config, layer_idx)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        visible: Visibility,
        past_key_values: Cache | None = None,
        cache_position: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: (B, S, D), same out; the attention weights when asked.

        A decoding step takes the fused forms of these modules where there are any: see `kernels.seams`.
        """
        attention, mlp = self.self_attn, self.mlp
        seams = choose(self, hidden_states, visible, past_key_values, output_attentions)
        if seams is not None:
            q, k, v = seams.norm_qkv(
                hidden_states, self.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj
            )
            out = seams.attend(q, k, v, position_embeddings, visible, past_key_values, cache_position, attention)
            hidden_states = seams.project_add(out, attention.o_proj, hidden_states)
            gated = seams.norm_gate_up(
                hidden_states, self.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.act_fn
            )
            return seams.project_add(gated, mlp.down_proj, hidden_states), None
        attended, weights = attention(
            self.input_layernorm(hidden_states),
            position_embeddings,
            visible,
            past_key_values,
            cache_position,
            output_attentions,
        )
        hidden_states = hidden_states + attended
        return hidden_states + mlp(self.post_attention_layernorm(hidden_states)), weights


class GemmaModel(GemmaPreTrainedModel):
    """The decoder without a head: token ids in, hidden states out."""

    def __init__(self, config: GemmaConfig):
        super().__init__(config)
        config = self.config
        pad = config.pad_token_id if config.pad_token_id is not None and config.pad_token_id >= 0 else None
        self.embed_tokens = GemmaScaledEmbedding(config.vocab_size, config.hidden_size, padding_idx=pad)
        self.layers = nn.ModuleList(GemmaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = GemmaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        *,
        is_causal: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the decoder.

        Args:
            input_ids: (B, S) token ids; or give `inputs_embeds`, (B, S, D), used as they are (not scaled again).
            attention_mask: (B, T) of 0 and 1 over past and current tokens; or 4-D, bool or additive, used as it is.
            position_ids: (B, S); by default they continue after the cache. Given without mask and cache, a restart
                of the positions begins a new document, and tokens see their own document only.
            past_key_values: a Cache, or the older tuple of (key, value) a layer; the same form comes back.
            use_cache: whether `past_key_values` come back; by default as the configuration says.
            output_attentions, output_hidden_states, return_dict: as the configuration says unless given.
            cache_position: (S,) places in a StaticCache.
            is_causal: False lets every token see all others that are not padding; by default as the configuration
                says (`use_bidirectional_attention`).

        Raises:
            InputError (a ValueError): not exactly one of input_ids and inputs_embeds, or shapes that do not fit.
            TokenOutOfRange: an id that the vocabulary does not have.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        use_cache = config.use_cache if use_cache is None else use_cache
        recompute, how = self.gradient_checkpointing and self.training, self.checkpointing_arguments
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        elif input_ids is not None:
            raise InputError("both input_ids and inputs_embeds are given: give exactly one of them.")
        if recompute and past_key_values is not None:
            raise InputError(
                "past_key_values is given in training with gradient checkpointing, which runs layers twice and would "
                "append twice: call gradient_checkpointing_disable(), or leave the cache out."
            )
        cache, legacy = self._cache(past_key_values, use_cache and not recompute)

        _check_shapes(inputs_embeds, position_ids, config.hidden_size)
        B, S, _ = inputs_embeds.shape
        device = inputs_embeds.device
        past, keys = (0, S) if cache is None else cache.span(S, cache_position)
        packed = cache is None or cache.packs or (past_key_values is None and past == 0)
        visible = visibility(
            attention_mask,
            batch=B,
            queries=S,
            keys=keys,
            past=past,
            causal=not config.use_bidirectional_attention if is_causal is None else is_causal,
            position_ids=position_ids if packed else None,
            device=device,
            dense=output_attentions or config.attn_implementation not in MASKLESS,
            segmented=not output_attentions and config.attn_implementation in SEGMENTED,
        )
        if position_ids is None:
            position_ids = (torch.arange(past, past + S, device=device) if isinstance(past, int) else past)[None]
        tables = self.rotary_emb(position_ids, inputs_embeds.dtype)

        hidden = inputs_embeds
        all_hidden, all_weights = [], []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden.append(hidden)
            arguments = (hidden, tables, visible, cache, cache_position, output_attentions)
            again = recompute and i % self.checkpointing_every == 0
            hidden, weights = checkpoint(layer, *arguments, **how) if again else layer(*arguments)
            if output_attentions:
                all_weights.append(weights)
        hidden = self.norm(hidden)
        if output_hidden_states:
            all_hidden.append(hidden)
        out = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=(cache.to_legacy_cache() if legacy and cache else cache) if use_cache else None,
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )
        return out if return_dict else out.to_tuple()

    def _embed(self, input_ids: Tensor | None) -> Tensor:
        if input_ids is None:
            raise InputError("neither input_ids nor inputs_embeds is given: give exactly one of them.")
        check_tensor("input_ids", input_ids)
        if input_ids.dim() != 2:
            raise InputError(f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, sequence).")
        try:
            return self.embed_tokens(input_ids)
        except IndexError:
            size = self.embed_tokens.num_embeddings
            bad = input_ids[(input_ids < 0) | (input_ids >= size)]
            if not bad.numel():
                raise
            raise TokenOutOfRange(
                f"token id {int(bad[0])} is outside the vocabulary of {size} ids (0 to {size - 1}): "
                "was the text encoded with another model's tokenizer?"
            ) from None

    def _cache(self, past: Any, use_cache: bool) -> tuple[Cache | None, bool]:
        """The cache to append to, and whether the caller speaks the older tuple form."""
        if past is None:
            return (DynamicCache() if use_cache else None), False
        if isinstance(past, Cache):
            return past, False
        layers = len(self.layers)
        if not isinstance(past, (tuple, list)) or len(past) not in (0, layers):
            found = f"{len(past)} layers" if isinstance(past, (tuple, list)) else f"a {type(past).__name__}"
            raise InputError(f"past_key_values is {found}; give a gemmakit Cache, or (key, value) of {layers} layers.")
        return DynamicCache.from_legacy_cache(past), True


class GemmaForCausalLM(GemmaPreTrainedModel, GenerationMixin):
    """Gemma with the language modelling head, whose weight is the embedding's unless the configuration unties them."""

    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GemmaConfig):
        super().__init__(config)
        self.model = GemmaModel(config)
        self.config = self.model.config
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def decode_plan(self) -> dict[str, str]:
        """How a decoding step runs and why, in words: the loop, attention, the fused forms of the layers, the head.

        Each projection's line says what its module does where it is called itself.
        """
        plan = {"loop": self.loop_plan(), "attention": self.config.attn_implementation or "sdpa"}
        plan["seams"] = seams_plan(self.model.layers)
        layer = self.model.layers[0]
        matrices = {name.split(".")[-1]: m for name, m in layer.named_modules() if name.endswith("_proj")}
        for name, module in {**matrices, "lm_head": self.lm_head}.items():
            if isinstance(module, QuantizedLinear):
                plan[name] = module.plan()
            else:
                other = f"{type(module).__module__}.{type(module).__name__}"
                plan[name] = linear_plan(module.weight) if isinstance(module, Linear) else other
        return plan

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        is_causal: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        loss_chunk_size: int | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `GemmaModel.forward`, and:

        Args:
            labels: (B, S) ids to predict, shifted inside (position s predicts label s + 1); -100 is ignored.
            logits_to_keep: 0 for all positions, n for the last n, or a tensor of positions.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels of this call, for
                gradient accumulation.
            loss_chunk_size: with labels, compute the loss so many positions (B * S) at a time and no logits: those of
                all positions are most of the memory of a training step. Loss and gradients are the same up to rounding.

        Returns:
            CausalLMOutputWithPast with logits (B, S or fewer, V) in the weights' dtype and loss () in float32.

        Raises:
            InputError: labels of another shape, or outside the vocabulary.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if labels is not None:
            check_labels(labels, inputs_embeds if input_ids is None else input_ids, self.config.vocab_size)
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            cache_position,
            is_causal=is_causal,
        )
        hidden, targets = out.last_hidden_state, None if labels is None else next_labels(labels)
        kept = _kept(logits_to_keep)
        hidden, targets = hidden[:, kept, :], None if targets is None else targets[:, kept]
        if loss_chunk_size is not None:
            logits, loss = None, chunked_loss(self.lm_head, hidden, targets, loss_chunk_size, num_items_in_batch)
        else:
            logits = self.lm_head(hidden)
            loss = None if targets is None else causal_loss(logits, targets, num_items_in_batch)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return result if return_dict else result.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward pass: of the ids (B, S) those that the cache does not hold.

        For libraries that step a model themselves; `generate` has its own loop.
        """
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        first = inputs_embeds is not None and not held
        position_ids = None
        if attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, held:]
        return {
            "input_ids": None if first else input_ids[:, held:],
            "inputs_embeds": inputs_embeds if first else None,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **kwargs,
        }


def _kept(positions: Any) -> Any:
    """What picks the positions whose logits are wanted: 0 for all, n for the last n, or a list of positions."""
    if isinstance(positions, int) and not isinstance(positions, bool) and positions >= 0:
        return slice(-positions or None, None)
    if isinstance(positions, slice | list) or (isinstance(positions, Tensor) and positions.dim() == 1):
        return positions
    raise InputError(f"logits_to_keep is {positions!r}; give a whole number >= 0, or positions as a 1-D tensor.")


def _check_shapes(embeds: Tensor, position_ids: Tensor | None, width: int) -> None:
    if embeds.dim() != 3 or embeds.shape[-1] != width:
        raise InputError(f"inputs_embeds has shape {tuple(embeds.shape)}; it must be (batch, sequence, {width}).")
    B, S, _ = embeds.shape
    if not B or not S:
        raise InputError(f"there is nothing to run: {B} rows of {S} tokens.")
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[0] not in (1, B)
                                     or position_ids.shape[1] != S):  # fmt: skip
        raise InputError(f"position_ids has shape {tuple(position_ids.shape)}; it must be ({B}, {S}) or (1, {S}).")
