"""The decoder: layers between an embedding and a norm. What stands on it is in `heads`.

Axis letters: B batch, S query positions, T key positions, D hidden.
Source: arXiv:2403.08295. Parameter names are those of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, TokenOutOfRange
from gemmakit.family import FULL_ATTENTION, layer_type, members
from gemmakit.outputs import BaseModelOutputWithPast
from gemmakit.pytorch import experts, per_layer
from gemmakit.pytorch.attention import MASKLESS, SEGMENTED, GemmaAttention
from gemmakit.pytorch.cache import Cache, DynamicCache, cache_of
from gemmakit.pytorch.fused import fused_layer
from gemmakit.pytorch.layers import (
    STREAM_SCALES,
    GemmaMLP,
    GemmaRMSNorm,
    GemmaRotaryEmbedding,
    GemmaScaledEmbedding,
    LayerNorms,
    LayerParts,
    RotaryTables,
    layer_norms,
    through,
)
from gemmakit.pytorch.masks import Visibility, check_packing, visibility
from gemmakit.pytorch.other_adapters import explain
from gemmakit.pytorch.pretrained import GemmaPreTrainedModel
from gemmakit.pytorch.pytrees import register_nodes
from gemmakit.pytorch.shapes import Float, Int, Places, Shaped
from gemmakit.pytorch.shared_keys import SharedKeys


class GemmaDecoderLayer(nn.Module):
    """x + after_attention(attention(before_attention(x))), then x + after_mlp(mlp(before_mlp(x))).

    The four norms are those of `family.Norms`, None for none. Where there are experts, mlp is what `experts` makes of
    both. Where layers have embeddings of their own, then x + what
    `per_layer` adds; where they have one, times their `layer_scalar`.
    """

    layer_scalar: Tensor | None

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.norm_names = config.kind.norms
        self.self_attn = GemmaAttention(config, layer_idx)
        self.mlp = GemmaMLP(config, config.layer(layer_idx))
        for name, norm in layer_norms(config).items():
            self.add_module(name, norm)
        for name, module in (experts.layer_parts(config) | per_layer.layer_parts(config)).items():
            self.add_module(name, module)
        self.register_buffer("layer_scalar", torch.ones(1) if config.kind.layer_scalar else None)

    def forward(
        self,
        hidden_states: Float[Tensor, "B S D"],
        position_embeddings: RotaryTables,
        visible: Visibility,
        past_key_values: Cache | None = None,
        cache_position: Int[Tensor, " S"] | None = None,
        output_attentions: bool = False,
        shared: SharedKeys | None = None,
        layer_input: Float[Tensor, "B S P"] | None = None,
        kept: Places | None = None,
    ) -> tuple[Float[Tensor, "B _ D"], Float[Tensor, "B N S T"] | None]:
        """The next hidden states; the attention weights when asked.

        A decoding step takes the fused form of this layer where there is one: see `fused`. shared: where layers leave
        keys and values for others. layer_input: the embedding of the tokens that is this layer's own. kept: the
        positions that anybody asks for; the others still have keys and values, but may be left out of what comes back.
        """
        x, told = hidden_states, (position_embeddings, visible, past_key_values, cache_position)
        fused = fused_layer(self, x, output_attentions, leaves_out=kept is not None)
        if fused is not None:
            x, weights = fused(x, *told, shared, layer_input, kept), None
        else:
            try:
                x, weights = self._by_modules(x, *told, output_attentions, shared, layer_input)
            except RuntimeError as error:
                explain(self, self.layer_idx, error)
                raise
        return x if self.layer_scalar is None else x * self.layer_scalar, weights

    def _by_modules(
        self,
        x: Float[Tensor, "B S D"],
        position_embeddings: RotaryTables,
        visible: Visibility,
        past_key_values: Cache | None,
        cache_position: Int[Tensor, " S"] | None,
        output_attentions: bool,
        shared: SharedKeys | None,
        layer_input: Float[Tensor, "B S P"] | None,
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B N S T"] | None]:
        """Each module after the other, with its hooks and whatever stands in its place."""
        told = (position_embeddings, visible, past_key_values, cache_position)
        before, after, before_mlp, after_mlp = self.norms()
        attention: Any = self.self_attn
        if isinstance(attention, GemmaAttention):
            attended, weights = attention(before(x), *told, output_attentions, shared)
        else:
            named = self._by_name(*told, output_attentions, shared, queries=x.shape[1])
            attended, weights = attention(before(x), **named)[:2]
        x = x + through(after, attended)
        inner = self.mlp(before_mlp(x))
        inner = experts.beside(self, x, inner) if "experts" in self._modules else inner
        x = x + through(after_mlp, inner)
        if layer_input is not None:
            x = x + per_layer.added(self.parts(), x, layer_input)
        return x, weights

    def _by_name(
        self,
        position_embeddings: RotaryTables,
        visible: Visibility,
        past_key_values: Cache | None,
        cache_position: Int[Tensor, " S"] | None,
        output_attentions: bool,
        shared: SharedKeys | None,
        queries: int,
    ) -> dict[str, Any]:
        """What attention that is not this package's is called with beside the hidden states, by transformers' names.

        Tables are (B, S, H), the mask (B, 1, S, T). What only passes its arguments on to ours finds these too.
        """
        keys = queries
        if past_key_values is not None and cache_position is not None and past_key_values.max_cache_len is not None:
            keys = past_key_values.max_cache_len
        elif past_key_values is not None:
            keys += past_key_values.get_seq_length(self.layer_idx)
        cos, sin = position_embeddings
        return {
            "position_embeddings": (cos.squeeze(1), sin.squeeze(1)),
            "attention_mask": visible.written_out(queries, keys, cos.device),
            "past_key_values": past_key_values,
            "cache_position": cache_position,
            "output_attentions": output_attentions,
            "visible": visible,
            "shared": shared,
        }

    def norms(self) -> LayerNorms:
        own = self._modules
        return LayerNorms(*[None if name is None else own[name] for name in self.norm_names])

    def parts(self) -> LayerParts:
        """The modules that `forward` runs."""
        own = self._modules
        attention, mlp = own["self_attn"], own["mlp"]
        assert attention is not None and mlp is not None
        a, m = attention._modules.get, mlp._modules.get
        q, k, v, o = a("q_proj"), a("k_proj"), a("v_proj"), a("o_proj")
        gate, up, down, act = m("gate_proj"), m("up_proj"), m("down_proj"), getattr(mlp, "act_fn", None)
        extra = [own.get(name) for name in (*per_layer.LAYER_PARTS, "experts")]
        return LayerParts(attention, mlp, self.norms(), self.norm_names, q, k, v, o, gate, up, down, act, *extra)  # type: ignore[arg-type]


class GemmaModel(GemmaPreTrainedModel):
    """The decoder without a head: token ids in, hidden states out."""

    def __init__(self, config: GemmaConfig):
        super().__init__(config)
        config = self.config
        self.vocab_size = config.vocab_size
        pad = config.pad_token_id if config.pad_token_id is not None and config.pad_token_id >= 0 else None
        self.embed_tokens = GemmaScaledEmbedding(config.vocab_size, config.hidden_size, padding_idx=pad)
        self.layers = nn.ModuleList(GemmaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        kind = config.kind
        self.scales_stream = kind.norms_outputs
        self.norm = GemmaRMSNorm(
            config.hidden_size, config.rms_norm_eps, offset=kind.norm_offset, reads_stream=self.scales_stream
        )
        self.specs = tuple(config.layer(i) for i in range(config.num_hidden_layers))
        # One description of who sees whom a window, one rotary table a kind: most models have one of each.
        self.windows = tuple(dict.fromkeys(spec.window for spec in self.specs))
        self.ropes = {spec.rope: _rotary_name(spec.rope) for spec in self.specs}
        for rope, name in self.ropes.items():
            self.add_module(name, GemmaRotaryEmbedding(config, rope))
        for name, module in per_layer.model_parts(config, pad).items():
            self.add_module(name, module)
        self.kv_sources = frozenset(spec.kv_source for spec in self.specs if spec.kv_source is not None)
        self.first_reader = next((i for i, spec in enumerate(self.specs) if spec.kv_source is not None), None)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Shaped[Tensor, "B _"] | Shaped[Tensor, "_ _ _ _"] | Mapping[str, Tensor] | None = None,
        position_ids: Int[Tensor, "#B S"] | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Float[Tensor, "B S D"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Int[Tensor, " S"] | None = None,
        *,
        is_causal: bool | None = None,
        per_layer_inputs: Float[Tensor, "B S L P"] | None = None,
        positions_to_keep: int | Places = 0,
        **packing: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the decoder.

        Args:
            input_ids: (B, S) token ids; or give `inputs_embeds`, (B, S, D), used as they are (not scaled again).
            attention_mask: (B, T) of 0 and 1 over past and current tokens; or 4-D, bool or additive, used as it is; or
                one of these for each of the configuration's `layer_types`, by its name.
            position_ids: (B, S); by default they continue those of the cache's tokens. Given without a cache, a restart
                of them begins a new document, and tokens see their own document only, beside a 2-D mask too.
            past_key_values: a Cache, or the older tuple of (key, value) a layer; the same form comes back.
            use_cache: whether `past_key_values` come back; by default as the configuration says.
            output_attentions, output_hidden_states, return_dict: as the configuration says unless given.
            cache_position: (S,) places in a StaticCache.
            is_causal: False lets every token see all others that are not padding; by default as the configuration
                says (`use_bidirectional_attention`).
            per_layer_inputs: (B, S, layers, width), where layers have embeddings of their own, those of the tokens; by
                default looked up by input_ids or, with inputs_embeds alone, by the tokens that these are of.
            positions_to_keep: those that last_hidden_state has: 0 for all, n for the last n, or places in the sequence.
                What nobody then asks for is not computed: the last layer behind its attention, and layers that read
                the keys of earlier ones; unless somebody watches.
            packing: `masks.PACKING`, which collators give beside position_ids that restart, and which say the same.

        Raises:
            InputError (a ValueError): not exactly one of input_ids and inputs_embeds, or shapes that do not fit.
            TokenOutOfRange: an id that the vocabulary does not have.
        """
        if packing:
            check_packing(packing, position_ids)
        kept = places("positions_to_keep", positions_to_keep)
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
        if recompute and self.kv_sources and how.get("use_reentrant"):
            raise InputError(
                "use_reentrant is True, under which no gradient reaches keys and values that other layers read too: "
                "call gradient_checkpointing_enable() without it."
            )
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
        causal = config.is_causal if is_causal is None else is_causal
        documents = cache is None or cache.packs or cache.packed or (past_key_values is None and past == 0)
        if cache is not None and cache.packed:
            visible = dict.fromkeys(self.windows, Visibility(None, causal=True))
        else:
            visible = self._visible(
                attention_mask,
                output_attentions,
                batch=B,
                queries=S,
                keys=keys,
                past=past,
                causal=causal,
                position_ids=position_ids if documents else None,
                device=device,
            )
        if cache is not None and isinstance(past, int) and not (cache.packed or cache.packs):
            cache.note(attention_mask, position_ids, past + S)
            first = cache.next_position(past, B)
            if position_ids is None and isinstance(first, Tensor):
                position_ids = first.to(device) + torch.arange(S, device=device)
        if position_ids is None:
            position_ids = (torch.arange(past, past + S, device=device) if isinstance(past, int) else past)[None]
        dtype = inputs_embeds.dtype
        tables = {rope: getattr(self, name)(position_ids, dtype) for rope, name in self.ropes.items()}

        scale = STREAM_SCALES.get(dtype, 1.0) if self.scales_stream else 1.0
        hidden = inputs_embeds if scale == 1.0 else inputs_embeds * scale
        all_hidden, all_weights = [], []
        extras = self._layer_inputs(input_ids, inputs_embeds, per_layer_inputs)
        shared = SharedKeys(self.kv_sources) if self.kv_sources else None
        leaves_out = (
            _leaves_out(positions_to_keep, S)
            and not (recompute or output_attentions or output_hidden_states)
            and not is_watched(self.norm, *self.layers[-1:])
        )
        early = (
            leaves_out
            and self.kv_sources
            and isinstance(positions_to_keep, int)
            and isinstance(past, int)
            and (attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2))
            and not documents
        )
        for i, (layer, spec) in enumerate(zip(self.layers, self.specs, strict=False)):
            if early and i == self.first_reader:
                hidden = hidden[:, kept]
                tables = {rope: (cos[..., kept, :], sin[..., kept, :]) for rope, (cos, sin) in tables.items()}
                extras = [None if extra is None else extra[:, kept] for extra in extras]
                visible = self._visible(
                    attention_mask, False, batch=B, queries=hidden.shape[1], keys=keys, past=past + S - hidden.shape[1],
                    causal=causal, position_ids=None, device=device,
                )  # fmt: skip
            if output_hidden_states:
                all_hidden.append(hidden if scale == 1.0 else hidden / scale)
            told = (tables[spec.rope], visible[spec.window], cache, cache_position, output_attentions)
            arguments = (hidden, *told, shared, extras[i])
            if leaves_out and layer is self.layers[-1] and hidden.shape[1] == S and type(layer) is GemmaDecoderLayer:
                arguments = (*arguments, kept)
            again = recompute and i % self.checkpointing_every == 0
            hidden, weights = checkpoint(layer, *arguments, **how) if again else layer(*arguments)
            if output_attentions:
                all_weights.append(weights)
        hidden = self.norm(hidden)
        if output_hidden_states:
            all_hidden.append(hidden)
        if hidden.shape[1] == S and not (isinstance(positions_to_keep, int) and positions_to_keep == 0):
            hidden = hidden[:, kept]
        out = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=(cache.to_legacy_cache() if legacy and cache else cache) if use_cache else None,
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )
        return out if return_dict else out.to_tuple()

    def _visible(
        self, mask: Tensor | Mapping[str, Tensor] | None, weights: bool, *, keys: int, **told: Any
    ) -> dict[int | None, Visibility]:
        """By each window of the layers, who sees whom. weights: whether attention weights are asked for."""
        attn = self.config.attn_implementation
        # A window that all keys fit into hides nothing.
        one = not isinstance(mask, Mapping)
        hiding = {w: None if w is None or (one and keys <= w) else w for w in self.windows}
        made = {
            window: visibility(
                _mask_of(mask, window),
                keys=keys,
                window=window,
                dense=weights or attn not in MASKLESS,
                segmented=not weights and attn in SEGMENTED,
                whole=weights,
                **told,
            )
            for window in dict.fromkeys(hiding.values())
        }
        return {window: made[hides] for window, hides in hiding.items()}

    def _layer_inputs(
        self,
        ids: Int[Tensor, "B S"] | None,
        embeds: Float[Tensor, "B S D"],
        tokens: Float[Tensor, "B S L P"] | None,
    ) -> Sequence[Float[Tensor, "B S P"] | None]:
        """What each layer reads beside the stream; None where it reads nothing."""
        wide = self.config.hidden_size_per_layer_input
        if not wide:
            if tokens is not None:
                raise InputError(
                    "per_layer_inputs is given, and the layers of this model have no embeddings of their own."
                )
            return [None] * len(self.layers)
        if tokens is None:
            ids = per_layer.ids_of(self.embed_tokens, embeds) if ids is None else ids
            tokens = per_layer.token_inputs(self, ids)
        expected = (*embeds.shape[:2], self.config.num_hidden_layers, wide)
        if tuple(tokens.shape) != expected:
            raise InputError(f"per_layer_inputs has shape {tuple(tokens.shape)}; it must be {expected}.")
        return per_layer.layer_inputs(self, embeds, tokens).unbind(2)

    def _embed(self, input_ids: Int[Tensor, "B S"] | None) -> Float[Tensor, "B S D"]:
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
        legacy = isinstance(past, tuple | list)
        if not legacy and (cache := cache_of(past)) is not None:
            return cache, False
        layers = len(self.config.kv_layers())
        if not isinstance(past, (tuple, list)) or len(past) not in (0, layers):
            found = f"{len(past)} layers" if isinstance(past, (tuple, list)) else f"a {type(past).__name__}"
            raise InputError(f"past_key_values is {found}; give a gemmakit Cache, or (key, value) of {layers} layers.")
        return DynamicCache.from_legacy_cache(past), True


def _mask_of(mask: Tensor | Mapping[str, Tensor] | None, window: int | None) -> Tensor | None:
    """The mask for layers with this window."""
    if not isinstance(mask, Mapping):
        return mask
    name = layer_type(window)
    if name not in mask:
        raise InputError(f"attention_mask has {', '.join(map(repr, mask)) or 'no mask'}; it lacks one for {name!r}.")
    return mask[name]


def places(name: str, positions: Any) -> Places:
    """What picks positions of a sequence: 0 for all, n for the last n, or their places. name: of the argument."""
    if isinstance(positions, int) and not isinstance(positions, bool) and positions >= 0:
        return slice(-positions or None, None)
    if isinstance(positions, slice | list) or (isinstance(positions, Tensor) and positions.dim() == 1):
        return positions
    raise InputError(f"{name} is {positions!r}; give a whole number >= 0, or positions as a 1-D tensor.")


def _leaves_out(positions: int | Places, S: int) -> bool:
    """Whether not all of S positions are asked for. So many of them in another order are as if all were."""
    if isinstance(positions, int):
        return 0 < positions < S
    return len(range(S)[positions] if isinstance(positions, slice) else positions) != S


def is_watched(*modules: nn.Module) -> bool:
    """Whether somebody sees what these modules give."""
    if torch.compiler.is_compiling():
        return False
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)


def _rotary_name(rope: str) -> str:
    return "rotary_emb" if rope == FULL_ATTENTION else f"rotary_emb_{rope}"


def check_tensor(name: str, value: Any) -> None:
    """Raises InputError for anything but a tensor or None; a tokenizer's whole result is the commonest of these."""
    if value is None or isinstance(value, Tensor):
        return
    remedy = f"unpack it, as in model(**{name})" if isinstance(value, Mapping) else f"torch.as_tensor({name})"
    raise InputError(f"{name} is a {type(value).__name__}; it must be a tensor: {remedy}.")


def _check_shapes(embeds: Tensor, position_ids: Tensor | None, width: int) -> None:
    if embeds.dim() != 3 or embeds.shape[-1] != width:
        raise InputError(f"inputs_embeds has shape {tuple(embeds.shape)}; it must be (batch, sequence, {width}).")
    B, S, _ = embeds.shape
    if not B or not S:
        raise InputError(f"there is nothing to run: {B} rows of {S} tokens.")
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[0] not in (1, B)
                                     or position_ids.shape[1] != S):  # fmt: skip
        raise InputError(f"position_ids has shape {tuple(position_ids.shape)}; it must be ({B}, {S}) or (1, {S}).")


register_nodes()
globals().update(members(GemmaModel))
